package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// TestAArch64Levels walks tables made up for every granule and size of address space that kernels are built with. Kernels
// were tried with 4 KiB (48 and 52 bits) and 16 KiB pages; 39 bits and 64 KiB stand on the manual alone.
func TestAArch64Levels(t *testing.T) {
	for _, c := range []struct {
		page   uint64
		bits   int64
		levels int
		root   uint8 // bits of the root's index
	}{
		{4 << 10, 39, 3, 9}, {4 << 10, 48, 4, 9}, {4 << 10, 52, 5, 4},
		{16 << 10, 36, 2, 11}, {16 << 10, 47, 3, 11}, {16 << 10, 48, 4, 1}, {16 << 10, 52, 4, 5},
		{64 << 10, 42, 2, 13}, {64 << 10, 48, 3, 6}, {64 << 10, 52, 3, 10},
	} {
		t.Run(fmt.Sprintf("%dK-%d", c.page>>10, c.bits), func(t *testing.T) {
			levels, bits, err := aarch64Levels(c.page, 64-c.bits)
			if err != nil || int64(bits) != c.bits || len(levels) != c.levels || levels[0].bits != c.root {
				t.Fatalf("%d levels, root of %d bits, %d bits, %v; want %d, %d", len(levels), levels[0].bits, bits, err, c.levels, c.root)
			}
			m := make(flat, (c.levels+2)*int(c.page))
			s := &addressSpace{kernel: -VirtAddr(1 << c.bits), root: hostmem.PhysAddr(c.page), levels: levels}
			// The last pages but one of the address space: one mapped at the last level, one block above it.
			va := ^VirtAddr(0) &^ VirtAddr(c.page-1) &^ (1 << levels[c.levels-2].shift)
			block := va &^ (1<<levels[c.levels-2].shift - 1) &^ (1 << (levels[c.levels-2].shift + 1))
			put := func(level int, va VirtAddr, e uint64) {
				l := levels[level]
				m.put64((level+1)*int(c.page)+int(uint64(va)>>l.shift&(1<<l.bits-1))*8, e)
			}
			for i := range levels[:c.levels-1] {
				put(i, va, uint64(i+2)*c.page|3)
			}
			const attributes = 1<<54 | 0x70c // not executable for users, access flag, shareable where those bits are not the address's
			pa := hostmem.PhysAddr(0x8_0000_0000) | hostmem.PhysAddr(c.page)*5
			e := uint64(pa) | attributes | 3
			if wide := c.bits == 52; wide && c.page == 64<<10 {
				pa |= 5 << 48
				e |= 5 << 12
			} else if wide {
				pa |= 2 << 50
				e = e&^(3<<8) | 2<<8
			}
			put(c.levels-1, va, e)
			big := hostmem.PhysAddr(1<<levels[c.levels-2].shift) * 3
			put(c.levels-2, block, uint64(big)|attributes&^(3<<8)|1)
			src := direct{context.Background(), m}
			if got, n, err := s.walk(src, va+0x123); err != nil || got != pa+0x123 || n != c.page-0x123 {
				t.Errorf("walk(%v) = %v, %d, %v; want %v", va+0x123, got, n, err, pa+0x123)
			}
			if got, _, err := s.walk(src, block+0x12345&^7); err != nil || got != big+0x12345&^7 {
				t.Errorf("walk(%v) = %v, %v; want %v", block, got, err, big)
			}
			for _, none := range []VirtAddr{0, 0x1000, va - VirtAddr(c.page), va &^ (1 << 63)} {
				if got, _, err := s.walk(src, none); !errors.Is(err, ErrNotMapped) {
					t.Errorf("walk(%v) = %v, %v; want ErrNotMapped", none, got, err)
				}
			}
		})
	}
	for _, bad := range [][2]int64{{8 << 10, 16}, {4 << 10, 11}, {4 << 10, 40}} {
		if _, _, err := aarch64Levels(uint64(bad[0]), bad[1]); err == nil {
			t.Errorf("aarch64Levels(%d, %d) is believed", bad[0], bad[1])
		}
	}
}

// TestAArch64Located decodes real code: nmi_panic of Debian's 6.1.0-56-arm64, which forms the address of panic_cpu from an
// anchor of its section.
func TestAArch64Located(t *testing.T) {
	const code = `aa1e03e9 d503201f d503233f a9bf7bfd b000bb82 910003fd 91002042 aa0003e5 d538d080 aa0103e6 b8606842 d503201f
		b000e203 911ae063 91038060 12800001 2a0103e4 88e4fc02`
	m := make(flat, 4096)
	at := 0xcc4
	for _, word := range strings.Fields(code) {
		var op uint32
		fmt.Sscanf(word, "%x", &op)
		binary.LittleEndian.PutUint32(m[at:], op)
		at += 4
	}
	const base = VirtAddr(0xffffb81852293000)
	img := &Image{space: &addressSpace{kernel: 0xffff000000000000, linear: []linearRange{{base, base + 4096, 0}}}}
	got := aarch64Located(img, direct{context.Background(), m}, base+0xcc4, 18*4)
	want := []VirtAddr{0xffffb81853a04008, 0xffffb81853ed46b8, 0xffffb81853ed4798}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("located %v; want %v", got, want)
	}
}
