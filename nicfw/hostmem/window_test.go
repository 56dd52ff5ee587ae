package hostmem_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
)

func TestOpenPCIEnablesTheDevice(t *testing.T) {
	d := newDevice(t, "resource2")
	d.open(t, true)
	if b, err := os.ReadFile(filepath.Join(d.dir, "enable")); err != nil || b[0] != '1' {
		t.Errorf("enable holds %q, %v; want 1", b, err)
	}
	// The kernel counts: an enabled device is not enabled again.
	writeFile(t, filepath.Join(d.dir, "enable"), []byte("2\n"))
	d.open(t, true)
	if b, _ := os.ReadFile(filepath.Join(d.dir, "enable")); string(b) != "2\n" {
		t.Errorf("enable of an enabled device became %q", b)
	}
}

func TestOpenPCIPrefersWriteCombining(t *testing.T) {
	d := newDevice(t, "resource2_wc")
	writeFile(t, filepath.Join(d.dir, "resource2"), make([]byte, 1<<20))
	mem := d.open(t, true)
	if _, err := mem.WriteAt([]byte("abc"), 0x1000); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(d.dir, "resource2_wc")); err != nil || !bytes.Contains(b, []byte("abc")) {
		t.Errorf("resource2_wc does not hold what was written, %v", err)
	}
}

func TestOpenPCIErrors(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(d device, o *hostmem.PCIOptions)
		want   string
	}{
		{"no sysfs", func(d device, o *hostmem.PCIOptions) { o.Sysfs += "/none" }, "list PCI devices"},
		{"no such device", func(d device, o *hostmem.PCIOptions) { o.ID = "15b3:a2dc" }, "no such device among the 1"},
		{"no such address", func(d device, o *hostmem.PCIOptions) { o.Address = "0000:00:05.0" }, "no such device at 0000:00:05.0"},
		{"two devices", func(d device, o *hostmem.PCIOptions) {
			if err := os.Symlink(d.dir, d.dir+"x"); err != nil {
				t.Fatal(err)
			}
		}, "2 such devices, choose one by its address: 0000:00:04.0, 0000:00:04.0x"},
		{"no BAR", func(d device, o *hostmem.PCIOptions) { o.BAR = 3 }, "open BAR 3"},
		{"impossible BAR", func(d device, o *hostmem.PCIOptions) { o.BAR = 6 }, "BAR 6 does not exist"},
		{"window too small", func(d device, o *hostmem.PCIOptions) { o.Layout = hostmem.Q35Layout(1 << 30) },
			"BAR 2 has 221184 bytes and the host's memory needs 1073741824"},
		{"not decoding", func(d device, o *hostmem.PCIOptions) {
			b := goodConfig()
			b[4] = 0
			d.setConfig(t, b)
		}, "does not decode its memory"},
		{"not answering", func(d device, o *hostmem.PCIOptions) { d.setConfig(t, bytes.Repeat([]byte{0xff}, 64)) }, "does not answer"},
		{"short config", func(d device, o *hostmem.PCIOptions) { d.setConfig(t, goodConfig()[:16]) }, "read configuration space"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDevice(t, "resource2")
			o := hostmem.PCIOptions{Sysfs: d.sysfs, Layout: d.layout}
			c.change(d, &o)
			w, err := hostmem.OpenPCI(o)
			if err == nil {
				w.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("OpenPCI = %v; want %q", err, c.want)
			}
		})
	}
}

func TestWindowSwapsOnlySharedMemory(t *testing.T) {
	d := newDevice(t, "resource0")
	writeFile(t, filepath.Join(d.dir, "vendor"), []byte("0x15b3\n"))
	w, err := hostmem.OpenPCI(hostmem.PCIOptions{Sysfs: d.sysfs, ID: "15B3:1110", Layout: d.layout, Write: true})
	if err == nil {
		defer w.Close()
	}
	// The configuration header names another vendor than sysfs, which only a link check compares.
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := hostmem.AsSwapper(w); ok {
		t.Error("a window of a device that is no shared memory claims to swap atomically")
	}
	if _, err := w.CompareAndSwap(0x1000, 0, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("CompareAndSwap = %v; want %v", err, errors.ErrUnsupported)
	}
}

// All-ones are data while the device answers, and a lost link when it does not.
func TestWindowLinkLoss(t *testing.T) {
	d := newDevice(t, "resource2")
	w := d.open(t, true)
	ones := bytes.Repeat([]byte{0xff}, 2*page)
	const at = 0x8000
	if _, err := w.WriteAt(ones, at); err != nil {
		t.Fatalf("WriteAt(all-ones) on a good link = %v", err)
	}
	if _, err := w.ReadAt(make([]byte, 2*page), at); err != nil {
		t.Fatalf("ReadAt(all-ones) on a good link = %v", err)
	}

	moved, off := goodConfig(), goodConfig()
	moved[0x1c] = 0x81
	off[4] = 0
	for name, config := range map[string][]byte{
		"no answer":  bytes.Repeat([]byte{0xff}, 64),
		"gone":       nil,
		"BAR lost":   moved,
		"decode off": off,
	} {
		d.setConfig(t, config)
		checkLinkDown := func(op string, k int, err error) {
			t.Helper()
			if !errors.Is(err, hostmem.ErrLinkDown) || k != 0 {
				t.Errorf("%s: %s = %d, %v; want %v", name, op, k, err, hostmem.ErrLinkDown)
			}
		}
		for _, n := range []int{1, 8, 2 * page} {
			k, err := w.ReadAt(make([]byte, n), at)
			checkLinkDown("ReadAt", k, err)
		}
		segs := []hostmem.Segment{{Addr: at, Buf: make([]byte, 8)}, {Addr: at + page, Buf: make([]byte, 4)}}
		err := hostmem.ReadScatter(w, segs)
		checkLinkDown("ReadScatter", 0, err)
		for _, s := range segs {
			checkLinkDown("ReadScatter, a segment", 0, s.Err)
		}
		k, err := w.WriteAt(ones[:8], at)
		checkLinkDown("WriteAt", k, err)
		if hostmemtest.Atomic64 {
			_, err = w.CompareAndSwap(at, ^uint64(0), 1)
			checkLinkDown("CompareAndSwap", 0, err)
		}
		// The swap took place in the stand-in, which has no link to lose.
		d.setConfig(t, goodConfig())
		if _, err := w.WriteAt(ones[:8], at); err != nil {
			t.Fatal(err)
		}
	}
}

// The part of a read that came before the link was lost is good; the fault says where it ends.
func TestWindowLinkLossMidway(t *testing.T) {
	d := newDevice(t, "resource2")
	w := d.open(t, true)
	if _, err := w.WriteAt(bytes.Repeat([]byte{0xff}, page), 0x9000); err != nil {
		t.Fatal(err)
	}
	d.setConfig(t, bytes.Repeat([]byte{0xff}, 64))
	k, err := w.ReadAt(make([]byte, 3*page), 0x8000)
	fault, ok := errors.AsType[*hostmem.FaultError](err)
	if !ok || k != page || fault.Addr != 0x9000 || fault.Len != 2*page || !errors.Is(err, hostmem.ErrLinkDown) {
		t.Errorf("ReadAt = %d, %v; want one page and %v at 0x9000", k, err, hostmem.ErrLinkDown)
	}
}

// While another word shows that the window answers, all-ones are data, and the device is not asked; when all is ones, it is.
func TestWindowOnes(t *testing.T) {
	d := newDevice(t, "resource2")
	w := d.open(t, true)
	ones := bytes.Repeat([]byte{0xff}, 8)
	if _, err := w.WriteAt(ones, 0x9000); err != nil {
		t.Fatal(err)
	}
	if _, err := w.ReadAt(make([]byte, 8), 0x8000); err != nil {
		t.Fatal(err)
	}
	d.setConfig(t, nil)
	if _, err := w.ReadAt(make([]byte, 8), 0x9000); err != nil {
		t.Errorf("ReadAt(all-ones) beside a word that is not = %v", err)
	}
	d.setConfig(t, goodConfig())
	if _, err := w.WriteAt(ones, 0x8000); err != nil {
		t.Fatal(err)
	}
	d.setConfig(t, nil)
	if _, err := w.ReadAt(make([]byte, 8), 0x9000); !errors.Is(err, hostmem.ErrLinkDown) {
		t.Errorf("ReadAt of a window of ones = %v; want %v", err, hostmem.ErrLinkDown)
	}
}

// Of segments that are read together, one that is not all ones vouches for those before it; else the window is asked, as by a single read.
func TestWindowOnesTogether(t *testing.T) {
	d := newDevice(t, "resource2")
	w := d.open(t, true)
	ones := bytes.Repeat([]byte{0xff}, 8)
	if _, err := w.WriteAt(ones, 0x9000); err != nil {
		t.Fatal(err)
	}
	d.setConfig(t, nil)
	at := func(pa hostmem.PhysAddr) hostmem.Segment { return hostmem.Segment{Addr: pa, Buf: make([]byte, 4)} }
	if err := hostmem.ReadScatter(w, []hostmem.Segment{at(0x9000), at(0x9004)}); !errors.Is(err, hostmem.ErrLinkDown) {
		t.Errorf("ReadScatter(all-ones) before anything else was seen = %v; want %v", err, hostmem.ErrLinkDown)
	}
	if err := hostmem.ReadScatter(w, []hostmem.Segment{at(0x8000), at(0x9000), at(0x8008)}); err != nil {
		t.Errorf("ReadScatter(all-ones before what is not) = %v", err)
	}
	if err := hostmem.ReadScatter(w, []hostmem.Segment{at(0x9000), at(0x9004)}); err != nil {
		t.Errorf("ReadScatter(all-ones) while another word is not = %v", err)
	}
}

func TestWindowThatVanishes(t *testing.T) {
	d := newDevice(t, "resource2")
	w := d.open(t, true)
	if err := os.Truncate(d.bar, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.ReadAt(make([]byte, 8), 0x1000); !errors.Is(err, hostmem.ErrLinkDown) {
		t.Errorf("ReadAt = %v; want %v", err, hostmem.ErrLinkDown)
	}
}
