package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"flag"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/host"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	firstPassword = "printed on the console"
	newPassword   = "correct horse battery"
)

var boot = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// fakeAgent is an agent whose host is a set of variables.
type fakeAgent struct {
	stores   []engine.StoreRequest
	mu       sync.Mutex // guards what follows
	state    engine.State
	findings []detect.Finding
	power    string
	healErr  error
	records  []kernel.LogRecord
	samples  int
	detached bool
	lock     *access.Lock // nil if no owner is trusted
	orders   []heal.NetworkOrder
	moved    bool // something else is to be healed than was planned
}

func newFakeAgent() *fakeAgent {
	one := 1
	resolved := boot.Add(10 * time.Minute)
	a := &fakeAgent{
		power: "on",
		state: engine.State{
			Phase: engine.Attached, Since: boot.Add(time.Minute), Started: boot, Health: engine.Ill, AttachTook: 1234 * time.Millisecond,
			Kernel: &kernel.Info{
				Arch: "x86_64", Release: "6.1.0-50-amd64", Banner: "Linux version 6.1.0-50-amd64", Hostname: "patient", CPUs: 2, BootTime: boot,
			},
			Detectors: []engine.DetectorStatus{
				{ID: "panic", Title: "Kernel panic", Health: engine.Healthy, Runs: 7},
				{ID: "runaway-process", Title: "Runaway process", Health: engine.Ill, Runs: 7},
				{ID: "host-silent", Title: "Silent host", Health: engine.CouldNotTell, Error: "too early", Runs: 1},
			},
			Agreement: &engine.AgreementState{ID: "a-1", Owner: "acme", Rights: access.Rights{Read: true}, ValidUntil: boot.AddDate(1, 0, 0)},
			Attaches:  1, Passes: 42, Writes: true,
			LastPass: engine.PassCost{At: boot.Add(time.Hour), Took: 213 * time.Microsecond, Reads: 12, Bytes: 49152},
		},
		findings: []detect.Finding{
			{
				ID: "runaway-process-2", Kind: detect.KindRunawayProcess, Severity: detect.Critical, Title: "burn\x1b[2J (412) eats CPU 1",
				Detail: "It has used 98 % of a CPU for 30 s.", Culprit: detect.Culprit{CPU: &one, PID: 412, TGID: 412, Comm: "burn\x1b[2J"},
				Evidence: []detect.Evidence{{What: "share", Value: "98 %"}}, Confidence: 0.95, FirstSeen: boot.Add(5 * time.Minute), LastSeen: boot.Add(6 * time.Minute),
				Action: "kill-process",
			},
			{
				ID: "cpu-stall-1", Kind: detect.KindCPUStall, Severity: detect.Warning, Title: "CPU 0 stalled", Detail: "No progress for 12 s.",
				FirstSeen: boot.Add(2 * time.Minute), LastSeen: boot.Add(3 * time.Minute), Resolved: &resolved, Resolution: "It went away.",
			},
		},
	}
	for i, text := range []string{"Linux version 6.1.0-50-amd64", "ata1: link is down\nata1: retrying", "evil \x1b]0;pwn\a"} {
		a.records = append(a.records, kernel.LogRecord{Seq: uint64(i), Time: time.Duration(i) * 1500 * time.Millisecond, Level: uint8(6 - 3*(i%2)), Text: text})
	}
	return a
}

// do changes the agent under its lock.
func (a *fakeAgent) do(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

func (a *fakeAgent) State() engine.State {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state
}

func (a *fakeAgent) Brief() engine.State { return a.State() }

func (a *fakeAgent) Findings() []detect.Finding {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]detect.Finding(nil), a.findings...)
}

func (a *fakeAgent) Finding(id string) (detect.Finding, bool) {
	for _, f := range a.Findings() {
		if f.ID == id {
			return f, true
		}
	}
	return detect.Finding{}, false
}

func (a *fakeAgent) Heal(_ context.Context, r engine.HealRequest) (heal.Plan, *heal.Outcome, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.healErr != nil {
		return heal.Plan{}, nil, a.healErr
	}
	p := heal.Plan{
		ID: "plan-1", Action: "kill-process", Finding: r.Finding, Title: "kill burn (412)", Risk: heal.RiskTask, Made: boot, Value: r.Value,
		Target: &heal.Target{PID: 412, TGID: 412, Comm: "burn", UID: 1000},
		Calls:  []heal.Call{{Function: "do_send_sig_info", Addr: 0xffffffff81000000, Context: "timer tick of CPU 1", Purpose: "sends SIGKILL"}},
		Steps: []heal.Step{
			{Op: heal.OpExpect, Why: "it is still the same task", Addr: 0x1000, Object: "task_struct.pid", Expect: heal.Bytes{0x9c, 1, 0, 0}},
			{Op: heal.OpArm, Why: "arm", Addr: 0x2000, Expect: heal.Bytes{0, 0, 0, 0, 0, 0, 0, 0}, Put: heal.Bytes{1, 0, 0, 0, 0, 0, 0, 0}},
			{Op: heal.OpAwait, Why: "it ends", Until: []heal.Cond{{What: "exit_state is set"}}, Timeout: 5 * time.Second},
		},
	}
	if a.moved && !r.DryRun {
		p.Target = &heal.Target{PID: 413, TGID: 413, Comm: "another"}
	}
	if err := p.Agreed(r.Agreed); err != nil || r.DryRun {
		return p, nil, err
	}
	verified := r.Action != "sync-disks"
	o := &heal.Outcome{
		Plan: p, Caller: r.Caller, Started: boot, Finished: boot.Add(17 * time.Millisecond), Verified: verified, BytesWritten: 8, Stores: 1, Atomic: true,
		HostFunctions: []heal.FunctionRun{{Call: p.Calls[0], Runs: 1, Confirmed: true, Within: 4 * time.Millisecond}},
	}
	if !verified {
		o.Undone, o.Error = true, "the task lives"
		return p, o, nil
	}
	a.findings[0].Resolved = &o.Finished
	a.state.Health = engine.Healthy
	return p, o, nil
}

func (a *fakeAgent) View(context.Context) (*kernel.View, error) { return nil, engine.ErrNotAttached }

func (a *fakeAgent) Undo(_ context.Context, r engine.UndoRequest) (heal.Plan, *heal.Outcome, error) {
	p := heal.Plan{ID: "plan-2", Action: "continue-process", Finding: r.Finding, Title: "continue burn (412)", Risk: heal.RiskTask, Made: boot}
	if r.Finding != "runaway-process-2" {
		return heal.Plan{}, nil, fmt.Errorf("take back the repair of %s: %w", r.Finding, engine.ErrNoUndo)
	}
	if err := p.Agreed(r.Agreed); err != nil || r.DryRun {
		return p, nil, err
	}
	return p, &heal.Outcome{Plan: p, Caller: r.Caller, Started: boot, Finished: boot, Verified: true}, nil
}

func (a *fakeAgent) Power() heal.Power { return fakePower{a} }

func (a *fakeAgent) Outcomes(string) []heal.Outcome { return nil }

// Recording knows that of "memory-hog-1", and that of now.
func (a *fakeAgent) Recording(_ context.Context, finding string) ([]byte, error) {
	if finding != "" && finding != "memory-hog-1" {
		return nil, fmt.Errorf("recording of %q: %w", finding, engine.ErrNoRecording)
	}
	return []byte("series of " + finding), nil
}

func (a *fakeAgent) MayRead() error                            { return nil }
func (a *fakeAgent) Obey(o *access.Order, _ string) error      { return a.lock.Obey(o) }
func (a *fakeAgent) Offer(g *access.Agreement, _ string) error { return a.lock.Offer(g) }
func (a *fakeAgent) MayLease(hostmem.Range, bool) error        { return nil }
func (a *fakeAgent) Store(_ context.Context, r engine.StoreRequest) (heal.Outcome, error) {
	a.stores = append(a.stores, r)
	return heal.Outcome{Plan: heal.Plan{ID: "plan-7"}}, nil
}
func (a *fakeAgent) Contain(_ context.Context, o heal.NetworkOrder, _ string) (heal.Outcome, error) {
	a.orders = append(a.orders, o)
	return heal.Outcome{}, nil
}
func (a *fakeAgent) Control(ctx context.Context, _, _, _ string, do func(context.Context) error) error {
	return do(ctx)
}

func (a *fakeAgent) PowerControl(_ context.Context, op, _ string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch op {
	case "on", "cycle", heal.OrderReset, heal.OrderPowerCycle, heal.OrderRestart:
		a.power = "on"
	case "off", "shutdown":
		a.power = "off"
	case "nmi":
		return fmt.Errorf("send NMI: %w", access.ErrDenied)
	}
	return nil
}

// fakePower tells the state; orders go through PowerControl.
type fakePower struct{ a *fakeAgent }

func (p fakePower) State(context.Context) (string, error) {
	p.a.mu.Lock()
	defer p.a.mu.Unlock()
	return p.a.power, nil
}
func (fakePower) Cycle(context.Context) error            { return access.ErrDenied }
func (fakePower) On(context.Context) error               { return access.ErrDenied }
func (fakePower) Off(context.Context) error              { return access.ErrDenied }
func (fakePower) NMI(context.Context) error              { return access.ErrDenied }
func (fakePower) GracefulShutdown(context.Context) error { return access.ErrDenied }

// look is one view of the host; each is two seconds of the host's time after the one before.
func (a *fakeAgent) look(context.Context) (query.View, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.detached {
		return nil, engine.ErrNotAttached
	}
	a.samples++
	return fakeView{n: a.samples, log: append([]kernel.LogRecord(nil), a.records...)}, nil
}

type fakeView struct {
	n   int
	log []kernel.LogRecord
}

func (v fakeView) Tasks() iter.Seq2[kernel.Task, error] {
	ran := time.Duration(v.n) * 2 * time.Second
	return func(yield func(kernel.Task, error) bool) {
		for _, t := range []kernel.Task{
			{PID: 1, TGID: 1, Comm: "init", State: "S", Runtime: time.Second, Start: 10 * time.Millisecond, RSS: 1 << 20, Confident: true},
			{PID: 412, TGID: 412, PPID: 1, Comm: "burn\x1b[2J", State: "R", UID: 1000, CPU: 1, OnCPU: true, Runtime: ran, Start: 5 * time.Minute, RSS: 812 << 10, Confident: true},
		} {
			if !yield(t, nil) {
				return
			}
		}
	}
}

func (v fakeView) Heartbeat() (kernel.Heartbeat, error) {
	return kernel.Heartbeat{At: boot.Add(time.Hour), Jiffies: uint64(v.n), Mono: int64(time.Hour) + int64(v.n)*2e9, CPUs: make([]kernel.CPU, 2)}, nil
}

func (fakeView) Confidence() kernel.Confidence { return kernel.Confidence{Objects: 1} }

func (fakeView) Panic() (kernel.PanicState, error) { return kernel.PanicState{CPU: -1}, nil }

func (v fakeView) Log() iter.Seq2[kernel.LogRecord, error] {
	return func(yield func(kernel.LogRecord, error) bool) {
		for _, r := range v.log {
			if !yield(r, nil) {
				return
			}
		}
	}
}

// fakeJournal has two records.
type fakeJournal struct{}

func (fakeJournal) Records() iter.Seq2[journal.Record, error] {
	return func(yield func(journal.Record, error) bool) {
		_ = yield(journal.Record{Restart: 1 << 63, Seq: 1, Time: boot, Kind: "finding", Data: []byte(`{"id":"runaway-process-2"}`)}, nil) &&
			yield(journal.Record{Restart: 1 << 63, Seq: 2, Time: boot, Kind: "intent"}, nil)
	}
}

// bench is a directory with an agent that listens on loopback.
type bench struct {
	t     *testing.T
	agent *fakeAgent
	dir   string
	url   string
	pin   string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, agent: newFakeAgent(), dir: t.TempDir()}
	o := service.Options{
		StateDir: filepath.Join(b.dir, "state"),
		Logger:   slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
		Limits:   service.Limits{Hash: service.HashCost{Memory: 64, Passes: 1}},
		Announce: func(c service.Credential) { b.write("initial", c.Password+"\n") },
	}
	host.Configure(&o)
	s, err := service.New(o)
	if err != nil {
		t.Fatal(err)
	}
	s.Handle(host.Routes(s, host.Options{Agent: b.agent, Journal: fakeJournal{}, Version: "1.0.0", View: b.agent.look, Memory: fakeRAM, Core: fakeCore, DumpDir: b.path("dumps"), Datapath: fakeDatapath{}})...)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(ctx, l); err != nil && ctx.Err() == nil {
			t.Errorf("serve: %v", err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	b.url = "https://" + l.Addr().String()
	b.pin = fingerprint(s.Certificate())
	b.write("new", newPassword+"\n")
	b.write("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	return b
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) write(name, text string) {
	b.t.Helper()
	if err := os.WriteFile(b.path(name), []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// run runs a command line in which $NAMES are replaced, with the contexts of the bench.
func (b *bench) run(line, stdin string) (code int, stdout, stderr string) {
	b.t.Helper()
	names := map[string]string{"URL": b.url, "PIN": b.pin, "DIR": b.dir}
	args := []string{"-config", b.path("contexts.json")}
	for _, w := range strings.Fields(line) {
		args = append(args, os.Expand(w, func(n string) string { return names[n] }))
	}
	var out, errs bytes.Buffer
	code = run(b.t.Context(), args, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

// anonymous replaces what differs from run to run.
func (b *bench) anonymous(s string) string {
	for _, r := range []struct{ from, to string }{{b.url, "$URL"}, {strings.TrimPrefix(b.url, "https://"), "$HOST"}, {b.pin, "$PIN"}, {b.dir, "$DIR"}} {
		s = strings.ReplaceAll(s, r.from, r.to)
	}
	for _, r := range []struct{ from, to string }{
		{`"(at|Made)": "20[^"]*"`, `"$1": "$$TIME"`},
		{`/Sessions/[0-9A-Za-z_-]+`, `/Sessions/$$ID`},
		{`task [0-9]+`, `task $$ID`},
	} {
		s = regexp.MustCompile(r.from).ReplaceAllString(s, r.to)
	}
	return s
}

// TestScript runs testdata/agent.script and compares what is said with testdata/agent.golden. A line "$ …" is a command,
// "< …" the next line of its standard input, "! name" something that happens to the agent, "# …" a comment.
func TestScript(t *testing.T) {
	b := newBench(t)
	script, err := os.ReadFile("testdata/agent.script")
	if err != nil {
		t.Fatal(err)
	}
	var transcript strings.Builder
	lines := strings.Split(strings.TrimSpace(string(script)), "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		fmt.Fprintln(&transcript, line)
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '!':
			b.happens(strings.TrimSpace(line[1:]))
		case line[0] == '$':
			stdin := ""
			for i+1 < len(lines) && strings.HasPrefix(lines[i+1], "<") {
				i++
				fmt.Fprintln(&transcript, lines[i])
				stdin += strings.TrimPrefix(lines[i][1:], " ") + "\n"
			}
			initial, err := os.ReadFile(b.path("initial"))
			if err != nil {
				t.Fatal(err)
			}
			stdin = strings.ReplaceAll(stdin, "$INITIAL\n", string(initial))
			code, stdout, stderr := b.run(strings.TrimPrefix(line[1:], " backdoor"), stdin)
			fmt.Fprint(&transcript, b.anonymous(stdout))
			for l := range strings.Lines(b.anonymous(stderr)) {
				fmt.Fprint(&transcript, "2> ", l)
			}
			fmt.Fprintf(&transcript, "[exit %d]\n", code)
		default:
			t.Fatalf("testdata/agent.script:%d: %q", i+1, line)
		}
	}
	if *update {
		if err := os.WriteFile("testdata/agent.golden", []byte(transcript.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile("testdata/agent.golden")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), transcript.String()); d != "" {
		t.Errorf("testdata/agent.golden: -want +got\n%s", d)
	}
	if strings.ContainsAny(transcript.String(), "\x1b\a") {
		t.Error("a control character of the host reached the terminal")
	}
}

// happens changes the fake agent as the script says.
func (b *bench) happens(what string) {
	b.t.Helper()
	switch what {
	case "writes are off":
		b.agent.do(func() { b.agent.healErr = fmt.Errorf("heal: %w", engine.ErrWritesOff) })
	case "writes are on":
		b.agent.do(func() { b.agent.healErr = nil })
	case "the kernel is lost":
		b.agent.do(func() {
			b.agent.detached = true
			b.agent.state.Phase, b.agent.state.Why, b.agent.state.Health = engine.Lost, "the host reboots", engine.CouldNotTell
			b.agent.state.Kernel = nil
		})
	default:
		b.t.Fatalf("nothing happens at %q", what)
	}
}
