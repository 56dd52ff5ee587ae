package kernel

import (
	"fmt"
	"strings"

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
	// directMap returns the linear map of all physical memory, which begins at bottom and ends at top. read returns the
	// 8-byte word of the kernel at a symbol.
	directMap func(v *vmcoreinfo, read func(symbol string) (uint64, error), bottom, top hostmem.PhysAddr) (linearRange, error)
	// timerIRQs, nmis and preempt are the per-CPU counters of a heartbeat; the first that the kernel has is taken. Without
	// any the counter stays zero.
	timerIRQs, nmis, preempt []perCPUField
	// preemptInTask is where the preempt count is in the running task, if the architecture has it there.
	preemptInTask string
	preemptMask   uint32 // of the preempt count, what counts
	// unwind follows the stack of a task that does not run.
	unwind func(v *View, t Task) (stackWalk, error)
	// located finds variables that no table names in the code of functions that use them; see decoded. May be nil.
	located func(img *Image, src source, function VirtAddr, size uint64) []VirtAddr
	// absent says what a table entry of a process stands for that is not present and not zero, when so many swap areas were made.
	absent func(level tableLevel, e, swaps uint64) (hostmem.PhysAddr, PageState)
	// userPage says whether a process may read the page of a table entry that is present, and whether it may store to it.
	userPage func(e uint64) (reads, writes bool)
	// userTables says that processes have tables for themselves alone; else they have the lower half of their tables.
	userTables bool
	// blank makes zeros of what the kernel may rightly have put at a place of its code that it patches itself, at an offset of a piece of code, whatever
	// that is; anything else stays. disarm puts back what a kprobe's breakpoint stands for, at the beginning of b.
	blank  func(kind uint64, b []byte, off uint64)
	disarm func(b, was []byte)
}

// stackWalk is an unwinding under way.
type stackWalk interface {
	// run unwinds to the end of the stack, else it says what is in the way.
	run() error
	// found returns the addresses that run came by.
	found() []VirtAddr
	// scan returns what looks like return addresses behind the place where run was stopped.
	scan() []VirtAddr
}

// imageMap is where the kernel image is.
type imageMap struct {
	base     VirtAddr // where the image's mapping begins
	size     uint64   // of that mapping: the image is somewhere in it
	physBase int64    // physical address of base
	levels   int
}

// perCPUField is a member of a per-CPU variable; without a type it is a plain variable of size bytes. With an enumerator
// ("enum.NAME") it is that element of an array.
type perCPUField struct {
	symbol, typ, path string
	size              uint64
	enumerator        string
}

// offset returns where the field is in the variable.
func (f perCPUField) offset(img *Image) (uint64, error) {
	if f.typ == "" {
		return 0, nil
	}
	r := resolver{img: img}
	if f.enumerator == "" {
		at := r.field(f.typ, f.size, f.path)
		return at, r.err
	}
	at := r.field(f.typ, 0, f.path)
	if r.err != nil {
		return 0, r.err
	}
	array, err := img.types.field(f.typ, f.path)
	if err != nil {
		return 0, err
	}
	enum, name, _ := strings.Cut(f.enumerator, ".")
	i, err := img.types.enum(enum, name)
	if err != nil {
		return 0, err
	}
	if i < 0 || uint64(i) >= array.Size/f.size {
		return 0, &CorruptError{"BTF", 0, fmt.Sprintf("%s.%s of %d bytes has no element %d", f.typ, f.path, array.Size, i)}
	}
	return at + uint64(i)*f.size, nil
}

// arches returns the architectures of hosts that can be attached.
func arches() []*arch { return []*arch{archX8664(), archAArch64()} }

// archOf returns the architecture of the kernel that left a VMCOREINFO.
func archOf(v *vmcoreinfo) (*arch, error) {
	for _, a := range arches() {
		if a.matches(v) {
			return a, nil
		}
	}
	return nil, fmt.Errorf("architecture of kernel %s cannot be told: %w", v.values["OSRELEASE"], ErrNotSupported)
}
