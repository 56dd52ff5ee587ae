//go:build linux

package afxdp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/nicfw/roce/linktest"
	"github.com/backdoor-rhs/backdoor/tests/netns"
)

// wire is a pair of virtual Ethernet interfaces in network namespaces of their own.
type wire struct{ ends [2]*end }

// end is the namespace of one interface.
type end struct {
	*netns.Namespace
	v4   netip.Addr
	v6   netip.Addr
	name string
}

// newWire makes the interfaces with an MTU. It needs privileges and says so where there are none.
func newWire(t *testing.T, mtu int) *wire {
	t.Helper()
	w := &wire{}
	for i := range w.ends {
		ns, err := netns.New()
		if errors.Is(err, unix.EPERM) {
			t.Skip("making network namespaces and AF_XDP sockets takes root")
		} else if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Close() })
		w.ends[i] = &end{ns, netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd99::%d", i+1)), fmt.Sprintf("roce%d", i)}
	}
	err := w.ends[0].Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "roce0", MTU: mtu}, PeerName: "roce1", PeerNamespace: netlink.NsFd(w.ends[1].FD())})
	})
	for _, e := range w.ends {
		err = errors.Join(err, e.Do(func() error {
			l, err := netlink.LinkByName(e.name)
			if err != nil {
				return err
			}
			// Addresses in IPv6 are usable at once without duplicate address detection.
			return errors.Join(
				netlink.LinkSetMTU(l, mtu),
				netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: e.v4.AsSlice(), Mask: net.CIDRMask(24, 32)}}),
				netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: e.v6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}),
				netlink.LinkSetUp(l))
		}))
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *wire) addr(i int, v6 bool) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(w.ends[i].v6, 0)
	}
	return netip.AddrPortFrom(w.ends[i].v4, 0)
}

// xdp opens a link over AF_XDP at one end.
func (w *wire) xdp(t *testing.T, i int, v6 bool, mtu int, m Mode) *Link {
	t.Helper()
	var l *Link
	if err := w.ends[i].Do(func() (err error) {
		l, err = Listen(Config{Addr: w.addr(i, v6), PathMTU: mtu, Mode: m})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// udp opens a link over UDP without offloads: a virtual interface hands what is to be segmented over whole, which in
// generic mode nobody segments.
func (w *wire) udp(t *testing.T, i int, v6 bool, mtu int) roce.Link {
	t.Helper()
	var l roce.Link
	if err := w.ends[i].Do(func() (err error) {
		l, err = roce.ListenUDP(roce.UDPConfig{Addr: w.addr(i, v6), PathMTU: mtu, NoOffload: true})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// meet lets both sides learn the other's link address: the first packet to a new neighbour may be lost.
func meet(t *testing.T, a, b roce.Link) {
	t.Helper()
	rx := make([]roce.Packet, 1)
	for _, ends := range [][2]roce.Link{{a, b}, {b, a}} {
		for try := 0; ; try++ {
			if err := ends[0].Send([]roce.Packet{linktest.Packet(ends[1].LocalAddr(), 16, 0)}); err != nil {
				t.Fatal(err)
			}
			if n, err := ends[1].Recv(rx, 200*time.Millisecond); err != nil {
				t.Fatal(err)
			} else if n > 0 {
				break
			}
			if try == 30 {
				t.Fatalf("nothing comes from %v to %v: %v, %v", ends[0].LocalAddr(), ends[1].LocalAddr(), counters(ends[0]), counters(ends[1]))
			}
		}
		for n := 1; n > 0; { // those that waited for the address to be resolved
			var err error
			if n, err = ends[1].Recv(rx, 100*time.Millisecond); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func counters(l roce.Link) roce.LinkCounters {
	return l.(interface{ Counters() roce.LinkCounters }).Counters()
}

// TestLink is the conformance test, with AF_XDP on one side or both.
func TestLink(t *testing.T) {
	for _, m := range []Mode{Generic, Native} {
		for _, v6 := range []bool{false, true} {
			for _, mtu := range []int{1024, 4096} {
				if testing.Short() && (v6 != (m == Native) || mtu != 4096) {
					continue
				}
				t.Run(fmt.Sprintf("%v/v6=%v/%d", m, v6, mtu), func(t *testing.T) {
					w := newWire(t, max(mtu+104, 1280))
					a := w.xdp(t, 0, v6, mtu, m)
					if a.Mode() != m {
						t.Fatalf("attached in %v mode; want %v", a.Mode(), m)
					}
					b := w.udp(t, 1, v6, mtu)
					meet(t, a, b)
					linktest.Exchange(t, b, a, mtu)
					linktest.Test(t, a, b, mtu)
					c, d := w.xdp(t, 0, v6, mtu, m), w.xdp(t, 1, v6, mtu, m)
					meet(t, c, d)
					linktest.Test(t, c, d, mtu)
				})
			}
		}
	}
}

// TestWholeICRC: a packet whose ICRC is right for another IPv4 identification only, which a UDP socket cannot tell from a
// right one, is dropped and counted.
func TestWholeICRC(t *testing.T) {
	w := newWire(t, 1300)
	a := w.xdp(t, 0, false, 1024, Generic)
	var sock net.PacketConn
	if err := w.ends[1].Do(func() (err error) {
		sock, err = net.ListenPacket("udp4", netip.AddrPortFrom(w.ends[1].v4, roce.Port).String())
		if err != nil {
			return err
		}
		raw, err := sock.(*net.UDPConn).SyscallConn() // with DF, and so the identification 0
		if err == nil {
			err = raw.Control(func(fd uintptr) {
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
			})
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	rx := make([]roce.Packet, 8)
	p := linktest.Packet(a.LocalAddr(), 100, 7)
	send := func(id uint16) {
		t.Helper()
		var c roce.ICRC
		src := netip.AddrPortFrom(w.ends[1].v4, roce.Port)
		wire := binary.LittleEndian.AppendUint32(bytes.Clone(p.Data), c.Sum(src, a.LocalAddr(), id, roce.DontFragment, p.Data))
		if _, err := sock.WriteTo(wire, net.UDPAddrFromAddrPort(a.LocalAddr())); err != nil {
			t.Fatal(err)
		}
	}
	recv := func() int {
		t.Helper()
		n, err := a.Recv(rx, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if send(0); recv() != 1 || !bytes.Equal(rx[0].Data, p.Data) {
		t.Errorf("the right packet did not come: %+v", a.Counters())
	}
	for n := recv(); n != 0 || a.Counters().BadICRC == 0; n = recv() {
		if n != 0 {
			t.Fatalf("a packet with the ICRC of another came through")
		}
		send(0x1234)
	}
}

// TestDevice reads and writes through an engine at each end, over every path MTU.
func TestDevice(t *testing.T) {
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	w := newWire(t, 4300)
	for _, mtu := range roce.PathMTUs() {
		if testing.Short() && mtu != 256 && mtu != 4096 {
			continue
		}
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			open := func(l roce.Link) *roce.Device {
				d, err := roce.Open(l, roce.Config{})
				if err != nil {
					t.Fatal(err)
				}
				ran := make(chan struct{})
				ctx, stop := context.WithCancel(ctx)
				go func() { defer close(ran); d.Run(ctx) }()
				t.Cleanup(func() { stop(); <-ran; d.Close() })
				return d
			}
			a, b := open(w.xdp(t, 0, false, mtu, Auto)), open(w.udp(t, 1, false, mtu))
			mem := roce.NewBuffer(1 << 20)
			pd := a.NewPD()
			mr, err := pd.Register(mem, roce.MRConfig{Length: 1 << 20, Access: roce.AccessRead | roce.AccessWrite})
			if err != nil {
				t.Fatal(err)
			}
			l, err := a.Listen(roce.ServiceTCP(7))
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				if r, err := l.Accept(ctx); err == nil {
					r.Accept(pd, nil, roce.QPConfig{}, nil)
				}
			}()
			q, _, err := b.Dial(ctx, w.ends[0].v4, roce.ServiceTCP(7), b.NewPD(), nil, roce.QPConfig{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			want, got := bytes.Repeat([]byte("0123456789abcde"), 40000), make([]byte, 600000)
			if err := errors.Join(q.Write(ctx, want, 8, mr.RKey()), q.Read(ctx, got, 8, mr.RKey())); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("read other bytes than were written")
			}
			t.Log(a.Link().(*Link).Mode(), counters(a.Link()))
		})
	}
}

// TestAllocations: neither sending nor receiving allocates.
func TestAllocations(t *testing.T) {
	w := newWire(t, 4300)
	a, b := w.xdp(t, 0, false, 4096, Native), w.xdp(t, 1, false, 4096, Native)
	meet(t, a, b)
	packets := make([]roce.Packet, 16)
	for i := range packets {
		packets[i] = linktest.Packet(b.LocalAddr(), 4112, uint32(i))
	}
	rx := make([]roce.Packet, len(packets))
	if n := testing.AllocsPerRun(100, func() {
		if err := a.Send(packets); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < len(packets); {
			n, err := b.Recv(rx, time.Second)
			if n == 0 || err != nil {
				t.Fatalf("after %d packets: Recv = %d, %v", got, n, err)
			}
			got += n
		}
	}); n != 0 {
		t.Errorf("%g allocations for %d packets", n, len(packets))
	}
}

// TestUDPOwnInterface: a link that keeps to its interface carries packets there and hears nothing that comes in by another one,
// which a link that does not keep to it hears.
func TestUDPOwnInterface(t *testing.T) {
	w := newWire(t, 4300)
	inside := netip.MustParseAddr("10.98.0.1")
	if err := w.ends[0].Do(func() error {
		d := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "inside"}, PeerName: "unused"}
		return errors.Join(netlink.LinkAdd(d), netlink.AddrAdd(d, &netlink.Addr{IPNet: &net.IPNet{IP: inside.AsSlice(), Mask: net.CIDRMask(24, 32)}}), netlink.LinkSetUp(d))
	}); err != nil {
		t.Fatal(err)
	}
	if err := w.ends[1].Do(func() error {
		return netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: inside.AsSlice(), Mask: net.CIDRMask(32, 32)}, Gw: w.ends[0].v4.AsSlice()})
	}); err != nil {
		t.Fatal(err)
	}
	listen := func(i int, addr netip.Addr, own bool) roce.Link {
		t.Helper()
		var l roce.Link
		if err := w.ends[i].Do(func() (err error) {
			l, err = roce.ListenUDP(roce.UDPConfig{Addr: netip.AddrPortFrom(addr, 0), PathMTU: 1024, NoOffload: true, OwnInterface: own})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	far := listen(1, w.ends[1].v4, true)
	a := listen(0, w.ends[0].v4, true)
	meet(t, a, far) // the cable is up, and each end knows the other's address
	rx := make([]roce.Packet, 8)
	for _, own := range []bool{false, true, false} {
		near := listen(0, inside, own)
		got := 0
		// What is to be heard may take its time; what is not is waited for a little.
		for i := 0; i < 20 || !own && i < 500; i++ {
			if err := far.Send([]roce.Packet{linktest.Packet(near.LocalAddr(), 100, 1)}); err != nil {
				t.Fatal(err)
			}
			n, err := near.Recv(rx, 20*time.Millisecond)
			if err != nil {
				t.Fatal(err)
			}
			if got += n; n > 0 && !own {
				break
			}
		}
		if (got == 0) != own {
			t.Errorf("keeping to its interface %v, it heard %d packets from another", own, got)
		}
		near.Close()
	}
	linktest.Test(t, a, far, 1024)
}
