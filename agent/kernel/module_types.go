package kernel

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// maxModuleBTF bounds the BTF of a module, and thereby what its types take beside the kernel's.
const maxModuleBTF = 4 << 20

// ModuleField finds a member of a type that a module defines, or of one of the kernel's: ModuleField("virtio_net",
// "virtnet_info", "vdev"). It reads the BTF of the module and, again, that of the kernel: some 5 MiB.
func (v *View) ModuleField(module, typ, path string) (Field, error) {
	t, err := v.moduleTypes(module)
	if err != nil {
		return Field{}, fmt.Errorf("types of module %s: %w", module, err)
	}
	return t.field(typ, path)
}

// moduleTypes returns the types of a module, with the kernel's, which they build on: the numbers of its types and the offsets of
// its strings go on where the kernel's end (split BTF, Documentation/bpf/btf.rst). The kernel keeps what it has parsed in a list,
// btf_modules, since v5.11 (commit 36e68442d1af, "bpf: Load and verify kernel module BTFs").
func (v *View) moduleTypes(module string) (*types, error) {
	if v.img.elsewhere {
		return nil, fmt.Errorf("%w: they build on the kernel's own, which cannot be used", ErrNotSupported)
	}
	split, err := v.moduleBTF(module)
	if err != nil {
		return nil, err
	}
	start, err1 := v.img.syms.symbol("__start_BTF")
	if err1 != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotSupported, err1)
	}
	base := make([]byte, v.img.types.size)
	const piece = 1 << 20 // between looks at the context
	for at := 0; at < len(base); at += piece {
		if err := v.ctx.Err(); err != nil {
			return nil, err
		}
		if err := v.img.space.object(fresh{v}, "BTF", start+VirtAddr(at), base[at:min(at+piece, len(base))]); err != nil {
			return nil, err
		}
	}
	joined, err := joinBTF(base, split.raw, split.strings)
	if err != nil {
		return nil, &CorruptError{"BTF", split.at, err.Error()}
	}
	t, err := newTypes(joined)
	if err != nil {
		return nil, &CorruptError{"BTF", split.at, err.Error()}
	}
	return t, nil
}

// moduleBTF is the BTF of a module as the kernel keeps it (struct btf, kernel/bpf/btf.c).
type moduleBTF struct {
	at      VirtAddr
	raw     []byte
	strings uint64 // where its strings begin, behind the kernel's
}

func (v *View) moduleBTF(module string) (moduleBTF, error) {
	r := resolver{img: v.img}
	head := r.symbol("btf_modules")
	entry := r.shape("btf_module", "list[]", "module", "btf")
	parsed := r.shape("btf", "data", "data_size", "start_str_off", "base_btf")
	name := r.field("module", 0, "name")
	if r.err != nil {
		return moduleBTF{}, r.err
	}
	var found moduleBTF
	err := v.list("btf_module", head, entry.offset("list"), maxModules, func(at VirtAddr) error {
		e, err := v.thing(entry, at)
		if err != nil || found.raw != nil {
			return err
		}
		is, err := v.cstring("module", e.ptr("module")+VirtAddr(name), 64)
		if err != nil || is != module {
			return err
		}
		b, err := v.thing(parsed, e.ptr("btf"))
		if err != nil {
			return err
		}
		n := b.num("data_size")
		if n < btfHeaderLen || n > maxModuleBTF || b.ptr("base_btf") == 0 {
			return b.corrupt("BTF of %d bytes for module %s, base %v", n, module, b.ptr("base_btf"))
		}
		found = moduleBTF{at: b.ptr("data"), raw: make([]byte, n), strings: b.num("start_str_off")}
		return v.img.space.object(v, "BTF", found.at, found.raw)
	})
	if err == nil && found.raw == nil {
		err = fmt.Errorf("BTF of module %s: %w", module, ErrNotFound)
	}
	return found, err
}

// joinBTF makes one BTF of a base and of a split one, whose strings begin at the given offset.
func joinBTF(base, split []byte, strings uint64) ([]byte, error) {
	section := func(b []byte, what string) (typ, str []byte, err error) {
		if len(b) < btfHeaderLen || le16(b) != 0xeb9f || b[2] != 1 {
			return nil, nil, fmt.Errorf("%s has no BTF header", what)
		}
		header := uint64(le32(b[4:]))
		cut := func(off, n uint64) ([]byte, error) {
			if header < btfHeaderLen || header+off+n > uint64(len(b)) {
				return nil, fmt.Errorf("%s of %d bytes has a section of %d at %d", what, len(b), n, header+off)
			}
			return b[header+off:][:n], nil
		}
		if typ, err = cut(uint64(le32(b[8:])), uint64(le32(b[12:]))); err != nil {
			return nil, nil, err
		}
		str, err = cut(uint64(le32(b[16:])), uint64(le32(b[20:])))
		return typ, str, err
	}
	bt, bs, err := section(base, "the kernel's BTF")
	if err != nil {
		return nil, err
	}
	st, ss, err := section(split, "the module's BTF")
	if err != nil {
		return nil, err
	}
	if uint64(len(bs)) != strings {
		return nil, fmt.Errorf("its strings begin at %d, the kernel's end at %d", strings, len(bs))
	}
	joined := slices.Concat(base[:8], make([]byte, btfHeaderLen-8), bt, st, bs, ss)
	binary.LittleEndian.PutUint32(joined[4:], btfHeaderLen)
	binary.LittleEndian.PutUint32(joined[12:], uint32(len(bt)+len(st)))
	binary.LittleEndian.PutUint32(joined[16:], uint32(len(bt)+len(st)))
	binary.LittleEndian.PutUint32(joined[20:], uint32(len(bs)+len(ss)))
	return joined, nil
}
