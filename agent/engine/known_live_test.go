package engine

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/boot/bzimage"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// knownBuild unpacks Debian's own file of a kernel into a directory.
func knownBuild(t *testing.T, name string) string {
	t.Helper()
	target, err := kernels.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	k, err := kernels.Fetch(t.Context(), "", target)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(k.Vmlinuz)
	if err != nil {
		t.Fatal(err)
	}
	var z bzimage.BzImage
	if err := z.UnmarshalBinary(b); err != nil {
		t.Fatal(err)
	}
	known, err := kernel.OpenKnown(bytes.NewReader(z.KernelCode), int64(len(z.KernelCode)))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, known.BuildID()+".vmlinux"), z.KernelCode, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// What was changed in a kernel before the agent came is found, and put right, by the kernel as it was built; an agent that does not
// have that takes it for good. Nothing is found in a kernel that nobody has changed.
func TestLiveKnownBuild(t *testing.T) {
	forEachGuest(t, func(t *testing.T, k string) {
		dir := knownBuild(t, k)
		g := startGuest(t, k)
		ram := g.Memory(true)
		img, err := kernel.Open(t.Context(), ram, kernel.Options{})
		if err != nil {
			t.Fatal(err)
		}
		// changes compares all of the kernel's code once, as an agent that comes now, and says what differs.
		changes := func(find func(string) (*kernel.Known, error)) []kernel.Change {
			t.Helper()
			var known *kernel.Known
			if find != nil {
				if known, err = find(img.Info().BuildID); err != nil || known == nil {
					t.Fatalf("kernel as it was built: %v, %v", known, err)
				}
				defer known.Close()
			}
			keep, err := os.CreateTemp(t.TempDir(), "")
			if err != nil {
				t.Fatal(err)
			}
			defer keep.Close()
			took := time.Now()
			copied, err := kernel.TakeGolden(t.Context(), img, keep, known)
			if err != nil {
				t.Fatal(err)
			}
			total, _ := copied.Bytes()
			t.Logf("copy of %d bytes taken in %v, as it was built: %v", total, time.Since(took), known != nil)
			v := img.View(t.Context())
			for range 2 {
				if err := copied.Sweep(v, total, 0); err != nil {
					t.Fatal(err)
				}
				time.Sleep(50 * time.Millisecond) // more than a place that is being patched stays so
			}
			if err := copied.Sweep(v, 1, 0); err != nil {
				t.Fatal(err)
			}
			return copied.Changes(v)
		}
		if c := changes(kernel.KnownDir(dir)); len(c) > 0 {
			t.Fatalf("nobody has changed this kernel: %+v", c)
		}

		// Three changes from outside: code that nothing runs, a constant, and the table of system calls.
		type place struct {
			pa  hostmem.PhysAddr
			was []byte
		}
		var places []place
		for _, x := range []struct {
			symbol string
			offset kernel.VirtAddr
		}{{"kernel_halt", 16}, {"byte_rev_table", 8}, {"sys_call_table", 8 * 300}} {
			va, err := img.Symbol(x.symbol)
			if err != nil {
				t.Fatal(err)
			}
			pa, err := img.View(t.Context()).Phys(va + x.offset)
			if err != nil {
				t.Fatal(err)
			}
			p := place{pa, make([]byte, 8)}
			if _, err := ram.ReadAt(p.was, int64(pa)); err != nil {
				t.Fatal(err)
			}
			now := bytes.Clone(p.was)
			now[2] ^= 0x5a
			if _, err := ram.WriteAt(now, int64(pa)); err != nil {
				t.Fatal(err)
			}
			places = append(places, p)
		}
		if c := changes(nil); len(c) > 0 {
			t.Errorf("a copy of the host as it is finds %+v", c)
		}

		w := watch(t, Options{
			Memory: func(context.Context) (hostmem.Memory, error) {
				return hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), true)
			},
			Journal: openJournal(t), HostUUID: guestUUID, Agreement: agreement(t, guestUUID, heal.RestoreKernel),
			Policy: policy.Policy{Version: policy.Version}, Writes: true, CacheDir: t.TempDir(), Known: kernel.KnownDir(dir),
		})
		for range places {
			f := w.wait(90*time.Second, "a change from before the attach", func(e Event) bool {
				// That a system call leads out of the kernel is seen at once, and what was there only with the copy.
				return ofKind(EventFinding, detect.KindTampering)(e) && len(e.Finding.Changes) > 0
			}).Finding
			// What the repair would do is foreseen without a store, and that one which changes nothing would cure nothing, too.
			p, _, err := w.e.Heal(t.Context(), HealRequest{Finding: f.ID, Action: heal.RestoreKernel, Caller: "test", DryRun: true})
			if err != nil || p.Foreseen != heal.ForeseenQuiet {
				t.Errorf("%s: foreseen %q, %v", f.Title, p.Foreseen, err)
			}
			p.Steps = slices.Clone(p.Steps)
			for i := range p.Steps {
				p.Steps[i].Put = p.Steps[i].Expect
			}
			if got := w.e.foresee(t.Context(), img, *f, p); got != heal.ForeseenStands {
				t.Errorf("%s: of a plan that changes nothing is foreseen %q", f.Title, got)
			}
			if _, out, err := w.e.Heal(t.Context(), HealRequest{Finding: f.ID, Action: heal.RestoreKernel, Caller: "test"}); err != nil || !out.Verified {
				t.Fatalf("%s: %+v, %v", f.Title, out, err)
			}
			t.Log(f.Title)
		}
		for _, p := range places {
			now := make([]byte, len(p.was))
			if _, err := ram.ReadAt(now, int64(p.pa)); err != nil || !bytes.Equal(now, p.was) {
				t.Errorf("at %v: %x, %v; want %x", p.pa, now, err, p.was)
			}
		}
		if s := w.e.State().Golden; s == nil || !s.Built {
			t.Errorf("state: %+v", s)
		}
		if bad := g.Complaints(); len(bad) > 0 {
			t.Errorf("the guest's kernel complains: %q", bad)
		}
	})
}
