package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	// keepOutcomes is how many outcomes are kept for Outcomes.
	keepOutcomes   = 50
	healTimeout    = 30 * time.Second // one repair by memory writes, its verification included
	restartTimeout = 6 * time.Minute  // until a restarted host is attached and healthy again
	confirmTimeout = 5 * time.Second
	keepPast       = 1000 // actions begun by policy that are remembered
	liftTimeout    = 15 * time.Second
	planPatience   = 5 * time.Second
	tidyEvery      = 2 * time.Second
	keepLeft       = 200
)

// callerPolicy asks for what policy allows; Heal sees to it that no operator goes by that name.
const callerPolicy = "policy"

// CheckPolicy finds what policy.Load cannot know: rules whose actions do not exist, or are no remedy for their findings.
func CheckPolicy(p policy.Policy) error {
	if err := p.Check(heal.IDs()); err != nil {
		return err
	}
	for i, r := range p.Rules {
		kind, watch, _ := strings.Cut(r.Finding, "/")
		fit := actionsFor(detect.Kind(kind))
		for _, a := range []struct {
			name, id string
			set      *policy.Value
		}{{"action", r.Action, r.Set}, {"then", r.Then, r.ThenSet}} {
			if a.id != "" && !slices.Contains(fit, a.id) {
				return fmt.Errorf("policy: rules[%d].%s: %q is no remedy for a %s; there are %v: %w", i, a.name, a.id, r.Finding, fit, policy.ErrInvalid)
			}
			if do, ok := heal.Find(a.id); ok {
				if err := do.Check((*heal.Value)(a.set)); err != nil {
					return fmt.Errorf("policy: rules[%d].%s: %w: %w", i, a.name, err, policy.ErrInvalid)
				}
			}
			if do, ok := heal.Find(a.id); ok && detect.Kind(kind) == detect.KindPolicy && r.Mode == policy.Automatic && do.Risk > heal.RiskTask {
				return fmt.Errorf("policy: rules[%d].%s: %q would be done by itself whenever somebody on the host meets the condition of watch %q: have it wait: %w", i, a.name, a.id, watch, policy.ErrInvalid)
			}
		}
	}
	return nil
}

// begin counts that an action is begun, whoever asks for it, if the agreement's rate lets it. e.mu is held.
func (e *Engine) begin(grant access.Grant, action string, at time.Time) error {
	if err := grant.PermitRate(action, at, e.begun[action]); err != nil {
		return err
	}
	e.begun[action] = append(e.begun[action], at)
	if n := len(e.begun[action]); n > keepPast {
		e.begun[action] = e.begun[action][n-keepPast:]
	}
	return nil
}

// decide lets policy say what becomes of the open findings, and begins what it allows, one thing at a time.
func (e *Engine) decide(ctx context.Context, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, t := range e.ordered() {
		if t.Cause != "" {
			continue
		}
		d := e.o.Policy.Decide(t.Finding, now, e.past)
		t.Action, t.Automatic = d.Action, d.Automatic || !d.Again.IsZero()
		switch {
		case len(t.tried) > 0:
			continue // it has had its turn; what comes next is up to the escalation
		case !d.Automatic:
			if !t.told && d.Again.IsZero() {
				t.told = true
				if d.Flapping {
					e.past = append(e.past, policy.Past{Kind: t.Kind, Rule: t.Rule, At: now, Held: true})
				}
				e.publish(findingEvent(EventWaiting, t.Finding, fmt.Sprintf("%s waits for an operator: %s", t.ID, d.Reason)))
			}
		default:
			select {
			case e.healing <- struct{}{}:
			default:
				return // another repair is under way; the next pass will see
			}
			t.tried = append(t.tried, d.Action)
			e.past = append(e.past, policy.Past{Kind: t.Kind, Rule: t.Rule, At: now})
			if len(e.past) > 1000 {
				e.past = e.past[len(e.past)-1000:]
			}
			go e.automatic(ctx, t.Finding, d.Action)
		}
	}
}

// ordered returns the open findings, the oldest first. e.mu is held.
func (e *Engine) ordered() []*tracked {
	var ts []*tracked
	for _, t := range e.tracked {
		if t.ID != "" {
			ts = append(ts, t)
		}
	}
	slices.SortFunc(ts, func(a, b *tracked) int { return a.FirstSeen.Compare(b.FirstSeen) })
	return ts
}

// automatic does what policy has allowed, and what policy has follow when that does not help. It holds the healing token.
func (e *Engine) automatic(ctx context.Context, f detect.Finding, action string) {
	defer func() { <-e.healing }()
	for action != "" {
		_, _, err := e.repair(ctx, f, action, (*heal.Value)(e.o.Policy.Set(f, action)), callerPolicy, "", false)
		if err == nil || ctx.Err() != nil {
			return
		}
		// Harsher means are only for a fault that has been seen again since, and never in place of what nobody may do here.
		refused := errors.Is(err, access.ErrDenied) || errors.Is(err, ErrWritesOff) || errors.Is(err, heal.ErrProtected) || errors.Is(err, heal.ErrBlast)
		then, _ := heal.Find(e.o.Policy.Next(f, action))
		again := e.confirm(ctx, f, then.Risk)
		if errors.Is(again, errQuiet) {
			return
		}
		e.mu.Lock()
		t := e.open(f.ID)
		if t == nil {
			e.mu.Unlock()
			return // it has gone by itself
		}
		next := e.o.Policy.Next(f, action)
		if next == "" || refused || again != nil || slices.Contains(t.tried, next) {
			t.told = true
			what := "has not helped"
			if refused {
				what = "was refused"
			}
			e.publish(findingEvent(EventWaiting, t.Finding, fmt.Sprintf("%s waits for an operator: %s %s: %v", t.ID, action, what, err)))
			e.mu.Unlock()
			return
		}
		t.tried = append(t.tried, next)
		e.publish(findingEvent(EventEscalated, t.Finding, fmt.Sprintf("%s: %s has not helped, %s is next", t.ID, action, next)))
		f, action = t.Finding, next
		e.mu.Unlock()
	}
}

// Heal plans a repair of an open finding and, unless DryRun is set, carries it out and verifies it. It returns when all that
// is done. The plan is returned with an error, too, as far as there is one; the outcome is nil if nothing was begun.
func (e *Engine) Heal(ctx context.Context, r HealRequest) (heal.Plan, *heal.Outcome, error) {
	e.mu.Lock()
	t := e.open(r.Finding)
	if t == nil {
		e.mu.Unlock()
		return heal.Plan{}, nil, fmt.Errorf("finding %q: %w", r.Finding, ErrNoFinding)
	}
	f := t.Finding
	e.mu.Unlock()
	action, value := r.Action, r.Value
	if action == "" && value != nil {
		_, action, _ = heal.SettingOf(value.Name)
		if action == "" {
			return heal.Plan{}, nil, fmt.Errorf("no action sets %q: %w", value.Name, heal.ErrValue)
		}
	}
	if action == "" {
		action = f.Action
	}
	if value == nil {
		value = (*heal.Value)(e.o.Policy.Set(f, action))
	}
	if action == "" {
		return heal.Plan{}, nil, fmt.Errorf("policy proposes no action for %s; name one of %v", f.ID, actionsFor(f.Kind))
	}
	caller := r.Caller
	switch caller {
	case "":
		caller = "unknown"
	case callerPolicy:
		caller = "operator " + callerPolicy
	}
	if r.DryRun {
		return e.repair(ctx, f, action, value, caller, r.Agreed, true)
	}
	select {
	case e.healing <- struct{}{}:
		defer func() { <-e.healing }()
	default:
		return heal.Plan{}, nil, ErrBusy
	}
	return e.repair(ctx, f, action, value, caller, r.Agreed, false)
}

// UndoRequest asks for a finished repair to be taken back.
type UndoRequest struct {
	Finding string // ID, open or resolved
	DryRun  bool   // plan only
	Agreed  string // as HealRequest's
	Caller  string
}

// ErrNoUndo means that there is no finished repair of a finding that could be taken back.
var ErrNoUndo = errors.New("there is nothing to take back")

// Undo plans to take back the latest repair of a finding and, unless DryRun is set, does so, under the rules of Heal and the right to the
// action that does it: a process that was stopped goes on. What the repair has cured may come back with it. The plan is returned
// with an error, too, as far as there is one; the outcome is nil if nothing was begun. Its Verified says that the plan has had its effect.
func (e *Engine) Undo(ctx context.Context, r UndoRequest) (p heal.Plan, out *heal.Outcome, err error) {
	fail := func(err error) (heal.Plan, *heal.Outcome, error) {
		return p, out, fmt.Errorf("take back the repair of %s: %w", r.Finding, err)
	}
	f, ok := e.Finding(r.Finding)
	if !ok {
		return fail(ErrNoFinding)
	}
	outcomes := e.Outcomes(f.ID)
	if len(outcomes) == 0 || outcomes[len(outcomes)-1].Error != "" {
		return fail(ErrNoUndo)
	}
	last := outcomes[len(outcomes)-1].Plan
	if last.TakesBack != "" {
		return fail(fmt.Errorf("%s was taken back already: %w", last.TakesBack, ErrNoUndo))
	}
	did, ok := heal.Find(last.Action)
	if !ok || did.Undo == "" {
		return fail(fmt.Errorf("%s is for good: %w", last.Action, ErrNoUndo))
	}
	a, ok := heal.Find(did.Undo)
	if !ok {
		return fail(fmt.Errorf("action %q is unknown", did.Undo))
	}
	defer func() {
		if x := recover(); x != nil {
			err = fmt.Errorf("panic while taking back the repair of %s: %v", f.ID, x)
		}
	}()
	caller := r.Caller
	if caller == callerPolicy || caller == "" {
		caller = "operator " + caller
	}
	if !r.DryRun {
		select {
		case e.healing <- struct{}{}:
			defer func() { <-e.healing }()
		default:
			return fail(ErrBusy)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, healTimeout)
	defer cancel()
	defer context.AfterFunc(e.running, cancel)()
	e.mu.Lock()
	var img *kernel.Image
	if e.target != nil {
		img = e.target.image()
	}
	mem, grant, boot, why := e.mem, e.grant(), e.bootID(), e.why
	e.mu.Unlock()
	switch {
	case img == nil:
		return fail(fmt.Errorf("%w: %s", ErrNotAttached, why))
	case last.Kernel == nil || *last.Kernel != heal.Identify(img.Info()):
		return fail(fmt.Errorf("the host runs another kernel since: %w", ErrNoUndo))
	}
	if !r.DryRun {
		if !e.o.Writes {
			return fail(ErrWritesOff)
		}
		if err := grant.Permit(a.ID); err != nil {
			return fail(err)
		}
	}
	if did.Undo == did.ID {
		p, err = heal.TakeBack(outcomes[len(outcomes)-1])
	} else {
		p, err = a.Prepare(ctx, img.View(ctx), f, nil)
	}
	if err != nil {
		return fail(err)
	}
	p.More = true // it is no repair: no fault is to be gone after it
	e.mu.Lock()
	e.plans++
	p.ID, p.Made = fmt.Sprintf("plan-%d", e.plans), time.Now()
	e.mu.Unlock()
	if err := p.Agreed(r.Agreed); err != nil {
		return fail(err)
	}
	if r.DryRun {
		return p, nil, nil
	}
	x := e.executor(mem, img, grant, f, boot, nil)
	e.sweep(ctx, x, boot)
	o, err := x.ApplyNext(ctx, p, caller)
	o.Verified = err == nil // by the plan's own waiting for its effect
	e.keep(o, boot)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		e.publish(outcomeEvent(EventFailed, f, o, fmt.Sprintf("%s: %s was not taken back: %v", f.ID, last.ID, err)))
		return p, &o, err
	}
	e.publish(outcomeEvent(EventDone, f, o, fmt.Sprintf("%s: %s was taken back: %s", f.ID, last.ID, p.Title)))
	return p, &o, nil
}

func actionsFor(k detect.Kind) []string {
	var ids []string
	for _, a := range heal.Actions() {
		if slices.Contains(a.For, k) {
			ids = append(ids, a.ID)
		}
	}
	return ids
}

// repair plans and, unless dry, carries out if the plan is what was agreed to. The caller holds the healing token, unless dry.
func (e *Engine) repair(ctx context.Context, f detect.Finding, action string, value *heal.Value, caller, agreed string, dry bool) (p heal.Plan, out *heal.Outcome, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic while planning or healing: %v", r)
		}
		if dry {
			return
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.current = ""
		if t := e.open(f.ID); t != nil {
			t.healing = false
		}
		if err == nil {
			return
		}
		var o heal.Outcome
		if out != nil {
			o = *out
		} else {
			e.record("refused", map[string]any{"finding": f.ID, "action": action, "caller": caller, "error": err.Error(), "value": value})
		}
		e.publish(outcomeEvent(EventFailed, f, o, fmt.Sprintf("%s of %s has failed: %v", action, f.ID, err)))
	}()
	a, ok := heal.Find(action)
	if !ok {
		return p, nil, fmt.Errorf("action %q is unknown; there are %v", action, heal.IDs())
	}
	if !slices.Contains(a.For, f.Kind) {
		return p, nil, fmt.Errorf("%s is no remedy for a %s; there are %v", action, f.Kind, actionsFor(f.Kind))
	}
	if err := a.Check(value); err != nil {
		return p, nil, err
	}
	limit := healTimeout
	if a.Risk == heal.RiskRestart {
		limit = restartTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	defer context.AfterFunc(e.running, cancel)()

	e.mu.Lock()
	var img *kernel.Image
	if e.target != nil {
		img = e.target.image()
	}
	mem, grant := e.mem, e.grant()
	boot := e.bootID()
	e.mu.Unlock()
	if !dry {
		// The executor judges each right by itself; what is refused as a whole is refused before anything is planned.
		if !e.o.Writes {
			return p, nil, ErrWritesOff
		}
		if err := grant.Permit(action); err != nil {
			return p, nil, err
		}
		if value != nil {
			if err := grant.PermitValue(action, value.Name, value.Number); err != nil {
				return p, nil, err
			}
		}
	}
	var v *kernel.View
	if img != nil {
		v = img.View(ctx)
	}
	p, err = a.Prepare(ctx, v, f, value)
	for end := time.Now().Add(planPatience); errors.Is(err, heal.ErrNotYet) && img != nil && time.Now().Before(end) && ctx.Err() == nil; {
		sleep(ctx, 50*time.Millisecond) // a kernel that panics takes a moment to come to rest
		p, err = a.Prepare(ctx, img.View(ctx), f, value)
	}
	if err != nil {
		return p, nil, err
	}
	e.mu.Lock()
	e.plans++
	p.ID, p.Made = fmt.Sprintf("plan-%d", e.plans), time.Now()
	e.mu.Unlock()
	p.Foreseen = e.foresee(ctx, img, f, p)
	if err := p.Agreed(agreed); err != nil || dry {
		return p, nil, err
	}

	e.mu.Lock()
	if err := e.begin(grant, action, p.Made); err != nil {
		e.mu.Unlock()
		return p, nil, err
	}
	e.current = p.ID
	var budget *heal.Budget
	if t := e.open(f.ID); t != nil {
		if caller == callerPolicy {
			if t.budget == nil {
				most := e.o.Policy.Limits()
				t.budget = heal.NewBudget(most.Tasks, most.Bytes)
			}
			budget = t.budget
		}
		t.healing = true
		t.Repairs = append(slices.Clip(t.Repairs), p.ID)
		f = t.Finding
	}
	e.publish(findingEvent(EventPlanned, f, fmt.Sprintf("%s: %s (for %s)", p.ID, p.Title, caller)))
	e.mu.Unlock()
	x := e.executor(mem, img, grant, f, boot, budget)
	e.sweep(ctx, x, boot)
	o, err := x.Apply(ctx, p, caller)
	e.keep(o, boot)
	if p.More {
		o, err = e.carryOn(ctx, a, f, img, x, o, err, boot, caller)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		return p, &o, err
	}
	if p.More && a.Next == nil {
		e.publish(outcomeEvent(EventDone, f, o, fmt.Sprintf("%s: %s: done in %v", f.ID, p.Title, o.Finished.Sub(o.Started).Round(time.Millisecond))))
		return p, &o, nil
	}
	e.resolveID(f.ID, fmt.Sprintf("healed by %s (%s)", p.ID, action))
	e.publish(outcomeEvent(EventHealed, f, o, fmt.Sprintf("%s: %s: healed in %v", f.ID, p.Title, o.Finished.Sub(o.Started).Round(time.Millisecond))))
	return p, &o, nil
}

// keep keeps an outcome for those who ask, and what it has left behind to be swept.
func (e *Engine) keep(o heal.Outcome, boot string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.outcomes = append(e.outcomes, o)
	if len(e.outcomes) > keepOutcomes {
		e.outcomes = e.outcomes[1:]
	}
	if len(o.Left) > 0 {
		e.left = append(e.left, leftover{o.Plan, boot})
	}
}

// carryOn makes and carries out the further plans of a repair in several, and at the end, however it comes, the one that
// takes back what was held meanwhile. It returns the outcome of the last plan.
func (e *Engine) carryOn(ctx context.Context, a heal.Action, f detect.Finding, img *kernel.Image, x *heal.Executor, first heal.Outcome, err error, boot, caller string) (heal.Outcome, error) {
	done := []heal.Outcome{first}
	number := func(p *heal.Plan) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.plans++
		p.ID, p.Made = fmt.Sprintf("plan-%d", e.plans), time.Now()
		if t := e.open(f.ID); t != nil {
			t.Repairs = append(slices.Clip(t.Repairs), p.ID)
		}
		e.current = p.ID
	}
	again, missed := 0, 0 // since the latest plan that was carried out
	for err == nil && a.Next != nil {
		e.sweep(ctx, x, boot)
		var p heal.Plan
		var more bool
		p, more, err = a.Next(ctx, img.View(ctx), f)
		if errors.Is(err, heal.ErrNotYet) || errors.Is(err, kernel.ErrTorn) || errors.Is(err, kernel.ErrNotFound) {
			if again++; again < 500 && ctx.Err() == nil {
				sleep(ctx, 10*time.Millisecond)
				err = nil
				continue
			}
		}
		if err != nil || !more {
			break
		}
		number(&p)
		// That the fault is there was confirmed for the first plan; what it did may hide it now.
		var o heal.Outcome
		o, err = x.ApplyNext(ctx, p, caller)
		e.keep(o, boot)
		done = append(done, o)
		if err == nil {
			again, missed = 0, 0
		} else if errors.Is(err, heal.ErrMismatch) || errors.Is(err, heal.ErrStale) {
			if missed++; missed < 50 { // somebody has died meanwhile, or the CPU's list was taken
				err = nil
			}
		}
	}
	last := done[len(done)-1]
	if lift, held := heal.Lift(done); held {
		number(&lift)
		lctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), liftTimeout)
		defer cancel()
		lift.More = err != nil // nobody asks whether it has helped
		o, lerr := x.ApplyNext(lctx, lift, caller)
		e.keep(o, boot)
		err, last = errors.Join(err, lerr), o
		done = append(done, o)
	} else if err == nil && a.Next != nil {
		err = e.quiet(ctx, f)
		last.Verified = err == nil
	}
	last.Started, last.HostFunctions, last.Stores, last.BytesWritten = first.Started, nil, 0, 0
	for _, d := range done {
		last.HostFunctions = append(last.HostFunctions, d.HostFunctions...)
		last.Stores += d.Stores
		last.BytesWritten += d.BytesWritten
	}
	return last, err
}

// leftover is a plan that was carried out and has left something in the host's memory.
type leftover struct {
	plan heal.Plan
	boot string // of the kernel that it was for
}

// sweep tidies up what earlier repairs have left behind, as far as the host has let go of it by now.
func (e *Engine) sweep(ctx context.Context, x *heal.Executor, boot string) {
	e.mu.Lock()
	all := e.left
	e.left = nil
	e.mu.Unlock()
	var still []leftover
	for _, l := range all {
		if l.boot != boot {
			continue // gone with its kernel
		}
		left, err := x.Sweep(ctx, l.plan)
		if err != nil {
			e.log.Warn("cannot tidy up", "plan", l.plan.ID, "err", err)
		}
		if err != nil && !errors.Is(err, heal.ErrStale) || len(left) > 0 {
			still = append(still, l)
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.left = append(still, e.left...)
	if len(e.left) > keepLeft {
		e.left = e.left[len(e.left)-keepLeft:]
	}
}

// tidy sweeps now and then while nothing else is done.
func (e *Engine) tidy(ctx context.Context, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.left) == 0 || now.Before(e.nextTidy) || e.target == nil || e.target.image() == nil || !e.o.Writes {
		return
	}
	select {
	case e.healing <- struct{}{}:
	default:
		return
	}
	e.nextTidy = now.Add(tidyEvery)
	img, mem, grant, boot := e.target.image(), e.mem, e.grant(), e.bootID()
	go func() {
		defer func() { <-e.healing }()
		ctx, cancel := context.WithTimeout(ctx, healTimeout)
		defer cancel()
		defer context.AfterFunc(e.running, cancel)()
		e.sweep(ctx, e.executor(mem, img, grant, detect.Finding{}, boot, nil), boot)
	}()
}

// Outcomes returns what has become of the repairs of a finding, the oldest first. Only the latest repairs of all are kept;
// the journal has the others.
func (e *Engine) Outcomes(finding string) []heal.Outcome {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []heal.Outcome
	for _, o := range e.outcomes {
		if o.Plan.Finding == finding {
			out = append(out, o)
		}
	}
	return out
}

func (e *Engine) executor(mem hostmem.Memory, img *kernel.Image, grant access.Grant, f detect.Finding, boot string, budget *heal.Budget) *heal.Executor {
	o := heal.Options{Memory: mem, Grant: grant, Power: e.o.Power, Network: e.o.Network, Logger: e.log, Budget: budget}
	if img != nil {
		// Whatever a plan made from a hostile kernel's tables says, no store leaves what that kernel itself calls RAM.
		o.Kernel, o.Memory = img, hostmem.Narrow(mem, img.RAM())
		o.Lease = e.lease(img, boot)
	}
	if e.o.Journal != nil {
		o.Journal = e.o.Journal
	}
	o.Confirm = func(ctx context.Context, p heal.Plan) error { return e.confirm(ctx, f, p.Risk) }
	o.Cured = func(ctx context.Context, p heal.Plan) error {
		if p.Risk == heal.RiskRestart {
			return e.restarted(ctx, boot)
		}
		return e.quiet(ctx, f)
	}
	return heal.NewExecutor(o)
}

// lease returns where healers of the host keep each other out; nil if that cannot be told.
func (e *Engine) lease(img *kernel.Image, boot string) *heal.Lease {
	e.mu.Lock()
	l, of := e.leased, e.leasedBoot
	e.mu.Unlock()
	if of == boot {
		return l
	}
	ctx, cancel := context.WithTimeout(e.running, confirmTimeout)
	defer cancel()
	l, err := heal.FindLease(img.View(ctx))
	if err != nil {
		if !errors.Is(err, kernel.ErrNotFound) && !errors.Is(err, kernel.ErrNotSupported) {
			e.log.Warn("repairs go without a lease for now", "err", err)
			return nil
		}
		e.log.Warn("this host has no place for a lease: see to it that it has one healer", "err", err)
	}
	if l != nil && e.o.Journal != nil {
		if last := leftLease(e.o.Journal.Records()); last != nil {
			if err := l.Resume(last); err != nil {
				e.log.Warn("an earlier start's lease may have to run out", "err", err)
			}
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.leased, e.leasedBoot = l, boot
	return l
}

// errQuiet means that a fault is no longer seen.
var errQuiet = errors.New("its detector is silent now")

// confirm waits until the finding's detector has spoken of it again in a pass that began later than now. Under a finding that explains it, as when
// all of the host stands still because its CPUs do, its detector is not asked any more; for a restart it is enough that this one is seen.
func (e *Engine) confirm(ctx context.Context, f detect.Finding, risk heal.Risk) error {
	from := time.Now()
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	return e.await(ctx, f, func() (bool, error) {
		t := e.open(f.ID)
		switch {
		case t == nil:
			return false, fmt.Errorf("it is gone: %w", errQuiet)
		case t.silentSince(from):
			return false, errQuiet
		}
		if t.spoke.After(from) || risk < heal.RiskRestart { // a suspicion that stands is not enough
			return t.spoke.After(from), nil
		}
		i := slices.IndexFunc(e.detectors, func(d detect.Detector) bool { return d.ID == t.detector })
		if i < 0 {
			return false, nil
		}
		c := e.open(e.cause(&e.detectors[i]))
		return c != nil && c.spoke.After(from), nil
	})
}

// quiet waits until the finding's detector has run later than now and been silent about it.
func (e *Engine) quiet(ctx context.Context, f detect.Finding) error {
	from := time.Now()
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	says := ""
	err := e.await(ctx, f, func() (bool, error) {
		t := e.open(f.ID)
		if t != nil && t.spoke.After(from) {
			says = t.Detail
		}
		return t == nil || t.silentSince(from), nil
	})
	if err != nil && says != "" {
		return fmt.Errorf("%s is seen %v later, too: %s", f.ID, confirmTimeout, says)
	}
	return err
}

// await checks after each pass, and has the finding's detector run in each, until done says so. done is called with e.mu held.
func (e *Engine) await(ctx context.Context, f detect.Finding, done func() (bool, error)) error {
	select {
	case e.wake <- struct{}{}:
	default:
	}
	for {
		e.mu.Lock()
		ok, err := done()
		for i := range e.detectors {
			if d := &e.detectors[i]; d.Kind == f.Kind {
				e.force[d.ID] = true
			}
		}
		changed := e.changed
		e.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%s was not judged anew in time: %w", f.ID, ctx.Err())
		}
	}
}

// restarted waits until another kernel than the one with that boot ID is attached, and alive.
func (e *Engine) restarted(ctx context.Context, boot string) error {
	e.mu.Lock()
	e.restarting = true
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		e.restarting = false
		e.mu.Unlock()
	}()
	from := time.Now()
	for {
		e.mu.Lock()
		now, dead, phase, changed := e.bootID(), e.dead, e.phase, e.changed
		lives := e.moved.After(from)
		e.mu.Unlock()
		if phase == Attached && !dead && now != boot && lives {
			return nil
		}
		select {
		case <-changed:
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return fmt.Errorf("no new kernel was seen alive on the host: %w", ctx.Err())
		}
	}
}

// PowerControl does a power operation for an operator: "on", "off", "cycle", "nmi" or "shutdown". The agreement must give the
// right to, the agent must be allowed to change the host at all, and the journal holds the intent before the controller is
// asked. Once it has been asked the order is seen through, though the caller may have gone away.
func (e *Engine) PowerControl(ctx context.Context, op, caller string) error {
	return e.order(ctx, "power", "power "+op, map[string]string{"operation": op, "caller": caller}, func(ctx context.Context) error {
		e.mu.Lock()
		was := e.rest
		switch op {
		case "off", "shutdown", heal.OrderSuspend, heal.OrderPause:
			e.rest = rest{fmt.Sprintf("power %s by %s", op, caller), time.Now(), e.bootID()}
		case heal.OrderButton:
			if e.rest = (rest{}); was.why == "" { // else it switches on again
				e.rest = rest{fmt.Sprintf("power button pressed by %s", caller), time.Now(), e.bootID()}
			}
		case "nmi":
		default:
			e.rest = rest{}
		}
		e.mu.Unlock()
		err := heal.DoPower(ctx, e.o.Power, op)
		if err != nil {
			e.mu.Lock()
			e.rest = was
			e.mu.Unlock()
		}
		return err
	})
}

// rest is an order of an operator after which a host may stand still: it is not ill then, and nothing is done about it.
type rest struct {
	why  string // empty: there is no such order
	at   time.Time
	boot string // of the kernel that ran then
}

const (
	restAfter  = 500 * time.Millisecond // without a sign of life
	restWithin = 5 * time.Minute        // after the order; what stands still later does so for another reason
)

// resting says why the host may stand still, which it does; "" otherwise.
func (w *watcher) resting(now time.Time) string {
	e := w.e
	e.mu.Lock()
	defer e.mu.Unlock()
	r := e.rest
	if r.why == "" || w.t == nil {
		return r.why
	}
	if w.boot != r.boot || w.moved.After(r.at.Add(restWithin)) {
		e.rest = rest{}
		return ""
	}
	if now.Sub(w.moved) < restAfter {
		return ""
	}
	return r.why
}

// permitPower returns what the agreement permits if it gives an operator the host's power controller now.
func (e *Engine) permitPower() (access.Grant, error) {
	e.mu.Lock()
	grant := e.grant()
	e.mu.Unlock()
	switch {
	case !e.o.Writes:
		return grant, ErrWritesOff
	case e.o.Journal == nil:
		return grant, fmt.Errorf("there is no journal, and nothing is done without one: %w", access.ErrDenied)
	}
	return grant, grant.Permit(access.Power)
}
