package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// StoreRequest is a store to the host's memory that an operator asks for by its address, with what is to be there before.
type StoreRequest struct {
	Addr   hostmem.PhysAddr
	Expect heal.Bytes // what must be there
	Put    heal.Bytes // as long as Expect
	Why    string     // for the journal
	Caller string
	Second string // who else has said yes, if the agreement takes two persons
}

// MayLease returns nil if an operator may read a range of the host's memory byte for byte and, if write is set, store there, perhaps
// with a second one's consent: the agreement's rights.memory say where.
func (e *Engine) MayLease(r hostmem.Range, write bool) error {
	if write && !e.o.Writes {
		return ErrWritesOff
	}
	return e.Grant().PermitMemoryByTwo(uint64(r.Start), r.Size, true, write, false)
}

// Store puts bytes into the host's RAM if the expected ones are there. It is a plan like a repair's, of one step: with the
// agreement's right to write there, the intent in the journal before, only within what the host's kernel itself
// calls RAM, compared before and read back behind. 8 aligned bytes are swapped atomically where the path to the host can.
func (e *Engine) Store(ctx context.Context, r StoreRequest) (heal.Outcome, error) {
	if err := e.MayLease(hostmem.Range{Start: r.Addr, Size: uint64(len(r.Put))}, true); err != nil {
		return heal.Outcome{}, fmt.Errorf("store to the host's memory: %w", err)
	}
	select {
	case e.healing <- struct{}{}:
		defer func() { <-e.healing }()
	default:
		return heal.Outcome{}, fmt.Errorf("store to the host's memory: %w", ErrBusy)
	}
	ctx, cancel := context.WithTimeout(ctx, healTimeout)
	defer cancel()
	defer context.AfterFunc(e.running, cancel)()
	e.mu.Lock()
	mem, grant := e.mem, e.grant()
	if e.target == nil || e.target.image() == nil || mem == nil {
		why := e.why
		e.mu.Unlock()
		return heal.Outcome{}, fmt.Errorf("store to the host's memory: %w: %s", ErrNotAttached, why)
	}
	img := e.target.image()
	e.plans++
	kernel := heal.Identify(img.Info())
	p := heal.Plan{
		ID: fmt.Sprintf("plan-%d", e.plans), Action: heal.StoreAction, Title: fmt.Sprintf("Store %d bytes at %v", len(r.Put), r.Addr), Risk: heal.RiskKernel, Second: r.Second,
		Made: time.Now(), Kernel: &kernel, Undo: true,
		Steps: []heal.Step{{Op: heal.OpWrite, Why: r.Why, Object: "what is", Addr: r.Addr, Expect: r.Expect, Put: r.Put, Undo: true}},
	}
	e.mu.Unlock()
	if _, ok := hostmem.AsSwapper(mem); ok && len(r.Put) == 8 && r.Addr%8 == 0 {
		p.Steps[0].Op = heal.OpArm
	}
	o := heal.Options{
		Memory: hostmem.Narrow(mem, img.RAM()), Kernel: img, Grant: grant, Logger: e.log,
		// Nothing is healed: what an operator expects is in the step, and is compared.
		Confirm: func(context.Context, heal.Plan) error { return nil },
	}
	if e.o.Journal != nil {
		o.Journal = e.o.Journal
	}
	caller := r.Caller
	if caller == callerPolicy || caller == "" {
		caller = "operator " + caller
	}
	return heal.NewExecutor(o).Apply(ctx, p, caller)
}
