package roce

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync/atomic"
	"unsafe"
)

// Buffer is memory of our own as a Region: a health page, a journal, a test's target. Aligned 8-byte words are loaded
// and stored whole, so that neither side ever sees half a counter. It is safe for concurrent use.
type Buffer struct {
	words []uint64 // by sync/atomic only; each holds eight bytes in little-endian order
}

// NewBuffer returns a buffer of size bytes, rounded up to a multiple of eight, all zero.
func NewBuffer(size int) *Buffer { return &Buffer{make([]uint64, (size+7)/8)} }

// Len returns the size in bytes.
func (b *Buffer) Len() int { return len(b.words) * 8 }

// Bytes returns the memory itself, for a device that is to reach it; its words have the machine's byte order, which is that
// of a Buffer on little-endian machines alone.
func (b *Buffer) Bytes() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(b.words))), b.Len())
}

// ReadAt copies out len(p) bytes.
func (b *Buffer) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > int64(b.Len()) {
		return 0, fmt.Errorf("read buffer of %d bytes at %d: %w", b.Len(), off, io.EOF)
	}
	n := min(len(p), b.Len()-int(off))
	rest := p[:n]
	w := b.words[off/8:]
	if skip := int(off % 8); skip != 0 && n > 0 {
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], atomic.LoadUint64(&w[0]))
		rest, w = rest[copy(rest, word[skip:]):], w[1:]
	}
	for len(rest) >= 8 {
		binary.LittleEndian.PutUint64(rest, atomic.LoadUint64(&w[0]))
		rest, w = rest[8:], w[1:]
	}
	if len(rest) > 0 {
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], atomic.LoadUint64(&w[0]))
		copy(rest, word[:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt copies in len(p) bytes. Words that p covers only in part are changed by compare-and-swap.
func (b *Buffer) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > int64(b.Len()) {
		return 0, fmt.Errorf("write buffer of %d bytes at %d: %w", b.Len(), off, io.ErrShortWrite)
	}
	n := min(len(p), b.Len()-int(off))
	rest := p[:n]
	w := b.words[off/8:]
	if skip := int(off % 8); skip != 0 && n > 0 {
		rest, w = rest[patch(&w[0], rest, skip):], w[1:]
	}
	for len(rest) >= 8 {
		atomic.StoreUint64(&w[0], binary.LittleEndian.Uint64(rest))
		rest, w = rest[8:], w[1:]
	}
	if len(rest) > 0 {
		patch(&w[0], rest, 0)
	}
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// patch replaces the bytes of a word from skip on by those of p and returns how many they were.
func patch(w *uint64, p []byte, skip int) int {
	for {
		old := atomic.LoadUint64(w)
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], old)
		n := copy(word[skip:], p)
		if atomic.CompareAndSwapUint64(w, old, binary.LittleEndian.Uint64(word[:])) {
			return n
		}
	}
}

// CompareAndSwap stores new in the word at off if it holds old, and returns what it held.
func (b *Buffer) CompareAndSwap(off int64, old, new uint64) (uint64, error) {
	if off < 0 || off%8 != 0 || off/8 >= int64(len(b.words)) {
		return 0, fmt.Errorf("swap in buffer of %d bytes at %d: %w", b.Len(), off, ErrAccess)
	}
	w := &b.words[off/8]
	for {
		if atomic.CompareAndSwapUint64(w, old, new) {
			return old, nil
		}
		if prev := atomic.LoadUint64(w); prev != old {
			return prev, nil
		}
	}
}
