package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

const (
	blockSize  = 512
	headerSize = 128
	hashedSize = 96 // bytes of a header that its hash covers
	minBlocks  = 64

	// MinSize and MaxPayload bound what a journal can be and what one record can hold, in bytes.
	MinSize    = minBlocks * blockSize
	MaxPayload = 256 << 10
)

var (
	superMagic  = [8]byte{0x89, 'B', 'D', 'J', '\r', '\n', 0, 1}
	recordMagic = [8]byte{0x89, 'B', 'D', 'R', '\r', '\n', 0, 1}
)

// ErrNotJournal means that a device holds something that is no journal, or one whose first block is damaged.
var ErrNotJournal = errors.New("not a journal")

type digest [sha256.Size]byte

type superblock struct {
	blocks uint64
	id     [16]byte
}

func (s superblock) encode() []byte {
	b := make([]byte, blockSize)
	copy(b, superMagic[:])
	binary.LittleEndian.PutUint32(b[8:], blockSize)
	binary.LittleEndian.PutUint64(b[16:], s.blocks)
	copy(b[24:40], s.id[:])
	h := sha256.Sum256(b[:64])
	copy(b[64:], h[:])
	return b
}

// genesis is what the first record has as the hash of its predecessor.
func (s superblock) genesis() digest { return sha256.Sum256(s.encode()[:hashedSize]) }

// most is the greatest number of blocks that one record may take.
func (s superblock) most() uint64 { return min(blocksFor(MaxPayload), (s.blocks-1)/4) }

func decodeSuper(b []byte, size int64) (superblock, error) {
	var s superblock
	if len(b) < blockSize || [8]byte(b[:8]) != superMagic {
		return s, fmt.Errorf("first block: %w", ErrNotJournal)
	}
	s.blocks = binary.LittleEndian.Uint64(b[16:])
	copy(s.id[:], b[24:40])
	if !bytes.Equal(b[:blockSize], s.encode()) {
		return s, fmt.Errorf("first block is damaged: %w", ErrNotJournal)
	}
	if s.blocks < minBlocks || s.blocks > uint64(size)/blockSize {
		return s, fmt.Errorf("made for %d bytes, and the device has %d: %w", s.blocks*blockSize, size, ErrNotJournal)
	}
	return s, nil
}

// entry is one record with its place in the chain.
type entry struct {
	restart uint64
	seq     uint64
	oldest  uint64
	time    int64
	block   uint64
	prev    digest
	hash    digest
	payload []byte
}

// blocksFor returns how many blocks a record with n bytes of payload takes.
func blocksFor(n int) uint64 { return (headerSize + uint64(n) + blockSize - 1) / blockSize }

// encode returns the record as it lies on the device, padded, and sets its hash.
func (e *entry) encode() []byte {
	b := make([]byte, blocksFor(len(e.payload))*blockSize)
	copy(b, recordMagic[:])
	le := binary.LittleEndian
	le.PutUint64(b[8:], e.restart)
	le.PutUint64(b[16:], e.seq)
	le.PutUint64(b[24:], e.oldest)
	le.PutUint64(b[32:], uint64(e.time))
	le.PutUint32(b[40:], uint32(len(e.payload)))
	le.PutUint64(b[48:], e.block)
	copy(b[64:], e.prev[:])
	copy(b[headerSize:], e.payload)
	h := sha256.New()
	h.Write(b[:hashedSize])
	h.Write(e.payload)
	h.Sum(e.hash[:0])
	copy(b[hashedSize:], e.hash[:])
	return b
}

// decode reads the record that starts at a block of a journal of that many blocks. It returns io.EOF if there is no record
// there, or none that is whole.
func decode(r io.ReaderAt, block, blocks uint64) (*entry, error) {
	var hdr [headerSize]byte
	if err := readFull(r, hdr[:], int64(block*blockSize)); err != nil {
		return nil, err
	}
	if [8]byte(hdr[:8]) != recordMagic {
		return nil, io.EOF
	}
	le := binary.LittleEndian
	e := &entry{
		restart: le.Uint64(hdr[8:]), seq: le.Uint64(hdr[16:]), oldest: le.Uint64(hdr[24:]), time: int64(le.Uint64(hdr[32:])),
		block: le.Uint64(hdr[48:]), prev: digest(hdr[64:96]), hash: digest(hdr[96:128]),
	}
	n := le.Uint32(hdr[40:])
	if n > MaxPayload || e.block != block || e.seq == 0 || e.seq > 1<<62 || e.oldest == 0 || e.oldest > e.seq ||
		le.Uint32(hdr[44:]) != 0 || le.Uint64(hdr[56:]) != 0 || blocksFor(int(n)) > blocks-block {
		return nil, io.EOF
	}
	e.payload = make([]byte, n)
	if err := readFull(r, e.payload, int64(block*blockSize+headerSize)); err != nil {
		return nil, err
	}
	h := sha256.New()
	h.Write(hdr[:hashedSize])
	h.Write(e.payload)
	if digest(h.Sum(nil)) != e.hash {
		return nil, io.EOF
	}
	return e, nil
}

func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes of the journal at %#x: %w", len(b), off, err)
}

type payload struct {
	Kind string          `json:"kind"`
	Data json.RawMessage `json:"data,omitempty"`
}

// record returns the entry as callers see it.
func (e *entry) record() (Record, error) {
	r := Record{Restart: e.restart, Seq: e.seq, Time: time.Unix(0, e.time).UTC()}
	var p payload
	if err := json.Unmarshal(e.payload, &p); err != nil {
		return r, fmt.Errorf("journal record %d: %w", e.seq, err)
	}
	r.Kind, r.Data = p.Kind, p.Data
	return r, nil
}
