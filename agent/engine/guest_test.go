package engine

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

var (
	guestsFlag = flag.String("guests", "6.1", "comma-separated `kernels` to boot in QEMU and heal (6.1, 6.12, 6.1-generic, 6.12-generic, or all)")
	killsFlag  = flag.Int("kills", 3, "how often to kill each kind of victim")
)

// guestUUID is the system UUID of the guests.
const guestUUID = "6f1e5c1e-0001-4a6b-9d7a-0123456789ab"

// forEachGuest runs f for the kernels that were asked for.
func forEachGuest(t *testing.T, f func(t *testing.T, kernel string)) {
	if testing.Short() {
		t.Skip("boots kernels in QEMU, a minute for each: not with -short")
	}
	want := []string{"6.1", "6.12", "6.1-generic", "6.12-generic"}
	if *guestsFlag != "all" {
		want = strings.Split(*guestsFlag, ",")
	}
	for _, k := range want {
		t.Run(k, func(t *testing.T) { f(t, k) })
	}
}

// guest is a virtual machine whose RAM is a file.
type guest struct {
	t     *testing.T
	dir   string
	ram   string
	mib   int
	began time.Time

	qmu   sync.Mutex
	qmp   net.Conn
	qmpIn *bufio.Reader

	ctl     net.Conn
	answers chan map[string]json.RawMessage
	exits   chan exit
	ready   chan struct{} // one for each boot
}

type exit struct {
	pid, signal int
	at          time.Time
}

var guestInit = sync.OnceValues(func() ([]byte, error) {
	out := filepath.Join(os.TempDir(), fmt.Sprintf("engine-guest-%d", os.Getpid()))
	defer os.Remove(out)
	c := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./testdata/guest")
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if b, err := c.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build guest: %w: %s", err, b)
	}
	return os.ReadFile(out)
})

// cpio makes an initramfs of a single program.
func cpio(init []byte) []byte {
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
	entry("TRAILER!!!", 0, nil)
	return b.Bytes()
}

func startGuest(t *testing.T, kernel string) *guest {
	t.Helper()
	target, err := kernels.Lookup(kernel)
	if err != nil {
		t.Fatal(err)
	}
	k, err := kernels.Fetch(t.Context(), "", target)
	if err != nil {
		t.Fatal(err)
	}
	init, err := guestInit()
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, dir: t.TempDir(), mib: 512, began: time.Now(),
		answers: make(chan map[string]json.RawMessage, 1), exits: make(chan exit, 1000), ready: make(chan struct{}, 10)}
	initrd := filepath.Join(g.dir, "init.cpio")
	if err := os.WriteFile(initrd, cpio(init), 0o644); err != nil {
		t.Fatal(err)
	}
	ram, err := os.CreateTemp("/dev/shm", "engine-guest-*")
	if err != nil {
		t.Fatal(err)
	}
	g.ram = ram.Name()
	t.Cleanup(func() { os.Remove(g.ram) })
	if err := ram.Truncate(int64(g.mib) << 20); err != nil {
		t.Fatal(err)
	}
	ram.Close()
	c := exec.Command("qemu-system-x86_64", "-M", "q35,memory-backend=ram0", "-uuid", guestUUID,
		"-object", fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=%s,share=on", g.mib, g.ram),
		"-m", fmt.Sprint(g.mib), "-smp", "2", "-cpu", "max", "-kernel", k.Vmlinuz, "-initrd", initrd,
		"-append", "console=ttyS0 loglevel=4 panic=0", "-nodefaults", "-display", "none",
		"-serial", "file:"+filepath.Join(g.dir, "console"),
		"-serial", "unix:"+filepath.Join(g.dir, "ctl")+",server=on,wait=off",
		"-gdb", "unix:"+filepath.Join(g.dir, "gdb")+",server=on,wait=off",
		"-qmp", "unix:"+filepath.Join(g.dir, "qmp")+",server=on,wait=off")
	var stderr bytes.Buffer
	c.Stderr = &stderr
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
	g.execute("qmp_capabilities")
	g.waitReady()
	return g
}

func (g *guest) memory(write bool) *hostmem.RAMFile {
	g.t.Helper()
	mem, err := hostmem.OpenRAMFile(g.ram, hostmem.Q35Layout(uint64(g.mib)<<20), write)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { mem.Close() })
	return mem
}

// listen sorts what the guest says.
func (g *guest) listen() {
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
			g.ready <- struct{}{}
		case m["exit"] != nil:
			var e exit
			json.Unmarshal(m["exit"], &e.pid)
			json.Unmarshal(m["signal"], &e.signal)
			e.at = time.Now()
			g.exits <- e
		default:
			g.answers <- m
		}
	}
}

func (g *guest) waitReady() {
	g.t.Helper()
	select {
	case <-g.ready:
	case <-time.After(3 * time.Minute):
		g.t.Fatal("the guest is not ready in time")
	}
}

// ask puts a command to the guest and decodes the member of its answer.
func (g *guest) ask(command, member string, into any) {
	g.t.Helper()
	fmt.Fprintln(g.ctl, command)
	select {
	case m := <-g.answers:
		if m[member] == nil {
			g.t.Fatalf("%s: %s", command, m["error"])
		}
		if err := json.Unmarshal(m[member], into); err != nil {
			g.t.Fatalf("%s: %v", command, err)
		}
	case <-time.After(time.Minute):
		g.t.Fatalf("%s: no answer", command)
	}
}

func (g *guest) spawn(kind string) int {
	g.t.Helper()
	var pid int
	g.ask("spawn "+kind, "pid", &pid)
	return pid
}

// complaints are the kernel's warnings and errors that were not there at the start of a healthy guest.
func (g *guest) complaints() []string {
	g.t.Helper()
	var all, bad []string
	g.ask("dmesg", "dmesg", &all)
	for _, l := range all {
		if strings.Contains(l, "WARNING") || strings.Contains(l, "BUG") || strings.Contains(l, "Call Trace") || strings.Contains(l, "RIP:") ||
			strings.Contains(l, "rcu") && strings.Contains(l, "stall") || strings.Contains(l, "corrupt") {
			bad = append(bad, l)
		}
	}
	return bad
}

// lock has a CPU that runs a task within the kernel spin at a jump to itself, with its interrupts off, and returns which.
// QEMU's debug stub stops the machine while somebody is connected to it.
//
// Source: "GDB Remote Serial Protocol" of the GDB manual; registers of x86-64: rax to r15, rip, eflags, cs.
func (g *guest) lock(gadget uint64, running func(cpu int) bool) int {
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
		for cpu := range 2 {
			command(fmt.Sprintf("Hg%d", cpu+1))
			regs, err := hex.DecodeString(command("g"))
			if err != nil || len(regs) < 144 {
				g.t.Fatalf("registers: %d bytes, %v", len(regs), err)
			}
			if regs[140]&3 != 0 || !running(cpu) {
				continue
			}
			binary.LittleEndian.PutUint64(regs[128:], gadget)
			flags := binary.LittleEndian.Uint32(regs[136:])
			binary.LittleEndian.PutUint32(regs[136:], flags&^0x200)
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

// execute runs a QMP command.
func (g *guest) execute(command string) {
	g.t.Helper()
	g.qmu.Lock()
	defer g.qmu.Unlock()
	fmt.Fprintf(g.qmp, "{\"execute\":%q}\n", command)
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
