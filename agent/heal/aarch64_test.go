package heal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	paNotePointer = 0x150000
	paNote        = 0x160000 // two pages
)

// newFakeAArch64 is the little kernel as one for AArch64: nothing below 1 MiB, but a note in two pages.
func newFakeAArch64(t *testing.T) *fakeHost {
	h := newFakeHost(t)
	h.info.Arch = archAArch64
	for _, name := range []string{"page_offset_base", "vmemmap_base", "real_mode_header"} {
		delete(h.symbols, name)
	}
	h.ram = h.ram[1:]
	h.symbols["vmcoreinfo_note"] = direct + paNotePointer
	h.put64(paNotePointer, direct+paNote)
	note := binary.LittleEndian.AppendUint32(nil, 11)
	note = binary.LittleEndian.AppendUint32(note, 2000)
	note = binary.LittleEndian.AppendUint32(note, 0)
	h.write(paNote, append(note, "VMCOREINFO\x00\x00OSRELEASE=6.1.0-fake\n"...))
	entry := slices.Concat(movX9X30, nopA64)
	h.write(paFn, entry)
	h.write(paFn+0x200, entry)
	return h
}

// A kernel for AArch64 ends a process as one for x86-64 does, from the second page of its note, and leaves nothing there.
func TestAArch64Kill(t *testing.T) {
	h := newFakeAArch64(t)
	h.run()
	before := h.snapshot()
	p := mustPlan(t, h)
	out, err := NewExecutor(options(t, h, &memJournal{})).Apply(t.Context(), p, "test")
	if err != nil || !out.Verified || len(out.Left) > 0 {
		t.Fatalf("Apply = %+v, %v", out, err)
	}
	if got := h.kills(); !slices.Equal(got, []int{fakePID}) {
		t.Errorf("killed %v", got)
	}
	for _, at := range h.diff(before) {
		if at < paTask || at >= paTask+hostmem.PageSize { // the kernel's own store: the task is dead
			t.Fatalf("%#x has changed", at)
		}
	}
	for _, r := range p.Ranges() {
		if r.Start >= paNote && r.Start < paNote+hostmem.PageSize {
			t.Errorf("the plan stores into the note itself: %v", r)
		}
	}
}

func TestAArch64Mailbox(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(h *fakeHost)
		want  error
	}{
		"in use":                 {func(h *fakeHost) { h.put64(paNote+hostmem.PageSize+0x800, 1) }, ErrNotYet},
		"no note":                {func(h *fakeHost) { h.write(paNote+12, []byte("VMCOREINF0")) }, kernel.ErrNotSupported},
		"a note of two pages":    {func(h *fakeHost) { h.put32(paNote+4, 4000) }, kernel.ErrNotSupported},
		"the length of a name":   {func(h *fakeHost) { h.put32(paNote, 12) }, kernel.ErrNotSupported},
		"in the middle of pages": {func(h *fakeHost) { h.put64(paNotePointer, direct+paNote+0x10) }, kernel.ErrNotSupported},
		"out of memory":          {func(h *fakeHost) { h.put64(paNotePointer, direct+fakeRAM) }, hostmem.ErrNotMapped},
		"not the kernel's RAM":   {func(h *fakeHost) { h.ram[0].Size = paNote + hostmem.PageSize - uint64(h.ram[0].Start) }, kernel.ErrNotSupported},
		"no pointer":             {func(h *fakeHost) { delete(h.symbols, "vmcoreinfo_note") }, kernel.ErrNotFound},
	} {
		h := newFakeAArch64(t)
		c.spoil(h)
		if _, err := findMailbox(h); !errors.Is(err, c.want) {
			t.Errorf("%s: %v; want %v", name, err, c.want)
		}
	}
	// The lease's word is not a reason against it, and no plan may need it.
	h := newFakeAArch64(t)
	l, err := findLease(h)
	if err != nil || l.addr != paNote+2*hostmem.PageSize-8 {
		t.Fatalf("the lease is %+v, %v", l, err)
	}
	h.put64(l.addr, leaseMark|1)
	boxes, err := findMailboxes(h, 5)
	if err != nil || len(boxes) != 1 || boxes[0].pa != paNote+hostmem.PageSize {
		t.Errorf("mailboxes are %+v, %v", boxes, err)
	}
}

// Nothing is stored when the kernel's note is elsewhere by then.
func TestAArch64NoteMoves(t *testing.T) {
	h := newFakeAArch64(t)
	h.run()
	p := mustPlan(t, h)
	h.put64(paNotePointer, direct+paNote+2*hostmem.PageSize)
	before := h.snapshot()
	if _, err := NewExecutor(options(t, h, &memJournal{})).Apply(t.Context(), p, "test"); !errors.Is(err, ErrMismatch) {
		t.Errorf("Apply = %v", err)
	}
	if d := h.diff(before); len(d) > 0 {
		t.Errorf("changed at %#x", d)
	}
}

func TestAArch64Callable(t *testing.T) {
	brk := []byte{0x00, 0x00, 0x20, 0xd4} // a probe
	for _, c := range []struct {
		name     string
		fn, klog []byte
		ok       bool
	}{
		{"traced entries", movX9X30, movX9X30, true},
		{"untouched entries", nopA64, nopA64, true},
		{"landing pad", btiC, btiC, true},
		{"signed return address", paciasp, movX9X30, true},
		{"no landing pad where the kernel has them", movX9X30, btiC, false},
		{"no landing pad where the kernel signs", nopA64, paciasp, false},
		{"a probe at the entry", brk, movX9X30, false},
		{"nothing", make([]byte, 4), movX9X30, false},
	} {
		h := newFakeAArch64(t)
		h.write(paFn, c.fn)
		h.write(paFn+0x200, c.klog)
		_, head, err := callable(h, "posix_timer_fn")
		if err == nil != c.ok || err != nil && !errors.Is(err, kernel.ErrNotSupported) || !bytes.HasPrefix(head, c.fn) {
			t.Errorf("%s: %x, %v", c.name, []byte(head), err)
		}
	}
}
