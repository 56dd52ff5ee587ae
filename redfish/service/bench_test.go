package service

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// BenchmarkGetSystem is an authenticated GET of the system over TLS with ten connections kept alive, HTTP/1.1. The session, the
// privileges and the entity tag are worked out for each, and the system's power changes every second. What a request costs in time of
// processors, at both ends together, hardly depends on what else the machine does.
func BenchmarkGetSystem(b *testing.B) {
	s, power := newTestService(b, Options{})
	ctx, cancel := context.WithCancel(b.Context())
	var changes sync.WaitGroup
	changes.Go(func() {
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for next := schema.ResetForceOff; ; next = map[schema.ResetType]schema.ResetType{schema.ResetForceOff: schema.ResetOn, schema.ResetOn: schema.ResetForceOff}[next] {
			select {
			case <-ctx.Done():
				return
			case <-every.C:
				_ = power.Reset(ctx, next)
			}
		}
	})
	defer changes.Wait()
	defer cancel()
	url := listen(b, s) + "/redfish/v1/Systems/system"
	token, _ := s.sessions.open(testUser, "")
	b.ResetTimer()
	before := processorTime(b)
	rate, p99 := load(b, url, b.N, func(r *http.Request) { r.Header.Set("X-Auth-Token", token) })
	b.ReportMetric(float64((processorTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/req")
	b.ReportMetric(rate, "req/s")
	b.ReportMetric(float64(p99.Microseconds())/1000, "p99-ms")
}

// processorTime is what the process has used so far.
func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// load sends n GETs over ten connections and returns how many were answered per second, and the time of the slowest but one in 100.
func load(b *testing.B, url string, n int, authorize func(*http.Request)) (rate float64, p99 time.Duration) {
	const connections = 10
	next := make(chan struct{}, n)
	for range n {
		next <- struct{}{}
	}
	close(next)
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	began := time.Now()
	for range connections {
		wg.Go(func() {
			tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
			defer tr.CloseIdleConnections()
			client := &http.Client{Transport: tr}
			var took []time.Duration
			for range next {
				start := time.Now()
				get(b, client, url, authorize)
				took = append(took, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
		})
	}
	wg.Wait()
	rate = float64(n) / time.Since(began).Seconds()
	slices.Sort(all)
	return rate, all[len(all)*99/100]
}

// BenchmarkGetBesideStreams is a GET of the system every 2 ms while an image of 1 GiB is uploaded and a file is downloaded, as fast as they go.
// The memory that it reports is the most that the process had, with both ends of all connections.
func BenchmarkGetBesideStreams(b *testing.B) {
	const size = 1 << 30
	s, _ := newTestService(b, Options{Updater: &fakeUpdater{max: size}, Limits: Limits{RequestTime: 10 * time.Minute}})
	s.Handle(Route{URI: "/redfish/v1/Managers/bmc/Data", Type: schema.TypeLogEntry, Download: func(*Request) (*File, error) {
		return &File{Content: &zeros{size: 64 * size}}, nil
	}})
	url := listen(b, s)
	token, _ := s.sessions.open(testUser, "")
	authorize := func(r *http.Request) { r.Header.Set("X-Auth-Token", token) }
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	var all []time.Duration
	for b.Loop() {
		downloading, end := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			req, err := http.NewRequestWithContext(downloading, "GET", url+"/redfish/v1/Managers/bmc/Data", nil)
			if err != nil {
				b.Error(err)
				return
			}
			authorize(req)
			resp, err := client.Do(req)
			if err != nil {
				b.Error(err)
				return
			}
			defer resp.Body.Close()
			if n, err := io.Copy(io.Discard, resp.Body); n < size/64 || downloading.Err() == nil {
				b.Errorf("the download ended after %d bytes: %v", n, err)
			}
		})
		uploaded := make(chan struct{})
		go func() {
			defer close(uploaded)
			body, contentType := updateBody(b, `{"Targets":[]}`, &zeros{size: size}, false)
			req, err := http.NewRequest("POST", url+pushURI, body)
			if err != nil {
				b.Error(err)
				return
			}
			authorize(req)
			req.Header.Set("Content-Type", contentType)
			resp, err := client.Do(req)
			if err != nil {
				b.Error(err)
				return
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusAccepted {
				text, _ := io.ReadAll(resp.Body)
				b.Errorf("upload: %s %s", resp.Status, text)
			}
		}()
		ticks := time.NewTicker(2 * time.Millisecond)
		for done := false; !done; {
			select {
			case <-uploaded:
				done = true
			case <-ticks.C:
				start := time.Now()
				get(b, client, url+"/redfish/v1/Systems/system", authorize)
				all = append(all, time.Since(start))
			}
		}
		ticks.Stop()
		end()
		wg.Wait()
		for _, t := range s.tasks.list() {
			<-t.done
		}
	}
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(float64(len(all))/float64(b.N), "GETs/op")
	b.ReportMetric(peakMiB(b), "peak-MiB")
}

// zeros is a file of zeros.
type zeros struct{ at, size int64 }

func (z *zeros) Read(b []byte) (int, error) {
	n := min(int64(len(b)), z.size-z.at)
	if n == 0 {
		return 0, io.EOF
	}
	clear(b[:n])
	z.at += n
	return int(n), nil
}

func (z *zeros) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += z.at
	case io.SeekEnd:
		off += z.size
	}
	z.at = off
	return off, nil
}

func (z *zeros) Close() error { return nil }

// peakMiB is the most memory that the process has had resident.
func peakMiB(b *testing.B) float64 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			var kib float64
			if _, err := fmt.Sscan(rest, &kib); err == nil {
				return kib / 1024
			}
		}
	}
	b.Fatal("/proc/self/status has no VmHWM")
	return 0
}

// BenchmarkPeers is BenchmarkGetSystem in turns with other services, of which REDFISH_PEERS names a folder with checkouts:
// DMTF's Redfish-Mockup-Server and OpenStack's sushy-tools. It reports how many times as many requests per second ours answers.
// PYTHON is the interpreter (python3); PYTHONPATH may name modules that the system lacks.
func BenchmarkPeers(b *testing.B) {
	dir := os.Getenv("REDFISH_PEERS")
	if dir == "" {
		b.Skip("REDFISH_PEERS does not name a folder with checkouts of Redfish-Mockup-Server and sushy-tools")
	}
	s, _ := newTestService(b, Options{})
	own := listen(b, s)
	token, _ := s.sessions.open(testUser, "")
	cert, key, err := selfSigned(nil, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	certFile, keyFile := filepath.Join(b.TempDir(), "cert.pem"), filepath.Join(b.TempDir(), "key.pem")
	for path, text := range map[string][]byte{certFile: cert, keyFile: key} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	for _, peer := range []struct {
		name, dir string
		args      func(port string) []string
	}{
		{"mockup-server", "Redfish-Mockup-Server", func(port string) []string {
			return []string{"redfishMockupServer.py", "-H", "127.0.0.1", "-p", port, "-S", "-s", "--cert", certFile, "--key", keyFile, "-D", "public-rackmount1"}
		}},
		{"sushy-tools", "sushy-tools", func(port string) []string {
			return []string{"-m", "sushy_tools.emulator.main", "-i", "127.0.0.1", "-p", port, "--fake", "--ssl-certificate", certFile, "--ssl-key", keyFile}
		}},
	} {
		b.Run(peer.name, func(b *testing.B) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			_, port, _ := net.SplitHostPort(l.Addr().String())
			l.Close()
			url := "https://127.0.0.1:" + port
			cmd := exec.Command(cmp.Or(os.Getenv("PYTHON"), "python3"), peer.args(port)...)
			cmd.Dir = filepath.Join(dir, peer.dir)
			cmd.Env = append(os.Environ(), "PYTHONPATH="+os.Getenv("PYTHONPATH")+":.", "PBR_VERSION=2.0.0")
			var said bytes.Buffer
			cmd.Stdout, cmd.Stderr = &said, &said
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			defer func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}()
			transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
			defer transport.CloseIdleConnections()
			system := ""
			for deadline := time.Now().Add(30 * time.Second); system == ""; time.Sleep(100 * time.Millisecond) {
				if time.Now().After(deadline) {
					b.Fatalf("%s does not answer", peer.name) // what it said is read once it has ended
				}
				resp, err := (&http.Client{Transport: transport}).Get(url + "/redfish/v1/Systems")
				if err != nil {
					continue
				}
				var c schema.Collection
				err = json.NewDecoder(resp.Body).Decode(&c)
				resp.Body.Close()
				var link schema.Link
				if err == nil && len(c.Members) > 0 && json.Unmarshal(c.Members[0], &link) == nil {
					system = link.ID
				}
			}
			var ours, theirs float64
			n := 0
			for b.Loop() {
				// In turns, so that whatever else the machine does is shared.
				a, _ := load(b, own+"/redfish/v1/Systems/system", 2000, func(r *http.Request) { r.Header.Set("X-Auth-Token", token) })
				t, _ := load(b, url+system, 200, func(*http.Request) {})
				ours, theirs, n = ours+a, theirs+t, n+1
			}
			b.ReportMetric(ours/float64(n), "req/s")
			b.ReportMetric(theirs/float64(n), "peer-req/s")
			b.ReportMetric(ours/theirs, "times")
		})
	}
}

// BenchmarkConnections is a GET of the service root on a new TLS connection each, as bmclib does for each of its requests, from eight
// clients at once: with the key exchange that Go's clients and newer OpenSSLs choose, which holds against quantum computers as well, with
// what older ones have (OpenSSL 3.0, Python of Debian 12), and with the session of the connection before. What a connection costs in time of
// processors, at both ends together, hardly depends on what else the machine does.
func BenchmarkConnections(b *testing.B) {
	for _, v := range []struct {
		name   string
		config *tls.Config
	}{
		{"X25519MLKEM768", &tls.Config{CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}}},
		{"X25519", &tls.Config{CurvePreferences: []tls.CurveID{tls.X25519}}},
		{"resumed", &tls.Config{CurvePreferences: []tls.CurveID{tls.X25519}, ClientSessionCache: tls.NewLRUClientSessionCache(8)}},
	} {
		b.Run(v.name, func(b *testing.B) {
			s, _ := newTestService(b, Options{})
			url := listen(b, s) + "/redfish/v1/"
			v.config.InsecureSkipVerify = true
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: v.config, DisableKeepAlives: true}}
			b.SetParallelism(max(1, 8/runtime.GOMAXPROCS(0)))
			b.ResetTimer()
			before := processorTime(b)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					get(b, client, url, func(*http.Request) {})
				}
			})
			b.ReportMetric(float64((processorTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/conn")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conn/s")
		})
	}
}

// BenchmarkBasic is a GET with basic authentication, the password being remembered.
func BenchmarkBasic(b *testing.B) {
	s, _ := newTestService(b, Options{Limits: Limits{Hash: usualHash}})
	p := newPeer(b, listen(b, s))
	for b.Loop() {
		if a := p.do("GET", "/redfish/v1/Systems/system", ""); a.StatusCode != 200 {
			b.Fatal(a.Status)
		}
	}
}

// BenchmarkLogin is one password check with the default cost.
func BenchmarkLogin(b *testing.B) {
	s, _ := newTestService(b, Options{Limits: Limits{Hash: usualHash}})
	a := s.accounts.list()[0]
	for b.Loop() {
		if !s.accounts.matches(a.Hash, testPassword) {
			b.Fatal("no match")
		}
	}
}

func get(b *testing.B, client *http.Client, url string, authorize func(*http.Request)) {
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		b.Error(err)
		return
	}
	authorize(req)
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
