package kernel

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// beatGap is how far apart two fields may be to be read together: two cache lines.
const beatGap = 128

// beatPlan is where a heartbeat is, as physical addresses: the fields lie still, only what two pointers of each CPU lead
// to is looked up in a second round.
type beatPlan struct {
	err error

	parts []hostmem.Segment // without buffers; where each part goes in one big buffer follows from the order
	sizes []int
	size  int
	rooms sync.Pool // of *beatRoom

	jiffies, online beatField
	cpus            []beatCPU

	nextEvent     uint64 // in clock_event_device
	pidIn, commIn uint64 // in task_struct
	preemptIn     uint64 // in task_struct, where inTask
	inTask        bool
}

// beatField is where in the buffer a field of 8 or fewer bytes is.
type beatField struct{ at, size int }

// beatMore is how many bytes of each CPU the second round of a heartbeat reads: when its tick device fires next, and of its task the PID, the name
// and the preempt count.
const beatMore = 8 + 4 + commLen + 4

type beatCPU struct {
	idler                                                                 string // the name of its idle task
	id                                                                    int
	clock, switches, running, curr, idle, timer, nmi, irqs, preempt, tick beatField
}

func (f beatField) in(b []byte) uint64 {
	switch f.size {
	case 0: // the architecture has no such counter
		return 0
	case 4:
		return uint64(le32(b[f.at:]))
	}
	return le64(b[f.at:])
}

// beatWant is a field that a heartbeat needs, at a virtual address.
type beatWant struct {
	va   VirtAddr
	size int
	to   *beatField
}

func (img *Image) beatPlan(src source) *beatPlan {
	p := &beatPlan{cpus: make([]beatCPU, 0, len(img.perCPU))}
	r := resolver{img: img}
	jiffies := r.symbol("jiffies_64", "jiffies")
	online := r.symbol("__cpu_online_mask")
	p.nextEvent = r.field("clock_event_device", 8, "next_event")
	p.pidIn = r.field("task_struct", 4, "pid")
	p.commIn = r.field("task_struct", commLen, "comm")
	runqueues := r.symbol("runqueues")
	rq := func(path string, size uint64) (VirtAddr, int) {
		return runqueues + VirtAddr(r.field("rq", size, path)), int(size)
	}
	type perCPU struct {
		field func(*beatCPU) *beatField
		va    VirtAddr
		size  int
	}
	var fields []perCPU
	add := func(field func(*beatCPU) *beatField, va VirtAddr, size int) {
		fields = append(fields, perCPU{field, va, size})
	}
	addRQ := func(field func(*beatCPU) *beatField, path string, size uint64) {
		va, n := rq(path, size)
		add(field, va, n)
	}
	addRQ(func(c *beatCPU) *beatField { return &c.clock }, "clock", 8)
	addRQ(func(c *beatCPU) *beatField { return &c.switches }, "nr_switches", 8)
	addRQ(func(c *beatCPU) *beatField { return &c.running }, "nr_running", 4)
	addRQ(func(c *beatCPU) *beatField { return &c.curr }, "curr", 8)
	addRQ(func(c *beatCPU) *beatField { return &c.idle }, "idle", 8)
	arch := func(field func(*beatCPU) *beatField, of []perCPUField) {
		for i, f := range of {
			try := resolver{img: img}
			va := try.symbol(f.symbol)
			offset, err := f.offset(img)
			if err == nil && try.err == nil {
				add(field, va+VirtAddr(offset), int(f.size))
				return
			}
			if i == len(of)-1 {
				r.fail(cmp.Or(try.err, err))
			}
		}
	}
	arch(func(c *beatCPU) *beatField { return &c.timer }, img.arch.timerIRQs)
	arch(func(c *beatCPU) *beatField { return &c.nmi }, img.arch.nmis)
	arch(func(c *beatCPU) *beatField { return &c.preempt }, img.arch.preempt)
	if img.arch.preemptInTask != "" {
		p.inTask, p.preemptIn = true, r.field("task_struct", 4, img.arch.preemptInTask)
	}
	add(func(c *beatCPU) *beatField { return &c.irqs }, r.symbol("kstat")+VirtAddr(r.field("kernel_stat", 8, "irqs_sum")), 8)
	add(func(c *beatCPU) *beatField { return &c.tick },
		r.symbol("tick_cpu_device")+VirtAddr(r.field("tick_device", 8, "evtdev")), 8)
	if r.err != nil {
		p.err = r.err
		return p
	}

	wants := []beatWant{{jiffies, 8, &p.jiffies}}
	mask := (len(img.perCPU) + 63) / 64 * 8
	masks := make([]beatField, mask/8)
	for i := range masks {
		wants = append(wants, beatWant{online + VirtAddr(8*i), 8, &masks[i]})
	}
	for cpu, offset := range img.perCPU {
		if offset == 0 {
			continue
		}
		p.cpus = append(p.cpus, beatCPU{id: cpu, idler: fmt.Sprintf("swapper/%d", cpu)})
		c := &p.cpus[len(p.cpus)-1]
		for _, f := range fields {
			wants = append(wants, beatWant{f.va + offset, f.size, f.field(c)})
		}
	}
	if p.err = p.place(img.space, src, wants); p.err != nil {
		return p
	}
	for i := range masks {
		if masks[i].at != masks[0].at+8*i {
			p.err = fmt.Errorf("the online mask is in pieces: %w", ErrNotSupported)
		}
	}
	p.online = masks[0]
	return p
}

// beatRoom is what a read of a plan's parts needs.
type beatRoom struct {
	b    []byte            // of the parts
	segs []hostmem.Segment // each with its part of b
	more []byte            // of a heartbeat's second round
	then []hostmem.Segment
}

// room returns one, which the caller puts back when nothing refers to it any more.
func (p *beatPlan) room() *beatRoom {
	if r, ok := p.rooms.Get().(*beatRoom); ok {
		return r
	}
	r := &beatRoom{b: make([]byte, p.size), segs: slices.Clone(p.parts), more: make([]byte, len(p.cpus)*beatMore), then: make([]hostmem.Segment, 0, 4*len(p.cpus))}
	at := 0
	for i, n := range p.sizes {
		r.segs[i].Buf = r.b[at : at+n]
		at += n
	}
	return r
}

// place joins fields that are near each other into parts.
func (p *beatPlan) place(space *addressSpace, src source, wants []beatWant) error {
	slices.SortFunc(wants, func(a, b beatWant) int { return cmp.Compare(a.va, b.va) })
	var start VirtAddr // of the current part
	var room uint64    // bytes mapped in one piece from start on
	for _, w := range wants {
		last := len(p.parts) - 1
		offset := uint64(w.va - start)
		if last < 0 || offset > uint64(p.sizes[last]+beatGap) || offset+uint64(w.size) > room {
			pa, n, err := space.translate(src, w.va)
			if err != nil {
				return err
			}
			if n < uint64(w.size) {
				return &CorruptError{"per-CPU area", w.va, "a field is across two mappings"}
			}
			if last >= 0 {
				p.size += p.sizes[last]
			}
			start, room, offset = w.va, n, 0
			p.parts = append(p.parts, hostmem.Segment{Addr: pa})
			p.sizes = append(p.sizes, 0)
			last++
		}
		p.sizes[last] = max(p.sizes[last], int(offset)+w.size)
		*w.to = beatField{p.size + int(offset), w.size}
	}
	p.size += p.sizes[len(p.sizes)-1]
	return nil
}

// Heartbeat takes a sample of the host's progress. It reads past the View's cache: two calls are two samples.
func (v *View) Heartbeat() (Heartbeat, error) {
	p := v.img.beat
	if p.err != nil {
		return Heartbeat{}, fmt.Errorf("take heartbeat: %w", p.err)
	}
	h, err := v.beat(p)
	if err != nil {
		return Heartbeat{}, fmt.Errorf("take heartbeat: %w", err)
	}
	return h, nil
}

func (v *View) beat(p *beatPlan) (Heartbeat, error) {
	room := p.room() // not put back after an error: a read may still be under way
	b := room.b
	h := Heartbeat{At: time.Now()}
	if err := v.readScattered(room.segs); err != nil {
		return h, err
	}
	clocks, err := v.img.times(fresh{v})
	if err != nil {
		return h, err
	}
	h.Mono = clocks.mono
	v.note(func(c *Confidence) {
		c.Clocks++
		c.Retries += clocks.tries
	})
	h.Jiffies = p.jiffies.in(b)
	h.CPUs = make([]CPU, len(v.img.perCPU))
	for i := range h.CPUs {
		h.CPUs[i].ID = i
	}

	// The second round: what each online CPU runs, and when its tick device fires next.
	const each = beatMore
	more, segs := room.more, room.then[:0]
	space := v.img.space
	follow := func(kind string, va VirtAddr, buf []byte) error {
		if !space.valid(va, 1) {
			return &CorruptError{kind, va, "not an address of the kernel"}
		}
		pa, n, err := space.translate(fresh{v}, va)
		if errors.Is(err, ErrNotMapped) || err == nil && n < uint64(len(buf)) {
			return &CorruptError{kind, va, "points to no memory"}
		}
		segs = append(segs, hostmem.Segment{Addr: pa, Buf: buf})
		return err
	}
	for i := range p.cpus {
		f := &p.cpus[i]
		c := &h.CPUs[f.id]
		*c = CPU{
			ID: f.id, Clock: f.clock.in(b), Switches: f.switches.in(b), Running: uint32(f.running.in(b)),
			Curr: VirtAddr(f.curr.in(b)), TimerIRQs: f.timer.in(b), NMIs: f.nmi.in(b), IRQs: f.irqs.in(b),
			Preempt:   uint32(f.preempt.in(b)) & v.img.arch.preemptMask,
			Online:    b[p.online.at+f.id/8]>>(f.id%8)&1 != 0,
			NextEvent: ktimeMax,
		}
		c.Idle = c.Curr == VirtAddr(f.idle.in(b))
		if !c.Online {
			continue
		}
		m := more[i*each : (i+1)*each]
		if dev := VirtAddr(f.tick.in(b)); dev != 0 {
			if err := follow("clock_event_device", dev+VirtAddr(p.nextEvent), m[:8]); err != nil {
				return h, err
			}
		} else {
			binary.LittleEndian.PutUint64(m, ktimeMax)
		}
		if p.inTask {
			if err := follow("task_struct", c.Curr+VirtAddr(p.preemptIn), m[12+commLen:]); err != nil {
				return h, err
			}
		}
		if c.Idle {
			c.CurrComm = f.idler
			continue
		}
		if err := follow("task_struct", c.Curr+VirtAddr(p.pidIn), m[8:12]); err != nil {
			return h, err
		}
		if err := follow("task_struct", c.Curr+VirtAddr(p.commIn), m[12:12+commLen]); err != nil {
			return h, err
		}
	}
	if err := v.readScattered(segs); err != nil {
		if errors.Is(err, hostmem.ErrNotMapped) {
			err = &CorruptError{"runqueues", 0, fmt.Sprintf("a task or a tick device points to no memory (%v)", err)}
		}
		return h, err
	}
	for i := range p.cpus {
		c := &h.CPUs[p.cpus[i].id]
		if !c.Online {
			continue
		}
		m := more[i*each : (i+1)*each]
		c.NextEvent = int64(le64(m))
		if p.inTask {
			c.Preempt = le32(m[12+commLen:]) & v.img.arch.preemptMask
		}
		if !c.Idle {
			// What overwrites a kernel that was reset need not spare its tasks.
			if c.CurrPID = int(int32(le32(m[8:]))); c.CurrPID < 0 || c.CurrPID > maxPID {
				return h, &CorruptError{"task_struct", c.Curr, fmt.Sprintf("CPU %d runs PID %d", c.ID, c.CurrPID)}
			}
			c.CurrComm, _ = cString(m[12 : 12+commLen])
		}
	}
	p.rooms.Put(room)
	return h, nil
}

// maxPID is PID_MAX_LIMIT of include/linux/threads.h on 64-bit machines.
const maxPID = 4 << 20

// ktimeMax is KTIME_MAX: no event is programmed.
const ktimeMax = math.MaxInt64
