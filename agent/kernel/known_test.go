package kernel

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const knownVA = 0xffffffff81000000

// knownFile is an ELF file as a bzImage has it: 64 bytes of code, a note with a build ID, and places to relocate.
func knownFile(relocs ...uint32) []byte {
	const code, note, names, sections = 0x100, 0x140, 0x160, 0x180
	b := make([]byte, sections+4*64)
	le := binary.LittleEndian
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)
	le.PutUint16(b[18:], 62)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64)
	le.PutUint64(b[40:], sections)
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	le.PutUint16(b[58:], 64)
	le.PutUint16(b[60:], 4)
	le.PutUint16(b[62:], 3)
	p := b[64:]
	le.PutUint32(p, 1)
	le.PutUint32(p[4:], 5)
	le.PutUint64(p[8:], code)
	le.PutUint64(p[16:], knownVA)
	le.PutUint64(p[32:], 64)
	le.PutUint64(p[40:], 64)
	for i := range 64 {
		b[code+i] = byte(i)
	}
	copy(b[note:], "\x04\x00\x00\x00\x04\x00\x00\x00\x03\x00\x00\x00GNU\x00\xde\xad\xbe\xef")
	copy(b[names:], "\x00.text\x00.notes\x00.shstrtab\x00")
	for i, s := range []struct {
		name, typ     uint32
		addr, at, len uint64
	}{{}, {1, 1, knownVA, code, 64}, {7, 7, 0, note, 20}, {14, 3, 0, names, 24}} {
		h := b[sections+64*i:]
		le.PutUint32(h, s.name)
		le.PutUint32(h[4:], s.typ)
		le.PutUint64(h[16:], s.addr)
		le.PutUint64(h[24:], s.at)
		le.PutUint64(h[32:], s.len)
	}
	for _, r := range relocs {
		b = le.AppendUint32(b, r)
	}
	return b
}

func TestKnown(t *testing.T) {
	// Of 64 bits at 8, counting down at 24, of 32 bits at 32 and at 36; both forms of the file.
	const moved = 0x20000000
	for _, tt := range []struct {
		name   string
		relocs []uint32
		down   bool
	}{
		{"until 6.14", []uint32{0, 0x81000008, 0, 0x81000018, 0, 0x81000024, 0x81000020}, true},
		{"since 6.15", []uint32{0, 0x81000008, 0, 0x81000024, 0x81000020}, false},
	} {
		f := knownFile(tt.relocs...)
		k, err := OpenKnown(bytes.NewReader(f), int64(len(f)))
		if err != nil || k.BuildID() != "deadbeef" {
			t.Fatalf("%s: %+v, %v", tt.name, k, err)
		}
		want := make([]byte, 64)
		for i := range want {
			want[i] = byte(i)
		}
		binary.LittleEndian.PutUint64(want[8:], binary.LittleEndian.Uint64(want[8:])+moved)
		if tt.down {
			binary.LittleEndian.PutUint32(want[24:], binary.LittleEndian.Uint32(want[24:])-moved)
		}
		for _, at := range []int{32, 36} {
			binary.LittleEndian.PutUint32(want[at:], binary.LittleEndian.Uint32(want[at:])+moved)
		}
		for from := 0; from < 64; from++ {
			for n := 1; from+n <= 64; n++ {
				got := make([]byte, n)
				if err := k.read(knownVA+uint64(from), got, moved); err != nil || !bytes.Equal(got, want[from:from+n]) {
					t.Fatalf("%s: %d bytes at %d: %x, %v; want %x", tt.name, n, from, got, err, want[from:from+n])
				}
			}
		}
		if k.read(knownVA+60, make([]byte, 8), 0) == nil {
			t.Errorf("%s: bytes beyond the file", tt.name)
		}
	}
	for name, f := range map[string][]byte{
		"no relocations": knownFile(), "a list without an end": knownFile(0x81000008, 0), "four lists": knownFile(0, 1, 0, 2, 0, 3, 0, 4),
		"odd": append(knownFile(0, 1, 0, 2), 1), "not ELF": make([]byte, 1000), "cut": knownFile()[:0x190],
	} {
		if _, err := OpenKnown(bytes.NewReader(f), int64(len(f))); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}

func TestKnownDir(t *testing.T) {
	dir := t.TempDir()
	find := KnownDir(dir)
	if k, err := find("deadbeef"); k != nil || err != nil {
		t.Errorf("of none: %v, %v", k, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "deadbeef.vmlinux"), knownFile(0, 0), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := find("deadbeef")
	if err != nil || k == nil {
		t.Fatal(k, err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	if k, err := find("../" + filepath.Base(dir) + "/deadbeef"); k != nil || err == nil {
		t.Errorf("a name that leaves the directory: %v, %v", k, err)
	}
	// It is of another kernel.
	img := &Image{info: Info{BuildID: "00"}}
	if k, err = find("deadbeef"); err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if _, err := k.start(img.View(t.Context())); err == nil || !strings.Contains(err.Error(), "build ID") {
		t.Errorf("of another kernel: %v", err)
	}
}

// What code may be there after a start, and what may not.
func TestSameCode(t *testing.T) {
	for _, tt := range []struct {
		name, now, want string
		grown           uint32
		same            bool
	}{
		{"the same", "0faee8", "0faee8", 0, true},
		{"filled up", "fb0f1f440000", "fb", 0, true},
		{"filled up with something", "fbcccccccccc", "fb", 0, false},
		{"nops of another length", "66900f1f00", "9090909090", 0, true},
		{"a jump over the rest", "fbeb03cccccc", "fb9090909090", 0, true},
		{"a jump over something", "fbeb03fb9090", "fb9090909090", 0, false},
		{"a jump beyond", "fbeb04cccccc", "fb9090909090", 0, false},
		{"a call", "e810000000", "e800000000", 0x10, true},
		{"a call to elsewhere", "e811000000", "e800000000", 0x10, false},
		{"a jump that became short", "eb130f1f00", "e900000000", 0x10, true},
		{"a jump that became short, since 6.4", "eb13cccccc", "e900000000", 0x10, true},
		{"a short jump to elsewhere", "eb140f1f00", "e900000000", 0x10, false},
		{"another instruction", "fa", "fb", 0x10, false},
		{"longer", "fb", "fb90", 0, false},
		{"a distance inside", "488b0510000000c3", "488b0500000000c3", 0x10, true},
	} {
		now, _ := hex.DecodeString(tt.now)
		want, _ := hex.DecodeString(tt.want)
		if got := sameCode(now, want, tt.grown); got != tt.same {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// Retpolines, return thunks, lock prefixes and endbr as a start leaves them.
func TestStarted(t *testing.T) {
	const at, thunks = VirtAddr(0x1000), VirtAddr(0x3000)
	s := &started{thunks: thunks, img: &Image{lay: &layout{text: 0x1000, end: 0x4000}, syms: &kallsyms{}}}
	to := func(op string, n int, target VirtAddr) string {
		return op + string(binary.LittleEndian.AppendUint32(nil, uint32(int32(target)-int32(at)-int32(n))))
	}
	call, jump, jcc := to("\xe8", 5, thunks+32*3), to("\x2e\xe9", 6, thunks+32*11), to("\x0f\x84", 6, thunks+32*2)
	for _, tt := range []struct {
		name     string
		kind     uint8
		was, now string
		may      int
	}{
		{"call", startIndirect, call + "\x00", "\xff\xd3\x0f\x1f\x00\x00", 5},
		{"call of another register", startIndirect, call + "\x00", "\xff\xd0\x0f\x1f\x00\x00", 0},
		{"jump instead of call", startIndirect, call + "\x00", "\xff\xe3\x0f\x1f\x00\x00", 0},
		{"call behind a fence", startIndirect, call + "\x00", "\x0f\xae\xe8\xff\xd3\x00", 5},
		{"jump", startIndirect, jump, "\x41\xff\xe3\xcc\xcc\xcc", 6},
		{"jump and something", startIndirect, jump, "\x41\xff\xe3\xfb\xfb\xfb", 0},
		{"jump on condition", startIndirect, jcc, "\x75\x04\xff\xe2\x66\x90", 6},
		{"jump on the condition itself", startIndirect, jcc, "\x74\x04\xff\xe2\x66\x90", 0},
		{"call of what is no thunk", startIndirect, to("\xe8", 5, 0x2000) + "\x00", "\xff\xd3\x0f\x1f\x00\x00", 0},
		{"return", startReturn, to("\xe9", 5, 0x2000), "\xc3\xcc\xcc\xcc\xcc", 5},
		{"return and something", startReturn, to("\xe9", 5, 0x2000), "\xc3\xfb\xcc\xcc\xcc", 0},
		{"lock", startLock, "\xf0", "\x3e", 1},
		{"lock that is gone", startLock, "\xf0", "\x90", 0},
		{"endbr", startEndbr, "\xf3\x0f\x1e\xfa", "\x66\x0f\x1f\x00", 4},
		{"endbr that is gone", startEndbr, "\xf3\x0f\x1e\xfa", "\x90\x90\x90\x90", 0},
	} {
		if n, err := s.may(startSite{va: uint64(at), kind: tt.kind}, []byte(tt.was), []byte(tt.now)); n != tt.may || err != nil {
			t.Errorf("%s: %d, %v; want %d", tt.name, n, err, tt.may)
		}
	}
}

func FuzzKnown(f *testing.F) {
	f.Add(knownFile(0, 0x81000008, 0, 0x81000018, 0, 0x81000020), uint64(0x20000000))
	f.Fuzz(func(t *testing.T, b []byte, moved uint64) {
		k, err := OpenKnown(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		// What does not lie in the file is an error, and no more.
		_ = k.read(knownVA, make([]byte, 64), moved)
		for _, s := range k.f.Sections {
			_, _, _ = k.section(s.Name)
		}
	})
}
