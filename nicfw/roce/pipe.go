package roce

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Faults are what a Pipe does to packets, as probabilities for each. The same Seed gives the same faults to the same
// packets.
type Faults struct {
	Seed                        uint64
	Loss, Dup, Reorder, Corrupt float64
}

// pipeDepth is how many packets a Pipe holds in each direction; like a network, it drops those beyond.
const pipeDepth = 4096

// NewPipe returns the two ends of a link in memory, at the given addresses.
func NewPipe(a, b netip.AddrPort, pathMTU int, f Faults) (Link, Link) {
	ab, ba := make(chan pipePacket, pipeDepth), make(chan pipePacket, pipeDepth)
	end := func(local, peer netip.AddrPort, out, in chan pipePacket, stream uint64) *pipeEnd {
		return &pipeEnd{
			local: local, peer: peer, mtu: pathMTU, corrupt: f.Corrupt, out: out, in: in,
			late: impairment{f: f, rng: rand.New(rand.NewPCG(f.Seed, stream))},
			wake: make(chan struct{}, 1), closed: make(chan struct{}),
		}
	}
	return end(a, b, ab, ba, 1), end(b, a, ba, ab, 2)
}

type pipePacket struct {
	src, dst netip.AddrPort
	wire     []byte
}

// pipeEnd is one end of a Pipe.
type pipeEnd struct {
	local, peer netip.AddrPort
	mtu         int
	corrupt     float64
	out         chan<- pipePacket
	in          <-chan pipePacket
	wake        chan struct{}
	closed      chan struct{}
	closing     sync.Once

	tx   checker    // of Send
	late impairment // of Send

	rx checker // of Recv

	mu       sync.Mutex
	counters LinkCounters // guarded by mu
}

func (p *pipeEnd) LocalAddr() netip.AddrPort { return p.local }
func (p *pipeEnd) PathMTU() int              { return p.mtu }

func (p *pipeEnd) count(f func(c *LinkCounters)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.counters)
}

// Counters returns what was carried and dropped.
func (p *pipeEnd) Counters() LinkCounters {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counters
}

func (p *pipeEnd) Send(packets []Packet) error {
	select {
	case <-p.closed:
		return net.ErrClosed
	default:
	}
	for _, q := range p.late.apply(nil, packets) {
		wire := p.tx.seal(p.local, &q, 0)
		if p.late.rng.Float64() < p.corrupt {
			wire[p.late.rng.IntN(len(wire))] ^= 1 << p.late.rng.IntN(8)
		}
		select {
		case p.out <- pipePacket{p.local, q.Peer, wire}:
		default: // full
		}
	}
	p.count(func(c *LinkCounters) { c.Sent += uint64(len(packets)) })
	return nil
}

func (p *pipeEnd) Recv(packets []Packet, wait time.Duration) (int, error) {
	var timeout <-chan time.Time
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		timeout = t.C
	}
	n := 0
	take := func(q pipePacket) {
		data, _, ok := p.rx.open(q.src, q.dst, q.wire)
		if !ok || q.dst.Addr() != p.local.Addr() {
			p.count(func(c *LinkCounters) { c.BadICRC++ })
			return
		}
		packets[n] = Packet{Peer: q.src, Data: data}
		n++
	}
	for n < len(packets) {
		select {
		case q := <-p.in:
			take(q)
			continue
		default:
		}
		if n > 0 || wait == 0 {
			break
		}
		select {
		case q := <-p.in:
			take(q)
			continue
		case <-p.wake:
		case <-timeout:
		case <-p.closed:
			return 0, net.ErrClosed
		}
		break
	}
	p.count(func(c *LinkCounters) { c.Received += uint64(n) })
	return n, nil
}

func (p *pipeEnd) Wake() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *pipeEnd) Close() error {
	p.closing.Do(func() { close(p.closed) })
	return nil
}
