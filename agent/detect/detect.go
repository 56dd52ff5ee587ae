// Package detect judges a host: detectors turn views of its kernel into findings.
package detect

import (
	"time"
)

// Severity orders findings as Redfish does.
type Severity string

const (
	Warning  Severity = "Warning"
	Critical Severity = "Critical"
)

// Kind is the closed vocabulary of faults.
type Kind string

const (
	KindPanic          Kind = "panic"           // the kernel has panicked
	KindCPUStall       Kind = "cpu-stall"       // a CPU makes no progress
	KindRunawayProcess Kind = "runaway-process" // a task eats a CPU beyond policy
	KindHostSilent     Kind = "host-silent"     // nothing on the host progresses
)

// Evidence is one observed fact that supports a finding.
type Evidence struct {
	What  string `json:"what"`  // "panic_cpu"
	Value string `json:"value"` // "1"
}

// Culprit is what caused a finding, as far as could be told. The zero value means unknown.
type Culprit struct {
	CPU   *int          `json:"cpu,omitempty"`
	PID   int           `json:"pid,omitempty"`  // the thread
	TGID  int           `json:"tgid,omitempty"` // the process
	Comm  string        `json:"comm,omitempty"`
	UID   *uint32       `json:"uid,omitempty"`
	Start time.Duration `json:"start,omitempty"` // task_struct.start_time: tells reused PIDs apart
}

// Finding is one fault of the host, as one detector sees it.
type Finding struct {
	// ID is stable while the fault stands and is never used again: "runaway-process-3" counts per engine start.
	ID         string     `json:"id"`
	Kind       Kind       `json:"kind"`
	Severity   Severity   `json:"severity"`
	Title      string     `json:"title"`  // one line for people
	Detail     string     `json:"detail"` // what was seen, and why that is a fault
	Culprit    Culprit    `json:"culprit"`
	Evidence   []Evidence `json:"evidence"`
	Confidence float64    `json:"confidence"` // 0 to 1
	FirstSeen  time.Time  `json:"firstSeen"`
	LastSeen   time.Time  `json:"lastSeen"`
	Resolved   *time.Time `json:"resolved,omitempty"` // when the detector went quiet or the repair was verified
	Resolution string     `json:"resolution,omitempty"`
	// Action is the ID of the action that policy proposes, and Automatic whether policy lets it run unasked.
	Action    string `json:"action,omitempty"`
	Automatic bool   `json:"automatic"`
}
