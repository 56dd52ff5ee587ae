package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/tests/lab/qmp"
)

// errOff is the answer of a machine that is switched off.
var errOff = errors.New("the machine is switched off")

// machine is a QEMU that can be switched on and off. Each run is a fresh process.
type machine struct {
	name    string // "host" or "dpu"
	program string
	console *Console
	// args returns the command line after the parts that all machines share; it adds its descriptors to f. The
	// connections that it makes are kept by the caller.
	args func(f *fds) ([]string, error)
	// onEvent gets QMP's events. It must not block.
	onEvent func(qmp.Event)
	// onEnd is called once for each run that has ended, after power has become off.
	onEnd func()

	power sync.Mutex // serialises on and off

	mu  sync.Mutex
	run *run // guarded by mu; nil while the machine is off
}

// run is one life of the QEMU process.
type run struct {
	proc    *process
	qmp     *qmp.Client
	started time.Time
	ended   chan struct{} // closed after the machine knows that the process has ended
}

// on switches the machine on; it is no error if it is on.
func (m *machine) on(ctx context.Context) error {
	m.power.Lock()
	defer m.power.Unlock()
	if m.current() != nil {
		return nil
	}
	var f fds
	defer f.close()
	con, conFD, err := f.stream()
	if err != nil {
		return err
	}
	mon, monFD, err := f.stream()
	if err != nil {
		con.Close()
		return err
	}
	own, err := m.args(&f)
	if err != nil {
		con.Close()
		mon.Close()
		return err
	}
	args := append([]string{
		"-name", "backdoor-" + m.name, "-nodefaults", "-no-user-config", "-display", "none",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", conFD), "-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", monFD), "-mon", "chardev=qmp,mode=control",
	}, own...)
	began := time.Now()
	proc, err := start(m.program, args, f.files)
	if err != nil {
		con.Close()
		mon.Close()
		return err
	}
	// This side's copies must go, or the connections would not end with QEMU.
	f.close()
	r := &run{proc: proc, started: began, ended: make(chan struct{})}
	go m.pump(con)
	greet, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	r.qmp, err = qmp.New(greet, mon, m.onEvent)
	if err != nil {
		select {
		case <-proc.done:
			err = proc.failure()
		case <-time.After(time.Second):
		}
		proc.kill()
		return &InfraError{Op: "start the " + m.name + "'s QEMU", Err: err, Next: qemuHint(err)}
	}
	m.console.setInput(con)
	m.mu.Lock()
	m.run = r
	m.mu.Unlock()
	go func() {
		<-proc.done
		m.console.setInput(nil)
		r.qmp.Close()
		m.mu.Lock()
		m.run = nil
		m.mu.Unlock()
		if m.onEnd != nil {
			m.onEnd()
		}
		close(r.ended)
	}()
	return nil
}

// qemuHint tells what can be done about the usual reasons why QEMU does not start.
func qemuHint(err error) string {
	switch s := err.Error(); {
	case strings.Contains(s, "Cannot allocate memory"), strings.Contains(s, "cannot set up guest memory"):
		return "there is too little memory: stop other programs, or choose less for the host"
	case strings.Contains(s, "Could not set up host forwarding"):
		return "another program has taken the lab's port: try again"
	}
	return ""
}

func (m *machine) pump(con net.Conn) {
	defer con.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := con.Read(buf)
		if n > 0 {
			m.console.feed(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// off ends the run at once, as pulling the plug does; it is no error if the machine is off.
func (m *machine) off() {
	m.power.Lock()
	defer m.power.Unlock()
	if r := m.current(); r != nil {
		r.proc.kill()
		<-r.ended
	}
}

func (m *machine) current() *run {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.run
}

// pin keeps the machine's threads on these of our CPUs; none frees them again. What split has done ends.
func (m *machine) pin(cpus []int) error {
	return m.eachThread(func(tid int) error {
		return errors.Join(affine(tid, cpus), unix.Setpriority(unix.PRIO_PROCESS, tid, 0))
	})
}

// eachThread does something to each thread of the machine; one that has ended meanwhile is passed over.
func (m *machine) eachThread(do func(tid int) error) error {
	r := m.current()
	if r == nil {
		return errOff
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", r.proc.pid))
	if err != nil {
		return &InfraError{Op: "list the " + m.name + "'s threads", Err: err}
	}
	for _, t := range threads {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		if err := do(tid); err != nil && !errors.Is(err, unix.ESRCH) {
			return &InfraError{Op: "schedule the " + m.name, Err: err}
		}
	}
	return nil
}

// affine keeps a thread on these of our CPUs; none means those that this program may use.
func affine(tid int, cpus []int) error {
	var set unix.CPUSet
	for _, c := range cpus {
		set.Set(c)
	}
	if len(cpus) == 0 {
		if err := unix.SchedGetaffinity(0, &set); err != nil {
			return err
		}
	}
	return unix.SchedSetaffinity(tid, &set)
}

// split keeps the machine's processors on one of our CPUs and its devices on another, where they go before other work if we may have them do so.
func (m *machine) split(ctx context.Context, processors, devices int) error {
	var list []struct {
		Thread int `json:"thread-id"`
	}
	if err := m.execute(ctx, "query-cpus-fast", nil, &list); err != nil {
		return err
	}
	of := make(map[int]bool)
	for _, c := range list {
		of[c.Thread] = true
	}
	return m.eachThread(func(tid int) error {
		if of[tid] {
			return affine(tid, []int{processors})
		}
		if err := unix.Setpriority(unix.PRIO_PROCESS, tid, -10); err != nil && !errors.Is(err, unix.EACCES) {
			return err
		}
		return affine(tid, []int{devices})
	})
}

// scheduled tells how long the machine's threads have run so far, and how long they were ready and waited for a CPU of this machine
// (Linux: Documentation/scheduler/sched-stats.rst).
func (m *machine) scheduled() (ran, waited time.Duration, err error) {
	r := m.current()
	if r == nil {
		return 0, 0, errOff
	}
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", r.proc.pid))
	if err != nil {
		return 0, 0, err
	}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			continue // the thread has ended
		}
		var on, off time.Duration // ns
		if _, err := fmt.Sscan(string(b), &on, &off); err != nil {
			return 0, 0, &InfraError{Op: "read " + p, Err: err}
		}
		ran, waited = ran+on, waited+off
	}
	return ran, waited, nil
}

// client returns the QMP client of the current run.
func (m *machine) client() (*qmp.Client, error) {
	r := m.current()
	if r == nil {
		return nil, errOff
	}
	return r.qmp, nil
}

// execute runs a QMP command on the current run.
func (m *machine) execute(ctx context.Context, command string, args, result any) error {
	c, err := m.client()
	if err != nil {
		return fmt.Errorf("QMP %s: %s: %w", command, m.name, err)
	}
	return c.Execute(ctx, command, args, result)
}

// bootError wraps the reason why a wait for the machine ended, with what its console said last.
func (m *machine) bootError(waiting string, err error) error {
	return &BootError{Machine: m.name, Waiting: waiting, Console: m.console.Tail(15), Err: err}
}

func logFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, &InfraError{Op: "write the log", Err: err}
	}
	return f, nil
}

func closeAll(list ...io.Closer) error {
	var errs []error
	for _, c := range list {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
