package principles

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/tests/lab/wire"
)

// The monitor is a machine on the wire, in the agent's own network.
var (
	monitorMAC = mac("02:00:00:00:00:78")
	monitorIP  = netip.MustParseAddr("192.168.190.3")
)

// monitorLink is a roce.Link on the laboratory's wire: the frames that a network card would make, by this program.
type monitorLink struct {
	end    *wire.Endpoint
	frames chan roce.Frame
	wake   chan struct{}
	stop   context.CancelFunc
	done   <-chan struct{}

	id  uint16    // used by Send alone
	crc roce.ICRC // used by Send alone
}

// newMonitorLink answers ARP for the monitor, and carries RoCEv2 between it and the agent.
func newMonitorLink(ctx context.Context, end *wire.Endpoint) *monitorLink {
	ctx, stop := context.WithCancel(ctx)
	l := &monitorLink{end: end, frames: make(chan roce.Frame, 256), wake: make(chan struct{}, 1), stop: stop, done: ctx.Done()}
	go func() {
		for {
			b, err := end.Receive(ctx)
			if err != nil {
				return
			}
			if len(b) >= 42 && binary.BigEndian.Uint16(b[12:]) == 0x0806 && b[21] == 1 && netip.AddrFrom4([4]byte(b[38:])) == monitorIP {
				asks := net.HardwareAddr(b[22:28])
				_ = end.Send(eth(asks, monitorMAC, 0x0806, arp(2, monitorMAC, monitorIP, asks, netip.AddrFrom4([4]byte(b[28:])))))
				continue
			}
			f, err := roce.ParseFrame(b)
			if err != nil || !f.IsRoCE || f.Fragment || f.Dst().Addr() != monitorIP || !f.CheckICRC() {
				continue
			}
			select {
			case l.frames <- f:
			case <-ctx.Done():
				return
			}
		}
	}()
	return l
}

func (l *monitorLink) LocalAddr() netip.AddrPort { return netip.AddrPortFrom(monitorIP, roce.Port) }
func (l *monitorLink) PathMTU() int              { return 1024 }

func (l *monitorLink) Wake() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *monitorLink) Close() error {
	l.stop()
	return nil
}

func (l *monitorLink) Send(packets []roce.Packet) error {
	for _, p := range packets {
		l.id++
		f := roce.Frame{
			V4:  roce.IPv4Fields{ID: l.id, Flags: roce.DontFragment, TTL: 64, Src: monitorIP, Dst: p.Peer.Addr()},
			UDP: roce.UDPFields{SrcPort: roce.Port, DstPort: p.Peer.Port()},
		}
		copy(f.MAC[:], agentMAC)
		copy(f.MAC[6:], monitorMAC)
		f.Data = binary.LittleEndian.AppendUint32(slices.Clone(p.Data), l.crc.Sum(l.LocalAddr(), p.Peer, f.V4.ID, f.V4.Flags, p.Data))
		if err := l.end.Send(f.Append(nil)); err != nil {
			return err
		}
	}
	return nil
}

func (l *monitorLink) Recv(packets []roce.Packet, wait time.Duration) (int, error) {
	var late <-chan time.Time
	if wait >= 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		late = t.C
	}
	for n := 0; ; {
		select {
		case f := <-l.frames:
			packets[n] = roce.Packet{Peer: f.Src(), Data: f.Data[:len(f.Data)-4]}
			if n++; n == len(packets) {
				return n, nil
			}
			late = expired
		case <-l.wake:
			return n, nil
		case <-late:
			return n, nil
		case <-l.done:
			return n, net.ErrClosed
		}
	}
}

// expired is a time that has passed.
var expired = func() chan time.Time { c := make(chan time.Time); close(c); return c }()

// health connects the monitor to the agent's health page.
func (b *bench) health(ctx context.Context) (*export.Poller, error) {
	if b.poller != nil {
		return b.poller, nil
	}
	secret, err := os.ReadFile(filepath.Join(b.lab.DPU.StateDir, "rdma-key"))
	if err != nil {
		return nil, err
	}
	key, err := export.ParseKey("admin", string(secret))
	if err != nil {
		return nil, err
	}
	end, err := b.lab.Wire.Endpoint("monitor")
	if err != nil {
		return nil, err
	}
	dev, err := roce.Open(newMonitorLink(context.WithoutCancel(ctx), end), roce.Config{})
	if err != nil {
		return nil, errors.Join(err, end.Close())
	}
	b.monitor = dev
	b.poller = export.NewPoller(dev, export.DialKey(dev, agentIP, key))
	if _, err := b.poller.Health(ctx); err != nil {
		return nil, fmt.Errorf("the agent's health page: %w", err)
	}
	return b.poller, nil
}
