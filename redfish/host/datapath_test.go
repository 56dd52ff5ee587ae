package host

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Contain notes the order, and has it hold.
func (a *fakeAgent) Contain(_ context.Context, o heal.NetworkOrder, caller string) (heal.Outcome, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.denied != nil {
		return heal.Outcome{}, a.denied
	}
	if err := o.Check(); err != nil {
		return heal.Outcome{}, errors.Join(err, heal.ErrInvalidPlan)
	}
	a.orders = append(a.orders, o)
	until := time.Now().Add(o.For)
	switch {
	case o.Do == heal.Release:
		a.contained = nil
	case o.Do == heal.RateLimit:
		a.contained = &heal.Containment{Limit: until, Rate: o.Rate, Burst: o.Burst}
	case o.Remote != nil:
		a.contained = &heal.Containment{Blocked: []heal.Blocked{{Remote: *o.Remote, Until: until}}}
	default:
		a.contained = &heal.Containment{Quarantine: until, Allow: o.Allow}
	}
	return heal.Outcome{Caller: caller}, nil
}

// fakeDatapath has seen a little traffic.
type fakeDatapath struct{}

func (fakeDatapath) State() (DatapathState, error) {
	return DatapathState{HostPort: "eth1", UplinkPort: "eth2", Flows: []DatapathFlow{}, Counters: []DatapathCounter{
		{"host", "forwarded", 10, 1000}, {"host", "quarantined", 3, 300}, {"uplink", "forwarded", 20, 2000}, {"uplink", "closed", 1, 60}, {"uplink", "passed", 2, 200},
	}}, nil
}

func TestDatapath(t *testing.T) {
	a := newFakeAgent()
	svc := newTestServiceWith(t, a, service.Options{}, func(o *Options) { o.Datapath = fakeDatapath{} })
	const actions = systemURI + "/Actions/Oem/BackdoorDatapath."
	for _, c := range []struct {
		user, action string
		body         map[string]any
		status       int
		want         heal.NetworkOrder
	}{
		{testUser, "Quarantine", nil, http.StatusNoContent, heal.NetworkOrder{Do: heal.Quarantine, For: heal.ContainFor}},
		{testUser, "Quarantine", map[string]any{"Seconds": 60, "Allow": []string{"192.0.2.1", "2001:db8::7/32"}}, http.StatusNoContent,
			heal.NetworkOrder{Do: heal.Quarantine, For: time.Minute, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::/32")}}},
		{testUser, "Quarantine", map[string]any{"Remote": "::ffff:192.0.2.1", "Protocol": 6, "Port": 443}, http.StatusNoContent,
			heal.NetworkOrder{Do: heal.Quarantine, For: heal.ContainFor, Remote: &heal.Remote{Addr: netip.MustParseAddr("192.0.2.1"), Proto: 6, Port: 443}}},
		{testUser, "RateLimit", map[string]any{"BytesPerSecond": 4096}, http.StatusNoContent,
			heal.NetworkOrder{Do: heal.RateLimit, For: heal.ContainFor, Rate: 4096, Burst: heal.LimitBurst}},
		{testUser, "Release", nil, http.StatusNoContent, heal.NetworkOrder{Do: heal.Release}},
		{"reader", "Quarantine", nil, 403, heal.NetworkOrder{}},
		{"", "Release", nil, 401, heal.NetworkOrder{}},
		{testUser, "Quarantine", map[string]any{"Allow": []string{"everybody"}}, 400, heal.NetworkOrder{}},
		{testUser, "Quarantine", map[string]any{"Remote": "nobody"}, 400, heal.NetworkOrder{}},
		{testUser, "Quarantine", map[string]any{"Remote": "192.0.2.1", "Port": 443}, 400, heal.NetworkOrder{}},
		{testUser, "Quarantine", map[string]any{"Port": 443}, 400, heal.NetworkOrder{}},
		{testUser, "Quarantine", map[string]any{"Seconds": 0}, 400, heal.NetworkOrder{}},
		{testUser, "RateLimit", map[string]any{"BurstBytes": 5}, 400, heal.NetworkOrder{}},
	} {
		before := len(a.orders)
		body := c.body
		if body == nil {
			body = map[string]any{}
		}
		status, answer := do(t, svc, "POST", actions+c.action, c.user, body)
		if status != c.status {
			t.Errorf("%q asks for %s %v: %d %s; want %d", c.user, c.action, c.body, status, answer, c.status)
		}
		if c.status != http.StatusNoContent {
			if len(a.orders) != before {
				t.Errorf("%s %v was ordered", c.action, c.body)
			}
			continue
		}
		opt := cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})
		if len(a.orders) != before+1 || !cmp.Equal(a.orders[before], c.want, opt) {
			t.Errorf("%s %v: ordered %+v; want %+v", c.action, c.body, a.orders[before:], c.want)
		}
	}
	a.denied = access.ErrDenied
	if status, _ := do(t, svc, "POST", actions+"Quarantine", testUser, map[string]any{}); status != 403 {
		t.Errorf("quarantine that the agreement does not permit: %d; want 403", status)
	}
	a.denied = nil
	do(t, svc, "POST", actions+"RateLimit", testUser, map[string]any{})
	for _, c := range []struct {
		uri  string
		want []string
	}{
		{datapathURI, []string{`"Verdict":"quarantined"`, `"BytesPerSecond":32768`, `"HostPort":"eth1"`}},
		{adapterURI, []string{`/NetworkDeviceFunctions"`}},
		{adapterURI + "/NetworkDeviceFunctions", []string{functionURI}},
		{functionURI, []string{`"SustainedBytesPerSecond":32768`, `"Enabled"`}},
		{functionURI + "/Metrics", []string{`"TXFrames":13`, `"TXBytes":1300`, `"RXFrames":20`, `"RXBytes":2000`}},
		{adapterURI + "/Ports/eth1/Metrics", []string{`"RXFrames":13`, `"RXDiscards":3`, `"TXFrames":20`}},
		{adapterURI + "/Ports/eth2/Metrics", []string{`"RXFrames":23`, `"RXDiscards":1`, `"TXFrames":10`}},
	} {
		status, body := do(t, svc, "GET", c.uri, "reader", nil)
		if status != 200 || slices.ContainsFunc(c.want, func(s string) bool { return !strings.Contains(string(body), s) }) {
			t.Errorf("GET %s: %d %s; want %q", c.uri, status, body, c.want)
		}
		if !json.Valid(body) {
			t.Errorf("GET %s: no JSON", c.uri)
		}
	}
	do(t, svc, "POST", actions+"Quarantine", testUser, map[string]any{})
	if _, body := do(t, svc, "GET", functionURI, "reader", nil); !strings.Contains(string(body), `"Quiesced"`) {
		t.Errorf("the function of a quarantined host: %s", body)
	}
	if status, _ := do(t, svc, "GET", adapterURI+"/Ports/eth9/Metrics", testUser, nil); status != 404 {
		t.Errorf("metrics of no port: %d; want 404", status)
	}
	// Without a packet path there is none of it.
	svc = newTestServiceWith(t, newFakeAgent(), service.Options{}, func(o *Options) { o.Datapath = nil })
	if status, _ := do(t, svc, "GET", datapathURI, testUser, nil); status != 404 {
		t.Errorf("state without a packet path: %d; want 404", status)
	}
	if status, _ := do(t, svc, "POST", actions+"Release", testUser, map[string]any{}); status != 404 {
		t.Errorf("release without a packet path: %d; want 404", status)
	}
}
