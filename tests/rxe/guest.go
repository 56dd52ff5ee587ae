// Package rxe boots virtual machines that have an RDMA device of their own, Debian's kernel with the soft one (rdma_rxe),
// and Debian's RDMA programs: perftest and rping, as they are packaged. Tests and benchmarks let them talk to us.
package rxe

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/backdoor-rhs/backdoor/images/initramfs"
	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/images/modpack"
)

// Guest is a virtual machine that runs one script.
type Guest struct {
	Kernel string       // a target of images/kernels with RDMA: "6.1-generic" or "6.12-generic"
	Addr   netip.Prefix // of its network interface, eth0, whose RDMA device is rxe0
	Net    *Network     // that eth0 is in; nil: one of its own
	Port   *os.File     // instead of Net: a socket that carries a frame in each datagram
	Input  io.Reader    // what the guest reads from its console, /dev/ttyS0
	// Script is run by busybox's shell when the network and the RDMA device are up.
	Script string
	// Programs are added to /bin, by the name they have there.
	Programs map[string]string
	Files    map[string]string // further files: content by path
	Modules  []string          // further kernel modules, which programs can load
	// Plain leaves out the RDMA device, which holds the UDP port that a program of ours needs.
	Plain bool
}

// MTU is that of the guests' interfaces: room for a path MTU of 4096.
const MTU = 4300

// programs are those that every guest has, from packages that images/debian-packages.txt lists.
var programs = []string{"ib_read_lat", "ib_read_bw", "ib_write_bw", "ib_atomic_lat", "rping"}

// modules are what a guest loads. The checksum is asked for by rxe at run time, and no dependency shows it.
var modules = []string{"virtio_pci", "virtio_net", "virtio_rng", "crc32_generic", "rdma_rxe", "ib_uverbs", "rdma_ucm", "ib_umad"}

// plainModules are what one without an RDMA device loads.
var plainModules = []string{"virtio_pci", "virtio_net", "virtio_rng"}

// Run boots the guest, copies its console to w, and returns when it has powered off.
func (g *Guest) Run(ctx context.Context, w io.Writer) error {
	dir, err := os.MkdirTemp("", "rxe-guest-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	target, err := kernels.Lookup(g.Kernel)
	if err != nil {
		return err
	}
	k, err := kernels.Fetch(ctx, "", target)
	if err != nil {
		return err
	}
	archive, err := g.initramfs(k)
	if err != nil {
		return fmt.Errorf("make the guest's userland: %w", err)
	}
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, archive, 0o600); err != nil {
		return err
	}
	netdev := "user"
	if g.Net != nil {
		if netdev, err = g.Net.port(); err != nil {
			return err
		}
	}
	if g.Port != nil {
		netdev = "dgram,local.type=fd,local.str=3"
	}
	mac := g.Addr.Addr().AsSlice()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "768",
		"-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel", k.Vmlinuz, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 quiet",
		"-netdev", netdev+",id=n0", "-device", fmt.Sprintf("virtio-net-pci,netdev=n0,mac=52:54:00:00:00:%02x,romfile=,host_mtu=%d", mac[len(mac)-1], MTU),
		"-device", "virtio-rng-pci")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = g.Input, w, w
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // even when a test times out
	if g.Port != nil {
		cmd.ExtraFiles = []*os.File{g.Port}
	}
	start := cmd.Start
	if g.Net != nil {
		start = func() error { return g.Net.Do(cmd.Start) }
	}
	if err = start(); err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("run guest: %w", errors.Join(err, ctx.Err()))
	}
	return nil
}

// BuildPeer builds rxepeer (nicfw/roce/interop/rxepeer), without C, into dir, and returns its path.
func BuildPeer(dir string) (string, error) { return build(dir, "nicfw/roce/interop/rxepeer") }

// build builds a command of this module for a guest.
func build(dir, command string) (string, error) {
	out := filepath.Join(dir, filepath.Base(command))
	c := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "github.com/backdoor-rhs/backdoor/"+command)
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if b, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", command, err, b)
	}
	return out, nil
}

// initramfs makes the guest's userland.
func (g *Guest) initramfs(k kernels.Kernel) ([]byte, error) {
	var a initramfs.Archive
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp"} {
		a.Directory(d, 0o755)
	}
	a.CharDevice("dev/console", 0o600, 5, 1)
	u := userland{a: &a, have: map[string]bool{}}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: install busybox-static, or run make setup", err)
	}
	if err := u.add("bin/busybox", busybox); err != nil {
		return nil, err
	}
	a.Symlink("bin/sh", "busybox")
	for _, p := range append([]string{"rdma"}, programs...) {
		path, err := exec.LookPath(p)
		if err != nil {
			return nil, fmt.Errorf("%w: install what images/debian-packages.txt lists, or run make setup", err)
		}
		if err := u.add("bin/"+p, path); err != nil {
			return nil, err
		}
	}
	for name, path := range g.Programs {
		if err := u.add("bin/"+name, path); err != nil {
			return nil, err
		}
	}
	// The library of rxe is loaded at run time, as is the one that ends threads.
	if err := u.add("usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so", "/usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so"); err != nil {
		return nil, err
	}
	if err := u.library("libgcc_s.so.1"); err != nil {
		return nil, err
	}
	a.File("etc/libibverbs.d/rxe.driver", []byte("driver rxe\n"), 0o644)
	a.File("etc/passwd", []byte("root:x:0:0:root:/:/bin/sh\n"), 0o644)
	load := modules
	if g.Plain {
		load = plainModules
	}
	for name, content := range g.Files {
		a.File(strings.TrimPrefix(name, "/"), []byte(content), 0o600)
	}
	if len(g.Modules) > 0 {
		pack, err := modpack.Make(k.ModulesDir, g.Modules)
		if err != nil {
			return nil, err
		}
		for _, f := range pack.Files() {
			a.File("lib/modules/"+pack.Release+"/"+f.Name, f.Data, 0o644)
		}
	}
	pack, err := modpack.Make(k.ModulesDir, load)
	if err != nil {
		return nil, err
	}
	for i, m := range pack.LoadOrder() {
		a.File(fmt.Sprintf("modules/%02d-%s.ko", i, m.Name), m.Data, 0o644)
	}
	a.File("init", fmt.Appendf(nil, bootScript, MTU, g.Addr), 0o755)
	a.File("script", []byte(g.Script), 0o755)
	b, err := a.Bytes()
	if err != nil {
		return nil, err
	}
	return initramfs.Compress(b, initramfs.Quick)
}

// bootScript brings the guest up. The node of a verbs device may appear a moment after the device.
const bootScript = `#!/bin/sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
for m in /modules/*.ko; do insmod $m || echo "insmod $m failed"; done
ip link set lo up
ip link set eth0 mtu %d up
ip addr add %s dev eth0
[ -d /sys/module/rdma_rxe ] && rdma link add rxe0 type rxe netdev eth0
n=0
while [ -d /sys/module/rdma_rxe ] && ! [ -c /dev/infiniband/uverbs0 ] && [ $n -lt 200 ]; do sleep 0.05; n=$((n+1)); done
ulimit -l unlimited
sh /script
poweroff -f
`

// userland collects programs with the libraries that they need.
type userland struct {
	a    *initramfs.Archive
	have map[string]bool
}

// libraryDirs are where Debian has libraries.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64"}

// add adds a program or library under a name, with what it needs.
func (u *userland) add(name, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	u.a.File(name, b, 0o755)
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			s, err := io.ReadAll(p.Open())
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			if err := u.addOnce(strings.TrimRight(string(s), "\x00")); err != nil {
				return err
			}
		}
	}
	for _, l := range libs {
		if err := u.library(l); err != nil {
			return fmt.Errorf("%s needs %w", path, err)
		}
	}
	return nil
}

func (u *userland) addOnce(path string) error {
	if u.have[path] {
		return nil
	}
	u.have[path] = true
	return u.add(strings.TrimPrefix(path, "/"), path)
}

// library adds a library by its name.
func (u *userland) library(name string) error {
	i := slices.IndexFunc(libraryDirs, func(d string) bool { _, err := os.Stat(filepath.Join(d, name)); return err == nil })
	if i < 0 {
		return fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return u.addOnce(filepath.Join(libraryDirs[i], name))
}
