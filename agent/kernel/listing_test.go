package kernel

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// listing asks something that View lists, and counts what there is.
type listing struct {
	name string
	ask  func(*View) (n int, err error)
}

// listings are those that every kernel is asked.
var listings = []listing{
	{"modules", func(v *View) (int, error) { return drain(v.Modules()) }},
	{"interfaces", func(v *View) (int, error) { return drain(v.Interfaces()) }},
	{"files", func(v *View) (int, error) { return drain(v.OpenFiles(0)) }},
	{"mounts", func(v *View) (int, error) { return drain(v.Mounts(1)) }},
	{"sockets", func(v *View) (int, error) { return drain(v.Sockets()) }},
	{"slabs", func(v *View) (int, error) { return drain(v.SlabCaches()) }},
	{"memory", func(v *View) (int, error) {
		m, err := v.MemoryUse()
		return len(m.Counters), err
	}},
	{"load", func(v *View) (int, error) {
		l, err := v.Load()
		return len(l.Queues), err
	}},
	{"stacks", func(v *View) (n int, last error) {
		for t, err := range v.Tasks() {
			if err != nil {
				return n, err
			}
			if t.OnCPU || t.State == "Z" || t.PID%7 != 1 {
				continue
			}
			s, err := v.stackOf(t)
			if n += len(s.Frames); err != nil {
				last = err
			}
		}
		return n, last
	}},
	{"print", func(v *View) (int, error) {
		val, err := v.Print("cred", v.img.lay.task.init)
		return len(val.Parts), err
	}},
}

// objectListings are those that were recorded of the kernels in objectKernels alone.
var objectListings = []listing{
	{"cgroups", func(v *View) (int, error) { return drain(v.Cgroups()) }},
	{"containers", func(v *View) (int, error) { return drain(v.Containers()) }},
	{"locks", func(v *View) (int, error) { return drain(v.Locks()) }},
	{"worker pools", func(v *View) (int, error) { return drain(v.WorkerPools()) }},
	{"timers", func(v *View) (int, error) { return drain(v.Timers()) }},
	{"interrupts", func(v *View) (int, error) { return drain(v.Interrupts()) }},
	{"disks", func(v *View) (int, error) { return drain(v.Disks()) }},
	{"pipes", func(v *View) (int, error) { return drain(v.Pipes()) }},
	{"routes", func(v *View) (int, error) { return drain(v.Routes()) }},
	{"sysctls", func(v *View) (int, error) { return drain(v.Sysctls()) }},
	{"keys", func(v *View) (int, error) { return drain(v.Keys()) }},
	{"probes", func(v *View) (int, error) { return drain(v.Probes()) }},
	{"BPF", func(v *View) (int, error) {
		b, err := v.BPF()
		return len(b.Programs) + len(b.Maps) + len(b.Links), err
	}},
	{"RCU", func(v *View) (int, error) {
		s, err := v.RCU()
		return len(s.CPUs), err
	}},
	{"host", func(v *View) (int, error) {
		h, err := v.Host()
		return len(h.LSMs) + len(h.Swaps), err
	}},
	{"process", func(v *View) (int, error) {
		p, err := v.Process(1)
		return len(p.CPUs) + len(p.IDs), err
	}},
	{"user memory", func(v *View) (int, error) {
		m, err := v.UserMemory(1)
		if err != nil {
			return 0, err
		}
		args, err := m.Arguments()
		if err != nil {
			return 0, err
		}
		env, err := m.Environment()
		if err != nil {
			return 0, err
		}
		n, err := drain(m.Mappings())
		return n + len(args) + len(env), err
	}},
}

// liveListings are those that are in no recording.
var liveListings = []listing{
	{"PCI devices", func(v *View) (int, error) { return drain(v.PCIDevices()) }},
	{"guards", func(v *View) (int, error) {
		all, err := v.Guards()
		return len(all), err
	}},
	{"module parameters", func(v *View) (n int, last error) {
		for m, err := range v.Modules() {
			if err != nil {
				return n, err
			}
			all, err := v.ModuleParameters(m)
			if n += len(all); err != nil {
				last = err
			}
		}
		return n, last
	}},
}

func drain[T any](seq iter.Seq2[T, error]) (n int, last error) {
	for _, err := range seq {
		if last = err; err == nil {
			n++
		}
	}
	return n, last
}

// TestListingsRecorded asks recorded kernels everything; what they said of their modules and mounts is in their labels.
func TestListingsRecorded(t *testing.T) {
	recorded(t, func(name string, rec *hostmem.Recording) {
		t.Run(name, func(t *testing.T) {
			img, _ := openRecorded(t, rec)
			all := listings
			if slices.Contains(objectKernels, name) {
				all = slices.Concat(listings, objectListings)
			}
			for _, l := range all {
				n, err := l.ask(img.View(t.Context()))
				want := rec.Labels()["listing "+l.name]
				if got := strconv.Itoa(n); err != nil || got != want || n == 0 {
					t.Errorf("%s: %s, %v; want %s", l.name, got, err, want)
				}
			}
			var modules []string
			for m, err := range img.View(t.Context()).Modules() {
				if err != nil {
					t.Fatal(err)
				}
				modules = append(modules, m.Name)
			}
			var said []string
			for line := range strings.Lines(rec.Labels()["modules"]) {
				said = append(said, strings.Fields(line)[0])
			}
			slices.Sort(said)
			if d := cmp.Diff(said, modules); d != "" {
				t.Errorf("modules: -the guest says, +got\n%s", d)
			}
			for m, err := range img.View(t.Context()).Mounts(1) {
				if err != nil {
					t.Fatal(err)
				}
				path := strings.ReplaceAll(m.Path, " ", `\040`)
				if !strings.Contains(rec.Labels()["mounts"], fmt.Sprintf(" %s %s", path, m.Options)) {
					t.Errorf("the guest has no mount %+v", m)
				}
			}
		})
	})
}

// BenchmarkListings measures each listing on the recordings, or on the RAM file of -ram.
func BenchmarkListings(b *testing.B) {
	for _, l := range listings {
		b.Run(l.name, func(b *testing.B) { benchmarkPass(b, "items", l.ask) })
	}
}

// TestListings compares the listings of a running kernel with what that kernel says of itself.
func TestListings(t *testing.T) {
	forEachGuest(t, func(t *testing.T, kernel string) {
		g := startObjects(t, kernel, guestOptions{cmdline: "numa=fake=2"}) // two nodes where the kernel is built to (CONFIG_NUMA_EMU)
		img := g.attach(Options{})
		tests := []guestTest{
			{"modules", testModules},
			{"interfaces", testInterfaces},
			{"files", testFiles},
			{"mounts", testMounts},
			{"sockets", testSockets},
			{"slabs", testSlabs},
			{"memory", testMemory},
			{"load", testLoad},
			{"usage", testUsage},
			{"stacks", testStacks},
			{"print", testPrint},
			{"module types", testModuleTypes},
			{"cgroups", testCgroups},
			{"containers", testContainers},
			{"locks", testLocks},
		}
		if slices.Contains(objectKernels, kernel) || *guestsFlag != "" {
			tests = append(tests, objectTests...)
			if variables := len(img.syms.find("init_task")) > 0; !variables {
				tests = slices.DeleteFunc(tests, func(x guestTest) bool { return slices.Contains(needVariables, x.name) })
				tests = append(tests, guestTest{"not supported", testNotSupported})
			}
		} else if img.Info().Arch == "aarch64" {
			tests = append(tests, guestTest{"user memory", testUserMemory})
		}
		if slices.Contains(objectKernels, kernel) || img.Info().Arch == "aarch64" || *guestsFlag != "" {
			tests = append(tests, guestTest{"golden", testGolden})
		}
		if kernel == "6.1" || kernel == "6.12" || *guestsFlag != "" {
			tests = append(tests, guestTest{"torture", testTorture}) // behind all others, which need quiet
		}
		for _, l := range tests {
			t.Run(l.name, func(t *testing.T) {
				g.t = t
				l.test(t, g, img)
			})
		}
	})
}

// startListed starts a guest that has something of everything to list.
func startListed(t testing.TB, kernel string, o guestOptions) *guest {
	t.Helper()
	o.modules = append([]string{"virtio_pci", "virtio_net", "dummy"}, o.modules...)
	o.args = append([]string{"-netdev", "user,id=n0,restrict=on,ipv6=off", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56"}, o.args...)
	g := startGuest(t, kernel, o)
	var result string
	if g.ask(&result, "world"); result != "ok" {
		t.Fatal(result)
	}
	time.Sleep(2 * time.Second) // until IPv6 addresses are no longer tentative
	return g
}

// frozenView stops the guest and returns a view of it, which ends with the test.
func (g *guest) frozenView(img *Image) *View {
	g.t.Helper()
	g.execute("stop")
	g.t.Cleanup(func() { g.execute("cont") })
	return img.View(g.t.Context())
}

func (g *guest) read(path string) string {
	g.t.Helper()
	var text string
	g.ask(&text, "read "+path)
	return text
}

// gather collects a listing, logs what it took, and fails the test if it is not whole.
func gather[T any](t *testing.T, v *View, seq iter.Seq2[T, error]) (all []T) {
	t.Helper()
	began := time.Now()
	for x, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, x)
	}
	t.Logf("%d in %v, %+v", len(all), time.Since(began), v.Cost())
	return all
}

func testModules(t *testing.T, g *guest, img *Image) {
	proc := g.read("/proc/modules")
	sections := make(map[string]map[string]string)
	for line := range strings.Lines(proc) {
		name, _, _ := strings.Cut(line, " ")
		sections[name] = make(map[string]string)
		for _, s := range []string{".text", ".data", ".gnu.linkonce.this_module"} {
			sections[name][s] = strings.TrimSpace(g.read("/sys/module/" + name + "/sections/" + s))
		}
	}
	values := make(map[string]map[string]string)
	for name := range sections {
		values[name] = g.files("/sys/module/"+name+"/parameters", "*")
	}
	v := g.frozenView(img)
	got := make(map[string]Module)
	for _, m := range gather(t, v, v.Modules()) {
		got[m.Name] = m
	}
	lines, parameters := 0, 0
	for line := range strings.Lines(proc) {
		// virtio_net 86016 0 - Live 0xffffffffc0390000 (E)
		f := strings.Fields(line)
		lines++
		m, ok := got[f[0]]
		if !ok {
			t.Errorf("%s is missing", f[0])
			continue
		}
		users := strings.Join(m.UsedBy, ",") + ","
		if len(m.UsedBy) == 0 {
			users = "-"
		}
		taint := ""
		if len(f) > 6 {
			taint = strings.Trim(f[6], "()")
		}
		have := []string{fmt.Sprint(m.Size), fmt.Sprint(m.Refs), users, m.State, m.Base.String(), Taint(m.Taint)}
		want := []string{f[1], f[2], f[3], strings.ToLower(f[4]), f[5], taint}
		if fmt.Sprint(have) != fmt.Sprint(want) {
			t.Errorf("%s = %v; /proc/modules has %v", m.Name, have, want)
		}
		if !m.InList || !m.InKset || !m.InTree || m.Missing {
			t.Errorf("%s = %+v; want it in all views", m.Name, m)
		}
		for _, s := range m.Sections {
			if want, ok := sections[m.Name][s.Name]; ok && want != fmt.Sprintf("%#016x", uint64(s.Addr)) && want != s.Addr.String() {
				t.Errorf("%s %s = %v; sysfs has %s", m.Name, s.Name, s.Addr, want)
			}
		}
		if len(m.Sections) < 3 {
			t.Errorf("%s has %d sections", m.Name, len(m.Sections))
		}
		params, err := v.ModuleParameters(m)
		if err != nil {
			t.Error(err)
		}
		for _, p := range params {
			file := "/sys/module/" + m.Name + "/parameters/" + p.Name
			if said, ok := values[m.Name][file]; p.Perm != 0 && ok && strings.TrimSuffix(said, "\n") != p.Value && p.Type != "" {
				t.Errorf("%s = %q (%s); sysfs has %q", file, p.Value, p.Type, said)
			} else if ok != (p.Perm&0o444 != 0) {
				t.Errorf("%s with permissions %o: sysfs has it: %v", file, p.Perm, ok)
			} else if ok && p.Type != "" {
				parameters++
			}
			delete(values[m.Name], file)
		}
		if len(values[m.Name]) > 0 {
			t.Errorf("%s lacks the parameters %q", m.Name, values[m.Name])
		}
	}
	if lines != len(got) || lines < 4 {
		t.Errorf("%d modules; the guest has %d", len(got), lines)
	}
	if parameters < 3 {
		t.Errorf("%d parameters were compared", parameters)
	}
}

func testInterfaces(t *testing.T, g *guest, img *Image) {
	var want []struct {
		Name, MAC, State, Flags string
		Index, MTU              int
		Addresses               []string
		Counters                map[string]uint64
	}
	g.ask(&want, "interfaces")
	v := g.frozenView(img)
	got := gather(t, v, v.Interfaces())
	if len(got) != len(want) || len(got) < 3 {
		t.Fatalf("%d interfaces; the guest has %d", len(got), len(want))
	}
	counted := 0
	for i, w := range want {
		n := got[i]
		addresses := []string{}
		for _, a := range n.Addresses {
			addresses = append(addresses, a.String())
		}
		flags, _ := strconv.ParseUint(w.Flags, 0, 64)
		mac := n.MAC
		if fmt.Sprint(n.Name, n.Index, n.MTU, n.State, mac, n.Flags, addresses) != fmt.Sprint(w.Name, w.Index, w.MTU, w.State, w.MAC, flags, w.Addresses) || !n.Init {
			t.Errorf("interface %+v; the guest has %+v", n, w)
		}
		if n.Counters == nil {
			continue
		}
		counted++
		c := n.Counters
		for name, got := range map[string]uint64{"rx_packets": c.RxPackets, "rx_bytes": c.RxBytes, "rx_errors": c.RxErrors, "rx_dropped": c.RxDropped,
			"tx_packets": c.TxPackets, "tx_bytes": c.TxBytes, "tx_errors": c.TxErrors, "tx_dropped": c.TxDropped} {
			if got < w.Counters[name] || got > w.Counters[name]+w.Counters[name]/10+1000 {
				t.Errorf("%s %s = %d; the guest has %d", n.Name, name, got, w.Counters[name])
			}
		}
	}
	if counted == 0 {
		t.Error("no interface has counters")
	}
	if eth := got[slices.IndexFunc(got, func(i Interface) bool { return i.Name == "eth0" })]; eth.Driver != "virtio_net" || eth.Device == "" || eth.PermanentMAC == "" {
		t.Errorf("eth0 = %+v", eth)
	}
}

func testFiles(t *testing.T, g *guest, img *Image) {
	want := make(map[string]string)
	for _, pattern := range []string{"fd/*", "cwd", "root", "exe"} {
		var links map[string]string
		g.ask(&links, "links /proc/[0-9]*/"+pattern)
		maps.Copy(want, links)
	}
	v := g.frozenView(img)
	got := make(map[string]string)
	sockets := 0
	for _, f := range gather(t, v, v.OpenFiles(0)) {
		name := fmt.Sprintf("/proc/%d/%s", f.PID, f.FD)
		if _, err := strconv.Atoi(f.FD); err == nil {
			name = fmt.Sprintf("/proc/%d/fd/%s", f.PID, f.FD)
		}
		got[name] = f.Path
		if f.Sock != 0 {
			sockets++
		}
	}
	for name, path := range want {
		if got[name] != path {
			t.Errorf("%s is %q; the guest says %q", name, got[name], path)
		}
	}
	if len(got) < len(want) || len(got) > len(want)+1 || len(want) < 30 || sockets < 10 {
		t.Errorf("%d files, %d of them sockets; the guest has %d", len(got), sockets, len(want))
	}
	for _, err := range v.OpenFiles(4000000) {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("files of no process: %v", err)
		}
	}
}

func testMounts(t *testing.T, g *guest, img *Image) {
	info := g.read("/proc/1/mountinfo")
	v := g.frozenView(img)
	got := make(map[int]Mount)
	for _, m := range gather(t, v, v.Mounts(1)) {
		got[m.ID] = m
	}
	lines := 0
	escape := strings.NewReplacer(" ", `\040`)
	for line := range strings.Lines(info) {
		// 23 1 0:20 / /run rw,relatime shared:1 - tmpfs tmpfs rw,size=1m
		f := strings.Fields(line)
		dash := slices.Index(f, "-")
		id, _ := strconv.Atoi(f[0])
		m := got[id]
		lines++
		super, _, _ := strings.Cut(f[dash+3], ",")
		have := []string{strconv.Itoa(m.Parent), m.Dev, escape.Replace(m.Root), escape.Replace(m.Path), m.Options, m.FS, m.Source, m.Super}
		want := []string{f[1], f[2], f[3], f[4], f[5], f[dash+1], f[dash+2], super}
		if !slices.Equal(have, want) {
			t.Errorf("mount %d = %q; mountinfo has %q", id, have, want)
		}
	}
	if lines < 7 || len(got) != lines {
		t.Errorf("%d mounts; the guest has %d", len(got), lines)
	}
}

func testSockets(t *testing.T, g *guest, img *Image) {
	var want []string
	for _, protocol := range []string{"tcp", "tcp6", "udp", "udp6"} {
		for line := range strings.Lines(g.read("/proc/net/" + protocol)) {
			f := strings.Fields(line)
			if f[0] != "sl" {
				want = append(want, strings.Join([]string{protocol, f[1], f[2], f[3], f[4], f[7], f[9]}, " "))
			}
		}
	}
	for line := range strings.Lines(g.read("/proc/net/unix")) {
		// Num RefCount Protocol Flags Type St Inode Path
		if f := append(strings.Fields(line), ""); f[0] != "Num" {
			want = append(want, strings.Join([]string{"unix", f[3], f[4], f[5], f[6], f[7]}, " "))
		}
	}
	number := map[string]int{}
	for i, s := range tcpStates {
		number[s] = i
	}
	types := map[string]int{"stream": 1, "dgram": 2, "seqpacket": 5}
	v := g.frozenView(img)
	var got []string
	owned, others := 0, 0
	for _, s := range gather(t, v, v.Sockets()) {
		if len(s.Owners) > 0 {
			owned++
			if s.Owners[0].PID != 1 {
				t.Errorf("%+v is not of PID 1", s)
			}
		}
		switch s.Protocol {
		case "unix":
			flags, state := 0, 3
			switch s.State {
			case "LISTEN":
				flags, state = 0x10000, 1
			case "UNCONN":
				state = 1
			}
			if s.Inode == 0 { // SS_CONNECTING and SS_DISCONNECTING
				state = map[int]int{3: 2, 1: 4}[state]
			}
			got = append(got, fmt.Sprintf("unix %08X %04X %02X %d %s", flags, types[s.Type], state, s.Inode, s.Path))
		case "tcp", "tcp6", "udp", "udp6":
			send := s.SendQ
			if s.State == "LISTEN" {
				send = 0
			}
			state := number[s.State]
			got = append(got, fmt.Sprintf("%s %s %s %02X %08X:%08X %d %d", s.Protocol, procAddress(s.Local), procAddress(s.Remote), state, send, s.RecvQ, s.UID, s.Inode))
		default:
			others++
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-the guest says, +got\n%s", d)
	}
	if len(want) < 15 || owned < 14 || others == 0 {
		t.Errorf("%d sockets, %d of processes, %d of other families", len(want), owned, others)
	}
}

// procAddress writes an address as /proc/net/tcp does: words of the machine.
func procAddress(a netip.AddrPort) string {
	var s strings.Builder
	for b := a.Addr().AsSlice(); len(b) > 0; b = b[4:] {
		fmt.Fprintf(&s, "%08X", le32(b))
	}
	return fmt.Sprintf("%s:%04X", s.String(), a.Port())
}

func testSlabs(t *testing.T, g *guest, img *Image) {
	info := g.read("/proc/slabinfo")
	v := g.frozenView(img)
	got := make(map[string]SlabCache)
	for _, c := range gather(t, v, v.SlabCaches()) {
		got[c.Name] = c
	}
	lines := 0
	for line := range strings.Lines(info) {
		// name <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables 0 0 0 : slabdata <active> <num> 0
		f := strings.Fields(line)
		if len(f) < 16 || f[0] == "#" {
			continue
		}
		lines++
		c := got[f[0]]
		size, _ := strconv.ParseUint(f[3], 10, 64)
		objects, _ := strconv.ParseUint(f[2], 10, 64)
		slack := objects/10 + 100 + c.PerSlab // they come and go by whole slabs
		if c.Size != size || strconv.FormatUint(c.PerSlab, 10) != f[4] || c.Objects < objects-min(objects, slack) || c.Objects > objects+slack {
			t.Errorf("%+v; slabinfo has %s", c, line)
		}
	}
	if lines < 50 || len(got) < lines {
		t.Errorf("%d slab caches; the guest has %d", len(got), lines)
	}
}

// about tells whether two amounts are alike: counters move, and each CPU holds back some.
func about(got, want, slack uint64) bool { return got <= want+slack && want <= got+slack }

func testMemory(t *testing.T, g *guest, img *Image) {
	meminfo, vmstat, zones, buddies := g.read("/proc/meminfo"), g.read("/proc/vmstat"), g.read("/proc/zoneinfo"), g.read("/proc/buddyinfo")
	pressure := g.read("/proc/pressure/memory")
	perNode := make(map[int]string)
	online := strings.TrimSpace(g.read("/sys/devices/system/node/online"))
	_, last, _ := strings.Cut(online, "-") // "0", or "0-1"
	highest, _ := strconv.Atoi(last)
	if img.Info().Arch == "x86_64" && strings.HasPrefix(img.Info().Release, "6.1.") && !strings.Contains(img.Info().Release, "cloud") && highest == 0 {
		t.Error("the kernel is built to make two nodes, and has one")
	}
	for i := range highest + 1 {
		perNode[i] = g.read(fmt.Sprintf("/sys/devices/system/node/node%d/vmstat", i))
	}
	v := g.frozenView(img)
	began := time.Now()
	m, err := v.MemoryUse()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%v, %+v", time.Since(began), v.Cost())
	kib := make(map[string]uint64)
	for line := range strings.Lines(meminfo) {
		f := strings.Fields(line)
		n, _ := strconv.ParseUint(f[1], 10, 64)
		kib[strings.TrimSuffix(f[0], ":")] = n
	}
	for name, got := range map[string]uint64{"MemTotal": m.Total, "MemFree": m.Free, "MemAvailable": m.Available, "AnonPages": m.Anonymous,
		"Shmem": m.Shared, "Dirty": m.Dirty, "Slab": m.Slab, "KernelStack": m.Stacks, "PageTables": m.Tables, "SwapTotal": m.SwapTotal, "SwapFree": m.SwapFree} {
		slack := uint64(8 << 20) // a guest that is being asked is not at rest
		if strings.HasPrefix(name, "Swap") && img.lacking {
			if !m.SwapUnknown || got != 0 {
				t.Errorf("%s = %d of a kernel that does not name it", name, got)
			}
			continue
		}
		if name == "MemTotal" {
			slack = 0
		}
		if !about(got, kib[name]<<10, slack) {
			t.Errorf("%s = %d KiB; the guest has %d", name, got>>10, kib[name])
		}
	}
	counters, page := 0, img.pageSize
	for line := range strings.Lines(vmstat) {
		f := strings.Fields(line)
		want, _ := strconv.ParseUint(f[1], 10, 64)
		got, ok := m.Counters.Get(f[0])
		if !ok {
			if !strings.HasPrefix(f[0], "numa_") && !strings.Contains(f[0], "threshold") && !strings.HasPrefix(f[0], "nr_memmap") && f[0] != "nr_unstable" {
				t.Errorf("no counter %s", f[0])
			}
			continue
		}
		counters++
		if !about(got, want, want/5+500) {
			t.Errorf("%s = %d; the guest has %d", f[0], got, want)
		}
	}
	if counters < 100 {
		t.Errorf("%d counters", counters)
	}
	for _, z := range m.Zones {
		want := fmt.Sprintf("Node %d, zone %8s", z.Node, z.Name)
		_, text, ok := strings.Cut(zones, want+"\n")
		if !ok {
			t.Errorf("the guest has no %s", want)
			continue
		}
		n := make(map[string]uint64)
		for line := range strings.Lines(text) {
			if f := strings.Fields(line); len(f) == 2 && n[f[0]] == 0 {
				n[f[0]], _ = strconv.ParseUint(f[1], 10, 64)
			} else if f[0] == "Node" {
				break
			}
		}
		if z.Min/page != n["min"] || z.Low/page != n["low"] || z.High/page != n["high"] || z.Present/page != n["present"] || z.Managed/page != n["managed"] {
			t.Errorf("%+v; the guest has %v", z, n)
		}
		_, text, _ = strings.Cut(buddies, want)
		text, _, _ = strings.Cut(text, "\n")
		blocks := strings.Fields(text)
		if len(blocks) != len(z.Buddies) {
			t.Errorf("%s: %d orders of blocks; the guest has %d", z.Name, len(z.Buddies), len(blocks))
			continue
		}
		for i, b := range blocks {
			if want, _ := strconv.ParseUint(b, 10, 64); !about(z.Buddies[i], want, want/2+50) {
				t.Errorf("%s: %d blocks of order %d; the guest has %d", z.Name, z.Buddies[i], i, want)
			}
		}
	}
	if len(m.Nodes) != highest+1 {
		t.Errorf("%d nodes; the guest has %q", len(m.Nodes), online)
	}
	for i, node := range m.Nodes {
		if node.Node != i {
			t.Errorf("node %d is the one of index %d", node.Node, i)
		}
		for line := range strings.Lines(perNode[node.Node]) {
			f := strings.Fields(line)
			want, _ := strconv.ParseUint(f[1], 10, 64)
			got, ok := node.Counters.Get(f[0])
			if !ok && !strings.HasPrefix(f[0], "numa_") || ok && !about(got, want, want/5+500) {
				t.Errorf("node %d: %s = %d; the guest has %d", node.Node, f[0], got, want)
			}
		}
	}
	if want := map[string]int{"x86_64": 2, "aarch64": 1}[img.Info().Arch]; len(m.Zones) < want {
		t.Errorf("zones %+v", m.Zones)
	}
	var total uint64
	some, _, _ := strings.Cut(pressure, "\n")
	if n, _ := fmt.Sscanf(some[strings.LastIndex(some, "total=")+6:], "%d", &total); n != 1 == (m.Pressure != nil) {
		t.Errorf("pressure %+v; the guest has %q", m.Pressure, pressure)
	}
	if m.Pressure != nil && !about(m.Pressure.Memory.Some.Total/1000, total, 100000) {
		t.Errorf("memory pressure %+v; the guest has %q", m.Pressure.Memory, pressure)
	}
	t.Logf("pressure %q", pressure)
}

func testLoad(t *testing.T, g *guest, img *Image) {
	loadavg := g.read("/proc/loadavg")
	v := g.frozenView(img)
	l, err := v.Load()
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range strings.Fields(loadavg)[:3] {
		if want, _ := strconv.ParseFloat(f, 64); l.Averages[i] < want-0.5 || l.Averages[i] > want+0.5 {
			t.Errorf("load %v; the guest has %s", l.Averages, loadavg)
		}
	}
	if len(l.Queues) != 2 || l.Queues[0].Switches == 0 || l.Queues[0].Running > 100 || l.Queues[1].CPU != 1 {
		t.Errorf("run queues %+v", l.Queues)
	}
}

// testUsage compares the sample of what may run out with what the guest says of itself.
func testUsage(t *testing.T, g *guest, img *Image) {
	loadavg := g.read("/proc/loadavg")
	stat, files, pidMax, maxThreads := g.read("/proc/stat"), g.read("/proc/sys/fs/file-nr"), g.read("/proc/sys/kernel/pid_max"), g.read("/proc/sys/kernel/threads-max")
	v := g.frozenView(img)
	u, err := v.Usage()
	if img.lacking { // total_forks is named nowhere
		if !errors.Is(err, ErrNotSupported) {
			t.Errorf("Usage = %+v, %v; want ErrNotSupported", u, err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	m, err := v.MemoryUse()
	if err != nil {
		t.Fatal(err)
	}
	number := func(s string) uint64 {
		n, err := strconv.ParseUint(strings.Fields(s)[0], 10, 64)
		if err != nil {
			t.Errorf("the guest says %q: %v", s, err)
		}
		return n
	}
	_, forks, _ := strings.Cut(stat, "\nprocesses ")
	_, threads, _ := strings.Cut(strings.Fields(loadavg)[3], "/")
	kills, _ := m.Counters.Get("oom_kill")
	var stalls uint64
	for _, c := range m.Counters {
		if strings.HasPrefix(c.Name, "allocstall_") {
			stalls += c.Value
		}
	}
	for _, x := range []struct {
		what             string
		got, want, slack uint64
	}{
		{"forks", u.Forks, number(forks), 2},
		{"threads", uint64(u.Threads), number(threads), 2},
		{"max threads", uint64(u.MaxThreads), number(maxThreads), 0},
		{"max PIDs", uint64(u.MaxPIDs), number(pidMax), 0},
		{"open files", u.Files, number(files), 128},
		{"max files", u.MaxFiles, number(strings.Fields(files)[2]), 0},
		{"total", u.Total, m.Total, 0},
		{"free", u.Free, m.Free, 1 << 20},
		{"available", u.Available, m.Available, m.Total / 20},
		{"stalls", u.Stalls, stalls, 0},
		{"kills", u.OOMKills, kills, 0},
	} {
		if !about(x.got, x.want, x.slack) {
			t.Errorf("%s: %d; want %d ± %d", x.what, x.got, x.want, x.slack)
		}
	}
	if u.PIDs < u.Threads/2 || u.PIDs > 2*u.Threads || u.Slab == 0 || u.Slab > u.Total/4 {
		t.Errorf("usage %+v", u)
	}
}

func testStacks(t *testing.T, g *guest, img *Image) {
	var want map[string]string
	g.ask(&want, "stacks")
	v := g.frozenView(img)
	sched, err := img.Symbol("__sched_text_start")
	if err != nil {
		t.Fatal(err)
	}
	schedEnd, err := img.Symbol("__sched_text_end")
	if err != nil {
		t.Fatal(err)
	}
	same, longest := 0, 0
	began := time.Now()
	for _, task := range gather(t, v, v.Tasks()) {
		if task.OnCPU || task.State == "Z" {
			continue
		}
		s, err := v.Stack(task.PID)
		if err != nil {
			t.Errorf("PID %d: %v", task.PID, err)
			continue
		}
		switches, text, ok := strings.Cut(want[strconv.Itoa(task.PID)], "\n")
		if !ok || switches != strconv.FormatUint(task.Switches, 10) {
			continue // it has run since
		}
		var got []string
		for _, f := range s.Frames {
			if f.Addr >= sched && f.Addr < schedEnd {
				continue // the kernel does not tell that a sleeper sleeps
			}
			line := fmt.Sprintf("[<0>] %s+%#x", f.Symbol, f.Offset)
			if f.Module != "" {
				line += " [" + f.Module + "]"
			}
			got = append(got, line)
		}
		var lines []string
		for line := range strings.Lines(text) {
			// [<0>] do_select+0x73e/0x8d0 [module]
			f := strings.Fields(line)
			name, _, _ := strings.Cut(f[1], "/")
			lines = append(lines, strings.Join(append([]string{f[0], name}, f[2:]...), " "))
		}
		if d := cmp.Diff(lines, got); d != "" || !s.Complete {
			t.Errorf("PID %d %s: complete %v %s: -the guest says, +got\n%s", task.PID, task.Comm, s.Complete, s.Why, d)
			continue
		}
		same++
		longest = max(longest, len(got))
	}
	t.Logf("%d stacks are the same, the longest of %d frames, %v", same, longest, time.Since(began))
	if same < 20 || longest < 5 {
		t.Errorf("%d stacks of at most %d frames were compared", same, longest)
	}
}

func testPrint(t *testing.T, g *guest, img *Image) {
	v := img.View(t.Context())
	at, err := img.Symbol("init_task")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	task, err := v.Print("struct task_struct", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d members in %v", len(task.Parts), time.Since(began))
	part := func(val Value, name string) Value {
		i := slices.IndexFunc(val.Parts, func(p Value) bool { return p.Name == name })
		if i < 0 {
			t.Fatalf("%s has no %s", val.Type, name)
		}
		return val.Parts[i]
	}
	f, err := img.Field("task_struct", "comm")
	if err != nil {
		t.Fatal(err)
	}
	if comm := part(task, "comm"); comm.Text != `"swapper/0"` || comm.Offset != f.Offset || comm.Type != "char[16]" {
		t.Errorf("comm = %+v", comm)
	}
	if pid := part(task, "pid"); pid.Text != "0" || pid.Type != "pid_t" {
		t.Errorf("pid = %+v", pid)
	}
	if parent := part(task, "real_parent"); !strings.HasSuffix(parent.Text, " init_task") {
		t.Errorf("real_parent = %+v", parent)
	}
	if next := part(part(task, "tasks"), "next"); !strings.HasPrefix(next.Text, "0xff") {
		t.Errorf("tasks.next = %+v", next)
	}
	if where, err := v.Locate(at + 8); err != nil || where.Symbol != "init_task" || where.Offset != 8 {
		t.Errorf("Locate(init_task+8) = %+v, %v", where, err)
	}
	if _, err := v.Print("no_such_type", at); !errors.Is(err, ErrNotFound) {
		t.Errorf("Print of no type: %v", err)
	}
	// Symbols of modules, as the kernel says them.
	checked := 0
	var symbols string
	g.ask(&symbols, "modulesyms")
	for line := range strings.Lines(symbols) {
		f := strings.Fields(line) // address type name [module]
		if len(f) < 4 || f[1] != "t" && f[1] != "T" || strings.HasPrefix(f[2], "__") || checked > 50 {
			continue
		}
		va, _ := strconv.ParseUint(f[0], 16, 64)
		where, err := v.Locate(VirtAddr(va))
		if err != nil || "["+where.Module+"]" != f[3] || where.Offset != 0 {
			t.Errorf("Locate(%s) = %+v, %v; the guest has %s", f[0], where, err, line)
		}
		checked++
	}
	if checked == 0 {
		t.Error("no symbol of a module was looked up")
	}
}
