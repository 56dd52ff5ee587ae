package lab

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"github.com/backdoor-rhs/backdoor/tests/lab/qmp"
	"github.com/backdoor-rhs/backdoor/tests/lab/wire"
)

// Event is something that happened to HOST, as QMP, the control line or the process table tell it.
type Event struct {
	At   time.Time // this machine's clock
	Name string    // one of the constants below, or another of QMP's events
	Data json.RawMessage
}

// Names of events. Those in capitals are QMP's.
const (
	EventReady  = "ready"    // HOST's userland stands; Data is a control.Ready
	EventExit   = "exit"     // a spawned process has ended; Data is a control.Exit
	EventOn     = "on"       // HOST was switched on
	EventOff    = "off"      // HOST is off: switched off, or it has powered itself off
	EventReset  = "RESET"    // HOST starts anew; its memory is kept
	EventStop   = "STOP"     // all CPUs stand still
	EventResume = "RESUME"   // and run again
	EventHalt   = "SHUTDOWN" // HOST powers itself off
)

// Host is the machine that falls ill. Its methods ask HOST's own userland, or QEMU; they never go through the agent.
// It is safe for concurrent use.
type Host struct {
	UUID   string         // SMBIOS system UUID
	Kernel kernels.Kernel // what it boots

	machine *machine
	ram     *ram
	service *port
	media   media
	cable   *wire.Switch // into the DPU; nil if HOST is on QEMU's user network
	events  *trail[Event]
	log     *os.File

	mu   sync.Mutex
	line *line      // guarded by mu; nil while HOST is off
	port *wire.Port // on the cable; guarded by mu; nil while HOST is off
	// boots is how often the userland has come up; guarded by mu.
	boots int
	ready control.Ready // guarded by mu; of the last boot
}

// bootTime bounds a boot, from power on to the userland's first word. It takes two to seven seconds on two cores
// without KVM.
const bootTime = 3 * time.Minute

// newHost prepares HOST; it is off.
func newHost(dir string, cfg Config, k kernels.Kernel, initramfs string, cable *wire.Switch) (*Host, error) {
	h := &Host{UUID: newUUID(), Kernel: k, cable: cable, events: newTrail[Event](10000)}
	var err error
	if h.log, err = logFile(filepath.Join(dir, "host-console.log")); err != nil {
		return nil, err
	}
	if h.service, err = reserve(); err != nil {
		h.log.Close()
		return nil, err
	}
	if h.ram, err = newRAM(cfg.HostMemory); err != nil {
		h.log.Close()
		h.service.release()
		return nil, err
	}
	// panic=0, the kernel's default, is given so that it is seen: a dead host stays dead. The rest gives an emulated
	// machine what every real one has: no_timer_check, because the kernel's test of the timer interrupt gives QEMU less
	// time than a busy machine may need ("IO-APIC + timer doesn't work!"); tsc=reliable, because it believes the time
	// stamp counters of two CPUs, which are one and the same in QEMU, to be out of step.
	command := "console=ttyS0,115200 panic=0 no_timer_check tsc=reliable"
	if cfg.HostArgs != "" {
		command += " " + cfg.HostArgs
	}
	h.machine = &machine{
		name: "host", program: "qemu-system-x86_64", console: newConsole(h.log), onEvent: h.fromQEMU, onEnd: h.ended,
		args: func(f *fds) ([]string, error) {
			mem, err := h.ram.dup()
			if err != nil {
				return nil, err
			}
			memFD := f.add(mem)
			ctl, ctlFD, err := f.stream()
			if err != nil {
				return nil, err
			}
			h.mu.Lock()
			h.line = newLine(ctl, h.fromUserland)
			h.mu.Unlock()
			network, err := h.network(f)
			if err != nil {
				return nil, err
			}
			args := append(network,
				"-machine", "q35,memory-backend=ram0", "-accel", "tcg,thread=multi", "-cpu", cfg.HostCPU,
				// With one CPU, QEMU's atomic instructions would not be atomic against the other machine.
				"-smp", fmt.Sprintf("%d,maxcpus=%d", cfg.HostCPUs, max(cfg.HostCPUs, 2)),
				"-m", fmt.Sprintf("%dM", cfg.HostMemory>>20),
				"-object", fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=/proc/self/fd/%d,share=on", cfg.HostMemory>>20, memFD),
				"-uuid", h.UUID, "-rtc", "base=utc",
				"-chardev", fmt.Sprintf("socket,id=control,fd=%d", ctlFD), "-serial", "chardev:control",
				"-device", "virtio-net-pci,netdev=net0,romfile=,mac="+hostMAC,
				"-drive", h.media.drive(), "-device", "ide-cd,id=cdrom,drive=cd0,bus=ide.0",
			)
			if order := h.media.takeBoot(); order != "" {
				return append(args, "-boot", "order="+order), nil
			}
			return append(args, "-kernel", k.Vmlinuz, "-initrd", initramfs, "-append", command), nil
		},
	}
	return h, nil
}

// hostMAC is the address of HOST's network card.
const hostMAC = "52:54:00:12:34:56"

// network returns what HOST's network card is plugged into, for one run of its QEMU.
func (h *Host) network(f *fds) ([]string, error) {
	if h.cable == nil {
		return []string{"-netdev", "user,id=net0," + h.forward()}, nil
	}
	p, far, err := h.cable.Socket("host")
	if err != nil {
		return nil, &InfraError{Op: "plug the host into its cable", Err: err}
	}
	h.mu.Lock()
	h.port = p
	h.mu.Unlock()
	return []string{"-netdev", fmt.Sprintf("dgram,id=net0,local.type=fd,local.str=%d", f.add(far))}, nil
}

// forward has a user network of QEMU lead connections to HOST's service.
func (h *Host) forward() string {
	return fmt.Sprintf("hostfwd=tcp:%v-:%d", h.service, control.ServicePort)
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:])                             // never fails, by its documentation
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // RFC 9562, section 5.4
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func (h *Host) close() error {
	h.machine.off()
	h.service.release()
	return closeAll(h.ram.file, h.log)
}

func (h *Host) fromQEMU(e qmp.Event) {
	if e.Name == EventReset {
		h.mu.Lock()
		l := h.line
		h.mu.Unlock()
		if l != nil {
			l.forget()
		}
	}
	h.events.add(Event{e.At, e.Name, e.Data})
}

func (h *Host) fromUserland(r control.Response) {
	if r.Event == control.EventReady {
		var ready control.Ready
		if json.Unmarshal(r.Result, &ready) != nil {
			return // a line that a reset has cut in two
		}
		h.mu.Lock()
		h.ready = ready
		h.boots++
		h.mu.Unlock()
	}
	h.events.add(Event{time.Now(), r.Event, r.Result})
}

func (h *Host) ended() {
	h.mu.Lock()
	if h.line != nil {
		h.line.conn.Close()
		h.line = nil
	}
	if h.port != nil {
		h.port.Close()
		h.port = nil
	}
	h.mu.Unlock()
	h.events.add(Event{At: time.Now(), Name: EventOff})
}

// trouble matches what the console says when a boot has gone wrong for good.
var trouble = regexp.MustCompile(`^hostinit: |Kernel panic - not syncing`)

// boot switches HOST on for the first time and waits until its userland stands.
func (h *Host) boot(ctx context.Context) error {
	mark := h.events.mark()
	if err := h.PowerOn(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, bootTime, fmt.Errorf("nothing after %v", bootTime))
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	go func() {
		l, err := h.machine.console.Wait(ctx, 0, trouble)
		if err != nil {
			return // the boot went well, or the caller gave up
		}
		// Let the kernel finish what it has to say about it.
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
		}
		fail(errors.New(l.Text))
	}()
	e, err := h.events.wait(ctx, mark, func(e Event) bool { return e.Name == EventReady || e.Name == EventOff })
	if err == nil && e.Name == EventOff {
		err = errors.New("QEMU has ended")
	}
	if err != nil {
		return h.machine.bootError("its userland", err)
	}
	return nil
}

// RAM is HOST's memory as a file: its path, valid while the lab lives, and its size in bytes. hostmem.Q35Layout tells
// where host physical addresses are in it.
func (h *Host) RAM() (path string, size int64) { return h.ram.path(), h.ram.size }

// Console is HOST's first serial port.
func (h *Host) Console() *Console { return h.machine.console }

// Service is the loopback address ("127.0.0.1:port") of HOST's TCP service. It stays the same over power cycles.
func (h *Host) Service() string { return h.service.String() }

// Boots counts how often HOST's userland has come up.
func (h *Host) Boots() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.boots
}

// Ready is what the userland said of itself when it came up last.
func (h *Host) Ready() control.Ready {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ready
}

// WaitBoot waits until HOST's userland has come up more than n times and returns what it said of itself.
func (h *Host) WaitBoot(ctx context.Context, n int) (control.Ready, error) {
	mark := h.EventMark()
	for h.Boots() <= n {
		if _, err := h.events.wait(ctx, mark, func(e Event) bool { return e.Name == EventReady }); err != nil {
			return control.Ready{}, h.machine.bootError(fmt.Sprintf("boot %d of its userland", n+1), err)
		}
		mark = h.EventMark()
	}
	return h.Ready(), nil
}

// EventMark is the position behind the last event: a place to wait from.
func (h *Host) EventMark() int { return h.events.mark() }

// Events returns what has happened from mark on.
func (h *Host) Events(mark int) []Event { return h.events.since(mark) }

// WaitEvent returns the first event from mark on that has one of the names, as soon as it happens.
func (h *Host) WaitEvent(ctx context.Context, mark int, names ...string) (Event, error) {
	e, err := h.events.wait(ctx, mark, func(e Event) bool {
		for _, n := range names {
			if e.Name == n {
				return true
			}
		}
		return false
	})
	if err != nil {
		return Event{}, fmt.Errorf("wait for %v of the host: %w", names, err)
	}
	return e, nil
}

// WaitExit returns how a spawned process ended, as soon as its parent was told. mark is from before the end.
func (h *Host) WaitExit(ctx context.Context, mark, pid int) (control.Exit, error) {
	var x control.Exit
	_, err := h.events.wait(ctx, mark, func(e Event) bool {
		x = control.Exit{}
		return e.Name == EventExit && json.Unmarshal(e.Data, &x) == nil && x.PID == pid
	})
	if err != nil {
		return control.Exit{}, fmt.Errorf("wait for the end of process %d of the host: %w", pid, err)
	}
	return x, nil
}

// Do runs one operation of package control on HOST; args and result may be nil.
func (h *Host) Do(ctx context.Context, op string, args, result any) error {
	h.mu.Lock()
	l := h.line
	h.mu.Unlock()
	if l == nil {
		return fmt.Errorf("host: %s: %w", op, errOff)
	}
	return l.do(ctx, op, args, result)
}

// Exec runs a command line on HOST with busybox's shell. An exit code is no error.
func (h *Host) Exec(ctx context.Context, command string) (control.ExecResult, error) {
	var r control.ExecResult
	err := h.Do(ctx, control.OpExec, control.ExecArgs{Command: command}, &r)
	return r, err
}

// PS lists HOST's processes and kernel threads by its own /proc.
func (h *Host) PS(ctx context.Context) ([]control.Process, error) {
	var list []control.Process
	err := h.Do(ctx, control.OpPS, nil, &list)
	return list, err
}

// Spawn starts a process on HOST.
func (h *Host) Spawn(ctx context.Context, a control.SpawnArgs) (control.Process, error) {
	var p control.Process
	err := h.Do(ctx, control.OpSpawn, a, &p)
	return p, err
}

// ReadFile returns a file of HOST, e.g. "/proc/interrupts".
func (h *Host) ReadFile(ctx context.Context, path string) (string, error) {
	var r control.ReadResult
	if err := h.Do(ctx, control.OpRead, control.ReadArgs{Paths: []string{path}}, &r); err != nil {
		return "", err
	}
	if len(r.Files) != 1 {
		return "", fmt.Errorf("host: read %s: %d files in the answer", path, len(r.Files))
	}
	if e := r.Files[0].Error; e != "" {
		return "", fmt.Errorf("host: read: %s", e)
	}
	return r.Files[0].Data, nil
}

// TraceFunctions starts counting HOST's kernel functions with ftrace; stop it with Traced.
func (h *Host) TraceFunctions(ctx context.Context, names ...string) error {
	return h.Do(ctx, control.OpTrace, control.TraceArgs{Functions: names}, nil)
}

// Traced stops counting and tells what ran, in the order of the names.
func (h *Host) Traced(ctx context.Context) ([]control.FunctionCost, error) {
	var list []control.FunctionCost
	err := h.Do(ctx, control.OpTraced, nil, &list)
	return list, err
}

// CablePort is HOST's port on the cable into the DPU; nil while it is off, and without Config.Datapath.
func (h *Host) CablePort() *wire.Port {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.port
}

// Frames has HOST's root send raw Ethernet frames.
func (h *Host) Frames(ctx context.Context, a control.FramesArgs) (control.FramesResult, error) {
	var r control.FramesResult
	err := h.Do(ctx, control.OpFrames, a, &r)
	return r, err
}

// Dial connects to HOST's TCP service.
func (h *Host) Dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", h.Service())
}

// Pin keeps HOST on these CPUs of this machine until it is switched off, so that it cannot take the DPU's; none frees it again.
func (h *Host) Pin(cpus ...int) error { return h.machine.pin(cpus) }

// QMP runs a QMP command on HOST's QEMU; args and result may be nil.
func (h *Host) QMP(ctx context.Context, command string, args, result any) error {
	return h.machine.execute(ctx, command, args, result)
}

// clock measures HOST's clock against this machine's: zero is the time here at which HOST's CLOCK_BOOTTIME was zero,
// and the truth lies within margin of it.
func (h *Host) clock(ctx context.Context) (zero time.Time, margin time.Duration, err error) {
	for i := range 5 {
		var c control.Clock
		t0 := time.Now()
		if err := h.Do(ctx, control.OpTime, nil, &c); err != nil {
			return time.Time{}, 0, err
		}
		if half := time.Since(t0) / 2; i == 0 || half < margin {
			zero, margin = t0.Add(half).Add(-c.Boot), half
		}
	}
	return zero, margin, nil
}
