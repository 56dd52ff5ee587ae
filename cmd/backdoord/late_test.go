package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// TestLateWriterPrompt: what a console takes is there when Write returns, and one that takes no more is not waited for; nothing is lost or overtaken.
func TestLateWriterPrompt(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	l := newLateWriter(w)
	fmt.Fprintln(l, "prompt")
	if n, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ); err != nil || n != len("prompt\n") {
		t.Fatalf("%d bytes are there, %v; want the line", n, err)
	}
	const n = 1000
	fill := strings.Repeat(".", 500)
	var want strings.Builder
	want.WriteString("prompt\n")
	for i := range n { // more than a pipe holds
		line := fmt.Sprintf("%d%s\n", i, fill)
		if i%100 == 0 {
			line = fmt.Sprintf("%d%s\n", i, strings.Repeat(fill, 20)) // too long to be written at once
		}
		want.WriteString(line)
		fmt.Fprint(l, line)
	}
	got := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		got <- string(b)
	}()
	l.Flush(time.Minute)
	w.Close()
	if s := <-got; s != want.String() {
		t.Errorf("%d bytes were written, other than the %d that were handed over", len(s), want.Len())
	}
}
