package main

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/u-root/u-root/pkg/boot/image"
	"github.com/u-root/u-root/pkg/boot/kexec"
	"github.com/u-root/u-root/pkg/dt"
)

// testImage is the header of an arm64 kernel with something behind it.
func testImage(size, offset uint64) []byte {
	var b bytes.Buffer
	h := image.Arm64Header{TextOffset: offset, ImageSize: size, Magic: image.Magic}
	if err := binary.Write(&b, binary.LittleEndian, h); err != nil {
		panic(err)
	}
	return append(b.Bytes(), make([]byte, 100<<10)...)
}

func testTree() *dt.FDT {
	chosen := &dt.Node{Name: "chosen", Properties: []dt.Property{
		{Name: "bootargs", Value: []byte("old\x00")}, {Name: "rng-seed", Value: []byte("used")}, {Name: "kaslr-seed", Value: make([]byte, 8)},
		{Name: "linux,initrd-start", Value: make([]byte, 4)},
	}}
	return &dt.FDT{Header: dt.Header{Magic: dt.Magic, Version: 17, LastCompVersion: 16}, RootNode: &dt.Node{Children: []*dt.Node{chosen}}}
}

func TestPlace(t *testing.T) {
	ram := kexec.Range{Start: 0x40000000, Size: 512 << 20}
	taken := kexec.Range{Start: 0x40210000, Size: 26 << 20}
	mm := kexec.MemoryMap{{Range: ram, Type: kexec.RangeRAM}}
	mm.Insert(kexec.TypedRange{Range: taken, Type: kexec.RangeReserved})
	ramfs := bytes.Repeat([]byte{7}, 5<<20+3)
	kernel := testImage(29<<20, 0)

	var seeds [][]byte
	for range 2 {
		fdt := testTree()
		entry, segments, err := place(mm, fdt, kernel, ramfs, "console=ttyAMA0 backdoor.slot=a")
		if err != nil {
			t.Fatal(err)
		}
		find := func(buf []byte) kexec.Range {
			for _, s := range segments {
				if bytes.HasPrefix(s.Buf, buf) {
					return s.Phys
				}
			}
			t.Fatalf("no segment begins with %x", buf[:4])
			return kexec.Range{}
		}
		for i, s := range segments {
			if !ram.IsSupersetOf(s.Phys) || s.Phys.Overlaps(taken) {
				t.Errorf("segment %v is not in free memory", s)
			}
			for _, o := range segments[:i] {
				if s.Phys.Overlaps(o.Phys) {
					t.Errorf("segments %v and %v overlap", s, o)
				}
			}
		}
		k, r, tree := find(kernel), find(ramfs), find([]byte{0xd0, 0x0d, 0xfe, 0xed})
		if k.Start%imageAlign != 0 || k.Size < 29<<20 {
			t.Errorf("the kernel is at %v", k)
		}
		if find(trampoline(uint64(k.Start), uint64(tree.Start))).Start != entry {
			t.Errorf("the entry %#x is no trampoline", entry)
		}
		chosen, _ := fdt.NodeByName("chosen")
		value := func(name string) []byte {
			p, ok := chosen.LookProperty(name)
			if !ok {
				t.Fatalf("/chosen has no %s", name)
			}
			return p.Value
		}
		if got := value("bootargs"); string(got) != "console=ttyAMA0 backdoor.slot=a\x00" {
			t.Errorf("bootargs = %q", got)
		}
		start, end := binary.BigEndian.Uint64(value("linux,initrd-start")), binary.BigEndian.Uint64(value("linux,initrd-end"))
		if start != uint64(r.Start) || end != start+uint64(len(ramfs)) {
			t.Errorf("the initramfs is from %#x to %#x, not at %v", start, end, r)
		}
		if len(value("kaslr-seed")) != 8 || len(value("rng-seed")) != 64 {
			t.Error("the seeds have not their size")
		}
		seeds = append(seeds, value("kaslr-seed"), value("rng-seed"))
	}
	if bytes.Equal(seeds[0], seeds[2]) || bytes.Equal(seeds[1], seeds[3]) {
		t.Error("two kernels have the same seeds")
	}

	for what, kernel := range map[string][]byte{
		"no Image": make([]byte, 4096), "short": []byte("MZ"), "too large": testImage(1<<40, 0), "larger than the memory": testImage(600<<20, 0),
	} {
		if _, _, err := place(mm, testTree(), kernel, ramfs, ""); err == nil {
			t.Errorf("%s: placed", what)
		}
	}
	if _, _, err := place(mm, testTree(), kernel, make([]byte, 600<<20), ""); err == nil {
		t.Error("an initramfs larger than the memory: placed")
	}
	if _, _, err := place(mm, &dt.FDT{RootNode: &dt.Node{}}, kernel, ramfs, ""); err == nil {
		t.Error("a device tree without /chosen: placed")
	}
}
