package principles

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// target is who the host attacks.
type target struct {
	mac net.HardwareAddr
	ip  netip.Addr
}

var (
	theAgent = target{agentMAC, agentIP}
	thePeer  = target{peerMAC, peerIP}
)

// forged are frames by which a host tries to reach the target, or to speak in its name. Each has a mark in it, but those without room.
func forged(to target, mark string) map[string][]byte {
	broadcast := mac("ff:ff:ff:ff:ff:ff")
	roce := ip4(hostIP, to.ip, 17, 0, nil, udp(49152, 4791, mark))
	vlan := append([]byte{0, 5, 8, 0}, roce...)
	v6 := func(next uint8, payload []byte) []byte {
		h := make([]byte, 40)
		h[0], h[6], h[7] = 0x60, next, 255
		binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
		copy(h[8:], netip.MustParseAddr("fd00:bd::15").AsSlice())
		copy(h[24:], netip.MustParseAddr("fd00:bd::2").AsSlice())
		return append(h, payload...)
	}
	frames := map[string][]byte{
		"RoCE":                   eth(to.mac, hostMAC, 0x0800, roce),
		"RoCE by broadcast":      eth(broadcast, hostMAC, 0x0800, roce),
		"RoCE in a VLAN":         eth(to.mac, hostMAC, 0x8100, vlan),
		"RoCE with IP options":   eth(to.mac, hostMAC, 0x0800, ip4(hostIP, to.ip, 17, 0, []byte{7, 4, 0, 0}, udp(49152, 4791, mark))),
		"a fragment":             eth(to.mac, hostMAC, 0x0800, ip4(hostIP, to.ip, 17, 0x2000, nil, udp(49152, 4791, mark))),
		"a later fragment":       eth(to.mac, hostMAC, 0x0800, ip4(hostIP, to.ip, 17, 5, nil, []byte(mark))),
		"Redfish":                eth(to.mac, hostMAC, 0x0800, ip4(hostIP, to.ip, 6, 0, nil, append(syn(49152, 443), mark...))),
		"in the target's name":   eth(peerMAC, hostMAC, 0x0800, ip4(to.ip, peerIP, 17, 0, nil, udp(4791, 4791, mark))),
		"by its hardware":        eth(peerMAC, to.mac, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(1, 9, mark))),
		"a question for it":      eth(broadcast, hostMAC, 0x0806, append(arp(1, hostMAC, hostIP, make(net.HardwareAddr, 6), to.ip), mark...)),
		"an answer in its place": eth(broadcast, hostMAC, 0x0806, append(arp(2, hostMAC, to.ip, hostMAC, hostIP), mark...)),
	}
	if to.ip == agentIP {
		frames["RoCE by IPv6"] = eth(to.mac, hostMAC, 0x86dd, v6(17, udp(49152, 4791, mark)))
		frames["RoCE by IPv6 behind options"] = eth(to.mac, hostMAC, 0x86dd, v6(60, append([]byte{17, 0, 1, 4, 0, 0, 0, 0}, udp(49152, 4791, mark)...)))
	}
	return frames
}

// guard has the host's root forge frames for the agent; none may pass.
func guard(ctx context.Context, b *bench) (string, error) {
	before, err := b.agent.Network(ctx)
	if err != nil {
		return "", err
	}
	mark := b.peer.mark()
	const text = "forged-by-the-host"
	var frames [][]byte
	var names []string
	for n, f := range forged(b.target, text) {
		names, frames = append(names, n), append(frames, f)
	}
	r, err := b.host.Frames(ctx, control.FramesArgs{Frames: frames, Count: 10 * len(frames), Gap: time.Millisecond})
	if err != nil {
		return "", err
	}
	// A frame that may pass, behind them, shows that all the others have been judged.
	const last = "this one may pass"
	if _, err := b.host.Frames(ctx, control.FramesArgs{Frames: [][]byte{eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(9, 9, last)))}}); err != nil {
		return "", err
	}
	passed := func(f []byte) bool { return carries(last)(f) || carries(text)(f) }
	if _, err := b.peer.wait(ctx, mark, passed); err != nil {
		return "", fmt.Errorf("a frame that may pass does not: %w", err)
	}
	if got := b.peer.since(mark, carries(text)); len(got) > 0 {
		return "", fmt.Errorf("%d forged frames have passed, the first %x", len(got), got[0].frame)
	}
	after, err := b.agent.Network(ctx)
	if err != nil {
		return "", err
	}
	held := uint64(0)
	for _, v := range []string{"guarded", "malformed", "unparsed"} {
		held += after.Frames("host", v) - before.Frames("host", v)
	}
	if held < uint64(r.Sent) {
		return "", fmt.Errorf("the host has sent %d forged frames of %d kinds, and the packet path counts %d", r.Sent, len(names), held)
	}
	if n := after.Frames("host", "passed") - before.Frames("host", "passed"); n > 0 {
		return "", fmt.Errorf("%d frames of the host were passed to the agent's network stack", n)
	}
	return fmt.Sprintf("%d frames of %d kinds: 0 passed", r.Sent, len(names)), nil
}

// invisible looks whether any frame of the agent's machine is on the host's cable.
func invisible(ctx context.Context, b *bench) (string, error) {
	before, err := b.agent.Network(ctx)
	if err != nil {
		return "", err
	}
	own := []net.HardwareAddr{agentMAC, mac("52:54:00:bd:00:01"), mac("52:54:00:bd:00:03")}
	if b.target.ip == thePeer.ip {
		own = append(own, peerMAC)
	}
	tap, err := b.lab.Cable.Tap()
	if err != nil {
		return "", err
	}
	defer tap.Close()
	// What would have the agent's machine show itself: a call by everybody, and to everybody.
	bc := mac("ff:ff:ff:ff:ff:ff")
	if _, err := b.host.Exec(ctx, "ping -c 1 -W 1 10.0.2.2; ping -c 1 -W 1 10.0.2.15; ping -c 2 -W 1 255.255.255.255; arping -c 1 -w 1 -I eth0 192.168.190.2; arping -c 1 -w 1 -I eth0 10.0.2.2; true"); err != nil {
		return "", err
	}
	if err := b.peer.end.Send(eth(bc, peerMAC, 0x0806, arp(1, peerMAC, peerIP, make(net.HardwareAddr, 6), agentIP))); err != nil {
		return "", err
	}
	if err := b.peer.end.Send(eth(bc, peerMAC, 0x0806, arp(1, peerMAC, peerIP, make(net.HardwareAddr, 6), hostIP))); err != nil {
		return "", err
	}
	if _, err := tap.Wait(ctx, func(f []byte) bool {
		return len(f) > 22 && string(f[6:12]) == string(hostMAC) && f[12] == 8 && f[13] == 6 && f[21] == 2
	}); err != nil {
		return "", fmt.Errorf("the host does not answer who asks for it: %w", err)
	}
	n := 0
	for _, f := range tap.Frames() {
		n++
		if i := slices.IndexFunc(own, func(m net.HardwareAddr) bool { return string(f[6:12]) == string(m) }); i >= 0 {
			return "", fmt.Errorf("a frame of %v is on the host's cable: %x", own[i], f)
		}
	}
	after, err := b.agent.Network(ctx)
	if err != nil {
		return "", err
	}
	_ = before
	if after.Frames("host", "passed") != 0 {
		return "", errors.New("frames of the host were passed to the agent's network stack")
	}
	return fmt.Sprintf("%d frames on the cable, 0 of the agent's machine", n), nil
}

// stream has the host send a datagram each millisecond to the peer, until ctx ends and no longer than for a time; it does not wait for the end.
// Behind the text stands a number that rises from frame to frame.
func (b *bench) stream(ctx context.Context, text string, d time.Duration) {
	frame := eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(7777, 7777, text+"##")))
	go func() { // that nothing comes is noticed where it is waited for
		for end := time.Now().Add(d); ctx.Err() == nil && time.Now().Before(end); {
			// Where late frames in the peer's name have turned its own aside on the wire, a word of its own turns them back.
			if err := b.peer.end.Send(eth(mac("ff:ff:ff:ff:ff:ff"), peerMAC, 0x88b5, nil)); err != nil {
				return
			}
			if _, err := b.host.Frames(context.WithoutCancel(ctx), control.FramesArgs{
				Frames: [][]byte{frame}, For: 3 * time.Second, Gap: time.Millisecond, Vary: 14 + 20 + 8 + len(text),
			}); err != nil {
				return
			}
		}
	}()
}

// order gives the packet path an order the short way, and tells how long the answer took.
func (b *bench) order(ctx context.Context, o client.NetworkOrder) (time.Duration, error) {
	began := time.Now()
	_, err := b.agent.Post(ctx, "/redfish/v1/Systems/system/Actions/Oem/BackdoorDatapath."+o.Do, o, nil)
	return time.Since(began), err
}

// contain quarantines a host that sends all the time, and measures when that takes effect: from when the order has been written to the
// agent's connection until its last frame has come out on the wire, or, if that is later, until the host has put the first frame onto its
// cable that never comes out. Host and DPU have a CPU of this machine each, as they have processors of their own.
func contain(ctx context.Context, b *bench) (string, error) {
	const text = "contain me"
	unpin, err := b.lab.Apart(ctx)
	if err != nil {
		return "", err
	}
	defer unpin()
	mark := b.peer.mark()
	sending, stop := context.WithCancel(ctx)
	defer stop()
	b.stream(sending, text, 3*time.Minute)
	if _, err := b.peer.wait(ctx, mark, carries(text)); err != nil {
		return "", fmt.Errorf("the host's traffic does not get through: %w", err)
	}
	var effect, answered []time.Duration
	var ran, waited time.Duration
	rounds := 3
	if *whole {
		rounds = 25
	}
	for range rounds {
		var asked time.Time
		tap, err := b.lab.Cable.Tap()
		if err != nil {
			return "", err
		}
		ran0, waited0, err := b.lab.DPU.Scheduled()
		if err != nil {
			return "", errors.Join(err, tap.Close())
		}
		d, err := b.order(sentAt(ctx, &asked), client.NetworkOrder{Do: client.NetworkQuarantine, Seconds: 60, Allow: b.allow})
		if err != nil {
			return "", errors.Join(err, tap.Close())
		}
		ran1, waited1, err := b.lab.DPU.Scheduled()
		if err != nil {
			return "", errors.Join(err, tap.Close())
		}
		answered, ran, waited = append(answered, d), ran+ran1-ran0, waited+waited1-waited0
		// While the packet path keeps back what the host goes on sending, nothing comes. What had left before is on its way for a moment.
		kept, err := b.keptBack(ctx, 0)
		if err != nil {
			return "", errors.Join(err, tap.Close())
		}
		quiet := b.peer.mark()
		_, err = b.keptBack(ctx, kept+50)
		if err := errors.Join(err, tap.Close()); err != nil {
			return "", err
		}
		if late := b.peer.since(quiet, carries(text)); len(late) > 5 {
			return "", fmt.Errorf("%d frames of a quarantined host come through", len(late))
		}
		all := b.peer.since(0, carries(text))
		last := all[len(all)-1]
		// The first frame on the cable behind that one, or behind the order if that came later.
		frames, times := tap.Frames(), tap.Times()
		next := 0
		for i, f := range frames {
			if bytes.Equal(f, last.frame) || times[i].Before(asked) {
				next = i + 1
			}
		}
		for next < len(frames) && !carries(text)(frames[next]) {
			next++
		}
		if next >= len(frames) {
			return "", errors.New("the host puts nothing onto its cable while it is quarantined")
		}
		effect = append(effect, max(last.at.Sub(asked), times[next].Sub(asked)))
		mark = b.peer.mark()
		if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
			return "", err
		}
		if _, err := b.peer.wait(ctx, mark, carries(text)); err != nil {
			return "", fmt.Errorf("a released host's traffic does not get through: %w", err)
		}
	}
	intents, err := b.intents(ctx, rounds)
	if err != nil {
		return "", err
	}
	ms := func(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
	late := 0
	for _, d := range effect {
		if d > 100*time.Millisecond {
			late++
		}
	}
	median, worst := percentile(effect, 50), percentile(effect, 100)
	if worst > 5*time.Second {
		return "", fmt.Errorf("the quarantine takes %v to be in force", worst)
	}
	return fmt.Sprintf("in force %v after the order had been sent (median of %d; worst %v, %d above 100ms), of which the intent in the journal %v (worst %v); the answer after %v (worst %v); frames 1 ms apart; to answer, the DPU's emulator ran for %v and waited %v for a CPU (mean)",
		ms(median), rounds, ms(worst), late, ms(percentile(intents, 50)), ms(percentile(intents, 100)), ms(percentile(answered, 50)), ms(percentile(answered, 100)),
		ms(ran/time.Duration(rounds)), ms(waited/time.Duration(rounds))), nil
}

// intents returns how long the agreement and the journal took, before anything was done, in the latest n quarantines of the agent's journal.
func (b *bench) intents(ctx context.Context, n int) ([]time.Duration, error) {
	var all []time.Duration
	for e, err := range client.Members[schema.LogEntry](ctx, b.agent.Client, client.JournalURI) {
		if err != nil {
			return nil, err
		}
		var o struct{ Record struct{ Kind, Data string } }
		if _, err := client.OEM(e.OEM, &o); err != nil {
			return nil, err
		}
		if o.Record.Kind != "outcome" {
			continue
		}
		var out heal.Outcome
		if err := json.Unmarshal([]byte(o.Record.Data), &out); err != nil {
			return nil, err
		}
		if out.Plan.Action == heal.Quarantine && len(out.Steps) == 1 {
			all = append(all, out.Steps[0].Started.Sub(out.Started))
		}
	}
	if len(all) < n {
		return nil, fmt.Errorf("the journal has %d quarantines, not %d", len(all), n)
	}
	return all[len(all)-n:], nil
}

// keptBack waits until the quarantine has kept back at least n frames of the host, and returns how many.
func (b *bench) keptBack(ctx context.Context, n uint64) (uint64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, errors.New("the quarantine keeps nothing back"))
	defer cancel()
	for {
		s, err := b.agent.Network(ctx)
		if err != nil {
			return 0, errors.Join(context.Cause(ctx), err)
		}
		if got := s.Frames("host", "quarantined"); got >= n {
			return got, nil
		}
	}
}

// served asks the host's service something, which is reached through the router.
func (b *bench) served(ctx context.Context) error {
	conn, err := b.host.Dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	fmt.Fprintln(conn, "HELLO")
	_, err = conn.Read(make([]byte, 100))
	return err
}

// expires lets a quarantine end by itself, with an exception in force meanwhile. What is planted is that somebody releases the host before.
func expires(ctx context.Context, b *bench) (string, error) {
	const text = "wait for the end"
	asked := time.Now()
	if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkQuarantine, Seconds: 2, Allow: []string{"10.0.2.2"}}); err != nil {
		return "", err
	}
	if b.calm {
		if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
			return "", err
		}
	}
	mark := b.peer.mark()
	b.stream(ctx, text, 20*time.Second)
	// Its service is reached through the router, which is allowed.
	if err := b.served(ctx); err != nil {
		return "", fmt.Errorf("an exception of the quarantine is not let through: %w", err)
	}
	first, err := b.peer.wait(ctx, mark, carries(text))
	if err != nil {
		return "", fmt.Errorf("the quarantine does not end: %w", err)
	}
	after := first.at.Sub(asked)
	if after < 1900*time.Millisecond { // the two machines' clocks need not agree to the last
		return "", fmt.Errorf("a quarantine of 2 s lets through after %v", after)
	}
	return fmt.Sprintf("a quarantine of 2 s ended %v after the order was sent, an exception worked meanwhile", after.Round(10*time.Millisecond)), nil
}

// flood has the host flood the network; policy bounds it without asking.
func flood(ctx context.Context, b *bench) (string, error) {
	if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
		return "", err
	}
	began := time.Now()
	done := make(chan error, 1)
	go func() {
		gap := 100 * time.Microsecond // so that far more is sent, on a slow machine, too, than the limit lets through
		if b.calm {
			gap = 50 * time.Millisecond
		}
		_, err := b.host.Frames(ctx, control.FramesArgs{
			Frames: [][]byte{eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 6, 0, nil, syn(1024, 80)))}, Vary: 14 + 20, For: 15 * time.Second, Gap: gap,
		})
		done <- err
	}()
	defer func() { <-done }()
	fctx, cancel := context.WithTimeoutCause(ctx, 25*time.Second, errors.New("the flood is not found"))
	defer cancel()
	f, err := b.agent.WaitFinding(fctx, func(f detect.Finding) bool {
		return f.Kind == detect.KindNetworkFlood && f.FirstSeen.After(began.Add(-time.Minute)) && f.Resolved == nil
	})
	if err != nil {
		return "", err
	}
	found := time.Since(began)
	f, err = b.agent.WaitFinding(fctx, func(g detect.Finding) bool { return g.ID == f.ID && g.Resolved != nil })
	if err != nil {
		return "", fmt.Errorf("it is not bounded: %w; %s", err, b.agent.Explain(ctx, f.ID))
	}
	bounded := time.Since(began)
	n, err := b.agent.Network(ctx)
	if err != nil {
		return "", err
	}
	if n.Containment.LimitUntil.IsZero() || len(f.Repairs) == 0 {
		return "", fmt.Errorf("no limit is in force after %s: %s", f.ID, f.Resolution)
	}
	// A flood has lulls, in which it is less than the limit.
	for n.Frames("host", "limited") == 0 {
		if n, err = b.agent.Network(fctx); err != nil {
			return "", fmt.Errorf("no frame was kept back by the limit: %w; %s", errors.Join(context.Cause(fctx), err), b.agent.Explain(ctx, f.ID))
		}
	}
	_, err = b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease})
	return fmt.Sprintf("found after %.1f s, bounded after %.1f s", found.Seconds(), bounded.Seconds()), err
}

// survive kills the agent's process while the host's service is used, with a containment in force. What is planted is that the containment was lifted.
func survive(ctx context.Context, b *bench) (string, error) {
	if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkQuarantine, Remote: "203.0.113.9", Seconds: 600}); err != nil {
		return "", err
	}
	if b.calm {
		if _, err := b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease}); err != nil {
			return "", err
		}
	}
	conn, err := b.host.Dial(ctx)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	hello := func() error {
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintln(conn, "HELLO")
		_, err := conn.Read(make([]byte, 100))
		return err
	}
	if err := hello(); err != nil {
		return "", err
	}
	console := b.lab.DPU.Console()
	mark := console.Mark()
	if err := b.lab.DPU.KillAgent(ctx); err != nil {
		return "", err
	}
	dead, back := make(chan error, 1), make(chan error, 1)
	go func() { _, err := console.Wait(ctx, mark, workerEnded); dead <- err }()
	go func() { _, err := console.Wait(ctx, mark, pathRuns); back <- err }()
	var longest time.Duration
	n := 0
	for ended := false; !ended; n++ {
		at := time.Now()
		if err := hello(); err != nil {
			return "", fmt.Errorf("the host's service is lost with the agent: %w", err)
		}
		longest = max(longest, time.Since(at))
		select {
		case err := <-back:
			if err != nil {
				return "", fmt.Errorf("the agent does not come back: %w", err)
			}
			ended = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := <-dead; err != nil {
		return "", fmt.Errorf("the agent was not killed: %w", err)
	}
	// The service of Redfish needs a moment more.
	net, err := b.network(ctx)
	if err != nil {
		return "", err
	}
	if len(net.Containment.Blocked) != 1 || net.Containment.Blocked[0].Remote != "203.0.113.9" {
		return "", fmt.Errorf("what was contained is not any more: %+v", net.Containment)
	}
	_, err = b.order(ctx, client.NetworkOrder{Do: client.NetworkRelease})
	return fmt.Sprintf("%d requests to the host's service meanwhile, all answered, the slowest in %v", n, longest.Round(time.Millisecond)), err
}

// network asks for the packet path until it runs.
func (b *bench) network(ctx context.Context) (client.Network, error) {
	for {
		n, err := b.agent.Network(ctx)
		if err == nil {
			return n, nil
		}
		select {
		case <-ctx.Done():
			return n, fmt.Errorf("the agent does not answer again: %w", err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// functions looks at the standard resources of the packet path. What is planted are frames that another has put onto the host's cable in its name.
func functions(ctx context.Context, b *bench) (string, error) {
	const adapter = "/redfish/v1/Chassis/dpu/NetworkAdapters/nic0"
	var f schema.NetworkDeviceFunction
	var m schema.NetworkDeviceFunctionMetrics
	var p schema.Port
	var pm schema.PortMetrics
	if err := b.agent.Get(ctx, adapter+"/NetworkDeviceFunctions/host", &f); err != nil {
		return "", err
	}
	if f.Links == nil || f.Links.PhysicalNetworkPortAssignment == nil {
		return "", errors.New("the host's function names no port")
	}
	if err := b.agent.Get(ctx, f.Links.PhysicalNetworkPortAssignment.ID, &p); err != nil {
		return "", err
	}
	if p.Metrics == nil {
		return "", errors.New("the uplink has no metrics")
	}
	if err := b.agent.Get(ctx, p.Metrics.ID, &pm); err != nil {
		return "", err
	}
	// The cable's own count is the oracle: what the host has put on it has come in. A flood is more than a network function has room for,
	// so that it is counted what a moment brings in which the host sends less than that.
	counts := func() (function, cable uint64, err error) {
		err = b.agent.Get(ctx, f.Metrics.ID, &m)
		return m.TXFrames, b.lab.Host.CablePort().Counters().In, err
	}
	function, cable, err := counts()
	if err != nil {
		return "", err
	}
	const many, others = 500, 10 // others: what the host's kernel sends by itself meanwhile
	if b.calm {
		end, err := b.lab.Cable.Endpoint("another")
		if err != nil {
			return "", err
		}
		defer end.Close()
		for range 100 {
			if err := end.Send(eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(7777, 7777, "from another")))); err != nil {
				return "", err
			}
		}
	}
	frame := eth(peerMAC, hostMAC, 0x0800, ip4(hostIP, peerIP, 17, 0, nil, udp(7777, 7777, "count me")))
	if _, err := b.host.Frames(ctx, control.FramesArgs{Frames: [][]byte{frame}, Count: many, Gap: 2 * time.Millisecond}); err != nil {
		return "", err
	}
	// The function's count follows the last frame.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		nowFunction, nowCable, err := counts()
		if err != nil {
			return "", err
		}
		counted, sent := nowFunction-function, nowCable-cable
		switch {
		case sent < many/2:
			err = fmt.Errorf("the host has sent %d frames, which were to be %d", sent, many)
		case counted+others < sent || counted > sent+others:
			err = fmt.Errorf("the function has sent %d frames meanwhile, and the cable has carried %d", counted, sent)
		default:
			return fmt.Sprintf("%d frames of the host, %d on its cable", counted, sent), nil
		}
		if time.Now().After(end) {
			return "", err
		}
	}
}
