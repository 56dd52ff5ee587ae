package service

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

func TestTLS(t *testing.T) {
	s, _ := newTestService(t, Options{Names: []string{"agent.example", "192.0.2.7"}})
	url := listen(t, s)
	host, port := hostPort(t, url)
	addr := net.JoinHostPort(host, port)
	if c, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11}); err == nil {
		c.Close()
		t.Error("TLS 1.1 is taken")
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		c, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version})
		if err != nil {
			t.Errorf("%s: %v", tls.VersionName(version), err)
			continue
		}
		cert := c.ConnectionState().PeerCertificates[0]
		if cert.PublicKeyAlgorithm.String() != "ECDSA" || cert.VerifyHostname("agent.example") != nil || cert.VerifyHostname("192.0.2.7") != nil || cert.VerifyHostname("localhost") != nil {
			t.Errorf("certificate of %v for %v %v", cert.PublicKeyAlgorithm, cert.DNSNames, cert.IPAddresses)
		}
		c.Close()
	}
	if resp, err := http.Get("http://" + addr + "/redfish/v1/"); err == nil {
		resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Errorf("plain HTTP = %d; want it refused", resp.StatusCode)
		}
	}
}

// dial opens a TLS connection for HTTP/1.1.
func dial(t testing.TB, url string) *tls.Conn {
	t.Helper()
	host, port := hostPort(t, url)
	c, err := tls.Dial("tcp", net.JoinHostPort(host, port), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestSlowClients(t *testing.T) {
	s, _ := newTestService(t, Options{Limits: Limits{RequestTime: 2 * time.Second, IdleTime: 2 * time.Second}})
	url := listen(t, s)
	const head = "POST /redfish/v1/SessionService/Sessions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
	t.Run("all", func(t *testing.T) {
		for name, sent := range map[string]string{
			"nothing":       "",
			"half a header": head,
			"half a body":   head + "\r\n{\"UserName\":",
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				c := dial(t, url)
				if _, err := io.WriteString(c, sent); err != nil {
					t.Fatal(err)
				}
				// The service's own patience ends the connection; the deadline here only keeps a failure short.
				if err := c.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, c); err != nil && os.IsTimeout(err) {
					t.Error("the connection stays open")
				}
			})
		}
	})
	if a := newPeer(t, url).do("GET", "/redfish/v1/Systems", ""); a.StatusCode != 200 {
		t.Errorf("afterwards = %d", a.StatusCode)
	}
}

func TestHugeHeader(t *testing.T) {
	s, _ := newTestService(t, Options{})
	p := newPeer(t, listen(t, s))
	tr := p.http.Transport.(*http.Transport)
	tr.ForceAttemptHTTP2 = false
	req, err := http.NewRequest("GET", p.url+"/redfish/v1/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Long", strings.Repeat("x", 64<<10))
	resp, err := p.http.Do(req)
	if err != nil {
		return // cut off: good as well
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("64 KiB of header = %d; want 431", resp.StatusCode)
	}
}

// TestManyConnections holds more connections than the service takes, and wants others to be served all the same.
func TestManyConnections(t *testing.T) {
	s, _ := newTestService(t, Options{Limits: Limits{Connections: 20}})
	url := listen(t, s)
	host, port := hostPort(t, url)
	var idle []net.Conn
	for range 200 { // without a handshake
		c, err := net.Dial("tcp", net.JoinHostPort(host, port))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	for range 5 {
		if a := newPeer(t, url).do("GET", "/redfish/v1/Systems", ""); a.StatusCode != 200 {
			t.Errorf("GET = %d", a.StatusCode)
		}
	}
	// The oldest was dropped.
	if err := idle[0].SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := idle[0].Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("the oldest idle connection is still open: %v", err)
	}
}

// TestRequestsAreBounded keeps the service as busy as it gets; what is too much is told so at once.
func TestRequestsAreBounded(t *testing.T) {
	s, _ := newTestService(t, Options{Limits: Limits{Requests: 2}})
	entered, leave := make(chan struct{}, 2), make(chan struct{})
	s.Handle(Route{URI: "/redfish/v1/Slow", Type: schema.TypeChassis, Get: func(*Request) (schema.Object, error) {
		entered <- struct{}{}
		<-leave
		return &schema.Chassis{Resource: schema.Resource{Name: "Slow"}}, nil
	}})
	url := listen(t, s)
	done := make(chan int, 2)
	for range 2 {
		p := newPeer(t, url)
		go func() { done <- p.do("GET", "/redfish/v1/Slow", "").StatusCode }()
	}
	<-entered
	<-entered
	if a := newPeer(t, url).do("GET", "/redfish/v1/", ""); a.StatusCode != 503 || a.Header.Get("Retry-After") == "" || a.messageID() != "ServiceTemporarilyUnavailable" {
		t.Errorf("the third request = %d %s; want 503", a.StatusCode, a.messageID())
	}
	close(leave)
	if a, b := <-done, <-done; a != 200 || b != 200 {
		t.Errorf("the first two = %d, %d", a, b)
	}
}

// TestMemoryIsBounded sends bodies without end and looks at what they leave.
func TestMemoryIsBounded(t *testing.T) {
	s, _ := newTestService(t, Options{})
	url := listen(t, s)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range 20 {
		c := dial(t, url)
		if _, err := fmt.Fprintf(c, "POST /redfish/v1/SessionService/Sessions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		chunk := "8000\r\n" + strings.Repeat("[", 0x8000) + "\r\n"
		for range 64 {
			if _, err := io.WriteString(c, chunk); err != nil {
				break // cut off
			}
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil {
			if resp.StatusCode != 413 {
				t.Errorf("an endless body = %d; want 413", resp.StatusCode)
			}
			resp.Body.Close()
		}
		c.Close()
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
}

func TestServeEnds(t *testing.T) {
	s, _ := newTestService(t, Options{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	newPeer(t, "https://"+l.Addr().String()).do("GET", "/redfish/v1/", "")
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve = %v", err)
	}
	if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
		c.Close()
		t.Error("the listener is still open")
	}
}

// dmtf reads a file of DMTF's release 2025.4 into v, or skips. The folder that $DMTF names holds the bundles DSP8010 and DSP8011.
func dmtf(t *testing.T, name string, v any) {
	t.Helper()
	dir := os.Getenv("DMTF")
	if dir == "" {
		t.Skip("DMTF does not name a folder with DMTF's files of release 2025.4; see redfish/README.md")
	}
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

func TestBaseMessagesAreDMTFs(t *testing.T) {
	var registry struct {
		Messages map[string]struct {
			Message, Resolution string
			MessageSeverity     schema.Health
			NumberOfArgs        int
		}
	}
	dmtf(t, "registries/Base.1.22.1.json", &registry)
	for id, m := range baseMessages {
		want, ok := registry.Messages[id]
		if !ok {
			t.Errorf("%s is not in the registry", id)
			continue
		}
		if m.text != want.Message || m.resolution != want.Resolution || m.severity != want.MessageSeverity {
			t.Errorf("%s = %+v; want %+v", id, m, want)
		}
	}
}

func TestEventMessagesAreDMTFs(t *testing.T) {
	for _, file := range eventFiles {
		var registry struct {
			Messages map[string]struct {
				Message, Resolution string
				MessageSeverity     schema.Health
			}
		}
		dmtf(t, "registries/"+file+".json", &registry)
		prefix, _, _ := strings.Cut(file, ".")
		for id, m := range eventMessages {
			name, ok := strings.CutPrefix(id, prefix+".")
			if want := registry.Messages[name]; ok && (m.text != want.Message || m.resolution != want.Resolution || m.severity != want.MessageSeverity) {
				t.Errorf("%s = %+v; want %+v", id, m, want)
			}
		}
	}
}

func TestPrivilegesAreDMTFs(t *testing.T) {
	type ops map[string][]struct{ Privilege []string }
	type overrides []struct {
		Targets      []string
		OperationMap ops
	}
	var registry struct {
		Mappings []struct {
			Entity               string
			OperationMap         ops
			SubordinateOverrides overrides
			PropertyOverrides    overrides
		}
	}
	dmtf(t, "registries/Redfish_1.8.0_PrivilegeRegistry.json", &registry)
	convert := func(in ops) operations {
		out := operations{}
		for method, list := range in {
			if method == "PUT" {
				continue
			}
			for _, p := range list {
				out[method] = append(out[method], p.Privilege)
			}
		}
		return out
	}
	convertAll := func(in overrides) (out []override) {
		for _, o := range in {
			out = append(out, override{o.Targets, convert(o.OperationMap)})
		}
		return out
	}
	checked := 0
	for _, m := range registry.Mappings {
		got, ok := privilegeTable[m.Entity]
		if !ok {
			continue
		}
		checked++
		want := mapping{convert(m.OperationMap), convertAll(m.SubordinateOverrides), convertAll(m.PropertyOverrides)}
		if d := cmp.Diff(want, got, cmp.AllowUnexported(mapping{}, override{})); d != "" {
			t.Errorf("%s (-DMTF +ours):\n%s", m.Entity, d)
		}
	}
	if checked != len(privilegeTable) {
		t.Errorf("%d of %d entities are in the registry", checked, len(privilegeTable))
	}
	// Every resource that the service has must have a row, or be an OEM's.
	s, _ := newTestService(t, Options{})
	s.Handle(testRoutes(t)...)
	s.tree.walk(func(n *node) {
		if _, ok := privilegeTable[n.route.entity()]; !ok && n.route.Document == nil {
			t.Errorf("%s: entity %s has no privileges", n.route.URI, n.route.entity())
		}
	})
}
