package kernel

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sort"
)

// trap is a kprobe that may have put a breakpoint, or a jump, into code.
type trap struct {
	at  VirtAddr
	was []byte // what the kernel keeps of what was there
}

func (t trap) equal(o trap) bool { return t.at == o.at && bytes.Equal(t.was, o.was) }

// traps are the kprobes as they are listed once in a pass.
type traps struct {
	all    []trap
	listed bool
}

func (t *traps) forget() { t.all, t.listed = nil, false }

// list returns the kprobes by address. What cannot be made out excuses nothing.
func (t *traps) list(v *View) ([]trap, error) {
	if t.listed {
		return t.all, nil
	}
	all, err := settle(v, v.traps)
	if err != nil && !tolerable(err) && !errors.Is(err, ErrNotFound) {
		return nil, fmt.Errorf("list kprobes: %w", err)
	}
	if err != nil {
		all = nil
	}
	slices.SortFunc(all, func(a, b trap) int { return cmp.Compare(a.at, b.at) })
	t.all, t.listed = all, true
	return all, nil
}

// traps walks the table of kprobes (struct kprobe, include/linux/kprobes.h): each keeps the instruction that its breakpoint has taken the place of. One that
// others share may have become a jump of five bytes on x86-64 (struct optimized_kprobe), and keeps the last four of them, too.
func (v *View) traps() ([]trap, error) {
	var all []trap
	err := v.eachKprobePlace(func(t *thing, shared bool) error {
		one := trap{at: t.ptr("addr"), was: slices.Clone(t.bytes("opcode"))}
		if shared {
			r := resolver{img: v.img}
			optimized := r.shape("optimized_kprobe", "kp[]", "optinsn.copied_insn[]")
			if r.err == nil && optimized.offset("kp") == 0 && optimized.fields["optinsn.copied_insn"].Size <= 16 { // else there are none
				o, err := v.thing(optimized, t.addr())
				if err != nil {
					return err
				}
				one.was = append(one.was, o.bytes("optinsn.copied_insn")...)
			}
		}
		all = append(all, one)
		return nil
	}, "hlist[]", "addr", "pre_handler", "opcode")
	if err != nil {
		return nil, err
	}
	return all, nil
}

// within returns those of a sorted list that are between two addresses.
func within(all []trap, from, to VirtAddr) []trap {
	at := func(va VirtAddr) int {
		return sort.Search(len(all), func(i int) bool { return all[i].at >= va })
	}
	return all[at(from):max(at(from), at(to))]
}

// disarm puts what was there back where kprobes have put breakpoints into a piece of code.
func (img *Image) disarm(all []trap, from VirtAddr, b []byte) {
	for _, t := range within(all, from, from+VirtAddr(len(b))) {
		img.arch.disarm(b[t.at-from:], t.was)
	}
}

const (
	minJumps = 256     // places of static keys that a kernel has at least
	maxJumps = 1 << 20 // bytes of their table
)

// jumpTable finds the table of the kernel's static keys where kallsyms does not name it, for aarch64: it is the longest row of entries of which each
// leads to a NOP, or to a branch to where the entry says that it leads. Those of code that was given back after start-up have the mark of that
// (jump_entry_is_init, include/linux/jump_label.h).
func (img *Image) jumpTable(v *View, text, etext VirtAddr) (VirtAddr, []byte, error) {
	if img.arch.name != "aarch64" {
		return 0, nil, fmt.Errorf("jump table of %s without symbols: %w", img.arch.name, ErrNotSupported)
	}
	end, err := img.syms.symbol("_end")
	if err != nil {
		return 0, nil, err
	}
	if etext <= text || end <= etext || uint64(end-text) > goldenMost || etext%8 != 0 {
		return 0, nil, &CorruptError{"kernel image", text, fmt.Sprintf("code to %v, end at %v", etext, end)}
	}
	rows := jumpRows{text: text, etext: etext, end: end, began: [2]VirtAddr{etext, etext + 8}}
	buf := make([]byte, scanChunk+jumpEntry/2)
	for at := etext; at < end; at += scanChunk {
		if err := v.ctx.Err(); err != nil {
			return 0, nil, err
		}
		b := buf[:min(uint64(len(buf)), uint64(end-at))]
		if err := img.readImage(fresh{v}, at, b); err != nil {
			return 0, nil, err
		}
		rows.look(at, b)
	}
	if rows.bytes > maxJumps {
		return 0, nil, &CorruptError{"jump table", rows.at, fmt.Sprintf("a row of %d bytes", rows.bytes)}
	}
	table := make([]byte, rows.bytes)
	if err := img.space.read(fresh{v}, rows.at, table); err != nil {
		return 0, nil, err
	}
	from, n := 0, 0
	for i, began := 0, 0; i < len(table); i += jumpEntry {
		site, target, _ := jump(rows.at+VirtAddr(i), table[i:])
		op := uint32(aarch64NOP)
		if site < etext {
			if op, err = img.space.word32(fresh{v}, "jump entry", site); err != nil {
				return 0, nil, err
			}
		}
		if op != aarch64NOP && !(op>>26 == 0x05 && site+VirtAddr(int64(int32(op<<6))>>6<<2) == target) {
			began = i + jumpEntry
		} else if i+jumpEntry-began > n {
			from, n = began, i+jumpEntry-began
		}
	}
	if n/jumpEntry < minJumps {
		return 0, nil, fmt.Errorf("jump table: the longest row of entries has %d: %w", n/jumpEntry, ErrNotFound)
	}
	return rows.at + VirtAddr(from), table[from : from+n], nil
}

// jump reads a jump_entry at an address.
func jump(va VirtAddr, b []byte) (site, target, key VirtAddr) {
	site, target = va+VirtAddr(int64(int32(le32(b)))), va+4+VirtAddr(int64(int32(le32(b[4:]))))
	return site, target, (va + 8 + VirtAddr(le64(b[8:]))) &^ 3
}

// jumpRows looks for the longest row of what may be jump entries.
type jumpRows struct {
	text, etext, end VirtAddr    // of the image
	began            [2]VirtAddr // the row under way, of entries that lie at 0 and at 8 modulo 16 from etext
	at               VirtAddr    // the longest
	bytes            int
}

func (r *jumpRows) look(va VirtAddr, b []byte) {
	for phase := range r.began {
		for i := jumpEntry / 2 * phase; i+jumpEntry <= len(b) && i < scanChunk; i += jumpEntry {
			at := va + VirtAddr(i)
			site, target, key := jump(at, b[i:])
			next := at + jumpEntry
			switch {
			case site%4 != 0, target%4 != 0, key%8 != 0, site < r.text, site >= r.end, target < r.text, target >= r.end, key < r.etext, key >= r.end,
				site >= r.etext && b[i+8]&2 == 0:
				r.began[phase] = next
			case int(next-r.began[phase]) > r.bytes:
				r.at, r.bytes = r.began[phase], int(next-r.began[phase])
			}
		}
	}
}
