package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// containerID is that of the container which objects makes.
const containerID = "4f1c0ffee4f1c0ffee4f1c0ffee4f1c0ffee4f1c0ffee4f1c0ffee4f1c0ffee4"

// objects makes what the kernel keeps tables of: a container, tasks that wait for each other's locks, eBPF, probes, keys, swap
// and I/O that does not end.
func objects() error {
	for _, step := range []struct {
		name string
		do   func() error
	}{{"container", container}, {"swap", swap}, {"confined", confinedTask}, {"locks", lockers}, {"bpf", bpfObjects}, {"probes", probes}, {"keys", keys}, {"pipes", pipes}} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

func write(path, text string) error { return os.WriteFile(path, []byte(text), 0o644) }

// first returns the first error.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func container() error {
	box := "/cgroup/docker/" + containerID
	err := first(write("/cgroup/cgroup.subtree_control", "+cpu"), os.Mkdir("/cgroup/docker", 0o755),
		write("/cgroup/docker/cgroup.subtree_control", "+cpu +pids +memory"), os.Mkdir(box, 0o755),
		write(box+"/cpu.max", "50000 100000"), write(box+"/cpu.weight", "200"), write(box+"/memory.max", "67108864"), write(box+"/memory.high", "62914560"),
		write("/cgroup/a/cpu.weight", "50"), write("/cgroup/c/cgroup.freeze", "1"))
	if err != nil {
		return err
	}
	c := exec.Command("/proc/self/exe", "boxed")
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWNS | unix.CLONE_NEWIPC}
	if err := c.Start(); err != nil {
		return err
	}
	return write(box+"/cgroup.procs", strconv.Itoa(c.Process.Pid))
}

func boxed() {
	unix.Sethostname([]byte("boxed"))
	for {
		unix.Pause()
	}
}

// swap makes a swap area of the second disk.
func swap() error {
	const disk = "/dev/vdb"
	if _, err := os.Stat(disk); err != nil {
		return nil // the machine has none
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	page := make([]byte, os.Getpagesize())
	binary.LittleEndian.PutUint32(page[1024:], 1)
	binary.LittleEndian.PutUint32(page[1028:], uint32(16<<20/len(page)-1)) // last page
	copy(page[len(page)-10:], "SWAPSPACE2")
	if _, err := f.WriteAt(page, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	name := append([]byte(disk), 0)
	if _, _, e := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(&name[0])), 0x8000|3, 0); e != 0 { // SWAP_FLAG_PREFER
		return e
	}
	return nil
}

func confinedTask() error {
	c := exec.Command("/proc/self/exe", "confined", "argument with spaces")
	c.Env, c.Dir = []string{"GUEST=some value", "EMPTY="}, "/run/sub"
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1001, Gid: 1002, Groups: []uint32{7, 8, 1002}}, AmbientCaps: []uintptr{unix.CAP_NET_RAW}}
	ready := make([]byte, 1)
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	c.Stdout = w
	if err := write("/run/mapped", strings.Repeat("mapped file ", 2*os.Getpagesize()/4)); err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	w.Close()
	_, err = r.Read(ready)
	id := strconv.Itoa(c.Process.Pid)
	if err == nil {
		err = first(write("/proc/"+id+"/oom_score_adj", "500"), unix.Setpriority(unix.PRIO_PROCESS, c.Process.Pid, 5))
		param := [1]uint32{7}
		if _, _, e := unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, uintptr(c.Process.Pid), 1, uintptr(unsafe.Pointer(&param))); err == nil && e != 0 {
			err = e
		}
	}
	return err
}

// confined has memory of all kinds, and a filter of its system calls.
func confined() {
	runtime.LockOSThread()
	page := os.Getpagesize()
	fail := func(what string, err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "confined:", what, err)
			os.Exit(1)
		}
	}
	f, err := os.Open("/run/mapped")
	fail("open", err)
	shared, err := unix.Mmap(int(f.Fd()), 0, 5*page, unix.PROT_READ, unix.MAP_SHARED)
	fail("map", err)
	f.Close()
	os.Stderr.WriteString(string(shared[:0:0]) + strings.Repeat("", int(shared[0]+shared[page]+shared[3*page])))
	anon, err := unix.Mmap(-1, 0, 16*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	fail("map", err)
	for i := range 8 {
		copy(anon[i*page:], fmt.Sprintf("page %d of anonymous memory", i))
	}
	fail("pageout", unix.Madvise(anon[2*page:4*page], 21)) // MADV_PAGEOUT
	_, err = unix.Mmap(-1, 0, 3*page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	fail("map", err)
	fail("no_new_privs", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	allow := [1]unix.SockFilter{{Code: 0x06, K: 0x7fff0000}} // RET ALLOW
	prog := unix.SockFprog{Len: 1, Filter: &allow[0]}
	fail("seccomp", unix.Prctl(unix.PR_SET_SECCOMP, 2, uintptr(unsafe.Pointer(&prog)), 0, 0))
	os.Stdout.Write([]byte("."))
	for {
		unix.Pause()
	}
}

func lockers() error {
	c := exec.Command("/proc/self/exe", "locks")
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	c.Stdout, c.Stderr = w, os.Stderr
	if err := c.Start(); err != nil {
		return err
	}
	w.Close()
	_, err = r.Read(make([]byte, 1))
	return err
}

// locks has threads that hold locks of the kernel, because the memory that they copy meanwhile is one whose page faults nobody
// answers (userfaultfd), and threads that wait for these locks.
func locks() {
	fail := func(what string, err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "locks:", what, err)
			os.Exit(1)
		}
	}
	const pages = 8
	region, err := unix.Mmap(-1, 0, pages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	fail("map", err)
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if e != 0 {
		fail("userfaultfd", e)
	}
	api := [3]uint64{0xaa}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, fd, 0xc018aa3f, uintptr(unsafe.Pointer(&api))); e != 0 { // UFFDIO_API
		fail("UFFDIO_API", e)
	}
	register := [4]uint64{uint64(uintptr(unsafe.Pointer(&region[0]))), pages * 4096, 1} // UFFDIO_REGISTER_MODE_MISSING
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, fd, 0xc020aa00, uintptr(unsafe.Pointer(&register))); e != 0 {
		fail("UFFDIO_REGISTER", e)
	}
	var pipe [2]int
	fail("pipe", unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	fail("mkdir", os.MkdirAll("/run/locks/dir/sub", 0o755))
	file, err := unix.Open("/run/locks/file", unix.O_RDWR|unix.O_CREAT, 0o644)
	fail("open", err)
	dir, err := unix.Open("/run/locks/dir", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	fail("open", err)
	word := new(uint32)
	page := func(i int) uintptr { return uintptr(unsafe.Pointer(&region[i*4096])) }
	lockPI := func() uintptr {
		_, _, e := unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(word)), 6, 0, 0, 0, 0) // FUTEX_LOCK_PI
		return uintptr(e)
	}
	byteOf := []byte{'x'}
	for _, t := range []struct {
		name, in string // where its stack shows it
		do       func()
	}{
		{"l-pipe-own", "handle_userfault", func() { unix.Syscall(unix.SYS_WRITE, uintptr(pipe[1]), page(0), 1) }},
		{"l-pipe-wait", "pipe_write", func() { unix.Syscall(unix.SYS_WRITE, uintptr(pipe[1]), uintptr(unsafe.Pointer(&byteOf[0])), 1) }},
		{"l-pipe-read", "pipe_read", func() { unix.Read(pipe[0], make([]byte, 1)) }},
		{"l-file-own", "handle_userfault", func() { unix.Syscall6(unix.SYS_PWRITE64, uintptr(file), page(1), 1, 0, 0, 0) }},
		{"l-file-wait", "write_iter", func() { unix.Pwrite(file, []byte("x"), 1) }},
		{"l-dir-own", "handle_userfault", func() { unix.Syscall(unix.SYS_GETDENTS64, uintptr(dir), page(2), 4096) }},
		{"l-dir-wait", "mkdir", func() { unix.Mkdir("/run/locks/dir/new", 0o755) }},
		{"l-pi-own", map[string]string{"amd64": "pause", "arm64": "ppoll"}[runtime.GOARCH], func() { lockPI(); unix.Pause() }},
		{"l-pi-wait", "futex_lock_pi", func() { lockPI() }},
	} {
		tid := make(chan int)
		go func() {
			runtime.LockOSThread()
			unix.Prctl(unix.PR_SET_NAME, uintptr(ptr(t.name)), 0, 0, 0)
			tid <- unix.Gettid()
			t.do()
			fmt.Fprintln(os.Stderr, "locks:", t.name, "ended")
			for {
				unix.Pause()
			}
		}()
		id := <-tid
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			stack, _ := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stack", id))
			if bytes.Contains(stack, []byte(t.in)) {
				break
			}
			if time.Now().After(end) {
				fail(t.name, fmt.Errorf("is not in %s:\n%s", t.in, stack))
			}
		}
	}
	os.Stdout.Write([]byte("."))
	for {
		unix.Pause()
	}
}

func bpf(cmd int, attr []byte) (int, error) {
	fd, _, e := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	if e != 0 {
		return -1, e
	}
	return int(fd), nil
}

// bpfObjects loads a program that lets all packets pass, and links it to a cgroup; and makes a map.
func bpfObjects() error {
	attr := make([]byte, 128)
	le := binary.LittleEndian
	le.PutUint32(attr[0:], 2)  // BPF_MAP_TYPE_ARRAY
	le.PutUint32(attr[4:], 4)  // key_size
	le.PutUint32(attr[8:], 24) // value_size
	le.PutUint32(attr[12:], 100)
	copy(attr[28:], "g_map")
	m, err := bpf(0, attr[:72])
	if err != nil {
		return fmt.Errorf("map: %w", err)
	}
	// r1 = map; r0 = 1; exit
	insns := make([]byte, 32)
	insns[0], insns[1] = 0x18, 0x11 // LD_IMM64 r1, BPF_PSEUDO_MAP_FD
	le.PutUint32(insns[4:], uint32(m))
	insns[16] = 0xb7
	le.PutUint32(insns[20:], 1)
	insns[24] = 0x95
	license := []byte("GPL\x00")
	attr = make([]byte, 128)
	le.PutUint32(attr[0:], 8) // BPF_PROG_TYPE_CGROUP_SKB
	le.PutUint32(attr[4:], 4)
	le.PutUint64(attr[8:], uint64(uintptr(unsafe.Pointer(&insns[0]))))
	le.PutUint64(attr[16:], uint64(uintptr(unsafe.Pointer(&license[0]))))
	copy(attr[48:], "g_prog")
	p, err := bpf(5, attr[:72])
	runtime.KeepAlive(insns)
	if err != nil {
		return fmt.Errorf("program: %w", err)
	}
	cg, err := unix.Open("/cgroup/a", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	attr = make([]byte, 128)
	le.PutUint32(attr[0:], uint32(p))
	le.PutUint32(attr[4:], uint32(cg))
	l, err := bpf(28, attr[:64]) // BPF_LINK_CREATE
	kept = append(kept, m, p, cg, l)
	return err
}

// bpfInfo tells what bpf(2) says of all programs (kind 11), maps (12) or links (31), as the bytes of their info.
func bpfInfo(kind string) any {
	next, byID, size := map[string]int{"prog": 11, "map": 12, "link": 31}[kind], map[string]int{"prog": 13, "map": 14, "link": 30}[kind], 224
	out := make(map[string]string)
	for id := uint32(0); ; {
		attr := make([]byte, 16)
		binary.LittleEndian.PutUint32(attr, id)
		if _, err := bpf(next, attr[:12]); err != nil {
			return out
		}
		id = binary.LittleEndian.Uint32(attr[4:])
		attr = make([]byte, 16)
		binary.LittleEndian.PutUint32(attr, id)
		fd, err := bpf(byID, attr[:12])
		if err != nil {
			continue
		}
		info := make([]byte, size)
		binary.LittleEndian.PutUint32(attr, uint32(fd))
		binary.LittleEndian.PutUint32(attr[4:], uint32(size))
		binary.LittleEndian.PutUint64(attr[8:], uint64(uintptr(unsafe.Pointer(&info[0]))))
		if _, err := bpf(15, attr); err == nil {
			out[strconv.Itoa(int(id))] = hex.EncodeToString(info)
		}
		unix.Close(fd)
	}
}

// probes sets a kprobe and a uprobe, and enables an event.
func probes() error {
	os.MkdirAll("/sys/kernel/tracing", 0o755)
	if err := first(unix.Mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, ""), unix.Mount("debugfs", "/sys/kernel/debug", "debugfs", 0, "")); err != nil {
		return err
	}
	unix.Mount("securityfs", "/sys/kernel/security", "securityfs", 0, "")
	if err := first(write("/sys/kernel/tracing/uprobe_events", "p:guest/uprobe /init:0x2000\n"), write("/sys/kernel/tracing/events/guest/uprobe/enable", "1")); err != nil {
		return err
	}
	return first(write("/sys/kernel/tracing/kprobe_events", "p:guest/probe do_sys_openat2\n"), write("/sys/kernel/tracing/events/guest/probe/enable", "1"),
		write("/sys/kernel/tracing/events/task/task_rename/enable", "1"))
}

func keys() error {
	if _, err := unix.KeyctlJoinSessionKeyring("g-session"); err != nil {
		return err
	}
	_, err := unix.AddKey("user", "g-key", []byte("secret"), unix.KEY_SPEC_SESSION_KEYRING)
	return err
}

func pipes() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	kept = append(kept, r, w)
	if _, err := w.WriteString("hello"); err != nil {
		return err
	}
	if fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0x0300); err == nil { // ETH_P_ALL
		kept = append(kept, fd)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		kept = append(kept, pair)
		_, err = unix.Write(pair[0], []byte("in the queue"))
	}
	return err
}

// readers starts n reads of the first disk, past the page cache.
func readers(n int) any {
	f, err := os.OpenFile("/dev/vda", os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err.Error()
	}
	for i := range n {
		go func() {
			b, _ := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			unix.Pread(int(f.Fd()), b, int64(i+1)<<20)
		}()
	}
	return "ok"
}

// tree returns the files below a directory that a pattern of names matches, by their paths.
func tree(arg string) any {
	dir, names, _ := strings.Cut(arg, ":")
	out := make(map[string]string)
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil
		}
		for name := range strings.SplitSeq(names, ",") {
			if ok, _ := filepath.Match(name, d.Name()); ok {
				b, err := os.ReadFile(path)
				if err == nil && len(b) < 4096 {
					out[path] = string(b)
				}
			}
		}
		return nil
	})
	return out
}

// status returns, of each process, the lines of its status and what else /proc says of it.
func status() any {
	out := make(map[string]map[string]string)
	dirs, _ := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	for _, d := range dirs {
		s := make(map[string]string)
		for _, name := range []string{"status", "cgroup", "wchan", "oom_score_adj", "cmdline", "environ", "stat", "loginuid", "maps", "sched"} {
			if b, err := os.ReadFile(d + "/" + name); err == nil {
				s[name] = string(b)
			}
		}
		for _, name := range []string{"exe", "cwd", "root", "ns/pid", "ns/mnt", "ns/net", "ns/uts", "ns/ipc", "ns/user", "ns/cgroup"} {
			if to, err := os.Readlink(d + "/" + name); err == nil {
				s[name] = to
			}
		}
		out[filepath.Base(d)] = s
	}
	return out
}

// pagemap returns, of each page of a process's mappings, p if it is there, s if it is in swap, and - otherwise.
func pagemap(pid string) any {
	maps, err := os.ReadFile("/proc/" + pid + "/maps")
	if err != nil {
		return err.Error()
	}
	f, err := os.Open("/proc/" + pid + "/pagemap")
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	out := make(map[string]string)
	for line := range strings.Lines(string(maps)) {
		var start, end uint64
		fmt.Sscanf(line, "%x-%x", &start, &end)
		if end-start > 64<<20 || start >= 1<<63 {
			continue
		}
		page := uint64(os.Getpagesize())
		b := make([]byte, (end-start)/page*8)
		f.ReadAt(b, int64(start/page*8))
		var s strings.Builder
		for ; len(b) > 0; b = b[8:] {
			switch e := binary.LittleEndian.Uint64(b); {
			case e>>63 != 0:
				s.WriteByte('p')
			case e>>62&1 != 0:
				s.WriteByte('s')
			default:
				s.WriteByte('-')
			}
		}
		out[fmt.Sprintf("%x", start)] = s.String()
	}
	return out
}

// memory returns memory of a process: "PID:ADDRESS:LENGTH", in hexadecimal.
func memory(arg string) any {
	p := strings.Split(arg, ":")
	if len(p) != 3 {
		return "error: want PID:ADDRESS:LENGTH"
	}
	f, err := os.Open("/proc/" + p[0] + "/mem")
	if err != nil {
		return "error: " + err.Error()
	}
	defer f.Close()
	at, _ := strconv.ParseUint(p[1], 16, 64)
	n, _ := strconv.Atoi(p[2])
	b := make([]byte, min(n, 1<<20))
	if _, err := f.ReadAt(b, int64(at)); err != nil {
		return "error: " + err.Error()
	}
	return hex.EncodeToString(b)
}
