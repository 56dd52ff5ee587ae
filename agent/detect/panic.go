package detect

import (
	"context"
	"fmt"
)

// panicDetector reports a kernel that has panicked. The state is the kernel's own word (panic_cpu), so one look is enough.
func panicDetector(c Config) Detector {
	return Detector{
		ID: "panic", Title: "Kernel panic", Kind: KindPanic, Severity: Critical,
		Needs: []Need{NeedPanic},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			s := p.Panic
			if !s.Panicked {
				return nil, nil
			}
			f := Finding{
				Key: "kernel", Kind: KindPanic, Severity: Critical, Confidence: 1,
				Title:  "the kernel has panicked",
				Detail: fmt.Sprintf("CPU %d has claimed the panic; nothing on this host runs any more", s.CPU),
				Evidence: []Evidence{
					{"panic_cpu", fmt.Sprint(s.CPU)},
					{"tainted", fmt.Sprintf("%#x", s.Tainted)},
				},
			}
			if s.CPU >= 0 {
				cpu := s.CPU
				f.Culprit.CPU = &cpu
			}
			if s.Message != "" {
				f.Title = s.Message
				f.Evidence = append(f.Evidence, Evidence{"message", s.Message})
			}
			if t := s.Task; t != nil {
				uid := t.UID
				f.Culprit.PID, f.Culprit.TGID, f.Culprit.Comm, f.Culprit.UID, f.Culprit.Start = t.PID, t.TGID, t.Comm, &uid, t.Start
				f.Detail += fmt.Sprintf("; %q (PID %d) was running there", t.Comm, t.PID)
			}
			return []Finding{f}, nil
		},
	}
}
