package main

import (
	"os"

	"github.com/u-root/u-root/pkg/boot/kexec"
	"github.com/u-root/u-root/pkg/boot/linux"
)

// load loads a kernel by kexec_load(2): no Debian kernel for arm64 has kexec_file_load(2). The device tree is the running kernel's.
// Under UEFI that has no memory nodes and u-root finds no place for the kernel.
func load(kernel, initrd *os.File, commandLine string) error {
	return linux.KexecLoad(kernel, initrd, commandLine, nil, nil)
}

func jump() error { return kexec.Reboot() }
