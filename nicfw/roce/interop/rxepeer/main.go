// rxepeer serves perftest and rping clients with memory of its own, for interoperability tests.
//
// Synopsis:
//
//	rxepeer [-addr ADDR] [-size BYTES] [-access rwa] [-mtu BYTES] [-resources N] [-spin DURATION] [-loss P] [-rping ADDR:PORT] [-check ADDR:PORT] [-uverbs]
//
// Description:
//
// It listens on UDP port 4791 of ADDR, for perftest on TCP port 18515, for perftest -R and rping by connection manager
// on ports 18515 and 7174, and for testdata/verify.c on port 7175, until it gets SIGINT. With -rping it connects to an rping server instead, plays ten rounds and
// ends; with -check it reads and verifies the memory of another rxepeer and ends. With -uverbs the kernel's verbs device at ADDR serves the memory, to perftest with keys over TCP alone.
//
// Example:
//
//	rxepeer -addr 10.77.0.1
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/nicfw/roce/interop"
	"github.com/backdoor-rhs/backdoor/nicfw/roce/uverbs"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "rxepeer:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, w io.Writer) error {
	f := flag.NewFlagSet("rxepeer", flag.ContinueOnError)
	f.SetOutput(w)
	addr := f.String("addr", "127.0.0.1", "address to listen on")
	size := f.Int("size", 64<<20, "bytes of memory")
	access := f.String("access", "rwa", "rights: read, write, atomic")
	mtu := f.Int("mtu", 0, "path MTU; 0 is what fits the interface")
	resources := f.Int("resources", 0, "READ and atomic requests that a peer may have outstanding; 0 is 16")
	spin := f.Duration("spin", 0, "busy polling before sleeping")
	offload := f.Bool("offload", true, "use UDP_SEGMENT and UDP_GRO")
	loss := f.Float64("loss", 0, "probability that a packet gets lost, each way; likewise duplicated and reordered")
	port := f.Uint("port", 18515, "TCP port of perftest")
	verbs := f.Bool("uverbs", false, "serve by the kernel's verbs device")
	rping := f.String("rping", "", "rping server to connect to")
	check := f.String("check", "", "memory service to read and verify")
	if err := f.Parse(args); err != nil {
		return err
	}
	ip, err := netip.ParseAddr(*addr)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(w, nil))
	if *verbs {
		return runVerbs(ctx, ip, uint16(*port), *size, log)
	}
	link, err := roce.ListenUDP(roce.UDPConfig{Addr: netip.AddrPortFrom(ip, 0), PathMTU: *mtu, Spin: *spin, NoOffload: !*offload})
	if err != nil {
		return err
	}
	if *loss > 0 {
		link = roce.Impair(link, roce.Faults{Seed: 1, Loss: *loss, Dup: *loss, Reorder: *loss})
	}
	dev, err := roce.Open(link, roce.Config{Logger: log})
	if err != nil {
		return err
	}
	defer dev.Close()
	errs := make(chan error, 5)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() { errs <- dev.Run(ctx) }()
	if *rping != "" {
		server, err := netip.ParseAddrPort(*rping)
		if err != nil {
			return err
		}
		return interop.Rping(ctx, dev, server.Addr(), server.Port(), 10)
	}
	if *check != "" {
		server, err := netip.ParseAddrPort(*check)
		if err != nil {
			return err
		}
		n, err := interop.CheckMemory(ctx, dev, server.Addr(), server.Port())
		log.Info("checked memory", "bytes", n, "err", err, "counters", dev.Counters().String())
		return err
	}
	mem := roce.NewBuffer(*size)
	if err := interop.Fill(mem, int64(mem.Len())); err != nil {
		return err
	}
	s := &interop.Server{Device: dev, Region: mem, Length: uint64(mem.Len()), QP: roce.QPConfig{Resources: *resources}, Log: log}
	for _, c := range *access {
		switch c {
		case 'r':
			s.Access |= roce.AccessRead
		case 'w':
			s.Access |= roce.AccessWrite
		case 'a':
			s.Access |= roce.AccessAtomic
		default:
			return fmt.Errorf("no such right: %q", c)
		}
	}
	tcp, err := net.Listen("tcp", netip.AddrPortFrom(ip, uint16(*port)).String())
	if err != nil {
		return err
	}
	defer tcp.Close()
	go func() { errs <- s.ServePerftest(ctx, tcp) }()
	cm, err := dev.Listen(roce.ServiceTCP(18515))
	if err != nil {
		return err
	}
	go func() { errs <- s.ServePerftestCM(ctx, cm) }()
	pings, err := dev.Listen(roce.ServiceTCP(7174))
	if err != nil {
		return err
	}
	go func() { errs <- s.ServeRping(ctx, pings) }()
	memory, err := dev.Listen(roce.ServiceTCP(7175))
	if err != nil {
		return err
	}
	go func() { errs <- s.ServeMemory(ctx, memory) }()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-errs:
			log.Info("end", "counters", dev.Counters().String(), "link", fmt.Sprintf("%+v", link.(interface{ Counters() roce.LinkCounters }).Counters()))
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		case <-tick.C:
			log.Info("counters", "device", dev.Counters().String(), "link", fmt.Sprintf("%+v", link.(interface{ Counters() roce.LinkCounters }).Counters()))
		}
	}
}

// runVerbs serves perftest by a verbs device of the kernel.
func runVerbs(ctx context.Context, ip netip.Addr, port uint16, size int, log *slog.Logger) error {
	dev, err := uverbs.Open(ip)
	if err != nil {
		return err
	}
	defer dev.Close()
	mem := roce.NewBuffer(size)
	if err := interop.Fill(mem, int64(mem.Len())); err != nil {
		return err
	}
	s := &interop.Server{Verbs: dev, Region: mem, Length: uint64(mem.Len()), Log: log,
		Access: roce.AccessRead | roce.AccessWrite | roce.AccessAtomic, QP: roce.QPConfig{Resources: 16}}
	l, err := net.Listen("tcp", netip.AddrPortFrom(ip, port).String())
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	log.Info("serve by verbs device", "device", dev.Name(), "addr", l.Addr())
	if err := s.ServePerftest(ctx, l); ctx.Err() == nil {
		return err
	}
	return nil
}
