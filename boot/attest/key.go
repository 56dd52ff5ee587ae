package attest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// A Key is the public half of a TPM's endorsement or attestation key. Both have ECC P-256 and a known template, so the point is
// all that needs to be told.
type Key struct {
	// Public is the key itself.
	Public *ecdsa.PublicKey

	template func() tpm2.TPMTPublic
}

func newKey(p tpm2.TPMTPublic) (Key, error) {
	parms, err := p.Parameters.ECCDetail()
	if err != nil {
		return Key{}, fmt.Errorf("read the TPM's key: %w", err)
	}
	point, err := p.Unique.ECC()
	if err != nil {
		return Key{}, fmt.Errorf("read the TPM's key: %w", err)
	}
	public, err := tpm2.ECDSAPub(parms, point)
	if err != nil {
		return Key{}, fmt.Errorf("read the TPM's key: %w", err)
	}
	if p.ObjectAttributes.SignEncrypt {
		return AttestationKey(public)
	}
	return EndorsementKey(public)
}

// AttestationKey is the attestation key with that point.
func AttestationKey(p *ecdsa.PublicKey) (Key, error) { return keyOf(p, akTemplate) }

// EndorsementKey is the endorsement key with that point.
func EndorsementKey(p *ecdsa.PublicKey) (Key, error) {
	return keyOf(p, func() tpm2.TPMTPublic { return tpm2.ECCEKTemplate })
}

func keyOf(p *ecdsa.PublicKey, template func() tpm2.TPMTPublic) (Key, error) {
	if p.Curve != elliptic.P256() {
		return Key{}, errors.New("the TPM's key is not on P-256")
	}
	if _, err := p.ECDH(); err != nil { // also says whether the point is on the curve
		return Key{}, fmt.Errorf("the TPM's key: %w", err)
	}
	return Key{p, template}, nil
}

// public is the key's public area in the TPM.
func (k Key) public() tpm2.TPMTPublic {
	t := k.template()
	point, err := k.Public.Bytes() // 4, X, Y (SEC 1, section 2.3.3)
	if err != nil {
		panic(err) // keyOf has looked at it
	}
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]},
		Y: tpm2.TPM2BECCParameter{Buffer: point[33:65]},
	})
	return t
}

// name is the key's name in the TPM: its algorithm and the hash of its public area, attributes included.
func (k Key) name() []byte {
	p := k.public()
	n, err := tpm2.ObjectName(&p)
	if err != nil {
		panic(err) // the template is ours
	}
	return n.Buffer
}

// Fingerprint is the SHA-256 of the key's SubjectPublicKeyInfo: what an operator pins.
func (k Key) Fingerprint() Digest {
	der, err := x509.MarshalPKIXPublicKey(k.Public)
	if err != nil {
		panic(err) // it is an ECDSA key on P-256
	}
	return sha256.Sum256(der)
}

// PEM is the key as a PEM block PUBLIC KEY.
func (k Key) PEM() string {
	der, err := x509.MarshalPKIXPublicKey(k.Public)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// ParsePublicKey reads the only PEM block PUBLIC KEY in text, which must be an ECDSA key.
func ParsePublicKey(text string) (*ecdsa.PublicKey, error) {
	b, _ := pem.Decode([]byte(text))
	if b == nil || b.Type != "PUBLIC KEY" {
		return nil, errors.New("no PEM block PUBLIC KEY")
	}
	k, err := x509.ParsePKIXPublicKey(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	e, ok := k.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("public key: %T is not an ECDSA key", k)
	}
	return e, nil
}

// A Challenge can be answered only by the TPM that has both the endorsement key and the attestation key that it was made for.
type Challenge struct {
	Credential []byte // TPMS_ID_OBJECT
	Secret     []byte // TPMS_ECC_POINT, the encrypted seed
}

// NewChallenge makes a challenge and the answer to it (TPM 2.0 library, part 1, section 24, "credential protection").
func NewChallenge(ek, ak Key) (c Challenge, answer []byte, err error) {
	p := ek.public()
	to, err := tpm2.ImportEncapsulationKey(&p)
	if err != nil {
		return Challenge{}, nil, fmt.Errorf("make a challenge: %w", err)
	}
	answer = make([]byte, 32)
	rand.Read(answer)
	c.Credential, c.Secret, err = tpm2.CreateCredential(rand.Reader, to, ak.name(), answer)
	if err != nil {
		return Challenge{}, nil, fmt.Errorf("make a challenge: %w", err)
	}
	return c, answer, nil
}

// A signer is the attestation key as x509.CreateCertificate wants it.
type signer struct {
	t      *TPM
	public *ecdsa.PublicKey
}

func (s signer) Public() crypto.PublicKey { return s.public }

// SignMessage is crypto.MessageSigner's: the TPM wants to see what a restricted key signs.
func (s signer) SignMessage(_ io.Reader, msg []byte, _ crypto.SignerOpts) ([]byte, error) {
	return s.t.sign(msg)
}

func (s signer) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the attestation key signs whole messages only")
}

// Certificate makes a self-signed certificate (DER) of the attestation key. It proves possession, nothing more; an owner's
// certificate authority may replace it by one that says whose TPM this is.
func (t *TPM) Certificate(now time.Time) ([]byte, error) {
	ak, err := t.AttestationKey()
	if err != nil {
		return nil, err
	}
	f := ak.Fingerprint()
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(f[:16]),
		Subject:      pkix.Name{CommonName: "TPM attestation key " + f.String()[:16]},
		NotBefore:    now.Add(-24 * time.Hour), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280, 4.1.2.5: no end
		KeyUsage: x509.KeyUsageDigitalSignature, SignatureAlgorithm: x509.ECDSAWithSHA256,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, ak.Public, signer{t, ak.Public})
	if err != nil {
		return nil, fmt.Errorf("make the attestation key's certificate: %w", err)
	}
	return der, nil
}

// certificatePurpose is tcg-kp-AIKCertificate: the extended key usage of certificates for attestation keys (TCG EK Credential Profile for TPM
// Family 2.0, 2.6, section 3.2.16 names the identifiers). Without it, each server's certificate of the same authority would do.
var certificatePurpose = asn1.ObjectIdentifier{2, 23, 133, 8, 3}

// Certify makes the certificate (DER) by which an owner's authority says of an attestation key that it sits in a known TPM. The
// name is what the owner calls that. The certificate does not outlive the authority's own.
//
// Precondition: the TPM has proven that it has the key ([NewChallenge]).
func Certify(ak Key, name string, authority *x509.Certificate, key crypto.Signer, from time.Time, valid time.Duration) ([]byte, error) {
	if !authority.IsCA {
		return nil, errors.New("certify the attestation key: the authority's certificate is not one of an authority")
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] &= 0x7f // RFC 5280, 4.1.2.2: positive
	until := from.Add(valid)
	if until.After(authority.NotAfter) {
		until = authority.NotAfter
	}
	if !until.After(from) {
		return nil, fmt.Errorf("certify the attestation key: the authority's certificate ended on %s", authority.NotAfter.Format(time.DateOnly))
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: from.Add(-time.Hour), NotAfter: until, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, UnknownExtKeyUsage: []asn1.ObjectIdentifier{certificatePurpose},
	}, authority, ak.Public, key)
	if err != nil {
		return nil, fmt.Errorf("certify the attestation key: %w", err)
	}
	return der, nil
}

// CheckCertificate says whether a certificate is one that [Certify] could have made for the key. Who has signed it is not asked.
func CheckCertificate(c *x509.Certificate, ak Key) error {
	switch {
	case !ak.Public.Equal(c.PublicKey):
		return errors.New("it is another key's than the attestation key's")
	case !slices.ContainsFunc(c.UnknownExtKeyUsage, certificatePurpose.Equal):
		return fmt.Errorf("it is not one for attestation: it lacks the extended key usage %v", certificatePurpose)
	}
	return nil
}

// derSignature is an ECDSA signature of the TPM as X.509 has it.
func derSignature(s tpm2.TPMTSignature) ([]byte, error) {
	e, err := s.Signature.ECDSA()
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(e.SignatureR.Buffer), new(big.Int).SetBytes(e.SignatureS.Buffer),
	})
}
