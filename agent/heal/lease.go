package heal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// ErrLeased means that another healer is at work on the host.
var ErrLeased = errors.New("another healer is at work on this host")

// Lease keeps two healers of one host (its DPU's and its BMC's) apart. It is the last word of a page that nobody uses, in the
// host's own memory, which is all that they share: zero, or the mark of who holds it, for as long as he carries out one plan.
// A holder that is gone is told by its mark's standing still for longer than a plan may take, on the clock of who waits. Where
// the path has no compare-and-swap, who has put his mark looks again after a moment whether it is still his.
//
// It is safe for concurrent use; a healer keeps one for each boot of its host.
type Lease struct {
	addr  hostmem.PhysAddr
	wait  time.Duration // before it is refused
	stale time.Duration // until a mark that stands still is nobody's

	mu    sync.Mutex
	ours  Bytes     // guarded by mu: a mark that we have left
	seen  uint64    // guarded by mu: another's mark
	since time.Time // guarded by mu: when that was first seen
}

const (
	leaseMark  = 0x3153414542440000 // the upper 32 bits of who holds it
	leaseMask  = 0xffffffff00000000
	leaseWait  = 5 * time.Second
	leaseStale = time.Minute // a plan is broken off after 30 s, and has 10 s for being undone
	// leaseSettle is longer than a store of ours may be under way.
	leaseSettle = 2 * time.Millisecond
)

// leaseOffset is where the lease is in its page.
const leaseOffset = hostmem.PageSize - 8

// FindLease finds where the lease of a host is: the highest page below 1 MiB that a mailbox could be, on AArch64 the only one. All healers come to the
// same.
func FindLease(v *kernel.View) (*Lease, error) { return findLease(newModel(v)) }

func findLease(m model) (*Lease, error) {
	if m.Info().Arch == archAArch64 {
		box, err := noteMailbox(m)
		if err != nil {
			return nil, fmt.Errorf("find the lease: %w", err)
		}
		return &Lease{addr: box.pa + leaseOffset, wait: leaseWait, stale: leaseStale}, nil
	}
	pages, err := newReservedPages(m)
	if err != nil {
		return nil, fmt.Errorf("find the lease: %w", err)
	}
	page := make([]byte, hostmem.PageSize)
	for pa := mailboxEnd - hostmem.PageSize; pa >= mailboxFirst; pa -= hostmem.PageSize {
		box, ok := pages.at(m, pa)
		if !ok || m.ReadVirt(box.va, page) != nil || !zero(page[:leaseOffset]) {
			continue
		}
		at := pa + leaseOffset
		if mark, err := read64(m, box.va+leaseOffset); err == nil && (mark == 0 || mark&leaseMask == leaseMark&leaseMask) {
			return &Lease{addr: at, wait: leaseWait, stale: leaseStale}, nil
		}
	}
	return nil, fmt.Errorf("find the lease: no free reserved page below 1 MiB: %w", kernel.ErrNotFound)
}

// LeaseKind is the kind of the journal's records of a lease.
const LeaseKind = "lease"

// Resume has a lease taken over at once that an earlier start of this healer took and did not give back: it was killed meanwhile. The
// record is the latest of LeaseKind in its journal.
func (l *Lease) Resume(record []byte) error {
	var h held
	if err := json.Unmarshal(record, &h); err != nil {
		return fmt.Errorf("the journal's record of a lease: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ours = nil; !h.Free && h.Addr == l.addr && len(h.Mark) == 8 {
		l.ours = h.Mark
	}
	return nil
}

// held is the journal's record that the lease is taken, or given back, before it is.
type held struct {
	Plan string           `json:"plan"`
	Addr hostmem.PhysAddr `json:"addr"`
	Mark Bytes            `json:"mark"`
	Free bool             `json:"free,omitempty"`
}

// lease takes the lease for a plan that stores, and returns what gives it back.
func (r *run) lease() (release func(), err error) {
	l := r.x.o.Lease
	if l == nil || len(r.p.Ranges()) == 0 {
		return func() {}, nil
	}
	fail := func(err error) (func(), error) { return nil, fmt.Errorf("take the lease of the host: %w", err) }
	mark := le(leaseMark&leaseMask|uint64(rand.Uint32()), 8)
	r.x.allowed = append(r.x.allowed, hostmem.Range{Start: l.addr, Size: 8})
	free := le(0, 8)
	for end := time.Now().Add(l.wait); ; {
		now := make(Bytes, 8)
		if _, err := r.x.guard.ReadAt(now, int64(l.addr)); err != nil {
			return fail(err)
		}
		if string(now) == string(free) || l.gone(now) {
			if _, err := r.x.o.Journal.Write(LeaseKind, held{r.p.ID, l.addr, mark, false}); err != nil {
				return fail(err)
			}
			how, swapped, err := r.swap(l.addr, now, mark)
			if err != nil {
				return fail(err)
			}
			if swapped && how != casStore {
				time.Sleep(leaseSettle)
				if _, err := r.x.guard.ReadAt(now, int64(l.addr)); err != nil {
					return fail(err)
				}
				swapped = string(now) == string(mark)
			}
			if swapped {
				break
			}
			continue
		}
		if time.Now().After(end) {
			return fail(ErrLeased)
		}
		select {
		case <-r.ctx.Done():
			return fail(r.ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return func() {
		if err := r.giveBack(mark); err != nil {
			r.x.log.Warn("give back the lease of the host", "plan", r.p.ID, "err", err)
		}
	}, nil
}

// giveBack frees the lease that is held by a mark.
func (r *run) giveBack(mark Bytes) error {
	l := r.x.o.Lease
	if _, err := r.x.o.Journal.Write(LeaseKind, held{r.p.ID, l.addr, mark, true}); err != nil {
		r.x.log.Error("cannot journal that the lease is given back", "plan", r.p.ID, "err", err) // others wait for it
	}
	ctx := r.ctx
	defer func() { r.ctx = ctx }()
	r.ctx = context.WithoutCancel(ctx)
	_, swapped, err := r.swap(l.addr, mark, le(0, 8))
	if err == nil && !swapped {
		err = errors.New("it is another's, or the host has restarted")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ours = nil; err != nil {
		l.ours = mark
	}
	return err
}

// GiveBack frees the lease that an earlier start of this healer has left, if there is one: see Resume.
func (x *Executor) GiveBack(ctx context.Context) error {
	l := x.o.Lease
	if l == nil {
		return nil
	}
	l.mu.Lock()
	mark := l.ours
	l.mu.Unlock()
	if mark == nil {
		return nil
	}
	select {
	case x.busy <- struct{}{}:
		defer func() { <-x.busy }()
	case <-ctx.Done():
		return ctx.Err()
	}
	x.allowed = []hostmem.Range{{Start: l.addr, Size: 8}}
	defer func() { x.allowed = nil }()
	now := make(Bytes, 8)
	if _, err := x.guard.ReadAt(now, int64(l.addr)); err != nil {
		return fmt.Errorf("give back the lease of the host: %w", err)
	}
	if string(now) != string(mark) {
		return nil
	}
	r := run{x: x, ctx: ctx}
	if err := r.giveBack(mark); err != nil {
		return fmt.Errorf("give back the lease of the host: %w", err)
	}
	return nil
}

// gone reports whether another's mark has stood still for so long that he is not there any more.
func (l *Lease) gone(mark Bytes) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ours != nil && string(mark) == string(l.ours) {
		return true
	}
	var v uint64
	for i := range mark {
		v |= uint64(mark[i]) << (8 * i)
	}
	if v != l.seen {
		l.seen, l.since = v, time.Now()
		return false
	}
	return time.Since(l.since) > l.stale
}
