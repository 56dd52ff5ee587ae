package slot

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
)

// A Disk is the slots and their state. One process has it open.
type Disk struct {
	state  Device
	slots  map[Name]Device
	close  []io.Closer
	damage error // what was wrong with one of the copies, or with both

	chunk   int   // see the constants
	durable int64 // see the constants

	mu   sync.Mutex
	now  State // guarded by mu
	next int   // the copy that is written next; guarded by mu
}

// Open reads the state. golden may be nil, where there is no room for a recovery image. A disk whose state was lost (both copies
// are damaged, or one is and the other was never written) opens as well: what is in its slots is a trial then, for each image says itself
// whether it is whole and whose. A disk whose state was never written is empty.
func Open(state, a, b, golden Device) (*Disk, error) {
	if state == nil || a == nil || b == nil {
		return nil, errors.New("a disk needs partitions for the state and for both slots")
	}
	if state.Size() < MinState {
		return nil, fmt.Errorf("the state's partition has %d bytes and needs %d", state.Size(), MinState)
	}
	d := &Disk{state: state, slots: map[Name]Device{A: a, B: b}, chunk: chunk, durable: durable}
	if golden != nil {
		d.slots[Golden] = golden
	}
	var best State
	found, blank := false, 0
	for i := range 2 {
		buf := make([]byte, copySize)
		_, err := state.ReadAt(buf, d.copyAt(i))
		var s State
		if err == nil {
			s, err = decodeState(buf)
		}
		switch {
		case errors.Is(err, errNoState):
			blank++
		case err != nil:
			d.damage = errors.Join(d.damage, fmt.Errorf("copy %d of the state: %w", i, err))
		case !found || s.Seq > best.Seq:
			best, found, d.next = s, true, 1-i
		}
	}
	if !found && blank < 2 {
		best = State{A: Slot{Status: Trial}, B: Slot{Status: Trial}, Fallback: "the state was lost"}
		if golden != nil {
			best.Golden.Status = Good
		}
	}
	d.now = best
	return d, nil
}

func (d *Disk) copyAt(i int) int64 { return int64(i) * (d.state.Size() / 2 / copySize * copySize) }

// Close closes what Find opened.
func (d *Disk) Close() error {
	var errs []error
	for _, c := range d.close {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// State returns the state.
func (d *Disk) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now
}

// Damage returns what was wrong with the copies of the state when the disk was opened; nil if nothing was.
func (d *Disk) Damage() error { return d.damage }

// Slot returns a slot's device, with a bundle at its beginning if it holds an image; nil if the disk has no such slot.
func (d *Disk) Slot(n Name) Device { return d.slots[n] }

// change writes a changed state down. When it returns nil, the change is durable; when not, the old state or the new one is on the
// disk, and the old one in memory.
func (d *Disk) change(f func(*State) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.now
	if err := f(&s); err != nil {
		return err
	}
	s.Seq++
	b, err := encodeState(s)
	if err != nil {
		return err
	}
	if _, err = d.state.WriteAt(b, d.copyAt(d.next)); err == nil {
		err = d.state.Sync()
	}
	if err != nil {
		return fmt.Errorf("write the state of the slots: %w", err)
	}
	d.now, d.next = s, 1-d.next
	return nil
}

// Try counts a start of a slot. The loader calls it right before the jump, when nothing can fail any more but the image.
func (d *Disk) Try(n Name) error {
	return d.change(func(s *State) error { s.try(n); return nil })
}

// Refuse notes that the image in a slot cannot be started, and why.
func (d *Disk) Refuse(n Name, reason error) error {
	return d.change(func(s *State) error {
		if n == Golden {
			s.Fallback = "recovery image: " + clip(reason.Error())
			return nil
		}
		s.refuse(n, clip(reason.Error()))
		return nil
	})
}

func clip(s string) string {
	if len(s) > 300 {
		s = s[:300]
	}
	return s
}

// Good notes that the image that runs is good: it becomes the active one, and its starts are counted anew. It writes only if that
// is news. The way back stays open until [Disk.Settle].
func (d *Disk) Good(running Name) error {
	set := func(s *State) error {
		at := s.Slot(running)
		if at.Status == Empty || at.Status == Writing || at.Status == Staged {
			return fmt.Errorf("slot %q is said to run, and it is %q", running, at.Status)
		}
		s.good(running)
		return nil
	}
	before := d.State()
	after := before
	if err := set(&after); err != nil || after == before {
		return err
	}
	return d.change(set)
}

// Doubt notes why the image that runs does not say that it is good, for those who ask when another one runs.
func (d *Disk) Doubt(running Name, reason error) error {
	before := d.State()
	if at := before.Slot(running); at.Status == Empty || at.Reason == clip(reason.Error()) {
		return nil
	}
	return d.change(func(s *State) error { s.Slot(running).Reason = clip(reason.Error()); return nil })
}

// Adopt notes what an image is that the state does not know: one that was written without this package, or whose state was lost.
func (d *Disk) Adopt(n Name, h *bundle.Head) error {
	return d.change(func(s *State) error {
		at := s.Slot(n)
		at.Version, at.Epoch, at.Root = h.Manifest.Version, h.Manifest.Epoch, h.Root.Version
		at.Digest, at.Size = hex.EncodeToString(h.Digest[:]), h.Size()
		return nil
	})
}

// Activate has a slot tried with the next start, if it is staged, or started again, if it was good.
func (d *Disk) Activate(n Name) error {
	return d.change(func(s *State) error {
		at := s.Slot(n)
		switch {
		case n != A && n != B:
			return fmt.Errorf("slot %q cannot be activated", n)
		case at.Epoch < s.Epoch:
			return fmt.Errorf("slot %s is below the security epoch: %d, and this machine takes %d or later", n, at.Epoch, s.Epoch)
		case at.Status == Staged, at.Status == Trial:
			at.Status, at.Boots = Trial, 0
		case at.Status == Good && s.Active == n:
			// What was to be tried in its place is not.
			if o := s.Slot(n.Other()); o.Status == Trial {
				o.Status = Staged
			}
		case at.Status == Good:
			at.Status, at.Boots = Trial, 0 // it has to prove itself again
		default:
			return fmt.Errorf("slot %s holds nothing that can be activated: it is %q", n, at.Status)
		}
		s.Fallback = ""
		return nil
	})
}
