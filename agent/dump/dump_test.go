package dump_test

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"math/rand"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/dump"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// pattern is a memory whose every 8 aligned bytes are their own address; bad, if not zero, cannot be read.
type pattern struct{ bad hostmem.PhysAddr }

func (m pattern) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		at := off + int64(i)
		if m.bad != 0 && hostmem.PhysAddr(at) == m.bad {
			return i, &hostmem.FaultError{Op: "read", Addr: m.bad, Len: len(p) - i}
		}
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], uint64(at)&^7)
		p[i] = w[at&7]
	}
	return len(p), nil
}

func source() dump.Source {
	return dump.Source{
		Arch: "x86_64", Memory: pattern{}, VMCOREINFO: "OSRELEASE=6.1\nPAGESIZE=4096\n",
		// As an e820 map has it: not all ends are those of pages.
		RAM:    []hostmem.Range{{Start: 0x100000, Size: 0x200000}, {Start: 0x1000, Size: 0x9ec00}, {Start: 1 << 32, Size: 0x3000}},
		Image:  kernel.Span{Virt: 0xffffffff81000000, Phys: 0x110000, Size: 0x8000},
		Direct: kernel.Span{Virt: 0xffff888000000000, Phys: 0, Size: 1<<32 + 0x3000},
		Notes:  [][]byte{prstatus(1), prstatus(2)},
	}
}

// prstatus is what crash_save_cpu leaves.
func prstatus(pid uint32) []byte {
	b := []byte{5, 0, 0, 0, 0x50, 1, 0, 0, 1, 0, 0, 0, 'C', 'O', 'R', 'E', 0, 0, 0, 0}
	desc := make([]byte, 336)
	binary.LittleEndian.PutUint32(desc[32:], pid)
	return append(b, desc...)
}

// TestCore reads a core by another's parser, and all of it in pieces.
func TestCore(t *testing.T) {
	c, err := dump.New(source())
	if err != nil {
		t.Fatal(err)
	}
	whole := make([]byte, c.Size())
	if n, err := c.ReadAt(whole, 0); n != len(whole) || err != nil {
		t.Fatalf("ReadAt = %d, %v", n, err)
	}
	f, err := elf.NewFile(bytes.NewReader(whole))
	if err != nil {
		t.Fatal(err)
	}
	if f.Type != elf.ET_CORE || f.Machine != elf.EM_X86_64 || len(f.Progs) != 5 {
		t.Fatalf("%v, %d program headers", f.FileHeader, len(f.Progs))
	}
	type load struct{ Virt, Phys, Size uint64 }
	var loads []load
	for _, p := range f.Progs {
		if p.Type == elf.PT_NOTE {
			notes, err := io.ReadAll(p.Open())
			if want := string(prstatus(1)) + string(prstatus(2)) + "\x0b\x00\x00\x00\x1c\x00\x00\x00\x00\x00\x00\x00VMCOREINFO\x00\x00OSRELEASE=6.1\nPAGESIZE=4096\n"; err != nil || string(notes) != want {
				t.Errorf("notes = %q, %v; want %q", notes, err, want)
			}
			continue
		}
		loads = append(loads, load{p.Vaddr, p.Paddr, p.Filesz})
		got, err := io.ReadAll(p.Open())
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, p.Filesz)
		_, _ = pattern{}.ReadAt(want, int64(p.Paddr))
		if !bytes.Equal(got, want) || p.Memsz != p.Filesz || p.Off%4096 != p.Vaddr%4096 {
			t.Errorf("segment %+v does not hold the memory at its address", p.ProgHeader)
		}
	}
	if diff := cmp.Diff([]load{
		{0xffffffff81000000, 0x110000, 0x8000},
		{0xffff888000001000, 0x1000, 0x9e000}, {0xffff888000100000, 0x100000, 0x200000}, {0xffff888100000000, 1 << 32, 0x3000},
	}, loads); diff != "" {
		t.Errorf("segments (-want +got):\n%s", diff)
	}
	r := rand.New(rand.NewSource(1))
	for range 2000 {
		from := r.Int63n(c.Size())
		b := make([]byte, r.Intn(9000))
		n, err := c.ReadAt(b, from)
		want := whole[from:min(from+int64(len(b)), c.Size())]
		if !bytes.Equal(b[:n], want) || (n < len(b)) != errors.Is(err, io.EOF) || n == len(b) && err != nil {
			t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", len(b), from, n, err)
		}
	}
}

func TestCoreRefuses(t *testing.T) {
	for what, change := range map[string]func(*dump.Source){
		"architecture": func(s *dump.Source) { s.Arch = "riscv64" },
		"no RAM":       func(s *dump.Source) { s.RAM = []hostmem.Range{{Start: 0x1001, Size: 0x1000}} },
		"VMCOREINFO":   func(s *dump.Source) { s.VMCOREINFO = "" },
		"overlap":      func(s *dump.Source) { s.RAM = append(s.RAM, hostmem.Range{Start: 0x200000, Size: 0x1000}) },
		"image":        func(s *dump.Source) { s.Image.Phys = 0x2fc000 },
	} {
		s := source()
		change(&s)
		if _, err := dump.New(s); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: New = %v", what, err)
		}
	}
	s := source()
	s.Memory = pattern{bad: 0x101000}
	c, err := dump.New(s)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(io.Discard, io.NewSectionReader(c, 0, c.Size()))
	var fault *hostmem.FaultError
	if !errors.As(err, &fault) || fault.Addr != 0x101000 {
		t.Errorf("a page that cannot be read: %v", err)
	}
}

// blank reads as zeros what a recording does not hold.
type blank struct{ hostmem.Memory }

func (m blank) ReadAt(p []byte, off int64) (int, error) {
	for at := 0; at < len(p); {
		n := min(len(p)-at, int(hostmem.PageSize-(off+int64(at))%hostmem.PageSize))
		if _, err := m.Memory.ReadAt(p[at:at+n], off+int64(at)); err != nil {
			clear(p[at : at+n])
		}
		at += n
	}
	return len(p), nil
}

// TestKernelInCore finds in the core of a recorded host the kernel that is in its memory, with the same tasks.
func TestKernelInCore(t *testing.T) {
	for _, name := range []string{"6.1", "6.12", "6.1-cloud-arm64", "5.10"} {
		t.Run(name, func(t *testing.T) {
			rec, err := hostmem.OpenImage(filepath.Join("../kernel/testdata", name+".hostmem"))
			if err != nil {
				t.Fatal(err)
			}
			defer rec.Close()
			tasks := func(mem hostmem.Memory, o kernel.Options) (*kernel.View, []kernel.Task) {
				t.Helper()
				img, err := kernel.Open(context.Background(), mem, o)
				if err != nil {
					t.Fatal(err)
				}
				v := img.View(t.Context())
				var all []kernel.Task
				for task, err := range v.Tasks() {
					if err != nil {
						t.Fatal(err)
					}
					all = append(all, task)
				}
				return v, all
			}
			v, want := tasks(blank{rec}, kernel.Options{})
			src, err := dump.Of(v)
			if err != nil {
				t.Fatal(err)
			}
			c, err := dump.New(src)
			if err != nil {
				t.Fatal(err)
			}
			mem, err := hostmem.NewImage(c, c.Size())
			if err != nil {
				t.Fatal(err)
			}
			_, got := tasks(mem, kernel.Options{})
			if diff := cmp.Diff(want, got); diff != "" || len(got) < 10 {
				t.Errorf("%d tasks (-memory +core):\n%s", len(got), diff)
			}
		})
	}
}
