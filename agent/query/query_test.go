package query

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"iter"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares text with testdata/name.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s: -want +got\n%s", name, d)
	}
}

// host is a View made of variables.
type host struct {
	tasks    []kernel.Task
	tasksErr error // comes behind the tasks
	hb       kernel.Heartbeat
	hbErr    error
	panic    kernel.PanicState
	panicErr error
	log      []kernel.LogRecord
	logErr   error
	sure     func() kernel.Confidence
}

func seq[T any](all []T, err error) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for _, v := range all {
			if !yield(v, nil) {
				return
			}
		}
		if err != nil {
			var none T
			yield(none, err)
		}
	}
}

func (h host) Tasks() iter.Seq2[kernel.Task, error]    { return seq(h.tasks, h.tasksErr) }
func (h host) Heartbeat() (kernel.Heartbeat, error)    { return h.hb, h.hbErr }
func (h host) Panic() (kernel.PanicState, error)       { return h.panic, h.panicErr }
func (h host) Log() iter.Seq2[kernel.LogRecord, error] { return seq(h.log, h.logErr) }

// Confidence has the evidence for the tasks once they were read.
func (h host) Confidence() kernel.Confidence {
	if h.sure == nil {
		return kernel.Confidence{}
	}
	return h.sure()
}

var at = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

// example is a host with a thread group, a kernel thread, a name that attacks terminals and a doubtful task.
func example() host {
	sec := time.Second
	return host{
		tasks: []kernel.Task{
			{PID: 300, TGID: 300, PPID: 1, Comm: "burn", State: "R", UID: 1000, CPU: 1, OnCPU: true, Runtime: 90 * sec, Start: 100 * sec, RSS: 812 << 10, Confident: true},
			{PID: 1, TGID: 1, Comm: "init", State: "S", CPU: 0, Runtime: 2 * sec, UTime: sec, STime: sec, Start: sec / 100, RSS: 1536 << 10, Switches: 5, Confident: true},
			{PID: 2, TGID: 2, Comm: "kthreadd", State: "S", CPU: 0, KThread: true, Start: sec / 100, Confident: true},
			{PID: 201, TGID: 200, PPID: 1, Comm: "worker", State: "R", UID: 33, CPU: 1, Runtime: 30 * sec, Start: 61 * sec, RSS: 64 << 20, Confident: true},
			{PID: 200, TGID: 200, PPID: 1, Comm: "httpd", State: "S", UID: 33, CPU: 0, Runtime: 10 * sec, Start: 60 * sec, RSS: 64 << 20, Confident: true},
			{PID: 202, TGID: 200, PPID: 1, Comm: "worker", State: "D", UID: 33, CPU: 0, Runtime: 5 * sec, Start: 62 * sec, RSS: 64 << 20, Confident: false},
			{PID: 666, TGID: 666, PPID: 1, Comm: "\x1b]0;pwn\a\x9b2J", State: "S", UID: 1000, CPU: 0, Start: 7000 * sec, RSS: 4 << 30, Confident: true},
		},
		hb: kernel.Heartbeat{At: at, Jiffies: 4294967296, Mono: int64(7200 * sec), CPUs: []kernel.CPU{
			{ID: 0, Clock: 1, Idle: true, Online: true, CurrComm: "swapper/0"},
			{ID: 1, Clock: 1, Online: true, CurrPID: 300, CurrComm: "burn", Running: 2},
		}},
		log: []kernel.LogRecord{
			{Seq: 10, Time: 0, Level: 5, Text: "Linux version 6.1.0"},
			{Seq: 11, Time: 12345678 * time.Microsecond, Level: 3, Text: "disk broken\nsecond line"},
			{Seq: 12, Time: 99999 * sec, Level: 6, Text: "evil \x1b[2J\x1b[1;1Hroot login ok \u202etxt.exe"},
		},
	}
}

// TestConfidence checks that an answer carries the evidence that was gathered for it alone, and that people see it when it is weak.
func TestConfidence(t *testing.T) {
	h := example()
	for _, c := range []struct {
		more kernel.Confidence
		want string
	}{
		{kernel.Confidence{Objects: 7, Twice: 7, Lists: 1}, ""},
		{kernel.Confidence{Objects: 7, Twice: 7, Lists: 1, Restarts: 2}, "confidence fair: "},
		{kernel.Confidence{Objects: 7, Twice: 7, Lists: 1, Changed: 1}, "confidence low: 7 objects, 1 of 7 changed"},
	} {
		asked := false
		h.sure = func() kernel.Confidence {
			sum := kernel.Confidence{Objects: 3, Restarts: 1, Changed: 1} // of an answer before
			if asked {
				sum.Objects, sum.Twice, sum.Lists = sum.Objects+c.more.Objects, c.more.Twice, c.more.Lists
				sum.Restarts, sum.Changed = sum.Restarts+c.more.Restarts, sum.Changed+c.more.Changed
			}
			asked = true
			return sum
		}
		p, err := PS(t.Context(), h, PSOptions{})
		if err != nil || p.Confidence.Confidence != c.more || p.Confidence.Level != c.more.Level() {
			t.Errorf("PS says %+v, %v; want %+v", p.Confidence, err, c.more)
		}
		var b bytes.Buffer
		if err := p.Text(&b); err != nil || strings.Contains(b.String(), "confidence") != (c.want != "") || !strings.Contains(b.String(), c.want) {
			t.Errorf("PS with %+v prints %q; want %q", c.more, b.String(), c.want)
		}
	}
}

func TestPS(t *testing.T) {
	p, err := PS(t.Context(), example(), PSOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if p.CPUs != 2 || p.Tasks != 7 || !p.Complete || p.Uptime != 2*time.Hour || !p.At.Equal(at) {
		t.Errorf("PS = %+v; want 2 CPUs, 7 tasks, complete, up 2h", p)
	}
	httpd := p.Processes[2]
	want := Process{PID: 200, PPID: 1, UID: 33, Comm: "httpd", State: "R", CPU: 1, Threads: 3, Runtime: 45 * time.Second, Start: time.Minute, RSS: 64 << 20}
	if d := cmp.Diff(want, httpd); d != "" {
		t.Errorf("PS: httpd: -want +got\n%s", d)
	}
	var b bytes.Buffer
	if err := p.Text(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "ps.txt", b.Bytes())
}

func TestPSThreads(t *testing.T) {
	p, err := PS(t.Context(), example(), PSOptions{Threads: true})
	if err != nil {
		t.Fatal(err)
	}
	var tids []int
	for _, x := range p.Processes {
		tids = append(tids, x.TID)
	}
	if want := []int{1, 2, 200, 201, 202, 300, 666}; !slices.Equal(tids, want) {
		t.Errorf("PS(threads) = threads %v; want %v", tids, want)
	}
	var b bytes.Buffer
	if err := p.Text(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "ps-threads.txt", b.Bytes())
}

func TestPSDoubts(t *testing.T) {
	broken := &kernel.CorruptError{Object: "task_struct", Addr: 0xffff888000000000, Why: "list does not close"}
	h := example()
	h.tasksErr = broken
	h.hbErr = kernel.ErrNotSupported
	p, err := PS(t.Context(), h, PSOptions{})
	if err != nil || p.Complete || len(p.Processes) != 5 || len(p.Doubts) != 2 {
		t.Errorf("PS of a broken list = %+v, %v; want an incomplete answer with two doubts", p, err)
	}
	var b bytes.Buffer
	if err := p.Text(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "ps-doubts.txt", b.Bytes())

	h.tasks = nil
	if p, err := PS(t.Context(), h, PSOptions{}); !errors.Is(err, broken) || p.Processes != nil {
		t.Errorf("PS without a task = %+v, %v; want the error of the walk", p, err)
	}
	if _, err := PS(t.Context(), host{}, PSOptions{}); err == nil {
		t.Error("PS of an empty list = nil error; an empty host cannot be")
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := PS(ctx, example(), PSOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("PS canceled = %v; want context.Canceled", err)
	}
}

// A host may make every task an error; the answer stays small.
func TestDoubtsAreBounded(t *testing.T) {
	h := hostile{n: 1000}
	p, err := PS(t.Context(), h, PSOptions{})
	if err != nil || len(p.Doubts) != maxDoubts || p.Complete {
		t.Errorf("PS with 1000 errors: %d doubts, complete %v, %v; want %d", len(p.Doubts), p.Complete, err, maxDoubts)
	}
}

// hostile has one good task and n broken ones.
type hostile struct {
	host
	n int
}

func (h hostile) Tasks() iter.Seq2[kernel.Task, error] {
	return func(yield func(kernel.Task, error) bool) {
		if !yield(kernel.Task{PID: 1, TGID: 1}, nil) {
			return
		}
		for range h.n {
			if !yield(kernel.Task{}, kernel.ErrTorn) {
				return
			}
		}
	}
}

func TestTop(t *testing.T) {
	before, err := PS(t.Context(), example(), PSOptions{})
	if err != nil {
		t.Fatal(err)
	}
	h := example()
	h.hb.Mono += int64(2 * time.Second)
	h.hb.At = at.Add(2100 * time.Millisecond)
	h.tasks[0].Runtime += 2 * time.Second         // burn: a whole CPU
	h.tasks[3].Runtime += 500 * time.Millisecond  // a thread of httpd
	h.tasks = append(h.tasks[:5], h.tasks[6:]...) // another ends, and takes its runtime with it
	h.tasks = append(h.tasks,
		kernel.Task{PID: 777, TGID: 777, Comm: "new", State: "R", Start: 2*time.Hour + time.Second, Runtime: time.Second / 2, Confident: true},
		kernel.Task{PID: 778, TGID: 778, Comm: "missed", State: "R", Start: time.Hour, Runtime: time.Hour, Confident: true})
	after, err := PS(t.Context(), h, PSOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := Top(&before, after)
	if err != nil {
		t.Fatal(err)
	}
	if l.Over != 2*time.Second || l.SinceBoot {
		t.Errorf("Top over %v; want the host's own 2s", l.Over)
	}
	if b := l.Processes[0]; b.PID != 300 || b.Share != 1 {
		t.Errorf("Top: first is PID %d with %v; want 300 with 1", b.PID, b.Share)
	}
	for _, b := range l.Processes {
		if b.Share < 0 || math.IsNaN(b.Share) || math.IsInf(b.Share, 0) {
			t.Errorf("Top: PID %d has the share %v", b.PID, b.Share)
		}
	}
	var b bytes.Buffer
	if err := l.Text(&b, 4); err != nil {
		t.Fatal(err)
	}
	golden(t, "top.txt", b.Bytes())

	if _, err := Top(&before, before); err == nil {
		t.Error("Top of one sample twice = nil error")
	}
}

func TestTopOfOneSample(t *testing.T) {
	p, err := PS(t.Context(), example(), PSOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := Top(nil, p)
	if err != nil {
		t.Fatal(err)
	}
	if !l.SinceBoot || l.Processes[0].PID != 300 {
		t.Errorf("Top(nil) = %+v; want PID 300 first", l)
	}
	if want := 90.0 / 7100; math.Abs(l.Processes[0].Share-want) > 1e-9 {
		t.Errorf("Top(nil): share %v; want %v", l.Processes[0].Share, want)
	}
	var b bytes.Buffer
	if err := l.Text(&b, 0); err != nil {
		t.Fatal(err)
	}
	golden(t, "top-since-boot.txt", b.Bytes())
	p.Uptime = 0
	if _, err := Top(nil, p); err == nil {
		t.Error("Top(nil) without the host's clock = nil error")
	}
}

func TestDmesg(t *testing.T) {
	l, err := Dmesg(t.Context(), example(), DmesgOptions{})
	if err != nil || len(l.Records) != 3 || l.Next != 13 {
		t.Fatalf("Dmesg = %d records, next %d, %v; want 3 and 13", len(l.Records), l.Next, err)
	}
	var b bytes.Buffer
	if err := l.Text(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "dmesg.txt", b.Bytes())

	worst := uint8(3)
	if l, err := Dmesg(t.Context(), example(), DmesgOptions{MaxLevel: &worst}); err != nil || len(l.Records) != 1 || l.Records[0].Seq != 11 {
		t.Errorf("Dmesg(MaxLevel 3) = %+v, %v; want record 11", l, err)
	}
	if l, err := Dmesg(t.Context(), example(), DmesgOptions{From: 12}); err != nil || len(l.Records) != 1 || l.Records[0].Seq != 12 {
		t.Errorf("Dmesg(From 12) = %+v, %v; want record 12", l, err)
	}
	h := example()
	h.logErr = kernel.ErrTorn
	if l, err := Dmesg(t.Context(), h, DmesgOptions{From: 13}); err != nil || l.Complete || len(l.Doubts) != 1 {
		t.Errorf("Dmesg of a torn ring = %+v, %v; want an incomplete answer", l, err)
	}
	if _, err := Dmesg(t.Context(), host{logErr: kernel.ErrNotSupported}, DmesgOptions{}); !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("Dmesg of an unreadable ring = %v; want ErrNotSupported", err)
	}
	if l, err := Dmesg(t.Context(), host{}, DmesgOptions{}); err != nil || l.Records == nil {
		t.Errorf("Dmesg of an empty ring = %+v, %v; want an empty answer", l, err)
	}
}

// A log that is longer than any real one does not fill the asker's memory.
func TestDmesgIsBounded(t *testing.T) {
	line := strings.Repeat("x", 60<<10)
	var h host
	for i := range 400 { // 24 MiB
		h.log = append(h.log, kernel.LogRecord{Seq: uint64(i), Text: line})
	}
	l, err := Dmesg(t.Context(), h, DmesgOptions{})
	if err != nil || l.Complete || len(l.Doubts) != 1 || l.Next != 400 {
		t.Fatalf("Dmesg = complete %v, doubts %q, next %d, %v; want an incomplete answer that says so", l.Complete, l.Doubts, l.Next, err)
	}
	text := 0
	for _, r := range l.Records {
		text += len(r.Text)
	}
	if n := len(l.Records); text > maxText || text < maxText-len(line) || l.Records[n-1].Seq != 399 || l.Records[0].Seq != uint64(400-n) {
		t.Errorf("%d records with %d bytes, from %d to %d; want the newest that fit", n, text, l.Records[0].Seq, l.Records[n-1].Seq)
	}
	h.log = make([]kernel.LogRecord, maxRecords+5)
	if l, err := Dmesg(t.Context(), h, DmesgOptions{}); err != nil || len(l.Records) != maxRecords {
		t.Errorf("Dmesg of empty lines = %d records, %v; want %d", len(l.Records), err, maxRecords)
	}
}

func TestObserve(t *testing.T) {
	info := kernel.Info{Arch: "x86_64", Release: "6.1.0-50-amd64", Hostname: "host\x1b[31m", CPUs: 2, BootTime: at.Add(-2 * time.Hour)}
	later := func(change func(*host)) View {
		h := example()
		h.hb.Jiffies += 250
		h.hb.CPUs = slices.Clone(h.hb.CPUs)
		h.hb.CPUs[1].Clock += 1e9
		if change != nil {
			change(&h)
		}
		return h
	}
	still := func(change func(*host)) View {
		h := example()
		change(&h)
		return h
	}
	dead := func(h *host) {
		h.panic = kernel.PanicState{Panicked: true, CPU: 1, Message: "Kernel panic - not syncing: sysrq triggered crash",
			Task: &kernel.Task{PID: 300, Comm: "burn"}}
	}
	for _, tt := range []struct {
		name          string
		before, after View
		want          Health
		why           string
	}{
		{"one sample", example(), nil, CouldNotTell, "a single sample: no panic, but whether the host makes progress takes two"},
		{"progress", example(), later(nil), Healthy, "no panic, and every CPU made progress or idled between two samples"},
		{"still", example(), example(), CouldNotTell, "no clock tick between two samples: the host stands still, or this memory is a still image"},
		{"stalled CPU", example(), later(func(h *host) { h.hb.CPUs[1].Clock = 1 }), CouldNotTell, "no sign of life between two samples from CPU 1"},
		{"panic", still(dead), nil, Unhealthy, "the kernel has panicked on CPU 1: Kernel panic - not syncing: sysrq triggered crash"},
		{"panic between", example(), later(dead), Unhealthy, "the kernel has panicked on CPU 1: Kernel panic - not syncing: sysrq triggered crash"},
		{"oops", example(), later(func(h *host) { h.panic.Oops = true }), CouldNotTell, "every CPU makes progress, but the kernel has reported an oops"},
		{"no panic state", example(), later(func(h *host) { h.panicErr = kernel.ErrTorn }), CouldNotTell, "the panic state could not be read"},
		{"no heartbeat", still(func(h *host) { h.hbErr = kernel.ErrTorn }), later(nil), CouldNotTell, "the heartbeat could not be read"},
		{"no second heartbeat", example(), later(func(h *host) { h.hbErr = kernel.ErrTorn }), CouldNotTell, "the heartbeat could not be read"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := Observe(t.Context(), info, tt.before, tt.after)
			if s.Health != tt.want || s.Why != tt.why {
				t.Errorf("Observe = %s, %q\nwant %s, %q", s.Health, s.Why, tt.want, tt.why)
			}
			var b bytes.Buffer
			if err := s.Text(&b); err != nil {
				t.Fatal(err)
			}
			golden(t, "status-"+strings.ReplaceAll(tt.name, " ", "-")+".txt", b.Bytes())
		})
	}
}

func TestStatusOfAnAgent(t *testing.T) {
	s := Status{At: at, Health: Unhealthy, Why: "findings are open", Phase: "attached", Since: at, Agent: &Agent{
		Writes: true, Agreement: "a-1 of acme", Attaches: 2, AttachTook: "1.2s", Passes: 99, LastPass: "200µs",
		Detectors: []string{"panic: nothing found", "runaway: FOUND SOMETHING"}, Errors: []string{"x\ny"},
	}, Notes: []string{"healing: plan p1"}}
	var b bytes.Buffer
	if err := s.Text(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "status-agent.txt", b.Bytes())
}

func TestFindings(t *testing.T) {
	cpu, uid := 1, uint32(1000)
	resolved := at.Add(time.Minute)
	fs := Findings{
		{ID: "runaway-process-1", Kind: detect.KindRunawayProcess, Severity: detect.Warning, Title: "burn\x1b[0m eats CPU 1",
			Detail: "PID 300 took 99 % of CPU 1 for 60 s", Culprit: detect.Culprit{CPU: &cpu, PID: 300, TGID: 300, Comm: "burn", UID: &uid},
			Evidence: []detect.Evidence{{What: "share", Value: "0.99"}, {What: "over", Value: "1m0s"}}, Confidence: 0.98,
			FirstSeen: at, LastSeen: at, Action: "kill-process"},
		{ID: "panic-1", Severity: detect.Critical, Title: "the kernel has panicked", FirstSeen: at, LastSeen: at, Action: "power-cycle", Automatic: true},
		{ID: "cpu-stall-1", Severity: detect.Critical, Title: "CPU 0 stands still", FirstSeen: at, LastSeen: at, Resolved: &resolved, Resolution: "gone by itself"},
	}
	if got := fs.Open(); len(got) != 2 {
		t.Errorf("Open() = %d findings; want 2", len(got))
	}
	var b bytes.Buffer
	if err := errors.Join(fs.Text(&b), Findings{}.Text(&b), FindingText(&b, fs[0]), FindingText(&b, fs[2])); err != nil {
		t.Fatal(err)
	}
	golden(t, "findings.txt", b.Bytes())
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"plain":         "plain",
		"Grüße 中":       "Grüße 中",
		"a\tb\nc":       `a\tb\nc`,
		"\x1b[31m":      `\x1b[31m`,
		"\x9b2J":        `\x9b2J`,
		"\u009b2J":      `\u009b2J`,
		"a\u202eb":      `a\u202eb`,
		"bad \xff utf8": `bad \xff utf8`,
		"nul\x00":       `nul\x00`,
		"\u200b":        `\u200b`,
		"del\x7f":       `del\x7f`,
		"\ufffd":        "\ufffd",
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q; want %q", in, got, want)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("\x1b]0;x\a")
	f.Add("\u202e\xc2\x9b")
	f.Fuzz(func(t *testing.T, s string) {
		got := Clean(s)
		if !utf8.ValidString(got) {
			t.Fatalf("Clean(%q) = %q is not UTF-8", s, got)
		}
		for _, r := range got {
			if r < 0x20 || 0x7f <= r && r < 0xa0 || 0x200b <= r && r <= 0x200f || 0x202a <= r && r <= 0x202e || 0x2066 <= r && r <= 0x2069 {
				t.Fatalf("Clean(%q) = %q lets %U through", s, got, r)
			}
		}
		if Clean(got) != got {
			t.Fatalf("Clean(Clean(%q)) = %q; want %q", s, Clean(got), got)
		}
	})
}

func TestNumbers(t *testing.T) {
	for in, want := range map[uint64]string{0: "0", 1023: "1023", 1024: "1.0K", 812 << 10: "812K", 1536 << 20: "1.5G", math.MaxUint64: "16E"} {
		if got := Bytes(in); got != want {
			t.Errorf("Bytes(%d) = %q; want %q", in, got, want)
		}
	}
	for in, want := range map[time.Duration]string{0: "0:00.00", 61*time.Second + 230*time.Millisecond: "1:01.23", 2 * time.Hour: "120:00.00"} {
		if got := clock(in); got != want {
			t.Errorf("clock(%v) = %q; want %q", in, got, want)
		}
	}
	for in, want := range map[time.Duration]string{1500 * time.Millisecond: "+1.5s", 61 * time.Second: "+1m01s", 90 * time.Minute: "+1h30m", 75 * time.Hour: "+3d03h"} {
		if got := age(in); got != want {
			t.Errorf("age(%v) = %q; want %q", in, got, want)
		}
	}
}
