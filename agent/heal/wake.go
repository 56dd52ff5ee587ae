package heal

import (
	"context"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// WakeTask is the ID of the action that wakes a task whose wake-up was lost.
const WakeTask = "wake-task"

// wakeTask has the kernel wake a task that sleeps although what it waits for may have come: its wake-up was lost. A task that has to
// go on waiting looks, and sleeps again: the kernel's own loops around schedule() bear to be woken for nothing.
func wakeTask() Action {
	return Action{
		ID: WakeTask, Title: "Wake a task that hangs, in case its wake-up was lost", Risk: RiskTask,
		For: []detect.Kind{detect.KindHungTask, detect.KindPolicy},
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to wake PID %d: no kernel is attached: %w", f.Culprit.PID, kernel.ErrNotFound)
			}
			return planWake(newModel(v), f)
		},
	}
}

// planWake plans a call of hrtimer_wakeup (kernel/time/hrtimer.c), which takes the hrtimer_sleeper around the hrtimer that it is
// given, clears its task and wakes that: what the end of any sleep with a time limit does. As in planSignal, the hrtimer's own
// bytes, which it does not look at, are the irq_work by which it is called.
func planWake(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) {
		return Plan{}, fmt.Errorf("plan to wake PID %d: %w", f.Culprit.PID, err)
	}
	vic, err := findVictim(m, f.Culprit)
	if err != nil {
		return fail(err)
	}
	work, err := provenIRQWork(m)
	if err != nil {
		return fail(err)
	}
	fn, head, err := callable(m, "hrtimer_wakeup")
	if err != nil {
		return fail(err)
	}
	fnPA, err := m.Phys(fn)
	if err != nil {
		return fail(err)
	}
	l := layout{m: m}
	timer, size, taskAt := l.sizeof("hrtimer"), l.sizeof("hrtimer_sleeper"), l.field("hrtimer_sleeper", "task", 8)
	state := l.field("task_struct", "__state", 4)
	if off := l.field("hrtimer_sleeper", "timer", timer); l.err == nil && (off != 0 || work.size > timer || taskAt < timer || taskAt%8 != 0) {
		return fail(fmt.Errorf("hrtimer_sleeper has its timer at %d and its task at %d: %w", off, taskAt, kernel.ErrNotSupported))
	}
	if l.err != nil {
		return fail(l.err)
	}
	t := vic.thread
	now, err := read32(m, t.Addr+kernel.VirtAddr(state))
	if err != nil {
		return fail(err)
	}
	const interruptible, uninterruptible = 1, 2 // TASK_NORMAL of include/linux/sched.h: what wake_up_process wakes
	if now&(interruptible|uninterruptible) == 0 {
		return fail(fmt.Errorf("it does not sleep: its state is %#x: %w", now, ErrGone))
	}
	box, err := findMailbox(m)
	if err != nil {
		return fail(err)
	}
	cpu, listVA, listPA, err := soonestTick(m, nil)
	if err != nil {
		return fail(err)
	}
	const at = 0x40
	obj := make(Bytes, size)
	put32(obj, work.flags, irqWorkType|irqWorkLazy|irqWorkClaimed)
	put64(obj, work.fn, uint64(fn))
	put64(obj, taskAt, uint64(t.Addr))
	spent := append(Bytes(nil), obj...)
	put32(spent, work.flags, irqWorkType|irqWorkLazy)
	put64(spent, taskAt, 0)
	workVA := uint64(box.va) + at
	flagsPA := box.pa + at + hostmem.PhysAddr(work.flags)
	id := Identify(m.Info())
	p := Plan{
		Action: WakeTask, Finding: f.ID, Risk: RiskTask, Kernel: &id, CPU: &cpu.ID,
		Title:  fmt.Sprintf("wake %q (PID %d)", t.Comm, t.PID),
		Target: &Target{TGID: vic.leader.TGID, PID: t.PID, Comm: vic.leader.Comm, UID: vic.leader.UID, Start: vic.leader.Start},
		Calls: []Call{{Function: "hrtimer_wakeup", Addr: fn, Context: tickOf(m, cpu.ID),
			Purpose: "wakes the task as the end of a sleep with a time limit does"}},
	}
	p.Steps = append(p.Steps, Step{
		Op: OpExpect, Why: "the function is there, and may be called through a pointer", Object: "hrtimer_wakeup", Addr: fnPA, Virt: fn, Expect: head,
	}, box.owned)
	p.Steps = append(p.Steps, vic.checks...)
	p.Steps = append(p.Steps, Step{
		Op: OpWrite, Why: "lay down the sleeper, and in the unused part of its timer the work that runs it", Object: "struct hrtimer_sleeper with struct irq_work",
		Addr: box.pa + at, Virt: kernel.VirtAddr(workVA), Expect: make(Bytes, size), Put: obj, Undo: true,
	}, Step{
		Op: OpArm, Why: fmt.Sprintf("hand the work to CPU %d; only while its list is empty", cpu.ID), Object: fmt.Sprintf("lazy_list of CPU %d", cpu.ID),
		Addr: listPA, Virt: listVA, Expect: le(0, 8), Put: le(workVA, 8), Undo: true,
	}, Step{
		Op: OpAwait, Why: "the kernel has run it: neither pending nor busy", Object: "irq_work.node.u_flags", Runs: true,
		Addr: flagsPA, Virt: kernel.VirtAddr(workVA + work.flags),
		Until:   []Cond{{Addr: flagsPA, Size: 4, Mask: irqWorkClaimed, Equal: true, What: "the work is done"}},
		Unless:  vic.changed,
		Timeout: armTimeout, Poll: 200 * time.Microsecond,
	})
	sleeperPA := box.pa + at + hostmem.PhysAddr(taskAt)
	p.Steps = append(p.Steps, Step{
		Op: OpAwait, Why: "it has woken the task", Object: "hrtimer_sleeper.task", Addr: sleeperPA, Virt: kernel.VirtAddr(workVA + taskAt),
		Until:   []Cond{{Addr: sleeperPA, Size: 8, Mask: ^uint64(0), Equal: true, What: "the sleeper's task is cleared"}},
		Timeout: time.Second, Poll: time.Millisecond,
	})
	rescue, err := klogdSteps(m, work, cpu.ID, listVA, listPA)
	if err != nil {
		return fail(err)
	}
	p.Steps = append(p.Steps, rescue...)
	p.Steps = append(p.Steps, Step{
		Op: OpWrite, Why: "clean the mailbox", Object: "struct hrtimer_sleeper", Cleanup: true, Addr: box.pa + at, Virt: kernel.VirtAddr(workVA),
		Expect: spent, Put: make(Bytes, size),
	})
	return p, nil
}
