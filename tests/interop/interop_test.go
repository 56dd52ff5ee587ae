package interop

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bmc-toolbox/bmclib/v2"
	"github.com/stmcginnis/gofish"

	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/native"
)

const systemURI = "/redfish/v1/Systems/system"

// fleet is an agent with its host, and a server with an image.
type fleet struct {
	lab   *lab.Lab
	agent *native.Agent
	image string // URI

	memory *client.Client // of the user who may have raw memory; nil until it is needed
}

// TestFleet starts one host and one agent and lets every client at them.
func TestFleet(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a virtual machine: left out with -short")
	}
	ctx := t.Context()
	l, err := lab.Up(ctx, lab.Config{NoDPU: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	programs, err := native.Build(ctx, "../..", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ca := filepath.Join(dir, "bmc-ca.pem")
	if err := os.WriteFile(ca, l.BMC.CA, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := native.Start(ctx, native.Options{
		Program: programs.Backdoord, Dir: filepath.Join(dir, "agent"), Host: l.Host,
		Change: func(c *config.Config) {
			c.HostBMC = &config.HostBMC{URL: l.BMC.URL, Username: l.BMC.User, Password: l.BMC.Password, CAFile: ca}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Stop()
	if _, err := a.WaitAttached(ctx, 1); err != nil {
		t.Fatal(err)
	}
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "x.iso", time.Time{}, strings.NewReader("an image"))
	}))
	defer files.Close()
	f := &fleet{lab: l, agent: a, image: files.URL + "/x.iso"}
	defer func() {
		if f.memory != nil {
			_ = f.memory.Close(ctx)
		}
	}()
	t.Run("truth", f.testTruth)
	t.Run("memory", f.testMemory)
	t.Run("pause", f.testPause)
	t.Run("bmclib", f.testBMClib)
	t.Run("gofish", f.testGofish)
	t.Run("redfishtool", f.testRedfishtool)
	t.Run("sushy", f.testSushy)
	t.Run("ansible", f.testAnsible)
	t.Run("fence_redfish", f.testFence)
	if t.Failed() {
		t.Logf("the agent said:\n%s", a.Output())
	}
}

// powered waits until the host is on or off, as QEMU's process table tells.
func (f *fleet) powered(t *testing.T, want bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); f.lab.Host.Powered() != want; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the host's power is %v; want %v", !want, want)
		}
	}
}

// ready switches the host on and waits until the agent sees its kernel.
func (f *fleet) ready(t *testing.T) {
	t.Helper()
	if err := f.lab.Host.PowerOn(t.Context()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		s, err := f.agent.System(t.Context())
		if err == nil && s.HostName != "" && s.PowerState == schema.PowerOn {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not see the host's kernel again: %+v, %v", s, err)
		}
	}
}

// testTruth compares what the agent says of the host's parts with what the host says itself.
func (f *fleet) testTruth(t *testing.T) {
	s, err := f.agent.System(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(command string) string {
		t.Helper()
		r, err := f.lab.Host.Exec(t.Context(), command)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(r.Stdout)
	}
	var system schema.OperatingSystem
	if err := f.agent.Get(t.Context(), systemURI+"/OperatingSystem", &system); err != nil {
		t.Fatal(err)
	}
	for command, got := range map[string]string{
		"uname -n": s.HostName, "uname -r": system.Kernel.Release, "uname -v": system.Kernel.Version, "uname -m": system.Kernel.Machine,
		"grep -m1 'model name' /proc/cpuinfo | cut -d: -f2": s.ProcessorSummary.Model,
	} {
		if want := ask(command); got != want {
			t.Errorf("%s says %q; the agent %q", command, want, got)
		}
	}
	if _, size := f.lab.Host.RAM(); s.MemorySummary.TotalSystemMemoryGiB < 0.98*float64(size)/(1<<30) || s.MemorySummary.TotalSystemMemoryGiB > float64(size)/(1<<30) {
		t.Errorf("%v GiB of memory; the machine has %d bytes", s.MemorySummary.TotalSystemMemoryGiB, size)
	}
	// The type 17 structures of the firmware's tables that the host itself sees (SMBIOS, section 7.18): size at 0x0c, in MiB.
	var modules []string
	for m, err := range client.Members[schema.Memory](t.Context(), f.agent.Client, systemURI+"/Memory") {
		if err != nil {
			t.Fatal(err)
		}
		modules = append(modules, fmt.Sprint(*m.CapacityMiB))
	}
	table, err := hex.DecodeString(ask("od -An -v -tx1 /sys/firmware/dmi/tables/DMI | tr -d ' \\n'"))
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for len(table) > 4 && int(table[1]) < len(table) {
		if table[0] == 17 {
			want = append(want, fmt.Sprint(binary.LittleEndian.Uint16(table[0x0c:])))
		}
		end := bytes.Index(table[table[1]:], []byte{0, 0})
		if end < 0 {
			break
		}
		table = table[int(table[1])+end+2:]
	}
	if len(want) == 0 || !slices.Equal(modules, want) {
		t.Errorf("memory modules of %q MiB; the host's firmware says %q", modules, want)
	}
	// All but Suspend and what the specification has added for machines of other kinds; QEMU's machine knows no sleep.
	all := []string{"On", "ForceOff", "GracefulShutdown", "GracefulRestart", "ForceRestart", "Nmi", "ForceOn", "PushPowerButton", "PowerCycle", "Pause", "Resume"}
	if got := s.Actions["#ComputerSystem.Reset"].Allowable["ResetType"]; !slices.Equal(got, all) {
		t.Errorf("reset types %q; want %q", got, all)
	}
	if s.Manufacturer != "QEMU" || s.UUID != f.lab.Host.UUID {
		t.Errorf("manufacturer %q, UUID %q", s.Manufacturer, s.UUID)
	}
}

// memoryUser makes the user who may have raw memory, the first time, and returns its client.
func (f *fleet) memoryUser(t *testing.T) *client.Client {
	t.Helper()
	const password = "a long password 1"
	if f.memory == nil {
		if _, err := f.agent.Post(t.Context(), "/redfish/v1/AccountService/Roles", map[string]any{
			"RoleId": "Memory", "AssignedPrivileges": []string{"Login", "ConfigureComponents", "ConfigureSelf"}, "OemPrivileges": []string{"BackdoorMemory"},
		}, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := f.agent.Post(t.Context(), "/redfish/v1/AccountService/Accounts", map[string]any{"UserName": "memory", "Password": password, "RoleId": "Memory"}, nil); err != nil {
			t.Fatal(err)
		}
		config := f.agent.Config
		config.User, config.Password = "memory", password
		c, err := client.New(config)
		if err != nil {
			t.Fatal(err)
		}
		f.memory = c
	}
	return f.memory
}

// testMemory changes the host's name in its kernel's memory, by a store under a lease, and takes it back; the host itself is asked
// what it is called.
func (f *fleet) testMemory(t *testing.T) {
	ctx := t.Context()
	name := func() string {
		t.Helper()
		r, err := f.lab.Host.Exec(ctx, "uname -n")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(r.Stdout)
	}
	c := f.memoryUser(t)
	path, size := f.lab.Host.RAM()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	ram := make([]byte, size)
	if _, err := file.ReadAt(ram, 0); err != nil {
		t.Fatal(err)
	}
	// struct new_utsname, include/uapi/linux/utsname.h: six strings of 65 bytes, the first the system's and the second the node's name.
	const field = 65
	was := name()
	pattern := make([]byte, 2*field)
	copy(pattern, "Linux")
	copy(pattern[field:], was)
	renamed := 0
	for at := 0; ; {
		i := bytes.Index(ram[at:], pattern)
		if i < 0 {
			break
		}
		at += i
		node := uint64(at + field)
		at += len(pattern)
		l, err := c.LeaseMemory(ctx, client.LeaseRequest{Start: node &^ 0xfff, Length: 8192, Seconds: 60, Write: true})
		if err != nil {
			t.Errorf("lease at %#x: %v", node, err)
			continue
		}
		// Copies in places that the kernel uses for something else by now, such as stacks, are of no interest.
		var read bytes.Buffer
		if err := c.ReadMemory(ctx, l, node, int64(len(was)), &read); err != nil {
			t.Errorf("read at %#x: %v", node, err)
		}
		now := make([]byte, len(was))
		if _, err := file.ReadAt(now, int64(node)); err != nil {
			t.Fatal(err)
		}
		if read.String() != was && string(now) != was {
			if err := c.EndLease(ctx, l); err != nil {
				t.Error(err)
			}
			continue
		}
		if read.String() != was {
			t.Errorf("read at %#x = %q; the RAM file has %q", node, read.String(), now)
		}
		if err := c.StoreMemory(ctx, l, node, []byte("#"), []byte("X")); err == nil {
			t.Errorf("a store at %#x went through though something else was expected", node)
		}
		if got := name(); got != was {
			t.Fatalf("after a store that was refused the host is called %q", got)
		}
		if err := c.StoreMemory(ctx, l, node, []byte(was[:1]), []byte("X")); err != nil {
			if _, rerr := file.ReadAt(now, int64(node)); rerr != nil || string(now) == was {
				t.Errorf("store at %#x: %v", node, err)
			}
		} else if name() == "X"+was[1:] {
			renamed++
		}
		if err := c.UndoStores(ctx, l); err != nil {
			if _, rerr := file.ReadAt(now, int64(node)); rerr != nil || string(now) == "X"+was[1:] {
				t.Errorf("undo at %#x: %v", node, err)
			}
		}
		if got := name(); got != was {
			t.Fatalf("after the store at %#x was taken back the host is called %q", node, got)
		}
		if err := c.EndLease(ctx, l); err != nil {
			t.Error(err)
		}
	}
	if renamed != 1 {
		t.Errorf("%d stores have changed the host's name; want one", renamed)
	}
	if _, err := f.agent.LeaseMemory(ctx, client.LeaseRequest{Start: 0x100000, Length: 4096}); err == nil {
		t.Error("an administrator without the privilege for raw memory has got a lease")
	}
}

// testPause stops the host's CPUs through agent and BMC; QEMU's monitor is asked whether they stand, and the host whether it goes on.
func (f *fleet) testPause(t *testing.T) {
	ctx := t.Context()
	for _, step := range []struct {
		reset  schema.ResetType
		power  schema.PowerState
		status string
	}{{schema.ResetPause, schema.PowerPaused, "paused"}, {schema.ResetResume, schema.PowerOn, "running"}} {
		if err := f.agent.Reset(ctx, step.reset); err != nil {
			t.Fatalf("%s: %v", step.reset, err)
		}
		if got, err := f.lab.Host.Status(ctx); err != nil || got != step.status {
			t.Errorf("after %s QEMU says %q, %v; want %q", step.reset, got, err, step.status)
		}
		if s, err := f.agent.System(ctx); err != nil || s.PowerState != step.power {
			t.Errorf("after %s: power %q, %v; want %q", step.reset, s.PowerState, err, step.power)
		}
		if step.reset == schema.ResetPause {
			f.testCore(t)
		}
	}
	if r, err := f.lab.Host.Exec(ctx, "echo alive"); err != nil || strings.TrimSpace(r.Stdout) != "alive" {
		t.Errorf("after Resume the host says %q, %v", r.Stdout, err)
	}
}

// testCore takes a core of the host while its CPUs stand, in two parts, and holds every page of it against the machine's RAM.
func (f *fleet) testCore(t *testing.T) {
	c := f.memoryUser(t)
	path, _ := f.lab.Host.RAM()
	ram, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	e, err := c.CollectCore(t.Context(), nil)
	if err != nil {
		t.Fatalf("collect a core: %v", err)
	}
	w := &coreCheck{ram: ram, stop: 100 << 20}
	began := time.Now()
	if n, err := c.Download(t.Context(), e.AdditionalDataURI, w); err == nil || n != w.at {
		t.Fatalf("download broken off by the client: %d bytes, %v", n, err)
	}
	w.stop = 0
	if n, err := c.Resume(t.Context(), e.AdditionalDataURI, w.at, w); err != nil || w.at != e.AdditionalDataSize || w.differ != 0 || w.err != nil {
		t.Errorf("a core of %d bytes came as %d, the last %d behind the break, %d bytes differ from the RAM file: %v, %v", e.AdditionalDataSize, w.at, n, w.differ, err, w.err)
	}
	if w.compared < 500<<20 || w.machine != elf.EM_X86_64 || !strings.Contains(w.notes, "OSRELEASE=") {
		t.Errorf("of a core for %v %d bytes were compared; notes: %.60q", w.machine, w.compared, w.notes)
	}
	t.Logf("%d MiB in %v", w.at>>20, time.Since(began).Round(time.Millisecond))
}

// coreCheck compares the segments of a core with a machine's RAM, which is at the same addresses in its file, as they come.
type coreCheck struct {
	ram      *os.File
	stop     int64 // where the client breaks off; zero: nowhere
	head     []byte
	loads    []elf.ProgHeader
	machine  elf.Machine
	notes    string
	at       int64
	compared int64
	differ   int64
	err      error
}

func (w *coreCheck) Write(b []byte) (int, error) {
	const enough = 64 << 10 // holds headers and notes of a machine with few CPUs
	if w.stop > 0 && w.at > w.stop {
		return 0, errors.New("the client breaks off")
	}
	if len(w.head) < enough {
		w.head = append(w.head, b[:min(len(b), enough-len(w.head))]...)
		if len(w.head) == enough {
			w.parse()
		}
	}
	for _, p := range w.loads {
		from, to := max(w.at, int64(p.Off)), min(w.at+int64(len(b)), int64(p.Off+p.Filesz))
		if from >= to {
			continue
		}
		want := make([]byte, to-from)
		if _, err := w.ram.ReadAt(want, int64(p.Paddr)+from-int64(p.Off)); err != nil {
			w.err = err
			return 0, err
		}
		w.compared += to - from
		if got := b[from-w.at : to-w.at]; !bytes.Equal(got, want) {
			for i := range got {
				if got[i] != want[i] {
					w.differ++
				}
			}
		}
	}
	w.at += int64(len(b))
	return len(b), nil
}

func (w *coreCheck) parse() {
	f, err := elf.NewFile(bytes.NewReader(w.head))
	if err != nil {
		w.err = err
		return
	}
	w.machine = f.Machine
	for _, p := range f.Progs {
		switch p.Type {
		case elf.PT_NOTE:
			b, err := io.ReadAll(p.Open())
			w.notes, w.err = string(b), errors.Join(w.err, err)
		case elf.PT_LOAD:
			w.loads = append(w.loads, p.ProgHeader)
		}
	}
	if len(w.loads) > 1 {
		w.loads = w.loads[1:] // the first is the kernel's image once more
	}
}

func (f *fleet) testBMClib(t *testing.T) {
	u, err := url.Parse(f.agent.Config.URL)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := bmclib.NewClient(u.Hostname(), f.agent.Config.User, f.agent.Config.Password, bmclib.WithRedfishPort(u.Port()), bmclib.WithPerProviderTimeout(2*time.Minute))
	c.Registry.Drivers = c.Registry.For("gofish")
	if err := c.Open(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(ctx); err != nil {
			t.Error(err)
		}
	}()
	for _, order := range []struct {
		do string
		on bool
	}{{"off", false}, {"on", true}, {"cycle", true}, {"reset", true}} {
		if _, err := c.SetPowerState(ctx, order.do); err != nil {
			t.Fatalf("SetPowerState(%s) = %v", order.do, err)
		}
		f.powered(t, order.on)
		if got, err := c.GetPowerState(ctx); err != nil || strings.EqualFold(got, "on") != order.on {
			t.Errorf("after %s: GetPowerState = %q, %v", order.do, got, err)
		}
	}
	f.ready(t)
	if ok, err := c.SetBootDevice(ctx, "cdrom", false, false); err != nil || !ok {
		t.Errorf("SetBootDevice = %v, %v", ok, err)
	}
	if device, once := f.lab.Host.NextBoot(); device != "Cd" || !once {
		t.Errorf("the host boots from %q next, once %v; want Cd, once", device, once)
	}
	f.lab.Host.BootNext("", false)
	for _, image := range []string{f.image, ""} {
		if ok, err := c.SetVirtualMedia(ctx, "CD", image); err != nil || !ok {
			t.Errorf("SetVirtualMedia(%q) = %v, %v", image, ok, err)
		}
	}
	inventory, err := c.Inventory(ctx)
	if err != nil || inventory.Vendor != "QEMU" || len(inventory.CPUs) == 0 || inventory.BMC == nil {
		t.Errorf("Inventory = %+v, %v", inventory, err)
	}
	if entries, err := c.GetSystemEventLog(ctx); err != nil || len(entries) == 0 {
		t.Errorf("GetSystemEventLog = %d entries, %v", len(entries), err)
	}
	if err := c.SendNMI(ctx); err != nil {
		t.Errorf("SendNMI = %v", err)
	}
}

func (f *fleet) testGofish(t *testing.T) {
	c, err := gofish.Connect(gofish.ClientConfig{Endpoint: f.agent.Config.URL, Username: f.agent.Config.User, Password: f.agent.Config.Password, Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Logout()
	systems, err := c.Service.Systems()
	if err != nil || len(systems) != 1 || len(systems[0].SupportedResetTypes) < 9 {
		t.Fatalf("Systems = %+v, %v", systems, err)
	}
	cpus, err := systems[0].Processors()
	if err != nil || len(cpus) == 0 || cpus[0].TotalThreads == 0 {
		t.Errorf("Processors = %+v, %v", cpus, err)
	}
	managers, err := c.Service.Managers()
	if err != nil || len(managers) != 1 {
		t.Errorf("Managers = %+v, %v", managers, err)
	}
}

// program returns the path of a client that make setup installs.
func program(t *testing.T, name, pkg string) string {
	t.Helper()
	for _, name := range []string{name, "/usr/bin/" + name, "/usr/sbin/" + name} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Fatalf("%s is not installed (Debian package %s); make setup installs it", name, pkg)
	return ""
}

// run runs a client without what the environment may say about certificates and proxies.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	for _, v := range os.Environ() {
		switch k, _, _ := strings.Cut(v, "="); strings.ToUpper(k) {
		case "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY":
		default:
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, "PYTHONWARNINGS=ignore", "ANSIBLE_LOCALHOST_WARNING=false", "ANSIBLE_STDOUT_CALLBACK=json", "HOME="+t.TempDir(), "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (f *fleet) testRedfishtool(t *testing.T) {
	tool := program(t, "redfishtool", "redfishtool")
	base := []string{"-r", strings.TrimPrefix(f.agent.Config.URL, "https://"), "-u", f.agent.Config.User, "-p", f.agent.Config.Password, "-S", "Always", "-A", "Session"}
	out := run(t, tool, append(base, "Systems", "-1", "get")...)
	var system schema.ComputerSystem
	if err := json.Unmarshal([]byte(out), &system); err != nil || system.ODataID != systemURI {
		t.Errorf("Systems get: %v\n%s", err, out)
	}
	run(t, tool, append(base, "Systems", "-1", "reset", "ForceOff")...)
	f.powered(t, false)
	run(t, tool, append(base, "Systems", "-1", "reset", "On")...)
	f.powered(t, true)
	run(t, tool, append(base, "Systems", "-1", "setBootOverride", "Once", "Pxe")...)
	if device, _ := f.lab.Host.NextBoot(); device != "Pxe" {
		t.Errorf("after setBootOverride: the host boots from %q", device)
	}
	f.lab.Host.BootNext("", false)
}

// sushyScript is what OpenStack Ironic does to a machine to deploy it, by its library.
const sushyScript = `
import sys, sushy
conn = sushy.Sushy(sys.argv[1] + "/redfish/v1", username=sys.argv[2], password=sys.argv[3], verify=False)
system = conn.get_system("/redfish/v1/Systems/system")
assert system.power_state == sushy.POWER_STATE_ON, system.power_state
system.set_system_boot_options(sushy.BOOT_SOURCE_TARGET_CD, enabled=sushy.BOOT_SOURCE_ENABLED_ONCE)
system.refresh()
assert system.boot["target"] == sushy.BOOT_SOURCE_TARGET_CD, system.boot
if hasattr(system, "virtual_media"):  # Debian 12's looks for the drives where Redfish has deprecated them, in the manager
    drive = system.virtual_media.get_members()[0]
    assert not drive.inserted
    drive.insert_media(sys.argv[4])
    drive.refresh()
    assert drive.inserted and drive.image == sys.argv[4], drive.image
    drive.eject_media()
    drive.refresh()
    assert not drive.inserted
system.set_system_boot_options(sushy.BOOT_SOURCE_TARGET_NONE, enabled=sushy.BOOT_SOURCE_ENABLED_DISABLED)
assert system.processors.summary.count >= 1
assert system.memory_summary.size_gib is not None
system.reset_system(sushy.RESET_TYPE_FORCE_OFF)
system.refresh()
assert system.power_state == sushy.POWER_STATE_OFF, system.power_state
system.reset_system(sushy.RESET_TYPE_ON)
system.refresh()
assert system.power_state == sushy.POWER_STATE_ON, system.power_state
print("sushy is content")
`

func (f *fleet) testSushy(t *testing.T) {
	const python = "/usr/bin/python3" // Debian's: others do not have Debian's modules
	if err := exec.Command(python, "-c", "import sushy").Run(); err != nil {
		t.Fatal("python3-sushy is not installed; make setup installs it")
	}
	f.ready(t)
	script := filepath.Join(t.TempDir(), "sushy_client.py")
	if err := os.WriteFile(script, []byte(sushyScript), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := run(t, python, script, f.agent.Config.URL, f.agent.Config.User, f.agent.Config.Password, f.image); !strings.Contains(out, "sushy is content") {
		t.Errorf("sushy: %s", out)
	}
}

func (f *fleet) testAnsible(t *testing.T) {
	tool := program(t, "ansible", "ansible")
	f.ready(t)
	at := strings.TrimPrefix(f.agent.Config.URL, "https://")
	do := func(module, args string) string {
		t.Helper()
		return run(t, tool, "localhost", "-m", "community.general."+module, "-a",
			"baseuri="+at+" username="+f.agent.Config.User+" password="+f.agent.Config.Password+" "+args)
	}
	for _, info := range []struct{ args, want string }{
		{"category=Systems command=GetSystemInventory", `"hostName"`},
		{"category=Systems command=GetCpuInventory", "TotalThreads"},
		{"category=Systems command=GetNicInventory", `"nic"`},
		{"category=Systems command=GetBootOverride", "boot_override"},
		{"category=Systems command=GetVirtualMedia", "virtual_media"},
		{"category=Manager command=GetManagerNicInventory", "manager_nics"},
		{"category=Accounts command=ListUsers", `"admin"`},
		{"category=Sessions command=GetSessions", "session"},
	} {
		if out := do("redfish_info", info.args); !strings.Contains(strings.ToLower(out), strings.ToLower(strings.Trim(info.want, `"`))) {
			t.Errorf("redfish_info %s: no %s in\n%s", info.args, info.want, out)
		}
	}
	do("redfish_command", "category=Systems command=PowerForceOff")
	f.powered(t, false)
	do("redfish_command", "category=Systems command=PowerOn")
	f.powered(t, true)
	do("redfish_command", "category=Systems command=SetOneTimeBoot bootdevice=Cd")
	if device, once := f.lab.Host.NextBoot(); device != "Cd" || !once {
		t.Errorf("after SetOneTimeBoot: the host boots from %q, once %v", device, once)
	}
	f.lab.Host.BootNext("", false)
}

func (f *fleet) testFence(t *testing.T) {
	tool := program(t, "fence_redfish", "fence-agents")
	host, port, _ := strings.Cut(strings.TrimPrefix(f.agent.Config.URL, "https://"), ":")
	base := []string{"-a", host, "-u", port, "-l", f.agent.Config.User, "-p", f.agent.Config.Password, "--ssl-insecure", "--systems-uri=" + systemURI}
	run(t, tool, append(base, "-o", "reboot")...)
	f.powered(t, true)
	run(t, tool, append(base, "-o", "off")...)
	f.powered(t, false)
	if out := run(t, tool, append(base, "-o", "metadata")...); !strings.Contains(out, "fence_redfish") {
		t.Errorf("metadata: %s", out)
	}
}
