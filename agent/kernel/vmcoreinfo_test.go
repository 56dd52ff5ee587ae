package kernel

import (
	"errors"
	"strings"
	"testing"
)

const someVMCOREINFO = `OSRELEASE=6.1.0-56-cloud-amd64
BUILD-ID=3b43fad5034874490492495d552c0af6a5fab235
PAGESIZE=4096
SYMBOL(_stext)=ffffffffa4400000
SIZE(list_head)=16
NUMBER(phys_base)=-528482304
NUMBER(VMALLOC_START)=0xff2a17a7c0000000
KERNELOFFSET=23400000
`

func TestParseVMCOREINFO(t *testing.T) {
	v, err := parseVMCOREINFO(append([]byte(someVMCOREINFO), 0, 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	if va, ok := v.symbol("_stext"); !ok || va != 0xffffffffa4400000 {
		t.Errorf("symbol(_stext) = %v, %v", va, ok)
	}
	if n, ok := v.number("phys_base"); !ok || n != -528482304 {
		t.Errorf("number(phys_base) = %d, %v", n, ok)
	}
	if n, ok := v.number("VMALLOC_START"); !ok || uint64(n) != 0xff2a17a7c0000000 {
		t.Errorf("number(VMALLOC_START) = %#x, %v", n, ok)
	}
	if _, ok := v.symbol("nothing"); ok {
		t.Error("a symbol that is not there was found")
	}
	var entries int
	v.entries(func(vmcoreEntry) { entries++ })
	if entries != 4 {
		t.Errorf("%d entries; want 4", entries)
	}
}

func TestParseVMCOREINFONotYet(t *testing.T) {
	for name, text := range map[string]string{
		"empty":       "",
		"half":        someVMCOREINFO[:20],
		"binary":      someVMCOREINFO + "\x01\x02",
		"cut off":     someVMCOREINFO + "SYMBOL(_ste",
		"no release":  strings.Replace(someVMCOREINFO, "OSRELEASE", "RELEASE", 1),
		"hole inside": someVMCOREINFO[:60] + "\x00" + someVMCOREINFO[60:],
	} {
		_, err := parseVMCOREINFO([]byte(text))
		if !errors.Is(err, ErrNotYet) || !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v; want ErrNotYet", name, err)
		}
	}
}

func TestNoteDesc(t *testing.T) {
	header := func(namesz, descsz uint32, name string) []byte {
		b := make(flat, noteHeaderLen)
		b.put32(0, namesz)
		b.put32(4, descsz)
		copy(b[12:], name)
		return b
	}
	for _, c := range []struct {
		name   string
		header []byte
		want   int
		err    error
	}{
		{"good", header(11, 3264, "VMCOREINFO"), 3264, nil},
		{"being written", header(11, 0, "VMCOREINFO"), 0, ErrNotYet},
		{"absurd", header(11, 1<<30, "VMCOREINFO"), 0, ErrNotYet},
		{"another note", header(11, 100, "VMCOREINFA"), 0, errNoNote},
		{"zeroes", make([]byte, noteHeaderLen), 0, errNoNote},
		{"short", make([]byte, 3), 0, errNoNote},
	} {
		if n, err := noteDesc(c.header); n != c.want || !errors.Is(err, c.err) {
			t.Errorf("%s: noteDesc = %d, %v; want %d, %v", c.name, n, err, c.want, c.err)
		}
	}
}

func FuzzVMCOREINFO(f *testing.F) {
	f.Add([]byte(someVMCOREINFO))
	f.Fuzz(func(t *testing.T, text []byte) {
		v, err := parseVMCOREINFO(text)
		if (v == nil) == (err == nil) {
			t.Fatalf("parseVMCOREINFO = %v, %v", v, err)
		}
		if err != nil {
			return
		}
		v.entries(func(e vmcoreEntry) {
			v.symbol(e.name)
			v.number(e.name)
		})
		if a, err := archOf(v); err == nil {
			if s, _, err := a.space(v); (s == nil) == (err == nil) {
				t.Errorf("space = %v, %v", s, err)
			}
		}
	})
}
