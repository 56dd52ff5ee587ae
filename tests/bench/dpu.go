package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

// policy has a runaway process found after 3 s of a CPU, and repaired when the bench asks for it.
var policy = json.RawMessage(`{
  "version": 1,
  "detectors": {"runawayFor": "3s", "runawayShare": 0.8},
  "rules": [{"finding": "runaway-process", "action": "kill-process", "mode": "wait"}]
}`)

// dpu measures on the two machines, over the PCI window.
func dpu(ctx context.Context, r *report, o options) error {
	for _, k := range hostKernels {
		if err := onDPU(ctx, r, o, k); err != nil {
			return fmt.Errorf("host with Linux %s: %w", k, err)
		}
	}
	return nil
}

// bench is one lab.
type bench struct {
	*report
	lab   *lab.Lab
	host  *lab.Host
	agent *operator.Agent
	n     int
}

func onDPU(ctx context.Context, r *report, o options, name string) error {
	l, err := lab.Up(ctx, lab.Config{HostKernel: name, Policy: policy, Log: r.log})
	if err != nil {
		return err
	}
	defer l.Close()
	b := &bench{report: r, lab: l, host: l.Host, n: o.n}
	if _, err := l.Apart(ctx); err != nil {
		return err
	}
	if b.agent, err = operator.DialDPU(ctx, l.DPU); err != nil {
		return err
	}
	st, err := b.agent.WaitAttached(ctx, 1)
	if err != nil {
		return err
	}
	r.add("boot of the DPU to its first Redfish answer, "+name, "ms", "harness: from the start of QEMU, while the host boots, too", ms(l.DPU.BootTook)...)
	r.add("cold attach to "+name+", DPU", "ms", "agent's own: engine state; the attach that found the kernel first, host just up", ms(st.AttachTook)...)
	if err := b.passes(ctx, name); err != nil {
		return err
	}
	if name != o.kernel {
		return nil
	}
	for _, f := range []func(context.Context) error{b.runaway, b.silent, b.stall, b.panic} {
		if err := f(ctx); err != nil {
			return fmt.Errorf("%w; the DPU's console ends with\n%s", err, strings.Join(l.DPU.Console().Tail(20), "\n"))
		}
	}
	return nil
}

// passes lets the agent watch for a while and tells what that costs it.
func (b *bench) passes(ctx context.Context, name string) error {
	tasks, err := fill(ctx, b.host)
	if err != nil {
		return err
	}
	before, err := b.agent.State(ctx)
	if err != nil {
		return err
	}
	var bytes []float64
	st, err := b.agent.WaitState(ctx, "200 passes", func(st engine.State) bool {
		bytes = append(bytes, float64(st.LastPass.Bytes))
		return st.Passes >= before.Passes+200
	})
	if err != nil {
		return err
	}
	const how = "agent's own: engine state, mean of the last passes"
	b.add("heartbeat pass on "+name+", DPU", "µs", how, us(st.LastPass.MeanHeartbeat)...)
	b.add("pass on "+name+", DPU: read", "B", "agent's own: engine state, samples of single passes; the most has a task list", bytes...)
	b.add(fmt.Sprintf("list of %d tasks of %s, DPU", tasks, name), "ms", how, ms(st.LastPass.MeanTasks)...)
	if _, err := b.agent.WaitState(ctx, "a first look at all of the kernel's code", func(st engine.State) bool { return st.Golden != nil && st.Golden.Rounds > 0 }); err != nil {
		return err
	}
	var load []float64
	for range 20 {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(2 * time.Second):
		}
		if st, err = b.agent.State(ctx); err != nil {
			return err
		}
		load = append(load, 100*st.LastPass.Load)
	}
	b.add("share of a DPU core in the watch on "+name, "%", "agent's own: engine state, 20 means of 2.5 s; all that is watched is", load...)
	return nil
}

// patience bounds the wait for one finding.
const patience = 90 * time.Second

// found asks until the agent lists the finding, and returns it with the time at which it was first listed.
func (b *bench) found(ctx context.Context, kind detect.Kind, old map[string]bool) (detect.Finding, time.Time, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("no %s was found within %v", kind, patience))
	defer cancel()
	for {
		list, err := b.agent.Findings(ctx)
		now := time.Now()
		if err != nil {
			return detect.Finding{}, now, errors.Join(context.Cause(ctx), err)
		}
		for _, f := range list {
			if f.Kind == kind && !old[f.ID] {
				return f, now, nil
			}
		}
		time.Sleep(10 * time.Millisecond) // the log is asked for; it is the operator's view that is measured
	}
}

// ids are the findings so far.
func (b *bench) ids(ctx context.Context) (map[string]bool, error) {
	list, err := b.agent.Findings(ctx)
	m := make(map[string]bool)
	for _, f := range list {
		m[f.ID] = true
	}
	return m, err
}

// fault makes a fault and returns it, its finding, and how long that took.
func (b *bench) fault(ctx context.Context, what lab.Fault, kind detect.Kind) (lab.Truth, detect.Finding, time.Duration, error) {
	old, err := b.ids(ctx)
	if err != nil {
		return lab.Truth{}, detect.Finding{}, 0, err
	}
	truth, err := b.host.Fault(ctx, what)
	if err != nil {
		return truth, detect.Finding{}, 0, err
	}
	f, at, err := b.found(ctx, kind, old)
	return truth, f, at.Sub(truth.Start), err
}

const (
	listed    = "harness: from the fault until Redfish lists the finding"
	announced = "harness: from the fault until the agent begins to say it on the DPU's console; the start is the earliest it can have been"
)

func (b *bench) runaway(ctx context.Context) error {
	var found, killed, applied []time.Duration
	for len(killed) < b.n {
		mark := b.host.EventMark()
		truth, f, took, err := b.fault(ctx, lab.FaultRunaway, detect.KindRunawayProcess)
		if err != nil {
			return err
		}
		found = append(found, took)
		died := make(chan time.Time, 1)
		go func() {
			if _, err := b.host.WaitExit(ctx, mark, truth.PID); err == nil {
				died <- time.Now()
			}
			close(died)
		}()
		asked := time.Now()
		task, err := b.agent.Heal(ctx, client.HealRequest{Finding: f.ID}, nil)
		if err != nil && strings.Contains(err.Error(), heal.ErrStale.Error()) {
			// This machine was too busy to let the process eat its CPU, and the agent looks anew. The next one counts.
			if _, err = b.agent.Repair(ctx, func(g detect.Finding) bool { return g.Culprit.PID == truth.PID }); err == nil {
				<-died
				continue
			}
		}
		if err != nil {
			return err
		}
		at, ok := <-died
		if !ok {
			return context.Cause(ctx)
		}
		var out struct{ Outcome *heal.Outcome }
		if _, err := client.OEM(task.OEM, &out); err != nil {
			return err
		}
		if out.Outcome == nil {
			return errors.New("the repair's task has no outcome")
		}
		killed = append(killed, at.Sub(asked))
		applied = append(applied, out.Outcome.Finished.Sub(out.Outcome.Started))
	}
	b.add("fault to finding: runaway-process", "ms", listed+"; policy asks for 3000 ms of a CPU", ms(found...)...)
	b.add("kill-process: request to death", "ms", "harness: from the Redfish request until the host's parent was told", ms(killed...)...)
	b.add("kill-process: plan carried out and verified", "ms", "agent's own: outcome; the look at the finding before and after it included", ms(applied...)...)
	return nil
}

func (b *bench) silent(ctx context.Context) error {
	var found []time.Duration
	for range b.n {
		_, f, took, err := b.fault(ctx, lab.FaultFreeze, detect.KindHostSilent)
		if err != nil {
			return err
		}
		found = append(found, took)
		if err := b.host.Thaw(ctx); err != nil {
			return err
		}
		if _, err := b.agent.WaitFinding(ctx, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil }); err != nil {
			return err
		}
	}
	b.add("fault to finding: host-silent", "ms", listed+"; all CPUs stopped; the verdict needs 5000 ms", ms(found...)...)
	return nil
}

func (b *bench) stall(ctx context.Context) error {
	said, found, err := b.deadly(ctx, lab.FaultIRQsOff, detect.KindCPUStall)
	b.add("fault to finding: cpu-stall", "ms", listed+"; interrupts off on one CPU; the verdict needs 1000 ms", ms(found...)...)
	b.add("fault to finding: cpu-stall, said", "ms", announced, ms(said...)...)
	return err
}

func (b *bench) panic(ctx context.Context) error {
	said, found, err := b.deadly(ctx, lab.FaultPanic, detect.KindPanic)
	b.add("fault to finding: panic", "ms", listed+"; sysrq-c, the kernel's own way into the panic included", ms(found...)...)
	b.add("fault to finding: panic, said", "ms", announced, ms(said...)...)
	return err
}

// settled waits until the host has been up for 30 s, for the detectors are patient with one that has just booted.
func (b *bench) settled(ctx context.Context) error {
	for {
		text, err := b.host.ReadFile(ctx, "/proc/uptime")
		if err != nil {
			return err
		}
		var up float64
		if _, err := fmt.Sscan(text, &up); err != nil {
			return fmt.Errorf("the host's uptime: %w", err)
		}
		if up >= 30 {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Duration((30 - up) * float64(time.Second))):
		}
	}
}

// cyclePatience bounds one cycle of deadly. A host that does not come up again, as now and then in an emulator, must not hold the others up for ever.
const cyclePatience = 4 * time.Minute

// deadly makes a fault that only a power cycle ends, again and again. It returns when the finding was said on the console, and when it was listed.
func (b *bench) deadly(ctx context.Context, what lab.Fault, kind detect.Kind) (said, listed []time.Duration, err error) {
	for range b.n {
		s, l, err := b.deadlyOnce(ctx, what, kind)
		if err != nil {
			return said, listed, err
		}
		said, listed = append(said, s), append(listed, l)
	}
	return said, listed, nil
}

func (b *bench) deadlyOnce(ctx context.Context, what lab.Fault, kind detect.Kind) (said, listed time.Duration, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, cyclePatience, fmt.Errorf("the host was not healthy again %v after %s was to be made", cyclePatience, what))
	defer cancel()
	if err := b.settled(ctx); err != nil {
		return 0, 0, err
	}
	st, err := b.agent.State(ctx)
	if err != nil {
		return 0, 0, err
	}
	mark := b.lab.DPU.Console().Mark()
	truth, f, listed, err := b.fault(ctx, what, kind)
	if err != nil {
		return 0, 0, err
	}
	at, err := b.lab.DPU.Announced(ctx, mark, f.Title)
	if err != nil {
		return 0, 0, err
	}
	said = at.Sub(truth.Start)
	boots := b.host.Boots()
	if err := b.host.PowerCycle(ctx); err != nil {
		return 0, 0, err
	}
	if _, err := b.lab.Apart(ctx); err != nil {
		return 0, 0, err
	}
	if _, err := b.host.WaitBoot(ctx, boots); err != nil {
		return 0, 0, errors.Join(context.Cause(ctx), err)
	}
	if _, err := b.agent.WaitAttached(ctx, st.Attaches+1); err != nil {
		return 0, 0, err
	}
	_, err = b.agent.WaitState(ctx, "health", func(st engine.State) bool { return st.Health == engine.Healthy })
	return said, listed, err
}
