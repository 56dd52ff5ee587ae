package kernel

import (
	"fmt"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Limits of what UserMemory.Present looks at: 8192 tables are those of 16 GiB in pages of 4 KiB.
const (
	maxUserTables = 1 << 13
	maxUserRanges = 1 << 18
)

// maxExtent is what Extent believes of a symbol table at most: whoever leaves symbols out of one makes those before them larger.
const maxExtent = 64 << 10

// Extent returns where a symbol of the kernel image is, and how far it is to the next symbol; that is zero if the symbol table does not
// tell, or if it is more than 64 KiB. What is not in the image, such as per-CPU variables, is ErrNotFound.
func (img *Image) Extent(name string) (va VirtAddr, size uint64, err error) {
	if va, err = img.Symbol(name); err != nil {
		return 0, 0, err
	}
	if va < img.lay.text || va >= img.lay.end {
		return 0, 0, fmt.Errorf("symbol %q at %v is not in the kernel's image: %w", name, va, ErrNotFound)
	}
	if size = min(img.syms.sizeAt(va), uint64(img.lay.end-va)); size > maxExtent {
		size = 0
	}
	return va, size, nil
}

// InImage returns the physical memory of a part of the kernel's image, as far as the kernel's own page tables map it now to where the image was
// found at the attach. What they map elsewhere is left out.
func (v *View) InImage(va VirtAddr, size uint64) ([]hostmem.Range, error) {
	img := v.img
	if va < img.lay.text || va >= img.lay.end || size > uint64(img.lay.end-va) {
		return nil, fmt.Errorf("%#x bytes at %v are not within the kernel's image: %w", size, va, ErrNotFound)
	}
	var all []hostmem.Range
	for end := va + VirtAddr(size); va < end; {
		pa, n, err := img.space.walk(v, va)
		if err != nil {
			return nil, err
		}
		n = min(n, uint64(end-va))
		if home, _, err := img.space.translate(v, va); err == nil && home == pa {
			all = append(all, hostmem.Range{Start: pa, Size: n})
		}
		va += VirtAddr(n)
	}
	return hostmem.Normalize(all), nil
}

// Present returns the physical memory that the page tables of the process let it read now, or with writable store to; so a page that it shares
// with others only until one of them stores there (of a file, after a fork) is not writable.
func (m *UserMemory) Present(writable bool) ([]hostmem.Range, error) {
	all, err := settle(m.v, func() ([]hostmem.Range, error) {
		w := presentWalk{m: m, writable: writable, left: maxUserTables}
		levels := m.space.levels
		entries := uint64(1) << levels[0].bits
		if !m.v.img.arch.userTables {
			entries /= 2 // the upper half is the kernel's
		}
		if err := w.table(m.space.root, 0, entries); err != nil {
			return nil, err
		}
		return hostmem.Normalize(w.all), nil
	})
	if err != nil {
		return nil, fmt.Errorf("walk page tables of a process: %w", err)
	}
	return all, nil
}

type presentWalk struct {
	m        *UserMemory
	writable bool
	left     int // tables
	all      []hostmem.Range
}

// table walks one table of a level.
func (w *presentWalk) table(at hostmem.PhysAddr, level int, entries uint64) error {
	v, levels := w.m.v, w.m.space.levels
	if level == len(levels) {
		return &CorruptError{"page table", 0, "the last level holds a table"}
	}
	if w.left--; w.left < 0 {
		return fmt.Errorf("more than %d page tables: %w", maxUserTables, ErrNotSupported)
	}
	b := make([]byte, 8*entries)
	if err := v.readPhys(at, b); err != nil {
		return fmt.Errorf("page table at %v: %w", at, err)
	}
	size := uint64(1) << levels[level].shift
	for ; len(b) > 0; b = b[8:] {
		e := le64(b)
		pa, page, present := levels[level].entry(e)
		switch {
		case !present:
		case !page:
			if err := w.table(pa, level+1, 1<<levels[min(level+1, len(levels)-1)].bits); err != nil {
				return err
			}
		default:
			if reads, writes := v.img.arch.userPage(e); reads && (writes || !w.writable) {
				if err := w.add(hostmem.Range{Start: pa &^ hostmem.PhysAddr(size-1), Size: size}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// add adds a page. Neighbours are merged.
func (w *presentWalk) add(r hostmem.Range) error {
	if n := len(w.all); n > 0 && w.all[n-1].End() == r.Start {
		w.all[n-1].Size += r.Size
		return nil
	}
	if len(w.all) == maxUserRanges {
		return fmt.Errorf("more than %d pieces of memory: %w", maxUserRanges, ErrNotSupported)
	}
	w.all = append(w.all, r)
	return nil
}
