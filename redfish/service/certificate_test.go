package service

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"
)

// issuer is a certificate authority for tests.
type issuer struct {
	t    *testing.T
	cert *x509.Certificate
	key  crypto.Signer
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{t: t, key: key}
	i.cert = i.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "Test authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, key.Public())
	return i
}

func (i *issuer) sign(template *x509.Certificate, public crypto.PublicKey) *x509.Certificate {
	i.t.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent := i.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, i.key)
	if err != nil {
		i.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		i.t.Fatal(err)
	}
	return cert
}

// client returns a certificate of a client with its key.
func (i *issuer) client(name string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.t.Fatal(err)
	}
	cert := i.sign(&x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, key.Public())
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func (i *issuer) pem() string { return string(chainPEM([][]byte{i.cert.Raw})) }

func quote(s string) string {
	b, _ := json.Marshal(s)
	return string(b)
}

const (
	testHTTPS   = "/redfish/v1/Managers/bmc/NetworkProtocol/HTTPS/Certificates"
	generateCSR = certificateServiceURI + "/Actions/CertificateService.GenerateCSR"
	replaceCert = certificateServiceURI + "/Actions/CertificateService.ReplaceCertificate"
)

func TestReplaceCertificate(t *testing.T) {
	dir := t.TempDir()
	s, _ := newTestService(t, Options{StateDir: dir})
	p := newPeer(t, listen(t, s))
	before := s.Certificate()
	next, _ := openStream(t, p, "", "") // an open connection, which has to stay
	until(t, next, "ResourceCreated")
	a := p.do("GET", testHTTPS+"/1", "")
	if a.StatusCode != 200 || a.at("CertificateType") != "PEM" || a.at("Subject", "CommonName") != before.Subject.CommonName || strings.Contains(string(a.body), "PRIVATE") {
		t.Errorf("certificate = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("GET", certificateServiceURI+"/CertificateLocations", ""); a.at("Links", "Certificates", 0, "@odata.id") != testHTTPS+"/1" {
		t.Errorf("locations = %s", a.body)
	}
	for _, algorithm := range []string{`"TPM_ALG_ECDSA","KeyCurveId":"TPM_ECC_NIST_P384"`, `"TPM_ALG_RSA","KeyBitLength":2048`} {
		a := p.do("POST", generateCSR, `{"CommonName":"dpu.example","Organization":"Example","AlternativeNames":["dpu.example","192.0.2.7"],
			"CertificateCollection":{"@odata.id":"`+testHTTPS+`"},"KeyPairAlgorithm":`+algorithm+`}`)
		csr, _ := a.at("CSRString").(string)
		block, _ := pem.Decode([]byte(csr))
		if a.StatusCode != 200 || block == nil {
			t.Fatalf("GenerateCSR = %d %s", a.StatusCode, a.body)
		}
		request, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil || request.CheckSignature() != nil || request.Subject.CommonName != "dpu.example" || len(request.DNSNames) != 1 || len(request.IPAddresses) != 1 {
			t.Fatalf("request = %+v, %v", request, err)
		}
		ca := newIssuer(t)
		cert := ca.sign(&x509.Certificate{
			Subject: request.Subject, DNSNames: request.DNSNames, IPAddresses: request.IPAddresses, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}, request.PublicKey)
		body := fmt.Sprintf(`{"CertificateUri":{"@odata.id":%q},"CertificateType":"PEMchain","CertificateString":%s}`, testHTTPS+"/1", quote(string(chainPEM([][]byte{cert.Raw, ca.cert.Raw}))))
		if a := p.do("POST", replaceCert, body); a.StatusCode != 204 {
			t.Fatalf("ReplaceCertificate = %d %s", a.StatusCode, a.body)
		}
		fresh := newPeer(t, p.url)
		if a := fresh.do("GET", testHTTPS+"/1", ""); !a.TLS.PeerCertificates[0].Equal(cert) || len(a.TLS.PeerCertificates) != 2 || a.at("CertificateType") != "PEMchain" {
			t.Errorf("the service shows %v", a.TLS.PeerCertificates[0].Subject)
		}
		again, err := New(Options{StateDir: dir, Limits: Limits{Hash: cheap}})
		if err != nil || !again.Certificate().Equal(cert) {
			t.Errorf("after a restart: %v", err)
		}
	}
	s.Publish(Event{MessageID: resourceEvent + "TestMessage"})
	until(t, next, "TestMessage")

	other := newIssuer(t)
	expired := other.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "x"}, NotBefore: time.Unix(1, 0), NotAfter: time.Unix(2, 0)}, s.certs.current().PrivateKey.(crypto.Signer).Public())
	for name, text := range map[string]string{
		"nothing": "", "text": "hello", "another key's": other.pem(), "expired": string(chainPEM([][]byte{expired.Raw})),
		"key only": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}})),
	} {
		body := fmt.Sprintf(`{"CertificateUri":{"@odata.id":%q},"CertificateType":"PEM","CertificateString":%s}`, testHTTPS+"/1", quote(text))
		if a := p.do("POST", replaceCert, body); a.StatusCode != 400 {
			t.Errorf("replacement by %s = %d %s", name, a.StatusCode, a.body)
		}
	}
	if a := p.do("POST", generateCSR, `{"CommonName":"x","CertificateCollection":{"@odata.id":"/redfish/v1/Systems"}}`); a.StatusCode != 400 {
		t.Errorf("CSR for another collection = %d", a.StatusCode)
	}
}

func TestClientCertificates(t *testing.T) {
	dir := t.TempDir()
	s, _ := newTestService(t, Options{StateDir: dir})
	p := newPeer(t, listen(t, s))
	if a := p.do("POST", accountsURI, `{"UserName":"monitor","Password":"a long password","RoleId":"ReadOnly","PasswordChangeRequired":true}`); a.StatusCode != 201 {
		t.Fatalf("account = %d %s", a.StatusCode, a.body)
	}
	ca, stranger := newIssuer(t), newIssuer(t)
	add := func(text string) answer {
		return p.do("POST", authoritiesURI, `{"CertificateType":"PEM","CertificateString":`+quote(text)+`}`)
	}
	a := add(ca.pem())
	if a.StatusCode != 201 {
		t.Fatalf("authority = %d %s", a.StatusCode, a.body)
	}
	authority := a.Header.Get("Location")
	leaf := ca.client("x")
	for _, text := range []string{"", "x", ca.pem() + stranger.pem(), string(chainPEM(leaf.Certificate))} {
		if a := add(text); a.StatusCode != 400 {
			t.Errorf("authority %.20q = %d %s", text, a.StatusCode, a.body)
		}
	}
	// with is a GET of the systems with a certificate and no other credentials; 0 means that there was no connection.
	with := func(certs ...tls.Certificate) (*peer, int) {
		c := newPeer(t, p.url)
		c.http.Transport.(*http.Transport).TLSClientConfig.Certificates = certs
		req, err := http.NewRequest("GET", p.url+"/redfish/v1/Systems", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			return c, 0
		}
		resp.Body.Close()
		return c, resp.StatusCode
	}
	monitor := ca.client("monitor")
	if _, got := with(monitor); got != 401 {
		t.Errorf("with a certificate before they are enabled: %d", got)
	}
	const account = "/redfish/v1/AccountService"
	if a := p.do("PATCH", account, `{"MultiFactorAuth":{"ClientCertificate":{"Enabled":true}}}`); a.StatusCode != 200 || a.at("MultiFactorAuth", "ClientCertificate", "Enabled") != true {
		t.Fatalf("enable = %d %s", a.StatusCode, a.body)
	}
	open, got := with(monitor)
	if got != 200 {
		t.Errorf("with a certificate: %d", got)
	}
	if a := open.do("PATCH", "/redfish/v1/Systems/system", `{"Boot":{"BootSourceOverrideTarget":"Pxe"}}`, "Authorization", ""); a.StatusCode != 403 {
		t.Errorf("a change with the certificate of a reader = %d", a.StatusCode)
	}
	for name, want := range map[string]int{"nobody": 401, "": 401} {
		if _, got := with(ca.client(name)); got != want {
			t.Errorf("with the certificate of %q: %d; want %d", name, got, want)
		}
	}
	if _, got := with(stranger.client("monitor")); got != 0 && got != 401 {
		t.Errorf("with a strange authority's certificate: %d", got)
	}
	if _, got := with(); got != 401 {
		t.Errorf("without a certificate: %d", got)
	}
	if a := p.do("PATCH", account, `{"MultiFactorAuth":{"ClientCertificate":{"RespondToUnauthenticatedClients":false}}}`); a.StatusCode != 400 {
		t.Errorf("to demand certificates without one = %d", a.StatusCode)
	}
	root, _ := with(ca.client(testUser))
	if a := root.do("PATCH", account, `{"MultiFactorAuth":{"ClientCertificate":{"RespondToUnauthenticatedClients":false}}}`, "Authorization", ""); a.StatusCode != 200 {
		t.Errorf("to demand certificates with one = %d %s", a.StatusCode, a.body)
	}
	if _, got := with(); got != 0 {
		t.Errorf("without a certificate, which is demanded: %d", got)
	}
	if a := root.do("DELETE", authority, ""); a.StatusCode != 400 {
		t.Errorf("DELETE of the last authority = %d", a.StatusCode)
	}
	again, err := New(Options{StateDir: dir, Limits: Limits{Hash: cheap}})
	if err != nil {
		t.Fatal(err)
	}
	if file, all := again.certs.authorities(); !file.Enabled || !file.Required || len(all) != 1 || !all[0].cert.Equal(ca.cert) {
		t.Errorf("after a restart: %+v", file)
	}
	root.do("PATCH", account, `{"MultiFactorAuth":{"ClientCertificate":{"RespondToUnauthenticatedClients":true}}}`)
	if a := root.do("DELETE", authority, ""); a.StatusCode != 204 {
		t.Fatalf("DELETE = %d %s", a.StatusCode, a.body)
	}
	// What is open already gets nothing more by a certificate that is not trusted any longer.
	if a := open.do("GET", "/redfish/v1/Systems", "", "Authorization", ""); a.StatusCode != 401 {
		t.Errorf("GET after the authority is gone = %d", a.StatusCode)
	}
}

func FuzzParsePEM(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	cert, key, err := selfSigned(nil, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(cert, key...))
	f.Fuzz(func(t *testing.T, b []byte) {
		chain, _, err := parsePEM(b)
		if (chain == nil) == (err == nil) {
			t.Fatalf("parsePEM(%q) = %v, %v; want one of them", b, chain, err)
		}
		for _, c := range chain {
			certificate("x", [][]byte{c.Raw}, c, "Web")
		}
	})
}

func TestRoles(t *testing.T) {
	dir := t.TempDir()
	o := Options{StateDir: dir, OEMPrivileges: map[string][]string{"Administrator": {"TestHeal"}}, MorePrivileges: []string{"TestMemory"}}
	s, _ := newTestService(t, o)
	ran := 0
	s.Handle(Route{
		URI: "/redfish/v1/Chassis/2", Type: "Chassis.v1_28_0.Chassis", Get: sensorForTest,
		Actions: []Action{{Name: "Chassis.Peek", OEM: true, Privileges: Privileges{{Login, "TestMemory"}}, Do: func(*Request, Values) (*Reply, error) { ran++; return nil, nil }}},
	})
	p := newPeer(t, listen(t, s))
	const peek = "/redfish/v1/Chassis/2/Actions/Oem/Chassis.Peek"
	if a := p.do("POST", peek, ""); a.StatusCode != 403 {
		t.Errorf("administrator without the privilege = %d", a.StatusCode)
	}
	if a := p.do("GET", rolesURI+"/Administrator", ""); a.at("OemPrivileges", 0) != "TestHeal" || a.at("IsPredefined") != true {
		t.Errorf("Administrator = %s", a.body)
	}
	for body, status := range map[string]int{
		`{"RoleId":"Peeker","AssignedPrivileges":["Login","ConfigureSelf"],"OemPrivileges":["TestMemory"]}`: 201,
		`{"RoleId":"Bad","AssignedPrivileges":["Fly"]}`:                                                     400,
		`{"RoleId":"Bad","AssignedPrivileges":["Login"],"OemPrivileges":["Other"]}`:                         400,
		`{"RoleId":"Administrator","AssignedPrivileges":["Login"]}`:                                         400,
		`{"RoleId":"a b","AssignedPrivileges":["Login"]}`:                                                   400,
		`{"RoleId":"Bad"}`: 400,
	} {
		if a := p.do("POST", rolesURI, body); a.StatusCode != status {
			t.Errorf("POST %s = %d; want %d\n%s", body, a.StatusCode, status, a.body)
		}
	}
	p.do("POST", accountsURI, `{"UserName":"peeker","Password":"a long password","RoleId":"Peeker"}`)
	req, _ := http.NewRequest("GET", "/", nil)
	req.SetBasicAuth("peeker", "a long password")
	peeker := req.Header.Get("Authorization")
	if a := p.do("POST", peek, "", "Authorization", peeker); a.StatusCode != 204 || ran != 1 {
		t.Errorf("the role's holder = %d, ran %d", a.StatusCode, ran)
	}
	if a := p.do("POST", rolesURI, `{"RoleId":"More","AssignedPrivileges":["Login"]}`, "Authorization", peeker); a.StatusCode != 403 {
		t.Errorf("a role by one who may not = %d", a.StatusCode)
	}
	if a := p.do("DELETE", rolesURI+"/Peeker", ""); a.StatusCode != 400 || a.messageID() != "ResourceInUse" {
		t.Errorf("DELETE of a role in use = %d", a.StatusCode)
	}
	if a := p.do("PATCH", rolesURI+"/Peeker", `{"OemPrivileges":[]}`); a.StatusCode != 200 {
		t.Errorf("PATCH = %d %s", a.StatusCode, a.body)
	}
	if a := p.do("POST", peek, "", "Authorization", peeker); a.StatusCode != 403 {
		t.Errorf("without the privilege = %d", a.StatusCode)
	}
	if a := p.do("PATCH", rolesURI+"/ReadOnly", `{"AssignedPrivileges":["Login","ConfigureUsers"]}`); a.StatusCode != 400 || a.messageID() != "RestrictedRole" {
		t.Errorf("PATCH of a standard role = %d %s", a.StatusCode, a.body)
	}
	again, err := New(Options{StateDir: dir, Limits: Limits{Hash: cheap}})
	if _, _, ok := again.role("Peeker"); err != nil || !ok {
		t.Errorf("after a restart: %v, %v", ok, err)
	}
	p.do("DELETE", accountsURI+"/2", "")
	if a := p.do("DELETE", rolesURI+"/Peeker", ""); a.StatusCode != 204 {
		t.Errorf("DELETE = %d %s", a.StatusCode, a.body)
	}
}

func TestAudit(t *testing.T) {
	var got []AuditRecord
	fail := false
	s, _ := newTestService(t, Options{Limits: Limits{LockAfter: 2}, Audit: func(rec AuditRecord) error {
		if fail {
			return errors.New("full")
		}
		got = append(got, rec)
		return nil
	}})
	p := newPeer(t, listen(t, s))
	trail := func() []AuditRecord {
		s.auditing.Lock()
		defer s.auditing.Unlock()
		out := got
		got = nil
		return out
	}
	for _, step := range []struct {
		method, path, body string
		want               AuditRecord
	}{
		{"POST", accountsURI, `{"UserName":"new","Password":"very secret","RoleId":"ReadOnly"}`, AuditRecord{What: "POST", Status: 200}},
		{"PATCH", accountsURI + "/2", `{"Password":"very secret too"}`, AuditRecord{What: "PATCH", Status: 200}},
		{"PATCH", accountsURI + "/1", `{"Enabled":false}`, AuditRecord{What: "PATCH", Status: 400}},
		{"POST", "/redfish/v1/Systems/system/Actions/ComputerSystem.Reset", `{"ResetType":"On"}`, AuditRecord{What: "ComputerSystem.Reset", Status: 200}},
		{"DELETE", accountsURI + "/2", "", AuditRecord{What: "DELETE", Status: 200}},
		{"DELETE", accountsURI + "/2", "", AuditRecord{What: "DELETE", Status: 404}},
	} {
		p.do(step.method, step.path, step.body)
		all := trail()
		if len(all) != 1 || all[0].What != step.want.What || all[0].Status != step.want.Status || all[0].User != testUser || all[0].Address != "127.0.0.1" || all[0].Time.IsZero() {
			t.Errorf("%s %s: %+v; want %+v", step.method, step.path, all, step.want)
		}
		if text := fmt.Sprint(all); strings.Contains(text, "very secret") {
			t.Errorf("the trail has a secret: %s", text)
		}
	}
	p.do("GET", "/redfish/v1/Systems/system", "")
	if all := trail(); len(all) != 0 {
		t.Errorf("a GET left %+v", all)
	}
	for range 3 {
		p.do("POST", sessionsURI, `{"UserName":"root","Password":"wrong"}`, "Authorization", "")
	}
	time.Sleep(50 * time.Millisecond)
	locked := 0
	for _, rec := range trail() {
		if rec.What == "lock out" {
			locked++
		}
	}
	if locked != 1 {
		t.Errorf("%d lock-outs in the trail; want 1", locked)
	}
	fail = true
	if a := p.do("POST", "/redfish/v1/Systems/system/Actions/ComputerSystem.Reset", `{"ResetType":"On"}`, "X-Auth-Token", ""); a.StatusCode != 204 && a.StatusCode != 429 {
		t.Errorf("with a broken trail = %d", a.StatusCode)
	}
}
