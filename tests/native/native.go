// Package native runs the real agent as a process of this machine, on the RAM file of a lab's host, where a DPU of its own
// would add nothing to a test but time.
package native

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

// Programs are the paths of the two commands.
type Programs struct{ Backdoor, Backdoord string }

// Build builds the commands of the module that root is in into dir.
func Build(ctx context.Context, root, dir string) (Programs, error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator), "./cmd/backdoor", "./cmd/backdoord")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return Programs{}, fmt.Errorf("build the commands: %w\n%s", err, out)
	}
	return Programs{filepath.Join(dir, "backdoor"), filepath.Join(dir, "backdoord")}, nil
}

// Agreement is what owner and monitor have agreed. The zero value gives every right.
type Agreement struct {
	Missing  bool      // the agent is told of a file that is not there
	Stranger bool      // signed by an owner whom the agent does not know
	Until    time.Time // zero means in an hour
	Actions  []string  // nil means all
}

// Options say what agent to start.
type Options struct {
	Program string // backdoord
	Dir     string // its state directory; made if need be
	// Password is good already, from an earlier agent in that directory. Empty means a new directory.
	Password string
	Host     *lab.Host
	// DMA puts the model of a DMA engine before the RAM file.
	DMA       bool
	NoWrites  bool
	Agreement Agreement
	Policy    json.RawMessage // nil means the default
	// Change may change the configuration before it is written.
	Change func(*config.Config)
}

// Agent is a running agent. Stop ends it.
type Agent struct {
	*operator.Agent
	cmd  *exec.Cmd
	out  output
	done chan struct{}
}

var (
	passwordLine = regexp.MustCompile(`log in as "([^"]+)" with the initial password "([^"]+)"`)
	serviceLine  = regexp.MustCompile(`certificate SHA-256 ([0-9a-f]{64})`)
	workerLine   = regexp.MustCompile(`msg="worker started" pid=(\d+)`)
)

// Start starts an agent, waits until its service answers, and logs in.
func Start(ctx context.Context, o Options) (a *Agent, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("not within a minute"))
	defer cancel()
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	addr, err := freePort()
	if err != nil {
		return nil, err
	}
	if err := o.write(addr); err != nil {
		return nil, err
	}
	a = &Agent{done: make(chan struct{}), out: output{changed: make(chan struct{})}}
	a.cmd = exec.Command(o.Program, "-config", filepath.Join(o.Dir, "config.json"))
	a.cmd.Stdout, a.cmd.Stderr = &a.out, &a.out
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		a.cmd.Wait() // how it ended is nobody's business: it was stopped
		close(a.done)
	}()
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w; the agent said:\n%s", err, a.Output())
			a.Stop()
		}
	}()
	pin, err := a.wait(ctx, serviceLine)
	if err != nil {
		return a, err
	}
	c := client.Config{URL: "https://" + addr, User: "admin", Password: o.Password, Fingerprint: pin[1]}
	if o.Password == "" {
		initial, err := a.wait(ctx, passwordLine)
		if err != nil {
			return a, err
		}
		c.User, c.Password = initial[1], initial[2]
	}
	for {
		if a.Agent, err = operator.Dial(ctx, c); err == nil {
			return a, nil
		}
		select {
		case <-ctx.Done():
			return a, errors.Join(context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond): // it has said where it will listen; nothing says that it does
		}
	}
}

// write fills the state directory.
func (o *Options) write(addr string) error {
	path, size := o.Host.RAM()
	c := config.Config{
		Version: config.Version,
		Memory: config.Memory{
			Backend: config.BackendRAMFile, Path: path, Layout: config.Layout{Name: config.LayoutQ35}, Size: config.Size(size),
			Engine: config.Engine{Enabled: o.DMA},
		},
		HostUUID: o.Host.UUID, Writes: !o.NoWrites, StateDir: o.Dir, Redfish: config.Redfish{Listen: addr},
	}
	owner, err := o.agree(filepath.Join(o.Dir, "agreement.json"))
	if err != nil {
		return err
	}
	c.Agreement = config.Agreement{File: "agreement.json", OwnerKey: config.Key(owner)}
	if o.Policy != nil {
		c.PolicyFile = "policy.json"
		if err := os.WriteFile(filepath.Join(o.Dir, c.PolicyFile), o.Policy, 0o600); err != nil {
			return err
		}
	}
	if o.Change != nil {
		o.Change(&c)
	}
	return c.Write(filepath.Join(o.Dir, "config.json"))
}

// agree writes the agreement and returns the owner's key that the agent will trust.
//
// An agent that was started in this directory before has locked its agreement, so that it is the one to go on with.
func (o *Options) agree(path string) (ed25519.PublicKey, error) {
	keyFile := path + ".owner"
	if key, err := os.ReadFile(keyFile); err == nil && len(key) == ed25519.PublicKeySize {
		return key, nil
	}
	known, err := o.newAgreement(path)
	if err != nil {
		return nil, err
	}
	return known, os.WriteFile(keyFile, known, 0o600)
}

// newAgreement is agree for a new directory.
func (o *Options) newAgreement(path string) (ed25519.PublicKey, error) {
	known, owner, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if o.Agreement.Missing {
		return known, nil
	}
	signer := known
	if o.Agreement.Stranger {
		if signer, owner, err = ed25519.GenerateKey(rand.Reader); err != nil {
			return nil, err
		}
	}
	actions, until := o.Agreement.Actions, o.Agreement.Until
	if actions == nil {
		actions = heal.IDs()
	}
	if until.IsZero() {
		until = time.Now().Add(time.Hour)
	}
	monitor, signing, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	a := access.Agreement{
		Version: access.Version, ID: "test", Host: access.Host{UUID: o.Host.UUID, Name: "host"},
		Owner: access.Party{Name: "owner", Key: access.Key(signer)}, Monitors: []access.Party{{Name: "monitor", Key: access.Key(monitor)}},
		Rights:    access.Rights{Read: true, Write: true, Power: true, Actions: actions, Memory: []access.Memory{{Size: 1 << 40, Read: true, Write: true}}},
		Protected: []access.Protected{},
		ValidFrom: until.Add(-48 * time.Hour).UTC().Truncate(time.Second), ValidUntil: until.UTC().Truncate(time.Second),
	}
	for _, k := range []ed25519.PrivateKey{owner, signing} {
		if err := a.Sign(k); err != nil {
			return nil, err
		}
	}
	doc, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	return known, os.WriteFile(path, doc, 0o600)
}

// Workers lists the PIDs of the processes that did the agent's work, one after the other, the present one last.
func (a *Agent) Workers() []int {
	var pids []int
	for _, m := range workerLine.FindAllStringSubmatch(a.Output(), -1) {
		if pid, err := strconv.Atoi(m[1]); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Kill ends the agent as a crash does: keeper and worker get no chance to do anything more. It returns when both are gone.
func (a *Agent) Kill() {
	for _, pid := range a.Workers() {
		syscall.Kill(pid, syscall.SIGKILL) // of former workers nothing is left
	}
	a.cmd.Process.Kill()
	<-a.done
}

// Stop ends the agent in order, and with force after half a minute.
func (a *Agent) Stop() {
	a.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-a.done:
	case <-time.After(30 * time.Second):
		a.Kill()
	}
}

// Output is what the agent has printed.
func (a *Agent) Output() string { s, _ := a.out.get(); return s }

// wait waits until the agent has printed something.
func (a *Agent) wait(ctx context.Context, re *regexp.Regexp) ([]string, error) {
	for {
		text, changed := a.out.get()
		if m := re.FindStringSubmatch(text); m != nil {
			return m, nil
		}
		select {
		case <-changed:
		case <-a.done:
			return nil, errors.New("the agent has ended")
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for %q: %w", re, context.Cause(ctx))
		}
	}
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// output keeps what was written to it.
type output struct {
	mu      sync.Mutex
	buf     bytes.Buffer  // guarded by mu
	changed chan struct{} // guarded by mu; closed and replaced with each write
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.changed)
	o.changed = make(chan struct{})
	return o.buf.Write(b)
}

func (o *output) get() (string, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String(), o.changed
}
