package host

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// registry is our message registry: what findings say.
var registry = service.Registry{
	Prefix: "BackdoorHost", Version: "1.0.0", Owner: "Backdoor",
	Description: "This registry defines the messages about faults that the agent finds in a host.",
	Messages: map[string]service.RegistryMessage{
		"Panic":            fault("The host's kernel has panicked.", schema.HealthCritical, "Read the kernel log, then restart the host."),
		"CPUStall":         fault("A CPU of the host makes no progress.", schema.HealthCritical, "Read the kernel log; heal the finding or restart the host."),
		"RunawayProcess":   fault("A process of the host uses a CPU beyond what policy allows.", schema.HealthWarning, "Heal the finding, which ends the process."),
		"HostSilent":       fault("Nothing on the host progresses.", schema.HealthCritical, "Check the host's power, then restart the host."),
		"ForkBomb":         fault("A tree of tasks of the host grows without end.", schema.HealthCritical, "Heal the finding, which ends the tree."),
		"MemoryHog":        fault("The host's memory runs out within moments.", schema.HealthCritical, "Heal the finding, which ends the process."),
		"Exhaustion":       fault("Something of the host's runs out.", schema.HealthWarning, "Find out what uses it up, and end that or raise the limit."),
		"KernelRecord":     note("A record of the host's kernel log.", "%1", "string"),
		"JournalRecord":    note("The agent has decided or done something.", "%1", "string"),
		"DiagnosticData":   note("Diagnostic data was collected from the host.", "The %1.", "string"),
		"Finding":          fault("The agent has found a fault in the host.", schema.HealthWarning, "See the details of the finding."),
		"Attached":         happened("The agent has found the host's kernel in its memory.", schema.HealthOK, "None."),
		"Lost":             happened("The agent no longer reaches the host's kernel.", schema.HealthWarning, "Check the host's power."),
		"Resolved":         happened("A fault of the host is gone.", schema.HealthOK, "None."),
		"RepairStarted":    happened("A repair has begun.", schema.HealthOK, "None."),
		"Repaired":         happened("A repair has worked.", schema.HealthOK, "None."),
		"Done":             happened("What was asked for beside a repair is done.", schema.HealthOK, "None."),
		"RepairFailed":     happened("A repair has not worked.", schema.HealthCritical, "Read the journal; heal the finding another way or restart the host."),
		"OperatorWanted":   happened("A fault waits for an operator's decision.", schema.HealthWarning, "Look at the finding and heal it."),
		"AgreementChanged": happened("The access agreement was paused, resumed, revoked or succeeded, its glass was broken, or somebody tried to.", schema.HealthWarning, "Read the journal."),
		"Escalated":        happened("A fault goes on in spite of its repair.", schema.HealthCritical, "Read the journal; heal the finding another way or restart the host."),
		"RDMARefused":      happened("Packets or requests by RDMA were dropped or refused.", schema.HealthWarning, "See who sends them: the counters and leases are at the origin of the event."),
	},
}

func fault(description string, s schema.Health, resolution string) service.RegistryMessage {
	return service.RegistryMessage{
		Description: description, Message: "%1: %2", Severity: s, NumArgs: 2, ParamTypes: []string{"string", "string"}, Resolution: resolution,
	}
}

// happened is a message about what happened, whose only argument tells it.
func happened(description string, s schema.Health, resolution string) service.RegistryMessage {
	return service.RegistryMessage{Description: description, Message: "%1", Severity: s, NumArgs: 1, ParamTypes: []string{"string"}, Resolution: resolution}
}

func note(description, text string, params ...string) service.RegistryMessage {
	return service.RegistryMessage{
		Description: description, Message: text, Severity: schema.HealthOK, NumArgs: len(params), ParamTypes: params, Resolution: "None.",
	}
}

// messageNames are the messages by kind of finding; others are a Finding.
var messageNames = map[detect.Kind]string{
	detect.KindPanic: "Panic", detect.KindCPUStall: "CPUStall", detect.KindRunawayProcess: "RunawayProcess", detect.KindHostSilent: "HostSilent",
	detect.KindForkBomb: "ForkBomb", detect.KindMemoryHog: "MemoryHog", detect.KindExhaustion: "Exhaustion",
}

func findingMessage(f detect.Finding) (id string, args []string, text string) {
	name := messageNames[f.Kind]
	if name == "" {
		name = "Finding"
	}
	return "BackdoorHost.1.0." + name, []string{f.Title, f.Detail}, f.Title + ": " + f.Detail
}

func (h *host) logs() []service.Route {
	names := []string{"Findings", "Dmesg"}
	if h.o.DumpDir != "" {
		names = append(names, "Dump")
	}
	routes := []service.Route{{
		URI: "/redfish/v1/Systems/system/LogServices", Type: schema.TypeLogServiceCollection, Name: "Log Services", Members: service.Fixed(names...),
	}}
	routes = append(routes, h.collecting()...)
	routes = append(routes, h.log("/redfish/v1/Systems/system/LogServices/Findings", h.findings, schema.LogService{
		Resource:     schema.Resource{Name: "Findings", Description: "Faults that the agent has found in the host, the newest first"},
		LogEntryType: "Event", LogPurposes: []string{"Diagnostic", "Operations"}, OverWritePolicy: "WrapsWhenFull",
	})...)
	routes = append(routes, h.log("/redfish/v1/Systems/system/LogServices/Dmesg", h.dmesgEntries, schema.LogService{
		Resource:     schema.Resource{Name: "Kernel log", Description: "The host's kernel log, read from its memory, the oldest record first"},
		LogEntryType: "OEM", LogPurposes: []string{"Diagnostic"}, OverWritePolicy: "WrapsWhenFull",
	})...)
	if h.o.Journal != nil {
		routes = append(routes, service.Route{
			URI: "/redfish/v1/Managers/bmc/LogServices", Type: schema.TypeLogServiceCollection, Name: "Log Services", Members: service.Fixed("Journal"),
		})
		routes = append(routes, h.log("/redfish/v1/Managers/bmc/LogServices/Journal", h.journalEntries, schema.LogService{
			Resource:     schema.Resource{Name: "Journal", Description: "What the agent decided and did, hash-chained, the oldest record first"},
			LogEntryType: "OEM", LogPurposes: []string{"Operations", "Security"}, OverWritePolicy: "WrapsWhenFull",
		})...)
	}
	return routes
}

// log returns the routes of a log service and its entries.
func (h *host) log(uri string, entries func(*service.Request) (service.Listing, error), look schema.LogService) []service.Route {
	return []service.Route{
		{
			URI: uri, Type: schema.TypeLogService,
			Get: func(*service.Request) (schema.Object, error) {
				out := look
				out.ServiceEnabled = true
				out.DateTime, out.DateTimeLocalOffset = schema.Time(h.now()), "+00:00"
				out.Status = &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK}
				out.Entries = schema.LinkTo(uri + "/Entries")
				return &out, nil
			},
		},
		{URI: uri + "/Entries", Type: schema.TypeLogEntryCollection, Name: look.Name + " entries", Entries: entries},
	}
}

func (h *host) findings(*service.Request) (service.Listing, error) {
	all := slices.DeleteFunc(slices.Clone(h.o.Agent.Findings()), func(f detect.Finding) bool { return f.Suspicion })
	return service.Listing{
		Len: len(all),
		ID:  func(i int) string { return all[i].ID },
		At:  func(i int) (schema.Object, error) { return findingEntry(all[i], h.o.Agent.Outcomes(all[i].ID)) },
	}, nil
}

func findingEntry(f detect.Finding, outcomes []heal.Outcome) (*schema.LogEntry, error) {
	resolved := f.Resolved != nil
	id, args, text := findingMessage(f)
	e := &schema.LogEntry{
		Resource:  schema.Resource{Name: f.Title},
		EntryType: "Event", Created: schema.Time(f.FirstSeen), Modified: schema.Time(f.LastSeen), Severity: severity(f.Severity),
		Message: text, MessageID: id, MessageArgs: args, Resolved: &resolved,
		Links: &schema.LogEntryLinks{OriginOfCondition: schema.LinkTo("/redfish/v1/Systems/system")},
	}
	switch {
	case resolved:
		e.Modified = schema.Time(*f.Resolved)
		e.Resolution = f.Resolution
	case f.Action != "":
		e.Resolution = fmt.Sprintf("Run the action BackdoorComputerSystem.Heal of the system with Finding %q; it will do %q.", f.ID, f.Action)
	}
	var err error
	e.OEM, err = oem.Object(logSchema.Type("FindingEntry"), findingOEM{Finding: f, Outcomes: outcomes})
	return e, err
}

// dmesgFresh is how long a reading of the kernel log serves: a client takes a page after the other.
const dmesgFresh = 2 * time.Second

func (h *host) dmesgEntries(r *service.Request) (service.Listing, error) {
	log, err := h.dmesg.get(h.now(), dmesgFresh, func() (query.Log, error) {
		ctx, cancel := context.WithTimeout(r.Context(), 20*time.Second)
		defer cancel()
		v, err := h.view(ctx)
		if err != nil {
			return query.Log{}, err
		}
		return query.Dmesg(ctx, v, query.DmesgOptions{})
	})
	if err != nil {
		return service.Listing{}, refusal(err)
	}
	var boot time.Time
	if k := h.o.Agent.State().Kernel; k != nil {
		boot = k.BootTime
	}
	return service.Listing{
		Len: len(log.Records),
		ID:  func(i int) string { return strconv.FormatUint(log.Records[i].Seq, 10) },
		At:  func(i int) (schema.Object, error) { return dmesgEntry(log.Records[i], boot) },
	}, nil
}

func dmesgEntry(rec kernel.LogRecord, boot time.Time) (*schema.LogEntry, error) {
	e := &schema.LogEntry{
		Resource:  schema.Resource{Name: "Kernel log record"},
		EntryType: "Oem", OEMRecordFmt: "Linux kernel log", Severity: levelSeverity(rec.Level), Message: rec.Text,
		MessageID: "BackdoorHost.1.0.KernelRecord", MessageArgs: []string{rec.Text},
	}
	if !boot.IsZero() {
		e.Created = schema.Time(boot.Add(rec.Time))
	}
	var err error
	e.OEM, err = oem.Object(logSchema.Type("KernelEntry"), kernelRecordOEM{Record: rec})
	return e, err
}

// levelSeverity maps the kernel's levels (include/linux/kern_levels.h): up to KERN_ERR, KERN_WARNING, and the rest.
func levelSeverity(level uint8) schema.Health {
	switch {
	case level <= 3:
		return schema.HealthCritical
	case level == 4:
		return schema.HealthWarning
	}
	return schema.HealthOK
}

func (h *host) journalEntries(*service.Request) (service.Listing, error) {
	var all []journal.Record
	for rec, err := range h.o.Journal.Records() {
		if err != nil {
			return service.Listing{}, service.Because(500, "OperationFailed", "Reading the journal: "+err.Error()+".")
		}
		all = append(all, rec)
	}
	return service.Listing{
		Len: len(all),
		ID:  func(i int) string { return strconv.FormatUint(all[i].Seq, 10) },
		At:  func(i int) (schema.Object, error) { return journalEntry(all[i]) },
	}, nil
}

func journalEntry(rec journal.Record) (*schema.LogEntry, error) {
	text := rec.Kind
	if len(rec.Data) > 0 {
		text += " " + string(rec.Data)
	}
	const enough = 4096
	if len(text) > enough {
		text = text[:enough] + "…"
	}
	e := &schema.LogEntry{
		Resource:  schema.Resource{Name: "Journal record"},
		EntryType: "Oem", OEMRecordFmt: "Backdoor journal", Created: schema.Time(rec.Time), Severity: schema.HealthOK, Message: text,
		MessageID: "BackdoorHost.1.0.JournalRecord", MessageArgs: []string{text},
	}
	var err error
	e.OEM, err = oem.Object(logSchema.Type("JournalEntry"), journalRecordOEM{
		Record: journalRecord{Restart: rec.Restart, Seq: rec.Seq, Time: rec.Time, Kind: rec.Kind, Data: string(rec.Data)},
	})
	return e, err
}
