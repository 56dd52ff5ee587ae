package roce

import (
	"encoding/binary"
	"hash/crc32"
	"net/netip"
)

// The invariant CRC of RoCEv2 (annex A17, section A17.3.3) is CRC-32/IEEE over eight bytes of ones, the IP header, the
// UDP header, the BTH and everything up to the pad, with every field that a router may change set to ones: in IPv4 the
// type of service, time to live and checksum; in IPv6 class, flow label and hop limit; the UDP checksum; FECN, BECN and
// the six bits beside them in the BTH. It stands behind the pad, little endian.
//
// The IPv4 identification is *not* among those fields. Who sends through a UDP socket must know what the kernel will
// put there, and who receives through one must find out (see checker.open).

// maskedPrefix is the CRC register after the eight bytes of ones.
var maskedPrefix = crc32.ChecksumIEEE([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})

// afterID is how many bytes of IPv4 and UDP header follow the identification.
const afterID = ipv4Len - 6 + udpLen

// ICRC computes invariant CRCs for links that see the headers around a packet. The zero value is ready. It keeps scratch
// space and must not be used by two goroutines at once.
type ICRC struct{ c checker }

// Sum returns the ICRC of data, which is BTH up to and including the pad, between src and dst. id and flags are those of
// the IPv4 header, without meaning on IPv6. The ICRC follows the data in little-endian order.
//
// Precondition: len(data) >= 12.
func (i *ICRC) Sum(src, dst netip.AddrPort, id, flags uint16, data []byte) uint32 {
	return i.c.sum(src, dst, id, flags, data)
}

// checker computes and checks ICRCs. The zero value is ready. It keeps scratch space and must not be used by two
// goroutines at once.
type checker struct {
	scratch [ipv6Len + udpLen]byte
	recent  [64]around
	inverse []uint32 // x^-8n in the field of the CRC, by n, as far as it was needed
	off     bool     // leave it out, to measure what it costs
}

// around is what all but the data adds to an ICRC, the same for many packets of a connection.
type around struct {
	key aroundKey
	crc uint32
}

type aroundKey struct {
	src, dst  netip.AddrPort
	id, flags uint16
	size      int // of the data
}

// masked is the place of the byte of the BTH that counts as 0xff.
const masked = 4

// blank is data whose bytes are all zero but for the one that counts as 0xff.
var blank = [maxDatagram]byte{masked: 0xff}

// dataSum is what data, BTH up to and including the pad, adds to the ICRC, wherever it goes: a CRC is linear, so that of several
// things one behind the other is the exclusive or of those of each with zeroes in place of the others, and zeroes in front count
// for nothing.
//
// Precondition: len(data) >= 12.
func dataSum(data []byte) uint32 {
	if data[masked] == 0 {
		return ^crc32.Update(^uint32(0), crc32.IEEETable, data)
	}
	h := [bthLen]byte(data)
	h[masked] = 0
	return ^crc32.Update(crc32.Update(^uint32(0), crc32.IEEETable, h[:]), crc32.IEEETable, data[bthLen:])
}

// dataSumAt is dataSum(b[at:]) for data behind four zeroes, such as the place of an ICRC that is not there yet or not any more.
// Counted with them, a full packet without extended header has a length that CRC instructions take to the end; the last twelve
// bytes would else take a quarter as long as all the others. The zeroes must not have been stored just before: the instructions
// would wait for that.
func dataSumAt(b []byte, at int) uint32 {
	if (len(b)-at)%16 != 16-icrcLen || b[at+masked] != 0 {
		return dataSum(b[at:])
	}
	return ^crc32.Update(^uint32(0), crc32.IEEETable, b[at-icrcLen:])
}

// sum returns the ICRC of data, which is BTH up to and including the pad. id and flags are those of the IPv4 header.
//
// Precondition: len(data) >= 12.
func (c *checker) sum(src, dst netip.AddrPort, id, flags uint16, data []byte) uint32 {
	if c.off {
		return 0
	}
	return c.around(aroundKey{src, dst, id, flags, len(data)}) ^ dataSum(data)
}

// around returns the ICRC of a packet whose data is blank.
func (c *checker) around(key aroundKey) uint32 {
	p := &c.recent[(key.size>>2*aroundSpread+int(key.id))%len(c.recent)]
	if p.key != key {
		crc := c.headers(&key)
		for at := 0; at < key.size; {
			part := blank[min(at, bthLen):min(len(blank), min(at, bthLen)+key.size-at)]
			crc = crc32.Update(crc, crc32.IEEETable, part)
			at += len(part)
		}
		*p = around{key, crc}
	}
	return p.crc
}

// aroundSpread keeps the packets of one segmented datagram, whose identifications count up, away from those of the next size.
const aroundSpread = 37

// headers returns the CRC register after the IP and UDP headers.
func (c *checker) headers(k *aroundKey) uint32 {
	s := c.scratch[:]
	be := binary.BigEndian
	udp := udpLen + k.size + icrcLen
	n := 0
	if k.src.Addr().Is4() {
		be.PutUint32(s, 0x45ff0000|uint32(ipv4Len+udp))
		be.PutUint16(s[4:], k.id)
		be.PutUint16(s[6:], k.flags)
		be.PutUint32(s[8:], 0xff11ffff)
		a, b := k.src.Addr().As4(), k.dst.Addr().As4()
		copy(s[12:], a[:])
		copy(s[16:], b[:])
		n = ipv4Len
	} else {
		be.PutUint32(s, 0x6fffffff)
		be.PutUint32(s[4:], uint32(udp)<<16|protocolUDP<<8|0xff)
		a, b := k.src.Addr().As16(), k.dst.Addr().As16()
		copy(s[8:], a[:])
		copy(s[24:], b[:])
		n = ipv6Len
	}
	be.PutUint16(s[n:], k.src.Port())
	be.PutUint16(s[n+2:], k.dst.Port())
	be.PutUint16(s[n+4:], uint16(udp))
	be.PutUint16(s[n+6:], 0xffff)
	return crc32.Update(maskedPrefix, crc32.IEEETable, s[:n+udpLen])
}

// open checks the ICRC at the end of datagram and returns what stands before it. Flags are taken as DF, and the IPv4
// identification, which a UDP socket does not show, is solved for: a CRC is linear, so the difference between the ICRC
// found and that for identification 0, taken back to the place of the identification, must be a 16-bit number. Any
// packet passes this check with a probability of 2^-16 instead of 2^-32; on IPv6, which has no identification, the
// check is full.
func (c *checker) open(src, dst netip.AddrPort, datagram []byte) (data []byte, id uint16, ok bool) {
	if len(datagram) < bthLen+icrcLen || len(datagram) > maxDatagram {
		return nil, 0, false
	}
	data = datagram[:len(datagram)-icrcLen]
	return c.judge(src, dst, data, 0, c.sum(src, dst, 0, DontFragment, data)^binary.LittleEndian.Uint32(datagram[len(data):]))
}

// openAt is open for the data b[at:] with that ICRC. There are four zeroes before at. It is faster when the identification is the one
// that is expected. Preconditions: those of dataSum, and the length of a packet.
func (c *checker) openAt(src, dst netip.AddrPort, b []byte, at int, icrc uint32, expected uint16) (data []byte, id uint16, ok bool) {
	delta := icrc
	if !c.off {
		delta ^= c.around(aroundKey{src, dst, expected, DontFragment, len(b) - at}) ^ dataSumAt(b, at)
	}
	return c.judge(src, dst, b[at:], expected, delta)
}

// judge is open for data whose ICRC is delta away from what it would be with the expected identification.
func (c *checker) judge(src, dst netip.AddrPort, data []byte, expected uint16, delta uint32) ([]byte, uint16, bool) {
	if delta == 0 {
		return data, expected, true
	}
	if !src.Addr().Is4() {
		return nil, 0, false
	}
	// Two bytes b0, b1 that enter the register are like b0 | b1<<8 in the register with two bytes of zeroes entering.
	v := mulCRC(delta, c.unshift(afterID+len(data)+2))
	return data, expected ^ uint16(v<<8|v>>8&0xff), v < 1<<16
}

// maxDatagram is the longest UDP payload that this package sends or takes.
const maxDatagram = MaxPathMTU + maxHeaderLen + icrcLen

// unshift returns x^-8n. Precondition: n is bounded by the caller, as the table grows up to it.
func (c *checker) unshift(n int) uint32 {
	if c.inverse == nil {
		c.inverse = make([]uint32, 1, afterID+maxDatagram+2)
		c.inverse[0] = 1 << 31 // the reflected 1
	}
	for len(c.inverse) <= n {
		r := c.inverse[len(c.inverse)-1]
		for range 8 {
			if r>>31 != 0 {
				r = (r^crc32.IEEE)<<1 | 1
			} else {
				r <<= 1
			}
		}
		c.inverse = append(c.inverse, r)
	}
	return c.inverse[n]
}

// mulCRC multiplies two polynomials modulo the CRC's, bits reflected.
func mulCRC(a, b uint32) uint32 {
	var p uint32
	for ; a != 0; a <<= 1 {
		p ^= b & -(a >> 31)
		b = b>>1 ^ crc32.IEEE&-(b&1)
	}
	return p
}
