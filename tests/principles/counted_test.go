package principles

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/images/initramfs"
	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// countedRAM is the counted guest's memory in MiB.
const countedRAM = 256

// countedUUID is its system UUID.
const countedUUID = "6f1e5c1e-0002-4a6b-9d7a-0123456789ab"

// counted is a guest that executes the same instructions each time that it is started, to the last one: one CPU, time that only
// instructions make pass, randomness from a seed, no input. What an observer from outside costs shows as a difference.
type counted struct {
	dir, vmlinuz, initramfs string
	// Of a guest that is changed from outside.
	args     []string // of QEMU
	line     string   // on the kernel's command line
	writable bool     // what the reader gets
}

// newCounted builds the guest's only program.
func newCounted(ctx context.Context, dir string) (*counted, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	target, err := kernels.Lookup("6.1")
	if err != nil {
		return nil, err
	}
	k, err := kernels.Fetch(ctx, filepath.Join(cache, "backdoor", "kernels"), target)
	if err != nil {
		return nil, err
	}
	c := &counted{dir: dir, vmlinuz: k.Vmlinuz, initramfs: filepath.Join(dir, "counted.cpio")}
	program := filepath.Join(dir, "counted")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./counted")
	build.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0")
	if b, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the counted program: %w: %s", err, b)
	}
	init, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	var a initramfs.Archive
	for _, d := range []string{"dev", "proc"} {
		a.Directory(d, 0o755)
	}
	a.CharDevice("dev/console", 0o600, 5, 1)
	a.File("init", init, 0o755)
	b, err := a.Bytes()
	if err != nil {
		return nil, err
	}
	return c, os.WriteFile(c.initramfs, b, 0o644)
}

var countedMark = regexp.MustCompile(`counted: mark \d+ at (\d+)`)

// run starts the guest and returns its counter at each mark. reader, if given, gets the guest's memory from the first moment on, until the
// guest has ended.
func (c *counted) run(ctx context.Context, agent bool, reader func(context.Context, hostmem.Memory)) ([]uint64, error) {
	dir, err := os.MkdirTemp(c.dir, "run-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	ram, console := filepath.Join(dir, "ram"), filepath.Join(dir, "console")
	f, err := os.Create(ram)
	if err == nil {
		err = errors.Join(f.Truncate(countedRAM<<20), f.Close())
	}
	if err != nil {
		return nil, err
	}
	on := 0
	if agent {
		on = 1
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, errors.New("it does not end within 3 minutes"))
	defer cancel()
	q := exec.CommandContext(ctx, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,memory-backend=ram0", "-object", fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=%s,share=on", countedRAM, ram),
		"-m", strconv.Itoa(countedRAM), "-smp", "1", "-cpu", "max", "-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-seed", "7",
		"-rtc", "base=2026-01-01T00:00:00,clock=vm", "-serial", "file:"+console, "-kernel", c.vmlinuz, "-initrd", c.initramfs,
		"-uuid", countedUUID, "-append", fmt.Sprintf("console=ttyS0,115200 quiet panic=-1 counted.agent=%d %s", on, c.line))
	q.Args = append(q.Args, c.args...)
	var said bytes.Buffer
	q.Stderr = &said
	read, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan struct{})
	if err := q.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(done)
		if reader == nil {
			return
		}
		mem, err := hostmem.OpenRAMFile(ram, hostmem.Q35Layout(countedRAM<<20), c.writable)
		if err != nil {
			return // then it counts no pass, and the caller complains
		}
		defer mem.Close()
		reader(read, mem)
	}()
	err = q.Wait()
	stop()
	<-done
	if err != nil {
		return nil, fmt.Errorf("the counted guest: %w: %w: %s", err, context.Cause(ctx), said.Bytes())
	}
	text, err := os.ReadFile(console)
	if err != nil {
		return nil, err
	}
	var marks []uint64
	for _, m := range countedMark.FindAllSubmatch(text, -1) {
		n, err := strconv.ParseUint(string(m[1]), 10, 64)
		if err != nil {
			return nil, err
		}
		marks = append(marks, n)
	}
	if len(marks) < 2 || !bytes.Contains(text, []byte("counted: end")) {
		return nil, fmt.Errorf("the counted guest says %q", text[max(0, len(text)-2000):])
	}
	return marks, nil
}

// observe looks at a guest as the agent does, as often as it goes, and counts its passes.
func observe(passes *int) func(context.Context, hostmem.Memory) {
	return func(ctx context.Context, mem hostmem.Memory) {
		for ctx.Err() == nil {
			img, err := kernel.Open(ctx, mem, kernel.Options{})
			if err != nil {
				continue // it boots
			}
			for ctx.Err() == nil {
				v := img.View(ctx)
				tasks := 0
				for _, err := range v.Tasks() {
					if err != nil {
						break
					}
					tasks++
				}
				_, berr := v.Heartbeat()
				_, perr := v.Panic()
				_, uerr := v.Usage()
				_, serr := v.Signs()
				if err := errors.Join(berr, perr, uerr, serr); err == nil && tasks > 0 {
					*passes++
				} else if img.Prove(ctx) != nil {
					break
				}
			}
		}
	}
}

// TestNotOneInstruction runs a guest with and without an observer: it must execute the same instructions, to the last one. With -whole,
// an agent on the guest itself, which looks ten times a second, must show.
func TestNotOneInstruction(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: tests that start virtual machines are left out")
	}
	b := &bench{dir: t.TempDir()}
	said, err := notOneInstruction(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(said)
	if !*whole {
		return
	}
	b.onHost = true
	if _, err := notOneInstruction(t.Context(), b); err == nil {
		t.Error("an agent on the guest itself does not show")
	} else {
		t.Log(err)
	}
}

// TestRepairCost: with -whole only; make principles has it in its table.
func TestRepairCost(t *testing.T) {
	if testing.Short() || !*whole {
		t.Skip("-short, or no -whole: the row of make principles that explains a repair's instructions is left out")
	}
	said, err := repairCost(t.Context(), &bench{dir: t.TempDir(), lines: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(said)
}

// notOneInstruction compares a guest that is observed with one that is not.
func notOneInstruction(ctx context.Context, b *bench) (string, error) {
	var err error
	if b.guest == nil {
		if b.guest, err = newCounted(ctx, b.dir); err != nil {
			return "", err
		}
	}
	if b.alone == nil {
		if b.alone, err = b.guest.run(ctx, false, nil); err != nil {
			return "", err
		}
	}
	passes := 0
	observed, err := b.guest.run(ctx, b.onHost, observe(&passes))
	if err != nil {
		return "", err
	}
	if passes < 3 {
		return "", fmt.Errorf("the observer has made %d passes; there is nothing to compare", passes)
	}
	alone := b.alone
	if !slices.Equal(alone, observed) {
		worst := uint64(0)
		for i := 1; i < min(len(alone), len(observed)); i++ {
			x, y := alone[i]-alone[i-1], observed[i]-observed[i-1]
			worst = max(worst, max(x, y)-min(x, y))
		}
		return "", fmt.Errorf("with %d passes of an observer the guest executes up to %d instructions more or less in a span of %d", passes, worst, alone[1]-alone[0])
	}
	return fmt.Sprintf("%d instructions to the end, difference 0 with %d passes of the observer", alone[len(alone)-1], passes), nil
}
