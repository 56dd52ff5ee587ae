package kernel

import "fmt"

// frameWalk follows the frame records of a stack: AArch64 kernels keep frame pointers (arch/arm64/kernel/stacktrace.c;
// Procedure Call Standard for the Arm 64-bit Architecture, 6.4.6).
type frameWalk struct {
	v        *View
	lo, hi   VirtAddr // the part of the stack that is in use
	stack    []byte
	pc, fp   VirtAddr
	last     VirtAddr // the final record: that in the pt_regs at the stack's top
	pac      VirtAddr // bits of a return address that may hold its signature
	low, top VirtAddr // text of the image
	// Where an exception interrupted the kernel: since v6.14 the frame record in its pt_regs is of zeros with a kind behind it, and the
	// registers tell how it goes on (arch/arm64/include/asm/stacktrace/frame.h).
	kind, regsPC, regsFP uint64 // from a frame record on; kind is 0 in a kernel that has none
	frames               []VirtAddr
	reached              VirtAddr // up to where the stack was unwound
}

func (v *View) frameRecords(t Task) (stackWalk, error) {
	r := resolver{img: v.img}
	w := &frameWalk{v: v, low: r.symbol("_stext"), top: r.symbol("_etext")}
	task := r.shape("task_struct", "stack", "thread.cpu_context.fp", "thread.cpu_context.sp", "thread.cpu_context.pc", "stack_vm_area?")
	area := r.shape("vm_struct", "addr", "nr_pages")
	regsSize, record := r.size("pt_regs"), r.field("pt_regs", 0, "stackframe")
	if r.err != nil {
		return nil, r.err
	}
	if f, err := v.img.types.field("pt_regs", "stackframe.type"); err == nil && f.Size == 8 {
		regs, pc := r.field("pt_regs", 0, "regs"), r.field("pt_regs", 8, "pc")
		if r.err != nil {
			return nil, r.err
		}
		w.kind, w.regsFP, w.regsPC = f.Offset-record, regs+29*8-record, pc-record // these may wrap around: the registers lie before the record
	}
	if mask, ok := v.img.note.number("KERNELPACMASK"); ok {
		w.pac = VirtAddr(mask)
	}
	s, err := v.thing(task, t.Addr)
	if err != nil {
		return nil, err
	}
	if w.lo = s.ptr("stack"); w.lo == 0 {
		return nil, fmt.Errorf("stack of thread %d, which has ended: %w", t.PID, ErrNotFound)
	}
	p := s.ptr("stack_vm_area")
	if p == 0 {
		return nil, fmt.Errorf("stack of thread %d is not in vmalloc space: %w", t.PID, ErrNotSupported)
	}
	a, err := v.thing(area, p)
	if err != nil {
		return nil, err
	}
	size := a.num("nr_pages") * v.img.pageSize
	if a.ptr("addr") != w.lo || a.num("nr_pages") > maxStack/v.img.pageSize || size < 4096 || uint64(w.lo)%4096 != 0 || !v.img.space.valid(w.lo, 8) {
		return nil, a.corrupt("%d pages at %v for a stack at %v", a.num("nr_pages"), a.ptr("addr"), w.lo)
	}
	w.hi = w.lo + VirtAddr(size)
	w.last = w.hi - VirtAddr(regsSize) + VirtAddr(record)
	w.pc, w.fp, w.reached = s.ptr("thread.cpu_context.pc"), s.ptr("thread.cpu_context.fp"), s.ptr("thread.cpu_context.sp")
	if w.reached < w.lo || w.reached >= w.hi || w.reached%8 != 0 {
		return nil, s.corrupt("stack pointer %v is not in the stack at %v", w.reached, w.lo)
	}
	w.lo = w.reached
	w.stack = make([]byte, w.hi-w.lo)
	if err := v.img.space.object(v, "stack", w.lo, w.stack); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *frameWalk) run() error {
	for len(w.frames) < maxFrames {
		w.frames = append(w.frames, w.pc)
		if w.fp == w.last {
			return nil
		}
		if w.fp < w.reached || w.fp+16 > w.hi || w.fp%8 != 0 {
			return &CorruptError{"frame record", w.fp, fmt.Sprintf("is beyond %v to %v", w.reached, w.hi)}
		}
		b := w.stack[w.fp-w.lo:]
		w.reached = w.fp + 16
		next := VirtAddr(le64(b))
		w.pc = VirtAddr(le64(b[8:])) | w.pac
		if next == 0 && w.kind != 0 && w.word(w.fp+VirtAddr(w.kind)) == framePtRegs {
			w.fp, w.pc = VirtAddr(w.word(w.fp+VirtAddr(w.regsFP))), VirtAddr(w.word(w.fp+VirtAddr(w.regsPC)))
			continue
		}
		w.fp = next
		if next == 0 { // the first task and kernel threads of some releases end so
			return nil
		}
	}
	return &CorruptError{"stack", w.lo, "has too many frames"}
}

// framePtRegs is FRAME_META_TYPE_PT_REGS.
const framePtRegs = 2

// word returns a word of the stack; 0 beyond it.
func (w *frameWalk) word(at VirtAddr) uint64 {
	if at < w.lo || at+8 > w.hi {
		return 0
	}
	return le64(w.stack[at-w.lo:])
}

func (w *frameWalk) found() []VirtAddr { return w.frames }

func (w *frameWalk) scan() []VirtAddr {
	var all []VirtAddr
	for at := w.reached; at+8 <= w.hi && len(all) < maxFrames; at += 8 {
		if pc := VirtAddr(le64(w.stack[at-w.lo:])) | w.pac; pc >= w.low && pc < w.top {
			all = append(all, pc)
		}
	}
	return all
}
