package kernel

import (
	"fmt"
	"slices"
	"strings"
)

// Processor is one socket of the host.
type Processor struct {
	Socket  int    `json:"socket"` // the package's number, as /proc/cpuinfo's "physical id"
	Vendor  string `json:"vendor"` // "GenuineIntel"
	Model   string `json:"model"`  // the CPU's own name
	Family  int    `json:"family"`
	Number  int    `json:"number"`  // model number within the family
	Cores   int    `json:"cores"`   // with at least one CPU that has been up
	Threads int    `json:"threads"` // CPUs that have been up
}

const (
	vendorIDLen = 16 // cpuinfo_x86.x86_vendor_id
	modelIDLen  = 64 // cpuinfo_x86.x86_model_id
)

// Processors tells of what the kernel knows about the host's CPUs, by socket.
//
// struct cpuinfo_x86 keeps the topology in a structure of its own since commit 02fb601d27a7 ("x86/cpu: Move phys_proc_id into
// topology info") and e95256335d45 (both in v6.7); before, phys_proc_id and cpu_core_id are its members.
func (v *View) Processors() ([]Processor, error) {
	list, err := v.processors()
	if err != nil {
		return nil, fmt.Errorf("read processors: %w", err)
	}
	return list, nil
}

func (v *View) processors() ([]Processor, error) {
	const kind = "cpuinfo_x86"
	r := resolver{img: v.img}
	var sp span
	number := func(paths ...string) (offset, size uint64) {
		for _, path := range paths {
			if f, err := v.img.types.field(kind, path); err == nil && (f.Size == 2 || f.Size == 4) {
				size = f.Size
			}
		}
		return sp.add(r.field(kind, size, paths...), size), size
	}
	text := func(size uint64, path string) uint64 { return sp.add(r.field(kind, size, path), size) }
	family, model := text(1, "x86"), text(1, "x86_model")
	vendor, name := text(vendorIDLen, "x86_vendor_id"), text(modelIDLen, "x86_model_id")
	pkg, pkgSize := number("topo.pkg_id", "phys_proc_id")
	core, coreSize := number("topo.core_id", "cpu_core_id")
	if r.err == nil && sp.size() > 4096 {
		r.fail(&CorruptError{"BTF", 0, fmt.Sprintf("%s spreads its fields over %d bytes", kind, sp.size())})
	}
	if r.err != nil {
		return nil, r.err
	}
	uint := func(o *object, at, size uint64) int {
		b := o.at(at, size)
		if size == 2 {
			return int(b[0]) | int(b[1])<<8
		}
		return int(le32(b))
	}
	var list []Processor
	cores := make(map[[2]int]bool)
	var o object
	for cpu, offset := range v.img.perCPU {
		if offset == 0 {
			continue // a CPU that cannot be
		}
		at, err := v.img.PerCPU("cpu_info", cpu)
		if err != nil {
			return nil, err
		}
		if err := o.load(v.img.space, v, kind, sp, at); err != nil {
			return nil, err
		}
		p := Processor{Socket: uint(&o, pkg, pkgSize), Family: int(o.at(family, 1)[0]), Number: int(o.at(model, 1)[0])}
		if p.Family == 0 {
			continue // has never been up
		}
		var ends [2]bool
		p.Vendor, ends[0] = cString(o.at(vendor, vendorIDLen))
		p.Model, ends[1] = cString(o.at(name, modelIDLen))
		p.Model = strings.TrimSpace(p.Model)
		if !ends[0] || !ends[1] || p.Socket > 1<<16-1 {
			return nil, &CorruptError{kind, at, fmt.Sprintf("CPU %d in socket %d is %q of %q", cpu, p.Socket, p.Model, p.Vendor)}
		}
		i := slices.IndexFunc(list, func(q Processor) bool { return q.Socket == p.Socket })
		if i < 0 {
			i = len(list)
			list = append(list, p)
		}
		list[i].Threads++
		if key := [2]int{p.Socket, uint(&o, core, coreSize)}; !cores[key] {
			cores[key] = true
			list[i].Cores++
		}
	}
	slices.SortFunc(list, func(a, b Processor) int { return a.Socket - b.Socket })
	return list, nil
}
