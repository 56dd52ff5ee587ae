package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"github.com/backdoor-rhs/backdoor/tests/lab/internal/unixsock"
	"golang.org/x/sys/unix"
)

// Info describes a lab that is up.
type Info struct {
	Name    string    `json:"name"`
	Dir     string    `json:"dir"`
	PID     int       `json:"pid"` // of the process that runs it
	Started time.Time `json:"started"`
	Wire    string    `json:"wire"` // socket for wire.Dial
	Host    HostInfo  `json:"host"`
	DPU     *DPUInfo  `json:"dpu,omitempty"`
	BMC     BMCInfo   `json:"bmc"`
}

// HostInfo is HOST's part of Info.
type HostInfo struct {
	Kernel  string `json:"kernel"` // uname -r
	UUID    string `json:"uuid"`
	State   string `json:"state"` // QEMU's word for it, or "off"
	Boots   int    `json:"boots"`
	Service string `json:"service"`
	RAM     string `json:"ram"` // file
	RAMSize int64  `json:"ramSize"`
}

// DPUInfo is the DPU's part of Info.
type DPUInfo struct {
	State        string        `json:"state"` // "on" or "off"
	URL          string        `json:"url"`
	User         string        `json:"user"`
	PasswordFile string        `json:"passwordFile"`
	Fingerprint  string        `json:"fingerprint"`
	CAFile       string        `json:"caFile"`
	Contexts     string        `json:"contexts"` // configuration file for the operator's command
	BootTook     time.Duration `json:"bootTook"`
}

// BMCInfo is how to reach HOST's BMC.
type BMCInfo struct {
	URL      string `json:"url"`
	User     string `json:"user"`
	Password string `json:"password"`
	CAFile   string `json:"caFile"`
}

// controlSocket is the name of the supervisor's socket in the run directory.
const controlSocket = "lab.sock"

type (
	faultRequest struct {
		Fault Fault `json:"fault"`
	}
	powerRequest struct {
		Op string `json:"op"`
	}
)

// supervisor serves a lab to other processes of the same user, over HTTP on a Unix socket in the run directory.
type supervisor struct {
	name    string
	lab     *Lab
	started time.Time

	stop    context.CancelFunc
	stopped chan error // gets how the lab was closed, for the one who asked
}

// serveLab serves l until ctx ends or someone asks it to stop, and then closes it. up is called once others can reach it.
func serveLab(ctx context.Context, name string, l *Lab, up func(Info)) (err error) {
	defer func() { err = errors.Join(err, l.Close()) }()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	s := &supervisor{name: name, lab: l, started: time.Now(), stop: stop, stopped: make(chan error, 1)}
	if err := s.writeFiles(); err != nil {
		return err
	}
	path := filepath.Join(l.dir, controlSocket)
	var ln net.Listener
	err = unixsock.Short(path, func(p string) (err error) {
		ln, err = net.Listen("unix", p)
		return err
	})
	if err != nil {
		return &InfraError{Op: "open the lab's socket", Err: err}
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // it would unlink the short name
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return &InfraError{Op: "open the lab's socket", Err: err}
	}
	// A request ends with the lab, or the wait for it would be for ever.
	srv := &http.Server{Handler: s.handler(), BaseContext: func(net.Listener) context.Context { return ctx }}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	i, err := s.info(ctx)
	if err == nil {
		up(i)
	}
	<-ctx.Done()
	closed := l.Close()
	s.stopped <- closed
	// The one who asked for the end gets the answer; everybody else was cut off by ctx.
	last, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err = errors.Join(err, closed, srv.Shutdown(last))
	if e := <-served; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	if e := os.Remove(path); !errors.Is(e, fs.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

func (s *supervisor) file(name string) string { return filepath.Join(s.lab.dir, name) }

// writeFiles stores what the operator's command and others need to reach the lab.
func (s *supervisor) writeFiles() error {
	files := map[string][]byte{"bmc-ca.pem": s.lab.BMC.CA}
	if d := s.lab.DPU; d != nil {
		// The form of the file is that of backdoor's own contexts, version 1.
		contexts, err := json.MarshalIndent(map[string]any{
			"version": 1, "current": s.name,
			"contexts": []map[string]string{{
				"name": s.name, "url": d.URL, "user": d.User, "passwordFile": s.file("dpu-password"), "sha256": d.Fingerprint,
			}},
		}, "", "  ")
		if err != nil {
			return fmt.Errorf("write the context: %w", err)
		}
		files["context.json"] = append(contexts, '\n')
		files["dpu-password"] = []byte(d.Password + "\n")
		files["dpu-ca.pem"] = d.CA
	}
	for name, data := range files {
		if err := os.WriteFile(s.file(name), data, 0o600); err != nil {
			return &InfraError{Op: "write " + name, Err: err}
		}
	}
	return nil
}

func (s *supervisor) info(ctx context.Context) (Info, error) {
	l := s.lab
	state, err := l.Host.Status(ctx)
	if err != nil {
		return Info{}, err
	}
	i := Info{
		Name: s.name, Dir: l.dir, PID: os.Getpid(), Started: s.started, Wire: s.file("wire.sock"),
		Host: HostInfo{Kernel: l.Host.Kernel.Release, UUID: l.Host.UUID, State: state, Boots: l.Host.Boots(), Service: l.Host.Service()},
		BMC:  BMCInfo{URL: l.BMC.URL, User: l.BMC.User, Password: l.BMC.Password, CAFile: s.file("bmc-ca.pem")},
	}
	i.Host.RAM, i.Host.RAMSize = l.Host.RAM()
	if d := l.DPU; d != nil {
		i.DPU = &DPUInfo{
			State: "off", URL: d.URL, User: d.User, PasswordFile: s.file("dpu-password"), Fingerprint: d.Fingerprint,
			CAFile: s.file("dpu-ca.pem"), Contexts: s.file("context.json"), BootTook: d.BootTook,
		}
		if d.machine.current() != nil {
			i.DPU.State = "on"
		}
	}
	return i, nil
}

// answer is what a request returns; exactly one of its fields is set.
type answer struct {
	Result any    `json:"result,omitempty"`
	Error  string `json:"error,omitempty"`
	Kind   string `json:"kind,omitempty"`
}

func (s *supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(context.Context, *json.Decoder) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r.Context(), json.NewDecoder(io.LimitReader(r.Body, 1<<20)))
			a := answer{Result: v}
			if err != nil {
				a = answer{Error: err.Error(), Kind: kindOf(err)}
			}
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(a) // the client may be gone
		})
	}
	handle("GET /status", func(ctx context.Context, _ *json.Decoder) (any, error) { return s.info(ctx) })
	handle("POST /fault", func(ctx context.Context, d *json.Decoder) (any, error) {
		var r faultRequest
		if err := d.Decode(&r); err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		return s.lab.Host.Fault(ctx, r.Fault)
	})
	handle("POST /power", func(ctx context.Context, d *json.Decoder) (any, error) {
		var r powerRequest
		if err := d.Decode(&r); err != nil {
			return nil, err
		}
		return struct{}{}, s.power(ctx, r.Op)
	})
	handle("POST /exec", func(ctx context.Context, d *json.Decoder) (any, error) {
		var r control.ExecArgs
		if err := d.Decode(&r); err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		return s.lab.Host.Exec(ctx, r.Command)
	})
	handle("POST /down", func(context.Context, *json.Decoder) (any, error) {
		s.stop()
		return struct{}{}, <-s.stopped
	})
	mux.HandleFunc("GET /console/{machine}", s.console)
	return mux
}

func (s *supervisor) power(ctx context.Context, op string) error {
	h := s.lab.Host
	do := map[string]func(context.Context) error{
		"on": h.PowerOn, "off": h.PowerOff, "cycle": h.PowerCycle, "reset": h.Reset, "button": h.Shutdown,
		"nmi": h.NMI, "freeze": h.Freeze, "thaw": h.Thaw,
	}[op]
	if do == nil {
		return fmt.Errorf("there is no power operation %q", op)
	}
	return do(ctx)
}

// console turns the connection into a serial line.
func (s *supervisor) console(w http.ResponseWriter, r *http.Request) {
	var c *Console
	switch r.PathValue("machine") {
	case "host":
		c = s.lab.Host.Console()
	case "dpu":
		if s.lab.DPU != nil {
			c = s.lab.DPU.Console()
		}
	}
	if c == nil {
		http.Error(w, "there is no such machine in this lab", http.StatusNotFound)
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: console\r\n\r\n"); err != nil {
		return
	}
	for _, l := range c.Tail(20) {
		fmt.Fprintf(conn, "%s\r\n", l)
	}
	defer c.Tap(patient{conn})()
	// The hijacked connection does not end with the request's context.
	defer context.AfterFunc(r.Context(), func() { conn.Close() })()
	io.Copy(c, rw) // until the viewer leaves, or the lab ends
}

// patient is a viewer that is cut off when it does not read, for it would delay the machine.
type patient struct{ net.Conn }

func (p patient) Write(b []byte) (int, error) {
	if err := p.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		return 0, err
	}
	return p.Conn.Write(b)
}

// errNoLab means that nothing answers at a lab's socket.
var errNoLab = errors.New("it is not up")

// dial connects to the supervisor of the lab that the command is about.
func (c *command) dial(ctx context.Context) (net.Conn, error) {
	dir, err := c.dir()
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	err = unixsock.Short(filepath.Join(dir, controlSocket), func(p string) (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, "unix", p)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, &InfraError{Op: fmt.Sprintf("reach the lab %q", c.name), Err: errNoLab, Next: "start it with backdoor lab up, or see backdoor lab status"}
	}
	if err != nil {
		return nil, &InfraError{Op: fmt.Sprintf("reach the lab %q", c.name), Err: err}
	}
	return conn, nil
}

// call sends a request to the supervisor; in and out may be nil.
func (c *command) call(method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(c.ctx, method, "http://lab"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) }, DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		var infra *InfraError
		if errors.As(err, &infra) {
			return infra
		}
		return &InfraError{Op: fmt.Sprintf("ask the lab %q", c.name), Err: err}
	}
	defer resp.Body.Close()
	var a struct {
		Result json.RawMessage
		Error  string
		Kind   string
	}
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		return &InfraError{Op: fmt.Sprintf("ask the lab %q", c.name), Err: err}
	}
	if a.Error != "" {
		return &remoteError{a.Error, a.Kind}
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(a.Result, out)
}

func runConsole(c *command) (int, error) {
	if len(c.args) != 1 {
		return 2, usageError("want host or dpu")
	}
	conn, err := c.dial(c.ctx)
	if err != nil {
		return 1, err
	}
	defer conn.Close()
	defer context.AfterFunc(c.ctx, func() { conn.Close() })()
	if _, err := fmt.Fprintf(conn, "GET /console/%s HTTP/1.1\r\nHost: lab\r\nConnection: Upgrade\r\nUpgrade: console\r\n\r\n", c.args[0]); err != nil {
		return 1, err
	}
	in, err := readUpgrade(conn)
	if err != nil {
		return 1, err
	}
	restore, tty := rawTerminal(c.stdin)
	defer restore()
	if tty {
		fmt.Fprintf(c.stderr, "The console of %s; Ctrl-] leaves it.\r\n", c.args[0])
	}
	var once sync.Once
	left := make(chan struct{})
	leave := func() { once.Do(func() { close(left); conn.Close() }) }
	go func() {
		if typeTo(conn, c.stdin) {
			leave()
		}
	}()
	_, err = io.Copy(c.stdout, in)
	select {
	case <-left: // as was wanted
		err = nil
	case <-c.ctx.Done():
		err = nil
	default:
	}
	if tty {
		fmt.Fprint(c.stderr, "\r\n")
	}
	if err != nil {
		return 1, &InfraError{Op: "show the console", Err: err}
	}
	return 0, nil
}

// typeTo sends what is typed until Ctrl-], and then returns true. At the end of the input it returns false: who pipes
// something in may still want to see what it does.
func typeTo(w io.Writer, stdin io.Reader) bool {
	const leave = 0x1d // Ctrl-]
	buf := make([]byte, 256)
	for {
		n, err := stdin.Read(buf)
		if i := bytes.IndexByte(buf[:n], leave); i >= 0 {
			w.Write(buf[:i]) // the connection is about to be closed
			return true
		}
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return true
			}
		}
		if err != nil {
			return false
		}
	}
}

// rawTerminal makes a terminal pass every key on, and returns how to make it as it was.
func rawTerminal(stdin io.Reader) (restore func(), tty bool) {
	f, ok := stdin.(*os.File)
	if !ok {
		return func() {}, false
	}
	fd := int(f.Fd())
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return func() {}, false // a pipe or a file
	}
	raw := *old
	// As cfmakeraw(3) does.
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return func() {}, false
	}
	return func() { unix.IoctlSetTermios(fd, unix.TCSETS, old) }, true
}

// readUpgrade reads the answer to the request for a console and returns the line behind it.
func readUpgrade(conn net.Conn) (io.Reader, error) {
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return nil, &InfraError{Op: "open the console", Err: err}
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 1000)) // the status alone is an answer, too
		return nil, fmt.Errorf("open the console: %s", bytes.TrimSpace(why))
	}
	return r, nil
}

// otherProcess is a process that is not a child of this one, held by a pidfd (pidfd_open(2)).
type otherProcess struct{ fd int }

// supervisorProcess returns the process at the other end of the lab's socket.
func (c *command) supervisorProcess() (otherProcess, error) {
	conn, err := c.dial(c.ctx)
	if err != nil {
		return otherProcess{}, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	var cred *unix.Ucred
	var fd int
	if err == nil {
		var inner error
		err = raw.Control(func(s uintptr) { cred, inner = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		err = errors.Join(err, inner)
	}
	if err == nil {
		fd, err = unix.PidfdOpen(int(cred.Pid), 0)
	}
	if err != nil {
		return otherProcess{}, &InfraError{Op: "find the lab's process", Err: err}
	}
	return otherProcess{fd}, nil
}

// wait waits until the process has ended, and ends it if it takes too long; its machines then end with it.
func (p otherProcess) wait(ctx context.Context, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		// In pieces, so that the end of ctx is seen.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, 100)
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return &InfraError{Op: "wait for the lab's process", Err: err}
		case ctx.Err() != nil:
			return &InfraError{Op: "wait for the lab's process", Err: context.Cause(ctx)}
		case time.Now().After(deadline):
			if err := unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0); err != nil {
				return &InfraError{Op: "stop the lab's process", Err: err}
			}
			deadline = time.Now().Add(patience)
		}
	}
}

// Close lets go of the process.
func (p otherProcess) Close() error { return unix.Close(p.fd) }
