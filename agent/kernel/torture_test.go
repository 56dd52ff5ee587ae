package kernel

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

var passesFlag = flag.Int("passes", 60, "`number` of passes of the torture of each guest")

// testTorture lists a host again and again that forks, execs, opens sockets, mounts, makes control groups and loads modules all the
// time. What is certain to be there must be in each answer; what never was must be in none; and no answer may call a sound host
// corrupt, its modules hidden, or its tasks deadlocked. No answer that is wrong may have high confidence; few may be wrong at all.
// That an answer could not be had is none that is wrong: these are counted.
//
//	go test ./agent/kernel -run 'TestListings$/./^torture$' -guests 6.1,6.12 -passes 10000 -timeout 4h
func testTorture(t *testing.T, g *guest, img *Image) {
	truth := newTruth(t, img)
	g.ask(nil, "spawn churn")
	torn, doubted, unsure, wrong := make(map[string]int), make(map[string]int), 0, 0
	levels := make(map[string]int)
	began := time.Now()
	forks := forkCount(t, g)
	for end := time.Now().Add(time.Minute); forkCount(t, g) == forks && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	for pass := range *passesFlag {
		v := img.View(t.Context())
		for _, q := range truth.questions() {
			before := v.Confidence()
			err := q.ask(v, &unsure)
			if errors.Is(err, ErrNotSupported) {
				if pass == 0 {
					t.Logf("%s: %v", q.name, err)
				}
				continue
			}
			if errors.Is(err, ErrTorn) {
				torn[q.name]++
				continue
			}
			sure := v.Confidence().Since(before)
			levels[sure.Level()]++
			if err != nil && sure.Level() != HighConfidence {
				doubted[q.name]++
				t.Logf("pass %d: %s: %v, and says itself: %v", pass, q.name, err, sure)
			} else if err != nil {
				wrong++
				t.Errorf("pass %d: %s: %v; %v", pass, q.name, err, sure)
			}
		}
		if wrong > 20 {
			t.Fatal("too many wrong answers")
		}
	}
	forked := forkCount(t, g) - forks
	t.Logf("%d passes in %v, meanwhile %d forks; answers by confidence %v; torn %v, wrong but doubted %v, %d tasks in doubt, %d answers wrong",
		*passesFlag, time.Since(began).Round(time.Millisecond), forked, levels, torn, doubted, unsure, wrong)
	if forked < uint64(*passesFlag)/20 {
		t.Errorf("%d forks: the host was hardly busy", forked)
	}
	if n := levels[HighConfidence]; n < *passesFlag {
		t.Errorf("%d answers with high confidence in %d passes: it says nothing", n, *passesFlag)
	}
	for name, n := range doubted {
		if n > *passesFlag/50+2 {
			t.Errorf("%s: %d of %d answers were wrong, if with doubt", name, n, *passesFlag)
		}
	}
	for name, n := range torn {
		if n > *passesFlag/4+2 {
			t.Errorf("%s: %d of %d answers could not be had", name, n, *passesFlag)
		}
	}
}

// forkCount returns how many processes and threads the guest says it has made: some kernels do not tell where they count.
func forkCount(t *testing.T, g *guest) (n uint64) {
	t.Helper()
	_, text, _ := strings.Cut(g.read("/proc/stat"), "\nprocesses ")
	if _, err := fmt.Sscan(text, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// truth is what does not change while the host is tortured.
type truth struct {
	tasks   map[int]Task // by PID
	modules []string
	sockets []string
	groups  []string
}

type question struct {
	name string
	ask  func(v *View, unsure *int) error
}

// newTruth looks at the guest before: of its tasks those that stay: those of the kernel, PID 1 and what it started before.
func newTruth(t *testing.T, img *Image) *truth {
	t.Helper()
	tr := &truth{tasks: make(map[int]Task)}
	v := img.View(t.Context())
	for _, x := range gather(t, v, v.Tasks()) {
		lasting := x.KThread && !strings.HasPrefix(x.Comm, "kworker") || strings.HasPrefix(x.Comm, "g-") && x.PID == x.TGID || strings.HasPrefix(x.Comm, "l-")
		if lasting && x.State != "Z" {
			tr.tasks[x.PID] = x
		}
	}
	for _, m := range gather(t, v, v.Modules()) {
		if m.Name != "dummy" {
			tr.modules = append(tr.modules, m.Name)
		}
	}
	for _, s := range gather(t, v, v.Sockets()) {
		if s.State == "LISTEN" || strings.HasPrefix(s.Protocol, "udp") {
			tr.sockets = append(tr.sockets, fmt.Sprint(s.Protocol, s.Local, s.Path, s.Inode))
		}
	}
	for _, c := range gather(t, v, v.Cgroups()) {
		tr.groups = append(tr.groups, c.Path)
	}
	if len(tr.tasks) < 25 || len(tr.modules) < 3 || len(tr.sockets) < 5 || len(tr.groups) < 5 {
		t.Fatalf("there is not much that lasts: %+v", tr)
	}
	return tr
}

// missing returns what of the truth is not among what was found.
func missing(truth, found []string) error {
	for _, s := range truth {
		if !slices.Contains(found, s) {
			return fmt.Errorf("%q is missing", s)
		}
	}
	return nil
}

func (tr *truth) questions() []question {
	return []question{
		{"tasks", func(v *View, unsure *int) error {
			left, doubts := len(tr.tasks), 0
			for x, err := range v.Tasks() {
				if err != nil {
					return err
				}
				if !x.Confident {
					*unsure++
					doubts++
					continue
				}
				want, ok := tr.tasks[x.PID]
				if !ok {
					continue
				}
				left--
				if x.Comm != want.Comm || x.Addr != want.Addr || x.PPID != want.PPID || x.UID != want.UID || x.Start != want.Start || x.Runtime < want.Runtime {
					return fmt.Errorf("%+v; want %+v", x, want)
				}
			}
			if left > doubts {
				return fmt.Errorf("%d tasks are missing", left)
			}
			return nil
		}},
		{"modules", func(v *View, _ *int) error {
			var found []string
			for m, err := range v.Modules() {
				if err != nil {
					return err
				}
				if m.Missing {
					return fmt.Errorf("%+v is said to hide", m)
				}
				found = append(found, m.Name)
			}
			return missing(tr.modules, found)
		}},
		{"sockets", func(v *View, _ *int) error {
			var found []string
			for s, err := range v.Sockets() {
				if err != nil {
					return err
				}
				found = append(found, fmt.Sprint(s.Protocol, s.Local, s.Path, s.Inode))
			}
			return missing(tr.sockets, found)
		}},
		{"mounts", func(v *View, _ *int) error {
			var found []string
			for m, err := range v.Mounts(1) {
				if err != nil {
					return err
				}
				found = append(found, m.Path)
			}
			return missing([]string{"/", "/proc", "/sys", "/run", "/cgroup"}, found)
		}},
		{"cgroups", func(v *View, _ *int) error {
			var found []string
			for c, err := range v.Cgroups() {
				if err != nil {
					return err
				}
				if c.Path == "/a" && (c.PIDs == nil || c.PIDs.Max != 77 || c.Memory == nil || c.Memory.Max != 100<<20) {
					return fmt.Errorf("%+v", c)
				}
				found = append(found, c.Path)
			}
			return missing(tr.groups, found)
		}},
		{"locks", func(v *View, _ *int) error {
			var all []Lock
			var found []string
			for l, err := range v.Locks() {
				if err != nil {
					return err
				}
				all = append(all, l)
				for _, w := range l.Waiters {
					if l.Owner != nil {
						found = append(found, w.Comm+" waits for "+l.Owner.Comm)
					} else if l.Readers > 0 {
						found = append(found, w.Comm+" waits for readers")
					}
				}
			}
			if d := Deadlocks(all); d != nil {
				// Said only if a second look finds it, too: see query.AskLocks.
				if d := Deadlocks(collect(v.img.View(v.ctx).Locks())); d != nil {
					return fmt.Errorf("deadlocks %v", d)
				}
			}
			reader := "l-dir-own"
			if _, err := v.img.types.field("mutex", "rtmutex"); err == nil {
				reader = "readers" // a kernel built for real time does not record who reads
			}
			return missing([]string{"l-pipe-wait waits for l-pipe-own", "l-file-wait waits for l-file-own", "l-dir-wait waits for " + reader, "l-pi-wait waits for l-pi-own"}, found)
		}},
		{"pools", func(v *View, _ *int) error {
			_, err := drain(v.WorkerPools())
			return err
		}},
		{"timers", func(v *View, _ *int) error {
			_, err := drain(v.Timers())
			return err
		}},
		{"disks", func(v *View, _ *int) error {
			n, err := drain(v.Disks())
			if err == nil && n != 2 {
				err = fmt.Errorf("%d disks", n)
			}
			return err
		}},
	}
}

func collect[T any](seq func(func(T, error) bool)) (all []T) {
	for x, err := range seq {
		if err != nil {
			return all
		}
		all = append(all, x)
	}
	return all
}
