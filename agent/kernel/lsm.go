package kernel

import (
	"iter"

	"github.com/cilium/ebpf/btf"
)

// LSMHooks lists what the security modules have called at the hooks of the kernel (include/linux/lsm_hooks.h): each a Probe of kind
// "lsm", whose place is "module:hook". Until v6.11 each hook has a list; since commit 417c5643cd67 ("lsm: replace indirect LSM hook
// calls with static calls") (in v6.12) a row of a table.
func (v *View) LSMHooks() iter.Seq2[Probe, error] {
	return settled(v, "walk LSM hooks", func() ([]Probe, error) {
		w := lsmWalk{v: v}
		r := resolver{img: v.img}
		w.hook = r.shape("security_hook_list", "list[]?", "hook", "lsm?", "lsmid?")
		if r.err != nil {
			return nil, r.err
		}
		if at, err := v.img.syms.symbol("security_hook_heads"); err == nil {
			err := w.lists(at)
			return w.all, err
		}
		table := r.symbol("static_calls_table")
		if r.err != nil {
			return nil, r.err
		}
		err := w.calls(table)
		return w.all, err
	})
}

type lsmWalk struct {
	v    *View
	hook *shape
	all  []Probe
}

// each calls f for the members of a structure: their names, offsets and sizes.
func (w *lsmWalk) each(typ string, f func(name string, offset, size uint64) error) error {
	found, err := w.v.img.types.named(typ)
	if err != nil {
		return err
	}
	for _, t := range found {
		list, ok := members(t)
		if !ok {
			continue
		}
		for _, m := range list {
			size, err := btf.Sizeof(m.Type)
			if err != nil || size <= 0 || m.Offset.Bytes() > 1<<20 || size > 1<<16 {
				return &CorruptError{"BTF", 0, typ + "." + m.Name + " is implausible"}
			}
			if err := f(m.Name, uint64(m.Offset.Bytes()), uint64(size)); err != nil {
				return err
			}
		}
		return nil
	}
	return ErrNotFound
}

func (w *lsmWalk) lists(heads VirtAddr) error {
	return w.each("security_hook_heads", func(name string, offset, size uint64) error {
		first, err := w.v.pointer("security_hook_heads", heads+VirtAddr(offset))
		if err != nil {
			return err
		}
		return w.v.hlist("security_hook_list", first, w.hook.offset("list"), maxProbes-len(w.all), func(at VirtAddr) error {
			return w.add(name, at)
		})
	})
}

func (w *lsmWalk) calls(table VirtAddr) error {
	r := resolver{img: w.v.img}
	call := r.shape("lsm_static_call", "hl")
	each := r.size("lsm_static_call")
	if r.err != nil {
		return r.err
	}
	return w.each("lsm_static_calls_table", func(name string, offset, size uint64) error {
		for i := uint64(0); i+each <= size; i += each {
			t, err := w.v.thing(call, table+VirtAddr(offset+i))
			if err != nil {
				return err
			}
			if at := t.ptr("hl"); at != 0 {
				if err := w.add(name, at); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func (w *lsmWalk) add(hook string, at VirtAddr) error {
	t, err := w.v.thing(w.hook, at)
	if err != nil {
		return err
	}
	function, err := w.v.function(t.ptr("hook"))
	if err != nil {
		return err
	}
	name := t.ptr("lsm")
	if id := t.ptr("lsmid"); id != 0 {
		// struct lsm_id begins with the name (include/linux/lsm_hooks.h).
		if name, err = w.v.pointer("lsm_id", id); err != nil {
			return err
		}
	}
	module := ""
	if name != 0 {
		if module, err = w.v.cstring("lsm_id", name, 64); err != nil {
			return err
		}
	}
	if len(w.all) == maxProbes {
		return t.corrupt("more than %d hooks", maxProbes)
	}
	w.all = append(w.all, Probe{Addr: at, Kind: "lsm", Place: module + ":" + hook, Function: function})
	return nil
}
