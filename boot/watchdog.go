package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A watchdog is an armed hardware watchdog (Documentation/watchdog/watchdog-api.rst, Linux 6.1).
type watchdog struct {
	f       *os.File
	timeout time.Duration // as the driver confirmed it
}

// openWatchdog arms the watchdog: opening the device does.
func openWatchdog(node string, timeout time.Duration) (*watchdog, error) {
	f, err := os.OpenFile(node, os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open watchdog: %w", err)
	}
	w := &watchdog{f: f}
	fd := int(f.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.WDIOC_SETTIMEOUT, int(timeout/time.Second)); err != nil {
		// A driver with a fixed or coarser time-out keeps its own, which is read back below.
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOTTY) {
			return nil, errors.Join(fmt.Errorf("set the watchdog's time-out: %w", err), w.disarm())
		}
	}
	var seconds int32
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.WDIOC_GETTIMEOUT, uintptr(unsafe.Pointer(&seconds))); errno != 0 || seconds <= 0 {
		seconds = 10 // unknown: feed it often
	}
	w.timeout = time.Duration(seconds) * time.Second
	return w, nil
}

func (w *watchdog) feed() error {
	_, err := w.f.Write([]byte{0}) // any byte but V; understood by every driver, unlike WDIOC_KEEPALIVE
	return err
}

// disarm writes the magic character, without which a closed watchdog goes on counting.
func (w *watchdog) disarm() error {
	_, err := w.f.Write([]byte("V"))
	return errors.Join(err, w.f.Close())
}

// armWatchdog arms the first hardware watchdog and feeds it until ctx ends, each time if the machine is alive in the
// opinion of [Machine.FeedWhile]'s function.
func (m *Machine) armWatchdog(ctx context.Context, seconds int) (Outcome, string, error) {
	switch seconds {
	case -1:
		return Absent, "switched off by the configuration", nil
	case 0:
		seconds = 60
	}
	nodes, err := filepath.Glob("/dev/watchdog[0-9]*")
	if err != nil {
		return Unclear, "", err
	}
	if len(nodes) == 0 {
		return Absent, "the machine has none", nil
	}
	sort.Strings(nodes)
	w, err := openWatchdog(nodes[0], time.Duration(seconds)*time.Second)
	if err != nil {
		return Unclear, nodes[0], err
	}
	m.mu.Lock()
	m.dog = w
	m.mu.Unlock()
	m.background(ctx, func(ctx context.Context) { m.feedWatchdog(ctx, w) })
	return Done, fmt.Sprintf("%s, %s", nodes[0], w.timeout), nil
}

func (m *Machine) feedWatchdog(ctx context.Context, w *watchdog) {
	tick := time.NewTicker(max(w.timeout/4, time.Second))
	defer tick.Stop()
	for {
		m.mu.Lock()
		alive := m.alive
		m.mu.Unlock()
		var err error
		if alive != nil {
			err = alive()
		}
		if err == nil {
			err = w.feed()
		}
		if err != nil {
			m.log.Error("watchdog not fed", "err", err, "reset_within", w.timeout)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// FeedWhile has the watchdog fed only as long as alive returns nil. Without it the watchdog guards against a dead kernel
// or process, but not against an agent that no longer does its work. alive must return at once.
func (m *Machine) FeedWhile(alive func() error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.alive = alive
}
