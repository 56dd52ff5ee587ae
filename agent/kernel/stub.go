package kernel

import (
	"context"
	"iter"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

type Image struct{}
type View struct{}

func Open(context.Context, hostmem.Memory, Options) (*Image, error) { return nil, ErrNotSupported }

func (*Image) Info() Info                           { return Info{} }
func (*Image) Memory() hostmem.Memory               { return nil }
func (*Image) Prove(context.Context) error          { return ErrNotSupported }
func (*Image) View(context.Context) *View           { return nil }
func (*Image) Symbol(string) (VirtAddr, error)      { return 0, ErrNotSupported }
func (*Image) PerCPU(string, int) (VirtAddr, error) { return 0, ErrNotSupported }
func (*Image) Field(string, string) (Field, error)  { return Field{}, ErrNotSupported }
func (*Image) Sizeof(string) (uint64, error)        { return 0, ErrNotSupported }
func (*Image) Enum(string, string) (int64, error)   { return 0, ErrNotSupported }

func (*View) Tasks() iter.Seq2[Task, error]           { return nil }
func (*View) Heartbeat() (Heartbeat, error)           { return Heartbeat{}, ErrNotSupported }
func (*View) Panic() (PanicState, error)              { return PanicState{}, ErrNotSupported }
func (*View) Log() iter.Seq2[LogRecord, error]        { return nil }
func (*View) Cost() Cost                              { return Cost{} }
func (*View) Image() *Image                           { return nil }
func (*View) Phys(VirtAddr) (hostmem.PhysAddr, error) { return 0, ErrNotSupported }
func (*View) ReadVirt(VirtAddr, []byte) error         { return ErrNotSupported }
func (*View) Uint64(VirtAddr) (uint64, error)         { return 0, ErrNotSupported }
func (*View) Uint32(VirtAddr) (uint32, error)         { return 0, ErrNotSupported }
