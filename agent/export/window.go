package export

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// live is the host's memory as the engine has it at each moment, as one Memory.
type live struct{ host Host }

func (l live) now() hostmem.Memory {
	mem, _, err := l.host.HostMemory()
	if err != nil {
		return none{err}
	}
	return mem
}

func (l live) ReadAt(p []byte, off int64) (int, error)  { return l.now().ReadAt(p, off) }
func (l live) Map() []hostmem.Range                     { return l.now().Map() }
func (l live) Close() error                             { return nil } // it is the engine's
func (l live) Writer() (hostmem.Writer, bool)           { return hostmem.AsWriter(l.now()) }
func (l live) Swapper() (hostmem.Swapper, bool)         { return hostmem.AsSwapper(l.now()) }
func (l live) ReadScatter(segs []hostmem.Segment) error { return hostmem.ReadScatter(l.now(), segs) }
func (l live) ScatterReader() (hostmem.ScatterReader, bool) {
	return hostmem.AsScatterReader(l.now())
}

// none is a memory that is not there.
type none struct{ err error }

func (n none) ReadAt(p []byte, off int64) (int, error) {
	return 0, &hostmem.FaultError{Op: "read", Addr: hostmem.PhysAddr(off), Len: len(p), Err: n.err}
}
func (none) Map() []hostmem.Range { return nil }
func (none) Close() error         { return nil }

// window is a lease's part of the host's memory. Its methods are called by the device, one at a time.
type window struct {
	x     *Exporter
	l     *lease
	mem   live
	guard *hostmem.Guard

	pending stored // what is about to be stored
}

// RecordStore is the kind of the journal's records of stores by peers.
const RecordStore = "rdma-store"

// stored is the journal's record of a store by a peer, of kind RecordStore. Bytes are base64.
type stored struct {
	Lease string           `json:"lease"`
	User  string           `json:"user"`
	Peer  string           `json:"peer"`
	Op    string           `json:"op"`
	Addr  hostmem.PhysAddr `json:"addr"`
	Old   []byte           `json:"old"` // what is there before, or of a swap what it wants to find there
	New   []byte           `json:"new"`
}

func newWindow(x *Exporter, l *lease) *window {
	w := &window{x: x, l: l, mem: live{x.o.Host}}
	w.guard = hostmem.NewGuard(w.mem, w.allow)
	l.named.Store(x.o.Host.Grant().Named())
	return w
}

// ReadAt implements roce.Region. The lease was judged when it was given and is again from time to time; what is given by a name is at each
// read, because the host's memory says where that is.
func (w *window) ReadAt(p []byte, off int64) (int, error) {
	if w.l.named.Load() {
		if err := w.x.o.Host.Grant().PermitMemory(uint64(off), uint64(len(p)), true, false, false); err != nil {
			return 0, refusal(err)
		}
	}
	n, err := w.mem.ReadAt(p, off)
	return n, refusal(err)
}

// WriteAt implements roce.RegionWriter: one packet's part of a WRITE.
func (w *window) WriteAt(p []byte, off int64) (int, error) {
	old := make([]byte, len(p))
	if _, err := w.mem.ReadAt(old, off); err != nil {
		return 0, w.count(refusal(err), 0, false)
	}
	w.pending = w.record("write", off, old, p)
	n, err := w.guard.WriteAt(p, off)
	return n, w.count(refusal(err), n, false)
}

// CompareAndSwap implements roce.RegionSwapper.
func (w *window) CompareAndSwap(off int64, old, new uint64) (uint64, error) {
	s, ok := w.guard.Swapper()
	if !ok {
		return 0, w.count(fmt.Errorf("the path to the host's memory has no compare-and-swap: %w", errors.ErrUnsupported), 0, true)
	}
	le := binary.LittleEndian
	w.pending = w.record("compare-and-swap", off, le.AppendUint64(nil, old), le.AppendUint64(nil, new))
	prev, err := s.CompareAndSwap(hostmem.PhysAddr(off), old, new)
	return prev, w.count(refusal(err), 8, true)
}

func (w *window) record(op string, off int64, old, new []byte) stored {
	return stored{w.l.ID, w.l.User, w.l.Peer.String(), op, hostmem.PhysAddr(off), old, new}
}

// allow is the rule of the lease's guard: asked before each store, it journals those that it lets through.
func (w *window) allow(op string, r hostmem.Range) error {
	atomic := op != "write"
	if err := w.x.o.Host.WritesOn(); err != nil {
		return err
	}
	if err := w.x.o.Host.Grant().PermitMemory(uint64(r.Start), r.Size, false, !atomic, atomic); err != nil {
		return err
	}
	if _, known, err := w.x.o.Host.HostMemory(); err != nil {
		return err
	} else if !known {
		return fmt.Errorf("no kernel of the host is attached that says what is RAM: %w", hostmem.ErrReadOnly)
	}
	if w.l.stored+r.Size > maxStored {
		return fmt.Errorf("%d bytes may be stored through one lease, each with its record: %w", maxStored, hostmem.ErrReadOnly)
	}
	if w.x.o.Journal == nil {
		return fmt.Errorf("there is no journal, and nothing is stored without one: %w", hostmem.ErrReadOnly)
	}
	if _, err := w.x.o.Journal.Write(RecordStore, w.pending); err != nil {
		return fmt.Errorf("journal the store: %w", err)
	}
	w.l.stored += r.Size
	return nil
}

// count counts a store and passes its error on.
func (w *window) count(err error, n int, swap bool) error {
	w.x.mu.Lock()
	defer w.x.mu.Unlock()
	c := &w.x.wrote
	switch {
	case err != nil:
		c.Refused++
		w.x.log.Warn("a store by RDMA was refused", "lease", w.l.ID, "user", w.l.User, "err", err)
	case swap:
		c.Swaps++
	default:
		c.Stores++
		c.Bytes += uint64(n)
	}
	return err
}

// refusal makes of what nobody may reach a remote access error. What only does not work now stays an error of the operation.
func refusal(err error) error {
	if err == nil {
		return nil
	}
	for _, e := range []error{hostmem.ErrNotMapped, hostmem.ErrReadOnly, hostmem.ErrUnaligned, access.ErrDenied, engine.ErrWritesOff} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", roce.ErrAccess, err)
		}
	}
	return err
}

// ramMap writes the map of a memory as peers read it: 8 bytes with the number of ranges, then 16 for each, its start and its
// size, little endian. What lies outside from start on for length bytes is left out.
func ramMap(ranges []hostmem.Range, start, length uint64) *roce.Buffer {
	window := []hostmem.Range{{Start: hostmem.PhysAddr(start), Size: length}}
	ranges = hostmem.Intersect(ranges, window)
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(ranges)))
	for _, r := range ranges {
		b = binary.LittleEndian.AppendUint64(b, uint64(r.Start))
		b = binary.LittleEndian.AppendUint64(b, r.Size)
	}
	buf := roce.NewBuffer(len(b))
	buf.WriteAt(b, 0) // as large as b
	return buf
}

// ParseRAMMap takes apart what ramMap wrote. At most maxRanges are believed.
func ParseRAMMap(b []byte) ([]hostmem.Range, error) {
	const maxRanges = 4096
	if len(b) < 8 {
		return nil, fmt.Errorf("RAM map of %d bytes is too short", len(b))
	}
	n := binary.LittleEndian.Uint64(b)
	if n > maxRanges || len(b) != 8+16*int(n) {
		return nil, fmt.Errorf("RAM map of %d ranges has %d bytes", n, len(b))
	}
	out := make([]hostmem.Range, 0, n)
	end := uint64(0)
	for i := range int(n) {
		start, size := binary.LittleEndian.Uint64(b[8+16*i:]), binary.LittleEndian.Uint64(b[16+16*i:])
		if size == 0 || start < end || start > math.MaxInt64 || size > math.MaxInt64-start {
			return nil, fmt.Errorf("RAM map: range %d, %#x bytes at %#x, is out of order or range", i, size, start)
		}
		end = start + size
		out = append(out, hostmem.Range{Start: hostmem.PhysAddr(start), Size: size})
	}
	return hostmem.Normalize(out), nil
}

// ReadOnly returns the host's memory as a region that can be read and nothing else, without a lease: for laboratories.
func ReadOnly(h Host) roce.Region { return readOnly{live{h}} }

type readOnly struct{ mem live }

func (r readOnly) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.mem.ReadAt(p, off)
	return n, refusal(err)
}
