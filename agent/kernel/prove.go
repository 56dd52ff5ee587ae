package kernel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// ramEvery is every how many proofs the RAM map is read again: it takes as many reads as there are resources.
const ramEvery = 64

// identity is what is the same as long as a kernel runs and different in the next, even if that is the same kernel at the
// same place: the banner, the boot's random bases and the boot CPU's stack canary.
type identity struct {
	parts []hostmem.Segment // Buf is what must be found
	names []string
}

// identityOf reads the identity of the kernel.
func (img *Image) identityOf(src source) (identity, error) {
	var id identity
	add := func(name string, va VirtAddr, n int) error {
		pa, room, err := img.space.translate(src, va)
		if err != nil {
			return err
		}
		if room < uint64(n) {
			return &CorruptError{name, va, "is across two mappings"}
		}
		b := make([]byte, n)
		if err := src.readPhys(pa, b); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		id.parts = append(id.parts, hostmem.Segment{Addr: pa, Buf: b})
		id.names = append(id.names, name)
		return nil
	}
	banner, err := img.syms.symbol("linux_banner")
	if err != nil {
		return id, err
	}
	if err := add("linux_banner", banner, len(img.info.Banner)); err != nil {
		return id, err
	}
	l := &img.lay.task
	if err := add("init_task.comm", l.init+VirtAddr(l.comm), commLen); err != nil {
		return id, err
	}
	if l.hasCanary {
		if err := add("init_task.stack_canary", l.init+VirtAddr(l.canary), 8); err != nil {
			return id, err
		}
	}
	for _, name := range []string{"phys_base", "page_offset_base", "vmalloc_base", "vmemmap_base", "__per_cpu_offset"} {
		va, err := img.syms.symbol(name)
		if err != nil {
			continue // of another architecture
		}
		if err := add(name, va, 8); err != nil {
			return id, err
		}
	}
	return id, nil
}

// bootID condenses the identity to something that can be shown: the canary itself is a secret.
func (id identity) bootID(buildID string) string {
	h := sha256.New()
	h.Write([]byte(buildID))
	for _, p := range id.parts {
		var at [8]byte
		binary.LittleEndian.PutUint64(at[:], uint64(p.Addr))
		h.Write(at[:])
		h.Write(p.Buf)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// Prove asks whether the memory still holds the very kernel that the Image was made of, alive or dead: some ten small reads.
// It returns nil, ErrGone after a reboot, a kexec or a change of the memory, ErrTorn if it could not be told this time, or
// the error of the memory. It must not be asked less often than the host can reboot and outlive its last uptime, if its
// kernel has neither KASLR nor stack canaries.
//
// A dead kernel stays proven as long as its memory is intact, even when another has been started elsewhere. Whoever sees
// that a kernel stands still should call Open again: it prefers the kernel that moves, and Info.BootID tells them apart.
func (img *Image) Prove(ctx context.Context) error {
	if err := img.prove(ctx); err != nil {
		return fmt.Errorf("prove kernel: %w", err)
	}
	return nil
}

func (img *Image) prove(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	// What others have read of the clock while this proof is under way may be later than what it reads itself.
	before := img.lastMono.Load()
	segs := make([]hostmem.Segment, len(img.identity.parts))
	for i, p := range img.identity.parts {
		segs[i] = hostmem.Segment{Addr: p.Addr, Buf: make([]byte, len(p.Buf))}
	}
	if err := hostmem.ReadScatter(img.mem, segs); err != nil {
		return err
	}
	for i, p := range img.identity.parts {
		if !bytes.Equal(p.Buf, segs[i].Buf) {
			return fmt.Errorf("%s at %v has changed: %w", img.identity.names[i], p.Addr, ErrGone)
		}
	}
	t, err := img.times(direct{ctx, img.mem})
	if err != nil {
		return err
	}
	// RAM is added to and taken from running hosts. What is read is bound by the map, so it must stay true.
	if img.ramKnown && img.proofs.Add(1)%ramEvery == 0 {
		ram, err := img.systemRAM(direct{ctx, img.whole})
		var corrupt *CorruptError
		switch {
		case errors.As(err, &corrupt): // being changed; the next time tells
		case err != nil:
			return err
		case !slices.Equal(ram, img.ram):
			return fmt.Errorf("the host's RAM is now %v, it was %v: %w", ram, img.ram, ErrGone)
		}
	}
	if t.mono < before {
		return fmt.Errorf("the monotonic clock went back from %d to %d: %w", before, t.mono, ErrGone)
	}
	for {
		last := img.lastMono.Load()
		if t.mono < last {
			return nil
		}
		if img.lastMono.CompareAndSwap(last, t.mono) {
			img.seen.Store(&seen{t.mono, time.Now()})
			return nil
		}
	}
}
