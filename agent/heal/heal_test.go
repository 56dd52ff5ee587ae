package heal

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const hostUUID = "6f1e5c1e-0001-4a6b-9d7a-0123456789ab"

func grant(t *testing.T, change func(*access.Agreement)) access.Grant {
	t.Helper()
	owner := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32))
	monitor := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32))
	pub := func(k ed25519.PrivateKey) access.Key { return access.Key(k.Public().(ed25519.PublicKey)) }
	a := &access.Agreement{
		Version: access.Version, ID: "test", Host: access.Host{UUID: hostUUID},
		Owner: access.Party{Name: "o", Key: pub(owner)}, Monitors: []access.Party{{Name: "m", Key: pub(monitor)}},
		Rights:    access.Rights{Read: true, Write: true, Power: true, Actions: []string{KillProcess, PowerCycle}},
		ValidFrom: time.Now().Add(-time.Hour), ValidUntil: time.Now().Add(time.Hour),
	}
	if change != nil {
		change(a)
	}
	return a.Grant(hostUUID, nil)
}

func runaway() detect.Finding {
	return detect.Finding{ID: "runaway-process-1", Kind: detect.KindRunawayProcess,
		Culprit: detect.Culprit{PID: fakePID, TGID: fakePID, Comm: "spin", Start: fakeStart}}
}

func mustPlan(t *testing.T, h *fakeHost) Plan {
	t.Helper()
	p, err := planSignal(h, runaway(), sigKill)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	hurry(p, 3*time.Second)
	return p
}

// hurry has a plan wait no longer: tests need not wait as long as hosts may take, and a busy machine takes its time.
func hurry(p Plan, most time.Duration) {
	for i := range p.Steps {
		p.Steps[i].Timeout = min(p.Steps[i].Timeout, most)
	}
}

func options(t *testing.T, h *fakeHost, j Journal) Options {
	return Options{
		Memory: h.mem, Kernel: h, Journal: j, Grant: grant(t, nil),
		Confirm: func(context.Context, Plan) error { return nil },
		Cured:   func(context.Context, Plan) error { return nil },
	}
}

// snapshot is the whole RAM.
func (h *fakeHost) snapshot() []byte {
	b := make([]byte, fakeRAM)
	if _, err := h.mem.ReadAt(b, 0); err != nil {
		h.t.Fatal(err)
	}
	return b
}

// diff returns where RAM differs from a snapshot.
func (h *fakeHost) diff(old []byte) []hostmem.PhysAddr {
	now := h.snapshot()
	if bytes.Equal(now, old) {
		return nil
	}
	var at []hostmem.PhysAddr
	for i, b := range now {
		if b != old[i] {
			at = append(at, hostmem.PhysAddr(i))
		}
	}
	return at
}

func TestKill(t *testing.T) {
	for i := range 6 {
		cas := i%2 == 0
		h := newFakeHost(t)
		switch i / 2 {
		case 1:
			h.embed()
		case 2:
			h.info.Banner += " PREEMPT_RT"
			h.perCPU["irq_workd"] = direct + paPerCPU + 0x80
		}
		h.run()
		before := h.snapshot()
		j := &memJournal{}
		o := options(t, h, j)
		if !cas {
			o.Memory = hostmem.NewEngine(h.mem, hostmem.EngineOptions{MinLatency: time.Microsecond, MaxLatency: 2 * time.Microsecond})
		}
		out, err := NewExecutor(o).Apply(t.Context(), mustPlan(t, h), "test")
		if err != nil {
			t.Fatalf("Apply = %v; steps %+v", err, out.Steps)
		}
		if !out.Verified || out.Undone || len(out.Left) > 0 || out.Atomic != cas {
			t.Errorf("cas %v: verified %v, undone %v, left %v, atomic %v", cas, out.Verified, out.Undone, out.Left, out.Atomic)
		}
		if got := h.kills(); !slices.Equal(got, []int{fakePID}) {
			t.Errorf("killed %v; want %d once", got, fakePID)
		}
		if len(h.untidy) > 0 {
			t.Errorf("what the kernel found: %v", h.untidy)
		}
		if len(out.HostFunctions) != 1 || out.HostFunctions[0].Function != "posix_timer_fn" || !out.HostFunctions[0].Confirmed ||
			strings.HasPrefix(out.HostFunctions[0].Context, "thread") != (i >= 4) {
			t.Errorf("host functions = %+v", out.HostFunctions)
		}
		for _, pa := range h.diff(before) {
			if pa < paTask || pa >= paTask+0x1000 { // the victim's own end
				t.Errorf("memory at %v is not as it was", pa)
			}
		}
		want := []string{"intent", "store", "store", "store", "outcome"}
		if diff := cmp.Diff(want, j.kinds); diff != "" {
			t.Error(diff)
		}
	}
}

// Nothing reaches the host before the journal holds it: when a record is refused, memory is as it was.
func TestJournalBeforeStore(t *testing.T) {
	for failAt := 1; failAt <= 3; failAt++ {
		h := newFakeHost(t)
		h.run()
		before := h.snapshot()
		j := &memJournal{failAt: failAt}
		stores := 0
		j.onWrite = func(kind string, v any) {
			// At the moment of the record, what it announces has not happened yet.
			if s, ok := v.(store); ok && !s.Undo {
				stores++
				now := make([]byte, len(s.Old))
				h.mem.ReadAt(now, int64(s.Addr))
				if !bytes.Equal(now, s.Old) {
					t.Errorf("store %d: %v holds %x before it was journalled; want %x", stores, s.Addr, now, []byte(s.Old))
				}
			}
		}
		out, err := NewExecutor(options(t, h, j)).Apply(t.Context(), mustPlan(t, h), "test")
		if !errors.Is(err, errJournal) || out.Verified {
			t.Errorf("record %d refused: Apply = %v; want the journal's error", failAt, err)
		}
		if at := h.diff(before); len(at) > 0 {
			t.Errorf("record %d refused: memory at %v… has changed", failAt, at[0])
		}
		if failAt > 2 && !out.Undone {
			t.Errorf("record %d refused: not undone", failAt)
		}
		if len(h.kills()) > 0 {
			t.Errorf("record %d refused: the process was killed", failAt)
		}
	}
}

func TestApplyRefuses(t *testing.T) {
	denied := func(o *Options, f func(*access.Agreement)) { o.Grant = grant(t, f) }
	for _, tt := range []struct {
		name   string
		change func(h *fakeHost, o *Options, p *Plan)
		is     error
		want   string
	}{
		{"no agreement", func(_ *fakeHost, o *Options, _ *Plan) { o.Grant = access.Grant{} }, access.ErrDenied, "no access agreement"},
		{"no right to write", func(_ *fakeHost, o *Options, _ *Plan) {
			denied(o, func(a *access.Agreement) { a.Rights.Write = false })
		}, access.ErrDenied, `"write"`},
		{"no right to the action", func(_ *fakeHost, o *Options, _ *Plan) {
			denied(o, func(a *access.Agreement) { a.Rights.Actions = nil })
		}, access.ErrDenied, `"kill-process"`},
		{"an agreement that has ended", func(_ *fakeHost, o *Options, _ *Plan) {
			denied(o, func(a *access.Agreement) { a.ValidUntil = time.Now().Add(-time.Minute) })
		}, access.ErrDenied, "ended at"},
		{"a protected process", func(_ *fakeHost, o *Options, _ *Plan) {
			denied(o, func(a *access.Agreement) { a.Protected = []access.Protected{{FirstUID: 1000, LastUID: 1000}} })
		}, access.ErrDenied, "protects"},
		{"init", func(_ *fakeHost, _ *Options, p *Plan) { p.Target.TGID = 1 }, access.ErrDenied, "init"},
		{"no journal", func(_ *fakeHost, o *Options, _ *Plan) { o.Journal = nil }, access.ErrDenied, "no journal"},
		{"nobody to confirm", func(_ *fakeHost, o *Options, _ *Plan) { o.Confirm = nil }, ErrStale, "confirm"},
		{"the fault is gone", func(_ *fakeHost, o *Options, _ *Plan) {
			o.Confirm = func(context.Context, Plan) error { return errors.New("all quiet") }
		}, ErrStale, "all quiet"},
		{"another kernel", func(h *fakeHost, _ *Options, p *Plan) { h.info.BootID = "boot2" }, ErrStale, "boot2"},
		{"the kernel is gone", func(h *fakeHost, _ *Options, _ *Plan) { h.proof = kernel.ErrGone }, kernel.ErrGone, "no longer"},
		{"the process is another one", func(h *fakeHost, _ *Options, _ *Plan) { h.put64(paTask+0x110, 99) }, ErrMismatch, "same process"},
		{"the process has died", func(h *fakeHost, _ *Options, _ *Plan) { h.put32(paTask+0x120, 32) }, ErrMismatch, "alive"},
		{"the mailbox is in use", func(h *fakeHost, _ *Options, p *Plan) { h.put64(p.Steps[len(p.Steps)-1].Addr, 1) }, ErrMismatch, "timer"},
		{"the list is not empty", func(h *fakeHost, _ *Options, _ *Plan) { h.put64(paPerCPU, direct+paPerCPU+0x40) }, ErrMismatch, "lazy_list"},
		{"the function was patched", func(h *fakeHost, _ *Options, _ *Plan) { h.write(paFn, []byte{0xe8}) }, ErrMismatch, "posix_timer_fn"},
		{"a plan without steps", func(_ *fakeHost, _ *Options, p *Plan) { p.Steps = nil }, ErrInvalidPlan, "steps"},
		{"an arming store that is not aligned", func(_ *fakeHost, _ *Options, p *Plan) {
			for i := range p.Steps {
				if p.Steps[i].Op == OpArm {
					p.Steps[i].Addr++
				}
			}
		}, ErrInvalidPlan, "aligned"},
		{"an endless wait", func(_ *fakeHost, _ *Options, p *Plan) {
			for i := range p.Steps {
				p.Steps[i].Timeout = 0
			}
		}, ErrInvalidPlan, "without an end"},
		{"an unknown operation", func(_ *fakeHost, _ *Options, p *Plan) { p.Steps[0].Op = "run" }, ErrInvalidPlan, "unknown operation"},
		{"a store outside RAM", func(_ *fakeHost, _ *Options, p *Plan) {
			p.Steps = append(p.Steps, Step{Op: OpWrite, Addr: 1 << 40, Expect: Bytes{0}, Put: Bytes{1}})
		}, hostmem.ErrNotMapped, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newFakeHost(t)
			j := &memJournal{}
			o, p := options(t, h, j), mustPlan(t, h)
			tt.change(h, &o, &p)
			h.onTick = nil
			before := h.snapshot()
			out, err := NewExecutor(o).Apply(t.Context(), p, "test")
			if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Apply = %v; want %v with %q", err, tt.is, tt.want)
			}
			if at := h.diff(before); len(at) > 0 {
				t.Errorf("memory at %v… has changed", at[0])
			}
			if out.Stores != 0 || out.Error == "" {
				t.Errorf("outcome: %d stores, error %q", out.Stores, out.Error)
			}
			if o.Journal != nil && !slices.Equal(j.kinds, []string{"refused"}) {
				t.Errorf("journal = %v; want the refusal", j.kinds)
			}
		})
	}
}

// The guard stands even against the executor's own mistakes.
func TestGuardKeepsToThePlan(t *testing.T) {
	h := newFakeHost(t)
	x := NewExecutor(options(t, h, &memJournal{}))
	x.allowed = []hostmem.Range{{Start: 0x4000, Size: 16}}
	if _, err := x.guard.WriteAt(make([]byte, 17), 0x4000); !errors.Is(err, access.ErrDenied) {
		t.Errorf("a store beyond the plan's range = %v; want ErrDenied", err)
	}
	if _, err := x.guard.WriteAt([]byte{1}, 0x4000); err != nil {
		t.Errorf("a store within it = %v", err)
	}
}

func TestWithdrawnWhenNobodyTicks(t *testing.T) {
	h := newFakeHost(t)
	p := mustPlan(t, h)
	hurry(p, 300*time.Millisecond)
	before := h.snapshot()
	out, err := NewExecutor(options(t, h, &memJournal{})).Apply(t.Context(), p, "test")
	if !errors.Is(err, ErrNoEffect) || !out.Undone || len(out.Left) > 0 || len(out.HostFunctions) > 0 {
		t.Errorf("Apply = %v; undone %v, left %v, functions %v", err, out.Undone, out.Left, out.HostFunctions)
	}
	if at := h.diff(before); len(at) > 0 {
		t.Errorf("memory at %v… has changed", at[0])
	}
}

// A process that dies by itself, and whose PID may be used again, must not be waited for with the work still armed.
func TestWithdrawnWhenTheVictimChanges(t *testing.T) {
	h := newFakeHost(t)
	p := mustPlan(t, h)
	j := &memJournal{}
	go func() {
		for h.get(paPerCPU, 8) == 0 {
			time.Sleep(100 * time.Microsecond)
		}
		h.put32(paTask+0x100, 999)
	}()
	out, err := NewExecutor(options(t, h, j)).Apply(t.Context(), p, "test")
	if !errors.Is(err, ErrStale) || !out.Undone || !strings.Contains(err.Error(), "withdrawn") {
		t.Errorf("Apply = %v; undone %v; want it withdrawn", err, out.Undone)
	}
	if h.get(paPerCPU, 8) != 0 {
		t.Error("the work is still on the list")
	}
}

// Somebody else's work was put before ours: it cannot be withdrawn, so it must stay until it has run.
func TestNotWithdrawnIsWaitedFor(t *testing.T) {
	h := newFakeHost(t)
	p := mustPlan(t, h)
	var work uint64
	go func() {
		for work == 0 {
			work = h.get(paPerCPU, 8)
			time.Sleep(100 * time.Microsecond)
		}
		h.put64(paPerCPU, direct+0x150000)  // the kernel's, whose next would be ours
		time.Sleep(1500 * time.Millisecond) // longer than the time-out
		h.put64(paPerCPU, work)
		h.tick()
	}()
	for i := range p.Steps {
		if p.Steps[i].Runs {
			p.Steps[i].Timeout = time.Second
		}
	}
	out, err := NewExecutor(options(t, h, &memJournal{})).Apply(t.Context(), p, "test")
	if err != nil || !out.Verified {
		t.Errorf("Apply = %v; %+v", err, out.Steps)
	}
}

// The kernel has work of its own on the CPU's list when a plan begins, and puts more there in the last moment, again and again: the plan waits for its turn.
func TestListInUse(t *testing.T) {
	h := newFakeHost(t)
	p := mustPlan(t, h)
	own := uint64(direct + paPerCPU + 0x40)
	h.put64(paPerCPU, own)
	j := &memJournal{}
	stores := 0
	j.onWrite = func(kind string, _ any) {
		if kind == "store" {
			if stores++; stores == 2 { // of the arming store, which is about to be made
				h.put64(paPerCPU, own)
			}
		}
	}
	h.onTick = func() {
		if h.get(paPerCPU, 8) == own {
			h.put64(paPerCPU, 0)
		}
	}
	h.tickEvery = 5 * time.Millisecond
	h.run()
	out, err := NewExecutor(options(t, h, j)).Apply(t.Context(), p, "test")
	if err != nil || !out.Verified || stores != 3 {
		t.Fatalf("%+v, %v, after %d records of stores", out, err, stores)
	}
}

// What the host may still be using is never taken away under it.
func TestMailboxStaysWhileInUse(t *testing.T) {
	t.Run("a zombie", func(t *testing.T) {
		h := newFakeHost(t)
		h.unreaped = true
		h.run()
		p := mustPlan(t, h)
		out, err := NewExecutor(options(t, h, &memJournal{})).Apply(t.Context(), p, "test")
		if err != nil || !out.Verified {
			t.Fatalf("Apply = %v", err)
		}
		if len(out.Left) != 1 || h.get(out.Left[0].Start+0x110, 8) != direct+paSignal+0x200 {
			t.Errorf("left = %v; want the signal, still linked", out.Left)
		}
		// The next mailbox is another one.
		h.put32(paTask+0x120, 0)
		q := mustPlan(t, h)
		for _, r := range q.Ranges() {
			if r.Contains(out.Left[0].Start, 1) {
				t.Error("a mailbox that is still in use is used again")
			}
		}
	})
	t.Run("an unkillable process", func(t *testing.T) {
		h := newFakeHost(t)
		h.immortal = true
		h.run()
		out, err := NewExecutor(options(t, h, &memJournal{})).Apply(t.Context(), mustPlan(t, h), "test")
		if !errors.Is(err, ErrNoEffect) || out.Verified || out.Undone {
			t.Errorf("Apply = %v; verified %v, undone %v", err, out.Verified, out.Undone)
		}
		if len(out.Left) == 0 || len(out.HostFunctions) != 1 || !out.HostFunctions[0].Confirmed {
			t.Errorf("left %v, functions %+v; want the mailbox and the call that was made", out.Left, out.HostFunctions)
		}
	})
}

func TestCancelledIsUndone(t *testing.T) {
	h := newFakeHost(t)
	before := h.snapshot()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for h.get(paPerCPU, 8) == 0 {
			time.Sleep(100 * time.Microsecond)
		}
		cancel()
	}()
	out, err := NewExecutor(options(t, h, &memJournal{})).Apply(ctx, mustPlan(t, h), "test")
	if !errors.Is(err, context.Canceled) || !out.Undone {
		t.Errorf("Apply = %v; undone %v", err, out.Undone)
	}
	if at := h.diff(before); len(at) > 0 {
		t.Errorf("memory at %v… has changed", at[0])
	}
}

// The kernel's own work that a plain store has cut off is put back.
func TestKlogdIsPutBack(t *testing.T) {
	h := newFakeHost(t)
	p := mustPlan(t, h)
	once := false
	h.onTick = func() {
		if !once && h.get(paPerCPU, 8) != 0 {
			once = true
			h.put32(paPerCPU+0x48, irqWorkType|irqWorkLazy|irqWorkClaimed) // pending, and on no list
		}
	}
	h.run()
	var restored bool
	j := &memJournal{onWrite: func(_ string, v any) {
		if s, ok := v.(store); ok && bytes.Equal(s.New, le(direct+paPerCPU+0x40, 8)) {
			restored = true
		}
	}}
	out, err := NewExecutor(options(t, h, j)).Apply(t.Context(), p, "test")
	if err != nil || !out.Verified || !restored {
		t.Errorf("Apply = %v; verified %v; put back %v; %+v", err, out.Verified, restored, out.Steps)
	}
	for end := time.Now().Add(5 * time.Second); h.get(paPerCPU+0x48, 4)&irqWorkPending != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the kernel's work is still pending; its list holds %#x", h.get(paPerCPU, 8))
		}
	}
}

func TestPlanRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(h *fakeHost, f *detect.Finding)
		is     error
		want   string
	}{
		{"nobody named", func(_ *fakeHost, f *detect.Finding) { f.Culprit = detect.Culprit{} }, kernel.ErrNotFound, ""},
		{"gone", func(_ *fakeHost, f *detect.Finding) { f.Culprit.PID, f.Culprit.TGID = 5000, 5000 }, ErrGone, ""},
		{"the PID is another's now", func(_ *fakeHost, f *detect.Finding) { f.Culprit.Start++ }, ErrGone, ""},
		{"being released", func(h *fakeHost, _ *detect.Finding) { h.put64(paSignal+0x88, 0) }, ErrGone, ""},
		{"exited since", func(h *fakeHost, _ *detect.Finding) { h.put32(paTask+0x120, 32) }, ErrGone, "exit_state"},
		{"init", func(_ *fakeHost, f *detect.Finding) { f.Culprit = detect.Culprit{PID: 1, TGID: 1} }, ErrProtected, "init"},
		{"a kernel thread", func(_ *fakeHost, f *detect.Finding) {
			f.Culprit = detect.Culprit{PID: 30, TGID: 30, Start: time.Second}
		}, ErrProtected, "kernel thread"},
		{"a container's init", func(h *fakeHost, _ *detect.Finding) { h.put32(paSignal+0x30, signalUnkillable) }, ErrProtected, "PID namespace"},
		{"real time before v5.16", func(h *fakeHost, _ *detect.Finding) { h.info.Banner += " PREEMPT_RT" }, kernel.ErrNotSupported, "irq_workd"},
		{"a sealed function", func(h *fakeHost, _ *detect.Finding) { h.write(paFn, sealed) }, kernel.ErrNotSupported, "sealed"},
		{"a kernel with IBT and no endbr64", func(h *fakeHost, _ *detect.Finding) {
			h.write(paFn, fentryNop)
			h.symbols["ibt_restore"] = direct
		}, kernel.ErrNotSupported, "neither endbr64"},
		{"a traced function", func(h *fakeHost, _ *detect.Finding) { h.write(paFn, []byte{0xe8, 1, 2, 3, 4}) }, kernel.ErrNotSupported, "neither endbr64"},
		{"kCFI", func(h *fakeHost, _ *detect.Finding) { h.symbols["__cfi_posix_timer_fn"] = direct }, kernel.ErrNotSupported, "kCFI"},
		{"a sigqueue in a k_itimer without a count", func(h *fakeHost, _ *detect.Finding) {
			h.embed()
			delete(h.fields, "k_itimer.rcuref.refcnt.counter")
		}, kernel.ErrNotFound, "k_itimer.rcuref"},
		{"irq_work over what a timer of v6.13 uses", func(h *fakeHost, _ *detect.Finding) {
			h.embed()
			h.fields["k_itimer.it_lock"] = kernel.Field{Offset: 228, Size: 4}
		}, kernel.ErrNotSupported, "lies over"},
		{"posix timers of another kind", func(h *fakeHost, _ *detect.Finding) { h.fields["k_itimer.sigq"] = kernel.Field{Offset: 0x60, Size: 72} }, kernel.ErrNotSupported, "k_itimer.sigq"},
		{"another irq_work", func(h *fakeHost, _ *detect.Finding) { h.put32(paPerCPU+0x48, 0x77) }, kernel.ErrNotSupported, "layout"},
		{"irq_work over what the timer uses", func(h *fakeHost, _ *detect.Finding) {
			h.fields["k_itimer.sigq"] = kernel.Field{Offset: offHrtimer + 16, Size: 8}
		}, kernel.ErrNotSupported, "lies over"},
		{"no mailbox: not reserved", func(h *fakeHost, _ *detect.Finding) {
			for pfn := range 256 {
				h.put64(paPages+hostmem.PhysAddr(pfn)*64, 0)
			}
		}, kernel.ErrNotFound, "no free reserved page"},
		{"no mailbox: not RAM", func(h *fakeHost, _ *detect.Finding) { h.ram = h.ram[1:] }, kernel.ErrNotFound, "no free reserved page"},
		{"no CPU ticks", func(h *fakeHost, _ *detect.Finding) { h.deaf = true }, kernel.ErrNotFound, "no CPU"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newFakeHost(t)
			f := runaway()
			tt.change(h, &f)
			_, err := planSignal(h, f, sigKill)
			if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("planKill = %v; want %v with %q", err, tt.is, tt.want)
			}
		})
	}
	h := newFakeHost(t)
	h.write(paFn, fentryNop)
	if _, err := planSignal(h, runaway(), sigKill); err != nil {
		t.Errorf("planKill on a kernel without IBT = %v", err)
	}
}

func TestMailbox(t *testing.T) {
	h := newFakeHost(t)
	box, err := findMailbox(h)
	if err != nil {
		t.Fatal(err)
	}
	// 0x2000 holds something, 0x3000 to 0xb000 is the trampoline.
	if box.pa != 0xb000 {
		t.Errorf("mailbox at %v; want 0xb000", box.pa)
	}
}

// A plan is data: it survives JSON, and what is printed is what is done.
// One that is being released while a tree is ended is left out, and the rest goes on.
func TestReleasedIsGone(t *testing.T) {
	h := newFakeHost(t)
	ids := processIDs{start: 0x110, signal: 0x118, flags: 0x30, pids: 0x88, tasks: 0x10, numbers: 0x60}
	h.put64(paPID+0x10, direct+paTask)
	if p, err := ids.of(h, h.tasks[1]); err != nil || p.pidVA != direct+paPID {
		t.Fatalf("of one that is alive = %+v, %v", p, err)
	}
	h.put64(paSignal+0x88, 0) // __unhash_process of kernel/exit.c
	if _, err := ids.of(h, h.tasks[1]); !errors.Is(err, ErrGone) {
		t.Errorf("of one that is being released: %v; want %v", err, ErrGone)
	}
}

func TestPlanJSON(t *testing.T) {
	h := newFakeHost(t)
	p := mustPlan(t, h)
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var q Plan
	if err := json.Unmarshal(b, &q); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(p, q); diff != "" {
		t.Error(diff)
	}
	h.run()
	if out, err := NewExecutor(options(t, h, &memJournal{})).Apply(t.Context(), q, "test"); err != nil || !out.Verified {
		t.Errorf("Apply of a plan that was JSON = %v", err)
	}
}

type fakePower struct {
	did []string
	err error
}

func (p *fakePower) do(s string) error                      { p.did = append(p.did, s); return p.err }
func (p *fakePower) State(context.Context) (string, error)  { return "on", nil }
func (p *fakePower) Cycle(context.Context) error            { return p.do("cycle") }
func (p *fakePower) On(context.Context) error               { return p.do("on") }
func (p *fakePower) Off(context.Context) error              { return p.do("off") }
func (p *fakePower) NMI(context.Context) error              { return p.do("nmi") }
func (p *fakePower) GracefulShutdown(context.Context) error { return p.do("shutdown") }

func TestPowerCycle(t *testing.T) {
	p, err := powerCycle().Plan(t.Context(), nil, detect.Finding{ID: "panic-1", Kind: detect.KindPanic, Title: "dead"})
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	apply := func(pw Power, g access.Grant) (Outcome, error) {
		o := Options{Journal: &memJournal{}, Grant: g, Power: pw,
			Confirm: func(context.Context, Plan) error { return nil }, Cured: func(context.Context, Plan) error { return nil }}
		return NewExecutor(o).Apply(t.Context(), p, "test")
	}
	pw := &fakePower{}
	if out, err := apply(pw, grant(t, nil)); err != nil || !out.Verified || !slices.Equal(pw.did, []string{"cycle"}) {
		t.Errorf("Apply = %v, %v; did %v", out.Verified, err, pw.did)
	}
	pw = &fakePower{}
	if _, err := apply(pw, grant(t, func(a *access.Agreement) { a.Rights.Power = false })); !errors.Is(err, access.ErrDenied) || pw.did != nil {
		t.Errorf("without the right: %v; did %v", err, pw.did)
	}
	if _, err := apply(nil, grant(t, nil)); !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("without a controller: %v", err)
	}
	pw = &fakePower{err: errors.New("BMC says no")}
	if out, err := apply(pw, grant(t, nil)); err == nil || out.Verified {
		t.Errorf("a controller that fails: %v, %v", out.Verified, err)
	}
}

// TestStoreByAddress stores where the agreement's ranges permit it, and nowhere else.
func TestStoreByAddress(t *testing.T) {
	const at = 0x3000
	for _, test := range []struct {
		name   string
		memory []access.Memory
		write  bool
		want   error
	}{
		{"permitted", []access.Memory{{Start: at, Size: 16, Read: true, Write: true}}, true, nil},
		{"no ranges", nil, true, access.ErrDenied},
		{"to read", []access.Memory{{Start: at, Size: 16, Read: true}}, true, access.ErrDenied},
		{"next to it", []access.Memory{{Start: at + 1, Size: 16, Read: true, Write: true}}, true, access.ErrDenied},
		{"no right to write", []access.Memory{{Start: at, Size: 16, Read: true, Write: true}}, false, access.ErrDenied},
	} {
		for _, op := range []Op{OpWrite, OpArm} {
			h := newFakeHost(t)
			o := options(t, h, &memJournal{})
			o.Cured = nil
			o.Grant = grant(t, func(a *access.Agreement) {
				a.Rights.Memory, a.Rights.Write, a.Rights.Actions = test.memory, test.write, nil
			})
			expect := make(Bytes, 8)
			if _, err := o.Memory.ReadAt(expect, at); err != nil {
				t.Fatal(err)
			}
			before := h.snapshot()
			id := Identify(h.info)
			p := Plan{ID: "plan-1", Action: StoreAction, Kernel: &id, Undo: true, Steps: []Step{{Op: op, Why: "test", Addr: at, Expect: expect, Put: Bytes("a store!"), Undo: true}}}
			out, err := NewExecutor(o).Apply(t.Context(), p, "test")
			if !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
				t.Errorf("%s, %s: %v; want %v", test.name, op, err, test.want)
			}
			if changed := h.diff(before); (len(changed) > 0) != (test.want == nil) || out.Stores != len(changed)/8 {
				t.Errorf("%s, %s: %d stores have changed %v", test.name, op, out.Stores, changed)
			}
		}
	}
}

// Where the agreement takes two persons, one alone stores nothing, whoever he says that he is.
func TestTwoPersons(t *testing.T) {
	const at = 0x3000
	for second, want := range map[string]error{"": access.ErrDenied, "test": access.ErrDenied, "another": nil} {
		h := newFakeHost(t)
		o := options(t, h, &memJournal{})
		o.Cured = nil
		o.Grant = grant(t, func(a *access.Agreement) {
			a.Rights.Memory, a.Rights.TwoPersons, a.Rights.Actions = []access.Memory{{Start: at, Size: 16, Read: true, Write: true}}, true, nil
		})
		expect := make(Bytes, 8)
		if _, err := o.Memory.ReadAt(expect, at); err != nil {
			t.Fatal(err)
		}
		before := h.snapshot()
		id := Identify(h.info)
		p := Plan{ID: "plan-1", Action: StoreAction, Second: second, Kernel: &id, Steps: []Step{{Op: OpWrite, Why: "test", Addr: at, Expect: expect, Put: Bytes("a store!")}}}
		_, err := NewExecutor(o).Apply(t.Context(), p, "test")
		if !errors.Is(err, want) || (err == nil) != (want == nil) || (len(h.diff(before)) > 0) != (want == nil) {
			t.Errorf("second %q: %v, changed %v; want %v", second, err, h.diff(before), want)
		}
	}
}

func TestFaultStillThere(t *testing.T) {
	h := newFakeHost(t)
	h.run()
	o := options(t, h, &memJournal{})
	o.Cured = func(context.Context, Plan) error { return errors.New("still hot") }
	out, err := NewExecutor(o).Apply(t.Context(), mustPlan(t, h), "test")
	if err == nil || out.Verified || !strings.Contains(err.Error(), "still hot") {
		t.Errorf("Apply = %v, verified %v", err, out.Verified)
	}
}

// A CPU is asked to restart the host only if it ticks at this moment.
func TestProvenTick(t *testing.T) {
	began := time.Now()
	for _, tt := range []struct {
		name  string
		pulse func(*kernel.Heartbeat)
		want  int // CPU; -1: none
	}{
		{"busy, ticks", func(*kernel.Heartbeat) {}, 0},
		{"locked in an interrupt that came while it idled", func(hb *kernel.Heartbeat) {
			hb.CPUs[0].Idle, hb.CPUs[0].Preempt, hb.CPUs[0].TimerIRQs, hb.CPUs[0].NextEvent = true, 1<<16, 7, math.MaxInt64
		}, -1},
		{"idle, event overdue", func(hb *kernel.Heartbeat) {
			hb.Mono, hb.CPUs[0].Idle, hb.CPUs[0].TimerIRQs, hb.CPUs[0].NextEvent = 2e9, true, 7, 1e9
		}, -1},
		{"the clock stands, and its timer interrupts", func(hb *kernel.Heartbeat) { hb.Jiffies = 4711 }, -1},
		{"idle, wakes when it said", func(hb *kernel.Heartbeat) {
			hb.CPUs[0].Idle, hb.CPUs[0].NextEvent = true, int64(longestIdle)
			if time.Since(began) < 2*lateTick {
				hb.CPUs[0].TimerIRQs = 7
			}
		}, 0},
		{"the other one is locked", func(hb *kernel.Heartbeat) {
			hb.CPUs = append([]kernel.CPU{{ID: 1, Online: true, TimerIRQs: 9}}, hb.CPUs...)
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newFakeHost(t)
			h.pulse = tt.pulse
			cpu, _, _, err := provenTick(h)
			if tt.want < 0 && !errors.Is(err, kernel.ErrNotFound) || tt.want >= 0 && (err != nil || cpu.ID != tt.want) {
				t.Errorf("provenTick() = CPU %d, %v; want %d", cpu.ID, err, tt.want)
			}
		})
	}
}
