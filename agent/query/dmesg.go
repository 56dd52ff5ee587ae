package query

import (
	"context"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Log is the answer to "what did the kernel say?", the oldest record first.
type Log struct {
	At      time.Time          `json:"at"` // the reader's clock
	Records []kernel.LogRecord `json:"records"`
	// Next is the sequence number behind the newest record, wanted or not. If it is less than an earlier answer's, the host
	// has booted anew and counts from zero.
	Next     uint64   `json:"next"`
	Complete bool     `json:"complete"`
	Doubts   []string `json:"doubts,omitempty"`
	// Confidence is how sure it is that the records were read whole.
	Confidence Confidence `json:"confidence,omitzero"`
}

// DmesgOptions tune Dmesg. The zero value reads the whole ring.
type DmesgOptions struct {
	// From is the first sequence number wanted: the Next of the answer before follows a log.
	From uint64
	// MaxLevel keeps records of this priority and more urgent ones (0 is an emergency, 7 debug); nil keeps all.
	MaxLevel *uint8
}

// An answer holds at most maxText bytes of text and maxRecords records, the newest: more than a kernel's ring holds by any
// distribution's settings, and less than what a hostile host can make up would take of a small machine.
const (
	maxText    = 16 << 20
	maxRecords = 1 << 17
)

// Dmesg reads the printk ring of the host. It errors only if nothing at all could be read.
func Dmesg(ctx context.Context, v View, o DmesgOptions) (Log, error) {
	l := Log{At: time.Now(), Complete: true, Records: []kernel.LogRecord{}}
	before := v.Confidence()
	var why doubts
	var first error
	read, text, cut := 0, 0, 0
	for r, err := range v.Log() {
		if why.canceled(ctx) {
			l.Complete = false
			first = ctx.Err()
			break
		}
		if err != nil {
			l.Complete = false
			if first == nil {
				first = err
			}
			why.add(fmt.Sprintf("read log: %v", err))
			continue
		}
		read++
		l.Next = r.Seq + 1
		if r.Seq < o.From || o.MaxLevel != nil && r.Level > *o.MaxLevel {
			continue
		}
		l.Records = append(l.Records, r)
		for text += len(r.Text); text > maxText || len(l.Records) > maxRecords; cut++ {
			text -= len(l.Records[0].Text)
			l.Records[0] = kernel.LogRecord{} // lets go of its text
			l.Records = l.Records[1:]
		}
	}
	if cut > 0 {
		l.Complete = false
		why.add(fmt.Sprintf("the log is too long: its oldest %d records are left out", cut))
	}
	if read == 0 && first != nil {
		return Log{}, fmt.Errorf("read kernel log: %w", first)
	}
	l.Doubts, l.Confidence = why, confidence(v, before)
	return l, nil
}
