package heal

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// plainMemory is a path without compare-and-swap.
type plainMemory struct{ m *hostmem.RAMFile }

func (p plainMemory) ReadAt(b []byte, off int64) (int, error)  { return p.m.ReadAt(b, off) }
func (p plainMemory) WriteAt(b []byte, off int64) (int, error) { return p.m.WriteAt(b, off) }
func (p plainMemory) Map() []hostmem.Range                     { return p.m.Map() }
func (p plainMemory) Close() error                             { return nil }

// change is a plan that puts one word.
func change(t *testing.T, h *fakeHost, old, put uint64) Plan {
	t.Helper()
	p, err := planRestore(h, detect.Finding{ID: "tampering-1", Changes: []kernel.Change{{Region: "rodata", Addr: direct + 0x150000, Now: kernel.HexBytes(le(old, 8)), Was: kernel.HexBytes(le(put, 8))}}})
	if err != nil {
		t.Fatal(err)
	}
	p.ID = "plan-1"
	return p
}

// Two healers that carry out plans all the time are never both at it, and each comes to its turn.
func TestLeaseKeepsApart(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain %v", plain), func(t *testing.T) {
			h := newFakeHost(t)
			var mu sync.Mutex
			at, most := 0, 0
			var wg sync.WaitGroup
			errs := make(chan error, 2)
			for range 2 {
				l, err := findLease(h)
				if err != nil {
					t.Fatal(err)
				}
				l.wait = 20 * time.Second
				o := options(t, h, &memJournal{onWrite: func(kind string, v any) {
					mu.Lock()
					defer mu.Unlock()
					switch {
					case kind == "intent":
						at++
						most = max(most, at)
					case kind == "lease" && v.(held).Free:
						at--
					}
				}})
				o.Lease, o.Grant = l, grant(t, permit(RestoreKernel))
				if plain {
					o.Memory = plainMemory{h.mem}
				}
				x, p := NewExecutor(o), change(t, h, 0, 0x600d)
				p.Steps[0].Op, p.Steps[0].MayFail = OpWrite, true // the other may have done it
				wg.Go(func() {
					for range 20 {
						if _, err := x.Apply(t.Context(), p, "test"); err != nil && !errors.Is(err, ErrMismatch) {
							errs <- err
							return
						}
					}
				})
			}
			wg.Wait()
			close(errs)
			for err := range errs {
				t.Error(err)
			}
			if most != 1 {
				t.Errorf("%d at once", most)
			}
			if mark := h.get(mailboxEnd-8, 8); mark != 0 {
				t.Errorf("the lease is left at %#x", mark)
			}
		})
	}
}

func TestLeaseOfTheDead(t *testing.T) {
	h := newFakeHost(t)
	h.put64(mailboxEnd-8, leaseMark&leaseMask|7)
	l, err := findLease(h)
	if err != nil {
		t.Fatal(err)
	}
	l.wait, l.stale = 10*time.Millisecond, time.Hour
	o := options(t, h, &memJournal{})
	o.Lease, o.Grant = l, grant(t, permit(RestoreKernel))
	p := change(t, h, 0, 0x600d)
	old := h.snapshot()
	if _, err := NewExecutor(o).Apply(t.Context(), p, "test"); !errors.Is(err, ErrLeased) {
		t.Fatalf("while another is at work: %v", err)
	}
	if at := h.diff(old); len(at) > 0 {
		t.Errorf("stores at %v", at)
	}
	h.put64(mailboxEnd-8, leaseMark&leaseMask|8) // he goes on
	l.stale = time.Nanosecond
	l.wait = 0
	if _, err := NewExecutor(o).Apply(t.Context(), p, "test"); !errors.Is(err, ErrLeased) {
		t.Fatalf("right after he has gone on: %v", err)
	}
	l.wait = 5 * time.Second
	if out, err := NewExecutor(o).Apply(t.Context(), p, "test"); err != nil || !out.Verified {
		t.Fatalf("long after: %v", err)
	}
	if mark := h.get(mailboxEnd-8, 8); mark != 0 {
		t.Errorf("the lease is left at %#x", mark)
	}
}

// A healer that was killed at work takes up its own lease at its next start, at once, and no other's.
func TestLeaseResumed(t *testing.T) {
	h := newFakeHost(t)
	mark := uint64(leaseMark&leaseMask | 7)
	h.put64(mailboxEnd-8, mark)
	record := func(mark uint64, free bool) []byte {
		b, err := json.Marshal(held{"plan-1", mailboxEnd - 8, le(mark, 8), free})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, tt := range []struct {
		name   string
		record []byte
		ok     bool
	}{
		{"another's", record(mark+1, false), false},
		{"given back", record(mark, true), false},
		{"no record of a lease", []byte(`[]`), false},
		{"its own", record(mark, false), true},
	} {
		l, err := findLease(h)
		if err != nil {
			t.Fatal(err)
		}
		l.wait = 10 * time.Millisecond
		if err := l.Resume(tt.record); (err != nil) != (string(tt.record) == "[]") {
			t.Errorf("%s: Resume = %v", tt.name, err)
		}
		o := options(t, h, &memJournal{})
		o.Lease, o.Grant = l, grant(t, permit(RestoreKernel))
		_, err = NewExecutor(o).Apply(t.Context(), change(t, h, 0, 0x600d), "test")
		if tt.ok && err != nil || !tt.ok && !errors.Is(err, ErrLeased) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if mark := h.get(mailboxEnd-8, 8); mark != 0 {
		t.Errorf("the lease is left at %#x", mark)
	}
	// Without a repair of its own, it gives back what it has left, and nobody else's.
	for _, there := range []uint64{mark, mark + 1} {
		h.put64(mailboxEnd-8, there)
		l, err := findLease(h)
		if err != nil {
			t.Fatal(err)
		}
		o := options(t, h, &memJournal{})
		o.Lease = l
		if err := l.Resume(record(mark, false)); err != nil {
			t.Error(err)
		}
		if err := NewExecutor(o).GiveBack(t.Context()); err != nil {
			t.Error(err)
		}
		if now := h.get(mailboxEnd-8, 8); now != 0 && now != mark+1 || now == 0 && there != mark {
			t.Errorf("%#x was given back to %#x", there, now)
		}
	}
}

// What is not a lease is no place for one.
func TestLeasePlace(t *testing.T) {
	h := newFakeHost(t)
	h.put64(mailboxEnd-8, 0x1234)
	l, err := findLease(h)
	if err != nil {
		t.Fatal(err)
	}
	if l.addr != mailboxEnd-hostmem.PageSize-8 {
		t.Errorf("the lease is at %v", l.addr)
	}
	if boxes, err := findMailboxes(h, 300); err != nil || len(boxes) == 0 {
		t.Error(err)
	}
}

func TestBudget(t *testing.T) {
	h := newFakeHost(t)
	one, two := Target{TGID: 5, Start: 1}, Target{TGID: 5, Start: 2}
	b := NewBudget(2, 20)
	for i, tt := range []struct {
		p  Plan
		ok bool
	}{
		{Plan{Target: &one}, true},
		{Plan{Targets: []Target{one, two}}, true}, // two in all
		{Plan{Targets: []Target{one, {TGID: 6}}}, false},
		{Plan{Target: &one, Steps: []Step{{Put: make(Bytes, 16)}}}, true},
		{Plan{Target: &one, Steps: []Step{{Put: make(Bytes, 8)}}}, false},
		{Plan{Lifts: []string{"plan-1"}, Steps: []Step{{Put: make(Bytes, 8)}}}, true},
		{Plan{Target: &one, Steps: []Step{{Put: make(Bytes, 4)}}}, true},
	} {
		if err := b.take(tt.p); (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrBlast) {
			t.Errorf("plan %d: %v", i, err)
		}
	}
	o := options(t, h, &memJournal{})
	o.Grant, o.Budget = grant(t, permit(RestoreKernel)), NewBudget(10, 7)
	old := h.snapshot()
	if _, err := NewExecutor(o).Apply(t.Context(), change(t, h, 0, 0x600d), "test"); !errors.Is(err, ErrBlast) {
		t.Errorf("8 bytes where 7 are allowed: %v", err)
	}
	if at := h.diff(old); len(at) > 0 {
		t.Errorf("stores at %v", at)
	}
}
