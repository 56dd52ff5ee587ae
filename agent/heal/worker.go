package heal

import (
	"bytes"
	"fmt"
	"math"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// workerFunction is one of the host kernel's functions that take the address of an object and may sleep, and that a plan may have a worker of the kernel's
// run. As with function, the table below is all there is: neither the name nor the object's type ever comes from outside.
type workerFunction struct {
	name, purpose string
	status        bool // it returns an int: 0, or a negative number of an error
}

var (
	// kernel/trace/ftrace.c, exported: sleeps on ftrace's lock, patches what was traced, and waits until nobody is in the code that it then frees.
	unregisterFtrace = workerFunction{"unregister_ftrace_function", "has ftrace call that user no more, and frees what ftrace had made for it", true}
	// drivers/input/input.c, exported.
	unregisterInput = workerFunction{"input_unregister_handler", "has the handler leave each device, by his own function disconnect, and takes him off the list", false}
	// kernel/jump_label.c, exported: what the kernel itself calls when the last user of a tracepoint leaves.
	disableKey = workerFunction{"static_key_disable", "patches out the jumps to the tracepoint", false}
)

const (
	// handOver is called by the kernel's timers with the timer of a request_queue (block/blk-core.c), and does nothing but give the timeout_work that lies
	// behind it in that structure to the workers of kblockd. It does not look at the timer, whose bytes can so be the irq_work that has it called, nor at
	// anything else of the queue: of which therefore only these two need be there.
	handOver = "blk_rq_timed_out_timer"
	// runWork is what such a worker is to run (kernel/workqueue.c): it calls the function of a work_for_cpu with its argument, and notes what that returns.
	runWork = "work_for_cpu_fn"

	workPending, workQueue = 1 << 0, 1 << 2 // WORK_STRUCT_PENDING, WORK_STRUCT_PWQ of include/linux/workqueue.h, the same since v3.7
	notReturned            = 0x5a5a5a5a_5a5a5a5a

	// workerTimeout is how long such a function may take. ftrace waits for each task to have left its code, by a grace period of RCU tasks, which is
	// a second on an idle host and much longer on one on which a task neither sleeps nor leaves the kernel.
	workerTimeout = 90 * time.Second
)

// addWork adds to a plan, whose steps make sure of the object, those that have a worker run a function on it.
func addWork(m model, p *Plan, fn workerFunction, arg kernel.VirtAddr) error {
	fail := func(err error) error { return fmt.Errorf("have a worker run %s: %w", fn.name, err) }
	if m.Info().Arch == archAArch64 {
		return fail(fmt.Errorf("workers are handed work on x86-64 only: %w", kernel.ErrNotSupported))
	}
	work, err := provenIRQWork(m)
	if err != nil {
		return fail(err)
	}
	l := layout{m: m}
	workSize := l.sizeof("work_struct")
	data, entry, run := l.field("work_struct", "data.counter", 8), l.field("work_struct", "entry", 16), l.field("work_struct", "func", 8)
	inner, call, argument, ret := l.field("work_for_cpu", "work", workSize), l.field("work_for_cpu", "fn", 8), l.field("work_for_cpu", "arg", 8), l.field("work_for_cpu", "ret", 8)
	size := l.sizeof("work_for_cpu")
	timer, queued := l.field("request_queue", "timeout", l.sizeof("timer_list")), l.field("request_queue", "timeout_work", workSize)
	if l.err != nil {
		return fail(l.err)
	}
	behind := queued - timer // of the work, behind the timer
	if queued < timer || behind < work.size || behind > 0x7f || behind%8 != 0 || inner != 0 || call < workSize || argument < workSize || ret < workSize {
		return fail(fmt.Errorf("a request_queue's work is at %d and its timer at %d, and a work_for_cpu's at %d: %w", queued, timer, inner, kernel.ErrNotSupported))
	}
	idle, err := idleWork(m, data, entry, run)
	if err != nil {
		return fail(err)
	}
	var expects []Step
	var addr [3]kernel.VirtAddr
	for i, name := range []string{handOver, runWork, fn.name} {
		va, head, err := callable(m, name)
		if err == nil && name == handOver {
			head = make(Bytes, 40)
			if err = m.ReadVirt(va, head); err == nil && !gives(head, byte(behind)) {
				err = fmt.Errorf("%s is %x, which does not give away what lies %d bytes behind its timer: %w", name, []byte(head), behind, kernel.ErrNotSupported)
			}
		}
		if err != nil {
			return fail(err)
		}
		pa, err := m.Phys(va)
		if err != nil {
			return fail(err)
		}
		addr[i] = va
		expects = append(expects, Step{Op: OpExpect, Why: "the function is there, and may be called through a pointer", Object: name, Addr: pa, Virt: va, Expect: head})
	}
	box, err := findMailbox(m)
	if err != nil {
		return fail(err)
	}
	cpu, listVA, listPA, err := provenTick(m)
	if err != nil {
		return fail(err)
	}
	const at = 0x40
	workVA := uint64(box.va) + at
	obj := make(Bytes, behind+size)
	put32(obj, work.flags, irqWorkType|irqWorkLazy|irqWorkClaimed)
	put64(obj, work.fn, uint64(addr[0]))
	own := obj[behind:]
	put64(own, data, idle)
	put64(own, entry, workVA+behind+entry)
	put64(own, entry+8, workVA+behind+entry)
	put64(own, run, uint64(addr[1]))
	put64(own, call, uint64(addr[2]))
	put64(own, argument, uint64(arg))
	put64(own, ret, notReturned)

	p.CPU = &cpu.ID
	p.Calls = append(p.Calls, Call{Function: fn.name, Addr: addr[2], Purpose: fn.purpose,
		Context: fmt.Sprintf("a worker of kblockd, to whom CPU %d's timer tick gives it (irq_work_tick, %s, %s)", cpu.ID, handOver, runWork)})
	p.Steps = append(append(p.Steps, expects...), box.owned)
	flagsPA, retPA := box.pa+at+hostmem.PhysAddr(work.flags), box.pa+at+hostmem.PhysAddr(behind+ret)
	returned := Cond{Addr: retPA, Size: 8, Mask: ^uint64(0), Value: notReturned, What: "the function has returned"}
	retVA := kernel.VirtAddr(workVA + behind + ret)
	p.Steps = append(p.Steps, Step{
		Op: OpWrite, Why: "lay down the work for the worker, and before it the work that gives it to him", Object: "struct irq_work and struct work_for_cpu",
		Addr: box.pa + at, Virt: kernel.VirtAddr(workVA), Expect: make(Bytes, len(obj)), Put: obj, Undo: true,
	}, Step{
		Op: OpArm, Why: fmt.Sprintf("hand it to CPU %d; only while its list is empty", cpu.ID), Object: fmt.Sprintf("lazy_list of CPU %d", cpu.ID),
		Addr: listPA, Virt: listVA, Expect: le(0, 8), Put: le(workVA, 8), Undo: true,
	}, Step{
		Op: OpAwait, Why: "the kernel has given it to a worker: neither pending nor busy", Object: "irq_work.node.u_flags", Addr: flagsPA, Virt: kernel.VirtAddr(workVA + work.flags),
		Until:   []Cond{{Addr: flagsPA, Size: 4, Mask: irqWorkClaimed, Equal: true, What: "the work is done"}},
		Timeout: armTimeout, Poll: 200 * time.Microsecond,
	}, Step{
		Op: OpAwait, Why: "the worker has run it", Object: "work_for_cpu.ret", Runs: true, Addr: retPA, Virt: retVA,
		Until: []Cond{returned}, Timeout: workerTimeout, Poll: 5 * time.Millisecond,
	})
	if fn.status {
		p.Steps = append(p.Steps, Step{
			Op: OpAwait, Why: "it has worked", Object: "work_for_cpu.ret", Addr: retPA, Virt: retVA,
			Until:  []Cond{{Addr: retPA, Size: 4, Mask: math.MaxUint32, Equal: true, What: "the function has returned 0"}},
			Unless: []Cond{{Addr: retPA, Size: 4, Mask: math.MaxUint32, What: "the function has returned an error"}}, Timeout: time.Second, Poll: time.Millisecond,
		})
	}
	rescue, err := klogdSteps(m, work, cpu.ID, listVA, listPA)
	if err != nil {
		return fail(err)
	}
	p.Steps = append(append(p.Steps, rescue...), Step{
		Op: OpAwait, Why: "the worker is done with it", Object: "work_for_cpu.ret", Cleanup: true, Addr: retPA, Virt: retVA,
		Until: []Cond{returned}, Timeout: time.Second, Poll: 5 * time.Millisecond,
	}, Step{
		Op: OpWrite, Why: "clean the mailbox", Object: "struct irq_work and struct work_for_cpu", Cleanup: true, Ours: true,
		Addr: box.pa + at, Virt: kernel.VirtAddr(workVA), Expect: obj, Put: make(Bytes, len(obj)),
	})
	return nil
}

// gives tells whether the function that begins so takes an address that lies so far behind its argument: as the third argument of a call, or as the first
// of one that does the rest.
func gives(code []byte, behind byte) bool {
	for _, take := range [][]byte{
		{0x48, 0x8d, 0x57, behind}, // lea behind(%rdi),%rdx
		{0x48, 0x8d, 0x7f, behind}, // lea behind(%rdi),%rdi
		{0x48, 0x83, 0xc7, behind}, // add $behind,%rdi
	} {
		if bytes.Contains(code, take) {
			return true
		}
	}
	return false
}

// idleWork returns what stands in work_struct.data of a work that is on no queue, as the kernel's own reboot_work has it, whose layout is checked with it.
func idleWork(m model, data, entry, run uint64) (uint64, error) {
	l := layout{m: m}
	at, fn := l.symbol("reboot_work"), l.symbol("reboot_work_func") // kernel/reboot.c
	if l.err != nil {
		return 0, l.err
	}
	var got [4]uint64
	for i, off := range []uint64{data, entry, entry + 8, run} {
		var err error
		if got[i], err = read64(m, at+kernel.VirtAddr(off)); err != nil {
			return 0, err
		}
	}
	switch list := uint64(at) + entry; {
	case kernel.VirtAddr(got[3]) != fn || got[0]&workQueue == 0 && (got[1] != list || got[2] != list):
		return 0, fmt.Errorf("the kernel's own reboot_work is %#x, which is not a work_struct as it is known: %w", got, kernel.ErrNotSupported)
	case got[0]&(workPending|workQueue) != 0:
		return 0, fmt.Errorf("the host is about to reboot: %w", ErrNotYet)
	}
	return got[0], nil
}
