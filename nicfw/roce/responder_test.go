package roce

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
)

// oneEnd is an engine with one queue pair whose peer is the test.
type oneEnd struct {
	t    *testing.T
	s    *sim
	q    *simQP
	mem  *Buffer
	mr   *MR
	tx   *outbox
	peer netip.AddrPort
}

const (
	testVA  = 0x10000
	testLen = 0x10000
)

func newOneEnd(t *testing.T, cfg QPConfig, access Access) *oneEnd {
	s := newSim(t, 1, faults{}, Limits{MaxRead: 1 << 20})
	if cfg.PathMTU == 0 {
		cfg.PathMTU = 256
	}
	o := &oneEnd{t: t, s: s, q: s.qp(s.b, cfg), mem: NewBuffer(testLen), tx: newOutbox(), peer: s.a.addr}
	if err := s.b.connect(s.now, o.q.qp, Remote{s.a.addr.Addr(), 0x77, 100}, false); err != nil {
		t.Fatal(err)
	}
	o.mr = s.register(s.b, o.mem, MRConfig{Addr: testVA, Length: testLen, Access: access})
	return o
}

// request builds a request packet; ext writes its extended headers.
func (o *oneEnd) request(op Opcode, psn PSN, ext func(BTH), payload []byte) []byte {
	pad := -len(payload) & 3
	b := make([]byte, op.HeaderLen()+len(payload)+pad)
	h := BTH(b[:op.HeaderLen()])
	h.Encode(&BTHFields{Opcode: op, Pad: uint8(pad), PKey: defaultPKey, DestQP: o.q.num, AckReq: true, PSN: psn})
	if ext != nil {
		ext(h)
	}
	copy(b[op.HeaderLen():], payload)
	return b
}

// give hands in packets and returns a line for each answer.
func (o *oneEnd) give(packets ...[]byte) []string {
	o.t.Helper()
	for _, p := range packets {
		o.s.b.receive(o.s.now, &Packet{Peer: o.peer, Data: p})
	}
	return o.answers()
}

func (o *oneEnd) answers() []string {
	var lines []string
	for {
		o.tx.reset()
		o.s.b.transmit(o.s.now, o.tx)
		if o.tx.n == 0 {
			return lines
		}
		for _, p := range o.tx.packets[:o.tx.n] {
			h, err := ParseBTH(p.Data)
			if err != nil {
				o.t.Fatal(err)
			}
			line := fmt.Sprintf("%v %d", h.Opcode(), h.PSN())
			if ext := opcodes[h.Opcode()].ext; ext&hasAETH != 0 {
				line += fmt.Sprintf(" %v msn %d", h.AETH().Syndrome(), h.AETH().MSN())
				if ext&hasAtomicAckETH != 0 {
					line += fmt.Sprintf(" prev %d", h.AtomicAckETH().Original())
				}
			}
			if n := len(p.Data) - len(h) - h.Pad(); n > 0 {
				line += fmt.Sprintf(" %d bytes", n)
			}
			lines = append(lines, line)
		}
	}
}

func reth(va uint64, key RKey, n uint32) func(BTH) {
	return func(h BTH) { h.RETH().Encode(va, key, n) }
}

func atomicETH(va uint64, key RKey, swapAdd, compare uint64) func(BTH) {
	return func(h BTH) { h.AtomicETH().Encode(va, key, swapAdd, compare) }
}

const allAccess = AccessRead | AccessWrite | AccessAtomic

// TestResponder is the table of what a responder answers to a new queue pair's first packets, which start at PSN 100.
func TestResponder(t *testing.T) {
	full := make([]byte, 256)
	for _, tt := range []struct {
		name   string
		access Access
		recvs  int
		give   func(o *oneEnd) [][]byte
		want   []string
		state  qpState
	}{
		{"read", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(testVA, o.mr.key, 600), nil)}
		}, []string{"RDMA READ Response First 100 ACK msn 1 256 bytes", "RDMA READ Response Middle 101 256 bytes", "RDMA READ Response Last 102 ACK msn 1 88 bytes"}, qpReadyToSend},
		{"read of nothing needs no key", 0, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(0, 0, 0), nil)}
		}, []string{"RDMA READ Response Only 100 ACK msn 1"}, qpReadyToSend},
		{"read to the last byte", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(testVA+testLen-1, o.mr.key, 1), nil)}
		}, []string{"RDMA READ Response Only 100 ACK msn 1 1 bytes"}, qpReadyToSend},
		{"read behind the last byte", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(testVA+testLen-1, o.mr.key, 2), nil)}
		}, []string{"Acknowledge 100 remote access error msn 0"}, qpError},
		{"read below", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(testVA-1, o.mr.key, 2), nil)}
		}, []string{"Acknowledge 100 remote access error msn 0"}, qpError},
		{"read around the end of the address space", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(1<<64-16, o.mr.key, 32), nil)}
		}, []string{"Acknowledge 100 remote access error msn 0"}, qpError},
		{"read with a wrong key", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(testVA, o.mr.key+1, 8), nil)}
		}, []string{"Acknowledge 100 remote access error msn 0"}, qpError},
		{"read without the right", AccessWrite, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(testVA, o.mr.key, 8), nil)}
		}, []string{"Acknowledge 100 remote access error msn 0"}, qpError},
		{"read beyond the limit", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(testVA, o.mr.key, 1<<31), nil)}
		}, []string{"Acknowledge 100 invalid request msn 0"}, qpError},
		{"write", AccessWrite, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpWriteFirst, 100, reth(testVA, o.mr.key, 513), full), o.request(OpWriteMiddle, 101, nil, full), o.request(OpWriteLast, 102, nil, []byte{1})}
		}, []string{"Acknowledge 102 ACK msn 1"}, qpReadyToSend},
		{"write to a read-only window", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpWriteOnly, 100, reth(testVA, o.mr.key, 4), full[:4])}
		}, []string{"Acknowledge 100 remote access error msn 0"}, qpError},
		{"write of less than announced", AccessWrite, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpWriteOnly, 100, reth(testVA, o.mr.key, 8), full[:4])}
		}, []string{"Acknowledge 100 invalid request msn 0"}, qpError},
		{"write of more than announced", AccessWrite, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpWriteFirst, 100, reth(testVA, o.mr.key, 257), full), o.request(OpWriteMiddle, 101, nil, full)}
		}, []string{"Acknowledge 101 invalid request msn 0"}, qpError},
		{"first packet that is not full", AccessWrite, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpWriteFirst, 100, reth(testVA, o.mr.key, 300), full[:252])}
		}, []string{"Acknowledge 100 invalid request msn 0"}, qpError},
		{"middle without first", AccessWrite, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpWriteMiddle, 100, nil, full)}
		}, []string{"Acknowledge 100 invalid request msn 0"}, qpError},
		{"first after first", AccessWrite, 0, func(o *oneEnd) [][]byte {
			p := o.request(OpWriteFirst, 100, reth(testVA, o.mr.key, 512), full)
			return [][]byte{p, o.request(OpWriteFirst, 101, reth(testVA, o.mr.key, 512), full)}
		}, []string{"Acknowledge 101 invalid request msn 0"}, qpError},
		{"send in the middle of a write", AccessWrite, 1, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpWriteFirst, 100, reth(testVA, o.mr.key, 512), full), o.request(OpSendLast, 101, nil, full)}
		}, []string{"Acknowledge 101 invalid request msn 0"}, qpError},
		{"send", 0, 1, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpSendFirst, 100, nil, full), o.request(OpSendLastImm, 101, func(h BTH) { h.ImmDt().Encode(9) }, full)}
		}, []string{"Acknowledge 101 ACK msn 1"}, qpReadyToSend},
		{"send without a receive, and what follows it", 0, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpSendOnly, 100, nil, full), o.request(OpSendOnly, 101, nil, full)}
		}, []string{"Acknowledge 100 RNR NAK, 640µs msn 0"}, qpReadyToSend},
		{"send that is too long", 0, 1, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpSendFirst, 100, nil, full), o.request(OpSendMiddle, 101, nil, full), o.request(OpSendLast, 102, nil, full)}
		}, []string{"Acknowledge 102 invalid request msn 0"}, qpError},
		{"send with invalidate", 0, 1, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpSendOnlyInval, 100, nil, full)}
		}, []string{"Acknowledge 100 invalid request msn 0"}, qpError},
		{"atomics", AccessAtomic, 0, func(o *oneEnd) [][]byte {
			return [][]byte{
				o.request(OpFetchAdd, 100, atomicETH(testVA, o.mr.key, 5, 0), nil), o.request(OpFetchAdd, 101, atomicETH(testVA, o.mr.key, 5, 0), nil),
				o.request(OpCompareSwap, 102, atomicETH(testVA, o.mr.key, 7, 11), nil), o.request(OpCompareSwap, 103, atomicETH(testVA, o.mr.key, 7, 10), nil),
				o.request(OpFetchAdd, 104, atomicETH(testVA, o.mr.key, 0, 0), nil),
				// and again
				o.request(OpFetchAdd, 101, atomicETH(testVA, o.mr.key, 5, 0), nil), o.request(OpCompareSwap, 103, atomicETH(testVA, o.mr.key, 7, 10), nil),
			}
		}, []string{"ATOMIC Acknowledge 100 ACK msn 1 prev 0", "ATOMIC Acknowledge 101 ACK msn 2 prev 5", "ATOMIC Acknowledge 102 ACK msn 3 prev 10", "ATOMIC Acknowledge 103 ACK msn 4 prev 10", "ATOMIC Acknowledge 104 ACK msn 5 prev 7"}, qpReadyToSend},
		{"unaligned atomic", AccessAtomic, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpFetchAdd, 100, atomicETH(testVA+4, o.mr.key, 1, 0), nil)}
		}, []string{"Acknowledge 100 invalid request msn 0"}, qpError},
		{"atomic without the right", AccessRead | AccessWrite, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpFetchAdd, 100, atomicETH(testVA, o.mr.key, 1, 0), nil)}
		}, []string{"Acknowledge 100 remote access error msn 0"}, qpError},
		{"gap", AccessWrite, 0, func(o *oneEnd) [][]byte {
			w := func(psn PSN) []byte { return o.request(OpWriteOnly, psn, reth(testVA, o.mr.key, 4), full[:4]) }
			return [][]byte{w(100), w(102), w(103)}
		}, []string{"Acknowledge 101 PSN sequence error msn 1"}, qpReadyToSend},
		{"duplicate write", AccessWrite, 0, func(o *oneEnd) [][]byte {
			w := func(psn PSN) []byte { return o.request(OpWriteOnly, psn, reth(testVA, o.mr.key, 4), full[:4]) }
			return [][]byte{w(100), w(101), w(100)}
		}, []string{"Acknowledge 101 ACK msn 2"}, qpReadyToSend},
		{"read, then a refusal", AccessRead, 0, func(o *oneEnd) [][]byte {
			return [][]byte{o.request(OpReadRequest, 100, reth(testVA, o.mr.key, 8), nil), o.request(OpReadRequest, 101, reth(0, o.mr.key, 8), nil)}
		}, []string{"RDMA READ Response Only 100 ACK msn 1 8 bytes", "Acknowledge 101 remote access error msn 1"}, qpError},
		{"more reads than agreed", AccessRead, 0, func(o *oneEnd) [][]byte {
			var p [][]byte
			for i := range 9 { // Resources 4, and as many again for duplicates
				p = append(p, o.request(OpReadRequest, PSN(100+i), reth(testVA, o.mr.key, 8), nil))
			}
			return p
		}, []string{
			"RDMA READ Response Only 100 ACK msn 1 8 bytes", "RDMA READ Response Only 101 ACK msn 2 8 bytes", "RDMA READ Response Only 102 ACK msn 3 8 bytes",
			"RDMA READ Response Only 103 ACK msn 4 8 bytes", "RDMA READ Response Only 104 ACK msn 5 8 bytes", "RDMA READ Response Only 105 ACK msn 6 8 bytes",
			"RDMA READ Response Only 106 ACK msn 7 8 bytes", "RDMA READ Response Only 107 ACK msn 8 8 bytes", "Acknowledge 108 invalid request msn 8",
		}, qpError},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := newOneEnd(t, QPConfig{Resources: 4}, tt.access)
			for i := range tt.recvs {
				o.q.resp.post(recvRequest{id: uint64(i), buf: make([]byte, 512)})
			}
			if diff := gocmp.Diff(tt.want, o.give(tt.give(o)...)); diff != "" {
				t.Errorf("answers (-want +got):\n%s", diff)
			}
			if o.q.state != tt.state {
				t.Errorf("state = %d; want %d", o.q.state, tt.state)
			}
			if (o.q.ended != nil) != (tt.state == qpError) || o.q.ended != nil && !errors.Is(o.q.ended, ErrRefused) {
				t.Errorf("ended with %v", o.q.ended)
			}
		})
	}
}

func TestDuplicateRead(t *testing.T) {
	o := newOneEnd(t, QPConfig{}, AccessRead)
	read := func(psn PSN, va uint64, n uint32) []byte {
		return o.request(OpReadRequest, psn, reth(va, o.mr.key, n), nil)
	}
	o.give(read(100, testVA, 1024), read(104, testVA, 8))
	for _, tt := range []struct {
		name string
		give []byte
		want []string
	}{
		{"whole", read(100, testVA, 1024), []string{"RDMA READ Response First 100 ACK msn 1 256 bytes", "RDMA READ Response Middle 101 256 bytes", "RDMA READ Response Middle 102 256 bytes", "RDMA READ Response Last 103 ACK msn 1 256 bytes"}},
		{"from the middle", read(102, testVA+512, 512), []string{"RDMA READ Response First 102 ACK msn 1 256 bytes", "RDMA READ Response Last 103 ACK msn 1 256 bytes"}},
		{"last packet", read(103, testVA+768, 256), []string{"RDMA READ Response Only 103 ACK msn 1 256 bytes"}},
		{"another address", read(102, testVA+256, 512), nil},
		{"beyond its end", read(102, testVA+512, 513), nil},
		{"never asked for", read(90, testVA, 8), nil},
	} {
		if diff := gocmp.Diff(tt.want, o.give(tt.give)); diff != "" {
			t.Errorf("%s: answers (-want +got):\n%s", tt.name, diff)
		}
		o.s.now += time.Second
	}
	if c := o.s.b.counters; c.UnknownDuplicate != 3 || c.Replays != 3 {
		t.Errorf("counters: %v", c)
	}
}

// TestDuplicateReadInTransfer: who asks again for what is still to come gets nothing twice.
func TestDuplicateReadInTransfer(t *testing.T) {
	o := newOneEnd(t, QPConfig{}, AccessRead)
	read := func(psn PSN, va uint64, n uint32) []byte {
		return o.request(OpReadRequest, psn, reth(va, o.mr.key, n), nil)
	}
	for range 5 {
		o.s.b.receive(o.s.now, &Packet{Peer: o.peer, Data: read(100, testVA, 1024)})
	}
	o.s.b.receive(o.s.now, &Packet{Peer: o.peer, Data: read(102, testVA+512, 512)})
	if got := o.answers(); len(got) != 4 {
		t.Errorf("answers: %q; want 4", got)
	}
}

func TestRevokedInTransfer(t *testing.T) {
	o := newOneEnd(t, QPConfig{}, AccessRead)
	o.s.b.receive(o.s.now, &Packet{Peer: o.peer, Data: o.request(OpReadRequest, 100, reth(testVA, o.mr.key, 1024), nil)})
	two := newOutbox()
	two.packets = two.packets[:2]
	two.reset()
	o.s.b.transmit(o.s.now, two)
	o.s.b.revoke(o.mr)
	if diff := gocmp.Diff([]string{"Acknowledge 102 remote access error msn 1"}, o.answers()); diff != "" {
		t.Errorf("answers (-want +got):\n%s", diff)
	}
	// The refusal is repeated to a peer that lost it, but not for ever.
	again := o.request(OpReadRequest, 102, reth(testVA+512, o.mr.key, 512), nil)
	for i := range maxFinalNAKs + 5 {
		if got := o.give(again); (len(got) == 1) != (i < maxFinalNAKs) {
			t.Fatalf("repetition %d: %q", i, got)
		}
	}
}

// TestRefusedThenClosed: a peer that lost the refusal learns of it although the owner of the queue pair closed that at once; so many
// are kept for that and no more, their memory is left alone, and all of them go away.
func TestRefusedThenClosed(t *testing.T) {
	for seed := range uint64(50) {
		s := newSim(t, seed, faults{loss: 0.2}, Limits{})
		a, b := s.pair(QPConfig{AckTimeout: 10 * time.Millisecond, RetryCount: 7}, QPConfig{})
		s.post(a, WorkRequest{Verb: VerbRead, Buf: make([]byte, 8), RKey: 1})
		s.run(time.Minute, func() bool {
			if b.ended != nil {
				s.b.closeQP(s.now, b.qp, ErrFlushed)
			}
			return len(a.done) > 0
		})
		var nak *NAKError
		if len(a.done) != 1 || !errors.As(a.done[0].Err, &nak) || nak.Syndrome != NAKRemoteAccess {
			t.Errorf("seed %d: %v; want %v", seed, a.done, NAKRemoteAccess)
		}
		s.a.closeQP(s.now, a.qp, ErrFlushed)
		s.b.closeQP(s.now, b.qp, ErrFlushed)
		s.clean()
	}

	// What follows the request that was refused does not use up the repetitions.
	o := newOneEnd(t, QPConfig{}, AccessRead)
	o.give(o.request(OpWriteFirst, 100, reth(testVA, o.mr.key, 1<<16), make([]byte, 256)))
	for i := range PSN(3 * maxFinalNAKs) {
		if got := o.give(o.request(OpWriteMiddle, 101+i, nil, make([]byte, 256))); len(got) != 0 {
			t.Fatalf("packet %d behind: %q", i, got)
		}
	}
	if got := o.give(o.request(OpWriteFirst, 100, reth(testVA, o.mr.key, 1<<16), make([]byte, 256))); len(got) != 1 {
		t.Errorf("the request again: %q; want the refusal", got)
	}

	s := newSim(t, 1, faults{}, Limits{HalfOpenPerPeer: 3, HalfOpen: 5})
	for range 10 {
		a, b := s.pair(QPConfig{}, QPConfig{})
		m := s.register(s.b, NewBuffer(1<<16), MRConfig{Length: 1 << 16, Access: AccessRead})
		s.post(a, WorkRequest{Verb: VerbRead, Buf: make([]byte, 1<<16), RKey: m.key})
		s.post(a, WorkRequest{Verb: VerbRead, Buf: make([]byte, 8), RKey: 1})
		s.run(time.Minute, func() bool { return b.ended != nil })
		s.b.closeQP(s.now, b.qp, ErrFlushed)
		s.b.closeQP(s.now, b.qp, ErrFlushed)
		if b.resp.pending != 0 {
			t.Errorf("%d requests are still to be answered from memory that is its owner's again", b.resp.pending)
		}
		s.a.closeQP(s.now, a.qp, ErrFlushed)
	}
	if s.b.lingers != 3 || len(s.b.qps) != 3 {
		t.Errorf("%d of %d queue pairs linger; want 3", s.b.lingers, len(s.b.qps))
	}
	s.clean()
	if s.b.lingers != 0 {
		t.Errorf("%d queue pairs linger", 0)
	}
}

// TestRevokedWhileRepeated: a peer that asked again for what it then got after all has moved on when the repetition is refused, and
// learns of the refusal where it is.
func TestRevokedWhileRepeated(t *testing.T) {
	o := newOneEnd(t, QPConfig{}, AccessRead|AccessWrite)
	read := func(psn PSN, va uint64, n uint32) []byte {
		return o.request(OpReadRequest, psn, reth(va, o.mr.key, n), nil)
	}
	if got := o.give(read(100, testVA, 1024)); len(got) != 4 {
		t.Fatalf("answers: %q; want 4", got)
	}
	o.s.now += time.Second
	o.s.b.receive(o.s.now, &Packet{Peer: o.peer, Data: read(101, testVA+256, 768)})
	o.s.b.revoke(o.mr)
	if diff := gocmp.Diff([]string{"Acknowledge 101 remote access error msn 1"}, o.answers()); diff != "" {
		t.Errorf("answers (-want +got):\n%s", diff)
	}
	for _, tt := range []struct {
		psn  PSN
		want string // or nothing
	}{
		{100, "Acknowledge 101 remote access error msn 1"},
		{103, "Acknowledge 103 remote access error msn 1"},
		{104, "Acknowledge 104 remote access error msn 1"}, // the next request, which is not done
		{105, ""}, // one behind it
	} {
		if diff := gocmp.Diff(tt.want, strings.Join(o.give(read(tt.psn, testVA, 8)), ", ")); diff != "" {
			t.Errorf("PSN %d (-want +got):\n%s", tt.psn, diff)
		}
	}
}

func TestExpiredLease(t *testing.T) {
	o := newOneEnd(t, QPConfig{}, 0)
	mr := o.s.register(o.s.b, o.mem, MRConfig{Length: 8, Access: AccessRead, Lifetime: time.Second})
	read := func(psn PSN) []byte { return o.request(OpReadRequest, psn, reth(0, mr.key, 8), nil) }
	if got := o.give(read(100)); got[0] != "RDMA READ Response Only 100 ACK msn 1 8 bytes" {
		t.Fatal(got)
	}
	o.s.now += time.Second
	if got := o.give(read(101)); got[0] != "Acknowledge 101 remote access error msn 1" {
		t.Fatal(got)
	}
}

// failing is a region that cannot be read beyond half of it.
type failing struct{ err error }

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off >= 512 {
		return 0, f.err
	}
	return len(p), nil
}

func TestRegionError(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{io.ErrUnexpectedEOF, "Acknowledge 102 remote operational error msn 1"},
		{fmt.Errorf("hole: %w", ErrAccess), "Acknowledge 102 remote access error msn 1"},
	} {
		o := newOneEnd(t, QPConfig{}, 0)
		mr := o.s.register(o.s.b, failing{tt.err}, MRConfig{Length: 1024, Access: AccessRead})
		got := o.give(o.request(OpReadRequest, 100, reth(0, mr.key, 1024), nil))
		if len(got) != 3 || got[2] != tt.want {
			t.Errorf("answers %q; want the third to be %q", got, tt.want)
		}
	}
}

func TestDropped(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(o *oneEnd, p []byte) []byte
		count  func(c *Counters) uint64
	}{
		{"unknown queue pair", func(o *oneEnd, p []byte) []byte { p[6] ^= 1; return p }, func(c *Counters) uint64 { return c.UnknownQPN }},
		{"partition", func(o *oneEnd, p []byte) []byte { p[3] ^= 1; return p }, func(c *Counters) uint64 { return c.BadPKey }},
		{"version", func(o *oneEnd, p []byte) []byte { p[1] |= 1; return p }, func(c *Counters) uint64 { return c.Malformed }},
		{"opcode", func(o *oneEnd, p []byte) []byte { p[0] = 0xff; return p }, func(c *Counters) uint64 { return c.Malformed }},
		{"short", func(o *oneEnd, p []byte) []byte { return p[:20] }, func(c *Counters) uint64 { return c.Malformed }},
		{"payload behind a READ request", func(o *oneEnd, p []byte) []byte { return append(p, 0, 0, 0, 0) }, func(c *Counters) uint64 { return c.Malformed }},
		{"source", func(o *oneEnd, p []byte) []byte { o.peer = netip.MustParseAddrPort("[fd00::c]:4791"); return p }, func(c *Counters) uint64 { return c.WrongSource }},
	} {
		o := newOneEnd(t, QPConfig{}, AccessRead)
		p := tt.change(o, o.request(OpReadRequest, 100, reth(testVA, o.mr.key, 8), nil))
		if got := o.give(p); len(got) != 0 || tt.count(&o.s.b.counters) != 1 {
			t.Errorf("%s: answers %q, counters %v", tt.name, got, o.s.b.counters)
		}
	}
}

func TestRate(t *testing.T) {
	s := newSim(t, 3, faults{}, Limits{BytesPerSecond: 1 << 20})
	a, _ := s.pair(QPConfig{AckTimeout: time.Second}, QPConfig{})
	m := s.register(s.b, NewBuffer(4<<20), MRConfig{Length: 4 << 20, Access: AccessRead})
	s.post(a, WorkRequest{Verb: VerbRead, Buf: make([]byte, 4<<20), RKey: m.RKey()})
	s.drain(a, 1)
	if s.now < 3900*time.Millisecond || s.now > 4200*time.Millisecond || a.done[0].Err != nil {
		t.Errorf("4 MiB at 1 MiB/s took %v: %v", s.now, a.done[0].Err)
	}
}

// TestOracle lets our responder answer the requests that a kernel made, and compares with what another kernel answered.
func TestOracle(t *testing.T) {
	type flow struct {
		src, dst netip.Addr
		qpn      QPN
	}
	type packet struct {
		h    BTH
		data []byte
	}
	requests, answers := map[flow][]packet{}, map[flow][]packet{}
	var order []flow
	for _, cf := range reference(t) {
		f, _ := ParseFrame(cf.Data)
		p := packet{data: f.Data[:len(f.Data)-icrcLen]}
		p.h, _ = ParseBTH(p.data)
		k := flow{f.Src().Addr(), f.Dst().Addr(), p.h.DestQP()}
		switch opcodes[p.h.Opcode()].kind {
		case kindSend, kindWrite, kindRead, kindAtomic:
			if requests[k] == nil {
				order = append(order, k)
			}
			requests[k] = append(requests[k], p)
		case kindReadResponse, kindAck, kindAtomicAck:
			answers[k] = append(answers[k], p)
		}
	}
	compared := 0
	for _, k := range order {
		reqs := requests[k]
		// The answers to this flow are those of the other direction with numbers from among its requests.
		var want []packet
		for a, list := range answers {
			if a.src == k.dst && a.dst == k.src {
				if d := list[0].h.PSN().Sub(reqs[0].h.PSN()); d >= 0 && d < 1000 {
					want = append(want, list...)
				}
			}
		}
		if len(want) == 0 {
			t.Fatalf("flow %v: nobody answers", k)
		}
		e := newEngine(netip.AddrPortFrom(k.dst, Port), MaxPathMTU, Limits{}, slog.New(slog.DiscardHandler))
		pd, owner := &PD{}, &simQP{}
		q, err := e.addQP(pd, QPConfig{Resources: 128, RecvDepth: 1024}.withDefaults(4096), simOwner{owner})
		if err != nil {
			t.Fatal(err)
		}
		delete(e.qps, q.num)
		q.num = k.qpn
		e.qps[q.num] = q
		if err := e.connect(1, q, Remote{k.src, want[0].h.DestQP(), reqs[0].h.PSN()}, false); err != nil {
			t.Fatal(err)
		}
		// Memory as the kernel's answers show it, under the keys that the requests use.
		mem := &told{}
		for _, p := range reqs {
			var key RKey
			switch opcodes[p.h.Opcode()].kind {
			case kindRead:
				key = p.h.RETH().RKey()
				i := slices.IndexFunc(want, func(w packet) bool { return w.h.PSN() == p.h.PSN() })
				var b []byte
				for ; len(b) < int(p.h.RETH().Length()); i++ {
					b = append(b, want[i].data[len(want[i].h):len(want[i].data)-want[i].h.Pad()]...)
				}
				mem.reads = append(mem.reads, toldRead{int64(p.h.RETH().VA()), b})
			case kindAtomic:
				key = p.h.AtomicETH().RKey()
				i := slices.IndexFunc(want, func(w packet) bool { return w.h.PSN() == p.h.PSN() })
				mem.word = append(mem.word, want[i].h.AtomicAckETH().Original())
			case kindWrite:
				if p.h.Opcode() == OpWriteOnly {
					key = p.h.RETH().RKey()
				}
			case kindSend:
				q.resp.post(recvRequest{buf: make([]byte, 1<<20)})
			}
			if key != 0 && e.mrs[key] == nil {
				m, err := newMR(pd, mem, MRConfig{Length: 1 << 62, Access: allAccess})
				if err != nil {
					t.Fatal(err)
				}
				m.key = key
				e.mrs[key] = m
			}
		}
		tx := newOutbox()
		var got [][]byte
		for _, p := range reqs {
			e.receive(2, &Packet{Peer: netip.AddrPortFrom(k.src, 50000), Data: bytes.Clone(p.data)})
			for {
				tx.reset()
				e.transmit(2, tx)
				if tx.n == 0 {
					break
				}
				for _, p := range tx.packets[:tx.n] {
					got = append(got, bytes.Clone(p.Data))
				}
			}
		}
		if len(got) != len(want) {
			t.Errorf("flow %v: %d answers; the kernel gave %d", k, len(got), len(want))
		}
		for i := range min(len(got), len(want)) {
			w, g := bytes.Clone(want[i].data), got[i]
			w[1], g[1] = w[1]&^0x40, g[1]&^0x40 // the kernel does not set the migration state
			w[8], g[8] = w[8]&0x7f, g[8]&0x7f
			if diff := gocmp.Diff(w, g); diff != "" {
				t.Errorf("flow %v, answer %d, %v, differs (-kernel +ours):\n%s", k, i, want[i].h.Opcode(), diff)
			}
			compared++
		}
	}
	t.Logf("%d answers to %d connections are the kernel's", compared, len(order))
}

// told is memory that shows what it was told, read by read.
type told struct {
	reads []toldRead
	word  []uint64
}

type toldRead struct {
	at   int64
	data []byte
}

func (m *told) ReadAt(p []byte, off int64) (int, error) {
	for i, r := range m.reads {
		if end := off - r.at + int64(len(p)); off >= r.at && end <= int64(len(r.data)) {
			if end == int64(len(r.data)) {
				m.reads = slices.Delete(m.reads, i, i+1)
			}
			return copy(p, r.data[off-r.at:]), nil
		}
	}
	if len(p) == 8 && len(m.word) > 0 { // an atomic operation looks
		binary.LittleEndian.PutUint64(p, m.word[0])
		return 8, nil
	}
	return 0, io.EOF
}

func (m *told) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }

func (m *told) CompareAndSwap(off int64, old, new uint64) (uint64, error) {
	prev := m.word[0]
	m.word = m.word[1:]
	return prev, nil
}

// TestReplayRate: forged duplicates of an answered READ, as many as one likes, make us send no more than the limit; the
// first answers are not held up by it.
func TestReplayRate(t *testing.T) {
	const rate = 1 << 20
	s := newSim(t, 3, faults{}, Limits{ReplayBytesPerSecond: rate, MaxRead: 1 << 20})
	a, b := s.pair(QPConfig{AckTimeout: time.Second}, QPConfig{})
	m := s.register(s.b, NewBuffer(8<<20), MRConfig{Length: 8 << 20, Access: AccessRead})
	s.post(a, WorkRequest{Verb: VerbRead, Buf: make([]byte, 8<<20), RKey: m.RKey()})
	s.drain(a, 1)
	if s.now > 500*time.Millisecond || a.done[0].Err != nil {
		t.Fatalf("8 MiB once took %v: %v", s.now, a.done[0].Err)
	}
	res := b.resp.resources.at(b.resp.resources.n - 1)
	dup := make([]byte, OpReadRequest.HeaderLen())
	h := BTH(dup)
	h.Encode(&BTHFields{Opcode: OpReadRequest, PKey: defaultPKey, DestQP: b.num, PSN: res.psn})
	h.RETH().Encode(res.va, res.key, res.length)
	start, sent := s.now, 0
	for s.now < start+2*time.Second {
		s.b.receive(s.now, &Packet{Peer: s.a.addr, Data: dup})
		s.b.advance(s.now)
		for range 100 {
			s.tx.reset()
			s.b.transmit(s.now, s.tx)
			for i := range s.tx.n {
				sent += len(s.tx.packets[i].Data)
			}
			if s.tx.n == 0 {
				break
			}
		}
		s.now += 100 * time.Microsecond
	}
	if sent < rate || sent > 3*rate {
		t.Errorf("duplicates for 2 s made us send %d bytes; want about %d", sent, 2*rate)
	}
	if s.b.counters.Throttled == 0 || s.b.counters.Replays == 0 {
		t.Errorf("counters: %v", s.b.counters)
	}
}

// TestNumbersAreRandom: what a forger must guess has no pattern: each bit is set in about half of the numbers, and they do not
// follow each other. The bounds are off by more than ten standard deviations.
func TestNumbersAreRandom(t *testing.T) {
	const n = 1000
	s := newSim(t, 1, faults{}, Limits{QPs: n + 1})
	var qpns, psns, keys [n]uint32
	for i := range n {
		q := s.qp(s.a, QPConfig{})
		qpns[i], psns[i] = uint32(q.num), uint32(q.req.next)
		keys[i] = uint32(s.register(s.a, NewBuffer(8), MRConfig{Length: 8, Access: AccessRead}).RKey())
	}
	for _, tt := range []struct {
		name string
		got  [n]uint32
		bits int
	}{{"queue pair numbers", qpns, 24}, {"first packet numbers", psns, 24}, {"keys", keys, 32}} {
		for b := range tt.bits {
			set := 0
			for _, v := range tt.got {
				set += int(v >> b & 1)
			}
			if set < n/3 || set > 2*n/3 {
				t.Errorf("%s: bit %d is set in %d of %d", tt.name, b, set, n)
			}
		}
		near := 0
		for i := range n - 1 {
			if d := int64(tt.got[i+1]) - int64(tt.got[i]); d > -1024 && d < 1024 {
				near++
			}
		}
		if near > n/50 {
			t.Errorf("%s: %d of %d are close to the one before", tt.name, near, n)
		}
	}
}
