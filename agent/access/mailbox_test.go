package access

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestHostTakesPart(t *testing.T) {
	owner, ops, host, stranger := key(1), key(2), key(3), key(4)
	made := func(change func(*Agreement), keys ...ed25519.PrivateKey) *Agreement {
		t.Helper()
		a := sample()
		change(a)
		for _, k := range keys {
			if err := a.Sign(k); err != nil {
				t.Fatal(err)
			}
		}
		return a
	}
	takesPart := func(a *Agreement) { a.Host.Key = pub(host) }
	public := ed25519.PublicKey(pub(owner))
	whole := made(takesPart, host, owner, ops)
	if err := whole.Verify(public); err != nil {
		t.Fatal(err)
	}
	without := made(takesPart, owner, ops)
	if err := without.Verify(public); !errors.Is(err, ErrUnsigned) {
		t.Errorf("Verify() without the host's signature = %v; want ErrUnsigned", err)
	}
	if got, want := without.Unsigned(), []string{`host "` + without.Host.Name + `"`}; !slices.Equal(got, want) {
		t.Errorf("Unsigned() = %q; want %q", got, want)
	}
	// The host's key has no say in anything that comes later.
	now := func() time.Time { return whole.ValidFrom.Add(time.Hour) }
	lock, err := OpenLock(filepath.Join(t.TempDir(), "lock"), public, now)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Offer(whole); err != nil {
		t.Fatal(err)
	}
	order := &Order{Version: Version, Agreement: digest(t, whole), Sequence: 1, Order: Pause, Issued: whole.ValidFrom}
	if err := order.Sign(host); err != nil {
		t.Fatal(err)
	}
	if err := lock.Obey(order); !errors.Is(err, ErrUnsigned) {
		t.Errorf("Obey(the host's pause) = %v; want ErrUnsigned", err)
	}
	next := func(a *Agreement) { a.ID, a.Succeeds = "next", digest(t, whole) } // it names no host's key
	if err := lock.Offer(made(next, owner, host)); !errors.Is(err, ErrUnsigned) {
		t.Errorf("Offer(with the host in a monitor's place) = %v; want ErrUnsigned", err)
	}
	if err := lock.Offer(made(next, owner, ops)); err != nil {
		t.Errorf("a successor needs the host: %v", err)
	}
	// Nobody has two voices.
	twice := sample()
	twice.Host.Key = pub(ops)
	if err := twice.Sign(owner); !errors.Is(err, ErrInvalid) {
		t.Errorf("Sign() where the host has a monitor's key = %v; want ErrInvalid", err)
	}
	if err := sample().Sign(stranger); err == nil {
		t.Error("a stranger signs")
	}
}

// process is memory that begins at an address.
type process struct {
	at int64
	b  []byte
}

func (p process) ReadAt(b []byte, at int64) (int, error) {
	return bytes.NewReader(p.b).ReadAt(b, at-p.at)
}

func TestMailbox(t *testing.T) {
	doc := []byte(`{"version": 1}`)
	box, err := Mailbox(doc)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadMailbox(process{MailboxAddress, box}, MailboxAddress)
	if err != nil || !bytes.Equal(got, doc) {
		t.Fatalf("ReadMailbox() = %q, %v; want %q", got, err, doc)
	}
	for i := range box {
		torn := slices.Clone(box)
		torn[i] ^= 0x10
		if _, err := ReadMailbox(process{MailboxAddress, torn}, MailboxAddress); err == nil {
			t.Errorf("ReadMailbox() takes a document with byte %d changed", i)
		}
	}
	for _, short := range []int{0, 10, len(box) - 1} {
		if _, err := ReadMailbox(process{MailboxAddress, box[:short]}, MailboxAddress); !errors.Is(err, ErrNoMailbox) {
			t.Errorf("ReadMailbox() of %d bytes = %v; want ErrNoMailbox", short, err)
		}
	}
	for _, n := range []int{0, maxDocument + 1} {
		if _, err := Mailbox(make([]byte, n)); !errors.Is(err, ErrInvalid) {
			t.Errorf("Mailbox(%d bytes) = %v; want ErrInvalid", n, err)
		}
	}
}

// TestWriteText: nothing that others have chosen reaches a terminal as it is.
func TestWriteText(t *testing.T) {
	a := sample()
	a.Host.Name, a.Owner.Name, a.Monitors[0].Name = "a\x1b[2J", "b\x1b[2J\nhost", "c\x9b"
	a.Protected = []Protected{{Comm: "d\x1b"}}
	var b strings.Builder
	if err := a.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	if i := strings.IndexFunc(b.String(), func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }); i >= 0 {
		t.Errorf("the text has %q", b.String()[i:])
	}
}

func FuzzMailbox(f *testing.F) {
	raw, err := json.Marshal(sample())
	if err != nil {
		f.Fatal(err)
	}
	box, err := Mailbox(raw)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(box)
	f.Fuzz(func(t *testing.T, b []byte) {
		doc, err := ReadMailbox(process{MailboxAddress, b}, MailboxAddress)
		if (err == nil) != (doc != nil) {
			t.Fatalf("ReadMailbox() = %d bytes, %v", len(doc), err)
		}
		if doc == nil {
			return
		}
		a, err := Parse(bytes.NewReader(doc))
		if err != nil {
			return
		}
		var text strings.Builder
		if err := a.WriteText(&text); err != nil {
			t.Fatal(err)
		}
	})
}
