package roce

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// RejectError is a connection request that the other side refused.
type RejectError struct {
	Reason  RejectReason
	Private []byte // what its application sent along
}

// Error returns the reason.
func (e *RejectError) Error() string { return "connection rejected: " + e.Reason.String() }

// connState is the state of a connection in its set-up and end; DESIGN.md has the table of transitions.
type connState uint8

const (
	connREQSent     connState = iota + 1 // active: waits for REP or REJ
	connREQReceived                      // passive: waits for the application
	connREPSent                          // passive: waits for RTU or data
	connEstablished
	connDREQSent // waits for DREP
	connTimeWait // knows late duplicates for what they are
	connClosed
)

// Timers of connection management.
const (
	cmTimeoutCode = 16 // 268 ms before a message is sent again
	cmRetries     = 15
	dreqRetries   = 4
	timeWait      = 2 * time.Second
	maxMRADelay   = 30 * time.Second // that a peer can ask for
	serviceDelay  = 20               // code, 4.3 s: that we ask for while an application makes up its mind
)

// manager is the connection manager behind QP1 (IBA chapter 12), in both roles.
type manager struct {
	e         *engine
	guid      uint64
	psn       PSN
	listeners map[ServiceID]*listener
	local     map[CommID]*conn
	remote    map[remoteID]*conn // the passive ones
	halfOpen  int
	waiting   int // in time wait
	outgoing  []datagram
}

// remoteID is how a peer's REQ is recognised when it comes again.
type remoteID struct {
	addr netip.Addr
	id   CommID
}

// datagram is a message on its way out.
type datagram struct {
	to  netip.Addr
	mad [madLen]byte
}

// maxOutgoing bounds the messages on their way out; those beyond are dropped, as the network might have.
const maxOutgoing = 256

// listener takes connection requests for one service.
type listener struct {
	service ServiceID
	backlog []*conn
	owner   interface{ arrived() }
	allow   func(peer netip.Addr, private []byte) bool // nil: everybody
}

// maxBacklog bounds the requests that wait for one application.
const maxBacklog = 128

// conn is one connection.
type conn struct {
	m       *manager
	state   connState
	passive bool
	local   CommID
	remote  CommID
	tid     uint64
	peer    netip.Addr
	service ServiceID
	req     REQFields // passive: the peer's
	q       *qp
	account *peer // that it counts on while half open
	epsn    PSN   // active: that we told the peer to start with
	last    [madLen]byte
	tries   int
	wait    time.Duration // before last is sent again
	timer   timer
	private []byte // of the peer's REP
	owner   connOwner
}

// connOwner is told when a connection is established, with a nil error, or fails.
type connOwner interface{ connected(c *conn, err error) }

func (m *manager) init(e *engine) {
	m.e = e
	m.listeners, m.local, m.remote = map[ServiceID]*listener{}, map[CommID]*conn{}, map[remoteID]*conn{}
	var b [8]byte
	rand.Read(b[:]) // never fails
	m.guid = binary.BigEndian.Uint64(b[:]) | 2<<56
}

// listen registers l for its service.
func (m *manager) listen(l *listener) error {
	if m.listeners[l.service] != nil {
		return fmt.Errorf("listen on service %#x: in use", uint64(l.service))
	}
	m.listeners[l.service] = l
	return nil
}

// unlisten ends a listener; who waits there is refused.
func (m *manager) unlisten(now time.Duration, l *listener) {
	if m.listeners[l.service] != l {
		return
	}
	delete(m.listeners, l.service)
	for _, c := range l.backlog {
		c.reject(now, RejectInvalidService, nil)
	}
	l.backlog = nil
}

// transmit adds the messages on their way out.
func (m *manager) transmit(out *outbox) {
	n := 0
	for ; n < len(m.outgoing) && !out.full(); n++ {
		d := &m.outgoing[n]
		hdr := OpUDSendOnly.HeaderLen()
		p := out.next(netip.AddrPortFrom(d.to, Port), hdr+madLen)
		h := BTH(p.Data[:hdr])
		h.Encode(&BTHFields{Opcode: OpUDSendOnly, PKey: defaultPKey, DestQP: QPNGeneral, PSN: m.psn})
		h.DETH().Encode(gsiQKey, QPNGeneral)
		copy(p.Data[hdr:], d.mad[:])
		m.psn = m.psn.Add(1)
		m.e.counters.CMSent++
	}
	m.outgoing = append(m.outgoing[:0], m.outgoing[n:]...)
}

// send queues a message.
func (m *manager) send(to netip.Addr, mad *[madLen]byte) {
	if len(m.outgoing) >= maxOutgoing {
		m.e.counters.CMDropped++
		return
	}
	m.outgoing = append(m.outgoing, datagram{to, *mad})
}

// reply sends a message that no connection keeps.
func (m *manager) reply(to netip.Addr, in MAD, a AttributeID, fill func(MAD)) {
	var b [madLen]byte
	out := MAD(b[:])
	out.Encode(a, in.TransactionID())
	if fill != nil {
		fill(out)
	}
	out.setIDs(in.Remote(), in.Local())
	m.send(to, &b)
}

// receive takes a datagram that came to QP1.
func (m *manager) receive(now time.Duration, from netip.Addr, b []byte) {
	c := &m.e.counters
	c.CMReceived++
	mad, err := ParseMAD(b)
	if err != nil {
		c.CMMalformed++
		return
	}
	if mad.Attribute() == AttrREQ {
		m.request(now, from, mad)
		return
	}
	con := m.local[mad.Remote()]
	if mad.Attribute() == AttrREJ && mad.Remote() == 0 {
		con = nil // refuses what it does not know
	}
	if con == nil || con.peer != from || con.remote != 0 && con.remote != mad.Local() && !(mad.Attribute() == AttrREJ && mad.Local() == 0) {
		if mad.Attribute() == AttrDREQ { // of a connection that is long gone here
			m.reply(from, mad, AttrDREP, nil)
		}
		c.CMUnmatched++
		return
	}
	con.receive(now, mad)
}

// request takes a REQ.
func (m *manager) request(now time.Duration, from netip.Addr, mad MAD) {
	f := REQ(mad.Payload()).Fields()
	if c := m.remote[remoteID{from, f.Local}]; c != nil {
		c.again(now)
		return
	}
	refuse := func(r RejectReason) {
		m.e.counters.ConnectionsRefused++
		m.reply(from, mad, AttrREJ, func(out MAD) {
			REJ(out.Payload()).Encode(&REJFields{Reason: r})
		})
	}
	l := m.listeners[f.Service]
	acct := m.e.peerFor(from)
	defer func() { m.e.release(acct) }()
	switch mtu := mtuOf(f.MTU); {
	case f.Transport != 0:
		refuse(RejectInvalidTransport)
	case l == nil:
		refuse(RejectInvalidService)
	case mtu == 0 || mtu > m.e.mtu:
		refuse(RejectInvalidMTU)
	case f.Primary.LocalGID != GID(from):
		refuse(RejectInvalidGID)
	case f.QPN <= QPNGeneral || f.Local == 0:
		refuse(RejectUnsupported)
	case acct.halfOpen >= m.e.limits.HalfOpenPerPeer || m.halfOpen >= m.e.limits.HalfOpen || len(l.backlog) >= maxBacklog,
		acct.qps >= m.e.limits.QPsPerPeer:
		refuse(RejectNoResources)
	case l.allow != nil && !l.allow(from, f.Private[ipCMLen:]):
		m.e.counters.ConnectionsNotAllowed++
		refuse(RejectConsumer)
	default:
		c := m.newConn(from, f.Service)
		c.passive, c.state, c.req, c.remote, c.tid = true, connREQReceived, f, f.Local, mad.TransactionID()
		c.account = acct
		acct.halfOpen++
		m.halfOpen++
		m.remote[remoteID{from, f.Local}] = c
		// Who does not decide in time is taken to have refused.
		c.wait = time.Minute
		m.e.timers.set(&c.timer, now+c.wait)
		l.backlog = append(l.backlog, c)
		l.owner.arrived()
	}
}

// newConn makes a connection with a random communication ID.
func (m *manager) newConn(peer netip.Addr, service ServiceID) *conn {
	c := &conn{m: m, peer: peer, service: service, wait: ackTimeout(cmTimeoutCode)}
	c.timer.owner = c
	for c.local == 0 || m.local[c.local] != nil {
		c.local = CommID(random32())
	}
	m.local[c.local] = c
	return c
}

// errPrivate is about private data that do not fit.
var errPrivate = errors.New("too much private data")

// dial asks the peer for a connection of q, which is connected when the owner is told so.
func (m *manager) dial(now time.Duration, to netip.Addr, service ServiceID, q *qp, private []byte, owner connOwner) (*conn, error) {
	if len(private) > MaxREQPrivate {
		return nil, errPrivate
	}
	c := m.newConn(to.Unmap().WithZone(""), service)
	c.state, c.q, c.owner, c.epsn, c.tid = connREQSent, q, owner, PSN(random32()&psnMask), uint64(random32())<<32|uint64(c.local)
	q.conn = c
	f := REQFields{
		Local: c.local, Service: service, GUID: m.guid, QPN: q.num,
		Resources: uint8(q.cfg.Resources), Depth: uint8(q.cfg.MaxReads),
		RemoteTimeout: cmTimeoutCode, LocalTimeout: cmTimeoutCode, MaxCMRetries: cmRetries, StartPSN: c.epsn,
		Retry: uint8(q.cfg.RetryCount), RNRRetry: uint8(q.cfg.RNRRetry), PKey: defaultPKey, MTU: mtuCode(q.cfg.PathMTU), FlowControl: q.cfg.FlowControl,
		Primary: PathFields{
			LocalLID: 0xffff, RemoteLID: 0xffff, LocalGID: GID(m.e.local.Addr()), RemoteGID: GID(c.peer),
			HopLimit: defaultHopLimit, AckTimeout: timeoutCode(q.cfg.AckTimeout),
		},
	}
	ip := IPAddressing{Src: m.e.local.Addr(), Dst: c.peer, SrcPort: uint16(random32())}
	ip.encode(f.Private[:])
	copy(f.Private[ipCMLen:], private)
	out := MAD(c.last[:])
	out.Encode(AttrREQ, c.tid)
	REQ(out.Payload()).Encode(&f)
	c.repeat(now, cmRetries)
	return c, nil
}

// repeat sends the last message, now and again by timer, at most tries times more.
func (c *conn) repeat(now time.Duration, tries int) {
	c.tries, c.wait = tries, ackTimeout(cmTimeoutCode)
	c.m.send(c.peer, &c.last)
	c.m.e.timers.set(&c.timer, now+c.wait)
}

// compose starts the last message anew.
func (c *conn) compose(a AttributeID) MAD {
	out := MAD(c.last[:])
	out.Encode(a, c.tid)
	return out
}

// accept answers a REQ with a queue pair whose properties are cfg, as far as the peer's wishes allow.
func (c *conn) accept(now time.Duration, pd *PD, cfg QPConfig, private []byte, qpOwner completer, owner connOwner) (*qp, error) {
	switch {
	case c.state != connREQReceived || c.q != nil:
		return nil, ErrNotConnected
	case len(private) > MaxREPPrivate:
		return nil, errPrivate
	}
	// A peer that uses the queue pair of an older connection has lost that one.
	for _, old := range c.m.local {
		if old != c && old.peer == c.peer && old.state == connEstablished && old.q != nil && old.q.remote == c.req.QPN {
			old.q.fail(now, ErrDisconnected)
			old.toTimeWait(now)
		}
	}
	cfg.PathMTU = mtuOf(c.req.MTU)
	cfg = cfg.withDefaults(c.m.e.mtu)
	// Each side may ask for no more than the other takes.
	cfg.MaxReads = max(min(cfg.MaxReads, int(c.req.Resources)), 1)
	cfg.Resources = max(min(cfg.Resources, int(c.req.Depth)), 1)
	cfg.FlowControl = cfg.FlowControl && c.req.FlowControl
	q, err := c.m.e.addQP(pd, cfg, qpOwner)
	if err != nil {
		c.reject(now, RejectNoResources, nil)
		return nil, err
	}
	epsn := PSN(random32() & psnMask)
	if err := c.m.e.connect(now, q, Remote{c.peer, c.req.QPN, epsn}, true); err != nil {
		c.m.e.closeQP(now, q, err)
		c.reject(now, RejectNoResources, nil)
		return nil, err
	}
	q.req.start(c.req.StartPSN)
	c.q, q.conn, c.owner = q, c, owner
	f := REPFields{
		Local: c.local, Remote: c.remote, QPN: q.num, StartPSN: epsn, GUID: c.m.guid, TargetAckDelay: 15,
		Resources: uint8(min(cfg.Resources, int(c.req.Depth))), Depth: uint8(min(cfg.MaxReads, int(c.req.Resources))),
		RNRRetry: uint8(cfg.RNRRetry), FlowControl: cfg.FlowControl,
	}
	copy(f.Private[:], private)
	REP(c.compose(AttrREP).Payload()).Encode(&f)
	c.state = connREPSent
	c.repeat(now, cmRetries)
	return q, nil
}

// reject refuses a REQ.
func (c *conn) reject(now time.Duration, r RejectReason, private []byte) {
	if c.state != connREQReceived && c.state != connREPSent {
		return
	}
	f := REJFields{Local: c.local, Remote: c.remote, Reason: r}
	copy(f.Private[:], private)
	REJ(c.compose(AttrREJ).Payload()).Encode(&f)
	c.m.send(c.peer, &c.last)
	c.m.e.counters.ConnectionsRefused++
	c.toTimeWait(now) // a REQ that comes again is refused again
}

// again takes a REQ that was taken before.
func (c *conn) again(now time.Duration) {
	switch {
	case c.state == connREQReceived:
		out := c.compose(AttrMRA)
		MRA(out.Payload()).Encode(0, serviceDelay)
		out.setIDs(c.local, c.remote)
		c.m.send(c.peer, &c.last)
	case c.state == connREPSent, c.state == connTimeWait && MAD(c.last[:]).Attribute() == AttrREJ:
		c.m.send(c.peer, &c.last)
	default: // it was answered, and the answer arrived
		c.m.e.counters.CMUnmatched++
	}
}

// receive takes a message of this connection.
func (c *conn) receive(now time.Duration, mad MAD) {
	switch a := mad.Attribute(); {
	case a == AttrREP && c.state == connREQSent:
		c.replied(now, mad)
	case a == AttrREP && c.state == connEstablished && !c.passive:
		c.m.send(c.peer, &c.last) // the RTU got lost
	case a == AttrRTU && c.state == connREPSent:
		c.m.e.ready(now, c.q)
		c.established()
	case a == AttrREJ && (c.state == connREQSent || c.state == connREPSent):
		f := REJ(mad.Payload()).Fields()
		c.failed(now, &RejectError{f.Reason, f.Private[:]})
	case a == AttrMRA && (c.state == connREQSent || c.state == connREPSent):
		delay := min(ackTimeout(MRA(mad.Payload()).ServiceTimeout()), maxMRADelay)
		c.tries = cmRetries
		c.m.e.timers.set(&c.timer, max(c.timer.want, now+delay))
	case a == AttrDREQ && (c.state == connREPSent || c.state == connEstablished || c.state == connDREQSent):
		if c.q == nil || DREQ(mad.Payload()).RemoteQPN() != c.q.num {
			c.m.e.counters.CMUnmatched++
			return
		}
		c.compose(AttrDREP).setIDs(c.local, c.remote)
		c.m.send(c.peer, &c.last)
		was := c.state
		c.toTimeWait(now)
		c.q.fail(now, ErrDisconnected)
		if was == connREPSent {
			c.notify(ErrDisconnected)
		}
	case a == AttrDREQ && c.state == connTimeWait:
		c.m.reply(c.peer, mad, AttrDREP, nil)
	case a == AttrDREP && c.state == connDREQSent:
		c.toTimeWait(now)
	case a == AttrRTU || a == AttrREP || a == AttrMRA: // late
	default:
		c.m.e.counters.CMUnmatched++
	}
}

// replied takes the REP to our REQ.
func (c *conn) replied(now time.Duration, mad MAD) {
	f := REP(mad.Payload()).Fields()
	c.remote = f.Local
	q := c.q
	q.cfg.MaxReads = max(min(q.cfg.MaxReads, int(f.Resources)), 1)
	q.cfg.FlowControl = q.cfg.FlowControl && f.FlowControl
	if err := c.m.e.connect(now, q, Remote{c.peer, f.QPN, c.epsn}, false); err != nil {
		c.failed(now, err)
		return
	}
	q.req.start(f.StartPSN)
	c.private = append([]byte(nil), f.Private[:]...)
	c.compose(AttrRTU).setIDs(c.local, c.remote)
	c.m.send(c.peer, &c.last)
	c.established()
}

// established notes that both sides are ready.
func (c *conn) established() {
	if c.state != connREPSent && c.state != connREQSent {
		return
	}
	c.state = connEstablished
	c.m.e.timers.set(&c.timer, 0)
	c.settled()
	c.m.e.counters.ConnectionsEstablished++
	c.notify(nil)
}

// settled ends the count as half open.
func (c *conn) settled() {
	if c.account != nil {
		c.account.halfOpen--
		c.m.halfOpen--
		c.m.e.release(c.account)
		c.account = nil
	}
}

// notify tells the owner, once.
func (c *conn) notify(err error) {
	if o := c.owner; o != nil {
		c.owner = nil
		o.connected(c, err)
	}
}

// failed ends a connection that was not established.
func (c *conn) failed(now time.Duration, err error) {
	c.m.e.counters.ConnectionsFailed++
	c.toTimeWait(now)
	if c.q != nil {
		c.q.fail(now, err)
	}
	c.notify(err)
}

// disconnect tells the peer that the connection ends. The queue pair is closed by the caller.
func (c *conn) disconnect(now time.Duration) {
	switch c.state {
	case connEstablished, connREPSent:
		num := c.q.remote
		out := c.compose(AttrDREQ)
		DREQ(out.Payload()).Encode(num)
		out.setIDs(c.local, c.remote)
		c.state = connDREQSent
		c.settled()
		c.repeat(now, dreqRetries)
	case connREQReceived:
		c.reject(now, RejectConsumer, nil)
	case connREQSent:
		f := REJFields{Local: c.local, Message: 2, Reason: RejectTimeout}
		REJ(c.compose(AttrREJ).Payload()).Encode(&f)
		c.m.send(c.peer, &c.last)
		c.toTimeWait(now)
	}
	c.notify(ErrNotConnected)
}

// toTimeWait keeps the connection for a while, or not if too many are kept.
func (c *conn) toTimeWait(now time.Duration) {
	if c.state == connTimeWait || c.state == connClosed {
		return
	}
	c.settled()
	if l := c.m.listeners[c.service]; c.state == connREQReceived && l != nil {
		l.backlog = slices.DeleteFunc(l.backlog, func(b *conn) bool { return b == c })
	}
	if c.m.waiting >= c.m.e.limits.HalfOpen {
		c.forget()
		return
	}
	c.m.waiting++
	c.state = connTimeWait
	c.m.e.timers.set(&c.timer, now+timeWait)
}

// forget ends all knowledge of the connection.
func (c *conn) forget() {
	if c.state == connTimeWait {
		c.m.waiting--
	}
	c.state = connClosed
	c.m.e.timers.remove(&c.timer)
	delete(c.m.local, c.local)
	if c.passive {
		delete(c.m.remote, remoteID{c.peer, c.remote})
	}
}

// expire does what is due.
func (c *conn) expire(now time.Duration) {
	switch c.state {
	case connREQSent, connREPSent, connDREQSent:
		if c.tries > 0 {
			c.repeat(now, c.tries-1)
			return
		}
		if c.state == connDREQSent {
			c.toTimeWait(now)
			return
		}
		if c.state == connREPSent {
			f := REJFields{Local: c.local, Remote: c.remote, Message: 1, Reason: RejectTimeout}
			REJ(c.compose(AttrREJ).Payload()).Encode(&f)
			c.m.send(c.peer, &c.last)
		}
		c.failed(now, fmt.Errorf("set up connection: %w", ErrRetryExceeded))
	case connREQReceived:
		c.reject(now, RejectTimeout, nil)
	case connTimeWait:
		c.forget()
	}
}
