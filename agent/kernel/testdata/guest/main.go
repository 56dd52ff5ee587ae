// Guest is the whole userland of the virtual machine that the tests of package kernel look into: process 1 of a stock
// kernel. It makes processes of every kind and tells over a serial line of its own what it knows of its own system, so
// that the model made from memory can be compared with the kernel's own word.
//
// One command a line; the answer is one line of JSON. "ps" lists every thread by /proc, "dmesg" the records of
// /dev/kmsg, "clock" the clocks, "irqs" the counters, "kallsyms" a hash over the symbol table, "iomem" the RAM.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Thread is one thread as /proc tells.
type Thread struct {
	PID, TGID, PPID, UID, CPU int
	Comm, State               string
	Flags                     uint64
	UTime, STime, Start       uint64 // clock ticks of 10 ms
	Runtime                   uint64 // ns, from schedstat
	RSS                       uint64 // bytes
	Switches                  uint64
}

// Record is one record of /dev/kmsg.
type Record struct {
	Prefix, Seq, Micros uint64
	Text                string
}

func main() {
	// The kernel gives parameters that it does not know to its init; "boxed" is process 1 of its own namespace.
	if len(os.Args) > 1 && (os.Getpid() != 1 || os.Args[1] == "boxed") {
		child(os.Args[1])
	}
	for _, m := range [][3]string{{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"dev", "/dev", "devtmpfs"}} {
		os.MkdirAll(m[1], 0o755)
		if err := unix.Mount(m[0], m[1], m[2], 0, ""); err != nil && err != unix.EBUSY {
			fmt.Println("mount", m[1], err)
		}
	}
	os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on\n"), 0)
	os.WriteFile("/proc/sys/kernel/sysrq", []byte("1\n"), 0)
	os.WriteFile("/proc/sys/kernel/hostname", []byte("guest\n"), 0)
	for _, kind := range []string{"sleep", "threads", "user", "zombie", "stopped", "memory"} {
		start(kind)
	}
	line := map[string]string{"amd64": "/dev/ttyS1", "arm64": "/dev/ttyS0"}[runtime.GOARCH] // QEMU's virt has its console elsewhere
	tty, err := os.OpenFile(line, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		fmt.Println(err)
		select {}
	}
	if t, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS); err == nil {
		t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
		t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
		unix.IoctlSetTermios(int(tty.Fd()), unix.TCSETS, t)
	}
	fmt.Fprintln(tty, `"ready"`)
	in := bufio.NewScanner(tty)
	for in.Scan() {
		out, err := json.Marshal(answer(strings.Fields(in.Text())))
		if err != nil {
			out, _ = json.Marshal(err.Error())
		}
		tty.Write(append(out, '\n'))
	}
	select {}
}

func start(kind string) error {
	c := exec.Command("/proc/self/exe", kind)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	if kind == "user" {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	}
	if err := c.Start(); err != nil {
		return err
	}
	if kind == "stopped" {
		time.Sleep(100 * time.Millisecond)
		return c.Process.Signal(unix.SIGSTOP)
	}
	return nil // nobody waits: "zombie" stays one
}

// child is what a started process does.
func child(kind string) {
	unix.Prctl(unix.PR_SET_NAME, uintptr(ptr("g-"+kind)), 0, 0, 0)
	runtime.GOMAXPROCS(1)
	switch kind {
	case "zombie":
		os.Exit(0)
	case "boxed":
		boxed()
	case "confined":
		confined()
	case "locks":
		locks()
	case "churn":
		churn()
	case "spin":
		for {
		}
	case "memory":
		b := make([]byte, 32<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		defer runtime.KeepAlive(b)
	case "threads":
		for range 6 {
			go func() {
				runtime.LockOSThread()
				unix.Pause()
			}()
		}
	case "fork":
		for {
			var ws unix.WaitStatus
			c := exec.Command("/proc/self/exe", "zombie")
			if c.Start() == nil {
				unix.Wait4(c.Process.Pid, &ws, 0, nil)
			}
		}
	}
	for {
		unix.Pause()
	}
}

func answer(cmd []string) any {
	if len(cmd) == 0 {
		return "empty"
	}
	var arg string
	if len(cmd) > 1 {
		arg = cmd[1]
	}
	switch cmd[0] {
	case "ps":
		return ps()
	case "dmesg":
		return dmesg()
	case "clock":
		var mono, real, boot unix.Timespec
		unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono)
		unix.ClockGettime(unix.CLOCK_REALTIME, &real)
		unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
		return map[string]int64{"mono": mono.Nano(), "real": real.Nano(), "boot": boot.Nano()}
	case "irqs":
		b, _ := os.ReadFile("/proc/interrupts")
		return string(b)
	case "stat":
		b, _ := os.ReadFile("/proc/stat")
		return string(b)
	case "iomem":
		b, _ := os.ReadFile("/proc/iomem")
		return string(b)
	case "cpuinfo":
		b, _ := os.ReadFile("/proc/cpuinfo")
		return string(b)
	case "version":
		b, _ := os.ReadFile("/proc/version")
		return string(b)
	case "kallsyms":
		return kallsyms()
	case "spawn": // spawn KIND N
		n := 1
		if len(cmd) > 2 {
			n, _ = strconv.Atoi(cmd[2])
		}
		for range n {
			if err := start(arg); err != nil {
				return err.Error()
			}
		}
		return "ok"
	case "kmsg":
		n, _ := strconv.Atoi(arg)
		f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
		if err != nil {
			return err.Error()
		}
		defer f.Close()
		for i := range n {
			fmt.Fprintf(f, "<13>guest: line %d %s", i, strings.Repeat("x", i%200))
		}
		return "ok"
	case "kexec": // load the kernel in /kexec, to be started at once, or when this one crashes
		return loadKernel(arg)
	case "ramoops":
		return loadRamoops()
	case "pstore":
		return pstore()
	case "sysrq":
		return fmt.Sprint(os.WriteFile("/proc/sysrq-trigger", []byte(arg), 0))
	}
	if cmd[0] == "write" { // write FILE TEXT, which adds to what is there; without TEXT it is emptied
		if len(cmd) < 3 {
			return said(write(arg, ""))
		}
		return said(add(arg, strings.Join(cmd[2:], " ")+"\n"))
	}
	return listing(cmd[0], arg)
}

func add(file, text string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// said is "ok", or what went wrong.
func said(err error) string {
	if err != nil {
		return err.Error()
	}
	return "ok"
}

// loadKernel loads /kexec/vmlinuz and /kexec/initrd as this kernel's successor; "now" starts it, "crash" leaves it for a panic.
func loadKernel(when string) string {
	kernel, err := os.Open("/kexec/vmlinuz")
	if err != nil {
		return err.Error()
	}
	defer kernel.Close()
	initrd, err := os.Open("/kexec/initrd")
	if err != nil {
		return err.Error()
	}
	defer initrd.Close()
	own, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err.Error()
	}
	var line []string
	for _, f := range strings.Fields(string(own)) {
		if !strings.HasPrefix(f, "crashkernel=") {
			line = append(line, f)
		}
	}
	flags := 0
	if when == "crash" {
		flags = unix.KEXEC_FILE_ON_CRASH
		line = append(line, "nr_cpus=1", "reset_devices")
	}
	if err := unix.KexecFileLoad(int(kernel.Fd()), int(initrd.Fd()), strings.Join(line, " "), flags); err != nil {
		return err.Error()
	}
	if when == "now" {
		go func() {
			time.Sleep(200 * time.Millisecond) // the answer goes out first
			unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC)
		}()
	}
	return "ok"
}

// loadRamoops loads the modules of the initramfs, with the parameters that the command line has for them, as modprobe(8) does.
func loadRamoops() string {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err.Error()
	}
	names, _ := filepath.Glob("/modules/*.ko")
	for _, name := range names {
		var params []string
		_, module, _ := strings.Cut(strings.TrimSuffix(filepath.Base(name), ".ko"), "-")
		for _, word := range strings.Fields(string(line)) {
			if p, ok := strings.CutPrefix(word, module+"."); ok {
				params = append(params, p)
			}
		}
		b, err := os.ReadFile(name)
		if err == nil {
			err = unix.InitModule(b, strings.Join(params, " "))
		}
		if err != nil {
			return fmt.Sprintf("load %s: %v", name, err)
		}
	}
	return "ok"
}

// pstore mounts the file system of that name and returns what its files hold.
func pstore() any {
	if err := unix.Mount("pstore", "/sys/fs/pstore", "pstore", 0, ""); err != nil && err != unix.EBUSY {
		return err.Error()
	}
	files := make(map[string]string)
	names, _ := filepath.Glob("/sys/fs/pstore/*")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return err.Error()
		}
		files[filepath.Base(name)] = string(b)
	}
	return files
}

func kallsyms() any {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	h, n := fnv.New64a(), 0
	for in := bufio.NewScanner(f); in.Scan(); {
		if strings.HasSuffix(in.Text(), "]") {
			continue // a module's
		}
		h.Write(append(in.Bytes(), '\n'))
		n++
	}
	return map[string]any{"hash": fmt.Sprintf("%x", h.Sum64()), "count": n}
}

func dmesg() any {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	var out []Record
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EPIPE {
			continue
		}
		if err != nil || n <= 0 {
			return out
		}
		head, text, _ := strings.Cut(string(buf[:n]), ";")
		text, _, _ = strings.Cut(text, "\n")
		f := strings.Split(head, ",")
		out = append(out, Record{num(f[0]), num(f[1]), num(f[2]), text})
	}
}

func ps() []Thread {
	var out []Thread
	dirs, _ := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	for _, d := range dirs {
		stat, err := os.ReadFile(d + "/stat")
		if err != nil {
			continue
		}
		end := bytes.LastIndexByte(stat, ')')
		f := strings.Fields(string(stat[end+1:]))
		t := Thread{State: f[0], PPID: int(num(f[1])), Flags: num(f[6]), UTime: num(f[11]), STime: num(f[12]),
			Start: num(f[19]), RSS: num(f[21]) * uint64(os.Getpagesize()), CPU: int(num(f[36]))}
		// comm as the status file has it: the stat file may add a workqueue's description.
		status, _ := os.Open(d + "/status")
		if status == nil {
			continue
		}
		b, _ := io.ReadAll(status)
		status.Close()
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(line, ":")
			v = strings.TrimSpace(v)
			switch k {
			case "Tgid":
				t.TGID = int(num(v))
			case "Pid":
				t.PID = int(num(v))
			case "Uid":
				t.UID = int(num(strings.Fields(v)[1]))
			case "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches":
				t.Switches += num(v)
			}
		}
		comm, _ := os.ReadFile(d + "/comm")
		t.Comm = strings.TrimSuffix(string(comm), "\n")
		if s, err := os.ReadFile(d + "/schedstat"); err == nil {
			t.Runtime = num(strings.Fields(string(s))[0])
		}
		out = append(out, t)
	}
	return out
}

func num(s string) uint64 {
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}
