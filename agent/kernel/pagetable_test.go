package kernel

import (
	"context"
	"errors"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// tables makes page tables of the given levels that map three addresses: a page of 4 KiB, one of 2 MiB, one of 1 GiB.
func tables(levels int) (flat, *addressSpace, map[VirtAddr]hostmem.PhysAddr) {
	m := make(flat, 16*4096)
	root := 4096
	if levels == 5 {
		m.put64(root+8*0x1ff, 2*4096|x8664Present) // P4D
		root = 2 * 4096
	}
	m.put64(root+8*0x1ff, 3*4096|x8664Present)                         // PUD of 0xffffff8000000000
	m.put64(3*4096+8*0, 4*4096|x8664Present)                           // PMD
	m.put64(3*4096+8*1, 0x40000000|x8664Present|x8664Huge)             // 1 GiB
	m.put64(4*4096+8*0, 5*4096|x8664Present)                           // PTE
	m.put64(4*4096+8*1, 0x00600000|x8664Present|x8664Huge|1<<63|1<<12) // 2 MiB, NX, PAT
	m.put64(4*4096+8*2, 0x0007fffffff000|x8664Present)                 // a table where no memory is
	m.put64(5*4096+8*3, 7*4096|x8664Present|1<<63)                     // 4 KiB, NX
	copy(m[7*4096:], "here")
	s := &addressSpace{kernel: 0xff00000000000000, root: 4096, levels: x8664Levels(levels)}
	return m, s, map[VirtAddr]hostmem.PhysAddr{
		0xffffff8000003010: 7*4096 + 0x10,
		0xffffff8000234567: 0x00600000 + 0x34567,
		0xffffff8052345678: 0x40000000 + 0x12345678,
	}
}

func TestWalk(t *testing.T) {
	for _, levels := range []int{4, 5} {
		m, s, want := tables(levels)
		src := direct{context.Background(), m}
		for va, pa := range want {
			if got, n, err := s.translate(src, va); err != nil || got != pa || n == 0 {
				t.Errorf("%d levels: translate(%v) = %v, %d, %v; want %v", levels, va, got, n, err, pa)
			}
		}
		for _, va := range []VirtAddr{0xffffff8000004000, 0, 0xffffffffffffffff} {
			if got, _, err := s.translate(src, va); !errors.Is(err, ErrNotMapped) {
				t.Errorf("%d levels: translate(%v) = %v, %v; want ErrNotMapped", levels, va, got, err)
			}
		}
		var corrupt *CorruptError
		if _, _, err := s.translate(src, 0xffffff8000400000); !errors.As(err, &corrupt) {
			t.Errorf("%d levels: a table in a hole: %v; want a *CorruptError", levels, err)
		}
		b := make([]byte, 4)
		if err := s.read(src, 0xffffff8000003000, b); err != nil || string(b) != "here" {
			t.Errorf("read = %q, %v", b, err)
		}
		if err := s.read(src, 0xffffff8000003ffe, b); !errors.Is(err, ErrNotMapped) {
			t.Errorf("read across the end = %v; want ErrNotMapped", err)
		}
	}
}

func FuzzPageTable(f *testing.F) {
	m, _, want := tables(5)
	for va := range want {
		f.Add([]byte(m), uint64(va), true)
	}
	f.Fuzz(func(t *testing.T, memory []byte, va uint64, five bool) {
		s := &addressSpace{kernel: 0xff00000000000000, root: 4096, levels: x8664Levels(4)}
		if five {
			s.levels = x8664Levels(5)
		}
		src := direct{context.Background(), flat(memory)}
		_, n, err := s.translate(src, VirtAddr(va))
		if err == nil && n == 0 {
			t.Error("nothing is mapped, without an error")
		}
		b := make([]byte, 64)
		if err := s.object(src, "thing", VirtAddr(va), b); err == nil && len(memory) == 0 {
			t.Error("read from no memory")
		}
	})
}
