package service

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
)

const networkURI = "/redfish/v1/Managers/bmc/NetworkProtocol"

// TestSSDP runs itself in a network namespace of its own, whose loopback interface carries multicasts.
func TestSSDP(t *testing.T) {
	const inside = "SSDP_NAMESPACE"
	if os.Getenv(inside) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSSDP$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if os.Getuid() != 0 {
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
		}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, syscall.EPERM) && os.Getuid() != 0 {
			t.Skipf("this user may make no network namespace: %v", err)
		}
		if err != nil {
			t.Fatalf("in a network namespace: %v\n%s", err, out)
		}
		return
	}
	for _, args := range []string{"link set lo up multicast on", "address add 192.0.2.1/24 dev lo", "route add 224.0.0.0/4 dev lo"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v\n%s", args, err, out)
		}
	}
	dir := t.TempDir()
	s, _ := newTestService(t, Options{StateDir: dir})
	p := newPeer(t, listen(t, s))
	if got := p.do("GET", networkURI, "").json["SSDP"].(map[string]any)["ProtocolEnabled"]; got != false {
		t.Errorf("SSDP of a new service: ProtocolEnabled = %v", got)
	}

	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	group := &net.UDPAddr{IP: ssdpIPv4.AsSlice(), Port: ssdpPort}
	notices, err := net.ListenMulticastUDP("udp4", lo, group)
	if err != nil {
		t.Fatal(err)
	}
	defer notices.Close()
	// notice waits for the next one.
	notice := func() http.Header {
		t.Helper()
		for buf := make([]byte, 2048); ; {
			_ = notices.SetReadDeadline(time.Now().Add(20 * time.Second))
			n, err := notices.Read(buf)
			if err != nil {
				t.Fatalf("wait for a notice: %v", err)
			}
			if r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(buf[:n]))); err == nil && r.Method == "NOTIFY" {
				return r.Header
			}
		}
	}
	client, err := net.ListenPacket("udp4", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := ipv4.NewPacketConn(client).SetMulticastInterface(lo); err != nil {
		t.Fatal(err)
	}
	search := func(target string) {
		t.Helper()
		if _, err := fmt.Fprintf(writerTo{client, group}, "M-SEARCH * HTTP/1.1\r\nHost: %v\r\nMan: \"ssdp:discover\"\r\nST: %s\r\nMX: 0\r\n\r\n", group, target); err != nil {
			t.Fatal(err)
		}
	}
	answer := func(wait time.Duration) (http.Header, error) {
		buf := make([]byte, 2048)
		_ = client.SetReadDeadline(time.Now().Add(wait))
		n, _, err := client.ReadFrom(buf)
		if err != nil {
			return nil, err
		}
		r, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(buf[:n])), nil)
		if err != nil {
			t.Fatalf("the answer %q: %v", buf[:n], err)
		}
		return r.Header, nil
	}

	if a := p.do("PATCH", networkURI, `{"SSDP":{"ProtocolEnabled":true,"NotifyMulticastIntervalSeconds":60}}`); a.StatusCode >= 300 {
		t.Fatalf("switch SSDP on: %s %s", a.Status, a.body)
	}
	want := "urn:dmtf-org:service:redfish-rest:1:" + strings.Split(redfishVersion, ".")[1]
	name := "uuid:" + s.UUID() + "::" + want
	check := func(what string, h http.Header, target string) {
		t.Helper()
		root := h.Get("Al")
		if h.Get(target) != want || h.Get("Usn") != name || h.Get("Cache-Control") != "max-age=1800" {
			t.Errorf("%s: %v", what, h)
		}
		u, err := url.Parse(root)
		if err != nil || u.Path != "/redfish/v1/" {
			t.Fatalf("%s: AL %q, %v", what, root, err)
		}
		if u.Hostname() != "192.0.2.1" && u.Hostname() != "127.0.0.1" || u.Port() != strings.TrimPrefix(p.url, "https://127.0.0.1:") {
			t.Errorf("%s: AL %q; the service is %s", what, root, p.url)
		}
	}
	h := notice()
	if h.Get("Nts") != "ssdp:alive" {
		t.Errorf("the first notice: %v", h)
	}
	check("notice", h, "Nt")
	for _, target := range []string{"ssdp:all", searchTarget, want} {
		search(target)
		h, err := answer(20 * time.Second)
		if err != nil {
			t.Fatalf("search for %s: %v", target, err)
		}
		check(target, h, "St")
	}
	search("urn:dmtf-org:service:redfish-rest:2")
	search("upnp:other")
	search("ssdp:all")
	if _, err := answer(20 * time.Second); err != nil {
		t.Error(err)
	}
	if a := p.do("PATCH", networkURI, `{"SSDP":{"ProtocolEnabled":false}}`); a.StatusCode >= 300 {
		t.Fatalf("switch SSDP off: %s %s", a.Status, a.body)
	}
	if h := notice(); h.Get("Nts") != "ssdp:byebye" || h.Get("Usn") != name {
		t.Errorf("the last notice: %v", h)
	}
	search("ssdp:all")
	if h, err := answer(300 * time.Millisecond); err == nil {
		t.Errorf("an answer that nobody should have sent: %v", h)
	}

	again, _ := newTestService(t, Options{StateDir: dir})
	if got := newPeer(t, listen(t, again)).do("GET", networkURI, "").json["SSDP"].(map[string]any)["NotifyMulticastIntervalSeconds"]; got != 60.0 {
		t.Errorf("after a restart the interval is %v", got)
	}
	if a := p.do("PATCH", networkURI, `{"SSDP":{"NotifyTTL":0}}`); a.StatusCode != 400 {
		t.Errorf("a TTL of 0: %s", a.Status)
	}
}

type writerTo struct {
	net.PacketConn
	to net.Addr
}

func (w writerTo) Write(b []byte) (int, error) { return w.WriteTo(b, w.to) }

// Whoever is not on one of our links gets no answer: the source of a datagram may be somebody who is to be flooded.
func TestOnLink(t *testing.T) {
	for a, want := range map[string]bool{"127.0.0.1": true, "::ffff:127.0.0.1": true, "203.0.113.7": false, "2001:db8::1": false} {
		if got := onLink(netip.MustParseAddr(a)); got != want {
			t.Errorf("onLink(%s) = %v; want %v", a, got, want)
		}
	}
}

func FuzzParseSearch(f *testing.F) {
	f.Add([]byte("M-SEARCH * HTTP/1.1\r\nHost: 239.255.255.250:1900\r\nMan: \"ssdp:discover\"\r\nST: ssdp:all\r\nMX: 3\r\n\r\n"))
	f.Add([]byte("M-SEARCH * HTTP/1.1\r\nMAN: ssdp:discover\r\nST: urn:dmtf-org:service:redfish-rest:1\r\n\r\n"))
	f.Add([]byte("NOTIFY * HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if within, ok := parseSearch(b); within < 0 || within > 2*time.Minute || ok && !bytes.Contains(b, []byte("M-SEARCH")) {
			t.Errorf("parseSearch(%q) = %v, %v", b, within, ok)
		}
	})
}
