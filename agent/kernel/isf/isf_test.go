package isf

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// real is what dwarf2json 0.9.0 made of Debian's vmlinux with debug symbols, with only the types that package kernel asks for and what
// they contain.
const real = "testdata/6.1.0-56-cloud-amd64.json.xz"

func open(tb testing.TB) *File {
	tb.Helper()
	b, err := os.ReadFile(real)
	if err != nil {
		tb.Fatal(err)
	}
	f, err := Read(bytes.NewReader(b))
	if err != nil {
		tb.Fatal(err)
	}
	return f
}

// TestRead looks at what is hard to get right: members of no own name, bit fields. That answers by it are those that the kernel's own
// BTF gives, package kernel tests.
func TestRead(t *testing.T) {
	f := open(t)
	if !strings.HasPrefix(f.Banner, "Linux version 6.1.0-56-cloud-amd64 ") || !strings.HasSuffix(f.Banner, "Debian 6.1.192-2 (2026-11-16)") {
		t.Errorf("banner %q", f.Banner)
	}
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(f.BTF))
	if err != nil {
		t.Fatal(err)
	}
	var cred *btf.Struct
	if err := spec.TypeByName("cred", &cred); err != nil {
		t.Fatal(err)
	}
	uid := cred.Members[1]
	if uid.Name != "uid" || uid.Offset.Bytes() != 8 || uid.Type.TypeName() != "kuid_t" { // struct cred, include/linux/cred.h: behind an atomic_long_t
		t.Errorf("cred's second member is %+v", uid)
	}
	var task *btf.Struct
	if err := spec.TypeByName("task_struct", &task); err != nil {
		t.Fatal(err)
	}
	bits := 0
	for _, m := range task.Members {
		if m.BitfieldSize > 0 {
			bits++
		}
		if m.Name == "in_execve" && m.BitfieldSize != 1 {
			t.Errorf("in_execve has %d bits", m.BitfieldSize)
		}
	}
	if bits != 19 {
		t.Errorf("%d bit fields in task_struct", bits)
	}
}

func TestReadRefuses(t *testing.T) {
	const head = `{"base_types":{"int":{"size":4,"signed":true,"kind":"int","endian":"little"}},`
	for name, tt := range map[string]struct{ in, want string }{
		"empty":        {"", "EOF"},
		"not JSON":     {"\x7fELF", "invalid character"},
		"another JSON": {`{"a": 1}`, "no user_types"},
		"cut off":      {head, "unexpected EOF"},
		"unknown type": {head + `"user_types":{"a":{"size":4,"kind":"struct","fields":{"b":{"offset":0,"type":{"kind":"struct","name":"c"}}}}}}`, `struct a: b: no struct "c"`},
		"unknown kind": {head + `"user_types":{"a":{"size":4,"kind":"class","fields":{}}}}`, `unknown kind of type "class"`},
		"in itself":    {head + `"user_types":{"a":{"size":4,"kind":"struct","fields":{"b":{"offset":0,"type":{"kind":"struct","name":"a"}}}}}}`, "contains itself"},
		"outside":      {head + `"user_types":{"a":{"size":4,"kind":"struct","fields":{"b":{"offset":99,"type":{"kind":"base","name":"int"}}}}}}`, "byte 99 of 4"},
		"no subtype":   {head + `"user_types":{"a":{"size":4,"kind":"struct","fields":{"b":{"offset":0,"type":{"kind":"array","count":2}}}}}}`, "array of nothing"},
		"bits":         {head + `"user_types":{"a":{"size":4,"kind":"struct","fields":{"b":{"offset":0,"type":{"kind":"bitfield","bit_length":70}}}}}}`, "70 bits"},
		"big endian":   {strings.Replace(head, "little", "big", 1) + `"user_types":{"a":{"size":4,"kind":"struct","fields":{"b":{"offset":0,"type":{"kind":"base","name":"int"}}}}}}`, "big-endian"},
		"cut off gzip": {"\x1f\x8b\x08", "EOF"},
		"cut off xz":   {"\xfd7zXZ\x00", "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			if f, err := Read(strings.NewReader(tt.in)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Read = %v, %v; want an error with %q", f, err, tt.want)
			}
		})
	}
}

// FuzzRead: whatever is read, it ends, and what comes of it is BTF.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"base_types":{"int":{"size":4,"signed":true,"kind":"int","endian":"little"},"char":{"size":1,"signed":true,"kind":"char"}},
		"user_types":{"a":{"size":12,"kind":"struct","fields":{"b":{"offset":0,"type":{"kind":"base","name":"int"}},
		"c":{"offset":4,"type":{"kind":"bitfield","bit_length":3,"bit_position":2,"type":{"kind":"base","name":"int"}}},
		"u":{"offset":8,"anonymous":true,"type":{"kind":"union","name":"unnamed_1"}}}},
		"unnamed_1":{"size":4,"kind":"union","fields":{"p":{"offset":0,"type":{"kind":"array","count":4,"subtype":{"kind":"base","name":"char"}}},
		"e":{"offset":0,"type":{"kind":"enum","name":"e"}}}}},"enums":{"e":{"size":4,"base":"int","constants":{"A":-1,"B":2}}},
		"symbols":{"linux_banner":{"address":1,"constant_data":"TGludXg="}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := Read(bytes.NewReader(b))
		if err != nil {
			return
		}
		if _, err := btf.LoadSpecFromReader(bytes.NewReader(file.BTF)); err != nil {
			t.Errorf("made BTF that does not parse: %v", err)
		}
	})
}
