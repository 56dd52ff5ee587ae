package hostpower

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	user     = "admin"
	password = "correct horse battery"
)

// machine is the power of a host that the BMC of these tests switches.
type machine struct {
	mu      sync.Mutex
	state   schema.PowerState  // guarded by mu
	orders  []schema.ResetType // guarded by mu
	refuse  schema.ResetType   // an order that the BMC does not offer
	stuck   bool               // orders are accepted and nothing happens
	lag     time.Duration      // until an order takes effect
	silence chan struct{}      // if not nil, State blocks until it is closed
}

func (m *machine) State(ctx context.Context) (schema.PowerState, error) {
	if m.silence != nil {
		select {
		case <-m.silence:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state, nil
}

func (m *machine) Types() []schema.ResetType {
	all := []schema.ResetType{"On", "ForceOff", "ForceRestart", "GracefulShutdown", "Nmi", "PowerCycle"}
	return slices.DeleteFunc(all, func(t schema.ResetType) bool { return t == m.refuse })
}

func (m *machine) Reset(_ context.Context, t schema.ResetType) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.orders = append(m.orders, t)
	if m.stuck {
		return nil
	}
	to := map[schema.ResetType]schema.PowerState{"On": schema.PowerOn, "ForceOff": schema.PowerOff, "ForceRestart": schema.PowerOn,
		"PowerCycle": schema.PowerOn, "GracefulShutdown": schema.PowerOff}[t]
	if to == "" {
		return nil
	}
	if m.lag == 0 {
		m.state = to
		return nil
	}
	time.AfterFunc(m.lag, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.state = to
	})
	return nil
}

func (m *machine) given() []schema.ResetType {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.orders)
}

// bmcOptions starts a BMC on loopback and returns how to reach it.
func bmcOptions(t *testing.T, m *machine) Options {
	t.Helper()
	s, err := service.New(service.Options{StateDir: t.TempDir(), Account: &service.Credential{User: user, Password: password},
		Limits: service.Limits{Hash: service.HashCost{Memory: 64, Passes: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	s.Handle(service.BMC(s, service.BMCOptions{Power: m})...)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(ctx, l); err != nil && ctx.Err() == nil {
			t.Errorf("serve BMC: %v", err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return Options{URL: "https://" + l.Addr().String(), Username: user, Password: password, Roots: roots,
		Timeout: 20 * time.Second, Hold: time.Millisecond}
}

func connect(t *testing.T, o Options) *Client {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.poll = 10 * time.Millisecond
	return c
}

func TestOrders(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before schema.PowerState
		offOn  bool
		order  func(*Client, context.Context) error
		want   []schema.ResetType
		after  string
	}{
		{"on", schema.PowerOff, false, (*Client).On, []schema.ResetType{"On"}, On},
		{"on when on", schema.PowerOn, false, (*Client).On, nil, On},
		{"off", schema.PowerOn, false, (*Client).Off, []schema.ResetType{"ForceOff"}, Off},
		{"off when off", schema.PowerOff, false, (*Client).Off, nil, Off},
		{"cycle", schema.PowerOn, false, (*Client).Cycle, []schema.ResetType{"ForceRestart"}, On},
		{"cycle when off", schema.PowerOff, false, (*Client).Cycle, []schema.ResetType{"On"}, On},
		{"cycle by off and on", schema.PowerOn, true, (*Client).Cycle, []schema.ResetType{"ForceOff", "On"}, On},
		{"NMI", schema.PowerOn, false, (*Client).NMI, []schema.ResetType{"Nmi"}, On},
		{"soft", schema.PowerOn, false, (*Client).GracefulShutdown, []schema.ResetType{"GracefulShutdown"}, Off},
		{"soft when off", schema.PowerOff, false, (*Client).GracefulShutdown, nil, Off},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := &machine{state: tt.before}
			o := bmcOptions(t, m)
			o.OffOn = tt.offOn
			c := connect(t, o)
			if err := tt.order(c, t.Context()); err != nil {
				t.Fatalf("order: %v", err)
			}
			if got := m.given(); !slices.Equal(got, tt.want) {
				t.Errorf("orders = %v; want %v", got, tt.want)
			}
			if got, err := c.State(t.Context()); got != tt.after || err != nil {
				t.Errorf("State() = %q, %v; want %q", got, err, tt.after)
			}
		})
	}
}

func TestSlowPower(t *testing.T) {
	m := &machine{state: schema.PowerOn, lag: 200 * time.Millisecond}
	c := connect(t, bmcOptions(t, m))
	if err := c.Off(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, _ := m.State(t.Context()); s != schema.PowerOff {
		t.Errorf("Off returned while the power was %q", s)
	}
}

func TestUnknownState(t *testing.T) {
	for _, s := range []schema.PowerState{"PoweringOn", "PoweringOff", ""} {
		c := connect(t, bmcOptions(t, &machine{state: s}))
		if got, err := c.State(t.Context()); got != Unknown || err != nil {
			t.Errorf("State() of a BMC that says %q = %q, %v; want %q", s, got, err, Unknown)
		}
	}
	for in, want := range map[string]string{
		"On": On, "Chassis Power is on\n": On, "Chassis Power is off\n": Off, "OFF": Off, "x": Unknown, "Paused": Paused,
		"IANA PEN registry open failed: No such file or directory\nChassis Power is on\n": On} {
		if got := normal(in); got != want {
			t.Errorf("normal(%q) = %q; want %q", in, got, want)
		}
	}
}

// An order that was accepted and did nothing is not a success.
func TestStuck(t *testing.T) {
	m := &machine{state: schema.PowerOn, stuck: true}
	o := bmcOptions(t, m)
	o.Timeout = 2 * time.Second
	err := connect(t, o).Off(t.Context())
	if !errors.Is(err, ErrState) || !strings.Contains(err.Error(), `the BMC last said "on"`) {
		t.Errorf("Off() of a stuck machine = %v; want ErrState", err)
	}
}

// bmclib's own "reset" would report success here after nine seconds, with the host still running.
func TestRefused(t *testing.T) {
	m := &machine{state: schema.PowerOn, refuse: "ForceRestart"}
	err := connect(t, bmcOptions(t, m)).Cycle(t.Context())
	if err == nil || !strings.Contains(err.Error(), "ForceRestart") {
		t.Errorf("Cycle() refused by the BMC = %v; want an error that names ForceRestart", err)
	}
	if got := m.given(); len(got) > 0 {
		t.Errorf("orders = %v; want none", got)
	}
	m = &machine{state: schema.PowerOn, refuse: "GracefulShutdown"}
	if err := connect(t, bmcOptions(t, m)).GracefulShutdown(t.Context()); err == nil {
		t.Error("GracefulShutdown() refused by the BMC = nil")
	}
}

func TestTrust(t *testing.T) {
	m := &machine{state: schema.PowerOn}
	o := bmcOptions(t, m)
	certs := o.Roots
	o.Roots = x509.NewCertPool()
	_, err := connect(t, o).State(t.Context())
	if err == nil || !strings.Contains(err.Error(), "certificate signed by unknown authority") {
		t.Errorf("State() with no trusted certificate = %v; want a refusal", err)
	}

	o.Pin = strings.Repeat("00", 32)
	if _, err := connect(t, o).State(t.Context()); err == nil || !strings.Contains(err.Error(), "not the pinned one") {
		t.Errorf("State() with another pin = %v; want a refusal", err)
	}
	sum := sha256.Sum256(leaf(t, o.URL, certs))
	o.Pin = hex.EncodeToString(sum[:])
	if got, err := connect(t, o).State(t.Context()); got != On || err != nil {
		t.Errorf("State() with the right pin = %q, %v; want %q", got, err, On)
	}
}

func TestWrongPassword(t *testing.T) {
	o := bmcOptions(t, &machine{state: schema.PowerOn})
	o.Password = "wrong"
	if _, err := connect(t, o).State(t.Context()); err == nil || strings.Contains(err.Error(), "wrong\"") {
		t.Errorf("State() with a wrong password = %v; want an error without the password", err)
	}
}

func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // accepts into the backlog and never answers
	c := connect(t, Options{URL: "https://" + l.Addr().String(), Username: user, Password: password, Timeout: 300 * time.Millisecond})
	start := time.Now()
	_, err = c.State(t.Context())
	if err == nil || !strings.Contains(err.Error(), "the host's BMC took longer than 300ms") {
		t.Errorf("State() of a silent BMC = %v; want the time-out", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("State() of a silent BMC took %v", took)
	}
}

// gofish does not know the context; the connection must end with it all the same.
func TestCancel(t *testing.T) {
	m := &machine{state: schema.PowerOn, silence: make(chan struct{})}
	defer close(m.silence)
	c := connect(t, bmcOptions(t, m))
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(200*time.Millisecond, cancel)
	start := time.Now()
	if _, err := c.State(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("State() canceled = %v; want context.Canceled", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("State() took %v after it was canceled", took)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, o := range []Options{{}, {URL: "http://x"}, {URL: "https://"}, {URL: "https://x", Pin: "12"}} {
		if _, err := New(o); err == nil {
			t.Errorf("New(%+v) = nil error", o)
		}
	}
}

// leaf returns the certificate that the server at url shows.
func leaf(t *testing.T, url string, roots *x509.CertPool) []byte {
	t.Helper()
	conn, err := tls.Dial("tcp", strings.TrimPrefix(url, "https://"), &tls.Config{RootCAs: roots})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].Raw
}
