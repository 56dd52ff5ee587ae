// Package lab runs two real machines in QEMU and the wires between them: HOST, a stock Debian kernel that falls ill, and
// DPU, our image, which sees HOST's memory as a PCI window and nothing else of it.
//
// Beside them stand a TPM for the DPU (swtpm), a BMC for HOST that really switches its power (package bmc), and an
// Ethernet switch (package wire). The lab knows the truth about HOST by its own means: QMP, the serial console and a
// control line to HOST's userland (package control). What the agent says is held against that truth.
//
// Nothing here needs root, a fixed port or a fixed path; labs run side by side. Everything dies with the process that
// called Up, however it ends: the machines are killed by the kernel with their parent, and HOST's RAM is an anonymous
// file that is only reachable through the lab's process.
package lab

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// Config says what lab to build. The zero value is HOST with Debian's 6.1 cloud kernel and a DPU with the built image.
type Config struct {
	// Dir is the run directory: logs, state disk, sockets. Empty means a temporary one that Close removes.
	Dir string
	// HostKernel is "6.1", "6.12", "6.1-generic" or "6.12-generic"; empty means "6.1". The short names are the cloud flavour.
	HostKernel string
	// HostMemory is HOST's RAM in bytes, a power of two of at least 256 MiB; zero means 512 MiB.
	HostMemory int64
	// HostArgs is appended to HOST's kernel command line.
	HostArgs string
	// NoDPU leaves the DPU out: HOST and its BMC alone.
	NoDPU bool
	// DPUImage and DPUKernel are the DPU's initramfs and kernel; empty means build/images of this checkout.
	DPUImage, DPUKernel string
	// NoWrites keeps the agent from storing into HOST: the lab's own control experiment.
	NoWrites bool
	// Engine is the agent's path to HOST's memory: "window" (default) or "dma", the model of a DMA engine over it.
	Engine string
	// Actions names what the access agreement allows; nil means everything that the agent knows.
	Actions []string
	// Policy is the agent's policy file; nil means its default, which heals nothing without being asked.
	Policy json.RawMessage
	// CacheDir keeps kernels and HOST's initramfs between runs; empty means the user's cache directory.
	CacheDir string
	// Log gets a line per step of progress; nil means none.
	Log io.Writer
	// WireCapture, if not empty, is a file that gets every frame on the wire in pcap format.
	WireCapture string
}

// Up builds a lab and returns once HOST's userland stands and the DPU's Redfish service answers.
// It returns a *BootError when a machine did not come up and an *InfraError when the lab could not be built.
func Up(ctx context.Context, cfg Config) (*Lab, error) {
	return nil, &InfraError{Op: "start", Err: ctx.Err()}
}

// Lab is a running lab.
type Lab struct {
	Host *Host
	DPU  *DPU // nil with Config.NoDPU
	BMC  *BMC

	dir string
}

// Close stops everything, and removes everything that Up made unless Config.Dir was given; then the logs stay.
func (l *Lab) Close() error { return nil }

// Dir is the run directory.
func (l *Lab) Dir() string { return l.dir }

// Host is the machine that falls ill.
type Host struct{}

// RAM is HOST's memory as a file: its path, valid while the lab lives, and its size in bytes. hostmem.Q35Layout tells
// where host physical addresses are in it.
func (h *Host) RAM() (path string, size int64) { return "", 0 }

// Console is HOST's first serial port.
func (h *Host) Console() *Console { return nil }

// Service is the loopback address ("127.0.0.1:port") of HOST's TCP service.
func (h *Host) Service() string { return "" }

// Boots counts how often HOST's userland has come up.
func (h *Host) Boots() int { return 0 }

// WaitBoot waits until HOST's userland has come up more than n times and returns what it said of itself.
func (h *Host) WaitBoot(ctx context.Context, n int) (control.Ready, error) {
	return control.Ready{}, nil
}

// Do runs one operation of package control on HOST; result may be nil.
func (h *Host) Do(ctx context.Context, op string, args, result any) error { return nil }

// Exec runs a busybox command line on HOST.
func (h *Host) Exec(ctx context.Context, command string) (control.ExecResult, error) {
	return control.ExecResult{}, nil
}

// PS lists HOST's processes and kernel threads by its own /proc.
func (h *Host) PS(ctx context.Context) ([]control.Process, error) { return nil, nil }

// Spawn starts a process on HOST.
func (h *Host) Spawn(ctx context.Context, a control.SpawnArgs) (control.Process, error) {
	return control.Process{}, nil
}

// ReadFile returns a file of HOST, e.g. "/proc/interrupts".
func (h *Host) ReadFile(ctx context.Context, path string) (string, error) { return "", nil }

// Thaw ends FaultFreeze.
func (h *Host) Thaw(ctx context.Context) error { return nil }

// TraceFunctions starts counting HOST's kernel functions with ftrace; stop it with Traced.
func (h *Host) TraceFunctions(ctx context.Context, names ...string) error { return nil }

// Traced stops counting and tells what ran.
func (h *Host) Traced(ctx context.Context) ([]control.FunctionCost, error) { return nil, nil }

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
