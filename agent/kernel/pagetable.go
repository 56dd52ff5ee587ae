package kernel

import (
	"errors"
	"fmt"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// source is physical memory as a pass reads it: through a View's cache, or fresh.
type source interface {
	readPhys(pa hostmem.PhysAddr, b []byte) error
}

// addressSpace is how a kernel lays out its virtual addresses. It is made by an architecture and says nothing that the
// memory did not prove: the linear ranges are checked against the page tables when the kernel is attached.
type addressSpace struct {
	linear []linearRange    // mapped without holes: no walk is needed
	kernel VirtAddr         // lowest address of the kernel's half
	root   hostmem.PhysAddr // of the top page table
	levels []tableLevel     // from the root down
}

// linearRange maps [start, end) to physical addresses from pa on.
type linearRange struct {
	start, end VirtAddr
	pa         hostmem.PhysAddr // of start; wraps around
}

// tableLevel is one level of a page table whose entries are 8 bytes.
type tableLevel struct {
	shift uint8 // of the index in the virtual address
	bits  uint8 // of the index
	// entry judges a table entry: the physical address that it holds, and whether that is a page rather than a table.
	entry func(e uint64) (pa hostmem.PhysAddr, page, present bool)
}

// valid reports whether va can be a pointer of the kernel to an object of the given alignment.
func (s *addressSpace) valid(va VirtAddr, align uint64) bool {
	return va >= s.kernel && va < ^VirtAddr(4095) && uint64(va)%align == 0
}

// translate returns the physical address of va and how many bytes from there on are mapped in one piece, at least 1.
func (s *addressSpace) translate(src source, va VirtAddr) (hostmem.PhysAddr, uint64, error) {
	for i := range s.linear {
		if l := &s.linear[i]; va >= l.start && va < l.end {
			return l.pa + hostmem.PhysAddr(va-l.start), uint64(l.end - va), nil
		}
	}
	return s.walk(src, va)
}

// walk is translate by the page tables alone.
func (s *addressSpace) walk(src source, va VirtAddr) (hostmem.PhysAddr, uint64, error) {
	if va < s.kernel {
		// The tables do not tell: they do not look at the bits above their root's.
		return 0, 0, fmt.Errorf("translate %v: %w", va, ErrNotMapped)
	}
	table := s.root
	for i, level := range s.levels {
		index := uint64(va) >> level.shift & (1<<level.bits - 1)
		at := table + hostmem.PhysAddr(index*8)
		e, err := physWord(src, at)
		if err != nil {
			if errors.Is(err, hostmem.ErrNotMapped) {
				return 0, 0, &CorruptError{"page table", va, fmt.Sprintf("level %d is at %v, where no memory is", len(s.levels)-i, at)}
			}
			return 0, 0, fmt.Errorf("translate %v: %w", va, err)
		}
		pa, page, present := level.entry(e)
		if !present {
			return 0, 0, fmt.Errorf("translate %v: %w", va, ErrNotMapped)
		}
		if page {
			size := uint64(1) << level.shift
			offset := uint64(va) & (size - 1)
			return pa&^hostmem.PhysAddr(size-1) + hostmem.PhysAddr(offset), size - offset, nil
		}
		table = pa
	}
	return 0, 0, &CorruptError{"page table", va, "the last level holds a table"}
}

// physWord reads a word of 8 bytes.
func physWord(src source, pa hostmem.PhysAddr) (uint64, error) {
	if v, ok := src.(*View); ok {
		if b := v.peek(pa, 8); b != nil {
			return le64(b), nil
		}
	}
	var b [8]byte
	err := src.readPhys(pa, b[:])
	return le64(b[:]), err
}

// read fills b from va on. It reads the page tables and the data from src.
func (s *addressSpace) read(src source, va VirtAddr, b []byte) error {
	for len(b) > 0 {
		pa, n, err := s.translate(src, va)
		if err != nil {
			return err
		}
		n = min(n, uint64(len(b)))
		if err := src.readPhys(pa, b[:n]); err != nil {
			return fmt.Errorf("read %v: %w", va, err)
		}
		if va+VirtAddr(n) < va {
			return fmt.Errorf("read %v: %w", va, ErrNotMapped)
		}
		va += VirtAddr(n)
		b = b[n:]
	}
	return nil
}
