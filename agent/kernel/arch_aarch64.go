package kernel

import (
	"fmt"
	"slices"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// AArch64, Documentation/arch/arm64/memory.rst: pages of 4, 16 or 64 KiB; as many levels of tables as the size of the address
// space (TCR_EL1.T1SZ) takes; the kernel image, contiguous in physical memory, anywhere in the kernel's half (KASLR); all
// physical memory mapped from PAGE_OFFSET on, possibly moved by a negative PHYS_OFFSET. All arithmetic wraps around.
func archAArch64() *arch {
	return &arch{
		name: "aarch64",
		matches: func(v *vmcoreinfo) bool {
			// arch_crash_save_vmcoreinfo in arch/arm64/kernel/{crash_core,vmcore_info}.c; TCR_EL1_T1SZ since v5.9.
			_, voffset := v.number("kimage_voffset")
			_, size := v.number("TCR_EL1_T1SZ")
			return voffset && size
		},
		space:     aarch64Space,
		directMap: aarch64DirectMap,
		// There is no count of timer interrupts. What the timer interrupt does on each CPU is counted: hrtimer_interrupt.
		timerIRQs:     []perCPUField{{symbol: "hrtimer_bases", typ: "hrtimer_cpu_base", path: "nr_events", size: 4}},
		preemptInTask: "thread_info.preempt.count",
		preemptMask:   0x7fffffff,
		unwind:        func(v *View, t Task) (stackWalk, error) { return v.frameRecords(t) },
		located:       aarch64Located,
		absent:        aarch64Absent,
		// PTE_USER and PTE_RDONLY. A page that is clean and whose dirty bit the hardware sets (PTE_DBM) is not taken for writable yet.
		userPage:   func(e uint64) (reads, writes bool) { return e&(1<<6) != 0, e&(1<<7) == 0 },
		userTables: true,
		blank:      aarch64Blank,
		disarm:     aarch64Disarm,
	}
}

const (
	// aarch64HeadSize is what lies before _stext in the image: .head.text, aligned to SEGMENT_ALIGN.
	aarch64HeadSize = 64 << 10
	// aarch64ImageMax bounds the image. With its modules it must be within reach of a relative branch.
	aarch64ImageMax = 256 << 20

	aarch64NOP     = 0xd503201f
	aarch64MovX9LR = 0xaa1e03e9 // MOV X9, LR
)

// aarch64BTI reports whether an instruction is BTI, of any kind.
func aarch64BTI(op uint32) bool { return op&^0xc0 == 0xd503241f }

func aarch64Space(v *vmcoreinfo) (*addressSpace, imageMap, error) {
	img := imageMap{size: aarch64ImageMax}
	pageSize, err := parseUint(v.values["PAGESIZE"])
	if err != nil {
		return nil, img, &CorruptError{"VMCOREINFO", 0, "no PAGESIZE"}
	}
	t1sz, _ := v.number("TCR_EL1_T1SZ")
	voffset, _ := v.number("kimage_voffset")
	levels, vaBits, err := aarch64Levels(pageSize, t1sz)
	if err != nil {
		return nil, img, err
	}
	img.levels = len(levels)
	stext, ok := v.symbol("_stext")
	root, ok2 := v.symbol("swapper_pg_dir")
	s := &addressSpace{kernel: -VirtAddr(1 << vaBits), levels: levels}
	if !ok || !ok2 || stext < s.kernel || root < s.kernel || uint64(stext)%pageSize != 0 {
		return nil, img, &CorruptError{"VMCOREINFO", stext, fmt.Sprintf("_stext is %v, swapper_pg_dir %v", stext, root)}
	}
	img.base = stext - aarch64HeadSize
	img.physBase = int64(img.base) - voffset
	if root < img.base || uint64(root-img.base) >= img.size || img.base+VirtAddr(img.size) < img.base {
		return nil, img, &CorruptError{"VMCOREINFO", root, "swapper_pg_dir is not in the kernel image"}
	}
	s.root = hostmem.PhysAddr(uint64(root) - uint64(voffset))
	s.linear = []linearRange{{img.base, img.base + VirtAddr(img.size), hostmem.PhysAddr(img.physBase)}}
	return s, img, nil
}

// aarch64Levels returns the levels of the page tables for a granule and a T1SZ, the root first, and how many bits a virtual
// address has. Arm Architecture Reference Manual, D8.2 and D8.3.
func aarch64Levels(pageSize uint64, t1sz int64) ([]tableLevel, uint8, error) {
	var shift uint8
	switch pageSize {
	case 4 << 10:
		shift = 12
	case 16 << 10:
		shift = 14
	case 64 << 10:
		shift = 16
	default:
		return nil, 0, fmt.Errorf("pages of %d bytes: %w", pageSize, ErrNotSupported)
	}
	if t1sz < 12 || t1sz > 39 {
		return nil, 0, &CorruptError{"VMCOREINFO", 0, fmt.Sprintf("TCR_EL1_T1SZ is %d", t1sz)}
	}
	vaBits := uint8(64 - t1sz)
	each := shift - 3
	n := (vaBits - shift + each - 1) / each
	// The output address: bits 47 up to the page, and, of 52-bit addresses, where bits 51:48 (64 KiB) or 51:50 (LPA2, which
	// 4 and 16 KiB need for more than 48 bits of virtual address) were put.
	address := func(e uint64) hostmem.PhysAddr {
		switch {
		case shift == 16:
			return hostmem.PhysAddr(e&(1<<48-1<<16) | e>>12&0xf<<48)
		case vaBits > 48:
			return hostmem.PhysAddr(e&(1<<50-1<<shift) | e>>8&3<<50)
		}
		return hostmem.PhysAddr(e & (1<<48 - 1<<shift))
	}
	// Bit 0: valid. Bit 1: a table, and at the last level a page; else a block, which the last level does not have.
	upper := func(e uint64) (hostmem.PhysAddr, bool, bool) { return address(e), e&2 == 0, e&1 != 0 }
	last := func(e uint64) (hostmem.PhysAddr, bool, bool) { return address(e), true, e&3 == 3 }
	levels := make([]tableLevel, n)
	for i := range levels {
		below := n - 1 - uint8(i)
		levels[i] = tableLevel{shift: shift + below*each, bits: each, entry: upper}
	}
	levels[n-1].entry = last
	levels[0].bits = vaBits - levels[0].shift
	return levels, vaBits, nil
}

// aarch64Absent is arch/arm64/include/asm/pgtable.h. A page that only the kernel may touch (PAGE_NONE: PROT_NONE, NUMA hinting) is as one
// that is present, without bit 0 (PTE_VALID); bit 1 is left. In a swap entry both are zero, and the kind is in bits 2 to 7; since commit
// 570ef363509b ("arm64/pgtable: support __HAVE_ARCH_PTE_SWP_EXCLUSIVE") (in v5.19) in bits 3 to 7; since the rework of
// PTE_PRESENT_INVALID (in v6.11) in bits 6 to 10. The memory does not tell which: a kind that fits by either reading is
// taken for swap, which an entry of a page that is being moved may be, too.
func aarch64Absent(level tableLevel, e, swaps uint64) (hostmem.PhysAddr, PageState) {
	switch {
	case e&3 == 2:
		pa, _, _ := level.entry(e | 1)
		return pa, PagePresent
	case e>>3&0x1f < swaps, e>>6&0x1f < swaps:
		return 0, PageSwapped
	}
	return 0, PageOther
}

// aarch64DirectMap: PAGE_OFFSET is minus two to the power of the configured VA_BITS, also where the kernel runs with fewer;
// PHYS_OFFSET (memstart_addr) makes up for that, and for the randomisation of the map.
func aarch64DirectMap(v *vmcoreinfo, _ func(string) (uint64, error), bottom, top hostmem.PhysAddr) (linearRange, error) {
	bits, ok := v.number("VA_BITS")
	offset, err := parseHex(v.values["NUMBER(PHYS_OFFSET)"])
	if n, numeric := v.number("PHYS_OFFSET"); numeric {
		offset, err = uint64(n), nil
	}
	if !ok || err != nil || bits < 36 || bits > 52 {
		return linearRange{}, &CorruptError{"VMCOREINFO", 0, fmt.Sprintf("VA_BITS is %d, PHYS_OFFSET %q", bits, v.values["NUMBER(PHYS_OFFSET)"])}
	}
	pageOffset := -VirtAddr(1 << bits)
	l := linearRange{start: VirtAddr(uint64(bottom)-offset) + pageOffset, end: VirtAddr(uint64(top)-offset) + pageOffset, pa: bottom}
	if l.start >= l.end || l.start < pageOffset || l.end > pageOffset+1<<(bits-1) {
		return linearRange{}, &CorruptError{"VMCOREINFO", l.start, fmt.Sprintf("the direct map would go from %v to %v", l.start, l.end)}
	}
	return l, nil
}

// aarch64Located returns the addresses that a function forms: that of a page (ADRP) plus immediates (ADD, or a load or store
// with an unsigned offset), in the order of its code. What other instructions do to such an address is not followed. Arm
// Architecture Reference Manual, C4.1.
func aarch64Located(img *Image, src source, function VirtAddr, size uint64) []VirtAddr {
	const most = 128 * 4
	code := make([]byte, min(size, most)&^3)
	if img.space.object(src, "function", function, code) != nil {
		return nil
	}
	var reg [32]VirtAddr // what is known of each register; zero if nothing
	var found []VirtAddr
	for o := 0; o < len(code); o += 4 {
		op := le32(code[o:])
		rd, rn := op&31, op>>5&31
		switch {
		case op>>24&0x9f == 0x90: // ADRP
			imm := int64(int32(op<<8)>>13)<<2 | int64(op>>29&3)
			reg[rd] = (function+VirtAddr(o))&^4095 + VirtAddr(imm<<12)
		case op>>22 == 0x244 && reg[rn] != 0: // ADD (immediate), 64 bits
			reg[rd] = reg[rn] + VirtAddr(op>>10&0xfff)
			found = append(found, reg[rd])
		case op>>21 == 0x550 && op>>5&31 == 31: // MOV (register), 64 bits
			reg[rd] = reg[op>>16&31]
		case op>>24&0x3b == 0x39: // load or store, unsigned offset
			if reg[rn] != 0 {
				found = append(found, reg[rn]+VirtAddr(op>>10&0xfff<<(op>>30)))
			}
			if op>>22&3 != 0 && op>>26&1 == 0 { // a load
				reg[rd] = 0
			}
		case op>>26 == 0x25, op>>25 == 0x6b: // BL, BLR: the callee may use these
			clear(reg[:19])
		case op>>26 == 0x05, op>>24 == 0x54, op>>25&0x3f == 0x1a, op>>25&0x3f == 0x1b: // B, B.cond, CBZ, TBZ
		case op>>24&0x3f == 0x29 && op>>22&1 == 0, op>>24&0x3b == 0x38 && op>>22&3 == 0: // STP, STUR
		default:
			reg[rd] = 0
		}
	}
	return found
}

// aarch64Blank blanks what the kernel may have put at a place that it patches itself (arch/arm64/kernel: jump_label.c, ftrace.c). What begins a function
// that ftrace knows is MOV X9, LR and then NOP or BL, behind a BTI if there is one; ftrace_init_nop puts the first there for good.
func aarch64Blank(kind uint64, b []byte, off uint64) {
	op := func(at uint64) uint32 {
		if at%4 != 0 || at+4 > uint64(len(b)) {
			return 0
		}
		return le32(b[at:])
	}
	is := func(at uint64, branches ...uint32) bool {
		i := op(at)
		return i == aarch64NOP || slices.Contains(branches, i>>26)
	}
	const branch, link = 0x05, 0x25 // B, BL
	switch kind {
	case siteJump:
		if is(off, branch) {
			clear(b[off : off+4])
		}
	case siteCalls:
		if is(off, branch, link) {
			clear(b[off : off+4])
		}
	case siteEntry, siteOps:
		at := off
		if aarch64BTI(op(at)) {
			at += 4
		}
		if op(at) != aarch64MovX9LR || !is(at+4, link) {
			return
		}
		clear(b[at+4 : at+8])
		if kind == siteOps && off >= 8 {
			clear(b[off-8 : off])
		}
	}
}

// aarch64Disarm puts an instruction back that a kprobe has replaced by BRK #4 (KPROBES_BRK_IMM, arch/arm64/include/asm/brk-imm.h).
func aarch64Disarm(b, was []byte) {
	if len(b) >= 4 && len(was) == 4 && le32(b) == 0xd4200080 {
		copy(b, was)
	}
}
