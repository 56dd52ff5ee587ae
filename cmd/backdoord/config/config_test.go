package config

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/boot"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// full is a configuration with everything in it.
func full() Config {
	bar := 2
	return Config{
		Version:    Version,
		Memory:     Memory{Backend: BackendPCI, Device: "1af4:1110", BAR: &bar, Layout: Layout{Name: LayoutQ35}, Size: 4 << 30, Engine: Engine{Enabled: true}},
		HostUUID:   "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
		Writes:     true,
		StateDir:   "/var/lib/backdoor",
		Agreement:  Agreement{File: "agreement.json", OwnerKey: Key(bytes.Repeat([]byte{7}, ed25519.PublicKeySize))},
		PolicyFile: "/etc/policy.json",
		HostBMC: &HostBMC{URL: "https://10.0.2.2:8443", Username: "admin", PasswordFile: "bmc-password", CAFile: "bmc.pem",
			Timeout: Duration(time.Minute)},
		Redfish: Redfish{Listen: ":443", Names: []string{"dpu.example"}},
		RDMA: RDMA{Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("fd00:77::2")}, PathMTU: 4096,
			BytesPerSecond: 500 << 20, Spin: Duration(50 * time.Microsecond), Keys: []RDMAKey{{User: "ops", File: "ops.rdma-key"}}, MemoryByKey: true},
		Intervals: Intervals{Pass: Duration(250 * time.Millisecond)},
		LogLevel:  "debug",
		Boot: boot.Config{Hostname: "dpu", Interfaces: []boot.Interface{{Match: "eth0",
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")}, Gateway: netip.MustParseAddr("10.0.2.2")}}},
	}
}

var compare = []cmp.Option{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// The document in the package comment is one that Parse takes.
func TestPackageComment(t *testing.T) {
	src, err := os.ReadFile("config.go")
	if err != nil {
		t.Fatal(err)
	}
	var doc strings.Builder
	for line := range strings.Lines(string(src)) {
		if text, ok := strings.CutPrefix(line, "//\t"); ok {
			doc.WriteString(text)
		}
	}
	c, err := Parse("comment", []byte(doc.String()))
	if err != nil {
		t.Fatal(err)
	}
	if id, address, err := c.Memory.PCIDevice(); id != "1af4:1110" || address != "" || err != nil {
		t.Errorf("PCIDevice() = %q, %q, %v", id, address, err)
	}
	c.Memory.Device += "@0000:00:04.0"
	if id, address, err := c.Memory.PCIDevice(); id != "1af4:1110" || address != "0000:00:04.0" || err != nil {
		t.Errorf("PCIDevice() = %q, %q, %v", id, address, err)
	}
}

func TestWriteAndLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	if err := full().Write(path); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("Write: mode %v, %v; want 0600", st.Mode(), err)
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	want := full()
	want.Agreement.File = filepath.Join(dir, "agreement.json")
	want.RDMA.Keys[0].File = filepath.Join(dir, "ops.rdma-key")
	want.HostBMC.PasswordFile = filepath.Join(dir, "bmc-password")
	want.HostBMC.CAFile = filepath.Join(dir, "bmc.pem")
	if d := cmp.Diff(want, got, compare...); d != "" {
		t.Errorf("Load(Write(c)): -want +got\n%s", d)
	}
}

func TestMissingFile(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "config.json"))
	if !Missing(err) {
		t.Errorf("Load(missing) = %v; want one that Missing knows", err)
	}
}

func TestDefaultIsReadOnlyAndValid(t *testing.T) {
	c := Default()
	if c.Writes || c.Memory.Backend != BackendNone || c.HostBMC != nil {
		t.Errorf("Default() = %+v; want nothing watched and nothing written", c)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("Default().Validate() = %v", err)
	}
}

func TestParseErrors(t *testing.T) {
	for _, tt := range []struct{ name, data, want string }{
		{"empty", ``, `c:1:1: the document is empty`},
		{"version", `{}`, `c: version: want 1, found 0`},
		{"future", `{"version": 2}`, `c: version: want 1, found 2`},
		{"unknown", "{\n \"version\": 1,\n \"memory\": {\"backend\": \"pci\", \"devcie\": \"1af4:1110\"}\n}",
			`c:3:31: memory.devcie: unknown field, did you mean device?`},
		{"backend", `{"version": 1, "memory": {"backend": "tape"}}`, `c: memory.backend: want none, pci, ramfile or image, found "tape"`},
		{"no device", `{"version": 1, "memory": {"backend": "pci", "layout": "flat", "size": 4096}}`,
			`c: memory.device: want vendor:device in lower case, as in "1af4:1110", or with an address, as in "1af4:1110@0000:00:04.0"; found ""`},
		{"address alone", `{"version": 1, "memory": {"backend": "pci", "device": "0000:00:04.0", "layout": "flat", "size": 4096}}`,
			`c: memory.device: want vendor:device in lower case, as in "1af4:1110", or with an address, as in "1af4:1110@0000:00:04.0"; found "0000:00:04.0"`},
		{"no layout", `{"version": 1, "memory": {"backend": "ramfile", "path": "/x"}}`,
			`c: memory.layout: want "q35", "flat" or a list of extents, found ""`},
		{"size unit", `{"version": 1, "memory": {"size": "1GB"}}`, `c:1:35: memory.size: "1GB" is not a size; write bytes, or KiB, MiB, GiB, TiB`},
		{"size too big", `{"version": 1, "memory": {"size": "17592186044416TiB"}}`, `c:1:35: memory.size: "17592186044416TiB" is more than 64 bits`},
		{"extent", `{"version": 1, "memory": {"layout": [{"start": "x"}]}}`,
			`c:1:48: memory.layout[0].start: "x" is not a size; write bytes, or KiB, MiB, GiB, TiB`},
		{"writes alone", `{"version": 1, "writes": true}`,
			`c: writes: true needs agreement.file or agreement.mailbox, and agreement.ownerKey: without an access agreement nothing may be stored`},
		{"key", `{"version": 1, "agreement": {"file": "a", "ownerKey": "AAAA"}}`,
			`c:1:55: agreement.ownerKey: want an Ed25519 public key: 32 bytes in base64`},
		{"bmc plain http", `{"version": 1, "hostBMC": {"url": "http://x", "username": "u", "password": "p"}}`,
			`c: hostBMC.url: want https://host or https://host:port, found "http://x"`},
		{"bmc two passwords", `{"version": 1, "hostBMC": {"url": "https://x", "username": "u", "password": "p", "passwordFile": "f"}}`,
			`c: hostBMC: want one of password and passwordFile`},
		{"bmc pin", `{"version": 1, "hostBMC": {"url": "https://x", "username": "u", "password": "p", "certificateSHA256": "00"}}`,
			`c: hostBMC.certificateSHA256: want 32 bytes in hexadecimal`},
		{"listen", `{"version": 1, "redfish": {"listen": "443"}}`, `c: redfish.listen: want host:port or :port, found "443"`},
		{"duration", `{"version": 1, "intervals": {"pass": "fast"}}`, `c:1:38: intervals.pass: "fast" is not a duration; write for example 250ms or 10s`},
		{"duration range", `{"version": 1, "intervals": {"pass": "2h"}}`, `c: intervals.pass: want 1ms to 1h, found 2h0m0s`},
		{"log level", `{"version": 1, "logLevel": "loud"}`, `c: logLevel: want debug, info, warn or error, found "loud"`},
		{"uuid", `{"version": 1, "hostUUID": "1B4E28BA-2FA1-11D2-883F-0016D3CCA427"}`,
			`c: hostUUID: want a UUID in lower case, as in 1b4e28ba-2fa1-11d2-883f-0016d3cca427, found "1B4E28BA-2FA1-11D2-883F-0016D3CCA427"`},
		{"rdma address", `{"version": 1, "rdma": {"addresses": ["0.0.0.0"]}}`, `c: rdma.addresses[0]: want one definite address of the agent's machine, found "0.0.0.0"`},
		{"rdma path MTU", `{"version": 1, "rdma": {"addresses": ["10.0.0.1"], "pathMTU": 1500}}`, `c: rdma.pathMTU: want 256, 512, 1024, 2048 or 4096, found 1500`},
		{"rdma key", `{"version": 1, "rdma": {"keys": [{"user": "ops"}]}}`, `c: rdma.keys[0]: user and file must be given`},
		{"boot field", `{"version": 1, "boot": {"interfaces": [{"match": "eth0", "adresses": []}]}}`,
			`c:1:58: boot.interfaces[0].adresses: unknown field, did you mean addresses?`},
		{"boot", `{"version": 1, "boot": {"interfaces": [{}]}}`, `c: boot: interfaces[0]: match is empty`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("c", []byte(tt.data))
			if err == nil || err.Error() != tt.want {
				t.Errorf("Parse(%s) = %v\nwant %s", tt.data, err, tt.want)
			}
		})
	}
}

func TestExtents(t *testing.T) {
	for _, tt := range []struct {
		json string
		want []hostmem.Extent
	}{
		{`{"backend": "ramfile", "path": "/x", "layout": "flat", "size": "1MiB"}`,
			[]hostmem.Extent{{Range: hostmem.Range{Size: 1 << 20}}}},
		{`{"backend": "ramfile", "path": "/x", "layout": "q35", "size": "4GiB"}`,
			[]hostmem.Extent{{Range: hostmem.Range{Size: 2 << 30}}, {Range: hostmem.Range{Start: 4 << 30, Size: 2 << 30}, Offset: 2 << 30}}},
		{`{"backend": "ramfile", "path": "/x", "layout": [{"start": "0x1000", "size": "4KiB", "offset": 8192}]}`,
			[]hostmem.Extent{{Range: hostmem.Range{Start: 0x1000, Size: 4096}, Offset: 8192}}},
	} {
		c, err := Parse("c", []byte(`{"version": 1, "memory": `+tt.json+`}`))
		if err != nil {
			t.Errorf("Parse(%s): %v", tt.json, err)
			continue
		}
		if d := cmp.Diff(tt.want, c.Memory.Extents()); d != "" {
			t.Errorf("Extents of %s: -want +got\n%s", tt.json, d)
		}
	}
}

func TestSize(t *testing.T) {
	for _, s := range []Size{0, 1, 1023, 1 << 10, 3 << 20, 1 << 30, 5 << 40, 1<<64 - 1} {
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var got Size
		if err := json.Unmarshal(b, &got); err != nil || got != s {
			t.Errorf("Size %d through %s = %d, %v", s, b, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	b, err := json.Marshal(full())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"memory":{"backend":"ramfile","path":"x","layout":[{"start":0,"size":"1GiB","offset":"0x0"}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("c", data)
		if err != nil {
			if c.Version != 0 || !strings.HasPrefix(err.Error(), "c:") {
				t.Fatalf("Parse(%q) = %+v, %v; want value xor error, and the error named", data, c, err)
			}
			return
		}
		c.Memory.Extents()
		again, err := json.Marshal(c)
		if err != nil {
			t.Fatalf("Marshal(Parse(%q)): %v", data, err)
		}
		if _, err := Parse("c", again); err != nil {
			t.Fatalf("Parse(Marshal(Parse(%q))): %v\n%s", data, err, again)
		}
	})
}
