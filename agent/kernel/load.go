package kernel

import "fmt"

// Load is how much the host's CPUs have to do.
type Load struct {
	// Averages are of the last 1, 5 and 15 minutes: tasks that run, wait to run, or wait uninterruptibly.
	Averages [3]float64 `json:"averages"`
	Queues   []RunQueue `json:"queues"`
}

// RunQueue is what waits for one online CPU (struct rq, kernel/sched/sched.h).
type RunQueue struct {
	CPU      int    `json:"cpu"`
	Running  int    `json:"running"` // tasks that run or wait to run
	Fair     int    `json:"fair"`    // of these, in the fair class, with those in groups
	RealTime int    `json:"realTime"`
	Deadline int    `json:"deadline"`
	IOWait   int    `json:"ioWait"` // tasks that wait for I/O, which ran here last
	Switches uint64 `json:"switches"`
	CurrPID  int    `json:"currPID"` // what runs now; zero is idle
	CurrComm string `json:"currComm"`
}

// Load reads the load averages and the run queues.
func (v *View) Load() (Load, error) {
	l, err := v.load()
	if err != nil {
		return Load{}, fmt.Errorf("read load: %w", err)
	}
	return l, nil
}

func (v *View) load() (Load, error) {
	var l Load
	r := resolver{img: v.img}
	avenrun, runqueues := r.symbol("avenrun"), r.symbol("runqueues")
	// h_nr_running became h_nr_queued in v6.14.
	s := r.shape("rq", "nr_running", "nr_switches", "nr_iowait.counter", "cfs.h_nr_running|cfs.h_nr_queued", "rt.rt_nr_running?", "dl.dl_nr_running")
	if r.err != nil {
		return l, r.err
	}
	averages, err := v.pointers("avenrun", avenrun, 3)
	if err != nil {
		return l, err
	}
	for i, a := range averages {
		l.Averages[i] = fixed(uint64(a))
	}
	h, err := v.Heartbeat()
	if err != nil {
		return l, err
	}
	for _, c := range h.CPUs {
		if !c.Online {
			continue
		}
		t, err := v.thing(s, runqueues+v.img.perCPU[c.ID])
		if err != nil {
			return l, err
		}
		l.Queues = append(l.Queues, RunQueue{
			CPU: c.ID, Running: t.int("nr_running"), Fair: t.int("cfs.h_nr_running"), RealTime: t.int("rt.rt_nr_running"),
			Deadline: t.int("dl.dl_nr_running"), IOWait: t.int("nr_iowait.counter"), Switches: t.num("nr_switches"),
			CurrPID: c.CurrPID, CurrComm: c.CurrComm,
		})
	}
	return l, nil
}
