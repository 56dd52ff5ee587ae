// Package linktest is the conformance test of links: every roce.Link passes it.
package linktest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// Packet returns a packet of n bytes, at least 16, that goes to a peer and can be told by its number.
func Packet(to netip.AddrPort, n int, seq uint32) roce.Packet {
	p := roce.Packet{Peer: to, Data: make([]byte, n, n+4)}
	roce.BTH(p.Data).Encode(&roce.BTHFields{Opcode: roce.OpSendOnly, PKey: 0xffff, PSN: roce.PSN(seq & 0xffffff)})
	binary.BigEndian.PutUint32(p.Data[n-4:], seq)
	return p
}

// Test checks two links that reach each other, and closes them. Both take packets with pathMTU bytes of payload.
func Test(t *testing.T, a, b roce.Link, pathMTU int) {
	t.Helper()
	if !a.LocalAddr().IsValid() || a.LocalAddr() == b.LocalAddr() || a.PathMTU() != pathMTU || b.PathMTU() != pathMTU {
		t.Fatalf("at %v and %v, path MTU %d and %d; want %d", a.LocalAddr(), b.LocalAddr(), a.PathMTU(), b.PathMTU(), pathMTU)
	}
	Exchange(t, a, b, pathMTU)
	rx := make([]roce.Packet, 64)
	if n, err := b.Recv(rx, 0); n != 0 || err != nil {
		t.Errorf("Recv of nothing = %d, %v", n, err)
	}
	start := time.Now()
	if n, err := b.Recv(rx, 5*time.Millisecond); n != 0 || err != nil || time.Since(start) < 5*time.Millisecond {
		t.Errorf("Recv of nothing for 5 ms = %d, %v after %v", n, err, time.Since(start))
	}
	b.Wake()
	if n, err := b.Recv(rx, -1); n != 0 || err != nil {
		t.Errorf("Recv after Wake = %d, %v", n, err)
	}
	go func() { time.Sleep(5 * time.Millisecond); b.Wake() }()
	if n, err := b.Recv(rx, -1); n != 0 || err != nil {
		t.Errorf("Recv woken up = %d, %v", n, err)
	}
	go func() { time.Sleep(5 * time.Millisecond); b.Close() }()
	if n, err := b.Recv(rx, -1); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("Recv closed = %d, %v", n, err)
	}
	if err := b.Send([]roce.Packet{Packet(a.LocalAddr(), 16, 0)}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Send closed: %v", err)
	}
	if err := errors.Join(b.Close(), a.Close()); err != nil {
		t.Error(err)
	}
}

// Exchange sends runs of packets of equal and different sizes, as READ responses are, from a to b, and checks that they
// arrive whole and in order.
func Exchange(t *testing.T, a, b roce.Link, pathMTU int) {
	t.Helper()
	full := pathMTU + 12
	var sizes []int
	for i := range 200 {
		sizes = append(sizes, []int{full + 4, full, full, full, full + 4, 16, 16, 20}[i%8])
	}
	for range 40 {
		sizes = append(sizes, full)
	}
	for range 150 {
		sizes = append(sizes, 24)
	}
	rx := make([]roce.Packet, 64)
	for i := 0; i < len(sizes); i += 30 {
		var packets []roce.Packet
		for j := i; j < min(i+30, len(sizes)); j++ {
			packets = append(packets, Packet(b.LocalAddr(), sizes[j], uint32(j)))
		}
		if err := a.Send(packets); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < len(packets); {
			n, err := b.Recv(rx[:7], time.Second)
			if err != nil || n == 0 {
				t.Fatalf("after %d of %d packets: Recv = %d, %v", i+got, len(sizes), n, err)
			}
			for _, p := range rx[:n] {
				if !bytes.Equal(p.Data, packets[got].Data) || p.Peer != a.LocalAddr() {
					t.Fatalf("packet %d from %v: % x", i+got, p.Peer, p.Data[:12])
				}
				got++
			}
		}
	}
}
