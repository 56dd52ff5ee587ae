package kernel

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

// makeKallsyms compresses names (with their types) by single characters and a few tokens.
func makeKallsyms(names []string, offsets []int32) kallsymsTables {
	var t kallsymsTables
	tokens := make([]string, 256)
	for i := range tokens {
		tokens[i] = string([]byte{byte(i)})
	}
	tokens[0], tokens[1], tokens[2] = "T_", "init", "sys_"
	for _, s := range tokens {
		t.tokenIndex = binary.LittleEndian.AppendUint16(t.tokenIndex, uint16(len(t.tokens)))
		t.tokens = append(append(t.tokens, s...), 0)
	}
	for _, s := range names {
		var b []byte
		for len(s) > 0 {
			n := 0
			for i, token := range tokens[:3] {
				if strings.HasPrefix(s, token) {
					b, n = append(b, byte(i)), len(token)
				}
			}
			if n == 0 {
				b, n = append(b, s[0]), 1
			}
			s = s[n:]
		}
		if len(b) > 127 {
			t.names = append(t.names, byte(len(b)&0x7f|0x80), byte(len(b)>>7))
		} else {
			t.names = append(t.names, byte(len(b)))
		}
		t.names = append(t.names, b...)
	}
	for _, o := range offsets {
		t.offsets = binary.LittleEndian.AppendUint32(t.offsets, uint32(o))
	}
	return t
}

func TestKallsyms(t *testing.T) {
	const base, tables = VirtAddr(0xffffffff81000000), VirtAddr(0xffffffff82000000)
	long := "t" + strings.Repeat("long_", 60) // 2 bytes of length
	names := []string{"Dcpu_thing", "T_stext", "Tinit_task", "tsame", "tsame", "T_etext", "Dswapper", long}
	addrs := []VirtAddr{0x40, base, base + 0x100, base + 0x200, base + 0x300, base + 0x300, base + 0x400, base + 0x500}
	encode := map[string]func(i int, va VirtAddr) int32{
		"absolute-percpu": func(_ int, va VirtAddr) int32 {
			if va < 0x1000 {
				return int32(va)
			}
			return int32(-1 - int64(va-base))
		},
		"base-relative":  func(_ int, va VirtAddr) int32 { return int32(va - base) },
		"place-relative": func(i int, va VirtAddr) int32 { return int32(va - tables - VirtAddr(4*i)) },
	}
	for formula, enc := range encode {
		t.Run(formula, func(t *testing.T) {
			names, addrs := names, addrs
			if formula != "absolute-percpu" {
				names, addrs = names[1:], addrs[1:]
			}
			offsets := make([]int32, len(addrs))
			for i, va := range addrs {
				offsets[i] = enc(i, va)
			}
			k, err := newKallsyms(makeKallsyms(names, offsets), len(names))
			if err != nil {
				t.Fatal(err)
			}
			known := map[string]VirtAddr{"_stext": base, "init_task": base + 0x100, "swapper": base + 0x400, "_etext": base + 0x300}
			if n, err := k.infer(known, base, tables); err != nil || n != len(known) {
				t.Fatal(err)
			}
			if k.formula != formula {
				t.Errorf("inferred %s", k.formula)
			}
			for i, name := range names {
				va, err := k.symbol(name[1:])
				if name == "tsame" {
					if !errors.Is(err, ErrAmbiguous) {
						t.Errorf("symbol(same) = %v, %v; want ErrAmbiguous", va, err)
					}
				} else if err != nil || va != addrs[i] {
					t.Errorf("symbol(%q) = %v, %v; want %v", name[1:], va, err, addrs[i])
				}
				if typ, got := k.name(i); typ != name[0] || got != name[1:] {
					t.Errorf("name(%d) = %c %q; want %q", i, typ, got, name)
				}
			}
			if name, off, err := k.at(base + 0x180); err != nil || name != "init_task" || off != 0x80 {
				t.Errorf("at = %s+%#x, %v; want init_task+0x80", name, off, err)
			}
			if _, err := k.symbol("absent"); !errors.Is(err, ErrNotFound) {
				t.Errorf("symbol(absent) = %v; want ErrNotFound", err)
			}
			// One known address that does not fit, and no encoding is believed.
			known["init_task"]++
			if _, err := k.infer(known, base, tables); err == nil {
				t.Error("infer believed a wrong address")
			}
		})
	}
}

// TestKallsymsSameHash gives all symbols the same name: finding it must not take long.
func TestKallsymsSameHash(t *testing.T) {
	const n = 100_000
	names := make([]string, n)
	for i := range names {
		names[i] = "tx"
	}
	k, err := newKallsyms(makeKallsyms(names, make([]int32, n)), n)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(k.find("x")); got != n {
		t.Errorf("found %d of %d", got, n)
	}
}

func FuzzKallsyms(f *testing.F) {
	t := makeKallsyms([]string{"T_stext", "Tinit_task", "Dsys_call"}, []int32{-1, -2, -3})
	f.Add(uint16(3), t.names, t.tokens, t.tokenIndex, t.offsets)
	f.Fuzz(func(t *testing.T, n uint16, names, tokens, tokenIndex, offsets []byte) {
		k, err := newKallsyms(kallsymsTables{names, tokens, tokenIndex, offsets}, int(n))
		if (k == nil) == (err == nil) {
			t.Fatalf("newKallsyms = %v, %v", k, err)
		}
		if err != nil {
			return
		}
		known := make(map[string]VirtAddr)
		for i := range k.offsets {
			_, name := k.name(i)
			if len(known) < 4 {
				known[name] = VirtAddr(uint32(k.offsets[i]))
			}
			found := false
			for _, j := range k.find(name) {
				found = found || i == j
			}
			if !found && name == string(expand(k, i)) {
				t.Errorf("symbol %d, %q, is not found by its name", i, name)
			}
			if i > 100 {
				break
			}
		}
		if _, err := k.infer(known, 0, 0); err == nil {
			_, _ = k.symbol("init_task")
			for i, o := range k.offsets {
				if _, _, err := k.at(k.address(o, i)); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// expand returns the raw name of symbol i.
func expand(k *kallsyms, i int) []byte {
	var b []byte
	for _, c := range k.body(i) {
		b = append(b, k.tokens[c]...)
	}
	return b[min(1, len(b)):]
}
