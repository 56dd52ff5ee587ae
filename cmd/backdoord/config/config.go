// Package config is the configuration file of the agent: one strict, versioned JSON document.
//
// The zero value is a valid configuration: the agent watches nothing, writes nothing, and serves Redfish that says so.
// An unknown or misspelt field is an error with its line and column. Relative paths are relative to the directory of
// the file. "backdoord -check" says whether a file, and everything that it names, is right. Written in full:
//
//	{
//	  "version": 1,
//	  "memory": {
//	    "backend": "pci",
//	    "device": "1af4:1110",
//	    "bar": 2,
//	    "layout": "q35",
//	    "size": "1GiB",
//	    "engine": {"enabled": true},
//	    "bytesPerSecond": "100MiB"
//	  },
//	  "hostUUID": "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
//	  "writes": true,
//	  "stateDir": "/var/lib/backdoor",
//	  "agreement": {"file": "agreement.json", "ownerKey": "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w="},
//	  "policyFile": "policy.json",
//	  "hostBMC": {
//	    "url": "https://10.0.2.2:8443",
//	    "username": "admin",
//	    "passwordFile": "bmc-password",
//	    "caFile": "bmc-ca.pem"
//	  },
//	  "redfish": {"listen": ":443", "names": ["dpu7.example.org"]},
//	  "rdma": {
//	    "addresses": ["10.77.0.2", "fd00:77::2"],
//	    "pathMTU": 4096,
//	    "bytesPerSecond": "500MiB",
//	    "keys": [{"user": "ops", "file": "ops.rdma-key"}],
//	    "memoryByKey": false,
//	    "encrypted": false
//	  },
//	  "datapath": {"host": "52:54:00:bd:00:03", "uplink": "eth1", "allow": ["10.77.0.0/24"]},
//	  "intervals": {"pass": "250ms"},
//	  "logLevel": "info",
//	  "boot": {"hostname": "dpu", "interfaces": [{"match": "eth0", "dhcp": true}]}
//	}
//
// Only version is required. The agreement's document is described in package agent/access, the policy's in agent/policy.
package config

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/bits"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/boot"
	"github.com/backdoor-rhs/backdoor/cmd/internal/strictjson"
	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Version is the version of the document that this agent reads and writes.
const Version = 1

// DefaultPath is where the agent looks for its configuration.
const DefaultPath = "/var/lib/backdoor/config.json"

// maxSize bounds the file: nothing that a person wrote is larger.
const maxSize = 1 << 20

// Config is the whole document.
type Config struct {
	Version int    `json:"version"`
	Memory  Memory `json:"memory,omitzero"`
	// HostUUID is the SMBIOS system UUID of the host, known from outside; the access agreement must name it.
	HostUUID string `json:"hostUUID,omitempty"`
	// Writes lets the agent change the host at all, by stores into its memory or through its BMC; the agreement must permit
	// each change, too. Without it the agent only watches.
	Writes     bool      `json:"writes,omitempty"`
	StateDir   string    `json:"stateDir,omitempty"` // default /var/lib/backdoor
	Agreement  Agreement `json:"agreement,omitzero"`
	PolicyFile string    `json:"policyFile,omitempty"` // empty: every finding waits for an operator
	HostBMC    *HostBMC  `json:"hostBMC,omitempty"`    // absent: the agent cannot power-cycle the host
	Redfish    Redfish   `json:"redfish,omitzero"`
	RDMA       RDMA      `json:"rdma,omitzero"`      // without addresses: not served
	Datapath   *Datapath `json:"datapath,omitempty"` // absent: the host's traffic is none of the agent's business
	Intervals  Intervals `json:"intervals,omitzero"`
	LogLevel   string    `json:"logLevel,omitempty"` // debug, info (default), warn, error
	// Boot says how the machine comes up when the agent is its first program; elsewhere it is ignored.
	Boot boot.Config `json:"boot,omitzero"`
}

// The ways to a host's memory.
const (
	BackendNone    = "none"    // watch nothing; the default
	BackendPCI     = "pci"     // the BAR of a PCI device
	BackendRAMFile = "ramfile" // the shared RAM file of a virtual machine
	BackendImage   = "image"   // a crash dump or raw image, read-only
)

// The named layouts.
const (
	LayoutQ35  = "q35"  // QEMU's q35: from 2816 MiB on, RAM above 2 GiB continues at 4 GiB
	LayoutFlat = "flat" // the window is the physical address space from zero
)

// Memory is the path to the host's memory.
type Memory struct {
	Backend string `json:"backend,omitempty"`
	// Device names the device of the pci backend: vendor:device as in "1af4:1110", with "@" and the address of one device
	// behind it where several are alike: "1af4:1110@0000:00:04.0".
	Device string `json:"device,omitempty"`
	BAR    *int   `json:"bar,omitempty"`   // pci: default 2
	Path   string `json:"path,omitempty"`  // ramfile, image
	Layout Layout `json:"layout,omitzero"` // pci, ramfile
	Size   Size   `json:"size,omitempty"`  // of the host's RAM, for a named layout
	Engine Engine `json:"engine,omitzero"`
	// BytesPerSecond is a hard cap on what the agent moves from and to the host's memory; default none. Below some MiB the agent sees
	// less often than it would.
	BytesPerSecond Size `json:"bytesPerSecond,omitempty"`
}

// Engine puts the model of a real DMA engine before the path: bursts, latency, no compare-and-swap. For laboratories.
type Engine struct {
	Enabled bool `json:"enabled,omitempty"`
}

// Layout tells where the host's RAM lies in the window: LayoutQ35 or LayoutFlat, each with
// Memory.Size, or a list of extents.
type Layout struct {
	Name    string
	Extents []Extent
}

// Extent is Size bytes of RAM at the physical address Start, at Offset in the window.
type Extent struct {
	Start  Size `json:"start"`
	Size   Size `json:"size"`
	Offset Size `json:"offset"`
}

// IsZero reports whether no layout is given.
func (l Layout) IsZero() bool { return l.Name == "" && l.Extents == nil }

// MarshalJSON writes the name, or the list.
func (l Layout) MarshalJSON() ([]byte, error) {
	if l.Extents != nil {
		return json.Marshal(l.Extents)
	}
	return json.Marshal(l.Name)
}

// UnmarshalJSON reads a name or a list.
func (l *Layout) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '[' {
		l.Name = ""
		return strictjson.Unmarshal("layout", b, &l.Extents)
	}
	l.Extents = nil
	if err := json.Unmarshal(b, &l.Name); err != nil {
		return errors.New(`want "q35", "flat" or a list of extents`)
	}
	return nil
}

// Size is a number of bytes or an address, written as a number, or as a string like "1GiB", "2816MiB" or "0x100000000".
type Size uint64

// UnmarshalJSON reads a number or a string.
func (s *Size) UnmarshalJSON(b []byte) error {
	var n uint64
	if json.Unmarshal(b, &n) == nil {
		*s = Size(n)
		return nil
	}
	var text string
	if err := json.Unmarshal(b, &text); err != nil {
		return errors.New(`want bytes as a number or a string like "1GiB" or "0x40000000"`)
	}
	v, err := ParseSize(text)
	*s = v
	return err
}

// MarshalJSON writes whole binary units where they are exact.
func (s Size) MarshalJSON() ([]byte, error) {
	for _, u := range units {
		if s != 0 && uint64(s)%u.bytes == 0 {
			return json.Marshal(strconv.FormatUint(uint64(s)/u.bytes, 10) + u.name)
		}
	}
	return json.Marshal(uint64(s))
}

var units = []struct {
	name  string
	bytes uint64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

// ParseSize reads "1GiB", "512MiB", "4096" or "0x1000".
func ParseSize(text string) (Size, error) {
	num, unit := text, uint64(1)
	for _, u := range units {
		if n, ok := strings.CutSuffix(text, u.name); ok {
			num, unit = strings.TrimSpace(n), u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(num, 0, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size; write bytes, or KiB, MiB, GiB, TiB", text)
	}
	hi, lo := bits.Mul64(n, unit)
	if hi != 0 {
		return 0, fmt.Errorf("%q is more than 64 bits", text)
	}
	return Size(lo), nil
}

// Duration is a time.Duration, written as a string like "250ms" or "1m30s".
type Duration time.Duration

// UnmarshalJSON reads a string.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var text string
	if err := json.Unmarshal(b, &text); err != nil {
		return errors.New(`want a duration as a string like "250ms" or "10s"`)
	}
	v, err := time.ParseDuration(text)
	if err != nil {
		return fmt.Errorf("%q is not a duration; write for example 250ms or 10s", text)
	}
	*d = Duration(v)
	return nil
}

// Std returns it as the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// MarshalJSON writes a string.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// Agreement is where the access agreement is, and whose signature makes it valid.
type Agreement struct {
	File string `json:"file,omitempty"`
	// Mailbox has an agent that has never held an agreement take the one that "backdoor-agree -mailbox" holds in the host's memory.
	Mailbox  bool `json:"mailbox,omitempty"`
	OwnerKey Key  `json:"ownerKey,omitempty"`
}

// Key is an Ed25519 public key, written in standard base64.
type Key ed25519.PublicKey

// UnmarshalJSON reads base64.
func (k *Key) UnmarshalJSON(b []byte) error {
	var text string
	if err := json.Unmarshal(b, &text); err != nil {
		return errors.New("want an Ed25519 public key in base64")
	}
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(raw) != ed25519.PublicKeySize {
		return fmt.Errorf("want an Ed25519 public key: %d bytes in base64", ed25519.PublicKeySize)
	}
	*k = raw
	return nil
}

// MarshalJSON writes base64.
func (k Key) MarshalJSON() ([]byte, error) {
	return json.Marshal(base64.StdEncoding.EncodeToString(k))
}

// HostBMC is the service processor through which the host's power is controlled. Its certificate must be verifiable:
// by CAFile, by CertificateSHA256, or, with neither, by the system's roots.
type HostBMC struct {
	URL          string `json:"url,omitempty"`  // https://host:port, for Redfish
	IPMI         string `json:"ipmi,omitempty"` // host or host:port, for IPMI over LAN+ when Redfish fails; needs ipmitool in the image
	Username     string `json:"username"`
	Password     string `json:"password,omitempty"`
	PasswordFile string `json:"passwordFile,omitempty"`
	// OffOn cycles the power by off and on instead of a single restart order; not for agents that share the host's power.
	OffOn             bool     `json:"offOn,omitempty"`
	CAFile            string   `json:"caFile,omitempty"`            // PEM
	CertificateSHA256 string   `json:"certificateSHA256,omitempty"` // hex, of the whole certificate
	Timeout           Duration `json:"timeout,omitempty"`           // of one operation; default 30 s
}

// Redfish is the agent's own service.
type Redfish struct {
	Listen string   `json:"listen,omitempty"` // default ":443"
	Names  []string `json:"names,omitempty"`  // further DNS names and addresses of the certificate
}

// RDMA is the agent's remote access by RDMA, see package agent/export.
type RDMA struct {
	// Addresses are those of the agent's machine on which UDP port 4791 is served, each at the interface (or VLAN) that has it and at
	// no other.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// PathMTU is the payload of a packet: 256, 512, 1024, 2048 or 4096; default is what fits the MTU of the address's interface.
	PathMTU int `json:"pathMTU,omitempty"`
	// BytesPerSecond bounds what each peer is sent; default no limit.
	BytesPerSecond Size `json:"bytesPerSecond,omitempty"`
	// Spin is how long the agent looks for packets before it sleeps: it takes a CPU for a shorter answer. Default not at all.
	Spin Duration  `json:"spin,omitempty"`
	Keys []RDMAKey `json:"keys,omitempty"`
	// MemoryByKey lets keys reach the host's memory, which else takes a lease over Redfish.
	MemoryByKey bool `json:"memoryByKey,omitempty"`
	// Encrypted gives leases at addresses of tunnels only (see boot.Config), to peers inside of them.
	Encrypted bool `json:"encrypted,omitempty"`
}

// RDMAKey lets a monitor connect without Redfish, with what the user's Redfish account may do.
type RDMAKey struct {
	User string `json:"user"`
	File string `json:"file"` // 32 random bytes in base64
}

// Datapath has the agent's machine forward between the host and the wire, see package nicfw/datapath. The interfaces are given by name
// or hardware address. The one that leads to the host must not be among boot.interfaces; the uplink has static addresses there, if the agent
// is to be reached on it.
type Datapath struct {
	Host   string `json:"host"`
	Uplink string `json:"uplink"`
	// Allow are remotes that the host may talk to in any quarantine.
	Allow []netip.Prefix `json:"allow,omitempty"`
	// Generic runs the programs behind the drivers instead of in them.
	Generic bool `json:"generic,omitempty"`
}

// Intervals pace the agent. Zero means the default.
type Intervals struct {
	Pass Duration `json:"pass,omitempty"` // between two looks at the host
}

// Default is the configuration of an agent that was given none.
func Default() Config {
	c := Config{Version: Version}
	c.fill()
	return c
}

func (c *Config) fill() {
	if c.Memory.Backend == "" {
		c.Memory.Backend = BackendNone
	}
	if c.Memory.BAR == nil && c.Memory.Backend == BackendPCI {
		bar := 2
		c.Memory.BAR = &bar
	}
	if c.StateDir == "" {
		c.StateDir = "/var/lib/backdoor"
	}
	if c.Redfish.Listen == "" {
		c.Redfish.Listen = ":443"
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
	}
	if c.HostBMC != nil && c.HostBMC.Timeout == 0 {
		c.HostBMC.Timeout = Duration(30 * time.Second)
	}
}

// Load reads the file at path, completes its defaults and resolves its relative paths.
// A missing file is an error that wraps fs.ErrNotExist.
func Load(path string) (Config, error) {
	st, err := os.Stat(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	if st.Size() > maxSize {
		return Config{}, fmt.Errorf("read configuration: %s has %d bytes, more than %d", path, st.Size(), maxSize)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	c, err := Parse(path, data)
	if err != nil {
		return Config{}, err
	}
	dir := filepath.Dir(path)
	files := []*string{&c.StateDir, &c.Agreement.File, &c.PolicyFile, &c.Memory.Path}
	if c.HostBMC != nil {
		files = append(files, &c.HostBMC.PasswordFile, &c.HostBMC.CAFile)
	}
	for i := range c.Boot.Tunnels {
		files = append(files, &c.Boot.Tunnels[i].PrivateKeyFile)
	}
	for i := range c.RDMA.Keys {
		files = append(files, &c.RDMA.Keys[i].File)
	}
	for _, f := range files {
		if *f != "" && !filepath.IsAbs(*f) {
			*f = filepath.Join(dir, *f)
		}
	}
	return c, nil
}

// Parse reads a document and completes its defaults. The name stands for it in errors. No file is touched.
func Parse(name string, data []byte) (Config, error) {
	var c Config
	if err := strictjson.Unmarshal(name, data, &c); err != nil {
		return Config{}, err
	}
	if c.Version != Version {
		return Config{}, fmt.Errorf("%s: version: want %d, found %d", name, Version, c.Version)
	}
	c.fill()
	if err := c.Validate(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// Write stores the configuration at path, readable by its owner only, for it may hold a password.
func (c Config) Write(path string) error {
	c.Version = Version
	if err := c.Validate(); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	if err := durable.WriteFile(path, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

// Validate reports every contradiction in the configuration, joined.
func (c Config) Validate() error {
	var errs []error
	bad := func(path, format string, a ...any) { errs = append(errs, fmt.Errorf(path+": "+format, a...)) }

	m := c.Memory
	switch m.Backend {
	case "", BackendNone:
	case BackendPCI:
		if _, _, err := m.PCIDevice(); err != nil {
			errs = append(errs, err)
		}
		if m.BAR != nil && (*m.BAR < 0 || *m.BAR > 5) {
			bad("memory.bar", "want 0 to 5, found %d", *m.BAR)
		}
	case BackendRAMFile, BackendImage:
		if m.Path == "" {
			bad("memory.path", "missing; the %s backend needs a file", m.Backend)
		}
	default:
		bad("memory.backend", "want none, pci, ramfile or image, found %q", m.Backend)
	}
	if m.Backend == BackendPCI || m.Backend == BackendRAMFile {
		switch {
		case m.Layout.Extents != nil:
			if len(m.Layout.Extents) == 0 {
				bad("memory.layout", "the list is empty: no RAM")
			}
			if m.Size != 0 {
				bad("memory.size", "goes with a named layout only")
			}
		case m.Layout.Name == LayoutQ35 || m.Layout.Name == LayoutFlat:
			if m.Size == 0 || m.Size%hostmem.PageSize != 0 {
				bad("memory.size", "want the host's RAM, a multiple of %d, as in \"1GiB\"", hostmem.PageSize)
			}
		default:
			bad("memory.layout", `want "q35", "flat" or a list of extents, found %q`, m.Layout.Name)
		}
	}
	if m.BytesPerSecond != 0 && (m.BytesPerSecond < hostmem.BudgetFloor || m.BytesPerSecond > 1<<50) {
		bad("memory.bytesPerSecond", "want 256KiB to 1024TiB, found %d", uint64(m.BytesPerSecond))
	}
	given := c.Agreement.File != "" || c.Agreement.Mailbox
	if c.Writes && (!given || len(c.Agreement.OwnerKey) == 0) {
		bad("writes", "true needs agreement.file or agreement.mailbox, and agreement.ownerKey: without an access agreement nothing may be stored")
	}
	if given != (len(c.Agreement.OwnerKey) > 0) {
		bad("agreement", "file or mailbox, and ownerKey, go together")
	}
	if c.HostUUID != "" && !uuidForm.MatchString(c.HostUUID) {
		bad("hostUUID", "want a UUID in lower case, as in 1b4e28ba-2fa1-11d2-883f-0016d3cca427, found %q", c.HostUUID)
	}
	if err := c.Boot.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("boot: %w", err))
	}
	if b := c.HostBMC; b != nil {
		u, err := url.Parse(b.URL)
		switch {
		case err != nil:
			bad("hostBMC.url", "%v", err)
		case b.URL == "" && b.IPMI != "":
		case u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.User != nil || u.RawQuery != "":
			bad("hostBMC.url", "want https://host or https://host:port, found %q", b.URL)
		}
		if b.Username == "" {
			bad("hostBMC.username", "missing")
		}
		if (b.Password == "") == (b.PasswordFile == "") {
			bad("hostBMC", "want one of password and passwordFile")
		}
		if b.CAFile != "" && b.CertificateSHA256 != "" {
			bad("hostBMC", "want at most one of caFile and certificateSHA256")
		}
		if b.CertificateSHA256 != "" {
			if raw, err := hex.DecodeString(strings.ReplaceAll(b.CertificateSHA256, ":", "")); err != nil || len(raw) != 32 {
				bad("hostBMC.certificateSHA256", "want 32 bytes in hexadecimal")
			}
		}
		if b.Timeout < 0 {
			bad("hostBMC.timeout", "negative")
		}
	}
	if c.Redfish.Listen != "" {
		if _, _, err := net.SplitHostPort(c.Redfish.Listen); err != nil {
			bad("redfish.listen", "want host:port or :port, found %q", c.Redfish.Listen)
		}
	}
	r := c.RDMA
	for i, a := range r.Addresses {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || slices.Contains(r.Addresses[:i], a) {
			bad(fmt.Sprintf("rdma.addresses[%d]", i), "want one definite address of the agent's machine, found %q", a)
		}
	}
	if r.PathMTU != 0 && !slices.Contains([]int{256, 512, 1024, 2048, 4096}, r.PathMTU) {
		bad("rdma.pathMTU", "want 256, 512, 1024, 2048 or 4096, found %d", r.PathMTU)
	}
	if r.Spin < 0 || r.Spin > Duration(time.Second) {
		bad("rdma.spin", "want 0s to 1s, found %v", time.Duration(r.Spin))
	}
	if r.BytesPerSecond > 1<<50 {
		bad("rdma.bytesPerSecond", "want less than 1024TiB, found %d", uint64(r.BytesPerSecond))
	}
	for i, k := range r.Keys {
		if k.User == "" || k.File == "" {
			bad(fmt.Sprintf("rdma.keys[%d]", i), "user and file must be given")
		}
	}
	if d := c.Datapath; d != nil {
		switch {
		case d.Host == "" || d.Uplink == "" || strings.EqualFold(d.Host, d.Uplink):
			bad("datapath", "host and uplink must name two interfaces")
		case len(c.Boot.Interfaces) == 0:
			bad("datapath", "give boot.interfaces: without them all interfaces ask for DHCP, also the one that leads to the host")
		case slices.ContainsFunc(c.Boot.Interfaces, func(i boot.Interface) bool { return strings.EqualFold(i.Match, d.Host) }):
			bad("datapath.host", "%s is among boot.interfaces; the host must not see the agent's machine on it", d.Host)
		}
		for i, p := range d.Allow {
			if !p.IsValid() {
				bad(fmt.Sprintf("datapath.allow[%d]", i), "want a prefix, as in 10.77.0.0/24")
			}
		}
	}
	if p := time.Duration(c.Intervals.Pass); p != 0 && (p < time.Millisecond || p > time.Hour) {
		bad("intervals.pass", "want 1ms to 1h, found %v", p)
	}
	if c.LogLevel != "" {
		if _, err := c.Level(); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// Level returns the log level.
func (c Config) Level() (slog.Level, error) {
	var l slog.Level
	switch c.LogLevel {
	case "", "debug", "info", "warn", "error":
		if c.LogLevel != "" {
			return l, l.UnmarshalText([]byte(c.LogLevel))
		}
		return l, nil
	}
	return l, fmt.Errorf("logLevel: want debug, info, warn or error, found %q", c.LogLevel)
}

// BMCPassword returns the password of the host's BMC, from the file if it is in one. One final newline is dropped.
func (b HostBMC) BMCPassword() (string, error) {
	if b.PasswordFile == "" {
		return b.Password, nil
	}
	data, err := os.ReadFile(b.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("read password of the host's BMC: %w", err)
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r"), nil
}

// Missing reports whether err of Load means that there is no file.
func Missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }

var pciForm = regexp.MustCompile(`^([0-9a-f]{4}:[0-9a-f]{4})(?:@([0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]))?$`)

// PCIDevice returns the vendor:device of the pci backend, and the address if one is given.
func (m Memory) PCIDevice() (id, address string, err error) {
	f := pciForm.FindStringSubmatch(m.Device)
	if f == nil {
		return "", "", fmt.Errorf(`memory.device: want vendor:device in lower case, as in "1af4:1110", or with an address, as in "1af4:1110@0000:00:04.0"; found %q`, m.Device)
	}
	return f[1], f[2], nil
}

// Extents returns where the host's RAM lies in the window or file.
func (m Memory) Extents() []hostmem.Extent {
	switch {
	case m.Layout.Name == LayoutQ35:
		return hostmem.Q35Layout(uint64(m.Size))
	case m.Layout.Name == LayoutFlat:
		return []hostmem.Extent{{Range: hostmem.Range{Size: uint64(m.Size)}}}
	}
	out := make([]hostmem.Extent, len(m.Layout.Extents))
	for i, e := range m.Layout.Extents {
		out[i] = hostmem.Extent{Range: hostmem.Range{Start: hostmem.PhysAddr(e.Start), Size: uint64(e.Size)}, Offset: int64(e.Offset)}
	}
	return out
}
