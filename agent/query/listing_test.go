package query

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

var errBroken = &kernel.CorruptError{Object: "module", Addr: 0xffffffffc0001000, Why: "node after 0x1 points back to 0x2"}

// TestListingText compares what people see of each answer, of a host whose names attack terminals.
func TestListingText(t *testing.T) {
	const evil = "\x1b[2J\u202eevil"
	ctx := t.Context()
	mods, err := modules(ctx, seq([]kernel.Module{
		{Name: "virtio_net", State: "live", Size: 86016, Refs: 0, InList: true, InKset: true, InTree: true},
		{Name: "net_failover", State: "live", Size: 24576, Refs: 1, UsedBy: []string{"virtio_net"}, Taint: 1<<12 | 1<<13, InList: true, InKset: true, InTree: true},
		{Name: evil, State: "live", Size: 4096, InTree: true, Missing: true},
	}, errBroken))
	if err != nil || !mods.Ill() || mods.Complete {
		t.Errorf("modules = %+v, %v; want one hidden, and incomplete", mods, err)
	}
	links, err := interfaces(ctx, seq([]kernel.Interface{
		{Name: "lo", Index: 1, Init: true, MTU: 65536, State: "unknown", Carrier: true, Addresses: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix("::1/128")},
			Counters: &kernel.InterfaceCounters{RxBytes: 1 << 20, TxBytes: 1 << 20, TxDropped: 3}},
		{Name: "eth0" + evil, Index: 2, Netns: 4026531840, MTU: 1500, MAC: "52:54:00:12:34:56", State: "up", Driver: "virtio_net"},
	}, nil))
	if err != nil {
		t.Error(err)
	}
	files, err := openFiles(ctx, seq([]kernel.OpenFile{
		{PID: 1, Comm: "init", FD: "cwd", Kind: "dir", Path: "/", Inode: 1, Size: 4096},
		{PID: 1, Comm: "init", FD: "0", Addr: 1, Kind: "char", Path: "/dev/console", Dev: "5:1", Inode: 9, Flags: 2},
		{PID: 7, Comm: evil, FD: "3", Addr: 1, Kind: "file", Path: "/tmp/" + evil + " (deleted)", Size: 12, Flags: 1},
	}, nil))
	if err != nil {
		t.Error(err)
	}
	mnts, err := mounts(ctx, seq([]kernel.Mount{
		{ID: 1, Source: "none", Path: "/", Root: "/", FS: "rootfs", Options: "rw", Super: "rw"},
		{ID: 2, Source: "/dev/vda1", Path: "/mnt/" + evil, Root: "/sub", FS: "ext4", Options: "rw,relatime", Super: "ro"},
	}, nil))
	if err != nil {
		t.Error(err)
	}
	socks, err := sockets(ctx, seq([]kernel.Socket{
		{Protocol: "tcp", State: "LISTEN", Local: netip.MustParseAddrPort("0.0.0.0:22"), Remote: netip.MustParseAddrPort("0.0.0.0:0"), SendQ: 128, Owners: []kernel.SocketOwner{{PID: 9, Comm: "sshd", FD: "3"}}},
		{Protocol: "tcp6", State: "ESTAB", Local: netip.MustParseAddrPort("[::1]:22"), Remote: netip.MustParseAddrPort("[::1]:4000"), UID: 1000, RecvQ: 5},
		{Protocol: "unix", State: "ESTAB", Addr: 1, Peer: 2, Inode: 11, Path: "/run/" + evil},
		{Protocol: "unix", State: "ESTAB", Addr: 2, Peer: 1, Inode: 12},
		{Protocol: "netlink", State: "UNCONN"},
	}, nil))
	if err != nil {
		t.Error(err)
	}
	slabs, err := slabCaches(ctx, seq([]kernel.SlabCache{{Name: "small", Size: 8, Objects: 512, Slabs: 1, Bytes: 4096}, {Name: evil, Size: 1024, Objects: 64, Slabs: 2, Bytes: 65536}}, nil))
	if err != nil || slabs.Caches[0].Name != evil || slabs.Bytes != 69632 {
		t.Errorf("slab caches = %+v, %v; want the largest first", slabs, err)
	}
	ecc, err := memoryErrors(ctx, seq([]kernel.MemoryController{
		{Index: 0, Name: "Skylake Socket#0 IMC#0", Driver: "skx_edac.c", Since: 90 * time.Second, Correctable: 4, Uncorrectable: 1, CorrectableUnplaced: 1, Modules: []kernel.ECCCounter{
			{Index: 0, Label: "CPU_SrcID#0_MC#0_Chan#0_DIMM#0", Location: []int{0, 0}, Bytes: 16 << 30, Type: "rddr4", Correctable: 3},
			{Index: 3, Label: evil, Location: []int{1, 1}, Bytes: 16 << 30, Type: "rddr4", Uncorrectable: 1},
		}},
	}, nil))
	if err != nil || !ecc.Counted || !ecc.Ill() {
		t.Errorf("memory errors = %+v, %v", ecc, err)
	}
	if none, err := memoryErrors(ctx, seq([]kernel.MemoryController{}, kernel.ErrNotSupported)); err != nil || none.Counted || none.Ill() || !none.Complete {
		t.Errorf("memory errors without EDAC = %+v, %v", none, err)
	}
	box := kernel.Cgroup{Path: "/docker/" + evil, Tasks: 2, Frozen: true, Memory: &kernel.CgroupMemory{Current: 1 << 20, High: kernel.NoLimit, Max: 64 << 20, OOMKills: 3},
		PIDs: &kernel.CgroupPIDs{Current: 2, Max: kernel.NoLimit}, CPU: &kernel.CgroupCPU{Usage: 90 * time.Second, Weight: 200, Quota: 50 * time.Millisecond, Period: 100 * time.Millisecond}}
	groups, err := cgroups(ctx, seq([]kernel.Cgroup{{Path: "/", Tasks: 100}, {Path: "/docker", Dying: 4, CPU: &kernel.CgroupCPU{Quota: kernel.NoLimit}, PIDs: &kernel.CgroupPIDs{Current: 2, Max: 77}}, box}, nil))
	if err != nil {
		t.Error(err)
	}
	boxes, err := containers(ctx, seq([]kernel.Container{{Runtime: "docker", ID: strings.Repeat("4f1c0ffe", 8), Hostname: evil, Cgroup: box, Tasks: []kernel.ContainerTask{{PID: 9, TGID: 9, Inner: 1, Comm: evil, State: "S"}}}}, nil))
	if err != nil {
		t.Error(err)
	}
	alice, bob := kernel.LockTask{PID: 7, Comm: "alice", State: "D"}, kernel.LockTask{PID: 8, Comm: evil, State: "D"}
	held, err := locks(ctx, seq([]kernel.Lock{
		{Addr: 0xffffffff82000000, Kind: "mutex", Name: "rtnl_mutex", Owner: &alice, Waiters: []kernel.LockWaiter{{LockTask: bob}, {LockTask: kernel.LockTask{PID: 9, Comm: "carol", State: "D"}}}},
		{Addr: 0xffff888000000000, Kind: "mutex", Owner: &bob, Waiters: []kernel.LockWaiter{{LockTask: alice}}},
		{Addr: 0xffff888000001000, Kind: "rwsem", Readers: 2, Waiters: []kernel.LockWaiter{{LockTask: bob, Reads: true}}},
	}, nil))
	if err != nil || !held.Ill() {
		t.Errorf("locks = %+v, %v; want a deadlock", held, err)
	}
	whole := Extent{At: at, Complete: true}
	ps, err := PS(ctx, example(), PSOptions{})
	if err != nil {
		t.Fatal(err)
	}
	processes, err := tree(ps, 0)
	if err != nil {
		t.Error(err)
	}
	for _, x := range []struct {
		name   string
		answer Answer
	}{
		{"lsmod.txt", mods}, {"ip.txt", links}, {"lsof.txt", files}, {"mount.txt", mnts}, {"ss.txt", socks}, {"slabtop.txt", slabs}, {"edac.txt", ecc}, {"pstree.txt", processes},
		{"lspci.txt", PCI{whole, []kernel.PCIDevice{{Name: "0000:00:1f.2", Vendor: 0x8086, Device: 0x2922, SubVendor: 0x1af4, SubDevice: 0x1100, Class: 0x010601, Revision: 2, Driver: "ahci"}, {Name: evil, Class: 0xff0000, Driver: evil}}}},
		{"protections.txt", Protections{whole, []kernel.Guard{{Name: "lockdown", Object: "kernel_locked_down", Level: 1, Text: "LOCKDOWN_INTEGRITY_MAX", OneWay: true}, {Name: "AppArmor's mode", Object: "aa_g_profile_mode", Text: "APPARMOR_COMPLAIN"}}}},
		{"cgroups.txt", groups}, {"containers.txt", boxes}, {"locks.txt", held},
		{"workqueues.txt", WorkerPools{whole, []kernel.WorkerPool{{ID: 0, Workers: 2, Idle: 2}, {ID: 4, CPU: -1, Workers: 3, Idle: 2, Waiting: 31 * time.Second,
			Running: []kernel.Working{{Work: kernel.Work{Function: "flush_to_ldisc", Queue: evil}, PID: 44, Comm: "kworker/u4:1", Desc: evil}}, Pending: []kernel.Work{{Function: "vmstat_update", Queue: "mm_percpu_wq"}}}}}},
		{"timers.txt", Timers{whole, []kernel.Timer{{CPU: 1, Clock: "monotonic", Due: -time.Second, Function: "hrtimer_wakeup", PID: 7, Comm: evil}, {Clock: "jiffies", Due: 90 * time.Second, Function: "delayed_work_timer_fn", Work: evil}}}},
		{"irqs.txt", Interrupts{whole, []kernel.Interrupt{{Name: "4", Chip: "IO-APIC", Users: []string{"ttyS0", evil}, Counts: []uint64{5, 6}}, {Name: "RES", Counts: []uint64{0, 0}}, {Name: "TIMER", Soft: true, Counts: []uint64{7, 8}}}}},
		{"rcu.txt", RCU{whole, kernel.RCU{GracePeriod: 645, Waiting: true, State: "RCU_GP_WAIT_FQS", Running: 3 * time.Second, Stall: 18 * time.Second, CPUs: []kernel.RCUCPU{{CPU: 1, Callbacks: 12, Seen: 645, Awaited: true}}}}},
		{"disks.txt", Disks{whole, []kernel.Disk{{Name: "vda", Dev: "254:0", Size: 64 << 20, ReadOnly: true, Reads: 3, ReadBytes: 8192, InFlight: []kernel.Request{{Op: "read", Sector: 2048, Bytes: 4096, Tag: 9, Age: 40 * time.Second}}}, {Name: evil, Dev: "8:0"}}}},
		{"pipes.txt", Pipes{whole, []kernel.Pipe{{Inode: 9, Path: "/run/" + evil, Bytes: 5, Used: 1, Buffers: 16, Readers: 1, Writers: 2, Owners: []kernel.SocketOwner{{PID: 7, Comm: evil, FD: "3"}}}}}},
		{"routes.txt", Routes{whole, []kernel.Route{{Netns: 1, Table: 254, Type: "unicast", Dest: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("192.0.2.1"), Device: evil, Metric: 100},
			{Netns: 1, Table: 255, Type: "local", Dest: netip.MustParsePrefix("127.0.0.1/32"), Device: "lo", Source: netip.MustParseAddr("127.0.0.1")}}}},
		{"sysctl.txt", Sysctls{whole, []kernel.Sysctl{{Name: "kernel.panic", Value: "0", Known: true}, {Name: "net." + evil, Value: "4096\t" + evil}}}},
		{"keys.txt", Keys{whole, []kernel.Key{{Serial: 0x1234, Type: "keyring", Description: evil, GID: ^uint32(0), Perm: 0x1f3f0000}}}},
		{"bpf.txt", BPF{whole, kernel.BPF{Programs: []kernel.BPFProgram{{ID: 3, Type: "cgroup-skb", Name: evil, Tag: "24f7b6700923568d", Insns: 4, Jited: 38, Maps: []uint32{1, 2}}}, Maps: []kernel.BPFMap{{ID: 1, Type: "array", Name: evil, KeySize: 4}}, Links: []kernel.BPFLink{{ID: 2, Type: "cgroup", Program: 3}}}}},
		{"probes.txt", Probes{whole, []kernel.Probe{{Kind: "kprobe", Place: "do_sys_openat2", Function: evil}, {Kind: "tracepoint", Place: "sched_switch", Function: "f [m]", Disabled: true}}}},
		{"about.txt", Host{whole, kernel.Host{CommandLine: "quiet " + evil, Tainted: 1 << 12, Boot: at, Now: at, Uptime: time.Hour, TicksPerSec: 250, LSMs: []string{"lockdown", evil}, Swaps: []kernel.Swap{{Path: "/" + evil, Size: 1 << 30, Used: 1 << 20, Priority: -2}}}}},
		{"proc.txt", ProcessDetails{whole, kernel.Process{Task: kernel.Task{PID: 8, TGID: 7, Comm: evil, State: "S"}, Parents: []int{3, 1}, IDs: []kernel.PIDIn{{Namespace: 1, PID: 8}, {Namespace: 2, PID: 1}}, Namespaces: &kernel.Namespaces{Hostname: evil},
			Credentials: kernel.Credentials{UID: 1000, Groups: []uint32{4, 24}, Effective: 1 << 13, Bounding: 1<<41 - 1}, Policy: "SCHED_FIFO", Nice: 5, CPUs: []int{0, 1}, Seccomp: "filter", SeccompFilters: 2, Memory: &kernel.ProcessMemory{Virtual: 1 << 30}, Exe: evil, Cgroup: evil, WaitChannel: evil}}},
		{"maps.txt", Mappings{whole, 7, []kernel.Mapping{{Start: 0x400000, End: 0x401000, Perms: "r-xp", Name: evil, Present: 1}, {Start: 0x7ffd00000000, End: 0x7ffd00002000, Perms: "rw-p", Name: "[stack]", Swapped: 2}}}},
		{"environ.txt", Environment{Extent{At: at, Doubts: []string{"page at 0x1000 is swapped out"}}, 7, []string{"init", evil}, []string{"A=" + evil}}},
		{"mem.txt", UserMemory{whole, 7, 0x7ffd00001ff8, []byte(evil + "0123456789")}},
		{"vmstat.txt", Memory{whole, kernel.MemoryUse{Total: 8 << 30, Free: 1 << 30, Available: 4 << 30, Zones: []kernel.Zone{{Name: "DMA32", Managed: 1 << 30, Free: 1 << 20, Min: 4096, Low: 8192, High: 16384, Buddies: []uint64{1, 2, 3}}},
			Counters: kernel.Counters{{Name: "pgfault", Value: 7}, {Name: "allocstall_dma", Value: 1}, {Name: "allocstall_normal", Value: 2}}, Pressure: &kernel.Pressure{IO: kernel.Stall{Some: kernel.StallTime{Avg10: 1.5}}}}}},
		{"load.txt", RunQueues{whole, kernel.Load{Averages: [3]float64{0.5, 1.25, 2}, Queues: []kernel.RunQueue{{CPU: 0, Switches: 10}, {CPU: 1, Running: 2, Fair: 2, CurrPID: 7, CurrComm: evil}}}}},
		{"pstore.txt", Pstore{whole, kernel.Pstore{Backend: "ramoops", Records: []kernel.PstoreRecord{
			{Name: "dmesg-ramoops-1", Type: "dmesg", Time: at, Reason: "Oops", Part: 2, Text: "Oops#1 Part2\n<4>[    1.000000] " + evil + "\n"},
			{Name: "dmesg-ramoops-0", Type: "dmesg", Time: at, Problem: "is compressed, but not by deflate, or damaged", ThisBoot: true},
			{Name: "console-ramoops-0", Type: "console", Text: "last"}}}, true}},
		{"x.txt", Examined{whole, 0x1000, "x", 8, []Unit{{0x1000, "0x0000000000000001", "init_task+0x0"}, {0x1008, "0x0000000000000002", ""}, {0x1010, "0x0000000000000003", ""}}}},
		{"x-s.txt", Examined{whole, 0x1000, "s", 0, []Unit{{0x1000, `"` + evil + `"`, ""}, {0x1008, `""`, ""}}}},
		{"modinfo.txt", Module{whole, kernel.Module{Name: "dummy", State: "live", Size: 16384, Base: 0xffffffffc0001000, Refs: 1, UsedBy: []string{evil}, Version: "1" + evil, Taint: 1 << 12,
			Sections: []kernel.Section{{Name: ".text", Addr: 0xffffffffc0001000}}}, []kernel.Parameter{{Name: "n", Perm: 0o444, Type: "int", Value: "-1"}, {Name: "s", Type: "charp", Value: evil}, {Name: "own"}}}},
		{"pstore-none.txt", Pstore{whole, kernel.Pstore{Backend: "efi_pstore"}, true}},
		{"stack.txt", Stack{Extent{At: at, Doubts: []string{"ORC entry: not found; frames with a ? are guessed"}}, kernel.Stack{PID: 7, Comm: evil, State: "D", Why: "x",
			Frames: []kernel.Frame{{Addr: 0xffffffff81000123, Symbol: "schedule", Offset: 0x23}, {Addr: 0xffffffffc0001000, Module: "virtio_net"}, {Addr: 0xffffffff81000200, Symbol: "do_exit", Guessed: true}}}}},
		{"print.txt", Object{whole, 0x1000, kernel.Value{Type: "struct x", Parts: []kernel.Value{{Name: "a", Type: "int", Text: "-1"}, {Name: "b", Type: "struct y", Offset: 8, Parts: []kernel.Value{{Name: "c", Type: "char[4]", Offset: 8, Text: `"` + evil + `"`}}}}}}},
	} {
		var b bytes.Buffer
		if err := x.answer.Text(&b); err != nil {
			t.Errorf("%s: %v", x.name, err)
		}
		golden(t, x.name, b.Bytes())
		if bytes.ContainsAny(b.Bytes(), "\x1b") {
			t.Errorf("%s lets control characters through", x.name)
		}
		if _, err := json.Marshal(x.answer); err != nil {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}

func TestPrevious(t *testing.T) {
	p := Pstore{Pstore: kernel.Pstore{Records: []kernel.PstoreRecord{
		{Name: "old", Text: "Panic#1 Part1\n<6>[    1.0] info\n of two lines\n<3>[    2.0] error\n of two\n<12>[    3.0] daemon\n<x>\n"},
		{Name: "new", ThisBoot: true}}}}
	all := p
	all.Previous(nil)
	if len(all.Records) != 1 || all.Records[0] != p.Records[0] {
		t.Errorf("previous = %+v", all.Records)
	}
	level := uint8(4)
	p.Previous(&level)
	if got, want := p.Records[0].Text, "Panic#1 Part1\n<3>[    2.0] error\n of two\n<12>[    3.0] daemon\n<x>\n"; got != want {
		t.Errorf("lines of level 4 = %q, want %q", got, want)
	}
}

func TestGather(t *testing.T) {
	if _, err := modules(t.Context(), seq[kernel.Module](nil, errBroken)); !errors.Is(err, errBroken) {
		t.Errorf("modules of nothing but an error = %v", err)
	}
	m, err := modules(t.Context(), seq[kernel.Module](nil, nil))
	if err != nil || !m.Complete || m.Modules == nil {
		t.Errorf("no modules = %+v, %v; want an empty list", m, err)
	}
}

func TestTree(t *testing.T) {
	ps := Processes{Complete: true, Processes: []Process{{PID: 1}, {PID: 2}, {PID: 3, PPID: 1}, {PID: 4, PPID: 3}, {PID: 5, PPID: 1}, {PID: 8, PPID: 9}, {PID: 9, PPID: 8}}}
	shape := func(tr Tree) (out [][2]int) {
		for _, b := range tr.Processes {
			out = append(out, [2]int{b.PID, b.Depth})
		}
		return out
	}
	all, err := tree(ps, 0)
	if err != nil || all.Complete || len(all.Doubts) != 1 {
		t.Errorf("tree = %+v, %v; want doubt of the two that are each other's parent", all, err)
	}
	if d := cmp.Diff([][2]int{{1, 0}, {3, 1}, {4, 2}, {5, 1}, {2, 0}, {8, 0}, {9, 1}}, shape(all)); d != "" {
		t.Errorf("tree: -want +got\n%s", d)
	}
	below, err := tree(ps, 3)
	if d := cmp.Diff([][2]int{{3, 0}, {4, 1}}, shape(below)); d != "" || err != nil {
		t.Errorf("tree below 3: %v, -want +got\n%s", err, d)
	}
	if _, err := tree(ps, 77); !errors.Is(err, kernel.ErrNotFound) {
		t.Errorf("tree below no process = %v", err)
	}
}

func TestArguments(t *testing.T) {
	var wrong *ArgumentError
	for _, bad := range []string{"x", "-1", "0", "1.5", ""} {
		if _, err := process([]string{bad}, 0); !errors.As(err, &wrong) {
			t.Errorf("process %q = %v; want an *ArgumentError", bad, err)
		}
	}
	if pid, err := process(nil, 1); pid != 1 || err != nil {
		t.Errorf("no process = %d, %v", pid, err)
	}
}

func TestUnits(t *testing.T) {
	for s, want := range map[string]unitFormat{"": {1, 8, 'x'}, "8xg": {8, 8, 'x'}, "4dw": {4, 4, 'd'}, "c": {1, 1, 'c'}, "2ab": {2, 8, 'a'}, "s": {1, 8, 's'}, "3b": {3, 1, 'x'}} {
		if got, err := parseUnits(s); err != nil || got != want {
			t.Errorf("%q = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"0x", "65537b", "8193g", "99999999999999999999x", "x-1", "8 g", "i"} {
		var wrong *ArgumentError
		if _, err := parseUnits(s); !errors.As(err, &wrong) {
			t.Errorf("%q: %v", s, err)
		}
	}
}
