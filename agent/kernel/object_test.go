package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// objectKernels are the kernels whose objects beyond listings are recorded, and compared each time: those of the others when they are
// asked for by -guests.
var objectKernels = []string{"6.1", "6.12"}

// guestTest compares something that is listed of a guest with what that says of itself.
type guestTest struct {
	name string
	test func(*testing.T, *guest, *Image)
}

// objectTests are those that TestListings puts to objectKernels, and to what -guests asks for.
var objectTests = []guestTest{
	{"processes", testProcesses},
	{"user memory", testUserMemory},
	{"workers", testWorkers},
	{"timers", testTimers},
	{"interrupts", testInterrupts},
	{"RCU", testRCU},
	{"disks", testDisks},
	{"pci", testPCI},
	{"BPF", testBPF},
	{"probes", testProbes},
	{"keys", testKeys},
	{"pipes", testPipes},
	{"routes", testRoutes},
	{"routes6", testRoutes6},
	{"uprobes", testUprobes},
	{"LSM hooks", testLSMHooks},
	{"sysctls", testSysctls},
	{"host", testHost},
}

// needVariables are those of objectTests that a kernel fails whose symbols tell of functions alone.
var needVariables = []string{"workers", "interrupts", "RCU", "BPF", "probes", "keys", "uprobes", "LSM hooks", "sysctls", "host"}

// testNotSupported asks such a kernel for everything: an answer that cannot be had must not look like one that is empty.
func testNotSupported(t *testing.T, g *guest, img *Image) {
	v := g.frozenView(img)
	refused := 0
	all := slices.Concat(objectListings, liveListings, []listing{
		{"uprobes", func(v *View) (int, error) { return drain(v.Uprobes()) }},
		{"LSM hooks", func(v *View) (int, error) { return drain(v.LSMHooks()) }},
	})
	for _, l := range all {
		n, err := l.ask(v)
		if errors.Is(err, ErrNotSupported) {
			refused++
		} else if err != nil || n == 0 {
			t.Errorf("%s: %d, %v", l.name, n, err)
		}
	}
	if refused < 5 || refused > 12 {
		t.Errorf("%d of %d listings are not supported", refused, len(all))
	}
}

// startObjects starts a guest that has, beyond startListed, a container, tasks that wait for locks, eBPF, probes, keys, swap, and I/O
// that does not end.
func startObjects(t testing.TB, kernel string, o guestOptions) *guest {
	t.Helper()
	o.modules = append(o.modules, "virtio_blk")
	disk := filepath.Join(t.TempDir(), "swap")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 16<<20)); err != nil {
		t.Fatal(err)
	}
	o.args = append(o.args, "-drive", "if=none,id=d0,driver=null-co,size=64M,read-zeroes=on", "-device", "virtio-blk-pci,drive=d0,id=vda",
		"-drive", "if=none,id=d1,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=d1,id=vdb")
	g := startListed(t, kernel, o)
	var result string
	if g.ask(&result, "objects"); result != "ok" {
		t.Fatal(result)
	}
	// From now on the first disk serves one request a second.
	g.execute("block_set_io_throttle", `"device":"d0","bps":0,"bps_rd":0,"bps_wr":0,"iops":1,"iops_rd":0,"iops_wr":0`)
	if g.ask(&result, "readers 20"); result != "ok" {
		t.Fatal(result)
	}
	return g
}

// files asks for small files below a directory.
func (g *guest) files(dir, names string) map[string]string {
	g.t.Helper()
	var all map[string]string
	g.ask(&all, "tree "+dir+":"+names)
	return all
}

// status asks what /proc says of each thread.
func (g *guest) status() map[string]map[string]string {
	g.t.Helper()
	var all map[string]map[string]string
	g.ask(&all, "status")
	return all
}

// words returns the values of lines of a name and a number.
func words(text string) map[string]int64 {
	m := make(map[string]int64)
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 2 {
			m[f[0]], _ = strconv.ParseInt(f[1], 10, 64)
		}
	}
	return m
}

func testCgroups(t *testing.T, g *guest, img *Image) {
	said := g.files("/cgroup", "memory.*,pids.*,cpu.*,cgroup.*")
	v := g.frozenView(img)
	got := gather(t, v, v.Cgroups())
	limited := 0
	for _, c := range got {
		// what the guest's file of this group says; "" if there is none
		file := func(name string) string {
			return strings.TrimSpace(said["/cgroup"+strings.TrimSuffix(c.Path, "/")+"/"+name])
		}
		check := func(name string, got int64) {
			want := file(name)
			if want == "" && !strings.HasSuffix(name, "peak") { // memory.peak since v5.19, pids.peak since v6.1
				t.Errorf("%s has %d for %s, the guest has no such file", c.Path, got, name)
			}
			if n, err := strconv.ParseInt(want, 10, 64); err == nil && n != got || want == "max" && got != NoLimit {
				t.Errorf("%s %s = %d; the guest has %s", c.Path, name, got, want)
			}
		}
		if _, ok := said["/cgroup"+strings.TrimSuffix(c.Path, "/")+"/cgroup.procs"]; !ok {
			t.Errorf("the guest has no %s", c.Path)
		}
		if n := len(strings.Fields(file("cgroup.threads"))); c.Path != "/" && n != c.Tasks {
			t.Errorf("%s has %d tasks; the guest has %d", c.Path, c.Tasks, n)
		}
		if c.Frozen != (c.Path == "/c") || c.Path == "/c" && file("cgroup.freeze") != "1" {
			t.Errorf("%s: frozen %v; the guest has %s", c.Path, c.Frozen, file("cgroup.freeze"))
		}
		if c.Path == "/" {
			if c.CPU != nil || c.Memory != nil || c.PIDs != nil {
				t.Errorf("the root has limits: %+v", c)
			}
			continue
		}
		if c.CPU == nil || (c.Memory == nil) != (file("memory.current") == "") || (c.PIDs == nil) != (file("pids.current") == "") || (c.CPU.Weight == 0) != (file("cpu.weight") == "") {
			t.Errorf("%s = %+v", c.Path, c)
			continue
		}
		used := words(file("cpu.stat"))
		if d := c.CPU.Usage.Microseconds() - used["usage_usec"]; d < 0 || d > 200_000 {
			t.Errorf("%s has used %v; the guest says %d µs", c.Path, c.CPU.Usage, used["usage_usec"])
		}
		if c.CPU.Weight != 0 {
			check("cpu.weight", int64(c.CPU.Weight))
			most := "max"
			if c.CPU.Quota != NoLimit {
				most = strconv.FormatInt(c.CPU.Quota.Microseconds(), 10)
				limited++
			}
			if want := fmt.Sprintf("%s %d", most, c.CPU.Period.Microseconds()); want != file("cpu.max") {
				t.Errorf("%s cpu.max = %s; the guest has %s", c.Path, want, file("cpu.max"))
			}
			if c.CPU.Throttled != uint64(used["nr_throttled"]) || c.CPU.Stalled.Microseconds() != used["throttled_usec"] {
				t.Errorf("%s = %+v; the guest has %v", c.Path, c.CPU, used)
			}
		}
		if m := c.Memory; m != nil {
			check("memory.current", m.Current)
			check("memory.peak", m.Peak)
			check("memory.min", m.Min)
			check("memory.low", m.Low)
			check("memory.high", m.High)
			check("memory.max", m.Max)
			check("memory.swap.current", m.Swap)
			check("memory.swap.max", m.SwapMax)
			e := words(file("memory.events"))
			if m.HitHigh != uint64(e["high"]) || m.HitMax != uint64(e["max"]) || m.OOMs != uint64(e["oom"]) || m.OOMKills != uint64(e["oom_kill"]) {
				t.Errorf("%s = %+v; the guest has %v", c.Path, m, e)
			}
			if m.Max != NoLimit || m.High != NoLimit {
				limited++
			}
		}
		if c.PIDs != nil {
			check("pids.current", c.PIDs.Current)
			check("pids.max", c.PIDs.Max)
			check("pids.peak", c.PIDs.Peak)
			if c.PIDs.Max != NoLimit {
				limited++
			}
		}
	}
	groups := 0
	for name := range said {
		if strings.HasSuffix(name, "/cgroup.procs") {
			groups++
		}
	}
	if len(got) != groups || groups < 6 || limited < 4 {
		t.Errorf("%d groups, %d limits; the guest has %d groups", len(got), limited, groups)
	}
}

func testContainers(t *testing.T, g *guest, img *Image) {
	said := g.status()
	v := g.frozenView(img)
	got := gather(t, v, v.Containers())
	if len(got) != 1 {
		t.Fatalf("%d containers: %+v; want 1", len(got), got)
	}
	c := got[0]
	inside := 0
	for pid, s := range said {
		if strings.Contains(s["cgroup"], "/docker/"+c.ID) {
			inside++
			i := slices.IndexFunc(c.Tasks, func(x ContainerTask) bool { return strconv.Itoa(x.PID) == pid })
			if i < 0 {
				t.Errorf("PID %s is missing", pid)
				continue
			}
			x := c.Tasks[i]
			if want := fmt.Sprintf("NSpid:\t%d\t%d\n", x.PID, x.Inner); !strings.Contains(s["status"], want) {
				t.Errorf("%+v; the guest says %s", x, s["status"])
			}
			for name, got := range map[string]uint64{"pid": c.PIDNS, "net": c.NetNS, "mnt": c.MountNS} {
				if want := fmt.Sprintf("%s:[%d]", name, got); s["ns/"+name] != want {
					t.Errorf("namespace %s; the guest says %s", want, s["ns/"+name])
				}
			}
		}
	}
	if c.Runtime != "docker" || len(c.ID) != 64 || c.Hostname != "boxed" || len(c.Tasks) != inside || inside < 2 || c.Cgroup.Memory == nil || c.Cgroup.Memory.Max != 64<<20 {
		t.Errorf("container %+v; the guest has %d tasks in it", c, inside)
	}
}

func TestContainerNames(t *testing.T) {
	const id = "4f1c0ffee4f1c0ffee4f1c0ffee4f1c0ffee4f1c0ffee4f1c0ffee4f1c0ffee4"
	for path, want := range map[string]Container{
		"/docker/" + id:                                 {Runtime: "docker", ID: id},
		"/system.slice/docker-" + id + ".scope":         {Runtime: "docker", ID: id},
		"/machine.slice/libpod-" + id + ".scope":        {Runtime: "podman", ID: id},
		"/machine.slice/libpod-conmon-" + id + ".scope": {},
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0e6ad8f0_2c6a_4e6e_9d0b_1d2f3a4b5c6d.slice/cri-containerd-" + id + ".scope": {Runtime: "containerd", ID: id, Pod: "0e6ad8f0-2c6a-4e6e-9d0b-1d2f3a4b5c6d"},
		"/kubepods/besteffort/pod0e6ad8f0-2c6a-4e6e-9d0b-1d2f3a4b5c6d/" + id:                                                                        {Runtime: "kubernetes", ID: id, Pod: "0e6ad8f0-2c6a-4e6e-9d0b-1d2f3a4b5c6d"},
		"/lxc.payload.web":                             {Runtime: "lxc", ID: "web"},
		"/lxc.monitor.web":                             {},
		"/lxc/web":                                     {Runtime: "lxc", ID: "web"},
		"/machine.slice/machine-debian.scope":          {Runtime: "machine", ID: "debian"},
		"/machine.slice/systemd-nspawn@debian.service": {Runtime: "machine", ID: "debian"},
		"/system.slice/ssh.service":                    {},
		"/":                                            {},
	} {
		got, ok := container(path)
		if got.Runtime != want.Runtime || got.ID != want.ID || got.Pod != want.Pod || ok != (want.ID != "") {
			t.Errorf("container(%q) = %+v, %v; want %+v", path, got, ok, want)
		}
	}
}

func testLocks(t *testing.T, g *guest, img *Image) {
	v := g.frozenView(img)
	_, realTime := img.types.field("mutex", "rtmutex")
	var got []string
	for _, l := range gather(t, v, v.Locks()) {
		s := l.Kind + " "
		if l.Owner != nil {
			s += l.Owner.Comm
		}
		if l.Readers > 0 {
			s += fmt.Sprintf(" %d", l.Readers)
		}
		s += ":"
		for _, w := range l.Waiters {
			s += " " + w.Comm
			if w.Reads {
				s += " r"
			}
		}
		if len(l.Waiters) == 0 {
			continue // one of the big locks, held for a moment
		}
		got = append(got, s)
		if l.Name == "" {
			t.Errorf("%+v has no name", l)
		}
	}
	slices.Sort(got)
	want := []string{"mutex l-pipe-own: l-pipe-wait l-pipe-read", "rtmutex l-pi-own: l-pi-wait", "rwsem l-dir-own 1: l-dir-wait", "rwsem l-file-own: l-file-wait"}
	if realTime == nil { // which does not record who reads
		want[2] = "rwsem  1: l-dir-wait"
	}
	if !slices.Equal(got, want) {
		t.Errorf("locks %q; want %q", got, want)
	}
}

func TestDeadlocks(t *testing.T) {
	lock := func(owner int, waiters ...int) Lock {
		l := Lock{Kind: "mutex"}
		if owner != 0 {
			l.Owner = &LockTask{PID: owner}
		}
		for _, w := range waiters {
			l.Waiters = append(l.Waiters, LockWaiter{LockTask: LockTask{PID: w}})
		}
		return l
	}
	read := lock(5, 6)
	read.Readers = 1
	for _, c := range []struct {
		name  string
		locks []Lock
		want  string
	}{
		{"none", nil, "[]"},
		{"chain", []Lock{lock(1, 2, 3), lock(2, 4)}, "[]"},
		{"two", []Lock{lock(1, 2), lock(2, 1)}, "[[2 1]]"},
		{"itself", []Lock{lock(7, 7)}, "[[7]]"},
		{"three, and one behind", []Lock{lock(1, 9, 2), lock(2, 3), lock(3, 1)}, "[[1 3 2]]"},
		{"two circles", []Lock{lock(1, 2), lock(2, 1), lock(3, 4), lock(4, 3)}, "[[2 1] [4 3]]"},
		{"readers", []Lock{read, lock(6, 5)}, "[]"},
		{"no owner", []Lock{lock(0, 1), lock(1, 2)}, "[]"},
	} {
		if got := fmt.Sprint(Deadlocks(c.locks)); got != c.want {
			t.Errorf("%s: %s; want %s", c.name, got, c.want)
		}
	}
}
