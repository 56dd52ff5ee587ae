package service

import (
	"crypto/tls"
	"io"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// BenchmarkGetSystem is an authenticated GET of the system over TLS with ten connections kept alive, HTTP/1.1. The session, the
// privileges and the entity tag are worked out for each.
func BenchmarkGetSystem(b *testing.B) {
	s, _ := newTestService(b, Options{})
	url := listen(b, s) + "/redfish/v1/Systems/system"
	token, _ := s.sessions.open(testUser, "")
	const connections = 10
	next := make(chan struct{}, b.N)
	for range b.N {
		next <- struct{}{}
	}
	close(next)
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	b.ResetTimer()
	for range connections {
		wg.Go(func() {
			tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
			defer tr.CloseIdleConnections()
			client := &http.Client{Transport: tr}
			var took []time.Duration
			for range next {
				start := time.Now()
				get(b, client, url, token)
				took = append(took, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1000, "p99-ms")
}

// BenchmarkConnections is a GET of the service root on a new TLS connection each, as bmclib does for each of its requests.
func BenchmarkConnections(b *testing.B) {
	s, _ := newTestService(b, Options{})
	url := listen(b, s) + "/redfish/v1/"
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	client := &http.Client{Transport: tr}
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			get(b, client, url, "")
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conn/s")
}

// BenchmarkBasic is a GET with basic authentication, the password being remembered.
func BenchmarkBasic(b *testing.B) {
	s, _ := newTestService(b, Options{Limits: Limits{Hash: HashCost{Memory: 12 << 10, Passes: 3}}})
	p := newPeer(b, listen(b, s))
	for b.Loop() {
		if a := p.do("GET", "/redfish/v1/Systems/system", ""); a.StatusCode != 200 {
			b.Fatal(a.Status)
		}
	}
}

// BenchmarkLogin is one password check with the default cost.
func BenchmarkLogin(b *testing.B) {
	s, _ := newTestService(b, Options{Limits: Limits{Hash: HashCost{Memory: 12 << 10, Passes: 3}}})
	a := s.accounts.list()[0]
	for b.Loop() {
		if !s.accounts.matches(a.Hash, testPassword) {
			b.Fatal("no match")
		}
	}
}

func get(b *testing.B, client *http.Client, url, token string) {
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		b.Error(err)
		return
	}
	if token != "" {
		req.Header.Set("X-Auth-Token", token)
	}
	resp, err := client.Do(req)
	if err != nil {
		b.Error(err)
		return
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 {
		b.Errorf("GET %s = %d, %v", url, resp.StatusCode, err)
	}
}
