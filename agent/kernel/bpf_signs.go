package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// What a rootkit does to eBPF, or with it, by structure alone: it has a program's machine code replaced by a function of its own, gives a map other
// functions, takes a program out of what bpf(2) lists, or loads one whose calls harm. A program and its record (struct bpf_prog and bpf_prog_aux) are
// made by who loads it and change no more, but for its end. Not looked at are programs that are in none of the lists, however they are called.

// BPFSuspect is a program that is hidden, or calls what harms.
type BPFSuspect struct {
	Addr   VirtAddr      `json:"addr"`
	ID     uint32        `json:"id"` // 0: it has none, and is no function of another
	Name   string        `json:"name"`
	UID    uint32        `json:"uid"`    // of who loaded it
	Loaded time.Duration `json:"loaded"` // since boot
	Calls  []string      `json:"calls,omitempty"`
}

// harmfulHelpers are functions of the kernel's that a program calls to change what it only looks at: the memory of processes, and what functions return.
// Those that send signals or overwrite packets are not among them: systemd, tracers and load balancers live by them.
var harmfulHelpers = []string{"bpf_probe_write_user", "bpf_override_return"} // kernel/trace/bpf_trace.c

const (
	maxBPFLooked    = 1 << 14  // programs, maps, links or symbols; of more, nothing is told
	maxBPFFunctions = 256      // of a program: BPF_MAX_SUBPROGS of include/linux/bpf_verifier.h
	maxBPFInsns     = 1 << 20  // of a program: BPF_COMPLEXITY_LIMIT_INSNS of include/linux/bpf.h
	maxBPFCode      = 16 << 20 // bytes of machine code
	bpfSlack        = 8 << 10  // bytes around the code of a program, up to v5.17: a header, padding to pages, and a hole of up to 128 at its beginning
	bpfScan         = 64 << 10 // bytes of instructions that a look reads
	bpfInsn         = 8        // bytes of struct bpf_insn
	bpfMany         = 512      // programs, maps, links and symbols: of more, bpfLooks in bpfTurn looks are taken, and the others tell what the last one found
	bpfTurn         = 8
	bpfLooks        = 2 // together, for what is found must be seen twice
)

// bpfPlan is where eBPF is.
type bpfPlan struct {
	err                              error
	programs, maps, links, symbols   VirtAddr // prog_idr, map_idr, link_idr and bpf_kallsyms; 0 if there is none
	prog, aux, user, table, link, ks *shape
	ksym, node, insns                uint64            // of bpf_prog_aux.ksym, bpf_ksym.lnode and bpf_prog.insnsi
	from, to                         VirtAddr          // the constants of the kernel
	helpers                          map[uint32]string // by what an instruction has of them

	mu    sync.Mutex
	turn  int
	last  bpfFound
	scans map[bpfKey]*bpfScanned
}

// bpfFound is what a look finds.
type bpfFound struct {
	n               int // how much there is to look at
	hooks           []hookedAt
	hidden, harmful []BPFSuspect
}

type bpfKey struct {
	at VirtAddr
	id uint64
}

// bpfScanned is how far a program's instructions were read, of which there are len.
type bpfScanned struct {
	next, len int
	suspect   BPFSuspect
}

func (img *Image) planBPF() *bpfPlan {
	b := new(bpfPlan)
	r := resolver{img: img}
	at, err := img.syms.symbol("prog_idr") // kernel/bpf/syscall.c
	if err != nil {
		return b
	}
	tree := VirtAddr(r.field("idr", 0, "idr_rt"))
	b.programs, b.maps = at+tree, r.symbol("map_idr")+tree
	b.prog = r.shape("bpf_prog", "jited", "len", "jited_len", "bpf_func", "aux")
	b.insns = r.field("bpf_prog", 0, "insnsi")
	// A program has its symbol since v5.7, and before v6.7 no functions but those that it can be told of (real_func_cnt).
	b.aux = r.shape("bpf_prog_aux", "id", "func_cnt", "real_func_cnt?", "func", "prog", "name[]", "user", "load_time", "ksym.start?", "ksym.end?")
	b.user, b.table = r.shape("user_struct", "uid"), r.shape("bpf_map", "ops", "id", "name[]")
	b.from, b.to = r.symbol("__start_rodata"), r.symbol("__end_rodata")
	if at, err := img.syms.symbol("link_idr"); err == nil {
		b.links, b.link = at+tree, r.shape("bpf_link", "prog")
	}
	if at, err := img.syms.symbol("bpf_kallsyms"); err == nil { // kernel/bpf/core.c, with CONFIG_BPF_JIT
		if _, err := img.types.field("bpf_prog_aux", "ksym"); err == nil {
			b.symbols, b.ks = at, r.shape("bpf_ksym", "prog")
			b.ksym, b.node = r.field("bpf_prog_aux", 0, "ksym"), r.field("bpf_ksym", 16, "lnode")
		}
	}
	b.helpers = make(map[uint32]string)
	if base, err := img.syms.symbol("__bpf_call_base"); err == nil {
		for _, name := range harmfulHelpers {
			if at, err := img.syms.symbol(name); err == nil {
				b.helpers[uint32(at-base)] = name
			}
		}
	}
	b.err = r.err
	return b
}

// eBPF looks at programs and maps.
func (v *View) eBPF(p *signsPlan, s *Signs) error {
	b := p.bpf
	if _, ok, err := v.feature("prog_idr"); err != nil || !ok {
		return err
	}
	if b.err != nil {
		return b.err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	found := b.last
	var err error
	if b.last.n <= bpfMany || b.turn%bpfTurn < bpfLooks {
		if found, err = settle(v, func() (bpfFound, error) { return v.lookAtBPF(p) }); err == nil {
			if found.n > bpfMany && b.last.n <= bpfMany {
				b.turn = 0
			}
			b.last = found
		}
	}
	b.turn++
	s.HiddenPrograms, s.HarmfulPrograms = found.hidden, found.harmful
	return errors.Join(err, v.strangers(s, found.hooks))
}

func (v *View) lookAtBPF(p *signsPlan) (found bpfFound, err error) {
	b := p.bpf
	modules, err := v.modulesBriefly()
	if err != nil {
		return found, err
	}
	note := func(h Hook) {
		if len(found.hooks) < maxHooks {
			found.hooks = append(found.hooks, hookedAt{Hook: h})
		}
	}
	var unread error
	// What cannot be read ends just now; if it stays so, it is told of as that which is missing.
	skip := func(err error) error {
		if tolerable(err) {
			unread, err = err, nil
		}
		return err
	}
	listed := make(map[VirtAddr]uint64) // struct bpf_prog to its number
	functions := make(map[VirtAddr]bool)
	err = v.xarray("bpf_prog", b.programs, maxBPFLooked, func(id uint64, at VirtAddr) error {
		found.n++
		listed[at] = id
		t, err := v.thing(b.prog, at)
		if err != nil {
			return skip(err)
		}
		a, err := v.thing(b.aux, t.ptr("aux"))
		if err != nil {
			return skip(err)
		}
		if h, bad := v.replaced(p, &t, &a, modules); bad {
			h.Place = fmt.Sprintf("%s (%d)", a.text("name"), id)
			note(h)
		}
		if n := max(a.num("func_cnt"), a.num("real_func_cnt")); n > maxBPFFunctions {
			return skip(t.corrupt("has %d functions", n))
		} else if n > 0 {
			all, err := v.pointers("bpf_prog_aux.func", a.ptr("func"), int(n))
			if err != nil {
				return skip(err)
			}
			for _, f := range all {
				functions[f] = true
			}
		}
		k := bpfKey{at, id}
		if n := t.num("len"); b.scans[k] == nil && n <= maxBPFInsns && len(b.helpers) > 0 {
			if b.scans == nil {
				b.scans = make(map[bpfKey]*bpfScanned)
			}
			b.scans[k] = &bpfScanned{len: int(n), suspect: v.suspect(&a, at)}
		}
		return nil
	})
	if err != nil {
		return found, err
	}
	if found.harmful, err = v.scanBPF(b, listed); err != nil {
		return found, err
	}
	err = v.xarray("bpf_map", b.maps, maxBPFLooked, func(id uint64, at VirtAddr) error {
		found.n++
		t, err := v.thing(b.table, at)
		if err != nil {
			return skip(err)
		}
		if ops := t.ptr("ops"); ops < b.from || ops >= b.to {
			note(Hook{Kind: "eBPF map", Record: at, Place: fmt.Sprintf("%s (%d)", t.text("name"), id), Member: "bpf_map.ops", At: t.at("ops"), To: ops})
		}
		return nil
	})
	if err != nil {
		return found, err
	}
	seen := make(map[VirtAddr]bool)
	hide := func(a *thing, at VirtAddr) {
		if !seen[at] && len(found.hidden) < maxStrays {
			seen[at] = true
			found.hidden = append(found.hidden, v.suspect(a, at))
		}
	}
	if b.symbols != 0 {
		err = v.list("bpf_ksym", b.symbols, b.node, maxBPFLooked, func(at VirtAddr) error {
			found.n++
			k, err := v.thing(b.ks, at)
			if err != nil || k.num("prog")&0xff == 0 { // of a trampoline
				return skip(err)
			}
			a, err := v.thing(b.aux, at-VirtAddr(b.ksym))
			if err != nil {
				return skip(err)
			}
			// bpf_prog_free_id takes the number from a program with its place among those that are listed.
			prog, id := a.ptr("prog"), a.num("id")
			if n, ok := listed[prog]; ok && n == id || id == 0 && functions[prog] {
				return nil
			}
			hide(&a, prog)
			return nil
		})
		if err != nil {
			return found, err
		}
	}
	if b.links != 0 {
		err = v.xarray("bpf_link", b.links, maxBPFLooked, func(_ uint64, at VirtAddr) error {
			found.n++
			l, err := v.thing(b.link, at)
			prog := l.ptr("prog")
			if _, ok := listed[prog]; err != nil || ok || prog == 0 {
				return skip(err)
			}
			t, err := v.thing(b.prog, prog)
			if err != nil {
				return skip(err)
			}
			a, err := v.thing(b.aux, t.ptr("aux"))
			if err != nil {
				return skip(err)
			}
			hide(&a, prog)
			return nil
		})
		if err != nil {
			return found, err
		}
	}
	return found, unread
}

// suspect returns what is known of a program.
func (v *View) suspect(a *thing, at VirtAddr) BPFSuspect {
	s := BPFSuspect{Addr: at, ID: uint32(a.num("id")), Name: a.text("name"), Loaded: time.Duration(a.num("load_time"))}
	if u := a.ptr("user"); u != 0 {
		if x, err := v.thing(v.img.signsPlan().bpf.user, u); err == nil {
			s.UID = uint32(x.num("uid"))
		}
	}
	return s
}

// replaced reports whether another function is called in place of a program. bpf_prog_kallsyms_add (kernel/bpf/core.c) copies bpf_func to ksym.start, which
// ends with the pages of the code up to v5.16, with what was allocated in v5.17, and with the code since v5.18 ("bpf: Use
// prog->jited_len in bpf_prog_ksym_set_addr()"); of a program with functions the length was not known before. The symbol of what a user without privileges
// has loaded is not set. A program that is not compiled is interpreted by a function of the kernel's; what a device runs is never called.
func (v *View) replaced(p *signsPlan, t, a *thing, modules []Module) (h Hook, bad bool) {
	fn, start, end, n := t.ptr("bpf_func"), a.ptr("ksym.start"), a.ptr("ksym.end"), VirtAddr(t.num("jited_len"))
	kernel := fn >= p.hooks.from && fn < p.hooks.to
	h = Hook{Kind: "eBPF program", Record: t.addr(), Member: "bpf_prog.bpf_func", At: t.at("bpf_func"), To: fn}
	if t.num("jited") == 0 {
		return h, !kernel
	}
	// Machine code calls helpers, and so lies near the kernel, but neither in it nor in a module.
	code := func(at VirtAddr) bool {
		if at >= v.img.lay.text && at < v.img.lay.end || v.img.arch.name == "x86_64" && at < v.img.lay.text || !v.img.space.valid(at, 1) {
			return false
		}
		for i := range modules {
			for _, r := range modules[i].ranges {
				if at >= r.start && at < r.end {
					return false
				}
			}
		}
		return true
	}
	if start == 0 {
		return h, !kernel && !code(fn)
	}
	if size := end - start; code(start) && end > start && size >= n && (size <= n+bpfSlack || n == 0 && size <= maxBPFCode) {
		h.Was = start
	}
	return h, fn != start || !kernel && !code(fn)
}

// scanBPF reads on in the instructions of programs that were not read to their end, and returns those that call what harms. An instruction has of a helper
// how far it is from __bpf_call_base, since the verifier has put that there (do_misc_fixups of kernel/bpf/verifier.c); compilation, blinding included, leaves
// it so.
func (v *View) scanBPF(b *bpfPlan, listed map[VirtAddr]uint64) (harmful []BPFSuspect, err error) {
	maps.DeleteFunc(b.scans, func(k bpfKey, _ *bpfScanned) bool { id, ok := listed[k.at]; return !ok || id != k.id })
	left := bpfScan
	for k, s := range b.scans {
		for s.next < s.len && left >= bpfInsn && err == nil {
			part := make([]byte, bpfInsn*min(s.len-s.next, left/bpfInsn, 512))
			if err = v.img.space.object(v, "bpf_insn", k.at+VirtAddr(b.insns)+VirtAddr(bpfInsn*s.next), part); err != nil {
				break
			}
			left -= len(part)
			s.next += len(part) / bpfInsn
			for ; len(part) > 0; part = part[bpfInsn:] {
				const call = 0x85 // BPF_JMP | BPF_CALL, of a helper if src_reg is 0
				if part[0] != call || part[1]>>4 != 0 {
					continue
				}
				if name := b.helpers[le32(part[4:])]; name != "" && !slices.Contains(s.suspect.Calls, name) {
					s.suspect.Calls = append(s.suspect.Calls, name)
				}
			}
		}
		if len(s.suspect.Calls) > 0 && len(harmful) < maxStrays {
			harmful = append(harmful, s.suspect)
		}
	}
	slices.SortFunc(harmful, func(a, b BPFSuspect) int { return cmp.Compare(a.ID, b.ID) })
	if err != nil && tolerable(err) {
		err = nil // it ends just now, or is read at the next look
	}
	return harmful, err
}
