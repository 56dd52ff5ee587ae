package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"unicode"
	"unicode/utf8"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// viewPages is how many pages a View keeps: 16 MiB. A pass over more reads the oldest again when it needs them again.
const viewPages = 4096

// View is one pass over a host's memory. It keeps the pages that it read, so that the same question gets the same answer
// and no page is read twice; Heartbeat and Panic alone read fresh each time. It is not atomic: the host runs while it reads.
//
// A View is safe for concurrent use; any number of Views of one Image may be in use at the same time.
type View struct {
	img *Image
	ctx context.Context

	mu    sync.Mutex
	cost  Cost          // guarded by mu
	sure  Confidence    // guarded by mu
	cache *pageCache    // guarded by mu; nil after Close
	orc   *orcRegisters // guarded by mu; nil until a stack was unwound
	tasks map[int]Task  // guarded by mu; nil if they were not all read; not changed once it is here
	known []Module      // guarded by mu; of modulesBriefly; nil if they were not all read; not changed once it is here

	stores []Patch // see ViewAs; not changed
}

// Patch is bytes that somebody means to put into a host's memory.
type Patch struct {
	Addr hostmem.PhysAddr
	Put  []byte
}

// ViewAs begins a pass over the host's memory as it would be with some stores made, the later ones over the earlier. None is made.
func (img *Image) ViewAs(ctx context.Context, stores []Patch) *View {
	v := img.View(ctx)
	v.stores = stores
	return v
}

// overlay puts the stores that are not made over what was read.
func (v *View) overlay(pa hostmem.PhysAddr, b []byte) {
	for _, s := range v.stores {
		if from, to := max(pa, s.Addr), min(pa+hostmem.PhysAddr(len(b)), s.Addr+hostmem.PhysAddr(len(s.Put))); from < to {
			copy(b[from-pa:to-pa], s.Put[from-s.Addr:])
		}
	}
}

// pageCache is the pages that a View has read. It outlives the View that is closed, for the next one's pages.
type pageCache struct {
	pages map[hostmem.PhysAddr]*page // one that is in is not written again
	order []hostmem.PhysAddr         // ring of the keys of pages, oldest at next
	next  int
	near  [nearPages]nearPage // of pages: by their lowest bits, those that were asked for last
	slabs [][]page            // of which used pages were taken; what a View needs beyond maxIdleSlabs of them is in spill, and is not used again
	used  int
	spill []page
}

type page [hostmem.PageSize]byte

// nearPages is a power of two.
const nearPages = 64

type nearPage struct {
	at hostmem.PhysAddr
	p  *page // nil: none
}

// nearest returns where a page is in near, if it is.
func (c *pageCache) nearest(pa hostmem.PhysAddr) *nearPage {
	return &c.near[pa/hostmem.PageSize%nearPages]
}

// idleCaches are those of closed Views. One is kept in any case, for whoever passes all the time; what is more is left to the garbage collector.
type idleCaches struct {
	first atomic.Pointer[pageCache]
	more  sync.Pool
}

func (i *idleCaches) get() *pageCache {
	if c := i.first.Swap(nil); c != nil {
		return c
	}
	if c, ok := i.more.Get().(*pageCache); ok {
		return c
	}
	return &pageCache{pages: make(map[hostmem.PhysAddr]*page, 8*slabPages)}
}

func (i *idleCaches) put(c *pageCache) {
	if !i.first.CompareAndSwap(nil, c) {
		i.more.Put(c)
	}
}

// slabPages is how many pages are allocated together, and maxIdleSlabs how many slabs a closed View leaves to the next one at most: 8 MiB,
// a pass over some 2000 tasks.
const (
	slabPages    = 16
	maxIdleSlabs = 128
)

// View begins a pass. When ctx ends, whatever the View is asked fails with the context's error. Who passes often closes his Views.
func (img *Image) View(ctx context.Context) *View {
	return &View{img: img, ctx: ctx, cache: img.idle.get()}
}

// ErrClosed means that a View was asked after its Close.
var ErrClosed = errors.New("view is closed")

// Close ends the pass, whose memory the next View of the Image uses again. What the View has handed out stays valid, but it must not
// be asked any more, nor be asked anything while it is closed: that is ErrClosed. A View that is not closed is left to the garbage collector.
func (v *View) Close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	c := v.cache
	if v.cache, v.tasks, v.known, v.orc = nil, nil, nil, nil; c == nil {
		return
	}
	c.forget()
	c.used, c.spill = 0, nil
	v.img.idle.put(c)
}

// Image returns the kernel that the View looks at.
func (v *View) Image() *Image { return v.img }

// Cost returns what the View has read so far.
func (v *View) Cost() Cost {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.cost
}

// Phys returns the physical address of a kernel virtual address: in the image, the direct map, vmalloc space, modules or
// per-CPU areas. It is ErrNotMapped if there is nothing.
func (v *View) Phys(va VirtAddr) (hostmem.PhysAddr, error) {
	pa, _, err := v.img.space.translate(v, va)
	return pa, err
}

// ReadVirt fills buf from a kernel virtual address on.
func (v *View) ReadVirt(va VirtAddr, buf []byte) error { return v.img.space.read(v, va, buf) }

// Uint64 reads a little-endian word of 8 bytes.
func (v *View) Uint64(va VirtAddr) (uint64, error) {
	if b := v.peekVirt(va, 8); b != nil {
		return le64(b), nil
	}
	var b [8]byte
	err := v.ReadVirt(va, b[:])
	return le64(b[:]), err
}

// Uint32 reads a little-endian word of 4 bytes.
func (v *View) Uint32(va VirtAddr) (uint32, error) {
	if b := v.peekVirt(va, 4); b != nil {
		return le32(b), nil
	}
	var b [4]byte
	err := v.ReadVirt(va, b[:])
	return le32(b[:]), err
}

// readPhys reads through the page cache.
func (v *View) readPhys(pa hostmem.PhysAddr, b []byte) error {
	for len(b) > 0 {
		offset := pa % hostmem.PageSize
		n := min(len(b), int(hostmem.PageSize-offset))
		page, err := v.page(pa - offset)
		switch {
		case err == nil:
			copy(b[:n], page[offset:])
		case errors.Is(err, hostmem.ErrNotMapped):
			// RAM may end within a page.
			if err := v.readFresh(pa, b[:n]); err != nil {
				return err
			}
		default:
			return err
		}
		pa += hostmem.PhysAddr(n)
		b = b[n:]
	}
	return nil
}

// peek returns the n bytes at pa where they lie in the page cache, for reading only; nil if they are not of one page.
func (v *View) peek(pa hostmem.PhysAddr, n uint64) []byte {
	offset := uint64(pa % hostmem.PageSize)
	if n > hostmem.PageSize-offset {
		return nil
	}
	page, err := v.page(pa - hostmem.PhysAddr(offset))
	if err != nil {
		return nil // readPhys tells why, or knows another way
	}
	return page[offset:][:n]
}

// peekVirt is peek by a kernel virtual address; nil also where that leads nowhere.
func (v *View) peekVirt(va VirtAddr, n uint64) []byte {
	pa, whole, err := v.img.space.translate(v, va)
	if err != nil || whole < n {
		return nil
	}
	return v.peek(pa, n)
}

// page returns the page at pa, which is aligned.
func (v *View) page(pa hostmem.PhysAddr) (*page, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	c := v.cache
	if c == nil {
		return nil, ErrClosed
	}
	near := c.nearest(pa)
	if near.p != nil && near.at == pa {
		return near.p, nil
	}
	if p, ok := c.pages[pa]; ok {
		*near = nearPage{pa, p}
		return p, nil
	}
	if err := v.ctx.Err(); err != nil {
		return nil, err
	}
	p := c.free()
	n, err := v.img.mem.ReadAt(p[:], int64(pa))
	v.count(n)
	if err != nil {
		c.unused(p)
		return nil, err
	}
	v.keep(pa, p)
	return p, nil
}

// free returns an unused page.
func (c *pageCache) free() *page {
	i := c.used / slabPages
	if i == maxIdleSlabs {
		if len(c.spill) == 0 {
			c.spill = make([]page, slabPages)
		}
		p := &c.spill[0]
		c.spill = c.spill[1:]
		return p
	}
	if i >= len(c.slabs) {
		c.slabs = append(c.slabs, make([]page, slabPages))
	}
	p := &c.slabs[i][c.used%slabPages]
	c.used++
	return p
}

// unused takes back the page that free has returned last, which nobody has seen.
func (c *pageCache) unused(p *page) {
	if c.used > 0 && p == &c.slabs[(c.used-1)/slabPages][(c.used-1)%slabPages] {
		c.used--
	}
}

// keep puts a page into the cache, where the oldest makes room; mu is held.
func (v *View) keep(pa hostmem.PhysAddr, p *page) {
	v.overlay(pa, p[:])
	v.cost.Pages++
	c := v.cache
	if len(c.order) < viewPages {
		c.order = append(c.order, pa)
	} else {
		old := c.order[c.next]
		if near := c.nearest(old); near.at == old {
			near.p = nil
		}
		delete(c.pages, old)
		c.order[c.next] = pa
		c.next = (c.next + 1) % viewPages
	}
	c.pages[pa] = p
}

// forget empties the cache. The memory of its pages is not used again: somebody may be looking at it.
func (c *pageCache) forget() {
	clear(c.pages)
	clear(c.near[:])
	c.order, c.next = c.order[:0], 0
}

// fetch reads pages, sorted, into the cache, all under way together. Those that cannot be read are left to whoever needs them; the
// error is of the first of these whose reason is not that there is no memory.
func (v *View) fetch(pages []hostmem.PhysAddr) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.cache == nil {
		return ErrClosed
	}
	if err := v.ctx.Err(); err != nil {
		return err
	}
	var segs []hostmem.Segment
	var frames []*page // of segs
	for _, pa := range pages {
		if v.cache.pages[pa] == nil {
			p := v.cache.free()
			segs, frames = append(segs, hostmem.Segment{Addr: pa, Buf: p[:]}), append(frames, p)
		}
	}
	if len(segs) == 0 {
		return nil
	}
	_ = hostmem.ReadScatter(v.img.mem, segs) // each segment has its own error
	v.cost.Reads += len(segs)
	var first error
	for i, s := range segs {
		if s.Err == nil {
			v.cost.Bytes += hostmem.PageSize
			v.keep(s.Addr, frames[i])
		} else if first == nil && !errors.Is(s.Err, hostmem.ErrNotMapped) {
			first = s.Err
		}
	}
	return first
}

// count books an access; mu is held.
func (v *View) count(n int) {
	v.cost.Reads++
	v.cost.Bytes += int64(n)
}

// readFresh reads past the page cache.
func (v *View) readFresh(pa hostmem.PhysAddr, b []byte) error {
	if err := v.ctx.Err(); err != nil {
		return err
	}
	n, err := v.img.mem.ReadAt(b, int64(pa))
	v.overlay(pa, b[:max(n, 0)])
	v.mu.Lock()
	v.count(n)
	v.mu.Unlock()
	return err
}

// readScattered reads segments past the page cache, pipelined where the memory can.
func (v *View) readScattered(segs []hostmem.Segment) error {
	if err := v.ctx.Err(); err != nil {
		return err
	}
	err := hostmem.ReadScatter(v.img.mem, segs)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.cost.Reads += len(segs)
	for i := range segs {
		v.overlay(segs[i].Addr, segs[i].Buf)
		v.cost.Bytes += int64(len(segs[i].Buf))
	}
	return err
}

// forget drops all pages, so that what was torn can be read anew.
func (v *View) forget() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sure.Restarts++
	v.tasks, v.known = nil, nil
	if v.cache != nil {
		v.cache.forget()
	}
}

// fresh is a source that reads past the page cache of a View.
type fresh struct{ v *View }

func (f fresh) readPhys(pa hostmem.PhysAddr, b []byte) error { return f.v.readFresh(pa, b) }

// direct is a source for the time before there is an Image.
type direct struct {
	ctx context.Context
	mem hostmem.Memory
}

func (d direct) readPhys(pa hostmem.PhysAddr, b []byte) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	_, err := d.mem.ReadAt(b, int64(pa))
	return err
}

// word64 reads a word of the object of the given kind, and word32 one of 4 bytes.
func (s *addressSpace) word64(src source, kind string, va VirtAddr) (uint64, error) {
	if v, ok := src.(*View); ok {
		if b := v.peekVirt(va, 8); b != nil {
			return le64(b), nil
		}
	}
	var b [8]byte
	err := s.object(src, kind, va, b[:])
	return le64(b[:]), err
}

func (s *addressSpace) word32(src source, kind string, va VirtAddr) (uint32, error) {
	if v, ok := src.(*View); ok {
		if b := v.peekVirt(va, 4); b != nil {
			return le32(b), nil
		}
	}
	var b [4]byte
	err := s.object(src, kind, va, b[:])
	return le32(b[:]), err
}

// object fills b from the object of the given kind at va. An address where no memory is makes the object corrupt.
func (s *addressSpace) object(src source, kind string, va VirtAddr, b []byte) error {
	err := s.read(src, va, b)
	if err != nil && (errors.Is(err, ErrNotMapped) || errors.Is(err, hostmem.ErrNotMapped)) {
		return &CorruptError{kind, va, fmt.Sprintf("points to no memory (%v)", err)}
	}
	return err
}

func le16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }
func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

// cString returns b up to its first NUL, with what cannot be printed replaced, and whether there was a NUL.
func cString(b []byte) (string, bool) {
	for i, c := range b {
		if c == 0 {
			return printable(b[:i]), true
		}
	}
	return printable(b), false
}

// printable returns b as text: bytes that are neither printable ASCII nor valid UTF-8 become "?".
func printable(b []byte) string {
	for _, c := range b {
		if c < ' ' || c > '~' {
			return sanitize(b)
		}
	}
	return string(b)
}

func sanitize(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) && r != '\t' && r != '\n' {
			return '?'
		}
		return r
	}, string(b))
}
