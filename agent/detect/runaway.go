package detect

import "context"

func runawayProcess(c Config) Detector {
	return Detector{ID: "runaway-process", Title: "Runaway process", Kind: KindRunawayProcess, Severity: Warning, DependsOn: []Kind{KindPanic},
		Needs: []Need{NeedTasks}, Detect: func(context.Context, *Pass) ([]Finding, error) { return nil, ErrTooEarly }}
}
