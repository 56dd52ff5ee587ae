package query

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Process is a process of the host, or one of its threads when threads were asked for. Durations are nanoseconds in JSON.
type Process struct {
	PID      int           `json:"pid"`           // of the process: its thread group
	TID      int           `json:"tid,omitempty"` // of the thread; zero for a whole process
	PPID     int           `json:"ppid"`
	UID      uint32        `json:"uid"` // effective
	Comm     string        `json:"comm"`
	State    string        `json:"state"` // one letter as in ps(1); of a process, the busiest state of its threads
	CPU      int           `json:"cpu"`   // where it runs or ran last
	OnCPU    bool          `json:"onCPU"` // it was running at the moment of reading
	KThread  bool          `json:"kthread"`
	Threads  int           `json:"threads"`
	UTime    time.Duration `json:"utime"`   // of the living threads
	STime    time.Duration `json:"stime"`   // of the living threads
	Runtime  time.Duration `json:"runtime"` // what the scheduler charged to the living threads
	Start    time.Duration `json:"start"`   // since boot
	RSS      uint64        `json:"rss"`     // bytes
	Switches uint64        `json:"switches"`
	// Confident is false if a thread was seen to change while it was read.
	Confident bool `json:"confident"`
}

// Processes is the answer to "what runs there?".
type Processes struct {
	At        time.Time     `json:"at"`     // the reader's clock
	Uptime    time.Duration `json:"uptime"` // the host's CLOCK_MONOTONIC; zero if it could not be told
	CPUs      int           `json:"cpus"`
	Tasks     int           `json:"tasks"` // threads seen
	Processes []Process     `json:"processes"`
	Complete  bool          `json:"complete"` // the walk closed: no task is missing for a broken list
	Doubts    []string      `json:"doubts,omitempty"`
	// Confidence is how sure it is that all this was so at one time.
	Confidence Confidence `json:"confidence,omitzero"`
}

// PSOptions tune PS. The zero value lists whole processes.
type PSOptions struct {
	Threads bool // one row per thread
}

// PS lists the processes of the host, sorted by PID. It errors only if not a single task could be read; a walk that
// breaks off later is an answer with Complete false.
func PS(ctx context.Context, v View, o PSOptions) (Processes, error) {
	p := Processes{At: time.Now(), Complete: true}
	before := v.Confidence()
	var why doubts
	var first error
	incomplete := func(doing string, err error) {
		p.Complete = false
		if first == nil {
			first = err
		}
		why.add(fmt.Sprintf("%s: %v", doing, err))
	}

	if hb, err := v.Heartbeat(); err != nil {
		why.add(fmt.Sprintf("read heartbeat: %v", err))
	} else {
		p.At = hb.At
		p.Uptime = time.Duration(hb.Mono)
		p.CPUs = len(hb.CPUs)
	}

	var threads []Process
	for t, err := range v.Tasks() {
		if why.canceled(ctx) {
			p.Complete = false
			first = ctx.Err()
			break
		}
		if err != nil {
			incomplete("walk tasks", err)
			continue
		}
		threads = append(threads, thread(t))
	}
	p.Tasks = len(threads)
	if p.Tasks == 0 {
		if first == nil {
			first = errors.New("the task list is empty")
		}
		return Processes{}, fmt.Errorf("list processes: %w", first)
	}
	if o.Threads {
		slices.SortFunc(threads, func(a, b Process) int { return cmp.Or(a.PID-b.PID, a.TID-b.TID) })
		p.Processes = threads
	} else {
		p.Processes = group(threads)
	}
	p.Doubts, p.Confidence = why, confidence(v, before)
	return p, nil
}

func thread(t kernel.Task) Process {
	return Process{
		PID: t.TGID, TID: t.PID, PPID: t.PPID, UID: t.UID, Comm: t.Comm, State: t.State, CPU: t.CPU, OnCPU: t.OnCPU,
		KThread: t.KThread, Threads: 1, UTime: t.UTime, STime: t.STime, Runtime: t.Runtime, Start: t.Start, RSS: t.RSS,
		Switches: t.Switches, Confident: t.Confident,
	}
}

// busiest orders the states of threads: the process shows the one that matters most to whoever looks for trouble.
const busiest = "IZXtTSDR"

// group folds threads into their processes. The leader (TID == PID) gives the name, the parent and the start.
func group(threads []Process) []Process {
	byPID := make(map[int]*Process)
	for _, t := range threads {
		p := byPID[t.PID]
		if p == nil {
			t.TID = 0
			byPID[t.PID] = &t
			continue
		}
		if t.TID == t.PID {
			p.Comm, p.PPID, p.UID, p.Start, p.KThread = t.Comm, t.PPID, t.UID, t.Start, t.KThread
		}
		p.Threads++
		p.UTime += t.UTime
		p.STime += t.STime
		p.Runtime += t.Runtime
		p.Switches += t.Switches
		p.RSS = max(p.RSS, t.RSS)
		p.Confident = p.Confident && t.Confident
		if rank(t) > rank(*p) {
			p.State, p.CPU, p.OnCPU = t.State, t.CPU, t.OnCPU
		}
	}
	out := make([]Process, 0, len(byPID))
	for _, p := range byPID {
		out = append(out, *p)
	}
	slices.SortFunc(out, func(a, b Process) int { return a.PID - b.PID })
	return out
}

func rank(p Process) int {
	r := -1
	for i := range busiest {
		if p.State == busiest[i:i+1] {
			r = i
		}
	}
	if p.OnCPU {
		r += len(busiest)
	}
	return r
}
