package bmc

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/bmc-toolbox/bmclib/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// fake is a machine that writes down what is done to it.
type fake struct {
	mu     sync.Mutex
	on     bool
	frozen bool
	did    []string

	boot string
	once bool
	cd   string // content of the image
}

func (f *fake) do(what string, on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.did, f.on = append(f.did, what), on
	return nil
}

func (f *fake) Powered() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.on
}

func (f *fake) PowerOn(context.Context) error    { return f.do("on", true) }
func (f *fake) PowerOff(context.Context) error   { return f.do("off", false) }
func (f *fake) PowerCycle(context.Context) error { return f.do("cycle", true) }
func (f *fake) Reset(context.Context) error      { return f.do("reset", true) }
func (f *fake) Shutdown(context.Context) error   { return f.do("shutdown", f.Powered()) }
func (f *fake) NMI(context.Context) error        { return f.do("nmi", true) }

func (f *fake) Freeze(context.Context) error { return f.freeze(true) }
func (f *fake) Thaw(context.Context) error   { return f.freeze(false) }

func (f *fake) freeze(frozen bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frozen = frozen
	return nil
}

func (f *fake) Status(context.Context) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case !f.on:
		return "off", nil
	case f.frozen:
		return "paused", nil
	}
	return "running", nil
}

func (f *fake) BootNext(device string, once bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.boot, f.once = device, once
}

func (f *fake) NextBoot() (string, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.boot, f.once
}

func (f *fake) disc() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cd
}

func (f *fake) InsertCD(_ context.Context, path string) error {
	b, err := os.ReadFile(path)
	if path != "" && err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cd = string(b)
	return nil
}

// The BMC must be one that a stranger's client can use.
func TestBmclib(t *testing.T) {
	m := new(fake)
	b, err := Start(Options{Machine: m, UUID: "4c4c4544-0000-4000-8000-000000000001", MemoryGiB: 0.5, CPUs: 2, StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(b.CA) {
		t.Fatal("the CA is no certificate")
	}
	c := bmclib.NewClient("127.0.0.1", b.User, b.Password,
		bmclib.WithRedfishPort(b.URL[len("https://127.0.0.1:"):]), bmclib.WithSecureTLS(roots), bmclib.WithRedfishUseBasicAuth(false))
	c.Registry.Drivers = c.Registry.Using("redfish")
	if err := c.Open(ctx); err != nil {
		t.Fatal(err)
	}
	defer c.Close(ctx)
	for _, step := range []struct{ do, want string }{{"", "Off"}, {"on", "On"}, {"cycle", "On"}, {"off", "Off"}} {
		if step.do != "" {
			if ok, err := c.SetPowerState(ctx, step.do); err != nil || !ok {
				t.Fatalf("SetPowerState(%s) = %v, %v", step.do, ok, err)
			}
		}
		if got, err := c.GetPowerState(ctx); err != nil || got != step.want {
			t.Errorf("after %q GetPowerState() = %q, %v; want %q", step.do, got, err, step.want)
		}
	}
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "an ISO") }))
	defer files.Close()
	if ok, err := c.SetVirtualMedia(ctx, "CD", files.URL+"/x.iso"); err != nil || !ok || m.disc() != "an ISO" {
		t.Errorf("SetVirtualMedia = %v, %v; the drive holds %q", ok, err, m.disc())
	}
	if ok, err := c.SetVirtualMedia(ctx, "CD", ""); err != nil || !ok || m.disc() != "" {
		t.Errorf("SetVirtualMedia of nothing = %v, %v; the drive holds %q", ok, err, m.disc())
	}
	if ok, err := c.SetBootDevice(ctx, "cdrom", false, false); err != nil || !ok {
		t.Errorf("SetBootDevice = %v, %v", ok, err)
	}
	if boot, once := m.NextBoot(); boot != "Cd" || !once {
		t.Errorf("the machine boots from %q, once %v", boot, once)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// Where the machine is on, bmclib 2.3.5 makes ForceRestart of "cycle".
	if diff := cmp.Diff([]string{"on", "reset", "off"}, m.did); diff != "" {
		t.Errorf("the machine was told (-want +got):\n%s", diff)
	}
}

func TestStranger(t *testing.T) {
	b, err := Start(Options{Machine: new(fake), StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := http.Get(b.URL + "/redfish/v1"); err == nil {
		t.Error("a client without the CA trusts the BMC")
	}
	for range 2 {
		if err := b.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	if _, err := http.Get(b.URL); err == nil {
		t.Error("the BMC answers after Close")
	}
}

// A machine that stands still is neither on nor off, and only Resume, or a restart, has it go on.
func TestPause(t *testing.T) {
	m := &fake{on: true}
	p := &power{Machine: m}
	for _, step := range []struct {
		reset schema.ResetType
		want  schema.PowerState
	}{{schema.ResetPause, schema.PowerPaused}, {schema.ResetResume, schema.PowerOn}, {schema.ResetForceOff, schema.PowerOff}} {
		if err := p.Reset(t.Context(), step.reset); err != nil {
			t.Fatalf("Reset(%s) = %v", step.reset, err)
		}
		if got, err := p.State(t.Context()); err != nil || got != step.want {
			t.Errorf("after %s: %q, %v; want %q", step.reset, got, err, step.want)
		}
	}
	if err := p.Reset(t.Context(), schema.ResetPause); !errors.Is(err, errOff) {
		t.Errorf("Pause of a machine that is off = %v; want %v", err, errOff)
	}
}

// A graceful restart must end with the machine on again.
func TestGracefulRestart(t *testing.T) {
	m := &fake{on: true}
	p := &power{Machine: m}
	if err := p.Reset(t.Context(), schema.ResetGracefulRestart); err != nil {
		t.Fatal(err)
	}
	if err := m.PowerOff(t.Context()); err != nil { // the operating system has shut down
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for !m.Powered() && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if !m.Powered() {
		t.Error("the machine is still off")
	}
}
