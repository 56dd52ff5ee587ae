package roce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Header lengths in bytes.
const (
	bthLen          = 12
	icrcLen         = 4
	maxHeaderLen    = 40 // BTH and AtomicETH
	ipv4Len         = 20
	ipv6Len         = 40
	udpLen          = 8
	ethernetLen     = 14
	protocolUDP     = 17
	etherTypeIPv4   = 0x0800
	etherTypeIPv6   = 0x86dd
	defaultPKey     = 0xffff
	pkeyMask        = 0x7fff // the top bit is the membership, not the partition
	transportVer    = 0
	defaultHopLimit = 64
)

// Port is the UDP destination port of RoCEv2.
const Port = 4791

// ErrMalformed is wrapped by every error about bytes that are no valid packet or message.
var ErrMalformed = errors.New("malformed")

// BTH is the base transport header, 12 bytes (IBA volume 1, section 9.2; RoCEv2 annex A17 for FECN and BECN).
//
// A BTH from Packet or from ParseBTH is long enough for every accessor.
type BTH []byte

// BTHFields are the fields of a BTH for encoding.
type BTHFields struct {
	Opcode    Opcode
	Solicited bool
	Migrated  bool // set by all who do not migrate paths
	Pad       uint8
	PKey      uint16
	FECN      bool
	BECN      bool
	DestQP    QPN
	AckReq    bool
	PSN       PSN
}

// ParseBTH returns the header at the start of b. The error wraps ErrMalformed if b is too short for the header and the
// extended headers of its opcode, or if the opcode or the version is unknown.
func ParseBTH(b []byte) (BTH, error) {
	if len(b) < bthLen {
		return nil, fmt.Errorf("%w BTH: %d bytes", ErrMalformed, len(b))
	}
	h := BTH(b)
	switch n := h.Opcode().HeaderLen(); {
	case n == 0:
		return nil, fmt.Errorf("%w BTH: %v", ErrMalformed, h.Opcode())
	case len(b) < n:
		return nil, fmt.Errorf("%w %v: %d bytes", ErrMalformed, h.Opcode(), len(b))
	case h.Version() != transportVer:
		return nil, fmt.Errorf("%w BTH: version %d", ErrMalformed, h.Version())
	}
	return h[:h.Opcode().HeaderLen()], nil
}

// Opcode returns the operation.
func (h BTH) Opcode() Opcode { return Opcode(h[0]) }

// Solicited reports whether the sender wants the receiver's event.
func (h BTH) Solicited() bool { return h[1]&0x80 != 0 }

// Migrated returns the path migration state bit.
func (h BTH) Migrated() bool { return h[1]&0x40 != 0 }

// Pad returns how many bytes (0 to 3) fill the payload up to a multiple of four.
func (h BTH) Pad() int { return int(h[1] >> 4 & 3) }

// Version returns the transport header version, which is 0.
func (h BTH) Version() uint8 { return h[1] & 0xf }

// PKey returns the partition key.
func (h BTH) PKey() uint16 { return binary.BigEndian.Uint16(h[2:]) }

// FECN reports the forward congestion notification bit.
func (h BTH) FECN() bool { return h[4]&0x80 != 0 }

// BECN reports the backward congestion notification bit.
func (h BTH) BECN() bool { return h[4]&0x40 != 0 }

// DestQP returns the queue pair that the packet is for.
func (h BTH) DestQP() QPN { return QPN(uint24(h[5:])) }

// AckReq reports whether the requester wants an acknowledgement now.
func (h BTH) AckReq() bool { return h[8]&0x80 != 0 }

// PSN returns the packet sequence number.
func (h BTH) PSN() PSN { return PSN(uint24(h[9:])) }

// Fields returns all fields.
func (h BTH) Fields() BTHFields {
	return BTHFields{h.Opcode(), h.Solicited(), h.Migrated(), uint8(h.Pad()), h.PKey(), h.FECN(), h.BECN(), h.DestQP(), h.AckReq(), h.PSN()}
}

// Encode writes f into the first 12 bytes.
func (h BTH) Encode(f *BTHFields) {
	h[0] = uint8(f.Opcode)
	h[1] = bit(f.Solicited, 0x80) | bit(f.Migrated, 0x40) | f.Pad&3<<4 | transportVer
	binary.BigEndian.PutUint16(h[2:], f.PKey)
	h[4] = bit(f.FECN, 0x80) | bit(f.BECN, 0x40)
	putUint24(h[5:], uint32(f.DestQP))
	h[8] = bit(f.AckReq, 0x80)
	putUint24(h[9:], uint32(f.PSN))
}

// RETH returns the RDMA extended header.
//
// Precondition: the opcode has one, and h comes from ParseBTH.
func (h BTH) RETH() RETH { return RETH(h[bthLen : bthLen+rethLen]) }

// AETH returns the acknowledge extended header. Precondition as for RETH.
func (h BTH) AETH() AETH { return AETH(h[bthLen : bthLen+aethLen]) }

// AtomicETH returns the atomic extended header. Precondition as for RETH.
func (h BTH) AtomicETH() AtomicETH { return AtomicETH(h[bthLen : bthLen+atomicETHLen]) }

// AtomicAckETH returns the atomic acknowledge extended header. Precondition as for RETH.
func (h BTH) AtomicAckETH() AtomicAckETH {
	return AtomicAckETH(h[bthLen+aethLen : bthLen+aethLen+atomicAckLen])
}

// DETH returns the datagram extended header. Precondition as for RETH.
func (h BTH) DETH() DETH { return DETH(h[bthLen : bthLen+dethLen]) }

// ImmDt returns the immediate data, or the rkey of an invalidate, which are the last header where present.
// Precondition as for RETH.
func (h BTH) ImmDt() ImmDt { return ImmDt(h[h.Opcode().HeaderLen()-immDtLen : h.Opcode().HeaderLen()]) }

// Extended header lengths in bytes.
const (
	rethLen      = 16
	aethLen      = 4
	atomicETHLen = 28
	atomicAckLen = 8
	immDtLen     = 4
	dethLen      = 8
)

// RETH is the RDMA extended transport header: where a READ or WRITE goes (IBA section 9.3.3).
type RETH []byte

// VA returns the remote virtual address.
func (h RETH) VA() uint64 { return binary.BigEndian.Uint64(h) }

// RKey returns the key of the remote region.
func (h RETH) RKey() RKey { return RKey(binary.BigEndian.Uint32(h[8:])) }

// Length returns the bytes of the whole message.
func (h RETH) Length() uint32 { return binary.BigEndian.Uint32(h[12:]) }

// Encode writes the three fields.
func (h RETH) Encode(va uint64, key RKey, length uint32) {
	binary.BigEndian.PutUint64(h, va)
	binary.BigEndian.PutUint32(h[8:], uint32(key))
	binary.BigEndian.PutUint32(h[12:], length)
}

// AtomicETH is the atomic extended transport header (IBA section 9.3.5). All its fields are big endian on the wire,
// while the word in memory has the responder's byte order: little endian, here.
type AtomicETH []byte

// VA returns the remote virtual address, which must be a multiple of eight.
func (h AtomicETH) VA() uint64 { return binary.BigEndian.Uint64(h) }

// RKey returns the key of the remote region.
func (h AtomicETH) RKey() RKey { return RKey(binary.BigEndian.Uint32(h[8:])) }

// SwapAdd returns the new value of a compare-and-swap, or what a fetch-and-add adds.
func (h AtomicETH) SwapAdd() uint64 { return binary.BigEndian.Uint64(h[12:]) }

// Compare returns the value that a compare-and-swap expects.
func (h AtomicETH) Compare() uint64 { return binary.BigEndian.Uint64(h[20:]) }

// Encode writes the four fields.
func (h AtomicETH) Encode(va uint64, key RKey, swapAdd, compare uint64) {
	binary.BigEndian.PutUint64(h, va)
	binary.BigEndian.PutUint32(h[8:], uint32(key))
	binary.BigEndian.PutUint64(h[12:], swapAdd)
	binary.BigEndian.PutUint64(h[20:], compare)
}

// AtomicAckETH carries the value that an atomic operation found (IBA section 9.5.3).
type AtomicAckETH []byte

// Original returns the value of the word before the operation.
func (h AtomicAckETH) Original() uint64 { return binary.BigEndian.Uint64(h) }

// Encode writes the value.
func (h AtomicAckETH) Encode(v uint64) { binary.BigEndian.PutUint64(h, v) }

// ImmDt is the immediate data of a SEND or WRITE, four bytes that are handed to the peer's completion as they are.
type ImmDt []byte

// Value returns the four bytes as a big-endian number.
func (h ImmDt) Value() uint32 { return binary.BigEndian.Uint32(h) }

// Encode writes the number.
func (h ImmDt) Encode(v uint32) { binary.BigEndian.PutUint32(h, v) }

// DETH is the datagram extended transport header (IBA section 9.3.1).
type DETH []byte

// QKey returns the queue key.
func (h DETH) QKey() uint32 { return binary.BigEndian.Uint32(h) }

// SrcQP returns the sender's queue pair.
func (h DETH) SrcQP() QPN { return QPN(uint24(h[5:])) }

// Encode writes the two fields.
func (h DETH) Encode(qkey uint32, src QPN) {
	binary.BigEndian.PutUint32(h, qkey)
	h[4] = 0
	putUint24(h[5:], uint32(src))
}

// AETH is the acknowledge extended transport header (IBA section 9.3.4).
type AETH []byte

// Syndrome returns what happened to the request.
func (h AETH) Syndrome() Syndrome { return Syndrome(h[0]) }

// MSN returns the number of messages that the responder has finished, 24 bits.
func (h AETH) MSN() uint32 { return uint24(h[1:]) }

// Encode writes the two fields.
func (h AETH) Encode(s Syndrome, msn uint32) {
	h[0] = uint8(s)
	putUint24(h[1:], msn)
}

func bit(on bool, mask uint8) uint8 {
	if on {
		return mask
	}
	return 0
}

func uint24(b []byte) uint32 { return uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]) }

func putUint24(b []byte, v uint32) { b[0], b[1], b[2] = uint8(v>>16), uint8(v>>8), uint8(v) }

// GID returns the RoCEv2 global identifier of an address: the address itself, IPv4 in its mapped form.
func GID(a netip.Addr) [16]byte { return a.As16() }
