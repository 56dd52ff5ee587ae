package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	testUser     = "root"
	testPassword = "correct horse"
)

var bootTime = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// fakeAgent is an agent whose host is a set of variables.
type fakeAgent struct {
	mu       sync.Mutex // guards what follows
	state    engine.State
	findings []detect.Finding
	power    string // "" says that the controller does not answer
	noPower  bool
	denied   error
	ops      []string
	healErr  error
	verified bool
	undone   bool

	controller *fakeController // nil if there is none
	lock       *access.Lock    // nil if no owner is trusted
	stores     []engine.StoreRequest
	attestor   Attestor      // nil: the machine has no TPM
	network    *fakeNetwork  // nil if there is nothing to configure
	image      *kernel.Image // what listings are made of; nil if the agent is not attached
	orders     []heal.NetworkOrder
	contained  *heal.Containment
}

func newFakeAgent() *fakeAgent {
	one := 1
	resolved := bootTime.Add(10 * time.Minute)
	return &fakeAgent{
		power: "on", verified: true, controller: newFakeController(),
		state: engine.State{
			Phase: engine.Attached, Since: bootTime.Add(time.Minute), Started: bootTime, Health: engine.Ill, HostUUID: "9f2c3b1a-0d4e-4f6a-8b7c-1e2d3c4b5a69",
			Kernel: &kernel.Info{
				Arch: "x86_64", Release: "6.1.0-18-amd64", Banner: "Linux version 6.1.0-18-amd64", Hostname: "patient", CPUs: 2, BootTime: bootTime,
				Rungs: []kernel.Rung{{Name: "vmcoreinfo", OK: true, Detail: "found", Duration: time.Second}}, KASLR: 0xffffffff,
			},
			Detectors: []engine.DetectorStatus{{ID: "panic", Title: "Kernel panic", Health: engine.Healthy, Runs: 7}},
			Agreement: &engine.AgreementState{ID: "a1", Owner: "owner", Monitors: []string{"m"}, Rights: access.Rights{Read: true}},
			Attaches:  1, Passes: 42, Writes: true,
		},
		findings: []detect.Finding{
			{
				ID: "runaway-process-2", Key: "412@3.2s", Kind: detect.KindRunawayProcess, Severity: detect.Critical, Title: "stress (412) eats CPU 1",
				Detail: "It has used 98 % of a CPU for 30 s.", Culprit: detect.Culprit{CPU: &one, PID: 412, TGID: 412, Comm: "stress"},
				Evidence: []detect.Evidence{{What: "share", Value: "98 %"}}, Confidence: 0.95, FirstSeen: bootTime.Add(5 * time.Minute), LastSeen: bootTime.Add(6 * time.Minute),
				Action: "kill-process",
			},
			{
				ID: "cpu-stall-1", Kind: detect.KindCPUStall, Severity: detect.Warning, Title: "CPU 0 stalled", Detail: "No progress for 12 s.",
				FirstSeen: bootTime.Add(2 * time.Minute), LastSeen: bootTime.Add(3 * time.Minute), Resolved: &resolved, Resolution: "It went away.",
			},
		},
	}
}

func (a *fakeAgent) State() engine.State {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.state
	s.Contained = a.contained
	return s
}

func (a *fakeAgent) Findings() []detect.Finding {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]detect.Finding(nil), a.findings...)
}

func (a *fakeAgent) Finding(id string) (detect.Finding, bool) {
	for _, f := range a.Findings() {
		if f.ID == id {
			return f, true
		}
	}
	return detect.Finding{}, false
}

// Outcomes has one for the finding that went away.
func (a *fakeAgent) Outcomes(finding string) []heal.Outcome {
	if finding != "cpu-stall-1" {
		return nil
	}
	return []heal.Outcome{{Plan: heal.Plan{ID: "plan-0", Action: "kill-process", Finding: finding, Made: bootTime}, Caller: "policy", Started: bootTime, Finished: bootTime, Verified: true}}
}

func (a *fakeAgent) Heal(ctx context.Context, r engine.HealRequest) (heal.Plan, *heal.Outcome, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.healErr != nil {
		return heal.Plan{}, nil, a.healErr
	}
	p := heal.Plan{
		ID: "plan-1", Action: "kill-process", Finding: r.Finding, Title: "Kill stress (412)", Risk: heal.RiskTask, Made: bootTime, Value: r.Value,
		Calls: []heal.Call{{Function: "do_send_sig_info", Addr: 0xffffffff81000000, Context: "timer tick of CPU 1", Purpose: "sends SIGKILL"}},
		Steps: []heal.Step{{Op: heal.OpArm, Why: "arm", Addr: 0x1000, Expect: heal.Bytes{1, 2}, Put: heal.Bytes{3, 4}}},
	}
	if err := p.Agreed(r.Agreed); err != nil || r.DryRun {
		return p, nil, err
	}
	return p, &heal.Outcome{
		Plan: p, Caller: r.Caller, Started: bootTime, Finished: bootTime.Add(time.Second), Verified: a.verified,
		Steps:         []heal.StepOutcome{{Step: 0, Started: bootTime, Took: time.Millisecond, How: "compare-and-swap"}},
		HostFunctions: []heal.FunctionRun{{Call: p.Calls[0], Runs: 1, Confirmed: true}},
	}, nil
}

// Undo can take back what Outcomes has, once.
func (a *fakeAgent) Undo(_ context.Context, r engine.UndoRequest) (heal.Plan, *heal.Outcome, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.denied != nil {
		return heal.Plan{}, nil, a.denied
	}
	if r.Finding != "cpu-stall-1" || a.undone {
		return heal.Plan{}, nil, fmt.Errorf("take back the repair of %s: %w", r.Finding, engine.ErrNoUndo)
	}
	p := heal.Plan{ID: "plan-2", Action: heal.ContinueProcess, Finding: r.Finding, Title: "Continue stress (412)", Risk: heal.RiskTask, Made: bootTime}
	if err := p.Agreed(r.Agreed); err != nil || r.DryRun {
		return p, nil, err
	}
	a.undone = true
	return p, &heal.Outcome{Plan: p, Caller: r.Caller, Started: bootTime, Finished: bootTime.Add(time.Second), Verified: true}, nil
}

func (a *fakeAgent) View(ctx context.Context) (*kernel.View, error) {
	if a.image == nil {
		return nil, engine.ErrNotAttached
	}
	return a.image.View(ctx), nil
}

func (a *fakeAgent) Power() heal.Power {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.noPower {
		return nil
	}
	return fakePower{a}
}

func (a *fakeAgent) PowerControl(_ context.Context, op, caller string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.denied != nil {
		return a.denied
	}
	a.ops = append(a.ops, op+" by "+caller)
	switch op {
	case heal.OrderPause:
		a.power = "paused"
	case heal.OrderResume:
		a.power = "on"
	case "on", heal.OrderReset, heal.OrderPowerCycle, heal.OrderRestart:
		a.power = "on"
		if a.controller != nil {
			a.controller.booted()
		}
	case "off", "shutdown", heal.OrderButton:
		a.power = "off"
	}
	return nil
}

func (a *fakeAgent) Control(ctx context.Context, what, detail, caller string, do func(context.Context) error) error {
	a.mu.Lock()
	a.ops = append(a.ops, what+": "+detail+" by "+caller)
	denied := a.denied
	a.mu.Unlock()
	if denied != nil {
		return denied
	}
	return do(ctx)
}

func (a *fakeAgent) Obey(o *access.Order, _ string) error { return a.lock.Obey(o) }

func (a *fakeAgent) Offer(g *access.Agreement, _ string) error { return a.lock.Offer(g) }

// Recording knows that of "memory-hog-1", and that of now.
func (a *fakeAgent) Recording(_ context.Context, finding string) ([]byte, error) {
	if finding != "" && finding != "memory-hog-1" {
		return nil, fmt.Errorf("recording of %q: %w", finding, engine.ErrNoRecording)
	}
	return []byte("series of " + finding), nil
}

func (a *fakeAgent) MayRead() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.denied
}

func (a *fakeAgent) MayLease(hostmem.Range, bool) error { return a.MayRead() }

// Store takes what is expected to be there for granted only where nothing was stored before.
func (a *fakeAgent) Store(_ context.Context, r engine.StoreRequest) (heal.Outcome, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.denied != nil {
		return heal.Outcome{}, a.denied
	}
	for _, s := range slices.Backward(a.stores) {
		if s.Addr == r.Addr && !bytes.Equal(s.Put, r.Expect) {
			return heal.Outcome{}, heal.ErrMismatch
		}
		if s.Addr == r.Addr {
			break
		}
	}
	a.stores = append(a.stores, r)
	return heal.Outcome{Plan: heal.Plan{ID: "plan-9"}, Finished: bootTime, Steps: []heal.StepOutcome{{How: "compare-and-swap"}}}, nil
}

// fakePower tells the state; orders go through PowerControl.
type fakePower struct{ a *fakeAgent }

func (p fakePower) State(context.Context) (string, error) {
	p.a.mu.Lock()
	defer p.a.mu.Unlock()
	if p.a.power == "" {
		return "", errors.New("no answer")
	}
	return p.a.power, nil
}
func (fakePower) Orders() []string {
	return []string{heal.OrderReset, heal.OrderPowerCycle, heal.OrderRestart, heal.OrderButton, heal.OrderPause, heal.OrderResume, heal.OrderSuspend}
}
func (fakePower) Order(context.Context, string) error    { return errors.New("not by this way") }
func (fakePower) Cycle(context.Context) error            { return errors.New("not by this way") }
func (fakePower) On(context.Context) error               { return errors.New("not by this way") }
func (fakePower) Off(context.Context) error              { return errors.New("not by this way") }
func (fakePower) NMI(context.Context) error              { return errors.New("not by this way") }
func (fakePower) GracefulShutdown(context.Context) error { return errors.New("not by this way") }

// fakeView is a host with three tasks and a log.
type fakeView struct{ records int }

func (fakeView) Tasks() iter.Seq2[kernel.Task, error] {
	return func(yield func(kernel.Task, error) bool) {
		for i, comm := range []string{"init", "sshd", "stress"} {
			if !yield(kernel.Task{PID: i + 1, TGID: i + 1, Comm: comm, State: "S", UID: 0, RSS: 4096, Confident: true, Addr: 0xffff888000000000}, nil) {
				return
			}
		}
	}
}

func (fakeView) Heartbeat() (kernel.Heartbeat, error) {
	return kernel.Heartbeat{At: bootTime.Add(time.Minute), Jiffies: 1000, Mono: 1e9, CPUs: make([]kernel.CPU, 2)}, nil
}

func (fakeView) Confidence() kernel.Confidence { return kernel.Confidence{Objects: 1} }

func (fakeView) Panic() (kernel.PanicState, error) { return kernel.PanicState{CPU: -1}, nil }

func (v fakeView) Log() iter.Seq2[kernel.LogRecord, error] {
	return func(yield func(kernel.LogRecord, error) bool) {
		for i := range v.records {
			if !yield(kernel.LogRecord{Seq: uint64(i), Time: time.Duration(i) * time.Second, Level: uint8(i % 8), Text: fmt.Sprintf("line %d", i)}, nil) {
				return
			}
		}
	}
}

// fakeJournal has two records.
type fakeJournal struct{}

func (fakeJournal) Records() iter.Seq2[journal.Record, error] {
	return func(yield func(journal.Record, error) bool) {
		_ = yield(journal.Record{Restart: 1 << 63, Seq: 1, Time: bootTime, Kind: "finding", Data: json.RawMessage(`{"id":"runaway-process-2"}`)}, nil) &&
			yield(journal.Record{Restart: 1 << 63, Seq: 2, Time: bootTime, Kind: "intent"}, nil)
	}
}

// fakeController is the service processor of a host: a boot override and two drives.
type fakeController struct {
	mu       sync.Mutex // guards what follows
	resets   []schema.ResetType
	boot     schema.Boot
	watchdog *schema.WatchdogTimer
	image    map[string]*string
	silent   bool
}

func newFakeController() *fakeController {
	return &fakeController{
		boot:  schema.Boot{BootSourceOverrideEnabled: "Disabled", BootSourceOverrideTarget: "None", BootSourceOverrideMode: "UEFI"},
		image: map[string]*string{"Cd": nil, "Usb": nil},
	}
}

func (c *fakeController) Describe(context.Context) (Machine, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.silent {
		return Machine{}, errors.New("no answer")
	}
	b := c.boot
	b.BootSourceOverrideEnabledAllowable = []string{"Disabled", "Once", "Continuous"}
	b.BootSourceOverrideTargetAllowable = []string{"None", "Pxe", "Hdd", "Cd"}
	b.BootSourceOverrideModeAllowable = []string{"UEFI", "Legacy"}
	m := Machine{Manufacturer: "Maker", Model: "M1", SerialNumber: "S1", BIOSVersion: "B1", Resets: c.resets, Boot: &b, Watchdog: c.watchdog}
	for _, id := range []string{"Cd", "Usb"} {
		in, via := c.image[id] != nil, "NotConnected"
		if in {
			via = "URI"
		}
		v := schema.VirtualMedia{MediaTypes: []string{"CD", "DVD"}, Image: c.image[id], Inserted: &in, WriteProtected: &in, ConnectedVia: via}
		v.Resource = schema.Resource{ID: id, Name: "Drive " + id, ODataID: "/redfish/v1/elsewhere/" + id}
		m.Media = append(m.Media, v)
	}
	return m, nil
}

func (c *fakeController) SetBoot(_ context.Context, to schema.Boot) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range []struct {
		is *string
		to string
	}{
		{&c.boot.BootSourceOverrideEnabled, to.BootSourceOverrideEnabled}, {&c.boot.BootSourceOverrideTarget, to.BootSourceOverrideTarget},
		{&c.boot.BootSourceOverrideMode, to.BootSourceOverrideMode},
	} {
		if f.to != "" {
			*f.is = f.to
		}
	}
	return nil
}

// booted ends an override that was for one boot.
func (c *fakeController) booted() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.boot.BootSourceOverrideEnabled == "Once" {
		c.boot.BootSourceOverrideEnabled, c.boot.BootSourceOverrideTarget = "Disabled", "None"
	}
}

func (c *fakeController) InsertMedia(_ context.Context, id string, m Insertion) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.image[id] = &m.Image
	return nil
}

func (c *fakeController) EjectMedia(_ context.Context, id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.image[id] = nil
	return nil
}

// testHardware is a host of one socket with two interfaces and some RAM.
var testHardware = Hardware{
	Processors: []kernel.Processor{{Vendor: "GenuineIntel", Model: "Test CPU", Family: 6, Number: 85, Cores: 1, Threads: 2}},
	Interfaces: []kernel.Interface{
		{Name: "lo", Index: 1, Init: true, Type: 772, Flags: 1},
		{
			Name: "eth0", Index: 2, Init: true, Type: 1, MAC: "52:54:00:12:34:56", MTU: 1500, Flags: 1, Carrier: true, Driver: "virtio_net", Device: "virtio0",
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24"), netip.MustParsePrefix("fe80::1/64")},
		},
		{Name: "eth1", Index: 3, Init: true, Type: 1, MAC: "52:54:00:12:34:57", MTU: 1500, Flags: 1},
		{Name: "a b", Index: 4, Init: true, Type: 1, MAC: "52:54:00:12:34:58", MTU: 1500},
	},
	DIMMs: []DIMM{{ID: "dimm0", Locator: "DIMM 0", Bank: "BANK A", Bytes: 512 << 20, Type: 0x1a, Handle: 0x1100}, {ID: "dimm1", Locator: "DIMM 1"}},
	Disks: []kernel.Disk{{Name: "sda", Size: 8 << 30}, {Name: "nvme0n1", Size: 1 << 40}},
	PCI: []kernel.PCIDevice{
		{Name: "0000:00:1f.0", Vendor: 0x8086, Device: 0x2918, Class: 0x060100, Revision: 2, Driver: "lpc_ich"},
		{Name: "0000:00:1f.2", Vendor: 0x8086, Device: 0x2922, SubVendor: 0x1af4, SubDevice: 0x1100, Class: 0x010601, Revision: 2, Driver: "ahci"},
		{Name: "0001:3b:00.0", Vendor: 0x15b3, Device: 0x101e, Class: 0x020000, Virtual: true},
	},
	Controllers: []kernel.MemoryController{{Name: "test", Correctable: 4, CorrectableUnplaced: 1, Modules: []kernel.ECCCounter{{Label: "mc#0", Handle: 0x1100, Correctable: 3}}}},
	RAM:         []hostmem.Range{{Start: 0x1000, Size: 0x9e000}, {Start: 1 << 20, Size: 511 << 20}},
}

// testMemory is RAM in which each byte tells its address.
type testMemory struct{}

func (testMemory) ReadAt(b []byte, off int64) (int, error) {
	for i := range b {
		b[i] = byte((off + int64(i)) >> 4)
	}
	return len(b), nil
}

// newTestService returns a service with the resources of a fake agent's host.
func newTestService(t testing.TB, a *fakeAgent, o service.Options) *service.Service {
	t.Helper()
	return newTestServiceWith(t, a, o, func(*Options) {})
}

// newTestServiceWith is newTestService with other options of the resources.
func newTestServiceWith(t testing.TB, a *fakeAgent, o service.Options, change func(*Options)) *service.Service {
	t.Helper()
	if o.Account == nil {
		o.Account = &service.Credential{User: testUser, Password: testPassword}
	}
	if o.Limits.Hash == (service.HashCost{}) {
		o.Limits.Hash = service.HashCost{Memory: 64, Passes: 1}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	Configure(&o)
	s, err := service.New(o)
	if err != nil {
		t.Fatal(err)
	}
	var controller Controller
	if a.controller != nil {
		controller = a.controller
	}
	var network Network
	if a.network != nil {
		network = a.network
	}
	ho := Options{
		Agent: a, Attestor: a.attestor, Network: network, Controller: controller, Journal: fakeJournal{}, DumpDir: filepath.Join(t.TempDir(), "dumps"),
		Hardware: func(context.Context) (Hardware, error) { return testHardware, nil },
		Memory: func(context.Context) (io.ReaderAt, []hostmem.Range, error) {
			return testMemory{}, testHardware.RAM, nil
		}, Version: "1.0.0", ResetAgent: func(context.Context, bool) error { return nil },
		View: func(context.Context) (query.View, error) { return fakeView{records: 700}, nil },
	}
	ho.RDMA, ho.Datapath = &fakeRDMA{}, fakeDatapath{}
	change(&ho)
	s.Handle(Routes(s, ho)...)
	return s
}

var serve = flag.String("serve", "", "address to serve the resources of a fake host at, for validators, until the file stop appears beside the test; user root, password \"correct horse\"")

// TestServe serves for tools that are started by hand; see the flag.
func TestServe(t *testing.T) {
	if *serve == "" {
		t.Skip("only with -serve ADDRESS: it serves a fake host for validators")
	}
	a := newFakeAgent()
	a.image = recordedKernel(t)
	a.attestor = newTestTPM(t)
	a.network = &fakeNetwork{s: NetworkSettings{HostName: "dpu.example.com", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}}}
	s := newTestService(t, a, service.Options{
		StateDir: os.Getenv("SERVE_STATE"), Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Updater: fakeUpdater{}, Conditions: Conditions(a.Findings), Names: []string{"dpu.example.com"},
		Reach: func(netip.Addr) bool { return true }, // validators listen on loopback
	})
	l, err := net.Listen("tcp", *serve)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if d, ok := t.Deadline(); ok {
		ctx, cancel = context.WithDeadline(ctx, d.Add(-2*time.Second))
		defer cancel()
	}
	if err := s.Serve(ctx, l); err != nil {
		t.Fatal(err)
	}
}

// fakeUpdater throws images away.
type fakeUpdater struct{}

func (fakeUpdater) MaxImage() int64 { return 1 << 30 }

func (fakeUpdater) Inventory(context.Context) ([]*schema.SoftwareInventory, error) {
	return []*schema.SoftwareInventory{{
		Resource: schema.Resource{ID: "a", Name: "Slot A"}, Version: "1.0.0", Manufacturer: "Backdoor", Updateable: true,
		RelatedItem: []schema.Link{{ID: "/redfish/v1/Managers/bmc"}}, Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
	}}, nil
}

func (fakeUpdater) Install(_ context.Context, image io.Reader, _ service.UpdateOptions, _ func(int, string, ...string)) error {
	_, err := io.Copy(io.Discard, image)
	return err
}
