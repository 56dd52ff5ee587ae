package engine

import (
	"context"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Engine watches one host.
type Engine struct{ o Options }

// New returns an engine that does nothing until Run.
func New(o Options) *Engine { return &Engine{o: o} }

// Run works until ctx ends; it returns earlier only if the options are invalid.
func (e *Engine) Run(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

// State returns a snapshot.
func (e *Engine) State() State { return State{Phase: NoMemory, Health: CouldNotTell} }

// Findings returns the open findings, the newest first, and behind them the latest resolved ones.
func (e *Engine) Findings() []detect.Finding { return nil }

// Finding returns one finding, open or resolved.
func (e *Engine) Finding(id string) (detect.Finding, bool) { return detect.Finding{}, false }

// Heal plans a repair of an open finding and, unless DryRun is set, carries it out. The outcome is nil when nothing was begun.
func (e *Engine) Heal(ctx context.Context, r HealRequest) (heal.Plan, *heal.Outcome, error) {
	return heal.Plan{}, nil, ErrNotAttached
}

// View returns a fresh view of the attached kernel.
func (e *Engine) View(ctx context.Context) (*kernel.View, error) { return nil, ErrNotAttached }

// Power returns the host's power controller, or nil.
func (e *Engine) Power() heal.Power { return e.o.Power }

// Subscribe returns a channel of events from now on. It is closed when ctx ends. A slow reader loses events and sees so by Seq.
func (e *Engine) Subscribe(ctx context.Context) <-chan Event { return nil }
