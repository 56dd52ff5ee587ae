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
}

// DmesgOptions tune Dmesg. The zero value reads the whole ring.
type DmesgOptions struct {
	// From is the first sequence number wanted: the Next of the answer before follows a log.
	From uint64
	// MaxLevel keeps records of this priority and more urgent ones (0 is an emergency, 7 debug); nil keeps all.
	MaxLevel *uint8
}

// Dmesg reads the printk ring of the host. It errors only if nothing at all could be read.
func Dmesg(ctx context.Context, v View, o DmesgOptions) (Log, error) {
	l := Log{At: time.Now(), Complete: true, Records: []kernel.LogRecord{}}
	var why doubts
	var first error
	read := 0
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
	}
	if read == 0 && first != nil {
		return Log{}, fmt.Errorf("read kernel log: %w", first)
	}
	l.Doubts = why
	return l, nil
}
