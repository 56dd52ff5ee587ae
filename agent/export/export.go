// Package export is what remote monitors reach by RDMA: windows onto the host's memory, the health page, the journal and the
// orders that are otherwise given over Redfish, for the day on which only the RDMA network still answers.
//
// Everything is a Lease: one connection, for one user, from one address, for a time. Each has its own protection domain, key,
// queue pair and packet numbers, all random. There are three kinds:
//
//   - KindMemory: the host's physical memory. A remote address is a host physical address. What the host's kernel does not call
//     RAM is refused: device registers and the agent's own memory have no address here. It can be read; where the access
//     agreement names a range for that (rights.memory), it can be stored to and swapped in, through a hostmem.Guard and with the
//     old and the new bytes in the journal before the store.
//   - KindHealth: the health page (see PageVersion), polled by one READ of 8 to 4096 bytes.
//   - KindActions: requests and answers by SEND (see Request): state, findings, the journal, repairs, power.
//
// A lease is had in two ways. Over Redfish, where the caller is logged in (Exporter.Lease), or through the InfiniBand connection
// manager with a token in the private data of the request, that a key proves (see Key); whether keys may reach the host's memory
// is a matter of policy (Options.MemoryByKey). Nothing else is answered but by refusals.
//
// A lease ends when its time is over, when it is revoked, when its user or the agreement loses the right to it, when its peer
// disconnects or is not heard of for a while: from that moment on each packet is refused with a remote access error.
//
// DESIGN.md has what protects all this, with the tests that show it. None of it is encrypted or proof against somebody on the path: run it inside a tunnel where the path is not trusted, and let
// Options.Closed refuse all leases outside.
package export

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// Host is what is exported. *engine.Engine has it.
type Host interface {
	HostMemory() (mem hostmem.Memory, known bool, err error)
	Grant() access.Grant
	WritesOn() error
	State() engine.State
	Brief() engine.State
	Findings() []detect.Finding
	Heartbeat() kernel.Heartbeat
	Heal(context.Context, engine.HealRequest) (heal.Plan, *heal.Outcome, error)
	Undo(context.Context, engine.UndoRequest) (heal.Plan, *heal.Outcome, error)
	PowerControl(ctx context.Context, op, caller string) error
	Store(context.Context, engine.StoreRequest) (heal.Outcome, error)
	Subscribe(context.Context) <-chan engine.Event
}

// Journal is the agent's journal. *journal.Journal has it.
type Journal interface {
	Write(kind string, v any) (uint64, error)
	From(seq uint64) iter.Seq2[journal.Record, error]
	Head() (seq uint64, hash string)
	Restart() uint64
}

var (
	_ Host    = (*engine.Engine)(nil)
	_ Journal = (*journal.Journal)(nil)
)

// Right is what a user must have for something.
type Right string

// The rights.
const (
	RightWatch  Right = "watch"  // the health page, state, findings, the journal
	RightMemory Right = "memory" // read the host's memory
	RightStore  Right = "store"  // store to it
	RightHeal   Right = "heal"   // repairs
	RightPower  Right = "power"  // the host's power
)

// Event is something that operators should know.
type Event struct {
	What   string // "dropped" or "refused"
	Text   string
	Packet uint64 // how many packets since the event before
}

// Audit says who did what, or tried to, over RDMA.
type Audit struct {
	Time   time.Time
	User   string // empty if nobody proved who it is
	Peer   string // address
	What   string // "lease", "revoke", "heal", …
	Change map[string]any
	Err    error
}

// Options are what an Exporter works with. Device, Host and Authorize are required.
type Options struct {
	Device *roce.Device
	Host   Host
	// Journal takes leases, stores and what was refused. Without one nothing can be stored to.
	Journal Journal
	// Authorize returns nil if the user has the right now. It is asked at each lease and request, and again while they last.
	Authorize func(user string, r Right) error
	// Audit keeps the audit trail; nil keeps none.
	Audit func(Audit)
	// Keys are those that tokens may be made with.
	Keys []Key
	// MemoryByKey lets keys reach the host's memory without Redfish.
	MemoryByKey bool
	// Closed, if not nil, is why nobody gets a lease at the device's address, such as a policy that wants an encrypted path. It
	// should wrap ErrDenied. Who asks with a good token, or over Redfish, is told.
	Closed error
	// Alarm is told when packets are dropped or refused; nil tells nobody.
	Alarm func(Event)
	// MaxLifetime bounds leases; default an hour.
	MaxLifetime time.Duration
	// Idle is how long a peer may be silent before its lease ends; default two minutes.
	Idle   time.Duration
	Logger *slog.Logger
}

// Limits of what one user and all together may hold.
const (
	maxUserLeases = 16
	maxLeases     = 256
	// maxStored bounds the bytes that can be stored through one lease: each has its record, and the journal must not be flooded.
	maxStored = 64 << 10

	defaultLifetime = 10 * time.Minute
	// grace is how long a lease that has ended still refuses, so that the peer learns of it.
	grace = 5 * time.Second

	pageEvery  = 100 * time.Millisecond
	sweepEvery = 500 * time.Millisecond
	alarmEvery = 10 * time.Second
)

// ErrDenied means that a user may not have what was asked for. Refusals by the agreement wrap access.ErrDenied as well.
var ErrDenied = errors.New("not permitted")

// ErrNoLease means that there is no such lease.
var ErrNoLease = errors.New("no such lease")

// Exporter hands out leases and serves them. Its methods are safe for concurrent use.
type Exporter struct {
	o       Options
	log     *slog.Logger
	page    *roce.Buffer
	restart uint64
	tokens  *tokens

	mu      sync.Mutex
	leases  map[string]*lease // by ID; guarded by mu
	acked   map[string]uint64 // by user, the newest journal record that it has; guarded by mu
	health  Health            // as it was written last; guarded by mu
	encoded []byte            // it as a page; guarded by mu
	counted map[string]uint64 // packets, when alarms were last thought of; guarded by mu
	alarmed time.Time         // when one was raised; guarded by mu
	wrote   Writes            // guarded by mu
}

// Writes counts stores by peers.
type Writes struct {
	Stores  uint64 `json:"stores"`
	Swaps   uint64 `json:"swaps"`
	Bytes   uint64 `json:"bytes"`
	Refused uint64 `json:"refused"`
}

// New returns an exporter that serves nobody until Run.
func New(o Options) *Exporter {
	if o.MaxLifetime <= 0 {
		o.MaxLifetime = time.Hour
	}
	if o.Idle <= 0 {
		o.Idle = 2 * time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Audit == nil {
		o.Audit = func(Audit) {}
	}
	var b [8]byte
	rand.Read(b[:])
	x := &Exporter{
		o: o, log: o.Logger, page: roce.NewBuffer(PageSize), restart: binary.LittleEndian.Uint64(b[:]),
		leases: map[string]*lease{}, acked: map[string]uint64{}, tokens: newTokens(o.Keys),
	}
	x.writePage()
	return x
}

// Run drives the device and serves until ctx ends, whose error it returns, or the device fails. Then all leases are over.
func (x *Exporter) Run(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	l, err := x.o.Device.Listen(roce.ServiceTCP(ServicePort))
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer x.endAll()
	defer l.Close()
	part := func(f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil {
				stop(err)
			}
		})
	}
	part(x.o.Device.Run)
	part(func(ctx context.Context) error { return x.accept(ctx, l) })
	part(x.watch)
	<-ctx.Done()
	return context.Cause(ctx)
}

// watch keeps the page fresh, ends what must end and raises alarms.
func (x *Exporter) watch(ctx context.Context) error {
	page, sweep := time.NewTicker(pageEvery), time.NewTicker(sweepEvery)
	defer page.Stop()
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-page.C:
			x.writePage()
		case <-sweep.C:
			x.sweep(time.Now())
			x.alarm(time.Now())
		}
	}
}

// writePage writes the health page from what the engine says now.
func (x *Exporter) writePage() {
	s, beat := x.o.Host.Brief(), x.o.Host.Heartbeat()
	h := Health{Restart: x.restart, Written: time.Now(), Passes: s.Passes, Took: s.LastPass.Took}
	h.Phase = Phase(max(0, slices.Index(phases[:], string(s.Phase))))
	for _, f := range x.o.Host.Findings() {
		if f.Resolved != nil || f.ID == "" {
			continue
		}
		h.Open = append(h.Open, FindingHealth{f.Severity == detect.Critical, f.Confidence, f.FirstSeen, f.ID, f.Title})
		h.Confidence = max(h.Confidence, f.Confidence)
	}
	h.Findings = uint8(min(len(h.Open), 255))
	switch s.Health {
	case engine.Healthy:
		h.Verdict, h.Confidence = Healthy, 1
	case engine.Ill:
		h.Verdict = Ill
	default:
		h.Confidence = 0
	}
	if s.Phase == engine.Attached {
		h.Moved = beat.At
		for _, c := range beat.CPUs {
			h.CPUs = append(h.CPUs, CPUHealth{uint32(c.ID), c.Online, c.Idle, c.Switches + c.IRQs + c.TimerIRQs})
		}
	}
	for flag, on := range map[uint32]bool{FlagDead: s.Dead, FlagWrites: s.Writes, FlagHealing: s.Healing != ""} {
		if on {
			h.Flags |= flag
		}
	}
	if x.o.Journal != nil {
		h.Journal, _ = x.o.Journal.Head()
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	h.Sequence, h.Beat = x.health.Sequence+1, x.health.Beat+1
	x.health = h
	x.encoded = h.append(x.encoded[:0])
	store(x.page, x.encoded)
}

// Stats are what was served and refused.
type Stats struct {
	Leases  int               `json:"leases"`
	Writes  Writes            `json:"writes"`
	Dropped uint64            `json:"dropped"` // packets, for whatever reason but that they came twice
	Refused uint64            `json:"refused"` // requests, for want of a right
	Packets map[string]uint64 `json:"packets"` // by the names of roce.Counters and roce.LinkCounters
}

// Stats returns the counts since the start.
func (x *Exporter) Stats() Stats {
	s := Stats{Packets: x.packets()}
	s.Dropped, _ = risen(dropped, nil, s.Packets)
	s.Refused, _ = risen(refused, nil, s.Packets)
	x.mu.Lock()
	defer x.mu.Unlock()
	s.Leases, s.Writes = len(x.leases), x.wrote
	return s
}

// packets returns the counters of the device and of its link by name.
func (x *Exporter) packets() map[string]uint64 {
	m := map[string]uint64{}
	for name, n := range x.o.Device.Counters().All() {
		m[name] = n
	}
	if l, ok := x.o.Device.Link().(interface{ Counters() roce.LinkCounters }); ok {
		c := l.Counters()
		m["BadICRC"], m["BadLength"], m["SendErrors"], m["Overflow"] = c.BadICRC, c.BadLength, c.SendErrors, c.Overflow
	}
	return m
}

// The counters of what is dropped and of what is refused. Missing are those that count what a network with loss does by itself:
// repeated and reordered packets, and answers that come twice.
var (
	dropped = []string{
		"BadICRC", "BadLength", "Overflow", "Malformed", "UnknownQPN", "WrongSource", "BadPKey", "BadState", "UnknownDuplicate", "BadResponse",
		"CMMalformed", "CMUnmatched", "CMDropped",
	}
	refused = []string{"BadKey", "BadBounds", "BadRights", "Revoked", "NAKInvalid", "NAKOperation", "ConnectionsRefused"}
)

// risen returns by how much some counters have risen together since they were was, and which.
func risen(names []string, was, is map[string]uint64) (n uint64, which string) {
	var b strings.Builder
	for _, name := range names {
		if d := is[name] - was[name]; d > 0 {
			n += d
			fmt.Fprintf(&b, " %s=%d", name, d)
		}
	}
	return n, strings.TrimPrefix(b.String(), " ")
}

// alarm tells operators when packets were dropped or refused, at most every alarmEvery.
func (x *Exporter) alarm(now time.Time) {
	is := x.packets()
	x.mu.Lock()
	was := x.counted
	if x.o.Alarm == nil || now.Sub(x.alarmed) < alarmEvery {
		x.mu.Unlock()
		return
	}
	x.counted = is
	drops, whichDrops := risen(dropped, was, is)
	refusals, whichRefusals := risen(refused, was, is)
	if drops+refusals > 0 {
		x.alarmed = now
	}
	x.mu.Unlock()
	if drops > 0 {
		x.o.Alarm(Event{"dropped", fmt.Sprintf("%d RDMA packets were dropped: %s", drops, whichDrops), drops})
	}
	if refusals > 0 {
		x.o.Alarm(Event{"refused", fmt.Sprintf("%d RDMA requests were refused: %s", refusals, whichRefusals), refusals})
	}
}
