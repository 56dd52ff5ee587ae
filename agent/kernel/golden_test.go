package kernel

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// store is golden bytes in memory.
type store []byte

func (s store) ReadAt(b []byte, off int64) (int, error)  { return copy(b, s[off:]), nil }
func (s store) WriteAt(b []byte, off int64) (int, error) { return copy(s[off:], b), nil }

const goldenBase = 0xffffffff81000000

// madeGolden is a golden copy of 8 KiB of code with places to patch at its edges and everywhere, and of 4 KiB of constants.
func madeGolden(t *testing.T) (*Golden, flat, *View) {
	t.Helper()
	mem := make(flat, 12<<10)
	for i := range mem {
		mem[i] = byte(rand.IntN(256))
	}
	img := &Image{mem: mem, arch: archX8664(), space: &addressSpace{kernel: goldenBase, linear: []linearRange{{start: goldenBase, end: goldenBase + VirtAddr(len(mem)), pa: 0}}}, syms: &kallsyms{}}
	g := &Golden{goldenPart: goldenPart{goldenShared: &goldenShared{key: newLineKey(), traps: &traps{listed: true}},
		img: img, keep: make(store, len(mem)), base: goldenBase, total: uint64(len(mem)), suspects: make(map[uint64]*suspect),
		regions: []region{{"text", goldenBase, goldenBase + 8<<10, 0}, {"rodata", goldenBase + 8<<10, goldenBase + 12<<10, 8 << 10}},
		sums:    make([]uint32, len(mem)/goldenLine)}}
	for _, x := range []struct {
		off  uint64
		kind uint64
		code string
	}{
		{0, siteEntry, "\xf3\x0f\x1e\xfa\x0f\x1f\x44\x00\x00"}, {126, siteJump, "\x0f\x1f\x44\x00\x00"}, {1000, siteJump, "\x66\x90"},
		{2046, siteCall, "\xe8\x01\x02\x03\x04"}, {4095, siteEntry, "\x0f\x1f\x44\x00\x00"}, {5000, siteTramp, "\xe9\x01\x02\x03\x04"},
		{8186, siteJump, "\xe9\x01\x02\x03\x04"},
	} {
		copy(mem[x.off:], x.code)
		g.sites = append(g.sites, x.off<<8|x.kind)
	}
	v := img.View(t.Context())
	for at := uint64(0); at < g.total; {
		raw, plain, err := g.read(v, at, 1000, nil)
		if err != nil {
			t.Fatal(err)
		}
		copy(g.keep.(store)[at:], raw)
		for i := 0; i < len(plain); i += goldenLine {
			g.sums[(at+uint64(i))/goldenLine] = g.key.sum(plain[i : i+goldenLine])
		}
		at += uint64(len(raw))
	}
	return g, mem, v
}

// look compares everything until what differs is sure.
func look(t *testing.T, g *Golden, v *View) []Change {
	t.Helper()
	if err := g.Sweep(v, g.total, 0); err != nil {
		t.Fatal(err)
	}
	if len(g.suspects) > 0 {
		time.Sleep(goldenStands)
	}
	if err := g.Sweep(v, 1, 0); err != nil {
		t.Fatal(err)
	}
	return g.Changes(v)
}

func TestGolden(t *testing.T) {
	for _, tt := range []struct {
		name string
		f    func(mem flat)
		want []Change // Addr relative to the base, Was is taken from the copy
	}{
		{"nothing", func(flat) {}, nil},
		{"everything is patched", func(mem flat) {
			copy(mem[4:], "\xe8\x11\x22\x33\x44")
			copy(mem[126:], "\xe9\x11\x22\x33\x44") // across two lines
			copy(mem[1000:], "\xeb\x11")
			copy(mem[2046:], "\x0f\x1f\x44\x00\x00")
			copy(mem[4095:], "\xe8\x11\x22\x33\x44")
			copy(mem[5000:], "\xc3\xcc\xcc\xcc\xcc")
		}, nil},
		{"code", func(mem flat) { mem[3000] ^= 1 }, []Change{{Region: "text", Addr: 3000}}},
		{"code across two words", func(mem flat) { mem[3007] ^= 1; mem[3008] ^= 1 }, []Change{{Region: "text", Addr: 3000, Now: make(HexBytes, 16)}}},
		{"code beside what is patched", func(mem flat) {
			copy(mem[2046:], "\x0f\x1f\x44\x00\x00")
			mem[2051] ^= 1
		}, []Change{{Region: "text", Addr: 2048}}},
		{"what is no patch where one may be", func(mem flat) { mem[4] = 0xcc }, []Change{{Region: "text", Addr: 0}}},
		{"constants", func(mem flat) { mem[9000] ^= 1 }, []Change{{Region: "rodata", Addr: 9000}}},
		{"two", func(mem flat) { mem[9000] ^= 1; mem[9016] ^= 1 }, []Change{{Region: "rodata", Addr: 9000}, {Region: "rodata", Addr: 9016}}},
		{"the last byte", func(mem flat) { mem[12<<10-1] ^= 1 }, []Change{{Region: "rodata", Addr: 12<<10 - 8}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, mem, v := madeGolden(t)
			was := slices.Clone(mem)
			tt.f(mem)
			got := look(t, g, v)
			if len(got) != len(tt.want) {
				t.Fatalf("%+v; want %+v", got, tt.want)
			}
			for i, c := range got {
				w, n := tt.want[i], 8
				if w.Now != nil {
					n = len(w.Now)
				}
				if c.Region != w.Region || c.Addr != goldenBase+w.Addr || len(c.Now) != n || !bytes.Equal(c.Now, mem[w.Addr:][:n]) {
					t.Errorf("%+v; want %+v", c, w)
				}
				copy(mem[w.Addr:], c.Was) // put back, it is gone
			}
			if got := look(t, g, v); len(got) > 0 {
				t.Errorf("restored, and yet %+v", got)
			}
			if tt.name != "everything is patched" && tt.name != "code beside what is patched" && !bytes.Equal(mem, was) {
				t.Error("what was put back is not what was there")
			}
		})
	}
}

// A change for a moment is none: that is how patching looks in its middle.
func TestGoldenMoment(t *testing.T) {
	g, mem, v := madeGolden(t)
	mem[3000] ^= 1
	if err := g.Sweep(v, g.total, 0); err != nil {
		t.Fatal(err)
	}
	mem[3000] ^= 1
	if err := g.Sweep(v, 1, 0); err != nil {
		t.Fatal(err)
	}
	if c := g.Changes(v); len(c) > 0 || len(g.suspects) > 0 {
		t.Errorf("%+v", c)
	}
}

// A golden copy that was tampered with itself is told from what it was.
func TestGoldenDamaged(t *testing.T) {
	g, mem, v := madeGolden(t)
	mem[3000] ^= 1
	g.keep.(store)[3000] ^= 2
	c := look(t, g, v)
	if len(c) != 1 || len(c[0].Was) > 0 || len(c[0].Now) != goldenLine {
		t.Errorf("%+v", c)
	}
}

// What is compared in pieces of any size, from anywhere, is what was kept.
func TestGoldenPieces(t *testing.T) {
	g, _, v := madeGolden(t)
	for range 500 {
		at := uint64(rand.IntN(int(g.total/goldenLine))) * goldenLine
		if _, err := g.compare(v, at, 1+uint64(rand.IntN(4000))); err != nil {
			t.Fatal(err)
		}
	}
	if len(g.suspects) > 0 {
		t.Errorf("%d lines differ from themselves", len(g.suspects))
	}
}

func TestGoldenRefuses(t *testing.T) {
	if _, err := TakeGolden(context.Background(), &Image{arch: &arch{}}, nil, nil); err == nil {
		t.Error("a golden copy of code that is not understood")
	}
}

// Tables of functions are looked at by themselves, each once in a round of theirs, and nothing else is.
func TestGoldenHot(t *testing.T) {
	g, mem, v := madeGolden(t)
	g.heat(goldenBase+9000, 64)
	g.heat(goldenBase+11000, 300)
	g.heat(goldenBase+12<<10-8, 64) // reaches out of the constants: none of them
	total, hot := g.Bytes()
	if total != 12<<10 || hot < 364 || hot > 364+4*goldenLine || len(g.hot) != 2 {
		t.Fatalf("%d bytes in all, %d in %d tables", total, hot, len(g.hot))
	}
	mem[9010] ^= 1
	mem[11200] ^= 1
	mem[10000] ^= 1 // in none
	for range 2 {
		for range len(g.hot) {
			if err := g.Sweep(v, 0, 1); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(goldenStands)
	}
	if err := g.Sweep(v, 0, 0); err != nil {
		t.Fatal(err)
	}
	c := g.Changes(v)
	if len(c) != 2 || c[0].Addr != goldenBase+9008 || c[1].Addr != goldenBase+11200 {
		t.Errorf("%+v", c)
	}
	if g.Rounds() != 0 {
		t.Errorf("%d rounds", g.Rounds())
	}
}

// A line that differs in one bit, or whose words have changed places, has another sum.
func TestLineKey(t *testing.T) {
	k := newLineKey()
	for i := range len(k.words) + len(k.fold) { // as good as any, and the same each time
		key := 0x9e3779b97f4a7c15 * uint64(i+1) * uint64(2*i+3)
		if i < len(k.words) {
			k.words[i] = key
		} else {
			k.fold[i-len(k.words)] = key
		}
	}
	line := make([]byte, goldenLine)
	for i := range line {
		line[i] = byte(i * 37)
	}
	was := k.sum(line)
	for bit := range 8 * goldenLine {
		line[bit/8] ^= 1 << (bit % 8)
		if k.sum(line) == was {
			t.Errorf("bit %d is not looked at", bit)
		}
		line[bit/8] ^= 1 << (bit % 8)
	}
	for i := 0; i < goldenLine-4; i += 4 {
		swapped := slices.Clone(line)
		copy(swapped[i:], line[i+4:i+8])
		copy(swapped[i+4:], line[i:i+4])
		if k.sum(swapped) == was {
			t.Errorf("words %d and %d may change places", i/4, i/4+1)
		}
	}
	if k.sum(line) != was {
		t.Error("the same line has two sums")
	}
}

// compareModules takes all modules, compares them once, and tells of what differs.
func compareModules(v *View) error {
	g := &Golden{goldenPart: goldenPart{goldenShared: &goldenShared{key: newLineKey(), traps: &traps{}}, img: v.img}}
	if err := g.modules(v); err != nil {
		return err
	}
	g.mods.begin()
	for range g.mods.queue {
		if err := g.Sweep(v, goldenModulesMost, 0); err != nil {
			return err
		}
	}
	g.Changes(v)
	return nil
}

// What aarch64 patches is made zeros where it is what it patches there, and nothing else is.
func TestAArch64Blank(t *testing.T) {
	const bti, mov, nop, bl, b, ret, pointer = 0xd503245f, 0xaa1e03e9, 0xd503201f, 0x97ffabcd, 0x14000123, 0xd65f03c0, 0x12345678
	for _, tt := range []struct {
		name string
		kind uint64
		code []uint32 // two words before the place
		want []uint32
	}{
		{"a key that is off", siteJump, []uint32{ret, ret, nop, ret}, []uint32{ret, ret, 0, ret}},
		{"a key that is on", siteJump, []uint32{ret, ret, b, ret}, []uint32{ret, ret, 0, ret}},
		{"a call where a key is", siteJump, []uint32{ret, ret, bl, ret}, nil},
		{"not traced", siteEntry, []uint32{ret, ret, mov, nop, ret}, []uint32{ret, ret, mov, 0, ret}},
		{"traced", siteEntry, []uint32{ret, ret, mov, bl, ret}, []uint32{ret, ret, mov, 0, ret}},
		{"traced behind a BTI", siteEntry, []uint32{ret, ret, bti, mov, bl}, []uint32{ret, ret, bti, mov, 0}},
		{"a jump where calls are", siteEntry, []uint32{ret, ret, mov, b, ret}, nil},
		{"what is no beginning", siteEntry, []uint32{ret, ret, nop, bl, ret}, nil},
		{"with a pointer before", siteOps, []uint32{pointer, pointer, mov, bl, ret}, []uint32{0, 0, mov, 0, ret}},
		{"with a pointer before, and a BTI", siteOps, []uint32{pointer, pointer, bti, mov, nop}, []uint32{0, 0, bti, mov, 0}},
		{"a pointer before what is not traced", siteOps, []uint32{pointer, pointer, ret, ret, ret}, nil},
		{"ftrace's own call", siteCalls, []uint32{ret, ret, bl, ret}, []uint32{ret, ret, 0, ret}},
		{"at the end", siteEntry, []uint32{ret, ret, mov}, nil},
		{"at the very end", siteJump, []uint32{ret, ret}, nil},
	} {
		code := make([]byte, 4*len(tt.code))
		for i, w := range tt.code {
			putLE32(code[4*i:], w)
		}
		aarch64Blank(tt.kind, code, 8)
		if tt.want == nil {
			tt.want = tt.code
		}
		for i, w := range tt.want {
			if got := le32(code[4*i:]); got != w {
				t.Errorf("%s: word %d is %#x, not %#x", tt.name, i, got, w)
			}
		}
	}
}

// A breakpoint is taken for what the kernel says was there, in the middle and at the edges of a piece; other code stays.
func TestDisarm(t *testing.T) {
	x86, arm := &Image{arch: archX8664()}, &Image{arch: archAArch64()}
	for _, tt := range []struct {
		name      string
		img       *Image
		at        VirtAddr // the piece begins at 100
		was       string
		now, want string
	}{
		{"int3", x86, 102, "\x55\x01\x02\x03\x04", "\x90\x90\xcc\x90", "\x90\x90\x55\x90"},
		{"int3 at the end", x86, 103, "\x55", "\x90\x90\x90\xcc", "\x90\x90\x90\x55"},
		{"a jump", x86, 101, "\x55\x01\x02\x03\x04", "\x90\xe9aaaa\x90", "\x90\x55\x01\x02\x03\x04\x90"},
		{"a jump across the end", x86, 101, "\x55\x01\x02\x03\x04", "\x90\xe9aa", "\x90\x55\x01\x02"},
		{"a jump of one that cannot be one", x86, 101, "\x55", "\x90\xe9aaaa", "\x90\xe9aaaa"},
		{"none is there", x86, 101, "\x55", "\x90\x66\x90", "\x90\x66\x90"},
		{"elsewhere", x86, 99, "\x55", "\xcc\x90", "\xcc\x90"},
		{"BRK #4", arm, 100, "abcd", "\x80\x00\x20\xd4", "abcd"},
		{"BRK #5", arm, 100, "abcd", "\xa0\x00\x20\xd4", "\xa0\x00\x20\xd4"},
		{"cut off", arm, 102, "abcd", "xx\x80\x00", "xx\x80\x00"},
	} {
		b := []byte(tt.now)
		tt.img.disarm([]trap{{50, []byte("x")}, {tt.at, []byte(tt.was)}, {5000, []byte("x")}}, 100, b)
		if string(b) != tt.want {
			t.Errorf("%s: %x; want %x", tt.name, b, tt.want)
		}
	}
}

// The table of static keys is found in what is around it, wherever it begins.
func TestJumpRows(t *testing.T) {
	const text, etext = VirtAddr(0xffff800008010000), VirtAddr(0xffff800008020000)
	for _, at := range []int{0, 8, 1 << 12, 3<<12 + 24} {
		data := make([]byte, 64<<10)
		for i := range data {
			data[i] = byte(rand.IntN(256))
		}
		const n = 300
		end := etext + VirtAddr(len(data))
		for i := range n {
			va := etext + VirtAddr(at+i*jumpEntry)
			b := data[at+i*jumpEntry:]
			site := text + VirtAddr(4*i)
			key := uint64(end - 8 - va - 8)
			if i%10 == 0 { // of code that was given back
				site, key = etext+VirtAddr(4*i), key|2
			}
			putLE32(b, uint32(site-va))
			putLE32(b[4:], uint32(text+VirtAddr(8*i)-va-4))
			putLE64(b[8:], key)
		}
		rows := jumpRows{text: text, etext: etext, end: end, began: [2]VirtAddr{etext, etext + 8}}
		rows.look(etext, data)
		if rows.at != etext+VirtAddr(at) || rows.bytes != n*jumpEntry {
			t.Errorf("at %d: %d bytes at %d; want %d", at, rows.bytes, rows.at-etext, n*jumpEntry)
		}
	}
}

// FuzzPatched gives anything to what looks at code and at tables of places in it.
func FuzzPatched(f *testing.F) {
	f.Add([]byte("\x5f\x24\x03\xd5\xe9\x03\x1e\xaa\x1f\x20\x03\xd5"), uint16(0), []byte("\x90"))
	f.Add([]byte("\xf3\x0f\x1e\xfa\x0f\x1f\x44\x00\x00\xcc\xe9"), uint16(9), []byte("\x55\x01\x02\x03\x04"))
	f.Add([]byte("\x0f\x1f\x44\x00\x00\xcc"), uint16(5), []byte{}) // of which nothing is kept
	f.Fuzz(func(t *testing.T, code []byte, at uint16, was []byte) {
		for _, a := range arches() {
			img := &Image{arch: a}
			g := &goldenPart{img: img, regions: []region{{name: "text", to: VirtAddr(len(code))}}}
			g.relative(0, code, jumpEntry, siteJump)
			for kind := uint64(siteJump); kind <= siteCalls; kind++ {
				g.site(VirtAddr(at), kind)
			}
			g.sortSites()
			b := slices.Clone(code)
			img.disarm([]trap{{VirtAddr(at), was}}, 0, b)
			g.normalize(0, b)
			once := slices.Clone(b)
			if g.normalize(0, b); len(b) != len(code) || a.name == "aarch64" && !bytes.Equal(b, once) {
				t.Errorf("%s: %x once, %x twice", a.name, once, b)
			}
		}
		rows := jumpRows{etext: 64 << 10, end: 1 << 20}
		rows.look(64<<10, code)
		if rows.bytes > len(code) {
			t.Errorf("a row of %d bytes in %d", rows.bytes, len(code))
		}
	})
}
