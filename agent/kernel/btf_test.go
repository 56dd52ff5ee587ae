package kernel

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// marshalBTF makes raw BTF of types.
func marshalBTF(tb testing.TB, types ...btf.Type) []byte {
	tb.Helper()
	b, err := btf.NewBuilder(types, nil)
	if err != nil {
		tb.Fatal(err)
	}
	raw, err := b.Marshal(nil, &btf.MarshalOptions{Order: binary.LittleEndian})
	if err != nil {
		tb.Fatal(err)
	}
	return raw
}

func someTypes() []btf.Type {
	u32 := &btf.Int{Name: "unsigned int", Size: 4}
	u64 := &btf.Typedef{Name: "u64", Type: &btf.Int{Name: "unsigned long", Size: 8}}
	task := &btf.Struct{Name: "task", Size: 64}
	list := &btf.Struct{Name: "list_head", Size: 16}
	list.Members = []btf.Member{{Name: "next", Type: &btf.Pointer{Target: list}}, {Name: "prev", Type: &btf.Pointer{Target: list}, Offset: 64}}
	task.Members = []btf.Member{
		{Name: "info", Type: &btf.Struct{Name: "info", Size: 8, Members: []btf.Member{
			{Name: "flags", Type: u32}, {Name: "cpu", Type: &btf.Volatile{Type: u32}, Offset: 32}}}},
		{Type: &btf.Union{Size: 8, Members: []btf.Member{{Name: "stack", Type: u64}, {Name: "depth", Type: u32}}}, Offset: 64},
		{Name: "tasks", Type: list, Offset: 128},
		{Name: "comm", Type: &btf.Array{Index: u32, Type: &btf.Int{Name: "char", Size: 1}, Nelems: 16}, Offset: 256},
		{Name: "flag", Type: u32, Offset: 385, BitfieldSize: 3},
		{Name: "parent", Type: &btf.Pointer{Target: task}, Offset: 448},
	}
	return []btf.Type{task, &btf.Typedef{Name: "task_t", Type: task},
		&btf.Enum{Name: "level", Size: 4, Values: []btf.EnumValue{{Name: "LOW", Value: 1}, {Name: "HIGH", Value: 7}}},
		&btf.Enum{Size: 4, Values: []btf.EnumValue{{Name: "MM_FILEPAGES", Value: 0}, {Name: "MM_ANONPAGES", Value: 1}}},
		&btf.Struct{Name: "twice", Size: 8, Members: []btf.Member{{Name: "a", Type: u64}}},
		&btf.Struct{Name: "twice", Size: 16, Members: []btf.Member{{Name: "b", Type: u64}, {Name: "a", Type: u64, Offset: 64}}}}
}

func TestTypes(t *testing.T) {
	ty, err := newTypes(marshalBTF(t, someTypes()...))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		typ, path string
		want      Field
	}{
		{"task", "info.cpu", Field{Offset: 4, Size: 4}},
		{"task", "stack", Field{Offset: 8, Size: 8}},
		{"task", "depth", Field{Offset: 8, Size: 4}},
		{"task", "tasks.prev", Field{Offset: 24, Size: 8}},
		{"task", "comm", Field{Offset: 32, Size: 16}},
		{"task", "flag", Field{Offset: 48, Size: 1, BitOffset: 1, BitSize: 3}},
		{"task_t", "parent", Field{Offset: 56, Size: 8}},
		{"twice", "b", Field{Offset: 0, Size: 8}},
	} {
		for range 2 { // the second time from the cache
			if got, err := ty.field(c.typ, c.path); err != nil || got != c.want {
				t.Errorf("field(%s, %s) = %+v, %v; want %+v", c.typ, c.path, got, err, c.want)
			}
		}
	}
	for _, c := range []struct {
		typ, path string
		want      error
	}{{"task", "nothing", ErrNotFound}, {"nothing", "x", ErrNotFound}, {"level", "x", ErrNotFound}, {"task", "comm.x", ErrNotFound},
		{"task", "", ErrNotFound}, {"twice", "a", ErrAmbiguous}} {
		if got, err := ty.field(c.typ, c.path); !errors.Is(err, c.want) {
			t.Errorf("field(%s, %s) = %+v, %v; want %v", c.typ, c.path, got, err, c.want)
		}
	}
	if n, err := ty.sizeof("task_t"); err != nil || n != 64 {
		t.Errorf("sizeof(task_t) = %d, %v", n, err)
	}
	if _, err := ty.sizeof("twice"); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("sizeof(twice) = %v; want ErrAmbiguous", err)
	}
	if n, err := ty.enum("level", "HIGH"); err != nil || n != 7 {
		t.Errorf("enum(level, HIGH) = %d, %v", n, err)
	}
	if n, err := ty.enum("", "MM_ANONPAGES"); err != nil || n != 1 {
		t.Errorf("enum(MM_ANONPAGES) = %d, %v", n, err)
	}
	if _, err := ty.enum("level", "MM_ANONPAGES"); !errors.Is(err, ErrNotFound) {
		t.Errorf("enum(level, MM_ANONPAGES) = %v; want ErrNotFound", err)
	}
}

// rawBTF makes BTF of raw types, without names.
func rawBTF(types []byte) []byte {
	b := []byte{0x9f, 0xeb, 1, 0}
	for _, n := range []int{btfHeaderLen, 0, len(types), len(types), 1} {
		b = binary.LittleEndian.AppendUint32(b, uint32(n))
	}
	return append(append(b, types...), 0)
}

func rawType(kind, n int, words ...uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(kind<<24|n))
	for _, w := range words {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b
}

func TestTameBTFRefuses(t *testing.T) {
	chain := func(kind int, n uint32) (b []byte) {
		for i := range n {
			b = append(b, rawType(kind, 0, i+2)...)
		}
		return append(b, rawType(btfInt, 0, 4, 32)...)
	}
	var tree []byte // each contains the next twice: 2^40 members
	for i := range uint32(40) {
		tree = append(tree, rawType(btfStruct, 2, 8, 0, i+2, 0, 0, i+2, 0)...)
	}
	tree = append(tree, rawType(btfInt, 0, 4, 32)...)
	for name, c := range map[string]struct {
		raw  []byte
		good bool
	}{
		"typedefs":           {rawBTF(chain(btfTypedef, 1_000_000)), false},
		"declaration tags":   {rawBTF(chain(btfDeclTag, 100_000)), false},
		"some typedefs":      {rawBTF(chain(btfTypedef, 40)), true},
		"pointers":           {rawBTF(chain(btfPtr, 100_000)), true},
		"itself":             {rawBTF(rawType(btfStruct, 1, 8, 0, 1, 0)), false},
		"each other":         {rawBTF(append(rawType(btfTypedef, 0, 2), rawType(btfConst, 0, 1)...)), false},
		"array of itself":    {rawBTF(rawType(btfArray, 0, 0, 1, 1, 5)), false},
		"no such type":       {rawBTF(rawType(btfTypedef, 0, 99)), false},
		"exponential":        {rawBTF(tree), true},
		"too many members":   {rawBTF(rawType(btfStruct, 0xffff, 8)), false},
		"unknown kind":       {rawBTF(rawType(31, 0, 0)), false},
		"no magic":           {make([]byte, 100), false},
		"short":              {[]byte{0x9f, 0xeb, 1, 0}, false},
		"sections overlap":   {append([]byte{0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, make([]byte, 32)...), false},
		"larger than is fit": {make([]byte, btfMaxSize+1), false},
	} {
		_, err := tameBTF(c.raw)
		if (err == nil) != c.good {
			t.Errorf("%s: tameBTF = %v", name, err)
		}
	}
}

func FuzzBTF(f *testing.F) {
	f.Add(marshalBTF(f, someTypes()...))
	f.Add(rawBTF(rawType(btfTypedef, 0, 0)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ty, err := newTypes(raw)
		if (ty == nil) == (err == nil) {
			t.Fatalf("newTypes = %v, %v", ty, err)
		}
		if err != nil {
			return
		}
		for _, name := range []string{"task", "task_t", "info", "list_head", "level", "twice", "u64", "unsigned int"} {
			_, _ = ty.sizeof(name)
			_, _ = ty.enum(name, "HIGH")
			for _, path := range []string{"info.cpu", "stack", "tasks.prev", "comm", "flag", "parent", "a", ""} {
				_, _ = ty.field(name, path)
			}
		}
		_, _ = ty.enum("", "MM_ANONPAGES")
	})
}
