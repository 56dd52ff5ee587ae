package afxdp

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// neighbors knows the link addresses that packets to peers are sent to. It asks the system, which resolves them; while the
// system does not know one, answers go to where the peer's last packet came from.
type neighbors struct {
	h       *netlink.Handle
	ifindex int
	family  int
	sock    int // sends a datagram to whom the system shall look for

	mu    sync.Mutex
	known map[netip.Addr]neighbor // guarded by mu
}

type neighbor struct {
	mac     [6]byte
	valid   bool // mac is one
	system  bool // it is the system's word
	checked time.Time
}

const (
	neighborTTL   = 5 * time.Second        // before the system is asked again
	neighborRetry = 100 * time.Millisecond // likewise while it does not know
	maxNeighbors  = 4096
)

func newNeighbors(local netip.Addr, ifindex int) (_ *neighbors, err error) {
	n := &neighbors{ifindex: ifindex, family: unix.AF_INET, known: map[netip.Addr]neighbor{}, sock: -1}
	if local.Is6() {
		n.family = unix.AF_INET6
	}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if n.h, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if n.sock, err = unix.Socket(n.family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return nil, err
	}
	return n, nil
}

func (n *neighbors) close() {
	if n.h != nil {
		n.h.Close()
	}
	if n.sock >= 0 {
		unix.Close(n.sock)
	}
}

// learn notes where a packet with a right ICRC came from. It never overrules the system.
func (n *neighbors) learn(peer netip.Addr, mac [6]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	k, known := n.known[peer]
	if k.valid && (k.system || k.mac == mac) || !known && len(n.known) >= maxNeighbors {
		return
	}
	k.mac, k.valid = mac, true
	n.known[peer] = k
}

// lookup returns the link address for packets to a peer.
func (n *neighbors) lookup(peer netip.Addr) (mac [6]byte, ok bool) {
	n.mu.Lock()
	k := n.known[peer]
	n.mu.Unlock()
	ttl := neighborTTL
	if !k.system {
		ttl = neighborRetry
	}
	if time.Since(k.checked) < ttl {
		return k.mac, k.valid
	}
	if mac, ok := n.ask(peer); ok {
		k.mac, k.valid, k.system = mac, true, true
	} else {
		k.system = false
	}
	k.checked = time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.known) >= maxNeighbors {
		clear(n.known)
	}
	n.known[peer] = k
	return k.mac, k.valid
}

// ask asks the system, and has it look for the neighbour if it does not know it.
func (n *neighbors) ask(peer netip.Addr) (mac [6]byte, ok bool) {
	hop := net.IP(peer.AsSlice())
	if routes, err := n.h.RouteGet(hop); err == nil && len(routes) > 0 && routes[0].Gw != nil {
		hop = routes[0].Gw
	}
	list, err := n.h.NeighList(n.ifindex, n.family)
	if err == nil {
		for _, e := range list {
			if e.IP.Equal(hop) && len(e.HardwareAddr) == 6 && e.State&(unix.NUD_FAILED|unix.NUD_INCOMPLETE) == 0 {
				if e.State&unix.NUD_STALE != 0 {
					n.prod(peer) // has the system find out whether it is still there
				}
				return [6]byte(e.HardwareAddr), true
			}
		}
	}
	n.prod(peer)
	return mac, false
}

// prod sends a datagram to the discard port, so that the system resolves the way there.
func (n *neighbors) prod(peer netip.Addr) {
	const discard = 9
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: discard}
	if peer.Is4() {
		to.(*unix.SockaddrInet4).Addr = peer.As4()
	} else {
		to = &unix.SockaddrInet6{Port: discard, Addr: peer.As16(), ZoneId: uint32(n.ifindex)}
	}
	unix.Sendto(n.sock, nil, unix.MSG_DONTWAIT, to)
}
