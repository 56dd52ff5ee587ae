package engine

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

// BenchmarkLooks measures what each look of a pass costs by itself: at the memory of a guest that is frozen, so that all see the same, on
// this machine. A look's share of a core is its time by how often it is taken: BenchmarkWatch has the sum.
func BenchmarkLooks(b *testing.B) {
	g := guest.Start(b, "6.1", guest.Options{})
	for range 60 {
		g.Spawn("sleep")
	}
	mem, err := hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), false)
	if err != nil {
		b.Fatal(err)
	}
	defer mem.Close()
	e := New(Options{Logger: slog.New(slog.DiscardHandler), Memory: func(context.Context) (hostmem.Memory, error) { return mem, nil }})
	t, err := e.src.open(b.Context(), mem, kernel.Options{})
	if err != nil {
		b.Fatal(err)
	}
	w := &watcher{e: e, root: b.Context(), mem: mem}
	w.take(b.Context(), t, 0)
	defer w.golden.end()
	for end := time.Now().Add(15 * time.Second); w.golden.g == nil || time.Now().Before(end); { // until there is a series of everything
		if _, err := w.pass(b.Context()); err != nil {
			b.Fatal(err)
		}
		time.Sleep(e.config.Heartbeat)
	}
	g.Execute("stop")

	img := t.image()
	last := w.tasks[len(w.tasks)-1]
	usage := w.usage[len(w.usage)-1]
	ignore := func(_ any, err error) error { return err }
	for _, look := range []struct {
		name string
		see  func(v *kernel.View) error
	}{
		{"view", func(v *kernel.View) error { return nil }},
		{"panic", func(v *kernel.View) error { return ignore(v.Panic()) }},
		{"heartbeat", func(v *kernel.View) error { return ignore(v.Heartbeat()) }},
		{"usage", func(v *kernel.View) error { return ignore(v.Usage()) }},
		{"prove", func(v *kernel.View) error { return t.Prove(b.Context()) }},
		{"tasks", func(v *kernel.View) error { return ignore(taskSample(v, w.tasks)) }},
		{"mapped", func(v *kernel.View) error { mapped(v, last.Tasks, usage.Total); return nil }},
		{"signs", func(v *kernel.View) error { return ignore(v.SignsAmong(last.Tasks)) }},
		{"golden", func(v *kernel.View) error { w.compare(v, time.Now()); return nil }},
		{"pools", func(v *kernel.View) error { return drained(v.WorkerPools()) }},
		{"disks", func(v *kernel.View) error { return drained(v.Disks()) }},
		{"memory use", func(v *kernel.View) error { return ignore(v.MemoryUse()) }},
		{"modules", func(v *kernel.View) error { return drained(v.Modules()) }},
		{"stores", func(v *kernel.View) error { return drained(v.Stores()) }},
		{"links", func(v *kernel.View) error { return drained(v.Links()) }},
		{"cpu times", func(v *kernel.View) error { return ignore(v.CPUTimes()) }},
		{"root", func(v *kernel.View) error { w.lookIntoRoot(v); return nil }},
		{"boot wall", func(v *kernel.View) error { return ignore(v.BootWall()) }},
		{"log", func(v *kernel.View) error { _, _, err := v.LogAfter(w.said, keptSaid); return err }},
		{"memory errors", func(v *kernel.View) error { w.countMemory(v, time.Now()); return nil }},
		{"guards", func(v *kernel.View) error { w.lookAtGuards(v); return nil }},
	} {
		b.Run(look.name, func(b *testing.B) {
			b.ReportAllocs()
			var cost kernel.Cost
			for b.Loop() {
				v := img.View(b.Context())
				if err := look.see(v); err != nil {
					b.Fatal(err)
				}
				cost = v.Cost()
				v.Close()
			}
			b.ReportMetric(float64(cost.Bytes), "hostB/op")
			b.ReportMetric(float64(cost.Reads), "reads/op")
		})
	}
	for i := range e.detectors {
		d := &e.detectors[i]
		b.Run("judge/"+d.ID, func(b *testing.B) {
			b.ReportAllocs()
			v := img.View(b.Context())
			defer v.Close()
			s, err := v.Panic()
			if err != nil {
				b.Fatal(err)
			}
			p := &detect.Pass{Now: time.Now(), View: v, Panic: &s, Beats: w.beats, Usage: w.usage, Tasks: w.tasks, Signs: w.signs, Jams: w.jams, Memory: w.memory}
			if lack := lacking(d, p); lack != "" {
				b.Skip("lacks ", lack)
			}
			for b.Loop() {
				if _, err := d.Detect(b.Context(), p); err != nil && b.N == 1 {
					b.Log(err)
				}
			}
		})
	}
}

func drained[T any](seq func(yield func(T, error) bool)) (err error) {
	seq(func(_ T, e error) bool { err = e; return true })
	return err
}
