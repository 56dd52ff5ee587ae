package kernel

import (
	"cmp"
	"errors"
	"slices"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	// aheadTasks is how many tasks are read ahead together: what belongs to them fits into half of a View's pages.
	aheadTasks = 256
	// aheadPages is how many pages are asked for at once.
	aheadPages = 256
	// No more than so many tasks, and nodes of the tree of their numbers, are read ahead; what is beyond is read one by one.
	maxAhead      = 1 << 16
	maxAheadNodes = 1 << 13
)

// aheadLayout is how the numbers in use lead to their tasks: pid_namespace.idr, an xarray of struct pid (include/linux/pid.h,
// pid_namespace.h).
type aheadLayout struct {
	err                   error
	threadPID, pidLinks   uint64 // in task_struct
	namespace, first      uint64 // in struct pid: numbers[0].ns, and tasks[PIDTYPE_PID]
	head                  uint64 // in pid_namespace: of the xarray
	slots, slotsInXANodes uint64 // in xa_node
}

func (img *Image) aheadLayout() (l aheadLayout) {
	r := resolver{img: img}
	l.threadPID, l.pidLinks = r.field("task_struct", 8, "thread_pid"), r.field("task_struct", 0, "pid_links")
	l.namespace = r.field("pid", 0, "numbers") + r.field("upid", 8, "ns")
	l.first = r.field("pid", 0, "tasks")
	l.head = r.field("pid_namespace", 8, "idr.idr_rt.xa_head")
	if slots, err := img.types.field("xa_node", "slots"); err != nil || slots.Size == 0 || slots.Size%8 != 0 || slots.Size > 256*8 || slots.Offset > 4096 {
		r.fail(cmp.Or(err, error(&CorruptError{"BTF", 0, "xa_node.slots is implausible"})))
	} else {
		l.slots, l.slotsInXANodes = slots.Offset, slots.Size/8
	}
	l.err = r.err
	return l
}

// readAhead brings what a walk of the tasks is about to read into the page cache of its View, many pages under way together, on
// paths where that takes about as long as one. The list of tasks tells of each only behind the one before; the tree of their
// numbers tells of all. It says nothing by itself: the walk judges what it reads as ever, and reads itself what was not foreseen.
type readAhead struct {
	v     *View
	tasks []VirtAddr       // by their numbers
	place map[VirtAddr]int // in tasks
	begun []bool           // of each aheadTasks tasks
	err   error            // of the memory: nothing is read ahead any more
}

// readAhead returns nil if nothing would be gained.
func (v *View) readAhead() *readAhead {
	l := &v.img.lay.ahead
	if _, ok := hostmem.AsScatterReader(v.img.mem); !ok || l.err != nil {
		return nil
	}
	a := &readAhead{v: v, place: make(map[VirtAddr]int)}
	pid, err := v.Uint64(v.img.lay.task.init + VirtAddr(l.threadPID))
	if err != nil {
		return nil
	}
	ns, err := v.Uint64(VirtAddr(pid + l.namespace))
	if err != nil {
		return nil
	}
	root, err := v.Uint64(VirtAddr(ns + l.head))
	if err != nil {
		return nil
	}
	pids := a.leaves(VirtAddr(root))
	for part := range slices.Chunk(pids, 4*aheadTasks) {
		a.fetch(part, l.first, 8)
		for _, pid := range part {
			node, ok := a.cached(pid + VirtAddr(l.first))
			task := node - VirtAddr(l.pidLinks)
			if _, twice := a.place[task]; !ok || node == 0 || twice || !v.img.space.valid(task, 8) {
				continue
			}
			a.place[task] = len(a.tasks)
			a.tasks = append(a.tasks, task)
		}
	}
	a.begun = make([]bool, (len(a.tasks)+aheadTasks-1)/aheadTasks)
	return a
}

// leaves returns what an xarray holds, in order. All leaves are equally deep: each level is read at once.
func (a *readAhead) leaves(root VirtAddr) []VirtAddr {
	l := &a.v.img.lay.ahead
	level := []VirtAddr{root}
	for nodes := 0; ; {
		var inner []VirtAddr
		for _, e := range level {
			if e&3 == 2 && e > 4096 { // xa_is_node
				inner = append(inner, e-2)
			}
		}
		if nodes += len(inner); len(inner) == 0 || nodes > maxAheadNodes {
			break
		}
		a.fetch(inner, l.slots, 8*l.slotsInXANodes)
		var next []VirtAddr
		for _, n := range inner {
			for i := range l.slotsInXANodes {
				e, ok := a.cached(n + VirtAddr(l.slots+8*i))
				if !ok {
					break
				}
				if e != 0 {
					next = append(next, e)
				}
			}
		}
		level = next
	}
	level = slices.DeleteFunc(level, func(e VirtAddr) bool { return e&3 != 0 || !a.v.img.space.valid(e, 8) })
	return level[:min(len(level), maxAhead)]
}

// before is called before a task is read.
func (a *readAhead) before(task VirtAddr) {
	if a == nil || a.err != nil {
		return
	}
	i, ok := a.place[task]
	if !ok || a.begun[i/aheadTasks] {
		return
	}
	a.begun[i/aheadTasks] = true
	i -= i % aheadTasks
	part := a.tasks[i:min(i+aheadTasks, len(a.tasks))]
	l := &a.v.img.lay.task
	a.fetch(part, l.span.lo, l.span.size())
	var mms, creds, parents []VirtAddr
	for _, t := range part {
		for _, p := range []struct {
			offset uint64
			to     *[]VirtAddr
		}{{l.mm, &mms}, {l.cred, &creds}, {l.realParent, &parents}} {
			if at, ok := a.cached(t + VirtAddr(p.offset)); ok && at != 0 {
				*p.to = append(*p.to, at)
			}
		}
	}
	a.fetch(mms, l.rss.offset, l.rss.size*uint64(l.rss.counters))
	a.fetch(creds, l.credSpan.lo, l.credSpan.size())
	a.fetch(parents, l.tgid, 4)
	if !l.rss.perCPU {
		return
	}
	var parts []VirtAddr
	for _, mm := range mms {
		for _, i := range l.rss.resident {
			at, ok := a.cached(mm + VirtAddr(l.rss.offset+uint64(i)*l.rss.size+l.rss.percpus))
			if !ok || at == 0 {
				continue
			}
			for _, offset := range a.v.img.perCPU {
				if offset != 0 && len(parts) < maxAhead {
					parts = append(parts, at+offset)
				}
			}
		}
	}
	a.fetch(parts, 0, 4)
}

// cached returns a word that was read ahead.
func (a *readAhead) cached(va VirtAddr) (VirtAddr, bool) {
	if a.err != nil || !a.v.img.space.valid(va, 8) {
		return 0, false
	}
	n, err := a.v.Uint64(va)
	a.fail(err)
	return VirtAddr(n), err == nil
}

// fail gives up if it is the path to the memory that does not work.
func (a *readAhead) fail(err error) {
	var corrupt *CorruptError
	if err != nil && !errors.Is(err, ErrNotMapped) && !errors.Is(err, hostmem.ErrNotMapped) && !errors.As(err, &corrupt) {
		a.err = err
	}
}

// fetch reads the pages of size bytes, offset bytes into each of the objects. Where the page tables must be walked, these are read as
// ever: they are few.
func (a *readAhead) fetch(objects []VirtAddr, offset, size uint64) {
	var pages []hostmem.PhysAddr
	for _, at := range objects {
		va := at + VirtAddr(offset)
		if a.err != nil || !a.v.img.space.valid(va, 1) {
			continue
		}
		pa, n, err := a.v.img.space.translate(a.v, va)
		if err != nil {
			a.fail(err)
			continue
		}
		for end := pa + hostmem.PhysAddr(min(n, size)); pa < end; pa = pa&^(hostmem.PageSize-1) + hostmem.PageSize {
			pages = append(pages, pa&^(hostmem.PageSize-1))
		}
	}
	slices.Sort(pages)
	for part := range slices.Chunk(slices.Compact(pages), aheadPages) {
		if a.err != nil {
			return
		}
		a.fail(a.v.fetch(part))
	}
}
