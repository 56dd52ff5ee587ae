package lab

import (
	"context"
	"net/http"
	"time"
)

// DPU is the machine that heals.
type DPU struct {
	// URL is the Redfish service on loopback, "https://127.0.0.1:port".
	URL string
	// User and Password are the initial credential as the DPU's console printed it.
	User, Password string
	// CA is the PEM certificate that the service presents.
	CA []byte
	// StateDir has what the state disk was made from: configuration, policy, agreement and the keys that the lab generated.
	StateDir string
	// BootTook is the time from QEMU's start to the first answer of the Redfish service.
	BootTook time.Duration
}

// Console is the DPU's serial port.
func (d *DPU) Console() *Console { return nil }

// Client returns an HTTP client that trusts exactly the DPU's certificate.
func (d *DPU) Client() *http.Client { return nil }

// Restart resets the DPU (as a power cut would) and waits for its Redfish service.
func (d *DPU) Restart(ctx context.Context) error { return nil }

// BMC is HOST's board management controller, as the lab started it.
type BMC struct {
	URL            string // on loopback; the DPU reaches the same port at 10.0.2.2
	User, Password string
	CA             []byte // PEM
}
