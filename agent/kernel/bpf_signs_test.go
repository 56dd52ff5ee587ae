package kernel

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// bpfHost is the recorded 6.1, of whose memory words can be overwritten: it has a program, a map, a link and a symbol.
type bpfHost struct {
	img  *Image
	plan *signsPlan
	mem  mutated

	prog, aux, table thing
}

func newBPFHost(t testing.TB) (h *bpfHost) {
	t.Helper()
	recorded(t, func(name string, rec *hostmem.Recording) {
		if name != "6.1" {
			return
		}
		h = &bpfHost{mem: mutated{rec.Frame(frameAlive), make(map[hostmem.PhysAddr][]byte)}}
		found, _ := openRecorded(t, rec)
		var err error
		if h.img, err = Open(t.Context(), h.mem, Options{Hint: Hint{Note: found.Info().Note}, NoteOnly: true}); err != nil {
			t.Fatal(err)
		}
		h.plan = h.img.signsPlan()
		v := h.img.View(t.Context())
		all, err := v.BPF()
		if err != nil || len(all.Programs) != 1 || len(all.Maps) != 1 || len(all.Links) != 1 {
			t.Fatalf("%+v, %v", all, err)
		}
		for _, x := range []struct {
			to *thing
			s  *shape
			at func() VirtAddr
		}{
			{&h.prog, h.plan.bpf.prog, func() VirtAddr { return all.Programs[0].Addr }}, {&h.aux, h.plan.bpf.aux, func() VirtAddr { return h.prog.ptr("aux") }},
			{&h.table, h.plan.bpf.table, func() VirtAddr { return all.Maps[0].Addr }},
		} {
			if *x.to, err = v.thing(x.s, x.at()); err != nil {
				t.Fatal(err)
			}
		}
	})
	return h
}

// put overwrites n bytes.
func (h *bpfHost) put(t *testing.T, va VirtAddr, value uint64, n int) {
	t.Helper()
	pa, err := h.img.View(t.Context()).Phys(va)
	if err != nil {
		t.Fatal(err)
	}
	copy(h.mem.page(t, pa&^(hostmem.PageSize-1))[pa&(hostmem.PageSize-1):], binary.LittleEndian.AppendUint64(nil, value)[:n])
}

func TestBPFSigns(t *testing.T) {
	const stranger = VirtAddr(0xffffffffc0123450)
	h := newBPFHost(t)
	own := h.prog.ptr("bpf_func")
	head := h.plan.bpf.programs + 8 // xarray.xa_head
	symbol := h.aux.at("ksym.start")
	insn := func(n int) VirtAddr { return h.prog.addr() + VirtAddr(h.plan.bpf.insns) + VirtAddr(8*n) }
	var writes uint64
	for n, name := range h.plan.bpf.helpers {
		if name == "bpf_probe_write_user" {
			writes = uint64(n)
		}
	}
	put := func(va VirtAddr, value uint64) { h.put(t, va, value, 8) }
	hook := func(to, was VirtAddr) string {
		return fmt.Sprintf("eBPF program g_prog (1) bpf_prog.bpf_func %v was %v", to, was)
	}
	for _, tt := range []struct {
		name    string
		f       func()
		want    string // hooks, hidden programs, harmful programs
		missing bool   // it says that there is what could not be told
	}{
		{"healthy", func() {}, "", false},
		{"another function is called", func() { put(h.prog.at("bpf_func"), uint64(stranger)) }, hook(stranger, own), false},
		{"one of the kernel's is called", func() { put(h.prog.at("bpf_func"), uint64(h.plan.hooks.from)) }, hook(h.plan.hooks.from, own), false},
		{"the symbol follows", func() {
			put(h.prog.at("bpf_func"), 0xff11000001000000)
			put(symbol, 0xff11000001000000)
			put(symbol+8, 0xff11000001000000+h.prog.num("jited_len"))
		}, hook(0xff11000001000000, 0), false},
		{"the symbol is long, for what it would explain", func() {
			put(h.prog.at("bpf_func"), uint64(stranger))
			put(symbol+8, uint64(stranger+4096))
		}, hook(stranger, 0), false},
		{"a user's program, which has no symbol", func() { put(symbol, 0); put(symbol+8, 0) }, "", false},
		{"it is interpreted", func() {
			h.put(t, h.prog.addr()+VirtAddr(h.prog.offset("jited")), 0, 1)
			put(h.prog.at("bpf_func"), uint64(h.plan.hooks.from))
		}, "", false},
		{"it is interpreted by a stranger", func() { h.put(t, h.prog.addr()+VirtAddr(h.prog.offset("jited")), 0, 1) }, hook(own, 0), false},
		{"a map with others' functions", func() { put(h.table.at("ops"), uint64(stranger)) },
			fmt.Sprintf("eBPF map g_map (1) bpf_map.ops %v was 0x0", stranger), false},
		{"hidden", func() { put(head, 0) }, "hidden g_prog 1", false},
		{"hidden, and without a number", func() { put(head, 0); h.put(t, h.aux.at("id"), 0, 4) }, "hidden g_prog 0", false},
		{"another number than it is listed by", func() { h.put(t, h.aux.at("id"), 7, 4) }, "hidden g_prog 7", false},
		{"a function of a program", func() {
			h.put(t, h.aux.at("id"), 0, 4)
			h.put(t, h.aux.at("func_cnt"), 1, 4)
			put(h.aux.at("func"), uint64(h.aux.at("prog")))
		}, "", false},
		{"more functions than any program has", func() { h.put(t, h.aux.at("func_cnt"), 1<<31, 4) }, "", true},
		{"it writes to processes", func() { put(insn(2), writes<<32|0x85) }, "harmful g_prog 1 [bpf_probe_write_user]", false},
		{"it calls a function of its own", func() { put(insn(2), writes<<32|0x1085) }, "", false},
		{"more instructions than any program has", func() { put(insn(2), writes<<32|0x85); h.put(t, h.prog.at("len"), 1<<31, 4) }, "", false},
		{"a record that is nowhere", func() { put(h.prog.at("aux"), 8) }, "", true},
		{"symbols in a circle", func() { put(h.plan.bpf.symbols+8, uint64(h.aux.addr())) }, "", true},
	} {
		clear(h.mem.pages)
		clear(h.plan.bpf.scans)
		tt.f()
		var s Signs
		err := h.img.View(t.Context()).eBPF(h.plan, &s)
		if err != nil && (!tt.missing || !tolerable(err)) || err == nil && tt.missing {
			t.Errorf("%s: %v; want that something is missing: %v", tt.name, err, tt.missing)
		}
		var got []string
		for _, x := range s.Hooks {
			got = append(got, fmt.Sprintf("%s %s %s %v was %v", x.Kind, x.Place, x.Member, x.To, x.Was))
		}
		for _, x := range s.HiddenPrograms {
			got = append(got, fmt.Sprintf("hidden %s %d", x.Name, x.ID))
		}
		for _, x := range s.HarmfulPrograms {
			got = append(got, fmt.Sprintf("harmful %s %d %v", x.Name, x.ID, x.Calls))
		}
		if got := strings.Join(got, "; "); got != tt.want {
			t.Errorf("%s: %q; want %q", tt.name, got, tt.want)
		}
	}
}

// Of very much, two looks together are taken now and then, and what the last of them has found is told meanwhile.
func TestBPFTurns(t *testing.T) {
	h := newBPFHost(t)
	var taken []int
	for i := range 2 * bpfTurn {
		before := h.plan.bpf.last.n
		if h.plan.bpf.last.n = bpfMany + 1; before == 0 {
			h.plan.bpf.last.n = 0
		}
		hidden := len(h.plan.bpf.last.hidden)
		h.put(t, h.plan.bpf.programs+8, 0, 8)
		var s Signs
		if err := h.img.View(t.Context()).eBPF(h.plan, &s); err != nil {
			t.Fatal(err)
		}
		if h.plan.bpf.last.n <= bpfMany {
			taken = append(taken, i)
		} else if len(s.HiddenPrograms) != hidden || hidden != 1 {
			t.Errorf("look %d tells of %d programs, the one before of %d", i, len(s.HiddenPrograms), hidden)
		}
	}
	if want := []int{0, 1, bpfTurn, bpfTurn + 1}; !slices.Equal(taken, want) {
		t.Errorf("looks %v are taken; want %v", taken, want)
	}
}

// FuzzBPFSigns changes what the record has of eBPF, page tables included.
func FuzzBPFSigns(f *testing.F) {
	h := newBPFHost(f)
	seen := &touched{Memory: h.mem, pages: make(map[hostmem.PhysAddr]bool)}
	img := h.img.with(seen)
	if err := img.View(f.Context()).eBPF(img.signsPlan(), new(Signs)); err != nil {
		f.Fatal(err)
	}
	pages := sortedPages(seen.pages)
	direct := h.img.space.linear[1].start
	for i := range pages {
		f.Add(append(make([]byte, 12), byte(i), 0, 9, 0, byte(i), 0, 0, 0, 0, 0, 0, 0))
	}
	f.Fuzz(func(t *testing.T, changes []byte) {
		mem := overlay{h.mem, make(map[hostmem.PhysAddr]byte)}
		// Each change is a page, an offset, and eight bytes: a value, or the address of another page in the direct map.
		for ; len(changes) >= 12 && len(mem.bytes) < 1024; changes = changes[12:] {
			at, value := pages[int(le16(changes))%len(pages)]+hostmem.PhysAddr(le16(changes[2:])&0xff8), le64(changes[4:])
			if le16(changes[2:])&1 != 0 {
				value = uint64(direct) + uint64(pages[int(le16(changes[4:]))%len(pages)]) + uint64(le16(changes[6:])&0xfff)
			}
			for i := range 8 {
				mem.bytes[at+hostmem.PhysAddr(i)] = byte(value >> (8 * i))
			}
		}
		img := h.img.with(mem)
		for range 3 {
			var s Signs
			_ = img.View(t.Context()).eBPF(img.signsPlan(), &s)
			if len(s.Hooks) > maxHooks || len(s.HiddenPrograms) > maxStrays || len(s.HarmfulPrograms) > maxStrays {
				t.Errorf("%d hooks, %d hidden and %d harmful programs", len(s.Hooks), len(s.HiddenPrograms), len(s.HarmfulPrograms))
			}
		}
	})
}
