package lab

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a program of the lab: QEMU or swtpm. It dies with this process, however this process ends.
type process struct {
	name   string
	pid    int
	stderr *tail
	done   chan struct{} // closed once it has ended and been waited for
	err    error         // how it ended; valid after done
}

// tail keeps the last bytes of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte // guarded by mu
}

const tailSize = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if over := len(t.b) - tailSize; over > 0 {
		t.b = append([]byte(nil), t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(bytes.ToValidUTF8(t.b, []byte("?"))))
}

// packages names the Debian package of each program that the lab runs.
var packages = map[string]string{
	"qemu-system-x86_64":  "qemu-system-x86",
	"qemu-system-aarch64": "qemu-system-arm",
	"swtpm":               "swtpm",
	"mkfs.ext4":           "e2fsprogs",
	"e2fsck":              "e2fsprogs",
	"debugfs":             "e2fsprogs",
}

// find returns the path of a program, also of one in sbin, or an *InfraError that tells what to install.
func find(program string) (string, error) {
	if p, err := exec.LookPath(program); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if p, err := exec.LookPath(dir + "/" + program); err == nil {
			return p, nil
		}
	}
	return "", &InfraError{
		Op: "find " + program, Err: exec.ErrNotFound,
		Next: "install it: apt-get install " + packages[program] + ", or run make setup",
	}
}

// start runs a program. files become its descriptors from 3 on; the caller closes its own copies.
func start(program string, args []string, files []*os.File) (*process, error) {
	path, err := find(program)
	if err != nil {
		return nil, err
	}
	p := &process{name: program, stderr: new(tail), done: make(chan struct{})}
	cmd := exec.Command(path, args...)
	cmd.ExtraFiles = files
	cmd.Stdout, cmd.Stderr = p.stderr, p.stderr
	// A group of its own keeps the terminal's Ctrl-C from it: the lab stops it in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	go func() {
		// The signal comes at the death of the thread that forked: this one must live as long as the program.
		runtime.LockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, &InfraError{Op: "start " + program, Err: err}
	}
	return p, nil
}

// kill ends the program at once and waits until it is gone.
func (p *process) kill() {
	select {
	case <-p.done:
		return
	default:
	}
	syscall.Kill(p.pid, syscall.SIGKILL) // it is ours and not yet waited for, so the PID is still its own
	<-p.done
}

// terminate asks the program to end, and ends it when it does not.
func (p *process) terminate(wait time.Duration) {
	select {
	case <-p.done:
		return
	default:
	}
	syscall.Kill(p.pid, syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(wait):
		p.kill()
	}
}

// failure tells how the program ended, with its last words.
func (p *process) failure() error {
	how := "ended"
	if p.err != nil {
		how = p.err.Error()
	}
	if s := p.stderr.String(); s != "" {
		return fmt.Errorf("%s: %s: %s", p.name, how, s)
	}
	return fmt.Errorf("%s: %s", p.name, how)
}

// fds collects the descriptors that a program inherits.
type fds struct{ files []*os.File }

// add passes f on and returns its number in the program.
func (f *fds) add(file *os.File) int {
	f.files = append(f.files, file)
	return 2 + len(f.files)
}

// close closes this side's copies.
func (f *fds) close() {
	for _, file := range f.files {
		file.Close()
	}
	f.files = nil
}

// stream makes a connection whose far end goes to the program: no path, no port, nothing to clean up.
func (f *fds) stream() (net.Conn, int, error) {
	near, far, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		return nil, 0, err
	}
	conn, err := net.FileConn(near)
	near.Close()
	if err != nil {
		far.Close()
		return nil, 0, &InfraError{Op: "make a connection", Err: err}
	}
	return conn, f.add(far), nil
}

func socketpair(kind int) (near, far *os.File, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &InfraError{Op: "make a connection", Err: err}
	}
	return os.NewFile(uintptr(p[0]), "near"), os.NewFile(uintptr(p[1]), "far"), nil
}

// port is a TCP port of 127.0.0.1 that is kept for a program of the lab, also while that program does not run.
type port struct {
	fd     int
	Number int
}

// reserve takes a free port. It is bound here but never listened on, so that QEMU, which sets SO_REUSEADDR as this
// does, can listen on it, and nobody who asks for any port gets it.
func reserve() (*port, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, &InfraError{Op: "reserve a port", Err: err}
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
	)
	if err != nil {
		unix.Close(fd)
		return nil, &InfraError{Op: "reserve a port", Err: err}
	}
	sa, err := unix.Getsockname(fd)
	in, ok := sa.(*unix.SockaddrInet4)
	if err != nil || !ok {
		unix.Close(fd)
		return nil, &InfraError{Op: "reserve a port", Err: errors.Join(err, errors.New("no address"))}
	}
	return &port{fd, in.Port}, nil
}

func (p *port) String() string { return fmt.Sprintf("127.0.0.1:%d", p.Number) }

func (p *port) release() { unix.Close(p.fd) }
