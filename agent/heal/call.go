package heal

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// IDs of the actions that have the host's kernel run one of its functions that take no argument.
const (
	RestartHost  = "restart-host"
	RebootHost   = "reboot-host"
	SyncDisks    = "sync-disks"
	RemountDisks = "remount-read-only"

	NormalizeRealtime = "normalize-realtime"
)

// function is one of the host kernel's functions that a plan may have it run. Beside those that need an object
// of their own (posix_timer_fn, hrtimer_wakeup, and what workers run, see worker.go), this table is all there is: no name of a function ever comes from outside.
type function struct {
	name    string // takes no argument, so that the irq_work that it is given is nothing to it
	purpose string
	// forever says that it does not come back, so that nothing confirms it but the host itself.
	forever bool
}

// All of them are called from hard interrupts by the kernel itself, by sysrq's handlers or by drivers of thermal sensors and
// power buttons, and either do not sleep or leave the rest to a worker.
var (
	// kernel/reboot.c: "Without shutting down any hardware or taking any locks reboot the system. This is called when we know
	// we are in trouble so this is our best effort to reboot. This is safe to call in interrupt context."
	emergencyRestart = function{"emergency_restart", "restarts the machine at once, without writing anything to disks", true}
	// kernel/reboot.c: schedules reboot_work, which runs the system's own reboot command, and failing that syncs and restarts.
	orderlyReboot = function{"orderly_reboot", "has a worker run the system's own reboot command, or sync and restart if there is none", false}
	// fs/sync.c, fs/super.c: sysrq's s and u.
	emergencySync    = function{"emergency_sync", "has a worker write all that is dirty to disks", false}
	emergencyRemount = function{"emergency_remount", "has a worker write all that is dirty and remount all file systems read-only", false}
	// kernel/sched/core.c, since v6.11 syscalls.c: sysrq's n. Kernel threads stay as they are.
	normalizeTasks = function{"normalize_rt_tasks", "gives each program of real-time priority, or of less than no niceness, the ordinary one", false}
)

// planCall plans to have a CPU that ticks run a function in its timer interrupt.
func planCall(m model, p Plan, fn function) (Plan, error) {
	fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to run %s: %w", fn.name, err) }
	work, err := provenIRQWork(m)
	if err != nil {
		return fail(err)
	}
	va, head, err := callable(m, fn.name)
	if err != nil {
		return fail(err)
	}
	pa, err := m.Phys(va)
	if err != nil {
		return fail(err)
	}
	box, err := findMailbox(m)
	if err != nil {
		return fail(err)
	}
	cpu, listVA, listPA, err := provenTick(m)
	if err != nil {
		return fail(err)
	}
	id := Identify(m.Info())
	p.Kernel, p.CPU = &id, &cpu.ID
	p.Calls = []Call{{Function: fn.name, Addr: va, Context: tickOf(m, cpu.ID), Purpose: fn.purpose}}
	obj := make(Bytes, work.size)
	put32(obj, work.flags, irqWorkType|irqWorkLazy|irqWorkClaimed)
	put64(obj, work.fn, uint64(va))
	spent := append(Bytes(nil), obj...)
	put32(spent, work.flags, irqWorkType|irqWorkLazy)
	const at = 0x40
	workVA := uint64(box.va) + at
	flagsPA := box.pa + at + hostmem.PhysAddr(work.flags)
	p.Steps = append(p.Steps, Step{
		Op: OpExpect, Why: "the function is there, and may be called through a pointer", Object: fn.name, Addr: pa, Virt: va, Expect: head,
	}, box.owned, Step{
		Op: OpWrite, Why: "lay down the work", Object: "struct irq_work", Addr: box.pa + at, Virt: kernel.VirtAddr(workVA),
		Expect: make(Bytes, work.size), Put: obj, Undo: true,
	}, Step{
		Op: OpArm, Why: fmt.Sprintf("hand the work to CPU %d; only while its list is empty", cpu.ID), Object: fmt.Sprintf("lazy_list of CPU %d", cpu.ID),
		Addr: listPA, Virt: listVA, Expect: le(0, 8), Put: le(workVA, 8), Undo: true,
	})
	if fn.forever {
		// It is taken off the list when it is run, and never comes back.
		p.Steps = append(p.Steps, Step{
			Op: OpAwait, Why: "the kernel has taken it", Object: "irq_work.node.u_flags", Runs: true, Addr: flagsPA, Virt: kernel.VirtAddr(workVA + work.flags),
			Until: []Cond{
				{Addr: flagsPA, Size: 4, Mask: irqWorkPending, Equal: true, What: "the work is begun"},
				{Addr: listPA, Size: 8, Mask: ^uint64(0), Value: workVA, What: "the work is off the list"},
			},
			Timeout: armTimeout, Poll: 200 * time.Microsecond,
		})
		return p, nil
	}
	p.Steps = append(p.Steps, Step{
		Op: OpAwait, Why: "the kernel has run it: neither pending nor busy", Object: "irq_work.node.u_flags", Runs: true,
		Addr: flagsPA, Virt: kernel.VirtAddr(workVA + work.flags),
		Until:   []Cond{{Addr: flagsPA, Size: 4, Mask: irqWorkClaimed, Equal: true, What: "the work is done"}},
		Timeout: armTimeout, Poll: 200 * time.Microsecond,
	})
	rescue, err := klogdSteps(m, work, cpu.ID, listVA, listPA)
	if err != nil {
		return fail(err)
	}
	p.Steps = append(p.Steps, rescue...)
	p.Steps = append(p.Steps, Step{
		Op: OpWrite, Why: "clean the mailbox", Object: "struct irq_work", Cleanup: true, Addr: box.pa + at, Virt: kernel.VirtAddr(workVA),
		Expect: spent, Put: make(Bytes, work.size),
	})
	return p, nil
}

// called is an action that has the host run one function.
func called(id, title string, risk Risk, fn function, kinds ...detect.Kind) Action {
	return Action{
		ID: id, Title: title, Risk: risk, For: kinds,
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to run %s: no kernel is attached: %w", fn.name, kernel.ErrNotFound)
			}
			return planCall(newModel(v), Plan{Action: id, Finding: f.ID, Risk: risk, More: risk < RiskRestart, Title: fmt.Sprintf("%s: %s", title, f.Title)}, fn)
		},
	}
}

// normalizeRealtime takes real-time priority from all programs, so that who is not let run by one of them is. It is milder than to end that one, but others
// lose theirs with it: those of a cluster's heartbeat or of sound, say; nothing gives it back but themselves.
func normalizeRealtime() Action {
	return Action{
		ID: NormalizeRealtime, Title: "Give programs of real-time priority the ordinary one", Risk: RiskKernel,
		For: []detect.Kind{detect.KindRunawayProcess, detect.KindHungTask, detect.KindPolicy},
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to run %s: no kernel is attached: %w", normalizeTasks.name, kernel.ErrNotFound)
			}
			return planCall(newModel(v), Plan{Action: NormalizeRealtime, Finding: f.ID, Risk: RiskKernel, Title: "take real-time priority from all programs: " + f.Title}, normalizeTasks)
		},
	}
}

// restartHost restarts the host by its kernel's own means, whatever state that is in.
func restartHost() Action {
	return Action{
		ID: RestartHost, Title: "Restart the host by its own kernel, live, panicked or locked", Risk: RiskRestart,
		For: everyKind(),
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to restart the host: no kernel is attached: %w", kernel.ErrNotFound)
			}
			s, err := v.Panic()
			if err != nil {
				return Plan{}, fmt.Errorf("plan to restart the host: %w", err)
			}
			m := newModel(v)
			if s.Panicked {
				return planBlink(m, f)
			}
			p, err := planCall(m, Plan{Action: RestartHost, Finding: f.ID, Risk: RiskRestart, Title: "restart the host at once: " + f.Title}, emergencyRestart)
			if err == nil {
				return p, nil
			}
			q, nmiErr := planNMI(m, f)
			if nmiErr != nil {
				return Plan{}, fmt.Errorf("%w; %w", err, nmiErr)
			}
			return q, nil
		},
	}
}

// planBlink plans the restart of a kernel that has panicked. It spins in panic() of kernel/panic.c and calls
// (*panic_blink)(state) every 100 ms for ever, which was meant for keyboard lights and does nothing on servers. Interrupts
// are off there, so there are no ticks.
func planBlink(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) {
		return Plan{}, fmt.Errorf("plan to restart a panicked kernel: %w", err)
	}
	fn, head, err := callable(m, emergencyRestart.name)
	if err != nil {
		return fail(err)
	}
	fnPA, err := m.Phys(fn)
	if err != nil {
		return fail(err)
	}
	va, err := m.Symbol("panic_blink")
	if err != nil {
		return fail(err)
	}
	pa, err := m.Phys(va)
	if err != nil {
		return fail(err)
	}
	now, err := read64(m, va)
	if err != nil {
		return fail(err)
	}
	known := false
	// kernel/panic.c, drivers/input/serio/i8042.c, drivers/leds/trigger/ledtrig-panic.c
	for _, name := range []string{"no_blink", "i8042_panic_blink", "led_panic_blink"} {
		fn, err := m.Symbol(name)
		known = known || err == nil && fn == kernel.VirtAddr(now)
	}
	if !known {
		return fail(fmt.Errorf("panic_blink is %#x, which is none of the functions known: the kernel has not come to its last loop yet, or another driver uses it: %w", now, ErrNotYet))
	}
	id := Identify(m.Info())
	return Plan{
		Action: RestartHost, Finding: f.ID, Risk: RiskRestart, Kernel: &id, Title: "restart the panicked kernel: " + f.Title,
		Calls: []Call{{Function: emergencyRestart.name, Addr: fn, Context: "the loop at the end of panic()", Purpose: emergencyRestart.purpose}},
		Steps: []Step{
			{Op: OpExpect, Why: "the function is there, and may be called through a pointer", Object: emergencyRestart.name, Addr: fnPA, Virt: fn, Expect: head},
			{Op: OpArm, Why: "the loop in which the panicked kernel waits calls what this points to every 100 ms", Object: "panic_blink",
				Addr: pa, Virt: va, Expect: le(now, 8), Put: le(uint64(fn), 8)},
		},
	}, nil
}

// planNMI plans the restart of a kernel of which no CPU takes interrupts any more: an NMI that it does not know has it panic,
// and a negative panic_timeout has that restart the machine at once.
func planNMI(m model, f detect.Finding) (Plan, error) {
	id := Identify(m.Info())
	p := Plan{Action: RestartHost, Finding: f.ID, Risk: RiskRestart, Kernel: &id, Title: "have an NMI restart the locked kernel: " + f.Title,
		Calls: []Call{{Function: "panic", Context: "NMI", Purpose: "restarts the machine, as panic_timeout says"}}}
	for _, x := range []struct {
		name, why string
		put       int32
	}{
		{"panic_timeout", "a panic restarts the machine at once", -1},
		{"unknown_nmi_panic", "an NMI that nobody knows is a panic", 1},
	} {
		fail := func(err error) (Plan, error) {
			return Plan{}, fmt.Errorf("plan to restart by NMI: %s: %w", x.name, err)
		}
		va, err := m.Symbol(x.name)
		if err != nil {
			return fail(err)
		}
		pa, err := m.Phys(va)
		if err != nil {
			return fail(err)
		}
		now, err := read32(m, va)
		if err != nil {
			return fail(err)
		}
		if now == uint32(x.put) {
			continue
		}
		p.Steps = append(p.Steps, Step{Op: OpWrite, Why: x.why, Object: x.name, Addr: pa, Virt: va, Expect: le(uint64(now), 4), Put: le(uint64(uint32(x.put)), 4), Undo: true})
	}
	panicked, err := m.Symbol("panic_cpu")
	if err != nil {
		return Plan{}, fmt.Errorf("plan to restart by NMI: %w", err)
	}
	pa, err := m.Phys(panicked)
	if err != nil {
		return Plan{}, fmt.Errorf("plan to restart by NMI: panic_cpu: %w", err)
	}
	p.Steps = append(p.Steps, Step{
		Op: OpExpect, Why: "the kernel has not panicked by itself", Object: "panic_cpu", Addr: pa, Virt: panicked, Expect: le(math.MaxUint32, 4),
	}, PowerStep("nmi", "the only interrupt that a locked CPU still takes"), Step{
		Op: OpAwait, Why: "the kernel has panicked at it, or something else is there by now", Object: "panic_cpu", Addr: pa, Virt: panicked,
		Until:   []Cond{{Addr: pa, Size: 4, Mask: math.MaxUint32, Value: math.MaxUint32, What: "a CPU has panicked"}},
		Timeout: nmiTimeout, Poll: time.Millisecond,
	})
	return p, nil
}

// nmiTimeout is how long a controller may take until an NMI that it was asked for reaches the host.
const nmiTimeout = 10 * time.Second
