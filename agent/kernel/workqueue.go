package kernel

import (
	"cmp"
	"fmt"
	"iter"
	"time"
)

// WorkerPool is a pool of kworkers, which serve the workqueues (struct worker_pool, kernel/workqueue.c).
type WorkerPool struct {
	ID      int       `json:"id"`
	CPU     int       `json:"cpu"`               // -1 of a pool that serves several
	Node    int       `json:"node"`              // of NUMA; -1 if it does not matter
	SoftIRQ bool      `json:"softIRQ,omitempty"` // its work is done by softirqs: its worker is no task
	Workers int       `json:"workers"`
	Idle    int       `json:"idle"`
	Running []Working `json:"running"`
	// Pending is the work that waits for a worker, the first in line first.
	Pending []Work `json:"pending"`
	// Waiting is how long there has been pending work of which none was begun; zero without pending work.
	Waiting time.Duration `json:"waiting"`
}

// Work is a work item (struct work_struct).
type Work struct {
	Addr     VirtAddr `json:"addr"`
	Function string   `json:"function"`
	Queue    string   `json:"queue"` // the workqueue; empty if it is not known
}

// Working is a work item that a worker is at.
type Working struct {
	Work
	PID  int    `json:"pid"` // of the kworker; zero of a softirq
	Comm string `json:"comm"`
	Desc string `json:"desc,omitempty"` // what the work said of itself
}

const (
	maxPools = 1 << 14
	maxWorks = 1 << 18
)

type workWalk struct {
	v                             *View
	pool, worker, work, pwq, task *shape
	wq                            *shape
	softIRQ                       uint64 // POOL_BH
	left                          int    // works that may still be listed
}

// WorkerPools lists the pools of kworkers with what they do and what waits for them.
func (v *View) WorkerPools() iter.Seq2[WorkerPool, error] {
	return settled(v, "walk worker pools", func() ([]WorkerPool, error) {
		w := workWalk{v: v, left: maxWorks}
		r := resolver{img: v.img}
		idr := r.symbol("worker_pool_idr") + VirtAddr(r.field("idr", 0, "idr_rt"))
		// Since Linux commit 6037160e52d7 ("workqueue: Rename pool->watchdog_ts to pool->last_progress_ts"), seen in v7.2.
		w.pool = r.shape("worker_pool", "flags", "cpu", "node", "id", "watchdog_ts|last_progress_ts", "worklist[]", "nr_workers", "nr_idle", "workers[]")
		w.worker = r.shape("worker", "node[]", "current_work", "current_func", "current_pwq", "task", "desc[]")
		w.work = r.shape("work_struct", "data.counter", "entry[]", "func")
		w.pwq = r.shape("pool_workqueue", "pool", "wq")
		w.wq = r.shape("workqueue_struct", "name[]")
		w.task = r.shape("task_struct", "pid", "comm[]")
		if r.err != nil {
			return nil, r.err
		}
		if n, err := v.img.types.enum("worker_pool_flags", "POOL_BH"); err == nil { // since v6.9
			w.softIRQ = uint64(n)
		}
		jiffies, hz, err := v.jiffies()
		if err != nil {
			return nil, err
		}
		var all []WorkerPool
		err = v.xarray("worker_pool", idr, maxPools, func(id uint64, at VirtAddr) error {
			p, stamp, err := w.read(at)
			if err != nil {
				return err
			}
			if uint64(p.ID) != id {
				return &CorruptError{"worker_pool", at, fmt.Sprintf("ID %d is listed as %d", p.ID, id)}
			}
			if len(p.Pending) > 0 && jiffies > stamp {
				p.Waiting = time.Duration(jiffies-stamp) * time.Second / time.Duration(hz)
			}
			all = append(all, p)
			return nil
		})
		return all, err
	})
}

func (w *workWalk) read(at VirtAddr) (p WorkerPool, stamp uint64, err error) {
	t, err := w.v.thing(w.pool, at)
	if err != nil {
		return p, 0, err
	}
	p = WorkerPool{ID: t.int("id"), CPU: t.int("cpu"), Node: t.int("node"), Workers: t.int("nr_workers"), Idle: t.int("nr_idle"), Running: []Working{}, Pending: []Work{}}
	p.SoftIRQ = t.num("flags")&w.softIRQ != 0
	if p.CPU < -1 || p.CPU >= len(w.v.img.perCPU) || p.Workers < 0 || p.Idle < 0 || p.Idle > p.Workers {
		return p, 0, t.corrupt("%d of %d workers idle, of CPU %d", p.Idle, p.Workers, p.CPU)
	}
	err = w.v.list("worker", t.at("workers"), w.worker.offset("node"), maxTasks, func(at VirtAddr) error {
		x, err := w.v.thing(w.worker, at)
		if err != nil || x.ptr("current_work") == 0 {
			return err
		}
		working := Working{Desc: x.text("desc")}
		if at := x.ptr("task"); at != 0 || !p.SoftIRQ {
			task, err := w.v.thing(w.task, at)
			if err != nil {
				return err
			}
			working.PID, working.Comm = task.int("pid"), task.text("comm")
		}
		working.Work = Work{Addr: x.ptr("current_work")}
		if working.Function, err = w.v.function(x.ptr("current_func")); err != nil {
			return err
		}
		if working.Queue, err = w.queue(x.ptr("current_pwq"), 0); err != nil {
			return err
		}
		p.Running = append(p.Running, working)
		return nil
	})
	if err != nil {
		return p, 0, err
	}
	err = w.v.list("work_struct", t.at("worklist"), w.work.offset("entry"), w.left, func(item VirtAddr) error {
		w.left--
		x, err := w.v.thing(w.work, item)
		if err != nil {
			return err
		}
		work := Work{Addr: item}
		if work.Function, err = w.v.function(x.ptr("func")); err != nil {
			return err
		}
		// While it is queued, the word holds its pool_workqueue, which is aligned to leave room for flags (WORK_STRUCT_PWQ_BIT).
		if data := x.num("data.counter"); data&4 != 0 {
			if work.Queue, err = w.queue(VirtAddr(data&^255), at); err != nil {
				return err
			}
		}
		p.Pending = append(p.Pending, work)
		return nil
	})
	return p, t.num("watchdog_ts"), err
}

// queue names the workqueue of a pool_workqueue; empty if that is none, or not of the pool.
func (w *workWalk) queue(at, pool VirtAddr) (string, error) {
	if at == 0 || !w.v.img.space.valid(at, 8) {
		return "", nil
	}
	p, err := w.v.thing(w.pwq, at)
	if err != nil {
		return "", err
	}
	if pool != 0 && p.ptr("pool") != pool {
		return "", nil // the width of the flags is another: it cannot be told
	}
	q, err := w.v.thing(w.wq, p.ptr("wq"))
	if err != nil {
		return "", err
	}
	return q.text("name"), nil
}

// function names the function that is at an address, with its module; without a name, it is the address.
func (v *View) function(at VirtAddr) (string, error) {
	if at == 0 {
		return "", nil
	}
	f, err := v.frame(at)
	if err != nil {
		return "", err
	}
	name := f.Symbol
	if name == "" {
		name = at.String()
	} else if f.Offset != 0 {
		name += fmt.Sprintf("+%#x", f.Offset)
	}
	if f.Module != "" {
		name += " [" + f.Module + "]"
	}
	return name, nil
}

// jiffies returns the count of ticks and how many there are in a second. The latter is a constant of the source; the timekeeper
// knows how long a tick is (ntp_tick, in 2^-32 ns).
func (v *View) jiffies() (now, hz uint64, err error) {
	r := resolver{img: v.img}
	count := r.symbol("jiffies_64", "jiffies")
	keeper := &v.img.lay.keeper
	tick := keeper.addr + VirtAddr(v.img.keeperOffset()+r.field("timekeeper", 8, "ntp_tick"))
	if err := cmp.Or(keeper.err, r.err); err != nil {
		return 0, 0, err
	}
	if now, err = v.Uint64(count); err != nil {
		return 0, 0, err
	}
	n, err := v.Uint64(tick)
	if err != nil {
		return 0, 0, err
	}
	ns := n >> 32
	if ns < 1e5 || ns > 1e8 {
		return 0, 0, &CorruptError{"timekeeper", tick, fmt.Sprintf("ticks of %d ns", ns)}
	}
	return now, (1e9 + ns/2) / ns, nil
}
