// Package slot keeps a machine's images in two slots, A and B, and a recovery image, such that it always starts.
//
// A new image goes into the slot that does not run. It is tried a few times and kept only if it says of itself, once it runs, that
// it is good; otherwise the machine goes back. What is in which slot, which is tried and how often, is the [State], of which two
// copies are kept. Layout, rules and crash cases are in DESIGN.md.
//
// The loader asks [State.Order] what to start, [Disk.Try]s it right before the jump, and [Disk.Refuse]s what cannot be started.
// The agent [Disk.Begin]s an update and calls [Disk.Good] when it has proved that it works.
package slot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A Name names a slot.
type Name string

// The slots. Golden is the recovery image: it is started when neither A nor B can be, and has no count of tries.
const (
	A      Name = "a"
	B      Name = "b"
	Golden Name = "golden"
)

// Other returns the other one of A and B.
func (n Name) Other() Name {
	if n == A {
		return B
	}
	return A
}

// argument is what the loader adds to the kernel's command line.
const argument = "backdoor.slot="

// Argument is what a loader adds to the command line of the kernel that it starts from the slot.
func (n Name) Argument() string { return argument + string(n) }

// Running returns the slot that a kernel was started from by its command line (/proc/cmdline); "" if it came otherwise.
func Running(commandLine string) Name {
	var last Name
	for _, w := range strings.Fields(commandLine) {
		if v, ok := strings.CutPrefix(w, argument); ok {
			last = Name(v) // the last one is the loader's: it adds its own behind the image's
		}
	}
	switch last {
	case A, B, Golden:
		return last
	}
	return ""
}

// A Status is what is known about the image in a slot.
type Status string

// What a slot can be.
const (
	Empty   Status = ""        // nothing was ever written
	Writing Status = "writing" // being written, or what a broken update left
	Staged  Status = "staged"  // whole and verified; not to be started until it is activated
	Trial   Status = "trial"   // to be started, and not yet good
	Good    Status = "good"    // it has run and said that it is good
	Bad     Status = "bad"     // it cannot be started, or did not prove itself; Reason says why
)

// How often an image is started without saying that it is good before another one is.
const (
	TrialBoots = 3
	GoodBoots  = 6
)

// A Slot is what the state says about one slot.
type Slot struct {
	Status  Status `json:"status"`
	Version string `json:"version,omitempty"`
	Epoch   uint32 `json:"epoch,omitempty"` // its security epoch
	Root    uint32 `json:"root,omitempty"`  // the version of the key set that it was signed under
	Digest  string `json:"digest,omitempty"`
	Size    int64  `json:"size,omitempty"` // bytes
	// Written is how much of an image that is being written is durable: from there on an update can be resumed.
	Written int64 `json:"written,omitempty"` // bytes
	// Boots counts how often it was started since it last said that it is good.
	Boots     int       `json:"boots,omitempty"`
	Installed time.Time `json:"installed,omitzero"`
	// Reason says why it is bad, or, of an image on trial, what it could not do when it was last tried.
	Reason string `json:"reason,omitempty"`
}

// A State is what the machine remembers about its slots.
type State struct {
	// Seq rises with each write.
	Seq uint64 `json:"seq"`
	// Active is the slot that is started when nothing is tried.
	Active Name `json:"active,omitempty"`
	A      Slot `json:"a"`
	B      Slot `json:"b"`
	Golden Slot `json:"golden"`
	// Epoch is the highest security epoch of an image that was good, as far as this disk knows. A TPM's counter is the authority
	// where there is one.
	Epoch uint32 `json:"epoch,omitempty"`
	// Lowest is the version of the image that raised the epoch to what it is.
	Lowest string `json:"lowest,omitempty"`
	// Root is the highest version of the key set that an image that was good was signed under.
	Root uint32 `json:"root,omitempty"`
	// Fallback says why what runs is not what was to run; it stays until the next update.
	Fallback string `json:"fallback,omitempty"`
}

// Slot returns a slot's entry.
func (s *State) Slot(n Name) *Slot {
	switch n {
	case A:
		return &s.A
	case B:
		return &s.B
	case Golden:
		return &s.Golden
	}
	return &Slot{}
}

// Order returns the slots in the order in which they are to be started, each if the one before cannot be: an image on trial, the
// active one, the other if it is good, the recovery image, and last what is known to be bad, if it is an image at all: a machine
// that starts badly is better than one that does not start. What is staged or half written is not there. minEpoch leaves out what
// is below the security epoch, whatever else it is.
func (s State) Order(minEpoch uint32) []Name {
	var order []Name
	add := func(n Name, want func(*Slot) bool) {
		at := s.Slot(n)
		for _, o := range order {
			if o == n {
				return
			}
		}
		below := at.Epoch != 0 && at.Epoch < max(minEpoch, s.Epoch) // 0: not known; the image itself says it
		if !below && want(at) {
			order = append(order, n)
		}
	}
	fresh := func(at *Slot) bool { return at.Status == Trial && at.Boots < TrialBoots }
	good := func(at *Slot) bool { return at.Status == Good && at.Boots < GoodBoots }
	first := s.Active
	if first != B {
		first = A
	}
	add(first.Other(), fresh)
	add(first, fresh)
	add(first, good)
	add(first.Other(), good)
	add(Golden, func(at *Slot) bool { return at.Status == Good })
	worn := func(at *Slot) bool { return at.Status == Good || at.Status == Trial || at.Status == Bad }
	add(first, worn)
	add(first.Other(), worn)
	return order
}

// try counts a start of n, and says of what was passed over why.
func (s *State) try(n Name) {
	for _, o := range []Name{A, B} {
		at := s.Slot(o)
		limit := map[Status]int{Trial: TrialBoots, Good: GoodBoots}[at.Status]
		if o != n && limit > 0 && at.Boots >= limit {
			why := fmt.Sprintf("it was started %d times and never said that it is good", at.Boots)
			if at.Reason != "" {
				why += ": " + at.Reason
			}
			s.refuse(o, why)
		}
	}
	if n == A || n == B {
		s.Slot(n).Boots++
	}
}

func (s *State) refuse(n Name, reason string) {
	at := s.Slot(n)
	if len(reason) > 300 {
		reason = reason[:300]
	}
	at.Status, at.Reason = Bad, reason
	s.Fallback = fmt.Sprintf("slot %s, version %s: %s", n, at.Version, reason)
}

// good notes that what runs is good.
func (s *State) good(n Name) {
	at := s.Slot(n)
	at.Status, at.Boots, at.Reason = Good, 0, ""
	if n == Golden {
		return
	}
	s.Active = n
}

// The state's partition: a copy at its beginning and one at half its size, so that on flash each has erase blocks of its own.
const (
	// MinState is the size that the partition has at least, in bytes.
	MinState = 128 << 10
	copySize = 4096
	// copyHead: 0 magic, 8 u64 seq, 16 u32 length of the JSON, 20 zeros, 32 SHA-256 of bytes 0 to 31 and the JSON.
	copyHead = 64
)

var stateMagic = [8]byte{0x89, 'B', 'D', 'S', '\r', '\n', 0, 1}

// encodeState returns a copy's bytes.
func encodeState(s State) ([]byte, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	if copyHead+len(text) > copySize {
		return nil, fmt.Errorf("the state has %d bytes and there is room for %d", len(text), copySize-copyHead)
	}
	b := make([]byte, copySize)
	copy(b, stateMagic[:])
	binary.LittleEndian.PutUint64(b[8:], s.Seq)
	binary.LittleEndian.PutUint32(b[16:], uint32(len(text)))
	copy(b[copyHead:], text)
	sum := stateSum(b[:copyHead], text)
	copy(b[32:], sum[:])
	return b, nil
}

func stateSum(head, text []byte) [sha256.Size]byte {
	return sha256.Sum256(append(append([]byte(nil), head[:32]...), text...))
}

// errNoState says that a copy was never written.
var errNoState = errors.New("there is no state")

// decodeState reads a copy.
func decodeState(b []byte) (State, error) {
	if len(b) < copyHead {
		return State{}, errors.New("the state is cut off")
	}
	if !bytes.Equal(b[:8], stateMagic[:]) {
		if len(bytes.Trim(b, "\x00")) == 0 || len(bytes.Trim(b, "\xff")) == 0 {
			return State{}, errNoState
		}
		return State{}, errors.New("this is no state")
	}
	n := int64(binary.LittleEndian.Uint32(b[16:]))
	if n > int64(len(b)-copyHead) {
		return State{}, errors.New("the state's length is wrong")
	}
	text := b[copyHead : copyHead+n]
	if sum := stateSum(b[:copyHead], text); !bytes.Equal(sum[:], b[32:32+sha256.Size]) {
		return State{}, errors.New("the state's checksum is wrong")
	}
	// Unknown fields are left alone: a loader is older than the agents that it starts.
	var s State
	if err := json.Unmarshal(text, &s); err != nil {
		return State{}, fmt.Errorf("state: %w", err)
	}
	if s.Seq != binary.LittleEndian.Uint64(b[8:]) {
		return State{}, errors.New("the state's sequence number is not the same twice")
	}
	for _, n := range []Name{A, B, Golden} {
		if at := s.Slot(n); at.Boots < 0 || at.Size < 0 || at.Written < 0 || at.Written > at.Size {
			return State{}, fmt.Errorf("slot %s: %d starts, %d of %d bytes", n, at.Boots, at.Written, at.Size)
		}
	}
	return s, nil
}
