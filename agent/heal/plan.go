// Package heal repairs a host: actions plan, and the one Executor carries plans out by memory writes.
//
// Planning is pure. A Plan is data: each Step says what it expects to find, what it puts there, how it is verified, how it
// is undone and why it is done. A plan that is printed is the dry run. The Executor is the only holder of a
// hostmem.Writer; it stores nothing that the plan does not say, nothing before the journal holds the intent, and nothing
// where the bytes are not the expected ones.
package heal

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Risk is how much an action can hurt, the mildest first.
type Risk int

const (
	RiskNone    Risk = iota // observes only
	RiskTask                // ends or stops tasks, or keeps traffic back
	RiskKernel              // changes the kernel's own state
	RiskRestart             // takes the host down
)

var riskNames = [...]string{"none", "task", "kernel", "restart"}

// String returns the name of the risk as it stands in JSON.
func (r Risk) String() string {
	if r < 0 || int(r) >= len(riskNames) {
		return fmt.Sprintf("risk(%d)", int(r))
	}
	return riskNames[r]
}

// MarshalText implements encoding.TextMarshaler.
func (r Risk) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Risk) UnmarshalText(b []byte) error {
	for i, n := range riskNames {
		if n == string(b) {
			*r = Risk(i)
			return nil
		}
	}
	return fmt.Errorf("unknown risk %q", b)
}

// Bytes is memory content; in JSON it is hexadecimal, in which a long run of zeros is written as "(00*4096)".
type Bytes []byte

const zeroRun = 16 // from which on a run is long

// MarshalText implements encoding.TextMarshaler.
func (b Bytes) MarshalText() ([]byte, error) {
	var t []byte
	for len(b) > 0 {
		n := 0
		for n < len(b) && b[n] == 0 {
			n++
		}
		if n >= zeroRun {
			t = fmt.Appendf(t, "(00*%d)", n)
			b = b[n:]
			continue
		}
		n = max(n, 1)
		t = hex.AppendEncode(t, b[:n])
		b = b[n:]
	}
	return t, nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(t []byte) error {
	var v []byte
	for len(t) > 0 {
		if rest, ok := bytes.CutPrefix(t, []byte("(00*")); ok {
			count, after, ok := bytes.Cut(rest, []byte(")"))
			n, err := strconv.Atoi(string(count))
			if !ok || err != nil || n < 0 || n > maxBytes-len(v) {
				return fmt.Errorf("memory bytes: a run of %q zeros", count)
			}
			v, t = append(v, make([]byte, n)...), after
			continue
		}
		n := bytes.IndexByte(t, '(')
		switch n {
		case 0:
			return fmt.Errorf("memory bytes: %q begins no run of zeros, such as (00*16)", t[:min(len(t), 8)])
		case -1:
			n = len(t)
		}
		var err error
		if v, err = hex.AppendDecode(v, t[:n]); err != nil {
			return fmt.Errorf("memory bytes: %w", err)
		}
		t = t[n:]
	}
	*b = v
	return nil
}

const maxBytes = 1 << 20 // of one Bytes that is read

// Op is what a step does.
type Op string

const (
	// OpExpect stores nothing: the bytes at Addr must be Expect.
	OpExpect Op = "expect"
	// OpWrite replaces Expect by Put at Addr. It may take several stores; nothing of the host may depend on it yet.
	OpWrite Op = "write"
	// OpArm replaces Expect by Put, 8 aligned bytes, with one store, or with one compare-and-swap where the path has it.
	// All earlier OpExpect steps are checked again right before. It is undone only while Put is still there.
	OpArm Op = "arm"
	// OpAwait polls until one of Until holds.
	OpAwait Op = "await"
	// OpPower does Power through the host's power controller.
	OpPower Op = "power"
	// OpNetwork gives Network to the packet path between the host and the wire.
	OpNetwork Op = "network"
)

// Cond is a condition on an aligned word of host memory, 4 or 8 bytes, little-endian.
type Cond struct {
	Addr  hostmem.PhysAddr `json:"addr"`
	Size  int              `json:"size"`
	Mask  uint64           `json:"mask"`
	Equal bool             `json:"equal"` // holds when word&Mask == Value; else when it differs
	Value uint64           `json:"value"`
	What  string           `json:"what"` // "exit_state is set"
}

// Step is one element of a plan.
type Step struct {
	Op   Op               `json:"op"`
	Why  string           `json:"why"`
	Addr hostmem.PhysAddr `json:"addr,omitempty"`
	Virt kernel.VirtAddr  `json:"virt,omitempty"` // the same place as the host's kernel calls it, for people
	// Object names what lies there: "irq_work.node.u_flags".
	Object string `json:"object,omitempty"`
	Expect Bytes  `json:"expect,omitempty"`
	Put    Bytes  `json:"put,omitempty"`
	// Undo says that on a later failure Expect is put back, if Put is still there.
	Undo bool `json:"undo,omitempty"`
	// Hold says that what is put stays in force until the end of the whole repair, of which this plan is a part, and is taken
	// back then, however that ends. See Lift.
	Hold bool `json:"hold,omitempty"`
	// MayVanish marks a held step whose object may end with what the repair ends: then there is nothing to be taken back.
	MayVanish bool `json:"mayVanish,omitempty"`
	// Each has an await go on until all of these hold at once.
	Each []Cond `json:"each,omitempty"`
	// Until ends an await as soon as one of the conditions holds. If Unless is given, an await is broken off as failed as soon
	// as one of those holds.
	Until   []Cond        `json:"until,omitempty"`
	Unless  []Cond        `json:"unless,omitempty"`
	Timeout time.Duration `json:"timeout,omitempty"`
	Poll    time.Duration `json:"poll,omitempty"`
	// Cleanup marks steps that tidy up after the repair. Their failure does not fail the plan; what they could not tidy up is
	// reported as left behind.
	Cleanup bool `json:"cleanup,omitempty"`
	// Ours marks a Cleanup write to a place that is the agent's own, whatever the host has made meanwhile of what was laid down there.
	Ours bool `json:"ours,omitempty"`
	// MayFail marks a step that is one of many alike: it is left out if memory does not hold what it expects.
	MayFail bool `json:"mayFail,omitempty"`
	// Once marks an OpExpect that counts for the plan, and no longer for what takes it back: the group lives on without the task. See TakeBack.
	Once bool `json:"once,omitempty"`
	// Later marks a Cleanup step that is left to Executor.Sweep: there is no need to wait for it now.
	Later bool `json:"later,omitempty"`
	// IfFailed has the step run only if the one before it has failed.
	IfFailed bool `json:"ifFailed,omitempty"`
	// Runs marks the await by which the host confirms that it has run Plan.Calls. It ends the danger of the arming store: until
	// then everything that was laid down for the host must stay.
	Runs bool `json:"runs,omitempty"`
	// Power is "on", "off", "cycle", "nmi" or "shutdown".
	Power   string        `json:"power,omitempty"`
	Network *NetworkOrder `json:"network,omitempty"`
}

// What Plan.Foreseen says.
const (
	ForeseenQuiet  = "the finding would go quiet"
	ForeseenStands = "the finding would stand"
	ForeseenCannot = "cannot tell: " // and why
)

// Stores returns what the plan puts where, if that is all it does: nil if it also has the host run something, or waits for it.
func (p Plan) Stores() []kernel.Patch {
	var out []kernel.Patch
	if len(p.Calls) > 0 {
		return nil
	}
	for _, s := range p.Steps {
		switch s.Op {
		case OpExpect:
		case OpWrite, OpArm:
			out = append(out, kernel.Patch{Addr: s.Addr, Put: s.Put})
		default:
			return nil
		}
	}
	return out
}

// Call is a function of the host's kernel that the host will run because of a plan.
type Call struct {
	Function string          `json:"function"`
	Addr     kernel.VirtAddr `json:"addr"`
	Context  string          `json:"context"` // "hard interrupt of CPU 1's timer tick"
	Purpose  string          `json:"purpose"`
}

// Target is the task that a plan is about, so that protection can be judged. Zero if the plan concerns the whole host.
type Target struct {
	TGID    int           `json:"tgid,omitempty"`
	PID     int           `json:"pid,omitempty"`
	Comm    string        `json:"comm,omitempty"`
	UID     uint32        `json:"uid"`
	Start   time.Duration `json:"start,omitempty"`
	KThread bool          `json:"kthread,omitempty"`
}

// KernelID says for which running kernel a plan was made. Memory addresses mean nothing to any other.
type KernelID struct {
	Release string           `json:"release"`
	BuildID string           `json:"buildID"`
	Note    hostmem.PhysAddr `json:"note"`
	BootID  string           `json:"bootID"` // another one after each boot
}

// Identify returns the identity of an attached kernel.
func Identify(i kernel.Info) KernelID {
	return KernelID{Release: i.Release, BuildID: i.BuildID, Note: i.Note, BootID: i.BootID}
}

// Plan is a repair as data.
type Plan struct {
	ID      string    `json:"id"`
	Action  string    `json:"action"`
	Finding string    `json:"finding"`
	Title   string    `json:"title"`
	Risk    Risk      `json:"risk"`
	Made    time.Time `json:"made"`
	Kernel  *KernelID `json:"kernel,omitempty"` // nil if the plan touches no memory
	Target  *Target   `json:"target,omitempty"`
	// Targets are the tasks of a plan that is about several.
	Targets []Target `json:"targets,omitempty"`
	CPU     *int     `json:"cpu,omitempty"` // the CPU that is to do the work, if one is chosen
	Calls   []Call   `json:"calls,omitempty"`
	Steps   []Step   `json:"steps"`
	// Undo says whether the repair as a whole can be taken back once it has worked.
	Undo bool `json:"undo"`
	// More says that the plan is one part of a repair, and whether the fault is gone is asked at the end only; or that it is no
	// repair at all, but something that is done beside one.
	More bool `json:"more,omitempty"`
	// Foreseen is what the detectors say of the host's memory as it would be with the plan's stores made, before any is: ForeseenQuiet,
	// ForeseenStands, or, after a colon, why that could not be told. It is empty if the plan's effect is more than its stores.
	Foreseen string `json:"foreseen,omitempty"`
	// Second is who else has said yes to a store by address.
	Second string `json:"second,omitempty"`
	// Lifts are the plans whose held steps this one takes back.
	Lifts []string `json:"lifts,omitempty"`
	// Value is what the action was asked for with.
	Value *Value `json:"value,omitempty"`
	// TakesBack is the plan whose stores this one takes back.
	TakesBack string `json:"takesBack,omitempty"`
}

// Digest names what a plan does and to whom, in hexadecimal digits: its action, finding and targets, and what each step does to which
// object, with the value that it was asked for with, or that it is a taking back. Addresses, bytes and counts do not count, for they are others from one moment to the next; nor do, in one of several plans of
// a repair (More), the steps and those of its targets that are found anew each time: a fork bomb grows while somebody reads.
func (p Plan) Digest() string {
	type step struct {
		Op, Object, Power string
		Network           *NetworkOrder
	}
	what := []any{p.Action, p.Finding, p.Target}
	if !p.More {
		what = append(what, p.Targets)
		for _, s := range p.Steps {
			what = append(what, step{string(s.Op), s.Object, s.Power, s.Network})
		}
	}
	if p.Value != nil {
		what = append(what, *p.Value)
	}
	if p.TakesBack != "" {
		what = append(what, p.TakesBack)
	}
	b, err := json.Marshal(what)
	if err != nil {
		panic(err) // nothing in it can fail
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Agreed returns an error that is ErrStale unless somebody has agreed to a plan with that digest, or, with none, to whatever is planned.
func (p Plan) Agreed(digest string) error {
	if digest == "" || digest == p.Digest() {
		return nil
	}
	return fmt.Errorf("the host has moved on: what would be done now is %q, which is not what was agreed to; plan again: %w", p.Title, ErrStale)
}

// Ranges returns the host memory that the plan stores to.
func (p Plan) Ranges() []hostmem.Range {
	var rs []hostmem.Range
	for _, s := range p.Steps {
		if s.Op == OpWrite || s.Op == OpArm {
			rs = append(rs, hostmem.Range{Start: s.Addr, Size: uint64(len(s.Put))})
		}
	}
	return rs
}

// String returns the plan as indented JSON.
func (p Plan) String() string {
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return fmt.Sprintf("plan %s: %v", p.ID, err)
	}
	return string(b)
}

// StoreAction is the action of a plan that stores what an operator wants where the operator wants it. It is no repair of anything, and
// none of Actions; it takes no right of its own, but ranges of the agreement's rights.memory that permit storing.
const StoreAction = "store-memory"

// Actions returns all actions.
func Actions() []Action {
	return []Action{
		killProcess(), stopProcess(), continueProcess(), stopForkBomb(), restoreKernel(), relinkHidden(), unhookProbe(), stripCredentials(), wakeTask(), releaseLock(), raiseLimit(), limitMemory(), armPanic(),
		setSysctl(), setControl(memoryMax), setControl(cpuWeight), normalizeRealtime(), restartHost(), powerCycle(),
		quarantine(), rateLimit(), release(),
		called(SyncDisks, "Write to disks what is dirty", RiskKernel, emergencySync, everyKind()...),
		called(RemountDisks, "Remount all file systems read-only", RiskKernel, emergencyRemount, everyKind()...),
		called(RebootHost, "Have the host reboot in an orderly way", RiskRestart, orderlyReboot, everyKind()...),
	}
}

// everyKind are the kinds that what concerns the host as a whole can be an answer to.
func everyKind() []detect.Kind { return detect.Kinds() }

// IDs returns the IDs of all actions.
func IDs() []string {
	var ids []string
	for _, a := range Actions() {
		ids = append(ids, a.ID)
	}
	return ids
}

// Find returns the action with that ID.
func Find(id string) (Action, bool) {
	for _, a := range Actions() {
		if a.ID == id {
			return a, true
		}
	}
	return Action{}, false
}

// Action is a kind of repair.
type Action struct {
	ID    string
	Title string
	Risk  Risk
	// For lists the kinds of findings that the action can be a repair of.
	For []detect.Kind
	// Undo is the ID of the action that takes this one back once it has worked; empty if nothing does. It is the action's own where TakeBack
	// does.
	Undo string
	// Plan plans an action that takes no value, Set one that takes a value of its Settings, which Check has passed. See Prepare.
	Plan     func(context.Context, *kernel.View, detect.Finding) (Plan, error)
	Settings []Setting
	Set      func(context.Context, *kernel.View, detect.Finding, Value) (Plan, error)
	// Next is not nil for a repair in several plans. It makes the next one from a fresh view after one was carried out; more is
	// false when there is nothing left to do. ErrNotYet means that it should be asked again in a moment.
	Next func(context.Context, *kernel.View, detect.Finding) (p Plan, more bool, err error)
}

// Power is the host's power controller.
type Power interface {
	State(ctx context.Context) (string, error) // "on", "off" or "paused"; anything else means that it could not be told
	Cycle(ctx context.Context) error
	On(ctx context.Context) error
	Off(ctx context.Context) error
	NMI(ctx context.Context) error
	GracefulShutdown(ctx context.Context) error
}

// StepOutcome is how one step ended.
type StepOutcome struct {
	Step    int           `json:"step"` // index in Plan.Steps
	Started time.Time     `json:"started"`
	Took    time.Duration `json:"took"`
	Old     Bytes         `json:"old,omitempty"` // what was there
	// How says how a store was made: "compare-and-swap", or "read-compare-write-verify" on a path without atomics.
	How string `json:"how,omitempty"`
	Met string `json:"met,omitempty"` // the condition that ended an await
	// Contained is what kept the host's traffic back before a step of the network.
	Contained *Containment `json:"contained,omitempty"`
	Undone    bool         `json:"undone,omitempty"`
	Error     string       `json:"error,omitempty"`
}

// FunctionRun is a function of the host's kernel that the host has run because of us.
type FunctionRun struct {
	Call
	Runs      int  `json:"runs"`
	Confirmed bool `json:"confirmed"` // the host's kernel marked it as run; else it may have run
	// Within is from arming to confirmation: an upper bound of the waiting and the run together.
	Within time.Duration `json:"within"`
}

// Outcome is what became of a plan.
type Outcome struct {
	Plan     Plan          `json:"plan"`
	Caller   string        `json:"caller"`
	Started  time.Time     `json:"started"`
	Finished time.Time     `json:"finished"`
	Steps    []StepOutcome `json:"steps"`
	// Verified is true only if the plan's own check and the finding's detector both say that the fault is gone.
	Verified bool `json:"verified"`
	Undone   bool `json:"undone"` // it failed, and every store was taken back
	// Left lists memory that still differs from what it was and could not be tidied up, with the reason in Error or Steps.
	Left          []hostmem.Range `json:"left,omitempty"`
	HostFunctions []FunctionRun   `json:"hostFunctions,omitempty"`
	BytesWritten  int             `json:"bytesWritten"`
	Stores        int             `json:"stores"`
	Atomic        bool            `json:"atomic"` // the arming store was a compare-and-swap
	Error         string          `json:"error,omitempty"`
}
