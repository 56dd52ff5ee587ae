package roce

import (
	"bytes"
	"time"
)

// requester is the side of a queue pair that makes requests (IBA section 9.7.2, 9.7.5.2 for its timers, 9.9.2 for its
// errors). It goes back to the first packet that is not accounted for when one is missing; DESIGN.md has the tables.
type requester struct {
	q    *qp
	next PSN               // of the next request that is posted
	ssn  uint32            // messages posted, 24 bits
	sq   ring[sendRequest] // oldest first
	cur  int               // index in sq of the request that is being sent
	off  int               // its next packet
	sent PSN               // after the highest packet that was ever sent

	blocked bool          // by the window, the peer's resources or its credits: an answer will free it
	rnrEnd  time.Duration // receiver not ready: nothing is sent until then
	timeout time.Duration // when the oldest packet is given up on; 0 if nothing is outstanding
	retries int           // since the last progress
	rnrs    int           // likewise
	backAt  PSN           // where the last going back started
	backEnd time.Duration // until when another one to the same place is not worth it

	credited bool   // the peer announces credits
	limit    uint32 // the last message that they allow, 24 bits
}

// sendRequest is a posted work request.
type sendRequest struct {
	WorkRequest
	psn  PSN
	n    int    // packets: of the request itself, or of a READ's response
	done int    // packets acknowledged, or received
	ssn  uint32 // of its last message
	size int    // bytes of a READ, whose Buf is nil when nobody wants them any more
	w    *waiter
	tag  int // for w
}

// readSegment is how many response packets one READ on the wire asks for at most: a longer one is made of several, so
// that the window bounds what is under way.
const readSegment = 64

func (r *requester) init(q *qp, first PSN) {
	r.q = q
	r.sq.init(q.cfg.SendDepth)
	r.start(first)
}

// start sets the PSN of our first packet. Nothing may have been posted before.
func (r *requester) start(first PSN) { r.next, r.sent, r.backAt = first, first, first.Add(-1) }

// post queues a work request.
func (r *requester) post(wr WorkRequest, w *waiter, tag int) error {
	if r.sq.full() {
		return ErrQueueFull
	}
	s := sendRequest{WorkRequest: wr, psn: r.next, n: 1, size: len(wr.Buf), w: w, tag: tag}
	switch wr.Verb {
	case VerbSend, VerbWrite, VerbRead:
		if uint64(len(wr.Buf)) > maxMessage {
			return errTooLong
		}
		if s.n = packets(uint32(len(wr.Buf)), r.q.cfg.PathMTU); s.n >= maxSpan {
			return errTooLong
		}
	case VerbCompareSwap, VerbFetchAdd:
		if wr.Addr%8 != 0 {
			return errAligned
		}
	default:
		return errVerb
	}
	if r.sq.n > 0 && r.next.Sub(r.sq.at(0).psn)+s.n >= maxSpan {
		return ErrQueueFull
	}
	r.ssn++
	if wr.Verb == VerbRead {
		r.ssn += uint32((s.n - 1) / readSegment)
	}
	s.ssn = r.ssn & psnMask
	r.next = r.next.Add(s.n)
	r.sq.push(s)
	return nil
}

// maxMessage is the longest message that the specification allows, bytes, and maxSpan the most sequence numbers that
// may be under way, well below the half of them that makes "before" unclear.
const (
	maxMessage = 1 << 31
	maxSpan    = 1 << 22
)

// una returns the oldest packet that is not accounted for. Precondition: the send queue is not empty.
func (r *requester) una() PSN { return r.sq.at(0).psn.Add(r.sq.at(0).done) }

// outstanding reports whether something was sent that is not accounted for.
func (r *requester) outstanding() bool { return r.sq.n > 0 && r.una().Before(r.sent) }

// oneSided reports whether the request completes by a response of its own, not by an acknowledgement.
func (s *sendRequest) oneSided() bool {
	return s.Verb == VerbRead || s.Verb == VerbCompareSwap || s.Verb == VerbFetchAdd
}

func (r *requester) wantsToSend(now time.Duration) bool {
	return r.cur < r.sq.n && !r.blocked && now >= r.rnrEnd
}

func (r *requester) deadline() time.Duration {
	if r.rnrEnd != 0 {
		return r.rnrEnd
	}
	return r.timeout
}

// readsOut returns how many READ requests and atomics are under way, and how many packets their responses take.
func (r *requester) readsOut() (requests, responses int) {
	for i := 0; i <= r.cur && i < r.sq.n; i++ {
		s := r.sq.at(i)
		end := s.n
		if i == r.cur {
			end = r.off
		}
		switch {
		case !s.oneSided() || end <= s.done:
		case s.Verb == VerbRead:
			requests += (end+readSegment-1)/readSegment - s.done/readSegment
			responses += end - s.done
		default:
			requests++
			responses++
		}
	}
	return requests, responses
}

// transmit adds request packets to out.
func (r *requester) transmit(now time.Duration, out *outbox) {
	requests, responses := r.readsOut()
	cfg := &r.q.cfg
	for r.cur < r.sq.n && now >= r.rnrEnd && !out.full() {
		s := r.sq.at(r.cur)
		psn := s.psn.Add(r.off)
		count := 1 // sequence numbers that this packet uses up
		switch {
		case s.Verb == VerbRead:
			count = min(s.n-r.off, readSegment-r.off%readSegment)
			r.blocked = requests >= cfg.MaxReads || responses > 0 && responses+count > cfg.Window
		case s.oneSided():
			r.blocked = requests >= cfg.MaxReads
		default:
			r.blocked = psn.Sub(r.una())-responses >= cfg.Window || r.off == 0 && r.cur > 0 && r.outOfCredit(s)
		}
		if r.blocked {
			break
		}
		switch s.Verb {
		case VerbRead:
			skip := r.off * cfg.PathMTU
			size := min(s.size-skip, count*cfg.PathMTU)
			h, _ := r.q.packet(out, OpReadRequest, psn, 0, true)
			h.RETH().Encode(s.Addr+uint64(skip), s.RKey, uint32(size))
			requests++
			responses += count
		case VerbCompareSwap:
			h, _ := r.q.packet(out, OpCompareSwap, psn, 0, true)
			h.AtomicETH().Encode(s.Addr, s.RKey, s.SwapAdd, s.Compare)
			requests++
			responses++
		case VerbFetchAdd:
			h, _ := r.q.packet(out, OpFetchAdd, psn, 0, true)
			h.AtomicETH().Encode(s.Addr, s.RKey, s.SwapAdd, 0)
			requests++
			responses++
		default:
			r.data(out, s, psn)
		}
		r.off += count
		if end := psn.Add(count); r.sent.Before(end) {
			r.sent = end
		} else {
			r.q.e.counters.Retries++
		}
		if r.off == s.n {
			r.cur, r.off = r.cur+1, 0
		}
		if r.timeout == 0 {
			r.timeout = now + cfg.AckTimeout
		}
	}
}

// ackEvery is after how many packets of a long message an acknowledgement is asked for, so that the window moves on.
const ackEvery = 16

// data adds a SEND or WRITE packet.
func (r *requester) data(out *outbox, s *sendRequest, psn PSN) {
	mtu := r.q.cfg.PathMTU
	first, last := r.off == 0, r.off == s.n-1
	var op Opcode
	switch {
	case first && last:
		op = OpSendOnly
	case first:
		op = OpSendFirst
	case last:
		op = OpSendLast
	default:
		op = OpSendMiddle
	}
	if s.Verb == VerbWrite {
		op += OpWriteFirst - OpSendFirst
	}
	if last && s.HasImm {
		op++ // the row with immediate data follows the one without
	}
	part := s.Buf[r.off*mtu : min((r.off+1)*mtu, len(s.Buf))]
	full := psn.Sub(r.una()) == r.q.cfg.Window-1
	h, body := r.q.packet(out, op, psn, len(part), last || full || r.off%ackEvery == ackEvery-1)
	copy(body, part)
	if opcodes[op].ext&hasRETH != 0 {
		h.RETH().Encode(s.Addr, s.RKey, uint32(len(s.Buf)))
	}
	if opcodes[op].ext&hasImmDt != 0 {
		h.ImmDt().Encode(s.Imm)
	}
}

// outOfCredit reports whether a message that consumes a receive must wait until the peer announces more. One may always
// be under way without, so that the announcement comes.
func (r *requester) outOfCredit(s *sendRequest) bool {
	return r.credited && (s.Verb == VerbSend || s.HasImm) && PSN(s.ssn).Sub(PSN(r.limit)) > 0
}

// credit takes in the credits of an acknowledgement.
func (r *requester) credit(h AETH) {
	if c := h.Syndrome().credits(); c >= 0 {
		if limit := PSN(h.MSN()).Add(c); !r.credited || limit.Sub(PSN(r.limit)) > 0 {
			r.credited, r.limit, r.blocked = true, uint32(limit), false
		}
	}
}

// receive takes an answer.
func (r *requester) receive(now time.Duration, in *inbound) {
	psn := in.bth.PSN()
	if in.op.ext&hasAETH != 0 && in.bth.AETH().Syndrome().IsAck() {
		r.credit(in.bth.AETH())
	}
	if r.sq.n == 0 || psn.Before(r.una()) || !psn.Before(r.sent) {
		r.q.e.counters.StaleResponse++
		return
	}
	if in.op.kind != kindAck {
		if in.op.ext&hasAETH != 0 && !in.bth.AETH().Syndrome().IsAck() {
			r.q.e.counters.BadResponse++
			return
		}
		r.response(now, in)
		return
	}
	s := in.bth.AETH().Syndrome()
	switch {
	case s.IsAck():
		if !r.acknowledge(now, psn.Add(1)) {
			r.goBack(now)
		}
		return
	case s.IsRNR():
		r.q.e.counters.RNRsReceived++
	case s.IsNAK():
		r.q.e.counters.NAKsReceived++
	default:
		r.q.e.counters.BadResponse++
		return
	}
	complete := r.acknowledge(now, psn)
	switch {
	case r.sq.n == 0:
	case s == NAKSequence:
		r.goBack(now)
	case s.IsRNR() && !complete:
		r.goBack(now)
	case s.IsRNR():
		if r.rnrs++; r.q.cfg.RNRRetry < 7 && r.rnrs > r.q.cfg.RNRRetry {
			r.abort(now, ErrRNRRetryExceeded)
			return
		}
		r.rewind()
		r.rnrEnd = now + s.rnrDelay()
		r.timeout = 0
	default:
		r.abort(now, &NAKError{s, r.q.num, psn})
	}
}

// acknowledge takes everything before end as received by the peer. It reports false when a READ or an atomic operation
// stands before end whose response is missing.
func (r *requester) acknowledge(now time.Duration, end PSN) bool {
	for r.sq.n > 0 {
		s := r.sq.at(0)
		covered := end.Sub(s.psn)
		switch {
		case covered <= s.done:
			return true
		case s.oneSided():
			return false
		}
		s.done = min(covered, s.n)
		r.progress(now)
		if s.done < s.n {
			return true
		}
		r.finish(0)
	}
	return true
}

// finish completes the oldest request successfully.
func (r *requester) finish(prev uint64) {
	s := r.sq.pop()
	r.cur-- // progress moved it past a request that is done
	r.q.owner.complete(r.q, Completion{ID: s.ID, Verb: s.Verb, Len: s.size, Prev: prev}, s.w, s.tag)
}

// progress notes that the peer accounted for another packet.
func (r *requester) progress(now time.Duration) {
	r.retries, r.rnrs, r.blocked = 0, 0, false
	if r.cur == 0 && r.off < r.sq.at(0).done {
		r.off = r.sq.at(0).done // an answer to what was sent before going back
		if r.off == r.sq.at(0).n {
			r.cur, r.off = 1, 0
		}
	}
	r.timeout = 0
	if r.outstanding() {
		r.timeout = now + r.q.cfg.AckTimeout
	}
}

// response takes a READ response or an atomic acknowledgement. Precondition: its PSN was sent and is not accounted for.
func (r *requester) response(now time.Duration, in *inbound) {
	psn := in.bth.PSN()
	if !r.acknowledge(now, psn) || r.sq.n == 0 {
		r.goBack(now) // one before it is missing
		return
	}
	s := r.sq.at(0)
	if psn != r.una() || (s.Verb == VerbRead) != (in.op.kind == kindReadResponse) || !s.oneSided() {
		r.q.e.counters.BadResponse++
		return
	}
	prev := uint64(0)
	if s.Verb == VerbRead {
		skip := s.done * r.q.cfg.PathMTU
		if len(in.payload) != min(r.q.cfg.PathMTU, s.size-skip) {
			r.q.e.counters.BadResponse++
			return
		}
		if s.Buf != nil {
			copy(s.Buf[skip:], in.payload)
		}
	} else {
		prev = in.bth.AtomicAckETH().Original()
	}
	s.done++
	r.progress(now)
	if s.done == s.n {
		r.finish(prev)
	}
}

// goBack starts sending anew from the oldest packet that is not accounted for, unless that was done a moment ago.
func (r *requester) goBack(now time.Duration) {
	if r.sq.n == 0 || r.una() == r.backAt && now < r.backEnd {
		return
	}
	r.backAt, r.backEnd = r.una(), now+r.q.cfg.AckTimeout/8
	r.rewind() // and leave the timer alone: going back is no progress
}

// rewind moves the place of sending to the oldest packet that is not accounted for.
func (r *requester) rewind() {
	r.cur, r.off, r.blocked = 0, r.sq.at(0).done, false
}

// expire does what is due.
func (r *requester) expire(now time.Duration) {
	if r.rnrEnd != 0 {
		if now < r.rnrEnd {
			return
		}
		r.rnrEnd = 0
	}
	if r.timeout == 0 || now < r.timeout {
		return
	}
	r.timeout = 0
	if !r.outstanding() {
		return
	}
	r.q.e.counters.Timeouts++
	if r.retries++; r.retries > r.q.cfg.RetryCount {
		r.abort(now, ErrRetryExceeded)
		return
	}
	r.backAt, r.backEnd = r.una(), now+r.q.cfg.AckTimeout/8
	r.rewind()
}

// abort fails the oldest request and with it the queue pair.
func (r *requester) abort(now time.Duration, err error) {
	s := r.sq.pop()
	r.q.owner.complete(r.q, Completion{ID: s.ID, Verb: s.Verb, Err: err}, s.w, s.tag)
	r.q.fail(now, err)
}

// flush ends all requests.
func (r *requester) flush() {
	for r.sq.n > 0 {
		s := r.sq.pop()
		r.q.owner.complete(r.q, Completion{ID: s.ID, Verb: s.Verb, Err: ErrFlushed}, s.w, s.tag)
	}
	r.cur, r.off, r.timeout, r.rnrEnd = 0, 0, 0, 0
}

// abandon lets go of the buffers of the requests of w, which itself is told nothing more.
func (r *requester) abandon(w *waiter) {
	for i := range r.sq.n {
		if s := r.sq.at(i); s.w == w {
			s.w = &waiter{}
			if s.Verb == VerbRead {
				s.Buf = nil
			} else {
				s.Buf = bytes.Clone(s.Buf) // it may have to be sent again
			}
		}
	}
}
