package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"strings"
)

// shape is where the fields of a structure are that are read together, by their paths.
type shape struct {
	typ string
	span
	fields map[string]Field
}

const (
	maxShape = 64 << 10 // bytes over which the fields of a structure may spread
	// maxAttempts is how often a listing is begun anew when the host changed it meanwhile.
	maxAttempts = 4
)

// shape finds fields of a structure. A path is that of a number or pointer of 1, 2, 4 or 8 bytes or of a bit field; with
// "[]" behind it, of anything. With "?" at its end the field may be missing; "a|b" is the first that exists, called a.
// What was found is kept: some walks ask each time that they look.
func (r *resolver) shape(typ string, paths ...string) *shape {
	key := typ + " " + strings.Join(paths, " ")
	if s, ok := r.img.shapes.Load(key); ok {
		return s.(*shape)
	}
	s := r.findShape(typ, paths)
	if r.err == nil {
		r.img.shapes.Store(key, s)
	}
	return s
}

func (r *resolver) findShape(typ string, paths []string) *shape {
	s := &shape{typ: typ, fields: make(map[string]Field, len(paths))}
	for _, path := range paths {
		path, optional := strings.CutSuffix(path, "?")
		path, whole := strings.CutSuffix(path, "[]")
		alternatives := strings.Split(path, "|")
		var f Field
		var err error
		for _, name := range alternatives {
			if f, err = r.img.types.field(typ, name); err == nil {
				break
			}
		}
		if err != nil {
			if !optional {
				r.fail(err)
			}
			continue
		}
		scalar := f.BitSize != 0 && f.Size <= 8 || f.Size == 1 || f.Size == 2 || f.Size == 4 || f.Size == 8
		if !scalar && !whole || f.Size == 0 && !whole || f.Offset+f.Size > 1<<20 || f.Size > maxShape {
			r.fail(&CorruptError{"BTF", 0, fmt.Sprintf("%s.%s is %+v", typ, path, f)})
			continue
		}
		s.add(f.Offset, f.Size)
		s.fields[alternatives[0]] = f
	}
	if s.size() > maxShape {
		r.fail(&CorruptError{"BTF", 0, fmt.Sprintf("%s spreads its fields over %d bytes", typ, s.size())})
	}
	return s
}

// offset returns where a field is; the shape must have it.
func (s *shape) offset(path string) uint64 { return s.fields[path].Offset }

// thing is an object of a shape that was read.
type thing struct {
	*shape
	o object
}

// thing reads the object at addr, in one piece. All fields of one that cannot be read are zero.
func (v *View) thing(s *shape, addr VirtAddr) (thing, error) {
	t := thing{shape: s}
	var err error
	if v.img.space.valid(addr, 1) {
		err = t.o.load(v.img.space, v, s.typ, s.span, addr)
	} else {
		err = &CorruptError{s.typ, addr, "not an address of the kernel"}
	}
	if err != nil {
		t.o = object{span: s.span, addr: addr, b: make([]byte, s.size())}
		return t, err
	}
	v.note(func(c *Confidence) { c.Objects++ })
	return t, nil
}

func (t *thing) addr() VirtAddr { return t.o.addr }

// bytes returns a field as it is in memory, nil if it is missing.
func (t *thing) bytes(path string) []byte {
	f, ok := t.fields[path]
	if !ok {
		return nil
	}
	return t.o.at(f.Offset, f.Size)
}

// num returns a field as an unsigned number, zero if it is missing.
func (t *thing) num(path string) uint64 {
	f := t.fields[path]
	b := t.bytes(path)
	var n uint64
	for i := min(len(b), 8) - 1; i >= 0; i-- {
		n = n<<8 | uint64(b[i])
	}
	if f.BitSize != 0 {
		n = n >> f.BitOffset & (1<<f.BitSize - 1)
	}
	return n
}

// int returns a field of 4 bytes as a signed number.
func (t *thing) int(path string) int { return int(int32(t.num(path))) }

func (t *thing) ptr(path string) VirtAddr { return VirtAddr(t.num(path)) }

// ipv4 returns a __be32.
func (t *thing) ipv4(path string) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.LittleEndian.AppendUint32(nil, uint32(t.num(path)))))
}

// ipv6 returns a struct in6_addr, or the unspecified address if the field is not of 16 bytes.
func (t *thing) ipv6(path string) netip.Addr {
	b := t.bytes(path)
	if len(b) != 16 {
		return netip.IPv6Unspecified()
	}
	return netip.AddrFrom16([16]byte(b))
}

// at returns the address of a field.
func (t *thing) at(path string) VirtAddr { return t.o.addr + VirtAddr(t.offset(path)) }

// text returns a field of characters.
func (t *thing) text(path string) string {
	s, _ := cString(t.bytes(path))
	return s
}

func (t *thing) corrupt(format string, args ...any) error {
	return &CorruptError{t.typ, t.o.addr, fmt.Sprintf(format, args...)}
}

// lowerName makes an enumerator readable: REQ_OP_WRITE_ZEROES is write-zeroes.
func lowerName(name, prefix string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, prefix)), "_", "-")
}

// cstring reads a string of at most limit bytes.
func (v *View) cstring(kind string, va VirtAddr, limit int) (string, error) {
	if !v.img.space.valid(va, 1) {
		return "", &CorruptError{kind, va, "not an address of the kernel"}
	}
	b := make([]byte, 0, 64)
	for len(b) < limit {
		n := min(64-int(va+VirtAddr(len(b)))&63, limit-len(b)) // never beyond the page of what was asked for
		part := make([]byte, n)
		if err := v.img.space.object(v, kind, va+VirtAddr(len(b)), part); err != nil {
			return "", err
		}
		b = append(b, part...)
		if s, ended := cString(b); ended {
			return s, nil
		}
	}
	return "", &CorruptError{kind, va, fmt.Sprintf("text does not end within %d bytes", limit)}
}

// pointers reads n pointers.
func (v *View) pointers(kind string, va VirtAddr, n int) ([]VirtAddr, error) {
	if !v.img.space.valid(va, 8) {
		return nil, &CorruptError{kind, va, "not an address of the kernel"}
	}
	b := make([]byte, 8*n)
	if err := v.img.space.object(v, kind, va, b); err != nil {
		return nil, err
	}
	p := make([]VirtAddr, n)
	for i := range p {
		p[i] = VirtAddr(le64(b[8*i:]))
	}
	return p, nil
}

// pointer reads a pointer, which may be nil.
func (v *View) pointer(kind string, va VirtAddr) (VirtAddr, error) {
	if !v.img.space.valid(va, 8) {
		return 0, &CorruptError{kind, va, "not an address of the kernel"}
	}
	p, err := v.img.space.word64(v, kind, va)
	return VirtAddr(p), err
}

// node reads a list_head: both of its pointers.
func (v *View) node(kind string, va VirtAddr) (next, prev VirtAddr, err error) {
	if b := v.peekVirt(va, 16); b != nil && v.img.space.valid(va, 8) {
		return VirtAddr(le64(b)), VirtAddr(le64(b[8:])), nil
	}
	p, err := v.pointers(kind, va, 2)
	if err != nil {
		return 0, 0, err
	}
	return p[0], p[1], nil
}

// list walks a list_head (include/linux/list.h): f is called with the address of each object, in which the node is at
// offset. The way back must agree with the way there, and the walk ends at the head, within limit objects.
func (v *View) list(kind string, head VirtAddr, offset uint64, limit int, f func(VirtAddr) error) error {
	next, last, err := v.node(kind, head)
	if err != nil {
		return err
	}
	prev := head
	for n, at := 0, next; ; n++ {
		if at == head {
			if last != prev {
				return &CorruptError{kind, head, fmt.Sprintf("list ends with %v, its head says %v", prev, last)}
			}
			v.note(func(c *Confidence) { c.Lists++ })
			return nil
		}
		if n == limit {
			return &CorruptError{kind, head, fmt.Sprintf("list of more than %d", limit)}
		}
		if err := v.ctx.Err(); err != nil {
			return err
		}
		next, back, err := v.node(kind, at)
		if err != nil {
			return err
		}
		if back != prev {
			return &CorruptError{kind, at, fmt.Sprintf("node after %v points back to %v", prev, back)}
		}
		if err := f(at - VirtAddr(offset)); err != nil {
			return err
		}
		prev, at = at, next
	}
}

// hlist walks the chain of a hash bucket from its first node on: hlist_node, or hlist_nulls_node, whose end is an odd number.
func (v *View) hlist(kind string, first VirtAddr, offset uint64, limit int, f func(VirtAddr) error) error {
	for n, at := 0, first; at != 0 && at&1 == 0; n++ {
		if n == limit {
			return &CorruptError{kind, first, fmt.Sprintf("chain of more than %d", limit)}
		}
		if err := v.ctx.Err(); err != nil {
			return err
		}
		next, err := v.pointer(kind, at)
		if err != nil {
			return err
		}
		if err := f(at - VirtAddr(offset)); err != nil {
			return err
		}
		at = next
	}
	return nil
}

// rbtree walks an rb_root (include/linux/rbtree_types.h) in order.
func (v *View) rbtree(kind string, root VirtAddr, offset uint64, limit int, f func(VirtAddr) error) error {
	r := resolver{img: v.img}
	node := r.shape("rb_node", "rb_right", "rb_left")
	if r.err != nil {
		return r.err
	}
	at, err := v.pointer(kind, root)
	if err != nil {
		return err
	}
	type pending struct{ at, right VirtAddr }
	var stack []pending
	for n := 0; at != 0 || len(stack) > 0; {
		if at != 0 {
			// Deeper than any balanced tree of limit nodes: a cycle.
			if len(stack) > 64 {
				return &CorruptError{kind, at, "tree is too deep"}
			}
			t, err := v.thing(node, at)
			if err != nil {
				return err
			}
			stack = append(stack, pending{at, t.ptr("rb_right")})
			at = t.ptr("rb_left")
			continue
		}
		if n++; n > limit {
			return &CorruptError{kind, root, fmt.Sprintf("tree of more than %d", limit)}
		}
		if err := v.ctx.Err(); err != nil {
			return err
		}
		top := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if err := f(top.at - VirtAddr(offset)); err != nil {
			return err
		}
		at = top.right
	}
	return nil
}

// settled makes a sequence of a listing that is gathered as a whole: when it breaks an invariant, it is gathered anew, as the
// host may have changed it meanwhile. What breaks in the same way twice is broken; the part before it is handed out, too.
func settled[T any](v *View, doing string, gather func() ([]T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		all, err := settle(v, gather)
		for _, t := range all {
			if !yield(t, nil) {
				return
			}
		}
		if err != nil {
			var zero T
			yield(zero, fmt.Errorf("%s: %w", doing, err))
		}
	}
}

func settle[T any](v *View, gather func() (T, error)) (T, error) {
	var last *CorruptError
	for attempt := 1; ; attempt++ {
		all, err := gather()
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) {
			return all, err
		}
		if last != nil && *last == *corrupt {
			v.note(func(c *Confidence) { c.Broken++ })
			return all, err
		}
		if attempt == maxAttempts {
			v.note(func(c *Confidence) { c.Broken++ })
			return all, fmt.Errorf("%w: %w", ErrTorn, corrupt)
		}
		last = corrupt
		v.forget()
	}
}
