package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

// A kernel thread takes rtnl_mutex and ends; who wants to do anything with the network hangs from then on. The lock is given back, and the
// guest itself says that the one who waited gets on, and that others do, too.
func TestLiveReleaseLock(t *testing.T) {
	forEachGuest(t, func(t *testing.T, k string) {
		g := guest.Start(t, k, guest.Options{
			Files: map[string][]byte{"bdfault.ko": guest.Module(t, k, "../../tests/faults/module", "bdfault")},
			Args:  []string{"-fw_cfg", "name=opt/backdoor/faults,string=yes"},
		})
		var loaded string
		g.Ask("load bdfault.ko", "loaded", &loaded)
		ram := g.Memory(true)
		img, err := kernel.Open(t.Context(), ram, kernel.Options{})
		if err != nil {
			t.Fatal(err)
		}
		state := func(pid int) string {
			var text string
			g.Ask(fmt.Sprintf("cat /proc/%d/stat", pid), "text", &text)
			_, rest, _ := strings.Cut(text, ") ")
			return rest[:min(len(rest), 1)]
		}
		until := func(what string, ok func() bool) {
			t.Helper()
			for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("not within a minute: ", what)
				}
			}
		}
		// Which of a process's threads waits is up to Go.
		held := func(process int) (lock kernel.Lock, thread int) {
			for l, err := range img.View(t.Context()).Locks() {
				for _, w := range l.Waiters {
					if err == nil && w.TGID == process {
						lock, thread = l, w.PID
					}
				}
			}
			return lock, thread
		}
		g.Spawn("fault=leaked-rtnl")
		until("the lock is leaked", func() bool {
			word, err := img.Symbol("rtnl_mutex")
			if err != nil {
				t.Fatal(err)
			}
			v := img.View(t.Context())
			owner, err := v.Uint64(word)
			for x, err := range v.Tasks() {
				if err != nil || uint64(x.Addr) == owner&^7 {
					return false // it has not ended yet
				}
			}
			return err == nil && owner != 0
		})
		pid := g.Spawn("rootnet")
		var l kernel.Lock
		var thread int
		until("somebody waits for it", func() bool { l, thread = held(pid); return l.Leaked })
		if l.Name != "rtnl_mutex" || state(thread) != "D" {
			t.Fatalf("%+v; the waiter is in state %s", l, state(thread))
		}

		f := detect.Finding{ID: "test"}
		for x, err := range img.View(t.Context()).Tasks() {
			if err == nil && x.PID == thread {
				f.Culprit = detect.Culprit{PID: x.PID, TGID: x.TGID, Comm: x.Comm, Start: x.Start}
			}
		}
		a, _ := heal.Find(heal.ReleaseLock)
		x := heal.NewExecutor(heal.Options{
			Memory: ram, Kernel: img, Journal: openJournal(t), Grant: agreement(t, guestUUID, heal.ReleaseLock).Grant(guestUUID),
			Confirm: func(context.Context, heal.Plan) error { return nil },
		})
		p, err := a.Plan(t.Context(), img.View(t.Context()), f)
		if err != nil {
			t.Fatal(err)
		}
		p.ID = "plan-1"
		if _, err := x.Apply(t.Context(), p, "test"); err != nil {
			t.Fatalf("%s: %v", p.Title, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for n := 2; ctx.Err() == nil; n++ {
			p, more, err := a.Next(t.Context(), img.View(t.Context()), f)
			if errors.Is(err, heal.ErrNotYet) || errors.Is(err, kernel.ErrTorn) {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if !more {
				break
			}
			p.ID = fmt.Sprintf("plan-%d", n)
			out, err := x.ApplyNext(ctx, p, "test")
			if errors.Is(err, heal.ErrMismatch) || errors.Is(err, heal.ErrStale) {
				continue // as the engine does: the CPU's list was taken, or the task ran just now
			}
			if err != nil || len(out.Left) > 0 {
				t.Fatalf("%s: %v; left %v", p.Title, err, out.Left)
			}
		}
		until("who waited gets on", func() bool { _, waits := held(pid); return waits == 0 && state(thread) != "D" })
		other := g.Spawn("rootnet")
		until("others get on", func() bool { _, waits := held(other); return waits == 0 && state(other) != "D" })
		if _, err := a.Plan(t.Context(), img.View(t.Context()), f); err == nil {
			t.Error("what nobody waits for is given back")
		}
		if bad := g.Complaints(); len(bad) > 0 {
			t.Errorf("the guest's kernel complains: %q", bad)
		}
	})
}
