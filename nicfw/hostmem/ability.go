package hostmem

import (
	"errors"
	"time"
)

// The values of FaultError.Op.
const (
	opRead  = "read"
	opWrite = "write"
	opSwap  = "compare-and-swap"
)

// ErrUnaligned means that a compare-and-swap named an address that is not a multiple of 8, or SleepIf one that is not a multiple of 4.
var ErrUnaligned = errors.New("address is not a multiple of the length")

// A type assertion tells what a type can do. Whether a value can do it may only be known at run time: a RAM file was
// opened read-only, a wrapper has only the abilities of what it wraps. Such types have one of the methods below; ask
// with AsWriter, AsSwapper, AsScatterReader and AsSleeper, which know both ways.
type (
	mayWrite   interface{ Writer() (Writer, bool) }
	maySwap    interface{ Swapper() (Swapper, bool) }
	mayScatter interface{ ScatterReader() (ScatterReader, bool) }
	maySleep   interface{ Sleeper() (Sleeper, bool) }
)

// AsWriter returns the ability of this very memory to store, or false.
func AsWriter(mem Memory) (Writer, bool) {
	if m, ok := mem.(mayWrite); ok {
		return m.Writer()
	}
	w, ok := mem.(Writer)
	return w, ok
}

// AsSwapper returns the ability of this very memory to compare and swap, or false.
func AsSwapper(mem Memory) (Swapper, bool) {
	if m, ok := mem.(maySwap); ok {
		return m.Swapper()
	}
	s, ok := mem.(Swapper)
	return s, ok
}

// AsScatterReader returns the ability of this very memory to read many pieces for about the latency of one, or false: then nothing
// is gained by reading ahead.
func AsScatterReader(mem Memory) (ScatterReader, bool) {
	if m, ok := mem.(mayScatter); ok {
		return m.ScatterReader()
	}
	s, ok := mem.(ScatterReader)
	return s, ok
}

// Sleeper is the ability of mapped memory to look at a word and sleep in one call of the kernel: who looks often pays for the sleep alone.
type Sleeper interface {
	// SleepIf sleeps for d if the 32-bit word at pa, a multiple of 4, is v, and tells whether it was. A change does not end the sleep: it is
	// found by the next call. A signal may. A path that is lost is an error where its loads fault; where they read all-ones, it is what is read.
	SleepIf(pa PhysAddr, v uint32, d time.Duration) (was bool, err error)
}

// AsSleeper returns the ability of this very memory to look and sleep at once, or false.
func AsSleeper(mem Memory) (Sleeper, bool) {
	if m, ok := mem.(maySleep); ok {
		return m.Sleeper()
	}
	s, ok := mem.(Sleeper)
	return s, ok
}

// Resident is the ability to tell which parts of the map hold anything: the pages of a recording, the pages of a sparse
// RAM file that were ever written. A search of all memory need not look elsewhere.
type Resident interface {
	// Resident returns the ranges at the time of the call, sorted and without overlap, all within the map.
	Resident() []Range
}

// NoteHolder is the ability of a dump to hand out the kernel's VMCOREINFO text from its own headers, so that nobody has
// to search for it.
type NoteHolder interface {
	// VMCOREINFO returns the text of the note ("OSRELEASE=…\n…"), or nil if there is none.
	VMCOREINFO() []byte
}

// ResidentRanges returns the ranges in which a search of mem may find something: what Resident tells, or the whole map.
func ResidentRanges(mem Memory) []Range {
	if r, ok := mem.(Resident); ok {
		return r.Resident()
	}
	return mem.Map()
}

// VMCOREINFO returns the VMCOREINFO text that mem carries in its headers, or nil.
func VMCOREINFO(mem Memory) []byte {
	if n, ok := mem.(NoteHolder); ok {
		return n.VMCOREINFO()
	}
	return nil
}

// ReadScatter reads all segments: pipelined where mem has the ability, one after the other elsewhere. The error joins
// nothing: it is that of the first segment that failed, and each failed segment has its own.
func ReadScatter(mem Memory, segs []Segment) error {
	if s, ok := mem.(ScatterReader); ok {
		return s.ReadScatter(segs)
	}
	return readEach(mem, segs)
}

// batcher is memory that gains a little by reading segments together, but no latency: it is no ScatterReader, for reading ahead gains nothing.
// readTogether returns false if anything was in its way; the segments are to be read one by one then, and have their errors from that.
type batcher interface{ readTogether(segs []Segment) bool }

func readEach(mem Memory, segs []Segment) error {
	if b, ok := mem.(batcher); ok && len(segs) > 1 && b.readTogether(segs) {
		return nil
	}
	var first error
	for i := range segs {
		s := &segs[i]
		_, s.Err = mem.ReadAt(s.Buf, int64(s.Addr))
		if first == nil {
			first = s.Err
		}
	}
	return first
}
