package host

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	stateURI = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/State"
	tasksURI = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/Tasks"
)

// Our schemas. A version is never changed once it was released, only followed by another.
var (
	systemSchema = oem.Schema{
		Name: "BackdoorComputerSystem", Version: "v1_0_0", Purpose: "How the agent stands with the host that it watches.",
		Objects: map[string]any{"ComputerSystem": systemOEM{}},
		Actions: append([]oem.Action{{
			Name: "Heal", Bound: "ComputerSystem.v1_0_0.OemActions",
			Description: "Plans a repair of a finding and, unless DryRun is true, carries it out. It runs as a task whose Oem object holds the plan and the outcome.",
			Parameters: []oem.Parameter{
				{Name: "Finding", Type: "Edm.String", Required: true, Description: "The Id of the finding's log entry."},
				{Name: "Action", Type: "Edm.String", Description: "The repair. If absent, the one that policy proposes."},
				{Name: "DryRun", Type: "Edm.Boolean", Description: "Plan only; nothing is written to the host."},
				{Name: "Setting", Type: "Edm.String", Description: "What an action that takes a value is to set. It goes with Value; without both the policy's value is taken."},
				{Name: "Value", Type: "Edm.Int64", Description: "The number that Setting is to have, in its own unit. What is allowed depends on the setting, the access agreement and the host's kernel."},
			},
		}, {
			Name: "UndoHeal", Bound: "ComputerSystem.v1_0_0.OemActions",
			Description: "Plans to take back the latest repair of a finding, as far as it is one that can be taken back, and, unless DryRun is true, does so. It runs as a task whose Oem object holds the plan and the outcome.",
			Parameters: []oem.Parameter{
				{Name: "Finding", Type: "Edm.String", Required: true, Description: "The Id of the finding's log entry; the finding may be resolved."},
				{Name: "DryRun", Type: "Edm.Boolean", Description: "Plan only; nothing is written to the host."},
			},
		}}, slices.Concat(leaseActions, agreementActions)...),
	}
	stateSchema = oem.Schema{
		Name: "BackdoorState", Version: "v1_0_0", Purpose: "The state of the agent's engine.", Resource: stateResource{},
		URIs: []string{"/redfish/v1/Systems/{ComputerSystemId}/Oem/" + oem.Identifier + "/State"},
	}
	processesSchema = oem.Schema{
		Name: "BackdoorTasks", Version: "v1_0_0", Purpose: "The processes of the host, read from its memory.", Resource: processesResource{},
		URIs: []string{"/redfish/v1/Systems/{ComputerSystemId}/Oem/" + oem.Identifier + "/Tasks"},
	}
	logSchema = oem.Schema{
		Name: "BackdoorLogEntry", Version: "v1_0_0", Purpose: "What a log entry is about, in full.",
		Objects: map[string]any{"FindingEntry": findingOEM{}, "KernelEntry": kernelRecordOEM{}, "JournalEntry": journalRecordOEM{}},
	}
	logServiceSchema = oem.Schema{
		Name: "BackdoorLogService", Version: "v1_0_0", Purpose: "How diagnostic data is collected from the host's memory.",
		Actions: []oem.Action{{
			Name: "CollectMemoryRange", Bound: "LogService.v1_0_0.OemActions",
			Description: "Copies a range of the host's RAM into a new entry of the log. It runs as a task whose monitor ends with the entry's location.",
			Parameters: []oem.Parameter{
				{Name: "Start", Type: "Edm.String", Required: true, Description: "The physical address of the first byte, as 0x and hexadecimal digits."},
				{Name: "Length", Type: "Edm.Int64", Required: true, Description: "The number of bytes."},
			},
		}, {
			Name: "CollectRecording", Bound: "LogService.v1_0_0.OemActions",
			Description: "Copies the series of samples by which a finding was judged when it was told of into a new entry of the log. It runs as a task whose monitor ends with the entry's location.",
			Parameters: []oem.Parameter{
				{Name: "Finding", Type: "Edm.String", Required: true, Description: "The Id of the finding's log entry; the finding may be resolved. The latest 32 are kept."},
			},
		}},
	}
	taskSchema = oem.Schema{
		Name: "BackdoorTask", Version: "v1_0_0", Purpose: "The result of a task.", Objects: map[string]any{"Heal": healOEM{}},
	}
)

func schemas() (out []service.Schema) {
	for _, s := range []oem.Schema{systemSchema, stateSchema, processesSchema, logSchema, logServiceSchema, taskSchema, leasesSchema, leaseSchema, trustedSchema} {
		out = append(out, served(s))
	}
	for _, l := range listings() {
		out = append(out, served(l.schema))
	}
	out = append(out, served(rdmaSchema()), served(datapathSchema()))
	return out
}

// served is a schema in all its forms.
func served(s oem.Schema) service.Schema {
	out := service.Schema{Namespace: s.Name, Versions: []string{s.Version}, CSDL: s.CSDL, JSON: map[string]func() []byte{
		s.Name + "." + s.Version: func() []byte { versioned, _ := s.JSON(); return versioned },
	}}
	if s.Resource != nil {
		out.JSON[s.Name] = func() []byte { _, unversioned := s.JSON(); return unversioned }
	}
	return out
}

// systemOEM is the Oem object of the system.
type systemOEM struct {
	Phase        string       `json:"phase" doc:"How far the agent is with the host: no-memory, searching, attached or lost."`
	Since        time.Time    `json:"since" doc:"When the phase began."`
	Health       string       `json:"health" doc:"Whether the host is well: yes, no or could-not-tell."`
	Why          string       `json:"why,omitempty" doc:"Why the agent is not attached to a kernel of the host."`
	OpenFindings int          `json:"openFindings" doc:"The number of findings that are not resolved."`
	State        *schema.Link `json:"state" doc:"The link to the whole state of the agent's engine."`
	Tasks        *schema.Link `json:"tasks" doc:"The link to the processes of the host."`
	RDMA         *schema.Link `json:"RDMA,omitempty" doc:"The link to remote access by RDMA; absent where the agent does not serve it."`
	Datapath     *schema.Link `json:"datapath,omitempty" doc:"The link to the packet path between the host and the wire; absent where the agent does not stand there."`
	// gofish 0.20, and with it bmclib, takes the system's standard property of this name for text and then reads no system at all.
	OperatingSystem *schema.Link `json:"operatingSystem,omitempty" doc:"The link to the operating system of the host; absent while the agent is not attached to its kernel."`
	Modules         *schema.Link `json:"modules" doc:"The link to the modules of the host's kernel."`
	Interfaces      *schema.Link `json:"interfaces" doc:"The link to the network interfaces of the host, those of containers among them."`
	OpenFiles       *schema.Link `json:"openFiles" doc:"The link to the files that processes of the host have open."`
	Mounts          *schema.Link `json:"mounts" doc:"The link to the mounts of the host."`
	Sockets         *schema.Link `json:"sockets" doc:"The link to the sockets of the host and whose they are."`
	SlabCaches      *schema.Link `json:"slabCaches" doc:"The link to what the host's kernel uses its own memory for."`
	Memory          *schema.Link `json:"memory" doc:"The link to what the host's memory is used for."`
	MemoryErrors    *schema.Link `json:"memoryErrors" doc:"The link to the errors that the host's memory controllers have counted."`
	PCI             *schema.Link `json:"pCI" doc:"The link to what is on the PCI buses of the host."`
	Protections     *schema.Link `json:"protections" doc:"The link to what the host's kernel protects itself with, and how strong that stands."`
	PersistentStore *schema.Link `json:"persistentStore" doc:"The link to what earlier kernels of the host left of their logs when they died."`
	Load            *schema.Link `json:"load" doc:"The link to the load averages and run queues of the host."`
	MemoryLeases    *schema.Link `json:"memoryLeases" doc:"The link to the leases of the host's memory."`
	ControlGroups   *schema.Link `json:"controlGroups" doc:"The link to the control groups of the host with their limits and use."`
	Containers      *schema.Link `json:"containers" doc:"The link to the containers of the host and what runs in them."`
	Locks           *schema.Link `json:"locks" doc:"The link to the locks that tasks of the host wait for, and deadlocks among them."`
	WorkerPools     *schema.Link `json:"workerPools" doc:"The link to what the workers of the host's kernel do and what waits for them."`
	Disks           *schema.Link `json:"disks" doc:"The link to the block devices of the host and the requests under way."`
	BPF             *schema.Link `json:"bPF" doc:"The link to the eBPF programs, maps and links of the host."`
	Probes          *schema.Link `json:"probes" doc:"The link to what is hooked into the code of the host's kernel."`
	KernelState     *schema.Link `json:"kernelState" doc:"The link to the command line, taint, clock, security modules and swap of the host's kernel."`
	RCU             *schema.Link `json:"rCU" doc:"The link to the state of RCU in the host's kernel."`
}

// stateResource is the resource …/Oem/dev_backdoor/State.
type stateResource struct {
	schema.Resource
	State oem.Value[engine.State] `doc:"The state of the engine at this moment."`
}

// processesResource is the resource …/Oem/dev_backdoor/Tasks.
type processesResource struct {
	schema.Resource
	Processes oem.Value[query.Processes] `doc:"The processes, and how far the list can be trusted."`
}

type (
	findingOEM struct {
		Finding  detect.Finding `json:"finding" doc:"The finding in full."`
		Outcomes []heal.Outcome `json:"outcomes,omitempty" doc:"What became of the repairs of the finding, automatic ones too, the oldest first."`
	}
	kernelRecordOEM struct {
		Record kernel.LogRecord `json:"record" doc:"The record of the host's kernel log as it was read."`
	}
	journalRecordOEM struct {
		Record journalRecord `json:"record" doc:"The record of the agent's journal."`
	}
	// journalRecord is journal.Record with its data as text: what is in there depends on the kind, and its bytes are what was hashed.
	journalRecord struct {
		Restart uint64    `json:"restart" doc:"Tells the agent's starts apart."`
		Seq     uint64    `json:"seq" doc:"Rises by one from record to record over the journal's whole life."`
		Time    time.Time `json:"time" doc:"When the record was written, by the agent's clock."`
		Kind    string    `json:"kind" doc:"What the record is about, such as intent, store or outcome."`
		Data    string    `json:"data,omitempty" doc:"A JSON document whose form depends on the kind, byte for byte as it was hashed."`
	}
	healOEM struct {
		Plan    heal.Plan     `json:"plan" doc:"What is to be done, step by step."`
		Digest  string        `json:"digest,omitempty" doc:"Names what the plan does. Who has agreed to the plan gives it as Plan to the action that carries it out."`
		Outcome *heal.Outcome `json:"outcome,omitempty" doc:"What became of it; absent if nothing was begun."`
	}
)

func (h *host) oemResources() []service.Route {
	return []service.Route{
		{
			URI: stateURI, Type: stateSchema.Type("BackdoorState"),
			Get: func(*service.Request) (schema.Object, error) {
				return &stateResource{Resource: schema.Resource{Name: "Engine state"}, State: oem.Value[engine.State]{V: h.o.Agent.State()}}, nil
			},
		},
		{
			URI: tasksURI, Type: processesSchema.Type("BackdoorTasks"),
			Get: func(r *service.Request) (schema.Object, error) {
				v, err := h.view(r.Context())
				if err != nil {
					return nil, refusal(err)
				}
				p, err := query.PS(r.Context(), v, query.PSOptions{})
				if err != nil {
					return nil, refusal(err)
				}
				return &processesResource{Resource: schema.Resource{Name: "Host processes"}, Processes: oem.Value[query.Processes]{V: p}}, nil
			},
		},
	}
}

// healActions are the actions that heal a finding, and take that back.
func (h *host) healActions() []service.Action {
	privileges := service.Privileges{{service.ConfigureComponents, PrivilegeHeal}}
	finding := service.Property{Name: "Finding", Kind: service.String, Required: true, Min: 1, Max: 128}
	dry := service.Property{Name: "DryRun", Kind: service.Boolean}
	agreed := service.Property{Name: "Plan", Kind: service.String, Min: 64, Max: 64} // the digest of a dry run's
	// start has a task do the work.
	start := func(r *service.Request, v service.Values, verb, title string, do func(context.Context) (heal.Plan, *heal.Outcome, error)) (*service.Reply, error) {
		id := v.String("Finding")
		if _, ok := h.o.Agent.Finding(id); !ok {
			return nil, service.Because(404, "ResourceNotFound", fmt.Sprintf("There is no finding %q. The findings are listed at %s.", id, findingsURI), "LogEntry", id)
		}
		name := title + " " + id
		if v.Bool("DryRun") {
			name = "Plan to " + verb + " " + id
		}
		return r.Task(name, func(ctx context.Context, t *service.Task) (*service.Reply, error) { return healing(ctx, t, do) })
	}
	return []service.Action{
		{
			Name: "BackdoorComputerSystem.Heal", OEM: true, Title: "Heal a finding", Privileges: privileges,
			Parameters: []service.Property{finding, {Name: "Action", Kind: service.String, Values: heal.IDs()}, dry, agreed, {Name: "Setting", Kind: service.String, Values: settings()}, {Name: "Value", Kind: service.Number}},
			Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
				value, err := valueOf(v)
				if err != nil {
					return nil, err
				}
				req := engine.HealRequest{Finding: v.String("Finding"), Action: v.String("Action"), DryRun: v.Bool("DryRun"), Agreed: v.String("Plan"), Value: value, Caller: r.Caller.User}
				return start(r, v, "heal", "Heal", func(ctx context.Context) (heal.Plan, *heal.Outcome, error) { return h.o.Agent.Heal(ctx, req) })
			},
		},
		{
			Name: "BackdoorComputerSystem.UndoHeal", OEM: true, Title: "Take back the repair of a finding", Privileges: privileges,
			Parameters: []service.Property{finding, dry, agreed},
			Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
				req := engine.UndoRequest{Finding: v.String("Finding"), DryRun: v.Bool("DryRun"), Agreed: v.String("Plan"), Caller: r.Caller.User}
				return start(r, v, "take back the repair of", "Take back the repair of", func(ctx context.Context) (heal.Plan, *heal.Outcome, error) {
					return h.o.Agent.Undo(ctx, req)
				})
			},
		},
	}
}

// settings are the names of all that actions can be given a value of.
func settings() (names []string) {
	for _, a := range heal.Actions() {
		for _, s := range a.Settings {
			names = append(names, s.Name)
		}
	}
	return names
}

// valueOf returns what an action is to be given; nil if nothing. That a value fits its setting, and both the action, is judged at once, for
// a task could only say so later.
func valueOf(v service.Values) (*heal.Value, error) {
	const action = "BackdoorComputerSystem.Heal"
	switch {
	case !v.Has("Setting") && !v.Has("Value"):
		return nil, nil
	case !v.Has("Setting"):
		return nil, service.Because(400, "ActionParameterMissing", "Value is the number that Setting is to have; give both.", action, "Setting")
	case !v.Has("Value"):
		return nil, service.Because(400, "ActionParameterMissing", "Setting needs a Value; give both.", action, "Value")
	}
	value := &heal.Value{Name: v.String("Setting"), Number: v.Int("Value")}
	id := v.String("Action")
	if id == "" {
		_, id, _ = heal.SettingOf(value.Name)
	}
	if a, ok := heal.Find(id); ok {
		if err := a.Check(value); err != nil {
			return nil, refusal(err)
		}
	}
	return value, nil
}

// healing is the work of a task that changes the host by a plan.
func healing(ctx context.Context, t *service.Task, do func(context.Context) (heal.Plan, *heal.Outcome, error)) (*service.Reply, error) {
	t.Progress(5, "The finding is looked at again, and a plan is made.")
	plan, outcome, err := do(ctx)
	if plan.ID != "" {
		result, oerr := oem.Object(taskSchema.Type("Heal"), healOEM{Plan: plan, Digest: plan.Digest(), Outcome: outcome})
		if oerr != nil {
			return nil, oerr
		}
		if oerr := t.SetOEM(oem.Identifier, result[oem.Identifier]); oerr != nil {
			return nil, oerr
		}
	}
	if err != nil {
		return nil, refusal(err)
	}
	switch {
	case outcome == nil:
		t.Progress(99, fmt.Sprintf("The plan %q has %d steps. Nothing was written to the host.", plan.Title, len(plan.Steps)))
	case outcome.Verified:
		t.Progress(99, fmt.Sprintf("%s: done and verified.", plan.Title))
	case plan.More && outcome.Error == "":
		t.Progress(99, fmt.Sprintf("%s: done. The finding stands.", plan.Title))
	default:
		text := plan.Title + ": the fault is still there, or it could not be told."
		if outcome.Error != "" {
			text = plan.Title + ": " + outcome.Error + "."
		}
		if outcome.Undone {
			text += " Every store was taken back."
		}
		return nil, service.Because(500, "OperationFailed", text)
	}
	return nil, nil
}
