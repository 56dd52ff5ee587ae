package host

import (
	"context"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Relay publishes what happens to the host as Redfish events until ctx ends: events are a channel of the engine's. What only
// the agent itself needs to know, suspicions, is left out.
func Relay(ctx context.Context, svc *service.Service, events <-chan engine.Event) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-events:
			if !ok {
				return nil
			}
			if out, ok := relayed(e); ok {
				svc.Publish(out)
			}
		}
	}
}

// eventNames are the messages of our registry by type of event; a finding has the message of its kind.
var eventNames = map[engine.EventType]struct {
	name     string
	severity schema.Health
}{
	engine.EventAttached:  {"Attached", schema.HealthOK},
	engine.EventLost:      {"Lost", schema.HealthWarning},
	engine.EventFinding:   {"", ""},
	engine.EventResolved:  {"Resolved", schema.HealthOK},
	engine.EventPlanned:   {"RepairStarted", schema.HealthOK},
	engine.EventHealed:    {"Repaired", schema.HealthOK},
	engine.EventDone:      {"Done", schema.HealthOK},
	engine.EventFailed:    {"RepairFailed", schema.HealthCritical},
	engine.EventWaiting:   {"OperatorWanted", schema.HealthWarning},
	engine.EventEscalated: {"Escalated", schema.HealthCritical},
	engine.EventAgreement: {"AgreementChanged", schema.HealthWarning},
}

// relayed is an engine's event as a Redfish event.
func relayed(e engine.Event) (service.Event, bool) {
	m, ok := eventNames[e.Type]
	if !ok {
		return service.Event{}, false
	}
	out := service.Event{
		MessageID: "BackdoorHost.1.0." + m.name, Args: []string{e.Text}, Message: e.Text, Severity: m.severity, Origin: systemURI, Time: e.At,
	}
	if e.Finding != nil {
		if !e.Finding.Suspicion {
			out.LogEntry = findingsURI + "/" + e.Finding.ID
		}
		if e.Type == engine.EventFinding {
			out.MessageID, out.Args, out.Message = findingMessage(*e.Finding)
			out.Severity = severity(e.Finding.Severity)
		}
	}
	return out, true
}

// Conditions returns the faults that are open now, for service.Options.Conditions.
func Conditions(findings func() []detect.Finding) func(*service.Request) []schema.Condition {
	return func(*service.Request) (all []schema.Condition) {
		for _, f := range findings() {
			if f.Suspicion || f.Resolved != nil {
				continue
			}
			id, args, text := findingMessage(f)
			all = append(all, schema.Condition{
				MessageID: id, MessageArgs: args, Message: text, Severity: severity(f.Severity), Timestamp: schema.Time(f.FirstSeen),
				OriginOfCondition: schema.LinkTo(systemURI), LogEntry: schema.LinkTo(findingsURI + "/" + f.ID),
			})
		}
		return all
	}
}

// Audit keeps the service's audit trail in a journal, as records of the kind "audit", for service.Options.Audit.
func Audit(j interface {
	Write(kind string, v any) (uint64, error)
}) func(service.AuditRecord) error {
	return func(rec service.AuditRecord) error {
		_, err := j.Write("audit", rec)
		return err
	}
}

// The privileges of our own, beyond those of the specification.
const (
	// PrivilegeHeal lets the agent heal a finding of the host. Administrators and operators have it.
	PrivilegeHeal = "BackdoorHeal"
	// PrivilegeReadMemory lets somebody collect and download what the host's memory holds. Administrators have it.
	PrivilegeReadMemory = "BackdoorReadMemory"
	// PrivilegeMemory gives raw access to the host's memory. No predefined role has it: an administrator makes a role that does.
	PrivilegeMemory = "BackdoorMemory"
)
