package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
)

const searchedBase = VirtAddr(0xffffffff81000000)

// searched is a memory with page tables that map 2 MiB of a kernel image at searchedBase to 2 MiB, and that image.
func searched(t testing.TB, image []byte) (flat, *Image) {
	t.Helper()
	if len(image) > 2<<20 {
		t.Fatalf("image of %d bytes", len(image))
	}
	m := make(flat, 4<<20)
	m.put64(4096+8*0x1ff, 2*4096|x8664Present)
	m.put64(2*4096+8*0x1fe, 3*4096|x8664Present)
	m.put64(3*4096+8*8, 0x200000|x8664Present|x8664Huge)
	copy(m[2<<20:], image)
	note, err := parseVMCOREINFO(fmt.Appendf(nil, "OSRELEASE=5.10.0-test\nPAGESIZE=4096\nSYMBOL(_stext)=%x\nSYMBOL(sym4096)=%x\nSYMBOL(sym5000)=%x\n",
		uint64(searchedBase), uint64(searchedBase+4096*16), uint64(searchedBase+5000*16)))
	if err != nil {
		t.Fatal(err)
	}
	return m, &Image{mem: m, note: note, pageSize: 4096, arch: archX8664(), space: &addressSpace{kernel: 0xffff800000000000, root: 4096,
		levels: x8664Levels(4), linear: []linearRange{{searchedBase, searchedBase + 2<<20, 0x200000}}}}
}

// imageWithSymbols lays a table of 5000 symbols out as scripts/kallsyms.c does, with a text behind some code that looks like its digits.
func imageWithSymbols(align int, after bool) []byte {
	var names []string
	var offsets []int32
	for i := range 5001 {
		name := fmt.Sprintf("Tsym%d", i)
		if i == 0 {
			name = "T_stext"
		}
		names = append(names, name)
		offsets = append(offsets, int32(16*i))
	}
	tables := makeKallsyms(names, offsets)
	b := make([]byte, 64<<10)
	copy(b[1000:], kallsymsDigits)
	pad := func() {
		for len(b)%align != 0 {
			b = append(b, 0)
		}
	}
	put := func(part []byte) {
		pad()
		b = append(b, part...)
		pad()
	}
	base := binary.LittleEndian.AppendUint64(nil, uint64(searchedBase))
	if !after {
		put(tables.offsets)
		put(base)
	}
	put(binary.LittleEndian.AppendUint32(nil, uint32(len(names))))
	put(tables.names)
	var markers []byte
	for i, at := 0, 0; i < len(names); i++ {
		if i%kallsymsMarkerEvery == 0 {
			markers = binary.LittleEndian.AppendUint32(markers, uint32(at))
		}
		_, at, _ = nameAt(tables.names, at)
	}
	put(markers)
	put(tables.tokens)
	put(tables.tokenIndex)
	if after {
		put(tables.offsets)
		put(base)
	}
	return append(b, make([]byte, 8<<10)...)
}

func TestSearchSymbols(t *testing.T) {
	for _, c := range []struct {
		align int
		after bool
	}{{8, false}, {4, false}, {4, true}, {8, true}} {
		image := imageWithSymbols(c.align, c.after)
		m, img := searched(t, image)
		src := direct{t.Context(), m}
		_, detail, err := img.findSymbols(t.Context(), src)
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		if va, err := img.syms.symbol("sym3333"); err != nil || va != searchedBase+3333*16 || img.syms.formula != "base-relative" {
			t.Errorf("%+v: sym3333 is at %v, %v; %s", c, va, err, detail)
		}
		// A name that a marker does not lead to, a token that its index does not: no table.
		for _, at := range []VirtAddr{img.syms.places.names + 7, img.syms.places.tokenIndex + 2*200, img.syms.places.num} {
			bad, img := searched(t, image)
			bad[0x200000+int(at-searchedBase)] ^= 0x55
			if _, detail, err := img.findSymbols(t.Context(), direct{t.Context(), bad}); err == nil || !errors.Is(err, ErrNotSupported) && !errors.As(err, new(*CorruptError)) {
				t.Errorf("%+v with %v altered: %s, %v", c, at, detail, err)
			}
		}
	}
}

// imageWithExports has what a kernel without variables in its kallsyms has instead.
func imageWithExports(n int) (image []byte, syms *kallsyms) {
	var names []string
	var offsets []int32
	for i := range n {
		names = append(names, fmt.Sprintf("Tfunction%05d", i))
		offsets = append(offsets, int32(16*i))
	}
	syms, err := newKallsyms(makeKallsyms(names, offsets), n)
	if err != nil {
		panic(err)
	}
	syms.address = func(o int32, _ int) VirtAddr { return searchedBase + VirtAddr(o) }
	image = make([]byte, 1<<20)
	table, text := 0x40000, 0x80000
	relative := func(at, to int) { binary.LittleEndian.PutUint32(image[at:], uint32(int32(to-at))) }
	export := func(name string, value int) {
		relative(table, value)
		relative(table+4, text)
		relative(table+8, 0x7fff0)
		table += 12
		text += copy(image[text:], name+"\x00")
	}
	text++
	for i := range n {
		if i == n/2 {
			export("init_task", 0xf0000)
		}
		export(names[i][1:], 16*i)
	}
	copy(image[0xe0000:], "Linux version 5.10.0-test (who@where) #1 SMP\n")
	copy(image[0xd0000:], "Linux version 5.10.0-test (who@where) # SMP\n")
	return image, syms
}

func TestExports(t *testing.T) {
	image, syms := imageWithExports(2000)
	m, img := searched(t, image)
	img.info.Release = "5.10.0-test"
	img.syms = syms
	detail, err := img.findData(t.Context(), direct{t.Context(), m})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]VirtAddr{"init_task": 0xf0000, "linux_banner": 0xe0000, "function01999": 1999 * 16} {
		if va, err := img.syms.symbol(name); err != nil || va != searchedBase+want {
			t.Errorf("%s is at %v, %v; %s", name, va, err, detail)
		}
	}
	img.syms.settle()
	if name, off, err := img.syms.at(searchedBase + 0xf0008); err != nil || name != "init_task" || off != 8 {
		t.Errorf("at = %s+%d, %v; want init_task+8", name, off, err)
	}
	// A function that is exported elsewhere than kallsyms has it: one of the two was not understood.
	image[0x40000] += 16
	m, img = searched(t, image)
	_, img.syms = imageWithExports(2000)
	if _, err := img.findData(t.Context(), direct{t.Context(), m}); !errors.As(err, new(*CorruptError)) {
		t.Errorf("findData = %v; want a *CorruptError", err)
	}
}

func FuzzImageTables(f *testing.F) {
	f.Add(imageWithSymbols(8, false)[60<<10:], uint32(0), byte(0))
	exports, _ := imageWithExports(1200)
	f.Add(exports[0x3f000:0x90000], uint32(1), byte(1))
	f.Fuzz(func(t *testing.T, image []byte, at uint32, flip byte) {
		if len(image) == 0 || len(image) > 1<<20 {
			return
		}
		image[int(at)%len(image)] ^= flip
		m, img := searched(t, image)
		src := direct{t.Context(), flat(m)}
		img.info.Release = "5.10.0-test"
		if _, _, err := img.findSymbols(t.Context(), src); err == nil {
			if _, err := img.syms.symbol("_stext"); err != nil {
				t.Error("found a table without _stext")
			}
		}
		_, img.syms = imageWithExports(8)
		_, _ = img.findData(t.Context(), src)
		img.syms.settle()
		for _, s := range img.syms.sorted {
			if _, _, err := img.syms.at(s.va); err != nil && s.va >= searchedBase {
				t.Error(err)
			}
		}
	})
}
