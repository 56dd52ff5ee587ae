package detect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// simCPU is what one CPU of the simulated host is doing.
type simCPU struct {
	mode string // "idle", "busy", "irqs-off", "in-irq", "frozen"
	c    kernel.CPU
}

// sim is a host with NO_HZ: idle CPUs sleep until an event, busy ones tick at 250 Hz.
type sim struct {
	now  time.Time // reader's clock
	host time.Duration
	cpus []*simCPU
	hb   kernel.Heartbeat
	out  []kernel.Heartbeat
	r    *rand.Rand
}

func newSim(modes ...string) *sim {
	s := &sim{now: time.Unix(1_800_000_000, 0), host: time.Hour, r: rand.New(rand.NewPCG(1, 1))}
	for i, m := range modes {
		s.cpus = append(s.cpus, &simCPU{mode: m, c: kernel.CPU{
			ID: i, Online: true, Idle: true, TimerIRQs: 1000, CurrComm: fmt.Sprintf("swapper/%d", i), NextEvent: 1, Curr: 0xffff888000000000,
		}})
	}
	return s
}

func (s *sim) set(cpu int, mode string) { s.cpus[cpu].mode = mode }

// run lets time pass in steps of 1 ms, with a beat every 50 ms unless the reader is asleep.
func (s *sim) run(d time.Duration, readerAsleep ...bool) {
	asleep := len(readerAsleep) > 0 && readerAsleep[0]
	for ms := range int(d / time.Millisecond) {
		s.now = s.now.Add(time.Millisecond)
		s.host += time.Millisecond
		alive := false
		for _, c := range s.cpus {
			c.step(s)
			if c.mode == "busy" || c.mode == "idle" && time.Duration(c.c.Clock) == s.host {
				alive = true
			}
		}
		if alive && s.host%(4*time.Millisecond) == 0 {
			s.hb.Jiffies = 4294892296 + uint64(s.host/(4*time.Millisecond))
			s.hb.Mono = int64(s.host)
		}
		if ms%50 == 49 && !asleep {
			s.beat()
		}
	}
}

func (s *sim) beat() {
	hb := s.hb
	hb.At = s.now
	for _, c := range s.cpus {
		hb.CPUs = append(hb.CPUs, c.c)
	}
	s.out = append(s.out, hb)
}

func (c *simCPU) step(s *sim) {
	busy := func() {
		c.c.Idle, c.c.CurrPID, c.c.CurrComm, c.c.Curr, c.c.Preempt = false, 400+c.c.ID, "spin", 0xffff888001000000+kernel.VirtAddr(c.c.ID)<<12, 0
	}
	switch c.mode {
	case "busy":
		busy()
		if s.host%(4*time.Millisecond) == 0 {
			c.c.TimerIRQs++
			c.c.IRQs++
			c.c.Clock = uint64(s.host)
			c.c.NextEvent = int64(s.host + 4*time.Millisecond)
		}
	case "idle":
		c.c.Idle, c.c.CurrPID, c.c.CurrComm, c.c.Curr, c.c.Preempt = true, 0, "swapper", 0xffff888000000000, 0
		if int64(s.host) >= c.c.NextEvent {
			c.c.TimerIRQs++
			c.c.IRQs++
			c.c.Switches += 2
			c.c.Clock = uint64(s.host)
			c.c.NextEvent = int64(s.host) + int64(20+s.r.IntN(3980))*int64(time.Millisecond) // up to 4 s: the watchdog
		}
	case "irqs-off":
		busy()
	case "in-irq":
		c.c.Preempt = 0x00010000
		c.c.NextEvent = ktimeMax // as inside hrtimer_interrupt
	case "frozen":
	}
}

func (s *sim) pass() *Pass {
	return &Pass{Now: s.now, Panic: &kernel.PanicState{CPU: -1}, Beats: s.out}
}

func detect(t *testing.T, d Detector, p *Pass) []Finding {
	t.Helper()
	fs, err := d.Detect(context.Background(), p)
	if err != nil {
		t.Fatalf("%s: could not tell: %v", d.ID, err)
	}
	return fs
}

// firstVerdict runs the detector at every beat from index from on and returns how long after that beat the first suspicion
// and the first verdict came; negative if never.
func firstVerdict(t *testing.T, d Detector, s *sim, from int) (suspicion, verdict time.Duration, f Finding) {
	t.Helper()
	suspicion, verdict = -1, -1
	for i := from; i < len(s.out); i++ {
		fs, err := d.Detect(context.Background(), &Pass{Now: s.out[i].At, Beats: s.out[:i+1]})
		if err != nil {
			continue
		}
		for _, g := range fs {
			after := s.out[i].At.Sub(s.out[from].At)
			if suspicion < 0 {
				suspicion = after
			}
			if !g.Suspicion && verdict < 0 {
				verdict, f = after, g
			}
		}
	}
	return suspicion, verdict, f
}

func TestCPUStallFires(t *testing.T) {
	c := DefaultConfig()
	for _, tt := range []struct {
		name       string
		before     []string
		cpu        int
		mode, want string
		within     time.Duration
	}{
		{"interrupts off on a busy CPU", []string{"idle", "busy"}, 1, "irqs-off", "CPU 1 is locked with interrupts off", 1200 * time.Millisecond},
		{"stuck in an interrupt on an idle CPU", []string{"idle", "busy"}, 0, "in-irq", "CPU 0 is stuck in an interrupt", 1200 * time.Millisecond},
		{"an idle CPU frozen", []string{"idle", "busy"}, 0, "frozen", "CPU 0 is frozen", 6 * time.Second},
		{"a busy CPU frozen", []string{"idle", "busy"}, 1, "frozen", "CPU 1 is locked with interrupts off", 1200 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSim(tt.before...)
			s.run(10 * time.Second)
			s.set(tt.cpu, tt.mode)
			from := len(s.out)
			s.run(10 * time.Second)
			sus, ver, f := firstVerdict(t, cpuStall(c), s, from)
			if ver < 0 || ver > tt.within || f.Title != tt.want {
				t.Errorf("verdict after %v: %q; want %q within %v", ver, f.Title, tt.want, tt.within)
			}
			if tt.mode != "frozen" && (sus < 0 || sus > 300*time.Millisecond) {
				t.Errorf("suspicion after %v; want within 300ms", sus)
			}
			if f.Culprit.CPU == nil || *f.Culprit.CPU != tt.cpu {
				t.Errorf("culprit = %+v; want CPU %d", f.Culprit, tt.cpu)
			}
		})
	}
}

func TestCPUStallSilent(t *testing.T) {
	c := DefaultConfig()
	for _, tt := range []struct {
		name string
		do   func(s *sim)
	}{
		{"idle", func(s *sim) { s.run(40 * time.Second) }},
		{"all busy", func(s *sim) { s.set(0, "busy"); s.set(1, "busy"); s.run(20 * time.Second) }},
		{"a short lock", func(s *sim) {
			s.set(1, "busy")
			for range 20 {
				s.run(800 * time.Millisecond)
				s.set(1, "irqs-off")
				s.run(200 * time.Millisecond)
				s.set(1, "busy")
			}
		}},
		{"waking from idle", func(s *sim) {
			for range 10 {
				s.set(0, "idle")
				s.run(900 * time.Millisecond)
				s.set(0, "busy")
				s.run(300 * time.Millisecond)
			}
		}},
		{"the host stopped while the reader was, too", func(s *sim) {
			// A starved machine: nothing of the host runs, and neither do we.
			for range 10 {
				s.run(2 * time.Second)
				for _, cpu := range s.cpus {
					cpu.mode = "frozen"
				}
				s.run(1100*time.Millisecond, true)
				s.set(0, "idle")
				s.set(1, "busy")
			}
		}},
		{"the reader is starved in small pieces", func(s *sim) {
			s.set(1, "busy")
			for range 10 {
				s.set(1, "irqs-off") // seen from a reader that looks only twice in the second
				s.run(400*time.Millisecond, true)
				s.run(50 * time.Millisecond)
				s.set(1, "busy")
				s.run(100 * time.Millisecond)
			}
		}},
		{"CPUs that an overloaded hypervisor takes away", func(s *sim) {
			s.set(0, "busy")
			s.set(1, "busy")
			for _, d := range []time.Duration{300, 900, 500, 1200, 2000} {
				s.run(time.Second)
				s.set(1, "irqs-off")
				s.run(d * time.Millisecond)
				s.set(1, "busy")
			}
		}},
		{"a CPU whose ticks have not begun", func(s *sim) {
			s.cpus[1].c.TimerIRQs = 0
			s.set(0, "busy")
			s.set(1, "irqs-off")
			s.run(10 * time.Second)
		}},
		{"a host that boots", func(s *sim) {
			s.host, s.hb.Mono = time.Second, int64(time.Second)
			s.set(0, "busy")
			s.run(time.Second)
			s.set(1, "irqs-off")
			s.run(5 * time.Second)
		}},
		{"an offline CPU", func(s *sim) { s.cpus[1].c.Online = false; s.set(1, "irqs-off"); s.run(10 * time.Second) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSim("idle", "idle")
			s.run(time.Second)
			tt.do(s)
			for _, d := range []Detector{cpuStall(c), hostSilent(c)} {
				if sus, ver, f := firstVerdict(t, d, s, 0); ver >= 0 {
					t.Errorf("%s fires after %v (suspects after %v): %+v", d.ID, ver, sus, f)
				}
			}
		})
	}
}

func TestTicklessHost(t *testing.T) {
	s := newSim("idle", "busy")
	s.run(2 * time.Second)
	from := len(s.out)
	for range 10 { // no ticks, but the scheduler looks in once a second
		s.set(1, "irqs-off")
		s.run(time.Second)
		s.cpus[1].c.Clock = uint64(s.host)
	}
	d := cpuStall(DefaultConfig())
	for i := from; i < len(s.out); i++ {
		if fs, err := d.Detect(context.Background(), &Pass{Now: s.out[i].At, Beats: s.out[:i+1], Tickless: true}); err != nil || len(fs) > 0 {
			t.Fatalf("fires on a nohz_full CPU: %v %v", fs, err)
		}
	}
	s.run(4 * time.Second)
	if fs := detect(t, d, &Pass{Now: s.now, Beats: s.out, Tickless: true}); len(fs) != 1 || fs[0].Suspicion {
		t.Errorf("a nohz_full CPU that is really locked: %+v; want a verdict", fs)
	}
}

func TestHostSilentFires(t *testing.T) {
	c := DefaultConfig()
	for _, tt := range []struct {
		name   string
		before []string
		mode   string
	}{
		{"frozen while idle", []string{"idle", "idle"}, "frozen"},
		{"frozen while busy", []string{"busy", "idle"}, "frozen"},
		{"all locked", []string{"busy", "busy"}, "irqs-off"},
	} {
		s := newSim(tt.before...)
		s.run(10 * time.Second)
		for i := range s.cpus {
			s.set(i, tt.mode)
		}
		from := len(s.out)
		s.run(12 * time.Second)
		_, ver, f := firstVerdict(t, hostSilent(c), s, from)
		if ver < 4*time.Second || ver > 6*time.Second || f.Kind != KindHostSilent {
			t.Errorf("%s: verdict after %v: %+v; want one at 5 s", tt.name, ver, f)
		}
	}
}

func TestHostSilentPath(t *testing.T) {
	d := hostSilent(DefaultConfig())
	now := time.Unix(1_800_000_000, 0)
	p := &Pass{Now: now, Path: "link to host memory is down", PathDown: now.Add(-2 * time.Second)}
	if fs, err := d.Detect(context.Background(), p); len(fs) > 0 || err == nil {
		t.Errorf("2 s without a path: %v, %v; want \"could not tell\"", fs, err)
	}
	p.PathDown = now.Add(-6 * time.Second)
	fs := detect(t, d, p)
	if len(fs) != 1 || fs[0].Confidence > 0.7 || !strings.Contains(fs[0].Title, "out of reach") {
		t.Errorf("6 s without a path: %+v", fs)
	}
}

func TestTooEarly(t *testing.T) {
	s := newSim("idle")
	s.run(100 * time.Millisecond)
	for _, d := range []Detector{cpuStall(DefaultConfig()), hostSilent(DefaultConfig())} {
		if fs, err := d.Detect(context.Background(), s.pass()); !errors.Is(err, ErrTooEarly) || fs != nil {
			t.Errorf("%s after 100 ms = %v, %v; want ErrTooEarly", d.ID, fs, err)
		}
	}
}

func TestPanic(t *testing.T) {
	d := panicDetector(DefaultConfig())
	if fs := detect(t, d, &Pass{Panic: &kernel.PanicState{CPU: -1, Oops: true, Tainted: 0x80}}); fs != nil {
		t.Errorf("an oops alone: %+v; want nothing", fs)
	}
	fs := detect(t, d, &Pass{Panic: &kernel.PanicState{Panicked: true, CPU: 0, Message: "Kernel panic - not syncing: sysrq triggered crash",
		Task: &kernel.Task{PID: 312, TGID: 312, Comm: "sh", UID: 0}}})
	if len(fs) != 1 || fs[0].Culprit.CPU == nil || *fs[0].Culprit.CPU != 0 || fs[0].Culprit.PID != 312 || fs[0].Title != "Kernel panic - not syncing: sysrq triggered crash" {
		t.Errorf("panic = %+v", fs)
	}
}

// load is a series of task lists: each task uses its share of a CPU.
func load(d, every time.Duration, tasks ...loadTask) []TaskSample {
	var out []TaskSample
	t0 := time.Unix(1_800_000_000, 0)
	run := make([]time.Duration, len(tasks))
	for at := time.Duration(0); at <= d; at += every {
		s := TaskSample{At: t0.Add(at), Took: 2 * time.Millisecond}
		for i, lt := range tasks {
			if at < lt.from {
				continue
			}
			// The scheduler brings it up to date at ticks only.
			run[i] += time.Duration(lt.share(at) * float64(every))
			k := lt.Task
			k.Runtime = run[i] / (4 * time.Millisecond) * (4 * time.Millisecond)
			s.Tasks = append(s.Tasks, k)
		}
		out = append(out, s)
	}
	return out
}

type loadTask struct {
	kernel.Task
	from  time.Duration
	share func(time.Duration) float64
}

func always(f float64) func(time.Duration) float64 {
	return func(time.Duration) float64 { return f }
}

func TestRunaway(t *testing.T) {
	c := DefaultConfig()
	c.RunawayFor = 3 * time.Second
	c.RunawayExempt = []UIDRange{{500, 599}}
	user := func(pid int, uid uint32) kernel.Task {
		return kernel.Task{PID: pid, TGID: pid, Comm: "spin", UID: uid, Start: time.Duration(pid) * time.Second, Confident: true, OnCPU: true, CPU: 1}
	}
	thread := user(801, 1000)
	thread.TGID = 800
	kthread := user(30, 0)
	kthread.KThread = true
	for _, tt := range []struct {
		name  string
		tasks []loadTask
		want  []int // culprit TGIDs
	}{
		{"one spins", []loadTask{{user(412, 1000), 0, always(1)}, {user(413, 1000), 0, always(0.1)}}, []int{412}},
		{"95 %", []loadTask{{user(412, 1000), 0, always(0.95)}}, []int{412}},
		{"85 %", []loadTask{{user(412, 1000), 0, always(0.85)}}, nil},
		{"root spins", []loadTask{{user(412, 0), 0, always(1)}}, []int{412}},
		{"an exempt user", []loadTask{{user(412, 550), 0, always(1)}}, nil},
		{"a kernel thread", []loadTask{{kthread, 0, always(1)}}, nil},
		{"init", []loadTask{{user(1, 0), 0, always(1)}}, nil},
		{"a thread, not the leader", []loadTask{{user(800, 1000), 0, always(0)}, {thread, 0, always(1)}}, []int{800}},
		{"younger than the window", []loadTask{{user(412, 1000), 8 * time.Second, always(1)}}, nil},
		{"just old enough", []loadTask{{user(412, 1000), 6 * time.Second, always(1)}}, []int{412}},
		{"a burst that is over", []loadTask{{user(412, 1000), 0, func(at time.Duration) float64 {
			if at < 9500*time.Millisecond {
				return 1
			}
			return 0
		}}}, nil},
		{"bursts of 2 s", []loadTask{{user(412, 1000), 0, func(at time.Duration) float64 {
			if int(at.Seconds())%4 < 2 {
				return 1
			}
			return 0
		}}}, nil},
		{"two processes", []loadTask{{user(412, 1000), 0, always(1)}, {user(99, 1001), 0, always(1)}}, []int{99, 412}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ts := load(10*time.Second, c.Tasks, tt.tasks...)
			fs := detect(t, runawayProcess(c), &Pass{Now: ts[len(ts)-1].At, Tasks: ts})
			var got []int
			for _, f := range fs {
				got = append(got, f.Culprit.TGID)
				if f.Confidence < 0.9 || f.Culprit.UID == nil {
					t.Errorf("finding = %+v", f)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("culprits = %v; want %v", got, tt.want)
			}
		})
	}
}

func TestRunawayPIDReuse(t *testing.T) {
	c := DefaultConfig()
	c.RunawayFor = 3 * time.Second
	a := kernel.Task{PID: 412, TGID: 412, Start: time.Second, Comm: "a", Runtime: time.Hour}
	b := a
	b.Start, b.Runtime = 2*time.Second, time.Hour+3*time.Second
	t0 := time.Unix(0, 0)
	ts := []TaskSample{{At: t0, Tasks: []kernel.Task{a}}, {At: t0.Add(2 * time.Second), Tasks: []kernel.Task{b}}, {At: t0.Add(3 * time.Second), Tasks: []kernel.Task{b}}}
	if fs := detect(t, runawayProcess(c), &Pass{Tasks: ts}); fs != nil {
		t.Errorf("another process under the same PID is accused: %+v", fs)
	}
	// A runtime that cannot be is "could not tell", not a fault.
	b.Start, b.Runtime = time.Second, time.Hour+time.Minute
	ts[1].Tasks[0], ts[2].Tasks[0] = a, b
	if fs, err := runawayProcess(c).Detect(context.Background(), &Pass{Tasks: ts}); fs != nil || err == nil {
		t.Errorf("a minute of runtime in three seconds = %+v, %v; want an error", fs, err)
	}
}

func TestConfigCheck(t *testing.T) {
	if err := DefaultConfig().Check(); err != nil {
		t.Error(err)
	}
	for _, f := range []func(*Config){
		func(c *Config) { c.Heartbeat = 0 },
		func(c *Config) { c.StallVerdict = c.StallSuspect / 2 },
		func(c *Config) { c.RunawayShare = 1.5 },
		func(c *Config) { c.RunawayShare = 0 },
		func(c *Config) { c.RunawayFor = 48 * time.Hour },
		func(c *Config) { c.RunawayExempt = []UIDRange{{2, 1}} },
	} {
		c := DefaultConfig()
		f(&c)
		if c.Check() == nil {
			t.Errorf("Check accepts %+v", c)
		}
	}
}

// A series is data: what was stored as JSON is judged alike.
func TestPassJSON(t *testing.T) {
	s := newSim("idle", "busy")
	s.run(2 * time.Second)
	s.set(1, "irqs-off")
	s.run(2 * time.Second)
	b, err := json.Marshal(s.pass())
	if err != nil {
		t.Fatal(err)
	}
	var p Pass
	if err := json.Unmarshal(b, &p); err != nil {
		t.Fatal(err)
	}
	if fs := detect(t, cpuStall(DefaultConfig()), &p); len(fs) != 1 || fs[0].Suspicion {
		t.Errorf("replayed: %+v; want a verdict", fs)
	}
}
