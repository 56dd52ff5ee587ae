package detect

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// taskKey tells threads apart over time: PIDs are used again, start times with them are not.
type taskKey struct {
	pid   int
	start time.Duration
}

// runawayProcess reports processes of which one thread has used more than its share of a CPU over the whole window and is
// at it still. What it counts is task_struct.se.sum_exec_runtime, which the scheduler keeps in ns of its own clock and
// brings up to date at ticks and switches: it lags by one tick (4 ms at HZ=250), far less than any sensible window.
//
// Kernel threads, init and exempt users are left alone. One finding per process, for processes are what can be ended.
func runawayProcess(c Config) Detector {
	return Detector{
		ID: "runaway-process", Title: "Runaway process", Kind: KindRunawayProcess, Severity: Warning,
		Every:     c.Tasks,
		DependsOn: []Kind{KindPanic, KindHostSilent},
		Needs:     []Need{NeedTasks},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Tasks)
			now := &p.Tasks[n-1]
			base := -1 // the newest sample that is old enough to be the start of a window
			for i := n - 2; i >= 0 && base < 0; i-- {
				if now.At.Sub(p.Tasks[i].At) >= c.RunawayFor {
					base = i
				}
			}
			if base < 0 {
				return nil, ErrTooEarly
			}
			recent := base // the newest sample that is far enough back to show what goes on lately
			for i := n - 2; i > recent; i-- {
				if now.At.Sub(p.Tasks[i].At) >= c.Tasks/2 {
					recent = i
				}
			}
			then, before := runtimes(&p.Tasks[base]), runtimes(&p.Tasks[recent])
			window, step := now.At.Sub(p.Tasks[base].At), now.At.Sub(p.Tasks[recent].At)

			hottest := map[int]hot{}
			var odd error
			for _, t := range now.Tasks {
				if t.KThread || t.TGID <= 1 || slices.ContainsFunc(c.RunawayExempt, func(r UIDRange) bool { return r.Contains(t.UID) }) {
					continue
				}
				k := taskKey{t.PID, t.Start}
				r0, ok := then[k]
				r1, ok1 := before[k]
				if !ok || !ok1 {
					continue // younger than the window
				}
				used, lately := t.Runtime-r0, t.Runtime-r1
				if used < 0 || float64(used) > 1.5*float64(window)+float64(now.Took+p.Tasks[base].Took) {
					odd = fmt.Errorf("task %d (%q) seems to have run for %v in %v", t.PID, t.Comm, used, window)
					continue
				}
				share := min(float64(used)/float64(window), 1)
				if share < c.RunawayShare || float64(lately) < c.RunawayShare/2*float64(step) {
					continue
				}
				if h, ok := hottest[t.TGID]; !ok || share > h.share {
					hottest[t.TGID] = hot{t, share, used}
				}
			}
			var fs []Finding
			for tgid, h := range hottest {
				fs = append(fs, runaway(c, tgid, h, window, leaderStart(now, tgid)))
			}
			slices.SortFunc(fs, func(a, b Finding) int { return a.Culprit.TGID - b.Culprit.TGID })
			if len(fs) > 0 {
				odd = nil
			}
			return fs, odd
		},
	}
}

type hot struct {
	task  kernel.Task
	share float64
	used  time.Duration
}

func runaway(c Config, tgid int, h hot, window, leader time.Duration) Finding {
	t, uid := h.task, h.task.UID
	f := Finding{
		Key: fmt.Sprintf("%d@%v", tgid, leader), Kind: KindRunawayProcess, Severity: Warning, Confidence: 0.95,
		Title: fmt.Sprintf("%q (PID %d) eats a CPU", t.Comm, tgid),
		Detail: fmt.Sprintf("it has used %.0f %% of one CPU over %v; policy allows %.0f %% over %v",
			100*h.share, window.Round(10*time.Millisecond), 100*c.RunawayShare, c.RunawayFor),
		Culprit: Culprit{PID: t.PID, TGID: tgid, Comm: t.Comm, UID: &uid, Start: t.Start},
		Evidence: []Evidence{
			{"share", fmt.Sprintf("%.3f", h.share)},
			{"runtime", h.used.String()},
			{"window", window.String()},
			{"sumExecRuntime", t.Runtime.String()},
		},
	}
	if t.OnCPU {
		cpu := t.CPU
		f.Culprit.CPU = &cpu
	}
	if !t.Confident {
		f.Confidence = 0.7
	}
	return f
}

func runtimes(s *TaskSample) map[taskKey]time.Duration {
	m := make(map[taskKey]time.Duration, len(s.Tasks))
	for _, t := range s.Tasks {
		m[taskKey{t.PID, t.Start}] = t.Runtime
	}
	return m
}

// leaderStart is when the process began; zero if its leader is not in the list.
func leaderStart(s *TaskSample, tgid int) time.Duration {
	for _, t := range s.Tasks {
		if t.PID == tgid {
			return t.Start
		}
	}
	return 0
}
