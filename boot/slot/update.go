package slot

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
)

const (
	// chunk is what is written at once, in bytes.
	chunk = 1 << 20
	// durable is how much is written between two syncs, in bytes: what a broken upload loses at most.
	durable = 8 << 20
)

// ErrUnproven refuses an update while the running image has not said that it is good: the other slot is the way back.
var ErrUnproven = errors.New("the running image has not proved itself yet, and the other slot is the way back: try again when it has")

// Target returns the slot that an update goes to: never the one that runs.
func (d *Disk) Target(running Name) (Name, error) {
	s := d.State()
	switch running {
	case A, B:
		if s.Slot(running).Status != Good {
			return "", ErrUnproven
		}
		return running.Other(), nil
	}
	// Neither runs: the recovery image does, or the machine was not started from slots.
	spare := s.Active.Other()
	if s.Active == "" {
		spare = A
	}
	if s.Slot(spare).Status == Good && s.Slot(spare.Other()).Status != Good {
		spare = spare.Other()
	}
	return spare, nil
}

// Partial returns how much of the image with the digest (hexadecimal) is in the slot that the next update goes to, after an update
// that broke off; 0 if there is none.
func (d *Disk) Partial(running Name, digest string) int64 {
	n, err := d.Target(running)
	if err != nil {
		return 0
	}
	s := d.State()
	if at := s.Slot(n); at.Status == Writing && at.Digest == digest {
		return at.Written
	}
	return 0
}

// An Update is an image on its way into a slot.
type Update struct {
	d    *Disk
	to   Name
	dev  Device
	head *bundle.Head
	buf  []byte
	off  int64 // where buf goes
	kept int64 // bytes that are there already
	safe int64 // bytes that are durable
	err  error
}

// Begin takes the slot for an image whose head is verified. From here on it holds no image, until [Update.Commit]. kept is how much of the
// image is there already, by [Disk.Partial]: that many bytes of what is written are passed over.
func (d *Disk) Begin(running Name, h *bundle.Head, kept int64) (*Update, error) {
	to, err := d.Target(running)
	if err != nil {
		return nil, err
	}
	dev := d.slots[to]
	if h.Size() > dev.Size() {
		return nil, &bundle.RefusedError{Reason: bundle.TooLarge, Detail: fmt.Sprintf("it has %d bytes and slot %s has %d", h.Size(), to, dev.Size())}
	}
	digest := hex.EncodeToString(h.Digest[:])
	if have := d.Partial(running, digest); kept > have {
		return nil, fmt.Errorf("resume at byte %d: slot %s has %d bytes of that image", kept, to, have)
	}
	err = d.change(func(s *State) error {
		*s.Slot(to) = entry(h, Writing)
		s.Slot(to).Written = kept
		s.Fallback = ""
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &Update{d: d, to: to, dev: dev, head: h, buf: make([]byte, 0, d.chunk), kept: kept, safe: kept}, nil
}

func entry(h *bundle.Head, status Status) Slot {
	return Slot{
		Status: status, Version: h.Manifest.Version, Epoch: h.Manifest.Epoch, Root: h.Root.Version, Digest: hex.EncodeToString(h.Digest[:]), Size: h.Size(),
	}
}

// Slot returns the slot that the image goes to.
func (u *Update) Slot() Name { return u.to }

// Written returns how many bytes of the image went by.
func (u *Update) Written() int64 { return u.off + int64(len(u.buf)) }

// Write takes the next bytes of the image, from its first on.
func (u *Update) Write(p []byte) (n int, err error) {
	for u.err == nil && len(p) > 0 {
		if u.Written()+int64(len(p)) > u.head.Size() {
			u.err = fmt.Errorf("write slot %s: more than the image's %d bytes", u.to, u.head.Size())
			break
		}
		k := copy(u.buf[len(u.buf):u.d.chunk], p)
		u.buf = u.buf[:len(u.buf)+k]
		p, n = p[k:], n+k
		if len(u.buf) == u.d.chunk {
			u.flush()
		}
	}
	return n, u.err
}

// flush writes the buffer, and notes now and then how far it is.
func (u *Update) flush() {
	b, off := u.buf, u.off
	u.off += int64(len(b))
	u.buf = u.buf[:0]
	if skip := min(u.kept-off, int64(len(b))); skip > 0 {
		b, off = b[skip:], off+skip
	}
	if len(b) == 0 {
		return
	}
	if _, err := u.dev.WriteAt(b, off); err != nil {
		u.err = fmt.Errorf("write slot %s at byte %d: %w", u.to, off, err)
		return
	}
	if u.off-u.safe >= u.d.durable {
		u.note()
	}
}

// note makes what was written durable, and then says so.
func (u *Update) note() {
	if err := u.dev.Sync(); err != nil {
		u.err = fmt.Errorf("write slot %s down: %w", u.to, err)
		return
	}
	u.err = u.d.change(func(s *State) error { s.Slot(u.to).Written = u.off; return nil })
	if u.err == nil {
		u.safe = u.off
	}
}

// Commit makes the image durable, reads it back and verifies it by the same policy, and then has it tried with the next start, or
// keeps it to be activated.
func (u *Update) Commit(p bundle.Policy, stage bool, now time.Time) error {
	if stage {
		return u.commit(p, Staged, now)
	}
	return u.commit(p, Trial, now)
}

func (u *Update) commit(p bundle.Policy, as Status, now time.Time) error {
	if u.err == nil && len(u.buf) > 0 {
		u.flush()
	}
	if u.err != nil {
		return u.err
	}
	if u.off != u.head.Size() {
		return fmt.Errorf("slot %s has %d of the image's %d bytes", u.to, u.off, u.head.Size())
	}
	if err := u.dev.Sync(); err != nil {
		return fmt.Errorf("write slot %s down: %w", u.to, err)
	}
	img, err := bundle.OpenAt(u.dev, p)
	if err == nil {
		err = img.Verify()
	}
	if err == nil && img.Digest != u.head.Digest {
		err = errors.New("it is another image")
	}
	if err != nil {
		return fmt.Errorf("read slot %s back: %w", u.to, err)
	}
	return u.d.change(func(s *State) error {
		*s.Slot(u.to) = entry(u.head, as)
		s.Slot(u.to).Installed = now.UTC().Truncate(time.Second)
		return nil
	})
}

// Abort ends an update that does not end well. keep leaves what is durable for an update that resumes it: for a reader that broke off,
// not for an image that was refused.
func (u *Update) Abort(reason error, keep bool) error {
	if keep && u.err == nil && len(u.buf) > 0 {
		u.flush()
	}
	if keep && u.err == nil && u.off > u.safe {
		u.note()
	}
	return u.d.change(func(s *State) error {
		at := s.Slot(u.to)
		at.Reason = clip(reason.Error())
		if !keep {
			at.Written = 0
		}
		return nil
	})
}

// Settle ends the way back to what is below the image that runs and is good: the recovery image becomes a copy of it, if it is none or below its
// security epoch or key set, and then the lowest epoch and key set that are taken rise to its own. So at each moment there are two
// images that can be started. The counter of a TPM is to be raised after it returns.
func (d *Disk) Settle(running Name, p bundle.Policy) error {
	if running != A && running != B {
		return nil
	}
	s := d.State()
	at := *s.Slot(running)
	if at.Status != Good {
		return ErrUnproven
	}
	if to := d.slots[Golden]; to != nil && (s.Golden.Status != Good || s.Golden.Epoch < at.Epoch || s.Golden.Root < at.Root) {
		if err := d.copyGolden(to, running, at.Installed, p); err != nil {
			return fmt.Errorf("renew the recovery image: %w", err)
		}
	}
	if s.Epoch >= at.Epoch && s.Root >= at.Root {
		return nil
	}
	return d.change(func(s *State) error {
		if at.Epoch > s.Epoch {
			s.Lowest = at.Version
		}
		s.Epoch, s.Root = max(s.Epoch, at.Epoch), max(s.Root, at.Root)
		return nil
	})
}

func (d *Disk) copyGolden(to Device, from Name, installed time.Time, p bundle.Policy) error {
	img, err := bundle.OpenAt(d.slots[from], p)
	if err != nil {
		return err
	}
	if img.Size() > to.Size() {
		return fmt.Errorf("it has %d bytes and there is room for %d", img.Size(), to.Size())
	}
	if err := d.change(func(s *State) error { s.Golden = entry(&img.Head, Writing); return nil }); err != nil {
		return err
	}
	in, err := bundle.NewReader(io.NewSectionReader(d.slots[from], 0, img.Size()), p)
	if err != nil {
		return err
	}
	u := &Update{d: d, to: Golden, dev: to, head: &img.Head, buf: make([]byte, 0, d.chunk)}
	if _, err := io.Copy(u, in); err != nil {
		return err
	}
	return u.commit(p, Good, installed)
}
