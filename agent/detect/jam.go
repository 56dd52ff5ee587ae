package detect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// JamSample is what waits in the kernel, and what it says of itself, once.
type JamSample struct {
	At    time.Time           `json:"at"`    // the reader's clock
	Pools []kernel.WorkerPool `json:"pools"` // those of which work waits to be begun
	Disks []kernel.Disk       `json:"disks"` // those with requests under way, of which the oldest are kept
	// Pressure is nil if the kernel does not account for stalls.
	Pressure *kernel.Pressure `json:"pressure,omitempty"`
	Taint    uint64           `json:"taint"`    // TAINT_… bits, include/linux/panic.h
	Starting bool             `json:"starting"` // it has not come to init yet
	// Stores is what fills, Links the cables of the network, Said what the kernel has said of trouble since the sample before.
	Stores []kernel.Store   `json:"stores,omitempty"`
	Links  []kernel.Link    `json:"links,omitempty"`
	Said   []Said           `json:"said,omitempty"`
	Times  []kernel.CPUTime `json:"times,omitempty"` // spent on interrupts
	// Newest is the sequence number of the newest record of the kernel's log; zero if unknown.
	Newest uint64 `json:"newest,omitempty"`
	// Injected are processes of root that have got code of no file, as far as they have been looked at.
	Injected []Injected `json:"injected,omitempty"`
	// BootWall is what the wall clock said when the host booted, by what it is set to now, in ns since 1970; zero if unknown.
	BootWall int64 `json:"bootWall,omitempty"`
	// Missing says which of pools and disks this kernel does not tell, and why.
	Missing map[string]string `json:"missing,omitempty"`
}

const (
	jamsEvery = 2 * time.Second
	jamsGap   = 8 * time.Second

	taintMachineCheck = 1 << 4
	taintBadPage      = 1 << 5
	taintWarn         = 1 << 9
	taintForcedLoad   = 1 << 1
	taintForcedUnload = 1 << 3
	taintACPITable    = 1 << 8

	thrash10, thrash60 = 40, 20 // percent of the time in which nobody got on for want of memory
	thrashPlenty       = 0.3    // of the memory, of which so much is there that it is not the host that lacks it
)

// before returns the newest sample that is at least a while older than the last, if none is missing between.
func before(js []JamSample, while time.Duration) *JamSample {
	n := len(js)
	for i := n - 2; i >= 0; i-- {
		if js[i+1].At.Sub(js[i].At) > jamsGap {
			return nil
		}
		if js[n-1].At.Sub(js[i].At) >= while {
			return &js[i]
		}
	}
	return nil
}

// stuckWork reports that a pool of kworkers begins nothing of what waits for it. The kernel itself says so after 30 s, where it
// is built to.
func stuckWork(c Config) Detector {
	return Detector{
		ID: "stuck-work", Title: "Workqueue does not get on", Kind: KindStuckWork, Severity: Critical,
		Every: jamsEvery, DependsOn: []Kind{KindPanic, KindHostSilent, KindCPUStall, KindSoftLockup}, Needs: []Need{NeedJams},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			if why := p.Jams[len(p.Jams)-1].Missing["pools"]; why != "" {
				return nil, errors.New(why)
			}
			old := before(p.Jams, jamsEvery/2)
			var out []Finding
			for _, now := range p.Jams[len(p.Jams)-1].Pools {
				if now.Waiting < c.WorkFor/2 || len(now.Pending) == 0 || len(out) == maxHung {
					continue
				}
				if old == nil {
					return nil, ErrTooEarly
				}
				first := now.Pending[0]
				// The first in line is still the same: else it is a pool with much to do.
				if !slices.ContainsFunc(old.Pools, func(o kernel.WorkerPool) bool {
					return o.ID == now.ID && len(o.Pending) > 0 && o.Pending[0].Addr == first.Addr
				}) {
					continue
				}
				f := Finding{
					Key: fmt.Sprintf("pool%d", now.ID), Kind: KindStuckWork, Severity: Critical, Confidence: 0.9, Suspicion: now.Waiting < c.WorkFor,
					Title:    fmt.Sprintf("the workers of CPU %d begin nothing", now.CPU),
					Detail:   fmt.Sprintf("%d works wait, the first of them, %s, for %v", len(now.Pending), first.Function, now.Waiting.Round(100*time.Millisecond)),
					Evidence: []Evidence{{"first in line", strings.TrimSpace(first.Function + " " + first.Queue)}, {"workers", fmt.Sprintf("%d, of which %d are idle", now.Workers, now.Idle)}},
				}
				if now.CPU < 0 {
					f.Title = fmt.Sprintf("the workers of pool %d begin nothing", now.ID)
				} else {
					f.Culprit.CPU = &now.CPU
				}
				for _, r := range now.Running {
					f.Evidence = append(f.Evidence, Evidence{fmt.Sprintf("%s (PID %d) is at", r.Comm, r.PID), strings.TrimSpace(r.Function + " " + r.Queue)})
				}
				if len(now.Running) > 0 {
					r := now.Running[0]
					f.Culprit.PID, f.Culprit.Comm = r.PID, r.Comm
					f.Title += fmt.Sprintf(": %s is at %s", r.Comm, r.Function)
					identify(&f.Culprit, p.Tasks)
				}
				out = append(out, f)
			}
			return out, nil
		},
	}
}

// stuckIO reports requests that a disk has had for longer than any healthy one takes.
func stuckIO(c Config) Detector {
	return Detector{
		ID: "stuck-io", Title: "Disk does not answer", Kind: KindStuckIO, Severity: Critical,
		Every: jamsEvery, DependsOn: []Kind{KindPanic, KindHostSilent, KindCPUStall}, Needs: []Need{NeedJams},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			if why := p.Jams[len(p.Jams)-1].Missing["disks"]; why != "" {
				return nil, errors.New(why)
			}
			old := before(p.Jams, jamsEvery/2)
			var out []Finding
			for _, d := range p.Jams[len(p.Jams)-1].Disks {
				if !slices.ContainsFunc(d.InFlight, func(r kernel.Request) bool { return r.Age >= c.IOFor/2 }) {
					continue
				}
				if old == nil {
					return nil, ErrTooEarly
				}
				i := slices.IndexFunc(old.Disks, func(o kernel.Disk) bool { return o.Name == d.Name && o.Dev == d.Dev })
				if i < 0 || len(out) == maxHung {
					continue
				}
				var oldest kernel.Request
				stuck := 0
				for _, r := range d.InFlight {
					// It is the same request only if it has grown older by the time between.
					if !slices.ContainsFunc(old.Disks[i].InFlight, func(o kernel.Request) bool { return o.Addr == r.Addr && o.Sector == r.Sector && o.Age < r.Age }) {
						continue
					}
					if r.Age >= c.IOFor/2 {
						stuck++
					}
					if r.Age > oldest.Age {
						oldest = r
					}
				}
				if oldest.Age < c.IOFor/2 {
					continue
				}
				out = append(out, Finding{
					Key: d.Name, Kind: KindStuckIO, Severity: Critical, Confidence: 0.9, Suspicion: oldest.Age < c.IOFor,
					Title:  fmt.Sprintf("disk %s does not answer", d.Name),
					Detail: fmt.Sprintf("it has had a %s of %d bytes at sector %d for %v", oldest.Op, oldest.Bytes, oldest.Sector, oldest.Age.Round(100*time.Millisecond)),
					Evidence: []Evidence{{"requests that wait", fmt.Sprint(stuck)}, {"completed meanwhile", fmt.Sprintf("%d reads, %d writes",
						d.Reads-old.Disks[i].Reads, d.Writes-old.Disks[i].Writes)}},
				})
			}
			return out, nil
		},
	}
}

// thrashing reports that for much of the time nothing on the host got on because everybody waited for memory. The kernel counts those, too, who wait
// for what their control group is not to have: on a host on which nobody else works these are everybody. On kernels that do not account for stalls (psi=0) it sees nothing.
func thrashing(Config) Detector {
	return Detector{
		ID: "thrashing", Title: "Everything waits for memory", Kind: KindExhaustion, Severity: Critical,
		Every: jamsEvery, Clear: 10 * time.Second, DependsOn: []Kind{KindPanic, KindHostSilent, KindForkBomb, KindMemoryHog}, Needs: []Need{NeedJams},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			m := p.Jams[len(p.Jams)-1].Pressure
			if m == nil {
				return nil, nil
			}
			full := m.Memory.Full
			if full.Avg10 < thrash10 || full.Avg60 < thrash60/2 {
				return nil, nil
			}
			f := Finding{
				Key: "pressure", Kind: KindExhaustion, Severity: Critical, Confidence: 0.85, Suspicion: full.Avg60 < thrash60,
				Title:    "everything waits for memory",
				Detail:   fmt.Sprintf("for %.0f %% of the last 10 s, and %.0f %% of the last minute, nothing got on for want of memory", full.Avg10, full.Avg60),
				Evidence: []Evidence{{"memory full avg10", fmt.Sprintf("%.1f", full.Avg10)}, {"memory some avg10", fmt.Sprintf("%.1f", m.Memory.Some.Avg10)}, {"io full avg10", fmt.Sprintf("%.1f", m.IO.Full.Avg10)}},
			}
			if n := len(p.Usage); n > 0 && p.Usage[n-1].Total > 0 {
				u := &p.Usage[n-1]
				f.Evidence = append(f.Evidence, Evidence{"available", fmt.Sprintf("%d of %d MiB", u.Available>>20, u.Total>>20)})
				if float64(u.Available) >= thrashPlenty*float64(u.Total) {
					f.Severity, f.Title = Warning, "a control group waits for memory"
					f.Detail += "; the host has plenty: those who work there have used up what their control group is to have"
					if path := p.tightest(); path != "" {
						f.Evidence = append(f.Evidence, Evidence{"control group", path})
					}
				}
			}
			return []Finding{f}, nil
		},
	}
}

// tightest returns the control group with tasks that has the most beyond what it is to have, in shares of that; empty if none has reached it.
func (p *Pass) tightest() (path string) {
	if p.View == nil {
		return ""
	}
	most := 0.95
	for g, err := range p.View.Cgroups() {
		if err != nil {
			break
		}
		if g.Memory == nil || g.Tasks == 0 {
			continue
		}
		for _, limit := range []int64{g.Memory.High, g.Memory.Max} {
			if limit > 0 && float64(g.Memory.Current) > most*float64(limit) {
				path, most = g.Path, float64(g.Memory.Current)/float64(limit)
			}
		}
	}
	return path
}

// tainted reports what the kernel notes of itself and goes on: that the processor has told of an error of the hardware, at any
// time since boot, and that a warning of its own or a broken page has come up lately.
func tainted(Config) Detector {
	return Detector{
		ID: "taint", Title: "The kernel has noted a fault", Kind: KindKernelWarning, Severity: Warning,
		Every: jamsEvery, Clear: 10 * time.Second, DependsOn: []Kind{KindPanic, KindHostSilent, KindOops}, Needs: []Need{NeedJams},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Jams)
			now, first := p.Jams[n-1].Taint, p.Jams[0].Taint
			var out []Finding
			add := func(key, title string, kind Kind, s Severity, what string) {
				f := Finding{Key: key, Kind: kind, Severity: s, Confidence: 0.95, Title: title, Detail: what, Evidence: []Evidence{{"tainted", kernel.Taint(now)}}}
				if said := p.lastSaid(key); said != "" {
					f.Evidence = append(f.Evidence, Evidence{"log", said})
				}
				out = append(out, f)
			}
			if now&taintMachineCheck != 0 {
				add("machine-check", "the processor has told of an error of the hardware", KindHardware, Critical, "a machine check has come up since boot")
			}
			if now&^first&taintBadPage != 0 {
				add("bad-page", "the kernel has met a broken page", KindKernelWarning, Critical, "a page's own bookkeeping was found broken: somebody has written where he should not")
			}
			for _, t := range []struct {
				bit        uint64
				key, title string
			}{
				{taintForcedLoad, "forced-load", "a module was loaded by force"},
				{taintForcedUnload, "forced-unload", "a module was taken out by force"},
				{taintACPITable, "acpi-table", "a table of the firmware was replaced"},
			} {
				if now&^first&t.bit != 0 {
					add(t.key, t.title, KindTampering, Warning, "whoever has done that has root's rights, and what the kernel relies on may not hold any more")
				}
			}
			if now&^first&taintWarn != 0 {
				add("warning", "the kernel warns of a fault of its own", KindKernelWarning, Warning, "it has met what should not be, and goes on")
			}
			return out, nil
		},
	}
}

// saidOf is how what is noted begins in the kernel's log.
var saidOf = map[string][]string{"warning": {"WARNING: "}, "bad-page": {"BUG: Bad page"}, "machine-check": {"mce: [Hardware Error]", "[Hardware Error]"}}

// lastSaid returns the latest line of the kernel's log of a kind; empty if there is none.
func (p *Pass) lastSaid(key string) (said string) {
	if p.View == nil {
		return ""
	}
	for rec, err := range p.View.Log() {
		if err != nil {
			break
		}
		if rec.Facility == 0 && slices.ContainsFunc(saidOf[key], func(w string) bool { return strings.HasPrefix(rec.Text, w) }) {
			said = rec.Text
		}
	}
	return said
}

// clock reports that the host's monotonic clock stands still while its ticks are counted, or jumps ahead. One that lags
// behind, or catches up after it stood, is no fault: a machine may have been held.
func clock(c Config) Detector {
	const ahead = 5 * time.Second
	return Detector{
		ID: "clock", Title: "The host's clock is wrong", Kind: KindClock, Severity: Critical,
		Every: time.Second, Clear: 5 * time.Second, DependsOn: []Kind{KindPanic, KindHostSilent, KindCPUStall, KindSoftLockup}, Needs: []Need{NeedHeartbeats},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			s := p.series(c, c.lenient())
			n := len(s.beats)
			if n < 2 {
				return nil, ErrTooEarly
			}
			now := &s.beats[n-1]
			if time.Duration(now.Mono) < bootGrace {
				return nil, nil
			}
			// With timers of high resolution the ticks go by this clock, too, and are counted no more; the timers' interrupts come all the same.
			stood, at := s.still(func(old, now *kernel.Heartbeat) bool { return old.Mono == now.Mono })
			if at >= 0 && stood >= c.Silent/2 {
				ticks, irqs := now.Jiffies-s.beats[at].Jiffies, uint64(0)
				for i := range now.CPUs {
					irqs += (now.CPUs[i].TimerIRQs - s.beats[at].CPUs[i].TimerIRQs) & (1<<32 - 1)
				}
				if ticks > 100 || irqs > 100 {
					return []Finding{{
						Key: "stands", Kind: KindClock, Severity: Critical, Confidence: 0.9, Suspicion: stood < c.Silent,
						Title:    "the host's clock stands still",
						Detail:   fmt.Sprintf("for %v CLOCK_MONOTONIC has not moved, and %d ticks and %d interrupts of timers were counted meanwhile", stood, ticks, irqs),
						Evidence: []Evidence{{"mono", fmt.Sprint(now.Mono)}, {"jiffies", fmt.Sprint(now.Jiffies)}, {"timerIRQs", fmt.Sprint(irqs)}},
					}}, nil
				}
			}
			// One step that is much longer than the time that it took. What stood before it may be a machine that was held and catches
			// up, or an idle host's last tick.
			for i := 1; i < n; i++ {
				a, b := &s.beats[i-1], &s.beats[i]
				passed, theirs := b.At.Sub(a.At), time.Duration(b.Mono-a.Mono)
				from := i - 1
				for from > 0 && s.beats[from-1].Mono == a.Mono {
					from--
				}
				if theirs-passed < ahead || from == 0 || a.At.Sub(s.beats[from].At) > time.Second {
					continue
				}
				return []Finding{{
					Key: "ahead", Kind: KindClock, Severity: Critical, Confidence: 0.9,
					Title:    "the host's clock has jumped ahead",
					Detail:   fmt.Sprintf("it went on by %v within %v", theirs.Round(time.Millisecond), passed.Round(time.Millisecond)),
					Evidence: []Evidence{{"mono", fmt.Sprint(b.Mono)}},
				}}, nil
			}
			return p.wallSet(), nil
		},
	}
}

// wallSet reports that the wall clock was set by more than services that keep it do at once. Hosts whose own clock is bad are set so in their first minute.
func (p *Pass) wallSet() []Finding {
	const (
		much    = 5 * time.Second
		settled = time.Minute
	)
	n := len(p.Jams)
	for i := 1; i < n; i++ {
		a, b := p.Jams[i-1].BootWall, p.Jams[i].BootWall
		by := time.Duration(b - a)
		if a == 0 || b == 0 || by.Abs() < much || time.Duration(p.Beats[len(p.Beats)-1].Mono)-p.Jams[n-1].At.Sub(p.Jams[i].At) < settled {
			continue
		}
		way := "ahead"
		if by < 0 {
			way = "back"
		}
		return []Finding{{
			Key: "set", Kind: KindClock, Severity: Warning, Confidence: 0.9,
			Title:    fmt.Sprintf("the host's wall clock was set %s by %v", way, by.Abs().Round(time.Second)),
			Detail:   "certificates, logs and leases of the host go by it",
			Evidence: []Evidence{{"boot", time.Unix(0, a).UTC().Format(time.RFC3339)}, {"boot, as it is now", time.Unix(0, b).UTC().Format(time.RFC3339)}},
		}}
	}
	return nil
}

// clockBack reports what never goes back in one start of a kernel, and has: the monotonic clock and the ticks with it by as much, the sequence of the
// log's records, the count of processes ever made. Somebody has put back what was in memory before, all of it or that part, or shows us a
// recording. A kernel that has started since, in the place of another, is too young for that.
func clockBack(c Config) Detector {
	return Detector{
		ID: "clock-back", Title: "Old memory put back", Kind: KindTampering, Severity: Critical,
		Every: time.Second, Clear: 5 * time.Second, Needs: []Need{NeedHeartbeats},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			if len(p.Beats) < 2 {
				return nil, ErrTooEarly
			}
			return slices.Concat(clockWentBack(p.Beats), logWentBack(p), forksWentBack(p)), nil
		},
	}
}

func wentBack(key, title, detail string, evidence ...Evidence) []Finding {
	return []Finding{{Key: key, Kind: KindTampering, Severity: Critical, Confidence: 0.9, Title: title, Detail: detail, Evidence: evidence}}
}

// sameStart reports whether the kernel that is seen now, which has run for up, had started well before a time: else another one may have been there then.
func sameStart(up time.Duration, now, then time.Time) bool { return up >= now.Sub(then)+10*time.Second }

// clockWentBack bears gaps between the beats: whoever puts all memory back keeps host and path busy for a while, and the clock goes by the host's time.
func clockWentBack(beats []kernel.Heartbeat) []Finding {
	const (
		least = time.Second     // that it has gone back
		since = 3 * time.Second // ago, and it is behind still
	)
	n := len(beats)
	last := &beats[n-1]
	for i := n - 1; i > 0; i-- {
		a, b := &beats[i-1], &beats[i]
		back := time.Duration(a.Mono - b.Mono)
		behind := last.At.Sub(a.At) - time.Duration(last.Mono-a.Mono)
		if back < least || behind < least || last.At.Sub(b.At) < since || !sameStart(time.Duration(b.Mono), b.At, a.At) {
			continue
		}
		// By the length of a tick, as it was until then; where no more is left of that than the one beat, as it can be.
		first := &beats[0]
		ticks, lost := a.Jiffies-first.Jiffies, a.Jiffies-b.Jiffies
		if ticks > 1<<32 || lost == 0 || lost > 1<<32 {
			continue // garbage
		}
		lengths := []float64{1e9 / 100, 1e9 / 250, 1e9 / 300, 1e9 / 1000} // ns, by CONFIG_HZ (kernel/Kconfig.hz)
		if ticks > 0 {
			lengths = []float64{float64(a.Mono-first.Mono) / float64(ticks)}
		}
		if !slices.ContainsFunc(lengths, func(tick float64) bool {
			return (time.Duration(tick*float64(lost)) - back).Abs() <= back/4+least/2
		}) {
			continue
		}
		return wentBack("clock-back", "the host's memory shows an earlier time",
			fmt.Sprintf("%v ago its clock has gone back by %v, and its count of ticks with it, in the same start of the kernel: what is in memory was put back, "+
				"or is a recording", last.At.Sub(b.At).Round(time.Second), back.Round(time.Millisecond)),
			Evidence{"mono", fmt.Sprint(b.Mono)}, Evidence{"mono_before", fmt.Sprint(a.Mono)}, Evidence{"jiffies", fmt.Sprint(b.Jiffies)}, Evidence{"jiffies_before", fmt.Sprint(a.Jiffies)})
	}
	return nil
}

// logWentBack compares the two newest looks with those before. The kernel may be adding to its newest record, which then cannot be read.
func logWentBack(p *Pass) []Finding {
	n := len(p.Jams)
	if n < 3 {
		return nil
	}
	up := time.Duration(p.Beats[len(p.Beats)-1].Mono)
	var was uint64
	for _, s := range p.Jams[:n-2] {
		if sameStart(up, p.Jams[n-1].At, s.At) {
			was = max(was, s.Newest)
		}
	}
	now, old := p.Jams[n-1].Newest, p.Jams[n-2].Newest
	if now == 0 || old == 0 || now+1 >= was || old+1 >= was {
		return nil
	}
	return wentBack("log-back", "the kernel's log shows an earlier time",
		fmt.Sprintf("its newest record is number %d, and was number %d, in the same start of the kernel: old pages of the log were put back", now, was),
		Evidence{"seq", fmt.Sprint(now)}, Evidence{"seq_before", fmt.Sprint(was)})
}

// forksWentBack compares the newest looks with those before.
func forksWentBack(p *Pass) []Finding {
	const stands = time.Second
	n := len(p.Usage)
	if n < 3 {
		return nil
	}
	last, up := &p.Usage[n-1], time.Duration(p.Beats[len(p.Beats)-1].Mono)
	var was, since uint64 // the most before, and the most for as long as it must stand
	looks := 0
	for _, u := range p.Usage {
		switch {
		case last.At.Sub(u.At) <= stands:
			since, looks = max(since, u.Forks), looks+1
		case sameStart(up, last.At, u.At):
			was = max(was, u.Forks)
		}
	}
	if looks < 3 || since >= was {
		return nil
	}
	return wentBack("forks-back", "the kernel has made fewer processes than before",
		fmt.Sprintf("it has made %d processes and threads since it started, and had made %d before: old memory was put back", last.Forks, was),
		Evidence{"total_forks", fmt.Sprint(last.Forks)}, Evidence{"total_forks_before", fmt.Sprint(was)})
}

// bootStuck reports a start that does not come to its end: a kernel that does not come to init, or a host that was reset, whose
// memory can be read, and in which no kernel comes up.
func bootStuck(c Config) Detector {
	return Detector{
		ID: "boot-stuck", Title: "The host does not come up", Kind: KindBootStuck, Severity: Critical,
		Every: jamsEvery, DependsOn: []Kind{KindPanic}, Needs: nil,
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			f := Finding{Key: "boot", Kind: KindBootStuck, Severity: Critical, Confidence: 0.9, Title: "the host does not come up"}
			if !p.NoKernel.IsZero() {
				d := p.Now.Sub(p.NoKernel)
				if d < c.BootFor/2 {
					return nil, nil
				}
				f.Suspicion = d < c.BootFor
				f.Detail = fmt.Sprintf("since its kernel ended %v ago none has come up: it stands in its firmware or its loader, or is switched off", d.Round(time.Second))
				return []Finding{f}, nil
			}
			n, b := len(p.Jams), len(p.Beats)
			if n == 0 || b == 0 {
				return nil, ErrTooEarly
			}
			up := time.Duration(p.Beats[b-1].Mono)
			if !p.Jams[n-1].Starting || up < c.BootFor/2 {
				return nil, nil
			}
			f.Suspicion = up < c.BootFor
			f.Detail = fmt.Sprintf("its kernel runs for %v and has not started init", up.Round(time.Second))
			return []Finding{f}, nil
		},
	}
}
