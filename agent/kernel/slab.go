package kernel

import (
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// SlabCache is a cache of objects of one kind (struct kmem_cache, mm/slab.h).
type SlabCache struct {
	Addr       VirtAddr `json:"addr"`
	Name       string   `json:"name"`
	ObjectSize uint64   `json:"objectSize"` // bytes, of what is asked for
	Size       uint64   `json:"size"`       // bytes, of what that takes
	PerSlab    uint64   `json:"perSlab"`    // objects
	Slabs      uint64   `json:"slabs"`
	Objects    uint64   `json:"objects"` // places for objects in all slabs
	// Bytes is what all slabs take.
	Bytes uint64 `json:"bytes"`
}

const (
	maxSlabCaches = 1 << 14
	maxNodes      = 1 << 10 // of NUMA; MAX_NUMNODES of any distribution
)

// SlabCaches lists the slab caches of the SLUB allocator.
func (v *View) SlabCaches() iter.Seq2[SlabCache, error] {
	return settled(v, "walk slab caches", func() ([]SlabCache, error) {
		r := resolver{img: v.img}
		head := r.symbol("slab_caches")
		cache := r.shape("kmem_cache", "list[]", "name", "object_size", "size", "oo.x")
		// An array of pointers; in v7.0 and later of structures that hold them.
		stride, offset := uint64(8), uint64(0)
		places, err := v.img.types.field("kmem_cache", "node")
		if err != nil {
			if places, err = v.img.types.field("kmem_cache", "per_node"); err != nil {
				r.fail(err)
			}
			stride, offset = r.size("kmem_cache_per_node_ptrs"), r.field("kmem_cache_per_node_ptrs", 8, "node")
		}
		node := r.shape("kmem_cache_node", "nr_slabs.counter", "total_objects.counter")
		if r.err != nil {
			return nil, r.err
		}
		nodes, err := v.nodes()
		if err != nil {
			return nil, err
		}
		var all []SlabCache
		err = v.list("kmem_cache", head, cache.offset("list"), maxSlabCaches, func(at VirtAddr) error {
			t, err := v.thing(cache, at)
			if err != nil {
				return err
			}
			// Since v2.6.27 oo is the order of a slab and its number of objects (OO_SHIFT is 16).
			c := SlabCache{Addr: at, ObjectSize: t.num("object_size"), Size: t.num("size"), PerSlab: t.num("oo.x") & 0xffff}
			order := t.num("oo.x") >> 16
			if order > 16 || c.Size == 0 || c.Size > 1<<31 {
				return t.corrupt("slabs of 2^%d pages, objects of %d bytes", order, c.Size)
			}
			if c.Name, err = v.cstring("kmem_cache", t.ptr("name"), 256); err != nil {
				return err
			}
			for i := range nodes { // of node[] there is as much as there are nodes, which is less than its type says
				p, err := v.pointer("kmem_cache", t.addr()+VirtAddr(places.Offset+stride*uint64(i)+offset))
				if err != nil {
					return err
				}
				if p == 0 {
					continue
				}
				n, err := v.thing(node, p)
				if err != nil {
					return err
				}
				c.Slabs += n.num("nr_slabs.counter")
				c.Objects += n.num("total_objects.counter")
			}
			if c.Slabs > 1<<40 || c.Objects > 1<<44 {
				return t.corrupt("%d slabs with %d objects", c.Slabs, c.Objects)
			}
			c.Bytes = c.Slabs << order * v.img.pageSize
			all = append(all, c)
			return nil
		})
		return all, err
	})
}

// nodes returns how many NUMA nodes are possible.
func (v *View) nodes() (int, error) {
	va, err := v.img.syms.symbol("nr_node_ids")
	if errors.Is(err, ErrNotFound) {
		return 1, nil // built without NUMA
	}
	if err != nil {
		return 0, err
	}
	n, err := v.Uint32(va)
	if err == nil && (n == 0 || n > maxNodes) {
		err = &CorruptError{"nr_node_ids", va, fmt.Sprintf("is %d", n)}
	}
	return int(n), err
}

// pageOf returns where the struct page of a physical address is.
func (v *View) pageOf(pa hostmem.PhysAddr) (VirtAddr, error) {
	r := resolver{img: v.img}
	size := r.size("page")
	if r.err != nil {
		return 0, r.err
	}
	note, pageSize := v.img.note, v.img.pageSize
	at := VirtAddr(uint64(pa) / pageSize * size)
	if base, ok := note.symbol("vmemmap"); ok { // of the page frame 0, since v6.9
		return base + at, nil
	}
	if start, ok := note.number("VMEMMAP_START"); ok { // arm64: of the page frame at PHYS_OFFSET
		first, _ := note.number("PHYS_OFFSET")
		return VirtAddr(start) - VirtAddr(first/int64(pageSize)*int64(size)) + at, nil
	}
	base := r.symbol("vmemmap_base")
	if r.err != nil {
		return 0, r.err
	}
	start, err := v.pointer("vmemmap_base", base)
	return start + at, err
}

// allocated returns how many bytes kmalloc set aside for the object at va, as the slab that it is in tells.
func (v *View) allocated(va VirtAddr) (uint64, error) {
	c, _, err := v.slabOf(va)
	if err != nil {
		return 0, err
	}
	name, err := v.cstring("kmem_cache", c.ptr("name"), 64)
	if err != nil {
		return 0, err
	}
	if !strings.HasPrefix(name, "kmalloc-") {
		return 0, fmt.Errorf("object at %v is in slab cache %q: %w", va, name, ErrNotFound)
	}
	return c.num("object_size"), nil
}

// slabOf returns the slab cache that the object at va is of, and where its slab begins; it is ErrNotFound if it is in none.
func (v *View) slabOf(va VirtAddr) (cache thing, start VirtAddr, err error) {
	r := resolver{img: v.img}
	size := r.size("page")
	page := r.shape("page", "compound_head|compound_info", "page_type?")
	typ := "slab" // its own type since v5.17
	if _, err := v.img.types.sizeof(typ); err != nil {
		typ = "page"
	}
	slab := r.shape(typ, "slab_cache")
	of := r.shape("kmem_cache", "name", "object_size", "size")
	if r.err != nil {
		return thing{}, 0, r.err
	}
	pa, err := v.Phys(va)
	if err != nil {
		return thing{}, 0, err
	}
	first, err := v.pageOf(0)
	if err != nil {
		return thing{}, 0, err
	}
	at, err := v.pageOf(pa)
	if err != nil {
		return thing{}, 0, err
	}
	p, err := v.thing(page, at)
	if err != nil {
		return thing{}, 0, err
	}
	// A tail page has an odd number: that of its head, plus one; or, since v7.0, a mask that leaves the head's address of
	// its own. A head is before its tail, and no mask is.
	if head := p.ptr("compound_head"); head&1 != 0 {
		if head-1 < at {
			at = head - 1
		} else {
			at &= head - 1
		}
	}
	s, err := v.thing(slab, at)
	if err != nil {
		return thing{}, 0, err
	}
	if c := s.ptr("slab_cache"); !v.img.space.valid(c, 8) {
		return thing{}, 0, fmt.Errorf("object at %v is in no slab: %w", va, ErrNotFound)
	}
	if cache, err = v.thing(of, s.ptr("slab_cache")); err != nil {
		return thing{}, 0, err
	}
	direct := v.img.space.linear[len(v.img.space.linear)-1]
	return cache, direct.start + VirtAddr(uint64(at-first)/size*v.img.pageSize) - VirtAddr(direct.pa), nil
}

// slabObject returns what slab cache va is in, and where in its object.
func (v *View) slabObject(va VirtAddr) (name string, offset uint64, err error) {
	cache, start, err := v.slabOf(va)
	if err != nil {
		return "", 0, err
	}
	n := cache.num("size")
	if n == 0 || va < start {
		return "", 0, cache.corrupt("objects of %d bytes at %v", n, start)
	}
	name, err = v.cstring("kmem_cache", cache.ptr("name"), 64)
	return name, uint64(va-start) % n, err
}
