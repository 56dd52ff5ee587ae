package kernel

import (
	"fmt"
	"time"
)

// RCU is the state of read-copy-update (struct rcu_state, kernel/rcu/tree.h): what waits for all CPUs to have passed through a
// moment without old readers.
type RCU struct {
	GracePeriod uint64 `json:"gracePeriod"` // rcu_state.gp_seq
	Waiting     bool   `json:"waiting"`     // a grace period is under way
	State       string `json:"state"`       // of the thread that drives grace periods: RCU_GP_…
	// Running is how long the grace period has been under way, Quiet how long that thread did nothing about it. Stall is the
	// time from now on after which the kernel will complain of a stall, below zero if it should have by now.
	Running time.Duration `json:"running"`
	Quiet   time.Duration `json:"quiet"`
	Stall   time.Duration `json:"stall"`
	CPUs    []RCUCPU      `json:"cpus"`
}

// RCUCPU is a CPU's part (struct rcu_data).
type RCUCPU struct {
	CPU       int    `json:"cpu"`
	Callbacks int64  `json:"callbacks"` // that wait for grace periods
	Seen      uint64 `json:"seen"`      // the grace period that it has taken note of
	// Awaited means that the grace period under way still waits for this CPU, as far as the CPU itself knows.
	Awaited bool `json:"awaited"`
}

// RCU reads the state of RCU.
func (v *View) RCU() (RCU, error) {
	s, err := settle(v, v.rcu)
	if err != nil {
		return RCU{}, fmt.Errorf("read RCU state: %w", err)
	}
	return s, nil
}

func (v *View) rcu() (RCU, error) {
	var s RCU
	r := resolver{img: v.img}
	state, data := r.symbol("rcu_state"), r.symbol("rcu_data")
	of := r.shape("rcu_state", "gp_seq", "gp_state", "gp_start", "gp_activity", "jiffies_stall")
	cpu := r.shape("rcu_data", "gp_seq", "cpu_no_qs.b.norm", "core_needs_qs", "cblist.len", "cpu?")
	if r.err != nil {
		return s, r.err
	}
	now, hz, err := v.jiffies()
	if err != nil {
		return s, err
	}
	t, err := v.thing(of, state)
	if err != nil {
		return s, err
	}
	// The two lowest bits are the phase: RCU_SEQ_CTR_SHIFT.
	s.GracePeriod = t.num("gp_seq")
	s.Waiting = s.GracePeriod&3 != 0
	if s.State, err = v.rcuStateName(t.num("gp_state")); err != nil {
		return s, err
	}
	if s.Waiting {
		s.Running, s.Quiet = ticks(int64(now-t.num("gp_start")), hz), ticks(int64(now-t.num("gp_activity")), hz)
		s.Stall = ticks(int64(t.num("jiffies_stall")-now), hz)
	}
	h, err := v.Heartbeat()
	if err != nil {
		return s, err
	}
	for id, offset := range v.img.perCPU {
		if offset == 0 || id >= len(h.CPUs) || !h.CPUs[id].Online {
			continue
		}
		c, err := v.thing(cpu, data+offset)
		if err != nil {
			return s, err
		}
		if _, ok := c.fields["cpu"]; ok && c.int("cpu") != id {
			return s, c.corrupt("CPU %d has the data of CPU %d", id, c.int("cpu"))
		}
		s.CPUs = append(s.CPUs, RCUCPU{CPU: id, Callbacks: int64(c.num("cblist.len")), Seen: c.num("gp_seq"),
			Awaited: s.Waiting && c.num("gp_seq") == s.GracePeriod && c.num("core_needs_qs") != 0})
	}
	return s, nil
}

// rcuStateName reads the kernel's own name for a state of its grace-period thread.
func (v *View) rcuStateName(n uint64) (string, error) {
	names, err := v.img.syms.symbol("gp_state_names")
	if err != nil || n >= 16 {
		return fmt.Sprint(n), nil
	}
	p, err := v.pointer("gp_state_names", names+VirtAddr(8*n))
	if err != nil {
		return "", err
	}
	return v.cstring("gp_state_names", p, 64)
}
