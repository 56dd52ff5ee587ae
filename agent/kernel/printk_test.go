package kernel

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// A kernel of nothing but a printk ring, mapped from ringBase on: 4 records, 128 bytes of text.
const (
	ringBase                                   = VirtAddr(0xffff888000000000)
	ringPrb, ringRB, ringDescs                 = 0x10, 0x20, 0x100
	ringInfos, ringText, ringCountB, ringSizeB = 0x200, 0x300, 2, 7
)

func ringImage(mem hostmem.Memory) *Image {
	return &Image{mem: mem, space: &addressSpace{kernel: 0xffff800000000000,
		linear: []linearRange{{ringBase, ringBase + 1<<20, 0}}},
		lay: &layout{ring: ringLayout{
			prb: ringBase + ringPrb,
			rb:  span{0, 64}, countBits: 0, descs: 8, infos: 16, headID: 24, tailID: 32, sizeBits: 40, data: 48,
			descSize: 24, infoSize: 32, desc: span{0, 24}, state: 0, begin: 8, next: 16,
			info: span{0, 32}, seq: 0, nsec: 8, textLen: 16, facility: 18, levelByte: 19, levelShift: 5, levelMask: 7, callerID: 20,
		}}}
}

type ringRecord struct {
	id, state, begin, next, seq uint64
	text                        string
	block                       uint64 // id in the text block
}

func makeRing(tail, head uint64, records ...ringRecord) flat {
	m := make(flat, 4096)
	m.put64(ringPrb, uint64(ringBase)+ringRB)
	m.put32(ringRB, ringCountB)
	m.put64(ringRB+8, uint64(ringBase)+ringDescs)
	m.put64(ringRB+16, uint64(ringBase)+ringInfos)
	m.put64(ringRB+24, head)
	m.put64(ringRB+32, tail)
	m.put32(ringRB+40, ringSizeB)
	m.put64(ringRB+48, uint64(ringBase)+ringText)
	for _, r := range records {
		i := int(r.id & 3)
		m.put64(ringDescs+24*i, r.state<<62|r.id)
		m.put64(ringDescs+24*i+8, r.begin)
		m.put64(ringDescs+24*i+16, r.next)
		info := ringInfos + 32*i
		m.put64(info, r.seq)
		m.put64(info+8, r.seq*1000)
		m.put32(info+16, uint32(len(r.text))|3<<16|6<<29)
		m.put32(info+20, 77)
		if r.begin&1 == 0 {
			at := int(r.begin & 127)
			if r.begin>>7 != (r.next-1)>>7 {
				at = 0
			}
			m.put64(ringText+at, r.block)
			copy(m[ringText+at+8:], r.text)
		}
	}
	return m
}

func TestLog(t *testing.T) {
	const fin, com, res = descFinalized, descCommitted, 0
	for name, c := range map[string]struct {
		mem  flat
		want []string
		err  string
	}{
		"plain": {mem: makeRing(0x11, 0x12, ringRecord{0x11, fin, 0, 24, 5, "first line", 0x11}, ringRecord{0x12, com, 24, 48, 6, "second", 0x12}),
			want: []string{"5 first line", "6 second"}},
		"wrapped block":       {mem: makeRing(0x11, 0x11, ringRecord{0x11, fin, 120, 128 + 24, 5, "at the start", 0x11}), want: []string{"5 at the start"}},
		"block up to the end": {mem: makeRing(0x11, 0x11, ringRecord{0x11, fin, 104, 128, 5, "at the end", 0x11}), want: []string{"5 at the end"}},
		"empty line":          {mem: makeRing(0x11, 0x11, ringRecord{0x11, fin, 3, 3, 5, "", 0}), want: []string{"5 "}},
		"lost text":           {mem: makeRing(0x11, 0x11, ringRecord{0x11, fin, 1, 1, 5, "", 0})},
		"reserved":            {mem: makeRing(0x11, 0x12, ringRecord{0x11, fin, 0, 24, 5, "first", 0x11}, ringRecord{0x12, res, 24, 48, 6, "x", 0x12}), want: []string{"5 first"}},
		"recycled descriptor": {mem: makeRing(0x11, 0x12, ringRecord{0x15, fin, 0, 24, 9, "newer", 0x15}, ringRecord{0x12, fin, 24, 48, 6, "second", 0x12}),
			want: []string{"6 second"}},
		"recycled block": {mem: makeRing(0x11, 0x12, ringRecord{0x11, fin, 0, 24, 5, "first", 0x99}, ringRecord{0x12, fin, 24, 48, 6, "second", 0x12}),
			want: []string{"6 second"}},
		"back in time": {mem: makeRing(0x11, 0x12, ringRecord{0x11, fin, 0, 24, 5, "first", 0x11}, ringRecord{0x12, fin, 24, 48, 4, "second", 0x12}),
			want: []string{"5 first"}},
		"odd positions":      {mem: makeRing(0x11, 0x11, ringRecord{0x11, fin, 64, 8, 5, "", 0x11})},
		"more than it holds": {mem: makeRing(0x11, 0x99), err: "printk_ringbuffer"},
		"huge":               {mem: func() flat { m := makeRing(0, 0); m.put32(ringRB, 60); return m }(), err: "printk_ringbuffer"},
		"astray":             {mem: func() flat { m := makeRing(0, 0); m.put64(ringPrb, 0x1234); return m }(), err: "prb"},
		"descriptors in a hole": {mem: func() flat { m := makeRing(0x11, 0x11); m.put64(ringRB+8, uint64(ringBase)+1<<19); return m }(),
			err: "prb_desc"},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			var last error
			for r, err := range ringImage(c.mem).View(context.Background()).Log() {
				if last = err; err == nil {
					got = append(got, fmt.Sprintf("%d %s", r.Seq, r.Text))
					if r.Facility != 3 || r.Level != 6 || r.Caller != 77 {
						t.Errorf("record = %+v", r)
					}
				}
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
			var corrupt *CorruptError
			if (last != nil) != (c.err != "") || last != nil && (!errors.As(last, &corrupt) || corrupt.Object != c.err) {
				t.Errorf("Log ended with %v; want %q", last, c.err)
			}
		})
	}
}

func FuzzLog(f *testing.F) {
	f.Add([]byte(makeRing(0x11, 0x12, ringRecord{0x11, 2, 0, 24, 5, "first line", 0x11}, ringRecord{0x12, 1, 120, 152, 6, "second", 0x12})))
	f.Fuzz(func(t *testing.T, memory []byte) {
		n, bytes := 0, 0
		for r, err := range ringImage(flat(memory)).View(context.Background()).Log() {
			if n++; err != nil {
				continue
			}
			bytes += len(r.Text)
		}
		if n > (1<<ringMaxRecordBits)+1 || bytes > 4<<ringMaxTextBits {
			t.Errorf("%d records of %d bytes", n, bytes)
		}
	})
}
