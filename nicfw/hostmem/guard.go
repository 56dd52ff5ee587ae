package hostmem

import (
	"fmt"
	"sync"
)

// Guard is the only door for stores: it holds the Writer, and lets a store through if its rule allows it.
//
// It is a Writer always, so that a refusal is an error at the store and not a missing method. It can compare and swap only
// where the memory behind it can; ask with AsSwapper.
type Guard struct {
	mem   Memory
	allow func(op string, r Range) error

	mu    sync.Mutex // held over each decision together with its store: once a rule is withdrawn no store is under way
	count Stores
}

// Stores counts what went through a Guard.
type Stores struct {
	Writes  uint64 `json:"writes"`  // WriteAt calls that stored all they were given
	Swaps   uint64 `json:"swaps"`   // compare-and-swaps that reached the memory, whether or not they swapped
	Bytes   uint64 `json:"bytes"`   // bytes stored by writes, and 8 for each swap that took place
	Refused uint64 `json:"refused"` // stores that the rule did not allow
	Failed  uint64 `json:"failed"`  // stores that faulted
}

// NewGuard returns mem behind a door. allow is asked before each store, one at a time, with "write" or "compare-and-swap"
// and the range; its error, if any, is the reason of the refusal. Without a rule every store is refused.
func NewGuard(mem Memory, allow func(op string, r Range) error) *Guard {
	return &Guard{mem: mem, allow: allow}
}

// ReadAt implements Memory.
func (g *Guard) ReadAt(p []byte, off int64) (int, error) { return g.mem.ReadAt(p, off) }

// ReadScatter implements ScatterReader.
func (g *Guard) ReadScatter(segs []Segment) error { return ReadScatter(g.mem, segs) }

// Sleeper implements maySleep.
func (g *Guard) Sleeper() (Sleeper, bool) { return AsSleeper(g.mem) }

// ScatterReader implements mayScatter.
func (g *Guard) ScatterReader() (ScatterReader, bool) { return AsScatterReader(g.mem) }

// Map implements Memory.
func (g *Guard) Map() []Range { return g.mem.Map() }

// Resident implements Resident.
func (g *Guard) Resident() []Range { return ResidentRanges(g.mem) }

// VMCOREINFO implements NoteHolder.
func (g *Guard) VMCOREINFO() []byte { return VMCOREINFO(g.mem) }

// Close implements Memory.
func (g *Guard) Close() error { return g.mem.Close() }

// Stores returns the counts so far.
func (g *Guard) Stores() Stores {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.count
}

// WriteAt implements Writer. What does not lie wholly in RAM is not asked about and stores nothing.
func (g *Guard) WriteAt(p []byte, off int64) (int, error) {
	if _, fault := mapped(g.mem.Map(), opWrite, off, len(p)); fault != nil {
		return 0, fault
	}
	if len(p) == 0 {
		return 0, nil
	}
	w, ok := AsWriter(g.mem)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.permit(opWrite, Range{PhysAddr(off), uint64(len(p))}, ok); err != nil {
		return 0, err
	}
	n, err := w.WriteAt(p, off)
	g.count.Bytes += uint64(n)
	if err != nil {
		g.count.Failed++
		return n, err
	}
	g.count.Writes++
	return n, nil
}

// Swapper returns the ability to compare and swap through this door, if the memory behind it has it.
func (g *Guard) Swapper() (Swapper, bool) {
	s, ok := AsSwapper(g.mem)
	if !ok {
		return nil, false
	}
	return guardedSwapper{g, s}, true
}

type guardedSwapper struct {
	g *Guard
	s Swapper
}

func (s guardedSwapper) CompareAndSwap(pa PhysAddr, old, new uint64) (uint64, error) {
	g := s.g
	if fault := mappedWord(g.mem.Map(), opSwap, pa, 8); fault != nil {
		return 0, fault
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.permit(opSwap, Range{pa, 8}, true); err != nil {
		return 0, err
	}
	prev, err := s.s.CompareAndSwap(pa, old, new)
	if err != nil {
		g.count.Failed++
		return prev, err
	}
	g.count.Swaps++
	if prev == old {
		g.count.Bytes += 8
	}
	return prev, nil
}

// permit returns the fault of a store that may not happen. g.mu is held.
func (g *Guard) permit(op string, r Range, able bool) error {
	var why error
	switch {
	case g.allow == nil:
		why = fmt.Errorf("%w: no rule allows stores", ErrReadOnly)
	case !able:
		why = fmt.Errorf("%w: the path to it cannot store", ErrReadOnly)
	default:
		why = g.allow(op, r)
	}
	if why == nil {
		return nil
	}
	g.count.Refused++
	return &FaultError{Op: op, Addr: r.Start, Len: int(r.Size), Err: why}
}
