package lab

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/boot"
	"github.com/backdoor-rhs/backdoor/boot/wireguard"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/tests/lab/wire"
)

// The DPU's network: one card on QEMU's user network, whose only way in is the forwarded port, and one on the wire.
const (
	dpuMAC     = "52:54:00:bd:00:01"
	dpuWireMAC = "52:54:00:bd:00:02"
	gateway    = "10.0.2.2" // also: how the DPU reaches loopback services of this machine
	// dpuCableMAC is of the card at the other end of HOST's cable; no frame ever carries it.
	dpuCableMAC = "52:54:00:bd:00:03"
	// datapathMTU is what XDP takes in virtio_net's driver of Linux 6.1.
	datapathMTU = 3500
)

// wireMTU is the MTU of the DPU's card on the wire.
func (c *Config) wireMTU() int {
	if c.Datapath {
		return datapathMTU
	}
	return wire.MTU
}

// DPUWireAddress and DPUWireAddress6 are the DPU's addresses on the wire, where its agent serves RDMA.
var (
	DPUWireAddress  = netip.MustParsePrefix("192.168.190.2/24")
	DPUWireAddress6 = netip.MustParsePrefix("fd00:bd::2/64")
)

// The ends of the tunnel that Config.Tunnel asks for, and the DPU's UDP port for it.
var (
	DPUTunnelAddress     = netip.MustParsePrefix("10.190.0.2/24")
	MonitorTunnelAddress = netip.MustParsePrefix("10.190.0.3/24")
)

const TunnelPort = 51820

// parties are the keys of one run.
type parties struct {
	owner, monitor ed25519.PrivateKey
}

// writeState fills dir with what the DPU's state disk holds at its first boot.
func writeState(dir string, cfg Config, l *Lab) (parties, error) {
	h := l.Host
	service := config.HostBMC{
		URL: fmt.Sprintf("https://%s:%d", gateway, l.BMC.Port), Username: l.BMC.User, PasswordFile: "bmc-password", CAFile: "bmc-ca.pem",
	}
	password := l.BMC.Password
	if l.IPMI != nil {
		_, port, err := net.SplitHostPort(l.IPMI.Address)
		if err != nil {
			return parties{}, fmt.Errorf("address of the host's BMC: %w", err)
		}
		service = config.HostBMC{IPMI: net.JoinHostPort(gateway, port), Username: l.IPMI.User, PasswordFile: "bmc-password"}
		password = l.IPMI.Password
	}
	var p parties
	var err error
	if _, p.owner, err = ed25519.GenerateKey(rand.Reader); err == nil {
		_, p.monitor, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		return parties{}, fmt.Errorf("make the keys: %w", err)
	}
	public := func(k ed25519.PrivateKey) access.Key { return access.Key(k.Public().(ed25519.PublicKey)) }

	actions := cfg.Actions
	if actions == nil {
		actions = heal.IDs()
	}
	agreement := access.Agreement{
		Version:   access.Version,
		ID:        "lab",
		Host:      access.Host{UUID: h.UUID, Name: "host"},
		Owner:     access.Party{Name: "owner", Key: public(p.owner)},
		Monitors:  []access.Party{{Name: "monitor", Key: public(p.monitor)}},
		Rights:    access.Rights{Read: true, Write: true, Actions: actions, Power: true, Memory: []access.Memory{{Size: 1 << 40, Read: true, Write: true, Atomic: true}}},
		Protected: []access.Protected{},
		ValidFrom: time.Now().Add(-time.Hour).UTC().Truncate(time.Second), ValidUntil: time.Now().AddDate(0, 0, 7).UTC().Truncate(time.Second),
	}
	for _, k := range []ed25519.PrivateKey{p.owner, p.monitor} {
		if err := agreement.Sign(k); err != nil {
			return parties{}, err
		}
	}

	rules := []byte(cfg.Policy)
	if rules == nil {
		if rules, err = json.MarshalIndent(policy.Default(), "", "  "); err != nil {
			return parties{}, fmt.Errorf("write the policy: %w", err)
		}
	}
	doc, err := json.MarshalIndent(agreement, "", "  ")
	if err != nil {
		return parties{}, fmt.Errorf("write the agreement: %w", err)
	}
	secret := func() []byte {
		b := make([]byte, export.KeySize)
		rand.Read(b)
		return []byte(base64.StdEncoding.EncodeToString(b))
	}
	for name, data := range map[string][]byte{
		"rdma-key": secret(), "rdma-memory-key": secret(), "agreement.json": doc, "policy.json": rules, "bmc-password": []byte(password), "bmc-ca.pem": l.BMC.CA,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return parties{}, &InfraError{Op: "write the DPU's state", Err: err}
		}
	}
	bar := 2
	c := config.Config{
		Version: config.Version,
		Memory: config.Memory{
			Backend: config.BackendPCI, Device: "1af4:1110", BAR: &bar,
			Layout: config.Layout{Name: config.LayoutQ35}, Size: config.Size(cfg.HostMemory),
			Engine: config.Engine{Enabled: cfg.Engine == EngineDMA},
		},
		HostUUID:   h.UUID,
		Writes:     !cfg.NoWrites,
		StateDir:   boot.StateDir,
		Agreement:  config.Agreement{File: "agreement.json", OwnerKey: config.Key(public(p.owner))},
		PolicyFile: "policy.json",
		HostBMC:    &service,
		Redfish:    config.Redfish{Listen: ":443"},
		RDMA: config.RDMA{
			Addresses: []netip.Addr{DPUWireAddress.Addr(), DPUWireAddress6.Addr()}, MemoryByKey: true,
			// There is no account "memory" until somebody makes one.
			Keys: []config.RDMAKey{{User: "admin", File: "rdma-key"}, {User: "memory", File: "rdma-memory-key"}},
		},
		Boot: boot.Config{
			Hostname: "dpu",
			Interfaces: []boot.Interface{
				{Match: dpuMAC, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")}, Gateway: netip.MustParseAddr(gateway)},
				{Match: dpuWireMAC, Addresses: []netip.Prefix{DPUWireAddress, DPUWireAddress6}, MTU: cfg.wireMTU()},
			},
		},
	}
	if cfg.Unagreed {
		c.Agreement.File, c.Agreement.Mailbox = "", true
		from, to := filepath.Join(dir, "agreement.json"), filepath.Join(l.Dir(), "agreement.json")
		if err := os.Rename(from, to); err != nil {
			return parties{}, &InfraError{Op: "keep the agreement back", Err: err}
		}
	}
	if cfg.Datapath {
		c.Datapath = &config.Datapath{Host: dpuCableMAC, Uplink: dpuWireMAC}
	}
	if cfg.Tunnel != (wireguard.Key{}) {
		if _, err := wireguard.LoadKey(filepath.Join(dir, "tunnel-key")); err != nil {
			return parties{}, &InfraError{Op: "write the DPU's state", Err: err}
		}
		peer := wireguard.Peer{PublicKey: cfg.Tunnel, AllowedIPs: []netip.Prefix{netip.PrefixFrom(MonitorTunnelAddress.Addr(), 32)}}
		c.Boot.Tunnels = []wireguard.Config{{
			Name: "wg0", PrivateKeyFile: "tunnel-key", ListenPort: TunnelPort, Addresses: []netip.Prefix{DPUTunnelAddress}, Peers: []wireguard.Peer{peer},
		}}
		c.RDMA.Addresses, c.RDMA.Encrypted = append(c.RDMA.Addresses, DPUTunnelAddress.Addr()), true
	}
	if err := c.Write(filepath.Join(dir, "config.json")); err != nil {
		return parties{}, err
	}
	return p, nil
}

// stateSize is the size of the DPU's state disk in bytes; the file is sparse.
const stateSize = 64 << 20

// makeDisk makes an ext4 file system with the content of dir.
func makeDisk(image, dir string) error {
	mkfs, err := find("mkfs.ext4")
	if err != nil {
		return err
	}
	out, err := exec.Command(mkfs, "-q", "-F", "-L", boot.StateLabel, "-d", dir,
		"-E", "root_owner=0:0,lazy_itable_init=1", image, fmt.Sprintf("%dk", stateSize>>10)).CombinedOutput()
	if err != nil {
		return &InfraError{Op: "make the DPU's state disk", Err: fmt.Errorf("%w: %s", err, out)}
	}
	return nil
}

// writeKey stores a private key as PKCS #8 in PEM.
func writeKey(path string, k ed25519.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// Key reads a private key of the run: the "owner"'s or the "monitor"'s, who have signed the agreement.
func (l *Lab) Key(name string) (ed25519.PrivateKey, error) {
	raw, err := os.ReadFile(filepath.Join(l.dir, name+".key"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s.key is no PEM", name)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s.key: %w", name, err)
	}
	return k.(ed25519.PrivateKey), nil
}

// keep stores the keys of a run beside its other files.
func (p parties) keep(dir string) error {
	err := errors.Join(writeKey(filepath.Join(dir, "owner.key"), p.owner), writeKey(filepath.Join(dir, "monitor.key"), p.monitor))
	if err != nil {
		return &InfraError{Op: "keep the keys", Err: err}
	}
	return nil
}
