package roce

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"
)

// engine is all of the protocol and none of the world: packets and the time go in, packets come out. It has no
// goroutine, no lock and no clock; the Device around it has. Time is counted from the start of the Device and never
// zero, so that a zero deadline means none.
type engine struct {
	local    netip.AddrPort
	mtu      int // the link's
	limits   Limits
	log      *slog.Logger
	qps      map[QPN]*qp
	mrs      map[RKey]*MR
	peers    map[netip.Addr]*peer
	cm       manager
	run      runQueue
	timers   timerHeap
	lingers  int // queue pairs in qpLingering
	counters Counters
}

// peer is what limits are counted by.
type peer struct {
	addr     netip.Addr
	qps      int
	halfOpen int
	lingers  int
	answers  bucket // READ responses
	replays  bucket // those that are repeated
}

// bucket is an allowance of bytes.
type bucket struct {
	tokens int64 // that may leave at once; negative is debt
	filled time.Duration
}

func newEngine(local netip.AddrPort, mtu int, limits Limits, log *slog.Logger) *engine {
	e := &engine{
		local: local, mtu: mtu, limits: limits.withDefaults(), log: log,
		qps: map[QPN]*qp{}, mrs: map[RKey]*MR{}, peers: map[netip.Addr]*peer{},
	}
	e.cm.init(e)
	return e
}

// outbox collects the packets of one transmission. They lie one behind the other in memory, with room for the ICRC in
// between, so that a link can hand over many in one piece.
type outbox struct {
	packets []Packet
	arena   []byte
	n       int  // packets
	used    int  // bytes of arena
	limit   int  // of n, for the queue pair whose turn it is
	noSums  bool // leave out settle, to measure what it costs
}

func newOutbox() *outbox {
	o := &outbox{packets: make([]Packet, batch), arena: make([]byte, icrcLen+batch*maxDatagram)}
	o.reset()
	return o
}

func (o *outbox) reset() { o.n, o.used, o.limit = 0, icrcLen, len(o.packets) }

// settle sums up the packet that next returned last for its ICRC, now that it is written and still in the nearest cache: later a
// link would find it in the one behind, with those that followed it.
func (o *outbox) settle() {
	if o.n > 0 && !o.noSums {
		p := &o.packets[o.n-1]
		end := o.used - icrcLen
		p.sum, p.summed = dataSumAt(o.arena[:end], end-len(p.Data)), true
	}
}

func (o *outbox) full() bool { return o.n >= o.limit }

// next returns the next packet with size bytes of Data, whatever is in them. Preconditions: not full; size is a multiple
// of four and not more than a packet can have.
func (o *outbox) next(to netip.AddrPort, size int) *Packet {
	o.settle()
	clear(o.arena[o.used-icrcLen : o.used])
	end := o.used + size
	p := &o.packets[o.n]
	*p = Packet{Peer: to, Data: o.arena[o.used : end : end+icrcLen]}
	o.used = end + icrcLen
	o.n++
	return p
}

// drop takes back the packet that next returned last.
func (o *outbox) drop() {
	o.n--
	o.used -= len(o.packets[o.n].Data) + icrcLen
}

// inbound is a received packet that passed the checks common to all.
type inbound struct {
	bth     BTH
	op      opInfo
	payload []byte
}

// parse checks what can be checked without knowing the queue pair.
func (e *engine) parse(data []byte) (in inbound, ok bool) {
	h, err := ParseBTH(data)
	if err != nil {
		e.counters.Malformed++
		return in, false
	}
	op := opcodes[h.Opcode()]
	n := len(data) - h.Pad()
	if n < len(h) || !op.payload && len(data) != len(h) || len(data)%4 != 0 {
		e.counters.Malformed++
		return in, false
	}
	if h.PKey()&pkeyMask != defaultPKey&pkeyMask {
		e.counters.BadPKey++
		return in, false
	}
	return inbound{h, op, data[len(h):n]}, true
}

// receive takes one packet. p may be used again when it returns.
func (e *engine) receive(now time.Duration, p *Packet) {
	e.counters.Received++
	in, ok := e.parse(p.Data)
	if !ok {
		return
	}
	if in.op.kind == kindDatagram {
		if in.bth.DestQP() != QPNGeneral || in.bth.DETH().QKey() != gsiQKey {
			e.counters.UnknownQPN++
			return
		}
		e.cm.receive(now, p.Peer.Addr(), in.payload)
		return
	}
	q := e.qps[in.bth.DestQP()]
	switch {
	case q == nil:
		e.counters.UnknownQPN++
		return
	case q.peer.Addr() != p.Peer.Addr():
		e.counters.WrongSource++
		return
	case q.state == qpInit || q.state == qpClosed:
		e.counters.BadState++
		return
	}
	q.receive(now, &in)
	e.schedule(now, q)
}

// schedule puts q into the run queue if it has something to send, and sees to its timer.
func (e *engine) schedule(now time.Duration, q *qp) {
	if q.wantsToSend(now) {
		e.run.push(q)
	}
	at := q.deadline()
	if at != 0 {
		at = max(at, now+1) // what is due now has been done, and must not come up again in this round
	}
	e.timers.set(&q.timer, at)
}

// transmit fills out with what is to be sent now. It is to be called again until it adds nothing.
func (e *engine) transmit(now time.Duration, out *outbox) {
	e.cm.transmit(out)
	for before := -1; before < out.n && !out.full(); { // in turn, as long as anybody adds something
		before = out.n
		for range e.run.n {
			if out.full() {
				break
			}
			q := e.run.pop()
			q.transmit(now, out)
			e.schedule(now, q)
		}
	}
	out.settle()
	e.counters.Sent += uint64(out.n)
}

// busy reports whether transmit would add something.
func (e *engine) busy() bool { return e.run.n > 0 || len(e.cm.outgoing) > 0 }

// advance does what is due at now.
func (e *engine) advance(now time.Duration) {
	for {
		t := e.timers.due(now)
		if t == nil {
			return
		}
		t.owner.expire(now)
	}
}

// next returns when advance must be called at the latest, or 0 if nothing will be due.
func (e *engine) next() time.Duration { return e.timers.next() }

// register adds a memory region under a new random key.
func (e *engine) register(now time.Duration, m *MR) {
	for m.key == 0 || e.mrs[m.key] != nil {
		m.key = RKey(random32())
	}
	if m.cfg.Lifetime > 0 {
		m.expires = now + m.cfg.Lifetime
	}
	e.mrs[m.key] = m
}

// revoke takes a region away; requests that still use it are refused from their next packet on.
func (e *engine) revoke(m *MR) {
	m.revoked = true
	delete(e.mrs, m.key)
}

// access finds the region for n bytes at va and checks the right to them. Where it is refused, syndrome is not 0.
func (e *engine) access(now time.Duration, pd *PD, key RKey, va, n uint64, want Access) (m *MR, syndrome Syndrome) {
	m = e.mrs[key]
	switch {
	case m == nil || m.pd != pd:
		e.counters.BadKey++
	case !m.usable(now):
		e.counters.Revoked++
	case m.cfg.Access&want == 0:
		e.counters.BadRights++
	case !m.contains(va, n):
		e.counters.BadBounds++
	default:
		return m, 0
	}
	return nil, NAKRemoteAccess
}

// peerFor returns the account of an address, made if need be. It is to be given back by release.
func (e *engine) peerFor(a netip.Addr) *peer {
	p := e.peers[a]
	if p == nil {
		p = &peer{addr: a}
		e.peers[a] = p
	}
	return p
}

// release forgets an account that nothing is counted on.
func (e *engine) release(p *peer) {
	if p.qps == 0 && p.halfOpen == 0 {
		delete(e.peers, p.addr)
	}
}

// addQP makes a queue pair with a random number and a random first PSN. Its owner is told of everything that ends. cfg
// comes from withDefaults.
func (e *engine) addQP(pd *PD, cfg QPConfig, owner completer) (*qp, error) {
	if len(e.qps) >= e.limits.QPs {
		return nil, fmt.Errorf("create queue pair: %w: %d exist", ErrLimit, len(e.qps))
	}
	q := newQP(e, pd, cfg, owner)
	for q.num <= QPNGeneral || q.num == psnMask || e.qps[q.num] != nil {
		q.num = QPN(random32() & psnMask)
	}
	e.qps[q.num] = q
	return q, nil
}

// connect lets q talk to its peer. It may send at once unless listenOnly is set: then it waits for the peer's first
// packet or for ready.
func (e *engine) connect(now time.Duration, q *qp, r Remote, listenOnly bool) error {
	addr := r.Addr.Unmap().WithZone("")
	switch {
	case q.state != qpInit:
		return fmt.Errorf("connect queue pair %v: it was connected before", q.num)
	case addr.Is4() != e.local.Addr().Is4() || !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast():
		return fmt.Errorf("connect queue pair %v: no way from %v to %v", q.num, e.local.Addr(), r.Addr)
	}
	p := e.peerFor(addr)
	if p.qps >= e.limits.QPsPerPeer {
		e.release(p)
		return fmt.Errorf("connect queue pair %v: %w: %v has %d", q.num, ErrLimit, addr, p.qps)
	}
	p.qps++
	q.account = p
	q.peer = netip.AddrPortFrom(addr, Port)
	q.remote = r.QPN & psnMask
	q.resp.start(r.PSN & psnMask)
	q.heard = now
	q.state = qpReadyToSend
	if listenOnly {
		q.state = qpReadyToReceive
	}
	e.schedule(now, q)
	return nil
}

// ready lets a queue pair that was only listening send.
func (e *engine) ready(now time.Duration, q *qp) {
	if q.state == qpReadyToReceive {
		q.state = qpReadyToSend
		e.schedule(now, q)
	}
}

// closeQP flushes and forgets a queue pair. It may be called again.
//
// One that has refused its peer's request stays a while to repeat that, unless too many do: the peer whose refusal got lost knows
// no other way to learn of it, and some (rxe, with 7 retries) would ask for ever.
func (e *engine) closeQP(now time.Duration, q *qp, cause error) {
	if q.state >= qpLingering {
		return
	}
	q.fail(now, cause)
	q.resp.forsake()
	if q.resp.refused == 0 || q.resp.renaks == 0 || e.lingers >= e.limits.HalfOpen || q.account.lingers >= e.limits.HalfOpenPerPeer {
		e.forget(q)
		return
	}
	e.lingers++
	q.account.lingers++
	q.state, q.until = qpLingering, now+q.linger()
	e.schedule(now, q)
}

// forget ends all knowledge of a queue pair.
func (e *engine) forget(q *qp) {
	if q.state == qpLingering {
		e.lingers--
		q.account.lingers--
	}
	q.state = qpClosed
	e.run.remove(q)
	e.timers.remove(&q.timer)
	delete(e.qps, q.num)
	if q.account != nil {
		q.account.qps--
		e.release(q.account)
		q.account = nil
	}
}

// runQueue is a list of the queue pairs that have something to send, in turn.
type runQueue struct {
	head, tail *qp
	n          int
}

func (r *runQueue) push(q *qp) {
	if q.queued {
		return
	}
	q.queued, q.runPrev, q.runNext = true, r.tail, nil
	if r.tail != nil {
		r.tail.runNext = q
	} else {
		r.head = q
	}
	r.tail = q
	r.n++
}

func (r *runQueue) remove(q *qp) {
	if !q.queued {
		return
	}
	if q.runPrev != nil {
		q.runPrev.runNext = q.runNext
	} else {
		r.head = q.runNext
	}
	if q.runNext != nil {
		q.runNext.runPrev = q.runPrev
	} else {
		r.tail = q.runPrev
	}
	q.queued, q.runPrev, q.runNext = false, nil, nil
	r.n--
}

// pop returns the first in the queue. Precondition: n > 0.
func (r *runQueue) pop() *qp {
	q := r.head
	r.remove(q)
	return q
}
