package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
)

// maxDocument bounds what Load reads, in bytes.
const maxDocument = 256 << 10

// ErrInvalid means that a document is no policy that this version understands.
var ErrInvalid = errors.New("invalid policy")

// Load reads a policy. What it says about findings and detectors is checked here; whether its actions exist is checked by
// Check, for only the caller knows them.
func Load(r io.Reader) (Policy, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return Policy{}, fmt.Errorf("read policy: %w", err)
	}
	if len(b) > maxDocument {
		return Policy{}, fmt.Errorf("policy is longer than %d bytes: %w", maxDocument, ErrInvalid)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var p Policy
	if err := d.Decode(&p); err != nil {
		return Policy{}, fmt.Errorf("policy, near byte %d: %w: %w", d.InputOffset(), err, ErrInvalid)
	}
	if _, err := d.Token(); err != io.EOF {
		return Policy{}, fmt.Errorf("policy: something follows behind the document at byte %d: %w", d.InputOffset(), ErrInvalid)
	}
	if err := p.Check(nil); err != nil {
		return Policy{}, err
	}
	return p, nil
}

// Check finds what the JSON form alone cannot exclude. actions are the IDs of those that exist; nil leaves them unchecked.
func (p Policy) Check(actions []string) error {
	bad := func(where, format string, args ...any) error {
		return fmt.Errorf("policy: %s: %s: %w", where, fmt.Sprintf(format, args...), ErrInvalid)
	}
	if p.Version != Version {
		return bad("version", "is %d; this agent reads version %d", p.Version, Version)
	}
	if err := p.DetectConfig().Check(); err != nil {
		return bad("detectors", "%v", err)
	}
	switch {
	case p.Blast.Tasks < 0 || p.Blast.Bytes < 0:
		return bad("blast", "a limit is negative")
	case p.Flap.Repairs < 0:
		return bad("flap", "repairs is negative")
	case p.Flap.Within > Duration(24*time.Hour):
		return bad("flap", "within is more than 24h")
	}
	if _, err := p.compileWatches(); err != nil {
		return err
	}
	seen := map[string]int{}
	for i, r := range p.Rules {
		where := fmt.Sprintf("rules[%d]", i)
		if !p.known(r.Finding) {
			return bad(where+".finding", "%q is none of %v, no %s/NAME of a watch, and no aspect of a kind (%s)", r.Finding, detect.Kinds(), detect.KindPolicy, aspects())
		}
		if n, ok := seen[r.Finding]; ok {
			return bad(where+".finding", "%q has its rule in rules[%d] already", r.Finding, n)
		}
		seen[r.Finding] = i
		for _, a := range []struct{ name, id string }{{"action", r.Action}, {"then", r.Then}} {
			if a.id == "" && a.name == "then" {
				continue
			}
			if a.id == "" || actions != nil && !slices.Contains(actions, a.id) {
				return bad(where+"."+a.name, "%q is no action; there are %v", a.id, actions)
			}
		}
		switch {
		case r.Mode != Wait && r.Mode != Automatic:
			return bad(where+".mode", "%q must be %q or %q", r.Mode, Wait, Automatic)
		case !(r.MinConfidence >= 0 && r.MinConfidence <= 1):
			return bad(where+".minConfidence", "%v must be from 0 to 1", r.MinConfidence)
		case r.MaxPerHour < 0:
			return bad(where+".maxPerHour", "%d is negative", r.MaxPerHour)
		case r.Mode == Automatic && r.MaxPerHour == 0:
			return bad(where+".maxPerHour", "an automatic rule must say how often it may act")
		case r.Then == r.Action:
			return bad(where+".then", "is the same action again")
		case r.ThenSet != nil && r.Then == "":
			return bad(where+".thenSet", "there is no then that it could be for")
		}
	}
	return nil
}

// DetectConfig returns the detectors' settings: the defaults, changed where the policy says so.
func (p Policy) DetectConfig() detect.Config {
	c := detect.DefaultConfig()
	s := p.Detectors
	for _, f := range []struct {
		to   *time.Duration
		from Duration
	}{
		{&c.Heartbeat, s.Heartbeat}, {&c.Tasks, s.Tasks}, {&c.StallSuspect, s.StallSuspect}, {&c.StallVerdict, s.StallVerdict},
		{&c.IdleVerdict, s.IdleVerdict}, {&c.Silent, s.Silent}, {&c.RunawayFor, s.RunawayFor},
		{&c.HogETA, s.HogETA}, {&c.RCUFor, s.RCUFor}, {&c.HungFor, s.HungFor},
		{&c.WorkFor, s.WorkFor}, {&c.IOFor, s.IOFor}, {&c.BootFor, s.BootFor},
	} {
		if f.from != 0 {
			*f.to = time.Duration(f.from)
		}
	}
	if s.RunawayShare != 0 {
		c.RunawayShare = s.RunawayShare
	}
	if s.BombGrowth != 0 {
		c.BombGrowth = s.BombGrowth
	}
	if s.FloodPackets != 0 {
		c.FloodPackets = s.FloodPackets
	}
	if s.FloodSYNs != 0 {
		c.FloodSYNs = s.FloodSYNs
	}
	if s.CorrectedADay != 0 {
		c.CorrectedADay = s.CorrectedADay
	}
	if s.HogFloor != 0 {
		c.HogFloor = s.HogFloor
	}
	for _, u := range s.RunawayExempt {
		c.RunawayExempt = append(c.RunawayExempt, detect.UIDRange(u))
	}
	return c
}

// aspects lists them for people.
func aspects() string {
	var all []string
	for _, k := range detect.Kinds() {
		for _, a := range detect.Aspects(k) {
			all = append(all, string(k)+"/"+a)
		}
	}
	return strings.Join(all, ", ")
}
