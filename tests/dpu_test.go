package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

// dpuPolicy has short times, so that what is healthy is given every chance to be taken for ill.
var dpuPolicy = json.RawMessage(`{
  "version": 1,
  "detectors": {"runawayFor": "5s"},
  "rules": [{"finding": "runaway-process", "action": "kill-process", "mode": "wait"}]
}`)

// TestDPUFaults makes an agent on its real image, over the PCI window, watch a host that is well, and one that is not; then the agent's own
// machine is cut off and misconfigured. The order matters: the first tests want a host that has never been ill.
func TestDPUFaults(t *testing.T) {
	needLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	l, err := lab.Up(ctx, lab.Config{HostKernel: "6.12", Policy: dpuPolicy})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := &dpu{lab: l, host: l.Host}
	if d.agent, err = operator.DialDPU(ctx, l.DPU); err != nil {
		t.Fatal(err)
	}
	if _, err := d.agent.WaitAttached(ctx, 1); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		run  func(*testing.T, context.Context)
	}{
		{"idle host", d.idle},
		{"busy host", d.busy},
		{"wrong passwords", d.passwords},
		{"freeze", d.freeze},
		{"interrupts off", d.irqsOff},
		{"reboot", d.reboot},
		{"power cut in mid-repair", d.powerCut},
		{"unknown field", d.unknownField},
		{"window too small", d.smallWindow},
	} {
		if !t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("not within two minutes"))
			defer cancel()
			tt.run(t, ctx)
		}) {
			t.Logf("the DPU's console ends with\n%s", strings.Join(l.DPU.Console().Tail(30), "\n"))
		}
	}
}

type dpu struct {
	lab   *lab.Lab
	host  *lab.Host
	agent *operator.Agent
}

// watched is how long a healthy host is watched.
const watched = 20 * time.Second

// idle watches a host on which nothing happens but what its kernel and its few services do.
func (d *dpu) idle(t *testing.T, ctx context.Context) {
	st := d.passes(t, ctx, watched)
	none(t, ctx, d.agent)
	if st.Health != engine.Healthy {
		t.Errorf("the health of a healthy host is %q: %+v", st.Health, st.Detectors)
	}
}

// passes waits until the agent has watched for some time, by its own count of passes, and returns its state.
func (d *dpu) passes(t *testing.T, ctx context.Context, long time.Duration) engine.State {
	t.Helper()
	began, err := d.agent.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Now()
	st, err := d.agent.WaitState(ctx, "passes", func(st engine.State) bool {
		return time.Since(at) >= long && st.Passes >= began.Passes+uint64(long/time.Second)
	})
	if err != nil {
		t.Fatal(err)
	}
	if st.Attaches != began.Attaches {
		t.Errorf("the agent attached again while nothing happened")
	}
	t.Logf("%d passes in %v, %d of them late", st.Passes-began.Passes, time.Since(at).Round(time.Second), st.LastPass.Late-began.LastPass.Late)
	return st
}

// busy watches a host both of whose CPUs are busy with processes that come and go. All of that is work, and nothing is wrong.
func (d *dpu) busy(t *testing.T, ctx context.Context) {
	mark := d.host.EventMark()
	var loads []int
	for cpu := range 2 {
		p, err := d.host.Spawn(ctx, control.SpawnArgs{
			Comm: "worker", CPU: cpu, UID: 1000, Argv: []string{"sh", "-c", "while :; do i=0; (while [ $i -lt 3000 ]; do i=$((i+1)); done); done"},
		})
		if err != nil {
			t.Fatal(err)
		}
		loads = append(loads, p.PID)
	}
	before := d.stat(t, ctx)
	d.passes(t, ctx, watched)
	after := d.stat(t, ctx)
	none(t, ctx, d.agent)
	if n := after - before; n < 20 {
		t.Errorf("only %d processes were made meanwhile: the host was not busy", n)
	}
	for _, pid := range loads {
		if err := d.host.Do(ctx, control.OpKill, control.KillArgs{PID: pid, Signal: 9}, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := d.host.WaitExit(ctx, mark, pid); err != nil {
			t.Fatal(err)
		}
	}
}

// stat returns how many processes the host has made.
func (d *dpu) stat(t *testing.T, ctx context.Context) (forks int) {
	t.Helper()
	text, err := d.host.ReadFile(ctx, "/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, "processes "); ok {
			if err := json.Unmarshal([]byte(rest), &forks); err != nil {
				t.Fatal(err)
			}
		}
	}
	return forks
}

// passwords guesses until the service will not hear any more guesses, which must not hinder those who are in or have another name.
func (d *dpu) passwords(t *testing.T, ctx context.Context) {
	good := d.agent.Config
	second := good
	second.User, second.Password = "second", "a horse with a battery 2"
	account := map[string]any{"UserName": second.User, "Password": second.Password, "RoleId": "Operator"}
	if _, err := d.agent.Post(ctx, "/redfish/v1/AccountService/Accounts", account, nil); err != nil {
		t.Fatal(err)
	}
	login := func(c client.Config) int {
		cl, err := client.New(c)
		if err != nil {
			t.Fatal(err)
		}
		var refused *client.Error
		var change *client.PasswordChangeError
		switch err := cl.Login(ctx); {
		case errors.As(err, &refused):
			return refused.Status
		case err == nil, errors.As(err, &change):
			return http.StatusOK
		default:
			t.Fatal(err)
			return 0
		}
	}
	wrong := good
	var codes []int
	for len(codes) < 20 {
		wrong.Password = good.Password[:len(good.Password)-1] + string(rune('0'+len(codes)%10)) + "x"
		codes = append(codes, login(wrong))
		if codes[len(codes)-1] == http.StatusTooManyRequests {
			break
		}
		if codes[len(codes)-1] != http.StatusUnauthorized {
			t.Fatalf("wrong passwords are answered with %v; want 401", codes)
		}
	}
	if codes[len(codes)-1] != http.StatusTooManyRequests {
		t.Errorf("guessing goes on for ever: %v", codes)
	}
	if code := login(second); code != http.StatusOK {
		t.Errorf("another user is locked out, too: %d", code)
	}
	if _, err := d.agent.State(ctx); err != nil {
		t.Errorf("whoever is in is locked out, too: %v", err)
	}
}

// find waits for an open finding of a kind and returns it with the time that it took since the fault.
func (d *dpu) find(t *testing.T, ctx context.Context, kind detect.Kind, truth lab.Truth) detect.Finding {
	t.Helper()
	f, err := d.agent.WaitFinding(ctx, func(f detect.Finding) bool {
		return f.Kind == kind && f.Resolved == nil && f.FirstSeen.After(truth.Start.Add(-5*time.Second))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("found after %v: %s: %s", time.Since(truth.Start).Round(10*time.Millisecond), f.Title, f.Detail)
	return f
}

// freeze stops all CPUs of a host that runs something, and lets them go on.
func (d *dpu) freeze(t *testing.T, ctx context.Context) {
	p, err := d.host.Spawn(ctx, control.SpawnArgs{Comm: "dd", CPU: 0, UID: 1000, Argv: []string{"sh", "-c", "while :; do sleep 0.01; done"}})
	if err != nil {
		t.Fatal(err)
	}
	truth, err := d.host.Fault(ctx, lab.FaultFreeze)
	if err != nil {
		t.Fatal(err)
	}
	f := d.find(t, ctx, detect.KindHostSilent, truth)
	if err := d.host.Thaw(ctx); err != nil {
		t.Fatal(err)
	}
	d.resolved(t, ctx, f)
	if err := d.host.Do(ctx, control.OpKill, control.KillArgs{PID: p.PID, Signal: 9}, nil); err != nil {
		t.Fatal(err)
	}
}

func (d *dpu) resolved(t *testing.T, ctx context.Context, f detect.Finding) {
	t.Helper()
	g, err := d.agent.WaitFinding(ctx, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("resolved: %s", g.Resolution)
}

// irqsOff locks one CPU up, and ends that by a power cycle.
func (d *dpu) irqsOff(t *testing.T, ctx context.Context) {
	truth, err := d.host.Fault(ctx, lab.FaultIRQsOff)
	if err != nil {
		t.Fatal(err)
	}
	f := d.find(t, ctx, detect.KindCPUStall, truth)
	if f.Culprit.CPU == nil || *f.Culprit.CPU != truth.CPU {
		t.Errorf("the culprit is %+v; want CPU %d", f.Culprit, truth.CPU)
	}
	if f.Culprit.PID != truth.PID || f.Culprit.Comm != truth.Comm {
		t.Errorf("what runs there is PID %d %q; want %d %q", f.Culprit.PID, f.Culprit.Comm, truth.PID, truth.Comm)
	}
	boots := d.host.Boots()
	if err := d.host.PowerCycle(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := d.host.WaitBoot(ctx, boots); err != nil {
		t.Fatal(err)
	}
	d.resolved(t, ctx, f)
	d.sees(t, ctx)
}

// sees waits until the agent sees the host as it is now, by a process that is new.
func (d *dpu) sees(t *testing.T, ctx context.Context) {
	t.Helper()
	marker := control.SpawnArgs{Comm: "marker", Argv: []string{"sleep", "1000"}, CPU: -1}
	p, err := d.host.Spawn(ctx, marker)
	if err != nil {
		t.Fatal(err)
	}
	if err := sees(ctx, d.agent, p.PID, p.Comm); err != nil {
		t.Fatal(err)
	}
}

// reboot reboots the host without a word, which must be noticed and must not be taken for a fault.
func (d *dpu) reboot(t *testing.T, ctx context.Context) {
	before, err := d.agent.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	had, err := d.agent.Findings(ctx)
	if err != nil {
		t.Fatal(err)
	}
	boots := d.host.Boots()
	truth, err := d.host.Fault(ctx, lab.FaultReboot)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.agent.WaitState(ctx, "the agent to notice", func(st engine.State) bool {
		return st.Phase != engine.Attached || st.Attaches > before.Attaches
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("noticed after %v", time.Since(truth.Start).Round(10*time.Millisecond))
	ready, err := d.host.WaitBoot(ctx, boots)
	if err != nil {
		t.Fatal(err)
	}
	st, err := d.agent.WaitAttached(ctx, before.Attaches+1)
	if err != nil {
		t.Fatal(err)
	}
	if st.Kernel.Release != ready.Release {
		t.Errorf("the agent has attached to %q; the host runs %q", st.Kernel.Release, ready.Release)
	}
	d.sees(t, ctx)
	now, err := d.agent.Findings(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(now) > len(had) {
		t.Errorf("the reboot was taken for %s: %s", now[0].Title, now[0].Detail)
	}
}

// powerCut cuts the DPU's power as soon as it has begun to write to the host. Its journal must hold what it has begun, and
// after it has come back it must be able to end it.
func (d *dpu) powerCut(t *testing.T, ctx context.Context) {
	memory := newLow(t, d.host)
	mark := d.host.EventMark()
	truth, err := d.host.Fault(ctx, lab.FaultRunaway)
	if err != nil {
		t.Fatal(err)
	}
	ours := func(f detect.Finding) bool { return f.Kind == detect.KindRunawayProcess && f.Culprit.PID == truth.PID }
	_, err = d.agent.WaitFinding(ctx, ours)
	if err != nil {
		t.Fatal(err)
	}
	go d.agent.Repair(ctx, ours) // its answer dies with the machine
	watching, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	if !memory.watch(watching) {
		t.Fatal("no store was seen")
	}
	d.lab.DPU.PowerOff()
	b, err := d.lab.DPU.ReadState("journal")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("power cut after %d journalled stores", storedIn(t, b))
	if err := d.restart(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := d.agent.WaitAttached(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if alive(ctx, d.host, truth) == nil {
		if _, err := d.agent.Repair(ctx, ours); err != nil && alive(ctx, d.host, truth) == nil {
			t.Fatal(err)
		}
	}
	if x, err := d.host.WaitExit(ctx, mark, truth.PID); err != nil || x.Signal != 9 {
		t.Fatalf("the process ended with %+v, %v; want signal 9", x, err)
	}
	d.lab.DPU.PowerOff()
	if b, err = d.lab.DPU.ReadState("journal"); err != nil {
		t.Fatal(err)
	}
	storedIn(t, b)
}

// restart gives the DPU its power and logs in.
func (d *dpu) restart(ctx context.Context) (err error) {
	if err = d.lab.DPU.Restart(ctx); err == nil {
		c := d.agent.Config
		c.Fingerprint, c.CA = d.lab.DPU.Fingerprint, nil
		d.agent, err = operator.Dial(ctx, c)
	}
	return err
}

// unknownField gives the agent a configuration that it does not understand: it must come up, say so, and touch nothing.
func (d *dpu) unknownField(t *testing.T, ctx context.Context) {
	good := d.config(t)
	bad := bytes.Replace(good, []byte(`"writes"`), []byte(`"wirtes"`), 1)
	if bytes.Equal(good, bad) {
		t.Fatal("the configuration has no field to misspell")
	}
	begun := time.Now()
	st := d.come(t, ctx, bad)
	if st.Phase != engine.NoMemory || !strings.Contains(st.Why, "wirtes") || st.Writes || st.Health != engine.CouldNotTell {
		t.Errorf("with an unknown field the agent's state is %+v; want no memory, no writes, and the name of the field", st)
	}
	t.Logf("the agent says: %s", st.Why)
	noneSince(t, ctx, d.agent, begun)
}

// smallWindow tells the agent of more memory than the window has; and then, as the control, of as much.
func (d *dpu) smallWindow(t *testing.T, ctx context.Context) {
	good := d.config(t)
	c, err := config.Parse("config.json", good)
	if err != nil {
		t.Fatal(err)
	}
	c.Memory.Size *= 2
	bad, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	st := d.come(t, ctx, bad)
	if st.Phase != engine.NoMemory || st.Kernel != nil || st.Health != engine.CouldNotTell {
		t.Errorf("with a window that is too small the agent's phase is %q, its health %q", st.Phase, st.Health)
	}
	if !strings.Contains(st.Why, "window") && !strings.Contains(st.Why, "BAR") {
		t.Errorf("the agent does not say that the window is too small: %s", st.Why)
	}
	t.Logf("the agent says: %s", st.Why)
	noneSince(t, ctx, d.agent, begun)
	d.come(t, ctx, good)
	if _, err := d.agent.WaitAttached(ctx, 1); err != nil {
		t.Fatal(err)
	}
	d.sees(t, ctx)
}

// config is what the DPU's state disk was made with.
func (d *dpu) config(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(d.lab.DPU.StateDir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// come has the DPU come up with a configuration and returns the agent's first state that tells why it does not attach, or
// that it looks.
func (d *dpu) come(t *testing.T, ctx context.Context, conf []byte) engine.State {
	t.Helper()
	d.lab.DPU.PowerOff()
	if err := d.lab.DPU.WriteState(map[string][]byte{"config.json": conf}); err != nil {
		t.Fatal(err)
	}
	if err := d.restart(ctx); err != nil {
		t.Fatal(err)
	}
	st, err := d.agent.WaitState(ctx, "the agent to begin", func(st engine.State) bool { return st.Why != "not started yet" })
	if err != nil {
		t.Fatal(err)
	}
	return st
}
