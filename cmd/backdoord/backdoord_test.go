package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// TestMain lets the test program be the agent: as itself, and as the worker that it starts.
func TestMain(m *testing.M) {
	if os.Getenv("BACKDOORD_TEST") == "agent" {
		main()
	}
	os.Exit(m.Run())
}

// output is what an agent said so far.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// wait returns the first match of a pattern from offset on, as soon as it is there, and the offset behind it.
func (o *output) wait(t *testing.T, from int, pattern string) ([]string, int) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.Now().Add(60 * time.Second)
	for time.Now().Before(deadline) {
		s := o.String()
		if m := re.FindStringSubmatchIndex(s[from:]); m != nil {
			return re.FindStringSubmatch(s[from:]), from + m[1]
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no %q in the agent's output:\n%s", pattern, o.String())
	return nil, 0
}

// start runs an agent as a process of its own, until the test ends.
func start(t *testing.T, args ...string) (*exec.Cmd, *output) {
	t.Helper()
	var out output
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "BACKDOORD_TEST=agent")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			t.Logf("the agent said:\n%s", out.String())
		}
	})
	return cmd, &out
}

// freePort returns a loopback address that nobody listens at, for a moment at least.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// login gets into a new agent by what its console shows.
func login(t *testing.T, out *output, addr string) *client.Client {
	t.Helper()
	password, _ := out.wait(t, 0, `initial password "([^"]+)"`)
	pin, _ := out.wait(t, 0, `certificate SHA-256 ([0-9a-f]{64})`)
	c, err := client.New(client.Config{URL: "https://" + addr, User: "admin", Password: password[1], Fingerprint: pin[1]})
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(60 * time.Second)
	for {
		err := c.ChangePassword(t.Context(), "correct horse battery")
		if err == nil {
			return c
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func state(t *testing.T, c *client.Client) engine.State {
	t.Helper()
	var r struct{ State engine.State }
	if err := c.Get(t.Context(), client.StateURI, &r); err != nil {
		t.Fatal(err)
	}
	return r.State
}

// Whatever is wrong with the path to the host's memory, the engine stands, writes nothing and says why it watches nothing.
func TestNothingToWatch(t *testing.T) {
	dir := t.TempDir()
	image := write(t, filepath.Join(dir, "image"), strings.Repeat("x", 1<<20))
	for _, tt := range []struct {
		name, memory string
		phase        engine.Phase
		why          string
	}{
		{"none", `{}`, engine.NoMemory, "no path to a host's memory is configured"},
		{"missing RAM file", `{"backend": "ramfile", "path": "not-there", "layout": "flat", "size": "1MiB"}`, engine.NoMemory, "not-there"},
		{"no PCI device", `{"backend": "pci", "device": "dead:beef", "layout": "flat", "size": "1MiB"}`, engine.NoMemory, "dead:beef"},
		{"no kernel", fmt.Sprintf(`{"backend": "image", "path": %q}`, image), engine.Searching, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := write(t, filepath.Join(t.TempDir(), "config.json"), `{"version": 1, "stateDir": "state", "memory": `+tt.memory+`}`)
			cfg, why := configure(path)
			if why != nil {
				t.Fatal(why)
			}
			log := slog.New(slog.DiscardHandler)
			w := newWorker(cfg, log)
			w.openEngine(newParts(cfg, log), why)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- w.engine.Run(ctx) }()
			defer func() {
				cancel()
				<-done
				if err := w.journal.Close(); err != nil {
					t.Error(err)
				}
			}()
			deadline := time.Now().Add(60 * time.Second)
			for {
				s := w.engine.State()
				if s.Phase == tt.phase && strings.Contains(s.Why, tt.why) {
					if s.Writes || s.Health != engine.CouldNotTell {
						t.Errorf("state = %+v; want no writes, and a health that could not be told", s)
					}
					return
				}
				if time.Now().After(deadline) {
					t.Fatalf("the engine's state stays %+v", s)
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
}

// A configuration that cannot be read must not move the service to a place where nobody looks: it is on the default port,
// with the default state directory, so this test only looks at how the worker is made.
func TestBrokenConfiguration(t *testing.T) {
	dir := t.TempDir()
	for _, text := range []string{``, `{`, `{"version": 1, "memroy": {}}`, `{"version": 9}`, `{"version": 1, "writes": true}`} {
		cfg, why := configure(write(t, filepath.Join(dir, "config.json"), text))
		if why == nil || cfg.Writes || cfg.Memory.Backend != config.BackendNone {
			t.Errorf("configure(%s) = %+v, %v; want the default and the reason", text, cfg, why)
		}
		if _, err := memory(cfg, slog.New(slog.DiscardHandler), why)(t.Context()); !errors.Is(err, why) {
			t.Errorf("memory after configure(%s) = %v; want %v", text, err, why)
		}
	}
	if _, why := configure(filepath.Join(dir, "none")); why == nil || !strings.Contains(why.Error(), "there is no configuration") {
		t.Errorf("configure(missing) = %v", why)
	}
}

// Parts of the configuration that are wrong are replaced by what is safe.
func TestProblemsAreSafe(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "agreement.json"), `{}`)
	write(t, filepath.Join(dir, "policy.json"), `{"version": 1, "rules": [{"finding": "panic", "action": "power-cycle", "mode": "sometimes"}]}`)
	key, err := json.Marshal(config.Key(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		t.Fatal(err)
	}
	path := write(t, filepath.Join(dir, "config.json"), fmt.Sprintf(`{"version": 1, "writes": true,
		"agreement": {"file": "agreement.json", "ownerKey": %s}, "policyFile": "policy.json",
		"hostBMC": {"url": "https://127.0.0.1:1", "username": "u", "passwordFile": "none"}}`, key))
	cfg, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	p := newParts(cfg, slog.New(slog.DiscardHandler))
	if len(p.problems) != 3 || p.agreement != nil || p.power != nil {
		t.Errorf("newParts = %+v; want three problems, no agreement and no power", p)
	}
	for _, r := range p.policy.Rules {
		if r.Mode != "wait" {
			t.Errorf("newParts: the policy in place of a wrong one has the rule %+v; want all to wait", r)
		}
	}
	// What the agent could not carry out is as wrong as what it cannot read, and no less safe.
	for _, rule := range []string{`{"finding": "panic", "action": "kill-process", "mode": "automatic", "maxPerHour": 1}`,
		`{"finding": "panic", "action": "format-disk", "mode": "automatic", "maxPerHour": 1}`} {
		write(t, filepath.Join(dir, "policy.json"), `{"version": 1, "rules": [`+rule+`]}`)
		if p := newParts(cfg, slog.New(slog.DiscardHandler)); len(p.problems) != 3 || !slices.Equal(p.policy.Rules, policy.Default().Rules) {
			t.Errorf("newParts with the rule %s = %+v; want three problems and the default policy", rule, p)
		}
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"-check", "-config", path}, &out, &errs); code != 1 || strings.Count(errs.String(), "\n") < 3 {
		t.Errorf("-check = %d\n%s", code, errs.String())
	}
}

func TestCommandLine(t *testing.T) {
	good := write(t, filepath.Join(t.TempDir(), "config.json"), `{"version": 1}`)
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"-check", "-config", good}, 0, "config.json: ok\n"},
		{[]string{"-check", "-config", good + "x"}, 1, "no such file"},
		{[]string{"-version"}, 0, "backdoord "},
		{[]string{"-frob"}, 2, "flag provided but not defined"},
		{[]string{"stray"}, 2, "takes no arguments"},
		{[]string{"-h"}, 0, "-config"},
	} {
		var out output
		if code := run(t.Context(), tt.args, &out, &out); code != tt.code || !strings.Contains(out.String(), tt.want) {
			t.Errorf("run(%q) = %d, %q; want %d, %q", tt.args, code, out.String(), tt.code, tt.want)
		}
	}
}

// The worker may die: another takes its place, and the accounts are still there.
func TestWorkerIsRestarted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	addr := freePort(t)
	cmd, out := start(t, "-config", write(t, filepath.Join(dir, "config.json"),
		fmt.Sprintf(`{"version": 1, "stateDir": "state", "redfish": {"listen": %q}}`, addr)))
	first, at := out.wait(t, 0, `worker started" pid=(\d+)`)
	c := login(t, out, addr)
	pid, err := strconv.Atoi(first[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_, at = out.wait(t, at, `the worker has ended; starting another.*signal: killed`)
	_, at = out.wait(t, at, `worker started" pid=(\d+)`)
	out.wait(t, at, `certificate SHA-256`)
	deadline := time.Now().Add(60 * time.Second)
	for c.Login(t.Context()) != nil {
		if time.Now().After(deadline) {
			t.Fatal("the second worker does not let us in")
		}
		time.Sleep(50 * time.Millisecond)
	}
	if strings.Contains(out.String()[at:], "initial password") {
		t.Error("the second worker announces an initial password although it was changed")
	}

	// A restart over Redfish ends the worker; outside of an image its keeper just starts another.
	if s := state(t, c); s.Phase != engine.NoMemory || s.Why == "" {
		t.Errorf("state = %+v; want no memory, and why", s)
	}
	if _, err := c.Post(t.Context(), "/redfish/v1/Managers/bmc/Actions/Manager.Reset", map[string]string{"ResetType": "GracefulRestart"}, nil); err != nil {
		t.Fatal(err)
	}
	_, at = out.wait(t, at, `exit status 75`)
	third, _ := out.wait(t, at, `worker started" pid=(\d+)`)

	// An orderly end takes the worker along.
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the agent ended by SIGTERM: %v; want exit status 0", err)
	}
	pid, err = strconv.Atoi(third[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the worker %d is still there: %v", pid, err)
	}
}

// The port of the service may be taken for a while; the engine works meanwhile, and the service comes.
func TestPortIsTaken(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_, out := start(t, "-config", write(t, filepath.Join(t.TempDir(), "config.json"),
		fmt.Sprintf(`{"version": 1, "stateDir": "state", "redfish": {"listen": %q}}`, addr)))
	out.wait(t, 0, `a part has ended; starting it again.*part=redfish.*address already in use`)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	deadline := time.Now().Add(60 * time.Second)
	for {
		r, err := h.Get("https://" + addr + "/redfish/v1/")
		if err == nil {
			io.Copy(io.Discard, r.Body)
			r.Body.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// What keeps the service from being made leaves the engine at its work, and the service comes once it is put right.
func TestServiceStateIsDamaged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "state"), 0o700); err != nil {
		t.Fatal(err)
	}
	damaged := write(t, filepath.Join(dir, "state", "redfish"), "a file where a directory should be")
	_, out := start(t, "-config", write(t, filepath.Join(dir, "config.json"),
		fmt.Sprintf(`{"version": 1, "stateDir": "state", "redfish": {"listen": %q}}`, freePort(t))))
	out.wait(t, 0, `a part has ended; starting it again.*part=redfish.*make Redfish service`)
	if err := os.Remove(damaged); err != nil {
		t.Fatal(err)
	}
	out.wait(t, 0, `certificate SHA-256`)
	if strings.Contains(out.String(), "the worker has ended") {
		t.Errorf("the worker has ended:\n%s", out.String())
	}
}

func TestSupervise(t *testing.T) {
	var out output
	runs := 0
	synctest.Test(t, func(t *testing.T) { // its clock does not wait
		log := slog.New(slog.NewTextHandler(&out, nil))
		ctx, cancel := context.WithCancel(t.Context())
		supervise(ctx, log, "part", func(context.Context) error {
			switch runs++; runs {
			case 1:
				panic("out of cheese")
			case 2:
				return errors.New("redo from start")
			}
			cancel()
			return nil
		})
	})
	s := out.String()
	for _, want := range []string{"out of cheese", "backdoord_test.go", "redo from start"} {
		if !strings.Contains(s, want) {
			t.Errorf("supervise logs\n%s\nwithout %q", s, want)
		}
	}
	if runs != 3 {
		t.Errorf("supervise ran the part %d times; want 3", runs)
	}
}

func TestKeeperAlive(t *testing.T) {
	var k keeper
	k.lastBeat.Store(time.Now().UnixNano())
	if err := k.alive(); err != nil {
		t.Errorf("alive() after a beat = %v", err)
	}
	k.lastBeat.Store(time.Now().Add(-3 * beatLost).UnixNano())
	if k.alive() == nil {
		t.Error("alive() long after the last beat = nil; want the watchdog to starve")
	}
}

// The limit follows what is in use, between what a small host takes and a share of the machine.
func TestMemoryLimit(t *testing.T) {
	for _, c := range []struct{ live, total, want uint64 }{
		{0, 512 << 20, 32 << 20}, {16 << 20, 512 << 20, 32 << 20}, {40 << 20, 512 << 20, 60 << 20},
		{200 << 20, 512 << 20, 128 << 20}, {200 << 20, 64 << 30, 260 << 20}, {4 << 30, 64 << 30, 512 << 20}, {60 << 20, 128 << 20, 48 << 20},
	} {
		if got := memoryLimit(c.live, c.total); got != int64(c.want) {
			t.Errorf("memoryLimit(%d MiB, %d MiB) = %d MiB; want %d", c.live>>20, c.total>>20, got>>20, c.want>>20)
		}
	}
}
