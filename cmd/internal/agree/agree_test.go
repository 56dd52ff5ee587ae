package agree

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
)

const uuid = "6f1e5c1e-0001-4a6b-9d7a-0123456789ab"

func key(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func public(k ed25519.PrivateKey) access.Key { return access.Key(k.Public().(ed25519.PublicKey)) }

// draft writes an unsigned agreement and the machine's UUID.
func draft(t *testing.T) (file string, o Options) {
	t.Helper()
	dir := t.TempDir()
	file = filepath.Join(dir, "draft.json")
	write(t, file, &access.Agreement{
		Version: access.Version, ID: "a", Host: access.Host{UUID: uuid, Name: "web7"}, Owner: access.Party{Name: "acme", Key: public(key(1))},
		Monitors: []access.Party{{Name: "ops", Key: public(key(2))}}, Rights: access.Rights{Read: true, Actions: []string{}},
		ValidFrom: time.Unix(1e9, 0), ValidUntil: time.Unix(2e9, 0),
	})
	o.UUID = filepath.Join(dir, "uuid")
	if err := os.WriteFile(o.UUID, []byte(strings.ToUpper(uuid)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, o
}

func write(t *testing.T, file string, a *access.Agreement) {
	t.Helper()
	b, err := json.Marshal(a)
	if err == nil {
		err = os.WriteFile(file, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, file string) *access.Agreement {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	a, err := access.Parse(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestRunSigns(t *testing.T) {
	file, o := draft(t)
	var said strings.Builder
	for _, answer := range []string{"", "no\n", "y\n"} {
		if err := Run(t.Context(), o, file, strings.NewReader(answer), &said); !errors.Is(err, ErrDeclined) {
			t.Errorf("Run() after the answer %q = %v; want ErrDeclined", answer, err)
		}
	}
	if a := read(t, file); a.Host.Key != nil || len(a.Signatures) > 0 {
		t.Fatal("it is signed though that was declined")
	}
	if err := Run(t.Context(), o, file, strings.NewReader("yes\n"), &said); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(said.String(), "permits     read yes, write no") {
		t.Errorf("the host is not told what it permits: %s", said.String())
	}
	a := read(t, file)
	for _, k := range []byte{1, 2} {
		if err := a.Sign(key(k)); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Verify(ed25519.PublicKey(public(key(1)))); err != nil {
		t.Errorf("with all signatures: %v", err)
	}
	if err := Run(t.Context(), o, file, strings.NewReader("yes\n"), io.Discard); err == nil || !strings.Contains(err.Error(), "signed already") {
		t.Errorf("Run() on a signed document = %v", err)
	}
}

func TestRunRefusesAnotherMachine(t *testing.T) {
	file, o := draft(t)
	if err := os.WriteFile(o.UUID, []byte("7f1e5c1e-0001-4a6b-9d7a-0123456789ab"), 0o600); err != nil {
		t.Fatal(err)
	}
	o.Yes = true
	if err := Run(t.Context(), o, file, nil, io.Discard); err == nil || !strings.Contains(err.Error(), "and this machine is") {
		t.Errorf("Run() on another machine = %v", err)
	}
	o.UUID = filepath.Join(t.TempDir(), "none")
	if err := Run(t.Context(), o, file, nil, io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Run() on a machine without a UUID = %v", err)
	}
}

// TestMailbox reads the mailbox by this process's page tables, as the agent does from outside.
func TestMailbox(t *testing.T) {
	file, o := draft(t)
	o.Mailbox, o.For = true, time.Hour
	if err := Run(t.Context(), o, file, nil, io.Discard); err == nil || !strings.Contains(err.Error(), "lacks the signature") {
		t.Errorf("Run(-mailbox) on a draft = %v", err)
	}
	a := read(t, file)
	for _, k := range []byte{1, 2} {
		if err := a.Sign(key(k)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, file, a)
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	name := "/proc/self/task/" + filepath.Base(mustReadlink(t, "/proc/self")) + "/comm"
	was, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(name, was, 0) })
	ctx, cancel := context.WithCancel(t.Context())
	said, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o, file, nil, w); w.Close() }()
	if _, err := said.Read(make([]byte, 10)); err != nil { // it says when the document is there
		t.Fatalf("%v: %v", err, <-done)
	}
	go io.Copy(io.Discard, said)
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	got, err := access.ReadMailbox(mem, access.MailboxAddress)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("ReadMailbox() = %d bytes, %v; want the document of %d", len(got), err, len(want))
	}
	if comm, err := os.ReadFile(name); err != nil || strings.TrimSpace(string(comm)) != access.MailboxComm {
		t.Errorf("the process is called %q, %v; want %q", comm, err, access.MailboxComm)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := access.ReadMailbox(mem, access.MailboxAddress); !errors.Is(err, access.ErrNoMailbox) {
		t.Errorf("ReadMailbox() after the end = %v; want ErrNoMailbox", err)
	}
}

func mustReadlink(t *testing.T, path string) string {
	t.Helper()
	s, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
