package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/nicfw/datapath"
	"github.com/backdoor-rhs/backdoor/redfish/host"
)

const (
	// uplinkEvery is how often the agent looks whether its addresses on the uplink have changed.
	uplinkEvery = 5 * time.Second
	containFile = "containment.json"
)

// errNoGateway is why the network answers nothing yet.
var errNoGateway = errors.New("the packet path between the host and the wire does not run")

// gateway is the packet path between the host and the wire. It outlives this process; what it keeps back is kept in the state directory
// as well, so that a restart of the machine does not set free what is contained. It is an engine.Network and a host.Datapath.
type gateway struct {
	cfg      config.Datapath
	services []datapath.Service
	dir      string // of the state
	log      *slog.Logger

	order sync.Mutex // held while the containment changes

	mu   sync.Mutex
	open *datapath.Gateway // guarded by mu; nil until it runs
	own  []netip.Addr      // of run alone
	why  error             // guarded by mu: why it does not run
}

// newGateway returns nil if the configuration has no datapath.
func newGateway(cfg config.Config, log *slog.Logger) *gateway {
	if cfg.Datapath == nil {
		return nil
	}
	g := &gateway{cfg: *cfg.Datapath, dir: cfg.StateDir, log: log, why: errNoGateway}
	if _, port, err := net.SplitHostPort(cfg.Redfish.Listen); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err == nil {
			g.services = append(g.services, datapath.Service{Proto: datapath.TCP, Port: uint16(n)})
		}
	}
	if len(cfg.RDMA.Addresses) > 0 {
		g.services = append(g.services, datapath.Service{Proto: datapath.UDP, Port: 4791}) // of RoCEv2, as IANA has it
	}
	for _, t := range cfg.Boot.Tunnels {
		if t.ListenPort != 0 {
			g.services = append(g.services, datapath.Service{Proto: datapath.UDP, Port: uint16(t.ListenPort)})
		}
	}
	return g
}

// findInterface returns the interface with that name or hardware address.
func findInterface(match string) (net.Interface, error) {
	all, err := net.Interfaces()
	if err != nil {
		return net.Interface{}, fmt.Errorf("list network interfaces: %w", err)
	}
	i := slices.IndexFunc(all, func(i net.Interface) bool {
		return i.Name == match || strings.EqualFold(i.HardwareAddr.String(), match)
	})
	if i < 0 {
		return net.Interface{}, fmt.Errorf("there is no interface %s", match)
	}
	return all[i], nil
}

// run has the packet path go until ctx ends, and after that on without this process.
func (g *gateway) run(ctx context.Context) error {
	defer g.let()
	for {
		if err := g.follow(); err != nil {
			g.mu.Lock()
			g.why = err
			g.mu.Unlock()
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(uplinkEvery):
		}
	}
}

// let lets go of the packet path.
func (g *gateway) let() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open == nil {
		return
	}
	if err := g.open.Close(); err != nil {
		g.log.Warn("let go of the packet path", "err", err)
	}
	g.open, g.why = nil, errNoGateway
}

// follow opens the packet path, and tells it when the agent's addresses on the uplink have changed.
func (g *gateway) follow() error {
	inner, err := findInterface(g.cfg.Host)
	if err != nil {
		return err
	}
	uplink, err := findInterface(g.cfg.Uplink)
	if err != nil {
		return err
	}
	addrs, err := uplink.Addrs()
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", uplink.Name, err)
	}
	var own []netip.Addr
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				own = append(own, ip.Unmap())
			}
		}
	}
	slices.SortFunc(own, netip.Addr.Compare)
	g.mu.Lock()
	open := g.open
	g.mu.Unlock()
	if open != nil {
		if slices.Equal(own, g.own) {
			return nil
		}
		if err := open.SetOwn(own); err != nil {
			return err
		}
		g.own = own
		g.log.Info("the agent's addresses on the uplink have changed", "own", own)
		return nil
	}
	now, err := datapath.Open(datapath.Config{Host: inner.Name, Uplink: uplink.Name, Own: own, Services: g.services, Generic: g.cfg.Generic})
	if err != nil {
		return err
	}
	g.order.Lock()
	defer g.order.Unlock()
	if err := g.recall(now); err != nil {
		g.log.Error("bring back what kept the host's traffic back", "err", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open, g.own, g.why = now, own, nil
	if now.Yields != nil {
		g.log.Warn("a host that floods will slow the agent down", "err", now.Yields)
	}
	g.log.Info("the packet path runs", "host", inner.Name, "uplink", uplink.Name, "own", own, "services", g.services)
	return nil
}

// running returns the packet path, or why there is none.
func (g *gateway) running() (*datapath.Gateway, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open == nil {
		return nil, g.why
	}
	return g.open, nil
}

// Containment implements heal.Network.
func (g *gateway) Containment() (heal.Containment, error) {
	open, err := g.running()
	if err != nil {
		return heal.Containment{}, err
	}
	return containment(open)
}

func containment(open *datapath.Gateway) (heal.Containment, error) {
	c, err := open.Containment()
	if err != nil {
		return heal.Containment{}, err
	}
	out := heal.Containment{Quarantine: c.Quarantine, Allow: c.Allow, Limit: c.LimitEnds, Rate: c.Limit.Rate, Burst: c.Limit.Burst}
	for r, until := range c.Rules {
		out.Blocked = append(out.Blocked, heal.Blocked{Remote: heal.Remote{Addr: r.Remote.Unmap(), Proto: r.Proto, Port: r.Port}, Until: until})
	}
	slices.SortFunc(out.Blocked, func(a, b heal.Blocked) int { return a.Addr.Compare(b.Addr) })
	slices.SortFunc(out.Allow, netip.Prefix.Compare)
	return out, nil
}

// Contain implements heal.Network.
func (g *gateway) Contain(_ context.Context, o heal.NetworkOrder) error {
	open, err := g.running()
	if err != nil {
		return err
	}
	g.order.Lock()
	defer g.order.Unlock()
	switch {
	case o.Do == heal.Release:
		err = open.Release()
	case o.Do == heal.RateLimit:
		err = open.Limit(datapath.Limit{Rate: o.Rate, Burst: o.Burst}, o.For)
	case o.Do == heal.Quarantine && o.Remote != nil:
		err = open.Block(rule(*o.Remote), o.For)
	case o.Do == heal.Quarantine:
		err = open.Quarantine(slices.Concat(g.cfg.Allow, o.Allow), o.For)
	default:
		err = fmt.Errorf("the packet path knows no %q", o.Do)
	}
	if err != nil {
		return err
	}
	return g.remember(open)
}

func rule(r heal.Remote) datapath.Rule {
	return datapath.Rule{Remote: r.Addr.Unmap(), Proto: r.Proto, Port: r.Port}
}

// Restore implements heal.Network.
func (g *gateway) Restore(_ context.Context, c heal.Containment) error {
	open, err := g.running()
	if err != nil {
		return err
	}
	g.order.Lock()
	defer g.order.Unlock()
	if err := errors.Join(open.Release(), impose(open, c)); err != nil {
		return err
	}
	return g.remember(open)
}

// impose has what is left of c hold.
func impose(open *datapath.Gateway, c heal.Containment) error {
	now := time.Now()
	left := func(until time.Time) time.Duration { return min(until.Sub(now), datapath.Longest) }
	var errs []error
	if d := left(c.Quarantine); d > 0 {
		errs = append(errs, open.Quarantine(c.Allow, d))
	}
	if d := left(c.Limit); d > 0 {
		errs = append(errs, open.Limit(datapath.Limit{Rate: c.Rate, Burst: c.Burst}, d))
	}
	for _, b := range c.Blocked {
		if d := left(b.Until); d > 0 {
			errs = append(errs, open.Block(rule(b.Remote), d))
		}
	}
	return errors.Join(errs...)
}

// remember keeps what holds over restarts of the machine. g.order is held.
func (g *gateway) remember(open *datapath.Gateway) error {
	c, err := containment(open)
	if err != nil {
		return err
	}
	b, err := json.Marshal(c)
	if err == nil {
		err = durable.WriteFile(filepath.Join(g.dir, containFile), b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("keep what holds back the host's traffic, so that it outlives a restart: %w", err)
	}
	return nil
}

// recall has hold what held before the machine was restarted, if nothing holds. g.order is held.
func (g *gateway) recall(open *datapath.Gateway) error {
	now, err := containment(open)
	if err != nil || now.Holds() {
		return err
	}
	b, err := os.ReadFile(filepath.Join(g.dir, containFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var c heal.Containment
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		return err
	}
	return impose(open, c)
}

// mostFlows are shown.
const mostFlows = 100

// State implements host.Datapath.
func (g *gateway) State() (host.DatapathState, error) {
	var s host.DatapathState
	open, err := g.running()
	if err != nil {
		return s, err
	}
	for to, match := range map[*string]string{&s.HostPort: g.cfg.Host, &s.UplinkPort: g.cfg.Uplink} {
		i, err := findInterface(match)
		if err != nil {
			return s, err
		}
		*to = i.Name
	}
	c, err := open.Counters()
	if err != nil {
		return s, err
	}
	for p := range c {
		for v, n := range c[p] {
			s.Counters = append(s.Counters, host.DatapathCounter{
				Port: datapath.Port(p).String(), Verdict: datapath.Verdict(v).String(), Frames: n.Packets, Bytes: n.Bytes,
			})
		}
	}
	seen, err := open.Seen()
	if err != nil {
		return s, err
	}
	s.LastFrame, s.Flows = seen.Last, []host.DatapathFlow{}
	for f, err := range open.Flows() {
		if err != nil {
			return s, err
		}
		s.Flows = append(s.Flows, host.DatapathFlow{
			Host: f.Host.String(), Remote: f.Remote.String(), Protocol: int(f.Proto), Sent: f.Out.Packets, Received: f.In.Packets, Held: f.Held, Last: f.Last,
		})
	}
	slices.SortFunc(s.Flows, func(a, b host.DatapathFlow) int { return cmp.Compare(b.Sent+b.Received, a.Sent+a.Received) })
	s.Flows = s.Flows[:min(len(s.Flows), mostFlows)]
	return s, nil
}

// Sample implements engine.Network.
func (g *gateway) Sample(now time.Time) (detect.NetworkSample, error) {
	s := detect.NetworkSample{At: now}
	open, err := g.running()
	if err != nil {
		return s, err
	}
	c, err := open.Counters()
	if err != nil {
		return s, err
	}
	seen, err := open.Seen()
	if err != nil {
		return s, err
	}
	for _, n := range c[datapath.Host] {
		s.Sent += n.Packets
	}
	s.Forwarded, s.Last, s.SYN, s.RST = c[datapath.Host][datapath.Forwarded].Packets, seen.Last, seen.SYN, seen.RST
	s.Asked, s.Opened, s.Answered, s.Refused = seen.Asked, seen.Opened, seen.Answered, seen.Refused
	return s, nil
}
