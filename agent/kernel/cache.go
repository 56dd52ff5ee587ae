package kernel

import (
	"bytes"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Cache keeps what kernels carry about themselves, by their build IDs, so that the next attach to the same build (after a
// reboot, or a lost path) neither reads nor parses it again. What is taken from it is compared in samples with the memory,
// and proven with it as a whole, as everything is. The zero value is ready; it is safe for concurrent use.
type Cache struct {
	mu    sync.Mutex
	kept  map[string]*carried // guarded by mu
	order []string            // guarded by mu; of the keys, the oldest first
}

// cacheBuilds is how many builds a Cache keeps, of some 10 MiB each: the host's, the one that it is updated to, that of its crash
// kernel.
const cacheBuilds = 3

// carried is what a build of a kernel carries: the same wherever it is loaded.
type carried struct {
	syms  *kallsyms // without what depends on the place
	types *types
	head  []byte // of the BTF
	// elsewhere says that the types are not the kernel's own.
	elsewhere bool
	// places is where the symbol table is, relative to _stext.
	places kallsymsPlaces
	// more are the symbols that kallsyms lacks, relative to _stext; nil if it lacks none.
	more map[string]VirtAddr
}

func cacheKey(v *vmcoreinfo) string {
	if id := v.values["BUILD-ID"]; id != "" {
		return id + " " + v.values["OSRELEASE"]
	}
	return "" // before v5.9 there is none
}

func (c *Cache) get(v *vmcoreinfo) *carried {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kept[cacheKey(v)]
}

// put keeps what a proven kernel carries.
func (c *Cache) put(img *Image) {
	key := cacheKey(img.note)
	if c == nil || key == "" {
		return
	}
	b := &carried{syms: img.syms.bare(), types: img.types, head: img.btfHead, elsewhere: img.elsewhere}
	stext, ok := img.note.symbol("_stext")
	b.places = img.syms.places.moved(-stext)
	if ok && img.lacking {
		b.more = maps.Clone(img.syms.more)
		for name := range b.more {
			b.more[name] -= stext
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kept == nil {
		c.kept = make(map[string]*carried)
	}
	if _, ok := c.kept[key]; !ok {
		if len(c.order) == cacheBuilds {
			delete(c.kept, c.order[0])
			c.order = slices.Delete(c.order, 0, 1)
		}
		c.order = append(c.order, key)
	}
	c.kept[key] = b
}

// samples compares parts of what is known with the memory at va: where it begins, where it ends, and some between.
func (img *Image) samples(src source, kind string, va VirtAddr, known []byte) (bool, error) {
	const size, count = 256, 8
	for i := range count {
		at := 0
		if room := len(known) - size; room > 0 {
			at = room / (count - 1) * i
		}
		want := known[at:min(at+size, len(known))]
		got := make([]byte, len(want))
		if err := img.space.object(src, kind, va+VirtAddr(at), got); err != nil {
			return false, err
		}
		if !bytes.Equal(got, want) {
			return false, nil
		}
	}
	return true, nil
}

// Hint is what an attach has learned that makes the next one fast. It may be kept on disk. It is a hint and no more: what is
// found with its help is proven as anything else.
type Hint struct {
	Note hostmem.PhysAddr `json:"note"` // of the VMCOREINFO note; zero if it is not known
	// With the rest, an idle kernel is known to be alive without waiting until it moves: the same boot, whose clock went on
	// as time did. Mono is the host's CLOCK_MONOTONIC (ns) at the time At.
	BootID string    `json:"bootID,omitempty"`
	Mono   int64     `json:"mono,omitempty"`
	At     time.Time `json:"at,omitzero"`
}

// Hint returns a hint for the next Open, as of the last Prove.
func (img *Image) Hint() Hint {
	h := Hint{Note: img.info.Note, BootID: img.info.BootID}
	if seen := img.seen.Load(); seen != nil {
		h.Mono, h.At = seen.mono, seen.at
	}
	return h
}

// seen is a reading of the host's clock.
type seen struct {
	mono int64
	at   time.Time
}

const (
	// idleMost is how long an idle kernel may leave its clock alone: its watchdogs wake it every four seconds.
	idleMost = 5 * time.Second
	// hintDrift is how far two clocks that are kept right may drift apart, of the time that passes (500 ppm each).
	hintDrift = 1000
)

// goesOn reports whether the clock of a candidate has gone on since the hint as the time has: then it was alive at most
// idleMost ago. A corpse whose host was reset is older by the time that firmware takes.
func (h Hint) goesOn(c *candidate, now time.Time) bool {
	if h.BootID == "" || h.BootID != c.img.info.BootID || h.At.IsZero() {
		return false
	}
	passed := now.Sub(h.At)
	drift := passed / hintDrift
	lag := passed - time.Duration(c.beat.Mono-h.Mono)
	return passed > 0 && c.beat.Mono > h.Mono && drift < idleMost && lag > -drift-time.Second && lag < idleMost+drift
}
