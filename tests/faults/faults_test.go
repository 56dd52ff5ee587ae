// Package faults is the fault suite: it lets real kernels fall ill, each of its rows in another way, and measures whether
// the engine says so, who it accuses, how long that takes, and what becomes of the host. The truth comes from the harness.
//
// "go test" runs a few rows on one kernel; "make faults" all of them, and leaves the table as text, JSON and HTML in
// build/faults.
package faults

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"html/template"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

var (
	kernelsFlag = flag.String("kernels", "6.1", "comma-separated `kernels` to let fall ill")
	rowsFlag    = flag.String("rows", "oops,root-cred,hide-module,hide-task,hook-syscall,hook-fops,d-state,irqs-off", "comma-separated `faults`, or all")
	outFlag     = flag.String("out", "", "`directory` for the table as text, JSON and HTML")
	pathFlag    = flag.String("path", "window", "how memory is reached: window, or dma for the model of a DMA engine")
)

// fault is a row of the table.
type fault struct {
	name  string
	start string        // what the guest's init spawns; empty means the fault module's fault of that name
	want  []detect.Kind // any of them
	by    time.Duration // until the finding
	// heal is the action that an operator asks for, or that policy does by itself; empty if there is none: the host lives on
	// with it, or is restarted by the suite.
	heal string
	// dead says that the host is restarted by the repair.
	dead bool
	// do lets it happen from outside, instead of the guest.
	do func(b *bed)
	// quiet says that nothing is wrong with it: the row is red if anything is found before all of the kernel's code was compared
	// twice.
	quiet bool
	// after takes the fault back at the end of its row: a fault of the module.
	after string
	// truth asks the guest itself whether what the fault does is in force.
	truth func(b *bed) bool
}

// calls reports whether the rootkit's hook is called by what would call it.
func calls(provoke func(b *bed)) func(b *bed) bool {
	count := func(b *bed) string { return strings.SplitN(b.cat("/proc/bdfault"), "\n", 2)[0] }
	return func(b *bed) bool {
		before := count(b)
		provoke(b)
		return count(b) != before
	}
}

// halt is a function that no guest runs before its end; the bytes behind its beginning are no place that the kernel patches.
const halt, haltAt, haltLen = "kernel_halt", 16, 12

var haltWas = make([]byte, haltLen)

// at returns where a symbol lies in the file that is the guest's memory.
func (b *bed) at(symbol string, offset uint64) (kernel.VirtAddr, int64) {
	b.t.Helper()
	v, err := b.e.View(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	va, err := v.Image().Symbol(symbol)
	if err != nil {
		b.t.Fatal(err)
	}
	pa, err := v.Phys(va + kernel.VirtAddr(offset))
	if err != nil {
		b.t.Fatal(err)
	}
	return va, int64(pa)
}

// read reads the file that is the guest's memory.
func (b *bed) read(pa int64, n int) []byte {
	b.t.Helper()
	now := make([]byte, n)
	if _, err := b.g.Memory(false).ReadAt(now, pa); err != nil {
		b.t.Fatal(err)
	}
	return now
}

// word returns an entry of a table of pointers, address what an entry that leads to a function is.
func (b *bed) word(table string, i int) []byte {
	_, pa := b.at(table, uint64(8*i))
	return b.read(pa, 8)
}

func (b *bed) address(symbol string) []byte {
	va, _ := b.at(symbol, 0)
	return binary.LittleEndian.AppendUint64(nil, uint64(va))
}

// Rows are in an order in which each host can bear what came before.
var rows = []fault{
	{name: "fork-bomb", start: "bomb", want: []detect.Kind{detect.KindForkBomb}, by: 10 * time.Second, heal: heal.StopForkBomb},
	{name: "fork-bomb-root", start: "rootbomb", want: []detect.Kind{detect.KindForkBomb}, by: 10 * time.Second, heal: heal.StopForkBomb},
	{name: "memory-hog", start: "hog", want: []detect.Kind{detect.KindMemoryHog}, by: 20 * time.Second, heal: heal.KillProcess},
	{name: "memory-hog-exempt", start: "roothog", want: []detect.Kind{detect.KindMemoryHog}, by: 20 * time.Second, heal: heal.KillProcess},
	{name: "runaway", start: "spin", want: []detect.Kind{detect.KindRunawayProcess}, by: 20 * time.Second, heal: heal.KillProcess},
	{name: "patching", quiet: true, do: func(b *bed) {
		var done string
		b.g.Ask("patch", "patched", &done)
	}},
	{name: "root-cred", want: []detect.Kind{detect.KindTampering}, by: 10 * time.Second, heal: heal.KillProcess},
	{name: "hide-module", want: []detect.Kind{detect.KindTampering}, by: 10 * time.Second, heal: heal.RelinkHidden,
		truth: func(b *bed) bool { return !strings.Contains(b.cat("/proc/modules"), "bdfault") }},
	{name: "hide-task", want: []detect.Kind{detect.KindTampering}, by: 10 * time.Second, heal: heal.RelinkHidden,
		truth: func(b *bed) bool { return strings.Contains(b.cat("/proc/bdfault"), "listed=0") }},
	{name: "hook-syscall", want: []detect.Kind{detect.KindTampering}, by: 10 * time.Second, heal: heal.RestoreKernel,
		truth: func(b *bed) bool { return !bytes.Equal(b.word("sys_call_table", 62), b.address("__x64_sys_kill")) }},
	{name: "hook-fops", want: []detect.Kind{detect.KindTampering}, by: 10 * time.Second, heal: heal.RestoreKernel,
		truth: calls(func(b *bed) { b.cat("/proc") })},
	{name: "code", want: []detect.Kind{detect.KindTampering}, by: 40 * time.Second, heal: heal.RestoreKernel, do: func(b *bed) {
		_, pa := b.at(halt, haltAt)
		copy(haltWas, b.read(pa, haltLen))
		if _, err := b.g.Memory(true).WriteAt(bytes.Repeat([]byte{0xcc}, haltLen), pa); err != nil {
			b.t.Fatal(err)
		}
	}, truth: func(b *bed) bool { _, pa := b.at(halt, haltAt); return !bytes.Equal(b.read(pa, haltLen), haltWas) }},
	{name: "d-state", want: []detect.Kind{detect.KindHungTask}, by: 20 * time.Second},
	{name: "mutex-deadlock", want: []detect.Kind{detect.KindHungTask}, by: 20 * time.Second},
	{name: "wq-stall", want: []detect.Kind{detect.KindHungTask}, by: 20 * time.Second},
	{name: "wq-hog", want: []detect.Kind{detect.KindStuckWork}, by: 30 * time.Second, after: "wq-hog_off"},
	{name: "warn", want: []detect.Kind{detect.KindKernelWarning}, by: 10 * time.Second},
	{name: "oops", want: []detect.Kind{detect.KindOops}, by: 10 * time.Second},
	{name: "oops-jump", want: []detect.Kind{detect.KindOops}, by: 10 * time.Second},
	{name: "irqs-off", want: []detect.Kind{detect.KindCPUStall}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "spin-deadlock", want: []detect.Kind{detect.KindCPUStall}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "soft-lockup", want: []detect.Kind{detect.KindSoftLockup}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "rcu-stall", want: []detect.Kind{detect.KindSoftLockup, detect.KindRCUStall}, by: 40 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "irqs-off-all", want: []detect.Kind{detect.KindCPUStall}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "oops-irq", want: []detect.Kind{detect.KindPanic}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "stack-overflow", want: []detect.Kind{detect.KindPanic, detect.KindOops}, by: 20 * time.Second},
}

// result is what the table says of a fault on a kernel.
type result struct {
	Kernel   string        `json:"kernel"`
	Fault    string        `json:"fault"`
	Detector string        `json:"detector"` // empty: not detected
	Title    string        `json:"title"`
	Culprit  bool          `json:"culprit"` // it names the process, or says nothing of one where there is none
	Found    time.Duration `json:"found"`   // from the start of the fault, its process's start included
	Rung     string        `json:"rung"`    // the action that cured it; empty: none
	Healed   time.Duration `json:"healed"`  // from the finding to the verified cure, a restart's boot included
	Log      []string      `json:"log,omitempty"`
	Serving  bool          `json:"serving"` // the host's service answers afterwards
	Error    string        `json:"error,omitempty"`
}

// marker is what the module wants to see.
var marker = []string{"-fw_cfg", "name=opt/backdoor/faults,string=yes"}

func agreement(t *testing.T) *access.Agreement {
	t.Helper()
	owner, monitor := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)), ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32))
	pub := func(k ed25519.PrivateKey) access.Key { return access.Key(k.Public().(ed25519.PublicKey)) }
	a := &access.Agreement{
		Version: access.Version, ID: "faults", Host: access.Host{UUID: guest.UUID, Name: "guest"},
		Owner: access.Party{Name: "owner", Key: pub(owner)}, Monitors: []access.Party{{Name: "monitor", Key: pub(monitor)}},
		Rights:    access.Rights{Read: true, Write: true, Power: true, Actions: heal.IDs()},
		ValidFrom: time.Now().Add(-time.Hour), ValidUntil: time.Now().Add(24 * time.Hour),
	}
	for _, k := range []ed25519.PrivateKey{owner, monitor} {
		if err := a.Sign(k); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// power is the virtual machine's.
type power struct{ g *guest.Guest }

func (p power) State(context.Context) (string, error)  { return "on", nil }
func (p power) Cycle(context.Context) error            { p.g.Execute("system_reset"); return nil }
func (p power) On(context.Context) error               { return nil }
func (p power) Off(context.Context) error              { return heal.ErrInvalidPlan }
func (p power) NMI(context.Context) error              { p.g.Execute("inject-nmi"); return nil }
func (p power) GracefulShutdown(context.Context) error { return heal.ErrInvalidPlan }

// bed is a host and its engine.
type bed struct {
	t      *testing.T
	kernel string
	g      *guest.Guest
	e      *engine.Engine
	events <-chan engine.Event
	seen   []engine.Event
}

func newBed(t *testing.T, kernel string) *bed {
	t.Helper()
	b := &bed{t: t, kernel: kernel}
	b.g = guest.Start(t, kernel, guest.Options{Files: map[string][]byte{"bdfault.ko": guest.Module(t, kernel, "module", "bdfault")}, Args: marker})
	j, err := journal.OpenFile(filepath.Join(t.TempDir(), "journal"), 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	o := engine.Options{
		Memory: func(context.Context) (hostmem.Memory, error) {
			mem, err := hostmem.OpenRAMFile(b.g.RAM, hostmem.Q35Layout(uint64(b.g.MiB)<<20), true)
			if err != nil || *pathFlag != "dma" {
				return mem, err
			}
			return hostmem.NewEngine(mem, hostmem.EngineOptions{Seed: 1}), nil
		},
		Writes: true, Agreement: access.Hold(agreement(t)), Journal: j, Power: power{b.g},
		CacheDir: t.TempDir(),
		Policy: policy.Policy{Version: policy.Version, Detectors: policy.Detectors{
			RunawayFor: policy.Duration(3 * time.Second), RunawayShare: 0.5, HungFor: policy.Duration(4 * time.Second), WorkFor: policy.Duration(8 * time.Second),
		}},
	}
	if testing.Verbose() {
		o.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	b.e = engine.New(o)
	ctx, cancel := context.WithCancel(context.Background())
	b.events = b.e.Subscribe(ctx)
	done := make(chan struct{})
	go func() { b.e.Run(ctx); close(done) }()
	t.Cleanup(func() {
		cancel()
		<-done
		j.Close()
	})
	if _, err := b.wait(time.Minute, func(e engine.Event) bool { return e.Type == engine.EventAttached }); err != nil {
		t.Fatalf("attach: %v", err)
	}
	b.settle()
	for _, f := range b.e.Findings() {
		t.Errorf("a healthy host: %s: %s; %+v", f.Title, f.Detail, f.Evidence)
	}
	return b
}

// wait returns the first event from now on that fits.
func (b *bed) wait(d time.Duration, fits func(engine.Event) bool) (engine.Event, error) {
	late := time.After(d)
	for {
		select {
		case ev := <-b.events:
			b.seen = append(b.seen, ev)
			if fits(ev) {
				return ev, nil
			}
		case <-late:
			return engine.Event{}, fmt.Errorf("not within %v", d)
		}
	}
}

// settle waits until a host is old enough to be judged, and gives it the module.
func (b *bed) settle() {
	b.t.Helper()
	for end := time.Now().Add(time.Minute); b.e.State().Golden == nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatal("no golden copy is taken")
		}
	}
	var loaded string
	b.g.Ask("load bdfault.ko", "loaded", &loaded)
	for {
		var mono int64
		b.g.Ask("uptime", "mono", &mono)
		if mono > int64(14*time.Second) {
			return
		}
		time.Sleep(time.Duration(14*int64(time.Second) - mono))
	}
}

// cat reads a file of the guest.
func (b *bed) cat(file string) (text string) {
	b.t.Helper()
	b.g.Ask("cat "+file, "text", &text)
	return text
}

// silent waits until all of the kernel's code was compared twice, and nothing was found.
func (b *bed) silent(r result) result {
	rounds := func() int {
		if g := b.e.State().Golden; g != nil {
			return g.Rounds
		}
		return 0
	}
	to := rounds() + 2
	for end := time.Now().Add(3 * time.Minute); rounds() < to; {
		if ev, err := b.wait(time.Second, func(e engine.Event) bool { return e.Type == engine.EventFinding }); err == nil {
			r.Error = fmt.Sprintf("a false finding: %s: %s; %+v", ev.Finding.Title, ev.Finding.Detail, ev.Finding.Evidence)
			return r
		}
		if time.Now().After(end) {
			r.Error = "the kernel's code is not compared in time"
			return r
		}
	}
	r.Culprit, r.Serving = true, true
	return r
}

// run lets a fault happen.
func (b *bed) run(f fault) (r result) {
	r = result{Kernel: b.kernel, Fault: f.name}
	start := f.start
	if start == "" {
		start = "fault=" + f.name
	}
	bystander := b.g.Spawn("sleep")
	before := b.g.Complaints()
	for len(b.events) > 0 {
		b.seen = append(b.seen, <-b.events)
	}
	began := time.Now()
	pid := 0
	if f.quiet {
		f.do(b)
		return b.silent(r)
	}
	if f.do != nil {
		f.do(b)
	} else {
		b.g.Say("spawn " + start) // which may be the last that it ever does
	}
	ev, err := b.wait(f.by, func(e engine.Event) bool {
		return e.Type == engine.EventFinding && slices.Contains(f.want, e.Finding.Kind)
	})
	if err != nil {
		r.Error = "not found: " + err.Error()
		return r
	}
	found := *ev.Finding
	b.t.Logf("%s: %s; %s; %+v %+v", f.name, found.Title, found.Detail, found.Culprit, found.Evidence)
	r.Detector, r.Title, r.Found = string(found.Kind), found.Title, ev.At.Sub(began)
	if f.do == nil && !f.dead && found.Kind != detect.KindPanic {
		pid = b.g.Answer("pid")
	}
	switch {
	case f.start != "" && f.start != "bomb" && f.start != "rootbomb", f.name == "root-cred", f.name == "hide-task", f.name == "d-state":
		r.Culprit = found.Culprit.TGID == pid || found.Culprit.PID == pid
	case f.dead:
		r.Culprit = found.Culprit.CPU != nil
	default:
		r.Culprit = true
	}
	if f.truth != nil && !f.truth(b) {
		r.Error = "the fault is not in force"
		return r
	}
	if f.heal != "" {
		_, out, err := b.e.Heal(b.t.Context(), engine.HealRequest{Finding: found.ID, Action: f.heal, Caller: "suite"})
		switch {
		case err != nil:
			r.Error = err.Error()
		case !out.Verified:
			r.Error = "not verified"
		default:
			r.Rung, r.Healed = f.heal, time.Since(ev.At)
		}
		if err == nil && f.truth != nil && f.truth(b) {
			r.Error = "the fault is still in force"
		}
		if f.dead && err == nil {
			b.g.WaitReady()
			b.settle()
			r.Serving = true // that of the new boot
			return r
		}
		if f.dead {
			return r
		}
	}
	if found.Kind == detect.KindPanic {
		return r
	}
	var mono int64
	b.g.Ask("uptime", "mono", &mono)
	v, err := b.e.View(b.t.Context())
	if err != nil {
		r.Error = err.Error()
		return r
	}
	for task, err := range v.Tasks() {
		r.Serving = r.Serving || err == nil && task.PID == bystander && task.State != "Z"
	}
	if f.after != "" {
		b.g.Spawn("fault=" + f.after)
	}
	if !strings.HasPrefix(f.name, "oops") && f.name != "stack-overflow" && f.name != "warn" {
		after := b.g.Complaints()
		r.Log = after[min(len(before), len(after)):]
	}
	return r
}

func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("boots kernels in QEMU and lets them fall ill: not with -short")
	}
	var all []result
	for _, kernel := range strings.Split(*kernelsFlag, ",") {
		t.Run(kernel, func(t *testing.T) {
			b := newBed(t, kernel)
			for _, f := range rows {
				if *rowsFlag != "all" && !slices.Contains(strings.Split(*rowsFlag, ","), f.name) {
					continue
				}
				r := b.run(f)
				if s := b.e.State(); s.Golden != nil {
					t.Logf("the engine's share of a CPU: %.3f; %.1f MB/s, of which tables of functions 2 x %d kB", s.LastPass.Load, s.LastPass.BytesPerSec/1e6, s.Golden.Hot>>10)
				}
				t.Logf("%+v", r)
				all = append(all, r)
				switch {
				case r.Error != "":
					t.Errorf("%s: %s", f.name, r.Error)
				case !r.Culprit:
					t.Errorf("%s: the wrong one is accused: %s", f.name, r.Title)
				case len(r.Log) > 0:
					t.Errorf("%s: the host's kernel complains: %q", f.name, r.Log)
				case !r.Serving && f.name != "stack-overflow":
					t.Errorf("%s: the host's service does not answer", f.name)
				}
				if r.Error != "" {
					for _, ev := range b.seen[max(0, len(b.seen)-20):] {
						t.Logf("%s %s %s", ev.At.Format("05.000"), ev.Type, ev.Text)
					}
					if f.dead {
						break // nobody knows what has become of it
					}
				}
			}
		})
	}
	text := table(all)
	t.Logf("\n%s", text)
	if *outFlag != "" {
		if err := write(*outFlag, all, text); err != nil {
			t.Error(err)
		}
	}
}

// The module is for the suite's machines only.
func TestModuleWantsMarker(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a kernel in QEMU: not with -short")
	}
	g := guest.Start(t, "6.1", guest.Options{Files: map[string][]byte{"bdfault.ko": guest.Module(t, "6.1", "module", "bdfault")}})
	var why string
	g.Ask("load bdfault.ko", "error", &why)
	if !strings.Contains(why, "not permitted") {
		t.Errorf("without the marker the module says %q", why)
	}
}

func table(rs []result) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "kernel\tfault\tfound by\tafter\thealed by\tafter\tlog clean\tserving")
	ms := func(d time.Duration) string {
		if d == 0 {
			return "-"
		}
		return d.Round(time.Millisecond).String()
	}
	for _, r := range rs {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%v\t%v\n", r.Kernel, r.Fault, or(r.Detector, "nobody"), ms(r.Found), or(r.Rung, "-"), ms(r.Healed), len(r.Log) == 0, r.Serving)
	}
	w.Flush()
	return b.String()
}

func or(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

var page = template.Must(template.New("").Parse(`<!doctype html>
<meta charset="utf-8"><title>Fault suite</title>
<style>body{font:14px sans-serif}td,th{padding:2px 10px;text-align:left}tr:nth-child(even){background:#eee}</style>
<h1>Fault suite, {{.When}}</h1>
<table><tr><th>kernel<th>fault<th>found by<th>what it says<th>after<th>healed by<th>after<th>log clean<th>serving
{{range .Rows}}<tr><td>{{.Kernel}}<td>{{.Fault}}<td>{{.Detector}}<td>{{.Title}}{{.Error}}<td>{{.Found}}<td>{{.Rung}}<td>{{.Healed}}<td>{{not .Log}}<td>{{.Serving}}
{{end}}</table>
`))

func write(dir string, rs []result, text string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(rs, "", "  ")
	if err != nil {
		return err
	}
	var html bytes.Buffer
	if err := page.Execute(&html, map[string]any{"When": time.Now().UTC().Format(time.RFC3339), "Rows": rs}); err != nil {
		return err
	}
	for name, data := range map[string][]byte{"faults.txt": []byte(text), "faults.json": append(b, '\n'), "faults.html": html.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}
