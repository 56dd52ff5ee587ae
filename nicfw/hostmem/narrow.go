package hostmem

import (
	"slices"
	"time"
)

// Narrow returns mem restricted to ranges: what an agent does as soon as it has read the true RAM map from the host's own
// iomem_resource, so that no device register between the ranges is ever touched. Addresses outside fault with
// ErrNotMapped. The abilities are those of mem; Close closes mem.
func Narrow(mem Memory, ranges []Range) Memory {
	return &narrowed{mem: mem, ram: Intersect(mem.Map(), ranges)}
}

type narrowed struct {
	mem Memory
	ram []Range
}

func (m *narrowed) Map() []Range       { return m.ram }
func (m *narrowed) Resident() []Range  { return Intersect(m.ram, ResidentRanges(m.mem)) }
func (m *narrowed) VMCOREINFO() []byte { return VMCOREINFO(m.mem) }
func (m *narrowed) Close() error       { return m.mem.Close() }
func (m *narrowed) Writer() (Writer, bool) {
	w, ok := AsWriter(m.mem)
	if !ok {
		return nil, false
	}
	return narrowedWriter{m, w}, true
}

func (m *narrowed) Swapper() (Swapper, bool) {
	s, ok := AsSwapper(m.mem)
	if !ok {
		return nil, false
	}
	return narrowedSwapper{m, s}, true
}

func (m *narrowed) ReadAt(p []byte, off int64) (int, error) {
	can, fault := mapped(m.ram, opRead, off, len(p))
	if can > 0 {
		if n, err := m.mem.ReadAt(p[:can], off); err != nil {
			return n, lengthen(err, len(p)-can)
		}
	}
	if fault != nil {
		return can, fault
	}
	return can, nil
}

func (m *narrowed) ReadScatter(segs []Segment) error { return scatterMapped(m.mem, m.ram, segs) }

// ScatterReader implements mayScatter.
func (m *narrowed) ScatterReader() (ScatterReader, bool) {
	_, ok := AsScatterReader(m.mem)
	return m, ok
}

func (m *narrowed) Sleeper() (Sleeper, bool) {
	s, ok := AsSleeper(m.mem)
	if !ok {
		return nil, false
	}
	return narrowedSleeper{m, s}, true
}

type narrowedSleeper struct {
	m *narrowed
	s Sleeper
}

func (s narrowedSleeper) SleepIf(pa PhysAddr, v uint32, d time.Duration) (bool, error) {
	if fault := mappedWord(s.m.ram, opRead, pa, 4); fault != nil {
		return false, fault
	}
	return s.s.SleepIf(pa, v, d)
}

type narrowedWriter struct {
	m *narrowed
	w Writer
}

func (w narrowedWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := storable(w.m.ram, true, off, len(p)); err != nil {
		return 0, err
	}
	return w.w.WriteAt(p, off)
}

type narrowedSwapper struct {
	m *narrowed
	s Swapper
}

func (s narrowedSwapper) CompareAndSwap(pa PhysAddr, old, new uint64) (uint64, error) {
	if fault := mappedWord(s.m.ram, opSwap, pa, 8); fault != nil {
		return 0, fault
	}
	return s.s.CompareAndSwap(pa, old, new)
}

// lengthen adds n bytes to the rest that a fault tells, for an access that was cut before it was passed on.
func lengthen(err error, n int) error {
	if f, ok := err.(*FaultError); ok && n > 0 {
		longer := *f
		longer.Len += n
		return &longer
	}
	return err
}

// scatterMapped reads from mem the parts of the segments that ram holds, and gives the rest its fault.
func scatterMapped(mem Memory, ram []Range, segs []Segment) error {
	outside := func(s Segment) bool {
		can, fault := mapped(ram, opRead, int64(s.Addr), len(s.Buf))
		return can < len(s.Buf) || fault != nil
	}
	if !slices.ContainsFunc(segs, outside) {
		return ReadScatter(mem, segs)
	}
	cut := make([]Segment, len(segs))
	faults := make([]*FaultError, len(segs))
	for i, s := range segs {
		var can int
		can, faults[i] = mapped(ram, opRead, int64(s.Addr), len(s.Buf))
		cut[i] = Segment{Addr: s.Addr, Buf: s.Buf[:can]}
	}
	_ = ReadScatter(mem, cut) // each segment has its own error
	var first error
	for i := range segs {
		switch {
		case cut[i].Err != nil:
			segs[i].Err = lengthen(cut[i].Err, len(segs[i].Buf)-len(cut[i].Buf))
		case faults[i] != nil:
			segs[i].Err = faults[i]
		default:
			segs[i].Err = nil
		}
		if first == nil {
			first = segs[i].Err
		}
	}
	return first
}
