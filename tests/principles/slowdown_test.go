package principles

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// pairs is how many rounds are compared, one observed and one not.
const pairs = 15

// BenchmarkHostSlowdown measures by the clock what observation costs a host: STREAM's triad, and how late the scheduler wakes a sleeper, in a guest
// whose CPU has one of this machine's to itself, while the agent watches it from the other at its default rate, and at the highest. The rounds with
// and without alternate; the figures are medians of the pairs' ratios (above 1: slower when observed), with their quartiles. "none" compares
// unobserved rounds with each other: the spread that there is anyway. "intruding" is what the others must not look like: an observer that takes the
// guest's own CPU.
func BenchmarkHostSlowdown(b *testing.B) {
	if runtime.NumCPU() < 2 {
		b.Skip("one CPU cannot be left to the guest alone")
	}
	c, err := newCounted(b.Context(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	g, err := c.wall(b)
	if err != nil {
		b.Fatal(err)
	}
	highest := func(ctx context.Context, mem hostmem.Memory) {
		passes := 0
		observe(&passes)(ctx, mem)
	}
	for _, how := range []struct {
		name    string
		observe func(context.Context, hostmem.Memory)
	}{
		{"none", nil},
		{"default", func(ctx context.Context, mem hostmem.Memory) {
			e := engine.New(engine.Options{Memory: func(context.Context) (hostmem.Memory, error) { return mem, nil }})
			_ = e.Run(ctx) // it ends with ctx
		}},
		{"highest", highest},
		{"intruding", highest},
	} {
		b.Run(how.name, func(b *testing.B) {
			if how.name == "intruding" {
				if err := moved(0); err != nil {
					b.Fatal(err)
				}
				defer moved(1)
			}
			gate := &gated{Memory: g.mem}
			gate.mu.Lock()
			if how.observe != nil {
				ctx, cancel := context.WithCancel(b.Context())
				done := make(chan struct{})
				go func() { defer close(done); how.observe(ctx, gate) }()
				defer func() { cancel(); gate.mu.Unlock(); <-done }()
				gate.mu.Unlock()
				// It is attached then, or nearly so.
				for end := time.Now().Add(time.Minute); gate.reads.Load() < 20000 && time.Now().Before(end); {
					time.Sleep(10 * time.Millisecond)
				}
				gate.mu.Lock()
			}
			var triad, median, tail []float64
			for b.Loop() {
				for i := range pairs {
					var got [2]wallRound
					for j := range got {
						observed := (i+j)%2 == 1 // which comes first alternates, too
						if observed {
							gate.mu.Unlock()
						}
						r, err := g.round()
						if observed {
							gate.mu.Lock()
						}
						if err != nil {
							b.Fatal(err)
						}
						got[map[bool]int{true: 1}[observed]] = r
					}
					triad = append(triad, got[0].rate/got[1].rate)
					median = append(median, got[1].median/got[0].median)
					tail = append(tail, got[1].tail/got[0].tail)
				}
			}
			if n := gate.reads.Load(); how.observe != nil {
				b.Logf("%d reads", n)
			}
			for name, all := range map[string][]float64{"triad": triad, "wakeup": median, "wakeup95": tail} {
				slices.Sort(all)
				b.ReportMetric(all[len(all)/2], name+"-x")
				b.ReportMetric(all[len(all)/4], name+"-x-q1")
				b.ReportMetric(all[len(all)*3/4], name+"-x-q3")
			}
			if slower := triad[len(triad)/2]; how.name == "intruding" && slower < 1.2 {
				b.Errorf("an observer on the guest's own CPU slows it down %.2f times only: this measures nothing", slower)
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// wallRound is what a guest has measured: MB/s, and ns.
type wallRound struct{ rate, median, tail float64 }

// walled is a guest that measures by the clock.
type walled struct {
	mem   hostmem.Memory
	start func() error
	said  *bufio.Scanner
}

// wall starts the guest, alone on the first CPU of this machine. It ends with the benchmark.
func (c *counted) wall(b *testing.B) (*walled, error) {
	ram := filepath.Join(c.dir, "wall-ram")
	f, err := os.Create(ram)
	if err == nil {
		err = errors.Join(f.Truncate(countedRAM<<20), f.Close())
	}
	if err != nil {
		return nil, err
	}
	q := exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,memory-backend=ram0", "-object", fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=%s,share=on", countedRAM, ram),
		"-m", strconv.Itoa(countedRAM), "-smp", "1", "-cpu", "max", "-accel", "tcg", "-serial", "stdio", "-kernel", c.vmlinuz, "-initrd", c.initramfs,
		"-append", "console=ttyS0,115200 quiet panic=-1 no_timer_check tsc=reliable counted.wall=1")
	q.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	q.Stderr = os.Stderr
	in, err := q.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := q.StdoutPipe()
	if err != nil {
		return nil, err
	}
	runtime.LockOSThread() // Pdeathsig is of this thread
	// What this thread starts stays on its CPU; this program goes to the other.
	if err := pinned(0, q.Start); err != nil {
		return nil, err
	}
	b.Cleanup(func() { q.Process.Kill(); q.Wait() })
	if err := moved(1); err != nil {
		return nil, err
	}
	w := &walled{start: func() error { _, err := fmt.Fprintln(in); return err }, said: bufio.NewScanner(out)}
	if _, err := w.answer("counted: ready"); err != nil {
		return nil, err
	}
	if w.mem, err = hostmem.OpenRAMFile(ram, hostmem.Q35Layout(countedRAM<<20), false); err != nil {
		return nil, err
	}
	b.Cleanup(func() { w.mem.Close() })
	return w, nil
}

func cpus(n int) *unix.CPUSet {
	var s unix.CPUSet
	s.Set(n)
	return &s
}

// moved has this program run on a CPU.
func moved(cpu int) error {
	threads, err := os.ReadDir("/proc/self/task") // those to come take after them
	if err != nil {
		return err
	}
	for _, t := range threads {
		tid, err := strconv.Atoi(t.Name())
		if err == nil {
			err = unix.SchedSetaffinity(tid, cpus(cpu))
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// pinned runs f with this thread on a CPU.
func pinned(cpu int, f func() error) error {
	var old unix.CPUSet
	if err := unix.SchedGetaffinity(0, &old); err != nil {
		return err
	}
	if err := unix.SchedSetaffinity(0, cpus(cpu)); err != nil {
		return err
	}
	return errors.Join(f(), unix.SchedSetaffinity(0, &old))
}

// answer waits for a line that begins so, and returns its rest.
func (w *walled) answer(begin string) (string, error) {
	for w.said.Scan() {
		if _, rest, ok := strings.Cut(w.said.Text(), begin); ok {
			return rest, nil
		}
	}
	return "", fmt.Errorf("the guest has ended: %w", w.said.Err())
}

// round has the guest measure once.
func (w *walled) round() (r wallRound, err error) {
	if err := w.start(); err != nil {
		return r, err
	}
	text, err := w.answer("counted: round ")
	if err != nil {
		return r, err
	}
	_, err = fmt.Sscan(text, &r.rate, &r.median, &r.tail)
	return r, err
}

// gated is memory that can be read only while mu is free. It is not closed with its reader.
type gated struct {
	hostmem.Memory
	mu    sync.RWMutex
	reads atomic.Int64
}

func (g *gated) ReadAt(b []byte, at int64) (int, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	g.reads.Add(1)
	return g.Memory.ReadAt(b, at)
}

func (g *gated) Close() error { return nil }
