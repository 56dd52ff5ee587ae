package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/u-root/u-root/pkg/boot/kexec"
	"github.com/u-root/u-root/pkg/dt"
)

const (
	zImageMagic = 0x016f2818 // at byte 36 (Documentation/arm/booting.rst, arch/arm/boot/compressed/head.S, Linux 6.1)
	// above is where the kernel is put, from the start of RAM: it unpacks itself to the start of the same 128 MiB (AUTO_ZRELADDR), and what
	// it needs there must be free.
	above = 64 << 20
	// lowmem is how much of RAM is used, from its start: what every kernel maps (CONFIG_VMSPLIT_3G).
	lowmem = 512 << 20
)

// load loads a zImage by kexec_load(2), for which u-root has no code on 32-bit Arm. The kernel is entered at its first byte, and finds the
// device tree because the running kernel recognises the segment that begins like one (machine_kexec_prepare, arch/arm/kernel/
// machine_kexec.c, Linux 6.1). It refuses as long as other processors may run and cannot be switched off: the loader's kernel must have
// been started with nr_cpus=1.
func load(kernel, initrd *os.File, commandLine string) error {
	fdt, err := dt.ReadFile("/sys/firmware/fdt")
	if err != nil {
		return fmt.Errorf("read the device tree: %w", err)
	}
	mm, err := memoryMap(fdt)
	if err != nil {
		return fmt.Errorf("find the memory: %w", err)
	}
	ram := mm.RAM()
	if len(ram) == 0 {
		return errors.New("the device tree names no memory")
	}
	base := ram[0].Start
	room := kexec.Memory{Phys: mm}
	zImage, err := io.ReadAll(kernel)
	if err != nil {
		return err
	}
	if len(zImage) < 40 || binary.LittleEndian.Uint32(zImage[36:]) != zImageMagic {
		return errors.New("the kernel is no zImage")
	}
	ramfs, err := io.ReadAll(initrd)
	if err != nil {
		return err
	}
	at, err := room.AddPhysSegment(zImage, kexec.RangeFromInterval(base+above, base+2*above))
	if err != nil {
		return fmt.Errorf("place the kernel: %w", err)
	}
	upper := kexec.RangeFromInterval(base+2*above, base+lowmem)
	ramfsAt, err := room.AddPhysSegment(ramfs, upper)
	if err != nil {
		return fmt.Errorf("place the initramfs: %w", err)
	}
	tree, err := handOn(fdt, ramfsAt, len(ramfs), commandLine)
	if err != nil {
		return err
	}
	if _, err := room.AddPhysSegment(tree, upper); err != nil {
		return fmt.Errorf("place the device tree: %w", err)
	}
	const arm = 40 << 16 // KEXEC_ARCH_ARM
	return kexec.Load(at.Start, room.Segments, arm)
}

// memoryMap returns what the device tree says of memory (Devicetree Specification 0.4, sections 2.3.6, 3.4 and 3.5). u-root's own takes all
// addresses and sizes for 64 bits wide, whatever the tree says.
func memoryMap(fdt *dt.FDT) (kexec.MemoryMap, error) {
	var mm kexec.MemoryMap
	insert := func(parent, n *dt.Node, typ kexec.RangeType) error {
		reg, ok := n.LookProperty("reg")
		if !ok {
			return nil
		}
		address, size := cells(parent, "#address-cells", 2), cells(parent, "#size-cells", 1)
		for v := reg.Value; len(v) > 0; v = v[4*(address+size):] {
			if address < 1 || address > 2 || size < 1 || size > 2 || len(v) < 4*(address+size) {
				return fmt.Errorf("%s: reg of %d bytes does not fit %d and %d cells", n.Name, len(reg.Value), address, size)
			}
			start, length := number(v[:4*address]), number(v[4*address:4*(address+size)])
			if length == 0 || start > 1<<32 || length > 1<<32-start {
				continue // beyond what a kernel without LPAE reaches
			}
			mm.Insert(kexec.TypedRange{Range: kexec.Range{Start: uintptr(start), Size: uint(min(length, 1<<32-1-start))}, Type: typ})
		}
		return nil
	}
	for _, n := range fdt.RootNode.Children {
		if t, ok := n.LookProperty("device_type"); ok && string(bytes.TrimRight(t.Value, "\x00")) == "memory" {
			if err := insert(fdt.RootNode, n, kexec.RangeRAM); err != nil {
				return nil, err
			}
		}
	}
	if reserved, ok := fdt.NodeByName("reserved-memory"); ok {
		for _, n := range reserved.Children {
			if err := insert(reserved, n, kexec.RangeReserved); err != nil {
				return nil, err
			}
		}
	}
	for _, r := range fdt.ReserveEntries {
		mm.Insert(kexec.TypedRange{Range: kexec.Range{Start: uintptr(r.Address), Size: uint(r.Size)}, Type: kexec.RangeReserved})
	}
	return mm, nil
}

// cells returns how many 32-bit numbers an address or a size of a node's children has.
func cells(n *dt.Node, name string, otherwise int) int {
	if p, ok := n.LookProperty(name); ok {
		if v, err := p.AsU32(); err == nil {
			return int(v)
		}
	}
	return otherwise
}

// number returns a big-endian number of one or two cells.
func number(b []byte) (v uint64) {
	for _, c := range b {
		v = v<<8 | uint64(c)
	}
	return v
}

func jump() error { return kexec.Reboot() }
