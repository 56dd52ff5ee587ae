package attest_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/attest/attesttest"
)

func image(version, kernel string) attest.Image {
	epoch := "3"
	return attest.Image{
		Manifest: []byte(`{"product":"backdoor","version":"` + version + `","epoch":` + epoch + `}`),
		Parts: []attest.Part{
			{Name: "kernel", SHA256: sha256.Sum256([]byte(kernel))},
			{Name: "initrd", SHA256: sha256.Sum256([]byte("initrd"))},
			{Name: "cmdline", SHA256: sha256.Sum256([]byte("quiet"))},
		},
	}
}

// run measures what a loader and then an agent would, and returns the log.
func run(t *testing.T, tpm *attest.TPM, i attest.Image, spki attest.Digest) attest.Log {
	t.Helper()
	log := append(i.Events(), attest.TLSEvent(spki))
	for _, e := range log {
		if err := tpm.Extend(e); err != nil {
			t.Fatal(err)
		}
	}
	return log
}

func evidence(t *testing.T, tpm *attest.TPM, log attest.Log, spki attest.Digest) attest.Evidence {
	t.Helper()
	e := attest.Evidence{Nonce: make([]byte, 32), PeerKey: spki}
	rand.Read(e.Nonce)
	var err error
	if e.AK, err = tpm.AttestationKey(); err != nil {
		t.Fatal(err)
	}
	if e.Quote, err = tpm.Quote(e.Nonce, attest.ImagePCR, attest.IdentityPCR); err != nil {
		t.Fatal(err)
	}
	wire, err := e.Quote.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	if e.Quote, err = attest.ParseQuote(wire); err != nil {
		t.Fatal(err)
	}
	if e.Log, err = log.MarshalBinary(); err != nil {
		t.Fatal(err)
	}
	return e
}

// TestVerify has a TPM attest, and then changes one thing at a time: each must be found and named.
func TestVerify(t *testing.T) {
	tpm, _ := attesttest.Start(t, t.TempDir())
	other, _ := attesttest.Start(t, t.TempDir())
	spki := attest.Digest{1, 2, 3}
	good := image("1.0", "kernel")
	log := run(t, tpm, good, spki)
	run(t, other, image("6.6.6", "evil"), spki)
	e := evidence(t, tpm, log, spki)
	p := attest.Policy{Keys: []attest.Digest{e.AK.Fingerprint()}, Images: []attest.Image{image("0.9", "old"), good}, Epoch: 3}

	r, err := attest.Verify(e, p)
	if err != nil {
		t.Fatalf("Verify(what runs) = %v", err)
	}
	if r.Version != "1.0" || r.Epoch != 3 || r.Resets == 0 || len(r.Checks) < 6 {
		t.Errorf("Verify(what runs) = %+v", r)
	}

	for _, tt := range []struct {
		name   string
		change func(*attest.Evidence, *attest.Policy)
		want   string
	}{
		{"another nonce", func(e *attest.Evidence, _ *attest.Policy) { e.Nonce = []byte("another nonce, and long enough") }, "nonce"},
		{"short nonce", func(e *attest.Evidence, _ *attest.Policy) { e.Nonce = e.Nonce[:4] }, "can be guessed"},
		{"no key trusted", func(_ *attest.Evidence, p *attest.Policy) { p.Keys = nil }, "trusts no key"},
		{"another key trusted", func(_ *attest.Evidence, p *attest.Policy) { p.Keys = []attest.Digest{{9}} }, "attestation key"},
		{"another TPM's quote", func(e *attest.Evidence, _ *attest.Policy) {
			q, err := other.Quote(e.Nonce, attest.ImagePCR, attest.IdentityPCR)
			if err != nil {
				t.Fatal(err)
			}
			e.Quote = q
		}, "quote signature"},
		{"a quote of other PCRs", func(e *attest.Evidence, _ *attest.Policy) {
			q, err := tpm.Quote(e.Nonce, attest.IdentityPCR)
			if err != nil {
				t.Fatal(err)
			}
			e.Quote = q
		}, "PCR 11 among them"},
		{"a statement changed", func(e *attest.Evidence, _ *attest.Policy) {
			e.Quote.Attested = append([]byte(nil), e.Quote.Attested...)
			e.Quote.Attested[len(e.Quote.Attested)-1] ^= 1
		}, "quote signature"},
		{"an event left out", func(e *attest.Evidence, _ *attest.Policy) { e.Log = marshal(t, log[1:]) }, "event log"},
		{"an event's digest changed", func(e *attest.Evidence, _ *attest.Policy) {
			l := append(attest.Log(nil), log...)
			l[1].Digest[0] ^= 1
			e.Log = marshal(t, l)
		}, "event log"},
		{"the manifest's text changed", func(e *attest.Evidence, _ *attest.Policy) {
			l := append(attest.Log(nil), log...)
			l[0].Data = []byte(strings.Replace(string(l[0].Data), "1.0", "2.0", 1))
			e.Log = marshal(t, l)
		}, "without a measured manifest"},
		{"another version runs", func(_ *attest.Evidence, p *attest.Policy) { p.Images = []attest.Image{image("2.0", "kernel")} }, "backdoor 1.0, epoch 3"},
		{"another kernel runs", func(_ *attest.Evidence, p *attest.Policy) { p.Images = []attest.Image{image("1.0", "other")} }, "image part kernel"},
		{"epoch too low", func(_ *attest.Evidence, p *attest.Policy) { p.Epoch = 4 }, "epoch"},
		{"somebody in between", func(e *attest.Evidence, _ *attest.Policy) { e.PeerKey = attest.Digest{7} }, "in between"},
		{"no log", func(e *attest.Evidence, _ *attest.Policy) { e.Log = nil }, "event log"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, p := e, p
			tt.change(&e, &p)
			if _, err := attest.Verify(e, p); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Verify() = %v; want an error with %q", err, tt.want)
			}
		})
	}
}

func marshal(t *testing.T, l attest.Log) []byte {
	t.Helper()
	b, err := l.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestChallenge(t *testing.T) {
	tpm, _ := attesttest.Start(t, t.TempDir())
	other, _ := attesttest.Start(t, t.TempDir())
	key := func(f func() (attest.Key, error)) attest.Key {
		t.Helper()
		k, err := f()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	ek, ak, otherAK := key(tpm.EndorsementKey), key(tpm.AttestationKey), key(other.AttestationKey)
	if ek.Fingerprint() == ak.Fingerprint() || ak.Fingerprint() == otherAK.Fingerprint() {
		t.Fatal("keys that must differ do not")
	}
	if again := key(tpm.AttestationKey); again.Fingerprint() != ak.Fingerprint() {
		t.Error("the attestation key is another each time")
	}
	pub, err := attest.ParsePublicKey(ek.PEM())
	if err != nil {
		t.Fatal(err)
	}
	if ek, err = attest.EndorsementKey(pub); err != nil {
		t.Fatal(err)
	}
	c, answer, err := attest.NewChallenge(ek, ak)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tpm.Activate(c); err != nil || string(got) != string(answer) {
		t.Errorf("Activate() = %x, %v; want %x", got, err, answer)
	}
	if got, err := other.Activate(c); err == nil {
		t.Errorf("another TPM answers the challenge: %x", got)
	}
	// The right endorsement key beside another's attestation key: no answer.
	c, _, err = attest.NewChallenge(ek, otherAK)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tpm.Activate(c); err == nil {
		t.Errorf("Activate() for another TPM's attestation key = %x", got)
	}
}

func TestCertificate(t *testing.T) {
	tpm, _ := attesttest.Start(t, t.TempDir())
	now := time.Now()
	der, err := tpm.Certificate(now)
	if err != nil {
		t.Fatal(err)
	}
	own, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := own.CheckSignature(own.SignatureAlgorithm, own.RawTBSCertificate, own.Signature); err != nil {
		t.Errorf("the attestation key's certificate is not signed by it: %v", err)
	}

	// An owner's authority certifies the key; the chain is what a verifier believes.
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fleet"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	if ca, err = x509.ParseCertificate(caDER); err != nil {
		t.Fatal(err)
	}
	ak, err := tpm.AttestationKey()
	if err != nil {
		t.Fatal(err)
	}
	certified, err := attest.Certify(ak, "dpu-17", ca, caKey, now, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := x509.ParseCertificate(certified); err != nil || c.NotAfter.After(ca.NotAfter) || c.Subject.CommonName != "dpu-17" || c.IsCA {
		t.Errorf("Certify() = %+v, %v", c, err)
	}
	if _, err := attest.Certify(ak, "late", ca, caKey, ca.NotAfter, time.Hour); err == nil {
		t.Error("Certify() by an authority that has ended: no error")
	}
	if _, err := attest.Certify(ak, "nobody", own, caKey, now, time.Hour); err == nil {
		t.Error("Certify() by who is no authority: no error")
	}
	// A certificate of the same authority for the same key, but for something else, such as a server.
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "dpu-17"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter}
	server, err := x509.CreateCertificate(rand.Reader, leaf, ca, own.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	spki := attest.Digest{5}
	log := run(t, tpm, image("1.0", "kernel"), spki)
	e := evidence(t, tpm, log, spki)
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	p := attest.Policy{Roots: roots}

	e.Certificates = [][]byte{certified}
	if r, err := attest.Verify(e, p); err != nil || !strings.Contains(r.Checks[0].Got, "certified by fleet") {
		t.Errorf("Verify(certified) = %+v, %v", r, err)
	}
	e.Certificates = [][]byte{server}
	if _, err := attest.Verify(e, p); err == nil || !strings.Contains(err.Error(), "not one for attestation") {
		t.Errorf("Verify(certified for something else) = %v", err)
	}
	e.Certificates = [][]byte{der}
	if _, err := attest.Verify(e, p); err == nil || !strings.Contains(err.Error(), "certificate chain") {
		t.Errorf("Verify(self-signed) = %v", err)
	}
	e.Certificates = nil
	if _, err := attest.Verify(e, p); err == nil || !strings.Contains(err.Error(), "no certificate") {
		t.Errorf("Verify(no certificate) = %v", err)
	}
	e.Certificates = [][]byte{certified}
	p.Now = now.Add(2 * time.Hour)
	if _, err := attest.Verify(e, p); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("Verify(expired) = %v", err)
	}
}

// TestEpoch raises the epoch over resets of the machine.
func TestEpoch(t *testing.T) {
	dir := t.TempDir()
	tpm, off := attesttest.Start(t, dir)
	want := func(v uint64) {
		t.Helper()
		if got, err := tpm.Epoch(); err != nil || got != v {
			t.Fatalf("Epoch() = %d, %v; want %d", got, err, v)
		}
	}
	want(0)
	if err := tpm.RaiseEpoch(3); err != nil {
		t.Fatal(err)
	}
	want(3)
	if err := tpm.RaiseEpoch(2); err != nil {
		t.Errorf("RaiseEpoch(lower) = %v", err)
	}
	want(3)
	if err := tpm.RaiseEpoch(1 << 40); err == nil {
		t.Error("RaiseEpoch(2^40) = nil")
	}
	if err := tpm.LockEpoch(); err != nil {
		t.Fatal(err)
	}
	if err := tpm.RaiseEpoch(4); err == nil {
		t.Error("RaiseEpoch() after LockEpoch() = nil")
	}
	want(3)
	off()
	tpm, _ = attesttest.Start(t, dir)
	want(3)
	if err := tpm.RaiseEpoch(4); err != nil {
		t.Errorf("RaiseEpoch() after a reset = %v", err)
	}
	want(4)
}

func TestSeal(t *testing.T) {
	dir := t.TempDir()
	tpm, off := attesttest.Start(t, dir)
	old, new := image("1.0", "kernel"), image("2.0", "kernel")
	secret := []byte("what opens the agent's keys.....")
	run(t, tpm, old, attest.Digest{})
	sealed, err := tpm.Seal(secret, old.PCR())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tpm.Unseal(sealed); err != nil || string(got) != string(secret) {
		t.Fatalf("Unseal() = %q, %v", got, err)
	}
	both, err := tpm.Seal(secret, old.PCR(), new.PCR()) // an update is about to be tried
	if err != nil {
		t.Fatal(err)
	}
	other, _ := attesttest.Start(t, t.TempDir())
	if got, err := other.Unseal(sealed); err == nil {
		t.Errorf("another TPM unseals %q", got)
	}

	off()
	tpm, off = attesttest.Start(t, dir)
	run(t, tpm, new, attest.Digest{})
	if got, err := tpm.Unseal(sealed); !errors.Is(err, attest.ErrWrongImage) {
		t.Errorf("Unseal(sealed to the old image) in the new one = %q, %v; want ErrWrongImage", got, err)
	}
	if got, err := tpm.Unseal(both); err != nil || string(got) != string(secret) {
		t.Errorf("Unseal(sealed to both) in the new image = %q, %v", got, err)
	}

	off()
	tpm, _ = attesttest.Start(t, dir)
	if got, err := tpm.Unseal(both); !errors.Is(err, attest.ErrWrongImage) {
		t.Errorf("Unseal() before anything was measured = %q, %v; want ErrWrongImage", got, err)
	}
	run(t, tpm, image("2.0", "evil"), attest.Digest{})
	if got, err := tpm.Unseal(both); !errors.Is(err, attest.ErrWrongImage) {
		t.Errorf("Unseal() in an image with another kernel = %q, %v; want ErrWrongImage", got, err)
	}
}

func TestProperties(t *testing.T) {
	tpm, _ := attesttest.Start(t, t.TempDir())
	p, err := tpm.Properties()
	if err != nil || p.Family != "2.0" || len(p.Manufacturer) != 4 {
		t.Errorf("Properties() = %+v, %v", p, err)
	}
	i := image("1.0", "kernel")
	run(t, tpm, i, attest.Digest{})
	if got, err := tpm.PCR(attest.ImagePCR); err != nil || got != i.PCR() {
		t.Errorf("PCR() = %v, %v; want what Image.PCR says, %v", got, err, i.PCR())
	}
	if _, err := tpm.Quote(make([]byte, attest.MaxNonce+1), 11); err == nil {
		t.Error("Quote() with a nonce that is too long = nil")
	}
	if _, err := tpm.Quote(nil, attest.PCRs); err == nil {
		t.Error("Quote() of a PCR that is not there = nil")
	}
}
