package kernel

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// Value is an object of the kernel as its BTF describes it.
type Value struct {
	Name   string `json:"name,omitempty"` // of the member; [3] of an array's element
	Type   string `json:"type"`
	Offset uint64 `json:"offset"` // bytes from the start of the whole
	// Text is the value of what has no parts: a number, the name of an enumerator, a pointer with the symbol that it points
	// to, the text of an array of characters.
	Text  string  `json:"text,omitempty"`
	Parts []Value `json:"parts,omitempty"`
}

const (
	maxPrinted  = 1 << 18 // bytes of an object
	maxParts    = 1 << 14 // of a value, at all depths
	maxElements = 64      // of an array that are told
)

// Print reads the object of a type at an address. The type is one of BTF's: "task_struct", "struct list_head", "pid_t", or one
// that a module defines: "virtio_net:virtnet_info". What pointers point to is not told: their types are not kept.
func (v *View) Print(typ string, addr VirtAddr) (Value, error) {
	for _, word := range []string{"struct ", "union ", "enum "} {
		typ = strings.TrimPrefix(typ, word)
	}
	val, err := v.print(typ, addr)
	if err != nil {
		return Value{}, fmt.Errorf("print %s at %v: %w", typ, addr, err)
	}
	return val, nil
}

func (v *View) print(typ string, addr VirtAddr) (Value, error) {
	types := v.img.types
	if module, name, ok := strings.Cut(typ, ":"); ok {
		var err error
		if types, err = v.moduleTypes(module); err != nil {
			return Value{}, err
		}
		typ = name
	}
	found, err := types.named(typ)
	if err != nil {
		return Value{}, err
	}
	var of btf.Type
	for _, t := range found {
		switch t.(type) {
		case *btf.Var, *btf.Func, *btf.Datasec, *btf.Fwd:
			continue
		}
		if of != nil {
			if a, b := typeShape(of), typeShape(t); a != b {
				return Value{}, fmt.Errorf("type %q: %w", typ, ErrAmbiguous)
			}
			continue
		}
		of = t
	}
	if of == nil {
		return Value{}, fmt.Errorf("type %q: %w", typ, ErrNotFound)
	}
	size, err := btf.Sizeof(of)
	if err != nil {
		return Value{}, err
	}
	if size <= 0 || size > maxPrinted {
		return Value{}, fmt.Errorf("%d bytes: %w", size, ErrNotSupported)
	}
	b := make([]byte, size)
	if err := v.ReadVirt(addr, b); err != nil {
		return Value{}, err
	}
	p := printing{v: v, b: b}
	val := Value{Type: typeName(of)}
	if err := p.value(&val, of, 0); err != nil {
		return Value{}, err
	}
	return val, nil
}

// typeShape tells types of the same name apart, as far as a reader of their members would.
func typeShape(t btf.Type) string {
	size, _ := btf.Sizeof(t)
	list, _ := members(t)
	s := fmt.Sprintf("%T %d", t, size)
	for _, m := range list {
		s += fmt.Sprintf(" %s %d", m.Name, m.Offset)
	}
	return s
}

type printing struct {
	v     *View
	b     []byte
	parts int
}

var errTooManyParts = errors.New("too many parts")

// value fills in what an object of a type holds; bits is where it is.
func (p *printing) value(val *Value, t btf.Type, bits uint64) error {
	if p.parts++; p.parts > maxParts {
		return fmt.Errorf("%w: %w", errTooManyParts, ErrNotSupported)
	}
	val.Offset = bits / 8
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		return p.members(val, t.Members, bits)
	case *btf.Union:
		return p.members(val, t.Members, bits)
	case *btf.Array:
		return p.array(val, t, bits)
	case *btf.Pointer:
		n, ok := p.number(bits, 64)
		if !ok {
			break
		}
		va := VirtAddr(n)
		if val.Text = va.String(); n == 0 {
			val.Text = "NULL"
		} else if name, offset, err := p.v.img.SymbolAt(va); err == nil && offset < 1<<12 {
			val.Text += " " + name
			if offset > 0 {
				val.Text += fmt.Sprintf("+%#x", offset)
			}
		}
	case *btf.Enum:
		n, ok := p.number(bits, 8*uint64(t.Size))
		if !ok {
			break
		}
		val.Text = strconv.FormatInt(signed(n, uint64(t.Size)*8), 10)
		for _, e := range t.Values {
			if e.Value&(1<<(8*uint64(t.Size)-1)<<1-1) == n {
				val.Text = e.Name
				break
			}
		}
	case *btf.Int:
		p.integer(val, t, bits, 8*uint64(t.Size))
	default:
		val.Text = "?"
	}
	return nil
}

func (p *printing) integer(val *Value, t *btf.Int, bits, size uint64) {
	n, ok := p.number(bits, size)
	switch {
	case !ok && t.Size == 16: // __int128
		if uint64(len(p.b)) >= bits/8+16 {
			val.Text = fmt.Sprintf("%#x%016x", le64(p.b[bits/8+8:]), le64(p.b[bits/8:]))
		}
	case t.Encoding == btf.Signed:
		val.Text = strconv.FormatInt(signed(n, size), 10)
	case t.Encoding == btf.Bool:
		val.Text = strconv.FormatBool(n != 0)
	case n > 1<<32:
		val.Text = fmt.Sprintf("%#x", n)
	default:
		val.Text = strconv.FormatUint(n, 10)
	}
}

func signed(n, bits uint64) int64 {
	if bits == 0 || bits >= 64 {
		return int64(n)
	}
	return int64(n<<(64-bits)) >> (64 - bits)
}

// number reads size bits at an offset in bits.
func (p *printing) number(at, size uint64) (uint64, bool) {
	first, last := at/8, (at+size+7)/8
	if size == 0 || size > 64 || last > uint64(len(p.b)) || last-first > 8 {
		return 0, false
	}
	var n uint64
	for i := last; i > first; i-- {
		n = n<<8 | uint64(p.b[i-1])
	}
	n >>= at % 8
	if size < 64 {
		n &= 1<<size - 1
	}
	return n, true
}

func (p *printing) members(val *Value, list []btf.Member, bits uint64) error {
	for _, m := range list {
		part := Value{Name: m.Name, Type: typeName(m.Type)}
		at := bits + uint64(m.Offset)
		if m.BitfieldSize > 0 {
			if p.parts++; p.parts > maxParts {
				return fmt.Errorf("%w: %w", errTooManyParts, ErrNotSupported)
			}
			part.Offset = at / 8
			if i, ok := btf.UnderlyingType(m.Type).(*btf.Int); ok {
				p.integer(&part, i, at, uint64(m.BitfieldSize))
			} else if n, ok := p.number(at, uint64(m.BitfieldSize)); ok {
				part.Text = strconv.FormatUint(n, 10)
			}
		} else if err := p.value(&part, m.Type, at); err != nil {
			return err
		}
		val.Parts = append(val.Parts, part)
	}
	return nil
}

func (p *printing) array(val *Value, t *btf.Array, bits uint64) error {
	size, err := btf.Sizeof(t.Type)
	if err != nil || size == 0 || t.Nelems == 0 {
		val.Text = "[]"
		return nil
	}
	from := bits / 8
	if i, ok := btf.UnderlyingType(t.Type).(*btf.Int); ok && size == 1 && (i.Encoding == btf.Char || i.Name == "char") {
		if end := from + uint64(t.Nelems); end <= uint64(len(p.b)) {
			s, _ := cString(p.b[from:end])
			val.Text = strconv.Quote(s)
		}
		return nil
	}
	for i := range min(uint64(t.Nelems), maxElements) {
		part := Value{Name: fmt.Sprintf("[%d]", i), Type: typeName(t.Type)}
		if err := p.value(&part, t.Type, bits+8*i*uint64(size)); err != nil {
			return err
		}
		val.Parts = append(val.Parts, part)
	}
	if t.Nelems > maxElements {
		val.Text = fmt.Sprintf("the first %d of %d", maxElements, t.Nelems)
	}
	return nil
}

// typeName writes a type as C does, as far as it is known.
func typeName(t btf.Type) string {
	for range btfMaxDepth {
		switch x := t.(type) {
		case *btf.Struct:
			return strings.TrimSpace("struct " + x.Name)
		case *btf.Union:
			return strings.TrimSpace("union " + x.Name)
		case *btf.Enum:
			return strings.TrimSpace("enum " + x.Name)
		case *btf.Array:
			return fmt.Sprintf("%s[%d]", typeName(x.Type), x.Nelems)
		case *btf.Pointer:
			return "*"
		case *btf.Const:
			t = x.Type
		case *btf.Volatile:
			t = x.Type
		case *btf.Restrict:
			t = x.Type
		case *btf.TypeTag:
			t = x.Type
		default:
			return t.TypeName()
		}
	}
	return "?"
}

// Locate names what is at an address of code or of static data: a symbol of the kernel, or of a module.
func (v *View) Locate(va VirtAddr) (Frame, error) {
	f, err := settle(v, func() (Frame, error) { return v.frame(va) })
	if err == nil && f.Symbol == "" && f.Module == "" {
		err = fmt.Errorf("symbol at %v: %w", va, ErrNotFound)
	}
	return f, err
}
