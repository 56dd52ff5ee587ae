package heal

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// UnhookProbe is the ID of the action that takes the handler from a stranger's probe, notifier or packet filter, has ftrace and tracepoints let go of him, and
// puts back what he has changed of handlers of input and of terminals.
const UnhookProbe = "unhook-probe"

// unhookProbe has a probe call a function of the kernel's that does nothing and returns 0, in place of its handler; a chain of notifiers, too, for which 0 is
// NOTIFY_DONE; netfilter one that returns NF_ACCEPT. The probe itself stays: to take its breakpoint, or its call, out of code that may be running, the
// kernel's own functions are needed, which sleep.
//
// Whoever reads the pointer meanwhile gets the one function or the other, and each of the callers, which are in kernel/kprobes.c,
// arch/x86/kernel/kprobes, kernel/notifier.c and net/netfilter/core.c, goes on as if nobody had been called, so that one store of 8 bytes is all. A CPU that is
// in the handler at that moment finishes it.
//
// A user of ftrace, and the only user of a tracepoint, are called by code that the kernel has patched for them, into which their address is written: there a
// worker of the kernel's runs what takes such patches back. See addWork.
func unhookProbe() Action {
	return Action{
		ID: UnhookProbe, Title: "Take a stranger out of what the kernel calls", Risk: RiskKernel,
		For: []detect.Kind{detect.KindTampering},
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to unhook a probe: no kernel is attached: %w", kernel.ErrNotFound)
			}
			s, err := v.Signs()
			if err != nil {
				return Plan{}, fmt.Errorf("plan to unhook a probe: %w", err)
			}
			return planUnhook(newModel(v), f, s.Hooks)
		},
	}
}

func planUnhook(m model, f detect.Finding, hooks []kernel.Hook) (Plan, error) {
	fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to unhook a probe: %w", err) }
	id := Identify(m.Info())
	p := Plan{Action: UnhookProbe, Finding: f.ID, Risk: RiskKernel, Kernel: &id}
	var nothing Step
	for _, h := range hooks {
		if detect.HookKey(h) != f.Key {
			continue
		}
		does := returns0
		switch h.Kind {
		case "kprobe", "kretprobe", "notifier":
		case "packet filter":
			does = accepts
		case "ftrace":
			p.Title = "have ftrace let go of " + h.Place
			if err := planUntrace(m, &p, h); err != nil {
				return fail(err)
			}
			continue
		case "tracepoint":
			if err := planUntrack(m, &p, h); err != nil {
				return fail(err)
			}
		default:
			switch {
			case h.Was != 0:
				if err := planBack(m, &p, h); err != nil {
					return fail(err)
				}
			case h.Kind != "input handler" || !slices.ContainsFunc(hooks, func(o kernel.Hook) bool { return o.Record == h.Record && o.Member == "input_handler.connect" }):
				return fail(fmt.Errorf("%s of the %s %q leads to %v, and what it led to before is not known: %w", h.Member, h.Kind, h.Place, h.To, kernel.ErrNotSupported))
			case len(p.Calls) == 0:
				p.Title = fmt.Sprintf("have the input handler %q leave", h.Place)
				if err := planLeave(m, &p, h); err != nil {
					return fail(err)
				}
			}
			continue
		}
		if nothing.Op == "" {
			var err error
			if nothing, err = does.find(m); err != nil {
				return fail(err)
			}
			p.Title = fmt.Sprintf("have the %s at %s call nothing", h.Kind, h.Place)
			p.Steps = append(p.Steps, nothing)
		}
		s, err := lead(m, h, nothing.Virt)
		if err != nil {
			return fail(err)
		}
		p.Steps = append(p.Steps, s)
	}
	if len(p.Steps) == 0 {
		return fail(fmt.Errorf("the finding names no probe that is there: %w", ErrGone))
	}
	return p, nil
}

// lead returns the store by which a hook leads elsewhere.
func lead(m model, h kernel.Hook, to kernel.VirtAddr) (Step, error) {
	if h.At%8 != 0 {
		return Step{}, fmt.Errorf("%s at %v is not aligned: %w", h.Member, h.At, kernel.ErrNotSupported)
	}
	pa, err := m.Phys(h.At)
	return Step{
		Op: OpArm, Why: fmt.Sprintf("in place of %v", h.To), Object: h.Member, Addr: pa, Virt: h.At,
		Expect: le(uint64(h.To), 8), Put: le(uint64(to), 8), Undo: true,
	}, err
}

// planBack plans to have a hook lead to where it led before: an eBPF program to its own code, for to return 0 would be to drop the packet, or to forbid what it
// is asked for.
func planBack(m model, p *Plan, h kernel.Hook) error {
	there := Step{Op: OpExpect, Why: "the function is there, and may be called through a pointer", Object: h.Member + " as it was", Virt: h.Was}
	var err error
	if h.Kind == "eBPF program" {
		there, err = compiled(m, h.Was)
	} else if there.Expect, err = callableAt(m, there.Object, h.Was); err == nil {
		there.Addr, err = m.Phys(h.Was)
	}
	if err != nil {
		return err
	}
	s, err := lead(m, h, h.Was)
	if err != nil {
		return err
	}
	p.Title = fmt.Sprintf("have the %s %q call what it called before", h.Kind, h.Place)
	p.Steps = append(p.Steps, there, s)
	return nil
}

// planLeave plans to have the kernel take an input handler off its list, as if he had asked for it himself: with his own function disconnect he is told to leave
// each device. A handler is a stranger's if the function connect is, too: of the kernel's own one or the other may have been changed before it was first seen.
func planLeave(m model, p *Plan, h kernel.Hook) error {
	l := layout{m: m}
	node := h.Record + kernel.VirtAddr(l.field("input_handler", "node", 16))
	if l.err != nil {
		return l.err
	}
	next, err := read64(m, node)
	if err != nil {
		return err
	}
	prev, err := read64(m, node+8)
	if err != nil {
		return err
	}
	// The kernel takes it off without looking whether it is there (input_unregister_handler, drivers/input/input.c).
	if next == uint64(node) {
		return fmt.Errorf("the input handler %q stands in no list, off which the kernel could take it: %w", h.Place, kernel.ErrNotSupported)
	}
	for _, x := range []struct {
		why, object string
		at          kernel.VirtAddr
		value       uint64
	}{
		{"it is the stranger's", h.Member, h.At, uint64(h.To)},
		{"it stands in the list", "input_handler.node.next", node, next}, {"it stands in the list", "input_handler.node.prev", node + 8, prev},
		{"the next one leads back", "list_head.prev", kernel.VirtAddr(next) + 8, uint64(node)}, {"the one before leads here", "list_head.next", kernel.VirtAddr(prev), uint64(node)},
	} {
		if now, err := read64(m, x.at); err != nil || now != x.value {
			return fmt.Errorf("the input handler %q stands in no list, off which the kernel could take it (%s at %v): %w", h.Place, x.object, x.at, cmp.Or(err, kernel.ErrNotSupported))
		}
		s, err := expect64(m, x.why, x.object, x.at, x.value)
		if err != nil {
			return err
		}
		p.Steps = append(p.Steps, s)
	}
	return addWork(m, p, unregisterInput, h.Record)
}

// planUntrace plans to have the kernel take a user of ftrace out (struct ftrace_ops, include/linux/ftrace.h), as if he had asked for it himself.
func planUntrace(m model, p *Plan, h kernel.Hook) error {
	l := layout{m: m}
	fn, flags := l.field("ftrace_ops", "func", 8), l.field("ftrace_ops", "flags", 8)
	if l.err != nil {
		return l.err
	}
	if h.At != h.Record+kernel.VirtAddr(fn) {
		return fmt.Errorf("%s of %v is at %v: %w", h.Member, h.Record, h.At, kernel.ErrTorn)
	}
	now, err := read64(m, h.Record+kernel.VirtAddr(flags))
	if err != nil {
		return err
	}
	if now&1 == 0 { // FTRACE_OPS_FL_ENABLED; of one that is not, the kernel warns
		return fmt.Errorf("he is no longer in force: %w", ErrGone)
	}
	for _, x := range []struct {
		why, object string
		off, value  uint64
	}{{"it is the stranger's", h.Member, fn, uint64(h.To)}, {"it is in force", "ftrace_ops.flags", flags, now}} {
		s, err := expect64(m, x.why, x.object, h.Record+kernel.VirtAddr(x.off), x.value)
		if err != nil {
			return err
		}
		p.Steps = append(p.Steps, s)
	}
	return addWork(m, p, unregisterFtrace, h.Record)
}

// planUntrack plans what precedes the store by which a tracepoint calls nothing in a stranger's place (struct tracepoint, include/linux/tracepoint-defs.h).
// Who is called there beside others is so taken out altogether, for they are called one by one as the table has them. A tracepoint's only user is called by the
// code itself: there the tracepoint is switched off, and stays so until somebody else wants it.
func planUntrack(m model, p *Plan, h kernel.Hook) error {
	l := layout{m: m}
	key, enabled, users := l.field("tracepoint", "key", l.sizeof("static_key")), l.field("static_key", "enabled.counter", 4), l.field("tracepoint", "funcs", 8)
	size, fn := l.sizeof("tracepoint_func"), l.field("tracepoint_func", "func", 8)
	if l.err != nil {
		return l.err
	}
	if h.Of == 0 || h.At != h.Record+kernel.VirtAddr(fn) {
		return fmt.Errorf("its tracepoint is not known: %w", kernel.ErrNotFound)
	}
	table, err := read64(m, h.Of+kernel.VirtAddr(users))
	if err != nil {
		return err
	}
	n, mine := 0, false
	for at := kernel.VirtAddr(table); ; at += kernel.VirtAddr(size) {
		to, err := read64(m, at+kernel.VirtAddr(fn))
		if err != nil {
			return err
		}
		if to == 0 {
			break
		}
		if n++; n > maxUsers {
			return fmt.Errorf("it has more than %d users: %w", maxUsers, kernel.ErrTorn)
		}
		mine = mine || at == h.Record
	}
	if !mine {
		return fmt.Errorf("its table is another one by now: %w", ErrGone)
	}
	s, err := expect64(m, "nobody has come or gone", "tracepoint.funcs", h.Of+kernel.VirtAddr(users), table)
	if err != nil {
		return err
	}
	p.Steps = append(p.Steps, s)
	if n > 1 {
		return nil
	}
	at := h.Of + kernel.VirtAddr(key+enabled)
	on, err := read32(m, at)
	switch {
	case err != nil || on == 0: // it is off already
		return err
	case on != 1: // and never of a tracepoint
		return fmt.Errorf("its key is on %d times: %w", int32(on), kernel.ErrNotSupported)
	}
	return addWork(m, p, disableKey, h.Of+kernel.VirtAddr(key))
}

const maxUsers = 256 // of a tracepoint

func expect64(m model, why, object string, at kernel.VirtAddr, value uint64) (Step, error) {
	pa, err := m.Phys(at)
	return Step{Op: OpExpect, Why: why, Object: object, Addr: pa, Virt: at, Expect: le(value, 8)}, err
}

// idle is what a function does that does nothing but return a number, whatever it is given.
type idle struct {
	what  string   // for people
	names []string // of functions that do, of which each kernel has one
	code  []byte   // behind its first bytes, before it returns
}

var (
	// The latter is what a panicked kernel calls where no driver wants to blink.
	returns0 = idle{"returns 0", []string{"__static_call_return0", "no_blink"}, []byte{0x31, 0xc0}} // xor %eax,%eax
	// By this netfilter itself replaces a filter that is leaving (net/netfilter/core.c).
	accepts = idle{"accepts each packet", []string{"accept_all"}, []byte{0xb8, 1, 0, 0, 0}} // mov $NF_ACCEPT,%eax
	returns = [][]byte{{0xc3}, {0xe9}}                                                      // itself, or by a thunk
)

// find returns the step that makes sure of such a function.
func (f idle) find(m model) (Step, error) {
	if m.Info().Arch == archAArch64 {
		return Step{}, fmt.Errorf("hooks are taken from strangers on x86-64 only: %w", kernel.ErrNotSupported)
	}
	var all error
	for _, name := range f.names {
		va, _, err := callable(m, name)
		code := make(Bytes, 16)
		if err == nil {
			err = m.ReadVirt(va, code)
		}
		if err != nil {
			all = errors.Join(all, err)
			continue
		}
		rest := []byte(code)
		for _, head := range [][]byte{endbr64, sealed, fentryNop} {
			rest = bytes.TrimPrefix(rest, head)
		}
		then, ok := bytes.CutPrefix(rest, f.code)
		if !ok || !bytes.HasPrefix(then, returns[0]) && !bytes.HasPrefix(then, returns[1]) {
			all = errors.Join(all, fmt.Errorf("%s is %x, which is not a function that only %s: %w", name, []byte(code), f.what, kernel.ErrNotSupported))
			continue
		}
		pa, err := m.Phys(va)
		if err != nil {
			return Step{}, err
		}
		return Step{Op: OpExpect, Why: "the function only " + f.what, Object: name, Addr: pa, Virt: va, Expect: code}, nil
	}
	return Step{}, fmt.Errorf("no function that only %s: %w", f.what, all)
}

// prologue is how the machine code of an eBPF program begins (emit_prologue of arch/x86/net/bpf_jit_comp.c, v5.10 to v7.2): room for a call of a trampoline, or
// that call, what counts tail calls, or room for it, and a frame.
var (
	prologueCalls  = [][]byte{fentryNop, {0xe8}}                                                      // call rel32
	prologueCounts = [][]byte{{0x48, 0x31, 0xc0}, {0x31, 0xc0}, {0x0f, 0x1f, 0x00}, {0x66, 0x90}, {}} // xor %rax,%rax; xor %eax,%eax; nop
	prologueFrame  = []byte{0x55, 0x48, 0x89, 0xe5}                                                   // push %rbp; mov %rsp,%rbp
)

// compiled returns the step that makes sure that the machine code of an eBPF program begins at an address.
func compiled(m model, va kernel.VirtAddr) (Step, error) {
	if m.Info().Arch == archAArch64 {
		return Step{}, fmt.Errorf("hooks are taken from strangers on x86-64 only: %w", kernel.ErrNotSupported)
	}
	code := make(Bytes, min(20, 4096-va%4096))
	if err := m.ReadVirt(va, code); err != nil {
		return Step{}, err
	}
	rest := bytes.TrimPrefix([]byte(code), endbr64)
	for _, call := range prologueCalls {
		if len(rest) < len(fentryNop) || !bytes.HasPrefix(rest, call) {
			continue
		}
		for _, count := range prologueCounts {
			if bytes.HasPrefix(rest[len(fentryNop):], slices.Concat(count, prologueFrame)) {
				pa, err := m.Phys(va)
				return Step{Op: OpExpect, Why: "the code of an eBPF program begins here", Object: "bpf_prog_aux.ksym.start", Addr: pa, Virt: va, Expect: code}, err
			}
		}
	}
	return Step{}, fmt.Errorf("at %v is %x, which is not how the code of an eBPF program begins: %w", va, []byte(code), kernel.ErrNotSupported)
}
