package rxe

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/vishvananda/netlink"

	"github.com/backdoor-rhs/backdoor/tests/netns"
)

// Network is a virtual switch in a network namespace, with this process at one port and guests at others.
type Network struct {
	*netns.Namespace
	bridge netlink.Link
	taps   atomic.Int32
}

// NewNetwork makes a network in which this process has the given addresses. It needs root.
func NewNetwork(addrs ...netip.Prefix) (_ *Network, err error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	n := &Network{Namespace: ns}
	err = n.Do(func() error {
		a := netlink.NewLinkAttrs()
		a.Name, a.MTU = "br0", MTU
		n.bridge = &netlink.Bridge{LinkAttrs: a}
		lo, err := netlink.LinkByName("lo")
		if err = errors.Join(err, netlink.LinkAdd(n.bridge)); err != nil {
			return err
		}
		for _, p := range addrs {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
			err = errors.Join(err, netlink.AddrAdd(n.bridge, addr))
		}
		return errors.Join(err, netlink.LinkSetUp(lo), netlink.LinkSetUp(n.bridge))
	})
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("make network: %w", err)
	}
	return n, nil
}

// port adds a port for a guest and returns QEMU's -netdev for it.
func (n *Network) port() (string, error) {
	name := fmt.Sprintf("tap%d", n.taps.Add(1))
	err := n.Do(func() error {
		a := netlink.NewLinkAttrs()
		a.Name = name
		tap := &netlink.Tuntap{LinkAttrs: a, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_DEFAULTS | netlink.TUNTAP_VNET_HDR}
		if err := netlink.LinkAdd(tap); err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetMTU(tap, MTU), netlink.LinkSetMaster(tap, n.bridge), netlink.LinkSetUp(tap))
	})
	if err != nil {
		return "", fmt.Errorf("make %s: %w", name, err)
	}
	return "tap,ifname=" + name + ",script=no,downscript=no", nil
}
