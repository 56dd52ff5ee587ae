package kernel

import (
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
)

// Interface is a network interface (struct net_device, include/linux/netdevice.h).
type Interface struct {
	Addr  VirtAddr `json:"addr"`
	Name  string   `json:"name"`
	Index int      `json:"index"`
	Netns uint64   `json:"netns"` // inode number of its network namespace
	Init  bool     `json:"init"`  // it is in the namespace of the host itself, not of a container
	Type  int      `json:"type"`  // ARPHRD_…: 1 Ethernet, 772 loopback
	MAC   string   `json:"mac,omitempty"`
	// PermanentMAC is that of the hardware, if the driver said it.
	PermanentMAC string         `json:"permanentMAC,omitempty"`
	MTU          int            `json:"mtu"`
	Flags        uint64         `json:"flags"`   // IFF_…
	State        string         `json:"state"`   // operstate as in /sys/class/net: up, down, unknown, …
	Carrier      bool           `json:"carrier"` // the link is there
	Driver       string         `json:"driver,omitempty"`
	Device       string         `json:"device,omitempty"` // the name of the parent device: 0000:01:00.0, virtio0
	Addresses    []netip.Prefix `json:"addresses,omitempty"`
	// Counters is nil where only the driver knows them.
	Counters *InterfaceCounters `json:"counters,omitempty"`
}

// InterfaceCounters are since the interface was made.
type InterfaceCounters struct {
	RxPackets uint64 `json:"rxPackets"`
	RxBytes   uint64 `json:"rxBytes"`
	RxErrors  uint64 `json:"rxErrors"`
	RxDropped uint64 `json:"rxDropped"`
	TxPackets uint64 `json:"txPackets"`
	TxBytes   uint64 `json:"txBytes"`
	TxErrors  uint64 `json:"txErrors"`
	TxDropped uint64 `json:"txDropped"`
}

// The flag and the bits of net_device.state that tell whether an interface is up (enum netdev_state_t).
const (
	maxNetns      = 1 << 16
	maxInterfaces = 1 << 16
	maxAddresses  = 1 << 14

	linkStateStart     = 0
	linkStateNoCarrier = 2
)

// operStates are IF_OPER_… of include/uapi/linux/if.h, in the words of net/core/net-sysfs.c.
var operStates = [...]string{"unknown", "notpresent", "down", "lowerlayerdown", "testing", "dormant", "up"}

// eachNetns calls f for each network namespace, which net is the struct of.
func (v *View) eachNetns(f func(net VirtAddr, inum uint64, init bool) error) error {
	r := resolver{img: v.img}
	s := r.shape("net", "list[]", "ns.inum")
	head, init := r.symbol("net_namespace_list"), r.symbol("init_net")
	if r.err != nil {
		return r.err
	}
	return v.list("net", head, s.offset("list"), maxNetns, func(at VirtAddr) error {
		t, err := v.thing(s, at)
		if err != nil {
			return err
		}
		return f(at, t.num("ns.inum"), at == init)
	})
}

type netdevWalk struct {
	v                              *View
	dev, in, ifa, in6, ifa6        *shape
	parent, driver, ops, dropped   *shape
	lstats, tstats, dstats         *shape
	devices                        uint64 // in net
	lstatsType, tstatsType, dsType int64  // NETDEV_PCPU_STAT_…
}

// Interfaces lists the network interfaces of all network namespaces.
func (v *View) Interfaces() iter.Seq2[Interface, error] {
	return settled(v, "walk network interfaces", func() ([]Interface, error) {
		w := netdevWalk{v: v}
		if err := w.resolve(); err != nil {
			return nil, err
		}
		var all []Interface
		err := v.eachNetns(func(net VirtAddr, inum uint64, init bool) error {
			return v.list("net_device", net+VirtAddr(w.devices), w.dev.offset("dev_list"), maxInterfaces, func(at VirtAddr) error {
				i, err := w.read(at)
				if err != nil {
					return err
				}
				i.Netns, i.Init = inum, init
				all = append(all, i)
				return nil
			})
		})
		return all, err
	})
}

func (w *netdevWalk) resolve() error {
	r := resolver{img: w.v.img}
	w.devices = r.field("net", 16, "dev_base_head")
	w.dev = r.shape("net_device", "dev_list[]", "name[]", "ifindex", "type", "mtu", "flags", "state", "operstate", "dev_addr", "addr_len",
		"perm_addr[]?", "dev.parent?", "ip_ptr?", "ip6_ptr?", "netdev_ops", "lstats?", "pcpu_stat_type?", "core_stats?",
		"stats.rx_packets", "stats.rx_bytes", "stats.rx_errors", "stats.rx_dropped",
		"stats.tx_packets", "stats.tx_bytes", "stats.tx_errors", "stats.tx_dropped")
	w.ops = r.shape("net_device_ops", "ndo_get_stats64", "ndo_get_stats")
	w.in = r.shape("in_device", "ifa_list")
	w.ifa = r.shape("in_ifaddr", "ifa_next", "ifa_local", "ifa_prefixlen")
	if r.err != nil {
		return r.err
	}
	// A kernel without these has no such addresses, counters or devices.
	optional := func(typ string, paths ...string) *shape {
		try := resolver{img: w.v.img}
		s := try.shape(typ, paths...)
		if try.err != nil {
			return nil
		}
		return s
	}
	w.in6 = optional("inet6_dev", "addr_list[]")
	w.ifa6 = optional("inet6_ifaddr", "if_list[]", "addr[]", "prefix_len")
	w.parent = optional("device", "kobj.name", "driver")
	w.driver = optional("device_driver", "name")
	w.dropped = optional("net_device_core_stats", "rx_dropped", "tx_dropped")
	w.lstats = optional("pcpu_lstats", "packets", "bytes")
	w.tstats = optional("pcpu_sw_netstats", "rx_packets", "rx_bytes", "tx_packets", "tx_bytes")
	w.dstats = optional("pcpu_dstats", "rx_packets", "rx_bytes", "rx_drops", "tx_packets", "tx_bytes", "tx_drops")
	for name, to := range map[string]*int64{"NETDEV_PCPU_STAT_LSTATS": &w.lstatsType, "NETDEV_PCPU_STAT_TSTATS": &w.tstatsType, "NETDEV_PCPU_STAT_DSTATS": &w.dsType} {
		n, err := w.v.img.types.enum("netdev_stat_type", name)
		if err != nil {
			n = -1
		}
		*to = n
	}
	return nil
}

func (w *netdevWalk) read(at VirtAddr) (Interface, error) {
	t, err := w.v.thing(w.dev, at)
	if err != nil {
		return Interface{}, err
	}
	i := Interface{
		Addr: at, Name: t.text("name"), Index: t.int("ifindex"), Type: int(t.num("type")), MTU: t.int("mtu"), Flags: t.num("flags") & 0xffffffff,
		Carrier: t.num("state")>>linkStateNoCarrier&1 == 0,
	}
	oper := t.num("operstate")
	if t.num("state")>>linkStateStart&1 == 0 {
		oper, i.Carrier = 2, false
	}
	if i.Name == "" || i.Index <= 0 || oper >= uint64(len(operStates)) {
		return i, t.corrupt("%q of index %d in state %d", i.Name, i.Index, oper)
	}
	i.State = operStates[oper]
	if n := t.num("addr_len"); n == 6 {
		mac := make([]byte, n)
		if err := w.v.img.space.object(w.v, "dev_addr", t.ptr("dev_addr"), mac); err != nil {
			return i, err
		}
		i.MAC = net.HardwareAddr(mac).String()
		if perm := t.bytes("perm_addr"); len(perm) >= 6 && string(perm[:6]) != "\x00\x00\x00\x00\x00\x00" {
			i.PermanentMAC = net.HardwareAddr(perm[:6]).String()
		}
	}
	if p := t.ptr("dev.parent"); p != 0 && w.parent != nil && w.driver != nil {
		if err := w.device(&i, p); err != nil {
			return i, err
		}
	}
	if p := t.ptr("ip_ptr"); p != 0 {
		if err := w.ipv4(&i, p); err != nil {
			return i, err
		}
	}
	if p := t.ptr("ip6_ptr"); p != 0 && w.in6 != nil && w.ifa6 != nil {
		if err := w.ipv6(&i, p); err != nil {
			return i, err
		}
	}
	i.Counters, err = w.counters(&t)
	return i, err
}

func (w *netdevWalk) device(i *Interface, at VirtAddr) error {
	d, err := w.v.thing(w.parent, at)
	if err != nil {
		return err
	}
	if p := d.ptr("kobj.name"); p != 0 {
		if i.Device, err = w.v.cstring("device name", p, 256); err != nil {
			return err
		}
	}
	p := d.ptr("driver")
	if p == 0 {
		return nil
	}
	driver, err := w.v.thing(w.driver, p)
	if err != nil {
		return err
	}
	i.Driver, err = w.v.cstring("driver name", driver.ptr("name"), 256)
	return err
}

func (w *netdevWalk) ipv4(i *Interface, at VirtAddr) error {
	in, err := w.v.thing(w.in, at)
	if err != nil {
		return err
	}
	for p := in.ptr("ifa_list"); p != 0; {
		if len(i.Addresses) == maxAddresses {
			return in.corrupt("list of addresses does not end")
		}
		a, err := w.v.thing(w.ifa, p)
		if err != nil {
			return err
		}
		bits := int(a.num("ifa_prefixlen"))
		if bits > 32 {
			return a.corrupt("prefix of %d bits", bits)
		}
		i.Addresses = append(i.Addresses, netip.PrefixFrom(a.ipv4("ifa_local"), bits))
		p = a.ptr("ifa_next")
	}
	return nil
}

func (w *netdevWalk) ipv6(i *Interface, at VirtAddr) error {
	in, err := w.v.thing(w.in6, at)
	if err != nil {
		return err
	}
	return w.v.list("inet6_ifaddr", in.at("addr_list"), w.ifa6.offset("if_list"), maxAddresses, func(at VirtAddr) error {
		a, err := w.v.thing(w.ifa6, at)
		if err != nil {
			return err
		}
		bits := int(a.num("prefix_len"))
		if b := a.bytes("addr"); bits > 128 || len(b) != 16 {
			return a.corrupt("prefix of %d bits of %d bytes", bits, len(b))
		}
		i.Addresses = append(i.Addresses, netip.PrefixFrom(netip.AddrFrom16([16]byte(a.bytes("addr"))), bits))
		return nil
	})
}

// counters are where dev_get_stats of net/core/dev.c finds them. A driver with a function of its own for them has them in
// structures that only it knows.
func (w *netdevWalk) counters(t *thing) (*InterfaceCounters, error) {
	img := w.v.img
	ops, err := w.v.thing(w.ops, t.ptr("netdev_ops"))
	if err != nil {
		return nil, err
	}
	var c InterfaceCounters
	kind := int64(t.num("pcpu_stat_type"))
	get := ops.ptr("ndo_get_stats64")
	var function string
	if get != 0 {
		if function, _, err = img.SymbolAt(get); err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	var each func(cpu *thing)
	var of *shape
	lo := func(s *thing) {
		c.RxPackets += s.num("packets")
		c.RxBytes += s.num("bytes")
		c.TxPackets, c.TxBytes = c.RxPackets, c.RxBytes
	}
	both := func(s *thing) {
		c.RxPackets += s.num("rx_packets")
		c.RxBytes += s.num("rx_bytes")
		c.RxDropped += s.num("rx_drops")
		c.TxPackets += s.num("tx_packets")
		c.TxBytes += s.num("tx_bytes")
		c.TxDropped += s.num("tx_drops")
	}
	switch {
	case function == "loopback_get_stats64":
		of, each = w.lstats, lo
	case function == "dev_get_tstats64", kind != 0 && kind == w.tstatsType && get == 0:
		of, each = w.tstats, both
	case kind != 0 && kind == w.dsType && get == 0:
		of, each = w.dstats, both
	case kind != 0 && kind == w.lstatsType && get == 0:
		// What is sent alone is counted so: dev_fetch_lstats has no receiving side.
		of, each = w.lstats, func(s *thing) { c.TxPackets += s.num("packets"); c.TxBytes += s.num("bytes") }
	case get != 0 || ops.ptr("ndo_get_stats") != 0 || kind != 0:
		return nil, nil
	}
	if of != nil {
		p := t.ptr("lstats")
		if p == 0 {
			return nil, nil
		}
		if err := w.perCPU(of, p, each); err != nil {
			return nil, err
		}
	} else if each != nil {
		return nil, nil
	} else {
		for name, to := range map[string]*uint64{"rx_packets": &c.RxPackets, "rx_bytes": &c.RxBytes, "rx_errors": &c.RxErrors, "rx_dropped": &c.RxDropped,
			"tx_packets": &c.TxPackets, "tx_bytes": &c.TxBytes, "tx_errors": &c.TxErrors, "tx_dropped": &c.TxDropped} {
			*to = t.num("stats." + name)
		}
	}
	if p := t.ptr("core_stats"); p != 0 && w.dropped != nil {
		err := w.perCPU(w.dropped, p, func(s *thing) {
			c.RxDropped += s.num("rx_dropped")
			c.TxDropped += s.num("tx_dropped")
		})
		if err != nil {
			return nil, err
		}
	}
	return &c, nil
}

// perCPU calls f for each CPU's instance of a per-CPU object.
func (w *netdevWalk) perCPU(s *shape, at VirtAddr, f func(*thing)) error {
	for cpu, offset := range w.v.img.perCPU {
		if offset == 0 {
			continue
		}
		t, err := w.v.thing(s, at+offset)
		if err != nil {
			return fmt.Errorf("CPU %d: %w", cpu, err)
		}
		f(&t)
	}
	return nil
}
