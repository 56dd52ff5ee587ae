package heal

import (
	"errors"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

func apply(t *testing.T, h *fakeHost, p Plan, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, permit(RaiseLimit, LimitMemory, ArmPanic))
	if out, err := NewExecutor(o).Apply(t.Context(), p, "test"); err != nil {
		t.Fatalf("%v; %+v", err, out)
	}
}

func TestRaiseLimit(t *testing.T) {
	h := newFakeHost(t)
	h.symbols["max_threads"] = direct + 0x170000
	h.symbols["pid_max"] = direct + 0x170010
	h.symbols["files_stat"] = direct + 0x170020
	h.fields["files_stat_struct.max_files"] = kernel.Field{Offset: 16, Size: 8}
	h.put32(0x170000, 4000)
	h.put32(0x170004, 77) // another's
	h.put32(0x170010, 3<<20)
	h.put64(0x170030, 50000)
	h.symbols["nf_conntrack:nf_conntrack_max"] = direct + 0x170040
	h.put32(0x170040, 65536)
	for key, x := range map[string]struct {
		at   int
		size int
		want uint64
	}{"threads": {0x170000, 4, 8000}, "pids": {0x170010, 4, 4 << 20}, "files": {0x170030, 8, 100000}, "conntrack": {0x170040, 4, 131072}} {
		p, err := planRaise(h, detect.Finding{ID: "exhaustion-1", Key: key})
		apply(t, h, p, err)
		if got := h.get(hostmem.PhysAddr(x.at), x.size); got != x.want {
			t.Errorf("%s: %d, not %d", key, got, x.want)
		}
	}
	if h.get(0x170004, 4) != 77 {
		t.Error("its neighbour was written")
	}
	delete(h.symbols, "nf_conntrack:nf_conntrack_max")
	if _, err := planRaise(h, detect.Finding{Key: "conntrack"}); !errors.Is(err, kernel.ErrNotFound) {
		t.Errorf("of a module that is not loaded: %v", err)
	}
	for _, key := range []string{"pids", "slab", "pressure"} { // at its most, and without any
		if p, err := planRaise(h, detect.Finding{Key: key}); !errors.Is(err, kernel.ErrNotSupported) {
			t.Errorf("%s: %v, %v", key, p.Title, err)
		}
	}
}

func TestLimitMemory(t *testing.T) {
	h := newFakeHost(t)
	h.sizes["rlimit"] = 16
	h.fields["rlimit.rlim_cur"] = kernel.Field{Offset: 0, Size: 8}
	h.fields["signal_struct.rlim"] = kernel.Field{Offset: 0x300, Size: 256}
	const at = paSignal + 0x300 + 16*rlimitAS
	h.put64(at, ^uint64(0))
	f := runaway()
	p, err := planLimitMemory(h, f)
	apply(t, h, p, err)
	if got := h.get(at, 8); got != 0 {
		t.Errorf("the limit is %#x", got)
	}
	if _, err := planLimitMemory(h, f); !errors.Is(err, ErrGone) {
		t.Errorf("once more: %v", err)
	}
	f.Culprit.TGID, f.Culprit.PID = 1, 1
	if _, err := planLimitMemory(h, f); err == nil {
		t.Error("init is limited")
	}
}

func TestArmPanic(t *testing.T) {
	h := newFakeHost(t)
	if _, err := planArmPanic(h, detect.Finding{}); err == nil {
		t.Error("a panic without a restart is planned")
	}
	h.symbols["panic_timeout"], h.symbols["panic_on_oops"] = direct+0x170000, direct+0x170004
	h.put32(0x170000, 0)
	p, err := planArmPanic(h, detect.Finding{ID: "oops-1"})
	apply(t, h, p, err)
	if a, b := h.get(0x170000, 4), h.get(0x170004, 4); a != 10 || b != 1 {
		t.Errorf("panic_timeout %d, panic_on_oops %d", a, b)
	}
	if _, err := planArmPanic(h, detect.Finding{}); !errors.Is(err, ErrGone) {
		t.Errorf("once more: %v", err)
	}
	h.put32(0x170000, 30) // the owner's own choice stands
	h.put32(0x170004, 0)
	p, err = planArmPanic(h, detect.Finding{})
	if err != nil || len(p.Steps) != 1 {
		t.Errorf("%+v, %v", p.Steps, err)
	}
	h.put32(0x170004, 9)
	if _, err := planArmPanic(h, detect.Finding{}); err == nil {
		t.Error("what is no switch is written")
	}
}
