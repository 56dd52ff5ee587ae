package lab

import (
	"context"
	"time"
)

// Fault is something that the lab can break on the host.
type Fault string

// The faults.
const (
	FaultRunaway  Fault = "runaway"  // a process of random name, PID and CPU that eats a whole CPU
	FaultPanic    Fault = "panic"    // sysrq-c: the kernel dies and stays dead
	FaultFreeze   Fault = "freeze"   // all CPUs stop at once (QMP stop) until Thaw
	FaultIRQsOff  Fault = "irqs-off" // one CPU spins in the kernel with its interrupts off
	FaultReboot   Fault = "reboot"   // sysrq-b: the kernel reboots at once
	FaultPowercut Fault = "powercut" // the power goes; memory is lost; nothing restarts it
)

// Truth is what the harness knows of a fault that it has made. It comes from the harness and the host's own /proc, never
// from the agent.
type Truth struct {
	Fault Fault         `json:"fault"`
	Start time.Time     `json:"start"` // the harness's clock: the fault did not exist before
	Error time.Duration `json:"error"` // Start may be early by this much
	PID   int           `json:"pid,omitempty"`
	Comm  string        `json:"comm,omitempty"`
	CPU   int           `json:"cpu"` // -1 if it is no single CPU's
	UID   uint32        `json:"uid"`
	Boot  string        `json:"boot"` // the boot_id that was hit
}

// Fault breaks the host and returns once the fault is there.
func (h *Host) Fault(ctx context.Context, f Fault) (Truth, error) {
	return Truth{}, &InfraError{Op: "inject " + string(f), Err: ctx.Err()}
}
