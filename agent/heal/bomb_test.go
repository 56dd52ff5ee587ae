package heal

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

func TestHeads(t *testing.T) {
	task := func(pid, parent int) kernel.Task { return kernel.Task{PID: pid, TGID: pid, PPID: parent} }
	for _, tt := range []struct {
		name string
		tree []kernel.Task // the youngest first
		want []int
	}{
		{"a chain", []kernel.Task{task(12, 11), task(11, 10), task(10, 1)}, []int{10}},
		{"orphans beside a family", []kernel.Task{task(14, 1), task(13, 12), task(12, 1), task(11, 99)}, []int{14, 12, 11}},
		{"each other's parents", []kernel.Task{task(11, 10), task(10, 11)}, []int{11, 10}},
	} {
		var got []int
		for _, x := range heads(tt.tree) {
			got = append(got, x.PID)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: heads() = %v; want %v", tt.name, got, tt.want)
		}
	}
}

const (
	paAccount = 0x184000                           // of the user in ucounts
	paNproc   = hostmem.PhysAddr(paAccount + 0x60) // ucounts.rlimit[UCOUNT_RLIMIT_NPROC]
	paLimit   = hostmem.PhysAddr(paSignal + 0x200 + rlimitNproc*16)
)

// account gives the fake host's process a user's account and a limit of processes.
func account(h *fakeHost) detect.Finding {
	for name, f := range map[string]kernel.Field{
		"task_struct.real_cred": {Offset: 0x130, Size: 8}, "cred.uid.val": {Offset: 8, Size: 4}, "cred.ucounts": {Offset: 0x88, Size: 8}, "ucounts.uid.val": {Offset: 0x18, Size: 4}, "ucounts.rlimit": {Offset: 0x60, Size: 32},
		"signal_struct.rlim": {Offset: 0x200, Size: 256}, "rlimit.rlim_cur": {Offset: 0, Size: 8},
	} {
		h.fields[name] = f
	}
	h.sizes["rlimit"] = 16
	h.enums["rlimit_type/UCOUNT_RLIMIT_NPROC"] = 0
	h.put64(paTask+0x130, direct+paCred)
	h.put64(paCred+0x88, direct+paAccount)
	h.put32(paCred+8, 1000)
	h.put32(paAccount+0x18, 1000)
	h.put64(paNproc, 37)
	h.put64(paLimit, 8000)
	uid := uint32(1000)
	return detect.Finding{ID: "fork-bomb-1", Kind: detect.KindForkBomb, Culprit: detect.Culprit{
		PID: fakePID, TGID: fakePID, Comm: "spin", UID: &uid, Tree: 40, Since: fakeStart - time.Second, Start: fakeStart,
	}}
}

// TestBarRealUser bars who a set-user-ID program is accounted to.
func TestBarRealUser(t *testing.T) {
	h := newFakeHost(t)
	f := account(h)
	h.put32(paCred+8, 1001)
	h.put32(paAccount+0x18, 1001)
	p, err := planAccount(h, f)
	if err != nil || len(p.Steps) != 2 || string(p.Steps[0].Expect) != string(le(1001, 4)) {
		t.Errorf("%v: %+v", err, p.Steps)
	}
}

// TestBarUser has a user's account say that he has too many processes, while it goes on counting, and takes that back.
func TestBarUser(t *testing.T) {
	for name, tc := range map[string]struct {
		meanwhile func(h *fakeHost)
		want      uint64
	}{
		"counted on":            {func(h *fakeHost) { h.put32(paNproc, 35) }, 35},
		"gone with its last":    {func(h *fakeHost) { h.put64(paNproc, 0xdead<<32|0xbeef) }, 0xdead<<32 | 0xbeef},
		"given to another user": {func(h *fakeHost) { h.put64(paNproc, 3) }, 3},
	} {
		t.Run(name, func(t *testing.T) {
			h := newFakeHost(t)
			p, err := planAccount(h, account(h))
			if err != nil {
				t.Fatal(err)
			}
			p.ID = "plan-1"
			o := options(t, h, &memJournal{})
			o.Grant = grant(t, permit(StopForkBomb))
			x := NewExecutor(o)
			old := h.snapshot()
			out, err := x.ApplyNext(t.Context(), p, "test")
			if err != nil {
				t.Fatalf("%v; %+v", err, out)
			}
			if got := h.get(paNproc, 8); got != accountBarred<<32|37 {
				t.Errorf("the account says %#x", got)
			}
			for _, at := range h.diff(old) {
				if at < paNproc+4 || at >= paNproc+8 {
					t.Errorf("a store at %v", at)
				}
			}
			tc.meanwhile(h)
			lift, held := Lift([]Outcome{out})
			if !held {
				t.Fatal("nothing is held")
			}
			lift.ID, lift.More = "plan-2", true
			if out, err := x.ApplyNext(t.Context(), lift, "test"); err != nil {
				t.Errorf("%v; %+v", err, out)
			}
			if got := h.get(paNproc, 8); got != tc.want {
				t.Errorf("afterwards the account says %#x, not %#x", got, tc.want)
			}
		})
	}
}

func TestBarUserRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(h *fakeHost)
		want   error
	}{
		"no limit":              {func(h *fakeHost) { h.put64(paLimit, 1<<64-1) }, errLimitless},
		"another's account":     {func(h *fakeHost) { h.put32(paAccount+0x18, 1001) }, errLimitless},
		"root's account":        {func(h *fakeHost) { h.put32(paCred+8, 0); h.put32(paAccount+0x18, 0) }, errLimitless},
		"barred by somebody":    {func(h *fakeHost) { h.put64(paNproc, accountBarred<<32|37) }, errLimitless},
		"no count":              {func(h *fakeHost) { h.put64(paNproc, 0) }, errLimitless},
		"a kernel without them": {func(h *fakeHost) { delete(h.fields, "ucounts.rlimit") }, kernel.ErrNotFound},
		"they count otherwise":  {func(h *fakeHost) { h.enums["rlimit_type/UCOUNT_RLIMIT_NPROC"] = 4 }, kernel.ErrNotSupported},
		"nobody is left":        {func(h *fakeHost) { h.tasks = h.tasks[:1] }, ErrGone},
		"a process that ends":   {func(h *fakeHost) { h.put64(paTask+0x118, 0) }, errLimitless},
	} {
		t.Run(name, func(t *testing.T) {
			h := newFakeHost(t)
			f := account(h)
			tc.change(h)
			if p, err := planAccount(h, f); !errors.Is(err, tc.want) {
				t.Errorf("%v: %+v", err, p)
			}
		})
	}
}
