package query

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strconv"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Interfaces is the answer to "how is the host connected?".
type Interfaces struct {
	Extent
	Interfaces []kernel.Interface `json:"interfaces"`
}

// AskInterfaces lists the network interfaces.
func AskInterfaces(ctx context.Context, v *kernel.View, _ []string) (Interfaces, error) {
	return interfaces(ctx, v.Interfaces())
}

func interfaces(ctx context.Context, seq iter.Seq2[kernel.Interface, error]) (n Interfaces, err error) {
	n.Interfaces, err = gather(ctx, &n.Extent, seq)
	return n, err
}

// Text prints a table: a line for each interface, and one for each further address.
func (n Interfaces) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"INTERFACE", "STATE", "MAC", "MTU", "RECEIVED", "SENT", "DRIVER", "ADDRESSES"}}
	for _, i := range n.Interfaces {
		name := strconv.Itoa(i.Index) + ": " + Clean(i.Name)
		if !i.Init {
			name = fmt.Sprintf("%s (net:[%d])", name, i.Netns)
		}
		state := i.State
		if state == "unknown" && i.Carrier {
			state = "up?"
		}
		received, sent := "-", "-"
		if c := i.Counters; c != nil {
			received, sent = traffic(c.RxBytes, c.RxErrors+c.RxDropped), traffic(c.TxBytes, c.TxErrors+c.TxDropped)
		}
		address := func(k int) string {
			if k < len(i.Addresses) {
				return i.Addresses[k].String()
			}
			return ""
		}
		rows = append(rows, []string{name, state, i.MAC, strconv.Itoa(i.MTU), received, sent, Clean(i.Driver), address(0)})
		for k := 1; k < len(i.Addresses); k++ {
			rows = append(rows, []string{"", "", "", "", "", "", "", address(k)})
		}
	}
	p.table("<<<>>><<", rows)
	p.extent(n.Extent)
	return p.err
}

func traffic(bytes, lost uint64) string {
	if lost == 0 {
		return Bytes(bytes)
	}
	return fmt.Sprintf("%s (%d lost)", Bytes(bytes), lost)
}
