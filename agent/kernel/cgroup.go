package kernel

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"regexp"
	"strings"
	"time"
)

// Cgroup is a control group of the unified hierarchy (struct cgroup, include/linux/cgroup-defs.h). What a controller keeps is nil
// where it is not enabled, and of the root, for which the kernel accounts elsewhere.
type Cgroup struct {
	Addr   VirtAddr      `json:"addr"`
	ID     uint64        `json:"id"`    // its inode in cgroupfs; bpf(2) and tracing know it by that
	Path   string        `json:"path"`  // from the root on: / or /system.slice/ssh.service
	Tasks  int           `json:"tasks"` // threads in it, without those below
	Frozen bool          `json:"frozen"`
	Dying  int           `json:"dying"` // groups below that were removed but are still held by what they account for
	CPU    *CgroupCPU    `json:"cpu,omitempty"`
	Memory *CgroupMemory `json:"memory,omitempty"`
	PIDs   *CgroupPIDs   `json:"pids,omitempty"`
}

// NoLimit stands for a limit that is not set.
const NoLimit = -1

// CgroupCPU is what the CPU controller limits (struct task_group, kernel/sched/sched.h), and what the group and those below have
// used.
type CgroupCPU struct {
	Usage  time.Duration `json:"usage"`
	User   time.Duration `json:"user"` // as the ticks sampled it; the kernel shows it scaled to Usage
	System time.Duration `json:"system"`
	Weight int           `json:"weight"` // zero if the controller is not enabled
	// Quota is the time that it may use in each Period, or NoLimit.
	Quota     time.Duration `json:"quota"`
	Period    time.Duration `json:"period"`
	Periods   uint64        `json:"periods"`   // in which there was a quota
	Throttled uint64        `json:"throttled"` // of these, in which it was used up
	Stalled   time.Duration `json:"stalled"`   // how long the CPUs were kept from it then, summed up
}

// CgroupMemory is what the memory controller accounts for and limits (struct mem_cgroup), in bytes, with the groups below.
type CgroupMemory struct {
	Current int64 `json:"current"`
	Peak    int64 `json:"peak"`
	Min     int64 `json:"min"`
	Low     int64 `json:"low"`
	High    int64 `json:"high"` // or NoLimit, as Max
	Max     int64 `json:"max"`
	Swap    int64 `json:"swap"`
	SwapMax int64 `json:"swapMax"`
	// How often, since it was made: memory.events.
	HitHigh  uint64 `json:"hitHigh"`
	HitMax   uint64 `json:"hitMax"`
	OOMs     uint64 `json:"ooms"`
	OOMKills uint64 `json:"oomKills"`
}

// CgroupPIDs is what the pids controller counts and limits (struct pids_cgroup).
type CgroupPIDs struct {
	Current int64 `json:"current"`
	Max     int64 `json:"max"` // or NoLimit
	Peak    int64 `json:"peak"`
}

const (
	maxCgroups     = 1 << 17
	maxCgroupDepth = 256
)

type cgroupWalk struct {
	v                                    *View
	cgroup, kn, rstat, memory, pids, cpu *shape
	sibling                              uint64
	memoryCSS, pidsCSS, cpuCSS           uint64 // where each holds its cgroup_subsys_state
	memoryID, pidsID, cpuID              int64
	cssFlags                             *shape
	online, visible                      uint64 // flags
	events                               map[string]int64
	task, set                            *shape

	tasks map[VirtAddr]int
	all   []Cgroup
}

// Cgroups lists the control groups of the unified hierarchy (cgroup v2), each before those below it.
func (v *View) Cgroups() iter.Seq2[Cgroup, error] {
	return settled(v, "walk cgroups", func() ([]Cgroup, error) {
		w := cgroupWalk{v: v}
		err := w.run()
		return w.all, err
	})
}

func (w *cgroupWalk) run() error {
	if err := w.resolve(); err != nil {
		return err
	}
	r := resolver{img: w.v.img}
	root := r.symbol("cgrp_dfl_root") + VirtAddr(r.field("cgroup_root", 0, "cgrp"))
	if r.err != nil {
		return r.err
	}
	w.tasks = make(map[VirtAddr]int)
	for t, err := range w.v.Tasks() {
		if err != nil {
			return err
		}
		if t.State == "Z" || t.State == "X" {
			continue
		}
		group, err := w.of(t.Addr)
		if err != nil {
			return err
		}
		w.tasks[group]++
	}
	_, _, err := w.descend(root, "", 0)
	return err
}

func (w *cgroupWalk) resolve() error {
	r := resolver{img: w.v.img}
	img := w.v.img
	// Since v6.16 what is accounted per CPU is a structure of its own.
	rstat := "cgroup_rstat_cpu"
	if _, err := img.types.field("cgroup", "rstat_base_cpu"); err == nil {
		rstat = "cgroup_rstat_base_cpu"
	}
	w.cgroup = r.shape("cgroup", "self.flags", "self.sibling[]", "self.children[]", "kn", "subsys[]", "freezer.freeze|freezer.e_freeze", "nr_dying_descendants",
		"rstat_base_cpu|rstat_cpu", "bstat.cputime.utime", "bstat.cputime.stime", "bstat.cputime.sum_exec_runtime",
		"last_bstat.cputime.utime", "last_bstat.cputime.stime", "last_bstat.cputime.sum_exec_runtime")
	w.sibling = r.field("cgroup", 0, "self.sibling")
	w.kn = r.shape("kernfs_node", "name", "id")
	w.rstat = r.shape(rstat, "bstat.cputime.utime", "bstat.cputime.stime", "bstat.cputime.sum_exec_runtime",
		"last_bstat.cputime.utime", "last_bstat.cputime.stime", "last_bstat.cputime.sum_exec_runtime")
	w.task = r.shape("task_struct", "cgroups")
	w.set = r.shape("css_set", "dfl_cgrp")
	w.cssFlags = r.shape("cgroup_subsys_state", "flags")
	for name, to := range map[string]*uint64{"CSS_ONLINE": &w.online, "CSS_VISIBLE": &w.visible} {
		n, err := img.types.enumerator(name)
		if err != nil {
			r.fail(err)
		}
		*to = uint64(n)
	}
	if r.err != nil {
		return r.err
	}
	// A kernel may be built without a controller.
	controller := func(id *int64, name string, s **shape, css *uint64, typ, member string, paths ...string) {
		*id = -1
		n, err := img.types.enum("cgroup_subsys_id", name)
		if err != nil {
			return
		}
		try := resolver{img: img}
		*s = try.shape(typ, paths...)
		*css = try.field(typ, 0, member)
		if try.err == nil {
			*id = n
		}
	}
	controller(&w.memoryID, "memory_cgrp_id", &w.memory, &w.memoryCSS, "mem_cgroup", "css",
		"memory.usage.counter", "memory.watermark", "memory.min", "memory.low", "memory.high", "memory.max", "swap.usage.counter", "swap.max", "memory_events[]")
	controller(&w.pidsID, "pids_cgrp_id", &w.pids, &w.pidsCSS, "pids_cgroup", "css", "counter.counter", "limit.counter|limit", "watermark?")
	controller(&w.cpuID, "cpu_cgrp_id", &w.cpu, &w.cpuCSS, "task_group", "css", "shares", "cfs_bandwidth.quota?", "cfs_bandwidth.period?",
		"cfs_bandwidth.nr_periods?", "cfs_bandwidth.nr_throttled?", "cfs_bandwidth.throttled_time?")
	w.events = make(map[string]int64)
	for _, name := range []string{"MEMCG_HIGH", "MEMCG_MAX", "MEMCG_OOM", "MEMCG_OOM_KILL"} {
		if n, err := img.types.enum("memcg_memory_event", name); err == nil && n >= 0 {
			w.events[name] = n
		}
	}
	return nil
}

// of returns the group of a task.
func (w *cgroupWalk) of(task VirtAddr) (VirtAddr, error) {
	t, err := w.v.thing(w.task, task)
	if err != nil {
		return 0, err
	}
	set, err := w.v.thing(w.set, t.ptr("cgroups"))
	if err != nil {
		return 0, err
	}
	return set.ptr("dfl_cgrp"), nil
}

// cpuTime is what a group has used, or a part of it.
type cpuTime struct{ user, system, total int64 }

func cpuTimeOf(t *thing, prefix string) cpuTime {
	return cpuTime{int64(t.num(prefix + ".cputime.utime")), int64(t.num(prefix + ".cputime.stime")), int64(t.num(prefix + ".cputime.sum_exec_runtime"))}
}

func (c *cpuTime) add(d cpuTime, sign int64) {
	c.user += sign * d.user
	c.system += sign * d.system
	c.total += sign * d.total
}

// descend describes a group and those below it, and returns what the group has used, and how much of that its parent's sum has.
func (w *cgroupWalk) descend(at VirtAddr, parent string, depth int) (used, known cpuTime, err error) {
	if depth > maxCgroupDepth || len(w.all) == maxCgroups {
		return used, known, &CorruptError{"cgroup", at, fmt.Sprintf("%d groups, %d deep", len(w.all), depth)}
	}
	t, err := w.v.thing(w.cgroup, at)
	if err != nil {
		return used, known, err
	}
	kn, err := w.v.thing(w.kn, t.ptr("kn"))
	if err != nil {
		return used, known, err
	}
	c := Cgroup{Addr: at, ID: kn.num("id"), Path: "/", Tasks: w.tasks[at], Frozen: t.num("freezer.freeze")&0xff != 0, Dying: t.int("nr_dying_descendants")}
	if depth > 0 {
		name, err := w.v.cstring("kernfs_node", kn.ptr("name"), nameMax+1)
		if err != nil {
			return used, known, err
		}
		c.Path = strings.TrimSuffix(parent, "/") + "/" + name
	}
	// What is not yet summed up waits at each CPU (cgroup_base_stat_flush of kernel/cgroup/rstat.c).
	used, known = cpuTimeOf(&t, "bstat"), cpuTimeOf(&t, "last_bstat")
	if p := t.ptr("rstat_base_cpu"); p != 0 {
		for _, offset := range w.v.img.perCPU {
			if offset == 0 {
				continue
			}
			s, err := w.v.thing(w.rstat, p+offset)
			if err != nil {
				return used, known, err
			}
			used.add(cpuTimeOf(&s, "bstat"), 1)
			used.add(cpuTimeOf(&s, "last_bstat"), -1)
		}
	}
	mine := len(w.all)
	w.all = append(w.all, c)
	err = w.v.list("cgroup", t.at("self.children"), w.sibling, maxCgroups, func(child VirtAddr) error {
		s, err := w.v.thing(w.cgroup, child)
		if err != nil {
			return err
		}
		if s.num("self.flags")&w.online == 0 {
			return nil // removed
		}
		u, k, err := w.descend(child, c.Path, depth+1)
		used.add(u, 1)
		used.add(k, -1)
		return err
	})
	if err != nil {
		return used, known, err
	}
	if depth > 0 {
		err = w.controllers(&w.all[mine], &t, used)
	}
	return used, known, err
}

// controllers adds what the controllers of a group keep.
func (w *cgroupWalk) controllers(c *Cgroup, t *thing, used cpuTime) error {
	c.CPU = &CgroupCPU{Usage: time.Duration(used.total), User: time.Duration(used.user), System: time.Duration(used.system), Quota: NoLimit}
	css := func(id int64, s *shape, offset uint64) (thing, bool, error) {
		b := t.bytes("subsys")
		if id < 0 || id >= int64(len(b)/8) {
			return thing{}, false, nil
		}
		p := VirtAddr(le64(b[8*id:]))
		if p == 0 {
			return thing{}, false, nil
		}
		state, err := w.v.thing(w.cssFlags, p)
		if err != nil || state.num("flags")&w.visible == 0 {
			return thing{}, false, err
		}
		o, err := w.v.thing(s, p-VirtAddr(offset))
		return o, err == nil, err
	}
	o, ok, err := css(w.cpuID, w.cpu, w.cpuCSS)
	if err != nil {
		return err
	}
	if ok {
		// scale_load_down and CGROUP_WEIGHT_DFL: cpu_weight_read_u64 of kernel/sched/core.c.
		c.CPU.Weight = int((o.num("shares")>>10*100 + 512) / 1024)
		c.CPU.Period = time.Duration(o.num("cfs_bandwidth.period"))
		if q := o.num("cfs_bandwidth.quota"); q < 1<<62 && c.CPU.Period != 0 {
			c.CPU.Quota = time.Duration(q)
		}
		c.CPU.Periods, c.CPU.Throttled = uint64(o.int("cfs_bandwidth.nr_periods")), uint64(o.int("cfs_bandwidth.nr_throttled"))
		c.CPU.Stalled = time.Duration(o.num("cfs_bandwidth.throttled_time"))
	}
	if o, ok, err = css(w.memoryID, w.memory, w.memoryCSS); err != nil {
		return err
	} else if ok {
		m := &CgroupMemory{}
		bytes := func(path string) int64 {
			// PAGE_COUNTER_MAX is LONG_MAX / PAGE_SIZE (include/linux/page_counter.h).
			if n := o.num(path); n < math.MaxInt64/w.v.img.pageSize {
				return int64(n * w.v.img.pageSize)
			}
			return NoLimit
		}
		m.Current, m.Peak, m.Min, m.Low = bytes("memory.usage.counter"), bytes("memory.watermark"), bytes("memory.min"), bytes("memory.low")
		m.High, m.Max, m.Swap, m.SwapMax = bytes("memory.high"), bytes("memory.max"), bytes("swap.usage.counter"), bytes("swap.max")
		m.Current, m.Swap = max(m.Current, 0), max(m.Swap, 0)
		for name, to := range map[string]*uint64{"MEMCG_HIGH": &m.HitHigh, "MEMCG_MAX": &m.HitMax, "MEMCG_OOM": &m.OOMs, "MEMCG_OOM_KILL": &m.OOMKills} {
			if i, ok := w.events[name]; ok && i < int64(len(o.bytes("memory_events"))/8) {
				*to = le64(o.bytes("memory_events")[8*i:])
			}
		}
		c.Memory = m
	}
	if o, ok, err = css(w.pidsID, w.pids, w.pidsCSS); err != nil {
		return err
	} else if ok {
		c.PIDs = &CgroupPIDs{Current: int64(o.num("counter.counter")), Max: int64(o.num("limit.counter")), Peak: int64(o.num("watermark"))}
		if c.PIDs.Max > pidMax || c.PIDs.Max < 0 { // PIDS_MAX
			c.PIDs.Max = NoLimit
		}
	}
	return nil
}

// Container is a container of the host, as the path of its control group gives it away.
type Container struct {
	Runtime  string          `json:"runtime"`       // docker, containerd, crio, podman, lxc, machine (systemd), or what else its group is below
	ID       string          `json:"id"`            // or name
	Pod      string          `json:"pod,omitempty"` // UID of the Kubernetes pod
	Hostname string          `json:"hostname"`
	PIDNS    uint64          `json:"pidNamespace"`
	NetNS    uint64          `json:"netNamespace"`
	MountNS  uint64          `json:"mountNamespace"`
	Cgroup   Cgroup          `json:"cgroup"` // the outermost that is its own
	Tasks    []ContainerTask `json:"tasks"`  // of that and all groups below
}

// ContainerTask is a thread in a container.
type ContainerTask struct {
	PID   int    `json:"pid"` // on the host
	TGID  int    `json:"tgid"`
	Inner int    `json:"inner"` // what the container itself knows it by
	Comm  string `json:"comm"`
	State string `json:"state"`
}

// containerNames say which names of control groups are containers' own; what is in the first group is the runtime, in the last
// the ID. Monitors, which run outside, are named otherwise (libpod-conmon-…).
var (
	containerNames = []struct {
		runtime string
		name    *regexp.Regexp
	}{
		{"", regexp.MustCompile(`^(?:(docker|cri-containerd|crio|libpod|nerdctl)-)?([0-9a-f]{64})(?:\.scope)?$`)},
		{"lxc", regexp.MustCompile(`^lxc\.payload()\.(.+)$`)},
		{"machine", regexp.MustCompile(`^machine()-(.+)\.scope$`)},
		{"machine", regexp.MustCompile(`^systemd-nspawn()@(.+)\.service$`)},
	}
	podName = regexp.MustCompile(`(?:^|-)pod([0-9a-f]{8}[-_][0-9a-f_-]{27}|[0-9a-f]{32})(?:\.slice)?$`)
)

// container tells what container a control group is the outermost of.
func container(path string) (c Container, ok bool) {
	parts := strings.Split(path, "/")
	name := parts[len(parts)-1]
	parent := ""
	if len(parts) > 1 {
		parent = parts[len(parts)-2]
	}
	for _, n := range containerNames {
		m := n.name.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		c.Runtime, c.ID = n.runtime, m[2]
		switch m[1] {
		case "":
		case "cri-containerd":
			c.Runtime = "containerd"
		case "libpod":
			c.Runtime = "podman"
		default:
			c.Runtime = m[1]
		}
		if c.Runtime == "" {
			if c.Runtime = parent; strings.Contains(path, "kubepods") {
				c.Runtime = "kubernetes"
			}
		}
		ok = true
		break
	}
	if !ok && parent == "lxc" {
		c.Runtime, c.ID, ok = "lxc", name, true
	}
	if ok {
		for _, p := range parts {
			if m := podName.FindStringSubmatch(p); m != nil {
				c.Pod = strings.ReplaceAll(m[1], "_", "-")
			}
		}
	}
	return c, ok
}

// Containers lists the containers with their tasks. What is in no control group that looks like one is none.
func (v *View) Containers() iter.Seq2[Container, error] {
	return settled(v, "walk containers", func() ([]Container, error) {
		w := cgroupWalk{v: v}
		if err := w.run(); err != nil {
			return nil, err
		}
		var all []Container
		in := make(map[VirtAddr]int) // of groups; container+1
		byPath := make(map[string]int)
		for _, g := range w.all {
			i := byPath[g.Path[:strings.LastIndexByte(g.Path, '/')]]
			if c, ok := container(g.Path); ok {
				c.Cgroup = g
				all = append(all, c)
				i = len(all)
			}
			byPath[g.Path], in[g.Addr] = i, i
		}
		ids, err := v.idWalk()
		if err != nil {
			return nil, err
		}
		for t, err := range v.Tasks() {
			if err != nil {
				return all, err
			}
			group, err := w.of(t.Addr)
			if err != nil {
				return all, err
			}
			i := in[group]
			if i == 0 {
				continue
			}
			c := &all[i-1]
			inner, err := ids.pids(t.Addr)
			if err != nil {
				return all, err
			}
			task := ContainerTask{PID: t.PID, TGID: t.TGID, Comm: t.Comm, State: t.State}
			if len(inner) > 0 {
				task.Inner = inner[len(inner)-1].PID
			}
			c.Tasks = append(c.Tasks, task)
			if c.PIDNS == 0 && len(inner) > 0 {
				c.PIDNS = inner[len(inner)-1].Namespace
				ns, err := ids.namespaces(t.Addr)
				if err != nil && !errors.Is(err, ErrNotFound) {
					return all, err
				}
				c.Hostname, c.NetNS, c.MountNS = ns.Hostname, ns.Net, ns.Mount
			}
		}
		return all, nil
	})
}
