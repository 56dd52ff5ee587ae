package heal

import (
	"context"
	"errors"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// plainPower notes the last thing that it was told.
type plainPower struct {
	Power
	told string
}

func (p *plainPower) Cycle(context.Context) error { p.told = "cycle"; return nil }

type orderingPower struct{ plainPower }

func (p *orderingPower) Orders() []string { return []string{OrderReset, OrderRestart, OrderButton} }
func (p *orderingPower) Order(_ context.Context, order string) error {
	p.told = order
	return nil
}

func TestOrders(t *testing.T) {
	for _, tt := range []struct{ order, plain, ordering string }{
		{OrderReset, "cycle", "reset"},
		{OrderPowerCycle, "cycle", "cycle"},
		{OrderRestart, "", "restart"},
		{OrderButton, "", "button"},
		{"explode", "", ""},
	} {
		var plain plainPower
		var ordering orderingPower
		for _, p := range []struct {
			power Power
			told  *string
			want  string
		}{{&plain, &plain.told, tt.plain}, {&ordering, &ordering.told, tt.ordering}} {
			err := DoPower(t.Context(), p.power, tt.order)
			if *p.told != p.want || (p.want == "") != errors.Is(err, kernel.ErrNotSupported) {
				t.Errorf("DoPower(%T, %s) told %q, %v; want %q", p.power, tt.order, *p.told, err, p.want)
			}
		}
	}
}
