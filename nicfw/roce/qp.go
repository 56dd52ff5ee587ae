package roce

import (
	"net/netip"
	"time"
)

// qpState is the state of a queue pair (IBA section 10.3.1), without those that are passed through at once here.
type qpState uint8

const (
	qpInit           qpState = iota // receives may be posted; packets are dropped
	qpReadyToReceive                // answers its peer; sends nothing of its own
	qpReadyToSend
	qpError     // everything is flushed; what was still to be answered, and the refusal, goes out
	qpLingering // closed by its owner, and known yet to repeat the refusal that ended it
	qpClosed    // unknown to the engine
)

// completer is told what happens to a queue pair; the Device implements it.
type completer interface {
	complete(q *qp, c Completion, w *waiter, tag int)
	ended(q *qp, cause error)
}

// burst is how many packets one queue pair may send before it is another's turn and the link is looked at.
const burst = 32

// qp is one end of a reliable connection: a requester and a responder that share a peer.
type qp struct {
	e       *engine
	num     QPN
	state   qpState
	pd      *PD
	cfg     QPConfig
	peer    netip.AddrPort
	remote  QPN
	account *peer
	owner   completer
	heard   time.Duration // when the last packet came
	until   time.Duration // how long it lingers
	conn    *conn         // that connection management keeps for it, if any

	req  requester
	resp responder

	timer            timer
	queued           bool // in the run queue
	runPrev, runNext *qp
}

func newQP(e *engine, pd *PD, cfg QPConfig, owner completer) *qp {
	q := &qp{e: e, pd: pd, cfg: cfg, owner: owner}
	q.timer.owner = q
	q.req.init(q, PSN(random32()&psnMask))
	q.resp.init(q)
	return q
}

// receive takes a packet that is for q and comes from its peer.
func (q *qp) receive(now time.Duration, in *inbound) {
	q.heard = now
	if q.state == qpReadyToReceive {
		q.state = qpReadyToSend // the peer's first packet says as much as its RTU
		if q.conn != nil {
			q.conn.established()
		}
	}
	switch in.op.kind {
	case kindSend, kindWrite, kindRead, kindAtomic:
		q.resp.receive(now, in)
	case kindReadResponse, kindAck, kindAtomicAck:
		if q.state == qpReadyToSend {
			q.req.receive(now, in)
		} else {
			q.e.counters.BadState++
		}
	case kindCongestion:
		q.e.counters.Congestion++
		q.resp.slowDown(now, q.resp.markPSN)
	}
}

// transmit adds to out what q may send now, at most a burst.
func (q *qp) transmit(now time.Duration, out *outbox) {
	out.limit = min(out.n+burst, len(out.packets))
	q.resp.transmit(now, out)
	if q.state == qpReadyToSend && !out.full() {
		q.req.transmit(now, out)
	}
	out.limit = len(out.packets)
}

// wantsToSend reports whether transmit would add something.
func (q *qp) wantsToSend(now time.Duration) bool {
	return q.resp.wantsToSend(now) || q.state == qpReadyToSend && q.req.wantsToSend(now)
}

// deadline returns when expire is to be called, or 0.
func (q *qp) deadline() time.Duration {
	if q.state == qpLingering {
		return q.until
	}
	at := q.resp.deadline()
	if q.state == qpReadyToSend {
		at = earlier(at, q.req.deadline())
	}
	if q.cfg.IdleTimeout > 0 && (q.state == qpReadyToSend || q.state == qpReadyToReceive) {
		at = earlier(at, q.heard+q.cfg.IdleTimeout)
	}
	return at
}

// earlier returns the smaller of two deadlines of which 0 means none.
func earlier(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// expire does what is due.
func (q *qp) expire(now time.Duration) {
	switch {
	case q.state == qpClosed:
		return
	case q.state == qpLingering && now >= q.until:
		q.e.forget(q)
		return
	}
	if q.cfg.IdleTimeout > 0 && now >= q.heard+q.cfg.IdleTimeout && (q.state == qpReadyToSend || q.state == qpReadyToReceive) {
		q.fail(now, ErrIdle)
	}
	if q.state == qpReadyToSend {
		q.req.expire(now)
	}
	q.e.schedule(now, q)
}

// How long a queue pair lingers at the least and at the most.
const (
	minLinger = timeWait
	maxLinger = 20 * time.Second
)

// linger returns how long the peer may go on asking before it has heard a refusal: some of its timeouts, for each repetition can
// get lost, too.
func (q *qp) linger() time.Duration {
	timeout := q.cfg.AckTimeout
	if q.conn != nil && q.conn.passive {
		timeout = ackTimeout(q.conn.req.Primary.AckTimeout)
	}
	return min(max(8*timeout, minLinger), maxLinger)
}

// fail moves q into the error state and flushes its queues. Only the first cause counts.
func (q *qp) fail(now time.Duration, cause error) {
	if q.state >= qpError {
		return
	}
	q.state = qpError
	q.req.flush()
	q.resp.flush()
	q.owner.ended(q, cause)
}

// packet starts a packet of q: its BTH is written, its extended headers and its payload are not.
func (q *qp) packet(out *outbox, op Opcode, psn PSN, payload int, ackReq bool) (h BTH, body []byte) {
	n := opcodes[op].hdrLen
	pad := -payload & 3
	p := out.next(q.peer, int(n)+payload+pad)
	h = BTH(p.Data[:n])
	h.Encode(&BTHFields{Opcode: op, Migrated: true, Pad: uint8(pad), PKey: defaultPKey, DestQP: q.remote, AckReq: ackReq, PSN: psn})
	clear(p.Data[int(n)+payload:])
	return h, p.Data[n : int(n)+payload]
}
