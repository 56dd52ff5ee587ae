//go:build ignore

// The gateway between a host and the wire, run in XDP on both of its interfaces; gateway.go describes it.
//
// Regenerate the object after a change: go generate ./nicfw/datapath (clang and libbpf-dev).

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char _license[] SEC("license") = "Dual BSD/GPL";

enum port { HOST, UPLINK, PORTS };

// What becomes of a frame. Verdict in gateway.go has the same order.
enum verdict {
	FORWARDED,   // to the other interface
	PASSED,      // to the agent's network stack
	MALFORMED,   // shorter than its headers say
	UNPARSED,    // a protocol that this program cannot read far enough to judge
	GUARDED,     // from the host to the agent, or in the agent's name
	CLOSED,      // from the wire to the agent, for a service that it does not offer
	QUARANTINED, // kept back by the quarantine
	BLOCKED,     // kept back by a rule for its flow
	LIMITED,     // above the rate
	VERDICTS,
};

#define ETH_IP4 0x0800
#define ETH_ARP 0x0806
#define ETH_IP6 0x86dd
#define ETH_VLAN 0x8100
#define ETH_QINQ 0x88a8

#define ICMP 1
#define TCP 6
#define UDP 17
#define ICMP6 58

#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

// IPv4 addresses are written as IPv6 ones, ::ffff:a.b.c.d. Addresses and ports are in network order.
struct addr {
	__u32 w[4];
};

struct counter {
	__u64 packets, bytes;
};

struct flow_key {
	struct addr host, remote;
	__u16 host_port, remote_port;
	__u8 proto, pad[3];
};

struct flow {
	struct counter out, in; // what the host sent and what it was sent, forwarded or not
	__u64 held;             // packets of these that were not forwarded
	__u64 first, last;      // CLOCK_BOOTTIME in ns
	__u32 syn, rst;         // segments of TCP that the host sent: SYN without ACK, RST
};

struct settings {
	__u8 mac[6]; // the agent's, on the uplink
	__u8 pad[2];
};

struct containment {
	__u64 quarantine_until; // CLOCK_BOOTTIME in ns; 0 means no quarantine
	__u64 limit_until;
	__u64 ns_per_kib; // of what the host sends
	__u64 burst_ns;
};

struct service_key {
	__u16 port;
	__u8 proto, pad;
};

struct rule_key {
	struct addr remote;
	__u16 port; // 0 means all
	__u8 proto; // 0 means all
	__u8 pad;
};

struct allow_key {
	__u32 bits;
	struct addr remote;
};

// What is seen of the host, whatever becomes of it.
struct seen {
	__u64 last; // CLOCK_BOOTTIME in ns of its last frame
	__u64 syn, arp, rst;
	__u64 asked;    // packets to it in conversations in which it has had its say
	__u64 opened;   // conversations that it began, and was let begin
	__u64 answered; // of these, in which another has said something since
	__u64 refused;  // of the answered, those whose first answer is a RST
};

struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, PORTS);
	__type(key, __u32);
	__type(value, __u32);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} agent SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, struct addr);
	__type(value, __u8);
} own SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32);
	__type(key, struct service_key);
	__type(value, __u8);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct containment);
} contain SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} bucket SEC(".maps"); // theoretical arrival time of the next byte (GCRA), CLOCK_BOOTTIME in ns

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct allow_key);
	__type(value, __u8);
} allow SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct rule_key);
	__type(value, __u64); // CLOCK_BOOTTIME in ns at which it ends
} rules SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PORTS * VERDICTS);
	__type(key, __u32);
	__type(value, struct counter);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct seen);
} watch SEC(".maps");

// What was read of a frame.
struct frame {
	struct addr src, dst;
	__u16 type;         // of what is in it: ETH_IP4, ETH_IP6, ETH_ARP
	__u16 sport, dport; // 0 where there are none, or in a fragment
	__u8 proto;
	__u8 flags;     // of TCP
	__u8 icmp;      // type of ICMP or ICMPv6
	bool tagged;    // with a VLAN
	bool fragment;  // any of a datagram's
	bool neighbour; // a neighbour solicitation or advertisement, whose target is:
	struct addr target;
};

static __always_inline void v4(struct addr *a, const void *p)
{
	a->w[0] = a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	__builtin_memcpy(&a->w[3], p, 4);
}

static __always_inline bool mapped(const struct addr *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline __u16 be16(const __u8 *p) { return (__u16)p[0] << 8 | p[1]; }

// read_ports reads the ports, flags or type behind an IP header.
static __always_inline enum verdict read_ports(struct frame *f, __u8 *l4, void *end)
{
	if (f->fragment)
		return FORWARDED;
	switch (f->proto) {
	case TCP:
		if ((void *)(l4 + 14) > end)
			return MALFORMED;
		f->flags = l4[13];
		break;
	case UDP:
		if ((void *)(l4 + 8) > end)
			return MALFORMED;
		break;
	case ICMP:
		if ((void *)(l4 + 1) > end)
			return MALFORMED;
		f->icmp = l4[0];
		return FORWARDED;
	case ICMP6:
		if ((void *)(l4 + 1) > end)
			return MALFORMED;
		f->icmp = l4[0];
		if (f->icmp == 135 || f->icmp == 136) {
			if ((void *)(l4 + 24) > end)
				return MALFORMED;
			f->neighbour = true;
			__builtin_memcpy(&f->target, l4 + 8, 16);
		}
		return FORWARDED;
	default:
		return FORWARDED;
	}
	__builtin_memcpy(&f->sport, l4, 2);
	__builtin_memcpy(&f->dport, l4 + 2, 2);
	return FORWARDED;
}

// parse reads a frame as far as it takes to judge it. It answers FORWARDED when it could.
static __always_inline enum verdict parse(struct frame *f, void *data, void *end)
{
	__u8 *p = data;
	if ((void *)(p + 14) > end)
		return MALFORMED;
	f->type = be16(p + 12);
	p += 14;
#pragma unroll
	for (int i = 0; i < 2; i++) {
		if (f->type != ETH_VLAN && f->type != ETH_QINQ)
			break;
		if ((void *)(p + 4) > end)
			return MALFORMED;
		f->tagged = true;
		f->type = be16(p + 2);
		p += 4;
	}
	switch (f->type) {
	case ETH_ARP:
		if ((void *)(p + 28) > end)
			return MALFORMED;
		// Ethernet and IPv4 (RFC 826)
		if (be16(p) != 1 || be16(p + 2) != ETH_IP4 || p[4] != 6 || p[5] != 4)
			return UNPARSED;
		v4(&f->src, p + 14);
		v4(&f->dst, p + 24);
		return FORWARDED;
	case ETH_IP4: {
		if ((void *)(p + 20) > end)
			return MALFORMED;
		__u32 len = (p[0] & 0xf) * 4;
		if (p[0] >> 4 != 4 || len < 20)
			return MALFORMED;
		f->proto = p[9];
		f->fragment = be16(p + 6) & 0x3fff; // MF, or an offset
		v4(&f->src, p + 12);
		v4(&f->dst, p + 16);
		return read_ports(f, p + len, end);
	}
	case ETH_IP6: {
		if ((void *)(p + 40) > end)
			return MALFORMED;
		if (p[0] >> 4 != 6)
			return MALFORMED;
		__builtin_memcpy(&f->src, p + 8, 16);
		__builtin_memcpy(&f->dst, p + 24, 16);
		if (mapped(&f->src) || mapped(&f->dst))
			return MALFORMED; // not on a wire (RFC 4038 4.2), and here they would pass for IPv4
		f->proto = p[6];
		p += 40;
		// Extension headers (RFC 8200): hop-by-hop, routing and destination options, and one fragment header at the end.
#pragma unroll
		for (int i = 0; i < 4; i++) {
			if (f->proto == 44) {
				if ((void *)(p + 8) > end)
					return MALFORMED;
				f->fragment = true;
				f->proto = p[0];
				return FORWARDED;
			}
			if (f->proto != 0 && f->proto != 43 && f->proto != 60)
				break;
			if ((void *)(p + 8) > end)
				return MALFORMED;
			__u32 len = (p[1] + 1) * 8;
			f->proto = p[0];
			p += len;
		}
		if (f->proto == 0 || f->proto == 43 || f->proto == 60 || f->proto == 44)
			return UNPARSED; // too many of them
		return read_ports(f, p, end);
	}
	}
	return UNPARSED;
}

static __always_inline bool is_own(const struct addr *a) { return bpf_map_lookup_elem(&own, a) != NULL; }

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5];
}

// blocked tells whether a rule keeps back what goes between the host and a remote.
static __always_inline bool blocked(const struct addr *remote, __u16 port, __u8 proto, __u64 now)
{
	struct rule_key k = { .remote = *remote, .port = port, .proto = proto };
	__u64 *until = bpf_map_lookup_elem(&rules, &k);
	if (until && now < *until)
		return true;
	k.port = 0;
	until = bpf_map_lookup_elem(&rules, &k);
	if (until && now < *until)
		return true;
	k.proto = 0;
	until = bpf_map_lookup_elem(&rules, &k);
	return until && now < *until;
}

// limited takes the bytes from the bucket, and tells whether they were too many.
static __always_inline bool limited(const struct containment *c, __u64 bytes, __u64 now)
{
	__u32 zero = 0;
	__u64 *tat = bpf_map_lookup_elem(&bucket, &zero);
	if (!tat)
		return true;
#pragma unroll
	for (int i = 0; i < 4; i++) { // other processors take from it, too
		__u64 old = *(volatile __u64 *)tat;
		__u64 from = old > now ? old : now;
		if (from - now > c->burst_ns)
			return true;
		if (__sync_val_compare_and_swap(tat, old, from + (bytes * c->ns_per_kib >> 10)) == old)
			return false;
	}
	return true;
}

// judge decides on what the host sends or is sent, and keeps its flow's record.
static __always_inline enum verdict judge(const struct frame *f, enum port from, __u64 bytes, __u64 now)
{
	__u32 zero = 0;
	const struct addr *host = from == HOST ? &f->src : &f->dst, *remote = from == HOST ? &f->dst : &f->src;
	__u16 host_port = from == HOST ? f->sport : f->dport, remote_port = from == HOST ? f->dport : f->sport;
	enum verdict v = FORWARDED;

	struct containment *c = bpf_map_lookup_elem(&contain, &zero);
	if (!c)
		return QUARANTINED;
	bool neighbours = f->type == ETH_ARP || f->neighbour; // who are allowed could not be reached without
	if (!neighbours && now < c->quarantine_until) {
		struct allow_key k = { .bits = 128, .remote = *remote };
		__u8 *allowed = bpf_map_lookup_elem(&allow, &k);
		if (!allowed || !*allowed)
			v = QUARANTINED;
	}
	if (v == FORWARDED && !neighbours && blocked(remote, remote_port, f->proto, now))
		v = BLOCKED;
	if (v == FORWARDED && from == HOST && now < c->limit_until && limited(c, bytes, now))
		v = LIMITED;
	if (f->type == ETH_ARP)
		return v;

	struct flow_key k = {
		.host = *host, .remote = *remote, .host_port = host_port, .remote_port = remote_port, .proto = f->proto,
	};
	struct seen *s = bpf_map_lookup_elem(&watch, &zero);
	struct flow *fl = bpf_map_lookup_elem(&flows, &k);
	if (!s)
		return QUARANTINED;
	if (!fl) {
		struct flow fresh = { .first = now };
		bpf_map_update_elem(&flows, &k, &fresh, BPF_NOEXIST);
		fl = bpf_map_lookup_elem(&flows, &k);
		if (!fl)
			return v;
		if (from == HOST && v == FORWARDED)
			__sync_fetch_and_add(&s->opened, 1);
	}
	if (from == UPLINK && fl->out.packets > 0) {
		__sync_fetch_and_add(&s->asked, 1);
		if (fl->in.packets == 0) {
			__sync_fetch_and_add(&s->answered, 1);
			if (f->proto == TCP && f->flags & TCP_RST)
				__sync_fetch_and_add(&s->refused, 1);
		}
	}
	struct counter *n = from == HOST ? &fl->out : &fl->in;
	__sync_fetch_and_add(&n->packets, 1);
	__sync_fetch_and_add(&n->bytes, bytes);
	if (v != FORWARDED)
		__sync_fetch_and_add(&fl->held, 1);
	fl->last = now;
	if (from == HOST && f->proto == TCP) {
		if ((f->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
			__sync_fetch_and_add(&fl->syn, 1);
		if (f->flags & TCP_RST)
			__sync_fetch_and_add(&fl->rst, 1);
	}
	return v;
}

static __always_inline void look(const struct frame *f, __u64 now)
{
	__u32 zero = 0;
	struct seen *s = bpf_map_lookup_elem(&watch, &zero);
	if (!s)
		return;
	s->last = now;
	if (f->type == ETH_ARP)
		__sync_fetch_and_add(&s->arp, 1);
	if (f->proto == TCP && (f->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		__sync_fetch_and_add(&s->syn, 1);
	if (f->proto == TCP && f->flags & TCP_RST)
		__sync_fetch_and_add(&s->rst, 1);
}

// for_agent decides on a frame from the wire that is for the agent.
static __always_inline enum verdict for_agent(const struct frame *f)
{
	if (f->tagged || f->fragment)
		return CLOSED; // it is on the untagged network, and needs no fragments
	if (f->type == ETH_ARP || f->neighbour)
		return PASSED;
	if (f->proto == ICMP && (f->icmp == 3 || f->icmp == 8)) // unreachable (path MTU), echo
		return PASSED;
	if (f->proto == ICMP6 && (f->icmp == 1 || f->icmp == 2 || f->icmp == 128)) // unreachable, too big, echo
		return PASSED;
	struct service_key k = { .port = f->dport, .proto = f->proto };
	return bpf_map_lookup_elem(&services, &k) ? PASSED : CLOSED;
}

static __always_inline int handle(struct xdp_md *ctx, enum port from)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u64 bytes = ctx->data_end - ctx->data, now = bpf_ktime_get_boot_ns();
	__u32 zero = 0;
	struct frame f = {};
	enum verdict v = parse(&f, data, end);
	struct settings *set = bpf_map_lookup_elem(&agent, &zero);

	if (from == HOST)
		look(&f, now);
	if (!set) {
		v = UNPARSED;
	} else if (v == FORWARDED) {
		__u8 *eth = data;
		if ((void *)(eth + 14) > end) {
			v = MALFORMED;
		} else if (from == HOST) {
			if (same_mac(eth, set->mac) || same_mac(eth + 6, set->mac) || is_own(&f.src) || is_own(&f.dst) ||
			    (f.neighbour && is_own(&f.target)))
				v = GUARDED;
			else
				v = judge(&f, from, bytes, now);
		} else {
			if (is_own(&f.src))
				v = GUARDED; // the agent's own address comes from nobody else
			else if (is_own(&f.dst) || (f.neighbour && is_own(&f.target)))
				v = for_agent(&f);
			else if (same_mac(eth, set->mac))
				v = CLOSED;
			else
				v = judge(&f, from, bytes, now);
		}
	}

	__u32 index = from * VERDICTS + v;
	struct counter *c = bpf_map_lookup_elem(&counters, &index);
	if (c) {
		c->packets++;
		c->bytes += bytes;
	}
	if (v == PASSED)
		return XDP_PASS;
	if (v == FORWARDED)
		return bpf_redirect_map(&ports, from == HOST ? UPLINK : HOST, XDP_DROP);
	return XDP_DROP;
}

SEC("xdp") int from_host(struct xdp_md *ctx) { return handle(ctx, HOST); }
SEC("xdp") int from_wire(struct xdp_md *ctx) { return handle(ctx, UPLINK); }
