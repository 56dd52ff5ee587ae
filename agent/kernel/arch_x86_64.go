package kernel

import (
	"fmt"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// x86-64, Documentation/arch/x86/x86_64/mm.rst: 4 KiB pages, 4 or 5 levels of tables (pgtable_l5_enabled), the kernel
// image within 1 GiB from __START_KERNEL_map on, all physical memory mapped from page_offset_base on.
func archX8664() *arch {
	return &arch{
		name:   "x86_64",
		blank:  x8664Blank,
		disarm: x8664Disarm,
		matches: func(v *vmcoreinfo) bool {
			// arch_crash_save_vmcoreinfo in arch/x86/kernel/{machine_kexec_64,vmcore_info_64}.c; init_top_pgt since v4.13.
			_, base := v.number("phys_base")
			_, root := v.symbol("init_top_pgt")
			return base && root
		},
		space:     x8664Space,
		directMap: x8664DirectMap,
		// Members of their own until v7.0, then an array.
		timerIRQs: []perCPUField{
			{symbol: "irq_stat", typ: "irq_cpustat_t", path: "apic_timer_irqs", size: 4},
			{symbol: "irq_stat", typ: "irq_cpustat_t", path: "counts", size: 4, enumerator: "irq_stat_counts.IRQ_COUNT_APIC_TIMER"},
		},
		nmis: []perCPUField{
			{symbol: "irq_stat", typ: "irq_cpustat_t", path: "__nmi_count", size: 4},
			{symbol: "irq_stat", typ: "irq_cpustat_t", path: "counts", size: 4, enumerator: "irq_stat_counts.IRQ_COUNT_NMI"},
		},
		preempt: []perCPUField{
			// From Linux commit 64701838bf05 ("x86/percpu: Move preempt_count next to current_task") (in v6.2) until v6.14.
			{symbol: "pcpu_hot", typ: "pcpu_hot", path: "preempt_count", size: 4},
			{symbol: "__preempt_count", size: 4},
		},
		preemptMask: 0x7fffffff, // without PREEMPT_NEED_RESCHED, which is inverted
		absent:      x8664Absent,
		userPage:    func(e uint64) (reads, writes bool) { return e&x8664User != 0, e&x8664Write != 0 },
		unwind:      func(v *View, t Task) (stackWalk, error) { return v.unwinder(t) },
	}
}

const (
	x8664ImageBase = 0xffffffff80000000 // __START_KERNEL_map
	x8664ImageSize = 1 << 30            // KERNEL_IMAGE_SIZE with KASLR

	x8664Present  = 1 << 0
	x8664Write    = 1 << 1
	x8664User     = 1 << 2
	x8664Huge     = 1 << 7 // PS, in the second and third level
	x8664AddrMask = 0x000ffffffffff000
)

func x8664Space(v *vmcoreinfo) (*addressSpace, imageMap, error) {
	img := imageMap{base: x8664ImageBase, size: x8664ImageSize, levels: 4}
	if size := v.values["PAGESIZE"]; size != "4096" {
		return nil, img, fmt.Errorf("x86-64 pages of %q bytes: %w", size, ErrNotSupported)
	}
	if n, ok := v.number("KERNEL_IMAGE_SIZE"); ok && n > 0 && n <= 2<<30 {
		img.size = uint64(n)
	}
	if n, ok := v.number("sme_mask"); ok && n != 0 {
		return nil, img, fmt.Errorf("memory is encrypted (sme_mask %#x): %w", n, ErrNotSupported)
	}
	if n, _ := v.number("pgtable_l5_enabled"); n == 1 {
		img.levels = 5
	}
	img.physBase, _ = v.number("phys_base")
	root, _ := v.symbol("init_top_pgt")
	if root < img.base || uint64(root-img.base) >= img.size {
		return nil, img, &CorruptError{"VMCOREINFO", root, "init_top_pgt is not in the kernel image"}
	}
	s := &addressSpace{
		kernel: 0xffff800000000000,
		root:   hostmem.PhysAddr(uint64(root-img.base) + uint64(img.physBase)),
		levels: x8664Levels(img.levels),
		linear: []linearRange{{img.base, img.base + VirtAddr(img.size), hostmem.PhysAddr(img.physBase)}},
	}
	if img.levels == 5 {
		s.kernel = 0xff00000000000000
	}
	return s, img, nil
}

func x8664Levels(n int) []tableLevel {
	table := func(e uint64) (hostmem.PhysAddr, bool, bool) {
		return hostmem.PhysAddr(e & x8664AddrMask), false, e&x8664Present != 0
	}
	mayBeHuge := func(e uint64) (hostmem.PhysAddr, bool, bool) {
		return hostmem.PhysAddr(e & x8664AddrMask), e&x8664Huge != 0, e&x8664Present != 0
	}
	page := func(e uint64) (hostmem.PhysAddr, bool, bool) {
		return hostmem.PhysAddr(e & x8664AddrMask), true, e&x8664Present != 0
	}
	all := []tableLevel{{48, 9, table}, {39, 9, table}, {30, 9, mayBeHuge}, {21, 9, mayBeHuge}, {12, 9, page}}
	return all[5-n:]
}

// x8664DirectMap reads page_offset_base, a variable since KASLR of memory regions (in v4.8).
func x8664DirectMap(_ *vmcoreinfo, read func(string) (uint64, error), _, top hostmem.PhysAddr) (linearRange, error) {
	base, err := read("page_offset_base")
	if err != nil {
		return linearRange{}, err
	}
	start := VirtAddr(base)
	if start < 0xff00000000000000 || start%(1<<30) != 0 || start+VirtAddr(top) < start || start+VirtAddr(top) > x8664ImageBase {
		return linearRange{}, &CorruptError{"page_offset_base", start, "cannot be the start of the direct map"}
	}
	return linearRange{start: start, end: start + VirtAddr(top)}, nil
}

// x8664Absent is arch/x86/include/asm/pgtable_64.h: the kind of a swap entry is in the highest 5 bits, the kinds from the number of
// swap areas on are migration, poison, devices and markers. A page that only the kernel may touch (PROT_NONE, NUMA hinting) has
// _PAGE_PROTNONE, which is the global bit, and its address inverted (pgtable-invert.h, since v4.18).
func x8664Absent(_ tableLevel, e, swaps uint64) (hostmem.PhysAddr, PageState) {
	const protNone = 1 << 8
	switch {
	case e&protNone != 0:
		return hostmem.PhysAddr(^e & x8664AddrMask), PagePresent
	case e>>59 < swaps:
		return 0, PageSwapped
	}
	return 0, PageOther
}

// x8664Blank blanks what the kernel may have put at a place that it patches itself (arch/x86/kernel: jump_label.c, static_call.c, ftrace.c).
func x8664Blank(kind uint64, b []byte, off uint64) {
	at := b[off:]
	switch kind {
	case siteJump:
		switch {
		case at[0] == 0xe9, patchable(at): // jmp rel32
			clear(at[:5])
		case at[0] == 0xeb, at[0] == 0x66 && at[1] == 0x90: // jmp rel8, the nop of two bytes
			clear(at[:2])
		}
	case siteCall:
		if at[0] == 0x0f && at[1]&0xf0 == 0x80 { // jcc rel32
			clear(at[:6])
		} else {
			clear(at[:5])
		}
	case siteTramp:
		clear(pastEndbr(at)[:5])
	case siteEntry, siteCalls:
		if at = pastEndbr(at); patchable(at) {
			clear(at[:5])
		}
	}
}

// x8664Disarm puts the first byte of an instruction back that a kprobe has replaced by a breakpoint, or the first five that it has by a jump (arch/x86/kernel/kprobes).
func x8664Disarm(b, was []byte) {
	switch {
	case b[0] == 0xcc && len(was) > 0:
		b[0] = was[0]
	case b[0] == 0xe9 && len(was) == 5:
		copy(b, was)
	}
}

// pastEndbr skips endbr64, or what is left of it where nobody needs it, until 6.13 and since.
func pastEndbr(b []byte) []byte {
	switch string(b[:4]) {
	case "\xf3\x0f\x1e\xfa", "\x66\x0f\x1f\x00", "\x0f\x1f\x40\xd6":
		return b[4:]
	}
	return b
}

// patchable reports whether there is a call, or the nop of five bytes that waits to be one.
func patchable(b []byte) bool {
	return b[0] == 0xe8 || string(b[:5]) == "\x0f\x1f\x44\x00\x00" || string(b[:5]) == "\x66\x66\x66\x66\x90" // that of K8, until 5.12
}
