package roce

import (
	"encoding/binary"
	"fmt"
	"io"
	"iter"
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
