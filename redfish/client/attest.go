package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// ErrUnattested means that an agent has no means to prove what it runs: its machine has no TPM that works. It is neither good nor bad.
var ErrUnattested = errors.New("the agent is unattested: its machine has no TPM that works, so it cannot prove what it runs")

// Attestation says what an agent has to prove before it is believed.
type Attestation struct {
	// Policy is what the proof is judged by. Its Keys are completed by the endorsement keys' proof.
	Policy attest.Policy
	// EndorsementKeys are the fingerprints of the TPMs' endorsement keys that are trusted. The agent's TPM is asked to prove that it has
	// one of them, beside the key that it attests with.
	EndorsementKeys []attest.Digest
}

// An Attested is what an agent has proven.
type Attested struct {
	attest.Result
	// EndorsementKey and AttestationKey are the fingerprints of the TPM's keys, whether they are trusted or not: what to compare with the
	// TPM's owner, and then to pin.
	EndorsementKey, AttestationKey attest.Digest
}

const integrityURI = "/redfish/v1/ComponentIntegrity"

// Attest has the agent prove what it runs: with a fresh nonce, over the very connections that this client uses. On success the client speaks to no
// other key than the attested one any more. On an error, what is known of the agent is returned beside it; [ErrUnattested] says that
// it has no TPM.
func (c *Client) Attest(ctx context.Context, want Attestation) (*Attested, error) {
	ctx = context.WithValue(ctx, proving{}, true)
	got, err := c.attest(ctx, want)
	if err != nil {
		return got, fmt.Errorf("attest: %w", err)
	}
	return got, nil
}

// tpm returns the agent's TPM as it is now.
func (c *Client) tpm(ctx context.Context) (*schema.ComponentIntegrity, error) {
	for i, err := range Members[schema.ComponentIntegrity](ctx, c, integrityURI) {
		var e *Error
		if errors.As(err, &e) && e.Status == 404 {
			return nil, ErrUnattested // an agent from before there was attestation
		}
		if err != nil {
			return nil, err
		}
		if i.Type == "TPM" && i.Enabled && (starting(&i) || i.TPM != nil && i.TPM.IdentityAuthentication != nil && i.TPM.IdentityAuthentication.ComponentCertificate != nil) {
			return &i, nil
		}
	}
	return nil, ErrUnattested
}

func starting(i *schema.ComponentIntegrity) bool {
	return i.Status != nil && i.Status.State == schema.StateStarting
}

// An agent that has just started may need some seconds until its TPM is ready.
const (
	tpmEvery = 250 * time.Millisecond
	tpmWait  = 30 * time.Second
)

func (c *Client) attest(ctx context.Context, want Attestation) (*Attested, error) {
	component, err := c.tpm(ctx)
	for late := time.Now().Add(tpmWait); err == nil && starting(component); component, err = c.tpm(ctx) {
		if time.Now().After(late) {
			return nil, fmt.Errorf("the agent's TPM is still starting after %v", tpmWait)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(tpmEvery):
		}
	}
	if err != nil {
		return nil, err
	}
	quoteAction, ok := component.Actions["#ComponentIntegrity.TPMGetSignedMeasurements"]
	if !ok {
		return nil, errors.New("the service offers no signed measurements")
	}
	var trusted schema.TrustedComponent
	if err := c.Get(ctx, component.TargetComponentURI, &trusted); err != nil {
		return nil, err
	}
	logAction, ok := trusted.Actions["#TrustedComponent.TPMGetEventLog"]
	if !ok {
		return nil, errors.New("the service offers no event log")
	}
	ak := component.TPM.IdentityAuthentication.ComponentCertificate.ID
	var cert schema.Certificate
	if err := c.Get(ctx, ak, &cert); err != nil {
		return nil, err
	}
	e := attest.Evidence{Nonce: make([]byte, attest.MaxNonce)}
	if e.AK, e.Certificates, err = parseChain(cert.CertificateString); err != nil {
		return nil, fmt.Errorf("the attestation key's certificate: %w", err)
	}
	out := &Attested{AttestationKey: e.AK.Fingerprint()}
	policy := want.Policy
	policy.Keys = slices.Clone(policy.Keys)
	if err := c.endorsed(ctx, &trusted, e.AK, want.EndorsementKeys, out, &policy); err != nil {
		return out, err
	}
	rand.Read(e.Nonce)
	var signed schema.SignedMeasurements
	resp, err := c.Post(ctx, quoteAction.Target, map[string]any{
		"Certificate": schema.Link{ID: ak}, "Nonce": hex.EncodeToString(e.Nonce),
		"PCRSelection": base64.StdEncoding.EncodeToString(attest.Selection(attest.ImagePCR, attest.IdentityPCR)),
		"Scheme":       base64.StdEncoding.EncodeToString(attest.Scheme()),
	}, &signed)
	if err != nil {
		return out, err
	}
	b, err := base64.StdEncoding.DecodeString(signed.SignedMeasurements)
	if err != nil {
		return out, fmt.Errorf("signed measurements: %w", err)
	}
	if e.Quote, err = attest.ParseQuote(b); err != nil {
		return out, err
	}
	var log schema.EventLog
	if _, err := c.Post(ctx, logAction.Target, nil, &log); err != nil {
		return out, err
	}
	if e.Log, err = base64.StdEncoding.DecodeString(log.EventLog); err != nil {
		return out, fmt.Errorf("event log: %w", err)
	}
	e.PeerKey = resp.PeerKey
	if out.Result, err = attest.Verify(e, policy); err != nil {
		return out, err
	}
	c.attested.Store(&e.PeerKey)
	return out, nil
}

// Enroll gives the agent's TPM a certificate for its attestation key, by which others can know it: the agent proves what want says, which must
// trust its TPM by its endorsement key, issue makes the certificate (PEM, with the chain up to the authority), and the agent keeps it.
func (c *Client) Enroll(ctx context.Context, want Attestation, issue func(attest.Key, *Attested) ([]byte, error)) (*Attested, error) {
	if len(want.EndorsementKeys) == 0 {
		return nil, errors.New("enroll: the TPM has to be known by its endorsement key")
	}
	got, err := c.Attest(ctx, want)
	if err != nil {
		return got, fmt.Errorf("enroll: %w", err)
	}
	ctx = context.WithValue(ctx, proving{}, true)
	component, err := c.tpm(ctx)
	if err == nil && starting(component) {
		err = errors.New("the agent has started anew since it was attested")
	}
	if err != nil {
		return got, fmt.Errorf("enroll: %w", err)
	}
	at := component.TPM.IdentityAuthentication.ComponentCertificate.ID
	var cert schema.Certificate
	if err := c.Get(ctx, at, &cert); err != nil {
		return got, fmt.Errorf("enroll: %w", err)
	}
	ak, _, err := parseChain(cert.CertificateString)
	if err == nil && ak.Fingerprint() != got.AttestationKey {
		err = errors.New("the attestation key has become another one since it was proven")
	}
	if err != nil {
		return got, fmt.Errorf("enroll: %w", err)
	}
	text, err := issue(ak, got)
	if err != nil {
		return got, fmt.Errorf("enroll: %w", err)
	}
	if _, err := c.Post(ctx, "/redfish/v1/CertificateService/Actions/CertificateService.ReplaceCertificate", map[string]any{
		"CertificateUri": schema.Link{ID: at}, "CertificateString": string(text), "CertificateType": "PEMchain",
	}, nil); err != nil {
		return got, fmt.Errorf("enroll: hand the certificate over: %w", err)
	}
	return got, nil
}

// endorsed has the TPM prove that its endorsement key, if that is one of the trusted ones, sits beside the attestation key, and then trusts the
// latter.
func (c *Client) endorsed(ctx context.Context, t *schema.TrustedComponent, ak attest.Key, want []attest.Digest, out *Attested, p *attest.Policy) error {
	var own struct{ EndorsementKey string }
	if ok, err := OEM(t.OEM, &own); err != nil || !ok {
		if len(want) > 0 {
			return errors.Join(errors.New("the service shows no endorsement key"), err)
		}
		return nil
	}
	point, err := attest.ParsePublicKey(own.EndorsementKey)
	if err != nil {
		return fmt.Errorf("endorsement key: %w", err)
	}
	ek, err := attest.EndorsementKey(point)
	if err != nil {
		return err
	}
	out.EndorsementKey = ek.Fingerprint()
	if !slices.Contains(want, out.EndorsementKey) {
		if len(want) > 0 {
			return &attest.MismatchError{What: "endorsement key", Got: out.EndorsementKey.String(), Want: "one of the trusted keys"}
		}
		return nil
	}
	action, ok := t.Actions["#BackdoorTrustedComponent.ActivateCredential"]
	if !ok {
		return errors.New("the service cannot prove that it has the endorsement key")
	}
	challenge, answer, err := attest.NewChallenge(ek, ak)
	if err != nil {
		return err
	}
	var got struct{ CertInfo string }
	if _, err := c.Post(ctx, action.Target, map[string]string{
		"CredentialBlob": base64.StdEncoding.EncodeToString(challenge.Credential), "Secret": base64.StdEncoding.EncodeToString(challenge.Secret),
	}, &got); err != nil {
		return fmt.Errorf("the endorsement key's proof: %w", err)
	}
	b, err := hex.DecodeString(got.CertInfo)
	if err != nil || subtle.ConstantTimeCompare(b, answer) != 1 {
		return &attest.MismatchError{What: "endorsement key's proof", Got: "a wrong answer", Want: "that of the TPM with the endorsement key"}
	}
	p.Keys = append(p.Keys, ak.Fingerprint())
	return nil
}

// parseChain reads the attestation key and its certificate chain from PEM.
func parseChain(text string) (ak attest.Key, chain [][]byte, err error) {
	for rest := []byte(text); len(chain) < 8; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		chain = append(chain, b.Bytes)
	}
	if len(chain) == 0 {
		return ak, nil, errors.New("no PEM block")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return ak, nil, err
	}
	point, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return ak, nil, fmt.Errorf("%T is not an ECDSA key", leaf.PublicKey)
	}
	ak, err = attest.AttestationKey(point)
	return ak, chain, err
}

// spki is the SHA-256 of a certificate's SubjectPublicKeyInfo.
func spki(cert *x509.Certificate) attest.Digest { return sha256.Sum256(cert.RawSubjectPublicKeyInfo) }

// proving marks the requests of the proof itself.
type proving struct{}

// believe has the service prove what it runs, once, if the configuration asks for that.
func (c *Client) believe(ctx context.Context) error {
	if c.o.Attestation == nil || ctx.Value(proving{}) != nil {
		return nil
	}
	c.proof.Lock()
	defer c.proof.Unlock()
	if c.attested.Load() != nil {
		return nil
	}
	_, err := c.Attest(ctx, *c.o.Attestation)
	return err
}

// sameAsAttested refuses every key but the attested one, once there is one.
func (c *Client) sameAsAttested(state tls.ConnectionState) error {
	want := c.attested.Load()
	if want == nil {
		return nil
	}
	if got := spki(state.PeerCertificates[0]); got != *want {
		return &attest.MismatchError{What: "TLS key", Got: got.String(), Want: "that of the agent that has attested, " + want.String()}
	}
	return nil
}
