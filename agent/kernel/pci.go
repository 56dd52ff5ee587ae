package kernel

import (
	"errors"
	"fmt"
	"iter"
)

// PCIDevice is a function of a device on a PCI bus (struct pci_dev, include/linux/pci.h).
type PCIDevice struct {
	Addr      VirtAddr `json:"addr"`
	Name      string   `json:"name"` // domain:bus:device.function, "0000:00:1f.2"
	Vendor    uint16   `json:"vendor"`
	Device    uint16   `json:"device"`
	SubVendor uint16   `json:"subVendor"`
	SubDevice uint16   `json:"subDevice"`
	Class     uint32   `json:"class"` // base class, sub-class, programming interface: 0x010601 is AHCI
	Revision  uint8    `json:"revision"`
	Virtual   bool     `json:"virtual,omitempty"` // a virtual function (SR-IOV)
	Driver    string   `json:"driver,omitempty"`  // that serves it; empty if none does
}

const (
	maxPCIBuses   = 1 << 14
	maxPCIDevices = 1 << 16
	maxPCIName    = 32
)

// PCIDevices lists the functions on all PCI buses as the kernel has found them, bus by bus. It is ErrNotSupported of a kernel without PCI.
func (v *View) PCIDevices() iter.Seq2[PCIDevice, error] {
	return settled(v, "walk PCI buses", func() ([]PCIDevice, error) {
		root, err := v.img.syms.symbol("pci_root_buses") // drivers/pci/probe.c
		if errors.Is(err, ErrNotFound) {
			return nil, fmt.Errorf("PCI is not built in: %w", ErrNotSupported)
		}
		if err != nil {
			return nil, err
		}
		r := resolver{img: v.img}
		bus := r.shape("pci_bus", "number", "node[]", "children[]", "devices[]")
		dev := r.shape("pci_dev", "bus_list[]", "bus", "devfn", "vendor", "device", "subsystem_vendor", "subsystem_device", "class", "revision", "is_virtfn?",
			"dev.kobj.name", "dev.driver")
		driver := r.shape("device_driver", "name")
		if r.err != nil {
			return nil, r.err
		}
		var all []PCIDevice
		var buses []VirtAddr
		seen := make(map[VirtAddr]bool)
		add := func(at VirtAddr) error {
			if seen[at] || len(seen) >= maxPCIBuses {
				return &CorruptError{"pci_bus", at, fmt.Sprintf("is met twice, or is one of more than %d", maxPCIBuses)}
			}
			seen[at] = true
			buses = append(buses, at)
			return nil
		}
		if err := v.list("pci_bus", root, bus.offset("node"), maxPCIBuses, add); err != nil {
			return nil, err
		}
		for len(buses) > 0 {
			b, err := v.thing(bus, buses[0])
			if err != nil {
				return all, err
			}
			buses = buses[1:]
			err = v.list("pci_dev", b.at("devices"), dev.offset("bus_list"), maxPCIDevices-len(all), func(at VirtAddr) error {
				d, err := v.pciDevice(dev, driver, at, &b)
				all = append(all, d)
				return err
			})
			if err == nil {
				err = v.list("pci_bus", b.at("children"), bus.offset("node"), maxPCIBuses, add)
			}
			if err != nil {
				return all, err
			}
		}
		return all, nil
	})
}

func (v *View) pciDevice(dev, driver *shape, at VirtAddr, bus *thing) (d PCIDevice, err error) {
	t, err := v.thing(dev, at)
	if err != nil {
		return d, err
	}
	d = PCIDevice{Addr: at, Vendor: uint16(t.num("vendor")), Device: uint16(t.num("device")), SubVendor: uint16(t.num("subsystem_vendor")),
		SubDevice: uint16(t.num("subsystem_device")), Class: uint32(t.num("class")), Revision: uint8(t.num("revision")), Virtual: t.num("is_virtfn") != 0}
	if d.Name, err = v.cstring("pci_dev", t.ptr("dev.kobj.name"), maxPCIName); err != nil {
		return d, err
	}
	// pci_setup_device (drivers/pci/probe.c) has made the name of the same numbers.
	number, devfn := bus.num("number")&0xff, t.num("devfn")&0xff
	if want := fmt.Sprintf(":%02x:%02x.%d", number, devfn>>3, devfn&7); t.ptr("bus") != bus.addr() || len(d.Name) <= len(want) || d.Name[len(d.Name)-len(want):] != want {
		return d, t.corrupt("it is called %q, and is function %#x on the bus at %v, which is number %#x", d.Name, devfn, t.ptr("bus"), number)
	}
	if p := t.ptr("dev.driver"); p != 0 {
		dr, err := v.thing(driver, p)
		if err != nil {
			return d, err
		}
		if d.Driver, err = v.cstring("device_driver", dr.ptr("name"), 256); err != nil {
			return d, err
		}
	}
	return d, nil
}
