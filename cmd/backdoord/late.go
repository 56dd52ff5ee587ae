package main

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// lateLines is how many lines wait for a slow console.
const lateLines = 4096

// A lateWriter hands lines on without making anybody wait: the console of a machine like the agent's is a serial port, on which a line of
// 120 bytes takes 10 ms at 115200 baud, and what is logged stands in the way of what is done. Lines that find no room are counted, and the
// count is written in their place.
type lateWriter struct {
	lines chan []byte
	done  chan struct{} // closed when Flush's turn has come
	lost  atomic.Uint64
}

func newLateWriter(w io.Writer) *lateWriter {
	l := &lateWriter{lines: make(chan []byte, lateLines), done: make(chan struct{})}
	go func() {
		for line := range l.lines {
			if line == nil { // of Flush
				close(l.done)
				return
			}
			_, _ = w.Write(line) // a console that is gone is told nothing
			if n := l.lost.Swap(0); n > 0 {
				fmt.Fprintf(w, "backdoord: the console is too slow: %d lines are missing here\n", n)
			}
		}
	}()
	return l
}

// Write implements io.Writer. It never fails and never waits.
func (l *lateWriter) Write(line []byte) (int, error) {
	select {
	case l.lines <- append([]byte{}, line...):
	default:
		l.lost.Add(1)
	}
	return len(line), nil
}

// Flush waits until all is written that was handed over, but no longer than wait. It is called once, at the end: what comes later is lost.
func (l *lateWriter) Flush(wait time.Duration) {
	late := time.After(wait)
	select {
	case l.lines <- nil:
	case <-late:
		return
	}
	select {
	case <-l.done:
	case <-late:
	}
}
