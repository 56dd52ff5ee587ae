package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// made is a made-up host, its kernel and its memory in one.
type made struct {
	mu       sync.Mutex
	boot     int
	off      bool  // no kernel is to be found
	memErr   error // what opening memory comes to
	readErr  error // what every read comes to
	panicked bool
	frozen   time.Time // since when nothing moves; zero: it moves
	spin     bool      // PID 412 spins
	firmware byte      // what firmware has left in memory
	garbage  bool      // what the kernel counts has been overwritten
	opens    int
	closes   int
	started  time.Time
	during   func() // called once, while signs are looked for
}

func (m *made) set(f func(m *made)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(m)
}

func (m *made) reboot() {
	m.set(func(m *made) { m.boot++; m.panicked, m.frozen, m.started = false, time.Time{}, time.Now() })
}

// The memory.

func (m *made) memory(context.Context) (hostmem.Memory, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.memErr != nil {
		return nil, m.memErr
	}
	return m, nil
}

func (m *made) ReadAt(b []byte, pa int64) (int, error) {
	if pa != 0 {
		return 0, hostmem.ErrNotMapped
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range b {
		b[i] = m.firmware
	}
	return len(b), nil
}

func (m *made) Map() []hostmem.Range { return nil }
func (m *made) Close() error         { m.set(func(m *made) { m.closes++ }); return nil }

// The source.

func (m *made) open(context.Context, hostmem.Memory, kernel.Options) (target, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.opens++
	if m.readErr != nil {
		return nil, m.readErr
	}
	if m.off {
		return nil, kernel.ErrNotFound
	}
	return &madeKernel{m, m.boot}, nil
}

type madeKernel struct {
	m    *made
	boot int
}

func (k *madeKernel) Info() kernel.Info {
	k.m.mu.Lock()
	defer k.m.mu.Unlock()
	return kernel.Info{Arch: "x86_64", Release: "6.1.0-made", BootID: fmt.Sprintf("boot%d", k.boot), Note: 0x1000, Hostname: "made",
		Rungs: []kernel.Rung{{Name: "alive", OK: k.m.frozen.IsZero()}}}
}

func (k *madeKernel) Prove(context.Context) error {
	k.m.mu.Lock()
	defer k.m.mu.Unlock()
	if k.m.readErr != nil {
		return k.m.readErr
	}
	if k.m.boot != k.boot || k.m.off {
		return kernel.ErrGone
	}
	return nil
}

func (k *madeKernel) look(context.Context) look { return k }
func (k *madeKernel) image() *kernel.Image      { return nil }
func (k *madeKernel) Cost() kernel.Cost         { return kernel.Cost{Reads: 3, Bytes: 640} }

func (k *madeKernel) SignsAmong([]kernel.Task) (kernel.Signs, error) {
	k.m.mu.Lock()
	during := k.m.during
	k.m.during = nil
	k.m.mu.Unlock()
	if during != nil {
		during()
	}
	return kernel.Signs{At: time.Now()}, nil
}

func (k *madeKernel) Usage() (kernel.Usage, error) {
	k.m.mu.Lock()
	defer k.m.mu.Unlock()
	if k.m.garbage {
		return kernel.Usage{}, &kernel.CorruptError{Object: "nr_threads", Why: "-2145053557 of 24544271 threads"}
	}
	return kernel.Usage{At: time.Now(), Forks: 100, Threads: 60, MaxThreads: 4000, PIDs: 60, MaxPIDs: 32768, Total: 1 << 30, Free: 1 << 29, Available: 1 << 29}, nil
}

func (k *madeKernel) Panic() (kernel.PanicState, error) {
	k.m.mu.Lock()
	defer k.m.mu.Unlock()
	if k.m.readErr != nil {
		return kernel.PanicState{}, k.m.readErr
	}
	return kernel.PanicState{Panicked: k.m.panicked, CPU: 0, Message: "Kernel panic - not syncing: made up"}, nil
}

// up is how long the host has run.
func (k *madeKernel) up() time.Duration {
	now := time.Now()
	if !k.m.frozen.IsZero() {
		now = k.m.frozen
	}
	return now.Sub(k.m.started)
}

func (k *madeKernel) Heartbeat() (kernel.Heartbeat, error) {
	k.m.mu.Lock()
	defer k.m.mu.Unlock()
	if k.m.readErr != nil {
		return kernel.Heartbeat{}, k.m.readErr
	}
	ticks := uint64(k.up() / (4 * time.Millisecond))
	if k.m.garbage {
		return kernel.Heartbeat{At: time.Now(), Jiffies: 1 << 40, Mono: 8943993129850496325, CPUs: make([]kernel.CPU, 1)}, nil
	}
	return kernel.Heartbeat{At: time.Now(), Jiffies: ticks, Mono: int64(k.up()), CPUs: []kernel.CPU{{
		Online: true, TimerIRQs: ticks, IRQs: ticks, Clock: uint64(k.up()), Curr: 1, CurrPID: 412, CurrComm: "spin",
	}}}, nil
}

func (k *madeKernel) TasksRoughly() iter.Seq2[kernel.Task, error] {
	return func(yield func(kernel.Task, error) bool) {
		k.m.mu.Lock()
		err, spin, up := k.m.readErr, k.m.spin, k.up()
		k.m.mu.Unlock()
		if err != nil {
			yield(kernel.Task{}, err)
			return
		}
		if yield(kernel.Task{PID: 1, TGID: 1, Comm: "init", Confident: true}, nil) && spin {
			yield(kernel.Task{PID: 412, TGID: 412, Comm: "spin", UID: 1000, Start: time.Second, Runtime: up, Confident: true}, nil)
		}
	}
}

// memDevice is a journal's device in memory.
type memDevice struct {
	mu sync.Mutex
	b  []byte
}

func (d *memDevice) ReadAt(b []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off >= int64(len(d.b)) {
		return 0, io.EOF
	}
	return bytes.NewReader(d.b).ReadAt(b, off)
}

func (d *memDevice) WriteAt(b []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.b[off:], b), nil
}

func (d *memDevice) Sync() error { return nil }

// inBubble runs f with an engine on a made-up host, in a bubble of its own time.
func inBubble(t *testing.T, change func(*made, *Options), f func(t *testing.T, m *made, w *watched)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := &made{boot: 1, started: time.Now().Add(-time.Minute)}
		dev := &memDevice{b: make([]byte, 1<<20)}
		j, err := journal.Open(dev, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		o := Options{
			Memory: m.memory, Writes: true, HostUUID: guestUUID, Journal: j,
			Policy: policy.Policy{Version: 1, Detectors: policy.Detectors{RunawayFor: policy.Duration(3 * time.Second)}, Rules: policy.Default().Rules},
		}
		if change != nil {
			change(m, &o)
		}
		ctx, cancel := context.WithCancel(t.Context())
		e := New(o)
		e.src = m
		w := &watched{t: t, e: e, events: e.Subscribe(ctx)}
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("Run = %v; want context.Canceled", err)
			}
			if _, err := j.Verify(); err != nil {
				t.Errorf("journal: %v", err)
			}
		}()
		f(t, m, w)
	})
}

func TestHealthyHost(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		time.Sleep(time.Minute)
		s := w.e.State()
		if s.Phase != Attached || s.Health != Healthy || len(w.e.Findings()) > 0 || s.Attaches != 1 || len(s.Errors) > 0 {
			t.Errorf("state after a quiet minute: %+v; findings %v", s, w.e.Findings())
		}
		if s.Passes < 1000 || s.LastPass.Bytes != 640 || s.LastPass.BytesPerSec < 10_000 {
			t.Errorf("cost %+v after %d passes", s.LastPass, s.Passes)
		}
	})
}

// The series by which a finding was judged is kept, and finds the same again; that of now is there too, and the oldest give way.
func TestRecording(t *testing.T) {
	dir := t.TempDir()
	inBubble(t, func(_ *made, o *Options) { o.RecordDir = dir }, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		if _, err := w.e.Recording(t.Context(), "panic-1"); !errors.Is(err, ErrNoRecording) {
			t.Errorf("of a finding that there is not: %v; want %v", err, ErrNoRecording)
		}
		for i := range recordingsMost {
			old, at := filepath.Join(dir, fmt.Sprintf("old-%d.json.gz", i)), time.Unix(int64(i), 0)
			if err := errors.Join(os.WriteFile(old, nil, 0o600), os.Chtimes(old, at, at)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * time.Second)
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		w.wait(time.Second, "panic", ofKind(EventFinding, detect.KindPanic))
		time.Sleep(time.Second)
		for finding, want := range map[string]bool{"panic-1": true, "": false} {
			b, err := w.e.Recording(t.Context(), finding)
			if err != nil {
				t.Fatalf("Recording(%q) = %v", finding, err)
			}
			series, err := detect.ReadRecording(bytes.NewReader(b))
			if err != nil || len(series.Beats) < 100 {
				t.Fatalf("Recording(%q) has %d heartbeats, %v", finding, len(series.Beats), err)
			}
			ids := map[string]time.Time{}
			detect.Replay(t.Context(), detect.DefaultConfig(), series, nil, func(at time.Time, d *detect.Detector, found []detect.Finding) bool {
				if len(found) > 0 && !found[0].Suspicion && ids[d.ID].IsZero() {
					ids[d.ID] = at
				}
				return true
			})
			if at := ids["panic"]; want && (len(ids) != 1 || at.Before(series.Beats[len(series.Beats)-1].At)) {
				t.Errorf("the replay finds %v; want the panic alone, at the end", ids)
			}
		}
		for _, wrong := range []string{"panic-2", "../journal", "/etc/passwd", "old-0"} {
			if _, err := w.e.Recording(t.Context(), wrong); !errors.Is(err, ErrNoRecording) || !strings.Contains(err.Error(), "panic-1") {
				t.Errorf("Recording(%q) = %v; want %v, and which there are", wrong, err, ErrNoRecording)
			}
		}
	})
}

func TestNotHealthyBeforeItIsKnown(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		time.Sleep(time.Second)
		if s := w.e.State(); s.Health != CouldNotTell {
			t.Errorf("health %s one second after the attach; the runaway detector has not seen its window yet", s.Health)
		}
	})
}

func TestNoKernelNoMemory(t *testing.T) {
	inBubble(t, func(m *made, _ *Options) { m.memErr = errors.New("no such device") }, func(t *testing.T, m *made, w *watched) {
		time.Sleep(20 * time.Second)
		if s := w.e.State(); s.Phase != NoMemory || s.Health != CouldNotTell || !strings.Contains(s.Why, "no such device") || len(w.e.Findings()) > 0 {
			t.Errorf("without memory: %+v, findings %v", s, w.e.Findings())
		}
		m.set(func(m *made) { m.memErr, m.off = nil, true })
		time.Sleep(5 * time.Second)
		if s := w.e.State(); s.Phase != Searching || s.Health != CouldNotTell {
			t.Errorf("without a kernel: %+v", s)
		}
		if _, err := w.e.View(t.Context()); !errors.Is(err, ErrNotAttached) {
			t.Errorf("View = %v; want ErrNotAttached", err)
		}
		m.set(func(m *made) { m.off = false })
		w.wait(3*time.Second, "attach", ofType(EventAttached))
	})
}

func TestPanicWaitsForAnOperator(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		time.Sleep(10 * time.Second)
		began := time.Now()
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		ev := w.wait(time.Second, "panic", ofKind(EventFinding, detect.KindPanic))
		if d := ev.At.Sub(began); d > 60*time.Millisecond || ev.Finding.ID != "panic-1" || ev.Finding.Title != "Kernel panic - not syncing: made up" {
			t.Errorf("found after %v: %+v", d, ev.Finding)
		}
		w.wait(time.Second, "waiting", ofKind(EventWaiting, detect.KindPanic))
		time.Sleep(20 * time.Second)
		// Its consequences are silent while it stands.
		if fs := w.e.Findings(); len(fs) != 1 || fs[0].Action != "power-cycle" || fs[0].Automatic {
			t.Errorf("findings = %+v; want the panic alone", fs)
		}
		if s := w.e.State(); s.Phase != Attached || !s.Dead || s.Health != Ill {
			t.Errorf("state = %+v; want attached to a dead kernel", s)
		}
		// Somebody restarts it; nobody tells us.
		m.reboot()
		w.wait(10*time.Second, "attach", ofType(EventAttached))
		time.Sleep(5 * time.Second)
		fs := w.e.Findings()
		if len(fs) != 1 || fs[0].Resolved == nil || !strings.Contains(fs[0].Resolution, "newly started kernel") {
			t.Errorf("findings after the restart = %+v", fs)
		}
		m.set(func(m *made) { m.panicked = true })
		if ev := w.wait(time.Second, "second panic", ofKind(EventFinding, detect.KindPanic)); ev.Finding.ID != "panic-2" {
			t.Errorf("second panic is %s; IDs are never used again", ev.Finding.ID)
		}
	})
}

// TestPanicWithinAPass: a pass that takes its time does not go on to its end while the kernel has panicked.
func TestPanicWithinAPass(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		time.Sleep(10 * time.Second)
		const took = 40 * time.Millisecond
		began := make(chan time.Time, 1)
		m.set(func(m *made) {
			m.during = func() {
				m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
				began <- time.Now()
				time.Sleep(took)
			}
		})
		ev := w.wait(2*time.Second, "panic", ofKind(EventFinding, detect.KindPanic))
		if d := ev.At.Sub(<-began); d != took {
			t.Errorf("found %v after the panic; want it found when the look at signs ends, which takes %v", d, took)
		}
		time.Sleep(time.Second)
		if fs := w.e.Findings(); len(fs) != 1 {
			t.Errorf("findings = %+v; want the panic alone", fs)
		}
	})
}

func TestFrozenHost(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		time.Sleep(10 * time.Second)
		began := time.Now()
		m.set(func(m *made) { m.frozen = time.Now() })
		ev := w.wait(10*time.Second, "stall", ofKind(EventFinding, detect.KindCPUStall))
		if d := ev.At.Sub(began); d > 1200*time.Millisecond {
			t.Errorf("stalled CPU found after %v", d)
		}
		ev = w.wait(10*time.Second, "silence", ofKind(EventFinding, detect.KindHostSilent))
		if d := ev.At.Sub(began); d > 5200*time.Millisecond {
			t.Errorf("silent host found after %v", d)
		}
		time.Sleep(time.Second)
		if f, ok := w.e.Finding("cpu-stall-1"); !ok || f.Cause != "host-silent-1" {
			t.Errorf("cpu-stall-1 = %+v; want it explained by host-silent-1", f)
		}
		m.set(func(m *made) { m.started, m.frozen = m.started.Add(time.Since(m.frozen)), time.Time{} })
		w.wait(2*time.Second, "end", ofKind(EventResolved, detect.KindHostSilent))
		time.Sleep(10 * time.Second)
		if s := w.e.State(); s.Health != Healthy {
			t.Errorf("health %s after the thaw; %+v", s.Health, s.Detectors)
		}
	})
}

// A host that was reset stands still, too, until its next kernel comes up, and its old kernel lies in memory as it was. That
// is no fault, and its old kernel is not taken for the next one.
func TestReset(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
		time.Sleep(3 * time.Second)
		m.set(func(m *made) { m.frozen, m.firmware = time.Now(), 0xf0 })
		time.Sleep(30 * time.Second)
		st := w.e.State()
		if st.Phase != Lost || st.Health != CouldNotTell || st.Attaches != 1 || len(w.e.Findings()) != 0 {
			t.Errorf("phase %q, health %q, %d attaches, findings %v; want the kernel lost and nothing found: %s",
				st.Phase, st.Health, st.Attaches, w.e.Findings(), st.Why)
		}
		m.reboot()
		time.Sleep(5 * time.Second)
		if st = w.e.State(); st.Phase != Attached || st.Health != Healthy || st.Attaches != 2 {
			t.Errorf("after the boot: phase %q, health %q, %d attaches", st.Phase, st.Health, st.Attaches)
		}
	})
}

// Firmware that writes where it should not costs one more attach, and no more.
func TestRestlessFirmware(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
		for range 60 {
			time.Sleep(time.Second)
			m.set(func(m *made) { m.firmware++ })
		}
		time.Sleep(5 * time.Second)
		if st := w.e.State(); st.Phase != Attached || st.Health != Healthy || st.Attaches != 2 {
			t.Errorf("phase %q, health %q, %d attaches; want a healthy host, attached twice", st.Phase, st.Health, st.Attaches)
		}
	})
}

// TestOverwritten has a kernel overwritten that can still be proven: nothing is found in what makes no sense, and it is given up.
func TestOverwritten(t *testing.T) {
	for _, tt := range []struct {
		lasts time.Duration
		lost  bool
	}{{corruptPatience / 2, false}, {2 * corruptPatience, true}} {
		inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
			time.Sleep(5 * time.Second)
			m.set(func(m *made) { m.garbage = true })
			time.Sleep(tt.lasts)
			m.set(func(m *made) { m.garbage = false })
			time.Sleep(5 * time.Second)
			st := w.e.State()
			if f := w.e.Findings(); len(f) > 0 {
				t.Errorf("after %v: findings %v", tt.lasts, f)
			}
			if st.Phase != Attached || st.Attaches > 1 != tt.lost {
				t.Errorf("after %v: phase %q, %d attaches", tt.lasts, st.Phase, st.Attaches)
			}
		})
	}
}

func TestPathLost(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		down := &hostmem.FaultError{Op: "read", Addr: 0x1000, Len: 8, Err: hostmem.ErrLinkDown}
		m.set(func(m *made) { m.readErr, m.memErr = down, errors.New("device is gone") })
		w.wait(time.Second, "loss", ofType(EventLost))
		ev := w.wait(8*time.Second, "silence", ofKind(EventFinding, detect.KindHostSilent))
		if ev.Finding.Confidence > 0.7 {
			t.Errorf("confidence %v that the host is silent, when only the path is", ev.Finding.Confidence)
		}
		if s := w.e.State(); s.Phase != NoMemory {
			t.Errorf("phase %s; want no-memory", s.Phase)
		}
		m.set(func(m *made) { m.readErr, m.memErr = nil, nil })
		w.wait(5*time.Second, "resolution", ofKind(EventResolved, detect.KindHostSilent))
		w.wait(5*time.Second, "attach", ofType(EventAttached))
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.closes != 1 {
			t.Errorf("memory closed %d times; want once", m.closes)
		}
	})
}

func TestFaultInADetectorStopsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &made{boot: 1, started: time.Now().Add(-time.Minute)}
		e := New(Options{Memory: m.memory})
		e.src = m
		e.detectors[3].Detect = func(context.Context, *detect.Pass) ([]detect.Finding, error) { panic("mistake") }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		time.Sleep(20 * time.Second)
		s := e.State()
		if s.Passes < 300 || s.Health != CouldNotTell {
			t.Errorf("%d passes, health %s", s.Passes, s.Health)
		}
		for _, d := range s.Detectors {
			if bad := d.ID == "runaway-process"; bad != (d.Health == CouldNotTell) || bad && !strings.Contains(d.Error, "mistake") {
				t.Errorf("detector %+v", d)
			}
		}
		cancel()
		<-done
	})
}

// fakePower is a power controller that restarts the made-up host.
type fakePower struct {
	m   *made
	err error
	did []string
}

func (p *fakePower) do(op string) error {
	p.m.set(func(*made) { p.did = append(p.did, op) })
	if p.err == nil && op == "cycle" {
		p.m.set(func(m *made) { m.off = true })
		time.AfterFunc(5*time.Second, func() { p.m.reboot(); p.m.set(func(m *made) { m.off = false }) })
	}
	return p.err
}
func (p *fakePower) State(context.Context) (string, error)  { return "on", nil }
func (p *fakePower) Cycle(context.Context) error            { return p.do("cycle") }
func (p *fakePower) On(context.Context) error               { return p.do("on") }
func (p *fakePower) Off(context.Context) error              { return p.do("off") }
func (p *fakePower) NMI(context.Context) error              { return p.do("nmi") }
func (p *fakePower) GracefulShutdown(context.Context) error { return p.do("shutdown") }

func automatic(kind, action string) []policy.Rule {
	return []policy.Rule{{Finding: kind, Action: action, Mode: policy.Automatic, MinConfidence: 0.9, MaxPerHour: 2}}
}

func TestPowerCycleByPolicy(t *testing.T) {
	var pw *fakePower
	inBubble(t, func(m *made, o *Options) {
		pw = &fakePower{m: m}
		o.Power, o.Agreement, o.Policy.Rules = pw, agreement(t, guestUUID, heal.PowerCycle), automatic("panic", "power-cycle")
		o.Interval = 500 * time.Millisecond // an hour has many passes
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		for n := 1; n <= 2; n++ {
			time.Sleep(10 * time.Second)
			m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
			ev := w.wait(20*time.Second, "healing", ofKind(EventHealed, detect.KindPanic))
			if !ev.Outcome.Verified || len(pw.did) != n {
				t.Fatalf("outcome %+v; did %v", ev.Outcome, pw.did)
			}
		}
		// Policy allows two an hour.
		time.Sleep(10 * time.Second)
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		w.wait(time.Second, "third panic", ofKind(EventFinding, detect.KindPanic))
		time.Sleep(time.Minute)
		if len(pw.did) != 2 {
			t.Errorf("did %v; policy allows two an hour", pw.did)
		}
		w.wait(2*time.Hour, "healing when its hour is over", ofKind(EventHealed, detect.KindPanic))
	})
}

// A host that an operator has switched off is not ill, whether its memory still holds its kernel or not, and policy does not switch it on.
func TestSwitchedOff(t *testing.T) {
	for _, gone := range []bool{false, true} {
		for _, op := range []string{"off", "shutdown"} {
			var pw *fakePower
			inBubble(t, func(m *made, o *Options) {
				pw = &fakePower{m: m}
				o.Power, o.Agreement, o.Policy.Rules = pw, agreement(t, guestUUID, heal.PowerCycle), nil
				o.Interval = 500 * time.Millisecond // minutes have many passes
				for _, k := range detect.Kinds() {
					if k != detect.KindPolicy { // whose rules need a condition
						o.Policy.Rules = append(o.Policy.Rules, automatic(string(k), heal.PowerCycle)...)
					}
				}
			}, func(t *testing.T, m *made, w *watched) {
				w.wait(time.Second, "attach", ofType(EventAttached))
				time.Sleep(15 * time.Second)
				if err := w.e.PowerControl(t.Context(), op, "alice"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(3 * time.Second) // it takes its time to shut down
				m.set(func(m *made) { m.off, m.frozen = gone, time.Now() })
				time.Sleep(8 * time.Minute)
				s := w.e.State()
				m.set(func(*made) {
					if fs := w.e.Findings(); len(fs) > 0 || len(pw.did) != 1 || s.Health != CouldNotTell {
						t.Errorf("%s, memory gone: %v: health %s, findings %+v, orders %v", op, gone, s.Health, fs, pw.did)
					}
				})
				// It is switched on, and does not come up.
				if err := w.e.PowerControl(t.Context(), "on", "alice"); err != nil {
					t.Fatal(err)
				}
				m.set(func(m *made) { m.off = true })
				time.Sleep(time.Minute)
				for _, f := range w.e.Findings() {
					if f.Kind == detect.KindBootStuck && !f.Suspicion {
						t.Errorf("a minute after it was switched on: %+v", f)
					}
				}
				w.wait(10*time.Minute, "boot-stuck", ofKind(EventFinding, detect.KindBootStuck))
			})
		}
	}
	// A host that goes on long after it was to shut down, and stands still then, is ill.
	inBubble(t, func(m *made, o *Options) {
		o.Power, o.Agreement, o.Interval = &fakePower{m: m}, agreement(t, guestUUID, heal.PowerCycle), 500*time.Millisecond
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		if err := w.e.PowerControl(t.Context(), "shutdown", "alice"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		m.set(func(m *made) { m.frozen = time.Now() })
		w.wait(time.Minute, "silence", ofType(EventFinding))
	})
}

// What policy has had done before a restart of the agent counts: a card that loses its power with the host must not cycle it
// without end.
func TestRatesOutliveTheAgent(t *testing.T) {
	var pw *fakePower
	inBubble(t, func(m *made, o *Options) {
		pw = &fakePower{m: m}
		o.Power, o.Agreement, o.Policy.Rules = pw, agreement(t, guestUUID, heal.PowerCycle), automatic("panic", "power-cycle")
		o.Interval = 500 * time.Millisecond // an hour has many passes
		now := time.Now()
		for _, r := range []struct {
			at              time.Time
			finding, caller string
		}{
			{now.Add(-2 * time.Hour), "panic-1", "policy"},         // too long ago
			{now.Add(-30 * time.Minute), "panic-2", "alice"},       // an operator's
			{now.Add(-20 * time.Minute), "cpu-stall-1", "policy"},  // another kind
			{now.Add(-10 * time.Minute), "panic-3", "policy"},      // one
			{now.Add(1000 * time.Hour), "panic-1", callerPolicy},   // two, by a clock that was wrong
			{now.Add(-5 * time.Minute), "no number", callerPolicy}, // nothing that we write
		} {
			data, err := json.Marshal(map[string]any{"plan": map[string]any{"finding": r.finding}, "caller": r.caller})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := o.Journal.Append(journal.Record{Time: r.at, Kind: "intent", Data: data}); err != nil {
				t.Fatal(err)
			}
		}
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		w.wait(time.Second, "panic", ofKind(EventFinding, detect.KindPanic))
		time.Sleep(49 * time.Minute)
		m.set(func(*made) {
			if len(pw.did) > 0 {
				t.Errorf("did %v; policy allows two an hour, and two were done before the restart", pw.did)
			}
		})
		w.wait(2*time.Minute, "healing when the first one's hour is over", ofKind(EventHealed, detect.KindPanic))
	})
}

// The agreement bounds how often an action is begun, by whomever, and that an agent was started anew lifts nothing.
func TestAgreementRates(t *testing.T) {
	var pw *fakePower
	inBubble(t, func(m *made, o *Options) {
		pw = &fakePower{m: m}
		o.Power, o.Policy.Rules = pw, automatic("panic", "power-cycle")
		o.Agreement = agreementWith(t, guestUUID, access.Rights{
			Read: true, Write: true, Power: true, Actions: []string{heal.PowerCycle}, Rates: []access.Rate{{Action: heal.PowerCycle, Most: 2, Within: 3600}}})
		o.Interval = 500 * time.Millisecond
		for _, ago := range []time.Duration{2 * time.Hour, 30 * time.Minute, 30*time.Minute - time.Second} { // the last is a second plan of the same repair
			data, err := json.Marshal(map[string]any{"plan": map[string]any{"finding": "panic-1", "action": heal.PowerCycle}, "caller": "alice"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := o.Journal.Append(journal.Record{Time: time.Now().Add(-ago), Kind: "intent", Data: data}); err != nil {
				t.Fatal(err)
			}
		}
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		w.wait(time.Minute, "healing", ofKind(EventHealed, detect.KindPanic)) // the second within an hour
		time.Sleep(time.Minute)
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		ev := w.wait(time.Minute, "refusal", ofKind(EventFailed, detect.KindPanic))
		if !strings.Contains(ev.Text, "2 times within 1h0m0s, and it was begun 2 times; wait until") || len(pw.did) != 1 {
			t.Errorf("%s; did %v", ev.Text, pw.did)
		}
		w.wait(time.Second, "waiting", ofKind(EventWaiting, detect.KindPanic))
		var id string
		for _, f := range w.e.Findings() {
			if f.Kind == detect.KindPanic && f.Resolved == nil {
				id = f.ID
			}
		}
		if _, _, err := w.e.Heal(t.Context(), HealRequest{Finding: id, Action: heal.PowerCycle, Caller: "alice"}); !errors.Is(err, access.ErrDenied) || len(pw.did) != 1 {
			t.Errorf("an operator's order: %v; did %v", err, pw.did)
		}
	})
}

// cable is a packet path that does what it is told.
type cable struct{ c heal.Containment }

func (p *cable) Sample(now time.Time) (detect.NetworkSample, error) {
	return detect.NetworkSample{At: now}, nil
}
func (p *cable) Containment() (heal.Containment, error)              { return p.c, nil }
func (p *cable) Restore(_ context.Context, c heal.Containment) error { p.c = c; return nil }
func (p *cable) Contain(_ context.Context, o heal.NetworkOrder) (err error) {
	p.c = heal.Containment{}
	if o.Do == heal.Quarantine {
		p.c.Quarantine = time.Now().Add(o.For)
	}
	return nil
}

// An operator's orders to the packet path count for the agreement's rates, each by itself, and over a restart.
func TestAgreementRatesOfOrders(t *testing.T) {
	inBubble(t, func(m *made, o *Options) {
		o.Network = &cable{}
		o.Agreement = agreementWith(t, guestUUID, access.Rights{
			Read: true, Write: true, Actions: []string{heal.Quarantine, heal.Release}, Rates: []access.Rate{{Action: heal.Quarantine, Most: 3, Within: 3600}}})
		for range 2 { // by an earlier start, one right behind the other
			data, err := json.Marshal(map[string]any{"plan": map[string]any{"action": heal.Quarantine}, "caller": "alice"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := o.Journal.Append(journal.Record{Time: time.Now().Add(-time.Minute), Kind: "intent", Data: data}); err != nil {
				t.Fatal(err)
			}
		}
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		order := func(do string) error {
			o := heal.NetworkOrder{Do: do}
			if do == heal.Quarantine {
				o.For = time.Minute
			}
			_, err := w.e.Contain(t.Context(), o, "alice")
			return err
		}
		if err := errors.Join(order(heal.Quarantine), order(heal.Release)); err != nil {
			t.Fatal(err)
		}
		if err := order(heal.Quarantine); !errors.Is(err, access.ErrDenied) || w.e.contained() != nil {
			t.Errorf("the fourth quarantine within an hour: %v; %+v", err, w.e.contained())
		}
		time.Sleep(time.Hour)
		if err := order(heal.Quarantine); err != nil {
			t.Errorf("an hour later: %v", err)
		}
	})
}

// A detector that the agreement does not give does not judge, and the host's health is told without it.
func TestAgreementDetectors(t *testing.T) {
	for given, want := range map[string]bool{"panic": true, "oops": false} {
		inBubble(t, func(m *made, o *Options) {
			o.Agreement = agreementWith(t, guestUUID, access.Rights{Read: true, Actions: []string{}, Detectors: []string{given}})
		}, func(t *testing.T, m *made, w *watched) {
			w.wait(time.Second, "attach", ofType(EventAttached))
			time.Sleep(5 * time.Second)
			withheld := 0
			s := w.e.State()
			for _, d := range s.Detectors {
				if d.Withheld != (d.ID != given) || d.Withheld && (d.Runs > 0 || !strings.Contains(d.Error, "does not give the detector")) {
					t.Errorf("%q is given: %+v", given, d)
				}
				if d.Withheld {
					withheld++
				}
			}
			if withheld != len(s.Detectors)-1 || s.Health != Healthy {
				t.Errorf("%q is given: %d of %d detectors are withheld, and the host is healthy: %s", given, withheld, len(s.Detectors), s.Health)
			}
			m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
			time.Sleep(10 * time.Second)
			if fs := w.e.Findings(); (len(fs) == 1) != want {
				t.Errorf("%q is given, and the host panics: %+v", given, fs)
			}
		})
	}
}

func TestPowerCycleNotPermitted(t *testing.T) {
	var pw *fakePower
	inBubble(t, func(m *made, o *Options) {
		pw = &fakePower{m: m}
		o.Power, o.Agreement, o.Policy.Rules = pw, agreement(t, "7f1e5c1e-0001-4a6b-9d7a-0123456789ab", heal.PowerCycle), automatic("panic", "power-cycle")
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		if s := w.e.State(); s.Agreement == nil || !strings.Contains(s.Agreement.Denied, "is for host") {
			t.Errorf("agreement = %+v; want it denied for another host's", s.Agreement)
		}
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		ev := w.wait(5*time.Second, "failure", ofKind(EventFailed, detect.KindPanic))
		if len(pw.did) > 0 || !strings.Contains(ev.Text, "is for host") {
			t.Errorf("did %v: %s", pw.did, ev.Text)
		}
		w.wait(time.Second, "waiting", ofKind(EventWaiting, detect.KindPanic))
		if err := w.e.PowerControl(t.Context(), "off", "operator"); !errors.Is(err, access.ErrDenied) || len(pw.did) > 0 {
			t.Errorf("PowerControl = %v; did %v", err, pw.did)
		}
	})
}

func TestEscalation(t *testing.T) {
	var pw *fakePower
	inBubble(t, func(m *made, o *Options) {
		pw = &fakePower{m: m}
		o.Power, o.Agreement = pw, agreement(t, guestUUID, heal.KillProcess, heal.PowerCycle)
		o.Policy.Rules = []policy.Rule{{Finding: "runaway-process", Action: "kill-process", Mode: policy.Automatic, MaxPerHour: 5, Then: "power-cycle"}}
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		m.set(func(m *made) { m.spin = true })
		w.wait(10*time.Second, "runaway", ofKind(EventFinding, detect.KindRunawayProcess))
		// A made-up kernel has no memory to write to, so killing fails.
		w.wait(10*time.Second, "failure", ofKind(EventFailed, detect.KindRunawayProcess))
		w.wait(time.Second, "escalation", ofKind(EventEscalated, detect.KindRunawayProcess))
		w.wait(30*time.Second, "healing", ofKind(EventHealed, detect.KindRunawayProcess))
		if !slices.Equal(pw.did, []string{"cycle"}) {
			t.Errorf("did %v; want one cycle", pw.did)
		}
	})
}

// A process that ends by itself while its killing fails is no reason for harsher means.
func TestNoEscalationWhenItIsGone(t *testing.T) {
	var pw *fakePower
	inBubble(t, func(m *made, o *Options) {
		pw = &fakePower{m: m}
		o.Power, o.Agreement = pw, agreement(t, guestUUID, heal.KillProcess, heal.PowerCycle)
		o.Policy.Rules = []policy.Rule{{Finding: "runaway-process", Action: "kill-process", Mode: policy.Automatic, MaxPerHour: 5, Then: "power-cycle"}}
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		m.set(func(m *made) { m.spin = true })
		w.wait(10*time.Second, "runaway", ofKind(EventFinding, detect.KindRunawayProcess))
		m.set(func(m *made) { m.spin = false })
		w.wait(10*time.Second, "resolution", ofKind(EventResolved, detect.KindRunawayProcess))
		time.Sleep(30 * time.Second)
		if len(pw.did) > 0 {
			t.Errorf("did %v", pw.did)
		}
	})
}

// An agent that may only watch does not touch the power either, and what nobody may do here is no reason for harsher means.
func TestRefusalsDoNotEscalate(t *testing.T) {
	const other = "7f1e5c1e-0001-4a6b-9d7a-0123456789ab"
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, o *Options)
		want   error
		power  error // of an operator's order
	}{
		{"writes off", func(t *testing.T, o *Options) {
			o.Writes, o.Agreement = false, agreement(t, guestUUID, heal.KillProcess, heal.PowerCycle)
		}, ErrWritesOff, ErrWritesOff},
		{"no agreement", func(*testing.T, *Options) {}, access.ErrDenied, access.ErrDenied},
		{"another host's agreement", func(t *testing.T, o *Options) {
			o.Agreement = agreement(t, other, heal.KillProcess, heal.PowerCycle)
		}, access.ErrDenied, access.ErrDenied},
		{"ended agreement", func(t *testing.T, o *Options) {
			o.Agreement = agreement(t, guestUUID, heal.KillProcess, heal.PowerCycle)
			o.Agreement.Agreement().ValidUntil = time.Now().Add(-time.Second)
		}, access.ErrDenied, access.ErrDenied},
		{"paused agreement", func(t *testing.T, o *Options) {
			o.Agreement = agreement(t, guestUUID, heal.KillProcess, heal.PowerCycle)
			pause(t, o.Agreement)
		}, access.ErrDenied, access.ErrDenied},
		{"no journal", func(t *testing.T, o *Options) {
			o.Agreement, o.Journal = agreement(t, guestUUID, heal.PowerCycle), nil
		}, access.ErrDenied, access.ErrDenied},
		{"the milder action is not permitted", func(t *testing.T, o *Options) {
			o.Agreement = agreement(t, guestUUID, heal.PowerCycle)
		}, access.ErrDenied, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var pw *fakePower
			inBubble(t, func(m *made, o *Options) {
				pw = &fakePower{m: m}
				o.Power = pw
				o.Policy.Rules = []policy.Rule{{Finding: "runaway-process", Action: "kill-process", Mode: policy.Automatic, MaxPerHour: 5, Then: "power-cycle"}}
				tt.change(t, o)
			}, func(t *testing.T, m *made, w *watched) {
				w.wait(time.Second, "attach", ofType(EventAttached))
				m.set(func(m *made) { m.spin = true })
				w.wait(10*time.Second, "failure", ofKind(EventFailed, detect.KindRunawayProcess))
				w.wait(10*time.Second, "waiting", ofKind(EventWaiting, detect.KindRunawayProcess))
				time.Sleep(time.Minute)
				if tt.power != nil { // else power-cycle is permitted to an operator
					if _, out, err := w.e.Heal(t.Context(), HealRequest{Finding: "runaway-process-1", Action: heal.PowerCycle}); !errors.Is(err, tt.want) || out != nil && len(out.Steps) > 0 {
						t.Errorf("Heal by an operator = %+v, %v; want %v", out, err, tt.want)
					}
				}
				if _, _, err := w.e.Heal(t.Context(), HealRequest{Finding: "runaway-process-1"}); !errors.Is(err, tt.want) && tt.name != "no journal" {
					t.Errorf("Heal by an operator = %v; want %v", err, tt.want)
				}
				if len(pw.did) > 0 {
					t.Errorf("did %v; want nothing", pw.did)
				}
				if err := w.e.PowerControl(t.Context(), "off", "operator"); !errors.Is(err, tt.power) {
					t.Errorf("PowerControl = %v; want %v", err, tt.power)
				}
			})
		})
	}
}

// slowPower takes its time, and gives up when its context ends.
type slowPower struct {
	fakePower
	asked chan struct{}
}

func (p *slowPower) Cycle(ctx context.Context) error {
	close(p.asked)
	select {
	case <-time.After(5 * time.Second):
		return p.fakePower.do("cycle")
	case <-ctx.Done():
		p.did = append(p.did, "broken off")
		return ctx.Err()
	}
}

// A host whose power cycle is broken off half-way stays off: neither a client that hangs up nor the agent's end may do that.
func TestPowerOrdersAreSeenThrough(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(ctx context.Context, e *Engine) error
	}{
		{"operator", func(ctx context.Context, e *Engine) error { return e.PowerControl(ctx, "cycle", "alice") }},
		{"repair", func(ctx context.Context, e *Engine) error {
			_, _, err := e.Heal(ctx, HealRequest{Finding: "panic-1", Caller: "alice"})
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var pw *slowPower
			inBubble(t, func(m *made, o *Options) {
				pw = &slowPower{fakePower{m: m}, make(chan struct{})}
				o.Power, o.Agreement = pw, agreement(t, guestUUID, heal.PowerCycle)
			}, func(t *testing.T, m *made, w *watched) {
				m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
				w.wait(time.Second, "panic", ofKind(EventFinding, detect.KindPanic))
				ctx, hangUp := context.WithCancel(t.Context())
				ended := make(chan error)
				go func() { ended <- tt.do(ctx, w.e) }()
				<-pw.asked
				hangUp()
				<-ended
				if !slices.Equal(pw.did, []string{"cycle"}) {
					t.Errorf("did %v; want one whole cycle", pw.did)
				}
			})
		})
	}
}

// The end of the agent waits for a repair, which still has the host's memory to take back what it has stored.
func TestEndWaitsForRepair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &made{boot: 1, started: time.Now().Add(-time.Minute)}
		j, err := journal.Open(&memDevice{b: make([]byte, 1<<20)}, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		pw := &slowPower{fakePower{m: m}, make(chan struct{})}
		e := New(Options{
			Memory: m.memory, Writes: true, HostUUID: guestUUID, Journal: j, Power: pw,
			Agreement: agreement(t, guestUUID, heal.PowerCycle), Policy: policy.Policy{Version: 1, Rules: automatic("panic", "power-cycle")},
		})
		e.src = m
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		<-pw.asked
		cancel()
		<-done
		if !slices.Equal(pw.did, []string{"cycle"}) || m.closes != 1 {
			t.Errorf("did %v, memory closed %d times; want the cycle first, then the memory closed", pw.did, m.closes)
		}
	})
}

// A policy whose values do not fit its actions is refused when it is loaded, not when it is needed.
func TestCheckPolicyValues(t *testing.T) {
	for _, tt := range []struct {
		rule policy.Rule
		want string
	}{
		{policy.Rule{Finding: "exhaustion", Action: heal.SetSysctl, Set: &policy.Value{Name: "kernel.pid_max", Number: 1 << 20}, Mode: policy.Wait}, ""},
		{policy.Rule{Finding: "exhaustion", Action: heal.SetSysctl, Mode: policy.Wait}, "needs to be told what to set"},
		{policy.Rule{Finding: "exhaustion", Action: heal.SetSysctl, Set: &policy.Value{Name: "kernel.pid_max", Number: 3}, Mode: policy.Wait}, "give kernel.pid_max=301..4194304"},
		{policy.Rule{Finding: "exhaustion", Action: heal.RaiseLimit, Set: &policy.Value{Name: "kernel.pid_max", Number: 1 << 20}, Mode: policy.Wait}, "kernel.pid_max is what set-sysctl sets"},
		{policy.Rule{Finding: "exhaustion", Action: heal.RaiseLimit, Mode: policy.Automatic, MaxPerHour: 1, Then: heal.SetSysctl, ThenSet: &policy.Value{Name: "kernel.core_pattern"}}, `rules[0].then: set-sysctl: there is no "kernel.core_pattern"`},
	} {
		err := CheckPolicy(policy.Policy{Version: policy.Version, Rules: []policy.Rule{tt.rule}})
		if (err == nil) != (tt.want == "") || err != nil && (!errors.Is(err, policy.ErrInvalid) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%+v: %v; want %q", tt.rule, err, tt.want)
		}
	}
}

// The value of a policy's rule goes the same way as an operator's: the agreement bounds it.
func TestPolicyValue(t *testing.T) {
	inBubble(t, func(m *made, o *Options) {
		o.Agreement = agreementWith(t, guestUUID, access.Rights{Read: true, Write: true, Actions: []string{heal.SetSysctl},
			Values: []access.ValueRange{{Action: heal.SetSysctl, Name: "kernel.panic", Min: 1, Max: 3}}})
		o.Policy = policy.Policy{Version: policy.Version, Rules: []policy.Rule{
			{Finding: "panic", Action: heal.SetSysctl, Set: &policy.Value{Name: "kernel.panic", Number: 5}, Mode: policy.Automatic, MaxPerHour: 1},
		}}
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		ev := w.wait(time.Minute, "refusal", ofKind(EventFailed, detect.KindPanic))
		if !strings.Contains(ev.Text, `gives "set-sysctl" for kernel.panic 1 to 3, not 5`) {
			t.Errorf("%s", ev.Text)
		}
		w.wait(time.Minute, "the end of it", ofKind(EventWaiting, detect.KindPanic))
		time.Sleep(time.Second) // of the bubble: it is over
		// An operator who names the action only is given the policy's number, too.
		if _, _, err := w.e.Heal(t.Context(), HealRequest{Finding: "panic-1", Action: heal.SetSysctl}); !errors.Is(err, access.ErrDenied) || !strings.Contains(err.Error(), "not 5") {
			t.Errorf("by an operator: %v", err)
		}
		if _, _, err := w.e.Heal(t.Context(), HealRequest{Finding: "panic-1", Action: heal.SetSysctl, Value: &heal.Value{Name: "kernel.panic", Number: 2}}); errors.Is(err, access.ErrDenied) || err == nil {
			t.Errorf("with a number that is given: %v", err) // there is no kernel to plan for
		}
	})
}

func TestHealByOperator(t *testing.T) {
	var pw *fakePower
	inBubble(t, func(m *made, o *Options) {
		pw = &fakePower{m: m}
		o.Power, o.Agreement = pw, agreement(t, guestUUID, heal.PowerCycle)
	}, func(t *testing.T, m *made, w *watched) {
		w.wait(time.Second, "attach", ofType(EventAttached))
		ctx := t.Context()
		if _, _, err := w.e.Heal(ctx, HealRequest{Finding: "panic-1"}); !errors.Is(err, ErrNoFinding) {
			t.Errorf("Heal of nothing = %v; want ErrNoFinding", err)
		}
		m.set(func(m *made) { m.panicked, m.frozen = true, time.Now() })
		w.wait(time.Second, "panic", ofKind(EventFinding, detect.KindPanic))
		for _, tt := range []struct{ action, want string }{{"format-disk", "unknown"}, {"kill-process", "no remedy"}} {
			if _, out, err := w.e.Heal(ctx, HealRequest{Finding: "panic-1", Action: tt.action}); err == nil || out != nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Heal with %s = %v; want %q", tt.action, err, tt.want)
			}
		}
		for _, tt := range []struct {
			action string
			value  *heal.Value
			want   string
		}{
			{"", &heal.Value{Name: "kernel.core_pattern"}, `no action sets "kernel.core_pattern"`},
			{"", &heal.Value{Name: "kernel.panic", Number: -2}, "give kernel.panic=-1..86400"}, // its name says which action
			{heal.PowerCycle, &heal.Value{Name: "kernel.panic", Number: 1}, "kernel.panic is what set-sysctl sets"},
			{heal.SetSysctl, nil, "needs to be told what to set"},
		} {
			if _, out, err := w.e.Heal(ctx, HealRequest{Finding: "panic-1", Action: tt.action, Value: tt.value}); !errors.Is(err, heal.ErrValue) || out != nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Heal with %s, %v = %v; want %q", tt.action, tt.value, err, tt.want)
			}
		}
		if _, _, err := w.e.Heal(ctx, HealRequest{Finding: "panic-1", Value: &heal.Value{Name: "kernel.panic", Number: 1}}); !errors.Is(err, access.ErrDenied) {
			t.Errorf("Heal by what is not given = %v", err)
		}
		p, out, err := w.e.Heal(ctx, HealRequest{Finding: "panic-1", DryRun: true})
		if err != nil || out != nil || p.Action != "power-cycle" || len(p.Steps) != 1 || len(pw.did) > 0 {
			t.Errorf("dry run = %+v, %v, %v; did %v", p, out, err, pw.did)
		}
		pw.err = errors.New("BMC does not answer")
		if _, out, err := w.e.Heal(ctx, HealRequest{Finding: "panic-1", Caller: "alice"}); err == nil || out == nil || out.Caller != "alice" || out.Verified {
			t.Errorf("Heal with a broken controller = %+v, %v", out, err)
		}
		pw.err = nil
		busy := make(chan error)
		go func() {
			time.Sleep(time.Second)
			_, _, err := w.e.Heal(ctx, HealRequest{Finding: "panic-1"})
			busy <- err
		}()
		_, out, err = w.e.Heal(ctx, HealRequest{Finding: "panic-1", Caller: "alice"})
		if err != nil || !out.Verified {
			t.Errorf("Heal = %+v, %v", out, err)
		}
		if err := <-busy; !errors.Is(err, ErrBusy) {
			t.Errorf("a second healer = %v; want ErrBusy", err)
		}
		f, _ := w.e.Finding("panic-1")
		if f.Resolved == nil || !strings.HasPrefix(f.Resolution, "healed by "+out.Plan.ID) || len(f.Repairs) != 2 {
			t.Errorf("panic-1 = %+v; want it healed by the second repair", f)
		}
		if os := w.e.Outcomes("panic-1"); len(os) != 2 || os[0].Verified || !os[1].Verified {
			t.Errorf("Outcomes = %+v", os)
		}
		if err := w.e.PowerControl(ctx, "nmi", "alice"); err != nil || pw.did[len(pw.did)-1] != "nmi" {
			t.Errorf("PowerControl = %v; did %v", err, pw.did)
		}
	})
}

// A series of samples of a host with very many tasks stays within its bound, and still reaches as far back.
func TestThin(t *testing.T) {
	start := time.Unix(1000, 0)
	var samples []detect.TaskSample
	for i := range 500 {
		samples = thin(append(samples, detect.TaskSample{At: start.Add(time.Duration(i) * time.Second), Tasks: make([]kernel.Task, 100)}), 2000)
		if len(samples) > 20 {
			t.Fatalf("%d samples of 100 tasks are kept; want 2000 tasks at most", len(samples))
		}
		if i < 20 && len(samples) != i+1 {
			t.Fatalf("%d samples of %d are kept though there is room", len(samples), i+1)
		}
	}
	n := len(samples)
	if samples[0].At != start || samples[n-1].At != start.Add(499*time.Second) || samples[n-2].At != start.Add(498*time.Second) {
		t.Errorf("kept %v to %v; want the oldest and the newest two", samples[0].At, samples[n-1].At)
	}
	for i := 1; i < n; i++ {
		if gap := samples[i].At.Sub(samples[i-1].At); gap <= 0 || gap > 100*time.Second {
			t.Errorf("gap of %v between samples %d and %d of %d; want them spread", gap, i-1, i, n)
		}
	}
	if few := thin(samples[:3], 1); len(few) != 3 {
		t.Errorf("thin left %d samples; a judgement takes three", len(few))
	}
}

func TestInvalidOptions(t *testing.T) {
	if err := New(Options{}).Run(t.Context()); err == nil {
		t.Error("Run without memory succeeded")
	}
	m := &made{}
	for name, spoil := range map[string]func(*policy.Policy){
		"unknown action": func(p *policy.Policy) { p.Rules[0].Action = "format-disk" },
		"no remedy":      func(p *policy.Policy) { p.Rules[2].Action = heal.KillProcess },
		"no remedy then": func(p *policy.Policy) { p.Rules[3].Then = heal.KillProcess },
	} {
		p := policy.Default()
		spoil(&p)
		if err := New(Options{Memory: m.memory, Policy: p}).Run(t.Context()); !errors.Is(err, policy.ErrInvalid) {
			t.Errorf("%s: Run = %v; want policy.ErrInvalid", name, err)
		}
	}
}

// Beats are kept for a while, and longer where they show that the clock went back before the kernel was given up and sought anew.
func TestBeatsAreKept(t *testing.T) {
	w := watcher{e: New(Options{Memory: func(context.Context) (hostmem.Memory, error) { return nil, errors.ErrUnsupported }})}
	keep, _ := w.e.config.Keep()
	now := time.Unix(1_800_000_000, 0)
	add := func(d time.Duration, mono int64) {
		now = now.Add(d)
		w.addBeat(kernel.Heartbeat{At: now, Mono: mono, CPUs: make([]kernel.CPU, 1)})
	}
	for i := range int64(1000) {
		add(100*time.Millisecond, 600e9+i*100e6)
	}
	if n := len(w.beats); n < int(keep/(100*time.Millisecond)) || n > int(keep/(100*time.Millisecond))+3 {
		t.Errorf("%d beats of %v are kept", n, keep)
	}
	before := w.beats[len(w.beats)-1].Mono
	for range 10 { // until the kernel is given up
		add(50*time.Millisecond, before-6e9)
	}
	for i := range int64(40) {
		d := 100 * time.Millisecond
		if i == 0 {
			d = 10 * keep // the attach
		}
		add(d, before-6e9)
		if w.beats[0].Mono != before || len(w.beats) != int(i)+3 {
			t.Fatalf("%d beats, the first at %d; want %d at %d", len(w.beats), w.beats[0].Mono, i+3, before)
		}
	}
	for range 2 * backKept / (100 * time.Millisecond) {
		add(100*time.Millisecond, before-6e9)
	}
	if w.beats[0].Mono == before {
		t.Error("what shows that the clock went back is kept for ever")
	}
}
