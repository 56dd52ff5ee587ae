package hostmem

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// sharedMemory are the PCI devices that show host memory as plain shared memory, with the BAR that does. On these a
// processor's own compare-and-swap is atomic against the host. Behind any other device a locked instruction becomes a
// separate read and write on the link, so there is none.
var sharedMemory = []struct {
	id  string
	bar int
}{
	{"1af4:1110", 2}, // ivshmem: QEMU docs/specs/ivshmem-spec.txt; BAR 0 holds its registers
}

// PCIOptions name a PCI device whose BAR is a window onto host memory. The zero value is the one ivshmem device, read-only.
type PCIOptions struct {
	// Sysfs is where sysfs is mounted; empty means /sys.
	Sysfs string
	// ID is the device's vendor:device in hexadecimal; empty means ivshmem, 1af4:1110.
	ID string
	// Address chooses among several devices with this ID, as in "0000:00:04.0".
	Address string
	// BAR is the number of the window's BAR. 0 for a device known to have its window elsewhere means that one.
	BAR int
	// Layout says where the host's RAM is in the window; nil means all of it, from address 0 on.
	Layout []Extent
	// Write asks for the ability to store.
	Write bool
	// Logger gets what was found; nil means nowhere.
	Logger *slog.Logger
}

// Window is host memory behind a PCI BAR, mapped through sysfs.
//
// All accesses are single aligned loads and stores (see words). A write ends when the device has it: the last word is read
// back, which pushes posted writes ahead of it (PCI Express Base Specification 2.4.1, transaction ordering).
// It is a Writer if it was opened to write, and a Swapper if its BAR is shared memory besides; ask with AsWriter and
// AsSwapper.
type Window struct {
	layout layout
	write  bool
	swaps  bool
	m      *mapping
	dev    pciDevice
	close  func() error
	other  atomic.Int64 // where in the mapping a word ends that a read has seen, and that was not all ones; 0 if there is none
}

// OpenPCI finds the device, enables it and maps its window.
func OpenPCI(o PCIOptions) (*Window, error) {
	o.Sysfs = cmp.Or(o.Sysfs, "/sys")
	o.ID = strings.ToLower(cmp.Or(o.ID, sharedMemory[0].id))
	w, err := openPCI(o)
	if err != nil {
		return nil, fmt.Errorf("open PCI window %s: %w", o.ID, err)
	}
	if o.Logger != nil {
		o.Logger.Info("mapped the window onto host memory", "device", w.dev.dir, "bytes", len(w.m.data), "write", w.write, "swap", w.swaps)
	}
	return w, nil
}

func openPCI(o PCIOptions) (*Window, error) {
	dir, err := findPCI(o)
	if err != nil {
		return nil, err
	}
	shared := false
	for _, d := range sharedMemory {
		if d.id == o.ID {
			o.BAR = cmp.Or(o.BAR, d.bar)
			shared = o.BAR == d.bar
		}
	}
	if o.BAR < 0 || o.BAR > 5 {
		return nil, fmt.Errorf("BAR %d does not exist: a device has 0 to 5", o.BAR)
	}
	if err := enablePCI(dir); err != nil {
		return nil, err
	}
	f, err := openResource(dir, o.BAR, o.Write)
	if err != nil {
		return nil, err
	}
	defer f.Close() // the mapping stays
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	size := uint64(fi.Size())
	if o.Layout == nil {
		o.Layout = []Extent{{Range{0, size}, 0}}
	}
	l, err := newLayout(o.Layout)
	if err != nil {
		return nil, err
	}
	if err := l.checkAligned(); err != nil {
		return nil, err
	}
	if l.size() > size {
		return nil, fmt.Errorf("window is too small: BAR %d has %d bytes and the host's memory needs %d", o.BAR, size, l.size())
	}
	m, err := newMapping(f, l.size(), o.Write, fmt.Errorf("the device's memory faults: %w", ErrLinkDown))
	if err != nil {
		return nil, err
	}
	dev, err := openConfig(dir)
	if err != nil {
		m.close()
		return nil, err
	}
	return &Window{
		layout: l, write: o.Write, swaps: o.Write && shared && strconv.IntSize == 64, m: m, dev: dev,
		close: sync.OnceValue(func() error { return errors.Join(m.close(), dev.config.Close()) }),
	}, nil
}

// findPCI returns the sysfs folder of the one device that o names.
func findPCI(o PCIOptions) (string, error) {
	root := filepath.Join(o.Sysfs, "bus/pci/devices")
	entries, err := os.ReadDir(root)
	if err != nil {
		return "", fmt.Errorf("list PCI devices: %w", err)
	}
	var found []string
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		vendor, err1 := readHex(filepath.Join(dir, "vendor"))
		device, err2 := readHex(filepath.Join(dir, "device"))
		if err1 != nil || err2 != nil || fmt.Sprintf("%04x:%04x", vendor, device) != o.ID {
			continue // also a device that is just leaving
		}
		if o.Address == "" || o.Address == e.Name() {
			found = append(found, e.Name())
		}
	}
	switch {
	case len(found) == 1:
		return filepath.Join(root, found[0]), nil
	case len(found) == 0 && o.Address != "":
		return "", fmt.Errorf("no such device at %s among the %d in %s", o.Address, len(entries), root)
	case len(found) == 0:
		return "", fmt.Errorf("no such device among the %d in %s", len(entries), root)
	}
	slices.Sort(found)
	return "", fmt.Errorf("%d such devices, choose one by its address: %s", len(found), strings.Join(found, ", "))
}

func readHex(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 0, 16)
}

// enablePCI has the kernel turn on the device's memory decoding, which is off as long as it has no driver. The kernel counts
// the enablings, so an enabled device is left alone.
func enablePCI(dir string) error {
	path := filepath.Join(dir, "enable")
	if b, err := os.ReadFile(path); err == nil && len(b) > 0 && !bytes.HasPrefix(b, []byte("0")) {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("enable the device: %w", err)
	}
	_, err = f.WriteString("1")
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("enable the device: %w", err)
	}
	return nil
}

// openResource opens the write-combining file of the BAR, which exists if the BAR is prefetchable, else the plain one.
func openResource(dir string, bar int, write bool) (*os.File, error) {
	mode := os.O_RDONLY
	if write {
		mode = os.O_RDWR
	}
	path := filepath.Join(dir, "resource"+strconv.Itoa(bar))
	f, err := os.OpenFile(path+"_wc", mode|os.O_SYNC, 0)
	if errors.Is(err, os.ErrNotExist) {
		f, err = os.OpenFile(path, mode|os.O_SYNC, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("open BAR %d: %w", bar, err)
	}
	return f, nil
}

// pciDevice is a device's configuration header: registers that the link must be up to read.
type pciDevice struct {
	dir    string
	config *os.File
	at     [pciHeader]byte // as it was when the window was mapped
}

// Offsets in the type 0 configuration header: PCI Express Base Specification 7.5.1.
const (
	pciHeader  = 64
	pciCommand = 0x04 // bit 1: memory space enable
	pciBARs    = 0x10 // to 0x27: six base addresses
)

func openConfig(dir string) (pciDevice, error) {
	f, err := os.Open(filepath.Join(dir, "config"))
	if err != nil {
		return pciDevice{}, fmt.Errorf("open configuration space: %w", err)
	}
	d := pciDevice{dir: dir, config: f}
	if _, err = io.ReadFull(io.NewSectionReader(f, 0, pciHeader), d.at[:]); err == nil {
		err = d.check()
	}
	if err == nil && d.at[pciCommand]&2 == 0 {
		err = errors.New("the device does not decode its memory although it was enabled")
	}
	if err != nil {
		f.Close()
		return pciDevice{}, fmt.Errorf("read configuration space: %w", err)
	}
	return d, nil
}

// check tells whether the window is still what was mapped: a device that is gone reads all-ones, one that was reset has
// forgotten its base address or does not decode it.
func (d *pciDevice) check() error {
	var now [pciHeader]byte
	if _, err := io.ReadFull(io.NewSectionReader(d.config, 0, pciHeader), now[:]); err != nil {
		if errors.Is(err, os.ErrClosed) {
			return err
		}
		return fmt.Errorf("the device is gone (%v): %w", err, ErrLinkDown)
	}
	switch {
	case now[0] == 0xff && now[1] == 0xff:
		return fmt.Errorf("the device does not answer (vendor reads 0xffff): %w", ErrLinkDown)
	case !bytes.Equal(now[:4], d.at[:4]):
		return fmt.Errorf("another device took its place: %w", ErrLinkDown)
	case now[pciCommand]&2 != d.at[pciCommand]&2 || !bytes.Equal(now[pciBARs:pciBARs+24], d.at[pciBARs:pciBARs+24]):
		return fmt.Errorf("the device was reset: %w", ErrLinkDown)
	}
	return nil
}

// Map implements Memory.
func (w *Window) Map() []Range { return w.layout.ram }

// ReadAt implements Memory. A page that ends in all-ones may be memory that does, or a link that went down: then it is asked whether the
// window still answers, before the bytes count.
func (w *Window) ReadAt(p []byte, off int64) (int, error) {
	return w.layout.each(opRead, off, len(p), func(lo, hi int, at int64) (int, error) {
		var other int64 // behind a word that is not all ones
		for lo0 := lo; ; {
			next := min(hi, lo+PageSize)
			n, err := w.m.load(p[lo:next], at+int64(lo-lo0))
			if err == nil {
				if !allOnes(p[max(lo, next-8):next]) {
					other = at + int64(next-lo0)
				} else if err = w.answers(); err != nil {
					n = 0
				}
			}
			if lo += n; err != nil || lo == hi {
				if err == nil && other != 0 {
					w.other.Store(other)
				}
				return lo - lo0, err
			}
		}
	})
}

// readTogether implements batcher: many small reads pay once for what guards each.
func (w *Window) readTogether(segs []Segment) bool {
	for i := range segs {
		if _, ok := w.layout.whole(segs[i].Addr, len(segs[i].Buf)); !ok || len(segs[i].Buf) > PageSize {
			return false
		}
	}
	_, err := w.m.do(func(m words) {
		for i := range segs {
			at, _ := w.layout.whole(segs[i].Addr, len(segs[i].Buf))
			m.load(segs[i].Buf, int(at))
		}
	})
	if err != nil {
		return false
	}
	// As in ReadAt: whatever is not all ones was read while the window answered, and so was what was read before it.
	asked := false
	for i := len(segs) - 1; i >= 0; i-- {
		s := &segs[i]
		s.Err = nil
		switch {
		case len(s.Buf) == 0 || asked:
		case !allOnes(s.Buf[max(0, len(s.Buf)-8):]):
			at, _ := w.layout.whole(s.Addr, len(s.Buf))
			w.other.Store(at + int64(len(s.Buf)))
			asked = true
		case w.answers() != nil:
			return false
		default:
			asked = true
		}
	}
	return true
}

// answers tells whether the window still shows memory. If a word that an earlier read has seen is not all ones now either, it does; else
// the device's own registers decide, which cost a call of the kernel.
func (w *Window) answers() error {
	if end := w.other.Load(); end != 0 {
		var word [8]byte
		if _, err := w.m.load(word[:], (end-1)&^7); err == nil && !allOnes(word[:]) {
			return nil
		}
	}
	return w.dev.check()
}

// WriteAt implements Writer. A write that does not lie wholly in RAM stores nothing.
func (w *Window) WriteAt(p []byte, off int64) (int, error) {
	if err := storable(w.layout.ram, w.write, off, len(p)); err != nil {
		return 0, err
	}
	return w.layout.each(opWrite, off, len(p), func(lo, hi int, at int64) (int, error) {
		if n, err := w.m.store(p[lo:hi], at); err != nil {
			return n, err
		}
		fence()
		var last [1]byte
		if _, err := w.m.load(last[:], at+int64(hi-lo)-1); err != nil {
			return 0, err
		}
		if last[0] == 0xff {
			if err := w.dev.check(); err != nil {
				return 0, err // posted into nowhere
			}
		}
		return hi - lo, nil
	})
}

// CompareAndSwap implements Swapper.
func (w *Window) CompareAndSwap(pa PhysAddr, old, new uint64) (uint64, error) {
	if w.write && !w.swaps {
		return 0, &FaultError{Op: opSwap, Addr: pa, Len: 8, Err: errNoSwap}
	}
	prev, err := swapMapped(w.layout, w.m, w.write, pa, old, new)
	if err == nil && prev == ^uint64(0) {
		if err := w.dev.check(); err != nil {
			return 0, &FaultError{Op: opSwap, Addr: pa, Len: 8, Err: err}
		}
	}
	return prev, err
}

// SleepIf implements Sleeper.
func (w *Window) SleepIf(pa PhysAddr, v uint32, d time.Duration) (bool, error) {
	return sleepMapped(w.layout, w.m, pa, v, d)
}

// errNoSwap is a compare-and-swap that would not be one.
var errNoSwap = fmt.Errorf("compare-and-swap over this path is not atomic: %w", errors.ErrUnsupported)

// Writer returns the window if it was opened to write.
func (w *Window) Writer() (Writer, bool) { return w, w.write }

// Swapper returns the window if it was opened to write and its BAR is shared memory.
func (w *Window) Swapper() (Swapper, bool) { return w, w.swaps }

// Close implements Memory.
func (w *Window) Close() error { return w.close() }

// allOnes reports whether b is not empty and has no zero bit.
func allOnes(b []byte) bool {
	for _, v := range b {
		if v != 0xff {
			return false
		}
	}
	return len(b) > 0
}
