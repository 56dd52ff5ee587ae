package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// agent is a host behind an agent's Redfish service.
type agent struct {
	e  *env
	at agentAt
	c  *client.Client
	// own says that the session was opened by this program and ends with it.
	own bool

	logSeen int    // records of the kernel log in the last whole reading, and since
	logNext uint64 // sequence number behind the last one seen
}

func (e *env) openAgent(ctx context.Context) (*agent, error) {
	c, at, err := e.connect(ctx)
	if err != nil {
		return nil, err
	}
	return &agent{e: e, at: at, c: c, own: at.Token == ""}, nil
}

func (a *agent) Live() bool { return true }

// Name says which agent it is.
func (a *agent) Name() string { return a.at.URL }

// Close ends the session if it is not a stored one.
func (a *agent) Close() error {
	if !a.own {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return a.c.Close(ctx)
}

func (a *agent) get(ctx context.Context, uri string, out any) error {
	return a.e.explain(a.at, a.c.Get(ctx, uri, out))
}

// State reads the engine's state.
func (a *agent) State(ctx context.Context) (engine.State, error) {
	var r struct{ State engine.State }
	err := a.get(ctx, client.StateURI, &r)
	return r.State, err
}

func (a *agent) Status(ctx context.Context) (query.Status, error) {
	st, err := a.State(ctx)
	if err != nil {
		return query.Status{}, err
	}
	return statusOf(st, time.Now()), nil
}

// statusOf puts an engine's state into the words of a status.
func statusOf(st engine.State, now time.Time) query.Status {
	s := query.Status{
		At: now, Phase: string(st.Phase), Since: st.Since, Kernel: st.Kernel, Health: query.CouldNotTell,
		Agent: &query.Agent{Writes: st.Writes, Attaches: st.Attaches, Passes: st.Passes},
	}
	var unsure []string
	for _, d := range st.Detectors {
		if d.Health != engine.Healthy && d.Health != engine.Ill && !d.Withheld {
			unsure = append(unsure, d.ID)
		}
	}
	switch {
	case st.Health == engine.Healthy:
		s.Health, s.Why = query.Healthy, "every detector looked and found nothing"
	case st.Health == engine.Ill:
		s.Health, s.Why = query.Unhealthy, "findings are open; see: backdoor findings"
	case len(unsure) > 0:
		s.Why = "nothing was found, but not every detector could look: " + strings.Join(unsure, ", ")
	default:
		s.Why = "no detector has looked yet"
	}
	if st.Phase != engine.Attached {
		s.Why = "no kernel is attached"
	}
	if st.Why != "" {
		s.Why += ": " + st.Why
	}
	if st.Dead {
		s.Notes = append(s.Notes, "the attached kernel is dead; its memory is still read")
	}
	if p := st.Progress; p != nil && p.Total > 0 {
		s.Notes = append(s.Notes, fmt.Sprintf("searching: %s, %d %%", p.Stage, 100*p.Done/p.Total))
	}
	if st.AttachTook > 0 {
		s.Agent.AttachTook = query.Round(st.AttachTook)
	}
	if c := st.LastPass; !c.At.IsZero() {
		s.Agent.LastPass = fmt.Sprintf("%s, %d reads of %s bytes in all", query.Round(c.Took), c.Reads, query.Bytes(uint64(max(c.Bytes, 0))))
	}
	for _, d := range st.Detectors {
		line := d.ID + ": "
		switch {
		case d.Withheld:
			line += "withheld"
		case d.Health == engine.Healthy:
			line += "nothing found"
		case d.Health == engine.Ill:
			line += "FOUND SOMETHING"
		default:
			line += "could not tell"
		}
		if d.Error != "" {
			line += ": " + d.Error
		}
		s.Agent.Detectors = append(s.Agent.Detectors, line)
	}
	switch g := st.Agreement; {
	case g == nil:
		s.Agent.Agreement = "none: nothing is written to the host"
	case g.ID == "":
		s.Agent.Agreement = "none: " + g.Denied
	case g.Denied != "":
		s.Agent.Agreement = g.ID + " does not apply: " + g.Denied
	default:
		s.Agent.Agreement = g.ID + " of " + g.Owner
		if !g.ValidUntil.IsZero() {
			s.Agent.Agreement += ", until " + g.ValidUntil.UTC().Format(time.RFC3339)
		}
	}
	for _, f := range st.Errors {
		s.Agent.Errors = append(s.Agent.Errors, fmt.Sprintf("%s %s: %s (%d times)", f.At.UTC().Format(time.RFC3339), f.Where, strings.ReplaceAll(f.Error, "\n", "; "), f.Count))
	}
	if st.Healing != "" {
		s.Notes = append(s.Notes, "healing: plan "+st.Healing)
	}
	return s
}

func (a *agent) PS(ctx context.Context, o query.PSOptions) (query.Processes, error) {
	if o.Threads {
		return query.Processes{}, &usageError{verb: "ps", msg: "an agent lists whole processes; -threads works with -image and -mem"}
	}
	var r struct{ Processes query.Processes }
	err := a.get(ctx, client.TasksURI, &r)
	return r.Processes, unattached(err)
}

func (a *agent) Top(ctx context.Context, interval time.Duration) (query.Load, error) {
	return top(ctx, a, interval)
}

// ours decodes the project's own part of an answer, which must be there.
func ours(o schema.OEM, out any) error {
	ok, err := client.OEM(o, out)
	if err == nil && !ok {
		err = errors.New("the service says nothing of its own about it; is it an agent?")
	}
	return err
}

// Dmesg reads the log. To follow it cheaply it asks, after a first whole reading, only for what lies behind the last
// record seen; if that record is no longer where it was, the ring has turned or the host has rebooted, and all is read.
func (a *agent) Dmesg(ctx context.Context, o query.DmesgOptions) (query.Log, error) {
	at := time.Now()
	var records []kernel.LogRecord
	if a.logSeen > 0 && o.From == a.logNext {
		tail, err := a.log(ctx, a.logSeen-1)
		if err != nil {
			return query.Log{}, err
		}
		if len(tail) > 0 && tail[0].Seq+1 == a.logNext {
			records = tail[1:]
			a.logSeen += len(records)
		}
	}
	if records == nil {
		var err error
		if records, err = a.log(ctx, 0); err != nil {
			return query.Log{}, err
		}
		a.logSeen, a.logNext = len(records), 0
	}
	l := query.Log{At: at, Complete: true, Records: []kernel.LogRecord{}}
	for _, r := range records {
		a.logNext = r.Seq + 1
		if r.Seq >= o.From && (o.MaxLevel == nil || r.Level <= *o.MaxLevel) {
			l.Records = append(l.Records, r)
		}
	}
	l.Next = a.logNext
	return l, nil
}

// log reads the log's records behind the first skip ones.
func (a *agent) log(ctx context.Context, skip int) ([]kernel.LogRecord, error) {
	uri := client.DmesgURI
	if skip > 0 {
		uri += "?$skip=" + strconv.Itoa(skip)
	}
	records := []kernel.LogRecord{}
	for entry, err := range client.Members[schema.LogEntry](ctx, a.c, uri) {
		if err != nil {
			return nil, unattached(a.e.explain(a.at, err))
		}
		var x struct{ Record kernel.LogRecord }
		if err := ours(entry.OEM, &x); err != nil {
			return nil, fmt.Errorf("log entry %s: %w", entry.ID, err)
		}
		records = append(records, x.Record)
	}
	return records, nil
}

// Findings reads open and resolved findings.
func (a *agent) Findings(ctx context.Context) (query.Findings, error) {
	fs := query.Findings{}
	for entry, err := range client.Members[schema.LogEntry](ctx, a.c, client.FindingsURI) {
		if err != nil {
			return nil, a.e.explain(a.at, err)
		}
		f, err := finding(entry)
		if err != nil {
			return nil, err
		}
		fs = append(fs, f)
	}
	return fs, nil
}

// Finding reads one finding.
func (a *agent) Finding(ctx context.Context, id string) (detect.Finding, error) {
	var entry schema.LogEntry
	err := a.get(ctx, client.FindingsURI+"/"+url.PathEscape(id), &entry)
	var refused *client.Error
	if errors.As(err, &refused) && refused.Status == 404 {
		return detect.Finding{}, fmt.Errorf("there is no finding %q; see: backdoor findings -all", id)
	}
	if err != nil {
		return detect.Finding{}, err
	}
	return finding(entry)
}

func finding(entry schema.LogEntry) (detect.Finding, error) {
	var x struct{ Finding detect.Finding }
	if err := ours(entry.OEM, &x); err != nil {
		return detect.Finding{}, fmt.Errorf("finding %s: %w", entry.ID, err)
	}
	return x.Finding, nil
}

// Journal reads the agent's records from sequence number from on.
func (a *agent) Journal(ctx context.Context, from uint64) ([]journal.Record, error) {
	records := []journal.Record{}
	for entry, err := range client.Members[schema.LogEntry](ctx, a.c, client.JournalURI) {
		if err != nil {
			return nil, a.e.explain(a.at, err)
		}
		// Data is served as the text that was hashed.
		var x struct {
			Record struct {
				Restart, Seq uint64
				Time         time.Time
				Kind, Data   string
			}
		}
		if err := ours(entry.OEM, &x); err != nil {
			return nil, fmt.Errorf("journal entry %s: %w", entry.ID, err)
		}
		r := journal.Record{Restart: x.Record.Restart, Seq: x.Record.Seq, Time: x.Record.Time, Kind: x.Record.Kind}
		if json.Valid([]byte(x.Record.Data)) {
			r.Data = json.RawMessage(x.Record.Data)
		}
		if r.Seq >= from {
			records = append(records, r)
		}
	}
	return records, nil
}

// healed is what came of a request to heal.
type healed struct {
	Plan    *heal.Plan    `json:"plan,omitempty"`
	Outcome *heal.Outcome `json:"outcome,omitempty"`
}

// Heal plans, or plans and carries out, a repair.
func (a *agent) Heal(ctx context.Context, finding, action string, value *heal.Value, dryRun bool, agreed *heal.Plan, progress func(string)) (healed, error) {
	r := client.HealRequest{Finding: finding, Action: action, DryRun: dryRun}
	if agreed != nil {
		r.Action, r.Plan, value = agreed.Action, agreed.Digest(), agreed.Value
	}
	if value != nil {
		r.Setting, r.Value = value.Name, &value.Number
	}
	task, err := a.c.Heal(ctx, r, telling(progress))
	return a.healed(task, err)
}

// Undo plans, or plans and carries out, that the repair of a finding is taken back.
func (a *agent) Undo(ctx context.Context, finding string, dryRun bool, agreed *heal.Plan, progress func(string)) (healed, error) {
	r := client.UndoRequest{Finding: finding, DryRun: dryRun}
	if agreed != nil {
		r.Plan = agreed.Digest()
	}
	task, err := a.c.UndoHeal(ctx, r, telling(progress))
	return a.healed(task, err)
}

// telling makes lines of a task's progress.
func telling(progress func(string)) func(schema.Task) {
	return func(t schema.Task) {
		if progress != nil && t.PercentComplete != nil {
			progress(fmt.Sprintf("task %s: %s, %d %%", t.ID, t.TaskState, *t.PercentComplete))
		}
	}
}

// healed takes plan and outcome out of a task.
func (a *agent) healed(task *schema.Task, err error) (healed, error) {
	var h healed
	if task != nil {
		if oemErr := ours(task.OEM, &h); oemErr != nil && err == nil {
			err = fmt.Errorf("task %s: %w", task.ID, oemErr)
		}
	}
	return h, a.e.explain(a.at, denied(err))
}

// denied gives refusals by the agent itself their exit code.
func denied(err error) error {
	var failed *client.TaskError
	if !errors.As(err, &failed) {
		return err
	}
	for _, m := range failed.Task.Messages {
		switch messageKey(m.MessageID) {
		case "InsufficientPrivilege", "AccessDenied", "ResourceAtUriUnauthorized", "ActionNotPermitted":
			return &codeError{exitDenied, err}
		}
	}
	return err
}

func messageKey(id string) string {
	for i := len(id) - 1; i >= 0; i-- {
		if id[i] == '.' {
			return id[i+1:]
		}
	}
	return id
}

// unattached gives answers that need a kernel their exit code when there is none.
func unattached(err error) error {
	var refused *client.Error
	if errors.As(err, &refused) && refused.Status == 503 {
		return &codeError{exitUnsure, fmt.Errorf("%w; see: backdoor status", err)}
	}
	return err
}

// PowerState reads the host's power state as its BMC tells it.
func (a *agent) PowerState(ctx context.Context) (schema.PowerState, error) {
	s, err := a.c.System(ctx)
	if err != nil {
		return "", a.e.explain(a.at, err)
	}
	return s.PowerState, nil
}

// Reset gives an order about the host's power.
func (a *agent) Reset(ctx context.Context, t schema.ResetType) error {
	return a.e.explain(a.at, a.c.Reset(ctx, t))
}

var _ source = (*agent)(nil)
