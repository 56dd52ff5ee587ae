package roce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpLink is a Link over one UDP socket: packets are received many at a time by recvmmsg, coalesced ones where the
// kernel has UDP_GRO, and sent by sendmmsg with UDP_SEGMENT.
//
// The socket is never connected: Linux gives the packets of an unconnected socket with DF the IPv4 identification 0, and
// the k-th segment of a segmented one the identification k, while a connected one starts at a random number
// (__ip_select_ident and inet_gso_segment, seen on 6.1 to 6.18). The ICRC covers it.
type udpLink struct {
	fd    int
	local netip.AddrPort
	scope uint32
	mtu   int
	spin  time.Duration

	woken    atomic.Bool
	sleeping atomic.Bool
	closed   atomic.Bool
	counters struct{ received, sent, badICRC, badLength, sendErrors, segmented atomic.Uint64 }

	fdMu sync.RWMutex // keeps fd from being closed under Wake

	recvMu  sync.Mutex
	rx      checker       // guarded by recvMu
	rxMsgs  []mmsghdr     // guarded by recvMu
	rxNames []sockaddr    // guarded by recvMu
	rxIovs  []unix.Iovec  // guarded by recvMu
	rxCtl   []byte        // guarded by recvMu
	rxBuf   []byte        // guarded by recvMu
	rxHave  int           // messages received; guarded by recvMu
	rxNext  int           // the one to be taken apart next; guarded by recvMu
	rxOff   int           // and where in it; guarded by recvMu
	rxID    uint16        // the IPv4 identification expected there; guarded by recvMu
	idle    bool          // the last receive found less than it had room for; guarded by recvMu
	singles int           // receives in a row that found one message; guarded by recvMu
	starved int           // times still that busy polling yields at once; guarded by recvMu
	crowded int           // times still that there is no busy polling; guarded by recvMu
	timeout time.Duration // SO_RCVTIMEO; guarded by recvMu

	sendMu   sync.Mutex
	tx       checker       // guarded by sendMu
	txMsgs   []mmsghdr     // guarded by sendMu
	txNames  []sockaddr    // guarded by sendMu
	txIovs   []unix.Iovec  // guarded by sendMu
	txCtl    []byte        // guarded by sendMu
	txCount  [batch]int    // packets of each message; guarded by sendMu
	txSum    [batch]uint32 // dataSum of each packet; guarded by sendMu
	segments bool          // UDP_SEGMENT works, as far as is known; guarded by sendMu
}

// mmsghdr is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// sockaddr has room for struct sockaddr_in and struct sockaddr_in6.
type sockaddr = unix.RawSockaddrInet6

const (
	rxMessages   = 32
	rxBufferSize = 1 << 16 // a coalesced datagram
	rxRoom       = 64      // before a datagram, always zero: for openAt, and to the next line of the cache
	controlSize  = 64      // room for one control message, aligned
	maxSegments  = 64      // UDP_MAX_SEGMENTS of kernels before 6.7
	maxSegmented = 65000   // bytes of a datagram that is to be segmented
)

// UDPConfig describes a link over UDP. Zero fields take the defaults.
type UDPConfig struct {
	Addr       netip.AddrPort // a definite address of this machine; port 0 is 4791, where peers send to
	PathMTU    int            // 256 to 4096; default: what fits into the MTU of the address's interface
	Spin       time.Duration  // how long Recv looks for packets before it sleeps, unless others want the CPU: latency for CPU time
	RecvBuffer int            // bytes; default 8 MiB; less if the system's limit is lower and we may not exceed it
	SendBuffer int            // bytes; default 1 MiB; the smaller, the earlier Send waits for a slow wire
	NoOffload  bool           // do without UDP_SEGMENT and UDP_GRO
	// OwnInterface takes and sends packets by the interface that has the address, and no other. Linux by itself takes a packet
	// for any address of the machine from any interface: without this, what should come through a tunnel could come past it.
	OwnInterface bool
}

// ListenUDP opens a link on a UDP socket.
func ListenUDP(cfg UDPConfig) (Link, error) {
	l, err := listenUDP(cfg)
	if err != nil {
		return nil, fmt.Errorf("listen on UDP %v: %w", cfg.Addr, err)
	}
	return l, nil
}

func listenUDP(cfg UDPConfig) (_ *udpLink, err error) {
	addr := cfg.Addr.Addr()
	if !addr.IsValid() || addr.IsUnspecified() || addr.Is4In6() {
		return nil, errors.New("the ICRC needs one definite address")
	}
	port := cfg.Addr.Port()
	if port == 0 {
		port = Port
	}
	ifi, err := InterfaceOf(addr)
	if err != nil {
		return nil, err
	}
	l := &udpLink{fd: -1, local: netip.AddrPortFrom(addr.WithZone(""), port), mtu: cfg.PathMTU, spin: cfg.Spin}
	if l.mtu == 0 {
		l.mtu = PathMTUFor(ifi.MTU, addr.Is6())
	}
	if mtuCode(l.mtu) == 0 {
		return nil, fmt.Errorf("no path MTU fits into the %d bytes of %s", ifi.MTU, ifi.Name)
	}
	if addr.IsLinkLocalUnicast() && addr.Is6() {
		l.scope = uint32(ifi.Index)
	}
	defer func() {
		if err != nil && l.fd >= 0 {
			unix.Close(l.fd)
		}
	}()
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	if l.fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	if addr.Is4() {
		err = unix.SetsockoptInt(l.fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	} else {
		// RoCEv2 senders leave the UDP checksum at 0, which IPv6 drops silently unless told not to.
		err = errors.Join(
			unix.SetsockoptInt(l.fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO),
			unix.SetsockoptInt(l.fd, unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX, 1))
	}
	if err != nil {
		return nil, err
	}
	buffer := func(size, def, force, plain int) {
		if size == 0 {
			size = def
		}
		if unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, force, size) != nil {
			unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, plain, size) // as much as the system's limit allows
		}
	}
	buffer(cfg.RecvBuffer, 8<<20, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF)
	buffer(cfg.SendBuffer, 1<<20, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
	if cfg.OwnInterface {
		if err := unix.BindToDevice(l.fd, ifi.Name); err != nil {
			return nil, fmt.Errorf("keep to %s: %w", ifi.Name, err)
		}
	}
	gro := false
	if !cfg.NoOffload {
		_, err := unix.GetsockoptInt(l.fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		l.segments = err == nil
		gro = unix.SetsockoptInt(l.fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	}
	if err := unix.Bind(l.fd, l.sockaddr()); err != nil {
		return nil, err
	}
	l.initRecv(gro)
	l.initSend()
	return l, nil
}

// sockaddr returns the local address for a system call.
func (l *udpLink) sockaddr() unix.Sockaddr {
	if l.local.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(l.local.Port()), Addr: l.local.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(l.local.Port()), Addr: l.local.Addr().As16(), ZoneId: l.scope}
}

func (l *udpLink) initRecv(gro bool) {
	n, size := rxMessages, rxBufferSize
	if !gro {
		n, size = batch, maxDatagram+1 // one more, so that longer ones show
	}
	l.rxMsgs, l.rxNames, l.rxIovs = make([]mmsghdr, n), make([]sockaddr, n), make([]unix.Iovec, n)
	l.rxCtl, l.rxBuf = make([]byte, n*controlSize), make([]byte, n*(rxRoom+size))
	for i := range l.rxMsgs {
		h := &l.rxMsgs[i].hdr
		l.rxIovs[i].Base = &l.rxBuf[i*(rxRoom+size)+rxRoom]
		l.rxIovs[i].SetLen(size)
		h.Name, h.Iov = (*byte)(unsafe.Pointer(&l.rxNames[i])), &l.rxIovs[i]
		h.SetIovlen(1)
		h.Control = &l.rxCtl[i*controlSize]
	}
}

func (l *udpLink) initSend() {
	l.txMsgs, l.txNames, l.txIovs = make([]mmsghdr, batch), make([]sockaddr, batch), make([]unix.Iovec, batch)
	l.txCtl = make([]byte, batch*controlSize)
	for i := range l.txMsgs {
		l.txMsgs[i].hdr.Name = (*byte)(unsafe.Pointer(&l.txNames[i]))
	}
}

func (l *udpLink) LocalAddr() netip.AddrPort { return l.local }
func (l *udpLink) PathMTU() int              { return l.mtu }

// Counters returns what was carried and dropped.
func (l *udpLink) Counters() LinkCounters {
	c := &l.counters
	return LinkCounters{
		Received: c.received.Load(), Sent: c.sent.Load(), BadICRC: c.badICRC.Load(), BadLength: c.badLength.Load(),
		SendErrors: c.sendErrors.Load(), Segmented: c.segmented.Load(), Overflow: l.overflow(),
	}
}

// overflow returns how many datagrams the kernel dropped because the socket's buffer was full (SK_MEMINFO_DROPS, a 32-bit
// counter; Linux 4.12).
func (l *udpLink) overflow() uint64 {
	const skMeminfoDrops, skMeminfoVars = 8, 9
	l.fdMu.RLock()
	defer l.fdMu.RUnlock()
	if l.fd < 0 {
		return 0
	}
	var info [skMeminfoVars]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(l.fd), unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 || size < uint32(unsafe.Sizeof(info)) {
		return 0
	}
	return uint64(info[skMeminfoDrops])
}

// Wake sends an empty datagram to the socket itself: one blocking system call is then all that a receiver needs.
func (l *udpLink) Wake() {
	l.woken.Store(true)
	if !l.sleeping.Load() {
		return
	}
	l.fdMu.RLock()
	defer l.fdMu.RUnlock()
	if l.fd >= 0 {
		unix.Sendto(l.fd, nil, unix.MSG_DONTWAIT, l.sockaddr()) // if it gets lost, maxSleep is the remedy
	}
}

func (l *udpLink) Close() error {
	if l.closed.Swap(true) {
		return nil
	}
	l.Wake()
	l.recvMu.Lock()
	defer l.recvMu.Unlock()
	l.sendMu.Lock()
	defer l.sendMu.Unlock()
	l.fdMu.Lock()
	defer l.fdMu.Unlock()
	fd := l.fd
	l.fd = -1
	return unix.Close(fd)
}

func (l *udpLink) Recv(packets []Packet, wait time.Duration) (int, error) {
	l.recvMu.Lock()
	defer l.recvMu.Unlock()
	spin := l.spin
	if wait != 0 {
		l.starved = max(l.starved-1, 0)
		if l.crowded > 0 {
			l.crowded--
			spin = 0
		}
	}
	var start time.Time // of looking for packets
	for {
		if l.rxNext < l.rxHave {
			return l.deliver(packets)
		}
		if l.closed.Load() {
			return 0, net.ErrClosed
		}
		if wait != 0 && l.woken.Swap(false) {
			return 0, nil
		}
		// After a receive that emptied the socket, sleeping at once saves looking in vain.
		if !l.idle || wait == 0 || spin > 0 {
			if err := l.recvmmsg(unix.MSG_DONTWAIT); err == nil {
				return l.deliver(packets)
			} else if err != unix.EAGAIN {
				return 0, err
			}
			l.idle = true
			if wait == 0 {
				return 0, nil
			}
		}
		left := wait
		switch {
		case !start.IsZero():
			passed := time.Since(start)
			if left = wait - passed; wait > 0 && left <= 0 {
				return 0, nil
			}
			if passed < spin {
				if l.starved > 0 || passed > patience {
					if l.starved == 0 {
						l.starved = starvedFor
					}
					before := time.Now()
					unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
					if time.Since(before) > crowdedAfter {
						l.crowded, spin = crowdedFor, 0
					}
				}
				continue
			}
		case wait > 0 || spin > 0:
			start = time.Now()
			if spin > 0 {
				continue
			}
		}
		if wait < 0 {
			left = -1
		}
		switch err := l.sleep(left); err {
		case nil:
			return l.deliver(packets)
		case unix.EAGAIN: // the end of wait, Wake, or neither
		default:
			return 0, err
		}
	}
}

// Busy polling holds the CPU for as long as an answer usually takes. When none came by then, whom we wait for may need this
// very CPU: it is then yielded at each turn, and so from the start for the next receives. Where it does not come back soon, others
// have work enough for it, and who yields stands behind all of them for a time slice, while who sleeps is put before them
// when a packet comes: the next receives sleep at once.
const (
	patience     = 20 * time.Microsecond
	starvedFor   = 64
	crowdedAfter = time.Millisecond
	crowdedFor   = 256
)

// Sleeping for longer than shortSleep is done by a receive with a timeout, which is one system call and may end early: it is
// rounded down to a power of two, so that it rarely has to be set. What is shorter is measured exactly.
const (
	shortSleep = time.Millisecond
	maxSleep   = time.Second
)

// sleep waits for packets and receives them. It returns EAGAIN if there are none after left, without end if that is
// negative, or after Wake; or earlier.
func (l *udpLink) sleep(left time.Duration) error {
	l.sleeping.Store(true)
	defer l.sleeping.Store(false)
	if l.woken.Load() {
		return unix.EAGAIN
	}
	if left >= 0 && left < shortSleep {
		ts := unix.NsecToTimespec(int64(left))
		fds := [1]unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
		unix.Ppoll(fds[:], &ts, nil) // an interruption is like a packet that is not there
		return l.recvmmsg(unix.MSG_DONTWAIT)
	}
	timeout := maxSleep
	if left > 0 && left < maxSleep {
		timeout = 1 << (bits.Len64(uint64(left)) - 1)
	}
	if timeout != l.timeout {
		tv := unix.NsecToTimeval(int64(timeout))
		if err := unix.SetsockoptTimeval(l.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		l.timeout = timeout
	}
	return l.recvmmsg(unix.MSG_WAITFORONE)
}

// deliver hands up what was received. That may be nothing, when all of it had to be dropped: who floods us with rubbish
// must not keep the caller from its timers.
func (l *udpLink) deliver(packets []Packet) (int, error) {
	n := l.split(packets)
	if n == 0 && l.closed.Load() {
		return 0, net.ErrClosed
	}
	l.counters.received.Add(uint64(n))
	return n, nil
}

// recvmmsg receives what is there.
func (l *udpLink) recvmmsg(flags uintptr) error {
	// Where messages come one by one, the kernel is spared looking for a second one, most times.
	ask := len(l.rxMsgs)
	if l.singles >= 4 && l.singles%16 != 0 {
		ask = 1
	}
	for i := range ask {
		h := &l.rxMsgs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(controlSize)
	}
	for {
		var n uintptr
		var errno unix.Errno
		switch {
		case ask == 1 && flags == unix.MSG_DONTWAIT: // the scheduler need not know
			n, _, errno = unix.RawSyscall(unix.SYS_RECVMSG, uintptr(l.fd), uintptr(unsafe.Pointer(&l.rxMsgs[0].hdr)), flags)
		case ask == 1:
			n, _, errno = unix.Syscall(unix.SYS_RECVMSG, uintptr(l.fd), uintptr(unsafe.Pointer(&l.rxMsgs[0].hdr)), 0)
		case flags == unix.MSG_DONTWAIT:
			n, _, errno = unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(l.fd), uintptr(unsafe.Pointer(&l.rxMsgs[0])), uintptr(ask), flags, 0, 0)
		default:
			n, _, errno = unix.Syscall6(unix.SYS_RECVMMSG, uintptr(l.fd), uintptr(unsafe.Pointer(&l.rxMsgs[0])), uintptr(ask), flags, 0, 0)
		}
		switch errno {
		case 0:
			if ask == 1 {
				l.rxMsgs[0].len, n = uint32(n), 1
			}
			l.rxHave, l.rxNext, l.rxOff, l.rxID = int(n), 0, 0, 0
			l.idle = int(n) < len(l.rxMsgs)
			if l.singles++; n > 1 {
				l.singles = 0
			}
			return nil
		case unix.EINTR:
			if flags == unix.MSG_WAITFORONE {
				return unix.EAGAIN
			}
		case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH: // news about what was sent
			continue
		default:
			return errno
		}
	}
}

// split takes received datagrams apart into packets whose ICRC is right.
func (l *udpLink) split(packets []Packet) int {
	n := 0
	for l.rxNext < l.rxHave && n < len(packets) {
		m := &l.rxMsgs[l.rxNext]
		peer := peerAddr(&l.rxNames[l.rxNext])
		size := len(l.rxBuf) / len(l.rxMsgs)
		buf, have := l.rxBuf[l.rxNext*size:], int(m.len)
		segment := groSize(l.rxCtl[l.rxNext*controlSize:][:m.hdr.Controllen])
		if segment <= 0 {
			segment = have
		}
		if have == 0 && peer == l.local { // Wake
			l.woken.Store(false)
		}
		for l.rxOff < have && n < len(packets) {
			at, end := rxRoom+l.rxOff, rxRoom+min(l.rxOff+segment, have)
			l.rxOff = end - rxRoom
			if end-at < bthLen+icrcLen {
				l.counters.badLength.Add(1)
				continue // it is the last one, or all are as short
			}
			// The ICRC gives way to the zeroes that openAt wants to see before the next packet.
			icrc := binary.LittleEndian.Uint32(buf[end-icrcLen:])
			clear(buf[end-icrcLen : end])
			if end-at > maxDatagram {
				l.counters.badLength.Add(1)
				continue
			}
			data, id, ok := l.rx.openAt(peer, l.local, buf[:end-icrcLen], at, icrc, l.rxID)
			if !ok {
				l.counters.badICRC.Add(1)
				continue
			}
			l.rxID = id + 1 // the next segment has it; the kernel joins no others
			packets[n] = Packet{Peer: peer, Data: data}
			n++
		}
		if l.rxOff >= have {
			l.rxNext, l.rxOff, l.rxID = l.rxNext+1, 0, 0
		}
	}
	return n
}

// groSize returns the size of the segments that a datagram was made of, from its control message, or 0.
func groSize(ctl []byte) int {
	if len(ctl) < unix.CmsgLen(4) {
		return 0
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&ctl[0]))
	if h.Level != unix.IPPROTO_UDP || h.Type != unix.UDP_GRO {
		return 0
	}
	return int(*(*int32)(unsafe.Pointer(&ctl[unix.CmsgLen(0)])))
}

// peerAddr returns the address in a sockaddr.
func peerAddr(s *sockaddr) netip.AddrPort {
	p := (*[2]byte)(unsafe.Pointer(&s.Port))
	port := uint16(p[0])<<8 | uint16(p[1])
	if s.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(s)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), port)
}

// setPeer is the inverse of peerAddr and returns the length.
func (l *udpLink) setPeer(s *sockaddr, a netip.AddrPort) uint32 {
	p := (*[2]byte)(unsafe.Pointer(&s.Port))
	p[0], p[1] = byte(a.Port()>>8), byte(a.Port())
	if a.Addr().Is4() {
		s.Family = unix.AF_INET
		(*unix.RawSockaddrInet4)(unsafe.Pointer(s)).Addr = a.Addr().As4()
		return unix.SizeofSockaddrInet4
	}
	s.Family, s.Addr, s.Scope_id = unix.AF_INET6, a.Addr().As16(), 0
	if a.Addr().IsLinkLocalUnicast() {
		s.Scope_id = l.scope
	}
	return unix.SizeofSockaddrInet6
}

func (l *udpLink) Send(packets []Packet) error {
	l.sendMu.Lock()
	defer l.sendMu.Unlock()
	for len(packets) > 0 {
		if l.closed.Load() {
			return net.ErrClosed
		}
		n := min(len(packets), batch)
		if err := l.sendBatch(packets[:n]); err != nil {
			return err
		}
		packets = packets[n:]
	}
	return nil
}

// sendBatch sends at most batch packets.
func (l *udpLink) sendBatch(packets []Packet) error {
	if !l.tx.off {
		for i := range packets {
			l.txSum[i] = packets[i].dataSum()
		}
	}
	for next := 0; next < len(packets); {
		first, msgs := next, 0
		for next < len(packets) {
			next += l.prepare(msgs, packets[next:], next)
			msgs++
		}
		done, err := l.sendmmsg(msgs)
		if err != nil {
			return err
		}
		if done < msgs { // segmentation turned out not to work: what is left goes again without it
			next = first
			for i := range done {
				next += l.txCount[i]
			}
		}
	}
	return nil
}

// prepare makes the msg-th message from the packets at the start of the slice that can go together: to one peer and of
// one size, but for the last, which may be shorter. It returns how many those are. at is the place of the first in the
// batch.
func (l *udpLink) prepare(msg int, packets []Packet, at int) int {
	size, total, n, iovs := len(packets[0].Data), 0, 0, 0
	for n < len(packets) && (n == 0 || l.segments) {
		p := &packets[n]
		if n > 0 && (p.Peer != packets[0].Peer || len(p.Data) > size || total+len(p.Data)+icrcLen > maxSegmented) || n == maxSegments {
			break
		}
		icrc := uint32(0)
		if !l.tx.off {
			icrc = l.tx.around(aroundKey{l.local, p.Peer, uint16(n), DontFragment, len(p.Data)}) ^ l.txSum[at+n]
		}
		wire := binary.LittleEndian.AppendUint32(p.Data, icrc)
		// Packets of a Device lie one behind the other.
		if last := at + iovs - 1; iovs > 0 && uintptr(unsafe.Pointer(l.txIovs[last].Base))+uintptr(l.txIovs[last].Len) == uintptr(unsafe.Pointer(&wire[0])) {
			l.txIovs[last].SetLen(int(l.txIovs[last].Len) + len(wire))
		} else {
			l.txIovs[at+iovs].Base = &wire[0]
			l.txIovs[at+iovs].SetLen(len(wire))
			iovs++
		}
		total += len(wire)
		n++
		if len(p.Data) < size {
			break
		}
	}
	h := &l.txMsgs[msg].hdr
	h.Namelen = l.setPeer(&l.txNames[msg], packets[0].Peer)
	h.Iov = &l.txIovs[at]
	h.SetIovlen(iovs)
	l.txCount[msg] = n
	h.Control = nil
	h.SetControllen(0)
	if n > 1 {
		ctl := l.txCtl[msg*controlSize:]
		c := (*unix.Cmsghdr)(unsafe.Pointer(&ctl[0]))
		c.Level, c.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
		c.SetLen(unix.CmsgLen(2))
		*(*uint16)(unsafe.Pointer(&ctl[unix.CmsgLen(0)])) = uint16(size + icrcLen)
		h.Control = &ctl[0]
		h.SetControllen(unix.CmsgSpace(2))
	}
	return n
}

// sendmmsg sends prepared messages and returns how many were dealt with. They are fewer than msgs only if the next one
// needs segmentation and cannot have it.
func (l *udpLink) sendmmsg(msgs int) (int, error) {
	for done := 0; done < msgs; {
		var n uintptr
		var errno unix.Errno
		if h := &l.txMsgs[done].hdr; msgs == 1 && h.Iovlen == 1 && h.Controllen == 0 { // one packet: the shorter way
			_, _, errno = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(l.fd), uintptr(unsafe.Pointer(h.Iov.Base)), uintptr(h.Iov.Len), unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(h.Name)), uintptr(h.Namelen))
			n = 1
		} else {
			n, _, errno = unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(l.fd), uintptr(unsafe.Pointer(&l.txMsgs[done])), uintptr(msgs-done), unix.MSG_DONTWAIT, 0, 0)
		}
		switch errno {
		case 0:
			for i := range int(n) {
				packets := uint64(l.txCount[done+i])
				l.counters.sent.Add(packets)
				if packets > 1 {
					l.counters.segmented.Add(packets)
				}
			}
			done += int(n)
		case unix.EINTR:
		case unix.EAGAIN:
			if l.closed.Load() {
				return done, net.ErrClosed
			}
			fds := [1]unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLOUT}}
			unix.Poll(fds[:], 100)
		case unix.EBADF:
			return done, net.ErrClosed
		case unix.EIO, unix.EINVAL:
			if l.txCount[done] > 1 {
				// A device without checksum offload, on a kernel that does not segment for it (before 6.2, say).
				l.segments = false
				return done, nil
			}
			fallthrough
		default:
			// No route, no buffers, a filter, a packet too long for the path: lost, as packets are.
			l.counters.sendErrors.Add(uint64(l.txCount[done]))
			done++
		}
	}
	return msgs, nil
}
