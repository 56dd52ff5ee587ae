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
	entry := map[string]string{"id": id, "operation": what, "detail": detail, "caller": caller, "agreement": grant.Agreement()}
	if _, err := e.o.Journal.Write("control", entry); err != nil {
		return fmt.Errorf("%s: journal the intent: %w", what, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), heal.PowerTimeout)
	defer cancel()
	err = do(ctx)
	result := map[string]string{"id": id}
	if err != nil {
		result["error"] = err.Error()
	}
	if _, jerr := e.o.Journal.Write("control-outcome", result); jerr != nil {
		err = errors.Join(err, fmt.Errorf("journal the outcome: %w", jerr))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// MayRead returns nil if the agreement permits operators to look at the host's memory as it is.
func (e *Engine) MayRead() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.grant().Permit(access.Read)
}
