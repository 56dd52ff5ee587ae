package heal

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// The actions that keep the host's traffic back. The agreement names them like any other; they touch no memory of the host.
const (
	Quarantine = "quarantine"
	RateLimit  = "rate-limit"
	Release    = "release"
)

// How long traffic is kept back, and how far, if nobody says.
const (
	ContainFor   = 10 * time.Minute
	LongestOrder = 30 * 24 * time.Hour
	LimitRate    = 32 << 10 // bytes/s
	LimitBurst   = 32 << 10 // bytes
	leastBurst   = 9216     // a whole frame
	mostAllowed  = 64
)

// ErrNoNetwork means that this agent does not stand between its host and the wire.
var ErrNoNetwork = fmt.Errorf("this agent has no packet path between the host and the wire: %w", kernel.ErrNotSupported)

// Remote names the traffic between the host and another machine, or a part of it.
type Remote struct {
	Addr  netip.Addr `json:"addr"`
	Proto uint8      `json:"proto,omitempty"` // of IANA; 0 means all, and then Port does, too
	Port  uint16     `json:"port,omitempty"`  // of the remote; 0 means all
}

// Canonical returns the same remote in the one form in which remotes are compared.
func (r Remote) Canonical() Remote {
	r.Addr = r.Addr.Unmap()
	return r
}

// NetworkOrder is what the packet path is to do: one of the three actions.
type NetworkOrder struct {
	Do string `json:"do"`
	// For is after which time it ends by itself.
	For time.Duration `json:"for,omitempty"` // ns
	// Allow are the remotes that a quarantined host may still talk to. Remote, if given, has the quarantine keep back that traffic only.
	Allow  []netip.Prefix `json:"allow,omitempty"`
	Remote *Remote        `json:"remote,omitempty"`
	// Rate is how many bytes the host may send a second, and Burst how many at once.
	Rate  uint64 `json:"rate,omitempty"`
	Burst uint64 `json:"burst,omitempty"`
}

// Check returns what is wrong with an order.
func (o NetworkOrder) Check() error {
	timed := o.Do != Release
	switch {
	case o.Do != Quarantine && o.Do != RateLimit && o.Do != Release:
		return fmt.Errorf("the network knows %s, %s and %s, not %q", Quarantine, RateLimit, Release, o.Do)
	case timed && (o.For < time.Second || o.For > LongestOrder):
		return fmt.Errorf("traffic is kept back for 1s to %v, not %v", LongestOrder, o.For)
	case !timed && o.For != 0:
		return errors.New("a release has no end")
	case o.Do != Quarantine && (len(o.Allow) > 0 || o.Remote != nil):
		return fmt.Errorf("only a %s has exceptions or a remote", Quarantine)
	case o.Remote != nil && (len(o.Allow) > 0 || !o.Remote.Addr.IsValid() || o.Remote.Proto == 0 && o.Remote.Port != 0):
		return errors.New("a remote has an address, a port only with its protocol, and no exceptions")
	case len(o.Allow) > mostAllowed:
		return fmt.Errorf("%d exceptions are more than %d", len(o.Allow), mostAllowed)
	case o.Do == RateLimit && (o.Rate < 1 || o.Rate > 1<<40 || o.Burst < leastBurst || o.Burst > 1<<32):
		return fmt.Errorf("a rate of %d bytes/s with bursts of %d: want 1 to %d, and %d to %d", o.Rate, o.Burst, uint64(1)<<40, leastBurst, uint64(1)<<32)
	case o.Do != RateLimit && (o.Rate != 0 || o.Burst != 0):
		return fmt.Errorf("only a %s has a rate", RateLimit)
	}
	for _, p := range o.Allow {
		if !p.IsValid() {
			return errors.New("an exception is no prefix")
		}
	}
	return nil
}

// Containment is what keeps the host's traffic back. Its parts hold independently of each other; a zero time means that the part does not.
type Containment struct {
	Quarantine time.Time      `json:"quarantine,omitzero"` // until when
	Allow      []netip.Prefix `json:"allow,omitempty"`
	Limit      time.Time      `json:"limit,omitzero"` // until when
	Rate       uint64         `json:"rate,omitempty"`
	Burst      uint64         `json:"burst,omitempty"`
	Blocked    []Blocked      `json:"blocked,omitempty"`
}

// Blocked is a remote that is kept back.
type Blocked struct {
	Remote
	Until time.Time `json:"until"`
}

// Holds reports whether anything is kept back.
func (c Containment) Holds() bool {
	return !c.Quarantine.IsZero() || !c.Limit.IsZero() || len(c.Blocked) > 0
}

// does reports whether what an order asks for is in force.
func (c Containment) does(o NetworkOrder) bool {
	switch o.Do {
	case Release:
		return !c.Holds()
	case RateLimit:
		return !c.Limit.IsZero()
	}
	if o.Remote == nil {
		return !c.Quarantine.IsZero()
	}
	for _, b := range c.Blocked {
		if b.Remote == o.Remote.Canonical() {
			return true
		}
	}
	return false
}

// Network is the packet path between the host and the wire.
type Network interface {
	// Containment tells what is kept back now.
	Containment() (Containment, error)
	// Contain does what an order says. When it returns, that is in force.
	Contain(context.Context, NetworkOrder) error
	// Restore has exactly c hold again.
	Restore(context.Context, Containment) error
}

func quarantine() Action {
	return Action{
		ID: Quarantine, Title: "Cut the host off from the network", Risk: RiskTask, For: everyKind(),
		Plan: func(_ context.Context, _ *kernel.View, f detect.Finding) (Plan, error) {
			p := ContainPlan(NetworkOrder{Do: Quarantine, For: ContainFor})
			return found(p, f), nil
		},
	}
}

func rateLimit() Action {
	return Action{
		ID: RateLimit, Title: "Bound what the host may send", Risk: RiskTask, For: []detect.Kind{detect.KindNetworkFlood, detect.KindNetworkScan},
		Plan: func(_ context.Context, _ *kernel.View, f detect.Finding) (Plan, error) {
			p := ContainPlan(NetworkOrder{Do: RateLimit, For: ContainFor, Rate: LimitRate, Burst: LimitBurst})
			return found(p, f), nil
		},
	}
}

// release is no remedy of anything: it is what operators order.
func release() Action {
	return Action{
		ID: Release, Title: "Let all of the host's traffic through again", Risk: RiskNone,
		Plan: func(_ context.Context, _ *kernel.View, f detect.Finding) (Plan, error) {
			return found(ContainPlan(NetworkOrder{Do: Release}), f), nil
		},
	}
}

// found makes a plan an answer to a finding. Keeping traffic back cures a flood; of anything else it only bounds the damage.
func found(p Plan, f detect.Finding) Plan {
	p.Finding, p.More = f.ID, f.Kind != detect.KindNetworkFlood
	p.Title += ": " + f.Title
	return p
}

// ContainPlan returns the plan of an order that somebody gives without a finding.
func ContainPlan(o NetworkOrder) Plan {
	p := Plan{Action: o.Do, Risk: RiskTask, Undo: o.Do != Release, More: true}
	s := Step{Op: OpNetwork, Network: &o, Undo: true}
	switch {
	case o.Do == Release:
		p.Risk, p.Title = RiskNone, "let all of the host's traffic through"
		s.Why = "nothing is to be kept back any longer"
	case o.Do == RateLimit:
		p.Title = fmt.Sprintf("let the host send %d bytes/s for %v", o.Rate, o.For)
		s.Why = "what it sends harms others; it ends by itself"
	case o.Remote != nil:
		p.Title = fmt.Sprintf("keep back what goes between the host and %v for %v", o.Remote.Addr, o.For)
		s.Why = "this traffic harms; it ends by itself"
	default:
		p.Title = fmt.Sprintf("cut the host off for %v", o.For)
		s.Why = "what goes on there must reach nobody; it ends by itself"
	}
	p.Steps = []Step{s}
	return p
}

// contain carries out a step of the network and looks whether it is in force.
func (r *run) contain(i int, s *Step, o *StepOutcome) error {
	n := r.x.o.Network
	was, err := n.Containment()
	if err != nil {
		return err
	}
	o.Contained = &was
	r.done = append(r.done, i) // also if it fails half-way
	if err := n.Contain(r.ctx, *s.Network); err != nil {
		return err
	}
	now, err := n.Containment()
	if err != nil {
		return err
	}
	if !now.does(*s.Network) {
		return fmt.Errorf("the packet path does not do it: %w", ErrNoEffect)
	}
	o.How = "packet path"
	return nil
}

// uncontain takes a step of the network back.
func (r *run) uncontain(i int) bool {
	for _, o := range r.out.Steps {
		if o.Step != i || o.Contained == nil {
			continue
		}
		if err := r.x.o.Network.Restore(r.ctx, *o.Contained); err != nil {
			r.x.log.Error("cannot undo", "plan", r.p.ID, "step", i, "err", err)
			return false
		}
		r.mark(i)
	}
	return true
}
