package kernel

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// testProcesses compares all about each thread with /proc.
func testProcesses(t *testing.T, g *guest, img *Image) {
	said := g.status()
	v := g.frozenView(img)
	compared, slept, told, unequal := 0, 0, 0, 0
	for id, s := range said {
		pid, _ := strconv.Atoi(id)
		p, err := v.Process(pid)
		if errors.Is(err, ErrNotFound) && strings.HasPrefix(s["status"], "Name:\tkworker") {
			continue // it has ended
		}
		if err != nil {
			t.Errorf("PID %d: %v", pid, err)
			continue
		}
		compared++
		lines := make(map[string]string)
		for line := range strings.Lines(s["status"]) {
			k, val, _ := strings.Cut(line, ":")
			lines[k] = strings.Join(strings.Fields(val), " ")
		}
		c := p.Credentials
		var groups, nspid []string
		for _, n := range c.Groups {
			groups = append(groups, fmt.Sprint(n))
		}
		for _, n := range p.IDs {
			nspid = append(nspid, fmt.Sprint(n.PID))
		}
		cpus := "0-1"
		if len(p.CPUs) == 1 {
			cpus = fmt.Sprint(p.CPUs[0])
		}
		set := func(n uint64) string { return fmt.Sprintf("%016x", n) }
		got := map[string]string{
			"Uid": fmt.Sprint(c.UID, " ", c.EUID, " ", c.SUID, " ", c.FSUID), "Gid": fmt.Sprint(c.GID, " ", c.EGID, " ", c.SGID, " ", c.FSGID),
			"Groups": strings.Join(groups, " "), "NSpid": strings.Join(nspid, " "), "CapInh": set(c.Inheritable), "CapPrm": set(c.Permitted), "CapEff": set(c.Effective),
			"CapBnd": set(c.Bounding), "CapAmb": set(c.Ambient), "NoNewPrivs": map[bool]string{true: "1", false: "0"}[p.NoNewPrivs],
			"Seccomp": map[string]string{"disabled": "0", "strict": "1", "filter": "2"}[p.Seccomp], "Seccomp_filters": fmt.Sprint(p.SeccompFilters),
			"SigPnd": set(p.Pending &^ (1 << 22)), "ShdPnd": set(p.Shared), "SigBlk": set(p.Blocked), "Cpus_allowed_list": cpus,
		}
		// SIGURG comes and goes: Go's runtime stops its threads by it.
		if n, err := strconv.ParseUint(lines["SigPnd"], 16, 64); err == nil {
			lines["SigPnd"] = set(n &^ (1 << 22))
		}
		for k, x := range got {
			if lines[k] != x && p.State != "Z" {
				t.Errorf("PID %d (%s) %s = %q; the guest says %q", pid, p.Comm, k, x, lines[k])
			}
		}
		// pid (comm) state ppid pgrp session …; 19 nice, 40 rt_priority, 41 policy.
		f := strings.Fields(s["stat"][strings.LastIndexByte(s["stat"], ')')+1:])
		policy := map[string]string{"SCHED_NORMAL": "0", "SCHED_FIFO": "1", "SCHED_RR": "2", "SCHED_BATCH": "3", "SCHED_IDLE": "5", "SCHED_DEADLINE": "6"}[p.Policy]
		have := []string{fmt.Sprint(p.Group), fmt.Sprint(p.Session), fmt.Sprint(p.Nice), fmt.Sprint(p.RTPriority), policy}
		if want := []string{f[2], f[3], f[16], f[37], f[38]}; !slices.Equal(have, want) && p.State != "Z" {
			t.Errorf("PID %d (%s): group, session, nice, rt priority, policy are %v; the guest says %v", pid, p.Comm, have, want)
		}
		if strings.TrimSpace(s["oom_score_adj"]) != fmt.Sprint(p.OOMScoreAdj) {
			t.Errorf("PID %d: oom_score_adj %d; the guest says %s", pid, p.OOMScoreAdj, s["oom_score_adj"])
		}
		if want := strings.TrimSpace(strings.TrimPrefix(s["cgroup"], "0::")); want != p.Cgroup && p.State != "Z" {
			t.Errorf("PID %d: cgroup %q; the guest says %q", pid, p.Cgroup, s["cgroup"])
		}
		if n := p.Namespaces; n != nil {
			for name, inum := range map[string]uint64{"pid": n.PID, "mnt": n.Mount, "net": n.Net, "uts": n.UTS, "ipc": n.IPC, "user": n.User, "cgroup": n.Cgroup} {
				if want := fmt.Sprintf("%s:[%d]", name, inum); s["ns/"+name] != want {
					t.Errorf("PID %d is in %s; the guest says %q", pid, want, s["ns/"+name])
				}
			}
		} else if p.State != "Z" {
			t.Errorf("PID %d has no namespaces", pid)
		}
		if p.Exe != s["exe"] {
			t.Errorf("PID %d runs %q; the guest says %q", pid, p.Exe, s["exe"])
		}
		if m := p.Memory; m != nil {
			for name, n := range map[string]uint64{"VmSize": m.Virtual, "VmLck": m.Locked} {
				if lines[name] != fmt.Sprintf("%d kB", n>>10) && p.TGID != 1 {
					t.Errorf("PID %d: %s %d KiB; the guest says %s", pid, name, n>>10, lines[name])
				}
			}
			// What each CPU or thread holds back, /proc leaves out: see compareTasks.
			for name, n := range map[string]uint64{"RssAnon": m.Anonymous, "RssFile": m.File, "RssShmem": m.Shared, "VmSwap": m.Swapped, "VmPTE": m.Tables} {
				kib, _ := strconv.ParseInt(strings.TrimSuffix(lines[name], " kB"), 10, 64)
				if d := int64(n>>10) - kib; (d < -2*256 || d > 2*256) && p.TGID != 1 { // PID 1 grows while it answers
					t.Errorf("PID %d: %s %d KiB; the guest says %s", pid, name, n>>10, lines[name])
				}
			}
		} else if lines["VmSize"] != "" {
			t.Errorf("PID %d has no memory", pid)
		}
		if s["wchan"] != "0" && s["wchan"] != "" {
			told++
		}
		if want := s["wchan"]; want != "0" && p.WaitChannel != "" {
			if slept++; want != p.WaitChannel {
				unequal++
				t.Logf("PID %d (%s) sleeps in %s; the guest says %s", pid, p.Comm, p.WaitChannel, want)
			}
		}
	}
	// They may have slept elsewhere when they were asked. A kernel unwound by ORC says "0" of all until v5.15: see testStacks.
	if compared < 80 || slept < 50 && told > 0 || unequal > 8 {
		t.Errorf("%d threads compared, %d sleep, %d of them elsewhere", compared, slept, unequal)
	}
}

// testUserMemory compares the mappings of a process, the state of its pages and what they hold.
func testUserMemory(t *testing.T, g *guest, img *Image) {
	said := g.status()
	pid := 0
	for id, s := range said {
		if strings.HasPrefix(s["status"], "Name:\tg-confined\n") && strings.Contains(s["status"], "Tgid:\t"+id+"\n") {
			pid, _ = strconv.Atoi(id)
		}
	}
	var pages map[string]string
	g.ask(&pages, fmt.Sprintf("pagemap %d", pid))
	v := img.View(t.Context())
	m, err := v.UserMemory(pid)
	if err != nil {
		t.Fatal(err)
	}
	page := uint64(1) << m.space.levels[len(m.space.levels)-1].shift
	var anon Mapping
	read := make(map[uint64][]byte) // by address
	for x, err := range m.Mappings() {
		if err != nil {
			t.Fatal(err)
		}
		if x.Swapped > 0 {
			anon = x
		}
		if x.Perms[0] == 'r' && x.Present > 0 && len(read) < 20 {
			var text string
			first := strings.IndexByte(pages[fmt.Sprintf("%x", x.Start)], 'p')
			if first < 0 {
				continue
			}
			at := x.Start + uint64(first)*page
			if g.ask(&text, fmt.Sprintf("memory %d:%x:%d", pid, at, page)); strings.HasPrefix(text, "error") {
				continue // [vvar]
			}
			if read[at], err = hex.DecodeString(text); err != nil {
				t.Fatal(err)
			}
		}
	}
	v = g.frozenView(img)
	if m, err = v.UserMemory(pid); err != nil {
		t.Fatal(err)
	}
	var lines []string
	swapped, special := uint64(0), 0
	for _, x := range gather(t, v, m.Mappings()) {
		dev := "00:00"
		if x.Dev != "" {
			var major, minor int
			fmt.Sscanf(x.Dev, "%d:%d", &major, &minor)
			dev = fmt.Sprintf("%02x:%02x", major, minor)
		}
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%08x-%08x %s %08x %s %d %s", x.Start, x.End, x.Perms, x.Offset, dev, x.Inode, x.Name)))
		if strings.HasPrefix(x.Name, "[") {
			special++
		}
		want, ok := pages[fmt.Sprintf("%x", x.Start)]
		if !ok || x.Name == "[vvar]" {
			continue // too large, or not of memory
		}
		if p, s := uint64(strings.Count(want, "p")), uint64(strings.Count(want, "s")); x.Present != p || x.Swapped != s {
			t.Errorf("%+v; the guest has %d pages there, %d in swap", x, p, s)
		}
		swapped += x.Swapped
	}
	var want []string
	for line := range strings.Lines(said[strconv.Itoa(pid)]["maps"]) {
		if !strings.Contains(line, "[vsyscall]") {
			want = append(want, strings.Join(strings.Fields(line), " "))
		}
	}
	if d := cmp.Diff(want, lines); d != "" || special < 3 {
		t.Errorf("mappings: -the guest says, +got\n%s", d)
	}
	if swapped != 2 {
		t.Errorf("%d pages are in swap; the process put 2 there", swapped)
	}
	for at, want := range read {
		got := make([]byte, len(want))
		if n, err := m.ReadAt(got, int64(at)); err != nil || n != len(got) || string(got) != string(want) {
			t.Errorf("%d bytes at %#x, %v; they are not what the guest has", n, at, err)
		}
	}
	if len(read) < 10 {
		t.Errorf("%d pages were read", len(read))
	}
	// Pages 0, 1 and 4 to 7 were written; 2 and 3 are in swap, those from 8 on were never touched.
	b := make([]byte, 3*page)
	n, err := m.ReadAt(b, int64(anon.Start))
	var absent *AbsentError
	if uint64(n) != 2*page || !errors.As(err, &absent) || absent.State != PageSwapped || absent.Addr != anon.Start+2*page || !strings.HasPrefix(string(b[page:]), "page 1 of anonymous memory\x00") {
		t.Errorf("%d bytes, %v; want two pages, and the third in swap", n, err)
	}
	if _, err := m.ReadAt(b[:1], int64(anon.Start+9*page)); !errors.As(err, &absent) || absent.State != PageAbsent {
		t.Errorf("a page that was never touched: %v", err)
	}
	if _, err := m.ReadAt(b[:1], -1<<40); !errors.Is(err, ErrNotMapped) {
		t.Errorf("an address of the kernel: %v", err)
	}
	s := said[strconv.Itoa(pid)]
	for name, x := range map[string]struct {
		got  func() ([]string, error)
		want string
	}{"arguments": {m.Arguments, s["cmdline"]}, "environment": {m.Environment, s["environ"]}} {
		got, err := x.got()
		if joined := strings.Join(got, "\x00") + "\x00"; err != nil || joined != x.want || len(got) < 2 {
			t.Errorf("%s %q, %v; the guest says %q", name, got, err, x.want)
		}
	}
	if _, err := v.UserMemory(2); !errors.Is(err, ErrNotFound) {
		t.Errorf("memory of kthreadd: %v", err)
	}
}

func testWorkers(t *testing.T, g *guest, img *Image) {
	var threads []guestThread
	g.ask(&threads, "ps")
	v := g.frozenView(img)
	workers := 0
	cpus := make(map[int]int)
	for _, p := range gather(t, v, v.WorkerPools()) {
		cpus[p.CPU]++
		if p.SoftIRQ {
			continue // its worker is no task
		}
		workers += p.Workers
		if len(p.Running) != p.Workers-p.Idle && len(p.Running) > 2 {
			t.Errorf("%+v", p)
		}
	}
	want := 0
	for _, p := range threads {
		if strings.HasPrefix(p.Comm, "kworker/") && p.Comm != "kworker/R" {
			want++
		}
	}
	// Those of queues with a rescuer of their own are kworkers by name since v6.9, and are in no pool.
	for _, p := range threads {
		if strings.HasPrefix(p.Comm, "kworker/R-") {
			want--
		}
	}
	if workers < want-2 || workers > want+2 || workers < 6 || cpus[0] < 2 || cpus[1] < 2 || cpus[-1] < 1 {
		t.Errorf("%d workers, pools by CPU %v; the guest has %d", workers, cpus, want)
	}
}

func testTimers(t *testing.T, g *guest, img *Image) {
	list := g.read("/proc/timer_list")
	v := g.frozenView(img)
	said := strings.Count(list, "\n # expires") // the high-resolution ones
	high, wheel, sleepers, works := 0, 0, 0, 0
	var unsaid []Timer // may have been started since: hrtick runs for a time slice
	for _, x := range gather(t, v, v.Timers()) {
		if x.Clock == "jiffies" {
			wheel++
			if x.Work != "" {
				works++
			}
		} else {
			high++
			if !strings.Contains(list, ", "+x.Function+",") {
				unsaid = append(unsaid, x)
			}
		}
		if x.PID != 0 {
			sleepers++
		}
		if x.Function == "" || x.Due < -time.Minute || x.Due > 100*365*24*time.Hour {
			t.Errorf("%+v", x)
		}
	}
	if len(unsaid) > 2 {
		t.Errorf("the guest has no %+v", unsaid)
	}
	if !about(uint64(high), uint64(said), 3) || high < 4 || wheel < 10 || sleepers == 0 || works < 3 {
		t.Errorf("%d high-resolution timers, %d others, %d of them sleepers', %d of works; the guest has %d", high, wheel, sleepers, works, said)
	}
}

func testInterrupts(t *testing.T, g *guest, img *Image) {
	hard, soft := g.read("/proc/interrupts"), g.read("/proc/softirqs")
	v := g.frozenView(img)
	got := make(map[string]Interrupt)
	for _, i := range gather(t, v, v.Interrupts()) {
		got[fmt.Sprint(i.Name, i.Soft)] = i
	}
	compared := 0
	for _, text := range []string{hard, soft} {
		for line := range strings.Lines(text) {
			f := strings.Fields(line)
			if len(f) < 3 || f[0] == "CPU0" {
				continue
			}
			name := strings.TrimSuffix(f[0], ":")
			i, ok := got[fmt.Sprint(name, text == soft)]
			if !ok {
				if name != "ERR" && name != "MIS" && !slices.Contains([]string{"HYP", "PIN", "NPI", "PIW", "HRE", "HVS", "DFR"}, name) {
					t.Errorf("%s is missing", name)
				}
				continue
			}
			compared++
			for cpu := range 2 {
				want, _ := strconv.ParseUint(f[1+cpu], 10, 64)
				if !about(i.Counts[cpu], want, max(300, want/100)) {
					t.Errorf("%s = %v; the guest has %s", name, i.Counts, line)
				}
			}
			if _, err := strconv.Atoi(name); err == nil {
				if users := strings.Join(i.Users, ", "); !strings.HasSuffix(strings.TrimSpace(line), users) || !strings.Contains(line, i.Chip) {
					t.Errorf("%s = %+v; the guest has %s", name, i, line)
				}
			}
		}
	}
	serial := got["3false"].Counts
	if compared < 20 || got["TIMERtrue"].Counts[0] == 0 || img.Info().Arch == "x86_64" && (len(serial) < 2 || serial[0]+serial[1] < 100) {
		t.Errorf("%d lines compared; the serial line's came %v times", compared, serial)
	}
}

func testRCU(t *testing.T, g *guest, img *Image) {
	v := g.frozenView(img)
	s, err := v.RCU()
	if err != nil || len(s.CPUs) != 2 || !strings.HasPrefix(s.State, "RCU_GP_") || s.Waiting && (s.Running < 0 || s.Running > time.Minute || s.Stall < 0) {
		t.Errorf("%+v, %v", s, err)
	}
	g.execute("cont")
	g.ask(nil, "spawn zombie 5")
	time.Sleep(time.Second)
	g.execute("stop")
	later, err := img.View(t.Context()).RCU()
	if err != nil || later.GracePeriod-s.GracePeriod-1 > 1<<20 {
		t.Errorf("grace period %d, then %d, %v; want it to move", s.GracePeriod, later.GracePeriod, err)
	}
}

func testDisks(t *testing.T, g *guest, img *Image) {
	g.ask(nil, "readers 20")
	var inflight []string
	soon(t, "reads under way", func() bool {
		inflight = strings.Fields(g.read("/sys/block/vda/inflight"))
		n, _ := strconv.Atoi(inflight[0])
		return n > 10
	})
	stats := g.read("/proc/diskstats")
	v := g.frozenView(img)
	got := gather(t, v, v.Disks())
	for _, d := range got {
		i := strings.Index(stats, " "+d.Name+" ")
		if i < 0 {
			t.Errorf("the guest has no %+v", d)
			continue
		}
		// name reads merged sectors ms writes merged sectors ms in-flight …
		f := strings.Fields(stats[i:])
		num := func(i int) uint64 { n, _ := strconv.ParseUint(f[i], 10, 64); return n }
		if !about(d.Reads, num(1), 3) || !about(d.ReadBytes>>9, num(3), 3*8) || d.Writes != num(5) || d.WrittenBytes>>9 != num(7) || d.Queues == 0 {
			t.Errorf("%+v; the guest has %q", d, f)
		}
		if d.Name != "vda" {
			continue
		}
		want, _ := strconv.Atoi(inflight[0])
		// More of these 20, and of the 20 of startObjects, may have begun since the guest was asked.
		if n := len(d.InFlight); n > 40 || n < want-3 || n < 5 {
			t.Errorf("%d reads are under way; the guest had %d", n, want)
		}
		var oldest time.Duration
		for _, r := range d.InFlight {
			if r.Op != "read" || r.Bytes != 4096 || r.Sector%2048 != 0 || r.Sector == 0 || r.Age < 0 || r.Age > 10*time.Minute {
				t.Errorf("%+v", r)
			}
			oldest = max(oldest, r.Age) // the kernel's clock stands between two ticks: what has just begun may be of no age
		}
		if oldest <= 0 {
			t.Errorf("the oldest of %d reads, one of which ends in a second, is %v old", len(d.InFlight), oldest)
		}
		if d.Size != 64<<20 || d.ReadOnly {
			t.Errorf("%+v", d)
		}
	}
	if len(got) != strings.Count(stats, "\n") || len(got) != 2 {
		t.Errorf("%d disks; the guest has %s", len(got), stats)
	}
}

func testBPF(t *testing.T, g *guest, img *Image) {
	info := func(kind string) map[uint32][]byte {
		var said map[string]string
		g.ask(&said, "bpf "+kind)
		all := make(map[uint32][]byte)
		for id, text := range said {
			n, _ := strconv.ParseUint(id, 10, 32)
			all[uint32(n)], _ = hex.DecodeString(text)
		}
		return all
	}
	programs, maps, links := info("prog"), info("map"), info("link")
	v := g.frozenView(img)
	got, err := v.BPF()
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Programs) != len(programs) || len(got.Maps) != len(maps) || len(got.Links) != len(links) || len(programs) == 0 || len(maps) == 0 || len(links) == 0 {
		t.Errorf("%d programs, %d maps, %d links; the guest has %d, %d, %d", len(got.Programs), len(got.Maps), len(got.Links), len(programs), len(maps), len(links))
	}
	u32 := func(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
	text := func(b []byte) string { s, _ := cString(b); return s }
	// struct bpf_prog_info, bpf_map_info and bpf_link_info of include/uapi/linux/bpf.h.
	for _, p := range got.Programs {
		b := programs[p.ID]
		if p.Name != text(b[64:80]) || p.Tag != hex.EncodeToString(b[8:16]) || p.Jited != int(u32(b, 16)) || p.UID != u32(b, 48) || len(p.Maps) != int(u32(b, 52)) ||
			// The clock may have been set off by a suspend: /proc's is since boot, ours monotonic.
			!about(uint64(p.Loaded), binary.LittleEndian.Uint64(b[40:]), 1e9) || p.Name == "g_prog" && (p.Type != "cgroup-skb" || u32(b, 0) != 8 || p.Insns != 4 || len(p.Maps) != 1) {
			t.Errorf("%+v; the guest has %x", p, b)
		}
	}
	for _, m := range got.Maps {
		b := maps[m.ID]
		if m.Name != text(b[24:40]) || m.KeySize != int(u32(b, 8)) || m.ValueSize != int(u32(b, 12)) || m.MaxEntries != int(u32(b, 16)) || m.Flags != u32(b, 20) || m.Name == "g_map" && m.Type != "array" {
			t.Errorf("%+v; the guest has %x", m, b)
		}
	}
	for _, l := range got.Links {
		if b := links[l.ID]; l.Program != u32(b, 8) || l.Type != "cgroup" || u32(b, 0) != 3 {
			t.Errorf("%+v; the guest has %x", l, b)
		}
	}
}

func testProbes(t *testing.T, g *guest, img *Image) {
	kprobes, functions, events := g.read("/sys/kernel/debug/kprobes/list"), g.read("/sys/kernel/tracing/enabled_functions"), g.read("/sys/kernel/tracing/set_event")
	v := g.frozenView(img)
	kinds := make(map[string]int)
	for _, p := range gather(t, v, v.Probes()) {
		kinds[p.Kind]++
		switch p.Kind {
		case "kprobe":
			if !strings.Contains(kprobes, " "+p.Place+"+0x0 ") || p.Disabled || p.Function != "kprobe_dispatcher" {
				t.Errorf("%+v; the guest has %s", p, kprobes)
			}
		case "ftrace":
			if !strings.Contains(functions, p.Function) || p.Disabled {
				t.Errorf("%+v; the guest has %s", p, functions)
			}
		case "tracepoint":
			if p.Function == "trace_event_raw_event_"+p.Place && !strings.Contains(events, ":"+p.Place+"\n") || p.Function == "" {
				t.Errorf("%+v; the guest has %s", p, events)
			}
			if p.Place == "task_rename" {
				kinds["rename"]++
			}
		}
	}
	if s, err := v.Signs(); err != nil || len(s.Hooks) > 0 ||
		slices.ContainsFunc(s.Missing, func(m string) bool {
			return strings.HasPrefix(m, "probes") || strings.HasPrefix(m, "callbacks") || strings.HasPrefix(m, "eBPF")
		}) {
		t.Errorf("the guest's own tracing is taken for a stranger's: %+v, %v, %v", s.Hooks, s.Missing, err)
	}
	// What a healthy kernel calls is seen, and found in code that has a name.
	called := make(map[string]int)
	note := func(h Hook, _ VirtAddr) {
		if h.To == 0 {
			return
		}
		called[h.Kind]++
		if name, err := v.function(h.To); err != nil || name == "" || h.Place == "" {
			t.Errorf("%+v leads to %q, %v", h, name, err)
		}
	}
	for _, look := range []func(*callbackPlan, noteHook) error{v.notifiers, v.packetFilters, v.tracepointHooks, v.lineDisciplines, v.inputHandlers} {
		if err := look(img.signsPlan().callbacks, note); err != nil {
			t.Error(err)
		}
	}
	t.Logf("called: %v", called)
	if called["notifier"] < 10 || called["line discipline"] < 8 || called["tracepoint"] < 1 {
		t.Errorf("too few are called: %v", called)
	}
	if kinds["kprobe"] != strings.Count(kprobes, "\n") || kinds["kprobe"] == 0 || kinds["ftrace"] == 0 && functions != "" || kinds["rename"] != 1 {
		t.Errorf("%v; the guest has %s, %s", kinds, kprobes, events)
	}
}

func testUprobes(t *testing.T, g *guest, img *Image) {
	events := g.read("/sys/kernel/tracing/uprobe_events")
	v := g.frozenView(img)
	got := gather(t, v, v.Uprobes())
	if len(got) != 1 || got[0].Kind != "uprobe" || got[0].Place != "/init:0x2000" || !strings.Contains(events, "/init:0x0000000000002000") {
		t.Errorf("%+v; the guest has %s", got, events)
	}
}

// testLSMHooks compares what the security modules have hooked with their names; the functions must begin where the kernel's symbols say.
func testLSMHooks(t *testing.T, g *guest, img *Image) {
	names := strings.Split(strings.TrimSpace(g.read("/sys/kernel/security/lsm")), ",")
	v := g.frozenView(img)
	hooks, calls := make(map[string]int), make(map[string]int)
	for _, p := range gather(t, v, v.LSMHooks()) {
		module, hook, _ := strings.Cut(p.Place, ":")
		hooks[module]++
		calls[hook+" "+p.Function]++
		if !slices.Contains(names, module) || p.Function == "" || strings.ContainsAny(p.Function, "+[") || strings.HasPrefix(p.Function, "0x") {
			t.Errorf("%+v; want the start of a function of the kernel, of one of the modules %v", p, names)
		}
	}
	for _, name := range names {
		if hooks[name] == 0 && name != "integrity" {
			t.Errorf("%s has no hooks; those that have: %v", name, hooks)
		}
	}
	for _, want := range []string{"capable cap_capable", "ptrace_access_check cap_ptrace_access_check", "ptrace_access_check yama_ptrace_access_check", "locked_down lockdown_is_locked_down"} {
		if calls[want] != 1 {
			t.Errorf("%q is there %d times", want, calls[want])
		}
	}
	t.Logf("%v", hooks)
}

func testKeys(t *testing.T, g *guest, img *Image) {
	said := g.read("/proc/keys")
	v := g.frozenView(img)
	got := gather(t, v, v.Keys())
	names := ""
	for _, k := range got {
		names += k.Type + " " + k.Description + "\n"
		// 04b4d2e0 I--Q---     1 perm 3f130000     0     0 keyring   g-session: 1
		i := strings.Index(said, fmt.Sprintf("%08x ", k.Serial))
		if i < 0 {
			continue // one that the guest's process may not see
		}
		line, _, _ := strings.Cut(said[i:], "\n")
		f := strings.Fields(line)
		if want := fmt.Sprintf("%08x %d %d", k.Perm, int32(k.UID), int32(k.GID)); want != strings.Join([]string{f[4], f[5], f[6]}, " ") && k.GID != ^uint32(0) || !strings.HasPrefix(k.Type, f[7]) || !strings.Contains(line, " "+k.Description) {
			t.Errorf("%+v; the guest has %s", k, line)
		}
	}
	if len(got) < strings.Count(said, "\n") || !strings.Contains(names, "user g-key\n") || !strings.Contains(names, "keyring g-session\n") {
		t.Errorf("%d keys; the guest has %s", len(got), said)
	}
}

func testPipes(t *testing.T, g *guest, img *Image) {
	var links map[string]string
	g.ask(&links, "links /proc/[0-9]*/fd/*")
	want := make(map[string]int)
	for _, to := range links {
		if strings.HasPrefix(to, "pipe:") {
			want[to]++
		}
	}
	v := g.frozenView(img)
	got := gather(t, v, v.Pipes())
	hello := false
	for _, p := range got {
		if want[p.Path] != len(p.Owners) || p.Buffers != 16 {
			t.Errorf("%+v; the guest has it open %d times", p, want[p.Path])
		}
		hello = hello || p.Bytes == 5 && p.Used == 1 && p.Readers == 1 && p.Writers == 1
	}
	if len(got) != len(want) || !hello || len(want) < 4 {
		t.Errorf("%+v; the guest has %v", got, want)
	}
}

func testRoutes(t *testing.T, g *guest, img *Image) {
	table, trie := g.read("/proc/net/route"), g.read("/proc/net/fib_trie")
	v := g.frozenView(img)
	shown, local := 0, 0
	for _, r := range gather(t, v, v.Routes()) {
		a := r.Dest.Addr().As4()
		if r.Type == "unicast" {
			mask := ^uint32(0) << (32 - r.Dest.Bits())
			gateway := [4]byte{}
			if r.Gateway.IsValid() {
				gateway = r.Gateway.As4()
			}
			line := fmt.Sprintf("%s\t%08X\t%08X\t", r.Device, binary.LittleEndian.Uint32(a[:]), binary.LittleEndian.Uint32(gateway[:]))
			i := strings.Index(table, line)
			if i < 0 {
				t.Errorf("%+v; the guest has %s", r, table)
				continue
			}
			f := strings.Fields(table[i:])
			if f[6] != fmt.Sprint(r.Metric) || f[7] != fmt.Sprintf("%08X", binary.BigEndian.Uint32(binary.LittleEndian.AppendUint32(nil, mask))) {
				t.Errorf("%+v; the guest has %s", r, f)
			}
			shown++
			continue
		}
		local++
		scope := map[uint8]string{253: "link", 254: "host"}[r.Scope]
		if !strings.Contains(trie, "|-- "+r.Dest.Addr().String()+"\n") || !strings.Contains(trie, fmt.Sprintf("/%d %s %s\n", r.Dest.Bits(), scope, strings.ToUpper(r.Type))) || r.Table != 255 {
			t.Errorf("%+v; the guest has %s", r, trie)
		}
	}
	if lines := strings.Count(table, "\n") - 1; shown != lines || shown == 0 || local < 5 {
		t.Errorf("%d routes, %d local ones; the guest has %d", shown, local, lines)
	}
	if r := slices.Collect(func(yield func(Route) bool) {
		for r := range v.Routes() {
			yield(r)
		}
	}); r[0].Table != 254 || r[0].Dest != netip.MustParsePrefix("192.0.2.0/25") || r[0].Source != netip.MustParseAddr("192.0.2.7") {
		t.Errorf("the first route is %+v", r[0])
	}
}

// testRoutes6 compares the routes of IPv6 with /proc/net/ipv6_route, which has those of all tables but does not say of which.
func testRoutes6(t *testing.T, g *guest, img *Image) {
	text := g.read("/proc/net/ipv6_route")
	v := g.frozenView(img)
	var got, want []string
	tables := make(map[uint32]int)
	for _, r := range gather(t, v, v.Routes6()) {
		gateway := netip.IPv6Unspecified()
		if r.Gateway.IsValid() {
			gateway = r.Gateway
		}
		a, gw := r.Dest.Addr().As16(), gateway.As16()
		got = append(got, fmt.Sprintf("%x %02x %x %08x %s", a, r.Dest.Bits(), gw, r.Metric, r.Device))
		tables[r.Table]++
	}
	for line := range strings.Lines(text) {
		// destination, length, source, length, next hop, metric, references, uses, flags, device
		f := strings.Fields(line)
		if f[5] == "ffffffff" && f[9] == "lo" {
			continue // the entry that stands where there is none
		}
		want = append(want, strings.Join([]string{f[0], f[1], f[4], f[5], f[9]}, " "))
	}
	slices.Sort(got)
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" || tables[254] == 0 || tables[255] == 0 {
		t.Errorf("tables %v; -the guest says, +got\n%s", tables, d)
	}
}

func testSysctls(t *testing.T, g *guest, img *Image) {
	said := make(map[string]string)
	for _, dir := range []string{"kernel", "vm", "fs", "net/ipv4", "net/core"} {
		for path, value := range g.files("/proc/sys/"+dir, "*") {
			said[strings.ReplaceAll(strings.TrimPrefix(path, "/proc/sys/"), "/", ".")] = strings.Join(strings.Fields(value), " ")
		}
	}
	v := g.frozenView(img)
	same, known, others := 0, 0, 0
	for _, s := range gather(t, v, v.Sysctls()) {
		want, ok := said[s.Name]
		if !ok {
			others++
			continue
		}
		if !s.Known {
			continue
		}
		known++
		if strings.Join(strings.Fields(s.Value), " ") == want {
			same++
			continue
		}
		// What the kernel counts moves.
		if a, err := strconv.ParseInt(s.Value, 10, 64); err == nil {
			if b, err := strconv.ParseInt(want, 10, 64); err == nil && about(uint64(a), uint64(b), 100) {
				continue
			}
		}
		if strings.Contains(s.Name, "random") || strings.Contains(s.Name, ".sched_domain.") || strings.Contains(s.Name, "nr_open") || strings.HasPrefix(s.Name, "fs.dentry-state") || strings.HasPrefix(s.Name, "fs.inode") {
			continue
		}
		t.Errorf("%+v; the guest has %q", s, want)
	}
	if known < 250 || same < 240 {
		t.Errorf("%d settings are the same of %d known; %d others", same, known, others)
	}
	t.Logf("%d settings are the same of %d known; the guest has %d", same, known, len(said))
}

func testHost(t *testing.T, g *guest, img *Image) {
	cmdline, tainted, lsms, swaps := g.read("/proc/cmdline"), g.read("/proc/sys/kernel/tainted"), g.read("/sys/kernel/security/lsm"), g.read("/proc/swaps")
	var clock guestClock
	g.ask(&clock, "clock")
	v := g.frozenView(img)
	h, err := v.Host()
	if err != nil {
		t.Fatal(err)
	}
	if h.CommandLine+"\n" != cmdline || fmt.Sprintln(h.Tainted) != tainted || strings.Join(h.LSMs, ",") != strings.TrimSpace(lsms) || h.TicksPerSec != 250 {
		t.Errorf("%+v; the guest has %q, %q, %q", h, cmdline, tainted, lsms)
	}
	if d := h.Now.UnixNano() - clock.Real; d < -int64(time.Minute) || d > int64(time.Minute) || !about(uint64(h.Uptime), uint64(clock.Mono), uint64(time.Minute)) {
		t.Errorf("%+v; the guest has %+v", h, clock)
	}
	f := strings.Fields(swaps)
	if len(h.Swaps) != 1 || len(f) < 10 {
		t.Fatalf("%+v; the guest has %s", h.Swaps, swaps)
	}
	s := h.Swaps[0]
	if got := fmt.Sprint(s.Path, " ", s.Size>>10, " ", s.Used>>10, " ", s.Priority); got != f[5]+" "+f[7]+" "+f[8]+" "+f[9] {
		t.Errorf("%+v; the guest has %s", s, swaps)
	}
}

// soon asks until an answer is as it should be, or time is over.
func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

func testPCI(t *testing.T, g *guest, img *Image) {
	const at = "/sys/bus/pci/devices/"
	var names, drivers map[string]string
	g.ask(&names, "links "+at+"*")
	g.ask(&drivers, "links "+at+"*/driver")
	var want, got []string
	for path := range names {
		num := func(file string) uint64 {
			n, err := strconv.ParseUint(strings.TrimSpace(g.read(path+"/"+file)), 0, 32)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		driver := drivers[path+"/driver"]
		want = append(want, fmt.Sprintf("%s %04x:%04x %04x:%04x %06x %02x %s", strings.TrimPrefix(path, at), num("vendor"), num("device"),
			num("subsystem_vendor"), num("subsystem_device"), num("class"), num("revision"), driver[strings.LastIndex(driver, "/")+1:]))
	}
	v := g.frozenView(img)
	for _, d := range gather(t, v, v.PCIDevices()) {
		got = append(got, fmt.Sprintf("%s %04x:%04x %04x:%04x %06x %02x %s", d.Name, d.Vendor, d.Device, d.SubVendor, d.SubDevice, d.Class, d.Revision, d.Driver))
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) || len(want) < 2 {
		t.Errorf("PCI devices\n%s\nthe guest has\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
