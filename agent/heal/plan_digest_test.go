package heal

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// A plan is another if it does another thing or does it to another, and the same if it was made a moment later.
func TestDigest(t *testing.T) {
	base := func() Plan {
		return Plan{
			ID: "plan-1", Action: KillProcess, Finding: "runaway-process-1", Title: "kill, 98 % by now", Made: time.Unix(1, 0),
			Target: &Target{PID: 7, TGID: 7, Comm: "spin", Start: time.Second},
			Steps:  []Step{{Op: OpWrite, Object: "irq_work.func", Addr: 0x1000, Put: Bytes{1}}, {Op: OpPower, Power: "cycle"}, {Op: OpNetwork, Network: &NetworkOrder{Do: Release}}},
		}
	}
	want := base().Digest()
	if len(want) != 64 {
		t.Errorf("digest %q", want)
	}
	for name, tt := range map[string]struct {
		change func(*Plan)
		same   bool
	}{
		"later":           {func(p *Plan) { p.ID, p.Title, p.Made = "plan-2", "kill, 99 % by now", time.Unix(2, 0) }, true},
		"other addresses": {func(p *Plan) { p.Steps[0].Addr, p.Steps[0].Virt, p.Steps[0].Put = 0x2000, kernel.VirtAddr(5), Bytes{2} }, true},
		"action":          {func(p *Plan) { p.Action = StopProcess }, false},
		"finding":         {func(p *Plan) { p.Finding = "runaway-process-2" }, false},
		"process":         {func(p *Plan) { p.Target.PID = 8 }, false},
		"the PID again":   {func(p *Plan) { p.Target.Start = time.Minute }, false},
		"one more":        {func(p *Plan) { p.Targets = []Target{{PID: 9}} }, false},
		"object":          {func(p *Plan) { p.Steps[0].Object = "task_struct.cred" }, false},
		"power":           {func(p *Plan) { p.Steps[1].Power = "off" }, false},
		"network":         {func(p *Plan) { p.Steps[2].Network.Rate = 1 }, false},
		"value":           {func(p *Plan) { p.Value = &Value{Name: "memory.max", Number: 1} }, false},
		"taking back":     {func(p *Plan) { p.TakesBack = "plan-0" }, false},
		"fewer steps":     {func(p *Plan) { p.Steps = p.Steps[:2] }, false},
	} {
		p := base()
		tt.change(&p)
		if same := p.Digest() == want; same != tt.same {
			t.Errorf("%s: same %v", name, same)
		}
		if err := p.Agreed(want); errors.Is(err, ErrStale) == tt.same {
			t.Errorf("%s: Agreed = %v", name, err)
		}
	}
	// A bomb grows while somebody reads; it stays that bomb.
	bomb := Plan{Action: StopForkBomb, Finding: "fork-bomb-1", More: true, Title: "40 tasks", Targets: []Target{{PID: 5}}, Steps: []Step{{Op: OpWrite}}}
	grown := bomb
	grown.Title, grown.Targets, grown.Steps = "80 tasks", []Target{{PID: 5}, {PID: 6}}, []Step{{Op: OpWrite}, {Op: OpWrite}}
	if bomb.Digest() != grown.Digest() {
		t.Error("a bomb that has grown is another plan")
	}
	if grown.Finding = "fork-bomb-2"; bomb.Digest() == grown.Digest() {
		t.Error("another bomb is the same plan")
	}
	set := base()
	set.Value = &Value{Name: "kernel.panic", Number: 10}
	other := base()
	other.Value = &Value{Name: "kernel.panic", Number: 11}
	if set.Digest() == other.Digest() {
		t.Error("another number is the same plan")
	}
	var again Plan
	b, err := json.Marshal(base())
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &again); err != nil || again.Digest() != want {
		t.Errorf("the digest changes on the way: %v", err)
	}
}
