package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/cilium/ebpf/btf"
)

const (
	btfMaxSize   = 16 << 20 // Debian 6.12 has 4.9 MiB
	btfMaxDepth  = 64       // of types within types
	btfMaxVisits = 1 << 16  // members looked at to find one
	btfHeaderLen = 24
	btfHeadLen   = 64 << 10 // of what is kept to know it again
)

// types answers questions about the kernel's types. It is safe for concurrent use.
type types struct {
	spec      *btf.Spec
	size      int          // of the BTF, bytes
	anonymous []btf.TypeID // enums without a name

	mu     sync.Mutex
	fields map[[2]string]Field // guarded by mu
}

// newTypes takes raw BTF, which it changes and does not keep.
//
// The BTF comes from the host, and the btf package follows every reference of a type that it is asked for, by
// recursion: the closure of task_struct is most of the kernel, and a chain of a million typedefs would exhaust the stack,
// which cannot be recovered from. So references through pointers and functions are cut before it sees them (no layout
// depends on them), and what is left, types within types, must be shallow.
func newTypes(raw []byte) (*types, error) {
	anonymous, err := tameBTF(raw)
	if err != nil {
		return nil, err
	}
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("parse BTF: %w", err)
	}
	return &types{spec: spec, size: len(raw), anonymous: anonymous, fields: make(map[[2]string]Field)}, nil
}

// The kinds of BTF, include/uapi/linux/btf.h.
const (
	btfInt = iota + 1
	btfPtr
	btfArray
	btfStruct
	btfUnion
	btfEnum
	btfFwd
	btfTypedef
	btfVolatile
	btfConst
	btfRestrict
	btfFunc
	btfFuncProto
	btfVar
	btfDatasec
	btfFloat
	btfDeclTag
	btfTypeTag
	btfEnum64
)

// btfShape says of each kind how many bytes follow its header, per item of vlen or once, and at which offsets of these
// bytes (or of the header, for ref) there are references to other types.
var btfShape = [...]struct {
	once, item int
	ref, cut   bool  // the header's last word is a reference; it is cut
	refs       []int // offsets of references in an item
	cutItems   bool
}{
	btfInt:       {once: 4},
	btfPtr:       {ref: true, cut: true},
	btfArray:     {once: 12, refs: []int{0, 4}},
	btfStruct:    {item: 12, refs: []int{4}},
	btfUnion:     {item: 12, refs: []int{4}},
	btfEnum:      {item: 8},
	btfFwd:       {},
	btfTypedef:   {ref: true},
	btfVolatile:  {ref: true},
	btfConst:     {ref: true},
	btfRestrict:  {ref: true},
	btfFunc:      {ref: true},
	btfFuncProto: {item: 8, ref: true, cut: true, refs: []int{4}, cutItems: true},
	btfVar:       {once: 4, ref: true, cut: true},
	btfDatasec:   {item: 12, refs: []int{0}, cutItems: true},
	btfFloat:     {},
	btfDeclTag:   {once: 4, ref: true},
	btfTypeTag:   {ref: true},
	btfEnum64:    {item: 12},
}

// tameBTF checks the structure of raw BTF, cuts references that no layout needs, and refuses what nests too deeply. It
// returns the enums without a name.
func tameBTF(raw []byte) (anonymous []btf.TypeID, err error) {
	if len(raw) < btfHeaderLen || len(raw) > btfMaxSize {
		return nil, fmt.Errorf("BTF of %d bytes", len(raw))
	}
	if le16(raw) != 0xeb9f || raw[2] != 1 {
		return nil, fmt.Errorf("BTF magic %#x, version %d", le16(raw), raw[2])
	}
	header, size := uint64(le32(raw[4:])), uint64(len(raw))
	typeOff, typeLen := uint64(le32(raw[8:])), uint64(le32(raw[12:]))
	if header < btfHeaderLen || header > size || typeOff%4 != 0 || header+typeOff+typeLen > size {
		return nil, errors.New("BTF header is out of bounds")
	}
	b := raw[header+typeOff : header+typeOff+typeLen]

	offsets := make([]uint32, 1, 128<<10) // of each type; type 0 is void
	for at := 0; at < len(b); {
		if len(b)-at < 12 {
			return nil, fmt.Errorf("BTF type %d is cut off", len(offsets))
		}
		kind, n := btfKind(b[at:])
		if kind == 0 || kind >= len(btfShape) {
			return nil, fmt.Errorf("BTF type %d is of unknown kind %d", len(offsets), kind)
		}
		shape := &btfShape[kind]
		if shape.cut {
			clear(b[at+8 : at+12])
		}
		if (kind == btfEnum || kind == btfEnum64) && le32(b[at:]) == 0 {
			anonymous = append(anonymous, btf.TypeID(len(offsets)))
		}
		offsets = append(offsets, uint32(at))
		items := at + 12
		at = items + shape.once + n*shape.item
		if at > len(b) {
			return nil, fmt.Errorf("BTF type %d is cut off", len(offsets)-1)
		}
		if shape.cutItems {
			for ; items < at; items += shape.item {
				for _, r := range shape.refs {
					clear(b[items+r : items+r+4])
				}
			}
		}
	}
	return anonymous, btfDepth(b, offsets)
}

// perCPUVars returns where the variables of the section ".data..percpu" are in it, as raw BTF tells; none if it is damaged.
func perCPUVars(raw []byte) map[string]uint32 {
	if len(raw) < btfHeaderLen || len(raw) > btfMaxSize {
		return nil
	}
	header, typeOff, typeLen := uint64(le32(raw[4:])), uint64(le32(raw[8:])), uint64(le32(raw[12:]))
	strOff, strLen := uint64(le32(raw[16:])), uint64(le32(raw[20:]))
	size := uint64(len(raw))
	if header < btfHeaderLen || header+typeOff+typeLen > size || header+strOff+strLen > size {
		return nil
	}
	b, text := raw[header+typeOff:][:typeLen], raw[header+strOff:][:strLen]
	name := func(at uint32) string {
		if uint64(at) >= uint64(len(text)) {
			return ""
		}
		n := bytes.IndexByte(text[at:], 0)
		if n < 0 {
			return ""
		}
		return string(text[at:][:n])
	}
	names := make(map[uint32]uint32) // of variables, by their types
	vars := make(map[string]uint32)
	for at, id := 0, uint32(1); len(b)-at >= 12; id++ {
		kind, n := btfKind(b[at:])
		if kind == 0 || kind >= len(btfShape) {
			return nil
		}
		end := at + 12 + btfShape[kind].once + n*btfShape[kind].item
		if end > len(b) {
			return nil
		}
		switch {
		case kind == btfVar:
			names[id] = le32(b[at:])
		case kind == btfDatasec && name(le32(b[at:])) == ".data..percpu": // its variables come before it
			for item := at + 12; item < end && len(vars) < maxPerCPU; item += 12 {
				if s := name(names[le32(b[item:])]); s != "" {
					vars[s] = le32(b[item+4:])
				}
			}
		}
		at = end
	}
	return vars
}

func btfKind(b []byte) (kind, n int) {
	info := le32(b[4:])
	return int(info >> 24 & 0x1f), int(info & 0xffff)
}

// btfDepth checks that no type contains itself and that types nest less than btfMaxDepth deep.
func btfDepth(b []byte, offsets []uint32) error {
	const open = 0xff
	depth := make([]uint8, len(offsets)) // 0 not known yet, open while it is being found out
	depth[0] = 1
	type frame struct {
		id, ref uint32 // the next reference of id to follow
		depth   uint8
	}
	refs := func(id uint32, i int) (uint32, bool) {
		h := b[offsets[id]:]
		kind, n := btfKind(h)
		shape := &btfShape[kind]
		if shape.ref {
			if i == 0 {
				return le32(h[8:]), true
			}
			i--
		}
		if len(shape.refs) == 0 {
			return 0, false
		}
		if shape.once > 0 {
			n = 1
		}
		if i/len(shape.refs) >= n {
			return 0, false
		}
		return le32(h[12+i/len(shape.refs)*shape.item+shape.refs[i%len(shape.refs)]:]), true
	}
	var stack []frame
	for id := range uint32(len(offsets)) {
		if depth[id] != 0 {
			continue
		}
		depth[id] = open
		stack = append(stack[:0], frame{id: id})
		for len(stack) > 0 {
			f := &stack[len(stack)-1]
			ref, ok := refs(f.id, int(f.ref))
			if !ok {
				d := f.depth + 1
				depth[f.id] = d
				stack = stack[:len(stack)-1]
				if len(stack) > 0 {
					up := &stack[len(stack)-1]
					up.depth = max(up.depth, d)
				}
				continue
			}
			f.ref++
			if ref >= uint32(len(offsets)) {
				return fmt.Errorf("BTF type %d refers to type %d of %d", f.id, ref, len(offsets))
			}
			switch d := depth[ref]; {
			case d == open:
				return fmt.Errorf("BTF type %d contains itself", ref)
			case d == 0:
				if len(stack) >= btfMaxDepth {
					return fmt.Errorf("BTF type %d nests too deeply", id)
				}
				depth[ref] = open
				stack = append(stack, frame{id: ref})
			default:
				if int(d)+len(stack) > btfMaxDepth {
					return fmt.Errorf("BTF type %d nests too deeply", id)
				}
				f.depth = max(f.depth, d)
			}
		}
	}
	return nil
}

// named returns the structures and unions of a name, or of a typedef of that name.
func (t *types) named(name string) ([]btf.Type, error) {
	found, err := t.spec.AnyTypesByName(name)
	if errors.Is(err, btf.ErrNotFound) {
		return nil, fmt.Errorf("type %q: %w", name, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("type %q: %w", name, err)
	}
	return found, nil
}

// members returns the members of a structure or union; ok is false for any other type.
func members(t btf.Type) (m []btf.Member, ok bool) {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		return t.Members, true
	case *btf.Union:
		return t.Members, true
	}
	return nil, false
}

// field finds a member by its path: "thread_info.flags".
func (t *types) field(typ, path string) (Field, error) {
	key := [2]string{typ, path}
	t.mu.Lock()
	f, ok := t.fields[key]
	t.mu.Unlock()
	if ok {
		return f, nil
	}
	found, err := t.named(typ)
	if err != nil {
		return Field{}, err
	}
	hits := 0
	for _, in := range found {
		if _, ok := members(in); !ok {
			continue
		}
		g, err := fieldIn(in, path)
		if err != nil {
			continue
		}
		if hits > 0 && g != f {
			return Field{}, fmt.Errorf("%s.%s: %w", typ, path, ErrAmbiguous)
		}
		f = g
		hits++
	}
	if hits == 0 {
		return Field{}, fmt.Errorf("%s.%s: %w", typ, path, ErrNotFound)
	}
	t.mu.Lock()
	t.fields[key] = f
	t.mu.Unlock()
	return f, nil
}

func fieldIn(in btf.Type, path string) (Field, error) {
	var at uint64 // bits
	visits := btfMaxVisits
	for {
		name, rest, more := strings.Cut(path, ".")
		m, off, ok := findMember(in, name, &visits)
		if !ok {
			return Field{}, ErrNotFound
		}
		at += off
		if more {
			in, path = m.Type, rest
			continue
		}
		f := Field{Offset: at / 8}
		if m.BitfieldSize > 0 {
			f.BitOffset, f.BitSize = uint8(at%8), uint8(m.BitfieldSize)
			f.Size = (uint64(f.BitOffset) + uint64(f.BitSize) + 7) / 8
			return f, nil
		}
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			return Field{}, err
		}
		f.Size = uint64(size)
		return f, nil
	}
}

// findMember finds a member by its name, also within anonymous members. The offset is in bits. visits is how many members
// it may still look at: types that contain each other twice over make a tree of exponential size.
func findMember(in btf.Type, name string, visits *int) (btf.Member, uint64, bool) {
	list, _ := members(in)
	if name == "" {
		return btf.Member{}, 0, false
	}
	if *visits -= len(list); *visits < 0 {
		return btf.Member{}, 0, false
	}
	for _, m := range list {
		if m.Name == name {
			return m, uint64(m.Offset), true
		}
	}
	for _, m := range list {
		if m.Name != "" {
			continue
		}
		if found, off, ok := findMember(m.Type, name, visits); ok {
			return found, uint64(m.Offset) + off, true
		}
	}
	return btf.Member{}, 0, false
}

// sizeof returns the size of a type.
func (t *types) sizeof(typ string) (uint64, error) {
	found, err := t.named(typ)
	if err != nil {
		return 0, err
	}
	size, hits := 0, 0
	for _, in := range found {
		switch in.(type) {
		case *btf.Var, *btf.Func, *btf.Datasec, *btf.Fwd:
			continue
		}
		n, err := btf.Sizeof(in)
		if err != nil {
			continue
		}
		if hits > 0 && n != size {
			return 0, fmt.Errorf("size of %s: %w", typ, ErrAmbiguous)
		}
		size = n
		hits++
	}
	if hits == 0 {
		return 0, fmt.Errorf("size of %s: %w", typ, ErrNotFound)
	}
	return uint64(size), nil
}

// enum returns the value of an enumerator of an enum, or of any enum without a name if typ is empty.
func (t *types) enum(typ, name string) (int64, error) {
	if typ == "" {
		return t.enumerator(name)
	}
	found, err := t.named(typ)
	if err != nil {
		return 0, err
	}
	for _, in := range found {
		e, ok := btf.UnderlyingType(in).(*btf.Enum)
		if !ok {
			continue
		}
		for _, v := range e.Values {
			if v.Name == name {
				return int64(v.Value), nil
			}
		}
	}
	return 0, fmt.Errorf("enum %s has no %s: %w", typ, name, ErrNotFound)
}

// enumName returns the name of the enumerator of an enum with a value.
func (t *types) enumName(typ string, value int64) (string, error) {
	found, err := t.named(typ)
	if err != nil {
		return "", err
	}
	for _, in := range found {
		if e, ok := btf.UnderlyingType(in).(*btf.Enum); ok {
			for _, v := range e.Values {
				if int64(v.Value) == value {
					return v.Name, nil
				}
			}
		}
	}
	return "", fmt.Errorf("enum %s has no %d: %w", typ, value, ErrNotFound)
}

// enumerator returns the value of an enumerator of an enum without a name.
func (t *types) enumerator(name string) (int64, error) {
	for _, id := range t.anonymous {
		typ, err := t.spec.TypeByID(id)
		if err != nil {
			return 0, fmt.Errorf("enumerator %s: %w", name, err)
		}
		e, ok := typ.(*btf.Enum)
		if !ok {
			continue
		}
		for _, v := range e.Values {
			if v.Name == name {
				return int64(v.Value), nil
			}
		}
	}
	return 0, fmt.Errorf("enumerator %s: %w", name, ErrNotFound)
}
