package host

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const findingsURI = "/redfish/v1/Systems/system/LogServices/Findings/Entries"

func (h *host) system() service.Route {
	return service.Route{
		URI:  "/redfish/v1/Systems/system",
		Type: schema.TypeComputerSystem,
		Get: func(r *service.Request) (schema.Object, error) {
			state := h.o.Agent.State()
			open := openFindings(h.o.Agent.Findings())
			out := &schema.ComputerSystem{
				Resource:   schema.Resource{Name: "system", Description: "The host that the agent watches"},
				SystemType: "Physical", UUID: state.HostUUID, PowerState: h.powerState(r.Context()),
				LogServices: schema.LinkTo("/redfish/v1/Systems/system/LogServices"),
				Links: &schema.SystemLinks{
					Chassis:   []schema.Link{{ID: "/redfish/v1/Chassis/1"}},
					ManagedBy: []schema.Link{{ID: "/redfish/v1/Managers/bmc"}},
				},
			}
			out.Status = h.status(out.PowerState, open)
			if k := state.Kernel; k != nil && state.Phase == engine.Attached {
				out.HostName = k.Hostname
				if k.CPUs > 0 {
					out.ProcessorSummary = &schema.ProcessorSummary{LogicalProcessorCount: k.CPUs}
				}
				out.LastResetTime = schema.Time(k.BootTime)
				out.BootProgress = &schema.BootProgress{LastState: schema.BootOSBootStarted}
				if !state.Dead && state.Health == engine.Healthy {
					out.BootProgress.LastState = schema.BootOSRunning
				}
			}
			var err error
			out.OEM, err = oem.Object(systemSchema.Type("ComputerSystem"), systemOEM{
				Phase: string(state.Phase), Since: state.Since, Health: string(state.Health), Why: state.Why, OpenFindings: len(open),
				State: schema.LinkTo(stateURI), Tasks: schema.LinkTo(tasksURI),
			})
			return out, err
		},
		Actions: []service.Action{
			{
				Name:       "ComputerSystem.Reset",
				Parameters: []service.Property{{Name: "ResetType", Kind: service.String, Required: true, Values: resetTypes()}},
				Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
					defer h.power.forget()
					return nil, refusal(h.o.Agent.PowerControl(r.Context(), powerOps[schema.ResetType(v.String("ResetType"))], r.Caller.User))
				},
			},
			h.healAction(),
		},
		Available: func(_ *service.Request, a service.Action) bool {
			return a.Name != "ComputerSystem.Reset" || h.o.Agent.Power() != nil
		},
	}
}

// powerOps are the reset types that a power controller can carry out, by what the engine calls them. ForceRestart and PowerCycle
// are the same to it: power off, power on.
var powerOps = map[schema.ResetType]string{
	schema.ResetOn: "on", schema.ResetForceOff: "off", schema.ResetGracefulShutdown: "shutdown", schema.ResetForceRestart: "cycle",
	schema.ResetPowerCycle: "cycle", schema.ResetNMI: "nmi",
}

func resetTypes() []string {
	var out []string
	for _, t := range []schema.ResetType{
		schema.ResetOn, schema.ResetForceOff, schema.ResetGracefulShutdown, schema.ResetForceRestart, schema.ResetPowerCycle, schema.ResetNMI,
	} {
		out = append(out, string(t))
	}
	return out
}

func openFindings(all []detect.Finding) []detect.Finding {
	var open []detect.Finding
	for _, f := range all {
		if f.Resolved == nil && !f.Suspicion {
			open = append(open, f)
		}
	}
	return open
}

// status judges the host. Health is absent unless the engine is sure of it.
func (h *host) status(power schema.PowerState, open []detect.Finding) *schema.Status {
	state := h.o.Agent.State()
	s := &schema.Status{}
	switch {
	case power == schema.PowerOff:
		s.State = schema.StateDisabled
		return s // whether it is well cannot be told
	case state.Phase == engine.Attached:
		s.State = schema.StateEnabled
	case state.Phase == engine.NoMemory:
		s.State = schema.StateUnavailableOffline
	default:
		s.State = schema.StateStarting
	}
	switch state.Health {
	case engine.Healthy:
		s.Health = schema.HealthOK
	case engine.Ill:
		s.Health = schema.HealthWarning
		if open == nil {
			open = openFindings(h.o.Agent.Findings())
		}
		for _, f := range open {
			if f.Severity == detect.Critical {
				s.Health = schema.HealthCritical
			}
		}
	}
	s.HealthRollup = s.Health
	for _, f := range open {
		id, args, text := findingMessage(f)
		s.Conditions = append(s.Conditions, schema.Condition{
			MessageID: id, MessageArgs: args, Message: text, Severity: severity(f.Severity), Timestamp: schema.Time(f.FirstSeen),
			OriginOfCondition: schema.LinkTo("/redfish/v1/Systems/system"), LogEntry: schema.LinkTo(findingsURI + "/" + f.ID),
		})
	}
	return s
}

func severity(s detect.Severity) schema.Health {
	if s == detect.Critical {
		return schema.HealthCritical
	}
	return schema.HealthWarning
}

// powerState remembers the host's power state for a moment: its controller is asked over a network.
type powerState struct {
	mu     sync.Mutex // guards what follows
	value  schema.PowerState
	at     time.Time
	asking chan struct{} // closed when the controller has answered; nil if it is not being asked
	epoch  int           // counts forget: an answer to an older question is not kept
}

const (
	powerFresh   = 2 * time.Second // an answer this old is taken without asking again
	powerStale   = 15 * time.Second
	powerTimeout = 10 * time.Second
)

func (p *powerState) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.value, p.at = "", time.Time{}
	p.epoch++
	p.asking = nil
}

// powerState returns the host's power state, or "" if it cannot be told. The controller has the last word; a kernel that is
// seen working proves that the power is on as well.
func (h *host) powerState(ctx context.Context) schema.PowerState {
	controller := h.o.Agent.Power()
	if controller == nil {
		if state := h.o.Agent.State(); state.Phase == engine.Attached && state.Health == engine.Healthy && !state.Dead {
			return schema.PowerOn
		}
		return ""
	}
	p := &h.power
	p.mu.Lock()
	age := h.now().Sub(p.at)
	if !p.at.IsZero() && age < powerFresh {
		defer p.mu.Unlock()
		return p.value
	}
	if p.asking == nil {
		p.asking = make(chan struct{})
		go h.askPower(controller.State, p.asking, p.epoch)
	}
	asking, value := p.asking, p.value
	known := !p.at.IsZero() && age < powerStale
	p.mu.Unlock()
	if known {
		return value // the next request gets the newer one
	}
	select {
	case <-asking:
	case <-ctx.Done():
		return ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.value
}

func (h *host) askPower(ask func(context.Context) (string, error), done chan struct{}, epoch int) {
	ctx, cancel := context.WithTimeout(context.Background(), powerTimeout)
	defer cancel()
	text, err := ask(ctx)
	p := &h.power
	p.mu.Lock()
	defer p.mu.Unlock()
	defer close(done)
	if p.epoch != epoch {
		return
	}
	p.asking = nil
	p.at, p.value = h.now(), ""
	if err == nil {
		switch strings.ToLower(text) {
		case "on":
			p.value = schema.PowerOn
		case "off":
			p.value = schema.PowerOff
		}
	}
}
