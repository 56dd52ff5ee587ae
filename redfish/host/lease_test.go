package host

import (
	"bytes"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// operator makes a user with a role that has the privileges, and returns its client.
func operator(t *testing.T, c *client.Client, url, user string, oem ...string) *client.Client {
	t.Helper()
	if _, err := c.Post(t.Context(), "/redfish/v1/AccountService/Roles", map[string]any{
		"RoleId": "Role" + user, "AssignedPrivileges": []string{"Login", "ConfigureComponents", "ConfigureSelf"}, "OemPrivileges": oem,
	}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Post(t.Context(), "/redfish/v1/AccountService/Accounts", map[string]any{"UserName": user, "Password": "correct horse 2", "RoleId": "Role" + user}, nil); err != nil {
		t.Fatal(err)
	}
	out, err := client.New(client.Config{URL: url, User: user, Password: "correct horse 2", Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.Close(t.Context()) })
	return out
}

func status(err error) int {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

// TestLeases reads and stores under leases, and is refused whatever is not covered by one.
func TestLeases(t *testing.T) {
	a := newFakeAgent()
	c, url := connectAt(t, a)
	const start = 0x100000
	if _, err := c.LeaseMemory(t.Context(), client.LeaseRequest{Start: start, Length: 4096}); status(err) != 403 {
		t.Errorf("an administrator without the privilege: %v; want 403", err)
	}
	m, other := operator(t, c, url, "mem", PrivilegeMemory), operator(t, c, url, "other", PrivilegeMemory)
	l, err := m.LeaseMemory(t.Context(), client.LeaseRequest{Start: start, Length: 8192, Seconds: 600, Write: true})
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 100)
	if _, err := (testMemory{}).ReadAt(want, start+50); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := m.ReadMemory(t.Context(), l, start+50, 100, &got); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("read = %x, %v; want %x", got.Bytes(), err, want)
	}
	if err := c.Get(t.Context(), l.DataURI, nil); status(err) != 403 {
		t.Errorf("the administrator reads: %v; want 403", err)
	}
	if err := other.ReadMemory(t.Context(), l, start, 1, &got); status(err) != 403 {
		t.Errorf("somebody else reads under the lease: %v; want 403", err)
	}
	for name, test := range map[string]struct {
		c    *client.Client
		r    client.LeaseRequest
		want int
	}{
		"a part overlaps":         {other, client.LeaseRequest{Start: start + 4096, Length: 8192, Write: true}, 409},
		"no RAM":                  {m, client.LeaseRequest{Start: 0xa0000, Length: 1}, 400},
		"over the end of RAM":     {m, client.LeaseRequest{Start: 512<<20 - 1, Length: 2}, 400},
		"nothing":                 {m, client.LeaseRequest{Start: start, Length: 0}, 400},
		"for ever":                {m, client.LeaseRequest{Start: start, Length: 1, Seconds: 1 << 20}, 400},
		"wraps around":            {m, client.LeaseRequest{Start: 1<<64 - 1, Length: 2}, 400},
		"what is read by another": {other, client.LeaseRequest{Start: start, Length: 8192}, 0},
	} {
		if _, err := test.c.LeaseMemory(t.Context(), test.r); status(err) != test.want {
			t.Errorf("%s: %v; want %d", name, err, test.want)
		}
	}
	for _, step := range []struct {
		who         *client.Client
		at          uint64
		expect, put string
		want        int
	}{
		{m, start + 8, "\x01\x02", "\x03\x04", 0}, {m, start + 8, "\x03\x04", "\x05\x06", 0},
		{m, start + 8, "\x01\x02", "\x07\x08", 409}, // it is no longer there
		{m, start + 8, "\x05\x06", "\x07", 400}, {m, start + 8191, "\x05\x06", "\x07\x08", 400}, {m, start - 1, "\x05\x06", "\x07\x08", 400},
		{other, start + 8, "\x05\x06", "\x07\x08", 403}, {c, start + 8, "\x05\x06", "\x07\x08", 403},
	} {
		if err := step.who.StoreMemory(t.Context(), l, step.at, []byte(step.expect), []byte(step.put)); status(err) != step.want {
			t.Errorf("store %x at %#x: %v; want %d", step.put, step.at, err, step.want)
		}
	}
	// Somebody else may say yes, and nobody to what is their own.
	for _, step := range []struct {
		who  *client.Client
		id   string
		want int
	}{{m, l.ID, 403}, {c, l.ID, 403}, {other, "99", 404}} {
		if err := step.who.CosignLease(t.Context(), step.id); status(err) != step.want {
			t.Errorf("cosign %s: %v; want %d", step.id, err, step.want)
		}
	}
	if a.stores[1].Second != "" {
		t.Errorf("a store that nobody has co-signed: %+v", a.stores[1])
	}
	if err := other.CosignLease(t.Context(), l.ID); err != nil {
		t.Error(err)
	}
	if n := len(a.stores); n != 2 || a.stores[0].Caller != "mem" {
		t.Fatalf("%d stores reached the engine: %+v", n, a.stores)
	}
	if err := m.UndoStores(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if n := len(a.stores); n != 4 || string(a.stores[3].Put) != "\x01\x02" || string(a.stores[3].Expect) != "\x03\x04" || a.stores[3].Second != "other" {
		t.Errorf("undo has made of the stores %+v", a.stores)
	}
	l, err = m.Lease(t.Context(), l.URI)
	if err != nil || len(l.Stores) != 2 || !l.Stores[0].Undone || l.Stores[0].Plan != "plan-9" || l.Stores[0].How != "compare-and-swap" {
		t.Errorf("lease = %+v, %v", l, err)
	}
	if err := m.UndoStores(t.Context(), l); err != nil || len(a.stores) != 4 {
		t.Errorf("undoing again: %v, %d stores", err, len(a.stores))
	}
	// Another kernel is another memory.
	a.mu.Lock()
	k := *a.state.Kernel
	k.BootID = "another"
	a.state.Kernel = &k
	a.mu.Unlock()
	if err := m.ReadMemory(t.Context(), l, start, 1, &got); status(err) != 404 {
		t.Errorf("read after a reboot: %v; want 404", err)
	}
}

// TestLeaseEnds wants a lease to end by its time, by its owner, and with the agreement.
func TestLeaseEnds(t *testing.T) {
	a := newFakeAgent()
	c, url := connectAt(t, a)
	m := operator(t, c, url, "mem", PrivilegeMemory)
	var leases []*client.Lease
	for range maxUserLeases {
		l, err := m.LeaseMemory(t.Context(), client.LeaseRequest{Start: 0x100000, Length: 4096, Seconds: 2})
		if err != nil {
			t.Fatal(err)
		}
		leases = append(leases, l)
	}
	if _, err := m.LeaseMemory(t.Context(), client.LeaseRequest{Start: 0x100000, Length: 4096}); status(err) != http.StatusServiceUnavailable {
		t.Errorf("one more: %v; want 503", err)
	}
	if err := m.StoreMemory(t.Context(), leases[1], 0x100000, []byte{1}, []byte{2}); status(err) != 403 {
		t.Errorf("a store under a lease to read: %v; want 403", err)
	}
	if err := m.EndLease(t.Context(), leases[0]); err != nil {
		t.Fatal(err)
	}
	if err := m.ReadMemory(t.Context(), leases[0], 0x100000, 1, &bytes.Buffer{}); status(err) != 404 {
		t.Errorf("read under a lease that was ended: %v; want 404", err)
	}
	a.mu.Lock()
	a.denied = access.ErrDenied
	a.mu.Unlock()
	if err := m.ReadMemory(t.Context(), leases[1], 0x100000, 1, &bytes.Buffer{}); status(err) != 403 {
		t.Errorf("read without the agreement: %v; want 403", err)
	}
	a.mu.Lock()
	a.denied = nil
	a.mu.Unlock()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := m.ReadMemory(t.Context(), leases[1], 0x100000, 1, &bytes.Buffer{})
		if status(err) == 404 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("read long after the lease's end: %v", err)
		}
	}
	if time.Now().Before(leases[1].Expires) {
		t.Error("the lease has ended too early")
	}
}
