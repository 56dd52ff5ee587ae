package heal

import (
	"errors"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Where TestExpire's process has what it is limited by.
const (
	paCPU, paNext, paActive = paSignal + 0x200, paSignal + 0x300, paSignal + 0x348
)

func limited(t *testing.T) (*fakeHost, detect.Finding) {
	h := newFakeHost(t)
	for name, f := range map[string]kernel.Field{
		"rlimit.rlim_cur": {Offset: 0, Size: 8}, "rlimit.rlim_max": {Offset: 8, Size: 8},
		"signal_struct.rlim": {Offset: 0x200, Size: 16 * 16}, "signal_struct.posix_cputimers": {Offset: 0x300, Size: 80},
		"posix_cputimer_base.nextevt": {Offset: 0, Size: 8}, "posix_cputimers.bases": {Offset: 0, Size: 72},
		"posix_cputimers.timers_active": {Offset: 72, Size: 4}, "posix_cputimers.expiry_active": {Offset: 76, Size: 4},
		"task_struct.pid_links": {Offset: 0x180, Size: 64}, "pid.tasks": {Offset: 0x10, Size: 32},
	} {
		h.fields[name] = f
	}
	for name, n := range map[string]uint64{"rlimit": 16, "posix_cputimers": 80, "posix_cputimer_base": 24, "signal_struct": 0x400, "task_struct": 0x200} {
		h.sizes[name] = n
	}
	h.put64(paPID+0x18, direct+paTask+0x190)
	h.put64(paCPU, infinity)
	h.put64(paCPU+8, infinity)
	h.put64(paNext, infinity)
	h.tasks[1].State = "R"
	uid := uint32(1000)
	return h, detect.Finding{ID: "fork-bomb-1", Kind: detect.KindForkBomb, Culprit: detect.Culprit{TGID: fakePID, Comm: "spin", UID: &uid}}
}

func TestExpire(t *testing.T) {
	h, f := limited(t)
	p, others, err := planExpire(h, f, h.tasks[:2])
	if err != nil || len(others) != 0 || len(p.Targets) != 1 {
		t.Fatalf("planExpire() = %v, %v, %v; init is nothing for it, the other is", p, others, err)
	}
	p.ID = "plan-1"
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, permit(StopForkBomb))
	if out, err := NewExecutor(o).Apply(t.Context(), p, "test"); err != nil || out.Stores != 4 || !out.Atomic {
		t.Fatalf("%+v, %v", out, err)
	}
	for at, want := range map[hostmem.PhysAddr]uint64{paCPU: 0, paCPU + 8: 0, paNext: 0, paActive: 1} {
		if got := h.get(at, 8); got != want {
			t.Errorf("%v holds %#x, not %#x", at, got, want)
		}
	}
	if p, _, err := planExpire(h, f, h.tasks[1:2]); !errors.Is(err, ErrNotYet) {
		t.Errorf("planExpire() = %v, %v of one that has no time left", p, err)
	}
}

// Where the process has ended between plan and store, and somebody else has its memory, nothing is stored.
func TestExpireStale(t *testing.T) {
	h, f := limited(t)
	p, _, err := planExpire(h, f, h.tasks[1:2])
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	h.put64(paTask+0x110, uint64(fakeStart)+1)
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, permit(StopForkBomb))
	if out, _ := NewExecutor(o).Apply(t.Context(), p, "test"); out.Stores != 0 {
		t.Errorf("%+v", out)
	}
}

func TestExpireOthers(t *testing.T) {
	for _, tt := range []struct {
		name string
		f    func(*fakeHost)
	}{
		{"it sleeps", func(h *fakeHost) { h.tasks[1].State = "S" }},
		{"it has a CPU timer of its own", func(h *fakeHost) { h.put64(paNext, 5e9); h.put64(paActive, 1) }},
		{"the layout is another one", func(h *fakeHost) {
			h.fields["posix_cputimers.expiry_active"] = kernel.Field{Offset: 68, Size: 4}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, f := limited(t)
			tt.f(h)
			if p, others, err := planExpire(h, f, h.tasks[1:2]); err != nil || len(p.Steps) != 0 || len(others) != 1 {
				t.Errorf("planExpire() = %v, %v, %v; want it left to signals", p, others, err)
			}
		})
	}
}
