package hostmem

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// Extent says where a range of host memory lies in a file or a window: its first byte at Offset, the rest behind it.
type Extent struct {
	Range
	Offset int64 // bytes from the start of the file or window
}

// Q35Layout returns where QEMU's q35 machine keeps ram bytes of memory in its RAM file: up to 2816 MiB in one piece
// at 0; from there on the low 2 GiB at 0 and the rest at 4 GiB (QEMU 7.2, hw/i386/pc_q35.c: pc_q35_init, which moves the
// split from 0xb0000000 to 0x80000000 as soon as RAM does not fit below it).
func Q35Layout(ram uint64) []Extent {
	const split, low, high = 0xb000_0000, 0x8000_0000, 0x1_0000_0000
	if ram < split {
		return []Extent{{Range{0, ram}, 0}}
	}
	return []Extent{{Range{0, low}, 0}, {Range{high, ram - low}, low}}
}

// VirtLayout is where QEMU's virt machine for aarch64 has the bytes of its RAM file: in one piece from 1 GiB on.
func VirtLayout(ram uint64) []Extent { return []Extent{{Range{0x4000_0000, ram}, 0}} }

// layout is a sorted list of extents without overlap.
type layout struct {
	extents []Extent
	ram     []Range // normalised
}

// newLayout sorts the extents and checks them.
func newLayout(extents []Extent) (layout, error) {
	s := slices.Clone(extents)
	s = slices.DeleteFunc(s, func(e Extent) bool { return e.Size == 0 })
	slices.SortFunc(s, func(a, b Extent) int { return cmp.Compare(a.Start, b.Start) })
	if len(s) == 0 {
		return layout{}, errors.New("layout has no memory")
	}
	ram := make([]Range, len(s))
	for i, e := range s {
		if e.Offset < 0 || e.Size > uint64(maxAddr)-uint64(e.Offset) || e.Start > maxAddr || e.Size > uint64(maxAddr-e.Start) {
			return layout{}, fmt.Errorf("layout: extent %v size %#x offset %#x is out of range", e.Start, e.Size, e.Offset)
		}
		if i > 0 && e.Start < s[i-1].End() {
			return layout{}, fmt.Errorf("layout: extent %v overlaps the one at %v", e.Start, s[i-1].Start)
		}
		ram[i] = e.Range
	}
	return layout{extents: s, ram: Normalize(ram)}, nil
}

// checkAligned returns an error unless every 8-byte word of host memory is one in the file or window, too.
func (l layout) checkAligned() error {
	for _, e := range l.extents {
		if uint64(e.Offset)%8 != uint64(e.Start)%8 {
			return fmt.Errorf("layout: extent %v at offset %#x shifts 8-byte words", e.Start, e.Offset)
		}
	}
	return nil
}

// size returns the bytes that the file or window must have.
func (l layout) size() uint64 {
	var n uint64
	for _, e := range l.extents {
		n = max(n, uint64(e.Offset)+e.Size)
	}
	return n
}

// each cuts the n bytes at address off where extents meet and calls do for each piece in turn: bytes lo to hi of the
// access lie at offset at. do returns how many bytes it did and why it stopped short.
//
// Postconditions: the error is nil if and only if all n bytes were done; otherwise it is a *FaultError.
func (l layout) each(op string, off int64, n int, do func(lo, hi int, at int64) (int, error)) (int, error) {
	can, fault := mapped(l.ram, op, off, n)
	for done := 0; done < can; {
		pa := PhysAddr(off) + PhysAddr(done)
		e := l.at(pa)
		hi := done + int(min(uint64(can-done), uint64(e.End()-pa)))
		k, err := do(done, hi, e.Offset+int64(pa-e.Start))
		if done += k; err != nil {
			return done, &FaultError{Op: op, Addr: PhysAddr(off) + PhysAddr(done), Len: n - done, Err: err}
		}
	}
	if fault != nil {
		return can, fault
	}
	return can, nil
}

// whole returns where n bytes from pa on lie, if they do in one piece.
func (l layout) whole(pa PhysAddr, n int) (at int64, ok bool) {
	for i := range l.extents {
		e := &l.extents[i]
		if pa >= e.Start && uint64(pa-e.Start) < e.Size && uint64(n) <= e.Size-uint64(pa-e.Start) {
			return e.Offset + int64(pa-e.Start), true
		}
	}
	return 0, false
}

// at returns the extent that holds pa, which is mapped.
func (l layout) at(pa PhysAddr) Extent {
	i, ok := slices.BinarySearchFunc(l.extents, pa, func(e Extent, pa PhysAddr) int { return cmp.Compare(e.Start, pa) })
	if !ok {
		i--
	}
	return l.extents[i]
}
