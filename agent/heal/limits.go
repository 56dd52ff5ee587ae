package heal

import (
	"context"
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// IDs of the actions that change limits and settings of the kernel.
const (
	RaiseLimit  = "raise-limit"
	LimitMemory = "limit-memory"
	ArmPanic    = "arm-panic"
)

// limit is a number of the kernel that may be raised. These are all: what is written is twice what is there, never more than
// most, and only where the kernel's types say that it has this size.
type limit struct {
	key    string // of the finding
	module string // that has it; empty for the kernel itself
	symbol string
	typ    string // whose member it is; empty for a variable
	member string
	size   int
	most   uint64
}

var limits = []limit{
	// kernel/fork.c: MAX_THREADS is FUTEX_TID_MASK; a host that needs more than this many has another trouble.
	{key: "threads", symbol: "max_threads", size: 4, most: 1 << 20},
	// kernel/pid.c: PID_MAX_LIMIT of 64-bit kernels. A member of the namespace since v6.14.
	{key: "pids", symbol: "init_pid_ns", typ: "pid_namespace", member: "pid_max", size: 4, most: 4 << 20},
	{key: "pids", symbol: "pid_max", size: 4, most: 4 << 20},
	// fs/file_table.c
	{key: "files", symbol: "files_stat", typ: "files_stat_struct", member: "max_files", size: 8, most: 1 << 24},
	// net/netfilter/nf_conntrack_core.c; each connection takes some 300 bytes of slab.
	{key: "conntrack", module: "nf_conntrack", symbol: "nf_conntrack_max", size: 4, most: 1 << 20},
}

// raiseLimit doubles a limit of the host as a whole that is about to be reached.
func raiseLimit() Action {
	return Action{
		ID: RaiseLimit, Title: "Double the limit of threads, process numbers, open files or tracked connections that is about to be reached", Risk: RiskKernel,
		For: []detect.Kind{detect.KindExhaustion}, Undo: RaiseLimit,
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to raise a limit: no kernel is attached: %w", kernel.ErrNotFound)
			}
			return planRaise(newModel(v), f)
		},
	}
}

// at returns where the variable is that is the limit, or that it is a member of.
func (l limit) at(m model) (kernel.VirtAddr, error) {
	if l.module != "" {
		return m.ModuleSymbol(l.module, l.symbol)
	}
	return m.Symbol(l.symbol)
}

func planRaise(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to raise a limit: %w", err) }
	last := fmt.Errorf("%s have no limit that can be raised: %w", f.Key, kernel.ErrNotSupported)
	for _, l := range limits {
		if l.key != f.Key {
			continue
		}
		va, err := l.at(m)
		if err == nil && l.typ != "" {
			y := layout{m: m}
			va += kernel.VirtAddr(y.field(l.typ, l.member, uint64(l.size)))
			err = y.err
		}
		if err != nil {
			last = err
			continue
		}
		var now uint64
		if l.size == 4 {
			var n uint32
			n, err = read32(m, va)
			now = uint64(n)
		} else {
			now, err = read64(m, va)
		}
		if err != nil {
			return fail(err)
		}
		if now == 0 || now >= l.most {
			return fail(fmt.Errorf("the limit of %s is %d, and is not raised beyond %d: %w", f.Key, now, l.most, kernel.ErrNotSupported))
		}
		pa, err := m.Phys(va)
		if err != nil {
			return fail(err)
		}
		put := min(2*now, l.most)
		id := Identify(m.Info())
		return Plan{
			Action: RaiseLimit, Finding: f.ID, Risk: RiskKernel, Kernel: &id, Undo: true,
			Title: fmt.Sprintf("raise the limit of %s from %d to %d", f.Key, now, put),
			Steps: []Step{{Op: OpWrite, Why: "there is room again while somebody looks for who uses it up", Object: l.symbol,
				Addr: pa, Virt: va, Expect: le(now, l.size), Put: le(put, l.size), Undo: true}},
		}, nil
	}
	return fail(last)
}

// rlimitAS is RLIMIT_AS of include/uapi/asm-generic/resource.h.
const rlimitAS = 9

// rlimits is where the soft limits of processes are.
type rlimits struct{ signal, rlim, size, cur uint64 }

func newRlimits(m model) (r rlimits, err error) {
	l := layout{m: m}
	r.signal, r.cur, r.size = l.field("task_struct", "signal", 8), l.field("rlimit", "rlim_cur", 8), l.sizeof("rlimit")
	if l.err != nil {
		return r, l.err
	}
	f, err := m.Field("signal_struct", "rlim")
	if err != nil {
		return r, err
	}
	if f.Size < (rlimitAS+1)*r.size {
		return r, fmt.Errorf("signal_struct.rlim has %d bytes: %w", f.Size, kernel.ErrNotSupported)
	}
	r.rlim = f.Offset
	return r, nil
}

// of returns where a soft limit of a process is, and what it is.
func (r rlimits) of(m model, t kernel.Task, n uint64) (kernel.VirtAddr, uint64, error) {
	signal, err := read64(m, t.Addr+kernel.VirtAddr(r.signal))
	if err != nil {
		return 0, 0, err
	}
	va := kernel.VirtAddr(signal + r.rlim + n*r.size + r.cur)
	now, err := read64(m, va)
	return va, now, err
}

// limitMemory lets a process map no more memory than it has: its next request fails, and it lives, as far as it bears that.
func limitMemory() Action {
	return Action{
		ID: LimitMemory, Title: "Give the process no more memory than it has mapped", Risk: RiskTask,
		For: []detect.Kind{detect.KindMemoryHog}, Undo: LimitMemory,
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to limit PID %d: no kernel is attached: %w", f.Culprit.TGID, kernel.ErrNotFound)
			}
			return planLimitMemory(newModel(v), f)
		},
	}
}

func planLimitMemory(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) {
		return Plan{}, fmt.Errorf("plan to limit PID %d: %w", f.Culprit.TGID, err)
	}
	vic, err := findVictim(m, f.Culprit)
	if err != nil {
		return fail(err)
	}
	r, err := newRlimits(m)
	if err != nil {
		return fail(err)
	}
	va, now, err := r.of(m, vic.leader, rlimitAS)
	if err != nil {
		return fail(err)
	}
	if now == 0 {
		return fail(fmt.Errorf("it is limited: %w", ErrGone))
	}
	pa, err := m.Phys(va)
	if err != nil {
		return fail(err)
	}
	id := Identify(m.Info())
	t := vic.leader
	return Plan{
		Action: LimitMemory, Finding: f.ID, Risk: RiskTask, Kernel: &id, Undo: true,
		Title:  fmt.Sprintf("let %q (PID %d) map no more memory", t.Comm, t.TGID),
		Target: &Target{TGID: t.TGID, PID: t.PID, Comm: t.Comm, UID: t.UID, Start: t.Start},
		Steps: append(vic.checks, Step{Op: OpWrite, Why: "what it asks for next is refused (may_expand_vm of mm/mmap.c)", Object: "signal_struct.rlim[RLIMIT_AS].rlim_cur",
			Addr: pa, Virt: va, Expect: le(now, 8), Put: le(0, 8), Undo: true}),
	}, nil
}

// panics are settings by which a kernel panics, and restarts itself, at its next trouble of a kind, with what is written there.
// Not every kernel is built with each.
var panics = []struct {
	symbol, why string
	put         uint32
}{
	{"panic_timeout", "a panic restarts the machine, after 10 s for what dumps it", 10},
	{"panic_on_oops", "a fault in the kernel's own code is a panic", 1},
	{"softlockup_panic", "a CPU that stays in the kernel is a panic", 1},
	{"hardlockup_panic", "a CPU that takes no interrupts is a panic", 1},
	{"sysctl_hung_task_panic", "a task that hangs is a panic, after the kernel's own time", 1},
	{"sysctl_panic_on_rcu_stall", "a grace period of RCU that does not end is a panic", 1},
}

// armPanic has a kernel that is ill already restart by itself at its next trouble, as its own settings allow. The finding stands.
func armPanic() Action {
	return Action{
		ID: ArmPanic, Title: "Have the kernel panic, and restart, at its next trouble", Risk: RiskKernel,
		For: []detect.Kind{detect.KindOops, detect.KindSoftLockup, detect.KindRCUStall, detect.KindHungTask, detect.KindKernelWarning, detect.KindHardware, detect.KindStuckWork, detect.KindStuckIO, detect.KindTampering}, Undo: ArmPanic,
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to arm the kernel's panic: no kernel is attached: %w", kernel.ErrNotFound)
			}
			return planArmPanic(newModel(v), f)
		},
	}
}

func planArmPanic(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) {
		return Plan{}, fmt.Errorf("plan to arm the kernel's panic: %w", err)
	}
	id := Identify(m.Info())
	p := Plan{Action: ArmPanic, Finding: f.ID, Risk: RiskKernel, Kernel: &id, Undo: true, More: true, Title: "have the kernel restart itself at its next trouble"}
	for i, x := range panics {
		va, err := m.Symbol(x.symbol)
		if err != nil {
			if i == 0 {
				return fail(err) // without it a panic would be the end
			}
			continue
		}
		now, err := read32(m, va)
		if err != nil {
			return fail(err)
		}
		if now == x.put || i == 0 && now != 0 {
			continue // somebody has chosen
		}
		if now > 1 {
			return fail(fmt.Errorf("%s is %d: %w", x.symbol, now, kernel.ErrNotSupported))
		}
		pa, err := m.Phys(va)
		if err != nil {
			return fail(err)
		}
		p.Steps = append(p.Steps, Step{Op: OpWrite, Why: x.why, Object: x.symbol, Addr: pa, Virt: va, Expect: le(uint64(now), 4), Put: le(uint64(x.put), 4), Undo: true})
	}
	if len(p.Steps) == 0 {
		return fail(fmt.Errorf("it is set so: %w", ErrGone))
	}
	return p, nil
}
