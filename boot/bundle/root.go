package bundle

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// A Root is a set of keys and what they count for: TUF's root role, reduced to the two roles that a device has use for. A newer one
// replaces it, if it is signed by the threshold of the old set and by its own (TUF specification 1.0.34, section 5.3.4).
type Root struct {
	Format  int       `json:"format"`  // 1
	Version uint32    `json:"version"` // from 1, without gaps
	Expires time.Time `json:"expires"` // UTC, whole seconds: nothing is to be installed by it after that
	Keys    []Key     `json:"keys"`
	// Root's keys change the key set.
	Root Role `json:"root"`
	// Release's keys sign manifests.
	Release Role `json:"release"`
}

// A Key is an Ed25519 public key.
type Key struct {
	ID     string `json:"id"`     // KeyID of Public
	Public []byte `json:"public"` // 32 bytes
}

// A Role says how many of which keys it takes.
type Role struct {
	Keys      []string `json:"keys"` // their IDs
	Threshold int      `json:"threshold"`
}

// KeyID names a public key: the SHA-256 of its 32 bytes, in hexadecimal digits.
func KeyID(public ed25519.PublicKey) string {
	sum := sha256.Sum256(public)
	return hexSum(sum[:])
}

const (
	maxKeys  = 16
	maxRoots = 24
)

// The types of what is signed (DSSE's payloadType), so that a signature under one cannot pass for one under the other.
const (
	typeRoot     = "application/vnd.backdoor.root.v1+json"
	typeManifest = "application/vnd.backdoor.manifest.v1+json"
)

// Validate reports everything that is wrong with a key set.
func (r *Root) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if r.Format != 1 {
		bad("format %d: this program knows format 1", r.Format)
	}
	if r.Version == 0 {
		bad("version 0: the first is 1")
	}
	if !wholeSecond(r.Expires) {
		bad("expires %s: want whole seconds in UTC", r.Expires)
	}
	if len(r.Keys) > maxKeys {
		bad("%d keys: want at most %d", len(r.Keys), maxKeys)
	}
	for i, k := range r.Keys {
		if len(k.Public) != ed25519.PublicKeySize || k.ID != KeyID(k.Public) {
			bad("keys[%d]: it is not an Ed25519 key of 32 bytes with the ID %q", i, k.ID)
		}
		if slices.IndexFunc(r.Keys, func(o Key) bool { return o.ID == k.ID }) != i {
			bad("keys[%d]: %.16s… is there twice", i, k.ID)
		}
	}
	for name, role := range map[string]Role{"root": r.Root, "release": r.Release} {
		if role.Threshold < 1 || role.Threshold > len(role.Keys) {
			bad("%s: threshold %d of %d keys", name, role.Threshold, len(role.Keys))
		}
		for i, id := range role.Keys {
			if r.key(id) == nil || slices.Index(role.Keys, id) != i {
				bad("%s: key %.16s… is there twice or not among the keys", name, id)
			}
		}
	}
	return errors.Join(errs...)
}

func (r *Root) key(id string) ed25519.PublicKey {
	for _, k := range r.Keys {
		if k.ID == id {
			return k.Public
		}
	}
	return nil
}

// An Envelope is something signed, in the form of DSSE (Dead Simple Signing Envelope, protocol and envelope v1.0.2).
type Envelope struct {
	PayloadType string      `json:"payloadType"`
	Payload     []byte      `json:"payload"`
	Signatures  []Signature `json:"signatures"`
}

// A Signature is one signature of an envelope.
type Signature struct {
	KeyID string `json:"keyid"`
	Sig   []byte `json:"sig"`
}

// preAuth is what is signed: DSSE's PAE(payloadType, payload).
func (e *Envelope) preAuth() []byte {
	b := []byte("DSSEv1 " + strconv.Itoa(len(e.PayloadType)) + " " + e.PayloadType + " " + strconv.Itoa(len(e.Payload)) + " ")
	return append(b, e.Payload...)
}

// verify returns the keys of role that signed; it is an error if they are too few. Beyond what TUF asks, each signature has to be
// a right one by a key of the set, or of one of the others: a byte that is changed in any of them is noticed.
func (e *Envelope) verify(kind string, keys Root, role Role, others ...Root) ([]string, error) {
	if e.PayloadType != kind {
		return nil, refusef(BadSignature, "it is signed as %q, not as %q", e.PayloadType, kind)
	}
	if len(e.Signatures) > 2*maxKeys {
		return nil, refusef(BadSignature, "it has %d signatures", len(e.Signatures))
	}
	signed := e.preAuth()
	var good, all []string
	for _, s := range e.Signatures {
		public := keys.key(s.KeyID)
		for i := 0; public == nil && i < len(others); i++ {
			public = others[i].key(s.KeyID)
		}
		switch {
		case public == nil:
			return nil, refusef(BadSignature, "it is signed by the key %.16s…, which is not in key set %d", s.KeyID, keys.Version)
		case slices.Contains(all, s.KeyID):
			return nil, refusef(BadSignature, "it is signed twice by the key %.16s…", s.KeyID)
		case !ed25519.Verify(public, signed, s.Sig):
			return nil, refusef(BadSignature, "the signature of key %.16s… is wrong", s.KeyID)
		}
		all = append(all, s.KeyID)
		if slices.Contains(role.Keys, s.KeyID) {
			good = append(good, s.KeyID)
		}
	}
	if role.Threshold < 1 || len(good) < role.Threshold {
		return nil, refusef(BadSignature, "it is signed by %d of the %d keys that key set %d asks for", len(good), role.Threshold, keys.Version)
	}
	return good, nil
}

// verifyChain follows key sets from the first on to the newest, through the one that is trusted, which has to be among them or
// right before them.
func verifyChain(chain []Envelope, trusted Root) (Root, error) {
	if len(chain) == 0 || len(chain) > maxRoots {
		return Root{}, refusef(BadSignature, "it brings %d key sets: want 1 to %d", len(chain), maxRoots)
	}
	if err := trusted.Validate(); err != nil {
		return Root{}, fmt.Errorf("the key set that this device trusts is not valid: %w", err)
	}
	anchor, err := json.Marshal(trusted)
	if err != nil {
		return Root{}, err
	}
	var last Root
	found := false
	for i := range chain {
		e := &chain[i]
		var r Root
		if err := decodeExact(e.Payload, &r); err != nil {
			return Root{}, refusef(BadSignature, "key set %d of it: %v", i, err)
		}
		if err := r.Validate(); err != nil {
			return Root{}, refusef(BadSignature, "key set %d of it: %v", i, err)
		}
		before := last
		if i == 0 {
			before = r // the first in the chain vouches for itself; whether it is trusted is decided below
			if r.Version == trusted.Version+1 {
				before, found = trusted, true
			}
		} else if r.Version != last.Version+1 {
			return Root{}, refusef(BadSignature, "key set %d follows key set %d", r.Version, last.Version)
		}
		if _, err := e.verify(typeRoot, before, before.Root, r); err != nil {
			return Root{}, err
		}
		if _, err := e.verify(typeRoot, r, r.Root, before); err != nil {
			return Root{}, err
		}
		if r.Version == trusted.Version {
			if !bytes.Equal(e.Payload, anchor) {
				return Root{}, refusef(BadSignature, "its key set %d is not the one that this device trusts", r.Version)
			}
			found = true
		}
		last = r
	}
	if !found {
		return Root{}, refusef(BadSignature, "its key sets %d to %d do not lead to key set %d, which this device trusts", last.Version-uint32(len(chain))+1, last.Version, trusted.Version)
	}
	return last, nil
}

// NewRoot puts a key set into an envelope, to be signed.
func NewRoot(r Root) (Envelope, error) {
	if err := r.Validate(); err != nil {
		return Envelope{}, fmt.Errorf("key set: %w", err)
	}
	b, err := json.Marshal(r)
	return Envelope{PayloadType: typeRoot, Payload: b}, err
}

// ReadRoots verifies a chain of key sets that begins with one that the caller trusts, and returns the newest: what a tool does with
// a file, or a device when it is set up.
func ReadRoots(chain []Envelope) (Root, error) {
	if len(chain) == 0 {
		return Root{}, errors.New("no key set")
	}
	var first Root
	if err := decodeExact(chain[0].Payload, &first); err != nil {
		return Root{}, fmt.Errorf("key set: %w", err)
	}
	return verifyChain(chain, first)
}

// ParseRoots reads a file of key sets, a JSON list from the first on, and returns them beside the newest, which the caller trusts because the file
// is its own.
func ParseRoots(text []byte) ([]Envelope, Root, error) {
	if len(text) > MaxHead {
		return nil, Root{}, fmt.Errorf("key sets: %d bytes are more than %d", len(text), MaxHead)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	var chain []Envelope
	if err := d.Decode(&chain); err != nil {
		return nil, Root{}, fmt.Errorf("key sets: %w", err)
	}
	root, err := ReadRoots(chain)
	return chain, root, err
}

// Sign adds a signature by a signer with an Ed25519 key.
func (e *Envelope) Sign(s crypto.Signer) error {
	public, ok := s.Public().(ed25519.PublicKey)
	if !ok {
		return fmt.Errorf("sign: the key is of type %T, not an Ed25519 key", s.Public())
	}
	signed := e.preAuth()
	sig, err := s.Sign(nil, signed, crypto.Hash(0))
	if err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	if !ed25519.Verify(public, signed, sig) {
		return errors.New("sign: the signer made a signature that is not right")
	}
	id := KeyID(public)
	e.Signatures = slices.DeleteFunc(e.Signatures, func(s Signature) bool { return s.KeyID == id })
	e.Signatures = append(e.Signatures, Signature{KeyID: id, Sig: sig})
	return nil
}
