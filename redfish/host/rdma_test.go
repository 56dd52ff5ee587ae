package host

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// fakeRDMA notes what it is asked for.
type fakeRDMA struct {
	asked   []RDMARequest
	revoked []string
}

func (f *fakeRDMA) Lease(r RDMARequest) (RDMALease, error) {
	f.asked = append(f.asked, r)
	if r.Kind == "memory" && r.User != testUser {
		return RDMALease{}, fmt.Errorf("lease: %w", access.ErrDenied)
	}
	return RDMALease{ID: "7", User: r.User, Kind: r.Kind, QPN: 0x123456, RKey: 0xfedcba98, Start: "0x1000", Expires: bootTime}, nil
}

func (f *fakeRDMA) Revoke(id, user string) error {
	if id != "7" {
		return errors.New("no such lease")
	}
	f.revoked = append(f.revoked, user)
	return nil
}

func (f *fakeRDMA) State() RDMAState {
	return RDMAState{Addresses: []string{"10.0.0.2"}, Leases: []RDMALease{}, Dropped: 3, Counters: []RDMACounter{{"BadKey", 3}}}
}

func TestRDMA(t *testing.T) {
	f := &fakeRDMA{}
	svc := newTestServiceWith(t, newFakeAgent(), service.Options{}, func(o *Options) { o.RDMA = f })
	const lease, revoke = systemURI + "/Actions/Oem/BackdoorRDMA.Lease", systemURI + "/Actions/Oem/BackdoorRDMA.Revoke"
	status, body := do(t, svc, "POST", lease, testUser, map[string]any{
		"Kind": "memory", "Peer": "::ffff:10.0.0.1", "QPN": 17, "PSN": 0, "PathMTU": 1024, "Start": "0x100000000", "Length": 1 << 33, "Write": true, "Seconds": 60,
	})
	if status != 200 {
		t.Fatalf("lease: %d %s", status, body)
	}
	want := RDMARequest{User: testUser, Kind: "memory", Peer: netip.MustParseAddr("10.0.0.1"), QPN: 17, PathMTU: 1024, Start: 1 << 32, Length: 1 << 33, Write: true, Lifetime: time.Minute}
	if len(f.asked) != 1 || f.asked[0] != want {
		t.Errorf("asked %+v; want %+v", f.asked, want)
	}
	var l struct {
		ID, Start string
		QPN, RKey uint32
	}
	if err := json.Unmarshal(body, &l); err != nil || l.ID != "7" || l.QPN != 0x123456 || l.RKey != 0xfedcba98 || l.Start != "0x1000" {
		t.Errorf("lease %s: %v", body, err)
	}
	for _, c := range []struct {
		user   string
		body   map[string]any
		status int
	}{
		{"reader", map[string]any{"Kind": "health", "Peer": "10.0.0.1", "QPN": 17, "PSN": 1}, 200},
		{"reader", map[string]any{"Kind": "memory", "Peer": "10.0.0.1", "QPN": 17, "PSN": 1}, 403},
		{"", map[string]any{"Kind": "health", "Peer": "10.0.0.1", "QPN": 17, "PSN": 1}, 401},
		{testUser, map[string]any{"Kind": "tape", "Peer": "10.0.0.1", "QPN": 17, "PSN": 1}, 400},
		{testUser, map[string]any{"Kind": "health", "Peer": "nowhere", "QPN": 17, "PSN": 1}, 400},
		{testUser, map[string]any{"Kind": "health", "Peer": "10.0.0.1", "QPN": 1 << 24, "PSN": 1}, 400},
		{testUser, map[string]any{"Kind": "memory", "Peer": "10.0.0.1", "QPN": 17, "PSN": 1, "Start": "here"}, 400},
	} {
		if status, body := do(t, svc, "POST", lease, c.user, c.body); status != c.status {
			t.Errorf("%q asks for %v: %d %s; want %d", c.user, c.body, status, body, c.status)
		}
	}
	if status, _ := do(t, svc, "POST", revoke, "reader", map[string]any{"Lease": "7"}); status != 403 {
		t.Errorf("revoke by a reader: %d; want 403", status)
	}
	if status, _ := do(t, svc, "POST", revoke, testUser, map[string]any{"Lease": "8"}); status != 404 {
		t.Errorf("revoke of nothing: %d; want 404", status)
	}
	if status, body := do(t, svc, "POST", revoke, testUser, map[string]any{"Lease": "7"}); status != http.StatusNoContent || len(f.revoked) != 1 {
		t.Errorf("revoke: %d %s", status, body)
	}
	if status, body := do(t, svc, "GET", rdmaURI, "reader", nil); status != 200 || !strings.Contains(string(body), `"Dropped":3`) {
		t.Errorf("state: %d %s", status, body)
	}
	// Without RDMA there is none of it.
	svc = newTestServiceWith(t, newFakeAgent(), service.Options{}, func(o *Options) { o.RDMA = nil })
	if status, _ := do(t, svc, "GET", rdmaURI, testUser, nil); status != 404 {
		t.Errorf("state without RDMA: %d; want 404", status)
	}
	if status, _ := do(t, svc, "POST", lease, testUser, map[string]any{}); status != 404 {
		t.Errorf("lease without RDMA: %d; want 404", status)
	}
}

// do sends a request as a user: testUser, "reader" who may read only and is made when first needed, or nobody.
func do(t *testing.T, svc *service.Service, method, uri, user string, in any) (int, []byte) {
	t.Helper()
	send := func(method, uri, user string, in any) (int, []byte) {
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest(method, "https://x"+uri, bytes.NewReader(b))
		r.Header.Set("Content-Type", "application/json")
		if user != "" {
			r.SetBasicAuth(user, testPassword)
		}
		w := httptest.NewRecorder()
		svc.ServeHTTP(w, r)
		return w.Code, w.Body.Bytes()
	}
	if user == "reader" {
		if _, ok := svc.Caller(user); !ok {
			if status, b := send("POST", "/redfish/v1/AccountService/Accounts", testUser, map[string]any{"UserName": user, "Password": testPassword, "RoleId": "ReadOnly"}); status != 201 {
				t.Fatalf("make an account: %d %s", status, b)
			}
		}
	}
	return send(method, uri, user, in)
}
