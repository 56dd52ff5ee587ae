package principles

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Two pseudo-functions.
const (
	ofPrograms = "(programs)"
	ofNobody   = "(no symbol)"
)

// executed is what a guest executed between its first and its last mark: instructions by function of its kernel, and all by its own counter.
type executed struct {
	functions map[string]int64
	counted   uint64 // by the plugin
	tsc       uint64 // by the guest itself
}

// repairCost runs a guest of which a process is killed from outside, and the same one without, and explains the difference in the instructions
// executed, function by function: all counts together must be the guest's own, but for what is begun twice, and the functions that only the killed
// guest has executed must be those by which a kernel kills. What is planted is that nothing is repaired, so that there is no difference.
func repairCost(ctx context.Context, b *bench) (string, error) {
	g, err := newCounted(ctx, b.dir)
	if err != nil {
		return "", err
	}
	plugin := filepath.Join(b.dir, "count.so")
	if text, err := exec.CommandContext(ctx, "gcc", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-o", plugin, "plugin/count.c").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the plugin: %w: %s", err, text)
	}
	g.line, g.writable = "counted.victim=1", true
	if b.unrepaired == nil {
		e, err := countFunctions(ctx, g, plugin, nil)
		if err != nil {
			return "", fmt.Errorf("without a repair: %w", err)
		}
		b.unrepaired = &e
	}
	without := *b.unrepaired
	repair := killVictim
	if b.calm {
		repair = nil
	}
	with, err := countFunctions(ctx, g, plugin, repair)
	if err != nil {
		return "", fmt.Errorf("with a repair: %w", err)
	}
	// An instruction that a page fault breaks off is begun again, and so is one that reaches a device where the emulator had not expected that.
	// The plugin counts it each time that it is begun.
	for _, e := range []executed{without, with} {
		if again := int64(e.counted - e.tsc); again < 0 || again > int64(e.tsc/1e6) {
			return "", fmt.Errorf("the functions have begun %d instructions together, and the guest has counted %d", e.counted, e.tsc)
		}
	}
	type change struct {
		name string
		by   int64
	}
	var all []change
	only := map[string]bool{}
	names := maps.Clone(with.functions)
	maps.Copy(names, without.functions)
	for name := range names {
		if d := with.functions[name] - without.functions[name]; d != 0 {
			all = append(all, change{name, d})
		}
		only[name] = without.functions[name] == 0
	}
	if len(all) == 0 {
		return "", errors.New("the repair has made no difference")
	}
	slices.SortFunc(all, func(a, b change) int { return cmp.Compare(b.by, a.by) })
	if b.lines != nil {
		for _, c := range all {
			fmt.Fprintf(b.lines, "%-40s %+d (with %d, without %d)\n", c.name, c.by, with.functions[c.name], without.functions[c.name])
		}
	}
	// In this order a tick of the host's own runs them.
	for _, must := range []string{"irq_work_single", "send_sigqueue", "do_group_exit", "do_exit", "exit_mmap"} {
		if !only[must] || with.functions[must] == 0 {
			return "", fmt.Errorf("%s has executed %d instructions with the repair and %d without", must, with.functions[must], without.functions[must])
		}
	}
	var kernelOnly, kernelMore int64
	n, nobody := 0, with.functions[ofNobody]-without.functions[ofNobody]
	for _, c := range all {
		switch {
		case c.name == ofPrograms || c.name == ofNobody:
		case only[c.name]:
			kernelOnly += c.by
			n++
		default:
			kernelMore += c.by
		}
	}
	var top []string
	for _, c := range all {
		if only[c.name] && len(top) < 12 {
			top = append(top, fmt.Sprintf("%s %d", c.name, c.by))
		}
	}
	return fmt.Sprintf("a kill changes %+d instructions by the guest's own count; told by function, those begun twice among them (%d with, %d without): %+d of programs (the victim's that it no longer executes), %+d in %d functions of the kernel that nothing else called (%s, …), "+
		"%+d in %d others (ticks and switches that are no more), %+d without a symbol", int64(with.tsc-without.tsc), with.counted-with.tsc, without.counted-without.tsc, with.functions[ofPrograms]-without.functions[ofPrograms],
		kernelOnly, n, strings.Join(top, ", "), kernelMore, len(all)-n, nobody), nil
}

// countFunctions runs a guest with the plugin. repair, if given, is done to it as soon as it can be.
func countFunctions(ctx context.Context, g *counted, plugin string, repair func(context.Context, hostmem.Memory, *kernel.Image) error) (e executed, err error) {
	dir, err := os.MkdirTemp(g.dir, "counts-")
	if err != nil {
		return e, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "mark")
	g.args = []string{"-plugin", plugin + ",out=" + out}
	defer func() { g.args = nil }()
	var img *kernel.Image
	failed := errors.New("the guest had ended before the agent had attached")
	marks, err := g.run(ctx, false, func(ctx context.Context, mem hostmem.Memory) {
		for ctx.Err() == nil && img == nil {
			img, _ = kernel.Open(ctx, mem, kernel.Options{}) // it boots
		}
		if img == nil {
			return
		}
		// Its symbols are read now, as the names are needed when it is gone.
		if failed = nil; repair != nil {
			failed = repair(ctx, mem, img)
		}
	})
	if err = errors.Join(err, failed); err != nil {
		return e, err
	}
	e.tsc = marks[len(marks)-1] - marks[0]
	e.functions = map[string]int64{}
	for _, m := range []struct {
		n    int
		sign int64
	}{{0, -1}, {len(marks) - 1, 1}} {
		b, err := os.ReadFile(fmt.Sprintf("%s.%d", out, m.n))
		if err != nil {
			return e, err
		}
		for ; len(b) >= 16; b = b[16:] {
			at, n := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
			name := ofPrograms
			if at != 0 {
				if name, _, err = img.SymbolAt(kernel.VirtAddr(at)); err != nil {
					name = ofNobody
				}
			}
			e.functions[name] += m.sign * int64(n)
			e.counted += uint64(m.sign * int64(n))
		}
	}
	maps.DeleteFunc(e.functions, func(_ string, n int64) bool { return n == 0 })
	return e, nil
}

// killVictim has the executor kill the process that does nothing but run.
func killVictim(ctx context.Context, mem hostmem.Memory, img *kernel.Image) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("no victim within two minutes"))
	defer cancel()
	f := detect.Finding{ID: "test", Kind: detect.KindRunawayProcess}
	for f.Culprit.PID == 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		for t, err := range img.View(ctx).Tasks() {
			if err == nil && t.PPID == 1 && t.PID == t.TGID && !t.KThread && t.Runtime > 100*time.Millisecond {
				f.Culprit = detect.Culprit{PID: t.PID, TGID: t.TGID, Comm: t.Comm, Start: t.Start}
			}
		}
	}
	_, owner, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	_, monitor, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	public := func(k ed25519.PrivateKey) access.Key { return access.Key(k.Public().(ed25519.PublicKey)) }
	a := &access.Agreement{
		Version: access.Version, ID: "counted", Host: access.Host{UUID: countedUUID}, Owner: access.Party{Name: "owner", Key: public(owner)},
		Monitors: []access.Party{{Name: "monitor", Key: public(monitor)}}, Rights: access.Rights{Read: true, Write: true, Actions: []string{heal.KillProcess}},
		ValidFrom: time.Now().Add(-time.Hour), ValidUntil: time.Now().Add(time.Hour),
	}
	if err := errors.Join(a.Sign(owner), a.Sign(monitor)); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "counted-journal-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	j, err := journal.OpenFile(filepath.Join(dir, "journal"), 1<<20)
	if err != nil {
		return err
	}
	defer j.Close()
	action, _ := heal.Find(heal.KillProcess)
	p, err := action.Plan(ctx, img.View(ctx), f)
	if err != nil {
		return err
	}
	p.ID = "plan-1"
	x := heal.NewExecutor(heal.Options{
		Memory: mem, Kernel: img, Journal: j, Grant: access.Hold(a).Grant(countedUUID),
		Confirm: func(context.Context, heal.Plan) error { return nil },
		Cured:   func(context.Context, heal.Plan) error { return nil },
	})
	if _, err := x.Apply(ctx, p, "test"); err != nil {
		return fmt.Errorf("kill the victim: %w", err)
	}
	return nil
}
