package export

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// Kind is what a lease is for.
type Kind uint8

// The kinds.
const (
	KindMemory Kind = 1 + iota
	KindHealth
	KindActions
)

// String returns the kind's name.
func (k Kind) String() string {
	if int(k) < len(kinds) && k > 0 {
		return kinds[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

var kinds = [...]string{KindMemory: "memory", KindHealth: "health", KindActions: "actions"}

// ParseKind returns the kind of that name.
func ParseKind(name string) (Kind, error) {
	if i := slices.Index(kinds[1:], name); i >= 0 {
		return Kind(i + 1), nil
	}
	return 0, fmt.Errorf("a lease is for one of %v, not %q", kinds[1:], name)
}

// Request asks for a lease.
type Request struct {
	User string
	Kind Kind
	// Peer, QPN and PSN are the other end of the connection; PathMTU is the payload of its packets, 0 for what fits here.
	Peer    netip.Addr
	QPN     roce.QPN
	PSN     roce.PSN
	PathMTU int
	// Start and Length bound the window of KindMemory, in host physical addresses; a Length of 0 means up to the end of RAM.
	Start, Length uint64
	Write, Atomic bool
	Lifetime      time.Duration // 0 is ten minutes
}

// Lease is what the peer must know.
type Lease struct {
	ID      string     `json:"id"`
	User    string     `json:"user"`
	Kind    Kind       `json:"-"`
	Peer    netip.Addr `json:"peer"`
	QPN     roce.QPN   `json:"qpn"`
	PSN     roce.PSN   `json:"psn"`
	PathMTU int        `json:"pathMTU"`
	Expires time.Time  `json:"expires"`
	Write   bool       `json:"write"`
	Atomic  bool       `json:"atomic"`
	// RKey is the key of the Length bytes at Addr: of the host's memory, where an address is the physical one, or of the health
	// page. KindActions has none.
	RKey   roce.RKey `json:"rkey"`
	Addr   uint64    `json:"addr"`
	Length uint64    `json:"length"`
	// MapKey is the key of the RAM map of KindMemory, MapLength bytes at address 0; see ParseRAMMap.
	MapKey    roce.RKey `json:"mapKey"`
	MapLength uint64    `json:"mapLength"`
}

// lease is a Lease with its machinery.
type lease struct {
	Lease
	qp     *roce.QP
	mrs    []*roce.MR
	ended  bool        // guarded by Exporter.mu
	stored uint64      // bytes; the device calls one at a time
	named  atomic.Bool // the agreement gives memory by names: each read asks anew
}

// right is what a lease needs.
func right(k Kind, stores bool) Right {
	switch {
	case k == KindMemory && stores:
		return RightStore
	case k == KindMemory:
		return RightMemory
	}
	return RightWatch
}

// Lease makes a lease for a peer that was told to us by other means than connection management, such as Redfish. The caller has
// authenticated the user.
func (x *Exporter) Lease(r Request) (Lease, error) {
	l, err := x.lease(r, func(pd *roce.PD, cq *roce.CQ, cfg roce.QPConfig, _ []byte) (*roce.QP, error) {
		qp, err := x.o.Device.NewQP(pd, cq, cfg)
		if err != nil {
			return nil, err
		}
		if err := qp.Connect(roce.Remote{Addr: r.Peer, QPN: r.QPN, PSN: r.PSN}); err != nil {
			qp.Close()
			return nil, err
		}
		return qp, nil
	})
	x.audit(r, l, err)
	if err != nil {
		return Lease{}, err
	}
	return l.Lease, nil
}

func (x *Exporter) audit(r Request, l *lease, err error) {
	change := map[string]any{"kind": r.Kind.String()}
	if r.Kind == KindMemory {
		change["start"], change["length"], change["write"], change["atomic"] = r.Start, r.Length, r.Write, r.Atomic
	}
	if l != nil {
		change["lease"], change["expires"] = l.ID, l.Expires
	}
	x.o.Audit(Audit{Time: time.Now(), User: r.User, Peer: r.Peer.String(), What: "lease", Change: change, Err: err})
}

// connector makes the queue pair of a lease; private is what connection management tells the peer.
type connector func(pd *roce.PD, cq *roce.CQ, cfg roce.QPConfig, private []byte) (*roce.QP, error)

func (x *Exporter) lease(r Request, connect connector) (_ *lease, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("lease %v to %s at %v: %w", r.Kind, r.User, r.Peer, err)
		}
	}()
	if r.Kind < KindMemory || r.Kind > KindActions {
		return nil, fmt.Errorf("there is no %v", r.Kind)
	}
	if r.User == "" {
		return nil, fmt.Errorf("nobody asks for it: %w", ErrDenied)
	}
	if x.o.Closed != nil {
		return nil, x.o.Closed
	}
	if err := x.o.Authorize(r.User, right(r.Kind, r.Write || r.Atomic)); err != nil {
		return nil, err
	}
	r.Lifetime = min(cmp.Or(r.Lifetime, defaultLifetime), x.o.MaxLifetime)
	if r.Lifetime <= 0 {
		return nil, fmt.Errorf("a lifetime of %v", r.Lifetime)
	}
	l := &lease{Lease: Lease{ID: newID(), User: r.User, Kind: r.Kind, Peer: r.Peer}}
	var ram *roce.Buffer
	if r.Kind == KindMemory {
		if ram, err = x.bound(&r); err != nil {
			return nil, err
		}
	}
	l.Expires = time.Now().Add(r.Lifetime).Truncate(time.Second)
	if err := x.admit(l); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			x.end(l, 0)
		}
	}()
	pd := x.o.Device.NewPD()
	register := func(region roce.Region, addr, length uint64, how roce.Access) (*roce.MR, error) {
		mr, err := pd.Register(region, roce.MRConfig{Addr: addr, Offset: int64(addr), Length: length, Access: how, Lifetime: r.Lifetime})
		if err == nil {
			l.mrs = append(l.mrs, mr)
		}
		return mr, err
	}
	cfg := roce.QPConfig{PathMTU: r.PathMTU, IdleTimeout: x.o.Idle, RNRRetry: 6}
	var mr *roce.MR
	var cq *roce.CQ
	switch r.Kind {
	case KindMemory:
		how := roce.AccessRead
		if r.Write {
			how |= roce.AccessWrite
		}
		if r.Atomic {
			how |= roce.AccessAtomic
		}
		l.Write, l.Atomic = r.Write, r.Atomic
		if mr, err = register(newWindow(x, l), r.Start, r.Length, how); err != nil {
			return nil, err
		}
		m, err := register(ram, 0, uint64(ram.Len()), roce.AccessRead)
		if err != nil {
			return nil, err
		}
		l.MapKey, l.MapLength = m.RKey(), m.Len()
	case KindHealth:
		if mr, err = register(x.page, 0, PageSize, roce.AccessRead); err != nil {
			return nil, err
		}
	case KindActions:
		cq = x.o.Device.NewCQ()
		cfg.RecvDepth = actionDepth
	}
	if mr != nil {
		l.RKey, l.Addr, l.Length = mr.RKey(), mr.Addr(), mr.Len()
	}
	qp, err := connect(pd, cq, cfg, l.private())
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	l.qp, l.QPN, l.PSN, l.PathMTU = qp, qp.QPN(), qp.PSN(), qp.PathMTU()
	ended := l.ended
	x.mu.Unlock()
	if ended {
		return nil, errors.New("it was revoked before it began")
	}
	if r.Kind == KindActions {
		if err := x.serveActions(l, cq); err != nil {
			return nil, err
		}
	}
	go func() {
		<-qp.Done()
		x.end(l, grace)
	}()
	x.log.Info("lease", "lease", l.ID, "kind", l.Kind.String(), "user", l.User, "peer", l.Peer, "qpn", l.QPN, "expires", l.Expires)
	return l, nil
}

// bound completes the window that is asked for, has the agreement judge it, and returns its RAM map.
func (x *Exporter) bound(r *Request) (*roce.Buffer, error) {
	mem, known, err := x.o.Host.HostMemory()
	if err != nil {
		return nil, err
	}
	ranges := mem.Map()
	if len(ranges) == 0 {
		return nil, errors.New("the host's memory has no RAM")
	}
	end := uint64(ranges[len(ranges)-1].End())
	if r.Start >= end {
		return nil, fmt.Errorf("the host's RAM ends at %#x", end)
	}
	if r.Length == 0 {
		r.Length = end - r.Start
	}
	if r.Length > end-r.Start {
		return nil, fmt.Errorf("%#x bytes at %#x reach beyond the end of the host's RAM at %#x", r.Length, r.Start, end)
	}
	g := x.o.Host.Grant()
	if err := g.PermitMemory(r.Start, r.Length, true, r.Write, r.Atomic); err != nil {
		return nil, err
	}
	if r.Write || r.Atomic {
		if err := x.o.Host.WritesOn(); err != nil {
			return nil, err
		}
		if x.o.Journal == nil || !known {
			return nil, fmt.Errorf("stores need a journal, and a kernel of the host that says what is RAM: %w", ErrDenied)
		}
	}
	if until := time.Until(g.Until()); until < r.Lifetime {
		r.Lifetime = until
	}
	return ramMap(ranges, r.Start, r.Length), nil
}

// admit takes a lease in if its user and all others have not too many.
func (x *Exporter) admit(l *lease) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	n := 0
	for _, o := range x.leases {
		if o.User == l.User {
			n++
		}
	}
	if n >= maxUserLeases || len(x.leases) >= maxLeases {
		return fmt.Errorf("%w: %s has %d leases, and there are %d", roce.ErrLimit, l.User, n, len(x.leases))
	}
	x.leases[l.ID] = l
	return nil
}

// end revokes a lease: no packet is served from then on. Its queue pair refuses for a while before it goes.
func (x *Exporter) end(l *lease, grace time.Duration) {
	x.mu.Lock()
	qp, was := l.qp, l.ended
	l.ended = true
	delete(x.leases, l.ID)
	x.mu.Unlock()
	if was && grace > 0 {
		return
	}
	for _, mr := range l.mrs {
		mr.Revoke()
	}
	if qp == nil {
		return
	}
	if grace > 0 && l.Kind != KindActions {
		time.AfterFunc(grace, func() { qp.Close() })
		return
	}
	qp.Close()
}

func (x *Exporter) endAll() {
	for _, l := range x.all() {
		x.end(l, 0)
	}
}

func (x *Exporter) all() []*lease {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []*lease
	for _, l := range x.leases {
		out = append(out, l)
	}
	return out
}

// sweep ends the leases whose time is over or whose right is gone.
func (x *Exporter) sweep(now time.Time) {
	for _, l := range x.all() {
		var why error
		switch {
		case now.After(l.Expires):
			why = errors.New("it has expired")
		default:
			why = x.o.Authorize(l.User, right(l.Kind, l.Write || l.Atomic))
			if why == nil && l.Kind == KindMemory {
				g := x.o.Host.Grant()
				l.named.Store(g.Named())
				why = g.PermitMemory(l.Addr, l.Length, true, l.Write, l.Atomic)
			}
		}
		if why != nil {
			x.log.Info("lease ends", "lease", l.ID, "user", l.User, "why", why)
			x.end(l, grace)
		}
	}
}

// Revoke ends a lease at once, in the middle of whatever is being transferred.
func (x *Exporter) Revoke(id, user string) error {
	x.mu.Lock()
	l := x.leases[id]
	x.mu.Unlock()
	var err error
	if l == nil {
		err = fmt.Errorf("revoke %q: %w", id, ErrNoLease)
	} else {
		x.end(l, grace)
	}
	x.o.Audit(Audit{Time: time.Now(), User: user, What: "revoke", Change: map[string]any{"lease": id}, Err: err})
	return err
}

// Leases returns those that there are, by their end.
func (x *Exporter) Leases() []Lease {
	x.mu.Lock()
	defer x.mu.Unlock()
	out := make([]Lease, 0, len(x.leases))
	for _, l := range x.leases {
		out = append(out, l.Lease)
	}
	slices.SortFunc(out, func(a, b Lease) int {
		return cmp.Or(a.Expires.Compare(b.Expires), cmp.Compare(a.ID, b.ID))
	})
	return out
}

func newID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// The private data of a connection reply: version 1, kind, rights (1 write, 2 atomic), reserved, rkey 4, address 8, length 8,
// expiry in seconds since 1970 8, key of the RAM map 4, its length 4, the lease's Id 8; little endian.
const privateLen = 48

func (l *lease) private() []byte {
	le := binary.LittleEndian
	b := []byte{1, byte(l.Kind), 0, 0}
	if l.Write {
		b[2] |= 1
	}
	if l.Atomic {
		b[2] |= 2
	}
	b = le.AppendUint32(b, uint32(l.RKey))
	b = le.AppendUint64(b, l.Addr)
	b = le.AppendUint64(b, l.Length)
	b = le.AppendUint64(b, uint64(l.Expires.Unix()))
	b = le.AppendUint32(b, uint32(l.MapKey))
	b = le.AppendUint32(b, uint32(l.MapLength))
	id, _ := hex.DecodeString(l.ID) // newID has encoded it
	return append(b, id...)
}

// parsePrivate takes the private data of a connection reply apart.
func parsePrivate(b []byte) (Lease, error) {
	if len(b) < privateLen || b[0] != 1 || b[1] < byte(KindMemory) || b[1] > byte(KindActions) {
		return Lease{}, fmt.Errorf("the connection reply % .4x… is that of no agent, or of a newer one", b)
	}
	le := binary.LittleEndian
	return Lease{
		Kind: Kind(b[1]), Write: b[2]&1 != 0, Atomic: b[2]&2 != 0, RKey: roce.RKey(le.Uint32(b[4:])), Addr: le.Uint64(b[8:]),
		Length: le.Uint64(b[16:]), Expires: time.Unix(int64(le.Uint64(b[24:])), 0).UTC(), MapKey: roce.RKey(le.Uint32(b[32:])),
		MapLength: uint64(le.Uint32(b[36:])), ID: hex.EncodeToString(b[40:privateLen]),
	}, nil
}

// accept answers connection requests until ctx ends.
func (x *Exporter) accept(ctx context.Context, l *roce.Listener) error {
	for {
		c, err := l.Accept(ctx)
		if err != nil {
			return err
		}
		x.answer(c)
	}
}

// answer makes a lease for a connection request with a good token, and rejects all others.
func (x *Exporter) answer(c *roce.ConnRequest) {
	now := time.Now()
	r, err := x.tokens.check(now, c.Private(), c.Peer(), x.o.Device.Link().LocalAddr().Addr())
	if err != nil {
		// Who has proved nothing is told nothing, but for the time: a monitor must know it to make a token.
		x.log.Warn("connection request without a good token", "peer", c.Peer(), "err", err)
		c.Reject(rejection(now, "the token is no good"))
		return
	}
	r.Peer, r.PathMTU = c.Peer(), c.PathMTU()
	if r.Kind == KindMemory && !x.o.MemoryByKey {
		err = fmt.Errorf("policy gives the host's memory by leases over Redfish only: %w", ErrDenied)
	}
	var got *lease
	if err == nil {
		got, err = x.lease(r, func(pd *roce.PD, cq *roce.CQ, cfg roce.QPConfig, private []byte) (*roce.QP, error) {
			return c.Accept(pd, cq, cfg, private)
		})
	}
	x.audit(r, got, err)
	if err != nil {
		x.log.Warn("connection request refused", "peer", c.Peer(), "user", r.User, "err", err)
		c.Reject(rejection(now, err.Error()))
	}
}

// The private data of a rejection: version 1, 3 reserved, the agent's time in ns since 1970, 8 little endian, a text.
func rejection(now time.Time, why string) []byte {
	b := binary.LittleEndian.AppendUint64([]byte{1, 0, 0, 0}, uint64(now.UnixNano()))
	text := make([]byte, roce.MaxREJPrivate-len(b))
	cut(text, why)
	return append(b, text...)
}

// parseRejection takes a rejection apart; ok is false if it is none of ours.
func parseRejection(b []byte) (now time.Time, why string, ok bool) {
	if len(b) < 12 || b[0] != 1 {
		return now, "", false
	}
	return moment(binary.LittleEndian.Uint64(b[4:])), text(b[12:]), true
}
