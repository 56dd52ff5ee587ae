// Package datapath is the packet path of a NIC that stands between a host and the wire, in eBPF: XDP programs on the
// interface that leads to the host and on the uplink, which forward between the two, and decide on each frame.
//
//	host ──▶ from_host ──▶ forwarded, or dropped and counted           agent's own stack
//	              │                                                       ▲
//	              └────────────▶ uplink                                   │ services only
//	         host ◀──────────────── from_wire ◀── wire ───────────────────┘
//
// Guard: nothing that the host sends reaches the agent's addresses, its hardware address, or leaves in their name, also
// not by ARP, neighbour discovery, IPv6, in VLANs, fragments or behind IP options. What cannot be parsed far enough to be
// judged is dropped, never waved through.
//
// Steer: frames from the wire for the agent's addresses go to its own network stack if they are for one of its services
// (RoCEv2, Redfish), and are dropped in the driver if not. Neither they nor the agent's answers wait behind the host's
// traffic in a queue of this package. The host's side is polled by threads of low priority, so that its traffic takes no time of the agent's.
//
// Contain: the host, or single flows of it, can be cut off or slowed down. Each containment ends by itself: the program
// compares the time for each frame, so that it ends when it should even if the agent no longer runs.
//
// Watch: counters for each verdict, records of flows, and what is seen of the host.
//
// Forwarding, containment and counters outlive the agent's process: programs and maps are pinned in a BPF file system, and
// the next Open takes them over, replacing the programs without dropping a frame.
//
// It needs Linux 5.18 on arm64 (atomics in BPF), 5.12 on x86-64, and CAP_NET_ADMIN and CAP_BPF. In native mode virtio_net of
// Linux 6.1 takes an MTU of at most 3500.
package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

//go:generate go tool bpf2go -target bpfel -cflags "-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" -type flow_key -type flow -type settings -type containment -type service_key -type rule_key -type allow_key -type seen -type counter -type addr -go-package datapath gateway datapath.c

// Port is one of the two sides of the gateway.
type Port uint8

const (
	Host   Port = iota // the interface that leads to the host
	Uplink             // the interface that leads to the wire
	ports
)

func (p Port) String() string { return [...]string{"host", "uplink"}[min(p, Uplink)] }

// Verdict is what became of a frame.
type Verdict uint8

// The order is that of enum verdict in datapath.c.
const (
	Forwarded   Verdict = iota // to the other side
	Passed                     // to the agent's network stack
	Malformed                  // dropped: shorter than its headers say
	Unparsed                   // dropped: a protocol that cannot be judged
	Guarded                    // dropped: to the agent or in its name, from where it must not come
	Closed                     // dropped: to the agent, for what it does not serve
	Quarantined                // dropped by the quarantine
	Blocked                    // dropped by a rule for its flow
	Limited                    // dropped because the host sent too much
	verdicts
)

func (v Verdict) String() string {
	return [...]string{"forwarded", "passed", "malformed", "unparsed", "guarded", "closed", "quarantined", "blocked", "limited", "?"}[min(v, verdicts)]
}

// Protocol numbers of IANA that rules and services name.
const (
	TCP uint8 = unix.IPPROTO_TCP
	UDP uint8 = unix.IPPROTO_UDP
)

// Service is what the agent serves on its own addresses.
type Service struct {
	Proto uint8
	Port  uint16
}

// Config describes a gateway.
type Config struct {
	// Host and Uplink are the names of the interfaces. Both are set up and made promiscuous; the one that leads to the host
	// must have no address, so that the host cannot see this machine on it.
	Host, Uplink string
	// Own are the agent's addresses on the uplink, at most 16, and Services what it serves there, at most 32.
	Own      []netip.Addr
	Services []Service
	// Pin is a folder of a BPF file system, made if it is not there; /sys/fs/bpf/backdoor if empty.
	Pin string
	// Generic runs the programs behind the drivers, for those that cannot run them. Otherwise it is done where native fails.
	Generic bool
}

// Gateway is a packet path that runs. It is safe for concurrent use.
type Gateway struct {
	// Yields is nil if the host's traffic gives way to all else on this machine; it runs without, and a host that floods slows this
	// machine down.
	Yields error

	pin   string
	objs  gatewayObjects
	links [ports]link.Link

	mu sync.Mutex // one change of the containment at a time
}

// ErrVersion is of programs that another version of this package pinned, whose maps cannot be taken over.
var ErrVersion = errors.New("what is pinned was left by another version")

// Open starts the packet path, or takes over the one that runs.
func Open(c Config) (*Gateway, error) {
	g := &Gateway{pin: c.Pin}
	if g.pin == "" {
		g.pin = "/sys/fs/bpf/backdoor"
	}
	if err := g.open(c); err != nil {
		g.Close()
		return nil, fmt.Errorf("open gateway between %s and %s: %w", c.Host, c.Uplink, err)
	}
	return g, nil
}

func (g *Gateway) open(c Config) error {
	host, err := netlink.LinkByName(c.Host)
	if err != nil {
		return err
	}
	uplink, err := netlink.LinkByName(c.Uplink)
	if err != nil {
		return err
	}
	if host.Attrs().Index == uplink.Attrs().Index {
		return errors.New("host and uplink are the same interface")
	}
	if err := hide(host); err != nil {
		return err
	}
	// Before Linux 5.11, BPF memory counts as locked; where it does and the limit cannot be lifted, the programs fail to load. cilium/ebpf's
	// rlimit would try at each start of the agent whether it does, and make a map for that.
	_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	if err := os.MkdirAll(g.pin, 0o700); err != nil {
		return fmt.Errorf("make the folder for pins (is a BPF file system mounted there?): %w", err)
	}
	spec, err := loadGateway()
	if err != nil {
		return err
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinByName
	}
	if err := spec.LoadAndAssign(&g.objs, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: g.pin}}); err != nil {
		if errors.Is(err, ebpf.ErrMapIncompatible) {
			return fmt.Errorf("%w, under %s; remove that folder to start afresh, which ends its containments: %w", ErrVersion, g.pin, err)
		}
		return err
	}
	if err := g.configure(c, host, uplink); err != nil {
		return err
	}
	for p, at := range map[Port]netlink.Link{Host: host, Uplink: uplink} {
		if err := g.attach(p, at, c.Generic); err != nil {
			return fmt.Errorf("attach to %s: %w", at.Attrs().Name, err)
		}
	}
	// A program sees foreign frames only where the interface takes them.
	for _, l := range []netlink.Link{host, uplink} {
		if err := netlink.SetPromiscOn(l); err != nil {
			return fmt.Errorf("make %s promiscuous: %w", l.Attrs().Name, err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s up: %w", l.Attrs().Name, err)
		}
	}
	g.Yields = yield(host.Attrs().Name)
	return nil
}

// behind is the nice value of the threads that poll the host's side: a tenth of the weight of all else.
const behind = 10

// yield has what the host sends judged by threads of the kernel that stand behind everything else on this machine, the agent above all: else
// a host that floods takes half of a CPU from it, in ksoftirqd, and all of it in interrupts (NAPI polls up to 64 frames, ten times or 2 ms,
// before it gives way; __do_softirq). What is not polled in time is dropped by the card. Linux has it since 5.12 (net: add sysfs attribute to
// control napi threaded mode).
func yield(name string) error {
	if err := os.WriteFile(filepath.Join("/sys/class/net", name, "threaded"), []byte("1"), 0o644); err != nil {
		return fmt.Errorf("have threads poll %s: %w", name, err)
	}
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return err
	}
	n, prefix := 0, "napi/"+name+"-" // napi/%s-%d; in full since 5.17 (kthread: dynamically allocate memory to store kthread's full name)
	for _, path := range names {
		b, err := os.ReadFile(path)
		comm := strings.TrimSuffix(string(b), "\n")
		if err != nil || !strings.HasPrefix(comm, prefix) && !(len(comm) == 15 && strings.HasPrefix(prefix, comm)) {
			continue // of something else, or it has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil {
			err = unix.Setpriority(unix.PRIO_PROCESS, pid, behind)
		}
		if err != nil {
			return fmt.Errorf("put %s behind all else: %w", comm, err)
		}
		n++
	}
	if n == 0 {
		return fmt.Errorf("no thread of the kernel polls %s: its driver has no NAPI", name)
	}
	return nil
}

// hide sees to it that this machine's stack says nothing on the interface that leads to the host.
func hide(host netlink.Link) error {
	name := host.Attrs().Name
	addrs, err := netlink.AddrList(host, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", name, err)
	}
	if len(addrs) > 0 {
		return fmt.Errorf("%s has the address %v, which the host could see: remove it", name, addrs[0].IPNet)
	}
	off := filepath.Join("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
	if err := os.WriteFile(off, []byte("1"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("switch IPv6 off on %s: %w", name, err)
	}
	return nil
}

// configure writes what the programs know of the agent.
func (g *Gateway) configure(c Config, host, uplink netlink.Link) error {
	var mac gatewaySettings
	if copy(mac.Mac[:], uplink.Attrs().HardwareAddr) != len(mac.Mac) {
		return fmt.Errorf("%s is no Ethernet interface", uplink.Attrs().Name)
	}
	if err := g.objs.Agent.Put(uint32(0), &mac); err != nil {
		return err
	}
	if err := g.SetOwn(c.Own); err != nil {
		return err
	}
	services := map[gatewayServiceKey]uint8{}
	for _, s := range c.Services {
		services[gatewayServiceKey{Port: htons(s.Port), Proto: s.Proto}] = 1
	}
	if err := replace(g.objs.Services, services); err != nil {
		return fmt.Errorf("set the agent's %d services: %w", len(services), err)
	}
	for p, l := range map[Port]netlink.Link{Host: host, Uplink: uplink} {
		if err := g.objs.Ports.Put(uint32(p), uint32(l.Attrs().Index)); err != nil {
			return fmt.Errorf("set the interface %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// SetOwn says what the agent's addresses on the uplink are, at most 16; routers give machines new ones.
func (g *Gateway) SetOwn(addrs []netip.Addr) error {
	own := map[gatewayAddr]uint8{}
	for _, a := range addrs {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
			return fmt.Errorf("%v is no address of an agent", a)
		}
		own[toAddr(a)] = 1
	}
	if err := replace(g.objs.Own, own); err != nil {
		return fmt.Errorf("set the agent's %d addresses: %w", len(own), err)
	}
	return nil
}

// attach puts a port's program onto its interface, in the place of the one that is there from an earlier Open.
func (g *Gateway) attach(p Port, at netlink.Link, generic bool) error {
	prog := [...]*ebpf.Program{Host: g.objs.FromHost, Uplink: g.objs.FromWire}[p]
	pin := filepath.Join(g.pin, "link_"+p.String())
	if old, err := link.LoadPinnedLink(pin, nil); err == nil {
		if info, err := old.Info(); err == nil && info.XDP() != nil && info.XDP().Ifindex == uint32(at.Attrs().Index) {
			if err := old.Update(prog); err != nil {
				old.Close()
				return fmt.Errorf("replace the program: %w", err)
			}
			g.links[p] = old
			return nil
		}
		// Of an interface that is gone or no longer ours.
		err := errors.Join(old.Unpin(), old.Close())
		if err != nil {
			return fmt.Errorf("remove the link of an earlier interface: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open the link that is pinned: %w", err)
	}
	o := link.XDPOptions{Program: prog, Interface: at.Attrs().Index, Flags: link.XDPDriverMode}
	var native error
	if !generic {
		g.links[p], native = link.AttachXDP(o)
	}
	if generic || native != nil {
		o.Flags = link.XDPGenericMode
		l, err := link.AttachXDP(o)
		if err != nil {
			return errors.Join(native, err)
		}
		g.links[p] = l
	}
	return g.links[p].Pin(pin)
}

// Native tells whether the programs run in the drivers of both interfaces, and not behind them.
func (g *Gateway) Native() (bool, error) {
	for _, l := range g.links {
		info, err := l.Info()
		if err != nil {
			return false, fmt.Errorf("ask how a program is attached: %w", err)
		}
		dev, err := netlink.LinkByIndex(int(info.XDP().Ifindex))
		if err != nil {
			return false, err
		}
		if x := dev.Attrs().Xdp; x == nil || x.AttachMode != nl.XDP_ATTACHED_DRV {
			return false, nil
		}
	}
	return true, nil
}

// Close lets go of the packet path, which goes on.
func (g *Gateway) Close() error {
	var errs []error
	for _, l := range g.links {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(append(errs, g.objs.Close())...)
}

// Remove ends the packet path: nothing is forwarded any longer, and all that is known of it is gone.
func (g *Gateway) Remove() error {
	var errs []error
	for _, l := range g.links {
		if l != nil {
			errs = append(errs, l.Unpin())
		}
	}
	errs = append(errs, g.Close())
	return errors.Join(append(errs, os.RemoveAll(g.pin))...)
}

// Counter counts frames and their bytes, Ethernet headers included.
type Counter struct{ Packets, Bytes uint64 }

// Counters has what became of the frames that came in at each port since the packet path was first opened.
type Counters [ports][verdicts]Counter

// Counters reads the counters.
func (g *Gateway) Counters() (Counters, error) {
	var all Counters
	for p := range all {
		for v := range all[p] {
			var cpus []gatewayCounter
			if err := g.objs.Counters.Lookup(uint32(p*int(verdicts)+v), &cpus); err != nil {
				return all, fmt.Errorf("read counter of frames %s at %s: %w", Verdict(v), Port(p), err)
			}
			for _, c := range cpus {
				all[p][v].Packets += c.Packets
				all[p][v].Bytes += c.Bytes
			}
		}
	}
	return all, nil
}

// Seen is what the gateway has seen of the host, whatever became of it.
type Seen struct {
	Last time.Time // of its last frame; zero if there was none
	// SYN counts segments of TCP that open a connection, RST those that refuse or break one off, ARP frames of ARP.
	SYN, RST, ARP uint64
	// Asked are packets to it in conversations in which it has had its say. Opened counts conversations that it began and was let begin, Answered those of them in
	// which the other side has said something since, Refused those whose first answer was a RST.
	Asked, Opened, Answered, Refused uint64
}

// Seen reads what was seen of the host.
func (g *Gateway) Seen() (Seen, error) {
	var s gatewaySeen
	if err := g.objs.Watch.Lookup(uint32(0), &s); err != nil {
		return Seen{}, fmt.Errorf("read what was seen of the host: %w", err)
	}
	now, err := clock()
	if err != nil {
		return Seen{}, err
	}
	return Seen{
		Last: now.wall(s.Last), SYN: s.Syn, RST: s.Rst, ARP: s.Arp, Asked: s.Asked, Opened: s.Opened, Answered: s.Answered, Refused: s.Refused,
	}, nil
}

// Flow is the traffic between a port of the host and a port of another machine. Ports are 0 for protocols that have none, and
// for fragments. Old flows give way to new ones when there are more than 16384.
type Flow struct {
	Host, Remote netip.AddrPort
	Proto        uint8   // of IANA
	Out, In      Counter // what the host sent and what it was sent, forwarded or not
	Held         uint64  // how many packets of these were not forwarded
	SYN, RST     uint32  // segments of TCP that the host sent
	First, Last  time.Time
}

// Flows iterates over the flows, in no order. Those that come and go meanwhile may be missed.
func (g *Gateway) Flows() iter.Seq2[Flow, error] {
	return func(yield func(Flow, error) bool) {
		now, err := clock()
		if err != nil {
			yield(Flow{}, err)
			return
		}
		var k gatewayFlowKey
		var f gatewayFlow
		it := g.objs.Flows.Iterate()
		for it.Next(&k, &f) {
			ok := yield(Flow{
				Host: netip.AddrPortFrom(fromAddr(k.Host), htons(k.HostPort)), Remote: netip.AddrPortFrom(fromAddr(k.Remote), htons(k.RemotePort)),
				Proto: k.Proto, Out: Counter(f.Out.counter()), In: Counter(f.In.counter()), Held: f.Held, SYN: f.Syn, RST: f.Rst,
				First: now.wall(f.First), Last: now.wall(f.Last),
			}, nil)
			if !ok {
				return
			}
		}
		// With flows coming and going, an iteration may have to give up.
		if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
			yield(Flow{}, fmt.Errorf("list flows: %w", err))
		}
	}
}

func (c gatewayCounter) counter() Counter { return Counter{c.Packets, c.Bytes} }

// Rule keeps back what goes between the host and a remote, both ways.
type Rule struct {
	Remote netip.Addr
	Proto  uint8  // 0 means all, and then Port does, too
	Port   uint16 // of the remote; 0 means all
}

// Limit is how much the host may send.
type Limit struct {
	Rate  uint64 // bytes per second, at least 1
	Burst uint64 // bytes that may come at once, at least one frame's
}

// Containment is what keeps the host's traffic back. Its parts hold independently of each other.
type Containment struct {
	Quarantine time.Time // until when; zero if there is none
	Allow      []netip.Prefix
	Limit      Limit
	LimitEnds  time.Time // zero if there is none
	Rules      map[Rule]time.Time
}

// Longest is the longest containment. One that must last longer is renewed.
const Longest = 30 * 24 * time.Hour

func (g *Gateway) until(d time.Duration) (uint64, error) {
	if d <= 0 || d > Longest {
		return 0, fmt.Errorf("a containment lasts longer than 0 and at most %v, not %v", Longest, d)
	}
	now, err := clock()
	if err != nil {
		return 0, err
	}
	return now.boot + uint64(d), nil
}

// change changes the fixed part of the containment.
func (g *Gateway) change(f func(*gatewayContainment)) error {
	var c gatewayContainment
	if err := g.objs.Contain.Lookup(uint32(0), &c); err != nil {
		return fmt.Errorf("read the containment: %w", err)
	}
	f(&c)
	if err := g.objs.Contain.Put(uint32(0), &c); err != nil {
		return fmt.Errorf("write the containment: %w", err)
	}
	return nil
}

// Quarantine cuts the host off from all but the remotes that are allowed, for a time. It replaces an earlier quarantine. ARP and
// neighbour discovery go on, because nobody allowed could be reached without.
func (g *Gateway) Quarantine(allow []netip.Prefix, d time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	until, err := g.until(d)
	if err != nil {
		return err
	}
	want := map[gatewayAllowKey]uint8{}
	for _, p := range allow {
		if !p.IsValid() {
			return fmt.Errorf("%v is no prefix", p)
		}
		want[allowKey(p)] = 1
		// A wide prefix of IPv6 does not allow the IPv4 addresses that are written as part of it.
		if mapped := netip.MustParsePrefix("::ffff:0:0/96"); !p.Addr().Is4() && p.Bits() < mapped.Bits() && p.Contains(mapped.Addr()) {
			if _, ok := want[allowKey(mapped)]; !ok {
				want[allowKey(mapped)] = 0
			}
		}
	}
	// Closed first; what is allowed is opened behind that.
	if err := g.change(func(c *gatewayContainment) { c.QuarantineUntil = until }); err != nil {
		return err
	}
	if err := replace(g.objs.Allow, want); err != nil {
		return fmt.Errorf("set what the quarantine lets through: %w", err)
	}
	return nil
}

func allowKey(p netip.Prefix) gatewayAllowKey {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return gatewayAllowKey{Bits: uint32(bits), Remote: toAddr(p.Masked().Addr())}
}

// Limit slows the host's sending down, for a time. It replaces an earlier limit.
func (g *Gateway) Limit(l Limit, d time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	until, err := g.until(d)
	if err != nil {
		return err
	}
	const frame = 9216
	if l.Rate < 1 || l.Burst < frame {
		return fmt.Errorf("a limit of %d bytes/s with bursts of %d: the rate must be at least 1, and the bursts hold a frame of %d", l.Rate, l.Burst, frame)
	}
	per, burst := perKiB(l)
	if burst > math.MaxInt64 {
		return fmt.Errorf("bursts of %d bytes are too long at %d bytes/s", l.Burst, l.Rate)
	}
	return g.change(func(c *gatewayContainment) { c.LimitUntil, c.NsPerKib, c.BurstNs = until, per, uint64(burst) })
}

// perKiB gives a limit in the program's units: ns per 1024 bytes, and ns for the burst.
func perKiB(l Limit) (per uint64, burst float64) {
	per = max(1, uint64(math.Round(1024*float64(time.Second)/float64(l.Rate))))
	return per, float64(l.Burst) / float64(l.Rate) * float64(time.Second)
}

// Block keeps single flows back, for a time.
func (g *Gateway) Block(r Rule, d time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	until, err := g.until(d)
	if err != nil {
		return err
	}
	if !r.Remote.IsValid() || r.Proto == 0 && r.Port != 0 {
		return fmt.Errorf("rule %+v names no flow: it takes a remote's address, and a port only with its protocol", r)
	}
	if err := g.sweep(); err != nil {
		return err
	}
	if err := g.objs.Rules.Put(ruleKey(r), until); err != nil {
		return fmt.Errorf("block %v: %w", r.Remote, err)
	}
	return nil
}

func ruleKey(r Rule) gatewayRuleKey {
	return gatewayRuleKey{Remote: toAddr(r.Remote), Port: htons(r.Port), Proto: r.Proto}
}

// sweep removes the rules that have ended.
func (g *Gateway) sweep() error {
	now, err := clock()
	if err != nil {
		return err
	}
	var over []gatewayRuleKey
	var k gatewayRuleKey
	var until uint64
	it := g.objs.Rules.Iterate()
	for it.Next(&k, &until) {
		if until <= now.boot {
			over = append(over, k)
		}
	}
	for _, k := range over {
		if err := g.objs.Rules.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove a rule that has ended: %w", err)
		}
	}
	return it.Err()
}

// Unblock ends a Block before its time. It is no error if there is none.
func (g *Gateway) Unblock(r Rule) error {
	if err := g.objs.Rules.Delete(ruleKey(r)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("unblock %v: %w", r.Remote, err)
	}
	return nil
}

// Release ends all containment.
func (g *Gateway) Release() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return errors.Join(
		g.change(func(c *gatewayContainment) { *c = gatewayContainment{} }),
		replace(g.objs.Rules, map[gatewayRuleKey]uint64{}),
		replace(g.objs.Allow, map[gatewayAllowKey]uint8{}),
	)
}

// Containment tells what keeps the host's traffic back now.
func (g *Gateway) Containment() (Containment, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out Containment
	var c gatewayContainment
	if err := g.objs.Contain.Lookup(uint32(0), &c); err != nil {
		return out, fmt.Errorf("read the containment: %w", err)
	}
	now, err := clock()
	if err != nil {
		return out, err
	}
	if c.QuarantineUntil > now.boot {
		out.Quarantine = now.wall(c.QuarantineUntil)
		var k gatewayAllowKey
		var v uint8
		it := g.objs.Allow.Iterate()
		for it.Next(&k, &v) {
			a, bits := fromAddr(k.Remote), int(k.Bits)
			if v == 0 {
				continue
			}
			if a.Is4() {
				bits -= 96
			}
			out.Allow = append(out.Allow, netip.PrefixFrom(a, bits))
		}
		if err := it.Err(); err != nil {
			return out, fmt.Errorf("list what the quarantine lets through: %w", err)
		}
	}
	if c.LimitUntil > now.boot {
		out.LimitEnds = now.wall(c.LimitUntil)
		out.Limit.Rate = uint64(math.Round(1024 * float64(time.Second) / float64(c.NsPerKib)))
		out.Limit.Burst = uint64(math.Round(float64(c.BurstNs) * 1024 / float64(c.NsPerKib)))
	}
	var k gatewayRuleKey
	var until uint64
	it := g.objs.Rules.Iterate()
	for it.Next(&k, &until) {
		if until > now.boot {
			if out.Rules == nil {
				out.Rules = map[Rule]time.Time{}
			}
			out.Rules[Rule{Remote: fromAddr(k.Remote), Proto: k.Proto, Port: htons(k.Port)}] = now.wall(until)
		}
	}
	if err := it.Err(); err != nil {
		return out, fmt.Errorf("list rules: %w", err)
	}
	return out, nil
}

// replace makes a map's entries those that are wanted: the surplus goes first.
func replace[K comparable, V any](m *ebpf.Map, want map[K]V) error {
	var surplus []K
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		if _, ok := want[k]; !ok {
			surplus = append(surplus, k)
		}
	}
	if err := it.Err(); err != nil {
		return err
	}
	for _, k := range surplus {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	for k, v := range want {
		if err := m.Put(k, v); err != nil {
			return err
		}
	}
	return nil
}

// instant is a moment on two clocks.
type instant struct {
	boot uint64 // CLOCK_BOOTTIME in ns
	now  time.Time
}

func clock() (instant, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return instant{}, fmt.Errorf("read CLOCK_BOOTTIME: %w", err)
	}
	return instant{uint64(ts.Nano()), time.Now()}, nil
}

// wall gives a moment of CLOCK_BOOTTIME as a time; 0 is the zero time.
func (i instant) wall(boot uint64) time.Time {
	if boot == 0 {
		return time.Time{}
	}
	return i.now.Add(time.Duration(int64(boot - i.boot)))
}

func toAddr(a netip.Addr) (w gatewayAddr) {
	b := a.As16()
	for i := range w.W {
		w.W[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return w
}

func fromAddr(w gatewayAddr) netip.Addr {
	var b [16]byte
	for i := range w.W {
		binary.LittleEndian.PutUint32(b[4*i:], w.W[i])
	}
	return netip.AddrFrom16(b).Unmap()
}

// htons swaps between the order of numbers and that of the network, which the maps keep.
func htons(p uint16) uint16 { return p<<8 | p>>8 }
