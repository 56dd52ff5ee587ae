package detect

import (
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// jams makes a row of samples, one each two seconds, of what f says of each.
func jams(n int, f func(i int, s *JamSample)) *Pass {
	p := &Pass{}
	t0 := time.Unix(1_800_000_000, 0)
	for i := range n {
		s := JamSample{At: t0.Add(time.Duration(i) * jamsEvery)}
		f(i, &s)
		p.Jams = append(p.Jams, s)
		p.Now = s.At
	}
	return p
}

func TestStuckWork(t *testing.T) {
	pool := func(i int, wait time.Duration, first kernel.VirtAddr) kernel.WorkerPool {
		return kernel.WorkerPool{ID: 4, CPU: 1, Workers: 3, Idle: 2, Waiting: wait, Pending: []kernel.Work{{Addr: first, Function: "vmstat_update", Queue: "mm_percpu_wq"}},
			Running: []kernel.Working{{Work: kernel.Work{Function: "hog [bdfault]"}, PID: 40, Comm: "kworker/1:2"}}}
	}
	for _, tt := range []struct {
		name string
		f    func(i int, s *JamSample)
		want int
	}{
		{"nothing waits", func(int, *JamSample) {}, 0},
		{"the same waits for long", func(i int, s *JamSample) {
			s.Pools = []kernel.WorkerPool{pool(i, time.Duration(i)*2*time.Second, 0x1000)}
		}, 1},
		{"it waits for a while", func(i int, s *JamSample) {
			s.Pools = []kernel.WorkerPool{pool(i, time.Duration(i)*time.Second/2, 0x1000)}
		}, 0},
		{"much to do, and it is done", func(i int, s *JamSample) {
			s.Pools = []kernel.WorkerPool{pool(i, time.Minute, kernel.VirtAddr(0x1000*i))}
		}, 0},
		{"another pool", func(i int, s *JamSample) {
			p := pool(i, time.Minute, 0x1000)
			p.ID = i
			s.Pools = []kernel.WorkerPool{p}
		}, 0},
	} {
		fs := detect(t, stuckWork(DefaultConfig()), jams(20, tt.f))
		if verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
		if tt.want == 1 && (fs[0].Culprit.PID != 40 || !strings.Contains(fs[0].Title, "hog [bdfault]")) {
			t.Errorf("%s: %+v", tt.name, fs[0])
		}
	}
}

func TestStuckIO(t *testing.T) {
	disk := func(age time.Duration, sector uint64) []kernel.Disk {
		return []kernel.Disk{{Name: "sda", Dev: "8:0", InFlight: []kernel.Request{{Addr: 0x1000, Op: "write", Sector: sector, Bytes: 4096, Age: age}, {Addr: 0x2000, Op: "read", Sector: 9, Bytes: 4096, Age: time.Millisecond}}}}
	}
	for _, tt := range []struct {
		name string
		f    func(i int, s *JamSample)
		want int
	}{
		{"idle", func(int, *JamSample) {}, 0},
		{"one stands", func(i int, s *JamSample) { s.Disks = disk(time.Duration(i)*2*time.Second, 7) }, 1},
		{"always under load", func(i int, s *JamSample) { s.Disks = disk(300*time.Millisecond, uint64(i)) }, 0},
		{"a slow one, and then the next at the same place", func(i int, s *JamSample) { s.Disks = disk(time.Duration(i%8)*2*time.Second, 7) }, 0},
		{"one comes to its end", func(i int, s *JamSample) {
			if i < 18 {
				s.Disks = disk(time.Duration(i)*2*time.Second, 7)
			}
		}, 0},
	} {
		if fs := detect(t, stuckIO(DefaultConfig()), jams(20, tt.f)); verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
	}
}

func TestThrashing(t *testing.T) {
	for _, tt := range []struct {
		name         string
		avg10, avg60 float64
		want         int
	}{{"none", 0, 0, 0}, {"some", 15, 12, 0}, {"a peak", 80, 8, 0}, {"for long", 75, 45, 1}, {"it is over", 5, 45, 0}} {
		p := jams(3, func(_ int, s *JamSample) {
			s.Pressure = &kernel.Pressure{Memory: kernel.Stall{Full: kernel.StallTime{Avg10: tt.avg10, Avg60: tt.avg60}}}
		})
		if fs := detect(t, thrashing(DefaultConfig()), p); verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
	}
}

// Who waits for what his control group is not to have is no sign of a host that lacks memory.
func TestThrashingOfAGroup(t *testing.T) {
	for _, tt := range []struct {
		available uint64
		want      Severity
	}{{5 << 20, Critical}, {25 << 20, Critical}, {80 << 20, Warning}} {
		p := jams(3, func(_ int, s *JamSample) {
			s.Pressure = &kernel.Pressure{Memory: kernel.Stall{Full: kernel.StallTime{Avg10: 75, Avg60: 45}}}
		})
		p.Usage = []kernel.Usage{{Total: 100 << 20, Available: tt.available}}
		if fs := detect(t, thrashing(DefaultConfig()), p); len(fs) != 1 || fs[0].Severity != tt.want || strings.Contains(fs[0].Title, "group") != (tt.want == Warning) {
			t.Errorf("%d MiB of 100 are available: %+v; want %s", tt.available>>20, fs, tt.want)
		}
	}
}

func TestTainted(t *testing.T) {
	for _, tt := range []struct {
		name string
		f    func(i int) uint64
		want []Kind
	}{
		{"clean", func(int) uint64 { return 0 }, nil},
		{"modules out of the tree", func(i int) uint64 { return []uint64{0, 1 << 12, 1<<12 | 1<<13}[i] }, nil},
		{"warned long ago", func(int) uint64 { return taintWarn }, nil},
		{"warns", func(i int) uint64 { return []uint64{0, 0, taintWarn}[i] }, []Kind{KindKernelWarning}},
		{"a broken page, and a warning", func(i int) uint64 { return []uint64{0, taintBadPage, taintBadPage | taintWarn}[i] }, []Kind{KindKernelWarning, KindKernelWarning}},
		{"a machine check long ago", func(int) uint64 { return taintMachineCheck }, []Kind{KindHardware}},
	} {
		fs := detect(t, tainted(DefaultConfig()), jams(3, func(i int, s *JamSample) { s.Taint = tt.f(i) }))
		if len(fs) != len(tt.want) {
			t.Errorf("%s: %+v; want %v", tt.name, fs, tt.want)
			continue
		}
		for i := range fs {
			if fs[i].Kind != tt.want[i] {
				t.Errorf("%s: %+v; want %v", tt.name, fs[i], tt.want)
			}
		}
	}
}

func TestClock(t *testing.T) {
	c := DefaultConfig()
	pass := func(mono func(i int) time.Duration, jiffies func(i int) int) *Pass {
		p := &Pass{}
		for i := range 200 {
			p.Now = time.Unix(1_800_000_000, 0).Add(time.Duration(i) * 50 * time.Millisecond)
			p.Beats = append(p.Beats, kernel.Heartbeat{At: p.Now, Mono: int64(time.Hour + mono(i)), Jiffies: uint64(1e6 + jiffies(i)), CPUs: make([]kernel.CPU, 1)})
		}
		return p
	}
	even := func(i int) time.Duration { return time.Duration(i) * 50 * time.Millisecond }
	ticks := func(i int) int { return i * 12 }
	for _, tt := range []struct {
		name    string
		mono    func(i int) time.Duration
		jiffies func(i int) int
		want    int
	}{
		{"right", even, ticks, 0},
		{"idle: neither moves", func(int) time.Duration { return 0 }, func(int) int { return 0 }, 0},
		{"idle: it catches up", func(i int) time.Duration { return even(i / 80 * 80) }, func(i int) int { return ticks(i / 80 * 80) }, 0},
		{"stands while it ticks", func(int) time.Duration { return 0 }, ticks, 1},
		{"stands for a moment", func(i int) time.Duration { return even(min(i, 170)) }, ticks, 0},
		{"a machine that was held", func(i int) time.Duration { return even(i) / 3 }, func(i int) int { return ticks(i) / 3 }, 0},
		{"a machine that was held, and catches up", func(i int) time.Duration {
			if i >= 40 && i < 180 {
				return even(40)
			}
			return even(i) + time.Duration(i/180)*time.Minute
		}, ticks, 0},
		{"jumps", func(i int) time.Duration { return even(i) + time.Duration(i/150)*time.Minute }, ticks, 1},
	} {
		if fs := detect(t, clock(c), pass(tt.mono, tt.jiffies)); verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
	}
}

func TestClockBack(t *testing.T) {
	c := DefaultConfig()
	at := func(i int) time.Duration { return time.Duration(i) * 50 * time.Millisecond }
	for _, tt := range []struct {
		name string
		show func(i int) int // the moment that is seen at the moment i
		tick func(i int) int // the same for the ticks, if it is another
		gap  time.Duration   // at the moment 100 nobody could look for so long
		want int
	}{
		{"right", func(i int) int { return i }, nil, 0, 0},
		{"a recording from 4 s ago, which stands", func(i int) int { return map[bool]int{true: 20, false: i}[i >= 100] }, nil, 0, 1},
		{"the same, and it took a while to put it there", func(i int) int { return map[bool]int{true: 20, false: i}[i >= 100] }, nil, 5 * time.Second, 1},
		{"a recording from 4 s ago, which goes on", func(i int) int { return i - i/100*80 }, nil, 0, 1},
		{"only now", func(i int) int { return map[bool]int{true: 20, false: i}[i >= 180] }, nil, 0, 0},
		{"for a moment", func(i int) int { return map[bool]int{true: 20, false: i}[i >= 100 && i < 110] }, nil, 0, 0},
		{"a little", func(i int) int { return i - i/100*10 }, nil, 0, 0},
		{"another kernel starts there", func(i int) int { return i - i/100*100 }, func(i int) int { return i - i/100*10000 }, 0, 0},
		{"the kernel starts anew in the same place", func(i int) int { return i - i/100*(100+72000) }, nil, 0, 0}, // 72000 are an hour
		{"the ticks go on", func(i int) int { return i - i/100*80 }, func(i int) int { return i }, 0, 0},
		{"it stands", func(int) int { return 0 }, nil, 0, 0},
		{"nobody looked for a while", func(i int) int { return i }, nil, 5 * time.Second, 0},
	} {
		p := &Pass{}
		for i := range 200 {
			p.Now = time.Unix(1_800_000_000, 0).Add(at(i) + time.Duration(i/100)*tt.gap)
			ticks := tt.show(i)
			if tt.tick != nil {
				ticks = tt.tick(i)
			}
			p.Beats = append(p.Beats, kernel.Heartbeat{At: p.Now, Mono: int64(time.Hour + at(tt.show(i))), Jiffies: uint64(1e6 + 12*ticks), CPUs: make([]kernel.CPU, 1)})
		}
		if fs := detect(t, clockBack(c), p); verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
		p.Beats = p.Beats[99:] // it took so long that one beat is left of before
		if fs := detect(t, clockBack(c), p); verdicts(fs) != tt.want {
			t.Errorf("%s, of which little is left: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
	}
}

// What only rises beside the clock is looked at by itself.
func TestCountsBack(t *testing.T) {
	for _, tt := range []struct {
		name       string
		log, forks func(i int) uint64 // at the look i of 20, 2 s apart, and at each of the 20 in between
		up         time.Duration      // at the first
		want       string
	}{
		{"they rise", func(i int) uint64 { return uint64(100 + i) }, func(i int) uint64 { return uint64(5000 + i) }, time.Hour, ""},
		{"they stand", func(int) uint64 { return 100 }, func(int) uint64 { return 5000 }, time.Hour, ""},
		{"the log is not known", func(int) uint64 { return 0 }, func(int) uint64 { return 5000 }, time.Hour, ""},
		{"the log goes back", func(i int) uint64 { return uint64(100 + i - i/10*50) }, func(int) uint64 { return 5000 }, time.Hour, "log-back"},
		{"the log goes back only now", func(i int) uint64 { return uint64(100 + i - i/19*50) }, func(int) uint64 { return 5000 }, time.Hour, ""},
		{"the newest record is being added to", func(i int) uint64 { return 100 - uint64(i/18) }, func(int) uint64 { return 5000 }, time.Hour, ""},
		{"the processes go back", func(int) uint64 { return 100 }, func(i int) uint64 { return uint64(5000 + i - i/200*300) }, time.Hour, "forks-back"},
		{"the processes go back just now", func(int) uint64 { return 100 }, func(i int) uint64 { return uint64(5000 + i - i/395*100) }, time.Hour, ""},
		{"the host was started anew", func(i int) uint64 { return uint64(100 + i - i/10*50) }, func(i int) uint64 { return uint64(5000 + i - i/200*300) }, -20 * time.Second, ""},
	} {
		p := jams(20, func(i int, s *JamSample) { s.Newest = tt.log(i) })
		for i := range 400 {
			p.Usage = append(p.Usage, kernel.Usage{At: p.Jams[0].At.Add(time.Duration(i) * 100 * time.Millisecond), Forks: tt.forks(i)})
		}
		up := tt.up + p.Now.Sub(p.Jams[0].At)
		for i := range 2 {
			p.Beats = append(p.Beats, kernel.Heartbeat{At: p.Now, Mono: int64(up) + int64(i)})
		}
		got := ""
		for _, f := range detect(t, clockBack(DefaultConfig()), p) {
			got += f.Key
		}
		if got != tt.want {
			t.Errorf("%s: %q; want %q", tt.name, got, tt.want)
		}
	}
}

func TestBootStuck(t *testing.T) {
	d := bootStuck(DefaultConfig())
	for _, tt := range []struct {
		name     string
		starting bool
		up       time.Duration
		want     int
	}{{"up for long", false, time.Hour, 0}, {"starts", true, 20 * time.Second, 0}, {"does not come to init", true, 6 * time.Minute, 1}} {
		p := jams(2, func(_ int, s *JamSample) { s.Starting = tt.starting })
		p.Beats = []kernel.Heartbeat{{At: p.Now, Mono: int64(tt.up)}}
		if fs := detect(t, d, p); verdicts(fs) != tt.want {
			t.Errorf("%s: %+v; want %d verdicts", tt.name, fs, tt.want)
		}
	}
	now := time.Now()
	for ago, want := range map[time.Duration]int{time.Minute: 0, 10 * time.Minute: 1} {
		if fs := detect(t, d, &Pass{Now: now, NoKernel: now.Add(-ago), Path: "no kernel"}); verdicts(fs) != want {
			t.Errorf("no kernel for %v: %+v; want %d verdicts", ago, fs, want)
		}
	}
}

func TestExplainHung(t *testing.T) {
	task := func(pid int) kernel.LockTask { return kernel.LockTask{PID: pid, Comm: "x", State: "D"} }
	one, two := task(1), task(2)
	s := &lockState{locks: []kernel.Lock{
		{Kind: "mutex", Name: "a", Owner: &one, Waiters: []kernel.LockWaiter{{LockTask: two}}},
		{Kind: "mutex", Name: "b", Owner: &two, Waiters: []kernel.LockWaiter{{LockTask: one}, {LockTask: task(3)}}},
	}}
	s.circles = kernel.Deadlocks(s.locks)
	f, g := Finding{Culprit: Culprit{PID: 1}}, Finding{Culprit: Culprit{PID: 3}}
	s.explain(&f)
	s.explain(&g)
	if f.Culprit.Lock != "b" || f.Severity != Critical || !strings.Contains(f.Title, "deadlock") || !strings.Contains(f.Detail, "PID 2") {
		t.Errorf("in the deadlock: %+v", f)
	}
	if g.Culprit.Lock != "b" || g.Severity == Critical {
		t.Errorf("behind it: %+v", g)
	}
}
