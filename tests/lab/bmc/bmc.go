// Package bmc is the baseboard management controller of the lab's host: a real Redfish service, made with the same
// package as the agent's, that really switches a virtual machine's power.
//
// It knows nothing of the agent. What it says about power is what QEMU's process table and monitor say.
package bmc

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"

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
		Power: power{o.Machine}, UUID: o.UUID, Manufacturer: "QEMU", Model: "q35", SerialNumber: "lab",
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
type power struct{ Machine }

func (p power) State(context.Context) (schema.PowerState, error) {
	if p.Powered() {
		return schema.PowerOn, nil
	}
	return schema.PowerOff, nil
}

func (power) Types() []schema.ResetType {
	return []schema.ResetType{
		schema.ResetOn, schema.ResetForceOff, schema.ResetGracefulShutdown, schema.ResetForceRestart,
		schema.ResetNMI, schema.ResetPushPowerButton, schema.ResetPowerCycle,
	}
}

// needsPower are the orders that make no sense for a machine that is off.
var needsPower = []schema.ResetType{schema.ResetGracefulShutdown, schema.ResetForceRestart, schema.ResetNMI}

// errOff is why such an order is refused.
var errOff = errors.New("the machine is off")

func (p power) Reset(ctx context.Context, t schema.ResetType) error {
	// An order that has been taken is carried out, also when the client does not wait for it.
	ctx = context.WithoutCancel(ctx)
	if slices.Contains(needsPower, t) && !p.Powered() {
		return fmt.Errorf("reset %s: %w", t, errOff)
	}
	switch t {
	case schema.ResetOn:
		return p.PowerOn(ctx)
	case schema.ResetForceOff:
		return p.PowerOff(ctx)
	case schema.ResetPowerCycle:
		return p.PowerCycle(ctx)
	case schema.ResetForceRestart:
		return p.Machine.Reset(ctx)
	case schema.ResetNMI:
		return p.NMI(ctx)
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
