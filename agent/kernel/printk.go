package kernel

import (
	"fmt"
	"iter"
	"time"
)

// ringLayout is the printk ring buffer, kernel/printk/printk_ringbuffer.h (since v5.10): a ring of descriptors, a ring of
// what is known of each record, and a ring of text blocks.
type ringLayout struct {
	err error
	prb VirtAddr // the pointer prb

	rb                                                span // of printk_ringbuffer
	countBits, descs, infos, headID, tailID           uint64
	sizeBits, data                                    uint64
	descSize, infoSize                                uint64
	desc                                              span // of prb_desc
	state, begin, next                                uint64
	info                                              span // of printk_info
	seq, nsec, textLen, facility, levelByte, callerID uint64
	levelShift, levelMask                             uint8
}

// Descriptor states, the top two bits of prb_desc.state_var.
const (
	descCommitted = 1
	descFinalized = 2
	descIDMask    = 1<<62 - 1

	ringMaxRecordBits = 20
	ringMaxTextBits   = 27
)

func (img *Image) ringLayout() ringLayout {
	var l ringLayout
	r := resolver{img: img}
	l.prb = r.symbol("prb")
	rb := func(path string, size uint64) uint64 { return l.rb.add(r.field("printk_ringbuffer", size, path), size) }
	l.countBits = rb("desc_ring.count_bits", 4)
	l.descs = rb("desc_ring.descs", 8)
	l.infos = rb("desc_ring.infos", 8)
	l.headID = rb("desc_ring.head_id", 8)
	l.tailID = rb("desc_ring.tail_id", 8)
	l.sizeBits = rb("text_data_ring.size_bits", 4)
	l.data = rb("text_data_ring.data", 8)
	desc := func(path string) uint64 { return l.desc.add(r.field("prb_desc", 8, path), 8) }
	l.descSize = r.size("prb_desc")
	l.state = desc("state_var")
	l.begin = desc("text_blk_lpos.begin")
	l.next = desc("text_blk_lpos.next")
	info := func(path string, size uint64) uint64 { return l.info.add(r.field("printk_info", size, path), size) }
	l.infoSize = r.size("printk_info")
	l.seq = info("seq", 8)
	l.nsec = info("ts_nsec", 8)
	l.textLen = info("text_len", 2)
	l.facility = info("facility", 1)
	l.callerID = info("caller_id", 4)
	if level, err := img.types.field("printk_info", "level"); err != nil {
		r.fail(err)
	} else if level.BitSize == 0 || level.Size != 1 || level.Offset >= 1<<20 {
		r.fail(&CorruptError{"BTF", 0, fmt.Sprintf("printk_info.level is %+v", level)})
	} else {
		l.levelByte = l.info.add(level.Offset, 1)
		l.levelShift, l.levelMask = level.BitOffset, 1<<level.BitSize-1
	}
	for _, s := range []span{l.rb, l.desc, l.info} {
		if s.size() > 4096 {
			r.fail(&CorruptError{"BTF", 0, "the printk ring's fields are too far apart"})
		}
	}
	l.err = r.err
	return l
}

// Log walks the records of the printk ring, oldest first. Records that are being written or overwritten are left out, which
// shows in LogRecord.Seq. An error comes last.
func (v *View) Log() iter.Seq2[LogRecord, error] {
	return func(yield func(LogRecord, error) bool) {
		if err := v.walkLog(yield); err != nil {
			yield(LogRecord{}, fmt.Errorf("walk printk ring: %w", err))
		}
	}
}

func (v *View) walkLog(yield func(LogRecord, error) bool) error {
	img := v.img
	l, space := &img.lay.ring, img.space
	if l.err != nil {
		return l.err
	}
	pointer, err := v.Uint64(l.prb)
	if err != nil {
		return err
	}
	rb := VirtAddr(pointer)
	if !space.valid(rb, 8) {
		return &CorruptError{"prb", l.prb, fmt.Sprintf("points to %v", rb)}
	}
	var o object
	if err := o.load(space, v, "printk_ringbuffer", l.rb, rb); err != nil {
		return err
	}
	countBits, sizeBits := o.u32(l.countBits), o.u32(l.sizeBits)
	if countBits > ringMaxRecordBits || sizeBits < 4 || sizeBits > ringMaxTextBits {
		return &CorruptError{"printk_ringbuffer", rb, fmt.Sprintf("2^%d records, 2^%d bytes of text", countBits, sizeBits)}
	}
	ring := logRing{v: v, l: l, descs: o.ptr(l.descs), infos: o.ptr(l.infos), data: o.ptr(l.data),
		count: 1 << countBits, size: 1 << sizeBits, sizeBits: sizeBits}
	head, tail := o.u64(l.headID)&descIDMask, o.u64(l.tailID)&descIDMask
	n := (head-tail)&descIDMask + 1
	if n > ring.count {
		return &CorruptError{"printk_ringbuffer", rb, fmt.Sprintf("records from %#x to %#x in a ring of %d", tail, head, ring.count)}
	}
	seen, last := false, uint64(0)
	var text uint64
	for i := range n {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		rec, ok, err := ring.record((tail + i) & descIDMask)
		if err != nil {
			return err
		}
		if !ok || seen && rec.Seq <= last {
			continue
		}
		seen, last = true, rec.Seq
		if text += uint64(len(rec.Text)); text > 4*ring.size { // what cannot be printed may grow
			return &CorruptError{"printk_ringbuffer", rb, fmt.Sprintf("more text than %d bytes hold", ring.size)}
		}
		if !yield(rec, nil) {
			return nil
		}
	}
	return nil
}

type logRing struct {
	v                  *View
	l                  *ringLayout
	descs, infos, data VirtAddr
	count, size        uint64
	sizeBits           uint32
	desc, info         object
}

// record reads the record of a descriptor; ok is false if the descriptor is not, or no longer, of a record.
func (g *logRing) record(id uint64) (rec LogRecord, ok bool, err error) {
	l, space := g.l, g.v.img.space
	index := id & (g.count - 1)
	if err := g.desc.load(space, g.v, "prb_desc", l.desc, g.descs+VirtAddr(index*l.descSize)); err != nil {
		return rec, false, err
	}
	state := g.desc.u64(l.state)
	if s := state >> 62; state&descIDMask != id || s != descCommitted && s != descFinalized {
		return rec, false, nil
	}
	if err := g.info.load(space, g.v, "printk_info", l.info, g.infos+VirtAddr(index*l.infoSize)); err != nil {
		return rec, false, err
	}
	rec = LogRecord{
		Seq: g.info.u64(l.seq), Time: time.Duration(g.info.u64(l.nsec)), Facility: g.info.at(l.facility, 1)[0],
		Level: g.info.at(l.levelByte, 1)[0] >> l.levelShift & l.levelMask, Caller: g.info.u32(l.callerID),
	}
	begin, next := g.desc.u64(l.begin), g.desc.u64(l.next)
	if begin&1 != 0 && next&1 != 0 {
		// No block: an empty line (3), or a text that was lost (1).
		return rec, begin == 3, nil
	}
	// A block that would cross the end of the ring stands at its start as a whole.
	at, n := begin&(g.size-1), next-begin
	if begin>>g.sizeBits != (next-1)>>g.sizeBits {
		if begin>>g.sizeBits+1 != (next-1)>>g.sizeBits {
			return rec, false, nil
		}
		at, n = 0, next&(g.size-1)
	}
	if n < 8 || n > g.size-at {
		return rec, false, nil
	}
	want := min(uint64(le16(g.info.at(l.textLen, 2))), n-8)
	b := make([]byte, 8+want)
	if err := space.object(g.v, "prb_data_block", g.data+VirtAddr(at), b); err != nil {
		return rec, false, err
	}
	if le64(b) != id {
		return rec, false, nil // the block is another record's by now
	}
	g.v.note(func(c *Confidence) { c.Objects++ })
	rec.Text = printable(b[8:])
	return rec, true, nil
}
