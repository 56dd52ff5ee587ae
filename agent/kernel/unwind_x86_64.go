package kernel

import (
	"fmt"
	"sort"
)

// unwinder follows the frames of a stack by the ORC tables that the kernel carries for that (arch/x86/kernel/unwind_orc.c,
// Documentation/arch/x86/orc-unwinder.rst).
type unwinder struct {
	*orcPlan
	v          *View
	lo, hi     VirtAddr // the part of the stack that is in use
	stack      []byte
	ip, sp, bp VirtAddr
	signal     bool // ip is where an interrupt hit, not a return address

	frames []VirtAddr
	reg    orcRegisters
}

// orcPlan is what unwinding needs to know of a kernel.
type orcPlan struct {
	err                  error
	task, area, inactive *shape
	inactiveSize         uint64
	firstSize            uint64 // of the stack of init_task, zero if it is not known
	entry                *shape
	entrySize            uint64
	regIP, regSP         uint64 // in pt_regs
	regBP, regCS         uint64
	call, regs, partial  uint64 // ORC_TYPE_…
	endType, noType      int64
	ips, stop, entries   VirtAddr
	stext, etext         VirtAddr
	module               *shape
	moduleErr            error
}

func (img *Image) orcPlan() *orcPlan {
	img.orc.once.Do(func() {
		r := resolver{img: img}
		p := &orcPlan{noType: -1, endType: -1}
		p.task = r.shape("task_struct", "stack", "thread.sp", "stack_vm_area?")
		p.area = r.shape("vm_struct", "addr", "nr_pages")
		p.inactive = r.shape("inactive_task_frame", "bp", "ret_addr")
		p.inactiveSize = r.size("inactive_task_frame")
		p.stext, p.etext = r.symbol("_stext"), r.symbol("_etext")
		p.ips, p.stop, p.entries = r.symbol("__start_orc_unwind_ip"), r.symbol("__stop_orc_unwind_ip"), r.symbol("__start_orc_unwind")
		p.entry = r.shape("orc_entry", "sp_offset", "bp_offset", "sp_reg", "bp_reg", "type", "end?")
		p.entrySize = r.size("orc_entry")
		p.regIP, p.regSP = r.field("pt_regs", 8, "ip"), r.field("pt_regs", 8, "sp")
		p.regBP, p.regCS = r.field("pt_regs", 8, "bp"), r.field("pt_regs", 0, "cs")
		// Since Linux commit fb799447ae29 ("x86,objtool: Split UNWIND_HINT_EMPTY in two") (in v6.4) the end of the stack is a
		// type, as is the undefined; before, it was a bit.
		if _, ok := p.entry.fields["end"]; ok {
			p.call, p.regs, p.partial = 0, 1, 2
		} else {
			p.noType, p.endType, p.call, p.regs, p.partial = 0, 1, 2, 3, 4
		}
		p.err = r.err
		first := resolver{img: img}
		if n := first.symbol("__end_init_stack", "__end_init_task") - first.symbol("init_stack"); first.err == nil {
			p.firstSize = uint64(n)
		}
		modules := resolver{img: img}
		p.module = modules.shape("module", "arch.num_orcs", "arch.orc_unwind_ip", "arch.orc_unwind")
		p.moduleErr = modules.err
		img.orc.plan = p
	})
	return img.orc.plan
}

// orcRegisters are the numbers by which an ORC entry names what a frame is relative to, arch/x86/include/asm/orc_types.h. They
// are preprocessor constants, which no type tells: which of the known sets is in use is seen by how functions begin.
type orcRegisters struct {
	undefined, prevSP, bp, sp uint64
	bpIndirect, spIndirect    uint64
	indirect                  bool // the last two are known
}

var (
	orcRegisters414 = orcRegisters{0, 1, 4, 5, 8, 9, true}                // since v4.14
	orcRegisters70  = orcRegisters{undefined: 0, prevSP: 8, bp: 4, sp: 3} // seen in v7.2; its indirect ones were not
)

func (v *View) unwinder(t Task) (*unwinder, error) {
	u := &unwinder{v: v, orcPlan: v.img.orcPlan()}
	if u.err != nil {
		return nil, u.err
	}
	s, err := v.thing(u.task, t.Addr)
	if err != nil {
		return nil, err
	}
	u.lo = s.ptr("stack")
	if u.lo == 0 {
		return nil, fmt.Errorf("stack of thread %d, which has ended: %w", t.PID, ErrNotFound)
	}
	// The size is a constant of the source. What holds the stack tells it; so does the room between the symbols of the first.
	threadSize := u.firstSize
	if p := s.ptr("stack_vm_area"); p != 0 {
		a, err := v.thing(u.area, p)
		if err != nil {
			return nil, err
		}
		if a.ptr("addr") != u.lo || a.num("nr_pages") > maxStack/v.img.pageSize {
			return nil, a.corrupt("%d pages at %v for a stack at %v", a.num("nr_pages"), a.ptr("addr"), u.lo)
		}
		threadSize = a.num("nr_pages") * v.img.pageSize
	} else if threadSize == 0 {
		return nil, fmt.Errorf("size of the stack of thread %d: %w", t.PID, ErrNotSupported)
	}
	if threadSize > maxStack || threadSize < 4096 || uint64(u.lo)%4096 != 0 || !v.img.space.valid(u.lo, 8) {
		return nil, s.corrupt("stack of %d bytes at %v", threadSize, u.lo)
	}
	u.hi = u.lo + VirtAddr(threadSize)
	sp := s.ptr("thread.sp")
	if sp < u.lo || sp+VirtAddr(u.inactiveSize) > u.hi || sp%8 != 0 {
		return nil, s.corrupt("stack pointer %v is not in the stack at %v", sp, u.lo)
	}
	u.lo = sp
	u.stack = make([]byte, u.hi-u.lo)
	if err := v.img.space.object(v, "stack", u.lo, u.stack); err != nil {
		return nil, err
	}
	frame, err := v.thing(u.inactive, sp)
	if err != nil {
		return nil, err
	}
	u.ip, u.bp, u.sp = frame.ptr("ret_addr"), frame.ptr("bp"), sp+VirtAddr(u.inactiveSize)
	if u.reg, err = v.orcRegisters(u.orcPlan); err != nil {
		return nil, err
	}
	return u, nil
}

// orcRegisters returns the numbers of the registers, which it finds out once in a pass.
func (v *View) orcRegisters(p *orcPlan) (orcRegisters, error) {
	v.mu.Lock()
	known := v.orc
	v.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	reg, err := p.registers(v)
	if err == nil {
		v.mu.Lock()
		v.orc = &reg
		v.mu.Unlock()
	}
	return reg, err
}

// registers finds out the numbers of the registers: where a function begins, the frame is 8 bytes above the stack pointer and
// the frame pointer is untouched. The first part of the table has many such entries.
func (p *orcPlan) registers(v *View) (orcRegisters, error) {
	const sample, enough = 512, 16
	n := min(sample, uint64(p.stop-p.ips)/4)
	b := make([]byte, n*p.entrySize)
	if err := v.img.space.object(v, "orc_entry", p.entries, b); err != nil {
		return orcRegisters{}, err
	}
	votes := make(map[uint64]int)
	for ; len(b) > 0; b = b[p.entrySize:] {
		e := thing{p.entry, object{span: span{0, p.entrySize}, b: b}}
		if e.num("sp_offset") == 8 && e.num("bp_offset") == 0 {
			votes[e.num("sp_reg")]++
		}
	}
	total := 0
	for _, v := range votes {
		total += v
	}
	for _, r := range []orcRegisters{orcRegisters414, orcRegisters70} {
		if votes[r.sp] >= enough && 10*votes[r.sp] >= 9*total {
			return r, nil
		}
	}
	return orcRegisters{}, fmt.Errorf("the stack pointer's number in ORC entries cannot be told (%v): %w", votes, ErrNotSupported)
}

func (u *unwinder) found() []VirtAddr { return u.frames }

// word reads from the stack.
func (u *unwinder) word(at VirtAddr) (VirtAddr, error) {
	if at < u.lo || at+8 > u.hi || at%8 != 0 {
		return 0, &CorruptError{"stack", at, fmt.Sprintf("is beyond %v to %v", u.lo, u.hi)}
	}
	return VirtAddr(le64(u.stack[at-u.lo:])), nil
}

// run unwinds to the end of the stack, else it says what is in the way.
func (u *unwinder) run() error {
	for len(u.frames) < maxFrames {
		u.frames = append(u.frames, u.ip)
		done, err := u.next()
		if done || err != nil {
			return err
		}
	}
	return &CorruptError{"stack", u.lo, fmt.Sprintf("more than %d frames", maxFrames)}
}

// next goes from a frame to the one that called it; done is true if there is none.
func (u *unwinder) next() (done bool, err error) {
	at := u.ip
	if !u.signal {
		at-- // a call may be the last instruction of a function
	}
	e, err := u.find(at)
	if err != nil {
		return false, err
	}
	typ := e.num("type")
	if e.num("end") != 0 || int64(typ) == u.endType {
		return true, nil
	}
	if int64(typ) == u.noType {
		return false, fmt.Errorf("ORC entry of %v: %w", u.ip, ErrNotFound)
	}
	offset := VirtAddr(int64(int16(e.num("sp_offset"))))
	var cfa VirtAddr
	switch reg := e.num("sp_reg"); {
	case reg == u.reg.sp:
		cfa = u.sp + offset
	case reg == u.reg.bp:
		cfa = u.bp + offset
	case reg == u.reg.spIndirect && u.reg.indirect:
		if cfa, err = u.word(u.sp); err != nil {
			return false, err
		}
		cfa += offset
	case reg == u.reg.bpIndirect && u.reg.indirect:
		if cfa, err = u.word(u.bp + offset); err != nil {
			return false, err
		}
	default:
		return false, fmt.Errorf("frame of %v is at register %d: %w", u.ip, reg, ErrNotSupported)
	}
	was := u.sp
	bp := u.bp
	var regs bool
	switch typ {
	case u.call:
		if u.ip, err = u.word(cfa - 8); err != nil {
			return false, err
		}
		u.sp, u.signal = cfa, false
	case u.regs, u.partial:
		base := cfa
		if typ == u.partial {
			base = cfa - VirtAddr(u.regIP) // only what the hardware pushed is there
		}
		cs, err := u.word(base + VirtAddr(u.regCS&^7))
		if err != nil {
			return false, err
		}
		if cs&3 != 0 {
			return true, nil // came from user space
		}
		if u.ip, err = u.word(base + VirtAddr(u.regIP)); err != nil {
			return false, err
		}
		if u.sp, err = u.word(base + VirtAddr(u.regSP)); err != nil {
			return false, err
		}
		if regs = typ == u.regs; regs {
			if bp, err = u.word(base + VirtAddr(u.regBP)); err != nil {
				return false, err
			}
		}
		u.signal = true
	default:
		return false, fmt.Errorf("ORC entry of type %d: %w", typ, ErrNotSupported)
	}
	offset = VirtAddr(int64(int16(e.num("bp_offset"))))
	switch e.num("bp_reg") {
	case u.reg.undefined:
		u.bp = bp
	case u.reg.prevSP:
		if u.bp, err = u.word(cfa + offset); err != nil {
			return false, err
		}
	case u.reg.bp:
		if u.bp, err = u.word(u.bp + offset); err != nil {
			return false, err
		}
	default:
		return false, fmt.Errorf("frame pointer of %v is at register %d: %w", u.ip, e.num("bp_reg"), ErrNotSupported)
	}
	if u.sp <= was || u.sp > u.hi {
		return false, &CorruptError{"stack", u.sp, fmt.Sprintf("frame after %v, of a stack that ends at %v", was, u.hi)}
	}
	return false, nil
}

// find returns the ORC entry of a code address: of the kernel image or of a module.
func (u *unwinder) find(at VirtAddr) (thing, error) {
	if at >= u.stext && at < u.etext {
		if u.stop <= u.ips || (u.stop-u.ips)%4 != 0 || u.stop-u.ips > 4*maxOrc {
			return thing{}, &CorruptError{"__start_orc_unwind_ip", u.ips, fmt.Sprintf("table ends at %v", u.stop)}
		}
		return u.search(at, u.ips, u.entries, int(u.stop-u.ips)/4)
	}
	if u.moduleErr != nil {
		return thing{}, u.moduleErr
	}
	m, err := u.v.moduleAt(at)
	if err != nil {
		return thing{}, err
	}
	t, err := u.v.thing(u.module, m.Addr)
	if err != nil {
		return thing{}, err
	}
	n := t.num("arch.num_orcs")
	if n > maxOrc {
		return thing{}, t.corrupt("%d ORC entries", n)
	}
	return u.search(at, t.ptr("arch.orc_unwind_ip"), t.ptr("arch.orc_unwind"), int(n))
}

// search finds the last of n entries that begins at or before an address. Each address in the table is relative to its place.
func (u *unwinder) search(at, ips, entries VirtAddr, n int) (thing, error) {
	var err error
	i := sort.Search(n, func(i int) bool {
		place := ips + VirtAddr(4*i)
		d, e := u.v.Uint32(place)
		if e != nil {
			err = e
		}
		return place+VirtAddr(int64(int32(d))) > at
	})
	if err != nil {
		return thing{}, err
	}
	if i == 0 {
		return thing{}, fmt.Errorf("ORC entry of %v: %w", at, ErrNotFound)
	}
	return u.v.thing(u.entry, entries+VirtAddr(uint64(i-1)*u.entrySize))
}

// scan returns the words from where the unwinding came to an end on that are addresses of the kernel's code.
func (u *unwinder) scan() (all []VirtAddr) {
	for at := (u.sp + 7) &^ 7; at >= u.lo && at+8 <= u.hi && len(all) < maxFrames; at += 8 {
		if w, err := u.word(at); err == nil && w >= u.stext && w < u.etext {
			all = append(all, w)
		}
	}
	return all
}
