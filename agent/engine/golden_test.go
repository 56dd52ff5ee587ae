package engine

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// A comparison that fails for long is told of; one that fails for a moment, as while a path is opened anew, is not.
func TestGoldenTells(t *testing.T) {
	broken := errors.New("the link is down")
	t0 := time.Unix(1_800_000_000, 0)
	var k golden
	for _, c := range []struct {
		after time.Duration
		err   error
		want  bool
	}{
		{0, nil, false}, {time.Second, broken, false}, {goldenPatience, broken, false}, {goldenPatience + 2*time.Second, broken, true},
		{goldenPatience + 3*time.Second, nil, false}, {2 * goldenPatience, broken, false},
	} {
		why := k.tell(c.err, t0.Add(c.after))
		if got := why != ""; got != c.want || got && !strings.Contains(why, broken.Error()) {
			t.Errorf("after %v, %v: %q", c.after, c.err, why)
		}
		if k.failed.IsZero() != (c.err == nil) {
			t.Errorf("after %v, %v: failed since %v", c.after, c.err, k.failed)
		}
	}
}
