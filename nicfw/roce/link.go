package roce

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"
)

// Packet is one packet between a Device and its Link.
type Packet struct {
	// Peer is where a received packet came from or where one to send goes. An IPv6 address carries no zone: the link
	// knows its own.
	Peer netip.AddrPort
	// Data is BTH, extended headers, payload and pad, without the ICRC. Its capacity leaves room for the ICRC.
	Data []byte

	sum    uint32 // dataSum(Data), if it is summed
	summed bool
}

// Link carries packets. It puts the ICRC on those that it sends and drops those received with a wrong one, for only the
// link knows the headers around a packet.
//
// Send and Recv may be called at the same time by two goroutines, each by one at a time. Wake, LocalAddr, PathMTU and
// Close may be called at any time.
type Link interface {
	// Send hands over packets to the network, in order. It may block while the network is busy; it does not keep the
	// packets. A packet lost on the way is no error: an error means that the link is of no use any more.
	Send(packets []Packet) error
	// Recv waits for packets and returns how many it put into packets: 0 when wait has passed, when Wake was called or when
	// those that came were dropped. wait < 0 waits without end, 0 not at all. Data is valid until the next Recv. The error
	// wraps net.ErrClosed after Close.
	Recv(packets []Packet, wait time.Duration) (int, error)
	// Wake makes a Recv that waits, or else the next one, return.
	Wake()
	// LocalAddr is the address that packets leave from, which the ICRC covers: never an unspecified one.
	LocalAddr() netip.AddrPort
	// PathMTU is the largest payload, 256 to 4096, whose packets the link takes whole.
	PathMTU() int
	Close() error
}

// LinkCounters are what a link dropped or could not do. Links that count implement interface{ Counters() LinkCounters }.
type LinkCounters struct {
	Received   uint64 // packets handed up
	Sent       uint64
	BadICRC    uint64 // received and dropped
	BadLength  uint64 // received and dropped: too short or too long for any packet
	SendErrors uint64 // packets that the system refused
	Segmented  uint64 // packets sent by way of segmentation offload
	Overflow   uint64 // received and dropped by the system, because they were not taken in time
}

// seal appends the ICRC to p.Data for a packet that leaves src with an IPv4 identification of id, and returns the UDP
// payload.
func (c *checker) seal(src netip.AddrPort, p *Packet, id uint16) []byte {
	icrc := c.around(aroundKey{src, p.Peer, id, DontFragment, len(p.Data)}) ^ p.dataSum()
	return binary.LittleEndian.AppendUint32(p.Data, icrc)
}

// dataSum returns dataSum(p.Data).
func (p *Packet) dataSum() uint32 {
	if p.summed {
		return p.sum
	}
	return dataSum(p.Data)
}

// InterfaceOf finds the interface of this machine that has an address.
func InterfaceOf(addr netip.Addr) (*net.Interface, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, ifi := range ifs {
		addrs, err := ifi.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil || addr.Zone() != "" && addr.Zone() != ifi.Name {
				continue
			}
			// All of 127.0.0.0/8 is this machine.
			if p.Addr() == addr.WithZone("") || addr.IsLoopback() && p.Contains(addr) {
				return &ifi, nil
			}
		}
	}
	return nil, errors.New("no interface has this address")
}
