package engine

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

// BenchmarkWatch measures what it costs the machine of the agent to watch a host at the default pace: the RAM file of a guest, on this
// machine. One round is 200 passes, ten seconds.
func BenchmarkWatch(b *testing.B) {
	g := guest.Start(b, "6.1", guest.Options{})
	ctx, cancel := context.WithCancel(b.Context())
	e := New(Options{
		Logger: slog.New(slog.DiscardHandler),
		Memory: func(context.Context) (hostmem.Memory, error) {
			return hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), false)
		},
	})
	events := e.Subscribe(ctx)
	done := make(chan struct{})
	go func() { defer close(done); e.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for ev := range events {
		if ev.Type == EventAttached {
			break
		}
	}
	used := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	await := func(passes uint64) {
		for e.State().Passes < passes {
			time.Sleep(50 * time.Millisecond)
		}
	}
	await(e.State().Passes + 20) // the plans are made
	began, before, passes := time.Now(), used(), e.State().Passes
	for b.Loop() {
		await(e.State().Passes + 200)
	}
	took, cpu, s := time.Since(began), used()-before, e.State()
	n := s.Passes - passes
	b.ReportMetric(100*cpu.Seconds()/took.Seconds(), "%core")
	b.ReportMetric(float64(cpu.Microseconds())/float64(n), "cpu-µs/pass")
	b.ReportMetric(float64(n)/took.Seconds(), "passes/s")
	b.ReportMetric(s.LastPass.BytesPerSec/1e6, "hostMB/s")
}
