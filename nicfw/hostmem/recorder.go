package hostmem

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
)

// page is what was found at one page-aligned address. Bytes outside the RAM map are zero.
type page [PageSize]byte

// frame is what one pass saw.
type frame struct {
	start time.Time
	pages map[PhysAddr]*page
}

// Recorder is a Memory that remembers each page read through it, to be written to a .hostmem file.
//
// A recording is a series of frames, one for each pass over the memory. Within a frame a page is read from the memory
// once, whole, and answered from the record after that: so what was served is what is recorded, and a replay takes the
// same path as the pass did. A pass that waits for the memory to change needs a frame for each look.
//
// To keep the search of a cold attach out of a recording, attach to the bare memory first, and then through the Recorder
// with the note's address that was found.
//
// A Recorder cannot store, nor are the stores of others seen within a frame.
type Recorder struct {
	mem Memory

	mu     sync.Mutex
	labels map[string]string
	frames []frame // never empty; the last one is being recorded
}

// NewRecorder returns a recorder of mem that has begun its first frame.
func NewRecorder(mem Memory) *Recorder {
	r := &Recorder{mem: mem, labels: map[string]string{}}
	r.NextFrame()
	return r
}

// Label notes something about the recording for its readers: the address of the VMCOREINFO note, the kernel's release, the
// truth that the harness knows. Keys of up to 255 bytes.
func (r *Recorder) Label(key, value string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.labels[key] = value
}

// NextFrame ends the frame and begins the next one.
func (r *Recorder) NextFrame() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.frames = append(r.frames, frame{time.Now(), map[PhysAddr]*page{}})
}

// Map implements Memory.
func (r *Recorder) Map() []Range { return r.mem.Map() }

// Resident implements Resident.
func (r *Recorder) Resident() []Range { return ResidentRanges(r.mem) }

// VMCOREINFO hides the note of a dump: a recording could not answer in its place.
func (r *Recorder) VMCOREINFO() []byte { return nil }

// Close implements Memory. The record remains and can be written.
func (r *Recorder) Close() error { return r.mem.Close() }

// ReadAt implements Memory.
func (r *Recorder) ReadAt(p []byte, off int64) (int, error) {
	can, fault := mapped(r.mem.Map(), opRead, off, len(p))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.load([]Segment{{Addr: PhysAddr(off), Buf: p[:can]}})
	n, err := r.serve(p[:can], PhysAddr(off))
	switch {
	case err != nil:
		return n, lengthen(err, len(p)-can)
	case fault != nil:
		return n, fault
	}
	return n, nil
}

// ReadScatter implements ScatterReader: the pages that are not recorded yet are read in one go.
func (r *Recorder) ReadScatter(segs []Segment) error {
	return scatterMapped(recorderScatter{r}, r.mem.Map(), segs)
}

// ScatterReader says no: what is read ahead would be recorded, needed or not.
func (r *Recorder) ScatterReader() (ScatterReader, bool) { return nil, false }

// recorderScatter is the Recorder for segments that are known to be in the map.
type recorderScatter struct{ *Recorder }

func (r recorderScatter) ReadScatter(segs []Segment) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.load(segs)
	var first error
	for i := range segs {
		s := &segs[i]
		_, s.Err = r.serve(s.Buf, s.Addr)
		first = cmp.Or(first, s.Err)
	}
	return first
}

// load reads the pages of the segments that the frame lacks. Pages that fault are left out. r.mu is held.
func (r *Recorder) load(segs []Segment) {
	pages := r.frames[len(r.frames)-1].pages
	var need []Segment
	fresh := map[PhysAddr]*page{}
	for _, s := range segs {
		if len(s.Buf) == 0 {
			continue
		}
		last := (s.Addr + PhysAddr(len(s.Buf)-1)) &^ (PageSize - 1)
		for pa := s.Addr &^ (PageSize - 1); ; pa += PageSize {
			if pages[pa] == nil && fresh[pa] == nil {
				pg := new(page)
				fresh[pa] = pg
				for _, part := range within(r.mem.Map(), Range{pa, PageSize}) {
					need = append(need, Segment{Addr: part.Start, Buf: pg[part.Start-pa:][:part.Size]})
				}
			}
			if pa == last {
				break
			}
		}
	}
	_ = ReadScatter(r.mem, need) // each segment has its own error
	for _, s := range need {
		if s.Err != nil {
			delete(fresh, s.Addr&^(PageSize-1))
		}
	}
	maps.Copy(pages, fresh)
}

// serve answers from the record, and what could not be recorded from the memory. r.mu is held.
func (r *Recorder) serve(p []byte, pa PhysAddr) (int, error) {
	n, err := r.frames[len(r.frames)-1].read(p, pa)
	if err == nil {
		return n, nil
	}
	m, err := r.mem.ReadAt(p[n:], int64(pa)+int64(n))
	return n + m, err
}

// read copies from the frame. The error, if any, is a *FaultError with ErrNotRecorded.
func (f frame) read(p []byte, pa PhysAddr) (int, error) {
	for n := 0; n < len(p); {
		at := pa + PhysAddr(n)
		pg := f.pages[at&^(PageSize-1)]
		if pg == nil {
			return n, &FaultError{Op: opRead, Addr: at, Len: len(p) - n, Err: ErrNotRecorded}
		}
		n += copy(p[n:], pg[at%PageSize:])
	}
	return len(p), nil
}

// WriteTo writes the recording as a .hostmem file and returns its size. Frames in which nothing was read are left out.
// See DESIGN.md for the format.
func (r *Recorder) WriteTo(w io.Writer) (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	frames := slices.DeleteFunc(slices.Clone(r.frames), func(f frame) bool { return len(f.pages) == 0 })
	out := &countingWriter{w: w}
	if _, err := out.Write(appendRecordingHeader(nil)); err != nil {
		return out.n, fmt.Errorf("write recording: %w", err)
	}
	z, err := zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return out.n, fmt.Errorf("write recording: %w", err)
	}
	if err := writeBody(z, r.labels, r.mem.Map(), frames); err != nil {
		z.Close()
		return out.n, fmt.Errorf("write recording: %w", err)
	}
	if err := z.Close(); err != nil {
		return out.n, fmt.Errorf("write recording: %w", err)
	}
	return out.n, nil
}

// writeBody writes the records of the format in their canonical order.
func writeBody(w io.Writer, labels map[string]string, ram []Range, frames []frame) error {
	sum := sha256.New()
	out := io.MultiWriter(w, sum)
	var b []byte
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if len(k) > maxLabelKey || len(labels[k]) > maxLabelValue {
			return fmt.Errorf("label %.40q: key or value too long", k)
		}
		b = append(b, recLabel, byte(len(k)))
		b = append(b, k...)
		b = le.AppendUint32(b, uint32(len(labels[k])))
		b = append(b, labels[k]...)
	}
	b = append(b, recMap)
	b = le.AppendUint32(b, uint32(len(ram)))
	for _, r := range ram {
		b = le.AppendUint64(b, uint64(r.Start))
		b = le.AppendUint64(b, r.Size)
	}
	pages := uint64(0)
	last := map[PhysAddr]*page{}
	for _, f := range frames {
		b = append(b, recFrame)
		b = le.AppendUint64(b, uint64(f.start.UnixNano()))
		for _, pa := range slices.Sorted(maps.Keys(f.pages)) {
			pages++
			pg := f.pages[pa]
			if old := last[pa]; old != nil && bytes.Equal(old[:], pg[:]) {
				b = append(b, recSame)
				b = le.AppendUint64(b, uint64(pa))
			} else {
				b = append(b, recPage)
				b = le.AppendUint64(b, uint64(pa))
				b = append(b, pg[:]...)
				last[pa] = pg
			}
			if _, err := out.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
	}
	b = append(b, recEnd)
	b = le.AppendUint32(b, uint32(len(frames)))
	b = le.AppendUint64(b, pages)
	if _, err := out.Write(b); err != nil {
		return err
	}
	_, err := w.Write(sum.Sum(nil))
	return err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func appendRecordingHeader(b []byte) []byte {
	b = append(b, recordingMagic...)
	return le.AppendUint32(b, recordingVersion)
}
