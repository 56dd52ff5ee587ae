package host

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const systemURI = "/redfish/v1/Systems/system"

const findingsURI = "/redfish/v1/Systems/system/LogServices/Findings/Entries"

func (h *host) system() service.Route {
	route := service.Route{
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
			h.describe(r.Context(), out)
			var running *schema.Link
			if k := state.Kernel; k != nil && state.Phase == engine.Attached {
				out.HostName = cmp.Or(h.look(r.Context()).HostName, k.Hostname)
				running = schema.LinkTo(systemURI + "/OperatingSystem")
				if k.CPUs > 0 {
					out.ProcessorSummary = &schema.ProcessorSummary{LogicalProcessorCount: k.CPUs}
				}
				h.summarize(r.Context(), out)
				out.LastResetTime = schema.Time(k.BootTime)
				out.BootProgress = &schema.BootProgress{LastState: schema.BootOSBootStarted}
				if !state.Dead && state.Health == engine.Healthy {
					out.BootProgress.LastState = schema.BootOSRunning
				}
			}
			var err error
			out.OEM, err = oem.Object(systemSchema.Type("ComputerSystem"), systemOEM{
				RDMA: h.rdmaLink(), Datapath: h.linked(datapathURI),
				OperatingSystem: running,
				Phase:           string(state.Phase), Since: state.Since, Health: string(state.Health), Why: state.Why, OpenFindings: len(open),
				State: schema.LinkTo(stateURI), Tasks: schema.LinkTo(tasksURI),
				Modules: listingLink("Modules"), Interfaces: listingLink("Interfaces"), OpenFiles: listingLink("OpenFiles"), Mounts: listingLink("Mounts"),
				Sockets: listingLink("Sockets"), SlabCaches: listingLink("SlabCaches"), Memory: listingLink("Memory"), MemoryErrors: listingLink("MemoryErrors"), PersistentStore: listingLink("PersistentStore"), Protections: listingLink("Protections"), PCI: listingLink("PCI"), Load: listingLink("Load"),
				MemoryLeases:  schema.LinkTo(leasesURI),
				ControlGroups: listingLink("ControlGroups"), Containers: listingLink("Containers"), Locks: listingLink("Locks"), WorkerPools: listingLink("WorkerPools"),
				Disks: listingLink("Disks"), BPF: listingLink("BPF"), Probes: listingLink("Probes"), KernelState: listingLink("KernelState"), RCU: listingLink("RCU"),
			})
			return out, err
		},
		Actions: []service.Action{
			{
				Name:       "ComputerSystem.Reset",
				Parameters: []service.Property{{Name: "ResetType", Kind: service.String, Required: true, Allowed: h.resetTypes}},
				Do:         h.reset,
			},
			h.agreementAction("ObeyOrder", "Obey an order about the access agreement", h.obey),
			h.agreementAction("OfferAgreement", "Offer an access agreement", h.offer),
		},
		Available: func(_ *service.Request, a service.Action) bool {
			return a.Name != "ComputerSystem.Reset" || h.o.Agent.Power() != nil
		},
	}
	route.Actions = append(route.Actions, h.healActions()...)
	route.Actions = append(route.Actions, h.memoryActions()...)
	route.Actions = append(route.Actions, h.rdmaActions()...)
	route.Actions = append(route.Actions, h.datapathActions()...)
	if h.o.Controller != nil {
		route.Patch = h.bootOverride()
	}
	return route
}

// powerOps are the reset types in the order of the specification, by what the engine calls them.
var powerOps = []struct {
	reset schema.ResetType
	op    string
	extra bool // only a heal.Orderer can do it
	rare  bool // only if the service processor says that it can
}{
	{schema.ResetOn, "on", false, false},
	{schema.ResetForceOff, "off", false, false},
	{schema.ResetGracefulShutdown, "shutdown", false, false},
	{schema.ResetGracefulRestart, heal.OrderRestart, true, false},
	{schema.ResetForceRestart, heal.OrderReset, false, false},
	{schema.ResetNMI, "nmi", false, false},
	{schema.ResetForceOn, "on", false, false},
	{schema.ResetPushPowerButton, heal.OrderButton, true, false},
	{schema.ResetPowerCycle, heal.OrderPowerCycle, false, false},
	{schema.ResetSuspend, heal.OrderSuspend, true, true},
	{schema.ResetPause, heal.OrderPause, true, true},
	{schema.ResetResume, heal.OrderResume, true, true},
}

// resetTypes are the reset types that the host's power controller can carry out, as far as it says.
func (h *host) resetTypes(r *service.Request) []string {
	var orders []string
	if o, ok := h.o.Agent.Power().(heal.Orderer); ok {
		orders = o.Orders()
	}
	offered := h.machine(r.Context()).Resets
	var out []string
	for _, p := range powerOps {
		want := p.reset
		if want == schema.ResetForceOn {
			want = schema.ResetOn // which is how it is done
		}
		if p.extra && !slices.Contains(orders, p.op) || (offered != nil || p.rare) && !slices.Contains(offered, want) {
			continue
		}
		out = append(out, string(p.reset))
	}
	return out
}

// reset is the action ComputerSystem.Reset.
func (h *host) reset(r *service.Request, v service.Values) (*service.Reply, error) {
	defer h.power.forget()
	defer h.described.forget() // what was to be booted once may have been
	for _, p := range powerOps {
		if string(p.reset) == v.String("ResetType") {
			op := p.op
			// A machine that is off restarts by being switched on, and many service processors refuse to do anything else with it.
			if (p.reset == schema.ResetForceRestart || p.reset == schema.ResetGracefulRestart) && h.powerState(r.Context()) == schema.PowerOff {
				op = "on"
			}
			return nil, refusal(h.o.Agent.PowerControl(r.Context(), op, r.Caller.User))
		}
	}
	return nil, fmt.Errorf("reset type %q is allowed and unknown", v.String("ResetType"))
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

const (
	powerFresh   = 2 * time.Second // an answer this old is taken without asking again
	powerStale   = 15 * time.Second
	powerTimeout = 20 * time.Second // for all ways to the controller
)

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
	return h.power.get(ctx, h.now, powerFresh, powerStale, func() schema.PowerState {
		ctx, cancel := context.WithTimeout(context.Background(), powerTimeout)
		defer cancel()
		text, err := controller.State(ctx)
		if err != nil {
			return ""
		}
		switch strings.ToLower(text) {
		case "on":
			return schema.PowerOn
		case "off":
			return schema.PowerOff
		case "paused":
			return schema.PowerPaused
		}
		return ""
	})
}
