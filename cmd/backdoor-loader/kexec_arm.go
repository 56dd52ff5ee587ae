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
	mm, err := kexec.MemoryMapFromFDT(fdt)
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
	chosen, ok := fdt.NodeByName("chosen")
	if !ok {
		return errors.New("the device tree has no /chosen")
	}
	for _, p := range []string{"linux,elfcorehdr", "linux,usable-memory-range", "kaslr-seed", "rng-seed", "linux,initrd-start", "linux,initrd-end"} {
		chosen.RemoveProperty(p)
	}
	put := func(name string, v uintptr) {
		chosen.UpdateProperty(name, binary.BigEndian.AppendUint32(nil, uint32(v)))
	}
	put("linux,initrd-start", ramfsAt.Start)
	put("linux,initrd-end", ramfsAt.Start+uintptr(len(ramfs)))
	chosen.UpdateProperty("bootargs", append([]byte(commandLine), 0))
	var tree bytes.Buffer
	if _, err := fdt.Write(&tree); err != nil {
		return fmt.Errorf("write the device tree: %w", err)
	}
	if _, err := room.AddPhysSegment(tree.Bytes(), upper); err != nil {
		return fmt.Errorf("place the device tree: %w", err)
	}
	const arm = 40 << 16 // KEXEC_ARCH_ARM
	return kexec.Load(at.Start, room.Segments, arm)
}

func jump() error { return kexec.Reboot() }
