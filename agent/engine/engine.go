package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// keepResolved is how many resolved findings Findings still shows.
const keepResolved = 100

// Engine watches one host. Its methods are safe for concurrent use, and none of them waits for the loop's reads.
type Engine struct {
	o         Options
	log       *slog.Logger
	src       source
	config    detect.Config
	detectors []detect.Detector
	journal   chan entry
	taken     chan taken
	wake      chan struct{}   // has the loop begin a pass at once
	healing   chan struct{}   // holds one token: one repair at a time
	network   sync.Mutex      // held while containment changes
	running   context.Context // ends with Run; every repair is broken off then
	end       context.CancelFunc
	builds    kernel.Cache // of the kernels that were attached

	mu          sync.Mutex
	phase       Phase               // guarded by mu, like everything below
	since       time.Time           //
	started     time.Time           //
	why         string              // why not attached
	progress    *Progress           //
	mem         hostmem.Memory      //
	target      target              // nil unless attached
	uuid        string              // system UUID as the host tells it
	attachTook  time.Duration       //
	attaches    int                 //
	dead        bool                //
	moved       time.Time           // when the attached kernel last showed life; zero if not yet
	rest        rest                // an operator's order to stand still
	restarting  bool                // the host has been switched off and on, and no new kernel has been seen yet
	status      []DetectorStatus    // in the order of detectors
	tracked     map[string]*tracked // by kind and key
	resolved    []detect.Finding    // oldest first
	counts      map[detect.Kind]int // IDs given
	force       map[string]bool     // IDs of detectors to run in the next pass
	changed     chan struct{}       // closed and replaced after each pass
	passes      uint64
	cost        PassCost
	current     string // ID of the plan being carried out
	plans       int
	outcomes    []heal.Outcome // oldest first
	past        []policy.Past
	begun       map[string][]time.Time // by action, whoever asked: for the agreement's rates
	left        []leftover
	nextTidy    time.Time
	followed    map[string]bool // by boot ID: what an earlier start has begun there was ended
	subscribers map[chan Event]bool
	eventSeq    uint64
	faults      []FaultNote
	shown       shown
	named       *named           // of the attached kernel; made when it is first asked for
	beat        kernel.Heartbeat // the latest of the attached kernel
	leased      *heal.Lease      // of the boot leasedBoot
	leasedBoot  string
	compared    *GoldenState       // of the attached kernel; not changed once it is here
	fresh       []string           // IDs of findings that this pass has told of
	asked       []chan detect.Pass // who waits for the series
	digestOf    *access.Agreement
	digest      string // of digestOf
}

// New returns an engine that does nothing until Run.
func New(o Options) *Engine {
	e := &Engine{
		o: o, log: o.Logger, src: memoryKernels{}, config: o.Policy.DetectConfig(),
		journal: make(chan entry, 1024), taken: make(chan taken, 4), wake: make(chan struct{}, 1), healing: make(chan struct{}, 1),
		phase: NoMemory, since: time.Now(), started: time.Now(), why: "not started yet",
		tracked: make(map[string]*tracked), counts: make(map[detect.Kind]int), force: make(map[string]bool), begun: make(map[string][]time.Time),
		changed: make(chan struct{}), followed: make(map[string]bool),
	}
	e.running, e.end = context.WithCancel(context.Background())
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if o.Interval > 0 {
		e.config.Heartbeat = o.Interval
		e.config.Tasks = max(e.config.Tasks, o.Interval)
	}
	e.detectors = detect.Detectors(e.config)
	if o.Network != nil {
		e.detectors = append(e.detectors, detect.NetworkDetectors(e.config)...)
	}
	own, err := o.Policy.Watching()
	if err != nil {
		e.log.Error("the operators' own detectors do not run", "err", err) // Run says so, too
	}
	e.detectors = append(e.detectors, own...)
	for _, d := range e.detectors {
		e.status = append(e.status, DetectorStatus{ID: d.ID, Title: d.Title, Health: CouldNotTell, Error: "has not run yet"})
	}
	return e
}

// Run works until ctx ends, and has then what a repair under way has stored taken back; after that the engine begins nothing
// more. It returns earlier only if the options are invalid.
func (e *Engine) Run(ctx context.Context) error {
	if e.o.Memory == nil {
		return errors.New("engine: no memory is given")
	}
	if e.o.Policy.Version != 0 || len(e.o.Policy.Rules) > 0 {
		if err := CheckPolicy(e.o.Policy); err != nil {
			return fmt.Errorf("engine: %w", err)
		}
	}
	if err := e.config.Check(); err != nil {
		return fmt.Errorf("engine: %w", err)
	}
	defer context.AfterFunc(ctx, e.end)()
	e.remember()
	var wg sync.WaitGroup
	wg.Go(func() { e.writeJournal(ctx) })
	wg.Go(func() { e.writeRecordings(ctx) })
	e.mu.Lock()
	e.started = time.Now()
	e.record("start", map[string]any{"writes": e.o.Writes, "agreement": e.agreementID()})
	e.mu.Unlock()
	e.loop(ctx)
	wg.Wait()
	return ctx.Err()
}

func (e *Engine) agreementID() string {
	if a := e.o.Agreement.Agreement(); a != nil {
		return a.ID
	}
	return ""
}

// State returns a snapshot.
func (e *Engine) State() State {
	contained := e.contained()
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.brief()
	s.Detectors, s.Errors, s.Contained = slices.Clone(e.status), slices.Clone(e.faults), contained
	if e.progress != nil {
		p := *e.progress
		s.Progress = &p
	}
	if e.target != nil {
		i := e.target.Info()
		s.Kernel = &i
	}
	for _, t := range e.tracked {
		if t.ID == "" && t.Suspicion {
			s.Suspicions = append(s.Suspicions, t.Finding)
		}
	}
	if a := e.o.Agreement.Agreement(); a != nil {
		var orders []OrderState
		s.Agreement = &AgreementState{ID: a.ID, Host: a.Host, Owner: a.Owner.Name, Rights: a.Rights, ValidUntil: a.ValidUntil}
		for _, o := range e.o.Agreement.Orders() {
			s := OrderState{Sequence: o.Sequence, Order: o.Order, Reason: o.Reason}
			if o.Until != nil {
				s.Until = *o.Until
			}
			orders = append(orders, s)
		}
		s.Agreement.Orders = orders
		if e.digestOf != a { // a document that holds is not changed
			e.digestOf = a
			e.digest, _ = a.Digest() // it was verified, so it has one
		}
		s.Agreement.Digest = e.digest
		for _, m := range a.Monitors {
			s.Agreement.Monitors = append(s.Agreement.Monitors, m.Name)
		}
		if err := e.grant().Denied(); err != nil {
			s.Agreement.Denied = err.Error()
		}
	} else if err := e.o.Agreement.Shut(); err != nil {
		s.Agreement = &AgreementState{Denied: err.Error()}
	}
	return s
}

// Brief returns the part of State that takes no memory of its own, for who asks many times a second: without Kernel, Progress, Detectors, Suspicions,
// Agreement, Contained and Errors.
func (e *Engine) Brief() State {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.brief()
}

// brief is Brief. e.mu is held.
func (e *Engine) brief() State {
	s := State{
		Phase: e.phase, Since: e.since, Started: e.started, Why: e.why, Dead: e.dead, HostUUID: e.uuid,
		AttachTook: e.attachTook, Attaches: e.attaches, Health: e.health(),
		Passes: e.passes, LastPass: e.cost, Writes: e.o.Writes, Golden: e.compared, Healing: e.current,
	}
	if s.HostUUID == "" {
		s.HostUUID = e.o.HostUUID
	}
	return s
}

// health is the overall judgement. e.mu is held.
func (e *Engine) health() Health {
	for _, t := range e.tracked {
		if t.ID != "" {
			return Ill
		}
	}
	if e.phase != Attached {
		return CouldNotTell
	}
	looked := false
	for _, s := range e.status {
		if s.Health != Healthy && !s.Withheld {
			return CouldNotTell
		}
		looked = looked || !s.Withheld
	}
	if !looked {
		return CouldNotTell
	}
	return Healthy
}

// grant returns what the agreement permits on the host that is there. The identity from the configuration and the one that
// the host tells must both be the one of the agreement. e.mu is held.
func (e *Engine) grant() access.Grant {
	ids := []string{e.o.HostUUID, e.uuid}
	if e.uuid == "" || e.o.HostUUID == "" {
		ids = []string{e.o.HostUUID + e.uuid}
	}
	var g access.Grant
	for i, id := range ids {
		if g = e.o.Agreement.Grant(id); i+1 < len(ids) && g.Denied() != nil {
			break
		}
	}
	return g.Resolving(e.names())
}

// Findings returns the open findings, the newest first, and behind them the latest resolved ones, again the newest first.
func (e *Engine) Findings() []detect.Finding {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []detect.Finding
	for _, t := range e.tracked {
		if t.ID != "" {
			out = append(out, t.Finding)
		}
	}
	slices.SortFunc(out, func(a, b detect.Finding) int {
		if c := b.FirstSeen.Compare(a.FirstSeen); c != 0 {
			return c
		}
		return slices.Compare([]byte(a.ID), []byte(b.ID))
	})
	for _, f := range slices.Backward(e.resolved) {
		out = append(out, f)
	}
	return out
}

// Finding returns one finding, open or resolved.
func (e *Engine) Finding(id string) (detect.Finding, bool) {
	for _, f := range e.Findings() {
		if f.ID == id {
			return f, true
		}
	}
	return detect.Finding{}, false
}

// View returns a fresh view of the attached kernel.
func (e *Engine) View(ctx context.Context) (*kernel.View, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.target == nil || e.target.image() == nil {
		return nil, fmt.Errorf("%w: %s", ErrNotAttached, e.why)
	}
	return e.target.image().View(ctx), nil
}

// Power returns the host's power controller, or nil. It asks nobody: operators' requests go through PowerControl.
func (e *Engine) Power() heal.Power { return e.o.Power }
