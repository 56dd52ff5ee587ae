package detect

import (
	"context"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// overdueProof is how late a programmed timer event must be before its lateness proves anything.
const overdueProof = time.Second

// A booting kernel works for seconds before its ticks begin, and patches itself with interrupts off. So a CPU is judged only
// once it has had a second's worth of ticks, and none before the host is so old.
const (
	bootTicks = 250
	bootGrace = 10 * time.Second
)

// tickOffload is how long nothing may happen on a CPU whose tick is switched off while it is busy (nohz_full): three times
// the period at which sched_tick_remote sets its run queue's clock from elsewhere.
const tickOffload = 3 * time.Second

// cpuStall reports CPUs that make no progress. Three rules, for a CPU shows it in different ways:
//
//   - busy: it runs a task, and no timer tick, interrupt or switch of tasks happens. Interrupts are off.
//   - in interrupt: the hard-interrupt bits of its preempt count stand unchanged, and no tick happens. The busy rule is blind
//     to it where the interrupt has come in the idle task.
//   - frozen: it idles, nothing about it moves, and the timer event that it had programmed is long overdue.
//
// A CPU that idles with its tick stopped (NO_HZ) moves nothing for seconds either; that is why the third needs the event.
// Where CPUs have lately been held up and come back by themselves, as on an overloaded hypervisor, three times as long a stand
// is asked for as the longest of those.
//
// An idle CPU's suspicion begins anew when it wakes up, for the busy rule asks that it was busy all the time.
func cpuStall(c Config) Detector {
	return Detector{
		ID: "cpu-stall", Title: "CPU without progress", Kind: KindCPUStall, Severity: Critical,
		DependsOn: []Kind{KindPanic, KindHostSilent},
		Needs:     []Need{NeedHeartbeats},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			if calm(c, p.Beats) {
				return nil, nil // as nearly always: what follows walks through all beats
			}
			s, long := p.series(c, c.strict()), p.series(c, c.lenient())
			if s.watched() < c.StallSuspect {
				return nil, ErrTooEarly
			}
			patient, asked := c, false
			if p.Tickless {
				patient.StallSuspect, patient.StallVerdict = max(c.StallSuspect, tickOffload), max(c.StallVerdict, tickOffload)
			}
			var fs []Finding
			for i := range s.beats[len(s.beats)-1].CPUs {
				f, ok := stalled(patient, s, long, i, p.Tickless)
				if ok && !asked { // seldom, so only now
					asked = true
					if held := 3 * s.held(); held > 0 {
						patient.StallSuspect, patient.StallVerdict = max(patient.StallSuspect, held), max(patient.StallVerdict, held)
						f, ok = stalled(patient, s, long, i, p.Tickless)
					}
				}
				if ok {
					identify(&f.Culprit, p.Tasks)
					fs = append(fs, f)
				}
			}
			return fs, nil
		},
	}
}

// untouched reports whether nothing has happened on a CPU between two beats that leaves a trace.
func untouched(o, n *kernel.CPU) bool {
	return o.ID == n.ID && o.TimerIRQs == n.TimerIRQs && o.IRQs == n.IRQs && o.Switches == n.Switches
}

// calm reports whether each CPU has moved so lately that no rule can hold of it.
func calm(c Config, beats []kernel.Heartbeat) bool {
	if len(beats) < 2 {
		return false
	}
	now := &beats[len(beats)-1]
	for i := range now.CPUs {
		n := &now.CPUs[i]
		stands := c.StallSuspect
		if n.Idle && n.Preempt&hardirqMask == 0 {
			stands = c.IdleVerdict
		}
		for at := len(beats) - 2; ; at-- {
			if at < 0 {
				return false // it has not been watched for long enough to tell
			}
			old := &beats[at]
			if len(old.CPUs) != len(now.CPUs) || now.At.Sub(old.At) >= stands {
				return false
			}
			if !untouched(&old.CPUs[i], n) {
				break
			}
		}
	}
	return true
}

func stalled(c Config, s, long series, i int, tickless bool) (Finding, bool) {
	last := &s.beats[len(s.beats)-1].CPUs[i]
	if !last.Online || last.TimerIRQs < bootTicks || time.Duration(s.beats[len(s.beats)-1].Mono) < bootGrace {
		return Finding{}, false
	}
	busy, _ := s.still(func(old, now *kernel.Heartbeat) bool {
		o, n := &old.CPUs[i], &now.CPUs[i]
		return !n.Idle && !o.Idle && o.Curr == n.Curr && (!tickless || o.Clock == n.Clock) && untouched(o, n)
	})
	inIRQ, _ := s.still(func(old, now *kernel.Heartbeat) bool {
		o, n := &old.CPUs[i], &now.CPUs[i]
		return n.Preempt&hardirqMask != 0 && o.Preempt&hardirqMask == n.Preempt&hardirqMask && untouched(o, n)
	})
	frozen, _ := long.still(func(old, now *kernel.Heartbeat) bool {
		o, n := &old.CPUs[i], &now.CPUs[i]
		return n.Idle && o.Idle && o.Clock == n.Clock && o.NMIs == n.NMIs && untouched(o, n)
	})
	if inIRQ < c.StallSuspect && busy < c.StallSuspect && frozen < c.IdleVerdict {
		return Finding{}, false
	}
	late := long.overdue(i)

	cpu := last.ID
	f := Finding{
		Key: fmt.Sprintf("cpu%d", cpu), Kind: KindCPUStall, Severity: Critical, Confidence: 0.95,
		Culprit: Culprit{CPU: &cpu, PID: last.CurrPID, Comm: last.CurrComm},
		Evidence: []Evidence{
			{"timerIRQs", fmt.Sprint(last.TimerIRQs)},
			{"preemptCount", fmt.Sprintf("%#x", last.Preempt)},
			{"switches", fmt.Sprint(last.Switches)},
		},
	}
	var stood time.Duration
	switch {
	case inIRQ >= c.StallSuspect && inIRQ >= busy:
		stood = inIRQ
		f.Title = fmt.Sprintf("CPU %d is stuck in an interrupt", cpu)
		f.Detail = fmt.Sprintf("for %v it has been inside one hard interrupt without a timer tick; it runs %q (PID %d)", inIRQ, last.CurrComm, last.CurrPID)
	case busy >= c.StallSuspect:
		stood = busy
		f.Title = fmt.Sprintf("CPU %d is locked with interrupts off", cpu)
		f.Detail = fmt.Sprintf("for %v it has been running %q (PID %d) without a timer tick, an interrupt or a switch of tasks", busy, last.CurrComm, last.CurrPID)
	case frozen >= c.IdleVerdict && late >= overdueProof:
		stood = frozen
		f.Title = fmt.Sprintf("CPU %d is frozen", cpu)
		f.Detail = fmt.Sprintf("it idles, nothing about it has moved for %v, and its timer event is overdue by %v", frozen, late.Round(time.Millisecond))
		f.Culprit = Culprit{CPU: &cpu}
	default:
		return Finding{}, false
	}
	f.Evidence = append(f.Evidence, Evidence{"still", stood.String()})
	if late > 0 {
		f.Evidence = append(f.Evidence, Evidence{"timerOverdue", late.Round(time.Millisecond).String()})
	}
	if stood < c.StallVerdict {
		f.Suspicion, f.Severity, f.Confidence = true, Warning, 0.5
	}
	return f, true
}

// identify completes a culprit of whom only the PID is known from the newest task list that has him.
func identify(c *Culprit, samples []TaskSample) {
	if c.PID == 0 {
		return
	}
	for i := len(samples) - 1; i >= 0; i-- {
		for _, t := range samples[i].Tasks {
			if t.PID == c.PID && t.Comm == c.Comm {
				uid := t.UID
				c.TGID, c.UID, c.Start = t.TGID, &uid, t.Start
				return
			}
		}
	}
}

// hostSilent reports a host on which nothing progresses, or whose memory is out of reach.
//
// That nothing moves is not enough, for an idle host may be still for some time: at least one CPU must show that it should
// have moved, by running a task, by being in an interrupt, or by an overdue timer event.
func hostSilent(c Config) Detector {
	return Detector{
		ID: "host-silent", Title: "Host without any progress", Kind: KindHostSilent, Severity: Critical,
		Every: slowly, DependsOn: []Kind{KindPanic},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			if !p.PathDown.IsZero() {
				down := p.Now.Sub(p.PathDown)
				if down < c.Silent {
					return nil, fmt.Errorf("the path to memory has been down for %v: %s", down.Round(time.Millisecond), p.Path)
				}
				return []Finding{{
					Key: "host", Kind: KindHostSilent, Severity: Critical, Confidence: 0.6,
					Title:    "the host's memory is out of reach",
					Detail:   fmt.Sprintf("for %v no access has come back: the host is switched off, its bus is down, or the link is lost", down.Round(time.Second)),
					Evidence: []Evidence{{"path", p.Path}},
				}}, nil
			}
			if p.Path != "" {
				return nil, fmt.Errorf("no kernel can be read: %s", p.Path)
			}
			s := p.series(c, c.lenient())
			n := len(s.beats)
			if n < 2 {
				return nil, ErrTooEarly
			}
			still, _ := s.still(func(old, now *kernel.Heartbeat) bool {
				if old.Jiffies != now.Jiffies || old.Mono != now.Mono {
					return false
				}
				for i := range now.CPUs {
					o, n := &old.CPUs[i], &now.CPUs[i]
					if o.TimerIRQs != n.TimerIRQs || o.IRQs != n.IRQs || o.Switches != n.Switches || o.Clock != n.Clock {
						return false
					}
				}
				return true
			})
			if still < c.Silent {
				if s.watched() < c.Silent && still == s.watched() {
					return nil, ErrTooEarly
				}
				return nil, nil
			}
			var proof []Evidence
			last := &s.beats[n-1]
			for i := range last.CPUs {
				cpu := &last.CPUs[i]
				late := s.overdue(i)
				switch {
				case !cpu.Online:
				case cpu.Preempt&hardirqMask != 0:
					proof = append(proof, Evidence{fmt.Sprintf("cpu%d", cpu.ID), "inside an interrupt"})
				case !cpu.Idle:
					proof = append(proof, Evidence{fmt.Sprintf("cpu%d", cpu.ID), fmt.Sprintf("runs %q (PID %d) without a tick", cpu.CurrComm, cpu.CurrPID)})
				case late >= overdueProof:
					proof = append(proof, Evidence{fmt.Sprintf("cpu%d", cpu.ID), "timer event overdue by " + late.Round(time.Millisecond).String()})
				}
			}
			if len(proof) == 0 {
				return nil, fmt.Errorf("nothing has moved for %v, but nothing was due either", still)
			}
			return []Finding{{
				Key: "host", Kind: KindHostSilent, Severity: Critical, Confidence: 0.95,
				Title:    "the host makes no progress at all",
				Detail:   fmt.Sprintf("for %v no CPU has had a tick, an interrupt or a switch of tasks, and the clock stands", still),
				Evidence: proof,
			}}, nil
		},
	}
}
