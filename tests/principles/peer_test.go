package principles

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/wire"
)

// The machines on the wire.
var (
	hostMAC  = mac("52:54:00:12:34:56")
	agentMAC = mac("52:54:00:bd:00:02")
	peerMAC  = mac("02:00:00:00:00:77")

	hostIP  = netip.MustParseAddr("10.0.2.15")
	agentIP = netip.MustParseAddr("192.168.190.2")
	peerIP  = netip.MustParseAddr("10.0.2.77")
)

func mac(text string) net.HardwareAddr {
	m, err := net.ParseMAC(text)
	if err != nil {
		panic(err)
	}
	return m
}

// peer is a machine on the wire that notes when frames of the host come, and what else comes.
type peer struct {
	end *wire.Endpoint

	mu     sync.Mutex
	frames []arrival // guarded by mu
	news   chan struct{}
}

// arrival is a frame that came.
type arrival struct {
	at    time.Time
	frame []byte
}

func newPeer(ctx context.Context, end *wire.Endpoint) *peer {
	p := &peer{end: end, news: make(chan struct{})}
	go func() {
		for {
			f, err := end.Receive(ctx)
			if err != nil {
				return
			}
			p.mu.Lock()
			if len(p.frames) < 1<<20 {
				p.frames = append(p.frames, arrival{time.Now(), f})
			}
			close(p.news)
			p.news = make(chan struct{})
			p.mu.Unlock()
		}
	}()
	return p
}

// mark is the position behind the last frame.
func (p *peer) mark() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.frames)
}

// since returns the frames from mark on that are as asked for.
func (p *peer) since(mark int, ok func([]byte) bool) []arrival {
	p.mu.Lock()
	defer p.mu.Unlock()
	var got []arrival
	for _, a := range p.frames[mark:] {
		if ok(a.frame) {
			got = append(got, a)
		}
	}
	return got
}

// wait waits for the first frame from mark on that is as asked for.
func (p *peer) wait(ctx context.Context, mark int, ok func([]byte) bool) (arrival, error) {
	for {
		p.mu.Lock()
		news := p.news
		p.mu.Unlock()
		if got := p.since(mark, ok); len(got) > 0 {
			return got[0], nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return arrival{}, context.Cause(ctx)
		}
	}
}

// from tells whether a frame bears the host's hardware address and carries the text.
func carries(text string) func([]byte) bool {
	return func(f []byte) bool { return bytes.Contains(f, []byte(text)) }
}

// eth makes a frame of a type.
func eth(dst, src net.HardwareAddr, kind uint16, payload []byte) []byte {
	f := append(append([]byte(nil), dst...), src...)
	f = binary.BigEndian.AppendUint16(f, kind)
	f = append(f, payload...)
	for len(f) < 60 {
		f = append(f, 0)
	}
	return f
}

// ip4 makes an IPv4 packet, with flags and offset as they stand in its header.
func ip4(src, dst netip.Addr, proto uint8, fragment uint16, options []byte, payload []byte) []byte {
	h := make([]byte, 20+len(options))
	h[0] = 0x40 | byte(len(h)/4)
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(payload)))
	binary.BigEndian.PutUint16(h[6:], fragment)
	h[8], h[9] = 64, proto
	copy(h[12:], src.AsSlice())
	copy(h[16:], dst.AsSlice())
	copy(h[20:], options)
	var sum uint32
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
	return append(h, payload...)
}

// udp makes a UDP datagram without a checksum.
func udp(sport, dport uint16, text string) []byte {
	h := make([]byte, 8)
	binary.BigEndian.PutUint16(h, sport)
	binary.BigEndian.PutUint16(h[2:], dport)
	binary.BigEndian.PutUint16(h[4:], uint16(8+len(text)))
	return append(h, text...)
}

// syn makes a TCP segment that opens a connection; its checksum is wrong, so that nobody answers.
func syn(sport, dport uint16) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h, sport)
	binary.BigEndian.PutUint16(h[2:], dport)
	h[12], h[13] = 5<<4, 0x02
	return h
}

// arp makes an ARP packet.
func arp(op uint16, sha net.HardwareAddr, spa netip.Addr, tha net.HardwareAddr, tpa netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4}
	b = binary.BigEndian.AppendUint16(b, op)
	b = append(append(b, sha...), spa.AsSlice()...)
	return append(append(b, tha...), tpa.AsSlice()...)
}
