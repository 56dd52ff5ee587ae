package engine

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Fork bombs and memory hogs, of a user and of root, on a host that also runs something else, which must not notice.
func TestLiveExhaustion(t *testing.T) {
	forEachGuest(t, func(t *testing.T, k string) {
		g := startGuest(t, k)
		automatic := func(finding, action string) policy.Rule {
			return policy.Rule{Finding: finding, Action: action, Mode: policy.Automatic, MinConfidence: 0.9, MaxPerHour: 20}
		}
		o := Options{
			Memory: func(context.Context) (hostmem.Memory, error) {
				return hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), true)
			},
			Writes: true, Agreement: agreement(t, guestUUID, heal.KillProcess, heal.StopForkBomb),
			Policy:  policy.Policy{Version: policy.Version, Rules: []policy.Rule{automatic("fork-bomb", heal.StopForkBomb), automatic("memory-hog", heal.KillProcess)}},
			Journal: openJournal(t),
		}
		if testing.Verbose() {
			o.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
		}
		w := watch(t, o)
		w.wait(time.Minute, "attach", ofType(EventAttached))
		bystander := g.Spawn("sleep")
		time.Sleep(3 * time.Second)
		limit := func() uint32 {
			v, err := w.e.View(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			va, err := v.Image().Symbol("max_threads")
			if err != nil {
				t.Fatal(err)
			}
			n, err := v.Uint32(va)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		most := limit()
		for _, fault := range []struct {
			kind string
			want detect.Kind
		}{{"bomb", detect.KindForkBomb}, {"rootbomb", detect.KindForkBomb}, {"hog", detect.KindMemoryHog}, {"roothog", detect.KindMemoryHog}} {
			began := time.Now()
			pid := g.Spawn(fault.kind)
			ev := w.wait(20*time.Second, fault.kind, ofKind(EventFinding, fault.want))
			t.Logf("%s → finding: %v: %s; %s; %+v", fault.kind, ev.At.Sub(began), ev.Finding.Title, ev.Finding.Detail, ev.Finding.Evidence)
			if fault.want == detect.KindMemoryHog && ev.Finding.Culprit.TGID != pid {
				t.Errorf("%s: culprit %+v; want PID %d", fault.kind, ev.Finding.Culprit, pid)
			}
			healed := w.wait(40*time.Second, "healing of "+fault.kind, ofKind(EventHealed, fault.want))
			t.Logf("%s → healed and verified: %v after the start; %d stores, %d bytes; %d calls", fault.kind, healed.At.Sub(began),
				healed.Outcome.Stores, healed.Outcome.BytesWritten, len(healed.Outcome.HostFunctions))
			if !healed.Outcome.Verified {
				t.Errorf("%s: not verified", fault.kind)
			}
			if n := limit(); n != most {
				t.Errorf("%s: max_threads is %d afterwards; it was %d", fault.kind, n, most)
			}
			v, err := w.e.View(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var left int
			alive := false
			for task, err := range v.Tasks() {
				if err != nil {
					t.Fatal(err)
				}
				if task.Comm == "v-"+fault.kind && task.State != "Z" && task.State != "X" {
					left++
				}
				alive = alive || task.PID == bystander
			}
			if left > 0 || !alive {
				t.Errorf("%s: %d of its tasks are left; the bystander lives: %v", fault.kind, left, alive)
			}
			var mono int64
			g.Ask("uptime", "mono", &mono) // it answers
		}
		// Everything that was laid into the host's memory is taken back in the end.
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			w.e.mu.Lock()
			n := len(w.e.left)
			w.e.mu.Unlock()
			if n == 0 {
				break
			}
			if time.Now().After(end) {
				t.Errorf("%d plans have left something behind", n)
				break
			}
		}
		for _, f := range w.e.Findings() {
			if f.Kind != detect.KindForkBomb && f.Kind != detect.KindMemoryHog {
				t.Errorf("finding of nothing that was done: %s: %s", f.Title, f.Detail)
			}
		}
		if bad := g.Complaints(); len(bad) > 0 {
			t.Errorf("the guest's kernel complains: %q", bad)
		}
	})
}
