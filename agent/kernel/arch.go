package kernel

import (
	"fmt"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// arch is what must be known a priori of an architecture. It is data about the host, which may differ from the machine
// that this program runs on.
type arch struct {
	name string
	// matches reports whether a VMCOREINFO is of this architecture.
	matches func(*vmcoreinfo) bool
	// space returns the page tables and the linear map of the kernel image, as far as VMCOREINFO tells.
	space func(*vmcoreinfo) (*addressSpace, imageMap, error)
	// directMap returns the linear map of all physical memory, which ends at top. read returns the 8-byte word of the
	// kernel at a symbol.
	directMap func(read func(symbol string) (uint64, error), top hostmem.PhysAddr) (linearRange, error)
	// counters are the per-CPU counters of a heartbeat; the first that the kernel has is taken.
	timerIRQs, nmis, preempt []perCPUField
	preemptMask              uint32 // of the preempt count, what counts
}

// imageMap is where the kernel image is.
type imageMap struct {
	base     VirtAddr // where the image's mapping begins
	size     uint64   // of that mapping: the image is somewhere in it
	physBase int64    // physical address of base
	levels   int
}

// perCPUField is a member of a per-CPU variable; without a type it is a plain variable of Size bytes.
type perCPUField struct {
	symbol, typ, path string
	size              uint64
}

// arches are the architectures of hosts that can be attached.
var arches = []*arch{&archX8664}

// archOf returns the architecture of the kernel that left a VMCOREINFO.
func archOf(v *vmcoreinfo) (*arch, error) {
	for _, a := range arches {
		if a.matches(v) {
			return a, nil
		}
	}
	if _, arm := v.number("kimage_voffset"); arm {
		return nil, fmt.Errorf("arm64 host kernel: %w", ErrNotSupported)
	}
	return nil, fmt.Errorf("architecture of kernel %s cannot be told: %w", v.values["OSRELEASE"], ErrNotSupported)
}
