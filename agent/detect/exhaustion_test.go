package detect

import (
	"maps"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// town is a host made of tasks, whose samples are taken at a steady pace.
type town struct {
	now   time.Time
	up    time.Duration
	next  int
	tasks []kernel.Task
	use   kernel.Usage
	pass  Pass

	mapped map[int]uint64
}

func newTown() *town {
	w := &town{now: time.Unix(1_800_000_000, 0), up: time.Hour, next: 100}
	w.use = kernel.Usage{Forks: 5000, MaxThreads: 8000, MaxPIDs: 32768, Total: 1 << 30, Free: 700 << 20, Available: 800 << 20, Files: 500, MaxFiles: 50000, Slab: 30 << 20}
	w.tasks = []kernel.Task{{PID: 1, TGID: 1, Comm: "init"}, {PID: 2, TGID: 2, Comm: "kthreadd", KThread: true}}
	w.start(1, 1000, "sh", 0) // PID 100, old
	w.run(5*time.Second, nil)
	return w
}

// start adds a task of a parent, started now, and returns its PID; in thread it is a further thread of that process.
func (w *town) start(ppid int, uid uint32, comm string, thread int) int {
	pid := w.next
	w.next++
	w.use.Forks++
	t := kernel.Task{PID: pid, TGID: pid, PPID: ppid, UID: uid, Comm: comm, Start: w.up, State: "S"}
	if thread != 0 {
		t.TGID = thread
	}
	w.tasks = append(w.tasks, t)
	return pid
}

func (w *town) task(pid int) *kernel.Task {
	for i := range w.tasks {
		if w.tasks[i].PID == pid {
			return &w.tasks[i]
		}
	}
	return nil
}

// run lets time pass; each step calls f.
func (w *town) run(d time.Duration, f func()) {
	const step = 50 * time.Millisecond
	for range int(d / step) {
		w.now, w.up = w.now.Add(step), w.up+step
		if f != nil {
			f()
		}
		w.use.At, w.use.Threads, w.use.PIDs = w.now, len(w.tasks), len(w.tasks)
		w.pass.Now = w.now
		w.pass.Usage = append(w.pass.Usage, w.use)
		w.pass.Beats = append(w.pass.Beats, kernel.Heartbeat{At: w.now, Mono: int64(w.up), CPUs: make([]kernel.CPU, 2)})
		if len(w.pass.Usage)%4 == 0 || DefaultConfig().Hurry(w.pass.Usage, w.pass.Tasks) {
			w.pass.Tasks = append(w.pass.Tasks, TaskSample{At: w.now, Tasks: append([]kernel.Task(nil), w.tasks...), Mapped: maps.Clone(w.mapped)})
		}
	}
}

// first runs f until a detector has a verdict, for at most d, and returns it with how long that took.
func (w *town) first(t *testing.T, det Detector, d time.Duration, f func()) (*Finding, time.Duration) {
	t.Helper()
	for took := time.Duration(0); took < d; took += 50 * time.Millisecond {
		w.run(50*time.Millisecond, f)
		for _, x := range detect(t, det, &w.pass) {
			if !x.Suspicion {
				return &x, took + 50*time.Millisecond
			}
		}
	}
	return nil, d
}

func TestForkBomb(t *testing.T) {
	c := DefaultConfig()
	for _, tt := range []struct {
		name string
		fire bool
		root func(w *town) int // PID of the culprit; 0: any
		bomb func(w *town) func()
	}{
		{"doubling", true, nil, func(w *town) func() {
			head := w.start(100, 1000, "bomb", 0)
			all := []int{head}
			return func() {
				for _, p := range all[:min(len(all), 60)] {
					all = append(all, w.start(p, 1000, "bomb", 0))
				}
			}
		}},
		{"one parent", true, func(*town) int { return 100 }, func(w *town) func() {
			return func() {
				for range 30 {
					w.start(100, 1000, "x", 0)
				}
			}
		}},
		{"orphans", true, nil, func(w *town) func() {
			return func() {
				for range 30 {
					w.start(1, 1000, "x", 0)
				}
			}
		}},
		{"of root", true, nil, func(w *town) func() {
			head := w.start(1, 0, "bomb", 0)
			return func() {
				for range 30 {
					w.start(head, 0, "bomb", 0)
				}
			}
		}},
		{"a build: fast, but all ends", false, nil, func(w *town) func() {
			var old []int
			return func() {
				for _, p := range old {
					w.task(p).State = "X"
				}
				kept := w.tasks[:0]
				for _, k := range w.tasks {
					if k.State != "X" {
						kept = append(kept, k)
					}
				}
				w.tasks, old = kept, nil
				for range 60 {
					old = append(old, w.start(100, 1000, "cc1", 0))
				}
			}
		}},
		{"a server with 300 threads starts", false, nil, func(w *town) func() {
			srv, n := w.start(1, 27, "server", 0), 0
			return func() {
				for range 30 {
					if n++; n < 300 {
						w.start(1, 27, "server", srv)
					}
				}
			}
		}},
		{"a build of 100 jobs starts", false, nil, func(w *town) func() {
			n := 0
			return func() {
				for range 20 {
					if n++; n < 100 {
						w.start(100, 1000, "make", 0)
					}
				}
			}
		}},
		{"many users, each a few", false, nil, func(w *town) func() {
			n := 0
			return func() {
				for range 30 {
					n++
					w.start(1, uint32(2000+n%40), "login", 0)
				}
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newTown()
			f, took := w.first(t, forkBomb(c), 3*time.Second, tt.bomb(w))
			if (f != nil) != tt.fire {
				t.Fatalf("verdict %+v; want one: %v", f, tt.fire)
			}
			if f == nil {
				return
			}
			if took > time.Second || f.Culprit.Tree < c.BombGrowth/2 || f.Culprit.UID == nil || f.Culprit.PID == 0 {
				t.Errorf("after %v: %+v", took, f)
			}
			if tt.root != nil && f.Culprit.PID != tt.root(w) {
				t.Errorf("culprit is PID %d; want %d", f.Culprit.PID, tt.root(w))
			}
			for _, k := range Offspring(w.tasks, f.Culprit.Since, *f.Culprit.UID) {
				if k.TGID == 1 || k.KThread || k.UID != *f.Culprit.UID {
					t.Errorf("the tree holds %+v", k)
				}
			}
		})
	}
}

// What a user has started before, and what others start meanwhile, is no part of a bomb's tree.
func TestOffspring(t *testing.T) {
	w := newTown()
	other := w.start(1, 1000, "editor", 0)
	began := w.up + time.Second
	w.run(2*time.Second, nil)
	head := w.start(100, 1000, "bomb", 0)
	innocent := w.start(other, 1000, "spell", 0)
	service := w.start(1, 1000, "service", 0)
	stranger := w.start(head, 1001, "setuid", 0)
	var last int
	for range 20 {
		last = w.start(head, 1000, "bomb", 0)
	}
	orphan := w.start(1, 1000, "bomb", 0)
	got := map[int]bool{}
	tree := Offspring(w.tasks, began, 1000)
	for _, k := range tree {
		got[k.PID] = true
	}
	for pid, want := range map[int]bool{head: true, last: true, orphan: true, innocent: false, service: false, stranger: false, other: false, 100: false, 1: false} {
		if got[pid] != want {
			t.Errorf("PID %d (%s) is in the tree: %v", pid, w.task(pid).Comm, got[pid])
		}
	}
	if tree[0].Start < tree[len(tree)-1].Start {
		t.Error("the youngest is not first")
	}
	// A loop of parents, as a hostile host may show it, ends.
	w.task(head).PPID = last
	Offspring(w.tasks, began, 1000)
}

func TestMemoryHog(t *testing.T) {
	c := DefaultConfig()
	const mib = 1 << 20
	for _, tt := range []struct {
		name string
		fire bool
		do   func(w *town) func()
	}{
		{"asks for more and more", true, func(w *town) func() {
			p := w.start(100, 1000, "hog", 0)
			return func() {
				if w.task(p).RSS < 250*mib { // it is to be found before
					w.use.Available -= 25 * mib
					w.task(p).RSS += 25 * mib
					w.mapped = map[int]uint64{p: w.task(p).RSS + 8*mib}
				}
			}
		}},
		{"asks at once for more than there is", true, func(w *town) func() {
			p := w.start(100, 1000, "hog", 0)
			w.mapped = map[int]uint64{p: 4096 * mib}
			return func() {
				if w.task(p).RSS < 250*mib {
					w.use.Available -= 25 * mib
					w.task(p).RSS += 25 * mib
				}
			}
		}},
		{"a database that takes at its start what it has asked for", false, func(w *town) func() {
			p := w.start(100, 27, "base", 0)
			w.mapped = map[int]uint64{p: 610 * mib}
			return func() {
				if w.task(p).RSS < 600*mib {
					w.use.Available -= 25 * mib
					w.task(p).RSS += 25 * mib
				}
			}
		}},
		{"compilers, one after the other", false, func(w *town) func() {
			var p int
			return func() {
				switch {
				case p == 0:
					p = w.start(100, 1000, "cc1plus", 0)
				case w.task(p).RSS >= 150*mib:
					w.use.Available += w.task(p).RSS
					w.task(p).RSS = 0
					w.tasks = w.tasks[:len(w.tasks)-1]
					p, w.mapped = 0, nil
				default:
					w.use.Available -= 25 * mib
					w.task(p).RSS += 25 * mib
					w.mapped = map[int]uint64{p: w.task(p).RSS + 2*mib}
				}
			}
		}},
		{"a compiler, when a database beside it has just taken its memory", false, func(w *town) func() {
			db, p := w.start(100, 27, "base", 0), w.start(100, 1000, "cc1plus", 0)
			w.task(p).RSS = 80 * mib
			w.use.Available -= 80 * mib
			return func() {
				take := func(pid int, n uint64) {
					w.use.Available -= n
					w.task(pid).RSS += n
				}
				if w.task(db).RSS < 360*mib {
					take(db, 30*mib)
				} else if w.task(p).RSS < 110*mib {
					take(p, 5*mib)
				}
				w.mapped = map[int]uint64{db: 360 * mib, p: w.task(p).RSS + 2*mib}
			}
		}},
		{"fast", true, func(w *town) func() {
			p := w.start(100, 1000, "hog", 0)
			return func() {
				if w.use.Available > 30*mib {
					w.use.Available -= 25 * mib
					w.task(p).RSS += 25 * mib
				}
			}
		}},
		{"slow, at the end", true, func(w *town) func() {
			w.use.Available = 120 * mib
			p := w.start(100, 1000, "hog", 0)
			w.task(p).RSS = 500 * mib
			return func() {
				if w.use.Available > 20*mib {
					w.use.Available -= 2 * mib
					w.task(p).RSS += 2 * mib
				}
			}
		}},
		{"a cache that fills half of it and stops", false, func(w *town) func() {
			p := w.start(100, 27, "cache", 0)
			return func() {
				if w.use.Available > 530*mib {
					w.use.Available -= 10 * mib
					w.task(p).RSS += 10 * mib
				}
			}
		}},
		{"tight, but at rest", false, func(w *town) func() {
			w.use.Available = 40 * mib
			p := w.start(100, 27, "base", 0)
			w.task(p).RSS = 700 * mib
			w.run(5*time.Second, nil)
			return nil
		}},
		{"the kernel itself takes it", false, func(w *town) func() {
			return func() {
				if w.use.Available > 300*mib {
					w.use.Available -= 25 * mib
				}
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newTown()
			f, took := w.first(t, memoryHog(c), 5*time.Second, tt.do(w))
			if (f != nil) != tt.fire {
				t.Fatalf("verdict after %v: %+v; want one: %v", took, f, tt.fire)
			}
			if f != nil && (f.Culprit.Comm != "hog" || f.Confidence < 0.9) {
				t.Errorf("finding %+v", f)
			}
		})
	}
}

func TestExhaustion(t *testing.T) {
	c := DefaultConfig()
	w := newTown()
	if f, _ := w.first(t, exhaustion(c), 40*time.Second, nil); f != nil {
		t.Fatalf("a host at rest: %+v", f)
	}
	// 5 files each 50 ms: 49,500 in 495 s.
	f, took := w.first(t, exhaustion(c), 3*time.Minute, func() { w.use.Files += 5 })
	if f == nil || f.Key != "files" || took < 40*time.Second {
		t.Fatalf("a leak of files after %v: %+v", took, f)
	}
	w = newTown()
	w.use.MaxFiles = 510
	if f, _ := w.first(t, exhaustion(c), time.Second, nil); f == nil || f.Key != "files" || f.Confidence < 0.9 {
		t.Errorf("500 of 510 files: %+v", f)
	}
	// A start of something that comes to rest is no leak.
	w = newTown()
	n := 0
	if f, _ := w.first(t, exhaustion(c), 2*time.Minute, func() {
		if n++; n < 200 {
			w.use.Slab += 1 << 20
		}
	}); f != nil {
		t.Errorf("slab that grows for 10 s: %+v", f)
	}
	// Nor is it, where there has been some growth all the time.
	w = newTown()
	n = 0
	if f, _ := w.first(t, exhaustion(c), 3*time.Minute, func() {
		if n++; n%20 == 0 {
			w.use.Files++
		}
		if n > 1700 && n < 1720 {
			w.use.Files += 500
		}
	}); f != nil {
		t.Errorf("files that grow by a sixth in a second: %+v", f)
	}
}
