package afxdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// Mode is how the program is attached to the interface.
type Mode uint8

const (
	Auto    Mode = iota // Native where the driver can, else Generic
	Native              // in the driver
	Generic             // in the network stack, behind the driver: any interface
)

// String returns the mode's name.
func (m Mode) String() string { return [...]string{"auto", "native", "generic"}[min(m, Generic)] }

// Config describes a link. Zero fields take the defaults.
type Config struct {
	Addr    netip.AddrPort // a definite address of this machine; the port that packets leave from, 0 is 4791
	Queue   int            // of the interface that has the address
	PathMTU int            // 256 to 4096; default: what fits into the MTU of the interface
	Mode    Mode
	Spin    time.Duration // how long Recv looks for packets before it sleeps
}

// Link is a roce.Link over AF_XDP.
type Link struct {
	local netip.AddrPort
	mtu   int
	mode  Mode
	spin  time.Duration
	mac   [6]byte

	sock      *socket
	detach    func()
	neighbors *neighbors
	wakeFD    int
	woken     atomic.Bool
	sleeping  atomic.Bool
	closed    atomic.Bool
	counters  struct{ received, sent, badICRC, badLength, sendErrors atomic.Uint64 }

	recvMu  sync.Mutex
	rxCRC   roce.ICRC // guarded by recvMu
	held    []uint64  // chunks whose bytes the caller has; guarded by recvMu
	joined  []byte    // packets that came in several chunks; guarded by recvMu
	partial []byte    // one of them that has not come whole; guarded by recvMu
	skip    bool      // the rest of a packet that is too long; guarded by recvMu

	sendMu  sync.Mutex
	txCRC   roce.ICRC // guarded by sendMu
	free    []uint64  // chunks; guarded by sendMu
	payload []byte    // guarded by sendMu

	fdMu sync.RWMutex // keeps what Close closes from being used
}

const icrcLen = 4

// maxDatagram is the longest UDP payload that is sent or taken: a full packet with the longest header.
const maxDatagram = roce.MaxPathMTU + 40 + icrcLen

// maxFrame is the longest frame around one.
const maxFrame = ipv6UDPOff + udpLen + maxDatagram

// Listen opens a link.
func Listen(cfg Config) (*Link, error) {
	l, err := listen(cfg)
	if err != nil {
		return nil, fmt.Errorf("open AF_XDP link at %v: %w", cfg.Addr, err)
	}
	return l, nil
}

func listen(cfg Config) (_ *Link, err error) {
	addr := cfg.Addr.Addr()
	if !addr.IsValid() || addr.IsUnspecified() || addr.Is4In6() {
		return nil, errors.New("the ICRC needs one definite address")
	}
	ifi, err := roce.InterfaceOf(addr)
	if err != nil {
		return nil, err
	}
	if len(ifi.HardwareAddr) != 6 {
		return nil, fmt.Errorf("%s is no Ethernet interface", ifi.Name)
	}
	port := cfg.Addr.Port()
	if port == 0 {
		port = roce.Port
	}
	l := &Link{
		local: netip.AddrPortFrom(addr.WithZone(""), port), mtu: cfg.PathMTU, spin: cfg.Spin, mac: [6]byte(ifi.HardwareAddr),
		wakeFD: -1, payload: make([]byte, maxDatagram),
	}
	if l.mtu == 0 {
		l.mtu = roce.PathMTUFor(ifi.MTU, addr.Is6())
	}
	if !knownMTU(l.mtu) {
		return nil, fmt.Errorf("no path MTU fits into the %d bytes of %s", ifi.MTU, ifi.Name)
	}
	defer func() {
		if err != nil {
			l.release()
		}
	}()
	if err := rlimit.RemoveMemlock(); err != nil { // before Linux 5.11, BPF memory counts
		return nil, fmt.Errorf("lift the limit of locked memory: %w", err)
	}
	if l.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, err
	}
	if l.neighbors, err = newNeighbors(addr, ifi.Index); err != nil {
		return nil, err
	}
	flags := uint16(unix.XDP_USE_NEED_WAKEUP)
	if l.several(l.mtu + 40 + icrcLen) {
		flags |= useSG
	}
	if l.detach, l.mode, err = l.attach(ifi.Index, cfg, flags); err != nil {
		return nil, err
	}
	for i := range uint64(frames) { // the second half of the memory is for sending
		l.free = append(l.free, (frames+i)*chunkSize)
	}
	l.held = make([]uint64, 0, frames)
	l.joined = make([]byte, 0, 64*maxFrame)
	return l, nil
}

// several reports whether a packet of n bytes from the BTH on may take more than one chunk.
func (l *Link) several(n int) bool { return headroom+l.headerLen()+n > chunkSize }

// headerLen returns the bytes before the BTH.
func (l *Link) headerLen() int {
	if l.local.Addr().Is4() {
		return ipv4UDPOff + udpLen
	}
	return ipv6UDPOff + udpLen
}

func knownMTU(mtu int) bool {
	for _, m := range roce.PathMTUs() {
		if m == mtu {
			return true
		}
	}
	return false
}

// attach puts program and socket in place in the first mode that works.
func (l *Link) attach(ifindex int, cfg Config, flags uint16) (detach func(), mode Mode, err error) {
	modes := []Mode{Native, Generic}
	if cfg.Mode != Auto {
		modes = []Mode{cfg.Mode}
	}
	var errs []error
	for _, m := range modes {
		// A driver may need the promise that the program knows of fragments even where no packet has any, and a kernel may
		// not know that promise.
		for _, frags := range []bool{true, false} {
			if !frags && flags&useSG != 0 {
				continue
			}
			detach, err := l.attachAs(ifindex, cfg.Queue, m, frags, flags)
			if err == nil {
				return detach, m, nil
			}
			errs = append(errs, fmt.Errorf("%v mode: %w", m, err))
		}
	}
	return nil, 0, errors.Join(errs...)
}

func (l *Link) attachAs(ifindex, queue int, m Mode, frags bool, flags uint16) (_ func(), err error) {
	var undo []func()
	done := func() {
		for i := len(undo) - 1; i >= 0; i-- {
			undo[i]()
		}
	}
	defer func() {
		if err != nil {
			done()
		}
	}()
	sockets, err := ebpf.NewMap(&ebpf.MapSpec{Name: "roce_sockets", Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: uint32(queue) + 1})
	if err != nil {
		return nil, fmt.Errorf("make map: %w", err)
	}
	undo = append(undo, func() { sockets.Close() })
	prog, err := program(l.local.Addr(), sockets, frags)
	if err != nil {
		return nil, fmt.Errorf("load program: %w", err)
	}
	undo = append(undo, func() { prog.Close() })
	how := link.XDPGenericMode
	if m == Native {
		how = link.XDPDriverMode
	}
	at, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: ifindex, Flags: how})
	if err != nil {
		return nil, fmt.Errorf("attach program: %w", err)
	}
	undo = append(undo, func() { at.Close() })
	s, err := open(ifindex, queue, flags)
	if err != nil {
		return nil, err
	}
	undo = append(undo, s.close)
	if err := sockets.Put(uint32(queue), uint32(s.fd)); err != nil {
		return nil, fmt.Errorf("put socket into map: %w", err)
	}
	l.sock = s
	return done, nil
}

// LocalAddr returns the address that packets leave from.
func (l *Link) LocalAddr() netip.AddrPort { return l.local }

// PathMTU returns the largest payload.
func (l *Link) PathMTU() int { return l.mtu }

// Mode returns how the program is attached: Native or Generic.
func (l *Link) Mode() Mode { return l.mode }

// Counters returns what was carried and dropped.
func (l *Link) Counters() roce.LinkCounters {
	c := &l.counters
	out := roce.LinkCounters{
		Received: c.received.Load(), Sent: c.sent.Load(), BadICRC: c.badICRC.Load(), BadLength: c.badLength.Load(), SendErrors: c.sendErrors.Load(),
	}
	l.fdMu.RLock()
	defer l.fdMu.RUnlock()
	if !l.closed.Load() {
		out.Overflow = l.sock.dropped()
	}
	return out
}

// Wake makes a Recv that waits, or else the next one, return.
func (l *Link) Wake() {
	l.woken.Store(true)
	if !l.sleeping.Load() {
		return
	}
	l.fdMu.RLock()
	defer l.fdMu.RUnlock()
	if !l.closed.Load() {
		l.signal()
	}
}

func (l *Link) signal() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	unix.Write(l.wakeFD, one[:])
}

// Close detaches the program.
func (l *Link) Close() error {
	if l.closed.Swap(true) {
		return nil
	}
	l.signal()
	l.recvMu.Lock()
	defer l.recvMu.Unlock()
	l.sendMu.Lock()
	defer l.sendMu.Unlock()
	l.fdMu.Lock()
	defer l.fdMu.Unlock()
	l.release()
	return nil
}

// release gives everything back.
func (l *Link) release() {
	if l.detach != nil {
		l.detach()
	}
	if l.neighbors != nil {
		l.neighbors.close()
	}
	if l.wakeFD >= 0 {
		unix.Close(l.wakeFD)
	}
}

// Recv implements roce.Link.
func (l *Link) Recv(packets []roce.Packet, wait time.Duration) (int, error) {
	l.recvMu.Lock()
	defer l.recvMu.Unlock()
	if l.closed.Load() {
		return 0, net.ErrClosed
	}
	l.giveBack()
	var start time.Time
	for {
		if n, any := l.take(packets); any || wait == 0 {
			return n, nil
		}
		if l.closed.Load() {
			return 0, net.ErrClosed
		}
		if l.woken.Swap(false) {
			return 0, nil
		}
		left := wait
		if !start.IsZero() {
			passed := time.Since(start)
			if left = wait - passed; wait > 0 && left <= 0 {
				return 0, nil
			}
			if passed < l.spin {
				if l.sock.fill.wantsWakeup() {
					l.poll(0)
				}
				unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // whom we wait for may need this very CPU
				continue
			}
		} else if wait > 0 || l.spin > 0 {
			start = time.Now()
			if l.spin > 0 {
				continue
			}
		}
		if wait < 0 {
			left = -1
		}
		if err := l.sleep(left); err != nil {
			return 0, err
		}
	}
}

// sleep waits until there may be packets, for at most left, without end if that is negative, or until Wake.
func (l *Link) sleep(left time.Duration) error {
	l.sleeping.Store(true)
	defer l.sleeping.Store(false)
	if l.woken.Load() || l.closed.Load() || l.sock.rx.ready() > 0 {
		return nil
	}
	if err := l.poll(left); err != nil {
		return fmt.Errorf("wait for packets: %w", err)
	}
	return nil
}

func (l *Link) poll(left time.Duration) error {
	fds := [2]unix.PollFd{{Fd: int32(l.sock.fd), Events: unix.POLLIN}, {Fd: int32(l.wakeFD), Events: unix.POLLIN}}
	var until *unix.Timespec
	if left >= 0 {
		ts := unix.NsecToTimespec(int64(left))
		until = &ts
	}
	n, err := unix.Ppoll(fds[:], until, nil)
	if err != nil && err != unix.EINTR {
		return err
	}
	if n > 0 && fds[1].Revents != 0 {
		var b [8]byte
		unix.Read(l.wakeFD, b[:])
	}
	return nil
}

// giveBack returns to the kernel the chunks of the packets that the caller had.
func (l *Link) giveBack() {
	f := l.sock.fill
	n := min(uint32(len(l.held)), f.room())
	for i := range n {
		*f.entry(i) = l.held[i]
	}
	f.produce(n)
	l.held = l.held[:copy(l.held, l.held[n:])]
	if l.joined = l.joined[:0]; l.partial != nil {
		l.partial = append(l.joined, l.partial...)
	}
}

// take moves received packets with a right ICRC into packets. It reports whether anything came at all.
func (l *Link) take(packets []roce.Packet) (n int, any bool) {
	rx := l.sock.rx
	ready := rx.ready()
	i := uint32(0)
	for ; i < ready && n < len(packets) && cap(l.joined)-len(l.joined) >= maxFrame; i++ {
		d := rx.entry(i)
		l.held = append(l.held, d.Addr&^(chunkSize-1))
		frame := l.sock.chunk(d)
		if d.Options&pktContd != 0 || l.partial != nil || l.skip {
			if frame = l.join(frame, d.Options&pktContd != 0); frame == nil {
				continue
			}
		}
		p, err := l.parse(frame)
		switch err {
		case nil:
			packets[n] = p
			n++
		case errICRC:
			l.counters.badICRC.Add(1)
		default:
			l.counters.badLength.Add(1)
		}
	}
	rx.consume(i)
	l.counters.received.Add(uint64(n))
	return n, i > 0
}

// join collects a packet that comes in several chunks, and returns it when it is whole.
func (l *Link) join(part []byte, more bool) []byte {
	if l.partial == nil && !l.skip {
		l.partial = l.joined[len(l.joined):]
	}
	if !l.skip && len(l.partial)+len(part) > maxFrame {
		l.partial, l.skip = nil, true
		l.counters.badLength.Add(1)
	}
	if l.skip {
		l.skip = more
		return nil
	}
	l.partial = append(l.partial, part...)
	if more {
		return nil
	}
	whole := l.partial
	l.partial = nil
	l.joined = l.joined[:len(l.joined)+len(whole)]
	return whole
}

var (
	errFrame = errors.New("not a RoCEv2 frame")
	errICRC  = errors.New("wrong ICRC")
)

// parse returns the packet in a frame.
func (l *Link) parse(b []byte) (roce.Packet, error) {
	f, err := roce.ParseFrame(b)
	if err != nil || !f.IsRoCE || f.Fragment || f.Dst().Addr() != l.local.Addr() {
		return roce.Packet{}, errFrame
	}
	n := len(f.Data) - icrcLen
	if n < 12 || n+icrcLen > maxDatagram {
		return roce.Packet{}, errFrame
	}
	dst := netip.AddrPortFrom(l.local.Addr(), f.UDP.DstPort)
	if l.rxCRC.Sum(f.Src(), dst, f.V4.ID, f.V4.Flags, f.Data[:n]) != binary.LittleEndian.Uint32(f.Data[n:]) {
		return roce.Packet{}, errICRC
	}
	l.neighbors.learn(f.Src().Addr(), [6]byte(b[6:12]))
	return roce.Packet{Peer: f.Src(), Data: f.Data[:n:n]}, nil
}

// Send implements roce.Link.
func (l *Link) Send(packets []roce.Packet) error {
	l.sendMu.Lock()
	defer l.sendMu.Unlock()
	if l.closed.Load() {
		return net.ErrClosed
	}
	n := uint32(0) // descriptors
	for i := range packets {
		p := &packets[i]
		mac, ok := l.neighbors.lookup(p.Peer.Addr())
		if !ok { // lost, as the first packet to an unknown neighbour may be: it is asked for now
			l.counters.sendErrors.Add(1)
			continue
		}
		size := l.headerLen() + len(p.Data) + icrcLen
		chunks := (size + chunkSize - 1) / chunkSize
		for len(l.free) < chunks || l.sock.tx.room() < n+uint32(chunks) {
			l.sock.tx.produce(n)
			n = 0
			if err := l.kick(true); err != nil {
				return err
			}
		}
		n = l.frame(p, mac, size, n)
		l.counters.sent.Add(1)
	}
	l.sock.tx.produce(n)
	return l.kick(false)
}

// frame writes a packet with its headers and ICRC into chunks, from the n-th descriptor on, and returns the next.
func (l *Link) frame(p *roce.Packet, mac [6]byte, size int, n uint32) uint32 {
	hdr := l.headerLen()
	first := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	b := l.sock.umem[first:][:chunkSize]
	copy(b, mac[:])
	copy(b[6:], l.mac[:])
	udp := uint16(size - hdr + udpLen)
	if l.local.Addr().Is4() {
		binary.BigEndian.PutUint16(b[etherTypeOff:], etherIPv4)
		roce.IPv4(b[ipOff:]).Encode(&roce.IPv4Fields{Length: 20 + udp, Flags: roce.DontFragment, TTL: hopLimit, Src: l.local.Addr(), Dst: p.Peer.Addr()})
	} else {
		binary.BigEndian.PutUint16(b[etherTypeOff:], etherIPv6)
		roce.IPv6(b[ipOff:]).Encode(&roce.IPv6Fields{Length: udp, HopLimit: hopLimit, Src: l.local.Addr(), Dst: p.Peer.Addr()})
	}
	roce.UDP(b[hdr-udpLen:]).Encode(&roce.UDPFields{SrcPort: l.local.Port(), DstPort: p.Peer.Port(), Length: udp})
	icrc := l.txCRC.Sum(l.local, p.Peer, 0, roce.DontFragment, p.Data)
	d := l.sock.tx.entry(n)
	d.Addr, d.Len, d.Options = first, uint32(min(size, chunkSize)), 0
	if size <= chunkSize {
		binary.LittleEndian.PutUint32(b[hdr+copy(b[hdr:], p.Data):], icrc)
		return n + 1
	}
	body := binary.LittleEndian.AppendUint32(append(l.payload[:0], p.Data...), icrc)
	body = body[copy(b[hdr:], body):]
	d.Options = pktContd
	second := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	copy(l.sock.umem[second:][:chunkSize], body)
	d = l.sock.tx.entry(n + 1)
	d.Addr, d.Len, d.Options = second, uint32(len(body)), 0
	return n + 2
}

const hopLimit = 64

// kick has the kernel send what is in the ring and takes back the chunks of what was sent. If wait is set, it waits for at
// least one.
func (l *Link) kick(wait bool) error {
	tx := l.sock.tx
	for try := 0; ; try++ {
		before := len(l.free)
		l.reap()
		if wait && len(l.free) > before {
			return nil
		}
		if !wait && tx.room() == uint32(len(tx.desc)) {
			return nil
		}
		if tx.wantsWakeup() {
			_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(l.sock.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
			switch errno {
			case 0, unix.EAGAIN, unix.EBUSY, unix.ENOBUFS, unix.EINTR:
			case unix.ENETDOWN: // comes back, or not: the packets are lost
			case unix.EBADF:
				return net.ErrClosed
			default:
				l.counters.sendErrors.Add(1)
			}
		} else if !wait {
			return nil // the driver looks by itself
		}
		if l.closed.Load() {
			return net.ErrClosed
		}
		if try > 2*frames/txBudget { // more turns than a full ring takes: the interface does not keep up, or is down
			if !wait {
				return nil // the next Send goes on
			}
			fds := [1]unix.PollFd{{Fd: int32(l.sock.fd), Events: unix.POLLOUT}}
			unix.Poll(fds[:], 10)
			runtime.Gosched()
		}
	}
}

// txBudget is how many frames one call sends in copy mode (TX_BATCH_SIZE in net/xdp/xsk.c).
const txBudget = 32

// reap takes back the chunks of what was sent.
func (l *Link) reap() {
	c := l.sock.compl
	n := c.ready()
	for i := range n {
		l.free = append(l.free, *c.entry(i)&^(chunkSize-1))
	}
	c.consume(n)
}
