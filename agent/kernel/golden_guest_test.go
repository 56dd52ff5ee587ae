package kernel

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// growing is golden bytes in memory, of as many as there are.
type growing struct{ b []byte }

func (s *growing) ReadAt(b []byte, off int64) (int, error) { return copy(b, s.b[off:]), nil }
func (s *growing) WriteAt(b []byte, off int64) (int, error) {
	if n := off + int64(len(b)) - int64(len(s.b)); n > 0 {
		s.b = append(s.b, make([]byte, n)...)
	}
	return copy(s.b[off:], b), nil
}

// testGolden has a running kernel patch itself and its modules in all ways that it has, and come and go what may, and then changes it from outside: of
// the first nothing is told, of the second all is.
func testGolden(t *testing.T, g *guest, img *Image) {
	const module = "virtio_net"
	kept := &growing{}
	began := time.Now()
	golden, err := TakeGolden(t.Context(), img, kept, nil)
	if err != nil {
		t.Fatal(err)
	}
	total, hot := golden.Bytes()
	t.Logf("%d kB in %v, of which tables of functions %d kB, modules %d kB in %d; left out: %q", total>>10, time.Since(began).Round(time.Millisecond), hot>>10,
		golden.mods.bytes()>>10, golden.Modules(), golden.Left())
	if live := strings.Count(g.read("/proc/modules"), " Live "); golden.Modules() != live || live == 0 {
		t.Errorf("%d modules are compared, %d are loaded", golden.Modules(), live)
	}
	if left := len(golden.Left()); left > 1 || left == 1 != img.lacking {
		t.Errorf("left out: %q", golden.Left())
	}
	// round compares everything, and once more what differs.
	round := func() []Change {
		t.Helper()
		for to := golden.Rounds() + 1; golden.Rounds() < to; {
			v := img.View(t.Context())
			if err := golden.Sweep(v, 8<<20, 0); err != nil {
				t.Fatal(err)
			}
			v.Close()
		}
		for end := time.Now().Add(time.Minute); golden.unsure() && time.Now().Before(end); time.Sleep(goldenStands) {
			v := img.View(t.Context())
			if err := golden.Sweep(v, 1, 0); err != nil {
				t.Fatal(err)
			}
			v.Close()
		}
		v := img.View(t.Context())
		defer v.Close()
		return golden.Changes(v)
	}
	quiet := func(when string) {
		t.Helper()
		if changes := round(); len(changes) > 0 {
			t.Errorf("%s: %+v", when, changes)
		}
	}
	do := func(command string) {
		t.Helper()
		var answer string
		if g.ask(&answer, command); answer != "ok" {
			t.Fatalf("%s: %s", command, answer)
		}
	}
	quiet("at rest")

	function := strings.Fields(g.symbolOf(module, "virtnet_open"))
	if len(function) < 3 {
		t.Fatalf("the guest has no virtnet_open: %q", function)
	}
	n, err := strconv.ParseUint(function[0], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	at := VirtAddr(n)
	var text region
	for _, x := range golden.mods.all {
		if x.module == module {
			text = x.regions[0]
		}
	}
	if text.name != "text" || at < text.from || at >= text.to {
		t.Fatalf("virtnet_open is at %v; what is compared of %s is %+v", at, module, text)
	}
	pa, err := img.View(t.Context()).Phys(at)
	if err != nil {
		t.Fatal(err)
	}
	ram, err := hostmem.OpenRAMFile(g.ram, guestMachines[g.kernel.Arch].layout(512<<20), true)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	peek := func(off, n int64) []byte {
		t.Helper()
		b := make([]byte, n)
		if _, err := ram.ReadAt(b, int64(pa)+off); err != nil {
			t.Fatal(err)
		}
		return b
	}
	was := peek(0, 64)
	inside := 8 // behind what ftrace patches, where an instruction begins
	if img.arch.name == "x86_64" {
		inside = len(was) - len(pastEndbr(was)) + 5
	}

	t.Run("patched", func(t *testing.T) {
		// Nothing that is patched here runs: an emulator may have a CPU meet the breakpoint of a patch that is complete, of which the kernel dies.
		const tracing = "/sys/kernel/tracing/"
		all := func() []byte {
			t.Helper()
			b := make([]byte, text.to-text.from)
			if err := img.View(t.Context()).ReadVirt(text.from, b); err != nil {
				t.Fatal(err)
			}
			return b
		}
		before := all()
		do("write " + tracing + "events/xdp/xdp_exception/enable 1") // a static key, and a static call, of the kernel's within the module
		if bytes.Equal(all(), before) {
			t.Error("the tracepoint has patched nothing of the module")
		}
		quiet("with a tracepoint")
		do("write " + tracing + "set_ftrace_filter :mod:" + module)
		do("write " + tracing + "current_tracer function")
		if now := peek(0, 64); bytes.Equal(now, was) {
			t.Errorf("ftrace has not patched %x", now)
		}
		quiet("traced")
		do("write " + tracing + "kprobe_events p:bd/inside virtnet_open+" + strconv.Itoa(inside))
		do("write " + tracing + "events/bd/inside/enable 1")
		if now := peek(int64(inside), 4); bytes.Equal(now, was[inside:inside+4]) {
			t.Errorf("the kprobe has not patched %x", now)
		}
		quiet("with a kprobe")
		fresh, err := TakeGolden(t.Context(), img, &growing{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if img.arch.name == "x86_64" { // what it becomes after a while
			for end := time.Now().Add(10 * time.Second); peek(int64(inside), 1)[0] != 0xe9 && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			}
		}
		t.Logf("with a kprobe at %d: %x", inside, peek(0, 32))
		quiet("with a kprobe that has stood for a while")
		do("write " + tracing + "events/bd/inside/enable 0")
		do("write " + tracing + "kprobe_events -:bd/inside")
		do("write " + tracing + "current_tracer nop")
		do("write " + tracing + "set_ftrace_filter")
		do("write " + tracing + "events/xdp/xdp_exception/enable 0")
		// A jump of a kprobe's is taken out a little later, until when the kernel goes on listing it.
		for end := time.Now().Add(time.Minute); !bytes.Equal(all(), before); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not all is taken back: %x; want %x", peek(0, 64), was)
			}
			quiet("being taken back")
		}
		quiet("taken back")
		// What is taken while there is a breakpoint is what was there before.
		golden, fresh = fresh, golden
		quiet("taken with a kprobe")
		golden = fresh
	})
	t.Run("reloaded", func(t *testing.T) {
		for range 3 {
			g.send("reload dummy")
			answered := make(chan string, 1)
			go func() { answered <- g.answered() }()
			for answer := ""; answer == ""; {
				quiet("while a module goes and comes")
				select {
				case answer = <-answered:
					if answer != "\"ok\"\n" {
						t.Fatalf("reload: %s", answer)
					}
				default:
				}
			}
		}
		live := strings.Count(g.read("/proc/modules"), " Live ")
		for end := time.Now().Add(time.Minute); golden.Modules() != live; time.Sleep(50 * time.Millisecond) {
			if quiet("reloaded"); time.Now().After(end) {
				t.Fatalf("%d modules of %d", golden.Modules(), live)
			}
		}
	})
	// What is changed from outside is found, with what was there, and gone when that is put back.
	change := func(name string, va VirtAddr, want Change) {
		t.Run(name, func(t *testing.T) {
			pa, err := img.View(t.Context()).Phys(va)
			if err != nil {
				t.Fatal(err)
			}
			was := make([]byte, 8)
			if _, err := ram.ReadAt(was, int64(pa)); err != nil {
				t.Fatal(err)
			}
			now := slices.Clone(was)
			now[3] ^= 0x40
			put := func(b []byte) {
				if _, err := ram.WriteAt(b, int64(pa)); err != nil {
					t.Fatal(err)
				}
			}
			put(now)
			changes := round()
			put(was)
			if len(changes) != 1 {
				t.Fatalf("%+v", changes)
			}
			c := changes[0]
			if c.Addr != va || c.Region != want.Region || c.Module != want.Module || !bytes.Equal(c.Now, now) || !bytes.Equal(c.Was, was) ||
				want.Symbol != "" && c.Symbol != want.Symbol {
				t.Errorf("%+v; want %+v at %v, %x that was %x", c, want, va, now, was)
			}
			quiet("put back")
		})
	}
	g.execute("stop") // it runs none of what is no code now
	defer g.execute("cont")
	change("code of a module", (at+VirtAddr(inside)+15)&^7, Change{Region: "text", Module: module, Symbol: "virtnet_open"})
	for _, x := range golden.mods.all {
		for _, r := range x.regions {
			if x.module == module && r.name == "rodata" {
				change("constants of a module", r.from+64, Change{Region: "rodata", Module: module})
				break
			}
		}
	}
	halt, err := img.Symbol("kernel_halt")
	if err != nil {
		t.Fatal(err)
	}
	change("code", (halt+31)&^7, Change{Region: "text"})
	if !img.lacking {
		rodata, err := img.Symbol("__start_rodata")
		if err != nil {
			t.Fatal(err)
		}
		change("constants", rodata+64, Change{Region: "rodata"})
	}
}

// unsure reports whether there is something that differs and may be in the middle of being patched.
func (g *Golden) unsure() bool {
	parts := []*goldenPart{&g.goldenPart}
	for _, x := range g.mods.all {
		parts = append(parts, &x.goldenPart)
	}
	for _, p := range parts {
		for _, s := range p.suspects {
			if !s.sure {
				return true
			}
		}
	}
	return false
}

// answered returns the next answer, or why there is none.
func (g *guest) answered() string {
	g.ctl.SetReadDeadline(time.Now().Add(2 * time.Minute))
	line, err := g.in.ReadString('\n')
	if err != nil {
		return err.Error()
	}
	return line
}

// symbolOf returns the line of /proc/kallsyms that is of a module's symbol.
func (g *guest) symbolOf(module, name string) (found string) {
	g.t.Helper()
	var lines string
	g.ask(&lines, "modulesyms")
	for line := range strings.Lines(lines) {
		if f := strings.Fields(line); len(f) == 4 && f[2] == name && f[3] == "["+module+"]" {
			return line
		}
	}
	return ""
}
