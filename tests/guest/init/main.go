// Init is the whole userland of the virtual machines in which tests let things go wrong: process 1 of a stock
// kernel. It takes commands on the second serial line, one a line, and answers with one line of JSON. It tells of each child
// that ends with a line {"exit": pid, "signal": n}.
//
//	spawn KIND   start a child: spin, sleep, nanosleep, blocked, blockedspin, threads, forks, stopped, zombie, bomb, rootbomb,
//	             hog, roothog (of which the OOM killer keeps off)
//	spawn fault=NAME  start a child that has the fault module do something, and stays
//	load NAME    load the module of the file /NAME
//	dmesg        all records of /dev/kmsg with level 4 (warning) or worse
//	sysrq X      press the key
//	uptime       CLOCK_MONOTONIC in ns
//	cat FILE     what is in it, or in the directory
//	write FILE TEXT  write the words into the file
//	patch        have the kernel patch its own code: trace all functions, flip a static key
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) > 1 {
		child(os.Args[1])
	}
	for _, m := range [][2]string{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		os.MkdirAll(m[0], 0o755)
		if err := unix.Mount(m[1], m[0], m[1], 0, ""); err != nil && err != unix.EBUSY {
			fmt.Println("mount", m[0], err)
		}
	}
	os.WriteFile("/proc/sys/kernel/sysrq", []byte("1\n"), 0)
	os.WriteFile("/proc/sys/kernel/hostname", []byte("guest\n"), 0)
	tty, err := os.OpenFile("/dev/ttyS1", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		fmt.Println(err)
		select {}
	}
	if t, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS); err == nil {
		t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
		t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
		unix.IoctlSetTermios(int(tty.Fd()), unix.TCSETS, t)
	}
	var mu sync.Mutex
	// What a bomb leaves behind is too much to tell of each.
	var quiet atomic.Bool
	var own sync.Map
	say := func(v any) {
		b, err := json.Marshal(v)
		if err != nil {
			b = []byte(`{"error":"cannot say"}`)
		}
		mu.Lock()
		defer mu.Unlock()
		tty.Write(append(b, '\n'))
	}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGCHLD)
	go func() {
		for range sig {
			for {
				var ws unix.WaitStatus
				pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
				if err != nil || pid <= 0 {
					break
				}
				if _, ok := own.Load(pid); ok || !quiet.Load() {
					say(map[string]int{"exit": pid, "signal": int(ws.Signal())})
				}
			}
		}
	}()
	// A fork bomb of root is stopped by letting nobody start a thread for a moment, and a Go program that needs one then ends:
	// this one has them all before.
	for range 12 {
		go func() {
			runtime.LockOSThread()
			time.Sleep(10 * time.Millisecond)
			runtime.UnlockOSThread()
		}()
	}
	say(map[string]string{"ready": "yes"})
	in := bufio.NewScanner(tty)
	for in.Scan() {
		f := strings.Fields(in.Text())
		if len(f) == 0 {
			continue
		}
		arg := ""
		if len(f) > 1 {
			arg = f[1]
		}
		switch f[0] {
		case "spawn":
			quiet.Store(quiet.Load() || strings.HasSuffix(arg, "bomb"))
			pid, err := start(arg)
			own.Store(pid, true)
			if err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]int{"pid": pid})
		case "load":
			err := load("/" + arg)
			if err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"loaded": arg})
		case "dmesg":
			say(map[string]any{"dmesg": dmesg()})
		case "sysrq":
			say(map[string]string{"ok": "pressing"})
			time.Sleep(50 * time.Millisecond)
			os.WriteFile("/proc/sysrq-trigger", []byte(arg), 0)
		case "cat":
			text, err := cat(arg)
			if err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"text": text})
		case "write":
			if err := os.WriteFile(arg, []byte(strings.Join(f[min(2, len(f)):], " ")), 0); err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"written": arg})
		case "patch":
			if err := patch(); err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"patched": "yes"})
		case "uptime":
			var ts unix.Timespec
			unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
			say(map[string]int64{"mono": ts.Nano()})
		default:
			say(map[string]string{"error": "unknown command"})
		}
	}
	select {}
}

func cat(file string) (string, error) {
	if i, err := os.Stat(file); err == nil && i.IsDir() {
		var names []string
		all, err := os.ReadDir(file)
		for _, e := range all {
			names = append(names, e.Name())
		}
		return strings.Join(names, "\n"), err
	}
	b, err := os.ReadFile(file)
	return string(b), err
}

// patch has some 50000 places of the kernel's code patched, leaves them so for a while, and has them patched back.
func patch() error {
	const tracing = "/sys/kernel/tracing"
	if err := unix.Mount("tracefs", tracing, "tracefs", 0, ""); err != nil && err != unix.EBUSY {
		return fmt.Errorf("mount tracefs: %w", err)
	}
	for _, x := range []struct{ file, text string }{
		{"/proc/sys/kernel/sched_schedstats", "1"}, {tracing + "/current_tracer", "function"}, {"", ""},
		{tracing + "/current_tracer", "nop"}, {"/proc/sys/kernel/sched_schedstats", "0"},
	} {
		if x.file == "" {
			time.Sleep(3 * time.Second)
			continue
		}
		if err := os.WriteFile(x.file, []byte(x.text+"\n"), 0); err != nil {
			return err
		}
	}
	return nil
}

func load(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

func start(kind string) (int, error) {
	c := exec.Command("/proc/self/exe", kind)
	if !strings.HasPrefix(kind, "root") {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := c.Start(); err != nil {
		return 0, err
	}
	// The child says which of its (or its child's) PIDs is meant, once it does what it is for.
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err == nil && kind == "stopped" {
		err = unix.Kill(pid, unix.SIGSTOP)
	}
	return pid, err
}

func blockAll() {
	set := ^uint64(0)
	unix.Syscall6(unix.SYS_RT_SIGPROCMASK, 2, uintptr(unsafe.Pointer(&set)), 0, 8, 0, 0)
}

// child is what a started process does.
func child(kind string) {
	runtime.LockOSThread()
	unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&append([]byte("v-"+kind), 0)[0])), 0, 0, 0)
	pid := os.Getpid()
	switch kind {
	case "blocked", "blockedspin":
		blockAll()
	case "threads":
		for range 3 {
			go func() {
				runtime.LockOSThread()
				unix.Pause()
			}()
		}
	case "roothog":
		os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	case "zombie": // a child whose parent never takes note of its death
		c := exec.Command("/proc/self/exe", "sleep")
		if err := c.Start(); err != nil {
			os.Exit(1)
		}
		fmt.Println(c.Process.Pid)
		for {
			unix.Pause()
		}
	}
	fmt.Println(pid)
	if fault, ok := strings.CutPrefix(kind, "fault="); ok {
		if err := os.WriteFile("/proc/bdfault", []byte(strings.ReplaceAll(fault, "_", " ")), 0); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	switch kind {
	case "spin", "blockedspin", "threads":
		for spins := 0; ; spins++ { // what it is for
		}
	case "nanosleep":
		for {
			unix.Nanosleep(&unix.Timespec{Sec: 1000}, nil)
		}
	case "forks":
		for {
			c := exec.Command("/proc/self/exe", "exit")
			if c.Start() == nil {
				var ws unix.WaitStatus
				unix.Wait4(c.Process.Pid, &ws, 0, nil)
			}
		}
	case "bomb", "rootbomb":
		for {
			if _, _, e := unix.RawSyscall(unix.SYS_FORK, 0, 0, 0); e != 0 {
				unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			}
		}
	case "hog", "roothog":
		const size = 8 << 20
		for {
			b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			for i := 0; err == nil && i < size; i += 4096 {
				b[i] = 1
			}
		}
	case "exit":
		os.Exit(0)
	}
	for {
		unix.Pause()
	}
}

// dmesg returns what the kernel has complained about.
func dmesg() []string {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return []string{err.Error()}
	}
	defer unix.Close(fd)
	out := []string{}
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
		prefix, _, _ := strings.Cut(head, ",")
		if p, err := strconv.Atoi(prefix); err == nil && p&7 <= 4 && p>>3 == 0 {
			text, _, _ = strings.Cut(text, "\n")
			out = append(out, text)
		}
	}
}
