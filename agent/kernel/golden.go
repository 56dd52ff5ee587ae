package kernel

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"time"
)

// Golden remembers the kernel's code, its constants and its table of interrupts as they were, and finds where they have changed.
// It trusts the host at the time when it is taken, and what had been changed before then is taken for good, unless the kernel as it
// was built is known (Known).
//
// A kernel patches its own code while it runs: static keys turn jumps into nops, static calls change their targets, ftrace
// and what stands on it (kprobes at the beginning of functions, BPF, live patches) turn the nops there into calls. Such places
// are known from the kernel's own tables, and what may legally be there is as good as anything else that may: a hook by way of
// ftrace is not seen here (Probes lists them). Breakpoints elsewhere, of kprobes in the middle of functions, are changes
// like any other, and so is what a second CPU that is plugged into a host with one has the kernel patch. Modules' own code is not
// looked at.
//
// It holds 4 bytes for each 128 bytes of the kernel, keyed so that nobody can make a change that looks like none (lineKey). The bytes
// themselves, some 23 MB, are kept elsewhere. It is not safe for concurrent use.
type Golden struct {
	img     *Image
	regions []region
	sites   []uint64 // places that the kernel patches: offset from base, and in the lowest byte which kind; sorted
	base    VirtAddr
	late    [2]VirtAddr // from where to where constants are that the kernel fills in while it starts
	hot     []stretch
	keep    GoldenStore // nil: only hashes

	key      *lineKey
	sums     []uint32
	buf      []byte // of the piece that is compared
	total    uint64
	at       uint64 // where the round is
	rounds   int
	hotAt    int
	suspects map[uint64]*suspect // by line
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
	sure  bool
}

// Change is a stretch of code or of constants that is not as it was: whole words of 8 bytes.
type Change struct {
	Region string   `json:"region"` // "text", "rodata" or "idt"
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
)

// hotNames are the endings of names of tables through which the kernel calls functions.
var hotNames = []string{"_ops", "_fops", "_operations", "sys_call_table", "_hooks", "_hook_heads", "static_calls_table"}

// TakeGolden reads the kernel's code and constants once, through a View of its own. ErrNotYet means that the kernel is still
// starting, and writes there itself. The bytes are put into keep, from 0 on, if that is not nil.
//
// With the kernel as it was built (nil: without) what is kept is that, where it is not what a host's kernel rightly makes of itself:
// what had been changed before is a change.
func TakeGolden(ctx context.Context, img *Image, keep GoldenStore, known *Known) (*Golden, error) {
	if img.info.Arch != "x86_64" {
		return nil, fmt.Errorf("golden copy of %s code: %w", img.info.Arch, ErrNotSupported)
	}
	g := &Golden{img: img, keep: keep, key: newLineKey(), suspects: make(map[uint64]*suspect)}
	v := img.View(ctx)
	if err := g.running(v); err != nil {
		return nil, fmt.Errorf("golden copy: %w", err)
	}
	var built *started
	if known != nil {
		var err error
		if built, err = known.start(v); err != nil {
			return nil, fmt.Errorf("golden copy: %w", err)
		}
	}
	if err := g.survey(v, built); err != nil {
		return nil, fmt.Errorf("golden copy: %w", err)
	}
	for at := uint64(0); at < g.total; {
		raw, plain, err := g.take(v, at, goldenChunk, built)
		if err != nil {
			return nil, fmt.Errorf("golden copy: %w", err)
		}
		if keep != nil {
			if _, err := keep.WriteAt(raw, int64(at)); err != nil {
				return nil, fmt.Errorf("keep golden copy: %w", err)
			}
		}
		for i := 0; i < len(plain); i += goldenLine {
			g.sums[(at+uint64(i))/goldenLine] = g.key.sum(plain[i : i+goldenLine])
		}
		at += uint64(len(raw))
	}
	return g, nil
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
	rodata, erodata := r.symbol("__start_rodata"), r.symbol("__end_rodata")
	idt := r.symbol("idt_table")
	g.late = [2]VirtAddr{r.symbol("__start_ro_after_init"), r.symbol("__end_ro_after_init")}
	jumps, ejumps := r.symbol("__start___jump_table"), r.symbol("__stop___jump_table")
	calls, ecalls := r.symbol("__start_static_call_sites"), r.symbol("__stop_static_call_sites")
	if r.err != nil {
		return r.err
	}
	g.base = text &^ (page - 1)
	for _, x := range []region{
		{name: "text", from: g.base, to: etext}, {name: "rodata", from: rodata, to: erodata}, {name: "idt", from: idt, to: idt + 256*16},
	} {
		x.from, x.to, x.at = alignUp(x.from, page), x.to&^(page-1), g.total
		if x.from >= x.to || uint64(x.to-x.from) > goldenMost {
			return &CorruptError{x.name, x.from, fmt.Sprintf("ends at %v", x.to)}
		}
		g.regions = append(g.regions, x)
		g.total += uint64(x.to - x.from)
	}
	g.sums = make([]uint32, g.total/goldenLine)
	site := func(va VirtAddr, kind uint64) {
		if va >= g.base && va < etext {
			g.sites = append(g.sites, uint64(va-g.base)<<8|kind)
		}
	}
	table := func(name string, from, to VirtAddr, size uint64, kind uint64) error {
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
		for i := uint64(0); i < uint64(len(b)); i += size {
			site(from+VirtAddr(i)+VirtAddr(int64(int32(le32(b[i:])))), kind) // they hold distances from themselves
		}
		return nil
	}
	// struct jump_entry { s32 code; s32 target; long key; }, include/linux/jump_label.h; struct static_call_site { s32 addr;
	// s32 key; }, include/linux/static_call_types.h.
	if err := table("jump table", jumps, ejumps, 16, siteJump); err != nil {
		return err
	}
	if err := table("static call sites", calls, ecalls, 8, siteCall); err != nil {
		return err
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
			site(va, siteTramp)
		case va < etext:
			site(va, siteEntry)
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
	slices.Sort(g.sites)
	g.sites = slices.Compact(g.sites)
	return nil
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
	return g.total, hot
}

// Rounds is how often everything has been compared.
func (g *Golden) Rounds() int { return g.rounds }

// Compared is how many bytes of the present round have been compared.
func (g *Golden) Compared() uint64 { return g.at }

// Differing is how many lines of 128 bytes are not as they were, be it for a moment.
func (g *Golden) Differing() int { return len(g.suspects) }

// Sweep compares the next n bytes of all, and the next hot bytes of the tables of functions, both rounded up to whole reads. What
// differs is read again at each call; what goes on differing in the same way is among the Changes.
func (g *Golden) Sweep(v *View, n, hot uint64) error {
	if err := g.again(v); err != nil {
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
		size, err := g.compare(v, g.at, min(goldenChunk, max(n-done, goldenLine)))
		if err != nil {
			return err
		}
		done += size
		if g.at += size; g.at >= g.total {
			g.at = 0
			g.rounds++
			break
		}
	}
	return nil
}

// again looks at the suspects.
func (g *Golden) again(v *View) error {
	for at, s := range g.suspects {
		raw, plain, err := g.read(v, at, goldenLine)
		if err != nil {
			return fmt.Errorf("compare with golden copy: %w", err)
		}
		switch {
		case g.sums[at/goldenLine] == g.key.sum(plain):
			delete(g.suspects, at)
		case !slices.Equal(raw, s.raw):
			*s = suspect{since: time.Now(), raw: slices.Clone(raw)}
		case time.Since(s.since) >= goldenStands:
			s.sure = true
		}
	}
	return nil
}

// compare looks at what is next, at most n bytes, and returns how much that was.
func (g *Golden) compare(v *View, at, n uint64) (uint64, error) {
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
		if g.sums[line/goldenLine] == g.key.sum(g.buf[lo+i:]) || g.suspects[line] != nil || len(g.suspects) == maxSuspects {
			continue
		}
		// Its bytes as they are are wanted now.
		raw, plain, err := g.read(v, line, goldenLine)
		if err != nil {
			return 0, fmt.Errorf("compare with golden copy: %w", err)
		}
		if g.sums[line/goldenLine] != g.key.sum(plain) {
			g.suspects[line] = &suspect{since: time.Now(), raw: slices.Clone(raw)}
		}
	}
	return n, nil
}

// lineKey is the key of a hash of lines. Who does not know it cannot make two lines that look the same, but by a chance of 2^-32: it is
// the strongly universal "multilinear-HM" of Lemire and Kaser, Strongly universal string hashing is fast (2014), over words of 32 bits. It
// takes nothing but multiplications, so that it costs the same on every machine.
type lineKey [1 + goldenLine/4]uint64

func newLineKey() *lineKey {
	var b [8 * len(lineKey{})]byte
	rand.Read(b[:]) // never fails
	k := new(lineKey)
	for i := range k {
		k[i] = le64(b[8*i:])
	}
	return k
}

func (k *lineKey) sum(line []byte) uint32 {
	h := k[0]
	line = line[:goldenLine]
	for i := 1; len(line) >= 8 && i+1 < len(k); i += 2 {
		w := le64(line)
		h += (k[i] + w&0xffffffff) * (k[i+1] + w>>32)
		line = line[8:]
	}
	return uint32(h >> 32)
}

// where returns the region of a place in the row of all regions.
func (g *Golden) where(at uint64) region {
	for _, r := range g.regions {
		if at < r.at+uint64(r.to-r.from) {
			return r
		}
	}
	panic("kernel: beyond the golden copy")
}

// read returns up to n bytes, whole lines of one region, as they are and without what the kernel may have patched.
func (g *Golden) read(v *View, at, n uint64) (raw, plain []byte, err error) {
	r := g.where(at)
	off, size := at-r.at, uint64(r.to-r.from)
	n = min((n+goldenLine-1)&^(goldenLine-1), size-off)
	lo, hi := min(off, goldenMargin), min(size-off-n, goldenMargin)
	b := make([]byte, lo+n+hi)
	if err := g.img.space.read(fresh{v}, r.from+VirtAddr(off-lo), b); err != nil {
		return nil, nil, err
	}
	raw = b[lo : lo+n]
	if r.name != "text" {
		return raw, raw, nil
	}
	c := slices.Clone(b)
	g.normalize(off-lo, c)
	return raw, c[lo : lo+n], nil
}

// take returns what is to be kept of up to n bytes, whole lines of one region, and that without what the kernel may patch.
func (g *Golden) take(v *View, at, n uint64, built *started) (raw, plain []byte, err error) {
	r := g.where(at)
	if built == nil || r.name == "idt" {
		return g.read(v, at, n)
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
func (g *Golden) kept(at uint64) (raw, plain []byte, err error) {
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

// Changes returns what is not as it was, by address. Nothing but the modules that it leads into is read from the host.
func (g *Golden) Changes(v *View) []Change {
	var lines []uint64
	for at, s := range g.suspects {
		if s.sure {
			lines = append(lines, at)
		}
	}
	slices.Sort(lines)
	var out []Change
	for _, at := range lines {
		r := g.where(at)
		now := g.suspects[at].raw
		was, plainWas, err := g.kept(at)
		add := func(from, to int) {
			if len(out) == maxChanges {
				return
			}
			c := Change{Region: r.name, Addr: r.from + VirtAddr(at-r.at) + VirtAddr(from), Now: slices.Clone(now[from:to])}
			c.Symbol, c.Offset, _ = g.img.syms.at(c.Addr)
			if err == nil {
				c.Was = slices.Clone(was[from:to])
			}
			for i := 0; i < len(c.Now) && r.name == "rodata" && len(c.Now) <= 64 && c.Owner == ""; i += 8 {
				if to := VirtAddr(le64(c.Now[i:])); g.img.space.valid(to, 1) {
					if m, err := v.moduleAt(to); err == nil {
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
			g.normalize(off-lo, b)
			plain = b[lo : lo+goldenLine]
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

// normalize blanks what the kernel may have patched itself, in a piece of its code that begins at an offset.
func (g *Golden) normalize(start uint64, b []byte) {
	i := sort.Search(len(g.sites), func(i int) bool { return g.sites[i]>>8 >= start })
	for ; i < len(g.sites); i++ {
		off, kind := g.sites[i]>>8-start, g.sites[i]&0xff
		if off+goldenMargin/2+2 > uint64(len(b)) {
			return
		}
		at := b[off:]
		switch kind {
		case siteJump:
			switch {
			case at[0] == 0xe9, patchable(at): // jmp rel32
				clear(at[:5])
			case at[0] == 0xeb, at[0] == 0x66 && at[1] == 0x90: // jmp rel8, the nop of two bytes
				clear(at[:2])
			}
		case siteCall:
			if at[0] == 0x0f && at[1]&0xf0 == 0x80 { // jcc rel32
				clear(at[:6])
			} else {
				clear(at[:5])
			}
		case siteTramp:
			clear(pastEndbr(at)[:5])
		case siteEntry:
			if at = pastEndbr(at); patchable(at) {
				clear(at[:5])
			}
		}
	}
}

// pastEndbr skips endbr64, or what is left of it where nobody needs it, until 6.13 and since.
func pastEndbr(b []byte) []byte {
	switch string(b[:4]) {
	case "\xf3\x0f\x1e\xfa", "\x66\x0f\x1f\x00", "\x0f\x1f\x40\xd6":
		return b[4:]
	}
	return b
}

// patchable reports whether there is a call, or the nop of five bytes that waits to be one.
func patchable(b []byte) bool {
	return b[0] == 0xe8 || string(b[:5]) == "\x0f\x1f\x44\x00\x00"
}
