package heal

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// A host whose memory holds anything, whose types say anything, and which goes on changing under the executor's hands, never makes it
// store outside of its plan, nor leave behind, without saying so, what it has stored.
func TestHostileHost(t *testing.T) {
	pages := []hostmem.PhysAddr{paBases, paPages, paPerCPU, paTask, paSignal, paPID, paCred, paUser, paOps, paPoint, paUsers, paReboot &^ 0xfff, 0x150000, 0x151000, 0x2000}
	carried, failed := 0, 0
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 4))
		h, hooks := worked(t, 0)
		f := forge(h)
		f.Changes = tampered(h).Changes
		spoil := func() hostmem.PhysAddr {
			pa := pages[r.IntN(len(pages))] + hostmem.PhysAddr(8*r.IntN(64))
			v := r.Uint64()
			switch r.IntN(4) {
			case 0:
				v = direct + v%fakeRAM
			case 1:
				v = h.get(pa, 8) ^ 1<<r.IntN(64)
			case 2:
				v %= 3
			}
			h.put64(pa, v)
			return pa
		}
		for range r.IntN(6) {
			spoil()
		}
		if names := slices.Sorted(maps.Keys(h.fields)); seed%3 == 0 {
			name := names[r.IntN(len(names))]
			x := h.fields[name]
			x.Offset = r.Uint64() >> r.IntN(64)
			h.fields[name] = x
		}
		for name, plan := range map[string]func() (Plan, error){
			"kill":    func() (Plan, error) { return planSignal(h, f, sigKill) },
			"strip":   func() (Plan, error) { return planStrip(h, f) },
			"restore": func() (Plan, error) { return planRestore(h, f) },
			"untrace": func() (Plan, error) { f.Key = detect.HookKey(hooks[0]); return planUnhook(h, f, hooks) },
			"untrack": func() (Plan, error) { f.Key = detect.HookKey(hooks[1]); return planUnhook(h, f, hooks) },
		} {
			p, err := plan()
			if err != nil {
				continue
			}
			p.ID = "plan-1"
			old := h.snapshot()
			host := make(map[hostmem.PhysAddr]bool) // what the host has changed itself
			o := options(t, h, &memJournal{onWrite: func(string, any) {
				if r.IntN(4) == 0 {
					pa := spoil()
					for i := range hostmem.PhysAddr(8) {
						host[pa+i] = true
					}
				}
			}})
			o.Grant = grant(t, permit(StripCredentials, RestoreKernel, UnhookProbe))
			limit := 20 * time.Second
			if name == "kill" || name == "untrace" || name == "untrack" { // which wait for a tick that does not come
				limit = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			out, err := NewExecutor(o).Apply(ctx, p, "test")
			cancel()
			if err == nil {
				carried++
			} else {
				failed++
			}
			in := func(rs []hostmem.Range, at hostmem.PhysAddr) bool {
				return slices.ContainsFunc(rs, func(r hostmem.Range) bool { return r.Contains(at, 1) })
			}
			for _, at := range h.diff(old) {
				switch {
				case host[at]:
				case !in(p.Ranges(), at):
					t.Errorf("seed %d: %s has stored at %v, which is not in its plan", seed, name, at)
				case err != nil && out.Undone && !in(out.Left, at):
					t.Errorf("seed %d: %s has failed (%v), says that all is undone, and %v differs", seed, name, err, at)
				}
			}
		}
	}
	if carried < 3 || failed < 3 {
		t.Errorf("%d plans were carried out and %d broken off: that shows nothing", carried, failed)
	}
	t.Logf("%d plans carried out, %d broken off", carried, failed)
}

// Between a plan and each of its stores the host starts another kernel: nothing is stored in that one's memory, whose bytes are others.
func TestKexecBeforeEachStore(t *testing.T) {
	for at := 0; ; at++ {
		h := newFakeHost(t)
		f := tampered(h)
		p, err := planRestore(h, f)
		if err != nil {
			t.Fatal(err)
		}
		p.ID = "plan-1"
		records := 0
		var old []byte
		o := options(t, h, &memJournal{onWrite: func(string, any) {
			if records == at {
				page := make([]byte, hostmem.PageSize)
				for i := range page {
					page[i] = byte(i*7 + at)
				}
				for pa := hostmem.PhysAddr(0x150000); pa < 0x152000; pa += hostmem.PageSize {
					h.write(pa, page)
				}
				h.info.BootID, old = "boot2", h.snapshot()
			}
			records++
		}})
		o.Grant = grant(t, permit(RestoreKernel))
		out, err := NewExecutor(o).Apply(t.Context(), p, "test")
		if old == nil { // it was over before
			if err != nil || at < 4 {
				t.Fatalf("after %d records: %v", records, err)
			}
			return
		}
		if records > at && at < 1+len(p.Steps) { // before the last store
			if err == nil {
				t.Errorf("kexec at record %d: carried out: %+v", at, out)
			}
			if where := h.diff(old); len(where) > 0 {
				t.Errorf("kexec at record %d: stored to the new kernel at %v", at, where)
			}
		}
	}
}
