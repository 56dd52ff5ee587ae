package engine

import (
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
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
