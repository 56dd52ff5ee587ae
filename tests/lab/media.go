package lab

import (
	"context"
	"strings"
	"sync"
)

// media is what HOST's BMC lends it: what is in its CD drive, and what it boots from instead of its kernel.
type media struct {
	mu   sync.Mutex
	cd   string // path of the image in the drive; guarded by mu
	boot string // "Pxe", "Hdd", "Cd", or "" for the kernel; guarded by mu
	once bool   // guarded by mu
}

// drive is QEMU's option for the CD drive.
func (m *media) drive() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cd == "" {
		return "if=none,id=cd0,media=cdrom"
	}
	return "if=none,id=cd0,media=cdrom,format=raw,readonly=on,file=" + strings.ReplaceAll(m.cd, ",", ",,")
}

// takeBoot returns QEMU's letter for the override, and uses it up if it is for once.
func (m *media) takeBoot() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	order := map[string]string{"Pxe": "n", "Hdd": "c", "Cd": "d"}[m.boot]
	if m.once {
		m.boot = ""
	}
	return order
}

// BootNext has HOST's firmware boot from "Pxe", "Hdd" or "Cd" instead of the lab's kernel when the power is switched on next,
// once or each time; "" means the kernel. A reset changes nothing.
func (h *Host) BootNext(device string, once bool) {
	h.media.mu.Lock()
	defer h.media.mu.Unlock()
	h.media.boot, h.media.once = device, once
}

// NextBoot tells what BootNext has set and was not used up.
func (h *Host) NextBoot() (device string, once bool) {
	h.media.mu.Lock()
	defer h.media.mu.Unlock()
	return h.media.boot, h.media.once
}

// InsertCD puts the image in a file into HOST's CD drive, which it keeps while it is off; "" takes it out.
func (h *Host) InsertCD(ctx context.Context, path string) error {
	h.media.mu.Lock()
	defer h.media.mu.Unlock()
	if h.Powered() {
		var err error
		if path == "" {
			err = h.QMP(ctx, "eject", map[string]any{"id": "cdrom", "force": true}, nil)
		} else {
			err = h.QMP(ctx, "blockdev-change-medium", map[string]any{"id": "cdrom", "filename": path, "format": "raw", "read-only-mode": "read-only", "force": true}, nil)
		}
		if err != nil {
			return err
		}
	}
	h.media.cd = path
	return nil
}
