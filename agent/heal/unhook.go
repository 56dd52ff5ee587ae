package heal

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// UnhookProbe is the ID of the action that takes the handler from a stranger's probe.
const UnhookProbe = "unhook-probe"

// unhookProbe has a probe call a function of the kernel's that does nothing and returns 0, in place of its handler. The probe itself stays: to take
// its breakpoint, or its call, out of code that may be running, the kernel's own functions are needed, which sleep.
//
// Whoever reads the pointer meanwhile gets the one function or the other, and each of the callers, which are in kernel/kprobes.c and
// arch/x86/kernel/kprobes, goes on with the probed function when a handler returns 0, so that one store of 8 bytes is all. A CPU that is in the
// handler at that moment finishes it.
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
		if h.Kind == "ftrace" {
			return fail(fmt.Errorf("the kernel calls %v from code that it has made for this user of ftrace, into which the address is written: no store takes it out safely: %w", h.To, kernel.ErrNotSupported))
		}
		if len(p.Steps) == 0 {
			var err error
			if nothing, err = doesNothing(m); err != nil {
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

// Code of a function that returns 0 whatever it is given, behind its first bytes: xor %eax,%eax, and a return, which may be by a thunk.
var (
	xorEAX  = []byte{0x31, 0xc0}
	returns = [][]byte{{0xc3}, {0xe9}}
)

// doesNothing returns the step that makes sure of a function that may be called by a pointer, with any arguments, and only returns 0. One of
// these each kernel has: the latter is what a panicked one calls where no driver wants to blink.
func doesNothing(m model) (Step, error) {
	if m.Info().Arch == archAArch64 {
		return Step{}, fmt.Errorf("probes are taken from strangers on x86-64 only: %w", kernel.ErrNotSupported)
	}
	var all error
	for _, name := range []string{"__static_call_return0", "no_blink"} {
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
		then, ok := bytes.CutPrefix(rest, xorEAX)
		if !ok || !bytes.HasPrefix(then, returns[0]) && !bytes.HasPrefix(then, returns[1]) {
			all = errors.Join(all, fmt.Errorf("%s is %x, which does more than to return 0: %w", name, []byte(code), kernel.ErrNotSupported))
			continue
		}
		pa, err := m.Phys(va)
		if err != nil {
			return Step{}, err
		}
		return Step{Op: OpExpect, Why: "the function does nothing", Object: name, Addr: pa, Virt: va, Expect: code}, nil
	}
	return Step{}, fmt.Errorf("no function that does nothing: %w", all)
}
