package heal

import (
	"encoding/binary"
	"fmt"
	"iter"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// model is what planners ask of a kernel; a *kernel.View answers it, and so does a kernel made up for a test.
type model interface {
	Info() kernel.Info
	Symbol(name string) (kernel.VirtAddr, error)
	ModuleSymbol(module, name string) (kernel.VirtAddr, error)
	PerCPU(name string, cpu int) (kernel.VirtAddr, error)
	Field(typ, path string) (kernel.Field, error)
	Sizeof(typ string) (uint64, error)
	Enum(typ, name string) (int64, error)
	RAM() []hostmem.Range
	PageSize() uint64
	Tasks() iter.Seq2[kernel.Task, error]
	Sysctls() iter.Seq2[kernel.Sysctl, error]
	Cgroups() iter.Seq2[kernel.Cgroup, error]
	Heartbeat() (kernel.Heartbeat, error)
	Phys(kernel.VirtAddr) (hostmem.PhysAddr, error)
	ReadVirt(kernel.VirtAddr, []byte) error
}

// viewed joins a View with the Image behind it.
type viewed struct {
	*kernel.View
	*image
}

type image = kernel.Image

func newModel(v *kernel.View) model { return viewed{v, v.Image()} }

// View and Image both have these names; the View's are meant.
func (m viewed) Phys(va kernel.VirtAddr) (hostmem.PhysAddr, error) { return m.View.Phys(va) }

func read64(m model, va kernel.VirtAddr) (uint64, error) {
	var b [8]byte
	err := m.ReadVirt(va, b[:])
	return binary.LittleEndian.Uint64(b[:]), err
}

func read32(m model, va kernel.VirtAddr) (uint32, error) {
	var b [4]byte
	err := m.ReadVirt(va, b[:])
	return binary.LittleEndian.Uint32(b[:]), err
}

// symbolValue reads the 8-byte variable of a name.
func symbolValue(m model, name string) (uint64, error) {
	va, err := m.Symbol(name)
	if err != nil {
		return 0, err
	}
	return read64(m, va)
}

// layout collects offsets of structure members and keeps the first thing that is wrong.
type layout struct {
	m   model
	err error
}

// field returns the offset of a member that must have the given size.
func (l *layout) field(typ, path string, size uint64) uint64 {
	f, err := l.m.Field(typ, path)
	if err == nil && (f.Size != size || f.BitSize != 0) {
		err = fmt.Errorf("%s.%s has %d bytes on this kernel, not %d: %w", typ, path, f.Size, size, kernel.ErrNotSupported)
	}
	if err == nil {
		if n, sizeErr := l.m.Sizeof(typ); sizeErr == nil && (f.Offset > n || size > n-f.Offset) {
			err = fmt.Errorf("%s.%s is at %d of %d bytes: %w", typ, path, f.Offset, n, kernel.ErrNotSupported)
		}
	}
	if err != nil && l.err == nil {
		l.err = err
	}
	return f.Offset
}

func (l *layout) sizeof(typ string) uint64 {
	n, err := l.m.Sizeof(typ)
	if err == nil && (n == 0 || n > hostmem.PageSize) {
		err = fmt.Errorf("%s has %d bytes: %w", typ, n, kernel.ErrNotSupported)
	}
	if err != nil && l.err == nil {
		l.err = err
	}
	return n
}

func (l *layout) symbol(name string) kernel.VirtAddr {
	va, err := l.m.Symbol(name)
	if err != nil && l.err == nil {
		l.err = err
	}
	return va
}

// le returns v in n little-endian bytes.
func le(v uint64, n int) Bytes {
	b := make(Bytes, 8)
	binary.LittleEndian.PutUint64(b, v)
	return b[:n]
}

func put32(b []byte, off uint64, v uint32) { binary.LittleEndian.PutUint32(b[off:], v) }
func put64(b []byte, off uint64, v uint64) { binary.LittleEndian.PutUint64(b[off:], v) }
