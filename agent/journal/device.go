// Package journal keeps an append-only, hash-chained record of every decision and every byte that was changed on a host.
//
// A record is durable when Append returns. Power may fail after any block: what was acknowledged stays, what was not is
// either there whole or not at all. The journal lives in a fixed amount of space and drops its oldest records. The layout
// and the crash cases are in DESIGN.md.
package journal

import (
	"encoding/json"
	"io"
	"time"
)

// Device is where a journal lives: a file, a partition, or memory in a test.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error // returns when everything written is durable
}

// Record is one entry. Append sets Restart and Seq, and Time if it is zero.
type Record struct {
	Restart uint64          `json:"restart"` // random, new each time the journal is opened for writing
	Seq     uint64          `json:"seq"`     // from 1, without gaps over the journal's whole life
	Time    time.Time       `json:"time"`
	Kind    string          `json:"kind"` // "intent", "store", "outcome", "finding", …
	Data    json.RawMessage `json:"data,omitempty"`
}
