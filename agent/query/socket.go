package query

import (
	"context"
	"fmt"
	"io"
	"iter"
	"net/netip"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Sockets is the answer to "who talks to whom?".
type Sockets struct {
	Extent
	Sockets []kernel.Socket `json:"sockets"`
}

// AskSockets lists the sockets of all families.
func AskSockets(ctx context.Context, v *kernel.View, _ []string) (Sockets, error) {
	return sockets(ctx, v.Sockets())
}

func sockets(ctx context.Context, seq iter.Seq2[kernel.Socket, error]) (s Sockets, err error) {
	s.Sockets, err = gather(ctx, &s.Extent, seq)
	return s, err
}

// Text prints a table like that of ss(8) with -ap.
func (s Sockets) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"NETID", "STATE", "RECV-Q", "SEND-Q", "LOCAL", "PEER", "UID", "PROCESSES"}}
	inode := make(map[kernel.VirtAddr]uint64)
	for _, x := range s.Sockets {
		inode[x.Addr] = x.Inode
	}
	for _, x := range s.Sockets {
		local, remote := endpoint(x.Local), endpoint(x.Remote)
		if x.Protocol == "unix" {
			local, remote = fmt.Sprintf("%s %d", Clean(x.Path), x.Inode), ""
			if x.Path == "" {
				local = fmt.Sprintf("* %d", x.Inode)
			}
			if n, ok := inode[x.Peer]; ok && x.Peer != 0 {
				remote = fmt.Sprintf("* %d", n)
			}
		}
		var owners []string
		for _, o := range x.Owners {
			owners = append(owners, fmt.Sprintf("%s(%d,%s)", Clean(o.Comm), o.PID, o.FD))
		}
		rows = append(rows, []string{x.Protocol, x.State, strconv.FormatUint(x.RecvQ, 10), strconv.FormatUint(x.SendQ, 10), local, remote,
			strconv.FormatUint(uint64(x.UID), 10), strings.Join(owners, " ")})
	}
	p.table("<<>><<><", rows)
	p.extent(s.Extent)
	return p.err
}

// endpoint writes an address as ss(8) does: * stands for any.
func endpoint(a netip.AddrPort) string {
	if !a.IsValid() {
		return "*"
	}
	host, port := a.Addr().String(), strconv.Itoa(int(a.Port()))
	if a.Addr().Is6() {
		host = "[" + host + "]"
	}
	if a.Addr().IsUnspecified() && a.Port() == 0 {
		host = "*"
	}
	if a.Port() == 0 {
		port = "*"
	}
	return host + ":" + port
}
