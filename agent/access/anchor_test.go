package access

import (
	"crypto/sha256"
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

// memory is an anchor that outlives the agent, as a TPM does, and whose power can be cut: after that many writes, none comes through.
type memory struct {
	is, next [sha256.Size]byte
	there    bool
	writes   int // since the start
	cut      int // the write that no longer comes through; 0: all do
}

var errCut = errors.New("power cut")

func (m *memory) Read() (is, next [sha256.Size]byte, ok bool, err error) {
	return m.is, m.next, m.there, nil
}

func (m *memory) Write(is, next [sha256.Size]byte) error {
	if m.writes++; m.cut != 0 && m.writes >= m.cut {
		return errCut
	}
	m.is, m.next, m.there = is, next, true
	return nil
}

// restart opens the file again, with the anchor.
func (l *lockTest) restart(a Anchor) error {
	l.t.Helper()
	l.open()
	l.Await()
	if err := l.Grant(uuid).Permit(Read); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "waits") {
		l.t.Errorf("Permit before the anchor is there = %v", err)
	}
	return l.Anchor(a)
}

func (l *lockTest) file() []byte {
	l.t.Helper()
	b, err := os.ReadFile(l.path)
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

// TestAnchoredFile puts other files in the lock's place than the one that the anchor knows.
func TestAnchoredFile(t *testing.T) {
	l := newLock(t)
	m := &memory{}
	untied := l.file()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(l.restart(m)) // it is from before there was an anchor
	must(l.Grant(uuid).Permit(Write))
	running := l.file()
	must(l.Obey(l.order(Pause, 1, 0, 1)))
	paused := l.file()
	must(l.restart(m))
	if err := l.Grant(uuid).Permit(Read); err == nil || !strings.Contains(err.Error(), "has paused") {
		t.Fatalf("Permit while paused, after a restart = %v", err)
	}

	lost := func(what string, file []byte) {
		t.Helper()
		if file == nil {
			must(os.Remove(l.path))
		} else {
			must(os.WriteFile(l.path, file, 0o600))
		}
		if err := l.restart(m); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "not the file") {
			t.Errorf("%s: Anchor = %v", what, err)
		}
		if err := l.Grant(uuid).Permit(Read); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "not the file") {
			t.Errorf("%s: Permit = %v", what, err)
		}
		if err := l.Offer(l.a); !errors.Is(err, ErrLocked) {
			t.Errorf("%s: Offer = %v", what, err)
		}
		if err := l.Obey(l.order(Resume, 9, 0, 1)); !errors.Is(err, ErrDenied) {
			t.Errorf("%s: Obey = %v", what, err)
		}
		l.now = l.now.Add(time.Hour)
		l.Orders() // the time goes on, and the file is left as it is
	}
	lost("the file of before the pause", running)
	lost("the file of before the anchor", untied)
	lost("no file", nil)
	must(os.WriteFile(l.path, paused, 0o600))
	if err := l.restart(nil); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "none that works") {
		t.Errorf("Anchor without a TPM = %v", err)
	}
	if err := l.restart(&memory{}); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "was cleared") {
		t.Errorf("Anchor with another TPM = %v", err)
	}
	must(l.restart(m)) // the right file is back
	must(l.Obey(l.order(Resume, 10, 0, 1)))
	must(l.Grant(uuid).Permit(Write))

	// The file is lost for good. Who has signed for that takes its place, and is what counts from then on.
	must(os.Remove(l.path))
	err := l.restart(m)
	if err == nil {
		t.Fatal("the lost file is not missed")
	}
	said := l.lost
	if len(said) != 64 || !strings.Contains(err.Error(), said) {
		t.Fatalf("%v does not tell the digest", err)
	}
	next := lockable()
	next.ID, next.Succeeds = "lab-2", said
	if err := l.Offer(sign(t, next, 1, 2)); !errors.Is(err, ErrUnsigned) {
		t.Errorf("Offer without a monitor's signature = %v", err)
	}
	must(l.Offer(sign(t, next, 3)))
	must(l.Grant(uuid).Permit(Write))
	must(l.restart(m))
	must(l.Grant(uuid).Permit(Write))
	l.a = next
	must(l.Obey(l.order(Pause, 1, 0, 1)))
	must(os.Remove(l.path))
	if err := l.restart(m); err == nil {
		t.Fatal("the lost file is not missed")
	}
	if err := l.Offer(next); !errors.Is(err, ErrLocked) {
		t.Errorf("Offer of what took the place of an earlier one = %v", err)
	}
}

// TestAnchorPowerCut cuts the power at each write of a first agreement and of an order, and wants the old state or the new one, and never
// that the file is missed.
func TestAnchorPowerCut(t *testing.T) {
	for _, when := range []string{"before the file", "after the file"} {
		for cut := 1; cut <= 4; cut++ {
			l := newLock(t)
			if err := os.Remove(l.path); err != nil {
				t.Fatal(err)
			}
			m := &memory{cut: cut}
			if err := l.restart(m); err != nil {
				t.Fatal(err)
			}
			before := l.order(Pause, 1, 0, 1)
			steps := []func() error{func() error { return l.Offer(l.a) }, func() error { return l.Obey(before) }}
			for _, step := range steps {
				was, err := os.ReadFile(l.path)
				if serr := step(); serr == nil {
					continue
				} else if !errors.Is(serr, errCut) {
					t.Fatal(serr)
				}
				if when == "before the file" { // what was written was not synced yet
					if err != nil {
						os.Remove(l.path)
					} else if err := os.WriteFile(l.path, was, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				break
			}
			m.cut = 0
			if err := l.restart(m); err != nil {
				t.Errorf("power cut at write %d, %s: %v", cut, when, err)
			}
			for _, step := range steps {
				if err := step(); err != nil && !strings.Contains(err.Error(), "higher sequence") {
					t.Errorf("power cut at write %d, %s, once more: %v", cut, when, err)
				}
			}
			if err := l.restart(m); err != nil || len(l.Orders()) != 1 {
				t.Errorf("power cut at write %d, %s, in the end: %v, %d orders", cut, when, err, len(l.Orders()))
			}
		}
	}
}

// TestAnchorDays wants that the time alone writes the anchor once a day: a TPM's memory wears.
func TestAnchorDays(t *testing.T) {
	l := newLock(t)
	m := &memory{}
	if err := l.restart(m); err != nil {
		t.Fatal(err)
	}
	m.writes = 0
	for range 3 * 24 * 4 {
		l.now = l.now.Add(15 * time.Minute)
		l.Orders()
	}
	if m.writes < 4 || m.writes > 8 {
		t.Errorf("%d writes in three days; want two each", m.writes)
	}
	if err := l.restart(m); err != nil {
		t.Error(err)
	}
}
