package hostmem_test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
)

// A word that is as expected is slept on, another is told at once, over each memory that is mapped and through each wrapper.
func TestSleepIf(t *testing.T) {
	const (
		pa   = 0x1010
		nap  = 20 * time.Millisecond
		long = time.Minute // a sleep that must not begin
	)
	m := hostmemtest.Map()
	for _, c := range []struct {
		name string
		mem  hostmem.Memory
	}{
		{"RAM file", ramFile(t, true)},
		{"RAM file read-only", ramFile(t, false)},
		{"window", newDevice(t, "resource2").open(t, true)},
		{"window read-only", newDevice(t, "resource2_wc").open(t, false)},
		{"guard", hostmem.NewGuard(ramFile(t, true), allowAll)},
		{"narrowed budget", hostmem.Narrow(hostmem.Budget(ramFile(t, true), 1<<20), []hostmem.Range{{Start: 0x1008, Size: 5000}})},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, ok := hostmem.AsSleeper(c.mem)
			if !ok {
				t.Fatal("AsSleeper() = false for memory that is mapped")
			}
			var b [4]byte
			if _, err := c.mem.ReadAt(b[:], pa); err != nil {
				t.Fatal(err)
			}
			v := binary.LittleEndian.Uint32(b[:])
			began := time.Now()
			if was, err := s.SleepIf(pa, v, nap); !was || err != nil {
				t.Errorf("SleepIf(the word as it is) = %v, %v; want true", was, err)
			}
			if took := time.Since(began); took < nap*9/10 { // a signal of the runtime's may end it, but not each time
				if _, _ = s.SleepIf(pa, v, nap); time.Since(began) < nap*9/10 {
					t.Errorf("SleepIf(%v) slept for %v", nap, took)
				}
			}
			if was, err := s.SleepIf(pa, v^1, long); was || err != nil {
				t.Errorf("SleepIf(another word) = %v, %v; want false", was, err)
			}
			if was, err := s.SleepIf(pa, v, -1); !was || err != nil {
				t.Errorf("SleepIf(for less than nothing) = %v, %v; want true at once", was, err)
			}
			if _, err := s.SleepIf(pa+2, v, long); !errors.Is(err, hostmem.ErrUnaligned) {
				t.Errorf("SleepIf(%#x) = %v; want %v", pa+2, err, hostmem.ErrUnaligned)
			}
			for _, outside := range []hostmem.PhysAddr{m[0].End(), ^hostmem.PhysAddr(3)} {
				var fault *hostmem.FaultError
				if _, err := s.SleepIf(outside, v, long); !errors.As(err, &fault) || !errors.Is(err, hostmem.ErrNotMapped) || fault.Addr != outside {
					t.Errorf("SleepIf(%v) = %v; want %v", outside, err, hostmem.ErrNotMapped)
				}
			}
			if w, ok := hostmem.AsWriter(c.mem); ok {
				time.AfterFunc(nap, func() { _, _ = w.WriteAt([]byte{b[0] ^ 1}, pa) })
				for was, deadline := true, time.Now().Add(time.Minute); was; {
					var err error
					if was, err = s.SleepIf(pa, v, time.Millisecond); err != nil || time.Now().After(deadline) {
						t.Fatalf("a word that changes is not seen: %v", err)
					}
				}
			}
		})
	}
}

// Where no processor's load reaches the memory, or the memory is behind a model of what has none, there is nothing to sleep on.
func TestAsSleeper(t *testing.T) {
	for name, mem := range map[string]hostmem.Memory{
		"engine":          hostmem.NewEngine(ramFile(t, true), fast),
		"narrowed engine": hostmem.Narrow(hostmem.NewEngine(ramFile(t, true), fast), hostmemtest.Map()),
		"recording":       recording(t, ramFile(t, false)),
	} {
		if _, ok := hostmem.AsSleeper(mem); ok {
			t.Errorf("AsSleeper(%s) = true", name)
		}
	}
}

// A file that is cut, and a memory that is closed, are errors and no signal.
func TestSleepIfWithoutMemory(t *testing.T) {
	path := writeFile(t, filepath.Join(t.TempDir(), "ram"), make([]byte, 8*page))
	mem, err := hostmem.OpenRAMFile(path, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 2*page); err != nil {
		t.Fatal(err)
	}
	if _, err := mem.SleepIf(3*page, 0, time.Minute); !errors.Is(err, hostmem.ErrLinkDown) {
		t.Errorf("SleepIf behind the new end = %v; want %v", err, hostmem.ErrLinkDown)
	}
	mem.Close()
	if _, err := mem.SleepIf(0, 0, time.Minute); !errors.Is(err, os.ErrClosed) {
		t.Errorf("SleepIf of closed memory = %v; want %v", err, os.ErrClosed)
	}
}
