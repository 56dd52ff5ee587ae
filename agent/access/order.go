package access

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"time"
	"unicode/utf8"
)

// What an order can order.
const (
	Pause  = "pause"  // by the owner: nothing is permitted, until the order ends or Resume
	Resume = "resume" // by the owner: ends a pause, an emergency, and a clock that had run ahead
	Revoke = "revoke" // by the owner: nothing is permitted any more under this agreement
	Break  = "break"  // by the keys for emergencies: their rights as well, until the order ends
)

// orderDomain keeps a signature under an order from meaning anything under another kind of document.
const orderDomain = "backdoor access order v1\n"

// Order changes at once what a locked agreement permits. It may reach the agent by any way, from anybody: what counts are the
// signatures.
type Order struct {
	Version   int    `json:"version"`
	Agreement string `json:"agreement"` // Agreement.Digest of the one that it is about
	// Sequence rises from order to order of an agreement, so that none can be played again. Seconds since 1970 do.
	Sequence   uint64      `json:"sequence"`
	Order      string      `json:"order"`
	Issued     time.Time   `json:"issued"`
	Until      *time.Time  `json:"until,omitempty"` // of Pause (none: until Resume) and Break (required)
	Reason     string      `json:"reason"`          // for people, at most 1000 bytes
	Signatures []Signature `json:"signatures"`
}

// Canonical returns the bytes that are signed: everything but the signatures, in one form only.
func (o *Order) Canonical() ([]byte, error) {
	c := *o
	c.Signatures, c.Issued = nil, c.Issued.UTC()
	if c.Until != nil {
		until := c.Until.UTC()
		c.Until = &until
	}
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("canonical form of the order: %w", err)
	}
	return append([]byte(orderDomain), b...), nil
}

// Sign adds a signature, or renews it.
func (o *Order) Sign(key ed25519.PrivateKey) error {
	if err := o.check(); err != nil {
		return err
	}
	c, err := o.Canonical()
	if err != nil {
		return err
	}
	o.Signatures = signWith(o.Signatures, key, c)
	return nil
}

// ParseOrder reads an order without judging its signatures, which Lock.Obey does.
func ParseOrder(r io.Reader) (*Order, error) {
	o := &Order{}
	if err := decode(r, "access order", maxDocument, o); err != nil {
		return nil, err
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	return o, nil
}

// check finds what the JSON form alone cannot exclude.
func (o *Order) check() error {
	bad := func(where, format string, args ...any) error {
		return fmt.Errorf("access order: %s: %s: %w", where, fmt.Sprintf(format, args...), ErrInvalid)
	}
	switch {
	case o.Version != Version:
		return bad("version", "is %d; this agent reads version %d", o.Version, Version)
	case !digestForm.MatchString(o.Agreement):
		return bad("agreement", "%q is no SHA-256 in hexadecimal; \"backdoor agreement show\" prints it", o.Agreement)
	case o.Sequence == 0:
		return bad("sequence", "must be at least 1")
	case o.Issued.IsZero():
		return bad("issued", "must be given")
	case len(o.Reason) > 1000 || !utf8.ValidString(o.Reason):
		return bad("reason", "is longer than 1000 bytes")
	case o.Until != nil && !o.Until.After(o.Issued):
		return bad("until", "must be later than issued")
	case len(o.Signatures) > 64:
		return bad("signatures", "are %d; an order has at most 64", len(o.Signatures))
	}
	switch o.Order {
	case Pause:
	case Resume, Revoke:
		if o.Until != nil {
			return bad("until", "has no meaning for %q; leave it out", o.Order)
		}
	case Break:
		if o.Until == nil {
			return bad("until", "must be given for %q", o.Order)
		}
	default:
		return bad("order", "is %q; want %s, %s, %s or %s", o.Order, Pause, Resume, Revoke, Break)
	}
	for i, s := range o.Signatures {
		if len(s.Signature) != ed25519.SignatureSize || len(s.Key) != ed25519.PublicKeySize {
			return bad(fmt.Sprintf("signatures[%d]", i), "has the wrong length")
		}
	}
	return nil
}

// authorised tells whether those whose order it is have signed it.
func (o *Order) authorised(a *Agreement) error {
	c, err := o.Canonical()
	if err != nil {
		return err
	}
	if o.Order != Break {
		if !signedBy(o.Signatures, a.Owner.Key, c) {
			return fmt.Errorf("order %d to %s lacks the signature of owner %q (key %s): %w", o.Sequence, o.Order, a.Owner.Name, a.Owner.Key.Fingerprint(), ErrUnsigned)
		}
		return nil
	}
	e := a.Emergency
	if e == nil {
		return fmt.Errorf("agreement %s names nobody who may break the glass: %w", a.ID, ErrDenied)
	}
	if longest := time.Duration(e.Longest) * time.Second; o.Until.Sub(o.Issued) > longest {
		return fmt.Errorf("an emergency of %v is longer than the %v of agreement %s: %w", o.Until.Sub(o.Issued), longest, a.ID, ErrDenied)
	}
	n := 0
	for _, k := range e.Keys {
		if signedBy(o.Signatures, k.Key, c) {
			n++
		}
	}
	if n < e.Threshold {
		return fmt.Errorf("order %d to break the glass has the signatures of %d of the keys for emergencies; it takes %d: %w", o.Sequence, n, e.Threshold, ErrUnsigned)
	}
	return nil
}
