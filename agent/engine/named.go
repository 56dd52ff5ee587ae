package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	// namedFor is how long an answer is used again: many packets of one transfer ask the same.
	namedFor = 5 * time.Millisecond
	// namedTimeout bounds one look; who asks for it waits.
	namedTimeout = 500 * time.Millisecond
	namedLooks   = 3 // until one is not torn by the host, which runs meanwhile
	// maxNamedRanges bounds what one look gathers, in pieces: 16 MiB.
	maxNamedRanges = 1 << 20
)

// named is what the names of the agreement's rights.memory stand for in the memory of an attached kernel. It takes no lock of the
// engine, so that it may be asked wherever memory may be read.
type named struct {
	img *kernel.Image

	mu   sync.Mutex // held during a look: there is one at a time
	kept map[namedKey]namedAnswer
}

type namedKey struct {
	name  string
	write bool
}

type namedAnswer struct {
	at     time.Time
	ranges []hostmem.Range
	err    error
}

// names returns what resolves names, or nil if no kernel is attached. e.mu is held.
func (e *Engine) names() access.Resolver {
	if e.target == nil || e.target.image() == nil {
		e.named = nil
		return nil
	}
	if img := e.target.image(); e.named == nil || e.named.img != img {
		e.named = &named{img: img}
	}
	return e.named
}

// Inside implements access.Resolver.
func (n *named) Inside(m access.Memory, start, size uint64, write bool, permit func(int, bool, uint32, string) error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := namedKey{m.Names(), write}
	a, ok := n.kept[key]
	if !ok || time.Since(a.at) > namedFor {
		if n.kept == nil || len(n.kept) >= 64 {
			n.kept = make(map[namedKey]namedAnswer)
		}
		ctx, cancel := context.WithTimeout(context.Background(), namedTimeout)
		for range namedLooks {
			a.ranges, a.err = n.look(ctx, m, write, permit)
			if corrupt := (*kernel.CorruptError)(nil); !errors.Is(a.err, kernel.ErrTorn) && !errors.As(a.err, &corrupt) {
				break
			}
		}
		cancel()
		a.at = time.Now()
		n.kept[key] = a
	}
	if a.err != nil {
		return a.err
	}
	i := slices.IndexFunc(a.ranges, func(r hostmem.Range) bool { return r.Contains(hostmem.PhysAddr(start), size) })
	switch {
	case i >= 0:
		return nil
	case len(a.ranges) == 0:
		return errors.New("none of it is in memory now")
	case len(a.ranges) == 1:
		return fmt.Errorf("that is %#x to %#x now", uint64(a.ranges[0].Start), uint64(a.ranges[0].End())-1)
	}
	return fmt.Errorf("they are not within one of its %d pieces now", len(a.ranges))
}

// look finds where the host's memory has what is named, of RAM alone.
func (n *named) look(ctx context.Context, m access.Memory, write bool, permit func(int, bool, uint32, string) error) ([]hostmem.Range, error) {
	if err := n.img.Prove(ctx); err != nil {
		return nil, fmt.Errorf("prove the attached kernel: %w", err)
	}
	ram := hostmem.Intersect(n.img.Memory().Map(), n.img.RAM())
	v := n.img.View(ctx)
	defer v.Close()
	var all []hostmem.Range
	var err error
	switch {
	case m.All:
		// The holes are no memory: every path to it is narrowed to RAM, and faults there.
		if len(ram) == 0 {
			return nil, nil
		}
		return []hostmem.Range{{Size: uint64(ram[len(ram)-1].End())}}, nil
	case m.KernelText:
		all, err = kernelText(v)
	case m.Symbol != "":
		all, err = symbol(v, m.Symbol, m.Size)
	case m.Process != nil && m.Process.UID != nil:
		all, err = processes(v, *m.Process.UID, m.Process.Comm, write, permit)
	default:
		err = errors.New("this agent does not know such a name")
	}
	if err != nil {
		return nil, err
	}
	return hostmem.Intersect(all, ram), nil
}

func kernelText(v *kernel.View) ([]hostmem.Range, error) {
	from, err := v.Image().Symbol("_stext")
	if err != nil {
		return nil, err
	}
	to, err := v.Image().Symbol("_etext")
	if err != nil {
		return nil, err
	}
	if to <= from {
		return nil, fmt.Errorf("_stext is at %v and _etext at %v", from, to)
	}
	return v.InImage(from, uint64(to-from))
}

func symbol(v *kernel.View, name string, size uint64) ([]hostmem.Range, error) {
	va, own, err := v.Image().Extent(name)
	if err != nil {
		return nil, err
	}
	if size == 0 {
		size = own
	}
	if size == 0 {
		return nil, errors.New("its size is not known; have the agreement say it")
	}
	return v.InImage(va, size)
}

// processes finds what is in memory of the processes of a user and name. Of those that may not be touched, and of the kernel's image,
// nothing is among it, whatever the page tables say.
func processes(v *kernel.View, uid uint32, comm string, write bool, permit func(int, bool, uint32, string) error) ([]hostmem.Range, error) {
	type process struct {
		threads     []int
		named, kept bool
	}
	all := make(map[int]*process)
	for t, err := range v.Tasks() {
		if err != nil {
			return nil, err
		}
		if t.KThread {
			continue
		}
		p := all[t.TGID]
		if p == nil {
			p = &process{}
			all[t.TGID] = p
		}
		p.threads = append(p.threads, t.PID)
		p.named = p.named || t.PID == t.TGID && t.UID == uid && t.Comm == comm
		p.kept = p.kept || permit(t.TGID, t.KThread, t.UID, t.Comm) != nil
	}
	image, _ := v.Image().Spans()
	without := []hostmem.Range{{Start: image.Phys, Size: image.Size}}
	var found []hostmem.Range
	for _, p := range all {
		if !p.named || p.kept {
			continue
		}
		r, err := present(v, p.threads, write)
		if err != nil {
			return nil, err
		}
		if found, err = gather(found, r); err != nil {
			return nil, err
		}
	}
	if len(found) == 0 {
		return nil, nil
	}
	for _, p := range all {
		if !p.kept {
			continue
		}
		r, err := present(v, p.threads, true)
		if err != nil {
			return nil, fmt.Errorf("what may not be touched: %w", err)
		}
		if without, err = gather(without, r); err != nil {
			return nil, err
		}
	}
	return subtract(found, without), nil
}

// gather adds ranges to others.
func gather(all, more []hostmem.Range) ([]hostmem.Range, error) {
	if all = append(all, more...); len(all) > maxNamedRanges/2 {
		all = hostmem.Normalize(all)
	}
	if len(all) > maxNamedRanges/2 {
		return nil, fmt.Errorf("the memory of the processes is in more than %d pieces", maxNamedRanges/2)
	}
	return all, nil
}

// present returns what is in memory of a process, by the first of its threads that has it still.
func present(v *kernel.View, threads []int, writable bool) ([]hostmem.Range, error) {
	for _, pid := range threads {
		m, err := v.UserMemory(pid)
		if errors.Is(err, kernel.ErrNotFound) {
			continue // it has ended
		}
		if err != nil {
			return nil, err
		}
		return m.Present(writable)
	}
	return nil, nil
}

// subtract returns what of the ranges is in none of the others.
func subtract(ranges, others []hostmem.Range) []hostmem.Range {
	var gaps []hostmem.Range
	var at hostmem.PhysAddr
	for _, r := range hostmem.Normalize(others) {
		gaps = append(gaps, hostmem.Range{Start: at, Size: uint64(r.Start - at)})
		at = r.End()
	}
	return hostmem.Intersect(ranges, append(gaps, hostmem.Range{Start: at, Size: ^uint64(at)}))
}
