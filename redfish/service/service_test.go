package service

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

const (
	testUser     = "root"
	testPassword = "correct horse"
)

// fakePower is a machine that obeys at once.
type fakePower struct {
	mu     sync.Mutex // guards what follows
	state  schema.PowerState
	resets []schema.ResetType
	boot   [3]string
}

func (p *fakePower) State(context.Context) (schema.PowerState, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state, nil
}

func (p *fakePower) Types() []schema.ResetType {
	return []schema.ResetType{schema.ResetOn, schema.ResetForceOff, schema.ResetGracefulShutdown, schema.ResetForceRestart, schema.ResetPowerCycle, schema.ResetNMI}
}

func (p *fakePower) Reset(_ context.Context, t schema.ResetType) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resets = append(p.resets, t)
	switch t {
	case schema.ResetOn, schema.ResetForceRestart, schema.ResetPowerCycle:
		p.state = schema.PowerOn
	case schema.ResetForceOff, schema.ResetGracefulShutdown:
		p.state = schema.PowerOff
	}
	return nil
}

func (p *fakePower) Boot(context.Context) (enabled, target, mode string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.boot[0], p.boot[1], p.boot[2], nil
}

func (p *fakePower) SetBoot(_ context.Context, enabled, target, mode string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.boot = [3]string{enabled, target, mode}
	return nil
}

func (p *fakePower) Targets() []string { return []string{"None", "Pxe", "Hdd", "Cd"} }

// cheap makes passwords cost next to nothing.
var cheap = HashCost{Memory: 64, Passes: 1}

// newTestService returns a service with a BMC's resources and one administrator.
func newTestService(t testing.TB, o Options) (*Service, *fakePower) {
	t.Helper()
	if o.Account == nil && o.Announce == nil {
		o.Account = &Credential{testUser, testPassword}
	}
	if o.Limits.Hash == (HashCost{}) {
		o.Limits.Hash = cheap
	}
	o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // a task that outlives its test would log into it
		for _, task := range s.tasks.list() {
			task.cancel()
			<-task.done
		}
	})
	p := &fakePower{state: schema.PowerOn, boot: [3]string{"Disabled", "None", "UEFI"}}
	s.Handle(BMC(s, BMCOptions{Power: p, Manufacturer: "Test", Model: "Machine", SerialNumber: "1", ResetBMC: func(context.Context, bool) error { return nil }})...)
	return s, p
}

// listen serves on loopback until the test ends and returns the URL.
func listen(t testing.TB, s *Service) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return "https://" + l.Addr().String()
}

// peer is a plain HTTP client for tests.
type peer struct {
	t    testing.TB
	url  string
	http *http.Client
}

func newPeer(t testing.TB, url string) *peer {
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &peer{t: t, url: url, http: &http.Client{Transport: tr}}
}

type answer struct {
	*http.Response
	body []byte
	json map[string]any
}

// do sends a request as the administrator, unless headers say otherwise: "Authorization" "" sends none.
func (p *peer) do(method, path, body string, headers ...string) answer {
	p.t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, p.url+path, r)
	if err != nil {
		p.t.Fatal(err)
	}
	req.SetBasicAuth(testUser, testPassword)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		if headers[i+1] == "" {
			req.Header.Del(headers[i])
		} else {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	resp, err := p.http.Do(req)
	if err != nil {
		p.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	a := answer{Response: resp}
	if a.body, err = io.ReadAll(resp.Body); err != nil {
		p.t.Fatalf("%s %s: read body: %v", method, path, err)
	}
	if strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") && len(a.body) > 0 {
		dec := json.NewDecoder(bytes.NewReader(a.body))
		if err := dec.Decode(&a.json); err != nil {
			p.t.Fatalf("%s %s: decode body: %v\n%s", method, path, err, a.body)
		}
	}
	return a
}

// at returns a member of the JSON body by its path, with numbers for indices of arrays.
func (a answer) at(path ...any) any {
	var v any = a.json
	for _, step := range path {
		switch step := step.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[step]
		case int:
			l, _ := v.([]any)
			if step >= len(l) {
				return nil
			}
			v = l[step]
		}
	}
	return v
}

// messageID returns the first extended message's Id without the registry.
func (a answer) messageID() string {
	id, _ := a.at("error", "@Message.ExtendedInfo", 0, "MessageId").(string)
	return strings.TrimPrefix(id, baseRegistry)
}
