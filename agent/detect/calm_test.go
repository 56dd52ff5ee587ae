package detect

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// TestCalm holds the quick look, by which most passes end, against the rules themselves: where it says that no CPU stands, none of them fires.
func TestCalm(t *testing.T) {
	c := DefaultConfig()
	calms, fires := 0, 0
	for seed := range uint64(4000) {
		r := rand.New(rand.NewPCG(seed, 1))
		beats := stands(r, c, 2)
		s, long := newSeries(c, beats, c.strict()), newSeries(c, beats, c.lenient())
		found := false
		for i := range beats[len(beats)-1].CPUs {
			_, ok := stalled(c, s, long, i, false)
			found = found || ok
		}
		quick := calm(c, beats)
		if quick && found {
			t.Fatalf("seed %d: calm, and a CPU stands", seed)
		}
		if quick {
			calms++
		}
		if found {
			fires++
		}
	}
	if calms < 400 || fires < 400 {
		t.Errorf("%d series are calm, in %d a CPU stands: they try nothing", calms, fires)
	}
}

// stands makes beats of CPUs of which each has stood since some time, busy, idle or in an interrupt, or has not.
func stands(r *rand.Rand, c Config, cpus int) []kernel.Heartbeat {
	n := 2 + r.IntN(200)
	began := time.Now()
	beats := make([]kernel.Heartbeat, n)
	type cpu struct {
		stopped int
		kernel.CPU
	}
	state := make([]cpu, cpus)
	for i := range state {
		state[i].CPU = kernel.CPU{ID: i, Online: true, TimerIRQs: 1000, Idle: r.IntN(2) == 0, Curr: 1, NextEvent: int64(20 * time.Second)}
		if r.IntN(3) == 0 {
			state[i].Preempt = hardirqMask
		}
		state[i].stopped = n
		if r.IntN(3) > 0 {
			state[i].stopped = r.IntN(n)
		}
	}
	for k := range beats {
		beats[k] = kernel.Heartbeat{At: began.Add(time.Duration(k) * c.Heartbeat), Mono: int64(20*time.Second + time.Duration(k)*c.Heartbeat), Jiffies: uint64(k)}
		for i := range state {
			if k < state[i].stopped {
				state[i].TimerIRQs += 12
				state[i].Clock++
			}
			beats[k].CPUs = append(beats[k].CPUs, state[i].CPU)
		}
	}
	return beats
}
