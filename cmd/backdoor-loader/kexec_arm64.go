package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/u-root/u-root/pkg/boot/kexec"
	"github.com/u-root/u-root/pkg/dt"
	"golang.org/x/sys/unix"
)

// load loads an Image by kexec_load(2): no Debian kernel for arm64 has kexec_file_load(2). u-root has code for it (pkg/boot/linux), which
// takes the seeds of random numbers out of the device tree and gives the next kernel none. Under UEFI the device tree has no memory nodes, and no
// place is found. The next kernel goes where the running one is, and that is best: an emulator is slow to store over what was once code, and
// over the running kernel it has to be done once only.
func load(kernel, initrd *os.File, commandLine string) error {
	fdt, err := dt.ReadFile("/sys/firmware/fdt")
	if err != nil {
		return fmt.Errorf("read the device tree: %w", err)
	}
	mm, err := kexec.MemoryMapFromFDT(fdt)
	if err != nil {
		return fmt.Errorf("find the memory: %w", err)
	}
	if len(mm.RAM()) == 0 {
		return errors.New("the device tree names no memory")
	}
	text, err := mapped(kernel)
	if err != nil {
		return fmt.Errorf("read the kernel: %w", err)
	}
	defer unix.Munmap(text)
	ramfs, err := mapped(initrd)
	if err != nil {
		return fmt.Errorf("read the initramfs: %w", err)
	}
	defer unix.Munmap(ramfs)
	entry, segments, err := place(mm, fdt, text, ramfs, commandLine)
	if err != nil {
		return err
	}
	return kexec.Load(entry, segments, 0)
}

// mapped maps a file for reading.
func mapped(f *os.File) ([]byte, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	return unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_PRIVATE)
}

func jump() error { return kexec.Reboot() }
