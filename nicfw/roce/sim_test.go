package roce

import (
	"bytes"
	"container/heap"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// A sim is two engines and a bad network between them, on a clock of its own: the same seed gives the same run.
type sim struct {
	t      testing.TB
	rng    *rand.Rand
	now    time.Duration
	faults faults
	a, b   *simEnd
	wire   simQueue
	seq    int
	tx     *outbox
	check  checker
	sent   int
	bad    int
	trace  func(format string, args ...any)
}

// faults are probabilities for each packet.
type faults struct{ loss, dup, reorder, corrupt float64 }

func (f faults) String() string {
	return fmt.Sprintf("loss=%g,dup=%g,reorder=%g,corrupt=%g", f.loss, f.dup, f.reorder, f.corrupt)
}

// simEnd is one of the two.
type simEnd struct {
	*engine
	addr netip.AddrPort
	pd   *PD
	peer *simEnd
}

type simPacket struct {
	at   time.Duration
	seq  int
	to   *simEnd
	wire []byte
}

type simQueue []simPacket

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simPacket)) }
func (q *simQueue) Pop() any {
	old := *q
	p := old[len(old)-1]
	*q = old[:len(old)-1]
	return p
}

const simDelay = 50 * time.Microsecond

// newSim uses IPv6, where the ICRC is a full check: a corrupt packet that passes by luck would fail the test.
func newSim(t testing.TB, seed uint64, f faults, limits Limits) *sim {
	s := &sim{t: t, rng: rand.New(rand.NewPCG(seed, 1)), now: 1, faults: f, tx: newOutbox()}
	end := func(a string) *simEnd {
		addr := netip.MustParseAddrPort(a)
		return &simEnd{engine: newEngine(addr, MaxPathMTU, limits, slog.New(slog.NewTextHandler(io.Discard, nil))), addr: addr, pd: &PD{}}
	}
	s.a, s.b = end("[fd00::a]:4791"), end("[fd00::b]:4791")
	s.a.peer, s.b.peer = s.b, s.a
	return s
}

// deliver puts a packet on the wire, or does not.
func (s *sim) deliver(from *simEnd, p *Packet) {
	s.sent++
	if s.trace != nil {
		h := BTH(p.Data)
		s.trace("%8v %v→%v %v psn %v ack %v len %d", s.now, from.addr.Addr(), p.Peer.Addr(), h.Opcode(), h.PSN(), h.AckReq(), len(p.Data))
	}
	if p.Peer.Addr() != from.peer.addr.Addr() {
		return // a wild address
	}
	wire := bytes.Clone(s.check.seal(from.addr, p, 0))
	if s.rng.Float64() < s.faults.corrupt {
		s.bad++
		wire[s.rng.IntN(len(wire))] ^= 1 << s.rng.IntN(8)
	}
	copies := 1
	if s.rng.Float64() < s.faults.loss {
		copies--
	}
	if s.rng.Float64() < s.faults.dup {
		copies++
	}
	for range copies {
		at := s.now + simDelay
		if s.rng.Float64() < s.faults.reorder {
			at += time.Duration(s.rng.Int64N(int64(20 * simDelay)))
		}
		s.seq++
		heap.Push(&s.wire, simPacket{at, s.seq, from.peer, wire})
	}
}

// run goes on until done, or fails after limit.
func (s *sim) run(limit time.Duration, done func() bool) bool {
	end := s.now + limit
	for s.now < end {
		if done() {
			return true
		}
		for _, e := range []*simEnd{s.a, s.b} {
			for {
				s.tx.reset()
				e.transmit(s.now, s.tx)
				for i := range s.tx.n {
					s.deliver(e, &s.tx.packets[i])
				}
				if s.tx.n == 0 {
					break
				}
			}
		}
		next := earlier(s.a.next(), s.b.next())
		if len(s.wire) > 0 {
			next = earlier(next, s.wire[0].at)
		}
		if next == 0 {
			return false // nothing will ever happen again
		}
		if next > end {
			s.now = end
			break
		}
		s.now = max(s.now, next)
		for len(s.wire) > 0 && s.wire[0].at <= s.now {
			p := heap.Pop(&s.wire).(simPacket)
			if data, _, ok := s.check.open(p.to.peer.addr, p.to.addr, p.wire); ok {
				p.to.receive(s.now, &Packet{Peer: p.to.peer.addr, Data: data})
			}
		}
		s.a.advance(s.now)
		s.b.advance(s.now)
	}
	return done()
}

// simQP is a queue pair and what became of it.
type simQP struct {
	*qp
	end   *simEnd
	done  []Completion
	ended error
}

// simOwner makes a simQP a completer; its methods cannot be the qp's own.
type simOwner struct{ q *simQP }

func (o simOwner) complete(_ *qp, c Completion, _ *waiter, _ int) { o.q.done = append(o.q.done, c) }
func (o simOwner) ended(_ *qp, cause error)                       { o.q.ended = cause }

func (s *sim) qp(e *simEnd, cfg QPConfig) *simQP {
	s.t.Helper()
	q := &simQP{end: e}
	var err error
	if q.qp, err = e.addQP(e.pd, cfg.withDefaults(e.mtu), simOwner{q}); err != nil {
		s.t.Fatal(err)
	}
	return q
}

// pair makes two connected queue pairs. The first packets' numbers are near the end of the number space.
func (s *sim) pair(ca, cb QPConfig) (a, b *simQP) {
	s.t.Helper()
	a, b = s.qp(s.a, ca), s.qp(s.b, cb)
	a.req.start(PSN(psnMask - s.rng.IntN(100)))
	b.req.start(PSN(s.rng.IntN(1 << 24)))
	if err := s.a.connect(s.now, a.qp, Remote{s.b.addr.Addr(), b.num, b.req.next}, false); err != nil {
		s.t.Fatal(err)
	}
	if err := s.b.connect(s.now, b.qp, Remote{s.a.addr.Addr(), a.num, a.req.next}, false); err != nil {
		s.t.Fatal(err)
	}
	return a, b
}

func (s *sim) post(q *simQP, wr WorkRequest) error {
	err := q.req.post(wr, nil, 0)
	q.e.schedule(s.now, q.qp)
	return err
}

func (s *sim) register(e *simEnd, r Region, cfg MRConfig) *MR {
	s.t.Helper()
	m, err := newMR(e.pd, r, cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	e.register(s.now, m)
	return m
}

// drain runs until q has n completions.
func (s *sim) drain(q *simQP, n int) {
	s.t.Helper()
	if !s.run(time.Hour, func() bool { return len(q.done) >= n }) {
		s.t.Fatalf("at %v: %d of %d completions; ended: %v; a: %v; b: %v", s.now, len(q.done), n, q.ended, s.a.counters, s.b.counters)
	}
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func TestTransfers(t *testing.T) {
	for code, mtu := range PathMTUs() {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			s := newSim(t, uint64(code), faults{}, Limits{})
			a, _ := s.pair(QPConfig{PathMTU: mtu, AckTimeout: time.Millisecond}, QPConfig{PathMTU: mtu})
			buf := NewBuffer(1 << 20)
			m := s.register(s.b, buf, MRConfig{Addr: 0xfffffffffff00000, Length: 1 << 20, Access: AccessRead | AccessWrite | AccessAtomic})
			for _, n := range []int{0, 1, 2, 3, 4, 7, 8, mtu - 1, mtu, mtu + 1, 2 * mtu, 63 * mtu, 64 * mtu, 64*mtu + 5, 200 * mtu} {
				off := s.rng.IntN(1<<20 - n)
				if n == 200*mtu {
					off = 1<<20 - n
				}
				want := randomBytes(s.rng, n)
				got := make([]byte, n)
				a.done = nil
				s.post(a, WorkRequest{ID: 1, Verb: VerbWrite, Buf: want, Addr: m.Addr() + uint64(off), RKey: m.RKey()})
				s.post(a, WorkRequest{ID: 2, Verb: VerbRead, Buf: got, Addr: m.Addr() + uint64(off), RKey: m.RKey()})
				s.drain(a, 2)
				if a.done[0].Err != nil || a.done[1].Err != nil || a.done[0].ID != 1 || a.done[1].ID != 2 {
					t.Fatalf("%d bytes: completions %+v", n, a.done)
				}
				there := make([]byte, n)
				buf.ReadAt(there, int64(off))
				if !bytes.Equal(want, got) || !bytes.Equal(want, there) {
					t.Fatalf("%d bytes at %d: wrong bytes", n, off)
				}
			}
			if c := s.a.counters; c.Retries+c.Timeouts+c.StaleResponse+c.BadResponse != 0 || s.b.counters.Duplicates != 0 {
				t.Errorf("trouble on a perfect wire: %v, %v", c, s.b.counters)
			}
		})
	}
}

// workload runs everything at once over a bad network and checks every byte and every atomic operation.
func workload(t *testing.T, seed uint64, f faults) {
	s := newSim(t, seed, f, Limits{})
	mtu := 256 << s.rng.IntN(3)
	credits := s.rng.IntN(2) == 0
	cfg := func() QPConfig {
		return QPConfig{
			PathMTU: mtu, AckTimeout: 4 * time.Millisecond, MaxReads: 1 + s.rng.IntN(6), Resources: 6,
			Window: 8 << s.rng.IntN(5), SendDepth: 1 + s.rng.IntN(40), RecvDepth: 16, FlowControl: credits, MinRNRDelay: 100 * time.Microsecond,
		}
	}
	qa, qb := s.pair(cfg(), cfg())
	const area = 64 << 10 // three of them: constant, written, counters
	type side struct {
		q        *simQP
		target   *MR
		mem      *Buffer
		mirror   []byte
		reads    map[uint64]func() // by ID: check
		next     uint64
		adds     uint64 // fetch-and-adds done
		swaps    uint64
		sends    int
		received int
		recvs    map[uint64][]byte
		checked  int
	}
	mk := func(q *simQP, target *simEnd) *side {
		x := &side{q: q, mem: NewBuffer(3 * area), reads: map[uint64]func(){}, recvs: map[uint64][]byte{}}
		x.mirror = append(randomBytes(s.rng, 2*area), make([]byte, area)...)
		x.mem.WriteAt(x.mirror, 0)
		x.target = s.register(target, x.mem, MRConfig{Addr: s.rng.Uint64() &^ 4095 >> 1, Length: 3 * area, Access: AccessRead | AccessWrite | AccessAtomic})
		return x
	}
	sides := []*side{mk(qa, s.b), mk(qb, s.a)}
	const ops = 120
	message := func(x *side, n int) []byte {
		return bytes.Repeat([]byte{byte(n), byte(n >> 8), 0x5a}, 1+n*37%1000)
	}
	step := func() {
		for i, x := range sides {
			peer := sides[1-i]
			// Receives for the peer's messages, grudgingly.
			for peer.next < ops && x.q.resp.recvs.n < 4 && s.rng.IntN(3) == 0 || peer.next >= ops && x.q.resp.recvs.n < 4 {
				buf := make([]byte, 4096)
				id := 1<<32 | uint64(len(x.recvs))
				x.recvs[id] = buf
				x.q.resp.post(recvRequest{id: id, buf: buf})
			}
			for x.next < ops && !x.q.req.sq.full() {
				id := x.next
				wr := WorkRequest{ID: id, RKey: x.target.RKey()}
				switch s.rng.IntN(6) {
				case 0, 1:
					n := s.rng.IntN(20 * mtu)
					off := s.rng.IntN(area - n)
					buf := make([]byte, n)
					wr.Verb, wr.Buf, wr.Addr = VerbRead, buf, x.target.Addr()+uint64(off)
					x.reads[id] = func() {
						if !bytes.Equal(buf, x.mirror[off:off+n]) {
							t.Fatalf("READ %d of %d bytes: wrong bytes", id, n)
						}
					}
				case 2:
					n := s.rng.IntN(20 * mtu)
					off := area + s.rng.IntN(area-n)
					data := randomBytes(s.rng, n)
					copy(x.mirror[off:], data)
					wr.Verb, wr.Buf, wr.Addr = VerbWrite, data, x.target.Addr()+uint64(off)
				case 3:
					wr.Verb, wr.Addr, wr.SwapAdd = VerbFetchAdd, x.target.Addr()+2*area, 1
				case 4:
					wr.Verb, wr.Addr, wr.Compare, wr.SwapAdd = VerbCompareSwap, x.target.Addr()+2*area+8, x.swaps, x.swaps+1
					want := x.swaps
					x.reads[id] = func() {
						if got := x.q.done[x.checked].Prev; got != want {
							t.Fatalf("CAS %d found %d; want %d", id, got, want)
						}
					}
					x.swaps++
				case 5:
					wr.Verb, wr.Buf, wr.Imm, wr.HasImm = VerbSend, message(x, x.sends), uint32(x.sends), true
					x.sends++
				}
				if err := s.post(x.q, wr); err != nil {
					t.Fatal(err)
				}
				x.next++
			}
			for ; x.checked < len(x.q.done); x.checked++ {
				c := x.q.done[x.checked]
				if c.Err != nil {
					t.Fatalf("%v %d: %v (a %v b %v)", c.Verb, c.ID, c.Err, s.a.counters, s.b.counters)
				}
				if check := x.reads[c.ID]; check != nil && c.Verb != VerbRecv {
					check()
				}
				switch c.Verb {
				case VerbFetchAdd:
					if c.Prev != x.adds {
						t.Fatalf("FETCH_AND_ADD %d found %d; want %d: not exactly once", c.ID, c.Prev, x.adds)
					}
					x.adds++
				case VerbRecv:
					want := message(peer, x.received)
					if !c.HasImm || int(c.Imm) != x.received || !bytes.Equal(x.recvs[c.ID][:c.Len], want) {
						t.Fatalf("message %d: %d bytes, imm %d; want %d bytes", x.received, c.Len, c.Imm, len(want))
					}
					x.received++
				}
			}
		}
	}
	done := func() bool {
		step()
		for i, x := range sides {
			if x.next < ops || x.q.req.sq.n > 0 || x.received < sides[1-i].sends {
				return false
			}
		}
		return true
	}
	if !s.run(10*time.Minute, done) {
		t.Fatalf("at %v: stuck; a: %v %v\nb: %v %v", s.now, qa.ended, s.a.counters, qb.ended, s.b.counters)
	}
	for _, x := range sides {
		got := make([]byte, 3*area)
		x.mem.ReadAt(got, 0)
		if !bytes.Equal(got[:2*area], x.mirror[:2*area]) {
			t.Fatal("memory differs from what was written")
		}
		if f, c := got[2*area], got[2*area+8]; uint64(f) != x.adds || uint64(c) != x.swaps {
			t.Fatalf("counters %d, %d; want %d, %d", f, c, x.adds, x.swaps)
		}
	}
	if n := len(s.a.timers) + len(s.b.timers); n > 4 {
		t.Errorf("%d timers for two queue pairs", n)
	}
	t.Logf("%v virtual, %d packets, %d corrupt, a: %v", s.now.Round(time.Millisecond), s.sent, s.bad, s.a.counters)
}

func TestFaults(t *testing.T) {
	for _, f := range []faults{
		{}, {loss: 0.01}, {loss: 0.05}, {reorder: 0.05}, {dup: 0.05}, {corrupt: 0.05},
		{loss: 0.05, dup: 0.05, reorder: 0.05, corrupt: 0.05}, {loss: 0.1},
	} {
		t.Run(f.String(), func(t *testing.T) {
			for seed := range uint64(12) {
				workload(t, seed, f)
			}
		})
	}
}
