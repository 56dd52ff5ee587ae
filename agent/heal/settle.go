package heal

import (
	"bytes"
	"context"
	"fmt"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Settle ends a plan that was begun and of which no outcome is known, because the agent that carried it out is gone: what
// the host has not taken yet is withdrawn, what was stored is taken back if the host has not used it, and what it has used is
// swept as far as it has let go of it. It returns what is left. The plan must be for the kernel that is there.
func (x *Executor) Settle(ctx context.Context, p Plan) ([]hostmem.Range, error) {
	select {
	case x.busy <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	done, err := x.settle(ctx, p)
	<-x.busy
	if err != nil || done {
		return nil, err
	}
	return x.Sweep(ctx, p)
}

// settle reports whether nothing of the plan is left in the host's memory.
func (x *Executor) settle(ctx context.Context, p Plan) (bool, error) {
	r := run{x: x, ctx: ctx, p: p, armed: -1, out: Outcome{Plan: p}}
	x.allowed = p.Ranges()
	defer func() { x.allowed = nil }()
	if err := r.permitted(); err != nil {
		return false, err
	}
	if err := r.sameKernel(); err != nil {
		return false, err
	}
	untouched := true // what was laid down for the host is as it was laid down, or not there at all
	var back []int
	for i := range p.Steps {
		s := &p.Steps[i]
		if s.Cleanup || s.Op != OpWrite && s.Op != OpArm {
			continue
		}
		now := make(Bytes, len(s.Put))
		if _, err := x.guard.ReadAt(now, int64(s.Addr)); err != nil {
			return false, err
		}
		put := bytes.Equal(now, s.Put)
		if s.Op == OpArm {
			if put {
				r.armed = i
				if !r.withdraw() {
					return false, fmt.Errorf("withdraw step %d of %s: the host has taken it just now: %w", i, p.ID, ErrNotYet)
				}
			}
			continue
		}
		switch {
		case put:
			back = append(back, i)
		case !between(now, s.Expect, s.Put):
			untouched = false
		case !bytes.Equal(now, s.Expect):
			back = append(back, i) // a store that did not complete
		}
	}
	if !untouched {
		return false, nil
	}
	for k := len(back) - 1; k >= 0; k-- {
		s := &p.Steps[back[k]]
		if !s.Undo && !s.Hold {
			continue
		}
		now := make(Bytes, len(s.Put))
		if _, err := x.guard.ReadAt(now, int64(s.Addr)); err != nil {
			return false, err
		}
		if !between(now, s.Expect, s.Put) {
			return false, nil
		}
		r.record(back[k], now, s.Expect)
		if _, err := x.guard.WriteAt(s.Expect, int64(s.Addr)); err != nil {
			return false, err
		}
	}
	return true, nil
}
