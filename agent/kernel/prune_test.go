package kernel

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// pruned is a memory whose kernel has a symbol table and BTF of no more than this package reads, at the places of the real
// ones: a recording of it takes a tenth of the room. All else is as it was.
type pruned struct {
	hostmem.Memory
	parts []hostmem.Segment
}

func (m pruned) ReadAt(b []byte, off int64) (int, error) {
	n, err := m.Memory.ReadAt(b, off)
	for _, p := range m.parts {
		from, to := max(off, int64(p.Addr)), min(off+int64(n), int64(p.Addr)+int64(len(p.Buf)))
		if from < to {
			copy(b[from-off:to-off], p.Buf[from-int64(p.Addr):])
		}
	}
	return n, err
}

func prune(t *testing.T, img *Image) pruned {
	t.Helper()
	m := pruned{Memory: img.mem}
	put := func(va VirtAddr, b []byte) {
		pa, _, err := img.space.translate(direct{t.Context(), img.mem}, va)
		if err != nil {
			t.Fatal(err)
		}
		m.parts = append(m.parts, hostmem.Segment{Addr: pa, Buf: b})
	}

	typs := strings.Fields(`task_struct signal_struct cred mm_struct percpu_counter printk_ringbuffer prb_desc printk_info resource
		timekeeper tk_data clocksource clock_event_device tick_device rq irq_cpustat_t irq_stat_counts kernel_stat pcpu_hot
		uts_namespace new_utsname seqcount_raw_spinlock hrtimer_cpu_base`)
	names := strings.Fields(`_text _end __per_cpu_start __per_cpu_end __per_cpu_offset __cpu_possible_mask vmcoreinfo_note
		nr_cpu_ids page_offset_base vmalloc_base vmemmap_base phys_base __start_BTF init_task tk_core prb iomem_resource
		jiffies_64 __cpu_online_mask runqueues irq_stat pcpu_hot __preempt_count kstat tick_cpu_device linux_banner init_uts_ns
		panic_cpu oops_in_progress tainted_mask modules module_kset mod_tree net_namespace_list init_net tcp_hashinfo udp_table
		loopback_get_stats64 dev_get_tstats64 slab_caches nr_node_ids vm_zone_stat vm_node_stat vm_event_states vmstat_text
		_totalram_pages totalreserve_pages contig_page_data node_data nr_swap_pages total_swap_pages psi_system psi_disabled
		avenrun _stext _etext init_stack __end_init_stack __end_init_task __start_orc_unwind_ip __stop_orc_unwind_ip
		__start_orc_unwind cgrp_dfl_root worker_pool_idr timer_bases hrtimer_bases irq_stat sparse_irqs irq_desc_tree
		mce_exception_count mce_poll_count rcu_state rcu_data gp_state_names blockdev_superblock sysctl_table_root key_serial_tree
		kprobe_table aggr_pre_handler ftrace_ops_list ftrace_list_end __start___tracepoints_ptrs __stop___tracepoints_ptrs
		lsm_names prog_idr map_idr link_idr saved_command_line swap_info nr_swapfiles special_mapping_vmops __sched_text_start
		__sched_text_end hrtimer_wakeup process_timeout delayed_work_timer_fn proc_dostring proc_dointvec proc_dointvec_minmax
		proc_douintvec proc_douintvec_minmax proc_doulongvec_minmax proc_dobool proc_dou8vec_minmax jiffies timekeeper_data memstart_addr
		kimage_voffset elfcorehdr_addr`)
	for _, k := range knownLocks {
		names = append(names, k.name)
	}
	for i := range img.syms.offsets { // the functions that sleep for locks, and what follows them
		_, name := img.syms.name(i)
		for _, in := range sleepIn {
			if strings.HasPrefix(name, in.prefix) && len(in.prefix) > 5 {
				names = append(names, name)
			}
		}
	}
	img.types.mu.Lock()
	for field := range img.types.fields {
		typs = append(typs, field[0])
	}
	img.types.mu.Unlock()
	typs = append(typs, strings.Fields(`zone_stat_item node_stat_item vm_event_item numa_stat_item psi_states netdev_stat_type cgroup_subsys_id
		memcg_memory_event rwsem_waiter_type worker_pool_flags hrtimer_base_type mq_rq_state req_op req_opf bpf_prog_type bpf_map_type
		bpf_link_type pid_type maple_type`)...)
	img.note.entries(func(e vmcoreEntry) {
		typ, _, _ := strings.Cut(e.name, ".")
		switch e.kind {
		case "SYMBOL":
			names = append(names, e.name)
		case "SIZE", "OFFSET":
			typs = append(typs, typ)
		}
	})

	var keep []btf.Type
	for _, name := range typs {
		found, err := img.types.named(name)
		if err != nil && !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
		for _, typ := range found {
			_, ok := members(typ)
			if _, enum := typ.(*btf.Enum); (ok || enum) && !slices.Contains(keep, typ) {
				keep = append(keep, typ)
			}
		}
	}
	for _, id := range img.types.anonymous {
		typ, err := img.types.spec.TypeByID(id)
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := typ.(*btf.Enum); ok && slices.ContainsFunc(e.Values, func(v btf.EnumValue) bool {
			return slices.Contains([]string{"MM_ANONPAGES", "CSS_ONLINE", "CSS_VISIBLE", "TIMER_SOFTIRQ"}, v.Name)
		}) {
			keep = append(keep, typ)
		}
	}
	raw := marshalBTF(t, keep...)
	start, err := img.Symbol("__start_BTF")
	if err != nil {
		t.Fatal(err)
	}
	put(start, raw)

	type symbol struct {
		name string
		va   VirtAddr
	}
	symbols := []symbol{{"D__stop_BTF", start + VirtAddr(len(raw))}}
	for _, name := range names {
		if va, err := img.syms.symbol(name); err == nil {
			symbols = append(symbols, symbol{"D" + name, va})
		}
	}
	slices.SortFunc(symbols, func(a, b symbol) int { return cmp.Or(cmp.Compare(a.va, b.va), cmp.Compare(a.name, b.name)) })
	symbols = slices.Compact(symbols)
	at := img.syms.places
	var base [8]byte
	if at.base != 0 {
		if err := img.space.read(direct{t.Context(), img.mem}, at.base, base[:]); err != nil {
			t.Fatal(err)
		}
	}
	if img.syms.formula == "base-relative" { // from the lowest symbol on
		binary.LittleEndian.PutUint64(base[:], uint64(symbols[0].va))
		put(at.base, base[:])
	}
	var list []string
	var offsets []int32
	for i, s := range symbols {
		list = append(list, s.name)
		switch f := img.syms.formula; {
		case f == "absolute-percpu" && s.va < 1<<31:
			offsets = append(offsets, int32(s.va))
		case f == "absolute-percpu":
			offsets = append(offsets, int32(int64(le64(base[:]))-1-int64(s.va)))
		case f == "base-relative":
			offsets = append(offsets, int32(uint32(s.va-symbols[0].va)))
		case f == "place-relative":
			offsets = append(offsets, int32(s.va-at.offsets-VirtAddr(4*i)))
		default:
			t.Fatalf("cannot make symbol tables of formula %s", f)
		}
	}
	tables := makeKallsyms(list, offsets)
	put(at.num, binary.LittleEndian.AppendUint32(nil, uint32(len(list))))
	put(at.names, tables.names)
	put(at.tokens, tables.tokens)
	put(at.tokenIndex, tables.tokenIndex)
	put(at.offsets, tables.offsets)
	if _, ok := img.note.symbol("kallsyms_names"); !ok {
		// The search for the table's shape would have all of the kernel's code recorded: here the note names it.
		text := img.note.text
		for name, va := range map[string]VirtAddr{"names": at.names, "num_syms": at.num, "token_table": at.tokens,
			"token_index": at.tokenIndex, "offsets": at.offsets, "relative_base": at.base} {
			text += fmt.Sprintf("SYMBOL(kallsyms_%s)=%x\n", name, uint64(va))
		}
		size := binary.LittleEndian.AppendUint32(nil, uint32(len(text)))
		m.parts = append(m.parts, hostmem.Segment{Addr: img.note.pa + 4, Buf: size}, hostmem.Segment{Addr: img.note.pa + noteHeaderLen, Buf: []byte(text)})
	}
	return m
}
