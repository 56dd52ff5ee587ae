package hostmem_test

import (
	"bytes"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
)

// everyBurst is an engine option that takes just this long for each burst.
func everyBurst(d time.Duration, depth int) hostmem.EngineOptions {
	return hostmem.EngineOptions{Depth: depth, MinLatency: d, MaxLatency: d, Sleep: time.Sleep}
}

func TestEngineLatency(t *testing.T) {
	const us = time.Microsecond
	for _, c := range []struct {
		name  string
		depth int
		do    func(e *hostmem.Engine) error
		want  time.Duration
	}{
		{"one word", 8, func(e *hostmem.Engine) error { return read(e, 0x8000, 8) }, 100 * us},
		{"a word across two pages", 1, func(e *hostmem.Engine) error { return read(e, 0x8ffc, 8) }, 200 * us},
		{"8 pages side by side", 8, func(e *hostmem.Engine) error { return read(e, 0x8000, 8*page) }, 100 * us},
		{"8 pages through 2 slots", 2, func(e *hostmem.Engine) error { return read(e, 0x8000, 8*page) }, 400 * us},
		{"9 bursts through 8 slots", 8, func(e *hostmem.Engine) error { return read(e, 1<<32, 9*page) }, 200 * us},
		{"two words in turn", 8, func(e *hostmem.Engine) error { return errors.Join(read(e, 0x8000, 8), read(e, 0x9000, 8)) }, 200 * us},
		{"two words scattered", 8, func(e *hostmem.Engine) error {
			return e.ReadScatter([]hostmem.Segment{{Addr: 0x8000, Buf: make([]byte, 8)}, {Addr: 0x9000, Buf: make([]byte, 8)}})
		}, 100 * us},
		{"a write", 8, func(e *hostmem.Engine) error {
			_, err := e.WriteAt(make([]byte, 8), 0x8000)
			return err
		}, 100 * us},
		{"a hole", 8, func(e *hostmem.Engine) error {
			if err := read(e, 0x10000, 8); !errors.Is(err, hostmem.ErrNotMapped) {
				return err
			}
			return nil
		}, 0},
		{"four readers of one slot", 1, func(e *hostmem.Engine) error {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() { _ = read(e, 0x8000, 8) })
			}
			wg.Wait()
			return nil
		}, 400 * us},
	} {
		t.Run(c.name, func(t *testing.T) {
			ram := ramFile(t, true)
			synctest.Test(t, func(t *testing.T) {
				e := hostmem.NewEngine(ram, everyBurst(100*us, c.depth))
				start := time.Now()
				if err := c.do(e); err != nil {
					t.Error(err)
				}
				if got := time.Since(start); got != c.want {
					t.Errorf("took %v; want %v", got, c.want)
				}
			})
		})
	}
}

// In real time a burst takes what was drawn for it, and not the millisecond that Go's timers round to.
func TestEngineKeepsTime(t *testing.T) {
	e := hostmem.NewEngine(ramFile(t, false), hostmem.EngineOptions{Seed: 1})
	const reads = 100
	best := time.Hour
	for range 5 { // the machine may be busy with other things
		start := time.Now()
		for range reads {
			if err := read(e, 0x8000, 8); err != nil {
				t.Fatal(err)
			}
		}
		best = min(best, time.Since(start))
	}
	if best < reads*20*time.Microsecond || best >= reads*time.Millisecond {
		t.Errorf("%d reads took %v at best; the bursts' latencies add up to about %v", reads, best, e.Stats().Transfer/5)
	}
}

func read(mem hostmem.Memory, pa int64, n int) error {
	_, err := mem.ReadAt(make([]byte, n), pa)
	return err
}

func TestEngineDrawsLatencies(t *testing.T) {
	ram := ramFile(t, true)
	times := func(seed uint64) (ds []time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			e := hostmem.NewEngine(ram, hostmem.EngineOptions{Seed: seed, Sleep: time.Sleep})
			for range 500 {
				start := time.Now()
				if err := read(e, 0x8000, 8); err != nil {
					t.Fatal(err)
				}
				ds = append(ds, time.Since(start))
			}
		})
		return ds
	}
	a, b, c := times(1), times(1), times(2)
	if !slices.Equal(a, b) {
		t.Error("one seed gives two series of latencies")
	}
	if slices.Equal(a, c) {
		t.Error("two seeds give one series of latencies")
	}
	if lo, hi := slices.Min(a), slices.Max(a); lo < 20*time.Microsecond || hi > 200*time.Microsecond || lo > 25*time.Microsecond || hi < 195*time.Microsecond {
		t.Errorf("latencies from %v to %v; want 20 to 200 µs", lo, hi)
	}
}

// outcomes returns an engine over RAM of which the burst at each address has an outcome.
func outcomes(t *testing.T, ram hostmem.Memory, m map[hostmem.PhysAddr]hostmem.Outcome) *hostmem.Engine {
	o := everyBurst(50*time.Microsecond, 4)
	o.Timeout = time.Millisecond
	o.Outcome = func(_ string, r hostmem.Range) hostmem.Outcome { return m[r.Start&^(page-1)] }
	return hostmem.NewEngine(ram, o)
}

func TestEngineFaults(t *testing.T) {
	for _, c := range []struct {
		outcome hostmem.Outcome
		want    error
	}{
		{hostmem.NeverEnds, hostmem.ErrTimeout},
		{hostmem.Aborts, hostmem.ErrAborted},
		{hostmem.LosesLink, hostmem.ErrLinkDown},
	} {
		t.Run(c.want.Error(), func(t *testing.T) {
			ram := ramFile(t, true)
			synctest.Test(t, func(t *testing.T) {
				e := outcomes(t, ram, map[hostmem.PhysAddr]hostmem.Outcome{0x9000: c.outcome})
				check := func(op string, k int, err error, wantK int) {
					t.Helper()
					fault, ok := errors.AsType[*hostmem.FaultError](err)
					if !ok || fault.Op != op || !errors.Is(err, c.want) {
						t.Fatalf("%s = %d, %v; want %v", op, k, err, c.want)
					}
					// A lost link takes other bursts with it.
					if c.outcome != hostmem.LosesLink && (k != wantK || fault.Addr != 0x9000 || fault.Len != 2*page-wantK) {
						t.Errorf("%s = %d, %v; want %d", op, k, err, wantK)
					}
				}
				start := time.Now()
				k, err := e.ReadAt(make([]byte, 2*page), 0x8010)
				check("read", k, err, page-0x10)
				if d := time.Since(start); c.outcome == hostmem.NeverEnds && d != time.Millisecond {
					t.Errorf("gave up after %v; want 1 ms", d)
				}
				e.SetLink(true)
				k, err = e.WriteAt(make([]byte, 2*page), 0x8010)
				check("write", k, err, page-0x10)
				e.SetLink(true)
				// What is behind the burst that failed is not stored.
				b, want := make([]byte, 16), make([]byte, 16)
				hostmemtest.Fill(want, 0xa000)
				if _, err := e.ReadAt(b, 0xa000); err != nil || !bytes.Equal(b, want) {
					t.Errorf("a write went on behind its fault: % x, %v", b, err)
				}
				if got := e.Stats(); got.Failed == 0 {
					t.Errorf("Stats() = %+v; want failures", got)
				}
			})
		})
	}
}

func TestEngineScatterHasAnErrorForEachSegment(t *testing.T) {
	e := outcomes(t, ramFile(t, true), map[hostmem.PhysAddr]hostmem.Outcome{0x9000: hostmem.Aborts, 0xb000: hostmem.NeverEnds})
	segs := make([]hostmem.Segment, 5)
	for i := range segs {
		segs[i] = hostmem.Segment{Addr: 0x8000 + hostmem.PhysAddr(i)*page, Buf: make([]byte, 64)}
	}
	if err := e.ReadScatter(segs); !errors.Is(err, hostmem.ErrAborted) {
		t.Errorf("ReadScatter = %v; want the first fault, %v", err, hostmem.ErrAborted)
	}
	for i, want := range []error{nil, hostmem.ErrAborted, nil, hostmem.ErrTimeout, nil} {
		if !errors.Is(segs[i].Err, want) {
			t.Errorf("segment %d: %v; want %v", i, segs[i].Err, want)
		}
	}
}

// Whether a write that timed out arrived is not known: over many both happen.
func TestEngineTimedOutWriteMayHaveArrived(t *testing.T) {
	ram := ramFile(t, true)
	synctest.Test(t, func(t *testing.T) {
		e := outcomes(t, ram, map[hostmem.PhysAddr]hostmem.Outcome{0x9000: hostmem.NeverEnds})
		arrived := 0
		const writes = 64
		for i := range int64(writes) {
			if _, err := e.WriteAt([]byte{0xee}, 0x9000+i*8); !errors.Is(err, hostmem.ErrTimeout) {
				t.Fatalf("WriteAt = %v; want %v", err, hostmem.ErrTimeout)
			}
			b := make([]byte, 1)
			if _, err := ram.ReadAt(b, 0x9000+i*8); err != nil {
				t.Fatal(err)
			}
			if b[0] == 0xee {
				arrived++
			}
		}
		if arrived == 0 || arrived == writes {
			t.Errorf("of %d writes that timed out %d arrived; want some", writes, arrived)
		}
	})
}

func TestEngineLink(t *testing.T) {
	ram := ramFile(t, true)
	ones := bytes.Repeat([]byte{0xff}, page)
	if _, err := ram.WriteAt(ones, 0x9000); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		e := hostmem.NewEngine(ram, everyBurst(50*time.Microsecond, 4))
		if err := read(e, 0x9000, page); err != nil {
			t.Errorf("ReadAt(all-ones) on a good link = %v", err)
		}
		e.SetLink(false)
		if err := read(e, 0x8000, 8); !errors.Is(err, hostmem.ErrLinkDown) {
			t.Errorf("ReadAt with the link down = %v; want %v", err, hostmem.ErrLinkDown)
		}
		if _, err := e.WriteAt([]byte{1, 2, 3}, 0x8000); !errors.Is(err, hostmem.ErrLinkDown) {
			t.Errorf("WriteAt with the link down = %v; want %v", err, hostmem.ErrLinkDown)
		}
		e.SetLink(true)
		got, want := make([]byte, page), make([]byte, page)
		hostmemtest.Fill(want, 0x8000)
		if _, err := e.ReadAt(got, 0x8000); err != nil || !bytes.Equal(got, want) {
			t.Errorf("ReadAt after the link came back = % .8x…, %v; want % .8x…: nothing was written", got, err, want)
		}

		// A link that was down and up again while a burst was under way: its completion counts for nothing.
		errs := make(chan error)
		go func() {
			_, err := e.WriteAt([]byte{1, 2, 3}, 0x8000)
			errs <- err
		}()
		time.Sleep(10 * time.Microsecond)
		e.SetLink(false)
		e.SetLink(true)
		if err := <-errs; !errors.Is(err, hostmem.ErrLinkDown) {
			t.Errorf("WriteAt over a link that flapped = %v; want %v", err, hostmem.ErrLinkDown)
		}
	})
}
