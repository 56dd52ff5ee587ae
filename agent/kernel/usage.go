package kernel

import (
	"fmt"
	"time"
)

// Usage is one cheap sample of what a host can run out of. Sizes are in bytes. A limit of zero means that this kernel does not
// tell it.
type Usage struct {
	At time.Time `json:"at"` // the reader's clock
	// Forks are the processes and threads ever made, Threads those there are.
	Forks      uint64 `json:"forks"`
	Threads    int    `json:"threads"`
	MaxThreads int    `json:"maxThreads"`
	PIDs       int    `json:"pids"` // numbers in use in the first PID namespace
	MaxPIDs    int    `json:"maxPIDs,omitempty"`
	Files      uint64 `json:"files"` // open files, as exactly as the kernel itself knows: up to 32 for each CPU astray
	MaxFiles   uint64 `json:"maxFiles"`
	Total      uint64 `json:"total"` // memory that the kernel manages
	Free       uint64 `json:"free"`
	// Available is what programs could get without swapping, a little more than /proc/meminfo says: files' pages and
	// reclaimable slab are counted whole.
	Available uint64 `json:"available"`
	Slab      uint64 `json:"slab"` // that cannot be reclaimed
	SwapFree  uint64 `json:"swapFree"`
	// Stalls are the times that somebody had to reclaim memory himself before he got some, OOMKills the victims of the kernel.
	Stalls   uint64 `json:"stalls"`
	OOMKills uint64 `json:"oomKills"`
}

// usagePlan is where these are: fixed places, found once for each Image.
type usagePlan struct {
	err    error
	parts  beatPlan // of which only the parts are used
	fields [usageFields][]beatField
}

// What a sample is made of: sums of one field or of several.
const (
	usageForks = iota
	usageThreads
	usageMaxThreads
	usageTotal
	usageReserve
	usageFree
	usageFilePages
	usageReclaimable
	usageSlab
	usagePIDs
	usageMaxPIDs
	usageKills
	usageStalls
	usageFiles
	usageMaxFiles
	usageSwapFree
	usageFields
)

func (img *Image) usagePlan(src source) *usagePlan {
	p := new(usagePlan)
	r := resolver{img: img}
	type want struct {
		what int
		va   VirtAddr
		size int
	}
	var all []want
	add := func(what int, va VirtAddr, size int) { all = append(all, want{what, va, size}) }
	item := func(typ, name string) VirtAddr {
		n, err := img.types.enum(typ, name)
		if err == nil && (n < 0 || n > 1024) {
			err = &CorruptError{"BTF", 0, fmt.Sprintf("%s is %d", name, n)}
		}
		if err != nil {
			r.fail(err)
		}
		return VirtAddr(8 * n)
	}
	add(usageForks, r.symbol("total_forks"), 8)
	add(usageThreads, r.symbol("nr_threads"), 4)
	add(usageMaxThreads, r.symbol("max_threads"), 4)
	add(usageTotal, r.symbol("_totalram_pages"), 8)
	add(usageReserve, r.symbol("totalreserve_pages"), 8)
	add(usageFree, r.symbol("vm_zone_stat")+item("zone_stat_item", "NR_FREE_PAGES"), 8)
	node := r.symbol("vm_node_stat")
	for _, x := range []struct {
		what int
		enum string
	}{{usageFilePages, "NR_ACTIVE_FILE"}, {usageFilePages, "NR_INACTIVE_FILE"}, {usageReclaimable, "NR_SLAB_RECLAIMABLE_B"}, {usageSlab, "NR_SLAB_UNRECLAIMABLE_B"}} {
		add(x.what, node+item("node_stat_item", x.enum), 8)
	}
	ns := r.symbol("init_pid_ns")
	add(usagePIDs, ns+VirtAddr(r.field("pid_namespace", 4, "pid_allocated")), 4)
	events := r.symbol("vm_event_states")
	kills := item("vm_event_item", "OOM_KILL")
	var stalls []VirtAddr // which there are depends on the zones that the kernel was built with
	for _, zone := range []string{"DMA", "DMA32", "NORMAL", "MOVABLE"} {
		if n, err := img.types.enum("vm_event_item", "ALLOCSTALL_"+zone); err == nil && n >= 0 && n < 1024 {
			stalls = append(stalls, VirtAddr(8*n))
		}
	}
	for _, offset := range img.perCPU {
		if offset == 0 {
			continue
		}
		add(usageKills, events+offset+kills, 8)
		for _, s := range stalls {
			add(usageStalls, events+offset+s, 8)
		}
	}
	if r.err != nil {
		p.err = r.err
		return p
	}
	// What not every kernel has. pid_max moved into the namespace with v6.14 (commit 7863dcc72d0f, "pid: allow pid_max to be
	// set per pid namespace").
	optional := func(what int, size int, va func(*resolver) VirtAddr) {
		o := resolver{img: img}
		if at := va(&o); o.err == nil {
			add(what, at, size)
		}
	}
	pidMax := len(all)
	optional(usageMaxPIDs, 4, func(o *resolver) VirtAddr { return ns + VirtAddr(o.field("pid_namespace", 4, "pid_max")) })
	if len(all) == pidMax {
		optional(usageMaxPIDs, 4, func(o *resolver) VirtAddr { return o.symbol("pid_max") })
	}
	optional(usageFiles, 8, func(o *resolver) VirtAddr {
		return o.symbol("nr_files") + VirtAddr(o.field("percpu_counter", 8, "count"))
	})
	optional(usageMaxFiles, 8, func(o *resolver) VirtAddr {
		return o.symbol("files_stat") + VirtAddr(o.field("files_stat_struct", 8, "max_files"))
	})
	optional(usageSwapFree, 8, func(o *resolver) VirtAddr { return o.symbol("nr_swap_pages") })

	wants := make([]beatWant, len(all))
	to := make([]beatField, len(all))
	for i, w := range all {
		wants[i] = beatWant{w.va, w.size, &to[i]}
	}
	if p.err = p.parts.place(img.space, src, wants); p.err != nil {
		return p
	}
	for i, w := range all {
		p.fields[w.what] = append(p.fields[w.what], to[i])
	}
	return p
}

// Usage takes a sample. It reads past the View's cache.
func (v *View) Usage() (Usage, error) {
	p := v.img.usage
	u := Usage{At: time.Now()}
	if p == nil || p.err != nil {
		err := ErrNotSupported
		if p != nil {
			err = p.err
		}
		return u, fmt.Errorf("read usage: %w", err)
	}
	room := p.parts.room() // not put back after an error: a read may still be under way
	if err := v.readScattered(room.segs); err != nil {
		return u, fmt.Errorf("read usage: %w", err)
	}
	sum := func(what int) uint64 {
		var n uint64
		for _, f := range p.fields[what] {
			n += f.in(room.b)
		}
		return n
	}
	var odd error
	// Counters that are kept for each CPU may be below zero for a moment.
	pages := func(what int) uint64 {
		n := int64(sum(what))
		if n > 1<<44 && odd == nil {
			odd = &CorruptError{"memory statistics", 0, fmt.Sprintf("%d pages", n)}
		}
		return uint64(max(0, n)) * v.img.pageSize
	}
	u.Forks, u.Threads, u.MaxThreads = sum(usageForks), int(int32(sum(usageThreads))), int(int32(sum(usageMaxThreads)))
	u.PIDs, u.MaxPIDs = int(int32(sum(usagePIDs)&0x7fffffff)), int(int32(sum(usageMaxPIDs))) // the highest bit says that numbers are still given
	u.Files, u.MaxFiles = uint64(max(0, int64(sum(usageFiles)))), uint64(max(0, int64(sum(usageMaxFiles))))
	u.Total, u.Free, u.Slab, u.SwapFree = pages(usageTotal), pages(usageFree), pages(usageSlab), pages(usageSwapFree)
	u.Available = u.Free + pages(usageFilePages) + pages(usageReclaimable)
	u.Available = min(u.Available-min(u.Available, pages(usageReserve)), u.Total)
	u.Stalls, u.OOMKills = sum(usageStalls), sum(usageKills)
	if u.Threads < 0 || u.Threads > maxPID || u.MaxThreads < 0 {
		odd = &CorruptError{"nr_threads", 0, fmt.Sprintf("%d of %d threads", u.Threads, u.MaxThreads)}
	}
	p.parts.rooms.Put(room)
	if odd != nil {
		return u, fmt.Errorf("read usage: %w", odd)
	}
	return u, nil
}
