// Package hostmemtest is the conformance test of host memory: every backend and every wrapper passes it.
package hostmemtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Truth is what the memory under test must be.
type Truth struct {
	// Map is its RAM map. Every byte of it holds the Pattern.
	Map []hostmem.Range
	// Writer and Swapper are the abilities that it must have; it must not have others.
	Writer, Swapper bool
}

// Atomic64 tells whether this build's processor stores 8 bytes at once, so that a window can compare and swap.
const Atomic64 = strconv.IntSize == 64

// Map returns a RAM map to test with: three pieces of whole pages with holes between them, one behind 4 GiB.
func Map() []hostmem.Range {
	return []hostmem.Range{
		{Start: 0x1000, Size: 3 * hostmem.PageSize},
		{Start: 0x8000, Size: 8 * hostmem.PageSize},
		{Start: 1 << 32, Size: 40 * hostmem.PageSize},
	}
}

// Layout places the ranges of m in a file, in reverse order and with a page between them, and returns the size it takes.
func Layout(m []hostmem.Range) (layout []hostmem.Extent, size int64) {
	for _, r := range slices.Backward(m) {
		size += hostmem.PageSize
		layout = append(layout, hostmem.Extent{Range: r, Offset: size})
		size += int64(r.Size)
	}
	return layout, size
}

// File returns the bytes of a file with that layout, filled with the Pattern.
func File(layout []hostmem.Extent, size int64) []byte {
	b := make([]byte, size)
	for _, e := range layout {
		Fill(b[e.Offset:][:e.Size], e.Start)
	}
	return b
}

// Fill puts the Pattern of pa and the addresses behind it into p.
func Fill(p []byte, pa hostmem.PhysAddr) {
	var w [8]byte
	for i := range p {
		a := uint64(pa) + uint64(i)
		if i == 0 || a%8 == 0 {
			v := (a/8 + 1) * 0x9e3779b97f4a7c15 // a word says where it is
			binary.LittleEndian.PutUint64(w[:], v^v>>29)
		}
		p[i] = w[a%8]
	}
}

// Run tests the memory that open returns. It opens one for each of its parts, and closes it.
func Run(t *testing.T, open func(t *testing.T) (hostmem.Memory, Truth)) {
	t.Helper()
	for _, part := range []struct {
		name string
		test func(*testing.T, hostmem.Memory, Truth)
	}{
		{"map", testMap},
		{"read", testRead},
		{"holes", testHoles},
		{"nowhere", testNowhere},
		{"scatter", testScatter},
		{"abilities", testAbilities},
		{"write", testWrite},
		{"write holes", testWriteHoles},
		{"swap", testSwap},
		{"swap concurrently", testSwapConcurrently},
		{"concurrent", testConcurrent},
		{"close", testClose},
	} {
		t.Run(part.name, func(t *testing.T) {
			mem, truth := open(t)
			t.Cleanup(func() {
				if err := mem.Close(); err != nil {
					t.Errorf("Close() = %v", err)
				}
			})
			part.test(t, mem, truth)
		})
	}
}

func testMap(t *testing.T, mem hostmem.Memory, truth Truth) {
	if got := mem.Map(); !slices.Equal(got, truth.Map) || len(got) == 0 {
		t.Errorf("Map() = %v; want %v", got, truth.Map)
	}
	if got := hostmem.Normalize(mem.Map()); !slices.Equal(got, mem.Map()) {
		t.Errorf("Map() = %v is not normalised", mem.Map())
	}
	if got := hostmem.ResidentRanges(mem); !slices.Equal(hostmem.Intersect(got, mem.Map()), got) {
		t.Errorf("Resident() = %v is not normalised or not within the map", got)
	}
}

// checkRead reads n bytes at pa, all of which are RAM.
func checkRead(t *testing.T, mem hostmem.Memory, pa hostmem.PhysAddr, n int) {
	t.Helper()
	got, want := make([]byte, n), make([]byte, n)
	Fill(want, pa)
	if k, err := mem.ReadAt(got, int64(pa)); k != n || err != nil {
		t.Fatalf("ReadAt(%d bytes, %v) = %d, %v", n, pa, k, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("ReadAt(%d bytes, %v) = % .16x…; want % .16x…", n, pa, got, want)
	}
}

func testRead(t *testing.T, mem hostmem.Memory, truth Truth) {
	for _, r := range truth.Map {
		checkRead(t, mem, r.Start, int(r.Size))
		for off := range hostmem.PhysAddr(8) {
			for n := range 18 {
				checkRead(t, mem, r.Start+off, n)
				checkRead(t, mem, r.End()-off-hostmem.PhysAddr(n), n)
			}
		}
		if r.Size > hostmem.PageSize {
			checkRead(t, mem, r.Start+hostmem.PageSize-3, 7)
		}
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 50 {
		r := truth.Map[rng.IntN(len(truth.Map))]
		off := rng.Uint64N(r.Size)
		checkRead(t, mem, r.Start+hostmem.PhysAddr(off), int(rng.Uint64N(r.Size-off+1)))
	}
}

// checkFault tells whether err is a *FaultError that says just this.
func checkFault(err error, op string, addr hostmem.PhysAddr, n int, cause error) error {
	f, ok := err.(*hostmem.FaultError)
	switch {
	case !ok:
		return fmt.Errorf("error is %T %v; want a *FaultError", err, err)
	case f.Op != op || f.Addr != addr || f.Len != n:
		return fmt.Errorf("fault is %q at %v, %d bytes to go; want %q at %v, %d", f.Op, f.Addr, f.Len, op, addr, n)
	case !errors.Is(err, cause):
		return fmt.Errorf("cause is %v; want %v", f.Err, cause)
	case errors.Is(err, io.EOF):
		return errors.New("fault is io.EOF: memory has no end of file")
	}
	return nil
}

func testHoles(t *testing.T, mem hostmem.Memory, truth Truth) {
	for _, r := range truth.Map {
		for _, n := range []int{1, 2, 8, 9, hostmem.PageSize} {
			// from the first byte behind the range
			if k, err := mem.ReadAt(make([]byte, n), int64(r.End())); k != 0 {
				t.Errorf("ReadAt(%d bytes, %v) = %d in a hole", n, r.End(), k)
			} else if err := checkFault(err, "read", r.End(), n, hostmem.ErrNotMapped); err != nil {
				t.Errorf("ReadAt(%d bytes, %v): %v", n, r.End(), err)
			}
			// across its end
			for _, before := range []int{1, 7, 8, 13, hostmem.PageSize} {
				if uint64(before) > r.Size {
					continue
				}
				pa := r.End() - hostmem.PhysAddr(before)
				got, want := make([]byte, before+n), make([]byte, before)
				Fill(want, pa)
				k, err := mem.ReadAt(got, int64(pa))
				if k != before || !bytes.Equal(got[:before], want) {
					t.Errorf("ReadAt(%d bytes, %v) = %d, % .8x…; want %d, % .8x…", len(got), pa, k, got[:before], before, want)
				}
				if err := checkFault(err, "read", r.End(), n, hostmem.ErrNotMapped); err != nil {
					t.Errorf("ReadAt(%d bytes, %v): %v", len(got), pa, err)
				}
			}
		}
		// into the range from in front of it
		if find(truth.Map, r.Start-1) {
			continue
		}
		if k, err := mem.ReadAt(make([]byte, 8), int64(r.Start)-1); k != 0 {
			t.Errorf("ReadAt(8 bytes, %v) = %d", r.Start-1, k)
		} else if err := checkFault(err, "read", r.Start-1, 8, hostmem.ErrNotMapped); err != nil {
			t.Errorf("ReadAt(8 bytes, %v): %v", r.Start-1, err)
		}
	}
}

func find(m []hostmem.Range, pa hostmem.PhysAddr) bool {
	return slices.ContainsFunc(m, func(r hostmem.Range) bool { return r.Contains(pa, 1) })
}

// testNowhere reads no bytes, and bytes at the ends of the address space and beyond.
func testNowhere(t *testing.T, mem hostmem.Memory, truth Truth) {
	last := truth.Map[len(truth.Map)-1].End()
	for _, off := range []int64{-1, -8, math.MinInt64, math.MaxInt64, math.MaxInt64 - 8, int64(last)} {
		if k, err := mem.ReadAt(make([]byte, 16), off); k != 0 {
			t.Errorf("ReadAt(16 bytes, %d) = %d", off, k)
		} else if err := checkFault(err, "read", hostmem.PhysAddr(off), 16, hostmem.ErrNotMapped); err != nil {
			t.Errorf("ReadAt(16 bytes, %d): %v", off, err)
		}
	}
	for _, off := range []int64{int64(truth.Map[0].Start), int64(last), -1} {
		if k, err := mem.ReadAt(nil, off); k != 0 || err != nil {
			t.Errorf("ReadAt(no bytes, %d) = %d, %v; want 0, nil", off, k, err)
		}
	}
}

func testScatter(t *testing.T, mem hostmem.Memory, truth Truth) {
	if err := hostmem.ReadScatter(mem, nil); err != nil {
		t.Errorf("ReadScatter(nothing) = %v", err)
	}
	testScatterOf(t, mem, truth, 64)
	testScatterOf(t, mem, truth, 3*hostmem.PageSize)
}

func testScatterOf(t *testing.T, mem hostmem.Memory, truth Truth, longest uint64) {
	var segs []hostmem.Segment
	rng := rand.New(rand.NewPCG(2, 2))
	for range 40 {
		r := truth.Map[rng.IntN(len(truth.Map))]
		off := rng.Uint64N(r.Size)
		n := rng.Uint64N(min(r.Size-off, longest) + 1)
		segs = append(segs, hostmem.Segment{Addr: r.Start + hostmem.PhysAddr(off), Buf: make([]byte, n), Err: io.EOF})
	}
	check := func() {
		t.Helper()
		for i, s := range segs {
			want := make([]byte, len(s.Buf))
			Fill(want, s.Addr)
			if s.Err != nil || !bytes.Equal(s.Buf, want) {
				t.Errorf("segment %d, %d bytes at %v: %v, % .8x…; want % .8x…", i, len(s.Buf), s.Addr, s.Err, s.Buf, want)
			}
		}
	}
	if err := hostmem.ReadScatter(mem, segs); err != nil {
		t.Errorf("ReadScatter(good segments) = %v", err)
	}
	check()

	end := truth.Map[0].End()
	bad := []hostmem.Segment{
		{Addr: end - 4, Buf: make([]byte, 12)},
		{Addr: math.MaxUint64 - 3, Buf: make([]byte, 8)},
	}
	all := slices.Concat(bad[:1], segs, bad[1:])
	if err := hostmem.ReadScatter(mem, all); err == nil {
		t.Error("ReadScatter(bad segments) = nil")
	}
	copy(segs, all[1:])
	check()
	if err := checkFault(all[0].Err, "read", end, 8, hostmem.ErrNotMapped); err != nil {
		t.Errorf("segment across the end of a range: %v", err)
	}
	if err := checkFault(all[len(all)-1].Err, "read", math.MaxUint64-3, 8, hostmem.ErrNotMapped); err != nil {
		t.Errorf("segment across the end of the address space: %v", err)
	}
}

// testAbilities checks that a memory has the abilities that it should have, and that one which is only there as a method
// refuses to be used.
func testAbilities(t *testing.T, mem hostmem.Memory, truth Truth) {
	if _, ok := hostmem.AsWriter(mem); ok != truth.Writer {
		t.Errorf("AsWriter(%T) is %v; want %v", mem, ok, truth.Writer)
	}
	if _, ok := hostmem.AsSwapper(mem); ok != truth.Swapper {
		t.Errorf("AsSwapper(%T) is %v; want %v", mem, ok, truth.Swapper)
	}
	pa := truth.Map[0].Start
	if w, ok := mem.(hostmem.Writer); ok && !truth.Writer {
		if k, err := w.WriteAt(make([]byte, 8), int64(pa)); k != 0 {
			t.Errorf("WriteAt on a read-only memory = %d", k)
		} else if err := checkFault(err, "write", pa, 8, hostmem.ErrReadOnly); err != nil {
			t.Errorf("WriteAt on a read-only memory: %v", err)
		}
	}
	if s, ok := mem.(hostmem.Swapper); ok && !truth.Swapper {
		var fault *hostmem.FaultError
		if _, err := s.CompareAndSwap(pa, 0, 0); !errors.As(err, &fault) {
			t.Errorf("CompareAndSwap on a memory without it: %v; want a *FaultError", err)
		}
	}
	checkRead(t, mem, pa, 8)
}

func testWrite(t *testing.T, mem hostmem.Memory, truth Truth) {
	w, ok := hostmem.AsWriter(mem)
	if !ok {
		t.Skip("this memory cannot be written")
	}
	const margin = 16
	write := func(pa hostmem.PhysAddr, n int) {
		t.Helper()
		from, to := pa-margin, pa+hostmem.PhysAddr(n)+margin
		for !find(truth.Map, from) {
			from++
		}
		for !find(truth.Map, to-1) {
			to--
		}
		want := make([]byte, to-from)
		Fill(want, from)
		data := want[pa-from:][:n]
		for i := range data {
			data[i] ^= 0xa5
		}
		if k, err := w.WriteAt(data, int64(pa)); k != n || err != nil {
			t.Fatalf("WriteAt(%d bytes, %v) = %d, %v", n, pa, k, err)
		}
		got := make([]byte, len(want))
		if _, err := mem.ReadAt(got, int64(from)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("after WriteAt(%d bytes, %v) memory from %v on is\n% x; want\n% x", n, pa, from, got, want)
		}
		Fill(data, pa)
		if _, err := w.WriteAt(data, int64(pa)); err != nil {
			t.Fatal(err)
		}
		checkRead(t, mem, from, len(want))
	}
	for _, r := range truth.Map {
		for off := range hostmem.PhysAddr(8) {
			for n := range 18 {
				write(r.Start+off, n)
				write(r.End()-off-hostmem.PhysAddr(n), n)
			}
		}
		write(r.Start, int(r.Size))
		if r.Size >= 2*hostmem.PageSize {
			write(r.Start+hostmem.PageSize-5, hostmem.PageSize)
		}
	}
}

func testWriteHoles(t *testing.T, mem hostmem.Memory, truth Truth) {
	w, ok := hostmem.AsWriter(mem)
	if !ok {
		t.Skip("this memory cannot be written")
	}
	for _, r := range truth.Map {
		for _, before := range []int{0, 1, 8, 100} {
			pa := r.End() - hostmem.PhysAddr(before)
			if k, err := w.WriteAt(make([]byte, before+8), int64(pa)); k != 0 {
				t.Errorf("WriteAt(%d bytes, %v) = %d across the end of a range; want nothing stored", before+8, pa, k)
			} else if err := checkFault(err, "write", r.End(), 8, hostmem.ErrNotMapped); err != nil {
				t.Errorf("WriteAt(%d bytes, %v): %v", before+8, pa, err)
			}
			checkRead(t, mem, pa, before)
		}
	}
	for _, off := range []int64{-1, math.MinInt64, math.MaxInt64 - 3} {
		if _, err := w.WriteAt(make([]byte, 8), off); !errors.Is(err, hostmem.ErrNotMapped) {
			t.Errorf("WriteAt(8 bytes, %d) = %v; want %v", off, err, hostmem.ErrNotMapped)
		}
	}
	if k, err := w.WriteAt(nil, int64(truth.Map[0].Start)); k != 0 || err != nil {
		t.Errorf("WriteAt(no bytes) = %d, %v; want 0, nil", k, err)
	}
}

func testSwap(t *testing.T, mem hostmem.Memory, truth Truth) {
	s, ok := hostmem.AsSwapper(mem)
	if !ok {
		t.Skip("this memory cannot compare and swap")
	}
	for _, r := range truth.Map {
		for _, pa := range []hostmem.PhysAddr{r.Start, r.End() - 8} {
			var b [8]byte
			Fill(b[:], pa)
			was := binary.LittleEndian.Uint64(b[:])
			const new = 0x0123456789abcdef
			if prev, err := s.CompareAndSwap(pa, was+1, new); prev != was || err != nil {
				t.Fatalf("CompareAndSwap(%v, wrong value) = %#x, %v; want %#x", pa, prev, err, was)
			}
			checkRead(t, mem, pa, 8)
			if prev, err := s.CompareAndSwap(pa, was, new); prev != was || err != nil {
				t.Fatalf("CompareAndSwap(%v) = %#x, %v; want %#x", pa, prev, err, was)
			}
			if _, err := mem.ReadAt(b[:], int64(pa)); err != nil || binary.LittleEndian.Uint64(b[:]) != new {
				t.Fatalf("after CompareAndSwap(%v) the word is % x, %v", pa, b, err)
			}
			if prev, err := s.CompareAndSwap(pa, new, was); prev != new || err != nil {
				t.Fatalf("CompareAndSwap(%v) back = %#x, %v", pa, prev, err)
			}
			if _, err := s.CompareAndSwap(pa+4, 0, 0); !errors.Is(err, hostmem.ErrUnaligned) {
				t.Errorf("CompareAndSwap(%v) = %v; want %v", pa+4, err, hostmem.ErrUnaligned)
			}
		}
		if _, err := s.CompareAndSwap(r.End(), 0, 0); checkFault(err, "compare-and-swap", r.End(), 8, hostmem.ErrNotMapped) != nil {
			t.Errorf("CompareAndSwap(%v) in a hole = %v", r.End(), err)
		}
	}
	for _, pa := range []hostmem.PhysAddr{math.MaxUint64 - 7, 1 << 63} {
		if _, err := s.CompareAndSwap(pa, 0, 0); checkFault(err, "compare-and-swap", pa, 8, hostmem.ErrNotMapped) != nil {
			t.Errorf("CompareAndSwap(%v) = %v; want %v", pa, err, hostmem.ErrNotMapped)
		}
	}
}

func testSwapConcurrently(t *testing.T, mem hostmem.Memory, truth Truth) {
	s, ok := hostmem.AsSwapper(mem)
	if !ok {
		t.Skip("this memory cannot compare and swap")
	}
	const workers, each = 8, 500
	pa := truth.Map[len(truth.Map)-1].Start + 8
	before, err := s.CompareAndSwap(pa, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				for old := before; ; {
					prev, err := s.CompareAndSwap(pa, old, old+1)
					if err != nil {
						t.Error(err)
						return
					}
					if prev == old {
						break
					}
					old = prev
				}
			}
		})
	}
	wg.Wait()
	if got, err := s.CompareAndSwap(pa, 0, 0); got != before+workers*each || err != nil {
		t.Errorf("%d increments by compare-and-swap counted %d, %v", workers*each, got-before, err)
	}
}

// testConcurrent reads and writes different bytes of the same words and pages at the same time.
func testConcurrent(t *testing.T, mem hostmem.Memory, truth Truth) {
	w, canWrite := hostmem.AsWriter(mem)
	r := truth.Map[len(truth.Map)-1]
	var wg sync.WaitGroup
	for i := range hostmem.PhysAddr(8) {
		wg.Go(func() {
			one := make([]byte, 1)
			for k := range hostmem.PhysAddr(64) {
				pa := r.Start + (k*8+i)*8 + i
				Fill(one, pa)
				want := one[0]
				if canWrite {
					if _, err := w.WriteAt(one, int64(pa)); err != nil {
						t.Error(err)
						return
					}
				}
				buf := make([]byte, 1)
				if _, err := mem.ReadAt(buf, int64(pa)); err != nil || buf[0] != want {
					t.Errorf("ReadAt(1 byte, %v) = %#x, %v; want %#x", pa, buf[0], err, want)
					return
				}
				if k%16 == 0 {
					if _, err := mem.ReadAt(make([]byte, 2*hostmem.PageSize), int64(r.Start)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// testClose closes while others read: an error or the right bytes, never a crash.
func testClose(t *testing.T, mem hostmem.Memory, truth Truth) {
	pa := truth.Map[0].Start
	want := make([]byte, 64)
	Fill(want, pa)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			got := make([]byte, len(want))
			for range 100 {
				if _, err := mem.ReadAt(got, int64(pa)); err == nil && !bytes.Equal(got, want) {
					t.Errorf("ReadAt(%v) around Close = % x", pa, got)
				}
			}
		})
	}
	if err := mem.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	wg.Wait()
	if w, ok := hostmem.AsWriter(mem); ok {
		_, _ = w.WriteAt(want, int64(pa)) // must not crash
	}
}
