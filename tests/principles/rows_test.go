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

// calm turns an experiment's cause off, or a stranger's deed on.
func calm(_ context.Context, b *bench) (func() error, error) {
	b.calm = true
	return func() error { b.calm = false; return nil }, nil
}

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
			principle: "6 access control", mechanism: "datapath: contain",
			experiment: "a quarantine's exceptions and its end",
			run:        expires, plant: calm,
		},
		{
			principle: "6 access control", mechanism: "network-flood, rate-limit, policy",
			experiment: "the host sends a SYN flood",
			run:        flood,
			plant:      calm,
		},
		{
			principle: "6 access control", mechanism: "datapath: watch, network-scan",
			experiment: "the host scans another machine's ports, then the network's addresses",
			run:        scan, plant: calm,
		},
		{
			principle: "6 access control", mechanism: "datapath: contain",
			experiment: "a single remote is cut off",
			run:        cutOff, plant: calm,
		},
		{
			principle: "3 availability", mechanism: "datapath: watch, network-silent",
			experiment: "a host that lives falls silent: its interface is down while others speak to it",
			run:        silent, plant: calm,
		},
		{
			principle: "7 tamper resistance", mechanism: "datapath: watch, network-alive",
			experiment: "a host sends whose kernel stands still",
			run:        undead, plant: calm,
		},
		{
			principle: "3 availability", mechanism: "datapath: pinned programs", quick: true,
			experiment: "the agent's process is killed while the host's service is used",
			run:        survive, plant: calm,
		},
		{
			principle: "1 bidirectional access", mechanism: "Redfish: NetworkDeviceFunctions, Ports",
			experiment: "the counts of the host's network function against those of its cable",
			run:        functions, plant: calm,
		},
		{
			principle: "1, 2 remote memory, atomics", mechanism: "PCI window, lease, journal, compare-and-swap",
			experiment: "memory read, stored and put back over Redfish, against the RAM file",
			run:        remote, plant: calm,
		},
		{
			principle: "1, 2 remote memory, atomics", mechanism: "PCI window, RDMA, DMA engine, RAM file",
			experiment: "each operation by each way to the memory, against the RAM file; registers of devices out of reach of all",
			run:        matrix, plant: calm,
		},
		{
			principle: "6 access control", mechanism: "access.Lock: memory by name, leases",
			experiment: "memory that the agreement gives by name, leased over Redfish and RDMA; outside of it; after the process has ended",
			run:        named, plant: calm,
		},
		{
			principle: "6 access control", mechanism: "access.Grant: detectors, rates",
			experiment: "an agreement that withholds a detector and bounds how often a quarantine may be begun",
			run:        bounded, plant: calm,
		},
		{
			principle: "1 remote I/O", mechanism: "MMIO of the host", experiment: "the host's device registers, read and written", missing: "no path of the laboratory reaches them, and the agent refuses them by all (above)",
		},
		{
			principle: "4 nonintrusiveness", mechanism: "reading by DMA",
			experiment: "instructions that a guest executes with an observer at the highest rate and without (icount)",
			run:        notOneInstruction,
			plant: func(_ context.Context, b *bench) (func() error, error) {
				b.onHost = true
				return func() error { b.onHost = false; return nil }, nil
			},
		},
		{
			principle: "4 nonintrusiveness", mechanism: "repair by the kernel's own functions",
			experiment: "what a guest executes more when a process is killed from outside, function by function (icount)",
			run:        repairCost, plant: calm,
		},
		{
			principle: "5 transparency", mechanism: "no driver, no device, no traffic on the host",
			experiment: "the host's root looks for the agent: PCI, ACPI, iomem, interrupts, devices, log, neighbours, scans; while it stands still and while it works",
			run:        transparent, plant: calm,
		},
		{
			principle: "5 transparency", mechanism: "reading by DMA", experiment: "timing of the host's own memory", missing: "an emulated machine has no memory bus to measure on",
		},
		{
			principle: "7 tamper resistance", mechanism: "several independent walks",
			experiment: "the host's root takes a process off init_task's list",
			run:        hide, plant: calm,
		},
		{
			principle: "7 tamper resistance", mechanism: "what proves a kernel does not lie in one place",
			experiment: "the host's root overwrites the kernel's VMCOREINFO note",
			run:        renote, plant: calm,
		},
		{
			principle: "7 tamper resistance", mechanism: "comparison with the copy; proofs of an attach",
			experiment: "the host's root changes the names of its kernel's symbols (kallsyms)",
			run:        edited("symbols", "kallsyms_", editSymbols), plant: calm,
		},
		{
			principle: "7 tamper resistance", mechanism: "comparison with the copy; proofs of an attach",
			experiment: "the host's root moves a member in its kernel's types (BTF)",
			run:        edited("types", "BTF", editTypes), plant: calm,
		},
		{
			principle: "7 tamper resistance", mechanism: "proofs of an attach",
			experiment: "the host's root plants notes of other kernels in its memory, some altered",
			run:        plantKernels, plant: calm,
		},
		{
			principle: "7 tamper resistance", mechanism: "compare-and-swap",
			experiment: "the host's root changes a word without pause while the agent stores to it (time of check, time of use)",
			run:        race, plant: calm,
		},
		{
			principle: "7 tamper resistance", mechanism: "clock, ticks, processes made, the log's sequence: they only rise",
			experiment: "the host's root puts old pages back (replay): the whole memory; the log alone",
			run:        replayed, plant: calm,
		},
		{
			principle: "7 tamper resistance", mechanism: "IOMMU", experiment: "the host reprograms its IOMMU, or points it elsewhere", missing: "the laboratory's window is not behind an IOMMU",
		},
		{
			principle: "3 availability", mechanism: "datapath: steer",
			experiment: "answers while the host is idle, computes, and floods: Redfish, and the health page by RDMA",
			run:        answersUnderFlood,
		},
		{
			principle: "3 availability", mechanism: "the DPU is a machine of its own",
			experiment: "the DPU restarts alone",
			run:        undisturbed, plant: calm,
		},
		// Behind all that needs the agreement: what is planted here ends it.
		{
			principle: "6 access control", mechanism: "access.Lock",
			experiment: "the agreement: widened, narrowed, closed, paused by who may not alone; paused by its owner",
			run:        locked, plant: calm,
		},
		{
			principle: "6 access control", mechanism: "backdoor-agree, access.Lock",
			experiment: "the host takes part in the agreement: it signs and hands it over once, and afterwards tries to widen, narrow and close it",
			run:        hostHasNoSay, plant: calm,
		},
		{
			principle: "3 availability", mechanism: "the DPU is a machine of its own",
			experiment: "Redfish while the host floods, is out of memory, has no network driver, is paused, reset, starts another kernel by kexec, has interrupts off, panics, is off",
			run:        available,
			plant: func(ctx context.Context, b *bench) (func() error, error) {
				return func() error { return b.lab.DPU.QMP(context.WithoutCancel(ctx), "cont", nil, nil) }, b.lab.DPU.QMP(ctx, "stop", nil, nil)
			},
		},
	}
}
