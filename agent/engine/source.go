package engine

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"regexp"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// source finds kernels in memory. The loop works on it and on what it returns, so that tests can make a host up.
type source interface {
	open(ctx context.Context, mem hostmem.Memory, o kernel.Options) (target, error)
}

// target is an attached kernel.
type target interface {
	Info() kernel.Info
	Prove(context.Context) error
	look(context.Context) look
	// image is the kernel itself; nil if it is made up.
	image() *kernel.Image
}

// look is one fresh look at it.
type look interface {
	Heartbeat() (kernel.Heartbeat, error)
	Panic() (kernel.PanicState, error)
	TasksRoughly() iter.Seq2[kernel.Task, error]
	Usage() (kernel.Usage, error)
	SignsAmong(tasks []kernel.Task) (kernel.Signs, error)
	Cost() kernel.Cost
}

// memoryKernels is the real source.
type memoryKernels struct{}

func (memoryKernels) open(ctx context.Context, mem hostmem.Memory, o kernel.Options) (target, error) {
	img, err := kernel.Open(ctx, mem, o)
	if err != nil {
		return nil, err
	}
	return realTarget{img}, nil
}

type realTarget struct{ img *kernel.Image }

func (t realTarget) Info() kernel.Info               { return t.img.Info() }
func (t realTarget) Prove(ctx context.Context) error { return t.img.Prove(ctx) }
func (t realTarget) look(ctx context.Context) look   { return t.img.View(ctx) }
func (t realTarget) image() *kernel.Image            { return t.img }

// tickless reports whether the kernel was started with nohz_full. A kernel that cannot do it, and one of which it cannot be
// told, is taken to tick.
func tickless(ctx context.Context, t target) bool {
	img := t.image()
	if img == nil {
		return false
	}
	va, err := img.Symbol("tick_nohz_full_running")
	if err != nil {
		return false
	}
	var b [1]byte
	return img.View(ctx).ReadVirt(va, b[:]) == nil && b[0] != 0
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// systemUUID returns the SMBIOS system UUID that the kernel has noted at boot (dmi_ident[DMI_PRODUCT_UUID]).
func systemUUID(ctx context.Context, t target) (string, error) {
	img := t.image()
	if img == nil {
		return "", kernel.ErrNotSupported
	}
	va, err := img.Symbol("dmi_ident")
	if err != nil {
		return "", err
	}
	n, err := img.Enum("dmi_field", "DMI_PRODUCT_UUID")
	if err != nil {
		return "", err
	}
	v := img.View(ctx)
	p, err := v.Uint64(va + kernel.VirtAddr(8*n))
	if err != nil {
		return "", err
	}
	if p == 0 {
		return "", errors.New("the host's firmware gives no system UUID")
	}
	var b [36]byte
	if err := v.ReadVirt(kernel.VirtAddr(p), b[:]); err != nil {
		return "", err
	}
	s := strings.ToLower(string(b[:]))
	if !uuidForm.MatchString(s) {
		return "", fmt.Errorf("the kernel's note of it is %q", s)
	}
	return s, nil
}
