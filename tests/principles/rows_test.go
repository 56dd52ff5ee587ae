package principles

import (
	"context"
	"regexp"
)

// What the DPU's console says.
var (
	workerEnded = regexp.MustCompile(`the worker has ended`)
	pathRuns    = regexp.MustCompile(`the packet path runs`)
)

// retarget has the experiments take the machine on the wire for the agent: what is not guarded must be found reachable.
func retarget(_ context.Context, b *bench) (func() error, error) {
	b.target = thePeer
	return func() error {
		b.target = theAgent
		// Frames in the peer's name have turned its own aside on the wire; with a word of its own they come again.
		return b.peer.end.Send(eth(mac("ff:ff:ff:ff:ff:ff"), peerMAC, 0x88b5, nil))
	}, nil
}

func rows() []row {
	return []row{
		{
			principle: "6 access control", mechanism: "datapath: guard", quick: true,
			experiment: "the host's root forges RoCE, Redfish, ARP and neighbour frames for the agent and in its name: VLANs, fragments, options, broadcast",
			run:        guard, plant: retarget,
		},
		{
			principle: "5 transparency", mechanism: "datapath: guard",
			experiment: "the agent's machine on the host's cable: pings, ARP, calls from the wire",
			run:        invisible, plant: retarget,
		},
		{
			principle: "6 access control", mechanism: "datapath: contain", quick: true,
			experiment: "quarantine of a host that sends all the time",
			run:        contain,
			plant: func(_ context.Context, b *bench) (func() error, error) {
				b.allow = []string{peerIP.String()}
				return func() error { b.allow = nil; return nil }, nil
			},
		},
		{
			principle: "6 access control", mechanism: "datapath: contain", quick: true,
			experiment: "a quarantine's exceptions and its end",
			run:        expires,
		},
		{
			principle: "6 access control", mechanism: "network-flood, rate-limit, policy",
			experiment: "the host sends a SYN flood",
			run:        flood,
			plant: func(_ context.Context, b *bench) (func() error, error) {
				b.calm = true
				return func() error { b.calm = false; return nil }, nil
			},
		},
		{
			principle: "3 availability", mechanism: "datapath: pinned programs", quick: true,
			experiment: "the agent's process is killed while the host's service is used",
			run:        survive,
		},
		{
			principle: "1 bidirectional access", mechanism: "Redfish: NetworkDeviceFunctions, Ports",
			experiment: "the counts of the host's network function against those of its cable",
			run:        functions,
		},
	}
}
