package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
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
		executor := func(action string) *heal.Executor {
			return heal.NewExecutor(heal.Options{
				Memory: ram, Kernel: img, Journal: j, Grant: agreement(t, guestUUID, action).Grant(guestUUID),
				Confirm: func(context.Context, heal.Plan) error { return nil },
			})
		}
		apply := func(p heal.Plan) heal.Outcome {
			t.Helper()
			x := executor(p.Action)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			out, err := x.Apply(ctx, p, "test")
			if err != nil || len(out.Left) > 0 {
				t.Fatalf("%s: %v; left %v", p.Title, err, out.Left)
			}
			t.Logf("%s: %v", p.Title, out.Finished.Sub(out.Started).Round(10*time.Microsecond))
			return out
		}
		do := func(action string, f detect.Finding) heal.Outcome {
			t.Helper()
			p, err := plan(action, f)
			if err != nil {
				t.Fatal(err)
			}
			return apply(p)
		}
		// set gives an action a value, and returns how it ended and what takes it back.
		set := func(action string, f detect.Finding, v heal.Value) (back func()) {
			t.Helper()
			a, _ := heal.Find(action)
			p, err := a.Prepare(t.Context(), img.View(t.Context()), f, &v)
			if err != nil {
				t.Fatal(err)
			}
			p.ID = "plan-" + action
			out := apply(p)
			return func() {
				t.Helper()
				p, err := heal.TakeBack(out)
				if err != nil {
					t.Fatal(err)
				}
				p.ID = "plan-back"
				apply(p)
			}
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
		// Each setting that this kernel has: set, shown so by the guest, and taken back.
		a, _ := heal.Find(heal.SetSysctl)
		var done []string
		for _, s := range a.Settings {
			file := "/proc/sys/" + strings.ReplaceAll(s.Name, ".", "/")
			var text string
			if err := g.Try("cat "+file, "text", &text); err != nil {
				t.Logf("%s: %v", s.Name, err) // no such file
				continue
			}
			was, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
			if err != nil {
				t.Fatalf("%s: %q", file, text)
			}
			put := was + 1
			if put > s.Max || s.Name == "kernel.panic_on_oops" || strings.HasSuffix(s.Name, "_panic") {
				put = was - 1
			}
			if put < s.Min {
				put = was + 1
			}
			back := set(heal.SetSysctl, detect.Finding{ID: "test"}, heal.Value{Name: s.Name, Number: put})
			if now := strings.TrimSpace(cat(file)); now != strconv.FormatInt(put, 10) {
				t.Errorf("%s is %s, not %d", file, now, put)
			}
			back()
			if now := strings.TrimSpace(cat(file)); now != strconv.FormatInt(was, 10) {
				t.Errorf("%s is %s after it was taken back, not %d", file, now, was)
			}
			done = append(done, s.Name)
		}
		if len(done) < 20 {
			t.Errorf("only %d settings were set: %v", len(done), done)
		}
		// What the kernel itself refuses is refused, by the bounds of its own table.
		if err := g.Try("write /proc/sys/kernel/modules_disabled 0", "written", new(string)); err == nil {
			t.Error("the guest takes what its table does not")
		}
		back := set(heal.SetSysctl, detect.Finding{ID: "test"}, heal.Value{Name: "kernel.modules_disabled", Number: 1})
		if p, err := a.Prepare(t.Context(), img.View(t.Context()), detect.Finding{ID: "test"}, &heal.Value{Name: "kernel.modules_disabled"}); !errors.Is(err, heal.ErrValue) || !strings.Contains(err.Error(), "takes 1 to 1") {
			t.Errorf("modules are enabled again: %s, %v", p.Title, err)
		}
		if err := g.Try("load "+order[0], "loaded", new(string)); err == nil || !strings.Contains(err.Error(), "not permitted") { // else it would be loaded already
			t.Errorf("a module is loaded in spite of kernel.modules_disabled: %v", err)
		}
		back()

		// A control group is limited, as the guest sees it, and given back. What is in the root cannot be.
		loose := g.Spawn("sleep")
		half := heal.Value{Name: "memory.max", Number: 16<<20 + 4095} // of a page nothing is left
		limit, _ := heal.Find(heal.SetMemoryMax)
		if p, err := limit.Prepare(t.Context(), img.View(t.Context()), finding(loose), &half); !errors.Is(err, kernel.ErrNotSupported) {
			t.Errorf("a process of the root group is limited: %s, %v", p.Title, err)
		}
		pid = g.Spawn("rootstall")
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			var procs string
			if err := g.Try("cat /cgroup/stall/cgroup.procs", "text", &procs); err == nil && strings.TrimSpace(procs) == strconv.Itoa(pid) {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("its group: %q, %v", procs, err)
			}
		}
		is := func(want string) {
			t.Helper()
			if now := strings.TrimSpace(cat("/cgroup/stall/memory.max")); now != want {
				t.Errorf("memory.max is %s, not %s", now, want)
			}
		}
		back = set(heal.SetMemoryMax, finding(pid), half)
		is("16777216")
		back()
		is("max")
		if p, err := limit.Prepare(t.Context(), img.View(t.Context()), finding(pid), &heal.Value{Name: "memory.max", Number: math.MaxInt64}); !errors.Is(err, heal.ErrValue) {
			t.Errorf("no limit instead of none: %s, %v", p.Title, err)
		}

		if bad := g.Complaints(); len(bad) > 0 {
			t.Errorf("the guest's kernel complains: %q", bad)
		}
		// It bites: the group's next request is more than it may have, and the guest's OOM killer, which is loud, ends it. The limit can still be
		// taken back, for the group is there.
		back = set(heal.SetMemoryMax, finding(pid), heal.Value{Name: "memory.max", Number: 4 << 20})
		for deadline := time.Now().Add(time.Minute); line(cat("/cgroup/stall/memory.events"), "oom_kill ") == "0"; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("its limit is nothing to it: %s", cat("/cgroup/stall/memory.events"))
			}
		}
		back()
		is("max")
		noise := len(g.Complaints())

		// Two that want the same CPU get the same of it, until the one's group weighs less.
		g.Ask("write /cgroup/cgroup.subtree_control +cpu", "written", new(string))
		other := g.Spawn("rootpinned")
		pid = g.Spawn("rootpinned")
		g.Ask(fmt.Sprintf("write /cgroup/stall/cgroup.procs %d", pid), "written", new(string))
		ticks := func(pid int) (n int) {
			t.Helper()
			_, rest, _ := strings.Cut(cat(fmt.Sprintf("/proc/%d/stat", pid)), ") ")
			for _, field := range strings.Fields(rest)[11:13] { // utime and stime of proc(5)
				x, err := strconv.Atoi(field)
				if err != nil {
					t.Fatal(err)
				}
				n += x
			}
			return n
		}
		share := func() float64 {
			t.Helper()
			a, b := ticks(other), ticks(pid)
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
				da, db := ticks(other)-a, ticks(pid)-b
				if da+db >= 150 { // hundredths of a second
					return float64(db) / float64(da+db)
				}
				if time.Now().After(deadline) {
					t.Fatalf("%d and %d hundredths of a second within a minute", da, db)
				}
			}
		}
		// comes waits until a stretch of their work is shared as it should be.
		comes := func(what string, ok func(share float64) bool) {
			t.Helper()
			for deadline := time.Now().Add(2 * time.Minute); ; {
				s := share()
				if ok(s) {
					t.Logf("%s it has %.3f of the CPU", what, s)
					return
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s it has %.3f of the CPU", what, s)
				}
			}
		}
		comes("with weight 100 beside 100", func(s float64) bool { return s > 0.25 })
		back = set(heal.Reprioritise, finding(pid), heal.Value{Name: "cpu.weight", Number: 1})
		weighs := func(want string) {
			t.Helper()
			if now := strings.TrimSpace(cat("/cgroup/stall/cpu.weight")); now != want {
				t.Errorf("cpu.weight is %s, not %s", now, want)
			}
		}
		weighs("1")
		comes("with weight 1 beside 100", func(s float64) bool { return s < 0.1 })
		back()
		weighs("100")
		comes("with weight 100 again", func(s float64) bool { return s > 0.25 })
		if bad := g.Complaints(); len(bad) > noise {
			t.Errorf("the guest's kernel complains: %q", bad[noise:])
		}
	})
}
