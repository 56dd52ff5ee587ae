package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"golang.org/x/sys/unix"
)

// children starts processes and waits for all of them, including those that the kernel hands to process 1. Nothing else
// in this program may wait for a process.
type children struct {
	onExit func(control.Exit) // set before the control line runs; not called for run

	mu     sync.Mutex
	live   map[int]chan syscall.WaitStatus // guarded by mu; held over fork, so that no child is reaped before it is in
	serial int                             // guarded by mu
}

func newChildren() *children { return &children{live: make(map[int]chan syscall.WaitStatus)} }

// reap waits for every child that ends, for ever.
func (c *children) reap() {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGCHLD)
	for ; ; <-sig {
		for {
			var ws syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
			c.mu.Lock()
			done := c.live[pid]
			delete(c.live, pid)
			c.mu.Unlock()
			if done != nil {
				done <- ws
			}
		}
	}
}

// fork starts path and returns the channel that gets its end.
func (c *children) fork(path string, argv []string, a control.SpawnArgs, files []uintptr, setsid bool) (int, <-chan syscall.WaitStatus, error) {
	attr := &syscall.ProcAttr{Dir: "/", Env: os.Environ(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true}}
	if setsid {
		attr.Sys.Setctty = true
	}
	if a.UID != 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: a.UID, Gid: a.UID}
	}
	if a.CPU >= 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var old, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &old); err != nil {
			return 0, nil, fmt.Errorf("read the affinity: %w", err)
		}
		one.Set(a.CPU)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return 0, nil, fmt.Errorf("pin to CPU %d: %w", a.CPU, err)
		}
		defer unix.SchedSetaffinity(0, &old) // the thread's own former affinity is always valid
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.PID > 1 {
		// The kernel gives out the next free PID; CONFIG_CHECKPOINT_RESTORE is on in Debian's kernels.
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(a.PID-1)), 0); err != nil {
			return 0, nil, fmt.Errorf("choose the PID: %w", err)
		}
	}
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, err
	}
	done := make(chan syscall.WaitStatus, 1)
	c.live[pid] = done
	return pid, done, nil
}

// start starts a process under its own name. Without Argv it is the service of that name in this program.
func (c *children) start(a control.SpawnArgs) (int, error) {
	if a.Comm == "" || len(a.Comm) > 15 || filepath.Base(a.Comm) != a.Comm {
		return 0, fmt.Errorf("%q is no name for a process: want 1 to 15 bytes without a slash", a.Comm)
	}
	program, argv := busybox, a.Argv
	if len(argv) == 0 {
		program, argv = "/init", []string{a.Comm}
	}
	c.mu.Lock()
	c.serial++
	dir := filepath.Join("/programs", strconv.Itoa(c.serial))
	c.mu.Unlock()
	// The kernel takes comm from the last part of the path that is executed.
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, err
	}
	path := filepath.Join(dir, a.Comm)
	if err := os.Link(program, path); err != nil {
		return 0, err
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	out := null.Fd()
	if len(a.Argv) == 0 {
		out = 2 // our own services may complain on the console
	}
	pid, done, err := c.fork(path, argv, a, []uintptr{null.Fd(), out, out}, false)
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", a.Comm, err)
	}
	go func() {
		ws := <-done
		os.RemoveAll(dir) // on a memory file system; nothing depends on it
		if c.onExit != nil {
			c.onExit(ended(pid, ws))
		}
	}()
	return pid, nil
}

func ended(pid int, ws syscall.WaitStatus) control.Exit {
	e := control.Exit{PID: pid, Code: -1, At: clock()}
	if ws.Signaled() {
		e.Signal = int(ws.Signal())
	} else {
		e.Code = ws.ExitStatus()
	}
	return e
}

// run runs a busybox applet to its end, or kills it after the time.
func (c *children) run(argv []string, timeout time.Duration) (control.ExecResult, error) {
	null, err := os.Open("/dev/null")
	if err != nil {
		return control.ExecResult{}, err
	}
	defer null.Close()
	type pipe struct {
		r, w *os.File
		text chan []byte
	}
	pipes := make([]pipe, 2)
	for i := range pipes {
		r, w, err := os.Pipe()
		if err != nil {
			return control.ExecResult{}, err
		}
		defer r.Close()
		defer w.Close()
		pipes[i] = pipe{r, w, make(chan []byte, 1)}
	}
	files := []uintptr{null.Fd(), pipes[0].w.Fd(), pipes[1].w.Fd()}
	pid, done, err := c.fork(busybox, argv, control.SpawnArgs{CPU: -1}, files, false)
	if err != nil {
		return control.ExecResult{}, fmt.Errorf("run %s: %w", argv[0], err)
	}
	for _, p := range pipes {
		p.w.Close()
		go func() {
			b, _ := io.ReadAll(io.LimitReader(p.r, control.MaxLine/8)) // what came is the answer
			p.text <- b
		}()
	}
	expired := time.AfterFunc(timeout, func() { syscall.Kill(-pid, syscall.SIGKILL) })
	ws := <-done
	if !expired.Stop() {
		return control.ExecResult{}, fmt.Errorf("run %s: not done after %v: killed", argv[0], timeout)
	}
	r := control.ExecResult{Code: ws.ExitStatus()}
	if ws.Signaled() {
		r.Code = 128 + int(ws.Signal())
	}
	// A grandchild in the background may hold the pipes open: take what there is a moment after the end.
	late := time.After(200 * time.Millisecond)
	for i, to := range []*string{&r.Stdout, &r.Stderr} {
		select {
		case b := <-pipes[i].text:
			*to = string(b)
		case <-late:
			pipes[i].r.SetReadDeadline(time.Now()) // a pipe takes deadlines
			*to = string(<-pipes[i].text)
			late = time.After(0)
		}
	}
	return r, nil
}

// shell keeps a shell on the console, for people.
func (c *children) shell() {
	for {
		tty, err := os.OpenFile("/dev/ttyS0", os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			return // a kernel without a console has no one at it
		}
		fd := tty.Fd()
		_, done, err := c.fork(busybox, []string{"-sh"}, control.SpawnArgs{CPU: -1}, []uintptr{fd, fd, fd}, true)
		tty.Close()
		if err != nil {
			return
		}
		<-done
		time.Sleep(time.Second) // a shell that ends at once must not eat the machine
	}
}
