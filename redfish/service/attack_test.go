package service

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestHalfOpen opens 10 000 connections and says nothing on any of them.
func TestHalfOpen(t *testing.T) {
	if testing.Short() {
		t.Skip("10 000 connections are left out of short runs")
	}
	s, _ := newTestService(t, Options{})
	url := listen(t, s)
	host, port := hostPort(t, url)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for i := range 10_000 {
		c, err := net.Dial("tcp", net.JoinHostPort(host, port))
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		open = append(open, c)
		if i%2500 == 0 {
			if a := newPeer(t, url).do("GET", "/redfish/v1/Systems", ""); a.StatusCode != 200 {
				t.Errorf("GET beside %d connections = %d", i, a.StatusCode)
			}
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	// The client's ends are in this process too: about 1 KiB each.
	if grown := int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse); grown > 40<<20 {
		t.Errorf("10 000 connections take %d MiB", grown>>20)
	}
	if a := newPeer(t, url).do("GET", "/redfish/v1/Systems", ""); a.StatusCode != 200 {
		t.Errorf("GET afterwards = %d", a.StatusCode)
	}
}

// TestManyNames tries passwords with ever new user names from one source.
func TestManyNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newTestService(t, Options{})
		tries := 0
		for i := range 5000 {
			_, err := s.logins.check(fmt.Sprint("user", i), "guess", "2001:db8::1")
			if e, ok := err.(*Error); ok && e.Status == 401 {
				tries++
			}
		}
		if want := s.limits.LockAfter * sourceFails; tries != want {
			t.Errorf("%d guesses were looked at; want %d", tries, want)
		}
		if len(s.logins.failed) > 2*sourceFails*s.limits.LockAfter {
			t.Errorf("%d failures are remembered", len(s.logins.failed))
		}
		// A neighbour in the same network is the same source; others are not, whom the administrator may be among.
		if _, err := s.logins.check(testUser, testPassword, "2001:db8::2"); err == nil {
			t.Error("a neighbour of the source gets in at once")
		}
		if _, err := s.logins.check(testUser, testPassword, "2001:db8:0:1::1"); err != nil {
			t.Errorf("the administrator from elsewhere: %v", err)
		}
		time.Sleep(s.limits.LockTime + time.Second)
		if _, err := s.logins.check(testUser, testPassword, "2001:db8::2"); err != nil {
			t.Errorf("the neighbour later: %v", err)
		}
		synctest.Wait()
	})
}

// TestStrangeRequests sends what no client of good will sends. None may be answered by 5xx, save 501.
func TestStrangeRequests(t *testing.T) {
	s, _ := newTestService(t, Options{})
	p := newPeer(t, listen(t, s))
	deep := strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000)
	for _, path := range []string{sessionsURI, accountsURI, subscriptionsURI, "/redfish/v1/Systems/system/Actions/ComputerSystem.Reset"} {
		for name, body := range map[string]string{
			"deep": deep, "wide": "{" + strings.Repeat(`"a":1,`, 5000) + `"b":1}`, "brackets": strings.Repeat("[", 60_000), "zeros": string(make([]byte, 1000)),
			"a large number": `{"x":1` + strings.Repeat("0", 50_000) + `}`, "surrogates": `{"UserName":"\ud800"}`,
		} {
			if a := p.do("POST", path, body); a.StatusCode != 400 && (a.StatusCode != 413 || path != sessionsURI) {
				t.Errorf("POST %s of %s = %d", path, name, a.StatusCode)
			}
		}
	}
	// What scanners and other vendors' tools ask for.
	for _, path := range []string{
		"/redfish/v1/../../etc/passwd", "/redfish/v1/%2e%2e/%2e%2e/etc/passwd", "/redfish/v1/Systems/%00", "/redfish/v1/Systems/..%2f", "/redfish/v1//Systems",
		"/rest/v1", "/api/session", "/cgi-bin/login.cgi", "/restapi/config", "/data/login", "/redfish/v1/Managers/iDRAC.Embedded.1", "/redfish/v1/Systems/1?$filter=" + strings.Repeat("(", 1500),
	} {
		req, err := http.NewRequest("GET", p.url+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		raw, query, _ := strings.Cut(path, "?")
		req.URL.Opaque, req.URL.RawQuery = raw, query
		resp, err := p.http.Do(req)
		if err != nil {
			t.Fatalf("GET %s: %v", path, err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode < 300 || resp.StatusCode >= 500 {
			t.Errorf("GET %.60s = %d", path, resp.StatusCode)
		}
	}
	// None of that counts as a failed login.
	if a := newPeer(t, p.url).do("GET", "/redfish/v1/Systems", ""); a.StatusCode != 200 {
		t.Errorf("GET afterwards = %d", a.StatusCode)
	}
}
