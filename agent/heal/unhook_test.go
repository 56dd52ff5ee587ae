package heal

import (
	"errors"
	"slices"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// hooked is a host with a kprobe and a kretprobe of strangers', and one that a user of ftrace has; its no_blink lies behind posix_timer_fn.
func hooked(t *testing.T, code []byte) (*fakeHost, []kernel.Hook) {
	h := newFakeHost(t)
	h.symbols["no_blink"] = direct + paFn + 0x300
	h.write(paFn+0x300, code)
	hooks := []kernel.Hook{
		{Kind: "kprobe", Record: direct + 0x150000, Place: "filldir64", Member: "kprobe.pre_handler", At: direct + 0x150040, To: 0xbad0},
		{Kind: "kprobe", Record: direct + 0x150000, Place: "filldir64", Member: "kprobe.post_handler", At: direct + 0x150048, To: 0xbad1},
		{Kind: "kretprobe", Record: direct + 0x151000, Place: "commit_creds", Member: "kretprobe.handler", At: direct + 0x151060, To: 0xbad2},
		{Kind: "notifier", Record: direct + 0x153000, Place: "module_notify_list", Member: "notifier_block.notifier_call", At: direct + 0x153000, To: 0xbad4},
		{Kind: "packet filter", Record: direct + 0x154008, Place: "ipv4 LOCAL_OUT", Member: "nf_hook_entry.hook", At: direct + 0x154008, To: 0xbad5},
		{Kind: "line discipline", Record: direct + 0x155000, Place: "n_tty", Member: "tty_ldisc_ops.receive_buf2", At: direct + 0x155000, To: 0xbad6},
		{Kind: "ftrace", Record: direct + 0x152000, Place: "?", Member: "ftrace_ops.func", At: direct + 0x152000, To: 0xbad3},
	}
	h.put64(0x150040, 0xbad0)
	h.put64(0x150048, 0xbad1)
	h.put64(0x151060, 0xbad2)
	h.put64(0x152000, 0xbad3)
	h.put64(0x153000, 0xbad4)
	h.put64(0x154008, 0xbad5)
	h.symbols["accept_all"] = direct + paFn + 0x400
	h.write(paFn+0x400, acceptAll)
	return h, hooks
}

// static long no_blink(int state) { return 0; }, as Debian's 6.1 and 6.12 have it.
var noBlink = append(append([]byte(nil), endbr64...), 0x0f, 0x1f, 0x44, 0x00, 0x00, 0x31, 0xc0, 0xe9, 1, 2, 3, 4)

// static unsigned int accept_all(...) { return NF_ACCEPT; }, as Debian's 6.1 and 6.12 have it.
var acceptAll = append(append([]byte(nil), endbr64...), 0x0f, 0x1f, 0x44, 0x00, 0x00, 0xb8, 1, 0, 0, 0, 0xe9, 1, 2, 3, 4)

// unhooker is an executor that may unhook.
func unhooker(t *testing.T, h *fakeHost) *Executor {
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, permit(UnhookProbe))
	return NewExecutor(o)
}

func TestUnhook(t *testing.T) {
	const nothing, accept = direct + paFn + 0x300, direct + paFn + 0x400
	for _, tt := range []struct {
		hook   int
		stores int
		want   [5]uint64 // of two kprobes, a kretprobe, a notifier and a filter
	}{
		{0, 2, [5]uint64{nothing, nothing, 0xbad2, 0xbad4, 0xbad5}},
		{2, 1, [5]uint64{0xbad0, 0xbad1, nothing, 0xbad4, 0xbad5}},
		{3, 1, [5]uint64{0xbad0, 0xbad1, 0xbad2, nothing, 0xbad5}},
		{4, 1, [5]uint64{0xbad0, 0xbad1, 0xbad2, 0xbad4, accept}},
	} {
		h, hooks := hooked(t, noBlink)
		p, err := planUnhook(h, detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: detect.HookKey(hooks[tt.hook])}, hooks)
		if err != nil {
			t.Fatal(err)
		}
		p.ID = "plan-1"
		out, err := unhooker(t, h).Apply(t.Context(), p, "test")
		if err != nil || !out.Verified || out.Stores != tt.stores || !out.Atomic {
			t.Fatalf("%s: %+v, %v", hooks[tt.hook].Kind, out, err)
		}
		if got := [5]uint64{h.get(0x150040, 8), h.get(0x150048, 8), h.get(0x151060, 8), h.get(0x153000, 8), h.get(0x154008, 8)}; got != tt.want {
			t.Errorf("%s: the handlers are %#x", hooks[tt.hook].Kind, got)
		}
	}
}

// What is known to have been the kernel's own before is put back, if a function is there still.
func TestUnhookPutsBack(t *testing.T) {
	h, hooks := hooked(t, noBlink)
	tty := &hooks[5]
	h.put64(0x155000, 0xbad6)
	tty.Was = direct + paFn + 0x300
	f := detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: detect.HookKey(*tty)}
	p, err := planUnhook(h, f, hooks)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	out, err := unhooker(t, h).Apply(t.Context(), p, "test")
	if err != nil || !out.Verified || out.Stores != 1 || h.get(0x155000, 8) != uint64(tty.Was) {
		t.Fatalf("%+v, %v: %#x", out, err, h.get(0x155000, 8))
	}
	h.put64(0x155000, 0xbad6)
	h.write(paFn+0x300, []byte{0xcc, 0xcc, 0xcc, 0xcc}) // the module that it was in has left
	if _, err := planUnhook(h, f, hooks); !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("planUnhook() = %v where no function is", err)
	}
	if out, err := unhooker(t, h).Apply(t.Context(), p, "test"); !errors.Is(err, ErrMismatch) || out.Stores != 0 {
		t.Errorf("%+v, %v where no function is by now", out, err)
	}
}

// An eBPF program is called where its code begins, whichever way the kernel's releases begin it.
func TestUnhookProgram(t *testing.T) {
	frame := []byte{0x55, 0x48, 0x89, 0xe5, 0x48, 0x81, 0xec, 8, 0, 0, 0}
	for _, tt := range []struct {
		name string
		code []byte
		ok   bool
	}{
		{"5.10", slices.Concat([]byte{0x0f, 0x1f, 0x44, 0, 0, 0x66, 0x90}, frame), true},
		{"counts tail calls", slices.Concat([]byte{0x0f, 0x1f, 0x44, 0, 0, 0x31, 0xc0}, frame), true},
		{"6.12", slices.Concat(endbr64, []byte{0x0f, 0x1f, 0x44, 0, 0, 0x0f, 0x1f, 0}, frame), true},
		{"traced", slices.Concat(endbr64, []byte{0xe8, 1, 2, 3, 4, 0x48, 0x31, 0xc0}, frame), true},
		{"without a frame", slices.Concat(endbr64, []byte{0x0f, 0x1f, 0x44, 0, 0, 0x66, 0x90, 0xc3}), false},
		{"a function, and no program", noBlink, false},
		{"a jump elsewhere", slices.Concat([]byte{0xe9, 1, 2, 3, 4, 0x66, 0x90}, frame), false},
	} {
		h, _ := hooked(t, noBlink)
		hooks := []kernel.Hook{{Kind: "eBPF program", Record: direct + 0x156000, Place: "x (3)", Member: "bpf_prog.bpf_func", At: direct + 0x156030, To: 0xbad7, Was: direct + paFn + 0x500}}
		h.put64(0x156030, 0xbad7)
		h.write(paFn+0x500, tt.code)
		p, err := planUnhook(h, detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: detect.HookKey(hooks[0])}, hooks)
		if !tt.ok {
			if !errors.Is(err, kernel.ErrNotSupported) {
				t.Errorf("%s: %v; want that it is refused", tt.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		p.ID = "plan-1"
		if out, err := unhooker(t, h).Apply(t.Context(), p, "test"); err != nil || !out.Verified || out.Stores != 1 {
			t.Errorf("%s: %+v, %v", tt.name, out, err)
		}
		if got := kernel.VirtAddr(h.get(0x156030, 8)); got != direct+paFn+0x500 {
			t.Errorf("%s: the program is called at %v", tt.name, got)
		}
	}
}

// Another handler that has been put there meanwhile is not touched, and neither is the one that was put out of use before.
func TestUnhookRaced(t *testing.T) {
	h, hooks := hooked(t, noBlink)
	p, err := planUnhook(h, detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: detect.HookKey(hooks[0])}, hooks)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	h.put64(0x150048, 0x900d)
	if out, err := unhooker(t, h).Apply(t.Context(), p, "test"); !errors.Is(err, ErrMismatch) || out.Stores != 0 {
		t.Fatalf("%+v, %v", out, err)
	}
	if got := [2]uint64{h.get(0x150040, 8), h.get(0x150048, 8)}; got != [2]uint64{0xbad0, 0x900d} {
		t.Errorf("the handlers are %#x", got)
	}
}

func TestUnhookRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		hook int // of which; -1: another
		code []byte
		arch string
		want error
	}{
		{"a user of ftrace of a kernel without workers", 6, noBlink, "", kernel.ErrNotFound},
		{"what a line discipline called before is not known", 5, noBlink, "", kernel.ErrNotSupported},
		{"the probe is gone", -1, noBlink, "", ErrGone},
		{"the function does more than to return 0", 0, append(append([]byte(nil), endbr64...), 0x0f, 0x1f, 0x44, 0x00, 0x00, 0xb0, 0x01, 0xc3, 0, 0, 0, 0), "", kernel.ErrNotSupported},
		{"another architecture", 0, noBlink, archAArch64, kernel.ErrNotSupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, hooks := hooked(t, tt.code)
			if tt.arch != "" {
				h.info.Arch = tt.arch
			}
			f := detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Key: "probe 0x1"}
			if tt.hook >= 0 {
				f.Key = detect.HookKey(hooks[tt.hook])
			}
			if _, err := planUnhook(h, f, hooks); !errors.Is(err, tt.want) {
				t.Errorf("planUnhook() = %v; want %v", err, tt.want)
			}
		})
	}
}
