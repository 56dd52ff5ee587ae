package service

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Telemetry is what a service can report regularly. Without metrics it has no TelemetryService.
type Telemetry struct {
	Metrics  []Metric
	Reports  []Report
	Triggers []Trigger
}

// Metric is a number of the tree: it is read from the resource's representation, as any client would read it.
type Metric struct {
	ID, Name string
	Counter  bool   // it only rises; else it is a gauge
	Decimal  bool   // else an integer
	Units    string // UCUM; empty for a plain number
	Property string // URI and JSON pointer: "/redfish/v1/Managers/bmc/ManagerDiagnosticData#/MemoryStatistics/FreeBytes"
}

// Report is a report that is there from the start; clients may change its schedule, switch it off, and add their own.
type Report struct {
	ID, Name string
	Metrics  []string      // Ids
	Every    time.Duration // zero: when somebody asks for it
}

// Trigger is a set of thresholds that is there from the start.
type Trigger struct {
	ID, Name   string
	Metrics    []string           // Ids
	Thresholds map[string]float64 // by name: "UpperCritical", "UpperWarning", "LowerWarning", "LowerCritical"
}

const (
	telemetryURI = "/redfish/v1/TelemetryService"
	metricsURI   = telemetryURI + "/MetricDefinitions"
	reportDefURI = telemetryURI + "/MetricReportDefinitions"
	reportsURI   = telemetryURI + "/MetricReports"
	triggersURI  = telemetryURI + "/Triggers"

	telemetryEvent = "Telemetry.1.1."

	// minInterval is the shortest time between two reports, and watchEvery how often triggers look.
	minInterval   = time.Second
	watchEvery    = 5 * time.Second
	sampleTimeout = 10 * time.Second
	maxReports    = 32
	maxTriggers   = 32
)

// The actions of reports and of triggers.
const (
	actLog    = "LogToMetricReportsCollection"
	actEvent  = "RedfishEvent"
	actReport = "RedfishMetricReport"
)

// thresholdNames are the thresholds from the highest to the lowest.
var thresholdNames = []string{"UpperCritical", "UpperWarning", "LowerWarning", "LowerCritical"}

// reportDefinition is one MetricReportDefinition and its latest report.
type reportDefinition struct {
	ID      string        `json:"id"`
	Name    string        `json:"name"`
	Metrics []string      `json:"metrics"` // Ids
	Every   time.Duration `json:"everyNanoseconds"`
	Enabled bool          `json:"enabled"`
	Actions []string      `json:"actions"`

	due    time.Time
	latest *schema.MetricReport
}

// triggerDefinition is one Triggers resource and where its metrics stand.
type triggerDefinition struct {
	ID         string             `json:"id"`
	Name       string             `json:"name"`
	Metrics    []string           `json:"metrics"`
	Thresholds map[string]float64 `json:"thresholds"`
	Enabled    bool               `json:"enabled"`
	Actions    []string           `json:"actions"`
	Reports    []string           `json:"reports,omitempty"` // Ids of the definitions whose reports are sent

	zones map[string]zone // by metric; what is not in it is normal
}

// telemetryFile is telemetry.json in the state directory.
type telemetryFile struct {
	Version  int                  `json:"version"` // 1
	Next     int                  `json:"next"`    // number of the next Id
	Reports  []*reportDefinition  `json:"reports"`
	Triggers []*triggerDefinition `json:"triggers"`
}

// telemetry samples metrics.
type telemetry struct {
	svc     *Service
	metrics map[string]*Metric
	path    string // "" keeps definitions in memory

	mu      sync.Mutex // guards what follows
	file    telemetryFile
	changed chan struct{} // has room for one
	running bool
}

func openTelemetry(s *Service) (*telemetry, error) {
	t := &telemetry{svc: s, metrics: map[string]*Metric{}, changed: make(chan struct{}, 1)}
	for i := range s.o.Telemetry.Metrics {
		m := &s.o.Telemetry.Metrics[i]
		t.metrics[m.ID] = m
	}
	t.file = t.defaults()
	if s.o.StateDir == "" || len(t.metrics) == 0 {
		return t, nil
	}
	t.path = s.path("telemetry.json")
	b, err := os.ReadFile(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read telemetry: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var file telemetryFile
	if err := dec.Decode(&file); err != nil {
		return nil, fmt.Errorf("read telemetry in %s: %w", t.path, err)
	}
	if file.Version != 1 {
		return nil, fmt.Errorf("read telemetry in %s: version %d is not known", t.path, file.Version)
	}
	// A metric that a later version no longer has is not reported.
	known := func(ids []string) []string {
		return slices.DeleteFunc(ids, func(id string) bool { return t.metrics[id] == nil })
	}
	file.Reports = slices.DeleteFunc(file.Reports, func(d *reportDefinition) bool {
		if d == nil {
			return true
		}
		d.Metrics = known(d.Metrics)
		return len(d.Metrics) == 0
	})
	file.Triggers = slices.DeleteFunc(file.Triggers, func(d *triggerDefinition) bool {
		if d == nil {
			return true
		}
		d.Metrics = known(d.Metrics)
		return len(d.Metrics) == 0
	})
	t.file = file
	return t, nil
}

// defaults are the definitions that are there from the start.
func (t *telemetry) defaults() telemetryFile {
	f := telemetryFile{Version: 1, Next: 1}
	for _, r := range t.svc.o.Telemetry.Reports {
		f.Reports = append(f.Reports, &reportDefinition{ID: r.ID, Name: r.Name, Metrics: r.Metrics, Every: r.Every, Enabled: true, Actions: []string{actLog, actEvent}})
	}
	for _, r := range t.svc.o.Telemetry.Triggers {
		f.Triggers = append(f.Triggers, &triggerDefinition{ID: r.ID, Name: r.Name, Metrics: r.Metrics, Thresholds: r.Thresholds, Enabled: true, Actions: []string{actEvent}})
	}
	return f
}

// update changes the definitions by f, keeps them, and has the sampler look at its schedule again.
func (t *telemetry) update(f func(*telemetryFile) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.file
	next.Reports, next.Triggers = slices.Clone(next.Reports), slices.Clone(next.Triggers)
	if err := f(&next); err != nil {
		return err
	}
	if t.path != "" {
		b, err := json.MarshalIndent(next, "", "\t")
		if err == nil {
			err = durable.WriteFile(t.path, b, 0o600)
		}
		if err != nil {
			return fmt.Errorf("store telemetry: %w", err)
		}
	}
	t.file = next
	select {
	case t.changed <- struct{}{}:
	default:
	}
	return nil
}

// run makes the periodic reports and looks at the triggers until ctx ends. Several listeners share the first one's.
func (t *telemetry) run(ctx context.Context) {
	t.mu.Lock()
	if t.running || len(t.metrics) == 0 {
		t.mu.Unlock()
		return
	}
	t.running = true
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		t.running = false
		t.mu.Unlock()
	}()
	watch := t.svc.now()
	for ctx.Err() == nil {
		now := t.svc.now()
		var due []*reportDefinition
		var watched []*triggerDefinition
		wait := time.Hour
		t.mu.Lock()
		for _, d := range t.file.Reports {
			if !d.Enabled || d.Every == 0 {
				continue
			}
			if !d.due.After(now) {
				due = append(due, d)
				d.due = now.Add(d.Every)
			}
			wait = min(wait, d.due.Sub(now))
		}
		for _, d := range t.file.Triggers {
			if d.Enabled {
				watched = append(watched, d)
			}
		}
		t.mu.Unlock()
		if len(watched) > 0 && !watch.After(now) {
			watch = now.Add(watchEvery)
		} else if len(watched) > 0 {
			wait = min(wait, watch.Sub(now))
			watched = nil
		}
		if len(watched) > 0 {
			wait = min(wait, watchEvery)
		}
		s := t.sample(ctx)
		for _, d := range due {
			t.report(s, d)
		}
		for _, d := range watched {
			t.watch(s, d)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// sample reads metrics at one moment; each resource is read once.
type sample struct {
	t         *telemetry
	ctx       context.Context
	at        time.Time
	resources map[string]any
}

func (t *telemetry) sample(ctx context.Context) *sample {
	return &sample{t: t, ctx: ctx, at: t.svc.now(), resources: map[string]any{}}
}

// value reads a metric; false if there is no value now.
func (s *sample) value(id string) (json.Number, bool) {
	m := s.t.metrics[id]
	if m == nil {
		return "", false
	}
	uri, pointer, _ := strings.Cut(m.Property, "#")
	v, read := s.resources[uri]
	if !read {
		v = s.resource(uri)
		s.resources[uri] = v
	}
	for name := range strings.SplitSeq(strings.Trim(pointer, "/"), "/") {
		switch at := v.(type) {
		case map[string]any:
			v = at[name]
		case []any:
			i, err := strconv.Atoi(name)
			if err != nil || i < 0 || i >= len(at) {
				return "", false
			}
			v = at[i]
		default:
			return "", false
		}
	}
	n, ok := v.(json.Number)
	return n, ok
}

// resource renders a resource as the service itself sees it; nil if it is not there.
func (s *sample) resource(uri string) (v any) {
	svc := s.t.svc
	defer func() {
		if p := recover(); p != nil {
			svc.log.Error("reading a metric panicked", "uri", uri, "panic", p)
			v = nil
		}
	}()
	ctx, cancel := context.WithTimeout(s.ctx, sampleTimeout)
	defer cancel()
	n, params := svc.tree.find(uri)
	if n == nil || n.route == nil || n.route.Get == nil {
		return nil
	}
	r := &Request{URI: uri, ctx: ctx, svc: svc, node: n, params: params, http: &http.Request{Method: http.MethodGet, URL: &url.URL{Path: uri}, Header: http.Header{}}}
	body, _, err := svc.render(r, query{top: -1})
	if err != nil {
		return nil
	}
	var out map[string]any
	if decodeExact(body, &out) != nil {
		return nil
	}
	return out
}

// report makes a report, keeps it as the latest one and tells whoever subscribed to it.
func (t *telemetry) report(s *sample, d *reportDefinition) *schema.MetricReport {
	out := t.compile(s, d)
	t.mu.Lock()
	d.latest = out
	actions := d.Actions
	t.mu.Unlock()
	if slices.Contains(actions, actEvent) {
		t.publish(out)
	}
	return out
}

func (t *telemetry) compile(s *sample, d *reportDefinition) *schema.MetricReport {
	out := &schema.MetricReport{
		Resource:  schema.Resource{ID: d.ID, Name: d.Name},
		Timestamp: schema.Time(s.at), MetricReportDefinition: schema.LinkTo(reportDefURI + "/" + d.ID), MetricValues: []schema.MetricValue{},
	}
	for _, id := range d.Metrics {
		if v, ok := s.value(id); ok {
			out.MetricValues = append(out.MetricValues, schema.MetricValue{MetricID: id, MetricValue: v.String(), MetricProperty: t.metrics[id].Property, Timestamp: out.Timestamp})
		}
	}
	return out
}

// publish gives a report to the subscribers of metric reports.
func (t *telemetry) publish(m *schema.MetricReport) {
	copied := *m
	copied.ODataID, copied.ODataType = reportsURI+"/"+m.ID, "#"+schema.TypeMetricReport
	b, err := json.Marshal(&copied)
	if err != nil {
		t.svc.log.Error("encode metric report", "err", err)
		return
	}
	t.svc.reports.add(&eventRecord{at: t.svc.now(), report: true, origin: m.MetricReportDefinition.ID, json: b})
}

// zone is where a value stands among thresholds: 0 is normal, 1 and 2 are above the upper ones, -1 and -2 below the lower ones.
type zone int

// place finds the zone of a value.
func (d *triggerDefinition) place(v float64) zone {
	above := func(name string) bool { limit, ok := d.Thresholds[name]; return ok && v > limit }
	below := func(name string) bool { limit, ok := d.Thresholds[name]; return ok && v < limit }
	switch {
	case above("UpperCritical"):
		return 2
	case above("UpperWarning"):
		return 1
	case below("LowerCritical"):
		return -2
	case below("LowerWarning"):
		return -1
	}
	return 0
}

// crossing returns the message about a step from one zone to another and the threshold that it names.
func crossing(from, to zone) (message, threshold string) {
	switch {
	case to == 0:
		return "TriggerNumericReadingNormal", ""
	case to == 2:
		return "TriggerNumericAboveUpperCritical", "UpperCritical"
	case to == 1 && from == 2:
		return "TriggerNumericBelowUpperCritical", "UpperCritical"
	case to == 1:
		return "TriggerNumericAboveUpperWarning", "UpperWarning"
	case to == -2:
		return "TriggerNumericBelowLowerCritical", "LowerCritical"
	case to == -1 && from == -2:
		return "TriggerNumericAboveLowerCritical", "LowerCritical"
	}
	return "TriggerNumericBelowLowerWarning", "LowerWarning"
}

// watch compares the metrics of a trigger with its thresholds and says which have crossed one.
func (t *telemetry) watch(s *sample, d *triggerDefinition) {
	crossed := false
	for _, id := range d.Metrics {
		n, ok := s.value(id)
		v, err := n.Float64()
		if !ok || err != nil {
			continue // what cannot be told is neither normal nor not
		}
		to := d.place(v)
		t.mu.Lock()
		from := d.zones[id]
		if from != to {
			if d.zones == nil {
				d.zones = map[string]zone{}
			}
			d.zones[id] = to
		}
		t.mu.Unlock()
		if from == to {
			continue
		}
		crossed = true
		if !slices.Contains(d.Actions, actEvent) {
			continue
		}
		name, threshold := crossing(from, to)
		args := []string{id, n.String(), d.ID}
		if threshold != "" {
			args = []string{id, n.String(), strconv.FormatFloat(d.Thresholds[threshold], 'g', -1, 64), d.ID}
		}
		origin, _, _ := strings.Cut(t.metrics[id].Property, "#")
		t.svc.Publish(Event{MessageID: telemetryEvent + name, Args: args, Origin: origin, Time: s.at})
	}
	if !crossed || !slices.Contains(d.Actions, actReport) {
		return
	}
	for _, id := range d.Reports {
		if def := t.definition(id); def != nil && def.Enabled {
			t.publish(t.compile(s, def))
		}
	}
}

func (t *telemetry) definition(id string) *reportDefinition {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.file.Reports {
		if d.ID == id {
			return d
		}
	}
	return nil
}

func (t *telemetry) trigger(id string) *triggerDefinition {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.file.Triggers {
		if d.ID == id {
			return d
		}
	}
	return nil
}

// get returns the report of a definition: the latest one, or one that is made now.
func (t *telemetry) get(ctx context.Context, id string) (*schema.MetricReport, error) {
	d := t.definition(id)
	if d == nil || !slices.Contains(d.Actions, actLog) {
		return nil, ErrNotFound
	}
	t.mu.Lock()
	latest := d.latest
	t.mu.Unlock()
	if latest == nil || d.Every == 0 && d.Enabled {
		latest = t.compile(t.sample(ctx), d)
		t.mu.Lock()
		d.latest = latest
		t.mu.Unlock()
	}
	out := *latest
	return &out, nil
}

// duration writes a duration as Redfish has it.
func duration(d time.Duration) string {
	return "PT" + strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "S"
}

func (t *telemetry) ids(list func(*telemetryFile) []string) func(*Request) ([]string, error) {
	return func(*Request) ([]string, error) {
		t.mu.Lock()
		defer t.mu.Unlock()
		return list(&t.file), nil
	}
}

// names returns the Ids of metrics, which a client may name by Id or by property.
func (t *telemetry) names(v Values) ([]string, *Error) {
	var out []string
	add := func(id string) {
		if !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	take := func(ids, properties []string, idName, propertyName string) *Error {
		for _, id := range ids {
			if t.metrics[id] == nil {
				return refuse(400, "PropertyValueNotInList", id, idName).about(idName)
			}
			add(id)
		}
		for _, p := range properties {
			i := slices.IndexFunc(t.svc.o.Telemetry.Metrics, func(m Metric) bool { return m.Property == p })
			if i < 0 {
				return Because(400, "PropertyValueNotInList", "The property "+clip(p)+" is none that a metric definition lists.", p, propertyName).about(propertyName)
			}
			add(t.svc.o.Telemetry.Metrics[i].ID)
		}
		return nil
	}
	if e := take(v.Strings("MetricIds"), v.Strings("MetricProperties"), "MetricIds", "MetricProperties"); e != nil {
		return nil, e
	}
	metrics, _ := v["Metrics"].([]map[string]any)
	for _, m := range metrics {
		var ids, properties []string
		for name, value := range m {
			switch list, isList := value.([]any); {
			case value == nil:
			case name == "MetricId":
				id, _ := value.(string)
				ids = append(ids, id)
			case name == "MetricProperties" && isList:
				for _, p := range list {
					text, _ := p.(string)
					properties = append(properties, text)
				}
			case name == "CollectionTimeScope" && value == "Point":
			default:
				return nil, refuse(400, "PropertyUnknown", "Metrics/"+clip(name)).about("Metrics")
			}
		}
		if len(ids) > 0 {
			properties = nil // they only say where the metric of that Id is from
		}
		if e := take(ids, properties, "Metrics", "Metrics"); e != nil {
			return nil, e
		}
	}
	if len(out) == 0 {
		return nil, refuse(400, "CreateFailedMissingReqProperties", "MetricProperties").about("MetricProperties")
	}
	return out, nil
}

// interval reads a schedule.
func interval(v Values) (time.Duration, *Error) {
	const name = "Schedule/RecurrenceInterval"
	d, ok := parseDuration(v.String(name))
	switch {
	case !ok:
		return 0, checker{}.bad("FormatError", v.String(name), name)
	case d < minInterval || d > 24*time.Hour:
		return 0, checker{}.bad("OutOfRange", v.String(name), name)
	}
	return d, nil
}

func (t *telemetry) createReport(_ *Request, v Values) (string, *Reply, error) {
	d := &reportDefinition{Name: v.String("Name"), Enabled: true, Actions: v.Strings("ReportActions")}
	var e *Error
	if d.Metrics, e = t.names(v); e != nil {
		return "", nil, e
	}
	switch {
	case v.String("MetricReportDefinitionType") == "OnRequest" && v.Has("Schedule/RecurrenceInterval"):
		return "", nil, refuse(400, "PropertyValueConflict", "Schedule", "MetricReportDefinitionType").about("Schedule")
	case v.String("MetricReportDefinitionType") == "Periodic":
		if !v.Has("Schedule/RecurrenceInterval") {
			return "", nil, refuse(400, "CreateFailedMissingReqProperties", "Schedule/RecurrenceInterval").about("Schedule/RecurrenceInterval")
		}
		if d.Every, e = interval(v); e != nil {
			return "", nil, e
		}
	}
	if v.Has("MetricReportDefinitionEnabled") {
		d.Enabled = v.Bool("MetricReportDefinitionEnabled")
	}
	if len(d.Actions) == 0 {
		d.Actions = []string{actLog}
	}
	err := t.update(func(f *telemetryFile) error {
		if len(f.Reports) >= maxReports {
			return refuse(400, "CreateLimitReachedForResource")
		}
		id, e := newID(v, &f.Next, func(id string) bool {
			return slices.ContainsFunc(f.Reports, func(o *reportDefinition) bool { return o.ID == id })
		}, "MetricReportDefinition")
		if e != nil {
			return e
		}
		d.ID = id
		set(&d.Name, "Metric Report Definition "+id)
		f.Reports = append(f.Reports, d)
		return nil
	})
	return d.ID, nil, err
}

// newID is the Id that the client wants or, without one, the next number.
func newID(v Values, next *int, taken func(string) bool, kind string) (string, *Error) {
	id := v.String("Id")
	if id == "" {
		for {
			id = strconv.Itoa(*next)
			*next++
			if !taken(id) {
				return id, nil
			}
		}
	}
	if !userName.MatchString(id) {
		return "", refuse(400, "PropertyValueFormatError", id, "Id").about("Id")
	}
	if taken(id) {
		return "", refuse(400, "ResourceAlreadyExists", kind, "Id", id).about("Id")
	}
	return id, nil
}

func (t *telemetry) changeReport(r *Request, v Values) error {
	return t.update(func(f *telemetryFile) error {
		i := slices.IndexFunc(f.Reports, func(d *reportDefinition) bool { return d.ID == r.Param("definition") })
		if i < 0 {
			return ErrNotFound
		}
		d := *f.Reports[i]
		if v.Has("MetricReportDefinitionEnabled") {
			d.Enabled = v.Bool("MetricReportDefinitionEnabled")
		}
		if v.Has("ReportActions") {
			d.Actions = v.Strings("ReportActions")
		}
		if v.Has("Schedule/RecurrenceInterval") {
			if d.Every == 0 {
				return refuse(400, "PropertyValueConflict", "Schedule", "MetricReportDefinitionType").about("Schedule")
			}
			every, e := interval(v)
			if e != nil {
				return e
			}
			d.Every, d.due = every, time.Time{}
		}
		f.Reports[i] = &d
		return nil
	})
}

// thresholds reads NumericThresholds.
func thresholds(v Values, old map[string]float64) (map[string]float64, *Error) {
	out := map[string]float64{}
	for name, limit := range old {
		out[name] = limit
	}
	for _, name := range thresholdNames {
		path := "NumericThresholds/" + name
		switch t, ok := v[path].(map[string]any); {
		case !v.Has(path):
		case v[path] == nil:
			delete(out, name)
		case ok:
			want := "Increasing"
			if strings.HasPrefix(name, "Lower") {
				want = "Decreasing"
			}
			n, isNumber := t["Reading"].(json.Number)
			limit, err := n.Float64()
			activation, named := t["Activation"]
			switch {
			case !isNumber || err != nil || math.IsInf(limit, 0):
				return nil, refuse(400, "PropertyValueTypeError", show(t["Reading"]), path+"/Reading").about(path + "/Reading")
			case named && activation != want:
				return nil, refuse(400, "PropertyValueNotInList", show(activation), path+"/Activation").about(path + "/Activation")
			case len(t) > 1 && !named || len(t) > 2:
				return nil, refuse(400, "PropertyUnknown", path).about(path)
			}
			out[name] = limit
		}
	}
	last := math.Inf(1)
	for _, name := range thresholdNames {
		limit, ok := out[name]
		if ok && limit > last {
			return nil, Because(400, "PropertyValueConflict", "The thresholds are not in order: "+name+" is above one that is more severe, or of the other side.", "NumericThresholds/"+name, "NumericThresholds").about("NumericThresholds/" + name)
		}
		if ok {
			last = limit
		}
	}
	return out, nil
}

// linkedReports reads Links/MetricReportDefinitions.
func (t *telemetry) linkedReports(v Values) ([]string, *Error) {
	const name = "Links/MetricReportDefinitions"
	links, _ := v[name].([]map[string]any)
	var out []string
	for _, l := range links {
		uri, _ := l["@odata.id"].(string)
		id, ok := strings.CutPrefix(uri, reportDefURI+"/")
		if !ok || t.definition(id) == nil {
			return nil, refuse(400, "PropertyValueNotInList", clip(uri), name).about(name)
		}
		out = append(out, id)
	}
	return out, nil
}

func (t *telemetry) createTrigger(_ *Request, v Values) (string, *Reply, error) {
	d := &triggerDefinition{Name: v.String("Name"), Enabled: true, Actions: v.Strings("TriggerActions")}
	var e *Error
	if d.Metrics, e = t.names(v); e != nil {
		return "", nil, e
	}
	if d.Thresholds, e = thresholds(v, nil); e != nil {
		return "", nil, e
	}
	if len(d.Thresholds) == 0 {
		return "", nil, refuse(400, "CreateFailedMissingReqProperties", "NumericThresholds").about("NumericThresholds")
	}
	if d.Reports, e = t.linkedReports(v); e != nil {
		return "", nil, e
	}
	if v.Has("TriggerEnabled") {
		d.Enabled = v.Bool("TriggerEnabled")
	}
	if len(d.Actions) == 0 {
		d.Actions = []string{actEvent}
	}
	err := t.update(func(f *telemetryFile) error {
		if len(f.Triggers) >= maxTriggers {
			return refuse(400, "CreateLimitReachedForResource")
		}
		id, e := newID(v, &f.Next, func(id string) bool {
			return slices.ContainsFunc(f.Triggers, func(o *triggerDefinition) bool { return o.ID == id })
		}, "Triggers")
		if e != nil {
			return e
		}
		d.ID = id
		set(&d.Name, "Triggers "+id)
		f.Triggers = append(f.Triggers, d)
		return nil
	})
	return d.ID, nil, err
}

func (t *telemetry) changeTrigger(r *Request, v Values) error {
	return t.update(func(f *telemetryFile) error {
		i := slices.IndexFunc(f.Triggers, func(d *triggerDefinition) bool { return d.ID == r.Param("triggers") })
		if i < 0 {
			return ErrNotFound
		}
		d := *f.Triggers[i]
		d.zones = nil
		if v.Has("TriggerEnabled") {
			d.Enabled = v.Bool("TriggerEnabled")
		}
		var e *Error
		if d.Thresholds, e = thresholds(v, d.Thresholds); e != nil {
			return e
		}
		f.Triggers[i] = &d
		return nil
	})
}

func (d *triggerDefinition) view(t *telemetry) *schema.Triggers {
	out := &schema.Triggers{
		Resource: schema.Resource{Name: d.Name}, MetricType: "Numeric", MetricIDs: d.Metrics, TriggerActions: d.Actions, TriggerEnabled: d.Enabled,
		Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK}, NumericThresholds: &schema.Thresholds{},
	}
	if !d.Enabled {
		out.Status.State = schema.StateDisabled
	}
	for _, id := range d.Metrics {
		out.MetricProperties = append(out.MetricProperties, t.metrics[id].Property)
	}
	for name, at := range map[string]**schema.Threshold{
		"UpperCritical": &out.NumericThresholds.UpperCritical, "UpperWarning": &out.NumericThresholds.UpperWarning,
		"LowerWarning": &out.NumericThresholds.LowerWarning, "LowerCritical": &out.NumericThresholds.LowerCritical,
	} {
		limit, ok := d.Thresholds[name]
		if !ok {
			continue
		}
		*at = &schema.Threshold{Reading: limit, Activation: "Increasing"}
		if strings.HasPrefix(name, "Lower") {
			(*at).Activation = "Decreasing"
		}
	}
	for _, id := range d.Reports {
		if out.Links == nil {
			out.Links = &schema.TriggerLinks{}
		}
		out.Links.MetricReportDefinitions = append(out.Links.MetricReportDefinitions, schema.Link{ID: reportDefURI + "/" + id})
	}
	return out
}

func (d *reportDefinition) view(t *telemetry) *schema.MetricReportDefinition {
	out := &schema.MetricReportDefinition{
		Resource: schema.Resource{Name: d.Name}, Type: "OnRequest", Enabled: d.Enabled, ReportActions: d.Actions, ReportUpdates: "Overwrite",
		Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
	}
	if d.Every > 0 {
		out.Type, out.Schedule = "Periodic", &schema.Schedule{RecurrenceInterval: duration(d.Every)}
	}
	if !d.Enabled {
		out.Status.State = schema.StateDisabled
	}
	if slices.Contains(d.Actions, actLog) {
		out.MetricReport = schema.LinkTo(reportsURI + "/" + d.ID)
	}
	for _, id := range d.Metrics {
		out.Metrics = append(out.Metrics, schema.ReportedMetric{MetricID: id, MetricProperties: []string{t.metrics[id].Property}})
		out.MetricProperties = append(out.MetricProperties, t.metrics[id].Property)
	}
	return out
}

// submitTest sends a metric report of the client's making to the subscribers.
func (t *telemetry) submitTest(_ *Request, v Values) (*Reply, error) {
	out := &schema.MetricReport{
		Resource: schema.Resource{ID: "Test", Name: v.String("MetricReportName")}, Timestamp: schema.Time(t.svc.now()),
		MetricReportDefinition: schema.LinkTo(reportDefURI), MetricValues: []schema.MetricValue{},
	}
	values, _ := v["GeneratedMetricReportValues"].([]map[string]any)
	text := func(m map[string]any, name string) string { s, _ := m[name].(string); return clip(s) }
	for i, m := range values {
		if i >= 100 {
			return nil, checker{action: "TelemetryService.SubmitTestMetricReport"}.bad("OutOfRange", strconv.Itoa(len(values)), "GeneratedMetricReportValues")
		}
		out.MetricValues = append(out.MetricValues, schema.MetricValue{
			MetricID: text(m, "MetricId"), MetricValue: text(m, "MetricValue"), MetricProperty: text(m, "MetricProperty"), Timestamp: text(m, "Timestamp"),
		})
	}
	t.publish(out)
	return nil, nil
}

func (s *Service) telemetryRoutes() []Route {
	t := s.telemetry
	if len(t.metrics) == 0 {
		return nil
	}
	reportIDs := func(logged bool) func(*telemetryFile) []string {
		return func(f *telemetryFile) (ids []string) {
			for _, d := range f.Reports {
				if !logged || slices.Contains(d.Actions, actLog) {
					ids = append(ids, d.ID)
				}
			}
			return ids
		}
	}
	actions := Property{Name: "ReportActions", Kind: StringArray, Values: []string{actLog, actEvent}}
	schedule := Property{Name: "Schedule/RecurrenceInterval", Kind: String, Max: 64}
	enabled := Property{Name: "MetricReportDefinitionEnabled", Kind: Boolean}
	id, name := Property{Name: "Id", Kind: String, Max: 64}, Property{Name: "Name", Kind: String, Max: 256}
	properties := Property{Name: "MetricProperties", Kind: StringArray}
	var limits []Property
	for _, n := range thresholdNames {
		limits = append(limits, Property{Name: "NumericThresholds/" + n, Kind: Object, Null: true})
	}
	return []Route{
		{
			URI: telemetryURI, Type: schema.TypeTelemetryService,
			Get: func(*Request) (schema.Object, error) {
				return &schema.TelemetryService{
					Resource: schema.Resource{Name: "Telemetry Service"}, ServiceEnabled: true, MaxReports: maxReports, MinCollectionInterval: duration(minInterval),
					Status:            &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
					MetricDefinitions: schema.LinkTo(metricsURI), MetricReportDefinitions: schema.LinkTo(reportDefURI),
					MetricReports: schema.LinkTo(reportsURI), Triggers: schema.LinkTo(triggersURI),
				}, nil
			},
			Actions: []Action{
				{
					Name: "TelemetryService.SubmitTestMetricReport",
					Parameters: []Property{
						{Name: "MetricReportName", Kind: String, Required: true, Max: 256}, {Name: "GeneratedMetricReportValues", Kind: ObjectArray, Required: true},
					},
					Do: t.submitTest,
				},
				{
					Name: "TelemetryService.ClearMetricReports",
					Do: func(*Request, Values) (*Reply, error) {
						t.mu.Lock()
						defer t.mu.Unlock()
						for _, d := range t.file.Reports {
							d.latest = nil
						}
						return nil, nil
					},
				},
				{
					Name: "TelemetryService.ResetMetricReportDefinitionsToDefaults",
					Do: func(*Request, Values) (*Reply, error) {
						return nil, t.update(func(f *telemetryFile) error { f.Reports = t.defaults().Reports; return nil })
					},
				},
				{
					Name: "TelemetryService.ResetTriggersToDefaults",
					Do: func(*Request, Values) (*Reply, error) {
						return nil, t.update(func(f *telemetryFile) error { f.Triggers = t.defaults().Triggers; return nil })
					},
				},
			},
		},
		{
			URI: metricsURI, Type: schema.TypeMetricDefinitionCollection, Name: "Metric Definitions",
			Members: func(*Request) (ids []string, err error) {
				for _, m := range s.o.Telemetry.Metrics {
					ids = append(ids, m.ID)
				}
				return ids, nil
			},
		},
		{
			URI: metricsURI + "/{metric}", Type: schema.TypeMetricDefinition,
			Get: func(r *Request) (schema.Object, error) {
				m := t.metrics[r.Param("metric")]
				if m == nil {
					return nil, ErrNotFound
				}
				out := &schema.MetricDefinition{
					Resource: schema.Resource{Name: m.Name}, MetricType: "Gauge", MetricDataType: "Integer", Units: m.Units, Implementation: "Synthesized",
					IsLinear: true, MetricProperties: []string{m.Property},
				}
				if m.Counter {
					out.MetricType = "Counter"
				}
				if m.Decimal {
					out.MetricDataType = "Decimal"
				}
				return out, nil
			},
		},
		{
			URI: reportDefURI, Type: schema.TypeMetricReportDefinitionCollection, Name: "Metric Report Definitions", Members: t.ids(reportIDs(false)),
			Create: &Create{
				Properties: []Property{
					id, name, {Name: "MetricReportDefinitionType", Kind: String, Required: true, Values: []string{"Periodic", "OnRequest"}},
					actions, schedule, enabled, properties, {Name: "Metrics", Kind: ObjectArray}, {Name: "ReportUpdates", Kind: String, Values: []string{"Overwrite"}},
				},
				Do: t.createReport,
			},
		},
		{
			URI: reportDefURI + "/{definition}", Type: schema.TypeMetricReportDefinition,
			Get: func(r *Request) (schema.Object, error) {
				d := t.definition(r.Param("definition"))
				if d == nil {
					return nil, ErrNotFound
				}
				return d.view(t), nil
			},
			Patch: &Patch{Properties: []Property{enabled, schedule, actions}, Do: t.changeReport},
			Delete: func(r *Request) error {
				return t.update(func(f *telemetryFile) error {
					n := len(f.Reports)
					f.Reports = slices.DeleteFunc(f.Reports, func(d *reportDefinition) bool { return d.ID == r.Param("definition") })
					if len(f.Reports) == n {
						return ErrNotFound
					}
					for i, d := range f.Triggers {
						if slices.Contains(d.Reports, r.Param("definition")) {
							copied := *d
							copied.Reports = slices.DeleteFunc(slices.Clone(d.Reports), func(id string) bool { return id == r.Param("definition") })
							f.Triggers[i] = &copied
						}
					}
					return nil
				})
			},
		},
		{URI: reportsURI, Type: schema.TypeMetricReportCollection, Name: "Metric Reports", Members: t.ids(reportIDs(true))},
		{
			URI: reportsURI + "/{report}", Type: schema.TypeMetricReport,
			Get: func(r *Request) (schema.Object, error) {
				m, err := t.get(r.ctx, r.Param("report"))
				if err != nil {
					return nil, err
				}
				return m, nil
			},
		},
		{
			URI: triggersURI, Type: schema.TypeTriggersCollection, Name: "Triggers",
			Members: t.ids(func(f *telemetryFile) (ids []string) {
				for _, d := range f.Triggers {
					ids = append(ids, d.ID)
				}
				return ids
			}),
			Create: &Create{
				Properties: append([]Property{
					id, name, {Name: "MetricType", Kind: String, Values: []string{"Numeric"}}, {Name: "MetricIds", Kind: StringArray}, properties,
					{Name: "TriggerActions", Kind: StringArray, Values: []string{actEvent, actReport}}, {Name: "TriggerEnabled", Kind: Boolean},
					{Name: "Links/MetricReportDefinitions", Kind: ObjectArray},
				}, limits...),
				Do: t.createTrigger,
			},
		},
		{
			URI: triggersURI + "/{triggers}", Type: schema.TypeTriggers,
			Get: func(r *Request) (schema.Object, error) {
				d := t.trigger(r.Param("triggers"))
				if d == nil {
					return nil, ErrNotFound
				}
				return d.view(t), nil
			},
			Patch: &Patch{Properties: append([]Property{{Name: "TriggerEnabled", Kind: Boolean}}, limits...), Do: t.changeTrigger},
			Delete: func(r *Request) error {
				return t.update(func(f *telemetryFile) error {
					n := len(f.Triggers)
					f.Triggers = slices.DeleteFunc(f.Triggers, func(d *triggerDefinition) bool { return d.ID == r.Param("triggers") })
					if len(f.Triggers) == n {
						return ErrNotFound
					}
					return nil
				})
			},
		},
	}
}
