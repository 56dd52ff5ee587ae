package export

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// The health page, version 1. All numbers are little endian. A page is append-only: what is here never moves or changes its
// meaning within a version; readers must take any value in what is reserved.
//
//	   0  8  summary, a page by itself for who reads 8 bytes only:
//	         byte 0 version (1), 1 verdict, 2 phase, 3 open findings (255: that many or more), 4 to 7 beat: rises by one (mod 2^32)
//	         each time that the page is written, so one that stands still means that the agent does
//	   8  8  sequence of the page, as it was written last
//	  16  8  "BDHEALTH"
//	  24  8  restart: random, another one at each start of the agent
//	  32  8  when the page was written, by the agent's clock, ns since 1970
//	  40  8  when the host last showed life, likewise; 0 if not since the attach
//	  48  8  passes that the agent made over the host
//	  56  8  how long the last pass took, ns
//	  64  8  number of the newest record in the journal
//	  72  4  flags: 1 the host's kernel is dead, 2 the agent may change the host, 4 a repair is under way
//	  76  2  confidence in the verdict, 0 to 10000
//	  78  1  CPUs in the table
//	  79  1  findings in the table
//	  80 48  reserved, 0
//	 128     64 entries of 16 bytes, one for each CPU: 4 its number, 1 flags (1 online, 2 idle), 3 reserved, 8 progress: changes
//	         whenever the CPU did anything (sum of its context switches, interrupts and timer interrupts)
//	1152     16 entries of 176 bytes, one for each open finding, the newest first: 1 severity (1 warning, 2 critical), 1 reserved,
//	         2 confidence 0 to 10000, 4 reserved, 8 first seen, ns since 1970, 40 its Id, 120 its title; texts are UTF-8, cut to
//	         fit, padded with zero bytes
//	3968 112 reserved, 0
//	4080  4  reserved, 0
//	4084  4  CRC-32C (Castagnoli) of bytes 0 to 4083
//	4088  8  sequence: that of byte 8
//
// The writer stores the sequence behind the page, then the page from its end to its beginning; a reader that reads in ascending
// order and finds both sequences alike has a page of one piece. Over a network that repeats and reorders packets the CRC says so.
const (
	PageSize    = 4096
	PageVersion = 1

	pageMagic = "BDHEALTH"

	offSequence = 8
	offMagic    = 16
	offRestart  = 24
	offWritten  = 32
	offMoved    = 40
	offPasses   = 48
	offTook     = 56
	offJournal  = 64
	offFlags    = 72
	offSure     = 76
	offCPUs     = 78
	offFindings = 79
	offCPUTable = 128
	cpuEntry    = 16
	maxCPUs     = 64
	offTable    = offCPUTable + maxCPUs*cpuEntry
	findEntry   = 176
	maxFindings = 16
	idLen       = 40
	titleLen    = 120
	offCRC      = 4084
	offEnd      = 4088
)

// Verdict is the judgement about the host: one of three, and the first is never health.
type Verdict uint8

// The verdicts.
const (
	CouldNotTell Verdict = iota
	Healthy
	Ill
)

// String returns the verdict in words.
func (v Verdict) String() string {
	switch v {
	case Healthy:
		return "healthy"
	case Ill:
		return "ill"
	}
	return "could not tell"
}

// Phase is how far the agent is with the host.
type Phase uint8

// The phases.
const (
	NoMemory Phase = iota
	Searching
	Attached
	Lost
)

// String returns the phase as the engine calls it.
func (p Phase) String() string {
	if int(p) < len(phases) {
		return phases[p]
	}
	return fmt.Sprintf("phase %d", uint8(p))
}

var phases = [...]string{"no-memory", "searching", "attached", "lost"}

// Flags of a health page.
const (
	FlagDead    uint32 = 1 << iota // the host's kernel is dead
	FlagWrites                     // the agent may change the host
	FlagHealing                    // a repair is under way
)

// Summary is the first word of the page.
type Summary struct {
	Version  uint8   `json:"version"`
	Verdict  Verdict `json:"verdict"`
	Phase    Phase   `json:"phase"`
	Findings uint8   `json:"findings"` // open ones; 255 means at least as many
	Beat     uint32  `json:"beat"`
}

// ParseSummary takes the first 8 bytes of a page apart.
func ParseSummary(b []byte) (Summary, error) {
	if len(b) < 8 {
		return Summary{}, fmt.Errorf("health page: %d bytes are too short for the summary: %w", len(b), io.ErrUnexpectedEOF)
	}
	s := Summary{b[0], Verdict(b[1]), Phase(b[2]), b[3], binary.LittleEndian.Uint32(b[4:])}
	if s.Version != PageVersion || s.Verdict > Ill || s.Phase > Lost {
		return Summary{}, fmt.Errorf("health page: the summary % x is none of version %d", b[:8], PageVersion)
	}
	return s, nil
}

// Health is what a health page says.
type Health struct {
	Summary
	Sequence   uint64          `json:"sequence"`
	Restart    uint64          `json:"restart"`
	Written    time.Time       `json:"written"`
	Moved      time.Time       `json:"moved,omitzero"` // when the host last showed life
	Passes     uint64          `json:"passes"`
	Took       time.Duration   `json:"took"`
	Journal    uint64          `json:"journal"` // number of the newest record
	Flags      uint32          `json:"flags"`
	Confidence float64         `json:"confidence"` // in the verdict, 0 to 1
	CPUs       []CPUHealth     `json:"cpus"`
	Open       []FindingHealth `json:"open"`
}

// CPUHealth is the progress of one of the host's CPUs.
type CPUHealth struct {
	ID           uint32 `json:"id"`
	Online, Idle bool
	Progress     uint64 `json:"progress"`
}

// FindingHealth is an open finding.
type FindingHealth struct {
	Critical   bool      `json:"critical"`
	Confidence float64   `json:"confidence"`
	FirstSeen  time.Time `json:"firstSeen"`
	ID         string    `json:"id"`
	Title      string    `json:"title"`
}

// ErrTornPage means that a health page was read while it was written: read it again.
var ErrTornPage = errors.New("health page: read while it was written")

// ParsePage takes a page apart. The error wraps ErrTornPage if it is not of one piece.
func ParsePage(b []byte) (h Health, err error) {
	if len(b) != PageSize {
		return h, fmt.Errorf("health page: %d bytes, want %d: %w", len(b), PageSize, io.ErrUnexpectedEOF)
	}
	le := binary.LittleEndian
	if le.Uint64(b[offSequence:]) != le.Uint64(b[offEnd:]) || crc32.Checksum(b[:offCRC], castagnoli) != le.Uint32(b[offCRC:]) {
		return h, ErrTornPage
	}
	if string(b[offMagic:][:8]) != pageMagic {
		return h, fmt.Errorf("health page: it begins with %q, want %q", b[offMagic:][:8], pageMagic)
	}
	if h.Summary, err = ParseSummary(b); err != nil {
		return Health{}, err
	}
	cpus, findings := int(b[offCPUs]), int(b[offFindings])
	if cpus > maxCPUs || findings > maxFindings {
		return Health{}, fmt.Errorf("health page: %d CPUs and %d findings do not fit", cpus, findings)
	}
	h.Sequence, h.Restart, h.Passes = le.Uint64(b[offSequence:]), le.Uint64(b[offRestart:]), le.Uint64(b[offPasses:])
	h.Written, h.Moved = moment(le.Uint64(b[offWritten:])), moment(le.Uint64(b[offMoved:]))
	h.Took, h.Journal = time.Duration(le.Uint64(b[offTook:])), le.Uint64(b[offJournal:])
	h.Flags, h.Confidence = le.Uint32(b[offFlags:]), float64(le.Uint16(b[offSure:]))/sure
	for i := range cpus {
		e := b[offCPUTable+i*cpuEntry:][:cpuEntry]
		h.CPUs = append(h.CPUs, CPUHealth{le.Uint32(e), e[4]&1 != 0, e[4]&2 != 0, le.Uint64(e[8:])})
	}
	for i := range findings {
		e := b[offTable+i*findEntry:][:findEntry]
		h.Open = append(h.Open, FindingHealth{
			Critical: e[0] == 2, Confidence: float64(le.Uint16(e[2:])) / sure, FirstSeen: moment(le.Uint64(e[8:])),
			ID: text(e[16:][:idLen]), Title: text(e[16+idLen:][:titleLen]),
		})
	}
	return h, nil
}

const sure = 10000 // of confidence 1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func moment(ns uint64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(ns)).UTC()
}

func nanoseconds(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.UnixNano())
}

func confidence(f float64) uint16 { return uint16(math.Round(min(max(f, 0), 1) * sure)) }

// text returns what stands before the padding.
func text(b []byte) string {
	n := len(b)
	for n > 0 && b[n-1] == 0 {
		n--
	}
	return string(b[:n])
}

// cut puts as much of s into b as fits without cutting a character in two.
func cut(b []byte, s string) {
	for i, r := range s {
		if i+len(string(r)) > len(b) {
			s = s[:i]
			break
		}
	}
	copy(b, s)
}

// append appends h as a page.
func (h *Health) append(to []byte) []byte {
	start := len(to)
	to = append(to, make([]byte, PageSize)...)
	b := to[start:]
	le := binary.LittleEndian
	b[0], b[1], b[2], b[3] = PageVersion, byte(h.Verdict), byte(h.Phase), h.Findings
	le.PutUint32(b[4:], h.Beat)
	le.PutUint64(b[offSequence:], h.Sequence)
	copy(b[offMagic:], pageMagic)
	le.PutUint64(b[offRestart:], h.Restart)
	le.PutUint64(b[offWritten:], nanoseconds(h.Written))
	le.PutUint64(b[offMoved:], nanoseconds(h.Moved))
	le.PutUint64(b[offPasses:], h.Passes)
	le.PutUint64(b[offTook:], uint64(h.Took))
	le.PutUint64(b[offJournal:], h.Journal)
	le.PutUint32(b[offFlags:], h.Flags)
	le.PutUint16(b[offSure:], confidence(h.Confidence))
	cpus, open := h.CPUs[:min(len(h.CPUs), maxCPUs)], h.Open[:min(len(h.Open), maxFindings)]
	b[offCPUs], b[offFindings] = byte(len(cpus)), byte(len(open))
	for i, c := range cpus {
		e := b[offCPUTable+i*cpuEntry:]
		le.PutUint32(e, c.ID)
		if c.Online {
			e[4] |= 1
		}
		if c.Idle {
			e[4] |= 2
		}
		le.PutUint64(e[8:], c.Progress)
	}
	for i, f := range open {
		e := b[offTable+i*findEntry:]
		e[0] = 1
		if f.Critical {
			e[0] = 2
		}
		le.PutUint16(e[2:], confidence(f.Confidence))
		le.PutUint64(e[8:], nanoseconds(f.FirstSeen))
		cut(e[16:][:idLen], f.ID)
		cut(e[16+idLen:][:titleLen], f.Title)
	}
	le.PutUint32(b[offCRC:], crc32.Checksum(b[:offCRC], castagnoli))
	le.PutUint64(b[offEnd:], h.Sequence)
	return to
}

// stores yields the offsets of a page's words in the order in which they are to be stored, which lets readers see that they read
// while it was written.
func stores(yield func(off int) bool) {
	for off := PageSize - 8; off >= 0 && yield(off); off -= 8 {
	}
}

// store puts a page where peers read it.
func store(to *roce.Buffer, page []byte) {
	for off := range stores {
		to.WriteAt(page[off:off+8], int64(off)) // within the buffer: no error
	}
}
