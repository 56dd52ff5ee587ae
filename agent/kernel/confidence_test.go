package kernel

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
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
			v = img.with(&second{Memory: rec.Frame(frameAlive), at: pa, n: 4}).View(t.Context())
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

// second is a memory in which a word of n bytes is another whenever it is read alone: the second look at a task is such.
type second struct {
	hostmem.Memory
	at hostmem.PhysAddr
	n  int
}

func (m *second) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.Memory.ReadAt(b, off)
	if off == int64(m.at) && len(b) == m.n {
		binary.LittleEndian.PutUint32(b, 3999999)
	}
	return n, err
}

// TestLocksMove has a task that waits for a lock run between the two looks at it: it must not be told that it waits, nor be as sure.
func TestLocksMove(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		if !slices.Contains(objectKernels, name) {
			return
		}
		img, mem := openRecorded(t, rec)
		v := img.View(t.Context())
		var victim LockWaiter
		waiting := func(v *View, pid int) (n int) {
			for l, err := range v.Locks() {
				if err != nil {
					t.Fatal(err)
				}
				for _, w := range l.Waiters {
					if victim.PID == 0 {
						victim = w
					}
					if w.PID == pid {
						n++
					}
				}
			}
			return n
		}
		waiting(v, 0)
		if waiting(v, victim.PID) != 1 || v.Confidence().Level() != HighConfidence {
			t.Fatalf("%s: %+v, %v", name, victim, v.Confidence())
		}
		pa, err := v.Phys(victim.Addr + VirtAddr(img.lay.task.nvcsw))
		if err != nil {
			t.Fatal(err)
		}
		v = img.with(&second{Memory: mem, at: pa, n: 8}).View(t.Context())
		if n := waiting(v, victim.PID); n != 0 || v.Confidence().Level() != LowConfidence || v.Confidence().Changed != 1 {
			t.Errorf("%s: PID %d, which ran meanwhile, waits %d times, %v", name, victim.PID, n, v.Confidence())
		}
	})
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
