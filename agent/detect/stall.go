package detect

import "context"

func cpuStall(c Config) Detector {
	return Detector{ID: "cpu-stall", Title: "CPU stall", Kind: KindCPUStall, Severity: Critical, DependsOn: []Kind{KindPanic, KindHostSilent},
		Needs: []Need{NeedHeartbeats}, Detect: func(context.Context, *Pass) ([]Finding, error) { return nil, ErrTooEarly }}
}

func hostSilent(c Config) Detector {
	return Detector{ID: "host-silent", Title: "Host silent", Kind: KindHostSilent, Severity: Critical, DependsOn: []Kind{KindPanic},
		Detect: func(context.Context, *Pass) ([]Finding, error) { return nil, ErrTooEarly }}
}
