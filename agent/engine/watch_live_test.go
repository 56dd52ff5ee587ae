package engine

import (
	"bytes"
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

// qmpPower is a power controller that presses the virtual machine's reset button.
type qmpPower struct{ g *guest.Guest }

func (p qmpPower) State(context.Context) (string, error)  { return "on", nil }
func (p qmpPower) Cycle(context.Context) error            { p.g.Execute("system_reset"); return nil }
func (p qmpPower) On(context.Context) error               { return nil }
func (p qmpPower) Off(context.Context) error              { return heal.ErrInvalidPlan }
func (p qmpPower) NMI(context.Context) error              { p.g.Execute("inject-nmi"); return nil }
func (p qmpPower) GracefulShutdown(context.Context) error { return heal.ErrInvalidPlan }

// watched is an engine that runs, and its events.
type watched struct {
	t      *testing.T
	e      *Engine
	events <-chan Event
	seen   []Event
	end    func() // ends the engine, as the test's end does
}

func watch(t *testing.T, o Options) *watched {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	e := New(o)
	w := &watched{t: t, e: e, events: e.Subscribe(ctx)}
	done := make(chan struct{})
	go func() { e.Run(ctx); close(done) }()
	w.end = func() { cancel(); <-done }
	t.Cleanup(func() {
		w.end()
		if t.Failed() {
			t.Logf("state: %+v", e.State())
			for _, ev := range w.seen {
				t.Logf("%s %s %s", ev.At.Format("05.000"), ev.Type, ev.Text)
			}
		}
	})
	return w
}

// wait returns the first event from now on that fits.
func (w *watched) wait(d time.Duration, what string, fits func(Event) bool) Event {
	w.t.Helper()
	timeout := time.After(d)
	for {
		select {
		case ev := <-w.events:
			w.seen = append(w.seen, ev)
			if fits(ev) {
				return ev
			}
		case <-timeout:
			w.t.Fatalf("no %s within %v", what, d)
		}
	}
}

func ofKind(t EventType, k detect.Kind) func(Event) bool {
	return func(e Event) bool { return e.Type == t && e.Finding != nil && e.Finding.Kind == k }
}

func ofType(t EventType) func(Event) bool { return func(e Event) bool { return e.Type == t } }

// The whole way on a real kernel: attach, find and kill a runaway process, see the host freeze and thaw, see it panic, have
// it power-cycled, and attach to the kernel that comes up, all without being told.
func TestLiveWatch(t *testing.T) {
	forEachGuest(t, func(t *testing.T, k string) {
		g := startGuest(t, k)
		p := policy.Policy{
			Version:   policy.Version,
			Detectors: policy.Detectors{RunawayFor: policy.Duration(3 * time.Second)},
			Rules: []policy.Rule{
				{Finding: "runaway-process", Action: "kill-process", Mode: policy.Automatic, MinConfidence: 0.9, MaxPerHour: 10},
				{Finding: "panic", Action: "power-cycle", Mode: policy.Automatic, MinConfidence: 0.9, MaxPerHour: 3},
			},
		}
		w := watch(t, Options{
			Logger: slog.New(slog.DiscardHandler),
			Memory: func(context.Context) (hostmem.Memory, error) {
				return hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), true)
			},
			Writes: true, Agreement: agreement(t, guestUUID, heal.KillProcess, heal.PowerCycle), Policy: p,
			Journal: openJournal(t), Power: qmpPower{g}, CacheDir: t.TempDir(),
		})
		ev := w.wait(time.Minute, "attach", ofType(EventAttached))
		t.Logf("attached: %s", ev.Text)
		if s := w.e.State(); s.HostUUID != guestUUID || s.Agreement.Denied != "" {
			t.Fatalf("host UUID %q; agreement %+v", s.HostUUID, s.Agreement)
		}

		runaway := func() {
			t.Helper()
			pid, began := g.Spawn("spin"), time.Now()
			ev := w.wait(20*time.Second, "runaway", ofKind(EventFinding, detect.KindRunawayProcess))
			if ev.Finding.Culprit.TGID != pid {
				t.Fatalf("culprit %+v; want PID %d", ev.Finding.Culprit, pid)
			}
			t.Logf("runaway process → finding: %v", ev.At.Sub(began))
			healed := w.wait(20*time.Second, "healing", ofKind(EventHealed, detect.KindRunawayProcess))
			t.Logf("finding → healed and verified: %v; calls %+v; %d stores, %d bytes", healed.At.Sub(ev.At), healed.Outcome.HostFunctions, healed.Outcome.Stores, healed.Outcome.BytesWritten)
			for _, s := range healed.Outcome.Steps {
				if st := healed.Outcome.Plan.Steps[s.Step]; s.Took > 500*time.Microsecond {
					t.Logf("  %s %s: %v", st.Op, st.Object, s.Took)
				}
			}
			select {
			case e := <-g.Exits:
				if e.PID != pid || e.Signal != 9 {
					t.Errorf("guest says %+v; want %d ended by 9", e, pid)
				}
			case <-time.After(5 * time.Second):
				t.Error("the guest does not know of it")
			}
		}
		runaway()

		time.Sleep(6 * time.Second)
		if fs := w.e.Findings(); len(fs) != 1 || fs[0].Resolved == nil {
			t.Errorf("findings on a healthy idle host: %+v", fs)
		}
		if s := w.e.State(); s.Health != Healthy {
			t.Errorf("health %s of a healthy host; detectors %+v", s.Health, s.Detectors)
		}
		c := w.e.State().LastPass
		t.Logf("cost: heartbeat %v, tasks %v, %.0f kB/s, %.2f %% of a CPU; last pass %d reads, %d bytes in %v", c.MeanHeartbeat, c.MeanTasks, c.BytesPerSec/1e3, 100*c.Load, c.Reads, c.Bytes, c.Took)

		began := time.Now()
		g.Execute("stop")
		ev = w.wait(10*time.Second, "silence", ofKind(EventFinding, detect.KindHostSilent))
		t.Logf("frozen while idle → finding: %v: %s", ev.At.Sub(began), ev.Finding.Detail)
		began = time.Now()
		g.Execute("cont")
		ev = w.wait(10*time.Second, "end of the silence", ofKind(EventResolved, detect.KindHostSilent))
		t.Logf("thawed → resolved: %v", ev.At.Sub(began))

		var ok string
		g.Ask("sysrq c", "ok", &ok)
		began = time.Now().Add(50 * time.Millisecond)
		ev = w.wait(10*time.Second, "panic", ofKind(EventFinding, detect.KindPanic))
		t.Logf("panic → finding: %v: %s; culprit %+v", ev.At.Sub(began), ev.Text, ev.Finding.Culprit)
		if v, err := w.e.View(t.Context()); err != nil {
			t.Errorf("View of a dead kernel = %v", err)
		} else {
			n := 0
			for _, err := range v.Log() {
				if err != nil {
					t.Errorf("log of a dead kernel: %v", err)
				}
				n++
			}
			t.Logf("%d records of the dead kernel's log", n)
		}
		boot := w.e.State().Kernel.BootID
		ev = w.wait(3*time.Minute, "new kernel", func(e Event) bool { return e.Type == EventAttached && e.Kernel.BootID != boot })
		t.Logf("finding → power-cycled → attached again: %v", time.Since(began))
		w.wait(time.Minute, "healing", ofKind(EventHealed, detect.KindPanic))
		g.WaitReady()
		runaway()
		if bad := g.Complaints(); len(bad) > 0 {
			t.Errorf("the guest's kernel complains: %q", bad)
		}
	})
}

// One CPU of a busy host locks up with its interrupts off.
func TestLiveStall(t *testing.T) {
	forEachGuest(t, func(t *testing.T, k string) {
		g := startGuest(t, k)
		w := watch(t, Options{
			Memory: func(context.Context) (hostmem.Memory, error) {
				return hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), false)
			},
			Policy: policy.Default(),
		})
		w.wait(time.Minute, "attach", ofType(EventAttached))
		g.Spawn("forks")
		g.Spawn("forks")
		time.Sleep(12 * time.Second) // a host that boots is not judged
		v, err := w.e.View(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		cpu := g.Lock(gadget(t, v), func(cpu int) bool {
			hb, err := v.Heartbeat()
			return err == nil && !hb.CPUs[cpu].Idle
		})
		began := time.Now()
		for {
			ev := w.wait(20*time.Second, "verdict", func(e Event) bool {
				return e.Finding != nil && e.Finding.Kind == detect.KindCPUStall && (e.Type == EventFinding || e.Type == EventSuspicion)
			})
			t.Logf("locked → %s: %v: %s; %s; culprit %q, PID %d, TGID %d", ev.Type, ev.At.Sub(began), ev.Finding.Title, ev.Finding.Detail,
				ev.Finding.Culprit.Comm, ev.Finding.Culprit.PID, ev.Finding.Culprit.TGID)
			if ev.Type == EventFinding {
				if *ev.Finding.Culprit.CPU != cpu {
					t.Errorf("CPU %d is accused; CPU %d is locked", *ev.Finding.Culprit.CPU, cpu)
				}
				return
			}
		}
	})
}

// gadget returns the address of a jump to itself in the kernel's text.
func gadget(t *testing.T, v *kernel.View) uint64 {
	t.Helper()
	text, err := v.Image().Symbol("_stext")
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4<<20)
	if err := v.ReadVirt(text, b); err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(b, []byte{0xeb, 0xfe})
	if i < 0 {
		t.Fatal("no jump to itself in the kernel's text")
	}
	return uint64(text) + uint64(i)
}
