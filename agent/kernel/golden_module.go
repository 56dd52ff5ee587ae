package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	goldenModuleMost  = 64 << 20 // bytes of one module
	goldenModulesMost = 64 << 20 // of all
	goldenSiteLeast   = 16       // bytes of a module for each place that is patched, on average
	// Modules that have come or gone are looked for so often.
	goldenModulesEvery = 2 * time.Second
	// A module that has come is taken so much faster than what is known is compared.
	goldenHaste  = 4
	maxLeftNamed = 16
)

// goldenModules is what is kept of the loaded modules.
type goldenModules struct {
	g    *Golden
	why  error // they are not compared
	plan goldenModulePlan
	all  []*goldenModule // by their place in the store
	next time.Time       // when they are listed anew
	skip []string        // which are not compared, and why; by name
	more int             // of those, beyond what is in skip

	queue []*goldenModule // of the round, what is not compared yet
}

// goldenModulePlan is where what is to be known of a module is.
type goldenModulePlan struct {
	walk           moduleWalk
	module, memory *shape
	memorySize     uint64
	text           []uint64 // of mem[], which is code, and which are constants
	constants      []uint64
	kernfs         *shape
}

// goldenModule is what is kept of one. It is compared once all of it is taken.
type goldenModule struct {
	goldenPart
	load    uint64 // the number of its directory in sysfs
	place   uint64 // in the store
	begun   bool
	scanned uint64 // of its code, for trampolines of static calls
	taken   uint64
	done    uint64 // of the round
	was     []trap // within, when its taking began
	gone    bool
}

// storeAt is a part of a store.
type storeAt struct {
	GoldenStore
	from int64
}

func (s storeAt) ReadAt(b []byte, off int64) (int, error) { return s.GoldenStore.ReadAt(b, s.from+off) }
func (s storeAt) WriteAt(b []byte, off int64) (int, error) {
	return s.GoldenStore.WriteAt(b, s.from+off)
}

// modules takes those that are loaded.
func (g *Golden) modules(v *View) error {
	m := &goldenModules{g: g}
	g.mods = m
	if m.why = m.plan.resolve(g.img); m.why != nil {
		return nil
	}
	if err := m.refresh(v); err != nil {
		return err
	}
	for {
		left, err := m.taking(v, goldenModulesMost)
		if err != nil || !left {
			return err
		}
		if err := v.ctx.Err(); err != nil {
			return err
		}
		v.forget()
	}
}

func (p *goldenModulePlan) resolve(img *Image) error {
	p.walk.brief = true
	if err := p.walk.resolve(img); err != nil {
		return err
	}
	r := resolver{img: img}
	// Where a kernel has neither static keys nor static calls nor ftrace, the members are missing.
	p.module = r.shape("module", "state", "name[]", "mkobj.kobj.sd", "jump_entries?", "num_jump_entries?", "static_call_sites?", "num_static_call_sites?",
		"ftrace_callsites?", "num_ftrace_callsites?", "klp?", "core_layout.base?", "core_layout.text_size?", "core_layout.ro_after_init_size?", "mem[]?")
	p.kernfs = r.shape("kernfs_node", "id") // of 64 bits since v5.5; no two have the same (kernfs_new_node)
	if r.err != nil {
		return r.err
	}
	if p.kernfs.fields["id"].Size != 8 {
		return fmt.Errorf("numbers of directories in sysfs come again: %w", ErrNotSupported)
	}
	if _, ok := p.module.fields["mem"]; !ok {
		r.field("module", 8, "core_layout.base")
		r.field("module", 4, "core_layout.text_size")
		r.field("module", 4, "core_layout.ro_after_init_size")
		return r.err
	}
	p.memory, p.memorySize = r.shape("module_memory", "base", "size"), r.size("module_memory")
	if r.err != nil {
		return r.err
	}
	for _, x := range []struct {
		name string
		to   *[]uint64
	}{{"MOD_TEXT", &p.text}, {"MOD_RODATA", &p.constants}, {"MOD_RO_AFTER_INIT", &p.constants}} {
		n, err := img.types.enum("mod_mem_type", x.name)
		if err != nil {
			return err
		}
		if n < 0 || uint64(n+1)*p.memorySize > p.module.fields["mem"].Size {
			return &CorruptError{"BTF", 0, fmt.Sprintf("module.mem has no element %d", n)}
		}
		*x.to = append(*x.to, uint64(n))
	}
	return nil
}

func (m *goldenModules) count() (n int) {
	for _, x := range m.list() {
		if x.whole() {
			n++
		}
	}
	return n
}

func (m *goldenModules) bytes() (n uint64) {
	for _, x := range m.list() {
		n += x.total
	}
	return n
}

// list may be of none, while the kernel's own is taken.
func (m *goldenModules) list() []*goldenModule {
	if m == nil {
		return nil
	}
	return m.all
}

func (m *goldenModules) left() []string {
	switch {
	case m == nil:
		return nil
	case m.why != nil:
		return []string{"modules: " + m.why.Error()}
	case m.more > 0:
		return append(slices.Clone(m.skip), fmt.Sprintf("%d modules more", m.more))
	}
	return m.skip
}

// whole reports whether all of a module is taken.
func (x *goldenModule) whole() bool { return x.taken == x.total }

// look reads what tells one load of a module from another, past the cache. No error, and false, means that it is not there any more.
func (m *goldenModules) look(v *View, at VirtAddr) (t thing, load uint64, live bool, err error) {
	t = thing{shape: m.plan.module}
	gone := func(err error) (thing, uint64, bool, error) {
		if tolerable(err) {
			err = nil
		}
		return t, 0, false, err
	}
	if !v.img.space.valid(at, 8) {
		return gone(nil)
	}
	if err := t.o.load(v.img.space, fresh{v}, "module", t.span, at); err != nil {
		return gone(err)
	}
	if state := t.num("state"); state != 0 { // MODULE_STATE_LIVE
		return gone(nil)
	}
	if sd := t.ptr("mkobj.kobj.sd"); sd != 0 { // a live one without it hides
		if !v.img.space.valid(sd, 8) {
			return gone(nil)
		}
		if load, err = v.img.space.word64(fresh{v}, "kernfs_node", sd+VirtAddr(m.plan.kernfs.offset("id"))); err != nil {
			return gone(err)
		}
	}
	return t, load, true, nil
}

// same reports whether a module is still loaded as it was.
func (m *goldenModules) same(v *View, x *goldenModule) (bool, error) {
	t, load, live, err := m.look(v, x.owner)
	if err != nil || !live {
		return false, err
	}
	return t.text("name") == x.module && (load == x.load || load == 0), nil
}

// drop forgets a module.
func (m *goldenModules) drop(x *goldenModule) {
	x.gone = true
	for at := range x.suspects {
		x.acquit(at)
	}
	m.all = slices.DeleteFunc(m.all, func(o *goldenModule) bool { return o == x })
	m.next = time.Time{}
}

// refresh forgets the modules that are gone, and begins with those that have come.
func (m *goldenModules) refresh(v *View) error {
	m.next = time.Now().Add(goldenModulesEvery)
	for _, x := range slices.Clone(m.all) {
		if same, err := m.same(v, x); err != nil {
			return err
		} else if !same {
			m.drop(x)
		}
	}
	known := make(map[VirtAddr]bool, len(m.all))
	for _, x := range m.all {
		known[x.owner] = true
	}
	m.skip, m.more = nil, 0
	for mod, err := range v.modulesBy(m.plan.walk) {
		if err != nil {
			if tolerable(err) {
				return nil // they change just now
			}
			return err
		}
		if mod.State != "live" || known[mod.Addr] {
			continue
		}
		x, err := m.survey(v, mod)
		switch {
		case x != nil:
			m.all = append(m.all, x)
			slices.SortFunc(m.all, func(a, b *goldenModule) int { return cmp.Compare(a.place, b.place) })
		case err != nil && !tolerable(err):
			return err
		case err != nil && len(m.skip) < maxLeftNamed:
			m.skip = append(m.skip, fmt.Sprintf("module %s: %v", mod.Name, err))
		case err != nil:
			m.more++
		}
	}
	m.next = time.Now().Add(goldenModulesEvery)
	return nil
}

// survey finds what there is to keep of a module, and where the kernel patches it. It answers nothing for one that has gone meanwhile.
func (m *goldenModules) survey(v *View, mod Module) (*goldenModule, error) {
	t, load, live, err := m.look(v, mod.Addr)
	if err != nil || !live || t.text("name") != mod.Name {
		return nil, err
	}
	if t.num("klp") != 0 {
		return nil, fmt.Errorf("a live patch, of which the kernel goes on linking the code: %w", ErrNotSupported)
	}
	img := v.img
	x := &goldenModule{load: load, goldenPart: goldenPart{
		goldenShared: m.g.goldenShared, img: img, module: mod.Name, owner: mod.Addr, suspects: make(map[uint64]*suspect),
	}}
	add := func(name string, from, to VirtAddr) error {
		if from%4096 != 0 || to < from || uint64(to-from) > goldenModuleMost || !img.space.valid(from, 4096) || !img.space.valid(to, 1) {
			return t.corrupt("%s from %v to %v", name, from, to)
		}
		if to -= to % goldenLine; to > from {
			x.regions = append(x.regions, region{name: name, from: from, to: to, at: x.total})
			x.total += uint64(to - from)
		}
		return nil
	}
	if m.plan.memory == nil {
		base := t.ptr("core_layout.base")
		text, constants := VirtAddr(t.num("core_layout.text_size")), VirtAddr(t.num("core_layout.ro_after_init_size"))
		if err = add("text", base, base+text); err == nil && constants > text {
			err = add("rodata", base+text, base+constants)
		}
	} else {
		for _, n := range slices.Concat(m.plan.text, m.plan.constants) {
			part := thing{shape: m.plan.memory}
			if err = part.o.load(img.space, fresh{v}, "module_memory", part.span, t.at("mem")+VirtAddr(n*m.plan.memorySize)); err != nil {
				break
			}
			name, from := "rodata", part.ptr("base")
			if slices.Contains(m.plan.text, n) {
				name = "text"
			}
			if size := part.num("size"); size > 0 {
				if err = add(name, from, from+VirtAddr(size)); err != nil {
					break
				}
			}
		}
	}
	if err != nil {
		return nil, err
	}
	if len(x.regions) == 0 {
		return nil, nil
	}
	x.base = x.regions[0].from
	if have := m.bytes(); x.total > goldenModulesMost-min(have, goldenModulesMost) {
		return nil, fmt.Errorf("%d bytes beside the %d of others: %w", x.total, have, ErrNotSupported)
	}
	entry := img.entryKind()
	for _, table := range []struct {
		name       string
		size, kind uint64
	}{{"jump_entries", jumpEntry, siteJump}, {"static_call_sites", staticCallSite, siteCall}, {"ftrace_callsites", 8, entry}} {
		from, n := t.ptr(table.name), t.num("num_"+table.name)
		if from == 0 || n == 0 || x.regions[0].name != "text" {
			continue
		}
		if n > x.total/goldenSiteLeast || n*table.size > 16<<20 || !img.space.valid(from, 1) {
			return nil, t.corrupt("%d %s at %v", n, table.name, from)
		}
		b := make([]byte, n*table.size)
		if err := img.space.object(fresh{v}, table.name, from, b); err != nil {
			return nil, err
		}
		if table.kind == entry {
			// Pointers. On arm64 ftrace knows a function by its first NOP, or, where there is a pointer before the function, by that.
			for ; len(b) > 0; b = b[8:] {
				at := VirtAddr(le64(b))
				if entry == siteOps {
					at += 8
				}
				x.site(at, entry)
			}
			continue
		}
		x.relative(from, b, table.size, table.kind)
	}
	x.sortSites()
	x.sums = make([]uint32, x.total/goldenLine)
	for _, o := range m.all { // the first hole that it fits into
		if x.fits(o) {
			break
		}
		x.place = max(x.place, o.place+o.total)
	}
	if m.g.keep != nil {
		x.keep = storeAt{m.g.keep, int64(m.g.total + x.place)}
	}
	return x, nil
}

// fits reports whether a module fits into the store at its place, before another.
func (x *goldenModule) fits(before *goldenModule) bool { return x.place+x.total <= before.place }

// follow lists the modules anew when it is time, and takes some of what has come.
func (m *goldenModules) follow(v *View, n uint64) error {
	if m == nil || m.why != nil {
		return nil
	}
	if !time.Now().Before(m.next) {
		if err := m.refresh(v); err != nil {
			return fmt.Errorf("list modules: %w", err)
		}
	}
	_, err := m.taking(v, max(goldenHaste*n, goldenChunk))
	return err
}

// taking takes up to n bytes of the modules that are not whole, and reports whether some are left.
func (m *goldenModules) taking(v *View, n uint64) (left bool, err error) {
	for _, x := range slices.Clone(m.all) {
		for !x.whole() && !x.gone {
			if n == 0 {
				return true, nil
			}
			size, err := m.takeSome(v, x)
			if n -= min(n, size); err == nil {
				continue
			}
			same, lost := m.same(v, x)
			if lost != nil {
				return true, lost
			}
			m.drop(x)
			if same {
				m.skip = append(m.skip, fmt.Sprintf("module %s: %v", x.module, err))
				if !tolerable(err) {
					return true, err
				}
			}
		}
	}
	return false, nil
}

// takeSome takes the next piece of a module, and returns how much was read for that.
func (m *goldenModules) takeSome(v *View, x *goldenModule) (n uint64, err error) {
	text := x.regions[0]
	mine := func() ([]trap, error) {
		all, err := m.g.traps.list(v)
		return slices.Clone(within(all, text.from, text.to)), err
	}
	if !x.begun {
		if x.was, err = mine(); err != nil {
			return 0, err
		}
		x.begun = true
	}
	if size := uint64(text.to - text.from); x.scanned < size && text.name == "text" && x.img.arch.name == "x86_64" {
		b := make([]byte, min(goldenChunk+8, size-x.scanned))
		if err := x.img.space.read(fresh{v}, text.from+VirtAddr(x.scanned), b); err != nil {
			return 0, err
		}
		// Those that a module defines have a mark, arch/x86/kernel/static_call.c: tramp_ud.
		for i := 0; i+8 <= len(b); i += 4 {
			if string(b[i+5:i+8]) == "\x0f\xb9\xcc" && (b[i] == 0xe9 || b[i] == 0xc3 || b[i] == 0x2e) {
				x.site(text.from+VirtAddr(x.scanned)+VirtAddr(i), siteTramp)
			}
		}
		if x.scanned += goldenChunk; x.scanned >= size {
			x.sortSites()
		}
		return uint64(len(b)), nil
	}
	if x.taken+goldenChunk < x.total {
		n, err := x.keepPiece(v, x.taken, nil)
		x.taken += n
		return n, err
	}
	// The last piece may be of several regions.
	for at := x.taken; at < x.total; {
		size, err := x.keepPiece(v, at, nil)
		if err != nil {
			return n, err
		}
		at, n = at+size, n+size
	}
	// It must be the same still, and no breakpoint have come or gone meanwhile.
	m.g.traps.forget()
	v.forget()
	now, err := mine()
	if err != nil {
		return n, err
	}
	same, err := m.same(v, x)
	switch {
	case err != nil:
		return n, err
	case !same:
		m.drop(x)
	case slices.EqualFunc(x.was, now, trap.equal):
		x.taken = x.total
	default:
		x.was, x.taken = now, 0
	}
	return n, nil
}

// again looks at the suspects, and then whether the modules that have some are there still.
func (m *goldenModules) again(v *View) error {
	for _, x := range slices.Clone(m.list()) {
		if len(x.suspects) == 0 {
			continue
		}
		err := x.again(v)
		same, lost := m.same(v, x)
		switch {
		case lost != nil:
			return lost
		case !same:
			m.drop(x)
		case err != nil:
			return err
		}
	}
	return nil
}

// begin begins the modules' part of a round, and reports whether there is any.
func (m *goldenModules) begin() bool {
	if m == nil {
		return false
	}
	m.queue = m.queue[:0]
	for _, x := range m.all {
		if x.done = 0; x.whole() {
			m.queue = append(m.queue, x)
		}
	}
	return len(m.queue) > 0
}

// compare looks at what is next, at most n bytes, and reports whether that was the last of the round.
func (m *goldenModules) compare(v *View, n uint64) (size uint64, ended bool, err error) {
	for len(m.queue) > 0 {
		x := m.queue[0]
		if x.gone || x.done >= x.total {
			m.queue = m.queue[1:]
			continue
		}
		if size, err = x.goldenPart.compare(v, x.done, n); err == nil {
			x.done += size
			break
		}
		same, lost := m.same(v, x)
		if lost != nil {
			return 0, false, errors.Join(err, lost)
		}
		if same {
			return 0, false, err
		}
		m.drop(x)
	}
	for len(m.queue) > 0 && (m.queue[0].gone || m.queue[0].done >= m.queue[0].total) {
		m.queue = m.queue[1:]
	}
	return size, len(m.queue) == 0, nil
}

// changes adds those of the modules.
func (m *goldenModules) changes(v *View, out []Change) []Change {
	for _, x := range m.list() {
		out = x.changes(v, out)
	}
	return out
}
