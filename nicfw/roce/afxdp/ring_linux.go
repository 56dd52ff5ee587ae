package afxdp

import (
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file is all of the package's shared memory: the user memory (UMEM) and the four rings of an AF_XDP socket
// (Documentation/networking/af_xdp.rst; struct xsk_queue in net/xdp/xsk_queue.h). A ring has one producer and one
// consumer, who own one counter each; sync/atomic orders the counters and what they announce.

// ring is one of the four rings. T is its entry: an address for fill and completion, a descriptor for rx and tx.
type ring[T any] struct {
	producer, consumer *uint32
	flags              *uint32 // needWakeup
	desc               []T
	mem                []byte
	own                uint32 // our counter: of what was produced or consumed
}

// needWakeup is XDP_RING_NEED_WAKEUP: the kernel looks at the ring when it is called, not by itself.
const needWakeup = 1

// mapRing maps a ring of n entries, a power of two.
func mapRing[T any](fd int, pgoff int64, n uint32, o unix.XDPRingOffset) (*ring[T], error) {
	var entry T
	size := int(o.Desc) + int(n)*int(unsafe.Sizeof(entry))
	mem, err := unix.Mmap(fd, pgoff, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map ring: %w", err)
	}
	at := func(off uint64) *uint32 { return (*uint32)(unsafe.Pointer(&mem[off])) }
	return &ring[T]{
		producer: at(o.Producer), consumer: at(o.Consumer), flags: at(o.Flags), mem: mem,
		desc: unsafe.Slice((*T)(unsafe.Pointer(&mem[o.Desc])), n),
	}, nil
}

// entry returns the i-th entry from ours on.
func (r *ring[T]) entry(i uint32) *T { return &r.desc[(r.own+i)&uint32(len(r.desc)-1)] }

// room returns how many entries can be produced. Precondition: we are the producer.
func (r *ring[T]) room() uint32 {
	used := r.own - atomic.LoadUint32(r.consumer)
	return uint32(len(r.desc)) - min(used, uint32(len(r.desc)))
}

// ready returns how many entries can be consumed. Precondition: we are the consumer.
func (r *ring[T]) ready() uint32 {
	return min(atomic.LoadUint32(r.producer)-r.own, uint32(len(r.desc)))
}

// produce hands over the next n entries.
func (r *ring[T]) produce(n uint32) {
	r.own += n
	atomic.StoreUint32(r.producer, r.own)
}

// consume gives back the next n entries.
func (r *ring[T]) consume(n uint32) {
	r.own += n
	atomic.StoreUint32(r.consumer, r.own)
}

// wantsWakeup reports whether the kernel must be told of what was produced.
func (r *ring[T]) wantsWakeup() bool { return atomic.LoadUint32(r.flags)&needWakeup != 0 }

func (r *ring[T]) unmap() {
	if r != nil {
		unix.Munmap(r.mem)
	}
}

// socket is an AF_XDP socket with its memory and rings.
type socket struct {
	fd    int
	umem  []byte
	fill  *ring[uint64]
	compl *ring[uint64]
	rx    *ring[unix.XDPDesc]
	tx    *ring[unix.XDPDesc]
}

const (
	chunkSize = 4096 // of UMEM; the kernel takes no larger ones without huge pages
	headroom  = 256  // XDP_PACKET_HEADROOM, which the kernel keeps free before a received packet
	frames    = 4096 // chunks for each direction
	useSG     = 1 << 4
	pktContd  = 1 // XDP_PKT_CONTD: the packet goes on in the next descriptor
)

// open makes a socket on one queue of an interface.
func open(ifindex, queue int, flags uint16) (_ *socket, err error) {
	s := &socket{fd: -1}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.fd, err = unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open AF_XDP socket: %w", err)
	}
	if s.umem, err = unix.Mmap(-1, 0, 2*frames*chunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE); err != nil {
		return nil, fmt.Errorf("allocate packet memory: %w", err)
	}
	reg := struct { // struct xdp_umem_reg up to Linux 6.8, which later kernels take, too
		addr, size          uint64
		chunk, room, flags_ uint32
		_                   uint32
	}{uint64(uintptr(unsafe.Pointer(&s.umem[0]))), uint64(len(s.umem)), chunkSize, 0, 0, 0}
	if err = s.set(unix.XDP_UMEM_REG, unsafe.Pointer(&reg), unsafe.Sizeof(reg)); err != nil {
		return nil, fmt.Errorf("register packet memory: %w", err)
	}
	n := uint32(frames)
	for _, opt := range []int{unix.XDP_UMEM_FILL_RING, unix.XDP_UMEM_COMPLETION_RING, unix.XDP_RX_RING, unix.XDP_TX_RING} {
		if err = s.set(opt, unsafe.Pointer(&n), unsafe.Sizeof(n)); err != nil {
			return nil, fmt.Errorf("make ring: %w", err)
		}
	}
	var off unix.XDPMmapOffsets
	if err = s.get(unix.XDP_MMAP_OFFSETS, unsafe.Pointer(&off), unsafe.Sizeof(off)); err != nil {
		return nil, fmt.Errorf("ask for the rings' layout: %w", err)
	}
	if s.fill, err = mapRing[uint64](s.fd, unix.XDP_UMEM_PGOFF_FILL_RING, n, off.Fr); err != nil {
		return nil, err
	}
	if s.compl, err = mapRing[uint64](s.fd, unix.XDP_UMEM_PGOFF_COMPLETION_RING, n, off.Cr); err != nil {
		return nil, err
	}
	if s.rx, err = mapRing[unix.XDPDesc](s.fd, unix.XDP_PGOFF_RX_RING, n, off.Rx); err != nil {
		return nil, err
	}
	if s.tx, err = mapRing[unix.XDPDesc](s.fd, unix.XDP_PGOFF_TX_RING, n, off.Tx); err != nil {
		return nil, err
	}
	for i := range n { // the first half of the memory is for receiving
		*s.fill.entry(i) = uint64(i) * chunkSize
	}
	s.fill.produce(n)
	if err = s.bind(ifindex, queue, flags); err != nil {
		return nil, fmt.Errorf("bind to queue %d: %w", queue, err)
	}
	return s, nil
}

// bind ties the socket to a queue. One that was there before keeps the queue until the kernel has come to free it, which a work queue
// does some time after the socket was closed: an agent that starts again meets that.
func (s *socket) bind(ifindex, queue int, flags uint16) error {
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Bind(s.fd, &unix.SockaddrXDP{Flags: flags, Ifindex: uint32(ifindex), QueueID: uint32(queue)})
		if err != unix.EBUSY || time.Now().After(end) {
			return err
		}
	}
}

func (s *socket) set(opt int, p unsafe.Pointer, n uintptr) error {
	if _, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(s.fd), unix.SOL_XDP, uintptr(opt), uintptr(p), n, 0); errno != 0 {
		return errno
	}
	return nil
}

func (s *socket) get(opt int, p unsafe.Pointer, n uintptr) error {
	size := uint32(n)
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), unix.SOL_XDP, uintptr(opt), uintptr(p), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return errno
	}
	return nil
}

// chunk returns the bytes that a descriptor names, or nil if they are not in the memory: the kernel's word is taken, but
// not at the price of a crash.
func (s *socket) chunk(d *unix.XDPDesc) []byte {
	if d.Addr > uint64(len(s.umem)) || uint64(d.Len) > uint64(len(s.umem))-d.Addr {
		return nil
	}
	return s.umem[d.Addr:][:d.Len:d.Len]
}

func (s *socket) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
	s.fill.unmap()
	s.compl.unmap()
	s.rx.unmap()
	s.tx.unmap()
	if s.umem != nil {
		unix.Munmap(s.umem)
	}
}

// dropped returns how many packets the kernel dropped because there was no room for them.
func (s *socket) dropped() uint64 {
	var st unix.XDPStatistics
	if s.get(unix.XDP_STATISTICS, unsafe.Pointer(&st), unsafe.Sizeof(st)) != nil {
		return 0
	}
	return st.Rx_dropped + st.Rx_ring_full
}
