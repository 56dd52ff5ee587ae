package lab

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Line is a line of a serial console.
type Line struct {
	At   time.Time // when its last byte arrived
	Text string    // without line end and without carriage returns
}

// maxConsole bounds the lines that a console keeps; the file in the run directory has them all.
const maxConsole = 20000

// Console is the captured serial console of a machine over all its boots. It is safe for concurrent use.
type Console struct {
	mu      sync.Mutex
	lines   []Line            // guarded by mu
	first   int               // guarded by mu; index of lines[0] among all lines ever
	partial []byte            // guarded by mu
	changed chan struct{}     // guarded by mu; closed and replaced at each line
	log     io.Writer         // guarded by mu; gets the raw bytes
	input   io.Writer         // guarded by mu; nil while the machine is off
	taps    map[int]io.Writer // guarded by mu; live viewers
	nextTap int               // guarded by mu
}

func newConsole(log io.Writer) *Console {
	return &Console{changed: make(chan struct{}), log: log, taps: make(map[int]io.Writer)}
}

// Mark is the position behind the last whole line: a place to wait from.
func (c *Console) Mark() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first + len(c.lines)
}

// Since returns the lines from mark on that are still kept.
func (c *Console) Since(mark int) []Line {
	c.mu.Lock()
	defer c.mu.Unlock()
	if mark < c.first {
		mark = c.first
	}
	if mark >= c.first+len(c.lines) {
		return nil
	}
	return append([]Line(nil), c.lines[mark-c.first:]...)
}

// Tail returns the text of the last n lines, with an unfinished one.
func (c *Console) Tail(n int) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, l := range c.lines[max(0, len(c.lines)-n):] {
		out = append(out, l.Text)
	}
	if len(c.partial) > 0 {
		out = append(out, string(c.partial))
	}
	return out
}

// Wait returns the first line from mark on that matches, as soon as it is there.
func (c *Console) Wait(ctx context.Context, mark int, match *regexp.Regexp) (Line, error) {
	for {
		c.mu.Lock()
		for ; mark < c.first+len(c.lines); mark++ {
			if mark < c.first {
				mark = c.first
			}
			if l := c.lines[mark-c.first]; match.MatchString(l.Text) {
				c.mu.Unlock()
				return l, nil
			}
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return Line{}, fmt.Errorf("wait for %q on the console: %w", match, context.Cause(ctx))
		}
	}
}

// Write types on the console, as a keyboard would.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	in := c.input
	c.mu.Unlock()
	if in == nil {
		return 0, fmt.Errorf("type on the console: the machine is off")
	}
	return in.Write(p)
}

// Tap copies everything that the console says from now on to w until the returned function is called.
// A writer that blocks delays the machine.
func (c *Console) Tap(w io.Writer) (stop func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := c.nextTap
	c.nextTap++
	c.taps[id] = w
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.taps, id)
	}
}

func (c *Console) setInput(w io.Writer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.input = w
}

// feed takes what the machine said.
func (c *Console) feed(p []byte) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.log != nil {
		c.log.Write(p) // the copy in memory is what counts
	}
	for id, t := range c.taps {
		if _, err := t.Write(p); err != nil {
			delete(c.taps, id)
		}
	}
	c.partial = append(c.partial, p...)
	n := 0
	for {
		i := bytes.IndexByte(c.partial, '\n')
		if i < 0 {
			break
		}
		c.lines = append(c.lines, Line{At: now, Text: strings.ReplaceAll(string(c.partial[:i]), "\r", "")})
		c.partial = c.partial[i+1:]
		n++
	}
	if len(c.partial) > 64<<10 { // a machine that never ends its line
		c.lines = append(c.lines, Line{At: now, Text: string(c.partial)})
		c.partial = nil
		n++
	}
	if over := len(c.lines) - maxConsole; over > 0 {
		c.lines = append([]Line(nil), c.lines[over:]...)
		c.first += over
	}
	if n > 0 {
		close(c.changed)
		c.changed = make(chan struct{})
	}
}
