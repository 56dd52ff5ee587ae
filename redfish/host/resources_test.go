package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// connect serves a fake agent's host and returns a client of it.
func connect(t *testing.T, a *fakeAgent) *client.Client {
	t.Helper()
	c, _ := connectAt(t, a)
	return c
}

// connectAt is connect for tests that need more clients: it returns the service's address, too.
func connectAt(t *testing.T, a *fakeAgent) (*client.Client, string) {
	t.Helper()
	return connectWith(t, a, func(*Options) {})
}

// connectWith is connectAt with other options of the resources.
func connectWith(t *testing.T, a *fakeAgent, change func(*Options)) (*client.Client, string) {
	t.Helper()
	s := newTestServiceWith(t, a, service.Options{}, change)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	c, err := client.New(client.Config{URL: l.Addr().String(), User: testUser, Password: testPassword, Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(context.Background()); err != nil {
			t.Errorf("Close: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return c, l.Addr().String()
}

func TestSystem(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*fakeAgent)
		power  schema.PowerState
		status schema.Status
		boot   string // BootProgress.LastState
		host   string
	}{
		{"well", func(a *fakeAgent) { a.state.Health, a.findings = engine.Healthy, nil }, "On", schema.Status{State: "Enabled", Health: "OK", HealthRollup: "OK"}, "OSRunning", "patient"},
		{"critically ill", func(*fakeAgent) {}, "On", schema.Status{State: "Enabled", Health: "Critical", HealthRollup: "Critical"}, "OSBootStarted", "patient"},
		{"ill", func(a *fakeAgent) { a.findings[0].Severity = detect.Warning }, "On", schema.Status{State: "Enabled", Health: "Warning", HealthRollup: "Warning"}, "OSBootStarted", "patient"},
		{"could not tell", func(a *fakeAgent) { a.state.Health = engine.CouldNotTell }, "On", schema.Status{State: "Enabled"}, "OSBootStarted", "patient"},
		{"no memory", func(a *fakeAgent) { a.state.Phase, a.state.Health = engine.NoMemory, engine.CouldNotTell }, "On", schema.Status{State: "UnavailableOffline"}, "", ""},
		{"restarting", func(a *fakeAgent) { a.state.Phase, a.state.Health = engine.Lost, engine.CouldNotTell }, "On", schema.Status{State: "Starting"}, "", ""},
		{"off", func(a *fakeAgent) { a.power, a.state.Phase, a.state.Health = "off", engine.Lost, engine.Healthy }, "Off", schema.Status{State: "Disabled"}, "", ""},
		{"power unknown", func(a *fakeAgent) { a.power, a.state.Health = "", engine.CouldNotTell }, "", schema.Status{State: "Enabled"}, "OSBootStarted", "patient"},
		{"no controller, well", func(a *fakeAgent) { a.noPower, a.state.Health, a.findings = true, engine.Healthy, nil }, "On", schema.Status{State: "Enabled", Health: "OK", HealthRollup: "OK"}, "OSRunning", "patient"},
		{"no controller, dead", func(a *fakeAgent) { a.noPower, a.state.Dead = true, true }, "", schema.Status{State: "Enabled", Health: "Critical", HealthRollup: "Critical"}, "OSBootStarted", "patient"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := newFakeAgent()
			tc.change(a)
			c := connect(t, a)
			s, err := c.System(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if s.Status.Health != "" && s.Status.Health != "OK" && len(s.Status.Conditions) != 1 {
				t.Errorf("%d conditions; want the open finding", len(s.Status.Conditions))
			}
			s.Status.Conditions = nil
			if d := cmp.Diff(tc.status, *s.Status); d != "" {
				t.Errorf("Status (-want +got):\n%s", d)
			}
			boot := ""
			if s.BootProgress != nil {
				boot = s.BootProgress.LastState
			}
			if s.PowerState != tc.power || boot != tc.boot || s.HostName != tc.host {
				t.Errorf("PowerState %q, BootProgress %q, HostName %q; want %q, %q, %q", s.PowerState, boot, s.HostName, tc.power, tc.boot, tc.host)
			}
			if _, ok := s.Actions["#ComputerSystem.Reset"]; ok == a.noPower {
				t.Errorf("Reset offered: %v; power controller absent: %v", ok, a.noPower)
			}
			var o systemOEM
			if ok, err := client.OEM(s.OEM, &o); !ok || err != nil || o.Phase != string(a.state.Phase) || o.Health != string(a.state.Health) {
				t.Errorf("Oem = %+v, %v, %v", o, ok, err)
			}
		})
	}
}

func TestReset(t *testing.T) {
	a := newFakeAgent()
	c := connect(t, a)
	for _, tc := range []struct {
		reset schema.ResetType
		op    string
		power schema.PowerState
	}{
		{schema.ResetForceOff, "off", schema.PowerOff},
		{schema.ResetOn, "on", schema.PowerOn},
		{schema.ResetForceOn, "on", schema.PowerOn},
		{schema.ResetForceRestart, "reset", schema.PowerOn},
		{schema.ResetGracefulRestart, "restart", schema.PowerOn},
		{schema.ResetPowerCycle, "power-cycle", schema.PowerOn},
		{schema.ResetNMI, "nmi", schema.PowerOn},
		{schema.ResetGracefulShutdown, "shutdown", schema.PowerOff},
		{schema.ResetOn, "on", schema.PowerOn},
		{schema.ResetPushPowerButton, "button", schema.PowerOff},
		{schema.ResetForceRestart, "on", schema.PowerOn}, // of a machine that is off
		{schema.ResetForceOff, "off", schema.PowerOff},
		{schema.ResetGracefulRestart, "on", schema.PowerOn},
	} {
		a.ops = nil
		if err := c.Reset(t.Context(), tc.reset); err != nil {
			t.Errorf("Reset(%s) = %v", tc.reset, err)
			continue
		}
		if want := []string{tc.op + " by " + testUser}; !slices.Equal(a.ops, want) {
			t.Errorf("Reset(%s) did %q; want %q", tc.reset, a.ops, want)
		}
		s, err := c.System(t.Context())
		if err != nil || s.PowerState != tc.power {
			t.Errorf("after %s: power %q, %v; want %q", tc.reset, s.PowerState, err, tc.power)
		}
	}
	if err := c.Reset(t.Context(), "Explode"); err == nil || !strings.Contains(err.Error(), "ForceRestart") {
		t.Errorf("Reset(Explode) = %v; want the types that are supported", err)
	}
	a.denied = fmt.Errorf("agreement a1 does not give %q: %w", "power", access.ErrDenied)
	err := c.Reset(t.Context(), schema.ResetForceOff)
	var e *client.Error
	if !errors.As(err, &e) || e.Status != 403 || !strings.Contains(strings.ToLower(err.Error()), "agreement a1") {
		t.Errorf("Reset without the right = %v; want 403 that names the agreement", err)
	}
}

// What few service processors can do is offered only where one says that it can.
func TestPause(t *testing.T) {
	a := newFakeAgent()
	c := connect(t, a)
	if err := c.Reset(t.Context(), schema.ResetPause); err == nil || !strings.Contains(err.Error(), "ForceRestart") {
		t.Errorf("Pause where nobody says that it can be = %v; want the types that are supported", err)
	}
	a = newFakeAgent()
	a.controller.resets = []schema.ResetType{schema.ResetOn, schema.ResetForceOff, schema.ResetPause, schema.ResetResume}
	a.controller.watchdog = &schema.WatchdogTimer{FunctionEnabled: true, TimeoutAction: "ResetSystem", Status: &schema.Status{State: schema.StateEnabled}}
	c = connect(t, a)
	s, err := c.System(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"On", "ForceOff", "ForceOn", "Pause", "Resume"}, s.Actions["#ComputerSystem.Reset"].Allowable["ResetType"]); d != "" {
		t.Errorf("reset types (-want +got):\n%s", d)
	}
	if d := cmp.Diff(a.controller.watchdog, s.Watchdog); d != "" {
		t.Errorf("watchdog (-want +got):\n%s", d)
	}
	for _, step := range []struct {
		reset schema.ResetType
		op    string
		power schema.PowerState
	}{{schema.ResetPause, heal.OrderPause, schema.PowerPaused}, {schema.ResetResume, heal.OrderResume, schema.PowerOn}} {
		a.ops = nil
		if err := c.Reset(t.Context(), step.reset); err != nil || !slices.Equal(a.ops, []string{step.op + " by " + testUser}) {
			t.Errorf("Reset(%s) = %v, and did %q", step.reset, err, a.ops)
		}
		if s, err := c.System(t.Context()); err != nil || s.PowerState != step.power {
			t.Errorf("after %s: power %q, %v; want %q", step.reset, s.PowerState, err, step.power)
		}
	}
}

func TestFindings(t *testing.T) {
	a := newFakeAgent()
	a.findings = append(a.findings, detect.Finding{ID: "suspected-1", Suspicion: true})
	c := connect(t, a)
	var got []detect.Finding
	for e, err := range client.Members[schema.LogEntry](t.Context(), c, client.FindingsURI) {
		if err != nil {
			t.Fatal(err)
		}
		var o findingOEM
		if ok, err := client.OEM(e.OEM, &o); !ok || err != nil {
			t.Fatalf("Oem of %s: %v, %v", e.ID, ok, err)
		}
		if e.ID != o.Finding.ID || e.Message == "" || e.Created != schema.Time(o.Finding.FirstSeen) || *e.Resolved != (o.Finding.Resolved != nil) || e.Severity != severity(o.Finding.Severity) {
			t.Errorf("entry %+v of finding %+v", e, o.Finding)
		}
		if want := a.Outcomes(e.ID); len(o.Outcomes) != len(want) || len(want) > 0 && o.Outcomes[0].Plan.ID != want[0].Plan.ID {
			t.Errorf("outcomes of %s = %+v; want %+v", e.ID, o.Outcomes, want)
		}
		got = append(got, o.Finding)
	}
	if d := cmp.Diff(a.findings[:2], got); d != "" {
		t.Errorf("findings through Redfish (-want +got):\n%s", d)
	}
}

func TestDmesg(t *testing.T) {
	c := connect(t, newFakeAgent())
	n := 0
	for e, err := range client.Members[schema.LogEntry](t.Context(), c, client.DmesgURI) {
		if err != nil {
			t.Fatal(err)
		}
		var o kernelRecordOEM
		if ok, err := client.OEM(e.OEM, &o); !ok || err != nil {
			t.Fatalf("Oem of %s: %v, %v", e.ID, ok, err)
		}
		want := kernel.LogRecord{Seq: uint64(n), Time: time.Duration(n) * time.Second, Level: uint8(n % 8), Text: fmt.Sprintf("line %d", n)}
		if o.Record != want || e.Message != want.Text || e.Created != schema.Time(bootTime.Add(want.Time)) {
			t.Errorf("record %d = %+v, entry %+v", n, o.Record, e)
		}
		n++
	}
	if n != 700 {
		t.Errorf("%d records; want 700", n)
	}
}

func TestJournal(t *testing.T) {
	c := connect(t, newFakeAgent())
	var got []journalRecord
	for e, err := range client.Members[schema.LogEntry](t.Context(), c, client.JournalURI) {
		if err != nil {
			t.Fatal(err)
		}
		var o journalRecordOEM
		if ok, err := client.OEM(e.OEM, &o); !ok || err != nil {
			t.Fatalf("Oem of %s: %v, %v", e.ID, ok, err)
		}
		got = append(got, o.Record)
	}
	want := []journalRecord{
		{Restart: 1 << 63, Seq: 1, Time: bootTime, Kind: "finding", Data: `{"id":"runaway-process-2"}`},
		{Restart: 1 << 63, Seq: 2, Time: bootTime, Kind: "intent"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("journal through Redfish (-want +got):\n%s", d)
	}
}

func TestOEMResources(t *testing.T) {
	a := newFakeAgent()
	c := connect(t, a)
	var state struct{ State engine.State }
	if err := c.Get(t.Context(), client.StateURI, &state); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(a.state, state.State); d != "" {
		t.Errorf("state through Redfish (-want +got):\n%s", d)
	}
	var tasks struct{ Processes query.Processes }
	if err := c.Get(t.Context(), client.TasksURI, &tasks); err != nil {
		t.Fatal(err)
	}
	want, err := query.PS(t.Context(), fakeView{}, query.PSOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, tasks.Processes); d != "" {
		t.Errorf("processes through Redfish (-want +got):\n%s", d)
	}
}

func TestUndo(t *testing.T) {
	c := connect(t, newFakeAgent())
	var out struct {
		Plan    heal.Plan
		Outcome *heal.Outcome
	}
	task, err := c.UndoHeal(t.Context(), client.UndoRequest{Finding: "cpu-stall-1", DryRun: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.OEM(task.OEM, &out); err != nil || out.Plan.Action != heal.ContinueProcess || out.Outcome != nil {
		t.Errorf("dry run = %+v, %v", out, err)
	}
	other := out.Plan
	other.Target = &heal.Target{PID: 1}
	if _, err := c.UndoHeal(t.Context(), client.UndoRequest{Finding: "cpu-stall-1", Plan: other.Digest()}, nil); err == nil || !strings.Contains(err.Error(), "moved on") {
		t.Errorf("undo by another plan = %v", err)
	}
	if task, err = c.UndoHeal(t.Context(), client.UndoRequest{Finding: "cpu-stall-1", Plan: out.Plan.Digest()}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := client.OEM(task.OEM, &out); err != nil || out.Outcome == nil || !out.Outcome.Verified || out.Outcome.Caller != testUser {
		t.Errorf("undo = %+v, %v", out, err)
	}
	var failed *client.TaskError
	if _, err := c.UndoHeal(t.Context(), client.UndoRequest{Finding: "cpu-stall-1"}, nil); !errors.As(err, &failed) || !strings.Contains(err.Error(), "nothing to take back") {
		t.Errorf("a second undo = %v", err)
	}
	var refused *client.Error
	if _, err := c.UndoHeal(t.Context(), client.UndoRequest{Finding: "nonsense"}, nil); !errors.As(err, &refused) || refused.Status != 404 {
		t.Errorf("undo of nothing = %v; want 404", err)
	}
}

func TestHeal(t *testing.T) {
	a := newFakeAgent()
	c := connect(t, a)
	type result struct {
		Plan    heal.Plan
		Digest  string
		Outcome *heal.Outcome
	}
	run := func(r client.HealRequest) (*schema.Task, result, error) {
		t.Helper()
		steps := 0
		task, err := c.Heal(t.Context(), r, func(schema.Task) { steps++ })
		var out result
		if task != nil {
			if steps == 0 {
				t.Error("no progress was told")
			}
			if _, err := client.OEM(task.OEM, &out); err != nil {
				t.Fatal(err)
			}
		}
		return task, out, err
	}

	_, dry, err := run(client.HealRequest{Finding: "runaway-process-2", DryRun: true})
	if err != nil || dry.Plan.Title != "Kill stress (412)" || dry.Outcome != nil {
		t.Errorf("dry run = %+v, %v", dry, err)
	}
	if got := dry.Plan.Steps[0]; !bytes.Equal(got.Put, []byte{3, 4}) || got.Addr != 0x1000 || dry.Plan.Calls[0].Addr != 0xffffffff81000000 {
		t.Errorf("the plan has changed on its way: %+v", dry.Plan)
	}
	if len(dry.Digest) != 64 || dry.Digest != dry.Plan.Digest() {
		t.Errorf("digest %q; the plan's is %q", dry.Digest, dry.Plan.Digest())
	}
	// What somebody has agreed to is done, and nothing else.
	other := dry.Plan
	other.Target = &heal.Target{PID: 1}
	if _, out, err := run(client.HealRequest{Finding: "runaway-process-2", Plan: other.Digest()}); err == nil || out.Outcome != nil || !strings.Contains(err.Error(), "moved on") {
		t.Errorf("heal by another plan = %+v, %v", out, err)
	}
	if _, out, err := run(client.HealRequest{Finding: "runaway-process-2", Plan: dry.Digest}); err != nil || out.Outcome == nil {
		t.Errorf("heal by the plan = %+v, %v", out, err)
	}
	_, done, err := run(client.HealRequest{Finding: "runaway-process-2"})
	if err != nil || done.Outcome == nil || !done.Outcome.Verified || done.Outcome.Caller != testUser || len(done.Outcome.HostFunctions) != 1 {
		t.Errorf("heal = %+v, %v", done, err)
	}

	a.verified = false
	task, failed, err := run(client.HealRequest{Finding: "runaway-process-2"})
	var te *client.TaskError
	if !errors.As(err, &te) || task.TaskState != schema.TaskException || failed.Outcome == nil || failed.Outcome.Verified {
		t.Errorf("heal that does not work = %+v, %v", failed, err)
	}

	// A value goes with the request, is part of what is agreed to, and is refused at once if it is none.
	number := func(n int64) *int64 { return &n }
	a.verified = true
	_, dry, err = run(client.HealRequest{Finding: "runaway-process-2", Setting: "kernel.panic", Value: number(0), DryRun: true})
	if err != nil || dry.Plan.Value == nil || *dry.Plan.Value != (heal.Value{Name: "kernel.panic"}) {
		t.Errorf("dry run with a value: %+v, %v", dry.Plan.Value, err)
	}
	if _, _, err := run(client.HealRequest{Finding: "runaway-process-2", Setting: "kernel.panic", Value: number(1), Plan: dry.Digest}); err == nil || !strings.Contains(err.Error(), "moved on") {
		t.Errorf("another value than was agreed to: %v", err)
	}
	if _, done, err := run(client.HealRequest{Finding: "runaway-process-2", Setting: "kernel.panic", Value: number(0), Plan: dry.Digest}); err != nil || done.Outcome == nil {
		t.Errorf("with a value: %+v, %v", done, err)
	}
	var e *client.Error
	for _, tt := range []struct {
		r    client.HealRequest
		want string
	}{
		{client.HealRequest{Setting: "kernel.panic"}, "Value"},
		{client.HealRequest{Value: number(3)}, "Setting"},
		{client.HealRequest{Setting: "kernel.core_pattern", Value: number(3)}, "kernel.core_pattern"},
		{client.HealRequest{Setting: "kernel.panic", Value: number(-2)}, "give kernel.panic=-1..86400 s"},
		{client.HealRequest{Action: "kill-process", Setting: "kernel.panic", Value: number(1)}, "kernel.panic is what set-sysctl sets"},
		{client.HealRequest{Action: "format-disk"}, "format-disk"},
	} {
		tt.r.Finding = "runaway-process-2"
		if _, _, err := run(tt.r); !errors.As(err, &e) || e.Status != 400 || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v; want 400 and %q", tt.r, err, tt.want)
		}
	}

	_, _, err = run(client.HealRequest{Finding: "nonsense"})
	if !errors.As(err, &e) || e.Status != 404 || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("heal of nothing = %v; want 404", err)
	}
	for _, cause := range []error{engine.ErrBusy, engine.ErrWritesOff, engine.ErrNotAttached, heal.ErrProtected, heal.ErrStale, heal.ErrGone, fmt.Errorf("agreement a1: %w", access.ErrDenied)} {
		a.healErr = cause
		if _, _, err := run(client.HealRequest{Finding: "runaway-process-2"}); err == nil || !strings.Contains(strings.ToLower(err.Error()), cause.Error()) {
			t.Errorf("heal with %q = %v; want the reason to be told", cause, err)
		}
	}
}

// TestNothingIsKnown wants no property that the agent cannot know.
func TestNothingIsKnown(t *testing.T) {
	a := &fakeAgent{noPower: true, state: engine.State{Phase: engine.NoMemory, Health: engine.CouldNotTell}}
	c := connect(t, a)
	var system map[string]any
	if err := c.Get(t.Context(), "/redfish/v1/Systems/system", &system); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"PowerState", "HostName", "UUID", "LastResetTime", "BootProgress", "ProcessorSummary", "MemorySummary", "Manufacturer", "Model", "SerialNumber"} {
		if v, ok := system[name]; ok {
			t.Errorf("%s is %v", name, v)
		}
	}
	if s, _ := system["Status"].(map[string]any); s["Health"] != nil {
		t.Errorf("Status is %v", s)
	}
}

func TestRefusals(t *testing.T) {
	for err, want := range map[error]int{
		engine.ErrNotAttached: 503, engine.ErrBusy: 409, engine.ErrWritesOff: 403, engine.ErrNoFinding: 404,
		access.ErrDenied: 403, heal.ErrProtected: 403, heal.ErrStale: 409, heal.ErrMismatch: 409, heal.ErrGone: 409, errors.New("else"): 500,
	} {
		var e *service.Error
		if got := refusal(fmt.Errorf("heal: %w", err)); !errors.As(got, &e) || e.Status != want {
			t.Errorf("refusal(%v) = %v; want %d", err, got, want)
		}
	}
}

var update = flag.Bool("update", false, "rewrite the golden schemas")

// TestSchemas compares the CSDL with the released files. A released version must not change in a way that breaks its readers:
// new properties are fine, renamed or removed ones need a new version.
func TestSchemas(t *testing.T) {
	for _, s := range schemas() {
		path := filepath.Join("testdata", s.Namespace+"_v1.xml")
		if *update {
			if err := os.WriteFile(path, s.CSDL(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), string(s.CSDL())); d != "" {
			t.Errorf("%s differs; if that is meant, run the test with -update (-want +got):\n%s", path, d)
		}
	}
}

// TestResourcesFitDMTFsSchemas reads every resource and checks it against DMTF's JSON schema of its type.
func TestResourcesFitDMTFsSchemas(t *testing.T) {
	dir := filepath.Join(os.Getenv("DMTF"), "json-schema")
	if os.Getenv("DMTF") == "" {
		t.Skip("DMTF does not name a folder with DMTF's files of release 2025.4; see redfish/README.md")
	}
	a := newFakeAgent()
	a.image = recordedKernel(t)
	a.attestor = newTestTPM(t)
	c := connect(t, a)
	if _, err := c.Heal(t.Context(), client.HealRequest{Finding: "runaway-process-2"}, nil); err != nil {
		t.Fatal(err) // so that there is a task
	}
	checker := schemaChecker{dir: dir, files: map[string]map[string]any{}}
	todo, seen := []string{"/redfish/v1/"}, map[string]bool{}
	for len(todo) > 0 {
		uri := todo[0]
		todo = todo[1:]
		if seen[uri] {
			continue
		}
		seen[uri] = true
		var v map[string]any
		if err := c.Get(t.Context(), uri, &v); err != nil {
			t.Errorf("GET %s: %v", uri, err)
			continue
		}
		todo = append(todo, links(v)...)
		typ, _ := v["@odata.type"].(string)
		if strings.HasPrefix(typ, "#Backdoor") {
			continue
		}
		parts := strings.Split(strings.TrimPrefix(typ, "#"), ".")
		file := strings.Join(parts[:max(len(parts)-1, 1)], ".") + ".json"
		checker.ref(t, uri, v, file, "#/definitions/"+parts[len(parts)-1])
	}
	if len(seen) < 60 {
		t.Errorf("only %d resources were checked", len(seen))
	}
}

// TestResourcesFitOurSchemas reads every resource of ours, and every object of ours in others, and checks it against the JSON schema
// that the service itself serves for its type.
func TestResourcesFitOurSchemas(t *testing.T) {
	a := newFakeAgent()
	a.image = recordedKernel(t)
	a.attestor = newTestTPM(t)
	c := connect(t, a)
	if _, err := c.Heal(t.Context(), client.HealRequest{Finding: "runaway-process-2"}, nil); err != nil {
		t.Fatal(err) // so that there is a task
	}
	checker := schemaChecker{dir: t.TempDir(), files: map[string]map[string]any{}}
	checked := map[string]bool{}
	var look func(where string, v any)
	look = func(where string, v any) {
		switch v := v.(type) {
		case map[string]any:
			if typ, _ := v["@odata.type"].(string); strings.HasPrefix(typ, "#Backdoor") {
				parts := strings.Split(strings.TrimPrefix(typ, "#"), ".")
				id := parts[0] + "." + parts[1]
				if checker.files[id+".json"] == nil {
					var file schema.JSONSchemaFile
					var doc map[string]any
					if err := c.Get(t.Context(), "/redfish/v1/JsonSchemas/"+id, &file); err != nil {
						t.Fatalf("%s: %v", where, err)
					}
					if err := c.Get(t.Context(), file.Location[0].URI, &doc); err != nil {
						t.Fatalf("%s: %v", where, err)
					}
					checker.files[id+".json"] = doc
				}
				checker.ref(t, where, v, id+".json", "#/definitions/"+parts[2])
				checked[typ] = true
			}
			for name, item := range v {
				look(where+"/"+name, item)
			}
		case []any:
			for i, item := range v {
				look(fmt.Sprintf("%s/%d", where, i), item)
			}
		}
	}
	todo, seen := []string{"/redfish/v1/"}, map[string]bool{}
	for len(todo) > 0 {
		uri := todo[0]
		todo = todo[1:]
		if seen[uri] {
			continue
		}
		seen[uri] = true
		var v map[string]any
		if err := c.Get(t.Context(), uri, &v); err != nil {
			t.Errorf("GET %s: %v", uri, err)
			continue
		}
		todo = append(todo, links(v)...)
		look(uri, v)
	}
	for _, s := range schemas() {
		if s.Namespace == "BackdoorLogService" || s.Namespace == "BackdoorMemoryLease" {
			continue // actions only; and there is no lease
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(checked)), func(typ string) bool { return strings.HasPrefix(typ, "#"+s.Namespace+".") }) {
			t.Errorf("nothing of %s was checked", s.Namespace)
		}
	}
}

// links returns all resources that a value points to, except for most entries of long logs.
func links(v any) (out []string) {
	switch v := v.(type) {
	case map[string]any:
		if id, ok := v["@odata.id"].(string); ok && !regexp.MustCompile(`Dmesg/Entries/\d{2}`).MatchString(id) {
			out = append(out, id)
		}
		if id, ok := v["@Redfish.ActionInfo"].(string); ok {
			out = append(out, id)
		}
		for _, item := range v {
			out = append(out, links(item)...)
		}
	case []any:
		for _, item := range v {
			out = append(out, links(item)...)
		}
	}
	return out
}

// schemaChecker checks values against the part of JSON schema that DMTF uses.
type schemaChecker struct {
	dir   string
	files map[string]map[string]any
}

// ref checks a value against a definition in a schema file.
func (c *schemaChecker) ref(t *testing.T, where string, v any, file, pointer string) {
	t.Helper()
	if m, ok := v.(map[string]any); ok && len(m) == 1 && m["@odata.id"] != nil {
		return // a link stands for what it points to
	}
	if strings.HasPrefix(pointer, "http") {
		var rest string
		rest, pointer, _ = strings.Cut(pointer, "#")
		file, pointer = filepath.Base(rest), "#"+pointer
	}
	doc := c.files[file]
	if doc == nil {
		b, err := os.ReadFile(filepath.Join(c.dir, file))
		if os.IsNotExist(err) {
			// Only the newest versions are there; and what is unversioned points to all versions.
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatal(err)
		}
		c.files[file] = doc
	}
	var node any = doc
	for step := range strings.SplitSeq(strings.TrimPrefix(pointer, "#/"), "/") {
		m, _ := node.(map[string]any)
		node = m[step]
	}
	def, _ := node.(map[string]any)
	if def == nil {
		t.Errorf("%s: %s has no %s", where, file, pointer)
		return
	}
	c.check(t, where, v, file, def)
}

func (c *schemaChecker) check(t *testing.T, where string, v any, file string, def map[string]any) {
	t.Helper()
	if ref, ok := def["$ref"].(string); ok {
		c.ref(t, where, v, file, ref)
		return
	}
	if any, ok := def["anyOf"].([]any); ok {
		// Versions of one type, or a type and null: what is not null must fit the last that can be looked up.
		if v == nil {
			return
		}
		for _, alternative := range slices.Backward(any) {
			m, _ := alternative.(map[string]interface{})
			if m["type"] == "null" {
				continue
			}
			c.check(t, where, v, file, m)
			return
		}
	}
	if want, ok := def["type"].(string); ok && !ofType(v, want) {
		t.Errorf("%s: %v is no %s", where, v, want)
	}
	if enum, ok := def["enum"].([]any); ok && !slices.Contains(enum, v) {
		t.Errorf("%s: %v is not one of %v", where, v, enum)
	}
	switch v := v.(type) {
	case map[string]any:
		properties, _ := def["properties"].(map[string]any)
		patterns, _ := def["patternProperties"].(map[string]any)
		for name, item := range v {
			if p, ok := properties[name].(map[string]any); ok {
				c.check(t, where+"/"+name, item, file, p)
				continue
			}
			known := def["additionalProperties"] != false || name == "Oem"
			for pattern := range patterns {
				// Go's regular expressions have no look-ahead, which only restricts what may stand before an annotation.
				known = known || strings.Contains(name, "@") || !strings.Contains(pattern, "@") && regexp.MustCompile(pattern).MatchString(name)
			}
			if !known {
				t.Errorf("%s: property %s is not in %s", where, name, file)
			}
		}
		required, _ := def["required"].([]any)
		for _, name := range required {
			if _, ok := v[name.(string)]; !ok {
				t.Errorf("%s: property %v is required", where, name)
			}
		}
	case []any:
		if items, ok := def["items"].(map[string]any); ok {
			for i, item := range v {
				c.check(t, fmt.Sprintf("%s/%d", where, i), item, file, items)
			}
		}
	case string:
		if pattern, ok := def["pattern"].(string); ok {
			if re, err := regexp.Compile(pattern); err == nil && !re.MatchString(v) {
				t.Errorf("%s: %q does not match %s", where, v, pattern)
			}
		}
	}
}

// ofType reports whether a value is of a type of JSON schema.
func ofType(v any, want string) bool {
	switch v := v.(type) {
	case map[string]any:
		return want == "object"
	case []any:
		return want == "array"
	case string:
		return want == "string"
	case bool:
		return want == "boolean"
	case float64:
		return want == "number" || want == "integer" && v == math.Trunc(v)
	}
	return want == "null"
}
