package kernel

import (
	"errors"
	"sync"
)

// Hook is a pointer by which a probe, or who is called by the kernel otherwise, leads to a handler that is in no code that the kernel admits to: neither its
// own, nor that of a module that stands in all its lists. Tracers (perf, ftrace, bpftrace, live patches, BPF trampolines) lead into the kernel's own code,
// from where they go on.
type Hook struct {
	Kind   string   `json:"kind"`   // kprobe, kretprobe, ftrace, notifier, packet filter, tracepoint, line discipline, input handler, eBPF program or eBPF map
	Record VirtAddr `json:"record"` // the kernel's record of it, of which there may be several hooks
	// Place is the function that is probed; of ftrace, whose record it is; else the chain of notifiers, where packets come by, the tracepoint, or the name.
	Place  string   `json:"place"`
	Member string   `json:"member"` // "kprobe.pre_handler"
	At     VirtAddr `json:"at"`     // of the pointer
	To     VirtAddr `json:"to"`
	Was    VirtAddr `json:"was,omitempty"`   // what it led to when it was first seen, or must lead to; 0 if that is not known
	Of     VirtAddr `json:"of,omitempty"`    // the tracepoint itself, of a user of one
	Owner  string   `json:"owner,omitempty"` // the hidden module that it leads into; empty if none is known
}

const maxHooks = 64

// hookPlan is where hooks are.
type hookPlan struct {
	err       error
	from, to  VirtAddr // the kernel's code
	ret       VirtAddr // pre_handler_kretprobe, the handler of the kprobe in a kretprobe; 0 if there is none
	kretprobe *shape
	kp        uint64
	ops, end  VirtAddr // ftrace_ops_list and ftrace_list_end; 0 without ftrace
	op        *shape
	was       *honest
}

// honest are the pointers of objects that are there for long, and what they led to when that was the kernel's own code, or that of a module that stands in all
// its lists: what a stranger has led elsewhere can be put back so.
type honest struct {
	mu sync.Mutex
	to map[honestAt]VirtAddr
}

type honestAt struct {
	at    VirtAddr
	place string // whose it is: memory is used again
}

const maxHonest = 4096

// note remembers a pointer. What it led to in the kernel's own code is not forgotten for a module's: who hooks first and hides then is in all lists meanwhile.
func (o *honest) note(h Hook, own bool) {
	if h.Kind != "line discipline" && h.Kind != "input handler" || h.To == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.to) >= maxHonest {
		clear(o.to) // so many are no host's
	}
	k := honestAt{h.At, h.Place}
	if _, known := o.to[k]; known && !own {
		return
	}
	o.to[k] = h.To
}

func (o *honest) was(h Hook) VirtAddr {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.to[honestAt{h.At, h.Place}]
}

func (img *Image) planHooks() (h hookPlan) {
	r := resolver{img: img}
	h.from, h.to = r.symbol("_stext"), r.symbol("_etext")
	h.was = &honest{to: make(map[honestAt]VirtAddr)}
	if at, err := img.syms.symbol("pre_handler_kretprobe"); err == nil {
		h.ret = at
		h.kretprobe, h.kp = r.shape("kretprobe", "handler", "entry_handler"), r.field("kretprobe", 0, "kp")
	}
	if at, err := img.syms.symbol("ftrace_ops_list"); err == nil {
		h.ops, h.end = at, r.symbol("ftrace_list_end")
		h.op = r.shape("ftrace_ops", "func", "next", "flags")
	}
	h.err = r.err
	return h
}

// hookedAt is a hook whose place is not named yet, if there is an address of it.
type hookedAt struct {
	Hook
	place VirtAddr
}

// noteHook is told of each pointer that is a hook if it leads to a stranger.
type noteHook func(h Hook, place VirtAddr)

// stranger returns what keeps those that lead out of the kernel's own code.
func (h *hookPlan) stranger(found *[]hookedAt) noteHook {
	return func(x Hook, place VirtAddr) {
		switch {
		case x.To == 0:
		case x.To >= h.from && x.To < h.to:
			h.was.note(x, true)
		case len(*found) < maxHooks:
			*found = append(*found, hookedAt{x, place})
		}
	}
}

// hooks are those of kprobes, kretprobes and users of ftrace that are in force.
func (v *View) hooks(p *signsPlan, s *Signs) error {
	h := &p.hooks
	if h.err != nil {
		return h.err
	}
	var found []hookedAt
	keep := h.stranger(&found)
	note := func(kind, member string, record, at, to, place VirtAddr) {
		keep(Hook{Kind: kind, Record: record, Place: place.String(), Member: member, At: at, To: to}, place)
	}
	err := v.eachKprobe(func(t *thing) error {
		if t.num("flags")&(kprobeGone|kprobeDisabled) != 0 {
			return nil
		}
		pre, place := t.ptr("pre_handler"), t.ptr("addr")
		note("kprobe", "kprobe.pre_handler", t.addr(), t.at("pre_handler"), pre, place)
		note("kprobe", "kprobe.post_handler", t.addr(), t.at("post_handler"), t.ptr("post_handler"), place)
		if h.ret == 0 || pre != h.ret {
			return nil
		}
		rp, err := v.thing(h.kretprobe, t.addr()-VirtAddr(h.kp))
		if err != nil {
			return err
		}
		note("kretprobe", "kretprobe.handler", t.addr(), rp.at("handler"), rp.ptr("handler"), place)
		note("kretprobe", "kretprobe.entry_handler", t.addr(), rp.at("entry_handler"), rp.ptr("entry_handler"), place)
		return nil
	})
	if err != nil {
		return err
	}
	if err := v.ftraceHooks(p, note); err != nil {
		return err
	}
	return v.strangers(s, found)
}

func (v *View) ftraceHooks(p *signsPlan, note func(kind, member string, record, at, to, place VirtAddr)) error {
	h := &p.hooks
	if h.ops == 0 {
		return nil
	}
	at, err := v.pointer("ftrace_ops_list", h.ops)
	if err != nil {
		return err
	}
	for n := 0; at != h.end && at != 0; n++ {
		t, err := v.thing(h.op, at)
		if err != nil {
			return err
		}
		if n == maxProbes {
			return t.corrupt("more than %d", maxProbes)
		}
		if t.num("flags")&1 != 0 { // FTRACE_OPS_FL_ENABLED
			note("ftrace", "ftrace_ops.func", at, t.at("func"), t.ptr("func"), at)
		}
		at = t.ptr("next")
	}
	return nil
}

// strangers keeps the hooks that lead into no module that stands in all lists.
func (v *View) strangers(s *Signs, found []hookedAt) error {
	if len(found) == 0 {
		return nil
	}
	modules, err := v.modulesBriefly()
	if err != nil {
		return err
	}
	for _, h := range found {
		honest := false
		for _, m := range modules {
			for _, r := range m.ranges {
				if h.To >= r.start && h.To < r.end {
					honest, h.Owner = !m.Missing, m.Name
				}
			}
		}
		if honest {
			v.img.signsPlan().hooks.was.note(h.Hook, false)
			continue
		}
		if h.Was == 0 {
			h.Was = v.img.signsPlan().hooks.was.was(h.Hook)
		}
		name := v.function
		if h.Kind == "ftrace" {
			name = v.nameOf
		}
		text := ""
		var err error
		if h.place != 0 {
			text, err = name(h.place)
		}
		switch {
		case err != nil && !tolerable(err) && !errors.Is(err, ErrNotFound):
			return err
		case text != "" && err == nil:
			h.Place = text
		}
		s.Hooks = append(s.Hooks, h.Hook)
	}
	return nil
}
