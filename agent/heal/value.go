package heal

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// ErrValue means that an action cannot be given the value that it was asked for with, or that it needs one.
var ErrValue = errors.New("wrong value")

// Value is a number that an action is given, and what it is the number of. It is all that reaches a host from a request: a name outside
// of the action's own Settings is refused, and no text is ever stored.
type Value struct {
	Name   string `json:"name"`   // of one of the action's Settings
	Number int64  `json:"number"` // in that setting's unit
}

// String returns the value as ParseValue reads it.
func (v Value) String() string { return fmt.Sprintf("%s=%d", v.Name, v.Number) }

// Setting is what an action can set to a number. No two actions have one of the same name.
type Setting struct {
	Name     string
	Unit     string // "bytes", "s"; empty for a count or a switch
	Min, Max int64  // both included; a host's kernel may allow less, see its plan
}

// String returns the setting with its bounds, for people.
func (s Setting) String() string {
	most := strconv.FormatInt(s.Max, 10)
	if s.Max == math.MaxInt64 {
		most = "max"
	}
	return strings.TrimSpace(fmt.Sprintf("%s=%d..%s %s", s.Name, s.Min, most, s.Unit))
}

// ParseValue reads NAME=NUMBER, or NAME=max. The number is decimal, or hexadecimal behind 0x; K, M, G or T behind it multiply by powers of 1024, as the
// kernel's own files have it.
func ParseValue(s string) (Value, error) {
	name, text, ok := strings.Cut(s, "=")
	digits, factor := text, int64(1)
	if i := strings.IndexAny(text, "KMGT"); i > 0 && i == len(text)-1 {
		digits = text[:i]
		factor = 1 << (10 * (1 + strings.IndexByte("KMGT", text[i])))
	}
	if setting, _, known := SettingOf(name); text == "max" && known {
		return Value{Name: name, Number: setting.Max}, nil
	}
	base := 10
	if hex, found := strings.CutPrefix(digits, "0x"); found {
		digits, base = hex, 16
	}
	n, err := strconv.ParseInt(digits, base, 64)
	if !ok || name == "" || err != nil || n*factor/factor != n {
		return Value{}, fmt.Errorf("%q is not NAME=NUMBER, as kernel.pid_max=65536 or memory.max=512M: %w", s, ErrValue)
	}
	return Value{Name: name, Number: n * factor}, nil
}

// SettingOf returns the setting of a name, and the ID of the action that sets it.
func SettingOf(name string) (Setting, string, bool) {
	for _, a := range Actions() {
		for _, s := range a.Settings {
			if s.Name == name {
				return s, a.ID, true
			}
		}
	}
	return Setting{}, "", false
}

// Check returns an error that is ErrValue unless the action can be asked for with the value, which is nil if none was given.
func (a Action) Check(v *Value) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%s: %s: %w", a.ID, fmt.Sprintf(format, args...), ErrValue)
	}
	var names []string
	for _, s := range a.Settings {
		if v != nil && s.Name == v.Name {
			if v.Number < s.Min || v.Number > s.Max {
				return bad("%s cannot be %d; give %s", v.Name, v.Number, s)
			}
			return nil
		}
		names = append(names, s.Name)
	}
	switch {
	case v == nil && names == nil:
		return nil
	case v == nil:
		return bad("it needs to be told what to set, and to what; give one of %s a number", strings.Join(names, ", "))
	case names == nil:
		if _, id, ok := SettingOf(v.Name); ok {
			return bad("it takes no value; %s is what %s sets", v.Name, id)
		}
		return bad("it takes no value, but was given %q; leave that out", v.Name)
	}
	return bad("there is no %q; give one of %s a number", v.Name, strings.Join(names, ", "))
}

// Prepare plans the action with a value, or without if that is nil.
func (a Action) Prepare(ctx context.Context, v *kernel.View, f detect.Finding, value *Value) (Plan, error) {
	if err := a.Check(value); err != nil {
		return Plan{}, err
	}
	if value == nil {
		return a.Plan(ctx, v, f)
	}
	p, err := a.Set(ctx, v, f, *value)
	p.Value = value
	return p, err
}

// TakeBack returns the plan that puts back what the stores of a finished one have replaced. It is for actions whose Undo is their own ID.
func TakeBack(o Outcome) (Plan, error) {
	p := o.Plan
	fail := func(why string) (Plan, error) {
		return Plan{}, fmt.Errorf("take back %s: %s: %w", p.ID, why, kernel.ErrNotSupported)
	}
	if !p.Undo || o.Error != "" || o.Undone || p.TakesBack != "" || len(p.Calls) > 0 {
		return fail("it has failed, or is none that can be")
	}
	q := Plan{
		Action: p.Action, Finding: p.Finding, Risk: p.Risk, Kernel: p.Kernel, Target: p.Target, Targets: p.Targets,
		Undo: true, More: true, TakesBack: p.ID, Title: "take back: " + p.Title,
	}
	var checks []Step
	for _, s := range p.Steps {
		switch {
		case s.Op == OpExpect:
			if !s.Once {
				checks = append(checks, s)
			}
		case (s.Op == OpWrite || s.Op == OpArm) && s.Undo && !s.MayFail && !s.Cleanup && !s.IfFailed:
			s.Why, s.Expect, s.Put = "what was there before", s.Put, s.Expect
			q.Steps = append([]Step{s}, q.Steps...)
		default:
			return fail("a step of it cannot be turned round")
		}
	}
	q.Steps = append(checks, q.Steps...)
	return q, nil
}
