package boot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/u-root/u-root/pkg/dhclient"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// DHCP timing: the patience with one request and with the link, the pause after a failure, and the bounds of a renewal's (RFC 2131, 4.4.5: T1 is
// half the lease).
const (
	dhcpTimeout = 3 * time.Second
	linkTimeout = 15 * time.Second
	dhcpPause   = 2 * time.Second
	renewMin    = time.Minute
	renewMax    = 12 * time.Hour
)

// A wiring is the network while it is set up.
type wiring struct {
	absent bool
	did    []string
	errs   []error
	dhcp   []ifPlan
	dns    *resolver
}

// wire sets up what is static of the interfaces; what DHCP is to say of others remains to be asked for.
func (m *Machine) wire(cfg Config) (w wiring) {
	if lo, err := netlink.LinkByName("lo"); err == nil {
		if err := netlink.LinkSetUp(lo); err != nil {
			m.log.Warn("bring loopback up", "err", err)
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		w.errs = []error{fmt.Errorf("list network interfaces: %w", err)}
		return w
	}
	links = slices.DeleteFunc(links, func(l netlink.Link) bool {
		return l.Type() != "device" || l.Attrs().Flags&net.FlagLoopback != 0 || len(l.Attrs().HardwareAddr) != 6
	})
	plans, errs := planNetwork(cfg.Interfaces, links)
	if len(plans) == 0 && errs == nil {
		w.absent = true
		return w
	}
	w.errs = errs
	w.dns = &resolver{file: dhclient.ResolvConfPath, static: cfg.NameServers}
	if err := w.dns.write(nil); err != nil {
		w.errs = append(w.errs, err)
	}
	for _, p := range plans {
		name := p.link.Attrs().Name
		if err := setStatic(p); err != nil {
			w.errs = append(w.errs, fmt.Errorf("interface %s: %w", name, err))
			continue
		}
		for _, a := range p.cfg.Addresses {
			w.did = append(w.did, name+" "+a.String())
		}
		if p.cfg.DHCP {
			w.dhcp = append(w.dhcp, p)
		}
	}
	return w
}

// network ends what wire has begun: of the interfaces with DHCP it waits for the first to have an address, or for all to have
// failed once, but not longer than wait. The rest goes on in the background.
func (m *Machine) network(ctx context.Context, w wiring, wait time.Duration) (Outcome, string, error) {
	if w.absent {
		return Absent, "the machine has no network interface", nil
	}
	leases := make(chan leased, len(w.dhcp))
	for _, p := range w.dhcp {
		m.background(ctx, func(ctx context.Context) { m.keepLease(ctx, p.link, w.dns, leases) })
	}
	did, errs := w.did, w.errs
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	for waiting := len(w.dhcp); waiting > 0; {
		select {
		case l := <-leases:
			waiting--
			if l.err != nil {
				errs = append(errs, fmt.Errorf("interface %s: %w", l.name, l.err))
				continue
			}
			did, waiting = append(did, l.name+" "+l.addr+" by DHCP"), 0
		case <-deadline.C:
			errs, waiting = append(errs, fmt.Errorf("no DHCP server answered within %s; still asking", wait)), 0
		case <-ctx.Done():
			return Unclear, strings.Join(did, ", "), ctx.Err()
		}
	}
	if len(did) == 0 || errs != nil {
		return Unclear, strings.Join(did, ", "), cmp.Or(errors.Join(errs...), errors.New("no interface has an address"))
	}
	return Done, strings.Join(did, ", "), nil
}

// An ifPlan is what is to be done with one interface.
type ifPlan struct {
	link netlink.Link
	cfg  Interface
}

// planNetwork pairs the configuration with the interfaces that are there. Without a configuration all get DHCP.
func planNetwork(cfgs []Interface, links []netlink.Link) (plans []ifPlan, errs []error) {
	if len(cfgs) == 0 {
		for _, l := range links {
			plans = append(plans, ifPlan{l, Interface{Match: l.Attrs().Name, DHCP: true}})
		}
		return plans, nil
	}
	for _, c := range cfgs {
		i := slices.IndexFunc(links, func(l netlink.Link) bool {
			return l.Attrs().Name == c.Match || strings.EqualFold(l.Attrs().HardwareAddr.String(), c.Match)
		})
		if i < 0 {
			errs = append(errs, fmt.Errorf("there is no interface %s", c.Match))
			continue
		}
		plans = append(plans, ifPlan{links[i], c})
	}
	return plans, errs
}

func setStatic(p ifPlan) error {
	if p.cfg.MTU != 0 {
		if err := netlink.LinkSetMTU(p.link, p.cfg.MTU); err != nil {
			return fmt.Errorf("set MTU %d: %w", p.cfg.MTU, err)
		}
	}
	if err := netlink.LinkSetUp(p.link); err != nil {
		return fmt.Errorf("bring up: %w", err)
	}
	for _, a := range p.cfg.Addresses {
		ip := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
		if err := netlink.AddrReplace(p.link, &netlink.Addr{IPNet: ip}); err != nil {
			return fmt.Errorf("set address %s: %w", a, err)
		}
	}
	if gw := p.cfg.Gateway; gw.IsValid() {
		r := &netlink.Route{LinkIndex: p.link.Attrs().Index, Gw: gw.AsSlice()}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("set gateway %s: %w", gw, err)
		}
	}
	return nil
}

// Reconfigure makes an interface of that name what now says, after it was what old says; a change of DHCP waits for the next start of
// the machine, and so does an MTU that is not given any more.
func Reconfigure(name string, old, now Interface) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if err := setStatic(ifPlan{link, now}); err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	var errs []error
	for _, a := range old.Addresses {
		if slices.Contains(now.Addresses, a) {
			continue
		}
		ip := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
		if err := netlink.AddrDel(link, &netlink.Addr{IPNet: ip}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("interface %s: remove address %s: %w", name, a, err))
		}
	}
	if gw := old.Gateway; gw.IsValid() && !now.Gateway.IsValid() {
		if err := netlink.RouteDel(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gw.AsSlice()}); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("interface %s: remove gateway %s: %w", name, gw, err))
		}
	}
	return errors.Join(errs...)
}

// NameServers writes the machine's resolver configuration, in which those of a DHCP lease come back when it is renewed.
func NameServers(servers []netip.Addr) error {
	return (&resolver{file: dhclient.ResolvConfPath, static: servers}).write(nil)
}

// leased is the outcome of an interface's first DHCP exchange.
type leased struct {
	name, addr string
	err        error
}

// keepLease asks for an address until there is one, and then again at half the lease's time. The first outcome goes to
// first.
func (m *Machine) keepLease(ctx context.Context, link netlink.Link, dns *resolver, first chan<- leased) {
	name := link.Attrs().Name
	report := func(l leased) {
		if first != nil {
			first <- l
			first = nil
		}
	}
	failures := 0
	for ctx.Err() == nil {
		addr, again, err := lease(ctx, link, dns)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			if failures++; failures == 1 || failures%100 == 0 {
				m.log.Warn("no DHCP lease", "interface", name, "err", err, "failures", failures)
			}
			report(leased{name: name, err: err})
			again = dhcpPause
		} else {
			failures = 0
			m.log.Debug("DHCP lease", "interface", name, "address", addr, "renew_in", again)
			report(leased{name: name, addr: addr})
		}
		select {
		case <-ctx.Done():
		case <-time.After(again):
		}
	}
}

// lease makes one DHCPv4 exchange and configures the interface with its outcome.
func lease(ctx context.Context, link netlink.Link, dns *resolver) (addr string, again time.Duration, err error) {
	c := dhclient.Config{Timeout: dhcpTimeout, Retries: 3}
	err = errors.New("the interface does not come up")
	for r := range dhclient.SendRequests(ctx, []netlink.Link{link}, true, false, c, linkTimeout) {
		if err = r.Err; err != nil {
			continue
		}
		if err = r.Lease.Configure(); err != nil {
			continue
		}
		p, _ := r.Lease.Message()
		var servers []netip.Addr
		for _, ip := range p.DNS() {
			if a, ok := netip.AddrFromSlice(ip); ok {
				servers = append(servers, a.Unmap())
			}
		}
		if err = dns.write(servers); err != nil {
			continue
		}
		addr = p.YourIPAddr.String()
		again = min(max(p.IPAddressLeaseTime(renewMax)/2, renewMin), renewMax)
	}
	return addr, again, err
}

// A resolver writes the resolver configuration: the configured servers first, then those of the latest lease.
type resolver struct {
	file   string
	static []netip.Addr

	mu sync.Mutex
}

func (r *resolver) write(leased []netip.Addr) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, a := range slices.Concat(r.static, leased) {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	if err := os.WriteFile(r.file, []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", r.file, err)
	}
	return nil
}
