package hostmem

import (
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// mapping is a piece of a file or device mapped into this process.
type mapping struct {
	lost error // what a fault of the mapped memory means

	mu   sync.RWMutex // held for reading during each access, so that close cannot unmap under it
	data []byte       // nil after close
	w    words
}

// newMapping maps the first size bytes of f.
func newMapping(f *os.File, size uint64, write bool, lost error) (*mapping, error) {
	if size > math.MaxInt {
		return nil, fmt.Errorf("%s: %d MiB do not fit into the address space of this 32-bit agent (less than %d MiB)",
			f.Name(), size>>20, (math.MaxInt>>20)+1)
	}
	prot := unix.PROT_READ
	if write {
		prot |= unix.PROT_WRITE
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(size), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d MiB of %s: %w", size>>20, f.Name(), err)
	}
	return &mapping{lost: lost, data: data, w: newWords(data)}, nil
}

// do runs access on the mapping. It returns the offset of the first byte that faulted and the reason.
func (m *mapping) do(access func(w words)) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.data == nil {
		return 0, os.ErrClosed
	}
	if off, faulted := m.w.trap(func() { access(m.w) }); faulted {
		return off, m.lost
	}
	return 0, nil
}

// load fills p from offset at and returns how many bytes it got.
func (m *mapping) load(p []byte, at int64) (int, error) {
	off, err := m.do(func(w words) { w.load(p, int(at)) })
	if err != nil {
		return min(max(off-int(at), 0), len(p)), err
	}
	return len(p), nil
}

// store puts p at offset at and returns how many bytes were stored for certain.
func (m *mapping) store(p []byte, at int64) (int, error) {
	off, err := m.do(func(w words) { w.store(p, int(at)) })
	if err != nil {
		return min(max(off-int(at), 0), len(p)), err
	}
	return len(p), nil
}

func (m *mapping) swap(at int64, old, new uint64) (prev uint64, err error) {
	_, err = m.do(func(w words) { prev = w.swap(int(at), old, new) })
	return prev, err
}

// sleepIf is SleepIf for the word at offset at. close waits for its end.
func (m *mapping) sleepIf(at int64, v uint32, d time.Duration) (bool, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.data == nil {
		return false, os.ErrClosed
	}
	switch err := m.w.sleepIf(int(at), v, max(d, 0)); err {
	case nil, unix.ETIMEDOUT, unix.EINTR:
		return true, nil
	case unix.EAGAIN:
		return false, nil
	case unix.EFAULT:
		return false, m.lost
	default:
		return false, fmt.Errorf("futex: %w", err)
	}
}

// close unmaps when the last access has ended. Further calls do nothing.
func (m *mapping) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.data == nil {
		return nil
	}
	data := m.data
	m.data, m.w = nil, words{}
	return unix.Munmap(data)
}
