package heal

import (
	"errors"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

func TestReleaseLock(t *testing.T) {
	const pa, gone = 0x170000, 0xffff888000400000
	h := newFakeHost(t)
	h.fields["mutex.owner.counter"] = kernel.Field{Offset: 8, Size: 8}
	h.put64(pa+8, gone|3) // HANDOFF, too
	f := runaway()
	lock := func(kind string, owner *kernel.LockTask, leaked bool) []kernel.Lock {
		return []kernel.Lock{{Addr: direct + pa, Kind: kind, Owner: owner, Leaked: leaked, Waiters: []kernel.LockWaiter{{LockTask: kernel.LockTask{PID: fakePID, TGID: fakePID}}}}}
	}
	for name, x := range map[string]struct {
		locks []kernel.Lock
		want  error
	}{
		"none":          {nil, ErrGone},
		"owner unknown": {lock("mutex", nil, false), kernel.ErrNotSupported},
		"owner lives":   {lock("mutex", &kernel.LockTask{Addr: gone, PID: 30, State: "S"}, false), ErrProtected},
		"rwsem":         {lock("rwsem", nil, true), kernel.ErrNotSupported},
	} {
		if p, err := planRelease(h, x.locks, f); !errors.Is(err, x.want) {
			t.Errorf("%s: %q, %v", name, p.Title, err)
		}
	}
	p, err := planRelease(h, lock("mutex", nil, true), f)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, permit(ReleaseLock))
	if out, err := NewExecutor(o).Apply(t.Context(), p, "test"); err != nil {
		t.Fatalf("%v; %+v", err, out)
	}
	if got := h.get(pa+8, 8); got != 1 {
		t.Errorf("mutex.owner is %#x", got)
	}
	if _, err := planRelease(h, lock("mutex", nil, true), f); !errors.Is(err, ErrGone) {
		t.Errorf("once more: %v", err)
	}
	for name, locks := range map[string][]kernel.Lock{"it got it": nil, "somebody has it": lock("mutex", &kernel.LockTask{PID: 30, State: "S"}, false)} {
		if p, more, err := planTake(h, locks, f); more || err != nil {
			t.Errorf("%s: %q, %v", name, p.Title, err)
		}
	}
	h.put64(pa+8, direct+paTask|1) // somebody who lives
	if _, err := planRelease(h, lock("mutex", nil, true), f); !errors.Is(err, ErrGone) {
		t.Errorf("a living owner: %v", err)
	}
	h.fields["mutex.magic"] = kernel.Field{Offset: 32, Size: 8}
	h.put64(pa+8, gone|1)
	if _, err := planRelease(h, lock("mutex", nil, true), f); !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("a kernel that checks its mutexes: %v", err)
	}
}
