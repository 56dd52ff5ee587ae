package kernel

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
)

const (
	maxTrie6Depth = 130 // a node for each bit, the root, and one to spare
	rtnRTInfo     = 4   // RTN_RTINFO of include/net/ip6_fib.h: the node has routes of its own
)

type route6Walk struct {
	v                      *View
	table, node, info, hop *shape
	dev                    *shape
	hopAt                  uint64
	netns                  uint64
	null                   VirtAddr // net.ipv6.fib6_null_entry, which stands where there is none
	tableID                uint32
	all                    []Route
}

// Routes6 lists the routes of IPv6 of all network namespaces: by table, then by destination (struct fib6_info, include/net/ip6_fib.h).
// What the neighbours and redirects add for single addresses is not among them.
func (v *View) Routes6() iter.Seq2[Route, error] {
	return settled(v, "walk IPv6 routes", func() ([]Route, error) {
		w := route6Walk{v: v}
		r := resolver{img: v.img}
		w.table = r.shape("fib6_table", "tb6_hlist[]", "tb6_id", "tb6_root[]")
		w.node = r.shape("fib6_node", "left", "right", "leaf", "fn_flags")
		w.info = r.shape("fib6_info", "fib6_next", "fib6_dst.addr[]", "fib6_dst.plen", "fib6_prefsrc.addr[]", "fib6_metric", "fib6_protocol", "fib6_type", "fib6_nsiblings", "nh")
		w.hopAt = r.field("fib6_info", 0, "fib6_nh")
		w.hop = r.shape("fib6_nh", "nh_common.nhc_dev", "nh_common.nhc_gw_family", "nh_common.nhc_gw.ipv6[]")
		w.dev = r.shape("net_device", "name[]")
		net := r.shape("net", "ipv6.fib_table_hash", "ipv6.fib6_null_entry")
		if r.err != nil {
			return nil, r.err
		}
		err := v.eachNetns(func(at VirtAddr, inum uint64, init bool) error {
			t, err := v.thing(net, at)
			if err != nil {
				return err
			}
			w.netns, w.null = inum, t.ptr("ipv6.fib6_null_entry")
			return w.tables(t.ptr("ipv6.fib_table_hash"))
		})
		slices.SortStableFunc(w.all, func(a, b Route) int {
			return cmp.Or(cmp.Compare(a.Netns, b.Netns), cmp.Compare(a.Table, b.Table), a.Dest.Addr().Compare(b.Dest.Addr()), cmp.Compare(a.Dest.Bits(), b.Dest.Bits()), cmp.Compare(a.Metric, b.Metric))
		})
		return w.all, err
	})
}

// tables walks the hash of tables: 256 buckets with policy routing, else one (FIB6_TABLE_HASHSZ). What kmalloc set aside tells.
func (w *route6Walk) tables(at VirtAddr) error {
	if at == 0 {
		return nil // IPv6 is switched off
	}
	size, err := w.v.allocated(at)
	if err != nil {
		return err
	}
	buckets := 1
	if size >= 256*8 {
		buckets = 256
	}
	heads, err := w.v.pointers("fib6_table_hash", at, buckets)
	if err != nil {
		return err
	}
	for _, first := range heads {
		err := w.v.hlist("fib6_table", first, w.table.offset("tb6_hlist"), maxRoutes, func(at VirtAddr) error {
			t, err := w.v.thing(w.table, at)
			if err != nil {
				return err
			}
			w.tableID = uint32(t.num("tb6_id"))
			return w.trie(t.at("tb6_root"), 0)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *route6Walk) trie(at VirtAddr, depth int) error {
	if err := w.v.ctx.Err(); err != nil {
		return err
	}
	t, err := w.v.thing(w.node, at)
	if err != nil {
		return err
	}
	if depth > maxTrie6Depth {
		return t.corrupt("%d deep", depth)
	}
	if t.num("fn_flags")&rtnRTInfo != 0 {
		if err := w.leaves(t.ptr("leaf")); err != nil {
			return err
		}
	}
	for _, child := range []VirtAddr{t.ptr("left"), t.ptr("right")} {
		if child == 0 {
			continue
		}
		if err := w.trie(child, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// leaves walks the routes to one destination.
func (w *route6Walk) leaves(at VirtAddr) error {
	for at != 0 {
		x, err := w.v.thing(w.info, at)
		if err != nil {
			return err
		}
		if at == w.null {
			return nil
		}
		if len(w.all) == maxRoutes {
			return x.corrupt("more than %d routes", maxRoutes)
		}
		bits, typ := x.num("fib6_dst.plen"), x.num("fib6_type")
		if bits > 128 || typ >= uint64(len(routeTypes)) {
			return x.corrupt("prefix of %d bits, type %d", int32(bits), typ)
		}
		route := Route{Netns: w.netns, Table: w.tableID, Type: routeTypes[typ], Dest: netip.PrefixFrom(x.ipv6("fib6_dst.addr"), int(bits)),
			Metric: uint32(x.num("fib6_metric")), Protocol: uint8(x.num("fib6_protocol")), Hops: 1 + x.int("fib6_nsiblings")}
		if source := x.ipv6("fib6_prefsrc.addr"); !source.IsUnspecified() {
			route.Source = source
		}
		if x.ptr("nh") == 0 {
			h, err := w.v.thing(w.hop, at+VirtAddr(w.hopAt))
			if err != nil {
				return err
			}
			if h.num("nh_common.nhc_gw_family") == afInet6 {
				route.Gateway = h.ipv6("nh_common.nhc_gw.ipv6")
			}
			if p := h.ptr("nh_common.nhc_dev"); p != 0 {
				d, err := w.v.thing(w.dev, p)
				if err != nil {
					return err
				}
				route.Device = d.text("name")
			}
		}
		w.all = append(w.all, route)
		at = x.ptr("fib6_next")
	}
	return nil
}
