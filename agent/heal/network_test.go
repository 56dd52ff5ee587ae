package heal

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
)

// path is a packet path in which only what it keeps back is real.
type path struct {
	c    Containment
	idle bool  // takes orders and does nothing
	err  error // what an order ends in, half-way
}

func (p *path) Containment() (Containment, error)              { return p.c, nil }
func (p *path) Restore(_ context.Context, c Containment) error { p.c = c; return nil }
func (p *path) Contain(_ context.Context, o NetworkOrder) (err error) {
	until := time.Now().Add(o.For)
	switch {
	case p.idle:
	case o.Do == Release:
		p.c = Containment{}
	case o.Do == RateLimit:
		p.c.Limit, p.c.Rate, p.c.Burst = until, o.Rate, o.Burst
	case o.Remote != nil:
		p.c.Blocked = append(slices.Clone(p.c.Blocked), Blocked{*o.Remote, until})
	default:
		p.c.Quarantine, p.c.Allow = until, o.Allow
	}
	return p.err
}

func TestContain(t *testing.T) {
	grantOf := func(actions ...string) access.Grant {
		return grant(t, func(a *access.Agreement) { a.Rights.Actions = actions })
	}
	everything := grantOf(IDs()...)
	was := Containment{Limit: time.Now().Add(time.Hour), Rate: 7, Burst: 10000}
	some := NetworkOrder{Do: Quarantine, For: time.Minute, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}
	one := NetworkOrder{Do: Quarantine, For: time.Minute, Remote: &Remote{Addr: netip.MustParseAddr("192.0.2.1"), Proto: 6, Port: 443}}
	for _, c := range []struct {
		name  string
		path  *path
		grant access.Grant
		order NetworkOrder
		err   error
		undo  bool
	}{
		{"quarantine", &path{c: was}, everything, some, nil, false},
		{"one remote", &path{c: was}, everything, one, nil, false},
		{"limit", &path{c: was}, everything, NetworkOrder{Do: RateLimit, For: time.Minute, Rate: 1000, Burst: 10000}, nil, false},
		{"release", &path{c: was}, everything, NetworkOrder{Do: Release}, nil, false},
		{"not in the agreement", &path{c: was}, grantOf(Release), some, access.ErrDenied, false},
		{"a path that does nothing", &path{c: was, idle: true}, everything, some, ErrNoEffect, true},
		{"a path that fails half-way", &path{c: was, err: errors.ErrUnsupported}, everything, some, errors.ErrUnsupported, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			j := &memJournal{}
			x := NewExecutor(Options{Grant: c.grant, Journal: j, Network: c.path})
			p := ContainPlan(c.order)
			p.ID = "plan-1"
			out, err := x.ApplyNext(t.Context(), p, "somebody")
			if !errors.Is(err, c.err) || err != nil && c.err == nil {
				t.Fatalf("error %v; want %v", err, c.err)
			}
			if c.err != nil {
				if diff := cmp.Diff(was, c.path.c, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
					t.Errorf("afterwards (-before +after):\n%s", diff)
				}
				if out.Undone != c.undo {
					t.Errorf("undone: %v; want %v", out.Undone, c.undo)
				}
				return
			}
			if !c.path.c.does(c.order) {
				t.Errorf("%+v does not do %+v", c.path.c, c.order)
			}
			if !slices.Equal(j.kinds, []string{"intent", "outcome"}) {
				t.Errorf("the journal has %v", j.kinds)
			}
			if out.Steps[0].Contained == nil || out.Steps[0].Contained.Rate != 7 {
				t.Errorf("the outcome does not tell what held before: %+v", out.Steps[0])
			}
		})
	}
	// Without a packet path, or without a journal, nothing is done.
	p := ContainPlan(some)
	p.ID = "plan-1"
	if _, err := NewExecutor(Options{Grant: everything, Journal: &memJournal{}}).ApplyNext(t.Context(), p, ""); !errors.Is(err, ErrNoNetwork) {
		t.Errorf("without a packet path: %v", err)
	}
	n := &path{}
	if _, err := NewExecutor(Options{Grant: everything, Network: n}).ApplyNext(t.Context(), p, ""); !errors.Is(err, access.ErrDenied) || n.c.Holds() {
		t.Errorf("without a journal: %v, %+v", err, n.c)
	}
}

func TestNetworkOrderCheck(t *testing.T) {
	addr := netip.MustParseAddr("192.0.2.1")
	for _, o := range []NetworkOrder{
		{}, {Do: "reboot"}, {Do: Quarantine}, {Do: Quarantine, For: 40 * 24 * time.Hour}, {Do: Release, For: time.Second},
		{Do: Release, Remote: &Remote{Addr: addr}}, {Do: Quarantine, For: time.Minute, Remote: &Remote{}},
		{Do: Quarantine, For: time.Minute, Remote: &Remote{Addr: addr, Port: 5}}, {Do: Quarantine, For: time.Minute, Rate: 5},
		{Do: Quarantine, For: time.Minute, Allow: make([]netip.Prefix, 1)}, {Do: RateLimit, For: time.Minute}, {Do: RateLimit, For: time.Minute, Rate: 5, Burst: 5},
	} {
		if o.Check() == nil {
			t.Errorf("%+v is taken", o)
		}
	}
}

// What answers a finding is a cure for a flood only.
func TestContainFindings(t *testing.T) {
	for _, kind := range detect.Kinds() {
		a, _ := Find(Quarantine)
		p, err := a.Plan(t.Context(), nil, detect.Finding{ID: "x-1", Kind: kind})
		if err != nil || p.Finding != "x-1" || p.More != (kind != detect.KindNetworkFlood) {
			t.Errorf("%s: %+v, %v", kind, p, err)
		}
		if err := checkForm(Plan{ID: "p", Action: p.Action, Steps: p.Steps}); err != nil {
			t.Error(err)
		}
	}
}
