package heal

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

func permit(actions ...string) func(*access.Agreement) {
	return func(a *access.Agreement) { a.Rights.Actions = append(a.Rights.Actions, actions...) }
}

// tampered is a finding of two changes: two words of a table, and one elsewhere.
func tampered(h *fakeHost) detect.Finding {
	for i := range 3 {
		h.put64(0x150000+8*hostmem.PhysAddr(i), 0xbad0+uint64(i))
	}
	h.put64(0x151000, 0xbad9)
	words := func(vs ...uint64) kernel.HexBytes {
		var b kernel.HexBytes
		for _, v := range vs {
			b = append(b, le(v, 8)...)
		}
		return b
	}
	return detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Changes: []kernel.Change{
		{Region: "rodata", Addr: direct + 0x150000, Now: words(0xbad0, 0xbad1, 0xbad2), Was: words(0x600d0, 0xbad1, 0x600d2)},
		{Region: "text", Addr: direct + 0x151000, Now: words(0xbad9), Was: words(0x600d9)},
	}}
}

func TestRestore(t *testing.T) {
	h := newFakeHost(t)
	p, err := planRestore(h, tampered(h))
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	if len(p.Steps) != 3 {
		t.Fatalf("%d steps; a word that is as it was needs none", len(p.Steps))
	}
	old := h.snapshot()
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, permit(RestoreKernel))
	out, err := NewExecutor(o).Apply(t.Context(), p, "test")
	if err != nil || !out.Verified || out.Stores != 3 {
		t.Fatalf("%+v, %v", out, err)
	}
	for at, want := range map[hostmem.PhysAddr]uint64{0x150000: 0x600d0, 0x150008: 0xbad1, 0x150010: 0x600d2, 0x151000: 0x600d9} {
		if got := h.get(at, 8); got != want {
			t.Errorf("%v holds %#x, not %#x", at, got, want)
		}
	}
	for _, at := range h.diff(old) {
		if !slices.ContainsFunc(p.Ranges(), func(r hostmem.Range) bool { return r.Contains(at, 1) }) {
			t.Errorf("a store at %v", at)
		}
	}
}

// Who hooks again in the middle of the repair has all of it taken back: what is there then is not what the finding told of.
func TestRestoreUndone(t *testing.T) {
	h := newFakeHost(t)
	p, err := planRestore(h, tampered(h))
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	old := h.snapshot()
	stores := 0
	o := options(t, h, &memJournal{onWrite: func(kind string, _ any) {
		if kind == "store" {
			if stores++; stores == 3 {
				h.put64(0x151000, 0xbadbad)
			}
		}
	}})
	o.Grant = grant(t, permit(RestoreKernel))
	out, err := NewExecutor(o).Apply(t.Context(), p, "test")
	if !errors.Is(err, ErrMismatch) || !out.Undone || len(out.Left) > 0 {
		t.Fatalf("%+v, %v", out, err)
	}
	h.put64(0x151000, 0xbad9)
	if at := h.diff(old); len(at) > 0 {
		t.Errorf("not taken back: %v", at)
	}
}

func TestRestoreRefuses(t *testing.T) {
	h := newFakeHost(t)
	for name, change := range map[string]func(f *detect.Finding){
		"no changes":   func(f *detect.Finding) { f.Changes = nil },
		"hashes alone": func(f *detect.Finding) { f.Changes[1].Was = nil },
		"not whole words": func(f *detect.Finding) {
			f.Changes[1].Was, f.Changes[1].Now = f.Changes[1].Was[:7], f.Changes[1].Now[:7]
		},
		"not aligned":            func(f *detect.Finding) { f.Changes[1].Addr++ },
		"nothing differs":        func(f *detect.Finding) { f.Changes = f.Changes[1:]; f.Changes[0].Was = f.Changes[0].Now },
		"not in memory":          func(f *detect.Finding) { f.Changes[1].Addr = 0xffffffffff000000 },
		"more than is plausible": func(f *detect.Finding) { f.Changes = slices.Repeat(f.Changes, 300) },
	} {
		f := tampered(h)
		change(&f)
		if p, err := planRestore(h, f); err == nil {
			t.Errorf("%s: %s", name, p)
		}
	}
}

// listHost is a host with a list of a head and three objects, of which the one in the middle was taken out as list_del does,
// and its own pointers left or poisoned.
func listHost(t *testing.T, poison bool) *fakeHost {
	h := newFakeHost(t)
	h.fields["thing.link"] = kernel.Field{Offset: 0x10, Size: 16}
	h.fields["thing.name"] = kernel.Field{Offset: 0x40, Size: 8}
	h.symbols["head"] = direct + 0x160000
	link := func(pa hostmem.PhysAddr, next, prev uint64) { h.put64(pa, direct+next); h.put64(pa+8, direct+prev) }
	link(0x160000, 0x161010, 0x163010)
	link(0x161010, 0x163010, 0x160000)
	link(0x163010, 0x160000, 0x161010)
	link(0x162010, 0x163010, 0x161010)
	if poison {
		h.put64(0x162018, 0xdead000000000122)
	}
	h.put64(0x162040, 0x6d616e)
	return h
}

// walk returns the objects of the list, forwards, and fails if it does not hold together backwards.
func walk(t *testing.T, h *fakeHost) []uint64 {
	t.Helper()
	var all []uint64
	at := hostmem.PhysAddr(0x160000)
	for range 10 {
		next := hostmem.PhysAddr(h.get(at, 8) - direct)
		if back := h.get(next+8, 8); back != direct+uint64(at) {
			t.Fatalf("%v leads to %v, and that back to %#x", at, next, back)
		}
		if at = next; at == 0x160000 {
			return all
		}
		all = append(all, uint64(at)-0x10)
	}
	t.Fatal("the list has no end")
	return nil
}

func TestRelink(t *testing.T) {
	for _, tt := range []struct {
		first, poison bool
		want          []uint64
	}{{false, false, []uint64{0x161000, 0x163000, 0x162000}}, {true, true, []uint64{0x162000, 0x161000, 0x163000}}} {
		h := listHost(t, tt.poison)
		p, err := planRelink(h, detect.Finding{ID: "tampering-1"}, list{typ: "thing", member: "link", head: "head", same: "name", first: tt.first}, direct+0x162000, "it")
		if err != nil {
			t.Fatal(err)
		}
		p.ID = "plan-1"
		o := options(t, h, &memJournal{})
		o.Grant = grant(t, permit(RelinkHidden))
		out, err := NewExecutor(o).Apply(t.Context(), p, "test")
		if err != nil || !out.Verified {
			t.Fatalf("%+v, %v", out, err)
		}
		if got := walk(t, h); !slices.Equal(got, tt.want) {
			t.Errorf("first %v: %#x; want %#x", tt.first, got, tt.want)
		}
	}
}

// The kernel adds an element at the same place before each of the stores in turn: the list holds together whenever it comes.
func TestRelinkRaces(t *testing.T) {
	for _, first := range []bool{false, true} {
		for at := 1; at <= 3; at++ {
			h := listHost(t, true)
			l := list{typ: "thing", member: "link", head: "head", same: "name", first: first}
			p, err := planRelink(h, detect.Finding{ID: "tampering-1"}, l, direct+0x162000, "it")
			if err != nil {
				t.Fatal(err)
			}
			p.ID = "plan-1"
			stores := 0
			o := options(t, h, &memJournal{onWrite: func(kind string, _ any) {
				if kind != "store" {
					return
				}
				if stores++; stores != at {
					return
				}
				// __list_add of include/linux/list.h, which does not look at what it overwrites.
				prev, next := hostmem.PhysAddr(h.get(0x160008, 8)-direct), hostmem.PhysAddr(0x160000)
				if first {
					prev, next = 0x160000, hostmem.PhysAddr(h.get(0x160000, 8)-direct)
				}
				h.put64(next+8, direct+0x164010)
				h.put64(0x164010, direct+uint64(next))
				h.put64(0x164018, direct+uint64(prev))
				h.put64(prev, direct+0x164010)
			}})
			o.Grant = grant(t, permit(RelinkHidden))
			out, err := NewExecutor(o).Apply(t.Context(), p, "test")
			if err == nil {
				t.Errorf("first %v, store %d: carried out all the same: %+v", first, at, out)
			}
			got := walk(t, h)
			if !slices.Contains(got, 0x164000) || !slices.Contains(got, 0x161000) || !slices.Contains(got, 0x163000) {
				t.Errorf("first %v, store %d: the list is %#x", first, at, got)
			}
		}
	}
}

// An object that is not the same any more is left alone.
func TestRelinkGone(t *testing.T) {
	h := listHost(t, false)
	p, err := planRelink(h, detect.Finding{ID: "tampering-1"}, list{typ: "thing", member: "link", head: "head", same: "name"}, direct+0x162000, "it")
	if err != nil {
		t.Fatal(err)
	}
	p.ID, p.Made = "plan-1", time.Now()
	h.put64(0x162040, 0)
	old := h.snapshot()
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, permit(RelinkHidden))
	if _, err := NewExecutor(o).Apply(t.Context(), p, "test"); !errors.Is(err, ErrMismatch) {
		t.Errorf("Apply = %v", err)
	}
	if at := h.diff(old); len(at) > 0 {
		t.Errorf("stores at %v", at)
	}
}

const paCred, paUser, paInitCred = 0x180000, 0x181000, 0x182000

// forge gives the fake host's process credentials that say root's, while they are accounted to user 1000.
func forge(h *fakeHost) detect.Finding {
	for name, f := range map[string]kernel.Field{
		"task_struct.real_cred": {Offset: 0x130, Size: 8}, "task_struct.cred": {Offset: 0x138, Size: 8}, "cred.user": {Offset: 0x80, Size: 8}, "user_struct.uid.val": {Offset: 0x10, Size: 4},
		"cred.cap_inheritable": {Offset: 0x30, Size: 8}, "cred.cap_permitted": {Offset: 0x38, Size: 8}, "cred.cap_effective": {Offset: 0x40, Size: 8}, "cred.cap_ambient": {Offset: 0x50, Size: 8},
	} {
		h.fields[name] = f
	}
	for i, name := range []string{"uid", "gid", "suid", "sgid", "euid", "egid", "fsuid", "fsgid"} {
		h.fields["cred."+name+".val"] = kernel.Field{Offset: 8 + 4*uint64(i), Size: 4}
		h.put32(paCred+8+4*hostmem.PhysAddr(i), 0)
	}
	h.put32(paCred+12, 100) // its own group
	h.symbols["init_cred"] = direct + paInitCred
	h.put64(paTask+0x130, direct+paCred)
	h.put64(paTask+0x138, direct+paCred)
	h.put64(paCred+0x80, direct+paUser)
	h.put32(paUser+0x10, 1000)
	h.put64(paCred+0x38, 0x1ffffffffff)
	h.put64(paCred+0x40, 0x1ffffffffff)
	h.put64(paCred+0x48, 0x1ffffffffff) // the bounding set stays
	return detect.Finding{ID: "tampering-1", Kind: detect.KindTampering, Culprit: detect.Culprit{PID: fakePID, TGID: fakePID, Comm: "spin", Start: fakeStart}}
}

func TestStrip(t *testing.T) {
	h := newFakeHost(t)
	f := forge(h)
	p, err := planStrip(h, f)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	old := h.snapshot()
	o := options(t, h, &memJournal{})
	o.Grant = grant(t, permit(StripCredentials))
	if out, err := NewExecutor(o).Apply(t.Context(), p, "test"); err != nil {
		t.Fatalf("%v; %+v", err, out)
	}
	for i, want := range []uint64{1000, 100, 1000, nobody, 1000, nobody, 1000, nobody} {
		if got := h.get(paCred+8+4*hostmem.PhysAddr(i), 4); got != want {
			t.Errorf("word %d of the credentials is %d, not %d", i, got, want)
		}
	}
	if h.get(paCred+0x38, 8) != 0 || h.get(paCred+0x40, 8) != 0 || h.get(paCred+0x48, 8) != 0x1ffffffffff {
		t.Error("capabilities")
	}
	for _, at := range h.diff(old) {
		if !slices.ContainsFunc(p.Ranges(), func(r hostmem.Range) bool { return r.Contains(at, 1) }) {
			t.Errorf("a store at %v", at)
		}
	}
}

func TestStripRefuses(t *testing.T) {
	for name, change := range map[string]func(h *fakeHost){
		"it has its own user":  func(h *fakeHost) { h.put32(paCred+8, 1000) },
		"another has the same": func(h *fakeHost) { h.put64(paTask+0x800+0x138, direct+paCred) },
		"root's account":       func(h *fakeHost) { h.put32(paUser+0x10, 0) },
		"the kernel's own":     func(h *fakeHost) { h.symbols["init_cred"] = direct + paCred },
		"acts for somebody":    func(h *fakeHost) { h.put64(paTask+0x130, direct+paInitCred) },
		"another process":      func(h *fakeHost) { h.put64(paTask+0x110, 1) },
	} {
		h := newFakeHost(t)
		f := forge(h)
		change(h)
		if p, err := planStrip(h, f); err == nil {
			t.Errorf("%s: %s", name, p.Title)
		}
	}
}

func TestWake(t *testing.T) {
	h := newFakeHost(t)
	h.symbols["hrtimer_wakeup"] = h.symbols["posix_timer_fn"] // which may be called by pointer
	h.sizes["hrtimer_sleeper"] = 72
	h.fields["hrtimer_sleeper.timer"] = kernel.Field{Offset: 0, Size: sizeofTimer}
	h.fields["hrtimer_sleeper.task"] = kernel.Field{Offset: sizeofTimer, Size: 8}
	h.fields["task_struct.__state"] = kernel.Field{Offset: 0x128, Size: 4}
	f := detect.Finding{ID: "hung-task-1", Kind: detect.KindHungTask, Culprit: detect.Culprit{PID: fakePID, TGID: fakePID, Comm: "spin", Start: fakeStart}}
	if _, err := planWake(h, f); !errors.Is(err, ErrGone) {
		t.Errorf("of a task that runs: %v", err)
	}
	h.put32(paTask+0x128, 2)
	p, err := planWake(h, f)
	if err != nil {
		t.Fatal(err)
	}
	arms := 0
	for _, s := range p.Steps {
		if s.Op == OpArm && !s.Cleanup {
			arms++
		}
		if s.Object == "struct hrtimer_sleeper with struct irq_work" {
			if string(s.Put[sizeofTimer:]) != string(le(direct+paTask, 8)) || string(s.Put[16:24]) != string(le(uint64(h.symbols["hrtimer_wakeup"]), 8)) {
				t.Errorf("laid down: %x", s.Put)
			}
		}
	}
	if arms != 1 || len(p.Calls) != 1 || p.Target == nil || p.Target.PID != fakePID {
		t.Errorf("%+v", p)
	}
	h.fields["hrtimer_sleeper.task"] = kernel.Field{Offset: 8, Size: 8} // inside the work
	if _, err := planWake(h, f); !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("another layout: %v", err)
	}
	f.Culprit.PID, f.Culprit.TGID = 1, 1
	if _, err := planWake(h, f); err == nil {
		t.Error("init was to be woken")
	}
}
