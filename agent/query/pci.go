package query

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// PCI is the answer to "what is on the host's PCI buses?".
type PCI struct {
	Extent
	Devices []kernel.PCIDevice `json:"devices"`
}

// AskPCI lists the functions of PCI devices.
func AskPCI(ctx context.Context, v *kernel.View, _ []string) (PCI, error) {
	return pci(ctx, v.PCIDevices())
}

func pci(ctx context.Context, seq iter.Seq2[kernel.PCIDevice, error]) (a PCI, err error) {
	a.Devices, err = gather(ctx, &a.Extent, seq)
	if errors.Is(err, kernel.ErrNotSupported) {
		a.Devices, err = []kernel.PCIDevice{}, nil // no PCI: nothing is on its buses
	}
	return a, err
}

// pciClasses are the base classes (PCI Code and ID Assignment Specification, revision 1.15, section 1).
var pciClasses = [...]string{
	"unclassified", "mass storage", "network", "display", "multimedia", "memory", "bridge", "communication", "system peripheral", "input", "docking station",
	"processor", "serial bus", "wireless", "intelligent", "satellite", "encryption", "signal processing", "accelerator", "instrumentation",
}

// Text prints a table in the manner of lspci -nn. No names of makers and products: those are not in the host's memory.
func (a PCI) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"SLOT", "CLASS", "", "ID", "REV", "SUBSYSTEM", "DRIVER"}}
	for _, d := range a.Devices {
		class, sub := "", ""
		if n := d.Class >> 16; n < uint32(len(pciClasses)) {
			class = pciClasses[n]
		}
		if d.SubVendor != 0 {
			sub = fmt.Sprintf("%04x:%04x", d.SubVendor, d.SubDevice)
		}
		rows = append(rows, []string{Clean(d.Name), fmt.Sprintf("%06x", d.Class), class, fmt.Sprintf("%04x:%04x", d.Vendor, d.Device), fmt.Sprintf("%02x", d.Revision), sub, Clean(d.Driver)})
	}
	p.table("<<<<<<<", rows)
	p.extent(a.Extent)
	return p.err
}
