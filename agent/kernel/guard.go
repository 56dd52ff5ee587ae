package kernel

import (
	"fmt"
	"sync"
)

// Guard is one of the kernel's own protections, and how strong it stands.
type Guard struct {
	Name   string   `json:"name"`   // "lockdown"
	Object string   `json:"object"` // the variable that holds it
	Addr   VirtAddr `json:"addr"`
	// Level is larger the more it protects; zero is off. Text says it in the kernel's own words.
	Level uint64 `json:"level"`
	Text  string `json:"text"`
	// OneWay says that the kernel lets nobody lower it: what is lower was written past the kernel.
	OneWay bool `json:"oneWay,omitempty"`
}

// guard says where one is, and what its value means; false for a value that it cannot have.
type guard struct {
	Guard
	size int // of the variable in bytes: 1 or 4
	say  func(v uint64) (level uint64, text string, ok bool)
}

// guards are the guards of an Image, once they were looked for.
type guards struct {
	once sync.Once
	all  []guard
}

// upTo is the meaning of a number from 0 to most that protects more the larger it is.
func upTo(most uint64) func(uint64) (uint64, string, bool) {
	return func(v uint64) (uint64, string, bool) { return v, fmt.Sprint(v), v <= most }
}

// named is the meaning of an enumerator of which those of rank 0 protect nothing.
func (img *Image) named(enum string, ranks map[string]uint64) (func(uint64) (uint64, string, bool), error) {
	type meaning struct {
		rank uint64
		name string
	}
	by := make(map[uint64]meaning, len(ranks))
	for name, rank := range ranks {
		v, err := img.Enum(enum, name)
		if err != nil {
			return nil, err
		}
		by[uint64(v)] = meaning{rank, name}
	}
	return func(v uint64) (uint64, string, bool) {
		m, ok := by[v]
		return m.rank, m.name, ok
	}, nil
}

// findGuards finds those that this kernel has, by their symbols. Which of them it was built with, only they tell.
func (img *Image) findGuards() []guard {
	var all []guard
	add := func(name, symbol string, offset uint64, oneWay bool, size int, say func(uint64) (uint64, string, bool), err error) {
		at, serr := img.syms.symbol(symbol)
		if err != nil || serr != nil || say == nil {
			return // not built in, ambiguous, or of another make
		}
		all = append(all, guard{Guard{Name: name, Object: symbol, Addr: at + VirtAddr(offset), OneWay: oneWay}, size, say})
	}
	say, err := img.named("lockdown_reason", map[string]uint64{"LOCKDOWN_NONE": 0, "LOCKDOWN_INTEGRITY_MAX": 1, "LOCKDOWN_CONFIDENTIALITY_MAX": 2})
	add("lockdown", "kernel_locked_down", 0, true, 4, say, err) // security/lockdown/lockdown.c
	add("ban on loading modules", "modules_disabled", 0, true, 4, upTo(1), nil)
	add("AppArmor", "apparmor_enabled", 0, true, 4, upTo(1), nil) // security/apparmor/lsm.c
	say, err = img.named("profile_mode", map[string]uint64{"APPARMOR_ENFORCE": 1, "APPARMOR_KILL": 1, "APPARMOR_COMPLAIN": 0, "APPARMOR_UNCONFINED": 0})
	add("AppArmor's mode", "aa_g_profile_mode", 0, false, 4, say, err)
	r := resolver{img: img}
	enforcing := r.field("selinux_state", 1, "enforcing") // security/selinux/include/security.h, with CONFIG_SECURITY_SELINUX_DEVELOP
	add("SELinux", "selinux_state", enforcing, false, 1, upTo(1), r.err)
	add("Yama's limit of ptrace", "ptrace_scope", 0, false, 4, upTo(3), nil) // security/yama/yama_lsm.c
	add("randomised addresses", "randomize_va_space", 0, false, 4, upTo(2), nil)
	add("hidden kernel addresses", "kptr_restrict", 0, false, 4, upTo(2), nil)
	add("limit of unprivileged BPF", "sysctl_unprivileged_bpf_disabled", 0, false, 4, func(v uint64) (uint64, string, bool) { return min(v, 1), fmt.Sprint(v), v <= 2 }, nil)
	return all
}

// Guards reads the kernel's protections. Those that it does not have, or that hold what none of their values is, are left out.
func (v *View) Guards() ([]Guard, error) {
	if _, _, err := v.feature("kernel_locked_down"); err != nil {
		return nil, fmt.Errorf("read the kernel's protections: %w", err)
	}
	v.img.guards.once.Do(func() { v.img.guards.all = v.img.findGuards() })
	var all []Guard
	for _, g := range v.img.guards.all {
		var value uint64
		var err error
		if g.size == 1 {
			var b [1]byte
			err = v.ReadVirt(g.Addr, b[:])
			value = uint64(b[0])
		} else {
			var n uint32
			n, err = v.Uint32(g.Addr)
			value = uint64(n)
		}
		if err != nil {
			return nil, fmt.Errorf("read %s (%s): %w", g.Name, g.Object, err)
		}
		if level, text, ok := g.say(value); ok {
			g.Level, g.Text = level, text
			all = append(all, g.Guard)
		}
	}
	return all, nil
}
