package kernel

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
)

// What code registers with the kernel so that it is called: a rootkit that changes no table of the kernel's listens so to keys, hides packets, keeps
// modules of others from being loaded, or sees each system call. As with probes (hook.go), whoever stands in the kernel's lists may; code that
// stands in none is a stranger's. Not looked at are chains of notifiers that are not named here.

// notifierChains are heads of chains of struct notifier_block (include/linux/notifier.h), each of a type that has a member "head".
var notifierChains = []struct{ symbol, typ string }{
	{"keyboard_notifier_list", "atomic_notifier_head"}, // drivers/tty/vt/keyboard.c
	{"vt_notifier_list", "atomic_notifier_head"},
	{"module_notify_list", "blocking_notifier_head"}, // kernel/module/main.c
	{"die_chain", "atomic_notifier_head"},            // kernel/notifier.c
	{"panic_notifier_list", "atomic_notifier_head"},
	{"reboot_notifier_list", "blocking_notifier_head"},
	{"restart_handler_list", "atomic_notifier_head"},
	{"oom_notify_list", "blocking_notifier_head"},
	{"pm_chain_head", "blocking_notifier_head"},
	{"netdev_chain", "raw_notifier_head"}, // net/core/dev.c
	{"netlink_chain", "blocking_notifier_head"},
	{"netevent_notif_chain", "atomic_notifier_head"},
	{"inetaddr_chain", "blocking_notifier_head"},
	{"inet6addr_chain", "atomic_notifier_head"},
	{"usb_notifier_list", "blocking_notifier_head"},
}

const (
	maxNotifiers    = 256     // in a chain
	maxFilters      = 1024    // at a place: MAX_HOOK_COUNT, net/netfilter/core.c
	maxCallers      = 256     // of a tracepoint
	maxInput        = 256     // handlers and devices of input
	maxInputHandles = 1024    // of all devices together
	maxDisciplines  = 64      // of terminals
	maxTracepointed = 4 << 20 // bytes that all tracepoints lie in
)

// disciplineCalls and inputCalls are the functions of struct tty_ldisc_ops (include/linux/tty_ldisc.h) and struct input_handler (include/linux/input.h),
// of which a kernel has most.
var (
	disciplineCalls = []string{"open", "close", "flush_buffer", "read", "write", "ioctl", "set_termios", "poll", "hangup", "receive_buf", "write_wakeup",
		"dcd_change", "receive_buf2", "lookahead_buf"}
	inputCalls = []string{"event", "events", "filter", "match", "connect", "disconnect", "start"}
)

// callbackPlan is where they are. A part that a kernel was built without has no address.
type callbackPlan struct {
	notifiers struct {
		err   error
		block *shape
		heads []VirtAddr
		names []string
	}
	filters struct {
		err                          error
		nets                         VirtAddr
		list                         uint64
		rows                         []filterRow
		devices                      uint64 // in struct net
		device                       *shape // with those of filterEnds that there are; nil if none is
		count, first, size, function uint64
	}
	points pointPlan

	disciplines struct {
		err   error
		table VirtAddr
		n     int
		ops   *shape
		calls []string
	}
	input struct {
		err     error
		head    VirtAddr
		handler *shape
		calls   []string
		devices VirtAddr
		device  *shape
		handle  *shape // of a device and a handler that hears it
		events  bool   // a handle has a function of its own: since v6.11
	}
}

// pointPlan is where tracepoints are, and what is in them.
type pointPlan struct {
	err               error
	start, stop       VirtAddr // of the kernel image's table; 0 without tracepoints
	size, funcs, name uint64   // of a tracepoint
	userSize          uint64   // of tracepoint_func
	user              *shape

	mu     sync.Mutex
	places map[pointTable][]VirtAddr // in ascending order
	buf    []byte
}

// filterRow is an array of struct nf_hook_entries * in struct net.
type filterRow struct {
	family string
	off    uint64
	n      int
}

// filterEnds are the members of struct net_device that lead to the packet filters of a single interface, since v4.2 and v5.16.
var filterEnds = []struct{ member, place string }{{"nf_hooks_ingress", "ingress"}, {"nf_hooks_egress", "egress"}}

var filterPlaces = []string{"PRE_ROUTING", "LOCAL_IN", "FORWARD", "LOCAL_OUT", "POST_ROUTING"} // enum nf_inet_hooks

func (img *Image) planCallbacks() *callbackPlan {
	p := new(callbackPlan)
	r := resolver{img: img}
	n := &p.notifiers
	n.block = r.shape("notifier_block", "notifier_call", "next")
	for _, c := range notifierChains {
		if at, err := img.syms.symbol(c.symbol); err == nil {
			n.heads, n.names = append(n.heads, at+VirtAddr(r.field(c.typ, 8, "head"))), append(n.names, c.symbol)
		}
	}
	n.err = r.err

	r = resolver{img: img}
	f := &p.filters
	for _, row := range []string{"hooks_ipv4", "hooks_ipv6", "hooks_arp", "hooks_bridge"} {
		if m, err := img.types.field("net", "nf."+row); err == nil && m.Size >= 8 && m.Size <= 16*8 {
			f.rows = append(f.rows, filterRow{strings.TrimPrefix(row, "hooks_"), m.Offset, int(m.Size / 8)})
		}
	}
	if len(f.rows) > 0 {
		f.nets, f.list = r.symbol("net_namespace_list"), r.field("net", 0, "list")
		f.count, f.first = r.field("nf_hook_entries", 2, "num_hook_entries"), r.field("nf_hook_entries", 0, "hooks")
		f.size, f.function = r.size("nf_hook_entry"), r.field("nf_hook_entry", 8, "hook")
		ends := slices.DeleteFunc([]string{filterEnds[0].member, filterEnds[1].member}, func(m string) bool {
			_, err := img.types.field("net_device", m)
			return err != nil
		})
		if len(ends) > 0 {
			f.devices, f.device = r.field("net", 16, "dev_base_head"), r.shape("net_device", append(ends, "dev_list[]", "name[]")...)
		}
		if r.err == nil && f.function+8 > f.size {
			r.fail(&CorruptError{"BTF", 0, fmt.Sprintf("nf_hook_entry of %d bytes has its function at %d", f.size, f.function)})
		}
	}
	f.err = r.err

	r = resolver{img: img}
	t := &p.points
	if at, err := img.syms.symbol("__start___tracepoints_ptrs"); err == nil {
		t.start, t.stop = at, r.symbol("__stop___tracepoints_ptrs")
		t.size, t.funcs, t.name = r.size("tracepoint"), r.field("tracepoint", 8, "funcs"), r.field("tracepoint", 8, "name")
		t.user, t.userSize = r.shape("tracepoint_func", "func"), r.size("tracepoint_func")
	}
	t.err = r.err

	r = resolver{img: img}
	d := &p.disciplines
	if at, err := img.syms.symbol("tty_ldiscs"); err == nil {
		d.table, d.n = at, min(int(img.syms.sizeAt(at)/8), maxDisciplines)
		d.ops, d.calls = r.callers("tty_ldisc_ops", disciplineCalls, "name")
	}
	d.err = r.err

	r = resolver{img: img}
	i := &p.input
	if at, err := img.syms.symbol("input_handler_list"); err == nil {
		i.head = at
		i.handler, i.calls = r.callers("input_handler", inputCalls, "name", "node[]")
	}
	if at, err := img.syms.symbol("input_dev_list"); err == nil && i.head != 0 {
		i.devices, i.device = at, r.shape("input_dev", "h_list[]", "node[]")
		fields := []string{"handler", "d_node[]"}
		if m, err := img.types.field("input_handle", "handle_events"); err == nil && m.Size == 8 {
			i.events, fields = true, append(fields, "handle_events")
		}
		i.handle = r.shape("input_handle", fields...)
	}
	i.err = r.err
	return p
}

// callers returns the shape of a type with those of its functions that this kernel has, and with other fields.
func (r *resolver) callers(typ string, calls []string, others ...string) (*shape, []string) {
	calls = slices.DeleteFunc(slices.Clone(calls), func(name string) bool {
		f, err := r.img.types.field(typ, name)
		return err != nil || f.Size != 8
	})
	if len(calls) == 0 {
		r.fail(fmt.Errorf("%s has no functions: %w", typ, ErrNotSupported))
	}
	return r.shape(typ, slices.Concat(calls, others)...), calls
}

// callbacks looks for those that lead into code that the kernel does not admit to.
func (v *View) callbacks(p *signsPlan, s *Signs) error {
	if _, _, err := v.feature("net_namespace_list"); err != nil {
		return err // whose variables are not listed has none of these
	}
	var found []hookedAt
	note := p.hooks.stranger(&found)
	var errs []error
	for _, part := range []struct {
		name string
		look func(*callbackPlan, noteHook) error
	}{
		{"notifiers", v.notifiers}, {"packet filters", v.packetFilters}, {"users of tracepoints", v.tracepointHooks},
		{"line disciplines", v.lineDisciplines}, {"input handlers", v.inputHandlers},
	} {
		if err := part.look(p.callbacks, note); err != nil {
			if !tolerable(err) {
				return fmt.Errorf("%s: %w", part.name, err)
			}
			errs = append(errs, fmt.Errorf("%s: %w", part.name, err))
		}
	}
	return errors.Join(append(errs, v.strangers(s, found))...)
}

func (v *View) notifiers(p *callbackPlan, note noteHook) error {
	n := &p.notifiers
	if n.err != nil {
		return n.err
	}
	for i, head := range n.heads {
		at, err := v.pointer(n.names[i], head)
		if err != nil {
			return err
		}
		for left := maxNotifiers; at != 0; left-- {
			t, err := v.thing(n.block, at)
			if err != nil {
				return err
			}
			if left == 0 {
				return t.corrupt("more than %d in %s", maxNotifiers, n.names[i])
			}
			note(Hook{Kind: "notifier", Record: at, Place: n.names[i], Member: "notifier_block.notifier_call", At: t.at("notifier_call"), To: t.ptr("notifier_call")}, 0)
			at = t.ptr("next")
		}
	}
	return nil
}

// packetFilters looks at what is registered with netfilter (struct netns_nf, include/net/netns/netfilter.h), in each network namespace and for each of its
// interfaces.
func (v *View) packetFilters(p *callbackPlan, note noteHook) error {
	f := &p.filters
	if f.err != nil || f.nets == 0 {
		return f.err
	}
	return v.list("net", f.nets, f.list, maxNetns, func(net VirtAddr) error {
		for _, row := range f.rows {
			places, err := v.pointers("netns_nf", net+VirtAddr(row.off), row.n)
			if err != nil {
				return err
			}
			for i, at := range places {
				if at == 0 {
					continue
				}
				place := fmt.Sprintf("%s %d", row.family, i)
				if strings.HasPrefix(row.family, "ipv") && i < len(filterPlaces) {
					place = row.family + " " + filterPlaces[i]
				}
				if err := v.filtersAt(f.count, f.first, f.size, f.function, at, place, note); err != nil {
					return err
				}
			}
		}
		if f.device == nil {
			return nil
		}
		return v.list("net_device", net+VirtAddr(f.devices), f.device.offset("dev_list"), maxInterfaces, func(dev VirtAddr) error {
			t, err := v.thing(f.device, dev)
			if err != nil {
				return err
			}
			for _, end := range filterEnds {
				if _, ok := f.device.fields[end.member]; !ok || t.ptr(end.member) == 0 {
					continue
				}
				if err := v.filtersAt(f.count, f.first, f.size, f.function, t.ptr(end.member), end.place+" of "+t.text("name"), note); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// filtersAt reads struct nf_hook_entries (include/linux/netfilter.h).
func (v *View) filtersAt(count, first, size, function uint64, at VirtAddr, place string, note noteHook) error {
	if !v.img.space.valid(at, 1) {
		return &CorruptError{"nf_hook_entries", at, "not an address of the kernel"}
	}
	var b [2]byte
	if err := v.img.space.object(v, "nf_hook_entries", at+VirtAddr(count), b[:]); err != nil {
		return err
	}
	n := uint64(le16(b[:]))
	if n > maxFilters {
		return &CorruptError{"nf_hook_entries", at, fmt.Sprintf("%d packet filters at %s", n, place)}
	}
	all := make([]byte, n*size)
	if err := v.img.space.object(v, "nf_hook_entries", at+VirtAddr(first), all); err != nil {
		return err
	}
	for i := range n {
		entry := at + VirtAddr(first+i*size)
		note(Hook{Kind: "packet filter", Record: entry, Place: place, Member: "nf_hook_entry.hook", At: entry + VirtAddr(function), To: VirtAddr(le64(all[i*size+function:]))}, 0)
	}
	return nil
}

// pointTable is where the addresses of tracepoints are, 4 bytes each (CONFIG_HAVE_ARCH_PREL32_RELOCATIONS): those of the kernel image in the section
// __tracepoints_ptrs, those of a module in module.tracepoints_ptrs (include/linux/module.h).
type pointTable struct {
	module string // empty: the kernel image
	at     VirtAddr
	n      uint64
}

// kernelPoints is the kernel image's.
func kernelPoints(start, stop VirtAddr) (pointTable, error) {
	if stop < start || stop-start > 4*maxTracepoints || (stop-start)%4 != 0 {
		return pointTable{}, &CorruptError{"__start___tracepoints_ptrs", start, fmt.Sprintf("ends at %v", stop)}
	}
	return pointTable{"", start, uint64(stop-start) / 4}, nil
}

// tracepointHooks looks at who is called at tracepoints (struct tracepoint, include/linux/tracepoint-defs.h), the kernel's and those of modules that are live.
// They lie side by side, and are read in one go.
func (v *View) tracepointHooks(p *callbackPlan, note noteHook) error {
	t := &p.points
	if t.err != nil || t.start == 0 {
		return t.err
	}
	image, err := kernelPoints(t.start, t.stop)
	if err != nil {
		return err
	}
	modules, err := v.modulesBriefly()
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.places == nil {
		t.places = make(map[pointTable][]VirtAddr)
	}
	there := map[pointTable]bool{image: true}
	for i := range modules {
		there[modules[i].points] = true
	}
	maps.DeleteFunc(t.places, func(table pointTable, _ []VirtAddr) bool { return !there[table] })
	if err := v.pointHooks(t, image, nil, note); err != nil {
		return err
	}
	var errs []error
	for i := range modules {
		m := &modules[i]
		if m.points.n == 0 {
			continue
		}
		// A module may leave in the midst of it.
		if err := v.pointHooks(t, m.points, m, note); err != nil {
			if !tolerable(err) {
				return err
			}
			errs = append(errs, fmt.Errorf("of module %s: %w", m.Name, err))
		}
	}
	return errors.Join(errs...)
}

// pointHooks looks at the tracepoints of a table: of a module, or of the kernel image if it is nil.
func (v *View) pointHooks(t *pointPlan, table pointTable, m *Module, note noteHook) error {
	places, ok := t.places[table]
	if !ok {
		var err error
		if places, err = v.tracepoints(table, m, t.size); err != nil {
			return err
		}
		slices.Sort(places)
		t.places[table] = places
	}
	if len(places) == 0 {
		return nil
	}
	from, last := places[0], places[len(places)-1]
	if last-from > maxTracepointed {
		return fmt.Errorf("tracepoints lie %d bytes apart: %w", last-from, ErrNotSupported)
	}
	n := uint64(last-from) + t.funcs + 8
	t.buf = slices.Grow(t.buf[:0], int(n))[:n]
	if err := v.img.space.read(fresh{v}, from, t.buf); err != nil {
		return err
	}
	for _, at := range places {
		funcs := VirtAddr(le64(t.buf[uint64(at-from)+t.funcs:]))
		if funcs == 0 {
			continue
		}
		name := ""
		for left := maxCallers; ; left-- {
			x, err := v.thing(t.user, funcs)
			if err != nil {
				return err
			}
			to := x.ptr("func")
			if to == 0 {
				break
			}
			if left == 0 {
				return x.corrupt("more than %d users of a tracepoint", maxCallers)
			}
			if name == "" {
				ptr, err := v.pointer("tracepoint", at+VirtAddr(t.name))
				if err != nil {
					return err
				}
				if name, err = v.cstring("tracepoint", ptr, 128); err != nil {
					return err
				}
			}
			note(Hook{Kind: "tracepoint", Record: funcs, Place: name, Member: "tracepoint_func.func", At: x.at("func"), To: to, Of: at}, 0)
			funcs += VirtAddr(t.userSize)
		}
	}
	return nil
}

// tracepoints returns where the tracepoints of a table are, each of size bytes; those of a module must lie in its memory.
func (v *View) tracepoints(table pointTable, m *Module, size uint64) ([]VirtAddr, error) {
	if table.n > maxTracepoints || m != nil && !m.holds(table.at, 4*table.n) {
		return nil, &CorruptError{"tracepoints_ptrs", table.at, fmt.Sprintf("has %d tracepoints", table.n)}
	}
	b := make([]byte, 4*table.n)
	if err := v.img.space.object(v, "tracepoints_ptrs", table.at, b); err != nil {
		return nil, err
	}
	places := make([]VirtAddr, table.n)
	for i := range places {
		at := table.at + VirtAddr(4*i)
		places[i] = at + VirtAddr(int64(int32(le32(b[4*i:]))))
		if m != nil && !m.holds(places[i], size) {
			return nil, &CorruptError{"tracepoints_ptrs", at, fmt.Sprintf("leads to %v", places[i])}
		}
	}
	return places, nil
}

func (v *View) lineDisciplines(p *callbackPlan, note noteHook) error {
	d := &p.disciplines
	if d.err != nil || d.table == 0 {
		return d.err
	}
	all, err := v.pointers("tty_ldiscs", d.table, d.n)
	if err != nil {
		return err
	}
	for _, at := range all {
		if at == 0 {
			continue
		}
		t, err := v.thing(d.ops, at)
		if err != nil {
			return err
		}
		if _, err := v.calls(&t, "line discipline", "tty_ldisc_ops", d.calls, note); err != nil {
			return err
		}
	}
	return nil
}

// inputHandlers looks at those in the kernel's list, and at whom each device calls: who has taken himself off that list hears all the same.
func (v *View) inputHandlers(p *callbackPlan, note noteHook) error {
	i := &p.input
	if i.err != nil || i.head == 0 {
		return i.err
	}
	names := make(map[VirtAddr]string)
	handler := func(at VirtAddr) error {
		t, err := v.thing(i.handler, at)
		if err == nil {
			names[at], err = v.calls(&t, "input handler", "input_handler", i.calls, note)
		}
		return err
	}
	if err := v.list("input_handler", i.head, i.handler.offset("node"), maxInput, handler); err != nil || i.devices == 0 {
		return err
	}
	left := maxInputHandles
	return v.list("input_dev", i.devices, i.device.offset("node"), maxInput, func(at VirtAddr) error {
		d, err := v.thing(i.device, at)
		if err != nil {
			return err
		}
		return v.list("input_handle", d.at("h_list"), i.handle.offset("d_node"), maxInput, func(at VirtAddr) error {
			h, err := v.thing(i.handle, at)
			if err != nil {
				return err
			}
			if left--; left < 0 {
				return h.corrupt("more than %d of all devices", maxInputHandles)
			}
			of := h.ptr("handler")
			if _, known := names[of]; !known {
				if err := handler(of); err != nil {
					return err
				}
			}
			if i.events {
				note(Hook{Kind: "input handler", Record: of, Place: names[of], Member: "input_handle.handle_events", At: h.at("handle_events"), To: h.ptr("handle_events")}, 0)
			}
			return nil
		})
	})
}

// calls notes the functions of an object that has a name, and returns that.
func (v *View) calls(t *thing, kind, typ string, calls []string, note noteHook) (name string, err error) {
	name, err = v.cstring(typ, t.ptr("name"), 128)
	if err != nil {
		return "", err
	}
	for _, c := range calls {
		note(Hook{Kind: kind, Record: t.addr(), Place: name, Member: typ + "." + c, At: t.at(c), To: t.ptr(c)}, 0)
	}
	return name, nil
}
