package wire

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var broadcast = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func mac(n byte) MAC { return MAC{2, 0, 0, 0, 0, n} }

func frame(dst, src MAC, payload string) []byte {
	f := append(dst[:], src[:]...)
	return append(append(f, 0x88, 0xb5), payload...) // EtherType for local experiments, IEEE 802
}

func newSwitch(t *testing.T, o Options) *Switch {
	t.Helper()
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return s
}

func newEnd(t *testing.T, s *Switch, name string) *Endpoint {
	t.Helper()
	e, err := s.Endpoint(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func send(t *testing.T, e *Endpoint, f []byte) {
	t.Helper()
	if err := e.Send(f); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, e *Endpoint) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	f, err := e.Receive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return string(f[header:])
}

func TestSwitchLearns(t *testing.T) {
	var file bytes.Buffer
	s := newSwitch(t, Options{Capture: &file})
	a, b, c := newEnd(t, s, "a"), newEnd(t, s, "b"), newEnd(t, s, "c")

	send(t, a, frame(mac(2), mac(1), "nobody knows b"))
	for _, e := range []*Endpoint{b, c} {
		if got := receive(t, e); got != "nobody knows b" {
			t.Errorf("flooded frame = %q", got)
		}
	}
	send(t, b, frame(mac(1), mac(2), "to a"))
	if got := receive(t, a); got != "to a" {
		t.Errorf("answer = %q", got)
	}
	big := strings.Repeat("x", MTU)
	send(t, a, frame(mac(2), mac(1), big))
	if got := receive(t, b); got != big {
		t.Errorf("a frame of MTU %d came with %d bytes", MTU, len(got))
	}
	send(t, a, frame(broadcast, mac(1), "all"))
	for _, e := range []*Endpoint{b, c} { // c has got neither the answer nor the big one: this is its next frame
		if got := receive(t, e); got != "all" {
			t.Errorf("broadcast = %q", got)
		}
	}
	if got := a.Port.Counters().In; got != 3 {
		t.Errorf("a's port took %d frames; want 3", got)
	}
	if err := a.Send(make([]byte, header-1)); err == nil {
		t.Error("Send took a frame without a header")
	}
	if err := a.Send(make([]byte, MaxFrame+1)); err == nil {
		t.Error("Send took a frame that is too long")
	}

	s.Close()
	b0 := file.Bytes()
	var lengths []int
	for at := 24; at+16 <= len(b0); {
		n := int(binary.LittleEndian.Uint32(b0[at+8:]))
		lengths = append(lengths, n-header)
		at += 16 + n
	}
	if diff := cmp.Diff([]int{14, 4, MTU, 3}, lengths); diff != "" {
		t.Errorf("captured payloads (-want +got):\n%s", diff)
	}
}

func TestUnpluggedPortIsForgotten(t *testing.T) {
	s := newSwitch(t, Options{})
	a, b := newEnd(t, s, "a"), newEnd(t, s, "b")
	send(t, b, frame(broadcast, mac(2), "here"))
	receive(t, a)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Receive(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Receive after Close = %v; want net.ErrClosed", err)
	}
	c := newEnd(t, s, "c") // b's machine, plugged in elsewhere
	send(t, a, frame(mac(2), mac(1), "flooded again"))
	if got := receive(t, c); got != "flooded again" {
		t.Errorf("frame = %q", got)
	}
}

// pass sends n frames from a to b and returns what arrives before a last, unimpaired one.
func pass(t *testing.T, seed uint64, im Impair, n int) []string {
	t.Helper()
	s := newSwitch(t, Options{Seed: seed})
	a, b := newEnd(t, s, "a"), newEnd(t, s, "b")
	b.Port.Impair(im)
	for i := range n {
		send(t, a, frame(mac(2), mac(1), fmt.Sprint(i)))
	}
	// What was sent has been dealt with when all of it is counted.
	deadline := time.Now().Add(10 * time.Second)
	for {
		c := b.Port.Counters()
		if c.Out+c.Lost-c.Duplicated == uint64(n) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("counters = %+v after %d frames", c, n)
		}
		time.Sleep(time.Millisecond)
	}
	b.Port.Impair(Impair{})
	send(t, a, frame(mac(2), mac(1), "end"))
	var got []string
	for {
		g := receive(t, b)
		if g == "end" {
			return got
		}
		got = append(got, g)
	}
}

func TestImpair(t *testing.T) {
	const n = 200
	var whole []string
	for i := range n {
		whole = append(whole, fmt.Sprint(i))
	}
	if diff := cmp.Diff(whole, pass(t, 1, Impair{}, n)); diff != "" {
		t.Errorf("a good wire (-want +got):\n%s", diff)
	}
	if got := pass(t, 1, Impair{Loss: 1}, n); len(got) != 0 {
		t.Errorf("with all lost, %d frames arrived", len(got))
	}
	if got := pass(t, 1, Impair{Duplicate: 1}, n); len(got) != 2*n {
		t.Errorf("with all doubled, %d frames arrived; want %d", len(got), 2*n)
	}
	some := pass(t, 7, Impair{Loss: 0.2, Duplicate: 0.2}, n)
	if len(some) == n || len(some) < n/2 || len(some) > 3*n/2 {
		t.Errorf("with a fifth lost and a fifth doubled, %d of %d frames arrived", len(some), n)
	}
	if diff := cmp.Diff(some, pass(t, 7, Impair{Loss: 0.2, Duplicate: 0.2}, n)); diff != "" {
		t.Errorf("the same seed gave another result (-first +second):\n%s", diff)
	}
	mixed := pass(t, 3, Impair{Reorder: 0.3}, n)
	if cmp.Equal(whole, mixed) || len(mixed) != n {
		t.Errorf("with a third reordered, %d frames arrived, in order: %v", len(mixed), cmp.Equal(whole, mixed))
	}
}

func TestOtherProcess(t *testing.T) {
	// A path that is too long for a socket address.
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 60), strings.Repeat("e", 60))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "wire.sock")
	s := newSwitch(t, Options{})
	a := newEnd(t, s, "a")
	if err := s.Listen(path); err != nil {
		t.Fatal(err)
	}
	g, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	send(t, g, frame(broadcast, mac(9), "hello"))
	if got := receive(t, a); got != "hello" {
		t.Errorf("frame = %q", got)
	}
	send(t, a, frame(mac(9), mac(1), "welcome"))
	if got := receive(t, g); got != "welcome" {
		t.Errorf("answer = %q", got)
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close the socket is still there: %v", err)
	}
	if _, err := g.Receive(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Receive after the end = %v; want net.ErrClosed", err)
	}
}

// On a hub a forged address turns nothing aside, and a tap sees what enters.
func TestHub(t *testing.T) {
	s := newSwitch(t, Options{Hub: true})
	a, b := newEnd(t, s, "a"), newEnd(t, s, "b")
	tap, err := s.Tap()
	if err != nil {
		t.Fatal(err)
	}
	send(t, a, frame(broadcast, mac(2), "as b"))
	send(t, a, frame(mac(2), mac(1), "to b"))
	for _, want := range []string{"as b", "to b"} {
		if got := receive(t, b); got != want {
			t.Errorf("b got %q; want %q", got, want)
		}
	}
	if f, err := tap.Wait(t.Context(), func(f []byte) bool { return string(f[header:]) == "to b" }); err != nil || len(tap.Frames()) != 2 {
		t.Errorf("the tap saw %q, %v and %d frames", f, err, len(tap.Frames()))
	}
	if err := tap.Close(); err != nil {
		t.Error(err)
	}
	send(t, a, frame(mac(2), mac(1), "later"))
	receive(t, b)
	if n := len(tap.Frames()); n != 2 {
		t.Errorf("a closed tap has %d frames", n)
	}
}
