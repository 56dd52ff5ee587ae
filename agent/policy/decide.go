package policy

import (
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
)

// Past is an action that the engine has begun by itself.
type Past struct {
	Kind detect.Kind
	Rule string // the watch, if one has found it
	At   time.Time
	// Held says that nothing was done, because the fault came back too often.
	Held bool
}

// Decision is what to do about a finding.
type Decision struct {
	Action    string // empty if the policy knows none
	Automatic bool
	// Reason is why the engine acts or does not, for the journal and for people.
	Reason string
	// Again is when an automatic rule that is only held back by its rate may act; zero if it never may.
	Again time.Time
	// Flapping says that the fault comes back in spite of its repairs.
	Flapping bool
}

// Decide says what to do about a finding at a time, after the actions that the engine has already begun by itself.
func (p Policy) Decide(f detect.Finding, now time.Time, past []Past) Decision {
	if i := p.ruleFor(f); i >= 0 {
		r := p.Rules[i]
		d := Decision{Action: r.Action}
		switch {
		case r.Mode != Automatic:
			d.Reason = "policy has it wait for an operator"
			return d
		case f.Suspicion:
			d.Reason = "it is only a suspicion"
			return d
		case f.Confidence < r.MinConfidence:
			d.Reason = fmt.Sprintf("confidence %.2f is below the %.2f that policy asks for", f.Confidence, r.MinConfidence)
			return d
		}
		if n, flap := p.repeated(f, r, now, past), p.flap(); n >= flap.Repairs {
			d.Flapping = true
			d.Reason = fmt.Sprintf("it comes back: %d repairs, and never %v without; policy has it wait for an operator", n, time.Duration(flap.Within))
			return d
		}
		var last, first time.Time
		n := 0
		for _, q := range past {
			if q.Held {
				continue
			}
			if q.Kind != f.Kind || q.Rule != f.Rule && r.Finding != string(f.Kind) {
				continue
			}
			if q.At.After(last) {
				last = q.At
			}
			if now.Sub(q.At) < time.Hour {
				if n++; first.IsZero() || q.At.Before(first) {
					first = q.At
				}
			}
		}
		switch {
		case n >= r.MaxPerHour:
			d.Reason = fmt.Sprintf("policy allows %d an hour, and %d have been done", r.MaxPerHour, n)
			d.Again = first.Add(time.Hour)
		case !last.IsZero() && now.Sub(last) < time.Duration(r.CoolDown):
			d.Reason = fmt.Sprintf("policy has it wait %v after the one before", time.Duration(r.CoolDown))
			d.Again = last.Add(time.Duration(r.CoolDown))
		default:
			d.Automatic, d.Reason = true, "policy allows it"
		}
		return d
	}
	return Decision{Reason: "policy has no rule for it"}
}

// repeated returns how many repairs of findings like this one there were up to now without a quiet time between any two.
func (p Policy) repeated(f detect.Finding, r Rule, now time.Time, past []Past) int {
	n, within := 0, time.Duration(p.flap().Within)
	for _, q := range slices.Backward(past) {
		if q.Kind != f.Kind || q.Rule != f.Rule && r.Finding != string(f.Kind) {
			continue
		}
		if now.Sub(q.At) > within {
			break
		}
		if now = q.At; !q.Held {
			n++
		}
	}
	return n
}

// Set returns the value that the policy gives an action against a finding; nil if it gives none.
func (p Policy) Set(f detect.Finding, action string) *Value {
	i := p.ruleFor(f)
	switch {
	case i < 0 || action == "":
	case p.Rules[i].Action == action:
		return p.Rules[i].Set
	case p.Rules[i].Then == action:
		return p.Rules[i].ThenSet
	}
	return nil
}

// Next returns the action that follows by itself when one has not helped against a finding, or "".
func (p Policy) Next(f detect.Finding, action string) string {
	if i := p.ruleFor(f); i >= 0 && p.Rules[i].Mode == Automatic && p.Rules[i].Action == action {
		return p.Rules[i].Then
	}
	return ""
}
