package kernel

import (
	"errors"
	"fmt"
	"iter"
	"time"
)

// MemoryController is a memory controller whose errors the kernel counts (EDAC; struct mem_ctl_info, include/linux/edac.h). Counts are
// since Since, when its driver began or somebody has set them to zero.
type MemoryController struct {
	Index         int           `json:"index"`  // the N of /sys/devices/system/edac/mc/mcN
	Name          string        `json:"name"`   // ctl_name
	Driver        string        `json:"driver"` // mod_name
	Since         time.Duration `json:"since"`  // how long it has counted
	Correctable   uint64        `json:"correctable"`
	Uncorrectable uint64        `json:"uncorrectable"`
	// Of these, how many the driver could not tell the place of.
	CorrectableUnplaced   uint64 `json:"correctableUnplaced"`
	UncorrectableUnplaced uint64 `json:"uncorrectableUnplaced"`
	// PerRank says that what follows are ranks, of which a module has one or more (csbased).
	PerRank bool         `json:"perRank,omitempty"`
	Modules []ECCCounter `json:"modules"`
}

// ECCCounter is what a controller's driver counts of one memory module, or of a rank of one (struct dimm_info).
type ECCCounter struct {
	Index    int    `json:"index"` // the N of dimmN or rankN in sysfs
	Label    string `json:"label"` // as the driver or userland has named it
	Location []int  `json:"location"`
	Bytes    uint64 `json:"bytes"`
	Type     string `json:"type"` // ddr4, rddr4, …
	// Handle is that of its entry in the firmware's tables (SMBIOS type 17), zero if the driver does not know.
	Handle        uint16 `json:"handle,omitempty"`
	Correctable   uint64 `json:"correctable"`
	Uncorrectable uint64 `json:"uncorrectable"`
}

const (
	maxControllers = 1 << 10
	maxECCModules  = 1 << 14 // of one controller
	maxECCName     = 256
)

// MemoryControllers lists the memory controllers whose errors the kernel counts. It is ErrNotSupported if the kernel is built
// without EDAC; no controller means that there is no driver for what the machine has, as in most virtual machines.
func (v *View) MemoryControllers() iter.Seq2[MemoryController, error] {
	return settled(v, "walk memory controllers", func() ([]MemoryController, error) {
		head, err := v.img.syms.symbol("mc_devices") // drivers/edac/edac_mc.c
		if errors.Is(err, ErrNotFound) {
			return nil, fmt.Errorf("EDAC is not built in: %w", ErrNotSupported)
		}
		if err != nil {
			return nil, err
		}
		r := resolver{img: v.img}
		mc := r.shape("mem_ctl_info", "link[]", "mc_idx", "n_layers", "csbased", "tot_dimms", "dimms", "mod_name", "ctl_name", "start_time",
			"ce_noinfo_count", "ue_noinfo_count", "ce_mc", "ue_mc")
		// The counters are in dimm_info since Linux 5.7.
		dimm := r.shape("dimm_info", "label[]", "location[]", "mci", "idx", "mtype", "nr_pages", "smbios_handle?", "ce_count", "ue_count")
		if r.err != nil {
			return nil, r.err
		}
		jiffies, hz, err := v.jiffies()
		if err != nil {
			return nil, err
		}
		var all []MemoryController
		err = v.list("mem_ctl_info", head, mc.offset("link"), maxControllers, func(at VirtAddr) error {
			c, err := v.memoryController(mc, dimm, at)
			if err != nil {
				return err
			}
			t, err := v.thing(mc, at)
			if err != nil {
				return err
			}
			if begun := t.num("start_time"); jiffies > begun {
				c.Since = time.Duration(jiffies-begun) * time.Second / time.Duration(hz)
			}
			all = append(all, c)
			return nil
		})
		return all, err
	})
}

func (v *View) memoryController(mc, dimm *shape, at VirtAddr) (c MemoryController, err error) {
	t, err := v.thing(mc, at)
	if err != nil {
		return c, err
	}
	c = MemoryController{Index: t.int("mc_idx"), PerRank: t.num("csbased") != 0, Modules: []ECCCounter{},
		Correctable: t.num("ce_mc"), Uncorrectable: t.num("ue_mc"),
		CorrectableUnplaced: t.num("ce_noinfo_count"), UncorrectableUnplaced: t.num("ue_noinfo_count")}
	layers, count := t.num("n_layers"), t.num("tot_dimms")
	if c.Index < 0 || count > maxECCModules || layers == 0 || 4*layers > dimm.fields["location"].Size {
		return c, t.corrupt("controller %d with %d modules in %d layers", c.Index, count, layers)
	}
	for path, to := range map[string]*string{"ctl_name": &c.Name, "mod_name": &c.Driver} {
		if p := t.ptr(path); p != 0 {
			if *to, err = v.cstring("mem_ctl_info", p, maxECCName); err != nil {
				return c, err
			}
		}
	}
	list, err := v.pointers("mem_ctl_info", t.ptr("dimms"), int(count))
	if err != nil {
		return c, err
	}
	for i, p := range list {
		d, err := v.thing(dimm, p)
		if err != nil {
			return c, err
		}
		if d.ptr("mci") != at || d.int("idx") != i {
			return c, d.corrupt("module %d of the controller at %v says that it is %d of that at %v", i, at, d.int("idx"), d.ptr("mci"))
		}
		if d.num("nr_pages") == 0 {
			continue // nothing is in it: sysfs does not show it either
		}
		m := ECCCounter{Index: i, Label: d.text("label"), Bytes: d.num("nr_pages") * v.img.pageSize, Handle: uint16(d.num("smbios_handle")),
			Correctable: d.num("ce_count"), Uncorrectable: d.num("ue_count")}
		if m.Handle == 0xffff { // so says ghes_edac of what it does not know
			m.Handle = 0
		}
		for b := d.bytes("location"); uint64(len(m.Location)) < layers; b = b[4:] {
			m.Location = append(m.Location, int(le32(b)))
		}
		if m.Type, err = v.memoryType(d.num("mtype")); err != nil {
			return c, err
		}
		c.Modules = append(c.Modules, m)
	}
	return c, nil
}

// memoryType names a value of enum mem_type: MEM_RDDR4 is rddr4. A value without a name is its number.
func (v *View) memoryType(n uint64) (string, error) {
	name, err := v.img.types.enumName("mem_type", int64(n))
	if errors.Is(err, ErrNotFound) {
		return fmt.Sprint(n), nil
	}
	return lowerName(name, "MEM_"), err
}
