package heal

import (
	"context"
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// StripCredentials is the ID of the action that takes forged rights from a process that goes on.
const StripCredentials = "strip-credentials"

// nobody is the kernel's overflow user and group, kernel/sys.c.
const nobody = 65534

// stripCredentials gives a process whose credentials were overwritten back to the user that the kernel accounts it to, without any
// capability. Which groups it had is not known: where its credentials say root's, it gets nobody's.
func stripCredentials() Action {
	return Action{
		ID: StripCredentials, Title: "Give a process with forged credentials back to its own user, without rights", Risk: RiskTask,
		For: []detect.Kind{detect.KindTampering},
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to strip PID %d: no kernel is attached: %w", f.Culprit.TGID, kernel.ErrNotFound)
			}
			return planStrip(newModel(v), f)
		},
	}
}

func planStrip(m model, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) {
		return Plan{}, fmt.Errorf("plan to strip PID %d of its rights: %w", f.Culprit.TGID, err)
	}
	vic, err := findVictim(m, f.Culprit)
	if err != nil {
		return fail(err)
	}
	l := layout{m: m}
	realAt, credAt, userAt, accountAt := l.field("task_struct", "real_cred", 8), l.field("task_struct", "cred", 8), l.field("cred", "user", 8), l.field("user_struct", "uid.val", 4)
	type member struct {
		name string
		at   uint64
		size int
	}
	var members []member
	for _, name := range []string{"cap_inheritable", "cap_permitted", "cap_effective", "cap_ambient"} {
		members = append(members, member{name, l.field("cred", name, 8), 8})
	}
	users := len(members)
	for _, name := range []string{"uid", "suid", "euid", "fsuid", "gid", "sgid", "egid", "fsgid"} {
		members = append(members, member{name, l.field("cred", name+".val", 4), 4})
	}
	groups := users + 4
	if l.err != nil {
		return fail(fmt.Errorf("layout of credentials: %w", l.err))
	}
	t := vic.thread
	cred, err := read64(m, t.Addr+kernel.VirtAddr(credAt))
	if err != nil {
		return fail(err)
	}
	if other, err := read64(m, t.Addr+kernel.VirtAddr(realAt)); err != nil || other != cred {
		return fail(fmt.Errorf("it acts with credentials that are not its own (%#x, %#x): %w", cred, other, kernel.ErrNotSupported))
	}
	if init, err := m.Symbol("init_cred"); err == nil && uint64(init) == cred {
		return fail(fmt.Errorf("it uses the kernel's own credentials, which cannot be taken from it by changing them: %w", ErrProtected))
	}
	for other, err := range m.Tasks() {
		if err != nil {
			return fail(err)
		}
		if other.TGID == t.TGID {
			continue
		}
		theirs, err := read64(m, other.Addr+kernel.VirtAddr(credAt))
		if err == nil && theirs == cred {
			return fail(fmt.Errorf("PID %d (%q) has the same credentials: %w", other.PID, other.Comm, ErrProtected))
		}
	}
	user, err := read64(m, kernel.VirtAddr(cred+userAt))
	if err != nil {
		return fail(err)
	}
	account, err := read32(m, kernel.VirtAddr(user+accountAt))
	if err != nil {
		return fail(err)
	}
	uid, err := read32(m, kernel.VirtAddr(cred+members[users].at))
	switch {
	case err != nil:
		return fail(err)
	case account == 0:
		return fail(fmt.Errorf("it is accounted to root: whose it was is not known: %w", kernel.ErrNotSupported))
	case uid == account:
		return fail(fmt.Errorf("it is user %d's again: %w", uid, ErrGone))
	}
	id := Identify(m.Info())
	p := Plan{
		Action: StripCredentials, Finding: f.ID, Risk: RiskTask, Kernel: &id, Undo: true,
		Title:  fmt.Sprintf("make %q (PID %d) a process of user %d again, without rights", vic.leader.Comm, vic.leader.TGID, account),
		Target: &Target{TGID: vic.leader.TGID, PID: t.PID, Comm: vic.leader.Comm, UID: account, Start: vic.leader.Start},
		Steps:  vic.checks,
	}
	step := func(s Step, va kernel.VirtAddr) error {
		pa, err := m.Phys(va)
		if err != nil {
			return err
		}
		s.Addr, s.Virt = pa, va
		p.Steps = append(p.Steps, s)
		return nil
	}
	if err := step(Step{Op: OpExpect, Why: "they are still its credentials", Object: "task_struct.cred", Expect: le(cred, 8)}, t.Addr+kernel.VirtAddr(credAt)); err != nil {
		return fail(err)
	}
	if err := step(Step{Op: OpExpect, Why: "they are accounted to the same user", Object: "cred.user", Expect: le(user, 8)}, kernel.VirtAddr(cred+userAt)); err != nil {
		return fail(err)
	}
	for i, x := range members {
		va := kernel.VirtAddr(cred + x.at)
		now := make(Bytes, x.size)
		if err := m.ReadVirt(va, now); err != nil {
			return fail(err)
		}
		s := Step{Op: OpWrite, Why: "no right but what its user has", Object: "cred." + x.name, Expect: now, Put: make(Bytes, x.size), Undo: true}
		switch {
		case i >= groups && zero(now):
			s.Why, s.Put = "root's group is not its own", le(nobody, 4)
		case i >= groups:
			continue
		case i >= users:
			s.Why, s.Put = "the user that it is accounted to", le(uint64(account), 4)
		}
		if string(s.Put) == string(now) {
			continue
		}
		if err := step(s, va); err != nil {
			return fail(err)
		}
	}
	return p, nil
}
