package engine

import (
	"bytes"
	"slices"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// firmwareEnd is behind the interrupt vectors of real mode and the BIOS's data area, in bytes.
const firmwareEnd = 0x500

// firmwareTraces returns what firmware keeps at the beginning of a PC's memory; nil if that cannot be read.
//
// A kernel that has started leaves it alone (page 0 is reserved: trim_bios_range, arch/x86/kernel/setup.c), and firmware that
// starts does not: it sets the vectors up and counts time at 0x46c. So a change means that the host was reset, at once, while the
// memory of the kernel that ran before is still as it was. Only one place is the kernel's: where a CPU that is switched on begins
// (TRAMPOLINE_PHYS_LOW and _HIGH, arch/x86/include/asm/apic.h).
func firmwareTraces(mem hostmem.Memory) []byte {
	const trampoline, trampolineEnd = 0x467, 0x46b
	b := make([]byte, firmwareEnd)
	if _, err := mem.ReadAt(b, 0); err != nil {
		return nil
	}
	clear(b[trampoline:trampolineEnd])
	return b
}

// wasReset reports whether the host's firmware has run since the kernel was attached.
func (w *watcher) wasReset() bool {
	if w.firmware == nil {
		return false
	}
	now := firmwareTraces(w.mem)
	return now != nil && !bytes.Equal(now, w.firmware)
}

// corpse reports whether a kernel is the one that a reset has ended: it stays in memory until something overwrites it.
func (w *watcher) corpse(i kernel.Info) bool {
	return i.BootID == w.ended && !slices.ContainsFunc(i.Rungs, func(r kernel.Rung) bool { return r.Name == "alive" && r.OK })
}
