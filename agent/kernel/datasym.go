package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// A kernel without CONFIG_KALLSYMS_ALL (Debian's 6.1 for arm64) has only functions in its kallsyms. Its variables are then
// found by what else is in the image: the table of exported symbols, the BTF of per-CPU variables, and the code of short
// functions that use them. What is found so is proven as anything else: by what is there.

const (
	scanChunk  = 1 << 20
	maxExports = 1 << 17
	maxPerCPU  = 1 << 14 // variables
)

// pattern is something to be looked for in the kernel image.
type pattern struct {
	bytes []byte
	// hit judges a place where the bytes are and reports whether that is it.
	hit func(va VirtAddr) (bool, error)

	found bool
}

// scanImage looks through the image from start on, until all patterns are found or the image ends.
func (img *Image) scanImage(ctx context.Context, src source, start, end VirtAddr, patterns ...*pattern) error {
	const overlap = 64
	buf := make([]byte, scanChunk+overlap)
	for at := start; at < end; at += scanChunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(uint64(len(buf)), uint64(end-at))]
		if err := img.readImage(src, at, b); err != nil {
			return err
		}
		left := false
		for _, p := range patterns {
			for o := 0; !p.found; {
				i := bytes.Index(b[o:], p.bytes)
				if i < 0 || o+i >= scanChunk {
					break
				}
				ok, err := p.hit(at + VirtAddr(o+i))
				if err != nil {
					return err
				}
				p.found = ok
				o += i + 1
			}
			left = left || !p.found
		}
		if !left {
			return nil
		}
	}
	return nil
}

// readImage reads from the kernel image. Pages that cannot be read, as those that the kernel gave back (__init) or that
// poisoned memory is in, read as zero.
func (img *Image) readImage(src source, va VirtAddr, b []byte) error {
	err := img.space.object(src, "kernel image", va, b)
	if !unreadable(err) {
		return err
	}
	const page = 4096
	for o := 0; o < len(b); {
		part := b[o:min(o+page-int(uint64(va)+uint64(o))%page, len(b))]
		if err := img.space.object(src, "kernel image", va+VirtAddr(o), part); unreadable(err) {
			clear(part)
		} else if err != nil {
			return err
		}
		o += len(part)
	}
	return nil
}

// unreadable reports whether an error is of a page that a search may step over, as searcher.hole does.
func unreadable(err error) bool {
	var corrupt *CorruptError
	return errors.As(err, &corrupt) || errors.Is(err, ErrNotMapped) || errors.Is(err, hostmem.ErrNotMapped) ||
		errors.Is(err, hostmem.ErrNotRecorded) || errors.Is(err, hostmem.ErrAborted)
}

// imageEnd walks the page tables from _stext on until nothing of the image is mapped any more, stepping over what was freed.
func (img *Image) imageEnd(src source, stext VirtAddr) (VirtAddr, error) {
	const hole = 32 << 20 // what is given back after start-up is smaller
	const stride = 64 << 10
	l := img.space.linear[0]
	end := stext
	for va := stext; va < l.end && va-end < hole; {
		pa, n, err := img.space.walk(src, va)
		if err != nil && !unreadable(err) {
			return 0, err
		}
		step := stride - va%stride
		if err == nil && pa == l.pa+hostmem.PhysAddr(va-l.start) {
			step = VirtAddr(n)
			end = va + step
		}
		va += step
	}
	return min(end, l.end), nil
}

// findData finds what kallsyms does not name. It is a no-op for a kernel whose kallsyms has variables, too.
func (img *Image) findData(ctx context.Context, src source) (string, error) {
	img.note.entries(func(e vmcoreEntry) {
		va, ok := img.note.symbol(e.name)
		if l := img.space.linear[0]; ok && e.kind == "SYMBOL" && va >= l.start && va < l.end {
			img.syms.add(e.name, va)
		}
	})
	if _, err := img.syms.symbol("init_task"); err == nil {
		return "kallsyms has the variables", nil
	}
	img.lacking = true
	stext, _ := img.note.symbol("_stext")
	if c := img.cached; c != nil && c.more != nil {
		for name, at := range c.more {
			img.syms.add(name, stext+at)
		}
		return fmt.Sprintf("kallsyms has no variables; %d of this build are known from before", len(c.more)), nil
	}
	end, err := img.imageEnd(src, stext)
	if err != nil {
		return "", err
	}
	img.syms.add("_end", end)
	from := stext
	if etext, err := img.syms.symbol("_etext"); err == nil && etext > stext && etext < end {
		from = etext // what is looked for is behind the code
	}
	exports, agree := 0, 0
	text := []byte("Linux version " + img.info.Release + " ")
	err = img.scanImage(ctx, src, from, end,
		&pattern{bytes: []byte("\x00init_task\x00"), hit: func(va VirtAddr) (bool, error) {
			var err error
			exports, agree, err = img.readExports(src, va+1, end)
			return exports > 0, err
		}},
		&pattern{bytes: text, hit: func(va VirtAddr) (bool, error) {
			// Since v6.1 there is a weak one, too, which is to be replaced at the end of the build and has no number in it.
			var b [512]byte
			if err := img.readImage(src, va, b[:]); err != nil {
				return false, err
			}
			banner, ended := cString(b[:])
			_, version, _ := strings.Cut(banner, ") #")
			if !ended || version == "" || version[0] < '0' || version[0] > '9' {
				return false, nil
			}
			img.syms.add("linux_banner", va)
			return true, nil
		}},
		&pattern{bytes: []byte{0x9f, 0xeb, 1, 0, btfHeaderLen, 0, 0, 0}, hit: func(va VirtAddr) (bool, error) {
			n, err := img.plausibleBTF(src, va, end)
			if n > 0 {
				img.syms.add("__start_BTF", va)
				img.syms.add("__stop_BTF", va+VirtAddr(n))
			}
			return n > 0, err
		}})
	if err != nil {
		return "", err
	}
	if exports == 0 {
		return "", fmt.Errorf("kallsyms has no variables (CONFIG_KALLSYMS_ALL) and no table of exported symbols was found: %w", ErrNotSupported)
	}
	return fmt.Sprintf("kallsyms has no variables; %d exported symbols, of which %d functions are in kallsyms and agree; image up to %v", exports, agree, end), nil
}

// readExports reads __ksymtab and __ksymtab_gpl around the entry of the name at va: three 32-bit words each, relative to
// themselves, for the value, the name and the namespace (struct kernel_symbol with CONFIG_HAVE_ARCH_PREL32_RELOCATIONS,
// include/linux/export-internal.h, since v5.4). It returns how many there are, zero if va is not such a name, and how many of
// them kallsyms has, too: with the same addresses, for else the encoding of kallsyms was not understood.
func (img *Image) readExports(src source, name, end VirtAddr) (n, agree int, err error) {
	const entry, reach = 12, 1 << 20
	stext, _ := img.note.symbol("_stext")
	lo := max(name-min(name, reach), stext) &^ 3
	hi := min(name+reach, end)
	b := make([]byte, hi-lo)
	if err := img.readImage(src, lo, b); err != nil {
		return 0, 0, err
	}
	relative := func(o int) VirtAddr { return lo + VirtAddr(o) + VirtAddr(int64(int32(le32(b[o:])))) }
	read := func(o int) (string, VirtAddr, bool) {
		if o < 0 || o+entry > len(b) {
			return "", 0, false
		}
		value, at := relative(o), relative(o+4)
		if value < stext || value > end || at < lo || at >= hi {
			return "", 0, false
		}
		text := b[at-lo:]
		n := bytes.IndexByte(text[:min(len(text), 256)], 0)
		if n < 1 || !isName(text[:n]) { // it may be the end of a longer name
			return "", 0, false
		}
		return string(text[:n]), value, true
	}
	for o := 4; o+8 <= int(name-lo); o += 4 {
		if relative(o) != name {
			continue
		}
		first := o - 4
		if s, _, ok := read(first); !ok || s != "init_task" {
			continue
		}
		for {
			if _, _, ok := read(first - entry); !ok {
				break
			}
			first -= entry
		}
		type export struct {
			name string
			va   VirtAddr
		}
		var all []export
		for n, agree = 0, 0; n < maxExports; n++ {
			s, va, ok := read(first + n*entry)
			if !ok {
				break
			}
			switch known, err := img.syms.symbol(s); {
			case err == nil && known == va:
				agree++
			case err == nil:
				return 0, 0, &CorruptError{"kallsyms", known, fmt.Sprintf("has %s, which is exported at %v", s, va)}
			}
			all = append(all, export{s, va})
		}
		if agree < 1000 { // any kernel with modules has thousands
			continue
		}
		for _, e := range all {
			img.syms.add(e.name, e.va)
		}
		return n, agree, nil
	}
	return 0, 0, nil
}

func isName(b []byte) bool {
	for _, c := range b {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '.' {
			return false
		}
	}
	return true
}

// plausibleBTF returns the size of the BTF at va; zero if it does not look like that of a kernel.
func (img *Image) plausibleBTF(src source, va, end VirtAddr) (int, error) {
	var h [btfHeaderLen]byte
	if err := img.readImage(src, va, h[:]); err != nil {
		return 0, err
	}
	typeOff, typeLen, strOff, strLen := le32(h[8:]), le32(h[12:]), le32(h[16:]), le32(h[20:])
	n := btfHeaderLen + uint64(strOff) + uint64(strLen)
	if typeOff != 0 || strOff != typeLen || typeLen < 64<<10 || n > btfMaxSize || n > uint64(end-va) {
		return 0, nil
	}
	return int(n), nil
}

// perCPUNames adds the per-CPU variables that BTF names (DATASEC ".data..percpu"). Where the section begins follows from
// those that are exported, too, which must all agree.
func (img *Image) perCPUNames(vars map[string]uint32) (int, error) {
	var base VirtAddr
	agree := 0
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		va, err := img.syms.symbol(name)
		if err != nil {
			continue
		}
		if at := va - VirtAddr(vars[name]); agree == 0 {
			base = at
		} else if at != base {
			return 0, &CorruptError{"BTF", va, fmt.Sprintf("per-CPU variable %s puts the section at %v, others at %v", name, at, base)}
		}
		agree++
	}
	if agree < 3 {
		return 0, fmt.Errorf("only %d per-CPU variables are known otherwise: %w", agree, ErrNotSupported)
	}
	end := base
	for name, offset := range vars {
		img.syms.add(name, base+VirtAddr(offset))
		end = max(end, base+VirtAddr(offset)+1)
	}
	img.syms.add("__per_cpu_start", base)
	img.syms.add("__per_cpu_end", end)
	return agree, nil
}

// decoded are variables whose addresses stand in the code of short functions that use them.
var decoded = []struct {
	name      string
	functions []string
	// is judges a candidate; it may move it, from a member to the variable's start.
	is func(img *Image, src source, at VirtAddr) (VirtAddr, bool)
}{
	{"tk_core", []string{"ktime_get_real_seconds", "ktime_get_seconds"}, (*Image).isKeeper},
	{"tainted_mask", []string{"get_taint", "test_taint"}, smallWord},
	{"panic_cpu", []string{"nmi_panic"}, isPanicCPU},
	{"modules", []string{"m_start", "module_get_kallsym"}, isModuleList},
	{"module_kset", []string{"module_add_driver", "lookup_or_create_module_kobject", "locate_module_kobject"}, isModuleKset},
	{"mod_tree", []string{"__module_address"}, isModTree},
	{"slab_caches", []string{"slab_start", "slab_next"}, isListHead},
	{"psi_system", []string{"psi_memory_show"}, isPressure},
	{"vmstat_text", []string{"vmstat_show"}, isCounterNames},
	{"vmcoreinfo_note", []string{"paddr_vmcoreinfo_note"}, isNotePointer},
	{"kprobe_table", []string{"get_kprobe"}, isProbeTable},
}

// findDecoded finds variables in code. What is not found is missed where it is needed.
func (img *Image) findDecoded(src source) (found []string) {
	if img.arch.located == nil {
		return nil
	}
	for _, d := range decoded {
		if _, err := img.syms.symbol(d.name); err == nil {
			continue
		}
	functions:
		for _, f := range d.functions {
			va, err := img.syms.symbol(f)
			if err != nil {
				continue
			}
			for _, at := range img.arch.located(img, src, va, img.syms.sizeAt(va)) {
				if at, ok := d.is(img, src, at); ok {
					img.syms.add(d.name, at)
					found = append(found, d.name)
					break functions
				}
			}
		}
	}
	return found
}

// smallWord: a word of few bits.
func smallWord(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	var b [8]byte
	err := img.space.object(src, "variable", at, b[:])
	return at, err == nil && at%8 == 0 && le64(b[:])>>20 == 0
}

// isPanicCPU: PANIC_CPU_INVALID, or a CPU; and no per-CPU variable, as the number of the CPU is.
func isPanicCPU(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	var b [4]byte
	err := img.space.object(src, "variable", at, b[:])
	start, _ := img.syms.symbol("__per_cpu_start")
	end, _ := img.syms.symbol("__per_cpu_end")
	return at, err == nil && at%4 == 0 && (at < start || at >= end) && (le32(b[:]) == 0xffffffff || le32(b[:]) < maxCPUs)
}

// isProbeTable: the first element of each chain points back to it.
func isProbeTable(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	var heads [8 * kprobeChains]byte
	if at%8 != 0 || img.space.object(src, "kprobe_table", at, heads[:]) != nil {
		return at, false
	}
	for i := 0; i < len(heads); i += 8 {
		first := VirtAddr(le64(heads[i:]))
		if first == 0 {
			continue
		}
		var node [16]byte // next, pprev
		if !img.space.valid(first, 8) || img.space.object(src, "kprobe", first, node[:]) != nil || VirtAddr(le64(node[8:])) != at+VirtAddr(i) {
			return at, false
		}
	}
	return at, true
}

// isModuleList: a list's head, which may be that of none: these functions use no other list.
func isModuleList(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	var head [16]byte
	if at%8 == 0 && img.space.object(src, "list_head", at, head[:]) == nil && VirtAddr(le64(head[:])) == at && VirtAddr(le64(head[8:])) == at {
		return at, true
	}
	return isListHead(img, src, at)
}

// isListHead: the neighbours of a list's head point back to it.
func isListHead(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	var head, next, prev [16]byte
	if at%8 != 0 || img.space.object(src, "list_head", at, head[:]) != nil {
		return 0, false
	}
	n, p := VirtAddr(le64(head[:])), VirtAddr(le64(head[8:]))
	if n == at || !img.space.valid(n, 8) || !img.space.valid(p, 8) ||
		img.space.object(src, "list_head", n, next[:]) != nil || img.space.object(src, "list_head", p, prev[:]) != nil {
		return 0, false
	}
	return at, VirtAddr(le64(next[8:])) == at && VirtAddr(le64(prev[:])) == at
}

// isModuleKset: a pointer to the kset "module".
func isModuleKset(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	r := resolver{img: img}
	name := r.field("kset", 8, "kobj.name")
	var p [8]byte
	if r.err != nil || at%8 != 0 || img.space.object(src, "kset", at, p[:]) != nil {
		return 0, false
	}
	kset := VirtAddr(le64(p[:]))
	if !img.space.valid(kset, 8) || img.space.object(src, "kset", kset+VirtAddr(name), p[:]) != nil {
		return 0, false
	}
	return at, img.textAt(src, VirtAddr(le64(p[:]))) == "module"
}

// isModTree: a tree of which the bounds of the modules' addresses are known.
func isModTree(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	r := resolver{img: img}
	size := r.size("mod_tree_root")
	lo, hi := r.field("mod_tree_root", 8, "addr_min"), r.field("mod_tree_root", 8, "addr_max")
	tree := r.field("mod_tree_root", 16, "root.tree")
	if r.err != nil || size < 40 || at%8 != 0 {
		return 0, false
	}
	b := make([]byte, size)
	if img.space.object(src, "mod_tree", at, b) != nil {
		return 0, false
	}
	first, last := VirtAddr(le64(b[lo:])), VirtAddr(le64(b[hi:]))
	if a, b := le64(b[tree:]), le64(b[tree+8:]); (a == 0) != (b == 0) || a != 0 && (!img.space.valid(VirtAddr(a), 8) || !img.space.valid(VirtAddr(b), 8)) {
		return 0, false
	}
	none := first == ^VirtAddr(0) && last == 0
	return at, none || img.space.valid(first, 4096) && first < last && last-first < 1<<32
}

// isPressure: a group whose per-CPU part is that of the whole system.
func isPressure(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	r := resolver{img: img}
	pcpu, want := r.field("psi_group", 8, "pcpu"), r.symbol("system_group_pcpu")
	var p [8]byte
	return at, r.err == nil && at%8 == 0 && img.space.object(src, "psi_group", at+VirtAddr(pcpu), p[:]) == nil && VirtAddr(le64(p[:])) == want
}

// isCounterNames: an array of pointers to texts, of which the first is known.
func isCounterNames(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	var p [8]byte
	return at, at%8 == 0 && img.space.object(src, "vmstat_text", at, p[:]) == nil && img.textAt(src, VirtAddr(le64(p[:]))) == "nr_free_pages"
}

// isNotePointer: a pointer to a note of VMCOREINFO.
func isNotePointer(img *Image, src source, at VirtAddr) (VirtAddr, bool) {
	var p [8]byte
	if at%8 != 0 || img.space.object(src, "vmcoreinfo_note", at, p[:]) != nil {
		return 0, false
	}
	note := VirtAddr(le64(p[:]))
	return at, note%4096 == 0 && img.space.valid(note, 4096) && img.textAt(src, note+12) == "VMCOREINFO"
}

// textAt returns the short text at va; empty if there is none.
func (img *Image) textAt(src source, va VirtAddr) string {
	var b [32]byte
	if !img.space.valid(va, 1) || img.space.object(src, "text", va, b[:]) != nil {
		return ""
	}
	s, ended := cString(b[:])
	if !ended {
		return ""
	}
	return s
}

// isKeeper: tk_core, or a member of its timekeeper.
func (img *Image) isKeeper(src source, at VirtAddr) (VirtAddr, bool) {
	for _, member := range []string{"", "xtime_sec", "ktime_sec"} {
		start := at
		if member != "" {
			f, err := img.types.field("timekeeper", member)
			if err != nil {
				continue
			}
			start -= VirtAddr(f.Offset + img.keeperOffset())
		}
		if start%8 == 0 && img.keeperAt(src, start).err == nil {
			return start, true
		}
	}
	return 0, false
}
