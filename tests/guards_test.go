package tests

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/guest"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

// TestProtections has the root of a guest lower one of its kernel's protections by its switch, and another hand lower one in its memory that no
// system call lowers, and compares what is listed with what the guest's kernel says of itself.
func TestProtections(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a kernel in QEMU: not with -short")
	}
	g := guest.Start(t, "6.1", guest.Options{})
	c := serveHost(t, g)
	agent := operator.Agent{Client: c}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	var done, text string
	// stands is what the agent says of one of them.
	stands := func(object string) kernel.Guard {
		t.Helper()
		var p query.Protections
		got := struct{ Answer *query.Protections }{&p}
		if err := c.Get(ctx, client.ListingURI("Protections"), &got); err != nil {
			t.Fatal(err)
		}
		for _, g := range p.Guards {
			if g.Object == object {
				return g
			}
		}
		t.Fatalf("%s is not among %+v", object, p.Guards)
		return kernel.Guard{}
	}
	for object, file := range map[string]string{
		"ptrace_scope": "/proc/sys/kernel/yama/ptrace_scope", "randomize_va_space": "/proc/sys/kernel/randomize_va_space", "kptr_restrict": "/proc/sys/kernel/kptr_restrict",
		"sysctl_unprivileged_bpf_disabled": "/proc/sys/kernel/unprivileged_bpf_disabled", "modules_disabled": "/proc/sys/kernel/modules_disabled",
		"aa_g_profile_mode": "/sys/module/apparmor/parameters/mode",
	} {
		g.Ask("cat "+file, "text", &text)
		text = strings.TrimSpace(text)
		if said := strings.ToLower(strings.TrimPrefix(stands(object).Text, "APPARMOR_")); said != text {
			t.Errorf("%s stands at %q; the guest's kernel says %q", object, said, text)
		}
	}
	// wait waits until there is, or is not, a finding of that key.
	wait := func(key string, want detect.Severity) {
		t.Helper()
		for {
			all, err := agent.Findings(ctx)
			if err != nil {
				t.Fatalf("wait for %q of %q: %v", want, key, err)
			}
			var is detect.Severity
			for _, f := range all {
				if f.Key == key && f.Resolved == nil {
					is = f.Severity
				}
			}
			if is == want {
				return
			}
			select {
			case <-ctx.Done():
				t.Fatalf("the finding %q is %q; want %q: %v", key, is, want, context.Cause(ctx))
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
	// settled waits until the agent has looked at all of them once more: each two seconds, in one of its passes.
	settled := func() {
		t.Helper()
		passes := func() uint64 {
			st, err := agent.State(ctx)
			if err != nil {
				t.Fatal(err)
			}
			return st.Passes
		}
		for from, began := passes(), time.Now(); passes() < from+3 || time.Since(began) < 5*time.Second; {
			time.Sleep(100 * time.Millisecond)
		}
	}
	settled()
	g.Ask("write /sys/module/apparmor/parameters/mode complain", "written", &done)
	wait("guard AppArmor's mode", detect.Warning)
	g.Ask("write /sys/module/apparmor/parameters/mode enforce", "written", &done)
	wait("guard AppArmor's mode", "")

	g.Ask("write /proc/sys/kernel/modules_disabled 1", "written", &done)
	if is := stands("modules_disabled"); is.Level != 1 || !is.OneWay {
		t.Fatalf("after the switch: %+v", is)
	}
	settled()
	poke32(t, g, stands("modules_disabled").Addr, 0)
	if g.Ask("cat /proc/sys/kernel/modules_disabled", "text", &text); strings.TrimSpace(text) != "0" {
		t.Fatalf("the guest's kernel says %q of what was written to its memory", text)
	}
	wait("guard ban on loading modules", detect.Critical)
}

// poke32 stores to a guest's memory from outside.
func poke32(t *testing.T, g *guest.Guest, at kernel.VirtAddr, value uint32) {
	t.Helper()
	mem, err := hostmem.OpenRAMFile(g.RAM, hostmem.Q35Layout(uint64(g.MiB)<<20), false)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	img, err := kernel.Open(t.Context(), mem, kernel.Options{})
	if err != nil {
		t.Fatal(err)
	}
	pa, err := img.View(t.Context()).Phys(at)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(g.RAM, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := []byte{byte(value), byte(value >> 8), byte(value >> 16), byte(value >> 24)}
	if _, err := f.WriteAt(b, int64(pa)); err != nil { // below the hole of Q35's layout
		t.Fatal(fmt.Errorf("write %s: %w", g.RAM, err))
	}
}
