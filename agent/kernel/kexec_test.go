package kernel

import (
	"testing"
)

// TestGuestKexec has a kernel start its successor, without firmware in between, and another crash into its crash kernel. Each time
// two kernels are in memory; the one that runs is attached to, the old one not mixed up with it.
func TestGuestKexec(t *testing.T) {
	someGuests(t, 1, func(t *testing.T, kernel string) {
		t.Run("kexec", func(t *testing.T) {
			g := startGuest(t, kernel, guestOptions{kexec: true})
			old := g.attach(Options{})
			g.load("now")
			img := g.attachWhileBooting(old)
			g.ready()
			t.Logf("old kernel: %v", old.Prove(t.Context()))
			if err := img.Prove(t.Context()); err != nil {
				t.Errorf("prove the new kernel: %v", err)
			}
			if img.Info().Capture {
				t.Error("a kernel that was started by kexec passes for a crash kernel")
			}
			for _, o := range []Options{{}, {Hint: old.Hint()}, {Hint: Hint{Note: old.Info().Note}}} {
				if got := g.attach(o); got.Info().BootID != img.Info().BootID {
					t.Errorf("Open(%+v) attached to boot %s, live is %s", o, got.Info().BootID, img.Info().BootID)
				}
			}
		})
		t.Run("crash", func(t *testing.T) {
			g := startGuest(t, kernel, guestOptions{kexec: true, mib: 768, cmdline: "crashkernel=224M"})
			old := g.attach(Options{})
			g.load("crash")
			if got := g.attach(Options{}); got.Info().BootID != old.Info().BootID || got.Info().Capture {
				t.Errorf("with a crash kernel loaded: %+v", got.Info())
			}
			g.send("sysrq c")
			img := g.attachWhileBooting(old)
			g.ready()
			if !img.Info().Capture || img.Info().BootID == old.Info().BootID {
				t.Errorf("crash kernel: %+v", img.Info())
			}
			// The memory of the one that crashed is kept as it was: it is still that boot, and tells of its panic.
			if err := old.Prove(t.Context()); err != nil {
				t.Errorf("prove the kernel that crashed: %v", err)
			}
			if p, err := old.View(t.Context()).Panic(); err != nil || !p.Panicked {
				t.Errorf("the kernel that crashed: %+v, %v", p, err)
			}
			dead := g.attach(Options{Hint: Hint{Note: old.Info().Note}, NoteOnly: true})
			if dead.Info().BootID != old.Info().BootID || dead.Info().Capture {
				t.Errorf("the kernel that crashed, by its note: %+v", dead.Info())
			}
			if got := g.attach(Options{Hint: Hint{Note: old.Info().Note}}); got.Info().BootID != img.Info().BootID {
				t.Errorf("attached to boot %s, live is %s", got.Info().BootID, img.Info().BootID)
			}
		})
	})
}

// load has the guest load its successor.
func (g *guest) load(when string) {
	g.t.Helper()
	var result string
	if g.ask(&result, "kexec "+when); result != "ok" {
		g.t.Fatalf("kexec %s: %s", when, result)
	}
}
