package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/agent/query"
)

var policyVerb = verb{
	name:  "policy",
	args:  "test POLICY RECORDING…",
	words: []string{"test"},
	short: "what a policy would have done about recorded hosts",
	long: `Recordings are series of samples of a host: an agent keeps one for each of its latest findings (backdoor collect recording), and detect's tests have
some (agent/detect/testdata). Each is judged with the detectors' settings of the policy, and for each fault that is found it is said what the policy would
have done, and why.

  backdoor collect recording runaway-process-3 -o runaway.json.gz
  backdoor policy test policy.json runaway.json.gz agent/detect/testdata/*.json.gz`,
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) < 3 || args[0] != "test" {
			return 0, &usageError{verb: "policy", msg: "policy test takes a policy and at least one recording"}
		}
		f, err := os.Open(args[1])
		if err != nil {
			return 0, fmt.Errorf("read policy: %w", err)
		}
		defer f.Close()
		p, err := policy.Load(f)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", args[1], err)
		}
		all := []verdict{}
		for _, path := range args[2:] {
			vs, err := tryPolicy(ctx, p, path)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", path, err)
			}
			all = append(all, vs...)
		}
		return exitOK, e.answer(all, func(w io.Writer) error {
			l := &lines{w: w}
			for _, v := range all {
				if v.Finding == nil {
					l.printf("%s: nothing is found\n", query.Clean(v.Recording))
					continue
				}
				do := "waits for an operator"
				what := v.Decision.Action
				if v.Set != nil {
					what += fmt.Sprintf(" (%s=%d)", v.Set.Name, v.Set.Number)
				}
				if v.Decision.Automatic {
					do = what + " at once"
				} else if v.Decision.Action != "" {
					do = what + " waits for an operator"
				}
				l.printf("%s: after %v: %s: %s (%s)\n", query.Clean(v.Recording), v.After.Round(time.Millisecond), query.Clean(v.Finding.Title), do, query.Clean(v.Decision.Reason))
			}
			return l.err
		})
	},
}

// verdict is what a policy would have done about one fault of a recording.
type verdict struct {
	Recording string          `json:"recording"`
	After     time.Duration   `json:"after"` // from the recording's beginning
	Finding   *detect.Finding `json:"finding,omitempty"`
	Decision  policy.Decision `json:"decision"`
	Set       *policy.Value   `json:"set,omitempty"` // what the action would be given
}

func tryPolicy(ctx context.Context, p policy.Policy, path string) ([]verdict, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	whole, err := detect.ReadRecording(f)
	if err != nil {
		return nil, err
	}
	if len(whole.Beats) == 0 {
		return nil, fmt.Errorf("the recording has no heartbeat")
	}
	own, err := p.Watching()
	if err != nil {
		return nil, err
	}
	var out []verdict
	var past []policy.Past
	told := make(map[string]bool)
	standing := make(map[detect.Kind]bool)
	detect.Replay(ctx, p.DetectConfig(), whole, own, func(at time.Time, d *detect.Detector, found []detect.Finding) bool {
		for _, cause := range d.DependsOn {
			if standing[cause] {
				return true // a consequence is not told of while its cause stands
			}
		}
		for _, f := range found {
			key := string(f.Kind) + "/" + f.Key
			if f.Suspicion || told[key] {
				continue
			}
			told[key], standing[f.Kind] = true, true
			dec := p.Decide(f, at, past)
			if dec.Automatic {
				past = append(past, policy.Past{Kind: f.Kind, Rule: f.Rule, At: at})
			}
			out = append(out, verdict{path, at.Sub(whole.Beats[0].At), &f, dec, p.Set(f, dec.Action)})
		}
		return ctx.Err() == nil
	})
	if len(out) == 0 {
		out = []verdict{{Recording: path}}
	}
	return out, ctx.Err()
}
