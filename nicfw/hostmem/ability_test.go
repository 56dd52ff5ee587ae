package hostmem_test

import (
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Only what is behind a latency gains by reading many pieces at once, whatever it is wrapped in.
func TestAsScatterReader(t *testing.T) {
	ram := ramFile(t, true)
	engine := hostmem.NewEngine(ram, hostmem.EngineOptions{})
	for _, c := range []struct {
		name string
		mem  hostmem.Memory
		want bool
	}{
		{"RAM file", ram, false},
		{"engine", engine, true},
		{"guard over a RAM file", hostmem.NewGuard(ram, allowAll), false},
		{"guard over a narrowed engine", hostmem.NewGuard(hostmem.Narrow(engine, engine.Map()), allowAll), true},
		{"narrowed RAM file", hostmem.Narrow(ram, ram.Map()), false},
		{"recorder over an engine", hostmem.NewRecorder(engine), false},
	} {
		s, ok := hostmem.AsScatterReader(c.mem)
		if ok != c.want || ok && s == nil {
			t.Errorf("AsScatterReader(%s) = %v, %v; want %v", c.name, s, ok, c.want)
		}
	}
}
