package engine

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/policy"
)

// What earlier starts have found is known, is over, and its numbers are not given again.
func TestRemembersFindings(t *testing.T) {
	inBubble(t, func(_ *made, o *Options) {
		resolved := time.Now().Add(-time.Hour)
		for _, r := range []struct {
			kind string
			v    any
		}{
			{"finding", detect.Finding{ID: "panic-6", Kind: detect.KindPanic, Title: "old"}},
			{"resolved", detect.Finding{ID: "panic-6", Kind: detect.KindPanic, Title: "old", Resolved: &resolved, Resolution: "rebooted"}},
			{"finding", detect.Finding{ID: "panic-7", Kind: detect.KindPanic, Title: "stood", Cause: "a cause that is gone"}},
			{"intent", map[string]any{"plan": heal.Plan{ID: "plan-41", Finding: "panic-6", Action: heal.PowerCycle}}},
			{"outcome", heal.Outcome{Plan: heal.Plan{ID: "plan-41", Finding: "panic-6", Action: heal.PowerCycle}, Verified: true}},
			{"finding", map[string]any{"id": "panic-99999999999999999999"}}, // nothing that we write
			{"finding", map[string]any{"id": 7}},
			{"outcome", "no outcome"},
		} {
			if _, err := o.Journal.Write(r.kind, r.v); err != nil {
				t.Fatal(err)
			}
		}
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		if f, ok := w.e.Finding("panic-6"); !ok || f.Resolved == nil || f.Resolution != "rebooted" {
			t.Errorf("panic-6 = %+v, %v", f, ok)
		}
		if f, ok := w.e.Finding("panic-7"); !ok || f.Resolved == nil || f.Resolution != startedAnew || f.Cause != "" {
			t.Errorf("panic-7 = %+v, %v", f, ok)
		}
		if o := w.e.Outcomes("panic-6"); len(o) != 1 || o[0].Plan.ID != "plan-41" {
			t.Errorf("outcomes of panic-6: %+v", o)
		}
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		if ev := w.wait(time.Second, "panic", ofKind(EventFinding, detect.KindPanic)); ev.Finding.ID != "panic-8" {
			t.Errorf("the next panic is %s; want panic-8", ev.Finding.ID)
		}
		p, _, err := w.e.Heal(t.Context(), HealRequest{Finding: "panic-8", Action: heal.PowerCycle, DryRun: true})
		if p.ID != "plan-42" {
			t.Errorf("the next plan is %s, %v; want plan-42", p.ID, err)
		}
	})
}

// However long the journal, so much is kept and no more.
func TestHistoryIsBounded(t *testing.T) {
	h := newHistory(time.Now(), policy.Policy{})
	put := func(kind string, v any) {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		h.add(journal.Record{Kind: kind, Time: h.now, Data: data})
	}
	for i := range 3 * keepResolved {
		put("finding", detect.Finding{ID: "panic-" + strings.Repeat("1", 1+i%9), Kind: detect.KindPanic})
		put("finding", detect.Finding{ID: fmt.Sprintf("oops-%d", i+1)})
		put("outcome", heal.Outcome{})
	}
	if f, o := h.findings(), h.outcomes(); len(f) != keepResolved || len(o) != keepOutcomes || h.counts["panic"] != 111111111 {
		t.Errorf("%d findings, %d outcomes kept, %d panics; want %d, %d, 111111111", len(f), len(o), h.counts["panic"], keepResolved, keepOutcomes)
	}
}

// What is damaged, or was never written by an agent, is left out.
func FuzzHistory(f *testing.F) {
	f.Add("finding", []byte(`{"id":"panic-3","kind":"panic"}`), "outcome", []byte(`{"plan":{"id":"plan-1","finding":"panic-3"}}`))
	f.Add("intent", []byte(`{"plan":{"id":"plan-2","finding":"panic-3","action":"power-cycle"},"caller":"policy"}`), "resolved", []byte(`{"id":"-1","resolved":"2026-01-01T00:00:00Z"}`))
	f.Fuzz(func(t *testing.T, k1 string, d1 []byte, k2 string, d2 []byte) {
		h := newHistory(time.Unix(1_800_000_000, 0), policy.Policy{})
		h.add(journal.Record{Kind: k1, Time: h.now, Data: d1})
		h.add(journal.Record{Kind: k2, Time: h.now, Data: d2})
		h.outcomes()
		for _, f := range h.findings() {
			if f.Resolved == nil || f.Suspicion {
				t.Errorf("%q and %q: a finding of before is open: %+v", d1, d2, f)
			}
		}
		if h.plans < 0 {
			t.Errorf("%q and %q: the next plan is %d", d1, d2, h.plans+1)
		}
	})
}
