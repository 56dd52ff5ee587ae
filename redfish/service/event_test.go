package service

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// anywhere lets a test's service connect to the test.
func anywhere(netip.Addr) bool { return true }

// streamed is one event of a stream.
type streamed struct {
	id    string
	event schema.Event
}

// openStream opens a stream of events and returns a function that returns the next.
func openStream(t *testing.T, p *peer, query, last string) (next func() (streamed, bool), end func()) {
	t.Helper()
	lines, end := openLines(t, p, query, last)
	next = func() (s streamed, ok bool) {
		for {
			line, ok := lines()
			if !ok {
				return s, false
			}
			if id, ok := strings.CutPrefix(line, "id: "); ok {
				s.id = id
			}
			if data, ok := strings.CutPrefix(line, "data: "); ok {
				if err := json.Unmarshal([]byte(data), &s.event); err != nil {
					t.Errorf("event %s: %v", data, err)
				}
			}
			if line == "" && s.id != "" {
				return s, true
			}
		}
	}
	return next, end
}

// openLines opens a stream and returns a function that returns its next line.
func openLines(t *testing.T, p *peer, query, last string) (next func() (string, bool), end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", p.url+streamURI+query, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth(testUser, testPassword)
	req.Header.Set("Accept", "text/event-stream")
	if last != "" {
		req.Header.Set("Last-Event-ID", last)
	}
	resp, err := p.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 200 {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("open stream: %s %s", resp.Status, b)
	}
	lines := bufio.NewScanner(resp.Body)
	end = func() { cancel(); resp.Body.Close() }
	t.Cleanup(end)
	return func() (string, bool) { ok := lines.Scan(); return lines.Text(), ok }, end
}

// until returns the first event of a stream with a message.
func until(t *testing.T, next func() (streamed, bool), name string) streamed {
	t.Helper()
	for {
		e, ok := next()
		if !ok {
			t.Fatalf("the stream ended before %s", name)
		}
		if strings.HasSuffix(e.event.Events[0].MessageID, "."+name) {
			return e
		}
	}
}

func TestStream(t *testing.T) {
	s, _ := newTestService(t, Options{})
	p := newPeer(t, listen(t, s))
	next, end := openStream(t, p, "", "")
	created := until(t, next, "ResourceCreated")
	sub := created.event.Events[0].OriginOfCondition.(map[string]any)["@odata.id"].(string)
	a := p.do("GET", sub, "")
	if a.StatusCode != 200 || a.at("SubscriptionType") != "SSE" || a.at("Context") == "" || a.at("Context") != created.event.Context {
		t.Errorf("GET %s = %d %s", sub, a.StatusCode, a.body)
	}
	for i := range 3 {
		s.Publish(Event{MessageID: resourceEvent + "TestMessage", Args: nil, Origin: "/redfish/v1/Systems/system", Group: int64(i + 1)})
	}
	var last streamed
	for i := range 3 {
		last = until(t, next, "TestMessage")
		e := last.event.Events[0]
		if e.EventGroupID != int64(i+1) || e.EventID != last.id || last.event.ID != last.id || e.MemberID != "0" || e.Message != "Test message." || e.MessageSeverity != "OK" {
			t.Errorf("event %d = %+v", i, last)
		}
		if i == 0 {
			created = last
		}
	}
	end()
	for range 100 {
		if a = p.do("GET", sub, ""); a.StatusCode == 404 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if a.StatusCode != 404 {
		t.Errorf("the stream's resource is still there: %d", a.StatusCode)
	}

	// Replay behind the first of the three.
	next, _ = openStream(t, p, "?$filter="+url.QueryEscape("MessageId eq 'ResourceEvent.TestMessage'"), created.id)
	for i := range 2 {
		if e, ok := next(); !ok || e.event.Events[0].EventGroupID != int64(i+2) {
			t.Errorf("replayed event %d = %+v", i, e)
		}
	}
	// A service that was started anew gives all it has.
	next, _ = openStream(t, p, "?$filter="+url.QueryEscape("MessageId eq 'ResourceEvent.TestMessage'"), "oldstart-7")
	if e, ok := next(); !ok || e.event.Events[0].EventGroupID != 1 {
		t.Errorf("first event after a restart = %+v", e)
	}
}

func TestStreamEnds(t *testing.T) {
	s, _ := newTestService(t, Options{Limits: Limits{UserStreams: 2}})
	p := newPeer(t, listen(t, s))
	login := p.do("POST", sessionsURI, `{"UserName":"root","Password":"correct horse"}`)
	next, _ := openStream(t, p, "", "")
	sub := until(t, next, "ResourceCreated").event.Events[0].OriginOfCondition.(map[string]any)["@odata.id"].(string)
	// The end of a session does not end the stream.
	p.do("DELETE", login.Header.Get("Location"), "")
	until(t, next, "ResourceRemoved")
	_, _ = openStream(t, p, "", "")
	if a := p.do("GET", streamURI, "", "Accept", "text/event-stream"); a.StatusCode != 503 || a.messageID() != "EventSubscriptionLimitExceeded" {
		t.Errorf("one stream too many = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("DELETE", sub, ""); a.StatusCode != 204 {
		t.Fatalf("DELETE %s = %d %s", sub, a.StatusCode, a.body)
	}
	for {
		if _, ok := next(); !ok {
			break
		}
	}
	for query, status := range map[string]int{
		"?$filter=x": 400, "?$filter=Name%20eq%20'x'": 400, "?$top=1": 501, "?%zz": 400,
	} {
		if a := p.do("GET", streamURI+query, "", "Accept", "text/event-stream"); a.StatusCode != status {
			t.Errorf("stream%s = %d; want %d", query, a.StatusCode, status)
		}
	}
	if a := p.do("GET", streamURI, "", "Authorization", "", "Accept", "text/event-stream"); a.StatusCode != 401 {
		t.Errorf("stream without credentials = %d", a.StatusCode)
	}
	if a := p.do("GET", streamURI, "", "Accept", "application/json"); a.StatusCode != 406 {
		t.Errorf("stream as JSON = %d", a.StatusCode)
	}
}

// TestStreamsDoNotStarve checks that open streams leave room for requests.
func TestStreamsDoNotStarve(t *testing.T) {
	s, _ := newTestService(t, Options{Limits: Limits{Requests: 1}})
	p := newPeer(t, listen(t, s))
	next, _ := openStream(t, p, "", "")
	until(t, next, "ResourceCreated")
	if a := p.do("GET", "/redfish/v1/Systems/system", ""); a.StatusCode != 200 {
		t.Errorf("GET beside a stream = %d", a.StatusCode)
	}
}

// receiver is a destination of events.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex // guards what follows
	status int
	got    []schema.Event
	header http.Header
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{status: 204}
	r.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, hr *http.Request) {
		r.mu.Lock()
		defer r.mu.Unlock()
		var e schema.Event
		if err := json.NewDecoder(hr.Body).Decode(&e); err != nil {
			t.Errorf("receiver: %v", err)
		}
		r.header = hr.Header
		if r.status < 300 {
			r.got = append(r.got, e)
		}
		w.WriteHeader(r.status)
	}))
	t.Cleanup(r.Close)
	return r
}

// wait returns the messages received, once there are at least n.
func (r *receiver) wait(t *testing.T, n int) (ids []string) {
	t.Helper()
	for range 500 {
		r.mu.Lock()
		ids = nil
		for _, e := range r.got {
			for _, one := range e.Events {
				ids = append(ids, one.MessageID)
			}
		}
		r.mu.Unlock()
		if len(ids) >= n {
			return ids
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("received %q; want %d events", ids, n)
	return nil
}

// settle waits until the last event received is that one, and returns the different ones in their order. One that was under way when its
// subscription was suspended may come twice.
func (r *receiver) settle(t *testing.T, last string) (ids []string) {
	t.Helper()
	for n := 1; len(ids) == 0 || ids[len(ids)-1] != last; n++ {
		ids = slices.Compact(r.wait(t, n))
	}
	return ids
}

func TestPush(t *testing.T) {
	dir := t.TempDir()
	s, _ := newTestService(t, Options{StateDir: dir, Reach: anywhere})
	p := newPeer(t, listen(t, s))
	r := newReceiver(t)
	a := p.do("POST", subscriptionsURI, fmt.Sprintf(`{"Destination":%q,"Protocol":"Redfish","Context":"c \"1\"","RegistryPrefixes":["ResourceEvent"],
		"Severities":["OK"],"OriginResources":[{"@odata.id":"/redfish/v1/Systems"}],"SubordinateResources":true,"HttpHeaders":[{"X-Secret":"s3cret"}]}`, r.URL+"/x"))
	if a.StatusCode != 201 || strings.Contains(string(a.body), "s3cret") {
		t.Fatalf("subscribe = %d %s", a.StatusCode, a.body)
	}
	sub := a.Header.Get("Location")
	if a := p.do("GET", sub, ""); a.at("SubscriptionType") != "RedfishEvent" || a.at("Status", "Health") != "OK" || strings.Contains(string(a.body), "s3cret") {
		t.Errorf("GET = %s", a.body)
	}
	s.Publish(Event{MessageID: taskEvent + "TaskStarted", Args: []string{"1"}, Origin: "/redfish/v1/Systems/system"})
	s.Publish(Event{MessageID: resourceEvent + "ResourceChanged", Origin: "/redfish/v1/Managers/bmc"})
	s.Publish(Event{MessageID: resourceEvent + "ResourceChanged", Severity: "Critical", Origin: "/redfish/v1/Systems/system"})
	s.Publish(Event{MessageID: resourceEvent + "ResourceChanged", Origin: "/redfish/v1/Systems/system"})
	if got := r.wait(t, 1); len(got) != 1 || got[0] != resourceEvent+"ResourceChanged" {
		t.Errorf("received %q", got)
	}
	r.mu.Lock()
	if r.got[0].Context != `c "1"` || r.header.Get("X-Secret") != "s3cret" || r.header.Get("Content-Type") == "" {
		t.Errorf("received %+v with %v", r.got[0], r.header)
	}
	r.mu.Unlock()

	// While suspended, events wait.
	if a := p.do("POST", sub+"/Actions/EventDestination.SuspendSubscription", ""); a.StatusCode != 204 {
		t.Fatalf("suspend = %d %s", a.StatusCode, a.body)
	}
	s.Publish(Event{MessageID: resourceEvent + "TestMessage", Origin: "/redfish/v1/Systems/system"})
	if a := p.do("GET", sub, ""); a.at("Status", "State") != "Disabled" {
		t.Errorf("suspended: %s", a.body)
	}
	if a := p.do("POST", sub+"/Actions/EventDestination.ResumeSubscription", `{"DeliverBufferedEventDuration":"PT1H"}`); a.StatusCode != 204 {
		t.Fatalf("resume = %d %s", a.StatusCode, a.body)
	}
	if got := r.settle(t, resourceEvent+"TestMessage"); len(got) != 2 {
		t.Errorf("after resuming: %q", got)
	}
	// Without what was missed.
	p.do("POST", sub+"/Actions/EventDestination.SuspendSubscription", "")
	s.Publish(Event{MessageID: resourceEvent + "ResourceRemoved", Origin: "/redfish/v1/Systems/system"})
	p.do("POST", sub+"/Actions/EventDestination.ResumeSubscription", `{"DeliverBufferedEventDuration":"PT0S"}`)
	s.Publish(Event{MessageID: resourceEvent + "ResourceCreated", Origin: "/redfish/v1/Systems/system"})
	if got := r.settle(t, resourceEvent+"ResourceCreated"); len(got) != 3 {
		t.Errorf("after resuming from now: %q", got)
	}
	if a := p.do("POST", sub+"/Actions/EventDestination.ResumeSubscription", `{"DeliverBufferedEventDuration":"soon"}`); a.StatusCode != 400 {
		t.Errorf("resume soon = %d", a.StatusCode)
	}

	// Subscriptions outlive the service.
	again, _ := newTestService(t, Options{StateDir: dir, Reach: anywhere})
	if c, ok := again.subs.get("1"); !ok || c.Headers["X-Secret"] != "s3cret" || c.URI != r.URL+"/x" || !c.Interest.Subordinate {
		t.Errorf("after a restart: %+v, %v", c, ok)
	}
	if a := p.do("DELETE", sub, ""); a.StatusCode != 204 {
		t.Errorf("DELETE = %d", a.StatusCode)
	}
}

func TestTestEvents(t *testing.T) {
	s, _ := newTestService(t, Options{Reach: anywhere})
	p := newPeer(t, listen(t, s))
	r := newReceiver(t)
	if a := p.do("POST", subscriptionsURI, fmt.Sprintf(`{"Destination":%q,"Protocol":"Redfish","MessageIds":["ResourceEvent.1.0.TestMessage","Alert.1.0.Fan"]}`, r.URL)); a.StatusCode != 201 {
		t.Fatalf("subscribe = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("POST", eventsURI+"/Actions/EventService.TestEventSubscription", "{}"); a.StatusCode != 204 {
		t.Errorf("TestEventSubscription = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("POST", eventsURI+"/Actions/EventService.SubmitTestEvent", `{"MessageId":"Alert.1.0.Fan","MessageArgs":["1"],"Message":"m","MessageSeverity":"Critical","OriginOfCondition":"/redfish/v1/Chassis/1","EventGroupId":7,"EventTimestamp":"2026-01-02T03:04:05Z"}`); a.StatusCode != 204 {
		t.Errorf("SubmitTestEvent = %d %s", a.StatusCode, a.body)
	}
	if got := r.wait(t, 2); !slices.Equal(got, []string{resourceEvent + "TestMessage", "Alert.1.0.Fan"}) {
		t.Errorf("received %q", got)
	}
	for _, body := range []string{`{}`, `{"MessageId":""}`, `{"MessageId":"a","EventTimestamp":"now"}`, `{"MessageId":"a","X":1}`} {
		if a := p.do("POST", eventsURI+"/Actions/EventService.SubmitTestEvent", body); a.StatusCode != 400 {
			t.Errorf("SubmitTestEvent %s = %d", body, a.StatusCode)
		}
	}
}

func TestRetryPolicies(t *testing.T) {
	s, _ := newTestService(t, Options{Reach: anywhere})
	p := newPeer(t, listen(t, s))
	p.do("PATCH", eventsURI, `{"DeliveryRetryAttempts":1,"DeliveryRetryIntervalSeconds":1}`)
	r := newReceiver(t)
	r.status = 500
	subs := map[string]string{}
	for _, policy := range retryPolicies {
		a := p.do("POST", subscriptionsURI, fmt.Sprintf(`{"Destination":%q,"Protocol":"Redfish","DeliveryRetryPolicy":%q,"ResourceTypes":["Chassis"]}`, r.URL, policy))
		if a.StatusCode != 201 {
			t.Fatalf("subscribe = %d %s", a.StatusCode, a.body)
		}
		subs[policy] = a.Header.Get("Location")
	}
	s.Publish(Event{MessageID: resourceEvent + "ResourceChanged", Origin: "/redfish/v1/Chassis/1"})
	time.Sleep(1800 * time.Millisecond)
	if a := p.do("GET", subs[retryTerminate], ""); a.StatusCode != 404 {
		t.Errorf("after the retries, TerminateAfterRetries: %d", a.StatusCode)
	}
	if a := p.do("GET", subs[retrySuspend], ""); a.at("Status", "State") != "Disabled" || a.at("Status", "Health") != "Critical" {
		t.Errorf("after the retries, SuspendRetries: %s", a.body)
	}
	r.mu.Lock()
	r.status = 200
	r.mu.Unlock()
	if got := r.wait(t, 2); len(got) != 2 {
		t.Errorf("after the destination's return: %q", got)
	}
}

func TestSubscribeRefused(t *testing.T) {
	s, _ := newTestService(t, Options{Limits: Limits{Subscriptions: 1}})
	p := newPeer(t, listen(t, s))
	for _, destination := range []string{
		"", "x", "ftp://192.0.2.1/", "file:///etc/passwd", "https://", "https:///x", "https://127.0.0.1/", "https://[::1]:8443/", "https://169.254.169.254/latest", "http://0.0.0.0/",
		"https://[fe80::1]/", "https://224.0.0.1/", "https://user:pw@192.0.2.1/", "https://192.0.2.1/#x", "https://[::ffff:127.0.0.1]/", "https://255.255.255.255/", "https://[64:ff9b::7f00:1]/",
	} {
		if a := p.do("POST", subscriptionsURI, fmt.Sprintf(`{"Destination":%q,"Protocol":"Redfish"}`, destination)); a.StatusCode != 400 {
			t.Errorf("subscription to %q = %d %s", destination, a.StatusCode, a.body)
		}
	}
	const good = `"Destination":"https://192.0.2.1/","Protocol":"Redfish"`
	for _, extra := range []string{
		`"HttpHeaders":[{"Host":"x"}]`, `"HttpHeaders":[{"A b":"x"}]`, `"HttpHeaders":[{"X":"a\r\nB: c"}]`, `"HttpHeaders":[{"X":1}]`, `"HttpHeaders":["x"]`,
		`"RegistryPrefixes":["Nonsense"]`, `"ResourceTypes":["Nonsense"]`, `"Severities":["Bad"]`, `"RegistryPrefixes":["Base"],"ExcludeRegistryPrefixes":["Base"]`,
		`"OriginResources":[{"x":"y"}]`, `"EventFormatType":"MetricReport"`, `"IncludeOriginOfCondition":true`, `"HeartbeatIntervalMinutes":0`, `"DeliveryRetryPolicy":"Never"`,
	} {
		if a := p.do("POST", subscriptionsURI, "{"+good+","+extra+"}"); a.StatusCode != 400 {
			t.Errorf("subscription with %s = %d %s", extra, a.StatusCode, a.body)
		}
	}
	if a := p.do("POST", subscriptionsURI, "{"+good+"}"); a.StatusCode != 201 {
		t.Fatalf("good subscription = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("POST", subscriptionsURI, "{"+good+"}"); a.StatusCode != 503 || a.messageID() != "EventSubscriptionLimitExceeded" {
		t.Errorf("one too many = %d %s", a.StatusCode, a.body)
	}
	for body, status := range map[string]int{
		`{"Context":"new"}`: 200, `{"Context":null}`: 200, `{"DeliveryRetryPolicy":"RetryForever","VerifyCertificate":true,"HttpHeaders":[]}`: 200,
		`{"Destination":"https://192.0.2.2"}`: 400, `{"HttpHeaders":[{"Host":"x"}]}`: 400,
	} {
		if a := p.do("PATCH", subscriptionsURI+"/1", body); a.StatusCode != status {
			t.Errorf("PATCH %s = %d; want %d\n%s", body, a.StatusCode, status, a.body)
		}
	}
}

// TestGuardAtDial checks that a name that resolves to the device is refused when the connection is made.
func TestGuardAtDial(t *testing.T) {
	s, _ := newTestService(t, Options{})
	r := newReceiver(t)
	_, port, _ := strings.Cut(strings.TrimPrefix(r.URL, "https://"), ":")
	err := s.send(t.Context(), s.outbound(nil), &subscription{URI: "https://localhost:" + port}, []byte("{}"))
	if err == nil || !strings.Contains(err.Error(), errForbiddenAddress.Error()) {
		t.Errorf("delivery to localhost: %v", err)
	}
}

func TestBus(t *testing.T) {
	s, _ := newTestService(t, Options{})
	for i := range maxEvents + 10 {
		s.Publish(Event{MessageID: resourceEvent + "TestMessage", Group: int64(i)})
	}
	recs, next, lost, _ := s.bus.since(1, 5)
	if len(recs) != 5 || !lost || recs[0].seq != 11 || next != 16 {
		t.Errorf("since(1) = %d events from %d, next %d, lost %v", len(recs), recs[0].seq, next, lost)
	}
	if recs, next, lost, _ := s.bus.since(1<<63, 5); len(recs) != 0 || lost || next != s.bus.end() {
		t.Errorf("since(far) = %d, %d, %v", len(recs), next, lost)
	}
	big := strings.Repeat("x", 100<<10)
	for range 50 {
		s.Publish(Event{MessageID: resourceEvent + "TestMessage", Message: big})
	}
	if s.bus.bytes > maxEventBytes || len(s.bus.ring) > 11 {
		t.Errorf("the ring holds %d bytes in %d events", s.bus.bytes, len(s.bus.ring))
	}
}

func TestDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"PT0S": 0, "PT1H2M3.5S": time.Hour + 2*time.Minute + 3500*time.Millisecond, "P1D": 24 * time.Hour, "P1DT1S": 24*time.Hour + time.Second,
		"": -1, "P": -1, "1S": -1, "PT1X": -1, "PT1S1M": -1, "PT.5S": -1, "P-1D": -1, "PT1.5H": -1, "PT99999999999S": -1,
	} {
		got, ok := parseDuration(text)
		if !ok {
			got = -1
		}
		if got != want {
			t.Errorf("parseDuration(%q) = %v; want %v", text, got, want)
		}
	}
}

func FuzzDuration(f *testing.F) {
	f.Add("P1DT2H3M4.5S")
	f.Fuzz(func(t *testing.T, text string) {
		if d, ok := parseDuration(text); ok && (d < 0 || d > 1e8*time.Second) {
			t.Errorf("parseDuration(%q) = %v", text, d)
		}
	})
}

func FuzzStreamQuery(f *testing.F) {
	f.Add("$filter=RegistryPrefix%20eq%20'x'", "abc-7")
	s, _ := newTestService(f, Options{})
	s.Publish(Event{MessageID: resourceEvent + "TestMessage", Origin: "/redfish/v1/Systems/system"})
	f.Fuzz(func(t *testing.T, raw, last string) {
		var w interest
		if streamQuery(raw, &w) == nil {
			w.wants(s.bus.ring[0])
		}
		if n := s.bus.after(last); n < 1 || n > s.bus.next {
			t.Errorf("after(%q) = %d", last, n)
		}
	})
}

func TestEventsBehindAnID(t *testing.T) {
	for _, epoch := range []string{"abcd", "o-4YYYcf", "-"} {
		b := newEventBus()
		b.epoch = epoch
		for range 4 {
			b.add(&eventRecord{})
		}
		for id, want := range map[string]uint64{b.name(3): 4, b.name(9): 5, "other-2": 1, "nonsense": 5, "": 5} {
			if got := b.after(id); got != want {
				t.Errorf("after(%q) with the epoch %q = %d; want %d", id, epoch, got, want)
			}
		}
	}
}
