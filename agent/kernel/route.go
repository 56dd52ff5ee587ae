package kernel

import (
	"cmp"
	"encoding/binary"
	"iter"
	"net/netip"
	"slices"
)

// Route is a route, as ip-route(8) has it (struct fib_alias, net/ipv4/fib_lookup.h; of IPv6 see Routes6).
type Route struct {
	Netns    uint64       `json:"netns"`
	Table    uint32       `json:"table"`    // 254 main, 255 local
	Type     string       `json:"type"`     // unicast, local, broadcast, blackhole, …
	Dest     netip.Prefix `json:"dest"`     // 0.0.0.0/0 is the default
	Gateway  netip.Addr   `json:"gateway"`  // zero if there is none
	Device   string       `json:"device"`   // name of the interface
	Source   netip.Addr   `json:"source"`   // preferred
	Metric   uint32       `json:"metric"`   // fib_info.fib_priority
	Protocol uint8        `json:"protocol"` // RTPROT_…: 2 the kernel, 3 boot, 4 static
	Scope    uint8        `json:"scope"`    // RT_SCOPE_… of IPv4: 0 global, 253 link, 254 host
	Hops     int          `json:"hops"`     // next hops; the first is told
}

const (
	maxRoutes    = 1 << 20
	maxTrieDepth = 64
)

// routeTypes are RTN_… of include/uapi/linux/rtnetlink.h.
var routeTypes = [...]string{"unspec", "unicast", "local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit", "throw", "nat", "xresolve"}

type routeWalk struct {
	v                          *View
	vector, table, alias, info *shape
	hop, dev                   *shape
	tnode, leaf, hopAt, kv     uint64
	hopSize                    uint64
	netns                      uint64
	tableID                    uint32
	all                        []Route
}

// Routes lists the routes of IPv4 of all network namespaces: by table, then by destination.
func (v *View) Routes() iter.Seq2[Route, error] {
	return settled(v, "walk routes", func() ([]Route, error) {
		w := routeWalk{v: v}
		r := resolver{img: v.img}
		// fib_trie.c: a trie of key_vector, whose leaves have the aliases of all lengths that share their bits.
		w.vector = r.shape("key_vector", "key", "pos", "bits")
		w.tnode, w.leaf = r.field("key_vector", 0, "tnode"), r.field("key_vector", 0, "leaf")
		w.kv = r.field("trie", 0, "kv")
		w.table = r.shape("fib_table", "tb_hlist[]", "tb_id", "tb_data")
		w.alias = r.shape("fib_alias", "fa_list[]", "fa_info", "fa_type", "fa_slen", "tb_id")
		w.info = r.shape("fib_info", "fib_prefsrc", "fib_priority", "fib_protocol", "fib_scope", "fib_nhs", "nh?")
		w.hopAt, w.hopSize = r.field("fib_info", 0, "fib_nh"), r.size("fib_nh")
		w.hop = r.shape("fib_nh", "nh_common.nhc_dev", "nh_common.nhc_gw_family", "nh_common.nhc_gw.ipv4")
		w.dev = r.shape("net_device", "name[]")
		net := r.shape("net", "ipv4.fib_table_hash")
		if r.err != nil {
			return nil, r.err
		}
		err := v.eachNetns(func(at VirtAddr, inum uint64, init bool) error {
			t, err := v.thing(net, at)
			if err != nil {
				return err
			}
			w.netns = inum
			return w.tables(t.ptr("ipv4.fib_table_hash"))
		})
		slices.SortStableFunc(w.all, func(a, b Route) int {
			return cmp.Or(cmp.Compare(a.Netns, b.Netns), cmp.Compare(a.Table, b.Table), a.Dest.Addr().Compare(b.Dest.Addr()), cmp.Compare(a.Dest.Bits(), b.Dest.Bits()), cmp.Compare(a.Metric, b.Metric))
		})
		return w.all, err
	})
}

// tables walks the hash of tables: 256 buckets with policy routing, else 2 (FIB_TABLE_HASHSZ). What kmalloc set aside tells.
func (w *routeWalk) tables(at VirtAddr) error {
	if at == 0 {
		return nil
	}
	size, err := w.v.allocated(at)
	if err != nil {
		return err
	}
	heads, err := w.v.pointers("fib_table_hash", at, int(min(size, 4096)/8))
	if err != nil {
		return err
	}
	seen := make(map[VirtAddr]bool)
	for i, first := range heads {
		if i >= 2 && size/8 < 256 {
			break
		}
		err := w.v.hlist("fib_table", first, w.table.offset("tb_hlist"), maxRoutes, func(at VirtAddr) error {
			t, err := w.v.thing(w.table, at)
			if err != nil {
				return err
			}
			w.tableID = uint32(t.num("tb_id"))
			p := t.ptr("tb_data")
			if p == 0 || seen[p] { // main and local may share one
				return nil
			}
			seen[p] = true
			return w.trie(p+VirtAddr(w.kv), 0)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// trie walks a node of a trie. The root has 32 bits left and one child (IS_TRIE).
func (w *routeWalk) trie(at VirtAddr, depth int) error {
	if err := w.v.ctx.Err(); err != nil {
		return err
	}
	t, err := w.v.thing(w.vector, at)
	if err != nil {
		return err
	}
	pos, bits := t.num("pos"), t.num("bits")
	if depth > maxTrieDepth || pos > 32 || bits > 20 || pos+bits > 32 {
		return t.corrupt("%d bits at %d, %d deep", bits, pos, depth)
	}
	if bits == 0 && pos == 0 && depth > 0 {
		return w.leaves(&t)
	}
	children := 1
	if pos < 32 {
		children = 1 << bits
	}
	nodes, err := w.v.pointers("key_vector", at+VirtAddr(w.tnode), children)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if n == 0 {
			continue
		}
		if err := w.trie(n, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (w *routeWalk) leaves(t *thing) error {
	first, err := w.v.pointer("key_vector", t.addr()+VirtAddr(w.leaf))
	if err != nil {
		return err
	}
	return w.v.hlist("fib_alias", first, w.alias.offset("fa_list"), maxRoutes-len(w.all), func(at VirtAddr) error {
		a, err := w.v.thing(w.alias, at)
		if err != nil {
			return err
		}
		slen, typ := a.num("fa_slen"), a.num("fa_type")
		if slen > 32 || typ >= uint64(len(routeTypes)) {
			return a.corrupt("prefix of %d bits, type %d", 32-int(slen), typ)
		}
		info, err := w.v.thing(w.info, a.ptr("fa_info"))
		if err != nil {
			return err
		}
		var key [4]byte
		binary.BigEndian.PutUint32(key[:], uint32(t.num("key")))
		route := Route{Netns: w.netns, Table: uint32(a.num("tb_id")), Type: routeTypes[typ], Dest: netip.PrefixFrom(netip.AddrFrom4(key), 32-int(slen)),
			Metric: uint32(info.num("fib_priority")), Protocol: uint8(info.num("fib_protocol")), Scope: uint8(info.num("fib_scope")), Hops: info.int("fib_nhs")}
		if source := info.ipv4("fib_prefsrc"); !source.IsUnspecified() {
			route.Source = source
		}
		if route.Hops > 0 && info.ptr("nh") == 0 {
			h, err := w.v.thing(w.hop, info.addr()+VirtAddr(w.hopAt))
			if err != nil {
				return err
			}
			if h.num("nh_common.nhc_gw_family") == afInet {
				route.Gateway = h.ipv4("nh_common.nhc_gw.ipv4")
			}
			if p := h.ptr("nh_common.nhc_dev"); p != 0 {
				d, err := w.v.thing(w.dev, p)
				if err != nil {
					return err
				}
				route.Device = d.text("name")
			}
		}
		if len(w.all) == maxRoutes {
			return a.corrupt("more than %d routes", maxRoutes)
		}
		w.all = append(w.all, route)
		return nil
	})
}
