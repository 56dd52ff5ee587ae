package roce

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"os"
	"testing"
	"time"
)

// guarded is memory that notices what must not happen to it.
type guarded struct {
	t        *testing.T
	data     []byte
	readOnly bool
	off, len int64 // the window
}

func (g *guarded) check(op string, n int, off int64) {
	if off < g.off || off+int64(n) > g.off+g.len {
		g.t.Fatalf("%s of %d bytes at %#x: outside of the window", op, n, off)
	}
}

func (g *guarded) ReadAt(p []byte, off int64) (int, error) {
	g.check("read", len(p), off)
	return copy(p, g.data[off:]), nil
}

func (g *guarded) WriteAt(p []byte, off int64) (int, error) {
	g.check("write", len(p), off)
	if g.readOnly {
		g.t.Fatalf("write of %d bytes at %#x to a read-only window", len(p), off)
	}
	return copy(g.data[off:], p), nil
}

func (g *guarded) CompareAndSwap(off int64, old, new uint64) (uint64, error) {
	g.check("swap", 8, off)
	if g.readOnly || off%8 != 0 {
		g.t.Fatalf("swap at %#x", off)
	}
	w := g.data[off:]
	prev := binary.LittleEndian.Uint64(w)
	if prev == old {
		binary.LittleEndian.PutUint64(w, new)
	}
	return prev, nil
}

// What the first byte before each packet of a fuzzed sequence asks for: without such help, no mutation would ever get
// past a random number.
const (
	fixQPN  = 1 << iota // address our queue pair
	fixPSN              // continue in sequence; for answers: answer what is outstanding
	fixKey              // name the writable window
	fixKey2             // name the read-only window
	fixVA               // stay in the window
	later               // let time pass first
	fixMAD              // take the communication IDs of a connection
	fixIDs
)

// sequence joins packets into a fuzz input.
func sequence(how byte, packets ...[]byte) []byte {
	var b []byte
	for _, p := range packets {
		b = append(b, how)
		b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
		b = append(b, p...)
	}
	return b
}

// seeds are the captured packets, alone and in runs.
func seeds(f *testing.F) {
	var all [][]byte
	for _, cf := range reference(f) {
		fr, _ := ParseFrame(cf.Data)
		all = append(all, fr.Data[:len(fr.Data)-icrcLen])
	}
	for i, p := range all {
		f.Add(sequence(fixQPN|fixPSN|fixKey|fixVA|fixMAD, p))
		f.Add(sequence(byte(i), p))
		if i%10 == 0 {
			f.Add(sequence(fixQPN|fixPSN|fixKey|fixVA, all[i:min(i+20, len(all))]...))
			f.Add(sequence(fixQPN|fixPSN|fixKey2|fixVA, all[i:min(i+20, len(all))]...))
			f.Add(sequence(fixQPN|fixKey, all[i:min(i+20, len(all))]...))
		}
	}
	f.Add(sequence(0xff, all...))
}

// FuzzEngine gives an engine with a connected queue pair, requests of its own under way, a listener and connections in
// all states whatever a network can bring.
func FuzzEngine(f *testing.F) {
	seeds(f)
	out := newOutbox()
	f.Fuzz(func(t *testing.T, b []byte) {
		local, remote := netip.MustParseAddrPort("10.9.0.1:4791"), netip.MustParseAddrPort("10.9.0.2:50000")
		e := newEngine(local, MaxPathMTU, Limits{HalfOpen: 10, HalfOpenPerPeer: 5, QPs: 20, MaxRead: 1 << 16}, slog.New(slog.DiscardHandler))
		now := time.Duration(1)
		owner := &simQP{}
		pd := &PD{}
		q, err := e.addQP(pd, QPConfig{PathMTU: 1024, Resources: 4, SendDepth: 8, RecvDepth: 8, AckTimeout: time.Millisecond, RetryCount: 3}.withDefaults(4096), simOwner{owner})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.connect(now, q, Remote{remote.Addr(), 0x11, 100}, false); err != nil {
			t.Fatal(err)
		}
		var mrs [2]*MR
		var mem [2]*guarded
		for i := range mrs {
			mem[i] = &guarded{t: t, data: make([]byte, 3<<13), readOnly: i == 1, off: 1 << 13, len: 1 << 13}
			access := allAccess
			if i == 1 {
				access = AccessRead
			}
			if mrs[i], err = newMR(pd, mem[i], MRConfig{Addr: 0xffff_ffff_0000_0000, Offset: 1 << 13, Length: 1 << 13, Access: access}); err != nil {
				t.Fatal(err)
			}
			e.register(now, mrs[i])
		}
		for i := range 4 {
			q.resp.post(recvRequest{buf: make([]byte, 2000*i)})
		}
		buf := make([]byte, 5000)
		for _, wr := range []WorkRequest{{Verb: VerbRead, Buf: buf}, {Verb: VerbFetchAdd}, {Verb: VerbWrite, Buf: buf}, {Verb: VerbSend, Buf: buf[:7], HasImm: true}, {Verb: VerbCompareSwap}} {
			if err := q.req.post(wr, nil, 0); err != nil {
				t.Fatal(err)
			}
		}
		e.schedule(now, q)
		l := &fuzzListener{e: e, l: &listener{service: ServiceTCP(19748)}, now: &now, pd: pd}
		l.l.owner = l
		if err := e.cm.listen(l.l); err != nil {
			t.Fatal(err)
		}
		dq, err := e.addQP(pd, QPConfig{}.withDefaults(4096), simOwner{&simQP{}})
		if err != nil {
			t.Fatal(err)
		}
		dialed, err := e.cm.dial(now, remote.Addr(), 5, dq, nil, &simDialer{})
		if err != nil {
			t.Fatal(err)
		}
		sent := 0
		flush := func() {
			for range 1000 {
				out.reset()
				e.transmit(now, out)
				for _, p := range out.packets[:out.n] {
					if h, err := ParseBTH(p.Data); err != nil || len(p.Data)%4 != 0 || len(p.Data) > maxDatagram-icrcLen || h.PKey() != defaultPKey || p.Peer.Port() != Port {
						t.Fatalf("sent % x to %v: %v", p.Data, p.Peer, err)
					}
				}
				sent += out.n
				if out.n == 0 {
					return
				}
			}
			t.Fatal("never stops sending")
		}
		flush()
		given := 0
		for len(b) >= 3 && given < 500 {
			how, n := b[0], min(int(binary.BigEndian.Uint16(b[1:])), len(b)-3)
			p := append([]byte(nil), b[3:3+n]...)
			b = b[3+n:]
			given++
			if how&later != 0 {
				now += time.Duration(given) * 300 * time.Microsecond
				e.advance(now)
				flush()
			}
			fixPacket(e, q, dialed, l, mrs, how, p)
			e.receive(now, &Packet{Peer: remote, Data: p})
			if int(how)&1 == given&1 {
				flush()
			}
			checkEngine(t, e, q)
		}
		flush()
		// A packet can make us send READ responses, of which the limit allows 64 KiB, and little else.
		if most := 100 + given*(1<<6+40); sent > most {
			t.Fatalf("%d packets made us send %d", given, sent)
		}
		// Nothing that came makes time stand still.
		for range 2000 {
			next := e.next()
			if next == 0 {
				break
			}
			now = max(now, next)
			e.advance(now)
			flush()
		}
		if owner.ended == nil && q.req.sq.n > 0 {
			t.Fatalf("requests neither done nor failed: %d", q.req.sq.n)
		}
		checkEngine(t, e, q)
		for _, m := range mem {
			for i, v := range m.data {
				if v != 0 && (m.readOnly || i < 1<<13 || i >= 2<<13) {
					t.Fatalf("byte %#x changed", i)
				}
			}
		}
	})
}

// fixPacket helps a mutated packet past the random numbers.
func fixPacket(e *engine, q *qp, dialed *conn, l *fuzzListener, mrs [2]*MR, how byte, p []byte) {
	h, err := ParseBTH(p)
	if err != nil {
		return
	}
	op := opcodes[h.Opcode()]
	if how&fixQPN != 0 && op.kind != kindDatagram {
		putUint24(h[5:], uint32(q.num))
	}
	if how&fixPSN != 0 {
		switch op.kind {
		case kindReadResponse, kindAck, kindAtomicAck:
			if q.req.sq.n > 0 {
				putUint24(h[9:], uint32(q.req.una().Add(int(how>>6))))
			}
		default:
			putUint24(h[9:], uint32(q.resp.epsn.Add(-int(how>>6))))
		}
	}
	for i, bit := range []byte{fixKey, fixKey2} {
		if how&bit == 0 || op.ext&(hasRETH|hasAtomicETH) == 0 {
			continue
		}
		binary.BigEndian.PutUint32(h[bthLen+8:], uint32(mrs[i].key)) // both headers have it there
		if how&fixVA != 0 {
			binary.BigEndian.PutUint64(h[bthLen:], mrs[i].cfg.Addr+uint64(p[len(p)-1])*8)
		}
	}
	if how&fixMAD != 0 && op.kind == kindDatagram && len(p) == 20+madLen {
		m := MAD(p[20:])
		switch m.Attribute() {
		case AttrREQ:
			f := REQ(m.Payload()).Fields()
			f.Service, f.Primary.LocalGID = l.l.service, GID(netip.MustParseAddr("10.9.0.2"))
			REQ(m.Payload()).Encode(&f)
		default:
			c := dialed
			if how&fixIDs != 0 && len(l.conns) > 0 {
				c = l.conns[len(l.conns)-1]
			}
			m.setIDs(c.remote, c.local)
			if c.remote == 0 {
				m.setIDs(7, c.local)
			}
			if m.Attribute() == AttrDREQ && c.q != nil {
				DREQ(m.Payload()).Encode(c.q.num)
			}
		}
	}
}

// fuzzListener accepts, refuses and ignores in turn.
type fuzzListener struct {
	e     *engine
	l     *listener
	now   *time.Duration
	pd    *PD
	n     int
	conns []*conn
}

func (l *fuzzListener) arrived() {
	l.n++
	if l.n%3 == 0 || len(l.l.backlog) == 0 {
		return
	}
	c := l.l.backlog[0]
	l.l.backlog = l.l.backlog[1:]
	if l.n%3 == 1 {
		c.reject(*l.now, RejectConsumer, nil)
		return
	}
	if _, err := c.accept(*l.now, l.pd, QPConfig{}, nil, simOwner{&simQP{}}, nil); err == nil {
		l.conns = append(l.conns, c)
	}
}

// checkEngine checks what must hold at all times.
func checkEngine(t *testing.T, e *engine, q *qp) {
	t.Helper()
	fail := func(format string, args ...any) { t.Helper(); t.Fatalf(format, args...) }
	pending := 0
	for i := range q.resp.resources.n {
		if r := q.resp.resources.at(i); r.pending {
			pending++
			if r.op == OpReadRequest && (r.run.next >= r.run.n || uint64(r.run.length) > uint64(r.length)) {
				fail("READ run %+v of %+v", r.run, r)
			}
		}
	}
	half := 0
	for _, p := range e.peers {
		half += p.halfOpen
	}
	switch r := &q.req; {
	case pending != q.resp.pending:
		fail("%d requests pending, counted %d", pending, q.resp.pending)
	case r.sq.n > r.sq.limit || q.resp.recvs.n > q.resp.recvs.limit || q.resp.resources.n > q.resp.resources.limit:
		fail("a queue has more than its limit")
	case r.cur > r.sq.n || r.cur == r.sq.n && r.off != 0 || r.cur < r.sq.n && r.off >= r.sq.at(r.cur).n:
		fail("sending from %d, %d of %d requests", r.cur, r.off, r.sq.n)
	case r.sq.n > 0 && (r.sq.at(0).done >= r.sq.at(0).n || r.cur == 0 && r.off < r.sq.at(0).done):
		fail("first request has %d of %d packets done, sending from %d", r.sq.at(0).done, r.sq.at(0).n, r.off)
	case len(e.qps) > e.limits.QPs || e.cm.halfOpen > e.limits.HalfOpen || e.cm.waiting > e.limits.HalfOpen || half != e.cm.halfOpen:
		fail("%d queue pairs, %d half open (%d by peer), %d waiting", len(e.qps), e.cm.halfOpen, half, e.cm.waiting)
	case len(e.cm.outgoing) > maxOutgoing || len(e.cm.local) > 200 || len(e.timers) > len(e.cm.local)+len(e.qps):
		fail("%d messages outgoing, %d connections, %d timers", len(e.cm.outgoing), len(e.cm.local), len(e.timers))
	}
	for i, tm := range e.timers {
		if tm.index != i+1 || i > 0 && e.timers[(i-1)/2].at > tm.at {
			fail("timer heap out of order at %d", i)
		}
	}
}

// FuzzPCAP reads mutated capture files.
func FuzzPCAP(f *testing.F) {
	b, err := os.ReadFile("testdata/rxe-reference.pcap")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:3000])
	f.Fuzz(func(t *testing.T, b []byte) {
		frames := 0
		for c, err := range ReadPCAP(bytes.NewReader(b)) {
			if err == nil && len(c.Data) > len(b) {
				t.Fatalf("a frame of %d bytes in a file of %d", len(c.Data), len(b))
			}
			frames++
		}
		if frames > len(b)/pcapRecordLen+1 {
			t.Fatalf("%d frames in %d bytes", frames, len(b))
		}
	})
}
