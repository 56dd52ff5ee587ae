// Package bmc is the baseboard management controller of the lab's host: a real Redfish service, made with the same
// package as the agent's, that really switches a virtual machine's power.
//
// It knows nothing of the agent. What it says about power is what QEMU's process table and monitor say.
package bmc

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Machine is what the BMC manages.
type Machine interface {
	Powered() bool
	PowerOn(context.Context) error  // no error if it is on
	PowerOff(context.Context) error // at once; no error if it is off
	PowerCycle(context.Context) error
	Reset(context.Context) error    // the reset line; memory is kept
	Shutdown(context.Context) error // presses the power button
	NMI(context.Context) error
	Freeze(context.Context) error // stops all CPUs
	Thaw(context.Context) error   // ends Freeze
	// Status is "running", "paused" or another word of QEMU's, or "off".
	Status(context.Context) (string, error)
	// BootNext has the machine boot from "Pxe", "Hdd" or "Cd" when its power is switched on the next time, once or each time;
	// "" means what it always boots from.
	BootNext(device string, once bool)
	// NextBoot tells what BootNext has set and was not used up.
	NextBoot() (device string, once bool)
	// InsertCD puts the image in a file into the machine's CD drive, which it keeps while it is off; "" takes it out.
	InsertCD(ctx context.Context, path string) error
}

// Options describe the machine.
type Options struct {
	Machine   Machine
	UUID      string // of the machine
	MemoryGiB float64
	CPUs      int
	// Names are the addresses, beside loopback, by which clients reach the BMC: its certificate has them.
	Names []string
	// StateDir keeps accounts and certificate.
	StateDir string
	Logger   *slog.Logger
}

// BMC is a running controller.
type BMC struct {
	URL            string // https://127.0.0.1:port
	Port           int
	User, Password string
	CA             []byte // the certificate in PEM

	stop context.CancelFunc
	done chan error
}

// Start serves the BMC on a free port of 127.0.0.1 until Close.
func Start(o Options) (*BMC, error) {
	b := &BMC{User: "admin", Password: rand.Text(), done: make(chan error, 1)}
	svc, err := service.New(service.Options{
		Logger: o.Logger, StateDir: o.StateDir, Product: "Lab BMC", Vendor: "Backdoor",
		Account: &service.Credential{User: b.User, Password: b.Password}, Names: o.Names,
	})
	if err != nil {
		return nil, fmt.Errorf("start the host's BMC: %w", err)
	}
	svc.Handle(service.BMC(svc, service.BMCOptions{
		Power: &power{Machine: o.Machine, dir: o.StateDir}, UUID: o.UUID, Manufacturer: "QEMU", Model: "q35", SerialNumber: "lab",
		BMCModel: "Lab BMC", BMCVersion: "1", MemoryGiB: o.MemoryGiB, Processors: o.CPUs,
	})...)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start the host's BMC: %w", err)
	}
	b.Port = ln.Addr().(*net.TCPAddr).Port
	b.URL = fmt.Sprintf("https://127.0.0.1:%d", b.Port)
	b.CA = certificate(svc.Certificate())
	ctx, cancel := context.WithCancel(context.Background())
	b.stop = cancel
	go func() { b.done <- svc.Serve(ctx, ln) }()
	return b, nil
}

func certificate(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// Close stops the service; the machine stays as it is.
func (b *BMC) Close() error {
	b.stop()
	err := <-b.done
	b.done <- nil // for a second Close
	if errors.Is(err, context.Canceled) || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// power translates Redfish's words to a Machine's.
type power struct {
	Machine
	dir string // for images

	mu    sync.Mutex
	image string // URI of what is in the drive; guarded by mu
}

func (p *power) State(ctx context.Context) (schema.PowerState, error) {
	if !p.Powered() {
		return schema.PowerOff, nil
	}
	switch status, err := p.Status(ctx); {
	case !p.Powered(): // it went while it was asked
		return schema.PowerOff, nil
	case err != nil:
		return "", err
	case status == "paused":
		return schema.PowerPaused, nil
	}
	return schema.PowerOn, nil
}

func (*power) Types() []schema.ResetType {
	return []schema.ResetType{
		schema.ResetOn, schema.ResetForceOff, schema.ResetGracefulShutdown, schema.ResetForceRestart,
		schema.ResetNMI, schema.ResetPushPowerButton, schema.ResetPowerCycle, schema.ResetForceOn, schema.ResetGracefulRestart,
		schema.ResetPause, schema.ResetResume,
	}
}

// needsPower are the orders that make no sense for a machine that is off.
var needsPower = []schema.ResetType{schema.ResetGracefulShutdown, schema.ResetGracefulRestart, schema.ResetForceRestart, schema.ResetNMI, schema.ResetPause, schema.ResetResume}

// errOff is why such an order is refused.
var errOff = errors.New("the machine is off")

func (p *power) Reset(ctx context.Context, t schema.ResetType) error {
	// An order that has been taken is carried out, also when the client does not wait for it.
	ctx = context.WithoutCancel(ctx)
	if slices.Contains(needsPower, t) && !p.Powered() {
		return fmt.Errorf("reset %s: %w", t, errOff)
	}
	switch t {
	case schema.ResetOn, schema.ResetForceOn:
		return p.PowerOn(ctx)
	case schema.ResetForceOff:
		return p.PowerOff(ctx)
	case schema.ResetPowerCycle:
		return p.PowerCycle(ctx)
	case schema.ResetForceRestart:
		if device, _ := p.NextBoot(); device != "" {
			return p.PowerCycle(ctx) // QEMU boots from something else only when it starts
		}
		return p.Machine.Reset(ctx)
	case schema.ResetNMI:
		return p.NMI(ctx)
	case schema.ResetPause:
		return p.Freeze(ctx)
	case schema.ResetResume:
		return p.Thaw(ctx)
	case schema.ResetGracefulRestart:
		if err := p.Shutdown(ctx); err != nil {
			return err
		}
		go p.onAfterOff(ctx)
		return nil
	case schema.ResetGracefulShutdown:
		return p.Shutdown(ctx)
	case schema.ResetPushPowerButton:
		if !p.Powered() {
			return p.PowerOn(ctx)
		}
		return p.Shutdown(ctx)
	}
	return fmt.Errorf("reset %s: %w", t, errors.ErrUnsupported)
}

// restartTime is how long a machine may take to shut down for a restart.
const restartTime = 2 * time.Minute

// onAfterOff switches the machine on again when it has shut down. One that does not do so stays as it is.
func (p *power) onAfterOff(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, restartTime)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for p.Powered() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
	// An error leaves the machine off, which is what the BMC then says.
	_ = p.PowerOn(ctx)
}

// Boot implements service.BootDevice.
func (p *power) Boot(context.Context) (enabled, target, mode string, err error) {
	device, once := p.NextBoot()
	switch {
	case device == "":
		enabled = "Disabled"
	case once:
		enabled = "Once"
	default:
		enabled = "Continuous"
	}
	return enabled, cmp.Or(device, "None"), "Legacy", nil
}

// SetBoot implements service.BootDevice. The machine's firmware is SeaBIOS, and there is no other.
func (p *power) SetBoot(_ context.Context, enabled, target, mode string) error {
	if mode != "Legacy" {
		return service.Because(400, "PropertyValueNotInList", "The machine's firmware knows legacy boot only.", mode, "BootSourceOverrideMode")
	}
	if enabled == "Disabled" || target == "None" {
		target = ""
	}
	p.BootNext(target, enabled == "Once")
	return nil
}

// Targets implements service.BootDevice.
func (*power) Targets() []string { return []string{"None", "Pxe", "Hdd", "Cd"} }

// The virtual drive.
const (
	cd       = "Cd"
	maxImage = 4 << 30
)

// Drives implements service.Media.
func (*power) Drives() []string { return []string{cd} }

// Image implements service.Media.
func (p *power) Image(string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.image
}

// Insert implements service.Media: it downloads the image and has the machine read it.
func (p *power) Insert(ctx context.Context, _, uri string) error {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return service.Because(400, "ActionParameterValueFormatError", "The image's URI must be http://… or https://….", uri, "Image", "VirtualMedia.InsertMedia")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	path := filepath.Join(p.dir, "cd.iso")
	if err := download(ctx, uri, path); err != nil {
		return service.Because(400, "ResourceAtUriUnauthorized", "The image could not be fetched: "+err.Error()+".", uri, err.Error())
	}
	if err := p.InsertCD(ctx, path); err != nil {
		return err
	}
	p.image = uri
	return nil
}

// Eject implements service.Media.
func (p *power) Eject(ctx context.Context, _ string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.InsertCD(ctx, ""); err != nil {
		return err
	}
	p.image = ""
	return nil
}

// download fetches a file of up to maxImage bytes.
func download(ctx context.Context, uri, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the server says %s", resp.Status)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, io.LimitReader(resp.Body, maxImage+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if n > maxImage {
		return fmt.Errorf("the image has more than %d bytes", int64(maxImage))
	}
	return nil
}
