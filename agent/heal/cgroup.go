package heal

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// IDs of the actions that set what a controller of a process's control group (cgroup v2) goes by.
const (
	SetMemoryMax = "set-memory-max"
	Reprioritise = "reprioritise"
)

// control is a number of a control group, 8 bytes that the kernel reads anew whenever it goes by them.
type control struct {
	action, title, why string
	setting            Setting
	id                 string // of the controller, in enum cgroup_subsys_id
	typ, member        string // its state, and the number in it
	zero               string // a 4-byte member that must be zero; empty for none
	has                func(kernel.Cgroup) bool
	// stored is the number as it is kept, by the size of a page; text is for people.
	stored func(n int64, page uint64) uint64
	text   func(stored, page uint64) string
}

// memoryMax is memory.max. The kernel's own handler (memory_max_write of mm/memcontrol.c) exchanges the number of pages, and then reclaims,
// and kills by the OOM killer, until the group is within it. The store alone leaves that to the group's next request for memory, which
// reclaims and kills as well: a group that asks for nothing keeps what it has.
var memoryMax = control{
	action: SetMemoryMax, title: "Limit the memory of the process's control group (memory.max)",
	why: "what the group asks for beyond that is reclaimed from it, or refused (page_counter_try_charge)",
	// With less than a MiB a limit is a kill of everything in the group.
	setting: Setting{Name: "memory.max", Unit: "bytes", Min: 1 << 20, Max: math.MaxInt64},
	id:      "memory_cgrp_id", typ: "mem_cgroup", member: "memory.max",
	has: func(c kernel.Cgroup) bool { return c.Memory != nil },
	// PAGE_COUNTER_MAX of include/linux/page_counter.h stands for no limit.
	stored: func(n int64, page uint64) uint64 { return min(uint64(n)/page, math.MaxInt64/page) },
	text: func(pages, page uint64) string {
		if pages >= math.MaxInt64/page {
			return "no limit"
		}
		return fmt.Sprintf("%d bytes", pages*page)
	},
}

// cpuWeight is cpu.weight. The kernel's own handler (sched_group_set_shares of kernel/sched/fair.c) stores the shares, and has each run queue
// take note; the store alone leaves that to the next tick and the next wake-up of the group there (update_cfs_group reads
// tg->shares each time, and reweighs the group's entity). A single task's nice value cannot be set so: its weight is summed up in its
// run queue while it is queued, and set_user_nice takes two arguments, of which a work that the host runs for us has one.
var cpuWeight = control{
	action: Reprioritise, title: "Give the process's control group another share of the CPUs (cpu.weight)",
	why:     "the scheduler weighs the group by it from its next tick on (update_cfs_group)",
	setting: Setting{Name: "cpu.weight", Min: 1, Max: 10000}, // CGROUP_WEIGHT_MIN and _MAX; 100 is usual
	id:      "cpu_cgrp_id", typ: "task_group", member: "shares", zero: "idle",
	has: func(c kernel.Cgroup) bool { return c.CPU != nil && c.CPU.Weight != 0 },
	// cpu_weight_write_u64 of kernel/sched/core.c, with scale_load, MIN_SHARES and MAX_SHARES.
	stored: func(n int64, _ uint64) uint64 { return min(max((uint64(n)*1024+50)/100, 2), 1<<18) << 10 },
	text:   func(shares, _ uint64) string { return fmt.Sprint(((shares>>10)*100 + 512) / 1024) },
}

// setControl sets a number of the nearest control group of the culprit's, from its own upwards, that has the controller: of one above only if
// nobody else's processes are in it.
func setControl(c control) Action {
	return Action{
		ID: c.action, Title: c.title, Risk: RiskTask, Undo: c.action,
		For:      []detect.Kind{detect.KindMemoryHog, detect.KindRunawayProcess, detect.KindForkBomb, detect.KindPolicy},
		Settings: []Setting{c.setting},
		Set: func(_ context.Context, v *kernel.View, f detect.Finding, val Value) (Plan, error) {
			if v == nil {
				return Plan{}, fmt.Errorf("plan to set %s of the group of PID %d: no kernel is attached: %w", val.Name, f.Culprit.TGID, kernel.ErrNotFound)
			}
			return planControl(newModel(v), f, c, val)
		},
	}
}

func planControl(m model, f detect.Finding, c control, val Value) (Plan, error) {
	fail := func(err error) (Plan, error) {
		return Plan{}, fmt.Errorf("plan to set %s of the group of PID %d: %w", val.Name, f.Culprit.TGID, err)
	}
	vic, err := findVictim(m, f.Culprit)
	if err != nil {
		return fail(err)
	}
	l := layout{m: m}
	setAt, groupAt := l.field("task_struct", "cgroups", 8), l.field("css_set", "dfl_cgrp", 8)
	cssAt, ownerAt := l.field(c.typ, "css", l.sizeof("cgroup_subsys_state")), l.field("cgroup_subsys_state", "cgroup", 8)
	flagsAt, selfAt := l.field("cgroup_subsys_state", "flags", 4), l.field("cgroup", "self.flags", 4)
	nodeAt, idAt := l.field("cgroup", "kn", 8), l.field("kernfs_node", "id", 8)
	numberAt := l.field(c.typ, c.member, 8)
	if l.err != nil {
		return fail(l.err)
	}
	subsys, err := m.Field("cgroup", "subsys")
	if err != nil {
		return fail(err)
	}
	id, err := m.Enum("cgroup_subsys_id", c.id)
	if err != nil {
		return fail(err)
	}
	if id < 0 || uint64(id) >= subsys.Size/8 {
		return fail(fmt.Errorf("cgroup.subsys has %d bytes, and %s is %d: %w", subsys.Size, c.id, id, kernel.ErrNotSupported))
	}

	p := Plan{Action: c.action, Finding: f.ID, Risk: RiskTask, Undo: true, More: true, Value: &val, Steps: vic.checks}
	// expect reads what must stay what it is.
	expect := func(va kernel.VirtAddr, size int, object, why string) (kernel.VirtAddr, error) {
		b := make([]byte, 8)
		if err := m.ReadVirt(va, b[:size]); err != nil {
			return 0, fmt.Errorf("%s: %w", object, err)
		}
		pa, err := m.Phys(va)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", object, err)
		}
		p.Steps = append(p.Steps, Step{Op: OpExpect, Why: why, Object: object, Addr: pa, Virt: va, Expect: b[:size]})
		return kernel.VirtAddr(binary.LittleEndian.Uint64(b)), nil
	}
	const same = "it is still in the same group"
	set, err := expect(vic.leader.Addr+kernel.VirtAddr(setAt), 8, "task_struct.cgroups", same)
	if err != nil {
		return fail(err)
	}
	of, err := expect(set+kernel.VirtAddr(groupAt), 8, "css_set.dfl_cgrp", same)
	if err != nil {
		return fail(err)
	}
	for i := range p.Steps {
		p.Steps[i].Once = true
	}
	paths := make(map[kernel.VirtAddr]string)
	groups := make(map[string]kernel.Cgroup)
	for g, err := range m.Cgroups() {
		if err != nil {
			return fail(err)
		}
		paths[g.Addr], groups[g.Path] = g.Path, g
	}
	path, ok := paths[of]
	if !ok {
		return fail(fmt.Errorf("its control group at %v is none of the unified hierarchy: %w", of, kernel.ErrNotSupported))
	}
	// What a group does not account for, the next one above does. The root has no such number.
	at := path
	for at != "/" && !c.has(groups[at]) {
		at = at[:strings.LastIndexByte(at, '/')]
		if at == "" {
			at = "/"
		}
	}
	group := groups[at]
	if !c.has(group) || at == "/" {
		return fail(fmt.Errorf("neither its control group %q nor one above that has %s: the controller is not enabled there: %w", path, val.Name, kernel.ErrNotSupported))
	}
	// The ID of a kernfs_node is never given twice, and both sets of flags change once the group is removed.
	const lives = "the group is there, and no other is in its place"
	node, err := expect(group.Addr+kernel.VirtAddr(nodeAt), 8, "cgroup.kn", lives)
	if err != nil {
		return fail(err)
	}
	number, err := expect(node+kernel.VirtAddr(idAt), 8, "kernfs_node.id", lives)
	if err != nil {
		return fail(err)
	}
	if _, err := expect(group.Addr+kernel.VirtAddr(selfAt), 4, "cgroup.self.flags", lives); err != nil {
		return fail(err)
	}
	css, err := expect(group.Addr+kernel.VirtAddr(subsys.Offset)+kernel.VirtAddr(8*id), 8, "cgroup.subsys["+c.id+"]", "the group still has the controller")
	if err != nil {
		return fail(err)
	}
	if _, err := expect(css+kernel.VirtAddr(flagsAt), 4, "cgroup_subsys_state.flags", "it is not being removed"); err != nil {
		return fail(err)
	}
	owner, err := expect(css+kernel.VirtAddr(ownerAt), 8, "cgroup_subsys_state.cgroup", "this is the state of that group")
	if err != nil {
		return fail(err)
	}
	if owner != group.Addr || uint64(number) != group.ID {
		return fail(fmt.Errorf("the state of %q is that of the group at %v with number %d: %w", at, owner, uint64(number), kernel.ErrTorn))
	}
	state := css - kernel.VirtAddr(cssAt)
	if c.zero != "" {
		off := l.field(c.typ, c.zero, 4)
		if l.err != nil {
			return fail(l.err)
		}
		n, err := expect(state+kernel.VirtAddr(off), 4, c.typ+"."+c.zero, "the kernel goes by the number")
		if err != nil {
			return fail(err)
		}
		if n != 0 {
			return fail(fmt.Errorf("%s.%s of %q is %d, with which the kernel itself refuses to set it: %w", c.typ, c.zero, at, uint64(n), kernel.ErrNotSupported))
		}
	}
	va := state + kernel.VirtAddr(numberAt)
	now, err := read64(m, va)
	if err != nil {
		return fail(err)
	}
	pa, err := m.Phys(va)
	if err != nil {
		return fail(err)
	}
	page := m.PageSize()
	put := c.stored(val.Number, page)
	if put == now {
		return fail(fmt.Errorf("%s of %q is that already: %w", val.Name, at, ErrValue))
	}
	// Everything in the group and below it is concerned, so all of it must be what the agreement lets be touched.
	for t, err := range m.Tasks() {
		if err != nil {
			return fail(err)
		}
		if t.PID != t.TGID {
			continue
		}
		set, err := read64(m, t.Addr+kernel.VirtAddr(setAt))
		if err != nil {
			return fail(err)
		}
		of, err := read64(m, kernel.VirtAddr(set+groupAt))
		if err != nil {
			return fail(err)
		}
		if in, known := paths[kernel.VirtAddr(of)]; known && (in == at || strings.HasPrefix(in, at+"/")) {
			// Else who names a process as a rule has it would have others limited, who share nothing with it but a group far above.
			if at != path && t.UID != vic.leader.UID {
				return fail(fmt.Errorf("%q, the nearest group above %q that has %s, holds processes of other users, as PID %d: enable the controller for the group itself: %w", at, path, val.Name, t.TGID, kernel.ErrNotSupported))
			}
			p.Targets = append(p.Targets, Target{TGID: t.TGID, PID: t.PID, Comm: t.Comm, UID: t.UID, Start: t.Start, KThread: t.KThread})
		}
	}
	kid := Identify(m.Info())
	t := vic.leader
	p.Kernel = &kid
	p.Target = &Target{TGID: t.TGID, PID: t.PID, Comm: t.Comm, UID: t.UID, Start: t.Start}
	p.Title = fmt.Sprintf("set %s of control group %q, of %q (PID %d) and %d more, from %s to %s", val.Name, at, t.Comm, t.TGID, max(len(p.Targets)-1, 0), c.text(now, page), c.text(put, page))
	p.Steps = append(p.Steps, Step{Op: OpArm, Why: c.why, Object: c.typ + "." + c.member + " of " + at,
		Addr: pa, Virt: va, Expect: le(now, 8), Put: le(put, 8), Undo: true})
	return p, nil
}
