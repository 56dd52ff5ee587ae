package kernel

import (
	"context"
	"flag"
	"os"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

var ramFlag = flag.String("ram", "", "RAM `file` of a running q35 guest to measure on, as well as on the recordings")

// benchmarked calls f for the RAM file of -ram and for each recording.
func benchmarked(b *testing.B, f func(b *testing.B, mem hostmem.Memory, note hostmem.PhysAddr)) {
	if *ramFlag != "" {
		fi, err := os.Stat(*ramFlag)
		if err != nil {
			b.Fatal(err)
		}
		mem, err := hostmem.OpenRAMFile(*ramFlag, hostmem.Q35Layout(uint64(fi.Size())), false)
		if err != nil {
			b.Fatal(err)
		}
		defer mem.Close()
		img, err := Open(context.Background(), mem, Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.Run("ram", func(b *testing.B) { f(b, mem, img.Info().Note) })
		b.Run("engine", func(b *testing.B) {
			f(b, hostmem.NewEngine(mem, hostmem.EngineOptions{}), img.Info().Note)
		})
	}
	recorded(b, func(name string, rec *hostmem.Recording) {
		img, mem := openRecorded(b, rec)
		b.Run(name, func(b *testing.B) { f(b, mem, img.Info().Note) })
	})
}

func BenchmarkAttach(b *testing.B) {
	benchmarked(b, func(b *testing.B, mem hostmem.Memory, note hostmem.PhysAddr) {
		img, err := Open(context.Background(), mem, Options{Hint: Hint{Note: note}, NoteOnly: true})
		if err != nil {
			b.Fatal(err)
		}
		// As if a minute had gone by since the clock was read: what an agent knows of an idle host when it comes back.
		idle := img.Hint()
		idle.Mono -= int64(time.Minute)
		idle.At = time.Now().Add(-time.Minute)
		cache := new(Cache)
		for name, o := range map[string]Options{"cold": {}, "note": {Hint: Hint{Note: note}, NoteOnly: true},
			"build": {Hint: Hint{Note: note}, NoteOnly: true, Cache: cache}, "idle": {Hint: idle, Cache: cache}} {
			b.Run(name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if name == "idle" {
						o.Hint.At = time.Now().Add(-time.Minute) // the image's clock stands still
					}
					if _, err := Open(context.Background(), mem, o); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	})
}

// benchmarkPass measures a pass of which n returns the number of things seen.
func benchmarkPass(b *testing.B, what string, pass func(*View) (n int, err error)) {
	benchmarked(b, func(b *testing.B, mem hostmem.Memory, note hostmem.PhysAddr) {
		img, err := Open(context.Background(), mem, Options{Hint: Hint{Note: note}, NoteOnly: true})
		if err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		n, cost := 0, Cost{}
		for b.Loop() {
			v := img.View(context.Background())
			if n, err = pass(v); err != nil {
				b.Fatal(err)
			}
			cost = v.Cost()
		}
		b.ReportMetric(float64(n), what)
		b.ReportMetric(float64(cost.Bytes), "hostB/op")
		b.ReportMetric(float64(cost.Reads), "reads/op")
	})
}

func BenchmarkHeartbeat(b *testing.B) {
	benchmarkPass(b, "cpus", func(v *View) (int, error) {
		h, err := v.Heartbeat()
		return len(h.CPUs), err
	})
}

func BenchmarkTasks(b *testing.B) {
	benchmarkPass(b, "tasks", func(v *View) (n int, last error) {
		for _, err := range v.Tasks() {
			n, last = n+1, err
		}
		return n, last
	})
}

func BenchmarkLog(b *testing.B) {
	benchmarkPass(b, "records", func(v *View) (n int, last error) {
		for _, err := range v.Log() {
			n, last = n+1, err
		}
		return n, last
	})
}

func BenchmarkProve(b *testing.B) {
	benchmarkPass(b, "kernels", func(v *View) (int, error) { return 1, v.img.Prove(v.ctx) })
}
