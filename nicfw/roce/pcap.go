package roce

import (
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"net/netip"
	"sync"
	"time"
)

// The classic capture file format, microseconds, Ethernet (draft-ietf-opsawg-pcap).
const (
	pcapMagic     = 0xa1b2c3d4
	pcapHeaderLen = 24
	pcapRecordLen = 16
	pcapEthernet  = 1
	pcapSnapLen   = 1 << 16
)

// ReadPCAP yields the frames of a capture file with the times that they were seen at. It ends with an error that wraps
// ErrMalformed at the first bytes that are no record.
func ReadPCAP(r io.Reader) iter.Seq2[CapturedFrame, error] {
	return func(yield func(CapturedFrame, error) bool) {
		var head [pcapHeaderLen]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			yield(CapturedFrame{}, fmt.Errorf("read capture header: %w", err))
			return
		}
		var order binary.ByteOrder = binary.LittleEndian
		if order.Uint32(head[:]) != pcapMagic {
			order = binary.BigEndian
		}
		if order.Uint32(head[:]) != pcapMagic || order.Uint32(head[20:]) != pcapEthernet {
			yield(CapturedFrame{}, fmt.Errorf("%w capture: not Ethernet with microseconds", ErrMalformed))
			return
		}
		for {
			var rec [pcapRecordLen]byte
			if _, err := io.ReadFull(r, rec[:]); err == io.EOF {
				return
			} else if err != nil {
				yield(CapturedFrame{}, fmt.Errorf("read capture record: %w", err))
				return
			}
			n := order.Uint32(rec[8:])
			if n > pcapSnapLen {
				yield(CapturedFrame{}, fmt.Errorf("%w capture: record of %d bytes", ErrMalformed, n))
				return
			}
			f := CapturedFrame{
				Time: time.Unix(int64(order.Uint32(rec[:])), int64(order.Uint32(rec[4:]))*1000),
				Data: make([]byte, n),
			}
			if _, err := io.ReadFull(r, f.Data); err != nil {
				yield(f, fmt.Errorf("read captured frame: %w", err))
				return
			}
			if !yield(f, nil) {
				return
			}
		}
	}
}

// CapturedFrame is one record of a capture file.
type CapturedFrame struct {
	Time time.Time
	Data []byte // from the Ethernet header on
}

// Capture returns a link that does what l does and writes every packet that passes into a capture file, with made-up
// Ethernet and IP headers and a right ICRC. The first error of w ends the capture, not the link.
func Capture(l Link, w io.Writer) Link {
	c := &capture{Link: l, w: w}
	head := binary.LittleEndian.AppendUint32(nil, pcapMagic)
	head = binary.LittleEndian.AppendUint16(head, 2)
	head = binary.LittleEndian.AppendUint16(head, 4)
	head = append(head, make([]byte, 8)...)
	head = binary.LittleEndian.AppendUint32(head, pcapSnapLen)
	head = binary.LittleEndian.AppendUint32(head, pcapEthernet)
	_, c.err = w.Write(head)
	return c
}

type capture struct {
	Link
	mu    sync.Mutex
	w     io.Writer // guarded by mu
	err   error     // of w; guarded by mu
	check checker   // guarded by mu
	buf   []byte    // guarded by mu
}

// Counters returns those of the link underneath.
func (c *capture) Counters() LinkCounters {
	if l, ok := c.Link.(interface{ Counters() LinkCounters }); ok {
		return l.Counters()
	}
	return LinkCounters{}
}

func (c *capture) Send(packets []Packet) error {
	for i := range packets {
		c.record(c.LocalAddr(), packets[i].Peer, packets[i].Data)
	}
	return c.Link.Send(packets)
}

func (c *capture) Recv(packets []Packet, wait time.Duration) (int, error) {
	n, err := c.Link.Recv(packets, wait)
	for i := range n {
		c.record(packets[i].Peer, c.LocalAddr(), packets[i].Data)
	}
	return n, err
}

// record writes one packet.
func (c *capture) record(src, dst netip.AddrPort, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	f := Frame{UDP: UDPFields{SrcPort: src.Port(), DstPort: dst.Port()}}
	if src.Addr().Is4() {
		f.V4 = IPv4Fields{Flags: DontFragment, TTL: defaultHopLimit, Src: src.Addr(), Dst: dst.Addr()}
	} else {
		f.V6 = IPv6Fields{HopLimit: defaultHopLimit, Src: src.Addr(), Dst: dst.Addr()}
	}
	f.Data = binary.LittleEndian.AppendUint32(append([]byte(nil), data...), c.check.sum(src, dst, 0, DontFragment, data))
	c.buf = f.Append(append(c.buf[:0], make([]byte, pcapRecordLen)...))
	now := time.Now()
	n := uint32(len(c.buf) - pcapRecordLen)
	for i, v := range []uint32{uint32(now.Unix()), uint32(now.Nanosecond() / 1000), n, n} {
		binary.LittleEndian.PutUint32(c.buf[4*i:], v)
	}
	_, c.err = c.w.Write(c.buf)
}
