package export

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

var (
	monitorAddr = netip.MustParseAddr("10.0.0.1")
	agentAddr   = netip.MustParseAddr("10.0.0.2")
)

const hostUUID = "6f1e5c1e-0001-4a6b-9d7a-0123456789ab"

// fakeHost is a host whose memory is a RAM file.
type fakeHost struct {
	mem       *hostmem.RAMFile
	path      string
	known     atomic.Bool
	gone      atomic.Bool
	noWrites  atomic.Bool
	mu        sync.Mutex
	agreement *access.Agreement // guarded by mu
	names     access.Resolver   // guarded by mu
	findings  []detect.Finding
	healed    chan engine.HealRequest
	block     chan struct{} // a repair waits for it or for its context
	broken    atomic.Int64  // repairs that were broken off
	repaired  bool          // guarded by mu; by Heal, and not taken back since
	powered   atomic.Int64
}

func (h *fakeHost) HostMemory() (hostmem.Memory, bool, error) {
	if h.gone.Load() {
		return nil, false, engine.ErrNoMemory
	}
	return h.mem, h.known.Load(), nil
}

func (h *fakeHost) Grant() access.Grant {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.agreement.Grant(hostUUID, time.Now).Resolving(h.names)
}

func (h *fakeHost) agree(change func(*access.Agreement)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	a := *h.agreement
	change(&a)
	h.agreement = &a
}

func (h *fakeHost) WritesOn() error {
	if h.noWrites.Load() {
		return engine.ErrWritesOff
	}
	return nil
}

func (h *fakeHost) State() engine.State {
	return engine.State{Phase: engine.Attached, Health: engine.Ill, Passes: 7, Writes: true, LastPass: engine.PassCost{Took: time.Millisecond}}
}
func (h *fakeHost) Brief() engine.State        { return h.State() }
func (h *fakeHost) Findings() []detect.Finding { return h.findings }
func (h *fakeHost) Heartbeat() kernel.Heartbeat {
	return kernel.Heartbeat{At: time.Unix(1700000000, 0), CPUs: []kernel.CPU{{ID: 0, Online: true, Switches: 5, IRQs: 6, TimerIRQs: 7}, {ID: 1, Idle: true}}}
}

func (h *fakeHost) Heal(ctx context.Context, r engine.HealRequest) (heal.Plan, *heal.Outcome, error) {
	if r.Finding != "runaway-process-1" {
		return heal.Plan{}, nil, fmt.Errorf("finding %q: %w", r.Finding, engine.ErrNoFinding)
	}
	p := heal.Plan{ID: "plan-1", Action: "kill-process", Finding: r.Finding, Title: "kill spin (412)", Target: &heal.Target{PID: 412}, Value: r.Value}
	if err := p.Agreed(r.Agreed); err != nil || r.DryRun {
		return p, nil, err
	}
	h.healed <- r
	select {
	case <-h.block:
	case <-ctx.Done():
		h.broken.Add(1)
		return p, &heal.Outcome{Plan: p, Undone: true, Error: ctx.Err().Error()}, ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.repaired = true
	return p, &heal.Outcome{Plan: p, Verified: true, Caller: r.Caller}, nil
}

// Undo takes back what Heal has done, once.
func (h *fakeHost) Undo(ctx context.Context, r engine.UndoRequest) (heal.Plan, *heal.Outcome, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.repaired || r.Finding != "runaway-process-1" {
		return heal.Plan{}, nil, fmt.Errorf("take back the repair of %s: %w", r.Finding, engine.ErrNoUndo)
	}
	p := heal.Plan{ID: "plan-2", Action: "continue-process", Finding: r.Finding, Title: "continue spin (412)", Target: &heal.Target{PID: 412}}
	if err := p.Agreed(r.Agreed); err != nil || r.DryRun {
		return p, nil, err
	}
	h.repaired = false
	return p, &heal.Outcome{Plan: p, Verified: true, Caller: r.Caller}, nil
}

func (h *fakeHost) Subscribe(ctx context.Context) <-chan engine.Event {
	ch := make(chan engine.Event, 2)
	ch <- engine.Event{Type: engine.EventPlanned, Text: "plan-9", Finding: &detect.Finding{ID: "another-9"}}
	ch <- engine.Event{Type: engine.EventPlanned, Text: "plan-1: kill spin", Finding: &detect.Finding{ID: "runaway-process-1"}}
	context.AfterFunc(ctx, func() { close(ch) })
	return ch
}

// Store does what the engine does, without its rules.
func (h *fakeHost) Store(_ context.Context, r engine.StoreRequest) (heal.Outcome, error) {
	got := make([]byte, len(r.Expect))
	if _, err := h.mem.ReadAt(got, int64(r.Addr)); err != nil {
		return heal.Outcome{}, err
	}
	if !bytes.Equal(got, r.Expect) {
		return heal.Outcome{}, fmt.Errorf("%v: %w", r.Addr, heal.ErrMismatch)
	}
	_, err := h.mem.WriteAt(r.Put, int64(r.Addr))
	return heal.Outcome{Verified: true, Caller: r.Caller}, err
}

func (h *fakeHost) PowerControl(_ context.Context, op, _ string) error {
	if op != "cycle" {
		return fmt.Errorf("power %s: %w", op, kernel.ErrNotSupported)
	}
	h.powered.Add(1)
	return nil
}

// rig is an agent and a monitor at the two ends of a network.
type rig struct {
	t       *testing.T
	host    *fakeHost
	x       *Exporter
	journal *journal.Journal
	jdev    *memDevice
	monitor *roce.Device
	rights  map[string][]Right
	rightMu sync.Mutex
	audit   chan Audit
	alarms  chan Event
	key     Key
}

// memDevice is a journal's device in memory that may refuse to be written to.
type memDevice struct {
	mu   sync.Mutex
	b    []byte
	full bool
}

func (d *memDevice) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(p, d.b[off:]), nil
}

func (d *memDevice) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.full {
		return 0, errors.New("the disk is full")
	}
	return copy(d.b[off:], p), nil
}
func (d *memDevice) Sync() error { return nil }

func newRig(t *testing.T, change func(*Options, *fakeHost)) *rig {
	t.Helper()
	layout, size := hostmemtest.Layout(hostmemtest.Map())
	path := filepath.Join(t.TempDir(), "ram")
	if err := os.WriteFile(path, hostmemtest.File(layout, size), 0o600); err != nil {
		t.Fatal(err)
	}
	mem, err := hostmem.OpenRAMFile(path, layout, true)
	if err != nil {
		t.Fatal(err)
	}
	owner := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)).Public().(ed25519.PublicKey)
	r := &rig{
		t: t, audit: make(chan Audit, 1000), alarms: make(chan Event, 100), jdev: &memDevice{b: make([]byte, 1<<20)},
		rights: map[string][]Right{"ops": {RightWatch, RightMemory, RightStore, RightHeal, RightPower}, "reader": {RightWatch, RightMemory}, "guest": {RightWatch}},
		host: &fakeHost{
			mem: mem, path: path, healed: make(chan engine.HealRequest, 10), block: make(chan struct{}),
			findings: []detect.Finding{{ID: "runaway-process-1", Title: "spin eats a CPU", Severity: detect.Critical, Confidence: 0.9, FirstSeen: time.Unix(1700000001, 0)}},
			agreement: &access.Agreement{
				ID: "test", Host: access.Host{UUID: hostUUID}, Owner: access.Party{Name: "owner", Key: access.Key(owner)},
				Rights: access.Rights{Read: true, Write: true}, ValidFrom: time.Now().Add(-time.Hour), ValidUntil: time.Now().Add(time.Hour),
			},
		},
	}
	r.host.known.Store(true)
	if r.key, err = ParseKey("ops", "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="); err != nil {
		t.Fatal(err)
	}
	if r.journal, err = journal.Open(r.jdev, int64(len(r.jdev.b))); err != nil {
		t.Fatal(err)
	}
	la, lb := roce.NewPipe(netip.AddrPortFrom(monitorAddr, 4791), netip.AddrPortFrom(agentAddr, 4791), 4096, roce.Faults{})
	if r.monitor, err = roce.Open(la, roce.Config{}); err != nil {
		t.Fatal(err)
	}
	dev, err := roce.Open(lb, roce.Config{})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		Device: dev, Host: r.host, Journal: r.journal, Keys: []Key{r.key},
		Authorize: func(user string, right Right) error {
			r.rightMu.Lock()
			defer r.rightMu.Unlock()
			if !slices.Contains(r.rights[user], right) {
				return fmt.Errorf("%s has no right to %s: %w", user, right, ErrDenied)
			}
			return nil
		},
		Audit: func(a Audit) { r.audit <- a },
		Alarm: func(e Event) { r.alarms <- e },
	}
	if change != nil {
		change(&o, r.host)
	}
	r.x = New(o)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- r.x.Run(ctx) }()
	go func() { done <- r.monitor.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		<-done
		<-done
		r.monitor.Close()
		dev.Close()
		mem.Close()
	})
	return r
}

// lease is a Dial over what a Redfish service would do for a user.
func (r *rig) lease(user string) Dial {
	return DialLease(r.monitor, agentAddr, func(_ context.Context, q Request) (Lease, error) {
		q.User = user
		return r.x.Lease(q)
	})
}

func (r *rig) dial(d Dial, q Request) (*roce.QP, Lease) {
	r.t.Helper()
	qp, l, err := d(r.t.Context(), r.monitor.NewPD(), nil, q)
	if err != nil {
		r.t.Fatal(err)
	}
	return qp, l
}

func isAccessError(err error) bool {
	var nak *roce.NAKError
	return errors.As(err, &nak) && nak.Syndrome == roce.NAKRemoteAccess
}

func (r *rig) records(kind string) (out []journal.Record) {
	for rec, err := range r.journal.Records() {
		if err == nil && rec.Kind == kind {
			out = append(out, rec)
		}
	}
	return out
}

func TestMemoryIsConform(t *testing.T) {
	hostmemtest.Run(t, func(t *testing.T) (hostmem.Memory, hostmemtest.Truth) {
		r := newRig(t, nil)
		m, err := OpenMemory(t.Context(), r.monitor, r.lease("ops"), Request{})
		if err != nil {
			t.Fatal(err)
		}
		return m, hostmemtest.Truth{Map: hostmemtest.Map()}
	})
}

func TestHolesRefuse(t *testing.T) {
	r := newRig(t, nil)
	for _, va := range []uint64{0, 0xff8, 0x4000, 0x4ff8, 0x10000, 1<<32 - 8, 0xfee00000} {
		qp, l := r.dial(r.lease("ops"), Request{Kind: KindMemory})
		if err := qp.Read(t.Context(), make([]byte, 8), va, l.RKey); !isAccessError(err) {
			t.Errorf("READ of %#x, which is not RAM: %v; want a remote access error", va, err)
		}
		qp.Close()
	}
	// From RAM into a hole: what was read before does not make it right.
	qp, l := r.dial(r.lease("ops"), Request{Kind: KindMemory})
	if err := qp.Read(t.Context(), make([]byte, 8192), 0x3000, l.RKey); !isAccessError(err) {
		t.Errorf("READ from RAM into a hole: %v; want a remote access error", err)
	}
}

func TestLeasesAreApart(t *testing.T) {
	r := newRig(t, nil)
	qp1, l1 := r.dial(r.lease("ops"), Request{Kind: KindMemory, Start: 0x1000, Length: 0x1000})
	_, l2 := r.dial(r.lease("ops"), Request{Kind: KindMemory, Start: 0x8000, Length: 0x1000})
	if l1.RKey == l2.RKey || l1.QPN == l2.QPN || l1.PSN == l2.PSN || l1.ID == l2.ID {
		t.Errorf("two leases are alike: %+v, %+v", l1, l2)
	}
	if err := qp1.Read(t.Context(), make([]byte, 8), 0x1000, l1.RKey); err != nil {
		t.Fatal(err)
	}
	if err := qp1.Read(t.Context(), make([]byte, 8), 0x8000, l2.RKey); !isAccessError(err) {
		t.Errorf("READ with another lease's key: %v; want a remote access error", err)
	}
	qp3, l3 := r.dial(r.lease("ops"), Request{Kind: KindMemory, Start: 0x1000, Length: 0x1000})
	if err := qp3.Read(t.Context(), make([]byte, 16), 0x1ff8, l3.RKey); !isAccessError(err) {
		t.Errorf("READ beyond the window, of RAM: %v; want a remote access error", err)
	}
	qp4, l4 := r.dial(r.lease("ops"), Request{Kind: KindMemory, Start: 0x1000, Length: 0x1000})
	if err := qp4.Write(t.Context(), make([]byte, 8), 0x1000, l4.RKey); !isAccessError(err) {
		t.Errorf("WRITE through a lease to read: %v; want a remote access error", err)
	}
}

// place is a Resolver for which everything is one range, until it moves.
type place struct{ start, size atomic.Uint64 }

func (p *place) Inside(_ access.Memory, start, size uint64, _ bool, _ func(int, bool, uint32, string) error) error {
	if start < p.start.Load() || start+size > p.start.Load()+p.size.Load() {
		return errors.New("it is elsewhere")
	}
	return nil
}

// What is given by a name is judged anew at each READ, WRITE and atomic, and not only when the lease is given.
func TestNamedMemoryIsJudgedAtEachUse(t *testing.T) {
	r := newRig(t, nil)
	p := new(place)
	p.start.Store(0x8000)
	p.size.Store(0x2000)
	r.host.mu.Lock()
	r.host.names = p
	r.host.mu.Unlock()
	r.host.agree(func(a *access.Agreement) {
		a.Rights.Memory = []access.Memory{{Symbol: "something", Read: true, Write: true, Atomic: true}}
	})
	ask := Request{Kind: KindMemory, Start: 0x8000, Length: 0x2000, Write: true, Atomic: true}
	if _, l, err := r.lease("ops")(t.Context(), r.monitor.NewPD(), nil, Request{Kind: KindMemory, Start: 0x8000, Length: 0x2001}); err == nil {
		t.Errorf("one byte more than the name has: lease %+v", l)
	}
	<-r.audit
	for name, use := range map[string]func(qp *roce.QP, l Lease) error{
		"READ":  func(qp *roce.QP, l Lease) error { return qp.Read(t.Context(), make([]byte, 64), 0x8000, l.RKey) },
		"WRITE": func(qp *roce.QP, l Lease) error { return qp.Write(t.Context(), make([]byte, 64), 0x8000, l.RKey) },
		"FETCH_ADD": func(qp *roce.QP, l Lease) error {
			_, err := qp.FetchAdd(t.Context(), 0x8000, l.RKey, 1)
			return err
		},
	} {
		p.start.Store(0x8000)
		qp, l := r.dial(r.lease("ops"), ask)
		if err := use(qp, l); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		p.start.Store(0x8008)
		if err := use(qp, l); !isAccessError(err) {
			t.Errorf("%s where the name no longer is: %v; want a remote access error", name, err)
		}
	}
}

func TestStoresNeedTheAgreement(t *testing.T) {
	grants := []access.Memory{{Start: 0x8000, Size: 0x2000, Read: true, Write: true, Atomic: true}}
	give := func(a *access.Agreement) { a.Rights.Memory = grants }
	ask := Request{Kind: KindMemory, Start: 0x8000, Length: 0x2000, Write: true, Atomic: true}
	for _, c := range []struct {
		name string
		set  func(*rig)
		q    Request
		user string
	}{
		{"no range given", func(*rig) {}, ask, "ops"},
		{"beyond the range", func(r *rig) { r.host.agree(give) }, Request{Kind: KindMemory, Start: 0x8000, Length: 0x2008, Write: true}, "ops"},
		{"no right to write", func(r *rig) { r.host.agree(func(a *access.Agreement) { give(a); a.Rights.Write = false }) }, ask, "ops"},
		{"no right to read", func(r *rig) { r.host.agree(func(a *access.Agreement) { a.Rights.Read = false }) }, Request{Kind: KindMemory}, "ops"},
		{"writes off", func(r *rig) { r.host.agree(give); r.host.noWrites.Store(true) }, ask, "ops"},
		{"RAM not known", func(r *rig) { r.host.agree(give); r.host.known.Store(false) }, ask, "ops"},
		{"agreement over", func(r *rig) { r.host.agree(func(a *access.Agreement) { a.ValidUntil = time.Now().Add(-time.Second) }) }, Request{Kind: KindMemory}, "ops"},
		{"user without the right", func(*rig) {}, Request{Kind: KindMemory}, "guest"},
		{"user without the right to store", func(r *rig) { r.host.agree(give) }, ask, "reader"},
		{"nobody", func(*rig) {}, Request{Kind: KindMemory}, ""},
		{"no such kind", func(*rig) {}, Request{Kind: 9}, "ops"},
		{"behind RAM", func(*rig) {}, Request{Kind: KindMemory, Start: 1 << 40}, "ops"},
		{"length that overflows", func(*rig) {}, Request{Kind: KindMemory, Start: 0x1000, Length: ^uint64(0)}, "ops"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, nil)
			c.set(r)
			if _, l, err := r.lease(c.user)(t.Context(), r.monitor.NewPD(), nil, c.q); err == nil {
				t.Errorf("lease %+v was given", l)
			}
			if a := <-r.audit; a.Err == nil || a.User != c.user || a.What != "lease" {
				t.Errorf("audit trail: %+v", a)
			}
			if n := len(r.x.Leases()); n != 0 {
				t.Errorf("%d leases are left", n)
			}
		})
	}

	r := newRig(t, nil)
	r.host.agree(give)
	qp, l := r.dial(r.lease("ops"), ask)
	was, put := make([]byte, 5000), bytes.Repeat([]byte{0xa5}, 5000)
	hostmemtest.Fill(was, 0x8100)
	if err := qp.Write(t.Context(), put, 0x8100, l.RKey); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5000)
	if err := qp.Read(t.Context(), got, 0x8100, l.RKey); err != nil || !bytes.Equal(got, put) {
		t.Fatalf("what was stored reads % .8x…, %v", got, err)
	}
	var old, new []byte
	for _, rec := range r.records("rdma-store") {
		var s stored
		if err := json.Unmarshal(rec.Data, &s); err != nil || s.Lease != l.ID || s.User != "ops" || s.Peer != monitorAddr.String() || s.Op != "write" || s.Addr != hostmem.PhysAddr(0x8100+len(old)) {
			t.Fatalf("record %s: %v", rec.Data, err)
		}
		old, new = append(old, s.Old...), append(new, s.New...)
	}
	if !bytes.Equal(old, was) || !bytes.Equal(new, put) {
		t.Errorf("the journal has % .8x… → % .8x…; want % .8x… → % .8x…", old, new, was, put)
	}
	word := make([]byte, 8)
	hostmemtest.Fill(word, 0x8000)
	want := binary.LittleEndian.Uint64(word)
	if prev, err := qp.CompareAndSwap(t.Context(), 0x8000, l.RKey, want, 42); err != nil || prev != want {
		t.Fatalf("CompareAndSwap = %#x, %v; want %#x", prev, err, want)
	}
	if prev, err := qp.FetchAdd(t.Context(), 0x8000, l.RKey, 8); err != nil || prev != 42 {
		t.Fatalf("FetchAdd = %d, %v; want 42", prev, err)
	}
	if n := len(r.records("rdma-store")); n != 4 {
		t.Errorf("%d records of stores; want 4", n)
	}

	// Without its record nothing is stored.
	r.jdev.mu.Lock()
	r.jdev.full = true
	r.jdev.mu.Unlock()
	if err := qp.Write(t.Context(), make([]byte, 8), 0x8000, l.RKey); err == nil {
		t.Error("WRITE without a journal = nil")
	}
	if r.host.mem.ReadAt(word, 0x8000); binary.LittleEndian.Uint64(word) != 50 {
		t.Errorf("the word is % x after a store that could not be journalled", word)
	}
	r.jdev.mu.Lock()
	r.jdev.full = false
	r.jdev.mu.Unlock()

	// The journal is not to be flooded.
	qp, l = r.dial(r.lease("ops"), ask)
	var err error
	n := 0
	for ; err == nil && n < 100; n++ {
		err = qp.Write(t.Context(), make([]byte, 4096), 0x8000, l.RKey)
	}
	if !isAccessError(err) || n != maxStored/4096+1 {
		t.Errorf("store %d of 4096 bytes: %v; want a remote access error at %d", n, err, maxStored/4096+1)
	}
	// What the agreement stops giving stops at once, for stores.
	qp, l = r.dial(r.lease("ops"), ask)
	r.host.agree(func(a *access.Agreement) { a.Rights.Write = false })
	if err := qp.Write(t.Context(), make([]byte, 8), 0x8000, l.RKey); !isAccessError(err) {
		t.Errorf("WRITE after the right to it was taken: %v; want a remote access error", err)
	}
}

// bigRead keeps reading until an error comes.
func bigRead(ctx context.Context, qp *roce.QP, l Lease, began chan<- struct{}) error {
	buf := make([]byte, 40*hostmem.PageSize)
	begin := sync.OnceFunc(func() { close(began) })
	defer begin()
	for {
		if err := qp.Read(ctx, buf, 1<<32, l.RKey); err != nil {
			return err
		}
		begin()
	}
}

func TestLeaseEnds(t *testing.T) {
	for _, c := range []struct {
		name     string
		lifetime time.Duration
		end      func(*rig, Lease)
	}{
		{"revoked", 0, func(r *rig, l Lease) {
			if err := r.x.Revoke(l.ID, "ops"); err != nil {
				r.t.Error(err)
			}
		}},
		{"expired", time.Second, func(*rig, Lease) {}},
		{"user lost the right", 0, func(r *rig, _ Lease) {
			r.rightMu.Lock()
			defer r.rightMu.Unlock()
			delete(r.rights, "ops")
		}},
		{"agreement lost the right", 0, func(r *rig, _ Lease) { r.host.agree(func(a *access.Agreement) { a.Rights.Read = false }) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, nil)
			qp, l := r.dial(r.lease("ops"), Request{Kind: KindMemory, Lifetime: c.lifetime})
			began, done := make(chan struct{}), make(chan error, 1)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			go func() { done <- bigRead(ctx, qp, l, began) }()
			<-began
			c.end(r, l)
			if err := <-done; !isAccessError(err) {
				t.Errorf("transfer of a lease that ended: %v; want a remote access error", err)
			}
		})
	}
}

func TestRevokeKnowsItsLeases(t *testing.T) {
	r := newRig(t, nil)
	if err := r.x.Revoke("ffffffffffffffff", "ops"); !errors.Is(err, ErrNoLease) {
		t.Errorf("Revoke(no lease) = %v", err)
	}
	qp, l := r.dial(r.lease("ops"), Request{Kind: KindHealth})
	if got := r.x.Leases(); len(got) != 1 || got[0].ID != l.ID {
		t.Errorf("Leases() = %+v", got)
	}
	qp.Close() // made without connection management, so only the revocation tells the agent
	if err := r.x.Revoke(l.ID, "ops"); err != nil || len(r.x.Leases()) != 0 {
		t.Errorf("Revoke = %v, and %d are left", err, len(r.x.Leases()))
	}
}

func TestUserHasNotTooMany(t *testing.T) {
	r := newRig(t, nil)
	var err error
	n := 0
	for ; err == nil && n < 100; n++ {
		_, _, err = r.lease("ops")(t.Context(), r.monitor.NewPD(), nil, Request{Kind: KindHealth})
	}
	if !errors.Is(err, roce.ErrLimit) || n != maxUserLeases+1 {
		t.Errorf("lease %d: %v; want the limit at %d", n, err, maxUserLeases+1)
	}
	r.dial(r.lease("guest"), Request{Kind: KindHealth})
}

func TestKeys(t *testing.T) {
	r := newRig(t, nil)
	qp, l := r.dial(DialKey(r.monitor, agentAddr, r.key), Request{Kind: KindHealth})
	page := make([]byte, PageSize)
	if err := qp.Read(t.Context(), page, l.Addr, l.RKey); err != nil || l.User != "ops" {
		t.Fatalf("health page by key: %v, lease %+v", err, l)
	}
	if _, err := ParsePage(page); err != nil {
		t.Error(err)
	}
	if a := <-r.audit; a.User != "ops" || a.Err != nil || a.Peer != monitorAddr.String() {
		t.Errorf("audit trail: %+v", a)
	}
	if _, _, err := DialKey(r.monitor, agentAddr, r.key)(t.Context(), r.monitor.NewPD(), nil, Request{Kind: KindMemory}); err == nil || !strings.Contains(err.Error(), "leases over Redfish only") {
		t.Errorf("memory by key without the policy for it: %v", err)
	}
	wrong := Key{User: "ops", Secret: [KeySize]byte{1}}
	_, _, err := DialKey(r.monitor, agentAddr, wrong)(t.Context(), r.monitor.NewPD(), nil, Request{Kind: KindHealth})
	if !errors.Is(err, ErrDenied) {
		t.Errorf("unknown key: %v", err)
	}
	// Plain connection requests, as of any verbs client, get nothing.
	var rejected *roce.RejectError
	if _, _, err := r.monitor.Dial(t.Context(), agentAddr, roce.ServiceTCP(ServicePort), r.monitor.NewPD(), nil, roce.QPConfig{}, nil); !errors.As(err, &rejected) {
		t.Errorf("connection without a token: %v; want a rejection", err)
	}
	qp.Close()

	r = newRig(t, func(o *Options, _ *fakeHost) { o.MemoryByKey = true })
	m, err := OpenMemory(t.Context(), r.monitor, DialKey(r.monitor, agentAddr, r.key), Request{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	got, want := make([]byte, 100), make([]byte, 100)
	hostmemtest.Fill(want, 0x1000)
	if _, err := m.ReadAt(got, 0x1000); err != nil || !bytes.Equal(got, want) || !slices.Equal(m.Map(), hostmemtest.Map()) {
		t.Errorf("memory by key: %v, % .8x…, map %v", err, got, m.Map())
	}
}

func TestTokens(t *testing.T) {
	key := Key{"ops", [KeySize]byte{1, 2, 3}}
	now := time.Unix(1700000000, 0)
	q := Request{Kind: KindMemory, Start: 0x1000, Length: 0x2000, Atomic: true}
	good := key.token(now, q, monitorAddr, agentAddr)
	if len(good) != tokenLen || len(good) > roce.MaxREQPrivate {
		t.Fatalf("a token of %d bytes", len(good))
	}
	ts := newTokens([]Key{key})
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if r, err := ts.check(now, bad, monitorAddr, agentAddr); err == nil {
			t.Errorf("token with byte %d changed asks for %+v", i, r)
		}
	}
	for _, c := range []struct {
		name           string
		at             time.Time
		monitor, agent netip.Addr
	}{
		{"old", now.Add(tokenSpan + 1), monitorAddr, agentAddr},
		{"of the future", now.Add(-tokenSpan - 1), monitorAddr, agentAddr},
		{"from another monitor", now, agentAddr, agentAddr},
		{"for another agent", now, monitorAddr, monitorAddr},
	} {
		if _, err := ts.check(c.at, good, c.monitor, c.agent); err == nil {
			t.Errorf("a token %s is taken", c.name)
		}
	}
	want := q
	want.User = "ops"
	if got, err := ts.check(now, good, monitorAddr, agentAddr); err != nil || got != want {
		t.Errorf("good token = %+v, %v; want %+v", got, err, want)
	}
	if _, err := ts.check(now.Add(time.Minute), good, monitorAddr, agentAddr); err == nil {
		t.Error("a token is taken twice")
	}
}

// A monitor whose clock is far off learns the time from the refusal.
func TestClocksApart(t *testing.T) {
	now := time.Now()
	b := rejection(now, strings.Repeat("ä", 200))
	at, why, ok := parseRejection(b)
	if len(b) != roce.MaxREJPrivate || !ok || !at.Equal(now) || why != strings.Repeat("ä", 68) {
		t.Errorf("rejection of %d bytes: %v, %q, %v", len(b), at, why, ok)
	}
}

func TestHealthPage(t *testing.T) {
	r := newRig(t, nil)
	p := NewPoller(r.monitor, DialKey(r.monitor, agentAddr, r.key))
	defer p.Close()
	s, err := p.Summary(t.Context())
	if err != nil || s.Verdict != Ill || s.Phase != Attached || s.Findings != 1 {
		t.Errorf("summary %+v, %v", s, err)
	}
	h, err := p.Health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if h.Passes != 7 || h.Confidence != 0.9 || h.Flags != FlagWrites || h.Restart != r.x.restart || !h.Moved.Equal(time.Unix(1700000000, 0)) ||
		len(h.CPUs) != 2 || h.CPUs[0] != (CPUHealth{0, true, false, 18}) || h.CPUs[1] != (CPUHealth{1, false, true, 0}) ||
		len(h.Open) != 1 || h.Open[0].ID != "runaway-process-1" || !h.Open[0].Critical {
		t.Errorf("health %+v", h)
	}
	for h.Beat == s.Beat { // it beats
		if s, err = p.Summary(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s.Beat != h.Beat {
			break
		}
	}
	r.x.Revoke(p.l.ID, "ops")
	if _, err := p.Health(t.Context()); err != nil {
		t.Errorf("after a revocation, by a lease of its own: %v", err)
	}
}

// Whenever the writer stops, and wherever the reader is when it goes on: sequences that are alike mean that all between them is of
// one page. Both go step by step here, for chance seldom finds the places that matter.
func TestSequencesTellTornPages(t *testing.T) {
	const words = PageSize / 8
	var order []int
	for off := range stores {
		order = append(order, off/8)
	}
	if len(order) != words {
		t.Fatalf("a page is stored in %d words", len(order))
	}
	at := make([]int, words) // when a word is stored
	for i, w := range order {
		at[w] = i
	}
	// The writer has stored first words when the reader begins, and second when the reader has read as many as at.
	alike := 0
	for _, first := range []int{0, 1, 2, 3, words / 2, words - 3, words - 2, words - 1, words} {
		for _, second := range []int{0, 1, 2, 3, words / 2, words - 3, words - 2, words - 1, words} {
			for pause := 0; second >= first && pause <= words; pause++ {
				isNew := func(w int) bool {
					if w < pause {
						return at[w] < first
					}
					return at[w] < second
				}
				begin, end := isNew(offSequence/8), isNew(offEnd/8)
				if begin != end {
					continue
				}
				alike++
				for w := offSequence / 8; w < words; w++ {
					if isNew(w) != begin {
						t.Fatalf("%d words stored, at word %d then %d: the sequences are alike, and word %d is of the other page", first, pause, second, w)
					}
				}
			}
		}
	}
	if alike < 1000 {
		t.Errorf("%d cases with sequences alike", alike)
	}
}

// A page that is read while it is written is of one piece, or is seen not to be.
func TestPageIsNeverTorn(t *testing.T) {
	buf := roce.NewBuffer(PageSize)
	write := func(n uint64) {
		h := Health{Summary: Summary{Beat: uint32(n)}, Sequence: n, Passes: n, Journal: n}
		for i := range maxCPUs {
			h.CPUs = append(h.CPUs, CPUHealth{ID: uint32(i), Progress: n})
		}
		store(buf, h.append(nil))
	}
	write(1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := uint64(2); ; n++ {
			select {
			case <-stop:
				return
			default:
				write(n)
			}
		}
	})
	b := make([]byte, PageSize)
	whole, unequal := 0, 0
	for range 20000 {
		for off := int64(0); off < PageSize; off += 1024 { // as packets of that path MTU leave
			buf.ReadAt(b[off:][:1024], off)
		}
		le := binary.LittleEndian
		if le.Uint64(b[offSequence:]) != le.Uint64(b[offEnd:]) {
			unequal++
			continue
		}
		// The sequences alone must have found what is behind them torn; the summary before them is covered by the CRC.
		for i := range maxCPUs {
			if le.Uint64(b[offCPUTable+i*cpuEntry+8:]) != le.Uint64(b[offSequence:]) {
				t.Fatalf("sequence %d, and CPU %d is of %d", le.Uint64(b[offSequence:]), i, le.Uint64(b[offCPUTable+i*cpuEntry+8:]))
			}
		}
		if h, err := ParsePage(b); err == nil {
			whole++
			if uint64(h.Beat) != h.Sequence {
				t.Fatalf("beat %d, sequence %d", h.Beat, h.Sequence)
			}
		}
	}
	close(stop)
	wg.Wait()
	t.Logf("%d pages of one piece, %d seen as torn", whole, unequal)
}

func TestActions(t *testing.T) {
	r := newRig(t, nil)
	for name, dial := range map[string]Dial{"lease": r.lease("ops"), "key": DialKey(r.monitor, agentAddr, r.key)} {
		t.Run(name, func(t *testing.T) {
			a, err := OpenActions(t.Context(), r.monitor, dial)
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			var st engine.State
			if err := a.Do(ctx, OpState, nil, &st, nil); err != nil || st.Passes != 7 {
				t.Errorf("state %+v, %v", st, err)
			}
			var fs Findings
			if err := a.Do(ctx, OpFindings, nil, &fs, nil); err != nil || len(fs) != 1 || fs[0].ID != "runaway-process-1" {
				t.Errorf("findings %+v, %v", fs, err)
			}
			var h HealReply
			if err := a.Do(ctx, OpHeal, HealRequest{Finding: "runaway-process-1", DryRun: true}, &h, nil); err != nil || h.Plan == nil || h.Outcome != nil {
				t.Errorf("dry run %+v, %v", h, err)
			}
			var told []string
			go func() { r.host.block <- struct{}{} }()
			if err := a.Do(ctx, OpHeal, HealRequest{Finding: "runaway-process-1", Plan: h.Plan}, &h, func(s string) { told = append(told, s) }); err != nil || h.Outcome == nil || !h.Outcome.Verified || !slices.Contains(told, "planned: plan-1: kill spin") || slices.Contains(told, "planned: plan-9") {
				t.Errorf("heal %+v, %v, progress %q", h, err, told)
			}
			if q := <-r.host.healed; q.Caller != "ops" {
				t.Errorf("healed for %q", q.Caller)
			}
			// What was done is taken back, if it is what was agreed to, and once.
			var back HealReply
			var e *ActionError
			undo := UndoRequest{Finding: "runaway-process-1", DryRun: true}
			if err := a.Do(ctx, OpUndo, undo, &back, nil); err != nil || back.Plan == nil || back.Plan.Action != "continue-process" || back.Outcome != nil {
				t.Errorf("dry run of taking back: %+v, %v", back, err)
			}
			if err := a.Do(ctx, OpUndo, UndoRequest{Finding: "runaway-process-1", Plan: Agreed(*h.Plan)}, nil, nil); !errors.As(err, &e) || e.Code != "stale" {
				t.Errorf("taking back by another plan: %v", err)
			}
			undo.DryRun, undo.Plan = false, Agreed(*back.Plan)
			if err := a.Do(ctx, OpUndo, undo, &back, nil); err != nil || back.Outcome == nil || !back.Outcome.Verified || back.Outcome.Caller != "ops" {
				t.Errorf("taking back: %+v, %v", back, err)
			}
			if err := a.Do(ctx, OpUndo, undo, nil, nil); !errors.As(err, &e) || e.Code != "not-found" {
				t.Errorf("taking back once more: %v", err)
			}
			other := *h.Plan
			other.Target = &heal.Target{PID: 413}
			if err := a.Do(ctx, OpHeal, HealRequest{Finding: "runaway-process-1", Plan: &other}, nil, nil); !errors.As(err, &e) || e.Code != "stale" {
				t.Errorf("heal with another plan: %v", err)
			}
			// A value goes with the request, and is part of what was agreed to.
			value := &heal.Value{Name: "memory.max", Number: 512 << 20}
			if err := a.Do(ctx, OpHeal, HealRequest{Finding: "runaway-process-1", Value: value, DryRun: true}, &h, nil); err != nil || h.Plan.Value == nil || *h.Plan.Value != *value {
				t.Errorf("dry run with a value: %+v, %v", h.Plan, err)
			}
			more := &heal.Value{Name: "memory.max", Number: 513 << 20}
			if err := a.Do(ctx, OpHeal, HealRequest{Finding: "runaway-process-1", Value: more, Plan: Agreed(*h.Plan)}, nil, nil); !errors.As(err, &e) || e.Code != "stale" {
				t.Errorf("heal with another value than was agreed to: %v", err)
			}
			go func() { r.host.block <- struct{}{} }()
			if err := a.Do(ctx, OpHeal, HealRequest{Finding: "runaway-process-1", Value: value, Plan: Agreed(*h.Plan)}, &h, nil); err != nil {
				t.Errorf("heal with a value: %v", err)
			} else if q := <-r.host.healed; q.Value == nil || *q.Value != *value {
				t.Errorf("asked for with %v", q.Value)
			}
			for _, args := range []string{`{"finding": "runaway-process-1", "value": {"name": "memory.max", "number": "512M"}}`, `{"finding": "runaway-process-1", "value": "memory.max=1"}`, `{"finding": "runaway-process-1", "value": {"name": "x", "text": "/bin/sh"}}`} {
				if err := a.Do(ctx, OpHeal, json.RawMessage(args), nil, nil); !errors.As(err, &e) || e.Code != "invalid" {
					t.Errorf("%s: %v", args, err)
				}
			}
			if err := a.Do(ctx, OpPower, PowerRequest{"cycle"}, nil, nil); err != nil {
				t.Error(err)
			}
			for _, c := range []struct {
				op   string
				args any
				code string
			}{
				{OpPower, PowerRequest{"dance"}, "invalid"}, {OpHeal, HealRequest{Finding: "none-1"}, "not-found"}, {"sing", nil, "invalid"},
				{OpHeal, map[string]int{"finding": 3}, "invalid"}, {OpHeal, map[string]string{"colour": "red"}, "invalid"}, {OpBreakOff, BreakOffRequest{99999}, "not-found"}, {OpUndo, UndoRequest{Finding: "none-1"}, "not-found"},
			} {
				if err := a.Do(ctx, c.op, c.args, nil, nil); !errors.As(err, &e) || e.Code != c.code {
					t.Errorf("%s %v: %v; want code %q", c.op, c.args, err, c.code)
				}
			}
			// Who gives up has the repair broken off.
			short, give := context.WithCancel(ctx)
			broken := r.host.broken.Load()
			go func() { <-r.host.healed; give() }()
			if err := a.Do(short, OpHeal, HealRequest{Finding: "runaway-process-1"}, nil, nil); !errors.Is(err, context.Canceled) {
				t.Errorf("heal that was given up: %v", err)
			}
			for r.host.broken.Load() == broken {
				if ctx.Err() != nil {
					t.Fatal("the repair was not broken off")
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	var what []string
	for len(r.audit) > 0 {
		a := <-r.audit
		what = append(what, a.What)
		if a.User != "ops" || a.Peer != monitorAddr.String() {
			t.Errorf("audit trail: %+v", a)
		}
	}
	for _, w := range []string{"lease", OpHeal, OpPower, OpUndo, OpBreakOff} {
		if !slices.Contains(what, w) {
			t.Errorf("the audit trail has %v, and no %s", what, w)
		}
	}
}

// What peers stored by WRITE and by an atomic operation is put back, if it is still there, for who may store.
func TestRestore(t *testing.T) {
	r := newRig(t, nil)
	r.host.agree(func(a *access.Agreement) {
		a.Rights.Memory = []access.Memory{{Start: 0x8000, Size: 0x2000, Read: true, Write: true, Atomic: true}}
	})
	qp, l := r.dial(r.lease("ops"), Request{Kind: KindMemory, Start: 0x8000, Length: 0x2000, Write: true, Atomic: true})
	before, now := make([]byte, 0x40), make([]byte, 0x40)
	if err := qp.Read(t.Context(), before, 0x8000, l.RKey); err != nil {
		t.Fatal(err)
	}
	word := binary.LittleEndian.Uint64(before[0x20:])
	if _, err := qp.CompareAndSwap(t.Context(), 0x8020, l.RKey, word, ^word); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(qp.Write(t.Context(), []byte("one"), 0x8001, l.RKey), qp.Write(t.Context(), []byte("two"), 0x8001, l.RKey)); err != nil {
		t.Fatal(err)
	}
	var seqs []uint64
	for _, rec := range r.records(RecordStore) {
		seqs = append(seqs, rec.Seq)
	}
	if len(seqs) != 3 {
		t.Fatalf("%d records of 3 stores", len(seqs))
	}
	a, err := OpenActions(t.Context(), r.monitor, r.lease("ops"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for _, c := range []struct {
		record uint64
		code   string // of the error; empty: done
	}{{seqs[1], "stale"}, {seqs[2], ""}, {seqs[1], ""}, {seqs[1], "stale"}, {seqs[0], ""}, {seqs[2] + 1, "not-found"}, {1 << 60, "not-found"}} {
		var o heal.Outcome
		var e *ActionError
		err := a.Do(t.Context(), OpRestore, RestoreRequest{c.record}, &o, nil)
		if c.code == "" && (err != nil || o.Caller != "ops") || c.code != "" && (!errors.As(err, &e) || e.Code != c.code) {
			t.Errorf("restore %d: %+v, %v; want code %q", c.record, o, err, c.code)
		}
	}
	if err := qp.Read(t.Context(), now, 0x8000, l.RKey); err != nil || !bytes.Equal(now, before) {
		t.Errorf("memory is % x, %v; was % x", now, err, before)
	}
	b, err := OpenActions(t.Context(), r.monitor, r.lease("reader"))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var e *ActionError
	if err := b.Do(t.Context(), OpRestore, RestoreRequest{seqs[0]}, nil, nil); !errors.As(err, &e) || e.Code != "denied" {
		t.Errorf("restore by who may not store: %v", err)
	}
}

// Where policy wants another path, nobody gets a lease of any kind, and who has proved who it is is told why.
func TestClosed(t *testing.T) {
	r := newRig(t, func(o *Options, _ *fakeHost) {
		o.MemoryByKey, o.Closed = true, fmt.Errorf("through the tunnel only: %w", ErrDenied)
	})
	for _, kind := range []Kind{KindMemory, KindHealth, KindActions} {
		for name, dial := range map[string]Dial{"lease": r.lease("ops"), "key": DialKey(r.monitor, agentAddr, r.key)} {
			if _, _, err := dial(t.Context(), r.monitor.NewPD(), r.monitor.NewCQ(), Request{Kind: kind}); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "through the tunnel only") {
				t.Errorf("%v by %s: %v", kind, name, err)
			}
		}
	}
	var rejected *roce.RejectError
	if _, _, err := r.monitor.Dial(t.Context(), agentAddr, roce.ServiceTCP(ServicePort), r.monitor.NewPD(), nil, roce.QPConfig{}, nil); !errors.As(err, &rejected) || strings.Contains(string(rejected.Private), "tunnel") {
		t.Errorf("without a token: %v, %q", err, rejected.Private)
	}
	if n := len(r.x.Leases()); n != 0 {
		t.Errorf("%d leases", n)
	}
}

func TestActionsNeedRights(t *testing.T) {
	r := newRig(t, nil)
	a, err := OpenActions(t.Context(), r.monitor, r.lease("guest"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	var e *ActionError
	for op, args := range map[string]any{OpHeal: HealRequest{Finding: "runaway-process-1"}, OpPower: PowerRequest{"cycle"}, OpUndo: UndoRequest{Finding: "runaway-process-1"}, OpBreakOff: BreakOffRequest{1}} {
		if err := a.Do(t.Context(), op, args, nil, nil); !errors.As(err, &e) || e.Code != "denied" {
			t.Errorf("%s by a guest: %v; want it denied", op, err)
		}
	}
	if n := r.host.powered.Load(); n != 0 || len(r.host.healed) != 0 {
		t.Errorf("a guest has done something")
	}
	if err := a.Do(t.Context(), OpFindings, nil, nil, nil); err != nil {
		t.Error(err)
	}
}

func TestJournalByAcknowledgedNumber(t *testing.T) {
	r := newRig(t, nil)
	for i := range 1200 {
		if _, err := r.journal.Write("note", map[string]any{"n": i, "text": strings.Repeat("x", 100)}); err != nil {
			t.Fatal(err)
		}
	}
	a, err := OpenActions(t.Context(), r.monitor, r.lease("guest"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	head, hash := r.journal.Head()
	var have, n uint64
	for have < head {
		var got JournalReply
		if err := a.Do(t.Context(), OpJournal, JournalRequest{From: have + 1, Have: have}, &got, nil); err != nil {
			t.Fatal(err)
		}
		if got.Have != have || got.Head != head || got.Hash != hash || got.Restart != r.journal.Restart() || len(got.Records) == 0 {
			t.Fatalf("from %d: have %d, head %d, %d records", have+1, got.Have, got.Head, len(got.Records))
		}
		for _, rec := range got.Records {
			if rec.Seq <= have {
				t.Fatalf("record %d after %d", rec.Seq, have)
			}
			have = rec.Seq
			n++
		}
	}
	if n != 1200 {
		t.Errorf("%d records; want 1200", n)
	}
}

// Garbage ends the connection and nothing else.
func TestActionsRefuseGarbage(t *testing.T) {
	r := newRig(t, nil)
	for _, b := range [][]byte{{1}, {1, 9, 0, 0, 0, 0, 0, 0}, {2, 1, 0, 0, 0, 0, 0, 0}, {1, 1, 1, 0, 0, 0, 0, 0}, bytes.Repeat([]byte{1}, MaxMessage)} {
		qp, _ := r.dial(r.lease("ops"), Request{Kind: KindActions})
		_ = qp.Send(t.Context(), b)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		for len(r.x.Leases()) > 0 && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		if ctx.Err() != nil {
			t.Errorf("% .8x…: the lease goes on", b)
		}
		cancel()
		qp.Close()
	}
}

// While the host stores to its memory, what is read has no torn word, and no packet has a wrong ICRC.
func TestMovingHost(t *testing.T) {
	r := newRig(t, nil)
	layout, _ := hostmemtest.Layout(hostmemtest.Map())
	other, err := hostmem.OpenRAMFile(r.host.path, layout, true)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	const words = 4 * hostmem.PageSize / 8
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		w := make([]byte, 8)
		for n := uint32(0); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			for i := range words {
				binary.LittleEndian.PutUint32(w, n)
				binary.LittleEndian.PutUint32(w[4:], ^n)
				other.WriteAt(w, 1<<32+int64(i)*8)
			}
		}
	})
	qp, l := r.dial(r.lease("ops"), Request{Kind: KindMemory})
	first := make([]byte, 8)
	for binary.LittleEndian.Uint32(first) != ^binary.LittleEndian.Uint32(first[4:]) {
		other.ReadAt(first, 1<<32+(words-1)*8)
	}
	buf := make([]byte, words*8)
	changed := 0
	var last uint32
	for range 300 {
		if err := qp.Read(t.Context(), buf, 1<<32, l.RKey); err != nil {
			t.Fatal(err)
		}
		for i := range words {
			lo, hi := binary.LittleEndian.Uint32(buf[i*8:]), binary.LittleEndian.Uint32(buf[i*8+4:])
			if lo != ^hi {
				t.Fatalf("word %d is torn: %#x %#x", i, lo, hi)
			}
			if lo != last {
				changed, last = changed+1, lo
			}
		}
	}
	close(stop)
	wg.Wait()
	if changed < 10 {
		t.Errorf("the memory hardly moved: %d changes seen", changed)
	}
	for _, dev := range []*roce.Device{r.monitor, r.x.o.Device} {
		if c := dev.Link().(interface{ Counters() roce.LinkCounters }).Counters(); c.BadICRC != 0 {
			t.Errorf("%d packets with a wrong ICRC", c.BadICRC)
		}
	}
}

func TestAlarm(t *testing.T) {
	r := newRig(t, nil)
	qp, l := r.dial(r.lease("ops"), Request{Kind: KindMemory})
	qp.Read(t.Context(), make([]byte, 8), 0x1000, l.RKey+1)
	select {
	case e := <-r.alarms:
		if e.What != "refused" || e.Packet != 1 || !strings.Contains(e.Text, "BadKey=1") {
			t.Errorf("alarm %+v", e)
		}
	case <-time.After(20 * time.Second):
		t.Error("no alarm after a wrong key")
	}
	if s := r.x.Stats(); s.Packets["BadKey"] != 1 || s.Packets["NAKAccess"] != 1 {
		t.Errorf("stats %+v", s)
	}
}

// The path to memory may come and go under a lease.
func TestPathLost(t *testing.T) {
	r := newRig(t, nil)
	m, err := OpenMemory(t.Context(), r.monitor, r.lease("ops"), Request{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	r.host.gone.Store(true)
	if _, err := m.ReadAt(make([]byte, 8), 0x1000); err == nil {
		t.Error("read while the path is lost = nil")
	}
	r.host.gone.Store(false)
	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, err = m.ReadAt(make([]byte, 8), 0x1000); err == nil || time.Now().After(deadline) {
			break
		}
		time.Sleep(10 * time.Millisecond) // it tries again once a second
	}
	if err != nil {
		t.Errorf("read after the path came back: %v", err)
	}
}
