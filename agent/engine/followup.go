package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
)

// callerFollowUp is who ends what an earlier start of the agent has begun.
const callerFollowUp = "agent"

// unfinished is what an earlier start of the agent has left to be done on a kernel.
type unfinished struct {
	begun []heal.Plan    // of which no outcome is known, the oldest first
	held  []heal.Outcome // what is still held in force for a repair
	left  []heal.Plan    // what has left something in the host's memory
}

// unfinishedOn reads the journal for it. Numbers of plans may come again after a start, which the journal marks: it forgets its oldest records.
func unfinishedOn(records func(func(journal.Record, error) bool), boot string) unfinished {
	var out unfinished
	type run struct {
		begun, left []heal.Plan
		held        []heal.Outcome
	}
	var now run
	without := func(ps []heal.Plan, id string) []heal.Plan {
		var rest []heal.Plan
		for _, p := range ps {
			if p.ID != id {
				rest = append(rest, p)
			}
		}
		return rest
	}
	for rec, err := range records {
		if err != nil {
			continue // what is damaged is told by who reads the journal
		}
		switch rec.Kind {
		case "start":
			out.begun, out.held, out.left = append(out.begun, now.begun...), append(out.held, now.held...), append(out.left, now.left...)
			now = run{}
		case "intent":
			var in struct{ Plan heal.Plan }
			if json.Unmarshal(rec.Data, &in) == nil && in.Plan.Kernel != nil && in.Plan.Kernel.BootID == boot {
				now.begun = append(now.begun, in.Plan)
			}
		case "outcome":
			var o heal.Outcome
			if json.Unmarshal(rec.Data, &o) != nil || o.Plan.Kernel == nil || o.Plan.Kernel.BootID != boot {
				continue
			}
			now.begun = without(now.begun, o.Plan.ID)
			if _, held := heal.Lift([]heal.Outcome{o}); held {
				now.held = append(now.held, o)
			}
			if o.Error == "" {
				for _, id := range o.Plan.Lifts {
					var rest []heal.Outcome
					for _, h := range now.held {
						if h.Plan.ID != id {
							rest = append(rest, h)
						}
					}
					now.held = rest
				}
			}
			if len(o.Left) > 0 {
				now.left = append(now.left, o.Plan)
			}
		}
	}
	return out
}

// leftLease returns the journal's record of a lease that was taken and not given back; nil if there is none.
func leftLease(records func(func(journal.Record, error) bool)) []byte {
	var last []byte
	for rec, err := range records {
		if err != nil || rec.Kind != heal.LeaseKind {
			continue
		}
		var l struct{ Free bool }
		if last = slices.Clone(rec.Data); json.Unmarshal(rec.Data, &l) == nil && l.Free {
			last = nil
		}
	}
	return last
}

// followUp ends what an earlier start of the agent has begun on the kernel that is attached now. The caller holds the
// healing token, which it gives back.
func (e *Engine) followUp(ctx context.Context) {
	defer func() { <-e.healing }()
	ctx, cancel := context.WithTimeout(ctx, healTimeout)
	defer cancel()
	defer context.AfterFunc(e.running, cancel)()
	e.mu.Lock()
	if e.target == nil || e.target.image() == nil || e.o.Journal == nil || !e.o.Writes {
		e.mu.Unlock()
		return
	}
	img, mem, grant, boot := e.target.image(), e.mem, e.grant(), e.bootID()
	e.mu.Unlock()
	todo := unfinishedOn(e.o.Journal.Records(), boot)
	if len(todo.begun)+len(todo.held)+len(todo.left) == 0 && leftLease(e.o.Journal.Records()) == nil {
		return
	}
	x := e.executor(mem, img, grant, detect.Finding{}, boot, nil)
	var errs []error
	for i := len(todo.begun) - 1; i >= 0; i-- {
		p := todo.begun[i]
		left, err := x.Settle(ctx, p)
		errs = append(errs, err)
		if len(left) > 0 || errors.Is(err, heal.ErrNotYet) {
			todo.left = append(todo.left, p)
		}
	}
	if lift, held := heal.Lift(todo.held); held {
		lift.ID, lift.Made, lift.More = "lift-"+fmt.Sprint(time.Now().UnixNano()), time.Now(), true
		_, err := x.ApplyNext(ctx, lift, callerFollowUp)
		errs = append(errs, err)
	}
	errs = append(errs, x.GiveBack(ctx))
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, p := range todo.left {
		e.left = append(e.left, leftover{p, boot})
	}
	if err := errors.Join(errs...); err != nil {
		e.note("end what an earlier start of the agent has begun", err)
	}
	e.record("followed-up", map[string]int{"begun": len(todo.begun), "held": len(todo.held), "left": len(todo.left)})
}
