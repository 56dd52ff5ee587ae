// Guest is the first program of a machine with two network cards, eth0 and eth1. It forwards between them, by the packet path or by a Linux
// bridge, as it is told on the console: a line "packetpath", "bridge", or
// "unyielding", the packet path in softirqs, which does not give way to the agent. It answers by "forward: " and what it does now.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/datapath"
)

const host, uplink = "eth0", "eth1"

func main() {
	if err := start(); err != nil {
		fmt.Println("forward: error:", err)
	}
	m := machine{}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		how, err := m.forward(strings.TrimSpace(in.Text()))
		if err != nil {
			how = "error: " + err.Error()
		}
		fmt.Println("forward:", how)
	}
	select {} // the first process must not end
}

// start mounts what there is to mount, loads the modules and waits for the cards.
func start() error {
	// cilium/ebpf asks for the mounts before main is called, so this program starts once more when they are there.
	if _, err := os.Stat("/proc/self"); err != nil {
		if err := mount(); err != nil {
			return err
		}
		return unix.Exec("/init", os.Args, os.Environ())
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	slices.Sort(modules)
	for _, name := range modules {
		f, err := os.Open(name)
		if err == nil {
			err = errors.Join(unix.FinitModule(int(f.Fd()), "", 0), f.Close())
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	for _, name := range []string{host, uplink} {
		for tries := 0; ; tries++ {
			if _, err := netlink.LinkByName(name); err == nil {
				break
			} else if tries == 1000 {
				return err
			}
			time.Sleep(10 * time.Millisecond) // the driver has no event for who has no device yet
		}
	}
	fmt.Println("forward: ready")
	return nil
}

// mount mounts the file systems of the kernel.
func mount() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"bpf", "/sys/fs/bpf"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	return nil
}

// machine forwards in one of the two ways.
type machine struct {
	path   *datapath.Gateway
	bridge *netlink.Bridge
}

func (m *machine) forward(how string) (string, error) {
	if m.path != nil {
		if err := m.path.Remove(); err != nil {
			return "", err
		}
		m.path = nil
	}
	if m.bridge != nil {
		if err := netlink.LinkDel(m.bridge); err != nil {
			return "", err
		}
		m.bridge = nil
	}
	switch how {
	case "packetpath", "unyielding":
		var err error
		if m.path, err = datapath.Open(datapath.Config{Host: host, Uplink: uplink}); err != nil {
			return "", err
		}
		if how == "unyielding" {
			if err := os.WriteFile("/sys/class/net/"+host+"/threaded", []byte("0"), 0); err != nil {
				return "", err
			}
		}
		native, err := m.path.Native()
		return fmt.Sprintf("packet path, native %v, yields %v", native, m.path.Yields == nil), err
	case "bridge":
		b := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
		b.Name = "br0"
		if err := netlink.LinkAdd(b); err != nil {
			return "", err
		}
		m.bridge = b
		for _, name := range []string{host, uplink, b.Name} {
			l, err := netlink.LinkByName(name)
			if err == nil && name != b.Name {
				err = errors.Join(os.WriteFile("/sys/class/net/"+name+"/threaded", []byte("0"), 0), netlink.LinkSetMaster(l, b))
			}
			if err == nil {
				err = netlink.LinkSetUp(l)
			}
			if err != nil {
				return "", fmt.Errorf("bridge %s: %w", name, err)
			}
		}
		return "bridge", nil
	}
	return "", fmt.Errorf("there is no way %q to forward", how)
}
