package host

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// DIMM is a memory slot of the host, as its kernel has noted it from the firmware's tables (SMBIOS, section 7.18).
type DIMM struct {
	ID      string // by its place in the tables
	Locator string // "DIMM 0"
	Bank    string
	Bytes   uint64 // zero if nothing is in it
	Type    uint8  // SMBIOS, section 7.18.2
	Handle  uint16 // of its entry in the tables
}

// eccOf returns what the kernel counts of a module. The drivers of memory controllers seldom know which entry of the firmware's
// tables a module is: it is the one whose handle they name (ghes_edac), or the only one whose locator is on the label, which userland
// may set (rasdaemon, edac-ctl). What is of no module for certain is in the counts of the whole memory alone.
func (w Hardware) eccOf(d DIMM) (counts schema.MemoryPeriod, ok bool) {
	for _, c := range w.Controllers {
		for _, m := range c.Modules { // ranks of one module share its label
			if m.Handle != 0 && m.Handle == d.Handle || m.Handle == 0 && w.labelled(m.Label) == d.ID {
				counts.Correctable += m.Correctable
				counts.Uncorrectable += m.Uncorrectable
				ok = true
			}
		}
	}
	return counts, ok && d.Bytes > 0
}

// labelled returns the ID of the only module that a label can mean; "" if there is none, or are several.
func (w Hardware) labelled(label string) (id string) {
	for _, d := range w.DIMMs {
		if label == d.Locator || label == d.Bank+" "+d.Locator {
			if id != "" {
				return ""
			}
			id = d.ID
		}
	}
	return id
}

// Firmware is what the firmware's tables say of the host as a whole.
type Firmware struct{ Vendor, Product, BIOSVersion string }

const (
	maxDIMMs      = 1024
	maxDMIString  = 64
	unknownMemory = 1<<64 - 1 // dmi_scan.c: the firmware does not know
)

// deviceTypes are the SMBIOS types that Redfish has a name for.
var deviceTypes = map[uint8]string{0x12: "DDR", 0x13: "DDR2", 0x18: "DDR3", 0x1a: "DDR4", 0x1e: "LPDDR4_SDRAM", 0x20: "HBM", 0x21: "HBM2", 0x22: "DDR5", 0x23: "LPDDR5_SDRAM"}

// readDIMMs reads dmi_memdev[dmi_memdev_nr] of drivers/firmware/dmi_scan.c (struct dmi_memdev_info).
func readDIMMs(v *kernel.View) ([]DIMM, error) {
	img := v.Image()
	var at [2]uint64
	for i, name := range []string{"dmi_memdev", "dmi_memdev_nr"} {
		va, err := img.Symbol(name)
		if err != nil {
			return nil, err
		}
		if at[i], err = v.Uint64(va); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
	}
	count := at[1] & 0xffffffff // an int
	if at[0] == 0 || count > maxDIMMs {
		return nil, fmt.Errorf("%d memory devices at %#x: %w", count, at[0], kernel.ErrNotFound)
	}
	size, err := img.Sizeof("dmi_memdev_info")
	if err != nil {
		return nil, err
	}
	if size > 256 {
		return nil, fmt.Errorf("struct dmi_memdev_info has %d bytes: %w", size, kernel.ErrNotSupported)
	}
	var f [5]kernel.Field
	for i, name := range []string{"device", "bank", "size", "type", "handle"} {
		if f[i], err = img.Field("dmi_memdev_info", name); err != nil {
			return nil, err
		}
		if f[i].Offset+f[i].Size > size || i < 3 && f[i].Size != 8 {
			return nil, fmt.Errorf("dmi_memdev_info.%s lies outside of its structure: %w", name, kernel.ErrNotSupported)
		}
	}
	le := func(b []byte, f kernel.Field) (n uint64) {
		for i, c := range b[f.Offset : f.Offset+f.Size] {
			n |= uint64(c) << (8 * i)
		}
		return n
	}
	var out []DIMM
	b := make([]byte, size)
	for i := range count {
		if err := v.ReadVirt(kernel.VirtAddr(at[0]+i*size), b); err != nil {
			return nil, fmt.Errorf("read memory device %d: %w", i, err)
		}
		d := DIMM{ID: fmt.Sprintf("dimm%d", i), Locator: dmiString(v, le(b, f[0])), Bank: dmiString(v, le(b, f[1])), Bytes: le(b, f[2]), Type: uint8(le(b, f[3])), Handle: uint16(le(b, f[4]))}
		if d.Bytes == unknownMemory || d.Locator == "" {
			continue
		}
		out = append(out, d)
	}
	return out, nil
}

// readFirmware reads dmi_ident of drivers/firmware/dmi_scan.c.
func readFirmware(v *kernel.View) (f Firmware) {
	va, err := v.Image().Symbol("dmi_ident")
	if err != nil {
		return f
	}
	for name, to := range map[string]*string{"DMI_SYS_VENDOR": &f.Vendor, "DMI_PRODUCT_NAME": &f.Product, "DMI_BIOS_VERSION": &f.BIOSVersion} {
		n, err := v.Image().Enum("dmi_field", name)
		if err != nil || n < 0 || n > 100 {
			continue
		}
		if p, err := v.Uint64(va + kernel.VirtAddr(8*n)); err == nil {
			*to = dmiString(v, p)
		}
	}
	return f
}

// dmiString reads a string of the firmware's tables, or nothing.
func dmiString(v *kernel.View, p uint64) string {
	if p == 0 {
		return ""
	}
	b := make([]byte, maxDMIString)
	// It may end right before what is not mapped.
	for len(b) > 1 && v.ReadVirt(kernel.VirtAddr(p), b) != nil {
		b = b[:len(b)/2]
	}
	text, _, ended := bytes.Cut(b, []byte{0})
	if !ended || bytes.ContainsFunc(text, func(c rune) bool { return c < ' ' || c > '~' }) {
		return ""
	}
	return string(bytes.TrimSpace(text))
}

const summaryMetricsURI = systemURI + "/MemorySummary/MemoryMetrics"

// memoryRoutes are the host's memory modules, with metrics where the host's kernel counts errors. A module with errors that could not
// be corrected is not well; that of one whose errors nobody counts cannot be told.
func (h *host) memoryRoutes() []service.Route {
	return []service.Route{
		{
			URI: systemURI + "/Memory", Type: schema.TypeMemoryCollection, Name: "Memory modules",
			Members: func(r *service.Request) (ids []string, err error) {
				for _, d := range h.look(r.Context()).DIMMs {
					ids = append(ids, d.ID)
				}
				return ids, nil
			},
		},
		{
			URI: systemURI + "/Memory/{module}", Type: schema.TypeMemory,
			Get: func(r *service.Request) (schema.Object, error) {
				w := h.look(r.Context())
				d, ok := w.dimm(r.Param("module"))
				if !ok {
					return nil, service.ErrNotFound
				}
				out := &schema.Memory{
					Resource: schema.Resource{Name: d.Locator, Description: d.Bank}, MemoryDeviceType: deviceTypes[d.Type],
					Location: &schema.PhysicalLocation{PartLocation: &schema.PartLocation{ServiceLabel: d.Locator, LocationType: "Slot"}},
					Status:   &schema.Status{State: schema.StateEnabled},
				}
				if d.Bytes == 0 {
					out.Status.State, out.MemoryDeviceType = schema.StateAbsent, ""
					return out, nil
				}
				out.MemoryType = "DRAM"
				mib := int64(d.Bytes >> 20)
				out.CapacityMiB = &mib
				if counts, ok := w.eccOf(d); ok {
					out.Metrics = schema.LinkTo(systemURI + "/Memory/" + d.ID + "/MemoryMetrics")
					out.Status.Health = schema.HealthOK
					if counts.Uncorrectable > 0 {
						out.Status.Health = schema.HealthCritical
					}
				}
				return out, nil
			},
		},
		{
			URI: systemURI + "/Memory/{module}/MemoryMetrics", Type: schema.TypeMemoryMetrics,
			Get: func(r *service.Request) (schema.Object, error) {
				w := h.look(r.Context())
				d, ok := w.dimm(r.Param("module"))
				if !ok {
					return nil, service.ErrNotFound
				}
				counts, ok := w.eccOf(d)
				if !ok {
					return nil, service.ErrNotFound
				}
				return &schema.MemoryMetrics{Resource: schema.Resource{Name: "Errors of " + d.Locator, Description: countedBy}, CurrentPeriod: &counts}, nil
			},
		},
		{
			URI: summaryMetricsURI, Type: schema.TypeMemoryMetrics,
			Get: func(r *service.Request) (schema.Object, error) {
				controllers := h.look(r.Context()).Controllers
				if len(controllers) == 0 {
					return nil, service.ErrNotFound
				}
				var counts schema.MemoryPeriod
				for _, c := range controllers {
					counts.Correctable += c.Correctable
					counts.Uncorrectable += c.Uncorrectable
				}
				return &schema.MemoryMetrics{Resource: schema.Resource{Name: "Errors of all memory", Description: countedBy}, CurrentPeriod: &counts}, nil
			},
		},
	}
}

const countedBy = "What the host's kernel has counted since the driver of the memory controller was loaded or its counters were reset"

func (w Hardware) dimm(id string) (DIMM, bool) {
	i := slices.IndexFunc(w.DIMMs, func(d DIMM) bool { return d.ID == id })
	if i < 0 {
		return DIMM{}, false
	}
	return w.DIMMs[i], true
}
