package kernel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	searchChunk = 1 << 20
	// searchHot is how much is searched first at each of the places where the note has been seen most often.
	searchHot = 64 << 20
	// searchTimeouts is how many pages may be skipped because they took too long to read.
	searchTimeouts = 64
)

// searchOrder cuts the RAM map into the pieces that are searched one after the other: the first 64 MiB, the last 64 MiB
// below 4 GiB, the last 64 MiB of RAM, then what is left. Debian's 6.1 has the note at about 18 MiB on a PC, 6.12 either
// there or near the top.
func searchOrder(ram []hostmem.Range) [][]hostmem.Range {
	var low, top hostmem.PhysAddr
	for _, r := range ram {
		top = max(top, r.End())
		if r.Start < 4<<30 {
			low = max(low, min(r.End(), 4<<30))
		}
	}
	below := func(end hostmem.PhysAddr) hostmem.Range {
		start := end - min(end, searchHot)
		return hostmem.Range{Start: start, Size: uint64(end - start)}
	}
	left := slices.Clone(ram)
	var order [][]hostmem.Range
	for _, hot := range []hostmem.Range{{Size: searchHot}, below(low), below(top)} {
		var in, out []hostmem.Range
		for _, r := range left {
			a, b := max(r.Start, hot.Start), min(r.End(), hot.End())
			if a >= b {
				out = append(out, r)
				continue
			}
			in = append(in, hostmem.Range{Start: a, Size: uint64(b - a)})
			if r.Start < a {
				out = append(out, hostmem.Range{Start: r.Start, Size: uint64(a - r.Start)})
			}
			if b < r.End() {
				out = append(out, hostmem.Range{Start: b, Size: uint64(r.End() - b)})
			}
		}
		left = out
		order = append(order, in)
	}
	return append(order, left)
}

// searcher looks for VMCOREINFO notes at the start of pages. How it reads is chosen by measuring on the way: bulk reads
// are best on a file, the 24 bytes of each page's header on a PCI window, scattered reads where the path has them.
type searcher struct {
	mem      hostmem.Memory
	progress func(stage string, done, total uint64)

	done, total uint64
	reads       int
	bytes       int64
	ways        []searchWay
	buf         []byte
	holes       int
	timeouts    int
}

type searchWay struct {
	name string
	scan func(s *searcher, r hostmem.Range, found func(hostmem.PhysAddr)) error
	cost time.Duration // per chunk: the last one's, but of the first two the better
	runs int
}

func newSearcher(mem hostmem.Memory, progress func(string, uint64, uint64)) *searcher {
	s := &searcher{mem: mem, progress: progress, ways: []searchWay{
		{name: "bulk", scan: (*searcher).scanBulk}, {name: "headers", scan: (*searcher).scanHeaders}}}
	if _, ok := mem.(hostmem.ScatterReader); ok {
		s.ways = append(s.ways, searchWay{name: "scatter", scan: (*searcher).scanScatter})
	}
	for _, r := range hostmem.ResidentRanges(mem) {
		s.total += r.Size
	}
	return s
}

// way returns the fastest way, or one that was not measured twice yet.
func (s *searcher) way() *searchWay {
	best := &s.ways[0]
	for i := range s.ways {
		w := &s.ways[i]
		if w.runs < 2 {
			return w
		}
		if w.cost < best.cost {
			best = w
		}
	}
	return best
}

// expected estimates how long the rest of the memory will take.
func (s *searcher) expected() time.Duration {
	return s.way().cost * time.Duration((s.total-min(s.done, s.total))/searchChunk)
}

// search calls found for the address of every note in r, until found returns true. Pages that cannot be read are skipped;
// a lost link is an error.
func (s *searcher) search(ctx context.Context, r hostmem.Range, found func(hostmem.PhysAddr) bool) (stopped bool, err error) {
	for at := alignUp(r.Start, hostmem.PageSize); at < r.End(); {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		end := min(alignUp(at+1, searchChunk), r.End())
		part := hostmem.Range{Start: at, Size: uint64(end - at)}
		var notes []hostmem.PhysAddr
		way, began := s.way(), time.Now()
		err := way.scan(s, part, func(pa hostmem.PhysAddr) { notes = append(notes, pa) })
		if err != nil {
			return false, err
		}
		if part.Size == searchChunk {
			took := time.Since(began)
			if way.runs == 1 {
				took = min(took, way.cost)
			}
			way.cost = took
			way.runs++
		}
		for _, pa := range notes {
			if found(pa) {
				return true, nil
			}
		}
		s.done += part.Size
		if s.progress != nil {
			s.progress("search", s.done, s.total)
		}
		at = end
	}
	return false, nil
}

func (s *searcher) scanBulk(r hostmem.Range, found func(hostmem.PhysAddr)) error {
	if s.buf == nil {
		s.buf = make([]byte, searchChunk)
	}
	for at := r.Start; at < r.End(); {
		b := s.buf[:r.End()-at]
		n, err := s.mem.ReadAt(b, int64(at))
		s.reads++
		s.bytes += int64(n)
		for o := 0; o+noteHeaderLen <= n; o += hostmem.PageSize {
			if isNote(b[o:]) {
				found(at + hostmem.PhysAddr(o))
			}
		}
		if err == nil {
			return nil
		}
		if err := s.hole(err); err != nil {
			return err
		}
		at += hostmem.PhysAddr(n)/hostmem.PageSize*hostmem.PageSize + hostmem.PageSize
	}
	return nil
}

func (s *searcher) scanHeaders(r hostmem.Range, found func(hostmem.PhysAddr)) error {
	var b [noteHeaderLen]byte
	for at := r.Start; at+noteHeaderLen <= r.End(); at += hostmem.PageSize {
		n, err := s.mem.ReadAt(b[:], int64(at))
		s.reads++
		s.bytes += int64(n)
		if err != nil {
			if err := s.hole(err); err != nil {
				return err
			}
		} else if isNote(b[:]) {
			found(at)
		}
	}
	return nil
}

func (s *searcher) scanScatter(r hostmem.Range, found func(hostmem.PhysAddr)) error {
	const pages = searchChunk / hostmem.PageSize
	var buf [pages * noteHeaderLen]byte
	segs := make([]hostmem.Segment, 0, pages)
	for at := r.Start; at+noteHeaderLen <= r.End() && len(segs) < pages; at += hostmem.PageSize {
		o := len(segs) * noteHeaderLen
		segs = append(segs, hostmem.Segment{Addr: at, Buf: buf[o : o+noteHeaderLen]})
	}
	_ = s.mem.(hostmem.ScatterReader).ReadScatter(segs) // each segment has its own error
	s.reads++
	s.bytes += int64(len(segs) * noteHeaderLen)
	for _, seg := range segs {
		if seg.Err != nil {
			if err := s.hole(seg.Err); err != nil {
				return err
			}
		} else if isNote(seg.Buf) {
			found(seg.Addr)
		}
	}
	return nil
}

// hole returns nil for a page that cannot be read and that the search may skip: it is not there, the host refuses it, or
// now and then the path takes too long. Any other error it returns as it is.
func (s *searcher) hole(err error) error {
	switch {
	case errors.Is(err, hostmem.ErrNotMapped), errors.Is(err, hostmem.ErrNotRecorded), errors.Is(err, hostmem.ErrAborted):
	case errors.Is(err, hostmem.ErrTimeout) && s.timeouts < searchTimeouts:
		s.timeouts++
	default:
		return fmt.Errorf("search for a kernel: %w", err)
	}
	s.holes++
	return nil
}

// isNote reports whether a page begins with a note, finished or not.
func isNote(b []byte) bool {
	_, err := noteDesc(b)
	return err == nil || errors.Is(err, ErrNotYet)
}

func alignUp[T ~uint64](n T, to T) T { return (n + to - 1) / to * to }
