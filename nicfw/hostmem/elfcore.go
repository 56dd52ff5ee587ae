package hostmem

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
)

// Sizes and values from the System V ABI, "ELF-64 Object File Format": Elf64_Ehdr, Elf64_Phdr, Elf64_Shdr, Elf64_Nhdr.
const (
	ehdrSize = 64
	phdrSize = 56
	shdrSize = 64

	etCore  = 4
	ptLoad  = 1
	ptNote  = 4
	pnXNUM  = 0xffff   // e_phnum when the number is in sh_info of section header 0
	maxNote = 16 << 20 // bytes of notes that are looked through: 4096 CPUs need about 1.5 MB
)

// newELFCore reads the program headers. head is the first 64 bytes, or all of a shorter file.
func newELFCore(r io.ReaderAt, size int64, head []byte) (*Image, error) {
	bad := func(at uint64, format string, args ...any) error {
		return &ImageError{"ELF core", int64(at), fmt.Sprintf(format, args...)}
	}
	if len(head) < ehdrSize {
		return nil, bad(0, "the ELF header is cut after %d of %d bytes: the dump is truncated, take it again", len(head), ehdrSize)
	}
	if class, data := head[4], head[5]; class != 2 || data != 1 {
		return nil, bad(4, "class %d, byte order %d: only 64-bit little-endian cores are read", class, data)
	}
	if t := le.Uint16(head[16:]); t != etCore {
		return nil, bad(16, "e_type is %d, not ET_CORE (4): a program or a vmlinux, not a memory dump", t)
	}
	phoff, phentsize, phnum := le.Uint64(head[32:]), le.Uint16(head[54:]), uint64(le.Uint16(head[56:]))
	if phentsize != phdrSize {
		return nil, bad(54, "program headers of %d bytes instead of %d: the dump is damaged", phentsize, phdrSize)
	}
	if phnum == pnXNUM {
		shoff := le.Uint64(head[40:])
		if shoff > uint64(size) || uint64(size)-shoff < shdrSize {
			return nil, bad(40, "section header 0 at %#x, which counts the program headers, is behind the end: the dump is truncated", shoff)
		}
		sh := make([]byte, shdrSize)
		if _, err := readFull(r, sh, int64(shoff)); err != nil {
			return nil, fmt.Errorf("read section header 0: %w", err)
		}
		phnum = uint64(le.Uint32(sh[44:])) // sh_info
	}
	if phnum > maxPieces {
		return nil, bad(56, "%d program headers: the dump is damaged", phnum)
	}
	if phoff > uint64(size) || (uint64(size)-phoff)/phdrSize < phnum {
		return nil, bad(phoff, "%d program headers do not fit into the file's %d bytes: the dump is truncated, take it again", phnum, size)
	}
	var extents []Extent
	var note []byte
	loads, withAddr := 0, 0
	ph := make([]byte, phdrSize)
	for i := range phnum {
		at := phoff + i*phdrSize
		if _, err := readFull(r, ph, int64(at)); err != nil {
			return nil, fmt.Errorf("read program header %d: %w", i, err)
		}
		typ, offset, paddr := le.Uint32(ph), le.Uint64(ph[8:]), le.Uint64(ph[24:])
		filesz, memsz := le.Uint64(ph[32:]), le.Uint64(ph[40:])
		if typ != ptLoad && typ != ptNote || filesz == 0 {
			continue // what has no bytes in the file was left out of the dump: a hole
		}
		if offset > uint64(size) || filesz > uint64(size)-offset {
			return nil, bad(at, "segment %d needs bytes %#x to %#x and the file ends at %#x: the dump is truncated, take it again",
				i, offset, offset+filesz, size)
		}
		if typ == ptNote {
			if note == nil {
				b := make([]byte, min(filesz, maxNote))
				if _, err := readFull(r, b, int64(offset)); err != nil {
					return nil, fmt.Errorf("read notes: %w", err)
				}
				note = findNote(b, "VMCOREINFO")
			}
			continue
		}
		loads++
		if paddr == math.MaxUint64 {
			continue // without a physical address, as vmalloc is in /proc/kcore
		}
		if memsz < filesz || paddr > uint64(maxAddr) || filesz > uint64(maxAddr)-paddr {
			return nil, bad(at, "segment %d at physical %#x with %d of %d bytes makes no sense: the dump is damaged", i, paddr, filesz, memsz)
		}
		if paddr != 0 {
			withAddr++
		}
		extents = append(extents, Extent{Range{PhysAddr(paddr), filesz}, int64(offset)})
	}
	switch {
	case len(extents) == 0:
		return nil, bad(phoff, "none of %d program headers holds physical memory: not a kernel's dump", phnum)
	case loads > 1 && withAddr == 0:
		return nil, bad(phoff, "all %d segments have physical address 0: the core of a process, not of a kernel", loads)
	}
	return newImage("ELF core", r, unalias(extents), note)
}

// findNote returns the descriptor of the note with this name, or nil. Notes that make no sense end the search: the
// memory of the dump may be good all the same.
func findNote(b []byte, name string) []byte {
	for len(b) >= 12 {
		namesz, descsz := uint64(le.Uint32(b)), uint64(le.Uint32(b[4:]))
		b = b[12:]
		desc := (namesz + 3) &^ 3
		next := desc + (descsz+3)&^3
		if desc+descsz > uint64(len(b)) {
			return nil
		}
		if string(bytes.TrimRight(b[:namesz], "\x00")) == name {
			return bytes.TrimRight(b[desc:desc+descsz], "\x00")
		}
		b = b[min(next, uint64(len(b))):]
	}
	return nil
}

// unalias drops what several extents claim, so that each address is in one: the kernel's vmcore has its own image twice,
// once as text and once in the direct map. The claim of the extent that starts lower stands, of two with one start the
// longer one's.
func unalias(extents []Extent) []Extent {
	s := slices.Clone(extents)
	slices.SortStableFunc(s, func(a, b Extent) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(b.Size, a.Size))
	})
	out := s[:0]
	end := PhysAddr(0)
	for _, e := range s {
		if e.End() <= end {
			continue
		}
		if cut := uint64(end - e.Start); e.Start < end {
			e = Extent{Range{end, e.Size - cut}, e.Offset + int64(cut)}
		}
		out = append(out, e)
		end = e.End()
	}
	return out
}
