package kernel_test

import (
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

// TestMemoryControllers compares the counters of a kernel's EDAC core, which a module feeds, with what that kernel shows of them.
func TestMemoryControllers(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a kernel in QEMU: not with -short")
	}
	const release = "6.1-generic" // the cloud flavour is built without EDAC
	g := guest.Start(t, release, guest.Options{Files: map[string][]byte{
		"bdedac.ko": guest.Module(t, release, filepath.Join("..", "..", "tests", "guest", "edac"), "bdedac"),
	}})
	img, err := kernel.Open(t.Context(), g.Memory(false), kernel.Options{})
	if err != nil {
		t.Fatal(err)
	}
	list := func() (all []kernel.MemoryController) {
		t.Helper()
		for c, err := range img.View(t.Context()).MemoryControllers() {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, c)
		}
		return all
	}
	if all := list(); len(all) != 0 {
		t.Fatalf("without a driver there is %+v", all)
	}
	var done string
	g.Ask("load bdedac.ko", "loaded", &done)
	for _, event := range []string{"ce 0", "ce 0", "ce 3", "ue 2", "ce 0", "ce -1", "ue -1", "ue 2"} {
		g.Ask("write /proc/bdedac "+event, "written", &done)
	}
	cat := func(file ...string) (text string) {
		t.Helper()
		g.Ask("cat "+path.Join(file...), "text", &text)
		return strings.TrimSpace(text)
	}
	const sysfs = "/sys/devices/system/edac/mc"
	var want, got []string
	for _, mc := range strings.Fields(cat(sysfs)) {
		if !strings.HasPrefix(mc, "mc") {
			continue
		}
		at := path.Join(sysfs, mc)
		want = append(want, fmt.Sprintln(mc, cat(at, "mc_name"), cat(at, "ce_count"), cat(at, "ue_count"), cat(at, "ce_noinfo_count"), cat(at, "ue_noinfo_count")))
		for _, dimm := range strings.Fields(cat(at)) {
			if strings.HasPrefix(dimm, "dimm") {
				at := path.Join(at, dimm)
				want = append(want, fmt.Sprintln(mc, dimm, cat(at, "dimm_label"), strings.Fields(cat(at, "dimm_location")), cat(at, "size"),
					cat(at, "dimm_mem_type"), cat(at, "dimm_ce_count"), cat(at, "dimm_ue_count")))
			}
		}
	}
	for _, c := range list() {
		mc := fmt.Sprintf("mc%d", c.Index)
		got = append(got, fmt.Sprintln(mc, c.Name, c.Correctable, c.Uncorrectable, c.CorrectableUnplaced, c.UncorrectableUnplaced))
		for _, m := range c.Modules {
			got = append(got, fmt.Sprintln(mc, fmt.Sprintf("dimm%d", m.Index), m.Label, []string{"channel", fmt.Sprint(m.Location[0]), "slot", fmt.Sprint(m.Location[1])},
				m.Bytes>>20, map[string]string{"rddr4": "Registered-DDR4"}[m.Type], m.Correctable, m.Uncorrectable))
		}
		if c.Driver != "bdedac" || c.PerRank || c.Since < 0 {
			t.Errorf("controller %+v", c)
		}
		if m := c.Modules[0]; c.Index == 0 && m.Handle != 0x1100 || c.Index == 1 && m.Handle != 0 {
			t.Errorf("handle %#x", m.Handle)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("the memory says\n%s\nthe kernel\n%s", strings.Join(got, ""), strings.Join(want, ""))
	}
	if len(got) != 8 || !strings.Contains(strings.Join(got, ""), "mc0 by hand 5 3 1 1") {
		t.Errorf("there is %q", got)
	}
}
