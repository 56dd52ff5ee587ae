package kernel

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/images/modpack"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

var guestsFlag = flag.String("guests", "", "comma-separated `kernels` to boot in QEMU and look into, or all: those of the table guestKernels; if empty, those that make test boots")

// guestKernels are the kernels that are tested, by the names of images/kernels. often is what "make test" boots: one of each
// series and architecture; "make kernels" boots all.
var guestKernels = []struct {
	name  string
	often bool
}{
	{"6.1", true}, {"6.12", true}, {"5.10", true}, {"sid", true}, {"6.1-cloud-arm64", true},
	{"6.1-generic", false}, {"6.12-generic", false}, {"5.10-generic", false}, {"sid-generic", false},
	{"13-6.12", false}, {"13-6.12-generic", false},
	{"6.1-rt", false}, {"6.12-rt", false}, {"13-6.12-rt", false}, {"sid-rt", false},
	{"6.1-arm64", false}, {"13-6.12-arm64", false}, {"13-6.12-16k-arm64", false}, {"sid-cloud-arm64", false},
}

// forEachGuest runs f for the kernels that were asked for, by default for those that are often tested.
func forEachGuest(t *testing.T, f func(t *testing.T, kernel string)) {
	someGuests(t, len(guestKernels), f)
}

// someGuests runs f for the kernels that were asked for, by default for the first n of those that are often tested.
func someGuests(t *testing.T, n int, f func(t *testing.T, kernel string)) {
	t.Helper()
	var want []string
	for _, k := range guestKernels {
		if *guestsFlag == "all" || k.often && len(want) < n {
			want = append(want, k.name)
		}
	}
	if *guestsFlag != "" && *guestsFlag != "all" {
		want = strings.Split(*guestsFlag, ",")
	} else if *guestsFlag == "" && testing.Short() {
		t.Skip("boots kernels in QEMU, which takes a minute: not with -short")
	}
	for _, k := range want {
		t.Run(k, func(t *testing.T) { f(t, k) })
	}
}

// guest is a running virtual machine whose RAM is a file.
type guest struct {
	t      testing.TB
	mem    *hostmem.RAMFile
	dir    string
	ram    string // the file
	kernel kernels.Kernel
	began  time.Time
	ctl    net.Conn
	in     *bufio.Reader
	qmp    net.Conn
	qmpIn  *bufio.Reader
}

type guestOptions struct {
	cpu, cmdline string
	mib          int      // 512 if zero
	early        bool     // return at once, not when userland is ready
	modules      []string // that the guest loads, with what they need
	args         []string // of QEMU
	kexec        bool     // the guest can start the same kernel again by itself
}

// guestMachine is what a guest's machine is made of.
type guestMachine struct {
	arch                        string // as Info has it
	qemu, machine, cpu, cmdline string
	args                        []string // the second serial line, to the socket CTLPATH
	init                        func() ([]byte, error)
	layout                      func(ram uint64) []hostmem.Extent
}

var guestMachines = map[string]guestMachine{
	"amd64": {"x86_64", "qemu-system-x86_64", "q35", "max", "console=ttyS0", []string{"-serial", "unix:CTLPATH,server=on,wait=off"}, guestInit("amd64"), hostmem.Q35Layout},
	"arm64": {"aarch64", "qemu-system-aarch64", "virt", "max,pauth-impdef=on", "console=ttyAMA0",
		[]string{"-chardev", "socket,id=ctl,path=CTLPATH,server=on,wait=off", "-device", "pci-serial,chardev=ctl"}, guestInit("arm64"), hostmem.VirtLayout},
}

func guestInit(goarch string) func() ([]byte, error) {
	return sync.OnceValues(func() ([]byte, error) {
		out := filepath.Join(os.TempDir(), fmt.Sprintf("kernel-guest-%s-%d", goarch, os.Getpid()))
		defer os.Remove(out)
		c := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./testdata/guest")
		c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+goarch)
		if b, err := c.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build guest: %w: %s", err, b)
		}
		return os.ReadFile(out)
	})
}

// cpio makes an initramfs of a single program, files (folders are nil), and modules, which are loaded in the order of their names.
func cpio(init []byte, files map[string][]byte, modules ...modpack.Module) []byte {
	var b bytes.Buffer
	entry := func(name string, mode int, data []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	entry("dev", 0o40755, nil)
	entry("init", 0o100755, init)
	if len(modules) > 0 {
		entry("modules", 0o40755, nil)
	}
	for i, m := range modules {
		entry(fmt.Sprintf("modules/%02d-%s.ko", i, m.Name), 0o100644, m.Data)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if files[name] == nil {
			entry(name, 0o40755, nil)
		} else {
			entry(name, 0o100644, files[name])
		}
	}
	entry("TRAILER!!!", 0, nil)
	return b.Bytes()
}

func startGuest(t testing.TB, kernel string, o guestOptions) *guest {
	t.Helper()
	target, err := kernels.Lookup(kernel)
	if err != nil {
		t.Fatal(err)
	}
	k, err := kernels.Fetch(t.Context(), "", target)
	if err != nil {
		t.Fatal(err)
	}
	m := guestMachines[k.Arch]
	init, err := m.init()
	if err != nil {
		t.Fatal(err)
	}
	var modules []modpack.Module
	if len(o.modules) > 0 {
		pack, err := modpack.Make(k.ModulesDir, o.modules)
		if err != nil {
			t.Fatal(err)
		}
		modules = pack.LoadOrder()
	}
	var files map[string][]byte
	if o.kexec {
		vmlinuz, err := os.ReadFile(k.Vmlinuz)
		if err != nil {
			t.Fatal(err)
		}
		files = map[string][]byte{"kexec": nil, "kexec/vmlinuz": vmlinuz, "kexec/initrd": cpio(init, nil)}
	}
	dir := t.TempDir()
	initrd := filepath.Join(dir, "init.cpio")
	if err := os.WriteFile(initrd, cpio(init, files, modules...), 0o644); err != nil {
		t.Fatal(err)
	}
	if o.cpu == "" {
		o.cpu = m.cpu
	}
	if o.mib == 0 {
		o.mib = 512
	}
	ram, err := os.CreateTemp("/dev/shm", "kernel-guest-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(ram.Name()) })
	if err := ram.Truncate(int64(o.mib) << 20); err != nil {
		t.Fatal(err)
	}
	ram.Close()
	g := &guest{t: t, dir: dir, ram: ram.Name(), kernel: k, began: time.Now()}
	args := slices.Clone(m.args)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "CTLPATH", filepath.Join(dir, "ctl"))
	}
	// noirqdebug: kernels built for real time handle the serial ports' interrupts in threads, and late as these are here they give the
	// interrupt up as one that nobody cares for.
	c := exec.Command(m.qemu, slices.Concat([]string{"-M", m.machine + ",memory-backend=ram0",
		"-object", fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=%s,share=on", o.mib, ram.Name()),
		"-m", fmt.Sprint(o.mib), "-smp", "2", "-cpu", o.cpu, "-kernel", k.Vmlinuz, "-initrd", initrd,
		"-append", m.cmdline + " loglevel=4 panic=0 noirqdebug " + o.cmdline, "-nodefaults", "-display", "none",
		"-serial", "file:" + filepath.Join(dir, "console"),
		"-qmp", "unix:" + filepath.Join(dir, "qmp") + ",server=on,wait=off"}, args, o.args)...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // even when a test times out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		if t.Failed() {
			console, _ := os.ReadFile(filepath.Join(dir, "console"))
			t.Logf("console:\n%s\nqemu: %s", console[max(0, len(console)-3000):], stderr.Bytes())
		}
	})
	dial := func(name string) (net.Conn, *bufio.Reader) {
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			conn, err := net.Dial("unix", filepath.Join(dir, name))
			if err == nil {
				t.Cleanup(func() { conn.Close() })
				return conn, bufio.NewReaderSize(conn, 1<<20)
			}
			if time.Now().After(end) {
				t.Fatalf("%v: %s", err, stderr.Bytes())
			}
		}
	}
	g.qmp, g.qmpIn = dial("qmp")
	g.ctl, g.in = dial("ctl")
	if _, err := g.qmpIn.ReadBytes('\n'); err != nil {
		t.Fatal(err)
	}
	g.execute("qmp_capabilities")
	if g.mem, err = hostmem.OpenRAMFile(ram.Name(), m.layout(uint64(o.mib)<<20), false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.mem.Close() })
	if !o.early {
		g.ready()
	}
	return g
}

// ready waits for the guest's userland. It says whether it had to reset the guest for that.
func (g *guest) ready() (again bool) {
	g.t.Helper()
	// Rarely a kernel dies of the emulator as it starts: it was seen to, of an int3 of its own patching in sched_clock_cpu, and without a
	// word. That is nothing of what is tested here, and is begun anew, once.
	for try := range 2 {
		g.ctl.SetReadDeadline(time.Now().Add(2 * time.Minute))
		for {
			line, err := g.in.ReadString('\n')
			if try == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
				g.t.Log("the guest's kernel does not come up; it is reset")
				g.execute("system_reset")
				break
			}
			if err != nil {
				g.t.Fatalf("guest is not ready: %v", err)
			}
			if strings.Contains(line, `"ready"`) {
				return try > 0
			}
		}
	}
	panic("unreachable")
}

// send puts a command to the guest that it will not answer.
func (g *guest) send(command string) { fmt.Fprintln(g.ctl, command) }

// ask puts a command to the guest and decodes its answer.
func (g *guest) ask(into any, command string) {
	g.t.Helper()
	g.send(command)
	g.ctl.SetReadDeadline(time.Now().Add(2 * time.Minute))
	line, err := g.in.ReadBytes('\n')
	if err != nil {
		g.t.Fatalf("%s: %v", command, err)
	}
	if into == nil {
		return
	}
	if err := json.Unmarshal(line, into); err != nil {
		g.t.Fatalf("%s: %v: %.200s", command, err, line)
	}
}

// execute runs a QMP command with arguments, the members of a JSON object.
func (g *guest) execute(command string, arguments ...string) {
	g.t.Helper()
	fmt.Fprintf(g.qmp, "{\"execute\":%q,\"arguments\":{%s}}\n", command, strings.Join(arguments, ","))
	g.qmp.SetReadDeadline(time.Now().Add(time.Minute))
	for {
		line, err := g.qmpIn.ReadBytes('\n')
		if err != nil {
			g.t.Fatalf("%s: %v", command, err)
		}
		var answer struct{ Return, Error any }
		if err := json.Unmarshal(line, &answer); err != nil || answer.Error != nil {
			g.t.Fatalf("%s: %s", command, line)
		}
		if answer.Return != nil {
			return
		}
	}
}

func (g *guest) attach(o Options) *Image {
	g.t.Helper()
	return g.attachTo(g.mem, o)
}

func (g *guest) attachTo(mem hostmem.Memory, o Options) *Image {
	g.t.Helper()
	img, err := Open(context.Background(), mem, o)
	if err != nil {
		var a *AttachError
		errors.As(err, &a)
		g.t.Fatalf("Open = %v; rungs %+v", err, a)
	}
	return img
}

// await waits for a panic state.
func (g *guest) await(img *Image, is func(PanicState) bool) PanicState {
	g.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		p, err := img.View(context.Background()).Panic()
		if err != nil {
			g.t.Fatal(err)
		}
		if is(p) {
			return p
		}
		if time.Now().After(end) {
			g.t.Fatalf("panic state is %+v", p)
		}
	}
}
