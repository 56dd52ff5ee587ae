// Init is the whole userland of the virtual machines in which tests let things go wrong: process 1 of a stock
// kernel. It takes commands on the second serial line, one a line, and answers with one line of JSON. It tells of each child
// that ends with a line {"exit": pid, "signal": n}.
//
//	spawn KIND   start a child: spin, sleep, nanosleep, blocked, blockedspin, threads, thread (of which another thread than the first spins), forks, stopped, zombie, bomb, rootbomb,
//	             hog, roothog (of which the OOM killer keeps off), rootforkN (N processes, one after the
//	             other), rootfiles (open files, until there are no more), rootio (reads /dev/vda), roottmpfs (fills a
//	             file system in memory), rootsyn (begins connections from addresses that there are not), rootfifo (has real-time priority without an end, on the last CPU), rootpinned (wants to run there, too), rootstall (asks for more memory than its control group is to have), rootload (what building
//	             a program asks of a machine), rootnet (talks to itself by TCP), rootcode (gets itself memory that may be executed, after a minute), rootexec (becomes a program that may execute its memory, after 15 s), su (becomes root as by su(1)), rootbase (what a database does that takes its memory at its start), rootbpf (has an eBPF program "quiet" look at all that it sends to itself), rootwriter (loads one, "writer", that may write into the memory of others)
//	spawn fault=NAME  start a child that has the fault module do something, and stays
//	load NAME P  load the module of the file /NAME with parameters
//	unload NAME  take a module out
//	dmesg        all records of /dev/kmsg with level 4 (warning) or worse
//	sysrq X      press the key
//	kill N       end a child and what it has started, with SIGKILL
//	up NAME      switch a network interface on
//	settime S    set the wall clock ahead, or back, by so many seconds
//	uptime       CLOCK_MONOTONIC in ns
//	cat FILE     what is in it, or in the directory
//	programs     the names of all eBPF programs
//	write FILE TEXT  write the words into the file
//	patch        have the kernel patch its own code: trace all functions, flip a static key
package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
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
			err := load("/"+arg, strings.Join(f[min(2, len(f)):], " "))
			if err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"loaded": arg})
		case "unload":
			if err := unix.DeleteModule(arg, unix.O_NONBLOCK); err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"unloaded": arg})
		case "dmesg":
			say(map[string]any{"dmesg": dmesg()})
		case "programs":
			say(map[string]any{"programs": programs()})
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
		case "kill":
			n, err := strconv.Atoi(arg)
			if err == nil {
				err = unix.Kill(-n, unix.SIGKILL)
			}
			if err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"killed": arg})
		case "up":
			if err := up(arg); err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"up": arg})
		case "settime":
			n, err := strconv.Atoi(arg)
			now := unix.NsecToTimeval(time.Now().Add(time.Duration(n) * time.Second).UnixNano())
			if err == nil {
				err = unix.Settimeofday(&now)
			}
			if err != nil {
				say(map[string]string{"error": err.Error()})
				continue
			}
			say(map[string]string{"set": arg})
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

func load(file, parameters string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), parameters, 0)
}

func start(kind string) (int, error) {
	c := exec.Command("/proc/self/exe", kind)
	if !strings.HasPrefix(kind, "root") {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	}
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.SysProcAttr.Setpgid = true
	if kind == "su" {
		if err := setUID("/init", "/su"); err != nil {
			return 0, err
		}
	}
	if kind == "rootfifo" {
		c.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1") // Go's own scheduler would have it sleep for moments
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

// setUID makes a copy of a program by which each user becomes root, once.
func setUID(program, as string) error {
	if _, err := os.Stat(as); err == nil {
		return nil
	}
	code, err := os.ReadFile(program)
	if err == nil {
		err = os.WriteFile(as, code, 0o755)
	}
	if err == nil {
		err = os.Chmod(as, 0o755|os.ModeSetuid)
	}
	return err
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
	case "thread":
		go func() {
			runtime.LockOSThread()
			for spins := 0; ; spins++ { // what it is for
			}
		}()
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
			if _, e := fork(); e != 0 {
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
	if n, ok := strings.CutPrefix(kind, "rootfork"); ok {
		many, _ := strconv.Atoi(n)
		for range many {
			pid, e := fork()
			for pid == 0 && e == 0 {
				unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0) // for ever
			}
			unix.Nanosleep(&unix.Timespec{Nsec: 10e6}, nil)
		}
	}
	switch kind {
	case "rootfiles":
		const many = 60000
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: many, Max: many})
		syscall.Setuid(1000) // root has no limit for all together
		for i := range many {
			fd, err := unix.Open("/dev/null", unix.O_RDONLY, 0)
			if err != nil || i%100 == 99 {
				unix.Nanosleep(&unix.Timespec{Nsec: 10e6}, nil)
			}
			_ = fd
		}
	case "compile": // 60 MB within a moment, then gone
		all := make([][]byte, 0, 64)
		for range 60 {
			b := make([]byte, 1<<20)
			for k := range b {
				b[k] = byte(k * k)
			}
			all = append(all, b)
		}
		os.Exit(len(all) & 1)
	case "rootio":
		fd, err := unix.Open("/dev/vda", unix.O_RDONLY|unix.O_DIRECT, 0)
		b, merr := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		for at := int64(0); err == nil && merr == nil; at += 4096 {
			_, err = unix.Pread(fd, b, at%(16<<20))
		}
	case "roottmpfs": // 16 MiB, of which all but a little is used
		const at = "/tmp-full"
		os.MkdirAll(at, 0o755)
		if unix.Mount("tmpfs", at, "tmpfs", 0, "size=16m") == nil {
			block := make([]byte, 1<<20)
			if f, err := os.Create(at + "/log"); err == nil {
				for range 16 {
					f.Write(block)
				}
			}
		}
	case "rootsyn":
		flood()
	case "rootcode": // after a while puts code into itself
		unix.Nanosleep(&unix.Timespec{Sec: 60}, nil)
		unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	case "rootexec": // as what starts a program when its database answers
		unix.Nanosleep(&unix.Timespec{Sec: 15}, nil)
		unix.Exec("/proc/self/exe", []string{"exe", "rootjit"}, os.Environ())
	case "rootjit":
		unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	case "su": // is a user for a while, becomes root's by a program of root's, and starts another as root
		time.Sleep(2 * time.Second)
		unix.Exec("/su", []string{"exe", "sued"}, os.Environ())
		os.Exit(1)
	case "sued":
		time.Sleep(time.Second)
		if err := syscall.Setuid(0); err == nil {
			unix.Exec("/init", []string{"exe", "rooted"}, os.Environ())
		}
		os.Exit(1)
	case "rooted":
		time.Sleep(2 * time.Second)
		os.Exit(0)
	case "rootbase": // takes three eighths of 512 MiB at once and works there, as databases and virtual machines of languages do
		const size = 192 << 20
		b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		for i := 0; err == nil; i = (i + 4096) % size {
			b[i]++
		}
	case "rootfifo":
		os.WriteFile("/proc/sys/kernel/sched_rt_runtime_us", []byte("-1"), 0) // what keeps something back for others
		pin()
		const fifo = 1 // SCHED_FIFO, include/uapi/linux/sched.h
		unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: fifo, Priority: 50}, 0)
		for spins := 0; ; spins++ { // what it is for
		}
	case "rootpinned":
		pin()
		for spins := 0; ; spins++ { // as soon as it is let
		}
	case "rootstall":
		stall()
	case "rootbpf":
		filtered()
	case "rootwriter":
		writes()
	case "rootnet":
		talk()
	case "rootload":
		build()
	}
	for {
		unix.Pause()
	}
}

// fork is fork(2), which architectures that are younger do not have. The child may do nothing but system calls.
func fork() (uintptr, syscall.Errno) {
	pid, _, e := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	return pid, e
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

// flood begins connections with a listener of its own from addresses that do not exist, in the network of eth0: SYNs by a raw socket, 1000 of
// them a second.
func flood() {
	const port = 4321
	up("lo")
	// Packets from elsewhere come over the loopback interface here.
	// The answers go out where nobody is.
	if s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0); err == nil {
		for _, x := range []struct {
			order uint
			addr  []byte
		}{{unix.SIOCSIFADDR, []byte{10, 0, 0, 1}}, {unix.SIOCSIFNETMASK, []byte{255, 0, 0, 0}}} {
			if ifr, err := unix.NewIfreq("eth0"); err == nil {
				ifr.SetInet4Addr(x.addr)
				unix.IoctlIfreq(s, x.order, ifr)
			}
		}
		unix.Close(s)
	}
	up("eth0")
	for _, dev := range []string{"all", "default", "lo"} {
		os.WriteFile("/proc/sys/net/ipv4/conf/"+dev+"/rp_filter", []byte("0"), 0)
		os.WriteFile("/proc/sys/net/ipv4/conf/"+dev+"/accept_local", []byte("1"), 0)
	}
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil || unix.Bind(l, &unix.SockaddrInet4{Port: port, Addr: [4]byte{10, 0, 0, 1}}) != nil || unix.Listen(l, 16) != nil {
		return
	}
	raw, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return
	}
	sum := func(b []byte) uint16 {
		n := uint32(0)
		for i := 0; i+1 < len(b); i += 2 {
			n += uint32(b[i])<<8 | uint32(b[i+1])
		}
		for n>>16 != 0 {
			n = n&0xffff + n>>16
		}
		return ^uint16(n)
	}
	for i := uint32(0); ; i++ {
		p := make([]byte, 40)
		p[0], p[3], p[8], p[9] = 0x45, 40, 64, unix.IPPROTO_TCP
		copy(p[12:], []byte{10, 1 + byte(i>>16), byte(i >> 8), byte(i)})
		copy(p[16:], []byte{10, 0, 0, 1})
		tcp := p[20:]
		binary.BigEndian.PutUint16(tcp, uint16(1024+i%60000))
		binary.BigEndian.PutUint16(tcp[2:], port)
		binary.BigEndian.PutUint32(tcp[4:], i)
		tcp[12], tcp[13] = 0x50, 2 // SYN
		binary.BigEndian.PutUint16(tcp[14:], 1024)
		pseudo := append(append([]byte{}, p[12:20]...), 0, unix.IPPROTO_TCP, 0, 20)
		binary.BigEndian.PutUint16(tcp[16:], sum(append(pseudo, tcp...)))
		unix.Sendto(raw, p, 0, &unix.SockaddrInet4{Addr: [4]byte{10, 0, 0, 1}})
		if i%10 == 9 {
			unix.Nanosleep(&unix.Timespec{Nsec: 10e6}, nil)
		}
	}
}

// talk sends itself what it can by TCP over the loopback interface, a connection for each 16 MiB.
func talk() {
	up("lo")
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	for {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		block := make([]byte, 64<<10)
		for range 256 {
			if _, err := c.Write(block); err != nil {
				break
			}
		}
		c.Close()
	}
}

// pin has the thread run on the last CPU only.
func pin() {
	var set unix.CPUSet
	set.Set(runtime.NumCPU() - 1)
	unix.SchedSetaffinity(0, &set)
}

// stall asks for ever more memory in a control group that is to have 8 MiB: whoever is beyond memory.high is made to wait by the kernel, which is what
// it counts as a stall, long before anybody lacks memory.
func stall() {
	const at = "/cgroup"
	os.MkdirAll(at, 0o755)
	if err := unix.Mount("cgroup2", at, "cgroup2", 0, ""); err != nil && err != unix.EBUSY {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	os.MkdirAll(at+"/stall", 0o755)
	for _, x := range [][2]string{{"/cgroup.subtree_control", "+memory"}, {"/stall/memory.high", "8M"}, {"/stall/cgroup.procs", strconv.Itoa(os.Getpid())}} {
		if err := os.WriteFile(at+x[0], []byte(x[1]), 0); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return
		}
	}
	const size = 64 << 20
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	for i := 0; err == nil; i = (i + 4096) % size {
		b[i]++
	}
}

// up switches a network interface on.
func up(name string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

// build does what building a program asks of a machine: many short processes that use the CPU and memory, and files that are written,
// mapped and thrown away, more than the memory holds.
func build() {
	const size = 4 << 20
	block := make([]byte, size)
	for i := 0; ; i++ {
		name := "/dev/shm-" + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(i%8)
		for range 4 {
			c := exec.Command("/proc/self/exe", "compile")
			if c.Start() == nil {
				c.Wait()
			}
		}
		for k := range block {
			block[k] = byte(k * i)
		}
		os.WriteFile(name, block, 0o600)
		if f, err := os.Open(name); err == nil {
			if b, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED); err == nil {
				n := byte(0)
				for k := 0; k < size; k += 4096 {
					n += b[k]
				}
				unix.Munmap(b)
			}
			f.Close()
		}
		os.Remove(name)
	}
}
