package heal

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

const (
	undoTimeout = 10 * time.Second
	maxStep     = hostmem.PageSize // bytes that one step may store
	maxSteps    = 1024

	casStore   = "compare-and-swap"
	plainStore = "read-compare-write"
	checked    = "read-compare-write-verify"
)

var (
	// ErrMismatch means that host memory does not hold what a plan expects; nothing was stored there.
	ErrMismatch = errors.New("memory does not hold the expected bytes")
	// ErrStale means that a plan is not about the kernel, or the fault, that is there now.
	ErrStale = errors.New("plan is out of date")
	// ErrInvalidPlan means that a plan cannot be carried out as it is written.
	ErrInvalidPlan = errors.New("invalid plan")
	// ErrNoEffect means that the host has not done in time what a plan waits for.
	ErrNoEffect = errors.New("the host has not reacted in time")
)

// Journal takes records before anything is stored. *journal.Journal is one.
type Journal interface {
	// Write makes a record durable before it returns.
	Write(kind string, v any) (uint64, error)
}

// Kernel is what the executor asks of the kernel that a plan is for. *kernel.Image is one.
type Kernel interface {
	Info() kernel.Info
	Prove(context.Context) error
}

// Options are what an Executor works with. Journal, Grant and Confirm are needed for everything, Memory and Kernel for
// plans that store, Power and Network for plans that use them.
type Options struct {
	Memory  hostmem.Memory
	Kernel  Kernel
	Journal Journal
	Grant   access.Grant
	Power   Power
	Network Network
	// Confirm returns nil if the fault of a plan is there in a fresh look at the host.
	Confirm func(context.Context, Plan) error
	// Cured returns nil once the finding's detector has gone quiet; it waits as long as that may take.
	Cured  func(context.Context, Plan) error
	Logger *slog.Logger
	// Budget bounds what the plans of an incident may do together; nil: nothing does.
	Budget *Budget
	// Lease, if not nil, keeps other healers of the same host out while a plan is carried out.
	Lease *Lease
}

// Executor carries plans out. It is the only holder of a hostmem.Writer.
type Executor struct {
	o     Options
	log   *slog.Logger
	guard *hostmem.Guard

	// allowed are the ranges of the plan that is being carried out; the guard lets nothing else through. Only Apply, which
	// runs once at a time, touches it.
	allowed []hostmem.Range
	busy    chan struct{}
}

// NewExecutor returns an executor. It stores nothing on its own.
func NewExecutor(o Options) *Executor {
	x := &Executor{o: o, log: o.Logger, busy: make(chan struct{}, 1)}
	if x.log == nil {
		x.log = slog.New(slog.DiscardHandler)
	}
	if o.Memory != nil {
		x.guard = hostmem.NewGuard(o.Memory, x.permitStore)
	}
	return x
}

// permitStore is the guard's rule.
func (x *Executor) permitStore(_ string, r hostmem.Range) error {
	if err := x.o.Grant.Permit(access.Write); err != nil {
		return err
	}
	for _, a := range x.allowed {
		if a.Contains(r.Start, r.Size) {
			return nil
		}
	}
	return fmt.Errorf("store of %d bytes at %v is outside the plan: %w", r.Size, r.Start, access.ErrDenied)
}

// intent is the journal's record of a plan before its first store.
type intent struct {
	Plan      Plan   `json:"plan"`
	Caller    string `json:"caller"`
	Agreement string `json:"agreement"`
}

// store is the journal's record of one store before it happens.
type store struct {
	Plan string           `json:"plan"`
	Step int              `json:"step"`
	Addr hostmem.PhysAddr `json:"addr"`
	Old  Bytes            `json:"old"`
	New  Bytes            `json:"new"`
	Undo bool             `json:"undo,omitempty"`
}

// Apply carries a plan out on behalf of a caller. Before the first store it checks the form of the plan, that the agreement
// permits it, that the kernel is still the one that the plan was made for, that the fault is still there, and that memory
// holds what every step expects; then it journals the intent. The outcome is returned with an error, too: it says how far
// it went. A context that ends breaks the plan off and has it undone; an order to the power controller is seen through.
func (x *Executor) Apply(ctx context.Context, p Plan, caller string) (Outcome, error) {
	return x.carryOut(ctx, p, caller, false)
}

// ApplyNext is Apply for a further plan of a repair whose first one has been carried out: the fault need not be confirmed
// again, for what was done already may hide it.
func (x *Executor) ApplyNext(ctx context.Context, p Plan, caller string) (Outcome, error) {
	return x.carryOut(ctx, p, caller, true)
}

func (x *Executor) carryOut(ctx context.Context, p Plan, caller string, next bool) (Outcome, error) {
	select {
	case x.busy <- struct{}{}:
		defer func() { <-x.busy }()
	case <-ctx.Done():
		return Outcome{}, ctx.Err()
	}
	r := run{x: x, ctx: ctx, p: p, next: next, out: Outcome{Plan: p, Caller: caller, Started: time.Now()}}
	x.allowed = p.Ranges()
	err := r.apply()
	x.allowed = nil
	r.out.Finished = time.Now()
	if err != nil {
		err = fmt.Errorf("carry out %s: %w", p.ID, err)
		r.out.Error = err.Error()
	}
	kind := "outcome"
	if !r.begun {
		kind = "refused"
	}
	if x.o.Journal != nil {
		if _, jerr := x.o.Journal.Write(kind, r.out); jerr != nil {
			err = errors.Join(err, fmt.Errorf("journal the outcome of %s: %w", p.ID, jerr))
		}
	}
	return r.out, err
}

// Sweep does once more what a plan that was carried out has not been able to tidy up, or has left for later, without waiting
// for the host. It returns what is still left. The plan must be for the kernel that is there; of any other nothing is left.
func (x *Executor) Sweep(ctx context.Context, p Plan) ([]hostmem.Range, error) {
	select {
	case x.busy <- struct{}{}:
		defer func() { <-x.busy }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r := run{x: x, ctx: ctx, p: p, armed: -1}
	x.allowed = p.Ranges()
	defer func() { x.allowed = nil }()
	if err := r.permitted(); err != nil {
		return nil, err
	}
	if err := r.sameKernel(); err != nil {
		return nil, err
	}
	var left []hostmem.Range
	free := true // of what the steps before waited for
	for i := range p.Steps {
		s := &p.Steps[i]
		if !s.Cleanup || s.Op != OpAwait && s.Op != OpWrite || s.IfFailed {
			continue
		}
		if s.Op == OpAwait {
			met, err := r.holds(s.Until)
			if err == nil && met == "" && len(s.Each) > 0 {
				met, err = r.all(s.Each)
			}
			if err != nil {
				return nil, err
			}
			free = met != ""
			continue
		}
		now := make(Bytes, len(s.Put))
		if _, err := x.guard.ReadAt(now, int64(s.Addr)); err != nil {
			return nil, err
		}
		if bytes.Equal(now, s.Put) {
			continue
		}
		if !free {
			left = append(left, hostmem.Range{Start: s.Addr, Size: uint64(len(s.Put))})
			continue
		}
		if err := r.write(i, s, &StepOutcome{}); err != nil {
			x.log.Warn("cannot tidy up", "plan", p.ID, "step", i, "err", err)
			left = append(left, hostmem.Range{Start: s.Addr, Size: uint64(len(s.Put))})
		}
	}
	return left, nil
}

// run is one plan being carried out.
type run struct {
	x     *Executor
	ctx   context.Context
	p     Plan
	out   Outcome
	next  bool // it carries a repair on that has been begun
	begun bool // the intent is in the journal
	done  []int
	armed int // index of an arming store of which it is not known yet that the host has taken it, or -1
	at    time.Time
}

func (r *run) apply() error {
	r.armed = -1
	if err := r.permitted(); err != nil {
		return err
	}
	if err := r.fresh(); err != nil {
		return err
	}
	if err := r.preflight(); err != nil {
		return err
	}
	if err := r.x.o.Budget.take(r.p); err != nil {
		return err
	}
	release, err := r.lease()
	if err != nil {
		return err
	}
	defer release()
	if _, err := r.x.o.Journal.Write("intent", intent{r.p, r.out.Caller, r.x.o.Grant.Agreement()}); err != nil {
		return fmt.Errorf("journal the intent, without which nothing is stored: %w", err)
	}
	r.begun = true
	r.x.log.Info("begin repair", "plan", r.p.ID, "action", r.p.Action, "finding", r.p.Finding, "caller", r.out.Caller)

	var failed error
	prev := error(nil)
	for i := range r.p.Steps {
		s := &r.p.Steps[i]
		if s.IfFailed && prev == nil {
			continue
		}
		if s.Later {
			if s.Op == OpWrite {
				r.out.Left = append(r.out.Left, hostmem.Range{Start: s.Addr, Size: uint64(len(s.Put))})
			}
			continue
		}
		began := time.Now()
		r.out.Steps = append(r.out.Steps, StepOutcome{Step: i, Started: began})
		o := &r.out.Steps[len(r.out.Steps)-1]
		prev = r.step(i, s, o)
		o.Took = time.Since(began)
		if prev == nil {
			continue
		}
		o.Error = prev.Error()
		if s.MayFail && errors.Is(prev, ErrMismatch) {
			prev = nil
			continue
		}
		if s.Cleanup && r.ctx.Err() == nil {
			r.x.log.Warn("cannot tidy up", "plan", r.p.ID, "step", i, "err", prev)
			if s.Op == OpWrite {
				r.out.Left = append(r.out.Left, hostmem.Range{Start: s.Addr, Size: uint64(len(s.Put))})
			}
			continue
		}
		failed = fmt.Errorf("step %d (%s): %w", i, s.Why, prev)
		break
	}
	if failed != nil {
		r.undo()
		return failed
	}
	if r.x.o.Cured != nil && !r.p.More {
		if err := r.x.o.Cured(r.ctx, r.p); err != nil {
			return fmt.Errorf("every step is done, but the fault is still there: %w", err)
		}
		r.out.Verified = true
	}
	return nil
}

// permitted checks the form of the plan and the agreement.
func (r *run) permitted() error {
	x := r.x
	if err := checkForm(r.p); err != nil {
		return err
	}
	if x.o.Journal == nil {
		return fmt.Errorf("there is no journal, and nothing is done without one: %w", access.ErrDenied)
	}
	if r.p.Action == StoreAction {
		permit := x.o.Grant.PermitMemory
		if r.p.Second != "" && r.p.Second != r.out.Caller {
			permit = x.o.Grant.PermitMemoryByTwo
		}
		for _, m := range r.p.Ranges() {
			if err := permit(uint64(m.Start), m.Size, true, true, false); err != nil {
				return err
			}
		}
	} else if err := x.o.Grant.Permit(r.p.Action); err != nil {
		return err
	}
	// What takes back has no value: it restores what the owner had, whatever may be given.
	if a, ok := Find(r.p.Action); ok && r.p.TakesBack == "" {
		if err := a.Check(r.p.Value); err != nil {
			return err
		}
	}
	if v := r.p.Value; v != nil {
		if err := x.o.Grant.PermitValue(r.p.Action, v.Name, v.Number); err != nil {
			return err
		}
	}
	memory := false
	for _, s := range r.p.Steps {
		switch s.Op {
		case OpPower:
			if err := x.o.Grant.Permit(access.Power); err != nil {
				return err
			}
		case OpNetwork: // is the action itself
			if x.o.Network == nil {
				return fmt.Errorf("%s: %w", r.p.Action, ErrNoNetwork)
			}
		default:
			memory = true
			right := access.Read
			if s.Op == OpWrite || s.Op == OpArm {
				right = access.Write
			}
			if err := x.o.Grant.Permit(right); err != nil {
				return err
			}
		}
	}
	if memory && (x.guard == nil || r.p.Kernel == nil) || (memory || r.p.Kernel != nil) && x.o.Kernel == nil {
		return fmt.Errorf("the plan is for a running kernel, and none is attached: %w", ErrStale)
	}
	if len(r.p.Ranges()) > 0 {
		if _, ok := hostmem.AsWriter(x.o.Memory); !ok {
			return fmt.Errorf("the path to the host cannot store: %w", hostmem.ErrReadOnly)
		}
	}
	for _, t := range r.p.Targets {
		if err := x.o.Grant.PermitTask(t.TGID, t.KThread, t.UID, t.Comm); err != nil {
			return err
		}
	}
	if t := r.p.Target; t != nil {
		if err := x.o.Grant.PermitTask(t.TGID, t.KThread, t.UID, t.Comm); err != nil {
			return err
		}
	}
	return nil
}

// fresh checks that kernel and fault are those of the plan.
func (r *run) fresh() error {
	if err := r.sameKernel(); err != nil {
		return err
	}
	if r.next {
		return nil
	}
	if r.x.o.Confirm == nil {
		return fmt.Errorf("nobody can confirm the fault: %w", ErrStale)
	}
	if err := r.x.o.Confirm(r.ctx, r.p); err != nil {
		return fmt.Errorf("the fault is not seen again: %w: %w", err, ErrStale)
	}
	return nil
}

// sameKernel checks that the kernel is that of the plan.
func (r *run) sameKernel() error {
	if want := r.p.Kernel; want != nil {
		if err := r.x.o.Kernel.Prove(r.ctx); err != nil {
			return fmt.Errorf("the kernel is no longer the one that was attached: %w: %w", err, ErrStale)
		}
		got := Identify(r.x.o.Kernel.Info())
		if got != *want {
			return fmt.Errorf("the plan is for kernel %s of boot %s, and %s of boot %s runs: %w", want.Release, want.BootID, got.Release, got.BootID, ErrStale)
		}
	}
	return nil
}

// preflight compares memory with what every step expects that is not about the plan's own consequences. A list of a CPU on which something is may be
// empty in a moment.
func (r *run) preflight() error {
	for i, s := range r.p.Steps {
		if s.Cleanup || s.MayFail || s.Op != OpExpect && s.Op != OpWrite && s.Op != OpArm {
			continue
		}
		_, err := r.compare(&s)
		for end := time.Now().Add(listPatience); errors.Is(err, ErrMismatch) && s.Op == OpArm && r.hands(i) && time.Now().Before(end); _, err = r.compare(&s) {
			time.Sleep(time.Millisecond)
		}
		if err != nil {
			return fmt.Errorf("step %d (%s): %w", i, s.Why, err)
		}
	}
	return nil
}

// checkForm finds plans that no planner of ours makes.
func checkForm(p Plan) error {
	bad := func(i int, why string) error { return fmt.Errorf("step %d: %s: %w", i, why, ErrInvalidPlan) }
	if p.ID == "" || p.Action == "" || len(p.Steps) == 0 || len(p.Steps) > maxSteps {
		return fmt.Errorf("a plan needs an ID, an action and 1 to %d steps: %w", maxSteps, ErrInvalidPlan)
	}
	word := func(c Cond) bool { return (c.Size == 4 || c.Size == 8) && uint64(c.Addr)%uint64(c.Size) == 0 }
	for i, s := range p.Steps {
		if s.Ours && (s.Op != OpWrite || !s.Cleanup) {
			return bad(i, "only what tidies up is ours")
		}
		switch s.Op {
		case OpExpect:
			if len(s.Expect) == 0 || len(s.Expect) > maxStep {
				return bad(i, "expects nothing, or too much")
			}
		case OpWrite:
			if len(s.Put) == 0 || len(s.Put) > maxStep || len(s.Put) != len(s.Expect) {
				return bad(i, "what it expects and what it puts differ in length, or are too long")
			}
		case OpArm:
			if len(s.Put) != 8 || len(s.Expect) != 8 || s.Addr%8 != 0 {
				return bad(i, "an arming store is 8 aligned bytes")
			}
		case OpAwait:
			if s.Timeout <= 0 || s.Timeout > 10*time.Minute || len(s.Until)+len(s.Each) == 0 {
				return bad(i, "waits for nothing, or without an end")
			}
			for _, c := range slices.Concat(s.Until, s.Unless, s.Each) {
				if !word(c) {
					return bad(i, "a condition is about 4 or 8 aligned bytes")
				}
			}
		case OpPower:
		case OpNetwork:
			if s.Network == nil {
				return bad(i, "has no order for the network")
			}
			if err := s.Network.Check(); err != nil {
				return bad(i, err.Error())
			}
		default:
			return bad(i, fmt.Sprintf("unknown operation %q", s.Op))
		}
	}
	return nil
}

// compare reads what is at a step's place and returns it, with ErrMismatch if it is not what the step expects.
func (r *run) compare(s *Step) (Bytes, error) {
	got := make(Bytes, len(s.Expect))
	if _, err := r.x.guard.ReadAt(got, int64(s.Addr)); err != nil {
		return nil, err
	}
	if !s.Ours && !bytes.Equal(got, s.Expect) {
		return got, fmt.Errorf("%s at %v is %x, not %x: %w", s.Object, s.Addr, abridged(got), abridged(s.Expect), ErrMismatch)
	}
	return got, nil
}

func abridged(b []byte) []byte { return b[:min(len(b), 32)] }

func (r *run) step(i int, s *Step, o *StepOutcome) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	var err error
	switch s.Op {
	case OpExpect:
		o.Old, err = r.compare(s)
	case OpWrite:
		err = r.write(i, s, o)
	case OpArm:
		err = r.arm(i, s, o)
	case OpAwait:
		err = r.await(s, o)
	case OpPower:
		// Seen through once begun: a host whose power cycle is broken off half-way stays off.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), PowerTimeout)
		defer cancel()
		err = DoPower(ctx, r.x.o.Power, s.Power)
	case OpNetwork:
		err = r.contain(i, s, o)
	}
	return err
}

func (r *run) write(i int, s *Step, o *StepOutcome) error {
	var err error
	if o.Old, err = r.compare(s); err != nil {
		return err
	}
	if _, err := r.x.o.Journal.Write("store", store{r.p.ID, i, s.Addr, o.Old, s.Put, false}); err != nil {
		return fmt.Errorf("journal the store: %w", err)
	}
	if _, err = r.compare(s); err != nil {
		return err
	}
	r.done = append(r.done, i) // also if it fails half-way: undo looks at what is there
	if _, err := r.x.guard.WriteAt(s.Put, int64(s.Addr)); err != nil {
		return err
	}
	o.How = checked
	r.out.Stores++
	r.out.BytesWritten += len(s.Put)
	got := make([]byte, len(s.Put))
	if _, err := r.x.guard.ReadAt(got, int64(s.Addr)); err != nil {
		return err
	}
	if !bytes.Equal(got, s.Put) {
		return fmt.Errorf("%s at %v reads back as %x: %w", s.Object, s.Addr, abridged(got), ErrMismatch)
	}
	return nil
}

// hands tells whether an arming store hands the host something to run.
func (r *run) hands(i int) bool {
	return slices.ContainsFunc(r.p.Steps[i:], func(s Step) bool { return s.Runs })
}

// listPatience is how long the list of a CPU is waited for that has works of the kernel's own on it: they are off at its next tick.
const listPatience = 100 * time.Millisecond

// arm makes an arming store, as soon as what it expects is there.
func (r *run) arm(i int, s *Step, o *StepOutcome) error {
	hands := !s.Cleanup && r.hands(i)
	journalled := false
	for end := time.Now().Add(listPatience); ; time.Sleep(time.Millisecond) {
		err := r.armNow(i, s, o, &journalled)
		if err == nil || !hands || !errors.Is(err, errTaken) || time.Now().After(end) || r.ctx.Err() != nil {
			return err
		}
	}
}

// errTaken means that an arming store's word is not as it was expected: who else uses it may be done soon.
var errTaken = errors.New("somebody else has it")

func (r *run) armNow(i int, s *Step, o *StepOutcome, journalled *bool) error {
	var err error
	if o.Old, err = r.compare(s); errors.Is(err, ErrMismatch) {
		return fmt.Errorf("%w: %w", err, errTaken)
	} else if err != nil {
		return err
	}
	if !*journalled {
		if _, err := r.x.o.Journal.Write("store", store{r.p.ID, i, s.Addr, o.Old, s.Put, false}); err != nil {
			return fmt.Errorf("journal the store: %w", err)
		}
		*journalled = true
	}
	// Journalling has taken a while. Between these checks and the store nothing else happens. What tidies up comes after the
	// victim's end, and does not concern it.
	for _, e := range r.p.Steps[:i] {
		if e.Op == OpExpect && !s.Cleanup {
			if _, err := r.compare(&e); err != nil {
				return fmt.Errorf("%s: %w", e.Why, err)
			}
		}
	}
	if !s.Cleanup {
		r.armed, r.at = i, time.Now()
	}
	how, swapped, err := r.swap(s.Addr, s.Expect, s.Put)
	o.How = how
	if err == nil && !swapped {
		if !s.Cleanup {
			r.armed = -1
		}
		return fmt.Errorf("%s at %v was taken in the last moment: %w: %w", s.Object, s.Addr, ErrMismatch, errTaken)
	}
	if err != nil {
		return err // it may have got there all the same: undo looks
	}
	r.out.Stores++
	r.out.BytesWritten += len(s.Put)
	r.out.Atomic = how == casStore
	if !s.Cleanup && !r.hands(i) {
		r.armed = -1 // it hands nothing to the host to run: it is a store like others
		r.done = append(r.done, i)
	}
	return nil
}

// swap replaces an 8-byte word, atomically where the path can.
func (r *run) swap(pa hostmem.PhysAddr, old, put Bytes) (how string, swapped bool, err error) {
	if s, ok := hostmem.AsSwapper(r.x.guard); ok {
		want := binary.LittleEndian.Uint64(old)
		prev, err := s.CompareAndSwap(pa, want, binary.LittleEndian.Uint64(put))
		return casStore, err == nil && prev == want, err
	}
	got := make([]byte, 8)
	if _, err := r.x.guard.ReadAt(got, int64(pa)); err != nil {
		return plainStore, false, err
	}
	if !bytes.Equal(got, old) {
		return plainStore, false, nil
	}
	// There is no reading back to verify: the host may take the word away at once. The await that follows is the proof.
	_, err = r.x.guard.WriteAt(put, int64(pa))
	return plainStore, err == nil, err
}

// await polls. If it is the confirmation of an armed work and does not come, the work is withdrawn; if the host has taken it
// off its list already, it is waited for once more, for then it is about to run.
func (r *run) await(s *Step, o *StepOutcome) error {
	met, err := r.poll(r.ctx, s, s.Unless)
	if err != nil && s.Runs && r.armed >= 0 {
		if r.withdraw() {
			r.armed = -1
			return fmt.Errorf("%w; the work was withdrawn before it ran", err)
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), undoTimeout)
		defer cancel()
		var again error
		if met, again = r.poll(ctx, s, nil); again != nil {
			r.runs(false)
			return fmt.Errorf("%w; the host has taken the work and not finished it", err)
		}
		err = nil
	}
	if err != nil {
		return err
	}
	o.Met = met
	if s.Runs {
		r.armed = -1
		r.runs(true)
	}
	return nil
}

func (r *run) runs(confirmed bool) {
	for _, c := range r.p.Calls {
		r.out.HostFunctions = append(r.out.HostFunctions, FunctionRun{Call: c, Runs: 1, Confirmed: confirmed, Within: time.Since(r.at)})
	}
}

// poll returns which of the step's conditions holds.
func (r *run) poll(ctx context.Context, s *Step, unless []Cond) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	every := max(s.Poll, 50*time.Microsecond)
	t := time.NewTimer(every)
	defer t.Stop()
	var faults int
	for {
		// What would break it off is read first: if both hold, it has happened.
		broken, err1 := r.holds(unless)
		met, err2 := r.holds(s.Until)
		if err2 == nil && met == "" && len(s.Each) > 0 {
			met, err2 = r.all(s.Each)
		}
		switch err := errors.Join(err1, err2); {
		case err != nil:
			if faults++; faults > 100 {
				return "", err
			}
		case met != "":
			return met, nil
		case broken != "":
			return "", fmt.Errorf("%s: %w", broken, ErrStale)
		default:
			faults = 0
		}
		select {
		case <-ctx.Done():
			if err := r.ctx.Err(); err != nil {
				return "", err
			}
			return "", fmt.Errorf("waited %v for %q: %w", s.Timeout, s.Why, ErrNoEffect)
		case <-t.C:
			t.Reset(every)
		}
	}
}

// holds returns the first condition that does.
func (r *run) holds(cs []Cond) (string, error) {
	var b [8]byte
	for _, c := range cs {
		clear(b[:])
		if _, err := r.x.guard.ReadAt(b[:c.Size], int64(c.Addr)); err != nil {
			return "", err
		}
		if (binary.LittleEndian.Uint64(b[:])&c.Mask == c.Value) == c.Equal {
			return c.What, nil
		}
	}
	return "", nil
}

// all returns the last of conditions if all of them hold.
func (r *run) all(cs []Cond) (string, error) {
	for i := range cs {
		met, err := r.holds(cs[i : i+1])
		if err != nil || met == "" {
			return "", err
		}
	}
	return cs[len(cs)-1].What, nil
}

// withdraw takes an armed work back, and reports whether that is certain.
func (r *run) withdraw() bool {
	s := &r.p.Steps[r.armed]
	r.record(r.armed, s.Put, s.Expect)
	_, swapped, err := r.swap(s.Addr, s.Put, s.Expect)
	if err != nil || !swapped {
		return false
	}
	r.out.Stores++
	r.out.BytesWritten += len(s.Expect)
	r.mark(r.armed)
	return true
}

// record journals an undoing store. It goes on without: the intent has both the old and the new bytes.
func (r *run) record(i int, old, put Bytes) {
	if _, err := r.x.o.Journal.Write("store", store{r.p.ID, i, r.p.Steps[i].Addr, old, put, true}); err != nil {
		r.x.log.Error("cannot journal an undo", "plan", r.p.ID, "step", i, "err", err)
	}
}

func (r *run) mark(i int) {
	for k := range r.out.Steps {
		if r.out.Steps[k].Step == i {
			r.out.Steps[k].Undone = true
		}
	}
}

// undo takes back what was stored, the latest first. What the host may still be using stays.
func (r *run) undo() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), undoTimeout)
	defer cancel()
	r.ctx = ctx
	left := func(i int) {
		s := &r.p.Steps[i]
		r.out.Left = append(r.out.Left, hostmem.Range{Start: s.Addr, Size: uint64(len(s.Put))})
	}
	ran := false
	for _, f := range r.out.HostFunctions {
		ran = ran || f.Runs > 0
	}
	if r.armed >= 0 && !ran {
		if !r.withdraw() {
			ran = true // it cannot be told; the host may be using it
			left(r.armed)
		}
		r.armed = -1
	}
	undone := true
	for k := len(r.done) - 1; k >= 0; k-- {
		i := r.done[k]
		s := &r.p.Steps[i]
		if s.Op == OpNetwork {
			undone = r.uncontain(i) && undone
			continue
		}
		if ran || !s.Undo {
			undone = false
			left(i)
			continue
		}
		now := make(Bytes, len(s.Put))
		if _, err := r.x.guard.ReadAt(now, int64(s.Addr)); err != nil {
			undone = false
			left(i)
			continue
		}
		if bytes.Equal(now, s.Expect) {
			r.mark(i)
			continue
		}
		if !between(now, s.Expect, s.Put) {
			r.x.log.Error("cannot undo: somebody else has written there", "plan", r.p.ID, "step", i)
			undone = false
			left(i)
			continue
		}
		r.record(i, now, s.Expect)
		var err error
		if s.Op == OpArm {
			var swapped bool
			if _, swapped, err = r.swap(s.Addr, s.Put, s.Expect); err == nil && !swapped {
				err = ErrMismatch
			}
		} else {
			_, err = r.x.guard.WriteAt(s.Expect, int64(s.Addr))
		}
		if err != nil {
			r.x.log.Error("cannot undo", "plan", r.p.ID, "step", i, "err", err)
			undone = false
			left(i)
			continue
		}
		r.out.Stores++
		r.out.BytesWritten += len(s.Expect)
		r.mark(i)
	}
	r.out.Undone = undone && !ran
}

// between reports whether each byte is the one of old or the one of put, as a store leaves it that did not complete.
func between(now, old, put []byte) bool {
	for i := range now {
		if now[i] != old[i] && now[i] != put[i] {
			return false
		}
	}
	return true
}
