// Package operator is the operator's side of an agent's Redfish service, as tests and demonstrations need it: it asks, and
// waits until the answer is the one that was waited for.
package operator

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

// every is how often an agent is asked when something is waited for. It bounds no figure: those come from the agent's own times
// of its findings, or from the harness.
const every = 100 * time.Millisecond

// Agent is an agent that the operator has logged in to.
type Agent struct {
	*client.Client
	// Config is how another client gets in: with the password that is good now.
	Config client.Config
}

// DPU is how the lab's DPU is reached: it is trusted by the certificate that it shows, as one that an operator was given.
func DPU(d *lab.DPU) (client.Config, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(d.CA) {
		return client.Config{}, errors.New("the DPU's certificate is not PEM")
	}
	return client.Config{URL: d.URL, User: d.User, Password: d.Password, CA: pool}, nil
}

// Dial logs in, and changes the password where the service demands that.
func Dial(ctx context.Context, c client.Config) (*Agent, error) {
	cl, err := client.New(c)
	if err != nil {
		return nil, err
	}
	var change *client.PasswordChangeError
	switch err := cl.Login(ctx); {
	case errors.As(err, &change):
		c.Password = rand.Text()
		if err := cl.ChangePassword(ctx, c.Password); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	}
	return &Agent{cl, c}, nil
}

// DialDPU logs in to the lab's DPU.
func DialDPU(ctx context.Context, d *lab.DPU) (*Agent, error) {
	c, err := DPU(d)
	if err != nil {
		return nil, err
	}
	return Dial(ctx, c)
}

// State returns the state of the agent.
func (a *Agent) State(ctx context.Context) (engine.State, error) {
	var r struct{ State engine.State }
	err := a.Get(ctx, client.StateURI, &r)
	return r.State, err
}

// Tasks lists the host's processes as the agent sees them.
func (a *Agent) Tasks(ctx context.Context) (query.Processes, error) {
	var r struct{ Processes query.Processes }
	err := a.Get(ctx, client.TasksURI, &r)
	return r.Processes, err
}

// WaitState waits until the state is as wanted; what names that in an error.
func (a *Agent) WaitState(ctx context.Context, what string, ok func(engine.State) bool) (engine.State, error) {
	var last engine.State
	for {
		st, err := a.State(ctx)
		if err != nil {
			return st, err
		}
		if ok(st) {
			return st, nil
		}
		last = st
		select {
		case <-ctx.Done():
			b, _ := json.Marshal(last)
			return st, fmt.Errorf("wait for %s: %w; the agent's state was %s", what, context.Cause(ctx), b)
		case <-time.After(every):
		}
	}
}

// WaitAttached waits until the agent has attached n times and is attached.
func (a *Agent) WaitAttached(ctx context.Context, n int) (engine.State, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 90*time.Second, errors.New("not within 90 seconds"))
	defer cancel()
	return a.WaitState(ctx, "the agent to attach", func(st engine.State) bool {
		return st.Phase == engine.Attached && st.Attaches >= n && st.Kernel != nil
	})
}

// Findings lists the open findings and the latest resolved ones.
func (a *Agent) Findings(ctx context.Context) ([]detect.Finding, error) {
	var all []detect.Finding
	for e, err := range client.Members[schema.LogEntry](ctx, a.Client, client.FindingsURI) {
		if err != nil {
			return nil, err
		}
		var o struct{ Finding detect.Finding }
		if _, err := client.OEM(e.OEM, &o); err != nil {
			return nil, fmt.Errorf("log entry %s: %w", e.ID, err)
		}
		all = append(all, o.Finding)
	}
	return all, nil
}

// WaitFinding waits for a finding, open or resolved.
func (a *Agent) WaitFinding(ctx context.Context, ok func(detect.Finding) bool) (detect.Finding, error) {
	for {
		all, err := a.Findings(ctx)
		if err != nil {
			return detect.Finding{}, err
		}
		for _, f := range all {
			if ok(f) {
				return f, nil
			}
		}
		select {
		case <-ctx.Done():
			b, _ := json.Marshal(all)
			return detect.Finding{}, fmt.Errorf("wait for a finding: %w; the agent has %s", context.Cause(ctx), b)
		case <-time.After(every):
		}
	}
}

// Dmesg returns the host's kernel log as the agent reads it.
func (a *Agent) Dmesg(ctx context.Context) (query.Log, error) {
	var l query.Log
	for e, err := range client.Members[schema.LogEntry](ctx, a.Client, client.DmesgURI) {
		if err != nil {
			return l, err
		}
		var o struct{ Record kernel.LogRecord }
		if _, err := client.OEM(e.OEM, &o); err != nil {
			return l, fmt.Errorf("log entry %s: %w", e.ID, err)
		}
		l.Records = append(l.Records, o.Record)
	}
	return l, nil
}

// HealAsProposed asks for the repair that policy proposes, and waits for its end.
func (a *Agent) HealAsProposed(ctx context.Context, finding string) error {
	_, err := a.Heal(ctx, client.HealRequest{Finding: finding}, nil)
	return err
}

// Repair waits for an open finding and asks for the repair that policy proposes, and again while the agent says that the host has
// moved on and the finding must be looked at anew. It returns when that was done, with the task, which tells how.
func (a *Agent) Repair(ctx context.Context, ours func(detect.Finding) bool) (*schema.Task, error) {
	for {
		f, err := a.WaitFinding(ctx, func(f detect.Finding) bool { return ours(f) && f.Resolved == nil })
		if err != nil {
			return nil, err
		}
		task, err := a.Heal(ctx, client.HealRequest{Finding: f.ID}, nil)
		if err == nil || !strings.Contains(err.Error(), heal.ErrStale.Error()) {
			return task, err
		}
	}
}

// Explain says what the agent thinks of a finding, for an error message.
func (a *Agent) Explain(ctx context.Context, id string) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	all, err := a.Findings(ctx)
	if err != nil {
		return err.Error()
	}
	for _, f := range all {
		if f.ID == id {
			b, _ := json.Marshal(f)
			return string(b)
		}
	}
	return "there is no such finding any more"
}

// Outcome returns what became of the agent's last repair of a finding.
func (a *Agent) Outcome(ctx context.Context, finding string) (*heal.Outcome, error) {
	var e schema.LogEntry
	if err := a.Get(ctx, client.FindingsURI+"/"+finding, &e); err != nil {
		return nil, err
	}
	var o struct{ Outcomes []heal.Outcome }
	if _, err := client.OEM(e.OEM, &o); err != nil {
		return nil, err
	}
	if len(o.Outcomes) == 0 {
		return nil, fmt.Errorf("finding %s has no record of its repair", finding)
	}
	return &o.Outcomes[len(o.Outcomes)-1], nil
}
