package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
)

// A Digest is a SHA-256 digest: of something measured, or a PCR's value.
type Digest [sha256.Size]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText gives the digest in hexadecimal.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText takes 64 hexadecimal digits.
func (d *Digest) UnmarshalText(b []byte) error {
	if hex.DecodedLen(len(b)) != len(d) || len(b)%2 != 0 {
		return fmt.Errorf("a digest has %d hexadecimal digits, not %d", 2*len(d), len(b))
	}
	_, err := hex.Decode(d[:], b)
	return err
}

// Extended returns the PCR's value after m has been measured into it.
func (d Digest) Extended(m Digest) Digest {
	return sha256.Sum256(append(d[:], m[:]...))
}

// An EventType says what an event's data are (TCG PC Client Platform Firmware Profile 1.06, section 10.4.1).
type EventType uint32

// The event types that this package knows. Others are carried along.
const (
	EventNoAction EventType = 0x3 // measured into no PCR
	EventTag      EventType = 0x6 // EV_EVENT_TAG: what an operating system tells of itself
	EventIPL      EventType = 0xd // EV_IPL: what a boot loader loads
)

// An Event is one measurement.
type Event struct {
	PCR    int
	Type   EventType
	Digest Digest // what the PCR was extended with
	Data   []byte // what was measured, or a text that says so
}

// A Log is what was measured since the machine's reset, in order.
type Log []Event

// PCRs is the number of platform configuration registers that a log may name (TPM 2.0 PC Client profile).
const PCRs = 24

const (
	maxLog    = 1 << 20
	maxEvents = 4096
	maxData   = 256 << 10
	algSHA256 = 0x000b
)

var specID = []byte("Spec ID Event03\x00")

// AppendHeader appends the first event of a crypto-agile log, TCG_PCR_EVENT with TCG_EfiSpecIDEvent, which says that
// SHA-256 is its only algorithm.
func appendHeader(b []byte) []byte {
	event := bytes.Clone(specID)
	event = binary.LittleEndian.AppendUint32(event, 0) // platform class: client
	event = append(event, 0, 2, 0, 2)                  // version 2.0, errata 0, UINTN of 64 bits
	event = binary.LittleEndian.AppendUint32(event, 1)
	event = binary.LittleEndian.AppendUint16(event, algSHA256)
	event = binary.LittleEndian.AppendUint16(event, sha256.Size)
	event = append(event, 0) // no vendor information
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(EventNoAction))
	b = append(b, make([]byte, 20)...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(event)))
	return append(b, event...)
}

// MarshalBinary returns the log in the format of the TCG PC Client Platform Firmware Profile, section 10 (crypto agile, as
// /sys/kernel/security/tpm0/binary_bios_measurements has it), with SHA-256 digests.
func (l Log) MarshalBinary() ([]byte, error) {
	b := appendHeader(nil)
	for i, e := range l {
		if e.PCR < 0 || e.PCR >= PCRs || len(e.Data) > maxData {
			return nil, fmt.Errorf("event %d: PCR %d with %d bytes cannot be in a log", i, e.PCR, len(e.Data))
		}
		b = e.append(b)
	}
	if len(l) > maxEvents || len(b) > maxLog {
		return nil, fmt.Errorf("a log of %d events and %d bytes is too long", len(l), len(b))
	}
	return b, nil
}

// append appends the event as TCG_PCR_EVENT2.
func (e Event) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(e.PCR))
	b = binary.LittleEndian.AppendUint32(b, uint32(e.Type))
	b = binary.LittleEndian.AppendUint32(b, 1)
	b = binary.LittleEndian.AppendUint16(b, algSHA256)
	b = append(b, e.Digest[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Data)))
	return append(b, e.Data...)
}

// A reader takes a log apart; the first read beyond its end sets short, and all later ones return zeros.
type reader struct {
	rest  []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if r.short || n > len(r.rest) {
		r.short = true
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) u8() int {
	if b := r.take(1); b != nil {
		return int(b[0])
	}
	return 0
}

func (r *reader) u16() int {
	if b := r.take(2); b != nil {
		return int(binary.LittleEndian.Uint16(b))
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

var errShort = errors.New("the event log is cut off")

// ParseLog reads a crypto-agile log of at most 1 MiB and 4096 events. Of an event's digests it keeps SHA-256; a log without
// is an error.
func ParseLog(b []byte) (Log, error) {
	if len(b) > maxLog {
		return nil, fmt.Errorf("the event log has %d bytes; at most %d are read", len(b), maxLog)
	}
	r := &reader{rest: b}
	sizes, err := parseHeader(r)
	if err != nil {
		return nil, err
	}
	if sizes[algSHA256] != sha256.Size {
		return nil, errors.New("the event log has no SHA-256 digests")
	}
	log := Log{}
	for len(r.rest) > 0 {
		if len(log) == maxEvents {
			return nil, fmt.Errorf("the event log has more than %d events", maxEvents)
		}
		e := Event{}
		pcr := r.u32()
		e.Type = EventType(r.u32())
		n := r.u32()
		if r.short {
			return nil, fmt.Errorf("event %d: %w", len(log), errShort)
		}
		if pcr >= PCRs {
			return nil, fmt.Errorf("event %d: there is no PCR %d", len(log), pcr)
		}
		if int64(n) > int64(len(sizes)) {
			return nil, fmt.Errorf("event %d has %d digests, and the log has %d algorithms", len(log), n, len(sizes))
		}
		e.PCR = int(pcr)
		found := false
		for range n {
			alg := r.u16()
			size, known := sizes[alg]
			if !known && !r.short {
				return nil, fmt.Errorf("event %d: algorithm %#x is not among the log's", len(log), alg)
			}
			d := r.take(size)
			if alg == algSHA256 && d != nil {
				if found {
					return nil, fmt.Errorf("event %d has two SHA-256 digests", len(log))
				}
				e.Digest, found = Digest(d), true
			}
		}
		size := r.u32()
		if size > maxData {
			return nil, fmt.Errorf("event %d has %d bytes of data; at most %d are read", len(log), size, maxData)
		}
		e.Data = bytes.Clone(r.take(int(size)))
		if r.short {
			return nil, fmt.Errorf("event %d: %w", len(log), errShort)
		}
		if !found {
			return nil, fmt.Errorf("event %d has no SHA-256 digest", len(log))
		}
		log = append(log, e)
	}
	return log, nil
}

// parseHeader returns the digest sizes of the log's algorithms.
func parseHeader(r *reader) (map[int]int, error) {
	_, kind := r.u32(), r.u32()
	r.take(20)
	size := r.u32()
	if int64(size) > int64(len(r.rest)) {
		return nil, errShort
	}
	event := &reader{rest: r.take(int(size))}
	if r.short {
		return nil, errShort
	}
	if sig := event.take(len(specID)); EventType(kind) != EventNoAction || !bytes.Equal(sig, specID) {
		return nil, errors.New("the event log does not begin with a TCG Spec ID Event03")
	}
	event.take(8) // platform class, version, size of UINTN
	n := event.u32()
	if n == 0 || n > 16 {
		return nil, fmt.Errorf("the event log has %d algorithms", n)
	}
	sizes := map[int]int{}
	for range n {
		alg, size := event.u16(), event.u16()
		if size == 0 || size > 64 {
			return nil, fmt.Errorf("the event log's algorithm %#x has digests of %d bytes", alg, size)
		}
		if _, twice := sizes[alg]; twice {
			return nil, fmt.Errorf("the event log names algorithm %#x twice", alg)
		}
		sizes[alg] = size
	}
	event.take(event.u8())
	if event.short {
		return nil, errShort
	}
	return sizes, nil
}

// Replay returns the value that the PCR has after the log's events, if it was zero before them.
func (l Log) Replay(pcr int) Digest {
	var d Digest
	for _, e := range l {
		if e.PCR == pcr && e.Type != EventNoAction {
			d = d.Extended(e.Digest)
		}
	}
	return d
}
