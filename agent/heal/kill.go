package heal

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// IDs of the actions that send a signal to a process.
const (
	KillProcess     = "kill-process"
	StopProcess     = "stop-process"
	ContinueProcess = "continue-process"
)

// ErrGone means that the culprit of a finding is no longer there, or no longer the one who was meant.
var ErrGone = errors.New("the process is gone")

// ErrProtected means that a task is one that is never touched.
var ErrProtected = errors.New("the task is never touched")

const (
	siTimer            = -2              // SI_TIMER, include/uapi/asm-generic/siginfo.h
	sigqueuePrealloc   = 1               // SIGQUEUE_PREALLOC, include/linux/signal_types.h
	signalUnkillable   = 0x40            // SIGNAL_UNKILLABLE, include/linux/sched/signal.h
	pidTypeTGID        = 1               // PIDTYPE_TGID, include/linux/pid_types.h; findVictim checks it
	signalAt           = 0x40            // in a mailbox
	armTimeout         = 6 * time.Second // an idle CPU has an event at least every 4 s: the watchdog's
	deathTimeout       = 5 * time.Second
	queueTimeout       = 3 * time.Second
	maxSiginfoDistance = 64
)

// signal is a signal that is sent, with what is seen when it has had its effect.
type signal struct {
	no     uint32
	name   string
	action string
	verb   string // what the plan is to do to the process
	effect string
}

var (
	sigKill = signal{9, "SIGKILL", KillProcess, "end", "the process has died"}
	sigCont = signal{18, "SIGCONT", ContinueProcess, "continue", "the process goes on"}
	sigStop = signal{19, "SIGSTOP", StopProcess, "stop", "the process is stopped"}
)

func killProcess() Action {
	return signalled(sigKill, "End the process with SIGKILL, sent by the host's own kernel", detect.KindRunawayProcess, detect.KindMemoryHog, detect.KindTampering, detect.KindPolicy)
}

func stopProcess() Action {
	a := signalled(sigStop, "Stop the process with SIGSTOP, sent by the host's own kernel; it can be continued", detect.KindRunawayProcess, detect.KindMemoryHog, detect.KindTampering, detect.KindPolicy)
	a.Undo = ContinueProcess
	return a
}

func continueProcess() Action {
	return signalled(sigCont, "Continue a stopped process with SIGCONT, sent by the host's own kernel", detect.KindRunawayProcess, detect.KindMemoryHog, detect.KindTampering, detect.KindPolicy)
}

func signalled(s signal, title string, kinds ...detect.Kind) Action {
	return Action{
		ID: s.action, Title: title, Risk: RiskTask, For: kinds,
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to %s PID %d: no kernel is attached: %w", s.verb, f.Culprit.TGID, kernel.ErrNotFound)
			}
			return planSignal(newModel(v), f, s)
		},
	}
}

// victim is a process to be ended, with what tells it from any other.
type victim struct {
	leader  kernel.Task
	thread  kernel.Task // the culprit among its threads
	checks  []Step
	pidVA   uint64
	gone    [][]Cond // of each of its threads that is watched, any of them: it has died
	changed []Cond   // any of them: it is no longer the one who was meant
}

// planSignal plans as posix_timer_fn does it: that function takes the k_itimer around the hrtimer that it is given, and sends
// the timer's sigqueue to the timer's pid, under siglock, as the kernel does for any expired timer. The hrtimer's own bytes
// are not used by it, so they can at the same time be the irq_work that has it called with its own address.
//
// What lies in the mailbox afterwards belongs to the victim's list of pending signals until its parent has taken note of
// its death; so the mailbox is cleaned only when the kernel has unlinked it there.
func planSignal(m model, f detect.Finding, what signal) (Plan, error) {
	id := Identify(m.Info())
	fail := func(err error) (Plan, error) {
		return Plan{}, fmt.Errorf("plan to %s PID %d: %w", what.verb, f.Culprit.TGID, err)
	}

	vic, err := findVictim(m, f.Culprit)
	if err != nil {
		return fail(err)
	}
	sig, err := newSignaller(m)
	if err != nil {
		return fail(err)
	}
	box, err := findMailbox(m)
	if err != nil {
		return fail(err)
	}
	cpu, listVA, listPA, err := soonestTick(m, &vic.thread)
	if err != nil {
		return fail(err)
	}

	timerVA := uint64(box.va) + signalAt
	queueVA, workVA := timerVA+sig.queue, timerVA+sig.itTimer
	timer := sig.make(timerVA, vic.pidVA, what.no, 0)

	work := sig.work
	flagsPA := box.pa + signalAt + hostmem.PhysAddr(sig.itTimer+work.flags)
	idle := "which is busy and ticks every few milliseconds"
	if cpu.Idle {
		idle = "the idle CPU with the nearest timer event"
	}
	p := Plan{
		Action: what.action, Finding: f.ID, Risk: RiskTask,
		Title: fmt.Sprintf("%s %q (PID %d) with %s", what.verb, vic.leader.Comm, vic.leader.TGID, what.name),
		Target: &Target{
			TGID: vic.leader.TGID, PID: vic.thread.PID, Comm: vic.leader.Comm, UID: vic.leader.UID, Start: vic.leader.Start, KThread: vic.leader.KThread,
		},
		CPU: &cpu.ID, Kernel: &id, Undo: what == sigStop,
		Calls: []Call{{
			Function: "posix_timer_fn", Addr: sig.fn, Context: tickOf(m, cpu.ID),
			Purpose: "sends " + what.name + " to the process as for an expired POSIX timer",
		}},
	}
	p.Steps = append(p.Steps, Step{
		Op: OpExpect, Why: "the function is there, and may be called through a pointer", Object: "posix_timer_fn",
		Addr: sig.fnPA, Virt: sig.fn, Expect: sig.head,
	}, box.owned)
	p.Steps = append(p.Steps, vic.checks...)
	p.Steps = append(p.Steps, Step{
		Op: OpWrite, Why: "lay down " + what.name + ", preallocated, so the kernel does not free it, with the timer that carries it, and in its unused part the work that runs it",
		Object: "struct k_itimer with struct irq_work and struct sigqueue",
		Addr:   box.pa + signalAt, Virt: kernel.VirtAddr(timerVA), Expect: make(Bytes, sig.size), Put: timer, Undo: true,
	}, Step{
		Op: OpArm, Why: fmt.Sprintf("hand the work to CPU %d, %s; only while its list is empty", cpu.ID, idle), Object: fmt.Sprintf("lazy_list of CPU %d", cpu.ID),
		Addr: listPA, Virt: listVA, Expect: le(0, 8), Put: le(workVA, 8), Undo: true,
	}, Step{
		Op: OpAwait, Why: "the kernel has run it: neither pending nor busy", Object: "irq_work.node.u_flags", Runs: true,
		Addr: flagsPA, Virt: kernel.VirtAddr(workVA + work.flags),
		Until:   []Cond{{Addr: flagsPA, Size: 4, Mask: irqWorkClaimed, Equal: true, What: "the work is done"}},
		Unless:  vic.changed,
		Timeout: armTimeout, Poll: 200 * time.Microsecond,
	})
	effects := vic.gone
	if what != sigKill {
		if effects, err = vic.stopped(m, what == sigStop); err != nil {
			return fail(err)
		}
	}
	for i := range effects {
		p.Steps = append(p.Steps, Step{
			Op: OpAwait, Why: what.effect, Object: "task_struct", Until: effects[i], Timeout: deathTimeout, Poll: 500 * time.Microsecond,
		})
	}
	rescue, err := klogdSteps(m, work, cpu.ID, listVA, listPA)
	if err != nil {
		return fail(err)
	}
	p.Steps = append(p.Steps, rescue...)
	queuePA := box.pa + signalAt + hostmem.PhysAddr(sig.queue+sig.sqNext)
	p.Steps = append(p.Steps, Step{
		Op: OpAwait, Why: "the kernel has let go of the signal: the parent has taken note of the death", Object: "sigqueue.list", Cleanup: true,
		Addr: queuePA, Virt: kernel.VirtAddr(queueVA + sig.sqNext),
		Until:   []Cond{{Addr: queuePA, Size: 8, Mask: ^uint64(0), Equal: true, Value: queueVA, What: "the signal is unlinked"}},
		Timeout: queueTimeout, Poll: 2 * time.Millisecond,
	}, Step{
		Op: OpWrite, Why: "clean the mailbox", Object: "struct k_itimer with struct irq_work and struct sigqueue", Cleanup: true,
		Addr: box.pa + signalAt, Virt: kernel.VirtAddr(timerVA), Expect: sig.spent(timer), Put: make(Bytes, sig.size),
	})
	return p, nil
}

// findVictim finds the culprit among the tasks, makes sure that it may be ended at all, and collects what tells it from any
// other task that may later lie at the same address or have the same PID.
func findVictim(m model, c detect.Culprit) (victim, error) {
	var v victim
	if c.TGID == 0 || c.PID == 0 {
		return v, fmt.Errorf("the finding names no process: %w", kernel.ErrNotFound)
	}
	for t, err := range m.Tasks() {
		if err != nil {
			return v, err
		}
		if t.PID == c.PID && t.TGID == c.TGID && t.Start == c.Start {
			v.thread = t
		}
		if t.PID == c.TGID {
			v.leader = t
		}
	}
	switch t := v.thread; {
	case t.Addr == 0:
		return v, ErrGone
	case t.TGID == 1:
		return v, fmt.Errorf("it is init: %w", ErrProtected)
	case t.KThread:
		return v, fmt.Errorf("it is a kernel thread: %w", ErrProtected)
	case v.leader.Addr == 0:
		return v, fmt.Errorf("its first thread is not in the list of tasks: %w", kernel.ErrTorn)
	}

	l := layout{m: m}
	var (
		pidOff    = l.field("task_struct", "pid", 4)
		tgidOff   = l.field("task_struct", "tgid", 4)
		startOff  = l.field("task_struct", "start_time", 8)
		signalOff = l.field("task_struct", "signal", 8)
		exitOff   = l.field("task_struct", "exit_state", 4)
		flagsOff  = l.field("signal_struct", "flags", 4)
	)
	if l.err != nil {
		return v, fmt.Errorf("layout of tasks: %w", l.err)
	}
	// signal_struct.pids[] is indexed by enum pid_type since v4.19; upid.nr of the first level is the number that ps shows.
	pids, err := m.Field("signal_struct", "pids")
	if err != nil {
		return v, err
	}
	tgidType, err := m.Enum("pid_type", "PIDTYPE_TGID")
	if err != nil {
		return v, err
	}
	if tgidType < 0 || uint64(tgidType)*8+8 > pids.Size {
		return v, fmt.Errorf("signal_struct.pids has %d bytes, and PIDTYPE_TGID is %d: %w", pids.Size, tgidType, kernel.ErrNotSupported)
	}
	numbers, err := m.Field("pid", "numbers")
	if err != nil {
		return v, err
	}
	if nr, err := m.Field("upid", "nr"); err != nil || nr.Offset != 0 || nr.Size != 4 {
		return v, fmt.Errorf("upid.nr is not at its start: %w", errors.Join(err, kernel.ErrNotSupported))
	}

	a := v.thread.Addr
	signal, err := read64(m, a+kernel.VirtAddr(signalOff))
	if err != nil {
		return v, err
	}
	flags, err := read32(m, kernel.VirtAddr(signal+flagsOff))
	if err != nil {
		return v, err
	}
	if flags&signalUnkillable != 0 {
		return v, fmt.Errorf("it is the init of a PID namespace (signal flags %#x): %w", flags, ErrProtected)
	}
	if v.pidVA, err = read64(m, kernel.VirtAddr(signal+pids.Offset+8*uint64(tgidType))); err != nil {
		return v, err
	}
	if v.pidVA == 0 { // it is being released
		return v, ErrGone
	}

	expect := func(va kernel.VirtAddr, object, why string, want uint64, size int) error {
		b := make(Bytes, size)
		if err := m.ReadVirt(va, b); err != nil {
			return fmt.Errorf("%s: %w", object, err)
		}
		if string(b) != string(le(want, size)) {
			return fmt.Errorf("%s is %x, not %#x: %w", object, []byte(b), want, ErrGone)
		}
		pa, err := m.Phys(va)
		if err != nil {
			return fmt.Errorf("%s: %w", object, err)
		}
		v.checks = append(v.checks, Step{Op: OpExpect, Why: why, Object: object, Addr: pa, Virt: va, Expect: b})
		return nil
	}
	at := func(off uint64) kernel.VirtAddr { return a + kernel.VirtAddr(off) }
	const same = "it is still the same process"
	for _, e := range []struct {
		va     kernel.VirtAddr
		object string
		why    string
		want   uint64
		size   int
	}{
		{at(pidOff), "task_struct.pid", same, uint64(v.thread.PID), 4},
		{at(tgidOff), "task_struct.tgid", same, uint64(v.thread.TGID), 4},
		{at(startOff), "task_struct.start_time", same, uint64(v.thread.Start), 8},
		{at(signalOff), "task_struct.signal", same, signal, 8},
		{at(exitOff), "task_struct.exit_state", "it is alive", 0, 4},
		{kernel.VirtAddr(signal + pids.Offset + 8*uint64(tgidType)), "signal_struct.pids", "the signal goes to the whole process", v.pidVA, 8},
		{kernel.VirtAddr(v.pidVA + numbers.Offset), "struct pid.numbers", "the signal goes to the right process", uint64(v.thread.TGID), 4},
	} {
		if err := expect(e.va, e.object, e.why, e.want, e.size); err != nil {
			return v, err
		}
	}

	died := func(t kernel.Task) ([]Cond, error) {
		exitPA, err1 := m.Phys(t.Addr + kernel.VirtAddr(exitOff))
		pidPA, err2 := m.Phys(t.Addr + kernel.VirtAddr(pidOff))
		startPA, err3 := m.Phys(t.Addr + kernel.VirtAddr(startOff))
		return []Cond{
			{Addr: exitPA, Size: 4, Mask: 0xffffffff, What: "exit_state is set"},
			{Addr: pidPA, Size: 4, Mask: 0xffffffff, Value: uint64(t.PID), What: "its task_struct has another PID"},
			{Addr: startPA, Size: 8, Mask: ^uint64(0), Value: uint64(t.Start), What: "its task_struct has another start time"},
		}, errors.Join(err1, err2, err3)
	}
	if v.changed, err = died(v.thread); err != nil {
		return v, err
	}
	v.gone = append(v.gone, v.changed)
	if v.leader.PID != v.thread.PID {
		conds, err := died(v.leader)
		if err != nil {
			return v, err
		}
		v.gone = append(v.gone, conds)
	}
	return v, nil
}

// taskStopped is __TASK_STOPPED of task_struct.__state, include/linux/sched.h.
const taskStopped = 4

// stopped are the conditions for the culprit to be stopped, or not to be; a process that ends meanwhile will do.
func (v *victim) stopped(m model, yes bool) ([][]Cond, error) {
	l := layout{m: m}
	off := l.field("task_struct", "__state", 4)
	if l.err != nil {
		return nil, l.err
	}
	pa, err := m.Phys(v.thread.Addr + kernel.VirtAddr(off))
	if err != nil {
		return nil, err
	}
	c := Cond{Addr: pa, Size: 4, Mask: taskStopped, Equal: !yes, What: "__state says so"}
	return [][]Cond{append([]Cond{c}, v.changed...)}, nil
}

// klogdSteps make sure that a store which was no compare-and-swap has not cut off the kernel's own wake_up_klogd_work, the
// one frequent user of the lazy list: it would stay pending for ever and not be enqueued again. If so, it is put back.
func klogdSteps(m model, w irqWork, cpu int, listVA kernel.VirtAddr, listPA hostmem.PhysAddr) ([]Step, error) {
	va, err := m.PerCPU("wake_up_klogd_work", cpu)
	if err != nil {
		return nil, err
	}
	flagsVA := va + kernel.VirtAddr(w.flags)
	flagsPA, err := m.Phys(flagsVA)
	if err != nil {
		return nil, err
	}
	return []Step{{
		Op: OpAwait, Why: "the kernel's own work was not cut off by ours: it is not pending, or it is on the list", Object: "wake_up_klogd_work.node.u_flags",
		Cleanup: true, Addr: flagsPA, Virt: flagsVA,
		Until: []Cond{
			{Addr: flagsPA, Size: 4, Mask: irqWorkPending, Equal: true, What: "it is not pending"},
			{Addr: listPA, Size: 8, Mask: ^uint64(0), What: "the list is not empty"},
		},
		Timeout: 200 * time.Millisecond, Poll: time.Millisecond,
	}, {
		Op: OpArm, Why: "put the kernel's own work back on its list", Object: fmt.Sprintf("lazy_list of CPU %d", cpu), Cleanup: true, IfFailed: true,
		Addr: listPA, Virt: listVA, Expect: le(0, 8), Put: le(uint64(va), 8),
	}}, nil
}
