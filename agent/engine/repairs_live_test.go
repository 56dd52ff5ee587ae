package engine

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

// Repairs of data on a real kernel, whose own word in /proc is what they are held against: forged credentials stripped, a sleeping
// task woken, limits raised, a process's memory limited.
func TestLiveRepairs(t *testing.T) {
	forEachGuest(t, func(t *testing.T, k string) {
		files, order := guest.DebianModules(t, k, "nf_conntrack")
		g := guest.Start(t, k, guest.Options{Files: files})
		for _, module := range order {
			var loaded string
			g.Ask("load "+module, "loaded", &loaded)
		}
		ram := g.Memory(true)
		j := openJournal(t)
		img, err := kernel.Open(t.Context(), ram, kernel.Options{})
		if err != nil {
			t.Fatal(err)
		}
		cat := func(file string) (text string) {
			g.Ask("cat "+file, "text", &text)
			return text
		}
		line := func(text, name string) string {
			for l := range strings.Lines(text) {
				if rest, ok := strings.CutPrefix(l, name); ok {
					return strings.Join(strings.Fields(rest), " ")
				}
			}
			return ""
		}
		task := func(pid int) (found kernel.Task) {
			t.Helper()
			for x, err := range img.View(t.Context()).Tasks() {
				if err == nil && x.PID == pid {
					found = x
				}
			}
			if found.PID == 0 {
				t.Fatalf("process %d is not in the list", pid)
			}
			return found
		}
		finding := func(pid int) detect.Finding {
			x := task(pid)
			return detect.Finding{ID: "test", Culprit: detect.Culprit{PID: x.PID, TGID: x.TGID, Comm: x.Comm, Start: x.Start}}
		}
		plan := func(action string, f detect.Finding) (heal.Plan, error) {
			a, _ := heal.Find(action)
			p, err := a.Plan(t.Context(), img.View(t.Context()), f)
			p.ID = "plan-" + action
			return p, err
		}
		do := func(action string, f detect.Finding) heal.Outcome {
			t.Helper()
			p, err := plan(action, f)
			if err != nil {
				t.Fatal(err)
			}
			x := heal.NewExecutor(heal.Options{
				Memory: ram, Kernel: img, Journal: j, Grant: agreement(t, guestUUID, action).Grant(guestUUID),
				Confirm: func(context.Context, heal.Plan) error { return nil },
			})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			out, err := x.Apply(ctx, p, "test")
			if err != nil || len(out.Left) > 0 {
				t.Fatalf("%s: %v; left %v", p.Title, err, out.Left)
			}
			t.Logf("%s: %v", p.Title, out.Finished.Sub(out.Started).Round(10*time.Microsecond))
			return out
		}

		// Forged as the fault suite's rootkit does it, by stores from outside.
		pid := g.Spawn("sleep")
		status := fmt.Sprintf("/proc/%d/status", pid)
		before := cat(status)
		field := func(typ, path string) kernel.VirtAddr {
			f, err := img.Field(typ, path)
			if err != nil {
				t.Fatal(err)
			}
			return kernel.VirtAddr(f.Offset)
		}
		cred := task(pid).Cred
		for _, x := range []struct {
			name string
			b    []byte
		}{{"uid.val", make([]byte, 4)}, {"euid.val", make([]byte, 4)}, {"fsuid.val", make([]byte, 4)}, {"egid.val", make([]byte, 4)},
			{"cap_effective", []byte{0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0}}, {"cap_permitted", []byte{0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0}}} {
			pa, err := img.View(t.Context()).Phys(cred + field("cred", x.name))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ram.WriteAt(x.b, int64(pa)); err != nil {
				t.Fatal(err)
			}
		}
		if u := line(cat(status), "Uid:"); !strings.HasPrefix(u, "0 0 ") {
			t.Fatalf("not forged: %q", u)
		}
		do(heal.StripCredentials, finding(pid))
		after := cat(status)
		if line(after, "Uid:") != line(before, "Uid:") || line(after, "CapEff:") != "0000000000000000" || line(after, "CapPrm:") != "0000000000000000" || strings.Contains(" "+line(after, "Gid:")+" ", " 0 ") {
			t.Errorf("stripped:\n%s", after)
		}
		if p, err := plan(heal.StripCredentials, finding(pid)); err == nil {
			t.Errorf("stripped twice: %s", p.Title)
		}

		// A sleeper that is woken for nothing looks, and sleeps again: its count of switches tells.
		for _, kind := range []string{"nanosleep", "blocked"} {
			pid := g.Spawn(kind)
			count := func() string { return line(cat(fmt.Sprintf("/proc/%d/status", pid)), "voluntary_ctxt_switches:") }
			was := count()
			for deadline := time.Now().Add(20 * time.Second); task(pid).State != "S" && time.Now().Before(deadline); {
				was = count()
			}
			out := do(heal.WakeTask, finding(pid))
			if len(out.HostFunctions) != 1 || !out.HostFunctions[0].Confirmed {
				t.Errorf("%s: %+v", kind, out.HostFunctions)
			}
			for deadline := time.Now().Add(20 * time.Second); count() == was; {
				if time.Now().After(deadline) {
					t.Fatalf("%s: woken, and has not run: %s switches", kind, was)
				}
			}
		}

		for key, file := range map[string]string{"threads": "/proc/sys/kernel/threads-max", "pids": "/proc/sys/kernel/pid_max", "files": "/proc/sys/fs/file-max",
			"conntrack": "/proc/sys/net/netfilter/nf_conntrack_max"} {
			p, err := plan(heal.RaiseLimit, detect.Finding{ID: "test", Key: key})
			if err != nil {
				t.Logf("%s: %v", key, err) // at its most, as file-max is
				if !strings.Contains(err.Error(), "not raised beyond") {
					t.Error("for another reason")
				}
				continue
			}
			do(heal.RaiseLimit, detect.Finding{ID: "test", Key: key})
			now := strings.TrimSpace(cat(file))
			if !strings.HasSuffix(p.Title, " to "+now) {
				t.Errorf("%s: %s, and the guest says %s", key, p.Title, now)
			}
		}

		pid = g.Spawn("sleep")
		do(heal.LimitMemory, finding(pid))
		if l := line(cat(fmt.Sprintf("/proc/%d/limits", pid)), "Max address space"); !strings.HasPrefix(l, "0 ") {
			t.Errorf("limits: %q", l)
		}

		do(heal.ArmPanic, detect.Finding{ID: "test"})
		for file, want := range map[string]string{"panic": "10", "panic_on_oops": "1", "softlockup_panic": "1", "hung_task_panic": "1"} {
			if now := strings.TrimSpace(cat("/proc/sys/kernel/" + file)); now != want {
				t.Errorf("armed, and %s is %q, not %s", file, now, want)
			}
		}
		if bad := g.Complaints(); len(bad) > 0 {
			t.Errorf("the guest's kernel complains: %q", bad)
		}
	})
}
