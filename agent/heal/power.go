package heal

import (
	"context"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// PowerTimeout bounds one order to the power controller.
const PowerTimeout = 60 * time.Second

// PowerCycle is the ID of the action that switches the host off and on again.
const PowerCycle = "power-cycle"

func powerCycle() Action {
	return Action{
		ID: PowerCycle, Title: "Switch the host off and on again through its power controller", Risk: RiskRestart,
		For: everyKind(),
		// Needs no view: it is what is left when there is none.
		Plan: func(_ context.Context, _ *kernel.View, f detect.Finding) (Plan, error) {
			return Plan{
				Action: PowerCycle, Finding: f.ID, Risk: RiskRestart,
				Title: "power-cycle the host: " + f.Title,
				Steps: []Step{PowerStep("cycle", "nothing on it can be repaired while it runs; all that is not on its disks is lost")},
			}, nil
		},
	}
}

// PowerStep returns the step of a power operation: "on", "off", "cycle", "nmi" or "shutdown".
func PowerStep(op, why string) Step {
	return Step{Op: OpPower, Power: op, Why: why, Timeout: PowerTimeout}
}

// DoPower does a power operation: "on", "off", "cycle", "nmi", "shutdown", or an order of the constants.
func DoPower(ctx context.Context, p Power, op string) error {
	if p == nil {
		return fmt.Errorf("power %s: this agent has no power controller for the host: %w", op, kernel.ErrNotSupported)
	}
	do := map[string]func(context.Context) error{
		"on": p.On, "off": p.Off, "cycle": p.Cycle, "nmi": p.NMI, "shutdown": p.GracefulShutdown,
	}[op]
	if do == nil {
		do = func(ctx context.Context) error { return doOrder(ctx, p, op) }
	}
	if err := do(ctx); err != nil {
		return fmt.Errorf("power %s: %w", op, err)
	}
	return nil
}
