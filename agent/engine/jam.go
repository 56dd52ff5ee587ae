package engine

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

const (
	jamsEvery    = 2 * time.Second
	keptJams     = 32
	keptRequests = 16   // the oldest of a disk
	keptRoots    = 4096 // processes of root that are looked into
	keptSaid     = 1000 // records of the log that are looked at in one pass
)

// jam takes a sample of what waits in the kernel. Of what was torn, the sample before is what is known. A host that is made up,
// of which there is no View, has nothing.
func jam(v *kernel.View, state *kernel.PanicState, last []detect.JamSample) detect.JamSample {
	s := detect.JamSample{At: time.Now()}
	if state != nil {
		s.Taint = state.Tainted
	}
	if v == nil {
		return s
	}
	var old detect.JamSample
	if n := len(last); n > 0 {
		old = last[n-1]
	}
	s.Starting = starting(v)
	lacks := func(what string, err error) {
		if errors.Is(err, kernel.ErrNotSupported) || errors.Is(err, kernel.ErrNotFound) {
			if s.Missing == nil {
				s.Missing = make(map[string]string)
			}
			s.Missing[what] = err.Error()
		}
	}
	for p, err := range v.WorkerPools() {
		if err != nil {
			lacks("pools", err)
			s.Pools = old.Pools
			break
		}
		if p.Waiting > 0 {
			s.Pools = append(s.Pools, p)
		}
	}
	for d, err := range v.Disks() {
		if err != nil {
			lacks("disks", err)
			s.Disks = old.Disks
			break
		}
		if len(d.InFlight) == 0 {
			continue
		}
		slices.SortFunc(d.InFlight, func(a, b kernel.Request) int { return cmp.Compare(b.Age, a.Age) })
		d.InFlight = d.InFlight[:min(len(d.InFlight), keptRequests)]
		s.Disks = append(s.Disks, d)
	}
	s.Pressure, _ = v.Pressure() // what is torn is missing once
	return s
}

// starting reports whether the kernel has not come to init yet (system_state, include/linux/kernel.h).
func starting(v *kernel.View) bool {
	at, err := v.Image().Symbol("system_state")
	if err != nil {
		return false
	}
	running, err := v.Image().Enum("system_states", "SYSTEM_RUNNING")
	if err != nil {
		return false
	}
	now, err := v.Uint32(at)
	return err == nil && int64(now) < running
}

// strain adds what is near its limit and what the kernel has said lately.
func (w *watcher) strain(v *kernel.View, s *detect.JamSample) {
	if v == nil {
		return
	}
	var old detect.JamSample // what is known of what was torn
	if n := len(w.jams); n > 0 {
		old = w.jams[n-1]
	}
	for x, err := range v.Stores() {
		if err != nil {
			s.Stores = old.Stores
			break
		}
		s.Stores = append(s.Stores, x)
	}
	for x, err := range v.Links() {
		if err != nil {
			s.Links = old.Links
			break
		}
		s.Links = append(s.Links, x)
	}
	s.Times, _ = v.CPUTimes() // what is torn is missing once
	w.lookIntoRoot(v)
	for _, x := range w.roots {
		if x.clean && len(x.Parts) > 0 {
			s.Injected = append(s.Injected, x.Injected)
		}
	}
	var err error
	if s.BootWall, err = v.BootWall(); err != nil {
		s.BootWall = old.BootWall
	}
	most := keptSaid
	if w.said == 0 {
		most = 1 // what was before the attach is no news
	}
	records, newest, err := v.LogAfter(w.said, most)
	if err != nil {
		return // the next look will tell
	}
	if w.said != 0 {
		for _, r := range records {
			if said, ok := detect.Notable(r); ok {
				s.Said = append(s.Said, said)
			}
		}
	}
	s.Newest = newest
	w.said = max(newest, w.said, 1)
}

// rootProcess is what is known of a process of root: clean says that it had no code of its own when it had run for a while, as the program that it is.
type rootProcess struct {
	detect.Injected
	mm    kernel.VirtAddr
	since time.Time // of the first look at it as that program
	known bool      // it has had its time since, and was looked at then
	clean bool
	at    time.Time // of the last look
}

// grown is how old a process is when it has what it needs.
const grown = 10 * time.Second

// lookIntoRoot looks into the process of root that has not been looked into for the longest.
func (w *watcher) lookIntoRoot(v *kernel.View) {
	n := len(w.tasks)
	if n == 0 || len(w.beats) == 0 {
		return
	}
	type key struct {
		pid   int
		start time.Duration
	}
	known := make(map[key]rootProcess, len(w.roots))
	for _, x := range w.roots {
		known[key{x.Task.PID, x.Task.Start}] = x
	}
	up := time.Duration(w.beats[len(w.beats)-1].Mono)
	w.roots = w.roots[:0]
	next := -1
	for _, t := range w.tasks[n-1].Tasks {
		if t.KThread || t.PID != t.TGID || t.UID != 0 || t.State == "Z" || up-t.Start < grown || len(w.roots) == keptRoots {
			continue
		}
		x := known[key{t.PID, t.Start}]
		x.Task = t
		if next < 0 || x.at.Before(w.roots[next].at) {
			next = len(w.roots)
		}
		w.roots = append(w.roots, x)
	}
	if next < 0 {
		return
	}
	x := &w.roots[next]
	mm, parts, err := v.AnonymousExecutables(x.Task)
	if x.at = time.Now(); err != nil {
		return
	}
	if mm != x.mm { // at the first look, and when it has become another program since
		x.mm, x.since, x.known, x.clean = mm, x.at, false, false
	}
	if !x.known && x.at.Sub(x.since) >= grown {
		x.known, x.clean = true, len(parts) == 0
	}
	x.Parts = parts
}

func (w *watcher) addJam(s detect.JamSample) {
	w.jams = append(w.jams, s)
	if len(w.jams) > keptJams {
		w.jams = slices.Delete(w.jams, 0, 1)
	}
}

// lookAtGuards compares the kernel's protections with how they stood strongest since the attach.
func (w *watcher) lookAtGuards(v *kernel.View) {
	if v == nil {
		return
	}
	now, err := v.Guards()
	if err != nil {
		return // the next look will tell
	}
	if w.guards == nil {
		w.guards = make(map[string]kernel.Guard)
	}
	w.weakened = nil
	for _, g := range now {
		if was, ok := w.guards[g.Name]; !ok || g.Level >= was.Level {
			w.guards[g.Name] = g
		} else {
			w.weakened = append(w.weakened, detect.Weakened{Was: was, Now: g})
		}
	}
}

// countMemory takes a sample of the memory's errors. A kernel that counts none, as those of most virtual machines, has none.
func (w *watcher) countMemory(v *kernel.View, now time.Time) {
	s := detect.MemorySample{At: now}
	if v != nil {
		for c, err := range v.MemoryControllers() {
			if errors.Is(err, kernel.ErrNotSupported) || errors.Is(err, kernel.ErrNotFound) {
				break
			}
			if err != nil {
				return // torn: the next one will tell
			}
			s.Controllers = append(s.Controllers, c)
		}
	}
	if n := len(w.memory); n > 1 && w.memory[n-1].At.Sub(w.memory[n-2].At) < detect.MemoryApart {
		w.memory = w.memory[:n-1]
	}
	w.memory = append(w.memory, s)
	for len(w.memory) > 2 && now.Sub(w.memory[0].At) > detect.MemoryKept {
		w.memory = slices.Delete(w.memory, 0, 1)
	}
}
