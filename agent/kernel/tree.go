package kernel

import "fmt"

// xarray walks an xarray, radix tree or the tree of an idr (include/linux/xarray.h), whose root structure is at an address, in the
// order of the indexes. Values, which are no pointers, are left out.
func (v *View) xarray(kind string, root VirtAddr, limit int, f func(index uint64, entry VirtAddr) error) error {
	r := resolver{img: v.img}
	head := r.field("xarray", 8, "xa_head")
	node := r.shape("xa_node", "shift", "slots[]")
	if r.err != nil {
		return r.err
	}
	slots := node.fields["slots"].Size / 8
	bits := uint64(0)
	for 1<<bits < slots {
		bits++
	}
	if slots == 0 || 1<<bits != slots || slots > 256 {
		return &CorruptError{"BTF", 0, fmt.Sprintf("xa_node of %d slots", slots)}
	}
	n, nodes := 0, 0
	var walk func(entry VirtAddr, index uint64, shift int64) error
	// shift is what a node must have; -1 of the root.
	walk = func(entry VirtAddr, index uint64, shift int64) error {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		switch {
		case entry == 0 || entry&1 != 0:
			return nil
		case entry&3 != 2 || entry <= 4096: // not a node; of the other internal entries none is an object
			if entry&3 == 2 {
				return nil
			}
			if n++; n > limit {
				return &CorruptError{kind, root, fmt.Sprintf("more than %d", limit)}
			}
			return f(index, entry)
		}
		if nodes++; nodes > 2*limit+64 { // without entries, and so without an end that matters
			return &CorruptError{kind, root, fmt.Sprintf("more than %d nodes", 2*limit+64)}
		}
		t, err := v.thing(node, entry-2)
		if err != nil {
			return err
		}
		at := int64(t.num("shift"))
		if shift >= 0 && at != shift || at > 60 || at%int64(bits) != 0 {
			return t.corrupt("shift %d below one of %d", at, shift+int64(bits))
		}
		for i, b := uint64(0), t.bytes("slots"); i < slots; i++ {
			child := VirtAddr(le64(b[8*i:]))
			if at == 0 && child&3 == 2 && child > 4096 {
				return t.corrupt("a node below the last level")
			}
			if err := walk(child, index|i<<uint(at), at-int64(bits)); err != nil {
				return err
			}
		}
		return nil
	}
	first, err := v.pointer(kind, root+VirtAddr(head))
	if err != nil {
		return err
	}
	return walk(first, 0, -1)
}

// mapleTree walks a maple tree (include/linux/maple_tree.h, since v6.1), whose root structure is at an address: f is called with
// the first and last index of each entry.
func (v *View) mapleTree(kind string, root VirtAddr, limit int, f func(first, last uint64, entry VirtAddr) error) error {
	r := resolver{img: v.img}
	rootField := r.field("maple_tree", 8, "ma_root")
	leaf := r.shape("maple_range_64", "pivot[]", "slot[]")
	arange := r.shape("maple_arange_64", "pivot[]", "slot[]")
	dense := r.shape("maple_node", "slot[]")
	if r.err != nil {
		return r.err
	}
	var kinds [4]int64 // dense, leaf_64, range_64, arange_64
	for i, name := range []string{"maple_dense", "maple_leaf_64", "maple_range_64", "maple_arange_64"} {
		var err error
		if kinds[i], err = v.img.types.enum("maple_type", name); err != nil {
			return fmt.Errorf("%w: %w", ErrNotSupported, err)
		}
	}
	n := 0
	entry := func(first, last uint64, e VirtAddr) error {
		if e == 0 || e&3 == 2 { // nothing, or reserved
			return nil
		}
		if n++; n > limit {
			return &CorruptError{kind, root, fmt.Sprintf("more than %d", limit)}
		}
		return f(first, last, e)
	}
	nodes := 0
	var walk func(encoded VirtAddr, first, last uint64, depth int) error
	walk = func(encoded VirtAddr, first, last uint64, depth int) error {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		if nodes++; depth > 12 || nodes > limit+16 {
			return &CorruptError{kind, root, "tree is too deep, or does not end"}
		}
		at, typ := encoded&^255, int64(encoded>>3&15)
		shape := leaf
		switch typ {
		case kinds[0]:
			shape = dense
		case kinds[3]:
			shape = arange
		case kinds[1], kinds[2]:
		default:
			return &CorruptError{"maple_node", at, fmt.Sprintf("of type %d", typ)}
		}
		t, err := v.thing(shape, at)
		if err != nil {
			return err
		}
		slots, pivots := t.bytes("slot"), t.bytes("pivot")
		for i, from := 0, first; i < len(slots)/8; i++ {
			to := last
			if shape == dense {
				to = from
			} else if i < len(pivots)/8 {
				if p := le64(pivots[8*i:]); p != 0 || i == 0 {
					to = p
				}
			}
			if to < from || to > last {
				return t.corrupt("pivot %#x of %#x to %#x", to, from, last)
			}
			e := VirtAddr(le64(slots[8*i:]))
			if typ == kinds[1] || shape == dense {
				err = entry(from, to, e)
			} else if e != 0 {
				err = walk(e, from, to, depth+1)
			}
			if err != nil {
				return err
			}
			if to == last {
				break
			}
			from = to + 1
		}
		return nil
	}
	top, err := v.pointer(kind, root+VirtAddr(rootField))
	if err != nil {
		return err
	}
	if top&3 == 2 && top > 4096 {
		return walk(top, 0, ^uint64(0), 0)
	}
	return entry(0, 0, top)
}
