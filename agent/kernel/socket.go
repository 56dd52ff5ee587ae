package kernel

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"strings"
)

// Socket is a socket of the host (struct sock, include/net/sock.h), of any family.
type Socket struct {
	Addr     VirtAddr       `json:"addr"`
	Protocol string         `json:"protocol"` // tcp, tcp6, udp, udp6, unix, netlink, packet, …
	Type     string         `json:"type"`     // stream, dgram, raw, seqpacket, …; empty where the kernel forgot
	State    string         `json:"state"`    // as ss(8) has it: ESTAB, LISTEN, UNCONN, …
	Local    netip.AddrPort `json:"local,omitzero"`
	Remote   netip.AddrPort `json:"remote,omitzero"`
	Path     string         `json:"path,omitempty"` // of a unix socket; an abstract name begins with @
	Peer     VirtAddr       `json:"peer,omitempty"` // of a unix socket
	// RecvQ and SendQ are the bytes that wait to be read and to be acknowledged. Of a listening socket they are the
	// connections that wait to be accepted and how many may.
	RecvQ  uint64        `json:"recvQ"`
	SendQ  uint64        `json:"sendQ"`
	UID    uint32        `json:"uid"`
	Inode  uint64        `json:"inode"` // zero if no process has it open (any more, or yet)
	Netns  uint64        `json:"netns,omitempty"`
	Owners []SocketOwner `json:"owners,omitempty"`
}

// SocketOwner is a process that has a socket open.
type SocketOwner struct {
	PID  int    `json:"pid"`
	Comm string `json:"comm"`
	FD   string `json:"fd"`
}

// Families, protocols and states of sockets, include/linux/socket.h, include/uapi/linux/in.h, include/net/tcp_states.h.
const (
	afUnix  = 1
	afInet  = 2
	afInet6 = 10

	tcpEstablished = 1
	tcpTimeWait    = 6
	tcpClose       = 7
	tcpListen      = 10
	tcpNewSynRecv  = 12

	maxSockets = 1 << 20
	maxBuckets = 1 << 24
)

var (
	tcpStates = [...]string{"", "ESTAB", "SYN-SENT", "SYN-RECV", "FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT", "UNCONN", "CLOSE-WAIT",
		"LAST-ACK", "LISTEN", "CLOSING", "SYN-RECV", "BOUND"}
	socketTypes = [...]string{1: "stream", 2: "dgram", 3: "raw", 4: "rdm", 5: "seqpacket", 6: "dccp", 10: "packet"}
	families    = map[uint64]string{afUnix: "unix", afInet: "inet", afInet6: "inet6", 15: "key", 16: "netlink", 17: "packet", 29: "can",
		31: "bluetooth", 38: "alg", 40: "vsock", 44: "xdp"}
	inetProtocols = map[uint64]string{1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 58: "icmp6", 132: "sctp", 136: "udplite", 262: "mptcp"}
)

type socketWalk struct {
	v                                     *View
	common, sock, tcp, unix, address, net *shape
	hashinfo, udpTable                    *shape
	chain, nulls, slot                    uint64
	bucketSize, listenSize, slotSize      uint64
	nullsNode, node                       uint64 // in sock
	socketInode, socketIn                 uint64 // in socket_alloc
	inode                                 uint64 // inode.i_ino

	owners map[VirtAddr][]SocketOwner
	netns  map[VirtAddr]uint64
	seen   map[VirtAddr]bool
	all    []Socket
}

// Sockets lists the sockets of the host: TCP and UDP by the tables of the protocols, unix by its table, and every other that
// a process has open. TCP sockets without a process (in TIME-WAIT, or not accepted yet) are among them. Where processes
// could not be read, sockets are listed without their owners and the error comes last.
func (v *View) Sockets() iter.Seq2[Socket, error] {
	return settled(v, "walk sockets", func() ([]Socket, error) {
		w := socketWalk{v: v, owners: make(map[VirtAddr][]SocketOwner), netns: make(map[VirtAddr]uint64), seen: make(map[VirtAddr]bool)}
		if err := w.resolve(); err != nil {
			return nil, err
		}
		var ownersErr error
		var open []VirtAddr
		for f, err := range v.OpenFiles(0) {
			if err != nil {
				ownersErr = err
				break
			}
			if f.Sock != 0 {
				if w.owners[f.Sock] == nil {
					open = append(open, f.Sock)
				}
				w.owners[f.Sock] = append(w.owners[f.Sock], SocketOwner{f.PID, f.Comm, f.FD})
			}
		}
		if err := w.tables(); err != nil {
			return w.all, err
		}
		for _, at := range open {
			if err := w.see(at); err != nil {
				return w.all, err
			}
		}
		for i := 0; i < len(w.all); i++ { // peers of unix sockets may be known by nothing else
			if p := w.all[i].Peer; p != 0 {
				if err := w.see(p); err != nil {
					return w.all, err
				}
			}
		}
		return w.all, ownersErr
	})
}

func (w *socketWalk) resolve() error {
	r := resolver{img: w.v.img}
	w.common = r.shape("sock", "__sk_common.skc_family", "__sk_common.skc_state", "__sk_common.skc_daddr", "__sk_common.skc_rcv_saddr",
		"__sk_common.skc_dport", "__sk_common.skc_num", "__sk_common.skc_v6_daddr[]?", "__sk_common.skc_v6_rcv_saddr[]?", "__sk_common.skc_net.net?")
	w.sock = r.shape("sock", "sk_type", "sk_protocol", "sk_socket", "sk_uid.val", "sk_ack_backlog", "sk_max_ack_backlog",
		"sk_backlog.rmem_alloc.counter", "sk_wmem_alloc.refs.counter")
	w.tcp = r.shape("tcp_sock", "write_seq", "snd_una", "rcv_nxt", "copied_seq")
	w.nullsNode = r.field("sock", 0, "__sk_common.skc_nulls_node")
	w.node = r.field("sock", 0, "__sk_common.skc_node")
	w.hashinfo = r.shape("inet_hashinfo", "ehash", "ehash_mask", "lhash2", "lhash2_mask", "listening_hash[]?")
	w.chain = r.field("inet_ehash_bucket", 8, "chain")
	w.bucketSize = r.size("inet_ehash_bucket")
	w.nulls = r.field("inet_listen_hashbucket", 8, "nulls_head")
	w.listenSize = r.size("inet_listen_hashbucket")
	w.udpTable = r.shape("udp_table", "hash", "mask")
	w.slot = r.field("udp_hslot", 8, "head")
	w.slotSize = r.size("udp_hslot")
	w.net = r.shape("net", "ns.inum", "ipv4.tcp_death_row.hashinfo?", "ipv4.udp_table?")
	w.socketInode = r.field("socket_alloc", 0, "vfs_inode")
	w.socketIn = r.field("socket_alloc", 0, "socket")
	w.inode = r.field("inode", 8, "i_ino")
	// AF_UNIX may be a module, whose types are not in the kernel's BTF.
	try := resolver{img: w.v.img}
	w.unix = try.shape("unix_sock", "addr", "peer")
	w.address = try.shape("unix_address", "len", "name[]")
	if try.err != nil {
		w.unix = nil
	}
	return r.err
}

// tables walks the tables of the protocols, of all network namespaces.
func (w *socketWalk) tables() error {
	r := resolver{img: w.v.img}
	tcp := map[VirtAddr]bool{r.symbol("tcp_hashinfo"): true}
	udp := map[VirtAddr]bool{r.symbol("udp_table"): true}
	if r.err != nil {
		return r.err
	}
	// Since v6.1 and v6.2 a namespace may have tables of its own.
	err := w.v.eachNetns(func(net VirtAddr, inum uint64, init bool) error {
		w.netns[net] = inum
		t, err := w.v.thing(w.net, net)
		if err != nil {
			return err
		}
		if p := t.ptr("ipv4.tcp_death_row.hashinfo"); p != 0 {
			tcp[p] = true
		}
		if p := t.ptr("ipv4.udp_table"); p != 0 {
			udp[p] = true
		}
		return w.unixTable(net)
	})
	if err != nil {
		return err
	}
	for at := range tcp {
		if err := w.tcpTable(at); err != nil {
			return err
		}
	}
	for at := range udp {
		t, err := w.v.thing(w.udpTable, at)
		if err != nil {
			return err
		}
		if err := w.buckets("udp_table", t.ptr("hash"), t.num("mask")+1, w.slotSize, w.slot, w.node); err != nil {
			return err
		}
	}
	return nil
}

func (w *socketWalk) tcpTable(at VirtAddr) error {
	t, err := w.v.thing(w.hashinfo, at)
	if err != nil {
		return err
	}
	// Until Linux commit cae3873c5b3a ("net: inet: Retire port only listening_hash") (in v5.19) sockets that listen are
	// linked by their nulls_node there, and otherwise in lhash2.
	if f, ok := t.fields["listening_hash"]; ok && w.listenSize != 0 {
		err = w.buckets("listening_hash", t.at("listening_hash"), f.Size/w.listenSize, w.listenSize, w.nulls, w.nullsNode)
	} else {
		err = w.buckets("lhash2", t.ptr("lhash2"), t.num("lhash2_mask")+1, w.listenSize, w.nulls, w.nullsNode)
	}
	if err != nil {
		return err
	}
	return w.buckets("ehash", t.ptr("ehash"), t.num("ehash_mask")+1, w.bucketSize, w.chain, w.nullsNode)
}

// unixTable walks the table of unix sockets of a namespace: since v6.0 each has one, of a size that is a constant of the
// source. What kmalloc set aside for it tells how many buckets it has at most; what is behind the last is no chain, and
// must not be taken for one. Where that cannot be told, the sockets of processes and their peers are all that is listed.
func (w *socketWalk) unixTable(net VirtAddr) error {
	f, err := w.v.img.types.field("net", "unx.table.buckets")
	if err != nil || w.unix == nil || f.Size != 8 {
		return nil
	}
	table, err := w.v.pointer("net", net+VirtAddr(f.Offset))
	if err != nil || table == 0 {
		return err
	}
	size, err := w.v.allocated(table)
	if err != nil || size != 4096 { // 512 buckets fill their object; of another size it would not be known how many there are
		var corrupt *CorruptError
		if errors.As(err, &corrupt) || err == nil || errors.Is(err, ErrNotFound) || errors.Is(err, ErrNotSupported) {
			return nil
		}
		return err
	}
	return w.buckets("unix_table", table, size/8, 8, 0, w.node)
}

// buckets walks a hash table of n buckets of the given size, whose chains begin at first.
func (w *socketWalk) buckets(kind string, table VirtAddr, n, size, first, node uint64) error {
	const chunk = 64 << 10
	if n == 0 || n > maxBuckets || size < first+8 || size > chunk || !w.v.img.space.valid(table, 8) {
		return &CorruptError{kind, table, fmt.Sprintf("%d buckets of %d bytes", n, size)}
	}
	per := chunk / size
	b := make([]byte, per*size)
	for i := uint64(0); i < n; i += per {
		if err := w.v.ctx.Err(); err != nil {
			return err
		}
		part := b[:min(per, n-i)*size]
		if err := w.v.img.space.object(w.v, kind, table+VirtAddr(i*size), part); err != nil {
			return err
		}
		for ; len(part) > 0; part = part[size:] {
			err := w.v.hlist(kind, VirtAddr(le64(part[first:])), node, maxSockets, func(at VirtAddr) error {
				if w.seen[at] {
					return &CorruptError{kind, at, "socket is twice in the table"}
				}
				return w.see(at)
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// see reads a socket, unless it is known.
func (w *socketWalk) see(at VirtAddr) error {
	if w.seen[at] {
		return nil
	}
	if len(w.all) == maxSockets {
		return &CorruptError{"sock", at, fmt.Sprintf("more than %d sockets", maxSockets)}
	}
	w.seen[at] = true
	s, err := w.read(at)
	if err != nil {
		return err
	}
	w.all = append(w.all, s)
	return nil
}

func (w *socketWalk) read(at VirtAddr) (Socket, error) {
	s := Socket{Addr: at, Owners: w.owners[at]}
	c, err := w.v.thing(w.common, at)
	if err != nil {
		return s, err
	}
	family, state := c.num("__sk_common.skc_family"), c.num("__sk_common.skc_state")
	if family > 255 || state == 0 && family != afUnix && families[family] == "" || state >= uint64(len(tcpStates)) {
		return s, &CorruptError{"sock", at, fmt.Sprintf("family %d in state %d", family, state)}
	}
	s.Netns = w.netns[c.ptr("__sk_common.skc_net.net")]
	s.State = tcpStates[state]
	inet := family == afInet || family == afInet6
	if inet {
		port := c.num("__sk_common.skc_dport")
		addresses(&s, &c, family, uint16(c.num("__sk_common.skc_num")), uint16(port>>8|port<<8))
	}
	suffix := ""
	if family == afInet6 {
		suffix = "6"
	}
	if inet && (state == tcpTimeWait || state == tcpNewSynRecv) {
		s.Protocol = "tcp" + suffix // an inet_timewait_sock or a request_sock: it has no more than this
		return s, nil
	}
	k, err := w.v.thing(w.sock, at)
	if err != nil {
		return s, err
	}
	if n := k.num("sk_type"); n < uint64(len(socketTypes)) {
		s.Type = socketTypes[n]
	}
	s.UID = uint32(k.num("sk_uid.val"))
	if p := k.ptr("sk_socket"); p != 0 {
		ino, err := w.v.pointer("socket", p-VirtAddr(w.socketIn)+VirtAddr(w.socketInode+w.inode))
		if err != nil {
			return s, err
		}
		s.Inode = uint64(ino)
	}
	s.RecvQ = uint64(max(0, k.int("sk_backlog.rmem_alloc.counter")))
	s.SendQ = uint64(max(0, k.int("sk_wmem_alloc.refs.counter")-1))
	if state == tcpListen {
		s.RecvQ, s.SendQ = k.num("sk_ack_backlog"), k.num("sk_max_ack_backlog")
	}
	switch {
	case family == afUnix:
		s.Protocol = "unix"
		return s, w.unixName(&s)
	case !inet:
		if s.Protocol = families[family]; s.Protocol == "" {
			s.Protocol = fmt.Sprintf("family %d", family)
		}
		return s, nil
	}
	protocol := k.num("sk_protocol")
	switch s.Protocol = inetProtocols[protocol]; {
	case s.Type == "raw":
		s.Protocol = "raw" + suffix
	case s.Protocol == "":
		s.Protocol = fmt.Sprintf("protocol %d", protocol)
	case s.Protocol == "tcp" && state != tcpListen:
		t, err := w.v.thing(w.tcp, at)
		if err != nil {
			return s, err
		}
		waits := func(from, to string) uint64 {
			return uint64(max(0, int32(t.num(to)-t.num(from))))
		}
		s.RecvQ, s.SendQ = waits("copied_seq", "rcv_nxt"), waits("snd_una", "write_seq")
		s.Protocol += suffix
	default:
		s.Protocol += suffix
	}
	return s, nil
}

func addresses(s *Socket, c *thing, family uint64, local, remote uint16) {
	if family == afInet {
		s.Local = netip.AddrPortFrom(c.ipv4("__sk_common.skc_rcv_saddr"), local)
		s.Remote = netip.AddrPortFrom(c.ipv4("__sk_common.skc_daddr"), remote)
		return
	}
	from, to := c.bytes("__sk_common.skc_v6_rcv_saddr"), c.bytes("__sk_common.skc_v6_daddr")
	if len(from) == 16 && len(to) == 16 {
		s.Local = netip.AddrPortFrom(netip.AddrFrom16([16]byte(from)), local)
		s.Remote = netip.AddrPortFrom(netip.AddrFrom16([16]byte(to)), remote)
	}
}

// unixName adds the name and the peer of a unix socket.
func (w *socketWalk) unixName(s *Socket) error {
	if w.unix == nil {
		return nil
	}
	t, err := w.v.thing(w.unix, s.Addr)
	if err != nil {
		return err
	}
	s.Peer = t.ptr("peer")
	p := t.ptr("addr")
	if p == 0 {
		return nil
	}
	a, err := w.v.thing(w.address, p)
	if err != nil {
		return err
	}
	n := a.num("len")
	if n < 2 || n > 110 { // sun_family, and no more than sizeof(struct sockaddr_un)
		return a.corrupt("of %d bytes", n)
	}
	name := make([]byte, n-2)
	if err := w.v.img.space.object(w.v, "unix_address", a.at("name")+2, name); err != nil {
		return err
	}
	if len(name) > 0 && name[0] == 0 {
		s.Path = "@" + printable(name[1:])
		return nil
	}
	s.Path, _ = cString(name)
	s.Path = strings.TrimRight(s.Path, "\x00")
	return nil
}
