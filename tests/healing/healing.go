// Package healing is the first healing from end to end, as a script that both the demonstration and the tests run: a host
// gets a runaway process and then a panic; the agent on the DPU finds both, kills the one by memory writes and has the
// host's power cycled for the other.
//
// What is measured comes from the harness (the lab's clock, the host's own userland, its consoles and QMP); what the agent says is held
// against it, and a difference is an error.
package healing

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

// Options choose the variant of the story.
type Options struct {
	Lab lab.Config
	// Patience bounds the wait for the repair of the runaway process; zero means a minute.
	Patience time.Duration
	// Log gets the story as it happens; nil means nobody listens.
	Log io.Writer
}

// ErrNotHealed means that the runaway process was still there when patience ended.
var ErrNotHealed = errors.New("the runaway process was not killed in time")

// Entry is one line of the timeline.
type Entry struct {
	At   time.Duration `json:"at"`  // since the story began
	Who  string        `json:"who"` // "harness", "host", "agent" or "operator"
	What string        `json:"what"`
}

// Figure is one measured value.
type Figure struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	From  string `json:"from"` // how it was measured, or who says so
}

// Report is what the story has come to.
type Report struct {
	Kernel   string   `json:"kernel"`
	Path     string   `json:"path"` // "window" or "dma"
	Timeline []Entry  `json:"timeline"`
	Figures  []Figure `json:"figures"`
}

// story is one run.
type story struct {
	o     Options
	began time.Time
	lab   *lab.Lab
	agent *operator.Agent
	rep   *Report

	together func() // ends what apart does
}

// Policy is what the story's agent may do unasked: kill a runaway process. The panic waits for the operator.
var policy = json.RawMessage(`{
  "version": 1,
  "detectors": {"runawayFor": "3s"},
  "rules": [
    {"finding": "runaway-process", "action": "kill-process", "mode": "automatic", "minConfidence": 0.8, "maxPerHour": 10},
    {"finding": "panic", "action": "power-cycle", "mode": "wait"}
  ]
}`)

// hostFunctions are what the repair has the host's kernel run. posix_timer_fn, which irq_work_single calls and which leads to the
// others, is not among them: tracing changes its first bytes, and the agent calls no function that somebody has changed.
var hostFunctions = []string{"irq_work_single", "posix_timer_event", "send_sigqueue"}

// Run plays the story and returns what was seen until it ended, well or not.
func Run(ctx context.Context, o Options) (*Report, error) {
	if o.Log == nil {
		o.Log = io.Discard
	}
	if o.Patience == 0 {
		o.Patience = time.Minute
	}
	if o.Lab.Policy == nil {
		o.Lab.Policy = policy
	}
	s := &story{o: o, began: time.Now(), rep: &Report{Kernel: o.Lab.HostKernel, Path: o.Lab.Engine}}
	err := s.play(ctx)
	return s.rep, err
}

func (s *story) play(ctx context.Context) (err error) {
	s.say("harness", "start two machines: a Debian host, and a DPU that sees the host's memory through a PCI window")
	if s.lab, err = lab.Up(ctx, s.o.Lab); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.lab.Close()) }()
	ready := s.lab.Host.Ready()
	s.say("host", "%s is up: Linux %s, %d CPUs", ready.Hostname, ready.Release, ready.CPUs)
	s.figure("DPU power-on to first Redfish answer", s.lab.DPU.BootTook, "harness")
	for _, step := range s.lab.DPU.StartSteps() {
		s.figure("  "+step.Name, step.Took, fmt.Sprintf("agent; ended %v after its kernel's start", step.At))
	}

	for _, act := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"proof", s.prove},
		{"attach", s.attach},
		{"apart", s.apart},
		{"observe", s.observe},
		{"runaway process", s.runaway},
		{"panic", s.panic},
	} {
		if err := act.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", act.name, err)
		}
	}
	return nil
}

// prove has a DPU that was started through the whole chain prove what it runs, as an operator does before he trusts it.
func (s *story) prove(ctx context.Context) error {
	d := s.lab.DPU
	if d.Slots == nil {
		return nil
	}
	image, err := d.Slots.Image(d.Slots.Bundle)
	if err != nil {
		return err
	}
	c, err := d.Redfish()
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	began := time.Now()
	first, err := c.Attest(ctx, client.Attestation{}) // an owner reads the keys once, when the machine is set up, and pins them
	if first == nil || first.EndorsementKey == (attest.Digest{}) {
		return fmt.Errorf("the DPU does not tell its TPM's keys: %w", err)
	}
	got, err := c.Attest(ctx, client.Attestation{EndorsementKeys: []attest.Digest{first.EndorsementKey}, Policy: attest.Policy{Images: []attest.Image{image}}})
	if err != nil {
		return err
	}
	s.say("operator", "the DPU's TPM proves that the loader has started %s %s, epoch %d, and nothing else, and whose key Redfish shows", got.Product, got.Version, got.Epoch)
	s.figure("attestation: keys, challenge, quote, event log, verified", time.Since(began), "harness")
	return nil
}

// attach waits until the agent knows the host's kernel, and compares it with what the host says of itself.
func (s *story) attach(ctx context.Context) error {
	var err error
	if s.agent, err = operator.DialDPU(ctx, s.lab.DPU); err != nil {
		return err
	}
	st, err := s.agent.WaitAttached(ctx, 1)
	if err != nil {
		return err
	}
	ready := s.lab.Host.Ready()
	if err := sameKernel(st, ready.Release, ready.Banner); err != nil {
		return err
	}
	s.say("agent", "attached to Linux %s in %v, with no configuration: KASLR %#x, %d symbols, %d bytes of BTF",
		st.Kernel.Release, st.AttachTook.Round(time.Millisecond), st.Kernel.KASLR, st.Kernel.Symbols, st.Kernel.BTFBytes)
	s.figure("cold attach on the DPU", st.AttachTook, "agent")

	before, err := s.lab.Host.PS(ctx)
	if err != nil {
		return err
	}
	ours, err := s.agent.Tasks(ctx)
	if err != nil {
		return err
	}
	after, err := s.lab.Host.PS(ctx)
	if err != nil {
		return err
	}
	if err := sameProcesses(before, after, ours.Processes); err != nil {
		return err
	}
	s.say("agent", "lists %d processes; the host's own /proc agrees", len(ours.Processes))
	return nil
}

// apart keeps the host off the DPU's processor until the host has died: what its CPUs do is not to be waited for there.
func (s *story) apart(ctx context.Context) (err error) {
	s.together, err = s.lab.Apart(ctx)
	return err
}

// observe shows by the host's own counters that being watched costs it nothing.
func (s *story) observe(ctx context.Context) error {
	// What the agent does once after the attach is no part of what watching takes: the copy of the kernel's code.
	settled, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if _, err := s.agent.WaitState(settled, "its copy of the kernel's code", func(st engine.State) bool { return st.Golden != nil }); err != nil && settled.Err() == nil {
		return err
	}
	before, err := readCounters(ctx, s.lab.Host)
	if err != nil {
		return err
	}
	busy, err := s.agentTime(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	st, err := s.agent.State(ctx)
	if err != nil {
		return err
	}
	passes := st.Passes
	for st.Passes < passes+100 {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(2 * time.Second): // seldom: each answer takes the DPU's core from the passes that are to be measured
		}
		if st, err = s.agent.State(ctx); err != nil {
			return err
		}
	}
	busyThen, err := s.agentTime(ctx)
	if err != nil {
		return err
	}
	took := time.Since(began)
	after, err := readCounters(ctx, s.lab.Host)
	if err != nil {
		return err
	}
	if after.modules != before.modules {
		return fmt.Errorf("the host's list of modules changed while it was only watched")
	}
	d := after.sub(before)
	s.say("host", "watched for %v: %d passes of the agent, none of its programs, modules or interrupts here; forks %d, all by the harness's own questions",
		d.took.Round(10*time.Millisecond), st.Passes-passes, d.forks)
	s.figure("observation's share of a DPU core", fmt.Sprintf("%.1f %%", 100*st.LastPass.Load), "agent, processor time of its watch")
	s.figure("agent's share of a DPU core, with all that it serves", fmt.Sprintf("%.1f %%", 100*(busyThen-busy).Seconds()/took.Seconds()), "DPU's kernel")
	s.figure("agent's reads", fmt.Sprintf("%.2f MB/s", st.LastPass.BytesPerSec/1e6), "agent")
	return nil
}

// agentTime is how much processor time the agent's processes have had, as the DPU's kernel counts it.
func (s *story) agentTime(ctx context.Context) (time.Duration, error) {
	var data schema.ManagerDiagnosticData
	if err := s.agent.Get(ctx, "/redfish/v1/Managers/bmc/ManagerDiagnosticData", &data); err != nil {
		return 0, err
	}
	var seconds float64
	for _, p := range data.TopProcesses {
		if strings.Contains(p.CommandLine, "backdoord") {
			seconds += p.UserTimeSeconds + p.KernelTimeSeconds
		}
	}
	if seconds == 0 {
		return 0, fmt.Errorf("the agent is not among the DPU's processes: %+v", data.TopProcesses)
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// runaway starts a process that eats a CPU, and waits until the host itself says that it was killed.
func (s *story) runaway(ctx context.Context) error {
	h := s.lab.Host
	tracing := h.TraceFunctions(ctx, hostFunctions...) == nil
	mark, console := h.EventMark(), s.lab.DPU.Console().Mark()
	boots := h.Boots()
	truth, err := h.Fault(ctx, lab.FaultRunaway)
	if err != nil {
		return err
	}
	s.say("harness", "a process runs away on the host: %q, PID %d, on CPU %d", truth.Comm, truth.PID, truth.CPU)
	deadline, cancel := context.WithTimeoutCause(ctx, s.o.Patience, ErrNotHealed)
	defer cancel()
	f, err := s.agent.WaitFinding(deadline, func(f detect.Finding) bool {
		return f.Kind == detect.KindRunawayProcess && f.Culprit.PID == truth.PID
	})
	if err != nil {
		return err
	}
	if f.Culprit.Comm != truth.Comm {
		return fmt.Errorf("the agent calls process %d %q; it is %q", truth.PID, f.Culprit.Comm, truth.Comm)
	}
	found, err := s.lab.DPU.Announced(deadline, console, f.Title)
	if err != nil {
		return err
	}
	s.say("agent", "finding %s: %s", f.ID, f.Title)
	exit, err := h.WaitExit(deadline, mark, truth.PID)
	if err != nil {
		return fmt.Errorf("%w; the agent says: %s", err, s.agent.Explain(ctx, f.ID))
	}
	gone := time.Now()
	if exit.Signal != 9 {
		return fmt.Errorf("process %d ended with signal %d, exit code %d; want signal 9", truth.PID, exit.Signal, exit.Code)
	}
	s.say("host", "process %d ended by signal %d", truth.PID, exit.Signal)
	s.figure("runaway process: start to finding (policy: 3 s of one CPU)", found.Sub(truth.Start), "harness, by the DPU's console")
	s.figure("runaway process: start to death", gone.Sub(truth.Start), "harness")
	done, err := s.agent.WaitFinding(deadline, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil })
	if err != nil {
		return err
	}
	s.say("agent", "finding %s resolved: %s", f.ID, done.Resolution)
	out, err := s.agent.Outcome(ctx, f.ID)
	if err != nil {
		return err
	}
	s.tellRepair(out)
	if !out.Verified {
		return fmt.Errorf("the process is dead, but the agent could not verify its repair: %s", out.Error)
	}
	if tracing {
		costs, err := h.Traced(ctx)
		if err != nil {
			return err
		}
		for _, c := range costs {
			if c.Known && c.Hits > 0 {
				s.figure("the host's kernel ran "+c.Name, fmt.Sprintf("%d×, %v in all", c.Hits, c.Total), "host's ftrace")
			}
		}
	}
	if h.Boots() != boots {
		return errors.New("the host rebooted; a kill must not need that")
	}
	if err := serves(ctx, h); err != nil {
		return fmt.Errorf("the bystander service after the kill: %w", err)
	}
	log, err := h.Exec(ctx, "dmesg")
	if err != nil {
		return err
	}
	for _, bad := range []string{"WARNING:", "BUG:", "Oops"} {
		if strings.Contains(log.Stdout, bad) {
			return fmt.Errorf("the host's kernel complained (%s) after the kill", bad)
		}
	}
	s.say("host", "its TCP service still answers, its kernel log has no complaint")
	return nil
}

func (s *story) tellRepair(o *heal.Outcome) {
	how := "read, compare, write, verify"
	if o.Atomic {
		how = "compare-and-swap"
	}
	s.say("agent", "killed it by %d stores, %d bytes of host memory (armed by %s); verified: %v", o.Stores, o.BytesWritten, how, o.Verified)
	for _, f := range o.HostFunctions {
		s.figure("repair had the host's kernel run "+f.Function, fmt.Sprintf("%d×, waiting and run within %v", f.Runs, f.Within.Round(10*time.Microsecond)), "agent")
	}
}

// panic crashes the host, reads its log out of the dead memory, and has it power-cycled as the operator would.
func (s *story) panic(ctx context.Context) error {
	h := s.lab.Host
	boots, console := h.Boots(), s.lab.DPU.Console().Mark()
	truth, err := h.Fault(ctx, lab.FaultPanic)
	if err != nil {
		return err
	}
	s.say("harness", "the host crashes (sysrq-c)")
	deadline, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("the host was not healthy again within two minutes"))
	defer cancel()
	f, err := s.agent.WaitFinding(deadline, func(f detect.Finding) bool { return f.Kind == detect.KindPanic && f.Resolved == nil })
	if err != nil {
		return err
	}
	found, err := s.lab.DPU.Announced(deadline, console, f.Title)
	if err != nil {
		return err
	}
	s.together()
	s.say("agent", "finding %s: %s", f.ID, f.Title)
	s.figure("panic: crash to finding", found.Sub(truth.Start), "harness, by the first byte on the DPU's console; start, from the host's memory, known to "+truth.Margin.Round(time.Millisecond).String())
	if c := f.Culprit; c.Comm != "" {
		s.say("agent", "died on CPU %s in %q, PID %d", cpuName(c.CPU), c.Comm, c.PID)
	}
	log, err := s.agent.Dmesg(ctx)
	if err != nil {
		return err
	}
	last := ""
	for _, r := range log.Records {
		if strings.Contains(r.Text, "sysrq") || strings.Contains(r.Text, "Kernel panic") {
			last = r.Text
		}
	}
	if !strings.Contains(last, "Kernel panic") {
		return fmt.Errorf("the log that the agent read out of the dead memory (%d records) has no panic message", len(log.Records))
	}
	s.say("operator", "reads %d log records out of the dead host's memory; the last words: %q", len(log.Records), last)
	s.say("operator", "heals %s", f.ID)
	asked := time.Now()
	if err := s.agent.HealAsProposed(deadline, f.ID); err != nil {
		return err
	}
	ready, err := h.WaitBoot(deadline, boots)
	if err != nil {
		return err
	}
	s.say("host", "is up again: Linux %s", ready.Release)
	s.figure("power-cycle to userland (boot time included)", time.Since(asked), "harness")
	st, err := s.agent.WaitAttached(deadline, 2)
	if err != nil {
		return err
	}
	if err := sameKernel(st, ready.Release, ready.Banner); err != nil {
		return err
	}
	s.say("agent", "attached to the new kernel without being told, in %v", st.AttachTook.Round(time.Millisecond))
	if _, err := s.agent.WaitFinding(deadline, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil }); err != nil {
		return err
	}
	if st, err = s.agent.WaitState(deadline, "health", func(st engine.State) bool { return st.Health == engine.Healthy }); err != nil {
		return err
	}
	if err := serves(ctx, h); err != nil {
		return fmt.Errorf("the service after the reboot: %w", err)
	}
	s.say("agent", "the host is healthy again")
	s.figure("panic: crash to healthy, attached and serving", time.Since(truth.Start), "harness")
	return nil
}

func (s *story) say(who, format string, args ...any) {
	e := Entry{At: time.Since(s.began), Who: who, What: fmt.Sprintf(format, args...)}
	s.rep.Timeline = append(s.rep.Timeline, e)
	fmt.Fprintf(s.o.Log, "%7.2fs  %-8s  %s\n", e.At.Seconds(), e.Who, e.What)
}

func (s *story) figure(name string, value any, from string) {
	if d, ok := value.(time.Duration); ok {
		value = d.Round(time.Millisecond)
	}
	s.rep.Figures = append(s.rep.Figures, Figure{name, fmt.Sprint(value), from})
}

func sameKernel(st engine.State, release, banner string) error {
	if st.Kernel.Release != release {
		return fmt.Errorf("the agent attached to %q; the host runs %q", st.Kernel.Release, release)
	}
	if strings.TrimSpace(st.Kernel.Banner) != strings.TrimSpace(banner) {
		return fmt.Errorf("the agent read the banner %q; the host's is %q", st.Kernel.Banner, banner)
	}
	return nil
}

// sameProcesses compares the agent's list with the host's own: what was there before and after it was taken must be in it.
func sameProcesses(before, after []control.Process, ours []query.Process) error {
	seen := map[int]string{}
	for _, p := range ours {
		seen[p.PID] = p.Comm
	}
	for _, p := range before {
		stayed := slices.ContainsFunc(after, func(q control.Process) bool {
			return q.PID == p.PID && q.Start == p.Start && q.Comm == p.Comm
		})
		// The kernel's workers change their names with their work.
		if stayed && !p.Kernel && seen[p.PID] != p.Comm {
			return fmt.Errorf("the host's own list has process %d %q; the agent sees %q there", p.PID, p.Comm, seen[p.PID])
		}
	}
	return nil
}

func cpuName(cpu *int) string {
	if cpu == nil {
		return "?"
	}
	return fmt.Sprint(*cpu)
}

// serves asks the host's TCP service something.
func serves(ctx context.Context, h *lab.Host) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	conn, err := h.Dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return ask(ctx, conn)
}

func ask(ctx context.Context, conn net.Conn) error {
	if t, ok := ctx.Deadline(); ok {
		conn.SetDeadline(t)
	}
	if _, err := io.WriteString(conn, "are you there\n"); err != nil {
		return err
	}
	line := make([]byte, 256)
	n, err := conn.Read(line)
	if err != nil {
		return err
	}
	if !strings.Contains(string(line[:n]), "are you there") {
		return fmt.Errorf("it answered %q", line[:n])
	}
	return nil
}
