package heal

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// SetSysctl is the ID of the action that sets a number of the host's kernel.
const SetSysctl = "set-sysctl"

// sysctl is a number of /proc/sys that may be set from outside. It is set only where the running kernel's own ctl_table has it under that
// name with this size and one of these handlers, and at the variable of that symbol; the handler's bounds there (extra1, extra2) bound what it is
// set to besides min and max, which must also hold for what is there.
type sysctl struct {
	name     string
	symbol   string // of the variable, or of the structure that it is a member of; as MODULE:SYMBOL for a module's
	typ      string
	member   string
	size     int
	unsigned bool
	handlers string // what the kernel does when somebody writes there
	unit     string
	min, max int64
	why      string // a store alone does all that the handler does
}

const (
	ints  = "proc_dointvec proc_dointvec_minmax proc_douintvec proc_douintvec_minmax" // they store an int, and nothing else
	ulong = "proc_doulongvec_minmax"
	admin = "proc_dointvec_minmax_sysadmin proc_dointvec_minmax" // the first looks at who asks
)

// sysctls are all. What names a program (kernel.modprobe, kernel.core_pattern) is none of them, nor is what a handler has to pass on:
// kernel.watchdog_thresh (timers are set anew), kernel.sysrq (a handler of input is registered), vm.min_free_kbytes (watermarks are
// computed), vm.dirty_ratio and vm.overcommit_ratio (their siblings are cleared), kernel.sched_rt_runtime_us (each run queue is told).
var sysctls = []sysctl{
	{name: "kernel.pid_max", symbol: "pid_max", size: 4, handlers: ints, min: 301, max: 4 << 20, why: "alloc_pid reads it at each fork"},
	{name: "kernel.threads-max", symbol: "max_threads", size: 4, handlers: "sysctl_max_threads", min: 1, max: 0x3fffffff,
		why: "copy_process reads it at each fork; the handler checks 1 to MAX_THREADS and stores"},
	{name: "fs.file-max", symbol: "files_stat", typ: "files_stat_struct", member: "max_files", size: 8, unsigned: true, handlers: ulong, min: 1024, max: math.MaxInt64,
		why: "alloc_empty_file reads it at each open"},
	{name: "fs.nr_open", symbol: "sysctl_nr_open", size: 4, unsigned: true, handlers: ints, min: 64, max: math.MaxInt32 &^ 63, why: "expand_files and setrlimit read it at each use"},
	{name: "vm.overcommit_memory", symbol: "sysctl_overcommit_memory", size: 4, handlers: ints + " overcommit_policy_handler", min: 0, max: 1,
		why: "between 0 and 1 the handler only stores: to and from 2 it sums up what is committed first"},
	{name: "vm.panic_on_oom", symbol: "sysctl_panic_on_oom", size: 4, handlers: ints, min: 0, max: 2, why: "check_panic_on_oom reads it when memory has run out"},
	{name: "vm.oom_kill_allocating_task", symbol: "sysctl_oom_kill_allocating_task", size: 4, handlers: ints, min: 0, max: 1, why: "out_of_memory reads it when memory has run out"},
	{name: "vm.swappiness", symbol: "vm_swappiness", size: 4, handlers: ints, min: 0, max: 200, why: "get_scan_count reads it at each reclaim"},
	{name: "vm.vfs_cache_pressure", symbol: "sysctl_vfs_cache_pressure", size: 4, handlers: ints, min: 0, max: 10000, why: "vfs_pressure_ratio reads it at each reclaim"},
	{name: "vm.max_map_count", symbol: "sysctl_max_map_count", size: 4, handlers: ints, min: 1024, max: math.MaxInt32, why: "mmap reads it at each call"},
	{name: "kernel.panic", symbol: "panic_timeout", size: 4, handlers: ints, unit: "s", min: -1, max: 86400, why: "panic reads it when it happens"},
	{name: "kernel.panic_on_oops", symbol: "panic_on_oops", size: 4, handlers: ints, min: 0, max: 1, why: "oops_end reads it when it happens"},
	{name: "kernel.panic_on_warn", symbol: "panic_on_warn", size: 4, handlers: ints, min: 0, max: 1, why: "__warn reads it when it happens"},
	{name: "kernel.panic_on_rcu_stall", symbol: "sysctl_panic_on_rcu_stall", size: 4, handlers: ints, min: 0, max: 1, why: "panic_on_rcu_stall reads it when it happens"},
	{name: "kernel.softlockup_panic", symbol: "softlockup_panic", size: 4, handlers: ints, min: 0, max: 1, why: "watchdog_timer_fn reads it when it happens"},
	{name: "kernel.hardlockup_panic", symbol: "hardlockup_panic", size: 4, handlers: ints, min: 0, max: 1, why: "the NMI's handler reads it when it happens"},
	{name: "kernel.hung_task_panic", symbol: "sysctl_hung_task_panic", size: 4, handlers: ints, min: 0, max: 1, why: "check_hung_task reads it when it happens"},
	{name: "kernel.hung_task_timeout_secs", symbol: "sysctl_hung_task_timeout_secs", size: 8, unsigned: true, handlers: "proc_dohung_task_timeout_secs", unit: "s", min: 1, max: math.MaxInt32,
		why: "khungtaskd reads it each time it wakes: the handler only wakes it sooner, which matters where it was 0"},
	{name: "kernel.hung_task_warnings", symbol: "sysctl_hung_task_warnings", size: 4, handlers: ints, min: -1, max: math.MaxInt32, why: "check_hung_task reads it, and counts it down"},
	{name: "kernel.unknown_nmi_panic", symbol: "unknown_nmi_panic", size: 4, handlers: ints, min: 0, max: 1, why: "unknown_nmi_error reads it when it happens"},
	{name: "kernel.randomize_va_space", symbol: "randomize_va_space", size: 4, handlers: ints, min: 0, max: 2, why: "load_elf_binary reads it at each exec"},
	{name: "kernel.kptr_restrict", symbol: "kptr_restrict", size: 4, handlers: admin, min: 0, max: 2, why: "restricted_pointer reads it at each use"},
	{name: "kernel.dmesg_restrict", symbol: "dmesg_restrict", size: 4, handlers: admin, min: 0, max: 1, why: "check_syslog_permissions reads it at each use"},
	{name: "kernel.perf_event_paranoid", symbol: "sysctl_perf_event_paranoid", size: 4, handlers: ints, min: -1, max: 4, why: "perf_event_open reads it at each call"},
	{name: "kernel.modules_disabled", symbol: "modules_disabled", size: 4, handlers: ints, min: 0, max: 1, why: "may_init_module reads it at each load; the table takes 1 only"},
	{name: "net.ipv4.tcp_syncookies", symbol: "init_net", typ: "net", member: "ipv4.sysctl_tcp_syncookies", size: 1, unsigned: true, handlers: "proc_dou8vec_minmax", min: 0, max: 2,
		why: "tcp_conn_request reads it at each SYN"},
	{name: "net.netfilter.nf_conntrack_max", symbol: "nf_conntrack:nf_conntrack_max", size: 4, unsigned: true, handlers: ints, min: 0, max: math.MaxInt32,
		why: "__nf_conntrack_alloc reads it at each connection"},
}

func setSysctl() Action {
	a := Action{
		ID: SetSysctl, Title: "Set a number of the kernel's settings (sysctl)", Risk: RiskKernel, For: everyKind(), Undo: SetSysctl,
		Set: func(_ context.Context, v *kernel.View, f detect.Finding, val Value) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to set %s: no kernel is attached: %w", val.Name, kernel.ErrNotFound)
			}
			return planSysctl(newModel(v), f, val)
		},
	}
	for _, s := range sysctls {
		a.Settings = append(a.Settings, Setting{Name: s.name, Unit: s.unit, Min: s.min, Max: s.max})
	}
	return a
}

// at returns where the kernel's symbols and types say that the number is.
func (s sysctl) at(m model) (kernel.VirtAddr, error) {
	var va kernel.VirtAddr
	var err error
	if module, name, ok := strings.Cut(s.symbol, ":"); ok {
		va, err = m.ModuleSymbol(module, name)
	} else {
		va, err = m.Symbol(s.symbol)
	}
	if err != nil || s.typ == "" {
		return va, err
	}
	l := layout{m: m}
	va += kernel.VirtAddr(l.field(s.typ, s.member, uint64(s.size)))
	return va, l.err
}

// read returns a number of the setting's kind, as its handler takes it.
func (s sysctl) read(m model, va kernel.VirtAddr, size int) (int64, error) {
	b := make([]byte, 8)
	if err := m.ReadVirt(va, b[:size]); err != nil {
		return 0, err
	}
	if n := binary.LittleEndian.Uint64(b); s.unsigned || size != 4 {
		return int64(min(n, math.MaxInt64)), nil
	}
	return int64(int32(binary.LittleEndian.Uint32(b))), nil
}

func planSysctl(m model, f detect.Finding, val Value) (Plan, error) {
	fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to set %s: %w", val.Name, err) }
	i := slices.IndexFunc(sysctls, func(s sysctl) bool { return s.name == val.Name })
	if i < 0 {
		return fail(fmt.Errorf("it is no setting that may be set: %w", ErrValue))
	}
	s := sysctls[i]
	var own kernel.Sysctl
	for x, err := range m.Sysctls() {
		if err != nil {
			return fail(err)
		}
		if x.Name == s.name {
			own = x
		}
	}
	if own.Name == "" {
		return fail(fmt.Errorf("this host's kernel has no such setting: %w", kernel.ErrNotSupported))
	}
	va, err := s.at(m)
	if err != nil {
		return fail(err)
	}
	// The table of kernel.threads-max leads nowhere: its handler knows the variable.
	if own.Addr != va && own.Addr != 0 || own.Size != s.size || !slices.Contains(strings.Fields(s.handlers), own.Handler) {
		return fail(fmt.Errorf("the kernel's table has it at %v with %d bytes and %s, and its symbol is at %v with %d: %w", own.Addr, own.Size, own.Handler, va, s.size, kernel.ErrNotSupported))
	}
	low, high := s.min, s.max
	for _, bound := range []struct {
		at    kernel.VirtAddr
		upper bool
	}{{own.Low, false}, {own.High, true}} {
		if bound.at == 0 || s.handlers == "sysctl_max_threads" {
			continue
		}
		size := max(s.size, 4) // proc_dou8vec_minmax has its bounds as int
		n, err := s.read(m, bound.at, size)
		if err != nil {
			return fail(err)
		}
		if bound.upper {
			high = min(high, n)
		} else {
			low = max(low, n)
		}
	}
	if val.Number < low || val.Number > high {
		return fail(fmt.Errorf("it cannot be %d on this host, whose kernel takes %d to %d: %w", val.Number, low, high, ErrValue))
	}
	now, err := s.read(m, va, s.size)
	if err != nil {
		return fail(err)
	}
	switch {
	case now == val.Number:
		return fail(fmt.Errorf("it is %d already: %w", now, ErrValue))
	case now < s.min || now > s.max:
		return fail(fmt.Errorf("it is %d, from which a store alone does not lead away: the kernel's handler does more then: %w", now, kernel.ErrNotSupported))
	}
	pa, err := m.Phys(va)
	if err != nil {
		return fail(err)
	}
	step := Step{Op: OpWrite, Why: s.why, Object: s.name, Addr: pa, Virt: va, Expect: le(uint64(now), s.size), Put: le(uint64(val.Number), s.size), Undo: true}
	if s.size == 8 && pa%8 == 0 {
		step.Op = OpArm
	}
	id := Identify(m.Info())
	return Plan{
		Action: SetSysctl, Finding: f.ID, Risk: RiskKernel, Kernel: &id, Undo: true, More: true, Value: &val,
		Title: fmt.Sprintf("set %s from %d to %d", s.name, now, val.Number), Steps: []Step{step},
	}, nil
}
