package heal

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// An agent that ends in the middle of a plan leaves a host that the next one finds in order again, wherever it ended.
func TestSettle(t *testing.T) {
	for _, tt := range []struct {
		name string
		last Op // the last step that was done
		runs bool
	}{
		{"before the first store", OpExpect, false},
		{"while laying down", OpWrite, false},
		{"armed, and the host has not looked", OpArm, false},
		{"armed, and the host has run it", OpArm, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newFakeHost(t)
			before := h.snapshot()
			p := mustPlan(t, h)
			for _, s := range p.Steps {
				if (s.Op == OpWrite || s.Op == OpArm) && !s.Cleanup && tt.last != OpExpect && (s.Op == OpWrite || tt.last == OpArm) {
					h.write(s.Addr, s.Put)
				}
			}
			if tt.runs {
				h.tick()
			}
			x := NewExecutor(options(t, h, &memJournal{}))
			left, err := x.Settle(t.Context(), p)
			if err != nil || len(left) > 0 {
				t.Fatalf("Settle = %v, %v", left, err)
			}
			if !tt.runs {
				if d := h.diff(before); len(d) > 0 {
					t.Errorf("differs from before at %v", d)
				}
			}
			h.tick()
			if got := len(h.kills()); (got > 0) != tt.runs {
				t.Errorf("%d kills; the host had run it: %v", got, tt.runs)
			}
			for _, r := range p.Ranges() {
				b := make([]byte, r.Size)
				if _, err := h.mem.ReadAt(b, int64(r.Start)); err != nil || !zero(b) {
					t.Errorf("%v is not clean: %v", r, err)
				}
			}
		})
	}
}

// What somebody else has put there meanwhile is left alone.
func TestSettleOfAnothers(t *testing.T) {
	h := newFakeHost(t)
	p := mustPlan(t, h)
	for _, s := range p.Steps {
		if s.Op == OpWrite && !s.Cleanup {
			h.write(s.Addr, bytes.Repeat([]byte{0xee}, len(s.Put)))
		}
	}
	before := h.snapshot()
	x := NewExecutor(options(t, h, &memJournal{}))
	if left, err := x.Settle(t.Context(), p); err != nil || len(left) == 0 {
		t.Errorf("Settle = %v, %v; want that something is left", left, err)
	}
	if d := h.diff(before); len(d) > 0 {
		t.Errorf("it has written at %v", d)
	}
	h.info.BootID = "another"
	if _, err := x.Settle(t.Context(), p); err == nil {
		t.Error("it settles on another kernel")
	}
}

// A victim that stays a zombie keeps its mailbox until it is reaped, and not longer.
func TestSweep(t *testing.T) {
	h := newFakeHost(t)
	h.unreaped = true
	h.run()
	p := mustPlan(t, h)
	x := NewExecutor(options(t, h, &memJournal{}))
	out, err := x.Apply(t.Context(), p, "test")
	if err != nil || len(out.Left) == 0 {
		t.Fatalf("Apply = %+v, %v; want something left", out.Left, err)
	}
	if left, err := x.Sweep(t.Context(), p); err != nil || len(left) == 0 {
		t.Fatalf("Sweep before the reaping = %v, %v; want something left", left, err)
	}
	for _, s := range p.Steps { // the parent takes note
		if s.Object == "sigqueue.list" {
			h.put64(s.Addr, uint64(s.Virt))
			h.put64(s.Addr+8, uint64(s.Virt))
		}
	}
	if left, err := x.Sweep(t.Context(), p); err != nil || len(left) > 0 {
		t.Fatalf("Sweep after the reaping = %v, %v", left, err)
	}
	if boxes, err := findMailboxes(h, 1); err != nil || boxes[0].pa != mailboxOf(p) {
		t.Errorf("the mailbox is not free again: %+v, %v", boxes, err)
	}
}

func mailboxOf(p Plan) hostmem.PhysAddr {
	for _, s := range p.Steps {
		if s.Op == OpWrite {
			return s.Addr &^ (hostmem.PageSize - 1)
		}
	}
	return 0
}

func TestLift(t *testing.T) {
	o := Outcome{Plan: Plan{ID: "plan-1", Action: StopForkBomb, Kernel: &KernelID{BootID: "b"}, Steps: []Step{
		{Op: OpExpect}, {Op: OpWrite, Hold: true, Addr: 0x1000, Virt: kernel.VirtAddr(1), Expect: le(3000, 4), Put: le(0, 4)},
	}}, Steps: []StepOutcome{{Step: 0}, {Step: 1}}}
	p, ok := Lift([]Outcome{o})
	if !ok || len(p.Steps) != 1 || !bytes.Equal(p.Steps[0].Expect, le(0, 4)) || !bytes.Equal(p.Steps[0].Put, le(3000, 4)) || p.Lifts[0] != "plan-1" {
		t.Errorf("Lift = %+v, %v", p, ok)
	}
	o.Steps[1].Undone = true
	if _, ok := Lift([]Outcome{o}); ok {
		t.Error("what was undone is lifted again")
	}
}

func FuzzBytes(f *testing.F) {
	for _, s := range []string{"", "00", "deadbeef", "(00*4096)", "(00*16)01(00*20)", "(00*99999999)", "(00*", "(", "00(01*2)", "0"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var b, c Bytes
		if b.UnmarshalText(text) != nil {
			return
		}
		out, err := b.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.UnmarshalText(out); err != nil || !bytes.Equal(b, c) {
			t.Errorf("%q is read as %x and written as %q, which is %x, %v", text, []byte(b), out, []byte(c), err)
		}
		if _, err := json.Marshal(b); err != nil {
			t.Error(err)
		}
	})
}
