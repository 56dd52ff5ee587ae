package heal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// IDs of the actions that take tampering back.
const (
	RestoreKernel = "restore-kernel"
	RelinkHidden  = "relink-hidden"
)

// maxRestored is how many words of 8 bytes one plan restores.
const maxRestored = 512

// restoreKernel puts the golden bytes back where the code or the constants of the kernel or of a module, or tables of functions, were changed.
//
// A table of functions is put right with one store each entry. Code is put right word by word, each with one store, while CPUs
// may run it: what is between two of these words may for a moment be neither. An emulator that has translated the code
// (QEMU's TCG) goes on with its translation until it makes a new one.
func restoreKernel() Action {
	return Action{
		ID: RestoreKernel, Title: "Put back what the kernel's code, constants or tables of functions were", Risk: RiskKernel,
		For: []detect.Kind{detect.KindTampering},
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to restore the kernel: no kernel is attached: %w", kernel.ErrNotFound)
			}
			return planRestore(newModel(v), f)
		},
	}
}

func planRestore(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to restore the kernel: %w", err) }
	if len(f.Changes) == 0 {
		return fail(fmt.Errorf("the finding does not say what was there: %w", kernel.ErrNotFound))
	}
	id := Identify(m.Info())
	p := Plan{Action: RestoreKernel, Finding: f.ID, Risk: RiskKernel, Kernel: &id, Undo: true}
	var places []string
	modules := make(map[kernel.VirtAddr]bool)
	for _, c := range f.Changes {
		where := c.Addr.String()
		if c.Symbol != "" {
			where = fmt.Sprintf("%s+%#x", c.Symbol, c.Offset)
		}
		if c.Module != "" {
			where += " [" + c.Module + "]"
			if !modules[c.Of] {
				modules[c.Of] = true
				loaded, err := stillLoaded(m, c)
				if err != nil {
					return fail(err)
				}
				p.Steps = append(p.Steps, loaded...)
			}
		}
		if len(c.Was) == 0 || len(c.Was) != len(c.Now) || c.Addr%8 != 0 || len(c.Now)%8 != 0 {
			return fail(fmt.Errorf("what was at %s is not known: %w", where, kernel.ErrNotFound))
		}
		places = append(places, where)
		for i := 0; i < len(c.Now); i += 8 {
			now, was := c.Now[i:i+8], c.Was[i:i+8]
			if string(now) == string(was) {
				continue
			}
			if len(p.Steps) == maxRestored {
				return fail(fmt.Errorf("more than %d words were changed: %w", maxRestored, kernel.ErrNotSupported))
			}
			va := c.Addr + kernel.VirtAddr(i)
			pa, err := m.Phys(va)
			if err != nil {
				return fail(err)
			}
			p.Steps = append(p.Steps, Step{Op: OpArm, Why: "put back what was there", Object: where, Addr: pa, Virt: va, Expect: Bytes(now), Put: Bytes(was), Undo: true})
		}
	}
	if !slices.ContainsFunc(p.Steps, func(s Step) bool { return s.Op == OpArm }) {
		return fail(fmt.Errorf("nothing differs: %w", kernel.ErrNotFound))
	}
	if n := len(places); n > 3 {
		places = append(places[:3:3], fmt.Sprintf("%d more", n-3))
	}
	p.Title = "restore " + strings.Join(places, ", ")
	return p, nil
}

// stillLoaded expects that the module of a change is live, and has its name: another may be where it was.
func stillLoaded(m model, c kernel.Change) ([]Step, error) {
	y := layout{m: m}
	state, name := c.Of+kernel.VirtAddr(y.field("module", "state", 4)), c.Of
	f, err := m.Field("module", "name")
	if y.err != nil || err != nil {
		return nil, errors.Join(y.err, err)
	}
	name += kernel.VirtAddr(f.Offset)
	want := append([]byte(c.Module), 0)
	if uint64(len(want)) > f.Size {
		return nil, fmt.Errorf("module name %q has more than %d bytes: %w", c.Module, f.Size, ErrInvalidPlan)
	}
	var steps []Step
	for _, s := range []Step{
		{Op: OpExpect, Why: "the module is live", Object: "module.state", Virt: state, Expect: make(Bytes, 4)}, // MODULE_STATE_LIVE
		{Op: OpExpect, Why: "it is still the same module", Object: "module.name", Virt: name, Expect: want},
	} {
		if s.Addr, err = m.Phys(s.Virt); err != nil {
			return nil, fmt.Errorf("module %s: %w", c.Module, err)
		}
		steps = append(steps, s)
	}
	return steps, nil
}

// relinkHidden puts a process or a module that was taken out of the kernel's list back into it.
func relinkHidden() Action {
	return Action{
		ID: RelinkHidden, Title: "Put a hidden process or module back into the kernel's list", Risk: RiskKernel,
		For: []detect.Kind{detect.KindTampering},
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to relink: %w", err) }
			if v == nil {
				return fail(fmt.Errorf("no kernel is attached: %w", kernel.ErrNotFound))
			}
			who := f.Culprit
			switch {
			case who.Module != "":
				for mod, err := range v.Modules() {
					if err != nil {
						return fail(err)
					}
					if mod.Name == who.Module && mod.State == "live" && !mod.InList {
						return planRelink(newModel(v), f, modulesList, mod.Addr, fmt.Sprintf("module %q", mod.Name))
					}
				}
				return fail(fmt.Errorf("module %q is in the list that lsmod(8) shows, or gone: %w", who.Module, ErrGone))
			case who.PID != 0 && who.PID == who.TGID:
				s, err := v.Signs()
				if err != nil {
					return fail(err)
				}
				for _, t := range s.Hidden {
					if t.PID == who.PID && t.Start == who.Start {
						return planRelink(newModel(v), f, taskList, t.Addr, fmt.Sprintf("%q (PID %d)", t.Comm, t.PID))
					}
				}
				return fail(fmt.Errorf("PID %d is in the list of tasks: %w", who.PID, ErrGone))
			}
			return fail(fmt.Errorf("the finding names no process and no module that is hidden: %w", kernel.ErrNotFound))
		},
	}
}

// list is a list of the kernel into which something can be put back.
type list struct {
	typ, member  string // of what is in it
	head, within string // symbol of its head, and the member of that which it is; empty if it is all of it
	first        bool   // the kernel adds at the beginning, else at the end
	same         string // a member of 8 bytes that tells one object from the next at the same place
}

var (
	// copy_process of kernel/fork.c: list_add_tail_rcu(&p->tasks, &init_task.tasks).
	taskList = list{typ: "task_struct", member: "tasks", head: "init_task", within: "tasks", same: "start_time"}
	// add_unformed_module of kernel/module/main.c: list_add_rcu(&mod->list, &modules).
	modulesList = list{typ: "module", member: "list", head: "modules", first: true, same: "name"}
)

// planRelink plans to link an object between the head of a list and its first or last element as the kernel does: the object's
// own pointers at first, the one by which readers come to it behind them. Each pointer of the list is exchanged only if it is
// still what it was: whoever adds or removes an element there meanwhile breaks the plan off, and the next plan starts from what
// there is then.
func planRelink(m model, f detect.Finding, l list, object kernel.VirtAddr, what string) (Plan, error) {
	fail := func(err error) (Plan, error) { return Plan{}, fmt.Errorf("plan to relink %s: %w", what, err) }
	y := layout{m: m}
	head := y.symbol(l.head)
	if l.within != "" {
		head += kernel.VirtAddr(y.field(l.typ, l.within, 16))
	}
	link := object + kernel.VirtAddr(y.field(l.typ, l.member, 16))
	if y.err != nil {
		return fail(y.err)
	}
	same, err := m.Field(l.typ, l.same)
	if err != nil {
		return fail(err)
	}
	if same.Size < 8 {
		return fail(fmt.Errorf("%s.%s has %d bytes: %w", l.typ, l.same, same.Size, kernel.ErrNotSupported))
	}
	id := Identify(m.Info())
	p := Plan{Action: RelinkHidden, Finding: f.ID, Risk: RiskKernel, Kernel: &id, Title: "put " + what + " back into the list", Undo: true}
	step := func(s Step, va kernel.VirtAddr, n int) error {
		pa, err := m.Phys(va)
		if err != nil {
			return err
		}
		s.Addr, s.Virt = pa, va
		if s.Expect == nil {
			s.Expect = make(Bytes, n)
			if err := m.ReadVirt(va, s.Expect); err != nil {
				return err
			}
		}
		p.Steps = append(p.Steps, s)
		return nil
	}
	// To and from the neighbour: the pointer of the head that leads to it, and its pointer back to the head.
	there, back, own := head+8, kernel.VirtAddr(0), make(Bytes, 16)
	if l.first {
		there, back = head, 8
	}
	at, err := read64(m, there)
	if err != nil {
		return fail(err)
	}
	neighbour := kernel.VirtAddr(at)
	if neighbour == link {
		return fail(fmt.Errorf("it is there: %w", ErrGone))
	}
	put64(own, 0, uint64(head))
	put64(own, 8, at)
	if l.first {
		put64(own, 0, at)
		put64(own, 8, uint64(head))
	}
	object64 := le(uint64(link), 8)
	mirror := Step{Op: OpArm, Why: "the neighbour leads to it", Object: l.typ + "." + l.member, Expect: le(uint64(head), 8), Put: object64, Undo: true}
	anchor := Step{Op: OpArm, Why: "the list's head leads to it", Object: l.head, Expect: le(at, 8), Put: object64, Undo: true}
	for _, x := range []struct {
		s  Step
		va kernel.VirtAddr
		n  int
	}{
		{Step{Op: OpExpect, Why: "it is still the same", Object: l.typ + "." + l.same}, object + kernel.VirtAddr(same.Offset), 8},
		{Step{Op: OpWrite, Why: "it leads into the list", Object: l.typ + "." + l.member, Put: own, Undo: true}, link, 16},
		{mirror, neighbour + back, 8},
		{anchor, there, 8},
	} {
		if err := step(x.s, x.va, x.n); err != nil {
			return fail(err)
		}
	}
	return p, nil
}
