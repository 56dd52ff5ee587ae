package roce

import (
	"bytes"
	"errors"
	"fmt"
	"time"
)

// responder is the side of a queue pair that serves its peer's requests (IBA section 9.7.4 to 9.7.8, 9.7.7 for
// acknowledgements).
//
// It answers in PSN order: first what is pending in the ring of READ and atomic requests, then a refusal or else an
// acknowledgement of all that was done. DESIGN.md has the tables.
type responder struct {
	q    *qp
	epsn PSN    // expected next
	msn  uint32 // messages finished, 24 bits

	// The message that is coming in, if its first packet was taken and its last was not.
	inMessage bool
	kind      opKind
	mr        *MR
	va        uint64 // where the next byte goes
	left      uint32 // bytes of a WRITE still to come
	got       int    // bytes of a SEND that came

	recvs ring[recvRequest] // posted receives

	// The latest READ and atomic requests, oldest first: what a duplicate is answered from.
	resources ring[resource]
	pending   int // of them still to be sent
	highest   PSN // after the last READ response that was sent for the first time

	ackPending bool
	nak        Syndrome // to be sent, or 0
	nakPSN     PSN
	inGap      bool // a packet is missing, or there was no receive: the refusal went out once
	gapLast    PSN  // the last packet that came in the gap

	refused Syndrome // the refusal that ended the queue pair, or 0
	renaks  int      // how often it may be repeated

	pace     time.Duration // between two READ responses; 0 as long as none get lost
	paced    int           // READ responses since pace was changed
	waitEnd  time.Duration // READ responses wait until then
	mark     time.Duration // since when progress is measured
	markPSN  PSN           // and from where
	lastSent time.Duration // when the last READ response left
}

// maxFinalNAKs bounds how often a refusal that ended the queue pair is repeated to a peer that lost it.
const maxFinalNAKs = 16

// recvRequest is a posted receive.
type recvRequest struct {
	id  uint64
	buf []byte
	w   *waiter
}

// resource is a READ or atomic request that was accepted.
type resource struct {
	psn    PSN
	n      int // sequence numbers that it takes
	op     Opcode
	key    RKey
	va     uint64
	length uint32
	mr     *MR
	msn    uint32
	prev   uint64 // what an atomic operation found

	// The run of responses that is going out: the request itself, or a repeated part of it.
	pending  bool
	answered bool // in full, once
	run      readRun
}

// readRun is a READ as it is being answered.
type readRun struct {
	psn    PSN // of the first response
	va     uint64
	length uint32
	n      int // responses
	next   int // responses sent
}

func (r *responder) init(q *qp) {
	r.q = q
	r.recvs.init(q.cfg.RecvDepth)
	r.resources.init(2 * q.cfg.Resources)
	r.renaks = maxFinalNAKs
}

// start sets the PSN of the peer's first packet.
func (r *responder) start(psn PSN) { r.epsn, r.highest = psn, psn }

// post adds a receive.
func (r *responder) post(w recvRequest) error {
	if r.recvs.full() {
		return ErrQueueFull
	}
	r.recvs.push(w)
	return nil
}

// abandon takes back the receive of w. One that a message is already going into is left to it, with other memory.
func (r *responder) abandon(w *waiter) {
	for i := range r.recvs.n {
		if e := r.recvs.at(i); e.w == w {
			if i == 0 && r.inMessage && r.kind == kindSend {
				e.buf, e.w = bytes.Clone(e.buf), &waiter{}
			} else {
				r.recvs.remove(i)
			}
			return
		}
	}
}

// flush ends the posted receives.
func (r *responder) flush() {
	r.inMessage = false
	if r.refused == 0 { // a refusal, and what comes before it, still goes out
		r.ackPending, r.nak = false, 0
		r.forsake()
	}
	for r.recvs.n > 0 {
		w := r.recvs.pop()
		r.q.owner.complete(r.q, Completion{ID: w.id, Verb: VerbRecv, Err: ErrFlushed}, w.w, 0)
	}
}

// forsake leaves unanswered what was still to be answered before the refusal: the memory is its owner's again.
func (r *responder) forsake() {
	r.pending = 0
	for i := range r.resources.n {
		r.resources.at(i).pending = false
	}
}

// refuse ends the queue pair because of the request at psn, which the peer is told.
func (r *responder) refuse(now time.Duration, s Syndrome, psn PSN, why error) {
	c := &r.q.e.counters
	switch s {
	case NAKInvalid:
		c.NAKInvalid++
	case NAKRemoteAccess:
		c.NAKAccess++
	case NAKRemoteOp:
		c.NAKOperation++
	}
	r.nak, r.nakPSN, r.refused, r.ackPending = s, psn, s, false
	for i := range r.resources.n {
		if res := r.resources.at(i); res.pending && !res.psn.Before(psn) {
			res.pending = false
			r.pending--
		}
	}
	if why != nil {
		why = fmt.Errorf("%w: %v at psn %v: %w", ErrRefused, s, psn, why)
	} else {
		why = fmt.Errorf("%w: %v at psn %v", ErrRefused, s, psn)
	}
	r.q.e.log.Info("refused a peer's request", "qpn", r.q.num, "peer", r.q.peer.Addr(), "why", why)
	r.q.fail(now, why)
}

// receive takes a request packet.
func (r *responder) receive(now time.Duration, in *inbound) {
	psn := in.bth.PSN()
	if r.q.state >= qpError {
		// A peer that lost answers from before the refusal goes back to there, and must learn of it all the same. What follows the
		// request that was refused only left before the peer knew.
		if r.refused != 0 && r.renaks > 0 && psn.Sub(r.epsn) <= 0 {
			r.renaks--
			r.nak = r.refused
			// One that has got on since, by answers which it had given up for lost, is told of what it waits for: a refusal of
			// what lies behind it would mean nothing to it. All before epsn was done.
			if psn.Sub(r.nakPSN) > 0 {
				r.nakPSN = psn
			}
		} else {
			r.q.e.counters.BadState++
		}
		return
	}
	switch d := psn.Sub(r.epsn); {
	case d > 0:
		r.q.e.counters.OutOfOrder++
		// One refusal for each time that the peer runs through the gap.
		if !r.inGap || psn.Sub(r.gapLast) <= 0 {
			r.inGap = true
			r.nak, r.nakPSN = NAKSequence, r.epsn
		}
		r.gapLast = psn
	case d < 0:
		r.q.e.counters.Duplicates++
		r.duplicate(now, in)
	default:
		r.inGap, r.nak = false, 0
		r.request(now, in)
	}
}

// request does the request that is next in sequence.
func (r *responder) request(now time.Duration, in *inbound) {
	psn := in.bth.PSN()
	first, last := in.op.pos&atStart != 0, in.op.pos&atEnd != 0
	if first == r.inMessage || !first && in.op.kind != r.kind || in.op.ext&hasIETH != 0 {
		r.refuse(now, NAKInvalid, psn, errSequence)
		return
	}
	var s Syndrome
	var err error
	switch in.op.kind {
	case kindSend:
		s, err = r.send(in, first, last)
	case kindWrite:
		s, err = r.write(now, in, first, last)
	case kindRead:
		s, err = r.read(now, in)
	case kindAtomic:
		s, err = r.atomic(now, in)
	}
	switch {
	case s.IsRNR():
		r.q.e.counters.RNR++
		r.nak, r.nakPSN = s, psn
		r.inGap, r.gapLast = true, psn // be silent about what follows
	case s != 0:
		r.refuse(now, s, psn, err)
	default:
		r.inMessage, r.kind = !last, in.op.kind
		if in.op.kind == kindSend || in.op.kind == kindWrite {
			r.epsn = r.epsn.Add(1)
			if last {
				r.msn++
			}
			r.ackPending = r.ackPending || in.bth.AckReq()
		}
	}
}

var (
	errSequence = errors.New("the packet does not continue the message")
	errPayload  = errors.New("the packet's length does not fit its message")
	errTooMany  = errors.New("more outstanding requests than agreed")
	errTooLong  = errors.New("longer than the limit")
	errAligned  = errors.New("atomic operation on an unaligned word")
	errKey      = errors.New("key, bounds or rights")
	errVerb     = errors.New("no such verb to post")
)

// fitsMTU reports whether a SEND or WRITE packet has a length that its place in the message allows.
func (r *responder) fitsMTU(in *inbound, last bool) bool {
	n := len(in.payload)
	if !last {
		return n == r.q.cfg.PathMTU
	}
	return n <= r.q.cfg.PathMTU && (n > 0 || in.op.pos == atOnly)
}

func (r *responder) send(in *inbound, first, last bool) (Syndrome, error) {
	if first {
		if r.recvs.n == 0 {
			return rnrFor(r.q.cfg.MinRNRDelay), nil
		}
		r.got = 0
	}
	if !r.fitsMTU(in, last) {
		return NAKInvalid, errPayload
	}
	w := r.recvs.at(0)
	if len(in.payload) > len(w.buf)-r.got {
		r.received(in, ErrLength)
		return NAKInvalid, ErrLength
	}
	r.got += copy(w.buf[r.got:], in.payload)
	if last {
		r.received(in, nil)
	}
	return 0, nil
}

// received completes the first posted receive. Precondition: there is one.
func (r *responder) received(in *inbound, err error) {
	w := r.recvs.pop()
	c := Completion{ID: w.id, Verb: VerbRecv, Len: r.got, Err: err}
	if in.op.ext&hasImmDt != 0 {
		c.Imm, c.HasImm = in.bth.ImmDt().Value(), true
	}
	r.q.owner.complete(r.q, c, w.w, 0)
}

func (r *responder) write(now time.Duration, in *inbound, first, last bool) (Syndrome, error) {
	if first {
		h := in.bth.RETH()
		if n := h.Length(); n > 0 {
			mr, s := r.q.e.access(now, r.q.pd, h.RKey(), h.VA(), uint64(n), AccessWrite)
			if s != 0 {
				return s, errKey
			}
			r.mr = mr
		}
		r.va, r.left = h.VA(), h.Length()
	}
	n := uint32(len(in.payload))
	if !r.fitsMTU(in, last) || n > r.left || last && n != r.left || !last && n == r.left {
		return NAKInvalid, errPayload
	}
	hasImm := in.op.ext&hasImmDt != 0
	if hasImm && r.recvs.n == 0 {
		return rnrFor(r.q.cfg.MinRNRDelay), nil
	}
	if n > 0 {
		if !r.mr.usable(now) {
			r.q.e.counters.Revoked++
			return NAKRemoteAccess, errKey
		}
		if err := r.mr.write(in.payload, r.va); err != nil {
			return refusalFor(err), err
		}
		r.va += uint64(n)
		r.left -= n
	}
	if hasImm {
		r.got = 0
		r.received(in, nil)
	}
	return 0, nil
}

// refusalFor tells a denied access from one that failed.
func refusalFor(err error) Syndrome {
	if errors.Is(err, ErrAccess) {
		return NAKRemoteAccess
	}
	return NAKRemoteOp
}

func (r *responder) read(now time.Duration, in *inbound) (Syndrome, error) {
	h := in.bth.RETH()
	res := resource{psn: in.bth.PSN(), op: OpReadRequest, key: h.RKey(), va: h.VA(), length: h.Length()}
	res.n = packets(res.length, r.q.cfg.PathMTU)
	if int64(res.length) > r.q.e.limits.MaxRead || res.n >= maxSpan {
		return NAKInvalid, errTooLong
	}
	if res.length > 0 {
		var s Syndrome
		if res.mr, s = r.q.e.access(now, r.q.pd, res.key, res.va, uint64(res.length), AccessRead); s != 0 {
			return s, errKey
		}
	}
	res.run = readRun{psn: res.psn, va: res.va, length: res.length, n: res.n}
	return r.keep(res)
}

func (r *responder) atomic(now time.Duration, in *inbound) (Syndrome, error) {
	h := in.bth.AtomicETH()
	res := resource{psn: in.bth.PSN(), n: 1, op: in.bth.Opcode(), key: h.RKey(), va: h.VA(), length: 8}
	if res.va%8 != 0 {
		return NAKInvalid, errAligned
	}
	mr, s := r.q.e.access(now, r.q.pd, res.key, res.va, 8, AccessAtomic)
	if s != 0 {
		return s, errKey
	}
	if r.crowded() {
		return NAKInvalid, errTooMany
	}
	prev, err := mr.atomic(res.op, res.va, h.SwapAdd(), h.Compare())
	if err != nil {
		return refusalFor(err), err
	}
	res.mr, res.prev = mr, prev
	return r.keep(res)
}

// crowded reports whether the ring has no room for another request: its oldest one still waits to be answered for the
// first time. If it waits to be answered again, the peer has moved on since it asked: a duplicate came late.
func (r *responder) crowded() bool {
	return r.resources.full() && r.resources.at(0).pending && !r.resources.at(0).answered
}

// keep accepts a request into the ring, from where it is answered.
func (r *responder) keep(res resource) (Syndrome, error) {
	if r.crowded() {
		return NAKInvalid, errTooMany
	}
	if r.resources.full() && r.resources.pop().pending {
		r.pending--
	}
	r.msn++
	r.epsn = r.epsn.Add(res.n)
	res.msn, res.pending = r.msn, true
	r.ackPending = false // the response acknowledges everything before it
	r.resources.push(res)
	r.pending++
	return 0, nil
}

// duplicate answers a request that was done before. Nothing is ever done twice: memory is read again for a READ, and an
// atomic operation is answered with the value that it found the first time.
func (r *responder) duplicate(now time.Duration, in *inbound) {
	switch in.op.kind {
	case kindSend, kindWrite:
		r.ackPending = true
	case kindRead:
		r.duplicateRead(now, in)
	case kindAtomic:
		res := r.find(in.bth.PSN())
		h := in.bth.AtomicETH()
		if res == nil || res.op != in.bth.Opcode() || res.va != h.VA() || res.key != h.RKey() {
			r.q.e.counters.UnknownDuplicate++
			return
		}
		if !res.pending {
			res.pending = true
			r.pending++
		}
	}
}

// duplicateRead answers a repeated READ. It may start in the middle of the first one, at a packet boundary, and must not
// leave its bounds. Where the responses asked for are still to be sent, nothing is added: otherwise a peer that asks
// again because we are slow makes us slower, without end.
func (r *responder) duplicateRead(now time.Duration, in *inbound) {
	psn, h := in.bth.PSN(), in.bth.RETH()
	res := r.find(psn)
	if res == nil || res.op != OpReadRequest || res.key != h.RKey() {
		r.q.e.counters.UnknownDuplicate++
		return
	}
	skip := psn.Sub(res.psn)
	off := uint64(skip) * uint64(r.q.cfg.PathMTU)
	if h.VA() != res.va+off || off > uint64(res.length) || uint64(h.Length()) > uint64(res.length)-off || h.Length() == 0 && res.length != 0 {
		r.q.e.counters.UnknownDuplicate++
		return
	}
	if res.pending {
		at := res.run.psn.Add(res.run.next)
		if psn.Sub(at) >= 0 && psn.Sub(res.run.psn.Add(res.run.n)) < 0 {
			return
		}
	} else {
		res.pending = true
		r.pending++
	}
	r.q.e.counters.Replays++
	r.slowDown(now, psn)
	res.run = readRun{psn: psn, va: h.VA(), length: h.Length(), n: packets(h.Length(), r.q.cfg.PathMTU)}
}

// find returns the request in the ring that has psn among its numbers, or nil.
func (r *responder) find(psn PSN) *resource {
	for i := r.resources.n - 1; i >= 0; i-- {
		res := r.resources.at(i)
		if d := psn.Sub(res.psn); d >= 0 && d < res.n {
			return res
		}
	}
	return nil
}

// Pacing. A READ that is asked for again says that responses got lost, most often because the peer or the wire is slower
// than we are. What it does not ask for again did arrive, which tells how fast: that becomes the gap between packets. If
// it comes so late that a timer must have run out, it tells nothing, and the gap grows by half. Packets without loss
// narrow it again, slowly: there is no other sign that the peer keeps up.
const (
	minPace   = 2 * time.Microsecond // a narrower gap is none
	maxPace   = 250 * time.Microsecond
	paceBurst = 8                      // packets that leave together while pacing
	paceDecay = 256                    // packets after which the gap narrows by a sixteenth
	paceIdle  = 5 * time.Millisecond   // without sending, after which measuring starts anew
	paceTrip  = 500 * time.Microsecond // of the time until a loss shows, the part that is not the peer's pace
)

// slowDown widens the gap between READ responses. The peer has what comes before psn.
func (r *responder) slowDown(now time.Duration, psn PSN) {
	gap := max(r.pace+r.pace/2, minPace)
	if n := psn.Sub(r.markPSN); n > 0 && now-r.lastSent < paceIdle {
		gap = max((now-r.mark-paceTrip)/time.Duration(n), r.pace)
	}
	r.pace = min(gap, maxPace)
	if gap < minPace {
		r.pace = 0
	}
	r.paced = 0
	r.mark, r.markPSN = now, psn
}

// wantsToSend reports whether transmit would add something.
func (r *responder) wantsToSend(now time.Duration) bool {
	return r.pending > 0 && now >= r.waitEnd || r.pending == 0 && (r.nak != 0 || r.ackPending)
}

// deadline returns when transmit may go on, or 0 if time does not matter.
func (r *responder) deadline() time.Duration {
	if r.pending > 0 {
		return r.waitEnd
	}
	return 0
}

// transmit adds answers to out, in PSN order.
func (r *responder) transmit(now time.Duration, out *outbox) {
	if now >= r.waitEnd {
		r.waitEnd = 0
	}
	for i := 0; r.pending > 0 && i < r.resources.n; i++ {
		if res := r.resources.at(i); res.pending {
			if out.full() || r.waitEnd != 0 {
				return
			}
			if res.op != OpReadRequest {
				h, _ := r.q.packet(out, OpAtomicAck, res.psn, 0, false)
				h.AETH().Encode(r.ackSyndrome(), res.msn)
				h.AtomicAckETH().Encode(res.prev)
			} else if !r.answerRead(now, res, out) {
				break // for now, or for good
			}
			res.pending, res.answered = false, true
			r.pending--
		}
	}
	if r.pending > 0 || out.full() {
		return
	}
	switch {
	case r.nak != 0:
		if r.nak == NAKSequence {
			r.q.e.counters.NAKSequence++
		}
		h, _ := r.q.packet(out, OpAck, r.nakPSN, 0, false)
		h.AETH().Encode(r.nak, r.msn)
		r.nak, r.ackPending = 0, false // a refusal acknowledges everything before it
	case r.ackPending:
		h, _ := r.q.packet(out, OpAck, r.epsn.Add(-1), 0, false)
		h.AETH().Encode(r.ackSyndrome(), r.msn)
		r.ackPending = false
	}
}

// ackSyndrome returns the acknowledgement with the credits of the moment.
func (r *responder) ackSyndrome() Syndrome {
	if r.q.cfg.FlowControl {
		return ackWithCredits(r.recvs.n)
	}
	return AckUnlimited
}

// answerRead adds the next responses to a READ and reports whether those were all.
func (r *responder) answerRead(now time.Duration, res *resource, out *outbox) bool {
	mtu, run := r.q.cfg.PathMTU, &res.run
	room := paceBurst
	if now-r.lastSent > paceIdle {
		r.mark, r.markPSN = now, run.psn.Add(run.next)
	}
	r.lastSent = now
	for ; run.next < run.n; run.next++ {
		if out.full() {
			return false
		}
		if r.pace > 0 && room == 0 {
			r.waitEnd = now + paceBurst*r.pace
			return false
		}
		skip := uint64(run.next) * uint64(mtu)
		size := int(min(uint64(mtu), uint64(run.length)-skip))
		psn := run.psn.Add(run.next)
		if !r.allowed(now, psn, size) {
			r.q.e.counters.Throttled++
			r.waitEnd = now + throttleWait
			return false
		}
		op := OpReadMiddle
		switch {
		case run.n == 1:
			op = OpReadOnly
		case run.next == 0:
			op = OpReadFirst
		case run.next == run.n-1:
			op = OpReadLast
		}
		h, body := r.q.packet(out, op, psn, size, false)
		if op != OpReadMiddle {
			h.AETH().Encode(r.ackSyndrome(), res.msn)
		}
		if size > 0 {
			s, why := NAKRemoteAccess, errKey
			if res.mr.usable(now) {
				why = res.mr.read(body, run.va+skip)
				s = refusalFor(why)
			} else {
				r.q.e.counters.Revoked++
			}
			if why != nil {
				out.drop()
				r.pending--
				res.pending = false
				r.refuse(now, s, psn, why)
				return false
			}
		}
		if psn.Before(r.highest) {
			r.q.e.counters.ReplayedPackets++
		} else {
			r.highest = psn.Add(1)
		}
		room--
		if r.paced++; r.paced >= paceDecay && r.pace > 0 {
			r.paced = 0
			if r.pace -= max(r.pace/16, 1); r.pace < minPace {
				r.pace = 0
			}
		}
	}
	return true
}

// allowed reports whether the peer may get n bytes at psn now.
func (r *responder) allowed(now time.Duration, psn PSN, n int) bool {
	p, l := r.q.account, &r.q.e.limits
	if p == nil {
		return true
	}
	if psn.Before(r.highest) && !p.replays.take(now, l.ReplayBytesPerSecond, n) {
		return false
	}
	return p.answers.take(now, l.BytesPerSecond, n)
}

// throttleWait is how long READ responses wait when their peer has used up its bytes.
const throttleWait = time.Millisecond

// take uses up n bytes of an allowance of rate bytes per second, or reports that there is none left.
func (b *bucket) take(now time.Duration, rate int64, n int) bool {
	if rate <= 0 {
		return true
	}
	most := max(rate/50, 2*MaxPathMTU) // what may leave at once: 20 ms worth
	if b.filled == 0 {
		b.tokens, b.filled = most, now
	}
	if since := now - b.filled; since > 0 {
		b.tokens = min(b.tokens+int64(float64(rate)*since.Seconds()), most)
		b.filled = now
	}
	if b.tokens <= 0 {
		return false
	}
	b.tokens -= int64(n)
	return true
}
