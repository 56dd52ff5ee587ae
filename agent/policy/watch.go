package policy

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/ext"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Watch is a detector that an operator has written: an expression in the Common Expression Language over what the host has.
// Its findings are of the kind "policy", with the name of the watch in Finding.Rule; a rule of the table is for all of them, or,
// as "policy/NAME", for those of one.
//
// If is either a condition, which makes one finding when it is true, or a list of tasks, modules or sockets, of which each makes
// one, with that as the culprit:
//
//	tasks.filter(t, t.comm == "xmrig" && t.uid != 0)
//	sockets.exists(s, s.state == "LISTEN" && s.localPort == 4444)
//	modules.filter(m, m.hidden || m.name == "nfsd")
//	host.threads > 5000 && host.available < host.total / 10
//
// There are tasks (all threads), modules, sockets and host; Task, Module, Socket and Host say what is known of each. Names of
// processes are what their users like: so a rule that acts by itself may do nothing worse to a host than to end or stop the
// process that the finding names.
type Watch struct {
	Name     string          `json:"name"` // lower-case letters, digits and dashes
	Title    string          `json:"title,omitempty"`
	If       string          `json:"if"`
	Severity detect.Severity `json:"severity,omitempty"` // Warning if it is empty
	Every    Duration        `json:"every,omitempty"`    // 1 s if it is zero
	// For is how long it must be so before it is a finding.
	For Duration `json:"for,omitempty"`
}

// Task is a task as expressions see it. Times are in seconds, sizes in bytes.
type Task struct {
	PID     int     `cel:"pid"`
	TGID    int     `cel:"tgid"` // of the process
	PPID    int     `cel:"ppid"`
	Comm    string  `cel:"comm"`
	State   string  `cel:"state"` // R S D T t Z X P I
	UID     int64   `cel:"uid"`   // effective
	KThread bool    `cel:"kthread"`
	CPU     int     `cel:"cpu"`
	RSS     int64   `cel:"rss"`
	Used    float64 `cel:"used"` // time on CPUs
	Age     float64 `cel:"age"`  // since its start; zero if the host's clock is not known

	start time.Duration
}

// Module is a kernel module as expressions see it.
type Module struct {
	Name   string `cel:"name"`
	State  string `cel:"state"` // live, coming, going
	Size   int64  `cel:"size"`
	Refs   int    `cel:"refs"`
	Taint  string `cel:"taint"`  // letters as in oopses: O is out of tree, E unsigned
	Hidden bool   `cel:"hidden"` // it is live, and not in all of the kernel's lists
}

// Socket is a socket as expressions see it.
type Socket struct {
	Protocol   string   `cel:"protocol"` // tcp, tcp6, udp, udp6, unix, packet, …
	State      string   `cel:"state"`    // as ss(8) has it
	Local      string   `cel:"local"`    // address
	LocalPort  int      `cel:"localPort"`
	Remote     string   `cel:"remote"`
	RemotePort int      `cel:"remotePort"`
	UID        int64    `cel:"uid"`
	PIDs       []int    `cel:"pids"`  // of the processes that have it open
	Comms      []string `cel:"comms"` // their names
}

// Host is what expressions know of the host as a whole. Sizes are in bytes.
type Host struct {
	Uptime    float64 `cel:"uptime"` // seconds
	CPUs      int     `cel:"cpus"`
	Threads   int     `cel:"threads"`
	Forks     int64   `cel:"forks"` // ever
	Files     int64   `cel:"files"`
	Total     int64   `cel:"total"` // memory
	Available int64   `cel:"available"`
	Slab      int64   `cel:"slab"`
	SwapFree  int64   `cel:"swapFree"`
	OOMKills  int64   `cel:"oomKills"`
	Oopses    int     `cel:"oopses"`
}

const (
	maxWatches    = 64
	maxExpression = 4096
	watchEvery    = time.Second
	// An evaluation may take watchCost steps as CEL counts them, about one for each comparison, and watchTime.
	watchCost     = 1_000_000
	watchTime     = time.Second
	maxWatchFound = 16 // findings of one watch at once
	maxSockets    = 1 << 14
)

var watchName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// environment is the language that Watch.If is written in.
func environment() (*cel.Env, error) {
	return cel.NewEnv(
		ext.NativeTypes(ext.ParseStructTags(true), reflect.TypeFor[Task](), reflect.TypeFor[Module](), reflect.TypeFor[Socket](), reflect.TypeFor[Host]()),
		cel.Variable("tasks", cel.ListType(cel.ObjectType("policy.Task"))),
		cel.Variable("modules", cel.ListType(cel.ObjectType("policy.Module"))),
		cel.Variable("sockets", cel.ListType(cel.ObjectType("policy.Socket"))),
		cel.Variable("host", cel.ObjectType("policy.Host")),
		cel.CrossTypeNumericComparisons(true),
		ext.Strings(), ext.Sets(),
	)
}

// watch is one that was compiled.
type watch struct {
	Watch
	program                 cel.Program
	tasks, modules, sockets bool // what it is about
}

// compileWatches returns the watches ready to run. The error says where in the document and where in the expression.
func (p Policy) compileWatches() ([]watch, error) {
	if len(p.Watches) == 0 {
		return nil, nil
	}
	bad := func(i int, field, format string, args ...any) error {
		return fmt.Errorf("policy: watches[%d].%s: %s: %w", i, field, fmt.Sprintf(format, args...), ErrInvalid)
	}
	if len(p.Watches) > maxWatches {
		return nil, fmt.Errorf("policy: watches: there are %d; %d are allowed: %w", len(p.Watches), maxWatches, ErrInvalid)
	}
	env, err := environment()
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	var out []watch
	for i, w := range p.Watches {
		switch {
		case !watchName.MatchString(w.Name):
			return nil, bad(i, "name", "%q must be lower-case letters, digits and dashes, at most 32", w.Name)
		case slices.ContainsFunc(p.Watches[:i], func(o Watch) bool { return o.Name == w.Name }):
			return nil, bad(i, "name", "%q is there already", w.Name)
		case w.If == "" || len(w.If) > maxExpression:
			return nil, bad(i, "if", "an expression of 1 to %d bytes is needed", maxExpression)
		case w.Severity != "" && w.Severity != detect.Warning && w.Severity != detect.Critical:
			return nil, bad(i, "severity", "%q must be %q or %q", w.Severity, detect.Warning, detect.Critical)
		case w.Every != 0 && time.Duration(w.Every) < 100*time.Millisecond || w.Every > Duration(24*time.Hour):
			return nil, bad(i, "every", "%v must be from 100ms to 24h", time.Duration(w.Every))
		case w.For > Duration(24*time.Hour):
			return nil, bad(i, "for", "%v is more than 24h", time.Duration(w.For))
		}
		ast, iss := env.Compile(w.If)
		if iss.Err() != nil {
			return nil, bad(i, "if", "%v", iss.Err())
		}
		switch t := ast.OutputType(); {
		case t.IsExactType(cel.BoolType):
		case slices.ContainsFunc([]string{"policy.Task", "policy.Module", "policy.Socket"}, func(n string) bool { return t.IsExactType(cel.ListType(cel.ObjectType(n))) }):
		default:
			return nil, bad(i, "if", "%s is a %v; it must be a condition, or a list of tasks, modules or sockets", w.If, t)
		}
		prg, err := env.Program(ast, cel.CostLimit(watchCost), cel.InterruptCheckFrequency(100))
		if err != nil {
			return nil, bad(i, "if", "%v", err)
		}
		c := watch{Watch: w, program: prg}
		for _, r := range ast.NativeRep().ReferenceMap() {
			switch r.Name {
			case "tasks":
				c.tasks = true
			case "modules":
				c.modules = true
			case "sockets":
				c.sockets = true
			}
		}
		out = append(out, c)
	}
	return out, nil
}

// Watching returns the detectors that the operators have written. The policy must be one that Check takes.
func (p Policy) Watching() ([]detect.Detector, error) {
	ws, err := p.compileWatches()
	if err != nil {
		return nil, err
	}
	var out []detect.Detector
	for _, w := range ws {
		title := w.Title
		if title == "" {
			title = w.Name
		}
		d := detect.Detector{
			ID: "policy/" + w.Name, Title: title, Kind: detect.KindPolicy, Severity: detect.Warning,
			Every: watchEvery, For: time.Duration(w.For), DependsOn: []detect.Kind{detect.KindPanic, detect.KindHostSilent},
			Needs: []detect.Need{detect.NeedHeartbeats, detect.NeedUsage}, Detect: w.detect,
		}
		if w.Every != 0 {
			d.Every = time.Duration(w.Every)
		}
		if w.Severity != "" {
			d.Severity = w.Severity
		}
		if w.tasks {
			d.Needs = append(d.Needs, detect.NeedTasks)
		}
		out = append(out, d)
	}
	return out, nil
}

func (w *watch) detect(ctx context.Context, p *detect.Pass) ([]detect.Finding, error) {
	vars, err := w.variables(p)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", w.Name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, watchTime)
	defer cancel()
	v, _, err := w.program.ContextEval(ctx, vars)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", w.Name, err)
	}
	f := detect.Finding{
		Key: w.Name, Kind: detect.KindPolicy, Rule: w.Name, Severity: detect.Warning, Confidence: 1, Title: w.Title,
		Detail: "the operators' own condition is met", Evidence: []detect.Evidence{{What: "if", Value: w.If}},
	}
	if w.Severity != "" {
		f.Severity = w.Severity
	}
	if f.Title == "" {
		f.Title = w.Name
	}
	switch v := v.(type) {
	case types.Bool:
		if !v {
			return nil, nil
		}
		return []detect.Finding{f}, nil
	case traits.Lister:
		return w.each(f, v)
	}
	return nil, fmt.Errorf("watch %s: it came to a %T", w.Name, v)
}

// each makes a finding of each element of a list.
func (w *watch) each(f detect.Finding, all traits.Lister) ([]detect.Finding, error) {
	var out []detect.Finding
	seen := make(map[string]bool)
	for it := all.Iterator(); it.HasNext() == types.True && len(out) < maxWatchFound; {
		var x ref.Val = it.Next()
		g := f
		switch o := x.Value().(type) {
		case Task:
			uid := uint32(o.UID)
			g.Key = fmt.Sprintf("%s/%d@%v", w.Name, o.TGID, o.start)
			g.Culprit = detect.Culprit{PID: o.PID, TGID: o.TGID, Comm: o.Comm, UID: &uid, Start: o.start}
			g.Title = fmt.Sprintf("%s: %q (PID %d, user %d)", f.Title, o.Comm, o.PID, o.UID)
		case Module:
			g.Key = w.Name + "/" + o.Name
			g.Culprit = detect.Culprit{Module: o.Name}
			g.Title = fmt.Sprintf("%s: module %q", f.Title, o.Name)
		case Socket:
			what := fmt.Sprintf("%s %s:%d to %s:%d", o.Protocol, o.Local, o.LocalPort, o.Remote, o.RemotePort)
			g.Key = w.Name + "/" + what
			g.Title = fmt.Sprintf("%s: %s of user %d", f.Title, what, o.UID)
			if len(o.PIDs) > 0 {
				g.Evidence = append(slices.Clip(f.Evidence), detect.Evidence{What: "open in", Value: fmt.Sprintf("%q (PID %d)", o.Comms[0], o.PIDs[0])})
			}
		default:
			return nil, fmt.Errorf("watch %s: a list of %T", w.Name, o)
		}
		if !seen[g.Key] {
			seen[g.Key] = true
			out = append(out, g)
		}
	}
	return out, nil
}

var errNoView = errors.New("modules and sockets are not in recordings")

// variables is what an expression is about, as far as it asks for it.
func (w *watch) variables(p *detect.Pass) (map[string]any, error) {
	u, b := &p.Usage[len(p.Usage)-1], &p.Beats[len(p.Beats)-1]
	up := time.Duration(b.Mono)
	h := Host{
		Uptime: up.Seconds(), CPUs: len(b.CPUs), Threads: u.Threads, Forks: int64(u.Forks), Files: int64(u.Files),
		Total: int64(u.Total), Available: int64(u.Available), Slab: int64(u.Slab), SwapFree: int64(u.SwapFree), OOMKills: int64(u.OOMKills),
	}
	if n := len(p.Signs); n > 0 {
		h.Oopses = p.Signs[n-1].Oopses
	}
	vars := map[string]any{"host": h, "tasks": []Task(nil), "modules": []Module(nil), "sockets": []Socket(nil)}
	if w.tasks {
		all := p.Tasks[len(p.Tasks)-1].Tasks
		ts := make([]Task, len(all))
		for i, t := range all {
			ts[i] = Task{PID: t.PID, TGID: t.TGID, PPID: t.PPID, Comm: t.Comm, State: t.State, UID: int64(t.UID), KThread: t.KThread, CPU: t.CPU,
				RSS: int64(t.RSS), Used: t.Runtime.Seconds(), Age: max(0, (up - t.Start).Seconds()), start: t.Start}
		}
		vars["tasks"] = ts
	}
	if (w.modules || w.sockets) && p.View == nil {
		return nil, errNoView
	}
	if w.modules {
		var ms []Module
		for m, err := range p.View.Modules() {
			if err != nil {
				return nil, err
			}
			ms = append(ms, Module{Name: m.Name, State: m.State, Size: int64(m.Size), Refs: m.Refs, Taint: kernel.Taint(m.Taint), Hidden: m.Missing})
		}
		vars["modules"] = ms
	}
	if w.sockets {
		var ss []Socket
		for s, err := range p.View.Sockets() {
			if err != nil {
				return nil, err
			}
			if len(ss) == maxSockets {
				return nil, fmt.Errorf("more than %d sockets", maxSockets)
			}
			x := Socket{Protocol: s.Protocol, State: s.State, LocalPort: int(s.Local.Port()), RemotePort: int(s.Remote.Port()), UID: int64(s.UID)}
			if s.Local.IsValid() {
				x.Local = s.Local.Addr().String()
			}
			if s.Remote.IsValid() {
				x.Remote = s.Remote.Addr().String()
			}
			for _, o := range s.Owners {
				x.PIDs, x.Comms = append(x.PIDs, o.PID), append(x.Comms, o.Comm)
			}
			ss = append(ss, x)
		}
		vars["sockets"] = ss
	}
	return vars, nil
}

// ruleFor returns the index of the rule for a finding, or -1. One for its watch, or its aspect, goes before one for all of the kind.
func (p Policy) ruleFor(f detect.Finding) int {
	if f.Rule != "" {
		if i := slices.IndexFunc(p.Rules, func(r Rule) bool { return r.Finding == string(f.Kind)+"/"+f.Rule }); i >= 0 {
			return i
		}
	}
	return slices.IndexFunc(p.Rules, func(r Rule) bool { return r.Finding == string(f.Kind) })
}

// known reports whether there are findings that a rule can be for.
func (p Policy) known(finding string) bool {
	if name, ok := strings.CutPrefix(finding, string(detect.KindPolicy)+"/"); ok {
		return slices.ContainsFunc(p.Watches, func(w Watch) bool { return w.Name == name })
	}
	kind, aspect, cut := strings.Cut(finding, "/")
	return slices.Contains(detect.Kinds(), detect.Kind(kind)) && (!cut || slices.Contains(detect.Aspects(detect.Kind(kind)), aspect))
}
