package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// networkFlags are those of the verb network.
type networkFlags struct {
	duration time.Duration
	allow    string
	remote   string
	rate     string
}

var networkVerb = verb{
	name:  "network",
	args:  "status|quarantine|limit|release",
	words: []string{"status", "quarantine", "limit", "release"},
	short: "the host's traffic, where the agent stands between the host and the wire",
	long: `What is ordered is in force when the command returns, and ends by itself. The access agreement must name the action: quarantine,
rate-limit, release.

  status      what has passed, what was dropped and why, and what is kept back now
  quarantine  cut the host off from all but -allow, or from -remote only
  limit       bound what the host may send to -rate
  release     let everything through again

  backdoor network status
  backdoor network quarantine -for 1h -allow 10.0.0.5,10.1.0.0/16
  backdoor network quarantine -remote 192.0.2.7:443/tcp
  backdoor network limit -rate 256KiB -for 10m
  backdoor network release`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.DurationVar(&o.network.duration, "for", heal.ContainFor, "after which `time` it ends by itself")
		fs.StringVar(&o.network.allow, "allow", "", "`addresses` or prefixes that a quarantined host may still talk to, with commas between them")
		fs.StringVar(&o.network.remote, "remote", "", "the one remote to cut off: `ADDRESS`, ADDRESS:PORT/tcp or ADDRESS:PORT/udp")
		fs.StringVar(&o.network.rate, "rate", "32KiB", "`bytes` that the host may send a second")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		bad := func(format string, a ...any) (int, error) {
			return 0, &usageError{verb: "network", msg: fmt.Sprintf(format, a...)}
		}
		if len(args) != 1 {
			return bad("network takes one word")
		}
		n := e.o.network
		order := client.NetworkOrder{Seconds: int64(n.duration / time.Second)}
		switch args[0] {
		case "status":
			return showNetwork(ctx, e)
		case "release":
			order = client.NetworkOrder{Do: client.NetworkRelease}
		case "limit":
			order.Do = client.NetworkRateLimit
			rate, err := parseBytes(n.rate)
			if err != nil {
				return bad("-rate: %v", err)
			}
			order.BytesPerSecond = rate
			order.BurstBytes = max(rate, 9216)
		case "quarantine":
			order.Do = client.NetworkQuarantine
			for text := range strings.SplitSeq(n.allow, ",") {
				if text != "" {
					order.Allow = append(order.Allow, text)
				}
			}
			if err := parseRemote(n.remote, &order); err != nil {
				return bad("-remote: %v", err)
			}
		default:
			return bad("there is no %q", args[0])
		}
		a, err := e.openAgent(ctx)
		if err != nil {
			return 0, err
		}
		defer a.Close()
		if err := a.e.explain(a.at, a.c.OrderNetwork(ctx, order)); err != nil {
			return 0, fmt.Errorf("network %s: %w", args[0], err)
		}
		return exitOK, e.answer(map[string]string{"done": args[0]}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "network %s: done\n", args[0])
			return err
		})
	},
}

// parseBytes reads a number of bytes, perhaps with KiB, MiB or GiB.
func parseBytes(text string) (int64, error) {
	num, unit := text, int64(1)
	for i, u := range []string{"KiB", "MiB", "GiB"} {
		if n, ok := strings.CutSuffix(text, u); ok {
			num, unit = n, 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseInt(num, 10, 64)
	if err != nil || n < 1 || n > 1<<40/unit {
		return 0, fmt.Errorf("%q is no number of bytes, as in 4096 or 256KiB", text)
	}
	return n * unit, nil
}

// parseRemote reads ADDRESS or ADDRESS:PORT/tcp.
func parseRemote(text string, o *client.NetworkOrder) error {
	if text == "" {
		return nil
	}
	if _, err := netip.ParseAddr(text); err == nil {
		o.Remote = text
		return nil
	}
	hostport, proto, _ := strings.Cut(text, "/")
	addr, port, err := net.SplitHostPort(hostport)
	if err == nil {
		o.Remote = addr
		_, err = netip.ParseAddr(addr)
	}
	if err == nil {
		o.Port, err = strconv.Atoi(port)
	}
	o.Protocol = map[string]int{"tcp": 6, "udp": 17}[proto]
	if err != nil || o.Protocol == 0 {
		return fmt.Errorf("%q is none: write 192.0.2.7, 192.0.2.7:443/tcp or [2001:db8::7]:53/udp", text)
	}
	return nil
}

func showNetwork(ctx context.Context, e *env) (int, error) {
	a, err := e.openAgent(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	n, err := a.c.Network(ctx)
	if errors.Is(err, client.ErrNoNetwork) {
		return 0, err
	}
	if err != nil {
		return 0, a.e.explain(a.at, err)
	}
	return exitOK, e.answer(n, func(w io.Writer) error {
		l := &lines{w: w}
		c := n.Containment
		held := false
		if !c.QuarantineUntil.IsZero() {
			held = true
			l.printf("quarantined until %s", c.QuarantineUntil.Local().Format(time.DateTime))
			if len(c.Allow) > 0 {
				l.printf(", but for %s", query.Clean(strings.Join(c.Allow, ", ")))
			}
			l.printf("\n")
		}
		if !c.LimitUntil.IsZero() {
			held = true
			l.printf("limited to %d bytes/s until %s\n", c.BytesPerSecond, c.LimitUntil.Local().Format(time.DateTime))
		}
		for _, b := range c.Blocked {
			held = true
			l.printf("cut off from %s", query.Clean(b.Remote))
			if b.Port != 0 {
				l.printf(" port %d", b.Port)
			}
			if b.Protocol != 0 {
				l.printf(" (protocol %d)", b.Protocol)
			}
			l.printf(" until %s\n", b.Until.Local().Format(time.DateTime))
		}
		if !held {
			l.printf("nothing is kept back\n")
		}
		for _, c := range n.Datapath.Counters {
			if c.Frames > 0 {
				l.printf("%-7s %-12s %10d frames %14d bytes\n", query.Clean(c.Port), query.Clean(c.Verdict), c.Frames, c.Bytes)
			}
		}
		return l.err
	})
}
