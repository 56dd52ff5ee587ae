package roce

import "fmt"

// Opcode is the first byte of the BTH: the transport service in its upper three bits, the operation in its lower five
// (InfiniBand Architecture Specification, volume 1, section 9.2.1, table 38).
type Opcode uint8

// The opcodes of the reliable connected service, and the two others that a RoCEv2 endpoint meets: the unreliable
// datagram that carries the connection manager's messages, and the congestion notification packet (annex A17).
const (
	OpSendFirst       Opcode = 0x00
	OpSendMiddle      Opcode = 0x01
	OpSendLast        Opcode = 0x02
	OpSendLastImm     Opcode = 0x03
	OpSendOnly        Opcode = 0x04
	OpSendOnlyImm     Opcode = 0x05
	OpWriteFirst      Opcode = 0x06
	OpWriteMiddle     Opcode = 0x07
	OpWriteLast       Opcode = 0x08
	OpWriteLastImm    Opcode = 0x09
	OpWriteOnly       Opcode = 0x0a
	OpWriteOnlyImm    Opcode = 0x0b
	OpReadRequest     Opcode = 0x0c
	OpReadFirst       Opcode = 0x0d
	OpReadMiddle      Opcode = 0x0e
	OpReadLast        Opcode = 0x0f
	OpReadOnly        Opcode = 0x10
	OpAck             Opcode = 0x11
	OpAtomicAck       Opcode = 0x12
	OpCompareSwap     Opcode = 0x13
	OpFetchAdd        Opcode = 0x14
	OpSendLastInval   Opcode = 0x16
	OpSendOnlyInval   Opcode = 0x17
	OpUDSendOnly      Opcode = 0x64
	OpUDSendOnlyImm   Opcode = 0x65
	OpCongestionNotif Opcode = 0x81
)

// opKind groups the opcodes that one piece of code handles.
type opKind uint8

const (
	kindUnknown opKind = iota
	kindSend
	kindWrite
	kindRead // request
	kindAtomic
	kindReadResponse
	kindAck
	kindAtomicAck
	kindDatagram
	kindCongestion
)

// position says where in its message a packet stands.
type position uint8

const (
	atStart position = 1 << iota // first or only
	atEnd                        // last or only
	atOnly  = atStart | atEnd
	atMid   = position(0)
)

// extHeaders says which extended headers follow the BTH; they always come in the order of these bits.
type extHeaders uint8

const (
	hasDETH extHeaders = 1 << iota
	hasRETH
	hasAtomicETH
	hasAETH
	hasAtomicAckETH
	hasImmDt
	hasIETH
)

// opInfo is one row of the opcode table.
type opInfo struct {
	name    string
	kind    opKind
	pos     position
	ext     extHeaders
	hdrLen  uint8 // BTH and extended headers, bytes
	payload bool  // a payload may follow
}

// opcodes is the table that parser, builder and state machines read. A row with kindUnknown is an opcode that is not
// spoken here: other services, and those reserved.
var opcodes = [256]opInfo{
	OpSendFirst:       {"SEND First", kindSend, atStart, 0, 12, true},
	OpSendMiddle:      {"SEND Middle", kindSend, atMid, 0, 12, true},
	OpSendLast:        {"SEND Last", kindSend, atEnd, 0, 12, true},
	OpSendLastImm:     {"SEND Last with Immediate", kindSend, atEnd, hasImmDt, 16, true},
	OpSendOnly:        {"SEND Only", kindSend, atOnly, 0, 12, true},
	OpSendOnlyImm:     {"SEND Only with Immediate", kindSend, atOnly, hasImmDt, 16, true},
	OpWriteFirst:      {"RDMA WRITE First", kindWrite, atStart, hasRETH, 28, true},
	OpWriteMiddle:     {"RDMA WRITE Middle", kindWrite, atMid, 0, 12, true},
	OpWriteLast:       {"RDMA WRITE Last", kindWrite, atEnd, 0, 12, true},
	OpWriteLastImm:    {"RDMA WRITE Last with Immediate", kindWrite, atEnd, hasImmDt, 16, true},
	OpWriteOnly:       {"RDMA WRITE Only", kindWrite, atOnly, hasRETH, 28, true},
	OpWriteOnlyImm:    {"RDMA WRITE Only with Immediate", kindWrite, atOnly, hasRETH | hasImmDt, 32, true},
	OpReadRequest:     {"RDMA READ Request", kindRead, atOnly, hasRETH, 28, false},
	OpReadFirst:       {"RDMA READ Response First", kindReadResponse, atStart, hasAETH, 16, true},
	OpReadMiddle:      {"RDMA READ Response Middle", kindReadResponse, atMid, 0, 12, true},
	OpReadLast:        {"RDMA READ Response Last", kindReadResponse, atEnd, hasAETH, 16, true},
	OpReadOnly:        {"RDMA READ Response Only", kindReadResponse, atOnly, hasAETH, 16, true},
	OpAck:             {"Acknowledge", kindAck, atOnly, hasAETH, 16, false},
	OpAtomicAck:       {"ATOMIC Acknowledge", kindAtomicAck, atOnly, hasAETH | hasAtomicAckETH, 24, false},
	OpCompareSwap:     {"CmpSwap", kindAtomic, atOnly, hasAtomicETH, 40, false},
	OpFetchAdd:        {"FetchAdd", kindAtomic, atOnly, hasAtomicETH, 40, false},
	OpSendLastInval:   {"SEND Last with Invalidate", kindSend, atEnd, hasIETH, 16, true},
	OpSendOnlyInval:   {"SEND Only with Invalidate", kindSend, atOnly, hasIETH, 16, true},
	OpUDSendOnly:      {"UD SEND Only", kindDatagram, atOnly, hasDETH, 20, true},
	OpUDSendOnlyImm:   {"UD SEND Only with Immediate", kindDatagram, atOnly, hasDETH | hasImmDt, 24, true},
	OpCongestionNotif: {"CNP", kindCongestion, atOnly, 0, 12, true},
}

// String returns the specification's name of the opcode.
func (o Opcode) String() string {
	if name := opcodes[o].name; name != "" {
		return name
	}
	return fmt.Sprintf("opcode %#02x", uint8(o))
}

// HeaderLen returns the bytes of the BTH and of the extended headers that follow it for this opcode, or 0 for an
// opcode that this package does not speak.
func (o Opcode) HeaderLen() int { return int(opcodes[o].hdrLen) }
