package access

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Keys: 1 owner, 2 and 3 monitors, 4 a monitor to come, 5 to 7 for emergencies, 9 a stranger.
func lockable() *Agreement {
	a := sample()
	a.Monitors = append(a.Monitors, Party{"second", pub(key(3))})
	a.Quorum = 1
	a.Emergency = &Emergency{
		Keys: []Party{{"e1", pub(key(5))}, {"e2", pub(key(6))}, {"e3", pub(key(7))}}, Threshold: 2,
		Actions: []string{"power-cycle"}, Power: true, Longest: 3600,
	}
	return a
}

func sign(t testing.TB, a *Agreement, seeds ...byte) *Agreement {
	t.Helper()
	for _, s := range seeds {
		if err := a.Sign(key(s)); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func digest(t testing.TB, a *Agreement) string {
	t.Helper()
	d, err := a.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

type lockTest struct {
	*Lock
	t    *testing.T
	path string
	now  time.Time
	a    *Agreement
}

func newLock(t *testing.T) *lockTest {
	t.Helper()
	l := &lockTest{t: t, path: filepath.Join(t.TempDir(), "lock"), now: time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC), a: sign(t, lockable(), 1, 2, 3)}
	l.open()
	if err := l.Offer(l.a); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *lockTest) open() {
	l.t.Helper()
	lock, err := OpenLock(l.path, key(1).Public().(ed25519.PublicKey), func() time.Time { return l.now })
	if err != nil {
		l.t.Fatal(err)
	}
	l.Lock = lock
}

func (l *lockTest) order(kind string, sequence uint64, lasts time.Duration, seeds ...byte) *Order {
	l.t.Helper()
	o := &Order{Version: 1, Agreement: digest(l.t, l.a), Sequence: sequence, Order: kind, Issued: l.now, Reason: "test"}
	if lasts != 0 {
		until := l.now.Add(lasts)
		o.Until = &until
	}
	for _, s := range seeds {
		if err := o.Sign(key(s)); err != nil {
			l.t.Fatal(err)
		}
	}
	return o
}

// permits wants that what is permitted now, and is still after the agent was started anew.
func (l *lockTest) permits(when, what string, want bool) {
	l.t.Helper()
	for range 2 {
		if err := l.Grant(uuid).Permit(what); (err == nil) != want || err != nil && !errors.Is(err, ErrDenied) {
			l.t.Errorf("%s: Permit(%s) = %v; want permitted %v", when, what, err, want)
		}
		l.open()
	}
}

func TestOwnerStops(t *testing.T) {
	l := newLock(t)
	l.permits("at first", Write, true)
	for what, o := range map[string]*Order{
		"a monitor's":           l.order(Pause, 1, 0, 2, 3),
		"a stranger's":          l.order(Pause, 1, 0, 9),
		"the emergency keys'":   l.order(Pause, 1, 0, 5, 6, 7),
		"a monitor's to revoke": l.order(Revoke, 1, 0, 2, 3, 9),
	} {
		if err := l.Obey(o); !errors.Is(err, ErrUnsigned) {
			t.Errorf("%s order: %v; want ErrUnsigned", what, err)
		}
	}
	pause := l.order(Pause, 10, 0, 1)
	if err := l.Obey(pause); err != nil {
		t.Fatal(err)
	}
	if err := l.Grant(uuid).Permit(Read); err == nil || !strings.Contains(err.Error(), "has paused") {
		t.Errorf("Permit while paused = %v", err)
	}
	l.permits("paused", Read, false)
	resume := l.order(Resume, 11, 0, 1)
	if err := l.Obey(resume); err != nil {
		t.Fatal(err)
	}
	l.permits("resumed", Write, true)
	for _, o := range []*Order{pause, resume, l.order(Pause, 11, 0, 1)} {
		if err := l.Obey(o); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "higher sequence") {
			t.Errorf("order %d played again: %v", o.Sequence, err)
		}
	}
	if err := l.Obey(l.order(Pause, 12, time.Hour, 1)); err != nil {
		t.Fatal(err)
	}
	l.permits("paused for an hour", Write, false)
	l.now = l.now.Add(time.Hour)
	l.permits("an hour later", Write, true)
	if err := l.Obey(l.order(Revoke, 13, 0, 1)); err != nil {
		t.Fatal(err)
	}
	l.permits("revoked", Read, false)
	if err := l.Obey(l.order(Resume, 14, 0, 1)); !errors.Is(err, ErrDenied) {
		t.Errorf("Resume after Revoke = %v", err)
	}
	if err := l.Offer(l.a); err != nil {
		t.Fatal(err) // the same one changes nothing
	}
	l.permits("the revoked one offered again", Read, false)
	next := lockable()
	next.ID = "lab-2"
	if err := l.Offer(sign(t, next, 1, 2, 3)); err != nil {
		t.Errorf("a new agreement after a revoked one: %v", err)
	}
	l.permits("a new agreement", Read, true)
	if err := l.Offer(l.a); !errors.Is(err, ErrLocked) {
		t.Errorf("a revoked agreement offered later: %v", err)
	}
}

// A grant that was made before an order, or before a successor, falls under them.
func TestGrantIsLive(t *testing.T) {
	l := newLock(t)
	g := l.Grant(uuid)
	if err := g.Permit(Write); err != nil {
		t.Fatal(err)
	}
	if err := l.Obey(l.order(Pause, 1, 0, 1)); err != nil {
		t.Fatal(err)
	}
	if err := g.Permit(Write); err == nil {
		t.Error("a grant from before the pause permits")
	}
	if err := l.Obey(l.order(Resume, 2, 0, 1)); err != nil {
		t.Fatal(err)
	}
	next := lockable()
	next.ID, next.Succeeds, next.Rights.Write = "lab-2", digest(t, l.a), false
	if err := l.Offer(sign(t, next, 1, 2, 3)); err != nil {
		t.Fatal(err)
	}
	if err := g.Permit(Read); err == nil {
		t.Error("a grant of the agreement that was succeeded permits")
	}
	if err := l.Grant(uuid).Permit(Write); err == nil {
		t.Error("the successor's grant permits what only its predecessor gave")
	}
}

func TestNobodyAloneChanges(t *testing.T) {
	wider := func(l *lockTest) *Agreement {
		a := lockable()
		a.ID, a.Rights.Power = "lab-2", true
		a.Monitors = []Party{{"new", pub(key(4))}}
		return a
	}
	for _, tt := range []struct {
		name  string
		make  func(*lockTest) *Agreement
		is    error
		power bool
	}{
		{"the owner with friends", func(l *lockTest) *Agreement { a := wider(l); return sign(t, a, 1, 4) }, ErrLocked, false},
		{"named, without the monitors", func(l *lockTest) *Agreement { a := wider(l); a.Succeeds = digest(t, l.a); return sign(t, a, 1, 4) }, ErrUnsigned, false},
		{"endorsed by strangers", func(l *lockTest) *Agreement {
			a := wider(l)
			a.Succeeds = digest(t, l.a)
			return sign(t, a, 1, 4, 5, 6, 9)
		}, ErrUnsigned, false},
		{"without the owner", func(l *lockTest) *Agreement {
			a := wider(l)
			a.Succeeds = digest(t, l.a)
			return sign(t, a, 4, 2, 3)
		}, ErrUnsigned, false},
		{"another owner", func(l *lockTest) *Agreement {
			a := wider(l)
			a.Owner, a.Succeeds = Party{"other", pub(key(9))}, digest(t, l.a)
			return sign(t, a, 9, 4, 2, 3, 1)
		}, ErrUnsigned, false},
		{"endorsed by one monitor", func(l *lockTest) *Agreement {
			a := wider(l)
			a.Succeeds = digest(t, l.a)
			return sign(t, a, 1, 4, 3)
		}, nil, true},
		{"narrowed by the owner alone", func(l *lockTest) *Agreement {
			a := lockable()
			a.ID, a.Rights.Write = "lab-2", false
			a.Monitors = []Party{{"new", pub(key(4))}}
			return sign(t, a, 1, 4)
		}, ErrLocked, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLock(t)
			if err := l.Offer(tt.make(l)); !errors.Is(err, tt.is) || tt.is == nil && err != nil {
				t.Errorf("Offer = %v; want %v", err, tt.is)
			}
			l.permits("after it", Power, tt.power)
			l.permits("after it", Write, true)
		})
	}

	// When it has ended, a new one needs nobody's leave; and a clock that goes back does not bring the old one back.
	l := newLock(t)
	next := wider(l)
	next.ValidUntil = next.ValidUntil.AddDate(1, 0, 0)
	sign(t, next, 1, 4)
	l.now = l.a.ValidUntil
	l.permits("ended", Read, false)
	l.now = l.now.AddDate(0, -1, 0)
	l.permits("ended, and the clock set back", Read, false)
	if err := l.Offer(next); err != nil {
		t.Error(err)
	}
	l.permits("the next one", Power, true)
}

func TestEmergency(t *testing.T) {
	l := newLock(t)
	l.permits("before", "power-cycle", false)
	for _, tt := range []struct {
		name string
		o    *Order
		is   error
	}{
		{"one key", l.order(Break, 1, time.Hour, 5), ErrUnsigned},
		{"owner and monitors", l.order(Break, 1, time.Hour, 1, 2, 3), ErrUnsigned},
		{"too long", l.order(Break, 1, time.Hour+time.Second, 5, 6), ErrDenied},
	} {
		if err := l.Obey(tt.o); !errors.Is(err, tt.is) {
			t.Errorf("%s: %v; want %v", tt.name, err, tt.is)
		}
	}
	if err := l.Obey(l.order(Break, 1, time.Hour, 5, 7)); err != nil {
		t.Fatal(err)
	}
	l.permits("broken", "power-cycle", true)
	l.permits("broken", Power, true)
	l.permits("broken", "stop-fork-bomb", false)
	if o := l.Orders(); len(o) != 1 || o[0].Order != Break {
		t.Errorf("orders in force = %v", o)
	}
	// The owner is above it.
	if err := l.Obey(l.order(Pause, 2, 0, 1)); err != nil {
		t.Fatal(err)
	}
	l.permits("paused", "power-cycle", false)
	if err := l.Obey(l.order(Resume, 3, 0, 1)); err != nil {
		t.Fatal(err)
	}
	l.permits("resumed", "power-cycle", false)
	if err := l.Obey(l.order(Break, 4, time.Minute, 6, 7)); err != nil {
		t.Fatal(err)
	}
	l.permits("broken again", "power-cycle", true)
	l.now = l.now.Add(time.Minute)
	l.permits("over", "power-cycle", false)
}

// Who can write to the lock's file can take rights away, but cannot make any.
func TestLockFile(t *testing.T) {
	l := newLock(t)
	if err := l.Obey(l.order(Break, 1, time.Hour, 5, 6)); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{
		"more rights":         {`"power": false`, `"power": true`},
		"another order":       {`"order": "break"`, `"order": "pause"`},
		"a longer emergency":  {`"sequence": 1`, `"sequence": 2`},
		"another version":     {`"version": 1,`, `"version": 2,`},
		"not JSON":            {`{`, `[`},
		"a field that is new": {`"seen"`, `"saw"`},
	} {
		b := bytes.Replace(whole, []byte(change[0]), []byte(change[1]), 1)
		if bytes.Equal(b, whole) {
			t.Fatalf("%s: nothing to change", name)
		}
		if err := os.WriteFile(l.path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenLock(l.path, key(1).Public().(ed25519.PublicKey), nil); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
	if err := os.WriteFile(l.path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLock(l.path, key(9).Public().(ed25519.PublicKey), nil); !errors.Is(err, ErrUnsigned) {
		t.Errorf("opened with another owner's key: %v", err)
	}
	l.open()
	l.permits("unchanged", "power-cycle", true)
	if err := (*Lock)(nil).Grant(uuid).Permit(Read); !errors.Is(err, ErrDenied) {
		t.Errorf("without a lock: %v", err)
	}
}

func FuzzOrder(f *testing.F) {
	a := sign(f, lockable(), 1, 2, 3)
	for _, kind := range []string{Pause, Break} {
		until := time.Date(2026, 6, 1, 1, 0, 0, 0, time.UTC)
		o := &Order{Version: 1, Agreement: digest(f, a), Sequence: 7, Order: kind, Issued: until.Add(-time.Hour), Until: &until, Reason: "x"}
		if err := o.Sign(key(2)); err != nil { // nobody who may
			f.Fatal(err)
		}
		b, err := json.Marshal(o)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := ParseOrder(bytes.NewReader(b))
		if (o == nil) == (err == nil) {
			t.Fatalf("ParseOrder = %v, %v; want a value or an error", o, err)
		}
		if err == nil && o.authorised(a) == nil {
			t.Fatalf("an order that nobody signed is authorised: %s", b)
		}
	})
}
