package kernel

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// taskLayout is where the fields of task_struct and of what hangs on it are (include/linux/sched.h; the alternatives are
// named where they are resolved).
type taskLayout struct {
	err  error
	init VirtAddr // init_task
	span span     // of task_struct

	flags, state, exitState, onCPU, cpu, pid, tgid, comm, tasks, threadNode   uint64
	mm, realParent, cred, signal, utime, stime, runtime, start, nvcsw, nivcsw uint64
	execs                                                                     uint64
	canary                                                                    uint64
	hasCanary                                                                 bool
	threadHead                                                                uint64    // in signal_struct
	users                                                                     [3]uint64 // in cred: uid, suid, euid
	permitted                                                                 uint64    // in cred
	credSpan                                                                  span      // of cred
	rss                                                                       rssLayout
}

// rssLayout is how mm_struct counts resident pages.
type rssLayout struct {
	offset   uint64 // of mm_struct.rss_stat
	counters int    // in it
	// Since Linux commit f1a7941243c1 ("mm: convert mm's rss stats into percpu_counter") (in v6.2) each counter is a
	// percpu_counter; before, an atomic_long_t, and each thread held back up to 64 pages of its own.
	perCPU         bool
	size           uint64 // of one counter
	count, percpus uint64 // in a percpu_counter
	resident       []int  // the counters that make up RSS
}

// Flags and states of task_struct, include/linux/sched.h. They are preprocessor constants, which BTF does not know; these
// have not changed their values since v4.14.
const (
	pfKthread = 0x00200000

	taskUninterruptible = 0x0002
	taskNoload          = 0x0400
	taskIdle            = taskUninterruptible | taskNoload
	taskRTLockWait      = 0x1000 // since v5.16
	taskFrozen          = 0x8000 // since v6.1
	taskReport          = 0x7f

	pidMax       = 4 << 20 // PID_MAX_LIMIT
	listPoison2  = 0xdead000000000122
	commLen      = 16
	maxTasks     = 1 << 18
	maxTaskWalks = 6
)

func (img *Image) taskLayout() taskLayout {
	var l taskLayout
	r := resolver{img: img}
	task := func(size uint64, paths ...string) uint64 {
		return l.span.add(r.field("task_struct", size, paths...), size)
	}
	l.init = r.symbol("init_task")
	l.flags = task(4, "flags")
	// Of 8 bytes until commit 2f064a59a11f ("sched: Change task_struct::state") (in v5.14); the lower half has all states.
	l.state = l.span.add(r.field("task_struct", 0, "__state", "state"), 4)
	l.exitState = task(4, "exit_state")
	// An int; since v7.0 a bool, or whatever else: the lowest byte tells.
	l.onCPU = l.span.add(r.field("task_struct", 0, "on_cpu"), 1)
	l.cpu = task(4, "thread_info.cpu", "cpu") // task_struct.cpu until v5.15 where thread_info is in the task
	l.pid = task(4, "pid")
	l.tgid = task(4, "tgid")
	l.comm = task(commLen, "comm")
	l.tasks = task(16, "tasks")
	l.threadNode = task(16, "thread_node")
	l.mm = task(8, "mm")
	l.realParent = task(8, "real_parent")
	l.cred = task(8, "real_cred")
	l.signal = task(8, "signal")
	l.utime = task(8, "utime")
	l.stime = task(8, "stime")
	l.runtime = task(8, "se.sum_exec_runtime")
	l.start = task(8, "start_time")
	l.nvcsw = task(8, "nvcsw")
	l.nivcsw = task(8, "nivcsw")
	l.execs = l.span.add(r.field("task_struct", 0, "self_exec_id"), 4) // of 8 bytes since v5.7 (commit d1e7fd6462ca)
	if f, err := img.types.field("task_struct", "stack_canary"); err == nil && f.Size == 8 && f.Offset < 1<<20 {
		l.canary, l.hasCanary = f.Offset, true
	}
	l.threadHead = r.field("signal_struct", 16, "thread_head")
	for i, name := range []string{"uid", "suid", "euid"} {
		l.users[i] = l.credSpan.add(r.field("cred", 4, name), 4)
	}
	l.permitted = l.credSpan.add(r.field("cred", 8, "cap_permitted"), 8)
	if r.err == nil && l.credSpan.size() > 4<<10 {
		r.fail(&CorruptError{"BTF", 0, fmt.Sprintf("cred spreads its fields over %d bytes", l.credSpan.size())})
	}
	l.rss = rssLayout{offset: r.field("mm_struct", 0, "rss_stat")}
	if r.err == nil && l.span.size() > 64<<10 {
		r.fail(&CorruptError{"BTF", 0, fmt.Sprintf("task_struct spreads its fields over %d bytes", l.span.size())})
	}
	l.rss.resolve(&r)
	l.err = r.err
	return l
}

// span is where the counters are, in mm_struct.
func (l *rssLayout) span() span {
	return span{l.offset, l.offset + l.size*uint64(l.counters)}
}

func (l *rssLayout) resolve(r *resolver) {
	total, err := r.img.types.field("mm_struct", "rss_stat")
	if err != nil {
		r.fail(err)
		return
	}
	l.size = 8
	if pc, err := r.img.types.field("percpu_counter", "count"); err == nil {
		whole := r.size("percpu_counter")
		if n, err := r.img.types.field("mm_struct", "rss_stat.count"); err != nil || n.Size == 0 {
			l.perCPU, l.size, l.count = true, whole, pc.Offset
			l.percpus = r.field("percpu_counter", 8, "counters")
		}
	}
	if l.size == 0 || total.Size%l.size != 0 || total.Size/l.size > 64 {
		r.fail(&CorruptError{"BTF", 0, fmt.Sprintf("mm_struct.rss_stat of %d bytes", total.Size)})
		return
	}
	l.counters = int(total.Size / l.size)
	for _, name := range []string{"MM_FILEPAGES", "MM_ANONPAGES", "MM_SHMEMPAGES"} {
		i, err := r.img.types.enumerator(name)
		if err != nil || i < 0 || i >= int64(l.counters) {
			r.fail(fmt.Errorf("counter %s of %d: %w", name, l.counters, errors.Join(ErrNotSupported, err)))
			return
		}
		l.resident = append(l.resident, int(i))
	}
}

// errWalkStopped means that the consumer of a walk wants no more.
var errWalkStopped = errors.New("walk stopped")

// Tasks walks the threads of the host: each process's group leader, then its other threads; the idle task of the boot CPU
// (PID 0) is left out. A host that runs while its list is read may tear the walk: it is then begun anew, without saying
// the same task twice; a task's Confident is false when it moved between two looks at it. The error, if any, comes last:
// a *CorruptError when the same thing was found broken twice, ErrTorn when the walk was torn again and again.
func (v *View) Tasks() iter.Seq2[Task, error] { return v.walkTasks(false) }

// TasksRoughly is Tasks, with RSS as the kernel itself reads it (percpu_counter_read_positive): since v6.2 without what each CPU holds back,
// up to 2*nr_cpu_ids or 32 pages for each of three counters, whichever is more. It spares a read for each CPU and counter.
func (v *View) TasksRoughly() iter.Seq2[Task, error] { return v.walkTasks(true) }

func (v *View) walkTasks(roughly bool) iter.Seq2[Task, error] {
	return func(yield func(Task, error) bool) {
		w := taskWalk{v: v, roughly: roughly, seen: make(map[taskKey]taskMark, secondLooks), yield: yield}
		err := w.run()
		if err != nil && !errors.Is(err, errWalkStopped) {
			yield(Task{}, fmt.Errorf("walk tasks: %w", err))
		}
	}
}

// taskKey tells a task from another that later has its memory.
type taskKey struct {
	addr VirtAddr
	pid  uint32
}

// taskMark is what a walk knows of a task that it came by.
type taskMark struct {
	attempt int  // the last one that came by, from 1 on
	said    bool // it was handed out
}

type taskWalk struct {
	v       *View
	roughly bool
	attempt int
	seen    map[taskKey]taskMark
	yield   func(Task, error) bool
	obj     object
	mm      VirtAddr // of which rss is known
	rss     uint64
	ahead   *readAhead // nil where it gains nothing
	held    []Task     // read once, and to be looked at again
}

// secondLooks is how many tasks are looked at again together before they are handed out.
const secondLooks = 128

func (w *taskWalk) run() error {
	if err := w.v.img.lay.task.err; err != nil {
		return err
	}
	var last *CorruptError
	for w.attempt = 1; w.attempt <= maxTaskWalks; w.attempt++ {
		w.ahead = w.v.readAhead()
		err := w.processes()
		if err != errWalkStopped {
			// What came before an error stands.
			if late := w.handOut(); late != nil {
				err = late
			}
		}
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) {
			return err
		}
		if last != nil && *last == *corrupt {
			w.v.note(func(c *Confidence) { c.Broken++ })
			return corrupt
		}
		last = corrupt
		w.v.forget()
	}
	w.v.note(func(c *Confidence) { c.Broken++ })
	return fmt.Errorf("%w: %w", ErrTorn, last)
}

// processes walks init_task.tasks once.
func (w *taskWalk) processes() error {
	l := &w.v.img.lay.task
	w.mm = 0
	init, err := w.read(l.init, 0)
	if err != nil {
		return err
	}
	if init.PID != 0 {
		return &CorruptError{"init_task", l.init, fmt.Sprintf("PID %d", init.PID)}
	}
	prev, next := l.init, init.next
	for next != l.init {
		if err := w.v.ctx.Err(); err != nil {
			return err
		}
		t, err := w.read(next, 0)
		if err != nil {
			return err
		}
		if t.prev == listPoison2-VirtAddr(l.tasks) {
			// Unlinked while we came here; list_del_rcu leaves the way on intact.
			prev, next = next, t.next
			continue
		}
		if t.PID != t.TGID {
			return &CorruptError{"task_struct", next, fmt.Sprintf("PID %d of process %d leads a process", t.PID, t.TGID)}
		}
		if t.prev != prev {
			t.Confident = false
		}
		if err := w.emit(&t); err != nil {
			return err
		}
		if err := w.threads(&t); err != nil {
			return err
		}
		prev, next = t.Addr, t.next
	}
	w.v.note(func(c *Confidence) { c.Lists++ })
	return nil
}

// threads walks the other threads of a process by signal_struct.thread_head.
func (w *taskWalk) threads(leader *taskRecord) error {
	l := &w.v.img.lay.task
	head := leader.signal + VirtAddr(l.threadHead)
	for node := leader.threadNext; node != head; {
		addr := node - VirtAddr(l.threadNode)
		if addr == leader.Addr {
			return &CorruptError{"signal_struct", leader.signal, "list of threads does not end"}
		}
		t, err := w.read(addr, leader.signal)
		if err != nil {
			return err
		}
		if t.threadPrev != listPoison2 {
			if t.TGID != leader.TGID {
				return &CorruptError{"task_struct", addr, fmt.Sprintf("thread of process %d among those of %d", t.TGID, leader.TGID)}
			}
			if err := w.emit(&t); err != nil {
				return err
			}
		} else if _, err := w.visit(&t); err != nil {
			return err
		}
		node = t.threadNext
	}
	return nil
}

// visit notes that this attempt came by a task, and finds cycles. It reports whether the task was handed out before.
func (w *taskWalk) visit(t *taskRecord) (said bool, err error) {
	key := taskKey{t.Addr, uint32(t.PID)}
	m, ok := w.seen[key]
	if !ok && len(w.seen) >= maxTasks {
		return false, &CorruptError{"task list", t.Addr, fmt.Sprintf("more than %d tasks", maxTasks)}
	}
	if m.attempt == w.attempt {
		return false, &CorruptError{"task_struct", t.Addr, fmt.Sprintf("PID %d is twice in the list", t.PID)}
	}
	m.attempt = w.attempt
	w.seen[key] = m
	return m.said, nil
}

// emit hands a task out, unless an earlier attempt did.
func (w *taskWalk) emit(t *taskRecord) error {
	said, err := w.visit(t)
	if err != nil || said {
		return err
	}
	if err := w.complete(t); err != nil {
		return err
	}
	if w.held == nil {
		w.held = make([]Task, 0, secondLooks)
	}
	if w.held = append(w.held, t.Task); len(w.held) < secondLooks {
		return nil
	}
	return w.handOut()
}

// handOut looks a second time, past the cache, whether the tasks that are held are still those that were read, and hands them out.
func (w *taskWalk) handOut() error {
	held := w.held
	w.held = held[:0]
	segs := make([]hostmem.Segment, len(held))
	pids := make([]byte, 4*len(held))
	for i := range held {
		t := &held[i]
		pa, err := w.v.Phys(t.Addr + VirtAddr(w.v.img.lay.task.pid))
		if errors.Is(err, ErrNotMapped) {
			return &CorruptError{"task_struct", t.Addr, err.Error()}
		}
		if err != nil {
			return err
		}
		segs[i] = hostmem.Segment{Addr: pa, Buf: pids[4*i:][:4]}
	}
	if len(held) == 0 {
		return nil
	}
	if err := w.v.readScattered(segs); err != nil && !slices.ContainsFunc(segs, func(s hostmem.Segment) bool { return s.Err != nil }) {
		return err // it was not begun
	}
	for i := range held {
		t := &held[i]
		switch err := segs[i].Err; {
		case errors.Is(err, hostmem.ErrNotMapped):
			return &CorruptError{"task_struct", t.Addr, fmt.Sprintf("points to no memory (%v)", err)}
		case err != nil:
			return fmt.Errorf("read task_struct at %v again: %w", t.Addr, err)
		}
		if int(le32(segs[i].Buf)) != t.PID {
			t.Confident = false
		}
		w.v.note(func(c *Confidence) {
			c.Objects++
			c.Twice++
			if !t.Confident {
				c.Changed++
			}
		})
		w.seen[taskKey{t.Addr, uint32(t.PID)}] = taskMark{w.attempt, true}
		if !w.yield(*t, nil) {
			return errWalkStopped
		}
	}
	return nil
}

// taskRecord is a Task with its links.
type taskRecord struct {
	Task
	next, prev             VirtAddr // of the list of processes, as task_struct
	threadNext, threadPrev VirtAddr // of the list of threads, as nodes
	mm, parent, cred       VirtAddr
	signal                 VirtAddr
	exitState              uint32
}

// read reads and validates one task_struct: in one piece, so that its fields belong together as well as can be. signal, if
// not zero, is the signal_struct that the task must have.
func (w *taskWalk) read(addr, signal VirtAddr) (taskRecord, error) {
	w.ahead.before(addr)
	return w.v.img.readTask(w.v, &w.obj, addr, signal)
}

func (img *Image) readTask(src source, o *object, addr, signal VirtAddr) (taskRecord, error) {
	const kind = "task_struct"
	l, s := &img.lay.task, img.space
	if !s.valid(addr, 8) {
		return taskRecord{}, &CorruptError{kind, addr, "not an address of the kernel"}
	}
	if err := o.load(s, src, kind, l.span, addr); err != nil {
		return taskRecord{}, err
	}
	pid, tgid := o.u32(l.pid), o.u32(l.tgid)
	comm, ended := cString(o.at(l.comm, commLen))
	state, exit := o.u32(l.state), o.u32(l.exitState)
	t := taskRecord{
		Task: Task{
			Addr: addr, PID: int(pid), TGID: int(tgid), Comm: comm,
			State:   stateLetter(state, exit),
			CPU:     int(o.u32(l.cpu)),
			OnCPU:   o.at(l.onCPU, 1)[0] != 0,
			KThread: o.u32(l.flags)&pfKthread != 0,
			UTime:   time.Duration(o.u64(l.utime)), STime: time.Duration(o.u64(l.stime)),
			Runtime:   time.Duration(o.u64(l.runtime)),
			Start:     time.Duration(o.u64(l.start)),
			Switches:  o.u64(l.nvcsw) + o.u64(l.nivcsw),
			Execs:     o.u32(l.execs),
			Confident: true,
		},
		next: o.ptr(l.tasks) - VirtAddr(l.tasks), prev: o.ptr(l.tasks+8) - VirtAddr(l.tasks),
		threadNext: o.ptr(l.threadNode), threadPrev: o.ptr(l.threadNode + 8),
		mm: o.ptr(l.mm), parent: o.ptr(l.realParent), cred: o.ptr(l.cred), signal: o.ptr(l.signal), exitState: exit,
	}
	bad := func(format string, args ...any) (taskRecord, error) {
		return taskRecord{}, &CorruptError{kind, addr, fmt.Sprintf(format, args...)}
	}
	switch {
	case pid > pidMax || tgid > pidMax:
		return bad("PID %d of process %d", int32(pid), int32(tgid))
	case !ended:
		return bad("comm does not end")
	case t.CPU < 0 || t.CPU >= len(img.perCPU):
		return bad("on CPU %d of %d", t.CPU, len(img.perCPU))
	case !s.valid(t.next, 8), !s.valid(t.threadNext, 8):
		return bad("next task at %v, next thread at %v", t.next, t.threadNext)
	case !s.valid(t.parent, 8), !s.valid(t.cred, 8), !s.valid(t.signal, 8):
		return bad("real_parent %v, real_cred %v, signal %v", t.parent, t.cred, t.signal)
	case t.mm != 0 && !s.valid(t.mm, 8):
		return bad("mm %v", t.mm)
	case signal != 0 && t.signal != signal:
		return bad("signal_struct %v, its process has %v", t.signal, signal)
	}
	return t, nil
}

// complete adds what other objects tell.
func (w *taskWalk) complete(t *taskRecord) error {
	img := w.v.img
	if err := img.related(w.v, t); err != nil {
		return err
	}
	if t.mm != w.mm || t.mm == 0 {
		rss, err := img.rss(w.v, t.mm, w.roughly)
		if err != nil {
			return err
		}
		w.mm, w.rss = t.mm, rss
	}
	t.RSS = w.rss
	return nil
}

// related adds the parent's and the credentials' part of a task.
func (img *Image) related(src source, t *taskRecord) error {
	l := &img.lay.task
	tgid, err := img.space.word32(src, "task_struct", t.parent+VirtAddr(l.tgid))
	if err != nil {
		return err
	}
	if t.PPID = int(int32(tgid)); t.PPID < 0 || t.PPID > pidMax {
		return &CorruptError{"task_struct", t.parent, fmt.Sprintf("parent of PID %d has PID %d", t.PID, t.PPID)}
	}
	t.Cred = t.cred
	var o object
	if err := o.load(img.space, src, "cred", l.credSpan, t.cred); err != nil {
		return err
	}
	t.UID = o.u32(l.users[2])
	t.MaySetUID = o.u64(l.permitted)&(1<<capSetUID) != 0 || o.u32(l.users[0]) == 0 || o.u32(l.users[1]) == 0 || t.UID == 0
	return nil
}

const capSetUID = 7 // CAP_SETUID, include/uapi/linux/capability.h

// rss returns the resident bytes of an mm_struct. Counters that were caught in motion are taken as they are, but not below
// zero; the kernel itself knows them no better.
func (img *Image) rss(src source, mm VirtAddr, roughly bool) (uint64, error) {
	if mm == 0 {
		return 0, nil
	}
	l := &img.lay.task.rss
	var o object
	if err := o.load(img.space, src, "mm_struct", l.span(), mm); err != nil {
		return 0, err
	}
	var pages int64
	for _, i := range l.resident {
		n, err := img.counter(src, mm, o.b, i, roughly)
		if err != nil {
			return 0, err
		}
		pages += n
	}
	if pages > 1<<40 {
		return 0, &CorruptError{"mm_struct", mm, fmt.Sprintf("%d resident pages", pages)}
	}
	return uint64(pages) * img.pageSize, nil
}

// mmCounter reads a single counter of an mm_struct.
func (img *Image) mmCounter(src source, mm VirtAddr, i int) (int64, error) {
	var o object
	if err := o.load(img.space, src, "mm_struct", img.lay.task.rss.span(), mm); err != nil {
		return 0, err
	}
	return img.counter(src, mm, o.b, i, false)
}

// counter returns a counter of rss_stat, which is in b, with what each CPU holds of it, or roughly without; not below zero.
func (img *Image) counter(src source, mm VirtAddr, b []byte, i int, roughly bool) (int64, error) {
	l := &img.lay.task.rss
	c := b[uint64(i)*l.size:][:l.size]
	if !l.perCPU {
		return max(0, int64(le64(c))), nil
	}
	n := int64(le64(c[l.count:]))
	if roughly {
		return max(0, n), nil
	}
	at := VirtAddr(le64(c[l.percpus:]))
	for cpu, offset := range img.perCPU {
		if offset == 0 || at == 0 {
			continue // a CPU that cannot be, or an mm that is being torn down
		}
		va := at + offset
		if !img.space.valid(va, 4) {
			return 0, &CorruptError{"mm_struct", mm, fmt.Sprintf("counter %d of CPU %d at %v", i, cpu, va)}
		}
		part, err := img.space.word32(src, "percpu_counter", va)
		if err != nil {
			return 0, err
		}
		n += int64(int32(part))
	}
	return max(0, n), nil
}

// stateLetter is what ps(1) shows: task_state_index of include/linux/sched.h and task_state_array of fs/proc/array.c.
func stateLetter(state, exit uint32) string {
	report := (state | exit) & taskReport
	switch {
	case state&(taskRTLockWait|taskFrozen) != 0:
		return "D"
	case state&taskIdle == taskIdle:
		return "I"
	}
	i := 0
	for ; report != 0; report >>= 1 {
		i++
	}
	return "RSDTtXZP"[i : i+1]
}
