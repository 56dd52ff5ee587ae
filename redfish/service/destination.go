package service

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"
)

// errForbiddenAddress says that the service does not connect to an address on a client's behalf.
var errForbiddenAddress = errors.New("the service does not connect to that address")

// outside reports whether an address is one that clients may have the service connect to: not one that means the device
// itself, its links, or groups. Private networks are allowed, for management networks are such.
func outside(a netip.Addr) bool {
	a = a.Unmap()
	for _, p := range insidePrefixes {
		if p.Contains(a) {
			return false
		}
	}
	return a.IsValid() && !a.IsLoopback() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLinkLocalUnicast()
}

// insidePrefixes hold addresses that lead back to the device in other spellings: "this network" (RFC 1122), NAT64 (RFC 6052), 6to4
// (RFC 3056), Teredo (RFC 4380), IPv4-compatible (RFC 4291), and reserved IPv4 with broadcast (RFC 1112).
var insidePrefixes = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("2001::/32"), netip.MustParsePrefix("::/96"),
}

// checkDestination reads the URI of a client's choice that the service is to connect to.
func (s *Service) checkDestination(text string, schemes ...string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("it is not a URI")
	}
	known := false
	for _, scheme := range schemes {
		known = known || u.Scheme == scheme
	}
	switch {
	case !known:
		return nil, fmt.Errorf("the scheme %q is not supported", clip(u.Scheme))
	case u.Hostname() == "" || u.Opaque != "":
		return nil, errors.New("it names no host")
	case u.User != nil:
		return nil, errors.New("it has credentials in it")
	case u.Fragment != "":
		return nil, errors.New("it has a fragment")
	}
	if a, err := netip.ParseAddr(u.Hostname()); err == nil && !s.mayConnect(a) {
		return nil, errForbiddenAddress
	}
	return u, nil
}

func (s *Service) mayConnect(a netip.Addr) bool {
	for _, i := range s.ownAddresses() {
		if a.Unmap() == i {
			return s.o.Reach != nil && s.o.Reach(a)
		}
	}
	return outside(a) || s.o.Reach != nil && s.o.Reach(a)
}

// ownAddresses are the machine's: they are as much inside as loopback is.
func (s *Service) ownAddresses() (all []netip.Addr) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			all = append(all, p.Addr().Unmap())
		}
	}
	return all
}

// outbound returns a client for URIs of clients' choice. The address is checked when the connection is made, whatever a name resolves
// to by then. It follows no redirections and knows no proxies.
func (s *Service) outbound(config *tls.Config) *http.Client {
	dialer := &net.Dialer{
		Timeout: 10 * time.Second,
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(address)
			if err != nil || !s.mayConnect(ap.Addr().WithZone("")) {
				return errForbiddenAddress
			}
			return nil
		},
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext: dialer.DialContext, TLSClientConfig: config, TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: 20 * time.Second,
			MaxConnsPerHost: 4, MaxIdleConns: 16, IdleConnTimeout: 90 * time.Second, MaxResponseHeaderBytes: 16 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}
