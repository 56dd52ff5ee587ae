package hostmem_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// benchMemories returns a RAM file of 16 MiB in memory, and a window on the same bytes.
func benchMemories(b *testing.B) map[string]hostmem.Memory {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "hostmem")
	if err != nil {
		b.Skipf("no tmpfs to measure on: %v", err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	d := device{sysfs: dir, dir: filepath.Join(dir, "bus/pci/devices/0000:00:04.0")}
	data := make([]byte, 16<<20)
	for i := range data {
		data[i] = byte(i * 31)
	}
	d.bar = writeFile(b, filepath.Join(d.dir, "resource2"), data)
	writeFile(b, filepath.Join(d.dir, "vendor"), []byte("0x1af4\n"))
	writeFile(b, filepath.Join(d.dir, "device"), []byte("0x1110\n"))
	writeFile(b, filepath.Join(d.dir, "enable"), []byte("1\n"))
	d.setConfig(b, goodConfig())
	ram, err := hostmem.OpenRAMFile(d.bar, nil, true)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { ram.Close() })
	return map[string]hostmem.Memory{"RAM file": ram, "window": d.open(b, true)}
}

func BenchmarkReadAt(b *testing.B) {
	for name, mem := range benchMemories(b) {
		for _, n := range []int{8, 256, page, 16 * page, 1 << 20} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				buf := make([]byte, n)
				b.SetBytes(int64(n))
				for i := 0; b.Loop(); i++ {
					if _, err := mem.ReadAt(buf, int64(i*n)&(8<<20-1)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkWriteAt(b *testing.B) {
	for name, mem := range benchMemories(b) {
		w, _ := hostmem.AsWriter(mem)
		for _, n := range []int{8, page} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				buf := make([]byte, n)
				b.SetBytes(int64(n))
				for i := 0; b.Loop(); i++ {
					if _, err := w.WriteAt(buf, int64(i*n)&(8<<20-1)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkCompareAndSwap(b *testing.B) {
	for name, mem := range benchMemories(b) {
		b.Run(name, func(b *testing.B) {
			s, ok := hostmem.AsSwapper(mem)
			if !ok {
				b.Skip("this build cannot swap through it")
			}
			old, err := s.CompareAndSwap(4096, 0, 0)
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if old, err = s.CompareAndSwap(4096, old, old+1); err != nil {
					b.Fatal(err)
				}
				old++
			}
		})
	}
}

// BenchmarkEngine reads 64 words that lie in 64 pages, in turn and scattered, and a whole MiB; real time, 20 to 200 µs a burst.
func BenchmarkEngine(b *testing.B) {
	mem := benchMemories(b)["RAM file"]
	segs := make([]hostmem.Segment, 64)
	for i := range segs {
		segs[i] = hostmem.Segment{Addr: hostmem.PhysAddr(i * 5 * page), Buf: make([]byte, 8)}
	}
	for _, c := range []struct {
		name string
		do   func(e *hostmem.Engine) error
	}{
		{"64 words in turn", func(e *hostmem.Engine) error {
			for i := range segs {
				if _, err := e.ReadAt(segs[i].Buf, int64(segs[i].Addr)); err != nil {
					return err
				}
			}
			return nil
		}},
		{"64 words scattered", func(e *hostmem.Engine) error { return e.ReadScatter(segs) }},
		{"page", func(e *hostmem.Engine) error { return read(e, 0, page) }},
		{"MiB", func(e *hostmem.Engine) error { return read(e, 0, 1<<20) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			e := hostmem.NewEngine(mem, hostmem.EngineOptions{Seed: 1})
			for b.Loop() {
				if err := c.do(e); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(e.Stats().Transfer/time.Duration(e.Stats().Bursts))/1e3, "µs/burst")
		})
	}
}
