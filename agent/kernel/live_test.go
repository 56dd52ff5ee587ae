package kernel

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// What the guest tells of itself; see testdata/guest.
type (
	guestThread struct {
		PID, TGID, PPID, UID, CPU int
		Comm, State               string
		Flags                     uint64
		UTime, STime, Start       uint64
		Runtime, RSS, Switches    uint64
	}
	guestRecord struct {
		Prefix, Seq, Micros uint64
		Text                string
	}
	guestClock struct{ Mono, Real, Boot int64 }
)

// TestGuest compares the model of a running kernel with what that kernel says of itself.
func TestGuest(t *testing.T) {
	forEachGuest(t, func(t *testing.T, kernel string) {
		g := startGuest(t, kernel, guestOptions{})
		img := g.attach(Options{})
		for _, r := range img.Info().Rungs {
			t.Logf("%-12s %-5v %10v %s", r.Name, r.OK, r.Duration.Round(time.Microsecond), r.Detail)
		}
		t.Run("identity", func(t *testing.T) { testIdentity(t, g, img) })
		t.Run("symbols", func(t *testing.T) { testSymbols(t, g, img) })
		t.Run("RAM", func(t *testing.T) { testRAM(t, g, img) })
		t.Run("processors", func(t *testing.T) { testProcessors(t, g, img) })
		t.Run("clock", func(t *testing.T) { testClock(t, g, img) })
		t.Run("counters", func(t *testing.T) { testCounters(t, g, img) })
		t.Run("log", func(t *testing.T) { testLog(t, g, img) })
		t.Run("tasks", func(t *testing.T) { testTasks(t, g, img) })
		t.Run("forks", func(t *testing.T) { testForks(t, g, img) })
		t.Run("panic", func(t *testing.T) { testPanic(t, g, img) })
	})
}

func testIdentity(t *testing.T, g *guest, img *Image) {
	g.t = t
	var version string
	g.ask(&version, "version")
	info := img.Info()
	if got := info.Banner + "\n"; got != version {
		t.Errorf("banner = %q, /proc/version = %q", got, version)
	}
	if info.Hostname != "guest" || info.CPUs != 2 {
		t.Errorf("host name %q, %d CPUs; want guest, 2", info.Hostname, info.CPUs)
	}
	if err := img.Prove(t.Context()); err != nil {
		t.Error(err)
	}
}

func testSymbols(t *testing.T, g *guest, img *Image) {
	g.t = t
	var want struct {
		Hash  string
		Count int
	}
	g.ask(&want, "kallsyms")
	k, h := img.syms, fnv.New64a()
	for i := range k.offsets {
		typ, name := k.name(i)
		fmt.Fprintf(h, "%016x %c %s\n", uint64(k.address(k.offsets[i], i)), typ, name)
	}
	if got := fmt.Sprintf("%x", h.Sum64()); got != want.Hash || len(k.offsets) != want.Count {
		t.Errorf("%d symbols, hash %s; /proc/kallsyms has %d, hash %s", len(k.offsets), got, want.Count, want.Hash)
	}
	for _, name := range []string{"_stext", "init_task", "posix_timer_fn", "schedule"} {
		va, err := img.Symbol(name)
		if err != nil {
			t.Error(err)
			continue
		}
		at, offset, err := img.SymbolAt(va + 3)
		if err != nil {
			t.Error(err)
			continue
		}
		again, err := img.Symbol(at)
		if errors.Is(err, ErrAmbiguous) && offset == 3 {
			continue // an alias that is the name of another static function, too
		}
		if err != nil || again != va || offset != 3 {
			t.Errorf("SymbolAt(%s+3) = %s+%d, %v", name, at, offset, err)
		}
	}
}

func testRAM(t *testing.T, g *guest, img *Image) {
	g.t = t
	var iomem string
	g.ask(&iomem, "iomem")
	var want []hostmem.Range
	for line := range strings.Lines(iomem) {
		span, ok := strings.CutSuffix(line, " : System RAM\n")
		if !ok {
			continue
		}
		from, to, _ := strings.Cut(span, "-")
		a, _ := strconv.ParseUint(from, 16, 64)
		b, _ := strconv.ParseUint(to, 16, 64)
		want = append(want, hostmem.Range{Start: hostmem.PhysAddr(a), Size: b - a + 1})
	}
	if got := img.RAM(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("RAM() = %v, /proc/iomem has %v", got, want)
	}
}

func testClock(t *testing.T, g *guest, img *Image) {
	g.t = t
	for range 20 {
		var before, after guestClock
		g.ask(&before, "clock")
		h, err := img.View(t.Context()).Heartbeat()
		if err != nil {
			t.Fatal(err)
		}
		g.ask(&after, "clock")
		// The timekeeper's last update may be older than the first answer: by a tick, or as long as all CPUs slept.
		if h.Mono > after.Mono || h.Mono < before.Mono-int64(2*time.Second) {
			t.Errorf("Mono = %d, the guest's clock went from %d to %d", h.Mono, before.Mono, after.Mono)
		}
		boot := time.Unix(0, before.Real-before.Boot)
		if d := img.Info().BootTime.Sub(boot).Abs(); d > 50*time.Millisecond {
			t.Errorf("BootTime = %v, the guest says %v", img.Info().BootTime, boot)
		}
	}
}

func testCounters(t *testing.T, g *guest, img *Image) {
	g.t = t
	line := func(text, prefix string) []uint64 {
		for l := range strings.Lines(text) {
			if f := strings.Fields(l); len(f) > 0 && f[0] == prefix {
				var n []uint64
				for _, s := range f[1:] {
					v, err := strconv.ParseUint(s, 10, 64)
					if err != nil {
						break
					}
					n = append(n, v)
				}
				return n
			}
		}
		t.Fatalf("no %s in %s", prefix, text)
		return nil
	}
	var irqs [2]string
	var stat [2]string
	g.ask(&irqs[0], "irqs")
	g.ask(&stat[0], "stat")
	h, err := img.View(t.Context()).Heartbeat()
	if err != nil {
		t.Fatal(err)
	}
	g.ask(&irqs[1], "irqs")
	g.ask(&stat[1], "stat")
	if img.Info().Arch == "aarch64" {
		testTimerEvents(t, g, img)
	}
	for cpu, c := range h.CPUs {
		for _, x := range []struct {
			name, row string
			got       uint64
		}{{"TimerIRQs", "LOC:", c.TimerIRQs}, {"NMIs", "NMI:", c.NMIs}} {
			if img.Info().Arch != "x86_64" {
				continue // there are no such rows
			}
			if lo, hi := line(irqs[0], x.row)[cpu], line(irqs[1], x.row)[cpu]; x.got < lo || x.got > hi {
				t.Errorf("CPU %d: %s = %d, the guest counted from %d to %d", cpu, x.name, x.got, lo, hi)
			}
		}
		if !c.Online || c.Preempt&^0xffffff != 0 {
			t.Errorf("CPU %d: online %v, preempt count %#x", cpu, c.Online, c.Preempt)
		}
		if c.NextEvent != math.MaxInt64 && (c.NextEvent < h.Mono-int64(2*time.Second) || c.NextEvent > h.Mono+int64(time.Hour)) {
			t.Errorf("CPU %d: next event at %d, now is %d", cpu, c.NextEvent, h.Mono)
		}
	}
	var switches uint64
	for _, c := range h.CPUs {
		switches += c.Switches
	}
	if lo, hi := line(stat[0], "ctxt")[0], line(stat[1], "ctxt")[0]; switches < lo || switches > hi {
		t.Errorf("%d switches, the guest counted from %d to %d", switches, lo, hi)
	}
	// The count of a CPU's interrupts is without the architecture's own, which /proc/stat adds.
	if h.CPUs[0].IRQs == 0 || h.CPUs[0].IRQs > line(stat[1], "intr")[0] {
		t.Errorf("%d interrupts, the guest counted %d", h.CPUs[0].IRQs, line(stat[1], "intr")[0])
	}
}

// testTimerEvents: on AArch64 the counter is of what the timer interrupts do, which begins later than the interrupts. So the
// growth is compared.
func testTimerEvents(t *testing.T, g *guest, img *Image) {
	count := func() (n [2]uint64) {
		var text string
		g.ask(&text, "irqs")
		for l := range strings.Lines(text) {
			if f := strings.Fields(l); len(f) > 3 && f[len(f)-1] == "arch_timer" {
				n[0], _ = strconv.ParseUint(f[1], 10, 64)
				n[1], _ = strconv.ParseUint(f[2], 10, 64)
				return n
			}
		}
		t.Fatalf("no arch_timer in %s", text)
		return n
	}
	beat := func() Heartbeat {
		h, err := img.View(t.Context()).Heartbeat()
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	a, first, b := count(), beat(), count()
	time.Sleep(time.Second)
	c, second, d := count(), beat(), count()
	for cpu := range 2 {
		got := second.CPUs[cpu].TimerIRQs - first.CPUs[cpu].TimerIRQs
		if got < c[cpu]-b[cpu] || got > d[cpu]-a[cpu] || first.CPUs[cpu].TimerIRQs > b[cpu] || first.CPUs[cpu].NMIs != 0 {
			t.Errorf("CPU %d: %d timer events, %d more; the guest counted %d and %d to %d more", cpu, first.CPUs[cpu].TimerIRQs, got, b[cpu], c[cpu]-b[cpu], d[cpu]-a[cpu])
		}
	}
}

func testLog(t *testing.T, g *guest, img *Image) {
	g.t = t
	for _, lines := range []int{0, 100, 6000} { // the last wraps the ring
		g.ask(nil, fmt.Sprintf("kmsg %d", lines))
		var want []guestRecord
		var bySeq map[uint64]LogRecord
		var first, last uint64
		for range 5 { // until nothing is said between the two looks: each word of a full ring takes its oldest
			want, bySeq = nil, make(map[uint64]LogRecord)
			g.ask(&want, "dmesg")
			for r, err := range img.View(t.Context()).Log() {
				if err != nil {
					t.Fatal(err)
				}
				if len(bySeq) == 0 {
					first = r.Seq
				}
				last = r.Seq
				bySeq[r.Seq] = r
			}
			if len(want) > 0 && last == want[len(want)-1].Seq {
				break
			}
		}
		if len(want) < 100 || first != want[0].Seq || last < want[len(want)-1].Seq {
			t.Errorf("Log() has %d to %d; /dev/kmsg %d records, %d to %d", first, last, len(want), want[0].Seq, want[len(want)-1].Seq)
		}
		compareLog(t, bySeq, want)
		t.Logf("%d records, the last is %d", len(want), last)
	}
}

// compareLog compares the model's log with that of /dev/kmsg.
func compareLog(t *testing.T, got map[uint64]LogRecord, want []guestRecord) {
	t.Helper()
	bad := 0
	for _, w := range want {
		r := got[w.Seq]
		// /dev/kmsg escapes what is no printable ASCII.
		text := strings.NewReplacer("\t", `\x09`, "\n", `\x0a`, `\`, `\x5c`).Replace(r.Text)
		if uint64(r.Facility)<<3|uint64(r.Level) != w.Prefix || uint64(r.Time/time.Microsecond) != w.Micros || text != w.Text {
			if bad++; bad < 5 {
				t.Errorf("record %d = %+v; /dev/kmsg has %+v", w.Seq, r, w)
			}
		}
	}
}

func testTasks(t *testing.T, g *guest, img *Image) {
	g.t = t
	g.ask(nil, "spawn sleep 20")
	time.Sleep(time.Second)
	var want []guestThread
	g.ask(&want, "ps")
	g.execute("stop")
	defer g.execute("cont")
	got := make(map[int]Task)
	v := img.View(t.Context())
	for task, err := range v.Tasks() {
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := got[task.PID]; twice {
			t.Errorf("PID %d twice", task.PID)
		}
		if !task.Confident {
			t.Errorf("PID %d: not confident of a stopped machine", task.PID)
		}
		got[task.PID] = task
	}
	all := maps.Clone(got)
	compareTasks(t, got, want)
	t.Logf("%d threads, cost %+v", len(want), v.Cost())
	testAhead(t, g, img, all)
}

// testAhead walks the tasks over a path on which reads are under way together: the same must come out, in few round trips.
func testAhead(t *testing.T, g *guest, img *Image, want map[int]Task) {
	t.Helper()
	far := &trips{Memory: g.mem}
	v := img.with(far).View(t.Context())
	n := 0
	for task, err := range v.Tasks() {
		if err != nil {
			t.Fatal(err)
		}
		if n++; task != want[task.PID] {
			t.Errorf("over a far path %+v; near %+v", task, want[task.PID])
		}
	}
	t.Logf("over a far path %d tasks in %d round trips, %+v", n, far.n.Load(), v.Cost())
	if n != len(want) || int(far.n.Load()) > 30+n/16 {
		t.Errorf("%d of %d tasks in %d round trips", n, len(want), far.n.Load())
	}
	if c := v.Cost(); c.Pages != len(v.cache.pages) && c.Pages <= viewPages {
		t.Errorf("%d pages were read for %d", c.Pages, len(v.cache.pages))
	}
}

// trips is a memory that reads many pieces at once, and counts how often it was asked.
type trips struct {
	hostmem.Memory
	n atomic.Int64
}

func (m *trips) ReadAt(b []byte, off int64) (int, error) {
	m.n.Add(1)
	return m.Memory.ReadAt(b, off)
}

func (m *trips) ReadScatter(segs []hostmem.Segment) error {
	m.n.Add(1)
	return hostmem.ReadScatter(m.Memory, segs)
}

// compareTasks compares the model's tasks with those of /proc.
func compareTasks(t *testing.T, got map[int]Task, want []guestThread) {
	t.Helper()
	const tick = 10 * time.Millisecond // USER_HZ
	states := make(map[string]int)
	for _, w := range want {
		k, ok := got[w.PID]
		if !ok {
			if !strings.HasPrefix(w.Comm, "kworker/") {
				t.Errorf("PID %d (%s) is missing", w.PID, w.Comm)
			}
			continue
		}
		states[k.State]++
		delete(got, w.PID)
		if k.KThread {
			// /proc has the full names of kernel threads and adds the work that a worker does.
			w.Comm, _, _ = strings.Cut(w.Comm, "-")
			k.Comm, _, _ = strings.Cut(k.Comm, "-")
			w.Comm = w.Comm[:min(len(w.Comm), commLen-1)]
		}
		if k.TGID != w.TGID || k.PPID != w.PPID || int(k.UID) != w.UID || k.Comm != w.Comm || k.KThread != (w.Flags&pfKthread != 0) {
			t.Errorf("PID %d = %+v; /proc has %+v", w.PID, k, w)
		}
		// /proc has start_boottime, which copy_process (kernel/fork.c) reads right behind start_time: an emulated CPU may lose time in between.
		if d := int64(w.Start) - int64(k.Start/tick); d < 0 || d > 5 {
			t.Errorf("PID %d: start = %v; /proc has %d", w.PID, k.Start, w.Start)
		}
		if k.Switches != w.Switches || k.State == "R" || w.TGID == 1 {
			continue // it ran meanwhile, or is about to
		}
		if k.State != w.State || uint64(k.Runtime) != w.Runtime || k.CPU != w.CPU {
			t.Errorf("PID %d: state %s, ran %d, CPU %d; /proc has %s, %d, %d", w.PID, k.State, k.Runtime, k.CPU, w.State, w.Runtime, w.CPU)
		}
		// /proc scales utime and stime so that they sum up to the run time.
		if d := k.Runtime - time.Duration(w.UTime+w.STime)*tick; d < -tick || d > 3*tick {
			t.Errorf("PID %d: ran %v, /proc has %d+%d ticks", w.PID, k.Runtime, w.UTime, w.STime)
		}
		// /proc leaves out what single CPUs or threads still hold back: at most 64 pages each.
		if d := int64(k.RSS) - int64(w.RSS); d < -2*64*4096*3 || d > 2*64*4096*3 || (k.KThread || k.State == "Z") && k.RSS != 0 {
			t.Errorf("PID %d: RSS = %d; /proc has %d", w.PID, k.RSS, w.RSS)
		}
	}
	for _, k := range got {
		// The guest's own program gets new threads from its runtime while it answers; workers come and go.
		if k.TGID != 1 && !strings.HasPrefix(k.Comm, "kworker/") {
			t.Errorf("PID %d (%s) is not in /proc", k.PID, k.Comm)
		}
	}
	for _, s := range []string{"S", "I", "T", "Z"} {
		if states[s] == 0 {
			t.Errorf("no task in state %s was compared: %v", s, states)
		}
	}
	t.Logf("%d threads, states %v", len(want), states)
}

// slow is a memory with a latency, like that of a DMA engine.
type slow struct {
	hostmem.Memory
	delay time.Duration
}

func (m slow) ReadAt(b []byte, off int64) (int, error) {
	for end := time.Now().Add(m.delay); time.Now().Before(end); {
	}
	return m.Memory.ReadAt(b, off)
}

// testForks walks the tasks while processes come and go: at full speed, and so slowly that much changes during a walk.
func testForks(t *testing.T, g *guest, img *Image) {
	g.t = t
	g.ask(nil, "spawn fork 3")
	walkForks(t, img, 2000)
	lame := g.attachTo(slow{g.mem, 0}, Options{Hint: Hint{Note: img.Info().Note}})
	lame.mem = slow{g.mem, 100 * time.Microsecond}
	walkForks(t, lame, 60)
}

func walkForks(t *testing.T, img *Image, walks int) {
	t.Helper()
	torn, unsure, total := 0, 0, 0
	stable := make(map[int]bool) // kernel threads that do not come and go
	for task := range img.View(t.Context()).Tasks() {
		stable[task.PID] = task.KThread && !strings.HasPrefix(task.Comm, "kworker")
	}
	for range walks {
		seen := make(map[int]bool)
		v := img.View(t.Context())
		for task, err := range v.Tasks() {
			if errors.Is(err, ErrTorn) {
				torn++
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if seen[task.PID] && task.PID <= 200 {
				t.Errorf("PID %d twice", task.PID)
			}
			if !task.Confident {
				unsure++
			}
			seen[task.PID] = true
			total++
		}
		for pid := 1; pid <= 80; pid++ {
			if stable[pid] && !seen[pid] {
				t.Errorf("PID %d is missing among %d tasks", pid, len(seen))
			}
		}
		if err := img.Prove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d walks, %d tasks, %d of them in doubt, %d walks torn", walks, total, unsure, torn)
	if torn > walks/20 {
		t.Errorf("%d of %d walks are torn", torn, walks)
	}
}

func testPanic(t *testing.T, g *guest, img *Image) {
	g.t = t
	v := img.View(t.Context())
	p, err := v.Panic()
	if err != nil || p.Panicked || p.CPU != -1 {
		t.Fatalf("Panic() = %+v, %v before there is one", p, err)
	}
	for range v.Log() {
	}
	g.send("sysrq c")
	p = g.await(img, func(p PanicState) bool { return p.Panicked && p.Message != "" })
	if want := "Kernel panic - not syncing: sysrq triggered crash"; p.Message != want {
		t.Errorf("message = %q; want %q", p.Message, want)
	}
	if p.Task == nil || p.Task.TGID != 1 || p.Task.CPU != p.CPU {
		t.Errorf("culprit on CPU %d = %+v; want a thread of PID 1", p.CPU, p.Task)
	}
	time.Sleep(500 * time.Millisecond) // until the other CPU has stopped, too
	began := time.Now()
	dead, err := Open(t.Context(), g.mem, Options{Hint: Hint{Note: img.Info().Note}})
	if err != nil {
		t.Fatalf("attach to the dead kernel: %v", err)
	}
	t.Logf("dead kernel attached in %v", time.Since(began))
	if dead.Info().BootID != img.Info().BootID {
		t.Errorf("boot ID %s became %s by dying", img.Info().BootID, dead.Info().BootID)
	}
	if err := img.Prove(t.Context()); err != nil {
		t.Errorf("prove dead kernel: %v", err)
	}
	n := 0
	for _, err := range dead.View(t.Context()).Tasks() {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n < 50 {
		t.Errorf("%d tasks in the dead kernel", n)
	}
}

// TestGuestBoots attaches all the time while a kernel boots, is reset, and boots again: at the same place and elsewhere.
func TestGuestBoots(t *testing.T) {
	for _, cmdline := range []string{"", "nokaslr"} {
		someGuests(t, 2, func(t *testing.T, kernel string) {
			g := startGuest(t, kernel, guestOptions{cmdline: cmdline, early: true})
			first := g.attachWhileBooting(nil)
			if g.ready() {
				first = g.attach(Options{})
			}
			if again := g.attach(Options{Hint: Hint{Note: first.Info().Note}}); again.Info().BootID != first.Info().BootID {
				t.Errorf("boot ID %s became %s", first.Info().BootID, again.Info().BootID)
			}
			old := first
			for range 2 {
				if err := old.Prove(t.Context()); err != nil {
					t.Fatal(err)
				}
				g.execute("system_reset")
				img := g.attachWhileBooting(old)
				t.Logf("old kernel: %v", old.Prove(t.Context()))
				if g.ready() { // what was attached to has died as it started
					img = g.attach(Options{})
				}
				if err := img.Prove(t.Context()); err != nil {
					t.Errorf("prove the new kernel: %v", err)
				}
				// Whatever is still there of the old kernel, and even with its note as a hint, the live one is chosen.
				for _, o := range []Options{{}, {Hint: Hint{Note: old.Info().Note}}} {
					got := g.attach(o)
					if got.Info().BootID != img.Info().BootID {
						t.Errorf("Open(%+v) attached to boot %s, live is %s", o, got.Info().BootID, img.Info().BootID)
					}
				}
				if err := old.Prove(t.Context()); cmdline == "nokaslr" && !errors.Is(err, ErrGone) {
					t.Errorf("Prove of a kernel that another has overwritten = %v; want ErrGone", err)
				}
				old = img
			}
		})
	}
}

// attachWhileBooting opens the memory again and again until there is another kernel than old. All errors on the way must
// say that there is no kernel yet, or that one is changing.
func (g *guest) attachWhileBooting(old *Image) *Image {
	g.t.Helper()
	errs := make(map[string]int)
	defer func() { g.t.Logf("on the way: %v", errs) }()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(g.t.Context(), 30*time.Second)
		img, err := Open(ctx, g.mem, Options{})
		cancel()
		if err != nil {
			errs[err.Error()]++
			if !errors.Is(err, ErrNotFound) {
				errs["not ErrNotFound"]++
			}
			continue
		}
		if old == nil || img.Info().BootID != old.Info().BootID {
			return img
		}
		errs["old kernel"]++
	}
	g.t.Fatalf("no attach: %v", errs)
	return nil
}

// TestGuestFourLevels attaches to a guest whose CPU has no five-level page tables.
func TestGuestFourLevels(t *testing.T) {
	someGuests(t, 2, func(t *testing.T, kernel string) {
		g := startGuest(t, kernel, guestOptions{cpu: "qemu64", mib: 3072})
		img := g.attach(Options{})
		if img.Info().Levels != 4 {
			t.Errorf("%d levels of page tables", img.Info().Levels)
		}
		testRAM(t, g, img)
		testTasks(t, g, img)
	})
}
