package service

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

const gaugeURI = "/redfish/v1/Managers/bmc/ManagerDiagnosticData"

// newTelemetryService returns a service with one gauge, which is a variable; nil has it absent.
func newTelemetryService(t *testing.T, dir string) (*Service, *atomic.Pointer[int64]) {
	t.Helper()
	s, _ := newTestService(t, Options{StateDir: dir, Reach: anywhere, Telemetry: Telemetry{
		Metrics: []Metric{
			{ID: "Free", Name: "Free storage", Units: "KiBy", Property: gaugeURI + "#/FreeStorageSpaceKiB"},
			{ID: "Gone", Name: "What is not there", Property: "/redfish/v1/Managers/bmc/Nothing#/X"},
		},
		Reports:  []Report{{ID: "All", Name: "All", Metrics: []string{"Free", "Gone"}, Every: time.Hour}},
		Triggers: []Trigger{{ID: "Low", Name: "Low", Metrics: []string{"Free"}, Thresholds: map[string]float64{"LowerWarning": 100, "LowerCritical": 10}}},
	}})
	var gauge atomic.Pointer[int64]
	s.Handle(Route{URI: gaugeURI, Type: schema.TypeManagerDiagnosticData, Get: func(*Request) (schema.Object, error) {
		return &schema.ManagerDiagnosticData{Resource: schema.Resource{Name: "Gauge"}, FreeStorageSpaceKiB: gauge.Load()}, nil
	}})
	return s, &gauge
}

func set64(g *atomic.Pointer[int64], n int64) { g.Store(&n) }

func TestMetricReports(t *testing.T) {
	dir := t.TempDir()
	s, gauge := newTelemetryService(t, dir)
	set64(gauge, 500)
	p := newPeer(t, listen(t, s))
	if a := p.do("GET", "/redfish/v1/", ""); a.at("TelemetryService", "@odata.id") != telemetryURI {
		t.Errorf("service root: TelemetryService = %v", a.at("TelemetryService"))
	}
	a := p.do("GET", reportsURI+"/All", "")
	if a.StatusCode != 200 || a.at("MetricValues", 0, "MetricValue") != "500" || a.at("MetricValues", 1) != nil {
		t.Fatalf("report = %d %s; want the one metric that has a value", a.StatusCode, a.body)
	}
	// On request: the value of this moment.
	a = p.do("POST", reportDefURI, `{"Id":"Mine","MetricReportDefinitionType":"OnRequest","MetricProperties":["`+gaugeURI+`#/FreeStorageSpaceKiB"]}`)
	if a.StatusCode != 201 || a.Header.Get("Location") != reportDefURI+"/Mine" {
		t.Fatalf("create = %d %s", a.StatusCode, a.body)
	}
	for _, want := range []int64{7, 8} {
		set64(gauge, want)
		if a := p.do("GET", reportsURI+"/Mine", ""); a.at("MetricValues", 0, "MetricValue") != fmt.Sprint(want) {
			t.Errorf("report on request = %s; want %d", a.body, want)
		}
	}
	for body, property := range map[string]string{
		`{"MetricReportDefinitionType":"Periodic","MetricProperties":["` + gaugeURI + `#/FreeStorageSpaceKiB"]}`:                                            "Schedule/RecurrenceInterval",
		`{"MetricReportDefinitionType":"Periodic","Schedule":{"RecurrenceInterval":"PT0.1S"},"MetricProperties":["` + gaugeURI + `#/FreeStorageSpaceKiB"]}`: "Schedule/RecurrenceInterval",
		`{"MetricReportDefinitionType":"Periodic","Schedule":{"RecurrenceInterval":"often"},"MetricProperties":["` + gaugeURI + `#/FreeStorageSpaceKiB"]}`:  "Schedule/RecurrenceInterval",
		`{"MetricReportDefinitionType":"OnRequest","MetricProperties":["/redfish/v1/AccountService/Accounts/1#/Password"]}`:                                 "MetricProperties",
		`{"MetricReportDefinitionType":"OnRequest","Metrics":[{"MetricId":"Nothing"}]}`:                                                                     "Metrics",
		`{"MetricReportDefinitionType":"OnRequest","Metrics":[{"MetricId":["Free"]}]}`:                                                                      "Metrics",
		`{"MetricReportDefinitionType":"OnRequest"}`:                                                                                                        "MetricProperties",
		`{"Id":"../x","MetricReportDefinitionType":"OnRequest","Metrics":[{"MetricId":"Free"}]}`:                                                            "Id",
		`{"Id":"All","MetricReportDefinitionType":"OnRequest","Metrics":[{"MetricId":"Free"}]}`:                                                             "Id",
		`{"MetricReportDefinitionType":"OnRequest","Metrics":[{"MetricId":"Free"}],"ReportActions":["LaunchTheRockets"]}`:                                   "ReportActions",
	} {
		a := p.do("POST", reportDefURI, body)
		if got := a.at("error", "@Message.ExtendedInfo", 0, "RelatedProperties", 0); a.StatusCode != 400 || got != "#/"+property {
			t.Errorf("POST %s = %d about %v; want 400 about %s", body, a.StatusCode, got, property)
		}
	}
	if a := p.do("PATCH", reportDefURI+"/All", `{"Schedule":{"RecurrenceInterval":"PT2H"},"MetricReportDefinitionEnabled":false}`); a.StatusCode != 200 || a.at("Schedule", "RecurrenceInterval") != "PT7200S" {
		t.Errorf("PATCH = %d %s", a.StatusCode, a.body)
	}
	// All that is kept over a restart.
	again, _ := newTelemetryService(t, dir)
	if d := again.telemetry.definition("Mine"); d == nil || len(d.Metrics) != 1 {
		t.Errorf("the client's definition after a restart: %+v", d)
	}
	if d := again.telemetry.definition("All"); d == nil || d.Enabled || d.Every != 2*time.Hour {
		t.Errorf("the changed definition after a restart: %+v", d)
	}
	if a := p.do("DELETE", reportDefURI+"/Mine", ""); a.StatusCode != 204 {
		t.Errorf("DELETE = %d", a.StatusCode)
	}
	if a := p.do("GET", reportsURI+"/Mine", ""); a.StatusCode != 404 {
		t.Errorf("the report of a deleted definition = %d", a.StatusCode)
	}
	for i := 0; ; i++ {
		a := p.do("POST", reportDefURI, `{"MetricReportDefinitionType":"OnRequest","Metrics":[{"MetricId":"Free"}]}`)
		if a.StatusCode == 201 && i < maxReports {
			continue
		}
		if a.messageID() != "CreateLimitReachedForResource" {
			t.Errorf("definition %d = %d %s", i, a.StatusCode, a.messageID())
		}
		break
	}
	if a := p.do("POST", telemetryURI+"/Actions/TelemetryService.ResetMetricReportDefinitionsToDefaults", ""); a.StatusCode != 204 {
		t.Errorf("reset = %d", a.StatusCode)
	}
	if a := p.do("GET", reportDefURI, ""); a.at("Members@odata.count") != 1.0 {
		t.Errorf("definitions after the reset: %s", a.body)
	}
}

// TestReportStream follows periodic reports in a stream, beside which no events come, and by a subscription.
func TestReportStream(t *testing.T) {
	s, gauge := newTelemetryService(t, "")
	set64(gauge, 1)
	p := newPeer(t, listen(t, s))
	got := make(chan map[string]any, 10)
	sink := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var v map[string]any
		if err := json.NewDecoder(r.Body).Decode(&v); err != nil {
			t.Errorf("pushed: %v", err)
		}
		got <- v
	}))
	defer sink.Close()
	a := p.do("POST", subscriptionsURI, `{"Destination":"`+sink.URL+`","Protocol":"Redfish","EventFormatType":"MetricReport","Context":"c","MetricReportDefinitions":[{"@odata.id":"`+reportDefURI+`/All"}]}`)
	if a.StatusCode != 201 || a.at("EventFormatType") != "MetricReport" {
		t.Fatalf("subscribe = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("POST", subscriptionsURI, `{"Destination":"`+sink.URL+`","Protocol":"Redfish","EventFormatType":"MetricReport","MetricReportDefinitions":[{"@odata.id":"`+reportDefURI+`/Nothing"}]}`); a.StatusCode != 400 {
		t.Errorf("a subscription to a report that is not there = %d", a.StatusCode)
	}
	next, end := openReports(t, p)
	defer end()
	if a := p.do("PATCH", reportDefURI+"/All", `{"Schedule":{"RecurrenceInterval":"PT1S"}}`); a.StatusCode != 200 {
		t.Fatalf("PATCH = %d %s", a.StatusCode, a.body)
	}
	set64(gauge, 42)
	for {
		m := next()
		if !strings.HasPrefix(m.ODataType, "#MetricReport.") {
			t.Fatalf("the stream of reports has a %q", m.ODataType)
		}
		if len(m.MetricValues) == 1 && m.MetricValues[0].MetricValue == "42" {
			break
		}
	}
	for v := range got {
		if v["@odata.type"] != "#"+schema.TypeMetricReport || v["Context"] != "c" || v["Id"] != "All" {
			t.Fatalf("pushed %v", v)
		}
		values, _ := v["MetricValues"].([]any)
		if m, _ := values[0].(map[string]any); m["MetricValue"] == "42" {
			break
		}
	}
}

// openReports opens a stream of metric reports.
func openReports(t *testing.T, p *peer) (next func() schema.MetricReport, end func()) {
	t.Helper()
	lines, end := openLines(t, p, "?$filter=EventFormatType%20eq%20'MetricReport'", "")
	return func() schema.MetricReport {
		for {
			line, ok := lines()
			if !ok {
				t.Fatal("the stream ended")
			}
			if data, ok := strings.CutPrefix(line, "data: "); ok {
				var m schema.MetricReport
				if err := json.Unmarshal([]byte(data), &m); err != nil {
					t.Fatal(err)
				}
				return m
			}
		}
	}, end
}

// TestTriggers steps a value over thresholds; each step is one event.
func TestTriggers(t *testing.T) {
	s, gauge := newTelemetryService(t, "")
	set64(gauge, 500)
	p := newPeer(t, listen(t, s))
	a := p.do("POST", triggersURI, `{"Id":"High","MetricIds":["Free"],"NumericThresholds":{"UpperWarning":{"Reading":1000,"Activation":"Increasing"},"UpperCritical":{"Reading":2000.5}},
		"TriggerActions":["RedfishEvent","RedfishMetricReport"],"Links":{"MetricReportDefinitions":[{"@odata.id":"`+reportDefURI+`/All"}]}}`)
	if a.StatusCode != 201 || a.at("NumericThresholds", "UpperCritical", "Reading") != 2000.5 {
		t.Fatalf("create = %d %s", a.StatusCode, a.body)
	}
	for body, property := range map[string]string{
		`{"MetricIds":["Free"]}`: "NumericThresholds",
		`{"MetricIds":["Free"],"NumericThresholds":{"UpperWarning":{"Reading":"much"}}}`:                                     "NumericThresholds/UpperWarning/Reading",
		`{"MetricIds":["Free"],"NumericThresholds":{"UpperWarning":{"Reading":5},"UpperCritical":{"Reading":4}}}`:            "NumericThresholds/UpperWarning",
		`{"MetricIds":["Free"],"NumericThresholds":{"UpperWarning":{"Reading":5,"Activation":"Decreasing"}}}`:                "NumericThresholds/UpperWarning/Activation",
		`{"MetricIds":["Free"],"NumericThresholds":{"UpperWarning":{"Reading":5,"DwellTime":"PT1S"}}}`:                       "NumericThresholds/UpperWarning",
		`{"MetricIds":["Nothing"],"NumericThresholds":{"UpperWarning":{"Reading":5}}}`:                                       "MetricIds",
		`{"MetricIds":["Free"],"NumericThresholds":{"UpperWarning":{"Reading":5}},"Links":{"MetricReportDefinitions":[{}]}}`: "Links/MetricReportDefinitions",
	} {
		a := p.do("POST", triggersURI, body)
		if got := a.at("error", "@Message.ExtendedInfo", 0, "RelatedProperties", 0); a.StatusCode != 400 || got != "#/"+property {
			t.Errorf("POST %s = %d about %v; want 400 about %s", body, a.StatusCode, got, property)
		}
	}
	next, end := openStream(t, p, "", "")
	defer end()
	low, high := s.telemetry.trigger("Low"), s.telemetry.trigger("High")
	for _, step := range []struct {
		value int64
		d     *triggerDefinition
		want  string // "" for none
	}{
		{500, low, ""}, {99, low, "TriggerNumericBelowLowerWarning"}, {98, low, ""}, {9, low, "TriggerNumericBelowLowerCritical"},
		{50, low, "TriggerNumericAboveLowerCritical"}, {100, low, "TriggerNumericReadingNormal"},
		{1001, high, "TriggerNumericAboveUpperWarning"}, {2001, high, "TriggerNumericAboveUpperCritical"}, {1500, high, "TriggerNumericBelowUpperCritical"},
		{0, high, "TriggerNumericReadingNormal"},
	} {
		set64(gauge, step.value)
		before := s.bus.end()
		s.telemetry.watch(s.telemetry.sample(t.Context()), step.d)
		if step.want == "" {
			if n := s.bus.end() - before; n != 0 {
				t.Errorf("%d: %d events", step.value, n)
			}
			continue
		}
		e := until(t, next, step.want).event.Events[0]
		if e.MessageArgs[0] != "Free" || e.MessageArgs[1] != fmt.Sprint(step.value) || e.MessageArgs[len(e.MessageArgs)-1] != step.d.ID {
			t.Errorf("%d: %s has the arguments %q", step.value, step.want, e.MessageArgs)
		}
	}
	// A value that is not there is no crossing.
	gauge.Store(nil)
	before := s.bus.end()
	s.telemetry.watch(s.telemetry.sample(t.Context()), low)
	if s.bus.end() != before {
		t.Error("a metric without a value has crossed a threshold")
	}
	if n := s.reports.end(); n < 5 {
		t.Errorf("%d reports by the triggers; want one for each of four crossings", n-1)
	}
	if a := p.do("PATCH", triggersURI+"/High", `{"NumericThresholds":{"UpperCritical":null,"UpperWarning":{"Reading":3}}}`); a.StatusCode != 200 || a.at("NumericThresholds", "UpperCritical") != nil {
		t.Errorf("PATCH = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("DELETE", triggersURI+"/High", ""); a.StatusCode != 204 {
		t.Errorf("DELETE = %d", a.StatusCode)
	}
}

// TestTestReport submits a report to the subscribers.
func TestTestReport(t *testing.T) {
	s, _ := newTelemetryService(t, "")
	p := newPeer(t, listen(t, s))
	next, end := openReports(t, p)
	defer end()
	if a := p.do("POST", telemetryURI+"/Actions/TelemetryService.SubmitTestMetricReport", `{"MetricReportName":"test","GeneratedMetricReportValues":[{"MetricId":"X","MetricValue":"12"}]}`); a.StatusCode != 204 {
		t.Fatalf("submit = %d %s", a.StatusCode, a.body)
	}
	for {
		if m := next(); m.Name == "test" {
			if len(m.MetricValues) != 1 || m.MetricValues[0].MetricValue != "12" {
				t.Errorf("report %+v", m)
			}
			return
		}
	}
}

// FuzzTelemetry has clients define reports and triggers. What is taken can be shown and sampled; nothing fails for a reason of ours.
func FuzzTelemetry(f *testing.F) {
	for _, s := range []string{
		`{"Id":"x","MetricReportDefinitionType":"Periodic","Schedule":{"RecurrenceInterval":"PT5S"},"Metrics":[{"MetricId":"Free"}]}`,
		`{"MetricIds":["Free"],"NumericThresholds":{"UpperWarning":{"Reading":1e9,"Activation":"Increasing"},"LowerCritical":null}}`,
		`{"Metrics":[{"MetricId":null,"MetricProperties":[1]}],"MetricReportDefinitionType":"OnRequest"}`, `{"NumericThresholds":{"UpperCritical":{"Reading":1e999}},"MetricIds":["Free"]}`,
	} {
		f.Add([]byte(s))
	}
	s, err := New(Options{Account: &Credential{testUser, testPassword}, Limits: Limits{Hash: cheap}, Telemetry: Telemetry{
		Metrics: []Metric{{ID: "Free", Name: "Free", Property: "/redfish/v1/SessionService#/SessionTimeout"}},
	}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		s.telemetry.file = s.telemetry.defaults()
		for _, uri := range []string{reportDefURI, triggersURI} {
			req := httptest.NewRequest("POST", uri, strings.NewReader(string(body)))
			req.SetBasicAuth(testUser, testPassword)
			req.Header.Set("Content-Type", "application/json")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, req)
			if w.Code != 201 && (w.Code < 400 || w.Code >= 500) {
				t.Errorf("POST %s of %q = %d", uri, body, w.Code)
			}
			if w.Code == 201 {
				now := s.telemetry.sample(t.Context())
				for _, d := range s.telemetry.file.Reports {
					s.telemetry.report(now, d)
				}
				for _, d := range s.telemetry.file.Triggers {
					s.telemetry.watch(now, d)
				}
			}
		}
	})
}
