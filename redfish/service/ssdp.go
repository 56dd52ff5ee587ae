package service

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// discovery lets clients on the same links find the service by SSDP (DSP0266, section "Discovery"; UPnP Device Architecture 1.1, section 1),
// if that was switched on. It answers searches and tells of itself now and then.
//
// Searches come over UDP with sources that anybody can forge, so an answer goes only to an address on one of our own links, a few a
// second, and is no longer than a few hundred bytes.
type discovery struct {
	svc  *Service
	path string // "" keeps the settings in memory

	mu      sync.Mutex // guards what follows
	file    discoveryFile
	changed chan struct{} // closed, and made anew, at each change of file
}

// discoveryFile is ssdp.json in the state directory.
type discoveryFile struct {
	Version  int  `json:"version"` // 1
	Enabled  bool `json:"enabled"`
	Interval int  `json:"notifySeconds"` // zero is never
	TTL      int  `json:"notifyTTL"`
}

const (
	ssdpPort      = 1900
	ssdpMaxAge    = 1800 // seconds; the least that the specification permits
	ssdpRate      = 20   // answers in a second
	ssdpJoinEvery = time.Minute
	searchTarget  = "urn:dmtf-org:service:redfish-rest:1" // with the major version of the specification
)

var (
	ssdpIPv4 = netip.MustParseAddr("239.255.255.250")
	ssdpIPv6 = netip.MustParseAddr("ff02::c")
)

func openDiscovery(s *Service) (*discovery, error) {
	d := &discovery{svc: s, file: discoveryFile{Version: 1, Interval: 600, TTL: 2}, changed: make(chan struct{})}
	if s.o.StateDir == "" {
		return d, nil
	}
	d.path = s.path("ssdp.json")
	b, err := os.ReadFile(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read settings of SSDP: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d.file); err != nil {
		return nil, fmt.Errorf("read settings of SSDP in %s: %w", d.path, err)
	}
	if f := d.file; f.Version != 1 || f.Interval < 0 || f.Interval > maxNotify || f.TTL < 1 || f.TTL > 255 {
		return nil, fmt.Errorf("read settings of SSDP in %s: %+v is not valid", d.path, f)
	}
	return d, nil
}

const maxNotify = 86400 // seconds

// properties are what a client can change, in ManagerNetworkProtocol.
func (*discovery) properties() []Property {
	return []Property{
		{Name: "SSDP/ProtocolEnabled", Kind: Boolean},
		{Name: "SSDP/NotifyMulticastIntervalSeconds", Kind: Number, Min: 0, Max: maxNotify},
		{Name: "SSDP/NotifyTTL", Kind: Number, Min: 1, Max: 255},
	}
}

func (d *discovery) set(_ *Request, v Values) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	next := d.file
	if v.Has("SSDP/ProtocolEnabled") {
		next.Enabled = v.Bool("SSDP/ProtocolEnabled")
	}
	if v.Has("SSDP/NotifyMulticastIntervalSeconds") {
		next.Interval = int(v.Int("SSDP/NotifyMulticastIntervalSeconds"))
	}
	if v.Has("SSDP/NotifyTTL") {
		next.TTL = int(v.Int("SSDP/NotifyTTL"))
	}
	if next == d.file {
		return nil
	}
	if d.path != "" {
		b, err := json.MarshalIndent(next, "", "\t")
		if err == nil {
			err = durable.WriteFile(d.path, b, 0o600)
		}
		if err != nil {
			return fmt.Errorf("store settings of SSDP: %w", err)
		}
	}
	d.file = next
	close(d.changed)
	d.changed = make(chan struct{})
	return nil
}

// settings returns what is set, and what is closed when that is so no longer.
func (d *discovery) settings() (discoveryFile, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.file, d.changed
}

func (d *discovery) view() *schema.SSDProtocol {
	f, _ := d.settings()
	return &schema.SSDProtocol{
		WriteableProperties: []string{"ProtocolEnabled", "NotifyMulticastIntervalSeconds", "NotifyTTL"},
		ProtocolEnabled:     f.Enabled, Port: ssdpPort, NotifySeconds: f.Interval, NotifyTTL: f.TTL, NotifyIPv6Scope: "Link",
	}
}

// run serves while it is switched on, until ctx ends.
func (d *discovery) run(ctx context.Context) {
	for ctx.Err() == nil {
		set, changed := d.settings()
		sub, cancel := context.WithCancel(ctx)
		go func() {
			defer cancel()
			select {
			case <-changed:
			case <-sub.Done():
			}
		}()
		if set.Enabled {
			d.serve(sub, set)
		}
		<-sub.Done()
	}
}

// serve answers searches on all links and tells of the service, until ctx ends.
func (d *discovery) serve(ctx context.Context, set discoveryFile) {
	var links []*ssdpLink
	for _, group := range []netip.Addr{ssdpIPv4, ssdpIPv6} {
		l, err := openSSDP(ctx, group, set.TTL)
		if err != nil {
			d.svc.log.Warn("SSDP is not available", "group", group, "err", err)
			continue
		}
		links = append(links, l)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, l := range links {
		defer l.conn.Close()
		wg.Go(func() { d.answer(ctx, l) })
	}
	tell := func(what string) {
		for _, l := range links {
			l.tell(func(from netip.Addr) []byte { return d.notice(l.group, what, from) })
		}
	}
	join := time.NewTicker(ssdpJoinEvery)
	defer join.Stop()
	var notify <-chan time.Time
	if set.Interval > 0 {
		t := time.NewTicker(time.Duration(set.Interval) * time.Second)
		defer t.Stop()
		notify = t.C
		tell("ssdp:alive")
		defer tell("ssdp:byebye")
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-join.C: // links may have come
			for _, l := range links {
				l.join()
			}
		case <-notify:
			tell("ssdp:alive")
		}
	}
}

// answer answers the searches on a socket until that is closed; none once ctx has ended, for then the service takes its leave.
func (d *discovery) answer(ctx context.Context, l *ssdpLink) {
	buf := make([]byte, 2048)
	second, given := int64(0), 0
	for {
		n, src, err := l.conn.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(10 * time.Millisecond) // an error that stays must not take a CPU
			continue
		}
		from, ok := src.(*net.UDPAddr)
		if !ok {
			continue
		}
		delay, ok := parseSearch(buf[:n])
		if !ok || ctx.Err() != nil || !onLink(from.AddrPort().Addr()) {
			continue
		}
		if now := time.Now().Unix(); now != second {
			second, given = now, 0
		}
		if given++; given > ssdpRate {
			continue
		}
		reply := d.reply(from)
		if reply == nil {
			continue
		}
		// Many that answer at once would drown the one who asks.
		time.AfterFunc(rand.N(min(delay, time.Second)+1), func() {
			if ctx.Err() == nil {
				_, _ = l.conn.WriteTo(reply, src)
			}
		})
	}
}

// parseSearch reads a request that may be a search for us, and returns how long the answer may take.
func parseSearch(datagram []byte) (within time.Duration, ok bool) {
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(datagram)))
	if err != nil || r.Method != "M-SEARCH" || r.RequestURI != "*" || strings.Trim(r.Header.Get("Man"), `"`) != "ssdp:discover" {
		return 0, false
	}
	switch target := r.Header.Get("St"); {
	case target == "ssdp:all", target == searchTarget, target == fullTarget():
	default:
		return 0, false
	}
	seconds, err := strconv.Atoi(strings.TrimSpace(r.Header.Get("Mx"))) // absent in a search that is not multicast
	if err != nil || seconds < 0 {
		return 0, true
	}
	return time.Duration(min(seconds, 120)) * time.Second, true
}

// fullTarget is searchTarget with the minor version behind it.
func fullTarget() string {
	_, rest, _ := strings.Cut(redfishVersion, ".")
	minor, _, _ := strings.Cut(rest, ".")
	return searchTarget + ":" + minor
}

// reply is the answer to a search of one who would reach us at the address that leads to him.
func (d *discovery) reply(to *net.UDPAddr) []byte {
	c, err := net.DialUDP("udp", nil, to) // sends nothing
	if err != nil {
		return nil
	}
	defer c.Close()
	return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nCACHE-CONTROL:max-age=%d\r\nST:%s\r\nUSN:%s\r\nAL:%s\r\nEXT:\r\n\r\n",
		ssdpMaxAge, fullTarget(), d.name(), d.url(c.LocalAddr().(*net.UDPAddr).AddrPort().Addr()))
}

// notice tells that the service is there ("ssdp:alive"), at an address, or goes ("ssdp:byebye").
func (d *discovery) notice(group netip.Addr, what string, from netip.Addr) []byte {
	b := fmt.Appendf(nil, "NOTIFY * HTTP/1.1\r\nHOST:%s\r\nNT:%s\r\nNTS:%s\r\nUSN:%s\r\n", netip.AddrPortFrom(group, ssdpPort), fullTarget(), what, d.name())
	if what == "ssdp:alive" {
		b = fmt.Appendf(b, "CACHE-CONTROL:max-age=%d\r\nAL:%s\r\n", ssdpMaxAge, d.url(from))
	}
	return append(b, "\r\n"...)
}

func (d *discovery) name() string { return "uuid:" + d.svc.uuid + "::" + fullTarget() }

// url is the service root at an address of ours. A zone means nothing to others.
func (d *discovery) url(a netip.Addr) string {
	d.svc.certs.mu.Lock()
	port := d.svc.certs.port
	d.svc.certs.mu.Unlock()
	return "https://" + netip.AddrPortFrom(a.Unmap().WithZone(""), uint16(port)).String() + "/redfish/v1/"
}

// onLink reports whether an address is on one of our links.
func onLink(a netip.Addr) bool {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	a = a.Unmap().WithZone("")
	for _, own := range all {
		if p, err := netip.ParsePrefix(own.String()); err == nil && p.Contains(a) {
			return true
		}
	}
	return false
}

// ssdpLink is a socket that has joined a multicast group on all links.
type ssdpLink struct {
	group netip.Addr
	conn  net.PacketConn
	enter func(*net.Interface) error
	send  func([]byte, *net.Interface) error
}

// openSSDP opens the socket. Others on this machine may have the same port.
func openSSDP(ctx context.Context, group netip.Addr, hops int) (*ssdpLink, error) {
	network, address := "udp4", ":1900"
	if group.Is6() {
		network, address = "udp6", "[::]:1900"
	}
	listen := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var serr error
		err := raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(err, serr)
	}}
	conn, err := listen.ListenPacket(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l := &ssdpLink{group: group, conn: conn}
	to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(group, ssdpPort))
	if group.Is4() {
		p := ipv4.NewPacketConn(conn)
		err = p.SetMulticastTTL(hops)
		l.enter = func(i *net.Interface) error { return p.JoinGroup(i, to) }
		l.send = func(b []byte, i *net.Interface) error {
			_, err := p.WriteTo(b, &ipv4.ControlMessage{IfIndex: i.Index}, to)
			return err
		}
	} else {
		p := ipv6.NewPacketConn(conn)
		err = p.SetMulticastHopLimit(hops)
		l.enter = func(i *net.Interface) error { return p.JoinGroup(i, to) }
		l.send = func(b []byte, i *net.Interface) error {
			_, err := p.WriteTo(b, &ipv6.ControlMessage{IfIndex: i.Index}, to)
			return err
		}
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	l.join()
	return l, nil
}

// interfaces are those that carry multicasts.
func (l *ssdpLink) interfaces() (list []net.Interface) {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	for _, i := range all {
		if i.Flags&net.FlagUp != 0 && i.Flags&net.FlagMulticast != 0 {
			list = append(list, i)
		}
	}
	return list
}

// join joins the group on the links that there are. To join it again is an error that means nothing.
func (l *ssdpLink) join() {
	for _, i := range l.interfaces() {
		_ = l.enter(&i)
	}
}

// tell sends a multicast on each link, made for our first address there.
func (l *ssdpLink) tell(message func(from netip.Addr) []byte) {
	for _, i := range l.interfaces() {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() == l.group.Is4() {
				_ = l.send(message(p.Addr()), &i) // a link that is down has nobody to hear it
				break
			}
		}
	}
}
