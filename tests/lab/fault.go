package lab

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// Fault is something that the lab can break on the host.
type Fault string

// The faults.
const (
	FaultRunaway  Fault = "runaway"  // a process of random name, PID and CPU that eats a whole CPU
	FaultPanic    Fault = "panic"    // sysrq-c: the kernel dies and stays dead
	FaultFreeze   Fault = "freeze"   // all CPUs stop at once until Thaw
	FaultIRQsOff  Fault = "irqs-off" // one CPU spins in the kernel with its interrupts off
	FaultReboot   Fault = "reboot"   // sysrq-b: the kernel reboots at once
	FaultPowercut Fault = "powercut" // the power goes; memory is lost; nothing restarts it
)

// Faults lists them with what they do.
func Faults() []struct {
	Fault Fault
	Does  string
} {
	return []struct {
		Fault Fault
		Does  string
	}{
		{FaultRunaway, "a process of random name, PID and CPU eats a whole CPU"},
		{FaultPanic, "the kernel panics (sysrq-c) and stays dead"},
		{FaultFreeze, "all CPUs stop at once, until thaw"},
		{FaultIRQsOff, "one CPU, chosen at random, spins in the kernel with its interrupts off"},
		{FaultReboot, "the kernel reboots at once (sysrq-b)"},
		{FaultPowercut, "the power goes; memory is lost and nothing switches it on again"},
	}
}

// Truth is what the harness knows of a fault that it has made. It comes from the harness and the host's own /proc, never
// from the agent.
type Truth struct {
	Fault  Fault         `json:"fault"`
	Start  time.Time     `json:"start"`  // this machine's clock; not later than the fault
	Margin time.Duration `json:"margin"` // the fault was there by Start plus this
	PID    int           `json:"pid,omitempty"`
	Comm   string        `json:"comm,omitempty"`
	CPU    int           `json:"cpu"` // -1 if it is no single CPU's
	UID    uint32        `json:"uid"`
	Boot   string        `json:"boot"` // the boot_id that was hit
}

// panicked matches the kernel's last words, after which no CPU does anything any more.
var panicked = regexp.MustCompile(`end Kernel panic - not syncing`)

// Fault breaks HOST and returns once the fault is there.
func (h *Host) Fault(ctx context.Context, f Fault) (Truth, error) {
	t := Truth{Fault: f, CPU: -1, Boot: h.Ready().Boot}
	var err error
	switch f {
	case FaultRunaway:
		err = h.runaway(ctx, &t)
	case FaultPanic:
		err = h.panic(ctx, &t)
	case FaultReboot:
		mark := h.EventMark()
		if err = h.sysrq(ctx, "b", &t); err == nil {
			_, err = h.WaitEvent(ctx, mark, EventReset)
		}
	case FaultFreeze:
		t.Start = time.Now()
		err = h.Freeze(ctx)
		t.Margin = time.Since(t.Start)
	case FaultPowercut:
		t.Start = time.Now()
		err = h.PowerOff(ctx)
		t.Margin = time.Since(t.Start)
	case FaultIRQsOff:
		err = h.irqsOff(ctx, &t)
	default:
		err = fmt.Errorf("there is no such fault; there are %v", faultNames())
	}
	if err != nil {
		return Truth{}, fmt.Errorf("fault %s: %w", f, err)
	}
	return t, nil
}

func faultNames() []Fault {
	var list []Fault
	for _, f := range Faults() {
		list = append(list, f.Fault)
	}
	return list
}

// panic crashes the kernel. When it claimed the panic is seen in HOST's memory, for until then sysrq has a slow console to write to.
func (h *Host) panic(ctx context.Context, t *Truth) error {
	word, done, err := h.word(ctx, "panic_cpu")
	if err != nil {
		return err
	}
	defer done()
	const none = ^uint32(0) // PANIC_CPU_INVALID
	if v := atomic.LoadUint32(word); v != none {
		return fmt.Errorf("panic_cpu of a kernel that lives is %d", v)
	}
	mark := h.Console().Mark()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	type span struct{ before, after time.Time }
	claimed := make(chan span, 1)
	go func() {
		defer close(claimed)
		for before := time.Now(); watching.Err() == nil; time.Sleep(100 * time.Microsecond) {
			now := time.Now()
			if atomic.LoadUint32(word) != none {
				claimed <- span{before, time.Now()}
				return
			}
			before = now
		}
	}()
	if err = h.sysrq(ctx, "c", t); err == nil {
		_, err = h.Console().Wait(ctx, mark, panicked)
	}
	stop()
	if s, ok := <-claimed; ok {
		t.Start, t.Margin = s.before, s.after.Sub(s.before)
	} else if err == nil {
		err = errors.New("the kernel said that it panicked, and its panic_cpu does not")
	}
	return err
}

// word maps a variable of HOST's kernel, which its own /proc/kallsyms and /proc/iomem place in the memory. done unmaps it.
func (h *Host) word(ctx context.Context, name string) (word *uint32, done func(), err error) {
	var at control.Symbols
	if err := h.Do(ctx, control.OpSymbol, control.SymbolArgs{Names: []string{"_text", name}}, &at); err != nil {
		return nil, nil, err
	}
	iomem, err := h.ReadFile(ctx, "/proc/iomem")
	if err != nil {
		return nil, nil, err
	}
	var code uint64
	for line := range strings.Lines(iomem) {
		if strings.Contains(line, "Kernel code") {
			begin, _, _ := strings.Cut(strings.TrimSpace(line), "-")
			code, _ = strconv.ParseUint(begin, 16, 64)
		}
	}
	text, va := at["_text"], at[name]
	path, size := h.RAM()
	off := int64(va - text + code)
	if text == 0 || va < text || code == 0 || va%4 != 0 || off < 0 || off > min(size, 2<<30)-4 { // above, addresses are not offsets into the file
		return nil, nil, fmt.Errorf("find %s in the host's memory: its kernel says %#x, and code from %#x on", name, at, code)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	page := int64(os.Getpagesize())
	b, err := unix.Mmap(int(f.Fd()), off&^(page-1), int(page), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map the host's memory: %w", err)
	}
	return (*uint32)(unsafe.Pointer(&b[off&(page-1)])), func() { unix.Munmap(b) }, nil
}

// sysrq presses a key and works out when, by this machine's clock.
func (h *Host) sysrq(ctx context.Context, key string, t *Truth) error {
	zero, margin, err := h.clock(ctx)
	if err != nil {
		return err
	}
	var fired control.Fired
	if err := h.Do(ctx, control.OpSysrq, control.SysrqArgs{Key: key}, &fired); err != nil {
		return err
	}
	// The kernel may be late to wake the one who presses the key, so that Start stays the earliest time.
	t.Start = zero.Add(fired.At.Boot - margin)
	t.Margin = 2*margin + 10*time.Millisecond
	return nil
}

// runaway starts a process that computes for ever. Everything that could give it away by habit is random.
func (h *Host) runaway(ctx context.Context, t *Truth) error {
	others, err := h.PS(ctx)
	if err != nil {
		return err
	}
	used := func(pid int) bool {
		return slices.ContainsFunc(others, func(p control.Process) bool { return p.PID == pid })
	}
	pid := 0
	for pid == 0 || used(pid) {
		pid = 2000 + rand.IntN(30000)
	}
	a := control.SpawnArgs{
		Comm: randomName(), CPU: rand.IntN(h.Ready().CPUs), PID: pid, UID: uint32(1000 + rand.IntN(60000)),
		Argv: []string{"sh", "-c", "while :; do :; done"},
	}
	began := time.Now()
	p, err := h.Spawn(ctx, a)
	if err != nil {
		return err
	}
	t.Start, t.Margin = began, time.Since(began)
	t.PID, t.Comm, t.CPU, t.UID = p.PID, a.Comm, a.CPU, a.UID
	return nil
}

func randomName() string {
	const letters = "abcdefghijklmnopqrstuvwxyz"
	b := make([]byte, 5+rand.IntN(9))
	for i := range b {
		b[i] = letters[rand.IntN(len(letters))]
	}
	return string(b)
}
