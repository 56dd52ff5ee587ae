package roce

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"time"
)

// Region is memory that peers can reach. What it can do beyond being read, it says by implementing RegionWriter and
// RegionSwapper.
//
// ReadAt copies the bytes once; the packet is made from that copy, so memory may change under it. A region that other
// CPUs store to should copy aligned 8-byte words whole. An error refuses the peer's request: as a remote access error if it
// wraps ErrAccess, as a remote operational error otherwise. All methods are called with the Device's lock held, from one
// goroutine at a time; one that blocks stops the whole device.
type Region interface{ io.ReaderAt }

// RegionWriter is the ability to be written to by peers.
type RegionWriter interface{ io.WriterAt }

// RegionSwapper is the ability to compare and swap the little-endian 8-byte word at off, a multiple of eight, atomically
// against everybody else who uses the memory. prev is the value found; the swap happened if and only if err is nil and
// prev == old. Fetch-and-add is made from it.
type RegionSwapper interface {
	CompareAndSwap(off int64, old, new uint64) (prev uint64, err error)
}

// ErrAccess is wrapped by errors about memory that a peer may not reach in this way.
var ErrAccess = errors.New("access denied")

// Access says what peers may do with a memory region.
type Access uint8

// The rights. Atomic operations need AccessAtomic alone.
const (
	AccessRead Access = 1 << iota
	AccessWrite
	AccessAtomic
)

// PD is a protection domain: keys of its regions work on its queue pairs and on no others.
type PD struct{ dev *Device }

// MRConfig describes a memory region. The zero value of Access allows nothing.
type MRConfig struct {
	Addr     uint64 // the address under which peers see the first byte
	Offset   int64  // of that byte in the Region
	Length   uint64 // bytes
	Access   Access
	Lifetime time.Duration // after which the key is refused; 0 is until Revoke
}

// MR is a memory region: a window of a Region under a random key.
type MR struct {
	pd      *PD
	key     RKey
	cfg     MRConfig
	region  Region
	writer  RegionWriter
	swapper RegionSwapper
	expires time.Duration // on the device's clock; 0 is never
	revoked bool
	word    [8]byte // scratch of atomic
}

// RKey returns the key that peers name the region by.
func (m *MR) RKey() RKey { return m.key }

// Addr returns the address under which peers see the first byte.
func (m *MR) Addr() uint64 { return m.cfg.Addr }

// Len returns the length in bytes.
func (m *MR) Len() uint64 { return m.cfg.Length }

// newMR checks cfg against what the region can do.
func newMR(pd *PD, r Region, cfg MRConfig) (*MR, error) {
	m := &MR{pd: pd, cfg: cfg, region: r}
	m.writer, _ = r.(RegionWriter)
	m.swapper, _ = r.(RegionSwapper)
	switch {
	case cfg.Length == 0 || cfg.Addr+cfg.Length-1 < cfg.Addr:
		return nil, fmt.Errorf("register memory: %#x bytes at %#x are no address range", cfg.Length, cfg.Addr)
	case cfg.Offset < 0 || cfg.Length-1 > uint64(math.MaxInt64-cfg.Offset):
		return nil, fmt.Errorf("register memory: %#x bytes at offset %#x are no part of a region", cfg.Length, cfg.Offset)
	case cfg.Access&AccessWrite != 0 && m.writer == nil:
		return nil, fmt.Errorf("register memory for writing: %T: %w", r, errors.ErrUnsupported)
	case cfg.Access&AccessAtomic != 0 && m.swapper == nil:
		return nil, fmt.Errorf("register memory for atomics: %T: %w", r, errors.ErrUnsupported)
	}
	return m, nil
}

// usable reports whether the region is still there at now.
func (m *MR) usable(now time.Duration) bool {
	return !m.revoked && (m.expires == 0 || now < m.expires)
}

// contains reports whether n bytes at va lie in the region, without overflow for any va and n.
func (m *MR) contains(va uint64, n uint64) bool {
	off := va - m.cfg.Addr
	return va >= m.cfg.Addr && off <= m.cfg.Length && n <= m.cfg.Length-off
}

// offset returns where va lies in the Region. Precondition: contains(va, …).
func (m *MR) offset(va uint64) int64 { return m.cfg.Offset + int64(va-m.cfg.Addr) }

// read fills p from va. Precondition: contains(va, len(p)).
func (m *MR) read(p []byte, va uint64) error {
	if n, err := m.region.ReadAt(p, m.offset(va)); n < len(p) {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return nil
}

// write stores p at va. Precondition: contains(va, len(p)), and the region was registered for writing.
func (m *MR) write(p []byte, va uint64) error {
	_, err := m.writer.WriteAt(p, m.offset(va))
	return err
}

// maxSwapTries bounds how often a fetch-and-add starts anew because somebody else changed the word in between.
const maxSwapTries = 1000

// atomic does one atomic operation on the word at va and returns the value found.
//
// Preconditions: contains(va, 8); va is a multiple of eight; the region was registered for atomics.
func (m *MR) atomic(op Opcode, va, swapAdd, compare uint64) (uint64, error) {
	off := m.offset(va)
	if op == OpCompareSwap {
		return m.swapper.CompareAndSwap(off, compare, swapAdd)
	}
	if err := m.read(m.word[:], va); err != nil {
		return 0, err
	}
	old := binary.LittleEndian.Uint64(m.word[:])
	for range maxSwapTries {
		prev, err := m.swapper.CompareAndSwap(off, old, old+swapAdd)
		if err != nil || prev == old {
			return prev, err
		}
		old = prev
	}
	return 0, errors.New("fetch and add: the word does not hold still")
}

// random32 returns 32 bits that nobody can guess.
func random32() uint32 {
	var b [4]byte
	rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint32(b[:])
}
