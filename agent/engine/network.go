package engine

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
)

// Network is the packet path between the host and the wire.
type Network interface {
	heal.Network
	// Sample counts what the host has sent and was sent.
	Sample(now time.Time) (detect.NetworkSample, error)
}

// networkEvery is the least time between two samples of the network.
const networkEvery = 200 * time.Millisecond

// sampleNetwork takes a sample when it is due, and returns those of lately; nil if the packet path does not answer.
func (w *watcher) sampleNetwork(now time.Time) []detect.NetworkSample {
	e := w.e
	if e.o.Network == nil {
		return nil
	}
	if n := len(w.network); n > 0 && now.Sub(w.network[n-1].At) < networkEvery {
		return w.network
	}
	var s detect.NetworkSample
	err := w.guarded("network", func() (err error) {
		s, err = e.o.Network.Sample(now)
		return err
	})
	if err != nil {
		w.network = nil
		return nil
	}
	w.network = append(w.network, s)
	for len(w.network) > 2 && now.Sub(w.network[1].At) > detect.NetworkKept {
		w.network = slices.Delete(w.network, 0, 1)
	}
	return w.network
}

// contained returns what keeps the host's traffic back; nil if nothing does.
func (e *Engine) contained() *heal.Containment {
	if e.o.Network == nil {
		return nil
	}
	c, err := e.o.Network.Containment()
	if err != nil || !c.Holds() {
		return nil
	}
	return &c
}

// Contain keeps the host's traffic back, or lets it go again, for an operator. It needs what every repair needs but a finding: writes
// switched on, the action in the agreement and not beyond its rate, the intent in the journal. It does not wait for a repair that is under way, and returns when
// the order is in force.
func (e *Engine) Contain(ctx context.Context, o heal.NetworkOrder, caller string) (heal.Outcome, error) {
	if err := o.Check(); err != nil {
		return heal.Outcome{}, fmt.Errorf("%w: %w", err, heal.ErrInvalidPlan)
	}
	if e.o.Network == nil {
		return heal.Outcome{}, heal.ErrNoNetwork
	}
	if !e.o.Writes {
		return heal.Outcome{}, ErrWritesOff
	}
	if caller == callerPolicy {
		caller = "operator " + callerPolicy
	}
	e.network.Lock()
	defer e.network.Unlock()
	p := heal.ContainPlan(o)
	e.mu.Lock()
	e.plans++
	p.ID, p.Made = fmt.Sprintf("plan-%d", e.plans), time.Now()
	grant := e.grant()
	err := e.begin(grant, p.Action, p.Made)
	e.mu.Unlock()
	if err != nil {
		return heal.Outcome{}, fmt.Errorf("%s: %w", o.Do, err)
	}
	x := heal.NewExecutor(heal.Options{Grant: grant, Journal: e.journalOrNil(), Network: e.o.Network, Logger: e.log})
	out, err := x.ApplyNext(ctx, p, caller) // there is no finding that could be seen again
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		e.publish(Event{Type: EventFailed, Text: fmt.Sprintf("%s for %s has failed: %v", o.Do, caller, err), Outcome: &out})
		return out, err
	}
	e.publish(Event{Type: EventDone, Text: fmt.Sprintf("%s: %s (for %s)", p.ID, p.Title, caller), Outcome: &out})
	return out, nil
}

// journalOrNil keeps a nil pointer from becoming a heal.Journal that is not nil.
func (e *Engine) journalOrNil() heal.Journal {
	if e.o.Journal == nil {
		return nil
	}
	return e.o.Journal
}
