package tests

import (
	"context"
	"fmt"
	"maps"
	"net"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/host"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
	"github.com/backdoor-rhs/backdoor/tests/guest"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

// TestMemoryErrors has an engine look at a kernel whose EDAC core counts errors, which a module tells it of, and compares what the
// Redfish service says with what that kernel itself shows in sysfs.
func TestMemoryErrors(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a kernel in QEMU: not with -short")
	}
	const release = "6.1-generic" // the cloud flavour is built without EDAC
	g := guest.Start(t, release, guest.Options{Files: map[string][]byte{"bdedac.ko": guest.Module(t, release, filepath.Join("guest", "edac"), "bdedac")}})
	c := serveHost(t, g)
	list := func() (m query.MemoryErrors) {
		t.Helper()
		got := struct{ Answer *query.MemoryErrors }{&m}
		if err := c.Get(t.Context(), client.ListingURI("MemoryErrors"), &got); err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m := list(); m.Counted || !m.Complete || len(m.Controllers) > 0 {
		t.Fatalf("without a driver there is %+v", m)
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
	m := list()
	for _, c := range m.Controllers {
		mc := fmt.Sprintf("mc%d", c.Index)
		got = append(got, fmt.Sprintln(mc, c.Name, c.Correctable, c.Uncorrectable, c.CorrectableUnplaced, c.UncorrectableUnplaced))
		for _, m := range c.Modules {
			got = append(got, fmt.Sprintln(mc, fmt.Sprintf("dimm%d", m.Index), m.Label, []string{"channel", strconv.Itoa(m.Location[0]), "slot", strconv.Itoa(m.Location[1])},
				m.Bytes>>20, map[string]string{"rddr4": "Registered-DDR4"}[m.Type], m.Correctable, m.Uncorrectable))
		}
		if c.Driver != "bdedac" || c.PerRank || c.Since < 0 || c.Since > time.Hour {
			t.Errorf("controller %+v", c)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) || !m.Counted || !m.Ill() {
		t.Errorf("the service says\n%s\nthe host's kernel\n%s", strings.Join(got, ""), strings.Join(want, ""))
	}
	if len(got) != 8 || !strings.Contains(strings.Join(got, ""), "mc0 by hand 5 3 1 1") {
		t.Errorf("there is %q", got)
	}

	// The standard resources: of all memory, and of the one module that QEMU's tables have, by its handle there.
	s, err := c.System(t.Context())
	for end := time.Now().Add(time.Minute); err == nil && (s.MemorySummary == nil || s.MemorySummary.Metrics == nil) && time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		s, err = c.System(t.Context()) // what the host is made of is not looked at each time
	}
	if err != nil || s.MemorySummary == nil || s.MemorySummary.Metrics == nil || s.Memory == nil {
		t.Fatalf("no metrics of the memory: %v, %+v", err, s.MemorySummary)
	}
	metrics := func(uri string) schema.MemoryPeriod {
		t.Helper()
		var m schema.MemoryMetrics
		if err := c.Get(t.Context(), uri, &m); err != nil || m.CurrentPeriod == nil {
			t.Fatalf("%s: %v", uri, err)
		}
		return *m.CurrentPeriod
	}
	number := func(file ...string) (n uint64) {
		t.Helper()
		n, err := strconv.ParseUint(cat(file...), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	all := schema.MemoryPeriod{
		Correctable: number(sysfs, "mc0/ce_count") + number(sysfs, "mc1/ce_count"), Uncorrectable: number(sysfs, "mc0/ue_count") + number(sysfs, "mc1/ue_count"),
	}
	if got := metrics(s.MemorySummary.Metrics.ID); got != all {
		t.Errorf("all memory: %+v; the kernel says %+v", got, all)
	}
	for module, err := range client.Members[schema.Memory](t.Context(), c, s.Memory.ID) {
		if err != nil || module.Metrics == nil {
			t.Fatalf("module %+v: %v", module, err)
		}
		want := schema.MemoryPeriod{Correctable: number(sysfs, "mc0/dimm0/dimm_ce_count"), Uncorrectable: number(sysfs, "mc0/dimm0/dimm_ue_count")}
		if got := metrics(module.Metrics.ID); got != want || module.Status.Health != schema.HealthOK {
			t.Errorf("%s: %+v, health %s; the kernel says %+v", module.ID, got, module.Status.Health, want)
		}
	}

	// The detectors, by the counts that the kernel shows: what lost data, and what does not yet fail.
	lostData := map[string]bool{}
	for _, mc := range m.Controllers {
		at := fmt.Sprintf("mc%d", mc.Index)
		lostData[at] = number(sysfs, at, "ue_noinfo_count") > 0
		for _, d := range mc.Modules {
			lostData[fmt.Sprintf("%s/dimm%d", at, d.Index)] = number(sysfs, at, fmt.Sprintf("dimm%d", d.Index), "dimm_ue_count") > 0
		}
	}
	maps.DeleteFunc(lostData, func(_ string, lost bool) bool { return !lost })
	waitHardware(t, c, lostData)
	// Another module has twelve errors corrected, of which ten within a day are too many.
	const failing = "mc0/dimm3"
	for range 11 {
		g.Ask("write /proc/bdedac ce 3", "written", &done)
	}
	lostData[failing] = false
	waitHardware(t, c, lostData)
}

// waitHardware waits until the findings about the hardware are those: the keys of parts of the memory, and whether they have lost data.
func waitHardware(t *testing.T, c *client.Client, want map[string]bool) {
	t.Helper()
	agent := operator.Agent{Client: c}
	var got map[string]bool
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		all, err := agent.Findings(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got = map[string]bool{}
		for _, f := range all {
			if f.Kind == detect.KindHardware && f.Resolved == nil {
				got[f.Key] = f.Severity == detect.Critical
			}
		}
		if maps.Equal(got, want) {
			return
		}
	}
	t.Errorf("the findings about the hardware are %v; want %v", got, want)
}

// serveHost serves a guest as an agent does that may look, and no more.
func serveHost(t *testing.T, g *guest.Guest) *client.Client {
	t.Helper()
	e := engine.New(engine.Options{Memory: func(context.Context) (hostmem.Memory, error) {
		return hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), false)
	}})
	ctx, cancel := context.WithCancel(context.Background())
	events, ran := e.Subscribe(ctx), make(chan error, 2)
	go func() { ran <- e.Run(ctx) }()
	late := time.After(2 * time.Minute)
	for attached := false; !attached; {
		select {
		case ev := <-events:
			attached = ev.Type == engine.EventAttached
		case <-late:
			t.Fatalf("not attached: %+v", e.State())
		}
	}
	who := service.Credential{User: "root", Password: "correct horse battery"}
	o := service.Options{Account: &who, Limits: service.Limits{Hash: service.HashCost{Memory: 64, Passes: 1}}}
	host.Configure(&o)
	s, err := service.New(o)
	if err != nil {
		t.Fatal(err)
	}
	s.Handle(host.Routes(s, host.Options{Agent: e, Version: "1.0.0"})...)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { ran <- s.Serve(ctx, l) }()
	c, err := client.New(client.Config{URL: l.Addr().String(), User: who.User, Password: who.Password, Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close(context.Background())
		cancel()
		<-ran
		<-ran
	})
	return c
}
