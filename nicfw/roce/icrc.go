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
	recent  [64]prefix
	masks   []uint32 // what a masked byte before n more adds to the CRC, by n, as far as it was needed
	inverse []uint32 // x^-8n in the field of the CRC, by n, as far as it was needed
	off     bool     // leave it out, to measure what it costs
}

// prefix is the CRC register after the IP and UDP headers, which are the same for many packets of a connection.
type prefix struct {
	key prefixKey
	crc uint32
}

type prefixKey struct {
	src, dst  netip.AddrPort
	id, flags uint16
	size      int
}

// sum returns the ICRC of data, which is BTH up to and including the pad. id and flags are those of the IPv4 header.
//
// Precondition: len(data) >= 12.
func (c *checker) sum(src, dst netip.AddrPort, id, flags uint16, data []byte) uint32 {
	if c.off {
		return 0
	}
	key := prefixKey{src, dst, id, flags, len(data)}
	p := &c.recent[(len(data)>>2*prefixSpread+int(id))%len(c.recent)]
	if p.key != key {
		*p = prefix{key, c.headers(&key)}
	}
	const masked = 4 // the byte of the BTH that counts as 0xff
	if data[masked] == 0 {
		// A CRC is linear: what the byte would add is added afterwards, so that data is gone through once and not touched.
		return crc32.Update(p.crc, crc32.IEEETable, data) ^ c.mask(len(data)-masked-1)
	}
	h := [bthLen]byte(data)
	h[masked] = 0xff
	return crc32.Update(crc32.Update(p.crc, crc32.IEEETable, h[:]), crc32.IEEETable, data[bthLen:])
}

// prefixSpread keeps the packets of one segmented datagram, whose identifications count up, away from those of the next size.
const prefixSpread = 37

// mask returns what a byte of 0xff instead of 0, n bytes before the end, changes of a CRC. Precondition: n < maxDatagram.
func (c *checker) mask(n int) uint32 {
	if c.masks == nil {
		c.masks = append(make([]uint32, 0, maxDatagram), crc32.IEEETable[0xff])
	}
	for len(c.masks) <= n {
		m := c.masks[len(c.masks)-1]
		c.masks = append(c.masks, crc32.IEEETable[byte(m)]^m>>8)
	}
	return c.masks[n]
}

// headers returns the CRC register after the IP and UDP headers.
func (c *checker) headers(k *prefixKey) uint32 {
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
	return c.openNear(src, dst, datagram, 0)
}

// openNear is open that is faster when the identification is the one that is expected.
func (c *checker) openNear(src, dst netip.AddrPort, datagram []byte, expected uint16) (data []byte, id uint16, ok bool) {
	if len(datagram) < bthLen+icrcLen || len(datagram) > maxDatagram {
		return nil, 0, false
	}
	data = datagram[:len(datagram)-icrcLen]
	delta := c.sum(src, dst, expected, DontFragment, data) ^ binary.LittleEndian.Uint32(datagram[len(data):])
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
