package healing

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab"
)

// counters are the host's own, out of its /proc.
type counters struct {
	at      time.Time
	took    time.Duration // of a difference
	forks   int64
	modules string
}

func readCounters(ctx context.Context, h *lab.Host) (counters, error) {
	stat, err := h.ReadFile(ctx, "/proc/stat")
	if err != nil {
		return counters{}, err
	}
	c := counters{at: time.Now()}
	for line := range strings.Lines(stat) {
		fmt.Sscanf(line, "processes %d", &c.forks)
	}
	c.modules, err = h.ReadFile(ctx, "/proc/modules")
	return c, err
}

func (c counters) sub(before counters) counters {
	return counters{took: c.at.Sub(before.at), forks: c.forks - before.forks}
}
