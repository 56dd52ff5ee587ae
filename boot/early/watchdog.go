package early

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNoWatchdog means that the machine has no hardware watchdog that we can drive.
var ErrNoWatchdog = errors.New("the machine has no watchdog")

// A Watchdog is an armed hardware watchdog: it resets the machine unless it is fed.
type Watchdog struct {
	// Name is the device's.
	Name string
	// Timeout is what the device confirmed.
	Timeout time.Duration
	// Bit says that it was this watchdog that reset the machine last; false also where the device cannot tell.
	Bit bool

	dev timer
}

// A timer is a watchdog's hardware.
type timer interface {
	feed() error
	disarm() error
}

// Feed starts the watchdog's time anew.
func (w *Watchdog) Feed() error { return w.dev.feed() }

// Disarm switches the watchdog off.
func (w *Watchdog) Disarm() error { return w.dev.disarm() }

// NewWatchdog makes a watchdog of an open device file that has been armed; tests give another file.
func NewWatchdog(f *os.File, timeout time.Duration) *Watchdog {
	return &Watchdog{Name: f.Name(), Timeout: timeout, dev: deviceFile{f}}
}

// Arm arms the first watchdog that the kernel drives; if it drives none, an i6300ESB that is there (see esb).
func Arm(timeout time.Duration) (*Watchdog, error) {
	nodes, err := filepath.Glob("/dev/watchdog[0-9]*")
	if err != nil {
		return nil, err
	}
	if len(nodes) == 0 {
		return armESB("/sys", timeout)
	}
	sort.Strings(nodes)
	return armDevice(nodes[0], timeout)
}

// A deviceFile is a watchdog that the kernel drives (Documentation/watchdog/watchdog-api.rst, Linux 6.1).
type deviceFile struct{ f *os.File }

// cardReset is WDIOF_CARDRESET of linux/watchdog.h.
const cardReset = 0x0020

// armDevice arms the watchdog: opening the device does.
func armDevice(node string, timeout time.Duration) (*Watchdog, error) {
	f, err := os.OpenFile(node, os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open watchdog: %w", err)
	}
	d := deviceFile{f}
	fd := int(f.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.WDIOC_SETTIMEOUT, int(timeout/time.Second)); err != nil {
		// A driver with a fixed or coarser time-out keeps its own, which is read back below.
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOTTY) {
			return nil, errors.Join(fmt.Errorf("set the watchdog's time-out: %w", err), d.disarm())
		}
	}
	get := func(request uintptr) int32 {
		var v int32
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&v))); errno != 0 {
			return 0
		}
		return v
	}
	seconds := get(unix.WDIOC_GETTIMEOUT)
	if seconds <= 0 {
		seconds = 10 // unknown: feed it often
	}
	w := NewWatchdog(f, time.Duration(seconds)*time.Second)
	w.Bit = get(unix.WDIOC_GETBOOTSTATUS)&cardReset != 0
	return w, nil
}

func (d deviceFile) feed() error {
	_, err := d.f.Write([]byte{0}) // any byte but V; understood by every driver, unlike WDIOC_KEEPALIVE
	return err
}

// disarm writes the magic character, without which a closed watchdog goes on counting.
func (d deviceFile) disarm() error {
	_, err := d.f.Write([]byte("V"))
	return errors.Join(err, d.f.Close())
}
