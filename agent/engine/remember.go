package engine

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/policy"
)

// startedAnew is how a finding ends that stood when the agent was ended.
const startedAnew = "the agent was started anew; what it still sees it finds under another number"

// remember takes from the journal what was before this start: the latest findings, so that their numbers are given once and their repairs can be
// taken back; and what was begun, so that the policy's and the agreement's rates hold: an agent that shares the host's power would else cycle it
// without end. A time ahead of the clock counts as now.
func (e *Engine) remember() {
	if e.o.Journal == nil {
		return
	}
	h := newHistory(time.Now(), e.o.Policy)
	for rec, err := range e.o.Journal.Records() {
		if err == nil { // what is damaged is told by who reads the journal
			h.add(rec)
		}
	}
	resolved, outcomes := h.findings(), h.outcomes()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.past = h.past[max(0, len(h.past)-keepPast):]
	for action, times := range h.begun {
		e.begun[action] = times[max(0, len(times)-keepPast):]
	}
	e.counts, e.plans, e.resolved, e.outcomes = h.counts, h.plans, resolved, outcomes
}

// history is what the journal tells of earlier starts.
type history struct {
	now    time.Time
	reach  time.Duration // of policy's memory
	past   []policy.Past
	begun  map[string][]time.Time
	counts map[detect.Kind]int // IDs given
	plans  int                 // likewise

	// Whose plan was begun last: a repair in several plans has begun once.
	last struct {
		finding, action string
		at              time.Time
	}

	known []known  // the latest findings, the oldest first
	ended [][]byte // the latest outcomes, likewise
}

// known is a finding as the journal last told it.
type known struct {
	id   string
	data []byte
}

func newHistory(now time.Time, p policy.Policy) *history {
	h := &history{now: now, reach: time.Hour, begun: make(map[string][]time.Time), counts: make(map[detect.Kind]int)}
	for _, r := range p.Rules {
		h.reach = max(h.reach, time.Duration(r.CoolDown))
	}
	return h
}

// add takes in the next record.
func (h *history) add(rec journal.Record) {
	switch rec.Kind {
	case "finding", "resolved":
		var f struct{ ID string }
		if json.Unmarshal(rec.Data, &f) != nil {
			return
		}
		kind, n, ok := numbered(f.ID)
		if !ok {
			return
		}
		h.counts[detect.Kind(kind)] = max(h.counts[detect.Kind(kind)], n)
		h.known = slices.DeleteFunc(h.known, func(k known) bool { return k.id == f.ID })
		h.known = append(h.known, known{f.ID, slices.Clone(rec.Data)})
		h.known = h.known[max(0, len(h.known)-keepResolved):]
	case "outcome":
		h.ended = append(h.ended, slices.Clone(rec.Data))
		h.ended = h.ended[max(0, len(h.ended)-keepOutcomes):]
	case "intent":
		h.intent(rec)
	}
}

// intent takes in that a plan was begun.
func (h *history) intent(rec journal.Record) {
	var in struct {
		Plan   struct{ ID, Finding, Action string }
		Caller string
	}
	if json.Unmarshal(rec.Data, &in) != nil {
		return
	}
	if kind, n, ok := numbered(in.Plan.ID); ok && kind == "plan" {
		h.plans = max(h.plans, n)
	}
	if h.now.Sub(rec.Time) > max(h.reach, access.LongestRate) {
		return
	}
	at := rec.Time
	if at.After(h.now) {
		at = h.now
	}
	if in.Plan.Finding == "" || h.last.finding != in.Plan.Finding || h.last.action != in.Plan.Action || at.Sub(h.last.at) > healTimeout {
		h.begun[in.Plan.Action] = append(h.begun[in.Plan.Action], at)
	}
	h.last.finding, h.last.action, h.last.at = in.Plan.Finding, in.Plan.Action, at
	if in.Caller != callerPolicy || h.now.Sub(rec.Time) > h.reach {
		return
	}
	if kind, _, ok := numbered(in.Plan.Finding); ok {
		h.past = append(h.past, policy.Past{Kind: detect.Kind(kind), At: at})
	}
}

// numbered takes an ID of a finding or a plan apart: its kind and a number.
func numbered(id string) (kind string, n int, ok bool) {
	i := strings.LastIndexByte(id, '-')
	if i <= 0 {
		return "", 0, false
	}
	n64, err := strconv.ParseUint(id[i+1:], 10, 31)
	return id[:i], int(n64), err == nil && n64 > 0
}

// findings returns the latest findings, all of them ended, the oldest first.
func (h *history) findings() []detect.Finding {
	var out []detect.Finding
	for _, k := range h.known {
		var f detect.Finding
		if json.Unmarshal(k.data, &f) != nil {
			continue
		}
		if f.Resolved == nil {
			f.Resolved, f.Resolution = &h.now, startedAnew
		}
		f.Cause, f.Suspicion = "", false
		out = append(out, f)
	}
	return out
}

// outcomes returns the latest outcomes, the oldest first.
func (h *history) outcomes() []heal.Outcome {
	var out []heal.Outcome
	for _, data := range h.ended {
		var o heal.Outcome
		if json.Unmarshal(data, &o) == nil {
			out = append(out, o)
		}
	}
	return out
}
