package engine

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// The host restarted by its own kernel: while it lives, when it has panicked, and with all CPUs locked; and what else its
// functions are asked for.
func TestLiveRestart(t *testing.T) {
	forEachGuest(t, func(t *testing.T, k string) {
		g := startGuest(t, k)
		o := Options{
			Memory: func(context.Context) (hostmem.Memory, error) {
				return hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), true)
			},
			Writes: true, Agreement: agreement(t, guestUUID, heal.IDs()...), Journal: openJournal(t), Power: qmpPower{g},
			Policy: policy.Policy{Version: policy.Version, Detectors: policy.Detectors{RunawayFor: policy.Duration(time.Second), RunawayShare: 0.3}},
		}
		if testing.Verbose() {
			o.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
		}
		w := watch(t, o)
		w.wait(time.Minute, "attach", ofType(EventAttached))
		ask := func(f *detect.Finding, action string, want EventType) Event {
			t.Helper()
			began := time.Now()
			_, out, err := w.e.Heal(t.Context(), HealRequest{Finding: f.ID, Action: action, Caller: "test"})
			if err != nil {
				t.Fatalf("%s: %v\n%+v", action, err, out)
			}
			ev := w.wait(time.Minute, action, func(ev Event) bool { return ev.Type == want && ev.Outcome != nil && ev.Outcome.Plan.Action == action })
			t.Logf("%s: %v; %+v", action, time.Since(began), ev.Outcome.HostFunctions)
			return ev
		}
		runaway := func() (int, *detect.Finding) {
			t.Helper()
			pid := g.Spawn("spin")
			ev := w.wait(20*time.Second, "runaway", func(e Event) bool {
				return ofKind(EventFinding, detect.KindRunawayProcess)(e) && e.Finding.Culprit.TGID == pid
			})
			return pid, ev.Finding
		}
		state := func(pid int) string {
			t.Helper()
			v, err := w.e.View(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for task, err := range v.Tasks() {
				if err == nil && task.PID == pid {
					return task.State
				}
			}
			return ""
		}
		pid, f := runaway()
		ask(f, heal.SyncDisks, EventDone)
		ask(f, heal.RemountDisks, EventDone)
		// A value, agreed to by the plan of a dry run, and taken back.
		panics := func(want string) {
			t.Helper()
			var text string
			if g.Ask("cat /proc/sys/kernel/panic", "text", &text); strings.TrimSpace(text) != want {
				t.Errorf("kernel.panic is %q, not %s", text, want)
			}
		}
		set := HealRequest{Finding: f.ID, Value: &heal.Value{Name: "kernel.panic", Number: 7}, DryRun: true, Caller: "test"}
		p, _, err := w.e.Heal(t.Context(), set)
		if err != nil || p.Action != heal.SetSysctl || p.Value == nil || *p.Value != *set.Value {
			t.Fatalf("a dry run with a value = %+v, %v", p, err)
		}
		panics("0")
		set.DryRun, set.Agreed, set.Value = false, p.Digest(), &heal.Value{Name: "kernel.panic", Number: 8}
		if _, out, err := w.e.Heal(t.Context(), set); !errors.Is(err, heal.ErrStale) || out != nil {
			t.Errorf("another value than was agreed to = %+v, %v", out, err)
		}
		panics("0")
		set.Value.Number = 7
		if _, out, err := w.e.Heal(t.Context(), set); err != nil || out.Error != "" {
			t.Errorf("with a value = %+v, %v", out, err)
		}
		panics("7")
		if _, out, err := w.e.Undo(t.Context(), UndoRequest{Finding: f.ID, Caller: "test"}); err != nil || !out.Verified {
			t.Errorf("Undo of a value = %+v, %v", out, err)
		}
		panics("0")
		if _, out, err := w.e.Undo(t.Context(), UndoRequest{Finding: f.ID, Caller: "test"}); !errors.Is(err, ErrNoUndo) || out != nil {
			t.Errorf("a second Undo of a value = %+v, %v", out, err)
		}
		// An agent that was started anew takes back what the one before has done, and gives no number twice.
		set.Agreed = ""
		if _, out, err := w.e.Heal(t.Context(), set); err != nil || out.Error != "" {
			t.Errorf("with a value = %+v, %v", out, err)
		}
		w.end()
		w = watch(t, o)
		w.wait(time.Minute, "attach", ofType(EventAttached))
		panics("7")
		if _, out, err := w.e.Undo(t.Context(), UndoRequest{Finding: f.ID, Caller: "test"}); err != nil || !out.Verified {
			t.Errorf("Undo by the next agent = %+v, %v", out, err)
		}
		panics("0")
		before := f.ID
		f = w.wait(20*time.Second, "the runaway by the next agent", ofKind(EventFinding, detect.KindRunawayProcess)).Finding
		if old, ok := w.e.Finding(before); f.ID == before || !ok || old.Resolved == nil || old.Resolution != startedAnew {
			t.Errorf("the same fault is %s, after %+v", f.ID, old)
		}
		ask(f, heal.StopProcess, EventHealed)
		if s := state(pid); s != "T" {
			t.Errorf("state %q of a stopped process", s)
		}
		undo := UndoRequest{Finding: f.ID, Caller: "test"}
		if p, out, err := w.e.Undo(t.Context(), UndoRequest{Finding: f.ID, DryRun: true}); err != nil || out != nil || p.Action != heal.ContinueProcess || state(pid) != "T" {
			t.Errorf("a dry run of Undo = %+v, %+v, %v; the process has state %q", p, out, err, state(pid))
		}
		if _, out, err := w.e.Undo(t.Context(), undo); err != nil || !out.Verified {
			t.Fatalf("Undo = %+v, %v", out, err)
		}
		if s := state(pid); s != "R" && s != "S" { // S: its first thread may wait for the one that runs
			t.Errorf("state %q of a process that was stopped and continued", s)
		}
		if _, out, err := w.e.Undo(t.Context(), undo); !errors.Is(err, ErrNoUndo) || out != nil {
			t.Errorf("a second Undo = %+v, %v; want %v", out, err, ErrNoUndo)
		}
		if bad := g.Complaints(); len(bad) > 0 {
			t.Errorf("the guest's kernel complains: %q", bad)
		}
		ev := w.wait(20*time.Second, "the fault again", func(e Event) bool {
			return ofKind(EventFinding, detect.KindRunawayProcess)(e) && e.Finding.Culprit.TGID == pid && e.Finding.ID != f.ID
		})
		ask(ev.Finding, heal.KillProcess, EventHealed)
		if _, _, err := w.e.Undo(t.Context(), UndoRequest{Finding: ev.Finding.ID}); !errors.Is(err, ErrNoUndo) {
			t.Errorf("Undo of a kill = %v; want %v", err, ErrNoUndo)
		}

		pid, f = runaway()
		restart := func(what string, f *detect.Finding) {
			t.Helper()
			began := time.Now()
			ask(f, heal.RestartHost, EventHealed)
			g.WaitReady()
			t.Logf("%s: restarted, attached and alive after %v", what, time.Since(began))
		}
		restart("live", f)
		if state(pid) == "R" {
			t.Errorf("process %d still runs", pid)
		}

		var ok string
		g.Ask("sysrq c", "ok", &ok)
		ev = w.wait(10*time.Second, "panic", ofKind(EventFinding, detect.KindPanic))
		time.Sleep(200 * time.Millisecond) // the kernel comes to its last loop
		restart("panicked", ev.Finding)

		// All CPUs spin with their interrupts off.
		g.Spawn("forks")
		g.Spawn("forks")
		time.Sleep(12 * time.Second) // a host that boots is not judged
		v, err := w.e.View(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		busy := func(cpu int) bool {
			hb, err := v.Heartbeat()
			return err == nil && !hb.CPUs[cpu].Idle
		}
		first := g.Lock(gadget(t, v), busy)
		g.Lock(gadget(t, v), func(cpu int) bool { return cpu != first && busy(cpu) })
		ev = w.wait(20*time.Second, "verdict", ofKind(EventFinding, detect.KindCPUStall))
		restart("locked", ev.Finding)
	})
}
