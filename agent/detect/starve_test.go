package detect

import (
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

func TestStarved(t *testing.T) {
	c := DefaultConfig()
	type state struct {
		eater, waiter time.Duration // runtime
		switches      uint64
		running       bool // the one that waits
		at            time.Duration
	}
	second := func(i int) time.Duration { return time.Duration(i) * time.Second }
	for _, tt := range []struct {
		name string
		f    func(i int) state // by the second
		want int
	}{
		{"one takes all, another gets nothing", func(i int) state { return state{eater: second(i), waiter: 5 * time.Second, at: second(i)} }, 1},
		{"shares, though small ones", func(i int) state {
			return state{eater: second(i), waiter: time.Duration(i/10) * time.Millisecond, switches: uint64(i / 10), at: second(i)}
		}, 0},
		{"it runs now", func(i int) state { return state{eater: second(i), running: i == 39, at: second(i)} }, 0},
		{"it waits since ten seconds", func(i int) state { return state{eater: second(i), running: i < 30, at: second(i)} }, 0},
		{"a hypervisor holds the CPU", func(i int) state { return state{eater: second(i / 10), at: second(i)} }, 0},
		{"nobody has looked for a while", func(i int) state { return state{eater: second(i), at: second(i + i/35*60)} }, 0},
		{"whose user may", func(i int) state { return state{eater: second(i), waiter: 5 * time.Second, at: second(i)} }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, c := &Pass{}, c
			if tt.name == "whose user may" {
				c.RunawayExempt = []UIDRange{{0, 0}}
			}
			start := time.Unix(1_800_000_000, 0)
			for i := range 40 {
				s := tt.f(i)
				p.Tasks = append(p.Tasks, TaskSample{At: start.Add(s.at), Tasks: []kernel.Task{
					{PID: 1, TGID: 1, Comm: "init", State: "S"},
					{PID: 70, TGID: 70, Comm: "fifo", State: "R", OnCPU: true, CPU: 1, Runtime: s.eater},
					{PID: 71, TGID: 71, Comm: "kworker/1:0", KThread: true, State: "R", OnCPU: s.running, CPU: 1, Runtime: s.waiter, Switches: s.switches},
					{PID: 72, TGID: 72, Comm: "other", State: "R", OnCPU: true, CPU: 0, Runtime: 2 * s.eater},
				}})
			}
			fs := detect(t, starved(c), p)
			if len(fs) != tt.want || tt.want == 1 && (fs[0].Culprit.PID != 70 || *fs[0].Culprit.CPU != 1 || !strings.Contains(fs[0].Detail, "kworker/1:0")) {
				t.Errorf("%+v; want %d", fs, tt.want)
			}
		})
	}
}
