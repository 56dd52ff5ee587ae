package query

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Busy is a process with its use of the CPUs.
type Busy struct {
	Process
	// Share is the part of one CPU that it took: 1 is a whole CPU, 2 is two of them.
	Share float64 `json:"share"`
}

// Load is the answer to "who eats the CPUs?", the busiest first.
type Load struct {
	At     time.Time     `json:"at"`
	Uptime time.Duration `json:"uptime"`
	// Over is the host's time between the two samples. With SinceBoot there was only one sample, and every share is
	// the average over the life of its process.
	Over      time.Duration `json:"over"`
	SinceBoot bool          `json:"sinceBoot"`
	CPUs      int           `json:"cpus"`
	Tasks     int           `json:"tasks"`
	Total     float64       `json:"total"` // CPUs taken by all together
	Processes []Busy        `json:"processes"`
	Complete  bool          `json:"complete"`
	Doubts    []string      `json:"doubts,omitempty"`
	// Confidence is that of the later sample.
	Confidence Confidence `json:"confidence,omitzero"`
}

// Top compares two samples of the same host, or judges one alone if before is nil. Time is the host's own where it is
// known, else the reader's. It errors if no time lies between the samples.
func Top(before *Processes, after Processes) (Load, error) {
	l := Load{
		At: after.At, Uptime: after.Uptime, CPUs: after.CPUs, Tasks: after.Tasks,
		Complete: after.Complete, Doubts: slices.Clone(after.Doubts), Confidence: after.Confidence,
	}
	type identity struct {
		pid, tid int
		start    time.Duration
	}
	old := make(map[identity]time.Duration)
	if before == nil {
		l.SinceBoot = true
		l.Over = after.Uptime
	} else {
		l.Over = after.At.Sub(before.At)
		if after.Uptime > before.Uptime && before.Uptime > 0 {
			l.Over = after.Uptime - before.Uptime
		}
		l.Complete = l.Complete && before.Complete
		for _, p := range before.Processes {
			old[identity{p.PID, p.TID, p.Start}] = p.Runtime
		}
	}
	if l.Over <= 0 {
		return Load{}, fmt.Errorf("compare samples: no time passed between them")
	}
	for _, p := range after.Processes {
		b := Busy{Process: p}
		over := l.Over
		ran := p.Runtime
		if l.SinceBoot {
			over = after.Uptime - p.Start
		} else if was, ok := old[identity{p.PID, p.TID, p.Start}]; ok {
			ran -= was // of a thread that ended in between the time is lost: never below zero
		} else if p.Start < before.Uptime {
			ran = 0 // it was there before the first sample, which has missed it
			if len(l.Doubts) < maxDoubts {
				l.Doubts = append(l.Doubts, fmt.Sprintf("PID %d was not in the first sample", p.PID))
			}
		}
		if over > 0 && ran > 0 {
			b.Share = float64(ran) / float64(over)
		}
		l.Total += b.Share
		l.Processes = append(l.Processes, b)
	}
	slices.SortStableFunc(l.Processes, func(a, b Busy) int { return cmp.Or(cmp.Compare(b.Share, a.Share), a.PID-b.PID) })
	return l, nil
}
