package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
)

// Lock is a sleeping lock of the kernel that tasks wait for, or that is known by name and held.
type Lock struct {
	Addr VirtAddr `json:"addr"`
	Kind string   `json:"kind"` // mutex, rwsem, semaphore or rtmutex; of a kernel built for real time also spinlock and rwlock, which sleep there
	// Name is that of the lock itself (rtnl_mutex), or the kind of object that it is in and where (inode_cache+0xa0).
	Name  string    `json:"name,omitempty"`
	Owner *LockTask `json:"owner,omitempty"` // nil if nobody holds it, or the kernel does not record who
	// Readers is how many hold an rwsem for reading. Owner is then the one that took it last, and may have let go; a kernel built
	// for real time does not record it.
	Readers int          `json:"readers,omitempty"`
	Waiters []LockWaiter `json:"waiters"` // the first in line first
	// Leaked says that it was never given back: who holds it has ended.
	Leaked bool `json:"leaked,omitempty"`
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
	mutexWaiters     = 1

	// include/linux/rwbase_rt.h: how rwbase_rt.readers counts, since v5.15.
	rwbaseReaderBias = 1 << 31 // no writer is there, or waits
	rwbaseWriterBias = 1 << 30 // a writer has it
)

// knownLocks are locks of the whole kernel that much depends on: these are told when they are held, even if no one waits.
var knownLocks = []struct{ name, kind string }{
	{"rtnl_mutex", "mutex"}, {"cgroup_mutex", "mutex"}, {"pernet_ops_rwsem", "rwsem"}, {"namespace_sem", "rwsem"}, {"module_mutex", "mutex"},
	{"slab_mutex", "mutex"}, {"wq_pool_mutex", "mutex"}, {"text_mutex", "mutex"}, {"event_mutex", "mutex"}, {"cpu_add_remove_lock", "mutex"},
	{"console_sem", "semaphore"}, {"tracepoints_mutex", "mutex"}, {"kprobe_mutex", "mutex"}, {"jump_label_mutex", "mutex"}, {"system_transition_mutex", "mutex"},
	{"oom_lock", "mutex"}, {"oom_adj_mutex", "mutex"}, {"pcpu_alloc_mutex", "mutex"}, {"vmap_purge_lock", "mutex"}, {"sched_domains_mutex", "mutex"},
}

// The ways in which kernels queue for their sleeping locks.
const (
	headed   = iota // a list, whose head is in the lock
	headless        // a circle, of which the lock has the first: since v7.0
	realTime        // CONFIG_PREEMPT_RT: all but the semaphore by rt_mutex_base
)

type lockWalk struct {
	v                                 *View
	queues                            int // headed, headless or realTime
	semHeadless                       bool
	rtWord, rtReaders                 map[string]uint64 // realTime: of a kind of lock, where its rt_mutex_base and its count of readers are
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
	// gone are holders by lock that are no tasks, as walks before this have seen them: who is none in two of them has ended. doubt is of the first that
	// only this one has seen.
	gone  map[VirtAddr]VirtAddr
	doubt error
}

// Locks lists the mutexes, reader-writer semaphores, semaphores and priority-inheriting mutexes that tasks sleep on, with who
// holds them and who waits, and those of the kernel's own big locks that are held. No kernel keeps a list of its locks: a
// sleeper's place in the queue is found on its stack, and counts only if the queue around it is whole. Since v7.0 the queue of a lock
// no longer leads to the lock, which is then what a stack of the queue points to and whose first waiter is of the queue. A kernel
// built for real time says by task_struct.pi_blocked_on what a task waits for; only who waits for readers to go is found by its stack.
//
// A lock that spins does not show here.
func (v *View) Locks() iter.Seq2[Lock, error] {
	gone := make(map[VirtAddr]VirtAddr)
	return settled(v, "walk locks", func() ([]Lock, error) {
		w := lockWalk{v: v, tasks: make(map[VirtAddr]Task), locks: make(map[VirtAddr]bool), gone: gone}
		err := w.run()
		if err == nil && w.doubt != nil {
			err = w.doubt
		}
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
		if len(k.Waiters) == 0 {
			continue
		}
		pieces = append(pieces, w.word(k))
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
			k.Owner, k.Readers, k.Leaked = nil, 0, false
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
	if slices.ContainsFunc(kept, func(k Lock) bool { return k.Leaked }) {
		return w.ended()
	}
	return nil
}

// ended looks at the tasks anew for who holds a lock and was not among them: it may have been made since they were listed, may hide, or be the
// idle task of a CPU.
func (w *lockWalk) ended() error {
	v := w.v.img.View(w.v.ctx)
	defer v.Close()
	var tasks []Task
	for t, err := range v.Tasks() {
		if err != nil {
			return err
		}
		tasks = append(tasks, t)
	}
	s, err := v.SignsAmong(tasks)
	if err != nil {
		return err
	}
	known := make(map[VirtAddr]LockTask)
	for _, t := range slices.Concat(tasks, s.Hidden) {
		known[t.Addr] = LockTask{t.Addr, t.PID, t.TGID, t.Comm, t.State}
	}
	r := resolver{img: v.img}
	idle := r.symbol("runqueues") + VirtAddr(r.field("rq", 8, "idle"))
	if r.err != nil {
		return r.err
	}
	for cpu, offset := range v.img.perCPU {
		if offset == 0 {
			continue
		}
		at, err := v.pointer("runqueues", idle+offset)
		if err != nil {
			return err
		}
		known[at] = LockTask{Addr: at, Comm: fmt.Sprintf("swapper/%d", cpu), State: "R"}
	}
	for i := range w.all {
		l := &w.all[i]
		if t, ok := known[w.gone[l.Addr]]; ok && l.Leaked {
			l.Leaked, l.Owner = false, &t
		}
	}
	return nil
}

// word returns the word of a lock that says who holds it.
func (w *lockWalk) word(k Lock) piece {
	if base, ok := w.rtWord[k.Kind]; ok {
		if k.Readers > 0 {
			return piece{k.Addr + VirtAddr(w.rtReaders[k.Kind]), 4}
		}
		return piece{k.Addr + VirtAddr(base+w.rt.offset("owner")), 8}
	}
	s := map[string]*shape{"mutex": w.mutex, "rwsem": w.rwsem, "rtmutex": w.rt}[k.Kind]
	if s == nil {
		return piece{k.Addr, 8} // a semaphore, which has no owner: whatever it begins with
	}
	return piece{k.Addr + VirtAddr(s.fields["owner.counter"].Offset+s.fields["owner"].Offset), 8}
}

func (w *lockWalk) resolve() error {
	types := w.v.img.types
	has := func(typ, field string) bool { _, err := types.field(typ, field); return err == nil }
	r := resolver{img: w.v.img}
	w.task = r.shape("task_struct", "stack", "thread.sp|thread.cpu_context.sp", "pi_blocked_on?", "stack_vm_area?")
	const first = "wait_list|first_waiter[]"
	w.semHeadless = has("semaphore", "first_waiter")
	w.semaphore = r.shape("semaphore", "count", first)
	w.semWaiter = r.shape("semaphore_waiter", "list[]", "task")
	alike := []*shape{w.semWaiter}
	switch {
	case has("mutex", "rtmutex"):
		w.queues = realTime
		w.rwWaiter = w.semWaiter // the only ones in a list
		w.rtWord = map[string]uint64{"mutex": r.field("mutex", 0, "rtmutex"), "rwsem": r.field("rw_semaphore", 0, "rwbase.rtmutex")}
		w.rtReaders = map[string]uint64{"rwsem": r.field("rw_semaphore", 4, "rwbase.readers")}
		if spin, err := types.field("spinlock", "lock"); err == nil {
			w.rtWord["spinlock"] = spin.Offset
		}
		if rw, err := types.field("rwbase_rt", "rtmutex"); err == nil && has("rwlock_t", "rwbase") {
			w.rtWord["rwlock"] = r.field("rwlock_t", 0, "rwbase") + rw.Offset
			w.rtReaders["rwlock"] = r.field("rwlock_t", 4, "rwbase.readers")
		}
	default:
		if has("mutex", "first_waiter") {
			w.queues = headless
		}
		w.mutex = r.shape("mutex", "owner.counter", first)
		w.rwsem = r.shape("rw_semaphore", "count.counter", "owner.counter", first)
		w.mutexWaiter = r.shape("mutex_waiter", "list[]", "task")
		w.rwWaiter = r.shape("rwsem_waiter", "list[]", "task", "type")
		alike = append(alike, w.mutexWaiter, w.rwWaiter)
	}
	if r.err != nil {
		return r.err
	}
	var err error
	if w.queues != realTime {
		if w.reads, err = types.enum("rwsem_waiter_type", "RWSEM_WAITING_FOR_READ"); err != nil {
			return fmt.Errorf("%w: %w", ErrNotSupported, err)
		}
	}
	// One offset for all: what looks like a waiter is found first, and then what kind it is of.
	w.list, w.owner = w.semWaiter.offset("list"), w.semWaiter.offset("task")
	for _, s := range alike {
		if s.offset("list") != w.list || s.offset("task") != w.owner {
			return fmt.Errorf("%s is unlike semaphore_waiter: %w", s.typ, ErrNotSupported)
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
		if w.queues == realTime {
			return try.err
		}
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
	if w.queues == realTime && s.ptr("pi_blocked_on") == 0 {
		if kind, _, err := w.kind(t); err != nil || kind == "rwsem" {
			return errors.Join(err, w.drains(t, b))
		}
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
		if !ok || head != 0 && w.locks[head] {
			continue
		}
		if err := w.lock(t, head, waiters); err != nil {
			return err
		}
	}
	return nil
}

// drains tells the rwsem of a real-time kernel that a writer has for itself already but for the readers that are to go
// (rwbase_write_lock): of what its stack points to, the one whose rt_mutex_base it owns while there are readers. stack is the part of
// the stack where that is.
func (w *lockWalk) drains(t Task, stack []byte) error {
	for i := 0; i+8 <= len(stack); i += 8 {
		at := VirtAddr(le64(stack[i:]))
		if !w.v.img.space.valid(at, 8) || w.locks[at] {
			continue
		}
		owner, err := w.v.pointer("rw_semaphore", at+VirtAddr(w.rtWord["rwsem"]+w.rt.offset("owner")))
		if err != nil || owner&^1 != t.Addr {
			if err != nil && !tolerable(err) {
				return err
			}
			continue
		}
		l := Lock{Addr: at, Kind: "rwsem"}
		if err := w.holder(&l); err != nil || l.Readers == 0 {
			if err != nil && !tolerable(err) {
				return err
			}
			continue
		}
		w.locks[at] = true
		l.Waiters = []LockWaiter{{LockTask: w.name(t.Addr)}}
		return w.add(l)
	}
	return nil
}

// add tells a lock.
func (w *lockWalk) add(l Lock) (err error) {
	if len(w.all) == maxLocks {
		return &CorruptError{"lock", l.Addr, fmt.Sprintf("more than %d locks", maxLocks)}
	}
	if l.Name, err = w.v.nameOf(l.Addr); err == nil {
		w.all = append(w.all, l)
	}
	return err
}

// ofQueue finds the lock whose queue is a circle of waiters: on their stacks there is a pointer to it, since they will need it. Its word
// must say that somebody waits. It is 0 if there is none.
func (w *lockWalk) ofQueue(kind string, s *shape, waiters []VirtAddr) (lock, first VirtAddr, err error) {
	for _, at := range waiters {
		x, err := w.v.thing(w.semWaiter, at)
		if err != nil {
			return 0, 0, err
		}
		t, err := w.v.thing(w.task, x.ptr("task"))
		if err != nil {
			return 0, 0, err
		}
		lo, sp := t.ptr("stack"), t.ptr("thread.sp")
		if sp < lo || sp >= lo+VirtAddr(w.threadSize) || sp%8 != 0 {
			continue
		}
		b := make([]byte, min(uint64(lo+VirtAddr(w.threadSize)-sp), 2048))
		if err := w.v.img.space.object(w.v, "stack", sp, b); err != nil {
			return 0, 0, err
		}
		for i := 0; i < len(b); i += 8 {
			lock := VirtAddr(le64(b[i:]))
			if !w.v.img.space.valid(lock, 8) {
				continue
			}
			first, err := w.v.pointer(kind, lock+VirtAddr(s.offset("wait_list")))
			if err == nil && slices.Contains(waiters, first) {
				l, err := w.v.thing(s, lock)
				if err != nil {
					return 0, 0, err
				}
				if kind == "mutex" && l.num("owner.counter")&mutexWaiters == 0 || kind == "rwsem" && l.num("count.counter")&rwsemWaiters == 0 {
					continue
				}
				return lock, first, nil
			}
			if err != nil && !tolerable(err) {
				return 0, 0, err
			}
		}
	}
	return 0, 0, nil
}

// queue follows the list that a node on a stack may be of, and finds its head: what is not on the stack of the task that it
// names; a circle of waiters alone has none, 0. ok is false if it is no queue of a lock.
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
	if at != node || heads > 1 || len(waiters) == 0 {
		return 0, nil, false, nil
	}
	if heads == 0 {
		return 0, waiters, true, nil
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
	kind, _, err := w.kind(t)
	if err != nil {
		return err
	}
	s := map[string]*shape{"mutex": w.mutex, "rwsem": w.rwsem, "semaphore": w.semaphore}[kind]
	if circle := w.queues == headless || kind == "semaphore" && w.semHeadless; s == nil || circle != (head == 0) {
		return nil
	}
	at := head - VirtAddr(s.offset("wait_list"))
	if head == 0 {
		var first VirtAddr
		if at, first, err = w.ofQueue(kind, s, waiters); err != nil || at == 0 {
			return err
		}
		i := slices.Index(waiters, first)
		waiters, head = append(slices.Clone(waiters[i:]), waiters[:i]...), at+VirtAddr(s.offset("wait_list"))
		if w.locks[head] {
			return nil
		}
	}
	w.locks[head] = true
	l := Lock{Addr: at, Kind: kind}
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
	return w.add(l)
}

// sleepIn are functions that sleep for a lock, by what their names begin with: those of kernel/locking.
var sleepIn = []struct{ prefix, kind string }{
	{"__mutex_lock", "mutex"}, {"__ww_mutex_lock", "mutex"}, {"mutex_lock", "mutex"},
	{"rwsem_down_", "rwsem"}, {"down_read", "rwsem"}, {"down_write", "rwsem"}, {"__down_read", "rwsem"}, {"__down_write", "rwsem"},
	{"rwbase_", "rwsem"}, {"__rwbase_", "rwsem"}, {"rt_spin_lock", "spinlock"}, {"rt_read_lock", "rwlock"}, {"rt_write_lock", "rwlock"},
	{"futex_", "rtmutex"}, {"rt_mutex_lock", "rtmutex"},
	{"__down", "semaphore"}, {"down", "semaphore"},
}

// slowIn are those of a kernel built for real time that all its kinds of locks have in common: what called them may have jumped there,
// and not be on the stack, only if it was that of the kind that is said here.
var slowIn = []struct{ prefix, kind string }{{"rt_mutex_slowlock", "mutex"}, {"__rt_mutex_slowlock", "mutex"}, {"rtlock_slowlock", "spinlock"}}

// kind returns what kind of lock a task sleeps for, and whether to read; empty if it does not.
func (w *lockWalk) kind(t Task) (kind string, reads bool, err error) {
	s, err := w.v.stackOf(t)
	if err != nil {
		if tolerable(err) {
			return "", false, nil
		}
		return "", false, err
	}
	for i, f := range s.Frames {
		if i == 8 || f.Guessed && i > 4 {
			break
		}
		for _, in := range slowIn {
			if w.queues == realTime && strings.HasPrefix(f.Symbol, in.prefix) {
				kind = in.kind
			}
		}
		for _, in := range sleepIn {
			if strings.HasPrefix(f.Symbol, in.prefix) {
				return in.kind, strings.Contains(f.Symbol, "read"), nil
			}
		}
	}
	return kind, false, nil
}

// holder fills in who holds a lock.
func (w *lockWalk) holder(l *Lock) error {
	var owner VirtAddr
	base, rt := w.rtWord[l.Kind]
	if readers, ok := w.rtReaders[l.Kind]; ok {
		n, err := w.v.Uint32(l.Addr + VirtAddr(readers))
		if err != nil {
			return err
		}
		if n != rwbaseWriterBias {
			if n &^= rwbaseReaderBias; n > pidMax {
				return &CorruptError{l.Kind, l.Addr, fmt.Sprintf("%d readers", n)}
			}
			l.Readers = int(n)
			if n > 0 {
				return nil
			}
		}
	}
	switch kind := l.Kind; {
	case rt || kind == "rtmutex":
		m, err := w.v.thing(w.rt, l.Addr+VirtAddr(base))
		if err != nil {
			return err
		}
		owner = m.ptr("owner") &^ 1 // RT_MUTEX_HAS_WAITERS
	case kind == "mutex":
		m, err := w.v.thing(w.mutex, l.Addr)
		if err != nil {
			return err
		}
		if owner = m.ptr("owner.counter"); owner&mutexPickup != 0 {
			return nil // given to the first in line, which has not woken up to take it
		}
		owner &^= mutexFlags
	case kind == "rwsem":
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
		if w.gone[l.Addr] == owner {
			l.Leaked = true
			return nil
		}
		w.gone[l.Addr] = owner
		w.doubt = cmp.Or[error](w.doubt, &CorruptError{l.Kind, l.Addr, fmt.Sprintf("is held by %v, which is no task", owner)})
		return nil
	}
	o := w.name(owner)
	l.Owner = &o
	return nil
}

func (w *lockWalk) name(at VirtAddr) LockTask {
	t := w.tasks[at]
	return LockTask{at, t.PID, t.TGID, t.Comm, t.State}
}

// rtmutex lists what a task waits for by priority inheritance: the lock of a futex, mostly (struct rt_mutex_waiter), and any lock of a
// kernel built for real time.
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
	if kind, _, err := w.kind(t); err != nil {
		return err
	} else if base, ok := w.rtWord[kind]; ok {
		l.Addr, l.Kind = at-VirtAddr(base), kind
	}
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
		waiter := LockWaiter{LockTask: w.name(x.ptr("task"))}
		if w.queues == realTime && (l.Kind == "rwsem" || l.Kind == "rwlock") {
			if _, waiter.Reads, err = w.kind(w.tasks[x.ptr("task")]); err != nil {
				return err
			}
		}
		l.Waiters = append(l.Waiters, waiter)
		return nil
	})
	if err != nil {
		return err
	}
	return w.add(l)
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
