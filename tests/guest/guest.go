// Package guest boots stock Debian kernels in QEMU, with an init of the project's own that lets things go wrong there on
// command, for tests: the host's RAM is a file, and what the guest says of itself is the truth that agents are held against.
package guest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
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

// UUID is the system UUID of the guests.
const UUID = "6f1e5c1e-0001-4a6b-9d7a-0123456789ab"

// Guest is a virtual machine whose RAM is a file.
type Guest struct {
	t     testing.TB
	dir   string
	RAM   string // path of its memory
	MiB   int
	CPUs  int
	Arch  string // Debian's name
	m     machine
	began time.Time

	qmu   sync.Mutex
	qmp   net.Conn
	qmpIn *bufio.Reader

	ctl     net.Conn
	answers chan map[string]json.RawMessage
	Exits   chan Exit
	ready   chan struct{} // one for each boot
}

// Exit is the end of a child of the guest's init.
type Exit struct {
	PID, Signal int
	At          time.Time
}

// machine is what the guests of an architecture are made of.
type machine struct {
	qemu, model, cpu, cmdline string
	control                   []string // the serial line to the guest's init, at the socket CTL
	init                      func() ([]byte, error)
	layout                    func(ram uint64) []hostmem.Extent
	jump                      []byte // code that jumps to itself
	// Where QEMU's debug stub has the program counter and the flags, among what flags there is the mode, and what switches interrupts off.
	pc, flags   int
	least       int // bytes of registers
	privileged  func(regs []byte) bool
	mask, value uint32
}

// By Debian's names of the architectures. Registers are as in gdb's target descriptions of QEMU, gdb-xml: on x86-64 rax to r15, rip, eflags, cs; on
// aarch64 x0 to x30, sp, pc, cpsr.
var machines = map[string]machine{
	"amd64": {qemu: "qemu-system-x86_64", model: "q35", cpu: "max", cmdline: "console=ttyS0 no_timer_check tsc=reliable",
		control: []string{"-serial", "unix:CTL,server=on,wait=off"}, init: initProgram("amd64"), layout: hostmem.Q35Layout,
		jump: []byte{0xeb, 0xfe}, pc: 128, flags: 136, least: 144, privileged: func(regs []byte) bool { return regs[140]&3 == 0 }, mask: 0x200},
	"arm64": {qemu: "qemu-system-aarch64", model: "virt", cpu: "max,pauth-impdef=on", cmdline: "console=ttyAMA0",
		control: []string{"-chardev", "socket,id=ctl,path=CTL,server=on,wait=off", "-device", "pci-serial,chardev=ctl"}, init: initProgram("arm64"), layout: hostmem.VirtLayout,
		jump: []byte{0x00, 0x00, 0x00, 0x14}, pc: 256, flags: 264, least: 268, privileged: func(regs []byte) bool { return regs[264]&0xf != 0 }, mask: 0x3c0, value: 0x3c0},
}

func initProgram(arch string) func() ([]byte, error) {
	return sync.OnceValues(func() ([]byte, error) {
		out := filepath.Join(os.TempDir(), fmt.Sprintf("engine-guest-%s-%d", arch, os.Getpid()))
		defer os.Remove(out)
		c := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "github.com/backdoor-rhs/backdoor/tests/guest/init")
		c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
		if b, err := c.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build guest: %w: %s", err, b)
		}
		return os.ReadFile(out)
	})
}

// cpio makes an initramfs of a single program, or of none.
func cpio(init []byte, files map[string][]byte) []byte {
	var b bytes.Buffer
	entry := func(name string, mode int, data []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	entry("dev", 0o40755, nil)
	if init != nil {
		entry("init", 0o100755, init)
	}
	for name, data := range files {
		entry(name, 0o100644, data)
	}
	entry("TRAILER!!!", 0, nil)
	return b.Bytes()
}

// Module builds a kernel module for a kernel from its sources, NAME.c and Makefile in dir, against Debian's headers.
func Module(t testing.TB, kernel, dir, name string) []byte {
	t.Helper()
	b, err := BuildModule(t, kernel, dir, name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// BuildModule does the same, and returns as an error that it cannot be built here: the compiler of a later Debian's kernel may be out of reach.
func BuildModule(t testing.TB, kernel, dir, name string) ([]byte, error) {
	t.Helper()
	target, k := fetch(t, kernel)
	headers, err := kernels.Cache{}.Headers(t.Context(), target, k)
	if err != nil {
		t.Fatal(err)
	}
	compiler, err := kernels.Cache{}.Compiler(t.Context(), target, headers)
	if err != nil {
		return nil, fmt.Errorf("build module %s: %w", name, err)
	}
	build := t.TempDir()
	for _, file := range []string{"Makefile", name + ".c"} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(build, file), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// Types of a module's own are of no use here, and making them takes vmlinux and pahole.
	c := exec.Command("make", "-s", "-C", headers, "M="+build, "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules")
	if compiler != "" {
		c.Env = append(os.Environ(), "PATH="+compiler+string(os.PathListSeparator)+os.Getenv("PATH"))
	}
	if out, err := c.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build module %s: %w\n%s", name, err, out)
	}
	b, err := os.ReadFile(filepath.Join(build, name+".ko"))
	if err != nil {
		t.Fatal(err)
	}
	return b, nil
}

// fetch looks a kernel up by its name and has it fetched.
func fetch(t testing.TB, kernel string) (kernels.Target, kernels.Kernel) {
	t.Helper()
	target, err := kernels.Lookup(kernel)
	if err != nil {
		t.Fatal(err)
	}
	k, err := kernels.Fetch(t.Context(), "", target)
	if err != nil {
		t.Fatal(err)
	}
	return target, k
}

// DebianModules returns modules of a kernel's package and all that they need, as files for Options, and their names in the order in which
// they are to be loaded.
func DebianModules(t testing.TB, kernel string, names ...string) (files map[string][]byte, order []string) {
	t.Helper()
	_, k := fetch(t, kernel)
	pack, err := modpack.Make(k.ModulesDir, names)
	if err != nil {
		t.Fatal(err)
	}
	files = make(map[string][]byte)
	var load func(m modpack.Module)
	load = func(m modpack.Module) {
		if files[m.Name+".ko"] != nil {
			return
		}
		files[m.Name+".ko"] = m.Data
		for _, n := range pack.Modules {
			if slices.Contains(m.Needs, n.Name) {
				load(n)
			}
		}
		order = append(order, m.Name+".ko")
	}
	for _, m := range pack.Modules {
		load(m)
	}
	return files, order
}

// Options change what is started; the zero value is two CPUs, 512 MiB and nothing more.
type Options struct {
	CPUs, MiB int
	Files     map[string][]byte // in the guest's root directory
	Args      []string          // of QEMU
	Append    string            // to the kernel's command line
	// Hangs says that the machine comes to no init: it gets none, and nobody waits for it.
	Hangs bool
}

// Start boots a kernel (kernels.Lookup) and waits until its init is ready. The machine ends with the test.
func Start(t testing.TB, kernel string, o Options) *Guest {
	t.Helper()
	_, k := fetch(t, kernel)
	m := machines[k.Arch]
	init, err := m.init()
	if err != nil {
		t.Fatal(err)
	}
	if o.MiB == 0 {
		o.MiB = 512
	}
	if o.CPUs == 0 {
		o.CPUs = 2
	}
	g := &Guest{t: t, dir: t.TempDir(), MiB: max(o.MiB, 256), CPUs: o.CPUs, Arch: k.Arch, m: m, began: time.Now(),
		answers: make(chan map[string]json.RawMessage, 1), Exits: make(chan Exit, 1000), ready: make(chan struct{}, 10)}
	if o.Hangs {
		init = nil
	}
	initrd := filepath.Join(g.dir, "init.cpio")
	if err := os.WriteFile(initrd, cpio(init, o.Files), 0o644); err != nil {
		t.Fatal(err)
	}
	ram, err := os.CreateTemp("/dev/shm", "engine-guest-*")
	if err != nil {
		t.Fatal(err)
	}
	g.RAM = ram.Name()
	t.Cleanup(func() { os.Remove(g.RAM) })
	if err := ram.Truncate(int64(g.MiB) << 20); err != nil {
		t.Fatal(err)
	}
	ram.Close()
	c := exec.Command(m.qemu, "-M", m.model+",memory-backend=ram0", "-uuid", UUID,
		"-object", fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=%s,share=on", g.MiB, g.RAM),
		"-m", fmt.Sprint(g.MiB), "-smp", fmt.Sprint(o.CPUs), "-cpu", m.cpu, "-kernel", k.Vmlinuz, "-initrd", initrd,
		"-append", m.cmdline+" loglevel=4 panic=0 "+o.Append, "-nodefaults", "-display", "none",
		"-serial", "file:"+filepath.Join(g.dir, "console"),
		"-gdb", "unix:"+filepath.Join(g.dir, "gdb")+",server=on,wait=off",
		"-qmp", "unix:"+filepath.Join(g.dir, "qmp")+",server=on,wait=off")
	for _, a := range m.control {
		c.Args = append(c.Args, strings.Replace(a, "CTL", filepath.Join(g.dir, "ctl"), 1))
	}
	c.Args = append(c.Args, o.Args...)
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
			console, _ := os.ReadFile(filepath.Join(g.dir, "console"))
			t.Logf("console:\n%s\nqemu: %s", console[max(0, len(console)-3000):], stderr.Bytes())
		}
	})
	dial := func(name string) net.Conn {
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			conn, err := net.Dial("unix", filepath.Join(g.dir, name))
			if err == nil {
				t.Cleanup(func() { conn.Close() })
				return conn
			}
			if time.Now().After(end) {
				t.Fatalf("%v: %s", err, stderr.Bytes())
			}
		}
	}
	g.qmp = dial("qmp")
	g.qmpIn = bufio.NewReader(g.qmp)
	g.ctl = dial("ctl")
	go g.listen()
	if _, err := g.qmpIn.ReadBytes('\n'); err != nil {
		t.Fatal(err)
	}
	g.Execute("qmp_capabilities")
	if !o.Hangs {
		g.start()
	}
	return g
}

// Layout is where the bytes of that file are in the guest's physical memory.
func (g *Guest) Layout() []hostmem.Extent { return g.m.layout(uint64(g.MiB) << 20) }

// Jump is code of the guest's architecture that jumps to itself.
func (g *Guest) Jump() []byte { return g.m.jump }

// Memory opens the file that is the guest's RAM.
func (g *Guest) Memory(write bool) *hostmem.RAMFile {
	g.t.Helper()
	mem, err := hostmem.OpenRAMFile(g.RAM, g.Layout(), write)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { mem.Close() })
	return mem
}

// listen sorts what the guest says.
func (g *Guest) listen() {
	in := bufio.NewReaderSize(g.ctl, 1<<20)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		i := bytes.IndexByte(line, '{')
		if i < 0 {
			continue // firmware
		}
		var m map[string]json.RawMessage
		if json.Unmarshal(line[i:], &m) != nil {
			continue
		}
		switch {
		case m["ready"] != nil:
			select {
			case <-g.answers: // of the boot before, which nobody has taken
			default:
			}
			g.ready <- struct{}{}
		case m["exit"] != nil:
			var e Exit
			json.Unmarshal(m["exit"], &e.PID)
			json.Unmarshal(m["signal"], &e.Signal)
			e.At = time.Now()
			g.Exits <- e
		default:
			g.answers <- m
		}
	}
}

// start waits for the first boot. An emulator whose CPUs run in threads of their own (QEMU's MTTCG) now and then has one of them run into the int3 by
// which the other replaces an instruction (text_poke_bp), after it is gone; a kernel that panics so has met nobody's fault yet, and boots once more.
func (g *Guest) start() {
	g.t.Helper()
	look := time.NewTicker(time.Second)
	defer look.Stop()
	late := time.After(3 * time.Minute)
	for resets, from := 0, 0; ; {
		select {
		case <-g.ready:
			return
		case <-late:
			g.t.Fatal("the guest is not ready in time")
		case <-look.C:
		}
		console, err := os.ReadFile(filepath.Join(g.dir, "console"))
		if err != nil || !bytes.Contains(console[from:], []byte("Kernel panic - not syncing")) {
			continue
		}
		if resets++; resets > 2 || !bytes.Contains(console[from:], []byte("int3: 0000")) {
			g.t.Fatal("the guest has panicked while it booted")
		}
		g.t.Logf("the guest has met an int3 of its emulator while it booted; once more. It said:\n%s", console[max(from, len(console)-3000):])
		from = len(console)
		g.Execute("system_reset")
	}
}

// WaitReady waits until a boot has come to its end.
func (g *Guest) WaitReady() {
	g.t.Helper()
	select {
	case <-g.ready:
	case <-time.After(3 * time.Minute):
		g.t.Fatal("the guest is not ready in time")
	}
}

// Ask puts a command to the guest and decodes the member of its answer.
func (g *Guest) Ask(command, member string, into any) {
	g.t.Helper()
	fmt.Fprintln(g.ctl, command)
	g.answer(command, member, into)
}

// Try is Ask for a command that the guest may refuse, which is the error.
func (g *Guest) Try(command, member string, into any) error {
	fmt.Fprintln(g.ctl, command)
	return g.take(member, into)
}

func (g *Guest) answer(command, member string, into any) {
	g.t.Helper()
	if err := g.take(member, into); err != nil {
		g.t.Fatalf("%s: %v", command, err)
	}
}

func (g *Guest) take(member string, into any) error {
	select {
	case m := <-g.answers:
		if m[member] == nil {
			return fmt.Errorf("%s", m["error"])
		}
		return json.Unmarshal(m[member], into)
	case <-time.After(time.Minute):
		return errors.New("no answer")
	}
}

// Answer waits for the answer to what was said, a number.
func (g *Guest) Answer(member string) (n int) {
	g.t.Helper()
	g.answer("what was said", member, &n)
	return n
}

// Say gives a command without waiting for its answer; Answer takes it, before the next question, unless the machine is
// restarted meanwhile.
func (g *Guest) Say(command string) { fmt.Fprintln(g.ctl, command) }

// Spawn starts a child of a kind (see init) and returns its PID.
func (g *Guest) Spawn(kind string) int {
	g.t.Helper()
	var pid int
	g.Ask("spawn "+kind, "pid", &pid)
	return pid
}

// Complaints are the kernel's warnings and errors that were not there at the start of a healthy guest.
func (g *Guest) Complaints() []string {
	g.t.Helper()
	var all, bad []string
	g.Ask("dmesg", "dmesg", &all)
	for _, l := range all {
		if strings.Contains(l, "is installing a program with bpf_probe_write_user helper") {
			continue // by a fault of the suite's
		}
		if strings.Contains(l, "WARNING") || strings.Contains(l, "BUG") || strings.Contains(l, "Call Trace") || strings.Contains(l, "RIP:") ||
			strings.Contains(l, "rcu") && strings.Contains(l, "stall") || strings.Contains(l, "corrupt") {
			bad = append(bad, l)
		}
	}
	return bad
}

// Lock has a CPU that runs a task within the kernel spin at a jump to itself, with its interrupts off, and returns which.
// QEMU's debug stub stops the machine while somebody is connected to it. Gadget is where the kernel's code has a [Guest.Jump].
//
// Source: "GDB Remote Serial Protocol" of the GDB manual.
func (g *Guest) Lock(gadget uint64, running func(cpu int) bool) int {
	g.t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("unix", filepath.Join(g.dir, "gdb"))
		if err != nil {
			g.t.Fatal(err)
		}
		in := bufio.NewReader(conn)
		command := func(packet string) string {
			sum := byte(0)
			for i := range len(packet) {
				sum += packet[i]
			}
			fmt.Fprintf(conn, "$%s#%02x", packet, sum)
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			for {
				if _, err := in.ReadString('$'); err != nil {
					g.t.Fatalf("%s: %v", packet, err)
				}
				answer, err := in.ReadString('#')
				if err != nil {
					g.t.Fatalf("%s: %v", packet, err)
				}
				in.Discard(2)
				fmt.Fprint(conn, "+")
				if !strings.HasPrefix(answer, "T") { // the news that the machine has stopped
					return strings.TrimSuffix(answer, "#")
				}
			}
		}
		locked := -1
		for cpu := range g.CPUs {
			command(fmt.Sprintf("Hg%d", cpu+1))
			regs, err := hex.DecodeString(command("g"))
			if err != nil || len(regs) < g.m.least {
				g.t.Fatalf("registers: %d bytes, %v", len(regs), err)
			}
			if !g.m.privileged(regs) || !running(cpu) {
				continue
			}
			binary.LittleEndian.PutUint64(regs[g.m.pc:], gadget)
			flags := binary.LittleEndian.Uint32(regs[g.m.flags:])
			binary.LittleEndian.PutUint32(regs[g.m.flags:], flags&^g.m.mask|g.m.value)
			if a := command("G" + hex.EncodeToString(regs)); a != "OK" {
				g.t.Fatalf("set registers: %s", a)
			}
			locked = cpu
			break
		}
		command("D")
		conn.Close()
		if locked >= 0 {
			return locked
		}
	}
	g.t.Fatal("no CPU was met running a task within the kernel")
	return -1
}

// Execute runs a QMP command.
func (g *Guest) Execute(command string) { g.t.Helper(); g.ExecuteWith(command, nil) }

// ExecuteWith runs a QMP command with arguments, which are put as JSON.
func (g *Guest) ExecuteWith(command string, arguments any) {
	g.t.Helper()
	said := map[string]any{"execute": command}
	if arguments != nil {
		said["arguments"] = arguments
	}
	text, err := json.Marshal(said)
	if err != nil {
		g.t.Fatal(err)
	}
	g.qmu.Lock()
	defer g.qmu.Unlock()
	g.qmp.Write(append(text, '\n'))
	g.qmp.SetReadDeadline(time.Now().Add(time.Minute))
	for {
		line, err := g.qmpIn.ReadBytes('\n')
		if err != nil {
			g.t.Errorf("%s: %v", command, err)
			return
		}
		var answer struct{ Return, Error any }
		if err := json.Unmarshal(line, &answer); err != nil || answer.Error != nil {
			g.t.Errorf("%s: %s", command, line)
			return
		}
		if answer.Return != nil {
			return
		}
	}
}
