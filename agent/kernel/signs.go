package kernel

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"time"
)

// Signs are what a kernel shows of troubles that it lives on with, and of hands that are not its own.
type Signs struct {
	At     time.Time `json:"at"`     // the reader's clock
	Oopses int       `json:"oopses"` // since boot (die_counter)
	// GracePeriod is RCU's sequence number: the same number while one grace period lasts; Waiting is whether one does, and
	// Holding the CPUs that it still waits for.
	GracePeriod uint64 `json:"gracePeriod"`
	Waiting     bool   `json:"waiting"`
	Holding     []int  `json:"holding,omitempty"`
	// Strays are entries of tables of functions that lead out of the kernel's own code.
	Strays []Stray `json:"strays,omitempty"`
	// Hidden are the processes that have a PID and are not in the list of tasks, HiddenModules the modules that are not in all
	// three of their views. What starts or ends at the moment may be among them; what stays is hidden.
	Hidden        []Task   `json:"hidden,omitempty"`
	HiddenModules []string `json:"hiddenModules,omitempty"`
	// Forged are the tasks whose cred.uid is root's and whose cred.user is not: the kernel sets both together (set_user of
	// kernel/sys.c), who overwrites credentials sets the first. Their UID is the one that they are accounted to.
	Forged []Task `json:"forged,omitempty"`
	// Shared are the processes that have the credentials of another one, or the kernel's own: it gives each of its own (copy_creds of kernel/cred.c), and
	// only threads share. Of two it is the younger.
	Shared []SharedCred `json:"shared,omitempty"`
	// Hooks are the probes, and what else the kernel calls, whose handlers are in no code that the kernel admits to.
	Hooks []Hook `json:"hooks,omitempty"`
	// HiddenPrograms are eBPF programs that the kernel knows by their symbols or links, and not among those that bpf(2) lists; HarmfulPrograms those that call
	// functions by which they change what they only look at.
	HiddenPrograms  []BPFSuspect `json:"hiddenPrograms,omitempty"`
	HarmfulPrograms []BPFSuspect `json:"harmfulPrograms,omitempty"`
	// Missing says of which of these nothing could be told, and why.
	Missing []string `json:"missing,omitempty"`
}

// SharedCred is a process whose credentials are those of another.
type SharedCred struct {
	Task  Task   `json:"task"`
	Owner string `json:"owner"` // for people
}

// Stray is a pointer to a function that leads elsewhere.
type Stray struct {
	Table string   `json:"table"` // "sys_call_table[62]"
	Addr  VirtAddr `json:"addr"`  // of the entry
	To    VirtAddr `json:"to"`
	Owner string   `json:"owner,omitempty"` // the module that it leads into; empty if none is known
}

const (
	maxSyscalls = 1024
	maxStrays   = 64
	maxPIDNodes = 1 << 14
)

// signsPlan is where the signs are. Each part has an error of its own: not every kernel has all.
type signsPlan struct {
	oopses struct {
		err error
		at  VirtAddr
	}
	rcu struct {
		err                  error
		state, count, levels VirtAddr
		seq, nodes, size     uint64
		node                 *shape
	}
	calls struct {
		err             error
		table, from, to VirtAddr
		n               int
	}
	interrupts struct {
		err   error
		table VirtAddr
	}
	modules   moduleWalk
	modErr    error
	hooks     hookPlan
	callbacks *callbackPlan
	bpf       *bpfPlan
	creds     struct {
		err  error
		cred *shape
		user uint64
		init VirtAddr // init_cred; 0 if it has no name
	}
	exec struct {
		err            error
		task, mm, cred *shape
		host           VirtAddr // init_user_ns
	}
	pids struct {
		err                      error
		ns                       VirtAddr
		head, slots, first, link uint64
	}
}

// signsPlan finds them once for each Image.
func (img *Image) signsPlan() *signsPlan {
	img.signs.once.Do(func() { img.signs.plan = img.planSigns() })
	return img.signs.plan
}

func (img *Image) planSigns() *signsPlan {
	p := new(signsPlan)
	r := resolver{img: img}
	p.oopses.at = r.symbol("die_counter") // arch/x86/kernel/dumpstack.c
	p.oopses.err = r.err

	r = resolver{img: img}
	g := &p.rcu
	g.state, g.count, g.levels = r.symbol("rcu_state"), r.symbol("rcu_num_nodes"), r.symbol("rcu_num_lvls")
	g.seq, g.nodes = r.field("rcu_state", 8, "gp_seq"), r.field("rcu_state", 0, "node")
	g.node, g.size = r.shape("rcu_node", "qsmask", "grplo", "grphi", "level"), r.size("rcu_node")
	g.err = r.err

	r = resolver{img: img}
	c := &p.calls
	c.from, c.to, c.table = r.symbol("_stext"), r.symbol("_etext"), r.symbol("sys_call_table")
	if c.err = r.err; c.err == nil {
		for c.n < maxSyscalls {
			if _, off, err := img.syms.at(c.table + VirtAddr(8*c.n)); err != nil || off != uint64(8*c.n) {
				break // the next symbol has begun
			}
			c.n++
		}
	}

	r = resolver{img: img}
	p.interrupts.table = r.symbol("idt_table")
	p.interrupts.err = r.err

	p.modules = moduleWalk{brief: true}
	p.modErr = p.modules.resolve(img)
	p.hooks = img.planHooks()
	p.callbacks = img.planCallbacks()
	p.bpf = img.planBPF()

	r = resolver{img: img}
	p.creds.cred = r.shape("cred", "uid.val", "user")
	p.creds.user = r.field("user_struct", 4, "uid.val")
	p.creds.init, _ = img.syms.symbol("init_cred")
	p.creds.err = r.err

	r = resolver{img: img}
	p.exec.task = r.shape("task_struct", "mm", "real_cred")
	p.exec.mm = r.shape("mm_struct", "user_ns", "saved_auxv[]")
	p.exec.cred = r.shape("cred", "cap_permitted[]")
	p.exec.host = r.symbol("init_user_ns")
	p.exec.err = r.err

	r = resolver{img: img}
	p.pids.ns = r.symbol("init_pid_ns")
	p.pids.head = r.field("pid_namespace", 8, "idr.idr_rt.xa_head")
	p.pids.slots = r.field("xa_node", 64*8, "slots")
	p.pids.first = r.field("pid", 0, "tasks") // of PIDTYPE_PID
	p.pids.link = r.field("task_struct", 0, "pid_links")
	p.pids.err = r.err
	return p
}

// Signs looks for them. What cannot be told on this kernel is in Missing.
func (v *View) Signs() (Signs, error) { return v.SignsAmong(nil) }

// SignsAmong is Signs for who has just listed the tasks by this View; nil has it list them.
func (v *View) SignsAmong(tasks []Task) (Signs, error) {
	s := Signs{At: time.Now()}
	p := v.img.signsPlan()
	for _, part := range []struct {
		name string
		read func(*signsPlan, *Signs) error
	}{
		{"oopses", v.oopses}, {"grace periods", v.gracePeriod}, {"system calls", v.syscalls}, {"interrupt table", v.interruptTable},
		{"hidden processes", func(p *signsPlan, s *Signs) error { return v.hiddenTasks(p, s, tasks) }}, {"hidden modules", v.hiddenModules},
		{"probes", v.hooks}, {"callbacks", v.callbacks}, {"eBPF", v.eBPF},
	} {
		if err := part.read(p, &s); err != nil {
			if !tolerable(err) {
				return s, fmt.Errorf("read %s: %w", part.name, err)
			}
			s.Missing = append(s.Missing, fmt.Sprintf("%s: %v", part.name, err))
		}
	}
	for i := range s.Strays {
		if m, err := v.moduleAt(s.Strays[i].To); err == nil {
			s.Strays[i].Owner = m.Name
		}
	}
	return s, nil
}

func (v *View) oopses(p *signsPlan, s *Signs) error {
	if p.oopses.err != nil {
		return p.oopses.err
	}
	n, err := v.Uint32(p.oopses.at)
	s.Oopses = int(n)
	return err
}

// gracePeriod reads rcu_state (kernel/rcu/tree.h). The two lowest bits of gp_seq are the phase, zero when there is none
// (RCU_SEQ_STATE_MASK, kernel/rcu/rcu.h). A leaf's qsmask has the bits of the CPUs that have not passed a quiescent state.
func (v *View) gracePeriod(p *signsPlan, s *Signs) error {
	g := &p.rcu
	if g.err != nil {
		return g.err
	}
	n, err := v.Uint64(g.state + VirtAddr(g.seq))
	if err != nil {
		return err
	}
	s.GracePeriod, s.Waiting = n, n&3 != 0
	if !s.Waiting {
		return nil
	}
	total, err := v.Uint32(g.count)
	if err != nil {
		return err
	}
	depth, err := v.Uint32(g.levels)
	if err != nil {
		return err
	}
	if total > 1<<12 {
		return &CorruptError{"rcu_num_nodes", g.count, fmt.Sprintf("is %d", total)}
	}
	for i := range total {
		t, err := v.thing(g.node, g.state+VirtAddr(g.nodes+uint64(i)*g.size))
		if err != nil {
			return err
		}
		if t.num("level")&0xff != uint64(depth-1) {
			continue
		}
		first := t.int("grplo")
		for m := t.num("qsmask"); m != 0; m &= m - 1 {
			if cpu := first + bits.TrailingZeros64(m); cpu >= 0 && cpu < len(v.img.perCPU) {
				s.Holding = append(s.Holding, cpu)
			}
		}
	}
	return nil
}

func (s *Signs) stray(table string, addr, to VirtAddr) {
	if len(s.Strays) < maxStrays {
		s.Strays = append(s.Strays, Stray{Table: table, Addr: addr, To: to})
	}
}

// syscalls checks that each entry of sys_call_table is a function of the kernel image. Since v6.9 (commit 1e3ad78334a6,
// "x86/syscall: Don't force use of indirect calls for system calls") x86-64 looks there for tracing only.
func (v *View) syscalls(p *signsPlan, s *Signs) error {
	c := &p.calls
	if c.err != nil {
		return c.err
	}
	entries, err := v.pointers("sys_call_table", c.table, c.n)
	if err != nil {
		return err
	}
	for i, fn := range entries {
		if fn == 0 && i > 300 {
			break // padding
		}
		if fn < c.from || fn >= c.to {
			s.stray(fmt.Sprintf("sys_call_table[%d]", i), c.table+VirtAddr(8*i), fn)
		}
	}
	return nil
}

// interruptTable checks the handlers in idt_table (gate_struct, arch/x86/include/asm/desc_defs.h).
func (v *View) interruptTable(p *signsPlan, s *Signs) error {
	if p.interrupts.err != nil {
		return p.interrupts.err
	}
	// Exceptions that nobody wants keep the gates of the early boot, in code that is freed; they are in the image all the same.
	from, to, table := v.img.lay.text, v.img.lay.end, p.interrupts.table
	b := make([]byte, 256*16)
	if err := v.ReadVirt(table, b); err != nil {
		return err
	}
	for i := range 256 {
		g := b[16*i:][:16]
		if g[5]&0x80 == 0 {
			continue // not present
		}
		fn := VirtAddr(uint64(binary.LittleEndian.Uint32(g[8:]))<<32 | uint64(le16(g[6:]))<<16 | uint64(le16(g)))
		if fn < from || fn >= to {
			s.stray(fmt.Sprintf("idt_table[%d]", i), table+VirtAddr(16*i), fn)
		}
	}
	return nil
}

func (v *View) hiddenModules(_ *signsPlan, s *Signs) error {
	modules, err := v.modulesBriefly()
	if err != nil {
		return err
	}
	for _, m := range modules {
		if m.Missing {
			s.HiddenModules = append(s.HiddenModules, m.Name)
		}
	}
	return nil
}

// sharedCred notes a process whose credentials another has. owners has those that are known.
func (s *Signs) sharedCred(owners map[VirtAddr]*Task, t *Task, init VirtAddr) {
	if t.PID != t.TGID || t.State == "Z" || t.State == "X" || len(s.Shared) >= maxStrays {
		return
	}
	if t.Cred == init && init != 0 {
		if !t.KThread && t.PID != 0 {
			s.Shared = append(s.Shared, SharedCred{*t, "the kernel itself"})
		}
		return
	}
	o, ok := owners[t.Cred]
	if !ok {
		owners[t.Cred] = t
		return
	}
	thief := t
	if o.Start > t.Start {
		thief, o = o, t
		owners[t.Cred] = t
	}
	if !thief.KThread {
		s.Shared = append(s.Shared, SharedCred{*thief, fmt.Sprintf("%q (PID %d)", o.Comm, o.PID)})
	}
}

// hiddenTasks compares the PIDs of the first namespace (pid_namespace.idr, an xarray of struct pid) with the list of tasks.
func (v *View) hiddenTasks(p *signsPlan, s *Signs, tasks []Task) error {
	if tasks == nil {
		for t, err := range v.Tasks() {
			if err != nil {
				return err
			}
			tasks = append(tasks, t)
		}
	}
	listed := make(map[VirtAddr]bool, len(tasks))
	forged := make(map[VirtAddr]uint32) // of each cred: the user that it is accounted to, if that is another one; many tasks share one
	owners := make(map[VirtAddr]*Task, len(tasks))
	for i, t := range tasks {
		listed[t.Addr] = true
		s.sharedCred(owners, &tasks[i], p.creds.init)
		if p.creds.err != nil || len(s.Forged) >= maxStrays {
			continue
		}
		uid, ok := forged[t.Cred]
		if !ok {
			c, err := v.thing(p.creds.cred, t.Cred)
			if err != nil {
				continue // it ends just now
			}
			if u, err := v.Uint32(c.ptr("user") + VirtAddr(p.creds.user)); err == nil && c.num("uid.val") == 0 {
				uid = u
			}
			forged[t.Cred] = uid
		}
		if uid != 0 {
			t.UID = uid
			s.Forged = append(s.Forged, t)
		}
	}
	if p.pids.err != nil {
		return p.pids.err
	}
	slots, first, link := p.pids.slots, p.pids.first, p.pids.link
	root, err := v.Uint64(p.pids.ns + VirtAddr(p.pids.head))
	if err != nil {
		return err
	}
	visited := 0
	var walk func(entry uint64, depth int) error
	walk = func(entry uint64, depth int) error {
		if visited++; visited > maxPIDNodes*64 || depth > 11 {
			return &CorruptError{"xarray", VirtAddr(entry), "is too large"}
		}
		switch {
		case entry == 0 || entry&3 == 2 && entry < 4096: // nothing, or an internal entry that is no node
			return nil
		case entry&3 == 2: // a node (xa_is_node, include/linux/xarray.h)
			node := VirtAddr(entry - 2)
			if !v.img.space.valid(node, 8) {
				return &CorruptError{"xa_node", node, "not an address of the kernel"}
			}
			entries, err := v.pointers("xa_node", node+VirtAddr(slots), 64)
			if err != nil {
				return err
			}
			for _, e := range entries {
				if err := walk(uint64(e), depth+1); err != nil {
					return err
				}
			}
			return nil
		case entry&3 != 0 || !v.img.space.valid(VirtAddr(entry), 8):
			return &CorruptError{"xarray", VirtAddr(entry), "holds no struct pid"}
		}
		node, err := v.Uint64(VirtAddr(entry) + VirtAddr(first))
		if err != nil || node == 0 {
			return err // no task has this number as its PID; it may be a group's or a session's still
		}
		task := VirtAddr(node - link)
		if listed[task] {
			return nil
		}
		var o object
		t, err := v.img.readTask(v, &o, task, 0)
		if err != nil {
			return nil // it ends just now
		}
		if t.exitState == 0 && len(s.Hidden) < maxStrays {
			s.Hidden = append(s.Hidden, t.Task)
		}
		return nil
	}
	return walk(root, 0)
}
