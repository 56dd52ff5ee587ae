package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// A Quote is a TPM's signed statement about its PCRs.
type Quote struct {
	Attested  []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
}

// maxQuote bounds a quote: TPMS_ATTEST and TPMT_SIGNATURE of every algorithm of today are far shorter.
const maxQuote = 4096

// MarshalBinary returns TPM2B_ATTEST and TPMT_SIGNATURE, as TPM2_Quote returns them and Redfish's
// TPMGetSignedMeasurementsResponse carries them.
func (q Quote) MarshalBinary() ([]byte, error) {
	if len(q.Attested)+len(q.Signature) > maxQuote {
		return nil, fmt.Errorf("a quote of %d bytes", len(q.Attested)+len(q.Signature))
	}
	return append(tpm2.Marshal(tpm2.TPM2BData{Buffer: q.Attested}), q.Signature...), nil
}

// ParseQuote is the reverse.
func ParseQuote(b []byte) (Quote, error) {
	if len(b) < 2 || len(b) > maxQuote {
		return Quote{}, fmt.Errorf("a quote of %d bytes", len(b))
	}
	n := int(b[0])<<8 | int(b[1])
	if n > len(b)-2 {
		return Quote{}, errors.New("the quote is cut off")
	}
	q := Quote{Attested: bytes.Clone(b[2 : 2+n]), Signature: bytes.Clone(b[2+n:])}
	if _, err := q.statement(); err != nil {
		return Quote{}, err
	}
	if _, err := q.der(); err != nil {
		return Quote{}, err
	}
	return q, nil
}

// A statement is what a quote says.
type statement struct {
	nonce  []byte
	pcrs   []int
	digest []byte
	resets uint32
}

// generated is TPM_GENERATED_VALUE: what a TPM puts before each of its own statements, and signs nothing else with.
const generated = 0xff544347

func (q Quote) statement() (s statement, err error) {
	defer func() {
		if recover() != nil { // go-tpm's decoder, on lengths that do not fit
			err = errors.New("the quote's statement is malformed")
		}
	}()
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](q.Attested)
	if err != nil {
		return s, fmt.Errorf("the quote's statement is malformed: %w", err)
	}
	if a.Magic != generated {
		return s, errors.New("the statement was not made by a TPM")
	}
	if a.Type != tpm2.TPMSTAttestQuote {
		return s, fmt.Errorf("the statement is of type %#x, and no quote", a.Type)
	}
	info, err := a.Attested.Quote()
	if err != nil {
		return s, fmt.Errorf("the quote's statement is malformed: %w", err)
	}
	if n := len(info.PCRSelect.PCRSelections); n != 1 {
		return s, fmt.Errorf("the quote is over %d banks of PCRs, not one", n)
	}
	bank := info.PCRSelect.PCRSelections[0]
	if bank.Hash != tpm2.TPMAlgSHA256 {
		return s, fmt.Errorf("the quote is over PCRs of algorithm %#x, not SHA-256", bank.Hash)
	}
	for i := range 8 * len(bank.PCRSelect) {
		if bank.PCRSelect[i/8]&(1<<(i%8)) != 0 {
			s.pcrs = append(s.pcrs, i)
		}
	}
	s.nonce, s.digest = a.ExtraData.Buffer, info.PCRDigest.Buffer
	s.resets = a.ClockInfo.ResetCount
	return s, nil
}

// der is the signature as crypto/ecdsa has it.
func (q Quote) der() (sig []byte, err error) {
	defer func() {
		if recover() != nil {
			err = errors.New("the quote's signature is malformed")
		}
	}()
	s, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
	if err != nil {
		return nil, fmt.Errorf("the quote's signature is malformed: %w", err)
	}
	if s.SigAlg != tpm2.TPMAlgECDSA {
		return nil, fmt.Errorf("the quote is signed with algorithm %#x, not ECDSA", s.SigAlg)
	}
	e, err := s.Signature.ECDSA()
	if err != nil || e.Hash != tpm2.TPMAlgSHA256 || len(e.SignatureR.Buffer) > 32 || len(e.SignatureS.Buffer) > 32 {
		return nil, errors.New("the quote's signature is not one by ECDSA P-256 with SHA-256")
	}
	return derSignature(*s)
}

// Evidence is what an agent shows.
type Evidence struct {
	Nonce []byte // that the verifier sent
	Quote Quote
	Log   []byte // see [Log.MarshalBinary]
	// AK is the attestation key, and Certificates its chain (DER), the key's own first; the chain may be empty.
	AK           Key
	Certificates [][]byte
	// PeerKey is the SHA-256 of the SubjectPublicKeyInfo of the key that the agent's TLS connection has shown.
	PeerKey Digest
}

// A Policy says what a verifier wants to see. What is zero is not checked, but one of Keys and Roots must be there: a quote by
// just any key proves nothing.
type Policy struct {
	// Keys are fingerprints of attestation keys that are trusted: pinned, or proven by a challenge to sit beside a trusted
	// endorsement key.
	Keys []Digest
	// Roots are authorities whose certificates for attestation keys are trusted.
	Roots *x509.CertPool
	// Images are the images that may run; the running one must be one of them, in all that was measured.
	Images []Image
	// Epoch is the lowest security epoch that a running image may have.
	Epoch uint64
	// Agreement is the digest of the access agreement that the agent must obey; zero leaves that open.
	Agreement Digest
	// Now is the time that certificates are judged by; zero means time.Now.
	Now time.Time
}

// A Check is one thing that was verified.
type Check struct {
	What string // "signature", "nonce", …
	Got  string // what was found, for people
	Err  error  // nil if it is as it should be
}

// A Result is what a verification found out. It may be believed only if Verify returned no error.
type Result struct {
	Checks []Check
	// Image is what runs, by its own measured manifest.
	Image   Image
	Product string // of the manifest
	Version string
	Epoch   uint64
	// Resets is how often the TPM was reset, that is, how often the machine was powered on or reset.
	Resets uint32
}

// A MismatchError names what is not as it should be.
type MismatchError struct {
	What      string // which check
	Got, Want string
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("%s: got %s; want %s", e.What, e.Got, e.Want)
}

// Manifest are the parts of an image's manifest that a verifier needs; package bundle knows the rest.
type manifestFields struct {
	Product string `json:"product"`
	Version string `json:"version"`
	Epoch   uint64 `json:"epoch"`
}

// Verify judges evidence. Its error joins all that is wrong, so that a person sees the whole of it; the result's checks
// say what was right.
func Verify(e Evidence, p Policy) (Result, error) {
	var r Result
	var errs []error
	check := func(what, got string, err error) {
		r.Checks = append(r.Checks, Check{what, got, err})
		if err != nil {
			errs = append(errs, err)
		}
	}
	differs := func(what, got, want string) error { return &MismatchError{what, got, want} }

	if e.AK.Public == nil {
		return r, errors.New("there is no attestation key in the evidence")
	}
	got, err := e.trust(p)
	check("attestation key", got, err)

	s, err := e.Quote.statement()
	if err != nil {
		check("quote", "", err)
		return r, errors.Join(errs...)
	}
	sig, err := e.Quote.der()
	sum := sha256.Sum256(e.Quote.Attested)
	if err == nil && !ecdsa.VerifyASN1(e.AK.Public, sum[:], sig) {
		err = differs("quote signature", "one that the attestation key did not make", "its own")
	}
	check("quote signature", "ECDSA P-256", err)
	err = nil
	if len(e.Nonce) < 16 {
		err = fmt.Errorf("nonce: %d bytes can be guessed; want 16 at least", len(e.Nonce))
	} else if !bytes.Equal(s.nonce, e.Nonce) {
		err = differs("nonce", fmt.Sprintf("%x", s.nonce), fmt.Sprintf("%x", e.Nonce))
	}
	check("nonce", "fresh", err)
	r.Resets = s.resets

	log, err := ParseLog(e.Log)
	if err != nil {
		check("event log", "", err)
		return r, errors.Join(errs...)
	}
	h := sha256.New()
	for _, pcr := range s.pcrs {
		d := log.Replay(pcr)
		h.Write(d[:])
	}
	err = nil
	if digest := h.Sum(nil); !bytes.Equal(digest, s.digest) {
		err = differs("event log", fmt.Sprintf("events that give PCRs %v the digest %x", s.pcrs, digest), fmt.Sprintf("%x, which the TPM signed", s.digest))
	}
	for _, pcr := range []int{ImagePCR, IdentityPCR} {
		if !slices.Contains(s.pcrs, pcr) {
			err = errors.Join(err, differs("quote", fmt.Sprintf("PCRs %v", s.pcrs), fmt.Sprintf("PCR %d among them", pcr)))
		}
	}
	check("event log", fmt.Sprintf("%d events replay to the quoted PCRs %v", len(log), s.pcrs), err)

	image, ok := log.Image()
	var m manifestFields
	if ok {
		if err := json.Unmarshal(image.Manifest, &m); err != nil {
			check("manifest", "", fmt.Errorf("the measured manifest: %w", err))
		}
		r.Image, r.Product, r.Version, r.Epoch = image, m.Product, m.Version, m.Epoch
		check("image", fmt.Sprintf("%s %s, epoch %d", m.Product, m.Version, m.Epoch), known(log, image, p.Images))
	} else {
		check("image", "", differs("image", "an event log without a measured manifest", "one: a loader that measures what it starts"))
	}
	err = nil
	if ok && m.Epoch < p.Epoch {
		err = differs("epoch", fmt.Sprint(m.Epoch), fmt.Sprintf("%d or later", p.Epoch))
	}
	check("epoch", fmt.Sprintf("%d, at least %d is asked for", m.Epoch, p.Epoch), err)

	spki, ok := log.TLSKey()
	err = nil
	switch {
	case !ok:
		err = differs("TLS key", "an event log without one", "that of the connection, "+e.PeerKey.String())
	case spki != e.PeerKey:
		err = differs("TLS key", e.PeerKey.String()+" on the connection", spki.String()+", which the attested agent has: somebody is in between")
	}
	check("TLS key", "the connection ends in the attested agent", err)

	agreed, ok := log.Agreement()
	said := agreed.String()
	if !ok || agreed == (Digest{}) {
		said = "none"
	}
	err = nil
	if p.Agreement != (Digest{}) && agreed != p.Agreement {
		err = differs("access agreement", said, p.Agreement.String())
	}
	check("access agreement", said, err)
	return r, errors.Join(errs...)
}

// trust says why the attestation key is trusted.
func (e Evidence) trust(p Policy) (string, error) {
	f := e.AK.Fingerprint()
	if slices.Contains(p.Keys, f) {
		return f.String() + ", trusted by its fingerprint", nil
	}
	if p.Roots == nil {
		if len(p.Keys) == 0 {
			return f.String(), errors.New("attestation key: the policy trusts no key and no authority, so nothing can be proven")
		}
		return f.String(), &MismatchError{"attestation key", f.String(), "one of the trusted keys"}
	}
	if len(e.Certificates) == 0 {
		return f.String(), &MismatchError{"attestation key", "no certificate", "one by a trusted authority"}
	}
	leaf, err := x509.ParseCertificate(e.Certificates[0])
	if err != nil {
		return f.String(), fmt.Errorf("attestation key: its certificate: %w", err)
	}
	if !e.AK.Public.Equal(leaf.PublicKey) {
		return f.String(), &MismatchError{"attestation key", f.String(), "the key of its certificate"}
	}
	between := x509.NewCertPool()
	for _, der := range e.Certificates[1:min(len(e.Certificates), 8)] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return f.String(), fmt.Errorf("attestation key: its certificate chain: %w", err)
		}
		between.AddCert(c)
	}
	now := p.Now
	if now.IsZero() {
		now = time.Now()
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: p.Roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return f.String(), fmt.Errorf("attestation key: its certificate chain: %w", err)
	}
	if err := CheckCertificate(leaf, e.AK); err != nil {
		return f.String(), fmt.Errorf("attestation key: its certificate: %w", err)
	}
	return f.String() + ", certified by " + leaf.Issuer.CommonName, nil
}

// known compares what was measured with the images that may run.
func known(l Log, got Image, want []Image) error {
	if len(want) == 0 {
		return nil
	}
	var closest error
	for _, w := range want {
		if l.Replay(ImagePCR) == w.PCR() {
			return nil
		}
		err := compare(got, w)
		if closest == nil || bytes.Equal(got.Manifest, w.Manifest) {
			closest = err
		}
	}
	return closest
}

// compare names the first thing that differs between two images whose PCRs do.
func compare(got, want Image) error {
	gm, wm := Digest(sha256.Sum256(got.Manifest)), Digest(sha256.Sum256(want.Manifest))
	describe := func(m []byte, d Digest) string {
		var f manifestFields
		if json.Unmarshal(m, &f) != nil {
			return d.String()
		}
		return fmt.Sprintf("%s %s, epoch %d (manifest %.16s)", f.Product, f.Version, f.Epoch, d)
	}
	if gm != wm {
		return &MismatchError{"image", describe(got.Manifest, gm), describe(want.Manifest, wm)}
	}
	digests := func(parts []Part) map[string]Digest {
		m := map[string]Digest{}
		for _, p := range parts {
			m[p.Name] = p.SHA256
		}
		return m
	}
	measured := digests(got.Parts)
	for _, p := range want.Parts {
		d, ok := measured[p.Name]
		if !ok {
			return &MismatchError{"image part " + p.Name, "nothing measured", p.SHA256.String()}
		}
		if d != p.SHA256 {
			return &MismatchError{"image part " + p.Name, d.String(), p.SHA256.String()}
		}
	}
	var names []string
	for _, p := range got.Parts {
		names = append(names, p.Name)
	}
	return &MismatchError{"image", "measurements of " + strings.Join(names, ", ") + ", in an order or number that the image does not have", "the image's alone"}
}
