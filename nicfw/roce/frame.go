package roce

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// IPv4 is an IPv4 header without options (RFC 791).
type IPv4 []byte

// IPv4Fields are the fields of an IPv4 header for encoding; the checksum is computed.
type IPv4Fields struct {
	TOS      uint8
	Length   uint16 // header and payload, bytes
	ID       uint16
	Flags    uint16 // flags and fragment offset
	TTL      uint8
	Src, Dst netip.Addr
}

// DontFragment is the flag that RoCEv2 senders set.
const DontFragment = 0x4000

// Fields returns all fields. Precondition: at least 20 bytes.
func (h IPv4) Fields() IPv4Fields {
	return IPv4Fields{h[1], binary.BigEndian.Uint16(h[2:]), binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:]), h[8],
		netip.AddrFrom4([4]byte(h[12:])), netip.AddrFrom4([4]byte(h[16:]))}
}

// Encode writes f and the header checksum. Precondition: 20 bytes, and both addresses are IPv4.
func (h IPv4) Encode(f *IPv4Fields) {
	h[0], h[1] = 0x45, f.TOS
	binary.BigEndian.PutUint16(h[2:], f.Length)
	binary.BigEndian.PutUint16(h[4:], f.ID)
	binary.BigEndian.PutUint16(h[6:], f.Flags)
	h[8], h[9], h[10], h[11] = f.TTL, protocolUDP, 0, 0
	src, dst := f.Src.As4(), f.Dst.As4()
	copy(h[12:], src[:])
	copy(h[16:], dst[:])
	var sum uint32
	for i := 0; i < ipv4Len; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
}

// IPv6 is an IPv6 header (RFC 8200). The global route header of InfiniBand, which RoCEv2 replaces by it, has the same
// layout.
type IPv6 []byte

// IPv6Fields are the fields of an IPv6 header for encoding.
type IPv6Fields struct {
	Class    uint8
	Flow     uint32 // 20 bits
	Length   uint16 // payload, bytes
	HopLimit uint8
	Src, Dst netip.Addr
}

// Fields returns all fields. Precondition: at least 40 bytes.
func (h IPv6) Fields() IPv6Fields {
	first := binary.BigEndian.Uint32(h)
	return IPv6Fields{uint8(first >> 20), first & (1<<20 - 1), binary.BigEndian.Uint16(h[4:]), h[7],
		netip.AddrFrom16([16]byte(h[8:])), netip.AddrFrom16([16]byte(h[24:]))}
}

// Encode writes f. Precondition: 40 bytes.
func (h IPv6) Encode(f *IPv6Fields) {
	binary.BigEndian.PutUint32(h, 6<<28|uint32(f.Class)<<20|f.Flow&(1<<20-1))
	binary.BigEndian.PutUint16(h[4:], f.Length)
	h[6], h[7] = protocolUDP, f.HopLimit
	src, dst := f.Src.As16(), f.Dst.As16()
	copy(h[8:], src[:])
	copy(h[24:], dst[:])
}

// UDP is a UDP header (RFC 768).
type UDP []byte

// UDPFields are the fields of a UDP header for encoding. RoCEv2 senders may leave the checksum at 0.
type UDPFields struct {
	SrcPort, DstPort uint16
	Length           uint16 // header and payload, bytes
	Checksum         uint16
}

// Fields returns all fields. Precondition: at least 8 bytes.
func (h UDP) Fields() UDPFields {
	be := binary.BigEndian
	return UDPFields{be.Uint16(h), be.Uint16(h[2:]), be.Uint16(h[4:]), be.Uint16(h[6:])}
}

// Encode writes f. Precondition: 8 bytes.
func (h UDP) Encode(f *UDPFields) {
	be := binary.BigEndian
	be.PutUint16(h, f.SrcPort)
	be.PutUint16(h[2:], f.DstPort)
	be.PutUint16(h[4:], f.Length)
	be.PutUint16(h[6:], f.Checksum)
}

// Frame is an Ethernet frame with one RoCEv2 packet, as captures hold it.
type Frame struct {
	MAC      [12]byte // destination and source
	V4       IPv4Fields
	V6       IPv6Fields // in use if V4.Src is the zero Addr
	UDP      UDPFields
	Data     []byte // the UDP payload: BTH up to and including the ICRC
	IsRoCE   bool   // the destination port is 4791
	Fragment bool   // an IP fragment: Data is not a whole packet
}

// Src returns the sender's address and port.
func (f *Frame) Src() netip.AddrPort {
	if f.V4.Src.IsValid() {
		return netip.AddrPortFrom(f.V4.Src, f.UDP.SrcPort)
	}
	return netip.AddrPortFrom(f.V6.Src, f.UDP.SrcPort)
}

// Dst returns the receiver's address and port.
func (f *Frame) Dst() netip.AddrPort {
	if f.V4.Src.IsValid() {
		return netip.AddrPortFrom(f.V4.Dst, f.UDP.DstPort)
	}
	return netip.AddrPortFrom(f.V6.Dst, f.UDP.DstPort)
}

// CheckICRC reports whether the last four bytes of Data are the right ICRC for the headers of the frame.
func (f *Frame) CheckICRC() bool {
	if len(f.Data) < bthLen+icrcLen {
		return false
	}
	var c checker
	body := f.Data[:len(f.Data)-icrcLen]
	return c.sum(f.Src(), f.Dst(), f.V4.ID, f.V4.Flags, body) == binary.LittleEndian.Uint32(f.Data[len(body):])
}

// ParseFrame takes apart an Ethernet frame with UDP over IPv4 without options or IPv6 without extension headers. The
// error wraps ErrMalformed if it is anything else. Data aliases b.
func ParseFrame(b []byte) (Frame, error) {
	var f Frame
	if len(b) < ethernetLen {
		return f, fmt.Errorf("%w Ethernet frame: %d bytes", ErrMalformed, len(b))
	}
	copy(f.MAC[:], b)
	ip := b[ethernetLen:]
	var udp []byte
	switch t := binary.BigEndian.Uint16(b[12:]); {
	case t == etherTypeIPv4 && len(ip) >= ipv4Len && ip[0] == 0x45 && ip[9] == protocolUDP:
		f.V4 = IPv4(ip).Fields()
		f.Fragment = f.V4.Flags&^DontFragment != 0
		if int(f.V4.Length) < ipv4Len || int(f.V4.Length) > len(ip) {
			return f, fmt.Errorf("%w IPv4 packet: length %d of %d", ErrMalformed, f.V4.Length, len(ip))
		}
		udp = ip[ipv4Len:f.V4.Length]
	case t == etherTypeIPv6 && len(ip) >= ipv6Len && ip[0]>>4 == 6 && ip[6] == protocolUDP:
		f.V6 = IPv6(ip).Fields()
		if int(f.V6.Length) > len(ip)-ipv6Len {
			return f, fmt.Errorf("%w IPv6 packet: length %d of %d", ErrMalformed, f.V6.Length, len(ip)-ipv6Len)
		}
		udp = ip[ipv6Len : ipv6Len+int(f.V6.Length)]
	default:
		return f, fmt.Errorf("%w frame: not plain UDP over IP", ErrMalformed)
	}
	if len(udp) < udpLen {
		return f, fmt.Errorf("%w UDP datagram: %d bytes", ErrMalformed, len(udp))
	}
	f.UDP = UDP(udp).Fields()
	if int(f.UDP.Length) < udpLen || int(f.UDP.Length) > len(udp) {
		return f, fmt.Errorf("%w UDP datagram: length %d of %d", ErrMalformed, f.UDP.Length, len(udp))
	}
	f.Data = udp[udpLen:f.UDP.Length]
	f.IsRoCE = f.UDP.DstPort == Port
	return f, nil
}

// Append appends the frame to b and returns the extended slice. The lengths in the headers are taken from Data.
func (f *Frame) Append(b []byte) []byte {
	b = append(b, f.MAC[:]...)
	udp := f.UDP
	udp.Length = uint16(udpLen + len(f.Data))
	if f.V4.Src.IsValid() {
		ip := f.V4
		ip.Length = ipv4Len + udp.Length
		b = binary.BigEndian.AppendUint16(b, etherTypeIPv4)
		b = append(b, make([]byte, ipv4Len+udpLen)...)
		IPv4(b[len(b)-ipv4Len-udpLen:]).Encode(&ip)
	} else {
		ip := f.V6
		ip.Length = udp.Length
		b = binary.BigEndian.AppendUint16(b, etherTypeIPv6)
		b = append(b, make([]byte, ipv6Len+udpLen)...)
		IPv6(b[len(b)-ipv6Len-udpLen:]).Encode(&ip)
	}
	UDP(b[len(b)-udpLen:]).Encode(&udp)
	return append(b, f.Data...)
}
