package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/heal"
)

// Control lets do, an order of an operator to the host's service processor that is no power operation (what to boot from, which
// media to insert), happen under the rules of PowerControl: the right to power, the journal before and after, one at a time.
// what and detail describe the order for the journal; they must hold no secret.
func (e *Engine) Control(ctx context.Context, what, detail, caller string, do func(context.Context) error) error {
	entry := map[string]string{"operation": what, "detail": detail, "caller": caller}
	return e.order(ctx, "control", what, entry, func(ctx context.Context) error {
		if err := do(ctx); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	})
}

// order carries out an operator's order to the host's service processor: with the right to power, one at a time, with the
// intent in the journal before and the outcome behind it. Once begun it is seen through, whatever becomes of ctx.
func (e *Engine) order(ctx context.Context, kind, what string, entry map[string]string, do func(context.Context) error) error {
	grant, err := e.permitPower()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	select {
	case e.healing <- struct{}{}:
		defer func() { <-e.healing }()
	default:
		return fmt.Errorf("%s: %w", what, ErrBusy)
	}
	e.mu.Lock()
	e.plans++
	id := fmt.Sprintf("plan-%d", e.plans)
	e.mu.Unlock()
	entry["id"], entry["agreement"] = id, grant.Agreement()
	if _, err := e.o.Journal.Write(kind, entry); err != nil {
		return fmt.Errorf("%s: journal the intent: %w", what, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), heal.PowerTimeout)
	defer cancel()
	err = do(ctx)
	result := map[string]string{"id": id}
	if err != nil {
		result["error"] = err.Error()
	}
	if _, jerr := e.o.Journal.Write(kind+"-outcome", result); jerr != nil {
		err = errors.Join(err, fmt.Errorf("journal the outcome: %w", jerr))
	}
	return err
}

// MayRead returns nil if the agreement permits operators to look at the host's memory as it is.
func (e *Engine) MayRead() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.grant().Permit(access.Read)
}
