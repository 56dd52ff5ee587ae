package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	agentAddr, agent6 = netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd00::1")
	hostAddr, host6   = netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd00::2")
	peerAddr, peer6   = netip.MustParseAddr("10.9.0.3"), netip.MustParseAddr("fd00::3")

	hostMAC, peerMAC = net.HardwareAddr{2, 0, 0, 0, 0, 2}, net.HardwareAddr{2, 0, 0, 0, 0, 3}
	broadcast        = net.HardwareAddr{255, 255, 255, 255, 255, 255}
)

// bench is a network namespace with a gateway between two virtual cables: host ── gwhost │ gwwire ── wire.
type bench struct {
	t      *testing.T
	config Config
	g      *Gateway
	mac    net.HardwareAddr // the agent's
}

func newBench(t *testing.T) *bench {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("programs in the kernel and network namespaces take root")
	}
	// The thread that is in the namespace is not used again: it ends with the goroutine.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	fs := t.TempDir()
	if err := unix.Mount("bpf", fs, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, pair := range [][2]string{{"host", "gwhost"}, {"wire", "gwwire"}} {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: pair[0], MTU: 3000}, PeerName: pair[1]}); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"host", "gwhost", "wire", "gwwire"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	// A veth takes redirected frames only if there is a program at its end.
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "BSD", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"host", "wire"} {
		end := at(t, name)
		if err := netlink.LinkSetUp(end); err != nil {
			t.Fatal(err)
		}
		l, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: end.Attrs().Index, Flags: link.XDPDriverMode})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	b := &bench{t: t, mac: at(t, "gwwire").Attrs().HardwareAddr, config: Config{
		Host: "gwhost", Uplink: "gwwire", Own: []netip.Addr{agentAddr, agent6},
		Services: []Service{{UDP, 4791}, {TCP, 443}}, Pin: filepath.Join(fs, "backdoor"),
	}}
	b.open()
	return b
}

func at(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (b *bench) open() {
	b.t.Helper()
	g, err := Open(b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	b.g = g
	b.t.Cleanup(func() { g.Close() })
}

// run gives the verdict on a frame that comes in at a port, by the program alone.
func (b *bench) run(from Port, frame []byte) Verdict {
	b.t.Helper()
	before, err := b.g.Counters()
	if err != nil {
		b.t.Fatal(err)
	}
	prog := [...]*ebpf.Program{b.g.objs.FromHost, b.g.objs.FromWire}[from]
	action, err := prog.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		b.t.Fatal(err)
	}
	after, err := b.g.Counters()
	if err != nil {
		b.t.Fatal(err)
	}
	const drop, pass, redirect = 1, 2, 4
	for v := range verdicts {
		if after[from][v].Packets == before[from][v].Packets {
			continue
		}
		want := uint32(drop)
		switch v {
		case Forwarded:
			want = redirect
		case Passed:
			want = pass
		}
		if action != want {
			b.t.Errorf("frame counted as %v: action %d; want %d", v, action, want)
		}
		if n := after[from][v].Bytes - before[from][v].Bytes; n != uint64(len(frame)) {
			b.t.Errorf("counted %d bytes of a frame of %d", n, len(frame))
		}
		return v
	}
	b.t.Fatalf("no counter rose; action %d", action)
	return 0
}

// Frames. A part is put behind the other; lengths and checksums are not what these programs look at.

func eth(dst, src net.HardwareAddr, typ uint16, rest ...[]byte) []byte {
	return slices.Concat(dst, src, be(typ), slices.Concat(rest...))
}

func be(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

func vlan(id, typ uint16) []byte { return slices.Concat(be(id), be(typ)) }

func ip4(src, dst netip.Addr, proto uint8, off uint16, options int) []byte {
	h := make([]byte, 20+options)
	h[0], h[8], h[9] = 0x40|byte(len(h)/4), 64, proto
	binary.BigEndian.PutUint16(h[6:], off)
	copy(h[12:], src.AsSlice())
	copy(h[16:], dst.AsSlice())
	return h
}

func ip6(src, dst netip.Addr, next uint8) []byte {
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, next, 64
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return h
}

func udp(sport, dport uint16) []byte { return slices.Concat(be(sport), be(dport), be(8), be(0)) }

func tcp(sport, dport uint16, flags byte) []byte {
	h := make([]byte, 20)
	copy(h, slices.Concat(be(sport), be(dport)))
	h[12], h[13] = 5<<4, flags
	return h
}

func arp(op uint16, from net.HardwareAddr, spa, tpa netip.Addr) []byte {
	return slices.Concat(be(1), be(0x800), []byte{6, 4}, be(op), from, spa.AsSlice(), make([]byte, 6), tpa.AsSlice())
}

func neighbour(typ byte, target netip.Addr) []byte {
	return slices.Concat([]byte{typ, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice())
}

func TestVerdicts(t *testing.T) {
	b := newBench(t)
	multicast := netip.MustParseAddr("ff02::1:ff00:1")
	mapped := netip.MustParseAddr("::ffff:10.9.0.1")
	for _, tt := range []struct {
		name  string
		from  Port
		frame []byte
		want  Verdict
	}{
		{"udp", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, UDP, 0, 0), udp(5, 6)), Forwarded},
		{"tcp6", Host, eth(peerMAC, hostMAC, 0x86dd, ip6(host6, peer6, TCP), tcp(5, 6, 2)), Forwarded},
		{"vlan", Host, eth(peerMAC, hostMAC, 0x8100, vlan(7, 0x800), ip4(hostAddr, peerAddr, UDP, 0, 0), udp(5, 6)), Forwarded},
		{"arp", Host, eth(broadcast, hostMAC, 0x806, arp(1, hostMAC, hostAddr, peerAddr)), Forwarded},
		{"other IP protocol", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, 132, 0, 0)), Forwarded},

		{"agent by address", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, agentAddr, UDP, 0, 0), udp(5, 4791)), Guarded},
		{"agent by address, v6", Host, eth(peerMAC, hostMAC, 0x86dd, ip6(host6, agent6, TCP), tcp(5, 443, 2)), Guarded},
		{"agent in a VLAN", Host, eth(peerMAC, hostMAC, 0x8100, vlan(7, 0x800), ip4(hostAddr, agentAddr, UDP, 0, 0), udp(5, 4791)), Guarded},
		{"agent in two VLANs", Host, eth(peerMAC, hostMAC, 0x88a8, vlan(7, 0x8100), vlan(8, 0x800), ip4(hostAddr, agentAddr, UDP, 0, 0), udp(5, 4791)), Guarded},
		{"agent in three VLANs", Host, eth(peerMAC, hostMAC, 0x88a8, vlan(7, 0x8100), vlan(8, 0x8100), vlan(9, 0x800), ip4(hostAddr, agentAddr, UDP, 0, 0), udp(5, 4791)), Unparsed},
		{"agent in a fragment", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, agentAddr, UDP, 100, 0), udp(5, 4791)), Guarded},
		{"agent behind IP options", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, agentAddr, UDP, 0, 40), udp(5, 4791)), Guarded},
		{"agent behind extension headers", Host, eth(peerMAC, hostMAC, 0x86dd, ip6(host6, agent6, 0), []byte{60, 0, 0, 0, 0, 0, 0, 0}, []byte{TCP, 0, 0, 0, 0, 0, 0, 0}, tcp(5, 443, 2)), Guarded},
		{"agent's hardware address", Host, eth(b.mac, hostMAC, 0x800, ip4(hostAddr, peerAddr, UDP, 0, 0), udp(5, 6)), Guarded},
		{"in the agent's name", Host, eth(peerMAC, hostMAC, 0x800, ip4(agentAddr, peerAddr, UDP, 0, 0), udp(4791, 6)), Guarded},
		{"with the agent's hardware address", Host, eth(peerMAC, b.mac, 0x800, ip4(hostAddr, peerAddr, UDP, 0, 0), udp(5, 6)), Guarded},
		{"arp for the agent", Host, eth(broadcast, hostMAC, 0x806, arp(1, hostMAC, hostAddr, agentAddr)), Guarded},
		{"arp as the agent", Host, eth(broadcast, hostMAC, 0x806, arp(2, hostMAC, agentAddr, peerAddr)), Guarded},
		{"solicitation for the agent", Host, eth(broadcast, hostMAC, 0x86dd, ip6(host6, multicast, 58), neighbour(135, agent6)), Guarded},
		{"advertisement as the agent", Host, eth(broadcast, hostMAC, 0x86dd, ip6(host6, peer6, 58), neighbour(136, agent6)), Guarded},
		{"IPv4 written as IPv6", Host, eth(peerMAC, hostMAC, 0x86dd, ip6(host6, mapped, UDP), udp(5, 4791)), Malformed},

		{"unknown protocol", Host, eth(peerMAC, hostMAC, 0x88cc, make([]byte, 46)), Unparsed},
		{"five extension headers", Host, eth(peerMAC, hostMAC, 0x86dd, ip6(host6, peer6, 60), slices.Repeat([]byte{60, 0, 0, 0, 0, 0, 0, 0}, 5)), Unparsed},
		{"arp of another hardware", Host, eth(broadcast, hostMAC, 0x806, slices.Concat(be(6), make([]byte, 30))), Unparsed},
		{"short IPv4", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, UDP, 0, 0)[:16]), Malformed},
		{"IPv4 header of 16 bytes", Host, eth(peerMAC, hostMAC, 0x800, append([]byte{0x44}, make([]byte, 45)...)), Malformed},
		{"options past the end", Host, eth(peerMAC, hostMAC, 0x800, append([]byte{0x4f, 0, 0, 0, 0, 0, 0, 0, 0, UDP}, make([]byte, 30)...)), Malformed},
		{"short TCP", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, TCP, 0, 0), make([]byte, 12)), Malformed},

		{"RoCE", Uplink, eth(b.mac, peerMAC, 0x800, ip4(peerAddr, agentAddr, UDP, 0, 0), udp(5, 4791)), Passed},
		{"Redfish, v6", Uplink, eth(b.mac, peerMAC, 0x86dd, ip6(peer6, agent6, TCP), tcp(5, 443, 2)), Passed},
		{"arp to the agent", Uplink, eth(broadcast, peerMAC, 0x806, arp(1, peerMAC, peerAddr, agentAddr)), Passed},
		{"solicitation to the agent", Uplink, eth(broadcast, peerMAC, 0x86dd, ip6(peer6, multicast, 58), neighbour(135, agent6)), Passed},
		{"advertisement to the agent", Uplink, eth(b.mac, peerMAC, 0x86dd, ip6(peer6, agent6, 58), neighbour(136, peer6)), Passed},
		{"packet too big", Uplink, eth(b.mac, peerMAC, 0x86dd, ip6(peer6, agent6, 58), []byte{2, 0, 0, 0, 0, 0, 5, 0}), Passed},
		{"ssh", Uplink, eth(b.mac, peerMAC, 0x800, ip4(peerAddr, agentAddr, TCP, 0, 0), tcp(5, 22, 2)), Closed},
		{"port of the other protocol", Uplink, eth(b.mac, peerMAC, 0x800, ip4(peerAddr, agentAddr, TCP, 0, 0), tcp(5, 4791, 2)), Closed},
		{"redirect", Uplink, eth(b.mac, peerMAC, 0x800, ip4(peerAddr, agentAddr, 1, 0, 0), []byte{5, 0, 0, 0, 0, 0, 0, 0}), Closed},
		{"tagged", Uplink, eth(b.mac, peerMAC, 0x8100, vlan(7, 0x800), ip4(peerAddr, agentAddr, UDP, 0, 0), udp(5, 4791)), Closed},
		{"fragment", Uplink, eth(b.mac, peerMAC, 0x800, ip4(peerAddr, agentAddr, UDP, 0x2000, 0), udp(5, 4791)), Closed},
		{"to the hardware address alone", Uplink, eth(b.mac, peerMAC, 0x800, ip4(peerAddr, hostAddr, UDP, 0, 0), udp(5, 4791)), Closed},
		{"as the agent", Uplink, eth(hostMAC, peerMAC, 0x800, ip4(agentAddr, hostAddr, UDP, 0, 0), udp(5, 6)), Guarded},
		{"to the host", Uplink, eth(hostMAC, peerMAC, 0x800, ip4(peerAddr, hostAddr, UDP, 0, 0), udp(5, 4791)), Forwarded},
		{"arp to the host", Uplink, eth(broadcast, peerMAC, 0x806, arp(1, peerMAC, peerAddr, hostAddr)), Forwarded},
	} {
		if got := b.run(tt.from, tt.frame); got != tt.want {
			t.Errorf("%s, from the %v: %v; want %v", tt.name, tt.from, got, tt.want)
		}
	}
	s, err := b.g.Seen()
	if err != nil {
		t.Fatal(err)
	}
	if s.ARP != 4 || s.SYN != 3 || time.Since(s.Last) > time.Minute {
		t.Errorf("seen of the host: %+v; want 4 ARP, 3 SYN, just now", s)
	}
}

// TestSetOwn gives the agent other addresses while what it had holds goes on.
func TestSetOwn(t *testing.T) {
	b := newBench(t)
	other := netip.MustParseAddr("fd00::7")
	to := func(a netip.Addr) []byte {
		return eth(peerMAC, hostMAC, 0x86dd, ip6(host6, a, TCP), tcp(5, 443, 2))
	}
	if err := b.g.Block(Rule{Remote: peer6}, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := b.run(Host, to(other)); got != Forwarded {
		t.Errorf("to an address that is not the agent's yet: %v", got)
	}
	if err := b.g.SetOwn([]netip.Addr{agentAddr, other}); err != nil {
		t.Fatal(err)
	}
	for a, want := range map[netip.Addr]Verdict{other: Guarded, agent6: Forwarded, peer6: Blocked} {
		if got := b.run(Host, to(a)); got != want {
			t.Errorf("to %v afterwards: %v; want %v", a, got, want)
		}
	}
	if err := b.g.SetOwn([]netip.Addr{agentAddr, {}}); err == nil {
		t.Error("no address is taken for one")
	}
	if got := b.run(Host, to(other)); got != Guarded {
		t.Errorf("after an attempt that failed: %v", got)
	}
}

// No frame, however short, is passed on unless its headers are whole, and none crashes the parser.
func TestTruncated(t *testing.T) {
	b := newBench(t)
	whole := map[string][]byte{
		"udp":        eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, UDP, 0, 0), udp(5, 6)),
		"tcp6":       eth(peerMAC, hostMAC, 0x86dd, ip6(host6, peer6, 0), []byte{TCP, 0, 0, 0, 0, 0, 0, 0}, tcp(5, 6, 2)),
		"arp":        eth(peerMAC, hostMAC, 0x806, arp(1, hostMAC, hostAddr, peerAddr)),
		"solicitate": eth(peerMAC, hostMAC, 0x8100, vlan(1, 0x86dd), ip6(host6, peer6, 58), neighbour(135, peer6)),
	}
	for name, frame := range whole {
		for n := 14; n < len(frame); n++ { // the kernel takes no shorter ones for a test
			got := b.run(Host, frame[:n])
			if name == "tcp6" && n >= len(frame)-20+14 {
				continue // all that is read of TCP is there
			}
			if got != Malformed {
				t.Errorf("%s of %d bytes: %v", name, n, got)
			}
		}
		if got := b.run(Host, frame); got != Forwarded {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestQuarantine(t *testing.T) {
	b := newBench(t)
	out := func(dst netip.Addr) []byte {
		if dst.Is6() {
			return eth(peerMAC, hostMAC, 0x86dd, ip6(host6, dst, UDP), udp(5, 6))
		}
		return eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, dst, UDP, 0, 0), udp(5, 6))
	}
	back := eth(hostMAC, peerMAC, 0x800, ip4(peerAddr, hostAddr, UDP, 0, 0), udp(6, 5))
	want := func(what string, from Port, frame []byte, v Verdict) {
		t.Helper()
		if got := b.run(from, frame); got != v {
			t.Errorf("%s: %v; want %v", what, got, v)
		}
	}
	if err := b.g.Quarantine([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, time.Hour); err != nil {
		t.Fatal(err)
	}
	want("quarantined", Host, out(peerAddr), Quarantined)
	want("quarantined, back", Uplink, back, Quarantined)
	want("quarantined, v6", Host, out(peer6), Quarantined)
	want("allowed", Host, out(netip.MustParseAddr("192.0.2.77")), Forwarded)
	want("arp", Host, eth(broadcast, hostMAC, 0x806, arp(1, hostMAC, hostAddr, peerAddr)), Forwarded)
	want("RoCE to the agent", Uplink, eth(b.mac, peerMAC, 0x800, ip4(peerAddr, agentAddr, UDP, 0, 0), udp(5, 4791)), Passed)

	// A new list replaces the old one. All of IPv6 is not IPv4.
	if err := b.g.Quarantine([]netip.Prefix{netip.MustParsePrefix("::/0")}, time.Hour); err != nil {
		t.Fatal(err)
	}
	want("no longer allowed", Host, out(netip.MustParseAddr("192.0.2.77")), Quarantined)
	want("v6 allowed", Host, out(peer6), Forwarded)
	c, err := b.g.Containment()
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(c.Quarantine); left < 59*time.Minute || left > time.Hour || !slices.Equal(c.Allow, []netip.Prefix{netip.MustParsePrefix("::/0")}) {
		t.Errorf("containment = %+v", c)
	}

	// It outlives the agent's process, and ends by itself.
	if err := b.g.Close(); err != nil {
		t.Fatal(err)
	}
	b.open()
	want("after a restart", Host, out(peerAddr), Quarantined)
	if err := b.g.Quarantine(nil, time.Nanosecond); err != nil {
		t.Fatal(err)
	}
	want("ended", Host, out(peerAddr), Forwarded)

	// Rules for flows.
	all, port := Rule{Remote: netip.MustParseAddr("192.0.2.1")}, Rule{peerAddr, UDP, 6}
	for _, r := range []Rule{all, port} {
		if err := b.g.Block(r, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	want("blocked port", Host, out(peerAddr), Blocked)
	want("blocked port, back", Uplink, back, Blocked)
	want("another port", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, UDP, 0, 0), udp(5, 7)), Forwarded)
	want("another protocol", Host, eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, TCP, 0, 0), tcp(5, 6, 2)), Forwarded)
	want("blocked remote", Host, out(all.Remote), Blocked)
	if err := b.g.Unblock(port); err != nil {
		t.Fatal(err)
	}
	want("unblocked", Host, out(peerAddr), Forwarded)
	if err := b.g.Release(); err != nil {
		t.Fatal(err)
	}
	want("released", Host, out(all.Remote), Forwarded)
	if c, err := b.g.Containment(); err != nil || c.Rules != nil || !c.Quarantine.IsZero() {
		t.Errorf("containment after release = %+v, %v", c, err)
	}

	held := map[string]uint64{}
	for f, err := range b.g.Flows() {
		if err != nil {
			t.Fatal(err)
		}
		held[fmt.Sprint(f.Proto, f.Host, f.Remote)] = f.Held
		if f.Remote == netip.AddrPortFrom(peerAddr, 6) && f.Proto == UDP && (f.Out.Packets != 5 || f.In.Packets != 2 || f.Held != 5) {
			t.Errorf("flow to the peer: %+v; want 5 out, 2 in, 5 held", f)
		}
	}
	if len(held) != 6 {
		t.Errorf("flows: %v; want 6", held)
	}
}

// What tells a scan and a silent host is counted by conversations, so that nobody has to look through all flows for it.
func TestConversations(t *testing.T) {
	b := newBench(t)
	out := func(remote uint16) []byte {
		return eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, TCP, 0, 0), tcp(5, remote, 2))
	}
	in := func(remote uint16, flags byte) []byte {
		return eth(hostMAC, peerMAC, 0x800, ip4(peerAddr, hostAddr, TCP, 0, 0), tcp(remote, 5, flags))
	}
	for _, f := range []struct {
		from  Port
		frame []byte
	}{
		{Host, out(1)}, {Host, out(1)}, // nobody answers
		{Host, out(2)}, {Uplink, in(2, 0x14)}, {Uplink, in(2, 0x14)}, // refused
		{Host, out(3)}, {Uplink, in(3, 0x12)}, {Uplink, in(3, 0x14)}, // answered, and broken off later
		{Uplink, in(4, 2)}, {Uplink, in(4, 2)}, // of another, and not answered
		{Uplink, in(5, 2)}, {Host, out(5)}, {Uplink, in(5, 0x10)}, // of another, and answered
	} {
		b.run(f.from, f.frame)
	}
	if err := b.g.Quarantine(nil, time.Hour); err != nil {
		t.Fatal(err)
	}
	b.run(Host, out(6)) // it is kept back
	s, err := b.g.Seen()
	if err != nil {
		t.Fatal(err)
	}
	if s.Opened != 3 || s.Answered != 2 || s.Refused != 1 || s.Asked != 5 {
		t.Errorf("seen: %+v; want 3 opened, 2 answered, 1 refused, 5 asked", s)
	}
}

func TestLimit(t *testing.T) {
	b := newBench(t)
	// A limit so low that the bucket does not fill noticeably while the test runs.
	if err := b.g.Limit(Limit{Rate: 1, Burst: 10000}, time.Hour); err != nil {
		t.Fatal(err)
	}
	frame := eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, UDP, 0, 0), udp(5, 6), make([]byte, 958))
	through := 0
	for b.run(Host, frame) == Forwarded {
		if through++; through > 100 {
			break
		}
	}
	if through != 11 { // 10 fill the bucket, the next finds it full but not over
		t.Errorf("%d frames of 1000 bytes went through; want 11", through)
	}
	if got := b.run(Uplink, eth(hostMAC, peerMAC, 0x800, ip4(peerAddr, hostAddr, UDP, 0, 0), udp(6, 5))); got != Forwarded {
		t.Errorf("to the host: %v", got)
	}
	if c, err := b.g.Containment(); err != nil || c.Limit != (Limit{Rate: 1, Burst: 10000}) {
		t.Errorf("containment = %+v, %v", c, err)
	}
	if err := b.g.Release(); err != nil {
		t.Fatal(err)
	}
	if got := b.run(Host, frame); got != Forwarded {
		t.Errorf("after release: %v", got)
	}
}

func TestBadInput(t *testing.T) {
	b := newBench(t)
	for name, err := range map[string]error{
		"no time":      b.g.Quarantine(nil, 0),
		"too long":     b.g.Quarantine(nil, Longest+1),
		"no prefix":    b.g.Quarantine([]netip.Prefix{{}}, time.Hour),
		"no rate":      b.g.Limit(Limit{Burst: 20000}, time.Hour),
		"small bursts": b.g.Limit(Limit{Rate: 1000, Burst: 1000}, time.Hour),
		"no remote":    b.g.Block(Rule{Proto: TCP, Port: 5}, time.Hour),
		"port of what": b.g.Block(Rule{Remote: peerAddr, Port: 5}, time.Hour),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if c, err := b.g.Containment(); err != nil || !c.Quarantine.IsZero() || !c.LimitEnds.IsZero() || c.Rules != nil {
		t.Errorf("containment = %+v, %v; want none", c, err)
	}
	for name, change := range map[string]func(*Config){
		"no such interface":     func(c *Config) { c.Host = "nosuch" },
		"one interface":         func(c *Config) { c.Host = c.Uplink },
		"no address":            func(c *Config) { c.Own = []netip.Addr{{}} },
		"multicast":             func(c *Config) { c.Own = []netip.Addr{netip.MustParseAddr("224.0.0.1")} },
		"no BPF file system":    func(c *Config) { c.Pin = t.TempDir() },
		"too many addresses":    func(c *Config) { c.Own = many(17) },
		"an address for a host": func(c *Config) { c.Host = "wire" },
	} {
		c := b.config
		change(&c)
		if name == "an address for a host" {
			a, err := netlink.ParseAddr("10.9.9.9/24")
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.AddrAdd(at(t, "wire"), a); err != nil {
				t.Fatal(err)
			}
		}
		if g, err := Open(c); err == nil {
			g.Close()
			t.Errorf("%s: opened", name)
		}
	}
}

func many(n int) (all []netip.Addr) {
	for i := range n {
		all = append(all, netip.AddrFrom4([4]byte{10, 8, 0, byte(i)}))
	}
	return all
}

// TestForwarding sends frames over virtual cables, while the agent's process goes away and comes back.
func TestForwarding(t *testing.T) {
	b := newBench(t)
	addr, err := netlink.ParseAddr(agentAddr.String() + "/24")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(at(t, "gwwire"), addr); err != nil {
		t.Fatal(err)
	}
	host, wire := newRaw(t, "host"), newRaw(t, "wire")
	out := eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, UDP, 0, 0), udp(5, 6), []byte("out"))
	in := eth(hostMAC, peerMAC, 0x800, ip4(peerAddr, hostAddr, UDP, 0, 0), udp(6, 5), []byte("in!"))
	through := func(when string) {
		t.Helper()
		host.send(out)
		if !wire.got(out) {
			t.Errorf("%s: nothing came from the host to the wire", when)
		}
		wire.send(in)
		if !host.got(in) {
			t.Errorf("%s: nothing came from the wire to the host", when)
		}
	}
	through("open")
	if err := b.g.Close(); err != nil {
		t.Fatal(err)
	}
	through("without an agent")
	before := b.g
	b.open()
	if b.g == before {
		t.Fatal("not opened again")
	}
	through("opened again")
	if c, err := b.g.Counters(); err != nil || c[Host][Forwarded].Packets != 3 || c[Uplink][Forwarded].Packets < 3 {
		t.Errorf("counters = %v, %v; want 3 forwarded each way", c, err)
	}

	// What the wire sends to a service of the agent reaches its stack, what the host sends there does not.
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(l)
	if err := unix.Bind(l, &unix.SockaddrInet4{Port: 4791, Addr: agentAddr.As4()}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(l, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	for _, from := range []struct {
		s    *raw
		src  netip.Addr
		body string
	}{{host, hostAddr, "from the host"}, {wire, peerAddr, "from the wire"}} {
		h := ip4(from.src, agentAddr, UDP, 0, 0)
		binary.BigEndian.PutUint16(h[2:], uint16(28+len(from.body)))
		binary.BigEndian.PutUint16(h[10:], checksum(h))
		u := udp(9, 4791)
		binary.BigEndian.PutUint16(u[4:], uint16(8+len(from.body)))
		from.s.send(eth(b.mac, peerMAC, 0x800, h, u, []byte(from.body)))
	}
	buf := make([]byte, 100)
	n, _, err := unix.Recvfrom(l, buf, 0)
	if err != nil || string(buf[:n]) != "from the wire" {
		t.Errorf("the agent received %q, %v; want what came from the wire", buf[:n], err)
	}

	// Removed, nothing goes through any longer.
	if err := b.g.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(b.config.Pin); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins are left: %v", err)
	}
	host.send(out)
	host.send(out)
	wire.timeout(200 * time.Millisecond)
	if wire.got(out) {
		t.Error("forwarded after Remove")
	}
}

func checksum(h []byte) uint16 {
	var sum uint32
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// raw sends and receives frames at an interface.
type raw struct {
	t  *testing.T
	fd int
	ix int
}

func newRaw(t *testing.T, name string) *raw {
	t.Helper()
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, all)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	r := &raw{t, fd, at(t, name).Attrs().Index}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: r.ix}); err != nil {
		t.Fatal(err)
	}
	r.timeout(5 * time.Second)
	return r
}

func (r *raw) timeout(d time.Duration) {
	tv := unix.NsecToTimeval(int64(d))
	if err := unix.SetsockoptTimeval(r.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) send(frame []byte) {
	r.t.Helper()
	if err := unix.Sendto(r.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: r.ix}); err != nil {
		r.t.Fatal(err)
	}
}

// got tells whether the frame arrives, of all those that do in time.
func (r *raw) got(frame []byte) bool {
	r.t.Helper()
	buf := make([]byte, 2048)
	for {
		n, from, err := unix.Recvfrom(r.fd, buf, 0)
		if err != nil {
			return false
		}
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if slices.Equal(buf[:n], frame) {
			return true
		}
	}
}

// FuzzFromHost wants that nothing that a host sends reaches the agent's stack, and that what is forwarded is neither to nor from its
// hardware address, and not plainly to or from its IPv4 address.
func FuzzFromHost(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("programs in the kernel take root")
	}
	var objs gatewayObjects
	if err := loadGatewayObjects(&objs, nil); err != nil {
		f.Fatal(err)
	}
	defer objs.Close()
	set := gatewaySettings{Mac: [6]uint8{2, 0, 0, 0, 0, 1}}
	if err := errors.Join(objs.Agent.Put(uint32(0), &set), objs.Own.Put(toAddr(agentAddr), uint8(1)), objs.Own.Put(toAddr(agent6), uint8(1))); err != nil {
		f.Fatal(err)
	}
	f.Add(eth(peerMAC, hostMAC, 0x8100, vlan(7, 0x800), ip4(hostAddr, agentAddr, UDP, 0, 4), udp(5, 4791)))
	f.Add(eth(peerMAC, hostMAC, 0x86dd, ip6(host6, agent6, 0), []byte{60, 0, 0, 0, 0, 0, 0, 0}, []byte{TCP, 0, 0, 0, 0, 0, 0, 0}, tcp(5, 443, 2)))
	f.Add(eth(broadcast, hostMAC, 0x86dd, ip6(host6, peer6, 58), neighbour(135, agent6)))
	f.Add(eth(broadcast, hostMAC, 0x806, arp(1, hostMAC, hostAddr, agentAddr)))
	f.Add(eth(peerMAC, hostMAC, 0x800, ip4(hostAddr, peerAddr, TCP, 0, 0), tcp(5, 6, 2)))
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < 14 || len(frame) > 2000 {
			return
		}
		action, err := objs.FromHost.Run(&ebpf.RunOptions{Data: frame})
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case action == 1: // dropped
		case action != 4:
			t.Errorf("action %d", action)
		case slices.Equal(frame[:6], set.Mac[:]) || slices.Equal(frame[6:12], set.Mac[:]):
			t.Error("forwarded by or to the agent's hardware address")
		case len(frame) >= 34 && frame[12] == 8 && frame[13] == 0 &&
			(slices.Equal(frame[26:30], agentAddr.AsSlice()) || slices.Equal(frame[30:34], agentAddr.AsSlice())):
			t.Error("forwarded by or to the agent's address")
		}
	})
}
