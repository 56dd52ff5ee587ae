package lab

import (
	"context"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// The power of HOST. Off is strict: the QEMU process is gone and the memory reads as zero, as with the plug pulled.

// Powered reports whether HOST is on. A frozen or dead kernel is on.
func (h *Host) Powered() bool { return h.machine.current() != nil }

// PowerOn switches HOST on; it is no error if it is on. It does not wait for the boot.
func (h *Host) PowerOn(ctx context.Context) error {
	if h.Powered() {
		return nil
	}
	if err := h.machine.on(ctx); err != nil {
		return err
	}
	h.events.add(Event{At: time.Now(), Name: EventOn})
	return nil
}

// PowerOff switches HOST off at once; it is no error if it is off.
func (h *Host) PowerOff(context.Context) error {
	h.machine.off()
	return h.ram.clear()
}

// PowerCycle switches HOST off and on again.
func (h *Host) PowerCycle(ctx context.Context) error {
	if err := h.PowerOff(ctx); err != nil {
		return err
	}
	return h.PowerOn(ctx)
}

// Reset pulls the reset line: HOST starts anew with its memory as it was.
func (h *Host) Reset(ctx context.Context) error {
	if err := h.QMP(ctx, "system_reset", nil, nil); err != nil {
		return err
	}
	return h.QMP(ctx, "cont", nil, nil) // a frozen machine comes back, too
}

// Kexec has HOST start its second kernel (Config.SecondKernel), without its firmware. What it was asked for and has not answered yet is lost.
func (h *Host) Kexec(ctx context.Context) error {
	var fired control.Fired
	if err := h.Do(ctx, control.OpKexec, nil, &fired); err != nil {
		return err
	}
	h.mu.Lock()
	l := h.line
	h.mu.Unlock()
	if l != nil {
		l.forget()
	}
	return nil
}

// Shutdown presses the power button: HOST's userland shuts down in order, if it still can.
func (h *Host) Shutdown(ctx context.Context) error { return h.QMP(ctx, "system_powerdown", nil, nil) }

// NMI sends a non-maskable interrupt to every CPU of HOST.
func (h *Host) NMI(ctx context.Context) error { return h.QMP(ctx, "inject-nmi", nil, nil) }

// Freeze stops all of HOST's CPUs at once.
func (h *Host) Freeze(ctx context.Context) error { return h.QMP(ctx, "stop", nil, nil) }

// Thaw ends Freeze.
func (h *Host) Thaw(ctx context.Context) error { return h.QMP(ctx, "cont", nil, nil) }

// Status is QEMU's word for HOST's state ("running", "paused", …), or "off".
func (h *Host) Status(ctx context.Context) (string, error) {
	if !h.Powered() {
		return "off", nil
	}
	var s struct {
		Status string `json:"status"`
	}
	if err := h.QMP(ctx, "query-status", nil, &s); err != nil {
		return "", fmt.Errorf("ask for the host's state: %w", err)
	}
	return s.Status, nil
}
