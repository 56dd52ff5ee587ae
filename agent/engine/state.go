// Package engine is the agent's loop: it attaches to a host's kernel, has the detectors judge it at their pace, and has
// what they find repaired as far as policy and agreement allow, the mildest means first.
//
// It attaches again by itself after the path to memory was lost and after the host has rebooted; a kernel that has panicked
// stays attached, so that its log can be read until the host is restarted. Nothing in one pass, not even a panic in a
// detector, stops the loop.
package engine

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Options are what an engine works with. Memory is required; the zero value of everything else works and is safe.
type Options struct {
	Logger *slog.Logger
	// Memory opens, or opens again, the path to the host's memory.
	Memory func(ctx context.Context) (hostmem.Memory, error)
	// Writes allows changing the host at all, by stores to its memory or by its power controller. Without it the engine only
	// watches, whatever agreement and policy say.
	Writes bool
	// HostUUID is the SMBIOS system UUID of the host that this agent is meant for, known from outside (its BMC, the
	// configuration). Empty means that the kernel's own copy is taken.
	HostUUID string
	// Agreement holds what permits whatever is done to the host; nil permits nothing.
	Agreement *access.Lock
	// Mailbox has an engine whose Agreement has never held one look for one in the host's memory, where the host's part in it puts it.
	Mailbox bool
	Policy  policy.Policy
	// Journal takes every decision. Without one nothing is ever written to the host.
	Journal *journal.Journal
	// Power is the host's power controller; nil if there is none.
	Power heal.Power
	// Network is the packet path between the host and the wire; nil if this agent does not stand there.
	Network Network
	// Interval overrides the policy's time between two heartbeats; zero leaves it.
	Interval time.Duration
	// OwnThread has the watch run on a thread of its own and, with CAP_SYS_NICE, before all others of this process: who looks whether the host has panicked
	// waits for those who are served meanwhile else. Without it State does not tell Load.
	OwnThread bool
	// CacheDir keeps hints between starts, such as where the kernel's note was found last. Empty means none are kept.
	CacheDir string
	// RecordDir keeps the series by which the latest findings were judged (Recording). Empty means none are kept.
	RecordDir string
	// Types has types for hosts whose kernels carry none: kernel.Options.Types.
	Types func(kernel.Build) ([]byte, error)
	// Known has kernels as they were built, by build ID, with which the host's is compared; nil, or nil of it, trusts the host as it is
	// when its kernel's code is first looked at. See kernel.KnownDir.
	Known func(id string) (*kernel.Known, error)
}

// Phase is where the engine stands with its host.
type Phase string

const (
	NoMemory  Phase = "no-memory" // the path to the host's memory cannot be opened
	Searching Phase = "searching" // memory is there; no kernel found in it yet
	Attached  Phase = "attached"  // a kernel, alive or dead, is known
	Lost      Phase = "lost"      // the kernel that was attached is gone; the next one is being looked for
)

// Health is the overall judgement: one of three, and the third is never shown as health.
type Health string

const (
	Healthy      Health = "yes"
	Ill          Health = "no"
	CouldNotTell Health = "could-not-tell"
)

// DetectorStatus is how a detector's latest run ended.
type DetectorStatus struct {
	ID      string        `json:"id"`
	Title   string        `json:"title"`
	Health  Health        `json:"health"`
	Error   string        `json:"error,omitempty"` // why it could not tell
	LastRun time.Time     `json:"lastRun,omitzero"`
	Took    time.Duration `json:"took"`
	Runs    uint64        `json:"runs"`
	Faults  uint64        `json:"faults"` // runs that ended in an error or a panic
	// Withheld is set while the agreement does not give the detector: it does not run, and the host's health is told without it.
	Withheld bool `json:"withheld,omitempty"`
}

// PassCost is what the observation costs.
type PassCost struct {
	At    time.Time     `json:"at,omitzero"`
	Took  time.Duration `json:"took"`
	Reads int           `json:"reads"`
	Bytes int64         `json:"bytes"`
	// The rest is averaged over the last seconds.
	MeanHeartbeat time.Duration `json:"meanHeartbeat"`
	MeanTasks     time.Duration `json:"meanTasks"`
	BytesPerSec   float64       `json:"bytesPerSec"`
	Load          float64       `json:"load"` // processor time of the watch, as a share of one CPU, 0 to 1
	Late          uint64        `json:"late"` // passes that began more than one interval late
}

// GoldenState says how the kernel's code and constants are compared with what they were when the agent first looked.
type GoldenState struct {
	Taken   time.Time `json:"taken"`   // what was changed before is not seen, but by Built
	Built   bool      `json:"built"`   // the copy is the kernel as it was built: what was changed before is seen, too
	Bytes   uint64    `json:"bytes"`   // that one round compares
	Hot     uint64    `json:"hot"`     // of these, tables of functions, which are compared every 0.6 s
	Rounds  int       `json:"rounds"`  // that are complete
	Modules int       `json:"modules"` // whose code and constants are compared; each is trusted as it was when it was first seen
	// Left says what is not compared, and why.
	Left []string `json:"left,omitempty"`
	Kept bool     `json:"kept"` // the bytes are kept, so that they can be restored; else only whether they have changed is known
	// Round is when the latest round was complete, Compared how many bytes of the present one are done.
	Round    time.Time `json:"round,omitzero"`
	Compared uint64    `json:"compared"`
	// Differing is how many stretches of 128 bytes are not as they were, for a moment or for good.
	Differing int `json:"differing"`
	// Error is why the latest comparison was broken off, and Failing since when that is so: what is changed meanwhile is not seen.
	Error   string    `json:"error,omitempty"`
	Failing time.Time `json:"failing,omitzero"`
}

// Progress is how far a search has come.
type Progress struct {
	Stage string `json:"stage"`
	Done  uint64 `json:"done"`
	Total uint64 `json:"total"`
}

// AgreementState says what the agreement permits. Without an ID there is none, and Denied says why none is taken.
type AgreementState struct {
	ID         string        `json:"id"`
	Host       access.Host   `json:"host"`
	Owner      string        `json:"owner"`
	Monitors   []string      `json:"monitors"`
	Rights     access.Rights `json:"rights"`
	ValidUntil time.Time     `json:"validUntil,omitzero"`
	// Digest names the document: orders about it have it, and its successor.
	Digest string `json:"digest,omitempty"`
	// Orders are those about it that are in force.
	Orders []OrderState `json:"orders,omitempty"`
	// Denied is why nothing is permitted; empty if the agreement applies to this host now.
	Denied string `json:"denied,omitempty"`
}

// OrderState says what an order about the agreement does.
type OrderState struct {
	Sequence uint64    `json:"sequence"`
	Order    string    `json:"order"`
	Until    time.Time `json:"until,omitzero"`
	Reason   string    `json:"reason"`
}

// FaultNote is something that went wrong in the engine itself.
type FaultNote struct {
	At    time.Time `json:"at"`
	Where string    `json:"where"`
	Error string    `json:"error"`
	Count int       `json:"count"` // how often the same has happened in a row
}

// State is a snapshot of the engine.
type State struct {
	Phase      Phase            `json:"phase"`
	Since      time.Time        `json:"since"`
	Started    time.Time        `json:"started"`
	Why        string           `json:"why,omitempty"` // why the phase is not "attached"
	Progress   *Progress        `json:"progress,omitempty"`
	Kernel     *kernel.Info     `json:"kernel,omitempty"`
	Dead       bool             `json:"dead"` // the attached kernel has panicked or shows no life
	HostUUID   string           `json:"hostUUID,omitempty"`
	AttachTook time.Duration    `json:"attachTook"`
	Attaches   int              `json:"attaches"`
	Health     Health           `json:"health"`
	Detectors  []DetectorStatus `json:"detectors"`
	Suspicions []detect.Finding `json:"suspicions,omitempty"`
	Passes     uint64           `json:"passes"`
	LastPass   PassCost         `json:"lastPass"`
	Golden     *GoldenState     `json:"golden,omitempty"` // nil until the kernel's code is compared with a copy
	Writes     bool             `json:"writes"`
	Agreement  *AgreementState  `json:"agreement,omitempty"`
	Healing    string           `json:"healing,omitempty"` // ID of the plan that is being carried out
	Errors     []FaultNote      `json:"errors,omitempty"`
	// Contained is what keeps the host's traffic back; nil if nothing does.
	Contained *heal.Containment `json:"contained,omitempty"`
}

// EventType is what an event tells.
type EventType string

const (
	EventAttached  EventType = "attached"
	EventLost      EventType = "lost"
	EventSuspicion EventType = "suspicion"
	EventFinding   EventType = "finding"
	EventResolved  EventType = "resolved"
	EventPlanned   EventType = "planned" // a repair begins
	EventHealed    EventType = "healed"  // a repair has worked
	EventDone      EventType = "done"    // what was asked for beside a repair is done; the finding stands
	EventFailed    EventType = "failed"  // a repair has not worked
	EventWaiting   EventType = "waiting" // a finding waits for an operator
	EventEscalated EventType = "escalated"
	EventAgreement EventType = "agreement" // the access agreement was paused, succeeded, …
)

// Event is one thing that happened. Seq rises by one from event to event; a subscriber that sees a gap has been too slow.
type Event struct {
	Seq     uint64          `json:"seq"`
	At      time.Time       `json:"at"`
	Type    EventType       `json:"type"`
	Text    string          `json:"text"`
	Finding *detect.Finding `json:"finding,omitempty"`
	Outcome *heal.Outcome   `json:"outcome,omitempty"`
	Kernel  *kernel.Info    `json:"kernel,omitempty"`
}

// HealRequest asks for a repair.
type HealRequest struct {
	Finding string // ID
	Action  string // ID; empty means what policy proposes
	// Value is what the action is given, if it takes a value; nil means what policy gives it. It names the action if Action is empty.
	Value  *heal.Value
	DryRun bool   // plan only
	Agreed string // digest of the plan that somebody has agreed to; empty means any. Another plan is heal.ErrStale and not carried out
	Caller string // who asks, for the journal
}

var (
	// ErrNotAttached means that no kernel is attached.
	ErrNotAttached = errors.New("no kernel of the host is attached")
	// ErrNoFinding means that there is no open finding with that ID.
	ErrNoFinding = errors.New("no such open finding")
	// ErrBusy means that another repair is being carried out.
	ErrBusy = errors.New("another repair is being carried out")
	// ErrWritesOff means that the agent was started to watch only: Options.Writes is off.
	ErrWritesOff = errors.New("changing the host is switched off in this agent")
)
