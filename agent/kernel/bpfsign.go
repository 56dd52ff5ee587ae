package kernel

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// BPFSuspect is an eBPF program that is not what programs are, or may do what they seldom need to.
type BPFSuspect struct {
	Addr   VirtAddr      `json:"addr"` // of its struct bpf_prog
	ID     uint32        `json:"id"`   // that it says it has; 0 if it has none
	Name   string        `json:"name"`
	UID    uint32        `json:"uid"`    // of who loaded it
	Loaded time.Duration `json:"loaded"` // since boot
	// Hidden says that it runs, and is not found by its ID, as all tools look for programs. Calls is the helper that it calls: one that writes into programs'
	// memory, or has functions of the kernel return what it wants.
	Hidden bool   `json:"hidden,omitempty"`
	Calls  string `json:"calls,omitempty"`
}

// harmfulHelpers are what programs call to change others: of the first the kernel warns in its log. bpf_send_signal is what monitors call that end intruders.
var harmfulHelpers = []string{"bpf_probe_write_user", "bpf_override_return"}

// bpfSignsPlan is where eBPF's programs are found: by their IDs, by their code (bpf_kallsyms, kernel/bpf/core.c), and by the links that have them run.
type bpfSignsPlan struct {
	err                             error
	programs, maps, links, kallsyms VirtAddr // programs is 0 of a kernel without eBPF
	base                            VirtAddr // __bpf_call_base, which calls are counted from
	calls                           map[VirtAddr]string
	prog, aux, user, ksym, m, link  *shape
	next, inAux, insns              uint64 // bpf_ksym.lnode, bpf_prog_aux.ksym, bpf_prog.insnsi

	mu     sync.Mutex
	called map[bpfKnown]string // the harmful helper that a program calls, or that there is none
	due    time.Time
	missed bool // since the latest look one was left out
	latest bpfSigns
	report bpfSigns
}

// bpfKnown is a program whose instructions have been looked at. They do not change while it is there.
type bpfKnown struct {
	at     VirtAddr
	id     uint32
	loaded uint64
}

type bpfSigns struct {
	suspects []BPFSuspect
	hooks    []hookedAt
}

const (
	// bpfRest is how many times as long as a look has taken the next is put off: hosts with a thousand programs and maps are looked at less often.
	bpfRest        = 40
	maxBPFInsns    = 1 << 16 // of a program are looked at
	bpfInsnsAtOnce = 1 << 10
	bpfInsnSize    = 8
	bpfPage        = 4096
)

func (img *Image) planBPFSigns(b *bpfSignsPlan) {
	r := resolver{img: img}
	if _, err := img.syms.symbol("prog_idr"); err != nil {
		return
	}
	tree := VirtAddr(r.field("idr", 0, "idr_rt"))
	b.programs, b.maps, b.links, b.kallsyms = r.symbol("prog_idr")+tree, r.symbol("map_idr")+tree, r.symbol("link_idr")+tree, r.symbol("bpf_kallsyms")
	b.base = r.symbol("__bpf_call_base")
	b.prog = r.shape("bpf_prog", "jited", "len", "jited_len", "bpf_func", "aux")
	b.aux = r.shape("bpf_prog_aux", "id", "prog", "name[]", "load_time", "user")
	b.user = r.shape("user_struct", "uid.val")
	b.ksym = r.shape("bpf_ksym", "start", "end", "lnode[]", "prog")
	b.m, b.link = r.shape("bpf_map", "ops", "name[]", "id"), r.shape("bpf_link", "prog")
	b.inAux, b.insns = r.field("bpf_prog_aux", 0, "ksym"), r.field("bpf_prog", 0, "insnsi")
	if b.err = r.err; b.err != nil {
		return
	}
	b.next = b.ksym.offset("lnode")
	b.called = make(map[bpfKnown]string)
	b.calls = make(map[VirtAddr]string)
	for _, name := range harmfulHelpers {
		if at, err := img.syms.symbol(name); err == nil {
			b.calls[at] = name
		}
	}
}

// bpfSigns looks for them.
func (v *View) bpfSigns(p *signsPlan, s *Signs) error {
	b := &p.bpf
	if b.err != nil || b.programs == 0 {
		return b.err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	began := time.Now()
	if began.Before(b.due) {
		b.missed = true
	} else {
		found, err := v.lookAtBPF(p)
		if err != nil {
			return err
		}
		b.report = found
		if b.missed { // what is reported until the next look must not have been so for a moment only
			b.report = bpfSigns{
				slices.DeleteFunc(slices.Clone(found.suspects), func(x BPFSuspect) bool { return !slices.Contains(b.latest.suspects, x) }),
				slices.DeleteFunc(slices.Clone(found.hooks), func(x hookedAt) bool { return !slices.Contains(b.latest.hooks, x) }),
			}
		}
		b.latest, b.missed, b.due = found, false, time.Now().Add(bpfRest*time.Since(began))
	}
	s.Programs = b.report.suspects
	return v.strangers(s, b.report.hooks)
}

func (v *View) lookAtBPF(p *signsPlan) (found bpfSigns, err error) {
	b := &p.bpf
	ids := make(map[VirtAddr]uint32)
	if err := v.xarray("bpf_prog", b.programs, maxBPF, func(id uint64, at VirtAddr) error { ids[at] = uint32(id); return nil }); err != nil {
		return found, err
	}
	hidden := func(at VirtAddr, aux *thing) {
		if len(found.suspects) < maxStrays && !slices.ContainsFunc(found.suspects, func(x BPFSuspect) bool { return x.Addr == at }) {
			x := v.suspect(b, at, aux)
			x.Hidden = true
			found.suspects = append(found.suspects, x)
		}
	}
	code := make(map[VirtAddr]virtRange) // of programs, by their bpf_prog_aux
	err = v.list("bpf_ksym", b.kallsyms, b.next, maxBPF, func(at VirtAddr) error {
		k, err := v.thing(b.ksym, at)
		if err != nil || k.num("prog") == 0 { // a trampoline's, say
			return err
		}
		aux, err := v.thing(b.aux, at-VirtAddr(b.inAux))
		if err != nil {
			return err
		}
		code[aux.addr()] = virtRange{k.ptr("start"), k.ptr("end")}
		// A part of another program has no ID, and neither has one that ends.
		if id := uint32(aux.num("id")); id != 0 && ids[aux.ptr("prog")] != id {
			hidden(aux.ptr("prog"), &aux)
		}
		return nil
	})
	if err != nil {
		return found, err
	}
	err = v.xarray("bpf_link", b.links, maxBPF, func(_ uint64, at VirtAddr) error {
		l, err := v.thing(b.link, at)
		if err != nil {
			return err
		}
		prog := l.ptr("prog")
		if _, ok := ids[prog]; ok || prog == 0 {
			return nil
		}
		t, err := v.thing(b.prog, prog)
		if err != nil {
			return err
		}
		aux, err := v.thing(b.aux, t.ptr("aux"))
		if err == nil {
			hidden(prog, &aux) // as long as a link has it, it keeps its ID
		}
		return err
	})
	if err != nil {
		return found, err
	}
	modules, err := v.modulesBriefly()
	if err != nil {
		return found, err
	}
	there := make(map[bpfKnown]bool, len(ids))
	for at, id := range ids {
		t, err := v.thing(b.prog, at)
		if err != nil {
			return found, err
		}
		aux, err := v.thing(b.aux, t.ptr("aux"))
		if err != nil {
			return found, err
		}
		if h, odd := b.entry(&t, &aux, id, code, p.hooks.from, p.hooks.to, modules); odd && len(found.hooks) < maxHooks {
			found.hooks = append(found.hooks, hookedAt{Hook: h})
		}
		k := bpfKnown{at, id, aux.num("load_time")}
		there[k] = true
		name, ok := b.called[k]
		if !ok {
			if name, err = v.harmfulCall(b, at, t.num("len")); err != nil {
				return found, err
			}
			b.called[k] = name
		}
		if name != "" && len(found.suspects) < maxStrays {
			x := v.suspect(b, at, &aux)
			x.Calls = name
			found.suspects = append(found.suspects, x)
		}
	}
	for k := range b.called {
		if !there[k] {
			delete(b.called, k)
		}
	}
	slices.SortFunc(found.suspects, func(x, y BPFSuspect) int { return int(x.ID) - int(y.ID) })
	err = v.xarray("bpf_map", b.maps, maxBPF, func(id uint64, at VirtAddr) error {
		t, err := v.thing(b.m, at)
		if err != nil {
			return err
		}
		if ops := t.ptr("ops"); (ops < v.img.lay.text || ops >= v.img.lay.end) && len(found.hooks) < maxHooks {
			found.hooks = append(found.hooks, hookedAt{Hook: Hook{Kind: "eBPF map", Record: at, Place: bpfPlace(t.text("name"), uint32(id)), Member: "bpf_map.ops", At: t.at("ops"), To: ops}})
		}
		return nil
	})
	return found, err
}

func bpfPlace(name string, id uint32) string { return fmt.Sprintf("%s (%d)", name, id) }

// entry looks where a program is entered: in its own code, or, if it is interpreted, in the kernel's.
func (b *bpfSignsPlan) entry(t, aux *thing, id uint32, code map[VirtAddr]virtRange, from, to VirtAddr, modules []Module) (Hook, bool) {
	f := t.ptr("bpf_func")
	h := Hook{Kind: "eBPF program", Record: t.addr(), Place: bpfPlace(aux.text("name"), id), Member: "bpf_prog.bpf_func", At: t.at("bpf_func"), To: f}
	if f >= from && f < to {
		return h, false
	}
	own, known := code[aux.addr()]
	size := t.num("jited_len")
	// Before v5.18 what is noted is the pages that it is in.
	fits := known && own.start < own.end && uint64(own.end-own.start) <= size+2*bpfPage
	if fits && uint64(own.end-own.start) == size {
		h.Was = own.start
	}
	switch {
	case slices.ContainsFunc(modules, func(m Module) bool { return m.holds(f, 1) }):
		return h, true
	case t.num("jited") == 0:
		return h, true
	case !known:
		return h, false // who has not the right to be seen there (bpf_prog_kallsyms_add) is not
	}
	return h, !fits || f < own.start || f >= own.end
}

// harmfulCall returns the first of harmfulHelpers that a program calls.
func (v *View) harmfulCall(b *bpfSignsPlan, at VirtAddr, n uint64) (string, error) {
	n = min(n, maxBPFInsns)
	buf := make([]byte, min(n, bpfInsnsAtOnce)*bpfInsnSize)
	for i := uint64(0); i < n; i += bpfInsnsAtOnce {
		part := buf[:min(n-i, bpfInsnsAtOnce)*bpfInsnSize]
		if err := v.img.space.object(v, "bpf_insn", at+VirtAddr(b.insns+i*bpfInsnSize), part); err != nil {
			return "", err
		}
		for ; len(part) > 0; part = part[bpfInsnSize:] {
			// struct bpf_insn, include/uapi/linux/bpf.h: BPF_JMP | BPF_CALL of a helper, whose address the verifier has put in (do_misc_fixups).
			if part[0] == 0x85 && part[1]>>4 == 0 {
				if name := b.calls[b.base+VirtAddr(int64(int32(le32(part[4:]))))]; name != "" {
					return name, nil
				}
			}
		}
	}
	return "", nil
}

func (v *View) suspect(b *bpfSignsPlan, at VirtAddr, aux *thing) BPFSuspect {
	x := BPFSuspect{Addr: at, ID: uint32(aux.num("id")), Name: aux.text("name"), Loaded: time.Duration(aux.num("load_time"))}
	if u := aux.ptr("user"); u != 0 {
		if t, err := v.thing(b.user, u); err == nil {
			x.UID = uint32(t.num("uid.val"))
		}
	}
	return x
}
