package kernel

import (
	"errors"
	"fmt"
)

// MemoryUse is what the host's memory is used for, in bytes, and what its counters say.
type MemoryUse struct {
	Total     uint64 `json:"total"` // that the kernel manages: MemTotal of /proc/meminfo
	Free      uint64 `json:"free"`
	Available uint64 `json:"available"` // that programs could get without swapping: si_mem_available of mm/page_alloc.c
	Anonymous uint64 `json:"anonymous"`
	PageCache uint64 `json:"pageCache"` // of files, with buffers and shared memory
	Shared    uint64 `json:"shared"`    // tmpfs and shared memory
	Dirty     uint64 `json:"dirty"`
	Slab      uint64 `json:"slab"`
	Stacks    uint64 `json:"stacks"` // of the kernel
	Tables    uint64 `json:"tables"` // page tables
	SwapTotal uint64 `json:"swapTotal"`
	SwapFree  uint64 `json:"swapFree"`
	PageSize  uint64 `json:"pageSize"`
	// SwapUnknown says that the kernel can swap, and that its total could not be found: both figures are zero then.
	SwapUnknown bool `json:"swapUnknown,omitempty"`

	Zones []Zone       `json:"zones"`
	Nodes []MemoryNode `json:"nodes"`
	// Pressure is nil if the kernel does not account for stalls.
	Pressure *Pressure `json:"pressure,omitempty"`
	// Counters are those of /proc/vmstat, by its names, but in pages where huge pages are counted there, and without those of
	// NUMA and of thresholds.
	Counters Counters `json:"counters"`
}

// Counters are in the kernel's order.
type Counters []Counter

// Counter is one counter by its name.
type Counter struct {
	Name  string `json:"name"`
	Value uint64 `json:"value"`
}

// Get returns the value of a counter; ok is false if the kernel has none of that name.
func (c Counters) Get(name string) (value uint64, ok bool) {
	for i := range c {
		if c[i].Name == name {
			return c[i].Value, true
		}
	}
	return 0, false
}

// Zone is a zone of a node's memory (struct zone, include/linux/mmzone.h), in bytes.
type Zone struct {
	Node    int    `json:"node"`
	Name    string `json:"name"`
	Present uint64 `json:"present"`
	Managed uint64 `json:"managed"`
	Free    uint64 `json:"free"`
	Min     uint64 `json:"min"`
	Low     uint64 `json:"low"`
	High    uint64 `json:"high"`
	// Buddies is how many free blocks there are of 1, 2, 4, … pages.
	Buddies []uint64 `json:"buddies"`
}

// MemoryNode is a node of the machine's memory (struct pglist_data, include/linux/mmzone.h) and its part of the counters, by the names of
// /sys/devices/system/node/nodeN/vmstat; those of events are kept for the whole machine alone.
type MemoryNode struct {
	Node     int      `json:"node"`
	Counters Counters `json:"counters"`
}

// Pressure is how long tasks have waited for something (PSI, kernel/sched/psi.c). The averages are of when the kernel last
// made them: it does so every two seconds while something waits.
type Pressure struct {
	CPU    Stall `json:"cpu"`
	IO     Stall `json:"io"`
	Memory Stall `json:"memory"`
}

// Stall is the time in which some task, or all tasks at once, waited.
type Stall struct {
	Some StallTime `json:"some"`
	Full StallTime `json:"full"`
}

// StallTime is in percent of the last 10, 60 and 300 seconds, and in nanoseconds since boot.
type StallTime struct {
	Avg10  float64 `json:"avg10"`
	Avg60  float64 `json:"avg60"`
	Avg300 float64 `json:"avg300"`
	Total  uint64  `json:"total"`
}

// fixedOne is 1 in the fixed point of averages: FIXED_1 of include/linux/sched/loadavg.h.
const fixedOne = 1 << 11

type memoryWalk struct {
	v   *View
	r   resolver
	use MemoryUse

	zoneItems, nodeItems, events int
	zoneStat, nodeStat           VirtAddr
	eventStates                  VirtAddr
	vmstatText                   VirtAddr
	reserved                     uint64   // pages
	names                        []string // of the zones' counters and of the nodes'
}

// MemoryUse tells what the host's memory is used for.
func (v *View) MemoryUse() (MemoryUse, error) {
	use, err := settle(v, func() (MemoryUse, error) {
		w := memoryWalk{v: v, r: resolver{img: v.img}}
		err := w.run()
		return w.use, err
	})
	if err != nil {
		return MemoryUse{}, fmt.Errorf("read use of memory: %w", err)
	}
	return use, nil
}

// items returns how many enumerators an enum has, as its last says.
func (w *memoryWalk) items(typ, last string) int {
	n, err := w.v.img.types.enum(typ, last)
	if err == nil && (n <= 0 || n > 1024) {
		err = &CorruptError{"BTF", 0, fmt.Sprintf("%s is %d", last, n)}
	}
	if err != nil {
		w.r.fail(err)
		return 0
	}
	return int(n)
}

func (w *memoryWalk) run() error {
	r := &w.r
	w.zoneItems = w.items("zone_stat_item", "NR_VM_ZONE_STAT_ITEMS")
	w.nodeItems = w.items("node_stat_item", "NR_VM_NODE_STAT_ITEMS")
	w.events = w.items("vm_event_item", "NR_VM_EVENT_ITEMS")
	w.zoneStat, w.nodeStat = r.symbol("vm_zone_stat"), r.symbol("vm_node_stat")
	w.eventStates, w.vmstatText = r.symbol("vm_event_states"), r.symbol("vmstat_text")
	total := r.symbol("_totalram_pages")
	if r.err != nil {
		return r.err
	}
	if err := w.counters(); err != nil {
		return err
	}
	if err := w.zones(); err != nil {
		return err
	}
	page := w.v.img.pageSize
	number := func(va VirtAddr) (uint64, error) {
		n, err := w.v.Uint64(va)
		if err == nil && n > 1<<52 {
			err = &CorruptError{"memory", va, fmt.Sprintf("%d pages", n)}
		}
		return n, err
	}
	u := &w.use
	n, err := number(total)
	if err != nil {
		return err
	}
	u.Total, u.PageSize = n*page, page
	c := make(map[string]uint64, len(u.Counters))
	for _, x := range u.Counters {
		c[x.Name] = x.Value
	}
	u.Free, u.Anonymous, u.PageCache = c["nr_free_pages"]*page, c["nr_anon_pages"]*page, c["nr_file_pages"]*page
	u.Shared, u.Dirty, u.Stacks, u.Tables = c["nr_shmem"]*page, c["nr_dirty"]*page, c["nr_kernel_stack"]<<10, c["nr_page_table_pages"]*page
	u.Slab = (c["nr_slab_reclaimable"] + c["nr_slab_unreclaimable"]) * page
	var low uint64
	for _, z := range u.Zones {
		low += z.Low
	}
	half := func(n uint64) uint64 { return n - min(n/2, low) }
	files := (c["nr_active_file"] + c["nr_inactive_file"]) * page
	reclaimable := (c["nr_slab_reclaimable"] + c["nr_kernel_misc_reclaimable"]) * page
	u.Available = u.Free + half(files) + half(reclaimable)
	u.Available -= min(u.Available, w.reserved*page)

	swap := resolver{img: w.v.img}
	free, size := swap.symbol("nr_swap_pages"), swap.symbol("total_swap_pages")
	if swap.err == nil { // built with swap
		if n, err = number(free); err != nil {
			return err
		}
		u.SwapFree = n * page
		if n, err = number(size); err != nil {
			return err
		}
		u.SwapTotal = n * page
	} else if _, err := w.v.img.syms.symbol("swapper_spaces"); err == nil || w.v.img.lacking {
		u.SwapUnknown = true
	}
	u.Pressure, err = w.v.pressure()
	return err
}

// counters reads the statistics that the kernel keeps for the whole machine. Each CPU holds back a few pages of its own.
func (w *memoryWalk) counters() error {
	numa := w.optional("numa_stat_item", "NR_VM_NUMA_EVENT_ITEMS") + w.optional("numa_stat_item", "NR_VM_NUMA_STAT_ITEMS")
	// Thresholds stand between the nodes' items and the events; how many depends on the release, but the first event is known.
	names, err := w.v.pointers("vmstat_text", w.vmstatText, w.zoneItems+numa+w.nodeItems+8)
	if err != nil {
		return err
	}
	first := 0
	name := make(map[int]string)
	for i, p := range names {
		if p == 0 {
			break
		}
		if name[i], err = w.v.cstring("vmstat_text", p, 64); err != nil {
			return err
		}
		if name[i] == "pgpgin" && i >= w.zoneItems+numa+w.nodeItems {
			first = i
			break
		}
	}
	if name[0] != "nr_free_pages" || first == 0 {
		return fmt.Errorf("names of %d counters begin with %q: %w", len(name), name[0], ErrNotSupported)
	}
	u := &w.use
	read := func(va VirtAddr, n, from int) error {
		values, err := w.v.pointers("vm_stat", va, n)
		for i, value := range values {
			w.names = append(w.names, name[from+i])
			u.Counters = append(u.Counters, Counter{name[from+i], notNegative(value)})
		}
		return err
	}
	if err := read(w.zoneStat, w.zoneItems, 0); err != nil {
		return err
	}
	if err := read(w.nodeStat, w.nodeItems, w.zoneItems+numa); err != nil {
		return err
	}
	events, err := w.v.pointers("vmstat_text", w.vmstatText+VirtAddr(8*first), w.events)
	if err != nil {
		return err
	}
	sums := make([]uint64, w.events)
	for _, offset := range w.v.img.perCPU {
		if offset == 0 {
			continue
		}
		values, err := w.v.pointers("vm_event_states", w.eventStates+offset, w.events)
		if err != nil {
			return err
		}
		for i := range sums {
			sums[i] += uint64(values[i])
		}
	}
	for i, p := range events {
		n, err := w.v.cstring("vmstat_text", p, 64)
		if err != nil {
			return err
		}
		u.Counters = append(u.Counters, Counter{n, sums[i]})
	}
	return nil
}

// notNegative is a counter's value; it may be below zero for a moment, as the kernel itself knows.
func notNegative[T ~uint64](n T) uint64 { return uint64(max(0, int64(n))) }

func (w *memoryWalk) optional(typ, name string) int {
	n, err := w.v.img.types.enum(typ, name)
	if err != nil || n < 0 || n > 64 {
		return 0
	}
	return int(n)
}

func (w *memoryWalk) zones() error {
	v, r := w.v, &w.r
	id, zones, first := r.field("pglist_data", 4, "node_id"), r.field("pglist_data", 4, "nr_zones"), r.field("pglist_data", 0, "node_zones")
	stat := r.field("pglist_data", 8*uint64(w.nodeItems), "vm_stat")
	zone := r.shape("zone", "name", "managed_pages.counter", "present_pages", "_watermark[]", "free_area[]", "vm_stat[]", "watermark_boost?")
	zoneSize, areaSize := r.size("zone"), r.size("free_area")
	free := r.field("free_area", 8, "nr_free")
	reserved := r.field("pglist_data", 8, "totalreserve_pages") // of which the sum is the variable of that name
	if r.err != nil {
		return r.err
	}
	var nodes []VirtAddr
	if va, err := v.img.syms.symbol("contig_page_data"); err == nil {
		nodes = []VirtAddr{va}
	} else {
		n, err := v.nodes()
		if err != nil {
			return err
		}
		if nodes, err = v.pointers("node_data", r.symbol("node_data"), n); err != nil {
			return errors.Join(err, r.err)
		}
	}
	page := v.img.pageSize
	for _, at := range nodes {
		if at == 0 {
			continue
		}
		if !v.img.space.valid(at, 8) {
			return &CorruptError{"pglist_data", at, "not an address of the kernel"}
		}
		node, err := v.Uint32(at + VirtAddr(id))
		if err != nil {
			return err
		}
		count, err := v.Uint32(at + VirtAddr(zones))
		if err != nil {
			return err
		}
		kept, err := v.Uint64(at + VirtAddr(reserved))
		if err != nil {
			return err
		}
		if count > 16 || node > maxNodes || kept > 1<<40 {
			return &CorruptError{"pglist_data", at, fmt.Sprintf("node %d of %d zones, %d pages in reserve", node, count, kept)}
		}
		w.reserved += kept
		sums := make([]uint64, w.zoneItems)
		for i := range count {
			t, err := v.thing(zone, at+VirtAddr(first+uint64(i)*zoneSize))
			if err != nil {
				return err
			}
			z := Zone{Node: int(node), Present: t.num("present_pages") * page, Managed: t.num("managed_pages.counter") * page}
			if z.Present == 0 {
				continue
			}
			if z.Present > 1<<56 || z.Managed > z.Present {
				return t.corrupt("%d of %d bytes are managed", z.Managed, z.Present)
			}
			if z.Name, err = v.cstring("zone", t.ptr("name"), 32); err != nil {
				return err
			}
			marks, areas := t.bytes("_watermark"), t.bytes("free_area")
			if len(marks) < 24 || areaSize < free+8 {
				return t.corrupt("%d bytes of watermarks, free areas of %d", len(marks), areaSize)
			}
			boost := t.num("watermark_boost")
			z.Min, z.Low, z.High = (le64(marks)+boost)*page, (le64(marks[8:])+boost)*page, (le64(marks[16:])+boost)*page
			items := t.bytes("vm_stat")
			if len(items) != 8*len(sums) {
				return t.corrupt("%d bytes of counters", len(items))
			}
			for i := range sums {
				sums[i] += le64(items[8*i:])
			}
			z.Free = notNegative(le64(items)) * page // NR_FREE_PAGES is the first
			for ; uint64(len(areas)) >= areaSize; areas = areas[areaSize:] {
				z.Buddies = append(z.Buddies, le64(areas[free:]))
			}
			w.use.Zones = append(w.use.Zones, z)
		}
		own, err := v.pointers("pglist_data", at+VirtAddr(stat), w.nodeItems)
		if err != nil {
			return err
		}
		for _, n := range own {
			sums = append(sums, uint64(n))
		}
		m := MemoryNode{Node: int(node)}
		for i, name := range w.names {
			m.Counters = append(m.Counters, Counter{name, notNegative(sums[i])})
		}
		w.use.Nodes = append(w.use.Nodes, m)
	}
	return nil
}

// Pressure reads the kernel's account of stalls; nil if it keeps none.
func (v *View) Pressure() (*Pressure, error) {
	p, err := settle(v, v.pressure)
	if err != nil {
		return nil, fmt.Errorf("read pressure: %w", err)
	}
	return p, nil
}

// pressure reads psi_system; nil if there is none or it is switched off.
func (v *View) pressure() (*Pressure, error) {
	r := resolver{img: v.img}
	at := r.symbol("psi_system")
	s := r.shape("psi_group", "avg[]", "total[]", "enabled?")
	disabled, err := v.img.syms.symbol("psi_disabled")
	if err != nil && s.fields["enabled"].Size != 1 { // it is set where PSI is started; since v6.1
		r.fail(err)
	}
	key := VirtAddr(r.field("static_key", 4, "enabled.counter"))
	item := func(name string) int {
		n, err := v.img.types.enum("psi_states", name)
		if err != nil {
			return -1
		}
		return int(n)
	}
	var p Pressure
	states := []struct {
		item int
		to   *StallTime
	}{{item("PSI_IO_SOME"), &p.IO.Some}, {item("PSI_IO_FULL"), &p.IO.Full}, {item("PSI_MEM_SOME"), &p.Memory.Some},
		{item("PSI_MEM_FULL"), &p.Memory.Full}, {item("PSI_CPU_SOME"), &p.CPU.Some}, {item("PSI_CPU_FULL"), &p.CPU.Full}}
	if r.err != nil {
		return nil, nil
	}
	if disabled != 0 {
		if off, err := v.Uint32(disabled + key); err != nil || off != 0 {
			return nil, err
		}
	}
	t, err := v.thing(s, at)
	if err != nil || disabled == 0 && t.num("enabled") == 0 {
		return nil, err
	}
	avg, total := t.bytes("avg"), t.bytes("total")
	for _, x := range states {
		if x.item < 0 {
			continue // PSI_CPU_FULL is since v5.13
		}
		if 24*x.item+24 > len(avg) || 8*x.item+8 > len(total) {
			return nil, t.corrupt("has no state %d", x.item)
		}
		a := avg[24*x.item:]
		x.to.Avg10, x.to.Avg60, x.to.Avg300 = fixed(le64(a)), fixed(le64(a[8:])), fixed(le64(a[16:]))
		x.to.Total = le64(total[8*x.item:]) // of PSI_AVGS, the first aggregator
	}
	return &p, nil
}

func fixed(n uint64) float64 { return float64(n) / fixedOne }
