package heal

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// UnhookProbe is the ID of the action that takes the handler from a stranger's probe, notifier or packet filter.
const UnhookProbe = "unhook-probe"

// unhookProbe has a probe call a function of the kernel's that does nothing and returns 0, in place of its handler; a chain of notifiers, too, for which 0 is
// NOTIFY_DONE; netfilter one that returns NF_ACCEPT. The probe itself stays: to take its breakpoint, or its call, out of code that may be running, the
// kernel's own functions are needed, which sleep.
//
// Whoever reads the pointer meanwhile gets the one function or the other, and each of the callers, which are in kernel/kprobes.c,
// arch/x86/kernel/kprobes, kernel/notifier.c and net/netfilter/core.c, goes on as if nobody had been called, so that one store of 8 bytes is all. A CPU that is
// in the handler at that moment finishes it.
func unhookProbe() Action {
	return Action{
		ID: UnhookProbe, Title: "Have a stranger's probe call nothing", Risk: RiskKernel,
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
		case "ftrace", "tracepoint":
			return fail(fmt.Errorf("the kernel calls %v from code that it has made for this user of %s, into which the address is written: no store takes it out safely: %w", h.To, h.Kind, kernel.ErrNotSupported))
		default:
			return fail(fmt.Errorf("%s of the %s %q leads to %v, and what it led to before is not known: %w", h.Member, h.Kind, h.Place, h.To, kernel.ErrNotSupported))
		}
		if len(p.Steps) == 0 {
			var err error
			if nothing, err = does.find(m); err != nil {
				return fail(err)
			}
			p.Title = fmt.Sprintf("have the %s at %s call nothing", h.Kind, h.Place)
			p.Steps = append(p.Steps, nothing)
		}
		if h.At%8 != 0 {
			return fail(fmt.Errorf("%s at %v is not aligned: %w", h.Member, h.At, kernel.ErrNotSupported))
		}
		pa, err := m.Phys(h.At)
		if err != nil {
			return fail(err)
		}
		p.Steps = append(p.Steps, Step{
			Op: OpArm, Why: fmt.Sprintf("in place of %v", h.To), Object: h.Member, Addr: pa, Virt: h.At,
			Expect: le(uint64(h.To), 8), Put: le(uint64(nothing.Virt), 8), Undo: true,
		})
	}
	if len(p.Steps) == 0 {
		return fail(fmt.Errorf("the finding names no probe that is there: %w", ErrGone))
	}
	return p, nil
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
