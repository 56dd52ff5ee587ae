package detect

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// starved reports tasks that are ready to run and are not let: for HungFor they have been in the queue of a CPU, have not run, and the CPU has worked for
// others meanwhile. Who has worked there most is accused, for that is how a program of real-time priority without an end looks. By shares a scheduler
// gives everybody something within that time, and a CPU that a hypervisor holds works for nobody. Exempt users may have all of it, as for runawayProcess.
func starved(c Config) Detector {
	const busy = 0.7 // of the time, that others ran there
	return Detector{
		ID: "starved", Title: "Tasks that are not let run", Kind: KindRunawayProcess, Severity: Critical,
		Every: max(c.Tasks, time.Second), DependsOn: []Kind{KindPanic, KindHostSilent, KindCPUStall, KindSoftLockup, KindForkBomb}, Needs: []Need{NeedTasks},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Tasks)
			now := &p.Tasks[n-1]
			base := n - 1 // the newest sample that is so old
			for base >= 0 && now.At.Sub(p.Tasks[base].At) < c.HungFor {
				base--
			}
			if base < 0 {
				return nil, nil // what has not been there for so long does not wait for so long
			}
			// By CPU, those that waited in each of the samples.
			waits := make(map[taskKey]*kernel.Task)
			for i := range now.Tasks {
				if t := &now.Tasks[i]; t.State == "R" && !t.OnCPU {
					waits[taskKey{t.PID, t.Start}] = t
				}
			}
			for i := n - 2; i >= base && len(waits) > 0; i-- {
				if p.Tasks[i+1].At.Sub(p.Tasks[i].At) > max(4*c.Tasks, signsGap) {
					return nil, nil // nobody knows what was meanwhile
				}
				still := make(map[taskKey]*kernel.Task, len(waits))
				for k := range p.Tasks[i].Tasks {
					o := &p.Tasks[i].Tasks[k]
					key := taskKey{o.PID, o.Start}
					if t := waits[key]; t != nil && o.State == "R" && !o.OnCPU && o.CPU == t.CPU && o.Runtime == t.Runtime && o.Switches == t.Switches {
						still[key] = t
					}
				}
				waits = still
			}
			if len(waits) == 0 {
				return nil, nil
			}
			window := now.At.Sub(p.Tasks[base].At)
			then := runtimes(&p.Tasks[base])
			var out []Finding
			for _, cpu := range cpusOf(waits) {
				var most kernel.Task
				var worked, mostWorked time.Duration
				for _, t := range now.Tasks {
					if t.CPU != cpu {
						continue
					}
					used := t.Runtime - then[taskKey{t.PID, t.Start}] // all of it, if it is younger
					if used < 0 {
						continue
					}
					worked += used
					if used > mostWorked {
						most, mostWorked = t, used
					}
				}
				// Who has got another CPU since has not worked all the time here.
				if float64(min(worked, window)) < busy*float64(window) || mostWorked < worked/2 || len(out) == maxHung ||
					!most.KThread && slices.ContainsFunc(c.RunawayExempt, func(r UIDRange) bool { return r.Contains(most.UID) }) {
					continue
				}
				var first *kernel.Task
				many := 0
				for _, t := range waits {
					if t.CPU == cpu {
						if many++; first == nil || t.PID < first.PID {
							first = t
						}
					}
				}
				uid := most.UID
				out = append(out, Finding{
					Key: fmt.Sprintf("starved cpu%d", cpu), Rule: AspectStarved, Kind: KindRunawayProcess, Severity: Critical, Confidence: 0.9,
					Title: fmt.Sprintf("%q (PID %d) lets nobody else run on CPU %d", most.Comm, most.TGID, cpu),
					Detail: fmt.Sprintf("it has had %v of the last %v there, and %d others that are ready to run have got nothing, %q (PID %d) among them",
						mostWorked.Round(10*time.Millisecond), window.Round(10*time.Millisecond), many, first.Comm, first.PID),
					Culprit:  Culprit{CPU: &cpu, PID: most.PID, TGID: most.TGID, Comm: most.Comm, UID: &uid, Start: most.Start},
					Evidence: []Evidence{{"waits", fmt.Sprintf("%q (PID %d), since %d switches", first.Comm, first.PID, first.Switches)}, {"worked for others", worked.Round(time.Millisecond).String()}},
				})
			}
			return out, nil
		},
	}
}

// cpusOf returns the CPUs on which tasks are, in order.
func cpusOf(tasks map[taskKey]*kernel.Task) []int {
	var all []int
	for _, t := range tasks {
		if !slices.Contains(all, t.CPU) {
			all = append(all, t.CPU)
		}
	}
	slices.Sort(all)
	return all
}
