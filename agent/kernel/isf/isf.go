// Package isf reads Intermediate Symbol Files, in which dwarf2json and Volatility 3 keep the types of a kernel that were taken from
// its debug information, and makes BTF of them: for kernels that carry none of their own.
//
// The format is JSON with base_types, user_types, enums and symbols (volatility3, framework/schemas/schema-6.2.0.json). What pointers
// point to is left out, since no layout depends on it. Types without a name are without one in the BTF, too, and so members that have
// none.
package isf

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/cilium/ebpf/btf"
	"github.com/ulikunitz/xz"
)

const (
	maxSize  = 256 << 20 // of the JSON; that of Debian's 6.1 has 34 MiB
	maxDepth = 64        // of types within types, and of pointers to pointers
)

// A File is what an Intermediate Symbol File tells.
type File struct {
	Banner string // linux_banner of the kernel that it is of, without the end of the line; empty if it does not say
	BTF    []byte // raw BTF, as in /sys/kernel/btf/vmlinux
	Types  int    // structures, unions and enums
}

// Read reads an Intermediate Symbol File: JSON, as it is or compressed by gzip or xz.
func Read(r io.Reader) (*File, error) {
	in, err := plain(r)
	if err != nil {
		return nil, fmt.Errorf("symbol file: %w", err)
	}
	limited := &io.LimitedReader{R: in, N: maxSize + 1}
	var doc document
	if err := json.NewDecoder(limited).Decode(&doc); err != nil {
		if limited.N <= 0 {
			return nil, fmt.Errorf("symbol file: more than %d MiB", maxSize>>20)
		}
		return nil, fmt.Errorf("symbol file: not the JSON that dwarf2json writes, or damaged: %w", err)
	}
	if len(doc.Structs) == 0 {
		return nil, errors.New("symbol file: no user_types; want the JSON that dwarf2json writes")
	}
	c := converter{doc: &doc, done: make(map[string]btf.Type), pointer: &btf.Pointer{Target: &btf.Void{}}}
	raw, err := c.convert()
	if err != nil {
		return nil, fmt.Errorf("symbol file: %w", err)
	}
	banner := string(doc.Symbols["linux_banner"].Data)
	return &File{Banner: strings.TrimRight(banner, "\n\x00"), BTF: raw, Types: len(doc.Structs) + len(doc.Enums)}, nil
}

// plain undoes the compression that the first bytes tell of.
func plain(r io.Reader) (io.Reader, error) {
	in := bufio.NewReader(r)
	head, err := in.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return xz.NewReader(in)
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		return gzip.NewReader(in)
	}
	return in, nil
}

type document struct {
	Bases   map[string]base     `json:"base_types"`
	Structs map[string]compound `json:"user_types"`
	Enums   map[string]enum     `json:"enums"`
	Symbols map[string]symbol   `json:"symbols"`
}

type base struct {
	Size   uint32 `json:"size"`
	Signed bool   `json:"signed"`
	Kind   string `json:"kind"` // int, char, bool, float, void
	Endian string `json:"endian"`
}

type compound struct {
	Size   uint32           `json:"size"`
	Kind   string           `json:"kind"` // struct, union
	Fields map[string]field `json:"fields"`
}

type field struct {
	Type      descriptor `json:"type"`
	Offset    uint64     `json:"offset"` // bytes
	Anonymous bool       `json:"anonymous"`
}

type enum struct {
	Size      uint32           `json:"size"`
	Constants map[string]int64 `json:"constants"`
}

type symbol struct {
	Data []byte `json:"constant_data"`
}

// descriptor says of which type something is.
type descriptor struct {
	Kind        string      `json:"kind"` // base, struct, union, enum, array, pointer, bitfield, function
	Name        string      `json:"name"`
	Count       uint32      `json:"count"`   // of an array
	Subtype     *descriptor `json:"subtype"` // of an array; of a pointer, not looked at
	Type        *descriptor `json:"type"`    // of a bitfield
	BitLength   uint32      `json:"bit_length"`
	BitPosition uint32      `json:"bit_position"` // from the lowest bit at the offset
}

// converter makes types of the btf package. done has those that are made, by kind and name, and nil for those that are being made.
type converter struct {
	doc     *document
	done    map[string]btf.Type
	pointer *btf.Pointer
}

func (c *converter) convert() ([]byte, error) {
	b, err := btf.NewBuilder(nil, nil)
	if err != nil {
		return nil, err
	}
	add := func(kind, name string) error {
		t, err := c.typ(&descriptor{Kind: kind, Name: name}, 0)
		if err == nil {
			_, err = b.Add(t)
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", kind, name, err)
		}
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(c.doc.Structs)) {
		if err := add(c.doc.Structs[name].Kind, name); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.doc.Enums)) {
		if err := add("enum", name); err != nil {
			return nil, err
		}
	}
	return b.Marshal(nil, nil)
}

func (c *converter) typ(d *descriptor, depth int) (btf.Type, error) {
	if depth > maxDepth {
		return nil, errors.New("types nest too deeply")
	}
	switch d.Kind {
	case "pointer":
		return c.pointer, nil
	case "function":
		return &btf.Void{}, nil
	case "array":
		if d.Subtype == nil {
			return nil, errors.New("array of nothing")
		}
		of, err := c.typ(d.Subtype, depth+1)
		if err != nil {
			return nil, err
		}
		index, err := c.typ(&descriptor{Kind: "base", Name: "int"}, depth+1)
		return &btf.Array{Index: index, Type: of, Nelems: d.Count}, err
	}
	key := d.Kind + " " + d.Name
	if t, ok := c.done[key]; ok {
		if t == nil {
			return nil, fmt.Errorf("%s contains itself", key)
		}
		return t, nil
	}
	c.done[key] = nil
	t, err := c.make(d, depth)
	if err != nil {
		return nil, err
	}
	c.done[key] = t
	return t, nil
}

// anonymous is what the names of types without a name begin with.
const anonymous = "unnamed_"

func name(s string) string {
	if strings.HasPrefix(s, anonymous) {
		return ""
	}
	return s
}

func (c *converter) make(d *descriptor, depth int) (btf.Type, error) {
	switch d.Kind {
	case "base":
		b, ok := c.doc.Bases[d.Name]
		if !ok {
			return nil, fmt.Errorf("no base type %q", d.Name)
		}
		return b.typ(d.Name)
	case "enum":
		e, ok := c.doc.Enums[d.Name]
		if !ok {
			return nil, fmt.Errorf("no enum %q", d.Name)
		}
		return e.typ(d.Name)
	case "struct", "union":
		s, ok := c.doc.Structs[d.Name]
		if !ok {
			return nil, fmt.Errorf("no %s %q", d.Kind, d.Name)
		}
		if s.Kind != d.Kind {
			return nil, fmt.Errorf("%q is a %s in one place and a %s in another", d.Name, s.Kind, d.Kind)
		}
		m, err := c.members(s, depth)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", d.Kind, d.Name, err)
		}
		if s.Kind == "union" {
			return &btf.Union{Name: name(d.Name), Size: s.Size, Members: m}, nil
		}
		return &btf.Struct{Name: name(d.Name), Size: s.Size, Members: m}, nil
	}
	return nil, fmt.Errorf("unknown kind of type %q", d.Kind)
}

func (b base) typ(name string) (btf.Type, error) {
	if b.Endian != "" && b.Endian != "little" {
		return nil, fmt.Errorf("base type %q is %s-endian; only little-endian machines are supported", name, b.Endian)
	}
	if b.Kind == "void" {
		return &btf.Void{}, nil
	}
	if b.Size == 0 || b.Size > 16 {
		return nil, fmt.Errorf("base type %q has %d bytes", name, b.Size)
	}
	enc := btf.Unsigned
	switch {
	case b.Kind == "float":
		return &btf.Float{Name: name, Size: b.Size}, nil
	case b.Kind == "bool":
		enc = btf.Bool
	case b.Kind != "int" && b.Kind != "char":
		return nil, fmt.Errorf("base type %q is of unknown kind %q", name, b.Kind)
	case b.Signed:
		enc = btf.Signed
	}
	return &btf.Int{Name: name, Size: b.Size, Encoding: enc}, nil
}

func (e enum) typ(of string) (btf.Type, error) {
	t := &btf.Enum{Name: name(of), Size: e.Size}
	switch e.Size {
	case 1, 2, 4, 8:
	case 0: // declared, and never defined
		t.Size = 4
	default:
		return nil, fmt.Errorf("enum %s has %d bytes", of, e.Size)
	}
	for n, v := range e.Constants {
		t.Signed = t.Signed || v < 0
		t.Values = append(t.Values, btf.EnumValue{Name: n, Value: uint64(v)})
	}
	slices.SortFunc(t.Values, func(a, b btf.EnumValue) int {
		if c := int64(a.Value) - int64(b.Value); c != 0 {
			return int(min(max(c, -1), 1))
		}
		return strings.Compare(a.Name, b.Name)
	})
	return t, nil
}

// members returns the members of s by their offsets. Those of no known type are left out, as dwarf2json leaves out others.
func (c *converter) members(s compound, depth int) ([]btf.Member, error) {
	var all []btf.Member
	for _, n := range slices.Sorted(maps.Keys(s.Fields)) {
		f := s.Fields[n]
		m := btf.Member{Name: n}
		if f.Anonymous {
			m.Name = ""
		}
		of, bits := &f.Type, f.Offset
		if f.Type.Kind == "bitfield" {
			if of = f.Type.Type; of == nil || f.Type.BitLength == 0 || f.Type.BitLength > 64 || f.Type.BitPosition > 64 {
				return nil, fmt.Errorf("%s: a field of %d bits at bit %d", n, f.Type.BitLength, f.Type.BitPosition)
			}
			m.BitfieldSize = btf.Bits(f.Type.BitLength)
		}
		if bits > uint64(s.Size) {
			return nil, fmt.Errorf("%s is at byte %d of %d", n, f.Offset, s.Size)
		}
		if bits = bits*8 + uint64(f.Type.BitPosition); bits > math.MaxUint32 {
			return nil, fmt.Errorf("%s is at byte %d: too far", n, f.Offset)
		}
		m.Offset = btf.Bits(bits)
		var err error
		if m.Type, err = c.typ(of, depth+1); err != nil {
			return nil, fmt.Errorf("%s: %w", n, err)
		}
		if _, void := m.Type.(*btf.Void); void {
			continue
		}
		all = append(all, m)
	}
	slices.SortStableFunc(all, func(a, b btf.Member) int { return int(int64(a.Offset) - int64(b.Offset)) })
	return all, nil
}
