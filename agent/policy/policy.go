// Package policy says what may be done to a host without asking anybody.
//
// A Policy is a table: for a kind of finding, which action, whether it runs by itself or waits for an operator, how often,
// and what comes next if it does not help. What has no row waits for an operator. The agent reads it from the file that
// policyFile names in its configuration; without one everything waits. What a policy allows still needs the access
// agreement's permission. A whole document:
//
//	{
//	  "version": 1,
//	  "detectors": {
//	    "heartbeat": "60ms",
//	    "tasks": "700ms",
//	    "stallSuspect": "220ms",
//	    "stallVerdict": "1s",
//	    "idleVerdict": "5s",
//	    "silent": "5s",
//	    "runawayShare": 0.9,
//	    "runawayFor": "60s",
//	    "runawayExempt": [{"first": 990, "last": 999}],
//	    "bombGrowth": 128,
//	    "hogETA": "3s",
//	    "hogFloor": 0.05,
//	    "rcuFor": "12s",
//	    "hungFor": "30s",
//	    "workFor": "30s",
//	    "ioFor": "20s",
//	    "bootFor": "5m",
//	    "floodPackets": 200000,
//	    "floodSYNs": 1000,
//	    "correctedADay": 10
//	  },
//	  "blast": {"tasks": 4096, "bytes": 8388608},
//	  "flap": {"repairs": 6, "within": "10m"},
//	  "watches": [
//	    {"name": "miner", "title": "A miner runs", "if": "tasks.filter(t, t.comm == 'xmrig' && t.used > 60.0)", "for": "5s"}
//	  ],
//	  "rules": [
//	    {"finding": "runaway-process", "action": "kill-process", "mode": "automatic", "minConfidence": 0.9,
//	     "maxPerHour": 6, "coolDown": "30s"},
//	    {"finding": "runaway-process/starved", "action": "normalize-realtime", "mode": "wait"},
//	    {"finding": "panic", "action": "power-cycle", "mode": "automatic", "maxPerHour": 2, "coolDown": "10m"},
//	    {"finding": "cpu-stall", "action": "power-cycle", "mode": "wait"},
//	    {"finding": "host-silent", "action": "power-cycle", "mode": "wait"},
//	    {"finding": "fork-bomb", "action": "stop-fork-bomb", "mode": "automatic", "minConfidence": 0.9, "maxPerHour": 6},
//	    {"finding": "memory-hog", "action": "kill-process", "mode": "automatic", "minConfidence": 0.9, "maxPerHour": 6},
//	    {"finding": "oops", "action": "reboot-host", "mode": "wait"},
//	    {"finding": "rcu-stall", "action": "restart-host", "mode": "wait"},
//	    {"finding": "soft-lockup", "action": "restart-host", "mode": "wait"},
//	    {"finding": "hung-task", "action": "reboot-host", "mode": "wait"},
//	    {"finding": "tampering", "action": "restore-kernel", "mode": "wait"},
//	    {"finding": "tampering/probe", "action": "unhook-probe", "mode": "automatic", "maxPerHour": 6},
//	    {"finding": "tampering/hidden", "action": "relink-hidden", "mode": "automatic", "maxPerHour": 6},
//	    {"finding": "tampering/credentials", "action": "kill-process", "mode": "wait"},
//	    {"finding": "network-flood", "action": "rate-limit", "mode": "automatic", "maxPerHour": 6, "then": "quarantine"},
//	    {"finding": "network-scan", "action": "quarantine", "mode": "wait"},
//	    {"finding": "network-silent", "action": "reboot-host", "mode": "wait"},
//	    {"finding": "exhaustion", "action": "raise-limit", "mode": "wait"},
//	    {"finding": "stuck-work", "action": "reboot-host", "mode": "wait"},
//	    {"finding": "stuck-io", "action": "restart-host", "mode": "wait"},
//	    {"finding": "kernel-warning", "action": "sync-disks", "mode": "wait"},
//	    {"finding": "hardware", "action": "reboot-host", "mode": "wait"},
//	    {"finding": "clock", "action": "reboot-host", "mode": "wait"},
//	    {"finding": "boot-stuck", "action": "power-cycle", "mode": "wait"},
//	    {"finding": "interrupt-storm", "action": "reboot-host", "mode": "wait"},
//	    {"finding": "policy", "action": "kill-process", "mode": "wait"},
//	    {"finding": "policy/miner", "action": "kill-process", "mode": "automatic", "maxPerHour": 6}
//	  ]
//	}
//
// Only version is required. Watches are detectors of the operators' own; see Watch. Blast and flap bound what is done by itself. The detectors above have their defaults but for runawayExempt, which is empty; detect.Config says
// what they mean. A rule's fields are those of Rule; kill-process is a remedy for a runaway-process, a memory-hog and what a watch
// finds among tasks, stop-fork-bomb for a fork-bomb, restore-kernel for tampering, power-cycle for every kind of finding. A rule for KIND/ASPECT goes before one
// for the whole kind; detect.Aspects has them. An action that takes a value has it in the rule:
// {"finding": "memory-hog", "action": "set-memory-max", "set": {"name": "memory.max", "number": 536870912}, "mode": "wait"}. backdoord -check says whether a document is right.
package policy

import (
	"encoding/json"
	"fmt"
	"time"
)

// Version is the version of the form that this package reads and writes.
const Version = 1

// Duration is a time.Duration that is written as "3s" in JSON.
type Duration time.Duration

// MarshalJSON implements json.Marshaler.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// UnmarshalJSON implements json.Unmarshaler.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("duration %s: write it as a string such as \"3s\"", b)
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("duration %q: write it as \"500ms\", \"3s\" or \"1h30m\"", s)
	}
	if v < 0 {
		return fmt.Errorf("duration %q is negative", s)
	}
	*d = Duration(v)
	return nil
}

// Mode is who starts an action.
type Mode string

const (
	Wait      Mode = "wait"      // an operator
	Automatic Mode = "automatic" // the engine
)

// Rule is one row of the table.
type Rule struct {
	Finding string `json:"finding"` // kind, policy/NAME for the findings of one watch, or KIND/ASPECT, see detect.Aspects
	Action  string `json:"action"`
	Mode    Mode   `json:"mode"`
	// MinConfidence is the least confidence at which the engine acts by itself.
	MinConfidence float64 `json:"minConfidence,omitempty"`
	// MaxPerHour bounds how often the engine acts by itself for findings of this kind; CoolDown is the least time between two.
	MaxPerHour int      `json:"maxPerHour,omitempty"`
	CoolDown   Duration `json:"coolDown,omitempty"`
	// Then is the action that follows by itself when this one was carried out, or could not be, and the fault is seen again.
	// Empty means that an operator is asked. What the agreement or the agent refuses is never followed by anything.
	Then string `json:"then,omitempty"`
	// Set is the value that Action is given, and ThenSet that of Then, for actions that take one.
	Set     *Value `json:"set,omitempty"`
	ThenSet *Value `json:"thenSet,omitempty"`
}

// Value is a number that an action is given, and what it is the number of. Whether it fits the action is checked by who knows that.
type Value struct {
	Name   string `json:"name"` // as kernel.pid_max
	Number int64  `json:"number"`
}

// Users is a range of user IDs, both ends included.
type Users struct {
	First uint32 `json:"first"`
	Last  uint32 `json:"last"`
}

// Detectors are the settings of the detectors. A zero value leaves the default.
type Detectors struct {
	Heartbeat     Duration `json:"heartbeat,omitempty"`
	Tasks         Duration `json:"tasks,omitempty"`
	StallSuspect  Duration `json:"stallSuspect,omitempty"`
	StallVerdict  Duration `json:"stallVerdict,omitempty"`
	IdleVerdict   Duration `json:"idleVerdict,omitempty"`
	Silent        Duration `json:"silent,omitempty"`
	RunawayShare  float64  `json:"runawayShare,omitempty"`
	RunawayFor    Duration `json:"runawayFor,omitempty"`
	RunawayExempt []Users  `json:"runawayExempt,omitempty"`
	BombGrowth    int      `json:"bombGrowth,omitempty"`
	HogETA        Duration `json:"hogETA,omitempty"`
	HogFloor      float64  `json:"hogFloor,omitempty"`
	RCUFor        Duration `json:"rcuFor,omitempty"`
	HungFor       Duration `json:"hungFor,omitempty"`
	WorkFor       Duration `json:"workFor,omitempty"`
	IOFor         Duration `json:"ioFor,omitempty"`
	BootFor       Duration `json:"bootFor,omitempty"`
	FloodPackets  int      `json:"floodPackets,omitempty"`
	FloodSYNs     int      `json:"floodSYNs,omitempty"`
	CorrectedADay int      `json:"correctedADay,omitempty"`
}

// Policy is the document.
type Policy struct {
	Version   int       `json:"version"`
	Detectors Detectors `json:"detectors"`
	// Watches are the operators' own detectors.
	Watches []Watch `json:"watches,omitempty"`
	Blast   Blast   `json:"blast,omitzero"`
	Flap    Flap    `json:"flap,omitzero"`
	Rules   []Rule  `json:"rules"`
}

// Blast is how much may be done by itself for one finding, all its repairs together. An operator who asks for a repair is not
// bound by it. A zero value leaves the default.
type Blast struct {
	Tasks int `json:"tasks,omitempty"` // processes; 4096
	Bytes int `json:"bytes,omitempty"` // stored in the host's memory; 8 MiB
}

// Flap is when a fault that is repaired comes back too often. A zero value leaves the default.
type Flap struct {
	// After so many repairs of a kind of finding (6), of which none was followed by Within (10m) without another, nothing more is
	// done by itself, until there has been none of them for as long.
	Repairs int      `json:"repairs,omitempty"`
	Within  Duration `json:"within,omitempty"`
}

// Limits returns the blast radius, with the defaults where nothing else is said.
func (p Policy) Limits() Blast {
	b := p.Blast
	if b.Tasks == 0 {
		b.Tasks = 4096
	}
	if b.Bytes == 0 {
		b.Bytes = 8 << 20
	}
	return b
}

func (p Policy) flap() Flap {
	f := p.Flap
	if f.Repairs == 0 {
		f.Repairs = 6
	}
	if f.Within == 0 {
		f.Within = Duration(10 * time.Minute)
	}
	return f
}

// Default returns the policy that applies where none is given: the usual settings, and everything waits for an operator.
func Default() Policy {
	return Policy{Version: Version, Rules: []Rule{
		{Finding: "runaway-process", Action: "kill-process", Mode: Wait},
		{Finding: "runaway-process/starved", Action: "normalize-realtime", Mode: Wait},
		{Finding: "panic", Action: "power-cycle", Mode: Wait},
		{Finding: "cpu-stall", Action: "power-cycle", Mode: Wait},
		{Finding: "host-silent", Action: "power-cycle", Mode: Wait},
		{Finding: "fork-bomb", Action: "stop-fork-bomb", Mode: Wait},
		{Finding: "memory-hog", Action: "kill-process", Mode: Wait},
		{Finding: "oops", Action: "reboot-host", Mode: Wait},
		{Finding: "rcu-stall", Action: "restart-host", Mode: Wait},
		{Finding: "soft-lockup", Action: "restart-host", Mode: Wait},
		{Finding: "hung-task", Action: "reboot-host", Mode: Wait},
		{Finding: "tampering", Action: "restore-kernel", Mode: Wait},
		{Finding: "tampering/probe", Action: "unhook-probe", Mode: Wait},
		{Finding: "tampering/hidden", Action: "relink-hidden", Mode: Wait},
		{Finding: "tampering/credentials", Action: "kill-process", Mode: Wait},
		{Finding: "network-flood", Action: "rate-limit", Mode: Wait},
		{Finding: "network-scan", Action: "quarantine", Mode: Wait},
		{Finding: "network-silent", Action: "reboot-host", Mode: Wait},
		{Finding: "exhaustion", Action: "raise-limit", Mode: Wait},
		{Finding: "stuck-work", Action: "reboot-host", Mode: Wait},
		{Finding: "stuck-io", Action: "restart-host", Mode: Wait},
		{Finding: "kernel-warning", Action: "sync-disks", Mode: Wait},
		{Finding: "hardware", Action: "reboot-host", Mode: Wait},
		{Finding: "clock", Action: "reboot-host", Mode: Wait},
		{Finding: "boot-stuck", Action: "power-cycle", Mode: Wait},
		{Finding: "interrupt-storm", Action: "reboot-host", Mode: Wait},
		{Finding: "policy", Action: "kill-process", Mode: Wait},
	}}
}
