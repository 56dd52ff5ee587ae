// Package hostmem is a host's physical memory, as an outside machine reaches it.
//
// Everything above it works on the Memory interface alone, and so runs unchanged over a PCI window on a DPU,
// over a DMA engine, over the RAM file of a virtual machine, and over a crash dump on a laptop.
//
//	             stores              compare-and-swap
//	OpenPCI      if asked for        if asked for, and the BAR is shared memory (ivshmem)
//	OpenRAMFile  if asked for        if asked for
//	OpenImage    no                  no                   raw, ELF64 core, LiME version 1, recording
//	remote.Open  as its lease        as its lease         an agent's memory by RDMA (package remote)
//	NewEngine    as what it wraps    no                   bursts of 4 KiB, 20 to 200 µs each, which may fail
//	NewRecorder  no                  no                   notes each page read, for a .hostmem file
//	Narrow       as what it wraps    as what it wraps     within a smaller map
//	NewGuard     if its rule allows  as what it wraps     the only door for stores
//
// An offset is a host physical address. What is not RAM in the map faults, before it is put on any link: holes never read
// as zero and device registers are never touched. A read that stops short says at which address and why, by a *FaultError;
// its cause is ErrNotMapped, ErrLinkDown, ErrTimeout, ErrAborted, ErrReadOnly, ErrUnaligned, ErrNotRecorded, or what the
// system said. A write stores nothing unless all of it is RAM.
//
// What a memory can do beyond reading is asked with AsWriter and AsSwapper, because a type assertion does not know what a
// wrapper wraps or how a file was opened. ReadScatter, ResidentRanges and VMCOREINFO use an ability where there is one and
// have an answer where there is none; AsSleeper asks for the one that who looks often gains by.
//
// An agent's stores go through a Guard and nothing else:
//
//	win, err := hostmem.OpenPCI(hostmem.PCIOptions{Layout: hostmem.Q35Layout(ram), Write: true})
//	…                                                     // attach, and read the true RAM map from the host's kernel
//	mem := hostmem.NewGuard(hostmem.Narrow(win, trueMap), grant)
//
// Every backend and wrapper passes the one test in package hostmemtest. The agent's processor may be 64-bit or 32-bit (arm
// v7: no compare-and-swap through a window, and less than 2 GiB can be mapped). DESIGN.md says how device memory is
// accessed, what the engine models and how a .hostmem file is laid out.
package hostmem

import (
	"errors"
	"fmt"
	"io"
)

// PhysAddr is a host physical address in bytes.
type PhysAddr uint64

// String returns the address in hexadecimal with its 0x prefix.
func (a PhysAddr) String() string { return fmt.Sprintf("%#x", uint64(a)) }

// PageSize is the granule of transfers and of recordings. It is not the host's page size, which the kernel model knows.
const PageSize = 4096

// Range is Size bytes of host physical address space from Start on.
type Range struct {
	Start PhysAddr
	Size  uint64
}

// End returns the first address behind the range.
func (r Range) End() PhysAddr { return r.Start + PhysAddr(r.Size) }

// Contains reports whether n bytes at pa lie wholly inside the range, without overflow for any pa and n.
func (r Range) Contains(pa PhysAddr, n uint64) bool {
	return pa >= r.Start && n <= r.Size && uint64(pa-r.Start) <= r.Size-n
}

// Memory is readable host physical memory. The offset of ReadAt is a host physical address.
//
// Postconditions: ReadAt never returns io.EOF, for memory has no end of file; a short read always comes with a
// *FaultError that names the first address that could not be read. Holes fault, they never read as zero.
// All methods are safe for concurrent use.
type Memory interface {
	io.ReaderAt
	// Map returns the readable RAM, sorted and without overlap. The caller must not change it.
	Map() []Range
	// Close gives the path up. Accesses after it fail; closing again does nothing.
	io.Closer
}

// Writer is the ability to store. A store of 8 aligned bytes or fewer within an aligned 8-byte word is one access where
// the path allows it; anything longer may be seen by the host in pieces.
type Writer interface{ io.WriterAt }

// Swapper is the ability to compare and swap an aligned 8-byte little-endian word atomically against the host's CPUs.
// prev is the value found; the swap happened if and only if err is nil and prev == old.
type Swapper interface {
	CompareAndSwap(pa PhysAddr, old, new uint64) (prev uint64, err error)
}

// Segment is one piece of a scattered read; its outcome is its own.
type Segment struct {
	Addr PhysAddr
	Buf  []byte
	Err  error
}

// ScatterReader is the ability to read many pieces for about the latency of one.
// The error is non-nil if any segment failed; each failed segment has its own Err.
type ScatterReader interface{ ReadScatter(segs []Segment) error }

var (
	// ErrNotMapped means that the address is not RAM in the map of this memory.
	ErrNotMapped = errors.New("address is not in the RAM map")
	// ErrLinkDown means that the path to the host is lost: an engine that reads all-ones, a window that vanished.
	ErrLinkDown = errors.New("link to host memory is down")
	// ErrTimeout means that the path did not complete the access in time.
	ErrTimeout = errors.New("memory access timed out")
	// ErrReadOnly means that this memory or this holder may not store.
	ErrReadOnly = errors.New("memory is read-only")
)

// FaultError is a failed access. Addr is the first byte that could not be accessed and Len the bytes still to go from there.
type FaultError struct {
	Op   string // "read", "write" or "compare-and-swap"
	Addr PhysAddr
	Len  int
	Err  error // the cause; never nil
}

func (e *FaultError) Error() string {
	return fmt.Sprintf("%s %d bytes at %v: %v", e.Op, e.Len, e.Addr, e.Err)
}

// Unwrap returns the cause.
func (e *FaultError) Unwrap() error { return e.Err }
