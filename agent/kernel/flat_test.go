package kernel

import (
	"encoding/binary"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// flat is memory from address 0 on.
type flat []byte

func (m flat) Map() []hostmem.Range { return []hostmem.Range{{Start: 0, Size: uint64(len(m))}} }
func (m flat) Close() error         { return nil }

func (m flat) ReadAt(b []byte, off int64) (int, error) {
	n := 0
	if off >= 0 && off < int64(len(m)) {
		n = copy(b, m[off:])
	}
	if n < len(b) {
		return n, &hostmem.FaultError{Op: "read", Addr: hostmem.PhysAddr(off) + hostmem.PhysAddr(n), Len: len(b) - n, Err: hostmem.ErrNotMapped}
	}
	return n, nil
}

func (m flat) put64(at int, v uint64) { binary.LittleEndian.PutUint64(m[at:], v) }
func (m flat) put32(at int, v uint32) { binary.LittleEndian.PutUint32(m[at:], v) }

// overlay is a memory of which some bytes are others.
type overlay struct {
	hostmem.Memory
	bytes map[hostmem.PhysAddr]byte
}

func (m overlay) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.Memory.ReadAt(b, off)
	for pa, v := range m.bytes {
		if i := int64(pa) - off; i >= 0 && i < int64(n) {
			b[i] = v
		}
	}
	return n, err
}
