package kernel

import (
	"fmt"
	"slices"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// resourceLayout is struct resource, include/linux/ioport.h.
type resourceLayout struct {
	err                               error
	root                              VirtAddr // iomem_resource
	span                              span
	start, end, flags, sibling, child uint64
}

const (
	// IORESOURCE_SYSTEM_RAM is IORESOURCE_MEM | IORESOURCE_SYSRAM, since v4.6.
	resourceSystemRAM = 0x01000200
	maxResources      = 1 << 16
)

func (img *Image) resourceLayout() resourceLayout {
	var l resourceLayout
	r := resolver{img: img}
	l.root = r.symbol("iomem_resource")
	field := func(path string) uint64 { return l.span.add(r.field("resource", 8, path), 8) }
	l.start, l.end, l.flags, l.sibling, l.child = field("start"), field("end"), field("flags"), field("sibling"), field("child")
	if l.span.size() > 4096 {
		r.fail(&CorruptError{"BTF", 0, "resource is implausibly large"})
	}
	l.err = r.err
	return l
}

// systemRAM reads the host's RAM map from the resource tree: what /proc/iomem calls System RAM.
func (img *Image) systemRAM(src source) ([]hostmem.Range, error) {
	l, space := &img.lay.res, img.space
	if l.err != nil {
		return nil, l.err
	}
	type todo struct {
		at         VirtAddr
		start, end uint64 // of the parent
		from       uint64 // where the previous sibling ended
	}
	var ram []hostmem.Range
	var o object
	if err := o.load(space, src, "iomem_resource", l.span, l.root); err != nil {
		return nil, err
	}
	stack := []todo{{o.ptr(l.child), o.u64(l.start), o.u64(l.end), 0}}
	for n := 0; len(stack) > 0; {
		t := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if t.at == 0 {
			continue
		}
		if n++; n > maxResources {
			return nil, &CorruptError{"resource", t.at, fmt.Sprintf("more than %d resources", maxResources)}
		}
		if !space.valid(t.at, 8) {
			return nil, &CorruptError{"resource", t.at, "not an address of the kernel"}
		}
		if err := o.load(space, src, "resource", l.span, t.at); err != nil {
			return nil, err
		}
		start, end := o.u64(l.start), o.u64(l.end)
		if end < start || end>>56 != 0 || start < t.start || end > t.end || start < t.from {
			return nil, &CorruptError{"resource", t.at, fmt.Sprintf("%#x-%#x in %#x-%#x after %#x", start, end, t.start, t.end, t.from)}
		}
		stack = append(stack, todo{o.ptr(l.sibling), t.start, t.end, end})
		if o.u64(l.flags)&resourceSystemRAM == resourceSystemRAM {
			ram = append(ram, hostmem.Range{Start: hostmem.PhysAddr(start), Size: end - start + 1})
		} else {
			stack = append(stack, todo{o.ptr(l.child), start, end, 0})
		}
	}
	if len(ram) == 0 {
		return nil, &CorruptError{"iomem_resource", l.root, "no System RAM"}
	}
	slices.SortFunc(ram, func(a, b hostmem.Range) int {
		if a.Start < b.Start {
			return -1
		}
		return 1
	})
	return ram, nil
}
