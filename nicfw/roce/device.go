package roce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Device is an RDMA endpoint at one address.
//
// It has no goroutine of its own. Whoever waits for something drives it: receives packets, runs the protocol and sends,
// so that a single caller needs no other thread to get its answer. A device that must also serve peers while nobody waits,
// be it only by acknowledging the messages that they send, needs Run in a goroutine.
//
// All methods are safe for concurrent use.
type Device struct {
	link  Link
	log   *slog.Logger
	start time.Time

	seat    chan struct{} // full while somebody drives
	spare   sync.Pool     // of *waiter
	callers atomic.Int64  // counts those who came to drive besides Run

	rx []Packet // of the one who drives

	mu       sync.Mutex
	eng      *engine       // guarded by mu
	tx       *outbox       // guarded by mu
	sleeping time.Duration // until when the one who drives waits for packets; 0 when it does not; guarded by mu
	err      error         // why the device is of no use any more; guarded by mu
	waiters  []*waiter     // of listeners and completion queues; guarded by mu
}

// forever is a time that never comes.
const forever = time.Duration(1<<63 - 1)

// Config are the properties of a device. Zero fields take the defaults.
type Config struct {
	Limits Limits
	Logger *slog.Logger // default: none
}

// batch is how many packets are received or sent at once.
const batch = 64

// Open makes a device over a link, which it closes in the end.
func Open(link Link, cfg Config) (*Device, error) {
	local := link.LocalAddr()
	if !local.IsValid() || local.Addr().IsUnspecified() {
		return nil, fmt.Errorf("open device: link at %v: the ICRC needs one definite address", local)
	}
	if mtuCode(link.PathMTU()) == 0 {
		return nil, fmt.Errorf("open device: path MTU %d of the link is none", link.PathMTU())
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Device{
		link: link, log: cfg.Logger, start: time.Now(), seat: make(chan struct{}, 1),
		rx: make([]Packet, batch), tx: newOutbox(),
		eng: newEngine(local, link.PathMTU(), cfg.Limits, cfg.Logger),
	}, nil
}

// now returns the time on the engine's clock, which never shows zero.
func (d *Device) now() time.Duration { return time.Since(d.start) + 1 }

// Counters returns what was received, sent and refused.
func (d *Device) Counters() Counters {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.eng.counters
}

// Link returns the link that the device was opened over.
func (d *Device) Link() Link { return d.link }

// PathMTU returns the largest payload of a packet.
func (d *Device) PathMTU() int { return d.eng.mtu }

// Close ends all queue pairs and closes the link.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if errors.Is(d.err, net.ErrClosed) {
		return nil
	}
	now := d.now()
	for _, q := range d.eng.qps {
		if q.conn != nil {
			q.conn.disconnect(now)
		}
	}
	d.flush(now)
	d.fail(fmt.Errorf("device: %w", net.ErrClosed))
	return d.link.Close()
}

// fail ends everything. Called with mu held.
func (d *Device) fail(err error) {
	if d.err != nil {
		return
	}
	d.err = err
	now := d.now()
	for _, q := range d.eng.qps {
		d.eng.closeQP(now, q, err)
	}
	d.wakeAll()
	d.link.Wake()
}

// wakeAll makes those look again who wait for a completion queue or a listener. Called with mu held.
func (d *Device) wakeAll() {
	for _, w := range d.waiters {
		w.finish()
	}
	d.waiters = d.waiters[:0]
}

// Run drives the device until ctx ends, whose error it returns, or the link fails.
func (d *Device) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, d.link.Wake)()
	for seen := int64(0); ctx.Err() == nil; {
		select {
		case d.seat <- struct{}{}:
		default:
			select {
			case d.seat <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err := d.step(nil)
		<-d.seat
		if err != nil {
			return err
		}
		// Who drives for an answer of its own is faster without us, and will come again.
		if n := d.callers.Load(); n != seen {
			seen = n
			time.Sleep(courtesy)
		}
	}
	return ctx.Err()
}

// courtesy is how long Run leaves the device to other callers.
const courtesy = 100 * time.Microsecond

// step sends what is to be sent, waits for packets or the next deadline unless w is done, and deals with them. Called
// from the seat.
func (d *Device) step(w *waiter) error {
	d.mu.Lock()
	if d.err != nil {
		defer d.mu.Unlock()
		return d.err
	}
	now := d.now()
	d.eng.advance(now)
	wait := time.Duration(-1)
	if d.flush(now) {
		wait = 0
	} else if next := d.eng.next(); next != 0 {
		wait = max(next-now, 0)
	}
	if w != nil && w.done.Load() { // a deadline did it
		d.mu.Unlock()
		return nil
	}
	d.sleeping = forever
	if wait >= 0 {
		d.sleeping = now + wait
	}
	d.mu.Unlock()

	n, err := d.link.Recv(d.rx, wait)

	d.mu.Lock()
	defer d.mu.Unlock()
	d.sleeping = 0
	if err != nil {
		d.fail(fmt.Errorf("receive: %w", err))
		return d.err
	}
	now = d.now()
	for i := range n {
		d.eng.receive(now, &d.rx[i])
	}
	d.flush(now)
	return d.err
}

// poll is step without waiting.
func (d *Device) poll() error {
	d.mu.Lock()
	d.flush(d.now())
	err := d.err
	d.mu.Unlock()
	if err != nil {
		return err
	}
	n, err := d.link.Recv(d.rx, 0)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.fail(fmt.Errorf("receive: %w", err))
		return d.err
	}
	now := d.now()
	for i := range n {
		d.eng.receive(now, &d.rx[i])
	}
	d.eng.advance(now)
	d.flush(now)
	return d.err
}

// flushRounds is how many batches are sent before the link is looked at again.
const flushRounds = 4

// flush sends what there is, up to a bound, and reports whether there is more. Called with mu held.
func (d *Device) flush(now time.Duration) bool {
	if d.err != nil {
		return false
	}
	for range flushRounds {
		if !d.eng.busy() {
			return false
		}
		d.tx.reset()
		d.eng.transmit(now, d.tx)
		if d.tx.n == 0 {
			return false
		}
		if err := d.link.Send(d.tx.packets[:d.tx.n]); err != nil {
			d.fail(fmt.Errorf("send: %w", err))
			return false
		}
	}
	return d.eng.busy()
}

// kick sends what a caller has just asked for, and wakes the one who drives if its wait has become too long. Called with
// mu held.
func (d *Device) kick(now time.Duration) {
	more := d.flush(now)
	if d.sleeping == 0 {
		return
	}
	if next := d.eng.next(); more || next != 0 && next < d.sleeping {
		d.sleeping = 0 // once is enough
		d.link.Wake()
	}
}

// waiter is a caller who waits for results.
type waiter struct {
	done atomic.Bool
	ch   chan struct{} // has room for one; filled when done becomes true; nil if nobody listens

	// guarded by the device's mu until done
	left  int          // results still to come
	out   []Completion // by tag
	queue []WorkRequest
	next  int // in queue, the first that found no room yet
	one   [1]Completion
	reqs  [1]WorkRequest
	err   error // of a connection
}

func (w *waiter) finish() {
	w.done.Store(true)
	select {
	case w.ch <- struct{}{}:
	default:
	}
}

// newWaiter returns a waiter that was used before, if there is one.
func (d *Device) newWaiter() *waiter {
	w, _ := d.spare.Get().(*waiter)
	if w == nil {
		return &waiter{ch: make(chan struct{}, 1)}
	}
	w.done.Store(false)
	select {
	case <-w.ch:
	default:
	}
	w.left, w.out, w.queue, w.next, w.err = 0, nil, nil, 0, nil
	return w
}

// await drives the device, or waits for who does, until w is done. Its error is that of ctx or of the device.
func (d *Device) await(ctx context.Context, w *waiter) error {
	if w.done.Load() {
		return nil
	}
	d.callers.Add(1)
	if ctx.Done() != nil {
		defer context.AfterFunc(ctx, d.link.Wake)()
	}
	for !w.done.Load() {
		select {
		case d.seat <- struct{}{}:
		default:
			select {
			case d.seat <- struct{}{}:
			case <-w.ch: // or a late one of its life before
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		var err error
		for err == nil && !w.done.Load() {
			if err = ctx.Err(); err == nil {
				err = d.step(w)
			}
		}
		<-d.seat
		if err != nil && !w.done.Load() {
			return err
		}
	}
	return nil
}

// NewPD makes a protection domain.
func (d *Device) NewPD() *PD { return &PD{d} }

// Register opens a window of r to the peers of the domain's queue pairs.
func (p *PD) Register(r Region, cfg MRConfig) (*MR, error) {
	m, err := newMR(p, r, cfg)
	if err != nil {
		return nil, err
	}
	d := p.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	d.eng.register(d.now(), m)
	return m, nil
}

// Revoke closes the window. When it returns, no request reads or writes through it any more; one that is in transfer is
// refused with a remote access error from its next packet on.
func (m *MR) Revoke() {
	d := m.pd.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	d.eng.revoke(m)
}

// CQ is a completion queue.
type CQ struct {
	d       *Device
	entries ring[Completion] // guarded by d.mu
	pending int              // work requests under way that will complete here; guarded by d.mu
}

// NewCQ makes a completion queue. It holds as many entries as the queue pairs that use it can have work requests.
func (d *Device) NewCQ() *CQ { return &CQ{d: d} }

// Poll moves completions into out and returns their number. It drives the device, without waiting, when nobody else does.
func (c *CQ) Poll(out []Completion) (int, error) {
	select {
	case c.d.seat <- struct{}{}:
		c.d.callers.Add(1)
		err := c.d.poll()
		<-c.d.seat
		if n := c.take(out); n > 0 {
			return n, nil
		}
		return 0, err
	default:
		return c.take(out), nil
	}
}

// take moves completions into out.
func (c *CQ) take(out []Completion) int {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	n := min(len(out), c.entries.n)
	for i := range n {
		out[i] = c.entries.pop()
	}
	return n
}

// Wait is Poll that waits for at least one completion.
func (c *CQ) Wait(ctx context.Context, out []Completion) (int, error) {
	for {
		if n := c.take(out); n > 0 || len(out) == 0 {
			return n, nil
		}
		w, err := c.d.enlist(func() bool { return c.entries.n > 0 })
		if err != nil {
			return 0, err
		}
		if err := c.d.await(ctx, w); err != nil {
			c.d.delist(w)
			return 0, err
		}
	}
}

// enlist returns a waiter that is done when something may have made ready true: at once, if it is so.
func (d *Device) enlist(ready func() bool) (*waiter, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil && !ready() {
		return nil, d.err
	}
	w := &waiter{ch: make(chan struct{}, 1)}
	if ready() {
		w.finish()
	} else {
		d.waiters = append(d.waiters, w)
	}
	return w, nil
}

func (d *Device) delist(w *waiter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, o := range d.waiters {
		if o == w {
			d.waiters = append(d.waiters[:i], d.waiters[i+1:]...)
			return
		}
	}
}
