package firmware

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/images/bundler"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/host"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// A machine is a disk image with version 1.0 in slot A, which runs and is good, and the Redfish service of its agent.
type machine struct {
	t        *testing.T
	dir      string
	key      ed25519.PrivateKey
	roots    []bundle.Envelope
	root     bundle.Root
	disk     *slot.Disk
	updater  *Updater
	client   *client.Client
	url      string
	restarts chan struct{}
	large    int // of the initramfs, in bytes
}

const user, password = "root", "correct horse"

func newMachine(t *testing.T, initramfs int) *machine {
	t.Helper()
	m := &machine{t: t, dir: t.TempDir(), restarts: make(chan struct{}, 10), large: initramfs}
	var err error
	if m.key, m.roots, err = bundler.Development(filepath.Join(m.dir, "keys")); err != nil {
		t.Fatal(err)
	}
	if m.root, err = bundle.ReadRoots(m.roots); err != nil {
		t.Fatal(err)
	}
	first := m.bundle("1.0", nil)
	path := filepath.Join(m.dir, "disk.img")
	if _, err := bundler.Burn(path, first, slot.Layout{Slot: 32 << 20}, bundle.Policy{Root: m.root}, time.Now()); err != nil {
		t.Fatal(err)
	}
	f, err := slot.OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if m.disk, err = slot.OpenGPT(f); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.disk.Try(slot.A), m.disk.Good(slot.A), m.disk.Settle(slot.A, bundle.Policy{Root: m.root})); err != nil {
		t.Fatal(err)
	}
	m.start(slot.A)
	return m
}

// start makes the agent anew, as after a start from a slot.
func (m *machine) start(running slot.Name) {
	m.t.Helper()
	var err error
	m.updater, err = New(Options{
		Disk: m.disk, Running: running, Restart: func(context.Context) error { m.restarts <- struct{}{}; return nil },
		Parts: []schema.Link{{ID: "/redfish/v1/Managers/bmc"}}, Logger: slog.New(slog.NewTextHandler(m.t.Output(), nil)),
	})
	if err != nil {
		m.t.Fatal(err)
	}
	o := service.Options{
		StateDir: m.t.TempDir(), Account: &service.Credential{User: user, Password: password},
		Limits: service.Limits{Hash: service.HashCost{Memory: 64, Passes: 1}}, Logger: slog.New(slog.NewTextHandler(m.t.Output(), nil)),
		Reach: func(netip.Addr) bool { return true },
	}
	host.Configure(&o) // the agent's own page at "/", among others
	Configure(&o, m.updater)
	s, err := service.New(o)
	if err != nil {
		m.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		m.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(ctx, l)
	}()
	m.t.Cleanup(func() { cancel(); <-done })
	m.url = "https://" + l.Addr().String()
	if m.client, err = client.New(client.Config{URL: m.url, User: user, Password: password, Insecure: true, Basic: true}); err != nil {
		m.t.Fatal(err)
	}
}

// bundle makes a bundle.
func (m *machine) bundle(version string, change func(*bundler.Options)) *os.File {
	m.t.Helper()
	o := bundler.Options{
		Machine: "dpu-arm64", Version: version, Released: time.Now().Add(-time.Hour), CommandLine: "quiet", Roots: m.roots, Signers: []crypto.Signer{m.key},
		Kernel: filepath.Join(m.dir, "kernel"), Initramfs: filepath.Join(m.dir, "initramfs"),
	}
	for name, n := range map[string]int{"kernel": 1 << 20, "initramfs": m.large} {
		path := filepath.Join(m.dir, name)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if err := os.WriteFile(path, bytes.Repeat([]byte(name), n/len(name)), 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	if change != nil {
		change(&o)
	}
	path := filepath.Join(m.dir, "update-"+version)
	if err := bundler.MakeFile(path, o); err != nil {
		m.t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { f.Close() })
	return f
}

func size(t *testing.T, f *os.File) int64 {
	t.Helper()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// push sends an image and waits for the end of its task.
func (m *machine) push(f *os.File, o client.PushOptions) (*schema.Task, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	task, err := m.client.Push(ctx, f, size(m.t, f), o, nil)
	if err != nil {
		return nil, err
	}
	return m.client.Wait(ctx, task.ODataID, nil)
}

func (m *machine) get(uri string, out any) {
	m.t.Helper()
	if err := m.client.Get(context.Background(), uri, out); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) item(id string) (v schema.SoftwareInventory) {
	m.t.Helper()
	m.get(client.UpdateURI+"/FirmwareInventory/"+id, &v)
	return v
}

func (m *machine) oem() (v UpdateOEM) {
	m.t.Helper()
	var s schema.UpdateService
	m.get(client.UpdateURI, &s)
	if _, err := client.OEM(s.OEM, &v); err != nil {
		m.t.Fatal(err)
	}
	return v
}

func messages(t *schema.Task) (out []string) {
	for _, m := range t.Messages {
		out = append(out, m.MessageID[strings.LastIndexByte(m.MessageID, '.')+1:])
	}
	return out
}

func TestPush(t *testing.T) {
	m := newMachine(t, 1<<20)
	if v := m.item("slot-a"); v.Version != "1.0" || !*v.Active || *v.Staged || v.LowestSupportedVersion != "1.0" || v.SoftwareID != "backdoor-dpu-arm64" {
		t.Errorf("slot A is %+v", v)
	}
	if v := m.item("slot-b"); v.Status.State != schema.StateAbsent {
		t.Errorf("slot B is %+v", v)
	}
	task, err := m.push(m.bundle("1.1", nil), client.PushOptions{Apply: "OnReset"})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(messages(task)); got != "[TargetDetermined TransferringToComponent VerifyingAtComponent AwaitToActivate]" {
		t.Errorf("the task says %s", got)
	}
	if v := m.item("slot-b"); v.Version != "1.1" || *v.Active || !*v.Staged {
		t.Errorf("slot B is %+v", v)
	}
	if got := m.disk.State().Order(1); got[0] != slot.B {
		t.Errorf("next starts %v", got)
	}
	// The new image runs, on trial: no further update, and it says so.
	if err := m.disk.Try(slot.B); err != nil {
		t.Fatal(err)
	}
	m.start(slot.B)
	if v := m.item("slot-b"); v.Status.Health != schema.HealthWarning || len(v.Status.Conditions) != 1 {
		t.Errorf("on trial: %+v", v.Status)
	}
	var refused *client.Error
	if _, err := m.push(m.bundle("1.2", nil), client.PushOptions{}); !errors.As(err, &refused) && !strings.Contains(fmt.Sprint(err), "has not proved itself") {
		t.Errorf("an update during a trial: %v", err)
	}
	if err := m.disk.Good(slot.B); err != nil {
		t.Fatal(err)
	}
	if _, err := m.push(m.bundle("1.2", nil), client.PushOptions{Apply: "Immediate", Targets: []string{"/redfish/v1/Managers/bmc"}}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.restarts:
	case <-time.After(10 * time.Second):
		t.Error("an immediate update does not restart the machine")
	}
	if v := m.item("slot-a"); v.Version != "1.2" {
		t.Errorf("slot A is %+v", v)
	}
}

func TestStartAndActivate(t *testing.T) {
	m := newMachine(t, 1<<20)
	ctx := context.Background()
	start := func() error {
		_, err := m.client.Post(ctx, client.UpdateURI+"/Actions/UpdateService.StartUpdate", map[string]any{}, nil)
		return err
	}
	if err := start(); err == nil {
		t.Error("nothing was staged, and it was started")
	}
	if _, err := m.push(m.bundle("1.1", nil), client.PushOptions{Apply: "OnStartUpdateRequest"}); err != nil {
		t.Fatal(err)
	}
	if got := m.disk.State().Order(1); got[0] != slot.A {
		t.Errorf("a staged image is started next: %v", got)
	}
	activate := func(id string) error {
		_, err := m.client.Post(ctx, client.UpdateURI+"/Actions/UpdateService.Activate", map[string]any{"Targets": []string{client.UpdateURI + "/FirmwareInventory/" + id}}, nil)
		return err
	}
	if err := activate("recovery"); err == nil {
		t.Error("the recovery image was activated")
	}
	if err := activate("slot-b"); err != nil {
		t.Fatal(err)
	}
	if got := m.disk.State().Order(1); got[0] != slot.B {
		t.Errorf("an activated image is not started next: %v", got)
	}
	if err := activate("slot-a"); err != nil {
		t.Fatal(err)
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}
	if got := m.disk.State().Order(1); got[0] != slot.B {
		t.Errorf("after StartUpdate: %v", got)
	}
	select {
	case <-m.restarts:
	case <-time.After(10 * time.Second):
		t.Error("StartUpdate does not restart the machine")
	}
}

func TestRefusals(t *testing.T) {
	m := newMachine(t, 1<<20)
	stranger, theirs, err := bundler.Development(filepath.Join(m.dir, "stranger"))
	if err != nil {
		t.Fatal(err)
	}
	good := m.bundle("1.1", nil)
	whole, err := os.ReadFile(good.Name())
	if err != nil {
		t.Fatal(err)
	}
	file := func(b []byte) *os.File {
		f, err := os.CreateTemp(m.dir, "bad")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if _, err := f.Write(b); err != nil {
			t.Fatal(err)
		}
		return f
	}
	flipped := func(at int) *os.File {
		b := bytes.Clone(whole)
		b[at] ^= 4
		return file(b)
	}
	for name, tc := range map[string]struct {
		image *os.File
		o     client.PushOptions
		want  string // message
		words string
	}{
		"not a bundle":       {file(bytes.Repeat([]byte("PK\x03\x04"), 1000)), client.PushOptions{}, "VerificationFailed", "does not begin like one"},
		"tampered head":      {flipped(400), client.PushOptions{}, "VerificationFailed", ""},
		"tampered last byte": {flipped(len(whole) - 5000), client.PushOptions{}, "VerificationFailed", "nitramfs has the hash"},
		"truncated":          {file(whole[:len(whole)-4096]), client.PushOptions{}, "TransferFailed", "ends after"},
		"too long":           {file(append(bytes.Clone(whole), 1)), client.PushOptions{}, "VerificationFailed", "goes on behind"},
		"wrong key":          {m.bundle("1.1s", func(o *bundler.Options) { o.Roots, o.Signers = theirs, []crypto.Signer{stranger} }), client.PushOptions{}, "VerificationFailed", "key set"},
		"wrong machine":      {m.bundle("1.1m", func(o *bundler.Options) { o.Machine = "bmc-armv7" }), client.PushOptions{}, "UpdateNotApplicable", "bmc-armv7"},
		"expired": {m.bundle("1.1e", func(o *bundler.Options) {
			o.Released, o.Expires = time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour)
		}), client.PushOptions{}, "VerificationFailed", "was to be installed by"},
		"older":            {m.bundle("0.9", nil), client.PushOptions{}, "UpdateSkippedVersionTooLow", "1.0"},
		"same":             {m.bundleOfRunning(), client.PushOptions{}, "UpdateSkippedSameVersion", ""},
		"no target":        {good, client.PushOptions{Targets: []string{"/redfish/v1/Systems/system"}}, "UpdateNotApplicable", "targets"},
		"bad time":         {good, client.PushOptions{Apply: "AtMaintenanceWindowStart"}, "PropertyValueNotInList", ""},
		"go on at nothing": {good, client.PushOptions{Offset: 4096}, "TransferFailed", "there are only 0"},
	} {
		before := m.disk.State()
		_, err := m.push(tc.image, tc.o)
		if err == nil {
			t.Errorf("%s: it was installed", name)
			continue
		}
		var e *client.Error
		var te *client.TaskError
		said := []schema.Message{}
		if errors.As(err, &e) {
			said = e.Messages
		} else if errors.As(err, &te) {
			said = te.Task.Messages
		}
		found := false
		for _, msg := range said {
			found = found || strings.HasSuffix(msg.MessageID, "."+tc.want) && strings.Contains(msg.Message, tc.words)
		}
		if !found {
			t.Errorf("%s: %v %+v; want %s with %q", name, err, said, tc.want, tc.words)
		}
		after := m.disk.State()
		if after.A != before.A || after.B.Status != slot.Empty && after.B.Status != slot.Writing {
			t.Errorf("%s: the slots are %+v", name, after)
		}
	}
	// Below the epoch nothing helps, and older ones go with force.
	if _, err := m.push(m.bundle("0.9", nil), client.PushOptions{Force: true}); err != nil {
		t.Errorf("an older image with force: %v", err)
	}
	m.updater.o.Epoch = func() (uint32, error) { return 2, nil }
	if _, err := m.push(good, client.PushOptions{Force: true}); err == nil || !strings.Contains(err.Error(), "epoch") {
		t.Errorf("an image below the TPM's epoch: %v", err)
	}
	m.updater.o.Epoch = nil
	// And after all that a good one goes in.
	if _, err := m.push(good, client.PushOptions{}); err != nil {
		t.Error(err)
	}
}

// bundleOfRunning is what runs, as a file.
func (m *machine) bundleOfRunning() *os.File {
	m.t.Helper()
	b := make([]byte, m.updater.run.Size())
	if _, err := m.disk.Slot(m.updater.o.Running).ReadAt(b, 0); err != nil {
		m.t.Fatal(err)
	}
	path := filepath.Join(m.dir, "running")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		m.t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { f.Close() })
	return f
}

// breaking is an image whose sender dies on the way.
type breaking struct {
	io.ReaderAt
	at  int64
	die func()
}

func (b *breaking) ReadAt(p []byte, off int64) (int, error) {
	if off >= b.at {
		b.die()
		return 0, errors.New("the sender died")
	}
	return b.ReaderAt.ReadAt(p, off)
}

func TestResumePush(t *testing.T) {
	m := newMachine(t, 20<<20)
	f := m.bundle("1.1", nil)
	ctx, cancel := context.WithCancel(context.Background())
	if _, err := m.client.Push(ctx, &breaking{f, 20 << 20, cancel}, size(t, f), client.PushOptions{}, nil); err == nil {
		t.Fatal("an upload that broke off ends well")
	}
	var partial UpdateOEM
	for range 500 {
		if partial = m.oem(); partial.Received > 0 && m.disk.State().B.Reason != "" {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	img, err := bundle.OpenAt(f, bundle.Policy{Root: m.root})
	if err != nil {
		t.Fatal(err)
	}
	if partial.Digest != DigestOf(&img.Head) || partial.Received < 16<<20 || partial.Received > 20<<20 {
		t.Fatalf("after the upload broke off at 20 MiB: %+v", partial)
	}
	if v := m.item("slot-b"); v.Status.State != schema.StateDisabled || len(v.Status.Conditions) != 1 {
		t.Errorf("slot B is %+v", v.Status)
	}
	sent := int64(0)
	task, err := m.client.Push(context.Background(), f, size(t, f), client.PushOptions{Offset: partial.Received}, func(n int64) { sent = n })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.client.Wait(context.Background(), task.ODataID, nil); err != nil {
		t.Fatal(err)
	}
	if sent != size(t, f) || m.disk.State().B.Status != slot.Trial {
		t.Errorf("sent up to %d; slot B is %+v", sent, m.disk.State().B)
	}
	if err := m.verify(slot.B); err != nil {
		t.Error(err)
	}
}

func (m *machine) verify(n slot.Name) error {
	img, err := bundle.OpenAt(m.disk.Slot(n), bundle.Policy{Root: m.root})
	if err != nil {
		return err
	}
	return img.Verify()
}

// TestPull has a server break off twice; the pull goes on where it was.
func TestPull(t *testing.T) {
	m := newMachine(t, 1<<20)
	f := m.bundle("1.1", nil)
	cuts := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"one"`)
		if cuts < 2 {
			cuts++
			w = &cutWriter{w, 512 << 10}
		}
		http.ServeContent(w, r, "", time.Time{}, io.NewSectionReader(f, 0, size(t, f)))
	}))
	defer server.Close()
	task, err := m.client.Run(context.Background(), client.UpdateURI+"/Actions/UpdateService.SimpleUpdate", map[string]any{
		"ImageURI": server.URL + "/image", "@Redfish.OperationApplyTime": "OnStartUpdateRequest",
	}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if task.TaskState != schema.TaskCompleted || cuts != 2 || m.disk.State().B.Status != slot.Staged {
		t.Errorf("after %d cuts: task %s, slot B %+v", cuts, task.TaskState, m.disk.State().B)
	}
	if err := m.verify(slot.B); err != nil {
		t.Error(err)
	}
}

// cutWriter ends the connection after some bytes.
type cutWriter struct {
	http.ResponseWriter
	left int
}

func (c *cutWriter) Write(p []byte) (int, error) {
	if len(p) > c.left {
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func TestCancel(t *testing.T) {
	m := newMachine(t, 20<<20)
	f := m.bundle("1.1", nil)
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size(t, f)))
		_, _ = io.CopyN(w, f, 10<<20)
		w.(http.Flusher).Flush()
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	defer server.Close()
	defer close(release)
	var task schema.Task
	if _, err := m.client.Post(context.Background(), client.UpdateURI+"/Actions/UpdateService.SimpleUpdate", map[string]any{"ImageURI": server.URL}, &task); err != nil {
		t.Fatal(err)
	}
	for range 500 {
		if m.oem().Received > 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := m.client.Delete(context.Background(), task.ODataID); err != nil {
		t.Fatal(err)
	}
	if s := m.disk.State(); s.B.Status != slot.Writing || s.Order(1)[0] != slot.A {
		t.Errorf("after a cancel: %+v", s)
	}
	if _, err := m.push(m.bundle("1.2", nil), client.PushOptions{}); err != nil {
		t.Errorf("an update after a cancel: %v", err)
	}
}

// TestRolledBack shows why an image was given up.
func TestRolledBack(t *testing.T) {
	m := newMachine(t, 1<<20)
	if _, err := m.push(m.bundle("1.1", nil), client.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	for range slot.TrialBoots {
		if err := errors.Join(m.disk.Try(slot.B), m.disk.Doubt(slot.B, errors.New("the window into the host's memory does not open"))); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.disk.Try(slot.A); err != nil {
		t.Fatal(err)
	}
	v := m.item("slot-b")
	text, err := json.Marshal(v.Status)
	if err != nil || v.Status.Health != schema.HealthCritical || !strings.Contains(string(text), "the window into the host's memory does not open") {
		t.Errorf("slot B is %s, %v", text, err)
	}
	if got := m.oem().Fallback; !strings.Contains(got, "started 3 times") {
		t.Errorf("the update service says %q", got)
	}
}
