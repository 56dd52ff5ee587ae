package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// clockFile's modification time is the latest time that the machine is known to have seen.
var clockFile = filepath.Join(StateDir, "clock")

// setClock moves the clock forward to the last time seen, on machines without a battery-backed clock: certificates and
// the journal must not see time go back over a reboot.
func setClock(file string) (Outcome, string, error) {
	st, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) {
		return Absent, "no earlier boot is known", nil
	}
	if err != nil {
		return Unclear, "", err
	}
	now := time.Now()
	if !st.ModTime().After(now) {
		return Done, "", nil
	}
	ts := unix.NsecToTimespec(st.ModTime().UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return Unclear, "", fmt.Errorf("set the clock: %w", err)
	}
	return Done, fmt.Sprintf("moved from %s to %s", now.UTC().Format(time.RFC3339), st.ModTime().UTC().Format(time.RFC3339)), nil
}

// keepClock records the time every ten minutes and at the end.
func keepClock(ctx context.Context, file string) {
	tick := time.NewTicker(10 * time.Minute)
	defer tick.Stop()
	for {
		touch(file)
		select {
		case <-ctx.Done():
			touch(file)
			return
		case <-tick.C:
		}
	}
}

// touch is best effort: a state disk that went read-only is reported by those who need to write to it.
func touch(file string) {
	now := time.Now()
	if os.Chtimes(file, now, now) == nil {
		return
	}
	if f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
		f.Close()
	}
}
