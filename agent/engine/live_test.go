package engine

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

// agreement returns a lock that holds a signed agreement for a host.
func agreement(t *testing.T, uuid string, actions ...string) *access.Lock {
	t.Helper()
	return agreementWith(t, uuid, access.Rights{Read: true, Write: true, Power: true, Actions: actions})
}

func agreementWith(t *testing.T, uuid string, rights access.Rights) *access.Lock {
	t.Helper()
	owner := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32))
	monitor := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32))
	pub := func(k ed25519.PrivateKey) access.Key { return access.Key(k.Public().(ed25519.PublicKey)) }
	a := &access.Agreement{
		Version: access.Version, ID: "test", Host: access.Host{UUID: uuid, Name: "guest"},
		Owner: access.Party{Name: "owner", Key: pub(owner)}, Monitors: []access.Party{{Name: "monitor", Key: pub(monitor)}},
		Rights:    rights,
		ValidFrom: time.Now().Add(-time.Hour), ValidUntil: time.Now().Add(24 * time.Hour),
	}
	for _, k := range []ed25519.PrivateKey{owner, monitor} {
		if err := a.Sign(k); err != nil {
			t.Fatal(err)
		}
	}
	return access.Hold(a)
}

// pause has the owner of an agreement that agreement has made pause it.
func pause(t *testing.T, l *access.Lock) {
	t.Helper()
	digest, err := l.Agreement().Digest()
	if err != nil {
		t.Fatal(err)
	}
	o := &access.Order{Version: access.Version, Agreement: digest, Sequence: 1, Order: access.Pause, Issued: time.Now()}
	if err := o.Sign(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32))); err != nil {
		t.Fatal(err)
	}
	if err := l.Obey(o); err != nil {
		t.Fatal(err)
	}
}

func openJournal(t *testing.T) *journal.Journal {
	t.Helper()
	j, err := journal.OpenFile(filepath.Join(t.TempDir(), "journal"), 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

// Kills processes of every kind, again and again, with compare-and-swap and without, and looks whether the guest's kernel has
// anything to complain about.
func TestLiveKill(t *testing.T) {
	forEachGuest(t, func(t *testing.T, k string) {
		g := startGuest(t, k)
		ram := g.Memory(true)
		j := openJournal(t)
		for _, path := range []struct {
			name string
			mem  hostmem.Memory
			cas  bool
		}{
			{"window", ram, true},
			{"dma", hostmem.NewEngine(ram, hostmem.EngineOptions{Seed: 1}), false},
		} {
			img, err := kernel.Open(t.Context(), path.mem, kernel.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for _, kind := range []string{"spin", "sleep", "nanosleep", "blocked", "blockedspin", "threads", "forks", "stopped"} {
				var armed, dead []time.Duration
				for range *killsFlag {
					pid := g.Spawn(kind)
					a, d := killOne(t, g, path.mem, img, j, pid, path.cas, true)
					if t.Failed() {
						t.Fatalf("%s over %s", kind, path.name)
					}
					armed, dead = append(armed, a), append(dead, d)
				}
				slices.Sort(armed)
				slices.Sort(dead)
				n := len(dead)
				t.Logf("%-7s %-12s %3d killed; armed to confirmed: median %v, max %v; armed to dead: median %v, max %v",
					path.name, kind, n, armed[n/2], armed[n-1], dead[n/2], dead[n-1])
			}
		}
		// A zombie that nobody reaps keeps the signal on its list. The mailbox must stay then, and the kernel must find it in
		// order when the parent dies in its turn and the zombie is reaped after all.
		img, err := kernel.Open(t.Context(), ram, kernel.Options{})
		if err != nil {
			t.Fatal(err)
		}
		child := g.Spawn("zombie")
		parent := 0
		for task, err := range img.View(t.Context()).Tasks() {
			if err == nil && task.PID == child {
				parent = task.PPID
			}
		}
		killOne(t, g, ram, img, j, child, true, false)
		killOne(t, g, ram, img, j, parent, true, true)
		if bad := g.Complaints(); len(bad) > 0 {
			t.Errorf("the guest's kernel complains: %q", bad)
		}
		if rep, err := j.Verify(); err != nil {
			t.Errorf("journal: %+v, %v", rep, err)
		}
	}, "sid") // whose posix timers are laid out otherwise
}

// killOne ends one process and returns how long after the arming store the host confirmed it, and the process was dead.
func killOne(t *testing.T, g *guest.Guest, mem hostmem.Memory, img *kernel.Image, j *journal.Journal, pid int, cas, reaped bool) (confirmed, dead time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	f := detect.Finding{ID: "test", Kind: detect.KindRunawayProcess}
	for task, err := range img.View(ctx).Tasks() {
		if err != nil {
			t.Fatal(err)
		}
		if task.PID == pid {
			f.Culprit = detect.Culprit{PID: task.PID, TGID: task.TGID, Comm: task.Comm, Start: task.Start}
		}
	}
	if f.Culprit.PID == 0 {
		t.Fatalf("process %d is not in the list", pid)
	}
	a, _ := heal.Find(heal.KillProcess)
	p, err := a.Plan(ctx, img.View(ctx), f)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = fmt.Sprintf("plan-%d", pid)
	x := heal.NewExecutor(heal.Options{
		Memory: mem, Kernel: img, Journal: j, Grant: agreement(t, guestUUID, heal.KillProcess).Grant(guestUUID),
		Confirm: func(context.Context, heal.Plan) error { return nil },
		Cured:   func(context.Context, heal.Plan) error { return nil },
	})
	out, err := x.Apply(ctx, p, "test")
	if err != nil || !out.Verified || (len(out.Left) == 0) != reaped || out.Atomic != cas {
		t.Errorf("Apply = %v; verified %v, left %v, atomic %v", err, out.Verified, out.Left, out.Atomic)
		for _, s := range out.Steps {
			t.Logf("  %d %s (%s): %s%s took %v", s.Step, p.Steps[s.Step].Op, p.Steps[s.Step].Why, s.Met, s.Error, s.Took)
		}
		return
	}
	var arm time.Time
	for _, s := range out.Steps {
		switch st := p.Steps[s.Step]; {
		case st.Op == heal.OpArm && !st.Cleanup:
			arm = s.Started.Add(s.Took)
		case st.Runs:
			confirmed = s.Started.Add(s.Took).Sub(arm)
		case st.Op == heal.OpAwait && !st.Cleanup:
			dead = s.Started.Add(s.Took).Sub(arm)
		}
	}
	if !reaped {
		return // its parent does not want to know
	}
	deadline := time.After(10 * time.Second)
	for {
		select {
		case e := <-g.Exits:
			if e.PID != pid {
				continue
			}
			if e.Signal != 9 {
				t.Errorf("process %d ended by signal %d; want 9", pid, e.Signal)
			}
			return
		case <-deadline:
			t.Errorf("the guest does not know that process %d has died", pid)
			return
		}
	}
}
