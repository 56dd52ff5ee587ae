package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestConsole(t *testing.T) {
	var log, tap bytes.Buffer
	c := newConsole(&log)
	stop := c.Tap(&tap)
	c.feed([]byte("first\r\nsec"))
	if diff := cmp.Diff([]string{"first", "sec"}, c.Tail(5)); diff != "" {
		t.Errorf("Tail (-want +got):\n%s", diff)
	}
	mark := c.Mark()
	found := make(chan Line)
	go func() {
		l, err := c.Wait(context.Background(), 0, regexp.MustCompile("ond$"))
		if err != nil {
			t.Error(err)
		}
		found <- l
	}()
	c.feed([]byte("ond\nthird\n"))
	if l := <-found; l.Text != "second" {
		t.Errorf("Wait = %q; want second", l.Text)
	}
	stop()
	c.feed([]byte("fourth\n"))
	var since []string
	for _, l := range c.Since(mark) {
		since = append(since, l.Text)
	}
	if diff := cmp.Diff([]string{"second", "third", "fourth"}, since); diff != "" {
		t.Errorf("Since (-want +got):\n%s", diff)
	}
	if got := tap.String(); got != "first\r\nsecond\nthird\n" {
		t.Errorf("the tap got %q", got)
	}
	if got := log.String(); got != "first\r\nsecond\nthird\nfourth\n" {
		t.Errorf("the log got %q", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Wait(ctx, c.Mark(), regexp.MustCompile("fourth")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait for what is over = %v; want a time-out", err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, errOff) {
		t.Errorf("Write to a machine that is off = %v; want errOff", err)
	}
	c.feed(bytes.Repeat([]byte("x"), 3*maxLine))
	if n := len(c.Tail(1)[0]); n > 3*maxLine {
		t.Errorf("a line without end has become %d bytes long", n)
	}
}

func TestTrailForgets(t *testing.T) {
	tr := newTrail[int](3)
	for i := range 10 {
		tr.add(i)
	}
	if diff := cmp.Diff([]int{7, 8, 9}, tr.since(2)); diff != "" {
		t.Errorf("since (-want +got):\n%s", diff)
	}
	if tr.mark() != 10 || tr.since(10) != nil {
		t.Errorf("mark = %d, since(10) = %v; want 10 and nothing", tr.mark(), tr.since(10))
	}
}

// FuzzConsole feeds a console in two pieces: the lines must not depend on where they were cut.
func FuzzConsole(f *testing.F) {
	f.Add([]byte("a\r\nb\nc"), 2)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		cut = max(0, min(cut, len(b)))
		whole, pieces := newConsole(nil), newConsole(nil)
		whole.feed(b)
		pieces.feed(b[:cut])
		pieces.feed(b[cut:])
		if len(b) < maxLine {
			if diff := cmp.Diff(whole.Tail(1000), pieces.Tail(1000)); diff != "" {
				t.Errorf("cut at %d (-whole +pieces):\n%s", cut, diff)
			}
		}
	})
}

// stub answers a debugger's packets from a table, each after some noise.
func stub(conn net.Conn, answers map[string]string) {
	in := bufio.NewReader(conn)
	for {
		if _, err := in.ReadSlice('$'); err != nil {
			return
		}
		p, err := in.ReadString('#')
		if err != nil {
			return
		}
		io.WriteString(conn, "+$T02thread:01;#00$"+answers[strings.TrimSuffix(p, "#")]+"#00")
	}
}

func TestGDB(t *testing.T) {
	near, far := bufferedPipe(t)
	go stub(far, map[string]string{
		"p10": "efcdab8967452301", "p11": "46020000", "p12": "zz", "P10=0807060504030201": "OK",
		"mffffffff81000000,400": strings.Repeat("00", 100) + "ebfe" + strings.Repeat("00", 922),
	})
	g := &gdb{near, bufio.NewReader(near)}
	if v, err := g.register(regRIP); err != nil || v != 0x0123456789abcdef {
		t.Errorf("RIP = %#x, %v", v, err)
	}
	if v, err := g.register(regEFLAGS); err != nil || v != 0x246 {
		t.Errorf("EFLAGS = %#x, %v", v, err)
	}
	if v, err := g.register(regCS); err == nil {
		t.Errorf("CS = %#x out of nonsense", v)
	}
	if err := g.setRegister(regRIP, 8, 0x0102030405060708); err != nil {
		t.Error(err)
	}
	if err := g.setRegister(regCS, 4, 1); err == nil {
		t.Error("a refused store has worked")
	}
	if at, err := g.find(0xffffffff81000123, spin); err != nil || at != 0xffffffff81000064 {
		t.Errorf("find = %#x, %v", at, err)
	}
}

// bufferedPipe is a pair of connections whose writes do not wait for the reader.
func bufferedPipe(t *testing.T) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// FuzzGDB reads packets out of anything.
func FuzzGDB(f *testing.F) {
	f.Add([]byte("+$T02thread:01;#00$0102#00"))
	f.Add([]byte("$#"))
	f.Fuzz(func(t *testing.T, b []byte) {
		g := &gdb{discard{}, bufio.NewReader(bytes.NewReader(b))}
		for range len(b) + 1 {
			p, err := g.receive()
			if err != nil {
				return
			}
			if strings.Contains(p, "#") {
				t.Errorf("receive = %q", p)
			}
		}
		t.Error("more packets than bytes")
	})
}

// discard is a connection that takes everything.
type discard struct{ net.Conn }

func (discard) Write(p []byte) (int, error) { return len(p), nil }
