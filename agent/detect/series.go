package detect

import (
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// series is the unbroken newest part of a row of heartbeats, with credit for the time in which the reader was awake.
//
// A reader that itself was not scheduled has seen nothing in the meantime. So the time between two beats counts only up to
// twice the usual interval, and a gap that is longer than the longest allowed ends the series: what lies before it is
// forgotten.
type series struct {
	beats  []kernel.Heartbeat // oldest first
	credit []time.Duration    // credit[i]: watched time from beats[i] to the newest
}

func newSeries(c Config, beats []kernel.Heartbeat, longest time.Duration) series {
	n := len(beats)
	credit := make([]time.Duration, n)
	from := 0
	for i := n - 2; i >= 0; i-- {
		gap := beats[i+1].At.Sub(beats[i].At)
		if gap < 0 || gap > longest || len(beats[i].CPUs) != len(beats[n-1].CPUs) {
			from = i + 1
			break
		}
		credit[i] = credit[i+1] + min(gap, 2*c.Heartbeat)
	}
	return series{beats[from:], credit[from:]}
}

// series returns the series of the pass's beats with a longest gap, made once for all detectors.
func (p *Pass) series(c Config, longest time.Duration) series {
	for _, s := range p.made {
		if s.longest == longest && len(s.of) == len(p.Beats) && len(s.of) > 0 && &s.of[0] == &p.Beats[0] {
			return s.series
		}
	}
	s := newSeries(c, p.Beats, longest)
	p.made = append(p.made, madeSeries{s, p.Beats, longest})
	return s
}

// slowly is how often heartbeats are judged by what needs seconds of them.
const slowly = 240 * time.Millisecond

type madeSeries struct {
	series
	of      []kernel.Heartbeat
	longest time.Duration
}

// A verdict within a second needs an unbroken watch; one over many seconds bears a lapse.
func (c Config) strict() time.Duration  { return max(4*c.Heartbeat, 100*time.Millisecond) }
func (c Config) lenient() time.Duration { return max(20*c.Heartbeat, time.Second) }

// still returns for how long same has held between the newest beat and each one before it, without a break, and the index
// of the oldest such beat.
func (s series) still(same func(old, now *kernel.Heartbeat) bool) (time.Duration, int) {
	last := len(s.beats) - 1
	if last < 0 {
		return 0, -1
	}
	at := last
	for at > 0 && same(&s.beats[at-1], &s.beats[last]) {
		at--
	}
	return s.credit[at], at
}

// watched is the credit of the whole series.
func (s series) watched() time.Duration {
	if len(s.credit) == 0 {
		return 0
	}
	return s.credit[0]
}

// held returns the longest time that any CPU has lately been busy without a tick, and then ticked again. A CPU that has come
// back was not locked: something beneath the kernel (a hypervisor, firmware) had taken it away, and may do so again.
func (s series) held() time.Duration {
	var longest time.Duration
	n := len(s.beats)
	for cpu := range s.beats[n-1].CPUs {
		from := 0
		for i := 1; i < n; i++ {
			a, b := &s.beats[i-1].CPUs[cpu], &s.beats[i].CPUs[cpu]
			if a.Idle || b.Idle {
				from = i
				continue
			}
			if a.TimerIRQs != b.TimerIRQs {
				longest = max(longest, s.credit[from]-s.credit[i-1])
				from = i
			}
		}
	}
	return longest
}

const (
	hardirqMask = 0x000f0000 // HARDIRQ_MASK of include/linux/preempt.h, since 4.x
	ktimeMax    = 1<<63 - 1
)

// overdue returns how late a CPU's programmed timer event is at the newest beat; negative if it is not due, or none is set.
// The host's clock stands still in memory while nobody updates it, so the time since it was last seen to move is added;
// that is less than what has really passed.
func (s series) overdue(cpu int) time.Duration {
	last := &s.beats[len(s.beats)-1]
	next := last.CPUs[cpu].NextEvent
	if next <= 0 || next == ktimeMax {
		return -1
	}
	passed, _ := s.still(func(old, now *kernel.Heartbeat) bool { return old.Mono == now.Mono })
	return time.Duration(last.Mono-next) + passed
}
