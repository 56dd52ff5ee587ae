package kernel

import (
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Mapping is a part of a process's memory (struct vm_area_struct, include/linux/mm_types.h), as /proc/PID/maps has it.
type Mapping struct {
	Start  uint64 `json:"start"`
	End    uint64 `json:"end"`
	Perms  string `json:"perms"`  // rwxp, or s at the end if it is shared
	Offset uint64 `json:"offset"` // in the file
	Dev    string `json:"dev,omitempty"`
	Inode  uint64 `json:"inode,omitempty"`
	Name   string `json:"name,omitempty"` // the file's path, or [heap], [stack], [vdso], …
	// What the page tables say of its pages. Beside these there are those that were never touched, or are left to the file.
	Present uint64 `json:"present"`
	Swapped uint64 `json:"swapped"`
	Other   uint64 `json:"other,omitempty"` // on their way elsewhere, poisoned, or on a device
}

// PageState is where a page of a process is.
type PageState int

const (
	PageAbsent  PageState = iota // nothing is there yet, or it would be read from the file
	PagePresent                  // in memory
	PageSwapped                  // in a swap area
	PageOther                    // being moved, poisoned, on a device
)

func (s PageState) String() string {
	return [...]string{"not there", "in memory", "swapped out", "being moved or poisoned"}[s]
}

// AbsentError is a page of a process that is not in memory.
type AbsentError struct {
	Addr  uint64
	State PageState
}

func (e *AbsentError) Error() string { return fmt.Sprintf("page at %#x is %v", e.Addr, e.State) }

// Unwrap says that nothing is mapped there.
func (e *AbsentError) Unwrap() error { return ErrNotMapped }

const (
	maxMappings  = 1 << 20
	maxArguments = 1 << 21 // bytes, of arguments or environment
	maxWalked    = 1 << 24 // page-table entries that a listing of mappings looks at

	// leastSwapfiles is how many swap areas every kernel can have: MAX_SWAPFILES is 22 at least.
	leastSwapfiles = 16

	vmRead, vmWrite, vmExec, vmMayShare = 1, 2, 4, 0x80
)

// UserMemory is the memory of a process, as its own page tables map it. It is not safe for concurrent use.
type UserMemory struct {
	v     *View
	mm    thing
	space addressSpace // of the process
	swaps uint64       // kinds of entries that are of swap areas
	// tables are the page-table pages that were used last, of each level: neighbours are in the same.
	tables [maxLevels]struct {
		at   hostmem.PhysAddr
		page *page // nil if there is none yet
	}
	// leaf is the last table of the lowest level, which maps the addresses that begin with from.
	leaf struct {
		from  uint64
		table hostmem.PhysAddr
		known bool
	}
}

const maxLevels = 8 // of page tables, on any architecture

// entry reads an entry of a page table of a level.
func (m *UserMemory) entry(level int, at hostmem.PhysAddr) (uint64, error) {
	offset := at % hostmem.PageSize
	last := &m.tables[level]
	if last.page == nil || last.at != at-offset {
		page, err := m.v.page(at - offset)
		if err != nil {
			return 0, err
		}
		last.at, last.page = at-offset, page
	}
	return le64(last.page[offset:]), nil
}

// UserMemory returns the memory of the process that the thread with the given PID is of; ErrNotFound if it has none.
func (v *View) UserMemory(pid int) (*UserMemory, error) {
	m, err := settle(v, func() (*UserMemory, error) {
		t, _, err := v.taskOf(pid)
		if err != nil {
			return nil, err
		}
		return v.userMemory(t)
	})
	if err != nil {
		return nil, fmt.Errorf("memory of process: %w", err)
	}
	return m, nil
}

func (v *View) userMemory(t Task) (*UserMemory, error) {
	r := resolver{img: v.img}
	task := r.shape("task_struct", "mm")
	// VMAs are in a maple tree since v6.1; before they were linked.
	mm := r.shape("mm_struct", "pgd", "mm_mt[]?", "mmap?", "arg_start", "arg_end", "env_start", "env_end", "start_brk", "brk", "start_stack")
	if r.err != nil {
		return nil, r.err
	}
	x, err := v.thing(task, t.Addr)
	if err != nil {
		return nil, err
	}
	p := x.ptr("mm")
	if p == 0 {
		return nil, fmt.Errorf("thread %d is of the kernel, or has ended: %w", t.PID, ErrNotFound)
	}
	m := &UserMemory{v: v}
	if m.mm, err = v.thing(mm, p); err != nil {
		return nil, err
	}
	root, err := v.Phys(m.mm.ptr("pgd"))
	if err != nil {
		return nil, m.mm.corrupt("page tables: %v", err)
	}
	if root%8 != 0 {
		return nil, m.mm.corrupt("page tables at %v", root)
	}
	m.space = addressSpace{root: root, levels: v.img.space.levels}
	m.swaps = leastSwapfiles
	if at, err := v.img.syms.symbol("nr_swapfiles"); err == nil {
		n, err := v.Uint32(at)
		if err != nil {
			return nil, err
		}
		m.swaps = uint64(n)
	}
	return m, nil
}

// page finds where a page is: its physical address if it is in memory, and how far what was found goes, in bytes.
func (m *UserMemory) page(va uint64) (pa hostmem.PhysAddr, size uint64, state PageState, err error) {
	top := m.space.levels[0].shift + m.space.levels[0].bits
	if !m.v.img.arch.userTables {
		top--
	}
	if va>>top != 0 {
		return 0, 0, PageAbsent, fmt.Errorf("address %#x is not of a process: %w", va, ErrNotMapped)
	}
	table, first := m.space.root, 0
	lowest := len(m.space.levels) - 1
	span := m.space.levels[lowest].shift + m.space.levels[lowest].bits
	if m.leaf.known && m.leaf.from == va>>span {
		table, first = m.leaf.table, lowest
	}
	for i := first; i <= lowest; i++ {
		level := m.space.levels[i]
		index := va >> level.shift & (1<<level.bits - 1)
		size := uint64(1) << level.shift
		left := size - va&(size-1)
		at := table + hostmem.PhysAddr(index*8)
		e, err := m.entry(i, at)
		if err != nil {
			if errors.Is(err, hostmem.ErrNotMapped) {
				return 0, 0, PageAbsent, &CorruptError{"page table", VirtAddr(va), fmt.Sprintf("level %d is at %v, where no memory is", len(m.space.levels)-i, at)}
			}
			return 0, 0, PageAbsent, err
		}
		pa, page, present := level.entry(e)
		if !present {
			if e == 0 {
				return 0, left, PageAbsent, nil
			}
			pa, state := m.v.img.arch.absent(level, e, m.swaps)
			if state == PagePresent {
				pa = pa&^hostmem.PhysAddr(size-1) + hostmem.PhysAddr(va&(size-1))
			}
			return pa, left, state, nil
		}
		if page {
			return pa&^hostmem.PhysAddr(size-1) + hostmem.PhysAddr(va&(size-1)), left, PagePresent, nil
		}
		if table = pa; i == lowest-1 {
			m.leaf.from, m.leaf.table, m.leaf.known = va>>span, pa, true
		}
	}
	return 0, 0, PageAbsent, &CorruptError{"page table", VirtAddr(va), "the last level holds a table"}
}

// ReadAt reads from an address of the process on. A page that is not in memory ends it with an *AbsentError.
func (m *UserMemory) ReadAt(b []byte, addr int64) (n int, err error) {
	for n < len(b) {
		at := uint64(addr) + uint64(n)
		pa, size, state, err := m.page(at)
		if err != nil {
			return n, err
		}
		if state != PagePresent {
			return n, &AbsentError{at, state}
		}
		part := min(uint64(len(b)-n), size)
		if err := m.v.readPhys(pa, b[n:n+int(part)]); err != nil {
			return n, fmt.Errorf("read %#x: %w", at, err)
		}
		n += int(part)
	}
	return n, nil
}

// Arguments returns what the process was started with, which it may have overwritten.
func (m *UserMemory) Arguments() ([]string, error) {
	return m.strings(m.mm.num("arg_start"), m.mm.num("arg_end"))
}

// Environment returns the environment that the process was started with. It may hold secrets.
func (m *UserMemory) Environment() ([]string, error) {
	return m.strings(m.mm.num("env_start"), m.mm.num("env_end"))
}

func (m *UserMemory) strings(start, end uint64) ([]string, error) {
	if end < start || end-start > maxArguments {
		return nil, m.mm.corrupt("arguments or environment from %#x to %#x", start, end)
	}
	b := make([]byte, end-start)
	n, err := m.ReadAt(b, int64(start))
	all := []string{}
	for text := string(b[:n]); text != ""; {
		s, rest, _ := strings.Cut(text, "\x00")
		all = append(all, s)
		text = rest
	}
	return all, err
}

// Mappings lists the mappings of the process, by their addresses.
func (m *UserMemory) Mappings() iter.Seq2[Mapping, error] {
	return settled(m.v, "walk mappings", func() ([]Mapping, error) {
		w := mappingWalk{m: m, left: maxWalked}
		return w.run()
	})
}

type mappingWalk struct {
	m                                *UserMemory
	files                            fileWalk
	vma, file, inode, super, special *shape
	// What tells a special mapping is its operations, or, where variables have no symbols, the function among these that names it.
	specialOps, specialName VirtAddr
	ops                     *shape
	left                    int
}

func (w *mappingWalk) run() ([]Mapping, error) {
	v := w.m.v
	w.files = fileWalk{v: v}
	if err := w.files.resolve(); err != nil {
		return nil, err
	}
	r := resolver{img: v.img}
	w.vma = r.shape("vm_area_struct", "vm_start", "vm_end", "vm_mm", "vm_flags", "vm_pgoff", "vm_file", "vm_ops", "vm_private_data", "anon_name?", "vm_next?")
	w.file = r.shape("file", "f_inode")
	w.inode = r.shape("inode", "i_ino", "i_sb")
	w.super = r.shape("super_block", "s_dev")
	w.special = r.shape("vm_special_mapping", "name")
	if r.err != nil {
		return nil, r.err
	}
	if at, err := v.img.syms.symbol("special_mapping_vmops"); err == nil {
		w.specialOps = at
	} else if at, err := v.img.syms.symbol("special_mapping_name"); err == nil {
		if w.ops = r.shape("vm_operations_struct", "name"); r.err != nil {
			return nil, r.err
		}
		w.specialName = at
	}
	var all []Mapping
	see := func(at VirtAddr) (thing, error) {
		t, err := v.thing(w.vma, at)
		if err != nil {
			return t, err
		}
		x, err := w.read(&t)
		if err != nil {
			return t, err
		}
		if n := len(all); n > 0 && all[n-1].End > x.Start || x.Start >= x.End {
			return t, t.corrupt("from %#x to %#x", x.Start, x.End)
		}
		all = append(all, x)
		return t, nil
	}
	if _, ok := w.m.mm.fields["mm_mt"]; ok {
		err := v.mapleTree("vm_area_struct", w.m.mm.at("mm_mt"), maxMappings, func(first, last uint64, at VirtAddr) error {
			t, err := see(at)
			if err == nil && (t.num("vm_start") != first || t.num("vm_end") != last+1) {
				err = t.corrupt("is listed from %#x to %#x", first, last+1)
			}
			return err
		})
		return all, err
	}
	for at := w.m.mm.ptr("mmap"); at != 0; {
		if len(all) == maxMappings {
			return all, w.m.mm.corrupt("more than %d mappings", maxMappings)
		}
		t, err := see(at)
		if err != nil {
			return all, err
		}
		at = t.ptr("vm_next")
	}
	return all, nil
}

func (w *mappingWalk) read(t *thing) (Mapping, error) {
	v := w.m.v
	m := Mapping{Start: t.num("vm_start"), End: t.num("vm_end")}
	if t.ptr("vm_mm") != w.m.mm.addr() {
		return m, t.corrupt("is of the memory at %v, not of that at %v", t.ptr("vm_mm"), w.m.mm.addr())
	}
	flags := t.num("vm_flags")
	perms := []byte("---p")
	for i, f := range []struct {
		bit uint64
		c   byte
	}{{vmRead, 'r'}, {vmWrite, 'w'}, {vmExec, 'x'}, {vmMayShare, 's'}} {
		if flags&f.bit != 0 {
			perms[i] = f.c
		}
	}
	m.Perms = string(perms)
	if p := t.ptr("vm_file"); p != 0 {
		m.Offset = t.num("vm_pgoff") * v.img.pageSize
		file, err := v.thing(w.file, p)
		if err != nil {
			return m, err
		}
		inode, err := v.thing(w.inode, file.ptr("f_inode"))
		if err != nil {
			return m, err
		}
		super, err := v.thing(w.super, inode.ptr("i_sb"))
		if err != nil {
			return m, err
		}
		m.Inode, m.Dev = inode.num("i_ino"), device(super.num("s_dev"))
		w.files.all = w.files.all[:0]
		if err := w.files.open(OpenFile{}, "", p); err != nil {
			return m, err
		}
		m.Name = w.files.all[0].Path
	} else if err := w.name(&m, t); err != nil {
		return m, err
	}
	return m, w.count(&m)
}

// name names what is not of a file, as show_map_vma of fs/proc/task_mmu.c does.
func (w *mappingWalk) name(m *Mapping, t *thing) error {
	v, mm := w.m.v, &w.m.mm
	if at := t.ptr("vm_ops"); w.specialOps == 0 && w.specialName != 0 && at != 0 {
		ops, err := v.thing(w.ops, at)
		if err != nil {
			return err
		}
		if ops.ptr("name") == w.specialName {
			w.specialOps = at
		}
	}
	switch {
	case w.specialOps != 0 && t.ptr("vm_ops") == w.specialOps:
		s, err := v.thing(w.special, t.ptr("vm_private_data"))
		if err != nil {
			return err
		}
		m.Name, err = v.cstring("vm_special_mapping", s.ptr("name"), 64)
		return err
	case m.Start < mm.num("brk") && m.End > mm.num("start_brk"):
		m.Name = "[heap]"
	case m.Start <= mm.num("start_stack") && m.End >= mm.num("start_stack"):
		m.Name = "[stack]"
	case t.ptr("anon_name") != 0:
		at := t.ptr("anon_name") // struct anon_vma_name: a reference count of 4 bytes, and the name
		r := resolver{img: v.img}
		name := r.field("anon_vma_name", 0, "name")
		if r.err != nil {
			return r.err
		}
		s, err := v.cstring("anon_vma_name", at+VirtAddr(name), 80)
		m.Name = "[anon:" + s + "]"
		return err
	}
	return nil
}

// count counts the pages of a mapping by the state that the page tables say.
func (w *mappingWalk) count(m *Mapping) error {
	size := w.m.v.img.pageSize
	for at := m.Start; at < m.End; {
		if w.left--; w.left < 0 {
			return &CorruptError{"page table", VirtAddr(at), fmt.Sprintf("more than %d entries", maxWalked)}
		}
		if m.Start >= 1<<63 {
			return nil // [vsyscall], of the kernel
		}
		_, n, state, err := w.m.page(at)
		if err != nil {
			return err
		}
		n = min(n, m.End-at)
		switch state {
		case PagePresent:
			m.Present += n / size
		case PageSwapped:
			m.Swapped += n / size
		case PageOther:
			m.Other += n / size
		}
		at += n
	}
	return nil
}
