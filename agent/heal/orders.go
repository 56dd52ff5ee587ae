package heal

import (
	"context"
	"fmt"
	"slices"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Orders that a power controller may know beyond those of Power; operators may give them.
const (
	OrderReset      = "reset"       // restart at once with the power kept
	OrderPowerCycle = "power-cycle" // off and on again by a single order, for an agent that loses its own power with the host's
	OrderRestart    = "restart"     // ask the operating system to restart
	OrderButton     = "button"      // press the power button
	OrderPause      = "pause"       // stop all CPUs, and keep everything as it is
	OrderResume     = "resume"      // have them go on after a pause
	OrderSuspend    = "suspend"     // write the state to disk and switch off
)

// Orderer is a Power that takes further orders.
type Orderer interface {
	// Orders are those of the constants that it may take.
	Orders() []string
	Order(ctx context.Context, order string) error
}

// doOrder gives an order that is not one of Power's. What a controller does not know is done by its Cycle if that comes to the
// same.
func doOrder(ctx context.Context, p Power, order string) error {
	if o, ok := p.(Orderer); ok && slices.Contains(o.Orders(), order) {
		return o.Order(ctx, order)
	}
	if order == OrderReset || order == OrderPowerCycle {
		return p.Cycle(ctx)
	}
	return fmt.Errorf("this power controller does not know %q: %w", order, kernel.ErrNotSupported)
}
