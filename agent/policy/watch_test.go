package policy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// pass is a look at a host with these tasks.
func pass(tasks ...kernel.Task) *detect.Pass {
	now := time.Unix(1_800_000_000, 0)
	return &detect.Pass{
		Now:   now,
		Beats: []kernel.Heartbeat{{At: now, Mono: int64(time.Hour), CPUs: make([]kernel.CPU, 4)}},
		Usage: []kernel.Usage{{At: now, Threads: 60, Total: 16 << 30, Available: 12 << 30}},
		Tasks: []detect.TaskSample{{At: now, Tasks: tasks}},
	}
}

var (
	miner = kernel.Task{PID: 66, TGID: 66, PPID: 1, Comm: "xmrig", State: "R", UID: 1000, RSS: 3 << 30, Runtime: 90 * time.Second, Start: 59 * time.Minute}
	shell = kernel.Task{PID: 70, TGID: 70, PPID: 1, Comm: "sh", State: "S", UID: 4294967294, Start: 30 * time.Minute}
)

func TestWatch(t *testing.T) {
	for _, tt := range []struct {
		expr string
		want int // findings
		pid  int // of the first culprit
	}{
		{`tasks.exists(t, t.comm == "xmrig")`, 1, 0},
		{`tasks.exists(t, t.comm == "other")`, 0, 0},
		{`tasks.filter(t, t.comm == "xmrig")`, 1, 66},
		{`tasks.filter(t, t.comm.startsWith("x") && t.age > 59.0 && t.age < 61.0)`, 1, 66},
		{`tasks.filter(t, t.age > 60.0)`, 1, 70},
		{`tasks.filter(t, t.rss > host.total / 8)`, 1, 66},
		{`tasks.filter(t, t.uid == 4294967294)`, 1, 70},
		{`tasks.filter(t, t.uid != 0)`, 2, 66},
		{`tasks.filter(t, t.comm.matches("^x.*g$") && t.used > 60)`, 1, 66},
		{`size(tasks) > 1 && host.cpus == 4 && host.available > host.total / 2`, 1, 0},
		{`host.threads > 5000`, 0, 0},
		{`[]`, -1, 0},
	} {
		p := Policy{Version: Version, Watches: []Watch{{Name: "w", If: tt.expr}}}
		ds, err := p.Watching()
		if tt.want < 0 {
			if err == nil {
				t.Errorf("%s: is taken", tt.expr)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.expr, err)
			continue
		}
		fs, err := ds[0].Detect(t.Context(), pass(miner, shell))
		if err != nil || len(fs) != tt.want {
			t.Errorf("%s: %+v, %v; want %d", tt.expr, fs, err, tt.want)
			continue
		}
		if len(fs) > 0 && (fs[0].Culprit.PID != tt.pid || fs[0].Kind != detect.KindPolicy || fs[0].Rule != "w") {
			t.Errorf("%s: %+v", tt.expr, fs[0])
		}
		if tt.pid == 66 && fs[0].Culprit.Start != miner.Start {
			t.Errorf("%s: the culprit could be another of the same PID: %+v", tt.expr, fs[0].Culprit)
		}
	}
}

// Sizes and users of a host are told right on agents of 32 bits, too: no field that holds them is an int.
func TestWatchWide(t *testing.T) {
	if h := (Host{Total: 64 << 30}); h.Total != 64<<30 {
		t.Fail()
	}
}

func TestWatchErrors(t *testing.T) {
	for expr, want := range map[string]string{
		`tasks.exists(t, t.com == "x")`:      "undefined field 'com'",
		`tasks.exists(t, t.comm == 1)`:       "no matching overload",
		`tasks.exists(t t.comm)`:             "Syntax error",
		`task.size() > 1`:                    "undeclared reference to 'task'",
		`tasks.map(t, t.pid)`:                "it must be a condition, or a list of tasks",
		`size(tasks)`:                        "it must be a condition",
		strings.Repeat("(", 5000):            "1 to 4096 bytes",
		strings.Repeat("(", 2000):            "if",
		`tasks.exists(t, t.comm.matches(1))`: "no matching overload",
		``:                                   "1 to 4096 bytes",
	} {
		err := Policy{Version: Version, Watches: []Watch{{Name: "w", If: expr}}}.Check(nil)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "watches[0].if") {
			t.Errorf("%.40s: %v; want %q", expr, err, want)
		}
	}
	for _, w := range []Watch{{Name: "A", If: "true"}, {Name: "", If: "true"}, {Name: "x", If: "true", Severity: "bad"}, {Name: "x", If: "true", Every: 1}, {Name: "x", If: "true", For: Duration(100 * time.Hour)}} {
		if err := (Policy{Version: Version, Watches: []Watch{w}}).Check(nil); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", w, err)
		}
	}
	twice := Policy{Version: Version, Watches: []Watch{{Name: "w", If: "true"}, {Name: "w", If: "false"}}}
	if err := twice.Check(nil); err == nil || !strings.Contains(err.Error(), "watches[1].name") {
		t.Errorf("two of one name: %v", err)
	}
	rule := Policy{Version: Version, Watches: []Watch{{Name: "w", If: "true"}}, Rules: []Rule{{Finding: "policy/v", Action: "kill-process", Mode: Wait}}}
	if err := rule.Check(nil); err == nil || !strings.Contains(err.Error(), "rules[0].finding") {
		t.Errorf("a rule for a watch that is not there: %v", err)
	}
}

// An expression that would take for ever is broken off, says so, and takes nobody down.
func TestWatchBudget(t *testing.T) {
	var many []kernel.Task
	for i := range 3000 {
		many = append(many, kernel.Task{PID: i + 2, TGID: i + 2, Comm: fmt.Sprintf("c%d", i)})
	}
	p := Policy{Version: Version, Watches: []Watch{{Name: "w", If: `tasks.exists(a, tasks.exists(b, tasks.exists(c, a.pid + b.pid == c.pid * 7000)))`}}}
	ds, err := p.Watching()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	fs, err := ds[0].Detect(t.Context(), pass(many...))
	if err == nil || !strings.Contains(err.Error(), "cost limit") && !strings.Contains(err.Error(), "interrupt") {
		t.Errorf("%v, %v", fs, err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	fs, err = (&watch{Watch: Watch{Name: "w"}, sockets: true}).detect(t.Context(), pass())
	if !errors.Is(err, errNoView) {
		t.Errorf("without a view: %v, %v", fs, err)
	}
}

func TestWatchRules(t *testing.T) {
	p := Policy{Version: Version, Watches: []Watch{{Name: "a", If: "true"}, {Name: "b", If: "true"}}, Rules: []Rule{
		{Finding: "policy", Action: "stop-process", Mode: Wait},
		{Finding: "policy/a", Action: "kill-process", Mode: Automatic, MaxPerHour: 1, Then: "stop-process"},
	}}
	if err := p.Check(nil); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	a, b := detect.Finding{Kind: detect.KindPolicy, Rule: "a", Confidence: 1}, detect.Finding{Kind: detect.KindPolicy, Rule: "b", Confidence: 1}
	if d := p.Decide(a, now, []Past{{Kind: detect.KindPolicy, Rule: "b", At: now}}); !d.Automatic || d.Action != "kill-process" {
		t.Errorf("its own rule: %+v", d)
	}
	if d := p.Decide(a, now, []Past{{Kind: detect.KindPolicy, Rule: "a", At: now}}); d.Automatic {
		t.Errorf("its rate: %+v", d)
	}
	if d := p.Decide(b, now, nil); d.Automatic || d.Action != "stop-process" {
		t.Errorf("the rule for all: %+v", d)
	}
	if n := p.Next(a, "kill-process"); n != "stop-process" {
		t.Errorf("Next = %q", n)
	}
}

// The recordings of healthy and ill hosts can be asked.
func TestWatchRecordings(t *testing.T) {
	files, err := filepath.Glob("../detect/testdata/*.json.gz")
	if err != nil || len(files) == 0 {
		t.Fatalf("no recordings: %v", err)
	}
	f, err := os.Open(files[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	whole, err := detect.ReadRecording(f)
	if err != nil {
		t.Fatal(err)
	}
	ds, err := Policy{Version: Version, Watches: []Watch{{Name: "kthreadd", If: `tasks.filter(t, t.comm == "kthreadd" && t.kthread)`}}}.Watching()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	detect.Replay(t.Context(), detect.DefaultConfig(), whole, ds, func(_ time.Time, d *detect.Detector, fs []detect.Finding) bool {
		if d.ID == "policy/kthreadd" {
			found += len(fs)
		}
		return true
	})
	if len(whole.Usage) > 0 && found == 0 {
		t.Errorf("%s: nobody has found kthreadd", files[0])
	}
}

func FuzzWatch(f *testing.F) {
	f.Add(`tasks.filter(t, t.comm == "x")`)
	f.Add(`host.threads > 1 || tasks.exists(t, t.comm.matches("a+"))`)
	f.Fuzz(func(t *testing.T, expr string) {
		ds, err := Policy{Version: Version, Watches: []Watch{{Name: "w", If: expr}}}.Watching()
		if err == nil {
			ds[0].Detect(t.Context(), pass(miner, shell))
		} else if !errors.Is(err, ErrInvalid) {
			t.Error(err)
		}
	})
}
