package detect

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

const (
	signsEvery  = 500 * time.Millisecond
	tamperEvery = 100 * time.Millisecond // a sample that confirms another one comes soon after it
	signsGap    = 3 * time.Second        // longer without a sample, and nothing is known of what was meanwhile
	maxHung     = 16                     // findings at once
)

// standing returns how far back a row of samples is unbroken and fits, the newest included.
func standing(ss []kernel.Signs, fits func(*kernel.Signs) bool) time.Duration {
	n := len(ss)
	at := n - 1
	if at < 0 || !fits(&ss[at]) {
		return -1
	}
	for at > 0 && ss[at].At.Sub(ss[at-1].At) <= signsGap && fits(&ss[at-1]) {
		at--
	}
	return ss[n-1].At.Sub(ss[at].At)
}

// oopsWho is where an oops says on whom it came, lib/dump_stack.c: "CPU: 1 PID: 312 Comm: sh Tainted: …", since v6.11 with
// "UID: 0" in between.
var oopsWho = regexp.MustCompile(`CPU: (\d+) (?:UID: \d+ )?PID: (\d+) Comm: (\S+)`)

// oopsWhat are the beginnings of what the kernel says first.
var oopsWhat = []string{"BUG: ", "Oops: ", "kernel BUG at ", "general protection fault", "invalid opcode: ", "stack segment: ", "double fault", "divide error", "traps: PANIC", "list_add corruption", "list_del corruption"}

// oops reports that the kernel has caught a fault of its own and lives on: a task died in the middle of something, with the
// locks that it held. It stands until the host is restarted.
func oops(Config) Detector {
	return Detector{
		ID: "oops", Title: "Fault in the kernel", Kind: KindOops, Severity: Critical,
		Every: signsEvery, DependsOn: []Kind{KindPanic}, Needs: []Need{NeedSigns},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			s := &p.Signs[len(p.Signs)-1]
			if s.Oopses == 0 {
				return nil, nil
			}
			f := Finding{
				Key: fmt.Sprint(s.Oopses), Kind: KindOops, Severity: Critical, Confidence: 1,
				Title:    "the kernel has oopsed",
				Detail:   "a fault in the kernel's own code has ended what ran there; locks that it held stay taken",
				Evidence: []Evidence{{"die_counter", fmt.Sprint(s.Oopses)}},
			}
			if p.View == nil {
				return []Finding{f}, nil
			}
			said, who := lastOops(p.View.Log())
			f.Culprit = who
			if said != "" {
				f.Title = "the kernel has oopsed: " + said
				f.Evidence = append(f.Evidence, Evidence{"log", said})
			}
			return []Finding{f}, nil
		},
	}
}

// lastOops returns what the kernel's log says of the latest oops, and on whom it came; empty if it says nothing.
func lastOops(log iter.Seq2[kernel.LogRecord, error]) (said string, who Culprit) {
	told := false // of whom it came on, which ends what is said of one
	for rec, err := range log {
		if err != nil {
			break // the counter is enough
		}
		if rec.Facility != 0 {
			continue // not the kernel's own words
		}
		if slices.ContainsFunc(oopsWhat, func(w string) bool { return strings.HasPrefix(rec.Text, w) }) {
			if told {
				said, who, told = "", Culprit{}, false
			}
			if !strings.HasPrefix(rec.Text, "Oops: ") || said == "" {
				said = rec.Text
			}
		}
		if m := oopsWho.FindStringSubmatch(rec.Text); m != nil && said != "" {
			cpu, _ := strconv.Atoi(m[1])
			who = Culprit{CPU: &cpu, Comm: m[3]}
			who.PID, _ = strconv.Atoi(m[2])
			told = true
		}
	}
	return said, who
}

// rcuStall reports that a grace period of RCU does not end: memory is freed no more, and sooner or later everything waits.
// The kernel itself says so after 21 s.
func rcuStall(c Config) Detector {
	return Detector{
		ID: "rcu-stall", Title: "RCU stall", Kind: KindRCUStall, Severity: Critical,
		Every: signsEvery, DependsOn: []Kind{KindPanic, KindHostSilent, KindCPUStall, KindSoftLockup}, Needs: []Need{NeedSigns},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			now := &p.Signs[len(p.Signs)-1]
			d := standing(p.Signs, func(s *kernel.Signs) bool { return s.Waiting && s.GracePeriod == now.GracePeriod })
			if d < c.RCUFor/2 {
				return nil, nil
			}
			f := Finding{
				Key: "rcu", Kind: KindRCUStall, Severity: Critical, Confidence: 0.95, Suspicion: d < c.RCUFor,
				Title:    fmt.Sprintf("RCU waits for CPUs %v", now.Holding),
				Detail:   fmt.Sprintf("the same grace period lasts %v", d.Round(100*time.Millisecond)),
				Evidence: []Evidence{{"rcu_state.gp_seq", fmt.Sprint(now.GracePeriod)}, {"quiescent states missing", fmt.Sprint(now.Holding)}},
			}
			if len(now.Holding) > 0 {
				cpu := now.Holding[0]
				f.Culprit.CPU = &cpu
				if n := len(p.Beats); n > 0 && cpu < len(p.Beats[n-1].CPUs) {
					k := p.Beats[n-1].CPUs[cpu]
					f.Culprit.PID, f.Culprit.Comm = k.CurrPID, k.CurrComm
					f.Detail += fmt.Sprintf("; CPU %d runs %q (PID %d)", cpu, k.CurrComm, k.CurrPID)
				}
			}
			return []Finding{f}, nil
		},
	}
}

// hungTask reports tasks that have waited uninterruptibly without once being woken. vfork(2), in which a parent waits so for
// its child, is no fault. The kernel itself says so after 120 s.
func hungTask(c Config) Detector {
	return Detector{
		ID: "hung-task", Title: "Hung task", Kind: KindHungTask, Severity: Warning,
		Every: c.Tasks, DependsOn: []Kind{KindPanic, KindHostSilent, KindMemoryHog}, Needs: []Need{NeedTasks},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Tasks)
			now := &p.Tasks[n-1]
			type mark struct {
				switches uint64
				since    time.Time
			}
			waits := make(map[taskKey]mark)
			for _, t := range now.Tasks {
				if t.State == "D" {
					waits[taskKey{t.PID, t.Start}] = mark{t.Switches, now.At}
				}
			}
			for i := n - 2; i >= 0 && len(waits) > 0; i-- {
				for _, t := range p.Tasks[i].Tasks {
					k := taskKey{t.PID, t.Start}
					m, ok := waits[k]
					// since is only moved while the row is unbroken: by the sample after this one.
					if ok && t.State == "D" && t.Switches == m.switches && m.since.Equal(p.Tasks[i+1].At) {
						waits[k] = mark{m.switches, p.Tasks[i].At}
					}
				}
			}
			var out []Finding
			var locks *lockState
			for _, t := range now.Tasks {
				m, ok := waits[taskKey{t.PID, t.Start}]
				d := now.At.Sub(m.since)
				if !ok || d < c.HungFor/2 || len(out) == maxHung {
					continue
				}
				uid := t.UID
				f := Finding{
					Key: fmt.Sprintf("%d@%v", t.PID, t.Start), Kind: KindHungTask, Severity: Warning, Confidence: 0.8, Suspicion: d < c.HungFor,
					Title:    fmt.Sprintf("%q (PID %d) hangs in the kernel", t.Comm, t.PID),
					Detail:   fmt.Sprintf("it has waited %v uninterruptibly without being woken", d.Round(100*time.Millisecond)),
					Culprit:  Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, UID: &uid, Start: t.Start},
					Evidence: []Evidence{{"state", "D"}, {"context switches", fmt.Sprint(t.Switches)}},
				}
				if p.View != nil {
					var names []string
					if s, err := p.View.Stack(t.PID); err == nil {
						for _, fr := range s.Frames {
							names = append(names, fr.Symbol)
						}
					}
					if slices.ContainsFunc(names, func(s string) bool { return strings.HasPrefix(s, "wait_for_vfork_done") }) {
						continue
					}
					if len(names) > 0 {
						f.Confidence = 0.9
						f.Evidence = append(f.Evidence, Evidence{"stack", strings.Join(names[:min(len(names), 12)], " ← ")})
					}
				}
				if !f.Suspicion && p.View != nil {
					if locks == nil {
						locks = readLocks(p.View)
					}
					locks.explain(&f)
				}
				out = append(out, f)
			}
			return out, nil
		},
	}
}

// lockState is who waits for whom.
type lockState struct {
	locks   []kernel.Lock
	circles [][]int
}

// readLocks reads as much of it as can be told.
func readLocks(v *kernel.View) *lockState {
	var s lockState
	for l, err := range v.Locks() {
		if err != nil {
			break // the task hangs all the same
		}
		s.locks = append(s.locks, l)
	}
	s.circles = kernel.Deadlocks(s.locks)
	return &s
}

// explain says of a hung task which lock it waits for, who holds that, and whether they wait for each other.
func (s *lockState) explain(f *Finding) {
	for i := range s.locks {
		l := &s.locks[i]
		if !slices.ContainsFunc(l.Waiters, func(w kernel.LockWaiter) bool { return w.PID == f.Culprit.PID }) {
			continue
		}
		name := l.Name
		if name == "" {
			name = l.Addr.String()
		}
		f.Culprit.Lock = name
		f.Evidence = append(f.Evidence, Evidence{"waits for", fmt.Sprintf("%s %s, with %d others", l.Kind, name, len(l.Waiters)-1)})
		f.Detail += fmt.Sprintf("; it waits for the %s %s", l.Kind, name)
		if l.Leaked {
			f.Severity, f.Confidence = Critical, 0.95
			f.Evidence = append(f.Evidence, Evidence{"held by", "a task that has ended"})
			f.Detail += ", which somebody has ended with and not given back: nobody gets it before the host is restarted, or it is given back from outside"
		}
		if l.Owner != nil {
			f.Evidence = append(f.Evidence, Evidence{"held by", fmt.Sprintf("%q (PID %d), in state %s", l.Owner.Comm, l.Owner.PID, l.Owner.State)})
			f.Detail += fmt.Sprintf(", which %q (PID %d) holds", l.Owner.Comm, l.Owner.PID)
			f.Confidence = 0.95
		}
	}
	for _, c := range s.circles {
		if !slices.Contains(c, f.Culprit.PID) {
			continue
		}
		var pids []string
		for _, pid := range append(c[:len(c):len(c)], c[0]) {
			pids = append(pids, fmt.Sprint(pid))
		}
		f.Severity, f.Confidence = Critical, 0.97
		f.Title += ", in a deadlock"
		f.Evidence = append(f.Evidence, Evidence{"deadlock", "PID " + strings.Join(pids, " waits for ")})
	}
}

// tampering reports what no kernel does to itself: tables of functions and probes that lead out of its code, processes and modules that
// are in one list and not in the other.
func tampering(c Config) Detector {
	return Detector{
		ID: "tampering", Title: "Tampering", Kind: KindTampering, Severity: Critical,
		Every: tamperEvery, DependsOn: []Kind{KindPanic, KindHostSilent}, Needs: []Need{NeedSigns},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Signs)
			now := &p.Signs[n-1]
			var out []Finding
			add := func(aspect, key, title, detail string, confidence float64, who Culprit, e ...Evidence) {
				out = append(out, Finding{Rule: aspect, Key: key, Kind: KindTampering, Severity: Critical, Title: title, Detail: detail, Confidence: confidence, Culprit: who, Evidence: e})
			}
			// What starts or ends just now is in one list for a moment, and a host that is reset in the middle of the look has anything
			// anywhere: it must have been so in the sample before.
			if n >= 2 && now.At.Sub(p.Signs[n-2].At) <= signsGap {
				old := &p.Signs[n-2]
				for _, s := range now.Strays {
					if !slices.ContainsFunc(old.Strays, func(o kernel.Stray) bool { return o.Addr == s.Addr && o.To == s.To }) || changedAt(p.Changes, s.Addr) {
						continue // what is known of how it was says more
					}
					owner := "no module that is known"
					if s.Owner != "" {
						owner = "module " + s.Owner
					}
					add("", s.Table, s.Table+" leads out of the kernel", fmt.Sprintf("it points to %v, in %s", s.To, owner), 0.99, Culprit{Module: s.Owner},
						Evidence{s.Table, s.To.String()}, Evidence{"owner", owner})
				}
				for _, t := range now.Hidden {
					if t.PID != t.TGID && slices.ContainsFunc(now.Hidden, func(o kernel.Task) bool { return o.PID == t.TGID }) {
						continue // a thread of a process that is told of
					}
					if slices.ContainsFunc(old.Hidden, func(o kernel.Task) bool { return o.PID == t.PID && o.Start == t.Start }) {
						add(AspectHidden, fmt.Sprintf("task %d@%v", t.PID, t.Start), fmt.Sprintf("%q (PID %d) is hidden", t.Comm, t.PID),
							"it has a process number and is not in the kernel's list of tasks", 0.95,
							Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, Start: t.Start}, Evidence{"task_struct", t.Addr.String()})
					}
				}
				for _, t := range now.Forged {
					if slices.ContainsFunc(old.Forged, func(o kernel.Task) bool { return o.PID == t.PID && o.Start == t.Start && o.Cred == t.Cred }) {
						add(AspectCredentials, fmt.Sprintf("cred %d@%v", t.PID, t.Start), fmt.Sprintf("%q (PID %d) has forged credentials", t.Comm, t.PID),
							fmt.Sprintf("they are accounted to user %d and say another", t.UID), 0.97,
							Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, Start: t.Start}, Evidence{"cred", t.Cred.String()}, Evidence{"cred.user", fmt.Sprint(t.UID)})
					}
				}
				for _, x := range now.Shared {
					t := &x.Task
					if slices.ContainsFunc(old.Shared, func(o kernel.SharedCred) bool {
						return o.Task.PID == t.PID && o.Task.Start == t.Start && o.Task.Cred == t.Cred
					}) {
						add(AspectCredentials, fmt.Sprintf("cred %d@%v", t.PID, t.Start), fmt.Sprintf("%q (PID %d) uses the credentials of %s", t.Comm, t.PID, x.Owner),
							"the kernel gives each process credentials of its own: a pointer was copied", 0.95,
							Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, Start: t.Start}, Evidence{"cred", t.Cred.String()}, Evidence{"cred of", x.Owner})
					}
				}
				for _, m := range now.HiddenModules {
					if slices.Contains(old.HiddenModules, m) {
						add(AspectHidden, "module "+m, fmt.Sprintf("module %q is hidden", m), "it is live, and not in all of the kernel's lists of modules", 0.95, Culprit{Module: m}, Evidence{"module", m})
					}
				}
				for _, x := range now.HiddenPrograms {
					if !slices.ContainsFunc(old.HiddenPrograms, func(o kernel.BPFSuspect) bool { return o.Addr == x.Addr && o.ID == x.ID }) {
						continue
					}
					add("", bpfKey(x)+" hidden", fmt.Sprintf("eBPF program %s is hidden", bpfName(x)), "the kernel knows it by its symbol, or links it to what calls it, and bpf(2) does not list it", 0.95,
						Culprit{}, loaded(x)...)
				}
				for _, x := range now.HarmfulPrograms {
					if !slices.ContainsFunc(old.HarmfulPrograms, func(o kernel.BPFSuspect) bool { return o.Addr == x.Addr && o.ID == x.ID }) {
						continue
					}
					uid := x.UID
					add("", bpfKey(x)+" harmful", fmt.Sprintf("eBPF program %s can change what it looks at", bpfName(x)), harms(x.Calls), 0.7, Culprit{UID: &uid}, append(loaded(x), Evidence{"calls", strings.Join(x.Calls, ", ")})...)
					out[len(out)-1].Severity = Warning
				}
				for i, h := range now.Hooks {
					same := func(o kernel.Hook) bool { return HookKey(o) == HookKey(h) }
					if slices.ContainsFunc(now.Hooks[:i], same) || !slices.ContainsFunc(old.Hooks, func(o kernel.Hook) bool { return o.At == h.At && o.To == h.To }) {
						continue
					}
					owner := "code that no module of the kernel's lists has"
					if h.Owner != "" {
						owner = fmt.Sprintf("the hidden module %q", h.Owner)
					}
					title := fmt.Sprintf("a stranger's %s at %s", h.Kind, h.Place)
					detail := fmt.Sprintf("whenever the kernel comes there, it calls %v, in %s; tracers have the kernel's own code called, and drivers show themselves", h.To, owner)
					e := []Evidence{{h.Member, h.To.String()}, {"handler in", owner}, {"record", h.Record.String()}}
					switch h.Kind {
					case "eBPF program":
						title = fmt.Sprintf("another function is called in place of eBPF program %s", h.Place)
						detail = fmt.Sprintf("whenever it is to run, the kernel calls %v; from its load to its end a program is called where its own code begins, or is interpreted", h.To)
						e = slices.Delete(e, 1, 2)
						if h.Owner != "" {
							detail = fmt.Sprintf("whenever it is to run, the kernel calls %v, in %s", h.To, owner)
						}
					case "eBPF map":
						title = fmt.Sprintf("eBPF map %s has functions that are not the kernel's", h.Place)
						detail = fmt.Sprintf("whoever reads or writes it has the kernel call those of the table at %v, which is in neither the kernel's constants nor a module of its lists", h.To)
						e = slices.Delete(e, 1, 2)
					}
					if h.Was != 0 {
						e = append(e, Evidence{"must be", h.Was.String()})
					}
					add(AspectProbe, HookKey(h), title, detail, 0.97, Culprit{Module: h.Owner}, e...)
				}
			}
			for _, t := range p.Risen {
				key := fmt.Sprintf("cred %d@%v", t.PID, t.Start)
				if slices.ContainsFunc(out, func(f Finding) bool { return f.Key == key }) {
					continue // which says more
				}
				add(AspectCredentials, key, fmt.Sprintf("%q (PID %d) has become root", t.Comm, t.PID),
					"it had no right to, and has started no program that has: system calls alone do not lead there", 0.95,
					Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, Start: t.Start}, Evidence{"cred", t.Cred.String()}, Evidence{"self_exec_id", fmt.Sprint(t.Execs)})
			}
			if out = slices.Concat(out, weakened(p.Weakened), changed(p.Changes)); len(out) == 0 && p.Uncompared != "" {
				return nil, errors.New(p.Uncompared)
			}
			return out, nil
		},
	}
}

// bpfKey is how the key of a finding about an eBPF program begins. Numbers are given once while a kernel runs, to those that have one.
func bpfKey(x kernel.BPFSuspect) string {
	if x.ID == 0 {
		return fmt.Sprintf("bpf program at %v", x.Addr)
	}
	return fmt.Sprintf("bpf program %d", x.ID)
}

func bpfName(x kernel.BPFSuspect) string { return fmt.Sprintf("%q (%d)", x.Name, x.ID) }

// loaded says of an eBPF program where it is, and who has loaded it.
func loaded(x kernel.BPFSuspect) []Evidence {
	return []Evidence{{"bpf_prog", x.Addr.String()}, {"loaded by user", fmt.Sprint(x.UID)}, {"loaded", x.Loaded.Round(time.Millisecond).String() + " after boot"}}
}

// harms says what an eBPF program does by its calls, and who may want that.
func harms(calls []string) string {
	var said []string
	for _, c := range calls {
		switch c {
		case "bpf_probe_write_user":
			said = append(said, "it writes to the memory of processes, of which the kernel itself warns in its log; tracers that hand on their marks, of programs in Go say, do so by right")
		case "bpf_override_return":
			said = append(said, "it has functions of the kernel return what it wants; only who tries out how errors are borne needs that")
		}
	}
	return strings.Join(said, "; ")
}

// HookKey is the key of the finding that a hook is one of, which all hooks of a record share.
func HookKey(h kernel.Hook) string { return fmt.Sprintf("probe %v", h.Record) }

// Weakened is a protection of the kernel as it was when it stood strongest, and as it is.
type Weakened struct {
	Was kernel.Guard `json:"was"`
	Now kernel.Guard `json:"now"`
}

// weakened reports protections that were switched off or made weaker. Some of them an administrator may lower, and may have lowered; the
// others no system call does.
func weakened(all []Weakened) []Finding {
	var out []Finding
	for _, w := range all {
		f := Finding{
			Key: "guard " + w.Now.Name, Kind: KindTampering, Severity: Warning, Confidence: 0.9,
			Title:    fmt.Sprintf("%s was lowered from %s to %s", w.Now.Name, w.Was.Text, w.Now.Text),
			Detail:   "a protection of the kernel is weaker than it was; if no administrator has done that, somebody with root's rights prepares more",
			Evidence: []Evidence{{w.Now.Object, w.Now.Text}, {"address", w.Now.Addr.String()}},
		}
		if w.Now.OneWay {
			f.Severity, f.Confidence = Critical, 0.97
			f.Detail = "no system call lowers this: it was written past the kernel"
		}
		out = append(out, f)
	}
	return out
}

// changedAt reports whether an address is in a change.
func changedAt(all []kernel.Change, at kernel.VirtAddr) bool {
	return slices.ContainsFunc(all, func(c kernel.Change) bool { return at >= c.Addr && at < c.Addr+kernel.VirtAddr(len(c.Now)) })
}

// changed reports changes, those of a symbol together.
func changed(all []kernel.Change) []Finding {
	var out []Finding
	at := make(map[string]int)
	for _, c := range all {
		where := c.Symbol
		if where == "" {
			where = c.Addr.String()
		}
		whose := "the kernel"
		if c.Module != "" {
			whose = fmt.Sprintf("module %q", c.Module)
			where += " [" + c.Module + "]"
		}
		if i, ok := at[where]; ok {
			out[i].Changes = append(out[i].Changes, c)
			continue
		}
		if len(out) == maxHung {
			break
		}
		at[where] = len(out)
		what := "a constant of " + whose
		switch c.Region {
		case "text":
			what = "code of " + whose
		case "idt":
			what = "the table of interrupts"
		}
		place := fmt.Sprintf("%s+%#x", where, c.Offset)
		out = append(out, Finding{
			Key: c.Region + " " + where, Kind: KindTampering, Severity: Critical, Confidence: 0.95, Changes: []kernel.Change{c},
			Title:    fmt.Sprintf("%s was changed: %s", what, place),
			Detail:   fmt.Sprintf("%d bytes at %v are not as they were built, or when the agent first looked, and not as the kernel itself patches them", len(c.Now), c.Addr),
			Evidence: []Evidence{{place, fmt.Sprintf("%x", []byte(c.Now[:min(len(c.Now), 32)]))}},
		})
		out[len(out)-1].Culprit.Module = c.Module
		if f := &out[len(out)-1]; c.Owner != "" {
			f.Confidence, f.Culprit.Module = 0.99, c.Owner
			f.Title = fmt.Sprintf("%s leads into module %q", place, c.Owner)
		}
		if len(c.Was) > 0 {
			out[len(out)-1].Evidence = append(out[len(out)-1].Evidence, Evidence{"was", fmt.Sprintf("%x", []byte(c.Was[:min(len(c.Was), 32)]))})
		}
	}
	return out
}

// preemptDepth are the bits of the preempt count that say how often preemption is disabled, beside interrupts
// (PREEMPT_MASK of include/linux/preempt.h).
const preemptDepth = 0xff

// softLockup reports CPUs that take their interrupts but have stayed in one stretch of the kernel's code, with preemption
// off, at every single look: nothing else runs there, and what is bound to that CPU waits. The kernel itself says so after
// some 20 s. On kernels that do not count preemption (PREEMPT_NONE without PREEMPT_DYNAMIC) it sees nothing.
func softLockup(c Config) Detector {
	return Detector{
		ID: "soft-lockup", Title: "CPU stuck in the kernel", Kind: KindSoftLockup, Severity: Critical,
		Every: slowly, DependsOn: []Kind{KindPanic, KindHostSilent, KindCPUStall}, Needs: []Need{NeedHeartbeats},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			s := p.series(c, c.strict())
			n := len(s.beats)
			if n < 2 {
				return nil, ErrTooEarly
			}
			var out []Finding
			for i := range s.beats[n-1].CPUs {
				last := &s.beats[n-1].CPUs[i]
				if !last.Online || last.Idle || time.Duration(s.beats[n-1].Mono) < bootGrace {
					continue
				}
				stuck, at := s.still(func(old, now *kernel.Heartbeat) bool {
					o, n := &old.CPUs[i], &now.CPUs[i]
					return !o.Idle && o.Curr == n.Curr && o.Switches == n.Switches && o.Preempt&preemptDepth != 0 && n.Preempt&preemptDepth != 0
				})
				if stuck < c.StallVerdict || at < 0 || s.beats[at].CPUs[i].TimerIRQs == last.TimerIRQs {
					continue // without ticks it is another fault's
				}
				cpu := last.ID
				f := Finding{
					Key: fmt.Sprintf("cpu%d", cpu), Kind: KindSoftLockup, Severity: Critical, Confidence: 0.9, Suspicion: stuck < 2*c.StallVerdict,
					Title:    fmt.Sprintf("CPU %d is stuck in the kernel", cpu),
					Detail:   fmt.Sprintf("for %v it has been running %q (PID %d) with preemption off; it ticks, and does nothing else", stuck, last.CurrComm, last.CurrPID),
					Culprit:  Culprit{CPU: &cpu, PID: last.CurrPID, Comm: last.CurrComm},
					Evidence: []Evidence{{"preemptCount", fmt.Sprintf("%#x", last.Preempt)}, {"switches", fmt.Sprint(last.Switches)}, {"timerIRQs", fmt.Sprint(last.TimerIRQs)}},
				}
				identify(&f.Culprit, p.Tasks)
				out = append(out, f)
			}
			return out, nil
		},
	}
}
