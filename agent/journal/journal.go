package journal

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// place is where a record lies.
type place struct{ seq, block, blocks uint64 }

// Journal is an open journal. Its methods are safe for concurrent use.
type Journal struct {
	dev     Device
	super   superblock
	restart uint64
	now     func() time.Time
	closer  io.Closer

	mu     sync.Mutex
	held   []place // guarded by mu: the records that are there, oldest first
	head   digest  // guarded by mu: hash of the newest record, or of the superblock
	seq    uint64  // guarded by mu: of the newest record
	next   uint64  // guarded by mu: block at which the next record may start
	notify chan struct{}
}

// Open opens the journal on a device of size bytes, of which the last incomplete block is not used. A device that holds
// only zeros becomes an empty journal. Anything else that is no journal is ErrNotJournal and is left as it is.
func Open(dev Device, size int64) (*Journal, error) {
	var id [24]byte
	rand.Read(id[:])
	return open(dev, size, [16]byte(id[:16]), binary.LittleEndian.Uint64(id[16:]), time.Now)
}

func open(dev Device, size int64, id [16]byte, restart uint64, now func() time.Time) (*Journal, error) {
	if size < MinSize {
		return nil, fmt.Errorf("a journal needs %d bytes, and the device has %d", MinSize, size)
	}
	first := make([]byte, blockSize)
	if err := readFull(dev, first, 0); err != nil {
		return nil, err
	}
	super, err := decodeSuper(first, size)
	if err != nil {
		// Crash case 6: only the superblock has ever been written, and not wholly.
		blank, berr := allZero(dev, blockSize, size/blockSize*blockSize)
		if berr != nil {
			return nil, berr
		}
		if !blank || [8]byte(first[:8]) != superMagic && !zero(first) {
			return nil, err
		}
		super = superblock{blocks: uint64(size) / blockSize, id: id}
		if _, err := dev.WriteAt(super.encode(), 0); err != nil {
			return nil, fmt.Errorf("format journal: %w", err)
		}
		if err := dev.Sync(); err != nil {
			return nil, fmt.Errorf("format journal: %w", err)
		}
	}
	j := &Journal{dev: dev, super: super, restart: restart, now: now}
	s, err := scan(dev, super)
	if err != nil {
		return nil, err
	}
	j.head, j.next = super.genesis(), 1
	for _, e := range s {
		j.held = append(j.held, place{e.seq, e.block, blocksFor(len(e.payload))})
	}
	if n := len(s); n > 0 {
		j.head, j.seq = s[n-1].hash, s[n-1].seq
		j.next = j.held[n-1].block + j.held[n-1].blocks
	}
	return j, nil
}

// ErrInUse means that another process has the journal open for writing.
var ErrInUse = errors.New("another process has the journal open; end it first")

// OpenFile opens the journal in a file, or makes the file with size bytes if it is not there. As long as the journal is open
// nobody else can open it so: two writers would overwrite each other's records.
func OpenFile(path string, size int64) (*Journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		f, err = create(path, size)
	}
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrInUse
	}
	var n int64
	if err == nil {
		n, err = f.Seek(0, io.SeekEnd) // the size of a block device as well as of a file
	}
	if err == nil {
		var j *Journal
		if j, err = Open(file{f}, n); err == nil {
			j.closer = f
			return j, nil
		}
	}
	if errors.Is(err, ErrNotJournal) {
		err = fmt.Errorf("%w; move it away, as evidence, and a new one is made", err)
	}
	return nil, errors.Join(fmt.Errorf("open journal %s: %w", path, err), f.Close())
}

// file is a file that keeps its size, and whose blocks were all written once: what is written is durable without the file system's own log,
// which fsync would wait for because of the time of the last change.
type file struct{ *os.File }

// Sync implements Device.
func (f file) Sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

// create makes a file full of real zeros, so that a later append cannot run out of space, and gives it its name only when
// it is whole.
func create(path string, size int64) (*os.File, error) {
	if size < MinSize {
		return nil, fmt.Errorf("a journal needs %d bytes, and %d are given", MinSize, size)
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*")
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 64<<10)
	for left := size; left > 0 && err == nil; left -= int64(len(buf)) {
		_, err = f.Write(buf[:min(left, int64(len(buf)))])
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		var dir *os.File
		if dir, err = os.Open(filepath.Dir(path)); err == nil {
			err = errors.Join(dir.Sync(), dir.Close())
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return f, nil
}

// Close closes the file of a journal that OpenFile has opened.
func (j *Journal) Close() error {
	if j.closer == nil {
		return nil
	}
	return j.closer.Close()
}

// Append makes a record durable and returns its sequence number. Restart and Seq of the record are set here, and Time if
// it is zero. After an error nothing may depend on the record; the next Append takes its place.
func (j *Journal) Append(r Record) (uint64, error) {
	if r.Kind == "" {
		return 0, errors.New("append to journal: the record has no kind")
	}
	p, err := json.Marshal(payload{r.Kind, r.Data})
	if err != nil {
		return 0, fmt.Errorf("append to journal: %w", err)
	}
	need := blocksFor(len(p))
	if len(p) > MaxPayload || need > j.super.most() {
		return 0, fmt.Errorf("append to journal: a record of %d bytes is too large for it", len(p))
	}
	if r.Time.IsZero() {
		r.Time = j.now()
	}

	j.mu.Lock()
	defer j.mu.Unlock()
	at, held := j.next, j.held
	if at+need > j.super.blocks {
		held = drop(held, at, j.super.blocks)
		at = 1
	}
	held = drop(held, at, at+need)
	e := entry{
		restart: j.restart, seq: j.seq + 1, oldest: j.seq + 1, time: r.Time.UnixNano(), block: at, prev: j.head, payload: p,
	}
	if len(held) > 0 {
		e.oldest = held[0].seq
	}
	if _, err := j.dev.WriteAt(e.encode(), int64(at*blockSize)); err != nil {
		return 0, fmt.Errorf("append to journal: %w", err)
	}
	if err := j.dev.Sync(); err != nil {
		return 0, fmt.Errorf("append to journal: %w", err)
	}
	j.held = append(held, place{e.seq, at, need})
	j.head, j.seq, j.next = e.hash, e.seq, at+need
	if j.notify != nil {
		close(j.notify)
		j.notify = nil
	}
	return e.seq, nil
}

// Write appends v as JSON under a kind.
func (j *Journal) Write(kind string, v any) (uint64, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("append %s to journal: %w", kind, err)
	}
	return j.Append(Record{Kind: kind, Data: b})
}

// drop removes the oldest records as long as they lie in blocks from up to to. In a ring only the oldest ever do.
func drop(held []place, from, to uint64) []place {
	for len(held) > 0 && held[0].block < to && held[0].block+held[0].blocks > from {
		held = held[1:]
	}
	return held
}

// Head returns the sequence number and hash of the newest record. Whoever keeps a head elsewhere can later tell whether the
// journal before it was changed or cut.
func (j *Journal) Head() (seq uint64, hash string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.seq, hex.EncodeToString(j.head[:])
}

// Restart returns the random number that marks this opening of the journal.
func (j *Journal) Restart() uint64 { return j.restart }

// Changed returns a channel that is closed at the next append.
func (j *Journal) Changed() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.notify == nil {
		j.notify = make(chan struct{})
	}
	return j.notify
}

// Records returns what the journal held when iteration began, oldest first. A record that cannot be read is an error in
// its place; iteration goes on behind it.
func (j *Journal) Records() iter.Seq2[Record, error] { return j.From(0) }

// From is Records from a sequence number on.
func (j *Journal) From(seq uint64) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		j.mu.Lock()
		held := slices.Clone(j.held)
		j.mu.Unlock()
		want := uint64(0)
		for _, p := range held {
			if p.seq < seq {
				continue
			}
			if want != 0 && p.seq != want {
				if !yield(Record{Seq: want}, fmt.Errorf("journal records %d to %d are damaged", want, p.seq-1)) {
					return
				}
			}
			want = p.seq + 1
			e, err := decode(j.dev, p.block, j.super.blocks)
			var r Record
			switch {
			case err == nil && e.seq == p.seq:
				r, err = e.record()
			case err == nil || errors.Is(err, io.EOF):
				// Overwritten by a newer record since iteration began, or damaged.
				r.Seq, err = p.seq, fmt.Errorf("journal record %d is no longer there", p.seq)
			default:
				r.Seq = p.seq
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

// Report is what verification has found.
type Report struct {
	ID       string `json:"id"`
	Size     int64  `json:"size"`
	Records  int    `json:"records"`
	First    uint64 `json:"first"` // oldest record of the unbroken chain that ends in the newest; 0 if empty
	Last     uint64 `json:"last"`
	Head     string `json:"head"`     // hash of the newest record
	Lost     int    `json:"lost"`     // oldest records that a power failure has cost
	Restarts int    `json:"restarts"` // distinct writers among the records
}

// Verify checks the chain of a journal off-line. An error says where the chain is broken; the Report is about what holds.
func Verify(r io.ReaderAt, size int64) (Report, error) {
	first := make([]byte, blockSize)
	if err := readFull(r, first, 0); err != nil {
		return Report{}, err
	}
	super, err := decodeSuper(first, size)
	if err != nil {
		return Report{}, err
	}
	rep := Report{ID: hex.EncodeToString(super.id[:]), Size: int64(super.blocks * blockSize)}
	es, err := scan(r, super)
	if err != nil {
		return rep, err
	}
	g := super.genesis()
	rep.Head = hex.EncodeToString(g[:])
	if len(es) == 0 {
		return rep, nil
	}
	last := es[len(es)-1]
	rep.Last, rep.Head, rep.Records = last.seq, hex.EncodeToString(last.hash[:]), len(es)
	var broken error
	writers := map[uint64]bool{}
	first1 := es[0].seq
	for i, e := range es {
		writers[e.restart] = true
		var why string
		switch {
		case e.seq == 1 && e.prev != g:
			why = "does not follow from the journal's first block"
		case i > 0 && e.seq != es[i-1].seq+1:
			why = fmt.Sprintf("follows on record %d: those between are damaged or were taken out", es[i-1].seq)
		case i > 0 && e.prev != es[i-1].hash:
			why = "does not have the hash of the record before it"
		}
		if _, err := e.record(); why == "" && err != nil {
			why = err.Error()
		}
		if why != "" {
			first1 = e.seq
			broken = errors.Join(broken, fmt.Errorf("journal record %d %s", e.seq, why))
		}
	}
	rep.First, rep.Restarts = first1, len(writers)
	rep.Lost = int(es[0].seq - last.oldest)
	return rep, broken
}

// Verify checks the chain as it now lies on the device.
func (j *Journal) Verify() (Report, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return Verify(j.dev, int64(j.super.blocks*blockSize))
}

// scan returns the whole records that belong to the chain's newest part, sorted, one per sequence number.
func scan(r io.ReaderAt, super superblock) ([]*entry, error) {
	// Reading in large pieces makes opening a matter of one pass over the device.
	const chunk = 128 // blocks
	buf := make([]byte, chunk*blockSize)
	var es []*entry
	for b := uint64(1); b < super.blocks; b += chunk {
		n := min(chunk, super.blocks-b)
		part := buf[:n*blockSize]
		if err := readFull(r, part, int64(b*blockSize)); err != nil {
			return nil, err
		}
		for i := range n {
			if !bytes.HasPrefix(part[i*blockSize:], recordMagic[:]) {
				continue
			}
			e, err := decode(r, b+i, super.blocks)
			if errors.Is(err, io.EOF) {
				continue
			}
			if err != nil {
				return nil, err
			}
			es = append(es, e)
		}
	}
	if len(es) == 0 {
		return nil, nil
	}
	slices.SortFunc(es, func(a, b *entry) int { return cmp.Compare(a.seq, b.seq) })
	oldest := es[len(es)-1].oldest
	es = slices.DeleteFunc(es, func(e *entry) bool { return e.seq < oldest })
	es = slices.CompactFunc(es, func(a, b *entry) bool { return a.seq == b.seq })
	// Crash case 4: an append that did not complete may have hit any of the oldest records in the blocks that it was about to
	// take, and a later one of them sooner than an earlier one. What is left in front of such a gap goes with it.
	head := es[len(es)-1]
	next, most := head.block+blocksFor(len(head.payload)), super.most()
	for i := len(es) - 1; i > 0; i-- {
		if es[i].seq == es[i-1].seq+1 {
			continue
		}
		b := es[i].block
		if b > next && b-next <= most || next+most > super.blocks && b <= 1+most {
			es = es[i:]
		}
		break
	}
	return es, nil
}

func zero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

func allZero(r io.ReaderAt, from, to int64) (bool, error) {
	buf := make([]byte, 64<<10)
	for off := from; off < to; off += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), to-off)]
		if err := readFull(r, part, off); err != nil {
			return false, err
		}
		if !zero(part) {
			return false, nil
		}
	}
	return true, nil
}
