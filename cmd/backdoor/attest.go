package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// attestFlags are the flags of the verb attest.
type attestFlags struct {
	eks, aks, bundles list
	akCA              string
	epoch             uint64
	agreement         string
	akCAKey, as       string
	forDays           int
}

var attestVerb = verb{
	name:  "attest",
	short: "have the agent prove, by its machine's TPM, which image it runs",
	long: `The agent's machine measures into its TPM what it starts. The TPM signs that, with a nonce, and this command verifies the signature, replays the
event log, compares what was measured with bundles that are known, and makes sure that it is the attested agent at the other end of the connection.

Which TPM it is has to be told: by the fingerprint of its endorsement key (-ek), which it must then prove to have, of its attestation key (-ak), or by
an authority that has certified the latter (-ak-ca). Without any, the fingerprints are shown and nothing is believed.

The same can be asked for before every other verb: -attested FILE, or "attested" of a context, names a file with what has to be proven:

  {"endorsementKeys": ["9f86d0…"], "bundles": ["backdoor-1.4.bundle"], "epoch": 3}
  {"attestationCA": "tpm-ca.pem", "bundles": ["backdoor-1.4.bundle"], "epoch": 3}

The second one is for a fleet: one authority instead of each TPM's key. What makes the certificates is backdoor enroll.

  backdoor attest -host https://dpu7 -ek 9f86d0… -bundle backdoor-1.4.bundle
  backdoor attest -host https://dpu7                  # shows the keys of its TPM

Exit status: 0 proven, 3 something differs, 4 unattested: there is no TPM, or none that is trusted.`,
	flags: func(fs *flag.FlagSet, o *options) {
		f := &o.attest
		f.proof(fs)
		fs.Var(&f.aks, "ak", "`SHA-256` of a trusted attestation key; may be given several times")
		fs.StringVar(&f.agreement, "agreement", "", "`digest` of the access agreement that it must obey, as backdoor agreement show prints it")
	},
	run: runAttest,
}

// proof are the flags that attest and enroll share.
func (f *attestFlags) proof(fs *flag.FlagSet) {
	fs.Var(&f.eks, "ek", "`SHA-256` of a trusted TPM's endorsement key; may be given several times")
	fs.StringVar(&f.akCA, "ak-ca", "", "PEM `file` with the authority that certifies attestation keys")
	fs.Var(&f.bundles, "bundle", "update `file` whose image may run; may be given several times (default: any image)")
	fs.Uint64Var(&f.epoch, "epoch", 0, "lowest security `epoch` that may run")
}

var enrollVerb = verb{
	name:  "enroll",
	short: "certify the TPM of an agent's machine, so that monitors know it by an authority",
	long: `Once in a machine's life its owner compares the endorsement key of its TPM with what came with the machine. This command makes that
count for all monitors: the agent proves that its attestation key sits in the TPM with that key (TPM2_ActivateCredential), and what it runs, as for
backdoor attest; then the owner's authority certifies the attestation key, and the agent keeps the certificate and shows it from then on, in
Redfish, too (TrustedComponent). Monitors need only the authority's certificate: backdoor attest -ak-ca, or "attestationCA" in a file for -attested.

The certificate is one for attestation keys (TCG's extended key usage 2.23.133.8.3); no other certificate of the same authority is taken for one.
The authority's key is read here and goes nowhere. Any tool makes an authority:

  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 -subj "/CN=our TPMs" -keyout tpm-ca.key -out tpm-ca.pem
  backdoor enroll -host https://dpu7 -ek 9f86d0… -ak-ca tpm-ca.pem -ak-ca-key tpm-ca.key
  backdoor attest -host https://dpu7 -ak-ca tpm-ca.pem -bundle backdoor-1.4.bundle

Exit status: 0 certified, 3 something differs, 4 unattested.`,
	flags: func(fs *flag.FlagSet, o *options) {
		f := &o.attest
		f.proof(fs)
		fs.StringVar(&f.akCAKey, "ak-ca-key", "", "PEM `file` with the authority's key")
		fs.StringVar(&f.as, "as", "", "what the machine is called in the certificate (default: TPM and the endorsement key's first digits)")
		fs.IntVar(&f.forDays, "days", 365, "how many `days` the certificate is good for")
	},
	run: runEnroll,
}

func runEnroll(ctx context.Context, e *env, args []string) (int, error) {
	if err := none("enroll", args); err != nil {
		return 0, err
	}
	f := e.o.attest
	switch {
	case len(f.eks) == 0:
		return 0, &usageError{verb: "enroll", msg: "say which TPM it is, by its endorsement key: -ek (backdoor attest shows it, and its owner has to know it)"}
	case f.akCA == "" || f.akCAKey == "":
		return 0, &usageError{verb: "enroll", msg: "name the authority that is to certify it: -ak-ca and -ak-ca-key"}
	case f.forDays < 1:
		return 0, &usageError{verb: "enroll", msg: "-days: at least one"}
	}
	pair, err := tls.LoadX509KeyPair(f.akCA, f.akCAKey)
	if err != nil {
		return 0, fmt.Errorf("the authority: %w", err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return 0, fmt.Errorf("the authority: its key (%T) does not sign", pair.PrivateKey)
	}
	switch now := time.Now(); {
	case !pair.Leaf.IsCA:
		return 0, fmt.Errorf("the authority: %s is not an authority's certificate (CA:TRUE)", f.akCA)
	case now.After(pair.Leaf.NotAfter):
		return 0, fmt.Errorf("the authority: its certificate ended on %s", pair.Leaf.NotAfter.Format(time.DateOnly))
	}
	file, err := f.file("enroll")
	if err != nil {
		return 0, err
	}
	file.AttestationCA = "" // it has none yet, or an old one
	want, err := file.attestation()
	if err != nil {
		return 0, err
	}
	a, err := e.openAgent(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	var made *x509.Certificate
	got, err := a.c.Enroll(ctx, want, func(ak attest.Key, got *client.Attested) ([]byte, error) {
		name := f.as
		if name == "" {
			name = "TPM " + got.EndorsementKey.String()[:16]
		}
		der, err := attest.Certify(ak, name, pair.Leaf, key, time.Now(), time.Duration(f.forDays)*24*time.Hour)
		if err != nil {
			return nil, err
		}
		var text []byte
		for _, c := range append([][]byte{der}, pair.Certificate...) {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
		}
		made, err = x509.ParseCertificate(der)
		return text, err
	})
	var differs *attest.MismatchError
	switch {
	case errors.Is(err, client.ErrUnattested):
		return 0, &codeError{exitUnsure, err}
	case errors.As(err, &differs):
		return 0, &codeError{exitIll, err}
	case err != nil:
		return 0, e.explain(a.at, err)
	}
	out := struct {
		Name           string        `json:"name"`
		Issuer         string        `json:"issuer"`
		Until          time.Time     `json:"until"`
		EndorsementKey attest.Digest `json:"endorsementKey"`
		AttestationKey attest.Digest `json:"attestationKey"`
	}{made.Subject.CommonName, made.Issuer.CommonName, made.NotAfter, got.EndorsementKey, got.AttestationKey}
	return exitOK, e.answer(out, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s: certified by %s until %s\n", query.Clean(out.Name), query.Clean(out.Issuer), out.Until.Format(time.DateOnly))
		return err
	})
}

// An attestFile is the file that -attested names.
type attestFile struct {
	EndorsementKeys []attest.Digest `json:"endorsementKeys,omitempty"`
	AttestationKeys []attest.Digest `json:"attestationKeys,omitempty"`
	// AttestationCA and Bundles are files, relative to this one.
	AttestationCA string   `json:"attestationCA,omitempty"`
	Bundles       []string `json:"bundles,omitempty"`
	Epoch         uint64   `json:"epoch,omitempty"`
	// Agreement is the digest of the access agreement that the agent must obey.
	Agreement attest.Digest `json:"agreement,omitzero"`

	dir string
}

// file is what the flags of a verb say as a file would.
func (f attestFlags) file(verb string) (attestFile, error) {
	out := attestFile{AttestationCA: f.akCA, Bundles: f.bundles, Epoch: f.epoch}
	if f.agreement != "" {
		if err := out.Agreement.UnmarshalText([]byte(f.agreement)); err != nil {
			return out, &usageError{verb: verb, msg: fmt.Sprintf("-agreement %s: %v", f.agreement, err)}
		}
	}
	for _, k := range []struct {
		flag string
		from list
		to   *[]attest.Digest
	}{{"ek", f.eks, &out.EndorsementKeys}, {"ak", f.aks, &out.AttestationKeys}} {
		for _, text := range k.from {
			var d attest.Digest
			if err := d.UnmarshalText([]byte(text)); err != nil {
				return out, &usageError{verb: verb, msg: fmt.Sprintf("-%s %s: %v", k.flag, text, err)}
			}
			*k.to = append(*k.to, d)
		}
	}
	return out, nil
}

// readAttestFile reads the file that -attested names. One that trusts nothing is an error: with it, nobody could be believed.
func readAttestFile(path string) (client.Attestation, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return client.Attestation{}, err
	}
	var f attestFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return client.Attestation{}, fmt.Errorf("%s: %w", path, err)
	}
	f.dir = filepath.Dir(path)
	if len(f.EndorsementKeys)+len(f.AttestationKeys) == 0 && f.AttestationCA == "" {
		return client.Attestation{}, fmt.Errorf("%s: it trusts no key and no authority", path)
	}
	return f.attestation()
}

func (f attestFile) at(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(f.dir, path)
}

// attestation reads the files.
func (f attestFile) attestation() (client.Attestation, error) {
	a := client.Attestation{EndorsementKeys: f.EndorsementKeys, Policy: attest.Policy{Keys: f.AttestationKeys, Epoch: f.Epoch, Agreement: f.Agreement}}
	if f.AttestationCA != "" {
		pem, err := os.ReadFile(f.at(f.AttestationCA))
		if err != nil {
			return a, err
		}
		a.Policy.Roots = x509.NewCertPool()
		if !a.Policy.Roots.AppendCertsFromPEM(pem) {
			return a, fmt.Errorf("%s holds no PEM certificate", f.AttestationCA)
		}
	}
	for _, path := range f.Bundles {
		i, err := readImage(f.at(path))
		if err != nil {
			return a, fmt.Errorf("%s: %w", path, err)
		}
		a.Policy.Images = append(a.Policy.Images, i)
	}
	return a, nil
}

// readImage returns what a loader measures of a bundle. Who signed it is not asked: it is the operator's own file.
func readImage(path string) (attest.Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return attest.Image{}, err
	}
	defer f.Close()
	_, envelope, m, _, err := bundle.Read(f)
	if err != nil {
		return attest.Image{}, err
	}
	return handover.Image(envelope.Payload, m)
}

// An attestAnswer is the answer in JSON.
type attestAnswer struct {
	Attested       bool           `json:"attested"`
	Product        string         `json:"product,omitempty"`
	Version        string         `json:"version,omitempty"`
	Epoch          uint64         `json:"epoch,omitempty"`
	Resets         uint32         `json:"resets,omitempty"`
	EndorsementKey *attest.Digest `json:"endorsementKey,omitempty"`
	AttestationKey *attest.Digest `json:"attestationKey,omitempty"`
	Checks         []attestCheck  `json:"checks,omitempty"`
	Error          string         `json:"error,omitempty"`
}

type attestCheck struct {
	What  string `json:"what"`
	OK    bool   `json:"ok"`
	Found string `json:"found,omitempty"`
	Error string `json:"error,omitempty"`
}

func runAttest(ctx context.Context, e *env, args []string) (int, error) {
	if err := none("attest", args); err != nil {
		return 0, err
	}
	f, err := e.o.attest.file("attest")
	if err != nil {
		return 0, err
	}
	want, err := f.attestation()
	if err != nil {
		return 0, err
	}
	a, err := e.openAgent(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	got, err := a.c.Attest(ctx, want)
	trusts := len(f.EndorsementKeys)+len(f.AttestationKeys) > 0 || f.AttestationCA != ""
	code := exitOK
	var refused *client.Error
	switch {
	case errors.Is(err, client.ErrUnattested), err != nil && got != nil && !trusts:
		code = exitUnsure
	case err != nil && (got == nil || errors.As(err, &refused)):
		return 0, e.explain(a.at, err)
	case err != nil:
		code = exitIll
	}
	out := attestAnswer{Attested: err == nil}
	if got != nil {
		out.Product, out.Version, out.Epoch, out.Resets = got.Product, got.Version, got.Epoch, got.Resets
		if got.EndorsementKey != (attest.Digest{}) {
			out.EndorsementKey = &got.EndorsementKey
		}
		out.AttestationKey = &got.AttestationKey
		for _, c := range got.Checks {
			k := attestCheck{What: c.What, OK: c.Err == nil, Found: c.Got}
			if c.Err != nil {
				k.Error = c.Err.Error()
			}
			out.Checks = append(out.Checks, k)
		}
	}
	if err != nil {
		out.Error = err.Error()
	}
	return code, e.answer(out, func(w io.Writer) error { return attestText(w, out, trusts, colours(w)) })
}

// colours reports whether w is a terminal that shows colours.
func colours(w io.Writer) bool {
	f := file(w)
	if f == nil || os.Getenv("NO_COLOR") != "" {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}

func attestText(w io.Writer, a attestAnswer, trusts, colour bool) error {
	p := &lines{w: w}
	paint := func(good bool, s string) string {
		switch {
		case !colour:
			return s
		case good:
			return "\x1b[32m" + s + "\x1b[0m"
		}
		return "\x1b[31m" + s + "\x1b[0m"
	}
	for _, c := range a.Checks {
		if c.OK {
			p.printf("%s  %-16s %s\n", paint(true, "ok     "), c.What, query.Clean(c.Found))
		} else {
			p.printf("%s  %-16s %s\n", paint(false, "DIFFERS"), c.What, query.Clean(c.Error))
		}
	}
	switch {
	case a.Attested:
		p.printf("%s: %s %s, epoch %d, reset %d times\n", paint(true, "attested"), query.Clean(a.Product), query.Clean(a.Version), a.Epoch, a.Resets)
	case len(a.Checks) == 0:
		p.printf("%s: %s\n", paint(false, "not attested"), query.Clean(a.Error))
	default:
		p.printf("%s\n", paint(false, "not attested"))
	}
	if !trusts && a.AttestationKey != nil {
		if a.EndorsementKey != nil {
			p.printf("The TPM shows this endorsement key. If its owner tells you the same, trust it with -ek:\n  %s\n", a.EndorsementKey)
		}
		p.printf("Its attestation key, for -ak:\n  %s\n", a.AttestationKey)
	}
	return p.err
}
