package heal

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Where grouped lays things down, from 0x180000 on.
const (
	paSet     = 0x180000 // css_set of the process; that of init is 0x100 behind
	paGroup   = 0x181000 // cgroup "/web/app"
	paWeb     = 0x182000 // cgroup "/web"
	paRoot    = 0x183000
	paMemcg   = 0x184000 // mem_cgroup of "/web"
	paNode    = 0x185000 // kernfs_node of "/web"
	memcgMax  = paMemcg + 0x200
	noLimit   = 0x7ffffffffffff // PAGE_COUNTER_MAX with pages of 4096 bytes
	webNumber = 0x100000043
)

// grouped is a host whose process 412 is in /web/app, which does not account for memory, below /web, which does.
func grouped(t *testing.T) *fakeHost {
	h := newFakeHost(t)
	h.sizes["cgroup_subsys_state"] = 0x80
	h.enums["cgroup_subsys_id/memory_cgrp_id"] = 4
	for name, f := range map[string]kernel.Field{
		"task_struct.cgroups": {Offset: 0x140, Size: 8}, "css_set.dfl_cgrp": {Offset: 0x20, Size: 8}, "mem_cgroup.css": {Offset: 0x10, Size: 0x80},
		"mem_cgroup.memory.max": {Offset: 0x200, Size: 8}, "cgroup_subsys_state.cgroup": {Offset: 0, Size: 8}, "cgroup_subsys_state.flags": {Offset: 0x30, Size: 4},
		"cgroup.self.flags": {Offset: 0x30, Size: 4}, "cgroup.kn": {Offset: 0x88, Size: 8}, "cgroup.subsys": {Offset: 0xa0, Size: 14 * 8}, "kernfs_node.id": {Offset: 0x60, Size: 8},
	} {
		h.fields[name] = f
	}
	h.put64(paTask+0x140, direct+paSet)
	h.put64(paTask-0x1000+0x140, direct+paSet+0x100)
	h.put64(paTask+0x800+0x140, direct+paSet+0x100)
	h.put64(paSet+0x20, direct+paGroup)
	h.put64(paSet+0x100+0x20, direct+paRoot)
	h.put64(paWeb+0x88, direct+paNode)
	h.put32(paWeb+0x30, 3)
	h.put64(paWeb+0xa0+4*8, direct+paMemcg+0x10)
	h.put64(paNode+0x60, webNumber)
	h.put64(paMemcg+0x10, direct+paWeb)
	h.put32(paMemcg+0x10+0x30, 10)
	h.put64(memcgMax, noLimit)
	h.cgroups = []kernel.Cgroup{
		{Addr: direct + paRoot, ID: 1, Path: "/"}, {Addr: direct + paWeb, ID: webNumber, Path: "/web", Memory: &kernel.CgroupMemory{}}, {Addr: direct + paGroup, ID: 0x44, Path: "/web/app"},
	}
	return h
}

func limiting(t *testing.T, h *fakeHost, change func(*access.Agreement)) *Executor {
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, change)
	return NewExecutor(o)
}

func TestSetMemoryMax(t *testing.T) {
	h := grouped(t)
	before := h.snapshot()
	half := Value{"memory.max", 512<<20 + 5}
	p, err := planControl(h, runaway(), memoryMax, half)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(p.Title, `"/web"`) || !strings.Contains(p.Title, "from no limit to 536870912 bytes") || len(p.Targets) != 1 || p.Targets[0].PID != fakePID {
		t.Errorf("%s: %+v", p.Title, p.Targets)
	}
	p.ID = "plan-1"
	out, err := limiting(t, h, permit(SetMemoryMax)).Apply(t.Context(), p, "test")
	if err != nil || h.get(memcgMax, 8) != 512<<20/4096 {
		t.Fatalf("%v; %d pages", err, h.get(memcgMax, 8))
	}
	for _, at := range h.diff(before) {
		if at < memcgMax || at >= memcgMax+8 {
			t.Errorf("%v was written", at)
		}
	}
	// The process ends, and its group is given back all the same.
	h.put32(paTask+0x120, 1)
	back, err := TakeBack(out)
	if err != nil {
		t.Fatal(err)
	}
	back.ID = "plan-2"
	if _, err := limiting(t, h, permit(SetMemoryMax)).ApplyNext(t.Context(), back, "test"); err != nil || h.get(memcgMax, 8) != noLimit {
		t.Errorf("taken back: %v; %#x", err, h.get(memcgMax, 8))
	}
}

// Whatever changes between plan and store, another group than the one that was meant is not written to.
func TestSetMemoryMaxElsewhere(t *testing.T) {
	value := Value{"memory.max", 1 << 30}
	for name, change := range map[string]func(*fakeHost){
		"the process is another":    func(h *fakeHost) { h.put32(paTask+0x100, 99) },
		"it has moved":              func(h *fakeHost) { h.put64(paTask+0x140, direct+paSet+0x100) },
		"its set has moved":         func(h *fakeHost) { h.put64(paSet+0x20, direct+paRoot) },
		"the group is removed":      func(h *fakeHost) { h.put32(paWeb+0x30, 0x11) },
		"another is in its place":   func(h *fakeHost) { h.put64(paNode+0x60, webNumber+1<<32) },
		"the controller is off":     func(h *fakeHost) { h.put64(paWeb+0xa0+4*8, 0) },
		"its state goes":            func(h *fakeHost) { h.put32(paMemcg+0x10+0x30, 0x1a) },
		"its state is of another":   func(h *fakeHost) { h.put64(paMemcg+0x10, direct+paRoot) },
		"somebody else has set one": func(h *fakeHost) { h.put64(memcgMax, 77) },
	} {
		h := grouped(t)
		p, err := planControl(h, runaway(), memoryMax, value)
		if err != nil {
			t.Fatal(err)
		}
		p.ID = "plan-1"
		change(h)
		before := h.snapshot()
		if _, err := limiting(t, h, permit(SetMemoryMax)).Apply(t.Context(), p, "test"); !errors.Is(err, ErrMismatch) || h.diff(before) != nil {
			t.Errorf("%s: %v; changed %v", name, err, h.diff(before))
		}
	}
	for name, tt := range map[string]struct {
		change func(*fakeHost, *detect.Finding)
		value  int64
		want   error
	}{
		"others' processes": {func(h *fakeHost, _ *detect.Finding) {
			h.tasks = append(h.tasks, kernel.Task{Addr: direct + 0x187000, PID: 500, TGID: 500, Comm: "another", UID: 1001})
			h.put64(0x187000+0x140, direct+paSet)
		}, 1 << 30, kernel.ErrNotSupported},
		"the root":          {func(h *fakeHost, _ *detect.Finding) { h.put64(paSet+0x20, direct+paRoot) }, 1 << 30, kernel.ErrNotSupported},
		"nothing accounts":  {func(h *fakeHost, _ *detect.Finding) { h.cgroups[1].Memory = nil }, 1 << 30, kernel.ErrNotSupported},
		"the old hierarchy": {func(h *fakeHost, _ *detect.Finding) { h.put64(paSet+0x20, direct+0x1ff000) }, 1 << 30, kernel.ErrNotSupported},
		"a torn view":       {func(h *fakeHost, _ *detect.Finding) { h.put64(paNode+0x60, 7) }, 1 << 30, kernel.ErrTorn},
		"as it is":          {func(*fakeHost, *detect.Finding) {}, 1<<63 - 1, ErrValue},
		"a kernel thread":   {func(_ *fakeHost, f *detect.Finding) { f.Culprit = detect.Culprit{PID: 30, TGID: 30, Start: 1e9} }, 1 << 30, ErrProtected},
	} {
		h, f := grouped(t), runaway()
		tt.change(h, &f)
		if p, err := planControl(h, f, memoryMax, Value{"memory.max", tt.value}); !errors.Is(err, tt.want) {
			t.Errorf("%s: %s, %v", name, p.Title, err)
		}
	}
}

// A group with a process that may not be touched is not limited.
func TestSetMemoryMaxProtected(t *testing.T) {
	for name, tt := range map[string]struct {
		task  kernel.Task
		agree func(*access.Agreement)
	}{
		"init": {kernel.Task{PID: 1, TGID: 1, Comm: "init", UID: 1000}, permit(SetMemoryMax)},
		"an agreement's": {kernel.Task{PID: 500, TGID: 500, Comm: "postgres", UID: 1000}, func(a *access.Agreement) {
			permit(SetMemoryMax)(a)
			a.Protected = []access.Protected{{FirstUID: 1000, LastUID: 1000, Comm: "postgres"}}
		}},
	} {
		h := grouped(t)
		tt.task.Addr = direct + 0x187000
		h.put64(hostmem.PhysAddr(0x187000+0x140), direct+paSet)
		h.tasks = append(h.tasks[1:], tt.task)
		p, err := planControl(h, runaway(), memoryMax, Value{"memory.max", 1 << 30})
		if err != nil {
			t.Fatal(err)
		}
		p.ID = "plan-1"
		before := h.snapshot()
		if _, err := limiting(t, h, tt.agree).Apply(t.Context(), p, "test"); !errors.Is(err, access.ErrDenied) || h.diff(before) != nil {
			t.Errorf("%s: %v; changed %v", name, err, h.diff(before))
		}
	}
}

func TestReprioritise(t *testing.T) {
	h := grouped(t)
	// A task_group of /web in the place of its mem_cgroup.
	h.enums["cgroup_subsys_id/cpu_cgrp_id"] = 4
	h.fields["task_group.css"], h.fields["task_group.shares"], h.fields["task_group.idle"] = h.fields["mem_cgroup.css"], kernel.Field{Offset: 0x200, Size: 8}, kernel.Field{Offset: 0x208, Size: 4}
	h.cgroups[1].CPU = &kernel.CgroupCPU{Weight: 100}
	h.put64(memcgMax, 1024<<10)
	// What the kernel's cpu_weight_write_u64 stores, and cpu_weight_read_u64 shows.
	for weight, shares := range map[int64]uint64{1: 10 << 10, 50: 512 << 10, 99: 1014 << 10, 10000: 102400 << 10} {
		p, err := planControl(h, runaway(), cpuWeight, Value{"cpu.weight", weight})
		if err != nil {
			t.Fatal(err)
		}
		p.ID = "plan-1"
		out, err := limiting(t, h, permit(Reprioritise)).Apply(t.Context(), p, "test")
		if err != nil || h.get(memcgMax, 8) != shares || !strings.HasSuffix(p.Title, fmt.Sprint("from 100 to ", weight)) {
			t.Errorf("%s: %v; shares are %d, not %d", p.Title, err, h.get(memcgMax, 8), shares)
		}
		back, err := TakeBack(out)
		if err != nil {
			t.Fatal(err)
		}
		back.ID = "plan-2"
		if _, err := limiting(t, h, permit(Reprioritise)).ApplyNext(t.Context(), back, "test"); err != nil || h.get(memcgMax, 8) != 1024<<10 {
			t.Errorf("taken back: %v; %d", err, h.get(memcgMax, 8))
		}
	}
	if _, err := planControl(h, runaway(), cpuWeight, Value{"cpu.weight", 100}); !errors.Is(err, ErrValue) {
		t.Errorf("as it is: %v", err)
	}
	h.put32(memcgMax+8, 1)
	if _, err := planControl(h, runaway(), cpuWeight, Value{"cpu.weight", 50}); !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("of a group that only runs when nothing else does: %v", err)
	}
}
