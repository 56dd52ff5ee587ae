package kernel

import (
	"fmt"
	"iter"
	"strconv"
	"strings"
)

// Sysctl is a setting of the kernel (struct ctl_table, include/linux/sysctl.h).
type Sysctl struct {
	Name string   `json:"name"` // kernel.panic
	Addr VirtAddr `json:"addr"` // of its value; zero if it has none in memory
	Mode string   `json:"mode"` // 0644
	// Value is as /proc/sys shows it, where what the handler does is known; Known is false, and the value as it is stored,
	// where a handler of its own may show it otherwise.
	Value   string `json:"value"`
	Known   bool   `json:"known"`
	Handler string `json:"handler"`
	// Size is of the value, in bytes, as the table has it. Low and High are where the bounds are that the handler may hold a new value
	// against (extra1, extra2); zero if there are none.
	Size int      `json:"-"`
	Low  VirtAddr `json:"-"`
	High VirtAddr `json:"-"`
}

const (
	maxSysctls     = 1 << 17
	maxSysctlValue = 4096
	modeType       = 0o170000
	modeDir        = 0o040000
	modeLink       = 0o120000
)

// sysctlHandlers say how a value is stored and shown, by the handler (kernel/sysctl.c).
var sysctlHandlers = map[string]struct {
	size  int // bytes of a number; zero of text
	sign  bool
	known bool
}{
	"proc_dostring": {0, false, true}, "proc_dointvec": {4, true, true}, "proc_dointvec_minmax": {4, true, true}, "proc_douintvec": {4, false, true},
	"proc_douintvec_minmax": {4, false, true}, "proc_doulongvec_minmax": {8, false, true}, "proc_dobool": {1, false, true}, "proc_dou8vec_minmax": {1, false, true},
}

type sysctlWalk struct {
	v                *View
	table, head, dir *shape
	node             *shape
	tableSize        uint64
	nodeSize         uint64
	handlers         map[VirtAddr]string
	dirs             int
	all              []Sysctl
}

// Sysctls lists the settings of /proc/sys, with those of the host's own network namespace.
func (v *View) Sysctls() iter.Seq2[Sysctl, error] {
	return settled(v, "walk sysctls", func() ([]Sysctl, error) {
		w := sysctlWalk{v: v, handlers: make(map[VirtAddr]string)}
		r := resolver{img: v.img}
		w.table = r.shape("ctl_table", "procname", "data", "maxlen", "mode", "proc_handler", "extra1", "extra2")
		w.tableSize = r.size("ctl_table")
		w.head = r.shape("ctl_table_header", "ctl_table", "node")
		w.dir = r.shape("ctl_dir", "root.rb_node")
		w.node = r.shape("ctl_node", "header")
		w.nodeSize = r.size("ctl_node")
		nodeIn := r.field("ctl_node", 0, "node")
		root := r.symbol("sysctl_table_root")
		set := VirtAddr(r.field("ctl_table_root", 0, "default_set"))
		dir := VirtAddr(r.field("ctl_table_set", 0, "dir"))
		header := r.field("ctl_dir", 0, "header")
		net := r.symbol("init_net")
		netSet := VirtAddr(r.field("net", 0, "sysctls"))
		if r.err != nil {
			return nil, r.err
		}
		if nodeIn != 0 || header != 0 {
			return nil, fmt.Errorf("ctl_node or ctl_dir: %w", ErrNotSupported)
		}
		if err := w.directory(root+set+dir, "", 0); err != nil {
			return w.all, err
		}
		err := w.directory(net+netSet+dir, "", 0)
		return w.all, err
	})
}

func (w *sysctlWalk) directory(at VirtAddr, path string, depth int) error {
	if w.dirs++; depth > 16 || w.dirs > maxSysctls {
		return &CorruptError{"ctl_dir", at, "too many directories, or too deep"}
	}
	d, err := w.v.thing(w.dir, at)
	if err != nil {
		return err
	}
	return w.v.rbtree("ctl_node", d.at("root.rb_node"), 0, maxSysctls, func(at VirtAddr) error {
		n, err := w.v.thing(w.node, at)
		if err != nil {
			return err
		}
		h, err := w.v.thing(w.head, n.ptr("header"))
		if err != nil {
			return err
		}
		// The nodes of a table are an array beside it: proc_sysctl.c, find_entry.
		first := h.ptr("node")
		if at < first || uint64(at-first)%w.nodeSize != 0 || uint64(at-first)/w.nodeSize > maxSysctls {
			return n.corrupt("is not among the nodes at %v", first)
		}
		t, err := w.v.thing(w.table, h.ptr("ctl_table")+VirtAddr(uint64(at-first)/w.nodeSize*w.tableSize))
		if err != nil {
			return err
		}
		name, err := w.v.cstring("ctl_table", t.ptr("procname"), 256)
		if err != nil {
			return err
		}
		full := strings.TrimPrefix(path+"."+name, ".")
		switch t.num("mode") & modeType {
		case modeDir:
			return w.directory(n.ptr("header"), full, depth+1)
		case modeLink:
			return nil // to the same of a namespace
		}
		return w.value(full, &t)
	})
}

func (w *sysctlWalk) value(name string, t *thing) error {
	if len(w.all) == maxSysctls {
		return t.corrupt("more than %d settings", maxSysctls)
	}
	s := Sysctl{Name: name, Addr: t.ptr("data"), Mode: fmt.Sprintf("%04o", t.num("mode")&0o7777), Low: t.ptr("extra1"), High: t.ptr("extra2")}
	handler := t.ptr("proc_handler")
	known, ok := w.handlers[handler]
	if !ok {
		var err error
		if known, err = w.v.function(handler); err != nil {
			return err
		}
		w.handlers[handler] = known
	}
	s.Handler = known
	h := sysctlHandlers[s.Handler]
	s.Known = h.known
	n := t.int("maxlen")
	if n < 0 || n > 1<<20 {
		return t.corrupt("value of %d bytes", n)
	}
	s.Size = n
	if s.Addr == 0 || n == 0 || !w.v.img.space.valid(s.Addr, 1) {
		s.Addr, s.Known = 0, false
		w.all = append(w.all, s)
		return nil
	}
	size := h.size
	if !s.Known && n%4 == 0 && n <= 64 { // most handlers add checks to that of numbers
		size, h.sign = 4, true
	}
	b := make([]byte, min(n, maxSysctlValue))
	if err := w.v.img.space.object(w.v, "ctl_table", s.Addr, b); err != nil {
		return err
	}
	switch {
	case size == 0:
		s.Value, _ = cString(b)
	case h.size == 1 && s.Handler == "proc_dobool":
		s.Value = strconv.Itoa(int(b[0]))
	default:
		var words []string
		for ; len(b) >= size; b = b[size:] {
			var n uint64
			for i := size - 1; i >= 0; i-- {
				n = n<<8 | uint64(b[i])
			}
			if h.sign {
				words = append(words, strconv.FormatInt(signed(n, uint64(8*size)), 10))
			} else {
				words = append(words, strconv.FormatUint(n, 10))
			}
		}
		s.Value = strings.Join(words, "\t")
	}
	w.all = append(w.all, s)
	return nil
}
