package early

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An esb is the watchdog of Intel's 6300ESB I/O controller (datasheet 300641, chapter 16; drivers/watchdog/i6300esb.c, Linux 6.1),
// which QEMU has as a PCI device for every machine with a PCI bus. Kernels without its driver (Debian's cloud flavours) leave it
// to us. That has one thing for it: nobody stops it at a kexec, so it watches over the next kernel's start, too.
type esb struct {
	config *os.File // PCI configuration space
	page   []byte   // of the registers
	reload *uint16
}

const (
	esbVendor, esbDevice = "0x8086", "0x25ab"

	esbConfig = 0x60 // word in configuration space
	esbLock   = 0x68 // byte in configuration space
	esbTimer1 = 0x00 // registers
	esbTimer2 = 0x04
	esbReload = 0x0c

	esbEnable  = 1 << 1 // in esbLock
	esbNoIRQ   = 0x0003 // in esbConfig: no interrupt after the first stage, reset after the second, 1 kHz
	esbRestart = 1 << 8 // in esbReload
	esbTimeOut = 1 << 9 // in esbReload: the last reset was the watchdog's
)

// armESB finds the device under sys and arms it. The time runs in two stages of half its length each.
func armESB(sys string, timeout time.Duration) (*Watchdog, error) {
	all, err := filepath.Glob(filepath.Join(sys, "bus/pci/devices/*"))
	if err != nil {
		return nil, err
	}
	is := func(dir, file, want string) bool {
		b, err := os.ReadFile(filepath.Join(dir, file))
		return err == nil && strings.TrimSpace(string(b)) == want
	}
	for _, dir := range all {
		if !is(dir, "vendor", esbVendor) || !is(dir, "device", esbDevice) {
			continue
		}
		if _, err := os.Lstat(filepath.Join(dir, "driver")); err == nil {
			continue // the kernel drives it, or is about to
		}
		w, err := openESB(dir, timeout)
		if err != nil {
			return nil, fmt.Errorf("arm watchdog %s: %w", filepath.Base(dir), err)
		}
		return w, nil
	}
	return nil, ErrNoWatchdog
}

func openESB(dir string, timeout time.Duration) (*Watchdog, error) {
	start, err := barStart(filepath.Join(dir, "resource"))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "enable"), []byte("1"), 0); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "resource0"), os.O_RDWR|unix.O_SYNC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size := os.Getpagesize()
	page, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map its registers: %w", err)
	}
	at := int(start % uint64(size)) // 16 bytes need not begin a page
	e := &esb{page: page, reload: (*uint16)(unsafe.Pointer(&page[at+esbReload]))}
	if e.config, err = os.OpenFile(filepath.Join(dir, "config"), os.O_RDWR, 0); err != nil {
		unix.Munmap(page)
		return nil, err
	}
	w := &Watchdog{Name: "i6300esb " + filepath.Base(dir), dev: e}
	w.Bit = load16(e.reload)&esbTimeOut != 0
	if err := e.configure(esbConfig, esbNoIRQ&0xff, esbNoIRQ>>8); err != nil {
		e.close()
		return nil, err
	}
	seconds := min(max(int(timeout/time.Second), 2), 2046)
	w.Timeout = time.Duration(seconds) * time.Second
	// The timers count milliseconds and take the upper 20 bits of 2^-9 s … as the kernel's driver has it: seconds << 9 in each of two.
	for _, reg := range []int{esbTimer1, esbTimer2} {
		e.unlock()
		store32((*uint32)(unsafe.Pointer(&page[at+reg])), uint32(seconds)<<9)
	}
	e.feed()
	if w.Bit { // so that the next start does not take it for news
		e.unlock()
		store16(e.reload, esbTimeOut)
	}
	if err := e.configure(esbLock, esbEnable); err != nil {
		e.close()
		return nil, err
	}
	return w, nil
}

func (e *esb) configure(off int64, b ...byte) error {
	if _, err := e.config.WriteAt(b, off); err != nil {
		return fmt.Errorf("write its configuration: %w", err)
	}
	return nil
}

// unlock lets the next write to a register through.
func (e *esb) unlock() {
	store16(e.reload, 0x80)
	store16(e.reload, 0x86)
}

func (e *esb) feed() error {
	e.unlock()
	store16(e.reload, esbRestart)
	return nil
}

func (e *esb) disarm() error {
	e.feed()
	err := e.configure(esbLock, 0)
	e.close()
	return err
}

func (e *esb) close() {
	e.config.Close()
	unix.Munmap(e.page)
}

// barStart is the bus address of a device's first region, by sysfs's table of regions.
func barStart(file string) (uint64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(b), " ")
	v, err := strconv.ParseUint(strings.TrimPrefix(first, "0x"), 16, 64)
	if err != nil || v == 0 {
		return 0, fmt.Errorf("it has no registers: %q", first)
	}
	return v, nil
}

// The stores are functions of their own so that the compiler leaves out none of two to the same register.

//go:noinline
func store16(p *uint16, v uint16) { *p = v }

//go:noinline
func store32(p *uint32, v uint32) { *p = v }

//go:noinline
func load16(p *uint16) uint16 { return *p }
