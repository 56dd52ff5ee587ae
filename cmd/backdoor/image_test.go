package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	sshagent "golang.org/x/crypto/ssh/agent"

	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/redfish/firmware"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// cli runs the command in a directory of its own and returns what it printed.
type cli struct {
	t   *testing.T
	dir string
}

func newCLI(t *testing.T) *cli { return &cli{t, t.TempDir()} }

func (c *cli) path(name string) string { return filepath.Join(c.dir, name) }

// run runs the command; words that begin with "@" are files of the directory.
func (c *cli) run(want int, args ...string) string {
	c.t.Helper()
	for i, a := range args {
		if name, ok := strings.CutPrefix(a, "@"); ok {
			args[i] = c.path(name)
		}
	}
	var out, errs bytes.Buffer
	if got := run(context.Background(), args, strings.NewReader(""), &out, &errs); got != want {
		c.t.Fatalf("backdoor %s = %d; want %d\n%s%s", strings.Join(args, " "), got, want, out.Bytes(), errs.Bytes())
	}
	return out.String() + errs.String()
}

func (c *cli) write(name string, b []byte) {
	c.t.Helper()
	if err := os.WriteFile(c.path(name), b, 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// build makes keys, a key set and a bundle.
func (c *cli) build(version string) {
	c.t.Helper()
	if _, err := os.Stat(c.path("roots.json")); err != nil {
		c.write("kernel", bytes.Repeat([]byte("kernel"), 10_000))
		c.write("initramfs", bytes.Repeat([]byte("initramfs"), 10_000))
		c.run(0, "image", "key", "new", "@root.key")
		c.run(0, "image", "key", "new", "@release.key")
		c.run(0, "image", "roots", "new", "@roots.json", "-root-key", "@root.key", "-release-key", "@release.key")
		c.run(0, "image", "roots", "sign", "@roots.json", "-key", "@root.key")
	}
	c.run(0, "image", "build", "-machine", "dpu-arm64", "-set-version", version, "-kernel", "@kernel", "-initramfs", "@initramfs", "-images", "@", "-roots", "@roots.json",
		"-key", "@release.key", "-o", "@"+version+".bundle")
}

func TestImage(t *testing.T) {
	c := newCLI(t)
	c.build("1.0")
	if got := c.run(0, "image", "verify", "@1.0.bundle", "-roots", "@roots.json"); !strings.Contains(got, "each byte is what was signed") {
		t.Errorf("verify = %s", got)
	}
	if got := c.run(0, "image", "inspect", "@1.0.bundle"); !strings.Contains(got, "backdoor 1.0") {
		t.Errorf("inspect = %s", got)
	}
	c.run(exitDenied, "image", "verify", "@1.0.bundle", "-roots", "@roots.json", "-epoch", "2")
	c.run(exitDenied, "image", "verify", "@1.0.bundle", "-roots", "@roots.json", "-machine", "bmc-armv7")
	b, err := os.ReadFile(c.path("1.0.bundle"))
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-5000] ^= 1
	c.write("bad.bundle", b)
	if got := c.run(exitDenied, "image", "verify", "@bad.bundle", "-roots", "@roots.json"); !strings.Contains(got, "damaged") {
		t.Errorf("verify of a damaged one = %s", got)
	}
	c.run(0, "image", "burn", "@1.0.bundle", "@disk.img", "-roots", "@roots.json", "-slot-size", "2")
	f, err := slot.OpenFile(c.path("disk.img"), true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if d, err := slot.OpenGPT(f); err != nil || d.State().A.Version != "1.0" || d.State().Golden.Status != slot.Good {
		t.Errorf("burnt disk: %v", err)
	}
	c.run(exitUsage, "image", "build", "-machine", "x")
	c.run(exitUsage, "image", "nonsense")
	c.run(exitError, "image", "roots", "new", "@roots.json", "-root-key", "@root.key", "-release-key", "@release.key")
}

func TestImageExport(t *testing.T) {
	c := newCLI(t)
	kernel := make([]byte, 100)
	copy(kernel[56:], "ARMd")
	c.build("1.0")
	c.write("Image", kernel)
	c.run(0, "image", "build", "-machine", "dpu-arm64", "-set-version", "1.1", "-kernel", "@Image", "-initramfs", "@initramfs", "-images", "@", "-roots", "@roots.json",
		"-key", "@release.key", "-o", "@1.1.bundle")
	c.write("base.bfb", nil)
	c.run(0, "image", "export", "bfb", "@1.1.bundle", "-roots", "@roots.json", "-base", "@base.bfb", "-o", "@out.bfb")
	if got := c.run(exitError, "image", "export", "bfb", "@1.0.bundle", "-roots", "@roots.json", "-base", "@base.bfb", "-o", "@no.bfb"); !strings.Contains(got, "arm64 Image") {
		t.Errorf("a kernel of another kind: %s", got)
	}
	if out, err := exec.Command("openssl", "genrsa", "-out", c.path("rsa.key"), "2048").CombinedOutput(); err != nil {
		t.Fatalf("openssl: %v: %s", err, out)
	}
	c.run(0, "image", "export", "openbmc", "@initramfs", "-machine", "evb-ast2600", "-set-version", "1.1", "-key", "@rsa.key", "-o", "@out.tar")
	if out, err := exec.Command("tar", "tf", c.path("out.tar")).CombinedOutput(); err != nil || !strings.Contains(string(out), "MANIFEST.sig") {
		t.Errorf("tar: %v: %s", err, out)
	}
	c.run(exitError, "image", "export", "openbmc", "@initramfs", "-machine", "evb-ast2600", "-set-version", "1.1", "-key", "@release.key", "-o", "@out.tar")
	c.run(exitUsage, "image", "export", "zip", "@1.1.bundle", "-o", "@out.zip")
}

// TestImageRotation has two people sign, one by an OpenSSH key, one by an ssh-agent, and replaces a key that was lost.
func TestImageRotation(t *testing.T) {
	c := newCLI(t)
	c.build("1.0")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bert", "-f", c.path("bert")).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	socket := c.path("agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ring := sshagent.NewKeyring()
	_, anna, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := ring.Add(sshagent.AddedKey{PrivateKey: anna, Comment: "anna"}); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _ = sshagent.ServeAgent(ring, conn); conn.Close() }()
		}
	}()
	t.Setenv("SSH_AUTH_SOCK", socket)
	annas := publicKey(anna.Public().(ed25519.PublicKey))
	c.run(0, "image", "roots", "rotate", "@roots.json", "-root-key", "@root.key", "-release-key", annas, "-release-key", "@bert.pub", "-release-threshold", "2")
	c.run(exitDenied, "image", "roots", "show", "@roots.json")
	if got := c.run(0, "image", "roots", "sign", "@roots.json", "-key", "@root.key"); !strings.Contains(got, "key set   2") {
		t.Errorf("the second key set: %s", got)
	}
	c.run(0, "image", "build", "-machine", "dpu-arm64", "-set-version", "1.1", "-kernel", "@kernel", "-initramfs", "@initramfs", "-images", "@", "-roots", "@roots.json",
		"-key", "agent:anna", "-o", "@1.1.bundle")
	c.run(exitDenied, "image", "verify", "@1.1.bundle", "-roots", "@roots.json")
	c.run(0, "image", "sign", "@1.1.bundle", "-key", "@bert")
	c.run(0, "image", "verify", "@1.1.bundle", "-roots", "@roots.json")
	if got := c.run(exitDenied, "image", "verify", "@1.0.bundle", "-roots", "@roots.json"); !strings.Contains(got, "key set") {
		t.Errorf("a bundle under the old keys: %s", got)
	}
	c.run(exitError, "image", "sign", "@1.1.bundle", "-key", "agent:nobody")
}

// A flashable is an agent's machine in this process: a disk with slots, and a service that changes when the machine restarts.
type flashable struct {
	t        *testing.T
	url      string
	disk     *slot.Disk
	state    string
	now      atomic.Pointer[service.Service]
	restarts atomic.Int32
	sick     bool // the image that comes never says that it is good
}

func newFlashable(t *testing.T, c *cli, name string) *flashable {
	t.Helper()
	m := &flashable{t: t, state: c.path(name + "-state")}
	c.run(0, "image", "burn", "@1.0.bundle", "@"+name+".img", "-roots", "@roots.json", "-slot-size", "2")
	f, err := slot.OpenFile(c.path(name+".img"), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if m.disk, err = slot.OpenGPT(f); err != nil {
		t.Fatal(err)
	}
	m.start(slot.A)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.now.Load().ServeHTTP(w, r) }))
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	s.StartTLS()
	t.Cleanup(s.Close)
	m.url = s.URL
	return m
}

// start starts from a slot, as the loader and the agent do.
func (m *flashable) start(n slot.Name) {
	if err := m.disk.Try(n); err != nil {
		m.t.Error(err)
	}
	u, err := firmware.New(firmware.Options{Disk: m.disk, Running: n, Restart: func(context.Context) error {
		m.restarts.Add(1)
		s := m.disk.State()
		next := s.Order(0)[0]
		if m.sick && s.Slot(next).Status == slot.Trial {
			if err := m.disk.Refuse(next, fmt.Errorf("it was started 3 times and never said that it is good")); err != nil {
				return err
			}
			s = m.disk.State()
			next = s.Order(0)[0]
		}
		m.start(next)
		return nil
	}})
	if err != nil {
		m.t.Error(err)
		return
	}
	o := service.Options{
		StateDir: m.state, Account: &service.Credential{User: "admin", Password: newPassword}, Logger: slog.New(slog.DiscardHandler),
		Limits: service.Limits{Hash: service.HashCost{Memory: 64, Passes: 1}},
	}
	firmware.Configure(&o, u)
	s, err := service.New(o)
	if err != nil {
		m.t.Error(err)
		return
	}
	m.now.Store(s)
	if err := m.disk.Good(n); err != nil {
		m.t.Error(err)
	}
}

func TestFlash(t *testing.T) {
	c := newCLI(t)
	c.build("1.0")
	c.build("1.1")
	c.build("1.2")
	c.write("pw", []byte(newPassword+"\n"))
	var machines []*flashable
	var urls []string
	for i := range 3 {
		m := newFlashable(t, c, fmt.Sprint("m", i))
		machines, urls = append(machines, m), append(urls, m.url)
	}
	all := []string{"flash", "-host", strings.Join(urls, ","), "-user", "admin", "-password-file", "@pw", "-insecure", "-wait", "1m"}
	flash := func(want int, args ...string) string {
		t.Helper()
		return c.run(want, append(append([]string(nil), all...), args...)...)
	}
	if got := flash(0, "@1.1.bundle", "-waves", "1,2"); !strings.Contains(got, "3 of 3 agents done") {
		t.Errorf("flash = %s", got)
	}
	for i, m := range machines {
		if s := m.disk.State(); s.Active != slot.B || s.B.Version != "1.1" || m.restarts.Load() != 1 {
			t.Errorf("machine %d: %+v after %d restarts", i, s, m.restarts.Load())
		}
	}
	if got := flash(0, "@1.1.bundle"); !strings.Contains(got, "runs already") {
		t.Errorf("the same again = %s", got)
	}
	// The first machine of the first wave gives the image up: no other is begun.
	machines[0].sick = true
	got := flash(exitError, "-json", "@1.2.bundle", "-waves", "1,2")
	var results []flashed
	if i := strings.Index(got, "["); i < 0 || json.NewDecoder(strings.NewReader(got[i:])).Decode(&results) != nil || len(results) != 3 {
		t.Fatalf("flash -json = %s", got)
	}
	if results[0].Done || !strings.Contains(results[0].Result, "given up") || results[1].Result != "not begun" || results[2].Result != "not begun" {
		t.Errorf("flash with a sick machine = %+v", results)
	}
	if s := machines[1].disk.State(); s.A.Version != "1.0" {
		t.Errorf("a machine of the second wave: %+v", s)
	}
	// A request waits, and is started by who asks.
	if got := c.run(0, "flash", "-host", urls[1], "-user", "admin", "-password-file", "@pw", "-insecure", "-apply", "request", "@1.2.bundle"); !strings.Contains(got, "is installed") {
		t.Errorf("flash -apply request = %s", got)
	}
	if s := machines[1].disk.State(); s.A.Status != slot.Staged || s.Active != slot.B {
		t.Errorf("after a request: %+v", s)
	}
	c.run(exitUsage, "flash")
	c.run(exitUsage, "flash", "@1.2.bundle", "-waves", "0", "-host", urls[0])
	c.write("junk", []byte("junk"))
	c.run(exitError, "flash", "@junk", "-host", urls[0])
}
