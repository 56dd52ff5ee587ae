package hostmem

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// bulkRead is the length from which a read of a RAM file is a pread instead of loads from the mapping: it is faster there,
// and it does not make tmpfs allocate the pages that the guest never touched, as a load would.
const bulkRead = 16 * PageSize

// RAMFile is the RAM of a virtual machine in a shared file: QEMU's memory-backend-file with share=on.
//
// It is a Writer and a Swapper if it was opened to write; ask with AsWriter and AsSwapper.
type RAMFile struct {
	layout layout
	write  bool
	f      *os.File
	m      *mapping
	close  func() error
}

// OpenRAMFile opens the RAM file at path, of which layout tells what lies where (for q35: Q35Layout). No layout means that
// the whole file is RAM from address 0 on.
func OpenRAMFile(path string, extents []Extent, write bool) (*RAMFile, error) {
	mode := os.O_RDONLY
	if write {
		mode = os.O_RDWR
	}
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, fmt.Errorf("open RAM file: %w", err)
	}
	r, err := newRAMFile(f, extents, write)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open RAM file: %w", err)
	}
	return r, nil
}

func newRAMFile(f *os.File, extents []Extent, write bool) (*RAMFile, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", f.Name())
	}
	size := uint64(fi.Size())
	if size == 0 {
		return nil, fmt.Errorf("%s is empty", f.Name())
	}
	if extents == nil {
		extents = []Extent{{Range{0, size}, 0}}
	}
	l, err := newLayout(extents)
	if err != nil {
		return nil, err
	}
	if err := l.checkAligned(); err != nil {
		return nil, err
	}
	if l.size() > size {
		return nil, fmt.Errorf("%s holds %d bytes and its layout needs %d: wrong RAM size, or not the RAM file",
			f.Name(), size, l.size())
	}
	m, err := newMapping(f, l.size(), write, errShrunk)
	if err != nil {
		return nil, err
	}
	closeBoth := sync.OnceValue(func() error { return errors.Join(m.close(), f.Close()) })
	return &RAMFile{layout: l, write: write, f: f, m: m, close: closeBoth}, nil
}

// errShrunk is a load that raised SIGBUS: nothing backs the page any more.
var errShrunk = fmt.Errorf("the RAM file became shorter: %w", ErrLinkDown)

// Map implements Memory.
func (r *RAMFile) Map() []Range { return r.layout.ram }

// ReadAt implements Memory.
func (r *RAMFile) ReadAt(p []byte, off int64) (int, error) {
	return r.layout.each(opRead, off, len(p), func(lo, hi int, at int64) (int, error) {
		if hi-lo < bulkRead {
			return r.m.load(p[lo:hi], at)
		}
		n, err := r.f.ReadAt(p[lo:hi], at)
		if errors.Is(err, io.EOF) {
			err = errShrunk
		}
		return n, err
	})
}

// WriteAt implements Writer. A write that does not lie wholly in RAM stores nothing.
func (r *RAMFile) WriteAt(p []byte, off int64) (int, error) {
	if err := storable(r.layout.ram, r.write, off, len(p)); err != nil {
		return 0, err
	}
	return r.layout.each(opWrite, off, len(p), func(lo, hi int, at int64) (int, error) {
		return r.m.store(p[lo:hi], at)
	})
}

// CompareAndSwap implements Swapper.
func (r *RAMFile) CompareAndSwap(pa PhysAddr, old, new uint64) (uint64, error) {
	return swapMapped(r.layout, r.m, r.write, pa, old, new)
}

// SleepIf implements Sleeper.
func (r *RAMFile) SleepIf(pa PhysAddr, v uint32, d time.Duration) (bool, error) {
	return sleepMapped(r.layout, r.m, pa, v, d)
}

// Writer returns the RAM file if it was opened to write.
func (r *RAMFile) Writer() (Writer, bool) { return r, r.write }

// Swapper returns the RAM file if it was opened to write.
func (r *RAMFile) Swapper() (Swapper, bool) { return r, r.write }

// Resident implements Resident by the file's own knowledge of its holes (lseek(2), SEEK_DATA). Where the file system does
// not know, the whole file is resident.
func (r *RAMFile) Resident() []Range {
	var out []Range
	for _, e := range r.layout.extents {
		end := e.Offset + int64(e.Size)
		for at := e.Offset; at < end; {
			data, err := unix.Seek(int(r.f.Fd()), at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
				break // only a hole up to the end
			}
			hole, holeErr := unix.Seek(int(r.f.Fd()), data, unix.SEEK_HOLE)
			if err != nil || holeErr != nil {
				return r.layout.ram
			}
			hole = min(hole, end)
			out = append(out, Range{e.Start + PhysAddr(data-e.Offset), uint64(hole - data)})
			at = hole
		}
	}
	return Normalize(out)
}

// Close implements Memory.
func (r *RAMFile) Close() error { return r.close() }

// storable returns the fault of a write that may not happen or does not lie wholly in RAM.
func storable(ram []Range, write bool, off int64, n int) error {
	if !write {
		return &FaultError{Op: opWrite, Addr: PhysAddr(off), Len: n, Err: ErrReadOnly}
	}
	if _, fault := mapped(ram, opWrite, off, n); fault != nil {
		return fault
	}
	return nil
}

func swapMapped(l layout, m *mapping, write bool, pa PhysAddr, old, new uint64) (uint64, error) {
	if !write {
		return 0, &FaultError{Op: opSwap, Addr: pa, Len: 8, Err: ErrReadOnly}
	}
	if fault := mappedWord(l.ram, opSwap, pa, 8); fault != nil {
		return 0, fault
	}
	e := l.at(pa)
	prev, err := m.swap(e.Offset+int64(pa-e.Start), old, new)
	if err != nil {
		return 0, &FaultError{Op: opSwap, Addr: pa, Len: 8, Err: err}
	}
	return prev, nil
}

func sleepMapped(l layout, m *mapping, pa PhysAddr, v uint32, d time.Duration) (bool, error) {
	if fault := mappedWord(l.ram, opRead, pa, 4); fault != nil {
		return false, fault
	}
	e := l.at(pa)
	was, err := m.sleepIf(e.Offset+int64(pa-e.Start), v, d)
	if err != nil {
		return false, &FaultError{Op: opRead, Addr: pa, Len: 4, Err: err}
	}
	return was, nil
}
