package kernel

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
)

// Interrupt is one line of /proc/interrupts or /proc/softirqs: how often something interrupted each CPU.
type Interrupt struct {
	Name   string   `json:"name"` // the number of a line, or LOC, NMI, RES, … of what has none
	Soft   bool     `json:"soft,omitempty"`
	HWIRQ  uint64   `json:"hwirq,omitempty"`
	Chip   string   `json:"chip,omitempty"`
	Users  []string `json:"users,omitempty"` // those who handle it
	Counts []uint64 `json:"counts"`          // of each possible CPU; they wrap at 2^32
}

const (
	maxIRQs       = 1 << 19
	maxIRQActions = 1 << 10
)

// softIRQs are the softirqs by their enumerators, in the words of /proc/softirqs (kernel/softirq.c).
var softIRQs = []string{"HI", "TIMER", "NET_TX", "NET_RX", "BLOCK", "IRQ_POLL", "TASKLET", "SCHED", "HRTIMER", "RCU"}

// archIRQs are the counters of what has no line on x86 (arch/x86/kernel/irq.c): members of irq_cpustat_t or per-CPU variables, and
// where irq_cpustat_t has an array of them (7.2), enumerators of irq_stat_counts.
var archIRQs = []struct{ name, field, symbol, enumerator string }{
	{"NMI", "__nmi_count", "", "NMI"}, {"LOC", "apic_timer_irqs", "", "APIC_TIMER"}, {"SPU", "irq_spurious_count", "", "SPURIOUS"},
	{"PMI", "apic_perf_irqs", "", "APIC_PERF"}, {"IWI", "apic_irq_work_irqs", "", "IRQ_WORK"}, {"RTR", "icr_read_retry_count", "", "ICR_READ_RETRY"},
	{"PLT", "x86_platform_ipis", "", "X86_PLATFORM_IPI"}, {"RES", "irq_resched_count", "", "RESCHEDULE"}, {"CAL", "irq_call_count", "", "CALL_FUNCTION"},
	{"TLB", "irq_tlb_count", "", "TLB"}, {"TRM", "irq_thermal_count", "", "THERMAL_APIC"}, {"THR", "irq_threshold_count", "", "THRESHOLD_APIC"},
	{"DFR", "irq_deferred_error_count", "", "DEFERRED_ERROR"}, {"MCE", "", "mce_exception_count", "MCE_EXCEPTION"}, {"MCP", "", "mce_poll_count", "MCE_POLL"},
	{"VPMI", "", "", "PERF_GUEST_MEDIATED_PMI"},
}

// archIRQ returns where the first CPU's counter would be; ok is false where this kernel has none.
func (v *View) archIRQ(field, symbol, enumerator string) (va VirtAddr, ok bool) {
	if symbol != "" {
		if va, err := v.img.syms.symbol(symbol); err == nil {
			return va, true
		}
	}
	stat, err := v.img.syms.symbol("irq_stat")
	if err != nil {
		return 0, false
	}
	if f, err := v.img.types.field("irq_cpustat_t", field); field != "" && err == nil && f.Size == 4 {
		return stat + VirtAddr(f.Offset), true
	}
	f, err := v.img.types.field("irq_cpustat_t", "counts")
	if err != nil {
		return 0, false
	}
	n, err := v.img.types.enum("irq_stat_counts", "IRQ_COUNT_"+enumerator)
	if err != nil || n < 0 || n > maxIRQs || uint64(4*n+4) > f.Size {
		return 0, false
	}
	return stat + VirtAddr(f.Offset) + VirtAddr(4*n), true
}

// Interrupts lists the interrupts and softirqs with their counts; machine-check exceptions and polls (MCE, MCP) are among them.
func (v *View) Interrupts() iter.Seq2[Interrupt, error] {
	return settled(v, "walk interrupts", func() ([]Interrupt, error) {
		all, err := v.interruptLines()
		if err != nil {
			return all, err
		}
		r := resolver{img: v.img}
		for _, a := range archIRQs {
			va, ok := v.archIRQ(a.field, a.symbol, a.enumerator)
			if !ok {
				continue
			}
			counts, err := v.perCPU32(a.name, va)
			if err != nil {
				return all, err
			}
			all = append(all, Interrupt{Name: a.name, Counts: counts})
		}
		ipis, err := v.ipis()
		if all = append(all, ipis...); err != nil {
			return all, err
		}
		kstat := r.symbol("kstat")
		f, err := v.img.types.field("kernel_stat", "softirqs")
		if err != nil {
			r.fail(err)
		}
		if r.err != nil {
			return all, r.err
		}
		for _, name := range softIRQs {
			n, err := v.img.types.enumerator(name + "_SOFTIRQ")
			if err != nil || n < 0 || uint64(4*n+4) > f.Size {
				continue
			}
			counts, err := v.perCPU32("kernel_stat", kstat+VirtAddr(f.Offset)+VirtAddr(4*n))
			if err != nil {
				return all, err
			}
			all = append(all, Interrupt{Name: name, Soft: true, Counts: counts})
		}
		return all, nil
	})
}

// ipis lists the interrupts that arm64's CPUs send each other, as IPI0, IPI1, …: ipi_desc of arch/arm64/kernel/smp.c, or pcpu_ipi_desc,
// where each CPU has its own (7.2).
func (v *View) ipis() ([]Interrupt, error) {
	var tables []VirtAddr // of all CPUs, or one of each
	if at, err := v.img.syms.symbol("ipi_desc"); err == nil {
		tables = append(tables, at)
	} else if at, err := v.img.syms.symbol("pcpu_ipi_desc"); err == nil {
		for _, offset := range v.img.perCPU {
			tables = append(tables, at+offset)
		}
	} else {
		return nil, nil
	}
	n, err := v.img.types.enum("ipi_msg_type", "MAX_IPI")
	if err != nil || n <= 0 || n > 64 {
		return nil, nil
	}
	r := resolver{img: v.img}
	desc := r.shape("irq_desc", "kstat_irqs")
	if r.err != nil {
		return nil, r.err
	}
	all := make([]Interrupt, n)
	for cpu, table := range tables {
		descs, err := v.pointers("ipi_desc", table, int(n))
		if err != nil {
			return nil, err
		}
		for i, p := range descs {
			if p == 0 {
				continue
			}
			t, err := v.thing(desc, p)
			if err != nil {
				return nil, err
			}
			counts, err := v.lineCounts(&t)
			if err != nil {
				return nil, err
			}
			if to := &all[i]; to.Counts == nil {
				*to = Interrupt{Name: fmt.Sprintf("IPI%d", i), Counts: counts}
			} else if cpu < len(counts) {
				to.Counts[cpu] = counts[cpu]
			}
		}
	}
	return slices.DeleteFunc(all, func(i Interrupt) bool { return i.Counts == nil }), nil
}

// lineCounts returns how often an interrupt came to each CPU; t is its irq_desc.
func (v *View) lineCounts(t *thing) ([]uint64, error) {
	p := t.ptr("kstat_irqs")
	if p == 0 {
		return nil, nil
	}
	// Since v6.10 the counter is a member of a structure.
	if f, err := v.img.types.field("irqstat", "cnt"); err == nil {
		p += VirtAddr(f.Offset)
	}
	return v.perCPU32("irq_desc", p)
}

// perCPU32 reads a per-CPU counter of 4 bytes.
func (v *View) perCPU32(kind string, va VirtAddr) ([]uint64, error) {
	counts := make([]uint64, len(v.img.perCPU))
	for cpu, offset := range v.img.perCPU {
		if offset == 0 {
			continue
		}
		var b [4]byte
		at := va + offset
		if !v.img.space.valid(at, 4) {
			return nil, &CorruptError{kind, at, fmt.Sprintf("counter of CPU %d", cpu)}
		}
		if err := v.img.space.object(v, kind, at, b[:]); err != nil {
			return nil, err
		}
		counts[cpu] = uint64(le32(b[:]))
	}
	return counts, nil
}

// interruptLines lists the interrupts that have a number (struct irq_desc, include/linux/irqdesc.h).
func (v *View) interruptLines() ([]Interrupt, error) {
	r := resolver{img: v.img}
	desc := r.shape("irq_desc", "irq_data.irq", "irq_data.hwirq", "irq_data.chip", "kstat_irqs", "action")
	chip := r.shape("irq_chip", "name")
	action := r.shape("irqaction", "next", "name")
	if r.err != nil {
		return nil, r.err
	}
	var all []Interrupt
	read := func(index uint64, at VirtAddr) error {
		t, err := v.thing(desc, at)
		if err != nil {
			return err
		}
		if t.num("irq_data.irq") != index {
			return t.corrupt("interrupt %d is listed as %d", t.num("irq_data.irq"), index)
		}
		i := Interrupt{Name: strconv.FormatUint(index, 10), HWIRQ: t.num("irq_data.hwirq")}
		if p := t.ptr("irq_data.chip"); p != 0 {
			c, err := v.thing(chip, p)
			if err != nil {
				return err
			}
			if p := c.ptr("name"); p != 0 {
				if i.Chip, err = v.cstring("irq_chip", p, 64); err != nil {
					return err
				}
			}
		}
		for p := t.ptr("action"); p != 0; {
			if len(i.Users) == maxIRQActions {
				return t.corrupt("more than %d handlers", maxIRQActions)
			}
			a, err := v.thing(action, p)
			if err != nil {
				return err
			}
			name := ""
			if p := a.ptr("name"); p != 0 {
				if name, err = v.cstring("irqaction", p, 256); err != nil {
					return err
				}
			}
			i.Users = append(i.Users, name)
			p = a.ptr("next")
		}
		if i.Counts, err = v.lineCounts(&t); err != nil {
			return err
		}
		all = append(all, i)
		return nil
	}
	// Since Linux commit 721255b9826b ("genirq: Use a maple tree for interrupt descriptor management") (in v6.5).
	tree, err := v.img.syms.symbol("sparse_irqs")
	if err == nil {
		err = v.mapleTree("irq_desc", tree, maxIRQs, func(first, last uint64, at VirtAddr) error {
			if first != last {
				return &CorruptError{"irq_desc", at, fmt.Sprintf("for interrupts %d to %d", first, last)}
			}
			return read(first, at)
		})
		return all, err
	}
	if !errors.Is(err, ErrNotFound) {
		return nil, err
	}
	radix := r.symbol("irq_desc_tree")
	if r.err != nil {
		return nil, r.err
	}
	err = v.xarray("irq_desc", radix, maxIRQs, read)
	return all, err
}
