package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/detect"
)

const document = `{
  "version": 1,
  "detectors": {"runawayFor": "3s", "runawayExempt": [{"first": 500, "last": 599}]},
  "rules": [
    {"finding": "runaway-process", "action": "kill-process", "mode": "automatic", "minConfidence": 0.9, "maxPerHour": 2, "coolDown": "10s"},
    {"finding": "panic", "action": "power-cycle", "mode": "wait"}
  ]
}`

func TestLoad(t *testing.T) {
	p, err := Load(strings.NewReader(document))
	if err != nil {
		t.Fatal(err)
	}
	c := p.DetectConfig()
	if c.RunawayFor != 3*time.Second || c.Heartbeat != detect.DefaultConfig().Heartbeat || !cmp.Equal(c.RunawayExempt, []detect.UIDRange{{First: 500, Last: 599}}) {
		t.Errorf("DetectConfig = %+v", c)
	}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	q, err := Load(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(p, q); diff != "" {
		t.Error(diff)
	}
	if err := Default().Check([]string{"kill-process", "power-cycle", "stop-fork-bomb", "reboot-host", "restart-host", "restore-kernel", "raise-limit", "rate-limit", "quarantine", "sync-disks",
		"normalize-realtime", "unhook-probe", "relink-hidden"}); err != nil {
		t.Errorf("the default policy: %v", err)
	}
	if err := p.Check([]string{"kill-process"}); err == nil || !strings.Contains(err.Error(), `rules[1].action: "power-cycle"`) {
		t.Errorf("Check with an action missing = %v", err)
	}
}

// An action's value is the rule's, for the action that it stands with, and an older document has none.
func TestSet(t *testing.T) {
	p, err := Load(strings.NewReader(`{"version": 1, "rules": [
		{"finding": "memory-hog", "action": "set-memory-max", "set": {"name": "memory.max", "number": 536870912}, "mode": "automatic", "maxPerHour": 1, "then": "set-sysctl", "thenSet": {"name": "kernel.panic", "number": -1}},
		{"finding": "panic", "action": "power-cycle", "mode": "wait"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	hog := detect.Finding{Kind: detect.KindMemoryHog}
	for action, want := range map[string]*Value{"set-memory-max": {"memory.max", 512 << 20}, "set-sysctl": {"kernel.panic", -1}, "kill-process": nil, "": nil} {
		if got := p.Set(hog, action); !cmp.Equal(got, want) {
			t.Errorf("Set(%q) = %v; want %v", action, got, want)
		}
	}
	if got := p.Set(detect.Finding{Kind: detect.KindPanic}, "power-cycle"); got != nil {
		t.Errorf("what has none is given %v", got)
	}
	if got := p.Set(detect.Finding{Kind: detect.KindOops}, "power-cycle"); got != nil {
		t.Errorf("what has no rule is given %v", got)
	}
	for _, set := range []string{`{"name": "memory.max", "number": "512M"}`, `{"name": "memory.max", "number": 1.5}`, `{"name": "memory.max", "number": 1e30}`, `"memory.max=1"`, `{"name": "memory.max", "value": 1}`} {
		if _, err := Load(strings.NewReader(`{"version": 1, "rules": [{"finding": "memory-hog", "action": "set-memory-max", "set": ` + set + `, "mode": "wait"}]}`)); !errors.Is(err, ErrInvalid) {
			t.Errorf("set %s: %v", set, err)
		}
	}
	if _, err := Load(strings.NewReader(`{"version": 1, "rules": [{"finding": "memory-hog", "action": "kill-process", "thenSet": {"name": "x", "number": 1}, "mode": "wait"}]}`)); err == nil || !strings.Contains(err.Error(), "rules[0].thenSet") {
		t.Errorf("a value for nothing: %v", err)
	}
}

func TestLoadRefuses(t *testing.T) {
	for _, tt := range []struct{ old, new, want string }{
		{`"version": 1`, `"version": 2`, "reads version 1"},
		{`"rules"`, `"rulez"`, `unknown field "rulez"`},
		{`"panic"`, `"panik"`, "is none of"},
		{`"panic"`, `"panic/probe"`, "tampering/probe"},
		{`"panic"`, `"panic/"`, "is none of"},
		{`"panic"`, `"runaway-process"`, "has its rule in rules[0] already"},
		{`"wait"`, `"maybe"`, "must be"},
		{`"maxPerHour": 2, `, ``, "must say how often"},
		{`"3s"`, `3`, `write it as a string`},
		{`"3s"`, `"-3s"`, `negative`},
		{`"3s"`, `"1ms"`, `runawayFor`},
		{`"minConfidence": 0.9`, `"minConfidence": 9`, "from 0 to 1"},
		{`"coolDown": "10s"`, `"then": "kill-process"`, "same action"},
		{`"first": 500`, `"first": 600`, "wrong way round"},
	} {
		_, err := Load(strings.NewReader(strings.Replace(document, tt.old, tt.new, 1)))
		if !errors.Is(err, ErrInvalid) && err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Load with %s = %v; want %q", tt.new, err, tt.want)
		}
	}
	if _, err := Load(strings.NewReader(document + "x")); err == nil {
		t.Error("Load with something behind the document succeeded")
	}
}

// A rule for an aspect of a kind goes before the one for the kind, and each counts for itself.
func TestAspects(t *testing.T) {
	p, err := Load(strings.NewReader(`{"version": 1, "rules": [
		{"finding": "tampering", "action": "restore-kernel", "mode": "wait"},
		{"finding": "tampering/probe", "action": "unhook-probe", "mode": "automatic", "maxPerHour": 1}]}`))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1_800_000_000, 0)
	for _, tt := range []struct {
		aspect, action string
		past           []Past
		automatic      bool
	}{
		{"", "restore-kernel", nil, false},
		{detect.AspectHidden, "restore-kernel", nil, false},
		{detect.AspectProbe, "unhook-probe", nil, true},
		{detect.AspectProbe, "unhook-probe", []Past{{Kind: detect.KindTampering, At: now}}, true},
		{detect.AspectProbe, "unhook-probe", []Past{{Kind: detect.KindTampering, Rule: detect.AspectProbe, At: now}}, false},
	} {
		d := p.Decide(detect.Finding{Kind: detect.KindTampering, Rule: tt.aspect, Confidence: 0.97}, now, tt.past)
		if d.Action != tt.action || d.Automatic != tt.automatic {
			t.Errorf("%q: %+v; want %s, by itself %v", tt.aspect, d, tt.action, tt.automatic)
		}
	}
}

func TestDecide(t *testing.T) {
	p, err := Load(strings.NewReader(document))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1_800_000_000, 0)
	runaway := detect.Finding{Kind: detect.KindRunawayProcess, Confidence: 0.95}
	past := func(ago ...time.Duration) []Past {
		var out []Past
		for _, a := range ago {
			out = append(out, Past{Kind: detect.KindRunawayProcess, At: now.Add(-a)})
		}
		return out
	}
	unsure, suspicion := runaway, runaway
	unsure.Confidence, suspicion.Suspicion = 0.5, true
	for _, tt := range []struct {
		name string
		f    detect.Finding
		past []Past
		want Decision
	}{
		{"the first", runaway, nil, Decision{Action: "kill-process", Automatic: true, Reason: "policy allows it"}},
		{"unsure", unsure, nil, Decision{Action: "kill-process", Reason: "confidence 0.50 is below the 0.90 that policy asks for"}},
		{"suspicion", suspicion, nil, Decision{Action: "kill-process", Reason: "it is only a suspicion"}},
		{"waits", detect.Finding{Kind: detect.KindPanic, Confidence: 1}, nil, Decision{Action: "power-cycle", Reason: "policy has it wait for an operator"}},
		{"no rule", detect.Finding{Kind: detect.KindCPUStall, Confidence: 1}, nil, Decision{Reason: "policy has no rule for it"}},
		{"cooling down", runaway, past(4 * time.Second), Decision{Action: "kill-process", Reason: "policy has it wait 10s after the one before", Again: now.Add(6 * time.Second)}},
		{"cooled down", runaway, past(10 * time.Second), Decision{Action: "kill-process", Automatic: true, Reason: "policy allows it"}},
		{"too often", runaway, past(50*time.Minute, time.Minute), Decision{Action: "kill-process", Reason: "policy allows 2 an hour, and 2 have been done", Again: now.Add(10 * time.Minute)}},
		{"long ago", runaway, past(2*time.Hour, 61*time.Minute, time.Minute), Decision{Action: "kill-process", Automatic: true, Reason: "policy allows it"}},
		{"others", runaway, []Past{{Kind: detect.KindPanic, At: now}, {Kind: detect.KindPanic, At: now}}, Decision{Action: "kill-process", Automatic: true, Reason: "policy allows it"}},
	} {
		if diff := cmp.Diff(tt.want, p.Decide(tt.f, now, tt.past)); diff != "" {
			t.Errorf("%s: Decide: %s", tt.name, diff)
		}
	}
	if d := Default().Decide(runaway, now, nil); d.Automatic {
		t.Error("the default policy acts by itself")
	}
	if d := (Policy{}).Decide(runaway, now, nil); d.Automatic || d.Action != "" {
		t.Errorf("an empty policy decides %+v", d)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(document))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Load(bytes.NewReader(b))
		if err != nil {
			return
		}
		now := time.Unix(0, 0)
		for _, k := range detect.Kinds() {
			d := p.Decide(detect.Finding{Kind: k, Confidence: 1}, now, nil)
			if d.Automatic && d.Action == "" {
				t.Fatal("acts without an action")
			}
		}
	})
}

func TestFlap(t *testing.T) {
	p := Policy{Version: Version, Flap: Flap{Repairs: 3, Within: Duration(10 * time.Minute)},
		Rules: []Rule{{Finding: "panic", Action: "restart-host", Mode: Automatic, MaxPerHour: 100}}}
	if err := p.Check(nil); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	f := detect.Finding{Kind: detect.KindPanic, Confidence: 1}
	at := func(held bool, ago ...time.Duration) (past []Past) {
		for _, a := range ago {
			past = append(past, Past{Kind: detect.KindPanic, At: now.Add(-a), Held: held})
		}
		return past
	}
	for _, tt := range []struct {
		name string
		past []Past
		flap bool
	}{
		{"none", nil, false},
		{"two", at(false, 8*time.Minute, 4*time.Minute), false},
		{"three", at(false, 12*time.Minute, 8*time.Minute, 4*time.Minute), true},
		{"three, slowly, and never quiet", at(false, 27*time.Minute, 18*time.Minute, 9*time.Minute), true},
		{"three, and a quiet time", at(false, 16*time.Minute, 5*time.Minute, 4*time.Minute), false},
		{"it goes on", append(at(false, 25*time.Minute, 22*time.Minute, 20*time.Minute), at(true, 13*time.Minute, 5*time.Minute)...), true},
		{"quiet since", append(at(false, 35*time.Minute, 32*time.Minute, 30*time.Minute), at(true, 25*time.Minute, 15*time.Minute)...), false},
	} {
		if d := p.Decide(f, now, tt.past); d.Flapping != tt.flap || d.Automatic == tt.flap || tt.flap && !d.Again.IsZero() {
			t.Errorf("%s: %+v", tt.name, d)
		}
	}
	if p.Flap.Repairs = -1; p.Check(nil) == nil {
		t.Error("a negative number of repairs is taken")
	}
}
