package host

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Hardware is what the host's kernel knows of its machine. What could not be read is empty.
type Hardware struct {
	Processors []kernel.Processor
	Interfaces []kernel.Interface // of the host itself, not of its containers
	HostName   string             // as it is now: at the attach it may not have been set yet
	RAM        []hostmem.Range    // as the kernel uses it: without what the firmware keeps for itself
	DIMMs      []DIMM
	// Controllers are the memory controllers whose errors the kernel counts.
	Controllers []kernel.MemoryController
	Disks       []kernel.Disk // those that are pieces of hardware
	PCI         []kernel.PCIDevice
	Firmware    Firmware
}

const (
	hardwareFresh   = 5 * time.Second
	hardwareStale   = 30 * time.Second
	hardwareTimeout = 10 * time.Second
)

// parts are the resources of what the host is made of and of what runs on it, all read from its memory.
func (h *host) parts() []service.Route {
	return []service.Route{
		{URI: systemURI + "/OperatingSystem", Type: schema.TypeOperatingSystem, Get: h.operatingSystem},
		{
			URI: systemURI + "/Processors", Type: schema.TypeProcessorCollection, Name: "Processors",
			Members: func(r *service.Request) (ids []string, err error) {
				for _, p := range h.look(r.Context()).Processors {
					ids = append(ids, processorID(p))
				}
				return ids, nil
			},
		},
		{
			URI: systemURI + "/SimpleStorage", Type: schema.TypeSimpleStorageCollection, Name: "Storage of the host",
			Members: func(r *service.Request) (ids []string, err error) {
				if len(h.look(r.Context()).Disks) > 0 {
					ids = append(ids, "disks")
				}
				return ids, nil
			},
		},
		{URI: systemURI + "/SimpleStorage/{storage}", Type: schema.TypeSimpleStorage, Get: h.disks},
		{URI: systemURI + "/Processors/{processor}", Type: schema.TypeProcessor, Get: h.processor},
		{
			URI: systemURI + "/EthernetInterfaces", Type: schema.TypeEthernetInterfaceCollection, Name: "Ethernet interfaces of the host",
			Members: func(r *service.Request) (ids []string, err error) {
				for _, i := range h.ethernets(r.Context()) {
					ids = append(ids, interfaceID(i))
				}
				return ids, nil
			},
		},
		{URI: systemURI + "/EthernetInterfaces/{interface}", Type: schema.TypeEthernetInterface, Get: h.ethernet},
	}
}

// look returns what the host is made of, or nothing while it cannot be told. Processors do not go away with the power: those that
// were seen last are shown until others are seen.
func (h *host) look(ctx context.Context) Hardware {
	state := h.o.Agent.State()
	if state.Phase != engine.Attached {
		return Hardware{Processors: h.hardware.last().Processors}
	}
	return h.hardware.get(ctx, h.now, hardwareFresh, hardwareStale, func() Hardware {
		ctx, cancel := context.WithTimeout(context.Background(), hardwareTimeout)
		defer cancel()
		read := h.o.Hardware
		if read == nil {
			read = h.readHardware
		}
		w, err := read(ctx)
		if err != nil {
			return Hardware{}
		}
		return w
	})
}

// readHardware reads each part by itself: one that cannot be read does not hide the others.
func (h *host) readHardware(ctx context.Context) (Hardware, error) {
	v, err := h.o.Agent.View(ctx)
	if err != nil {
		return Hardware{}, err
	}
	w := Hardware{RAM: v.Image().RAM()}
	w.HostName, w.Firmware = nodeName(v), readFirmware(v)
	if list, err := readDIMMs(v); err == nil {
		w.DIMMs = list
	}
	if list, err := query.AskMemoryErrors(ctx, v, nil); err == nil && list.Complete {
		w.Controllers = list.Controllers
	}
	if list, err := v.Processors(); err == nil {
		w.Processors = list
	}
	for d, err := range v.Disks() {
		if err != nil {
			w.Disks = nil
			break
		}
		if isHardware(d) {
			w.Disks = append(w.Disks, d)
		}
	}
	for d, err := range v.PCIDevices() {
		if err != nil {
			w.PCI = nil
			break
		}
		w.PCI = append(w.PCI, d)
	}
	for i, err := range v.Interfaces() {
		if err != nil {
			w.Interfaces = nil
			break
		}
		if i.Init {
			w.Interfaces = append(w.Interfaces, i)
		}
	}
	return w, nil
}

// isHardware tells a disk from what the kernel makes of files, memory and other disks.
func isHardware(d kernel.Disk) bool {
	name := strings.TrimRight(d.Name, "0123456789")
	return d.Size > 0 && !slices.Contains([]string{"loop", "ram", "zram", "nbd", "dm-", "md", "md_d", "drbd", "pmem"}, name)
}

// disks are the host's disks as its kernel has them. Which controller each is at, other resources would tell.
func (h *host) disks(r *service.Request) (schema.Object, error) {
	all := h.look(r.Context()).Disks
	if len(all) == 0 || r.Param("storage") != "disks" {
		return nil, service.ErrNotFound
	}
	out := &schema.SimpleStorage{Resource: schema.Resource{Name: "Disks"}, Status: &schema.Status{State: schema.StateEnabled}}
	for _, d := range all {
		out.Devices = append(out.Devices, schema.StorageDevice{Name: d.Name, CapacityBytes: d.Size, Status: &schema.Status{State: schema.StateEnabled}})
	}
	return out, nil
}

// nodeName reads init_uts_ns.name.nodename, or nothing.
func nodeName(v *kernel.View) string {
	const none = "(none)" // before userland has set one: UTS_NODENAME of include/linux/uts.h
	at, err := v.Image().Symbol("init_uts_ns")
	if err != nil {
		return ""
	}
	f, err := v.Image().Field("uts_namespace", "name.nodename")
	if err != nil || f.Size > 256 {
		return ""
	}
	b := make([]byte, f.Size)
	if v.ReadVirt(at+kernel.VirtAddr(f.Offset), b) != nil {
		return ""
	}
	name, _, ended := bytes.Cut(b, []byte{0})
	if !ended || string(name) == none || bytes.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return ""
	}
	return string(name)
}

// summarize fills in what the system says of its parts.
func (h *host) summarize(ctx context.Context, out *schema.ComputerSystem) {
	w := h.look(ctx)
	if len(w.Processors) > 0 {
		out.Processors = schema.LinkTo(systemURI + "/Processors")
		s := &schema.ProcessorSummary{Count: len(w.Processors), Model: w.Processors[0].Model}
		for _, p := range w.Processors {
			s.CoreCount += p.Cores
			s.LogicalProcessorCount += p.Threads
			if p.Model != s.Model {
				s.Model = "" // there is no one model
			}
		}
		out.ProcessorSummary = s
	}
	if len(w.DIMMs) > 0 {
		out.Memory = schema.LinkTo(systemURI + "/Memory")
	}
	if len(w.Disks) > 0 {
		out.SimpleStorage = schema.LinkTo(systemURI + "/SimpleStorage")
	}
	for _, s := range w.slots() {
		out.PCIeDevices = append(out.PCIeDevices, schema.Link{ID: s.uri()})
	}
	if out.Manufacturer == "" { // the service processor has the last word
		out.Manufacturer, out.Model = w.Firmware.Vendor, cmp.Or(out.Model, w.Firmware.Product)
	}
	out.BIOSVersion = cmp.Or(out.BIOSVersion, w.Firmware.BIOSVersion)
	if len(h.ethernets(ctx)) > 0 {
		out.EthernetIfaces = schema.LinkTo(systemURI + "/EthernetInterfaces")
	}
	var ram uint64
	for _, r := range w.RAM {
		ram += r.Size
	}
	if ram > 0 {
		const milli = 1000
		out.MemorySummary = &schema.MemorySummary{TotalSystemMemoryGiB: math.Round(float64(ram)/(1<<30)*milli) / milli}
		if len(w.Controllers) > 0 {
			out.MemorySummary.Metrics = schema.LinkTo(summaryMetricsURI)
		}
	}
}

func (h *host) operatingSystem(*service.Request) (schema.Object, error) {
	state := h.o.Agent.State()
	k := state.Kernel
	if k == nil || state.Phase != engine.Attached {
		return nil, service.ErrNotFound
	}
	out := &schema.OperatingSystem{
		Resource: schema.Resource{Name: "Operating system", Description: "The host's operating system, as its kernel in memory tells"},
		Type:     "Linux", Kernel: &schema.OSKernel{Name: "Linux", Release: k.Release, Version: utsVersion(k.Banner), Machine: k.Arch},
		Status: &schema.Status{State: schema.StateEnabled, Health: h.status(schema.PowerOn, nil).Health},
	}
	if !k.BootTime.IsZero() && !state.Dead {
		up := int64(h.now().Sub(k.BootTime) / time.Second)
		out.UptimeSeconds = &up
	}
	return out, nil
}

// utsVersion cuts uname -v out of linux_banner, where it is what follows the compiler: "#1 SMP PREEMPT_DYNAMIC …".
func utsVersion(banner string) string {
	if i := strings.LastIndex(banner, ") #"); i >= 0 {
		return strings.TrimSpace(banner[i+2:])
	}
	return ""
}

func processorID(p kernel.Processor) string { return fmt.Sprintf("cpu%d", p.Socket) }

func (h *host) processor(r *service.Request) (schema.Object, error) {
	all := h.look(r.Context()).Processors
	i := slices.IndexFunc(all, func(p kernel.Processor) bool { return processorID(p) == r.Param("processor") })
	if i < 0 {
		return nil, service.ErrNotFound
	}
	p := all[i]
	status := &schema.Status{State: schema.StateEnabled}
	if h.o.Agent.State().Phase != engine.Attached {
		status.State = schema.StateUnavailableOffline
	}
	return &schema.Processor{
		Resource: schema.Resource{Name: fmt.Sprintf("Processor %d", p.Socket)},
		Socket:   strconv.Itoa(p.Socket), ProcessorType: "CPU", ProcessorArchitecture: "x86", InstructionSet: "x86-64",
		Manufacturer: p.Vendor, Model: p.Model, TotalCores: p.Cores, TotalThreads: p.Threads,
		ProcessorID: &schema.ProcessorID{VendorID: p.Vendor, EffectiveFamily: strconv.Itoa(p.Family), EffectiveModel: strconv.Itoa(p.Number)},
		Status:      status,
	}, nil
}

// ethernets are the host's Ethernet interfaces, bridges and the like among them.
func (h *host) ethernets(ctx context.Context) []kernel.Interface {
	const arpEther = 1 // ARPHRD_ETHER, include/uapi/linux/if_arp.h
	return slices.DeleteFunc(slices.Clone(h.look(ctx).Interfaces), func(i kernel.Interface) bool { return i.Type != arpEther })
}

// interfaceID makes an Id of a name, in which Linux allows almost everything.
func interfaceID(i kernel.Interface) string {
	for _, c := range i.Name {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return fmt.Sprintf("if%d", i.Index)
		}
	}
	return i.Name
}

// ethernet is one interface. Its health is a judgement: one that is switched on and has no link is not well; one that nobody has
// switched on lacks nothing.
func (h *host) ethernet(r *service.Request) (schema.Object, error) {
	all := h.ethernets(r.Context())
	n := slices.IndexFunc(all, func(i kernel.Interface) bool { return interfaceID(i) == r.Param("interface") })
	if n < 0 {
		return nil, service.ErrNotFound
	}
	i := all[n]
	const ifUp = 1 // IFF_UP, include/uapi/linux/if.h
	up := i.Flags&ifUp != 0
	out := &schema.EthernetInterface{
		Resource:   schema.Resource{Name: i.Name, Description: strings.TrimSpace(i.Driver + " " + i.Device)},
		MACAddress: cmp.Or(i.MAC, i.PermanentMAC), MTUSize: i.MTU, InterfaceEnabled: &up, LinkStatus: "LinkDown",
		Status: &schema.Status{State: schema.StateDisabled, Health: schema.HealthOK},
	}
	switch {
	case up && i.Carrier:
		out.LinkStatus = "LinkUp"
		out.Status.State = schema.StateEnabled
	case up:
		out.Status = &schema.Status{State: schema.StateEnabled, Health: schema.HealthWarning}
	}
	out.IPv4Addresses, out.IPv6Addresses = addresses(i.Addresses)
	return out, nil
}

// addresses writes addresses as Redfish does. Where they come from, and which gateway serves them, is not known here.
func addresses(all []netip.Prefix) (four []schema.IPv4Address, six []schema.IPv6Address) {
	four, six = []schema.IPv4Address{}, []schema.IPv6Address{} // none is an answer, too
	for _, a := range all {
		if a.Addr().Is4() {
			mask := ^uint32(0) << (32 - a.Bits())
			four = append(four, schema.IPv4Address{
				Address:    a.Addr().String(),
				SubnetMask: netip.AddrFrom4([4]byte{byte(mask >> 24), byte(mask >> 16), byte(mask >> 8), byte(mask)}).String(),
			})
			continue
		}
		six = append(six, schema.IPv6Address{Address: a.Addr().WithZone("").String(), PrefixLength: a.Bits()})
	}
	return four, six
}
