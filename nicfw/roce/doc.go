// Package roce is RoCEv2 reliable connections in pure Go: an ordinary verbs client (rdma-core, perftest, the kernel's
// rxe, a hardware NIC) reads, writes and atomically changes memory that this side exports, over a plain UDP port, without
// an RDMA device and without C; and this side does the same to memory that others export.
//
// A Link carries packets: ListenUDP over a socket, package afxdp past the system's network stack, NewPipe in memory with faults, Capture around any of them. A Device is
// an endpoint at a link's address. In it, a PD holds windows (MR) of a Region, which is any io.ReaderAt; a QP is one end
// of a connection, made by Connect from what both sides agreed upon by other means, or by Dial and Listen through the
// InfiniBand connection manager, which librdmacm speaks. A QP's methods make one request and wait (Read, Write, Send,
// CompareAndSwap, FetchAdd), many and wait (Do), or post and let completions come (Post and a CQ).
//
//	link, err := roce.ListenUDP(roce.UDPConfig{Addr: netip.MustParseAddrPort("192.0.2.1:0")})
//	dev, err := roce.Open(link, roce.Config{})
//	go dev.Run(ctx)
//	pd := dev.NewPD()
//	mr, err := pd.Register(memory, roce.MRConfig{Addr: 0x1000, Offset: 0x1000, Length: 1 << 20, Access: roce.AccessRead})
//	qp, err := dev.NewQP(pd, nil, roce.QPConfig{})
//	err = qp.Connect(roce.Remote{Addr: peer, QPN: itsQPN, PSN: itsPSN}) // and the peer is told qp.QPN(), qp.PSN(), mr.RKey()
//
// What a user must know:
//
//   - Nothing here is authenticated or encrypted. Queue pair numbers, keys and packet numbers are random, and a queue pair
//     listens to one address, so that somebody off the path must guess 80 bits to read; somebody on the path must guess
//     nothing. Hand out windows over an authenticated channel, short-lived and small, and run all of it inside a tunnel
//     where the path is not trusted.
//   - Regions are called with the Device's lock held. A region that takes long holds up all connections of its Device.
//   - READs are served from memory at the time that each packet leaves. A WRITE or an atomic operation that is posted
//     behind a READ may overtake it, as everywhere in RDMA: wait for the READ first.
//   - The word of an atomic operation is little endian, whatever the machine.
//
// The protocol is that of the InfiniBand Architecture Specification, volume 1, release 1.4, with annexes A11 (RDMA IP
// connection manager) and A17 (RoCEv2). DESIGN.md beside this file has the requirements and the state tables.
package roce
