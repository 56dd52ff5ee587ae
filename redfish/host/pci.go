package host

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const pciURI = "/redfish/v1/Chassis/1/PCIeDevices"

// slot is a device on the host's PCI buses with its functions. Its makers and its name are not in the host's memory.
type slot struct {
	id        string // "0000-00-1f": domain, bus, device
	functions []kernel.PCIDevice
}

func (s slot) uri() string { return pciURI + "/" + s.id }

// slots gathers the functions of each device, in the order in which the kernel has them.
func (w Hardware) slots() (all []slot) {
	at := make(map[string]int)
	for _, f := range w.PCI {
		id, _, ok := splitPCI(f.Name)
		if !ok {
			continue // on a bus that names its devices in a way of its own
		}
		if _, ok := at[id]; !ok {
			at[id] = len(all)
			all = append(all, slot{id: id})
		}
		i := at[id]
		all[i].functions = append(all[i].functions, f)
	}
	return all
}

// splitPCI cuts "0000:00:1f.2" into the device's Id, "0000-00-1f", and the number of its function.
func splitPCI(name string) (device string, function int, ok bool) {
	device, number, ok := strings.Cut(name, ".")
	var domain, bus, dev uint32
	if n, err := fmt.Sscanf(device, "%x:%x:%x", &domain, &bus, &dev); n != 3 || err != nil || !ok {
		return "", 0, false
	}
	function, err := strconv.Atoi(number)
	return fmt.Sprintf("%04x-%02x-%02x", domain, bus, dev), function, err == nil && function >= 0 && function < 8 && bus < 256 && dev < 32
}

// slot finds the device that a request is about.
func (h *host) slot(r *service.Request) (slot, error) {
	for _, s := range h.look(r.Context()).slots() {
		if s.id == r.Param("device") {
			return s, nil
		}
	}
	return slot{}, service.ErrNotFound
}

// pciRoutes are the devices on the host's PCI buses, as its kernel has found them.
func (h *host) pciRoutes() []service.Route {
	return []service.Route{
		{
			URI: pciURI, Type: schema.TypePCIeDeviceCollection, Name: "PCI devices of the host",
			Members: func(r *service.Request) (ids []string, err error) {
				for _, s := range h.look(r.Context()).slots() {
					ids = append(ids, s.id)
				}
				return ids, nil
			},
		},
		{
			URI: pciURI + "/{device}", Type: schema.TypePCIeDevice,
			Get: func(r *service.Request) (schema.Object, error) {
				s, err := h.slot(r)
				if err != nil {
					return nil, err
				}
				kind := "SingleFunction"
				if len(s.functions) > 1 {
					kind = "MultiFunction"
				}
				return &schema.PCIeDevice{
					Resource: schema.Resource{Name: "PCI device " + strings.ReplaceAll(s.id, "-", ":")}, DeviceType: kind,
					Functions: schema.LinkTo(s.uri() + "/PCIeFunctions"), Status: &schema.Status{State: schema.StateEnabled},
				}, nil
			},
		},
		{
			URI: pciURI + "/{device}/PCIeFunctions", Type: schema.TypePCIeFunctionCollection, Name: "Functions of a PCI device",
			Members: func(r *service.Request) (ids []string, err error) {
				s, err := h.slot(r)
				for _, f := range s.functions {
					_, n, _ := splitPCI(f.Name)
					ids = append(ids, strconv.Itoa(n))
				}
				return ids, err
			},
		},
		{
			URI: pciURI + "/{device}/PCIeFunctions/{function}", Type: schema.TypePCIeFunction,
			Get: func(r *service.Request) (schema.Object, error) {
				s, err := h.slot(r)
				for _, f := range s.functions {
					if _, n, _ := splitPCI(f.Name); strconv.Itoa(n) == r.Param("function") {
						return pciFunction(s, f, n), nil
					}
				}
				if err == nil {
					err = service.ErrNotFound
				}
				return nil, err
			},
		},
	}
}

// deviceClasses are Redfish's names of PCI's base classes, by their codes (PCI Code and ID Assignment Specification, revision 1.15, section 1).
var deviceClasses = map[uint32]string{
	0x00: "UnclassifiedDevice", 0x01: "MassStorageController", 0x02: "NetworkController", 0x03: "DisplayController", 0x04: "MultimediaController",
	0x05: "MemoryController", 0x06: "Bridge", 0x07: "CommunicationController", 0x08: "GenericSystemPeripheral", 0x09: "InputDeviceController",
	0x0a: "DockingStation", 0x0b: "Processor", 0x0c: "SerialBusController", 0x0d: "WirelessController", 0x0e: "IntelligentController",
	0x0f: "SatelliteCommunicationsController", 0x10: "EncryptionController", 0x11: "SignalProcessingController", 0x12: "ProcessingAccelerators",
	0x13: "NonEssentialInstrumentation", 0x40: "Coprocessor", 0xff: "UnassignedClass",
}

// pciFunction describes function n of a device.
func pciFunction(s slot, f kernel.PCIDevice, n int) *schema.PCIeFunction {
	out := &schema.PCIeFunction{
		Resource: schema.Resource{Name: "PCI function " + f.Name}, FunctionID: n, FunctionType: "Physical", DeviceClass: deviceClasses[f.Class>>16],
		ClassCode: fmt.Sprintf("0x%06x", f.Class), VendorID: fmt.Sprintf("0x%04x", f.Vendor), DeviceID: fmt.Sprintf("0x%04x", f.Device),
		RevisionID: fmt.Sprintf("0x%02x", f.Revision), Status: &schema.Status{State: schema.StateEnabled},
		Links: &schema.PCIeFunctionLinks{Device: schema.LinkTo(s.uri())},
	}
	if f.Virtual {
		out.FunctionType = "Virtual"
	}
	if f.SubVendor != 0 {
		out.SubsystemVendorID, out.SubsystemID = fmt.Sprintf("0x%04x", f.SubVendor), fmt.Sprintf("0x%04x", f.SubDevice)
	}
	out.Description = "No driver of the host serves it"
	if f.Driver != "" {
		out.Description = "The host's driver " + f.Driver + " serves it"
	}
	return out
}
