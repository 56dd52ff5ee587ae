package hostpower

import (
	"context"
	"errors"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab/bmc"
)

// chassis is a machine behind ipmi_sim.
type chassis struct {
	mu  sync.Mutex
	on  bool
	did []string
}

func (c *chassis) do(what string, on bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.did, c.on = append(c.did, what), on
	return nil
}

func (c *chassis) Powered() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.on
}

func (c *chassis) given() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	did := c.did
	c.did = nil
	return did
}

func (c *chassis) PowerOn(context.Context) error    { return c.do("on", true) }
func (c *chassis) PowerOff(context.Context) error   { return c.do("off", false) }
func (c *chassis) PowerCycle(context.Context) error { return c.do("cycle", true) }
func (c *chassis) Reset(context.Context) error      { return c.do("reset", true) }
func (c *chassis) Shutdown(context.Context) error   { return c.do("shutdown", false) }
func (c *chassis) NMI(context.Context) error        { return c.do("nmi", true) }

func (c *chassis) Freeze(context.Context) error { return errors.ErrUnsupported }
func (c *chassis) Thaw(context.Context) error   { return errors.ErrUnsupported }

func (c *chassis) Status(context.Context) (string, error) { return "", errors.ErrUnsupported }

func (c *chassis) BootNext(device string, _ bool)         { _ = c.do("boot "+device, c.Powered()) }
func (c *chassis) NextBoot() (string, bool)               { return "", false }
func (c *chassis) InsertCD(context.Context, string) error { return errors.ErrUnsupported }

// simulator starts ipmi_sim with a chassis.
func simulator(t *testing.T) (*chassis, *bmc.IPMI) {
	t.Helper()
	if _, err := exec.LookPath("ipmitool"); err != nil {
		t.Fatal("ipmitool is not installed; make setup installs it")
	}
	m := &chassis{on: true}
	s, err := bmc.StartIPMI(t.Context(), m, t.TempDir())
	if errors.Is(err, bmc.ErrNoSimulator) {
		t.Fatal("ipmi_sim (Debian package openipmi) is not installed; make setup installs it")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, s
}

func TestIPMI(t *testing.T) {
	t.Parallel()
	m, s := simulator(t)
	c := connect(t, Options{IPMI: s.Address, Username: s.User, Password: s.Password})
	ctx := t.Context()
	for _, step := range []struct {
		name  string
		do    func(context.Context) error
		want  []string
		after string
	}{
		{"off", c.Off, []string{"off"}, Off},
		{"on", c.On, []string{"on"}, On},
		// The simulator makes two orders of a cycle, a second apart.
		{"cycle", c.Cycle, []string{"off", "on"}, On},
		{"shutdown", c.GracefulShutdown, []string{"shutdown"}, Off},
		{"cycle when off", c.Cycle, []string{"on"}, On},
	} {
		if err := step.do(ctx); err != nil {
			t.Fatalf("%s = %v", step.name, err)
		}
		if got, err := c.State(ctx); err != nil || got != step.after {
			t.Errorf("after %s: State() = %q, %v; want %q", step.name, got, err, step.after)
		}
		deadline := time.Now().Add(5 * time.Second)
		var got []string
		for !slices.Equal(got, step.want) && time.Now().Before(deadline) {
			got = append(got, m.given()...)
			time.Sleep(10 * time.Millisecond)
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("%s did %q; want %q", step.name, got, step.want)
		}
	}
	if err := c.Order(ctx, heal.OrderButton); !errors.Is(err, errNoRedfish) {
		t.Errorf("Order(button) by IPMI = %v; want %v", err, errNoRedfish)
	}
	if _, err := c.Describe(ctx); !errors.Is(err, errNoRedfish) {
		t.Errorf("Describe() by IPMI = %v; want %v", err, errNoRedfish)
	}
	c.o.Password = "wrong"
	if err := c.Off(ctx); err == nil || strings.Contains(err.Error(), "hunter2") || !m.Powered() {
		t.Errorf("Off with a wrong password = %v", err)
	}
}

// TestLadder wants IPMI to be asked when Redfish is silent, first for the next minute, and both failures to be named.
func TestLadder(t *testing.T) {
	t.Parallel()
	m, s := simulator(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close() // accepts into the backlog and never answers
	o := Options{URL: "https://" + silent.Addr().String(), IPMI: s.Address, Username: s.User, Password: s.Password, OpenTimeout: 3 * time.Second}
	c := connect(t, o)
	if err := c.Off(t.Context()); err != nil || m.Powered() {
		t.Fatalf("Off() with a silent Redfish = %v, powered %v", err, m.Powered())
	}
	start := time.Now()
	if err := c.On(t.Context()); err != nil || !m.Powered() {
		t.Errorf("On() = %v, powered %v", err, m.Powered())
	}
	if took := time.Since(start); took > o.OpenTimeout {
		t.Errorf("the second order took %v: the silent way was tried first again", took)
	}

	o.Password, o.Timeout = "wrong", 10*time.Second
	_, err = connect(t, o).State(t.Context())
	if err == nil || !strings.Contains(err.Error(), o.URL) || !strings.Contains(err.Error(), "nothing after 3s") || !strings.Contains(err.Error(), "ipmi://"+s.Address) {
		t.Errorf("State() that fails on both ways = %v; want both named", err)
	}
}

// An order that a BMC has taken is not given to another way if twice is not the same as once.
func TestNotTwice(t *testing.T) {
	t.Parallel()
	m, s := simulator(t)
	red := &machine{state: schema.PowerOff}
	o := bmcOptions(t, red)
	o.IPMI, o.OffOn, o.Timeout = s.Address, true, 4*time.Second
	c := connect(t, o)
	red.mu.Lock()
	red.state, red.stuck = schema.PowerOn, true
	red.mu.Unlock()
	// Taking the power away may be tried again by the other way; there the password is wrong, so that both fail.
	err := c.Off(t.Context())
	if err == nil || !strings.Contains(err.Error(), "ipmi://") || !errors.Is(err, ErrState) {
		t.Errorf("Off() of a stuck BMC = %v; want both ways tried", err)
	}
	c.o.OffOn = false
	red.mu.Lock()
	red.state, red.orders = schema.PowerOn, nil
	red.mu.Unlock()
	if err := c.Cycle(t.Context()); err != nil {
		t.Errorf("Cycle() = %v", err)
	}
	if got := m.given(); len(got) > 0 {
		t.Errorf("IPMI was told %q", got)
	}
}

func TestOrderByRedfish(t *testing.T) {
	t.Parallel()
	red := &machine{state: schema.PowerOn}
	c := connect(t, bmcOptions(t, red))
	if err := c.Order(t.Context(), heal.OrderReset); err != nil {
		t.Fatal(err)
	}
	if err := c.Order(t.Context(), heal.OrderPowerCycle); err != nil {
		t.Fatal(err)
	}
	if want := []schema.ResetType{"ForceRestart", "PowerCycle"}; !slices.Equal(red.given(), want) {
		t.Errorf("orders = %v; want %v", red.given(), want)
	}
	if err := c.Order(t.Context(), heal.OrderButton); err == nil || !strings.Contains(err.Error(), "PushPowerButton") {
		t.Errorf("Order(button) that the BMC does not offer = %v; want it named", err)
	}
	m, err := c.Describe(t.Context())
	if err != nil || !slices.Contains(m.Resets, schema.ResetNMI) || m.Boot != nil || m.Media != nil {
		t.Errorf("Describe() = %+v, %v", m, err)
	}
}
