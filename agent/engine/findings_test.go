package engine

import (
	"context"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
)

// TestSilentSince: a detector that fell silent before it is waited for, and stays so, is heard to be silent at its next run.
func TestSilentSince(t *testing.T) {
	e := New(Options{})
	d := &detect.Detector{ID: "runaway-process", Kind: detect.KindRunawayProcess, Clear: time.Minute}
	at := time.Unix(1000, 0)
	f := detect.Finding{Kind: detect.KindRunawayProcess, Key: "7"}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.update(d, []detect.Finding{f}, at)
	e.update(d, nil, at.Add(time.Second))
	from := at.Add(2 * time.Second)
	tr := e.tracked[trackKey(f)]
	if tr == nil {
		t.Fatal("the finding is gone at once")
	}
	if tr.silentSince(from) {
		t.Error("silent since a time after the detector's last run")
	}
	e.update(d, nil, at.Add(3*time.Second))
	if !tr.silentSince(from) {
		t.Error("still not heard to be silent after another silent run")
	}
	e.update(d, []detect.Finding{f}, at.Add(4*time.Second))
	if tr.silentSince(from) {
		t.Error("silent while it speaks")
	}
}

// TestConfirmByCause: on a host that stands still as a whole the detector of locked CPUs is not asked any more, and a restart for one is
// confirmed all the same; what is milder is not.
func TestConfirmByCause(t *testing.T) {
	e := New(Options{})
	later := time.Now().Add(time.Hour)
	f := detect.Finding{ID: "cpu-stall-1", Kind: detect.KindCPUStall, Key: "cpu0"}
	e.tracked["cpu-stall/cpu0"] = &tracked{Finding: f, detector: "cpu-stall"}
	soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := e.confirm(soon, f, heal.RiskRestart); err == nil {
		t.Error("confirmed by nothing")
	}
	e.tracked["host-silent/host"] = &tracked{Finding: detect.Finding{ID: "host-silent-1", Kind: detect.KindHostSilent}, detector: "host-silent", spoke: later}
	if err := e.confirm(t.Context(), f, heal.RiskRestart); err != nil {
		t.Errorf("confirm() = %v for a restart", err)
	}
	soon, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := e.confirm(soon, f, heal.RiskKernel); err == nil {
		t.Error("confirmed for a repair that needs a host that runs")
	}
}
