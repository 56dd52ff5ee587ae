package heal

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// ReleaseLock is the ID of the action that gives back a mutex whose holder has ended.
const ReleaseLock = "release-lock"

// releaseLock gives back the mutex that a hung task waits for, if the one that holds it is no task any more, and then wakes the hung task to
// take it. What the mutex protects may have been left half done. Where another task has got the memory of the one that has ended, that one seems to
// hold the lock, and nothing is done.
func releaseLock() Action {
	locks := func(v *kernel.View) (all []kernel.Lock, err error) {
		if v == nil {
			return nil, fmt.Errorf("no kernel is attached: %w", kernel.ErrNotFound)
		}
		for l, err := range v.Locks() {
			if err != nil {
				return nil, err
			}
			all = append(all, l)
		}
		return all, nil
	}
	return Action{
		ID: ReleaseLock, Title: "Give back a mutex whose holder has ended, and wake who waits for it", Risk: RiskKernel,
		For: []detect.Kind{detect.KindHungTask},
		Plan: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, error) {
			all, err := locks(v)
			if err != nil {
				return Plan{}, fmt.Errorf("plan to give back what PID %d waits for: %w", f.Culprit.PID, err)
			}
			return planRelease(newModel(v), all, f)
		},
		Next: func(_ context.Context, v *kernel.View, f detect.Finding) (Plan, bool, error) {
			all, err := locks(v)
			if err != nil {
				return Plan{}, false, err
			}
			return planTake(newModel(v), all, f)
		},
	}
}

// awaited returns the lock that the task of a finding waits for.
func awaited(locks []kernel.Lock, f detect.Finding) (kernel.Lock, bool) {
	for _, l := range locks {
		if slices.ContainsFunc(l.Waiters, func(w kernel.LockWaiter) bool { return w.PID == f.Culprit.PID }) {
			return l, true
		}
	}
	return kernel.Lock{}, false
}

// planRelease stores into mutex.owner what __mutex_unlock_slowpath (kernel/locking/mutex.c) leaves there when it gives the lock to nobody: of the
// flags, that there are waiters. Whoever waits tries to take the lock whenever it is woken, and wakes the next one when it gives it back.
func planRelease(m model, locks []kernel.Lock, f detect.Finding) (Plan, error) {
	fail := func(err error) (Plan, error) {
		return Plan{}, fmt.Errorf("plan to give back what PID %d waits for: %w", f.Culprit.PID, err)
	}
	const waiters, flags = 1, 7 // MUTEX_FLAG_WAITERS, and with it HANDOFF and PICKUP, of which the kernel leaves none behind either
	lock, ok := awaited(locks, f)
	if !ok {
		return fail(fmt.Errorf("it waits for no lock that is known: %w", ErrGone))
	}
	name := lock.Name
	if name == "" {
		name = lock.Addr.String()
	}
	switch o := lock.Owner; {
	case o != nil:
		return fail(fmt.Errorf("%q (PID %d), which lives, holds the %s %s: %w", o.Comm, o.PID, lock.Kind, name, ErrProtected))
	case !lock.Leaked:
		return fail(fmt.Errorf("it is not known that nobody holds the %s %s any more: %w", lock.Kind, name, kernel.ErrNotSupported))
	case lock.Kind != "mutex":
		return fail(fmt.Errorf("%s is a %s, and only a mutex can be given back: %w", name, lock.Kind, kernel.ErrNotSupported))
	}
	vic, err := findVictim(m, f.Culprit)
	if err != nil {
		return fail(err)
	}
	l := layout{m: m}
	at := lock.Addr + kernel.VirtAddr(l.field("mutex", "owner.counter", 8))
	if l.err != nil {
		return fail(l.err) // a kernel built for real time has mutexes of another make
	}
	if _, err := m.Field("mutex", "magic"); err == nil {
		return fail(fmt.Errorf("the kernel was built to check its mutexes (CONFIG_DEBUG_MUTEXES): %w", kernel.ErrNotSupported))
	}
	now, err := read64(m, at)
	if err != nil {
		return fail(err)
	}
	if now&^flags == 0 || now&waiters == 0 {
		return fail(fmt.Errorf("mutex.owner is %#x by now: %w", now, ErrGone))
	}
	for t, err := range m.Tasks() {
		if err != nil {
			return fail(err)
		}
		if uint64(t.Addr) == now&^flags {
			return fail(fmt.Errorf("%q (PID %d) holds the mutex %s by now: %w", t.Comm, t.PID, name, ErrGone))
		}
	}
	pa, err := m.Phys(at)
	if err != nil {
		return fail(err)
	}
	id, t := Identify(m.Info()), vic.leader
	return Plan{
		Action: ReleaseLock, Finding: f.ID, Risk: RiskKernel, Kernel: &id, More: true,
		Title:  fmt.Sprintf("give back the mutex %s, whose holder has ended, and wake %q (PID %d) to take it", name, t.Comm, vic.thread.PID),
		Target: &Target{TGID: t.TGID, PID: vic.thread.PID, Comm: t.Comm, UID: t.UID, Start: t.Start},
		Steps: append(vic.checks, Step{Op: OpArm, Why: "nobody holds it, and there are waiters: what the kernel's own unlocking leaves", Object: "mutex.owner",
			Addr: pa, Virt: at, Expect: le(now, 8), Put: le(waiters, 8)}),
	}, nil
}

// planTake wakes the task that waits for a mutex that nobody holds. There is nothing more to do when it has got it, or somebody who will wake it.
func planTake(m model, locks []kernel.Lock, f detect.Finding) (Plan, bool, error) {
	if lock, ok := awaited(locks, f); !ok || lock.Owner != nil || lock.Leaked || lock.Kind != "mutex" {
		return Plan{}, false, nil
	}
	p, err := planWake(m, f)
	if errors.Is(err, ErrGone) {
		return Plan{}, false, ErrNotYet // it is awake
	}
	p.Action, p.More = ReleaseLock, true
	return p, true, err
}
