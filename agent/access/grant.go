package access

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// ErrDenied means that the agreement does not permit what was asked for, or that there is none.
var ErrDenied = errors.New("not permitted by the access agreement")

// errNoResolver is why nothing is given by a name.
var errNoResolver = errors.New("no kernel of the host is attached that says where that is")

// Grant is what an agreement permits on one host. The zero value permits nothing. It is immutable.
type Grant struct {
	agreement *Agreement
	denied    string // why nothing is permitted
	now       func() time.Time
	lock      *Lock // whose orders count as well; nil if none do
	names     Resolver
}

// Resolver says what the names of rights.memory stand for. It is asked at each use and must not rely on what it once was; it asks the
// host's memory, so no lock that a look at it needs may be held meanwhile.
type Resolver interface {
	// Inside returns nil if the size bytes at start are wholly within what the entry, which has a name, stands for now: for a process that
	// they may be stored to, if write is set. Else it says why not, or why that cannot be told. What may not be touched is no part of it: no
	// process for which permit returns an error, and of no other what such a process stores to as well.
	Inside(m Memory, start, size uint64, write bool, permit func(tgid int, kthread bool, uid uint32, comm string) error) error
}

// Resolving returns the grant with what resolves its names. Without it, or with nil, what is given by a name is denied.
func (g Grant) Resolving(r Resolver) Grant {
	g.names = r
	return g
}

// Named returns whether anything is given by a name, so that who holds a lease must ask anew at each use.
func (g Grant) Named() bool {
	return g.agreement != nil && slices.ContainsFunc(g.agreement.Rights.Memory, func(m Memory) bool { return m.Names() != "" })
}

// Grant applies the agreement to the host with that system UUID. It never fails: a grant for the wrong host denies
// everything and says why. The time of validity is judged at each use. A nil agreement denies everything. The agreement
// must have come from Load, which has verified it.
func (a *Agreement) Grant(hostUUID string, now func() time.Time) Grant {
	g := Grant{agreement: a, now: now}
	if g.now == nil {
		g.now = time.Now
	}
	switch {
	case a == nil:
		g.denied = "there is no access agreement; have the host's owner sign one"
	case hostUUID == "":
		g.denied = fmt.Sprintf("the host's system UUID is not known, and agreement %s is for host %s", a.ID, a.Host.UUID)
	case !strings.EqualFold(a.Host.UUID, hostUUID):
		g.denied = fmt.Sprintf("agreement %s is for host %s (%s), and this host is %s", a.ID, a.Host.UUID, a.Host.Name, strings.ToLower(hostUUID))
	}
	return g
}

// Denied returns why nothing at all is permitted now, or nil.
func (g Grant) Denied() error {
	if g.lock != nil {
		if err := g.lock.Shut(); err != nil {
			return err
		}
	}
	if g.agreement == nil && g.denied == "" {
		g.denied = "there is no access agreement; have the host's owner sign one"
	}
	if g.denied == "" {
		now := g.now()
		switch a := g.agreement; {
		case now.Before(a.ValidFrom):
			g.denied = fmt.Sprintf("agreement %s is valid only from %s on, and it is %s", a.ID, a.ValidFrom.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		case !now.Before(a.ValidUntil):
			g.denied = fmt.Sprintf("agreement %s ended at %s; have the owner sign a new one", a.ID, a.ValidUntil.UTC().Format(time.RFC3339))
		}
	}
	if g.denied == "" && g.lock != nil {
		if g.lock.inForce(g.agreement, Revoke) != nil {
			g.denied = fmt.Sprintf("agreement %s was revoked or succeeded by another one", g.agreement.ID)
		} else if o := g.lock.inForce(g.agreement, Pause); o != nil {
			g.denied = fmt.Sprintf("the owner has paused agreement %s (order %d: %q)", g.agreement.ID, o.Sequence, o.Reason)
		}
	}
	if g.denied != "" {
		return fmt.Errorf("%s: %w", g.denied, ErrDenied)
	}
	return nil
}

// broken returns what an emergency permits besides; nil if there is none.
func (g Grant) broken() *Emergency {
	if g.lock == nil || g.lock.inForce(g.agreement, Break) == nil {
		return nil
	}
	return g.agreement.Emergency
}

// Permit returns nil if what, which is Read, Write, Power or the ID of a healing action, is permitted now.
// An action's permission does not contain Write or Power: it needs them besides.
func (g Grant) Permit(what string) error {
	if err := g.Denied(); err != nil {
		return err
	}
	r := g.agreement.Rights
	var also Emergency
	if e := g.broken(); e != nil {
		also = *e
	}
	var ok bool
	switch what {
	case Read:
		ok = r.Read
	case Write:
		ok = r.Write || also.Write
	case Power:
		ok = r.Power || also.Power
	default:
		ok = slices.Contains(r.Actions, what) || slices.Contains(also.Actions, what)
	}
	if !ok {
		return fmt.Errorf("agreement %s does not give %q: %w", g.agreement.ID, what, ErrDenied)
	}
	return nil
}

// PermitDetector returns nil if a detector may judge the host. Without an agreement all may; one that is paused or has ended still binds.
func (g Grant) PermitDetector(id string) error {
	if g.agreement == nil || g.agreement.Rights.Detectors == nil || slices.Contains(g.agreement.Rights.Detectors, id) {
		return nil
	}
	return fmt.Errorf("agreement %s does not give the detector %q: %w", g.agreement.ID, id, ErrDenied)
}

// PermitRate returns nil if an action may be begun at a time, as often as it has been begun before. What an emergency permits has no rate.
func (g Grant) PermitRate(action string, now time.Time, begun []time.Time) error {
	if err := g.Denied(); err != nil {
		return err
	}
	i := slices.IndexFunc(g.agreement.Rights.Rates, func(r Rate) bool { return r.Action == action })
	if e := g.broken(); i < 0 || e != nil && slices.Contains(e.Actions, action) {
		return nil
	}
	r := g.agreement.Rights.Rates[i]
	within, n := time.Duration(r.Within)*time.Second, 0
	next := now // when the oldest that counts no longer does
	for _, t := range begun {
		if now.Sub(t) < within {
			if n++; t.Before(next) {
				next = t
			}
		}
	}
	if n < r.Most {
		return nil
	}
	return fmt.Errorf("agreement %s gives %q %d times within %v, and it was begun %d times; wait until %s, or have an emergency declared: %w",
		g.agreement.ID, action, r.Most, within, n, next.Add(within).UTC().Format(time.RFC3339), ErrDenied)
}

// PermitValue returns nil if an action may be given a value. What an emergency permits is bounded by the action alone.
func (g Grant) PermitValue(action, name string, n int64) error {
	if err := g.Permit(action); err != nil {
		return err
	}
	if e := g.broken(); e != nil && slices.Contains(e.Actions, action) {
		return nil
	}
	bound := false
	for _, v := range g.agreement.Rights.Values {
		if v.Action != action {
			continue
		}
		bound = true
		switch {
		case v.Name != name:
		case n < v.Min || n > v.Max:
			return fmt.Errorf("agreement %s gives %q for %s %d to %d, not %d; ask within that, or have the owner sign another: %w", g.agreement.ID, action, name, v.Min, v.Max, n, ErrDenied)
		default:
			return nil
		}
	}
	if bound {
		return fmt.Errorf("agreement %s does not give %q for %s; have the owner sign one that does: %w", g.agreement.ID, action, name, ErrDenied)
	}
	return nil
}

// PermitMemory returns nil if a monitor may reach the size bytes at start by itself now, in all the ways asked for.
func (g Grant) PermitMemory(start, size uint64, read, write, atomic bool) error {
	if err := g.PermitMemoryByTwo(start, size, read, write, atomic); err != nil {
		return err
	}
	if e := g.broken(); e != nil && e.Write {
		return nil // several persons have said so
	}
	if (write || atomic) && g.agreement.Rights.TwoPersons {
		return fmt.Errorf("agreement %s takes two persons for a store by address; have another operator say yes: %w", g.agreement.ID, ErrDenied)
	}
	return nil
}

// PermitMemoryByTwo is PermitMemory for two monitors who both want it.
func (g Grant) PermitMemoryByTwo(start, size uint64, read, write, atomic bool) error {
	if err := g.Permit(Read); err != nil {
		return err
	}
	if write || atomic {
		if err := g.Permit(Write); err != nil {
			return err
		}
	}
	given := g.agreement.Rights.Memory
	if e := g.broken(); e != nil && e.Write {
		return nil
	}
	if given == nil && !write && !atomic {
		return nil
	}
	given = slices.DeleteFunc(slices.Clone(given), func(m Memory) bool { return read && !m.Read || write && !m.Write || atomic && !m.Atomic })
	for _, m := range given {
		if m.Names() == "" && start >= m.Start && start-m.Start <= m.Size && size <= m.Size-(start-m.Start) {
			return nil
		}
	}
	var why []string
	for _, m := range given {
		name := m.Names()
		if name == "" {
			continue
		}
		err := errNoResolver
		if g.names != nil {
			err = g.names.Inside(m, start, size, write || atomic, g.PermitTask)
		}
		if err == nil {
			return nil
		}
		why = append(why, fmt.Sprintf("; by %s: %v", name, err))
	}
	return fmt.Errorf("agreement %s does not give monitors such access to the %#x bytes at %#x%s: %w", g.agreement.ID, size, start, strings.Join(why, ""), ErrDenied)
}

// Until returns when the agreement ends; the zero time if there is none.
func (g Grant) Until() time.Time {
	if g.agreement == nil {
		return time.Time{}
	}
	return g.agreement.ValidUntil
}

// PermitTask returns nil if actions may touch a task of that user and name. Init and kernel threads are never touched;
// that rule stands above every agreement.
func (g Grant) PermitTask(tgid int, kthread bool, uid uint32, comm string) error {
	if err := g.Denied(); err != nil {
		return err
	}
	switch {
	case tgid <= 0:
		return fmt.Errorf("no process is named: %w", ErrDenied)
	case tgid == 1:
		return fmt.Errorf("PID 1 is init, which is never touched: %w", ErrDenied)
	case kthread:
		return fmt.Errorf("PID %d is a kernel thread, which is never touched: %w", tgid, ErrDenied)
	}
	for _, p := range g.agreement.Protected {
		if p.covers(uid, comm) {
			return fmt.Errorf("agreement %s protects processes of user %d named %q: %w", g.agreement.ID, uid, comm, ErrDenied)
		}
	}
	return nil
}

// Agreement returns the ID of the agreement that the grant comes from; empty if there is none.
func (g Grant) Agreement() string {
	if g.agreement == nil {
		return ""
	}
	return g.agreement.ID
}
