package roce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// QP is a queue pair: one end of a reliable connection.
type QP struct {
	d    *Device
	q    *qp
	cq   *CQ
	psn  PSN
	done chan struct{} // closed when the queue pair fails or is closed
	err  error         // guarded by d.mu

	backlog []*waiter // whose requests the send queue has no room for yet, in order; guarded by d.mu
}

// NewQP makes a queue pair whose completions go to cq. Without one it takes Do and the methods built on it only.
func (d *Device) NewQP(pd *PD, cq *CQ, cfg QPConfig) (*QP, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, d.err
	}
	q := d.handle(cq)
	core, err := d.eng.addQP(pd, cfg.withDefaults(d.eng.mtu), q)
	if err != nil {
		return nil, err
	}
	q.attach(core)
	return q, nil
}

// handle makes the outer half of a queue pair. Called with mu held.
func (d *Device) handle(cq *CQ) *QP { return &QP{d: d, cq: cq, done: make(chan struct{})} }

// attach joins the two halves. Called with mu held.
func (q *QP) attach(core *qp) {
	q.q, q.psn = core, core.req.next
	if q.cq != nil {
		q.cq.entries.limit += core.cfg.SendDepth + core.cfg.RecvDepth
	}
}

// QPN returns the number by which the peer addresses the queue pair.
func (q *QP) QPN() QPN { return q.q.num }

// PSN returns the number of the first packet that the queue pair sends, which its peer must be told. It is random,
// except on connections made by connection management, where the peer chooses it.
func (q *QP) PSN() PSN { return q.psn }

// PathMTU returns the payload bytes of a full packet, which must be the same on both ends.
func (q *QP) PathMTU() int { return q.q.cfg.PathMTU }

// Peer returns the address of the other end; it is not valid before Connect.
func (q *QP) Peer() netip.Addr {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	return q.q.peer.Addr()
}

// Connect joins the queue pair with a peer that was agreed upon by other means than connection management.
func (q *QP) Connect(r Remote) error {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	now := q.d.now()
	if err := q.d.eng.connect(now, q.q, r, false); err != nil {
		return err
	}
	q.d.kick(now)
	return nil
}

// Done is closed when the queue pair has failed or was closed.
func (q *QP) Done() <-chan struct{} { return q.done }

// Err returns why the queue pair ended, or nil while it has not.
func (q *QP) Err() error {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	return q.err
}

// Close ends the connection, tells the peer if connection management made it, and flushes all work requests.
func (q *QP) Close() error {
	d := q.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if q.q.state >= qpLingering {
		return nil
	}
	now := d.now()
	if q.q.conn != nil {
		q.q.conn.disconnect(now)
	}
	d.eng.closeQP(now, q.q, ErrFlushed)
	if q.cq != nil {
		q.cq.entries.limit -= q.q.cfg.SendDepth + q.q.cfg.RecvDepth
	}
	d.kick(now)
	return nil
}

// ended implements completer. Called with mu held.
func (q *QP) ended(core *qp, cause error) {
	q.err = cause
	close(q.done)
	for _, w := range q.backlog {
		next, rest := w.next, w.queue[w.next:]
		for i := range rest { // the last result gives w away
			w.result(next+i, Completion{ID: rest[i].ID, QPN: core.num, Verb: rest[i].Verb, Err: ErrFlushed})
		}
	}
	q.backlog = nil
	q.d.log.Debug("queue pair ended", "qpn", core.num, "peer", core.peer.Addr(), "cause", cause)
	q.d.wakeAll()
}

// complete implements completer. Called with mu held.
func (q *QP) complete(core *qp, c Completion, w *waiter, tag int) {
	c.QPN = core.num
	if w == nil {
		q.cq.pending--
		q.cq.entries.push(c)
		q.d.wakeAll()
		return
	}
	if w.left == 0 {
		return // abandoned
	}
	w.result(tag, c)
	q.refill()
}

// result notes the outcome of one request. Called with mu held.
func (w *waiter) result(tag int, c Completion) {
	w.out[tag] = c
	if w.left--; w.left == 0 {
		w.finish()
	}
}

// refill posts what there is room for of the requests that wait for it. Called with mu held.
func (q *QP) refill() {
	for len(q.backlog) > 0 && q.err == nil && q.q.state != qpError {
		w := q.backlog[0]
		tag := w.next
		wr := &w.queue[tag]
		err := q.q.req.post(*wr, w, tag)
		if err == ErrQueueFull {
			return
		}
		if w.next++; w.next == len(w.queue) {
			q.backlog = append(q.backlog[:0], q.backlog[1:]...)
		}
		if err != nil { // the last result gives w away
			w.result(tag, Completion{ID: wr.ID, QPN: q.q.num, Verb: wr.Verb, Err: err})
		}
	}
}

// Post queues work requests in order and starts sending. They complete on the queue pair's CQ. If one cannot be posted,
// posted tells how many before it were.
func (q *QP) Post(wrs ...WorkRequest) (posted int, err error) {
	d := q.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := q.usable(); err != nil {
		return 0, err
	}
	if q.cq == nil {
		return 0, errNoCQ
	}
	now := d.now()
	for _, wr := range wrs {
		if q.cq.pending+q.cq.entries.n >= q.cq.entries.limit {
			err = fmt.Errorf("completion queue: %w", ErrQueueFull)
		} else {
			err = q.q.req.post(wr, nil, 0)
		}
		if err != nil {
			err = fmt.Errorf("post %v: %w", wr.Verb, err)
			break
		}
		q.cq.pending++
		posted++
	}
	d.eng.schedule(now, q.q)
	d.kick(now)
	return posted, err
}

var errNoCQ = errors.New("queue pair has no completion queue")

// usable returns why nothing can be posted. Called with mu held.
func (q *QP) usable() error {
	switch {
	case q.d.err != nil:
		return q.d.err
	case q.err != nil:
		return fmt.Errorf("queue pair %v: %w", q.q.num, q.err)
	case q.q.state != qpReadyToSend && q.q.state != qpReadyToReceive:
		return fmt.Errorf("queue pair %v: %w", q.q.num, ErrNotConnected)
	}
	return nil
}

// PostRecv queues a buffer for an incoming SEND, or for the immediate data of an incoming WRITE. It may be called before
// the queue pair is connected.
func (q *QP) PostRecv(id uint64, buf []byte) error {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	switch {
	case q.err != nil:
		return fmt.Errorf("queue pair %v: %w", q.q.num, q.err)
	case q.cq == nil:
		return errNoCQ
	case q.cq.pending+q.cq.entries.n >= q.cq.entries.limit:
		return fmt.Errorf("completion queue: %w", ErrQueueFull)
	}
	if err := q.q.resp.post(recvRequest{id: id, buf: buf}); err != nil {
		return fmt.Errorf("post RECV: %w", err)
	}
	q.cq.pending++
	return nil
}

// Do posts work requests, however many, waits for all of them, and fills out, which must be as long as wrs. The error is
// that of the first which failed. It is unlike Post and Poll in that no completion queue is involved; both ways may be
// mixed.
//
// If ctx ends first, the requests go on without their buffers, which are the caller's again; what a WRITE or an atomic
// operation did to the peer's memory is then unknown.
func (q *QP) Do(ctx context.Context, wrs []WorkRequest, out []Completion) error {
	if len(wrs) == 0 {
		return nil
	}
	w := q.d.newWaiter()
	w.left, w.out, w.queue = len(wrs), out[:len(wrs)], wrs
	reuse, err := q.do(ctx, w)
	if reuse {
		q.d.spare.Put(w)
	}
	return err
}

// do runs the requests of w. It reports whether w may be used again: not if somebody may still look at it.
func (q *QP) do(ctx context.Context, w *waiter) (reuse bool, err error) {
	d := q.d
	d.mu.Lock()
	if err := q.usable(); err != nil {
		d.mu.Unlock()
		return true, err
	}
	now := d.now()
	q.backlog = append(q.backlog, w)
	q.refill()
	d.eng.schedule(now, q.q)
	d.kick(now)
	d.mu.Unlock()
	if err := d.await(ctx, w); err != nil {
		d.mu.Lock()
		abandoned := !w.done.Load() // it may have ended meanwhile
		if abandoned {
			w.left = 0
			q.backlog = slices.DeleteFunc(q.backlog, func(o *waiter) bool { return o == w })
			q.q.req.abandon(w)
		}
		d.mu.Unlock()
		if abandoned {
			return false, err
		}
	}
	for i := range w.out {
		if c := &w.out[i]; c.Err != nil {
			return true, fmt.Errorf("%v of %v: %w", c.Verb, q.Peer(), c.Err)
		}
	}
	return true, nil
}

// single runs one request and returns its completion.
func (q *QP) single(ctx context.Context, wr WorkRequest) (Completion, error) {
	w := q.d.newWaiter()
	w.reqs[0] = wr
	w.left, w.out, w.queue = 1, w.one[:], w.reqs[:]
	reuse, err := q.do(ctx, w)
	c := w.one[0]
	if reuse {
		q.d.spare.Put(w)
	}
	return c, err
}

// Read fills buf from the peer's memory at va.
func (q *QP) Read(ctx context.Context, buf []byte, va uint64, key RKey) error {
	_, err := q.single(ctx, WorkRequest{Verb: VerbRead, Buf: buf, Addr: va, RKey: key})
	return err
}

// Write stores buf in the peer's memory at va.
func (q *QP) Write(ctx context.Context, buf []byte, va uint64, key RKey) error {
	_, err := q.single(ctx, WorkRequest{Verb: VerbWrite, Buf: buf, Addr: va, RKey: key})
	return err
}

// CompareAndSwap stores new in the peer's word at va if it holds old, and returns what it held.
func (q *QP) CompareAndSwap(ctx context.Context, va uint64, key RKey, old, new uint64) (prev uint64, err error) {
	c, err := q.single(ctx, WorkRequest{Verb: VerbCompareSwap, Addr: va, RKey: key, Compare: old, SwapAdd: new})
	return c.Prev, err
}

// FetchAdd adds to the peer's word at va and returns what it held.
func (q *QP) FetchAdd(ctx context.Context, va uint64, key RKey, add uint64) (prev uint64, err error) {
	c, err := q.single(ctx, WorkRequest{Verb: VerbFetchAdd, Addr: va, RKey: key, SwapAdd: add})
	return c.Prev, err
}

// Send sends a message into a receive that the peer has posted.
func (q *QP) Send(ctx context.Context, buf []byte) error {
	_, err := q.single(ctx, WorkRequest{Verb: VerbSend, Buf: buf})
	return err
}

// Recv waits for a message and returns its length in buf.
func (q *QP) Recv(ctx context.Context, buf []byte) (Completion, error) {
	d := q.d
	w := d.newWaiter()
	w.left, w.out = 1, w.one[:]
	d.mu.Lock()
	err := q.err
	if err == nil {
		err = q.q.resp.post(recvRequest{buf: buf, w: w})
	}
	d.mu.Unlock()
	if err != nil {
		return Completion{}, fmt.Errorf("receive: %w", err)
	}
	if err := d.await(ctx, w); err != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		if !w.done.Load() {
			w.left = 0
			q.q.resp.abandon(w)
			return Completion{}, err
		}
	}
	c := w.one[0]
	d.spare.Put(w)
	return c, c.Err
}

// Listener takes connection requests for one service.
type Listener struct {
	d *Device
	l *listener
}

// Listen starts to take connection requests for a service: ServiceTCP(port) is what librdmacm clients connect to.
func (d *Device) Listen(service ServiceID) (*Listener, error) {
	l := &Listener{d: d, l: &listener{service: service}}
	l.l.owner = l
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, d.err
	}
	if err := d.eng.cm.listen(l.l); err != nil {
		return nil, err
	}
	return l, nil
}

// Allow sets who may ask for a connection: what f, which gets the peer's address and its 56 bytes of private data, such as a
// token, does not allow is refused before anything is kept of it. f is called with the Device's lock held and must be
// quick, and call no method of the Device.
func (l *Listener) Allow(f func(peer netip.Addr, private []byte) bool) {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	l.l.allow = f
}

// arrived implements the owner of a listener. Called with mu held.
func (l *Listener) arrived() { l.d.wakeAll() }

// Close stops listening and refuses those who wait.
func (l *Listener) Close() error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	now := l.d.now()
	l.d.eng.cm.unlisten(now, l.l)
	l.d.kick(now)
	l.d.wakeAll()
	return nil
}

// ConnRequest is a peer that asks for a connection. It waits a minute for Accept or Reject.
type ConnRequest struct {
	l *Listener
	c *conn
}

// Accept waits for a connection request. Nothing about it is authenticated but that answers reach the peer's address
// once the connection is established.
func (l *Listener) Accept(ctx context.Context) (*ConnRequest, error) {
	d := l.d
	for {
		d.mu.Lock()
		closed := d.eng.cm.listeners[l.l.service] != l.l
		if len(l.l.backlog) > 0 {
			c := l.l.backlog[0]
			l.l.backlog = append(l.l.backlog[:0], l.l.backlog[1:]...)
			d.mu.Unlock()
			return &ConnRequest{l, c}, nil
		}
		d.mu.Unlock()
		if closed {
			return nil, fmt.Errorf("accept: %w", ErrNotConnected)
		}
		w, err := d.enlist(func() bool {
			return len(l.l.backlog) > 0 || d.eng.cm.listeners[l.l.service] != l.l
		})
		if err != nil {
			return nil, err
		}
		if err := d.await(ctx, w); err != nil {
			d.delist(w)
			return nil, err
		}
	}
}

// Peer returns the address that the request came from.
func (r *ConnRequest) Peer() netip.Addr { return r.c.peer }

// Private returns what the peer's application sent along, 56 bytes with trailing zeroes.
func (r *ConnRequest) Private() []byte { return r.c.req.Private[ipCMLen:] }

// PathMTU returns the payload bytes of a full packet that the peer asks for.
func (r *ConnRequest) PathMTU() int { return mtuOf(r.c.req.MTU) }

// Accept makes the connection's queue pair and answers the peer. Receives can be posted at once; what is sent waits for
// the peer's confirmation. If that never comes, the queue pair fails.
func (r *ConnRequest) Accept(pd *PD, cq *CQ, cfg QPConfig, private []byte) (*QP, error) {
	d := r.l.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, d.err
	}
	now := d.now()
	q := d.handle(cq)
	core, err := r.c.accept(now, pd, cfg, private, q, nil)
	if err == nil {
		q.attach(core)
	}
	d.kick(now)
	if err != nil {
		return nil, fmt.Errorf("accept connection of %v: %w", r.c.peer, err)
	}
	return q, nil
}

// Reject refuses the request.
func (r *ConnRequest) Reject(private []byte) {
	d := r.l.d
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	r.c.reject(now, RejectConsumer, private[:min(len(private), MaxREJPrivate)])
	d.kick(now)
}

// Dial connects to a service and returns the queue pair with what the peer's application sent along. The error wraps a
// *RejectError if the peer refused.
func (d *Device) Dial(ctx context.Context, addr netip.Addr, service ServiceID, pd *PD, cq *CQ, cfg QPConfig, private []byte) (*QP, []byte, error) {
	q, err := d.NewQP(pd, cq, cfg)
	if err != nil {
		return nil, nil, err
	}
	w := d.newWaiter()
	d.mu.Lock()
	now := d.now()
	c, err := d.eng.cm.dial(now, addr, service, q.q, private, dialer{w})
	d.kick(now)
	d.mu.Unlock()
	if err == nil {
		if err = d.await(ctx, w); err == nil {
			err = w.err
		}
	}
	if err != nil {
		q.Close()
		return nil, nil, fmt.Errorf("connect to service %#x of %v: %w", uint64(service), addr, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	q.psn = q.q.req.next
	return q, c.private, nil
}

// dialer is who waits in Dial.
type dialer struct{ w *waiter }

func (o dialer) connected(_ *conn, err error) {
	o.w.err = err
	o.w.finish()
}
