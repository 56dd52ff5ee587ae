package roce

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// MAD is a management datagram, 256 bytes, as it travels to QP1 (IBA volume 1, section 13.4.3).
type MAD []byte

// Lengths in bytes, and the constants of communication management.
const (
	madLen         = 256
	madHeaderLen   = 24
	cmPayloadLen   = madLen - madHeaderLen
	madVersion     = 1
	cmClass        = 7
	cmClassVersion = 2
	methodSend     = 3
	gsiQKey        = 0x80010000 // the queue key of every QP1
)

// AttributeID is what a management datagram is about: for communication management, the message type.
type AttributeID uint16

// The messages of communication management (IBA section 12.6).
const (
	AttrREQ  AttributeID = 0x10
	AttrMRA  AttributeID = 0x11
	AttrREJ  AttributeID = 0x12
	AttrREP  AttributeID = 0x13
	AttrRTU  AttributeID = 0x14
	AttrDREQ AttributeID = 0x15
	AttrDREP AttributeID = 0x16
)

// String returns the specification's abbreviation.
func (a AttributeID) String() string {
	switch a {
	case AttrREQ:
		return "REQ"
	case AttrMRA:
		return "MRA"
	case AttrREJ:
		return "REJ"
	case AttrREP:
		return "REP"
	case AttrRTU:
		return "RTU"
	case AttrDREQ:
		return "DREQ"
	case AttrDREP:
		return "DREP"
	}
	return fmt.Sprintf("attribute %#04x", uint16(a))
}

// CommID names a connection in the messages of one side: every message carries the sender's and, once known, the
// receiver's.
type CommID uint32

// ParseMAD returns the datagram in b. The error wraps ErrMalformed if b is no datagram of communication management.
func ParseMAD(b []byte) (MAD, error) {
	if len(b) != madLen {
		return nil, fmt.Errorf("%w MAD: %d bytes", ErrMalformed, len(b))
	}
	m := MAD(b)
	if m[0] != madVersion || m[1] != cmClass || m[2] != cmClassVersion || m[3] != methodSend {
		return nil, fmt.Errorf("%w MAD: version %d, class %d version %d, method %d", ErrMalformed, m[0], m[1], m[2], m[3])
	}
	return m, nil
}

// TransactionID returns the number that a REP repeats from its REQ.
func (m MAD) TransactionID() uint64 { return binary.BigEndian.Uint64(m[8:]) }

// Attribute returns the message type.
func (m MAD) Attribute() AttributeID { return AttributeID(binary.BigEndian.Uint16(m[16:])) }

// Payload returns the 232 bytes of the message itself.
func (m MAD) Payload() []byte { return m[madHeaderLen:] }

// Encode writes the header and clears the message. Precondition: 256 bytes.
func (m MAD) Encode(a AttributeID, transaction uint64) {
	clear(m)
	m[0], m[1], m[2], m[3] = madVersion, cmClass, cmClassVersion, methodSend
	binary.BigEndian.PutUint64(m[8:], transaction)
	binary.BigEndian.PutUint16(m[16:], uint16(a))
}

// Local returns the sender's communication ID, which starts every message.
func (m MAD) Local() CommID { return CommID(binary.BigEndian.Uint32(m[24:])) }

// Remote returns the receiver's communication ID, which every message but a REQ carries next.
func (m MAD) Remote() CommID { return CommID(binary.BigEndian.Uint32(m[28:])) }

// setIDs writes both communication IDs.
func (m MAD) setIDs(local, remote CommID) {
	binary.BigEndian.PutUint32(m[24:], uint32(local))
	binary.BigEndian.PutUint32(m[28:], uint32(remote))
}

// ServiceID names what a connection request wants to reach.
type ServiceID uint64

// ServiceTCP returns the service of a port in the TCP port space of librdmacm (RDMA_PS_TCP).
func ServiceTCP(port uint16) ServiceID { return 0x0000000001060000 | ServiceID(port) }

// Private data lengths in bytes.
const (
	reqPrivateLen = 92
	ipCMLen       = 36 // of a REQ's private data, the header of the IP addressing annex
	repPrivateLen = 196
	rejPrivateLen = 148
	rejInfoLen    = 72
)

// MaxREQPrivate, MaxREPPrivate and MaxREJPrivate are the bytes that a caller can send along with the messages.
const (
	MaxREQPrivate = reqPrivateLen - ipCMLen
	MaxREPPrivate = repPrivateLen
	MaxREJPrivate = rejPrivateLen
)

// PathFields are the primary or the alternate path of a REQ (IBA section 12.6.5).
type PathFields struct {
	LocalLID, RemoteLID uint16
	LocalGID, RemoteGID [16]byte
	FlowLabel           uint32 // 20 bits
	PacketRate          uint8  // 6 bits
	TrafficClass        uint8
	HopLimit            uint8
	SL                  uint8 // 4 bits
	SubnetLocal         bool
	AckTimeout          uint8 // 5 bits
}

const pathLen = 44

func decodePath(b []byte) PathFields {
	be := binary.BigEndian
	flow := be.Uint32(b[36:])
	return PathFields{
		LocalLID: be.Uint16(b), RemoteLID: be.Uint16(b[2:]),
		LocalGID: [16]byte(b[4:]), RemoteGID: [16]byte(b[20:]),
		FlowLabel: flow >> 12, PacketRate: uint8(flow & 0x3f),
		TrafficClass: b[40], HopLimit: b[41], SL: b[42] >> 4, SubnetLocal: b[42]&8 != 0, AckTimeout: b[43] >> 3,
	}
}

func (p *PathFields) encode(b []byte) {
	be := binary.BigEndian
	be.PutUint16(b, p.LocalLID)
	be.PutUint16(b[2:], p.RemoteLID)
	copy(b[4:], p.LocalGID[:])
	copy(b[20:], p.RemoteGID[:])
	be.PutUint32(b[36:], p.FlowLabel<<12|uint32(p.PacketRate&0x3f))
	b[40], b[41], b[42], b[43] = p.TrafficClass, p.HopLimit, p.SL<<4|bit(p.SubnetLocal, 8), p.AckTimeout<<3
}

// REQ is the payload of a connection request (IBA section 12.6.5).
type REQ []byte

// REQFields are the fields of a REQ.
type REQFields struct {
	Local              CommID
	Service            ServiceID
	GUID               uint64
	QKey               uint32
	QPN                QPN
	Resources          uint8 // outstanding READ and ATOMIC requests that the sender takes
	Depth              uint8 // outstanding READ and ATOMIC requests that the sender wants to make
	EECN, RemoteEECN   uint32
	RemoteTimeout      uint8 // 5 bits: how long the sender waits for an answer
	Transport          uint8 // 2 bits: 0 is reliable connected
	FlowControl        bool
	StartPSN           PSN   // with which the *receiver* of the message starts to send
	LocalTimeout       uint8 // 5 bits: how long the sender takes to answer
	Retry              uint8 // 3 bits
	PKey               uint16
	MTU                uint8 // code, 4 bits
	RDC                bool
	RNRRetry           uint8 // 3 bits
	MaxCMRetries       uint8 // 4 bits
	SRQ                bool
	ExtTransport       uint8 // 3 bits
	Primary, Alternate PathFields
	Private            [reqPrivateLen]byte
}

// Fields returns all fields. Precondition: 232 bytes.
func (r REQ) Fields() REQFields {
	be := binary.BigEndian
	f := REQFields{
		Local: CommID(be.Uint32(r)), Service: ServiceID(be.Uint64(r[8:])), GUID: be.Uint64(r[16:]), QKey: be.Uint32(r[28:]),
		QPN: QPN(uint24(r[32:])), Resources: r[35], EECN: uint24(r[36:]), Depth: r[39], RemoteEECN: uint24(r[40:]),
		RemoteTimeout: r[43] >> 3, Transport: r[43] >> 1 & 3, FlowControl: r[43]&1 != 0,
		StartPSN: PSN(uint24(r[44:])), LocalTimeout: r[47] >> 3, Retry: r[47] & 7, PKey: be.Uint16(r[48:]),
		MTU: r[50] >> 4, RDC: r[50]&8 != 0, RNRRetry: r[50] & 7, MaxCMRetries: r[51] >> 4, SRQ: r[51]&8 != 0, ExtTransport: r[51] & 7,
		Primary: decodePath(r[52:]), Alternate: decodePath(r[52+pathLen:]),
	}
	copy(f.Private[:], r[52+2*pathLen:])
	return f
}

// Encode writes all fields. Precondition: 232 zero bytes.
func (r REQ) Encode(f *REQFields) {
	be := binary.BigEndian
	be.PutUint32(r, uint32(f.Local))
	be.PutUint64(r[8:], uint64(f.Service))
	be.PutUint64(r[16:], f.GUID)
	be.PutUint32(r[28:], f.QKey)
	be.PutUint32(r[32:], uint32(f.QPN)<<8|uint32(f.Resources))
	be.PutUint32(r[36:], f.EECN<<8|uint32(f.Depth))
	be.PutUint32(r[40:], f.RemoteEECN<<8|uint32(f.RemoteTimeout&31)<<3|uint32(f.Transport&3)<<1|uint32(bit(f.FlowControl, 1)))
	be.PutUint32(r[44:], uint32(f.StartPSN)<<8|uint32(f.LocalTimeout&31)<<3|uint32(f.Retry&7))
	be.PutUint16(r[48:], f.PKey)
	r[50] = f.MTU<<4 | bit(f.RDC, 8) | f.RNRRetry&7
	r[51] = f.MaxCMRetries<<4 | bit(f.SRQ, 8) | f.ExtTransport&7
	f.Primary.encode(r[52:])
	f.Alternate.encode(r[52+pathLen:])
	copy(r[52+2*pathLen:], f.Private[:])
}

// IPAddressing is the header with which librdmacm starts the private data of a REQ: the addresses as its caller knows
// them (annex A11, RDMA IP CM Service).
type IPAddressing struct {
	Src, Dst netip.Addr
	SrcPort  uint16
}

// decodeIPAddressing reports ok = false if the private data do not start with such a header.
func decodeIPAddressing(b []byte) (a IPAddressing, ok bool) {
	a.SrcPort = binary.BigEndian.Uint16(b[2:])
	switch {
	case b[0] != 0:
		return a, false
	case b[1]>>4 == 4:
		a.Src, a.Dst = netip.AddrFrom4([4]byte(b[16:])), netip.AddrFrom4([4]byte(b[32:]))
		return a, true
	case b[1]>>4 == 6:
		a.Src, a.Dst = netip.AddrFrom16([16]byte(b[4:])), netip.AddrFrom16([16]byte(b[20:]))
		return a, true
	}
	return a, false
}

func (a *IPAddressing) encode(b []byte) {
	clear(b[:ipCMLen])
	binary.BigEndian.PutUint16(b[2:], a.SrcPort)
	if a.Src.Is4() {
		src, dst := a.Src.As4(), a.Dst.As4()
		b[1] = 4 << 4
		copy(b[16:], src[:])
		copy(b[32:], dst[:])
		return
	}
	src, dst := a.Src.As16(), a.Dst.As16()
	b[1] = 6 << 4
	copy(b[4:], src[:])
	copy(b[20:], dst[:])
}

// REP is the payload of a connection reply (IBA section 12.6.8).
type REP []byte

// REPFields are the fields of a REP.
type REPFields struct {
	Local, Remote  CommID
	QKey           uint32
	QPN            QPN
	EECN           uint32
	StartPSN       PSN // with which the *receiver* of the message starts to send
	Resources      uint8
	Depth          uint8
	TargetAckDelay uint8 // 5 bits
	Failover       uint8 // 2 bits
	FlowControl    bool
	RNRRetry       uint8 // 3 bits
	SRQ            bool
	GUID           uint64
	Private        [repPrivateLen]byte
}

// Fields returns all fields. Precondition: 232 bytes.
func (r REP) Fields() REPFields {
	be := binary.BigEndian
	f := REPFields{
		Local: CommID(be.Uint32(r)), Remote: CommID(be.Uint32(r[4:])), QKey: be.Uint32(r[8:]), QPN: QPN(uint24(r[12:])),
		EECN: uint24(r[16:]), StartPSN: PSN(uint24(r[20:])), Resources: r[24], Depth: r[25],
		TargetAckDelay: r[26] >> 3, Failover: r[26] >> 1 & 3, FlowControl: r[26]&1 != 0, RNRRetry: r[27] >> 5, SRQ: r[27]&0x10 != 0,
		GUID: be.Uint64(r[28:]),
	}
	copy(f.Private[:], r[36:])
	return f
}

// Encode writes all fields. Precondition: 232 zero bytes.
func (r REP) Encode(f *REPFields) {
	be := binary.BigEndian
	be.PutUint32(r, uint32(f.Local))
	be.PutUint32(r[4:], uint32(f.Remote))
	be.PutUint32(r[8:], f.QKey)
	be.PutUint32(r[12:], uint32(f.QPN)<<8)
	be.PutUint32(r[16:], f.EECN<<8)
	be.PutUint32(r[20:], uint32(f.StartPSN)<<8)
	r[24], r[25] = f.Resources, f.Depth
	r[26] = f.TargetAckDelay<<3 | f.Failover&3<<1 | bit(f.FlowControl, 1)
	r[27] = f.RNRRetry<<5 | bit(f.SRQ, 0x10)
	be.PutUint64(r[28:], f.GUID)
	copy(r[36:], f.Private[:])
}

// RejectReason says why a connection was refused (IBA section 12.6.7.2, table 108).
type RejectReason uint16

// The reasons that this package gives.
const (
	RejectNoQP             RejectReason = 1
	RejectNoResources      RejectReason = 3
	RejectTimeout          RejectReason = 4
	RejectUnsupported      RejectReason = 5
	RejectInvalidCommID    RejectReason = 6
	RejectInvalidService   RejectReason = 8
	RejectInvalidTransport RejectReason = 9
	RejectStale            RejectReason = 10
	RejectInvalidGID       RejectReason = 13
	RejectInvalidMTU       RejectReason = 26
	RejectConsumer         RejectReason = 28
)

// String returns the specification's description.
func (r RejectReason) String() string {
	switch r {
	case RejectNoQP:
		return "no queue pair available"
	case RejectNoResources:
		return "no resources available"
	case RejectTimeout:
		return "timeout"
	case RejectUnsupported:
		return "unsupported request"
	case RejectInvalidCommID:
		return "invalid communication ID"
	case RejectInvalidService:
		return "invalid service ID"
	case RejectInvalidTransport:
		return "invalid transport service type"
	case RejectStale:
		return "stale connection"
	case RejectInvalidGID:
		return "invalid primary GID"
	case RejectInvalidMTU:
		return "path MTU not acceptable"
	case RejectConsumer:
		return "consumer reject"
	}
	return fmt.Sprintf("reason %d", uint16(r))
}

// REJ is the payload of a refusal (IBA section 12.6.7).
type REJ []byte

// REJFields are the fields of a REJ.
type REJFields struct {
	Local, Remote CommID
	Message       uint8 // 2 bits: what is refused; 0 a REQ, 1 a REP, 2 none of both
	InfoLength    uint8 // 7 bits
	Reason        RejectReason
	Info          [rejInfoLen]byte
	Private       [rejPrivateLen]byte
}

// Fields returns all fields. Precondition: 232 bytes.
func (r REJ) Fields() REJFields {
	be := binary.BigEndian
	f := REJFields{Local: CommID(be.Uint32(r)), Remote: CommID(be.Uint32(r[4:])), Message: r[8] >> 6, InfoLength: r[9] >> 1,
		Reason: RejectReason(be.Uint16(r[10:]))}
	copy(f.Info[:], r[12:])
	copy(f.Private[:], r[12+rejInfoLen:])
	return f
}

// Encode writes all fields. Precondition: 232 zero bytes.
func (r REJ) Encode(f *REJFields) {
	be := binary.BigEndian
	be.PutUint32(r, uint32(f.Local))
	be.PutUint32(r[4:], uint32(f.Remote))
	r[8], r[9] = f.Message<<6, f.InfoLength<<1
	be.PutUint16(r[10:], uint16(f.Reason))
	copy(r[12:], f.Info[:])
	copy(r[12+rejInfoLen:], f.Private[:])
}

// MRA is the payload of a message receipt acknowledgement: the answer will take longer (IBA section 12.6.6).
type MRA []byte

// Message returns what was received: 0 a REQ, 1 a REP, 2 a load of an alternate path.
func (m MRA) Message() uint8 { return m[8] >> 6 }

// ServiceTimeout returns the 5-bit timeout code for which the sender asks.
func (m MRA) ServiceTimeout() uint8 { return m[9] >> 3 }

// Encode writes the fields behind the communication IDs. Precondition: 232 zero bytes.
func (m MRA) Encode(message, timeout uint8) { m[8], m[9] = message<<6, timeout<<3 }

// DREQ is the payload of a disconnect request (IBA section 12.6.10).
type DREQ []byte

// RemoteQPN returns the receiver's queue pair.
func (d DREQ) RemoteQPN() QPN { return QPN(uint24(d[8:])) }

// Encode writes the field behind the communication IDs. Precondition: 232 zero bytes.
func (d DREQ) Encode(remote QPN) { putUint24(d[8:], uint32(remote)) }
