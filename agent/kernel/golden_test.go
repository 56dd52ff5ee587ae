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
	for i := range k {
		k[i] = 0x9e3779b97f4a7c15 * uint64(i+1) * uint64(2*i+3) // as good as any, and the same each time
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
