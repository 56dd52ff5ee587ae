package kernel

import (
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// keeperLayout is tk_core (kernel/time/timekeeping.c): a seqcount and a struct timekeeper.
type keeperLayout struct {
	err  error
	addr VirtAddr
	pa   hostmem.PhysAddr // of addr: tk_core is in the kernel image
	span span             // of tk_core, without the seqcount

	clock, nsec, base, shift, offsReal, offsBoot uint64
}

// times are the host's clocks at the last update by the timekeeper, at most a tick ago while the host is busy and at most
// some seconds when it idles.
type times struct {
	mono int64 // CLOCK_MONOTONIC, ns
	real int64 // CLOCK_REALTIME, ns
	boot int64 // CLOCK_REALTIME when the host booted, ns; changes only when the clock is set

	tries int // how often a writer was met
}

func (img *Image) keeperLayout(src source) keeperLayout {
	r := resolver{img: img}
	// The first of several since commit 22c62b9a84b8 ("timekeeping: Introduce auxiliary timekeepers") (in v6.17).
	at := r.symbol("tk_core", "timekeeper_data")
	if r.err != nil {
		return keeperLayout{err: r.err}
	}
	return img.keeperAt(src, at)
}

// keeperOffset returns where struct timekeeper is in tk_core: an anonymous structure until struct tk_data came (in v6.13).
// There the timekeeper follows a seqcount at its natural alignment, with PREEMPT_RT also the pointer to its lock. That it is
// there is proven by the name of its clock source.
func (img *Image) keeperOffset() uint64 {
	if f, err := img.types.field("tk_data", "timekeeper"); err == nil {
		return f.Offset
	}
	seq, err := img.types.sizeof("seqcount_raw_spinlock")
	if err != nil || seq > 64 {
		seq = 4
	}
	return alignUp(seq, 8)
}

// keeperAt proves that tk_core is at addr.
func (img *Image) keeperAt(src source, addr VirtAddr) keeperLayout {
	l := keeperLayout{addr: addr}
	r := resolver{img: img}
	at := img.keeperOffset()
	keeper := func(path string, size uint64) uint64 {
		return l.span.add(at+r.field("timekeeper", size, path), size)
	}
	l.clock = keeper("tkr_mono.clock", 8)
	l.shift = keeper("tkr_mono.shift", 4)
	l.nsec = keeper("tkr_mono.xtime_nsec", 8)
	l.base = keeper("tkr_mono.base", 8)
	l.offsReal = keeper("offs_real", 8)
	l.offsBoot = keeper("offs_boot", 8)
	name := r.field("clocksource", 8, "name")
	l.err = r.err
	if l.err != nil {
		return l
	}
	var o object
	var b [16]byte
	l.err = func() error {
		if l.span.size() > hostmem.PageSize {
			return &CorruptError{"timekeeper", l.addr, "implausibly large"}
		}
		pa, _, err := img.space.translate(src, l.addr)
		if err != nil {
			return err
		}
		l.pa = pa
		if err := o.load(img.space, src, "tk_core", l.span, l.addr); err != nil {
			return err
		}
		clock := o.ptr(l.clock)
		if !img.space.valid(clock, 8) {
			return &CorruptError{"tk_core", l.addr, fmt.Sprintf("clock source is %v", clock)}
		}
		if err := img.space.object(src, "clocksource", clock+VirtAddr(name), b[:8]); err != nil {
			return err
		}
		text := VirtAddr(le64(b[:]))
		if err := img.space.object(src, "clocksource.name", text, b[:]); err != nil {
			return err
		}
		if s, _ := cString(b[:]); len(s) < 2 {
			return &CorruptError{"clocksource", clock, fmt.Sprintf("name is %q", s)}
		}
		return nil
	}()
	return l
}

// keeperTries bounds the wait for a timekeeper that is not being written.
const keeperTries = 64

// times reads the clocks under the timekeeper's seqcount. A host that died or was frozen in the middle of an update leaves
// an odd count for ever: if that stands still, what is there is returned.
func (img *Image) times(src source) (times, error) {
	l := &img.lay.keeper
	if l.err != nil {
		return times{}, l.err
	}
	var seq [4]byte
	b := make([]byte, l.span.size())
	o := object{span: l.span, addr: l.addr, b: b}
	still, last := 0, times{}
	for try := range keeperTries {
		if err := src.readPhys(l.pa, seq[:]); err != nil {
			return times{}, fmt.Errorf("read tk_core: %w", err)
		}
		before := le32(seq[:])
		if err := src.readPhys(l.pa+hostmem.PhysAddr(l.span.lo), b); err != nil {
			return times{}, fmt.Errorf("read tk_core: %w", err)
		}
		if err := src.readPhys(l.pa, seq[:]); err != nil {
			return times{}, fmt.Errorf("read tk_core: %w", err)
		}
		if le32(seq[:]) != before {
			continue
		}
		base, real := int64(o.u64(l.base)), int64(o.u64(l.offsReal))
		t := times{tries: try, mono: base + int64(o.u64(l.nsec)>>(o.u32(l.shift)&63))}
		t.real = t.mono + real
		t.boot = real - int64(o.u64(l.offsBoot))
		if before&1 == 0 {
			return t, nil
		}
		if try > 0 && t.mono == last.mono && t.real == last.real {
			still++
		}
		if last = t; still >= keeperTries/2 {
			return t, nil
		}
		time.Sleep(20 * time.Microsecond)
	}
	return times{}, fmt.Errorf("read tk_core: %w", ErrTorn)
}
