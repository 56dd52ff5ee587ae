package export

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// actions is one connection over which requests come.
type actions struct {
	x  *Exporter
	l  *lease
	cq *roce.CQ

	ctx  context.Context // ends with the connection, and so does what was begun over it
	stop context.CancelFunc

	sending sync.Mutex // over the messages of one document

	mu      sync.Mutex
	running map[uint32]context.CancelFunc // by number; guarded by mu
}

// serveActions posts the receives and serves until the queue pair ends.
func (x *Exporter) serveActions(l *lease, cq *roce.CQ) error {
	a := &actions{x: x, l: l, cq: cq, running: map[uint32]context.CancelFunc{}}
	a.ctx, a.stop = context.WithCancel(context.Background())
	bufs := make([][]byte, actionDepth)
	for i := range bufs {
		bufs[i] = make([]byte, MaxMessage)
		if err := l.qp.PostRecv(uint64(i), bufs[i]); err != nil {
			a.stop()
			return err
		}
	}
	go func() {
		<-l.qp.Done()
		a.stop()
	}()
	go func() {
		defer a.stop()
		if err := a.receive(bufs); err != nil && a.ctx.Err() == nil {
			x.log.Warn("action queue pair", "lease", l.ID, "user", l.User, "err", err)
			x.end(l, 0)
		}
	}()
	return nil
}

func (a *actions) receive(bufs [][]byte) error {
	done := make([]roce.Completion, actionDepth)
	for {
		n, err := a.cq.Wait(a.ctx, done)
		if err != nil {
			return err
		}
		for _, c := range done[:n] {
			if c.Err != nil {
				return c.Err
			}
			buf := bufs[c.ID]
			m, err := parseMessage(buf[:c.Len])
			if err != nil {
				return err
			}
			if m.typ != typeRequest || m.more {
				return fmt.Errorf("%w: a request is one message", errMessage)
			}
			if err := a.take(m.num, bytes.Clone(m.data)); err != nil {
				return err
			}
			if err := a.l.qp.PostRecv(c.ID, buf); err != nil {
				return err
			}
		}
	}
}

// take begins a request. A monitor that asks for more than it may at once loses the connection.
func (a *actions) take(num uint32, doc []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running[num] != nil || len(a.running) >= 2*maxRunning {
		return fmt.Errorf("request %d: that number is in use, or %d requests are under way", num, len(a.running))
	}
	ctx, cancel := context.WithCancel(a.ctx)
	a.running[num] = cancel
	go func() {
		defer func() {
			cancel()
			a.mu.Lock()
			delete(a.running, num)
			a.mu.Unlock()
		}()
		result, err := a.do(ctx, num, doc)
		if err != nil {
			a.fail(num, actionError(err))
			return
		}
		b, err := json.Marshal(result)
		if err == nil && len(b) > maxResult {
			err = fmt.Errorf("the answer has %d bytes, more than %d", len(b), maxResult)
		}
		if err != nil {
			a.fail(num, actionError(err))
			return
		}
		a.send(typeResult, num, b)
	}()
	return nil
}

// do carries a request out and keeps the audit trail.
func (a *actions) do(ctx context.Context, num uint32, doc []byte) (result any, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	var r request
	if err := strict(doc, &r); err != nil {
		return nil, err
	}
	op, ok := operations[r.Op]
	if !ok {
		return nil, &ActionError{"invalid", fmt.Sprintf("there is no operation %q", r.Op)}
	}
	if op.changes {
		defer func() {
			a.x.o.Audit(Audit{Time: time.Now(), User: a.l.User, Peer: a.l.Peer.String(), What: r.Op, Change: map[string]any{"args": string(r.Args), "lease": a.l.ID}, Err: err})
		}()
	}
	if err := a.x.o.Authorize(a.l.User, op.right); err != nil {
		return nil, err
	}
	return op.do(ctx, a, num, r.Args)
}

// operation is one of the operations.
type operation struct {
	right   Right
	changes bool // it goes into the audit trail
	do      func(ctx context.Context, a *actions, num uint32, args json.RawMessage) (any, error)
}

var operations = map[string]operation{
	OpState: {RightWatch, false, func(_ context.Context, a *actions, _ uint32, _ json.RawMessage) (any, error) {
		return a.x.o.Host.State(), nil
	}},
	OpFindings: {RightWatch, false, func(_ context.Context, a *actions, _ uint32, _ json.RawMessage) (any, error) {
		return Findings(a.x.o.Host.Findings()), nil
	}},
	OpJournal: {RightWatch, false, func(_ context.Context, a *actions, _ uint32, args json.RawMessage) (any, error) {
		var r JournalRequest
		if err := strict(args, &r); err != nil {
			return nil, err
		}
		return a.x.records(a.l.User, r)
	}},
	OpHeal: {RightHeal, true, func(ctx context.Context, a *actions, num uint32, args json.RawMessage) (any, error) {
		var r HealRequest
		if err := strict(args, &r); err != nil {
			return nil, err
		}
		return a.carryOut(ctx, num, r.Finding, r.DryRun, func(ctx context.Context) (heal.Plan, *heal.Outcome, error) {
			return a.x.o.Host.Heal(ctx, engine.HealRequest{Finding: r.Finding, Action: r.Action, Value: r.Value, DryRun: r.DryRun, Agreed: agreed(r.Plan), Caller: a.l.User})
		})
	}},
	OpUndo: {RightHeal, true, func(ctx context.Context, a *actions, num uint32, args json.RawMessage) (any, error) {
		var r UndoRequest
		if err := strict(args, &r); err != nil {
			return nil, err
		}
		return a.carryOut(ctx, num, r.Finding, r.DryRun, func(ctx context.Context) (heal.Plan, *heal.Outcome, error) {
			return a.x.o.Host.Undo(ctx, engine.UndoRequest{Finding: r.Finding, DryRun: r.DryRun, Agreed: agreed(r.Plan), Caller: a.l.User})
		})
	}},
	OpBreakOff: {RightHeal, true, func(_ context.Context, a *actions, _ uint32, args json.RawMessage) (any, error) {
		var r BreakOffRequest
		if err := strict(args, &r); err != nil {
			return nil, err
		}
		a.mu.Lock()
		cancel := a.running[r.Number]
		a.mu.Unlock()
		if cancel == nil {
			return nil, &ActionError{"not-found", fmt.Sprintf("request %d of this connection is not under way", r.Number)}
		}
		cancel()
		return struct{}{}, nil
	}},
	OpRestore: {RightStore, true, func(ctx context.Context, a *actions, num uint32, args json.RawMessage) (any, error) {
		var r RestoreRequest
		if err := strict(args, &r); err != nil {
			return nil, err
		}
		return a.restore(ctx, num, r.Record)
	}},
	OpPower: {RightPower, true, func(ctx context.Context, a *actions, num uint32, args json.RawMessage) (any, error) {
		var r PowerRequest
		if err := strict(args, &r); err != nil {
			return nil, err
		}
		a.report(num, "the host's power controller is asked")
		return struct{}{}, a.x.o.Host.PowerControl(ctx, r.Op, a.l.User)
	}},
}

// agreed returns the digest of a plan that somebody has agreed to, or nothing without one.
func agreed(p *heal.Plan) string {
	if p == nil {
		return ""
	}
	return p.Digest()
}

// carryOut has something planned for a finding or, unless dry is set, done.
func (a *actions) carryOut(ctx context.Context, num uint32, finding string, dry bool, do func(context.Context) (heal.Plan, *heal.Outcome, error)) (any, error) {
	if !dry {
		a.report(num, "the finding is looked at again, and a plan is made")
		defer a.follow(ctx, num, finding)()
	}
	plan, out, err := do(ctx)
	reply := HealReply{Outcome: out}
	if plan.ID != "" {
		reply.Plan = &plan
	}
	if err != nil && out == nil {
		return nil, err
	}
	return reply, nil // the outcome says what went wrong
}

// restore takes back a store.
func (a *actions) restore(ctx context.Context, num uint32, seq uint64) (any, error) {
	if a.x.o.Journal == nil {
		return nil, &ActionError{"not-found", "this agent has no journal"}
	}
	for rec, err := range a.x.o.Journal.From(seq) {
		if err != nil || rec.Seq != seq || rec.Kind != RecordStore {
			break
		}
		var s stored
		if err := json.Unmarshal(rec.Data, &s); err != nil || len(s.Old) != len(s.New) || len(s.New) == 0 {
			return nil, &ActionError{"failed", fmt.Sprintf("record %d is damaged: %v", seq, err)}
		}
		a.report(num, fmt.Sprintf("%d bytes at %v are compared and put back", len(s.Old), s.Addr))
		return a.x.o.Host.Store(ctx, engine.StoreRequest{
			Addr: s.Addr, Expect: heal.Bytes(s.New), Put: heal.Bytes(s.Old), Caller: a.l.User,
			Why: fmt.Sprintf("take back what record %d says that %s stored under lease %s", seq, s.User, s.Lease),
		})
	}
	return nil, &ActionError{"not-found", fmt.Sprintf("record %d of the journal is none of a store by RDMA, or is not there any more", seq)}
}

// follow reports what the engine says of a finding until the returned function is called.
func (a *actions) follow(ctx context.Context, num uint32, finding string) func() {
	ctx, stop := context.WithCancel(ctx)
	events, done := a.x.o.Host.Subscribe(ctx), make(chan struct{})
	go func() {
		defer close(done)
		for e := range events { // what came before the end is still told
			if e.Finding != nil && e.Finding.ID == finding {
				a.report(num, fmt.Sprintf("%s: %s", e.Type, e.Text))
			}
		}
	}()
	return func() { stop(); <-done }
}

// records reads the journal.
func (x *Exporter) records(user string, r JournalRequest) (JournalReply, error) {
	j := x.o.Journal
	if j == nil {
		return JournalReply{}, &ActionError{"not-found", "this agent has no journal"}
	}
	const most, mostBytes = 500, maxResult / 2
	if r.Max <= 0 || r.Max > most {
		r.Max = most
	}
	out := JournalReply{Restart: j.Restart(), Records: []journal.Record{}}
	out.Head, out.Hash = j.Head()
	x.mu.Lock()
	x.acked[user] = max(x.acked[user], min(r.Have, out.Head))
	out.Have = x.acked[user]
	x.mu.Unlock()
	size := 0
	for rec, err := range j.From(r.From) {
		if err != nil {
			continue // its number is missing
		}
		size += len(rec.Data)
		if len(out.Records) == r.Max || size > mostBytes && len(out.Records) > 0 {
			break
		}
		out.Records = append(out.Records, rec)
	}
	return out, nil
}

// report tells the monitor how a request goes.
func (a *actions) report(num uint32, text string) {
	if b, err := json.Marshal(progress{time.Now(), text}); err == nil {
		a.send(typeProgress, num, b)
	}
}

func (a *actions) fail(num uint32, e *ActionError) {
	if b, err := json.Marshal(e); err == nil {
		a.send(typeError, num, b)
	}
}

func (a *actions) send(typ messageType, num uint32, doc []byte) {
	a.sending.Lock()
	defer a.sending.Unlock()
	for _, m := range split(typ, num, doc) {
		if err := a.l.qp.Send(a.ctx, m.bytes()); err != nil {
			return // the connection has ended, and the monitor knows no more than that
		}
	}
}

// strict decodes a document without unknown members.
func strict(doc []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(doc))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return &ActionError{"invalid", fmt.Sprintf("the request is not understood: %v", err)}
	}
	return nil
}

// actionError gives an error its code.
func actionError(err error) *ActionError {
	var e *ActionError
	if errors.As(err, &e) {
		return e
	}
	code := "failed"
	for _, c := range []struct {
		is   error
		code string
	}{
		{ErrDenied, "denied"}, {access.ErrDenied, "denied"}, {engine.ErrWritesOff, "denied"}, {heal.ErrProtected, "denied"},
		{engine.ErrNoFinding, "not-found"}, {engine.ErrNoUndo, "not-found"}, {engine.ErrBusy, "busy"}, {engine.ErrNotAttached, "not-attached"},
		{heal.ErrStale, "stale"}, {heal.ErrMismatch, "stale"}, {heal.ErrGone, "stale"}, {kernel.ErrNotSupported, "invalid"}, {heal.ErrValue, "invalid"},
	} {
		if errors.Is(err, c.is) {
			code = c.code
			break
		}
	}
	return &ActionError{code, err.Error()}
}
