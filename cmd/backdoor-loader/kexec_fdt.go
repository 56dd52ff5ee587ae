package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/u-root/u-root/pkg/boot/image"
	"github.com/u-root/u-root/pkg/boot/kexec"
	"github.com/u-root/u-root/pkg/dt"
	"golang.org/x/sys/unix"
)

// imageAlign is what the beginning of a kernel's memory is a multiple of (Documentation/arm64/booting.rst, Linux 6.1).
const imageAlign = 2 << 20

// handOn makes the running kernel's device tree that of the kernel which is started next: with its command line, its initramfs at that
// place, and random numbers for its own generator and for where it puts itself (Documentation/devicetree/bindings/chosen.txt in the
// devicetree specification's schema; Documentation/arm64/booting.rst, Linux 6.1). Without these it would gather its own, which takes a
// machine without a source of them a second of its processor, and have no KASLR.
func handOn(fdt *dt.FDT, initrd kexec.Range, size int, commandLine string) ([]byte, error) {
	chosen, ok := fdt.NodeByName("chosen")
	if !ok {
		return nil, errors.New("the device tree has no /chosen")
	}
	for _, p := range []string{"linux,elfcorehdr", "linux,usable-memory-range", "kaslr-seed", "rng-seed", "linux,initrd-start", "linux,initrd-end"} {
		chosen.RemoveProperty(p)
	}
	chosen.UpdateProperty("bootargs", append([]byte(commandLine), 0))
	chosen.UpdateProperty("linux,initrd-start", binary.BigEndian.AppendUint64(nil, uint64(initrd.Start)))
	chosen.UpdateProperty("linux,initrd-end", binary.BigEndian.AppendUint64(nil, uint64(initrd.Start)+uint64(size)))
	var seed [8 + 64]byte
	if n, err := unix.Getrandom(seed[:], unix.GRND_NONBLOCK); err == nil && n == len(seed) { // none that are not good
		chosen.UpdateProperty("kaslr-seed", seed[:8])
		chosen.UpdateProperty("rng-seed", seed[8:])
	}
	var tree bytes.Buffer
	if _, err := fdt.Write(&tree); err != nil {
		return nil, fmt.Errorf("write the device tree: %w", err)
	}
	return tree.Bytes(), nil
}

// place finds memory for an arm64 Image and what it is handed, and returns where it is entered.
func place(mm kexec.MemoryMap, fdt *dt.FDT, kernel, ramfs []byte, commandLine string) (entry uintptr, segments kexec.Segments, err error) {
	room := kexec.Memory{Phys: append(kexec.MemoryMap(nil), mm...)}
	img, err := image.ParseFromBytes(kernel)
	if err != nil {
		return 0, nil, fmt.Errorf("the kernel is no Image: %w", err)
	}
	h := img.Header
	const most = 1 << 30 // of what an image asks for
	if h.ImageSize > most || h.TextOffset > most {
		return 0, nil, fmt.Errorf("the kernel asks for %d bytes at an offset of %d", h.ImageSize, h.TextOffset)
	}
	at, err := room.AddKexecSegmentExplicit(kernel, max(uint(h.ImageSize), uint(len(kernel))), uint(h.TextOffset), imageAlign)
	if err != nil {
		return 0, nil, fmt.Errorf("place the kernel: %w", err)
	}
	ramfsAt, err := room.AddKexecSegment(ramfs)
	if err != nil {
		return 0, nil, fmt.Errorf("place the initramfs: %w", err)
	}
	tree, err := handOn(fdt, ramfsAt, len(ramfs), commandLine)
	if err != nil {
		return 0, nil, err
	}
	treeAt, err := room.AddKexecSegment(tree)
	if err != nil {
		return 0, nil, fmt.Errorf("place the device tree: %w", err)
	}
	enter, err := room.AddKexecSegment(trampoline(uint64(at.Start), uint64(treeAt.Start)))
	if err != nil {
		return 0, nil, fmt.Errorf("place the entry: %w", err)
	}
	return enter.Start, room.Segments, nil
}

// trampoline is the code that enters a kernel with its device tree in x0 and zeros in x1 to x3, as Documentation/arm64/booting.rst asks for:
// kexec_load(2) itself gives a kernel no registers. The instructions are those of the Arm Architecture Reference Manual, DDI 0487.
func trampoline(kernel, tree uint64) []byte {
	var b []byte
	for _, instruction := range []uint32{
		0x580000c4, // ldr x4, .+24: the kernel
		0x580000e0, // ldr x0, .+28: the device tree
		0xaa1f03e1, // mov x1, xzr
		0xaa1f03e2, // mov x2, xzr
		0xaa1f03e3, // mov x3, xzr
		0xd61f0080, // br x4
	} {
		b = binary.LittleEndian.AppendUint32(b, instruction)
	}
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(b, kernel), tree)
}
