package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	maxCPUs = 8192 // NR_CPUS of any distribution

	// A memory image whose kernel stands still is searched to the end for another one, if that takes no longer than
	// searchPatience; else the kernel gets that long to move first: an idle one may pause for seconds.
	searchPatience = 5 * time.Second
	// moveSoon is how long a kernel that runs needs to show it, unless all its CPUs idle.
	moveSoon = 20 * time.Millisecond
	// moveRival is how long kernels are watched, one of which must be the live one.
	moveRival = 600 * time.Millisecond
)

// Open finds the kernel in mem, learns its layout and proves it.
//
// The VMCOREINFO note comes from the headers of a dump, from Options.Note, or from a search of the RAM. After a warm reboot
// the previous kernel may still be in memory, complete: of several kernels the one that moves is chosen, else the one with
// the latest clock.
//
// The error is an *AttachError with the rungs that were climbed. It wraps ErrNotFound if there is no kernel; together with
// ErrNotYet if one is about to be; ErrNotSupported with the reason if there is one that cannot be read; a *CorruptError if
// its memory does not make sense; or the error of the memory or the context.
func Open(ctx context.Context, mem hostmem.Memory, o Options) (*Image, error) {
	a := attacher{ctx: ctx, mem: mem, opt: o, log: o.Logger, tried: make(map[hostmem.PhysAddr]bool)}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	img, err := a.attach()
	if err != nil {
		return nil, &AttachError{a.failed, err}
	}
	i := &img.info
	a.log.Info("attached to kernel", "release", i.Release, "note", i.Note, "boot", i.BootID, "symbols", i.Symbols)
	return img, nil
}

type attacher struct {
	ctx    context.Context
	mem    hostmem.Memory
	opt    Options
	log    *slog.Logger
	tried  map[hostmem.PhysAddr]bool
	found  []*candidate
	failed []Rung // of the candidate that came furthest
	err    error  // its error
}

// candidate is a kernel that was proven, and its clocks when it was.
type candidate struct {
	img   *Image
	beat  Heartbeat
	moved bool
}

func (a *attacher) attach() (*Image, error) {
	if text := hostmem.VMCOREINFO(a.mem); text != nil {
		// A dump: nothing moves in it, and the kernel that wrote it is the one that is asked for.
		began := time.Now()
		v, err := parseVMCOREINFO(text)
		a.try(v, err, Rung{Name: "note", Detail: "from the headers of the dump"}, began)
		if len(a.found) == 0 {
			return nil, a.err
		}
		return a.choose(a.found[0], "a dump"), nil
	}
	if a.opt.Hint.Note != 0 {
		began := time.Now()
		v, err := readNote(a.mem, a.opt.Hint.Note)
		if stale := errors.Is(err, errNoNote) || errors.Is(err, hostmem.ErrNotMapped); !stale || a.opt.NoteOnly {
			a.tried[a.opt.Hint.Note] = true
			a.try(v, err, Rung{Name: "note", Detail: fmt.Sprintf("%v, as known from before", a.opt.Hint.Note)}, began)
		}
		if a.opt.NoteOnly {
			if len(a.found) == 0 {
				return nil, a.err
			}
			return a.choose(a.found[0], "not asked"), nil
		}
		for _, c := range a.found {
			if now := time.Now(); a.opt.Hint.goesOn(c, now) {
				c.moved = true
				return a.choose(c, fmt.Sprintf("the boot that was known; its clock has gone on for the %v since", now.Sub(a.opt.Hint.At).Round(time.Millisecond))), nil
			}
		}
		if c := a.moving(moveSoon); c != nil {
			return a.choose(c, "moves"), nil
		}
	}
	s := newSearcher(a.mem, a.opt.Progress)
	for _, ranges := range searchOrder(hostmem.ResidentRanges(a.mem)) {
		for _, r := range ranges {
			began := time.Now()
			stop, err := s.search(a.ctx, r, func(pa hostmem.PhysAddr) bool { return a.note(pa, s, &began) })
			if err != nil {
				return nil, err
			}
			if stop {
				return a.choose(a.moving(0), "moves"), nil
			}
		}
		if len(a.found) > 0 && s.expected() > searchPatience {
			if c := a.moving(searchPatience); c != nil {
				return a.choose(c, "moves"), nil
			}
		}
	}
	return a.judge(s)
}

// note tries the note at pa that the search found and reports whether the search can end: its kernel moves.
func (a *attacher) note(pa hostmem.PhysAddr, s *searcher, began *time.Time) bool {
	if a.tried[pa] {
		return false
	}
	a.tried[pa] = true
	v, err := readNote(a.mem, pa)
	a.try(v, err, Rung{Name: "note", Detail: fmt.Sprintf("%v, after %d MiB of search by %s", pa, s.done>>20, s.way().name)}, *began)
	*began = time.Now()
	return a.moving(moveSoon) != nil
}

// judge chooses among the kernels of a memory that was searched to the end.
func (a *attacher) judge(s *searcher) (*Image, error) {
	switch len(a.found) {
	case 0:
		if a.err != nil {
			return nil, a.err
		}
		if s.holes > 0 && s.bytes == 0 {
			return nil, fmt.Errorf("no page of the memory can be read: %w", ErrNotFound)
		}
		return nil, fmt.Errorf("no Linux kernel in %d MiB of memory (no VMCOREINFO note): %w", s.total>>20, ErrNotFound)
	case 1:
		if c := a.moving(0); c != nil {
			return a.choose(c, "moves"), nil
		}
		return a.choose(a.found[0], "does not move: dead, frozen, idle, or an image"), nil
	}
	if c := a.moving(moveRival); c != nil {
		return a.choose(c, fmt.Sprintf("moves, of %d kernels in memory", len(a.found))), nil
	}
	best := a.found[0]
	for _, c := range a.found[1:] {
		if c.real() > best.real() {
			best = c
		}
	}
	return a.choose(best, fmt.Sprintf("none of %d kernels in memory moves; this one has the latest clock", len(a.found))), nil
}

// real is the host's wall clock when the candidate was proven.
func (c *candidate) real() int64 { return c.img.info.BootTime.UnixNano() + c.beat.Mono }

// moving returns a candidate that made progress since it was proven, waiting for one at most the given time. It takes the
// latest of several, for a page that belongs to a live kernel by now may make a corpse twitch.
func (a *attacher) moving(wait time.Duration) *candidate {
	for end := time.Now().Add(wait); ; time.Sleep(2 * time.Millisecond) {
		var best *candidate
		for _, c := range a.found {
			if !c.moved {
				now, err := c.img.View(a.ctx).Heartbeat()
				c.moved = err == nil && now.progressed(c.beat)
			}
			if c.moved && (best == nil || c.real() > best.real()) {
				best = c
			}
		}
		if best != nil || len(a.found) == 0 || a.ctx.Err() != nil || !time.Now().Before(end) {
			return best
		}
	}
}

// progressed reports whether anything moved between an earlier sample and this one.
func (h Heartbeat) progressed(since Heartbeat) bool {
	if h.Jiffies != since.Jiffies || h.Mono != since.Mono || len(h.CPUs) != len(since.CPUs) {
		return true
	}
	for i, c := range h.CPUs {
		old := since.CPUs[i]
		if c.Clock != old.Clock || c.Switches != old.Switches || c.IRQs != old.IRQs || c.TimerIRQs != old.TimerIRQs {
			return true
		}
	}
	return false
}

func (a *attacher) choose(c *candidate, why string) *Image {
	c.img.info.Rungs = append(c.img.info.Rungs, Rung{Name: "alive", OK: c.moved, Detail: why})
	a.opt.Cache.put(c.img)
	return c.img
}

// try climbs the ladder from a note on. err is what reading the note came to.
func (a *attacher) try(v *vmcoreinfo, err error, note Rung, began time.Time) {
	l := ladder{a: a, began: began}
	var img *Image
	err = l.rung(note.Name, func() (string, error) { return note.Detail, err })
	if err == nil {
		img, err = l.climb(v)
	}
	if err == nil {
		img.info.Rungs = l.rungs
		c := &candidate{img: img}
		if c.beat, err = img.View(a.ctx).Heartbeat(); err == nil {
			a.found = append(a.found, c)
			return
		}
	}
	a.log.Debug("no kernel here", "note", note.Detail, "err", err)
	if a.err == nil || len(l.rungs) > len(a.failed) {
		a.err, a.failed = err, l.rungs
	}
}

// ladder is the climb to one kernel.
type ladder struct {
	a     *attacher
	began time.Time
	rungs []Rung
}

// rung takes one step and notes how it went.
func (l *ladder) rung(name string, step func() (detail string, err error)) error {
	if l.began.IsZero() {
		l.began = time.Now()
	}
	detail, err := step()
	r := Rung{Name: name, OK: err == nil, Detail: detail, Duration: time.Since(l.began)}
	l.began = time.Time{}
	if err != nil {
		r.Detail = err.Error()
		err = fmt.Errorf("%s: %w", name, err)
	}
	l.rungs = append(l.rungs, r)
	l.a.log.Debug("rung", "name", name, "ok", r.OK, "detail", r.Detail, "took", r.Duration)
	return err
}

func (l *ladder) climb(v *vmcoreinfo) (*Image, error) {
	a := l.a
	src := direct{a.ctx, a.mem}
	img := &Image{whole: a.mem, mem: a.mem, note: v, ram: a.mem.Map(), cached: a.opt.Cache.get(v)}
	img.info = Info{Release: v.values["OSRELEASE"], BuildID: v.values["BUILD-ID"], Note: v.pa}
	var syms *symbolReader
	steps := []struct {
		name string
		step func() (string, error)
	}{
		{"paging", func() (string, error) { return img.findPaging(src) }},
		{"kallsyms", func() (detail string, err error) {
			syms, detail, err = img.findSymbols(a.ctx, src)
			return detail, err
		}},
		{"variables", func() (string, error) { return img.findData(a.ctx, src) }},
		{"btf", func() (string, error) { return img.findTypes(a.ctx, src, a.opt.Types) }},
		{"memory map", func() (string, error) { return img.findMemoryMap(src, syms) }},
		{"layout", func() (string, error) { return img.findLayout(src) }},
		{"proof", func() (string, error) { return img.proveFirst(a.ctx, src) }},
	}
	for _, s := range steps {
		if err := l.rung(s.name, s.step); err != nil {
			return nil, err
		}
	}
	img.syms.settle()
	// The kernel is proven; without its RAM map the one of the memory stands.
	_ = l.rung("ram", func() (string, error) {
		ram, err := img.systemRAM(src)
		if err != nil {
			return "", err
		}
		img.ram, img.ramKnown = ram, true
		img.mem = hostmem.Narrow(a.mem, ram)
		var total uint64
		for _, r := range ram {
			total += r.Size
		}
		return fmt.Sprintf("%d MiB in %d ranges; nothing else is read from now on", total>>20, len(ram)), nil
	})
	img.panic.sleeper, _ = hostmem.AsSleeper(img.mem)
	return img, nil
}

// findPaging tells the architecture and the page tables, and checks that walking them leads to the kernel's text.
func (img *Image) findPaging(src source) (string, error) {
	v := img.note
	size, err := parseUint(v.values["PAGESIZE"])
	if err != nil || size != 4<<10 && size != 16<<10 && size != 64<<10 {
		return "", fmt.Errorf("pages of %q bytes: %w", v.values["PAGESIZE"], ErrNotSupported)
	}
	img.pageSize = size
	if img.arch, err = archOf(v); err != nil {
		return "", err
	}
	space, where, err := img.arch.space(v)
	if err != nil {
		return "", err
	}
	img.space = space
	img.info.Arch, img.info.PhysBase, img.info.Levels = img.arch.name, where.physBase, where.levels
	if img.info.KASLR, err = parseHex(v.values["KERNELOFFSET"]); err != nil {
		return "", &CorruptError{"VMCOREINFO", 0, fmt.Sprintf("KERNELOFFSET is %q", v.values["KERNELOFFSET"])}
	}
	stext, ok := v.symbol("_stext")
	if !ok {
		return "", &CorruptError{"VMCOREINFO", 0, "no _stext"}
	}
	linear, _, err := space.translate(src, stext)
	if err != nil {
		return "", err
	}
	walked, _, err := space.walk(src, stext)
	if err != nil {
		return "", err
	}
	if walked != linear {
		return "", &CorruptError{"page table", stext, fmt.Sprintf("_stext is at %v by the page table and at %v by phys_base", walked, linear)}
	}
	return fmt.Sprintf("%s, %d levels, KASLR %#x, phys_base %#x", img.arch.name, where.levels, img.info.KASLR, where.physBase), nil
}

// symbolReader reads variables of the kernel image by name.
type symbolReader struct {
	img *Image
	src source
}

func (r *symbolReader) u64(name string) (uint64, error) {
	va, err := r.img.syms.symbol(name)
	if err != nil {
		return 0, err
	}
	var b [8]byte
	err = r.img.space.object(r.src, name, va, b[:])
	return le64(b[:]), err
}

// kallsymsPlaces is where the parts of the symbol table are.
type kallsymsPlaces struct {
	names, num, tokens, tokenIndex, offsets VirtAddr
	base                                    VirtAddr // kallsyms_relative_base; zero if there is none
}

// moved returns the places in a kernel that lies by so much higher.
func (p kallsymsPlaces) moved(by VirtAddr) kallsymsPlaces {
	for _, at := range []*VirtAddr{&p.names, &p.num, &p.tokens, &p.tokenIndex, &p.offsets, &p.base} {
		if *at != 0 {
			*at += by
		}
	}
	return p
}

// findSymbols reads the symbol table. VMCOREINFO names its places since commit 5fd8fea935a1 ("vmcoreinfo: include kallsyms
// symbols") (in v6.0); in kernels before, it is known by its shape.
func (img *Image) findSymbols(ctx context.Context, src source) (*symbolReader, string, error) {
	v := img.note
	var at kallsymsPlaces
	missing := ""
	for _, s := range []struct {
		name string
		to   *VirtAddr
	}{{"kallsyms_names", &at.names}, {"kallsyms_num_syms", &at.num}, {"kallsyms_token_table", &at.tokens},
		{"kallsyms_token_index", &at.tokenIndex}, {"kallsyms_offsets", &at.offsets}} {
		va, ok := v.symbol(s.name)
		if !ok {
			missing = s.name
		}
		*s.to = va
	}
	at.base, _ = v.symbol("kallsyms_relative_base")
	if stext, ok := v.symbol("_stext"); ok && missing != "" && img.cached != nil {
		if detail, err := img.readSymbols(src, img.cached.places.moved(stext)); err == nil {
			return &symbolReader{img, src}, detail + ", where this build has it", nil
		}
	}
	if missing != "" {
		return img.searchSymbols(ctx, src, missing)
	}
	detail, err := img.readSymbols(src, at)
	if err != nil {
		return nil, "", err
	}
	return &symbolReader{img, src}, detail + ", named by VMCOREINFO", nil
}

// readSymbols reads the symbol table at the given places, and proves it.
func (img *Image) readSymbols(src source, at kallsymsPlaces) (string, error) {
	v := img.note
	read := func(what string, va VirtAddr, n int) ([]byte, error) {
		b := make([]byte, n)
		return b, img.space.object(src, what, va, b)
	}
	var base VirtAddr
	if at.base != 0 {
		b, err := read("kallsyms_relative_base", at.base, 8)
		if err != nil {
			return "", err
		}
		base = VirtAddr(le64(b))
	}
	b, err := read("kallsyms_num_syms", at.num, 4)
	if err != nil {
		return "", err
	}
	n := int(le32(b))
	if n < 1 || n > kallsymsMaxSyms {
		return "", &CorruptError{"kallsyms_num_syms", at.num, fmt.Sprintf("is %d", n)}
	}
	known := make(map[string]VirtAddr)
	v.entries(func(e vmcoreEntry) {
		// Of some names VMCOREINFO gives the value, not the address: these are not in the image.
		va, ok := v.symbol(e.name)
		if l := img.space.linear[0]; ok && e.kind == "SYMBOL" && va >= l.start && va < l.end {
			known[e.name] = va
		}
	})
	take := func(k *kallsyms, from string) (string, error) {
		matched, err := k.infer(known, base, at.offsets)
		if err != nil {
			return "", &CorruptError{"kallsyms", at.names, err.Error()}
		}
		k.places = at
		img.syms, img.info.Symbols = k, n
		return fmt.Sprintf("%d symbols%s, %s, %d addresses known otherwise agree", n, from, k.formula, matched), nil
	}
	if c := img.cached; c != nil && len(c.syms.offsets) == n {
		if same, err := img.samples(src, "kallsyms_names", at.names, c.syms.names); err != nil {
			return "", err
		} else if same {
			return take(c.syms.bare(), " of this build, known from before")
		}
	}
	var t kallsymsTables
	if t.tokenIndex, err = read("kallsyms_token_index", at.tokenIndex, 512); err != nil {
		return "", err
	}
	// The last token begins where the index says; no token is as long as 256 bytes.
	if t.tokens, err = read("kallsyms_token_table", at.tokens, int(le16(t.tokenIndex[510:]))+256); err != nil {
		return "", err
	}
	if t.offsets, err = read("kallsyms_offsets", at.offsets, 4*n); err != nil {
		return "", err
	}
	var k *kallsyms
	// How long the names are is told nowhere: most are of some 12 bytes.
	for size := 13 * n; ; size += size/4 + 4096 {
		if size > kallsymsMaxNames {
			return "", &CorruptError{"kallsyms_names", at.names, "names do not end"}
		}
		have := len(t.names)
		t.names = append(t.names, make([]byte, size-have)...)
		if err := img.space.object(src, "kallsyms_names", at.names+VirtAddr(have), t.names[have:]); err != nil {
			return "", err
		}
		if k, err = newKallsyms(t, n); !errors.Is(err, errShortNames) {
			break
		}
	}
	if err != nil {
		return "", &CorruptError{"kallsyms", at.names, err.Error()}
	}
	return take(k, "")
}

// findMemoryMap finds the bounds of the image, the direct map and the per-CPU areas.
func (img *Image) findMemoryMap(src source, syms *symbolReader) (string, error) {
	img.lay = new(layout)
	r := resolver{img: img}
	img.lay.text, img.lay.end = r.symbol("_text", "_stext"), r.symbol("_end")
	img.perCPUStart, img.perCPUEnd = r.symbol("__per_cpu_start"), r.symbol("__per_cpu_end")
	offsets := r.symbol("__per_cpu_offset")
	possible := r.symbol("__cpu_possible_mask")
	if r.err != nil {
		return "", r.err
	}
	l := &img.space.linear[0]
	if img.lay.text < l.start || img.lay.end > l.end || img.lay.text >= img.lay.end {
		return "", &CorruptError{"_text", img.lay.text, fmt.Sprintf("image ends at %v", img.lay.end)}
	}
	// What is mapped around the image is no part of it: leave that to the page tables.
	l.pa += hostmem.PhysAddr(img.lay.text - l.start)
	l.start, l.end = img.lay.text, img.lay.end

	bottom, top := ^hostmem.PhysAddr(0), hostmem.PhysAddr(0)
	for _, m := range img.mem.Map() {
		bottom, top = min(bottom, m.Start), max(top, m.End())
	}
	direct, err := img.arch.directMap(img.note, syms.u64, bottom, top)
	if err != nil {
		return "", err
	}
	img.space.linear = append(img.space.linear, direct)

	// The note itself: the kernel's own pointer must lead to the page that was found, if the pointer is known.
	var b [8]byte
	pa := img.note.pa
	if note, err := img.syms.symbol("vmcoreinfo_note"); err == nil {
		if err := img.space.object(src, "vmcoreinfo_note", note, b[:]); err != nil {
			return "", err
		}
		if pa, _, err = img.space.translate(src, VirtAddr(le64(b[:]))); err != nil {
			return "", &CorruptError{"vmcoreinfo_note", note, err.Error()}
		}
		if img.note.pa == 0 {
			img.note.pa, img.info.Note = pa, pa
		}
		if pa != img.note.pa {
			return "", &CorruptError{"vmcoreinfo_note", note, fmt.Sprintf("points to %v, the note is at %v", pa, img.note.pa)}
		}
	}
	// The direct map, too, must be what the page tables say.
	if pa == 0 { // a dump of a kernel that does not name vmcoreinfo_note
		if pa, _, err = img.space.translate(src, r.symbol("init_task")); err != nil || r.err != nil {
			return "", errors.Join(err, r.err)
		}
	}
	if walked, _, err := img.space.walk(src, direct.start+VirtAddr(pa-direct.pa)); err != nil || walked != pa {
		return "", &CorruptError{"direct map", direct.start, fmt.Sprintf("%v is mapped to %v (%v)", pa, walked, err)}
	}

	if err := img.space.object(src, "nr_cpu_ids", r.symbol("nr_cpu_ids"), b[:4]); err != nil || r.err != nil {
		return "", errors.Join(r.err, err)
	}
	n := int(le32(b[:]))
	if n < 1 || n > maxCPUs {
		return "", &CorruptError{"nr_cpu_ids", r.symbol("nr_cpu_ids"), fmt.Sprintf("is %d", n)}
	}
	table, mask := make([]byte, 8*n), make([]byte, (n+63)/64*8)
	if err := img.space.object(src, "__per_cpu_offset", offsets, table); err != nil {
		return "", err
	}
	if err := img.space.object(src, "__cpu_possible_mask", possible, mask); err != nil {
		return "", err
	}
	img.perCPU = make([]VirtAddr, n)
	cpus := 0
	for i := range n {
		if mask[i/8]>>(i%8)&1 == 0 {
			continue
		}
		offset := VirtAddr(le64(table[8*i:]))
		if !img.space.valid(img.perCPUStart+offset, 8) {
			return "", &CorruptError{"__per_cpu_offset", offsets + VirtAddr(8*i), fmt.Sprintf("of CPU %d is %v", i, offset)}
		}
		img.perCPU[i] = offset
		cpus++
	}
	if cpus == 0 {
		return "", &CorruptError{"__cpu_possible_mask", possible, "no CPU"}
	}
	img.info.CPUs = cpus
	return fmt.Sprintf("image %v-%v, direct map from %v, %d CPUs", img.lay.text, img.lay.end, direct.start, cpus), nil
}

// findTypes finds the types of the kernel: in the BTF that it carries, or else in that which was made of its build elsewhere.
func (img *Image) findTypes(ctx context.Context, src source, elsewhere func(Build) ([]byte, error)) (string, error) {
	detail, err := img.readTypes(ctx, src)
	var corrupt *CorruptError
	if elsewhere == nil || !errors.Is(err, ErrNotSupported) && !errors.As(err, &corrupt) {
		return detail, err
	}
	if c := img.cached; c != nil && c.elsewhere {
		img.types, img.info.BTFBytes = c.types, c.types.size
		agree, err := img.compareLayouts()
		return fmt.Sprintf("%d bytes made elsewhere of this build, known from before, %d layouts known otherwise agree", c.types.size, agree), err
	}
	banner, berr := img.readBanner(src)
	if berr != nil {
		return "", errors.Join(err, berr)
	}
	raw, gerr := elsewhere(Build{Release: img.info.Release, ID: img.info.BuildID, Banner: banner})
	if gerr != nil {
		return "", errors.Join(err, fmt.Errorf("types made elsewhere: %w", gerr))
	}
	if raw == nil {
		return "", err
	}
	if detail, err = img.takeTypes(src, raw); err != nil {
		return "", fmt.Errorf("types made elsewhere: %w", err)
	}
	img.btfHead, img.elsewhere = nil, true
	return "made elsewhere: " + detail, nil
}

// readTypes reads the BTF that the kernel carries.
func (img *Image) readTypes(ctx context.Context, src source) (string, error) {
	start, err1 := img.syms.symbol("__start_BTF")
	stop, err2 := img.syms.symbol("__stop_BTF")
	if errors.Is(err1, ErrNotFound) || errors.Is(err2, ErrNotFound) {
		return "", fmt.Errorf("kernel carries no BTF (CONFIG_DEBUG_INFO_BTF), and no types were given for it: %w", ErrNotSupported)
	}
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	if start >= stop || stop-start > btfMaxSize {
		return "", &CorruptError{"__start_BTF", start, fmt.Sprintf("BTF of %d bytes", int64(stop-start))}
	}
	if c := img.cached; c != nil && !c.elsewhere && uint64(c.types.size) == uint64(stop-start) {
		if same, err := img.samples(src, "BTF", start, c.head); err != nil {
			return "", err
		} else if same {
			img.types, img.btfHead, img.info.BTFBytes = c.types, c.head, c.types.size
			agree, err := img.compareLayouts()
			return fmt.Sprintf("%d bytes of this build, known from before, %d layouts known otherwise agree", c.types.size, agree), err
		}
	}
	raw := make([]byte, stop-start)
	const piece = 1 << 20 // between looks at the context
	for at := 0; at < len(raw); at += piece {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		if err := img.space.object(src, "BTF", start+VirtAddr(at), raw[at:min(at+piece, len(raw))]); err != nil {
			return "", err
		}
	}
	head := slices.Clone(raw[:min(len(raw), btfHeadLen)]) // before newTypes changes it
	detail, err := img.takeTypes(src, raw)
	if errors.Is(err, errBadTypes) {
		return "", &CorruptError{"BTF", start, err.Error()}
	}
	img.btfHead = head
	return detail, err
}

var errBadTypes = errors.New("not usable")

// takeTypes parses raw BTF, which it changes, and compares it with the layouts that VMCOREINFO tells.
func (img *Image) takeTypes(src source, raw []byte) (string, error) {
	var vars map[string]uint32
	if _, err := img.syms.symbol("__per_cpu_start"); err != nil {
		vars = perCPUVars(raw)
	}
	t, err := newTypes(raw)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errBadTypes, err)
	}
	img.types, img.info.BTFBytes = t, len(raw)
	agree, err := img.compareLayouts()
	if err != nil {
		return "", err
	}
	detail := fmt.Sprintf("%d bytes, %d layouts known otherwise agree", len(raw), agree)
	if vars != nil {
		known, err := img.perCPUNames(vars)
		if err != nil {
			return "", err
		}
		detail += fmt.Sprintf("; %d per-CPU variables, %d of them known otherwise agree; in code: %s", len(vars), known, strings.Join(img.findDecoded(src), ", "))
	}
	return detail, nil
}

// compareLayouts compares SIZE and OFFSET lines of VMCOREINFO with the BTF.
func (img *Image) compareLayouts() (agree int, err error) {
	img.note.entries(func(e vmcoreEntry) {
		want, perr := parseUint(e.value)
		if perr != nil || err != nil {
			return
		}
		var got uint64
		var gerr error
		switch e.kind {
		case "SIZE":
			got, gerr = img.types.sizeof(e.name)
		case "OFFSET":
			typ, path, _ := strings.Cut(e.name, ".")
			var f Field
			f, gerr = img.types.field(typ, path)
			got = f.Offset
		default:
			return
		}
		switch {
		case gerr != nil: // a name of VMCOREINFO's own making
		case got != want:
			err = &CorruptError{"BTF", 0, fmt.Sprintf("%s of %s is %d, VMCOREINFO says %d", strings.ToLower(e.kind), e.name, got, want)}
		default:
			agree++
		}
	})
	if err == nil && agree < 10 {
		err = &CorruptError{"BTF", 0, fmt.Sprintf("only %d of VMCOREINFO's layouts are in it", agree)}
	}
	return agree, err
}

// findLayout finds the fields that this package reads itself. What later work needs may be missing: that is said when it
// is asked for.
func (img *Image) findLayout(src source) (string, error) {
	img.lay.task = img.taskLayout()
	img.lay.ahead = img.aheadLayout()
	img.lay.keeper = img.keeperLayout(src)
	img.lay.ring = img.ringLayout()
	img.lay.res = img.resourceLayout()
	if err := errors.Join(img.lay.task.err, img.lay.keeper.err); err != nil {
		return "", err
	}
	img.panic = img.panicPlan(src)
	img.usage = img.usagePlan(src)
	img.beat = img.beatPlan(src)
	if img.beat.err != nil {
		return "", img.beat.err
	}
	detail := "tasks, clocks, heartbeat"
	for _, group := range []struct {
		name string
		err  error
	}{{"printk ring", img.lay.ring.err}, {"resources", img.lay.res.err}} {
		if group.err != nil {
			detail += fmt.Sprintf("; no %s: %v", group.name, group.err)
		} else {
			detail += ", " + group.name
		}
	}
	return detail, nil
}

// readBanner reads linux_banner, which must be of the release that VMCOREINFO names, without the end of its line.
func (img *Image) readBanner(src source) (string, error) {
	banner, err := img.syms.symbol("linux_banner")
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	b := make([]byte, 512)
	if err := img.space.object(src, "linux_banner", banner, b); err != nil {
		return "", err
	}
	text, ended := cString(b)
	if !ended || !strings.HasPrefix(text, "Linux version "+img.info.Release+" ") {
		return "", &CorruptError{"linux_banner", banner, fmt.Sprintf("is %.60q, VMCOREINFO is of %s", text, img.info.Release)}
	}
	return strings.TrimSuffix(text, "\n"), nil
}

// proveFirst checks what must hold in any Linux kernel, and learns what Prove compares later.
func (img *Image) proveFirst(ctx context.Context, src source) (string, error) {
	banner, err := img.readBanner(src)
	if err != nil {
		return "", err
	}
	img.info.Banner = banner

	r := resolver{img: img}
	uts := r.symbol("init_uts_ns") + VirtAddr(r.field("uts_namespace", 0, "name")+r.field("new_utsname", 65, "nodename"))
	if r.err != nil {
		return "", r.err
	}
	nodename := make([]byte, 65)
	if err := img.space.object(src, "init_uts_ns", uts, nodename); err != nil {
		return "", err
	}
	img.info.Hostname, _ = cString(nodename)

	var o object
	init, err := img.readTask(src, &o, img.lay.task.init, 0)
	if err != nil {
		return "", err
	}
	if init.PID != 0 || !strings.HasPrefix(init.Comm, "swapper") {
		return "", &CorruptError{"init_task", init.Addr, fmt.Sprintf("is PID %d, %q", init.PID, init.Comm)}
	}
	if init.next == init.Addr {
		return "", fmt.Errorf("no task but init_task: %w", ErrNotYet)
	}
	if img.identity, err = img.identityOf(src); err != nil {
		return "", err
	}
	img.info.BootID = img.identity.bootID(img.info.BuildID)
	t, err := img.times(src)
	if err != nil {
		return "", err
	}
	img.info.BootTime = time.Unix(0, t.boot).UTC()
	img.lastMono.Store(t.mono)
	img.seen.Store(&seen{t.mono, time.Now()})

	// Where the memory of the kernel that crashed is described: ELFCORE_ADDR_MAX if none did (kernel/crash_dump.c).
	if va, err := img.syms.symbol("elfcorehdr_addr"); err == nil {
		var b [8]byte
		if err := img.space.object(src, "elfcorehdr_addr", va, b[:]); err == nil {
			img.info.Capture = le64(b[:]) < ^uint64(1)
		} else if !unreadable(err) {
			return "", err
		}
	}

	// The list of tasks comes back to where it begins; a very long one is believed from its first part.
	const enough = 4096
	tasks, view := 0, img.View(ctx)
	for _, err := range view.Tasks() {
		if err != nil {
			return "", err
		}
		if tasks++; tasks == enough {
			break
		}
	}
	detail := fmt.Sprintf("banner, note, init_task, page tables; list of %d tasks closes", tasks)
	if img.info.Capture {
		detail += "; it is the crash kernel of another"
	}
	return detail, nil
}
