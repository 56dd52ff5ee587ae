package kernel

import (
	"context"
	"errors"
	"flag"
	"os"
	"runtime"
	"slices"
	"strings"
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
			v.Close()
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

// crowded starts the guest of -guests with 1 GiB, something of everything, and a thousand tasks, and freezes it.
func crowded(b *testing.B) (*guest, *Image) {
	if *guestsFlag == "" || strings.Contains(*guestsFlag, ",") {
		b.Skip("boots a kernel in QEMU: say which by -guests")
	}
	g := startObjects(b, *guestsFlag, guestOptions{mib: 1024})
	img := g.attach(Options{})
	for n := 0; n < 1000; {
		g.ask(nil, "spawn sleep 25")
		var err error
		if n, err = drain(img.View(b.Context()).Tasks()); err != nil {
			b.Log(err)
		}
	}
	time.Sleep(3 * time.Second) // until they have come to rest
	g.execute("stop")
	return g, img
}

// late is a memory of which each access takes a while, whatever it brings, and each page of it a little longer.
type late struct {
	hostmem.Memory
	trip, page time.Duration
}

func (m late) wait(pages int) {
	for end := time.Now().Add(m.trip + time.Duration(pages)*m.page); time.Now().Before(end); {
	}
}

func (m late) ReadAt(b []byte, off int64) (int, error) {
	m.wait(1)
	return m.Memory.ReadAt(b, off)
}

func (m late) ReadScatter(segs []hostmem.Segment) error {
	m.wait(len(segs))
	return hostmem.ReadScatter(m.Memory, segs)
}

// BenchmarkCrowd lists a thousand tasks: near; over a model of RDMA with round trips of 100 µs and 1 GB/s, ahead of the list and by the list
// alone; and through the model of a DMA engine.
//
//	go test ./agent/kernel -run '^$' -bench 'Crowd|Model' -guests 6.1
func BenchmarkCrowd(b *testing.B) {
	g, img := crowded(b)
	far := late{g.mem, 100 * time.Microsecond, 4 * time.Microsecond}
	for _, c := range []struct {
		name string
		mem  hostmem.Memory
	}{{"near", img.mem}, {"far", far}, {"far-one-by-one", struct{ hostmem.Memory }{far}}, {"engine", hostmem.NewEngine(g.mem, hostmem.EngineOptions{})}} {
		b.Run(c.name, func(b *testing.B) {
			n, cost := 0, Cost{}
			for b.Loop() {
				v := img.with(c.mem).View(b.Context())
				var err error
				if n, err = drain(v.Tasks()); err != nil {
					b.Fatal(err)
				}
				cost = v.Cost()
			}
			b.ReportMetric(float64(n), "tasks")
			b.ReportMetric(float64(cost.Pages), "pages/op")
			b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N)*1000/float64(n), "ms/1000tasks")
		})
	}
}

// BenchmarkReattach attaches again to a kernel that is known from before and idle, through the model of a DMA engine.
func BenchmarkReattach(b *testing.B) {
	g, img := crowded(b)
	idle, cache := img.Hint(), new(Cache)
	idle.Mono -= int64(time.Minute)
	engine := hostmem.NewEngine(g.mem, hostmem.EngineOptions{})
	var reads uint64
	again := func() {
		idle.At = time.Now().Add(-time.Minute)
		before := engine.Stats().Bursts
		if _, err := Open(b.Context(), engine, Options{Hint: idle, Cache: cache}); err != nil {
			b.Fatal(err)
		}
		reads = engine.Stats().Bursts - before
	}
	again()
	for b.Loop() {
		again()
	}
	b.ReportMetric(float64(reads), "bursts/op")
}

// BenchmarkModel measures a pass over all that the model has, and all of it for each thread and process. What is alive then is "heapMB".
func BenchmarkModel(b *testing.B) {
	_, img := crowded(b)
	parts := slices.Concat(listings, objectListings, []listing{
		{"log", func(v *View) (int, error) { return drain(v.Log()) }},
		{"IPv6 routes", func(v *View) (int, error) { return drain(v.Routes6()) }},
		{"signs", func(v *View) (int, error) {
			_, err := v.Signs()
			return 1, err
		}},
		{"processes", func(v *View) (int, error) {
			return eachTask(v, func(t Task) error { _, err := v.Process(t.PID); return err })
		}},
		{"all stacks", func(v *View) (int, error) {
			return eachTask(v, func(t Task) error {
				if t.OnCPU || t.State == "Z" {
					return nil
				}
				_, err := v.Stack(t.PID)
				return err
			})
		}},
		{"mappings", func(v *View) (int, error) {
			return eachTask(v, func(t Task) error {
				if t.PID != t.TGID || t.KThread || t.State == "Z" {
					return nil
				}
				m, err := v.UserMemory(t.PID)
				if err == nil {
					_, err = drain(m.Mappings())
				}
				return err
			})
		}},
	})
	took := make(map[string]time.Duration)
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		v := img.View(context.Background())
		n = 0
		for _, l := range parts {
			began := time.Now()
			items, err := l.ask(v)
			if n += items; err != nil {
				b.Logf("%s: %v", l.name, err)
			}
			took[l.name] += time.Since(began)
		}
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		b.ReportMetric(float64(m.HeapAlloc)/(1<<20), "heapMB")
		b.ReportMetric(float64(v.Cost().Pages), "pages/op")
		b.ReportMetric(float64(v.Cost().Bytes)/(1<<20), "hostMB/op")
	}
	b.ReportMetric(float64(n), "things")
	for name, d := range took {
		if d /= time.Duration(b.N); d > 5*time.Millisecond {
			b.Logf("%-14s %v", name, d.Round(10*time.Microsecond))
		}
	}
}

// eachTask calls f for each thread, and returns how many there are.
func eachTask(v *View, f func(Task) error) (n int, last error) {
	for t, err := range v.Tasks() {
		if err == nil {
			err = f(t)
		}
		n++
		if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrNotSupported) {
			last = err
		}
	}
	return n, last
}

func BenchmarkPanic(b *testing.B) {
	benchmarkPass(b, "kernels", func(v *View) (int, error) {
		_, err := v.Panic()
		return 1, err
	})
}

func BenchmarkUsage(b *testing.B) {
	benchmarkPass(b, "threads", func(v *View) (int, error) {
		u, err := v.Usage()
		return u.Threads, err
	})
}

func BenchmarkSigns(b *testing.B) {
	benchmarkPass(b, "missing", func(v *View) (int, error) {
		s, err := v.Signs()
		return len(s.Missing), err
	})
}
