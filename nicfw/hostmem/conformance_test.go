package hostmem_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
)

// ramFile returns a RAM file that holds the pattern.
func ramFile(t testing.TB, write bool) *hostmem.RAMFile {
	t.Helper()
	layout, size := hostmemtest.Layout(hostmemtest.Map())
	path := writeFile(t, filepath.Join(t.TempDir(), "ram"), hostmemtest.File(layout, size))
	mem, err := hostmem.OpenRAMFile(path, layout, write)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return mem
}

func writeFile(t testing.TB, path string, b []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// device is a PCI device in a folder that stands for sysfs.
type device struct {
	sysfs, dir string
	bar        string // its window
	layout     []hostmem.Extent
}

// newDevice returns an ivshmem device whose window holds the pattern.
func newDevice(t testing.TB, bar string) device {
	t.Helper()
	d := device{sysfs: t.TempDir()}
	d.dir = filepath.Join(d.sysfs, "bus/pci/devices/0000:00:04.0")
	layout, size := hostmemtest.Layout(hostmemtest.Map())
	d.layout = layout
	d.bar = writeFile(t, filepath.Join(d.dir, bar), hostmemtest.File(layout, size))
	writeFile(t, filepath.Join(d.dir, "vendor"), []byte("0x1af4\n"))
	writeFile(t, filepath.Join(d.dir, "device"), []byte("0x1110\n"))
	writeFile(t, filepath.Join(d.dir, "enable"), []byte("0\n"))
	d.setConfig(t, goodConfig())
	return d
}

// goodConfig is the configuration header of an enabled ivshmem device with its BAR 2 at 0x8000000000.
func goodConfig() []byte {
	b := make([]byte, 64)
	copy(b, []byte{0xf4, 0x1a, 0x10, 0x11, 0x02, 0x00})
	copy(b[0x18:], []byte{0x0c, 0, 0, 0, 0x80, 0, 0, 0})
	return b
}

func (d device) setConfig(t testing.TB, b []byte) { writeFile(t, filepath.Join(d.dir, "config"), b) }

func (d device) open(t testing.TB, write bool) *hostmem.Window {
	t.Helper()
	w, err := hostmem.OpenPCI(hostmem.PCIOptions{Sysfs: d.sysfs, Layout: d.layout, Write: write})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// limeFile returns a LiME dump of the ranges.
func limeFile(m []hostmem.Range) []byte {
	var b []byte
	for _, r := range m {
		b = binary.LittleEndian.AppendUint32(b, 0x4c694d45)
		b = binary.LittleEndian.AppendUint32(b, 1)
		b = binary.LittleEndian.AppendUint64(b, uint64(r.Start))
		b = binary.LittleEndian.AppendUint64(b, uint64(r.End())-1)
		b = append(b, make([]byte, 8)...)
		data := make([]byte, r.Size)
		hostmemtest.Fill(data, r.Start)
		b = append(b, data...)
	}
	return b
}

// segment is a program header of a core to make, and its bytes.
type segment struct {
	typ   uint32
	paddr uint64
	memsz uint64 // 0 means as many as there are bytes
	data  []byte
}

func loads(m []hostmem.Range) []segment {
	var s []segment
	for _, r := range m {
		data := make([]byte, r.Size)
		hostmemtest.Fill(data, r.Start)
		s = append(s, segment{typ: 1, paddr: uint64(r.Start), data: data})
	}
	return s
}

// elfCore returns an ELF64 core with these segments.
func elfCore(segs ...segment) []byte {
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(b[16:], 4)  // ET_CORE
	binary.LittleEndian.PutUint16(b[18:], 62) // EM_X86_64
	binary.LittleEndian.PutUint64(b[32:], 64) // e_phoff
	binary.LittleEndian.PutUint16(b[54:], 56) // e_phentsize
	binary.LittleEndian.PutUint16(b[56:], uint16(len(segs)))
	at := uint64(64 + 56*len(segs))
	for _, s := range segs {
		n := uint64(len(s.data))
		b = binary.LittleEndian.AppendUint32(b, s.typ)
		b = binary.LittleEndian.AppendUint32(b, 7)
		for _, v := range []uint64{at, 0xffff888000000000 + s.paddr, s.paddr, n, max(s.memsz, n), 0} {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
		at += n
	}
	for _, s := range segs {
		b = append(b, s.data...)
	}
	return b
}

// note returns the bytes of one ELF note.
func note(name string, desc string) []byte {
	var b []byte
	b = binary.LittleEndian.AppendUint32(b, uint32(len(name)+1))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(desc)))
	b = binary.LittleEndian.AppendUint32(b, 0)
	for _, s := range []string{name + "\x00", desc} {
		b = append(b, s...)
		b = append(b, make([]byte, -len(s)&3)...)
	}
	return b
}

func image(t testing.TB, b []byte) hostmem.Memory {
	t.Helper()
	mem, err := hostmem.NewImage(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return mem
}

// recording returns a recording of all of mem, written and read again.
func recording(t testing.TB, mem hostmem.Memory) *hostmem.Recording {
	t.Helper()
	r := hostmem.NewRecorder(mem)
	for _, e := range mem.Map() {
		if _, err := r.ReadAt(make([]byte, e.Size), int64(e.Start)); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if _, err := r.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	rec, err := hostmem.OpenRecording(&b)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

// fast is an engine whose latencies do not matter.
var fast = hostmem.EngineOptions{MinLatency: time.Nanosecond, MaxLatency: 2 * time.Microsecond, Seed: 1}

func allowAll(string, hostmem.Range) error { return nil }

func TestConformance(t *testing.T) {
	m := hostmemtest.Map()
	whole := []hostmem.Range{{Start: 0, Size: 32 * hostmem.PageSize}}
	inner := []hostmem.Range{{Start: 0x1008, Size: 5000}, {Start: 0x9000, Size: 0x2000}, {Start: 1 << 32, Size: 1 << 40}}
	innerMap := []hostmem.Range{{Start: 0x1008, Size: 5000}, {Start: 0x9000, Size: 0x2000}, m[2]}
	ro := hostmemtest.Truth{Map: m}
	wo := hostmemtest.Truth{Map: m, Writer: true}
	rw := hostmemtest.Truth{Map: m, Writer: true, Swapper: true}
	for _, c := range []struct {
		name  string
		open  func(t *testing.T) hostmem.Memory
		truth hostmemtest.Truth
	}{
		{"RAM file", func(t *testing.T) hostmem.Memory { return ramFile(t, true) }, rw},
		{"budget over RAM file", func(t *testing.T) hostmem.Memory { return hostmem.Budget(ramFile(t, true), 1<<40) }, rw},
		{"budget over RAM file read-only", func(t *testing.T) hostmem.Memory { return hostmem.Budget(ramFile(t, false), 1<<40) }, ro},
		{"RAM file read-only", func(t *testing.T) hostmem.Memory { return ramFile(t, false) }, ro},
		{"window", func(t *testing.T) hostmem.Memory { return newDevice(t, "resource2").open(t, true) },
			hostmemtest.Truth{Map: m, Writer: true, Swapper: hostmemtest.Atomic64}},
		{"window read-only", func(t *testing.T) hostmem.Memory { return newDevice(t, "resource2_wc").open(t, false) }, ro},
		{"ELF core", func(t *testing.T) hostmem.Memory { return image(t, elfCore(loads(m)...)) }, ro},
		{"LiME", func(t *testing.T) hostmem.Memory { return image(t, limeFile(m)) }, ro},
		{"LiME file", func(t *testing.T) hostmem.Memory {
			mem, err := hostmem.OpenImage(writeFile(t, filepath.Join(t.TempDir(), "dump.lime"), limeFile(m)))
			if err != nil {
				t.Fatal(err)
			}
			return mem
		}, ro},
		{"raw", func(t *testing.T) hostmem.Memory {
			return image(t, hostmemtest.File([]hostmem.Extent{{Range: whole[0]}}, int64(whole[0].Size)))
		}, hostmemtest.Truth{Map: whole}},
		{"recorder", func(t *testing.T) hostmem.Memory { return hostmem.NewRecorder(ramFile(t, true)) }, ro},
		{"recording", func(t *testing.T) hostmem.Memory { return recording(t, ramFile(t, false)) }, ro},
		{"recording file", func(t *testing.T) hostmem.Memory {
			r := hostmem.NewRecorder(hostmem.Narrow(ramFile(t, false), inner))
			for _, e := range innerMap {
				if _, err := r.ReadAt(make([]byte, e.Size), int64(e.Start)); err != nil {
					t.Fatal(err)
				}
			}
			var b bytes.Buffer
			if _, err := r.WriteTo(&b); err != nil {
				t.Fatal(err)
			}
			mem, err := hostmem.OpenImage(writeFile(t, filepath.Join(t.TempDir(), "x.hostmem"), b.Bytes()))
			if err != nil {
				t.Fatal(err)
			}
			return mem
		}, hostmemtest.Truth{Map: innerMap}},
		{"engine", func(t *testing.T) hostmem.Memory { return hostmem.NewEngine(ramFile(t, true), fast) }, wo},
		{"engine over an image", func(t *testing.T) hostmem.Memory { return hostmem.NewEngine(image(t, limeFile(m)), fast) }, ro},
		{"narrowed", func(t *testing.T) hostmem.Memory { return hostmem.Narrow(ramFile(t, true), inner) },
			hostmemtest.Truth{Map: innerMap, Writer: true, Swapper: true}},
		{"narrowed engine", func(t *testing.T) hostmem.Memory {
			return hostmem.Narrow(hostmem.NewEngine(ramFile(t, true), fast), inner)
		}, hostmemtest.Truth{Map: innerMap, Writer: true}},
		{"guard", func(t *testing.T) hostmem.Memory { return hostmem.NewGuard(ramFile(t, true), allowAll) }, rw},
		{"guard over an engine", func(t *testing.T) hostmem.Memory {
			return hostmem.NewGuard(hostmem.NewEngine(ramFile(t, true), fast), allowAll)
		}, wo},
		{"guard over a narrowed memory", func(t *testing.T) hostmem.Memory {
			return hostmem.NewGuard(hostmem.Narrow(ramFile(t, true), inner), allowAll)
		}, hostmemtest.Truth{Map: innerMap, Writer: true, Swapper: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			hostmemtest.Run(t, func(t *testing.T) (hostmem.Memory, hostmemtest.Truth) { return c.open(t), c.truth })
		})
	}
}

// A core may have its edges anywhere, and several segments for one address.
func TestConformanceOfAliasedCore(t *testing.T) {
	m := []hostmem.Range{{Start: 0x1003, Size: 0x6001}, {Start: 0x100001, Size: 0x2345}}
	pieces := []hostmem.Range{
		{Start: 0x3000, Size: 0x1000}, // the kernel's text …
		{Start: 0x1003, Size: 0x4ffd}, // … is also in the direct map
		{Start: 0x6000, Size: 0x1004}, // touches
		{Start: 0x5000, Size: 0x1800}, // overlaps on both sides
		{Start: 0x100001, Size: 0x2345},
		{Start: 0x100001, Size: 0x2345}, // twice
	}
	segs := append(loads(pieces), segment{typ: 1, paddr: 0x200000, memsz: 0x1000}) // left out of the dump
	for i, b := range [][]byte{elfCore(segs...), limeFile(pieces)} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			hostmemtest.Run(t, func(t *testing.T) (hostmem.Memory, hostmemtest.Truth) {
				return image(t, b), hostmemtest.Truth{Map: m}
			})
		})
	}
}

func TestNormalize(t *testing.T) {
	const top = ^hostmem.PhysAddr(0)
	for _, c := range []struct{ in, want []hostmem.Range }{
		{nil, nil},
		{[]hostmem.Range{{5, 0}}, nil},
		{[]hostmem.Range{{8, 2}, {0, 4}, {4, 4}}, []hostmem.Range{{0, 10}}},
		{[]hostmem.Range{{0, 10}, {2, 3}, {20, 1}}, []hostmem.Range{{0, 10}, {20, 1}}},
		{[]hostmem.Range{{top - 9, 100}, {0, 1}}, []hostmem.Range{{0, 1}, {top - 9, 9}}},
	} {
		if got := hostmem.Normalize(c.in); !slices.Equal(got, c.want) {
			t.Errorf("Normalize(%v) = %v; want %v", c.in, got, c.want)
		}
	}
}

func TestIntersect(t *testing.T) {
	a := []hostmem.Range{{0, 10}, {20, 10}, {40, 10}}
	for _, c := range []struct{ b, want []hostmem.Range }{
		{nil, nil},
		{[]hostmem.Range{{0, 100}}, a},
		{[]hostmem.Range{{5, 20}, {29, 1}, {30, 10}}, []hostmem.Range{{5, 5}, {20, 5}, {29, 1}}},
	} {
		if got := hostmem.Intersect(a, c.b); !slices.Equal(got, c.want) {
			t.Errorf("Intersect(%v, %v) = %v; want %v", a, c.b, got, c.want)
		}
	}
}

func TestQ35Layout(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		ram  uint64
		want []hostmem.Extent
	}{
		{1024 * mib, []hostmem.Extent{{hostmem.Range{0, 1024 * mib}, 0}}},
		{2815 * mib, []hostmem.Extent{{hostmem.Range{0, 2815 * mib}, 0}}},
		{2816 * mib, []hostmem.Extent{{hostmem.Range{0, 2048 * mib}, 0}, {hostmem.Range{4096 * mib, 768 * mib}, 2048 * mib}}},
		{4096 * mib, []hostmem.Extent{{hostmem.Range{0, 2048 * mib}, 0}, {hostmem.Range{4096 * mib, 2048 * mib}, 2048 * mib}}},
	} {
		if got := hostmem.Q35Layout(c.ram); !slices.Equal(got, c.want) {
			t.Errorf("Q35Layout(%d MiB) = %v; want %v", c.ram/mib, got, c.want)
		}
	}
}
