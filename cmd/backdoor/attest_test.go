package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
)

// TestAttestUnattested has an agent without a TPM: it is neither believed nor blamed, and asked nothing if a proof is wanted first.
func TestAttestUnattested(t *testing.T) {
	b := newBench(t)
	if code, _, errs := b.run("login -host $URL -fingerprint $PIN -context dpu -password-file $DIR/initial -new-password-file $DIR/new -save-password", ""); code != exitOK {
		t.Fatalf("login: exit %d: %s", code, errs)
	}
	code, out, errs := b.run("attest", "")
	if code != exitUnsure || !strings.Contains(out, "not attested: attest: the agent is unattested") {
		t.Errorf("attest: exit %d, %q, %q; want %d", code, out, errs, exitUnsure)
	}
	b.write("proof.json", `{"endorsementKeys":["`+strings.Repeat("ab", 32)+`"],"epoch":3}`)
	code, out, errs = b.run("status -attested $DIR/proof.json", "")
	if code == exitOK || out != "" || !strings.Contains(errs, "unattested") {
		t.Errorf("status of an agent that must attest: exit %d, %q, %q", code, out, errs)
	}
	for name, text := range map[string]string{
		"trusts nobody": `{"epoch":3}`,
		"unknown field": `{"endorsementKey":"x"}`,
		"short digest":  `{"endorsementKeys":["abcd"]}`,
		"no bundle":     `{"endorsementKeys":["` + strings.Repeat("ab", 32) + `"],"bundles":["absent.bundle"]}`,
	} {
		b.write("proof.json", text)
		if code, out, _ := b.run("status -attested $DIR/proof.json", ""); code == exitOK || out != "" {
			t.Errorf("%s: exit %d, %q; want an error", name, code, out)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	b.write("ca.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	for name, c := range map[string]struct {
		ca    bool
		until time.Duration
	}{"leaf.pem": {false, time.Hour}, "ended.pem": {true, -time.Minute}, "ca.pem": {true, time.Hour}} {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(c.until),
			IsCA: c.ca, BasicConstraintsValid: true,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		b.write(name, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	}
	good := strings.Repeat("ab", 32)
	for _, tt := range []struct {
		args, want string
		code       int
	}{
		{"-ak-ca $DIR/ca.pem -ak-ca-key $DIR/ca.key", "say which TPM it is", exitUsage},
		{"-ek " + good, "-ak-ca and -ak-ca-key", exitUsage},
		{"-ek abc -ak-ca $DIR/ca.pem -ak-ca-key $DIR/ca.key", "-ek abc: a digest has 64", exitUsage},
		{"-ek " + good + " -ak-ca $DIR/ca.pem -ak-ca-key $DIR/ca.key -days 0", "at least one", exitUsage},
		{"-ek " + good + " -ak-ca $DIR/absent.pem -ak-ca-key $DIR/ca.key", "absent.pem", exitError},
		{"-ek " + good + " -ak-ca $DIR/leaf.pem -ak-ca-key $DIR/ca.key", "not an authority's certificate", exitError},
		{"-ek " + good + " -ak-ca $DIR/ended.pem -ak-ca-key $DIR/ca.key", "ended on", exitError},
		{"-ek " + good + " -ak-ca $DIR/ca.pem -ak-ca-key $DIR/ca.key", "unattested", exitUnsure},
	} {
		if code, out, errs := b.run("enroll "+tt.args, ""); code != tt.code || !strings.Contains(errs, tt.want) || out != "" {
			t.Errorf("enroll %s: exit %d, %q, %q; want %d and %q", tt.args, code, out, errs, tt.code, tt.want)
		}
	}
	if code, _, errs := b.run("attest -ek abc", ""); code != exitUsage {
		t.Errorf("attest -ek abc: exit %d, %q; want %d", code, errs, exitUsage)
	}
}

func TestAttestText(t *testing.T) {
	ek, ak := attest.Digest{1}, attest.Digest{2}
	a := attestAnswer{
		Attested: true, Product: "backdoor", Version: "1.4.0", Epoch: 3, Resets: 7, EndorsementKey: &ek, AttestationKey: &ak,
		Checks: []attestCheck{{What: "nonce", OK: true, Found: "fresh"}},
	}
	text := func(colour, trusts bool) string {
		var b bytes.Buffer
		if err := attestText(&b, a, trusts, colour); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	if got, want := text(false, true), "ok       nonce            fresh\nattested: backdoor 1.4.0, epoch 3, reset 7 times\n"; got != want {
		t.Errorf("text = %q; want %q", got, want)
	}
	if got := text(true, true); !strings.Contains(got, "\x1b[32mattested\x1b[0m") {
		t.Errorf("in colour: %q; want green", got)
	}
	a.Attested = false
	a.Checks = append(a.Checks, attestCheck{What: "image", Error: "image: got 2.0\x1b[2J; want 1.4"})
	got := text(false, false)
	for _, want := range []string{"DIFFERS  image", "not attested", ek.String(), ak.String()} {
		if !strings.Contains(got, want) {
			t.Errorf("text = %q; want %q in it", got, want)
		}
	}
	if strings.Contains(got, "\x1b[2J") {
		t.Errorf("a control sequence of the agent's reaches the terminal: %q", got)
	}
}
