package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"golang.org/x/sys/unix"
)

const busybox = "/bin/busybox"

var mounts = []struct{ source, target, fstype string }{
	{"proc", "/proc", "proc"},
	{"sysfs", "/sys", "sysfs"},
	{"devtmpfs", "/dev", "devtmpfs"},
	{"devpts", "/dev/pts", "devpts"},
	{"tmpfs", "/run", "tmpfs"},
	{"tmpfs", "/tmp", "tmpfs"},
	{"tracefs", "/sys/kernel/tracing", "tracefs"},
}

// boot brings the userland up and then serves the control line; it only returns with an error.
func boot() error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for k, v := range map[string]string{"PATH": "/bin:/sbin", "HOME": "/", "TERM": "vt100"} {
		os.Setenv(k, v)
	}
	if err := loadModules("/modules"); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("host")); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	c := newChildren()
	go c.reap()
	if err := network(c); err != nil {
		return err
	}
	for _, s := range services(bystanders()) {
		if _, err := c.start(s); err != nil {
			return fmt.Errorf("start %s: %w", s.Comm, err)
		}
	}
	go c.shell()
	go watchPowerButton()
	line, err := openLine(control.Port)
	if err != nil {
		return err
	}
	return newServer(line, c).run()
}

// loadModules loads the files of dir in the order of their names; the lab has sorted them by what they need.
func loadModules(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return err
	}
	for _, n := range names {
		f, err := os.Open(n)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("load %s: %w", n, err)
		}
	}
	return nil
}

// network gives the machine the addresses that QEMU's user network expects. The name of the device does not matter.
func network(c *children) error {
	for _, args := range [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"ip", "addr", "add", "10.0.2.15/24", "dev", "eth0"},
		{"ip", "link", "set", "eth0", "up"},
		{"ip", "route", "add", "default", "via", "10.0.2.2"},
	} {
		r, err := c.run(args, time.Minute)
		if err != nil {
			return err
		}
		if r.Code != 0 {
			return fmt.Errorf("%s: %s", strings.Join(args, " "), strings.TrimSpace(r.Stderr))
		}
	}
	return nil
}

func bystanders() int {
	const usual = 12
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return usual
	}
	for _, f := range strings.Fields(string(line)) {
		if v, ok := strings.CutPrefix(f, "lab.bystanders="); ok {
			if n, err := strconv.Atoi(v); err == nil && n >= 0 {
				return n
			}
		}
	}
	return usual
}

// services lists what runs on the host: two daemons of our own, a shell script that wakes now and then, and n processes
// that sleep.
func services(n int) []control.SpawnArgs {
	list := []control.SpawnArgs{
		{Comm: "echod", CPU: -1},
		{Comm: "tickd", CPU: -1, UID: 33},
		{Comm: "crond", CPU: -1, Argv: []string{"sh", "-c", "while sleep 5; do cat /proc/loadavg >/run/loadavg; done"}},
	}
	names := []string{"syslogd", "dbus-daemon", "sshd", "getty", "agetty", "nginx", "postgres", "redis", "worker"}
	for i := range n {
		list = append(list, control.SpawnArgs{
			Comm: names[i%len(names)], CPU: -1, UID: uint32(100 + i%3*450), Argv: []string{"sleep", "1000000"},
		})
	}
	return list
}

// watchPowerButton shuts down in order when the power button is pressed, as a server's userland does.
func watchPowerButton() {
	devs, _ := filepath.Glob("/dev/input/event*") // none: then there is no button
	for _, d := range devs {
		go func() {
			f, err := os.Open(d)
			if err != nil {
				return
			}
			defer f.Close()
			r := bufio.NewReader(f)
			for {
				// struct input_event of 64-bit machines: struct timeval, __u16 type, __u16 code, __s32 value
				// (include/uapi/linux/input.h, Linux 6.1).
				var ev struct {
					Sec, Usec  int64
					Type, Code uint16
					Value      int32
				}
				if err := binary.Read(r, binary.LittleEndian, &ev); err != nil {
					return
				}
				const evKey, keyPower = 1, 116 // include/uapi/linux/input-event-codes.h
				if ev.Type == evKey && ev.Code == keyPower && ev.Value == 1 {
					fmt.Println("hostinit: the power button was pressed: shutting down")
					unix.Sync()
					if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
						fmt.Fprintln(os.Stderr, "hostinit: power off:", err)
					}
				}
			}
		}()
	}
}

// openLine opens a serial port as a clean pipe for bytes.
func openLine(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the control line: %w", err)
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("set up the control line: %w", err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("set up the control line: %w", err)
	}
	return f, nil
}

func clock() control.Clock {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return control.Clock{Wall: time.Now()} // cannot happen since Linux 2.6.39
	}
	return control.Clock{Boot: time.Duration(ts.Nano()), Wall: time.Now()}
}

func ready() control.Ready {
	text := func(path string) string {
		b, _ := os.ReadFile(path) // an empty answer tells that proc lacks it
		return string(bytes.TrimSpace(b))
	}
	cpus, _ := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
	return control.Ready{
		Boot:     text("/proc/sys/kernel/random/boot_id"),
		Release:  text("/proc/sys/kernel/osrelease"),
		Banner:   text("/proc/version"),
		Hostname: text("/proc/sys/kernel/hostname"),
		CPUs:     len(cpus),
		Clock:    clock(),
	}
}
