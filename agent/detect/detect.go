// Package detect judges a host: detectors turn views of its kernel into findings.
//
// A Detector is data. Its Detect function is pure: it sees one Pass, which holds everything that was read from the host
// for it, the latest sample last, and it keeps nothing between calls. No findings and a nil error mean "healthy"; an error
// means "could not tell", and the two are never mixed up. Times in a Pass are the reader's, not the host's: a detector
// gives credit only for time in which the reader itself was awake, so a starved reader is never taken for a dead host.
package detect

import (
	"context"
	"errors"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
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
	KindForkBomb       Kind = "fork-bomb"       // a tree of tasks grows without end
	KindMemoryHog      Kind = "memory-hog"      // memory runs out within moments
	KindExhaustion     Kind = "exhaustion"      // something else runs out
	KindOops           Kind = "oops"            // the kernel lives on with a fault of its own
	KindRCUStall       Kind = "rcu-stall"       // a grace period does not end
	KindHungTask       Kind = "hung-task"       // a task waits in the kernel without being woken
	KindSoftLockup     Kind = "soft-lockup"     // a CPU ticks, but stays in one stretch of the kernel's code
	KindTampering      Kind = "tampering"       // somebody has changed the kernel
	KindNetworkFlood   Kind = "network-flood"   // the host floods the network
	KindNetworkScan    Kind = "network-scan"    // the host begins conversations that come to nothing, many and with others each time
	KindNetworkSilent  Kind = "network-silent"  // the host runs, and does not answer on the network
	KindStuckWork      Kind = "stuck-work"      // a workqueue begins nothing
	KindStuckIO        Kind = "stuck-io"        // a disk does not answer
	KindKernelWarning  Kind = "kernel-warning"  // the kernel has noted a fault of its own
	KindHardware       Kind = "hardware"        // the kernel has been told of an error of the hardware
	KindClock          Kind = "clock"           // the host's clock stands still or jumps
	KindBootStuck      Kind = "boot-stuck"      // the host does not come up
	KindStorm          Kind = "interrupt-storm" // a CPU does nothing but interrupts' work
	KindPolicy         Kind = "policy"          // what the operators themselves have asked to be told of
)

// Kinds returns the whole vocabulary.
func Kinds() []Kind {
	return []Kind{KindPanic, KindCPUStall, KindRunawayProcess, KindHostSilent, KindForkBomb, KindMemoryHog, KindExhaustion,
		KindOops, KindRCUStall, KindHungTask, KindSoftLockup, KindTampering, KindNetworkFlood, KindNetworkScan, KindNetworkSilent,
		KindStuckWork, KindStuckIO, KindKernelWarning, KindHardware, KindClock, KindBootStuck, KindStorm, KindPolicy}
}

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
	// Module is the name of a kernel module, Lock that of a lock of the kernel.
	Module string `json:"module,omitempty"`
	Lock   string `json:"lock,omitempty"`
	// Tree is how many tasks are meant: those that the user of the process has started since Since, on the host's clock, as
	// Offspring finds them. Zero if only the process is meant.
	Tree  int           `json:"tree,omitempty"`
	Since time.Duration `json:"since,omitempty"`
}

// Finding is one fault of the host, as one detector sees it.
type Finding struct {
	// ID is stable while the fault stands and is never used again: "runaway-process-3" counts per engine start.
	ID string `json:"id"`
	// Key tells the faults of one kind apart from pass to pass: "cpu1", "412@3.2s". Detectors set it, the engine derives ID from it.
	Key        string     `json:"key"`
	Kind       Kind       `json:"kind"`
	Severity   Severity   `json:"severity"`
	Title      string     `json:"title"`  // one line for people
	Detail     string     `json:"detail"` // what was seen, and why that is a fault
	Culprit    Culprit    `json:"culprit"`
	Evidence   []Evidence `json:"evidence"`
	Confidence float64    `json:"confidence"` // 0 to 1
	// Suspicion means that the signs are there but not yet for long enough to be a verdict. It is shown, never acted upon.
	Suspicion  bool       `json:"suspicion,omitempty"`
	FirstSeen  time.Time  `json:"firstSeen"`
	LastSeen   time.Time  `json:"lastSeen"`
	Resolved   *time.Time `json:"resolved,omitempty"` // when the detector went quiet or the repair was verified
	Resolution string     `json:"resolution,omitempty"`
	// Changes is what was changed in the kernel, with what was there before, as far as that is known.
	Changes []kernel.Change `json:"changes,omitempty"`
	// Rule is what a rule of policy can be for beside the kind, as KIND/RULE: of the kind "policy" the name of the operators' own detector that has found it, of
	// others one of Aspects.
	Rule string `json:"rule,omitempty"`
	// Repairs are the IDs of the plans that have been begun against it, the oldest first.
	Repairs []string `json:"repairs,omitempty"`
	// Cause is the ID of another open finding that explains this one; while it stands nothing is done about this one.
	Cause string `json:"cause,omitempty"`
	// Action is the ID of the action that policy proposes, and Automatic whether policy lets it run unasked.
	Action    string `json:"action,omitempty"`
	Automatic bool   `json:"automatic"`
}

// Aspects of findings that have other remedies than the rest of their kind.
const (
	AspectStarved     = "starved"     // of a runaway process: it lets nobody else run
	AspectProbe       = "probe"       // of tampering: a stranger is called by the kernel
	AspectHidden      = "hidden"      // a process or a module is taken out of a list
	AspectCredentials = "credentials" // a process has rights that nobody has given to it
)

// Aspects returns those of a kind.
func Aspects(k Kind) []string {
	switch k {
	case KindRunawayProcess:
		return []string{AspectStarved}
	case KindTampering:
		return []string{AspectProbe, AspectHidden, AspectCredentials}
	}
	return nil
}

// Need is something that a detector must have in its Pass. Where it is missing, the detector is not run and the outcome is
// "could not tell".
type Need string

const (
	NeedPanic      Need = "panic"      // Pass.Panic
	NeedHeartbeats Need = "heartbeats" // Pass.Beats, one of them from this pass
	NeedTasks      Need = "tasks"      // Pass.Tasks, one of them from this pass
	NeedUsage      Need = "usage"      // Pass.Usage, one of them from this pass
	NeedSigns      Need = "signs"      // Pass.Signs
	NeedJams       Need = "jams"       // Pass.Jams
	NeedMemory     Need = "memory"     // Pass.Memory, one of them from lately
	NeedNetwork    Need = "network"    // Pass.Network, one of them from lately
)

// Has reports whether the pass has what a detector needs.
func (p *Pass) Has(n Need) bool {
	switch n {
	case NeedPanic:
		return p.Panic != nil
	case NeedHeartbeats:
		return len(p.Beats) > 0
	case NeedTasks:
		return len(p.Tasks) > 0
	case NeedUsage:
		return len(p.Usage) > 0
	case NeedSigns:
		return len(p.Signs) > 0
	case NeedJams:
		return len(p.Jams) > 0
	case NeedMemory:
		return len(p.Memory) > 0
	case NeedNetwork:
		return len(p.Network) > 0
	}
	return false
}

// TaskSample is the whole task list as it was once.
type TaskSample struct {
	At    time.Time     `json:"at"`    // the reader's clock when the walk began
	Took  time.Duration `json:"took"`  // how long the walk lasted: the error of every runtime in it
	Tasks []kernel.Task `json:"tasks"` // all threads
	// Mapped is how much writable memory of their own the big processes have asked for, by TGID, in bytes; not all of it is resident.
	Mapped map[int]uint64 `json:"mapped,omitempty"`
}

// BigTask is the share of a host's memory from which on it is looked up what a process has asked for.
const BigTask = 0.05

// Pass is what detectors judge: one look at the host, and the looks before it. It is JSON, so that a series can be stored
// and judged again.
type Pass struct {
	Now  time.Time     `json:"now"`
	Took time.Duration `json:"took"` // what reading cost
	// Path is why the host's memory or kernel could not be read in this pass; empty if it could.
	Path string `json:"path,omitempty"`
	// PathDown is since when without a break the path to memory has been dead; zero while it works.
	PathDown time.Time `json:"pathDown,omitzero"`
	// NoKernel is since when memory could be read and no kernel was found in it, after one had been there; zero while there is one.
	NoKernel time.Time          `json:"noKernel,omitzero"`
	Panic    *kernel.PanicState `json:"panic,omitempty"`
	Beats    []kernel.Heartbeat `json:"beats"` // oldest first
	Tasks    []TaskSample       `json:"tasks"` // oldest first
	// Usage is what may run out, oldest first: close together lately, ten seconds apart before.
	Usage []kernel.Usage `json:"usage,omitempty"`
	Signs []kernel.Signs `json:"signs,omitempty"` // oldest first
	Jams  []JamSample    `json:"jams,omitempty"`  // oldest first
	// Memory is what was counted of the memory's errors, oldest first: MemoryApart from each other, but for the newest.
	Memory []MemorySample `json:"memory,omitempty"`
	// Network is what the packet path between the host and the wire has seen, oldest first.
	Network []NetworkSample `json:"network,omitempty"`
	// Changes is where the kernel's code, its constants and its table of interrupts are not as they were when the agent first looked.
	Changes []kernel.Change `json:"changes,omitempty"`
	// Uncompared is why it is not known, though it should be, whether there are Changes; empty if it is known.
	Uncompared string `json:"uncompared,omitempty"`
	// Risen are the processes that have become root's without execve(2), and without a right to.
	Risen []kernel.Task `json:"risen,omitempty"`
	// Weakened are the kernel's protections that are weaker than they have been since the agent attached.
	Weakened []Weakened   `json:"weakened,omitempty"`
	View     *kernel.View `json:"-"` // the fresh view; nil in a replayed series
	// Tickless says that CPUs of this host may run a task without timer ticks (nohz_full): the scheduler then looks after
	// them from another CPU once a second.
	Tickless bool `json:"tickless,omitempty"`

	made []madeSeries // of Beats
}

// Detector is one kind of judgement.
type Detector struct {
	ID       string
	Title    string
	Kind     Kind
	Severity Severity // of its verdicts
	// Every is how often to judge. Zero means at every heartbeat.
	Every time.Duration
	// For is how long Detect must go on reporting a fault before it becomes a finding, Clear how long it must be silent
	// before the finding is resolved. Detectors that watch a series do their own waiting and leave For at zero.
	For, Clear time.Duration
	// DependsOn lists kinds that explain this one: while one of them stands, this detector's findings are held back.
	DependsOn []Kind
	Needs     []Need
	Detect    func(context.Context, *Pass) ([]Finding, error)
}

// ErrTooEarly means that the series is still too short or too full of gaps for a judgement. It is "could not tell", and
// no fault of anything.
var ErrTooEarly = errors.New("not observed for long enough yet")
