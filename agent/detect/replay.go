package detect

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// maxRecording bounds what ReadRecording takes, in bytes when unpacked.
const maxRecording = 256 << 20

// ReadRecording reads a series of samples of a host: a Pass as JSON, packed with gzip or not.
func ReadRecording(r io.Reader) (Pass, error) {
	var head [2]byte
	n, err := io.ReadFull(r, head[:])
	if err != nil {
		return Pass{}, fmt.Errorf("read recording: %w", err)
	}
	r = io.MultiReader(bytes.NewReader(head[:n]), r)
	if head == [2]byte{0x1f, 0x8b} {
		z, err := gzip.NewReader(r)
		if err != nil {
			return Pass{}, fmt.Errorf("read recording: %w", err)
		}
		defer z.Close()
		r = z
	}
	var p Pass
	if err := json.NewDecoder(io.LimitReader(r, maxRecording)).Decode(&p); err != nil {
		return Pass{}, fmt.Errorf("read recording: %w; it is not one that is whole: take it again with backdoor collect recording", err)
	}
	return p, nil
}

// WriteRecording writes a series as ReadRecording reads it, packed.
func WriteRecording(w io.Writer, p Pass) error {
	z := gzip.NewWriter(w)
	if err := json.NewEncoder(z).Encode(p); err != nil {
		return fmt.Errorf("write recording: %w", err)
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("write recording: %w", err)
	}
	return nil
}

const (
	// An excerpt has all samples of the tasks that are so young, and of those before some that are so far apart.
	excerptDense  = 5 * time.Second
	excerptSparse = 2500 * time.Millisecond
)

// Excerpt returns what Replay needs of a series, as it is now: nothing that is appended later is in it. Of its samples of tasks some are left out, and more
// until at most so many tasks are in all of them; the newest sample stays.
func (p *Pass) Excerpt(tasks int) Pass {
	x := Pass{
		Now: p.Now, Took: p.Took, Path: p.Path, PathDown: p.PathDown, NoKernel: p.NoKernel, Panic: p.Panic, Tickless: p.Tickless, Uncompared: p.Uncompared,
		Beats: slices.Clone(p.Beats), Usage: slices.Clone(p.Usage), Signs: slices.Clone(p.Signs), Jams: slices.Clone(p.Jams),
		Memory: slices.Clone(p.Memory), Network: slices.Clone(p.Network), Changes: slices.Clone(p.Changes), Weakened: slices.Clone(p.Weakened),
		Risen: slices.Clone(p.Risen),
	}
	n := len(p.Tasks)
	left := tasks
	for i := n - 1; i >= 0; i-- {
		s := &p.Tasks[i]
		if i < n-1 && i > 0 && p.Tasks[n-1].At.Sub(s.At) > excerptDense && x.Tasks[len(x.Tasks)-1].At.Sub(p.Tasks[i-1].At) <= excerptSparse {
			continue
		}
		if left -= len(s.Tasks); left < 0 && i < n-1 {
			break
		}
		x.Tasks = append(x.Tasks, *s)
	}
	slices.Reverse(x.Tasks)
	return x
}

// Replay judges a series as it was judged when it was taken: one pass for each heartbeat, in which only what was known by then is seen, and one as the
// series ends, with all that stood then: a panic, changes of the kernel's code, a path that is lost. more are detectors beside the usual ones. say is
// called with what each detector that had what it needs reports, until it returns false.
func Replay(ctx context.Context, c Config, whole Pass, more []Detector, say func(at time.Time, d *Detector, found []Finding) bool) {
	detectors := append(Detectors(c), NetworkDetectors(c)...)
	detectors = append(detectors, more...)
	dead := whole.Panic != nil && whole.Panic.Panicked
	for i := range len(whole.Beats) + 1 {
		p := Pass{Now: whole.Now, Panic: whole.Panic, Beats: whole.Beats, Tickless: whole.Tickless}
		if i < len(whole.Beats) {
			p.Now, p.Beats = whole.Beats[i].At, whole.Beats[:i+1]
			if dead {
				p.Panic = &kernel.PanicState{CPU: -1}
			}
		} else if n := len(whole.Beats); n > 0 && !whole.Now.After(whole.Beats[n-1].At) {
			p.Now = whole.Beats[n-1].At
		}
		if i == len(whole.Beats) {
			p.Path, p.PathDown, p.NoKernel = whole.Path, whole.PathDown, whole.NoKernel
			p.Changes, p.Uncompared, p.Weakened, p.Risen = whole.Changes, whole.Uncompared, whole.Weakened, whole.Risen
		}
		at := p.Now
		last := i == len(whole.Beats) // which sees what was read in it, too: after it began
		p.Tasks = until(whole.Tasks, at, last, func(s *TaskSample) time.Time { return s.At })
		p.Usage = until(whole.Usage, at, last, func(u *kernel.Usage) time.Time { return u.At })
		p.Signs = until(whole.Signs, at, last, func(s *kernel.Signs) time.Time { return s.At })
		p.Jams = until(whole.Jams, at, last, func(j *JamSample) time.Time { return j.At })
		p.Memory = until(whole.Memory, at, last, func(m *MemorySample) time.Time { return m.At })
		p.Network = until(whole.Network, at, last, func(n *NetworkSample) time.Time { return n.At })
		for k := range detectors {
			d := &detectors[k]
			if slices.ContainsFunc(d.Needs, func(n Need) bool { return !p.Has(n) }) {
				continue
			}
			found, err := d.Detect(ctx, &p)
			if err != nil {
				continue // could not tell
			}
			if !say(at, d, found) {
				return
			}
		}
	}
}

// until returns the samples that are no younger than a time, or all.
func until[T any](all []T, at time.Time, whole bool, of func(*T) time.Time) []T {
	if whole {
		return all
	}
	n := 0
	for n < len(all) && !of(&all[n]).After(at) {
		n++
	}
	return all[:n]
}
