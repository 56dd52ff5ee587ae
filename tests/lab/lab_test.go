package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"github.com/backdoor-rhs/backdoor/tests/lab/wire"
	"github.com/bmc-toolbox/bmclib/v2"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestMain lets this program stand in for backdoor: a lab in the background is this program called with "lab supervise".
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "lab" {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		code := Command(ctx, os.Args[2:], os.Stdin, os.Stdout, os.Stderr)
		stop()
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// needQEMU leaves a test out under -short. Where machines are wanted and cannot be had, the test fails and says what to install:
// a skip would hide that nothing was tested.
func needQEMU(t *testing.T, programs ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("it starts virtual machines, and -short was given")
	}
	for _, p := range programs {
		if _, err := find(p); err != nil {
			t.Fatal(err)
		}
	}
}

// children lists the living children of a process, PID to command line.
func children(t *testing.T, of int) map[int]string {
	t.Helper()
	list, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[int]string)
	for _, p := range list {
		b, err := os.ReadFile(p)
		if err != nil {
			continue // it has just ended
		}
		_, rest, ok := strings.Cut(string(b), ") ")
		if f := strings.Fields(rest); ok && len(f) > 1 && f[0] != "Z" && f[1] == strconv.Itoa(of) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
			if err != nil {
				t.Fatal(err)
			}
			cmd, _ := os.ReadFile(filepath.Dir(p) + "/cmdline") // gone, or as the test shows it
			out[pid] = strings.ReplaceAll(string(cmd), "\x00", " ")
		}
	}
	return out
}

// ask sends a line to HOST's TCP service and returns the answer.
func ask(t *testing.T, ctx context.Context, h *Host, line string) string {
	t.Helper()
	conn, err := h.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if d, ok := ctx.Deadline(); ok {
		conn.SetDeadline(d)
	}
	fmt.Fprintln(conn, line)
	s, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Fatalf("ask the service %q: %v", line, err)
	}
	return strings.TrimSpace(s)
}

// inRAM reports whether HOST's memory has the text anywhere.
func inRAM(t *testing.T, h *Host, text string) bool {
	t.Helper()
	path, size := h.RAM()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const step = 8 << 20
	buf := make([]byte, step+len(text))
	for at := int64(0); at < size; at += step {
		n, err := f.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if bytes.Contains(buf[:n], []byte(text)) {
			return true
		}
	}
	return false
}

// Two labs side by side, one for each kernel; everything that needs only HOST is tested on them.
func TestHost(t *testing.T) {
	needQEMU(t, "qemu-system-x86_64")
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	kernels := []string{"6.1", "6.12"}
	labs := make([]*Lab, len(kernels))
	errs := make([]error, len(kernels))
	var wg sync.WaitGroup
	for i, k := range kernels {
		wg.Go(func() { labs[i], errs[i] = Up(ctx, Config{NoDPU: true, HostKernel: k}) })
	}
	wg.Wait()
	for _, l := range labs {
		if l != nil {
			defer l.Close()
		}
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	for i, k := range kernels {
		t.Run(k, func(t *testing.T) {
			testTruth(t, ctx, labs[i].Host, k)
			testFaults(t, ctx, labs[i].Host)
		})
	}
	t.Run("reboot", func(t *testing.T) { testReboot(t, ctx, labs[0].Host) })
	t.Run("power", func(t *testing.T) { testPower(t, ctx, labs[0]) })
	t.Run("down", func(t *testing.T) {
		var dirs []string
		for _, l := range labs {
			dirs = append(dirs, l.Dir())
			for range 2 {
				if err := l.Close(); err != nil {
					t.Errorf("Close() = %v", err)
				}
			}
		}
		for _, d := range dirs {
			if _, err := os.Stat(d); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the run directory %s is left: %v", d, err)
			}
		}
		if left := children(t, os.Getpid()); len(left) > 0 {
			t.Errorf("processes are left: %v", left)
		}
		if err := labs[0].Host.Do(ctx, control.OpTime, nil, nil); !errors.Is(err, errOff) {
			t.Errorf("a host that is down answers with %v; want errOff", err)
		}
	})
}

// testTruth checks what the harness can learn from the host.
func testTruth(t *testing.T, ctx context.Context, h *Host, series string) {
	ready := h.Ready()
	if !strings.HasPrefix(ready.Release, series+".") || ready.Release != h.Kernel.Release || ready.CPUs != 2 {
		t.Errorf("the host says %+v; want kernel %s with 2 CPUs", ready, h.Kernel.Release)
	}
	if !inRAM(t, h, "Linux version "+ready.Release) {
		t.Errorf("the RAM file does not hold the kernel's banner")
	}
	if got := ask(t, ctx, h, "HELLO"); !strings.HasPrefix(got, ready.Boot) {
		t.Errorf("the service's HELLO = %q; want the boot ID %s", got, ready.Boot)
	}
	r, err := h.Exec(ctx, "echo out; echo err >&2; exit 3")
	if diff := cmp.Diff(control.ExecResult{Code: 3, Stdout: "out\n", Stderr: "err\n"}, r); diff != "" || err != nil {
		t.Errorf("Exec: %v (-want +got):\n%s", err, diff)
	}
	if s, err := h.ReadFile(ctx, "/proc/version"); err != nil || strings.TrimSpace(s) != ready.Banner {
		t.Errorf("ReadFile(/proc/version) = %q, %v", s, err)
	}
	if _, err := h.ReadFile(ctx, "/nothing"); err == nil {
		t.Error("ReadFile(/nothing) worked")
	}
	if zero, margin, err := h.clock(ctx); err != nil || margin > time.Second || time.Since(zero) > 10*time.Minute {
		t.Errorf("clock() = %v ± %v, %v", zero, margin, err)
	}
	list, err := h.PS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, comm := range []string{"init", "echod", "tickd", "crond", "sshd", "kthreadd"} {
		i := slices.IndexFunc(list, func(p control.Process) bool { return p.Comm == comm })
		if i < 0 || list[i].Kernel != (comm == "kthreadd") {
			t.Errorf("process %s is not there as it should be", comm)
		}
	}

	before := h.EventMark()
	p, err := h.Spawn(ctx, control.SpawnArgs{Comm: "victim", Argv: []string{"sleep", "1000"}, CPU: 1, PID: 4321, UID: 1234})
	if err != nil {
		t.Fatal(err)
	}
	if p.Comm != "victim" || p.UID != 1234 || p.PID < 4321 {
		t.Errorf("Spawn = %+v", p)
	}
	if s, err := h.Exec(ctx, fmt.Sprintf("taskset -p %d", p.PID)); err != nil || !strings.HasSuffix(strings.TrimSpace(s.Stdout), ": 2") {
		t.Errorf("affinity = %q, %v; want CPU 1 alone", s.Stdout, err)
	}
	if err := h.TraceFunctions(ctx, "do_exit", "no_such_function"); err != nil {
		t.Fatal(err)
	}
	if err := h.Do(ctx, control.OpKill, control.KillArgs{PID: p.PID, Signal: 9}, nil); err != nil {
		t.Fatal(err)
	}
	x, err := h.WaitExit(ctx, before, p.PID)
	if err != nil || x.Signal != 9 {
		t.Errorf("WaitExit = %+v, %v; want signal 9", x, err)
	}
	costs, err := h.Traced(ctx)
	if err != nil || len(costs) != 2 || !costs[0].Known || costs[0].Hits < 1 || costs[1].Known || costs[1].Hits != 0 {
		t.Errorf("Traced = %+v, %v; want runs of do_exit only", costs, err)
	}
	if err := h.Do(ctx, "nonsense", nil, nil); err == nil {
		t.Error("the host knows the operation nonsense")
	}
}

// inject makes a fault and checks what can be checked of its truth.
func inject(t *testing.T, ctx context.Context, h *Host, f Fault) Truth {
	t.Helper()
	began, boot := time.Now(), h.Ready().Boot
	truth, err := h.Fault(ctx, f)
	if err != nil {
		t.Fatal(err)
	}
	if truth.Fault != f || truth.Boot != boot || truth.Start.Before(began) || truth.Margin < 0 || truth.Start.Add(truth.Margin).After(time.Now().Add(time.Second)) {
		t.Errorf("Fault(%s) between %v and %v = %+v", f, began, time.Now(), truth)
	}
	return truth
}

// testFaults makes faults, and looks by other means whether they are there. The host is not to be used afterwards.
func testFaults(t *testing.T, ctx context.Context, h *Host) {
	r := inject(t, ctx, h, FaultRunaway)
	list, err := h.PS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(p control.Process) bool { return p.PID == r.PID })
	if i < 0 || list[i].Comm != r.Comm || list[i].UID != r.UID || list[i].CPU != r.CPU {
		t.Errorf("the runaway %+v is not in the process list as it should be: %+v", r, list[max(i, 0)])
	}

	inject(t, ctx, h, FaultFreeze)
	if s, err := h.Status(ctx); err != nil || s != "paused" {
		t.Errorf("frozen, the host's state is %q, %v", s, err)
	}
	if err := h.Thaw(ctx); err != nil {
		t.Fatal(err)
	}

	locked := inject(t, ctx, h, FaultIRQsOff)
	monitor, err := h.machine.client()
	if err != nil {
		t.Fatal(err)
	}
	var at [2]string
	for i := range at {
		regs, err := monitor.Human(ctx, "info registers -a")
		if err != nil {
			t.Fatal(err)
		}
		_, cpu, _ := strings.Cut(regs, fmt.Sprintf("CPU#%d", locked.CPU))
		m := regexp.MustCompile(`RIP=([0-9a-f]+) RFL=([0-9a-f]+).* CPL=0`).FindStringSubmatch(cpu)
		if m == nil {
			t.Fatalf("CPU %d is not in the kernel: %.400s", locked.CPU, cpu)
		}
		if n, err := strconv.ParseUint(m[2], 16, 64); err != nil || n&0x200 != 0 {
			t.Errorf("CPU %d has its interrupts on: flags %s", locked.CPU, m[2])
		}
		at[i] = m[1]
	}
	if at[0] != at[1] {
		t.Errorf("CPU %d moves: from %s to %s", locked.CPU, at[0], at[1])
	}
}

// testReboot has the host start anew without losing its power, in two ways, and die at last.
func testReboot(t *testing.T, ctx context.Context, h *Host) {
	first, boots := h.Ready().Boot, h.Boots()
	if err := h.Reset(ctx); err != nil {
		t.Fatal(err)
	}
	second, err := h.WaitBoot(ctx, boots)
	if err != nil {
		t.Fatal(err)
	}
	inject(t, ctx, h, FaultReboot)
	third, err := h.WaitBoot(ctx, boots+1)
	if err != nil {
		t.Fatal(err)
	}
	if first == second.Boot || second.Boot == third.Boot {
		t.Errorf("boot IDs %s, %s, %s are not all different", first, second.Boot, third.Boot)
	}
	if got := ask(t, ctx, h, "SET state 1"); got != "OK" {
		t.Errorf("SET = %q", got)
	}
	inject(t, ctx, h, FaultPanic)
	late, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if err := h.Do(late, control.OpTime, nil, nil); err == nil {
		t.Error("a host that has panicked answers")
	}
}

// testPower has a stranger's client switch a dead host off and on through the BMC.
func testPower(t *testing.T, ctx context.Context, l *Lab) {
	h := l.Host
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(l.BMC.CA)
	c := bmclib.NewClient("127.0.0.1", l.BMC.User, l.BMC.Password,
		bmclib.WithRedfishPort(strconv.Itoa(l.BMC.Port)), bmclib.WithSecureTLS(roots))
	c.Registry.Drivers = c.Registry.Using("redfish")
	if err := c.Open(ctx); err != nil {
		t.Fatal(err)
	}
	defer c.Close(ctx)
	state := func() string {
		t.Helper()
		s, err := c.GetPowerState(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	power := func(to string) {
		t.Helper()
		if ok, err := c.SetPowerState(ctx, to); err != nil || !ok {
			t.Fatalf("SetPowerState(%s) = %v, %v", to, ok, err)
		}
	}
	if s := state(); s != "On" {
		t.Errorf("a panicked host is %q; want On", s)
	}
	banner := "Linux version " + h.Ready().Release
	boots, mark, service := h.Boots(), h.EventMark(), h.Service()
	power("off")
	if s := state(); s != "Off" || h.Powered() {
		t.Errorf("switched off, the host is %q and powered %v", s, h.Powered())
	}
	if inRAM(t, h, banner) {
		t.Error("the memory has survived the loss of power")
	}
	if err := h.NMI(ctx); !errors.Is(err, errOff) {
		t.Errorf("NMI of a host that is off = %v; want errOff", err)
	}
	power("on")
	if _, err := h.WaitBoot(ctx, boots); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, ctx, h, "GET state"); got != "-" || h.Service() != service {
		t.Errorf("after a power cycle GET = %q at %s; want nothing, at %s", got, h.Service(), service)
	}
	var names []string
	for _, e := range h.Events(mark) {
		if slices.Contains([]string{EventOn, EventOff, EventReady}, e.Name) {
			names = append(names, e.Name)
		}
	}
	if diff := cmp.Diff([]string{EventOff, EventOn, EventReady}, names); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	mark = h.EventMark()
	// The power button: the userland shuts itself down. (bmclib 2.3.5 says that this has failed when it has not.)
	rf, err := client.New(client.Config{URL: l.BMC.URL, User: l.BMC.User, Password: l.BMC.Password, CA: roots})
	if err != nil {
		t.Fatal(err)
	}
	if err := rf.Reset(ctx, schema.ResetGracefulShutdown); err != nil {
		t.Fatal(err)
	}
	if _, err := h.WaitEvent(ctx, mark, EventOff); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Fault(ctx, FaultPowercut); err != nil {
		t.Errorf("power cut of a host that is off = %v", err)
	}
}

// A kernel that cannot come up is the kernel's fault, and the error shows its last words.
func TestBootError(t *testing.T) {
	needQEMU(t, "qemu-system-x86_64")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	l, err := Up(ctx, Config{NoDPU: true, HostArgs: "rdinit=/nothing root=/dev/nothing"})
	var be *BootError
	if !errors.As(err, &be) || be.Machine != "host" || !strings.Contains(err.Error(), "Unable to mount root fs") {
		t.Errorf("Up = %v; want a *BootError with the panic", err)
	}
	if l != nil {
		t.Errorf("Up returned a lab with its error")
	}
	if left := children(t, os.Getpid()); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}

func TestInfraErrors(t *testing.T) {
	var ie *InfraError
	for _, c := range []Config{
		{HostMemory: 300 << 20}, {HostMemory: 1 << 20}, {HostCPUs: 100}, {Engine: "steam"}, {HostKernel: "2.4", NoDPU: true},
		{DPUImage: "/nothing", NoDPU: false},
	} {
		if l, err := Up(t.Context(), c); !errors.As(err, &ie) || l != nil {
			t.Errorf("Up(%+v) = %v, %v; want an *InfraError", c, l, err)
		}
	}
	dir := t.TempDir()
	lock, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if _, err := Up(t.Context(), Config{NoDPU: true, Dir: dir}); !errors.As(err, &ie) || !strings.Contains(err.Error(), "another lab") {
		t.Errorf("Up in the directory of another lab = %v; want an *InfraError", err)
	}
}

func TestProgramMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	var ie *InfraError
	if _, err := find("qemu-system-x86_64"); !errors.As(err, &ie) || !strings.Contains(err.Error(), "apt-get install qemu-system-x86") {
		t.Errorf("find = %v; want an *InfraError that tells what to install", err)
	}
}

// TestDPU starts the whole lab. What the agent does in it is tested end to end elsewhere.
func TestDPU(t *testing.T) {
	needQEMU(t, "qemu-system-x86_64", "qemu-system-aarch64", "swtpm", "mkfs.ext4")
	root, err := checkout()
	if err != nil {
		t.Fatal(err)
	}
	if err := (&Config{}).findImage(root); err != nil {
		t.Fatal(err) // make test builds it first
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	dir := filepath.Join(t.TempDir(), "run")
	l, err := Up(ctx, Config{Dir: dir, WireCapture: filepath.Join(t.TempDir(), "wire.pcap")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := l.DPU
	t.Logf("DPU: boot to first Redfish answer %v", d.BootTook)
	if d.InitialPassword == "" || d.Password == d.InitialPassword || d.User == "" || len(d.CA) == 0 {
		t.Errorf("the DPU's credential: user %q, initial password %q", d.User, d.InitialPassword)
	}
	c, err := d.Redfish()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Login(ctx); err != nil {
		t.Errorf("log in with the new password: %v", err)
	}
	if err := d.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Login(ctx); err != nil {
		t.Errorf("log in after a power cut of the DPU: %v", err)
	}

	// The wire: a Go program in "another process" pings the DPU with ARP.
	e, err := wire.Dial(filepath.Join(dir, "wire.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	me, dpu := []byte{2, 0, 0, 0, 0, 1}, DPUWireAddress.Addr().As4()
	mine := dpu
	mine[3] = 9
	arp := slices.Concat([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, me, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1}, me, mine[:], make([]byte, 6), dpu[:])
	if err := e.Send(arp); err != nil {
		t.Fatal(err)
	}
	want, err := net.ParseMAC(dpuWireMAC)
	if err != nil {
		t.Fatal(err)
	}
	for {
		f, err := e.Receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(f) >= 42 && bytes.Equal(f[12:14], []byte{8, 6}) && f[21] == 2 {
			if !bytes.Equal(f[22:28], want) {
				t.Errorf("the answer comes from % x; want % x", f[22:28], want)
			}
			break
		}
	}
	if err := l.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	for _, name := range []string{"host-console.log", "dpu-console.log"} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Size() == 0 {
			t.Errorf("the log %s is not kept: %v", name, err)
		}
	}
	if left := children(t, os.Getpid()); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}

// invoke calls Command and returns what it printed.
func invoke(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = Command(ctx, args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func TestCommand(t *testing.T) {
	needQEMU(t, "qemu-system-x86_64")
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if code, out, _ := invoke(ctx, "status"); code != 0 || !strings.Contains(out, "No lab is up") {
		t.Errorf("status without a lab = %d, %q", code, out)
	}
	if code, _, errs := invoke(ctx, "exec", "true"); code != 1 || !strings.Contains(errs, "backdoor lab up") {
		t.Errorf("exec without a lab = %d, %q", code, errs)
	}
	if code, out, errs := invoke(ctx, "up", "-no-dpu", "-name", "one"); code != 0 || !strings.Contains(out, "backdoor lab down -name one") {
		t.Fatalf("up = %d, %q, %q", code, out, errs)
	}
	if code, _, errs := invoke(ctx, "up", "-no-dpu", "-name", "one"); code != 1 || !strings.Contains(errs, "up already") {
		t.Errorf("up again = %d, %q", code, errs)
	}
	var labs []Info
	code, out, _ := invoke(ctx, "status", "-json")
	if err := json.Unmarshal([]byte(out), &labs); code != 0 || err != nil || len(labs) != 1 || labs[0].Name != "one" || labs[0].Host.State != "running" {
		t.Fatalf("status = %d, %s", code, out)
	}
	if code, out, errs := invoke(ctx, "exec", "-name", "one", "sh", "-c", "'echo hello; exit 4'"); code != 4 || out != "hello\n" {
		t.Errorf("exec = %d, %q, %q", code, out, errs)
	}
	if code, out, errs := invoke(ctx, "fault", "runaway", "-name", "one"); code != 0 || !strings.Contains(out, "process") {
		t.Errorf("fault = %d, %q, %q", code, out, errs)
	}
	if code, _, errs := invoke(ctx, "power", "freeze", "-name", "one"); code != 0 {
		t.Errorf("power = %d, %q", code, errs)
	}
	if code, out, _ := invoke(ctx, "status"); code != 0 || !strings.Contains(out, "paused") {
		t.Errorf("status of a frozen host = %d, %q", code, out)
	}
	dir := labs[0].Dir
	if code, out, errs := invoke(ctx, "down", "-name", "one"); code != 0 {
		t.Errorf("down = %d, %q, %q", code, out, errs)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after down %s is left: %v", dir, err)
	}
	if left := children(t, os.Getpid()); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}

func TestCommandUsage(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	for _, args := range [][]string{
		{"nonsense"}, {"fault"}, {"fault", "hiccup"}, {"power", "more"}, {"exec"}, {"console"}, {"up", "-memory", "much"},
		{"up", "extra"}, {"status", "-name", "No Name"}, {"up", "-nonsense"},
	} {
		if code, _, errs := invoke(t.Context(), args...); code != 2 || errs == "" {
			t.Errorf("lab %q = %d, %q; want wrong usage", args, code, errs)
		}
	}
	if code, out, _ := invoke(t.Context()); code != 0 || !strings.Contains(out, "irqs-off") {
		t.Errorf("lab = %d, %q; want help", code, out)
	}
	if code, out, _ := invoke(t.Context(), "down", "-json"); code != 1 || !strings.Contains(out, `"kind": "infra"`) {
		t.Errorf("lab down -json without a lab = %d, %q", code, out)
	}
}

// A lab whose process is killed takes its machines with it; one that is interrupted while it comes up stops in order.
func TestKilledLab(t *testing.T) {
	needQEMU(t, "qemu-system-x86_64")
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	up := func() (cmd *exec.Cmd, stdout, stderr io.Reader) {
		t.Helper()
		cmd = exec.CommandContext(ctx, self, "lab", "up", "-foreground", "-json", "-no-dpu")
		stdout, err1 := cmd.StdoutPipe()
		stderr, err2 := cmd.StderrPipe()
		if err := errors.Join(err1, err2, cmd.Start()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return cmd, stdout, stderr
	}
	nothing := func(after string) {
		t.Helper()
		if code, out, _ := invoke(ctx, "status"); code != 0 || !strings.Contains(out, "No lab is up") {
			t.Errorf("status after %s = %d, %q", after, code, out)
		}
	}

	cmd, stdout, _ := up()
	var i Info
	if err := json.NewDecoder(stdout).Decode(&i); err != nil {
		t.Fatal(err)
	}
	qemu := qemuOf(t, cmd.Process.Pid)
	cmd.Process.Kill()
	cmd.Wait() // killed, as told
	if err := (otherProcess{qemu}).wait(ctx, 10*time.Second); err != nil {
		t.Errorf("QEMU outlives its lab: %v", err)
	}
	if _, err := os.Stat(i.Host.RAM); err == nil {
		t.Errorf("the host's memory outlives its lab: %s", i.Host.RAM)
	}
	nothing("a kill")

	// The next lab takes over what the killed one has left. It is interrupted at its first word.
	cmd, _, stderr := up()
	first := bufio.NewReader(stderr)
	if _, err := first.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Signal(os.Interrupt)
	rest, err := io.ReadAll(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Errorf("an interrupted start was a success: %s", rest)
	}
	nothing("Ctrl-C")
}

// qemuOf returns a pidfd of the one child that a process has.
func qemuOf(t *testing.T, pid int) int {
	t.Helper()
	for child := range children(t, pid) {
		fd, err := unix.PidfdOpen(child, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	t.Fatal("the lab has no QEMU")
	return -1
}
