package kernel

import (
	"errors"
	"fmt"
	"strings"
)

// Stack is the kernel stack of a task that does not run.
type Stack struct {
	PID    int     `json:"pid"`
	Comm   string  `json:"comm"`
	State  string  `json:"state"`
	Frames []Frame `json:"frames"` // the innermost first
	// Complete says that the frames were unwound to the end of the stack by what the kernel knows of them. If not, Why
	// says how far that went, and the frames behind are Guessed: words on the stack that look like return addresses.
	Complete bool   `json:"complete"`
	Why      string `json:"why,omitempty"`
}

// Frame is a function on a stack.
type Frame struct {
	Addr    VirtAddr `json:"addr"` // where it goes on
	Symbol  string   `json:"symbol"`
	Offset  uint64   `json:"offset"` // of Addr, behind the symbol
	Module  string   `json:"module,omitempty"`
	Guessed bool     `json:"guessed,omitempty"`
}

const (
	maxFrames    = 512
	maxStack     = 1 << 17 // THREAD_SIZE with KASAN is 64 KiB
	maxOrc       = 1 << 21
	maxModuleSym = 1 << 18
)

// Stack unwinds the kernel stack of the thread with the given PID. A thread that runs has its registers in its CPU, where
// memory does not show them: that is ErrNotSupported.
func (v *View) Stack(pid int) (Stack, error) {
	s, err := settle(v, func() (Stack, error) { return v.stack(pid) })
	if err != nil {
		return Stack{}, fmt.Errorf("unwind stack: %w", err)
	}
	return s, nil
}

func (v *View) stack(pid int) (Stack, error) {
	t, _, err := v.taskOf(pid)
	if err != nil {
		return Stack{}, err
	}
	return v.stackOf(t)
}

func (v *View) stackOf(t Task) (Stack, error) {
	s := Stack{PID: t.PID, Comm: t.Comm, State: t.State}
	if t.OnCPU {
		return s, fmt.Errorf("thread %d runs on CPU %d: %w", t.PID, t.CPU, ErrNotSupported)
	}
	u, err := v.img.arch.unwind(v, t)
	if err != nil {
		return s, err
	}
	why := u.run()
	var corrupt *CorruptError
	if why != nil && !errors.As(why, &corrupt) && !errors.Is(why, ErrNotFound) && !errors.Is(why, ErrNotSupported) {
		return s, why
	}
	for _, ip := range u.found() {
		f, err := v.frame(ip)
		if err != nil {
			return s, err
		}
		s.Frames = append(s.Frames, f)
	}
	if why == nil {
		s.Complete = true
		return s, nil
	}
	s.Why = why.Error()
	for _, ip := range u.scan() {
		f, err := v.frame(ip)
		if err != nil {
			return s, err
		}
		f.Guessed = true
		s.Frames = append(s.Frames, f)
	}
	return s, nil
}

// frame names the function that an address is in.
func (v *View) frame(ip VirtAddr) (Frame, error) {
	f := Frame{Addr: ip}
	name, offset, err := v.img.SymbolAt(ip)
	if err == nil {
		f.Symbol, f.Offset = name, offset
		return f, nil
	}
	if !errors.Is(err, ErrNotFound) {
		return f, err
	}
	m, err := v.moduleAt(ip)
	if err != nil {
		if tolerable(err) || errors.Is(err, ErrNotFound) { // code that was generated, or no code
			return f, nil
		}
		return f, err
	}
	f.Module = m.Name
	if name, at, err := v.moduleSymbol(m, ip); err == nil {
		f.Symbol, f.Offset = name, uint64(ip-at)
	} else if !tolerable(err) && !errors.Is(err, ErrNotFound) {
		return f, err
	}
	return f, nil
}

// moduleAt returns the module whose code va is in.
func (v *View) moduleAt(va VirtAddr) (Module, error) {
	for m, err := range v.Modules() {
		if err != nil {
			return m, err
		}
		for _, r := range m.ranges {
			if va >= r.start && va < r.end {
				return m, nil
			}
		}
	}
	return Module{}, fmt.Errorf("module at %v: %w", va, ErrNotFound)
}

// moduleSymbol returns the symbol of a module that is next before va (struct mod_kallsyms, include/linux/module.h).
func (v *View) moduleSymbol(m Module, va VirtAddr) (string, VirtAddr, error) {
	r := resolver{img: v.img}
	module := r.shape("module", "kallsyms")
	s := r.shape("mod_kallsyms", "symtab", "num_symtab", "strtab")
	if r.err != nil {
		return "", 0, r.err
	}
	t, err := v.thing(module, m.Addr)
	if err != nil {
		return "", 0, err
	}
	k, err := v.thing(s, t.ptr("kallsyms"))
	if err != nil {
		return "", 0, err
	}
	n := k.num("num_symtab")
	if n > maxModuleSym {
		return "", 0, k.corrupt("%d symbols", n)
	}
	const size = 24 // Elf64_Sym: st_name, st_info, st_other, st_shndx, st_value, st_size
	b := make([]byte, n*size)
	if err := v.img.space.object(v, "symtab", k.ptr("symtab"), b); err != nil {
		return "", 0, err
	}
	const marks = 64 // that an assembler has put before it, at most
	for skip := make(map[int]bool); len(skip) < marks; {
		found, best, name := -1, VirtAddr(0), uint32(0)
		for i := 0; i < len(b); i += size {
			at := VirtAddr(le64(b[i+8:]))
			if undefined := le16(b[i+6:]) == 0; !undefined && le32(b[i:]) != 0 && at <= va && at > best && !skip[i] {
				found, best, name = i, at, le32(b[i:])
			}
		}
		if found < 0 || name > 1<<26 {
			break
		}
		text, err := v.cstring("strtab", k.ptr("strtab")+VirtAddr(name), 512)
		if err != nil || !strings.HasPrefix(text, "$") && !strings.HasPrefix(text, ".L") { // is_mapping_symbol, include/linux/module_symbol.h
			return text, best, err
		}
		skip[found] = true
	}
	return "", 0, fmt.Errorf("symbol at %v: %w", va, ErrNotFound)
}
