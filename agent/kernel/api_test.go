package kernel

import (
	"context"
	"iter"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// The signatures that the rest of the project builds on.
var (
	_ func(context.Context, hostmem.Memory, Options) (*Image, error) = Open

	_ interface {
		Info() Info
		Memory() hostmem.Memory
		RAM() []hostmem.Range        // as the kernel itself knows it
		Prove(context.Context) error // cheap: is this still the same kernel, alive or dead? nil, ErrGone, ErrTorn or a *hostmem.FaultError
		View(context.Context) *View
		Symbol(name string) (VirtAddr, error)
		SymbolAt(va VirtAddr) (name string, offset uint64, err error)
		PerCPU(name string, cpu int) (VirtAddr, error) // address of a per-CPU symbol on a CPU
		Field(typ, path string) (Field, error)         // Field("task_struct", "thread_info.flags")
		Sizeof(typ string) (uint64, error)
		Enum(typ, name string) (int64, error)
	} = (*Image)(nil)

	_ interface {
		Tasks() iter.Seq2[Task, error]
		Heartbeat() (Heartbeat, error)
		Panic() (PanicState, error)
		Log() iter.Seq2[LogRecord, error]
		Cost() Cost
		Image() *Image
		Phys(va VirtAddr) (hostmem.PhysAddr, error) // any kernel virtual address
		ReadVirt(va VirtAddr, buf []byte) error     // crosses pages
		Uint64(va VirtAddr) (uint64, error)
		Uint32(va VirtAddr) (uint32, error)
	} = (*View)(nil)
)
