package principles

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// newFinding waits for a finding that was not there before.
func (b *bench) newFinding(ctx context.Context, wait time.Duration, before []detect.Finding, ok func(detect.Finding) bool) (detect.Finding, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("nothing is found within %v", wait))
	defer cancel()
	return b.agent.WaitFinding(ctx, func(f detect.Finding) bool {
		return ok(f) && !slices.ContainsFunc(before, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil })
	})
}

// again does something every so often until stop is called, which tells of the first error.
func again(ctx context.Context, every time.Duration, do func() error) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		for {
			if err := do(); err != nil {
				done <- err
				return
			}
			select {
			case <-ctx.Done():
				done <- nil
				return
			case <-time.After(every):
			}
		}
	}()
	return func() error {
		cancel()
		return <-done
	}
}

// cutOff keeps back what goes between the host and one remote, while its service for others is used. What is planted is that another remote is cut off.
func cutOff(ctx context.Context, b *bench) (string, error) {
	const text = "to the one remote"
	order := client.NetworkOrder{Do: client.NetworkQuarantine, Remote: peerIP.String(), Seconds: 600}
	if b.calm {
		order.Remote = "203.0.113.11"
	}
	mark := b.peer.mark()
	sending, stop := context.WithCancel(ctx)
	defer stop()
	b.stream(sending, text, time.Minute)
	if _, err := b.peer.wait(ctx, mark, carries(text)); err != nil {
		return "", fmt.Errorf("the host's traffic does not get through: %w", err)
	}
	before, err := b.agent.Network(ctx)
	if err != nil {
		return "", err
	}
	if _, err := b.order(ctx, order); err != nil {
		return "", err
	}
	defer b.order(context.WithoutCancel(ctx), client.NetworkOrder{Do: client.NetworkRelease})
	held := func(more uint64) error {
		hctx, cancel := context.WithTimeoutCause(ctx, 15*time.Second, errors.New("nothing is kept back"))
		defer cancel()
		for {
			n, err := b.agent.Network(hctx)
			if err != nil {
				return errors.Join(context.Cause(hctx), err)
			}
			if n.Frames("host", "blocked") >= before.Frames("host", "blocked")+more {
				return nil
			}
		}
	}
	if err := held(50); err != nil {
		return "", err
	}
	quiet := b.peer.mark()
	if err := held(200); err != nil {
		return "", err
	}
	if late := b.peer.since(quiet, carries(text)); len(late) > 0 {
		return "", fmt.Errorf("%d frames come through to the remote that is cut off", len(late))
	}
	if err := b.served(ctx); err != nil {
		return "", fmt.Errorf("another remote is cut off with it: %w", err)
	}
	mark = b.peer.mark()
	if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
		return "", err
	}
	if _, err := b.peer.wait(ctx, mark, carries(text)); err != nil {
		return "", fmt.Errorf("a released host's traffic does not get through: %w", err)
	}
	return "0 of 150 frames came through, the host's service answered others meanwhile", nil
}

// silent takes the host's interface down while others speak to it. What is planted is that it stays up.
func silent(ctx context.Context, b *bench) (string, error) {
	before, err := b.agent.Findings(ctx)
	if err != nil {
		return "", err
	}
	// A conversation in which the host has its say, which the peer goes on with.
	const text = "are you there"
	if _, err := b.host.Exec(ctx, "ip neigh replace 10.0.2.77 lladdr 02:00:00:00:00:77 dev eth0; ping -c 1 -W 2 10.0.2.2 >/dev/null; true"); err != nil {
		return "", err
	}
	mark := b.peer.mark()
	b.stream(ctx, text, time.Second)
	if _, err := b.peer.wait(ctx, mark, carries(text)); err != nil {
		return "", err
	}
	stop := again(ctx, 300*time.Millisecond, func() error {
		return b.peer.end.Send(eth(hostMAC, peerMAC, 0x0800, ip4(peerIP, hostIP, 17, 0, nil, udp(7777, 7777, text))))
	})
	routes := ""
	if !b.calm {
		r, err := b.host.Exec(ctx, "ip route | grep default; ip link set eth0 down")
		if err != nil {
			return "", errors.Join(err, stop())
		}
		routes = strings.TrimSpace(r.Stdout)
	}
	began := time.Now()
	f, err := b.newFinding(ctx, time.Minute, before, func(f detect.Finding) bool { return f.Kind == detect.KindNetworkSilent && f.Resolved == nil })
	found := time.Since(began)
	if !b.calm {
		// The route goes with the interface.
		up := "ip link set eth0 up"
		if routes != "" {
			up += "; ip route replace " + routes
		}
		r, uerr := b.host.Exec(context.WithoutCancel(ctx), up)
		if uerr == nil && r.Code != 0 {
			uerr = fmt.Errorf("bring the host's interface up: %s%s", r.Stdout, r.Stderr)
		}
		err = errors.Join(err, uerr)
	}
	if err != nil {
		return "", errors.Join(err, stop())
	}
	began = time.Now()
	b.stream(ctx, text, time.Second)
	_, err = b.newFinding(ctx, time.Minute, nil, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil })
	if err := errors.Join(err, stop()); err != nil {
		return "", fmt.Errorf("that it speaks again: %w", err)
	}
	return fmt.Sprintf("found after %.0f s: %s; over %.1f s after it spoke again", found.Seconds(), f.Title, time.Since(began).Seconds()), nil
}

// undead has frames in the host's name on its cable while its kernel stands still. What is planted is that nobody sends any.
func undead(ctx context.Context, b *bench) (string, error) {
	before, err := b.agent.Findings(ctx)
	if err != nil {
		return "", err
	}
	end, err := b.lab.Cable.Endpoint("undead")
	if err != nil {
		return "", err
	}
	defer end.Close()
	if err := b.host.Freeze(ctx); err != nil {
		return "", err
	}
	began := time.Now()
	stop := again(ctx, 20*time.Millisecond, func() error {
		if b.calm {
			return nil
		}
		return end.Send(eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(7777, 7777, "from the dead"))))
	})
	f, err := b.newFinding(ctx, 40*time.Second, before, func(f detect.Finding) bool {
		return f.Kind == detect.KindTampering && strings.Contains(f.Title, "the host sends") && f.Resolved == nil
	})
	found := time.Since(began)
	if err := errors.Join(err, stop(), b.host.Thaw(context.WithoutCancel(ctx))); err != nil {
		return "", err
	}
	if _, err := b.newFinding(ctx, time.Minute, nil, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil }); err != nil {
		return "", fmt.Errorf("that it lives again: %w", err)
	}
	return fmt.Sprintf("found after %.1f s: %s", found.Seconds(), f.Title), nil
}

// scans has the host begin 40 conversations a second until stop is called, each with another value of the two bytes at vary in its frames, or
// all with the same.
func (b *bench) scans(ctx context.Context, vary int, same bool) (stop func() error) {
	args := control.FramesArgs{
		Frames: [][]byte{eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 6, 0, nil, syn(uint16(2000+vary), 1)))}, Vary: vary, For: time.Second, Gap: 25 * time.Millisecond,
	}
	if same {
		args.Vary = 0
	}
	ctx, cancel := context.WithCancel(ctx)
	// Each second of it goes on where the one before has ended.
	ended := again(ctx, 0, func() error {
		_, err := b.host.Frames(context.WithoutCancel(ctx), args)
		if !same {
			f := args.Frames[0][vary:]
			binary.BigEndian.PutUint16(f, binary.BigEndian.Uint16(f)+40)
		}
		return err
	})
	return func() error {
		cancel()
		return ended()
	}
}

// scan has the host look for ports of one machine, then for machines, slower than a flood. What is planted is that it asks one port of one machine as often.
func scan(ctx context.Context, b *bench) (string, error) {
	var said []string
	for _, kind := range []struct {
		name string
		vary int // where in the frame what is scanned stands: TCP's port, the last two bytes of IPv4's address
	}{{"ports", 14 + 20 + 2}, {"addresses", 14 + 18}} {
		// What the row before has sent is a scan, too, for a while.
		var before []detect.Finding
		for open := true; open; {
			var err error
			if before, err = b.agent.Findings(ctx); err != nil {
				return "", err
			}
			open = slices.ContainsFunc(before, func(f detect.Finding) bool { return f.Kind == detect.KindNetworkScan && f.Resolved == nil })
		}
		began := time.Now()
		stop := b.scans(ctx, kind.vary, b.calm)
		f, err := b.newFinding(ctx, 40*time.Second, before, func(f detect.Finding) bool { return f.Kind == detect.KindNetworkScan && f.Resolved == nil })
		found := time.Since(began)
		if err := errors.Join(err, stop()); err != nil {
			return "", fmt.Errorf("a scan of %s: %w", kind.name, err)
		}
		if _, err := b.newFinding(ctx, time.Minute, nil, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil }); err != nil {
			return "", fmt.Errorf("that a scan of %s is over: %w", kind.name, err)
		}
		said = append(said, fmt.Sprintf("%s: found after %.1f s (%s)", kind.name, found.Seconds(), f.Evidence[0].Value+" conversations begun"))
	}
	return strings.Join(said, "; ") + "; over soon after", nil
}
