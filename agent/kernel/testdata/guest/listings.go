package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Interface is a network interface as the guest's netlink tells.
type Interface struct {
	Name, MAC, State, Flags string
	Index, MTU              int
	Addresses               []string
	Counters                map[string]uint64
}

// listing answers the commands whose answer is what the kernel says of one of its subsystems: "world" makes something to
// say, "objects" more of it, "read FILE" is a file of /proc or /sys, "links DIR" where its links lead, "interfaces" the network interfaces, "stacks" the kernel
// stacks of all threads, "modulesyms" the lines of /proc/kallsyms that are of modules, "tree DIR:NAMES" small files below a
// directory, "status" what /proc says of each thread, "pagemap PID" and "memory PID:ADDRESS:LENGTH" the memory of a process, "bpf KIND" what
// bpf(2) says; "readers N" starts reads of the first disk.
func listing(command, arg string) any {
	switch command {
	case "world":
		if err := world(); err != nil {
			return err.Error()
		}
		return "ok"
	case "objects":
		if err := objects(); err != nil {
			return err.Error()
		}
		return "ok"
	case "read":
		b, err := os.ReadFile(arg)
		if err != nil {
			return "error: " + err.Error()
		}
		return string(b)
	case "reload": // takes a module of the initramfs out, and loads it again
		return said(reload(arg))
	case "links":
		names, _ := filepath.Glob(arg)
		links := make(map[string]string)
		for _, n := range names {
			if to, err := os.Readlink(n); err == nil {
				links[n] = to
			}
		}
		return links
	case "modulesyms":
		return moduleSymbols()
	case "stacks":
		return stacks()
	case "interfaces":
		return interfaces()
	case "bpf":
		return bpfInfo(arg)
	case "readers":
		n, _ := strconv.Atoi(arg)
		return readers(n)
	case "tree":
		return tree(arg)
	case "status":
		return status()
	case "pagemap":
		return pagemap(arg)
	case "memory":
		return memory(arg)
	}
	return "unknown command"
}

func reload(module string) error {
	names, _ := filepath.Glob("/modules/*-" + module + ".ko")
	if len(names) != 1 {
		return fmt.Errorf("%d modules %s", len(names), module)
	}
	b, err := os.ReadFile(names[0])
	return first(err, unix.DeleteModule(module, 0), unix.InitModule(b, ""))
}

// kept are the files and sockets of world, which stay open.
var kept []any

// world loads the modules of the initramfs, and makes mounts, files, addresses and sockets of all kinds.
func world() error {
	modules, _ := filepath.Glob("/modules/*.ko")
	for _, name := range modules {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := unix.InitModule(b, ""); err != nil {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	for _, m := range [][4]string{
		{"tmpfs", "/run", "tmpfs", "size=1m"}, {"secret", "/run/read only", "tmpfs", "ro"}, {"cgroup2", "/cgroup", "cgroup2", ""},
	} {
		var flags uintptr
		data := m[3]
		if data == "ro" {
			flags, data = unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""
		}
		os.MkdirAll(m[1], 0o755)
		if err := unix.Mount(m[0], m[1], m[2], flags, data); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	os.MkdirAll("/run/sub/dir", 0o755)
	os.MkdirAll("/bound", 0o755)
	if err := unix.Mount("/run/sub", "/bound", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	for _, dir := range []string{"/cgroup/a", "/cgroup/a/b", "/cgroup/c"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	os.WriteFile("/cgroup/cgroup.subtree_control", []byte("+pids +memory"), 0)
	os.WriteFile("/cgroup/a/pids.max", []byte("77"), 0)
	os.WriteFile("/cgroup/a/memory.max", []byte("104857600"), 0)
	pids, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, p := range pids {
		if b, _ := os.ReadFile(p); string(b) == "g-sleep\n" {
			if err := os.WriteFile("/cgroup/a/cgroup.procs", []byte(filepath.Base(filepath.Dir(p))), 0); err != nil {
				return err
			}
		}
	}
	if err := addresses(); err != nil {
		return err
	}
	return open()
}

// addresses brings up lo, and eth0 if there is one.
func addresses() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, i := range [][3]string{{"lo", "127.0.0.1", "255.0.0.0"}, {"eth0", "192.0.2.7", "255.255.255.128"}} {
		for _, set := range []struct {
			request uint
			address string
		}{{unix.SIOCSIFADDR, i[1]}, {unix.SIOCSIFNETMASK, i[2]}} {
			r, err := unix.NewIfreq(i[0])
			if err != nil {
				return err
			}
			if err := r.SetInet4Addr(net.ParseIP(set.address).To4()); err != nil {
				return err
			}
			if err := unix.IoctlIfreq(fd, set.request, r); err == unix.ENODEV {
				break
			} else if err != nil {
				return fmt.Errorf("address of %s: %w", i[0], err)
			}
		}
		r, _ := unix.NewIfreq(i[0])
		if unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, r) != nil {
			continue
		}
		r.SetUint16(r.Uint16() | unix.IFF_UP)
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r); err != nil {
			return fmt.Errorf("%s up: %w", i[0], err)
		}
	}
	return nil
}

func open() error {
	keep := func(f any, err error) error {
		kept = append(kept, f)
		return err
	}
	var errs []error
	try := func(f any, err error) {
		if err := keep(f, err); err != nil {
			errs = append(errs, err)
		}
	}
	try(os.Create("/run/sub/dir/file"))
	f, err := os.Create("/run/gone")
	try(f, err)
	f.WriteString("contents")
	try(nil, os.Remove("/run/gone"))
	r, w, err := os.Pipe()
	try([]*os.File{r, w}, err)
	try(unix.Eventfd(0, 0))
	try(unix.MemfdCreate("memory file", 0))
	tcp, err := net.Listen("tcp4", "127.0.0.1:7777")
	try(tcp, err)
	try(net.Dial("tcp4", "127.0.0.1:7777"))
	c, err := tcp.Accept()
	try(c, err)
	fmt.Fprint(c, "unread")
	six, err := net.Listen("tcp6", "[::1]:7778")
	try(six, err)
	try(net.Dial("tcp6", "[::1]:7778"))
	closing, err := net.Dial("tcp4", "127.0.0.1:7777")
	try(closing, err)
	accepted, err := tcp.Accept()
	try(accepted, err)
	closing.Close()
	accepted.Close()
	try(net.ListenPacket("udp4", "127.0.0.1:5353"))
	try(net.ListenPacket("udp6", "[::]:5354"))
	try(net.Dial("udp4", "127.0.0.1:5353"))
	unixListener, err := net.Listen("unix", "/run/socket")
	try(unixListener, err)
	try(net.Dial("unix", "/run/socket"))
	abstract, err := net.ListenPacket("unixgram", "@abstract")
	try(abstract, err)
	try(unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0))
	try(unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE))
	if len(errs) > 0 {
		return errs[0]
	}
	return nil
}

func interfaces() any {
	list, err := net.Interfaces()
	if err != nil {
		return err.Error()
	}
	var out []Interface
	for _, i := range list {
		sys := func(name string) string {
			b, _ := os.ReadFile("/sys/class/net/" + i.Name + "/" + name)
			return strings.TrimSpace(string(b))
		}
		o := Interface{Name: i.Name, MAC: sys("address"), State: sys("operstate"), Flags: sys("flags"), Index: i.Index, MTU: i.MTU,
			Counters: make(map[string]uint64)}
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			o.Addresses = append(o.Addresses, a.String())
		}
		for _, c := range []string{"rx_packets", "rx_bytes", "rx_errors", "rx_dropped", "tx_packets", "tx_bytes", "tx_errors", "tx_dropped"} {
			o.Counters[c] = num(sys("statistics/" + c))
		}
		out = append(out, o)
	}
	return out
}

// stacks returns the kernel stack of each thread, behind the number of its context switches.
func stacks() any {
	out := make(map[string]string)
	for _, t := range ps() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stack", t.TGID, t.PID))
		if err == nil {
			out[fmt.Sprint(t.PID)] = fmt.Sprintf("%d\n%s", t.Switches, b)
		}
	}
	return out
}

func moduleSymbols() any {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	var b strings.Builder
	for in := bufio.NewScanner(f); in.Scan(); {
		if strings.HasSuffix(in.Text(), "]") && b.Len() < 64<<10 {
			b.WriteString(in.Text() + "\n")
		}
	}
	return b.String()
}
