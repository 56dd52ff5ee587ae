// Package remote is a host's memory behind an agent that exports it by RDMA: a hostmem.Memory over a roce queue pair.
//
// An address is a host physical address on both sides. Scattered reads are pipelined, as deep as the queue pair allows. When the
// connection fails, the next access makes another one; a read that the failure cut off is done again, a store is not, for nobody
// knows whether it took place.
package remote

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// Window is a connected queue pair with the key to a part of the host's memory.
type Window struct {
	QP           *roce.QP
	RKey         roce.RKey
	Addr, Length uint64          // the physical addresses that the key is for
	RAM          []hostmem.Range // what the agent says is RAM
	// Write and Atomic are what the key allows beside reading.
	Write, Atomic bool
}

// Options are how patient a Memory is. Zero fields take the defaults.
type Options struct {
	Timeout time.Duration // of one access, with connecting anew; default 10 s
	// Retry is how long after an attempt to connect that failed the next one is made; until then accesses fail at once. Default 1 s.
	Retry time.Duration
}

// Memory is remote host memory. It implements hostmem.Memory and hostmem.ScatterReader, and the abilities that its first window
// had.
type Memory struct {
	connect       func(context.Context) (Window, error)
	o             Options
	ram           []hostmem.Range
	write, atomic bool
	ctx           context.Context // ends with Close
	stop          context.CancelFunc

	mu     sync.Mutex // held while connecting: one attempt for all who wait
	now    *Window    // guarded by mu; nil if the latest one was given up
	failed time.Time  // when connecting failed; guarded by mu
	why    error      // guarded by mu
}

var (
	_ hostmem.Memory        = (*Memory)(nil)
	_ hostmem.ScatterReader = (*Memory)(nil)
)

// Open connects, by calling connect, which is called again whenever the connection has failed. The RAM map and the abilities are
// those of the first window.
func Open(ctx context.Context, connect func(context.Context) (Window, error), o Options) (*Memory, error) {
	if o.Timeout <= 0 {
		o.Timeout = 10 * time.Second
	}
	if o.Retry <= 0 {
		o.Retry = time.Second
	}
	w, err := connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("open remote memory: %w", err)
	}
	m := &Memory{connect: connect, o: o, now: &w, write: w.Write, atomic: w.Atomic}
	m.ram = hostmem.Intersect(w.RAM, []hostmem.Range{{Start: hostmem.PhysAddr(w.Addr), Size: w.Length}})
	if len(m.ram) == 0 {
		w.QP.Close()
		return nil, errors.New("open remote memory: the window has no RAM")
	}
	m.ctx, m.stop = context.WithCancel(context.Background())
	return m, nil
}

// Map implements hostmem.Memory.
func (m *Memory) Map() []hostmem.Range { return m.ram }

// Close implements hostmem.Memory.
func (m *Memory) Close() error {
	m.stop()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.now == nil {
		return nil
	}
	w := m.now
	m.now = nil
	return w.QP.Close()
}

// window returns the connection, or makes one. bad is the one that has just failed, or nil.
func (m *Memory) window(ctx context.Context, bad *Window) (*Window, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return nil, errClosed
	}
	if m.now != nil && m.now != bad && m.now.QP.Err() == nil {
		return m.now, nil
	}
	if m.now != nil {
		m.now.QP.Close()
		m.now = nil
	}
	if time.Since(m.failed) < m.o.Retry {
		return nil, m.why
	}
	w, err := m.connect(ctx)
	if err != nil {
		m.failed, m.why = time.Now(), fmt.Errorf("connect anew: %w: %w", err, hostmem.ErrLinkDown)
		return nil, m.why
	}
	m.now = &w
	return m.now, nil
}

var errClosed = fmt.Errorf("remote memory is closed: %w", hostmem.ErrLinkDown)

// tries is how often a read is begun: once more after its connection failed.
const tries = 2

// patience returns the context of one access.
func (m *Memory) patience() (context.Context, context.CancelFunc) {
	return context.WithTimeout(m.ctx, m.o.Timeout)
}

// ReadAt implements hostmem.Memory.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	s := []hostmem.Segment{{Addr: hostmem.PhysAddr(off), Buf: p}}
	if err := m.ReadScatter(s); err != nil {
		f := err.(*hostmem.FaultError)
		return len(p) - f.Len, f
	}
	return len(p), nil
}

// ReadScatter implements hostmem.ScatterReader.
func (m *Memory) ReadScatter(segs []hostmem.Segment) error {
	if len(segs) == 0 {
		return nil
	}
	// What is not RAM here is not asked for: the agent would refuse it and end the connection.
	type part struct {
		seg  int
		can  int
		hole *hostmem.FaultError
	}
	parts := make([]part, len(segs))
	wrs := make([]roce.WorkRequest, 0, len(segs))
	for i := range segs {
		can, hole := hostmem.Mapped(m.ram, "read", int64(segs[i].Addr), len(segs[i].Buf))
		parts[i] = part{i, can, hole}
		segs[i].Err = nil
		if hole != nil {
			segs[i].Err = hole
		}
		if can > 0 {
			wrs = append(wrs, roce.WorkRequest{ID: uint64(i), Verb: roce.VerbRead, Buf: segs[i].Buf[:can], Addr: uint64(segs[i].Addr)})
		}
	}
	ctx, cancel := m.patience()
	defer cancel()
	fail := func(id uint64, why error) {
		s := &segs[id]
		s.Err = &hostmem.FaultError{Op: "read", Addr: s.Addr, Len: len(s.Buf), Err: cause(why)}
	}
	var bad *Window
	for try := 1; len(wrs) > 0; try++ {
		w, err := m.window(ctx, bad)
		if err != nil {
			for _, wr := range wrs {
				fail(wr.ID, err)
			}
			break
		}
		for i := range wrs {
			wrs[i].RKey = w.RKey
		}
		out := make([]roce.Completion, len(wrs))
		err = w.QP.Do(ctx, wrs, out)
		if err == nil {
			break
		}
		var left []roce.WorkRequest
		refused := false
		for i, c := range out {
			switch {
			case c.Err == nil && c.Verb == roce.VerbRead:
				continue // this one was done
			case isRefusal(c.Err) && try == tries:
				fail(wrs[i].ID, c.Err) // it is this one that the agent does not let through
				refused = true
				continue
			}
			left = append(left, wrs[i])
		}
		wrs, bad = left, w
		if try >= tries && !refused || ctx.Err() != nil {
			for _, wr := range wrs {
				fail(wr.ID, err)
			}
			break
		}
		if refused {
			try-- // each further round fails at least one, so there is an end
		}
	}
	for i := range segs {
		if segs[i].Err != nil {
			return segs[i].Err
		}
	}
	return nil
}

// isRefusal reports whether the agent refused this very request, rather than the connection having failed.
func isRefusal(err error) bool {
	var nak *roce.NAKError
	return errors.As(err, &nak)
}

// cause says of an error of the network what it means for the memory.
func cause(err error) error {
	switch {
	case errors.Is(err, hostmem.ErrLinkDown), errors.Is(err, hostmem.ErrTimeout), isRefusal(err):
		return err
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", err, hostmem.ErrTimeout)
	}
	return fmt.Errorf("%w: %w", err, hostmem.ErrLinkDown)
}

// Writer returns the memory if its window may be stored to.
func (m *Memory) Writer() (hostmem.Writer, bool) { return m, m.write }

// Swapper returns the memory if its window takes atomic operations.
func (m *Memory) Swapper() (hostmem.Swapper, bool) { return m, m.atomic }

// WriteAt implements hostmem.Writer. After a failure nobody knows how much was stored.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if _, fault := hostmem.Mapped(m.ram, "write", off, len(p)); fault != nil {
		return 0, fault
	}
	fault := func(err error) error {
		return &hostmem.FaultError{Op: "write", Addr: hostmem.PhysAddr(off), Len: len(p), Err: err}
	}
	switch {
	case len(p) == 0:
		return 0, nil
	case !m.write:
		return 0, fault(hostmem.ErrReadOnly)
	}
	ctx, cancel := m.patience()
	defer cancel()
	w, err := m.window(ctx, nil)
	if err == nil {
		err = w.QP.Write(ctx, p, uint64(off), w.RKey)
	}
	if err != nil {
		return 0, fault(cause(err))
	}
	return len(p), nil
}

// CompareAndSwap implements hostmem.Swapper. After a failure nobody knows whether it took place.
func (m *Memory) CompareAndSwap(pa hostmem.PhysAddr, old, new uint64) (uint64, error) {
	fault := func(err error) error { return &hostmem.FaultError{Op: "compare-and-swap", Addr: pa, Len: 8, Err: err} }
	if pa%8 != 0 {
		return 0, fault(hostmem.ErrUnaligned)
	}
	if _, f := hostmem.Mapped(m.ram, "compare-and-swap", int64(pa), 8); f != nil {
		return 0, &hostmem.FaultError{Op: f.Op, Addr: pa, Len: 8, Err: f.Err}
	}
	if !m.atomic {
		return 0, fault(hostmem.ErrReadOnly)
	}
	ctx, cancel := m.patience()
	defer cancel()
	w, err := m.window(ctx, nil)
	var prev uint64
	if err == nil {
		prev, err = w.QP.CompareAndSwap(ctx, uint64(pa), w.RKey, old, new)
	}
	if err != nil {
		return 0, fault(cause(err))
	}
	return prev, nil
}
