package kernel

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"time"
)

// Timer is something that the kernel will do later (struct timer_list, struct hrtimer).
type Timer struct {
	Addr     VirtAddr      `json:"addr"`
	CPU      int           `json:"cpu"`
	Clock    string        `json:"clock"` // jiffies of the timer wheel; of a high-resolution timer monotonic, realtime, boottime or tai, with -soft
	Due      time.Duration `json:"due"`   // from now on; below zero it is late
	Function string        `json:"function"`
	Work     string        `json:"work,omitempty"` // that delayed_work_timer_fn queues
	// Of a timer that wakes a sleeper, who that is.
	PID  int    `json:"pid,omitempty"`
	Comm string `json:"comm,omitempty"`
}

const (
	maxTimers     = 1 << 18
	maxTimerBases = 8
)

// hrtimerClocks are enum hrtimer_base_type.
var hrtimerClocks = []string{"HRTIMER_BASE_MONOTONIC", "HRTIMER_BASE_REALTIME", "HRTIMER_BASE_BOOTTIME", "HRTIMER_BASE_TAI",
	"HRTIMER_BASE_MONOTONIC_SOFT", "HRTIMER_BASE_REALTIME_SOFT", "HRTIMER_BASE_BOOTTIME_SOFT", "HRTIMER_BASE_TAI_SOFT"}

type timerWalk struct {
	v                             *View
	base, timer, cpuBase, clock   *shape
	hrtimer, sleeper, late, task  *shape
	delayed                       *shape
	baseSize, clockSize           uint64
	sleeperTimer, lateTimer, node uint64
	delayedTimer                  uint64
	names                         map[VirtAddr]string
	all                           []Timer
}

// Timers lists the timers of all CPUs, the next first. What is due is as of the last tick of the host's clock.
func (v *View) Timers() iter.Seq2[Timer, error] {
	return settled(v, "walk timers", func() ([]Timer, error) {
		w := timerWalk{v: v, names: make(map[VirtAddr]string)}
		err := w.run()
		slices.SortStableFunc(w.all, func(a, b Timer) int { return cmp.Compare(a.Due, b.Due) })
		return w.all, err
	})
}

func (w *timerWalk) run() error {
	r := resolver{img: w.v.img}
	bases, hrbases := r.symbol("timer_bases"), r.symbol("hrtimer_bases")
	w.base = r.shape("timer_base", "cpu", "vectors[]")
	w.baseSize = r.size("timer_base")
	w.timer = r.shape("timer_list", "entry[]", "expires", "function")
	w.cpuBase = r.shape("hrtimer_cpu_base", "clock_base[]")
	w.clock = r.shape("hrtimer_clock_base", "active.rb_root.rb_root.rb_node", "offset", "index")
	w.clockSize = r.size("hrtimer_clock_base")
	w.hrtimer = r.shape("hrtimer", "node.expires", "function")
	w.node = r.field("hrtimer", 0, "node.node")
	w.sleeper, w.sleeperTimer = r.shape("hrtimer_sleeper", "task"), r.field("hrtimer_sleeper", 0, "timer")
	w.late, w.lateTimer = r.shape("process_timer", "task"), r.field("process_timer", 0, "timer")
	w.delayed, w.delayedTimer = r.shape("delayed_work", "work.func"), r.field("delayed_work", 0, "timer")
	w.task = r.shape("task_struct", "pid", "comm[]")
	if r.err != nil {
		return r.err
	}
	jiffies, hz, err := w.v.jiffies()
	if err != nil {
		return err
	}
	h, err := w.v.Heartbeat()
	if err != nil {
		return err
	}
	for cpu, offset := range w.v.img.perCPU {
		if offset == 0 || cpu >= len(h.CPUs) || !h.CPUs[cpu].Online {
			continue
		}
		for i := range VirtAddr(maxTimerBases) {
			at := bases + i*VirtAddr(w.baseSize)
			// How many there are is a constant of the source: as many as are before the next symbol.
			if name, _, err := w.v.img.syms.at(at); err != nil || name != "timer_bases" {
				break
			}
			if err := w.wheel(cpu, at+offset, jiffies, hz); err != nil {
				return err
			}
		}
		b, err := w.v.thing(w.cpuBase, hrbases+offset)
		if err != nil {
			return err
		}
		for i := uint64(0); i < b.fields["clock_base"].Size/w.clockSize; i++ {
			if err := w.highRes(cpu, b.at("clock_base")+VirtAddr(i*w.clockSize), h.Mono); err != nil {
				return err
			}
		}
	}
	return nil
}

// wheel lists the timers of one base of the timer wheel (kernel/time/timer.c).
func (w *timerWalk) wheel(cpu int, at VirtAddr, jiffies, hz uint64) error {
	b, err := w.v.thing(w.base, at)
	if err != nil {
		return err
	}
	if b.int("cpu") != cpu {
		return nil // behind the last base
	}
	for v := b.bytes("vectors"); len(v) >= 8; v = v[8:] {
		err := w.v.hlist("timer_list", VirtAddr(le64(v)), w.timer.offset("entry"), maxTimers-len(w.all), func(at VirtAddr) error {
			t, err := w.v.thing(w.timer, at)
			if err != nil {
				return err
			}
			return w.add(Timer{Addr: at, CPU: cpu, Clock: "jiffies", Due: ticks(int64(t.num("expires")-jiffies), hz)}, t.ptr("function"))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ticks returns how long n ticks are; what is out of range is as long as can be.
func ticks(n int64, hz uint64) time.Duration {
	const most = int64(1<<63-1) / int64(time.Second)
	if n/int64(hz) >= most || n/int64(hz) <= -most {
		if n < 0 {
			return -1 << 63
		}
		return 1<<63 - 1
	}
	return time.Duration(n/int64(hz))*time.Second + time.Duration(n%int64(hz))*time.Second/time.Duration(hz)
}

// highRes lists the high-resolution timers of one clock of a CPU (kernel/time/hrtimer.c).
func (w *timerWalk) highRes(cpu int, at VirtAddr, mono int64) error {
	c, err := w.v.thing(w.clock, at)
	if err != nil {
		return err
	}
	clock := ""
	for _, name := range hrtimerClocks {
		if n, err := w.v.img.types.enum("hrtimer_base_type", name); err == nil && uint64(n) == c.num("index") {
			clock = lowerName(name, "HRTIMER_BASE_")
		}
	}
	if clock == "" {
		return c.corrupt("clock %d", c.num("index"))
	}
	now := mono + int64(c.num("offset"))
	return w.v.rbtree("hrtimer", c.at("active.rb_root.rb_root.rb_node"), w.node, maxTimers-len(w.all), func(at VirtAddr) error {
		t, err := w.v.thing(w.hrtimer, at)
		if err != nil {
			return err
		}
		return w.add(Timer{Addr: at, CPU: cpu, Clock: clock, Due: time.Duration(int64(t.num("node.expires")) - now)}, t.ptr("function"))
	})
}

func (w *timerWalk) add(t Timer, function VirtAddr) error {
	if len(w.all) == maxTimers {
		return &CorruptError{"timer_list", t.Addr, fmt.Sprintf("more than %d timers", maxTimers)}
	}
	var err error
	if t.Function, err = w.name(function); err != nil {
		return err
	}
	var task VirtAddr
	switch t.Function {
	case "delayed_work_timer_fn":
		d, err := w.v.thing(w.delayed, t.Addr-VirtAddr(w.delayedTimer))
		if err != nil {
			return err
		}
		if t.Work, err = w.name(d.ptr("work.func")); err != nil {
			return err
		}
	case "hrtimer_wakeup":
		s, err := w.v.thing(w.sleeper, t.Addr-VirtAddr(w.sleeperTimer))
		if err != nil {
			return err
		}
		task = s.ptr("task")
	case "process_timeout":
		s, err := w.v.thing(w.late, t.Addr-VirtAddr(w.lateTimer))
		if err != nil {
			return err
		}
		task = s.ptr("task")
	}
	if task != 0 {
		x, err := w.v.thing(w.task, task)
		if err != nil {
			return err
		}
		t.PID, t.Comm = x.int("pid"), x.text("comm")
	}
	w.all = append(w.all, t)
	return nil
}

// name names a function, each once.
func (w *timerWalk) name(function VirtAddr) (string, error) {
	name, ok := w.names[function]
	if ok {
		return name, nil
	}
	name, err := w.v.function(function)
	if err == nil {
		w.names[function] = name
	}
	return name, err
}
