package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/dump"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

func TestParts(t *testing.T) {
	a := newFakeAgent()
	c := connect(t, a)
	s, err := c.System(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := schema.ProcessorSummary{Count: 1, CoreCount: 1, LogicalProcessorCount: 2, Model: "Test CPU"}
	if *s.ProcessorSummary != want || s.MemorySummary.TotalSystemMemoryGiB != 0.5 || s.Manufacturer != "Maker" || s.SerialNumber != "S1" || s.BIOSVersion != "B1" {
		t.Errorf("system = %+v, %+v, %+v", s, s.ProcessorSummary, s.MemorySummary)
	}
	var system schema.OperatingSystem
	if err := c.Get(t.Context(), systemURI+"/OperatingSystem", &system); err != nil || system.Kernel.Release != "6.1.0-18-amd64" || system.Type != "Linux" || *system.UptimeSeconds <= 0 {
		t.Errorf("operating system = %+v, %v", system, err)
	}
	var cpu schema.Processor
	if err := c.Get(t.Context(), s.Processors.ID+"/cpu0", &cpu); err != nil || cpu.TotalThreads != 2 || cpu.Model != "Test CPU" || cpu.ProcessorID.EffectiveModel != "85" {
		t.Errorf("processor = %+v, %v", cpu, err)
	}
	a.mu.Lock()
	a.state.Phase = engine.Lost
	a.mu.Unlock()
	if err := c.Get(t.Context(), s.Processors.ID+"/cpu0", &cpu); err != nil || cpu.Status.State != schema.StateUnavailableOffline {
		t.Errorf("processor of a host that is off = %+v, %v", cpu, err)
	}
	a.mu.Lock()
	a.state.Phase = engine.Attached
	a.mu.Unlock()
	var got []string
	for e, err := range client.Members[schema.EthernetInterface](t.Context(), c, s.EthernetIfaces.ID) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s %s %s %s %s", e.ID, e.MACAddress, e.LinkStatus, e.Status.State, e.Status.Health))
		if e.ID == "eth0" && (len(e.IPv4Addresses) != 1 || e.IPv4Addresses[0].SubnetMask != "255.255.255.0" || len(e.IPv6Addresses) != 1) {
			t.Errorf("addresses of eth0: %+v, %+v", e.IPv4Addresses, e.IPv6Addresses)
		}
	}
	if d := cmp.Diff([]string{
		"eth0 52:54:00:12:34:56 LinkUp Enabled OK", "eth1 52:54:00:12:34:57 LinkDown Enabled Warning", "if4 52:54:00:12:34:58 LinkDown Disabled OK",
	}, got); d != "" {
		t.Errorf("interfaces (-want +got):\n%s", d)
	}
}

func TestResetTypes(t *testing.T) {
	a := newFakeAgent()
	for _, tt := range []struct {
		name   string
		resets []schema.ResetType
		want   int
	}{
		{"silent service processor", nil, 9},
		{"one that has few", []schema.ResetType{"On", "ForceOff", "PowerCycle"}, 4}, // and ForceOn
	} {
		a.controller.resets = tt.resets
		s, err := connect(t, a).System(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Actions["#ComputerSystem.Reset"].Allowable["ResetType"]; len(got) != tt.want {
			t.Errorf("%s: reset types %q; want %d", tt.name, got, tt.want)
		}
	}
}

func TestBootOverride(t *testing.T) {
	a := newFakeAgent()
	c := connect(t, a)
	set := func(boot map[string]string) error {
		return c.Patch(t.Context(), systemURI, map[string]any{"Boot": boot}, nil)
	}
	if err := set(map[string]string{"BootSourceOverrideTarget": "Cd", "BootSourceOverrideEnabled": "Once"}); err != nil {
		t.Fatal(err)
	}
	s, err := c.System(t.Context())
	if err != nil || s.Boot.BootSourceOverrideTarget != "Cd" || s.Boot.BootSourceOverrideEnabled != "Once" || s.Boot.BootSourceOverrideMode != "UEFI" {
		t.Errorf("Boot = %+v, %v", s.Boot, err)
	}
	if want := `boot device: enabled "Once", target "Cd", mode "" by root`; !slices.Contains(a.ops, want) {
		t.Errorf("did %q; want %q", a.ops, want)
	}
	if err := set(map[string]string{"BootSourceOverrideTarget": "Tape"}); err == nil || !strings.Contains(err.Error(), "Tape") {
		t.Errorf("unknown target = %v; want it named", err)
	}
	a.denied = fmt.Errorf("agreement a1: %w", access.ErrDenied)
	if err := set(map[string]string{"BootSourceOverrideTarget": "Pxe"}); err == nil || !strings.Contains(strings.ToLower(err.Error()), "agreement a1") {
		t.Errorf("without the right = %v; want the agreement named", err)
	}
}

func TestVirtualMedia(t *testing.T) {
	a := newFakeAgent()
	c := connect(t, a)
	var drive schema.VirtualMedia
	get := func() schema.VirtualMedia {
		t.Helper()
		drive = schema.VirtualMedia{}
		if err := c.Get(t.Context(), mediaURI+"/Cd", &drive); err != nil {
			t.Fatal(err)
		}
		return drive
	}
	if d := get(); d.ODataID != mediaURI+"/Cd" || *d.Inserted || d.Image != nil {
		t.Errorf("empty drive = %+v", d)
	}
	target := drive.Actions["#VirtualMedia.InsertMedia"].Target
	if _, err := c.Post(t.Context(), target, map[string]any{"Image": "https://u:secret@files/x.iso?token=secret", "WriteProtected": true}, nil); err != nil {
		t.Fatal(err)
	}
	if d := get(); !*d.Inserted || d.Image == nil {
		t.Errorf("drive with an image = %+v", d)
	}
	if text := strings.Join(a.ops, "\n"); !strings.Contains(text, "image https://files/x.iso by") || strings.Contains(text, "secret") {
		t.Errorf("journal: %s; want the image without secrets", text)
	}
	if _, err := c.Post(t.Context(), drive.Actions["#VirtualMedia.EjectMedia"].Target, map[string]any{}, nil); err != nil || *get().Inserted {
		t.Errorf("eject = %v, %+v", err, drive)
	}
	if _, err := c.Post(t.Context(), mediaURI+"/Tape/Actions/VirtualMedia.EjectMedia", map[string]any{}, nil); err == nil {
		t.Error("a drive that is not there was emptied")
	}
}

func TestCollect(t *testing.T) {
	a := newFakeAgent()
	c := connect(t, a)
	var log schema.LogService
	if err := c.Get(t.Context(), dumpURI, &log); err != nil {
		t.Fatal(err)
	}
	if want := []schema.DiagnosticDataDetails{{DiagnosticDataType: "OS"}, {DiagnosticDataType: "OEM", OEMDiagnosticDataType: "Dmesg"}, {DiagnosticDataType: "OEM", OEMDiagnosticDataType: "Recording"}}; !slices.Equal(log.DiagnosticDataDetails, want) {
		t.Errorf("the log service says that it collects %+v; want %+v", log.DiagnosticDataDetails, want)
	}
	collect := func(action string, body map[string]any) (schema.LogEntry, error) {
		t.Helper()
		resp, err := c.Post(t.Context(), log.Actions[action].Target, body, nil)
		if err != nil {
			return schema.LogEntry{}, err
		}
		for monitor := resp.Location; resp.Status == http.StatusAccepted; {
			if resp, err = c.Do(t.Context(), "GET", monitor, nil, nil); err != nil {
				return schema.LogEntry{}, err
			}
		}
		var e schema.LogEntry
		err = c.Get(t.Context(), resp.Location, &e)
		return e, err
	}
	e, err := collect("#LogService.CollectDiagnosticData", map[string]any{"DiagnosticDataType": "OEM", "OEMDiagnosticDataType": "Dmesg"})
	if err != nil || e.OEMDiagnosticDataType != "Dmesg" || e.AdditionalDataSize == 0 || e.AdditionalDataURI == "" {
		t.Fatalf("collect dmesg = %+v, %v", e, err)
	}
	for body, want := range map[string]bool{"0x100000 300000": true, "0x0 16": false, "0x1000 16777216": false, "0x1ffffff0 17": false, "0x1ffffff0 16": true, "nowhere 1": false} {
		var start string
		var length int
		if _, err := fmt.Sscan(body, &start, &length); err != nil {
			t.Fatal(err)
		}
		e, err := collect("#BackdoorLogService.CollectMemoryRange", map[string]any{"Start": start, "Length": length})
		if (err == nil) != want || want && e.AdditionalDataSize != int64(length) {
			t.Errorf("collect %s = %+v, %v; want success: %v", body, e, err, want)
		}
	}
	for finding, size := range map[string]int64{"": int64(len("series of ")), "memory-hog-1": int64(len("series of memory-hog-1"))} {
		r, err := c.CollectRecording(t.Context(), finding, nil)
		if err != nil || r.OEMDiagnosticDataType != "Recording" || r.AdditionalDataSize != size {
			t.Errorf("CollectRecording(%q) = %+v, %v", finding, r, err)
		}
	}
	if _, err := c.CollectRecording(t.Context(), "memory-hog-2", nil); err == nil || !strings.Contains(err.Error(), "memory-hog-2") {
		t.Errorf("CollectRecording of a finding that there is not = %v", err)
	}
	a.denied = access.ErrDenied
	if _, err := collect("#LogService.CollectDiagnosticData", map[string]any{"DiagnosticDataType": "OEM", "OEMDiagnosticDataType": "Dmesg"}); err == nil {
		t.Error("the kernel log was collected without the right to read")
	}
	if err := c.Get(t.Context(), e.AdditionalDataURI, nil); err == nil {
		t.Error("data was sent without the right to read")
	}
	a.denied = nil
	if _, err := c.Post(t.Context(), log.Actions["#LogService.ClearLog"].Target, map[string]any{}, nil); err != nil {
		t.Errorf("clear = %v", err)
	}
	if err := c.Get(t.Context(), e.AdditionalDataURI, nil); err == nil {
		t.Error("data was sent after it was cleared")
	}
}

// flaky is testMemory that cannot be read from an address on until it is mended.
type flaky struct{ from *atomic.Int64 }

func (m flaky) ReadAt(b []byte, off int64) (int, error) {
	if from := m.from.Load(); from != 0 && off+int64(len(b)) > from {
		return 0, &hostmem.FaultError{Op: "read", Addr: hostmem.PhysAddr(from), Len: len(b)}
	}
	return testMemory{}.ReadAt(b, off)
}

// TestCollectCore wants the host's memory as a core for who has the right to all of it, in parts, and of one boot only.
func TestCollectCore(t *testing.T) {
	a := newFakeAgent()
	a.state.Kernel = &kernel.Info{BootID: "one"}
	var bad atomic.Int64
	ram := []hostmem.Range{{Start: 0x1000, Size: 0x9e000}, {Start: 1 << 20, Size: 4 << 20}}
	c, url := connectWith(t, a, func(o *Options) {
		o.Core = func(context.Context) (*dump.Core, error) {
			return dump.New(dump.Source{
				Arch: "aarch64", Memory: flaky{&bad}, RAM: ram, VMCOREINFO: "OSRELEASE=6.1\n",
				Image: kernel.Span{Virt: 0xffff800008000000, Phys: 1 << 20, Size: 1 << 20}, Direct: kernel.Span{Virt: 0xffff000000000000, Size: 1 << 30},
			})
		}
	})
	if _, err := c.CollectCore(t.Context(), nil); status(err) != 403 {
		t.Errorf("an administrator without %s: %v; want 403", PrivilegeMemory, err)
	}
	m := operator(t, c, url, "mem", PrivilegeMemory)
	e, err := m.CollectCore(t.Context(), nil)
	if err != nil || e.DiagnosticDataType != "OS" || e.AdditionalDataSize < 0x49e000 {
		t.Fatalf("CollectCore = %+v, %v", e, err)
	}
	if err := c.Get(t.Context(), e.AdditionalDataURI, nil); status(err) != 403 {
		t.Errorf("download by an administrator without %s: %v; want 403", PrivilegeMemory, err)
	}
	var whole bytes.Buffer
	if n, err := m.Download(t.Context(), e.AdditionalDataURI, &whole); n != e.AdditionalDataSize || err != nil {
		t.Fatalf("Download = %d, %v", n, err)
	}
	want := make([]byte, 4<<20)
	_, _ = testMemory{}.ReadAt(want, 1<<20)
	if got := whole.Bytes(); !bytes.Equal(got[len(got)-len(want):], want) || string(got[:4]) != "\x7fELF" {
		t.Error("the core does not end with the last range of RAM")
	}
	// It breaks off where the memory does, says so, and goes on once that is mended.
	bad.Store(3 << 20)
	var parts bytes.Buffer
	n, err := m.Download(t.Context(), e.AdditionalDataURI, &parts)
	if err == nil || n == 0 || n >= e.AdditionalDataSize {
		t.Errorf("Download of memory that cannot be read = %d, %v", n, err)
	}
	var entry schema.LogEntry
	if err := m.Get(t.Context(), e.ODataID, &entry); err != nil || entry.Severity != schema.HealthWarning || !strings.Contains(entry.Resolution, "0x300000") {
		t.Errorf("the entry = %+v, %v; want the address at which it broke off", entry, err)
	}
	bad.Store(0)
	if _, err := m.Resume(t.Context(), e.AdditionalDataURI, n, &parts); err != nil || !bytes.Equal(parts.Bytes(), whole.Bytes()) {
		t.Errorf("Resume = %d bytes in all, %v", parts.Len(), err)
	}
	a.mu.Lock()
	a.denied = access.ErrDenied
	a.mu.Unlock()
	if _, err := m.Download(t.Context(), e.AdditionalDataURI, io.Discard); status(err) != 403 {
		t.Errorf("without the agreement's right = %v; want 403", err)
	}
	a.mu.Lock()
	a.denied, a.state.Kernel = nil, &kernel.Info{BootID: "two"}
	a.mu.Unlock()
	if _, err := m.Download(t.Context(), e.AdditionalDataURI, io.Discard); status(err) != 410 {
		t.Errorf("after the host's restart = %v; want 410", err)
	}
	for body, want := range map[string]string{
		`{"DiagnosticDataType":"OS","OEMDiagnosticDataType":"Dmesg"}`: "ActionParameterValueConflict",
		`{"DiagnosticDataType":"OEM"}`:                                "ActionParameterMissing",
		`{"DiagnosticDataType":"PreOS"}`:                              "ActionParameterValueNotInList",
	} {
		var e *client.Error
		if _, err := m.Post(t.Context(), dumpURI+"/Actions/LogService.CollectDiagnosticData", json.RawMessage(body), nil); !errors.As(err, &e) || e.Status != 400 || !strings.HasSuffix(e.Messages[0].MessageID, want) {
			t.Errorf("%s = %v; want %s", body, err, want)
		}
	}
}

// TestDumpsAreBounded wants the oldest dumps to give way, and nothing to be left of one that failed or of an earlier run.
func TestDumpsAreBounded(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "old.dump"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := &host{o: Options{Agent: newFakeAgent(), DumpDir: dir}, now: bootTime.Local}
	h.collecting()
	for range maxDumps + 3 {
		if _, err := h.keep(collected{}, func(w io.Writer) error { _, err := io.WriteString(w, "x"); return err }); err != nil {
			t.Fatal(err)
		}
	}
	big := bytes.Repeat([]byte{1}, maxDumpBytes/2)
	for range 3 {
		if _, err := h.keep(collected{}, func(w io.Writer) error { _, err := w.Write(big); return err }); err != nil {
			t.Fatal(err)
		}
	}
	broken := errors.New("broken")
	if _, err := h.keep(collected{}, func(io.Writer) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("keep = %v; want %v", err, broken)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 || len(h.dumps.all) != 2 {
		t.Errorf("%d files, %d known, %v; want the two newest", len(files), len(h.dumps.all), err)
	}
}

func TestMachineParsers(t *testing.T) {
	m := parseMeminfo("MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 400 kB\nBuffers: 1 kB\nCached: 2 kB\nShmem: 3 kB\nSReclaimable: 4 kB\n")
	if m == nil || *m != (schema.MemoryStatistics{TotalBytes: 1000 << 10, UsedBytes: 600 << 10, FreeBytes: 100 << 10, SharedBytes: 3 << 10, BuffersAndCacheBytes: 7 << 10, AvailableBytes: 400 << 10}) {
		t.Errorf("parseMeminfo = %+v", m)
	}
	for _, text := range []string{"", "MemTotal: 1 kB", "MemTotal: -1 kB\n"} {
		if m := parseMeminfo(text); m != nil {
			t.Errorf("parseMeminfo(%q) = %+v; want nothing", text, m)
		}
	}
	const stat = "1 (a) b (c) S 0 1 1 0 -1 4194560 1 2 3 4 1234 56 7 8 20 0 9 0 5 1000000 300 18446744073709551615 1"
	if p, ok := parseProcess(stat); !ok || p != (schema.ProcessStatistics{CommandLine: "a) b (c", ResidentSetSizeBytes: 300 * int64(os.Getpagesize()), UserTimeSeconds: 12.34, KernelTimeSeconds: 0.56}) {
		t.Errorf("parseProcess = %+v, %v", p, ok)
	}
	for _, text := range []string{"", "1", "1 (a", "1 )a(", "1 (a) S 0 1", strings.Replace(stat, "1234", "x", 1)} {
		if p, ok := parseProcess(text); ok {
			t.Errorf("parseProcess(%q) = %+v; want nothing", text, p)
		}
	}
	var u cpuUsage
	if s := u.share("cpu  50 50 80 800 0 10 10 0 7 0\ncpu0 1\n"); s == nil || s.UserPercent != 10 || s.KernelPercent != 10 {
		t.Errorf("share = %+v", s)
	}
	for _, text := range []string{"", "cpu 1 2 3", "cpu a 2 3 4 5 6 7 8", "intr 1 2 3 4 5 6 7 8"} {
		if _, ok := parseStat(text); ok {
			t.Errorf("parseStat(%q) succeeds", text)
		}
	}
	if got := utsVersion("Linux version 6.1.0-18-amd64 (x@y) (gcc-12 (Debian 12.2.0-14) 12.2.0, GNU ld (GNU) 2.40) #1 SMP Debian"); got != "#1 SMP Debian" {
		t.Errorf("utsVersion = %q", got)
	}
}

func FuzzMachineParsers(f *testing.F) {
	f.Add("MemTotal: 1000 kB\nMemFree: 100 kB\n")
	f.Add("cpu  50 50 80 800 0 10 10 0 7 0\n")
	f.Fuzz(func(t *testing.T, text string) {
		if m := parseMeminfo(text); m != nil && (m.TotalBytes < 0 || m.UsedBytes < 0) {
			t.Errorf("parseMeminfo = %+v", m)
		}
		if p, ok := parseProcess(text); ok && (p.ResidentSetSizeBytes < 0 || !utf8.ValidString(p.CommandLine)) {
			t.Errorf("parseProcess = %+v", p)
		}
		if ticks, ok := parseStat(text); ok && ticks[2] < ticks[0] {
			t.Errorf("parseStat = %v", ticks)
		}
	})
}

// A service processor that does not answer, or a host that is not attached, leaves its properties out.
func TestPartsAbsent(t *testing.T) {
	a := newFakeAgent()
	a.controller.silent, a.state.Phase = true, engine.Lost
	var system map[string]any
	if err := connect(t, a).Get(t.Context(), systemURI, &system); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"Boot", "VirtualMedia", "Processors", "EthernetInterfaces", "OperatingSystem", "MemorySummary", "Manufacturer", "BiosVersion"} {
		if v, ok := system[name]; ok {
			t.Errorf("%s is %v", name, v)
		}
	}
}

func TestMemoryModules(t *testing.T) {
	c := connect(t, newFakeAgent())
	s, err := c.System(t.Context())
	if err != nil || s.Memory == nil {
		t.Fatalf("the system has no memory: %v", err)
	}
	var all []schema.Memory
	for m, err := range client.Members[schema.Memory](t.Context(), c, s.Memory.ID) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
	if len(all) != 2 || all[0].CapacityMiB == nil || *all[0].CapacityMiB != 512 || all[0].MemoryDeviceType != "DDR4" || all[0].Location.PartLocation.ServiceLabel != "DIMM 0" {
		t.Fatalf("modules %+v", all)
	}
	if e := all[1]; e.CapacityMiB != nil || e.MemoryType != "" || e.Status.State != schema.StateAbsent || e.Metrics != nil {
		t.Errorf("an empty slot is %+v", e)
	}
	var one, whole schema.MemoryMetrics
	if all[0].Metrics == nil || s.MemorySummary.Metrics == nil || all[0].Status.Health != schema.HealthOK {
		t.Fatalf("no metrics: %+v, %+v", all[0], s.MemorySummary)
	}
	for uri, to := range map[string]*schema.MemoryMetrics{all[0].Metrics.ID: &one, s.MemorySummary.Metrics.ID: &whole} {
		if err := c.Get(t.Context(), uri, to); err != nil {
			t.Fatal(err)
		}
	}
	if *one.CurrentPeriod != (schema.MemoryPeriod{Correctable: 3}) || *whole.CurrentPeriod != (schema.MemoryPeriod{Correctable: 4}) {
		t.Errorf("metrics %+v, %+v", one.CurrentPeriod, whole.CurrentPeriod)
	}
	var e *client.Error
	if err := c.Get(t.Context(), systemURI+"/Memory/dimm1/MemoryMetrics", &one); !errors.As(err, &e) || e.Status != 404 {
		t.Errorf("metrics of an empty slot: %v", err)
	}
}

func TestDisks(t *testing.T) {
	c := connect(t, newFakeAgent())
	s, err := c.System(t.Context())
	if err != nil || s.SimpleStorage == nil {
		t.Fatalf("the system has no storage: %v", err)
	}
	var all []schema.SimpleStorage
	for m, err := range client.Members[schema.SimpleStorage](t.Context(), c, s.SimpleStorage.ID) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
	if len(all) != 1 || len(all[0].Devices) != 2 || all[0].Devices[0].Name != "sda" || all[0].Devices[1].CapacityBytes != 1<<40 {
		t.Errorf("storage %+v", all)
	}
	for name, want := range map[string]bool{"sda": true, "vda": true, "nvme0n1": true, "mmcblk0": true, "sr0": true, "loop0": false, "ram15": false, "zram0": false, "dm-3": false, "md127": false} {
		if got := isHardware(kernel.Disk{Name: name, Size: 1}); got != want {
			t.Errorf("%s is hardware: %v", name, got)
		}
	}
	if isHardware(kernel.Disk{Name: "sr0"}) {
		t.Error("a drive without a medium has no capacity to show")
	}
}

// Errors are a module's only if there is no doubt whose they are.
func TestErrorsOfModules(t *testing.T) {
	counter := func(label string, handle uint16, n uint64) kernel.ECCCounter {
		return kernel.ECCCounter{Label: label, Handle: handle, Correctable: n, Uncorrectable: 10 * n}
	}
	w := Hardware{
		DIMMs: []DIMM{
			{ID: "dimm0", Locator: "A1", Bank: "BANK 0", Bytes: 1, Handle: 1}, {ID: "dimm1", Locator: "A1", Bank: "BANK 1", Bytes: 1, Handle: 2},
			{ID: "dimm2", Locator: "B1", Bytes: 1, Handle: 3}, {ID: "dimm3", Locator: "C1", Handle: 4}, {ID: "dimm4", Locator: "D1", Bytes: 1, Handle: 5},
		},
		Controllers: []kernel.MemoryController{
			{Modules: []kernel.ECCCounter{counter("A1", 0, 1), counter("BANK 1 A1", 0, 2), counter("B1", 0, 4), counter("C1", 0, 8), counter("mc#0csrow#0channel#0", 0, 16)}},
			{PerRank: true, Modules: []kernel.ECCCounter{counter("B1", 0, 32), counter("B1", 1, 64), counter("", 9, 128)}},
		},
	}
	want := map[string]uint64{"dimm0": 64, "dimm1": 2, "dimm2": 36}
	for _, d := range w.DIMMs {
		got, ok := w.eccOf(d)
		if n, counted := want[d.ID]; ok != counted || ok && got != (schema.MemoryPeriod{Correctable: n, Uncorrectable: 10 * n}) {
			t.Errorf("%s: %+v, %v; want %d, %v", d.ID, got, ok, n, counted)
		}
	}
}

func TestPCI(t *testing.T) {
	c := connect(t, newFakeAgent())
	var sys schema.ComputerSystem
	var chassis schema.Chassis
	if err := errors.Join(c.Get(t.Context(), systemURI, &sys), c.Get(t.Context(), "/redfish/v1/Chassis/1", &chassis)); err != nil {
		t.Fatal(err)
	}
	var got []string
	for d, err := range client.Members[schema.PCIeDevice](t.Context(), c, chassis.PCI.ID) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, d.ID+" "+d.DeviceType)
		for f, err := range client.Members[schema.PCIeFunction](t.Context(), c, d.Functions.ID) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprintf("%s/%d %s %s %s %s:%s %s", d.ID, f.FunctionID, f.FunctionType, f.DeviceClass, f.ClassCode, f.VendorID, f.DeviceID, f.SubsystemID))
			if f.Links.Device.ID != d.ODataID {
				t.Errorf("function %s is of %s, not of %s", f.ODataID, f.Links.Device.ID, d.ODataID)
			}
		}
	}
	want := []string{
		"0000-00-1f MultiFunction", "0000-00-1f/0 Physical Bridge 0x060100 0x8086:0x2918 ", "0000-00-1f/2 Physical MassStorageController 0x010601 0x8086:0x2922 0x1100",
		"0001-3b-00 SingleFunction", "0001-3b-00/0 Virtual NetworkController 0x020000 0x15b3:0x101e ",
	}
	if !slices.Equal(got, want) {
		t.Errorf("PCI devices\n%q\nwant\n%q", got, want)
	}
	if len(sys.PCIeDevices) != 2 || sys.PCIeDevices[1].ID != pciURI+"/0001-3b-00" {
		t.Errorf("the system has %+v", sys.PCIeDevices)
	}
	for _, wrong := range []string{"/0000-00-00", "/0000-00-1f/PCIeFunctions/1", "/0000-00-1f/PCIeFunctions/x"} {
		var apiErr *client.Error
		if err := c.Get(t.Context(), pciURI+wrong, nil); !errors.As(err, &apiErr) || apiErr.Status != 404 {
			t.Errorf("GET %s = %v; want 404", wrong, err)
		}
	}
}

func TestSplitPCI(t *testing.T) {
	for name, want := range map[string]string{"0000:00:1f.2": "0000-00-1f 2", "10000:e1:00.0": "10000-e1-00 0"} {
		if d, n, ok := splitPCI(name); !ok || fmt.Sprint(d, " ", n) != want {
			t.Errorf("splitPCI(%q) = %q, %d, %v", name, d, n, ok)
		}
	}
	for _, name := range []string{"", "0000:00:1f", "0000:00:1f.8", "0000:00:20.0", "../../x.0", "0000:00.0"} {
		if d, n, ok := splitPCI(name); ok {
			t.Errorf("splitPCI(%q) = %q, %d", name, d, n)
		}
	}
}
