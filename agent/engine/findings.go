package engine

import (
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
)

// tracked is a finding from its first sign on. It has an ID once it is a verdict and has stood for its detector's For.
type tracked struct {
	detect.Finding
	detector string
	quiet    time.Time    // since when the detector has been silent about it; zero while it speaks
	spoke    time.Time    // when the detector last had a verdict about it
	silent   time.Time    // when the detector last ran and was silent about it
	tried    []string     // actions that the engine has begun by itself
	told     bool         // operators have been told that it waits for them
	healing  bool         // a repair is under way, and says itself what has become of the finding
	budget   *heal.Budget // of what is done by itself; nil until something is
	boot     string       // of the kernel that it is about; empty if it is about the host
}

// silentSince reports whether the detector is silent about it now, by a run no earlier than from.
func (t *tracked) silentSince(from time.Time) bool {
	return !t.quiet.IsZero() && !t.silent.Before(from)
}

func trackKey(f detect.Finding) string { return string(f.Kind) + "/" + f.Key }

// update takes in what a detector has reported, with its latest run's findings. e.mu is held.
func (e *Engine) update(d *detect.Detector, found []detect.Finding, now time.Time) {
	seen := make(map[string]bool, len(found))
	for _, f := range found {
		k := trackKey(f)
		seen[k] = true
		t := e.tracked[k]
		if t == nil {
			t = &tracked{detector: d.ID, boot: e.bootID()}
			t.FirstSeen = now
			e.tracked[k] = t
			if f.Suspicion {
				f.FirstSeen, f.LastSeen = now, now
				e.publish(findingEvent(EventSuspicion, f, "suspicion: "+f.Title))
			}
		}
		t.quiet = time.Time{}
		if !f.Suspicion {
			t.spoke = now
		}
		if t.ID != "" && f.Suspicion {
			t.LastSeen = now // the window of the detector began anew; that is no reason to take a verdict back
			continue
		}
		old := t.Finding
		t.Finding = f
		t.ID, t.FirstSeen, t.LastSeen, t.Action, t.Automatic, t.Repairs = old.ID, old.FirstSeen, now, old.Action, old.Automatic, old.Repairs
		if t.ID == "" && !f.Suspicion && now.Sub(t.FirstSeen) >= d.For {
			e.counts[f.Kind]++
			t.ID = fmt.Sprintf("%s-%d", f.Kind, e.counts[f.Kind])
			d := e.o.Policy.Decide(t.Finding, now, e.past)
			t.Action, t.Automatic = d.Action, d.Automatic || !d.Again.IsZero()
			e.fresh = append(e.fresh, t.ID)
			e.record("finding", t.Finding)
			e.publish(findingEvent(EventFinding, t.Finding, t.Title))
		}
	}
	for k, t := range e.tracked {
		if t.detector != d.ID || seen[k] {
			continue
		}
		if t.quiet.IsZero() {
			t.quiet = now
		}
		t.silent = now
		if t.ID == "" {
			delete(e.tracked, k)
		} else if !t.healing && now.Sub(t.quiet) >= d.Clear {
			e.resolve(k, "it is no longer seen")
		}
	}
}

// resolve closes a finding. e.mu is held.
func (e *Engine) resolve(key, how string) {
	t := e.tracked[key]
	if t == nil {
		return
	}
	delete(e.tracked, key)
	if t.ID == "" {
		return
	}
	now := time.Now()
	t.Resolved, t.Resolution, t.Cause = &now, how, ""
	e.resolved = append(e.resolved, t.Finding)
	if len(e.resolved) > keepResolved {
		e.resolved = e.resolved[1:]
	}
	e.record("resolved", t.Finding)
	e.publish(findingEvent(EventResolved, t.Finding, fmt.Sprintf("%s: %s", t.Title, how)))
}

// resolveID closes the open finding with that ID, if there is one. e.mu is held.
func (e *Engine) resolveID(id, how string) {
	for k, t := range e.tracked {
		if t.ID == id {
			e.resolve(k, how)
			return
		}
	}
}

// open returns the open finding with that ID. e.mu is held.
func (e *Engine) open(id string) *tracked {
	for _, t := range e.tracked {
		if t.ID != "" && t.ID == id {
			return t
		}
	}
	return nil
}

// cause returns the ID of an open finding of a kind that explains those of a detector, or "". e.mu is held.
func (e *Engine) cause(d *detect.Detector) string {
	for _, k := range d.DependsOn {
		for _, t := range e.tracked {
			if t.ID != "" && t.Kind == k {
				return t.ID
			}
		}
	}
	return ""
}

// newKernel closes what was about a kernel that is gone. e.mu is held.
func (e *Engine) newKernel(boot string) {
	for k, t := range e.tracked {
		switch {
		case t.boot == boot || t.healing:
		case t.boot == "":
			e.resolve(k, "the host can be read again")
		default:
			e.resolve(k, "the host runs a newly started kernel")
		}
	}
}

// bootID is that of the attached kernel. e.mu is held.
func (e *Engine) bootID() string {
	if e.target == nil {
		return ""
	}
	return e.target.Info().BootID
}
