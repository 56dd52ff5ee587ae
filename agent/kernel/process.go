package kernel

import (
	"errors"
	"fmt"
	"strings"
)

// Process is a thread in all detail (struct task_struct and what hangs on it), without what its memory holds.
type Process struct {
	Task
	Parents     []int       `json:"parents"` // from its parent up to the first process
	Group       int         `json:"group"`   // PGID
	Session     int         `json:"session"`
	IDs         []PIDIn     `json:"ids"` // from the host's namespace to its own
	Namespaces  *Namespaces `json:"namespaces,omitempty"`
	Credentials Credentials `json:"credentials"`
	Cgroup      string      `json:"cgroup"` // path in the unified hierarchy

	Policy     string `json:"policy"` // SCHED_…
	Nice       int    `json:"nice"`
	RTPriority int    `json:"rtPriority"`
	CPUs       []int  `json:"cpus"` // that it may run on

	Seccomp        string `json:"seccomp"` // disabled, strict or filter
	SeccompFilters int    `json:"seccompFilters"`
	NoNewPrivs     bool   `json:"noNewPrivs"`

	OOMScoreAdj int    `json:"oomScoreAdj"`
	Pending     uint64 `json:"pending"` // signals, of the thread; bit 0 is signal 1
	Shared      uint64 `json:"shared"`  // pending signals, of the process
	Blocked     uint64 `json:"blocked"`

	Memory      *ProcessMemory `json:"memory,omitempty"` // nil of a kernel thread
	Exe         string         `json:"exe,omitempty"`
	WaitChannel string         `json:"waitChannel,omitempty"` // the function in which it sleeps
}

// Credentials are what a thread may do (struct cred, include/linux/cred.h). Capabilities are bits by CAP_….
type Credentials struct {
	UID         uint32   `json:"uid"`
	EUID        uint32   `json:"euid"`
	SUID        uint32   `json:"suid"`
	FSUID       uint32   `json:"fsuid"`
	GID         uint32   `json:"gid"`
	EGID        uint32   `json:"egid"`
	SGID        uint32   `json:"sgid"`
	FSGID       uint32   `json:"fsgid"`
	Groups      []uint32 `json:"groups"`
	Inheritable uint64   `json:"inheritable"`
	Permitted   uint64   `json:"permitted"`
	Effective   uint64   `json:"effective"`
	Bounding    uint64   `json:"bounding"`
	Ambient     uint64   `json:"ambient"`
}

// ProcessMemory is how much memory a process has, in bytes (struct mm_struct).
type ProcessMemory struct {
	Virtual   uint64 `json:"virtual"`
	Anonymous uint64 `json:"anonymous"`
	File      uint64 `json:"file"`
	Shared    uint64 `json:"shared"` // tmpfs and shared memory
	Swapped   uint64 `json:"swapped"`
	Locked    uint64 `json:"locked"`
	Tables    uint64 `json:"tables"`
}

const maxGroups = 1 << 16 // NGROUPS_MAX

// policies are SCHED_… of include/uapi/linux/sched.h.
var policies = map[uint64]string{0: "SCHED_NORMAL", 1: "SCHED_FIFO", 2: "SCHED_RR", 3: "SCHED_BATCH", 5: "SCHED_IDLE", 6: "SCHED_DEADLINE", 7: "SCHED_EXT"}

// capabilities are CAP_… of include/uapi/linux/capability.h, by their numbers.
var capabilities = strings.Fields(`chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service
	net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice
	sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm
	block_suspend audit_read perfmon bpf checkpoint_restore`)

// Capabilities names capability bits.
func Capabilities(bits uint64) []string {
	var names []string
	for i := range 64 {
		if bits>>i&1 == 0 {
			continue
		}
		name := fmt.Sprint(i)
		if i < len(capabilities) {
			name = capabilities[i]
		}
		names = append(names, name)
	}
	return names
}

// Process returns all about the thread with the given PID.
func (v *View) Process(pid int) (Process, error) {
	p, err := settle(v, func() (Process, error) { return v.process(pid) })
	if err != nil {
		return Process{}, fmt.Errorf("read process: %w", err)
	}
	return p, nil
}

// maxKeptTasks is how many tasks a View keeps, so that questions about each of them do not walk all of them each time.
const maxKeptTasks = 1 << 14

// taskOf finds a thread, and returns all, too, by their PIDs; the caller must not change them.
func (v *View) taskOf(pid int) (Task, map[int]Task, error) {
	v.mu.Lock()
	all := v.tasks
	v.mu.Unlock()
	if all == nil {
		all = make(map[int]Task)
		for t, err := range v.Tasks() {
			if err != nil {
				return Task{}, nil, err
			}
			all[t.PID] = t
		}
		if len(all) <= maxKeptTasks {
			v.mu.Lock()
			v.tasks = all
			v.mu.Unlock()
		}
	}
	t, ok := all[pid]
	if !ok {
		return t, nil, fmt.Errorf("thread %d: %w", pid, ErrNotFound)
	}
	return t, all, nil
}

func (v *View) process(pid int) (Process, error) {
	t, all, err := v.taskOf(pid)
	if err != nil {
		return Process{}, err
	}
	p := Process{Task: t, Parents: []int{}}
	for at := t.PPID; at != 0 && len(p.Parents) < len(all); at = all[at].PPID {
		p.Parents = append(p.Parents, at)
	}
	r := resolver{img: v.img}
	task := r.shape("task_struct", "policy", "static_prio", "rt_priority", "cpus_mask[]", "seccomp.mode?", "seccomp.filter_count.counter?",
		"atomic_flags", "pending.signal[]", "blocked[]", "real_cred", "signal", "mm")
	signal := r.shape("signal_struct", "oom_score_adj", "shared_pending.signal[]", "pids[]")
	pidNumbers := r.field("pid", 0, "numbers")
	nr := r.field("upid", 4, "nr")
	if r.err != nil {
		return p, r.err
	}
	x, err := v.thing(task, t.Addr)
	if err != nil {
		return p, err
	}
	p.Policy = policies[x.num("policy")]
	if p.Policy == "" {
		return p, x.corrupt("scheduling policy %d", x.num("policy"))
	}
	p.Nice, p.RTPriority = x.int("static_prio")-120, int(x.num("rt_priority")) // DEFAULT_PRIO
	mask := x.bytes("cpus_mask")
	for cpu := range min(len(v.img.perCPU), 8*len(mask)) {
		if mask[cpu/8]>>(cpu%8)&1 != 0 {
			p.CPUs = append(p.CPUs, cpu)
		}
	}
	switch x.num("seccomp.mode") {
	case 0:
		p.Seccomp = "disabled"
	case 1:
		p.Seccomp = "strict"
	case 2:
		p.Seccomp = "filter"
	default: // SECCOMP_MODE_DEAD is kept by the kernel for itself
		p.Seccomp = "dead"
	}
	p.SeccompFilters = x.int("seccomp.filter_count.counter")
	p.NoNewPrivs = x.num("atomic_flags")&1 != 0 // PFA_NO_NEW_PRIVS
	set := func(b []byte) uint64 {
		if len(b) < 8 {
			return 0
		}
		return le64(b)
	}
	p.Pending, p.Blocked = set(x.bytes("pending.signal")), set(x.bytes("blocked"))
	s, err := v.thing(signal, x.ptr("signal"))
	if err != nil {
		return p, err
	}
	p.Shared = set(s.bytes("shared_pending.signal"))
	p.OOMScoreAdj = int(int16(s.num("oom_score_adj")))
	for name, to := range map[string]*int{"PIDTYPE_PGID": &p.Group, "PIDTYPE_SID": &p.Session} {
		i, err := v.img.types.enum("pid_type", name)
		if err != nil || i < 0 || 8*i+8 > int64(len(s.bytes("pids"))) {
			continue
		}
		at := VirtAddr(le64(s.bytes("pids")[8*i:]))
		if at == 0 || !v.img.space.valid(at, 8) {
			continue // it has ended
		}
		n, err := v.Uint32(at + VirtAddr(pidNumbers+nr))
		if err != nil {
			return p, err
		}
		*to = int(n)
	}
	if p.Credentials, err = v.credentials(x.ptr("real_cred")); err != nil {
		return p, err
	}
	ids, err := v.idWalk()
	if err != nil {
		return p, err
	}
	if p.IDs, err = ids.pids(t.Addr); err != nil {
		return p, err
	}
	if ns, err := ids.namespaces(t.Addr); err == nil {
		p.Namespaces = &ns
	} else if !errors.Is(err, ErrNotFound) {
		return p, err
	}
	if p.Cgroup, err = v.cgroupPath(t.Addr); err != nil {
		return p, err
	}
	if mm := x.ptr("mm"); mm != 0 {
		if p.Memory, err = v.processMemory(mm); err != nil {
			return p, err
		}
		if p.Exe, err = v.exe(mm); err != nil {
			return p, err
		}
	}
	p.WaitChannel, err = v.waitChannel(t)
	return p, err
}

func (v *View) credentials(at VirtAddr) (c Credentials, err error) {
	r := resolver{img: v.img}
	cred := r.shape("cred", "uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid", "group_info",
		"cap_inheritable", "cap_permitted", "cap_effective", "cap_bset", "cap_ambient")
	info := r.shape("group_info", "ngroups")
	gids := r.field("group_info", 0, "gid")
	if r.err != nil {
		return c, r.err
	}
	t, err := v.thing(cred, at)
	if err != nil {
		return c, err
	}
	id := func(name string) uint32 { return uint32(t.num(name)) }
	c = Credentials{UID: id("uid"), EUID: id("euid"), SUID: id("suid"), FSUID: id("fsuid"), GID: id("gid"), EGID: id("egid"), SGID: id("sgid"), FSGID: id("fsgid"),
		Inheritable: t.num("cap_inheritable"), Permitted: t.num("cap_permitted"), Effective: t.num("cap_effective"), Bounding: t.num("cap_bset"), Ambient: t.num("cap_ambient"), Groups: []uint32{}}
	g, err := v.thing(info, t.ptr("group_info"))
	if err != nil {
		return c, err
	}
	n := g.int("ngroups")
	if n < 0 || n > maxGroups {
		return c, g.corrupt("%d groups", n)
	}
	b := make([]byte, 4*n)
	if err := v.img.space.object(v, "group_info", g.addr()+VirtAddr(gids), b); err != nil {
		return c, err
	}
	for ; len(b) > 0; b = b[4:] {
		c.Groups = append(c.Groups, le32(b))
	}
	return c, nil
}

// cgroupPath returns the path of a task's group in the unified hierarchy.
func (v *View) cgroupPath(task VirtAddr) (string, error) {
	w := cgroupWalk{v: v}
	if err := w.resolve(); err != nil {
		return "", err
	}
	r := resolver{img: v.img}
	kn := r.shape("kernfs_node", "name", "parent|__parent")
	if r.err != nil {
		return "", r.err
	}
	group, err := w.of(task)
	if err != nil {
		return "", err
	}
	c, err := v.thing(w.cgroup, group)
	if err != nil {
		return "", err
	}
	var names []string
	for at := c.ptr("kn"); ; {
		n, err := v.thing(kn, at)
		if err != nil {
			return "", err
		}
		if at = n.ptr("parent"); at == 0 {
			return joined(names), nil
		}
		name, err := v.cstring("kernfs_node", n.ptr("name"), nameMax+1)
		if err != nil {
			return "", err
		}
		if names = append(names, name); len(names) > maxCgroupDepth {
			return "", c.corrupt("more than %d groups deep", maxCgroupDepth)
		}
	}
}

func (v *View) processMemory(mm VirtAddr) (*ProcessMemory, error) {
	r := resolver{img: v.img}
	s := r.shape("mm_struct", "total_vm", "locked_vm", "pgtables_bytes.counter")
	if r.err != nil {
		return nil, r.err
	}
	t, err := v.thing(s, mm)
	if err != nil {
		return nil, err
	}
	m := &ProcessMemory{Virtual: t.num("total_vm") * v.img.pageSize, Locked: t.num("locked_vm") * v.img.pageSize, Tables: t.num("pgtables_bytes.counter")}
	for name, to := range map[string]*uint64{"MM_FILEPAGES": &m.File, "MM_ANONPAGES": &m.Anonymous, "MM_SHMEMPAGES": &m.Shared, "MM_SWAPENTS": &m.Swapped} {
		i, err := v.img.types.enumerator(name)
		if err != nil || i < 0 || i >= int64(v.img.lay.task.rss.counters) {
			continue
		}
		pages, err := v.img.mmCounter(v, mm, int(i))
		if err != nil {
			return nil, err
		}
		*to = uint64(pages) * v.img.pageSize
	}
	return m, nil
}

func (v *View) exe(mm VirtAddr) (string, error) {
	w := fileWalk{v: v}
	if err := w.resolve(); err != nil {
		return "", err
	}
	m, err := v.thing(w.mm, mm)
	if err != nil || m.ptr("exe_file") == 0 {
		return "", err
	}
	if err := w.open(OpenFile{}, "exe", m.ptr("exe_file")); err != nil {
		return "", err
	}
	return w.all[0].Path, nil
}

// waitChannel returns the function that a thread sleeps in, beyond those of the scheduler and of locks, as /proc/PID/wchan does.
func (v *View) waitChannel(t Task) (string, error) {
	if t.OnCPU || t.State == "R" || t.State == "Z" || t.State == "X" {
		return "", nil
	}
	r := resolver{img: v.img}
	from, to := r.symbol("__sched_text_start"), r.symbol("__sched_text_end")
	if r.err != nil {
		return "", r.err
	}
	s, err := v.stackOf(t)
	if err != nil {
		if tolerable(err) || errors.Is(err, ErrNotFound) {
			return "", nil
		}
		return "", err
	}
	for _, f := range s.Frames {
		if f.Addr < from || f.Addr >= to {
			return f.Symbol, nil
		}
	}
	return "", nil
}
