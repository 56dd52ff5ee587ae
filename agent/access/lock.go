package access

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/internal/durable"
)

// ErrLocked means that an agreement is not taken because another one holds.
var ErrLocked = errors.New("another access agreement holds")

// errNoLock is of an agent that trusts no owner.
var errNoLock = fmt.Errorf("this agent is configured with no owner's key, and takes no agreements: %w", ErrDenied)

// Lock holds the agreement that an agent has accepted, and the orders about it, in a file. It is safe for concurrent use.
type Lock struct {
	path  string // empty for one that lives in memory only
	owner ed25519.PublicKey
	now   func() time.Time

	mu sync.Mutex
	s  locked // guarded by mu
	// saved is when s was last written because of the time alone; guarded by mu.
	saved time.Time
	// anchor is where the file's digest is kept besides; nil if nowhere. Guarded by mu, as the rest.
	anchor Anchor
	// shut is why nothing is permitted or changed, whatever the file says; nil if it counts.
	shut error
	// kept is the digest of the file. If the anchor knows another one, kept is that one's, and lost says so in hexadecimal.
	kept [sha256.Size]byte
	lost string
}

// maxLock bounds the file of a lock, in bytes: an agreement, a few orders, and the digests that it keeps.
const maxLock = 4 * maxDocument

// locked is what the file holds. All that permits anything in it is signed, and verified when the file is opened, so that a
// change of the file alone can permit nothing that was never signed.
type locked struct {
	Version   int        `json:"version"`
	Agreement *Agreement `json:"agreement"`
	// Retired are the digests of agreements that were revoked or succeeded, the latest last; they never come back.
	Retired []string `json:"retired"`
	// Orders are those in force: at most one Pause or Revoke, and one Break; and the latest one of all, for its sequence.
	Orders []Order `json:"orders"`
	// Seen is the latest time of which the agent knows. The clock cannot bring an agreement back that had ended.
	Seen time.Time `json:"seen"`
	// Anchored says that the file's digest is kept by an anchor, so that it counts with that alone.
	Anchored bool `json:"anchored,omitempty"`
}

// OpenLock opens the lock in a file, or an empty one that will be written there. A nil now is time.Now.
func OpenLock(path string, owner ed25519.PublicKey, now func() time.Time) (*Lock, error) {
	if now == nil {
		now = time.Now
	}
	l := &Lock{path: path, owner: owner, now: now, s: locked{Version: Version}}
	var err error
	if l.kept, err = l.s.digest(); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the lock of the access agreement: %w", err)
	}
	defer f.Close()
	s := locked{}
	if err := decode(f, "lock of the access agreement "+path, maxLock, &s); err != nil {
		return nil, err
	}
	if s.Version != Version {
		return nil, fmt.Errorf("lock of the access agreement %s: version is %d; this agent reads version %d: %w", path, s.Version, Version, ErrInvalid)
	}
	if s.Agreement != nil {
		if err := s.Agreement.Verify(owner); err != nil {
			return nil, fmt.Errorf("lock of the access agreement %s: %w", path, err)
		}
		digest, err := s.Agreement.Digest()
		if err != nil {
			return nil, err
		}
		for i := range s.Orders {
			o := &s.Orders[i]
			err := o.check()
			if err == nil {
				err = o.authorised(s.Agreement)
			}
			if err == nil && o.Agreement != digest {
				err = fmt.Errorf("an order is about another agreement: %w", ErrInvalid)
			}
			if err != nil {
				return nil, fmt.Errorf("lock of the access agreement %s: %w", path, err)
			}
		}
	}
	l.s = s
	if l.kept, err = s.digest(); err != nil {
		return nil, err
	}
	if s.Anchored {
		l.shut = fmt.Errorf("%s is tied to the machine's TPM, which has not been asked: %w", path, ErrDenied)
	}
	return l, nil
}

// Hold returns a lock that lives in memory only, with an agreement that Load has verified; nil for nil.
func Hold(a *Agreement) *Lock {
	if a == nil {
		return nil
	}
	return &Lock{owner: ed25519.PublicKey(a.Owner.Key), now: time.Now, s: locked{Version: Version, Agreement: a}}
}

// Agreement returns the agreement that holds; nil if there is none.
func (l *Lock) Agreement() *Agreement {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.s.Agreement
}

// Offer has the agent accept an agreement that Load has verified. The first one is locked. While one holds, only its successor takes its
// place: one that names it, signed by the owner and by enough of its monitors. Nothing happens if it is the one that holds.
func (l *Lock) Offer(a *Agreement) error {
	if l == nil {
		return errNoLock
	}
	if err := a.Verify(l.owner); err != nil {
		return err
	}
	digest, err := a.Digest()
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost != "" {
		return l.refound(a)
	}
	if l.shut != nil {
		return l.shut
	}
	retired := l.s.Retired
	if old := l.s.Agreement; old != nil {
		was, err := old.Digest()
		if err != nil {
			return err
		}
		if was == digest {
			return nil
		}
		if l.s.order(Revoke) == nil && l.time().Before(old.ValidUntil) {
			if err := endorsed(a, old, was); err != nil {
				return err
			}
		}
		retired = append(slices.Clone(retired), was)
	}
	if slices.Contains(retired, digest) {
		return fmt.Errorf("agreement %s was revoked or succeeded before: %w", a.ID, ErrLocked)
	}
	const enough = 256
	return l.write(locked{Version: Version, Agreement: a, Retired: retired[max(0, len(retired)-enough):], Seen: l.time()})
}

// endorsed tells whether an agreement may take the place of one that holds. Its owner's signature is verified already.
func endorsed(a, old *Agreement, digest string) error {
	if a.Succeeds != digest {
		return fmt.Errorf("agreement %s holds until %s; only one that says \"succeeds\": %q, and that its monitors have signed, takes its place, not %s: %w",
			old.ID, old.ValidUntil.UTC().Format(time.RFC3339), digest, a.ID, ErrLocked)
	}
	c, err := a.Canonical()
	if err != nil {
		return err
	}
	need, n := old.Quorum, 0
	if need == 0 {
		need = len(old.Monitors)
	}
	all := slices.Concat(a.Signatures, a.Endorsements)
	for _, m := range old.Monitors {
		if signedBy(all, m.Key, c) {
			n++
		}
	}
	if n < need {
		return fmt.Errorf("agreement %s takes the place of %s only with the signatures of %d of that one's monitors, and has %d: %w", a.ID, old.ID, need, n, ErrUnsigned)
	}
	return nil
}

// Obey carries out an order.
func (l *Lock) Obey(o *Order) error {
	if l == nil {
		return errNoLock
	}
	if err := o.check(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shut != nil {
		return l.shut
	}
	if l.s.Agreement == nil {
		return fmt.Errorf("there is no access agreement to which the order could apply: %w", ErrDenied)
	}
	digest, err := l.s.Agreement.Digest()
	if err != nil {
		return err
	}
	if o.Agreement != digest {
		return fmt.Errorf("the order is about agreement %.16s…, and %s, %.16s…, holds: %w", o.Agreement, l.s.Agreement.ID, digest, ErrDenied)
	}
	if err := o.authorised(l.s.Agreement); err != nil {
		return err
	}
	next := locked{Version: Version, Agreement: l.s.Agreement, Retired: l.s.Retired, Seen: l.time()}
	for _, old := range l.s.Orders {
		if o.Sequence <= old.Sequence {
			return fmt.Errorf("order %d comes after order %d; make a new one with a higher sequence: %w", o.Sequence, old.Sequence, ErrDenied)
		}
		if old.Order == Revoke {
			return fmt.Errorf("agreement %s was revoked by order %d, which nothing takes back: %w", l.s.Agreement.ID, old.Sequence, ErrDenied)
		}
		// Resume ends all; a pause gives way to another one, an emergency to another one; what both replace goes.
		if o.Order != Resume && old.Order != o.Order && old.Order != Resume {
			next.Orders = append(next.Orders, old)
		}
	}
	if o.Order == Break && !o.Until.After(next.Seen) {
		return fmt.Errorf("the emergency ended at %s: %w", o.Until.UTC().Format(time.RFC3339), ErrDenied)
	}
	if o.Order == Resume { // by the owner, who knows what time it is
		next.Seen = o.Issued
	}
	next.Orders = append(next.Orders, *o)
	return l.write(next)
}

// Orders returns the orders in force, the latest last.
func (l *Lock) Orders() []Order {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.time()
	return slices.DeleteFunc(slices.Clone(l.s.Orders), func(o Order) bool {
		return o.Order == Resume || o.Until != nil && !now.Before(*o.Until)
	})
}

// Grant applies what the agreement permits, under the orders about it, to the host with that system UUID. It is judged at each use.
// A nil Lock permits nothing.
func (l *Lock) Grant(hostUUID string) Grant {
	if l == nil {
		return (*Agreement)(nil).Grant(hostUUID, nil)
	}
	g := l.Agreement().Grant(hostUUID, l.clock)
	g.lock = l
	return g
}

// clock returns the time; it never goes back.
func (l *Lock) clock() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.time()
}

// time is clock. l.mu is held.
func (l *Lock) time() time.Time {
	now := l.now()
	if !now.After(l.s.Seen) {
		return l.s.Seen
	}
	l.s.Seen = now
	const often = 10 * time.Minute
	if l.s.Agreement != nil && l.shut == nil && now.Sub(l.saved) > often {
		l.saved = now
		_ = l.write(l.s) // what this fails to keep, the next one does
	}
	return now
}

// inForce returns the order of that kind that is in force for an agreement, if one is.
func (l *Lock) inForce(a *Agreement, kind string) *Order {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.s.Agreement != a {
		// The agreement was succeeded since the grant was made.
		if kind == Revoke {
			return &Order{Order: Revoke}
		}
		return nil
	}
	o := l.s.order(kind)
	if o == nil || o.Until != nil && !l.time().Before(*o.Until) {
		return nil
	}
	return o
}

func (s *locked) order(kind string) *Order {
	for i := range s.Orders {
		if s.Orders[i].Order == kind {
			return &s.Orders[i]
		}
	}
	return nil
}

// write puts the state into the file, and then in force. l.mu is held.
func (l *Lock) write(next locked) error {
	if l.path == "" { // of Hold
		l.s = next
		return nil
	}
	if next.Orders == nil {
		next.Orders = []Order{}
	}
	if next.Retired == nil {
		next.Retired = []string{}
	}
	next.Anchored = l.anchor != nil
	b, err := json.MarshalIndent(next, "", "\t")
	if err != nil {
		return fmt.Errorf("write the lock of the access agreement: %w", err)
	}
	if len(b) > maxLock {
		return fmt.Errorf("write the lock of the access agreement: %d bytes are more than it can hold", len(b))
	}
	done, err := l.announce(next)
	if err == nil {
		err = durable.WriteFile(l.path, append(bytes.TrimSpace(b), '\n'), 0o600)
	}
	if err == nil {
		l.s = next
		err = done()
	}
	if err != nil {
		return fmt.Errorf("write the lock of the access agreement: %w", err)
	}
	return nil
}
