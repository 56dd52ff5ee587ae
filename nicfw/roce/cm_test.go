package roce

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"
	"time"
)

// simDialer records how a connection ended up.
type simDialer struct {
	calls int
	err   error
}

func (d *simDialer) connected(_ *conn, err error) { d.calls++; d.err = err }

// simListener accepts or refuses everything.
type simListener struct {
	s      *sim
	e      *simEnd
	l      *listener
	refuse bool
	ignore bool
	cfg    QPConfig
	got    []*simQP
	peer   []byte // private data of the last REQ
}

func (l *simListener) arrived() {
	if l.ignore {
		return
	}
	c := l.l.backlog[0]
	l.l.backlog = l.l.backlog[1:]
	l.peer = bytes.Clone(c.req.Private[ipCMLen:])
	if l.refuse {
		c.reject(l.s.now, RejectConsumer, []byte("no"))
		return
	}
	q := &simQP{end: l.e}
	var err error
	if q.qp, err = c.accept(l.s.now, l.e.pd, l.cfg, []byte("welcome"), simOwner{q}, nil); err != nil {
		l.s.t.Fatal(err)
	}
	l.got = append(l.got, q)
}

func (s *sim) listen(service ServiceID) *simListener {
	l := &simListener{s: s, e: s.b, l: &listener{service: service}}
	l.l.owner = l
	if err := s.b.cm.listen(l.l); err != nil {
		s.t.Fatal(err)
	}
	return l
}

func (s *sim) dial(service ServiceID, cfg QPConfig, private []byte) (*simQP, *simDialer, *conn) {
	s.t.Helper()
	q, d := s.qp(s.a, cfg), &simDialer{}
	c, err := s.a.cm.dial(s.now, s.b.addr.Addr(), service, q.qp, private, d)
	if err != nil {
		s.t.Fatal(err)
	}
	return q, d, c
}

// clean checks that nothing is left when everything has ended.
func (s *sim) clean() {
	s.t.Helper()
	s.run(10*time.Minute, func() bool {
		return len(s.a.cm.local)+len(s.b.cm.local)+len(s.a.timers)+len(s.b.timers) == 0
	})
	for _, e := range []*simEnd{s.a, s.b} {
		if len(e.cm.local)+len(e.cm.remote)+e.cm.halfOpen+e.cm.waiting+len(e.peers)+len(e.qps)+len(e.timers) != 0 {
			s.t.Errorf("left behind: %d+%d connections, %d half open, %d waiting, %d peers, %d queue pairs, %d timers",
				len(e.cm.local), len(e.cm.remote), e.cm.halfOpen, e.cm.waiting, len(e.peers), len(e.qps), len(e.timers))
		}
	}
}

// TestConnect sets up, uses and ends connections over good and bad networks, ended by either side.
func TestConnect(t *testing.T) {
	for _, f := range []faults{{}, {loss: 0.3}, {dup: 0.5}, {reorder: 0.5}, {loss: 0.2, dup: 0.2, reorder: 0.3, corrupt: 0.1}} {
		t.Run(f.String(), func(t *testing.T) {
			for seed := range uint64(20) {
				s := newSim(t, seed, f, Limits{})
				l := s.listen(ServiceTCP(7174))
				l.cfg = QPConfig{AckTimeout: 10 * time.Millisecond, RetryCount: 7}
				q, d, c := s.dial(ServiceTCP(7174), QPConfig{AckTimeout: 10 * time.Millisecond, PathMTU: 1024}, []byte("hello"))
				if !s.run(time.Minute, func() bool { return d.calls > 0 }) || d.err != nil || d.calls != 1 {
					t.Fatalf("seed %d: dial: %v after %d calls", seed, d.err, d.calls)
				}
				if !bytes.HasPrefix(l.peer, []byte("hello\x00")) || !bytes.HasPrefix(c.private, []byte("welcome\x00")) {
					t.Fatalf("private data %q, %q", l.peer, c.private)
				}
				p := l.got[0]
				if len(l.got) != 1 || p.cfg.PathMTU != 1024 || p.remote != q.num || q.remote != p.num {
					t.Fatalf("accepted %d, path MTU %d", len(l.got), p.cfg.PathMTU)
				}
				m := s.register(s.b, NewBuffer(1<<16), MRConfig{Length: 1 << 16, Access: allAccess})
				want, got := randomBytes(s.rng, 5000), make([]byte, 5000)
				s.post(q, WorkRequest{Verb: VerbWrite, Buf: want, Addr: 77, RKey: m.key})
				s.post(q, WorkRequest{Verb: VerbRead, Buf: got, Addr: 77, RKey: m.key})
				s.drain(q, 2)
				if q.done[1].Err != nil || !bytes.Equal(want, got) {
					t.Fatalf("seed %d: transfer: %v", seed, q.done)
				}
				// The passive side sends, too.
				q.resp.post(recvRequest{id: 5, buf: make([]byte, 100)})
				s.post(p, WorkRequest{Verb: VerbSend, Buf: []byte("bye")})
				s.drain(p, 1)
				first, second := q, p
				if seed%2 == 1 {
					first, second = p, q
				}
				first.conn.disconnect(s.now)
				first.e.closeQP(s.now, first.qp, ErrFlushed)
				if !s.run(time.Minute, func() bool { return second.ended != nil }) || !errors.Is(second.ended, ErrDisconnected) {
					if f.loss == 0 {
						t.Fatalf("seed %d: the other side: %v", seed, second.ended)
					}
				}
				second.conn.disconnect(s.now)
				second.e.closeQP(s.now, second.qp, ErrFlushed)
				delete(s.b.cm.listeners, ServiceTCP(7174))
				s.clean()
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		listen func(l *simListener)
		dial   ServiceID
		want   RejectReason
	}{
		{"by the application", func(l *simListener) { l.refuse = true }, 1, RejectConsumer},
		{"nobody listens", func(*simListener) {}, 2, RejectInvalidService},
		{"nobody decides", func(l *simListener) { l.ignore = true }, 1, RejectTimeout},
		{"too many queue pairs", func(l *simListener) { l.e.limits.QPsPerPeer = -1 }, 1, RejectNoResources},
		{"too many half open", func(l *simListener) { l.e.limits.HalfOpenPerPeer = 0 }, 1, RejectNoResources},
		{"packets too large", func(l *simListener) { l.e.mtu = 1024 }, 1, RejectInvalidMTU},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, f := range []faults{{}, {loss: 0.2, dup: 0.2}} {
				s := newSim(t, 5, f, Limits{})
				l := s.listen(1)
				tt.listen(l)
				q, d, _ := s.dial(tt.dial, QPConfig{}, nil)
				s.run(10*time.Minute, func() bool { return d.calls > 0 })
				var r *RejectError
				if d.calls != 1 || !errors.As(d.err, &r) || r.Reason != tt.want {
					t.Errorf("dial: %v; want %v", d.err, tt.want)
				} else if tt.want == RejectConsumer && !bytes.HasPrefix(r.Private, []byte("no\x00")) {
					t.Errorf("private data %q", r.Private)
				}
				s.a.closeQP(s.now, q.qp, nil)
				s.clean()
			}
		})
	}
}

func TestDialNobody(t *testing.T) {
	s := newSim(t, 1, faults{loss: 1}, Limits{})
	q, d, _ := s.dial(1, QPConfig{}, nil)
	s.run(time.Minute, func() bool { return d.calls > 0 })
	if !errors.Is(d.err, ErrRetryExceeded) {
		t.Errorf("dial: %v", d.err)
	}
	s.a.closeQP(s.now, q.qp, nil)
	s.clean()
}

// TestHalfOpen: who asks for connections and never confirms them gets so many and no more, and they go away.
func TestHalfOpen(t *testing.T) {
	s := newSim(t, 1, faults{}, Limits{HalfOpenPerPeer: 5, HalfOpen: 8, QPsPerPeer: 6})
	l := s.listen(1)
	refused := 0
	flood := func(from netip.Addr, n int) {
		for i := range n {
			var b [madLen]byte
			m := MAD(b[:])
			m.Encode(AttrREQ, uint64(i))
			REQ(m.Payload()).Encode(&REQFields{Local: CommID(i + 1), Service: 1, QPN: QPN(100 + i), MTU: 5, PKey: defaultPKey, Primary: PathFields{LocalGID: GID(from)}})
			s.b.cm.receive(s.now, from, b[:])
		}
		s.tx.reset()
		s.b.transmit(s.now, s.tx)
		for _, p := range s.tx.packets[:s.tx.n] {
			if MAD(p.Data[20:]).Attribute() == AttrREJ {
				refused++
			}
		}
	}
	flood(netip.MustParseAddr("fd00::1"), 20)
	if len(l.got) != 5 || refused != 15 {
		t.Errorf("one peer: %d half-open connections, %d refused; want 5, 15", len(l.got), refused)
	}
	flood(netip.MustParseAddr("fd00::2"), 20)
	if len(l.got) != 8 {
		t.Errorf("two peers: %d half-open connections; want 8", len(l.got))
	}
	s.run(time.Minute, func() bool { return s.b.cm.halfOpen == 0 })
	for _, q := range l.got {
		if q.ended == nil {
			t.Error("a half-open connection stays")
		}
		s.b.closeQP(s.now, q.qp, nil)
	}
	delete(s.b.cm.listeners, 1)
	s.clean()
}

// TestReborn: a peer that lost its state asks for a connection of a queue pair number that it used before.
func TestReborn(t *testing.T) {
	s := newSim(t, 1, faults{}, Limits{})
	l := s.listen(1)
	q, d, c := s.dial(1, QPConfig{}, nil)
	s.run(time.Minute, func() bool { return d.calls > 0 })
	num := q.num
	c.forget()
	s.a.closeQP(s.now, q.qp, nil) // without a word
	q2 := s.qp(s.a, QPConfig{})
	delete(s.a.qps, q2.num)
	q2.num = num
	s.a.qps[num] = q2.qp
	d2 := &simDialer{}
	s.a.cm.dial(s.now, s.b.addr.Addr(), 1, q2.qp, nil, d2)
	s.run(time.Minute, func() bool { return d2.calls > 0 })
	if d2.err != nil || len(l.got) != 2 || !errors.Is(l.got[0].ended, ErrDisconnected) || l.got[1].ended != nil {
		t.Errorf("dial: %v, accepted %d", d2.err, len(l.got))
	}
}

func TestIdle(t *testing.T) {
	s := newSim(t, 1, faults{}, Limits{})
	a, b := s.pair(QPConfig{}, QPConfig{IdleTimeout: time.Second})
	m := s.register(s.b, NewBuffer(8), MRConfig{Length: 8, Access: AccessRead})
	for range 5 {
		s.run(600*time.Millisecond, func() bool { return false })
		a.done = nil
		s.post(a, WorkRequest{Verb: VerbRead, Buf: make([]byte, 8), RKey: m.key})
		s.drain(a, 1)
	}
	if b.ended != nil {
		t.Fatal("ended while in use")
	}
	s.run(time.Hour, func() bool { return b.ended != nil })
	if !errors.Is(b.ended, ErrIdle) {
		t.Errorf("ended: %v", b.ended)
	}
}

func TestRequesterErrors(t *testing.T) {
	t.Run("nobody answers", func(t *testing.T) {
		s := newSim(t, 1, faults{loss: 1}, Limits{})
		a, _ := s.pair(QPConfig{RetryCount: 3, AckTimeout: 10 * time.Millisecond}, QPConfig{})
		s.post(a, WorkRequest{ID: 1, Verb: VerbWrite, Buf: make([]byte, 8)})
		s.post(a, WorkRequest{ID: 2, Verb: VerbRead, Buf: make([]byte, 8)})
		s.drain(a, 2)
		if !errors.Is(a.done[0].Err, ErrRetryExceeded) || !errors.Is(a.done[1].Err, ErrFlushed) || !errors.Is(a.ended, ErrRetryExceeded) {
			t.Errorf("completions %v, ended %v", a.done, a.ended)
		}
		if c := s.a.counters; c.Timeouts != 4 || c.Sent != 8 || s.now < 4*10*time.Millisecond || s.now > 100*time.Millisecond {
			t.Errorf("at %v: %v", s.now, c)
		}
	})
	t.Run("no receive", func(t *testing.T) {
		s := newSim(t, 1, faults{}, Limits{})
		a, _ := s.pair(QPConfig{RNRRetry: 2}, QPConfig{MinRNRDelay: time.Millisecond})
		s.post(a, WorkRequest{Verb: VerbSend, Buf: make([]byte, 8)})
		s.drain(a, 1)
		if !errors.Is(a.done[0].Err, ErrRNRRetryExceeded) || s.b.counters.RNR != 3 {
			t.Errorf("completion %v, %v", a.done, s.b.counters)
		}
	})
	t.Run("refused", func(t *testing.T) {
		s := newSim(t, 1, faults{}, Limits{})
		a, b := s.pair(QPConfig{}, QPConfig{})
		m := s.register(s.b, NewBuffer(8), MRConfig{Length: 8, Access: AccessRead})
		s.post(a, WorkRequest{Verb: VerbRead, Buf: make([]byte, 8), RKey: m.key})
		s.post(a, WorkRequest{Verb: VerbWrite, Buf: make([]byte, 8), RKey: m.key})
		s.post(a, WorkRequest{Verb: VerbRead, Buf: make([]byte, 8), RKey: m.key})
		s.drain(a, 3)
		var nak *NAKError
		if a.done[0].Err != nil || !errors.As(a.done[1].Err, &nak) || nak.Syndrome != NAKRemoteAccess || !errors.Is(a.done[2].Err, ErrFlushed) {
			t.Errorf("completions %v", a.done)
		}
		if !errors.Is(b.ended, ErrRefused) || !errors.As(a.ended, &nak) {
			t.Errorf("ended %v, %v", a.ended, b.ended)
		}
	})
	t.Run("credits", func(t *testing.T) {
		// With credits, nobody runs into a missing receive, however slowly they are posted, once credits are known.
		s := newSim(t, 1, faults{}, Limits{})
		a, b := s.pair(QPConfig{FlowControl: true}, QPConfig{FlowControl: true})
		for i := range 100 {
			s.post(a, WorkRequest{ID: uint64(i), Verb: VerbSend, Buf: make([]byte, 8)})
		}
		b.resp.post(recvRequest{buf: make([]byte, 8)})
		s.run(time.Minute, func() bool {
			if b.resp.recvs.n == 0 && len(b.done) < 100 {
				for range 5 {
					b.resp.post(recvRequest{buf: make([]byte, 8)})
				}
			}
			return len(a.done) == 100
		})
		if len(a.done) != 100 || s.b.counters.RNR > 25 {
			t.Errorf("%d done, %v", len(a.done), s.b.counters)
		}
	})
	t.Run("never posted", func(t *testing.T) {
		s := newSim(t, 1, faults{}, Limits{})
		a, _ := s.pair(QPConfig{SendDepth: 1, PathMTU: 256}, QPConfig{})
		for _, wr := range []WorkRequest{{Verb: VerbRecv}, {}, {Verb: VerbFetchAdd, Addr: 4}} {
			if s.post(a, wr) == nil {
				t.Errorf("posted %+v", wr)
			}
		}
		s.post(a, WorkRequest{Verb: VerbSend})
		if err := s.post(a, WorkRequest{Verb: VerbSend}); !errors.Is(err, ErrQueueFull) {
			t.Errorf("posted to a full queue: %v", err)
		}
	})
}

func TestConnectErrors(t *testing.T) {
	s := newSim(t, 1, faults{}, Limits{QPs: 3, QPsPerPeer: 2})
	pair := func() error {
		q := s.qp(s.a, QPConfig{})
		return s.a.connect(s.now, q.qp, Remote{Addr: s.b.addr.Addr()}, false)
	}
	for _, a := range []string{"10.0.0.1", "::", "ff02::1"} {
		q := s.qp(s.a, QPConfig{})
		if err := s.a.connect(s.now, q.qp, Remote{Addr: netip.MustParseAddr(a)}, false); err == nil {
			t.Errorf("connected to %v", a)
		}
		s.a.closeQP(s.now, q.qp, nil)
	}
	if err := errors.Join(pair(), pair()); err != nil {
		t.Fatal(err)
	}
	if err := pair(); !errors.Is(err, ErrLimit) {
		t.Errorf("third queue pair of a peer: %v", err)
	}
	if _, err := s.a.addQP(s.a.pd, QPConfig{}.withDefaults(4096), simOwner{&simQP{}}); !errors.Is(err, ErrLimit) {
		t.Errorf("fourth queue pair: %v", err)
	}
}

func TestRegisterErrors(t *testing.T) {
	ro := failing{}
	for _, tt := range []struct {
		r   Region
		cfg MRConfig
	}{
		{ro, MRConfig{}}, {ro, MRConfig{Length: 8, Access: AccessWrite}}, {ro, MRConfig{Length: 8, Access: AccessAtomic}},
		{ro, MRConfig{Addr: 1<<64 - 8, Length: 9}}, {ro, MRConfig{Offset: -1, Length: 8}}, {ro, MRConfig{Offset: 1<<63 - 8, Length: 9}},
		{ro, MRConfig{Offset: 1, Length: 1 << 63}},
	} {
		if _, err := newMR(&PD{}, tt.r, tt.cfg); err == nil {
			t.Errorf("registered %+v", tt.cfg)
		}
	}
	for _, cfg := range []MRConfig{{Addr: 1<<64 - 8, Length: 8}, {Offset: 1<<63 - 8, Length: 8}} {
		if _, err := newMR(&PD{}, ro, cfg); err != nil {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}

// TestAllow: whom the listener does not allow is refused, at any number, without a trace of him being kept.
func TestAllow(t *testing.T) {
	s := newSim(t, 8, faults{}, Limits{})
	l := s.listen(1)
	l.l.allow = func(peer netip.Addr, private []byte) bool {
		if peer != s.a.addr.Addr() || len(private) != MaxREQPrivate {
			t.Errorf("asked about %v with %d bytes", peer, len(private))
		}
		return bytes.HasPrefix(private, []byte("token"))
	}
	for range 50 {
		q, d, _ := s.dial(1, QPConfig{}, []byte("guess"))
		s.run(time.Second, func() bool { return d.calls > 0 })
		var r *RejectError
		if !errors.As(d.err, &r) || r.Reason != RejectConsumer {
			t.Fatalf("dial: %v", d.err)
		}
		if n := len(s.b.cm.local) + len(s.b.cm.remote) + s.b.cm.halfOpen + len(s.b.peers) + len(s.b.timers); n != 0 {
			t.Fatalf("%d things are kept", n)
		}
		s.a.closeQP(s.now, q.qp, nil)
	}
	q, d, _ := s.dial(1, QPConfig{}, []byte("token"))
	s.run(time.Second, func() bool { return d.calls > 0 })
	if d.err != nil || s.b.counters.ConnectionsNotAllowed != 50 || s.b.counters.ConnectionsRefused != 50 {
		t.Errorf("dial with the token: %v; %v", d.err, s.b.counters)
	}
	s.a.closeQP(s.now, q.qp, nil)
}
