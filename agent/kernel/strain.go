package kernel

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Store is something of a fixed size that fills: a file system in memory, a table.
type Store struct {
	Key   string `json:"key"`  // tmpfs 0:24, conntrack, tcp-memory
	What  string `json:"what"` // for people
	Used  uint64 `json:"used"`
	Limit uint64 `json:"limit"`
	Bytes bool   `json:"bytes,omitempty"` // it is counted in bytes, else in entries
}

const (
	maxSupers = 1 << 16
	maxStores = 4096
)

// Stores lists what fills: the memory of TCP (tcp_memory_allocated), the connections that are tracked in the host's own network namespace
// (nf_conntrack), each tmpfs that has a limit (struct shmem_sb_info, include/linux/shmem_fs.h). Those file systems are left out that users have mounted in
// user namespaces of their own, as anybody may, as many as he likes. What a kernel does not have, or does not tell, is left out. Counters that each CPU keeps a part of are taken without these parts: some tens of entries for each CPU.
func (v *View) Stores() iter.Seq2[Store, error] {
	return settled(v, "list stores", func() ([]Store, error) {
		var all []Store
		for _, of := range []func() ([]Store, error){v.tcpMemory, v.conntrack, v.tmpfs} {
			some, err := of()
			if err != nil && !tolerable(err) && !errors.Is(err, ErrNotFound) {
				return all, err
			}
			all = append(all, some...)
		}
		return all, nil
	})
}

// maxPercpu is the most that a counter of pages or entries may say.
const maxPercpu = 1 << 44

func (v *View) tmpfs() ([]Store, error) {
	r := resolver{img: v.img}
	head, users := r.symbol("super_blocks"), r.symbol("init_user_ns")
	super := r.shape("super_block", "s_list[]", "s_type", "s_fs_info", "s_dev", "s_user_ns")
	typ := r.shape("file_system_type", "name")
	info := r.shape("shmem_sb_info", "max_blocks", "used_blocks.count")
	if r.err != nil {
		return nil, r.err
	}
	names := make(map[VirtAddr]string) // by file_system_type
	var all []Store
	err := v.list("super_block", head, super.offset("s_list"), maxSupers, func(at VirtAddr) error {
		t, err := v.thing(super, at)
		if err != nil {
			return err
		}
		name, ok := names[t.ptr("s_type")]
		if !ok {
			f, err := v.thing(typ, t.ptr("s_type"))
			if err != nil {
				return err
			}
			if name, err = v.cstring("file_system_type", f.ptr("name"), 64); err != nil {
				return err
			}
			names[t.ptr("s_type")] = name
		}
		if name != "tmpfs" || t.ptr("s_fs_info") == 0 || t.ptr("s_user_ns") != users || len(all) == maxStores {
			return nil
		}
		s, err := v.thing(info, t.ptr("s_fs_info"))
		if err != nil {
			return err
		}
		used, limit := max(0, int64(s.num("used_blocks.count"))), s.num("max_blocks")
		if limit == 0 || limit > maxPercpu { // without a limit
			return nil
		}
		if used > maxPercpu {
			return s.corrupt("%d blocks are used", used)
		}
		dev := t.num("s_dev") // MKDEV of include/linux/kdev_t.h
		id := fmt.Sprintf("%d:%d", dev>>20, dev&(1<<20-1))
		all = append(all, Store{Key: "tmpfs " + id, What: "tmpfs " + id, Used: uint64(used) * v.img.pageSize, Limit: limit * v.img.pageSize, Bytes: true})
		return nil
	})
	return all, err
}

func (v *View) tcpMemory() ([]Store, error) {
	r := resolver{img: v.img}
	used, limits := r.symbol("tcp_memory_allocated"), r.symbol("sysctl_tcp_mem")
	if r.err != nil {
		return nil, r.err
	}
	var b [8]byte
	if err := v.img.space.object(v, "tcp_memory_allocated", used, b[:]); err != nil {
		return nil, err
	}
	n := max(0, int64(le64(b[:])))
	if err := v.img.space.object(v, "sysctl_tcp_mem", limits+16, b[:]); err != nil { // min, pressure, max
		return nil, err
	}
	limit := le64(b[:])
	if n > maxPercpu {
		return nil, &CorruptError{"tcp_memory_allocated", used, fmt.Sprintf("%d pages", n)}
	}
	if limit == 0 || limit > maxPercpu {
		return nil, nil
	}
	return []Store{{Key: "tcp-memory", What: "memory for TCP's sockets", Used: uint64(n) * v.img.pageSize, Limit: limit * v.img.pageSize, Bytes: true}}, nil
}

// conntrackPlan is where a host's module nf_conntrack keeps what it counts.
type conntrackPlan struct {
	sync.Mutex
	module    VirtAddr // for which the rest was found
	limit, id VirtAddr // nf_conntrack_max, nf_conntrack_net_id
	count     uint64   // in nf_conntrack_net
	gen       uint64   // in net
	notTold   error
}

// conntrack counts what the module nf_conntrack tracks: since v5.13 the count is in struct
// nf_conntrack_net, which a namespace has behind an index (net_generic, include/net/netns/generic.h).
// Kernels before are not told of.
func (v *View) conntrack() ([]Store, error) {
	modules, err := v.modulesBriefly()
	if err != nil {
		return nil, err
	}
	var module Module
	for _, m := range modules {
		if m.Name == "nf_conntrack" && m.State == "live" {
			module = m
		}
	}
	if module.Addr == 0 {
		return nil, nil // it is not loaded, or built in
	}
	p := &v.img.conntrack
	p.Lock()
	defer p.Unlock()
	if p.module != module.Addr {
		p.module = module.Addr
		if p.notTold = v.planConntrack(p, module); p.notTold != nil && !errors.Is(p.notTold, ErrNotSupported) && !errors.Is(p.notTold, ErrNotFound) {
			p.module = 0 // it may be told another time
		}
	}
	if p.notTold != nil {
		return nil, p.notTold
	}
	var b [8]byte
	read := func(kind string, at VirtAddr, n int) (uint64, error) {
		clear(b[:])
		if !v.img.space.valid(at, uint64(n)) {
			return 0, &CorruptError{kind, at, "not an address of the kernel"}
		}
		err := v.img.space.object(v, kind, at, b[:n])
		return le64(b[:]), err
	}
	limit, err := read("nf_conntrack_max", p.limit, 4)
	if err != nil {
		return nil, err
	}
	id, err := read("nf_conntrack_net_id", p.id, 4)
	if err != nil {
		return nil, err
	}
	if id > 1<<12 {
		return nil, &CorruptError{"nf_conntrack_net_id", p.id, fmt.Sprintf("is %d", id)}
	}
	used := uint64(0)
	err = v.eachNetns(func(net VirtAddr, _ uint64, init bool) error {
		if !init { // each has the whole limit, and a table of its own
			return nil
		}
		gen, err := read("net", net+VirtAddr(p.gen), 8)
		if err != nil {
			return err
		}
		own, err := read("net_generic", VirtAddr(gen)+VirtAddr(8*id), 8)
		if err != nil || own == 0 {
			return err
		}
		n, err := read("nf_conntrack_net", VirtAddr(own)+VirtAddr(p.count), 4)
		if err == nil && n > 1<<31 {
			err = &CorruptError{"nf_conntrack_net", VirtAddr(own), fmt.Sprintf("tracks %d connections", n)}
		}
		used = n
		return err
	})
	if err != nil || limit == 0 {
		return nil, err
	}
	return []Store{{Key: "conntrack", What: "tracked connections", Used: used, Limit: limit}}, nil
}

func (v *View) planConntrack(p *conntrackPlan, m Module) error {
	var err error
	for name, to := range map[string]*VirtAddr{"nf_conntrack_max": &p.limit, "nf_conntrack_net_id": &p.id} {
		if *to, err = v.moduleVariable(m, name); err != nil {
			return err
		}
	}
	f, err := v.ModuleField("nf_conntrack", "nf_conntrack_net", "count")
	if err == nil && f.Size != 4 {
		err = &CorruptError{"BTF", 0, fmt.Sprintf("nf_conntrack_net.count is %+v", f)}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	p.count = f.Offset
	// ptr[] of struct net_generic is in a union with its head, its index counts from the start of that.
	r := resolver{img: v.img}
	p.gen = r.field("net", 8, "gen")
	return r.err
}

// ModuleSymbol returns where a variable of a loaded module is. ErrNotFound means that it is not loaded, or has none of that name.
func (v *View) ModuleSymbol(module, name string) (VirtAddr, error) {
	for m, err := range v.Modules() {
		if err != nil {
			return 0, err
		}
		if m.Name == module && m.State == "live" {
			return v.moduleVariable(m, name)
		}
	}
	return 0, fmt.Errorf("module %s: %w", module, ErrNotFound)
}

// moduleVariable returns where a variable of a module is, by its table of symbols, in which a kernel built with KALLSYMS_ALL keeps these.
func (v *View) moduleVariable(m Module, name string) (VirtAddr, error) {
	r := resolver{img: v.img}
	module := r.shape("module", "kallsyms")
	s := r.shape("mod_kallsyms", "symtab", "num_symtab", "strtab")
	if r.err != nil {
		return 0, r.err
	}
	t, err := v.thing(module, m.Addr)
	if err != nil {
		return 0, err
	}
	k, err := v.thing(s, t.ptr("kallsyms"))
	if err != nil {
		return 0, err
	}
	n := k.num("num_symtab")
	if n > maxModuleSym {
		return 0, k.corrupt("%d symbols", n)
	}
	const size = 24 // Elf64_Sym
	b := make([]byte, n*size)
	if err := v.img.space.object(v, "symtab", k.ptr("symtab"), b); err != nil {
		return 0, err
	}
	for ; len(b) > 0; b = b[size:] {
		at, str := VirtAddr(le64(b[8:])), le32(b)
		if le16(b[6:]) == 0 || str == 0 || str > 1<<26 || !slices.ContainsFunc(m.ranges, func(r virtRange) bool { return at >= r.start && at < r.end }) {
			continue
		}
		if text, err := v.cstring("strtab", k.ptr("strtab")+VirtAddr(str), 512); err == nil && text == name {
			return at, nil
		}
	}
	return 0, fmt.Errorf("variable %s of module %s: %w", name, m.Name, ErrNotFound)
}

// Link is what a kernel counts of the cable of a network interface.
type Link struct {
	Name  string `json:"name"`
	Index int    `json:"index"`
	Downs uint32 `json:"downs"` // net_device.carrier_down_count: how often it was lost since the interface was made
}

// Links lists the interfaces of the host's own network namespace that are hardware's, or a virtual machine's: they have a parent.
func (v *View) Links() iter.Seq2[Link, error] {
	return settled(v, "walk links", func() ([]Link, error) {
		r := resolver{img: v.img}
		devices := r.field("net", 16, "dev_base_head")
		net := r.symbol("init_net")
		dev := r.shape("net_device", "dev_list[]", "name[]", "ifindex", "carrier_down_count", "dev.parent")
		if r.err != nil {
			return nil, r.err
		}
		var all []Link
		err := v.list("net_device", net+VirtAddr(devices), dev.offset("dev_list"), maxInterfaces, func(at VirtAddr) error {
			t, err := v.thing(dev, at)
			if err == nil && t.ptr("dev.parent") != 0 {
				all = append(all, Link{Name: t.text("name"), Index: t.int("ifindex"), Downs: uint32(t.num("carrier_down_count"))})
			}
			return err
		})
		return all, err
	})
}

// BootWall returns what the host's wall clock said, or by what it is set to now would have said, when it booted, in ns since 1970: it changes only
// when the clock is set.
func (v *View) BootWall() (int64, error) {
	t, err := v.img.times(fresh{v})
	if err != nil {
		return 0, fmt.Errorf("read the wall clock: %w", err)
	}
	return t.boot, nil
}

// LogAfter returns the records of the printk ring that are younger than seq, oldest first, at most the newest so many, and the sequence
// number of the newest record there is, zero if none can be read. In one start of a kernel that never goes back, but by the one record that the
// kernel may be adding to.
func (v *View) LogAfter(seq uint64, most int) (records []LogRecord, newest uint64, err error) {
	records, newest, err = v.logAfter(seq, most)
	if err != nil {
		err = fmt.Errorf("walk printk ring backwards: %w", err)
	}
	return records, newest, err
}

func (v *View) logAfter(seq uint64, most int) (all []LogRecord, newest uint64, err error) {
	l, space := &v.img.lay.ring, v.img.space
	if l.err != nil {
		return nil, 0, l.err
	}
	pointer, err := v.Uint64(l.prb)
	if err != nil {
		return nil, 0, err
	}
	rb := VirtAddr(pointer)
	if !space.valid(rb, 8) {
		return nil, 0, &CorruptError{"prb", l.prb, fmt.Sprintf("points to %v", rb)}
	}
	var o object
	if err := o.load(space, v, "printk_ringbuffer", l.rb, rb); err != nil {
		return nil, 0, err
	}
	countBits, sizeBits := o.u32(l.countBits), o.u32(l.sizeBits)
	if countBits > ringMaxRecordBits || sizeBits < 4 || sizeBits > ringMaxTextBits {
		return nil, 0, &CorruptError{"printk_ringbuffer", rb, fmt.Sprintf("2^%d records, 2^%d bytes of text", countBits, sizeBits)}
	}
	ring := logRing{v: v, l: l, descs: o.ptr(l.descs), infos: o.ptr(l.infos), data: o.ptr(l.data),
		count: 1 << countBits, size: 1 << sizeBits, sizeBits: sizeBits}
	head, tail := o.u64(l.headID)&descIDMask, o.u64(l.tailID)&descIDMask
	n := (head-tail)&descIDMask + 1
	if n > ring.count {
		return nil, 0, &CorruptError{"printk_ringbuffer", rb, fmt.Sprintf("records from %#x to %#x in a ring of %d", tail, head, ring.count)}
	}
	for i := range min(n, uint64(most)) {
		rec, ok, err := ring.record((head - i) & descIDMask)
		if err != nil {
			return nil, newest, err
		}
		if !ok {
			continue
		}
		if newest == 0 {
			newest = rec.Seq
		}
		if rec.Seq <= seq && seq != 0 || len(all) > 0 && rec.Seq >= all[len(all)-1].Seq {
			break
		}
		all = append(all, rec)
	}
	slices.Reverse(all)
	return all, newest, nil
}

// Mapped returns how many bytes of writable private memory a process has asked for (mm_struct.data_vm), resident or not.
func (v *View) Mapped(t Task) (uint64, error) {
	r := resolver{img: v.img}
	task, mm := r.shape("task_struct", "mm", "pid"), r.shape("mm_struct", "data_vm")
	if r.err != nil {
		return 0, r.err
	}
	x, err := v.thing(task, t.Addr)
	if err != nil {
		return 0, err
	}
	if x.int("pid") != t.PID || x.ptr("mm") == 0 {
		return 0, fmt.Errorf("memory of process %d: %w", t.PID, ErrNotFound)
	}
	m, err := v.thing(mm, x.ptr("mm"))
	if err != nil {
		return 0, err
	}
	n := m.num("data_vm")
	if n > maxPercpu {
		return 0, m.corrupt("%d pages are mapped", n)
	}
	return n * v.img.pageSize, nil
}

// Executable is memory of a process that is its own, of no file, and may be executed.
type Executable struct {
	Start uint64 `json:"start"`
	End   uint64 `json:"end"`
	Write bool   `json:"write"` // it may be written, too
}

// AnonymousExecutables lists the mappings of a process that have no file and may be executed, but for those that the kernel itself gives it.
// Programs that translate code while they run have such; in others somebody has put them there. mm is where the kernel has what it knows of the
// process's memory (struct mm_struct): elsewhere, when the process has become another program.
func (v *View) AnonymousExecutables(t Task) (mm VirtAddr, all []Executable, err error) {
	all, err = settle(v, func() (found []Executable, err error) {
		mm, found, err = v.anonymousExecutables(t)
		return found, err
	})
	if err != nil {
		return 0, nil, fmt.Errorf("walk mappings of process %d: %w", t.PID, err)
	}
	return mm, all, nil
}

func (v *View) anonymousExecutables(t Task) (VirtAddr, []Executable, error) {
	r := resolver{img: v.img}
	task := r.shape("task_struct", "mm", "pid")
	mm := r.shape("mm_struct", "pgd", "mm_mt[]?", "mmap?")
	vma := r.shape("vm_area_struct", "vm_start", "vm_end", "vm_mm", "vm_flags", "vm_file", "vm_ops", "vm_next?")
	if r.err != nil {
		return 0, nil, r.err
	}
	x, err := v.thing(task, t.Addr)
	if err != nil {
		return 0, nil, err
	}
	if x.int("pid") != t.PID || x.ptr("mm") == 0 {
		return 0, nil, ErrNotFound
	}
	m, err := v.thing(mm, x.ptr("mm"))
	if err != nil {
		return 0, nil, err
	}
	var all []Executable
	see := func(at VirtAddr) (thing, error) {
		a, err := v.thing(vma, at)
		if err != nil {
			return a, err
		}
		if a.ptr("vm_mm") != m.addr() || a.num("vm_start") >= a.num("vm_end") {
			return a, a.corrupt("from %#x to %#x, of the memory at %v", a.num("vm_start"), a.num("vm_end"), a.ptr("vm_mm"))
		}
		if flags := a.num("vm_flags"); flags&vmExec != 0 && a.ptr("vm_file") == 0 && a.ptr("vm_ops") == 0 {
			all = append(all, Executable{a.num("vm_start"), a.num("vm_end"), flags&vmWrite != 0})
		}
		return a, nil
	}
	if _, ok := m.fields["mm_mt"]; ok {
		err := v.mapleTree("vm_area_struct", m.at("mm_mt"), maxMappings, func(_, _ uint64, at VirtAddr) error {
			_, err := see(at)
			return err
		})
		return m.addr(), all, err
	}
	n := 0
	for at := m.ptr("mmap"); at != 0; n++ {
		if n == maxMappings {
			return m.addr(), all, m.corrupt("more than %d mappings", maxMappings)
		}
		a, err := see(at)
		if err != nil {
			return m.addr(), all, err
		}
		at = a.ptr("vm_next")
	}
	return m.addr(), all, nil
}

// CPUTime is what a CPU has spent on interrupts since boot, as ticks count it (kernel_cpustat, include/linux/kernel_stat.h), in all and on softirqs.
type CPUTime struct {
	CPU     int           `json:"cpu"`
	IRQ     time.Duration `json:"irq"`
	Softirq time.Duration `json:"softirq"`
	// All is all that was counted, idle time included; the ticks of a CPU that idles without them, or that a hypervisor has held, are missing.
	All time.Duration `json:"all"`
}

// CPUTimes reads these counts of the possible CPUs.
func (v *View) CPUTimes() ([]CPUTime, error) {
	r := resolver{img: v.img}
	at, size := r.symbol("kernel_cpustat"), r.size("kernel_cpustat")
	if r.err != nil {
		return nil, fmt.Errorf("read times of CPUs: %w", r.err)
	}
	guest, err0 := v.img.types.enum("cpu_usage_stat", "CPUTIME_GUEST") // what is from here on is counted among the others, too
	irq, err1 := v.img.types.enum("cpu_usage_stat", "CPUTIME_IRQ")
	soft, err2 := v.img.types.enum("cpu_usage_stat", "CPUTIME_SOFTIRQ")
	if err := errors.Join(err0, err1, err2); err != nil {
		return nil, fmt.Errorf("read times of CPUs: %w", err)
	}
	if most := uint64(max(irq, soft, guest)); irq < 0 || soft < 0 || guest < 0 || size > hostmem.PageSize || 8*most+8 > size {
		return nil, fmt.Errorf("read times of CPUs: %w", &CorruptError{"BTF", 0, fmt.Sprintf("kernel_cpustat has %d bytes", size)})
	}
	var all []CPUTime
	b := make([]byte, size)
	for cpu, offset := range v.img.perCPU {
		if offset == 0 {
			continue
		}
		if !v.img.space.valid(at+offset, 8) {
			return nil, fmt.Errorf("read times of CPUs: %w", &CorruptError{"kernel_cpustat", at + offset, "not an address of the kernel"})
		}
		if err := v.img.space.object(v, "kernel_cpustat", at+offset, b); err != nil {
			return nil, fmt.Errorf("read times of CPUs: %w", err)
		}
		t := CPUTime{CPU: cpu, IRQ: time.Duration(le64(b[8*irq:])), Softirq: time.Duration(le64(b[8*soft:]))}
		for i := range guest {
			t.All += time.Duration(le64(b[8*i:]))
		}
		all = append(all, t)
	}
	return all, nil
}
