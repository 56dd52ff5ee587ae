//go:build backdoor_lab

package main

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/nicfw/roce/interop"
)

// serveLab gives RDMA clients that know nothing of leases what they ask for, without asking who they are: the host's memory to read,
// and scratch memory of the agent's own to write to and to count in. perftest exchanges its keys over TCP or, with -R, by connection
// management, on port 18515; scratch memory is on 18516. perftest 4.5 finds its server by IPv4 only (ethernet_client_connect in
// perftest_communication.c), whatever the addresses of the RDMA itself are (its option -x): the keys for IPv6 are on TCP ports 18615 and
// 18616 of any IPv4 address. rping is on 7174, librdmacm clients that read the host's memory on 7175, and 7176 pings who knocks
// there. It is in no release image: only the build tag backdoor_lab has it.
func serveLab(ctx context.Context, w *worker, dev *roce.Device) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	log := w.log.With("lab", "rdma")
	log.Warn("this agent is built for a laboratory: it gives the host's memory to everybody")
	fail := func(what string, err error) {
		if ctx.Err() == nil {
			log.Error(what, "err", err)
		}
	}
	var wg sync.WaitGroup
	addr := dev.Link().LocalAddr().Addr()
	serve := func(s *interop.Server, port uint16) {
		at := netip.AddrPortFrom(addr, port)
		if addr.Is6() {
			at = netip.AddrPortFrom(netip.IPv4Unspecified(), port+100)
		}
		tcp, err := net.Listen("tcp", at.String())
		if err != nil {
			fail("listen for perftest", err)
			return
		}
		context.AfterFunc(ctx, func() { tcp.Close() })
		wg.Go(func() { fail("serve perftest", s.ServePerftest(ctx, tcp)) })
		cm, err := dev.Listen(roce.ServiceTCP(port))
		if err != nil {
			fail("listen for perftest -R", err)
			return
		}
		wg.Go(func() { fail("serve perftest -R", s.ServePerftestCM(ctx, cm)) })
	}
	const all = roce.AccessRead | roce.AccessWrite | roce.AccessAtomic
	scratch := roce.NewBuffer(16 << 20)
	serve(&interop.Server{Device: dev, Region: scratch, Length: uint64(scratch.Len()), Access: all, QP: roce.QPConfig{Resources: 16}, Log: log}, 18516)
	pings, err := dev.Listen(roce.ServiceTCP(7174))
	if err == nil {
		wg.Go(func() {
			fail("serve rping", (&interop.Server{Device: dev, QP: roce.QPConfig{Resources: 16}, Log: log}).ServeRping(ctx, pings))
		})
	}
	// Who asks for a connection on 7176 is rejected, and pinged at its own rping server.
	if back, err := dev.Listen(roce.ServiceTCP(7176)); err == nil {
		wg.Go(func() {
			for {
				c, err := back.Accept(ctx)
				if err != nil {
					fail("ping back", err)
					return
				}
				c.Reject(nil)
				wg.Go(func() {
					err := interop.Rping(ctx, dev, c.Peer(), 7174, 10)
					log.Info("pinged back", "peer", c.Peer(), "err", err)
				})
			}
		})
	}
	wg.Go(func() {
		// The host's memory is there when the engine has opened it, and its size is then known.
		for ctx.Err() == nil {
			mem, known, err := w.engine.HostMemory()
			if err != nil || !known {
				time.Sleep(100 * time.Millisecond)
				continue
			}
			ram := mem.Map()
			s := &interop.Server{Device: dev, Region: export.ReadOnly(w.engine), Length: uint64(ram[len(ram)-1].End()), Access: roce.AccessRead, QP: roce.QPConfig{Resources: 16}, Log: log}
			if l, err := dev.Listen(roce.ServiceTCP(7175)); err == nil {
				wg.Go(func() { fail("serve memory", s.ServeMemory(ctx, l)) })
			}
			for _, r := range ram {
				if r.Contains(labRAM, 1) { // perftest begins at the beginning, and there must be RAM
					p := *s
					p.Region, p.Length = section{s.Region, labRAM}, uint64(r.End()-labRAM)
					serve(&p, 18515)
				}
			}
			return
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// labRAM is where every PC of some size has RAM.
const labRAM = 16 << 20

// section is a region from an offset on.
type section struct {
	roce.Region
	base int64
}

func (s section) ReadAt(p []byte, off int64) (int, error) { return s.Region.ReadAt(p, s.base+off) }
