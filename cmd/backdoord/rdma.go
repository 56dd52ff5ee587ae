package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/boot/wireguard"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/redfish/host"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Limits of one peer of RDMA.
const (
	rdmaQPsPerPeer = 24
	rdmaHalfOpen   = 4
	rdmaMaxRead    = 16 << 20
)

// remote is the agent's RDMA: an exporter for each address. It is what Redfish hands leases out of.
type remote struct {
	cfg  config.RDMA
	keys []export.Key
	w    *worker

	mu  sync.Mutex
	svc *service.Service                // knows the accounts; guarded by mu
	at  map[netip.Addr]*export.Exporter // those that run; guarded by mu
}

// loadKeys reads the keys of the configuration.
func loadKeys(c config.RDMA) ([]export.Key, error) {
	var keys []export.Key
	for _, k := range c.Keys {
		b, err := os.ReadFile(k.File)
		if err != nil {
			return nil, fmt.Errorf("RDMA key of %q: %w", k.User, err)
		}
		key, err := export.ParseKey(k.User, strings.TrimSpace(string(b)))
		if err != nil {
			return nil, fmt.Errorf("%w: %s", err, k.File)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// openRDMA prepares RDMA, if the configuration names addresses for it.
func (w *worker) openRDMA(p *parts) {
	if len(w.cfg.RDMA.Addresses) > 0 {
		w.remote = &remote{cfg: w.cfg.RDMA, keys: p.keys, w: w, at: map[netip.Addr]*export.Exporter{}}
	}
}

// offerRDMA lets the service hand out leases.
func (w *worker) offerRDMA(o *host.Options, svc *service.Service) {
	if w.remote != nil {
		o.RDMA = w.remote
		w.remote.know(svc)
	}
}

// serveRDMA serves each address until ctx ends.
func (w *worker) serveRDMA(ctx context.Context, wg *sync.WaitGroup) {
	if w.remote == nil {
		return
	}
	for _, addr := range w.cfg.RDMA.Addresses {
		wg.Go(func() {
			supervise(ctx, w.log, "RDMA on "+addr.String(), func(ctx context.Context) error { return w.remote.serve(ctx, addr) })
		})
	}
}

// know tells which service has the accounts.
func (r *remote) know(svc *service.Service) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.svc = svc
}

// serve serves one address until ctx ends.
func (r *remote) serve(ctx context.Context, addr netip.Addr) error {
	tunnel, err := wireguard.Covers(addr)
	if err != nil && r.cfg.Encrypted {
		return err
	}
	// What is inside a tunnel must come through it, and what is for the wire not from the host.
	link, err := roce.ListenUDP(roce.UDPConfig{Addr: netip.AddrPortFrom(addr, 0), PathMTU: r.cfg.PathMTU, Spin: r.cfg.Spin.Std(), OwnInterface: true})
	if err != nil {
		return err
	}
	dev, err := roce.Open(link, roce.Config{Logger: r.w.log, Limits: roce.Limits{
		QPsPerPeer: rdmaQPsPerPeer, HalfOpenPerPeer: rdmaHalfOpen, MaxRead: rdmaMaxRead, BytesPerSecond: int64(r.cfg.BytesPerSecond),
	}})
	if err != nil {
		return errors.Join(err, link.Close())
	}
	defer dev.Close()
	o := export.Options{
		Device: dev, Host: r.w.engine, Authorize: r.authorize, Audit: r.audit, Keys: r.keys, MemoryByKey: r.cfg.MemoryByKey, Alarm: r.alarm, Logger: r.w.log,
	}
	if r.w.journal != nil {
		o.Journal = r.w.journal
	}
	if r.cfg.Encrypted && !tunnel {
		o.Closed = fmt.Errorf("the policy rdma.encrypted gives leases through a tunnel only, and %v is not in one: %w", addr, export.ErrDenied)
	}
	x := export.New(o)
	r.mu.Lock()
	r.at[addr] = x
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.at, addr)
	}()
	r.w.log.Info("RDMA is served", "addr", addr, "pathMTU", dev.PathMTU(), "tunnel", tunnel, "leases", o.Closed == nil)
	stop := serveLab(ctx, r.w, dev)
	defer stop()
	return x.Run(ctx)
}

// authorize asks the service's accounts.
func (r *remote) authorize(user string, right export.Right) error {
	r.mu.Lock()
	svc := r.svc
	r.mu.Unlock()
	if svc == nil {
		return fmt.Errorf("the Redfish service, which knows the accounts, does not run: %w", export.ErrDenied)
	}
	c, ok := svc.Caller(user)
	if !ok {
		return fmt.Errorf("there is no enabled account %q: %w", user, export.ErrDenied)
	}
	for _, p := range privileges[right] {
		reads := p == host.PrivilegeReadMemory && c.May(host.PrivilegeMemory) // who may store may read
		if !c.May(p) && !reads {
			return fmt.Errorf("%s lacks the privilege %s: %w", user, p, export.ErrDenied)
		}
	}
	if privileges[right] == nil {
		return fmt.Errorf("nobody has the right %q: %w", right, export.ErrDenied)
	}
	return nil
}

// privileges are those that Redfish asks for the same, but that memory is read with the privilege for diagnostic data, too.
var privileges = map[export.Right][]string{
	export.RightWatch:  {service.Login},
	export.RightMemory: {service.ConfigureComponents, host.PrivilegeReadMemory},
	export.RightStore:  {service.ConfigureComponents, host.PrivilegeMemory},
	export.RightHeal:   {service.ConfigureComponents, host.PrivilegeHeal},
	export.RightPower:  {service.ConfigureComponents},
}

// audit keeps what was done by RDMA in the same trail as what was done over Redfish.
func (r *remote) audit(a export.Audit) {
	rec := service.AuditRecord{Time: a.Time, User: a.User, Address: a.Peer, What: a.What, URI: "rdma:" + a.What, Change: a.Change, Status: 200}
	if a.Err != nil {
		rec.Status, rec.Error = 500, a.Err.Error()
		if errors.Is(a.Err, export.ErrDenied) {
			rec.Status = 403
		}
	}
	r.w.log.Info("RDMA", "what", a.What, "user", a.User, "peer", a.Peer, "err", a.Err)
	if r.w.journal == nil {
		return
	}
	if err := host.Audit(r.w.journal)(rec); err != nil {
		r.w.log.Error("the audit trail is not kept", "what", a.What, "user", a.User, "err", err)
	}
}

func (r *remote) alarm(e export.Event) {
	r.w.log.Warn("RDMA", "what", e.What, "text", e.Text)
	r.mu.Lock()
	svc := r.svc
	r.mu.Unlock()
	if svc != nil {
		svc.Publish(host.RDMARefused(e.Text))
	}
}

// running returns the exporters that run, in the order of the configuration.
func (r *remote) running() (addrs []netip.Addr, all []*export.Exporter) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.cfg.Addresses {
		if x := r.at[a]; x != nil {
			addrs, all = append(addrs, a), append(all, x)
		}
	}
	return addrs, all
}

// Lease implements host.RDMA.
func (r *remote) Lease(q host.RDMARequest) (host.RDMALease, error) {
	kind, err := export.ParseKind(q.Kind)
	if err != nil {
		return host.RDMALease{}, err
	}
	addrs, all := r.running()
	if from := sourceFor(q.Peer); slices.Contains(addrs, from) {
		addrs, all = []netip.Addr{from}, []*export.Exporter{all[slices.Index(addrs, from)]}
	}
	for i, a := range addrs {
		if a.Is4() != q.Peer.Is4() {
			continue
		}
		l, err := all[i].Lease(export.Request{
			User: q.User, Kind: kind, Peer: q.Peer, QPN: roce.QPN(q.QPN), PSN: roce.PSN(q.PSN), PathMTU: q.PathMTU,
			Start: q.Start, Length: q.Length, Write: q.Write, Atomic: q.Atomic, Lifetime: q.Lifetime,
		})
		switch {
		case errors.Is(err, export.ErrDenied):
			return host.RDMALease{}, service.Because(403, "InsufficientPrivilege", err.Error()+".")
		case errors.Is(err, roce.ErrLimit):
			return host.RDMALease{}, service.Because(503, "ServiceTemporarilyUnavailable", err.Error()+". End a lease, or wait until one ends.", "10")
		case err != nil:
			return host.RDMALease{}, err
		}
		return shownLease(a, l), nil
	}
	return host.RDMALease{}, service.Because(503, "ServiceTemporarilyUnavailable", fmt.Sprintf("RDMA is not served now on an address that %v can reach.", q.Peer), "5")
}

// sourceFor returns the address that packets to a peer leave from, as far as this machine knows a way; it sends nothing.
func sourceFor(peer netip.Addr) netip.Addr {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer, roce.Port)))
	if err != nil {
		return netip.Addr{}
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap().WithZone("")
}

func shownLease(at netip.Addr, l export.Lease) host.RDMALease {
	return host.RDMALease{
		ID: l.ID, User: l.User, Kind: l.Kind.String(), Peer: l.Peer.String(), Address: at.String(), QPN: uint32(l.QPN), PSN: uint32(l.PSN), PathMTU: l.PathMTU,
		Expires: l.Expires, Write: l.Write, Atomic: l.Atomic, RKey: uint32(l.RKey), Start: fmt.Sprintf("%#x", l.Addr), Length: fmt.Sprintf("%#x", l.Length),
		MapKey: uint32(l.MapKey), MapLength: uint32(l.MapLength),
	}
}

// Revoke implements host.RDMA.
func (r *remote) Revoke(id, user string) error {
	_, all := r.running()
	err := fmt.Errorf("revoke %q: %w", id, export.ErrNoLease)
	for _, x := range all {
		for _, l := range x.Leases() {
			if l.ID == id {
				err = x.Revoke(id, user)
			}
		}
	}
	return err
}

// State implements host.RDMA.
func (r *remote) State() host.RDMAState {
	s := host.RDMAState{Addresses: []string{}, Leases: []host.RDMALease{}, Counters: []host.RDMACounter{}}
	addrs, all := r.running()
	sum := map[string]uint64{}
	for i, x := range all {
		s.Addresses = append(s.Addresses, addrs[i].String())
		for _, l := range x.Leases() {
			// The list is for everybody who may log in: it shows who has what, and no key.
			shown := shownLease(addrs[i], l)
			shown.RKey, shown.MapKey, shown.QPN, shown.PSN = 0, 0, 0, 0
			s.Leases = append(s.Leases, shown)
		}
		st := x.Stats()
		s.Stores += st.Writes.Stores + st.Writes.Swaps
		s.Refused += st.Refused
		s.Dropped += st.Dropped
		for name, n := range st.Packets {
			sum[name] += n
		}
	}
	for name, n := range sum {
		s.Counters = append(s.Counters, host.RDMACounter{Name: name, Value: n})
	}
	slices.SortFunc(s.Counters, func(a, b host.RDMACounter) int { return strings.Compare(a.Name, b.Name) })
	return s
}
