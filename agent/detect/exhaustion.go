package detect

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

const (
	bombWindow  = 2 * time.Second
	bombRate    = 100  // tasks more in a second
	bombLasting = 0.4  // share of what was forked that is still there: builds and shells fork as fast, but end as fast
	bombThreads = 1000 // that one process may start at once: servers start hundreds
	// bombForks is how many children at once make an old process a part of the bomb.
	bombForks = 8

	hogWindow = time.Second
	hogShare  = 0.3  // of what is lost, that one process must have taken
	hogSize   = 0.1  // of all memory, that it must have
	hogEarly  = 0.2  // of all memory, from which on it is judged while there is much left
	hogLate   = 0.15 // of all memory, below which little is left
)

// Hurry reports whether the task list should be read before its time: something grows fast, and who it is will be asked.
func (c Config) Hurry(us []kernel.Usage, tasks []TaskSample) bool {
	n := len(us)
	if n < 2 || len(tasks) == 0 {
		return false
	}
	last, now := tasks[len(tasks)-1].At, &us[n-1]
	if now.At.Sub(last) < max(2*c.Heartbeat, 5*tasks[len(tasks)-1].Took) {
		return false
	}
	at := n - 1
	for at > 0 && us[at-1].At.After(last) {
		at--
	}
	old := &us[max(at-1, 0)]
	return now.Threads-old.Threads > 32 || old.Available > now.Available+now.Total/25
}

// since returns the index of the oldest sample that is no older than d.
func since(us []kernel.Usage, d time.Duration) int {
	n := len(us)
	at := n - 1
	for at > 0 && us[n-1].At.Sub(us[at-1].At) <= d {
		at--
	}
	return at
}

// forkBomb reports that tasks become more and more, fast, and stay, and that most of them are of one tree.
//
// The culprit is the oldest living process of the tree; Culprit.Since and Tree say how far the tree reaches. Processes that
// were orphaned on the way are counted to the tree of their user. See Offspring.
func forkBomb(c Config) Detector {
	return Detector{
		ID: "fork-bomb", Title: "Fork bomb", Kind: KindForkBomb, Severity: Critical,
		DependsOn: []Kind{KindPanic, KindHostSilent},
		Needs:     []Need{NeedUsage, NeedTasks, NeedHeartbeats},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			us := p.Usage
			n := len(us)
			if n < 3 {
				return nil, ErrTooEarly
			}
			now := &us[n-1]
			from := since(us, bombWindow)
			for i := from; i < n; i++ {
				if us[i].Threads <= us[from].Threads {
					from = i // the newest of the lowest
				}
			}
			old := &us[from]
			growth, forks := now.Threads-old.Threads, int(now.Forks-old.Forks)
			took := now.At.Sub(old.At)
			need := max(c.BombGrowth, len(p.Beats[len(p.Beats)-1].CPUs)*c.BombGrowth/4)
			if took <= 0 || growth < need/2 || float64(growth) < bombLasting*float64(forks) || now.Threads <= us[n-3].Threads {
				return nil, nil
			}
			rate := float64(growth) / took.Seconds()
			if rate < bombRate {
				return nil, nil
			}
			// A task's start is of the host's clock.
			began := p.mono(old.At)
			tasks := p.Tasks[len(p.Tasks)-1]
			tree := biggestTree(tasks.Tasks, began)
			var members, processes int
			var root kernel.Task
			for _, t := range tree {
				members++
				if t.PID == t.TGID {
					processes++
					if root.PID == 0 || t.Start < root.Start {
						root = t
					}
				}
			}
			f := Finding{
				Kind: KindForkBomb, Severity: Critical, Suspicion: true, Confidence: 0.5,
				Evidence: []Evidence{
					{"nr_threads", fmt.Sprintf("%d, %d more within %v", now.Threads, growth, took.Round(time.Millisecond))},
					{"total_forks", fmt.Sprintf("%d more", forks)},
				},
			}
			limit := now.MaxThreads
			if now.MaxPIDs > 0 {
				limit = min(limit, now.MaxPIDs)
			}
			left := ""
			if limit > 0 {
				eta := time.Duration(float64(max(0, limit-now.Threads)) / rate * float64(time.Second))
				left = fmt.Sprintf("; at this rate all %d are used in %v", limit, eta.Round(time.Second))
				f.Evidence = append(f.Evidence, Evidence{"time to exhaustion", eta.Round(time.Second).String()})
			}
			// The list was read a little before or after the count.
			listed := tasks.At.Sub(old.At).Seconds() * rate
			if root.PID == 0 || float64(members) < 0.6*min(float64(growth), max(listed, float64(need)/2)) {
				return nil, nil // they are no one tree's
			}
			uid := root.UID
			f.Key = fmt.Sprintf("uid%d", uid)
			f.Culprit = Culprit{PID: root.PID, TGID: root.TGID, Comm: root.Comm, UID: &uid, Start: root.Start, Since: began, Tree: members}
			f.Title = fmt.Sprintf("%q (PID %d, user %d) and its offspring fork without end", root.Comm, root.PID, uid)
			f.Detail = fmt.Sprintf("%.0f tasks more each second, %d of %d new ones of one tree%s", rate, members, growth, left)
			f.Evidence = append(f.Evidence, Evidence{"tree", fmt.Sprintf("%d tasks in %d processes, since %v", members, processes, began.Round(time.Millisecond))})
			switch {
			case growth < need, members < need/2:
			case processes <= 2 && growth < bombThreads: // threads: servers start many
			default:
				f.Suspicion, f.Confidence = false, 0.95
			}
			return []Finding{f}, nil
		},
	}
}

// mono returns the host's CLOCK_MONOTONIC at a time of ours, from the nearest beat that is not younger. The host's clock in
// memory may lag behind.
func (p *Pass) mono(at time.Time) time.Duration {
	var mono time.Duration
	for i := range p.Beats {
		if i == 0 || !p.Beats[i].At.After(at) {
			mono = time.Duration(p.Beats[i].Mono)
		}
	}
	return max(0, mono-100*time.Millisecond)
}

// biggestTree returns the tree of tasks started since then that has the most, with all its tasks.
func biggestTree(tasks []kernel.Task, began time.Duration) []kernel.Task {
	byUID := make(map[uint32]int)
	for _, t := range tasks {
		if t.Start >= began && !t.KThread {
			byUID[t.UID]++
		}
	}
	var uid uint32
	most := 0
	for u, n := range byUID {
		if n > most || n == most && u < uid {
			uid, most = u, n
		}
	}
	if most == 0 {
		return nil
	}
	return Offspring(tasks, began, uid)
}

// Offspring returns the biggest tree of tasks that a user has started since a time of the host's clock, the youngest first.
// To it belong the older process whose children they are, if it has several of them, and those that have lost their
// parents and are children of init by now, as far as they have the name that most of the tree have. Neither init nor kernel threads ever belong to it.
func Offspring(tasks []kernel.Task, began time.Duration, uid uint32) []kernel.Task {
	byPID := make(map[int]*kernel.Task, len(tasks))
	for i := range tasks {
		byPID[tasks[i].PID] = &tasks[i]
	}
	young := func(t *kernel.Task) bool { return t.Start >= began && !t.KThread && t.UID == uid && t.TGID > 1 }
	// A group is what has the same parent above it that is not young. Children of init are told apart by their names: services
	// that are just started are there, too.
	type group struct {
		parent int
		comm   string
	}
	above := func(t *kernel.Task) group {
		for range 1 << 12 {
			if lead := byPID[t.TGID]; lead != nil && !young(lead) {
				return group{parent: lead.PID} // a young thread of an old process
			}
			parent := byPID[t.PPID]
			if parent == nil || parent.PID == t.PID || parent.TGID <= 1 {
				return group{1, t.Comm}
			}
			if !young(parent) {
				return group{parent: parent.PID}
			}
			t = parent
		}
		return group{1, t.Comm}
	}
	groups := make(map[group][]*kernel.Task)
	for i := range tasks {
		if t := &tasks[i]; young(t) {
			k := above(t)
			groups[k] = append(groups[k], t)
		}
	}
	var best group
	for k, g := range groups {
		b := groups[best]
		if len(g) > len(b) || len(g) == len(b) && (k.parent < best.parent || k.parent == best.parent && k.comm < best.comm) {
			best = k
		}
	}
	members := slices.Clip(groups[best])
	if best.parent != 1 && len(members) > 0 {
		members = append(members, groups[group{1, commonest(members)}]...)
		if head := byPID[best.parent]; head != nil && head.TGID > 1 && !head.KThread && head.UID == uid {
			direct := 0
			for _, t := range members {
				if t.PPID == head.TGID || t.TGID == head.TGID {
					direct++
				}
			}
			if direct >= bombForks {
				for i := range tasks {
					if tasks[i].TGID == head.TGID && !young(&tasks[i]) {
						members = append(members, &tasks[i])
					}
				}
			}
		}
	}
	out := make([]kernel.Task, len(members))
	for i, t := range members {
		out[i] = *t
	}
	slices.SortFunc(out, func(a, b kernel.Task) int {
		if a.Start != b.Start {
			if a.Start > b.Start {
				return -1
			}
			return 1
		}
		return b.PID - a.PID
	})
	return out
}

// commonest returns the name that most of the tasks have.
func commonest(tasks []*kernel.Task) string {
	n := make(map[string]int)
	best := ""
	for _, t := range tasks {
		n[t.Comm]++
		if n[t.Comm] > n[best] || n[t.Comm] == n[best] && t.Comm < best {
			best = t.Comm
		}
	}
	return best
}

// memoryHog reports that memory runs out within moments, and who takes it. Its measure is the trend: a process that the
// kernel's OOM killer must spare takes the last twentieth of a small host's memory in a few milliseconds.
func memoryHog(c Config) Detector {
	return Detector{
		ID: "memory-hog", Title: "Memory hog", Kind: KindMemoryHog, Severity: Critical,
		DependsOn: []Kind{KindPanic, KindHostSilent, KindForkBomb},
		Needs:     []Need{NeedUsage, NeedTasks},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			us := p.Usage
			n := len(us)
			if n < 3 {
				return nil, ErrTooEarly
			}
			now := &us[n-1]
			if now.Total == 0 {
				return nil, fmt.Errorf("the host has no memory: %w", kernel.ErrNotSupported)
			}
			from := since(us, hogWindow)
			for i := from; i < n; i++ {
				if us[i].Available >= us[from].Available {
					from = i // the newest of the highest
				}
			}
			old := &us[from]
			took := now.At.Sub(old.At)
			share := float64(now.Available) / float64(now.Total)
			stalls, kills := now.Stalls-us[since(us, hogWindow)].Stalls, now.OOMKills-us[since(us, hogWindow)].OOMKills
			eta := time.Duration(math.MaxInt64)
			var rate float64
			if lost := float64(old.Available) - float64(now.Available); lost > 0 && took > 0 {
				rate = lost / took.Seconds()
				if s := float64(now.Available) / rate; s < 1e6 {
					eta = time.Duration(s * float64(time.Second))
				}
			}
			soon := eta < c.HogETA && share < 0.5 && took >= 2*c.Heartbeat
			low := share < c.HogFloor
			if !soon && !low && eta >= 3*c.HogETA {
				return nil, nil
			}
			t, grown, lost, asks, fits, own := p.eater(now)
			// Who has grown most just now need not be he by whom it ends so soon: a database that starts takes its memory, and what is compiled beside it goes
			// on. He must be fast enough by himself, and large, unless little is left.
			soon = soon && !fits && (t.PID == 0 || own < c.HogETA && (share < hogLate || float64(t.RSS) >= hogEarly*float64(now.Total)))
			early := t.PID != 0 && eta < c.HogETA && took >= 2*c.Heartbeat && asks && float64(t.RSS) >= hogEarly*float64(now.Total) && float64(grown) > 0.6*float64(lost)
			f := Finding{
				Kind: KindMemoryHog, Severity: Critical, Suspicion: true, Confidence: 0.5, Key: "memory",
				Title:  "memory runs out",
				Detail: fmt.Sprintf("%.0f %% of the memory is left", 100*share),
				Evidence: []Evidence{
					{"available", fmt.Sprintf("%d of %d MiB", now.Available>>20, now.Total>>20)},
					{"direct reclaims", fmt.Sprintf("%d within %v", stalls, hogWindow)},
				},
			}
			if kills > 0 {
				f.Evidence = append(f.Evidence, Evidence{"victims of the kernel's OOM killer", fmt.Sprint(kills)})
			}
			if eta < time.Hour {
				f.Detail += fmt.Sprintf(", and at %.0f MiB/s it lasts %v", rate/(1<<20), eta.Round(10*time.Millisecond))
				f.Evidence = append(f.Evidence, Evidence{"time to exhaustion", eta.Round(10 * time.Millisecond).String()})
			}
			if t.PID == 0 {
				// Nobody in particular. Low alone is how a host with a tight budget lives.
				if !soon && stalls == 0 {
					return nil, nil
				}
				return []Finding{f}, nil
			}
			uid := t.UID
			f.Key = fmt.Sprintf("%d@%v", t.TGID, t.Start)
			f.Culprit = Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, UID: &uid, Start: t.Start}
			f.Title = fmt.Sprintf("%q (PID %d, user %d) takes the host's memory", t.Comm, t.TGID, uid)
			f.Evidence = append(f.Evidence, Evidence{"culprit", fmt.Sprintf("%d MiB resident, %d of the last %d MiB", t.RSS>>20, grown>>20, lost>>20)})
			if soon || early || low && grown > 0 {
				f.Suspicion, f.Confidence = false, 0.9
				if (soon || early) && float64(grown) > 0.6*float64(lost) {
					f.Confidence = 0.97
				}
			}
			return []Finding{f}, nil
		},
	}
}

// eater returns the process that has taken the most memory lately, how much that was, how much was lost meanwhile, and whether it asks for
// more and more, or for what there is not, or whether what it has asked for is there, and when it alone would have taken all that is left; a zero Task if
// none has taken an essential part.
func (p *Pass) eater(now *kernel.Usage) (who kernel.Task, grown, lost uint64, asks, fits bool, eta time.Duration) {
	n := len(p.Tasks)
	if n < 2 {
		return kernel.Task{}, 0, 0, false, false, 0
	}
	last := &p.Tasks[n-1]
	base := n - 2
	for base > 0 && last.At.Sub(p.Tasks[base].At) < 150*time.Millisecond {
		base--
	}
	if last.At.Sub(p.Tasks[base].At) > 10*time.Second {
		return kernel.Task{}, 0, 0, false, false, 0
	}
	before := make(map[taskKey]uint64, len(p.Tasks[base].Tasks))
	for _, t := range p.Tasks[base].Tasks {
		before[taskKey{t.PID, t.Start}] = t.RSS
	}
	var most uint64
	for _, t := range last.Tasks {
		if t.PID != t.TGID || t.KThread || t.TGID <= 1 {
			continue
		}
		if old := before[taskKey{t.PID, t.Start}]; t.RSS > old && t.RSS-old > most {
			who, most = t, t.RSS-old
		}
	}
	// What was available at the two times, as near as it was measured.
	at := func(t time.Time) uint64 {
		v := now.Available
		for i := len(p.Usage) - 1; i >= 0; i-- {
			v = p.Usage[i].Available
			if !p.Usage[i].At.After(t) {
				break
			}
		}
		return v
	}
	a, b := at(p.Tasks[base].At), at(last.At)
	if a > b {
		lost = a - b
	}
	if who.PID == 0 || float64(most) < hogShare*float64(lost) || float64(who.RSS) < hogSize*float64(now.Total) {
		return kernel.Task{}, 0, 0, false, false, 0
	}
	eta = time.Duration(min(float64(now.Available)/float64(most)*last.At.Sub(p.Tasks[base].At).Seconds(), 1e6) * float64(time.Second))
	// Who takes his memory at his start, as databases do, has asked for all of it before, and it will do. A hog asks for more and more, or
	// for more than there is.
	then, ok := p.Tasks[base].Mapped[who.TGID]
	total, ok2 := last.Mapped[who.TGID]
	beyond := total > who.RSS && total-who.RSS > now.Available
	more := ok && total > then && float64(total-then) >= 0.5*float64(most)
	return who, most, lost, ok2 && (beyond || more), ok && ok2 && !beyond && !more, eta
}

// exhaustion reports what comes to its end by its level or by its trend: threads, PIDs, open files, memory that the kernel
// itself keeps. It is slow and asks nobody's name.
func exhaustion(c Config) Detector {
	const (
		level   = 0.9
		ahead   = 10 * time.Minute // a trend that ends no sooner is not told of
		watched = time.Minute
	)
	return Detector{
		ID: "exhaustion", Title: "Something runs out", Kind: KindExhaustion, Severity: Warning,
		Every: time.Second, Clear: 5 * time.Second,
		DependsOn: []Kind{KindPanic, KindHostSilent, KindForkBomb, KindMemoryHog},
		Needs:     []Need{NeedUsage},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			us := p.Usage
			n := len(us)
			if n == 0 {
				return nil, ErrTooEarly
			}
			now := &us[n-1]
			var out []Finding
			for _, r := range []struct {
				key, what  string
				used       func(*kernel.Usage) uint64
				limit      uint64
				unit       string
				unitFactor uint64
			}{
				{"threads", "threads", func(u *kernel.Usage) uint64 { return uint64(u.Threads) }, uint64(max(0, now.MaxThreads)), "", 1},
				{"pids", "process numbers", func(u *kernel.Usage) uint64 { return uint64(u.PIDs) }, uint64(max(0, now.MaxPIDs)), "", 1},
				{"files", "open files", func(u *kernel.Usage) uint64 { return u.Files }, now.MaxFiles, "", 1},
				{"slab", "memory for the kernel's own objects", func(u *kernel.Usage) uint64 { return u.Slab }, now.Slab + now.Available, " MiB", 1 << 20},
			} {
				if r.limit == 0 {
					continue
				}
				used := r.used(now)
				full := float64(used) >= level*float64(r.limit) && r.key != "slab"
				var eta, took time.Duration
				var was uint64
				for _, window := range []time.Duration{watched, 5 * watched} {
					series := us[since(us, window):]
					if took = now.At.Sub(series[0].At); took < window*9/10 {
						continue
					}
					rate, ok := pace(series, r.used)
					if !ok {
						continue
					}
					was = r.used(&series[0])
					eta = time.Duration(min(float64(max(r.limit, used)-used)/rate, 1e8) * float64(time.Second))
					break
				}
				if !full && (eta == 0 || eta > ahead) {
					continue
				}
				f := Finding{Key: r.key, Kind: KindExhaustion, Severity: Warning, Confidence: 0.9,
					Title: r.what + " run out", Detail: fmt.Sprintf("%d of %d%s are used", used/r.unitFactor, r.limit/r.unitFactor, r.unit)}
				if eta > 0 {
					f.Detail += fmt.Sprintf("; at this rate the rest lasts %v", eta.Round(time.Second))
					f.Evidence = append(f.Evidence, Evidence{r.key, fmt.Sprintf("%d%s, %d%s %v ago", used/r.unitFactor, r.unit, was/r.unitFactor, r.unit, took.Round(time.Second))},
						Evidence{"time to exhaustion", eta.Round(time.Second).String()})
					if !full {
						f.Confidence = 0.7
					}
				}
				out = append(out, f)
			}
			return out, nil
		},
	}
}

// pace returns by how much a quantity has grown in a second, if it has in each fifth of the time of a series: a leak does, a start of something does not.
// It is that of the middle one of the fifths, so that what starts something while something else leaks slowly counts for nothing.
func pace(us []kernel.Usage, of func(*kernel.Usage) uint64) (rate float64, ok bool) {
	const parts = 5
	n := len(us)
	whole := us[n-1].At.Sub(us[0].At)
	last := of(&us[0])
	grown := make([]uint64, 0, parts)
	for i := range us {
		if us[i].At.Sub(us[0].At) < whole*time.Duration(len(grown)+1)/parts {
			continue
		}
		v := of(&us[i])
		if v <= last {
			return 0, false
		}
		grown = append(grown, v-last)
		last = v
	}
	if len(grown) != parts {
		return 0, false
	}
	slices.Sort(grown)
	return float64(grown[parts/2]) * parts / whole.Seconds(), true
}
