// Package host is the Redfish resources of a host that the agent watches, bound to the agent's engine.
//
// The host is Systems/system, the only system; the agent is Managers/bmc; the machine is Chassis/1 and the card that the agent
// runs on Chassis/dpu. Every property is either truly known or absent: a host of which nothing could be told has no Health,
// and is never shown as OK. What no standard resource can carry is under Oem (see oem.go): the engine's state, the host's
// processes, and the action that heals a finding, which runs as a task.
package host

import (
	"context"
	"errors"
	"io"
	"iter"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/dump"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Agent is what the resources need of the engine. *engine.Engine has it.
type Agent interface {
	State() engine.State
	Findings() []detect.Finding
	Finding(id string) (detect.Finding, bool)
	// Outcomes returns what became of the repairs of a finding, automatic ones too, the oldest first.
	Outcomes(finding string) []heal.Outcome
	Heal(context.Context, engine.HealRequest) (heal.Plan, *heal.Outcome, error)
	// Undo takes back a finished repair.
	Undo(context.Context, engine.UndoRequest) (heal.Plan, *heal.Outcome, error)
	View(context.Context) (*kernel.View, error)
	Power() heal.Power
	// PowerControl does what op says, "on", "off", "cycle", "nmi", "shutdown" or an order of package heal, if the access
	// agreement gives that right.
	PowerControl(ctx context.Context, op, caller string) error
	// Control does another order to the host's service processor under the same right.
	Control(ctx context.Context, what, detail, caller string, do func(context.Context) error) error
	// MayRead returns nil if the access agreement permits looking at the host's memory.
	MayRead() error
	// Recording returns the series by which a finding was judged, or of no finding the series as it is, as detect.ReadRecording reads it.
	Recording(ctx context.Context, finding string) ([]byte, error)
	// Obey carries out a signed order about the access agreement, and Offer takes an agreement.
	Obey(o *access.Order, caller string) error
	Offer(a *access.Agreement, caller string) error
	// MayLease returns nil if settings and agreement permit operators to reach a range of the host's memory byte for byte.
	MayLease(r hostmem.Range, write bool) error
	// Store stores to the host's memory by address.
	Store(context.Context, engine.StoreRequest) (heal.Outcome, error)
	// Contain keeps the host's traffic back, or lets it go.
	Contain(context.Context, heal.NetworkOrder, string) (heal.Outcome, error)
}

// Journal is the agent's journal. *journal.Journal has it.
type Journal interface {
	Records() iter.Seq2[journal.Record, error]
}

var (
	_ Agent   = (*engine.Engine)(nil)
	_ Journal = (*journal.Journal)(nil)
)

// Options are what the resources show. Agent is required.
type Options struct {
	Agent Agent
	// Journal is shown as Managers/bmc/LogServices/Journal; nil leaves it out.
	Journal Journal
	// Version is the agent's.
	Version string
	// Manufacturer and Model are of the card that the agent runs on, where known.
	Manufacturer, Model string
	// Controller is the host's service processor beyond its power; nil if there is none.
	Controller Controller
	// DumpDir keeps the diagnostic data that was collected; what is in it is removed at the start. Empty leaves out the log
	// service that collects.
	DumpDir string
	// Attestor proves what the agent's machine runs; nil if that is nothing to be proven.
	Attestor Attestor
	// Root is where the agent's own machine is looked into; empty means "/". Tests give a directory.
	Root string
	// Network configures the network of the agent's machine; nil if that is not the agent's business.
	Network Network
	// RDMA is the agent's remote access by RDMA; nil leaves it out.
	RDMA RDMA
	// Datapath is the packet path between the host and the wire; nil if the agent does not stand there.
	Datapath Datapath
	// ResetAgent restarts the agent's machine; nil leaves the action out.
	ResetAgent func(ctx context.Context, graceful bool) error
	// View opens a view of the host; nil means Agent.View. Tests give a host of their own.
	View func(context.Context) (query.View, error)
	// Hardware tells what the host is made of; nil means what Agent.View tells.
	Hardware func(context.Context) (Hardware, error)
	// Memory opens the host's memory for reading, with the map of its RAM; nil means that of Agent.View.
	Memory func(context.Context) (io.ReaderAt, []hostmem.Range, error)
	// Core lays out a core of the host's memory; nil means of Agent.View's.
	Core func(context.Context) (*dump.Core, error)
}

// host is the state behind the resources.
type host struct {
	o       Options
	svc     *service.Service
	view    func(context.Context) (query.View, error)
	now     func() time.Time
	started time.Time

	power     asked[schema.PowerState]
	described asked[Machine]
	hardware  asked[Hardware]
	dmesg     cached[query.Log]
	dumps     dumps
	leases    leases
}

// Configure adds to a service's options what the resources need: our schemas, our message registry, the names.
func Configure(o *service.Options) {
	if o.Product == "" {
		o.Product = "Backdoor"
	}
	if o.Vendor == "" {
		o.Vendor = "Backdoor"
	}
	if o.Index == "" {
		// bmclib's provider for OpenBMC looks for that name here before it updates firmware.
		o.Index = "<!DOCTYPE html>\n<title>Backdoor</title>\n<p>Backdoor &mdash; OpenBMC-compatible Redfish service: <a href=\"/redfish/v1/\">/redfish/v1/</a></p>\n"
	}
	o.Schemas = append(o.Schemas, schemas()...)
	o.Registries = append(o.Registries, registry)
	o.Telemetry = telemetry()
	o.OEMPrivileges = map[string][]string{"Administrator": {PrivilegeHeal, PrivilegeReadMemory}, "Operator": {PrivilegeHeal}}
	o.MorePrivileges = append(o.MorePrivileges, PrivilegeMemory)
}

// Routes returns the resources. The service's options must have gone through Configure.
func Routes(svc *service.Service, o Options) []service.Route {
	h := &host{o: o, svc: svc, view: o.View, now: time.Now, started: time.Now()}
	if h.o.Root == "" {
		h.o.Root = "/"
	}
	if h.view == nil {
		h.view = func(ctx context.Context) (query.View, error) {
			v, err := o.Agent.View(ctx)
			if err != nil {
				return nil, err
			}
			return v, nil
		}
	}
	routes := []service.Route{
		{URI: "/redfish/v1/Systems", Type: schema.TypeComputerSystemCollection, Name: "Computer Systems", Members: service.Fixed("system")},
		h.system(),
		{URI: "/redfish/v1/Managers", Type: schema.TypeManagerCollection, Name: "Managers", Members: service.Fixed("bmc")},
		h.manager(),
		{URI: "/redfish/v1/Chassis", Type: schema.TypeChassisCollection, Name: "Chassis", Members: service.Fixed("1", "dpu")},
		h.enclosure(),
		h.card(),
	}
	routes = append(routes, svc.NetworkRoutes("/redfish/v1/Managers/bmc")...)
	routes = append(routes, h.logs()...)
	routes = append(routes, h.parts()...)
	routes = append(routes, h.memoryRoutes()...)
	routes = append(routes, h.pciRoutes()...)
	routes = append(routes, h.media()...)
	routes = append(routes, h.managerParts()...)
	routes = append(routes, h.integrity()...)
	routes = append(routes, h.listingResources()...)
	routes = append(routes, h.leaseRoutes()...)
	routes = append(routes, h.rdmaRoutes()...)
	routes = append(routes, h.datapathRoutes()...)
	return append(routes, h.oemResources()...)
}

func (h *host) manager() service.Route {
	r := service.Route{
		URI:  "/redfish/v1/Managers/bmc",
		Type: schema.TypeManager,
		Get: func(*service.Request) (schema.Object, error) {
			out := &schema.Manager{
				Resource:    schema.Resource{Name: "Backdoor agent", Description: "The agent that watches and heals the host through its memory"},
				ManagerType: "BMC", UUID: h.svc.UUID(), ServiceEntryPointUUID: h.svc.UUID(),
				Manufacturer: h.o.Manufacturer, Model: h.o.Model, FirmwareVersion: h.o.Version,
				DateTime: schema.Time(h.now()), DateTimeLocalOffset: "+00:00", LastResetTime: schema.Time(h.started),
				NetworkProtocol: schema.LinkTo("/redfish/v1/Managers/bmc/NetworkProtocol"),
				PowerState:      schema.PowerOn, Status: &schema.Status{State: schema.StateEnabled, Health: h.agentHealth()},
				Links: &schema.ManagerLinks{
					ManagerForServers: []schema.Link{{ID: "/redfish/v1/Systems/system"}},
					ManagerForChassis: []schema.Link{{ID: "/redfish/v1/Chassis/1"}, {ID: "/redfish/v1/Chassis/dpu"}},
					ManagerInChassis:  schema.LinkTo("/redfish/v1/Chassis/dpu"),
				},
			}
			out.DiagnosticData = schema.LinkTo(managerURI + "/ManagerDiagnosticData")
			out.EthernetIfaces = schema.LinkTo(managerURI + "/EthernetInterfaces")
			if h.o.Journal != nil {
				out.LogServices = schema.LinkTo("/redfish/v1/Managers/bmc/LogServices")
			}
			return out, nil
		},
	}
	if h.o.ResetAgent != nil {
		r.Actions = []service.Action{service.ManagerReset(h.o.ResetAgent)}
	}
	return r
}

// agentHealth judges the agent, not the host: it is fine as long as it reaches the host's memory.
func (h *host) agentHealth() schema.Health {
	if h.o.Agent.State().Phase == engine.NoMemory {
		return schema.HealthWarning
	}
	return schema.HealthOK
}

func (h *host) enclosure() service.Route {
	return service.Route{
		URI:  "/redfish/v1/Chassis/1",
		Type: schema.TypeChassis,
		Get: func(r *service.Request) (schema.Object, error) {
			power := h.powerState(r.Context())
			out := &schema.Chassis{
				Resource: schema.Resource{Name: "Host", Description: "The machine of the host"},
				// What the enclosure is, only the host's own service processor may know.
				ChassisType: "Other", PowerState: power,
				Links: &schema.ChassisLinks{
					ComputerSystems: []schema.Link{{ID: "/redfish/v1/Systems/system"}},
					ManagedBy:       []schema.Link{{ID: "/redfish/v1/Managers/bmc"}},
					Contains:        []schema.Link{{ID: "/redfish/v1/Chassis/dpu"}},
				},
			}
			m := h.machine(r.Context())
			out.Manufacturer, out.Model, out.SerialNumber, out.PartNumber, out.SKU = m.Manufacturer, m.Model, m.SerialNumber, m.PartNumber, m.SKU
			out.Status = h.status(power, nil)
			out.Status.Conditions = nil // they are the system's
			if len(h.look(r.Context()).PCI) > 0 {
				out.PCI = schema.LinkTo(pciURI)
			}
			return out, nil
		},
	}
}

func (h *host) card() service.Route {
	return service.Route{
		URI:  "/redfish/v1/Chassis/dpu",
		Type: schema.TypeChassis,
		Get: func(*service.Request) (schema.Object, error) {
			out := &schema.Chassis{
				Resource:    schema.Resource{Name: "DPU", Description: "The card that the agent runs on"},
				ChassisType: "Card", Manufacturer: h.o.Manufacturer, Model: h.o.Model, PowerState: schema.PowerOn,
				Status:   &schema.Status{State: schema.StateEnabled, Health: h.agentHealth()},
				Adapters: schema.LinkTo(cardURI + "/NetworkAdapters"),
				Links: &schema.ChassisLinks{
					ManagedBy:         []schema.Link{{ID: "/redfish/v1/Managers/bmc"}},
					ManagersInChassis: []schema.Link{{ID: "/redfish/v1/Managers/bmc"}},
					ContainedBy:       schema.LinkTo("/redfish/v1/Chassis/1"),
				},
			}
			if h.trusts() {
				out.Trusted = schema.LinkTo(cardURI + "/TrustedComponents")
			}
			return out, nil
		},
	}
}

// refusal turns an error of the engine into one that tells the client what is wrong. The text of errors that an operator can do
// something about is passed on; others stay in the log.
func refusal(err error) error {
	var told *service.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &told):
		return err
	case errors.Is(err, access.ErrDenied):
		return service.Because(403, "InsufficientPrivilege", sentence(err)+" The host's owner must sign an agreement that permits it.")
	case errors.Is(err, engine.ErrWritesOff):
		return service.Because(403, "InsufficientPrivilege", sentence(err)+" Start the agent with writes enabled.")
	case errors.Is(err, engine.ErrNoRecording):
		return service.Because(404, "ResourceNotFound", sentence(err), "Recording", "Finding")
	case errors.Is(err, engine.ErrNoFinding):
		return service.Because(404, "ResourceNotFound", sentence(err), "LogEntry", "Finding")
	case errors.Is(err, engine.ErrNoUndo):
		return service.Because(409, "ResourceInUse", sentence(err))
	case errors.Is(err, engine.ErrBusy):
		return service.Because(409, "ResourceInUse", sentence(err))
	case errors.Is(err, heal.ErrProtected):
		return service.Because(403, "InsufficientPrivilege", sentence(err))
	case errors.Is(err, heal.ErrStale), errors.Is(err, heal.ErrMismatch), errors.Is(err, heal.ErrGone):
		return service.Because(409, "ResourceInUse", sentence(err)+" The host has moved on; look at the finding again.")
	case errors.Is(err, heal.ErrValue):
		return service.Because(400, "ActionParameterValueError", sentence(err), "Value", "BackdoorComputerSystem.Heal")
	case errors.Is(err, engine.ErrNotAttached):
		return service.Because(503, "ServiceTemporarilyUnavailable", sentence(err)+" Retry in 5 seconds.", "5")
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return service.Because(500, "OperationFailed", sentence(err))
}

// sentence makes a sentence of an error's text.
func sentence(err error) string {
	s := err.Error()
	if s != "" && 'a' <= s[0] && s[0] <= 'z' {
		s = string(s[0]-'a'+'A') + s[1:]
	}
	return s + "."
}

// cached keeps a value that is dear to get, for as long as it is fresh. While one caller gets it, the others wait for the same.
type cached[T any] struct {
	mu    sync.Mutex // guards what follows, and is held while the value is got
	value T
	at    time.Time
}

func (c *cached[T]) get(now time.Time, fresh time.Duration, load func() (T, error)) (T, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.at.IsZero() && now.Sub(c.at) < fresh && now.Sub(c.at) >= 0 {
		return c.value, nil
	}
	v, err := load()
	if err != nil {
		var none T
		return none, err
	}
	c.value, c.at = v, now
	return v, nil
}
