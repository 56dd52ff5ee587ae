package kernel

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

func TestConfidence(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			img, _ := openRecorded(t, rec)
			v := img.View(t.Context())
			if c := v.Confidence(); c.Level() == "high" {
				t.Errorf("before any answer: %v", c)
			}
			n, err := drain(v.Tasks())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := v.Heartbeat(); err != nil {
				t.Fatal(err)
			}
			if c := v.Confidence(); c.Level() != "high" || c.Twice != n || c.Lists != 1 || c.Clocks != 1 || c.Changed+c.Restarts+c.Broken != 0 {
				t.Errorf("of a frozen host: %v (%+v)", c, c)
			}

			// A task that has another PID at the second look.
			pid := img.lay.task.pid
			var victim Task
			for victim = range img.View(t.Context()).Tasks() {
				break
			}
			pa, err := v.Phys(victim.Addr + VirtAddr(pid))
			if err != nil {
				t.Fatal(err)
			}
			v = img.with(&second{Memory: rec.Frame(frameAlive), at: pa}).View(t.Context())
			doubtful := 0
			for task, err := range v.Tasks() {
				if err != nil {
					t.Fatal(err)
				}
				if !task.Confident {
					doubtful++
				}
			}
			if c := v.Confidence(); c.Level() != "low" || c.Changed != 1 || doubtful != 1 {
				t.Errorf("with a task that changed: %v, %d doubtful", c, doubtful)
			}

			// A list that does not close is begun anew, and given up when it is broken in the same way.
			init := img.lay.task.init + VirtAddr(img.lay.task.tasks)
			if pa, err = v.Phys(init); err != nil {
				t.Fatal(err)
			}
			broken := overlay{rec.Frame(frameAlive), make(map[hostmem.PhysAddr]byte)}
			for i, b := range binary.LittleEndian.AppendUint64(nil, 0x1234) {
				broken.bytes[pa+hostmem.PhysAddr(i)] = b
			}
			v = img.with(broken).View(t.Context())
			if _, err := drain(v.Tasks()); err == nil {
				t.Error("a broken list has an end")
			}
			if c := v.Confidence(); c.Level() != "low" || c.Restarts == 0 || c.Broken != 1 {
				t.Errorf("of a broken list: %v", c)
			}
		})
	})
}

// second is a memory in which a word of 4 bytes is another whenever it is read alone: the second look at a task is such.
type second struct {
	hostmem.Memory
	at hostmem.PhysAddr
}

func (m *second) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.Memory.ReadAt(b, off)
	if off == int64(m.at) && len(b) == 4 {
		binary.LittleEndian.PutUint32(b, 3999999)
	}
	return n, err
}

// TestViewsAtOnce asks many Views, and one View many times, at the same time.
func TestViewsAtOnce(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		img, _ := openRecorded(t, rec)
		want, err := drain(img.View(t.Context()).Tasks())
		if err != nil {
			t.Fatal(err)
		}
		shared := img.View(t.Context())
		var wg sync.WaitGroup
		var bad atomic.Pointer[string]
		for i := range 16 {
			wg.Go(func() {
				v := shared
				if i%2 == 0 {
					v = img.View(t.Context())
				}
				n, err := drain(v.Tasks())
				_, beat := v.Heartbeat()
				_, memory := v.MemoryUse()
				modules, list := drain(v.Modules())
				if n != want || modules == 0 || err != nil || beat != nil || memory != nil || list != nil {
					s := fmt.Sprintf("%d tasks, %d modules, %v, %v, %v, %v", n, modules, err, beat, memory, list)
					bad.Store(&s)
				}
			})
		}
		wg.Wait()
		if s := bad.Load(); s != nil {
			t.Errorf("%s: %s; want %d tasks", name, *s, want)
		}
		cost := shared.Cost()
		if alone := img.View(t.Context()); true {
			if _, err := drain(alone.Tasks()); err != nil || cost.Pages < alone.Cost().Pages {
				t.Errorf("%s: %+v together, %+v alone, %v", name, cost, alone.Cost(), err)
			}
		}
	})
}

// BenchmarkViewsAtOnce measures passes over the tasks from one and from all CPUs; the figure is of one pass.
func BenchmarkViewsAtOnce(b *testing.B) {
	benchmarked(b, func(b *testing.B, mem hostmem.Memory, note hostmem.PhysAddr) {
		img, err := Open(context.Background(), mem, Options{Hint: Hint{Note: note}, NoteOnly: true})
		if err != nil {
			b.Fatal(err)
		}
		pass := func() error {
			_, err := drain(img.View(context.Background()).Tasks())
			return err
		}
		b.Run("one", func(b *testing.B) {
			for b.Loop() {
				if err := pass(); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("all", func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := pass(); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	})
}
