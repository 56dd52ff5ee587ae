package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/boot"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/redfish/host"
)

// applyDelay lets the answer to who changes an address go out on the old one.
const applyDelay = time.Second

// network keeps the network settings of the agent's machine in its configuration file. It is a host.Network.
type network struct {
	path string
	log  *slog.Logger
	// The machine; tests have another.
	hostname     func() (string, error)
	setHostname  func(string) error
	nameServers  func([]netip.Addr) error
	reconfigure  func(name string, old, now boot.Interface) error
	hardwareAddr func(name string) string

	mu sync.Mutex // held while the file is read or written
}

func newNetwork(path string, log *slog.Logger) *network {
	return &network{
		path: path, log: log,
		hostname:    os.Hostname,
		setHostname: func(name string) error { return unix.Sethostname([]byte(name)) },
		nameServers: boot.NameServers, reconfigure: boot.Reconfigure,
		hardwareAddr: func(name string) string {
			i, err := net.InterfaceByName(name)
			if err != nil {
				return ""
			}
			return i.HardwareAddr.String()
		},
	}
}

// find returns the index of an interface's configuration, or -1.
func (n *network) find(c boot.Config, name string) int {
	mac := n.hardwareAddr(name)
	return slices.IndexFunc(c.Interfaces, func(i boot.Interface) bool { return i.Match == name || mac != "" && strings.EqualFold(i.Match, mac) })
}

func (n *network) Settings(name string) (host.NetworkSettings, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	cfg, err := config.Load(n.path)
	if err != nil && !config.Missing(err) {
		return host.NetworkSettings{}, fmt.Errorf("read network settings: %w", err)
	}
	s := host.NetworkSettings{HostName: cfg.Boot.Hostname, NameServers: cfg.Boot.NameServers, DHCP: len(cfg.Boot.Interfaces) == 0}
	if s.HostName == "" {
		if s.HostName, err = n.hostname(); err != nil {
			return s, fmt.Errorf("read host name: %w", err)
		}
	}
	if i := n.find(cfg.Boot, name); i >= 0 {
		c := cfg.Boot.Interfaces[i]
		s.DHCP, s.Addresses, s.Gateway = c.DHCP, c.Addresses, c.Gateway
	}
	return s, nil
}

func (n *network) Change(name string, s host.NetworkSettings) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	cfg, err := config.Load(n.path)
	if err != nil {
		return fmt.Errorf("change network settings: %w", err)
	}
	before := cfg.Boot
	i := n.find(cfg.Boot, name)
	cfg.Boot.Hostname, cfg.Boot.NameServers = s.HostName, s.NameServers
	cfg.Boot.Interfaces = slices.Clone(cfg.Boot.Interfaces)
	old := boot.Interface{Match: name, DHCP: s.DHCP}
	if i >= 0 {
		old = before.Interfaces[i]
	}
	now := old
	now.DHCP, now.Addresses, now.Gateway = s.DHCP, s.Addresses, s.Gateway
	addressed := !slices.Equal(now.Addresses, old.Addresses) || now.Gateway != old.Gateway
	switch {
	case i >= 0:
		cfg.Boot.Interfaces[i] = now
	case addressed && len(cfg.Boot.Interfaces) == 0:
		return fmt.Errorf("change network settings: interface %s has no configuration of its own, as all interfaces ask DHCP; give boot.interfaces in %s", name, n.path)
	case addressed:
		cfg.Boot.Interfaces = append(cfg.Boot.Interfaces, now)
	}
	if err := cfg.Write(n.path); err != nil {
		return fmt.Errorf("change network settings: %w", err)
	}
	n.log.Warn("the network settings were changed over Redfish", "interface", name)
	if err := n.setHostname(s.HostName); err != nil {
		n.log.Error("set host name", "err", err)
	}
	if !slices.Equal(s.NameServers, before.NameServers) {
		if err := n.nameServers(s.NameServers); err != nil {
			n.log.Error("set name servers", "err", err)
		}
	}
	if addressed {
		time.AfterFunc(applyDelay, func() {
			if err := n.reconfigure(name, old, now); err != nil {
				n.log.Error("set addresses", "err", err)
			}
		})
	}
	return nil
}
