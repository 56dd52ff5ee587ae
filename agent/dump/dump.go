// Package dump makes an ELF core of a host's memory, the vmcore that crash, drgn and makedumpfile read, without keeping a copy of it: the bytes are
// read from the host when they are asked for.
//
// # Layout
//
// As /proc/vmcore has it (fs/proc/vmcore.c) and kexec-tools make it (kexec/crashdump-elf.c): the ELF header, the program headers, the notes, and from
// the next page on all RAM, one range behind the other in the order of their addresses.
//
//	PT_NOTE   NT_PRSTATUS of each CPU that left one, then VMCOREINFO
//	PT_LOAD   the kernel's image, at its own address; its bytes are those of the range that holds it
//	PT_LOAD   one for each range of RAM, where the kernel maps it (the direct map)
//
// Nothing of that depends on when it is read, so that a transfer that broke goes on where it was. What is in the memory does: a host that runs
// changes it meanwhile. Readers of a core of a live kernel know that (/proc/kcore is one), and one of a dead or stopped kernel is exact.
//
// There are no registers but those that a kernel left in memory when it died by kdump: what else is in the CPUs is not in memory. crash(8) takes a
// core without them with --kaslr=auto.
package dump

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	page      = hostmem.PageSize
	maxRanges = 1 << 12 // of RAM; machines have some ten
	maxNotes  = 16 << 20

	// System V ABI, "ELF-64 Object File Format".
	ehdrSize = 64
	phdrSize = 56
)

// A Source is what a core is made of.
type Source struct {
	Arch   string // "x86_64" or "aarch64"
	Memory io.ReaderAt
	RAM    []hostmem.Range
	// Image is where the kernel is, Direct where it maps all RAM.
	Image, Direct kernel.Span
	VMCOREINFO    string
	Notes         [][]byte // of CPUs: whole ELF notes
}

// Of returns what a core of a kernel is made of.
func Of(v *kernel.View) (Source, error) {
	img := v.Image()
	s := Source{Arch: img.Info().Arch, Memory: img.Memory(), RAM: img.RAM(), VMCOREINFO: img.VMCOREINFO()}
	s.Image, s.Direct = img.Spans()
	var err error
	if s.Notes, err = v.CrashNotes(); err != nil && !errors.Is(err, kernel.ErrNotFound) {
		return Source{}, fmt.Errorf("make a core: %w", err)
	}
	return s, nil
}

// A Core is a dump as a file. It is safe for concurrent use.
type Core struct {
	head    []byte // all before the memory
	windows []window
	size    int64
	mem     io.ReaderAt
}

// window is a range of RAM in the file.
type window struct {
	off int64
	ram hostmem.Range
}

// New lays a core out. It does not read the memory. Only whole pages of RAM are in it.
func New(s Source) (*Core, error) {
	machine, ok := map[string]uint16{"x86_64": 62, "aarch64": 183}[s.Arch] // EM_X86_64, EM_AARCH64
	if !ok {
		return nil, fmt.Errorf("make a core: no ELF machine is known for architecture %q", s.Arch)
	}
	var ram []hostmem.Range
	for _, r := range s.RAM {
		start, end := (r.Start+page-1)&^(page-1), r.End()&^(page-1)
		if end > start && start >= r.Start {
			ram = append(ram, hostmem.Range{Start: start, Size: uint64(end - start)})
		}
	}
	slices.SortFunc(ram, func(a, b hostmem.Range) int {
		if a.Start < b.Start {
			return -1
		}
		return 1
	})
	for i := range ram {
		if i > 0 && ram[i].Start < ram[i-1].End() {
			return nil, fmt.Errorf("make a core: ranges of RAM at %v and %v overlap", ram[i-1].Start, ram[i].Start)
		}
	}
	switch {
	case len(ram) == 0:
		return nil, errors.New("make a core: no RAM")
	case len(ram) > maxRanges:
		return nil, fmt.Errorf("make a core: %d ranges of RAM, more than %d", len(ram), maxRanges)
	case s.VMCOREINFO == "":
		return nil, errors.New("make a core: the kernel's VMCOREINFO is not known")
	}
	notes := bytes.Join(s.Notes, nil)
	notes = append(notes, note("VMCOREINFO", 0, s.VMCOREINFO)...)
	if len(notes) > maxNotes {
		return nil, fmt.Errorf("make a core: %d bytes of notes", len(notes))
	}

	c := &Core{mem: s.Memory}
	loads := 1 + len(ram)
	noteAt := int64(ehdrSize + phdrSize*(1+loads))
	off := (noteAt + int64(len(notes)) + page - 1) &^ (page - 1)
	var image *program
	programs := []program{{kind: 4, off: noteAt, size: uint64(len(notes)), align: 4}}
	for _, r := range ram {
		virt := s.Direct.Virt + kernel.VirtAddr(r.Start-s.Direct.Phys)
		programs = append(programs, program{kind: 1, flags: 7, off: off, virt: virt, phys: r.Start, size: r.Size, align: page})
		if r.Contains(s.Image.Phys, s.Image.Size) {
			image = &program{kind: 1, flags: 7, off: off + int64(s.Image.Phys-r.Start), virt: s.Image.Virt, phys: s.Image.Phys, size: s.Image.Size, align: page}
		}
		c.windows = append(c.windows, window{off, r})
		off += int64(r.Size)
	}
	if image == nil {
		return nil, fmt.Errorf("make a core: the kernel's image, %d bytes at %v, is not in one range of RAM", s.Image.Size, s.Image.Phys)
	}
	programs = slices.Insert(programs, 1, *image)
	c.size = off

	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01") // 64 bits, little endian, version 1
	b.Write(make([]byte, 9))
	put := func(v ...any) {
		for _, v := range v {
			_ = binary.Write(&b, binary.LittleEndian, v) // into a bytes.Buffer, of fixed size
		}
	}
	// e_type ET_CORE, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum, no sections
	put(uint16(4), machine, uint32(1), uint64(0), uint64(ehdrSize), uint64(0), uint32(0), uint16(ehdrSize), uint16(phdrSize), uint16(len(programs)), [3]uint16{})
	for _, p := range programs {
		put(p.kind, p.flags, p.off, p.virt, p.phys, p.size, p.size, p.align)
	}
	b.Write(notes)
	c.head = b.Bytes()
	return c, nil
}

// program is a program header.
type program struct {
	kind, flags uint32
	off         int64
	virt        kernel.VirtAddr
	phys        hostmem.PhysAddr
	size, align uint64
}

// note returns an ELF note.
func note(name string, typ uint32, desc string) []byte {
	pad := func(s string) string { return s + string(make([]byte, -len(s)&3)) }
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(name)+1))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(desc)))
	b = binary.LittleEndian.AppendUint32(b, typ)
	return append(b, pad(name+"\x00")+pad(desc)...)
}

// Size returns the number of bytes of the core.
func (c *Core) Size() int64 { return c.size }

// RAM returns the ranges of memory that are in it.
func (c *Core) RAM() []hostmem.Range {
	var out []hostmem.Range
	for _, w := range c.windows {
		out = append(out, w.ram)
	}
	return out
}

// ReadAt reads from the core, and for that from the host. An error of its memory says at which physical address, by a *hostmem.FaultError.
func (c *Core) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read a core before its beginning")
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if at >= c.size {
			return done, io.EOF
		}
		b := p[done:]
		if first := c.windows[0].off; at < first {
			n := int(min(int64(len(b)), first-at))
			clear(b[:n])
			if at < int64(len(c.head)) {
				copy(b[:n], c.head[at:])
			}
			done += n
			continue
		}
		w := c.windows[sort.Search(len(c.windows), func(i int) bool { return c.windows[i].off > at })-1]
		n := int(min(int64(len(b)), int64(w.ram.Size)-(at-w.off)))
		got, err := c.mem.ReadAt(b[:n], int64(w.ram.Start)+at-w.off)
		done += got
		if err != nil && got < n {
			return done, fmt.Errorf("read the host's memory at %v: %w", w.ram.Start+hostmem.PhysAddr(at-w.off)+hostmem.PhysAddr(got), err)
		}
	}
	return done, nil
}
