package roce

import (
	"fmt"
	"iter"
)

// PSN is a packet sequence number: 24 bits that wrap around.
type PSN uint32

const psnMask = 1<<24 - 1

// Add returns the number n packets after p; n may be negative.
func (p PSN) Add(n int) PSN { return (p + PSN(n)) & psnMask }

// Sub returns how many packets p is after o: negative when p is before o, in [-2^23, 2^23).
func (p PSN) Sub(o PSN) int { return int(int32(uint32(p-o)<<8) >> 8) }

// Before reports whether p comes before o in the half of the number space that ends at o.
func (p PSN) Before(o PSN) bool { return p.Sub(o) < 0 }

// String returns the number in hexadecimal, six digits.
func (p PSN) String() string { return fmt.Sprintf("%06x", uint32(p)) }

// QPN is a queue pair number, 24 bits. 1 is the general service interface, where the connection manager listens.
type QPN uint32

// QPNGeneral is the queue pair of the general services: connection management messages go to it.
const QPNGeneral QPN = 1

// String returns the number in hexadecimal, six digits.
func (q QPN) String() string { return fmt.Sprintf("%06x", uint32(q)) }

// RKey names a memory region to a remote peer.
type RKey uint32

// String returns the key in hexadecimal, eight digits.
func (k RKey) String() string { return fmt.Sprintf("%08x", uint32(k)) }

// packets returns how many packets, and so sequence numbers, a message of n bytes takes: an empty one takes one, too.
func packets(n uint32, mtu int) int {
	if n == 0 {
		return 1
	}
	return int((uint64(n) + uint64(mtu) - 1) / uint64(mtu))
}

// PathMTUs yields the path MTUs that the specification knows with their codes, from the smallest on.
func PathMTUs() iter.Seq2[uint8, int] {
	return func(yield func(uint8, int) bool) {
		for code, mtu := uint8(1), 256; mtu <= MaxPathMTU; code, mtu = code+1, mtu*2 {
			if !yield(code, mtu) {
				return
			}
		}
	}
}

// MaxPathMTU and MinPathMTU bound the payload bytes of one packet.
const (
	MinPathMTU = 256
	MaxPathMTU = 4096
)

// mtuCode returns the code of a path MTU as connection management messages carry it, or 0 for a size that is none.
func mtuCode(mtu int) uint8 {
	for code, m := range PathMTUs() {
		if m == mtu {
			return code
		}
	}
	return 0
}

// mtuOf is the inverse of mtuCode; it returns 0 for an unknown code.
func mtuOf(code uint8) int {
	for c, m := range PathMTUs() {
		if c == code {
			return m
		}
	}
	return 0
}

// PathMTUFor returns the largest path MTU whose packets fit into IP packets of linkMTU bytes, or 0 if none does.
func PathMTUFor(linkMTU int, v6 bool) int {
	room := linkMTU - udpLen - ipv4Len - maxHeaderLen - icrcLen
	if v6 {
		room -= ipv6Len - ipv4Len
	}
	best := 0
	for _, m := range PathMTUs() {
		if m <= room {
			best = m
		}
	}
	return best
}
