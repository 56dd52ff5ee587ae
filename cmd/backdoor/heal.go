package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/query"
)

var healVerb = verb{
	name:  "heal",
	args:  "FINDING",
	short: "repair a finding",
	long: `The agent makes a plan, which is shown; then it asks, and carries the repair out. With -dry-run it stops at the plan. What is
carried out is planned anew at that moment, for addresses and CPUs may have changed; the outcome and the journal have that plan.
The agent refuses it if it does anything else, or to anybody else, than the plan that was shown.
Nothing is written to the host unless its access agreement permits it, and each write is in the agent's journal before it happens.

An action that takes a value is told by -set what to set, and to what; the name says which action it is. These are all, with what can be given
(of bytes also with K, M, G or T behind the number), of which the agreement and the host's kernel may allow less:

` + settingsText() + `
Exit status: 0 repaired and verified (or planned, with -dry-run; or done, by an action that is not to end its finding, as those of -set),
3 carried out but not verified, 5 denied.

  backdoor heal runaway-process-1 -dry-run
  backdoor heal runaway-process-1 -action kill-process -y
  backdoor heal memory-hog-3 -set memory.max=512M`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.dryRun, "dry-run", false, "show the plan and change nothing")
		fs.StringVar(&o.action, "action", "", "`action` to use instead of the one that policy proposes")
		fs.StringVar(&o.set, "set", "", "what to set, and to what, as `NAME=NUMBER` (default what policy says)")
		fs.BoolVar(&o.yes, "y", false, "do not ask")
	},
	run: runHeal,
}

var undoVerb = verb{
	name:  "undo",
	args:  "FINDING",
	short: "take back the repair of a finding",
	long: `Takes back the latest repair of a finding, which may be resolved, if it is one that can be: a process that was stopped goes on, a
limit or a setting of the kernel has its old number again, if nobody else has set another since. What
the repair has cured may come back with it. Plan, question and rules are those of heal, with -rdma as without.

Exit status: as heal.

  backdoor undo memory-hog-3 -dry-run
  backdoor undo memory-hog-3 -y`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.dryRun, "dry-run", false, "show the plan and change nothing")
		fs.BoolVar(&o.yes, "y", false, "do not ask")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) != 1 {
			return 0, &usageError{verb: "undo", msg: "undo takes the ID of one finding; see: backdoor findings"}
		}
		a, err := e.openOperator(ctx)
		if err != nil {
			return 0, err
		}
		defer a.Close()
		return e.carryOut("take back the repair of "+args[0], func(dryRun bool, agreed *heal.Plan, progress func(string)) (healed, error) {
			return a.Undo(ctx, args[0], dryRun, agreed, progress)
		})
	},
}

func runHeal(ctx context.Context, e *env, args []string) (int, error) {
	if len(args) != 1 {
		return 0, &usageError{verb: "heal", msg: "heal takes the ID of one finding; see: backdoor findings"}
	}
	var value *heal.Value
	if e.o.set != "" {
		v, err := heal.ParseValue(e.o.set)
		if err != nil {
			return 0, &usageError{verb: "heal", msg: "-set: " + err.Error()}
		}
		value = &v
	}
	a, err := e.openOperator(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	return e.carryOut("heal "+args[0], func(dryRun bool, agreed *heal.Plan, progress func(string)) (healed, error) {
		return a.Heal(ctx, args[0], e.o.action, value, dryRun, agreed, progress)
	})
}

// settingsText lists what can be set, for people.
func settingsText() string {
	var b strings.Builder
	for _, a := range heal.Actions() {
		for _, s := range a.Settings {
			fmt.Fprintf(&b, "  %-18s %s\n", a.ID, s)
		}
	}
	return b.String()
}

// carryOut has a change of the host planned, shows that, asks, and has it done. do is told which plan was agreed to.
func (e *env) carryOut(what string, do func(dryRun bool, agreed *heal.Plan, progress func(string)) (healed, error)) (int, error) {
	var plan *heal.Plan
	if e.o.dryRun || !e.o.yes {
		h, err := do(true, nil, nil)
		if err != nil {
			return 0, fmt.Errorf("plan to %s: %w", what, err)
		}
		if h.Plan == nil {
			return 0, fmt.Errorf("plan to %s: the agent sent no plan", what)
		}
		if e.o.dryRun {
			return exitOK, e.answer(h, func(w io.Writer) error { return planText(w, *h.Plan) })
		}
		plan = h.Plan
		// The plan is a question, not the answer: with -json only the outcome goes to standard output.
		w := e.stdout
		if e.o.json {
			w = e.stderr
		}
		if err := planText(w, *h.Plan); err != nil {
			return 0, err
		}
		yes, err := e.confirm("Carry this out on the host?")
		if err != nil {
			return 0, err
		}
		if !yes {
			return 0, fmt.Errorf("nothing was done")
		}
	}
	h, err := do(false, plan, func(text string) {
		if f := file(e.stderr); f != nil && isTerminal(f) {
			fmt.Fprintf(e.stderr, "backdoor: %s\n", query.Clean(text))
		}
	})
	if h.Outcome != nil {
		if aerr := e.answer(h, func(w io.Writer) error { return outcomeText(w, *h.Outcome) }); aerr != nil {
			return 0, aerr
		}
	}
	switch {
	case err != nil && h.Outcome != nil: // it was begun, and has not helped
		return 0, &codeError{exitIll, fmt.Errorf("%s: %w", what, err)}
	case err != nil:
		return 0, fmt.Errorf("%s: %w", what, err)
	case h.Outcome == nil:
		return 0, fmt.Errorf("%s: the agent sent no outcome", what)
	case !h.Outcome.Verified && !stands(*h.Outcome):
		return exitIll, nil
	}
	return exitOK, nil
}

// confirm asks a question whose safe answer is no. Only a terminal, or what a test gives, can say yes.
func (e *env) confirm(question string) (bool, error) {
	if f := file(e.stdin); f != nil && !isTerminal(f) {
		return false, &usageError{msg: "nobody can be asked here: use -y to carry it out, or -dry-run to look only"}
	}
	fmt.Fprintf(e.stderr, "%s [y/N] ", question)
	line, err := readLine(e.stdin)
	if err != nil {
		return false, fmt.Errorf("read the answer: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return true, nil
	}
	return false, nil
}

// planText prints a plan, step by step.
func planText(w io.Writer, p heal.Plan) error {
	l := &lines{w: w}
	l.printf("Plan %s: %s\n", query.Clean(p.ID), query.Clean(p.Title))
	l.printf("  for finding  %s\n", query.Clean(p.Finding))
	l.printf("  action       %s, risk %s\n", query.Clean(p.Action), p.Risk)
	if v := p.Value; v != nil {
		l.printf("  value        %s\n", query.Clean(v.String()))
	}
	if p.Foreseen != "" {
		l.printf("  foreseen     %s\n", query.Clean(p.Foreseen))
	}
	if t := p.Target; t != nil {
		l.printf("  target       PID %d, process %d, %s, user %d\n", t.PID, t.TGID, query.Clean(t.Comm), t.UID)
	}
	undo := "cannot be taken back"
	if p.Undo {
		undo = "can be taken back"
	}
	l.printf("  once done    %s\n", undo)
	for i, c := range p.Calls {
		name := "  host runs   "
		if i > 0 {
			name = "              "
		}
		l.printf("%s %s in %s: %s\n", name, query.Clean(c.Function), query.Clean(c.Context), query.Clean(c.Purpose))
	}
	for i, s := range p.Steps {
		l.printf("  %2d %-6s %s\n", i+1, s.Op, query.Clean(s.Why))
		switch s.Op {
		case heal.OpExpect:
			l.printf("            at %v%s: %s\n", s.Addr, object(s), hexText(s.Expect))
		case heal.OpWrite, heal.OpArm:
			l.printf("            at %v%s: %s -> %s\n", s.Addr, object(s), hexText(s.Expect), hexText(s.Put))
		case heal.OpAwait:
			for _, c := range s.Until {
				l.printf("            until %s (at most %s)\n", query.Clean(c.What), query.Round(s.Timeout))
			}
		case heal.OpPower:
			l.printf("            power %s through the host's BMC\n", query.Clean(s.Power))
		}
	}
	return l.err
}

func object(s heal.Step) string {
	if s.Object == "" {
		return ""
	}
	return " (" + query.Clean(s.Object) + ")"
}

// hexText prints memory content, shortened in the middle.
func hexText(b heal.Bytes) string {
	const most = 16
	if len(b) <= most {
		return fmt.Sprintf("%x", []byte(b))
	}
	return fmt.Sprintf("%x… (%d bytes)", []byte(b[:most]), len(b))
}

// stands reports whether all of a plan was done that was not to end its finding by itself.
func stands(o heal.Outcome) bool { return o.Plan.More && o.Error == "" && !o.Undone }

// outcomeText prints what became of a plan.
func outcomeText(w io.Writer, o heal.Outcome) error {
	l := &lines{w: w}
	switch {
	case o.Verified:
		l.printf("Repaired and verified: %s\n", query.Clean(o.Plan.Title))
	case o.Undone:
		l.printf("NOT repaired, and every write was taken back: %s\n", query.Clean(o.Plan.Title))
	case stands(o):
		l.printf("Done, and the finding stands: %s\n", query.Clean(o.Plan.Title))
	default:
		l.printf("NOT verified: %s\n", query.Clean(o.Plan.Title))
	}
	if o.Error != "" {
		l.printf("  error        %s\n", query.Clean(o.Error))
	}
	l.printf("  took         %s, from %s\n", query.Round(o.Finished.Sub(o.Started)), o.Started.UTC().Format(time.RFC3339Nano))
	if o.Stores > 0 || o.BytesWritten > 0 {
		how := "read-compare-write-verify"
		if o.Atomic {
			how = "compare-and-swap"
		}
		l.printf("  written      %d bytes in %d stores, armed by %s\n", o.BytesWritten, o.Stores, how)
	}
	for _, f := range o.HostFunctions {
		sure := "may have run"
		if f.Confirmed {
			sure = "ran"
		}
		l.printf("  host         %s %s, %d times within %s, in %s\n", query.Clean(f.Function), sure, f.Runs, query.Round(f.Within), query.Clean(f.Context))
	}
	for _, r := range o.Left {
		l.printf("  left behind  %d bytes at %v differ from what they were\n", r.Size, r.Start)
	}
	for _, s := range o.Steps {
		if s.Error != "" {
			l.printf("  step %-2d      %s\n", s.Step+1, query.Clean(s.Error))
		}
	}
	return l.err
}
