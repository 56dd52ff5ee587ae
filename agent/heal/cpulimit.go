package heal

import (
	"errors"
	"fmt"
	"math"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// cpuLimit is how a process is given no more time of CPUs: its hard limit is set to nothing, and the kernel is told to look at that. At its next tick
// in the process check_process_timers of kernel/time/posix-cpu-timers.c sends it SIGKILL, "At the hard limit, send SIGKILL". Nothing needs to be laid
// down anywhere for that, and children that are started meanwhile inherit it (copy_signal of kernel/fork.c, posix_cpu_timers_init_group); but it takes
// a process that runs, and new ones must be barred: else each lives until its first tick, and has children until then. struct posix_cputimers is as
// here since v5.7 (include/linux/posix-timers.h).
type cpuLimit struct {
	signal, limit, next, active uint64
}

const (
	rlimitCPU  = 0 // RLIMIT_CPU, include/uapi/asm-generic/resource.h
	cpuClocks  = 3 // CPUCLOCK_MAX; CPUCLOCK_PROF, of which the limit is, is the first
	infinity   = math.MaxUint64
	maxExpired = 16 // processes in one plan: if one of them has ended, the rest has to wait for the next
)

func newCPULimit(m model) (c cpuLimit, err error) {
	l := layout{m: m}
	limits, err := newRlimits(m)
	if err != nil {
		return c, err
	}
	most := l.field("rlimit", "rlim_max", 8)
	timers := l.field("signal_struct", "posix_cputimers", l.sizeof("posix_cputimers"))
	next := l.field("posix_cputimer_base", "nextevt", 8)
	bases := l.field("posix_cputimers", "bases", cpuClocks*l.sizeof("posix_cputimer_base"))
	active, expiry := l.field("posix_cputimers", "timers_active", 4), l.field("posix_cputimers", "expiry_active", 4)
	if l.err != nil {
		return c, fmt.Errorf("layout of CPU timers: %w", l.err)
	}
	if limits.cur != 0 || most != 8 || limits.size != 16 || (timers+bases+next)%8 != 0 || expiry != active+4 || (timers+active)%8 != 0 {
		return c, fmt.Errorf("layout of CPU timers is not the one known (timers_active at %d, expiry_active at %d, rlim_max at %d): %w", timers+active, timers+expiry, most, kernel.ErrNotSupported)
	}
	return cpuLimit{limits.signal, limits.rlim + rlimitCPU*limits.size, timers + bases + next, timers + active}, nil
}

// state of a process's limit.
type cpuLimitState int

const (
	cpuFree    cpuLimitState = iota // it can be given one
	cpuLimited                      // it has none left
	cpuOwn                          // it uses such timers itself
)

// of returns the state of a process, and the steps that leave it no time.
func (c *cpuLimit) of(m model, t kernel.Task) (cpuLimitState, []Step, error) {
	signal, err := read64(m, t.Addr+kernel.VirtAddr(c.signal))
	if err != nil {
		return 0, nil, err
	}
	if signal == 0 {
		return 0, nil, ErrGone
	}
	words := [...]struct {
		object, why string
		at, put     uint64
	}{
		{"signal_struct.rlim[RLIMIT_CPU].rlim_cur", "it has no time of CPUs left", c.limit, 0},
		{"signal_struct.rlim[RLIMIT_CPU].rlim_max", "nor gets any", c.limit + 8, 0},
		{"posix_cputimers.bases[CPUCLOCK_PROF].nextevt", "the limit is reached", c.next, 0},
		{"posix_cputimers.timers_active", "the kernel looks at that at the next tick of this process", c.active, 1},
	}
	var now [len(words)]uint64
	for i, w := range words {
		if now[i], err = read64(m, kernel.VirtAddr(signal+w.at)); err != nil {
			return 0, nil, err
		}
	}
	limit, most, next, active := now[0], now[1], now[2], now[3]
	switch {
	case active != 0 && limit == 0 && most == 0:
		return cpuLimited, nil, nil
	case active != 0, next != infinity && next != 0:
		return cpuOwn, nil, nil
	}
	var steps []Step
	for i, w := range words {
		if now[i] == w.put {
			continue
		}
		va := kernel.VirtAddr(signal + w.at)
		pa, err := m.Phys(va)
		if err != nil {
			return 0, nil, err
		}
		// Each by itself, for before each it is looked whether it is still this process.
		steps = append(steps, Step{Op: OpArm, Why: w.why, Object: w.object, Addr: pa, Virt: va, Expect: le(now[i], 8), Put: le(w.put, 8), Undo: true, MayFail: true})
	}
	return cpuFree, steps, nil
}

// planExpire plans to leave the processes of a tree that run no time. It returns those that this is nothing for, and ErrNotYet while others that have none
// left have not ended.
func planExpire(m model, f detect.Finding, tree []kernel.Task) (p Plan, others []kernel.Task, err error) {
	limit, err := newCPULimit(m)
	if err != nil {
		return Plan{}, tree, nil // the way of signals is left
	}
	ids, err := newProcessIDs(m)
	if err != nil {
		return Plan{}, nil, err
	}
	id := Identify(m.Info())
	p = Plan{Action: StopForkBomb, Finding: f.ID, Risk: RiskTask, Kernel: &id, More: true}
	waits := false
	for _, t := range tree {
		v, err := ids.of(m, t)
		switch {
		case errors.Is(err, ErrProtected), errors.Is(err, ErrGone):
			continue
		case err != nil, v.dying:
			waits = true
			continue
		case t.State != "R":
			others = append(others, t)
			continue
		}
		state, how, err := limit.of(m, t)
		switch {
		case err != nil, state == cpuLimited:
			waits = true
		case state == cpuOwn:
			others = append(others, t)
		default:
			for _, c := range v.checks {
				c.MayFail = true
				p.Steps = append(p.Steps, c)
			}
			p.Steps = append(p.Steps, how...)
			p.Targets = append(p.Targets, Target{TGID: t.TGID, PID: t.PID, Comm: t.Comm, UID: t.UID, Start: t.Start})
		}
		if len(p.Targets) == maxExpired {
			break
		}
	}
	if len(p.Targets) > 0 {
		p.Title = fmt.Sprintf("leave %d processes of the tree of %q no time, so that the kernel ends them", len(p.Targets), f.Culprit.Comm)
		return p, nil, nil
	}
	if waits {
		return Plan{}, nil, ErrNotYet
	}
	return Plan{}, others, nil
}
