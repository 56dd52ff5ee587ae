package heal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// fakeHost is a little kernel: as much of Linux as a kill needs, in the RAM file of a temporary directory, with a CPU that
// ticks. Virtual addresses are physical ones plus direct.
type fakeHost struct {
	t    *testing.T
	mem  *hostmem.RAMFile
	info kernel.Info

	symbols map[string]kernel.VirtAddr // of a module, as MODULE:NAME
	perCPU  map[string]kernel.VirtAddr
	fields  map[string]kernel.Field
	sizes   map[string]uint64
	enums   map[string]int64
	tasks   []kernel.Task
	ram     []hostmem.Range
	sysctls []kernel.Sysctl
	cgroups []kernel.Cgroup

	mu    sync.Mutex
	beats int
	pulse func(*kernel.Heartbeat) // alters what a heartbeat says
	proof error                   // what Prove returns
	// The CPU's behaviour; set before it runs.
	deaf     bool   // never ticks
	unreaped bool   // the parent never takes note
	immortal bool   // the signal does nothing
	onTick   func() // before the CPU looks at its list
	// onWork is what a worker does with a function and its argument, and what that returns; nil: it does not come to an end.
	onWork    func(fn, arg uint64) uint64
	killed    []int         // PIDs
	untidy    []string      // what was wrong when the CPU looked
	tickEvery time.Duration // 0: 1 ms
	embedded  bool          // see embed
}

const (
	direct      = 0xffff888000000000
	fakeRAM     = 2 << 20
	paBases     = 0x100000 // page_offset_base, vmemmap_base, real_mode_header
	paPages     = 0x110000 // struct pages of the first MiB
	paFn        = 0x120000 // posix_timer_fn
	paPerCPU    = 0x130000
	paTask      = 0x140000
	paSignal    = 0x141000
	paPID       = 0x142000
	fakePID     = 412
	fakeStart   = 7 * time.Second
	offHrtimer  = 0x70 // of k_itimer.it.real.timer
	sizeofTimer = 64
)

func newFakeHost(t *testing.T) *fakeHost {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ram")
	if err := os.WriteFile(path, make([]byte, fakeRAM), 0o600); err != nil {
		t.Fatal(err)
	}
	mem, err := hostmem.OpenRAMFile(path, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	h := &fakeHost{
		t: t, mem: mem,
		info: kernel.Info{Release: "6.1.0-fake", BuildID: "b1", BootID: "boot1", Note: 0x1000, Banner: "Linux version 6.1.0-fake #1 SMP PREEMPT_DYNAMIC"},
		symbols: map[string]kernel.VirtAddr{
			"page_offset_base": direct + paBases, "vmemmap_base": direct + paBases + 8, "real_mode_header": direct + paBases + 16,
			"posix_timer_fn": direct + paFn, "irq_work_tick": direct + paFn + 0x100, "wake_up_klogd_work_func": direct + paFn + 0x200,
		},
		perCPU: map[string]kernel.VirtAddr{"lazy_list": direct + paPerCPU, "wake_up_klogd_work": direct + paPerCPU + 0x40},
		sizes:  map[string]uint64{"page": 64, "irq_work": 32, "hrtimer": sizeofTimer, "k_itimer": 0x110, "sigqueue": 80},
		enums:  map[string]int64{"pageflags/PG_reserved": 12, "pid_type/PIDTYPE_TGID": 1},
		fields: map[string]kernel.Field{
			"page.flags":               {Offset: 0, Size: 8},
			"irq_work.node.llist.next": {Offset: 0, Size: 8},
			"irq_work.node.u_flags":    {Offset: 8, Size: 4},
			"irq_work.func":            {Offset: 16, Size: 8},
			"irq_work.irqwait.task":    {Offset: 24, Size: 8},
			"llist_head.first":         {Offset: 0, Size: 8},
			"k_itimer.it_sigev_notify": {Offset: 0x44, Size: 4},
			"k_itimer.it_pid":          {Offset: 0x58, Size: 8},
			"k_itimer.sigq":            {Offset: 0x60, Size: 8},
			"k_itimer.it.real.timer":   {Offset: offHrtimer, Size: sizeofTimer},
			"sigqueue.list.next":       {Offset: 0, Size: 8},
			"sigqueue.list.prev":       {Offset: 8, Size: 8},
			"sigqueue.flags":           {Offset: 16, Size: 4},
			"sigqueue.info.si_signo":   {Offset: 24, Size: 4},
			"sigqueue.info.si_code":    {Offset: 32, Size: 4},
			"task_struct.pid":          {Offset: 0x100, Size: 4},
			"task_struct.tgid":         {Offset: 0x104, Size: 4},
			"task_struct.start_time":   {Offset: 0x110, Size: 8},
			"task_struct.signal":       {Offset: 0x118, Size: 8},
			"task_struct.exit_state":   {Offset: 0x120, Size: 4},
			"signal_struct.flags":      {Offset: 0x30, Size: 4},
			"signal_struct.pids":       {Offset: 0x80, Size: 32},
			"pid.numbers":              {Offset: 0x60, Size: 16},
			"upid.nr":                  {Offset: 0, Size: 4},
		},
		tasks: []kernel.Task{
			{Addr: direct + paTask - 0x1000, PID: 1, TGID: 1, Comm: "init"},
			{Addr: direct + paTask, PID: fakePID, TGID: fakePID, Comm: "spin", UID: 1000, Start: fakeStart, OnCPU: true},
			{Addr: direct + paTask + 0x800, PID: 30, TGID: 30, Comm: "kworker/0:1", KThread: true, Start: time.Second},
		},
		ram: []hostmem.Range{{Start: 0x1000, Size: 0x9e000}, {Start: 0x100000, Size: fakeRAM - 0x100000}},
	}
	h.put64(paBases, direct)
	h.put64(paBases+8, direct+paPages)
	h.put64(paBases+16, direct+0x3000)
	for pfn := range 256 {
		h.put64(paPages+hostmem.PhysAddr(pfn)*64, 1<<12)
	}
	h.write(0x2000, []byte("the kernel keeps something here"))
	h.write(paFn, append(append([]byte(nil), endbr64...), 0x0f, 0x1f, 0x44, 0x00))
	h.put32(paPerCPU+0x48, irqWorkLazy)
	h.put64(paPerCPU+0x50, direct+paFn+0x200)
	h.put32(paTask+0x100, fakePID)
	h.put32(paTask+0x104, fakePID)
	h.put64(paTask+0x110, uint64(fakeStart))
	h.put64(paTask+0x118, direct+paSignal)
	h.put64(paSignal+0x88, direct+paPID)
	h.put32(paPID+0x60, fakePID)
	return h
}

func (h *fakeHost) write(pa hostmem.PhysAddr, b []byte) {
	h.t.Helper()
	if _, err := h.mem.WriteAt(b, int64(pa)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *fakeHost) put32(pa hostmem.PhysAddr, v uint32) {
	h.t.Helper()
	h.write(pa, le(uint64(v), 4))
}

func (h *fakeHost) put64(pa hostmem.PhysAddr, v uint64) {
	h.t.Helper()
	h.write(pa, le(v, 8))
}

func (h *fakeHost) get(pa hostmem.PhysAddr, n int) uint64 {
	var b [8]byte
	if _, err := h.mem.ReadAt(b[:n], int64(pa)); err != nil {
		h.t.Error(err)
	}
	return binary.LittleEndian.Uint64(b[:])
}

// run has the CPU tick until the test ends.
func (h *fakeHost) run() {
	if h.deaf {
		return
	}
	every := h.tickEvery
	if every == 0 {
		every = time.Millisecond
	}
	stop, done := make(chan struct{}), make(chan struct{})
	h.t.Cleanup(func() { close(stop); <-done })
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(every):
				h.tick()
			}
		}
	}()
}

// tick is irq_work_tick: it empties the lazy list and runs what was on it.
func (h *fakeHost) tick() {
	if h.onTick != nil {
		h.onTick()
	}
	head := h.get(paPerCPU, 8)
	if head == 0 {
		return
	}
	if prev, err := h.mem.CompareAndSwap(paPerCPU, head, 0); err != nil || prev != head {
		return // withdrawn in the last moment
	}
	work := hostmem.PhysAddr(head - direct)
	flags := h.get(work+8, 4)
	if flags != irqWorkType|irqWorkLazy|irqWorkClaimed {
		h.wrong("irq_work flags %#x", flags)
	}
	h.put32(work+8, uint32(flags&^irqWorkPending))
	switch h.get(work+16, 8) {
	case direct + paFn:
		h.posixTimerFn(work)
	case direct + paHandOver:
		h.timedOutTimer(work)
	}
	h.put32(work+8, uint32(flags&^irqWorkClaimed))
}

// embed has the host's posix timers be those of Linux 6.13 and later, as Debian's 7.2 has them.
func (h *fakeHost) embed() {
	h.embedded = true
	h.sizes["k_itimer"], h.sizes["hrtimer"] = 384, 80
	for name, f := range map[string]kernel.Field{
		"it_sigev_notify": {Offset: 40, Size: 4}, "it_pid": {Offset: 128, Size: 8}, "it_pid_type": {Offset: 44, Size: 4}, "sigq": {Offset: 136, Size: 80},
		"it.real.timer": {Offset: 224, Size: 80}, "it_signal": {Offset: 48, Size: 8}, "it_lock": {Offset: 64, Size: 4}, "it_interval": {Offset: 104, Size: 8},
		"rcuref.refcnt.counter": {Offset: 216, Size: 4}, "ignored_list": {Offset: 112, Size: 16},
	} {
		h.fields["k_itimer."+name] = f
	}
}

// posixTimerFn is the kernel's function of that name, as far as a signal to a process goes.
func (h *fakeHost) posixTimerFn(timer hostmem.PhysAddr) {
	it := timer - hostmem.PhysAddr(h.fields["k_itimer.it.real.timer"].Offset)
	pid := h.get(hostmem.PhysAddr(h.get(it+hostmem.PhysAddr(h.fields["k_itimer.it_pid"].Offset), 8)-direct)+0x60, 4)
	sq := hostmem.PhysAddr(h.get(it+0x60, 8) - direct)
	if h.embedded {
		sq = it + 136
		switch {
		case h.get(it+44, 4) != 1:
			h.wrong("it_pid_type is not PIDTYPE_TGID")
		case h.get(it+216, 4) != 0 || h.get(it+48, 8)&1 != 0 || h.get(it+64, 4) != 0:
			h.wrong("the timer is not valid")
		}
	}
	self := direct + uint64(sq)
	switch {
	case h.get(sq, 8) != self || h.get(sq+8, 8) != self:
		h.wrong("sigqueue is on a list")
	case h.get(sq+16, 4) != sigqueuePrealloc:
		h.wrong("sigqueue is not preallocated")
	case int32(h.get(sq+32, 4)) != siTimer:
		h.wrong("si_code is not SI_TIMER")
	case h.get(sq+24, 4) != uint64(sigKill.no):
		h.wrong("signal %d", h.get(sq+24, 4))
	}
	h.mu.Lock()
	h.killed = append(h.killed, int(pid))
	h.mu.Unlock()
	if h.immortal {
		return
	}
	// Queued on the process's list of pending signals, and taken off it when the parent reaps.
	h.put64(sq, direct+paSignal+0x200)
	h.put64(sq+8, direct+paSignal+0x200)
	h.put32(paTask+0x120, 16)
	if !h.unreaped {
		h.put64(sq, self)
		h.put64(sq+8, self)
	}
}

func (h *fakeHost) wrong(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.untidy = append(h.untidy, fmt.Sprintf(format, args...))
}

func (h *fakeHost) kills() []int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]int(nil), h.killed...)
}

// The model.

func (h *fakeHost) Info() kernel.Info           { return h.info }
func (h *fakeHost) Prove(context.Context) error { return h.proof }
func (h *fakeHost) RAM() []hostmem.Range        { return h.ram }
func (h *fakeHost) PageSize() uint64            { return 4096 }

func (h *fakeHost) Sysctls() iter.Seq2[kernel.Sysctl, error] { return each(h.sysctls) }
func (h *fakeHost) Cgroups() iter.Seq2[kernel.Cgroup, error] { return each(h.cgroups) }

func each[T any](all []T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for _, x := range all {
			if !yield(x, nil) {
				return
			}
		}
	}
}

func (h *fakeHost) Symbol(name string) (kernel.VirtAddr, error) {
	if va, ok := h.symbols[name]; ok {
		return va, nil
	}
	return 0, fmt.Errorf("symbol %s: %w", name, kernel.ErrNotFound)
}

func (h *fakeHost) ModuleSymbol(module, name string) (kernel.VirtAddr, error) {
	return h.Symbol(module + ":" + name)
}

func (h *fakeHost) PerCPU(name string, cpu int) (kernel.VirtAddr, error) {
	if va, ok := h.perCPU[name]; ok && cpu == 0 {
		return va, nil
	}
	return 0, fmt.Errorf("per-CPU symbol %s: %w", name, kernel.ErrNotFound)
}

func (h *fakeHost) Field(typ, path string) (kernel.Field, error) {
	if f, ok := h.fields[typ+"."+path]; ok {
		return f, nil
	}
	return kernel.Field{}, fmt.Errorf("%s.%s: %w", typ, path, kernel.ErrNotFound)
}

func (h *fakeHost) Sizeof(typ string) (uint64, error) {
	if n, ok := h.sizes[typ]; ok {
		return n, nil
	}
	return 0, fmt.Errorf("size of %s: %w", typ, kernel.ErrNotFound)
}

func (h *fakeHost) Enum(typ, name string) (int64, error) {
	if n, ok := h.enums[typ+"/"+name]; ok {
		return n, nil
	}
	return 0, fmt.Errorf("enum %s %s: %w", typ, name, kernel.ErrNotFound)
}

func (h *fakeHost) Tasks() iter.Seq2[kernel.Task, error] {
	return func(yield func(kernel.Task, error) bool) {
		for _, t := range h.tasks {
			if !yield(t, nil) {
				return
			}
		}
	}
}

func (h *fakeHost) Heartbeat() (kernel.Heartbeat, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.deaf {
		h.beats++
	}
	hb := kernel.Heartbeat{At: time.Now(), Jiffies: uint64(h.beats), CPUs: []kernel.CPU{{ID: 0, Online: true, CurrPID: fakePID, TimerIRQs: uint64(h.beats)}}}
	if h.pulse != nil {
		h.pulse(&hb)
	}
	return hb, nil
}

func (h *fakeHost) Phys(va kernel.VirtAddr) (hostmem.PhysAddr, error) {
	if va < direct || va >= direct+fakeRAM {
		return 0, fmt.Errorf("%v: %w", va, hostmem.ErrNotMapped)
	}
	return hostmem.PhysAddr(va - direct), nil
}

func (h *fakeHost) ReadVirt(va kernel.VirtAddr, b []byte) error {
	pa, err := h.Phys(va)
	if err != nil {
		return err
	}
	_, err = h.mem.ReadAt(b, int64(pa))
	return err
}

// memJournal keeps what is journalled, and can fail.
type memJournal struct {
	mu      sync.Mutex
	kinds   []string
	failAt  int // the n-th record fails, from 1; 0: none
	onWrite func(kind string, v any)
}

var errJournal = errors.New("disk full")

func (j *memJournal) Write(kind string, v any) (uint64, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.onWrite != nil {
		j.onWrite(kind, v)
	}
	if j.failAt != 0 && len(j.kinds)+1 >= j.failAt && kind != "refused" && kind != "outcome" {
		return 0, errJournal
	}
	j.kinds = append(j.kinds, kind)
	return uint64(len(j.kinds)), nil
}
