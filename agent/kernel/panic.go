package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// panicCPUInvalid is what panic_cpu is as long as nothing has panicked: PANIC_CPU_INVALID, -1 (include/linux/panic.h).
const panicCPUInvalid = ^uint32(0)

// Panic tells whether the kernel has panicked, and if so, where and with what words. It reads past the View's cache.
func (v *View) Panic() (PanicState, error) {
	p, err := v.panicState()
	if err != nil {
		return PanicState{CPU: -1}, fmt.Errorf("read panic state: %w", err)
	}
	return p, nil
}

// Panicked tells no more than whether the kernel has panicked: two small reads, which may be asked often.
func (img *Image) Panicked(ctx context.Context) (bool, error) {
	p := &img.panic
	if p.err != nil {
		return false, fmt.Errorf("read panic state: %w", p.err)
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	// What is -1 as a rule could be a path that is lost; oops_in_progress, which is not, tells one from the other without another read.
	var b [8]byte
	segs := [2]hostmem.Segment{{Addr: p.at[0], Buf: b[:4]}, {Addr: p.at[1], Buf: b[4:]}}
	if err := hostmem.ReadScatter(img.mem, segs[:]); err != nil {
		return false, fmt.Errorf("read panic state: %w", err)
	}
	return le32(b[:]) != panicCPUInvalid, nil
}

// SleepUnlessPanicked tells whether the kernel has panicked, and sleeps for d if it has not: where memory is mapped, both are one call of this
// machine's kernel, and the look costs nothing besides. Elsewhere the error is ErrNotSupported.
func (img *Image) SleepUnlessPanicked(d time.Duration) (panicked bool, err error) {
	p := &img.panic
	if p.err != nil {
		return false, fmt.Errorf("read panic state: %w", p.err)
	}
	if p.sleeper == nil {
		return false, fmt.Errorf("%w: memory that is not mapped cannot be slept on", ErrNotSupported)
	}
	calm, err := p.sleeper.SleepIf(p.at[0], panicCPUInvalid, d)
	if err != nil {
		return false, fmt.Errorf("read panic state: %w", err)
	}
	return !calm, nil
}

// panicPlan is where the kernel's variables of a panic are: the kernel's own image lies still.
type panicPlan struct {
	err error
	va  VirtAddr            // of panic_cpu
	at  [3]hostmem.PhysAddr // of panic_cpu, oops_in_progress, tainted_mask

	sleeper hostmem.Sleeper // nil if the memory is not mapped
}

func (img *Image) panicPlan(src source) panicPlan {
	r := resolver{img: img}
	vars := [...]VirtAddr{r.symbol("panic_cpu"), r.symbol("oops_in_progress"), r.symbol("tainted_mask")}
	p := panicPlan{err: r.err, va: vars[0]}
	for i := 0; i < len(vars) && p.err == nil; i++ {
		p.at[i], _, p.err = img.space.translate(src, vars[i])
	}
	return p
}

// panicRecords is how many of the log's newest records are looked at for a panic's words: the stacks and modules that come behind them are some
// hundred at most. When the panic is fresh, they are among the last few.
const (
	panicRecords = 512
	freshRecords = 16
)

func (v *View) panicState() (PanicState, error) {
	img := v.img
	p := &img.panic
	if p.err != nil {
		return PanicState{}, p.err
	}
	var b [16]byte
	segs := []hostmem.Segment{{Addr: p.at[0], Buf: b[0:4]}, {Addr: p.at[1], Buf: b[4:8]}, {Addr: p.at[2], Buf: b[8:16]}}
	if err := v.readScattered(segs); err != nil {
		return PanicState{}, err
	}
	s := PanicState{CPU: int(int32(le32(b[:]))), Oops: le32(b[4:]) != 0, Tainted: le64(b[8:])}
	if s.CPU == -1 { // PANIC_CPU_INVALID
		return s, nil
	}
	if s.CPU < 0 || s.CPU >= len(img.perCPU) {
		return s, &CorruptError{"panic_cpu", p.va, fmt.Sprintf("is %d of %d CPUs", s.CPU, len(img.perCPU))}
	}
	s.Panicked = true
	return s, v.lastWords(&s)
}

// lastWords adds what s.CPU runs, and with what words the kernel has panicked. That is worth having, but its absence must not hide the panic.
func (v *View) lastWords(s *PanicState) error {
	task, err := v.running(s.CPU)
	if err == nil {
		s.Task = &task
	} else if !tolerable(err) {
		return err
	}
	// A view of its own: this one may have read the log before the panic.
	log := v.img.View(v.ctx)
	defer log.Close()
	for _, most := range []int{freshRecords, panicRecords} {
		records, _, err := log.LogAfter(0, most)
		if err != nil && !tolerable(err) {
			return err
		}
		for _, rec := range records {
			if strings.HasPrefix(rec.Text, "Kernel panic - not syncing") {
				s.Message = rec.Text
			}
		}
		if s.Message != "" {
			break
		}
	}
	c := log.Cost()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.cost.Reads += c.Reads
	v.cost.Bytes += c.Bytes
	return nil
}

// RehearsePanic reads all that Panic reads of a kernel that has panicked, as if it were the first CPU's panic, and returns what Panic would.
// What is found once is found then, and caches have been this way before it counts.
func (v *View) RehearsePanic() (PanicState, error) {
	s, err := v.panicState()
	if err == nil && !s.Panicked {
		s.Panicked, s.CPU = true, 0
		err = v.lastWords(&s)
	}
	if err != nil {
		return PanicState{CPU: -1}, fmt.Errorf("rehearse a panic: %w", err)
	}
	return s, nil
}

// tolerable reports whether an error says something of the host's state rather than of the way to it.
func tolerable(err error) bool {
	var corrupt *CorruptError
	return errors.As(err, &corrupt) || errors.Is(err, ErrNotSupported) || errors.Is(err, ErrTorn) || errors.Is(err, ErrNotMapped)
}

// running returns the task that a CPU runs, read past the cache.
func (v *View) running(cpu int) (Task, error) {
	img, src := v.img, fresh{v}
	r := resolver{img: img}
	curr := r.symbol("runqueues") + VirtAddr(r.field("rq", 8, "curr"))
	if r.err != nil {
		return Task{}, r.err
	}
	if err := img.lay.task.err; err != nil {
		return Task{}, err
	}
	var b [8]byte
	if err := img.space.object(src, "runqueues", curr+img.perCPU[cpu], b[:]); err != nil {
		return Task{}, err
	}
	var o object
	t, err := img.readTask(src, &o, VirtAddr(le64(b[:])), 0)
	if err != nil {
		return Task{}, err
	}
	if err := img.related(src, &t); err != nil {
		return Task{}, err
	}
	if t.RSS, err = img.rss(src, t.mm, false); err != nil {
		return Task{}, err
	}
	return t.Task, nil
}
