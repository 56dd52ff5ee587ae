package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"
)

// slowConsole takes nothing before it is opened.
type slowConsole struct {
	open chan struct{}
	got  bytes.Buffer
}

func (c *slowConsole) Write(p []byte) (int, error) {
	<-c.open
	return c.got.Write(p)
}

func TestLateWriter(t *testing.T) {
	c := &slowConsole{open: make(chan struct{})}
	l := newLateWriter(c)
	const n = lateLines + 100
	line := []byte("line 0\n")
	for i := range n { // returns though nothing is taken
		line = fmt.Appendf(line[:0], "line %d\n", i)
		if k, err := l.Write(line); k != len(line) || err != nil {
			t.Fatalf("Write() = %d, %v", k, err)
		}
	}
	close(c.open)
	l.Flush(time.Minute)
	lines := strings.Split(strings.TrimSpace(c.got.String()), "\n")
	seen, lost := 0, 0
	for _, s := range lines {
		if s == fmt.Sprintf("line %d", seen) {
			seen++
		} else if _, err := fmt.Sscanf(s, "backdoord: the console is too slow: %d lines are missing here", &lost); err != nil {
			t.Fatalf("line %d is %q", seen, s)
		}
	}
	if seen < lateLines || lost < 1 || seen+lost != n {
		t.Errorf("%d lines were written and %d said to be missing; want %d in all", seen, lost, n)
	}
}

// TestLateWriterEnds: a console that takes nothing keeps nobody from ending.
func TestLateWriterEnds(t *testing.T) {
	c := &slowConsole{open: make(chan struct{})}
	defer close(c.open)
	l := newLateWriter(c)
	fmt.Fprintln(l, "a line")
	l.Flush(time.Millisecond)
}
