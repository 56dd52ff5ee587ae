package healing

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
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

// allTasks lists the service's tasks.
const allTasks = "/redfish/v1/TaskService/Tasks"

// every is how often the story asks the agent when it waits for it. It bounds no figure: those come from the agent's own times
// of its findings, or from the harness.
const every = 100 * time.Millisecond

// agent is the operator's side of the agent's Redfish service.
type agent struct{ *client.Client }

// dial logs in with the credential that the DPU printed on its console, and changes its password, as the service demands.
func dial(ctx context.Context, d *lab.DPU) (*agent, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(d.CA) {
		return nil, errors.New("the DPU's certificate is not PEM")
	}
	c, err := client.New(client.Config{URL: d.URL, User: d.User, Password: d.Password, CA: pool})
	if err != nil {
		return nil, err
	}
	var change *client.PasswordChangeError
	switch err := c.Login(ctx); {
	case errors.As(err, &change):
		if err := c.ChangePassword(ctx, rand.Text()); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	}
	return &agent{c}, nil
}

func (a *agent) state(ctx context.Context) (engine.State, error) {
	var r struct{ State engine.State }
	err := a.Get(ctx, client.StateURI, &r)
	return r.State, err
}

func (a *agent) tasks(ctx context.Context) (query.Processes, error) {
	var r struct{ Processes query.Processes }
	err := a.Get(ctx, client.TasksURI, &r)
	return r.Processes, err
}

func (a *agent) waitState(ctx context.Context, what string, ok func(engine.State) bool) (engine.State, error) {
	var last engine.State
	for {
		st, err := a.state(ctx)
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

// waitAttached waits until the agent has attached n times and is attached.
func (a *agent) waitAttached(ctx context.Context, n int) (engine.State, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 90*time.Second, errors.New("not within 90 seconds"))
	defer cancel()
	return a.waitState(ctx, "the agent to attach", func(st engine.State) bool {
		return st.Phase == engine.Attached && st.Attaches >= n && st.Kernel != nil
	})
}

func (a *agent) findings(ctx context.Context) ([]detect.Finding, error) {
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

func (a *agent) waitFinding(ctx context.Context, ok func(detect.Finding) bool) (detect.Finding, error) {
	for {
		all, err := a.findings(ctx)
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

func (a *agent) dmesg(ctx context.Context) (query.Log, error) {
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

// heal asks for the repair that policy proposes, and waits for its end.
func (a *agent) heal(ctx context.Context, finding string) error {
	_, err := a.Heal(ctx, client.HealRequest{Finding: finding}, nil)
	return err
}

// explain says what the agent thinks of a finding, for an error message.
func (a *agent) explain(ctx context.Context, id string) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	all, err := a.findings(ctx)
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

// outcome returns what became of the agent's repair of a finding; nil if the service keeps no task of it.
func (a *agent) outcome(ctx context.Context, finding string) (*heal.Outcome, error) {
	for t, err := range client.Members[schema.Task](ctx, a.Client, allTasks) {
		if err != nil {
			return nil, err
		}
		var o struct{ Outcome *heal.Outcome }
		if _, err := client.OEM(t.OEM, &o); err != nil {
			return nil, err
		}
		if o.Outcome != nil && o.Outcome.Plan.Finding == finding {
			return o.Outcome, nil
		}
	}
	return nil, nil
}
