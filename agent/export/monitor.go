package export

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/remote"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// Dial gets a lease from an agent and returns it with its connected queue pair, which works on pd. Where cq is given, receives
// can be posted on the queue pair at once.
type Dial func(ctx context.Context, pd *roce.PD, cq *roce.CQ, r Request) (*roce.QP, Lease, error)

// monitorQP is what a monitor's queue pairs are like.
func monitorQP(r Request) roce.QPConfig {
	c := roce.QPConfig{PathMTU: r.PathMTU, AckTimeout: 67 * time.Millisecond}
	if r.Kind == KindActions {
		c.RecvDepth, c.RNRRetry = actionDepth, 7
	}
	return c
}

// DialKey connects to the agent at addr through connection management, with tokens of a key. The user in a Request is the key's.
func DialKey(dev *roce.Device, addr netip.Addr, key Key) Dial {
	var mu sync.Mutex
	var skew time.Duration // of the agent's clock; guarded by mu
	return func(ctx context.Context, pd *roce.PD, cq *roce.CQ, r Request) (*roce.QP, Lease, error) {
		for again := false; ; again = true {
			mu.Lock()
			now := time.Now().Add(skew)
			mu.Unlock()
			token := key.token(now, r, dev.Link().LocalAddr().Addr(), addr)
			qp, private, err := dev.Dial(ctx, addr, roce.ServiceTCP(ServicePort), pd, cq, monitorQP(r), token)
			if err == nil {
				l, err := parsePrivate(private)
				if err == nil && l.Kind != r.Kind {
					err = fmt.Errorf("the agent gave a lease of %v, not of %v", l.Kind, r.Kind)
				}
				if err != nil {
					qp.Close()
					return nil, Lease{}, err
				}
				l.User, l.QPN, l.PSN, l.PathMTU = key.User, qp.QPN(), qp.PSN(), qp.PathMTU()
				return qp, l, nil
			}
			var rejected *roce.RejectError
			if !errors.As(err, &rejected) {
				return nil, Lease{}, err
			}
			theirs, why, ok := parseRejection(rejected.Private)
			if !ok {
				return nil, Lease{}, err
			}
			// An agent whose clock is off says so; what it says is of use to nobody without the key.
			off := theirs.Sub(now)
			if !again && off.Abs() > tokenSpan/2 {
				mu.Lock()
				skew += off
				mu.Unlock()
				continue
			}
			return nil, Lease{}, fmt.Errorf("%w: %s: %w", err, why, ErrDenied)
		}
	}
}

// DialLease connects to the agent at addr with leases that ask gets for us by other means, such as Redfish: it is given the
// request with our queue pair in it.
func DialLease(dev *roce.Device, addr netip.Addr, ask func(context.Context, Request) (Lease, error)) Dial {
	return func(ctx context.Context, pd *roce.PD, cq *roce.CQ, r Request) (*roce.QP, Lease, error) {
		qp, err := dev.NewQP(pd, cq, monitorQP(r))
		if err != nil {
			return nil, Lease{}, err
		}
		r.QPN, r.PSN, r.PathMTU, r.Peer = qp.QPN(), qp.PSN(), qp.PathMTU(), dev.Link().LocalAddr().Addr()
		l, err := ask(ctx, r)
		if err == nil && l.PathMTU != r.PathMTU {
			err = fmt.Errorf("the agent's path MTU is %d, ours %d", l.PathMTU, r.PathMTU)
		}
		if err == nil {
			err = qp.Connect(roce.Remote{Addr: addr, QPN: l.QPN, PSN: l.PSN})
		}
		if err != nil {
			qp.Close()
			return nil, Lease{}, err
		}
		return qp, l, nil
	}
}

// OpenMemory opens the host's memory behind an agent. It connects by itself as often as it must, with a fresh lease each time.
func OpenMemory(ctx context.Context, dev *roce.Device, dial Dial, r Request) (*remote.Memory, error) {
	r.Kind = KindMemory
	return remote.Open(ctx, func(ctx context.Context) (remote.Window, error) {
		qp, l, err := dial(ctx, dev.NewPD(), nil, r)
		if err != nil {
			return remote.Window{}, err
		}
		ram, err := readMap(ctx, qp, l)
		if err != nil {
			qp.Close()
			return remote.Window{}, err
		}
		return remote.Window{QP: qp, RKey: l.RKey, Addr: l.Addr, Length: l.Length, RAM: ram, Write: l.Write, Atomic: l.Atomic}, nil
	}, remote.Options{})
}

// readMap reads the RAM map of a lease.
func readMap(ctx context.Context, qp *roce.QP, l Lease) ([]hostmem.Range, error) {
	const most = 1 << 20
	if l.MapLength > most {
		return nil, fmt.Errorf("RAM map of %d bytes", l.MapLength)
	}
	b := make([]byte, l.MapLength)
	if err := qp.Read(ctx, b, 0, l.MapKey); err != nil {
		return nil, fmt.Errorf("read the RAM map: %w", err)
	}
	return ParseRAMMap(b)
}

// Poller reads an agent's health page. It is used by one goroutine at a time.
type Poller struct {
	dev  *roce.Device
	dial Dial
	qp   *roce.QP
	l    Lease
	page [PageSize]byte
}

// NewPoller returns a poller that connects when it is first used, and again when it must.
func NewPoller(dev *roce.Device, dial Dial) *Poller { return &Poller{dev: dev, dial: dial} }

// Close ends the connection.
func (p *Poller) Close() error {
	if p.qp == nil {
		return nil
	}
	defer func() { p.qp = nil }()
	return p.qp.Close()
}

// read reads the first n bytes of the page.
func (p *Poller) read(ctx context.Context, n int) (err error) {
	for again := false; ; again = true {
		if p.qp == nil {
			if p.qp, p.l, err = p.dial(ctx, p.dev.NewPD(), nil, Request{Kind: KindHealth}); err != nil {
				p.qp = nil
				return err
			}
		}
		if err = p.qp.Read(ctx, p.page[:n], p.l.Addr, p.l.RKey); err == nil {
			return nil
		}
		p.Close()
		if again || ctx.Err() != nil {
			return fmt.Errorf("read the health page: %w", err)
		}
	}
}

// Summary reads 8 bytes.
func (p *Poller) Summary(ctx context.Context) (Summary, error) {
	if err := p.read(ctx, 8); err != nil {
		return Summary{}, err
	}
	return ParseSummary(p.page[:8])
}

// Health reads the whole page, again if it was being written.
func (p *Poller) Health(ctx context.Context) (Health, error) {
	for range 10 {
		if err := p.read(ctx, PageSize); err != nil {
			return Health{}, err
		}
		if h, err := ParsePage(p.page[:]); !errors.Is(err, ErrTornPage) {
			return h, err
		}
	}
	return Health{}, ErrTornPage
}

// Actions is a monitor's end of an action queue pair. Its methods are safe for concurrent use.
type Actions struct {
	qp  *roce.QP
	cq  *roce.CQ
	end context.CancelFunc

	slots chan struct{} // as many requests as the agent takes at once

	mu      sync.Mutex
	num     uint32
	waiting map[uint32]chan answer // guarded by mu
	err     error                  // why it ended; guarded by mu
}

// answer is a whole document, or why there is none.
type answer struct {
	typ messageType
	doc []byte
	err error
}

// OpenActions connects an action queue pair.
func OpenActions(ctx context.Context, dev *roce.Device, dial Dial) (*Actions, error) {
	cq := dev.NewCQ()
	qp, _, err := dial(ctx, dev.NewPD(), cq, Request{Kind: KindActions})
	if err != nil {
		return nil, fmt.Errorf("open action queue pair: %w", err)
	}
	a := &Actions{qp: qp, cq: cq, slots: make(chan struct{}, maxRunning), waiting: map[uint32]chan answer{}}
	bufs := make([][]byte, actionDepth)
	for i := range bufs {
		bufs[i] = make([]byte, MaxMessage)
		if err := qp.PostRecv(uint64(i), bufs[i]); err != nil {
			qp.Close()
			return nil, fmt.Errorf("open action queue pair: %w", err)
		}
	}
	ctx, a.end = context.WithCancel(context.Background())
	go func() {
		err := a.receive(ctx, bufs)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.err = err
		for num, ch := range a.waiting {
			ch <- answer{err: err}
			delete(a.waiting, num)
		}
	}()
	return a, nil
}

// Close ends the connection.
func (a *Actions) Close() error {
	a.end()
	return a.qp.Close()
}

func (a *Actions) receive(ctx context.Context, bufs [][]byte) error {
	done := make([]roce.Completion, actionDepth)
	parts := map[uint32][]byte{}
	for {
		n, err := a.cq.Wait(ctx, done)
		if err != nil {
			return err
		}
		for _, c := range done[:n] {
			if c.Err != nil {
				return c.Err
			}
			m, err := parseMessage(bufs[c.ID][:c.Len])
			if err != nil {
				return err
			}
			a.mu.Lock()
			ch := a.waiting[m.num]
			a.mu.Unlock()
			if ch != nil {
				if len(parts[m.num])+len(m.data) > maxResult {
					return fmt.Errorf("%w: an answer of more than %d bytes", errMessage, maxResult)
				}
				doc := append(parts[m.num], m.data...)
				parts[m.num] = doc
				if !m.more {
					delete(parts, m.num)
					if m.typ != typeProgress {
						a.mu.Lock()
						delete(a.waiting, m.num)
						a.mu.Unlock()
					}
					// Progress that nobody reads in time is no loss. The result, which comes last, has a place of its own.
					if m.typ != typeProgress || len(ch) < progressKept {
						ch <- answer{typ: m.typ, doc: bytes.Clone(doc)}
					}
				}
			}
			if err := a.qp.PostRecv(c.ID, bufs[c.ID]); err != nil {
				return err
			}
		}
	}
}

// progressKept is how many progress reports may wait for their reader.
const progressKept = 64

// Do sends a request and waits for its result, which is decoded into result unless that is nil. progress is told how it goes; nil
// tells nobody. A request that the agent refused or that failed there is an *ActionError. If ctx ends during a repair, or while one is taken back, the agent is told to
// break it off and to take back what it stored.
func (a *Actions) Do(ctx context.Context, op string, args, result any, progressed func(text string)) error {
	raw, err := json.Marshal(args)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	if args == nil {
		raw = nil
	}
	doc, err := json.Marshal(request{op, raw})
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	if len(doc) > MaxMessage-messageHead {
		return fmt.Errorf("%s: a request of %d bytes is too long", op, len(doc))
	}
	select {
	case a.slots <- struct{}{}:
		defer func() { <-a.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ch := make(chan answer, progressKept+1)
	a.mu.Lock()
	if a.err != nil {
		defer a.mu.Unlock()
		return fmt.Errorf("%s: %w", op, a.err)
	}
	a.num++
	num := a.num
	a.waiting[num] = ch
	a.mu.Unlock()
	if err := a.qp.Send(ctx, message{typeRequest, false, num, doc}.bytes()); err != nil {
		a.mu.Lock()
		delete(a.waiting, num)
		a.mu.Unlock()
		return fmt.Errorf("%s: send the request: %w", op, err)
	}
	for {
		var got answer
		select {
		case got = <-ch:
		case <-ctx.Done():
			a.mu.Lock()
			delete(a.waiting, num)
			a.num++
			next := a.num
			a.mu.Unlock()
			if op == OpHeal || op == OpUndo {
				a.breakOff(next, num)
			}
			return fmt.Errorf("%s: %w", op, ctx.Err())
		}
		switch {
		case got.err != nil:
			return fmt.Errorf("%s: %w", op, got.err)
		case got.typ == typeProgress:
			var p progress
			if json.Unmarshal(got.doc, &p) == nil && progressed != nil {
				progressed(p.Text)
			}
		case got.typ == typeError:
			e := new(ActionError)
			if err := json.Unmarshal(got.doc, e); err != nil {
				return fmt.Errorf("%s: the agent's error is not understood: %w", op, err)
			}
			return fmt.Errorf("%s: %w", op, e)
		case result == nil:
			return nil
		default:
			if err := json.Unmarshal(got.doc, result); err != nil {
				return fmt.Errorf("%s: the answer is not understood: %w", op, err)
			}
			return nil
		}
	}
}

// breakOff sends a request to break off another, and does not wait for its answer.
func (a *Actions) breakOff(num, of uint32) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	doc := fmt.Sprintf(`{"op":%q,"args":{"number":%d}}`, OpBreakOff, of)
	_ = a.qp.Send(ctx, message{typeRequest, false, num, []byte(doc)}.bytes()) // with the connection goes the repair, too
}
