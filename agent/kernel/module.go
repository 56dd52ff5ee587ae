package kernel

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
)

// Module is a loaded kernel module (struct module, include/linux/module.h). The kernel knows its modules by three ways; a
// module that hides leaves one of them, as rootkits do, and is still found by the others.
type Module struct {
	Addr    VirtAddr `json:"addr"`
	Name    string   `json:"name"`
	State   string   `json:"state"` // live, coming, going or unformed
	Size    uint64   `json:"size"`  // bytes, of all its memory
	Base    VirtAddr `json:"base"`  // of its code
	Refs    int      `json:"refs"`
	UsedBy  []string `json:"usedBy,omitempty"` // modules
	Taint   uint64   `json:"taint"`            // TAINT_… bits, include/linux/panic.h
	Version string   `json:"version,omitempty"`
	// Of the three views: the list that lsmod(8) shows, /sys/module, and the tree by which addresses are looked up.
	InList  bool `json:"inList"`
	InKset  bool `json:"inKset"`
	InTree  bool `json:"inTree"`
	Missing bool `json:"missing"` // it is live and yet not in all three views

	Sections []Section `json:"sections,omitempty"`

	ranges []virtRange // of its memory: of modules that share pages, those of one need not be together
	points pointTable
}

// holds tells whether n bytes lie in the module's memory.
func (m *Module) holds(at VirtAddr, n uint64) bool {
	return slices.ContainsFunc(m.ranges, func(r virtRange) bool { return at >= r.start && at < r.end && n <= uint64(r.end-at) })
}

type virtRange struct{ start, end VirtAddr }

// Section is a part of a module in memory, as /sys/module/NAME/sections has it.
type Section struct {
	Name string   `json:"name"`
	Addr VirtAddr `json:"addr"`
}

const (
	maxModules  = 1 << 14
	maxSections = 1 << 12
)

// moduleStates are enum module_state.
var moduleStates = [...]string{"live", "coming", "going", "unformed"}

// taintLetters are those of TAINT_…, kernel/panic.c.
const taintLetters = "PFSRMBUDAWCIOELKXTNJ"

// Taint returns the letters of taint bits, as /proc/modules and oopses have them; "?" stands for a bit that has no name here.
func Taint(bits uint64) string {
	var b []byte
	for i := 0; bits>>i != 0; i++ {
		switch {
		case bits>>i&1 == 0:
		case i < len(taintLetters):
			b = append(b, taintLetters[i])
		default:
			b = append(b, '?')
		}
	}
	return string(b)
}

type moduleWalk struct {
	brief bool // names and views alone

	v                                *View
	module, memory, use, attrs, attr *shape
	attrSize, memorySize             uint64
	list, kset, tree                 VirtAddr
	kobj, entry, kmod                uint64
	ksetList                         uint64
	treeNode, treeMod                uint64

	found map[VirtAddr]*Module
}

// Modules lists the loaded modules by all three views, sorted by name.
func (v *View) Modules() iter.Seq2[Module, error] {
	var w moduleWalk
	if err := w.resolve(v.img); err != nil {
		return func(yield func(Module, error) bool) { yield(Module{}, fmt.Errorf("walk modules: %w", err)) }
	}
	return v.modulesBy(w)
}

// modulesBy is Modules with a walk that is resolved.
func (v *View) modulesBy(plan moduleWalk) iter.Seq2[Module, error] {
	return settled(v, "walk modules", func() ([]Module, error) {
		var all []Module
		var err error
		suspects := make(map[VirtAddr]bool)
		// A module may have come or gone between the views: only what a second look misses as well is missing.
		for try := range 2 {
			w := plan
			w.v, w.found = v, make(map[VirtAddr]*Module)
			err = w.run()
			all = make([]Module, 0, len(w.found))
			again := false
			for at, m := range w.found {
				hides := m.State == "live" && !(m.InList && m.InKset && m.InTree)
				m.Missing = hides && suspects[at]
				if hides && try == 0 {
					suspects[at], again = true, true
				}
				all = append(all, *m)
			}
			if err != nil || !again {
				break
			}
			v.forget()
		}
		slices.SortFunc(all, func(a, b Module) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Addr, b.Addr)) })
		return all, err
	})
}

// modulesBriefly returns the modules without their sections and users, as the View has seen them first.
func (v *View) modulesBriefly() ([]Module, error) {
	v.mu.Lock()
	all := v.known
	v.mu.Unlock()
	if all != nil {
		return all, nil
	}
	p := v.img.signsPlan()
	if p.modErr != nil {
		return nil, p.modErr
	}
	all = []Module{}
	for m, err := range v.modulesBy(p.modules) {
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	v.mu.Lock()
	v.known = all
	v.mu.Unlock()
	return all, nil
}

func (w *moduleWalk) resolve(img *Image) error {
	r := resolver{img: img}
	// Since Linux commit ac3b43283923 ("module: replace module_layout with module_memory") (in v6.4) mem[] stands for
	// core_layout and init_layout.
	w.module = r.shape("module", "state", "list[]", "name[]", "version", "refcnt.counter", "taints", "source_list[]", "sect_attrs?",
		"core_layout.base?", "core_layout.size?", "init_layout.size?", "mem[]?", "num_tracepoints?", "tracepoints_ptrs?")
	w.use = r.shape("module_use", "source_list[]", "source")
	if _, ok := w.module.fields["mem"]; ok {
		w.memory = r.shape("module_memory", "base", "size")
		w.memorySize = r.size("module_memory")
	} else {
		r.field("module", 8, "core_layout.base")
	}
	if _, ok := w.module.fields["sect_attrs"]; ok {
		try := resolver{img: img}
		if _, err := img.types.field("module_sect_attrs", "nsections"); err == nil {
			w.attrs = try.shape("module_sect_attrs", "nsections", "attrs[]")
			w.attr = try.shape("module_sect_attr", "battr.attr.name", "address")
			w.attrSize = try.size("module_sect_attr")
		} else { // since v6.14 there are the attributes alone, and pointers to them, which end with a null
			w.attrs = try.shape("module_sect_attrs", "grp.bin_attrs")
			w.attr = try.shape("bin_attribute", "attr.name", "private")
		}
		if try.err != nil {
			w.attrs = nil // a module is told without its sections
		}
	}
	w.list = r.symbol("modules")
	w.kset = r.symbol("module_kset")
	w.ksetList = r.field("kset", 16, "list")
	w.entry = r.field("kobject", 16, "entry")
	w.kobj = r.field("module_kobject", 0, "kobj")
	w.kmod = r.field("module_kobject", 8, "mod")
	// A latch tree: two trees of which writers change one at a time; readers may take the first, which is whole in between.
	w.tree = r.symbol("mod_tree") + VirtAddr(r.field("mod_tree_root", 0, "root.tree"))
	w.treeMod = r.field("mod_tree_node", 8, "mod")
	w.treeNode = r.field("mod_tree_node", 0, "node.node")
	return r.err
}

func (w *moduleWalk) run() error {
	err := w.v.list("module", w.list, w.module.offset("list"), maxModules, func(at VirtAddr) error {
		return w.see(at, func(m *Module) { m.InList = true })
	})
	if err != nil {
		return err
	}
	kset, err := w.v.pointer("module_kset", w.kset)
	if err != nil {
		return err
	}
	err = w.v.list("module_kobject", kset+VirtAddr(w.ksetList), w.kobj+w.entry, maxModules, func(at VirtAddr) error {
		mod, err := w.v.pointer("module_kobject", at+VirtAddr(w.kmod))
		if err != nil || mod == 0 { // what is built in has no module
			return err
		}
		return w.see(mod, func(m *Module) { m.InKset = true })
	})
	if err != nil {
		return err
	}
	return w.v.rbtree("mod_tree_node", w.tree, w.treeNode, 8*maxModules, func(at VirtAddr) error {
		mod, err := w.v.pointer("mod_tree_node", at+VirtAddr(w.treeMod))
		if err != nil {
			return err
		}
		return w.see(mod, func(m *Module) { m.InTree = true })
	})
}

// see reads a module that one of the views has.
func (w *moduleWalk) see(at VirtAddr, note func(*Module)) error {
	m := w.found[at]
	if m == nil {
		if len(w.found) == maxModules {
			return &CorruptError{"module", at, "too many modules"}
		}
		var err error
		if m, err = w.read(at); err != nil {
			return err
		}
		w.found[at] = m
	}
	note(m)
	return nil
}

func (w *moduleWalk) read(at VirtAddr) (*Module, error) {
	t, err := w.v.thing(w.module, at)
	if err != nil {
		return nil, err
	}
	m := &Module{Addr: at, Name: t.text("name"), Taint: t.num("taints"), Refs: t.int("refcnt.counter") - 1}
	state := t.num("state")
	if state >= uint64(len(moduleStates)) {
		return nil, t.corrupt("state %d", state)
	}
	m.State = moduleStates[state]
	if m.Name == "" {
		return nil, t.corrupt("has no name")
	}
	m.Refs = max(m.Refs, 0) // MODULE_REF_BASE is not counted; a module that leaves has less
	if w.memory == nil {
		m.Base, m.Size = t.ptr("core_layout.base"), t.num("core_layout.size")+t.num("init_layout.size")
		m.ranges = []virtRange{{m.Base, m.Base + VirtAddr(t.num("core_layout.size"))}}
	} else {
		for offset := uint64(0); offset+w.memorySize <= t.fields["mem"].Size; offset += w.memorySize {
			part, err := w.v.thing(w.memory, t.at("mem")+VirtAddr(offset))
			if err != nil {
				return nil, err
			}
			if offset == 0 { // MOD_TEXT
				m.Base = part.ptr("base")
			}
			m.Size += part.num("size")
			m.ranges = append(m.ranges, virtRange{part.ptr("base"), part.ptr("base") + VirtAddr(part.num("size"))})
		}
	}
	if _, ok := w.module.fields["tracepoints_ptrs"]; ok && m.State == "live" {
		m.points = pointTable{m.Name, t.ptr("tracepoints_ptrs"), t.num("num_tracepoints")}
	}
	if m.Size > 1<<32 || !w.v.img.space.valid(m.Base, 1) {
		return nil, t.corrupt("%q of %d bytes at %v", m.Name, m.Size, m.Base)
	}
	if w.brief {
		return m, nil
	}
	if p := t.ptr("version"); p != 0 {
		if m.Version, err = w.v.cstring("module version", p, 4096); err != nil {
			return nil, err
		}
	}
	if m.State == "unformed" {
		return m, nil // its lists are not made yet
	}
	err = w.v.list("module_use", t.at("source_list"), w.use.offset("source_list"), maxModules, func(at VirtAddr) error {
		u, err := w.v.thing(w.use, at)
		if err != nil {
			return err
		}
		user, err := w.v.thing(w.module, u.ptr("source"))
		if err != nil {
			return err
		}
		m.UsedBy = append(m.UsedBy, user.text("name"))
		return nil
	})
	if err != nil {
		return nil, err
	}
	if p := t.ptr("sect_attrs"); p != 0 && w.attrs != nil {
		return m, w.sections(m, p)
	}
	return m, nil
}

func (w *moduleWalk) sections(m *Module, at VirtAddr) error {
	attrs, err := w.v.thing(w.attrs, at)
	if err != nil {
		return err
	}
	if w.attrSize == 0 {
		return w.sectionPointers(m, attrs.ptr("grp.bin_attrs"))
	}
	n := attrs.num("nsections")
	if n > maxSections {
		return attrs.corrupt("%d sections", n)
	}
	for i := range n {
		a, err := w.v.thing(w.attr, attrs.at("attrs")+VirtAddr(i*w.attrSize))
		if err != nil {
			return err
		}
		name, err := w.v.cstring("section name", a.ptr("battr.attr.name"), 256)
		if err != nil {
			return err
		}
		m.Sections = append(m.Sections, Section{name, a.ptr("address")})
	}
	return nil
}

func (w *moduleWalk) sectionPointers(m *Module, at VirtAddr) error {
	for range maxSections {
		p, err := w.v.pointer("bin_attrs", at)
		if err != nil || p == 0 {
			return err
		}
		a, err := w.v.thing(w.attr, p)
		if err != nil {
			return err
		}
		name, err := w.v.cstring("section name", a.ptr("attr.name"), 256)
		if err != nil {
			return err
		}
		m.Sections = append(m.Sections, Section{name, a.ptr("private")})
		at += 8
	}
	return &CorruptError{"bin_attrs", at, fmt.Sprintf("more than %d sections", maxSections)}
}
