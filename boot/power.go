package boot

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Reboot restarts the machine in order: the clock is noted, caches reach the disk, the state disk is made read-only. It
// returns only if the kernel refuses. An armed watchdog stays armed, so that a restart that hangs ends in a reset.
func (m *Machine) Reboot() error { return m.end(unix.LINUX_REBOOT_CMD_RESTART) }

// PowerOff is Reboot's counterpart that leaves the machine off; boards without such a switch halt.
func (m *Machine) PowerOff() error { return m.end(unix.LINUX_REBOOT_CMD_POWER_OFF) }

func (m *Machine) end(cmd int) error {
	m.cancel()
	settled := make(chan struct{})
	go func() { m.wg.Wait(); close(settled) }()
	select {
	case <-settled:
	case <-time.After(2 * time.Second): // a driver that hangs must not keep the machine from restarting
	}
	m.mu.Lock()
	dev := m.stateDev
	m.mu.Unlock()
	unix.Sync()
	var err error
	if dev != "" {
		// Open files forbid unmounting; read-only gives the same consistency.
		if rerr := unix.Mount("", StateDir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); rerr != nil {
			if uerr := unix.Unmount(StateDir, 0); uerr != nil {
				err = fmt.Errorf("close the state disk: %w", errors.Join(rerr, uerr))
				m.log.Error("restart with an open state disk; its journal will be replayed", "err", err)
			}
		}
	}
	drainConsole()
	if rerr := unix.Reboot(cmd); rerr != nil {
		return errors.Join(err, fmt.Errorf("restart or power off: %w", rerr))
	}
	return err
}

// drainConsole lets the last lines of the log reach a serial console: they are the ones that will be asked for.
func drainConsole() {
	time.Sleep(100 * time.Millisecond) // u-root's init copies our output there
	f, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return
	}
	defer f.Close()
	_ = unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1) // tcdrain(3); best effort
}
