package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"golang.org/x/sys/unix"
)

// server answers the control line.
type server struct {
	line     *os.File
	children *children
	trace    tracer

	mu sync.Mutex // serialises whole lines on the wire
}

func newServer(line *os.File, c *children) *server {
	s := &server{line: line, children: c}
	c.onExit = func(e control.Exit) { s.event(control.EventExit, e) }
	return s
}

func (s *server) run() error {
	// What a reset has cut off on the line ends here.
	if _, err := s.line.WriteString("\n"); err != nil {
		return fmt.Errorf("write the control line: %w", err)
	}
	s.event(control.EventReady, ready())
	in := bufio.NewScanner(s.line)
	in.Buffer(make([]byte, 64<<10), control.MaxLine)
	for in.Scan() {
		var req control.Request
		if err := json.Unmarshal(in.Bytes(), &req); err != nil {
			s.send(control.Response{Error: fmt.Sprintf("not a request: %v", err)})
			continue
		}
		go s.answer(req)
	}
	if err := in.Err(); err != nil {
		return fmt.Errorf("read the control line: %w", err)
	}
	return errors.New("read the control line: it was closed")
}

func (s *server) event(name string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		return // our own types always marshal
	}
	s.send(control.Response{Event: name, Result: b})
}

func (s *server) send(r control.Response) {
	b, err := json.Marshal(r)
	if err != nil {
		return // our own types always marshal
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.line.Write(append(b, '\n')); err != nil {
		fmt.Fprintln(os.Stderr, "hostinit: write the control line:", err)
	}
}

func (s *server) answer(req control.Request) {
	v, err := s.do(req)
	r := control.Response{ID: req.ID}
	if err == nil {
		r.Result, err = json.Marshal(v)
	}
	if err != nil {
		r.Error = err.Error()
	}
	s.send(r)
}

// do runs one request. A sysrq answers first and acts afterwards, for it may be the last thing that this machine does.
func (s *server) do(req control.Request) (any, error) {
	switch req.Op {
	case control.OpTime:
		return clock(), nil
	case control.OpSpawn:
		var a control.SpawnArgs
		if err := args(req, &a); err != nil {
			return nil, err
		}
		if len(a.Argv) == 0 {
			return nil, errors.New("spawn: argv is empty")
		}
		pid, err := s.children.start(a)
		if err != nil {
			return nil, err
		}
		return named(pid, a.Comm)
	case control.OpFrames:
		var a control.FramesArgs
		if err := args(req, &a); err != nil {
			return nil, err
		}
		return sendFrames(a)
	case control.OpPS:
		return processes()
	case control.OpRead:
		var a control.ReadArgs
		if err := args(req, &a); err != nil {
			return nil, err
		}
		var r control.ReadResult
		for _, p := range a.Paths {
			f := control.File{Path: p}
			b, err := os.ReadFile(p)
			if err != nil {
				f.Error = err.Error()
			}
			f.Data = string(b)
			r.Files = append(r.Files, f)
		}
		return r, nil
	case control.OpSymbol:
		var a control.SymbolArgs
		if err := args(req, &a); err != nil {
			return nil, err
		}
		return symbols(a.Names)
	case control.OpExec:
		var a control.ExecArgs
		if err := args(req, &a); err != nil {
			return nil, err
		}
		if a.Timeout <= 0 {
			a.Timeout = 30 * time.Second
		}
		return s.children.run([]string{"sh", "-c", a.Command}, a.Timeout)
	case control.OpSysrq:
		var a control.SysrqArgs
		if err := args(req, &a); err != nil {
			return nil, err
		}
		return s.sysrq(a)
	case control.OpKexec:
		return s.kexec()
	case control.OpKill:
		var a control.KillArgs
		if err := args(req, &a); err != nil {
			return nil, err
		}
		return struct{}{}, syscall.Kill(a.PID, syscall.Signal(a.Signal))
	case control.OpTrace:
		var a control.TraceArgs
		if err := args(req, &a); err != nil {
			return nil, err
		}
		return struct{}{}, s.trace.start(a.Functions)
	case control.OpTraced:
		return s.trace.stop()
	}
	return nil, fmt.Errorf("unknown operation %q", req.Op)
}

func args(req control.Request, v any) error {
	if err := json.Unmarshal(req.Args, v); err != nil {
		return fmt.Errorf("%s: %w", req.Op, err)
	}
	return nil
}

// kexec starts the second kernel with the command line of this one. Like a sysrq it answers first.
func (s *server) kexec() (any, error) {
	kernel, err := os.Open(control.SecondKernel)
	if err != nil {
		return nil, fmt.Errorf("kexec: %w", err)
	}
	defer kernel.Close()
	initrd, err := os.Open(control.SecondInitrd)
	if err != nil {
		return nil, fmt.Errorf("kexec: %w", err)
	}
	defer initrd.Close()
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("kexec: %w", err)
	}
	if err := unix.KexecFileLoad(int(kernel.Fd()), int(initrd.Fd()), strings.TrimSpace(string(line)), 0); err != nil {
		return nil, fmt.Errorf("kexec: load %s: %w", kernel.Name(), err)
	}
	return soon("kexec", func() error { return unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC) }), nil
}

// soon does what may be the last thing that this machine does, after the answer has had time to get over the line.
func soon(what string, do func() error) control.Fired {
	const delay = 100 * time.Millisecond
	at := clock()
	at.Boot += delay
	at.Wall = at.Wall.Add(delay)
	go func() {
		time.Sleep(at.Boot - clock().Boot)
		if err := do(); err != nil {
			fmt.Fprintf(os.Stderr, "hostinit: %s: %v\n", what, err)
		}
	}()
	return control.Fired{At: at}
}

func (s *server) sysrq(a control.SysrqArgs) (any, error) {
	if len(a.Key) != 1 {
		return nil, fmt.Errorf("sysrq: %q is no key", a.Key)
	}
	f, err := os.OpenFile("/proc/sysrq-trigger", os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	return soon("sysrq", func() error {
		defer f.Close()
		_, err := f.WriteString(a.Key)
		return err
	}), nil
}

// userHZ is the unit of the times in /proc/PID/stat: USER_HZ, 100 on every architecture that the lab runs.
const userHZ = 100

func ticks(s string) time.Duration {
	n, _ := strconv.ParseUint(s, 10, 63) // the kernel prints numbers
	return time.Duration(n) * (time.Second / userHZ)
}

// process reads /proc/PID/stat (proc(5)) and the owner of the directory, which is the effective UID.
func process(pid int) (control.Process, error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return control.Process{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return control.Process{}, err
	}
	line := strings.TrimSpace(string(b))
	// comm may hold blanks and parentheses; it ends at the last one.
	open, end := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 0 || end < open {
		return control.Process{}, fmt.Errorf("%s/stat is no line of proc(5)", dir)
	}
	f := strings.Fields(line[end+1:]) // f[0] is field 3 of proc(5)
	if len(f) < 37 {
		return control.Process{}, fmt.Errorf("%s/stat has only %d fields", dir, len(f)+2)
	}
	num := func(i int) int { n, _ := strconv.Atoi(f[i-3]); return n }
	const pfKthread = 0x00200000 // include/linux/sched.h
	flags, _ := strconv.ParseUint(f[9-3], 10, 64)
	return control.Process{
		PID: pid, PPID: num(4), Comm: line[open+1 : end], State: f[0], UID: st.Uid,
		CPU: num(39), Threads: num(20), UTime: ticks(f[14-3]), STime: ticks(f[15-3]),
		Start: ticks(f[22-3]), RSS: int64(num(24)) * int64(os.Getpagesize()),
		Kernel: flags&pfKthread != 0, Stat: line,
	}, nil
}

// named reads a process that has just been started. The kernel lets the parent go on, by closing its descriptors, a moment
// before it gives the process its new name (begin_new_exec, fs/exec.c, Linux 6.1).
func named(pid int, comm string) (control.Process, error) {
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		p, err := process(pid)
		if err != nil || p.Comm == comm {
			return p, err
		}
		if time.Now().After(end) {
			return p, fmt.Errorf("process %d is called %q, not %q", pid, p.Comm, comm)
		}
	}
}

func processes() ([]control.Process, error) {
	names, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var list []control.Process
	for _, n := range names {
		pid, err := strconv.Atoi(n.Name())
		if err != nil {
			continue
		}
		p, err := process(pid)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has just ended
		}
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	return list, nil
}
