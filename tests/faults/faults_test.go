// Package faults is the fault suite: it lets real kernels fall ill, each of its rows in another way, and measures whether
// the engine says so, who it accuses, how long that takes, and what becomes of the host. The truth comes from the harness.
//
// "go test" runs a few rows on one kernel; "make faults" all of them, and leaves the table as text, JSON and HTML in
// build/faults, of which "make faults-table" makes the README's.
package faults

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
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
	rowsFlag    = flag.String("rows", "oops,root-cred,hide-module,hide-task,hook-syscall,hook-fops,probe,d-state,irqs-off", "comma-separated `faults`, main or all")
	outFlag     = flag.String("out", "", "`directory` for the table as text, JSON and HTML")
	pathFlag    = flag.String("path", "window", "how memory is reached: window, nocas for one without compare-and-swap, or dma for the model of a DMA engine")
	healthyFlag = flag.Duration("healthy", 10*time.Second, "how `long` a host works hard and is healthy")
	cpusFlag    = flag.Int("cpus", 2, "`number` of the guests' CPUs")
	recordFlag  = flag.String("record", "", "`directory` for the series of samples by which each finding was judged, and those of healthy hosts, as package detect has them in its testdata")
)

// fault is a row of the table.
type fault struct {
	name  string
	about string        // what happens, for the table
	start string        // what the guest's init spawns; empty means the fault module's fault of that name
	want  []detect.Kind // any of them
	key   string        // how the finding's own key begins, where the kind alone does not say that it is the right one
	by    time.Duration // until the finding
	// heal is the action that an operator asks for, or that policy does by itself; empty if there is none: the host lives on
	// with it, or is restarted by the suite.
	heal string
	// dead says that the host is restarted by the repair.
	dead bool
	// next says that it may take the rung after that.
	next bool
	// do lets it happen from outside, instead of the guest.
	do func(b *bed)
	// age is how long the host has run before it happens.
	age time.Duration
	// quiet says that nothing is wrong with it: the row is red if anything is found before all of the kernel's code was compared
	// twice.
	quiet bool
	// after takes the fault back at the end of its row: a fault of the module.
	after string
	// undo is what else takes it back.
	undo func(b *bed)
	// machine is what the row needs of a kernel: generic for what cloud kernels lack.
	machine string
	// lock is what the culprit waits for.
	lock string
	// accused is the module that is to be accused.
	accused string
	// innocent says that nobody in particular is to blame.
	innocent bool
	// shares says that it takes another CPU than that for the guest's own use, and a kernel that keeps nothing back for those who wait: since 6.8 there
	// is a server for them (commit 63ba8422f876).
	shares bool
	// since611 says that it takes a kernel of Linux 6.11 or later.
	since611 bool
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

// filtered has an eBPF program be at work, and something done to it.
func filtered(then string) func(b *bed) {
	return func(b *bed) {
		b.pid = b.g.Spawn("rootbpf")
		for end := time.Now().Add(10 * time.Second); !slices.Contains(b.programs(), "quiet"); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				b.t.Fatal("the guest's eBPF program is not there")
			}
		}
		b.g.Spawn(then)
	}
}

// programs are the names of the guest's eBPF programs, by its own word.
func (b *bed) programs() (names []string) {
	b.t.Helper()
	b.g.Ask("programs", "programs", &names)
	return names
}

// load loads modules, in their order.
func (b *bed) load(names []string) {
	b.t.Helper()
	for _, name := range names {
		var done string
		b.g.Ask("load "+name, "loaded", &done)
	}
}

// halt is a function that no guest runs before its end; the bytes behind its beginning are no place that the kernel patches.
const halt, codeAt, codeLen = "kernel_halt", 16, 12

var codeWas = make([]byte, codeLen)

// overwrite changes code from outside.
func (b *bed) overwrite(pa int64) {
	b.t.Helper()
	copy(codeWas, b.read(pa, codeLen))
	if _, err := b.g.Memory(true).WriteAt(bytes.Repeat([]byte{0xcc}, codeLen), pa); err != nil {
		b.t.Fatal(err)
	}
}

// leaving returns where the code by which a module leaves lies in that file, by what the guest says.
func (b *bed) leaving(module string) int64 {
	b.t.Helper()
	v, err := b.e.View(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	va, err := strconv.ParseUint(strings.TrimSpace(b.cat("/sys/module/"+module+"/sections/.exit.text")), 0, 64)
	if err != nil {
		b.t.Fatal(err)
	}
	pa, err := v.Phys(kernel.VirtAddr(va) + codeAt)
	if err != nil {
		b.t.Fatal(err)
	}
	return int64(pa)
}

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

// cannot says why a row is not for this kernel.
func (b *bed) cannot(f fault) string {
	b.t.Helper()
	is61 := b.kernel == "6.1" || strings.HasPrefix(b.kernel, "6.1-")
	switch {
	case f.since611 && is61:
		return "it needs a kernel since 6.11"
	case !b.module && (f.start == "" && f.do == nil || f.after != ""):
		return "it needs the module"
	case !strings.HasSuffix(b.kernel, f.machine):
		return "it needs a " + f.machine + " kernel"
	case f.shares && (*cpusFlag < 2 || !is61):
		return "it needs two CPUs, and a kernel before 6.8"
	case b.g.Arch != "amd64" && (slices.Contains(f.want, detect.KindForkBomb) || slices.Contains(f.want, detect.KindMemoryHog) || slices.Contains(f.want, detect.KindExhaustion)):
		// Debian's 6.1 for arm64 names no variables in its kallsyms (CONFIG_KALLSYMS_ALL), and not all are found otherwise.
		v, err := b.e.View(b.t.Context())
		if err == nil {
			_, err = v.Usage()
		}
		if errors.Is(err, kernel.ErrNotFound) || errors.Is(err, kernel.ErrNotSupported) {
			return err.Error()
		}
	}
	return ""
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

// few lowers a limit of tasks, not below the least that the kernel takes, to somewhat more than there are, writes what else there is to write, and has
// somebody use most of it up.
func few(file string, least int, also ...string) func(b *bed) {
	return func(b *bed) {
		var done string
		was := strings.TrimSpace(b.cat(file))
		b.restore = func() { b.g.Ask("write "+file+" "+was, "written", &done) }
		tasks := b.tasks()
		for before := math.MaxInt; tasks < before-2; { // those of another row are ending
			time.Sleep(time.Second)
			before, tasks = tasks, b.tasks()
		}
		limit := max(least, tasks+40)
		b.g.Ask(fmt.Sprintf("write %s %d", file, limit), "written", &done)
		for _, w := range also {
			b.g.Ask("write "+w, "written", &done)
		}
		b.pid = b.g.Spawn(fmt.Sprintf("rootfork%d", limit*98/100-tasks))
	}
}

// tasks is how many there are, by the guest's own /proc.
func (b *bed) tasks() int {
	var running, tasks int
	for _, f := range strings.Fields(b.cat("/proc/loadavg")) {
		if n, _ := fmt.Sscanf(f, "%d/%d", &running, &tasks); n == 2 {
			break
		}
	}
	return tasks
}

// ended ends what was started, all of it.
func ended(b *bed) {
	var done string
	b.g.Ask(fmt.Sprintf("kill %d", b.pid), "killed", &done)
	if b.restore != nil {
		b.restore()
		b.restore = nil
	}
}

// devices are a disk of nothing but zeros and an interface of the network that leads nowhere. throttle is what QMP is told for the disk to take so many bytes a second; 0: as many as it can.
var devices = []string{"-drive", "if=none,id=blk0,driver=null-co,size=64M,read-zeroes=on", "-device", "virtio-blk-pci,drive=blk0,id=disk0",
	"-netdev", "user,id=cable0,restrict=on", "-device", "virtio-net-pci,id=net0,netdev=cable0"}

func throttle(bps int) map[string]any {
	return map[string]any{"id": "/machine/peripheral/disk0/virtio-backend", "bps": bps, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}
}

// lock has a CPU that is within the kernel spin with its interrupts off, without any module.
func lock(b *bed) {
	b.t.Helper()
	// One at least has to be met there, and another has to be left.
	b.g.Spawn("forks")
	b.g.Spawn("forks")
	v, err := b.e.View(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	text, _ := b.at("_stext", 0)
	code := make([]byte, 4<<20)
	if err := v.ReadVirt(text, code); err != nil {
		b.t.Fatal(err)
	}
	jump := 0
	for ; ; jump++ { // as it is aligned
		i := bytes.Index(code[jump:], b.g.Jump())
		if i < 0 {
			b.t.Fatal("the kernel's code has no jump to itself")
		}
		if jump += i; jump%len(b.g.Jump()) == 0 || b.g.Arch == "amd64" {
			break
		}
	}
	b.g.Lock(uint64(text)+uint64(jump), func(cpu int) bool {
		hb, err := v.Heartbeat()
		return err == nil && !hb.CPUs[cpu].Idle && hb.CPUs[cpu].Preempt == 0 // it holds no lock, for which others would soon spin, too
	})
}

// Rows are in an order in which each host can bear what came before.
var rows = []fault{
	{name: "fork-bomb", about: "a user's fork bomb",
		start: "bomb", want: []detect.Kind{detect.KindForkBomb}, by: 10 * time.Second, heal: heal.StopForkBomb},
	{name: "fork-bomb-root", about: "root's fork bomb",
		start: "rootbomb", want: []detect.Kind{detect.KindForkBomb}, by: 10 * time.Second, heal: heal.StopForkBomb},
	{name: "memory-hog", about: "a process takes all memory",
		start: "hog", want: []detect.Kind{detect.KindMemoryHog}, by: 20 * time.Second, heal: heal.KillProcess},
	{name: "memory-hog-exempt", about: "the same, kept from the OOM killer",
		start: "roothog", want: []detect.Kind{detect.KindMemoryHog}, by: 20 * time.Second, heal: heal.KillProcess},
	{name: "runaway", about: "a process eats a CPU",
		start: "spin", want: []detect.Kind{detect.KindRunawayProcess}, by: 20 * time.Second, heal: heal.KillProcess},
	{name: "runaway-thread", about: "one thread of a process eats a CPU",
		start: "thread", want: []detect.Kind{detect.KindRunawayProcess}, by: 20 * time.Second, heal: heal.KillProcess},
	{name: "starved", about: "a program of real-time priority lets nobody else run on a CPU",
		want: []detect.Kind{detect.KindRunawayProcess}, key: "starved", by: 30 * time.Second, heal: heal.KillProcess, shares: true, do: func(b *bed) {
			b.pid = b.g.Spawn("rootfifo")
			b.g.Spawn("rootpinned")
		}, undo: func(b *bed) {
			var done string
			b.g.Ask("write /proc/sys/kernel/sched_rt_runtime_us 950000", "written", &done)
		}},
	{name: "starved-normal", about: "the same; it is to go on as any other",
		want: []detect.Kind{detect.KindRunawayProcess}, key: "starved", by: 30 * time.Second, heal: heal.NormalizeRealtime, shares: true, do: func(b *bed) {
			b.pid = b.g.Spawn("rootfifo")
			b.g.Spawn("rootpinned")
		}, undo: func(b *bed) {
			var done string
			b.g.Ask("write /proc/sys/kernel/sched_rt_runtime_us 950000", "written", &done)
			ended(b)
		}},
	{name: "memory-stall", about: "nobody gets on for want of memory that a control group is not to have",
		start: "rootstall", want: []detect.Kind{detect.KindExhaustion}, key: "pressure", by: 90 * time.Second, innocent: true, undo: ended},
	{name: "root-cred", about: "uid 0 is written into a process's credentials",
		want: []detect.Kind{detect.KindTampering}, key: "cred ", by: 10 * time.Second, heal: heal.KillProcess},
	{name: "give-root", about: "a process of a user is given root's credentials (`commit_creds`)",
		want: []detect.Kind{detect.KindTampering}, key: "cred ", by: 10 * time.Second, heal: heal.KillProcess},
	{name: "share-cred", about: "a process of a user points to the kernel's own (`init_cred`)",
		want: []detect.Kind{detect.KindTampering}, key: "cred ", by: 10 * time.Second, heal: heal.KillProcess},
	{name: "hide-module", about: "a module is hidden",
		want: []detect.Kind{detect.KindTampering}, key: "module ", by: 10 * time.Second, heal: heal.RelinkHidden,
		truth: func(b *bed) bool { return !strings.Contains(b.cat("/proc/modules"), "bdfault") }},
	{name: "hide-task", about: "a process is hidden",
		want: []detect.Kind{detect.KindTampering}, key: "task ", by: 10 * time.Second, heal: heal.RelinkHidden,
		truth: func(b *bed) bool { return strings.Contains(b.cat("/proc/bdfault"), "listed=0") }},
	{name: "hook-syscall", about: "the table of system calls is hooked",
		want: []detect.Kind{detect.KindTampering}, by: 10 * time.Second, heal: heal.RestoreKernel,
		truth: func(b *bed) bool { return !bytes.Equal(b.word("sys_call_table", 62), b.address("__x64_sys_kill")) }},
	{name: "hook-fops", about: "a table of functions (`file_operations`) is hooked",
		want: []detect.Kind{detect.KindTampering}, by: 10 * time.Second, heal: heal.RestoreKernel,
		truth: calls(func(b *bed) { b.cat("/proc") })},
	{name: "hide-socket", about: "a socket is kept out of `/proc/net/tcp` (`tcp4_seq_ops`)",
		want: []detect.Kind{detect.KindTampering}, key: "rodata ", by: 10 * time.Second, heal: heal.RestoreKernel, undo: ended, do: func(b *bed) {
			b.pid = b.g.Spawn("rootnet") // listens
			time.Sleep(300 * time.Millisecond)
			b.g.Spawn("fault=hide-socket")
		}, truth: func(b *bed) bool { return !strings.Contains(b.cat("/proc/net/tcp"), " 0A ") }},
	{name: "probe", about: "a hidden module's kprobe keeps a name out of `ls`",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "probe_off",
		truth: func(b *bed) bool { return !slices.Contains(strings.Split(b.cat("/proc"), "\n"), "bdfault") }},
	{name: "notifier", about: "a hidden module hears of modules that come and go",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "notifier_off",
		truth: calls((*bed).modules)},
	{name: "packet-filter", about: "a hidden module sees packets (netfilter)",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "packet-filter_off",
		truth: calls((*bed).packets)},
	{name: "interface-filter", about: "the same, of one interface",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "interface-filter_off",
		truth: calls((*bed).packets)},
	{name: "input-handler", about: "a hidden module hears the console's keys",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "input-handler_off",
		truth: calls((*bed).key)},
	{name: "input-device", about: "a hidden module hears each keyboard that the console does (since 6.11)",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "input-device_off", since611: true,
		truth: calls((*bed).key)},
	{name: "key-listener", about: "a hidden module's own handler of input hears keys",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "key-listener_off",
		truth: calls((*bed).key)},
	{name: "hidden-listener", about: "the same, and it has taken itself off the list of handlers",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, after: "hidden-listener_off",
		truth: calls((*bed).key)},
	{name: "line-discipline", about: "a hidden module reads what comes over terminals (`n_tty`)",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "line-discipline_off",
		truth: calls(func(b *bed) { b.cat("/proc/uptime") })}, // each command comes over a terminal
	{name: "hide-bpf", about: "an eBPF program is hidden from bpf(2)",
		want: []detect.Kind{detect.KindTampering}, key: "bpf ", by: 10 * time.Second, after: "hide-bpf_off", do: filtered("fault=hide-bpf"), undo: ended,
		truth: func(b *bed) bool { return !slices.Contains(b.programs(), "quiet") }},
	{name: "hook-bpf", about: "a hidden module's function is called in an eBPF program's place",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "hook-bpf_off",
		do: filtered("fault=hook-bpf"), undo: ended, truth: calls(func(*bed) { time.Sleep(100 * time.Millisecond) })},
	{name: "bpf-writer", about: "an eBPF program may write to processes (a warning)",
		want: []detect.Kind{detect.KindTampering}, key: "bpf ", by: 10 * time.Second, do: func(b *bed) { b.pid = b.g.Spawn("rootwriter") },
		undo: ended, truth: func(b *bed) bool { return slices.Contains(b.programs(), "writer") }},
	{name: "code", about: "code of the kernel is changed from outside",
		want: []detect.Kind{detect.KindTampering}, by: 40 * time.Second, heal: heal.RestoreKernel, do: func(b *bed) {
			_, pa := b.at(halt, codeAt)
			b.overwrite(pa)
		}, truth: func(b *bed) bool { _, pa := b.at(halt, codeAt); return !bytes.Equal(b.read(pa, codeLen), codeWas) }},
	{name: "module-code", about: "code of a module is changed from outside",
		want: []detect.Kind{detect.KindTampering}, key: "text ", accused: "virtio_net", by: 40 * time.Second, heal: heal.RestoreKernel, do: func(b *bed) {
			for end := time.Now().Add(time.Minute); b.e.State().Golden.Modules < strings.Count(b.cat("/proc/modules"), " Live "); time.Sleep(100 * time.Millisecond) {
				if time.Now().After(end) {
					b.t.Fatalf("no golden copies of the modules are taken: %+v", b.e.State().Golden)
				}
			}
			b.overwrite(b.leaving("virtio_net"))
		}, truth: func(b *bed) bool { return !bytes.Equal(b.read(b.leaving("virtio_net"), codeLen), codeWas) }},
	{name: "d-state", about: "a task hangs in the kernel (limit set to 4 s)",
		want: []detect.Kind{detect.KindHungTask}, by: 20 * time.Second},
	{name: "mutex-deadlock", about: "two tasks are in a deadlock (4 s)",
		want: []detect.Kind{detect.KindHungTask}, by: 20 * time.Second},
	{name: "leaked-lock", about: "who holds a lock has ended (4 s)",
		want: []detect.Kind{detect.KindHungTask}, by: 20 * time.Second, lock: "rtnl_mutex", heal: heal.ReleaseLock, after: "leaked-rtnl_off", do: func(b *bed) {
			b.g.Spawn("fault=leaked-rtnl")
			b.pid = b.g.Spawn("rootnet") // which wants it
		}, undo: ended},
	{name: "wq-stall", about: "a worker hangs in its work (4 s)",
		want: []detect.Kind{detect.KindHungTask}, by: 20 * time.Second},
	{name: "wq-hog", about: "one work takes the workers of a CPU (8 s)",
		want: []detect.Kind{detect.KindStuckWork}, by: 30 * time.Second, after: "wq-hog_off"},
	{name: "slab-leak", about: "the kernel leaks objects; found by the trend",
		want: []detect.Kind{detect.KindExhaustion}, key: "slab", by: 100 * time.Second, after: "slab-leak_off"},
	{name: "skb-leak", about: "the kernel leaks socket buffers; by the trend",
		want: []detect.Kind{detect.KindExhaustion}, key: "slab", by: 100 * time.Second, after: "skb-leak_off"},
	{name: "fd-leak", about: "the kernel leaks open files; by the trend",
		want: []detect.Kind{detect.KindExhaustion}, key: "files", by: 100 * time.Second, after: "fd-leak_off"},
	{name: "files", about: "open files run out",
		start: "rootfiles", want: []detect.Kind{detect.KindExhaustion}, key: "files", by: 30 * time.Second, heal: heal.RaiseLimit, undo: ended},
	// Of numbers below 300 the kernel gives out none any more when it has been around once (RESERVED_PIDS): it is made to begin again.
	{name: "pids", about: "process numbers run out",
		want: []detect.Kind{detect.KindExhaustion}, key: "pids", by: 150 * time.Second, heal: heal.RaiseLimit, do: few("/proc/sys/kernel/pid_max", 450, "/proc/sys/kernel/ns_last_pid 10"), undo: ended},
	{name: "threads", about: "threads run out",
		want: []detect.Kind{detect.KindExhaustion}, key: "threads", by: 150 * time.Second, heal: heal.RaiseLimit, do: few("/proc/sys/kernel/threads-max", 20), undo: ended},
	{name: "softirq-storm", about: "softirqs leave a CPU no time, for ten seconds",
		want: []detect.Kind{detect.KindStorm}, by: 40 * time.Second, after: "softirq-storm_off"},
	{name: "syn-flood", about: "a flood of SYNs",
		start: "rootsyn", want: []detect.Kind{detect.KindExhaustion}, key: "syn-flood", by: 20 * time.Second, innocent: true, undo: ended},
	{name: "stuck-io", about: "a disk takes requests and does not answer (8 s)",
		start: "rootio", want: []detect.Kind{detect.KindStuckIO}, by: 40 * time.Second, innocent: true, do: func(b *bed) {
			b.pid = b.g.Spawn("rootio")
			b.g.ExecuteWith("block_set_io_throttle", throttle(1))
		}, undo: func(b *bed) { b.g.ExecuteWith("block_set_io_throttle", throttle(0)); ended(b) }},
	{name: "conntrack", about: "the table of tracked connections is full",
		want: []detect.Kind{detect.KindExhaustion}, key: "conntrack", by: 20 * time.Second, do: func(b *bed) {
			var done string
			for _, name := range b.conntrack {
				b.g.Ask("load "+name+map[bool]string{true: " enable_hooks=1"}[name == "nf_conntrack.ko"], "loaded", &done)
			}
			b.g.Ask("write /proc/sys/net/netfilter/nf_conntrack_max 500", "written", &done)
			b.pid = b.g.Spawn("rootsyn")
		}, undo: ended},
	{name: "tmpfs", about: "a file system in memory is full",
		want: []detect.Kind{detect.KindExhaustion}, key: "tmpfs", by: 20 * time.Second, do: func(b *bed) { b.g.Spawn("roottmpfs") }},
	{name: "code-put-in", about: "root's process gets executable memory of no file, 60 s after its start",
		start: "rootcode", want: []detect.Kind{detect.KindTampering}, key: "code ", by: 120 * time.Second, undo: ended},
	{name: "link-flaps", about: "a network link comes and goes",
		want: []detect.Kind{detect.KindHardware}, key: "link", by: 20 * time.Second, age: 62 * time.Second, do: func(b *bed) { // before, a host sets its interfaces up
			var done string
			b.g.Ask("up eth0", "up", &done) // before, drivers of later kernels do not listen to their cable
			for range 4 {
				b.g.ExecuteWith("set_link", map[string]any{"name": "net0", "up": false})
				time.Sleep(300 * time.Millisecond)
				b.g.ExecuteWith("set_link", map[string]any{"name": "net0", "up": true})
				time.Sleep(300 * time.Millisecond)
			}
		}},
	{name: "clock-set", about: "the wall clock is set by hours",
		want: []detect.Kind{detect.KindClock}, key: "set", by: 10 * time.Second, age: 65 * time.Second, do: func(b *bed) { // before, a host may be given the right time
			var done string
			b.g.Ask("settime -7200", "set", &done)
		}},
	{name: "wild-write", about: "a stray pointer overwrites constants of the kernel",
		want: []detect.Kind{detect.KindTampering}, by: 40 * time.Second, heal: heal.RestoreKernel},
	{name: "warn", about: "the kernel warns of itself",
		want: []detect.Kind{detect.KindKernelWarning}, key: "warning", by: 10 * time.Second},
	{name: "oops", about: "an oops in a process",
		want: []detect.Kind{detect.KindOops}, by: 10 * time.Second},
	{name: "oops-jump", about: "a jump to NULL",
		want: []detect.Kind{detect.KindOops}, by: 10 * time.Second},
	{name: "list-corruption", about: "a broken list",
		want: []detect.Kind{detect.KindOops}, by: 10 * time.Second},
	{name: "use-after-free", about: "use of what was freed",
		want: []detect.Kind{detect.KindOops}, by: 10 * time.Second},
	{name: "live-restart", about: "a live host is restarted",
		start: "spin", want: []detect.Kind{detect.KindRunawayProcess}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "locked", about: "a CPU within the kernel spins with interrupts off, changed from outside",
		want: []detect.Kind{detect.KindCPUStall}, by: 20 * time.Second, heal: heal.RestartHost, dead: true, next: true, do: lock},
	{name: "irqs-off", about: "a CPU with interrupts off",
		want: []detect.Kind{detect.KindCPUStall}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "spin-deadlock", about: "a spinlock is taken twice",
		want: []detect.Kind{detect.KindCPUStall}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "soft-lockup", about: "a CPU never leaves the kernel",
		want: []detect.Kind{detect.KindSoftLockup}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "rcu-stall", about: "a CPU never leaves a section of RCU",
		want: []detect.Kind{detect.KindSoftLockup, detect.KindRCUStall}, by: 40 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "irqs-off-all", about: "all CPUs with interrupts off",
		want: []detect.Kind{detect.KindCPUStall}, by: 20 * time.Second, heal: heal.RestartHost, dead: true, next: true},
	{name: "oops-irq", about: "an oops in an interrupt",
		want: []detect.Kind{detect.KindPanic}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "panic", about: "a panic",
		want: []detect.Kind{detect.KindPanic}, by: 20 * time.Second, heal: heal.RestartHost, dead: true, do: func(b *bed) { b.g.Say("sysrq c") }},
	{name: "stack-overflow", about: "a stack overflows",
		want: []detect.Kind{detect.KindPanic}, by: 20 * time.Second, heal: heal.RestartHost, dead: true},
	{name: "machine-check", about: "the processor tells of an error that it could not correct",
		machine: "generic", want: []detect.Kind{detect.KindPanic, detect.KindHardware}, by: 20 * time.Second, heal: heal.RestartHost, dead: true, do: func(b *bed) {
			// An error that the processor could not correct, while it worked with what is lost (MCi_STATUS: VAL, UC, EN, PCC; MCG_STATUS: MCIP).
			b.g.ExecuteWith("human-monitor-command", map[string]string{"command-line": "mce -b 0 4 0xb200000000000151 0x4 0 0"})
		}},
	{name: "clock-jumps", about: "the clock jumps a minute ahead",
		want: []detect.Kind{detect.KindClock}, key: "ahead", by: 20 * time.Second},
	// There are interrupts of timers, and no ticks: no work of the kernel's is done any more.
	{name: "clock-stands", about: "the clock stands still",
		want: []detect.Kind{detect.KindClock}, key: "stands", by: 30 * time.Second, heal: heal.RestartHost, dead: true, next: true},
	// The last, for an emulator now and then stands still over code that is patched.
	{name: "module-tracepoint", about: "a hidden module is called at a tracepoint of a module (`watchdog_start`)",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "module-tracepoint_off", do: func(b *bed) {
			if !strings.Contains(b.cat("/proc/modules"), "softdog ") {
				b.load(b.watchdog)
			}
			b.g.Spawn("fault=module-tracepoint")
		}, truth: calls(func(b *bed) {
			var done string
			b.g.Ask("write /dev/watchdog V", "written", &done) // opens it, by which it starts; the letter stops it
		})},
	{name: "ftrace", about: "a hidden module is called at a function's entry (ftrace)",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "ftrace_off",
		truth: calls(func(b *bed) { b.cat("/proc") })},
	{name: "tracepoint", about: "a hidden module is called at a tracepoint of the kernel (`task_rename`)",
		want: []detect.Kind{detect.KindTampering}, key: "probe ", by: 10 * time.Second, heal: heal.UnhookProbe, after: "tracepoint_off",
		truth: calls(func(b *bed) {
			var done string
			b.g.Ask(fmt.Sprintf("kill %d", b.g.Spawn("sleep")), "killed", &done)
		})},
	{name: "patching", about: "the kernel patches 50 000 places of its code: nothing is found",
		quiet: true, do: func(b *bed) {
			var done string
			b.g.Ask("patch", "patched", &done)
		}},
}

// bootRow is what boot does, which has a guest of its own.
var bootRow = fault{name: "boot", about: "a start waits for its disk for ever (15 s)", want: []detect.Kind{detect.KindBootStuck}}

// result is what the table says of a fault on a kernel.
type result struct {
	Kernel   string        `json:"kernel"`
	CPUs     int           `json:"cpus"`
	Path     string        `json:"path"`
	Fault    string        `json:"fault"`
	Detector string        `json:"detector"` // empty: not detected
	Title    string        `json:"title"`
	Culprit  bool          `json:"culprit"`           // it names the process, or says nothing of one where there is none
	Found    time.Duration `json:"found"`             // from the start of the fault, its process's start included
	Rung     string        `json:"rung"`              // the action that cured it; empty: none
	Healed   time.Duration `json:"healed"`            // from the finding to the verified cure, a restart's boot included
	Refused  string        `json:"refused,omitempty"` // why the action that was asked for was not done on this kernel
	Log      []string      `json:"log,omitempty"`
	Serving  bool          `json:"serving"` // the host's service answers afterwards
	Error    string        `json:"error,omitempty"`
	At       time.Time     `json:"at"` // when it happened
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

	detectors policy.Detectors
	module    bool // it has the module

	g      *guest.Guest
	e      *engine.Engine
	events <-chan engine.Event
	seen   []engine.Event
	// Modules of Debian's: those that each boot of it is given, and that which tracks connections with what it needs.
	order, conntrack, watchdog []string

	pid     int    // of what a row has started
	restore func() // takes back what it has changed
}

// eager are detectors that do not wait for as long as those of customers.
var eager = policy.Detectors{
	RunawayFor: policy.Duration(3 * time.Second), RunawayShare: 0.5, HungFor: policy.Duration(4 * time.Second), WorkFor: policy.Duration(8 * time.Second),
	IOFor: policy.Duration(8 * time.Second), BootFor: policy.Duration(15 * time.Second),
}

func newBed(t *testing.T, kernel string, d policy.Detectors) *bed {
	t.Helper()
	b := &bed{t: t, kernel: kernel, detectors: d}
	files, order := guest.DebianModules(t, kernel, "virtio_pci", "virtio_blk", "virtio_net")
	more, conntrack := guest.DebianModules(t, kernel, "nf_conntrack")
	maps.Copy(files, more)
	b.conntrack = conntrack
	more, b.watchdog = guest.DebianModules(t, kernel, "softdog")
	maps.Copy(files, more)
	// The module is for x86-64: it asks for its marker by that machine's ports.
	if b.module = !strings.HasSuffix(kernel, "arm64"); b.module {
		module, err := guest.BuildModule(t, kernel, "module", "bdfault")
		if err != nil {
			// No other kernel may be later than this Debian.
			if !strings.HasPrefix(kernel, "sid") {
				t.Fatal(err)
			}
			t.Logf("rows that need the module are left out: %v", err)
			b.module = false
		}
		files["bdfault.ko"] = module
	}
	b.order = order
	// Kernels since 6.6 begin other works beside one that has computed for 10 ms; the row wq-hog is about pools that begin none.
	b.g = guest.Start(t, kernel, guest.Options{Files: files, Args: slices.Concat(marker, devices), CPUs: *cpusFlag, Append: "workqueue.cpu_intensive_thresh_us=3600000000"})
	b.watch()
	b.settle()
	for _, f := range b.e.Findings() {
		t.Errorf("a healthy host: %s: %s; %+v", f.Title, f.Detail, f.Evidence)
	}
	return b
}

// watch starts an engine for the guest and waits until it is attached.
func (b *bed) watch() {
	t := b.t
	t.Helper()
	j, err := journal.OpenFile(filepath.Join(t.TempDir(), "journal"), 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	o := engine.Options{
		OwnThread: true,
		Memory: func(context.Context) (hostmem.Memory, error) {
			mem, err := hostmem.OpenRAMFile(b.g.RAM, b.g.Layout(), true)
			if err != nil {
				return nil, err
			}
			switch *pathFlag {
			case "dma":
				return hostmem.NewEngine(mem, hostmem.EngineOptions{Seed: 1}), nil
			case "nocas":
				return noSwaps{mem, mem}, nil
			}
			return mem, nil
		},
		Writes: true, Agreement: access.Hold(agreement(t)), Journal: j, Power: power{b.g},
		CacheDir: t.TempDir(), HostUUID: guest.UUID, // which kernels know where firmware has told them
		Policy: policy.Policy{Version: policy.Version, Detectors: b.detectors},
	}
	if *recordFlag != "" {
		o.RecordDir = t.TempDir()
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
}

// record keeps the series by which a finding was judged, or that of a host of which nothing is found, if the flag asks for it.
func (b *bed) record(finding, name string) {
	b.t.Helper()
	if *recordFlag == "" {
		return
	}
	var series []byte
	var err error
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) { // they are written when the pass has ended
		if series, err = b.e.Recording(b.t.Context(), finding); !errors.Is(err, engine.ErrNoRecording) || time.Now().After(end) {
			break
		}
	}
	if err == nil {
		err = os.MkdirAll(*recordFlag, 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(*recordFlag, name+"-"+b.kernel+".json.gz"), series, 0o644)
	}
	if err != nil {
		b.t.Errorf("record %s: %v", name, err)
	}
}

// noSwaps is memory whose path has no compare-and-swap.
type noSwaps struct {
	hostmem.Memory
	hostmem.Writer
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
	for _, name := range b.order {
		b.g.Ask("load "+name, "loaded", &loaded)
	}
	if b.module {
		b.g.Ask("load bdfault.ko", "loaded", &loaded)
	}
	b.upFor(14 * time.Second)
}

// upFor waits until the guest has run for so long.
func (b *bed) upFor(d time.Duration) {
	for {
		var mono int64
		b.g.Ask("uptime", "mono", &mono)
		if mono > int64(d) {
			return
		}
		time.Sleep(d - time.Duration(mono))
	}
}

// cat reads a file of the guest.
func (b *bed) cat(file string) (text string) {
	b.t.Helper()
	b.g.Ask("cat "+file, "text", &text)
	return text
}

// key has a key be pressed and let go.
func (b *bed) key() {
	b.t.Helper()
	b.g.ExecuteWith("send-key", map[string]any{"keys": []map[string]string{{"type": "qcode", "data": "a"}}, "hold-time": 20})
	time.Sleep(100 * time.Millisecond)
}

// modules has modules come and go.
func (b *bed) modules() {
	b.t.Helper()
	b.load(b.conntrack)
	var done string
	for _, name := range slices.Backward(b.conntrack) {
		b.g.Ask("unload "+strings.TrimSuffix(name, ".ko"), "unloaded", &done)
	}
}

// packets has the guest send some to itself.
func (b *bed) packets() {
	b.t.Helper()
	var done string
	pid := b.g.Spawn("rootnet")
	time.Sleep(500 * time.Millisecond)
	b.g.Ask(fmt.Sprintf("kill %d", pid), "killed", &done)
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
	b.record("", "silent-"+r.Fault)
	r.Culprit, r.Serving = true, true
	return r
}

// cause returns the finding that the host is silent, if it is by now, under which others are not judged any more; else the one that was made first.
func (b *bed) cause(first string) string {
	for _, f := range b.e.Findings() {
		if f.Kind == detect.KindHostSilent && !f.Suspicion && f.Resolved == nil {
			return f.ID
		}
	}
	return first
}

// reset starts a host anew that bears no other row.
func (b *bed) reset() {
	b.t.Helper()
	b.g.Execute("system_reset")
	b.g.WaitReady()
	b.settle()
}

// takeBack ends a fault that can be ended.
func (b *bed) takeBack(f fault) {
	b.t.Helper()
	if f.after != "" {
		pid := b.g.Spawn("fault=" + f.after)
		time.Sleep(300 * time.Millisecond) // what is undone may be what that is about
		b.end(pid)
	}
	if f.undo != nil {
		f.undo(b)
	}
}

// end ends a process that may have ended: those that stay of one row after the other are a leak of tasks, and found as one.
func (b *bed) end(pid int) {
	b.t.Helper()
	var done string
	if err := b.g.Try(fmt.Sprintf("kill %d", pid), "killed", &done); err != nil {
		b.t.Logf("process %d: %v", pid, err)
	}
}

// run lets a fault happen.
func (b *bed) run(f fault) (r result) {
	r = result{Kernel: b.kernel, CPUs: *cpusFlag, Path: *pathFlag, Fault: f.name}
	start := f.start
	if start == "" {
		start = "fault=" + f.name
	}
	b.upFor(f.age)
	bystander := b.g.Spawn("sleep")
	before := b.g.Complaints()
	for len(b.events) > 0 {
		b.seen = append(b.seen, <-b.events)
	}
	began := time.Now()
	r.At = began.UTC().Truncate(time.Second)
	pid := 0
	b.pid = 0
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
		return e.Type == engine.EventFinding && slices.Contains(f.want, e.Finding.Kind) && strings.HasPrefix(e.Finding.Key, f.key)
	})
	if err != nil {
		r.Error = "not found: " + err.Error()
		if f.want[0] == detect.KindForkBomb || f.want[0] == detect.KindMemoryHog {
			b.reset()
		} else if !f.dead {
			if f.do == nil {
				b.pid = b.g.Answer("pid")
			}
			b.takeBack(f)
		}
		return r
	}
	found := *ev.Finding
	b.t.Logf("%s: %s; %s; %+v %+v", f.name, found.Title, found.Detail, found.Culprit, found.Evidence)
	r.Detector, r.Title, r.Found = string(found.Kind), found.Title, ev.At.Sub(began)
	b.record(found.ID, "fire-"+r.Detector+"-"+f.name)
	answers := f.do == nil && !f.dead && found.Kind != detect.KindPanic
	bomb := f.want[0] == detect.KindForkBomb // under which the guest answers nobody
	if answers && !bomb {
		pid = b.g.Answer("pid")
		b.pid = pid
	}
	switch {
	case f.innocent:
		r.Culprit = true
	case f.shares:
		r.Culprit = found.Culprit.TGID == b.pid
	case f.accused != "":
		r.Culprit = found.Culprit.Module == f.accused
	case f.lock != "":
		r.Culprit = found.Culprit.Lock == f.lock && found.Culprit.PID != 0
	case f.start != "" && !f.dead && f.start != "bomb" && f.start != "rootbomb" && f.want[0] != detect.KindExhaustion, slices.Contains([]string{"root-cred", "give-root", "share-cred"}, f.name), f.name == "hide-task", f.name == "d-state":
		r.Culprit = found.Culprit.TGID == pid || found.Culprit.PID == pid
	case f.dead:
		r.Culprit = found.Culprit.CPU != nil || found.Kind == detect.KindClock || found.Kind == detect.KindHardware || found.Culprit.Comm == "v-"+f.start
	default:
		r.Culprit = true
	}
	if f.truth != nil && !f.truth(b) {
		r.Error = "the fault is not in force"
		return r
	}
	if f.heal != "" {
		_, out, err := b.e.Heal(b.t.Context(), engine.HealRequest{Finding: found.ID, Action: f.heal, Caller: "suite"})
		if out != nil && len(out.Steps) > 0 {
			last := out.Steps[len(out.Steps)-1]
			b.t.Logf("%s: %q: begun %v, done %v after the finding", f.name, out.Plan.Title, out.Started.Sub(ev.At), last.Started.Add(last.Took).Sub(ev.At))
		}
		if errors.Is(err, kernel.ErrNotSupported) && !f.dead || err != nil && f.next {
			// What cannot be proven of this kernel is not done, and a host of which no CPU ticks does nothing: the next rung needs nothing of it.
			r.Refused = err.Error()
			b.t.Logf("%s: refused: %v", f.name, err)
			if _, out, err = b.e.Heal(b.t.Context(), engine.HealRequest{Finding: b.cause(found.ID), Action: heal.PowerCycle, Caller: "suite"}); err != nil || !out.Verified {
				r.Error = fmt.Sprintf("%s is refused, and so is %s: %v", f.heal, heal.PowerCycle, err)
				return r
			}
			r.Rung, r.Healed = heal.PowerCycle, time.Since(ev.At)
			b.g.WaitReady()
			b.settle()
			r.Serving = true // that of the new boot
			return r
		}
		switch {
		case f.heal == heal.ReleaseLock && errors.Is(err, heal.ErrProtected):
			r.Refused, err = err.Error(), nil // another has got the memory of the task that held it, and seems to hold it
			b.t.Logf("%s: refused: %v", f.name, r.Refused)
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
	if bomb && r.Error != "" {
		b.reset()
		return r
	}
	if answers && bomb {
		b.pid = b.g.Answer("pid")
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
	var done string
	b.g.Ask(fmt.Sprintf("kill %d", bystander), "killed", &done)
	if f.heal == heal.ReleaseLock && r.Rung != "" {
		f.after = "" // it is given back already
	}
	b.takeBack(f)
	if f.undo != nil || f.after != "" {
		gone := func() bool { now, ok := b.e.Finding(found.ID); return !ok || now.Resolved != nil }
		for end := time.Now().Add(90 * time.Second); !gone(); time.Sleep(100 * time.Millisecond) {
			if time.Now().After(end) {
				r.Error = "the fault was taken back, and the finding stands"
				return r
			}
		}
	}
	if f.start == "" && f.do == nil && b.pid != 0 {
		b.end(b.pid) // by which the module was told
	}
	if f.want[0] != detect.KindOops && f.name != "warn" {
		after := b.g.Complaints()
		r.Log = after[min(len(before), len(after)):]
	}
	return r
}

// boot has a kernel wait for ever for the disk that it is to start from.
func boot(t *testing.T, kernel string) result {
	r := result{Kernel: kernel, CPUs: *cpusFlag, Path: *pathFlag, Fault: bootRow.name, Culprit: true, Serving: true}
	b := &bed{t: t, kernel: kernel, detectors: eager}
	began := time.Now()
	r.At = began.UTC().Truncate(time.Second)
	b.g = guest.Start(t, kernel, guest.Options{Hangs: true, Append: "root=/dev/nowhere rootwait", CPUs: *cpusFlag})
	b.watch()
	ev, err := b.wait(time.Minute, func(e engine.Event) bool {
		return e.Type == engine.EventFinding && e.Finding.Kind == detect.KindBootStuck && !e.Finding.Suspicion
	})
	if err != nil {
		r.Error = "not found: " + err.Error()
		t.Error(r.Error)
		return r
	}
	t.Logf("%s; %s", ev.Finding.Title, ev.Finding.Detail)
	r.Detector, r.Title, r.Found = string(ev.Finding.Kind), ev.Finding.Title, ev.At.Sub(began)
	b.record(ev.Finding.ID, "fire-"+r.Detector+"-boot")
	return r
}

// mainRows are those that are repeated on other kernels, with more and fewer CPUs, and over other paths.
var mainRows = []string{"fork-bomb", "memory-hog", "root-cred", "hide-task", "hook-fops", "d-state", "wq-hog", "oops", "irqs-off", "soft-lockup", "irqs-off-all", "oops-irq", "panic", "threads", "stuck-io", "link-flaps", "runaway", "live-restart", "locked", "memory-stall"}

func wanted(row string) bool {
	all := strings.Split(*rowsFlag, ",")
	return slices.Contains(all, "all") || slices.Contains(all, row) || slices.Contains(all, "main") && slices.Contains(mainRows, row)
}

// checkFlags refuses names that there are not: a fault that is misspelt would be left out, and all be well.
func checkFlags(t *testing.T) {
	t.Helper()
	names := []string{"main", "all", bootRow.name}
	for _, f := range rows {
		names = append(names, f.name)
	}
	for row := range strings.SplitSeq(*rowsFlag, ",") {
		if !slices.Contains(names, row) {
			t.Fatalf("-rows: there is no fault %q; there are %s", row, strings.Join(names, ", "))
		}
	}
	if paths := []string{"window", "nocas", "dma"}; !slices.Contains(paths, *pathFlag) {
		t.Fatalf("-path: there is no path %q; there are %s", *pathFlag, strings.Join(paths, ", "))
	}
}

func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("boots kernels in QEMU and lets them fall ill: not with -short")
	}
	checkFlags(t)
	var all []result
	for _, kernel := range strings.Split(*kernelsFlag, ",") {
		t.Run(kernel, func(t *testing.T) {
			b := newBed(t, kernel, eager)
			for _, f := range rows {
				if !wanted(f.name) {
					continue
				}
				if why := b.cannot(f); why != "" {
					t.Logf("%s: left out: %s", f.name, why)
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
				case !r.Serving:
					t.Errorf("%s: the host's service does not answer", f.name)
				}
				if r.Error != "" {
					for _, ev := range b.seen[max(0, len(b.seen)-20):] {
						t.Logf("%s %s %s", ev.At.Format("05.000"), ev.Type, ev.Text)
					}
					if f.dead {
						t.Fatal("nobody knows what has become of the host")
					}
				}
			}
		})
	}
	if wanted(bootRow.name) {
		for _, kernel := range strings.Split(*kernelsFlag, ",") {
			t.Run(kernel+"/boot", func(t *testing.T) { all = append(all, boot(t, kernel)) })
		}
	}
	text := table(all)
	t.Logf("\n%s", text)
	if *outFlag != "" {
		if err := write(*outFlag, all, text); err != nil {
			t.Error(err)
		}
	}
}

// A host that works hard is not ill: it builds, reads a disk, talks to itself by TCP, has a database take much of its memory at once, is held
// for moments as on a busy hypervisor, has users become root by su(1), loads modules and eBPF programs and takes them out, has its kernel patch
// its own code, and traces a function. Detectors are set as they are for customers, but for the CPUs': those are emulated, and wait for real
// ones that have other work, too.
func TestHealthy(t *testing.T) {
	if testing.Short() {
		t.Skip("boots kernels in QEMU and has them work: not with -short")
	}
	for _, kernel := range strings.Split(*kernelsFlag, ",") {
		t.Run(kernel, func(t *testing.T) {
			b := newBed(t, kernel, policy.Detectors{StallVerdict: policy.Duration(5 * time.Second), Silent: policy.Duration(15 * time.Second)})
			for len(b.events) > 0 {
				<-b.events
			}
			began := time.Now()
			var done string
			b.g.Ask("patch", "patched", &done) // with more to do, an emulator takes minutes for that
			// Somebody traces, as perf probe does.
			b.g.Ask("write /sys/kernel/tracing/kprobe_events r:listed filldir64", "written", &done)
			b.g.Ask("write /sys/kernel/tracing/events/kprobes/listed/enable 1", "written", &done)
			b.g.Spawn("rootload")
			b.g.Spawn("rootnet")
			b.g.Spawn("rootio")
			b.g.Spawn("rootexec")
			for round := 0; time.Since(began) < *healthyFlag; round++ {
				base, filter := b.g.Spawn("rootbase"), b.g.Spawn("rootbpf")
				b.g.Spawn("su")
				b.load(b.conntrack)
				time.Sleep(time.Second)
				for _, name := range slices.Backward(b.conntrack) {
					b.g.Ask("unload "+strings.TrimSuffix(name, ".ko"), "unloaded", &done)
				}
				b.g.Execute("stop")
				time.Sleep(500 * time.Millisecond)
				b.g.Execute("cont")
				for _, pid := range []int{base, filter} {
					b.g.Ask(fmt.Sprintf("kill %d", pid), "killed", &done)
				}
				if ev, err := b.wait(time.Second, func(e engine.Event) bool { return e.Type == engine.EventFinding }); err == nil {
					b.record(ev.Finding.ID, "silent-healthy-"+string(ev.Finding.Kind)) // as it has to be
					t.Fatalf("after %v, in round %d, a false finding: %s: %s; %+v %+v", ev.At.Sub(began), round, ev.Finding.Title, ev.Finding.Detail, ev.Finding.Culprit, ev.Finding.Evidence)
				}
			}
			b.record("", "silent-healthy")
			s := b.e.State()
			t.Logf("healthy for %v; %d passes; share of a CPU %.3f, %.1f MB/s", time.Since(began).Round(time.Second), s.Passes, s.LastPass.Load, s.LastPass.BytesPerSec/1e6)
			var silent []string
			for _, d := range s.Detectors {
				if d.Runs == 0 {
					silent = append(silent, d.ID)
				}
			}
			if len(silent) > 0 {
				t.Errorf("detectors that never ran: %v", silent)
			}
			if bad := b.g.Complaints(); len(bad) > 0 {
				t.Errorf("the host's kernel complains: %q", bad)
			}
		})
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
