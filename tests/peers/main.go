// Peers holds package kernel against drgn and crash(8) on the same memory of a host: first whether they see the same, then how long each
// takes.
//
// Synopsis:
//
//	go run ./tests/peers -ram FILE -vmlinux FILE [-n 5] [-keep CORE]
//
// Description:
//
// FILE is the RAM file of a q35 machine with a 6.1 kernel: that of the lab's host, or a copy. The machine should stand still. Of it an
// ELF core is made by package dump. vmlinux is that kernel's with its debug symbols, of Debian's linux-image-…-dbg
// (283 MB, 590 MB unpacked): backdoor needs none. drgn is python3-drgn, crash is crash; what is not installed is left out.
//
// The programs are run in turn, each as a process from its start to its end, so that a busy machine treats all alike; compare the ratios.
package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/dump"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

//go:embed compare.py
var script []byte

func main() {
	ram := flag.String("ram", "", "RAM `file` of a q35 machine")
	vmlinux := flag.String("vmlinux", "", "its kernel with debug symbols, a `file`")
	n := flag.Int("n", 5, "`number` of runs of each program")
	keep := flag.String("keep", "", "keep the core in this `file`")
	flag.Parse()
	if err := run(context.Background(), os.Stdout, *ram, *vmlinux, *keep, *n); err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, w io.Writer, ram, vmlinux, core string, n int) error {
	if ram == "" || vmlinux == "" || n <= 0 {
		return errors.New("-ram and -vmlinux are needed; see go doc ./tests/peers")
	}
	dir, err := os.MkdirTemp("", "peers-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fi, err := os.Stat(ram)
	if err != nil {
		return err
	}
	mem, err := hostmem.OpenRAMFile(ram, hostmem.Q35Layout(uint64(fi.Size())), false)
	if err != nil {
		return err
	}
	defer mem.Close()
	img, err := kernel.Open(ctx, mem, kernel.Options{})
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "kernel %s, %d MiB\n", img.Info().Release, fi.Size()>>20)
	if core == "" {
		core = filepath.Join(dir, "core")
	}
	if err := writeCore(core, img); err != nil {
		return fmt.Errorf("make core: %w", err)
	}
	compare := filepath.Join(dir, "compare.py")
	if err := os.WriteFile(compare, script, 0o644); err != nil {
		return err
	}
	warm, err := native(ctx, w, mem, img)
	if err != nil {
		return err
	}
	if _, err := exec.LookPath("drgn"); err != nil {
		fmt.Fprintln(w, "drgn is not installed (python3-drgn): nothing to compare with")
	} else if err := errors.Join(same(ctx, w, img, core, vmlinux, compare), warmed(ctx, w, warm, core, vmlinux, compare, n)); err != nil {
		return err
	}
	return race(ctx, w, dir, core, vmlinux, compare, n)
}

// warmed measures how long the tasks alone take once everything is loaded, n times in turn: ours, then drgn's. Each goes on with what it
// made of the kernel (an Image, a Program) and reads the tasks anew: neither keeps the core's memory from one list to the next.
func warmed(ctx context.Context, w io.Writer, warm func() (time.Duration, error), core, vmlinux, compare string, n int) error {
	var ours, theirs []time.Duration
	var ratios []float64
	for range n {
		o, err := warm()
		if err != nil {
			return err
		}
		c := exec.CommandContext(ctx, "drgn", "-q", "-c", core, "-s", vmlinux, compare, "warm")
		c.Stderr = os.Stderr
		out, err := c.Output()
		if err != nil {
			return fmt.Errorf("drgn: %w", err)
		}
		ns, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
		if err != nil {
			return fmt.Errorf("drgn: %w", err)
		}
		ours, theirs = append(ours, o), append(theirs, time.Duration(ns))
		ratios = append(ratios, float64(ns)/float64(max(1, o)))
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	slices.Sort(ratios)
	fmt.Fprintf(w, "ps alone, all loaded, each the best of 7, median of %d in turn: backdoor %v, drgn %v, %.1f × backdoor (%.1f to %.1f)\n",
		n, ours[n/2], theirs[n/2], ratios[n/2], ratios[0], ratios[n-1])
	return nil
}

// native measures what package kernel takes in this process, and returns what measures ps alone again.
func native(ctx context.Context, w io.Writer, mem hostmem.Memory, img *kernel.Image) (func() (time.Duration, error), error) {
	const limit = 60 << 20 // backdoord keeps itself within one, too, which follows what is in use
	debug.SetMemoryLimit(limit)
	best := func(f func() error) (time.Duration, error) {
		least := time.Duration(1<<63 - 1)
		for range 7 {
			began := time.Now()
			if err := f(); err != nil {
				return 0, err
			}
			least = min(least, time.Since(began))
		}
		return least, nil
	}
	tasks := 0
	list := func(img *kernel.Image) error {
		tasks = 0
		v := img.View(ctx)
		defer v.Close()
		for _, err := range v.Tasks() {
			if err != nil {
				return err
			}
			tasks++
		}
		return nil
	}
	cold, err := best(func() error {
		img, err := kernel.Open(ctx, mem, kernel.Options{})
		if err != nil {
			return err
		}
		return list(img)
	})
	if err != nil {
		return nil, err
	}
	again := func() (time.Duration, error) { return best(func() error { return list(img) }) }
	warm, err := again()
	if err != nil {
		return nil, err
	}
	var cost kernel.Cost
	whole, err := best(func() (err error) { cost, err = everything(ctx, img); return err })
	if err != nil {
		return nil, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	fmt.Fprintf(w, "in this process, the best of 7: attach and ps %v, ps alone %v (%d tasks, %v for 1000), everything %v (%d pages), %d MiB of memory from the system under a limit of %d\n",
		cold, warm, tasks, warm*1000/time.Duration(tasks), whole, cost.Pages, m.Sys>>20, limit>>20)
	return again, nil
}

// everything asks all that a View lists; of every sixteenth task, also its details and its stack.
func everything(ctx context.Context, img *kernel.Image) (kernel.Cost, error) {
	v := img.View(ctx)
	defer v.Close()
	var pids []int
	for t, err := range v.Tasks() {
		if err != nil {
			return v.Cost(), err
		}
		if t.PID == t.TGID && !t.KThread {
			pids = append(pids, t.PID)
		}
		if t.PID%16 != 1 { // these walk all tasks each time
			continue
		}
		if _, err := v.Process(t.PID); err != nil {
			return v.Cost(), err
		}
		if _, err := v.Stack(t.PID); err != nil && !errors.Is(err, kernel.ErrNotSupported) && !errors.Is(err, kernel.ErrNotFound) && t.State != "Z" {
			return v.Cost(), err
		}
	}
	for _, pid := range pids {
		m, err := v.UserMemory(pid)
		if errors.Is(err, kernel.ErrNotFound) {
			continue // a zombie
		}
		if err != nil {
			return v.Cost(), err
		}
		if err := drain(m.Mappings()); err != nil {
			return v.Cost(), err
		}
	}
	errs := []error{drain(v.Log()), drain(v.Modules()), drain(v.Interfaces()), drain(v.OpenFiles(0)), drain(v.Mounts(1)), drain(v.Sockets()), drain(v.SlabCaches()),
		drain(v.Cgroups()), drain(v.Containers()), drain(v.Locks()), drain(v.WorkerPools()), drain(v.Timers()), drain(v.Interrupts()), drain(v.Disks()), drain(v.Pipes()),
		drain(v.Routes()), drain(v.Sysctls()), drain(v.Keys()), drain(v.Probes())}
	_, err := v.BPF()
	errs = append(errs, err)
	_, err = v.RCU()
	errs = append(errs, err)
	_, err = v.Host()
	errs = append(errs, err)
	_, err = v.MemoryUse()
	errs = append(errs, err)
	_, err = v.Load()
	return v.Cost(), errors.Join(append(errs, err)...)
}

func drain[T any](seq func(func(T, error) bool)) (last error) {
	for _, err := range seq {
		last = err
	}
	return last
}

// writeCore writes the memory of an image as the ELF core that package dump makes.
func writeCore(path string, img *kernel.Image) error {
	src, err := dump.Of(img.View(context.Background()))
	if err != nil {
		return err
	}
	core, err := dump.New(src)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, io.NewSectionReader(core, 0, core.Size())); err != nil {
		return err
	}
	return f.Close()
}

// seen is what compare.py prints.
type seen struct {
	Tasks []struct {
		Addr                                        kernel.VirtAddr
		PID, TGID, PPID, Nice, OOM, Policy, Seccomp int
		UID                                         uint32
		Comm                                        string
		UTime, STime, Runtime, Start                time.Duration
		Switches, Permitted, Blocked                uint64
	}
	Modules []struct {
		Addr, Base kernel.VirtAddr
		Name       string
	}
	Cgroups []struct {
		Addr               kernel.VirtAddr
		Path               string
		ID                 uint64
		Max, Current, PIDs *int64
		PIDsMax            *int64
	}
	Pools   []struct{ ID, CPU, Workers, Idle int }
	Timers  []kernel.VirtAddr
	Locks   map[string]kernel.VirtAddr
	RCU     uint64
	Tainted uint64
}

// same compares what drgn sees in the core with what package kernel sees in the memory.
func same(ctx context.Context, w io.Writer, img *kernel.Image, core, vmlinux, compare string) error {
	v := img.View(ctx)
	var specs []string
	locks := make(map[string]kernel.Lock)
	for l, err := range v.Locks() {
		if err != nil {
			return err
		}
		locks[l.Addr.String()] = l
		specs = append(specs, l.Kind+":"+l.Addr.String())
	}
	cmd := exec.CommandContext(ctx, "drgn", "-q", "-c", core, "-s", vmlinux, compare)
	cmd.Stdin, cmd.Stderr = strings.NewReader(strings.Join(specs, "\n")), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("drgn: %w", err)
	}
	var s seen
	if err := json.Unmarshal(out, &s); err != nil {
		return fmt.Errorf("drgn: %w", err)
	}
	fields, differ := 0, 0
	check := func(what string, got, want any) {
		if fields++; fmt.Sprint(got) != fmt.Sprint(want) {
			differ++
			fmt.Fprintf(w, "DIFFERS: %s is %v, drgn says %v\n", what, got, want)
		}
	}
	tasks := make(map[int]kernel.Task)
	for t, err := range v.Tasks() {
		if err != nil {
			return err
		}
		tasks[t.PID] = t
	}
	check("number of tasks", len(tasks), len(s.Tasks))
	for _, d := range s.Tasks {
		t := tasks[d.PID]
		check(fmt.Sprintf("task %d", d.PID), []any{t.Addr, t.TGID, t.PPID, t.Comm, t.UID, t.UTime, t.STime, t.Runtime, t.Start, t.Switches},
			[]any{d.Addr, d.TGID, d.PPID, d.Comm, d.UID, d.UTime, d.STime, d.Runtime, d.Start, d.Switches})
		fields += 9
		p, err := v.Process(d.PID)
		if err != nil {
			return err
		}
		policy := map[string]int{"SCHED_NORMAL": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_IDLE": 5, "SCHED_DEADLINE": 6}[p.Policy]
		seccomp := map[string]int{"disabled": 0, "strict": 1, "filter": 2}[p.Seccomp]
		check(fmt.Sprintf("process %d", d.PID), []any{p.Credentials.Permitted, policy, p.Nice, seccomp, p.Blocked, p.OOMScoreAdj}, []any{d.Permitted, d.Policy, d.Nice, d.Seccomp, d.Blocked, d.OOM})
		fields += 5
	}
	modules := 0
	for m, err := range v.Modules() {
		if err != nil {
			return err
		}
		i := slices.IndexFunc(s.Modules, func(d struct {
			Addr, Base kernel.VirtAddr
			Name       string
		}) bool {
			return d.Name == m.Name
		})
		if i < 0 {
			check("module "+m.Name, "there", "not there")
			continue
		}
		modules++
		check("module "+m.Name, []any{m.Addr, m.Base}, []any{s.Modules[i].Addr, s.Modules[i].Base})
	}
	check("number of modules", modules, len(s.Modules))
	groups := make(map[string]kernel.Cgroup)
	for c, err := range v.Cgroups() {
		if err != nil {
			return err
		}
		groups[c.Path] = c
	}
	check("number of control groups", len(groups), len(s.Cgroups))
	for _, d := range s.Cgroups {
		c := groups[d.Path]
		check("control group "+d.Path, []any{c.Addr, c.ID}, []any{d.Addr, d.ID})
		if c.Memory != nil && d.Max != nil {
			limit := *d.Max << 12
			if *d.Max > 1<<50 {
				limit = kernel.NoLimit
			}
			check("memory of "+d.Path, []any{c.Memory.Max, c.Memory.Current}, []any{limit, *d.Current << 12})
		}
		if c.PIDs != nil && d.PIDs != nil {
			check("PIDs of "+d.Path, c.PIDs.Current, *d.PIDs)
		}
	}
	i := 0
	for p, err := range v.WorkerPools() {
		if err != nil {
			return err
		}
		if i < len(s.Pools) {
			check(fmt.Sprintf("worker pool %d", p.ID), []any{p.ID, p.CPU, p.Workers, p.Idle}, []any{s.Pools[i].ID, s.Pools[i].CPU, s.Pools[i].Workers, s.Pools[i].Idle})
		}
		i++
	}
	check("number of worker pools", i, len(s.Pools))
	var timers []kernel.VirtAddr
	for t, err := range v.Timers() {
		if err != nil {
			return err
		}
		if t.Clock == "jiffies" {
			timers = append(timers, t.Addr)
		}
	}
	slices.Sort(timers)
	slices.Sort(s.Timers)
	check("timers of the wheel", timers, s.Timers)
	for at, owner := range s.Locks {
		var got kernel.VirtAddr
		if o := locks[at].Owner; o != nil {
			got = o.Addr
		}
		check("owner of the "+locks[at].Kind+" at "+at, got, owner)
	}
	r, err := v.RCU()
	if err != nil {
		return err
	}
	check("RCU's grace period", r.GracePeriod, s.RCU)
	h, err := v.Host()
	if err != nil {
		return err
	}
	check("taint", h.Tainted, s.Tainted)
	fmt.Fprintf(w, "compared with drgn: %d fields of %d tasks, %d modules, %d control groups, %d worker pools, %d timers, %d locks; %d differ\n",
		fields, len(s.Tasks), len(s.Modules), len(s.Cgroups), len(s.Pools), len(s.Timers), len(s.Locks), differ)
	if differ > 0 {
		return fmt.Errorf("%d of %d differ", differ, fields)
	}
	return nil
}

// race runs the programs in turn and prints how long each took.
func race(ctx context.Context, w io.Writer, dir, core, vmlinux, compare string, n int) error {
	ours := filepath.Join(dir, "backdoor")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", ours, "./cmd/backdoor")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("build backdoor: %w", err)
	}
	type runner struct {
		name  string
		cmd   []string
		stdin string
		took  []time.Duration
		lines int
	}
	runners := []*runner{{name: "backdoor ps", cmd: []string{ours, "-image", core, "ps", "-threads"}}}
	for _, r := range []*runner{
		{name: "drgn", cmd: []string{"drgn", "-q", "-c", core, "-s", vmlinux, compare, "ps"}},
		{name: "crash", cmd: []string{"crash", "-s", "--kaslr=auto", vmlinux, core}, stdin: "ps\nq\n"},
	} {
		if _, err := exec.LookPath(r.name); err != nil {
			fmt.Fprintf(w, "%s is not installed\n", r.name)
			continue
		}
		runners = append(runners, r)
	}
	for range n {
		for _, r := range runners {
			c := exec.CommandContext(ctx, r.cmd[0], r.cmd[1:]...)
			c.Stdin = strings.NewReader(r.stdin)
			began := time.Now()
			out, err := c.CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s: %w: %.300s", r.name, err, out)
			}
			r.took = append(r.took, time.Since(began))
			r.lines = bytes.Count(out, []byte("\n"))
		}
	}
	median := func(d []time.Duration) time.Duration {
		d = slices.Sorted(slices.Values(d))
		return d[len(d)/2]
	}
	for _, r := range runners {
		fmt.Fprintf(w, "%-12s attach and ps, whole process: median %v of %d, %.1f × backdoor; %d lines\n", r.name, median(r.took).Round(time.Millisecond), n,
			float64(median(r.took))/float64(max(1, median(runners[0].took))), r.lines)
	}
	return nil
}
