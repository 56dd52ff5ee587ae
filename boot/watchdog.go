package boot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/early"
)

// defaultWatchdog is the time-out when none is configured.
const defaultWatchdog = 60 * time.Second

// keepWatchdog gives the watchdog, which Up has armed as early as it could, the configured time-out, and feeds it until ctx ends,
// each time if the machine is alive in the opinion of [Machine.FeedWhile]'s function.
func (m *Machine) keepWatchdog(ctx context.Context, w *early.Watchdog, err error, seconds int) (Outcome, string, error) {
	if errors.Is(err, early.ErrNoWatchdog) {
		return Absent, "the machine has none", nil
	}
	if err != nil {
		return Unclear, "", err
	}
	if seconds == -1 {
		return Absent, "switched off by the configuration", w.Disarm()
	}
	if want := time.Duration(seconds) * time.Second; seconds != 0 && want != w.Timeout {
		if err := w.Disarm(); err != nil {
			return Unclear, w.Name, err
		}
		if w, err = early.Arm(want); err != nil {
			return Unclear, "", err
		}
	}
	m.mu.Lock()
	m.dog = w
	m.mu.Unlock()
	m.background(ctx, func(ctx context.Context) { m.feedWatchdog(ctx, w) })
	return Done, fmt.Sprintf("%s, %s", w.Name, w.Timeout), nil
}

func (m *Machine) feedWatchdog(ctx context.Context, w *early.Watchdog) {
	tick := time.NewTicker(max(w.Timeout/4, time.Second))
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
			err = w.Feed()
		}
		if err != nil {
			m.log.Error("watchdog not fed", "err", err, "reset_within", w.Timeout)
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
