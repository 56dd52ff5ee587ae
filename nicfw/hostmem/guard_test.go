package hostmem_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
)

// stored tells whether the memory differs from the pattern at pa.
func stored(t *testing.T, mem hostmem.Memory, pa int64) bool {
	t.Helper()
	got, want := make([]byte, 8), make([]byte, 8)
	hostmemtest.Fill(want, hostmem.PhysAddr(pa))
	if _, err := mem.ReadAt(got, pa); err != nil {
		t.Fatal(err)
	}
	return !slices.Equal(got, want)
}

func TestGuardWithoutRuleRefusesAll(t *testing.T) {
	ram := ramFile(t, true)
	g := hostmem.NewGuard(ram, nil)
	if _, err := g.WriteAt(make([]byte, 8), 0x8000); !errors.Is(err, hostmem.ErrReadOnly) || stored(t, ram, 0x8000) {
		t.Errorf("WriteAt = %v; want %v and nothing stored", err, hostmem.ErrReadOnly)
	}
	s, ok := hostmem.AsSwapper(g)
	if !ok {
		t.Fatal("no Swapper")
	}
	if _, err := s.CompareAndSwap(0x8000, 0, 0); !errors.Is(err, hostmem.ErrReadOnly) {
		t.Errorf("CompareAndSwap = %v; want %v", err, hostmem.ErrReadOnly)
	}
	if got, want := g.Stores(), (hostmem.Stores{Refused: 2}); got != want {
		t.Errorf("Stores() = %+v; want %+v", got, want)
	}
}

func TestGuardAsksBeforeEachStore(t *testing.T) {
	ram := ramFile(t, true)
	errNo := errors.New("not in the agreement")
	var asked []string
	g := hostmem.NewGuard(ram, func(op string, r hostmem.Range) error {
		asked = append(asked, fmt.Sprintf("%s %v+%d", op, r.Start, r.Size))
		if stored(t, ram, int64(r.Start)) {
			t.Errorf("%s at %v: stored before the question", op, r.Start)
		}
		if r.Start >= 0x9000 {
			return errNo
		}
		return nil
	})
	if _, err := g.WriteAt(make([]byte, 20), 0x8000); err != nil || !stored(t, ram, 0x8000) {
		t.Errorf("allowed WriteAt = %v", err)
	}
	if k, err := g.WriteAt(make([]byte, 20), 0x9000); k != 0 || !errors.Is(err, errNo) || stored(t, ram, 0x9000) {
		t.Errorf("forbidden WriteAt = %d, %v; want %v and nothing stored", k, err, errNo)
	}
	if fault, ok := errors.AsType[*hostmem.FaultError](func() error { _, err := g.WriteAt(make([]byte, 20), 0x9000); return err }()); !ok || fault.Addr != 0x9000 || fault.Len != 20 {
		t.Errorf("the refusal is %+v; want a fault of 20 bytes at 0x9000", fault)
	}
	s, _ := hostmem.AsSwapper(g)
	if _, err := s.CompareAndSwap(0x9008, 0, 0); !errors.Is(err, errNo) {
		t.Errorf("forbidden CompareAndSwap = %v; want %v", err, errNo)
	}
	prev, err := s.CompareAndSwap(0x8800, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.CompareAndSwap(0x8800, prev, 2); got != prev || err != nil {
		t.Errorf("allowed CompareAndSwap = %#x, %v; want %#x", got, err, prev)
	}
	// What is not RAM is refused without a question.
	if _, err := g.WriteAt(make([]byte, 8), 0x10000); !errors.Is(err, hostmem.ErrNotMapped) {
		t.Errorf("WriteAt in a hole = %v; want %v", err, hostmem.ErrNotMapped)
	}
	want := []string{
		"write 0x8000+20", "write 0x9000+20", "write 0x9000+20",
		"compare-and-swap 0x9008+8", "compare-and-swap 0x8800+8", "compare-and-swap 0x8800+8",
	}
	if !slices.Equal(asked, want) {
		t.Errorf("asked %q; want %q", asked, want)
	}
	if got, want := g.Stores(), (hostmem.Stores{Writes: 1, Swaps: 2, Bytes: 28, Refused: 3}); got != want {
		t.Errorf("Stores() = %+v; want %+v", got, want)
	}
}

func TestGuardOverWhatCannotStore(t *testing.T) {
	g := hostmem.NewGuard(ramFile(t, false), allowAll)
	if _, err := g.WriteAt(make([]byte, 8), 0x8000); !errors.Is(err, hostmem.ErrReadOnly) {
		t.Errorf("WriteAt = %v; want %v", err, hostmem.ErrReadOnly)
	}
	if _, ok := hostmem.AsSwapper(g); ok {
		t.Error("AsSwapper of a guard over a read-only memory is true")
	}
	e := hostmem.NewGuard(hostmem.NewEngine(ramFile(t, true), hostmem.EngineOptions{
		Outcome: func(string, hostmem.Range) hostmem.Outcome { return hostmem.Aborts },
	}), allowAll)
	if _, err := e.WriteAt(make([]byte, 8), 0x8000); !errors.Is(err, hostmem.ErrAborted) {
		t.Errorf("WriteAt over an engine that fails = %v; want %v", err, hostmem.ErrAborted)
	}
	if got, want := e.Stores(), (hostmem.Stores{Failed: 1}); got != want {
		t.Errorf("Stores() = %+v; want %+v", got, want)
	}
}
