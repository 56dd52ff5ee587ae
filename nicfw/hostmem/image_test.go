package hostmem_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
)

const info = "OSRELEASE=6.1.0-56-amd64\nPAGESIZE=4096\n"

func TestVMCOREINFO(t *testing.T) {
	notes := slices.Concat(note("CORE", "registers"), note("VMCOREINFO", info+"\x00\x00"), note("QEMU", "state"))
	core := elfCore(append(loads(hostmemtest.Map()), segment{typ: 4, data: notes})...)
	mem := image(t, core)
	for _, m := range []hostmem.Memory{
		mem,
		hostmem.Narrow(mem, mem.Map()),
		hostmem.NewGuard(mem, nil),
		hostmem.NewEngine(mem, fast),
	} {
		if got := hostmem.VMCOREINFO(m); string(got) != info {
			t.Errorf("VMCOREINFO(%T) = %q; want %q", m, got, info)
		}
	}
	for name, m := range map[string]hostmem.Memory{
		"core without notes":     image(t, elfCore(loads(hostmemtest.Map())...)),
		"core with damaged note": image(t, elfCore(append(loads(hostmemtest.Map()), segment{typ: 4, data: notes[:60]})...)),
		"LiME":                   image(t, limeFile(hostmemtest.Map())),
		"recorder":               hostmem.NewRecorder(mem),
	} {
		if got := hostmem.VMCOREINFO(m); got != nil {
			t.Errorf("VMCOREINFO(%s) = %q; want none", name, got)
		}
	}
}

// put returns b with v at off.
func put[T uint16 | uint32 | uint64](b []byte, off int, v T) []byte {
	b = bytes.Clone(b)
	if _, err := binary.Encode(b[off:], binary.LittleEndian, v); err != nil {
		panic(err)
	}
	return b
}

// manyHeaders returns a core that counts its program headers in section header 0, as one with 65535 of them or more does.
func manyHeaders(core []byte, n uint32) []byte {
	b := put(put(core, 56, uint16(0xffff)), 40, uint64(len(core)))
	sh := make([]byte, 64)
	binary.LittleEndian.PutUint32(sh[44:], n)
	return append(b, sh...)
}

func TestManyProgramHeaders(t *testing.T) {
	m := hostmemtest.Map()
	hostmemtest.Run(t, func(t *testing.T) (hostmem.Memory, hostmemtest.Truth) {
		return image(t, manyHeaders(elfCore(loads(m)...), uint32(len(m)))), hostmemtest.Truth{Map: m}
	})
}

func TestBadImages(t *testing.T) {
	m := hostmemtest.Map()
	core, lime := elfCore(loads(m)...), limeFile(m)
	random := make([]byte, 10_000)
	for i := range random {
		random[i] = byte(rand.IntN(256)) | 1 // never a magic
	}
	const ph = 64 // the first program header
	for _, c := range []struct {
		name string
		b    []byte
		want string
	}{
		{"empty", nil, "raw image: at offset 0x0: the file is empty"},
		{"one byte", []byte{1}, "truncated, or not a memory image"},
		{"random", random, "neither an ELF core nor LiME"},
		{"gzip", append([]byte("\x1f\x8b"), random...), "gzip image: at offset 0x0: this format is not read here; decompress it first"},
		{"kdump", append([]byte("KDUMP   "), random...), "makedumpfile -E"},

		{"ELF header cut", core[:40], "the ELF header is cut after 40 of 64 bytes"},
		{"ELF headers cut", core[:100], "3 program headers do not fit into the file's 100 bytes"},
		{"ELF segment cut", core[:len(core)-1], "segment 2 needs bytes 0xb0e8 to 0x330e8 and the file ends at 0x330e7: the dump is truncated"},
		{"32-bit", put(core, 4, uint16(0x0101)), "class 1"},
		{"big-endian", put(core, 4, uint16(0x0202)), "byte order 2"},
		{"executable", put(core, 16, uint16(2)), "not ET_CORE"},
		{"header size", put(core, 54, uint16(32)), "program headers of 32 bytes"},
		{"no segments", put(core, 56, uint16(0)), "none of 0 program headers holds physical memory"},
		{"segment beyond 2^63", put(core, ph+24, uint64(math.MaxInt64-5)), "makes no sense"},
		{"file size beyond memory size", put(core, ph+40, uint64(7)), "makes no sense"},
		{"offset overflows", put(core, ph+8, uint64(math.MaxUint64-1)), "truncated"},
		{"process core", elfCore(segment{typ: 1, data: random}, segment{typ: 1, data: random}), "the core of a process"},
		{"only virtual", elfCore(segment{typ: 1, paddr: math.MaxUint64, data: random}), "not a kernel's dump"},
		{"headers counted nowhere", put(put(core, 56, uint16(0xffff)), 40, uint64(len(core))), "section header 0"},
		{"too many headers", manyHeaders(core, 1<<30), "1073741824 program headers"},

		{"LiME header cut", append(bytes.Clone(lime), "EMiL"...), "header of range 3 is cut after 4 of 32 bytes"},
		{"LiME range cut", lime[:len(lime)-1], "range 2 from 0x100000000 needs 163840 bytes and 163839 are left"},
		{"LiME trailing bytes", append(bytes.Clone(lime), random...), "header of range 3 has magic"},
		{"LiME version", put(lime, 4, uint32(7)), "version 7"},
		{"AVML", put(lime, 4, uint32(2)), "avml-convert"},
		{"LiME backwards", put(lime, 16, uint64(7)), "makes no sense"},
		{"LiME wraps", put(lime, 16, uint64(math.MaxUint64)), "makes no sense"},

		{"recording cut", []byte("HOSTMEM\n"), "truncated"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem, err := hostmem.NewImage(bytes.NewReader(c.b), int64(len(c.b)))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("NewImage = %v; want %q", err, c.want)
			}
			if mem != nil {
				t.Errorf("NewImage = %v together with its error", mem)
			}
			path := writeFile(t, filepath.Join(t.TempDir(), "dump"), c.b)
			if _, err := hostmem.OpenImage(path); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("OpenImage = %v; want an error with the path", err)
			}
		})
	}
}

func TestOpenImageErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := hostmem.OpenImage(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("OpenImage(no file) = %v; want %v", err, os.ErrNotExist)
	}
	if _, err := hostmem.OpenImage(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("OpenImage(folder) = %v; want an error", err)
	}
}

// An image that is cut after it was opened faults; it has no end of file.
func TestImageThatShrinks(t *testing.T) {
	path := writeFile(t, filepath.Join(t.TempDir(), "dump"), limeFile(hostmemtest.Map()))
	mem, err := hostmem.OpenImage(path)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := os.Truncate(path, 32+page); err != nil {
		t.Fatal(err)
	}
	k, err := mem.ReadAt(make([]byte, 2*page), 0x1000)
	fault, ok := errors.AsType[*hostmem.FaultError](err)
	if !ok || k != page || fault.Addr != 0x2000 || fault.Len != page {
		t.Errorf("ReadAt = %d, %v; want one page and a fault at 0x2000", k, err)
	}
}

// walk reads all of a memory that parsed, and at the edges of its map.
func walk(t *testing.T, mem hostmem.Memory) {
	t.Helper()
	m := mem.Map()
	if len(m) == 0 || !slices.Equal(m, hostmem.Normalize(m)) {
		t.Fatalf("map %v is empty or not normalised", m)
	}
	buf := make([]byte, 3*page)
	for _, r := range m {
		for off := uint64(0); off < r.Size && off < 1<<20; off += uint64(len(buf)) {
			n := min(uint64(len(buf)), r.Size-off)
			k, err := mem.ReadAt(buf[:n], int64(uint64(r.Start)+off))
			if errors.Is(err, hostmem.ErrNotRecorded) {
				continue
			}
			if err != nil || uint64(k) != n {
				t.Fatalf("ReadAt(%d bytes, %v) = %d, %v; these are in the map", n, r.Start+hostmem.PhysAddr(off), k, err)
			}
		}
		if r.Size >= 4 {
			k, err := mem.ReadAt(buf[:8], int64(r.End()-4))
			if fault, ok := errors.AsType[*hostmem.FaultError](err); !ok || fault.Len != 8-k {
				t.Fatalf("ReadAt(8 bytes, %v) = %d, %v; want a fault", r.End()-4, k, err)
			}
		}
	}
	_ = hostmem.VMCOREINFO(mem)
	_ = hostmem.ResidentRanges(mem)
}

// small are ranges whose images fit a fuzzer.
func small() []hostmem.Range {
	return []hostmem.Range{{Start: 0x1000, Size: 24}, {Start: 1 << 32, Size: 40}}
}

func FuzzImage(f *testing.F) {
	s := loads(small())
	core := elfCore(append(s, segment{typ: 4, data: note("VMCOREINFO", info)})...)
	lime := limeFile(small())
	golden, err := os.ReadFile(filepath.Join("testdata", "v1.hostmem"))
	if err != nil {
		f.Fatal(err)
	}
	for _, b := range [][]byte{
		nil, golden, core, core[:70], elfCore(s[0], s[0], segment{typ: 1, paddr: 0x1008, data: make([]byte, 100)}), manyHeaders(core, 3),
		lime, lime[:40], slices.Concat(lime, lime), make([]byte, page), []byte("KDUMP   "),
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		mem, err := hostmem.NewImage(bytes.NewReader(b), int64(len(b)))
		if (mem == nil) == (err == nil) {
			t.Fatalf("NewImage = %v, %v; want a value or an error", mem, err)
		}
		if err == nil {
			walk(t, mem)
		}
	})
}
