package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"github.com/backdoor-rhs/backdoor/tests/native"
	"golang.org/x/sys/unix"
)

// runawaySoon has a runaway process found after 2 s, and healed by nobody but an operator. Half a CPU is enough: on a machine that is
// busy otherwise, a host's CPU may not run for a while, and its kernel cannot count then.
var runawaySoon = json.RawMessage(`{
  "version": 1,
  "detectors": {"runawayFor": "2s", "runawayShare": 0.5},
  "rules": [{"finding": "runaway-process", "action": "kill-process", "mode": "wait"}]
}`)

// TestHostFaults gives the commands bad input and a host that falls, all on one host without a DPU. The order matters: the
// last test leaves a host that was reset.
func TestHostFaults(t *testing.T) {
	needLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	programs, err := native.Build(ctx, "..", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.Up(ctx, lab.Config{NoDPU: true, HostMemory: 256 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := &faults{programs: programs, lab: l, host: l.Host}
	for _, tt := range []struct {
		name string
		run  func(*testing.T, context.Context)
	}{
		{"images", f.images},
		{"agreements", f.agreements},
		{"killed in mid-repair", f.killed},
		{"resets in mid-walk", f.resets},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("not within two minutes"))
			defer cancel()
			tt.run(t, ctx)
		})
	}
}

type faults struct {
	programs native.Programs
	lab      *lab.Lab
	host     *lab.Host
}

// start starts an agent that lives as long as the test.
func (f *faults) start(t *testing.T, ctx context.Context, o native.Options) *native.Agent {
	t.Helper()
	o.Program, o.Host = f.programs.Backdoord, f.host
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	a, err := native.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Stop()
		if t.Failed() {
			t.Logf("the agent said:\n%s", a.Output())
		}
	})
	return a
}

// images gives the operator's command a host's memory whole and damaged. It must tell the truth or say that it cannot.
func (f *faults) images(t *testing.T, ctx context.Context) {
	dir := t.TempDir()
	whole := filepath.Join(dir, "whole")
	procs := f.snapshot(t, ctx, whole)

	// The control: nothing below may pass because the image is never readable.
	list, code, stderr := f.ps(t, ctx, whole)
	if code != 0 {
		t.Fatalf("ps of the whole image: exit code %d: %s", code, stderr)
	}
	if err := sameList(procs, list); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(whole)
	if err != nil {
		t.Fatal(err)
	}

	truth := make(map[string]bool)
	for _, p := range list.Processes {
		truth[fmt.Sprint(p.PID, p.Comm)] = true
	}
	noise := func(path string, n int) {
		b := make([]byte, n)
		r := rand.NewChaCha8([32]byte{1})
		r.Read(b) // never fails, by its documentation
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name string
		make func(path string)
		want string // in the complaint; "" means that the truth is as good
	}{
		{"empty", func(p string) { noise(p, 0) }, "empty"},
		{"one byte", func(p string) { noise(p, 1) }, "truncated"},
		{"random", func(p string) { noise(p, 16<<20) }, "find a kernel"},
		{"random, of an odd size", func(p string) { noise(p, 1<<20+1) }, "truncated"},
		{"zero", func(p string) { sparse(t, p, st.Size()) }, "find a kernel"},
		{"truncated to 1 MiB", func(p string) { cut(t, whole, p, 1<<20) }, "find a kernel"},
		{"truncated in a page", func(p string) { cut(t, whole, p, st.Size()*9/10&^4095+1) }, "truncated"},
		{"truncated to a quarter", func(p string) { cut(t, whole, p, st.Size()/4) }, ""},
		{"truncated to half", func(p string) { cut(t, whole, p, st.Size()/2) }, ""},
		{"truncated to three quarters", func(p string) { cut(t, whole, p, st.Size()*3/4) }, ""},
		{"truncated by a tenth", func(p string) { cut(t, whole, p, st.Size()*9/10&^4095) }, ""},
		{"truncated by a page", func(p string) { cut(t, whole, p, st.Size()-4096) }, ""},
		{"without VMCOREINFO", func(p string) { blank(t, whole, p, []byte("VMCOREINFO\x00"), []byte("OSRELEASE=")) }, "VMCOREINFO"},
		// struct btf_header of include/uapi/linux/btf.h: magic, version, flags, length of the header.
		{"without BTF", func(p string) { blank(t, whole, p, []byte{0x9f, 0xeb, 1, 0, 24, 0, 0, 0}) }, "BTF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, "damaged")
			os.Remove(path)
			tt.make(path)
			got, code, stderr := f.ps(t, ctx, path)
			switch {
			case code == 0 && tt.want != "":
				t.Errorf("ps lists %d processes of an image that has no kernel", len(got.Processes))
			case code == 0:
				// What it lists must be there, and what it left out it must have said.
				for _, p := range got.Processes {
					if !truth[fmt.Sprint(p.PID, p.Comm)] {
						t.Errorf("ps lists PID %d %q, which is not in the whole image", p.PID, p.Comm)
					}
				}
				if len(got.Processes) != len(list.Processes) && len(got.Doubts) == 0 {
					t.Errorf("ps lists %d of %d processes without a doubt", len(got.Processes), len(list.Processes))
				}
				t.Logf("%d of %d processes; doubts: %q", len(got.Processes), len(list.Processes), got.Doubts)
			case code != 1 && code != 4:
				t.Errorf("exit code %d; want 1 or 4: %s", code, stderr)
			case !strings.Contains(stderr, tt.want) || strings.Contains(stderr, "goroutine "):
				t.Errorf("the complaint is %q; want %q in it", stderr, tt.want)
			default:
				t.Logf("exit code %d: %s", code, strings.TrimSpace(stderr))
			}
		})
	}
	// An agent says the same, for as long as it lasts, and goes on.
	t.Run("agent without BTF", func(t *testing.T) {
		path := filepath.Join(dir, "nobtf")
		blank(t, whole, path, []byte{0x9f, 0xeb, 1, 0, 24, 0, 0, 0})
		a := f.start(t, ctx, native.Options{NoWrites: true, Change: func(c *config.Config) {
			c.Memory = config.Memory{Backend: config.BackendImage, Path: path}
		}})
		st, err := a.WaitState(ctx, "the agent to have looked", func(st engine.State) bool { return strings.Contains(st.Why, "BTF") })
		if err != nil {
			t.Fatal(err)
		}
		if st.Phase != engine.Searching || st.Health != engine.CouldNotTell || st.Kernel != nil {
			t.Errorf("the agent's phase is %q, its health %q, its kernel %v; want it to search, and not to know", st.Phase, st.Health, st.Kernel)
		}
		none(t, ctx, a)
	})
}

// snapshot copies the host's memory while the host stands still, and returns its processes at that time.
func (f *faults) snapshot(t *testing.T, ctx context.Context, to string) []control.Process {
	t.Helper()
	before, err := f.host.PS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.host.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	path, size := f.host.RAM()
	cut(t, path, to, size)
	if err := f.host.Thaw(ctx); err != nil {
		t.Fatal(err)
	}
	after, err := f.host.PS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(before, func(p control.Process) bool {
		return p.Kernel || !slices.ContainsFunc(after, func(q control.Process) bool { return p.PID == q.PID && p.Start == q.Start })
	})
}

// ps runs backdoor -image PATH ps.
func (f *faults) ps(t *testing.T, ctx context.Context, path string) (query.Processes, int, string) {
	t.Helper()
	cmd := exec.CommandContext(ctx, f.programs.Backdoor, "-image", path, "-json", "ps")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var list query.Processes
	var exit *exec.ExitError
	switch err := cmd.Run(); {
	case errors.As(err, &exit):
		return list, exit.ExitCode(), stderr.String()
	case err != nil:
		t.Fatal(err)
	}
	if err := json.Unmarshal(stdout.Bytes(), &list); err != nil {
		t.Fatalf("ps of %s: %v in %q", path, err, stdout.Bytes())
	}
	return list, 0, stderr.String()
}

func sameList(truth []control.Process, list query.Processes) error {
	if len(truth) < 5 {
		return fmt.Errorf("the host itself lists only %d processes", len(truth))
	}
	for _, p := range truth {
		if !slices.ContainsFunc(list.Processes, func(q query.Process) bool { return q.PID == p.PID && q.Comm == p.Comm && q.PPID == p.PPID }) {
			return fmt.Errorf("process %d %q of the host is not in the list", p.PID, p.Comm)
		}
	}
	return nil
}

// sparse makes a file of zeroes.
func sparse(t *testing.T, path string, size int64) *os.File {
	t.Helper()
	out, err := os.Create(path)
	if err == nil {
		err = out.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	return out
}

// cut copies the first size bytes of a file, and leaves holes where there are zeroes.
func cut(t *testing.T, from, to string, size int64) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out := sparse(t, to, size)
	buf, nothing := make([]byte, 256<<10), make([]byte, 256<<10)
	for at := int64(0); at < size; at += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), size-at)]
		if _, err := in.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(b, nothing[:len(b)]) {
			continue
		}
		if _, err := out.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
}

// blank copies a file with every occurrence of the patterns made zero. It fails if one does not occur.
func blank(t *testing.T, from, to string, patterns ...[]byte) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range patterns {
		n := 0
		for at := 0; ; n++ {
			i := bytes.Index(b[at:], p)
			if i < 0 {
				break
			}
			clear(b[at+i : at+i+len(p)])
			at += i + len(p)
		}
		if n == 0 {
			t.Fatalf("%q does not occur in the host's memory", p)
		}
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// none fails if the agent has, or has had, any finding.
func none(t *testing.T, ctx context.Context, a finder) {
	t.Helper()
	noneSince(t, ctx, a, time.Time{})
}

// finder is an agent, which knows the findings of its earlier starts, too.
type finder interface {
	Findings(context.Context) ([]detect.Finding, error)
}

// noneSince fails if the agent has found anything after a time.
func noneSince(t *testing.T, ctx context.Context, a finder, since time.Time) {
	t.Helper()
	fs, err := a.Findings(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fs {
		if f.FirstSeen.Before(since) {
			continue
		}
		t.Errorf("finding %s at %v: %s: %s; %+v", f.ID, f.FirstSeen.Format(time.TimeOnly), f.Title, f.Detail, f.Evidence)
	}
}

// low are the pages of the host below 1 MiB in which repairs lay what they have its kernel use. A running kernel leaves them
// alone.
type low struct {
	mem    []byte // the host's, as it is now
	before []byte
}

const lowFirst, lowEnd = 0x2000, 0x9f000

func (f *faults) low(t *testing.T) *low { return newLow(t, f.host) }

func newLow(t *testing.T, h *lab.Host) *low {
	t.Helper()
	path, _ := h.RAM()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	mem, err := unix.Mmap(int(file.Fd()), 0, 1<<20, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return &low{mem: mem, before: slices.Clone(mem)}
}

// changed returns the first address that is not as it was, or 0.
func (l *low) changed() int { return l.differs(0) }

// differs returns the first address that is not as it was, or 0. It leaves out the last bytes of each page.
func (l *low) differs(but int) int {
	for pa := lowFirst; pa < lowEnd; pa += 4096 {
		end := pa + 4096 - but
		if !bytes.Equal(l.mem[pa:end], l.before[pa:end]) {
			for l.mem[pa] == l.before[pa] && pa < end-1 {
				pa++
			}
			return pa
		}
	}
	return 0
}

// watch looks until something has changed for a repair, which it reports, or ctx ends. The lease that a healer takes before that is the
// last word of a page.
func (l *low) watch(ctx context.Context) bool {
	for ctx.Err() == nil {
		if l.differs(8) != 0 {
			return true
		}
		time.Sleep(200 * time.Microsecond) // memory has no event for "somebody has written here"
	}
	return false
}

// agreements has agents whose agreement is no good find a runaway process, and an operator ask each to end it. None may store anything
// to the host. An agent with a good one, which does end it, shows that each could have been seen to.
func (f *faults) agreements(t *testing.T, ctx context.Context) {
	bad := []struct {
		name   string
		deal   native.Agreement
		denied string // in the refusal
	}{
		{"missing", native.Agreement{Missing: true}, "no access agreement"},
		{"signed by a stranger", native.Agreement{Stranger: true}, "no access agreement"},
		{"expired", native.Agreement{Until: time.Now().Add(-time.Minute)}, "ended at"},
		{"without kill-process", native.Agreement{Actions: []string{"power-cycle"}}, `does not give "kill-process"`},
	}
	agents := make([]*native.Agent, len(bad))
	for i, b := range bad {
		agents[i] = f.start(t, ctx, native.Options{Agreement: b.deal, Policy: runawaySoon})
	}
	good := f.start(t, ctx, native.Options{Policy: runawaySoon})
	memory := f.low(t)
	mark := f.host.EventMark()
	truth, err := f.host.Fault(ctx, lab.FaultRunaway)
	if err != nil {
		t.Fatal(err)
	}
	ours := func(g detect.Finding) bool { return g.Kind == detect.KindRunawayProcess && g.Culprit.PID == truth.PID }
	for i, b := range bad {
		t.Run(b.name, func(t *testing.T) {
			fd, err := agents[i].WaitFinding(ctx, ours)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := agents[i].Heal(ctx, client.HealRequest{Finding: fd.ID, DryRun: true}, nil); err != nil {
				t.Errorf("a dry run writes nothing, and yet is refused: %v", err)
			}
			err = agents[i].HealAsProposed(ctx, fd.ID)
			if err == nil || !strings.Contains(err.Error(), b.denied) {
				t.Errorf("the repair ended with %v; want a refusal with %q", err, b.denied)
			}
			if pa := memory.changed(); pa != 0 {
				t.Errorf("the host's memory was changed at %#x", pa)
			}
			if err := alive(ctx, f.host, truth); err != nil {
				t.Error(err)
			}
			agents[i].Stop()
		})
	}
	t.Run("good", func(t *testing.T) {
		watching, stop := context.WithTimeout(ctx, time.Minute)
		defer stop()
		var seen bool
		var wg sync.WaitGroup
		wg.Go(func() { seen = memory.watch(watching) })
		if _, err := good.Repair(ctx, ours); err != nil {
			t.Fatal(err)
		}
		x, err := f.host.WaitExit(ctx, mark, truth.PID)
		if err != nil || x.Signal != 9 {
			t.Fatalf("the process ended with %+v, %v; want signal 9", x, err)
		}
		stop()
		wg.Wait()
		if !seen {
			t.Error("a repair went unseen in the host's memory: that it is unchanged proves nothing")
		}
	})
}

// alive returns an error if the process of a fault has ended.
func alive(ctx context.Context, h *lab.Host, truth lab.Truth) error {
	list, err := h.PS(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, func(p control.Process) bool { return p.PID == truth.PID && p.Comm == truth.Comm && p.State != "Z" }) {
		return fmt.Errorf("process %d %q has ended", truth.PID, truth.Comm)
	}
	return nil
}

// killed kills the agent as soon as it has begun to write to the host, and looks at what it leaves: a journal that is whole and holds what
// was stored, and a host that another agent can heal.
func (f *faults) killed(t *testing.T, ctx context.Context) {
	dir := t.TempDir()
	var last int
	for i := range 3 {
		mark := f.host.EventMark()
		a := f.start(t, ctx, native.Options{Policy: runawaySoon, DMA: true, Dir: filepath.Join(dir, fmt.Sprint(i))})
		memory := f.low(t)
		truth, err := f.host.Fault(ctx, lab.FaultRunaway)
		if err != nil {
			t.Fatal(err)
		}
		ours := func(g detect.Finding) bool { return g.Kind == detect.KindRunawayProcess && g.Culprit.PID == truth.PID }
		healing, stop := context.WithCancel(ctx)
		asked := make(chan error, 1)
		go func() {
			_, err := a.Repair(healing, ours)
			asked <- err
		}()
		begun, cancel := context.WithTimeout(ctx, time.Minute)
		if !memory.watch(begun) {
			t.Fatalf("no store was seen: %v", <-asked)
		}
		cancel()
		time.Sleep(time.Duration(i) * 3 * time.Millisecond) // not a wait: each time a little later in the repair
		a.Kill()
		stop()
		<-asked
		last = stored(t, filepath.Join(dir, fmt.Sprint(i), "journal"))
		t.Logf("killed after %d journalled stores", last)

		// Whatever the host has by now, the next agent must come to an end with it.
		second := f.start(t, ctx, native.Options{Policy: runawaySoon, Dir: filepath.Join(dir, fmt.Sprint(i)), Password: a.Config.Password})
		if alive(ctx, f.host, truth) == nil {
			if _, err := second.Repair(ctx, ours); err != nil && alive(ctx, f.host, truth) == nil {
				t.Fatalf("after the agent was killed in mid-repair, the next could not repair: %v", err)
			}
		}
		if x, err := f.host.WaitExit(ctx, mark, truth.PID); err != nil || x.Signal != 9 {
			t.Fatalf("the process ended with %+v, %v; want signal 9", x, err)
		}
		second.Stop()
		stored(t, filepath.Join(dir, fmt.Sprint(i), "journal"))
	}
	log, err := f.host.Exec(ctx, "dmesg")
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"WARNING:", "BUG:", "Oops"} {
		if strings.Contains(log.Stdout, bad) {
			t.Errorf("the host's kernel complained (%s):\n%s", bad, log.Stdout)
		}
	}
	// The control: a journal of which one byte was changed does not verify.
	path := filepath.Join(dir, "0", "journal")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte("kill-process"))
	if at < 0 {
		t.Fatal("the journal does not name the action")
	}
	b[at] ^= 1
	if r, err := journal.Verify(bytes.NewReader(b), int64(len(b))); err == nil && r.Lost == 0 {
		t.Errorf("a journal that was tampered with verifies: %+v", r)
	}
}

// stored verifies a journal that no agent has open, and counts the stores in it.
func stored(t *testing.T, path string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return storedIn(t, b)
}

func storedIn(t *testing.T, b []byte) int {
	t.Helper()
	r, err := journal.Verify(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatalf("the journal does not verify: %v", err)
	}
	if r.Lost != 0 || r.Records == 0 {
		t.Fatalf("the journal has lost records: %+v", r)
	}
	n := bytes.Count(b, []byte(`"undo":true`))
	if !bytes.Contains(b, []byte(`"intent"`)) {
		t.Fatal("stores were seen, and the journal has no intent")
	}
	return n + bytes.Count(b, []byte(`"step":`))
}

// resets pulls the host's reset line again and again while an agent walks its memory over a slow path, be it healthy or just
// booting. Nothing may be found, whatever kernel the agent names must be one that has run, and in the end it must see the last one.
func (f *faults) resets(t *testing.T, ctx context.Context) {
	a := f.start(t, ctx, native.Options{DMA: true, Policy: json.RawMessage(`{"version": 1, "detectors": {"tasks": "50ms"}, "rules": []}`)})
	if _, err := a.WaitAttached(ctx, 1); err != nil {
		t.Fatal(err)
	}
	first := f.host.Ready()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	var asked, listed int
	wg.Go(func() {
		for watching.Err() == nil {
			st, err := a.State(watching)
			if watching.Err() != nil {
				return
			}
			if err != nil {
				t.Errorf("the agent does not answer: %v", err)
				return
			}
			asked++
			if k := st.Kernel; k != nil && (k.Release != first.Release || strings.TrimSpace(k.Banner) != strings.TrimSpace(first.Banner)) {
				t.Errorf("the agent names the kernel %q (%q), which has never run", k.Release, k.Banner)
			}
			// A walk over the tasks on behalf of somebody who asks: it fails, or what it lists can be.
			if list, err := a.Tasks(watching); err == nil {
				listed++
				for _, p := range list.Processes {
					if p.PID < 1 || p.PID > 1<<22 || len(p.Comm) == 0 || len(p.Comm) > 15 {
						t.Errorf("the agent lists a process that cannot be: %+v", p)
					}
				}
			}
			time.Sleep(20 * time.Millisecond) // a watcher that asks without a pause would take the agent's share of the machine
		}
	})
	var boots int
	for i := range 5 {
		boots = f.host.Boots()
		if i%2 == 0 {
			st, err := a.State(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := a.WaitState(ctx, "some walks", func(now engine.State) bool { return now.Passes >= st.Passes+5 }); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond) // not a wait: anywhere in a walk
		} else {
			time.Sleep(time.Duration(300+rand.IntN(2000)) * time.Millisecond) // not a wait: anywhere in a boot
		}
		if err := f.host.Reset(ctx); err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			if _, err := f.host.WaitBoot(ctx, boots); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := f.host.WaitBoot(ctx, boots); err != nil {
		t.Fatal(err)
	}
	// That it sees the kernel that runs now is proven by a process that has never been in an earlier one.
	marker := control.SpawnArgs{Comm: fmt.Sprintf("marker%d", rand.IntN(1e9)), Argv: []string{"sleep", "1000"}, CPU: -1}
	p, err := f.host.Spawn(ctx, marker)
	if err != nil {
		t.Fatal(err)
	}
	if err := sees(ctx, a, p.PID, marker.Comm); err != nil {
		t.Fatal(err)
	}
	stop()
	wg.Wait()
	none(t, ctx, a)
	if w := a.Workers(); len(w) != 1 {
		t.Errorf("the agent's work was begun %d times; it must not have ended", len(w))
	}
	st, err := a.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.Attaches < 3 {
		t.Errorf("the agent has attached %d times to a host that was reset 5 times", st.Attaches)
	}
	t.Logf("asked %d times, %d lists, %d attaches", asked, listed, st.Attaches)
}

// sees waits until the agent lists a process.
func sees(ctx context.Context, a interface {
	Tasks(context.Context) (query.Processes, error)
}, pid int, comm string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 90*time.Second, errors.New("not within 90 seconds"))
	defer cancel()
	for {
		list, err := a.Tasks(ctx)
		if err == nil && slices.ContainsFunc(list.Processes, func(p query.Process) bool { return p.PID == pid && p.Comm == comm }) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the agent to see process %d %q: %w; last: %v", pid, comm, context.Cause(ctx), err)
		case <-time.After(100 * time.Millisecond): // the list is asked for; nobody tells that it has changed
		}
	}
}
