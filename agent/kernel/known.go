package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sort"
	"strings"
)

// Known is a kernel as it was built, before any machine ran it: the ELF file that a bzImage of x86-64 unpacks to, with the places
// to relocate behind it (arch/x86/boot/compressed). With it a Golden does not trust the host that it is taken of.
//
// What a kernel changes in its own code while it starts is known from the file's own tables: alternatives by the CPU's features,
// calls through pv_ops, retpolines and return thunks, endbr instructions that nobody needs, lock prefixes of a machine with one
// CPU, and the constants of 6.11 and later that are only known at run time. At such a place the host may have what the kernel may
// have put there, and nothing else. What the file cannot say is what the kernel fills in itself: the constants that are read-only
// after its start, and the table of interrupts.
type Known struct {
	r      io.ReaderAt
	f      *elf.File
	id     string
	relocs [3][]uint32 // the lower half of addresses; of 32 bits, of 32 bits that count down, of 64 bits
}

const (
	reloc32 = iota
	relocInverse
	reloc64

	knownMost = 512 << 20 // bytes of a file
	lineMost  = 256       // bytes of code at one place
)

// OpenKnown reads the headers of a file. It reads more of it later, until the copy that it is used for is taken.
func OpenKnown(r io.ReaderAt, size int64) (*Known, error) {
	fail := func(err error) (*Known, error) { return nil, fmt.Errorf("kernel as it was built: %w", err) }
	if size > knownMost {
		return fail(fmt.Errorf("%d bytes are too many for one", size))
	}
	f, err := elf.NewFile(io.NewSectionReader(r, 0, size))
	if err != nil {
		return fail(err)
	}
	if f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 {
		return fail(fmt.Errorf("built for %v: %w", f.Machine, ErrNotSupported))
	}
	k := &Known{r: r, f: f}
	var head [64]byte
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return fail(err)
	}
	end := int64(le64(head[40:])) + int64(le16(head[58:]))*int64(le16(head[60:])) // e_shoff, e_shentsize, e_shnum
	for _, s := range f.Sections {
		if s.Type != elf.SHT_NOBITS {
			if s.Offset > uint64(size) || s.FileSize > uint64(size)-s.Offset {
				return fail(fmt.Errorf("section %s reaches beyond the end of the file", s.Name))
			}
			end = max(end, int64(s.Offset+s.FileSize))
		}
		if s.Type == elf.SHT_NOTE && k.id == "" && s.FileSize < 1<<16 {
			b := make([]byte, s.FileSize)
			if _, err := r.ReadAt(b, int64(s.Offset)); err != nil {
				return fail(err)
			}
			k.id = buildIDNote(b)
		}
	}
	if k.id == "" {
		return fail(fmt.Errorf("has no build ID: %w", ErrNotFound))
	}
	if err := k.readRelocs(end, size); err != nil {
		return fail(err)
	}
	return k, nil
}

// Close closes the file that it is read from.
func (k *Known) Close() error {
	if c, ok := k.r.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// KnownDir finds kernels as they were built in a directory, by build ID: the file ID.vmlinux. It answers nil for those that are not
// there.
func KnownDir(dir string) func(id string) (*Known, error) {
	return func(id string) (*Known, error) {
		root, err := os.OpenRoot(dir) // the name comes from the host's memory
		if errors.Is(err, fs.ErrNotExist) || id == "" {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		defer root.Close()
		f, err := root.Open(id + ".vmlinux")
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		var k *Known
		st, err := f.Stat()
		if err == nil {
			k, err = OpenKnown(f, st.Size())
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		return k, nil
	}
}

// BuildID is what VMCOREINFO calls the build, in hexadecimal digits.
func (k *Known) BuildID() string { return k.id }

// buildIDNote finds NT_GNU_BUILD_ID (3) among notes.
func buildIDNote(b []byte) string {
	for len(b) >= 12 {
		name, desc, typ := uint64(le32(b)), uint64(le32(b[4:])), le32(b[8:])
		at := 12 + (name+3)&^3
		end := at + (desc+3)&^3
		if end > uint64(len(b)) {
			return ""
		}
		if typ == 3 && name == 4 && string(b[12:16]) == "GNU\x00" && desc > 0 && desc <= 64 {
			return hex.EncodeToString(b[at : at+desc])
		}
		b = b[end:]
	}
	return ""
}

// readRelocs reads what is behind the ELF file: handle_relocations of arch/x86/boot/compressed/misc.c reads it from its end.
// There are no inverse ones since 6.15.
func (k *Known) readRelocs(from, to int64) error {
	if n := to - from; n < 8 || n%4 != 0 || n > 64<<20 {
		return fmt.Errorf("%d bytes behind the ELF file are no places to relocate: it is not what a bzImage has: %w", n, ErrNotSupported)
	}
	b := make([]byte, to-from)
	if _, err := k.r.ReadAt(b, from); err != nil {
		return err
	}
	var lists [][]uint32
	var list []uint32
	for i := len(b) - 4; i >= 0; i -= 4 {
		v := le32(b[i:])
		if v != 0 {
			list = append(list, v)
			continue
		}
		if lists = append(lists, list); len(lists) > 3 {
			return fmt.Errorf("places to relocate: more than three lists: %w", ErrNotSupported)
		}
		list = nil
	}
	if len(list) > 0 || len(lists) < 2 {
		return fmt.Errorf("places to relocate: %d lists: %w", len(lists), ErrNotSupported)
	}
	k.relocs[reloc32], k.relocs[reloc64] = lists[0], lists[len(lists)-1]
	if len(lists) == 3 {
		k.relocs[relocInverse] = lists[1]
	}
	for _, l := range k.relocs {
		slices.Sort(l)
	}
	return nil
}

// read returns what is at an address of the file's, moved by as much as KASLR has moved the kernel.
func (k *Known) read(va uint64, b []byte, moved uint64) error {
	const most = 8 // bytes of what is relocated
	c := make([]byte, len(b)+2*most)
	if err := k.raw(va, c[most:most+len(b)]); err != nil {
		return err
	}
	// What is cut off by the edges is added to rightly if it is there as a whole.
	_ = k.raw(va-most, c[:most])
	_ = k.raw(va+uint64(len(b)), c[most+len(b):])
	start := uint32(va - most)
	for kind, l := range k.relocs {
		for i := sort.Search(len(l), func(i int) bool { return l[i] >= start }); i < len(l); i++ {
			off := uint64(l[i] - start)
			if off+most > uint64(len(c)) {
				break
			}
			switch kind {
			case reloc32:
				putLE32(c[off:], le32(c[off:])+uint32(moved))
			case relocInverse:
				putLE32(c[off:], le32(c[off:])-uint32(moved))
			case reloc64:
				putLE64(c[off:], le64(c[off:])+moved)
			}
		}
	}
	copy(b, c[most:])
	return nil
}

func putLE32(b []byte, v uint32) {
	b[0], b[1], b[2], b[3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
}
func putLE64(b []byte, v uint64) { putLE32(b, uint32(v)); putLE32(b[4:], uint32(v>>32)) }

// raw reads the file at an address.
func (k *Known) raw(va uint64, b []byte) error {
	for _, p := range k.f.Progs {
		if p.Type == elf.PT_LOAD && va >= p.Vaddr && va-p.Vaddr < p.Filesz && uint64(len(b)) <= p.Filesz-(va-p.Vaddr) {
			_, err := k.r.ReadAt(b, int64(p.Off+va-p.Vaddr))
			return err
		}
	}
	return fmt.Errorf("%d bytes at %#x are not in the file: %w", len(b), va, ErrNotFound)
}

// section reads one by name; nil if there is none.
func (k *Known) section(name string) (uint64, []byte, error) {
	s := k.f.Section(name)
	if s == nil || s.Type == elf.SHT_NOBITS {
		return 0, nil, nil
	}
	if s.FileSize > 16<<20 {
		return 0, nil, fmt.Errorf("section %s has %d bytes: %w", name, s.FileSize, ErrNotSupported)
	}
	b := make([]byte, s.FileSize)
	if _, err := k.r.ReadAt(b, int64(s.Offset)); err != nil {
		return 0, nil, fmt.Errorf("section %s: %w", name, err)
	}
	return s.Addr, b, nil
}

// Kinds of places that a starting kernel patches, those that lie in others first.
const (
	startReturn   = iota // .return_sites: jmp to the return thunk
	startIndirect        // .retpoline_sites: jmp, call or jcc to a thunk for a register
	startEndbr           // .ibt_endbr_seal
	startLock            // .smp_locks
	startTrace           // mcount_loc: the call at the beginning of each function, of those, too, that are not used and have no symbol
	startConst           // runtime_ptr_*, 8 bytes
	startShift           // runtime_shift_*, 1 byte
	startPV              // .parainstructions, until 6.7
	startAlt             // .altinstructions
)

// startSite is such a place.
type startSite struct {
	va     uint64 // as the file has it
	repl   uint64 // of an alternative: where it is
	kind   uint8
	n      uint8 // bytes
	replN  uint8
	symbol string // of a constant: the variable
}

// sites lists the places that a starting kernel patches, by address.
func (k *Known) sites(img *Image) ([]startSite, error) {
	var out []startSite
	relative := func(name string, kind, n uint8, symbol string) error {
		at, b, err := k.section(name)
		if err != nil {
			return err
		}
		for i := 0; i+4 <= len(b); i += 4 {
			out = append(out, startSite{va: at + uint64(i) + uint64(int64(int32(le32(b[i:])))), kind: kind, n: n, symbol: symbol})
		}
		return nil
	}
	for _, x := range []struct {
		name string
		kind uint8
		n    uint8
	}{{".return_sites", startReturn, 5}, {".retpoline_sites", startIndirect, 6}, {".ibt_endbr_seal", startEndbr, 4}, {".smp_locks", startLock, 1}} {
		if err := relative(x.name, x.kind, x.n, ""); err != nil {
			return nil, err
		}
	}
	for _, s := range k.f.Sections {
		var err error
		if v, ok := strings.CutPrefix(s.Name, "runtime_ptr_"); ok {
			err = relative(s.Name, startConst, 8, v)
		} else if v, ok := strings.CutPrefix(s.Name, "runtime_shift_"); ok {
			err = relative(s.Name, startShift, 1, v)
		}
		if err != nil {
			return nil, err
		}
	}
	r := resolver{img: img}
	if at, b, err := k.section(".altinstructions"); err != nil {
		return nil, err
	} else if b != nil {
		size := r.size("alt_instr")
		from, repl := r.field("alt_instr", 4, "instr_offset"), r.field("alt_instr", 4, "repl_offset")
		n, replN := r.field("alt_instr", 1, "instrlen"), r.field("alt_instr", 1, "replacementlen")
		if r.err != nil {
			return nil, r.err
		}
		for i := uint64(0); i+size <= uint64(len(b)); i += size {
			rel := func(off uint64) uint64 { return at + i + off + uint64(int64(int32(le32(b[i+off:])))) }
			out = append(out, startSite{va: rel(from), repl: rel(repl), kind: startAlt, n: b[i+n], replN: b[i+replN]})
		}
	}
	if from, to := r.symbol("__start_mcount_loc"), r.symbol("__stop_mcount_loc"); r.err == nil && to > from && to-from < 16<<20 {
		b := make([]byte, (to-from)&^7)
		if err := k.read(uint64(from)-img.info.KASLR, b, 0); err != nil {
			return nil, err
		}
		for ; len(b) > 0; b = b[8:] {
			out = append(out, startSite{va: le64(b), kind: startTrace, n: 5})
		}
	}
	if _, b, err := k.section(".parainstructions"); err != nil {
		return nil, err
	} else if b != nil {
		size := r.size("paravirt_patch_site")
		instr, n := r.field("paravirt_patch_site", 8, "instr"), r.field("paravirt_patch_site", 1, "len")
		if r.err != nil {
			return nil, r.err
		}
		for i := uint64(0); i+size <= uint64(len(b)); i += size {
			out = append(out, startSite{va: le64(b[i+instr:]), kind: startPV, n: b[i+n]})
		}
	}
	slices.SortFunc(out, func(a, b startSite) int {
		switch {
		case a.va < b.va:
			return -1
		case a.va > b.va:
			return 1
		}
		return int(a.kind) - int(b.kind)
	})
	return out, nil
}

// started is a known kernel as it is once it has started on a host.
type started struct {
	k      *Known
	img    *Image
	v      *View
	moved  uint64 // by KASLR
	sites  []startSite
	thunks VirtAddr // of calls by register; 0 if there are none
	consts map[string]uint64
}

func (k *Known) start(v *View) (*started, error) {
	img := v.img
	if img.info.BuildID != k.id {
		return nil, fmt.Errorf("kernel as it was built has build ID %s, the host's kernel %s: %w", k.id, img.info.BuildID, ErrNotFound)
	}
	s := &started{k: k, img: img, v: v, moved: img.info.KASLR, consts: make(map[string]uint64)}
	var err error
	if s.sites, err = k.sites(img); err != nil {
		return nil, fmt.Errorf("kernel as it was built: %w", err)
	}
	if s.thunks, err = img.syms.symbol("__x86_indirect_thunk_array"); err != nil {
		s.thunks = 0
	}
	return s, nil
}

// read returns what the file says is at an address of the host's, and how much of it the file has.
func (s *started) read(va VirtAddr, b []byte) (n int, err error) {
	at := uint64(va) - s.moved
	for _, p := range s.k.f.Progs {
		if p.Type == elf.PT_LOAD && at >= p.Vaddr && at-p.Vaddr < p.Filesz {
			n = int(min(uint64(len(b)), p.Filesz-(at-p.Vaddr)))
			return n, s.k.read(at, b[:n], s.moved)
		}
	}
	return 0, nil
}

// settle makes of a piece of known code what the host may rightly have there: where the kernel patches itself while it starts, what
// the host has, if it is something that the kernel may have made of it.
func (s *started) settle(va VirtAddr, known, host []byte) error {
	from := uint64(va) - s.moved
	first := sort.Search(len(s.sites), func(i int) bool { return s.sites[i].va >= from })
	// What lies in others is settled first.
	for _, outer := range []bool{false, true} {
		for _, x := range s.sites[first:] {
			off := x.va - from
			if off >= uint64(len(known)) {
				break
			}
			if outer != (x.kind >= startPV) || off+uint64(x.n) > uint64(len(known)) {
				continue
			}
			was, now := known[off:off+uint64(x.n)], host[off:off+uint64(x.n)]
			if bytes.Equal(was, now) {
				continue
			}
			n, err := s.may(x, was, now)
			if err != nil {
				return err
			}
			copy(was[:n], now)
		}
	}
	return nil
}

// may returns how many bytes of what is now at a place may rightly be there; 0 if it may not.
func (s *started) may(x startSite, was, now []byte) (int, error) {
	at := VirtAddr(x.va + s.moved)
	all := func(yes bool) (int, error) {
		if yes {
			return len(now), nil
		}
		return 0, nil
	}
	switch x.kind {
	case startReturn:
		// apply_returns of arch/x86/kernel/alternative.c
		return all(was[0] == 0xe9 && (string(now) == "\xc3\xcc\xcc\xcc\xcc" || now[0] == 0xe9 && s.isThunk(at, now, "return_thunk")))
	case startIndirect:
		return s.mayCall(at, was, now), nil
	case startEndbr:
		// gen_endbr_poison of arch/x86/include/asm/ibt.h, until 6.13 and since
		return all(string(was) == "\xf3\x0f\x1e\xfa" && (string(now) == "\x66\x0f\x1f\x00" || string(now) == "\x0f\x1f\x40\xd6"))
	case startLock:
		return all(was[0] == 0xf0 && now[0] == 0x3e) // alternatives_smp_unlock
	case startTrace:
		return all(was[0] == 0xe8 && s.isThunk(at, was, "__fentry__") && string(now) == "\x0f\x1f\x44\x00\x00")
	case startConst:
		want, err := s.constant(x.symbol)
		if errors.Is(err, ErrNotFound) && s.img.space.valid(VirtAddr(le64(now)), 8) {
			// A kernel whose kallsyms has no variables: all places have to have the same.
			want, err = le64(now), nil
			s.consts[x.symbol] = want
		}
		return all(err == nil && le64(now) == want)
	case startShift:
		want, err := s.constant(x.symbol)
		return all(err == nil && uint64(now[0]) == want&0x3f)
	case startPV:
		return all(s.mayPV(at, now))
	case startAlt:
		if sameCode(now, was, 0) || (was[0] == 0xff && s.mayPV(at, now)) {
			return len(now), nil
		}
		want := make([]byte, x.replN)
		if n, err := s.read(VirtAddr(x.repl+s.moved), want); err != nil || n < len(want) || n > len(now) {
			return 0, err
		}
		// What is patched in the alternative itself was patched before it was put here.
		for i := sort.Search(len(s.sites), func(i int) bool { return s.sites[i].va >= x.repl }); i < len(s.sites) && s.sites[i].va < x.repl+uint64(x.replN); i++ {
			in := s.sites[i]
			off := in.va - x.repl
			if in.kind >= startPV || off+uint64(in.n) > uint64(len(want)) {
				continue
			}
			in.va = x.va + off
			n, err := s.may(in, want[off:off+uint64(in.n)], now[off:off+uint64(in.n)])
			if err != nil {
				return 0, err
			}
			copy(want[off:off+uint64(n)], now[off:])
		}
		return all(sameCode(now, want, uint32(x.repl-x.va)))
	}
	return 0, nil
}

// isThunk reports whether a jump or call of 5 bytes leads to a function of the kernel with that in its name.
func (s *started) isThunk(at VirtAddr, b []byte, name string) bool {
	to := at + 5 + VirtAddr(int64(int32(le32(b[1:]))))
	sym, off, err := s.img.SymbolAt(to)
	return err == nil && off == 0 && strings.Contains(sym, name)
}

// mayPV: paravirt_patch of arch/x86/kernel/paravirt.c, alt_replace_call of arch/x86/kernel/alternative.c since 6.8: a call to
// the function that a pointer of pv_ops leads to, the identity, or nothing.
func (s *started) mayPV(at VirtAddr, now []byte) bool {
	switch {
	case len(now) >= 5 && now[0] == 0xe8:
		return s.isThunk(at, now, "") && isNops(now[5:])
	case bytes.HasPrefix(now, []byte{0x48, 0x89, 0xf8}):
		return isNops(now[3:])
	case bytes.HasPrefix(now, []byte{0x0f, 0x0b}):
		return isNops(now[2:])
	}
	return isNops(now)
}

// mayCall: patch_retpoline of arch/x86/kernel/alternative.c.
func (s *started) mayCall(at VirtAddr, was, now []byte) int {
	i := 0 // of the opcode
	for i < 1 && was[i] == 0x2e {
		i++
	}
	n, rel := i+5, i+1
	jcc := was[i] == 0x0f && was[i+1]&0xf0 == 0x80
	if jcc {
		n, rel = i+6, i+2
	}
	if s.thunks == 0 || n > len(was) || !jcc && was[i] != 0xe8 && was[i] != 0xe9 {
		return 0
	}
	to := at + VirtAddr(n) + VirtAddr(int64(int32(le32(was[rel:]))))
	if to < s.thunks || (to-s.thunks)%32 != 0 || (to-s.thunks)/32 > 15 {
		return 0
	}
	reg := byte((to - s.thunks) / 32)
	b := now[:n]
	if jcc {
		if b[0] != 0x70|was[i+1]&0xf^1 || int(b[1]) != n-2 {
			return 0
		}
		b = b[2:]
	}
	for len(b) > 0 && b[0] == 0x2e {
		b = b[1:]
	}
	b = bytes.TrimPrefix(b, []byte{0x0f, 0xae, 0xe8}) // lfence
	want := []byte{0xff, 0xe0 | reg&7}
	if !jcc && was[i] == 0xe8 {
		want[1] = 0xd0 | reg&7
	}
	if reg > 7 {
		want = append([]byte{0x41}, want...)
	}
	if !bytes.HasPrefix(b, want) {
		return 0
	}
	b = b[len(want):]
	if !isNops(b) && !filled(b, 0xcc) && (len(b) == 0 || b[0] != 0xcc || !isNops(b[1:])) {
		return 0
	}
	return n
}

// constant is what a constant that is only known at run time is.
func (s *started) constant(symbol string) (uint64, error) {
	if v, ok := s.consts[symbol]; ok {
		return v, nil
	}
	var v uint64
	if symbol == "USER_PTR_MAX" { // of arch/x86/include/asm/uaccess_64.h: the last address of user space, by the levels of its page tables
		v = 1<<47 - 4096
		if levels, err := s.img.syms.symbol("__pgtable_l5_enabled"); err == nil {
			if on, err := s.v.Uint32(levels); err == nil && on != 0 {
				v = 1<<56 - 4096
			}
		}
	} else {
		va, err := s.img.syms.symbol(symbol)
		if err != nil {
			return 0, err
		}
		if strings.HasSuffix(symbol, "_shift") {
			n, err := s.v.Uint32(va)
			if err != nil {
				return 0, err
			}
			v = uint64(n)
		} else if v, err = s.v.Uint64(va); err != nil {
			return 0, err
		}
	}
	s.consts[symbol] = v
	return v, nil
}

// nops of 1 to 11 bytes, the longest first: arch/x86/include/asm/nops.h, and the operand prefixes of the assembler.
var nops = []string{
	"\x66\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00", "\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00", "\x66\x0f\x1f\x84\x00\x00\x00\x00\x00",
	"\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00", "\x0f\x1f\x84\x00\x00\x00\x00\x00", "\x0f\x1f\x80\x00\x00\x00\x00", "\x66\x0f\x1f\x44\x00\x00", "\x0f\x1f\x44\x00\x00", "\x0f\x1f\x40\x00",
	"\x0f\x1f\x00", "\x66\x90", "\x90",
}

// plainNops has each nop be as many of one byte, and so a jump over int3 (add_nop of 6.4 and later).
func plainNops(b []byte) []byte {
	b = bytes.Clone(b)
scan:
	for i := 0; i < len(b); {
		for _, n := range nops {
			if bytes.HasPrefix(b[i:], []byte(n)) {
				for j := range n {
					b[i+j] = 0x90
				}
				i += len(n)
				continue scan
			}
		}
		i++
	}
	for i := len(b) - 1; i >= 0; i-- {
		rest, skip, over := b[i:], 0, uint64(0)
		switch {
		case len(rest) > 2 && rest[0] == 0xeb:
			skip, over = 2, uint64(rest[1])
		case len(rest) > 5 && rest[0] == 0xe9:
			skip, over = 5, uint64(le32(rest[1:]))
		}
		if over == 0 || over > uint64(len(rest)-skip) {
			continue
		}
		if in := rest[skip : skip+int(over)]; filled(in, 0xcc) || filled(in, 0x90) {
			for j := range rest[:skip+int(over)] {
				rest[j] = 0x90
			}
		}
	}
	return b
}

// filled reports whether there is nothing but one byte.
func filled(b []byte, with byte) bool { return bytes.Count(b, []byte{with}) == len(b) }

func isNops(b []byte) bool { return filled(plainNops(b), 0x90) }

// sameCode reports whether code is what is wanted, filled up with nops, but that distances to elsewhere have grown by so much, for
// it was written for another place; a jump may have become a short one with nops or, since 6.4, int3 behind it.
func sameCode(now, want []byte, grown uint32) bool {
	if len(want) > len(now) {
		return false
	}
	if len(want) == 5 && want[0] == 0xe9 && len(now) >= 2 && now[0] == 0xeb {
		return int64(int8(now[1]))+2 == int64(int32(le32(want[1:])+grown))+5 && (isNops(now[2:]) || filled(now[2:], 0xcc))
	}
	now, want = plainNops(now), plainNops(want)
	for i := 0; i < len(now); {
		if i >= len(want) {
			return filled(now[i:], 0x90)
		}
		if now[i] == want[i] {
			i++
			continue
		}
		// A distance of 4 bytes that begins at most 3 bytes before.
		moved := false
		for j := max(i-3, 0); j <= i && j+4 <= len(want) && grown != 0; j++ {
			if le32(now[j:]) == le32(want[j:])+grown {
				i, moved = j+4, true
				break
			}
		}
		if !moved {
			return false
		}
	}
	return true
}
