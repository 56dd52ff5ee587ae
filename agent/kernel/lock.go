package kernel

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
)

// Lock is a sleeping lock of the kernel that tasks wait for, or that is known by name and held.
type Lock struct {
	Addr VirtAddr `json:"addr"`
	Kind string   `json:"kind"` // mutex, rwsem, semaphore or rtmutex
	// Name is that of the lock itself (rtnl_mutex), or the kind of object that it is in and where (inode_cache+0xa0).
	Name  string    `json:"name,omitempty"`
	Owner *LockTask `json:"owner,omitempty"` // nil if nobody holds it, or the kernel does not record who
	// Readers is how many hold an rwsem for reading. Owner is then the one that took it last, and may have let go.
	Readers int          `json:"readers,omitempty"`
	Waiters []LockWaiter `json:"waiters"` // the first in line first
}

// LockTask is a task that holds a lock.
type LockTask struct {
	Addr  VirtAddr `json:"addr"`
	PID   int      `json:"pid"`
	TGID  int      `json:"tgid"`
	Comm  string   `json:"comm"`
	State string   `json:"state"`
}

// LockWaiter is a task that waits for a lock.
type LockWaiter struct {
	LockTask
	Reads bool `json:"reads,omitempty"` // it wants an rwsem for reading
}

const (
	maxLocks   = 1 << 14
	maxWaiters = 1 << 16

	// kernel/locking/mutex.c and rwsem.c; the same since v4.10 and v5.3.
	mutexFlags       = 7
	mutexPickup      = 4 // MUTEX_FLAG_PICKUP
	rwsemReaderOwned = 1
	rwsemOwnerFlags  = 7
	rwsemWriterHeld  = 1
	rwsemWaiters     = 2
	rwsemReaderShift = 8
)

// knownLocks are locks of the whole kernel that much depends on: these are told when they are held, even if no one waits.
var knownLocks = []struct{ name, kind string }{
	{"rtnl_mutex", "mutex"}, {"cgroup_mutex", "mutex"}, {"pernet_ops_rwsem", "rwsem"}, {"namespace_sem", "rwsem"}, {"module_mutex", "mutex"},
	{"slab_mutex", "mutex"}, {"wq_pool_mutex", "mutex"}, {"text_mutex", "mutex"}, {"event_mutex", "mutex"}, {"cpu_add_remove_lock", "mutex"},
	{"console_sem", "semaphore"}, {"tracepoints_mutex", "mutex"}, {"kprobe_mutex", "mutex"}, {"jump_label_mutex", "mutex"}, {"system_transition_mutex", "mutex"},
	{"oom_lock", "mutex"}, {"oom_adj_mutex", "mutex"}, {"pcpu_alloc_mutex", "mutex"}, {"vmap_purge_lock", "mutex"}, {"sched_domains_mutex", "mutex"},
}

type lockWalk struct {
	v                                 *View
	task, mutex, rwsem, semaphore, rt *shape
	mutexWaiter, rwWaiter, semWaiter  *shape
	rtWaiter                          *shape
	pi                                *shape
	threadSize                        uint64
	reads                             int64 // RWSEM_WAITING_FOR_READ
	list, owner                       uint64
	tasks                             map[VirtAddr]Task
	order                             []Task
	locks                             map[VirtAddr]bool
	all                               []Lock
}

// Locks lists the mutexes, reader-writer semaphores, semaphores and priority-inheriting mutexes that tasks sleep on, with who
// holds them and who waits, and those of the kernel's own big locks that are held. No kernel keeps a list of its locks: a
// sleeper's place in the queue is found on its stack, and counts only if the queue around it is whole.
//
// A lock that spins does not show here, nor one of a kernel built for real time. Since v7.0 the queue of a lock no longer leads to
// the lock: there it is ErrNotSupported.
func (v *View) Locks() iter.Seq2[Lock, error] {
	return settled(v, "walk locks", func() ([]Lock, error) {
		w := lockWalk{v: v, tasks: make(map[VirtAddr]Task), locks: make(map[VirtAddr]bool)}
		err := w.run()
		if err == nil {
			err = w.again()
		}
		return w.all, err
	})
}

// again looks a second time at the tasks that wait and at the words that say who holds. A task that ran meanwhile, as its count of
// switches tells, waits no more for certain, and a lock whose word changed is held by another: neither is told. Without this, a task
// that was seen to wait, and then got what it waited for, would wait for itself.
func (w *lockWalk) again() error {
	v, l := w.v, &w.v.img.lay.task
	var pieces []piece
	for _, k := range w.all {
		s := map[string]*shape{"mutex": w.mutex, "rwsem": w.rwsem, "rtmutex": w.rt}[k.Kind]
		if len(k.Waiters) == 0 {
			continue
		}
		word := piece{k.Addr, 8} // of a semaphore, which has no owner: whatever it begins with
		if s != nil {
			word.at += VirtAddr(s.fields["owner.counter"].Offset + s.fields["owner"].Offset)
		}
		pieces = append(pieces, word)
		for _, x := range k.Waiters {
			pieces = append(pieces, piece{x.Addr + VirtAddr(l.state), 4}, piece{x.Addr + VirtAddr(l.onCPU), 1}, piece{x.Addr + VirtAddr(l.nvcsw), 8}, piece{x.Addr + VirtAddr(l.nivcsw), 8})
		}
	}
	changed, err := v.secondLook(pieces)
	if err != nil {
		return err
	}
	kept := w.all[:0]
	for _, k := range w.all {
		if len(k.Waiters) == 0 {
			kept = append(kept, k)
			continue
		}
		moved := 0
		if changed[0] && k.Kind != "semaphore" {
			k.Owner, k.Readers = nil, 0
			moved++
		}
		changed = changed[1:]
		n := len(k.Waiters)
		var still []LockWaiter
		for _, x := range k.Waiters {
			if slices.Contains(changed[:4], true) {
				moved++
			} else {
				still = append(still, x)
			}
			changed = changed[4:]
		}
		v.note(func(c *Confidence) { c.Twice, c.Changed = c.Twice+n+1, c.Changed+moved })
		if k.Waiters = still; len(still) > 0 {
			kept = append(kept, k)
		}
	}
	w.all = kept
	return nil
}

func (w *lockWalk) resolve() error {
	r := resolver{img: w.v.img}
	w.task = r.shape("task_struct", "stack", "thread.sp|thread.cpu_context.sp", "pi_blocked_on?", "stack_vm_area?")
	w.mutex = r.shape("mutex", "owner.counter", "wait_list[]")
	w.rwsem = r.shape("rw_semaphore", "count.counter", "owner.counter", "wait_list[]")
	w.semaphore = r.shape("semaphore", "count", "wait_list[]")
	w.mutexWaiter = r.shape("mutex_waiter", "list[]", "task")
	w.rwWaiter = r.shape("rwsem_waiter", "list[]", "task", "type")
	w.semWaiter = r.shape("semaphore_waiter", "list[]", "task")
	if r.err != nil {
		return r.err
	}
	var err error
	if w.reads, err = w.v.img.types.enum("rwsem_waiter_type", "RWSEM_WAITING_FOR_READ"); err != nil {
		return fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	// One offset for all: what looks like a waiter is found first, and then what kind it is of.
	w.list, w.owner = w.mutexWaiter.offset("list"), w.mutexWaiter.offset("task")
	for _, s := range []*shape{w.rwWaiter, w.semWaiter} {
		if s.offset("list") != w.list || s.offset("task") != w.owner {
			return fmt.Errorf("%s is unlike mutex_waiter: %w", s.typ, ErrNotSupported)
		}
	}
	try := resolver{img: w.v.img}
	w.rtWaiter = try.shape("rt_mutex_waiter", "lock", "task")
	rt := "rt_mutex_base" // a part of rt_mutex since v5.15
	if _, err := w.v.img.types.sizeof(rt); err != nil {
		rt = "rt_mutex"
	}
	w.rt = try.shape(rt, "waiters.rb_root.rb_node", "owner")
	w.pi = try.shape("rt_mutex_waiter", "tree.entry|tree_entry[]")
	if try.err != nil {
		w.rtWaiter = nil
	}
	if w.threadSize, err = w.v.threadSize(); err != nil {
		return err
	}
	return nil
}

// threadSize returns how large the stacks of threads are: a constant of the source, which the first one gives away, or what
// holds that of another thread.
func (v *View) threadSize() (uint64, error) {
	r := resolver{img: v.img}
	n := uint64(r.symbol("__end_init_stack", "__end_init_task") - r.symbol("init_stack"))
	if r.err != nil {
		r = resolver{img: v.img}
		task, area := r.shape("task_struct", "stack_vm_area"), r.shape("vm_struct", "nr_pages")
		if r.err != nil {
			return 0, r.err
		}
		for t, err := range v.Tasks() {
			if err != nil {
				return 0, err
			}
			s, err := v.thing(task, t.Addr)
			if err != nil {
				return 0, err
			}
			if p := s.ptr("stack_vm_area"); p != 0 {
				a, err := v.thing(area, p)
				if err != nil {
					return 0, err
				}
				n = a.num("nr_pages") * v.img.pageSize
				break
			}
		}
	}
	if n > maxStack || n < 4096 {
		r.fail(&CorruptError{"stack", 0, fmt.Sprintf("is of %d bytes", n)})
	}
	return n, r.err
}

func (w *lockWalk) run() error {
	if err := w.resolve(); err != nil {
		return err
	}
	for t, err := range w.v.Tasks() {
		if err != nil {
			return err
		}
		w.tasks[t.Addr] = t
		w.order = append(w.order, t)
	}
	for _, t := range w.order {
		if t.OnCPU || t.State == "R" || t.State == "Z" || t.State == "X" || t.State == "I" {
			continue
		}
		if err := w.sleeper(t); err != nil {
			return err
		}
	}
	return w.known()
}

// sleeper looks for what a task waits for.
func (w *lockWalk) sleeper(t Task) error {
	s, err := w.v.thing(w.task, t.Addr)
	if err != nil {
		return err
	}
	if p := s.ptr("pi_blocked_on"); p != 0 && w.rtWaiter != nil {
		if err := w.rtmutex(t, p); err != nil {
			return err
		}
	}
	lo, sp := s.ptr("stack"), s.ptr("thread.sp")
	if lo == 0 {
		return nil // it has ended
	}
	hi := lo + VirtAddr(w.threadSize)
	if sp < lo || sp >= hi || sp%8 != 0 {
		return nil // it runs by now
	}
	// Sleepers of locks sleep near the top of their stack; what lies deeper waits for something else.
	b := make([]byte, min(uint64(hi-sp), 1536))
	if err := w.v.img.space.object(w.v, "stack", sp, b); err != nil {
		return err
	}
	for at := w.owner; at+8 <= uint64(len(b)); at += 8 {
		if VirtAddr(le64(b[at:])) != t.Addr {
			continue
		}
		node := sp + VirtAddr(at-w.owner+w.list)
		head, waiters, ok, err := w.queue(node)
		if err != nil {
			return err
		}
		if !ok || w.locks[head] {
			continue
		}
		if err := w.lock(t, head, waiters); err != nil {
			return err
		}
	}
	return nil
}

// queue follows the list that a node on a stack may be of, and finds its head: what is not on the stack of the task that it
// names. ok is false if it is no queue of a lock.
func (w *lockWalk) queue(node VirtAddr) (head VirtAddr, waiters []VirtAddr, ok bool, err error) {
	heads := 0
	at := node
	for n := 0; n <= maxWaiters; n++ {
		if err := w.v.ctx.Err(); err != nil {
			return 0, nil, false, err
		}
		if !w.v.img.space.valid(at, 8) {
			return 0, nil, false, nil
		}
		links, err := w.v.pointers("list_head", at, 3)
		if err != nil {
			var corrupt *CorruptError
			if errors.As(err, &corrupt) {
				return 0, nil, false, nil
			}
			return 0, nil, false, err
		}
		next := links[0]
		if !w.v.img.space.valid(next, 8) {
			return 0, nil, false, nil
		}
		back, err := w.v.pointers("list_head", next, 2)
		if err != nil || back[1] != at {
			var corrupt *CorruptError
			if err == nil || errors.As(err, &corrupt) {
				return 0, nil, false, nil
			}
			return 0, nil, false, err
		}
		waiter := at - VirtAddr(w.list)
		owner := links[2]
		if w.owner != w.list+16 {
			if owner, err = w.v.pointer("waiter", waiter+VirtAddr(w.owner)); err != nil {
				return 0, nil, false, nil
			}
		}
		if _, task := w.tasks[owner]; task {
			s, err := w.v.thing(w.task, owner)
			if err != nil {
				return 0, nil, false, err
			}
			if lo := s.ptr("stack"); at >= lo && at < lo+VirtAddr(w.threadSize) {
				waiters = append(waiters, waiter)
				if at = next; at == node {
					break
				}
				continue
			}
		}
		head, heads = at, heads+1
		if at = next; at == node {
			break
		}
	}
	if at != node || heads != 1 {
		return 0, nil, false, nil
	}
	// The first in line is behind the head.
	first, err := w.v.pointer("list_head", head)
	if err != nil {
		return 0, nil, false, err
	}
	if i := slices.Index(waiters, first-VirtAddr(w.list)); i > 0 {
		waiters = append(slices.Clone(waiters[i:]), waiters[:i]...)
	}
	return head, waiters, true, nil
}

// lock tells what kind of lock a queue is of: the functions in which one of the sleepers is say so, and the lock must agree.
func (w *lockWalk) lock(t Task, head VirtAddr, waiters []VirtAddr) error {
	kind, err := w.kind(t)
	if err != nil || kind == "" {
		return err
	}
	w.locks[head] = true
	if len(w.all) == maxLocks {
		return &CorruptError{"lock", head, fmt.Sprintf("more than %d locks", maxLocks)}
	}
	s := map[string]*shape{"mutex": w.mutex, "rwsem": w.rwsem, "semaphore": w.semaphore}[kind]
	l := Lock{Addr: head - VirtAddr(s.offset("wait_list")), Kind: kind}
	if err := w.holder(&l); err != nil {
		return err
	}
	for _, at := range waiters {
		x, err := w.v.thing(w.rwWaiter, at)
		if err != nil {
			return err
		}
		waiter := LockWaiter{LockTask: w.name(x.ptr("task"))}
		waiter.Reads = kind == "rwsem" && int64(x.num("type")) == w.reads
		l.Waiters = append(l.Waiters, waiter)
	}
	if l.Name, err = w.v.nameOf(l.Addr); err != nil {
		return err
	}
	w.all = append(w.all, l)
	return nil
}

// sleepIn are functions that sleep for a lock, by what their names begin with: those of kernel/locking.
var sleepIn = []struct{ prefix, kind string }{
	{"__mutex_lock", "mutex"}, {"__ww_mutex_lock", "mutex"}, {"mutex_lock", "mutex"},
	{"rwsem_down_", "rwsem"}, {"down_read", "rwsem"}, {"down_write", "rwsem"}, {"__down_read", "rwsem"}, {"__down_write", "rwsem"},
	{"__down", "semaphore"}, {"down", "semaphore"},
}

// kind returns what kind of lock a task sleeps for; empty if it does not.
func (w *lockWalk) kind(t Task) (string, error) {
	s, err := w.v.stackOf(t)
	if err != nil {
		if tolerable(err) {
			return "", nil
		}
		return "", err
	}
	for i, f := range s.Frames {
		if i == 8 || f.Guessed && i > 4 {
			break
		}
		for _, in := range sleepIn {
			if strings.HasPrefix(f.Symbol, in.prefix) {
				return in.kind, nil
			}
		}
	}
	return "", nil
}

// holder fills in who holds a lock.
func (w *lockWalk) holder(l *Lock) error {
	var owner VirtAddr
	switch l.Kind {
	case "mutex":
		m, err := w.v.thing(w.mutex, l.Addr)
		if err != nil {
			return err
		}
		if owner = m.ptr("owner.counter"); owner&mutexPickup != 0 {
			return nil // given to the first in line, which has not woken up to take it
		}
		owner &^= mutexFlags
	case "rwsem":
		s, err := w.v.thing(w.rwsem, l.Addr)
		if err != nil {
			return err
		}
		count, word := s.num("count.counter"), s.ptr("owner.counter")
		if count&rwsemWriterHeld == 0 {
			// Bit 63 says that there were too many readers.
			if n := count << 1 >> 1 >> rwsemReaderShift; n <= pidMax {
				l.Readers = int(n)
			} else {
				return s.corrupt("%d readers", n)
			}
			if l.Readers == 0 || word&rwsemReaderOwned == 0 {
				return nil
			}
		}
		owner = word &^ rwsemOwnerFlags
	case "rtmutex":
		m, err := w.v.thing(w.rt, l.Addr)
		if err != nil {
			return err
		}
		owner = m.ptr("owner") &^ 1 // RT_MUTEX_HAS_WAITERS
	default:
		return nil // a semaphore has no owner
	}
	if owner == 0 {
		return nil
	}
	if _, ok := w.tasks[owner]; !ok {
		if owner == w.v.img.lay.task.init {
			l.Owner = &LockTask{Addr: owner, Comm: "swapper/0", State: "R"}
			return nil
		}
		if l.Readers > 0 {
			return nil // the last reader has ended since
		}
		return &CorruptError{l.Kind, l.Addr, fmt.Sprintf("is held by %v, which is no task", owner)}
	}
	o := w.name(owner)
	l.Owner = &o
	return nil
}

func (w *lockWalk) name(at VirtAddr) LockTask {
	t := w.tasks[at]
	return LockTask{at, t.PID, t.TGID, t.Comm, t.State}
}

// rtmutex lists what a task waits for by priority inheritance: the lock of a futex, mostly (struct rt_mutex_waiter).
func (w *lockWalk) rtmutex(t Task, waiter VirtAddr) error {
	x, err := w.v.thing(w.rtWaiter, waiter)
	if err != nil {
		return err
	}
	at := x.ptr("lock")
	if x.ptr("task") != t.Addr {
		return x.corrupt("is of the task at %v, not of that at %v", x.ptr("task"), t.Addr)
	}
	if w.locks[at] {
		return nil
	}
	w.locks[at] = true
	l := Lock{Addr: at, Kind: "rtmutex"}
	if err := w.holder(&l); err != nil {
		return err
	}
	root := at + VirtAddr(w.rt.offset("waiters.rb_root.rb_node"))
	err = w.v.rbtree("rt_mutex_waiter", root, w.pi.offset("tree.entry"), maxWaiters, func(at VirtAddr) error {
		x, err := w.v.thing(w.rtWaiter, at)
		if err != nil {
			return err
		}
		if _, ok := w.tasks[x.ptr("task")]; !ok {
			return x.corrupt("of %v, which is no task", x.ptr("task"))
		}
		l.Waiters = append(l.Waiters, LockWaiter{LockTask: w.name(x.ptr("task"))})
		return nil
	})
	if err != nil {
		return err
	}
	if l.Name, err = w.v.nameOf(l.Addr); err != nil {
		return err
	}
	w.all = append(w.all, l)
	return nil
}

// known adds the big locks that are held.
func (w *lockWalk) known() error {
	for _, k := range knownLocks {
		at, err := w.v.img.syms.symbol(k.name)
		if err != nil {
			continue
		}
		if slices.ContainsFunc(w.all, func(l Lock) bool { return l.Addr == at }) {
			continue
		}
		l := Lock{Addr: at, Kind: k.kind, Name: k.name}
		if err := w.holder(&l); err != nil {
			var corrupt *CorruptError
			if errors.As(err, &corrupt) && !strings.Contains(corrupt.Why, "no task") {
				return err
			}
			continue // its owner has ended, or another kind of lock has the name
		}
		if l.Owner != nil || l.Readers > 0 {
			w.all = append(w.all, l)
		}
	}
	return nil
}

// Deadlocks returns the circles of tasks that wait for each other, by PID: each waits for a lock that the next one holds, the last
// for one that the first holds. Locks that are held for reading are left out: who holds them is not known.
func Deadlocks(locks []Lock) [][]int {
	waitsFor := make(map[int]int)
	for _, l := range locks {
		if l.Owner == nil || l.Readers > 0 {
			continue
		}
		for _, w := range l.Waiters {
			waitsFor[w.PID] = l.Owner.PID
		}
	}
	var circles [][]int
	done := make(map[int]bool)
	for _, l := range locks {
		for _, w := range l.Waiters {
			var path []int
			at := w.PID
			for !done[at] {
				done[at] = true
				path = append(path, at)
				next, ok := waitsFor[at]
				if !ok {
					break
				}
				at = next
			}
			if i := slices.Index(path, at); i >= 0 && len(path) > 0 && waitsFor[path[len(path)-1]] == at {
				circles = append(circles, path[i:])
			}
		}
	}
	return circles
}

// nameOf names an address of data: a symbol, or the kind of slab object that it is in; empty if neither is known.
func (v *View) nameOf(va VirtAddr) (string, error) {
	f, err := v.frame(va)
	if err != nil {
		return "", err
	}
	name := f.Symbol
	offset := f.Offset
	if name == "" || offset > 1<<16 {
		if name, offset, err = v.slabObject(va); err != nil {
			if tolerable(err) || errors.Is(err, ErrNotFound) {
				return "", nil
			}
			return "", err
		}
	}
	if offset > 0 {
		name += fmt.Sprintf("+%#x", offset)
	}
	return name, nil
}
