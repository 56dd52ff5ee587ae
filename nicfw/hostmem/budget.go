package hostmem

import (
	"sync"
	"time"
)

const (
	// budgetBurst is how long a budget may be saved up: what comes at once is at most what that time gives, and budgetLeast.
	budgetBurst = 50 * time.Millisecond
	budgetLeast = 4 * PageSize
	budgetPiece = 16 * PageSize // a long read is made in pieces, so that it does not come all at once
)

// BudgetFloor is the least rate of a Budget, in bytes/s: below it no pass over a kernel would end in time.
const BudgetFloor = 256 << 10

// Budget returns mem with a hard cap on what is moved between it and the host: in any time t no more than rate·t bytes and a burst of
// 50 ms, or 16 KiB, whichever is more. Reads wait until there is budget for them. Stores and swaps do not wait, for a repair must not be held up
// between two of its steps, nor does SleepIf, which waits anyway; what they move is paid by the reads that follow. The abilities are those
// of mem; Close closes mem.
func Budget(mem Memory, rate uint64) Memory {
	rate = max(rate, BudgetFloor)
	burst := max(time.Duration(float64(budgetLeast)/float64(rate)*float64(time.Second)), budgetBurst)
	return &budget{mem: mem, rate: float64(rate), burst: burst}
}

type budget struct {
	mem   Memory
	rate  float64 // bytes/s
	burst time.Duration

	mu  sync.Mutex
	tat time.Time // when all that was moved so far has been paid for; guarded by mu
}

// pay takes bytes from the budget, and tells how long to wait before they may be moved.
func (b *budget) pay(bytes int) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if b.tat.Before(now) {
		b.tat = now
	}
	b.tat = b.tat.Add(time.Duration(float64(bytes) / b.rate * float64(time.Second)))
	return b.tat.Sub(now) - b.burst
}

func (b *budget) wait(bytes int) {
	if d := b.pay(bytes); d > 0 {
		time.Sleep(d)
	}
}

// piece is how many bytes may be moved at once.
func (b *budget) piece() int {
	return max(PageSize, min(budgetPiece, int(b.rate*b.burst.Seconds())))
}

func (b *budget) Map() []Range       { return b.mem.Map() }
func (b *budget) Resident() []Range  { return ResidentRanges(b.mem) }
func (b *budget) VMCOREINFO() []byte { return VMCOREINFO(b.mem) }
func (b *budget) Close() error       { return b.mem.Close() }

func (b *budget) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for {
		part := p[done:min(len(p), done+b.piece())]
		b.wait(len(part))
		n, err := b.mem.ReadAt(part, off+int64(done))
		done += n
		if err != nil {
			return done, lengthen(err, len(p)-(done-n)-len(part))
		}
		if done >= len(p) || n == 0 {
			return done, nil
		}
	}
}

func (b *budget) ReadScatter(segs []Segment) error {
	var first error
	for len(segs) > 0 {
		n, bytes := 0, 0
		for n < len(segs) && (n == 0 || bytes+len(segs[n].Buf) <= b.piece()) {
			bytes += len(segs[n].Buf)
			n++
		}
		if bytes > b.piece() { // one that is too long by itself
			_, segs[0].Err = b.ReadAt(segs[0].Buf, int64(segs[0].Addr))
			if first == nil {
				first = segs[0].Err
			}
		} else {
			b.wait(bytes)
			if err := ReadScatter(b.mem, segs[:n]); first == nil {
				first = err
			}
		}
		segs = segs[n:]
	}
	return first
}

func (b *budget) Writer() (Writer, bool) {
	w, ok := AsWriter(b.mem)
	if !ok {
		return nil, false
	}
	return budgetWriter{b, w}, true
}

func (b *budget) Swapper() (Swapper, bool) {
	s, ok := AsSwapper(b.mem)
	if !ok {
		return nil, false
	}
	return budgetSwapper{b, s}, true
}

func (b *budget) Sleeper() (Sleeper, bool) {
	s, ok := AsSleeper(b.mem)
	if !ok {
		return nil, false
	}
	return budgetSleeper{b, s}, true
}

type budgetSleeper struct {
	b *budget
	s Sleeper
}

func (s budgetSleeper) SleepIf(pa PhysAddr, v uint32, d time.Duration) (bool, error) {
	s.b.pay(4)
	return s.s.SleepIf(pa, v, d)
}

type budgetWriter struct {
	b *budget
	w Writer
}

func (w budgetWriter) WriteAt(p []byte, off int64) (int, error) {
	w.b.pay(len(p))
	return w.w.WriteAt(p, off)
}

type budgetSwapper struct {
	b *budget
	s Swapper
}

func (s budgetSwapper) CompareAndSwap(pa PhysAddr, old, new uint64) (uint64, error) {
	s.b.pay(8)
	return s.s.CompareAndSwap(pa, old, new)
}
