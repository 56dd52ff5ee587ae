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
	// Missing says of which of these nothing could be told, and why.
	Missing []string `json:"missing,omitempty"`
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

// Signs looks for them. What cannot be told on this kernel is in Missing.
func (v *View) Signs() (Signs, error) {
	s := Signs{At: time.Now()}
	for _, part := range []struct {
		name string
		read func(*Signs) error
	}{
		{"oopses", v.oopses}, {"grace periods", v.gracePeriod}, {"system calls", v.syscalls}, {"interrupt table", v.interruptTable},
		{"hidden processes", v.hiddenTasks}, {"hidden modules", v.hiddenModules},
	} {
		if err := part.read(&s); err != nil {
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

func (v *View) oopses(s *Signs) error {
	r := resolver{img: v.img}
	at := r.symbol("die_counter") // arch/x86/kernel/dumpstack.c
	if r.err != nil {
		return r.err
	}
	n, err := v.Uint32(at)
	s.Oopses = int(n)
	return err
}

// gracePeriod reads rcu_state (kernel/rcu/tree.h). The two lowest bits of gp_seq are the phase, zero when there is none
// (RCU_SEQ_STATE_MASK, kernel/rcu/rcu.h). A leaf's qsmask has the bits of the CPUs that have not passed a quiescent state.
func (v *View) gracePeriod(s *Signs) error {
	r := resolver{img: v.img}
	state, count, levels := r.symbol("rcu_state"), r.symbol("rcu_num_nodes"), r.symbol("rcu_num_lvls")
	seq := r.field("rcu_state", 8, "gp_seq")
	nodes := r.field("rcu_state", 0, "node")
	node := r.shape("rcu_node", "qsmask", "grplo", "grphi", "level")
	size := r.size("rcu_node")
	if r.err != nil {
		return r.err
	}
	n, err := v.Uint64(state + VirtAddr(seq))
	if err != nil {
		return err
	}
	s.GracePeriod, s.Waiting = n, n&3 != 0
	if !s.Waiting {
		return nil
	}
	total, err := v.Uint32(count)
	if err != nil {
		return err
	}
	depth, err := v.Uint32(levels)
	if err != nil {
		return err
	}
	if total > 1<<12 {
		return &CorruptError{"rcu_num_nodes", count, fmt.Sprintf("is %d", total)}
	}
	for i := range total {
		t, err := v.thing(node, state+VirtAddr(nodes+uint64(i)*size))
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

// text returns the range of the kernel's own code.
func (v *View) codeRange() (from, to VirtAddr, err error) {
	r := resolver{img: v.img}
	from, to = r.symbol("_stext"), r.symbol("_etext")
	return from, to, r.err
}

func (s *Signs) stray(table string, addr, to VirtAddr) {
	if len(s.Strays) < maxStrays {
		s.Strays = append(s.Strays, Stray{Table: table, Addr: addr, To: to})
	}
}

// syscalls checks that each entry of sys_call_table is a function of the kernel image. Since v6.9 (commit 1e3ad78334a6,
// "x86/syscall: Don't force use of indirect calls for system calls") x86-64 looks there for tracing only.
func (v *View) syscalls(s *Signs) error {
	from, to, err := v.codeRange()
	if err != nil {
		return err
	}
	r := resolver{img: v.img}
	table := r.symbol("sys_call_table")
	if r.err != nil {
		return r.err
	}
	n := 0
	for n < maxSyscalls {
		if _, off, err := v.img.syms.at(table + VirtAddr(8*n)); err != nil || off != uint64(8*n) {
			break // the next symbol has begun
		}
		n++
	}
	entries, err := v.pointers("sys_call_table", table, n)
	if err != nil {
		return err
	}
	for i, fn := range entries {
		if fn == 0 && i > 300 {
			break // padding
		}
		if fn < from || fn >= to {
			s.stray(fmt.Sprintf("sys_call_table[%d]", i), table+VirtAddr(8*i), fn)
		}
	}
	return nil
}

// interruptTable checks the handlers in idt_table (gate_struct, arch/x86/include/asm/desc_defs.h).
func (v *View) interruptTable(s *Signs) error {
	// Exceptions that nobody wants keep the gates of the early boot, in code that is freed; they are in the image all the same.
	from, to := v.img.lay.text, v.img.lay.end
	r := resolver{img: v.img}
	table := r.symbol("idt_table")
	if r.err != nil {
		return r.err
	}
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

func (v *View) hiddenModules(s *Signs) error {
	for m, err := range v.Modules() {
		if err != nil {
			return err
		}
		if m.Missing {
			s.HiddenModules = append(s.HiddenModules, m.Name)
		}
	}
	return nil
}

// hiddenTasks compares the PIDs of the first namespace (pid_namespace.idr, an xarray of struct pid) with the list of tasks.
func (v *View) hiddenTasks(s *Signs) error {
	r := resolver{img: v.img}
	cred := r.shape("cred", "uid.val", "user")
	user := r.field("user_struct", 4, "uid.val")
	listed := make(map[VirtAddr]bool)
	for t, err := range v.Tasks() {
		if err != nil {
			return err
		}
		listed[t.Addr] = true
		if r.err != nil || len(s.Forged) >= maxStrays {
			continue
		}
		c, err := v.thing(cred, t.Cred)
		if err != nil {
			continue // it ends just now
		}
		if uid, err := v.Uint32(c.ptr("user") + VirtAddr(user)); err == nil && uid != 0 && c.num("uid.val") == 0 {
			t.UID = uid
			s.Forged = append(s.Forged, t)
		}
	}
	ns := r.symbol("init_pid_ns")
	head := r.field("pid_namespace", 8, "idr.idr_rt.xa_head")
	slots := r.field("xa_node", 64*8, "slots")
	first := r.field("pid", 0, "tasks") // of PIDTYPE_PID
	link := r.field("task_struct", 0, "pid_links")
	if r.err != nil {
		return r.err
	}
	root, err := v.Uint64(ns + VirtAddr(head))
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
