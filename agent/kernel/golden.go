package kernel

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"sort"
	"strings"
	"time"
)

// Golden remembers the code and the constants of a kernel and of its modules, and its table of interrupts, as they were, and finds where they
// have changed. It trusts the host at the time when it is taken, and each module at the time when that is first seen: what had been changed before
// then is taken for good, unless the kernel as it was built is known (Known), which says nothing of modules.
//
// A kernel patches its own code and that of modules while it runs: static keys turn jumps into nops, static calls change their targets, ftrace
// and what stands on it (kprobes at the beginning of functions, BPF, live patches) turn the nops there into calls. Such places
// are known from the kernel's own tables, and what may legally be there is as good as anything else that may: a hook by way of
// ftrace is not seen here (Probes lists them), and neither is a breakpoint of a kprobe that the kernel has listed with the code that was there.
// What a second CPU that is plugged into a host with one has the kernel patch are changes like any other.
//
// A module that comes is taken once it is live, over some passes; one that goes is forgotten. Whether it is still the one that was taken is told by
// the number that sysfs gave its directory, which no other gets. Who can write the kernel's memory can forge that, and have a module trusted anew.
//
// It holds 4 bytes for each 128 bytes of code and constants, keyed so that nobody can make a change that looks like none (lineKey). The bytes
// themselves, some 23 MB, are kept elsewhere. It is not safe for concurrent use.
type Golden struct {
	goldenPart // the kernel's own
	hot        []stretch
	hotAt      int
	mods       *goldenModules
	left       []string

	at     uint64 // where the round is in the kernel's own
	done   uint64 // bytes of the round that are compared
	rounds int
}

// goldenPart is what is kept of the kernel's own image, or of a module.
type goldenPart struct {
	*goldenShared
	img     *Image
	module  string   // empty for the kernel's own
	owner   VirtAddr // its struct module
	regions []region
	sites   []uint64 // places that the kernel patches: offset from base, and in the lowest byte which kind; sorted
	base    VirtAddr
	late    [2]VirtAddr // from where to where constants are that the kernel fills in while it starts
	keep    GoldenStore // nil: only hashes

	sums     []uint32
	buf      []byte // of the piece that is compared
	total    uint64
	suspects map[uint64]*suspect // by line
}

// goldenShared is what all parts have together.
type goldenShared struct {
	key       *lineKey
	suspected int // lines of all parts
	traps     *traps
}

// GoldenStore keeps the golden bytes: a file.
type GoldenStore interface {
	io.ReaderAt
	io.WriterAt
}

type region struct {
	name     string
	from, to VirtAddr
	at       uint64 // of its first byte, in the row of all regions
}

// stretch is some lines on end, in the row of all regions.
type stretch struct{ from, to uint64 }

type suspect struct {
	since time.Time
	raw   []byte
	traps []trap // of kprobes, within
	sure  bool
}

// Change is a stretch of code or of constants that is not as it was: whole words of 8 bytes.
type Change struct {
	Region string   `json:"region"`           // "text", "rodata" or "idt"
	Module string   `json:"module,omitempty"` // whose that is; empty if it is the kernel's own
	Of     VirtAddr `json:"of,omitempty"`     // that module's struct module
	Addr   VirtAddr `json:"addr"`
	Symbol string   `json:"symbol,omitempty"` // in which it begins
	Offset uint64   `json:"offset,omitempty"`
	Now    HexBytes `json:"now"`
	// Was is what is to be there: the golden bytes, but for places that the kernel patches itself and has patched rightly. It
	// is empty if only hashes are kept.
	Was HexBytes `json:"was,omitempty"`
	// Owner is the module that a pointer among constants leads into now.
	Owner string `json:"owner,omitempty"`
}

// HexBytes are bytes that are hexadecimal in JSON.
type HexBytes []byte

// MarshalText implements encoding.TextMarshaler.
func (b HexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, b), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *HexBytes) UnmarshalText(t []byte) (err error) {
	*b, err = hex.AppendDecode(nil, t)
	return err
}

const (
	goldenLine   = 128
	goldenChunk  = 64 << 10
	goldenMost   = 256 << 20
	goldenMargin = 16 // more than a place that the kernel patches has, in bytes
	maxSuspects  = 256
	maxChanges   = 64
	// A place is seen in the middle of being patched for microseconds only.
	goldenStands = 20 * time.Millisecond

	siteJump  = 1 // a static key's
	siteCall  = 2 // a static call's
	siteEntry = 3 // the beginning of a function, where ftrace's nop may be
	siteTramp = 4 // the trampoline of a static call, or the jump of a BPF dispatcher
	siteOps   = 5 // as siteEntry, with a pointer before the function that ftrace changes (CONFIG_DYNAMIC_FTRACE_WITH_CALL_OPS of arm64)
	siteCalls = 6 // where ftrace's own code calls what it is to call
)

// hotNames are the endings of names of tables through which the kernel calls functions.
var hotNames = []string{"_ops", "_fops", "_operations", "sys_call_table", "_hooks", "_hook_heads", "static_calls_table"}

// TakeGolden reads the kernel's code and constants once, through a View of its own. ErrNotYet means that the kernel is still
// starting, and writes there itself. The bytes are put into keep, from 0 on, if that is not nil.
//
// With the kernel as it was built (nil: without) what is kept is that, where it is not what a host's kernel rightly makes of itself:
// what had been changed before is a change.
func TakeGolden(ctx context.Context, img *Image, keep GoldenStore, known *Known) (*Golden, error) {
	fail := func(err error) (*Golden, error) { return nil, fmt.Errorf("golden copy: %w", err) }
	if img.arch.blank == nil {
		return fail(fmt.Errorf("%s code: %w", img.info.Arch, ErrNotSupported))
	}
	v := img.View(ctx)
	g := &Golden{goldenPart: goldenPart{img: img, keep: keep, suspects: make(map[uint64]*suspect), goldenShared: &goldenShared{key: newLineKey(), traps: &traps{}}}}
	if err := g.running(v); err != nil {
		return fail(err)
	}
	var built *started
	if known != nil {
		var err error
		if built, err = known.start(v); err != nil {
			return fail(err)
		}
	}
	if err := g.survey(v, built); err != nil {
		return fail(err)
	}
	// A breakpoint that comes or goes meanwhile may be in what was read.
	for try := 0; ; try++ {
		before, err := g.traps.list(v)
		if err != nil {
			return fail(err)
		}
		for at := uint64(0); at < g.total; {
			n, err := g.keepPiece(v, at, built)
			if err != nil {
				return fail(err)
			}
			at += n
		}
		v.forget()
		g.traps.forget()
		after, err := g.traps.list(v)
		if err != nil {
			return fail(err)
		}
		if slices.EqualFunc(before, after, trap.equal) {
			break
		}
		if try == 2 {
			return fail(fmt.Errorf("kprobes come and go: %w", ErrNotYet))
		}
	}
	if err := g.modules(v); err != nil {
		return fail(err)
	}
	return g, nil
}

// keepPiece takes a piece and returns how many bytes it has.
func (g *goldenPart) keepPiece(v *View, at uint64, built *started) (uint64, error) {
	raw, plain, err := g.take(v, at, goldenChunk, built)
	if err != nil {
		return 0, err
	}
	if g.keep != nil {
		if _, err := g.keep.WriteAt(raw, int64(at)); err != nil {
			return 0, fmt.Errorf("keep golden copy: %w", err)
		}
	}
	for i := 0; i < len(plain); i += goldenLine {
		g.sums[(at+uint64(i))/goldenLine] = g.key.sum(plain[i : i+goldenLine])
	}
	return uint64(len(raw)), nil
}

// running returns nil once the kernel has made its constants read-only, which is right before it starts init (kernel_init of
// init/main.c).
func (g *Golden) running(v *View) error {
	r := resolver{img: g.img}
	at := r.symbol("system_state")
	if r.err != nil {
		return r.err
	}
	want, err := g.img.types.enum("system_states", "SYSTEM_RUNNING")
	if err != nil {
		return err
	}
	now, err := v.Uint32(at)
	if err != nil {
		return err
	}
	if int64(now) < want {
		return ErrNotYet
	}
	return nil
}

// survey finds what there is to keep, and where the kernel patches itself.
func (g *Golden) survey(v *View, built *started) error {
	r := resolver{img: g.img}
	page := VirtAddr(g.img.pageSize)
	text, etext := r.symbol("_stext"), r.symbol("_etext")
	g.base = text &^ (page - 1)
	type named struct {
		name     string
		from, to VirtAddr
	}
	all := []named{{"text", g.base, etext}}
	var rodata, erodata, idt VirtAddr
	if g.img.lacking {
		g.left = append(g.left, "the kernel's constants: its kallsyms does not name where they are")
	} else {
		rodata, erodata = r.symbol("__start_rodata"), r.symbol("__end_rodata")
		g.late = [2]VirtAddr{r.symbol("__start_ro_after_init"), r.symbol("__end_ro_after_init")}
		all = append(all, named{"rodata", rodata, erodata})
	}
	x86 := g.img.arch.name == "x86_64"
	if x86 {
		idt = r.symbol("idt_table")
		all = append(all, named{"idt", idt, idt + 256*16})
	}
	if r.err != nil {
		return r.err
	}
	for _, x := range all {
		x := region{name: x.name, from: alignUp(x.from, page), to: x.to &^ (page - 1), at: g.total}
		if x.from >= x.to || uint64(x.to-x.from) > goldenMost {
			return &CorruptError{x.name, x.from, fmt.Sprintf("ends at %v", x.to)}
		}
		g.regions = append(g.regions, x)
		g.total += uint64(x.to - x.from)
	}
	g.sums = make([]uint32, g.total/goldenLine)
	table := func(name string, size, kind uint64) error {
		from, to := r.symbol("__start_"+name), r.symbol("__stop_"+name)
		if r.err != nil {
			return r.err
		}
		if to < from || uint64(to-from) > 16<<20 || uint64(to-from)%size != 0 {
			return &CorruptError{name, from, fmt.Sprintf("has %d bytes", to-from)}
		}
		b := make([]byte, to-from)
		if built != nil {
			if n, err := built.read(from, b); err != nil || n < len(b) {
				return fmt.Errorf("read %s of the kernel as it was built: %d bytes: %w", name, n, errors.Join(err, ErrNotFound))
			}
		} else if err := g.img.space.read(fresh{v}, from, b); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		g.relative(from, b, size, kind)
		return nil
	}
	if g.img.lacking {
		from, b, err := g.img.jumpTable(v, text, etext)
		if err != nil {
			return err
		}
		g.relative(from, b, jumpEntry, siteJump)
	} else if err := table("__jump_table", jumpEntry, siteJump); err != nil {
		return err
	}
	if x86 {
		if err := table("static_call_sites", staticCallSite, siteCall); err != nil {
			return err
		}
	}
	if !x86 {
		if err := g.entries(v, text, etext, g.img.entryKind()); err != nil {
			return err
		}
	}
	k := g.img.syms
	from := sort.Search(len(k.offsets), func(i int) bool { return k.address(k.offsets[i], i) >= g.base })
	for i := from; i < len(k.offsets); i++ {
		va := k.address(k.offsets[i], i)
		if va >= erodata && va >= etext {
			break
		}
		if i%4096 == 0 && v.ctx.Err() != nil {
			return v.ctx.Err()
		}
		_, name := k.name(i)
		switch {
		case va < etext && strings.HasPrefix(name, "__SCT__") || strings.HasPrefix(name, "bpf_dispatcher_"):
			g.site(va, siteTramp)
		case va < etext && (name == "ftrace_call" || name == "ftrace_graph_call"):
			g.site(va, siteCalls)
		case va < etext && x86:
			g.site(va, siteEntry)
		case va >= rodata && slices.ContainsFunc(hotNames, func(end string) bool { return strings.HasSuffix(name, end) }):
			if size := k.sizeAt(va); size <= 64<<10 {
				g.heat(va, size)
			}
		}
	}
	g.heat(idt, 256*16)
	slices.SortFunc(g.hot, func(a, b stretch) int { return int(int64(a.from) - int64(b.from)) })
	var joined []stretch
	for _, s := range g.hot {
		if n := len(joined); n > 0 && s.from <= joined[n-1].to+2*goldenLine { // a hole that small costs less than another read
			joined[n-1].to = max(joined[n-1].to, s.to)
			continue
		}
		joined = append(joined, s)
	}
	g.hot = joined
	g.sortSites()
	return nil
}

const (
	// struct jump_entry { s32 code; s32 target; long key; }, include/linux/jump_label.h; struct static_call_site { s32 addr;
	// s32 key; }, include/linux/static_call_types.h. Code and addr are distances from themselves.
	jumpEntry      = 16
	staticCallSite = 8
)

// entryKind is how ftrace patches the beginning of functions.
func (img *Image) entryKind() uint64 {
	if _, err := img.syms.symbol("ftrace_nop_ops"); err == nil && img.arch.name == "aarch64" {
		return siteOps // kernel/trace/ftrace.c has it for CONFIG_DYNAMIC_FTRACE_WITH_CALL_OPS alone
	}
	return siteEntry
}

// entries notes the functions of an aarch64 kernel that ftrace knows, by how they begin: some of them, which others have taken the place of, have no
// symbol. The table of them is given back after start-up.
func (g *goldenPart) entries(v *View, from, to VirtAddr, kind uint64) error {
	b := make([]byte, goldenChunk+4)
	before := uint32(0)
	for at := from; at < to; at += goldenChunk {
		b := b[:min(uint64(len(b)), uint64(to-at))]
		if err := v.ctx.Err(); err != nil {
			return err
		}
		if err := g.img.space.read(fresh{v}, at, b); err != nil {
			return fmt.Errorf("read code: %w", err)
		}
		for i := 0; i+8 <= len(b); i += 4 {
			op, next := le32(b[i:]), le32(b[i+4:])
			if op == aarch64MovX9LR && (next == aarch64NOP || next>>26 == 0x25) {
				va := at + VirtAddr(i)
				if aarch64BTI(before) {
					va -= 4
				}
				g.site(va, kind)
			}
			before = op
		}
	}
	return nil
}

// site notes a place that the kernel patches, if it is in the code.
func (g *goldenPart) site(va VirtAddr, kind uint64) {
	if t := g.regions[0]; va >= g.base && va < t.to {
		g.sites = append(g.sites, uint64(va-g.base)<<8|kind)
	}
}

// relative notes the places that a table at an address tells of by their distance, in the first word of each of its entries.
func (g *goldenPart) relative(at VirtAddr, table []byte, size, kind uint64) {
	for i := uint64(0); i+size <= uint64(len(table)); i += size {
		g.site(at+VirtAddr(i)+VirtAddr(int64(int32(le32(table[i:])))), kind)
	}
}

func (g *goldenPart) sortSites() {
	slices.Sort(g.sites)
	g.sites = slices.Compact(g.sites)
}

// heat has the lines of a table looked at often.
func (g *Golden) heat(va VirtAddr, size uint64) {
	for _, r := range g.regions {
		if va >= r.from && va+VirtAddr(size) <= r.to && size > 0 {
			from := r.at + uint64(va-r.from)
			g.hot = append(g.hot, stretch{from &^ (goldenLine - 1), (from + size + goldenLine - 1) &^ (goldenLine - 1)})
		}
	}
}

// Bytes is how much one round reads, Hot how much of that are tables of functions.
func (g *Golden) Bytes() (total, hot uint64) {
	for _, s := range g.hot {
		hot += s.to - s.from
	}
	return g.total + g.mods.bytes(), hot
}

// Rounds is how often everything has been compared.
func (g *Golden) Rounds() int { return g.rounds }

// Compared is how many bytes of the present round have been compared.
func (g *Golden) Compared() uint64 { return g.done }

// Differing is how many lines of 128 bytes are not as they were, be it for a moment.
func (g *Golden) Differing() int { return g.suspected }

// Modules is how many modules are compared.
func (g *Golden) Modules() int { return g.mods.count() }

// Left says what is not compared, and why.
func (g *Golden) Left() []string { return slices.Concat(g.left, g.mods.left()) }

// Sweep compares the next n bytes of all, and the next hot bytes of the tables of functions, both rounded up to whole reads. What
// differs is read again at each call; what goes on differing in the same way is among the Changes. Modules that have come are taken, some of
// them at each call.
func (g *Golden) Sweep(v *View, n, hot uint64) error {
	g.traps.forget()
	if err := g.again(v); err != nil {
		return err
	}
	if err := g.mods.again(v); err != nil {
		return err
	}
	for done := uint64(0); done < hot && len(g.hot) > 0; {
		s := g.hot[g.hotAt]
		if g.hotAt++; g.hotAt == len(g.hot) {
			g.hotAt, hot = 0, 0
		}
		for at := s.from; at < s.to; {
			size, err := g.compare(v, at, s.to-at)
			if err != nil {
				return err
			}
			at += size
		}
		done += s.to - s.from
	}
	for done := uint64(0); done < n; {
		want := min(goldenChunk, max(n-done, goldenLine))
		var size uint64
		var err error
		ended := false
		if g.at < g.total {
			size, err = g.compare(v, g.at, want)
			g.at += size
			ended = g.at >= g.total && !g.mods.begin()
		} else {
			size, ended, err = g.mods.compare(v, want)
		}
		if err != nil {
			return err
		}
		done += size
		if g.done += size; ended {
			g.at, g.done = 0, 0
			g.rounds++
			break
		}
	}
	return g.mods.follow(v, n)
}

// again looks at the suspects.
func (g *goldenPart) again(v *View) error {
	for at, s := range g.suspects {
		raw, near, differs, err := g.differs(v, at)
		if err != nil {
			return fmt.Errorf("compare with golden copy: %w", err)
		}
		switch {
		case !differs:
			g.acquit(at)
		case !slices.Equal(raw, s.raw):
			*s = suspect{since: time.Now(), raw: slices.Clone(raw), traps: near}
		case time.Since(s.since) >= goldenStands:
			s.sure, s.traps = true, near
		}
	}
	return nil
}

func (g *goldenPart) acquit(at uint64) {
	delete(g.suspects, at)
	g.suspected--
}

// differs reads a line and says whether it is not as it was, breakpoints of kprobes aside, which it returns.
func (g *goldenPart) differs(v *View, at uint64) (raw []byte, near []trap, differs bool, err error) {
	r := g.where(at)
	b, lo, err := g.fetch(v, r, at, goldenLine)
	if err != nil {
		return nil, nil, false, err
	}
	raw = b[lo : lo+goldenLine]
	same := func(near []trap) bool {
		return g.sums[at/goldenLine] == g.key.sum(g.plain(r, at-r.at-lo, b, near)[lo:])
	}
	if same(nil) {
		return raw, nil, false, nil
	}
	if r.name == "text" {
		all, err := g.traps.list(v)
		if err != nil {
			return nil, nil, false, err
		}
		from := r.from + VirtAddr(at-r.at)
		near = slices.Clone(within(all, from-goldenMargin, from+goldenLine+goldenMargin))
	}
	return raw, near, len(near) == 0 || !same(near), nil
}

// compare looks at what is next, at most n bytes, and returns how much that was.
func (g *goldenPart) compare(v *View, at, n uint64) (uint64, error) {
	r := g.where(at)
	off, size := at-r.at, uint64(r.to-r.from)
	n = min((n+goldenLine-1)&^(goldenLine-1), size-off)
	lo, hi := min(off, goldenMargin), min(size-off-n, goldenMargin)
	g.buf = slices.Grow(g.buf[:0], int(lo+n+hi))[:lo+n+hi]
	if err := g.img.space.read(fresh{v}, r.from+VirtAddr(off-lo), g.buf); err != nil {
		return 0, fmt.Errorf("compare with golden copy: %w", err)
	}
	if r.name == "text" {
		g.normalize(off-lo, g.buf)
	}
	for i := uint64(0); i < n; i += goldenLine {
		line := at + i
		if g.sums[line/goldenLine] == g.key.sum(g.buf[lo+i:]) || g.suspects[line] != nil || g.suspected >= maxSuspects {
			continue
		}
		// Its bytes as they are are wanted now.
		raw, near, differs, err := g.differs(v, line)
		if err != nil {
			return 0, fmt.Errorf("compare with golden copy: %w", err)
		}
		if differs {
			g.suspects[line] = &suspect{since: time.Now(), raw: slices.Clone(raw), traps: near}
			g.suspected++
		}
	}
	return n, nil
}

// lineKey is the key of a hash of lines. Who does not know it cannot make two lines that look the same, but by a chance of 2^-32 + 2^-64: it is NH over
// words of 64 bits (Black, Halevi, Krawczyk, Krovetz, Rogaway, UMAC: fast and secure message authentication, 1999), whose 128 bits are made 32 by the
// strongly universal "multilinear" (Lemire, Kaser, Strongly universal string hashing is fast, 2014). It takes nothing but multiplications, so that it costs
// the same on every machine.
type lineKey struct {
	words [goldenLine / 8]uint64
	fold  [5]uint64
}

func newLineKey() *lineKey {
	k := new(lineKey)
	var b [8]byte
	for _, part := range [][]uint64{k.words[:], k.fold[:]} {
		for i := range part {
			rand.Read(b[:]) // never fails
			part[i] = le64(b[:])
		}
	}
	return k
}

func (k *lineKey) sum(line []byte) uint32 {
	l := (*[goldenLine]byte)(line)
	var hi, lo, carry uint64
	for i := 0; i < len(l); i += 16 {
		w, key := l[i:i+16:i+16], k.words[i/8:i/8+2:i/8+2]
		h, m := bits.Mul64(key[0]+le64(w), key[1]+le64(w[8:]))
		lo, carry = bits.Add64(lo, m, 0)
		hi, _ = bits.Add64(hi, h, carry)
	}
	f := &k.fold
	return uint32((f[0] + f[1]*(lo&0xffffffff) + f[2]*(lo>>32) + f[3]*(hi&0xffffffff) + f[4]*(hi>>32)) >> 32)
}

// where returns the region of a place in the row of all regions.
func (g *goldenPart) where(at uint64) region {
	for _, r := range g.regions {
		if at < r.at+uint64(r.to-r.from) {
			return r
		}
	}
	panic("kernel: beyond the golden copy")
}

// fetch reads up to n bytes, whole lines of one region, and some margin, of which there are lo bytes before.
func (g *goldenPart) fetch(v *View, r region, at, n uint64) (b []byte, lo uint64, err error) {
	off, size := at-r.at, uint64(r.to-r.from)
	n = min((n+goldenLine-1)&^(goldenLine-1), size-off)
	lo = min(off, goldenMargin)
	b = make([]byte, lo+n+min(size-off-n, goldenMargin))
	return b, lo, g.img.space.read(fresh{v}, r.from+VirtAddr(off-lo), b)
}

// plain returns a copy of a piece of a region, which begins at an offset, without what the kernel may have patched.
func (g *goldenPart) plain(r region, off uint64, b []byte, near []trap) []byte {
	c := slices.Clone(b)
	if r.name == "text" {
		g.img.disarm(near, r.from+VirtAddr(off), c)
		g.normalize(off, c)
	}
	return c
}

// read returns up to n bytes, whole lines of one region, with what was where there are breakpoints of kprobes now, and the same without what the
// kernel may have patched.
func (g *goldenPart) read(v *View, at, n uint64, near []trap) (raw, plain []byte, err error) {
	r := g.where(at)
	b, lo, err := g.fetch(v, r, at, n)
	if err != nil {
		return nil, nil, err
	}
	n = min((n+goldenLine-1)&^(goldenLine-1), uint64(r.to-r.from)-(at-r.at))
	if r.name == "text" {
		g.img.disarm(near, r.from+VirtAddr(at-r.at-lo), b)
	}
	return b[lo : lo+n], g.plain(r, at-r.at-lo, b, nil)[lo : lo+n], nil
}

// take returns what is to be kept of up to n bytes, whole lines of one region, and that without what the kernel may patch.
func (g *goldenPart) take(v *View, at, n uint64, built *started) (raw, plain []byte, err error) {
	r := g.where(at)
	near, err := g.traps.list(v)
	if err != nil {
		return nil, nil, err
	}
	if built == nil || r.name == "idt" {
		return g.read(v, at, n, near)
	}
	off, size := at-r.at, uint64(r.to-r.from)
	n = min((n+goldenLine-1)&^(goldenLine-1), size-off)
	lo, hi := min(off, lineMost), min(size-off-n, lineMost)
	host := make([]byte, lo+n+hi)
	if err := g.img.space.read(fresh{v}, r.from+VirtAddr(off-lo), host); err != nil {
		return nil, nil, err
	}
	want := make([]byte, len(host))
	from := r.from + VirtAddr(off-lo)
	if r.name == "text" {
		g.img.disarm(near, from, host)
	}
	have, err := built.read(from, want)
	if err != nil {
		return nil, nil, err
	}
	copy(want[have:], host[have:])
	if r.name != "text" {
		// What the kernel fills in before it makes it read-only.
		for i := max(from, g.late[0]); i < min(from+VirtAddr(len(want)), g.late[1]); i++ {
			want[i-from] = host[i-from]
		}
		return want[lo : lo+n], want[lo : lo+n], nil
	}
	plainHost, plainWant := slices.Clone(host), slices.Clone(want)
	g.normalize(off-lo, plainHost)
	g.normalize(off-lo, plainWant)
	for i := range want {
		if plainHost[i] == plainWant[i] {
			want[i] = host[i]
		}
	}
	if err := built.settle(from, want, host); err != nil {
		return nil, nil, err
	}
	copy(plainWant, want)
	g.normalize(off-lo, plainWant)
	return want[lo : lo+n], plainWant[lo : lo+n], nil
}

// kept returns a line of the golden copy as it was, and without what the kernel may patch. ErrNotFound means that the store does
// not have it, or has lost it.
func (g *goldenPart) kept(at uint64) (raw, plain []byte, err error) {
	if g.keep == nil {
		return nil, nil, ErrNotFound
	}
	r := g.where(at)
	off, size := at-r.at, uint64(r.to-r.from)
	lo, hi := min(off, goldenMargin), min(size-off-goldenLine, goldenMargin)
	b := make([]byte, lo+goldenLine+hi)
	if _, err := g.keep.ReadAt(b, int64(at-lo)); err != nil {
		return nil, nil, fmt.Errorf("read golden copy: %w: %w", err, ErrNotFound)
	}
	c := b
	if r.name == "text" {
		c = slices.Clone(b)
		g.normalize(off-lo, c)
	}
	raw, plain = b[lo:lo+goldenLine], c[lo:lo+goldenLine]
	if g.key.sum(plain) != g.sums[at/goldenLine] {
		return nil, nil, fmt.Errorf("golden copy is damaged at %d: %w", at, ErrNotFound)
	}
	return raw, plain, nil
}

// Changes returns what is not as it was, the kernel's own by address, then each module's. Nothing is read from the host but where pointers lead,
// and the names of modules' functions.
func (g *Golden) Changes(v *View) []Change {
	return g.mods.changes(v, g.changes(v, nil))
}

// changes adds those of a part.
func (g *goldenPart) changes(v *View, out []Change) []Change {
	var lines []uint64
	for at, s := range g.suspects {
		if s.sure {
			lines = append(lines, at)
		}
	}
	slices.Sort(lines)
	for _, at := range lines {
		r := g.where(at)
		s := g.suspects[at]
		now := s.raw
		was, plainWas, err := g.kept(at)
		add := func(from, to int) {
			if len(out) == maxChanges {
				return
			}
			c := Change{Region: r.name, Module: g.module, Of: g.owner, Addr: r.from + VirtAddr(at-r.at) + VirtAddr(from), Now: slices.Clone(now[from:to])}
			if g.module == "" {
				c.Symbol, c.Offset, _ = g.img.syms.at(c.Addr)
			} else if name, at, err := v.moduleSymbol(Module{Addr: g.owner}, c.Addr); err == nil {
				c.Symbol, c.Offset = name, uint64(c.Addr-at)
			}
			if err == nil {
				c.Was = slices.Clone(was[from:to])
			}
			for i := 0; i < len(c.Now) && r.name == "rodata" && len(c.Now) <= 64 && c.Owner == ""; i += 8 {
				if to := VirtAddr(le64(c.Now[i:])); g.img.space.valid(to, 1) {
					if m, err := v.moduleAt(to); err == nil && m.Name != g.module {
						c.Owner = m.Name
					}
				}
			}
			out = append(out, c)
		}
		if err != nil {
			add(0, goldenLine)
			continue
		}
		plain := now
		if r.name == "text" {
			// The margins are the golden ones: what is patched across the edge of a line is its neighbour's matter.
			off := at - r.at
			lo, hi := min(off, goldenMargin), min(uint64(r.to-r.from)-off-goldenLine, goldenMargin)
			b := make([]byte, lo+goldenLine+hi)
			if _, err := g.keep.ReadAt(b, int64(at-lo)); err != nil {
				add(0, goldenLine)
				continue
			}
			copy(b[lo:], now)
			plain = g.plain(r, off-lo, b, s.traps)[lo : lo+goldenLine]
		}
		was = slices.Clone(was)
		from := -1
		for w := 0; w <= goldenLine; w += 8 {
			differs := false
			for i := w; i < w+8 && w < goldenLine; i++ {
				if plain[i] == plainWas[i] {
					was[i] = now[i] // the same, or rightly patched
				} else {
					differs = true
				}
			}
			switch {
			case differs && from < 0:
				from = w
			case !differs && from >= 0:
				add(from, w)
				from = -1
			}
		}
	}
	return out
}

// normalize blanks what the kernel may have patched itself, in a piece of code that begins at an offset.
func (g *goldenPart) normalize(start uint64, b []byte) {
	i := sort.Search(len(g.sites), func(i int) bool { return g.sites[i]>>8 >= start })
	for ; i < len(g.sites); i++ {
		off, kind := g.sites[i]>>8-start, g.sites[i]&0xff
		if off+goldenMargin/2+2 > uint64(len(b)) {
			return
		}
		g.img.arch.blank(kind, b, off)
	}
}
