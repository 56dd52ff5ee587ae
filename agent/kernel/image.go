package kernel

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Image is a kernel that was found and proven. It is immutable and safe for concurrent use; what it answers itself comes
// from its own copy of the kernel's tables, without an access to the host. For everything else make a View.
type Image struct {
	whole    hostmem.Memory // as it was given
	mem      hostmem.Memory // what the kernel calls RAM of it: nothing else is read once that is known
	arch     *arch
	space    *addressSpace
	note     *vmcoreinfo
	syms     *kallsyms
	types    *types
	lay      *layout
	ram      []hostmem.Range
	ramKnown bool // ram is what the kernel says
	info     Info

	pageSize               uint64     // of the host's kernel
	perCPU                 []VirtAddr // __per_cpu_offset of each possible CPU
	perCPUStart, perCPUEnd VirtAddr   // where the addresses of per-CPU symbols are
	identity               identity
	panic                  panicPlan
	beat                   *beatPlan
	usage                  *usagePlan
	guards                 guards
	idle                   idleCaches
	conntrack              conntrackPlan
	shapes                 sync.Map // by what is asked for: *shape
	signs                  struct {
		once sync.Once
		plan *signsPlan
	}

	orc struct {
		once sync.Once
		plan *orcPlan
	}

	cached  *carried // what is known of this build; nil if nothing is
	btfHead []byte   // the first part of the BTF
	// elsewhere says that the types are not the kernel's own but Options.Types's.
	elsewhere bool
	lacking   bool // kallsyms has no variables

	proofs atomic.Uint32 // how often Prove was asked
	// seen is the last reading of the clock.
	seen atomic.Pointer[seen]
	// lastMono is the latest CLOCK_MONOTONIC that Prove saw: it starts again at zero when the host does.
	lastMono atomic.Int64
}

// Info returns what is known of the kernel. The caller must not change the slices in it.
func (img *Image) Info() Info { return img.info }

// PageSize returns the size of the kernel's pages, in bytes.
func (img *Image) PageSize() uint64 { return img.pageSize }

// Memory returns the memory that the kernel was found in.
func (img *Image) Memory() hostmem.Memory { return img.whole }

// RAM returns the host's RAM as the kernel itself knows it: the "System RAM" of iomem_resource at the time of the attach, or
// the map of the memory if that could not be read (the rung "ram" tells). See hostmem.Narrow.
func (img *Image) RAM() []hostmem.Range { return slices.Clone(img.ram) }

// Symbol returns the address of a symbol of the kernel image; modules' symbols are not known. For a per-CPU symbol see
// PerCPU. It is ErrNotFound if there is none, ErrAmbiguous if several static objects or functions have the name.
func (img *Image) Symbol(name string) (VirtAddr, error) { return img.syms.symbol(name) }

// SymbolAt returns the symbol that va is in, and how many bytes behind its start. Beyond the image it is ErrNotFound.
func (img *Image) SymbolAt(va VirtAddr) (name string, offset uint64, err error) {
	if va < img.lay.text || va >= img.lay.end {
		return "", 0, fmt.Errorf("symbol at %v: %w", va, ErrNotFound)
	}
	return img.syms.at(va)
}

// PerCPU returns the address of a per-CPU symbol on a CPU.
func (img *Image) PerCPU(name string, cpu int) (VirtAddr, error) {
	if cpu < 0 || cpu >= len(img.perCPU) {
		return 0, fmt.Errorf("CPU %d of %d: %w", cpu, len(img.perCPU), ErrNotFound)
	}
	va, err := img.syms.symbol(name)
	if err != nil {
		return 0, err
	}
	if va < img.perCPUStart || va >= img.perCPUEnd {
		return 0, fmt.Errorf("symbol %q at %v is not per CPU: %w", name, va, ErrNotFound)
	}
	return va + img.perCPU[cpu], nil
}

// Field finds a member of a structure or union by its path: Field("task_struct", "thread_info.flags"). Members of
// anonymous members are found by their own name.
func (img *Image) Field(typ, path string) (Field, error) { return img.types.field(typ, path) }

// Sizeof returns the size of a type in bytes.
func (img *Image) Sizeof(typ string) (uint64, error) { return img.types.sizeof(typ) }

// Enum returns the value of an enumerator: Enum("zone_stat_item", "NR_FREE_PAGES"), or Enum("", "MM_ANONPAGES") of an enum
// without a name.
func (img *Image) Enum(typ, name string) (int64, error) { return img.types.enum(typ, name) }
