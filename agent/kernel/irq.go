package kernel

import (
	"errors"
	"fmt"
	"iter"
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

// archIRQs are the counters of what has no line on x86 (arch/x86/kernel/irq.c): members of irq_cpustat_t, or per-CPU variables.
var archIRQs = []struct{ name, field, symbol string }{
	{"NMI", "__nmi_count", ""}, {"LOC", "apic_timer_irqs", ""}, {"SPU", "irq_spurious_count", ""}, {"PMI", "apic_perf_irqs", ""},
	{"IWI", "apic_irq_work_irqs", ""}, {"RTR", "icr_read_retry_count", ""}, {"PLT", "x86_platform_ipis", ""}, {"RES", "irq_resched_count", ""},
	{"CAL", "irq_call_count", ""}, {"TLB", "irq_tlb_count", ""}, {"TRM", "irq_thermal_count", ""}, {"THR", "irq_threshold_count", ""},
	{"DFR", "irq_deferred_error_count", ""}, {"MCE", "", "mce_exception_count"}, {"MCP", "", "mce_poll_count"},
}

// Interrupts lists the interrupts and softirqs with their counts; machine-check exceptions and polls (MCE, MCP) are among them.
func (v *View) Interrupts() iter.Seq2[Interrupt, error] {
	return settled(v, "walk interrupts", func() ([]Interrupt, error) {
		all, err := v.interruptLines()
		if err != nil {
			return all, err
		}
		r := resolver{img: v.img}
		stat, noStat := v.img.syms.symbol("irq_stat")
		for _, a := range archIRQs {
			va := stat
			if a.symbol != "" {
				if va, err = v.img.syms.symbol(a.symbol); err != nil {
					continue
				}
			} else {
				f, err := v.img.types.field("irq_cpustat_t", a.field)
				if err != nil || f.Size != 4 || noStat != nil {
					continue
				}
				va += VirtAddr(f.Offset)
			}
			counts, err := v.perCPU32(a.name, va)
			if err != nil {
				return all, err
			}
			all = append(all, Interrupt{Name: a.name, Counts: counts})
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
	// Since v6.10 the counter is a member of a structure.
	count := uint64(0)
	if f, err := v.img.types.field("irqstat", "cnt"); err == nil {
		count = f.Offset
	}
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
		if p := t.ptr("kstat_irqs"); p != 0 {
			if i.Counts, err = v.perCPU32("irq_desc", p+VirtAddr(count)); err != nil {
				return err
			}
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
