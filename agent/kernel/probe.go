package kernel

import (
	"fmt"
	"iter"
	"strings"
)

// Probe is a place of the kernel's code into which something was hooked while it runs.
type Probe struct {
	Addr VirtAddr `json:"addr"` // of the kernel's record of it
	Kind string   `json:"kind"` // kprobe, ftrace, tracepoint, livepatch, uprobe or lsm
	// Place is the function (by its name alone for a live patch), the tracepoint, who uses ftrace, where in a program, or the hook and whose it is.
	Place    string `json:"place"`
	Function string `json:"function"` // that is called there
	Disabled bool   `json:"disabled,omitempty"`
}

const (
	maxLSMs        = 64
	kprobeChains   = 64 // KPROBE_TABLE_SIZE
	maxProbes      = 1 << 16
	maxTracepoints = 1 << 16

	// include/linux/kprobes.h; the same since v2.6.
	kprobeGone, kprobeDisabled = 1, 2
)

// Probes lists the kprobes, the users of ftrace and of tracepoints, and the functions that live patches replace.
func (v *View) Probes() iter.Seq2[Probe, error] {
	return settled(v, "walk probes", func() ([]Probe, error) {
		all, err := v.kprobes()
		if err != nil {
			return all, err
		}
		for _, more := range []func() ([]Probe, error){v.ftraceUsers, v.tracepointUsers, v.livePatches} {
			list, err := more()
			all = append(all, list...)
			if err != nil {
				return all, err
			}
		}
		return all, nil
	})
}

func (v *View) kprobes() ([]Probe, error) {
	all := []Probe{}
	err := v.eachKprobe(func(t *thing) error {
		place, err := v.function(t.ptr("addr"))
		if err != nil {
			return err
		}
		handler := t.ptr("pre_handler")
		if handler == 0 {
			handler = t.ptr("post_handler")
		}
		name, err := v.function(handler)
		if err != nil {
			return err
		}
		all = append(all, Probe{Addr: t.addr(), Kind: "kprobe", Place: place, Function: name, Disabled: t.num("flags")&(kprobeGone|kprobeDisabled) != 0})
		return nil
	})
	if err != nil && len(all) == 0 {
		return nil, err
	}
	return all, err
}

// eachKprobePlace walks the table of kprobes (struct kprobe, include/linux/kprobes.h), of which shared ones stand behind one of their own. It
// reads the fields, which must have "hlist[]" and "pre_handler" among them.
func (v *View) eachKprobePlace(f func(t *thing, shared bool) error, fields ...string) error {
	table, ok, err := v.feature("kprobe_table")
	if !ok {
		return err
	}
	r := resolver{img: v.img}
	s := r.shape("kprobe", fields...)
	if r.err != nil {
		return r.err
	}
	aggregate, _ := v.img.syms.symbol("aggr_pre_handler")
	heads, err := v.pointers("kprobe_table", table, kprobeChains)
	if err != nil {
		return err
	}
	left := maxProbes
	for _, first := range heads {
		err := v.hlist("kprobe", first, s.offset("hlist"), left, func(at VirtAddr) error {
			left--
			t, err := v.thing(s, at)
			if err != nil {
				return err
			}
			return f(&t, aggregate != 0 && t.ptr("pre_handler") == aggregate)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// eachKprobe walks the kprobes, those that share a place one by one.
func (v *View) eachKprobe(f func(t *thing) error) error {
	left := maxProbes
	return v.eachKprobePlace(func(t *thing, shared bool) error {
		if !shared {
			return f(t)
		}
		return v.list("kprobe", t.at("list"), t.offset("list"), maxProbes, func(at VirtAddr) error {
			if left--; left < 0 {
				return &CorruptError{"kprobe", at, fmt.Sprintf("more than %d", maxProbes)}
			}
			t, err := v.thing(t.shape, at)
			if err != nil {
				return err
			}
			return f(&t)
		})
	}, "hlist[]", "list[]", "addr", "pre_handler", "post_handler", "flags")
}

// ftraceUsers lists those who have themselves called at the entry of functions (struct ftrace_ops, include/linux/ftrace.h).
func (v *View) ftraceUsers() ([]Probe, error) {
	head, ok, err := v.feature("ftrace_ops_list")
	if !ok {
		return nil, err
	}
	r := resolver{img: v.img}
	end := r.symbol("ftrace_list_end")
	s := r.shape("ftrace_ops", "func", "next", "flags")
	if r.err != nil {
		return nil, r.err
	}
	at, err := v.pointer("ftrace_ops_list", head)
	if err != nil {
		return nil, err
	}
	var all []Probe
	for at != end && at != 0 {
		if len(all) == maxProbes {
			return all, &CorruptError{"ftrace_ops", at, fmt.Sprintf("more than %d", maxProbes)}
		}
		t, err := v.thing(s, at)
		if err != nil {
			return all, err
		}
		name, err := v.function(t.ptr("func"))
		if err != nil {
			return all, err
		}
		place, err := v.nameOf(at)
		if err != nil {
			return all, err
		}
		all = append(all, Probe{Addr: at, Kind: "ftrace", Place: place, Function: name, Disabled: t.num("flags")&1 == 0}) // FTRACE_OPS_FL_ENABLED
		at = t.ptr("next")
	}
	return all, nil
}

// tracepointUsers lists what is called at tracepoints (struct tracepoint, include/linux/tracepoint-defs.h), those of modules, too.
func (v *View) tracepointUsers() ([]Probe, error) {
	start, ok, err := v.feature("__start___tracepoints_ptrs")
	if !ok {
		return nil, err
	}
	r := resolver{img: v.img}
	stop := r.symbol("__stop___tracepoints_ptrs")
	s := r.shape("tracepoint", "name", "funcs")
	f := r.shape("tracepoint_func", "func", "data")
	size, whole := r.size("tracepoint_func"), r.size("tracepoint")
	if r.err != nil {
		return nil, r.err
	}
	table, err := kernelPoints(start, stop)
	if err != nil {
		return nil, err
	}
	places, err := v.tracepoints(table, nil, whole)
	if err != nil {
		return nil, err
	}
	modules, err := v.modulesBriefly()
	if err != nil {
		return nil, err
	}
	for i := range modules {
		if modules[i].points.n == 0 {
			continue
		}
		more, err := v.tracepoints(modules[i].points, &modules[i], whole)
		if err != nil {
			return nil, fmt.Errorf("of module %s: %w", modules[i].Name, err)
		}
		places = append(places, more...)
	}
	var all []Probe
	for _, at := range places {
		t, err := v.thing(s, at)
		if err != nil {
			return all, err
		}
		funcs := t.ptr("funcs")
		if funcs == 0 {
			continue
		}
		name, err := v.cstring("tracepoint", t.ptr("name"), 128)
		if err != nil {
			return all, err
		}
		for ; ; funcs += VirtAddr(size) {
			x, err := v.thing(f, funcs)
			if err != nil {
				return all, err
			}
			if x.ptr("func") == 0 {
				break
			}
			if len(all) == maxProbes {
				return all, t.corrupt("more than %d users of tracepoints", maxProbes)
			}
			function, err := v.function(x.ptr("func"))
			if err != nil {
				return all, err
			}
			all = append(all, Probe{Addr: funcs, Kind: "tracepoint", Place: name, Function: function})
		}
	}
	return all, nil
}

// Uprobes lists the probes in the code of programs (struct uprobe, kernel/events/uprobes.c): each a Probe of kind "uprobe", whose place
// is the path within the file's own file system, and the offset.
func (v *View) Uprobes() iter.Seq2[Probe, error] {
	return settled(v, "walk uprobes", func() ([]Probe, error) {
		root, ok, err := v.feature("uprobes_tree")
		if !ok {
			return nil, err
		}
		r := resolver{img: v.img}
		s := r.shape("uprobe", "rb_node[]", "inode", "offset")
		inode := r.shape("inode", "i_ino", "i_dentry.first")
		alias := r.field("dentry", 0, "d_u.d_alias", "d_alias") // in a union without a name in 7.2
		if r.err != nil {
			return nil, r.err
		}
		paths, err := v.pathWalk()
		if err != nil {
			return nil, err
		}
		all := []Probe{}
		err = v.rbtree("uprobe", root, s.offset("rb_node"), maxProbes, func(at VirtAddr) error {
			t, err := v.thing(s, at)
			if err != nil {
				return err
			}
			i, err := v.thing(inode, t.ptr("inode"))
			if err != nil {
				return err
			}
			name := fmt.Sprintf("inode %d", i.num("i_ino")) // it has no name in memory
			if d := i.ptr("i_dentry.first"); d != 0 {
				if name, err = paths.within(d - VirtAddr(alias)); err != nil {
					return err
				}
			}
			all = append(all, Probe{Addr: at, Kind: "uprobe", Place: fmt.Sprintf("%s:%#x", name, t.num("offset"))})
			return nil
		})
		return all, err
	})
}

// LSMs returns the names of the security modules that are active, in their order.
func (v *View) LSMs() ([]string, error) {
	names, err := settle(v, func() ([]string, error) {
		at, err := v.img.syms.symbol("lsm_names")
		if err != nil {
			return v.lsmIDs() // 7.2 has no text of the names
		}
		p, err := v.pointer("lsm_names", at)
		if err != nil || p == 0 {
			return []string{}, err
		}
		s, err := v.cstring("lsm_names", p, 4096)
		return strings.Split(s, ","), err
	})
	if err != nil {
		return nil, fmt.Errorf("list security modules: %w", err)
	}
	return names, nil
}

// lsmIDs returns the names in lsm_idlist, of which lsm_active_cnt are in use (security/lsm.h).
func (v *View) lsmIDs() ([]string, error) {
	r := resolver{img: v.img}
	list, active := r.symbol("lsm_idlist"), r.symbol("lsm_active_cnt")
	id := r.shape("lsm_id", "name")
	if r.err != nil {
		return nil, r.err
	}
	var b [4]byte
	if err := v.img.space.object(v, "lsm_active_cnt", active, b[:]); err != nil {
		return nil, err
	}
	n := le32(b[:])
	if n > maxLSMs {
		return nil, &CorruptError{"lsm_active_cnt", active, fmt.Sprintf("%d security modules", n)}
	}
	at, err := v.pointers("lsm_idlist", list, int(n))
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, n)
	for _, p := range at {
		t, err := v.thing(id, p)
		if err != nil {
			return names, err
		}
		name, err := v.cstring("lsm_id", t.ptr("name"), 64)
		if err != nil {
			return names, err
		}
		names = append(names, name)
	}
	return names, nil
}
