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
