// Package wireguard sets up encrypted tunnels: interfaces of the kernel's WireGuard, configured over netlink, without the
// wg program.
//
// A tunnel is how services that have no encryption of their own, RDMA above all, are reached over a path that is not
// trusted: who listens at the tunnel's address hears only peers that have proven their key, each from the addresses that are
// allowed to it.
//
// Source: include/uapi/linux/wireguard.h of Linux 6.1 for the netlink interface.
package wireguard

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/u-root/u-root/pkg/kmodule"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Config is one tunnel.
type Config struct {
	Name string `json:"name"` // of the interface, such as wg0
	// PrivateKeyFile holds our private key in base64, as wg(8) has it. It is made, with a new key, if it does not exist.
	PrivateKeyFile string         `json:"privateKeyFile"`
	ListenPort     uint16         `json:"listenPort,omitempty"` // UDP; 0: any, which suits who calls others only
	Addresses      []netip.Prefix `json:"addresses"`            // ours inside the tunnel
	MTU            int            `json:"mtu,omitempty"`        // bytes; default 1420, which fits into 1500 on IPv4 and IPv6
	Peers          []Peer         `json:"peers"`
}

// Peer is who may use a tunnel.
type Peer struct {
	PublicKey Key `json:"publicKey"`
	// Endpoint is where the peer is reached. Without one we wait until it calls.
	Endpoint netip.AddrPort `json:"endpoint,omitzero"`
	// AllowedIPs are the addresses that the peer may send from, and that packets are sent to it for.
	AllowedIPs []netip.Prefix `json:"allowedIPs"`
	// KeepaliveSeconds keeps a NAT between us open; 0 is off.
	KeepaliveSeconds uint16 `json:"keepaliveSeconds,omitempty"`
}

// Key is a Curve25519 key, written in base64.
type Key [32]byte

// UnmarshalText reads base64.
func (k *Key) UnmarshalText(b []byte) error {
	raw, err := base64.StdEncoding.DecodeString(string(b))
	if err != nil || len(raw) != len(k) {
		return errors.New("want a WireGuard key: 32 bytes in base64")
	}
	copy(k[:], raw)
	return nil
}

// MarshalText writes base64.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// String returns base64.
func (k Key) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// Public returns the public key that belongs to a private one.
func (k Key) Public() Key {
	p, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil {
		panic(err) // the length is right
	}
	return Key(p.PublicKey().Bytes())
}

// DefaultMTU is the MTU of a tunnel over paths of 1500 bytes.
const DefaultMTU = 1420

// Validate reports everything that is wrong with a tunnel, joined.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if c.Name == "" || len(c.Name) >= unix.IFNAMSIZ || filepath.Base(c.Name) != c.Name {
		bad("name %q is not that of an interface", c.Name)
	}
	if c.PrivateKeyFile == "" {
		bad("privateKeyFile is missing")
	}
	if c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535) {
		bad("mtu %d: want 576 to 65535", c.MTU)
	}
	if len(c.Addresses) == 0 {
		bad("addresses are missing")
	}
	for _, a := range c.Addresses {
		if !a.IsValid() {
			bad("an address is not valid")
		}
	}
	keys, nets := map[Key]bool{}, map[netip.Prefix]bool{}
	for i, p := range c.Peers {
		if p.PublicKey == (Key{}) || keys[p.PublicKey] {
			bad("peers[%d]: its publicKey is missing or another's", i)
		}
		keys[p.PublicKey] = true
		if len(p.AllowedIPs) == 0 {
			bad("peers[%d]: allowedIPs are missing: it could say nothing", i)
		}
		for _, a := range p.AllowedIPs {
			if !a.IsValid() || nets[a.Masked()] {
				bad("peers[%d]: %v in allowedIPs is not valid, or is another's", i, a)
			}
			nets[a.Masked()] = true
		}
	}
	return errors.Join(errs...)
}

// LoadKey returns the private key in a file, which it makes, with a new key, if there is none.
func LoadKey(path string) (Key, error) {
	var k Key
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		rand.Read(k[:]) // never fails
		// Clamped, as wg(8) writes keys (RFC 7748, section 5).
		k[0] &= 248
		k[31] = k[31]&127 | 64
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return k, fmt.Errorf("make private key: %w", err)
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err == nil {
			_, err = f.WriteString(k.String() + "\n")
			err = errors.Join(err, f.Sync(), f.Close())
		}
		if err != nil {
			return k, fmt.Errorf("make private key: %w", err)
		}
		return k, nil
	case err != nil:
		return k, fmt.Errorf("read private key: %w", err)
	case len(b) > 100:
		return k, fmt.Errorf("read private key: %s has %d bytes; want 32 bytes in base64", path, len(b))
	}
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == '\r') {
		b = b[:len(b)-1]
	}
	if err := k.UnmarshalText(b); err != nil {
		return k, fmt.Errorf("read private key: %s: %w", path, err)
	}
	return k, nil
}

// Up makes the tunnel, or brings one of that name to this configuration, and returns our public key, which peers need.
// It needs CAP_NET_ADMIN, and loads the kernel's module if it must.
func Up(c Config) (Key, error) {
	if err := c.Validate(); err != nil {
		return Key{}, fmt.Errorf("tunnel %s: %w", c.Name, err)
	}
	key, err := LoadKey(c.PrivateKeyFile)
	if err == nil {
		err = c.up(key)
	}
	if err != nil {
		return Key{}, fmt.Errorf("tunnel %s: %w", c.Name, err)
	}
	return key.Public(), nil
}

func (c Config) up(key Key) error {
	link, err := c.link()
	if err != nil {
		return err
	}
	if err := c.configure(link.Attrs().Index, key); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	for _, a := range c.Addresses {
		ip := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
		if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ip}); err != nil {
			return fmt.Errorf("set address %v: %w", a, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up: %w", err)
	}
	for _, p := range c.Peers {
		for _, a := range p.AllowedIPs {
			if c.onLink(a) {
				continue
			}
			dst := &net.IPNet{IP: a.Masked().Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
			if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}); err != nil {
				return fmt.Errorf("route %v: %w", a, err)
			}
		}
	}
	return nil
}

// onLink reports whether one of our addresses brings the route to a.
func (c Config) onLink(a netip.Prefix) bool {
	for _, own := range c.Addresses {
		if own.Overlaps(a) && own.Bits() <= a.Bits() {
			return true
		}
	}
	return false
}

// link returns the interface, made if need be.
func (c Config) link() (netlink.Link, error) {
	mtu := c.MTU
	if mtu == 0 {
		mtu = DefaultMTU
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = c.Name, mtu
	if l, err := netlink.LinkByName(c.Name); err == nil {
		if l.Type() != "wireguard" {
			return nil, fmt.Errorf("there is an interface of that name that is no tunnel but %s", l.Type())
		}
		return l, netlink.LinkSetMTU(l, mtu)
	}
	err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) { // without modprobe, the kernel does not find its module by itself
		if err := kmodule.Probe("wireguard", ""); err != nil {
			return nil, fmt.Errorf("load the kernel's WireGuard: %w", err)
		}
		err = netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	}
	if err != nil {
		return nil, fmt.Errorf("make interface: %w", err)
	}
	return netlink.LinkByName(c.Name)
}

// Commands and attributes of the generic netlink family "wireguard".
const (
	family        = "wireguard"
	familyVersion = 1
	cmdGetDevice  = 0
	cmdSetDevice  = 1

	deviceIfIndex      = 1
	devicePrivateKey   = 3
	deviceFlags        = 5
	deviceListenPort   = 6
	devicePeers        = 8
	deviceReplacePeers = 1 // a flag

	peerPublicKey         = 1
	peerFlags             = 3
	peerEndpoint          = 4
	peerKeepalive         = 5
	peerLastHandshake     = 6
	peerRxBytes           = 7
	peerTxBytes           = 8
	peerAllowedIPs        = 9
	peerReplaceAllowedIPs = 2 // a flag

	allowedFamily = 1
	allowedAddr   = 2
	allowedBits   = 3
)

// request starts a request about an interface.
func request(command uint8, flags int, ifindex int) (*nl.NetlinkRequest, error) {
	f, err := netlink.GenlFamilyGet(family)
	if err != nil {
		return nil, fmt.Errorf("find the kernel's WireGuard: %w", err)
	}
	r := nl.NewNetlinkRequest(int(f.ID), flags)
	r.AddData(&nl.Genlmsg{Command: command, Version: familyVersion})
	r.AddData(nl.NewRtAttr(deviceIfIndex, nl.Uint32Attr(uint32(ifindex))))
	return r, nil
}

// configure gives the interface its key, port and peers, and no others.
func (c Config) configure(ifindex int, key Key) error {
	r, err := request(cmdSetDevice, unix.NLM_F_ACK, ifindex)
	if err != nil {
		return err
	}
	r.AddData(nl.NewRtAttr(devicePrivateKey, key[:]))
	r.AddData(nl.NewRtAttr(deviceFlags, nl.Uint32Attr(deviceReplacePeers)))
	r.AddData(nl.NewRtAttr(deviceListenPort, nl.Uint16Attr(c.ListenPort)))
	peers := nl.NewRtAttr(devicePeers|unix.NLA_F_NESTED, nil)
	for i, p := range c.Peers {
		a := peers.AddRtAttr(i|unix.NLA_F_NESTED, nil)
		a.AddRtAttr(peerPublicKey, p.PublicKey[:])
		a.AddRtAttr(peerFlags, nl.Uint32Attr(peerReplaceAllowedIPs))
		if p.Endpoint.IsValid() {
			a.AddRtAttr(peerEndpoint, sockaddr(p.Endpoint))
		}
		a.AddRtAttr(peerKeepalive, nl.Uint16Attr(p.KeepaliveSeconds))
		allowed := a.AddRtAttr(peerAllowedIPs|unix.NLA_F_NESTED, nil)
		for j, ip := range p.AllowedIPs {
			family := uint16(unix.AF_INET)
			if ip.Addr().Is6() {
				family = unix.AF_INET6
			}
			n := allowed.AddRtAttr(j|unix.NLA_F_NESTED, nil)
			n.AddRtAttr(allowedFamily, nl.Uint16Attr(family))
			n.AddRtAttr(allowedAddr, ip.Masked().Addr().AsSlice())
			n.AddRtAttr(allowedBits, []byte{uint8(ip.Bits())})
		}
	}
	r.AddData(peers)
	_, err = r.Execute(unix.NETLINK_GENERIC, 0)
	return err
}

// sockaddr returns an address as struct sockaddr_in or sockaddr_in6 has it.
func sockaddr(a netip.AddrPort) []byte {
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
	if a.Addr().Is6() && !a.Addr().Is4In6() {
		b = binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
		b = binary.BigEndian.AppendUint16(b, a.Port())
		b = append(append(b, 0, 0, 0, 0), a.Addr().AsSlice()...) // flow information
		return append(b, 0, 0, 0, 0)                             // scope
	}
	b = binary.BigEndian.AppendUint16(b, a.Port())
	return append(append(b, a.Addr().Unmap().AsSlice()...), make([]byte, 8)...)
}

// PeerState is what the kernel knows of a peer.
type PeerState struct {
	PublicKey     Key
	LastHandshake time.Time // zero: none yet
	Received      uint64    // bytes
	Sent          uint64
}

// State returns the peers of a tunnel.
func State(name string) ([]PeerState, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("tunnel %s: %w", name, err)
	}
	r, err := request(cmdGetDevice, unix.NLM_F_DUMP, link.Attrs().Index)
	if err != nil {
		return nil, fmt.Errorf("tunnel %s: %w", name, err)
	}
	messages, err := r.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return nil, fmt.Errorf("tunnel %s: ask for its state: %w", name, err)
	}
	var out []PeerState
	for _, m := range messages {
		if len(m) < nl.SizeofGenlmsg {
			continue
		}
		peers, err := parsePeers(m[nl.SizeofGenlmsg:])
		if err != nil {
			return nil, fmt.Errorf("tunnel %s: %w", name, err)
		}
		out = append(out, peers...)
	}
	return out, nil
}

// parsePeers reads the peers in one message about a device.
func parsePeers(b []byte) (out []PeerState, err error) {
	err = attributes(b, func(kind uint16, b []byte) error {
		if kind != devicePeers {
			return nil
		}
		return attributes(b, func(_ uint16, b []byte) error {
			var p PeerState
			err := attributes(b, func(kind uint16, b []byte) error {
				switch {
				case kind == peerPublicKey && len(b) == len(p.PublicKey):
					p.PublicKey = Key(b)
				case kind == peerLastHandshake && len(b) == 16: // struct __kernel_timespec
					if s, ns := binary.NativeEndian.Uint64(b), binary.NativeEndian.Uint64(b[8:]); s != 0 || ns != 0 {
						p.LastHandshake = time.Unix(int64(s), int64(ns))
					}
				case kind == peerRxBytes && len(b) == 8:
					p.Received = binary.NativeEndian.Uint64(b)
				case kind == peerTxBytes && len(b) == 8:
					p.Sent = binary.NativeEndian.Uint64(b)
				}
				return nil
			})
			out = append(out, p)
			return err
		})
	})
	return out, err
}

// attributes calls f for each netlink attribute in b.
func attributes(b []byte, f func(kind uint16, value []byte) error) error {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return fmt.Errorf("netlink attribute of %d bytes in %d", n, len(b))
		}
		if err := f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:n]); err != nil {
			return err
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

// Covers reports whether an address of this machine is that of a tunnel, so that what is sent from there is encrypted.
func Covers(addr netip.Addr) (bool, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return false, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if l.Type() != "wireguard" {
			continue
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return false, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == addr.Unmap().WithZone("") {
				return true, nil
			}
		}
	}
	return false, nil
}
