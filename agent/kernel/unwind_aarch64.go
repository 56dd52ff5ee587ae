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
	frames   []VirtAddr
	reached  VirtAddr // up to where the stack was unwound
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
		w.fp = next
		if next == 0 { // the first task and kernel threads of some releases end so
			return nil
		}
	}
	return &CorruptError{"stack", w.lo, "has too many frames"}
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
