package hostmem

import (
	"cmp"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrAborted means that the host's side refused a burst: an unsupported request or a completer abort, as an IOMMU answers.
var ErrAborted = errors.New("host aborted the transfer")

// Outcome is what becomes of one burst of an Engine.
type Outcome int

const (
	Completes Outcome = iota // as it should
	NeverEnds                // no completion: times out; a write may have arrived all the same
	Aborts                   // refused by the host's side: ErrAborted, nothing transferred
	LosesLink                // the link goes down under it, and stays so until SetLink
)

// EngineOptions describe a DMA engine. The zero value is a plausible one.
type EngineOptions struct {
	// Depth is how many bursts can be under way; more wait in the queue. 0 means 32.
	Depth int
	// MinLatency and MaxLatency bound the time of one burst, drawn evenly. Both 0 mean 20 and 200 µs.
	MinLatency, MaxLatency time.Duration
	// Timeout is when a burst without completion is given up. 0 means 50 ms, the longest of the default range of PCI Express
	// (Device Control 2 register, Completion Timeout Value).
	Timeout time.Duration
	// Seed makes the latencies repeatable.
	Seed uint64
	// Sleep, if not nil, passes the time: time.Sleep under testing/synctest. nil means to wait as precisely as the system
	// allows; Go's own timers round up to 1 ms when a program is idle (runtime/netpoll_epoll.go), far more than a burst.
	Sleep func(time.Duration)
	// Outcome, if not nil, decides what becomes of each burst, in the order of submission, one at a time.
	Outcome func(op string, r Range) Outcome
}

// EngineStats counts what an Engine did.
type EngineStats struct {
	Bursts   uint64        `json:"bursts"`
	Bytes    uint64        `json:"bytes"` // submitted
	Failed   uint64        `json:"failed"`
	Transfer time.Duration `json:"transfer"` // sum of the bursts' latencies
}

// Engine is a DMA engine in front of a memory: a model of the hardware and the driver for it, in real time.
//
// Accesses are cut at 4 KiB boundaries into bursts, which queue for one of Depth slots and take their latency there.
// Reads complete in any order; writes complete in order, and the first that fails ends its WriteAt. There is no
// compare-and-swap, whatever the memory can do. While the link is down reads bring all-ones and writes vanish: the driver
// then looks at the link's status, and fails with ErrLinkDown instead of handing out such bytes.
type Engine struct {
	mem      Memory
	o        EngineOptions
	canStore bool
	w        Writer

	mu    sync.Mutex
	rng   *rand.Rand
	slots []time.Time // when each slot is free
	down  bool        // the link
	drops uint64      // how often the link went down: the sticky bit of the link's status
	stats EngineStats
}

// NewEngine returns an engine that transfers from and to mem.
func NewEngine(mem Memory, o EngineOptions) *Engine {
	if o.MinLatency == 0 && o.MaxLatency == 0 {
		o.MinLatency, o.MaxLatency = 20*time.Microsecond, 200*time.Microsecond
	}
	o.MaxLatency = max(o.MinLatency, o.MaxLatency)
	o.Timeout = cmp.Or(o.Timeout, 50*time.Millisecond)
	o.Depth = max(cmp.Or(o.Depth, 32), 1)
	if o.Sleep == nil {
		o.Sleep = sleepPrecisely
	}
	e := &Engine{mem: mem, o: o, rng: rand.New(rand.NewPCG(o.Seed, 0)), slots: make([]time.Time, o.Depth)}
	e.w, e.canStore = AsWriter(mem)
	return e
}

// burst is one descriptor in the queue.
type burst struct {
	op      string
	addr    PhysAddr
	buf     []byte
	outcome Outcome
	arrives bool      // whether a write that never ends is stored
	done    time.Time // when it completes or is given up
	drops   uint64    // Engine.drops at submission
	err     error
}

// split appends the bursts of an access.
func split(q []*burst, op string, pa PhysAddr, p []byte) []*burst {
	for len(p) > 0 {
		n := min(len(p), PageSize-int(pa%PageSize))
		q = append(q, &burst{op: op, addr: pa, buf: p[:n]})
		p, pa = p[n:], pa+PhysAddr(n)
	}
	return q
}

// submit queues the bursts: each gets the slot that is free first.
func (e *Engine) submit(q []*burst) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	var last time.Time // completion of the write before
	for _, b := range q {
		if e.o.Outcome != nil {
			b.outcome = e.o.Outcome(b.op, Range{b.addr, uint64(len(b.buf))})
		}
		latency := e.o.MinLatency + time.Duration(e.rng.Int64N(int64(e.o.MaxLatency-e.o.MinLatency)+1))
		if b.outcome == NeverEnds {
			latency = e.o.Timeout
			b.arrives = e.rng.IntN(2) == 0
		}
		slot := 0
		for i, t := range e.slots {
			if t.Before(e.slots[slot]) {
				slot = i
			}
		}
		start := now
		if e.slots[slot].After(start) {
			start = e.slots[slot]
		}
		b.done, b.drops = start.Add(latency), e.drops
		if b.op == opWrite && b.done.Before(last) {
			b.done = last
		}
		e.slots[slot], last = b.done, b.done
		e.stats.Bursts++
		e.stats.Bytes += uint64(len(b.buf))
		e.stats.Transfer += latency
	}
}

// complete waits until b is done and sets its error.
func (e *Engine) complete(b *burst) {
	if d := time.Until(b.done); d > 0 {
		e.o.Sleep(d)
	}
	if e.transfer(b); b.err == nil && (b.op == opWrite || allOnes(b.buf)) && e.dropped(b) {
		b.err = ErrLinkDown
	}
	if b.err != nil {
		e.mu.Lock()
		e.stats.Failed++
		e.mu.Unlock()
	}
}

// sleepPrecisely sleeps in the kernel for most of d and polls for the rest, as a driver does for its completions: a thread
// sleeps up to 50 µs too long by default (prctl(2), PR_SET_TIMERSLACK).
func sleepPrecisely(d time.Duration) {
	const slack = 60 * time.Microsecond
	end := time.Now().Add(d)
	if d > slack {
		ts := unix.NsecToTimespec(int64(d - slack))
		_ = unix.Nanosleep(&ts, nil) // interrupted: polls longer
	}
	for time.Now().Before(end) {
		runtime.Gosched()
	}
}

// transfer is the hardware: it moves the bytes of one burst.
func (e *Engine) transfer(b *burst) {
	switch b.outcome {
	case NeverEnds:
		if b.op == opWrite && b.arrives && !e.dropped(b) {
			_, _ = e.w.WriteAt(b.buf, int64(b.addr))
		}
		b.err = ErrTimeout
		return
	case Aborts:
		b.err = ErrAborted
		return
	case LosesLink:
		e.SetLink(false)
	}
	switch {
	case e.dropped(b) && b.op == opRead:
		for i := range b.buf {
			b.buf[i] = 0xff
		}
	case e.dropped(b): // posted into nowhere
	case b.op == opRead:
		_, b.err = e.mem.ReadAt(b.buf, int64(b.addr))
	default:
		_, b.err = e.w.WriteAt(b.buf, int64(b.addr))
	}
}

// dropped reads the link's status: whether it is down, or was since b was submitted.
func (e *Engine) dropped(b *burst) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.down || e.drops != b.drops
}

// SetLink brings the link up or down.
func (e *Engine) SetLink(up bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !up && !e.down {
		e.drops++
	}
	e.down = !up
}

// Stats returns the counts so far.
func (e *Engine) Stats() EngineStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stats
}

// fault returns the fault of a burst within an access of which rest bytes follow the burst's end.
func (b *burst) fault(rest int) *FaultError {
	f := &FaultError{Op: b.op, Addr: b.addr, Len: len(b.buf), Err: b.err}
	if inner, ok := errors.AsType[*FaultError](b.err); ok {
		f = &FaultError{Op: b.op, Addr: inner.Addr, Len: inner.Len, Err: inner.Err}
	}
	f.Len += rest
	return f
}

// Map implements Memory.
func (e *Engine) Map() []Range { return e.mem.Map() }

// Resident implements Resident.
func (e *Engine) Resident() []Range { return ResidentRanges(e.mem) }

// VMCOREINFO implements NoteHolder.
func (e *Engine) VMCOREINFO() []byte { return VMCOREINFO(e.mem) }

// Close implements Memory.
func (e *Engine) Close() error { return e.mem.Close() }

// ReadAt implements Memory. The bursts of one read are under way together.
func (e *Engine) ReadAt(p []byte, off int64) (int, error) {
	s := []Segment{{Addr: PhysAddr(off), Buf: p}}
	if err := e.ReadScatter(s); err != nil {
		f, ok := errors.AsType[*FaultError](err)
		if !ok {
			return 0, err
		}
		return len(p) - f.Len, f
	}
	return len(p), nil
}

// ReadScatter implements ScatterReader: the bursts of all segments are under way together, up to the depth of the queue.
// What is not RAM is never put on the link.
func (e *Engine) ReadScatter(segs []Segment) error {
	var q []*burst
	first := make([]int, len(segs)+1) // of each segment, its first burst
	faults := make([]*FaultError, len(segs))
	for i, s := range segs {
		var can int
		can, faults[i] = mapped(e.mem.Map(), opRead, int64(s.Addr), len(s.Buf))
		q = split(q, opRead, s.Addr, s.Buf[:can])
		first[i+1] = len(q)
	}
	e.submit(q)
	inTime := slices.Clone(q)
	slices.SortStableFunc(inTime, func(a, b *burst) int { return a.done.Compare(b.done) })
	for _, b := range inTime {
		e.complete(b)
	}
	var err error
	for i := range segs {
		segs[i].Err = nil
		if faults[i] != nil {
			segs[i].Err = faults[i]
		}
		end := segs[i].Addr + PhysAddr(len(segs[i].Buf))
		for _, b := range q[first[i]:first[i+1]] {
			if b.err != nil {
				segs[i].Err = b.fault(int(end-b.addr) - len(b.buf))
				break
			}
		}
		if err == nil {
			err = segs[i].Err
		}
	}
	return err
}

// Writer returns the engine if the memory behind it can be written.
func (e *Engine) Writer() (Writer, bool) { return e, e.canStore }

// WriteAt implements Writer. A write that does not lie wholly in RAM stores nothing. After ErrTimeout the bytes of the burst
// that timed out may be there or not; of those behind it, none is.
func (e *Engine) WriteAt(p []byte, off int64) (int, error) {
	if err := storable(e.mem.Map(), e.canStore, off, len(p)); err != nil {
		return 0, err
	}
	q := split(nil, opWrite, PhysAddr(off), p)
	e.submit(q)
	n := 0
	for _, b := range q {
		if e.complete(b); b.err != nil {
			f := b.fault(len(p) - n - len(b.buf))
			return len(p) - f.Len, f
		}
		n += len(b.buf)
	}
	return n, nil
}
