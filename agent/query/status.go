package query

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Health is one of three outcomes; the third is never taken for the first.
type Health string

const (
	Healthy      Health = "yes"
	Unhealthy    Health = "no"
	CouldNotTell Health = "could-not-tell"
)

// Status is the answer to "how is the host?".
type Status struct {
	At     time.Time    `json:"at"`
	Health Health       `json:"health"`
	Why    string       `json:"why,omitempty"` // what the health rests on, or why it could not be told
	Phase  string       `json:"phase,omitempty"`
	Since  time.Time    `json:"since,omitzero"` // of the phase
	Kernel *kernel.Info `json:"kernel,omitempty"`
	// Uptime is the host's CLOCK_MONOTONIC; zero if it could not be told.
	Uptime time.Duration      `json:"uptime"`
	CPUs   []kernel.CPU       `json:"cpus,omitempty"`
	Panic  *kernel.PanicState `json:"panic,omitempty"`
	// The agent's own standing; absent when a memory image was read without one.
	Agent *Agent   `json:"agent,omitempty"`
	Cost  string   `json:"cost,omitempty"` // what the answer cost in reads of host memory
	Notes []string `json:"notes,omitempty"`
}

// Agent is how the agent that watches the host stands itself.
type Agent struct {
	Writes     bool     `json:"writes"`              // the agent may store into host memory at all
	Agreement  string   `json:"agreement,omitempty"` // one line about the access agreement
	Attaches   int      `json:"attaches"`
	AttachTook string   `json:"attachTook,omitempty"`
	Passes     uint64   `json:"passes"`
	LastPass   string   `json:"lastPass,omitempty"`
	Detectors  []string `json:"detectors,omitempty"` // one line each
	Errors     []string `json:"errors,omitempty"`
}

// Observe judges a host by itself, without an agent: from one view if the memory is a still image (after is nil), from
// two if it is alive. One healthy-looking view is no proof of health, and is not reported as such.
func Observe(ctx context.Context, info kernel.Info, before, after View) Status {
	s := Status{At: time.Now(), Health: CouldNotTell, Kernel: &info}
	last := before
	if after != nil {
		last = after
	}
	p, err := last.Panic()
	if err != nil {
		s.Notes = append(s.Notes, fmt.Sprintf("read panic state: %v", err))
	} else {
		s.Panic = &p
	}
	hb1, err1 := before.Heartbeat()
	if err1 == nil {
		s.At, s.CPUs, s.Uptime = hb1.At, hb1.CPUs, time.Duration(hb1.Mono)
	} else {
		s.Notes = append(s.Notes, fmt.Sprintf("read heartbeat: %v", err1))
	}
	var hb2 kernel.Heartbeat
	err2 := err1
	if after != nil {
		hb2, err2 = after.Heartbeat()
		if err2 == nil {
			s.At, s.CPUs, s.Uptime = hb2.At, hb2.CPUs, time.Duration(hb2.Mono)
		} else {
			s.Notes = append(s.Notes, fmt.Sprintf("read heartbeat again: %v", err2))
		}
	}
	switch {
	case ctx.Err() != nil:
		s.Why = ctx.Err().Error()
	case s.Panic != nil && p.Panicked:
		s.Health = Unhealthy
		s.Why = fmt.Sprintf("the kernel has panicked on CPU %d", p.CPU)
		if p.Message != "" {
			s.Why += ": " + p.Message
		}
	case s.Panic == nil:
		s.Why = "the panic state could not be read"
	case after == nil:
		s.Why = "a single sample: no panic, but whether the host makes progress takes two"
	case err1 != nil || err2 != nil:
		s.Why = "the heartbeat could not be read"
	case hb2.Jiffies == hb1.Jiffies:
		s.Why = "no clock tick between two samples: the host stands still, or this memory is a still image"
	default:
		if still := stalled(hb1, hb2); len(still) > 0 {
			s.Why = fmt.Sprintf("no sign of life between two samples from CPU %s", strings.Join(still, ", "))
			break
		}
		s.Health = Healthy
		s.Why = "no panic, and every CPU made progress or idled between two samples"
		if p.Oops {
			s.Health = CouldNotTell
			s.Why = "every CPU makes progress, but the kernel has reported an oops"
		}
	}
	return s
}

// stalled lists the CPUs that are busy and made no progress between two samples.
func stalled(a, b kernel.Heartbeat) []string {
	was := make(map[int]kernel.CPU)
	for _, c := range a.CPUs {
		was[c.ID] = c
	}
	var out []string
	for _, c := range b.CPUs {
		o, ok := was[c.ID]
		if !ok || !c.Online || c.Idle {
			continue
		}
		if c.Clock == o.Clock && c.Switches == o.Switches && c.TimerIRQs == o.TimerIRQs {
			out = append(out, fmt.Sprint(c.ID))
		}
	}
	return out
}
