package hostmem

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
)

// ErrNotRecorded means that the address is RAM of the recorded host, but the pass that was recorded did not read it.
var ErrNotRecorded = errors.New("page is not in the recording")

// The .hostmem format, version 1; DESIGN.md draws it. Append only: a change that an old reader would misread needs a new
// version and a golden file of its own.
const (
	recordingMagic   = "HOSTMEM\n"
	recordingVersion = 1

	recLabel = 'L' // u8 key length, key, u32 value length, value
	recMap   = 'M' // u32 n, n × {u64 start, u64 size}: the RAM map, once, before the first frame
	recFrame = 'F' // u64 Unix time in ns: the pages that follow are of a new frame
	recPage  = 'P' // u64 address, 4096 bytes
	recSame  = 'S' // u64 address: as in the last frame that has this page
	recEnd   = 'E' // u32 frames, u64 pages (P and S), then SHA-256 of all before it in the body
)

// Bounds on what a file may claim, against files made to exhaust memory.
const (
	maxLabelKey       = 255
	maxLabelValue     = 1 << 20
	maxLabels         = 1 << 10
	maxRecordedFrames = 1 << 16
	maxRecordedBytes  = 1 << 30 // of distinct pages
	maxSamePages      = 1 << 22
)

// Recording is a .hostmem file as a Memory: the pages that the recorded passes read, frame by frame. It is read-only and
// stands at one frame at a time; Frame gives any of them as a memory of its own.
//
// Addresses that were no RAM fault with ErrNotMapped as they did then; those that were not read, with ErrNotRecorded.
type Recording struct {
	labels map[string]string
	ram    []Range
	frames []frame // at least one

	at atomic.Int32
}

// OpenRecording reads a recording, all of it, and checks it.
func OpenRecording(r io.Reader) (*Recording, error) {
	rec, err := openRecording(r)
	if err != nil {
		return nil, fmt.Errorf("open recording: %w", err)
	}
	return rec, nil
}

func openRecording(r io.Reader) (*Recording, error) {
	head := make([]byte, len(recordingMagic)+4)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("read header: %w", noEOF(err))
	}
	if !bytes.HasPrefix(head, []byte(recordingMagic)) {
		return nil, fmt.Errorf("magic is %q, not %q: not a .hostmem file", head[:len(recordingMagic)], recordingMagic)
	}
	if v := le.Uint32(head[len(recordingMagic):]); v != recordingVersion {
		return nil, fmt.Errorf("version is %d: this program reads version %d; use the one that wrote the file", v, recordingVersion)
	}
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(64<<20))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return readBody(bufio.NewReaderSize(z, 1<<16))
}

// bodyReader reads and sums the fields of the body.
type bodyReader struct {
	r   *bufio.Reader
	sum hash.Hash
	off int64
}

func (b *bodyReader) bytes(p []byte) error {
	n, err := io.ReadFull(b.r, p)
	b.sum.Write(p[:n])
	b.off += int64(n)
	return noEOF(err)
}

func (b *bodyReader) take(n int) ([]byte, error) {
	p := make([]byte, n)
	return p, b.bytes(p)
}

func (b *bodyReader) u8() (byte, error) {
	p, err := b.take(1)
	return p[0], err
}

func (b *bodyReader) u32() (uint32, error) {
	p, err := b.take(4)
	return le.Uint32(p), err
}

func (b *bodyReader) u64() (uint64, error) {
	p, err := b.take(8)
	return le.Uint64(p), err
}

// noEOF says of an early end what it is.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the file is truncated")
	}
	return err
}

// readBody reads what writeBody wrote.
func readBody(r *bufio.Reader) (*Recording, error) {
	b := &bodyReader{r: r, sum: sha256.New()}
	d := bodyDecoder{rec: &Recording{labels: map[string]string{}}, last: map[PhysAddr]*page{}}
	for !d.ended {
		at := b.off
		kind, err := b.u8()
		if err == nil {
			err = d.record(kind, b)
		}
		if err != nil {
			return nil, fmt.Errorf("record at %#x: %w", at, err)
		}
	}
	if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
		if err != nil {
			return nil, fmt.Errorf("after the last record: %w", err)
		}
		return nil, errors.New("bytes after the last record")
	}
	return d.rec, nil
}

// bodyDecoder is the state between records.
type bodyDecoder struct {
	rec    *Recording
	last   map[PhysAddr]*page // of each address, the page of the last frame that has it
	pages  uint64
	stored int // distinct pages
	ended  bool
}

func (d *bodyDecoder) record(kind byte, b *bodyReader) error {
	switch kind {
	case recLabel:
		return d.label(b)
	case recMap:
		return d.ramMap(b)
	case recFrame:
		ns, err := b.u64()
		if err != nil {
			return err
		}
		if d.rec.ram == nil || len(d.rec.frames) == maxRecordedFrames {
			return errors.New("a frame before the RAM map, or too many frames")
		}
		d.rec.frames = append(d.rec.frames, frame{time.Unix(0, int64(ns)), map[PhysAddr]*page{}})
		return nil
	case recPage, recSame:
		return d.page(kind, b)
	case recEnd:
		return d.end(b)
	}
	return fmt.Errorf("kind %#02x is not known", kind)
}

func (d *bodyDecoder) label(b *bodyReader) error {
	n, err := b.u8()
	if err != nil {
		return err
	}
	key, err := b.take(int(n))
	if err != nil {
		return err
	}
	size, err := b.u32()
	if err != nil {
		return err
	}
	if size > maxLabelValue || len(d.rec.labels) == maxLabels {
		return fmt.Errorf("label %.40q: value of %d bytes or too many labels", key, size)
	}
	value, err := b.take(int(size))
	d.rec.labels[string(key)] = string(value)
	return err
}

func (d *bodyDecoder) ramMap(b *bodyReader) error {
	n, err := b.u32()
	if err != nil {
		return err
	}
	if d.rec.ram != nil || n == 0 || n > maxPieces {
		return fmt.Errorf("RAM map of %d ranges, or a second one", n)
	}
	var ram []Range
	for range n {
		start, err := b.u64()
		if err != nil {
			return err
		}
		size, err := b.u64()
		if err != nil {
			return err
		}
		if start > uint64(maxAddr) || size == 0 || size > uint64(maxAddr)-start {
			return fmt.Errorf("RAM range %#x size %#x is out of range", start, size)
		}
		ram = append(ram, Range{PhysAddr(start), size})
	}
	if !slices.Equal(ram, Normalize(ram)) {
		return errors.New("RAM map is not sorted")
	}
	d.rec.ram = ram
	return nil
}

func (d *bodyDecoder) page(kind byte, b *bodyReader) error {
	addr, err := b.u64()
	if err != nil {
		return err
	}
	pa := PhysAddr(addr)
	if len(d.rec.frames) == 0 {
		return errors.New("a page before the first frame")
	}
	pages := d.rec.frames[len(d.rec.frames)-1].pages
	switch {
	case pa%PageSize != 0 || len(within(d.rec.ram, Range{pa, PageSize})) == 0:
		return fmt.Errorf("page %v is unaligned or outside the RAM map", pa)
	case pages[pa] != nil:
		return fmt.Errorf("page %v is twice in its frame", pa)
	}
	d.pages++
	pg := d.last[pa]
	if kind == recSame {
		if pg == nil || d.pages-uint64(d.stored) > maxSamePages {
			return fmt.Errorf("page %v is in no earlier frame, or too many repeat", pa)
		}
		pages[pa] = pg
		return nil
	}
	if d.stored++; d.stored > maxRecordedBytes/PageSize {
		return fmt.Errorf("more than %d MiB of pages", maxRecordedBytes>>20)
	}
	pg = new(page)
	if err := b.bytes(pg[:]); err != nil {
		return err
	}
	pages[pa], d.last[pa] = pg, pg
	return nil
}

func (d *bodyDecoder) end(b *bodyReader) error {
	frames, err := b.u32()
	if err != nil {
		return err
	}
	pages, err := b.u64()
	if err != nil {
		return err
	}
	want := b.sum.Sum(nil)
	got, err := b.take(sha256.Size)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(got, want):
		return errors.New("checksum does not match: the file is damaged")
	case int(frames) != len(d.rec.frames) || pages != d.pages || frames == 0:
		return fmt.Errorf("file ends after %d frames and %d pages and claims %d and %d, or has none",
			len(d.rec.frames), d.pages, frames, pages)
	}
	d.ended = true
	return nil
}

// Labels returns what was noted about the recording. The caller must not change it.
func (r *Recording) Labels() map[string]string { return r.labels }

// Frames returns the number of frames, at least one.
func (r *Recording) Frames() int { return len(r.frames) }

// NextFrame moves to the next frame, or reports false at the last one and stays there.
func (r *Recording) NextFrame() bool {
	for {
		i := r.at.Load()
		if int(i)+1 >= len(r.frames) {
			return false
		}
		if r.at.CompareAndSwap(i, i+1) {
			return true
		}
	}
}

// Time returns when frame i was begun, by the recording agent's clock.
func (r *Recording) Time(i int) time.Time { return r.frames[i].start }

// Frame returns frame i, from 0 on, as a memory of its own that stays as it is.
func (r *Recording) Frame(i int) *Recording {
	return &Recording{labels: r.labels, ram: r.ram, frames: r.frames[i : i+1]}
}

// Map implements Memory.
func (r *Recording) Map() []Range { return r.ram }

// Resident implements Resident: the pages of the frame.
func (r *Recording) Resident() []Range {
	f := r.frames[r.at.Load()]
	out := make([]Range, 0, len(f.pages))
	for pa := range f.pages {
		out = append(out, Range{pa, PageSize})
	}
	return Intersect(r.ram, out)
}

// ReadAt implements Memory.
func (r *Recording) ReadAt(p []byte, off int64) (int, error) {
	can, fault := mapped(r.ram, opRead, off, len(p))
	n, err := r.frames[r.at.Load()].read(p[:can], PhysAddr(off))
	switch {
	case err != nil:
		return n, lengthen(err, len(p)-can)
	case fault != nil:
		return n, fault
	}
	return n, nil
}

// Close implements Memory.
func (r *Recording) Close() error { return nil }
