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
		return Pass{}, fmt.Errorf("read recording: %w", err)
	}
	return p, nil
}

// Replay judges a series as it was judged when it was taken: one pass for each heartbeat, in which only what was known by then
// is seen. more are detectors beside the usual ones. say is called with what each detector that had what it needs reports, until it returns false.
func Replay(ctx context.Context, c Config, whole Pass, more []Detector, say func(at time.Time, d *Detector, found []Finding) bool) {
	detectors := append(Detectors(c), more...)
	for i := range whole.Beats {
		at := whole.Beats[i].At
		p := Pass{Now: at, Panic: whole.Panic, Beats: whole.Beats[:i+1], Tickless: whole.Tickless}
		p.Tasks = until(whole.Tasks, at, func(s *TaskSample) time.Time { return s.At })
		p.Usage = until(whole.Usage, at, func(u *kernel.Usage) time.Time { return u.At })
		p.Signs = until(whole.Signs, at, func(s *kernel.Signs) time.Time { return s.At })
		p.Jams = until(whole.Jams, at, func(j *JamSample) time.Time { return j.At })
		p.Memory = until(whole.Memory, at, func(m *MemorySample) time.Time { return m.At })
		for k := range detectors {
			d := &detectors[k]
			if slices.ContainsFunc(d.Needs, func(n Need) bool {
				return n == NeedPanic && p.Panic == nil || n == NeedTasks && len(p.Tasks) == 0 || n == NeedUsage && len(p.Usage) == 0 || n == NeedSigns && len(p.Signs) == 0 || n == NeedJams && len(p.Jams) == 0 || n == NeedMemory && len(p.Memory) == 0
			}) {
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

// until returns the samples that are no younger than a time.
func until[T any](all []T, at time.Time, of func(*T) time.Time) []T {
	n := 0
	for n < len(all) && !of(&all[n]).After(at) {
		n++
	}
	return all[:n]
}
