package hostmem

import (
	"cmp"
	"math"
	"slices"
)

// maxAddr is the first address that the int64 offset of ReadAt cannot name. No processor has that many physical address
// bits (x86-64 and AArch64: at most 52), so a map that reaches it is damaged.
const maxAddr = PhysAddr(math.MaxInt64)

// Normalize returns the ranges sorted by address, with touching and overlapping ones merged and empty ones dropped.
// Ranges that wrap around the address space are cut at its end. The argument is not changed.
func Normalize(ranges []Range) []Range {
	s := make([]Range, 0, len(ranges))
	for _, r := range ranges {
		if r.Size > math.MaxUint64-uint64(r.Start) {
			r.Size = math.MaxUint64 - uint64(r.Start)
		}
		if r.Size > 0 {
			s = append(s, r)
		}
	}
	slices.SortFunc(s, func(a, b Range) int { return cmp.Compare(a.Start, b.Start) })
	out := s[:0]
	for _, r := range s {
		if n := len(out); n > 0 && r.Start <= out[n-1].End() {
			if r.End() > out[n-1].End() {
				out[n-1].Size = uint64(r.End() - out[n-1].Start)
			}
			continue
		}
		out = append(out, r)
	}
	return out
}

// Intersect returns what two sets of ranges have in common, normalised.
func Intersect(a, b []Range) []Range {
	a, b = Normalize(a), Normalize(b)
	out := make([]Range, 0, len(a))
	for len(a) > 0 && len(b) > 0 {
		lo, hi := max(a[0].Start, b[0].Start), min(a[0].End(), b[0].End())
		if lo < hi {
			out = append(out, Range{lo, uint64(hi - lo)})
		}
		if a[0].End() < b[0].End() {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return out
}

// find returns the index of the range that holds pa, or -1. m is sorted and without overlap.
func find(m []Range, pa PhysAddr) int {
	i, ok := slices.BinarySearchFunc(m, pa, func(r Range, pa PhysAddr) int { return cmp.Compare(r.Start, pa) })
	if !ok {
		i--
	}
	if i < 0 || !m[i].Contains(pa, 1) {
		return -1
	}
	return i
}

// within returns the parts of r that are RAM in m, which is normalised.
func within(m []Range, r Range) []Range {
	i, _ := slices.BinarySearchFunc(m, r.Start, func(e Range, pa PhysAddr) int { return cmp.Compare(e.End(), pa+1) })
	var out []Range
	for ; i < len(m) && m[i].Start < r.End(); i++ {
		lo, hi := max(m[i].Start, r.Start), min(m[i].End(), r.End())
		out = append(out, Range{lo, uint64(hi - lo)})
	}
	return out
}

// mapped returns how many of the n bytes at off are RAM in m from off on without a hole, and the fault of the first one
// that is not, or nil if all are. m is normalised. A negative off is an address that no memory has.
func mapped(m []Range, op string, off int64, n int) (int, *FaultError) {
	if n == 0 {
		return 0, nil
	}
	pa := PhysAddr(off)
	i := find(m, pa)
	if i < 0 {
		return 0, &FaultError{Op: op, Addr: pa, Len: n, Err: ErrNotMapped}
	}
	if have := uint64(m[i].End() - pa); have < uint64(n) {
		return int(have), &FaultError{Op: op, Addr: m[i].End(), Len: n - int(have), Err: ErrNotMapped}
	}
	return n, nil
}

// mappedWord returns the fault of an access to the word of size bytes at pa that is unaligned or not RAM in m.
func mappedWord(m []Range, op string, pa PhysAddr, size int) *FaultError {
	switch {
	case pa%PhysAddr(size) != 0:
		return &FaultError{Op: op, Addr: pa, Len: size, Err: ErrUnaligned}
	case find(m, pa) < 0 || !m[find(m, pa)].Contains(pa, uint64(size)):
		return &FaultError{Op: op, Addr: pa, Len: size, Err: ErrNotMapped}
	}
	return nil
}

// Mapped returns how many of the n bytes at off are RAM in m, which is normalised, from off on without a hole, and the fault of
// the first one that is not, or nil if all are. op is the operation that the fault names. It is for backends of other packages.
func Mapped(m []Range, op string, off int64, n int) (int, *FaultError) { return mapped(m, op, off, n) }
