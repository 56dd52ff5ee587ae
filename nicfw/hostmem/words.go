package hostmem

import (
	"encoding/binary"
	"runtime/debug"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// words is mapped host memory. It is the only code that touches such memory, and the only code of the package that needs
// unsafe.
//
// Device memory takes one aligned load or store at a time: copy(), memclr and unaligned loads fault on an arm64 window
// (Device-nGnRE), although an emulator lets them pass. So the mapping is seen through slices of 8-, 4-, 2- and 1-byte
// elements: every access is an index into one of them and thereby aligned. A load is always a whole 8-byte word; a store
// is the widest element that both its address and its length allow, and never reads and rewrites bytes that it was not
// given. On a 32-bit agent the compiler makes two 4-byte accesses of an 8-byte one.
type words struct {
	q []uint64
	l []uint32
	h []uint16
	b []byte
}

// newWords views a mapping, whose start is page-aligned. Memory behind its last whole word belongs to the same page.
func newWords(m []byte) words {
	p := unsafe.Pointer(unsafe.SliceData(m))
	n := (len(m) + 7) / 8
	return words{
		q: unsafe.Slice((*uint64)(p), n),
		l: unsafe.Slice((*uint32)(p), n*2),
		h: unsafe.Slice((*uint16)(p), n*4),
		b: unsafe.Slice((*byte)(p), n*8),
	}
}

// load fills dst from offset off, one aligned 8-byte load per word.
func (w words) load(dst []byte, off int) {
	i := off / 8
	if r := off % 8; r != 0 && len(dst) > 0 {
		var b [8]byte
		binary.NativeEndian.PutUint64(b[:], w.q[i])
		dst = dst[copy(dst, b[r:]):]
		i++
	}
	n := len(dst) / 8
	from := w.q[i : i+n]
	for len(from) >= 8 { // spares seven of eight checks of bounds
		q, d := (*[8]uint64)(from), (*[64]byte)(dst)
		binary.NativeEndian.PutUint64(d[0:], q[0])
		binary.NativeEndian.PutUint64(d[8:], q[1])
		binary.NativeEndian.PutUint64(d[16:], q[2])
		binary.NativeEndian.PutUint64(d[24:], q[3])
		binary.NativeEndian.PutUint64(d[32:], q[4])
		binary.NativeEndian.PutUint64(d[40:], q[5])
		binary.NativeEndian.PutUint64(d[48:], q[6])
		binary.NativeEndian.PutUint64(d[56:], q[7])
		from, dst = from[8:], dst[64:]
	}
	for _, v := range from {
		binary.NativeEndian.PutUint64(dst, v)
		dst = dst[8:]
	}
	if len(dst) > 0 {
		var b [8]byte
		binary.NativeEndian.PutUint64(b[:], w.q[i+n])
		copy(dst, b[:])
	}
}

// storeSize returns the width of the first store of a write of n bytes at off: the widest of 8, 4, 2 and 1 that is aligned
// and not longer than the write.
func storeSize(off, n int) int {
	for size := 8; size > 1; size /= 2 {
		if off%size == 0 && n >= size {
			return size
		}
	}
	return 1
}

// store puts src at offset off by aligned stores in address order.
func (w words) store(src []byte, off int) {
	for len(src) > 0 {
		size := storeSize(off, len(src))
		switch size {
		case 8:
			w.q[off/8] = binary.NativeEndian.Uint64(src)
		case 4:
			w.l[off/4] = binary.NativeEndian.Uint32(src)
		case 2:
			w.h[off/2] = binary.NativeEndian.Uint16(src)
		default:
			w.b[off] = src[0]
		}
		src, off = src[size:], off+size
	}
}

// swap compares and swaps the little-endian word at off, a multiple of 8, and returns the value found.
func (w words) swap(off int, old, new uint64) uint64 {
	p := &w.q[off/8]
	o, n := swapLE(old), swapLE(new)
	for {
		if atomic.CompareAndSwapUint64(p, o, n) {
			return old
		}
		// Go does not tell the value that the instruction found. A load after it may see old again: then try again.
		if v := atomic.LoadUint64(p); v != o {
			return swapLE(v)
		}
	}
}

// sleepIf has the kernel compare the little-endian word at off, a multiple of 4, with v, and sleep for d if they are equal: that is what a wait for
// a futex begins with (futex(2), FUTEX_WAIT). A private one is found by its address alone, so that any mapping will do. The errors are ETIMEDOUT
// after the sleep, EINTR within it, EAGAIN if the word is another, and EFAULT where a load would have raised a signal.
func (w words) sleepIf(off int, v uint32, d time.Duration) error {
	const waitPrivate = 0 | 128 // FUTEX_WAIT | FUTEX_PRIVATE_FLAG (include/uapi/linux/futex.h)
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	left := unix.NsecToTimespec(int64(d))
	_, _, errno := unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&w.l[off/4])), waitPrivate,
		uintptr(binary.NativeEndian.Uint32(b[:])), uintptr(unsafe.Pointer(&left)), 0, 0)
	if errno == 0 {
		return nil // woken: whoever else waits for a futex there
	}
	return errno
}

// swapLE converts between the agent's byte order and the host's, which is little-endian.
func swapLE(v uint64) uint64 {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], v)
	return binary.LittleEndian.Uint64(b[:])
}

// fence makes the stores before it leave the processor before the loads after it. The locked instruction drains the
// write-combining buffers of an x86 agent (Intel SDM vol. 3, 12.3.1 "Buffering of Write Combining Memory Locations").
func fence() {
	var x uint32
	atomic.AddUint32(&x, 1)
}

// trap runs access and reports whether it was stopped by a fault of the memory itself (SIGBUS: the file shrank, the device
// vanished), with the offset of the faulting byte.
func (w words) trap(access func()) (off int, faulted bool) {
	old := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(old)
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		base, size := uintptr(unsafe.Pointer(unsafe.SliceData(w.b))), uintptr(len(w.b))
		f, ok := r.(interface{ Addr() uintptr })
		if !ok || f.Addr()-base >= size {
			panic(r) // not about this memory: a bug
		}
		off, faulted = int(f.Addr()-base), true
	}()
	access()
	return 0, false
}
