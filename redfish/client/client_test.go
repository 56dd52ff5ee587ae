package client

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	user     = "root"
	password = "correct horse"
)

// cheap makes passwords cost next to nothing.
var cheap = service.HashCost{Memory: 64, Passes: 1}

// power is a machine that is on.
type power struct{ resets []schema.ResetType }

func (*power) State(context.Context) (schema.PowerState, error) { return schema.PowerOn, nil }
func (*power) Types() []schema.ResetType {
	return []schema.ResetType{schema.ResetForceRestart, schema.ResetForceOff}
}
func (p *power) Reset(_ context.Context, t schema.ResetType) error {
	p.resets = append(p.resets, t)
	return nil
}

// start serves a BMC with a few resources of the test's own.
func start(t *testing.T, o service.Options, routes ...service.Route) (*service.Service, *power, string) {
	t.Helper()
	if o.Account == nil && o.Announce == nil {
		o.Account = &service.Credential{User: user, Password: password}
	}
	o.Limits.Hash = cheap
	o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	s, err := service.New(o)
	if err != nil {
		t.Fatal(err)
	}
	p := &power{}
	s.Handle(service.BMC(s, service.BMCOptions{Power: p})...)
	s.Handle(routes...)
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
	return s, p, l.Addr().String()
}

func newClient(t *testing.T, c Config) *Client {
	t.Helper()
	out, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := out.Close(context.Background()); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return out
}

func fingerprint(s *service.Service) string {
	sum := sha256.Sum256(s.Certificate().Raw)
	return hex.EncodeToString(sum[:])
}

func TestTrust(t *testing.T) {
	s, _, addr := start(t, service.Options{})
	other, _, _ := start(t, service.Options{})
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	for _, tc := range []struct {
		name string
		c    Config
		want string // in the error; "" for none
	}{
		{"CA", Config{CA: pool}, ""},
		{"pin", Config{Fingerprint: fingerprint(s)}, ""},
		{"pin with colons", Config{Fingerprint: strings.ToUpper(strings.Join(split2(fingerprint(s)), ":"))}, ""},
		{"insecure", Config{Insecure: true}, ""},
		{"unknown CA", Config{}, "pin the certificate"},
		{"other pin", Config{Fingerprint: fingerprint(other)}, "make sure that this is the right machine"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.c.URL, tc.c.User, tc.c.Password = addr, user, password
			c := newClient(t, tc.c)
			_, err := c.System(t.Context())
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("System = %v; want %q", err, tc.want)
			}
		})
	}
}

func split2(s string) (out []string) {
	for i := 0; i < len(s); i += 2 {
		out = append(out, s[i:i+2])
	}
	return out
}

func TestNewRefuses(t *testing.T) {
	for _, c := range []Config{{}, {URL: "http://x"}, {URL: "https://"}, {URL: "::"}, {URL: "https://x", Fingerprint: "12"}, {URL: "ftp://x"}} {
		if _, err := New(c); err == nil {
			t.Errorf("New(%+v) succeeded", c)
		}
	}
}

func TestErrorsNameTheNextStep(t *testing.T) {
	_, _, addr := start(t, service.Options{})
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, tc := range []struct {
		name string
		c    Config
		uri  string
		want string
	}{
		{"wrong password", Config{URL: addr, Password: "wrong", Insecure: true}, "/redfish/v1/Systems", "check the user name and the password"},
		{"nobody there", Config{URL: "127.0.0.1:1", Insecure: true}, "/redfish/v1/Systems", "check the address and the port"},
		{"no TLS", Config{URL: strings.TrimPrefix(plain.URL, "http://"), Insecure: true}, "/redfish/v1/Systems", "does not speak TLS"},
		{"no answer", Config{URL: silent.Addr().String(), Insecure: true, Timeout: 50 * time.Millisecond}, "/redfish/v1/Systems", "allow more time"},
		{"no such host", Config{URL: "no-such-host.invalid", Insecure: true}, "/redfish/v1/Systems", "check the host's name"},
		{"no such resource", Config{URL: addr, Password: password, Insecure: true}, "/redfish/v1/Nothing", "Next:"},
		{"not a path", Config{URL: addr, Password: password, Insecure: true}, "https://elsewhere/redfish/v1", "want a path on the service"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.c.User = user
			c, err := New(tc.c)
			if err != nil {
				t.Fatal(err)
			}
			err = c.Get(t.Context(), tc.uri, nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Get = %v; want %q", err, tc.want)
			}
		})
	}
}

func TestSessionRenewsItself(t *testing.T) {
	_, _, addr := start(t, service.Options{Limits: service.Limits{SessionTimeout: time.Hour}})
	c := newClient(t, Config{URL: addr, User: user, Password: password, Insecure: true})
	if _, err := c.System(t.Context()); err != nil {
		t.Fatal(err)
	}
	token, uri := c.Session()
	admin := newClient(t, Config{URL: addr, User: user, Password: password, Insecure: true, Basic: true})
	if err := admin.Delete(t.Context(), uri); err != nil {
		t.Fatal(err)
	}
	if _, err := c.System(t.Context()); err != nil {
		t.Errorf("after the session was ended: %v", err)
	}
	if again, _ := c.Session(); again == token || again == "" {
		t.Errorf("token %q after %q; want a new one", again, token)
	}
	resumed := newClient(t, Config{URL: addr, Insecure: true, Token: first(c.Session()), SessionURI: second(c.Session())})
	if _, err := resumed.System(t.Context()); err != nil {
		t.Errorf("with a resumed session: %v", err)
	}
}

func first(a, _ string) string  { return a }
func second(_, b string) string { return b }

func TestPasswordChange(t *testing.T) {
	for _, basic := range []bool{false, true} {
		t.Run(fmt.Sprint("basic ", basic), func(t *testing.T) {
			var initial service.Credential
			_, _, addr := start(t, service.Options{Announce: func(c service.Credential) { initial = c }})
			c := newClient(t, Config{URL: addr, User: initial.User, Password: initial.Password, Insecure: true, Basic: basic})
			_, err := c.System(t.Context())
			var change *PasswordChangeError
			if !errors.As(err, &change) || change.User != "admin" || change.Account == "" {
				t.Fatalf("System = %v; want a PasswordChangeError", err)
			}
			if err := c.ChangePassword(t.Context(), "short"); err == nil || !strings.Contains(err.Error(), "8 to 128") {
				t.Errorf("ChangePassword to a short one = %v", err)
			}
			if err := c.ChangePassword(t.Context(), "a new password"); err != nil {
				t.Fatalf("ChangePassword = %v", err)
			}
			if _, err := c.System(t.Context()); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if err := c.ChangePassword(t.Context(), "yet another password"); err != nil {
				t.Errorf("a second change = %v", err)
			}
		})
	}
}

func TestReset(t *testing.T) {
	_, p, addr := start(t, service.Options{})
	c := newClient(t, Config{URL: addr, User: user, Password: password, Insecure: true})
	if err := c.Reset(t.Context(), schema.ResetForceOff); err != nil || len(p.resets) != 1 {
		t.Errorf("Reset = %v, %v", err, p.resets)
	}
	if err := c.Reset(t.Context(), schema.ResetNMI); err == nil || !strings.Contains(err.Error(), "ForceRestart, ForceOff") {
		t.Errorf("Reset(Nmi) = %v; want what is supported", err)
	}
}

// workRoutes are an action that runs as a task, and a long log.
func workRoutes(steps chan int) []service.Route {
	return []service.Route{
		{
			URI: "/redfish/v1/Chassis/work", Type: schema.TypeChassis,
			Get: func(*service.Request) (schema.Object, error) {
				return &schema.Chassis{Resource: schema.Resource{Name: "Work"}}, nil
			},
			Actions: []service.Action{{
				Name: "Chassis.Reset", Parameters: []service.Property{{Name: "Fail", Kind: service.Boolean}},
				Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
					return r.Task("Work", func(ctx context.Context, task *service.Task) (*service.Reply, error) {
						for percent := range steps {
							task.Progress(percent, fmt.Sprint("step ", percent))
						}
						if v.Bool("Fail") {
							return nil, service.Because(500, "OperationFailed", "The work has failed.")
						}
						return nil, task.SetOEM(oem.Identifier, map[string]int{"Answer": 42})
					})
				},
			}},
		},
		{
			URI: "/redfish/v1/Chassis/log", Type: schema.TypeLogEntryCollection, Name: "Log",
			Entries: func(*service.Request) (service.Listing, error) {
				return service.Listing{Len: 1100, ID: strconv.Itoa, At: func(int) (schema.Object, error) {
					return &schema.LogEntry{Resource: schema.Resource{Name: "Entry"}, EntryType: "Event"}, nil
				}}, nil
			},
		},
	}
}

func TestTask(t *testing.T) {
	for _, fail := range []bool{false, true} {
		steps := make(chan int)
		_, _, addr := start(t, service.Options{}, workRoutes(steps)...)
		c := newClient(t, Config{URL: addr, User: user, Password: password, Insecure: true})
		var told []int
		feed := func() {
			if len(told) <= 3 {
				steps <- 10 * len(told)
			} else if len(told) == 4 {
				close(steps)
			}
		}
		task, err := c.Run(t.Context(), "/redfish/v1/Chassis/work/Actions/Chassis.Reset", map[string]bool{"Fail": fail}, nil, func(task schema.Task) {
			told = append(told, *task.PercentComplete)
			feed()
		})
		var te *TaskError
		if fail && (!errors.As(err, &te) || !strings.Contains(err.Error(), "The work has failed")) || !fail && err != nil {
			t.Errorf("Run(fail %v) = %v", fail, err)
		}
		if len(told) < 3 || told[len(told)-1] != 100 {
			t.Errorf("progress %v; want it to rise to 100", told)
		}
		if !fail {
			var out struct{ Answer int }
			if ok, err := OEM(task.OEM, &out); !ok || err != nil || out.Answer != 42 {
				t.Errorf("result = %+v, %v, %v", out, ok, err)
			}
		}
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	steps := make(chan int)
	defer close(steps)
	_, _, addr := start(t, service.Options{}, workRoutes(steps)...)
	c := newClient(t, Config{URL: addr, User: user, Password: password, Insecure: true})
	ctx, cancel := context.WithCancel(t.Context())
	_, err := c.Run(ctx, "/redfish/v1/Chassis/work/Actions/Chassis.Reset", nil, nil, func(schema.Task) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Run = %v; want it cancelled", err)
	}
}

func TestMembers(t *testing.T) {
	_, _, addr := start(t, service.Options{}, workRoutes(nil)...)
	c := newClient(t, Config{URL: addr, User: user, Password: password, Insecure: true})
	n := 0
	for e, err := range Members[schema.LogEntry](t.Context(), c, "/redfish/v1/Chassis/log") {
		if err != nil {
			t.Fatal(err)
		}
		if e.ID != fmt.Sprint(n) {
			t.Fatalf("entry %d has the Id %s", n, e.ID)
		}
		n++
	}
	if n != 1100 {
		t.Errorf("%d entries; want 1100", n)
	}
	for role, err := range Members[schema.Role](t.Context(), c, "/redfish/v1/AccountService/Roles") {
		if err != nil || role.RoleID == "" || len(role.AssignedPrivileges) == 0 {
			t.Errorf("role %+v, %v", role, err)
		}
	}
	for _, err := range Members[schema.Role](t.Context(), c, "/redfish/v1/Nothing") {
		var e *Error
		if !errors.As(err, &e) || e.Status != 404 || !e.Has("InvalidURI") {
			t.Errorf("members of nothing: %v", err)
		}
	}
}

func TestDownload(t *testing.T) {
	_, _, addr := start(t, service.Options{})
	c := newClient(t, Config{URL: addr, User: user, Password: password, Insecure: true})
	var b bytes.Buffer
	if n, err := c.Download(t.Context(), "/redfish/v1/Systems/system", &b); err != nil || n != int64(b.Len()) || !json.Valid(b.Bytes()) {
		t.Errorf("Download = %d, %v", n, err)
	}
	if _, err := c.Download(t.Context(), "/redfish/v1/Nothing", &b); err == nil {
		t.Error("Download of nothing succeeded")
	}
}

// flaky serves data whose connections break after some bytes each.
func flaky(t *testing.T, data []byte, each int, made *atomic.Int64) (*Client, *atomic.Int32) {
	var requests atomic.Int32
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		http.ServeContent(&shortWriter{w, each}, r, "", time.Unix(made.Load(), 0), bytes.NewReader(data))
	}))
	t.Cleanup(server.Close)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	return newClient(t, Config{URL: server.URL, Insecure: true}), &requests
}

// shortWriter ends the connection after some bytes.
type shortWriter struct {
	http.ResponseWriter
	left int
}

func (w *shortWriter) Write(b []byte) (int, error) {
	if len(b) > w.left {
		_, _ = w.ResponseWriter.Write(b[:w.left])
		w.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	w.left -= len(b)
	return w.ResponseWriter.Write(b)
}

func TestDownloadResumes(t *testing.T) {
	data := make([]byte, 300_000)
	for i := range data {
		data[i] = byte(i >> 8)
	}
	var made atomic.Int64 // when, as UNIX time
	made.Store(1e9)
	c, requests := flaky(t, data, 70_000, &made)
	var b bytes.Buffer
	if n, err := c.Download(t.Context(), "/data", &b); err != nil || n != int64(len(data)) || !bytes.Equal(b.Bytes(), data) || requests.Load() != 5 {
		t.Errorf("Download = %d bytes in %d requests, %v; want %d in 5", n, requests.Load(), err, len(data))
	}
	b.Reset()
	if n, err := c.Resume(t.Context(), "/data", 290_000, &b); err != nil || n != 10_000 || !bytes.Equal(b.Bytes(), data[290_000:]) {
		t.Errorf("Resume = %d, %v", n, err)
	}
	if n, err := c.Resume(t.Context(), "/data", int64(len(data)), &b); err != nil || n != 0 {
		t.Errorf("Resume of all = %d, %v", n, err)
	}
	// What the caller cannot take is not sent again, and what has changed meanwhile is not patched together.
	requests.Store(0)
	if _, err := c.Download(t.Context(), "/data", &limited{left: 100}); !errors.Is(err, io.ErrShortWrite) || requests.Load() != 1 {
		t.Errorf("a writer that is full: %v after %d requests", err, requests.Load())
	}
	if _, err := c.Download(t.Context(), "/data", writerFunc(func(p []byte) (int, error) { made.Add(60); return len(p), nil })); err == nil || !strings.Contains(err.Error(), "changed") {
		t.Errorf("data that changes: %v", err)
	}
	// A connection that brings nothing is not tried for ever.
	c, requests = flaky(t, data, 0, &made)
	if n, err := c.Download(t.Context(), "/data", &b); err == nil || n != 0 || requests.Load() > 10 {
		t.Errorf("nothing comes: %d, %v after %d requests", n, err, requests.Load())
	}
}

type limited struct{ left int }

func (l *limited) Write(b []byte) (int, error) {
	n := min(len(b), l.left)
	l.left -= n
	if n < len(b) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// TestStrangeServers wants errors, not crashes, from servers that are no Redfish services.
func TestStrangeServers(t *testing.T) {
	var hits atomic.Int32
	for name, answer := range map[string]http.HandlerFunc{
		"HTML error": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<html>", 500) },
		"no JSON":    func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") },
		"array":      func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "[]") },
		"no token":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(201); fmt.Fprint(w, "{}") },
		"always 401": func(w http.ResponseWriter, r *http.Request) {
			hits.Add(1)
			if r.Method == "POST" {
				w.Header().Set("X-Auth-Token", "x")
				w.WriteHeader(201)
				fmt.Fprint(w, `{"@odata.id":"/x"}`)
				return
			}
			w.WriteHeader(401)
		},
		"elsewhere": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://elsewhere.invalid/", http.StatusTemporaryRedirect)
		},
		"pages in a circle": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Auth-Token", "x")
			fmt.Fprint(w, `{"@odata.id":"/x","Members":[],"Members@odata.nextLink":"/redfish/v1/Systems"}`)
		},
		"endless": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Auth-Token", "x")
			if r.Method == "POST" {
				fmt.Fprint(w, `{"@odata.id":"/x"}`)
				return
			}
			chunk := bytes.Repeat([]byte(" "), 1<<20)
			for range maxBody>>20 + 2 {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewTLSServer(answer)
			defer server.Close()
			c, err := New(Config{URL: server.URL, User: user, Password: password, Insecure: true})
			if err != nil {
				t.Fatal(err)
			}
			defer c.http.CloseIdleConnections()
			if _, err := c.System(t.Context()); err == nil {
				t.Error("System succeeded")
			} else {
				t.Log(err)
			}
		})
	}
	if n := hits.Load(); n > 4 {
		t.Errorf("a server that always says 401 was asked %d times", n)
	}
}

func FuzzError(f *testing.F) {
	f.Add([]byte(`{"error":{"code":"Base.1.22.GeneralError","message":"x","@Message.ExtendedInfo":[{"MessageId":"Base.1.22.X","Resolution":"y"}]}}`))
	f.Add([]byte(`{"error":null}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, body []byte) {
		w := httptest.NewRecorder()
		w.WriteHeader(400)
		w.Body.Write(body)
		e := newError("GET", "/x", w.Result())
		if !strings.HasPrefix(e.Error(), "GET /x: 400") {
			t.Errorf("Error() = %q", e.Error())
		}
		_, _ = e.Hint(), e.arg("PasswordChangeRequired")
	})
}
