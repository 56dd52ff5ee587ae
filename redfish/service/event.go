package service

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Event is something that happened, for subscribers to be told of.
type Event struct {
	// MessageID is of a registry, with its major and minor version: "ResourceEvent.1.4.ResourceChanged".
	MessageID string
	Args      []string
	// Message, Severity and Resolution are the registry's, unless given. The service knows the texts of the registries in
	// Options.Registries, and of those messages of ResourceEvent, TaskEvent and HeartbeatEvent that it sends itself.
	Message    string
	Severity   schema.Health
	Resolution string
	Origin     string // URI of the resource that it is about
	LogEntry   string // URI of the entry of a log that tells more
	Group      int64  // EventGroupId; zero for none
	Time       time.Time
	OEM        schema.OEM
}

// eventRecord is a published event, ready to be sent.
type eventRecord struct {
	seq          uint64
	at           time.Time
	messageID    string
	prefix       string // of the registry
	resourceType string
	origin       string
	severity     schema.Health
	report       bool   // it is a metric report, and origin is its definition
	json         []byte // schema.EventRecord or, of a report, schema.MetricReport
}

// eventBus keeps the last events in one ring for all subscribers. Each reads at its own pace by a cursor; so a subscriber that is slow
// or away costs nothing, and the one that falls behind the ring learns that it has lost events.
type eventBus struct {
	epoch string // of this start: numbers of an earlier one mean nothing now

	mu    sync.Mutex // guards what follows
	ring  []*eventRecord
	bytes int
	next  uint64        // number of the next event
	wake  chan struct{} // closed, and made anew, at each event
}

const (
	maxEvents     = 1000
	maxEventBytes = 1 << 20
)

func newEventBus() *eventBus {
	return &eventBus{epoch: randomText(6), next: 1, wake: make(chan struct{})}
}

// The values of EventFormatType.
const (
	formatEvent  = "Event"
	formatReport = "MetricReport"
)

// busOf is where a subscriber reads: metric reports have a ring of their own, so that they do not push events out of theirs.
func (s *Service) busOf(w *interest) *eventBus {
	if w.Reports {
		return s.reports
	}
	return s.bus
}

// Publish tells all subscribers of an event. It never blocks on them.
func (s *Service) Publish(e Event) {
	if e.Time.IsZero() {
		e.Time = s.now()
	}
	s.bus.add(s.eventRecord(e))
}

func (s *Service) eventRecord(e Event) *eventRecord {
	text := s.eventText(e.MessageID, e.Args)
	set(&e.Message, text.Message)
	set(&e.Severity, text.Severity)
	set(&e.Severity, schema.HealthOK)
	set(&e.Resolution, text.Resolution)
	prefix, _, _ := strings.Cut(e.MessageID, ".")
	rec := &eventRecord{at: e.Time, messageID: e.MessageID, prefix: prefix, origin: e.Origin, severity: e.Severity}
	out := schema.EventRecord{
		EventType: "Other", EventGroupID: e.Group, EventTimestamp: schema.Time(e.Time), MessageID: e.MessageID, Message: e.Message,
		MessageArgs: e.Args, MessageSeverity: e.Severity, Severity: string(e.Severity), Resolution: e.Resolution, OEM: e.OEM,
	}
	if e.Origin != "" {
		out.OriginOfCondition = schema.LinkTo(e.Origin)
		if n, _ := s.tree.find(e.Origin); n != nil && n.route != nil {
			rec.resourceType, _, _ = strings.Cut(n.route.Type, ".")
		}
	}
	if e.LogEntry != "" {
		out.LogEntry = schema.LinkTo(e.LogEntry)
	}
	var err error
	if rec.json, err = json.Marshal(out); err != nil { // only what the publisher put under Oem can be at fault
		s.log.Error("encode event", "message", e.MessageID, "err", err)
		out.OEM = nil
		rec.json, _ = json.Marshal(out)
	}
	return rec
}

// eventText returns the texts of a message with its arguments filled in, as far as the service knows the registry.
func (s *Service) eventText(id string, args []string) RegistryMessage {
	prefix, rest, _ := strings.Cut(id, ".")
	name := rest[strings.LastIndexByte(rest, '.')+1:]
	var m RegistryMessage
	if t, ok := eventMessages[prefix+"."+name]; ok {
		m = RegistryMessage{Message: t.text, Severity: t.severity, Resolution: t.resolution}
	} else if t, ok := baseMessages[name]; ok && prefix == "Base" {
		m = RegistryMessage{Message: t.text, Severity: t.severity, Resolution: t.resolution}
	}
	for i := range s.o.Registries {
		if s.o.Registries[i].Prefix == prefix {
			m = s.o.Registries[i].Messages[name]
		}
	}
	for i, arg := range args {
		m.Message = strings.ReplaceAll(m.Message, "%"+strconv.Itoa(i+1), arg)
	}
	return m
}

// The messages of DMTF's registries that the service sends as events, with the versions of those registries.
const (
	resourceEvent  = "ResourceEvent.1.4."
	taskEvent      = "TaskEvent.1.0."
	heartbeatEvent = "HeartbeatEvent.1.1."
	updateEvent    = "Update.1.3."
)

// eventFiles are the registries that eventMessages is taken from.
var eventFiles = []string{"HeartbeatEvent.1.1.1", "ResourceEvent.1.4.3", "TaskEvent.1.0.5", "Telemetry.1.1.1", "Update.1.3.0"}

// eventMessages are their texts (DSP8011 2025.4).
var eventMessages = map[string]registryMessage{
	"ResourceEvent.ResourceCreated":              {schema.HealthOK, "The resource was created successfully.", "None."},
	"ResourceEvent.ResourceRemoved":              {schema.HealthOK, "The resource was removed successfully.", "None."},
	"ResourceEvent.ResourceChanged":              {schema.HealthOK, "One or more resource properties have changed.", "None."},
	"ResourceEvent.TestMessage":                  {schema.HealthOK, "Test message.", "None."},
	"TaskEvent.TaskStarted":                      {schema.HealthOK, "The task with Id '%1' has started.", "None."},
	"TaskEvent.TaskCompletedOK":                  {schema.HealthOK, "The task with Id '%1' has completed.", "None."},
	"TaskEvent.TaskAborted":                      {schema.HealthCritical, "The task with Id '%1' has completed with errors.", "None."},
	"TaskEvent.TaskCancelled":                    {schema.HealthWarning, "Work on the task with Id '%1' was halted prior to completion due to an explicit request.", "None."},
	"TaskEvent.TaskRemoved":                      {schema.HealthWarning, "The task with Id '%1' was removed.", "None."},
	"Telemetry.TriggerNumericAboveUpperWarning":  {schema.HealthWarning, "Metric '%1' value of %2 is above the %3 upper warning threshold of trigger '%4'", "Check the condition of the metric that reported the trigger."},
	"Telemetry.TriggerNumericAboveUpperCritical": {schema.HealthCritical, "Metric '%1' value of %2 is above the %3 upper critical threshold of trigger '%4'", "Check the condition of the metric that reported the trigger."},
	"Telemetry.TriggerNumericBelowLowerWarning":  {schema.HealthWarning, "Metric '%1' value of %2 is below the %3 lower warning threshold of trigger '%4'", "Check the condition of the metric that reported the trigger."},
	"Telemetry.TriggerNumericBelowLowerCritical": {schema.HealthCritical, "Metric '%1' value of %2 is below the %3 lower critical threshold of trigger '%4'", "Check the condition of the metric that reported the trigger."},
	"Telemetry.TriggerNumericAboveLowerCritical": {schema.HealthWarning, "Metric '%1' value of %2 is now above the %3 lower critical threshold of trigger '%4' but remains outside of normal range", "Check the condition of the metric that reported the trigger."},
	"Telemetry.TriggerNumericBelowUpperCritical": {schema.HealthWarning, "Metric '%1' value of %2 is now below the %3 upper critical threshold of trigger '%4' but remains outside of normal range", "Check the condition of the metric that reported the trigger."},
	"Telemetry.TriggerNumericReadingNormal":      {schema.HealthOK, "Metric '%1' value of %2 is within normal operating range of trigger '%3'", "None."},
	"Update.TargetDetermined":                    {schema.HealthOK, "The target device '%1' will be updated with image '%2'.", "None."},
	"Update.TransferringToComponent":             {schema.HealthOK, "Image '%1' is being transferred to '%2'.", "None."},
	"Update.VerifyingAtComponent":                {schema.HealthOK, "Image '%1' is being verified at '%2'.", "None."},
	"Update.InstallingOnComponent":               {schema.HealthOK, "Image '%1' is being installed on '%2'.", "None."},
	"Update.TransferFailed":                      {schema.HealthCritical, "Transfer of image '%1' to '%2' failed.", "None."},
	"Update.VerificationFailed":                  {schema.HealthCritical, "Verification of image '%1' at '%2' failed.", "None."},
	"Update.ApplyFailed":                         {schema.HealthCritical, "Installation of image '%1' to '%2' failed.", "None."},
	"Update.ActivateFailed":                      {schema.HealthCritical, "Activation of image '%1' on '%2' failed.", "None."},
	"Update.AwaitToUpdate":                       {schema.HealthOK, "Awaiting for an action to proceed with installing image '%1' on '%2'.", "Perform the requested action to advance the update operation."},
	"Update.AwaitToActivate":                     {schema.HealthOK, "Awaiting for an action to proceed with activating image '%1' on '%2'.", "Perform the requested action to advance the update operation."},
	"Update.UpdateSuccessful":                    {schema.HealthOK, "Device '%1' successfully updated with image '%2'.", "None."},
	"Update.UpdateSkippedSameVersion":            {schema.HealthOK, "Device '%1' skipped the update with image '%2' because the same version is already installed.", "None."},
	"Update.UpdateSkippedVersionTooLow":          {schema.HealthOK, "Device '%1' skipped the update with image '%2' due to the minimum version requirement.", "None."},
	"Update.UpdateNotApplicable":                 {schema.HealthWarning, "Image '%1' was not applicable to device '%2'.", "None."},
	"HeartbeatEvent.RedfishServiceFunctional":    {schema.HealthOK, "Redfish service is functional.", "None."},
}

// add numbers an event and puts it into the ring.
func (b *eventBus) add(rec *eventRecord) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec.seq = b.next
	b.next++
	b.ring = append(b.ring, rec)
	b.bytes += len(rec.json)
	for len(b.ring) > maxEvents || b.bytes > maxEventBytes && len(b.ring) > 1 {
		b.bytes -= len(b.ring[0].json)
		b.ring = b.ring[1:]
	}
	close(b.wake)
	b.wake = make(chan struct{})
}

// since returns at most limit events from number from on, and the number to ask from next. lost says that some in between are gone. If
// there are none, wake is closed when there is one.
func (b *eventBus) since(from uint64, limit int) (recs []*eventRecord, next uint64, lost bool, wake <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	oldest := b.next - uint64(len(b.ring))
	if from < oldest {
		from, lost = oldest, true
	}
	from = min(from, b.next)
	first := int(from - oldest)
	recs = slices.Clone(b.ring[first:min(len(b.ring), first+limit)])
	return recs, from + uint64(len(recs)), lost, b.wake
}

// end returns the number of the next event.
func (b *eventBus) end() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.next
}

// name is the Id of the payload that ends with an event.
func (b *eventBus) name(seq uint64) string { return b.epoch + "-" + strconv.FormatUint(seq, 10) }

// after returns the number to go on from behind the payload with an Id. One of an earlier start of the service stands for all that
// the ring has; what cannot be an Id of ours, for what comes from now on.
func (b *eventBus) after(id string) uint64 {
	dash := strings.LastIndexByte(id, '-') // an epoch may hold dashes of its own
	seq, err := strconv.ParseUint(id[dash+1:], 10, 64)
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case dash < 0 || err != nil:
		return b.next
	case id[:dash] != b.epoch:
		return b.next - uint64(len(b.ring))
	}
	return min(seq, b.next-1) + 1
}

// payload is the body that a subscriber gets: an event with all records, or one metric report.
func (b *eventBus) payload(context string, recs []*eventRecord) []byte {
	var out bytes.Buffer
	if recs[0].report {
		out.WriteByte('{')
		if context != "" {
			quoted, _ := json.Marshal(context)
			fmt.Fprintf(&out, `"Context":%s,`, quoted)
		}
		out.Write(recs[0].json[1:])
		return out.Bytes()
	}
	id := b.name(recs[len(recs)-1].seq)
	fmt.Fprintf(&out, `{"@odata.type":"#%s","Id":%q,"Name":"Event",`, schema.TypeEvent, id)
	if context != "" {
		quoted, _ := json.Marshal(context)
		fmt.Fprintf(&out, `"Context":%s,`, quoted)
	}
	fmt.Fprintf(&out, `"Events@odata.count":%d,"Events":[`, len(recs))
	for i, rec := range recs {
		if i > 0 {
			out.WriteByte(',')
		}
		fmt.Fprintf(&out, `{"EventId":%q,`, b.name(rec.seq))
		// MemberId is a place in this payload; the record has it empty.
		out.Write(bytes.Replace(rec.json[1:], []byte(`"MemberId":""`), []byte(`"MemberId":"`+strconv.Itoa(i)+`"`), 1))
	}
	out.WriteString("]}")
	return out.Bytes()
}

// interest is what a subscriber wants to be told of. Empty lists want all.
type interest struct {
	Registries        []string        `json:"registries,omitempty"` // prefixes
	ExcludeRegistries []string        `json:"excludeRegistries,omitempty"`
	Messages          []string        `json:"messages,omitempty"` // ids
	ExcludeMessages   []string        `json:"excludeMessages,omitempty"`
	Types             []string        `json:"types,omitempty"` // of resources
	Severities        []schema.Health `json:"severities,omitempty"`
	Origins           []string        `json:"origins,omitempty"` // URIs
	Subordinate       bool            `json:"subordinate,omitempty"`
	// Reports wants metric reports instead of events: those of Definitions (URIs) or, if there are none, all.
	Reports     bool     `json:"reports,omitempty"`
	Definitions []string `json:"definitions,omitempty"`

	filter *filter // of a stream
}

// wants reports whether an event is of interest.
func (w *interest) wants(rec *eventRecord) bool {
	if rec.report {
		return (len(w.Definitions) == 0 || slices.Contains(w.Definitions, rec.origin)) && (w.filter == nil || w.filter.match(rec.properties(false)))
	}
	same := func(id string) bool { return sameMessage(id, rec.messageID) }
	switch {
	case len(w.Registries) > 0 && !slices.Contains(w.Registries, rec.prefix),
		slices.Contains(w.ExcludeRegistries, rec.prefix),
		len(w.Messages) > 0 && !slices.ContainsFunc(w.Messages, same),
		slices.ContainsFunc(w.ExcludeMessages, same),
		len(w.Types) > 0 && !slices.Contains(w.Types, rec.resourceType),
		len(w.Severities) > 0 && !slices.Contains(w.Severities, rec.severity),
		len(w.Origins) > 0 && !slices.ContainsFunc(w.Origins, func(uri string) bool { return about(rec.origin, uri, w.Subordinate) }):
		return false
	}
	return w.filter == nil || w.filter.match(rec.properties(w.Subordinate))
}

// sameMessage compares message Ids without their versions, as the specification wants it.
func sameMessage(a, b string) bool {
	p1, r1, _ := strings.Cut(a, ".")
	p2, r2, _ := strings.Cut(b, ".")
	return p1 == p2 && r1[strings.LastIndexByte(r1, '.')+1:] == r2[strings.LastIndexByte(r2, '.')+1:]
}

// about reports whether an event of a resource is one of uri, or of what is below it.
func about(origin, uri string, below bool) bool {
	uri = strings.TrimSuffix(uri, "/")
	return origin == uri || below && strings.HasPrefix(origin, uri+"/")
}

// properties are what the $filter of a stream can look at (SSEFilterPropertiesSupported).
func (rec *eventRecord) properties(below bool) map[string]any {
	if rec.report {
		return map[string]any{"EventFormatType": formatReport, "MetricReportDefinition": []any{rec.origin, rec.origin[strings.LastIndexByte(rec.origin, '/')+1:]}}
	}
	parts := strings.Split(rec.messageID, ".")
	origins := []any{rec.origin}
	for uri := rec.origin; below && uri != ""; {
		uri = uri[:max(0, strings.LastIndexByte(uri, '/'))]
		origins = append(origins, uri)
	}
	return map[string]any{
		"EventFormatType": formatEvent, "EventType": "Other", "MessageId": []any{rec.messageID, parts[0] + "." + parts[len(parts)-1]},
		"OriginResource": origins, "RegistryPrefix": rec.prefix, "ResourceType": rec.resourceType, "SubordinateResources": below,
		"Severity": string(rec.severity),
	}
}

// streamFilters are the properties that a stream's $filter may name.
var streamFilters = []string{"EventFormatType", "EventType", "MessageId", "MetricReportDefinition", "OriginResource", "RegistryPrefix", "ResourceType", "SubordinateResources", "Severity"}

// comparisons calls do for each comparison of the expression.
func (f *filter) comparisons(do func(*filter)) {
	switch {
	case f == nil:
	case f.path != nil:
		do(f)
	default:
		f.a.comparisons(do)
		f.b.comparisons(do)
	}
}
