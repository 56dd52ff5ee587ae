package service

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// certificates are the certificate that the service shows, and the authorities whose clients' certificates it takes for a login.
// Both can be replaced while connections are open: what is shown or asked for changes with the next handshake.
type certificates struct {
	svc *Service

	mu      sync.Mutex // guards what follows
	shown   *tls.Certificate
	pending crypto.Signer // the key of a certificate request that was not answered yet
	file    clientFile
	config  *tls.Config // made of the above; nil if they have changed since
	port    int         // that the service listens on; 0 if it does not
	root    string      // URI of the network protocol's resource; "" without one

	// others are certificates that are not the service's own, by their URIs; see Service.Certify. They do not change while it serves.
	others map[string]func(chain []*x509.Certificate) error
}

// clientFile is clients.json in the state directory: AccountService.MultiFactorAuth.ClientCertificate.
type clientFile struct {
	Version     int         `json:"version"` // 1
	Next        int         `json:"next"`
	Enabled     bool        `json:"enabled"`
	Required    bool        `json:"required"` // clients without a certificate get no connection
	Authorities []authority `json:"authorities"`
}

// authority is a certificate authority of clients.
type authority struct {
	ID  string `json:"id"`
	PEM string `json:"pem"`

	cert *x509.Certificate
}

const (
	certificateServiceURI = "/redfish/v1/CertificateService"
	authoritiesURI        = "/redfish/v1/AccountService/MultiFactorAuth/ClientCertificate/Certificates"
	maxAuthorities        = 16
	maxCertificate        = 48 << 10 // bytes of PEM
)

func openCertificates(s *Service) (*certificates, error) {
	c := &certificates{svc: s, file: clientFile{Version: 1, Next: 1}}
	if s.o.Certificate != nil {
		shown := *s.o.Certificate
		c.shown = &shown
	} else {
		shown, err := s.o.loadCertificate(s.now())
		if err != nil {
			return nil, err
		}
		c.shown = &shown
	}
	if c.shown.Leaf == nil {
		leaf, err := x509.ParseCertificate(c.shown.Certificate[0])
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		c.shown.Leaf = leaf
	}
	if s.o.StateDir == "" {
		return c, nil
	}
	if b, err := s.o.readKey(s.path("request.key")); err == nil {
		if c.pending, err = parseKey(b); err != nil {
			return nil, fmt.Errorf("read key of certificate request: %w", err)
		}
	}
	b, err := os.ReadFile(s.path("clients.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read client authorities: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c.file); err != nil {
		return nil, fmt.Errorf("read client authorities: %w", err)
	}
	if c.file.Version != 1 {
		return nil, fmt.Errorf("read client authorities: version %d is not known", c.file.Version)
	}
	for i := range c.file.Authorities {
		a := &c.file.Authorities[i]
		chain, _, err := parsePEM([]byte(a.PEM))
		if err != nil || len(chain) != 1 {
			return nil, fmt.Errorf("read client authority %s: %w", a.ID, err)
		}
		a.cert = chain[0]
	}
	return c, nil
}

// parsePEM reads certificates and at most one private key. Everything else is an error.
func parsePEM(b []byte) (chain []*x509.Certificate, key crypto.Signer, err error) {
	for len(bytes.TrimSpace(b)) > 0 {
		block, rest := pem.Decode(b)
		if block == nil {
			return nil, nil, errors.New("it is not PEM")
		}
		b = rest
		if block.Type == "CERTIFICATE" {
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, nil, errors.New("a certificate in it is damaged")
			}
			if chain = append(chain, cert); len(chain) > 10 {
				return nil, nil, errors.New("it has too many certificates")
			}
			continue
		}
		if key != nil {
			return nil, nil, errors.New("it has more than one key")
		}
		if key, err = parseKey(pem.EncodeToMemory(block)); err != nil {
			return nil, nil, err
		}
	}
	if len(chain) == 0 {
		return nil, nil, errors.New("it has no certificate")
	}
	return chain, key, nil
}

// parseKey reads one private key in PEM: PKCS #8, PKCS #1 or SEC 1.
func parseKey(b []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("it is not PEM")
	}
	if k, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
		switch k := k.(type) {
		case *ecdsa.PrivateKey:
			return k, nil
		case *rsa.PrivateKey:
			return k, nil
		}
		return nil, errors.New("a key of that kind is not supported")
	}
	if k, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	if k, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	return nil, errors.New("what is neither certificate nor unencrypted key cannot be used")
}

func sameKey(key crypto.Signer, cert *x509.Certificate) bool {
	if key == nil {
		return false
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(cert.PublicKey)
}

func keyPEM(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func chainPEM(chain [][]byte) []byte {
	var out []byte
	for _, der := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// current returns the certificate that is shown.
func (c *certificates) current() *tls.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.shown
}

// certificate is for crypto/tls, which wants a certificate named even if configFor gives it.
func (c *certificates) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.current(), nil
}

// configFor returns the configuration of a handshake. It stays the same one until something changes, for tickets are bound to it.
func (c *certificates) configFor(*tls.ClientHelloInfo) (*tls.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.config != nil {
		return c.config, nil
	}
	c.config = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*c.shown}, NextProtos: []string{"h2", "http/1.1"}}
	if c.file.Enabled {
		c.config.ClientCAs = x509.NewCertPool()
		for _, a := range c.file.Authorities {
			c.config.ClientCAs.AddCert(a.cert)
		}
		c.config.ClientAuth = tls.VerifyClientCertIfGiven
		if c.file.Required {
			c.config.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	return c.config, nil
}

// user returns the name of the user whom a connection's client certificate stands for: its common name. The authorities may have
// changed, and the certificate expired, since the handshake.
func (c *certificates) user(state *tls.ConnectionState) (string, bool) {
	if state == nil || len(state.VerifiedChains) == 0 {
		return "", false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.file.Enabled {
		return "", false
	}
	leaf := state.VerifiedChains[0][0]
	if now := c.svc.now(); now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return "", false
	}
	for _, chain := range state.VerifiedChains {
		root := chain[len(chain)-1]
		if slices.ContainsFunc(c.file.Authorities, func(a authority) bool { return a.cert.Equal(root) }) {
			return leaf.Subject.CommonName, leaf.Subject.CommonName != ""
		}
	}
	return "", false
}

// store makes next the authorities, on disk first. The caller holds mu.
func (c *certificates) store(next clientFile) error {
	if c.svc.o.StateDir != "" {
		b, err := json.MarshalIndent(next, "", "\t")
		if err == nil {
			err = durable.WriteFile(c.svc.path("clients.json"), b, 0o600)
		}
		if err != nil {
			return fmt.Errorf("store client authorities: %w", err)
		}
	}
	c.file, c.config = next, nil
	return nil
}

// request makes a new key, which it keeps for the certificate to come, and a request for it.
func (c *certificates) request(template *x509.CertificateRequest, key crypto.Signer) (string, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return "", fmt.Errorf("make certificate request: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.svc.o.StateDir != "" {
		b, err := keyPEM(key)
		if err == nil {
			err = c.svc.o.writeKey(c.svc.path("request.key"), b)
		}
		if err != nil {
			return "", fmt.Errorf("store key of certificate request: %w", err)
		}
	}
	c.pending = key
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

// Certify lets clients replace a certificate that is not the service's own, at an URI that has a route: take is given the new one with its chain,
// keeps it, or says why not. It is for before the service serves.
func (s *Service) Certify(uri string, take func(chain []*x509.Certificate) error) {
	if s.certs.others == nil {
		s.certs.others = map[string]func([]*x509.Certificate) error{}
	}
	s.certs.others[uri] = take
}

// UnfitCertificate is the answer to a certificate that cannot be put where a client wants it.
func UnfitCertificate(why string) error {
	return Because(400, "ActionParameterValueError", "The certificate cannot be used: "+why+".", "CertificateString", "CertificateService.ReplaceCertificate").about("CertificateString")
}

func takeChain(text string, take func([]*x509.Certificate) error) error {
	chain, key, err := parsePEM([]byte(text))
	switch {
	case err != nil:
		return UnfitCertificate(err.Error())
	case key != nil:
		return UnfitCertificate("there is a private key with it, which belongs nowhere near here")
	}
	return take(chain)
}

// replace shows another certificate from now on. Its key comes with it, or is that of the last request or of the present certificate.
func (c *certificates) replace(text string) error {
	bad := UnfitCertificate
	chain, key, err := parsePEM([]byte(text))
	if err != nil {
		return bad(err.Error())
	}
	leaf := chain[0]
	c.mu.Lock()
	defer c.mu.Unlock()
	if key == nil {
		key = c.pending
		if !sameKey(key, leaf) {
			key, _ = c.shown.PrivateKey.(crypto.Signer)
		}
	}
	switch {
	case !sameKey(key, leaf):
		return bad("its private key is neither in it nor known here")
	case c.svc.now().After(leaf.NotAfter):
		return bad("it has expired")
	case len(leaf.ExtKeyUsage) > 0 && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny):
		return bad("it is not one of a server")
	}
	shown := &tls.Certificate{PrivateKey: key, Leaf: leaf}
	for _, cert := range chain {
		shown.Certificate = append(shown.Certificate, cert.Raw)
	}
	if c.svc.o.StateDir != "" {
		b, err := keyPEM(key)
		if err == nil {
			err = c.svc.o.writeKey(c.svc.path(certificateFile), append(chainPEM(shown.Certificate), b...))
		}
		if err != nil {
			return fmt.Errorf("store certificate: %w", err)
		}
		if err := os.Remove(c.svc.path("request.key")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.svc.log.Warn("remove key of certificate request", "err", err)
		}
	}
	c.shown, c.pending, c.config = shown, nil, nil
	return nil
}

// addAuthority takes clients' certificates of another authority from now on.
func (c *certificates) addAuthority(text string) (string, error) {
	cert, err := parseAuthority(text)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.file.Authorities) >= maxAuthorities {
		return "", refuse(400, "CreateLimitReachedForResource")
	}
	next := c.file
	id := strconv.Itoa(next.Next)
	next.Next++
	next.Authorities = append(slices.Clone(next.Authorities), authority{ID: id, PEM: string(chainPEM([][]byte{cert.Raw})), cert: cert})
	return id, c.store(next)
}

func parseAuthority(text string) (*x509.Certificate, error) {
	bad := func(why string) error {
		return Because(400, "PropertyValueError", "The certificate cannot be used: "+why+".", "CertificateString").about("CertificateString")
	}
	chain, key, err := parsePEM([]byte(text))
	switch {
	case err != nil:
		return nil, bad(err.Error())
	case key != nil:
		return nil, bad("there is a private key with it, which belongs nowhere near here")
	case len(chain) != 1:
		return nil, bad("it is a chain; only the authority's own is wanted")
	case !chain[0].IsCA:
		return nil, bad("it is not one of an authority")
	}
	return chain[0], nil
}

// dropAuthority forgets an authority.
func (c *certificates) dropAuthority(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	next := c.file
	next.Authorities = slices.DeleteFunc(slices.Clone(next.Authorities), func(a authority) bool { return a.ID == id })
	if len(next.Authorities) == len(c.file.Authorities) {
		return ErrNotFound
	}
	if len(next.Authorities) == 0 && next.Enabled && next.Required {
		return Because(400, "ResourceCannotBeDeleted", "Clients must have certificates, and this is the last authority of them.")
	}
	return c.store(next)
}

func (c *certificates) authorities() (clientFile, []authority) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.file, c.file.Authorities
}

// setClients changes how clients' certificates are asked for. To demand them is only for who has shown one.
func (c *certificates) setClients(r *Request, v Values) error {
	const prefix = "MultiFactorAuth/ClientCertificate/"
	c.mu.Lock()
	defer c.mu.Unlock()
	next := c.file
	if v.Has(prefix + "Enabled") {
		next.Enabled = v.Bool(prefix + "Enabled")
	}
	if v.Has(prefix + "RespondToUnauthenticatedClients") {
		next.Required = !v.Bool(prefix + "RespondToUnauthenticatedClients")
	}
	if next.Enabled && next.Required && (r.http.TLS == nil || len(r.http.TLS.VerifiedChains) == 0) {
		return Because(400, "PropertyValueConflict", "Certificates can be demanded of all clients only by a client that has shown one; else nobody may be left who can connect.",
			prefix+"RespondToUnauthenticatedClients", prefix+"Enabled").about(prefix + "RespondToUnauthenticatedClients")
	}
	return c.store(next)
}

// multiFactor is AccountService.MultiFactorAuth.
func (s *Service) multiFactor() *schema.MultiFactorAuth {
	file, _ := s.certs.authorities()
	return &schema.MultiFactorAuth{ClientCertificate: &schema.ClientCertificate{
		Enabled: file.Enabled, CertificateMappingAttribute: "CommonName", RespondToUnauthenticatedClients: !file.Required,
		Certificates: schema.LinkTo(authoritiesURI),
	}}
}

// certificate is a certificate as a resource.
// DescribeCertificate is the resource of a certificate with its chain (DER). usage may be empty.
func DescribeCertificate(name string, chain [][]byte, leaf *x509.Certificate, usage string) *schema.Certificate {
	out := certificate(name, chain, leaf, usage)
	if usage == "" {
		out.CertificateUsageTypes = nil
	}
	return out
}

func certificate(name string, chain [][]byte, leaf *x509.Certificate, usage string) *schema.Certificate {
	sum := sha256.Sum256(leaf.Raw)
	out := &schema.Certificate{
		Resource: schema.Resource{Name: name}, CertificateString: string(chainPEM(chain)), CertificateType: "PEM", CertificateUsageTypes: []string{usage},
		Subject: identifier(leaf.Subject), Issuer: identifier(leaf.Issuer), ValidNotBefore: schema.Time(leaf.NotBefore), ValidNotAfter: schema.Time(leaf.NotAfter),
		SerialNumber: colons(leaf.SerialNumber.Bytes()), Fingerprint: colons(sum[:]), FingerprintHashAlgorithm: "TPM_ALG_SHA256",
		SignatureAlgorithm: signatureAlgorithms[leaf.SignatureAlgorithm],
	}
	if len(chain) > 1 {
		out.CertificateType = "PEMchain"
	}
	out.Subject.AlternativeNames = slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		out.Subject.AlternativeNames = append(out.Subject.AlternativeNames, ip.String())
	}
	for _, u := range keyUsages {
		if leaf.KeyUsage&u.bit != 0 {
			out.KeyUsage = append(out.KeyUsage, u.name)
		}
	}
	for _, u := range leaf.ExtKeyUsage {
		switch u {
		case x509.ExtKeyUsageServerAuth:
			out.KeyUsage = append(out.KeyUsage, "ServerAuthentication")
		case x509.ExtKeyUsageClientAuth:
			out.KeyUsage = append(out.KeyUsage, "ClientAuthentication")
		}
	}
	return out
}

// keyUsages are Certificate.KeyUsage's names of the usages of RFC 5280, section 4.2.1.3.
var keyUsages = []struct {
	bit  x509.KeyUsage
	name string
}{
	{x509.KeyUsageDigitalSignature, "DigitalSignature"}, {x509.KeyUsageContentCommitment, "NonRepudiation"}, {x509.KeyUsageKeyEncipherment, "KeyEncipherment"},
	{x509.KeyUsageDataEncipherment, "DataEncipherment"}, {x509.KeyUsageKeyAgreement, "KeyAgreement"}, {x509.KeyUsageCertSign, "KeyCertSign"},
	{x509.KeyUsageCRLSign, "CRLSigning"}, {x509.KeyUsageEncipherOnly, "EncipherOnly"}, {x509.KeyUsageDecipherOnly, "DecipherOnly"},
}

// signatureAlgorithms are the names of RFC 8017, RFC 5758 and RFC 8410.
var signatureAlgorithms = map[x509.SignatureAlgorithm]string{
	x509.SHA256WithRSA: "sha256WithRSAEncryption", x509.SHA384WithRSA: "sha384WithRSAEncryption", x509.SHA512WithRSA: "sha512WithRSAEncryption",
	x509.ECDSAWithSHA256: "ecdsa-with-SHA256", x509.ECDSAWithSHA384: "ecdsa-with-SHA384", x509.ECDSAWithSHA512: "ecdsa-with-SHA512", x509.PureEd25519: "id-Ed25519",
}

func identifier(n pkix.Name) *schema.Identifier {
	first := func(list []string) string {
		if len(list) == 0 {
			return ""
		}
		return list[0]
	}
	return &schema.Identifier{
		CommonName: n.CommonName, Organization: first(n.Organization), OrganizationalUnit: first(n.OrganizationalUnit),
		City: first(n.Locality), State: first(n.Province), Country: first(n.Country),
	}
}

// colons writes bytes in hexadecimal with colons between.
func colons(b []byte) string {
	parts := make([]string, len(b))
	for i, c := range b {
		parts[i] = fmt.Sprintf("%02x", c)
	}
	return strings.Join(parts, ":")
}

// newKey makes a key as GenerateCSR names it.
func newKey(algorithm, curve string, bits int64) (crypto.Signer, error) {
	if algorithm == "TPM_ALG_RSA" {
		set(&bits, 3072)
		return rsa.GenerateKey(rand.Reader, int(bits))
	}
	if curve == "TPM_ECC_NIST_P384" {
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// NetworkRoutes returns the network protocol of the manager at an URI, with the certificate that the service shows. The manager
// links to it as NetworkProtocol.
func (s *Service) NetworkRoutes(manager string) []Route {
	root := manager + "/NetworkProtocol"
	s.certs.root = root
	https := root + "/HTTPS/Certificates"
	return []Route{
		{
			URI: root, Type: schema.TypeManagerNetworkProtocol,
			Get: func(*Request) (schema.Object, error) {
				s.certs.mu.Lock()
				port := s.certs.port
				s.certs.mu.Unlock()
				out := &schema.ManagerNetworkProtocol{
					Resource: schema.Resource{Name: "Network Protocol"}, Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
					HTTPS: &schema.HTTPSProtocol{ProtocolEnabled: true, Port: port, Certificates: schema.LinkTo(https)},
					SSDP:  s.discovery.view(),
				}
				if name, err := os.Hostname(); err == nil {
					out.HostName = &name
				}
				for _, name := range s.o.Names {
					if out.FQDN == nil && strings.Contains(name, ".") && net.ParseIP(name) == nil {
						out.FQDN = &name
					}
				}
				return out, nil
			},
			Patch: &Patch{Properties: s.discovery.properties(), Do: s.discovery.set},
		},
		{URI: https, Type: schema.TypeCertificateCollection, Name: "HTTPS Certificates", Members: Fixed("1")},
		{
			URI: https + "/1", Type: schema.TypeCertificate,
			Get: func(*Request) (schema.Object, error) {
				shown := s.certs.current()
				return certificate("HTTPS Certificate", shown.Certificate, shown.Leaf, "Web"), nil
			},
		},
	}
}

func (s *Service) certificateRoutes() []Route {
	text := func(name string) Property { return Property{Name: name, Kind: String, Max: 64} }
	target := func(v Values, name string) string {
		m, _ := v[name].(map[string]any)
		uri, _ := m["@odata.id"].(string)
		return strings.TrimSuffix(uri, "/")
	}
	kinds := []string{"PEM", "PEMchain"}
	return []Route{
		{
			URI: certificateServiceURI, Type: schema.TypeCertificateService,
			Get: func(*Request) (schema.Object, error) {
				return &schema.CertificateService{
					Resource: schema.Resource{Name: "Certificate Service"}, CertificateLocations: schema.LinkTo(certificateServiceURI + "/CertificateLocations"),
				}, nil
			},
			Actions: []Action{
				{
					Name: "CertificateService.GenerateCSR",
					Parameters: []Property{
						{Name: "CommonName", Kind: String, Required: true, Min: 1, Max: 64}, {Name: "CertificateCollection", Kind: Object, Required: true},
						text("Organization"), text("OrganizationalUnit"), text("City"), text("State"), {Name: "Country", Kind: String, Max: 2}, text("Email"),
						{Name: "AlternativeNames", Kind: StringArray}, {Name: "KeyUsage", Kind: StringArray},
						{Name: "KeyPairAlgorithm", Kind: String, Values: []string{"TPM_ALG_ECDSA", "TPM_ALG_RSA"}},
						{Name: "KeyCurveId", Kind: String, Values: []string{"TPM_ECC_NIST_P256", "TPM_ECC_NIST_P384"}},
						{Name: "KeyBitLength", Kind: Number, Min: 2048, Max: 4096},
					},
					Do: func(r *Request, v Values) (*Reply, error) {
						collection := target(v, "CertificateCollection")
						if s.certs.root == "" || collection != s.certs.root+"/HTTPS/Certificates" {
							return nil, Because(400, "ActionParameterValueError", "Certificates can be requested for the HTTPS certificates only.",
								"CertificateCollection", "CertificateService.GenerateCSR").about("CertificateCollection")
						}
						template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: v.String("CommonName")}}
						for name, list := range map[string]*[]string{
							"Organization": &template.Subject.Organization, "OrganizationalUnit": &template.Subject.OrganizationalUnit,
							"City": &template.Subject.Locality, "State": &template.Subject.Province, "Country": &template.Subject.Country, "Email": &template.EmailAddresses,
						} {
							if v.String(name) != "" {
								*list = []string{v.String(name)}
							}
						}
						names := v.Strings("AlternativeNames")
						if len(names) > 50 {
							return nil, checker{action: "CertificateService.GenerateCSR"}.bad("OutOfRange", strconv.Itoa(len(names)), "AlternativeNames")
						}
						for _, name := range names {
							if ip := net.ParseIP(name); ip != nil {
								template.IPAddresses = append(template.IPAddresses, ip)
							} else {
								template.DNSNames = append(template.DNSNames, name)
							}
						}
						key, err := newKey(v.String("KeyPairAlgorithm"), v.String("KeyCurveId"), v.Int("KeyBitLength"))
						if err != nil {
							return nil, err
						}
						csr, err := s.certs.request(template, key)
						if err != nil {
							return nil, err
						}
						return &Reply{Body: map[string]any{"CertificateCollection": schema.Link{ID: collection}, "CSRString": csr}}, nil
					},
				},
				{
					Name: "CertificateService.ReplaceCertificate",
					Parameters: []Property{
						{Name: "CertificateUri", Kind: Object, Required: true}, {Name: "CertificateString", Kind: String, Required: true, Max: maxCertificate},
						{Name: "CertificateType", Kind: String, Required: true, Values: kinds},
					},
					Do: func(r *Request, v Values) (*Reply, error) {
						uri := target(v, "CertificateUri")
						var err error
						switch take := s.certs.others[uri]; {
						case take != nil:
							err = takeChain(v.String("CertificateString"), take)
						case s.certs.root != "" && uri == s.certs.root+"/HTTPS/Certificates/1":
							err = s.certs.replace(v.String("CertificateString"))
						default:
							err = Because(400, "ActionParameterValueError", "There is no certificate there that can be replaced.",
								"CertificateUri", "CertificateService.ReplaceCertificate").about("CertificateUri")
						}
						if err != nil {
							return nil, err
						}
						s.Publish(Event{MessageID: resourceEvent + "ResourceChanged", Origin: uri})
						return &Reply{Status: 204, Location: uri}, nil
					},
				},
			},
		},
		{
			URI: certificateServiceURI + "/CertificateLocations", Type: schema.TypeCertificateLocations,
			Get: func(*Request) (schema.Object, error) {
				out := &schema.CertificateLocations{Resource: schema.Resource{Name: "Certificate Locations"}, Links: schema.CertificateLocationsLinks{Certificates: []schema.Link{}}}
				if s.certs.root != "" {
					out.Links.Certificates = append(out.Links.Certificates, schema.Link{ID: s.certs.root + "/HTTPS/Certificates/1"})
				}
				_, all := s.certs.authorities()
				for _, a := range all {
					out.Links.Certificates = append(out.Links.Certificates, schema.Link{ID: authoritiesURI + "/" + a.ID})
				}
				return out, nil
			},
		},
		{
			URI: authoritiesURI, Type: schema.TypeCertificateCollection, Name: "Authorities of Client Certificates",
			Members: func(*Request) (ids []string, err error) {
				_, all := s.certs.authorities()
				for _, a := range all {
					ids = append(ids, a.ID)
				}
				return ids, nil
			},
			Create: &Create{
				Properties: []Property{
					{Name: "CertificateString", Kind: String, Required: true, Max: maxCertificate}, {Name: "CertificateType", Kind: String, Required: true, Values: kinds[:1]},
				},
				Do: func(r *Request, v Values) (string, *Reply, error) {
					if !r.Caller.may(ConfigureUsers) { // an authority can speak for any user
						return "", nil, refuse(403, "InsufficientPrivilege")
					}
					id, err := s.certs.addAuthority(v.String("CertificateString"))
					return id, nil, err
				},
			},
		},
		{
			URI: authoritiesURI + "/{certificate}", Type: schema.TypeCertificate,
			Get: func(r *Request) (schema.Object, error) {
				_, all := s.certs.authorities()
				for _, a := range all {
					if a.ID == r.Param("certificate") {
						return certificate("Client Certificate Authority", [][]byte{a.cert.Raw}, a.cert, "Web"), nil
					}
				}
				return nil, ErrNotFound
			},
			Delete: func(r *Request) error { return s.certs.dropAuthority(r.Param("certificate")) },
		},
	}
}

// certificateFile is the certificate with its chain and key, in the state directory: one file, so that they change together.
const certificateFile = "tls.pem"

// loadCertificate returns the certificate of the state directory; if there is none, it makes and keeps one: ECDSA P-256, the
// cheapest for the many clients that shake hands for each request, self-signed, for clients to pin. If the vault does not open what is
// there, one is made that is not kept.
func (o *Options) loadCertificate(now time.Time) (tls.Certificate, error) {
	dir := o.StateDir
	if dir != "" {
		b, err := o.readKey(dir + "/" + certificateFile)
		if errors.As(err, new(vaultError)) {
			o.Logger.Error("the certificate's key cannot be opened here; another one is shown as long as this lasts", "err", err)
			dir, err = "", fs.ErrNotExist
		}
		if err == nil {
			cert, err := tls.X509KeyPair(b, b)
			if err != nil {
				return tls.Certificate{}, fmt.Errorf("load certificate: %w", err)
			}
			return cert, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return tls.Certificate{}, fmt.Errorf("load certificate: %w", err)
		}
	}
	certPEM, keyPEM, err := selfSigned(o.Names, now)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make certificate: %w", err)
	}
	if dir != "" {
		err := o.writeKey(dir+"/"+certificateFile, append(slices.Clone(certPEM), keyPEM...))
		if errors.As(err, new(vaultError)) {
			o.Logger.Error("the certificate's key cannot be kept", "err", err)
		} else if err != nil {
			return tls.Certificate{}, fmt.Errorf("store certificate: %w", err)
		}
	}
	return tls.X509KeyPair(certPEM, keyPEM)
}
