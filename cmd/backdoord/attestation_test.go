package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/attest/attesttest"
)

func started(version string) attest.Log {
	return attest.Image{Manifest: []byte(`{"product":"backdoor","version":"` + version + `"}`)}.Events()
}

func extend(t *testing.T, tpm *attest.TPM, log attest.Log) {
	t.Helper()
	for _, e := range log {
		if err := tpm.Extend(e); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAttestation has workers come and go: what they measure and what they log stays the same thing.
func TestAttestation(t *testing.T) {
	tpm, _ := attesttest.Start(t, t.TempDir())
	path := filepath.Join(t.TempDir(), "sub", "eventlog")
	start := started("1.0")
	extend(t, tpm, start)
	inStep := func(a *attestation, events int) {
		t.Helper()
		b, err := a.EventLog()
		if err != nil {
			t.Fatal(err)
		}
		log, err := attest.ParseLog(b)
		if err != nil || len(log) != events {
			t.Fatalf("the log has %d events, %v; want %d", len(log), err, events)
		}
		for _, pcr := range []int{attest.ImagePCR, attest.IdentityPCR} {
			if d, err := tpm.PCR(pcr); err != nil || d != log.Replay(pcr) {
				t.Errorf("PCR %d = %v, %v; the log replays to %v", pcr, d, err, log.Replay(pcr))
			}
		}
	}
	a, err := newAttestation(tpm, start, path)
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := a.log.Image(); !ok {
		t.Errorf("Image() = %v, %v", got, ok)
	}
	key := attest.Digest{1}
	says := claims{shown: func() attest.Digest { return key }}
	a.claims.Store(&says)
	for range 2 { // the second time it is no news
		if err := a.identify(key); err != nil {
			t.Fatal(err)
		}
	}
	inStep(a, 2)

	if a, err = newAttestation(tpm, start, path); err != nil { // the next worker
		t.Fatal(err)
	}
	a.claims.Store(&says)
	if err := a.identify(key); err != nil {
		t.Fatal(err)
	}
	inStep(a, 2)

	key = attest.Digest{2} // the certificate is replaced: the next quote says so
	e := attest.Evidence{Nonce: make([]byte, 32), PeerKey: key}
	if e.Quote, err = a.Quote(e.Nonce, attest.ImagePCR, attest.IdentityPCR); err != nil {
		t.Fatal(err)
	}
	inStep(a, 3)
	if e.AK, err = tpm.AttestationKey(); err != nil {
		t.Fatal(err)
	}
	if e.Log, err = a.EventLog(); err != nil {
		t.Fatal(err)
	}
	if _, err := attest.Verify(e, attest.Policy{Keys: []attest.Digest{e.AK.Fingerprint()}}); err != nil {
		t.Errorf("Verify() = %v", err)
	}

	// The agreement that holds is measured, and a quote names it.
	agreement := attest.Digest{7}
	says.agreed = func() attest.Digest { return agreement }
	for _, want := range []attest.Digest{{7}, {8}} {
		agreement = want
		if e.Quote, err = a.Quote(e.Nonce, attest.ImagePCR, attest.IdentityPCR); err != nil {
			t.Fatal(err)
		}
		if e.Log, err = a.EventLog(); err != nil {
			t.Fatal(err)
		}
		policy := attest.Policy{Keys: []attest.Digest{e.AK.Fingerprint()}, Agreement: want}
		if _, err := attest.Verify(e, policy); err != nil {
			t.Errorf("Verify() with agreement %v = %v", want, err)
		}
		policy.Agreement = attest.Digest{9}
		var differs *attest.MismatchError
		if _, err := attest.Verify(e, policy); !errors.As(err, &differs) || differs.What != "access agreement" {
			t.Errorf("Verify() with another agreement = %v", err)
		}
	}
	inStep(a, 5)

	// A worker that ends after it has logged and before it has measured.
	log := append(a.log[:len(a.log):len(a.log)], attest.TLSEvent(attest.Digest{3}))
	b, err := log.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if a, err = newAttestation(tpm, start, path); err != nil {
		t.Fatal(err)
	}
	inStep(a, 6)
}

func TestKeySeal(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(t.TempDir(), "keys.sealed")
	old, next := started("1.0"), started("2.0")
	pcr := func(l attest.Log) attest.Digest { return l.Replay(attest.ImagePCR) }
	to := []attest.Digest{pcr(old)}
	images := func() []attest.Digest { return append([]attest.Digest(nil), to...) }

	tpm, off := attesttest.Start(t, dir)
	extend(t, tpm, old)
	k, err := newKeySeal(tpm, file, images)
	if err != nil {
		t.Fatal(err)
	}
	secret := []byte("-----BEGIN PRIVATE KEY-----")
	kept, err := k.Seal(secret)
	if err != nil || strings.Contains(string(kept), "PRIVATE KEY") {
		t.Fatalf("Seal() = %q, %v", kept, err)
	}
	if got, was, err := k.Open([]byte("a key from before")); err != nil || was || string(got) != "a key from before" {
		t.Errorf("Open(plain) = %q, %v, %v", got, was, err)
	}
	bad := append([]byte(nil), kept...)
	bad[len(bad)-1] ^= 1
	if got, _, err := k.Open(bad); err == nil {
		t.Errorf("Open(damaged) = %q", got)
	}

	// The next image starts without the keys having been sealed to it.
	off()
	tpm, off = attesttest.Start(t, dir)
	extend(t, tpm, next)
	if _, err := newKeySeal(tpm, file, images); !errors.Is(err, attest.ErrWrongImage) {
		t.Fatalf("newKeySeal() in another image = %v; want ErrWrongImage", err)
	}
	if _, was, err := (noKey{attest.ErrWrongImage}).Open(kept); !was || err == nil {
		t.Errorf("noKey.Open(sealed) = %v, %v", was, err)
	}

	// The old one starts again, an update comes, the keys are sealed to both, and the next image has them.
	off()
	tpm, off = attesttest.Start(t, dir)
	extend(t, tpm, old)
	if k, err = newKeySeal(tpm, file, images); err != nil {
		t.Fatal(err)
	}
	to = append(to, pcr(next), pcr(next))
	if err := k.refresh(); err != nil {
		t.Fatal(err)
	}
	off()
	tpm, _ = attesttest.Start(t, dir)
	extend(t, tpm, next)
	if k, err = newKeySeal(tpm, file, images); err != nil {
		t.Fatalf("newKeySeal() in the next image = %v", err)
	}
	if got, was, err := k.Open(kept); err != nil || !was || string(got) != string(secret) {
		t.Errorf("Open() in the next image = %q, %v, %v", got, was, err)
	}
}

// TestAnchor ties the lock of the access agreement to a real TPM, and then takes away or exchanges what it rests on, as somebody with the
// disk in his hands could.
func TestAnchor(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	keys, lockFile := filepath.Join(state, "keys.sealed"), filepath.Join(state, "agreement.lock")
	owner, monitor := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)), ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32))
	public := func(k ed25519.PrivateKey) access.Key { return access.Key(k.Public().(ed25519.PublicKey)) }
	const host = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
	a := &access.Agreement{
		Version: access.Version, ID: "anchored", Host: access.Host{UUID: host}, Owner: access.Party{Name: "owner", Key: public(owner)},
		Monitors: []access.Party{{Name: "monitor", Key: public(monitor)}}, Rights: access.Rights{Read: true, Actions: []string{}},
		ValidFrom: time.Now().Add(-time.Hour).UTC(), ValidUntil: time.Now().Add(24 * time.Hour).UTC(),
	}
	for _, k := range []ed25519.PrivateKey{owner, monitor} {
		if err := a.Sign(k); err != nil {
			t.Fatal(err)
		}
	}
	first := started("1.0")
	off := func() {}
	// start is a start of the machine with one image, whose sealed keys are for the first.
	start := func(image attest.Log, key ed25519.PublicKey) (*access.Lock, error) {
		t.Helper()
		off()
		var tpm *attest.TPM
		tpm, off = attesttest.Start(t, dir)
		extend(t, tpm, image)
		tr := newTrust(state, func() []attest.Digest { return []attest.Digest{first.Replay(attest.ImagePCR)} }, log)
		tr.path, tr.loaded = filepath.Join(t.TempDir(), "eventlog"), image
		if err := tr.open(tpm); err != nil {
			t.Fatal(err)
		}
		close(tr.opened)
		lock, err := access.OpenLock(lockFile, key, nil)
		if err != nil {
			t.Fatal(err)
		}
		lock.Await()
		return lock, lock.Anchor(tr.anchor(key))
	}
	mine := owner.Public().(ed25519.PublicKey)
	lock, err := start(first, mine)
	if err == nil {
		err = lock.Offer(a)
	}
	if err == nil {
		err = lock.Grant(host).Permit(access.Read)
	}
	if err != nil {
		t.Fatal(err)
	}
	if lock, err = start(first, mine); err != nil || lock.Grant(host).Permit(access.Read) != nil {
		t.Fatalf("after a restart: %v, %v", err, lock.Grant(host).Permit(access.Read))
	}

	good := map[string][]byte{}
	for _, f := range []string{keys, lockFile} {
		if good[f], err = os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name  string
		do    func() error
		image attest.Log
		owner ed25519.PublicKey
		want  string
	}{
		{"the lock is taken away", func() error { return os.Remove(lockFile) }, first, mine, "not the file that the TPM knows"},
		{"the sealed key is taken away", func() error { return os.Remove(keys) }, first, mine, attest.ErrNotOurs.Error()},
		{"the lock and the sealed key are", func() error { return errors.Join(os.Remove(lockFile), os.Remove(keys)) }, first, mine, attest.ErrNotOurs.Error()},
		{"the lock and the owner are exchanged", func() error { return os.Remove(lockFile) }, first, monitor.Public().(ed25519.PublicKey), attest.ErrNotOurs.Error()},
		{"the sealed key is spoiled", func() error { return os.WriteFile(keys, []byte("{}"), 0o600) }, first, mine, "a key that this image cannot open"},
		{"another image runs", func() error { return nil }, started("0.9"), mine, "a key that this image cannot open"},
	} {
		if err := tt.do(); err != nil {
			t.Fatal(err)
		}
		lock, err := start(tt.image, tt.owner)
		if !errors.Is(err, access.ErrDenied) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Anchor() = %v; want it to say %q", tt.name, err, tt.want)
		}
		if err := lock.Offer(a); err == nil {
			t.Errorf("%s: the agreement is taken", tt.name)
		}
		if err := lock.Grant(host).Permit(access.Read); !errors.Is(err, access.ErrDenied) {
			t.Errorf("%s: Permit() = %v", tt.name, err)
		}
		for f, b := range good {
			if err := os.WriteFile(f, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if lock, err = start(first, mine); err != nil || lock.Grant(host).Permit(access.Read) != nil {
		t.Errorf("with everything back: %v, %v", err, lock.Grant(host).Permit(access.Read))
	}
}

// TestCertify keeps the owner's certificate for the attestation key over restarts, and shows none that is another TPM's.
func TestCertify(t *testing.T) {
	dir := t.TempDir()
	trustOf := func(tpm *attest.TPM) *trust {
		t.Helper()
		tr := newTrust(dir, nil, slog.New(slog.DiscardHandler))
		tr.tpm = tpm
		var err error
		if tr.id, err = tr.identity(tpm); err != nil {
			t.Fatal(err)
		}
		close(tr.known)
		return tr
	}
	issuer := func(tr *trust) string {
		t.Helper()
		id, err := tr.Identity()
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(id.Certificates[0])
		if err != nil {
			t.Fatal(err)
		}
		return c.Issuer.CommonName
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "owner"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	tpm, _ := attesttest.Start(t, t.TempDir())
	ak, err := tpm.AttestationKey()
	if err != nil {
		t.Fatal(err)
	}
	der, err := attest.Certify(ak, "dpu", ca, key, now, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	tr := trustOf(tpm)
	if got := issuer(tr); !strings.HasPrefix(got, "TPM attestation key") {
		t.Errorf("before: issued by %q; want by itself", got)
	}
	if err := tr.Certify([][]byte{der}); err != nil {
		t.Fatal(err)
	}
	for name, tr := range map[string]*trust{"at once": tr, "after a restart": trustOf(tpm)} {
		if got := issuer(tr); got != "owner" {
			t.Errorf("%s: issued by %q; want by the owner", name, got)
		}
	}
	other, _ := attesttest.Start(t, t.TempDir())
	if got := issuer(trustOf(other)); got == "owner" {
		t.Error("another TPM is shown with the certificate")
	}
	if err := os.WriteFile(tr.chain, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := issuer(trustOf(tpm)); got == "owner" || got == "" {
		t.Errorf("a damaged file: issued by %q; want by itself", got)
	}
}
