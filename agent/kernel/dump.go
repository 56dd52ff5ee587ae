package kernel

import (
	"errors"
	"fmt"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// VMCOREINFO returns the text of the kernel's note, as it is in memory.
func (img *Image) VMCOREINFO() string { return img.note.text }

// Span is a part of the kernel's address space that lies in one piece in physical memory.
type Span struct {
	Virt VirtAddr
	Phys hostmem.PhysAddr
	Size uint64
}

// Spans returns where the kernel's image is and where it maps all RAM (the direct map).
func (img *Image) Spans() (image, direct Span) {
	span := func(l linearRange) Span { return Span{l.start, l.pa, uint64(l.end - l.start)} }
	return span(img.space.linear[0]), span(img.space.linear[1])
}

const (
	crashNoteMax = 4096 // CRASH_CORE_NOTE_BYTES is some 400; it is in one page
	noteHeader   = 12   // Elf64_Nhdr
	ntPRSTATUS   = 1
)

// CrashNotes returns the ELF notes that the CPUs left when the kernel went down for kdump (crash_save_cpu, kernel/crash_core.c): the registers of
// each, as NT_PRSTATUS, whole with their headers. A kernel that runs, or that died without kdump, has none. It is ErrNotFound if the symbol table
// does not tell where they would be.
func (v *View) CrashNotes() ([][]byte, error) {
	img := v.img
	at, err := img.Symbol("crash_notes")
	if err != nil {
		return nil, err
	}
	base, err := v.Uint64(at)
	if err != nil {
		return nil, fmt.Errorf("read crash_notes: %w", err)
	}
	if base == 0 {
		return nil, nil // not allocated yet
	}
	var notes [][]byte
	for cpu, offset := range img.perCPU {
		if offset == 0 && cpu > 0 {
			continue // not possible
		}
		at := VirtAddr(base) + offset
		b := make([]byte, min(crashNoteMax, uint64(hostmem.PageSize-at%hostmem.PageSize)))
		if err := v.ReadVirt(at, b); err != nil {
			return nil, fmt.Errorf("read the crash note of CPU %d: %w", cpu, err)
		}
		n, err := crashNote(b)
		if err != nil {
			return nil, &CorruptError{"crash note", at, fmt.Sprintf("of CPU %d: %v", cpu, err)}
		}
		if n > 0 {
			notes = append(notes, b[:n])
		}
	}
	return notes, nil
}

// crashNote returns the length of the NT_PRSTATUS note at the beginning of b, header included; zero if nothing was left there.
func crashNote(b []byte) (int, error) {
	if len(b) < noteHeader {
		return 0, errors.New("is cut off")
	}
	namesz, descsz, typ := le32(b), le32(b[4:]), le32(b[8:])
	if namesz == 0 {
		return 0, nil // append_elf_note writes the header last but one; final_note is all zeros
	}
	const name = "CORE\x00\x00\x00\x00"
	if namesz != 5 || typ != ntPRSTATUS || len(b) < noteHeader+len(name) || string(b[noteHeader:noteHeader+len(name)]) != name {
		return 0, fmt.Errorf("is of type %d, with a name of %d bytes", typ, namesz)
	}
	n := uint64(noteHeader) + uint64(len(name)) + (uint64(descsz)+3)&^3
	if descsz == 0 || n > uint64(len(b)) {
		return 0, fmt.Errorf("has %d bytes", descsz)
	}
	return int(n), nil
}
