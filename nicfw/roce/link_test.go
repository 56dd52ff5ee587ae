//go:build linux

package roce

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/tests/netns"
)

// udpPair opens two links on loopback, at addresses that no other test of this machine uses at the same time.
func udpPair(t testing.TB, cfg UDPConfig) (a, b Link) {
	t.Helper()
	var links [2]Link
	for i := range links {
		for try := 0; ; try++ {
			r := random32()
			cfg.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, byte(1 + r%200), byte(r >> 8), byte(1 + r>>16%250)}), 0)
			l, err := ListenUDP(cfg)
			if errors.Is(err, unix.EADDRINUSE) && try < 10 {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			links[i] = l
			break
		}
		t.Cleanup(func() { links[i].Close() })
	}
	return links[0], links[1]
}

func datagramPacket(to netip.AddrPort, n int, seq uint32) Packet {
	p := Packet{Peer: to, Data: make([]byte, n, n+icrcLen)}
	BTH(p.Data).Encode(&BTHFields{Opcode: OpSendOnly, PKey: defaultPKey, PSN: PSN(seq)})
	binary.BigEndian.PutUint32(p.Data[n-4:], seq)
	return p
}

// TestUDPDrops: what has no right ICRC never comes up, and is counted.
func TestUDPDrops(t *testing.T) {
	a, _ := udpPair(t, UDPConfig{})
	c, err := net.Dial("udp", a.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, n := range []int{1, 15, 16, 100, maxDatagram, maxDatagram + 1, 9000} {
		if _, err := c.Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
	}
	rx := make([]Packet, batch)
	for range 7 {
		if n, err := a.Recv(rx, 10*time.Millisecond); n != 0 || err != nil {
			t.Fatalf("Recv = %d, %v", n, err)
		}
	}
	if c := a.(*udpLink).Counters(); c.BadICRC != 3 || c.BadLength != 4 {
		t.Errorf("counters %+v", c)
	}
}

// TestOwnInterface: a link that is told so takes what comes by the interface that has its address, and not what comes past it.
func TestOwnInterface(t *testing.T) {
	var ns [2]*netns.Namespace // ours, with the address on one interface, and one that reaches it by another
	for i := range ns {
		var err error
		if ns[i], err = netns.New(); errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
			t.Skip("making a network namespace takes root")
		} else if err != nil {
			t.Fatal(err)
		}
		defer ns[i].Close()
	}
	up := func(name string, a netip.Addr) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(24, 32)}}
		return errors.Join(netlink.AddrAdd(l, addr), netlink.LinkSetUp(l))
	}
	inside, outside, peer := netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("10.98.0.1"), netip.MustParseAddr("10.98.0.2")
	err := errors.Join(
		ns[0].Do(func() error {
			return errors.Join(
				netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "inside"}}),
				netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "outside"}, PeerName: "peer", PeerNamespace: netlink.NsFd(ns[1].FD())}),
				up("inside", inside), up("outside", outside))
		}),
		ns[1].Do(func() error {
			to := &net.IPNet{IP: inside.AsSlice(), Mask: net.CIDRMask(32, 32)}
			return errors.Join(up("peer", peer), netlink.RouteAdd(&netlink.Route{Dst: to, Gw: outside.AsSlice()}))
		}))
	if err != nil {
		t.Fatal(err)
	}
	listen := func(at int, cfg UDPConfig) (l Link) {
		t.Helper()
		err := ns[at].Do(func() (err error) {
			l, err = ListenUDP(cfg)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	sender := listen(1, UDPConfig{Addr: netip.AddrPortFrom(peer, 0)})
	defer sender.Close()
	for _, own := range []bool{false, true} {
		l := listen(0, UDPConfig{Addr: netip.AddrPortFrom(inside, 0), OwnInterface: own})
		n := 0
		// The first ones may get lost until the neighbour is known, which it is when the second link has its turn.
		for deadline := time.Now().Add(30 * time.Second); n == 0 && time.Now().Before(deadline); {
			if err := sender.Send([]Packet{datagramPacket(l.LocalAddr(), 32, 1)}); err != nil {
				t.Fatal(err)
			}
			var err error
			if n, err = l.Recv(make([]Packet, batch), 200*time.Millisecond); err != nil {
				t.Fatal(err)
			}
			if own {
				break
			}
		}
		if (n == 0) != own {
			t.Errorf("with OwnInterface %v, %d packets came by another interface", own, n)
		}
		l.Close()
	}
}

// TestUDPSegmentationRefused: a kernel that refuses to segment gets the packets one by one, with the ICRC for that.
func TestUDPSegmentationRefused(t *testing.T) {
	a, b := udpPair(t, UDPConfig{})
	l := a.(*udpLink)
	packets := make([]Packet, 40)
	for i := range packets {
		packets[i] = datagramPacket(b.LocalAddr(), 1000, uint32(i))
	}
	// The kernel answers EINVAL to a segment size with checksums off, as it answers EIO on devices that cannot checksum.
	if err := unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil {
		t.Fatal(err)
	}
	if err := a.Send(packets); err != nil {
		t.Fatal(err)
	}
	rx := make([]Packet, batch)
	for got := 0; got < len(packets); {
		n, err := b.Recv(rx, time.Second)
		if n == 0 || err != nil {
			t.Fatalf("after %d packets: Recv = %d, %v", got, n, err)
		}
		got += n
	}
	if c := l.Counters(); c.Segmented != 0 || c.Sent != 40 || l.segments {
		t.Errorf("counters %+v, segmentation %v", c, l.segments)
	}
}

func TestListenUDPErrors(t *testing.T) {
	for _, a := range []string{"0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[::ffff:127.0.0.1]:0"} {
		if l, err := ListenUDP(UDPConfig{Addr: netip.MustParseAddrPort(a)}); err == nil {
			l.Close()
			t.Errorf("listening on %v", a)
		}
	}
}

// TestUDPv6: one machine has one loopback address in IPv6, so the link talks to itself.
func TestUDPv6(t *testing.T) {
	l, err := ListenUDP(UDPConfig{Addr: netip.MustParseAddrPort("[::1]:0")})
	if err != nil {
		t.Skipf("no IPv6 on this machine: %v", err)
	}
	defer l.Close()
	var packets []Packet
	for i := range 20 {
		packets = append(packets, datagramPacket(l.LocalAddr(), 4108, uint32(i)))
	}
	if err := l.Send(packets); err != nil {
		t.Fatal(err)
	}
	rx := make([]Packet, batch)
	for got := 0; got < len(packets); {
		n, err := l.Recv(rx, time.Second)
		if n == 0 || err != nil {
			t.Fatalf("after %d packets: Recv = %d, %v (%+v)", got, n, err, l.(*udpLink).Counters())
		}
		got += n
	}
}

func TestCapture(t *testing.T) {
	var file bytes.Buffer
	a, b := NewPipe(netip.MustParseAddrPort("[fd00::1]:4791"), netip.MustParseAddrPort("[fd00::2]:4791"), 4096, Faults{})
	a = Capture(a, &file)
	sent := datagramPacket(b.LocalAddr(), 100, 7)
	a.Send([]Packet{sent})
	b.Send([]Packet{datagramPacket(a.LocalAddr(), 60, 8)})
	rx := make([]Packet, 1)
	a.Recv(rx, time.Second)
	var sizes []int
	for cf, err := range ReadPCAP(&file) {
		if err != nil {
			t.Fatal(err)
		}
		f, err := ParseFrame(cf.Data)
		if err != nil || !f.CheckICRC() || !f.IsRoCE || time.Since(cf.Time) > time.Minute {
			t.Errorf("frame at %v: %v, ICRC good: %v", cf.Time, err, f.CheckICRC())
		}
		sizes = append(sizes, len(f.Data))
	}
	if len(sizes) != 2 || sizes[0] != 104 || sizes[1] != 64 {
		t.Errorf("captured packets of %v bytes", sizes)
	}
}
