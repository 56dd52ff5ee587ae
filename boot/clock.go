package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// clockFile's modification time is the latest time that the machine is known to have seen.
var clockFile = filepath.Join(StateDir, "clock")

// setClock moves the clock forward, on machines without a battery-backed one, to the last time seen or, without a disk,
// to the day on which the kernel was built: certificates and the journal must not see time go back over a reboot, nor
// 1970.
func setClock(file string) (Outcome, string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Unclear, "", fmt.Errorf("find the kernel's age: %w", err)
	}
	floor, source := buildDate(unix.ByteSliceToString(u.Version[:])), "the kernel's build"
	st, err := os.Stat(file)
	switch {
	case err == nil:
		if st.ModTime().After(floor) {
			floor, source = st.ModTime(), "the last boot"
		}
	case !errors.Is(err, os.ErrNotExist):
		return Unclear, "", err
	}
	if floor.IsZero() {
		return Absent, "no earlier time is known", nil
	}
	now := time.Now()
	if !floor.After(now) {
		return Done, "", nil
	}
	ts := unix.NsecToTimespec(floor.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return Unclear, "", fmt.Errorf("set the clock: %w", err)
	}
	return Done, fmt.Sprintf("moved from %s to %s, the time of %s", now.UTC().Format(time.RFC3339), floor.UTC().Format(time.RFC3339), source), nil
}

// debianDate is how the version of Debian's kernels ends: "#1 SMP Debian 6.1.176-1 (2026-07-09)".
var debianDate = regexp.MustCompile(`\((\d{4}-\d{2}-\d{2})\)$`)

// buildDate returns the day in a kernel's version (uname -v); zero if there is none.
func buildDate(version string) time.Time {
	m := debianDate.FindStringSubmatch(version)
	if m == nil {
		return time.Time{}
	}
	t, err := time.Parse(time.DateOnly, m[1])
	if err != nil {
		return time.Time{}
	}
	return t
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
