package access

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// An Anchor keeps two digests where who can write the lock's file cannot: in a TPM. attest.Anchor is one.
type Anchor interface {
	// Read returns what the last Write has left; ok is false if there was none yet. An error may say that somebody else has written it.
	Read() (is, next [sha256.Size]byte, ok bool, err error)
	Write(is, next [sha256.Size]byte) error
}

// Await has the lock permit nothing, and take nothing, until Anchor is called: for an agent whose TPM takes its time.
func (l *Lock) Await() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shut = fmt.Errorf("the access agreement's lock waits for the machine's TPM; ask again in some seconds: %w", ErrDenied)
}

// Shut returns why the lock permits and takes nothing now, whatever its file says; nil if the file counts.
func (l *Lock) Shut() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shut
}

// Anchor ties the lock's file to an anchor, so that no older one, and none that was changed by another hand, counts in its place; nil says
// that the machine has none. A file that was never tied is tied now. With an error nothing is permitted; if the file is not the one that the
// anchor knows, only an agreement that says so is taken then: its "succeeds" is the digest of the lost file, which the error tells.
func (l *Lock) Anchor(a Anchor) error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.anchor, l.lost, l.shut = a, "", nil
	l.shut = l.tie()
	return l.shut
}

// tie is Anchor. l.mu is held.
func (l *Lock) tie() error {
	if l.anchor == nil {
		if l.s.Anchored {
			return fmt.Errorf("%s is tied to a TPM, and there is none that works: %w", l.path, ErrDenied)
		}
		return nil
	}
	is, next, ok, err := l.anchor.Read()
	if err != nil {
		return fmt.Errorf("the access agreement's lock: %w: %w", err, ErrDenied)
	}
	have := l.kept
	switch {
	case !ok && l.s.Anchored:
		return fmt.Errorf("%s is tied to a TPM, and this one knows nothing of it: it is another, or was cleared; who sets the machine up anew removes the file: %w",
			l.path, ErrDenied)
	case !ok && l.s.Agreement == nil:
		return nil // the first agreement ties it
	case !ok:
		if err := l.anchor.Write(have, have); err != nil {
			return fmt.Errorf("tie the access agreement's lock to the TPM: %w: %w", err, ErrDenied)
		}
		return l.write(l.s)
	case have == is:
		return nil
	case have == next: // the agent ended, or the machine, between the file and the anchor
		return l.anchor.Write(next, next)
	}
	l.kept, l.lost = is, hex.EncodeToString(is[:])
	return fmt.Errorf("%s is not the file that the TPM knows: it was put back to an older one, changed, or lost. "+
		"Put that one back, or lock an agreement that \"succeeds\" %s: %w", l.path, l.lost, ErrDenied)
}

// refound takes an agreement that stands in for the lost file: its owner and all who are in it have signed that it does. l.mu is held.
func (l *Lock) refound(a *Agreement) error {
	if a.Succeeds != l.lost {
		return fmt.Errorf("the lock %s that the TPM knows is lost; only an agreement that says \"succeeds\": %q takes its place, not %s: %w", l.path, l.lost, a.ID, ErrLocked)
	}
	now := l.now()
	if err := l.write(locked{Version: Version, Agreement: a, Seen: now}); err != nil {
		return err
	}
	l.lost, l.shut, l.saved = "", nil, now
	return nil
}

// announce tells the anchor, if there is one, what the file is about to be, so that either counts until done says that it is. l.mu is held.
func (l *Lock) announce(next locked) (done func() error, err error) {
	will, err := next.digest()
	if err != nil {
		return nil, err
	}
	if l.anchor == nil || will == l.kept { // of the same: only the time of day has changed
		return func() error { l.kept = will; return nil }, nil
	}
	if err := l.anchor.Write(l.kept, will); err != nil {
		return nil, err
	}
	return func() error {
		l.kept = will
		return l.anchor.Write(will, will)
	}, nil
}

// digest is what an anchor keeps of the file: of all in it, but of its time only the day, since a TPM's memory wears with each write.
func (s locked) digest() ([sha256.Size]byte, error) {
	const day = 24 * time.Hour
	s.Seen, s.Anchored = s.Seen.UTC().Truncate(day), true
	if len(s.Orders) == 0 { // none is none, be it nil or empty
		s.Orders = nil
	}
	if len(s.Retired) == 0 {
		s.Retired = nil
	}
	b, err := json.Marshal(s)
	if err != nil {
		return [sha256.Size]byte{}, fmt.Errorf("digest of the access agreement's lock: %w", err)
	}
	return sha256.Sum256(append([]byte("backdoor lock of the access agreement v1\n"), b...)), nil
}
