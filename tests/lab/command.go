package lab

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// verb is one verb of `backdoor lab`.
type verb struct {
	name, args, does string
	run              func(*command) (int, error)
	flags            func(*flag.FlagSet, *command)
	hidden           bool
}

// verbs is a function because the table and its functions need each other.
func verbs() []verb {
	return []verb{
		{"up", "", "start a lab", runUp, upFlags, false},
		{"down", "", "stop it and remove everything that it made", runDown, downFlags, false},
		{"status", "", "how the labs stand", runStatus, nil, false},
		{"fault", "FAULT", "make the host ill", runFault, nil, false},
		{"power", "OP", "the host's power, past its BMC: " + strings.Join(powerOps, ", "), runPower, nil, false},
		{"exec", "COMMAND…", "run a command line on the host", runExec, nil, false},
		{"console", "host|dpu", "a machine's serial console; Ctrl-] leaves it", runConsole, nil, false},
		{"supervise", "", "", runSupervise, upFlags, true},
	}
}

// command is one call of Command.
type command struct {
	ctx            context.Context
	stdin          io.Reader
	stdout, stderr io.Writer
	args           []string // after the flags
	name           string
	named          bool // -name was given
	json           bool
	keep           bool // down: keep the run directory
	foreground     bool
	cfg            Config
	memory         string
	policy         string // file
}

// defaultName is the lab that the verbs mean without -name.
const defaultName = "default"

var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// Command is `backdoor lab`: args are what follows that word. It returns the exit code: 0 for success, 1 for an error, 2
// for wrong usage; exec returns the code of the command on the host.
//
// A lab that was started with up lives in a process of its own, which is this program called with "lab supervise".
func Command(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "-help" || args[0] == "--help" {
		usage(stdout)
		return 0
	}
	all := verbs()
	i := slices.IndexFunc(all, func(v verb) bool { return v.name == args[0] })
	if i < 0 {
		fmt.Fprintf(stderr, "backdoor lab: there is no verb %q\n\n", args[0])
		usage(stderr)
		return 2
	}
	v := all[i]
	c := &command{ctx: ctx, stdin: stdin, stdout: stdout, stderr: stderr}
	set := flag.NewFlagSet("backdoor lab "+v.name, flag.ContinueOnError)
	set.SetOutput(stderr)
	set.Usage = func() {
		fmt.Fprintf(stderr, "usage: backdoor lab %s [flags] %s\n\n%s\n\n", v.name, v.args, v.does)
		set.PrintDefaults()
	}
	set.StringVar(&c.name, "name", defaultName, "`name` of the lab")
	set.BoolVar(&c.json, "json", false, "print JSON")
	if v.flags != nil {
		v.flags(set, c)
	}
	rest := args[1:]
	for {
		if err := set.Parse(rest); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return 0
			}
			return 2
		}
		// Flags may follow arguments, but what is to run on the host has flags of its own.
		if rest = set.Args(); len(rest) == 0 || v.name == "exec" {
			break
		}
		c.args = append(c.args, rest[0])
		rest = rest[1:]
	}
	c.args = append(c.args, rest...)
	set.Visit(func(f *flag.Flag) { c.named = c.named || f.Name == "name" })
	if !nameForm.MatchString(c.name) {
		fmt.Fprintf(stderr, "backdoor lab: %q is no name for a lab: want up to 32 lower-case letters, digits and dashes\n", c.name)
		return 2
	}
	code, err := v.run(c)
	var u usageError
	switch {
	case errors.As(err, &u):
		fmt.Fprintf(stderr, "backdoor lab %s: %v\n", v.name, err)
		return 2
	case err != nil && c.json:
		c.print(map[string]string{"error": err.Error(), "kind": kindOf(err)})
		return 1
	case err != nil:
		fmt.Fprintf(stderr, "backdoor lab %s: %v\n", v.name, err)
		return 1
	}
	return code
}

// usageError is a mistake in the command line.
type usageError string

func (e usageError) Error() string { return string(e) }

// kindOf tells scripts who is to blame.
func kindOf(err error) string {
	var boot *BootError
	var infra *InfraError
	var remote *remoteError
	switch {
	case errors.As(err, &remote):
		return remote.kind
	case errors.As(err, &boot):
		return "boot"
	case errors.As(err, &infra):
		return "infra"
	}
	return "other"
}

func usage(w io.Writer) {
	fmt.Fprint(w, "usage: backdoor lab VERB [-name LAB] [-json] …\n\n"+
		"Two virtual machines to try everything on: a host that can be made ill, and a DPU that heals it.\n\n")
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, v := range verbs() {
		if !v.hidden {
			fmt.Fprintf(t, "  %s %s\t%s\n", v.name, v.args, v.does)
		}
	}
	fmt.Fprint(t, "\nThe faults:\n\n")
	for _, f := range Faults() {
		fmt.Fprintf(t, "  %s\t%s\n", f.Fault, f.Does)
	}
	t.Flush() // writes to what the caller has given
	fmt.Fprint(w, "\nThe flags of a verb: backdoor lab VERB -h\n")
}

func (c *command) print(v any) {
	e := json.NewEncoder(c.stdout)
	e.SetIndent("", "  ")
	e.Encode(v) // there is no one to tell that the output is gone
}

func upFlags(s *flag.FlagSet, c *command) {
	s.BoolVar(&c.foreground, "foreground", false, "stay, and stop the lab on Ctrl-C")
	s.StringVar(&c.cfg.HostKernel, "kernel", "6.1", "the host's `kernel`: 6.1, 6.12, 6.1-generic, 6.12-generic")
	s.StringVar(&c.memory, "memory", "512M", "the host's memory, a `power of two`")
	s.IntVar(&c.cfg.HostCPUs, "cpus", 2, "the host's `CPUs`")
	s.StringVar(&c.cfg.HostArgs, "append", "", "more `arguments` for the host's kernel")
	s.BoolVar(&c.cfg.NoDPU, "no-dpu", false, "leave the DPU out")
	s.StringVar(&c.policy, "policy", "", "the agent's policy `file`; without one every repair waits for an operator")
	s.BoolVar(&c.cfg.Slots, "slots", false, "start the DPU by its loader from a disk with two slots, so that it can be updated")
	s.BoolVar(&c.cfg.NoWrites, "no-writes", false, "keep the agent from changing the host")
	s.StringVar(&c.cfg.Engine, "engine", EngineWindow, "the agent's `path` to the host's memory: window or dma")
	s.StringVar(&c.cfg.DPUImage, "image", "", "the DPU's initramfs `file` instead of build/images/dpu-arm64")
	s.StringVar(&c.cfg.DPUKernel, "dpu-kernel", "", "the DPU's kernel `file`")
	s.BoolVar(&c.cfg.Datapath, "datapath", false, "put the DPU between the host and the wire")
	s.StringVar(&c.cfg.WireCapture, "capture", "", "write the traffic on the wire to a pcap `file`")
}

func downFlags(s *flag.FlagSet, c *command) {
	s.BoolVar(&c.keep, "keep", false, "keep the run directory with its logs")
}

// labsDir is where the run directories of named labs are.
func labsDir() (string, error) {
	if d := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "backdoor", "lab"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", &InfraError{Op: "find the state directory", Err: err, Next: "set XDG_STATE_HOME"}
	}
	return filepath.Join(home, ".local", "state", "backdoor", "lab"), nil
}

func (c *command) dir() (string, error) {
	d, err := labsDir()
	return filepath.Join(d, c.name), err
}

// prepare completes the configuration and makes an empty run directory.
func (c *command) prepare() error {
	if len(c.args) > 0 {
		return usageError(fmt.Sprintf("unexpected %q", c.args[0]))
	}
	n, err := parseMemory(c.memory)
	if err != nil {
		return err
	}
	c.cfg.HostMemory = n
	if c.policy != "" {
		if c.cfg.Policy, err = os.ReadFile(c.policy); err != nil {
			return usageError(fmt.Sprintf("-policy: %v", err))
		}
	}
	if c.cfg.Dir, err = c.dir(); err != nil {
		return err
	}
	lock, err := lockDir(c.cfg.Dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return &InfraError{Op: "start the lab", Err: fmt.Errorf("the lab %q is up already", c.name),
			Next: "see backdoor lab status, stop it with backdoor lab down, or start another with -name"}
	}
	defer lock.Close()
	// What a lab has left that did not come up, or was killed.
	if err := os.RemoveAll(c.cfg.Dir); err != nil {
		return &InfraError{Op: "start the lab", Err: err}
	}
	return nil
}

func parseMemory(s string) (int64, error) {
	var n int64
	var unit string
	if k, err := fmt.Sscanf(strings.ToUpper(s), "%d%s", &n, &unit); k == 2 && err == nil && n > 0 && n < 1<<20 {
		switch strings.TrimSuffix(unit, "IB") {
		case "M":
			return n << 20, nil
		case "G":
			return n << 30, nil
		}
	}
	return 0, usageError(fmt.Sprintf("-memory: want for example 512M or 1G, not %q", s))
}

// news is what the supervisor tells the process that has started it, one JSON object a line on descriptor 3.
type news struct {
	Say   string `json:"say,omitempty"`
	Up    *Info  `json:"up,omitempty"`
	Error string `json:"error,omitempty"`
	Kind  string `json:"kind,omitempty"`
}

// remoteError is an error that came from another process as text.
type remoteError struct{ text, kind string }

func (e *remoteError) Error() string { return e.text }

func runUp(c *command) (int, error) {
	if err := c.prepare(); err != nil {
		return 1, err
	}
	if c.foreground {
		return c.stay(func(n news) {
			if n.Up != nil {
				c.printUp(*n.Up)
				fmt.Fprintln(c.stderr, "\nCtrl-C stops it.")
			} else if n.Say != "" {
				fmt.Fprintln(c.stderr, n.Say)
			}
		})
	}
	self, err := os.Executable()
	if err != nil {
		return 1, &InfraError{Op: "start the lab's process", Err: err}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return 1, &InfraError{Op: "start the lab's process", Err: err}
	}
	defer r.Close()
	args := []string{"lab", "supervise", "-name", c.name, "-kernel", c.cfg.HostKernel, "-memory", c.memory,
		"-cpus", fmt.Sprint(c.cfg.HostCPUs), "-append", c.cfg.HostArgs, "-engine", c.cfg.Engine,
		"-image", c.cfg.DPUImage, "-dpu-kernel", c.cfg.DPUKernel, "-capture", c.cfg.WireCapture, "-policy", c.policy,
		fmt.Sprintf("-no-dpu=%v", c.cfg.NoDPU), fmt.Sprintf("-no-writes=%v", c.cfg.NoWrites), fmt.Sprintf("-slots=%v", c.cfg.Slots),
		fmt.Sprintf("-datapath=%v", c.cfg.Datapath)}
	sup := exec.Command(self, args...)
	sup.ExtraFiles = []*os.File{w}
	sup.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives this terminal
	err = sup.Start()
	w.Close()
	if err != nil {
		return 1, &InfraError{Op: "start the lab's process", Err: err}
	}
	// Ctrl-C here, while the lab comes up, stops it.
	interrupted := context.AfterFunc(c.ctx, func() { sup.Process.Signal(syscall.SIGTERM) })
	defer interrupted()
	dec := json.NewDecoder(r)
	for {
		var n news
		if err := dec.Decode(&n); err != nil {
			err = errors.Join(c.ctx.Err(), sup.Wait())
			return 1, &InfraError{Op: "start the lab", Err: errors.Join(errors.New("its process has ended"), err)}
		}
		switch {
		case n.Error != "":
			sup.Wait() // it says so itself, and ends
			return 1, &remoteError{n.Error, n.Kind}
		case n.Up != nil:
			c.printUp(*n.Up)
			return 0, nil
		default:
			fmt.Fprintln(c.stderr, n.Say)
		}
	}
}

func runSupervise(c *command) (int, error) {
	if err := c.prepare(); err != nil {
		return 1, err
	}
	out := os.NewFile(3, "news")
	if out == nil {
		return 1, usageError("this verb is for the program's own use")
	}
	defer out.Close()
	e := json.NewEncoder(out)
	return c.stay(func(n news) {
		e.Encode(n) // the process that has started this one may be gone
		if n.Up != nil {
			out.Close()
		}
	})
}

// stay runs the lab in this process until someone stops it.
func (c *command) stay(tell func(news)) (int, error) {
	c.cfg.Log = sayer(func(line string) { tell(news{Say: line}) })
	l, err := Up(c.ctx, c.cfg)
	if err == nil {
		err = serveLab(c.ctx, c.name, l, func(i Info) { tell(news{Up: &i}) })
	} else {
		if _, serr := os.Stat(c.cfg.Dir); serr == nil {
			err = fmt.Errorf("%w\nits logs are in %s", err, c.cfg.Dir)
		}
		tell(news{Error: err.Error(), Kind: kindOf(err)})
	}
	if err != nil {
		return 1, err
	}
	return 0, nil
}

// sayer passes whole lines on.
type sayer func(string)

func (s sayer) Write(p []byte) (int, error) {
	for line := range strings.Lines(string(p)) {
		s(strings.TrimRight(line, "\n"))
	}
	return len(p), nil
}

func (c *command) printUp(i Info) {
	if c.json {
		c.print(i)
		return
	}
	more := ""
	if i.Name != defaultName {
		more = " -name " + i.Name
	}
	fmt.Fprintf(c.stdout, "The lab %q is up, in %s\n\n", i.Name, i.Dir)
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	if d := i.DPU; d != nil {
		fmt.Fprintf(t, "  ask the agent\tbackdoor -config %s status\n", d.Contexts)
		fmt.Fprintf(t, "  \tor: backdoor -host %s -user %s -password-file %s -fingerprint %s status\n", d.URL, d.User, d.PasswordFile, d.Fingerprint)
	}
	fmt.Fprintf(t, "  look at its memory\tbackdoor -mem %s ps\n", i.Host.RAM)
	fmt.Fprintf(t, "  make the host ill\tbackdoor lab fault%s runaway\n", more)
	fmt.Fprintf(t, "  on the host\tbackdoor lab exec%s uptime; backdoor lab console%s host\n", more, more)
	fmt.Fprintf(t, "  its TCP service\t%s\n", i.Host.Service)
	fmt.Fprintf(t, "  its BMC\t%s  user %s  password %s\n", i.BMC.URL, i.BMC.User, i.BMC.Password)
	fmt.Fprintf(t, "  stop it\tbackdoor lab down%s\n", more)
	t.Flush()
}

func runDown(c *command) (int, error) {
	dir, err := c.dir()
	if err != nil {
		return 1, err
	}
	gone, err := c.supervisorProcess()
	if err != nil {
		return 1, err
	}
	defer gone.Close()
	if err := c.call("POST", "/down", nil, nil); err != nil {
		return 1, err
	}
	if err := gone.wait(c.ctx, 30*time.Second); err != nil {
		return 1, err
	}
	if !c.keep {
		if err := os.RemoveAll(dir); err != nil {
			return 1, &InfraError{Op: "remove the run directory", Err: err}
		}
	}
	if c.json {
		c.print(map[string]string{"stopped": c.name})
	} else {
		fmt.Fprintf(c.stdout, "The lab %q is down.\n", c.name)
	}
	return 0, nil
}

func runStatus(c *command) (int, error) {
	if len(c.args) > 0 {
		return 2, usageError(fmt.Sprintf("unexpected %q", c.args[0]))
	}
	dir, err := labsDir()
	if err != nil {
		return 1, err
	}
	names := []string{c.name}
	if !c.named {
		names = nil
		list, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 1, &InfraError{Op: "list the labs", Err: err}
		}
		for _, e := range list {
			names = append(names, e.Name())
		}
	}
	labs := []Info{}
	for _, n := range names {
		one := *c
		one.name = n
		var i Info
		err := one.call("GET", "/status", nil, &i)
		if errors.Is(err, errNoLab) {
			if c.named {
				return 1, err
			}
			continue // what a killed lab has left
		}
		if err != nil {
			return 1, err
		}
		labs = append(labs, i)
	}
	if c.json {
		c.print(labs)
		return 0, nil
	}
	if len(labs) == 0 {
		fmt.Fprintln(c.stdout, "No lab is up. Start one with: backdoor lab up")
		return 0, nil
	}
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "LAB\tSINCE\tHOST\tSTATE\tBOOTS\tDPU\tAGENT")
	for _, i := range labs {
		dpu, url := "none", "-"
		if i.DPU != nil {
			dpu, url = i.DPU.State, i.DPU.URL
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", i.Name, time.Since(i.Started).Round(time.Second), i.Host.Kernel, i.Host.State, i.Host.Boots, dpu, url)
	}
	t.Flush()
	return 0, nil
}

func runFault(c *command) (int, error) {
	if len(c.args) != 1 {
		return 2, usageError(fmt.Sprintf("want one fault of %v", faultNames()))
	}
	if !slices.Contains(faultNames(), Fault(c.args[0])) {
		return 2, usageError(fmt.Sprintf("there is no fault %q; there are %v", c.args[0], faultNames()))
	}
	var truth Truth
	if err := c.call("POST", "/fault", faultRequest{Fault(c.args[0])}, &truth); err != nil {
		return 1, err
	}
	if c.json {
		c.print(truth)
		return 0, nil
	}
	fmt.Fprintf(c.stdout, "%s  %s", truth.Start.Format("15:04:05.000"), truth.Fault)
	if truth.CPU >= 0 {
		fmt.Fprintf(c.stdout, "  CPU %d", truth.CPU)
	}
	if truth.PID != 0 {
		fmt.Fprintf(c.stdout, "  process %d (%s) of user %d", truth.PID, truth.Comm, truth.UID)
	}
	fmt.Fprintln(c.stdout)
	return 0, nil
}

// powerOps are what `backdoor lab power` takes.
var powerOps = []string{"on", "off", "cycle", "reset", "button", "nmi", "freeze", "thaw"}

func runPower(c *command) (int, error) {
	if len(c.args) != 1 || !slices.Contains(powerOps, c.args[0]) {
		return 2, usageError("want one of " + strings.Join(powerOps, ", "))
	}
	if err := c.call("POST", "/power", powerRequest{c.args[0]}, nil); err != nil {
		return 1, err
	}
	if c.json {
		c.print(map[string]string{"done": c.args[0]})
	}
	return 0, nil
}

func runExec(c *command) (int, error) {
	if len(c.args) == 0 {
		return 2, usageError("want a command line for the host's shell")
	}
	var r control.ExecResult
	if err := c.call("POST", "/exec", control.ExecArgs{Command: strings.Join(c.args, " ")}, &r); err != nil {
		return 1, err
	}
	if c.json {
		c.print(r)
		return r.Code, nil
	}
	io.WriteString(c.stdout, r.Stdout) // there is no one to tell that the output is gone
	io.WriteString(c.stderr, r.Stderr)
	return r.Code, nil
}
