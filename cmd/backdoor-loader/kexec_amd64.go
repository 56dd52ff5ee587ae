package main

import (
	"os"

	"github.com/u-root/u-root/pkg/boot/kexec"
)

// load loads a kernel by kexec_file_load(2), which unpacks it in the kernel.
func load(kernel, initrd *os.File, commandLine string) error {
	return kexec.FileLoad(kernel, initrd, commandLine)
}

func jump() error { return kexec.Reboot() }
