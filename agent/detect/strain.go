package detect

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// filling reports stores that are nearly full, or fill so steadily that they soon will be: file systems in memory, tracked connections, the
// memory of TCP. It asks for two samples in a row.
func filling(Config) Detector {
	const (
		level   = 0.95
		half    = 0.5 // below which a trend is not told of
		ahead   = 5 * time.Minute
		watched = 45 * time.Second
	)
	return Detector{
		ID: "filling", Title: "A store of the kernel fills", Kind: KindExhaustion, Severity: Warning,
		Every: jamsEvery, Clear: 10 * time.Second, DependsOn: []Kind{KindPanic, KindHostSilent}, Needs: []Need{NeedJams},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Jams)
			if n < 2 {
				return nil, nil
			}
			var out []Finding
			for _, now := range p.Jams[n-1].Stores {
				old, ok := storeIn(&p.Jams[n-2], now.Key)
				if !ok || now.Limit == 0 || len(out) == maxHung {
					continue
				}
				full := float64(now.Used) >= level*float64(now.Limit) && float64(old.Used) >= level*float64(old.Limit)
				var eta time.Duration
				first, grows := p.grows(now, watched)
				if grows && float64(now.Used) >= half*float64(now.Limit) {
					rate := float64(now.Used-first.used) / first.ago.Seconds()
					eta = time.Duration(min(float64(now.Limit-min(now.Used, now.Limit))/rate, 1e8) * float64(time.Second))
				}
				if !full && (eta == 0 || eta > ahead) {
					continue
				}
				unit, by := "", uint64(1)
				if now.Bytes {
					unit, by = " KiB", 1<<10
				}
				f := Finding{
					Key: now.Key, Kind: KindExhaustion, Severity: Warning, Confidence: 0.9,
					Title:    now.What + " is full",
					Detail:   fmt.Sprintf("%d of %d%s are used", now.Used/by, now.Limit/by, unit),
					Evidence: []Evidence{{now.Key, fmt.Sprintf("%d of %d%s", now.Used/by, now.Limit/by, unit)}},
				}
				if !full {
					f.Confidence, f.Title = 0.7, now.What+" fills"
					f.Detail += fmt.Sprintf("; at this rate the rest lasts %v", eta.Round(time.Second))
					f.Evidence = append(f.Evidence, Evidence{"time to exhaustion", eta.Round(time.Second).String()})
				}
				if at := p.mountedAt(now.Key); at != "" {
					f.Evidence = append(f.Evidence, Evidence{"mounted at", at})
					f.Title = strings.Replace(f.Title, now.What, now.What+" at "+at, 1)
				}
				out = append(out, f)
			}
			return out, nil
		},
	}
}

func storeIn(j *JamSample, key string) (kernel.Store, bool) {
	i := slices.IndexFunc(j.Stores, func(s kernel.Store) bool { return s.Key == key })
	if i < 0 {
		return kernel.Store{}, false
	}
	return j.Stores[i], true
}

type earlier struct {
	used uint64
	ago  time.Duration
}

// grows reports whether a store has grown in each fifth of the time that is known of, which is at least so long.
func (p *Pass) grows(now kernel.Store, least time.Duration) (earlier, bool) {
	n := len(p.Jams)
	var all []earlier // the newest first
	for i := n - 1; i >= 0; i-- {
		s, ok := storeIn(&p.Jams[i], now.Key)
		if !ok || i < n-1 && p.Jams[i+1].At.Sub(p.Jams[i].At) > jamsGap {
			break
		}
		all = append(all, earlier{s.Used, p.Jams[n-1].At.Sub(p.Jams[i].At)})
	}
	first := all[len(all)-1]
	if first.ago < least {
		return first, false
	}
	for part := range 5 {
		at := func(k int) uint64 {
			i := slices.IndexFunc(all, func(e earlier) bool { return e.ago >= first.ago*time.Duration(k)/5 })
			return all[i].used
		}
		if at(part) <= at(part+1) {
			return first, false
		}
	}
	return first, true
}

// mountedAt returns where a tmpfs is mounted for init; empty if nowhere, or unknown.
func (p *Pass) mountedAt(key string) string {
	dev, ok := strings.CutPrefix(key, "tmpfs ")
	if !ok || p.View == nil {
		return ""
	}
	for m, err := range p.View.Mounts(1) {
		if err != nil {
			break
		}
		if m.Dev == dev && m.Root == "/" {
			return m.Path
		}
	}
	return ""
}

// linkFlaps reports an interface whose link is lost again and again. A host that starts sets its interfaces up, and loses their links by that.
func linkFlaps(Config) Detector {
	const (
		often   = 3 // within the time that is known of, a minute
		settled = time.Minute
	)
	return Detector{
		ID: "link-flaps", Title: "A link comes and goes", Kind: KindHardware, Severity: Warning,
		Every: jamsEvery, Clear: 10 * time.Second, DependsOn: []Kind{KindPanic, KindHostSilent}, Needs: []Need{NeedJams, NeedHeartbeats},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Jams)
			up := time.Duration(p.Beats[len(p.Beats)-1].Mono)
			var out []Finding
			for _, now := range p.Jams[n-1].Links {
				first, since := now, p.Jams[n-1].At
				for i := n - 1; i >= 0 && up-p.Jams[n-1].At.Sub(p.Jams[i].At) >= settled; i-- {
					k := slices.IndexFunc(p.Jams[i].Links, func(l kernel.Link) bool { return l.Index == now.Index && l.Name == now.Name })
					if k < 0 {
						break
					}
					first, since = p.Jams[i].Links[k], p.Jams[i].At
				}
				if lost := now.Downs - first.Downs; lost >= often && lost < 1<<31 && len(out) < maxHung {
					d := p.Jams[n-1].At.Sub(since).Round(time.Second)
					out = append(out, Finding{
						Key: "link " + now.Name, Kind: KindHardware, Severity: Warning, Confidence: 0.9,
						Title:    fmt.Sprintf("the link of %s comes and goes", now.Name),
						Detail:   fmt.Sprintf("it was lost %d times within %v: a cable, a transceiver or the other side is bad", lost, d),
						Evidence: []Evidence{{"carrier_down_count", fmt.Sprintf("%d, %d more within %v", now.Downs, lost, d)}},
					})
				}
			}
			return out, nil
		},
	}
}

// Said is a record of the kernel's log that tells of trouble.
type Said struct {
	At     time.Duration `json:"at"` // since the host's boot
	What   string        `json:"what"`
	Object string        `json:"object,omitempty"`
	Text   string        `json:"text"`
}

// saying is a kind of record: what the kernel writes when it is told of trouble, and how often within the time that is known of, a minute, it must for that to be a
// finding.
type saying struct {
	what     string
	says     *regexp.Regexp // its group, if it has one, is the object
	least    int
	kind     Kind
	severity Severity
	title    string // with %s for the object, if any
	detail   string
}

// sayings are in the words of the kernel's sources, which are named. An unprivileged user can bring none of them about by choosing a name.
var sayings = []saying{
	// block/blk-core.c blk_print_req_error; before v5.18 with the name of a function before.
	{"disk-error", regexp.MustCompile(`^(?:blk_update_request: |print_req_error: )?(?:I/O|critical medium|critical target|critical nexus|protection|timeout|recoverable transport) error, dev (\S+), sector \d+`), 1,
		KindHardware, Critical, "disk %s reports errors", "requests to it have ended with an error: what was to be read or written is lost, if nothing repeats it"},
	// fs/ext4/super.c __ext4_error, fs/xfs/xfs_message.c with XFS_PTAG_…, fs/btrfs/messages.c
	{"file-system", regexp.MustCompile(`^(?:EXT4-fs error|BTRFS error|BTRFS critical) \(device ([^\s):]+)`), 1,
		KindHardware, Critical, "the file system on %s is broken", "the kernel has met what should not be there"},
	{"xfs", regexp.MustCompile(`^XFS \(([^\s)]+)\): .*(?:[Cc]orruption|metadata I/O error|Shutting down)`), 1,
		KindHardware, Critical, "the file system on %s is broken", "the kernel has met what should not be there"},
	// drivers/nvme/host/pci.c nvme_timeout
	{"disk-timeout", regexp.MustCompile(`^nvme (\S+): (?:I/O (?:tag )?\d+.* timeout|controller is down)`), 1,
		KindHardware, Warning, "disk %s does not answer in time", "requests to it have timed out"},
	// drivers/ata/libata-eh.c ata_eh_link_report
	{"disk-failed", regexp.MustCompile(`^(ata\d+(?:\.\d+)?): (?:failed command: |exception Emask )`), 1,
		KindHardware, Warning, "%s has failed commands", "a disk, its cable or its controller is bad"},
	// drivers/pci/pcie/aer.c aer_print_error
	{"pci-error", regexp.MustCompile(`^(?:[\w-]+ )?([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]): (?:AER: )?PCIe Bus Error: severity=Uncorrect`), 1,
		KindHardware, Critical, "PCI device %s has met an error that cannot be corrected", "what was under way on its link is lost"},
	{"pci-corrected", regexp.MustCompile(`^(?:[\w-]+ )?([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]): (?:AER: )?PCIe Bus Error: severity=Correct`), 10,
		KindHardware, Warning, "the link of PCI device %s is bad", "its errors are corrected, but there are many"},
	// arch/x86/kernel/cpu/mce/therm_throt.c, drivers/thermal/intel/therm_throt.c
	{"thermal", regexp.MustCompile(`^(?:mce: )?(CPU\d+): (?:Core|Package) temperature (?:is )?above threshold`), 1,
		KindHardware, Warning, "%s is too hot and is throttled", "the cooling fails, or the room is too warm"},
	// mm/memory-failure.c
	{"memory-failure", regexp.MustCompile(`^Memory failure: (0x[0-9a-f]+): `), 1,
		KindHardware, Critical, "the page %s has lost its memory", "the hardware has told that what lay there is lost"},
	// net/ipv4/tcp_input.c tcp_syn_flood_action
	{"syn-flood", regexp.MustCompile(`^(?:TCP: )?request_sock_\w+: Possible SYN flooding on port (\S+?)\. `), 1,
		KindExhaustion, Warning, "somebody floods port %s with connections", "more connections are begun with it than its listener takes; the kernel answers with cookies, or drops them"},
	// net/netfilter/nf_conntrack_core.c
	{"conntrack", regexp.MustCompile(`^nf_conntrack: (?:nf_conntrack: )?table full, dropping packet`), 1,
		KindExhaustion, Critical, "no more connections can be tracked", "the table is full, and packets of new connections are dropped"},
}

// removable are disks that say so when nothing is in them.
var removable = regexp.MustCompile(`^(?:fd|sr)\d`)

// Notable returns what a record of the kernel's log tells of trouble; false if it tells of none.
func Notable(r kernel.LogRecord) (Said, bool) {
	if r.Facility != 0 { // not the kernel's own words
		return Said{}, false
	}
	for i := range sayings {
		if m := sayings[i].says.FindStringSubmatch(r.Text); m != nil {
			s := Said{At: r.Time, What: sayings[i].what, Text: r.Text}
			if len(m) > 1 {
				s.Object = m[1]
			}
			if removable.MatchString(s.Object) {
				return Said{}, false
			}
			return s, true
		}
	}
	return Said{}, false
}

// logged reports what the kernel has said of disks, links, PCI, heat and floods within the last minute.
func logged(Config) Detector {
	return Detector{
		ID: "logged", Title: "The kernel was told of trouble", Kind: KindHardware, Severity: Warning,
		Every: jamsEvery, Clear: 10 * time.Second, DependsOn: []Kind{KindPanic, KindHostSilent}, Needs: []Need{NeedJams},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			type about struct{ what, object string }
			times, last := make(map[about]int), make(map[about]Said)
			var order []about
			for _, j := range p.Jams {
				for _, s := range j.Said {
					k := about{s.What, s.Object}
					if times[k]++; times[k] == 1 {
						order = append(order, k)
					}
					last[k] = s
				}
			}
			var out []Finding
			for _, k := range order {
				i := slices.IndexFunc(sayings, func(s saying) bool { return s.what == k.what })
				if i < 0 || times[k] < sayings[i].least || len(out) == maxHung {
					continue
				}
				s := &sayings[i]
				title := s.title
				if strings.Contains(title, "%s") {
					title = fmt.Sprintf(title, k.object)
				}
				out = append(out, Finding{
					Key: strings.TrimSpace(k.what + " " + k.object), Kind: s.kind, Severity: s.severity, Confidence: 0.95, Title: title, Detail: s.detail,
					Evidence: []Evidence{{"log", last[k].Text}, {"records of this kind lately", fmt.Sprint(times[k])}},
				})
			}
			return out, nil
		},
	}
}

// storm reports CPUs that for some ten seconds have done nothing but interrupts' work. What ksoftirqd does is counted as that, too.
func storm(Config) Detector {
	const (
		share = 0.85 // of what was counted; in the storms of a guest it was 0.94
		least = 0.25 // which is at least that much of the time
		steps = 5    // of samples, in each of which it is so: a burst is none
	)
	return Detector{
		ID: "storm", Title: "Storm of interrupts", Kind: KindStorm, Severity: Warning,
		Every: jamsEvery, Clear: 5 * time.Second, DependsOn: []Kind{KindPanic, KindHostSilent, KindCPUStall, KindSoftLockup}, Needs: []Need{NeedJams},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Jams)
			if n <= steps {
				return nil, nil
			}
			var out []Finding
			for _, now := range p.Jams[n-1].Times {
				at := func(j *JamSample) (kernel.CPUTime, bool) {
					i := slices.IndexFunc(j.Times, func(t kernel.CPUTime) bool { return t.CPU == now.CPU })
					if i < 0 {
						return kernel.CPUTime{}, false
					}
					return j.Times[i], true
				}
				all := true
				for i := n - steps; i < n && all; i++ {
					a, ok := at(&p.Jams[i-1])
					b, ok2 := at(&p.Jams[i])
					d, counted := p.Jams[i].At.Sub(p.Jams[i-1].At), float64(b.All-a.All)
					all = ok && ok2 && d < jamsGap && counted >= least*float64(d) && float64(b.IRQ+b.Softirq-a.IRQ-a.Softirq) >= share*counted
				}
				if !all {
					continue
				}
				cpu, window := now.CPU, p.Jams[n-1].At.Sub(p.Jams[n-1-steps].At)
				was, _ := at(&p.Jams[n-1-steps])
				used, counted := now.IRQ+now.Softirq-was.IRQ-was.Softirq, now.All-was.All
				f := Finding{
					Key: fmt.Sprintf("cpu%d", cpu), Kind: KindStorm, Severity: Warning, Confidence: 0.9,
					Title:    fmt.Sprintf("CPU %d does nothing but the work of interrupts", cpu),
					Detail:   fmt.Sprintf("%v of the last %v went to them: a device, a driver or the network asks for more than can be done", used.Round(10*time.Millisecond), window.Round(10*time.Millisecond)),
					Culprit:  Culprit{CPU: &cpu},
					Evidence: []Evidence{{"irq", (now.IRQ - was.IRQ).String()}, {"softirq", (now.Softirq - was.Softirq).String()}, {"counted", counted.String()}},
				}
				out = append(out, f)
			}
			return out, nil
		},
	}
}

// strangers reports kernel threads that nobody but a stranger makes: they are not kthreadd's, who makes all of them since 2.6, nor init's
// siblings. It asks for two lists in a row: what becomes a program in a moment was a kernel thread before.
func strangers(Config) Detector {
	strange := func(t *kernel.Task) bool { return t.KThread && t.PID > 2 && t.PPID != 2 && t.PID == t.TGID }
	return Detector{
		ID: "kernel-threads", Title: "Kernel thread of a stranger", Kind: KindTampering, Severity: Critical,
		Every: time.Second, DependsOn: []Kind{KindPanic, KindHostSilent}, Needs: []Need{NeedTasks},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			n := len(p.Tasks)
			if n < 2 {
				return nil, nil
			}
			before := make(map[taskKey]bool)
			for i := range p.Tasks[n-2].Tasks {
				if t := &p.Tasks[n-2].Tasks[i]; strange(t) {
					before[taskKey{t.PID, t.Start}] = true
				}
			}
			var out []Finding
			for i := range p.Tasks[n-1].Tasks {
				t := &p.Tasks[n-1].Tasks[i]
				if !strange(t) || !before[taskKey{t.PID, t.Start}] || len(out) == maxHung {
					continue
				}
				uid := t.UID
				out = append(out, Finding{
					Key: fmt.Sprintf("kthread %d@%v", t.PID, t.Start), Kind: KindTampering, Severity: Critical, Confidence: 0.85,
					Title:    fmt.Sprintf("%q (PID %d) is a kernel thread that kthreadd has not made", t.Comm, t.PID),
					Detail:   fmt.Sprintf("its parent is PID %d: code in the kernel has made it by itself, as no driver does", t.PPID),
					Culprit:  Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, UID: &uid, Start: t.Start},
					Evidence: []Evidence{{"parent", fmt.Sprint(t.PPID)}},
				})
			}
			return out, nil
		},
	}
}

// Injected is executable memory of no file that a process of root was given after it had run for a while without any.
type Injected struct {
	Task  kernel.Task         `json:"task"`
	Parts []kernel.Executable `json:"parts"`
}

// injected reports processes of root that have got code of no file. Those that translate code by themselves have such memory soon after
// their start, and are left alone.
func injected(Config) Detector {
	return Detector{
		ID: "injected-code", Title: "Code of no file in a process of root", Kind: KindTampering, Severity: Warning,
		Every: jamsEvery, DependsOn: []Kind{KindPanic, KindHostSilent}, Needs: []Need{NeedJams},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			var out []Finding
			for _, x := range p.Jams[len(p.Jams)-1].Injected {
				if len(x.Parts) == 0 || len(out) == maxHung {
					continue
				}
				t, uid := x.Task, x.Task.UID
				f := Finding{
					Key: fmt.Sprintf("code %d@%v", t.TGID, t.Start), Kind: KindTampering, Severity: Warning, Confidence: 0.7,
					Title:   fmt.Sprintf("%q (PID %d) of root has got code of no file", t.Comm, t.TGID),
					Detail:  "it had none when it had run for a while, and now has memory that may be executed and was read from no file: either it translates code itself, or somebody has put it there",
					Culprit: Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, UID: &uid, Start: t.Start},
				}
				for _, e := range x.Parts[:min(len(x.Parts), 8)] {
					perms := "r-x"
					if e.Write {
						perms, f.Confidence = "rwx", 0.8
					}
					f.Evidence = append(f.Evidence, Evidence{"mapping", fmt.Sprintf("%#x-%#x %s", e.Start, e.End, perms)})
				}
				out = append(out, f)
			}
			return out, nil
		},
	}
}
