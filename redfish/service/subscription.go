package service

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// subscription is one EventDestination: a destination that events are pushed to, or an open stream of them.
type subscription struct {
	// what is kept in events.json; guarded by subscriptions.mu
	ID        string            `json:"id"`
	User      string            `json:"user"` // who made it
	URI       string            `json:"destination"`
	Context   string            `json:"context"`
	Policy    string            `json:"retryPolicy"`
	Verify    bool              `json:"verifyCertificate"`
	Headers   map[string]string `json:"headers,omitempty"`
	Interest  interest          `json:"interest"`
	Heartbeat int               `json:"heartbeatMinutes,omitempty"` // zero is none
	Suspended bool              `json:"suspended,omitempty"`

	stream bool // a stream is not kept, and has none of the above but User, Context and Interest
	failed int  // deliveries in a row; guarded by subscriptions.mu
	cursor uint64
	end    context.CancelFunc // of the stream or of the deliveries
}

// subscriptionFile is events.json in the state directory.
type subscriptionFile struct {
	Version       int             `json:"version"` // 1
	Next          int             `json:"next"`    // the next Id
	Attempts      int             `json:"retryAttempts"`
	Seconds       int             `json:"retryIntervalSeconds"`
	Subscriptions []*subscription `json:"subscriptions"`
}

// subscriptions is the table of all subscribers.
type subscriptions struct {
	svc  *Service
	path string // "" keeps them in memory

	mu   sync.Mutex // guards what follows
	file subscriptionFile
	ctx  context.Context // of deliveries; nil until the service serves
	wg   sync.WaitGroup  // the deliveries
}

// The retry policies of EventDestination.DeliveryRetryPolicy. The last is the one that loses least, and the default.
const (
	retryTerminate = "TerminateAfterRetries"
	retrySuspend   = "SuspendRetries"
	retryForever   = "RetryForever"
	retryBackoff   = "RetryForeverWithBackoff"
)

var retryPolicies = []string{retryTerminate, retrySuspend, retryForever, retryBackoff}

const (
	eventsURI        = "/redfish/v1/EventService"
	subscriptionsURI = eventsURI + "/Subscriptions"
	streamURI        = eventsURI + "/SSE"
	maxBackoff       = time.Hour
	maxBatch         = 32 // events in one delivery
)

func openSubscriptions(s *Service) (*subscriptions, error) {
	t := &subscriptions{svc: s, file: subscriptionFile{Version: 1, Next: 1, Attempts: 3, Seconds: 30}}
	if s.o.StateDir == "" {
		return t, nil
	}
	t.path = s.path("events.json")
	b, err := os.ReadFile(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read subscriptions: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&t.file); err != nil {
		return nil, fmt.Errorf("read subscriptions in %s: %w", t.path, err)
	}
	if t.file.Version != 1 {
		return nil, fmt.Errorf("read subscriptions in %s: version %d is not known", t.path, t.file.Version)
	}
	t.file.Subscriptions = slices.DeleteFunc(t.file.Subscriptions, func(c *subscription) bool { return c == nil })
	for _, c := range t.file.Subscriptions {
		c.cursor = s.busOf(&c.Interest).end()
	}
	return t, nil
}

// store keeps the table. The caller holds mu.
func (t *subscriptions) store() error {
	if t.path == "" {
		return nil
	}
	kept := t.file
	kept.Subscriptions = slices.DeleteFunc(slices.Clone(kept.Subscriptions), func(c *subscription) bool { return c.stream })
	b, err := json.MarshalIndent(kept, "", "\t")
	if err == nil {
		err = durable.WriteFile(t.path, b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("store subscriptions: %w", err)
	}
	return nil
}

// serve begins deliveries; they end with ctx. Several listeners share the deliveries of the first.
func (t *subscriptions) serve(ctx context.Context) (wait func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx != nil {
		return func() {}
	}
	t.ctx = ctx
	for _, c := range t.file.Subscriptions {
		t.deliver(c)
	}
	return func() {
		t.wg.Wait()
		t.mu.Lock()
		t.ctx = nil
		t.mu.Unlock()
	}
}

// deliver starts the deliveries of a subscription that is pushed. The caller holds mu.
func (t *subscriptions) deliver(c *subscription) {
	if t.ctx == nil || c.stream || c.Suspended {
		return
	}
	ctx, end := context.WithCancel(t.ctx)
	c.end = end
	c.failed = 0
	t.wg.Go(func() { t.push(ctx, c) })
}

// endStreams ends all streams, as the service stops.
func (t *subscriptions) endStreams() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.file.Subscriptions {
		if c.stream {
			c.end()
		}
	}
}

// add takes in a subscription and gives it its Id.
func (t *subscriptions) add(c *subscription) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.svc.limits
	limit, same, mine := l.Subscriptions, 0, 0
	if c.stream {
		limit = l.Streams
	}
	for _, o := range t.file.Subscriptions {
		if o.stream == c.stream {
			same++
			if o.User == c.User {
				mine++
			}
		}
	}
	if same >= limit || c.stream && mine >= l.UserStreams {
		return refuse(http.StatusServiceUnavailable, "EventSubscriptionLimitExceeded")
	}
	c.ID = strconv.Itoa(t.file.Next)
	t.file.Next++
	t.file.Subscriptions = append(t.file.Subscriptions, c)
	if !c.stream {
		if err := t.store(); err != nil {
			t.file.Subscriptions = t.file.Subscriptions[:len(t.file.Subscriptions)-1]
			return err
		}
		t.deliver(c)
	}
	return nil
}

// remove ends a subscription and its stream or deliveries.
func (t *subscriptions) remove(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.IndexFunc(t.file.Subscriptions, func(c *subscription) bool { return c.ID == id })
	if i < 0 {
		return ErrNotFound
	}
	c := t.file.Subscriptions[i]
	t.file.Subscriptions = slices.Delete(slices.Clone(t.file.Subscriptions), i, i+1)
	if c.end != nil {
		c.end()
	}
	if c.stream {
		return nil
	}
	return t.store()
}

// change changes a subscription by f.
func (t *subscriptions) change(id string, f func(*subscription) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.IndexFunc(t.file.Subscriptions, func(c *subscription) bool { return c.ID == id })
	if i < 0 {
		return ErrNotFound
	}
	if err := f(t.file.Subscriptions[i]); err != nil {
		return err
	}
	return t.store()
}

// get returns a copy of a subscription.
func (t *subscriptions) get(id string) (subscription, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.file.Subscriptions {
		if c.ID == id {
			return *c, true
		}
	}
	return subscription{}, false
}

func (t *subscriptions) ids() (ids []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.file.Subscriptions {
		ids = append(ids, c.ID)
	}
	return ids
}

// push delivers events until the subscription ends. Only it moves the cursor while it runs.
func (t *subscriptions) push(ctx context.Context, c *subscription) {
	s := t.svc
	client := s.outbound(&tls.Config{MinVersion: tls.VersionTLS12})
	defer client.CloseIdleConnections()
	insecure := s.outbound(&tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}) // the subscriber has asked for it
	defer insecure.CloseIdleConnections()
	t.mu.Lock()
	cursor, heartbeat := c.cursor, time.Duration(c.Heartbeat)*time.Minute
	t.mu.Unlock()
	beat := time.NewTimer(heartbeat)
	defer beat.Stop()
	if heartbeat == 0 {
		beat.Stop()
	}
	var lost bool
	t.mu.Lock()
	bus, batch := s.busOf(&c.Interest), maxBatch
	if c.Interest.Reports {
		batch = 1
	}
	t.mu.Unlock()
	for ctx.Err() == nil {
		recs, next, gap, wake := bus.since(cursor, batch)
		lost = lost || gap
		t.mu.Lock()
		now := *c
		t.mu.Unlock()
		wanted := slices.DeleteFunc(recs, func(rec *eventRecord) bool { return !now.Interest.wants(rec) })
		if lost && len(wanted) > 0 && !now.Interest.Reports {
			missing := s.eventRecord(Event{MessageID: baseRegistry + "EventBufferExceeded", Origin: eventsURI, Time: s.now()})
			missing.seq = wanted[0].seq - 1
			wanted = append([]*eventRecord{missing}, wanted...)
		}
		if len(wanted) == 0 {
			cursor = next
			t.moved(c, cursor)
			if len(recs) > 0 || gap {
				continue
			}
			select {
			case <-ctx.Done():
				return
			case <-wake:
				continue
			case <-beat.C:
				beat.Reset(heartbeat)
				alive := s.eventRecord(Event{MessageID: heartbeatEvent + "RedfishServiceFunctional", Origin: eventsURI, Time: s.now()})
				alive.seq = cursor - 1
				wanted = []*eventRecord{alive}
			}
		}
		via := client
		if !now.Verify {
			via = insecure
		}
		err := s.send(ctx, via, &now, bus.payload(now.Context, wanted))
		if err == nil {
			cursor, lost = next, false
			t.moved(c, cursor)
			t.mu.Lock()
			c.failed = 0
			t.mu.Unlock()
			continue
		}
		if ctx.Err() != nil || !t.retry(ctx, c, err) {
			return
		}
	}
}

func (t *subscriptions) moved(c *subscription, cursor uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.cursor = cursor
}

// retry does what the subscription's policy says after a delivery has failed; it reports whether to go on.
func (t *subscriptions) retry(ctx context.Context, c *subscription, err error) bool {
	t.mu.Lock()
	c.failed++
	failed, policy, wait := c.failed, c.Policy, time.Duration(t.file.Seconds)*time.Second
	gone := failed > t.file.Attempts
	t.mu.Unlock()
	t.svc.log.Info("deliver event", "subscription", c.ID, "destination", c.URI, "failed", failed, "err", err)
	switch {
	case gone && policy == retryTerminate:
		t.svc.log.Warn("a subscription ends as its destination cannot be reached", "subscription", c.ID, "destination", c.URI)
		if err := t.remove(c.ID); err != nil && !errors.Is(err, ErrNotFound) {
			t.svc.log.Error("remove subscription", "subscription", c.ID, "err", err)
		}
		return false
	case gone && policy == retrySuspend:
		t.svc.log.Warn("a subscription is suspended as its destination cannot be reached", "subscription", c.ID, "destination", c.URI)
		if err := t.change(c.ID, func(c *subscription) error { c.Suspended = true; return nil }); err != nil && !errors.Is(err, ErrNotFound) {
			t.svc.log.Error("suspend subscription", "subscription", c.ID, "err", err)
		}
		return false
	case policy == retryBackoff:
		wait = min(maxBackoff, wait<<min(failed-1, 12))
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(wait):
		return true
	}
}

// send delivers one payload. Any status but 2xx is a failure.
func (s *Service) send(ctx context.Context, client *http.Client, c *subscription, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URI, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json;charset=utf-8")
	req.Header.Set("OData-Version", "4.0")
	req.Header.Set("User-Agent", "Redfish")
	for k, v := range c.Headers {
		req.Header.Set(k, v)
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	io.CopyN(io.Discard, resp.Body, 16<<10) // so that the connection can be used again
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("the destination answers %s", resp.Status)
	}
	return nil
}

// parseHeaders reads HttpHeaders: objects of names and values.
func parseHeaders(list []map[string]any) (map[string]string, *Error) {
	bad := func(what string) *Error {
		return Because(400, "PropertyValueError", "HttpHeaders: "+what+".", "HttpHeaders").about("HttpHeaders")
	}
	out := map[string]string{}
	for _, one := range list {
		for name, v := range one {
			value, ok := v.(string)
			key := http.CanonicalHeaderKey(name)
			switch {
			case !ok:
				return nil, bad("a value is not a string")
			case name == "" || strings.ContainsFunc(name, func(r rune) bool {
				return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r))
			}):
				return nil, bad("a name is not the name of a header")
			case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
				return nil, bad("a value has control characters")
			case slices.Contains([]string{"Host", "Connection", "Content-Length", "Content-Type", "Transfer-Encoding", "Trailer", "Te", "Upgrade", "Keep-Alive", "Expect", "Odata-Version"}, key):
				return nil, bad("the header " + key + " is the service's to set")
			case len(value) > 4096 || len(out) >= 20:
				return nil, bad("there are too many, or a value is too long")
			}
			out[key] = value
		}
	}
	return out, nil
}

func (s *Service) eventRoutes() []Route {
	test := func(e Event) error {
		s.Publish(e)
		return nil
	}
	return []Route{
		{
			URI: eventsURI, Type: schema.TypeEventService,
			Get: func(*Request) (schema.Object, error) {
				s.subs.mu.Lock()
				attempts, seconds := s.subs.file.Attempts, s.subs.file.Seconds
				s.subs.mu.Unlock()
				return &schema.EventService{
					Resource: schema.Resource{Name: "Event Service"}, ServiceEnabled: true,
					DeliveryRetryAttempts: attempts, DeliveryRetryIntervalSeconds: seconds, EventFormatTypes: s.eventFormats(),
					RegistryPrefixes: s.registryPrefixes(), ResourceTypes: s.resourceTypes(),
					Severities:       []schema.Health{schema.HealthOK, schema.HealthWarning, schema.HealthCritical},
					ExcludeMessageID: true, ExcludeRegistryPrefix: true, OriginResourcesSupported: true, SubordinateResourcesSupported: true,
					ServerSentEventURI: streamURI,
					SSEFilterPropertiesSupported: &schema.SSEFilterPropertiesSupported{
						EventFormatType: true, MessageID: true, MetricReportDefinition: len(s.o.Telemetry.Metrics) > 0, OriginResource: true, RegistryPrefix: true, ResourceType: true, SubordinateResources: true,
					},
					Status:        &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
					Subscriptions: schema.LinkTo(subscriptionsURI),
				}, nil
			},
			Patch: &Patch{
				Properties: []Property{
					{Name: "DeliveryRetryAttempts", Kind: Number, Min: 0, Max: 100}, {Name: "DeliveryRetryIntervalSeconds", Kind: Number, Min: 1, Max: 3600},
				},
				Do: func(_ *Request, v Values) error {
					s.subs.mu.Lock()
					defer s.subs.mu.Unlock()
					if v.Has("DeliveryRetryAttempts") {
						s.subs.file.Attempts = int(v.Int("DeliveryRetryAttempts"))
					}
					if v.Has("DeliveryRetryIntervalSeconds") {
						s.subs.file.Seconds = int(v.Int("DeliveryRetryIntervalSeconds"))
					}
					return s.subs.store()
				},
			},
			Actions: []Action{
				{
					Name: "EventService.SubmitTestEvent",
					Parameters: []Property{
						{Name: "MessageId", Kind: String, Required: true, Min: 1, Max: 256}, {Name: "MessageArgs", Kind: StringArray},
						{Name: "Message", Kind: String, Max: 1024}, {Name: "MessageSeverity", Kind: String, Values: []string{"OK", "Warning", "Critical"}},
						{Name: "Severity", Kind: String, Max: 32}, {Name: "OriginOfCondition", Kind: String, Max: 512},
						{Name: "EventGroupId", Kind: Number}, {Name: "EventId", Kind: String, Max: 64}, {Name: "EventType", Kind: String, Max: 64},
						{Name: "EventTimestamp", Kind: String, Max: 64},
					},
					Do: func(r *Request, v Values) (*Reply, error) {
						e := Event{
							MessageID: v.String("MessageId"), Message: v.String("Message"), Severity: schema.Health(v.String("MessageSeverity")),
							Origin: v.String("OriginOfCondition"), Group: v.Int("EventGroupId"),
						}
						e.Args, _ = v["MessageArgs"].([]string)
						if len(e.Args) > 20 {
							return nil, checker{action: "EventService.SubmitTestEvent"}.bad("OutOfRange", "", "MessageArgs")
						}
						if at := v.String("EventTimestamp"); at != "" {
							t, err := time.Parse(time.RFC3339, at)
							if err != nil {
								return nil, checker{action: "EventService.SubmitTestEvent"}.bad("FormatError", at, "EventTimestamp")
							}
							e.Time = t
						}
						return nil, test(e)
					},
				},
				{
					Name: "EventService.TestEventSubscription",
					Do: func(*Request, Values) (*Reply, error) {
						return nil, test(Event{MessageID: resourceEvent + "TestMessage", Origin: eventsURI})
					},
				},
			},
		},
		{URI: streamURI, Type: schema.TypeEventService, Stream: s.stream},
		{
			URI: subscriptionsURI, Type: schema.TypeEventDestinationCollection, Name: "Event Subscriptions",
			Members: func(*Request) ([]string, error) { return s.subs.ids(), nil },
			Create:  &Create{Properties: s.subscriptionProperties(), Do: s.subscribe},
		},
		{
			URI: subscriptionsURI + "/{subscription}", Type: schema.TypeEventDestination,
			Get: func(r *Request) (schema.Object, error) {
				c, ok := s.subs.get(r.Param("subscription"))
				if !ok {
					return nil, ErrNotFound
				}
				return c.view(), nil
			},
			Patch: &Patch{
				Properties: []Property{
					{Name: "Context", Kind: String, Null: true, Max: 256}, {Name: "DeliveryRetryPolicy", Kind: String, Values: retryPolicies},
					{Name: "VerifyCertificate", Kind: Boolean}, {Name: "HttpHeaders", Kind: ObjectArray},
				},
				Do: s.changeSubscription,
			},
			Delete: func(r *Request) error { return s.subs.remove(r.Param("subscription")) },
			Available: func(r *Request, _ Action) bool {
				c, ok := s.subs.get(r.Param("subscription"))
				return ok && !c.stream
			},
			Actions: []Action{
				{
					Name: "EventDestination.SuspendSubscription",
					Do: func(r *Request, _ Values) (*Reply, error) {
						return nil, s.subs.change(r.Param("subscription"), func(c *subscription) error {
							if c.end != nil {
								c.end()
							}
							c.Suspended = true
							return nil
						})
					},
				},
				{
					Name:       "EventDestination.ResumeSubscription",
					Parameters: []Property{{Name: "DeliverBufferedEventDuration", Kind: String, Max: 64}},
					Do:         s.resume,
				},
			},
		},
	}
}

// resume goes on with a subscription that was suspended. Events since then that are still kept are delivered, or those that are not older
// than the client says.
func (s *Service) resume(r *Request, v Values) (*Reply, error) {
	age := time.Duration(-1)
	if v.Has("DeliverBufferedEventDuration") {
		var ok bool
		if age, ok = parseDuration(v.String("DeliverBufferedEventDuration")); !ok {
			return nil, checker{action: "EventDestination.ResumeSubscription"}.bad("FormatError", v.String("DeliverBufferedEventDuration"), "DeliverBufferedEventDuration")
		}
	}
	return nil, s.subs.change(r.Param("subscription"), func(c *subscription) error {
		if !c.Suspended {
			return nil
		}
		if age >= 0 {
			recs, next, _, _ := s.busOf(&c.Interest).since(c.cursor, maxEvents)
			i := slices.IndexFunc(recs, func(rec *eventRecord) bool { return s.now().Sub(rec.at) <= age })
			if age == 0 || i < 0 {
				c.cursor = next
			} else {
				c.cursor = recs[i].seq
			}
		}
		c.Suspended = false
		s.subs.deliver(c)
		return nil
	})
}

// parseDuration reads the durations of Redfish (ISO 8601 without years and months): P1DT2H3M4.5S.
func parseDuration(text string) (time.Duration, bool) {
	rest, ok := strings.CutPrefix(text, "P")
	if !ok || len(rest) > 40 {
		return 0, false
	}
	days, clock, hasClock := strings.Cut(rest, "T")
	var sum float64
	if days != "" {
		number, ok := strings.CutSuffix(days, "D")
		n, err := strconv.ParseUint(number, 10, 16)
		if !ok || err != nil {
			return 0, false
		}
		sum = float64(n) * 86400
	}
	for _, unit := range []struct {
		letter  byte
		seconds float64
	}{{'H', 3600}, {'M', 60}, {'S', 1}} {
		i := strings.IndexByte(clock, unit.letter)
		if i < 0 {
			continue
		}
		number := clock[:i]
		if number == "" || strings.Trim(number, "0123456789.") != "" || number[0] == '.' || unit.letter != 'S' && strings.Contains(number, ".") {
			return 0, false
		}
		n, err := strconv.ParseFloat(number, 64)
		if err != nil {
			return 0, false
		}
		sum += n * unit.seconds
		clock = clock[i+1:]
	}
	if clock != "" || days == "" && !hasClock || sum > 1e8 {
		return 0, false
	}
	return time.Duration(sum * float64(time.Second)), true
}

// subscriptionProperties are what a client can ask for. Those of other protocols and formats have one value each.
func (s *Service) subscriptionProperties() []Property {
	health := []string{"OK", "Warning", "Critical"}
	return []Property{
		{Name: "Destination", Kind: String, Required: true, Max: 1024},
		{Name: "Protocol", Kind: String, Required: true, Values: []string{"Redfish"}},
		{Name: "SubscriptionType", Kind: String, Values: []string{"RedfishEvent"}}, {Name: "EventFormatType", Kind: String, Values: s.eventFormats()},
		{Name: "MetricReportDefinitions", Kind: ObjectArray},
		{Name: "Name", Kind: String, Max: 256},
		{Name: "Context", Kind: String, Null: true, Max: 256}, {Name: "DeliveryRetryPolicy", Kind: String, Values: retryPolicies},
		{Name: "VerifyCertificate", Kind: Boolean}, {Name: "HttpHeaders", Kind: ObjectArray, Null: true},
		{Name: "RegistryPrefixes", Kind: StringArray, Allowed: func(*Request) []string { return s.registryPrefixes() }},
		{Name: "ExcludeRegistryPrefixes", Kind: StringArray, Allowed: func(*Request) []string { return s.registryPrefixes() }},
		{Name: "MessageIds", Kind: StringArray}, {Name: "ExcludeMessageIds", Kind: StringArray},
		{Name: "ResourceTypes", Kind: StringArray, Allowed: func(*Request) []string { return s.resourceTypes() }},
		{Name: "Severities", Kind: StringArray, Values: health},
		{Name: "OriginResources", Kind: ObjectArray}, {Name: "SubordinateResources", Kind: Boolean},
		{Name: "IncludeOriginOfCondition", Kind: Boolean},
		{Name: "SendHeartbeat", Kind: Boolean}, {Name: "HeartbeatIntervalMinutes", Kind: Number, Min: 1, Max: 65535},
		// Deprecated, and sent by clients all the same: all events of ours are of the type Other.
		{Name: "EventTypes", Kind: StringArray, Values: []string{"StatusChange", "ResourceUpdated", "ResourceAdded", "ResourceRemoved", "Alert", "Other"}},
	}
}

// subscribe makes a subscription that is pushed.
func (s *Service) subscribe(r *Request, v Values) (string, *Reply, error) {
	uri := v.String("Destination")
	if _, err := s.checkDestination(uri, "https", "http"); err != nil {
		return "", nil, Because(400, "PropertyValueError", "The destination cannot be used: "+err.Error()+".", "Destination").about("Destination")
	}
	c := &subscription{
		User: r.Caller.User, URI: uri, Context: v.String("Context"), Policy: v.String("DeliveryRetryPolicy"), Verify: v.Bool("VerifyCertificate"),
		Interest: interest{
			Registries: v.Strings("RegistryPrefixes"), ExcludeRegistries: v.Strings("ExcludeRegistryPrefixes"),
			Messages: v.Strings("MessageIds"), ExcludeMessages: v.Strings("ExcludeMessageIds"),
			Types: v.Strings("ResourceTypes"), Subordinate: v.Bool("SubordinateResources"),
		},
	}
	set(&c.Policy, retryBackoff)
	c.Interest.Reports = v.String("EventFormatType") == formatReport
	definitions, _ := v["MetricReportDefinitions"].([]map[string]any)
	for _, d := range definitions {
		uri, _ := d["@odata.id"].(string)
		if id, ok := strings.CutPrefix(uri, reportDefURI+"/"); !ok || !c.Interest.Reports || s.telemetry.definition(id) == nil {
			return "", nil, checker{}.bad("NotInList", show(d), "MetricReportDefinitions")
		}
		c.Interest.Definitions = append(c.Interest.Definitions, uri)
	}
	for _, h := range v.Strings("Severities") {
		c.Interest.Severities = append(c.Interest.Severities, schema.Health(h))
	}
	origins, _ := v["OriginResources"].([]map[string]any)
	for _, o := range origins {
		uri, ok := o["@odata.id"].(string)
		if !ok || !strings.HasPrefix(uri, "/") || len(uri) > 512 {
			return "", nil, checker{}.bad("FormatError", show(o), "OriginResources")
		}
		c.Interest.Origins = append(c.Interest.Origins, uri)
	}
	for _, pair := range [][2]string{{"RegistryPrefixes", "ExcludeRegistryPrefixes"}, {"MessageIds", "ExcludeMessageIds"}} {
		if len(v.Strings(pair[0])) > 0 && len(v.Strings(pair[1])) > 0 {
			return "", nil, refuse(400, "PropertyValueConflict", pair[0], pair[1]).about(pair[0])
		}
	}
	for _, name := range []string{"MessageIds", "ExcludeMessageIds", "RegistryPrefixes", "ExcludeRegistryPrefixes", "ResourceTypes", "Severities", "OriginResources"} {
		if len(v.Strings(name)) > 100 || len(origins) > 100 {
			return "", nil, checker{}.bad("OutOfRange", strconv.Itoa(len(v.Strings(name))), name)
		}
	}
	if v.Bool("IncludeOriginOfCondition") {
		return "", nil, refuse(400, "PropertyValueError", "IncludeOriginOfCondition").about("IncludeOriginOfCondition")
	}
	if v.Bool("SendHeartbeat") {
		c.Heartbeat = 60
		if v.Has("HeartbeatIntervalMinutes") {
			c.Heartbeat = int(v.Int("HeartbeatIntervalMinutes"))
		}
	}
	headers, _ := v["HttpHeaders"].([]map[string]any)
	var e *Error
	if c.Headers, e = parseHeaders(headers); e != nil {
		return "", nil, e
	}
	c.cursor = s.busOf(&c.Interest).end()
	if err := s.subs.add(c); err != nil {
		return "", nil, err
	}
	return c.ID, nil, nil
}

func (s *Service) changeSubscription(r *Request, v Values) error {
	headers, _ := v["HttpHeaders"].([]map[string]any)
	parsed, e := parseHeaders(headers)
	if e != nil {
		return e
	}
	return s.subs.change(r.Param("subscription"), func(c *subscription) error {
		if c.stream {
			return refuse(400, "PropertyNotUpdated", "Context").about("Context")
		}
		if v.Has("Context") {
			c.Context = v.String("Context")
		}
		if v.Has("DeliveryRetryPolicy") {
			c.Policy = v.String("DeliveryRetryPolicy")
		}
		if v.Has("VerifyCertificate") {
			c.Verify = v.Bool("VerifyCertificate")
		}
		if v.Has("HttpHeaders") {
			c.Headers = parsed
		}
		return nil
	})
}

// view is the subscription as a resource, without the headers, which hold secrets.
func (c *subscription) view() *schema.EventDestination {
	out := &schema.EventDestination{
		Resource: schema.Resource{ID: c.ID, Name: "Event Subscription " + c.ID}, Protocol: "Redfish", EventFormatType: formatEvent, Context: &c.Context,
		HTTPHeaders: []struct{}{}, Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
		RegistryPrefixes: c.Interest.Registries, ExcludeRegistryPrefixes: c.Interest.ExcludeRegistries,
		MessageIDs: c.Interest.Messages, ExcludeMessageIDs: c.Interest.ExcludeMessages, ResourceTypes: c.Interest.Types,
		Severities: c.Interest.Severities, OriginResources: []schema.Link{}, SubordinateResources: c.Interest.Subordinate,
	}
	for _, list := range []*[]string{&out.RegistryPrefixes, &out.ExcludeRegistryPrefixes, &out.MessageIDs, &out.ExcludeMessageIDs, &out.ResourceTypes} {
		if *list == nil {
			*list = []string{}
		}
	}
	if out.Severities == nil {
		out.Severities = []schema.Health{}
	}
	if c.Interest.Reports {
		out.EventFormatType = formatReport
		out.MetricReportDefinitions = []schema.Link{}
		for _, uri := range c.Interest.Definitions {
			out.MetricReportDefinitions = append(out.MetricReportDefinitions, schema.Link{ID: uri})
		}
	}
	for _, uri := range c.Interest.Origins {
		out.OriginResources = append(out.OriginResources, schema.Link{ID: uri})
	}
	if c.stream {
		out.SubscriptionType = "SSE"
		return out
	}
	verify, beats := c.Verify, c.Heartbeat > 0
	out.SubscriptionType, out.Destination, out.DeliveryRetryPolicy = "RedfishEvent", c.URI, c.Policy
	out.VerifyCertificate, out.SendHeartbeat, out.HeartbeatIntervalMinutes = &verify, &beats, c.Heartbeat
	switch {
	case c.Suspended:
		out.Status = &schema.Status{State: schema.StateDisabled, Health: schema.HealthOK}
		if c.failed > 0 {
			out.Status.Health = schema.HealthCritical
		}
	case c.failed > 0:
		out.Status.Health = schema.HealthWarning
	}
	return out
}

// eventFormats are the formats that a subscriber can have.
func (s *Service) eventFormats() []string {
	if len(s.o.Telemetry.Metrics) > 0 {
		return []string{formatEvent, formatReport}
	}
	return []string{formatEvent}
}

// registryPrefixes are the registries that events can be of.
func (s *Service) registryPrefixes() []string {
	out := []string{"Base"}
	for _, file := range eventFiles {
		prefix, _, _ := strings.Cut(file, ".")
		out = append(out, prefix)
	}
	for i := range s.o.Registries {
		out = append(out, s.o.Registries[i].Prefix)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// resourceTypes are the schemas that events can be about: those of all resources.
func (s *Service) resourceTypes() (names []string) {
	for _, n := range s.schemas {
		if n.version != "" && n.own == nil && n.name != "ActionInfo" {
			names = append(names, n.name)
		}
	}
	return names
}
