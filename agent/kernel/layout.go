package kernel

import (
	"errors"
	"fmt"
)

// layout is where the fields are that this package itself reads, found once per Image. A group whose fields are missing is
// nil or says why; what needs it fails with ErrNotSupported.
type layout struct {
	text, end VirtAddr // _text and _end: the kernel image

	task   taskLayout
	ahead  aheadLayout
	ring   ringLayout
	keeper keeperLayout
	res    resourceLayout
}

// resolver finds fields and symbols and remembers the first that is missing.
type resolver struct {
	img *Image
	err error
}

func (r *resolver) fail(err error) {
	if r.err == nil {
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrAmbiguous) {
			err = fmt.Errorf("%w: %w", ErrNotSupported, err)
		}
		r.err = err
	}
}

// field returns the offset of the first of paths that typ has, which must be of one of the sizes. In the layout of a sane
// kernel no object that is read here is larger than 1 MiB.
func (r *resolver) field(typ string, size uint64, paths ...string) uint64 {
	var err error
	for _, path := range paths {
		var f Field
		if f, err = r.img.types.field(typ, path); err != nil {
			continue
		}
		if size != 0 && f.Size != size || f.BitSize != 0 {
			err = &CorruptError{"BTF", 0, fmt.Sprintf("%s.%s is of %d bytes, not %d", typ, path, f.Size, size)}
			continue
		}
		if f.Offset > 1<<20 {
			err = &CorruptError{"BTF", 0, fmt.Sprintf("%s.%s is at offset %d", typ, path, f.Offset)}
			continue
		}
		return f.Offset
	}
	r.fail(err)
	return 0
}

// size returns the size of a type.
func (r *resolver) size(typ string) uint64 {
	n, err := r.img.types.sizeof(typ)
	if err == nil && (n == 0 || n > 1<<20) {
		err = &CorruptError{"BTF", 0, fmt.Sprintf("%s is of %d bytes", typ, n)}
	}
	if err != nil {
		r.fail(err)
		return 0
	}
	return n
}

// symbol returns the address of the first of names that exists.
func (r *resolver) symbol(names ...string) VirtAddr {
	var err error
	for _, name := range names {
		var va VirtAddr
		if va, err = r.img.syms.symbol(name); err == nil {
			return va
		}
	}
	r.fail(err)
	return 0
}

// feature returns the address of a variable of something that a kernel may be built without; ok is false if it is. Of a kernel that
// lists no variables (see datasym.go) nobody can say so: ErrNotSupported.
func (v *View) feature(symbol string) (at VirtAddr, ok bool, err error) {
	at, err = v.img.syms.symbol(symbol)
	if !errors.Is(err, ErrNotFound) {
		return at, err == nil, err
	}
	if len(v.img.syms.find("init_task")) == 0 {
		return 0, false, fmt.Errorf("%w: the kernel does not list its variables: %w", ErrNotSupported, err)
	}
	return 0, false, nil
}

// span is the part of an object that holds all fields of interest, read in one go.
type span struct{ lo, hi uint64 }

// add widens the span by a field, of which it returns the offset.
func (s *span) add(offset, size uint64) uint64 {
	if s.hi == 0 {
		s.lo = offset
	}
	s.lo, s.hi = min(s.lo, offset), max(s.hi, offset+size)
	return offset
}

func (s *span) size() uint64 { return s.hi - s.lo }

// object is a span of an object that was read.
type object struct {
	span
	addr VirtAddr
	b    []byte // for reading only: own, or of a page of a View
	own  []byte
}

func (o *object) at(offset uint64, n uint64) []byte { return o.b[offset-o.lo:][:n] }
func (o *object) u32(offset uint64) uint32          { return le32(o.at(offset, 4)) }
func (o *object) u64(offset uint64) uint64          { return le64(o.at(offset, 8)) }
func (o *object) ptr(offset uint64) VirtAddr        { return VirtAddr(o.u64(offset)) }

// load reads the span of the object at addr.
func (o *object) load(s *addressSpace, src source, kind string, sp span, addr VirtAddr) error {
	o.span, o.addr = sp, addr
	n, at := sp.size(), addr+VirtAddr(sp.lo)
	if v, ok := src.(*View); ok {
		if o.b = v.peekVirt(at, n); o.b != nil {
			return nil
		}
	}
	if uint64(cap(o.own)) < n {
		o.own = make([]byte, n)
	}
	o.b = o.own[:n]
	return s.object(src, kind, at, o.b)
}
