package heal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// StopForkBomb is the ID of the action that stops a fork bomb.
const StopForkBomb = "stop-fork-bomb"

// ErrNotYet means that what was done has not taken effect yet: ask again in a moment.
var ErrNotYet = errors.New("not yet")

const (
	batch           = 64  // signals in one plan: bounded by what one record of the journal holds
	signalGroupExit = 0x4 // SIGNAL_GROUP_EXIT, include/linux/sched/signal.h
	slotAlign       = 64
	batchRunTimeout = 6 * time.Second
)

// stopForkBomb bars new tasks, kills the tree, the youngest first but where there is no room for that (see heads), in batches of which each is run within
// one timer tick, and lifts the bar. For the tree of a user it is he who starts nothing new meanwhile. No limit of processes holds root: for a tree
// of his, and of who has none, nobody on the host can start a task or a thread as long as the repair lasts, and programs that cannot bear that
// (Go's runtime ends a program that gets no thread) may end. Where signals are scarce, what runs is left no time by cpuLimit, and only what sleeps
// is sent signals.
func stopForkBomb() Action {
	return Action{
		ID: StopForkBomb, Title: "Bar new tasks, and end the tree with SIGKILL, the youngest first", Risk: RiskTask,
		For: []detect.Kind{detect.KindForkBomb},
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to bar new tasks: no kernel is attached: %w", kernel.ErrNotFound)
			}
			m := newModel(v)
			if f.Culprit.UID != nil && *f.Culprit.UID != 0 {
				p, err := planAccount(m, f)
				if err == nil || !errors.Is(err, errLimitless) && !errors.Is(err, kernel.ErrNotFound) && !errors.Is(err, kernel.ErrNotSupported) {
					return p, err
				}
			}
			return planBar(m, f)
		},
		Next: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, bool, error) {
			return planBatch(newModel(v), f)
		},
	}
}

// scarce reports whether a tree cannot be ended by signals alone: there is one page for them, or no way to send them.
func scarce(m model) bool {
	_, err := newSignaller(m)
	return m.Info().Arch == archAArch64 || errors.Is(err, kernel.ErrNotSupported)
}

// planBar plans to set max_threads, above which copy_process of kernel/fork.c refuses, to nothing.
func planBar(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to bar new tasks: %w", err) }
	if f.Culprit.Tree == 0 || f.Culprit.UID == nil {
		return fail(fmt.Errorf("the finding names no tree of tasks: %w", kernel.ErrNotFound))
	}
	id := Identify(m.Info())
	va, err := m.Symbol("max_threads")
	if err != nil {
		return fail(err)
	}
	pa, err := m.Phys(va)
	if err != nil {
		return fail(err)
	}
	most, err := read32(m, va)
	if err != nil {
		return fail(err)
	}
	if most == 0 || most > 1<<30 {
		return fail(fmt.Errorf("max_threads is %d: somebody else bars new tasks: %w", most, kernel.ErrNotSupported))
	}
	return Plan{
		Action: StopForkBomb, Finding: f.ID, Risk: RiskTask, Kernel: &id, More: true,
		Title: fmt.Sprintf("bar new tasks, then end the tree of %q (PID %d), %d tasks by now", f.Culprit.Comm, f.Culprit.PID, f.Culprit.Tree),
		Steps: []Step{{
			Op: OpWrite, Why: "nothing new is started while the tree is ended", Object: "max_threads", Hold: true,
			Addr: pa, Virt: va, Expect: le(uint64(most), 4), Put: le(0, 4), Undo: true,
		}},
	}, nil
}

const (
	rlimitNproc = 6 // RLIMIT_NPROC, include/uapi/asm-generic/resource.h
	// A user's account says that he has so many processes more, in its upper half: no limit that is one is as high, and it stays positive, which the
	// kernel warns of else (dec_rlimit_ucounts). The lower half goes on counting.
	accountBarred = 0x3fffffff
	limitless     = accountBarred << 32
	mostLimits    = 64      // processes whose limits are looked at
	mostTasks     = 4 << 20 // PID_MAX_LIMIT, include/linux/threads.h
)

// errLimitless means that no count of processes holds those who are to be barred.
var errLimitless = errors.New("no limit of processes holds them")

// planAccount plans to have the user's account of processes, ucounts.rlimit[UCOUNT_RLIMIT_NPROC] (Linux 6.0 and later; one for each user
// namespace that he is in), say that he has too many: copy_process of kernel/fork.c refuses him then, whoever of his tries, and nobody else. What
// his limit is does not matter, as long as there is one.
func planAccount(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to bar new tasks of a user: %w", err) }
	if f.Culprit.Tree == 0 || f.Culprit.UID == nil {
		return fail(fmt.Errorf("the finding names no tree of tasks: %w", kernel.ErrNotFound))
	}
	uid := *f.Culprit.UID
	l := layout{m: m}
	credAt, realAt := l.field("task_struct", "real_cred", 8), l.field("cred", "uid.val", 4)
	accountAt, ownerAt := l.field("cred", "ucounts", 8), l.field("ucounts", "uid.val", 4)
	if l.err != nil {
		return fail(l.err)
	}
	counts, err := m.Field("ucounts", "rlimit")
	if err != nil {
		return fail(err)
	}
	which, err := m.Enum("rlimit_type", "UCOUNT_RLIMIT_NPROC")
	if err != nil {
		return fail(err)
	}
	if which < 0 || uint64(which+1)*8 > counts.Size {
		return fail(fmt.Errorf("ucounts.rlimit has %d bytes, and UCOUNT_RLIMIT_NPROC is %d: %w", counts.Size, which, kernel.ErrNotSupported))
	}
	upper := counts.Offset + uint64(which)*8 + 4
	limits, err := newRlimits(m)
	if err != nil {
		return fail(err)
	}
	var tasks []kernel.Task
	for t, err := range m.Tasks() {
		if err != nil {
			return fail(err)
		}
		tasks = append(tasks, t)
	}
	id := Identify(m.Info())
	p := Plan{
		Action: StopForkBomb, Finding: f.ID, Risk: RiskTask, Kernel: &id, More: true,
		Title: fmt.Sprintf("bar new tasks of user %d, then end the tree of %q (PID %d), %d tasks by now", uid, f.Culprit.Comm, f.Culprit.PID, f.Culprit.Tree),
	}
	seen := make(map[uint64]bool)
	looked := 0
	for _, t := range detect.Offspring(tasks, f.Culprit.Since, uid) { // the youngest first
		if t.PID != t.TGID || t.State == "Z" || t.State == "X" || t.TGID <= 1 || t.KThread {
			continue
		}
		if looked++; looked > mostLimits {
			break
		}
		_, now, err := limits.of(m, t, rlimitNproc)
		if err != nil {
			continue // gone meanwhile
		}
		if now >= limitless {
			return fail(errLimitless)
		}
		cred, err := read64(m, t.Addr+kernel.VirtAddr(credAt))
		if err != nil {
			continue
		}
		account, err := read64(m, kernel.VirtAddr(cred+accountAt))
		if err != nil || seen[account] {
			continue
		}
		// Whose it is, and how many he has, must make sense: a process that ends has what is another's by now.
		real, err := read32(m, kernel.VirtAddr(cred+realAt))
		if err != nil {
			continue
		}
		owner, err := read32(m, kernel.VirtAddr(account+ownerAt))
		if err != nil || owner != real && owner != uid {
			continue
		}
		if owner == 0 {
			return fail(errLimitless) // root's, with another's rights for now
		}
		has, err := read64(m, kernel.VirtAddr(account+upper-4))
		if err != nil || has == 0 || has > mostTasks {
			continue
		}
		seen[account] = true
		for _, c := range []struct {
			va kernel.VirtAddr
			to Step
		}{
			{kernel.VirtAddr(account + ownerAt), Step{Op: OpExpect, Why: "it is this user's", Object: "ucounts.uid", Expect: le(uint64(owner), 4)}},
			{kernel.VirtAddr(account + upper), Step{
				Op: OpWrite, Why: "this user starts nothing new while the tree is ended", Object: "ucounts.rlimit[UCOUNT_RLIMIT_NPROC]",
				Expect: le(0, 4), Put: le(accountBarred, 4), Undo: true, Hold: true, MayVanish: true,
			}},
		} {
			if c.to.Addr, err = m.Phys(c.va); err != nil {
				return fail(err)
			}
			c.to.Virt = c.va
			p.Steps = append(p.Steps, c.to)
		}
	}
	switch {
	case looked == 0:
		return fail(ErrGone)
	case len(p.Steps) == 0:
		return fail(errLimitless)
	}
	return p, nil
}

// planBatch plans the end of the next processes of the tree. more is false when none is left.
func planBatch(m model, f detect.Finding) (p Plan, more bool, err error) {
	fail := func(err error) (Plan, bool, error) {
		return Plan{}, false, fmt.Errorf("plan to end the tree of PID %d: %w", f.Culprit.TGID, err)
	}
	if f.Culprit.UID == nil {
		return fail(kernel.ErrNotFound)
	}
	var tasks []kernel.Task
	for t, err := range m.Tasks() {
		if err != nil {
			return fail(err)
		}
		tasks = append(tasks, t)
	}
	tree := detect.Offspring(tasks, f.Culprit.Since, *f.Culprit.UID)
	tree = slices.DeleteFunc(tree, func(t kernel.Task) bool { return t.PID != t.TGID || t.State == "Z" || t.State == "X" })
	if len(tree) == 0 {
		return Plan{}, false, nil
	}
	sig, unproven := newSignaller(m)
	if scarce(m) {
		if p, tree, err = planExpire(m, f, tree); err != nil {
			err = fmt.Errorf("plan to end the tree of PID %d: %w", f.Culprit.TGID, err)
			return Plan{}, errors.Is(err, ErrNotYet), err
		}
		if len(p.Steps) > 0 || len(tree) == 0 {
			return p, len(p.Steps) > 0, nil
		}
		tree = heads(tree)
	}
	if unproven != nil {
		return fail(unproven)
	}
	ids, err := newProcessIDs(m)
	if err != nil {
		return fail(err)
	}
	var victims []process
	var torn error // of one that changed while it was read
	for _, t := range tree {
		v, err := ids.of(m, t)
		switch {
		case errors.Is(err, ErrProtected), errors.Is(err, ErrGone):
			continue
		case err != nil:
			torn, more = err, true
			continue
		case v.dying:
			more = true
			continue
		}
		if victims = append(victims, v); len(victims) == batch {
			break
		}
	}
	switch {
	case len(victims) > 0:
	case torn != nil:
		_, _, err := fail(torn)
		return Plan{}, true, fmt.Errorf("%w: %w", err, ErrNotYet) // look again
	case more:
		return Plan{}, true, ErrNotYet // dying, but not dead
	default:
		return Plan{}, false, nil
	}

	slot := (sig.size + slotAlign - 1) &^ (slotAlign - 1)
	perPage := int(leaseOffset / slot)
	boxes, err := findMailboxes(m, (len(victims)+perPage-1)/perPage)
	if err != nil {
		return fail(err)
	}
	victims = victims[:min(len(victims), len(boxes)*perPage)]
	cpu, listVA, listPA, err := soonestTick(m, nil)
	if err != nil {
		return fail(err)
	}
	id := Identify(m.Info())
	p = Plan{
		Action: StopForkBomb, Finding: f.ID, Risk: RiskTask, CPU: &cpu.ID, Kernel: &id, More: true,
		Title: fmt.Sprintf("end %d processes of the tree of %q with SIGKILL", len(victims), f.Culprit.Comm),
		Calls: []Call{{
			Function: "posix_timer_fn", Addr: sig.fn, Context: tickOf(m, cpu.ID),
			Purpose: fmt.Sprintf("sends SIGKILL to each of %d processes as for an expired POSIX timer", len(victims)),
		}},
		Steps: []Step{{
			Op: OpExpect, Why: "the function is there, and may be called through a pointer", Object: "posix_timer_fn",
			Addr: sig.fnPA, Virt: sig.fn, Expect: sig.head,
		}},
	}
	for _, b := range boxes {
		p.Steps = append(p.Steps, b.owned)
	}
	at := func(i int) (va uint64, off uint64) {
		off = uint64(i%perPage) * slot
		return uint64(boxes[i/perPage].va) + off, off
	}
	pages, spent := make([]Bytes, len(boxes)), make([]Bytes, len(boxes))
	unlinked := make([][]Cond, len(boxes))
	for i, v := range victims {
		p.Steps = append(p.Steps, v.checks...)
		p.Targets = append(p.Targets, Target{TGID: v.task.TGID, PID: v.task.PID, Comm: v.task.Comm, UID: v.task.UID, Start: v.task.Start})
		va, off := at(i)
		var next uint64
		if i+1 < len(victims) {
			n, _ := at(i + 1)
			next = n + sig.itTimer
		}
		timer := sig.make(va, v.pidVA, sigKill.no, next)
		n := i / perPage
		pages[n] = append(grow(pages[n], off), timer...)
		spent[n] = append(grow(spent[n], off), sig.spent(timer)...)
		unlinked[n] = append(unlinked[n], Cond{Addr: boxes[n].pa + hostmem.PhysAddr(off+sig.queue+sig.sqNext), Size: 8, Mask: ^uint64(0), Equal: true,
			Value: va + sig.queue, What: "the signal is unlinked"})
	}
	for n, b := range boxes {
		p.Steps = append(p.Steps, Step{
			Op: OpWrite, Why: "lay down signals, each with the timer and the work that send it", Object: "struct k_itimer, irq_work, sigqueue",
			Addr: b.pa, Virt: b.va, Expect: make(Bytes, len(pages[n])), Put: pages[n], Undo: true,
		})
	}
	first, _ := at(0)
	last, _ := at(len(victims) - 1)
	flagsPA := boxes[len(boxes)-1].pa + hostmem.PhysAddr(last-uint64(boxes[len(boxes)-1].va)+sig.itTimer+sig.work.flags)
	p.Steps = append(p.Steps, Step{
		Op: OpArm, Why: fmt.Sprintf("hand the works to CPU %d, only while its list is empty", cpu.ID), Object: fmt.Sprintf("lazy_list of CPU %d", cpu.ID),
		Addr: listPA, Virt: listVA, Expect: le(0, 8), Put: le(first+sig.itTimer, 8), Undo: true,
	}, Step{
		Op: OpAwait, Why: "the kernel has run the last of them", Object: "irq_work.node.u_flags", Runs: true,
		Addr: flagsPA, Virt: kernel.VirtAddr(last + sig.itTimer + sig.work.flags),
		Until:   []Cond{{Addr: flagsPA, Size: 4, Mask: irqWorkClaimed, Equal: true, What: "the works are done"}},
		Timeout: batchRunTimeout, Poll: 200 * time.Microsecond,
	})
	rescue, err := klogdSteps(m, sig.work, cpu.ID, listVA, listPA)
	if err != nil {
		return fail(err)
	}
	p.Steps = append(p.Steps, rescue...)
	for n, b := range boxes {
		p.Steps = append(p.Steps, Step{
			Op: OpAwait, Why: "the kernel has let go of the signals: parents have taken note of the deaths", Object: "sigqueue.list", Cleanup: true, Later: true,
			Each: unlinked[n], Timeout: queueTimeout, Poll: 2 * time.Millisecond,
		}, Step{
			Op: OpWrite, Why: "clean the mailbox", Object: "struct k_itimer, irq_work, sigqueue", Cleanup: true, Later: true,
			Addr: b.pa, Virt: b.va, Expect: spent[n], Put: make(Bytes, len(spent[n])),
		})
	}
	return p, true, nil
}

// heads are the processes of a tree whose parents are not in it. Where there is one page for signals, only they are ended at a time: a signal lies there
// until its process's parent has taken note of the death, and one that is to be ended itself never does; init, whose children the next ones are then, does
// at once. As nothing new is started meanwhile, this order ends the tree as well as the other.
func heads(tree []kernel.Task) []kernel.Task {
	in := make(map[int]bool, len(tree))
	for _, t := range tree {
		in[t.TGID] = true
	}
	out := slices.DeleteFunc(slices.Clone(tree), func(t kernel.Task) bool { return in[t.PPID] && t.PPID != t.TGID })
	if len(out) == 0 {
		return tree // who is a parent of whom is not to be believed
	}
	return out
}

// grow returns b with zeros up to a length.
func grow(b Bytes, n uint64) Bytes {
	if uint64(len(b)) < n {
		b = append(b, make(Bytes, n-uint64(len(b)))...)
	}
	return b
}

// process is one process that is to get a signal, with what tells that its struct pid is still its own.
type process struct {
	task   kernel.Task
	pidVA  uint64
	dying  bool // it has a deadly signal already
	checks []Step
}

// processIDs is where a process's struct pid is found and how it is told from one that is used again.
type processIDs struct {
	start, signal, links, flags, pids, tasks, numbers uint64
}

func newProcessIDs(m model) (processIDs, error) {
	l := layout{m: m}
	d := processIDs{
		start:  l.field("task_struct", "start_time", 8),
		signal: l.field("task_struct", "signal", 8),
		flags:  l.field("signal_struct", "flags", 4),
	}
	if nr := l.field("upid", "nr", 4); nr != 0 && l.err == nil {
		return d, fmt.Errorf("upid.nr is at %d: %w", nr, kernel.ErrNotSupported)
	}
	if l.err != nil {
		return d, fmt.Errorf("layout of tasks: %w", l.err)
	}
	tgid, err := m.Enum("pid_type", "PIDTYPE_TGID")
	if err != nil {
		return d, err
	}
	for _, f := range []struct {
		typ, path string
		size      uint64 // of an element
		to        *uint64
	}{{"task_struct", "pid_links", 16, &d.links}, {"signal_struct", "pids", 8, &d.pids}, {"pid", "tasks", 8, &d.tasks}, {"pid", "numbers", 0, &d.numbers}} {
		x, err := m.Field(f.typ, f.path)
		if err != nil {
			return d, err
		}
		*f.to = x.Offset
		if f.size != 0 {
			if tgid < 0 || uint64(tgid+1)*f.size > x.Size {
				return d, fmt.Errorf("%s.%s has %d bytes, and PIDTYPE_TGID is %d: %w", f.typ, f.path, x.Size, tgid, kernel.ErrNotSupported)
			}
			*f.to += uint64(tgid) * f.size
		}
	}
	return d, nil
}

// of reads what is needed of a process's first thread.
func (d *processIDs) of(m model, t kernel.Task) (process, error) {
	p := process{task: t}
	if t.TGID <= 1 || t.KThread {
		return p, ErrProtected
	}
	signal, err := read64(m, t.Addr+kernel.VirtAddr(d.signal))
	if err != nil {
		return p, err
	}
	if signal == 0 {
		return p, ErrGone
	}
	flags, err := read32(m, kernel.VirtAddr(signal+d.flags))
	if err != nil {
		return p, err
	}
	if flags&signalUnkillable != 0 {
		return p, ErrProtected
	}
	p.dying = flags&signalGroupExit != 0
	if p.pidVA, err = read64(m, kernel.VirtAddr(signal+d.pids)); err != nil {
		return p, err
	}
	if p.pidVA == 0 { // it is being released
		return p, ErrGone
	}
	for _, c := range []struct {
		va          kernel.VirtAddr
		object, why string
		want        uint64
		size        int
	}{
		{t.Addr + kernel.VirtAddr(d.start), "task_struct.start_time", "it is still the same process", uint64(t.Start), 8},
		{kernel.VirtAddr(p.pidVA + d.numbers), "struct pid.numbers", "the signal goes to the right process", uint64(t.TGID), 4},
		{kernel.VirtAddr(p.pidVA + d.tasks), "struct pid.tasks", "the number is this process's", uint64(t.Addr) + d.links, 8},
	} {
		b := make(Bytes, c.size)
		if err := m.ReadVirt(c.va, b); err != nil {
			return p, fmt.Errorf("%s: %w", c.object, err)
		}
		if string(b) != string(le(c.want, c.size)) {
			return p, ErrGone
		}
		pa, err := m.Phys(c.va)
		if err != nil {
			return p, fmt.Errorf("%s: %w", c.object, err)
		}
		p.checks = append(p.checks, Step{Op: OpExpect, Why: c.why, Object: c.object, Addr: pa, Virt: c.va, Expect: b})
	}
	return p, nil
}

// Lift returns the plan that takes back what the held steps of plans have put in force, the latest first; false if there is
// none.
func Lift(outs []Outcome) (Plan, bool) {
	var p Plan
	for _, o := range slices.Backward(outs) {
		for _, s := range slices.Backward(o.Steps) {
			if s.Step >= len(o.Plan.Steps) || s.Error != "" || s.Undone {
				continue
			}
			st := o.Plan.Steps[s.Step]
			if !st.Hold {
				continue
			}
			if len(p.Steps) == 0 {
				p = Plan{Action: o.Plan.Action, Finding: o.Plan.Finding, Risk: o.Plan.Risk, Kernel: o.Plan.Kernel, Title: "lift what was held for the repair"}
			}
			p.Lifts = append(p.Lifts, o.Plan.ID)
			p.Steps = append(p.Steps, Step{
				Op: OpWrite, Why: "as it was before the repair", Object: st.Object, Addr: st.Addr, Virt: st.Virt, Expect: st.Put, Put: st.Expect, MayFail: st.MayVanish,
			})
		}
	}
	return p, len(p.Steps) > 0
}
