package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lateLines is how many lines wait for a slow console.
	lateLines = 4096
	// promptLine is how many bytes any terminal or pipe takes at once that poll(2) calls writable: a terminal has then less than 256 of its 4096
	// waiting (n_tty_poll), a pipe has a page free.
	promptLine = 1024
)

// A lateWriter hands lines on without making anybody wait: the console of a machine like the agent's is a serial port, on which a line of
// 120 bytes takes 10 ms at 115200 baud, and what is logged stands in the way of what is done. What the console takes at once is written at once, for
// the thread that writes the rest has to wait for its turn. Lines that find no room are counted, and the count is written in their place.
type lateWriter struct {
	lines   chan []byte
	waiting atomic.Int64  // lines that were handed over and are not written
	done    chan struct{} // closed when Flush's turn has come
	lost    atomic.Uint64

	mu      sync.Mutex // held by who writes, or hands a line over
	w       io.Writer
	console int // its file descriptor; -1 if it has none
}

func newLateWriter(w io.Writer) *lateWriter {
	l := &lateWriter{lines: make(chan []byte, lateLines), done: make(chan struct{}), w: w, console: -1}
	if f, ok := w.(*os.File); ok {
		l.console = int(f.Fd())
	}
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
			l.waiting.Add(-1)
		}
	}()
	return l
}

// Write implements io.Writer. It never fails and never waits.
func (l *lateWriter) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting.Load() == 0 && len(line) <= promptLine && l.ready() {
		_, _ = l.w.Write(line)
		return len(line), nil
	}
	select {
	case l.lines <- append([]byte{}, line...):
		l.waiting.Add(1)
	default:
		l.lost.Add(1)
	}
	return len(line), nil
}

// ready reports whether the console takes a line at once.
func (l *lateWriter) ready() bool {
	if l.console < 0 {
		return false
	}
	fds := []unix.PollFd{{Fd: int32(l.console), Events: unix.POLLOUT}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents == unix.POLLOUT
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
