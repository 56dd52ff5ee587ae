package access

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// maxDocument bounds what Load reads, in bytes.
const maxDocument = 64 << 10

// maxNamed bounds the size of a symbol, in bytes: no kernel's image is larger.
const maxNamed = 1 << 30

// domain keeps a signature under an agreement from meaning anything under another kind of document.
const domain = "backdoor access agreement v1\n"

var (
	// ErrInvalid means that the document is not an agreement that this version understands.
	ErrInvalid = errors.New("invalid document")
	// ErrUnsigned means that a signature that is needed is missing or wrong.
	ErrUnsigned = errors.New("access agreement is not properly signed")

	uuidForm   = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	digestForm = regexp.MustCompile(`^[0-9a-f]{64}$`)
	idForm     = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
	watchForm  = regexp.MustCompile(`^(policy/)?[a-z0-9][a-z0-9._-]{0,63}$`)
	symbolForm = regexp.MustCompile(`^[A-Za-z0-9._$]{1,255}$`)
)

// Canonical returns the bytes that are signed: everything but the signatures, in one form only.
func (a *Agreement) Canonical() ([]byte, error) {
	c := *a
	c.Signatures, c.Endorsements = nil, nil
	c.ValidFrom, c.ValidUntil = c.ValidFrom.UTC(), c.ValidUntil.UTC()
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("canonical form of the agreement: %w", err)
	}
	return append([]byte(domain), b...), nil
}

// Digest names the agreement: the SHA-256 of its canonical bytes, in hexadecimal.
func (a *Agreement) Digest() (string, error) {
	c, err := a.Canonical()
	if err != nil {
		return "", err
	}
	h := sha256.Sum256(c)
	return hex.EncodeToString(h[:]), nil
}

// Fingerprint names a key for people: the first 8 bytes of its SHA-256.
func (k Key) Fingerprint() string {
	h := sha256.Sum256(k)
	return hex.EncodeToString(h[:8])
}

// Sign adds a party's signature, or renews it. The key must be the owner's, a monitor's or the host's; if the agreement succeeds another,
// any other key's signature is an endorsement.
func (a *Agreement) Sign(key ed25519.PrivateKey) error {
	if err := a.check(); err != nil {
		return err
	}
	pub := Key(key.Public().(ed25519.PublicKey))
	at := &a.Signatures
	if !slices.ContainsFunc(a.signers(), func(s signer) bool { return bytes.Equal(s.Key, pub) }) {
		at = &a.Endorsements
	}
	if at == &a.Endorsements && a.Succeeds == "" {
		return fmt.Errorf("sign agreement %s: key %s is neither the owner's nor a monitor's nor the host's", a.ID, pub.Fingerprint())
	}
	c, err := a.Canonical()
	if err != nil {
		return err
	}
	*at = signWith(*at, key, c)
	return nil
}

// signer is somebody whose signature the agreement needs.
type signer struct {
	role string
	Party
}

// signers are all whose signatures the agreement needs, the owner first.
func (a *Agreement) signers() []signer {
	all := []signer{{"owner", a.Owner}}
	for _, m := range a.Monitors {
		all = append(all, signer{"monitor", m})
	}
	if a.Host.Key != nil {
		all = append(all, signer{"host", Party{a.Host.Name, a.Host.Key}})
	}
	return all
}

// Unsigned names those whose signatures are still missing.
func (a *Agreement) Unsigned() []string {
	missing := []string{}
	for _, s := range a.signers() {
		if !slices.ContainsFunc(a.Signatures, func(x Signature) bool { return bytes.Equal(x.Key, s.Key) }) {
			missing = append(missing, fmt.Sprintf("%s %q", s.role, s.Name))
		}
	}
	return missing
}

// signWith adds a key's signature over the bytes, or renews it.
func signWith(all []Signature, key ed25519.PrivateKey, signed []byte) []Signature {
	pub := Key(key.Public().(ed25519.PublicKey))
	all = slices.DeleteFunc(all, func(s Signature) bool { return bytes.Equal(s.Key, pub) })
	return append(all, Signature{Key: pub, Signature: ed25519.Sign(key, signed)})
}

// signedBy tells whether the key has signed the bytes.
func signedBy(all []Signature, key Key, signed []byte) bool {
	return slices.ContainsFunc(all, func(s Signature) bool {
		return bytes.Equal(s.Key, key) && ed25519.Verify(ed25519.PublicKey(key), signed, s.Signature)
	})
}

// Verify checks the form, that the owner is the one whose key is given, and the signatures of the owner, every monitor, and the host if it
// took part.
func (a *Agreement) Verify(owner ed25519.PublicKey) error {
	if err := a.check(); err != nil {
		return err
	}
	if len(owner) != ed25519.PublicKeySize {
		return fmt.Errorf("the owner's key that this agent trusts has %d bytes, not %d: %w", len(owner), ed25519.PublicKeySize, ErrInvalid)
	}
	if !bytes.Equal(a.Owner.Key, owner) {
		return fmt.Errorf("agreement %s is of owner key %s, and this agent trusts %s; use the agreement of this host's owner: %w",
			a.ID, a.Owner.Key.Fingerprint(), Key(owner).Fingerprint(), ErrUnsigned)
	}
	c, err := a.Canonical()
	if err != nil {
		return err
	}
	for _, p := range a.signers() {
		role := p.role
		n := slices.IndexFunc(a.Signatures, func(s Signature) bool { return bytes.Equal(s.Key, p.Key) })
		if n < 0 {
			return fmt.Errorf("agreement %s lacks the signature of %s %q (key %s); have it signed: %w", a.ID, role, p.Name, p.Key.Fingerprint(), ErrUnsigned)
		}
		if !ed25519.Verify(ed25519.PublicKey(p.Key), c, a.Signatures[n].Signature) {
			return fmt.Errorf("agreement %s: the signature of %s %q does not fit; the document was changed after signing: %w", a.ID, role, p.Name, ErrUnsigned)
		}
	}
	return nil
}

// Parse reads a document without checking signatures: for tools that show or sign it.
func Parse(r io.Reader) (*Agreement, error) {
	a := &Agreement{}
	if err := decode(r, "access agreement", maxDocument, a); err != nil {
		return nil, err
	}
	if err := a.check(); err != nil {
		return nil, err
	}
	return a, nil
}

// decode reads one strict JSON document.
func decode(r io.Reader, what string, limit int64, into any) error {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return fmt.Errorf("read %s: %w", what, err)
	}
	if int64(len(b)) > limit {
		return fmt.Errorf("%s is longer than %d bytes: %w", what, limit, ErrInvalid)
	}
	if !utf8.Valid(b) {
		return fmt.Errorf("%s is not UTF-8: %w", what, ErrInvalid)
	}
	if err := unique(json.NewDecoder(bytes.NewReader(b)), ""); err != nil {
		return fmt.Errorf("%s: %w: %w", what, err, ErrInvalid)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%s, near byte %d: %w: %w", what, d.InputOffset(), err, ErrInvalid)
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("%s: something follows behind the document at byte %d: %w", what, d.InputOffset(), ErrInvalid)
	}
	return nil
}

// Load reads a document and verifies it with the key of the owner whom this agent trusts.
func Load(r io.Reader, owner ed25519.PublicKey) (*Agreement, error) {
	a, err := Parse(r)
	if err != nil {
		return nil, err
	}
	if err := a.Verify(owner); err != nil {
		return nil, err
	}
	return a, nil
}

// check finds what the JSON form alone cannot exclude.
func (a *Agreement) check() error {
	bad := func(where, format string, args ...any) error {
		return fmt.Errorf("access agreement: %s: %w: %w", where, fmt.Errorf(format, args...), ErrInvalid)
	}
	switch {
	case a.Version != Version:
		return bad("version", "is %d; this agent reads version %d", a.Version, Version)
	case !idForm.MatchString(a.ID):
		return bad("id", "%q must be 1 to 64 of a-z, 0-9, dot, dash and underscore", a.ID)
	case !uuidForm.MatchString(a.Host.UUID):
		return bad("host.uuid", "%q is not a UUID in lower case", a.Host.UUID)
	case a.Host.UUID == strings.Map(func(r rune) rune {
		if r == '-' {
			return r
		}
		return '0'
	}, a.Host.UUID):
		return bad("host.uuid", "is all zeros, which names no host; give the host a system UUID")
	case len(a.Owner.Key) != ed25519.PublicKeySize:
		return bad("owner.key", "has %d bytes; an ed25519 key has %d", len(a.Owner.Key), ed25519.PublicKeySize)
	case len(a.Monitors) == 0:
		return bad("monitors", "there must be at least one")
	case a.ValidFrom.IsZero() || a.ValidUntil.IsZero() || !a.ValidUntil.After(a.ValidFrom):
		return bad("validUntil", "must be given and be later than validFrom")
	}
	seen := map[string]bool{string(a.Owner.Key): true}
	for i, m := range a.Monitors {
		where := fmt.Sprintf("monitors[%d].key", i)
		if len(m.Key) != ed25519.PublicKeySize {
			return bad(where, "has %d bytes; an ed25519 key has %d", len(m.Key), ed25519.PublicKeySize)
		}
		if seen[string(m.Key)] {
			return bad(where, "is the same as another party's; each party needs its own")
		}
		seen[string(m.Key)] = true
	}
	if k := a.Host.Key; k != nil && (len(k) != ed25519.PublicKeySize || seen[string(k)]) {
		return bad("host.key", "is no ed25519 key, or is another party's")
	}
	for i, id := range a.Rights.Actions {
		if !idForm.MatchString(id) {
			return bad(fmt.Sprintf("rights.actions[%d]", i), "%q is not the ID of an action; there is no wildcard", id)
		}
	}
	if d := a.Rights.Detectors; d != nil && len(d) == 0 {
		return bad("rights.detectors", "is empty, which is signed like none at all; leave it out, or name detectors")
	}
	for i, id := range a.Rights.Detectors {
		if !watchForm.MatchString(id) || slices.Contains(a.Rights.Detectors[:i], id) {
			return bad(fmt.Sprintf("rights.detectors[%d]", i), "%q is not the ID of a detector, or is there twice; there is no wildcard", id)
		}
	}
	if r := a.Rights.Rates; r != nil && len(r) == 0 {
		return bad("rights.rates", "is empty, which is signed like none at all; leave it out, or name actions")
	}
	for i, r := range a.Rights.Rates {
		where := fmt.Sprintf("rights.rates[%d]", i)
		known := slices.Contains(a.Rights.Actions, r.Action) || a.Emergency != nil && slices.Contains(a.Emergency.Actions, r.Action)
		switch {
		case !known:
			return bad(where+".action", "%q is no action that the agreement gives", r.Action)
		case slices.ContainsFunc(a.Rights.Rates[:i], func(o Rate) bool { return o.Action == r.Action }):
			return bad(where+".action", "%q is there twice", r.Action)
		case r.Most < 1 || r.Most > 1000:
			return bad(where+".most", "is %d; it must be 1 to 1000: an action that is never allowed is not given", r.Most)
		case r.Within < 1 || r.Within > int(LongestRate/time.Second):
			return bad(where+".within", "is %d seconds; it must be 1 to %d, which is a week", r.Within, int(LongestRate/time.Second))
		}
	}
	if v := a.Rights.Values; v != nil && len(v) == 0 {
		return bad("rights.values", "is empty, which is signed like none at all; leave it out, or name actions")
	}
	for i, v := range a.Rights.Values {
		where := fmt.Sprintf("rights.values[%d]", i)
		switch {
		case !slices.Contains(a.Rights.Actions, v.Action):
			return bad(where+".action", "%q is no action of rights.actions", v.Action)
		case !idForm.MatchString(v.Name):
			return bad(where+".name", "%q must be 1 to 64 of a-z, 0-9, dot, dash and underscore", v.Name)
		case v.Min > v.Max:
			return bad(where, "%d to %d is the wrong way round", v.Min, v.Max)
		case slices.ContainsFunc(a.Rights.Values[:i], func(o ValueRange) bool { return o.Action == v.Action && o.Name == v.Name }):
			return bad(where+".name", "%q of %s is there twice", v.Name, v.Action)
		}
	}
	if a.Rights.Write && !a.Rights.Read {
		return bad("rights", "writing without reading is not possible; give read as well")
	}
	for i, p := range a.Protected {
		if p.FirstUID > p.LastUID {
			return bad(fmt.Sprintf("protected[%d]", i), "users %d to %d are the wrong way round", p.FirstUID, p.LastUID)
		}
		if len(p.Comm) > 15 {
			return bad(fmt.Sprintf("protected[%d].comm", i), "%q is longer than the 15 bytes that a kernel keeps", p.Comm)
		}
	}
	if m := a.Rights.Memory; m != nil && len(m) == 0 {
		return bad("rights.memory", "is empty, which is signed like none at all; leave it out, or name ranges")
	}
	for i, m := range a.Rights.Memory {
		if err := m.check(a.Protected); err != nil {
			return bad(fmt.Sprintf("rights.memory[%d]", i), "%w", err)
		}
	}
	if a.Quorum < 0 || a.Quorum > len(a.Monitors) {
		return bad("quorum", "is %d; there are %d monitors", a.Quorum, len(a.Monitors))
	}
	if e := a.Emergency; e != nil {
		switch {
		case e.Threshold < 2 || e.Threshold > len(e.Keys):
			return bad("emergency.threshold", "is %d; it takes at least 2, and there are %d keys", e.Threshold, len(e.Keys))
		case e.Longest < 1 || e.Longest > 7*24*3600:
			return bad("emergency.longest", "is %d seconds; it must be 1 to 604800, which is a week", e.Longest)
		case e.Write && !a.Rights.Read:
			return bad("emergency.write", "writing without reading is not possible; give rights.read as well")
		}
		seen := map[string]bool{}
		for i, k := range e.Keys {
			if len(k.Key) != ed25519.PublicKeySize || seen[string(k.Key)] || bytes.Equal(k.Key, a.Host.Key) {
				return bad(fmt.Sprintf("emergency.keys[%d].key", i), "is no ed25519 key, is there twice, or is the host's")
			}
			seen[string(k.Key)] = true
		}
		for i, id := range e.Actions {
			if !idForm.MatchString(id) {
				return bad(fmt.Sprintf("emergency.actions[%d]", i), "%q is not the ID of an action; there is no wildcard", id)
			}
		}
	}
	if a.Succeeds != "" && !digestForm.MatchString(a.Succeeds) {
		return bad("succeeds", "%q is no SHA-256 in hexadecimal", a.Succeeds)
	}
	for i, s := range slices.Concat(a.Signatures, a.Endorsements) {
		if len(s.Signature) != ed25519.SignatureSize || len(s.Key) != ed25519.PublicKeySize {
			return bad(fmt.Sprintf("signatures[%d]", i), "has the wrong length")
		}
	}
	return nil
}

// check finds what is wrong with an entry of rights.memory.
func (m Memory) check(protected []Protected) error {
	forms := 0
	for _, has := range []bool{m.All, m.KernelText, m.Symbol != "", m.Process != nil} {
		if has {
			forms++
		}
	}
	switch {
	case forms > 1:
		return errors.New("has several of all, kernelText, symbol and process; write one entry for each")
	case forms == 0 && (m.Size == 0 || m.Start+m.Size-1 < m.Start):
		return fmt.Errorf("%#x bytes at %#x are no range; write start and size, or one of all, kernelText, symbol and process", m.Size, m.Start)
	case forms == 0:
		return nil
	case m.Start != 0:
		return errors.New("has a start besides a name; write the one or the other")
	case m.Size != 0 && m.Symbol == "":
		return errors.New("has a size, which of the names only a symbol may have; leave it out")
	case m.Symbol != "" && !symbolForm.MatchString(m.Symbol):
		return fmt.Errorf("symbol %q must be 1 to 255 of a-z, A-Z, 0-9, dot, underscore and dollar sign", m.Symbol)
	case m.Size > maxNamed:
		return fmt.Errorf("has a size of %#x bytes; no symbol has more than %#x", m.Size, uint64(maxNamed))
	case m.Process == nil:
		return nil
	case m.Process.UID == nil:
		return errors.New("process has no uid; write the number of its user, also if that is 0")
	case m.Process.Comm == "" || len(m.Process.Comm) > 15 || strings.ContainsRune(m.Process.Comm, 0):
		return fmt.Errorf("process.comm %q must be the 1 to 15 bytes of the name that the kernel keeps", m.Process.Comm)
	}
	for i, p := range protected {
		if p.covers(*m.Process.UID, m.Process.Comm) {
			return fmt.Errorf("names processes that protected[%d] protects; take the one or the other out", i)
		}
	}
	return nil
}

// covers tells whether a task of that user and name is protected.
func (p Protected) covers(uid uint32, comm string) bool {
	return uid >= p.FirstUID && uid <= p.LastUID && (p.Comm == "" || p.Comm == comm)
}

// unique refuses an object that has one name twice: readers would not agree on what it says. Names are compared without
// case, as encoding/json matches them.
func unique(d *json.Decoder, path string) error {
	t, err := d.Token()
	if err != nil {
		return fmt.Errorf("near byte %d: %w", d.InputOffset(), err)
	}
	delim, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	seen := map[string]bool{}
	for n := 0; d.More(); n++ {
		at := fmt.Sprintf("%s[%d]", path, n)
		if delim == '{' {
			k, err := d.Token()
			if err != nil {
				return fmt.Errorf("near byte %d: %w", d.InputOffset(), err)
			}
			name, _ := k.(string)
			at = strings.TrimPrefix(path+"."+name, ".")
			if seen[strings.ToLower(name)] {
				return fmt.Errorf("%s is there twice", at)
			}
			seen[strings.ToLower(name)] = true
		}
		if strings.Count(at, ".")+strings.Count(at, "[") > 16 {
			return fmt.Errorf("%s is nested too deeply", at)
		}
		if err := unique(d, at); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return fmt.Errorf("near byte %d: %w", d.InputOffset(), err)
	}
	return nil
}
