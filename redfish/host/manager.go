package host

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	managerURI = "/redfish/v1/Managers/bmc"
	cardURI    = "/redfish/v1/Chassis/dpu"
	adapterURI = cardURI + "/NetworkAdapters/nic0"
)

// managerParts are the resources of the machine that the agent itself runs on, as its own kernel tells.
func (h *host) managerParts() []service.Route {
	var usage cpuUsage
	ids := func(list func() []net.Interface) func(*service.Request) ([]string, error) {
		return func(*service.Request) (ids []string, err error) {
			for _, i := range list() {
				ids = append(ids, i.Name)
			}
			return ids, nil
		}
	}
	routes := []service.Route{
		{
			URI: managerURI + "/ManagerDiagnosticData", Type: schema.TypeManagerDiagnosticData,
			Get: func(*service.Request) (schema.Object, error) { return h.diagnostics(&usage), nil },
		},
		{URI: managerURI + "/EthernetInterfaces", Type: schema.TypeEthernetInterfaceCollection, Name: "Ethernet interfaces of the agent", Members: ids(ownInterfaces)},
		h.configurable(service.Route{URI: managerURI + "/EthernetInterfaces/{interface}", Type: schema.TypeEthernetInterface, Get: h.ownInterface}),
		{URI: cardURI + "/NetworkAdapters", Type: schema.TypeNetworkAdapterCollection, Name: "Network adapters", Members: service.Fixed("nic0")},
		{
			URI: adapterURI, Type: schema.TypeNetworkAdapter,
			Get: func(*service.Request) (schema.Object, error) {
				return &schema.NetworkAdapter{
					Resource:     schema.Resource{Name: "Network adapter of the card"},
					Manufacturer: h.o.Manufacturer, Model: h.o.Model, Ports: schema.LinkTo(adapterURI + "/Ports"),
					Functions: h.linked(adapterURI + "/NetworkDeviceFunctions"),
					Status:    &schema.Status{State: schema.StateEnabled},
				}, nil
			},
		},
		{URI: adapterURI + "/Ports", Type: schema.TypePortCollection, Name: "Ports", Members: ids(h.ports)},
		{URI: adapterURI + "/Ports/{port}", Type: schema.TypePort, Get: h.port},
	}
	if h.o.Datapath != nil {
		routes = append(routes, service.Route{URI: adapterURI + "/Ports/{port}/Metrics", Type: schema.TypePortMetrics, Get: h.portMetrics})
	}
	return routes
}

// read returns a small file of the agent's machine, trimmed, or nothing.
func (h *host) read(elem ...string) string {
	b, err := os.ReadFile(filepath.Join(append([]string{h.o.Root}, elem...)...))
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

func (h *host) diagnostics(usage *cpuUsage) *schema.ManagerDiagnosticData {
	up := math.Round(h.now().Sub(h.started).Seconds())
	return &schema.ManagerDiagnosticData{
		Resource:                 schema.Resource{Name: "State of the agent's machine"},
		MemoryStatistics:         parseMeminfo(h.read("proc/meminfo")),
		ProcessorStatistics:      usage.share(h.read("proc/stat")),
		FreeStorageSpaceKiB:      freeKiB(h.o.DumpDir),
		ServiceRootUptimeSeconds: &up,
		TopProcesses:             h.topProcesses(),
	}
}

const (
	topProcesses = 5
	maxProcesses = 4096 // that are looked at
	maxCommand   = 256  // bytes of a command line
)

// topProcesses are the processes of the agent's machine that hold most memory, the largest first.
func (h *host) topProcesses() []schema.ProcessStatistics {
	type process struct {
		pid string
		schema.ProcessStatistics
	}
	dir, err := os.Open(filepath.Join(h.o.Root, "proc"))
	if err != nil {
		return nil
	}
	names, _ := dir.Readdirnames(maxProcesses)
	dir.Close()
	var all []process
	for _, pid := range names {
		if pid[0] < '1' || pid[0] > '9' {
			continue
		}
		if s, ok := parseProcess(h.read("proc", pid, "stat")); ok && s.ResidentSetSizeBytes > 0 { // else it is a thread of the kernel, or has ended
			all = append(all, process{pid, s})
		}
	}
	slices.SortFunc(all, func(a, b process) int { return cmp.Compare(b.ResidentSetSizeBytes, a.ResidentSetSizeBytes) })
	var out []schema.ProcessStatistics
	for _, p := range all[:min(len(all), topProcesses)] {
		line := strings.TrimRight(strings.ReplaceAll(h.read("proc", p.pid, "cmdline"), "\x00", " "), " ")
		if line != "" {
			p.CommandLine = strings.ToValidUTF8(line[:min(len(line), maxCommand)], "?")
		}
		out = append(out, p.ProcessStatistics)
	}
	return out
}

// parseProcess reads proc_pid_stat(5); the name stands for the command line.
func parseProcess(text string) (s schema.ProcessStatistics, ok bool) {
	const hz = 100 // USER_HZ
	begin, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if begin < 0 || end < begin {
		return s, false
	}
	f := strings.Fields(text[end+1:]) // from the state on, which is the third field
	if len(f) < 22 {
		return s, false
	}
	var n [3]uint64
	for i, field := range []int{14, 15, 24} { // utime, stime, rss
		var err error
		if n[i], err = strconv.ParseUint(f[field-3], 10, 48); err != nil {
			return s, false
		}
	}
	return schema.ProcessStatistics{
		CommandLine: strings.ToValidUTF8(text[begin+1:end], "?"), ResidentSetSizeBytes: int64(n[2]) * int64(os.Getpagesize()),
		UserTimeSeconds: float64(n[0]) / hz, KernelTimeSeconds: float64(n[1]) / hz,
	}, true
}

// freeKiB is the free space of the file system that holds dir or, before dir has been made, its parent.
func freeKiB(dir string) *int64 {
	if dir == "" {
		return nil
	}
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) != nil && unix.Statfs(filepath.Dir(dir), &s) != nil {
		return nil
	}
	n := int64(s.Bavail) * int64(s.Bsize) >> 10
	return &n
}

// parseMeminfo reads proc_meminfo(5), as free(1) does; nil if a part is missing.
func parseMeminfo(text string) *schema.MemoryStatistics {
	values := map[string]int64{}
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		if n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64); err == nil && n >= 0 && n < 1<<50 {
			values[name] = n << 10
		}
	}
	for _, name := range []string{"MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "Shmem", "SReclaimable"} {
		if _, ok := values[name]; !ok {
			return nil
		}
	}
	return &schema.MemoryStatistics{
		TotalBytes: values["MemTotal"], FreeBytes: values["MemFree"], AvailableBytes: values["MemAvailable"], SharedBytes: values["Shmem"],
		UsedBytes:            max(0, values["MemTotal"]-values["MemAvailable"]),
		BuffersAndCacheBytes: values["Buffers"] + values["Cached"] + values["SReclaimable"],
	}
}

// cpuUsage works out the shares of the time between two looks at /proc/stat; between the first and the machine's start.
type cpuUsage struct {
	mu   sync.Mutex
	last [3]uint64 // user, kernel, all, in ticks; guarded by mu
	at   time.Time
	know *schema.ProcessorStatistics
}

// usageSpan is the shortest time to measure over.
const usageSpan = time.Second

func (u *cpuUsage) share(stat string) *schema.ProcessorStatistics {
	now, ok := parseStat(stat)
	if !ok {
		return nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.know != nil && time.Since(u.at) < usageSpan || now[2] <= u.last[2] {
		return u.know
	}
	percent := func(i int) float64 {
		return math.Round(1000*float64(now[i]-min(now[i], u.last[i]))/float64(now[2]-u.last[2])) / 10
	}
	u.know = &schema.ProcessorStatistics{UserPercent: percent(0), KernelPercent: percent(1)}
	u.last, u.at = now, time.Now()
	return u.know
}

// parseStat reads the first line of proc_stat(5): user, kernel (with interrupts) and all ticks.
func parseStat(text string) (ticks [3]uint64, ok bool) {
	line, _, _ := strings.Cut(text, "\n")
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return ticks, false
	}
	for i, f := range fields[1:min(len(fields), 9)] { // guest time, behind that, is in user time already
		n, err := strconv.ParseUint(f, 10, 48)
		if err != nil {
			return ticks, false
		}
		switch i {
		case 0, 1: // user, nice
			ticks[0] += n
		case 2, 5, 6: // system, irq, softirq
			ticks[1] += n
		}
		ticks[2] += n
	}
	return ticks, true
}

// ownInterfaces are the Ethernet interfaces of the agent's machine.
func ownInterfaces() []net.Interface {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(all, func(i net.Interface) bool {
		const macLen = 6
		return i.Flags&(net.FlagLoopback|net.FlagPointToPoint) != 0 || len(i.HardwareAddr) != macLen
	})
}

// ports are those of them that a device carries.
func (h *host) ports() []net.Interface {
	return slices.DeleteFunc(ownInterfaces(), func(i net.Interface) bool {
		_, err := os.Stat(filepath.Join(h.o.Root, "sys/class/net", i.Name, "device"))
		return err != nil
	})
}

func named(all []net.Interface, name string) (net.Interface, bool) {
	i := slices.IndexFunc(all, func(i net.Interface) bool { return i.Name == name })
	if i < 0 {
		return net.Interface{}, false
	}
	return all[i], true
}

// speed is the link's speed in Mbit/s, if its driver knows; virtual ones say -1.
func (h *host) speed(name string) (int, bool) {
	n, err := strconv.Atoi(h.read("sys/class/net", name, "speed"))
	return n, err == nil && n > 0
}

// linkStatus tells whether an interface has a link, and how well it is.
func linkStatus(i net.Interface) (string, *schema.Status) {
	switch {
	case i.Flags&net.FlagUp == 0:
		return "LinkDown", &schema.Status{State: schema.StateDisabled, Health: schema.HealthOK}
	case i.Flags&net.FlagRunning == 0:
		return "LinkDown", &schema.Status{State: schema.StateEnabled, Health: schema.HealthWarning}
	}
	return "LinkUp", &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK}
}

func (h *host) ownInterface(r *service.Request) (schema.Object, error) {
	i, ok := named(ownInterfaces(), r.Param("interface"))
	if !ok {
		return nil, service.ErrNotFound
	}
	up := i.Flags&net.FlagUp != 0
	out := &schema.EthernetInterface{
		Resource:   schema.Resource{Name: i.Name, Description: "A network interface of the machine that the agent runs on"},
		MACAddress: i.HardwareAddr.String(), MTUSize: i.MTU, InterfaceEnabled: &up,
	}
	out.LinkStatus, out.Status = linkStatus(i)
	if mbps, ok := h.speed(i.Name); ok {
		out.SpeedMbps = &mbps
	}
	if name, err := os.Hostname(); err == nil {
		out.HostName = name
		if short, _, ok := strings.Cut(name, "."); ok {
			out.HostName, out.FQDN = short, &name
		}
	}
	out.NameServers = []string{}
	for line := range strings.Lines(h.read("etc/resolv.conf")) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "nameserver" {
			out.NameServers = append(out.NameServers, f[1])
		}
	}
	all, err := i.Addrs()
	if err != nil {
		return nil, fmt.Errorf("addresses of %s: %w", i.Name, err)
	}
	var prefixes []netip.Prefix
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			prefixes = append(prefixes, p)
		}
	}
	out.IPv4Addresses, out.IPv6Addresses = addresses(prefixes)
	h.settings(i.Name, out)
	return out, nil
}

func (h *host) port(r *service.Request) (schema.Object, error) {
	i, ok := named(h.ports(), r.Param("port"))
	if !ok {
		return nil, service.ErrNotFound
	}
	up := i.Flags&net.FlagUp != 0
	out := &schema.Port{
		Resource: schema.Resource{Name: i.Name}, PortID: i.Name, PortProtocol: "Ethernet", InterfaceEnabled: &up, MaxFrameSize: i.MTU,
		Ethernet: &schema.PortEthernet{AssociatedMACAddresses: []string{i.HardwareAddr.String()}}, Metrics: h.metered(i.Name),
	}
	out.LinkStatus, out.Status = linkStatus(i)
	if mbps, ok := h.speed(i.Name); ok {
		gbps := float64(mbps) / 1000
		out.CurrentSpeedGbps = &gbps
	}
	return out, nil
}
