package host

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/attest/attesttest"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// A testTPM is an agent's machine with a real TPM that has started an image.
type testTPM struct {
	*attest.TPM
	id  Identity
	log attest.Log
}

var testImage = attest.Image{
	Manifest: []byte(`{"product":"backdoor","version":"1.4.0","epoch":3}`),
	Parts:    []attest.Part{{Name: "kernel", SHA256: attest.Digest{1}}},
}

func newTestTPM(t testing.TB) *testTPM {
	t.Helper()
	tpm, _ := attesttest.Start(t, t.TempDir())
	m := &testTPM{TPM: tpm}
	var err error
	if m.id.Properties, err = tpm.Properties(); err != nil {
		t.Fatal(err)
	}
	if m.id.EndorsementKey, err = tpm.EndorsementKey(); err != nil {
		t.Fatal(err)
	}
	der, err := tpm.Certificate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	m.id.Certificates = [][]byte{der}
	m.measure(t, testImage.Events()...)
	return m
}

func (m *testTPM) measure(t testing.TB, log ...attest.Event) {
	t.Helper()
	for _, e := range log {
		if err := m.Extend(e); err != nil {
			t.Fatal(err)
		}
		m.log = append(m.log, e)
	}
}

func (m *testTPM) Identity() (Identity, error) { return m.id, nil }
func (m *testTPM) EventLog() ([]byte, error)   { return m.log.MarshalBinary() }

// A lateTPM becomes what err says: nil, a TPM that works.
type lateTPM struct {
	*testTPM
	err atomic.Pointer[error]
}

func (m *lateTPM) Identity() (Identity, error) { return m.id, *m.err.Load() }

func (m *lateTPM) set(err error) { m.err.Store(&err) }

// attested serves a fake agent's host, with a TPM that has measured the service's key if that is wanted, and returns how to reach it.
func attested(t *testing.T, m *testTPM, identify bool) client.Config {
	t.Helper()
	if m == nil {
		return attestedBy(t, nil, nil, false)
	}
	return attestedBy(t, m, m, identify)
}

func attestedBy(t *testing.T, a0 Attestor, m *testTPM, identify bool) client.Config {
	t.Helper()
	a := newFakeAgent()
	a.attestor = a0
	s := newTestService(t, a, service.Options{})
	if identify {
		m.measure(t, attest.TLSEvent(sha256.Sum256(s.Certificate().RawSubjectPublicKeyInfo)))
	}
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
	return client.Config{URL: l.Addr().String(), User: testUser, Password: testPassword, Insecure: true}
}

func dial(t *testing.T, conf client.Config) *client.Client {
	t.Helper()
	c, err := client.New(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

func TestAttest(t *testing.T) {
	m := newTestTPM(t)
	conf := attested(t, m, true)
	c := dial(t, conf)
	ak, err := m.AttestationKey()
	if err != nil {
		t.Fatal(err)
	}
	ek := m.id.EndorsementKey.Fingerprint()
	want := client.Attestation{EndorsementKeys: []attest.Digest{ek}, Policy: attest.Policy{Images: []attest.Image{testImage}, Epoch: 3}}
	got, err := c.Attest(t.Context(), want)
	if err != nil || got.Version != "1.4.0" || got.EndorsementKey != ek || got.AttestationKey != ak.Fingerprint() {
		t.Fatalf("Attest() = %+v, %v", got, err)
	}

	for _, tt := range []struct {
		name string
		a    client.Attestation
		want string
	}{
		{"another TPM", client.Attestation{EndorsementKeys: []attest.Digest{{9}}}, "endorsement key"},
		{"another attestation key", client.Attestation{Policy: attest.Policy{Keys: []attest.Digest{{9}}}}, "attestation key"},
		{"nothing trusted", client.Attestation{}, "trusts no key"},
		{"another image", client.Attestation{EndorsementKeys: want.EndorsementKeys, Policy: attest.Policy{Images: []attest.Image{{Manifest: []byte(`{"version":"2.0"}`)}}}}, "image: got backdoor 1.4.0"},
		{"a later epoch", client.Attestation{EndorsementKeys: want.EndorsementKeys, Policy: attest.Policy{Epoch: 4}}, "epoch"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := dial(t, conf).Attest(t.Context(), tt.a); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Attest() = %v; want an error with %q", err, tt.want)
			}
			// A client that asks for the proof first reads nothing without it.
			refusing := conf
			refusing.Attestation = &tt.a
			var root schema.ComputerSystem
			if err := dial(t, refusing).Get(t.Context(), "/redfish/v1/Systems/system", &root); err == nil || root.Name != "" {
				t.Errorf("Get() from an agent that does not attest = %+v, %v", root, err)
			}
		})
	}
	believing := conf
	believing.Attestation = &want
	var system schema.ComputerSystem
	if err := dial(t, believing).Get(t.Context(), "/redfish/v1/Systems/system", &system); err != nil || system.HostName != "patient" {
		t.Errorf("Get() from an agent that attests = %+v, %v", system, err)
	}
}

// Certify implements Certifier.
func (m *testTPM) Certify(chain [][]byte) error {
	m.id.Certificates = chain
	return nil
}

// TestEnroll has the owner's authority certify a TPM, for monitors that know nothing but the authority.
func TestEnroll(t *testing.T) {
	m := newTestTPM(t)
	c := dial(t, attested(t, m, true))
	ca, roots := newAuthority(t), func(ca authority) client.Attestation {
		p := x509.NewCertPool()
		p.AddCert(ca.cert)
		return client.Attestation{Policy: attest.Policy{Roots: p}}
	}
	if _, err := c.Attest(t.Context(), roots(ca)); err == nil {
		t.Error("Attest() by an authority that has certified nothing: no error")
	}
	want := client.Attestation{EndorsementKeys: []attest.Digest{m.id.EndorsementKey.Fingerprint()}}
	issued := func(ak attest.Key, got *client.Attested) ([]byte, error) {
		der, err := attest.Certify(ak, "dpu-17", ca.cert, ca.key, time.Now(), time.Hour)
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), err
	}
	unasked := func(attest.Key, *client.Attested) ([]byte, error) {
		t.Error("a certificate is asked for")
		return nil, errors.New("none")
	}
	if _, err := c.Enroll(t.Context(), client.Attestation{EndorsementKeys: []attest.Digest{{9}}}, unasked); err == nil {
		t.Error("Enroll() of another TPM: no error")
	}
	if _, err := c.Enroll(t.Context(), client.Attestation{}, unasked); err == nil {
		t.Error("Enroll() of any TPM: no error")
	}
	for name, text := range map[string]func() []byte{
		"another key": func() []byte {
			return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
		},
		"itself":  func() []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.id.Certificates[0]}) },
		"nothing": func() []byte { return []byte("no PEM") },
	} {
		var e *client.Error
		if _, err := c.Enroll(t.Context(), want, func(attest.Key, *client.Attested) ([]byte, error) { return text(), nil }); !errors.As(err, &e) || e.Status != 400 {
			t.Errorf("Enroll() with a certificate of %s = %v; want 400", name, err)
		}
	}
	if got, err := c.Enroll(t.Context(), want, issued); err != nil || got.Version != "1.4.0" {
		t.Fatalf("Enroll() = %+v, %v", got, err)
	}
	if got, err := c.Attest(t.Context(), roots(ca)); err != nil || !strings.Contains(got.Checks[0].Got, "certified by test") {
		t.Errorf("Attest() by the authority = %+v, %v", got, err)
	}
	if _, err := c.Attest(t.Context(), roots(newAuthority(t))); err == nil {
		t.Error("Attest() by another authority: no error")
	}
}

// An authority certifies.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

// TestAttestLate has a TPM that is not ready when the service starts: until it is, it is said to be starting, and a client waits for it.
func TestAttestLate(t *testing.T) {
	m := &lateTPM{testTPM: newTestTPM(t)}
	m.set(ErrStarting)
	conf := attestedBy(t, m, m.testTPM, true)
	c := dial(t, conf)
	var i schema.ComponentIntegrity
	if err := c.Get(t.Context(), integrityURI+"/tpm", &i); err != nil || i.Status == nil || i.Status.State != schema.StateStarting || i.TPM != nil {
		t.Fatalf("Get() of a TPM that starts = %+v, %v", i, err)
	}
	for _, uri := range []string{tpmURI, akURI, tpmURI + "/Certificates"} {
		var refused *client.Error
		if err := c.Get(t.Context(), uri, new(json.RawMessage)); !errors.As(err, &refused) || refused.Status != 503 {
			t.Errorf("Get(%s) while the TPM starts = %v; want 503", uri, err)
		}
	}
	type result struct {
		got *client.Attested
		err error
	}
	done := make(chan result, 1)
	go func() {
		got, err := c.Attest(context.Background(), client.Attestation{EndorsementKeys: []attest.Digest{m.id.EndorsementKey.Fingerprint()}})
		done <- result{got, err}
	}()
	select {
	case r := <-done:
		t.Fatalf("Attest() does not wait for the TPM: %+v, %v", r.got, r.err)
	case <-time.After(100 * time.Millisecond):
	}
	m.set(nil)
	if r := <-done; r.err != nil || r.got.Version != "1.4.0" {
		t.Errorf("Attest() when the TPM is ready = %+v, %v", r.got, r.err)
	}
	m.set(errors.New("it does not work"))
	if _, err := dial(t, conf).Attest(t.Context(), client.Attestation{}); !errors.Is(err, client.ErrUnattested) {
		t.Errorf("Attest() with a TPM that does not work = %v; want ErrUnattested", err)
	}
}

// TestAttestNot has services that cannot prove what they are: one without a TPM, and one that relays what another machine's TPM has signed.
func TestAttestNot(t *testing.T) {
	if _, err := dial(t, attested(t, nil, false)).Attest(t.Context(), client.Attestation{}); !errors.Is(err, client.ErrUnattested) {
		t.Errorf("Attest() without a TPM = %v; want ErrUnattested", err)
	}
	m := newTestTPM(t)
	attested(t, m, true) // the honest one
	relay := dial(t, attested(t, m, false))
	want := client.Attestation{EndorsementKeys: []attest.Digest{m.id.EndorsementKey.Fingerprint()}}
	if _, err := relay.Attest(t.Context(), want); err == nil || !strings.Contains(err.Error(), "in between") {
		t.Errorf("Attest() through a relay = %v; want somebody in between", err)
	}
}

// TestSignedMeasurementsRefused sends what an action must refuse, before it reaches the TPM.
func TestSignedMeasurementsRefused(t *testing.T) {
	c := dial(t, attested(t, newTestTPM(t), true))
	b64 := base64.StdEncoding.EncodeToString
	good := map[string]any{
		"Certificate": schema.Link{ID: akURI}, "Nonce": "00112233", "PCRSelection": b64(attest.Selection(11)), "Scheme": b64(attest.Scheme()),
	}
	const target = integrityURI + "/tpm/Actions/ComponentIntegrity.TPMGetSignedMeasurements"
	var out schema.SignedMeasurements
	if _, err := c.Post(t.Context(), target, good, &out); err != nil || out.SignedMeasurements == "" {
		t.Fatalf("a good request: %+v, %v", out, err)
	}
	for name, change := range map[string]map[string]any{
		"another certificate": {"Certificate": schema.Link{ID: "/redfish/v1/CertificateService"}},
		"no certificate":      {"Certificate": nil},
		"long nonce":          {"Nonce": strings.Repeat("00", attest.MaxNonce+1)},
		"nonce not hex":       {"Nonce": "xyz"},
		"selection not b64":   {"PCRSelection": "%"},
		"selection of SHA-1":  {"PCRSelection": b64([]byte{0, 0, 0, 1, 0, 4, 3, 0, 8, 0})},
		"empty selection":     {"PCRSelection": b64([]byte{0, 0, 0, 1, 0, 11, 3, 0, 0, 0})},
		"RSA scheme":          {"Scheme": b64([]byte{0, 0x14, 0, 0x0b})},
	} {
		body := map[string]any{}
		for k, v := range good {
			body[k] = v
		}
		for k, v := range change {
			body[k] = v
		}
		var e *client.Error
		if _, err := c.Post(t.Context(), target, body, nil); !errors.As(err, &e) || e.Status != 400 {
			t.Errorf("%s: %v; want 400", name, err)
		}
	}
	var e *client.Error
	_, err := c.Post(t.Context(), tpmURI+"/Actions/Oem/BackdoorTrustedComponent.ActivateCredential", map[string]string{"CredentialBlob": b64(make([]byte, 68)), "Secret": b64(make([]byte, 68))}, nil)
	if !errors.As(err, &e) || e.Status != 400 {
		t.Errorf("a challenge for nobody: %v; want 400", err)
	}
}
