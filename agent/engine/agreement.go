package engine

import (
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/access"
)

// Obey carries out a signed order about the access agreement, whoever brought it. What was permitted before and no longer is ends at
// once: each step of a repair asks anew.
func (e *Engine) Obey(o *access.Order, caller string) error {
	err := e.o.Agreement.Obey(o)
	e.agreed("order", fmt.Sprintf("order %d to %s (%q)", o.Sequence, o.Order, o.Reason), caller, o, err)
	return err
}

// Offer has the engine take an access agreement, as access.Lock.Offer says.
func (e *Engine) Offer(a *access.Agreement, caller string) error {
	err := e.o.Agreement.Offer(a)
	e.agreed("agreement", "agreement "+a.ID, caller, a, err)
	return err
}

// agreed journals and announces a change of the agreement, or an attempt at one.
func (e *Engine) agreed(kind, what, caller string, document any, err error) {
	text := what + " was taken"
	entry := map[string]any{"caller": caller, "document": document}
	if err != nil {
		text = what + " was refused: " + err.Error()
		entry["error"] = err.Error()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.record(kind, entry)
	e.publish(Event{Type: EventAgreement, Text: text})
}
