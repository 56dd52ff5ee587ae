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
	Began time.Time // when its first byte arrived; a serial port takes some 20 ms for a line
	At    time.Time // when its last byte arrived
	Text  string    // without line end and without carriage returns
}

// Console is the captured serial console of a machine over all its boots. It keeps the last 20,000 lines; the file in
// the run directory has them all. It is safe for concurrent use.
type Console struct {
	lines *trail[Line]

	mu      sync.Mutex
	partial []byte            // guarded by mu; the line that is not yet whole
	began   time.Time         // guarded by mu; when its first byte arrived
	log     io.Writer         // guarded by mu; gets the raw bytes
	input   io.Writer         // guarded by mu; nil while the machine is off
	taps    map[int]io.Writer // guarded by mu; live viewers
	nextTap int               // guarded by mu
}

func newConsole(log io.Writer) *Console {
	return &Console{lines: newTrail[Line](20000), log: log, taps: make(map[int]io.Writer)}
}

// Mark is the position behind the last whole line: a place to wait from.
func (c *Console) Mark() int { return c.lines.mark() }

// Since returns the lines from mark on that are still kept.
func (c *Console) Since(mark int) []Line { return c.lines.since(mark) }

// Wait returns the first line from mark on that matches, as soon as it is there.
func (c *Console) Wait(ctx context.Context, mark int, match *regexp.Regexp) (Line, error) {
	l, err := c.lines.wait(ctx, mark, func(l Line) bool { return match.MatchString(l.Text) })
	if err != nil {
		return Line{}, fmt.Errorf("wait for %q on the console: %w", match, err)
	}
	return l, nil
}

// Tail returns the text of the last n lines, with an unfinished one.
func (c *Console) Tail(n int) []string {
	var out []string
	for _, l := range c.lines.since(c.lines.mark() - n) {
		out = append(out, l.Text)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.partial) > 0 {
		out = append(out, string(c.partial))
	}
	return out
}

// Write types on the console, as a keyboard would.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	in := c.input
	c.mu.Unlock()
	if in == nil {
		return 0, fmt.Errorf("type on the console: %w", errOff)
	}
	return in.Write(p)
}

// Tap copies everything that the console says from now on to w until the returned function is called or w fails.
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

// maxLine bounds a line of a console in bytes; a longer one is cut.
const maxLine = 64 << 10

// feed takes what the machine said.
func (c *Console) feed(p []byte) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.log != nil {
		c.log.Write(p) // what the lab waits on is the copy in memory
	}
	for id, t := range c.taps {
		if _, err := t.Write(p); err != nil {
			delete(c.taps, id)
		}
	}
	if len(c.partial) == 0 {
		c.began = now
	}
	c.partial = append(c.partial, p...)
	var lines []Line
	for {
		i := bytes.IndexByte(c.partial, '\n')
		if i < 0 {
			break
		}
		lines = append(lines, Line{c.began, now, strings.ReplaceAll(string(c.partial[:i]), "\r", "")})
		c.partial, c.began = c.partial[i+1:], now
	}
	if len(c.partial) > maxLine {
		lines = append(lines, Line{c.began, now, string(c.partial)})
		c.partial = nil
	}
	c.lines.add(lines...)
}
