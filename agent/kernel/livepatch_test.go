package kernel_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/tests/guest"
)

// TestLivePatch patches a function of a running kernel and takes the patch back. The image that was attached before tells of it each
// time, and takes none of it for tampering: the golden copy's sweeps of all text and constants find nothing.
func TestLivePatch(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a kernel in QEMU: not with -short")
	}
	const release = "6.1"
	g := guest.Start(t, release, guest.Options{Files: map[string][]byte{
		"bdlive.ko": guest.Module(t, release, filepath.Join("..", "..", "tests", "guest", "livepatch"), "bdlive"),
	}})
	img, err := kernel.Open(t.Context(), g.Memory(false), kernel.Options{})
	if err != nil {
		t.Fatal(err)
	}
	golden, err := kernel.TakeGolden(t.Context(), img, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	patches := func() (all []kernel.Probe) {
		t.Helper()
		for p, err := range img.View(t.Context()).Probes() {
			if err != nil {
				t.Fatal(err)
			}
			if p.Kind == "livepatch" {
				all = append(all, p)
			}
		}
		return all
	}
	sweep := func(when string) {
		t.Helper()
		for from := golden.Rounds(); golden.Rounds() < from+2; {
			v := img.View(t.Context())
			if err := golden.Sweep(v, 4<<20, 1<<20); err != nil {
				t.Fatal(err)
			}
			if changes := golden.Changes(v); len(changes) > 0 {
				t.Errorf("%s: %+v", when, changes)
				return
			}
		}
	}
	cat := func(file string) (text string) {
		t.Helper()
		g.Ask("cat "+file, "text", &text)
		return strings.TrimSpace(text)
	}
	// wait waits until the kernel says that all its tasks have gone over.
	const sysfs = "/sys/kernel/livepatch/bdlive"
	var done string
	wait := func(settled func() bool) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); !settled(); time.Sleep(100 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the transition does not end")
			}
		}
	}
	if p := patches(); len(p) != 0 {
		t.Fatalf("before there is %+v", p)
	}
	plain := cat("/proc/cmdline")

	g.Ask("load bdlive.ko", "loaded", &done)
	wait(func() bool { return cat(sysfs+"/transition") == "0" })
	if got := cat("/proc/cmdline"); got != "patched while it runs" {
		t.Fatalf("the kernel says %q", got)
	}
	p := patches()
	if len(p) != 1 || p[0].Place != "cmdline_proc_show" || !strings.HasSuffix(p[0].Function, " [bdlive]") || p[0].Disabled || cat(sysfs+"/enabled") != "1" {
		t.Errorf("patched: %+v", p)
	}
	if err := img.Prove(t.Context()); err != nil {
		t.Errorf("patched: %v", err)
	}
	sweep("patched")

	g.Ask("write "+sysfs+"/enabled 0", "written", &done)
	wait(func() bool { return !strings.Contains(cat("/sys/kernel/livepatch"), "bdlive") })
	if got := cat("/proc/cmdline"); got != plain {
		t.Fatalf("the kernel says %q, and said %q", got, plain)
	}
	if p := patches(); len(p) != 0 {
		t.Errorf("taken back: %+v", p)
	}
	sweep("taken back")
}
