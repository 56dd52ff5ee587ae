package heal

import (
	"errors"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	paHandOver, paRunWork, paUntrace, paKeyOff = paFn + 0x500, paFn + 0x580, paFn + 0x600, paFn + 0x680
	paUnlisten, paListener                     = paFn + 0x800, 0x158000
	paReboot, paRebootFn                       = paFn + 0x700, paFn + 0x780
	paOps, paPoint, paUsers                    = 0x152000, 0x156000, 0x157000
	workIdle                                   = 0xfffffffe0 // WORK_STRUCT_NO_POOL of 6.1
	workBehind                                 = 40
)

// static void blk_rq_timed_out_timer(struct timer_list *t), as Debian's 6.12 has it, once ftrace's call is a nop.
var timedOut = append(append([]byte(nil), endbr64...), 0x0f, 0x1f, 0x44, 0, 0, 0x48, 0x8b, 0x35, 0x30, 0x1c, 0x17, 0x02, 0x48, 0x8d, 0x57, workBehind, 0xbf, 0, 0x20, 0, 0, 0xe9, 1, 2, 3, 4)

// worked is a host with workers, a user of ftrace and of a tracepoint, all of strangers', and what its workers' functions do: they return what answer says.
func worked(t *testing.T, answer uint64) (*fakeHost, []kernel.Hook) {
	h := newFakeHost(t)
	h.symbols["no_blink"] = direct + paFn + 0x300
	h.write(paFn+0x300, noBlink)
	for name, at := range map[string]hostmem.PhysAddr{handOver: paHandOver, runWork: paRunWork, unregisterFtrace.name: paUntrace, disableKey.name: paKeyOff, unregisterInput.name: paUnlisten,
		"reboot_work": paReboot, "reboot_work_func": paRebootFn} {
		h.symbols[name] = direct + kernel.VirtAddr(at)
		if name != "reboot_work" {
			h.write(at, noBlink)
		}
	}
	h.write(paHandOver, timedOut)
	h.put64(paReboot, workIdle)
	h.put64(paReboot+8, direct+paReboot+8)
	h.put64(paReboot+16, direct+paReboot+8)
	h.put64(paReboot+24, direct+paRebootFn)
	for name, n := range map[string]uint64{"work_struct": 32, "work_for_cpu": 56, "timer_list": 40, "static_key": 16, "tracepoint_func": 24} {
		h.sizes[name] = n
	}
	for name, f := range map[string]kernel.Field{
		"work_struct.data.counter": {Offset: 0, Size: 8}, "work_struct.entry": {Offset: 8, Size: 16}, "work_struct.func": {Offset: 24, Size: 8},
		"work_for_cpu.work": {Offset: 0, Size: 32}, "work_for_cpu.fn": {Offset: 32, Size: 8}, "work_for_cpu.arg": {Offset: 40, Size: 8}, "work_for_cpu.ret": {Offset: 48, Size: 8},
		"request_queue.timeout": {Offset: 0x100, Size: 40}, "request_queue.timeout_work": {Offset: 0x100 + workBehind, Size: 32},
		"ftrace_ops.func": {Offset: 0, Size: 8}, "ftrace_ops.flags": {Offset: 16, Size: 8},
		"tracepoint.key": {Offset: 8, Size: 16}, "tracepoint.funcs": {Offset: 64, Size: 8}, "static_key.enabled.counter": {Offset: 0, Size: 4},
		"tracepoint_func.func": {Offset: 0, Size: 8}, "input_handler.node": {Offset: 16, Size: 16},
	} {
		h.fields[name] = f
	}
	h.put64(paOps, 0xbad3)
	h.put64(paOps+16, 0x11)
	h.put32(paPoint+8, 1)
	h.put64(paPoint+64, direct+paUsers)
	h.put64(paUsers, 0xbad7)
	h.put64(paListener, 0xbad8)
	h.put64(paListener+8, 0xbad9)
	for _, at := range []hostmem.PhysAddr{paListener + 16, paListener + 24, paListener + 0x200, paListener + 0x208} { // the list has its head and one more
		h.put64(at, direct+uint64(paListener)+map[bool]uint64{true: 0x200, false: 16}[at < paListener+0x200])
	}
	h.onWork = func(fn, arg uint64) uint64 {
		switch {
		case fn == direct+paUntrace && arg == direct+paOps:
			if answer == 0 {
				h.put64(paOps+16, 0x10)
			}
		case fn == direct+paKeyOff && arg == direct+paPoint+8:
			h.put32(paPoint+8, 0)
		case fn == direct+paUnlisten && arg == direct+paListener:
		default:
			h.wrong("worker runs %#x on %#x", fn, arg)
		}
		return answer
	}
	return h, []kernel.Hook{
		{Kind: "ftrace", Record: direct + paOps, Place: "?", Member: "ftrace_ops.func", At: direct + paOps, To: 0xbad3},
		{Kind: "tracepoint", Record: direct + paUsers, Place: "task_rename", Member: "tracepoint_func.func", At: direct + paUsers, To: 0xbad7, Of: direct + paPoint},
		{Kind: "input handler", Record: direct + paListener, Place: "keys", Member: "input_handler.event", At: direct + paListener, To: 0xbad8},
		{Kind: "input handler", Record: direct + paListener, Place: "keys", Member: "input_handler.connect", At: direct + paListener + 8, To: 0xbad9},
		{Kind: "input handler", Record: direct + paListener + 0x100, Place: "kbd", Member: "input_handler.event", At: direct + paListener + 0x100, To: 0xbad8},
	}
}

// timedOutTimer is blk_rq_timed_out_timer with a worker that is there at once.
func (h *fakeHost) timedOutTimer(timer hostmem.PhysAddr) {
	w := timer + workBehind
	list := direct + uint64(w) + 8
	switch {
	case h.get(w, 8) != workIdle:
		h.wrong("work_struct.data is %#x", h.get(w, 8))
	case h.get(w+8, 8) != list || h.get(w+16, 8) != list:
		h.wrong("the work is on a list")
	case h.get(w+24, 8) != direct+paRunWork:
		h.wrong("the work's function is %#x", h.get(w+24, 8))
	}
	h.put64(w, 0x60) // the worker's pool
	if h.onWork != nil {
		h.put64(w+48, h.onWork(h.get(w+32, 8), h.get(w+40, 8)))
	}
}

func unhooked(t *testing.T, h *fakeHost, hooks []kernel.Hook, i int) (Outcome, error) {
	t.Helper()
	h.run()
	p, err := planUnhook(h, detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: detect.HookKey(hooks[i])}, hooks)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	out, err := unhooker(t, h).Apply(t.Context(), p, "test")
	if len(h.untidy) > 0 {
		t.Errorf("the host has found: %v", h.untidy)
	}
	return out, err
}

// mailboxes returns how many pages of the host's can be mailboxes: one less while something lies in one.
func mailboxes(t *testing.T, h *fakeHost) int {
	t.Helper()
	boxes, err := findMailboxes(h, 256)
	if err != nil {
		t.Fatal(err)
	}
	return len(boxes)
}

func TestWorker(t *testing.T) {
	for _, tt := range []struct {
		name       string
		hook       int
		change     func(h *fakeHost)
		flags, key uint64 // afterwards
		user       uint64
		calls      int
	}{
		{"ftrace", 0, func(*fakeHost) {}, 0x10, 1, 0xbad7, 1},
		{"ftrace on a kernel without IBT", 0, func(h *fakeHost) { h.write(paUntrace, []byte{0x41, 0x57, 0x41, 0x56}) }, 0x10, 1, 0xbad7, 1},
		{"a tracepoint's only user", 1, func(*fakeHost) {}, 0x11, 0, direct + paFn + 0x300, 1},
		{"a tracepoint's user beside others", 1, func(h *fakeHost) { h.put64(paUsers+24, 0x900d) }, 0x11, 1, direct + paFn + 0x300, 0},
		{"a listener to keys", 2, func(*fakeHost) {}, 0x11, 1, 0xbad7, 1},
		{"a tracepoint that is off", 1, func(h *fakeHost) { h.put32(paPoint+8, 0) }, 0x11, 0, direct + paFn + 0x300, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, hooks := worked(t, 0)
			tt.change(h)
			free := mailboxes(t, h)
			out, err := unhooked(t, h, hooks, tt.hook)
			if err != nil || !out.Verified || len(out.Left) > 0 || len(out.HostFunctions) != tt.calls {
				t.Fatalf("%+v, %v", out, err)
			}
			for _, f := range out.HostFunctions {
				if !f.Confirmed || !strings.Contains(f.Context, "worker") {
					t.Errorf("%+v", f)
				}
			}
			if flags, key, user := h.get(paOps+16, 8), h.get(paPoint+8, 4), h.get(paUsers, 8); flags != tt.flags || key != tt.key || user != tt.user {
				t.Errorf("ftrace_ops.flags is %#x, the key %d, the user %#x", flags, key, user)
			}
			if now := mailboxes(t, h); now != free {
				t.Errorf("of %d mailboxes %d are left", free, now)
			}
		})
	}
}

// What the function says is told; the mailbox is clean all the same.
func TestWorkerFails(t *testing.T) {
	h, hooks := worked(t, 0xffffffed) // -ENODEV, as an int comes back
	out, err := unhooked(t, h, hooks, 0)
	if !errors.Is(err, ErrStale) || !strings.Contains(err.Error(), "returned an error") || len(out.HostFunctions) != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	x := unhooker(t, h)
	if left, err := x.Sweep(t.Context(), out.Plan); err != nil || len(left) > 0 {
		t.Errorf("Sweep() = %v, %v", left, err)
	}
}

// While a worker is still at it, nothing takes from it what it works with: neither the failed repair nor what sweeps after it.
func TestWorkerStaysWhileInUse(t *testing.T) {
	h, hooks := worked(t, 0)
	done := h.onWork
	h.onWork = nil // the worker sleeps in the function
	h.run()
	p, err := planUnhook(h, detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: detect.HookKey(hooks[0])}, hooks)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	var work Step
	for i, s := range p.Steps {
		if s.Runs {
			p.Steps[i].Timeout = 50e6
		}
		if s.Op == OpWrite && !s.Cleanup {
			work = s
		}
	}
	x := unhooker(t, h)
	out, err := x.Apply(t.Context(), p, "test")
	if !errors.Is(err, ErrNoEffect) || len(out.Left) == 0 || out.Undone {
		t.Fatalf("%+v, %v", out, err)
	}
	left, err := x.Sweep(t.Context(), p)
	if err != nil || len(left) != 1 || h.get(work.Addr+workBehind+40, 8) != direct+paOps {
		t.Fatalf("Sweep() = %v, %v; the argument is %#x", left, err, h.get(work.Addr+workBehind+40, 8))
	}
	w := work.Addr + workBehind
	h.put64(w+48, done(h.get(w+32, 8), h.get(w+40, 8)))
	if left, err := x.Sweep(t.Context(), p); err != nil || len(left) > 0 {
		t.Errorf("Sweep() = %v, %v", left, err)
	}
}

func TestWorkerRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		hook   int
		change func(h *fakeHost)
		want   error
	}{
		{"ftrace has let go of it", 0, func(h *fakeHost) { h.put64(paOps+16, 0x10) }, ErrGone},
		{"another table of users", 1, func(h *fakeHost) { h.put64(paPoint+64, direct+paUsers+0x100) }, ErrGone},
		{"a table without an end", 1, func(h *fakeHost) {
			for i := range hostmem.PhysAddr(2 * maxUsers) {
				h.put64(paUsers+24*i, 0xbad7)
			}
		}, kernel.ErrTorn},
		{"a key that is on twice", 1, func(h *fakeHost) { h.put32(paPoint+8, 2) }, kernel.ErrNotSupported},
		{"a handler of the kernel's, of which a function was changed before", 4, func(*fakeHost) {}, kernel.ErrNotSupported},
		{"a listener in no list", 2, func(h *fakeHost) {
			h.put64(paListener+16, direct+paListener+16)
			h.put64(paListener+24, direct+paListener+16)
		}, kernel.ErrNotSupported},
		{"a listener taken off its list", 2, func(h *fakeHost) { h.put64(paListener+0x200, direct+paListener+0x200) }, kernel.ErrNotSupported},
		{"a listener whose links are poison", 2, func(h *fakeHost) { h.put64(paListener+16, 0xdead000000000100) }, hostmem.ErrNotMapped},
		{"a kernel without input", 2, func(h *fakeHost) { delete(h.symbols, unregisterInput.name) }, kernel.ErrNotFound},
		{"the host reboots", 0, func(h *fakeHost) { h.put64(paReboot, workIdle|workPending) }, ErrNotYet},
		{"another work_struct", 0, func(h *fakeHost) { h.put64(paReboot+8, direct) }, kernel.ErrNotSupported},
		{"another request_queue", 0, func(h *fakeHost) { h.fields["request_queue.timeout_work"] = kernel.Field{Offset: 0x100 + 48, Size: 32} }, kernel.ErrNotSupported},
		{"the work over the timer", 0, func(h *fakeHost) { h.fields["request_queue.timeout_work"] = kernel.Field{Offset: 0x100 + 16, Size: 32} }, kernel.ErrNotSupported},
		{"a sealed function", 0, func(h *fakeHost) { h.write(paUntrace, sealed) }, kernel.ErrNotSupported},
		{"a function that is led elsewhere", 0, func(h *fakeHost) { delete(h.symbols, "ibt_restore"); h.write(paUntrace, []byte{0xe9}) }, kernel.ErrNotSupported},
		{"without the function", 0, func(h *fakeHost) { delete(h.symbols, unregisterFtrace.name) }, kernel.ErrNotFound},
		{"another architecture", 0, func(h *fakeHost) { h.info.Arch = archAArch64 }, kernel.ErrNotSupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, hooks := worked(t, 0)
			h.symbols["ibt_restore"] = direct + paFn + 0x7c0
			tt.change(h)
			h.run()
			_, err := planUnhook(h, detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: detect.HookKey(hooks[tt.hook])}, hooks)
			if !errors.Is(err, tt.want) {
				t.Errorf("planUnhook() = %v; want %v", err, tt.want)
			}
		})
	}
}

// Only what tidies up may be written over whatever is there.
func TestOursIsForCleanup(t *testing.T) {
	h, hooks := worked(t, 0)
	h.run()
	p, err := planUnhook(h, detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: detect.HookKey(hooks[0])}, hooks)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	for i := range p.Steps {
		p.Steps[i].Cleanup = p.Steps[i].Cleanup && !p.Steps[i].Ours
	}
	if out, err := unhooker(t, h).Apply(t.Context(), p, "test"); !errors.Is(err, ErrInvalidPlan) || out.Stores > 0 {
		t.Errorf("%+v, %v", out, err)
	}
}
