package kernel

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Confidence is the evidence that what a View has answered so far belongs together, gathered as it was read. A host that runs
// changes while it is read: what was torn was read anew, and counts here.
type Confidence struct {
	Objects  int `json:"objects"`  // read in one piece, behind a pointer of the right class
	Twice    int `json:"twice"`    // whose identity was read a second time, past the cache
	Changed  int `json:"changed"`  // of these, those that were another by then
	Lists    int `json:"lists"`    // that came back to where they begin, with their ways back right
	Restarts int `json:"restarts"` // walks that were begun anew, because the host changed what they were at
	Clocks   int `json:"clocks"`   // readings under the kernel's own sequence count
	Retries  int `json:"retries"`  // of these, those that had to wait for a writer
	Broken   int `json:"broken"`   // walks that were given up: torn again and again, or broken the same way twice
}

// Since returns what of the evidence is newer than before: that of a single answer, if the View gave no other meanwhile.
func (c Confidence) Since(before Confidence) Confidence {
	return Confidence{
		Objects: c.Objects - before.Objects, Twice: c.Twice - before.Twice, Changed: c.Changed - before.Changed,
		Lists: c.Lists - before.Lists, Restarts: c.Restarts - before.Restarts, Clocks: c.Clocks - before.Clocks,
		Retries: c.Retries - before.Retries, Broken: c.Broken - before.Broken,
	}
}

// What Level says.
const (
	HighConfidence = "high"
	FairConfidence = "fair"
	LowConfidence  = "low"
)

// Level condenses the evidence: "high" if nothing that was looked at twice had changed, "fair" if all that was torn was read
// anew and is whole now, "low" if something was given up, or changed behind the answer.
func (c Confidence) Level() string {
	switch {
	case c.Broken > 0 || c.Changed > 0:
		return LowConfidence
	case c.Restarts > 0 || c.Objects+c.Lists+c.Clocks == 0:
		return FairConfidence
	}
	return HighConfidence
}

// String says it in a line.
func (c Confidence) String() string {
	return fmt.Sprintf("%s: %d objects, %d of %d changed at a second look, %d lists closed, %d walks begun anew, %d given up",
		c.Level(), c.Objects, c.Changed, c.Twice, c.Lists, c.Restarts, c.Broken)
}

// Confidence returns the evidence so far.
func (v *View) Confidence() Confidence {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.sure
}

// piece is a part of the host's memory: n bytes.
type piece struct {
	at VirtAddr
	n  int
}

// secondLook reads pieces again, past the cache, and returns which are others by now.
func (v *View) secondLook(pieces []piece) ([]bool, error) {
	changed := make([]bool, len(pieces))
	segs := make([]hostmem.Segment, 0, len(pieces))
	of := make([]int, 0, len(pieces))
	first := make([][]byte, len(pieces))
	for i, p := range pieces {
		first[i] = make([]byte, p.n)
		if err := v.img.space.object(v, "second look", p.at, first[i]); err != nil {
			return nil, err
		}
		pa, size, err := v.img.space.translate(v, p.at)
		if err != nil {
			return nil, err
		}
		if size >= uint64(p.n) { // no field of a structure lies across pages that are mapped apart
			segs, of = append(segs, hostmem.Segment{Addr: pa, Buf: make([]byte, p.n)}), append(of, i)
		}
	}
	if len(segs) == 0 {
		return changed, nil
	}
	err := v.readScattered(segs)
	for j, s := range segs {
		if s.Err != nil && !errors.Is(s.Err, hostmem.ErrNotMapped) {
			return nil, s.Err
		}
		changed[of[j]] = s.Err != nil || !bytes.Equal(s.Buf, first[of[j]])
		if s.Err != nil {
			err = nil
		}
	}
	return changed, err
}

// note adds evidence.
func (v *View) note(add func(*Confidence)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	add(&v.sure)
}
