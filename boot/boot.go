// Package boot brings a DPU or BMC up when the agent is the program that u-root's init starts: from an initramfs with a
// running kernel to mounted state, loaded drivers, a network and an armed watchdog.
//
// Nothing here gives up: a machine that heals others has to come up with whatever works. Each step reports one of three
// outcomes (done; not done, because there is nothing to do it with; could not tell or do), is logged, and the next one
// goes on. Only Linux is supported, only what an initramfs offers is used (no udev, no modprobe, no shell).
//
// The order: pseudo-filesystems, kernel modules for the devices that are there, the watchdog, the state disk, the clock, the
// configuration (which lies on the state disk), host name, the watchdog's time-out, static addresses. What takes its time and
// is not needed to begin with comes in the background: the drivers of a TPM, random numbers, addresses by DHCP.
package boot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/u-root/u-root/pkg/mount"
	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/boot/early"
	"github.com/backdoor-rhs/backdoor/boot/wireguard"
)

// StateLabel is the label of the ext4 file system that keeps the agent's state.
const StateLabel = "backdoor-state"

// StateDir is where that file system is mounted.
const StateDir = "/var/lib/backdoor"

// Config is the part of the agent's configuration that says how the machine comes up. The zero value asks for DHCP on
// every network interface and the longest watchdog time-out that costs nobody a reset, 60 s.
type Config struct {
	// Hostname is set if it is not empty.
	Hostname string `json:"hostname,omitempty"`
	// Interfaces are the network interfaces to bring up. If there are none, all get DHCP.
	Interfaces []Interface `json:"interfaces,omitempty"`
	// NameServers are used besides those that DHCP names.
	NameServers []netip.Addr `json:"nameServers,omitempty"`
	// Tunnels are encrypted interfaces over the others. What a service may be reached through is said by the address that it
	// listens at.
	Tunnels []wireguard.Config `json:"tunnels,omitempty"`
	// WatchdogSeconds is the hardware watchdog's time-out: 0 means 60, -1 means that the watchdog stays off.
	WatchdogSeconds int `json:"watchdogSeconds,omitempty"`
}

// An Interface says how one network interface is set up.
type Interface struct {
	// Match selects the interface: its name in the kernel (eth0) or its MAC address.
	Match string `json:"match"`
	// DHCP asks for an address, in the background for as long as it takes, and keeps the lease alive.
	DHCP bool `json:"dhcp,omitempty"`
	// Addresses are static addresses with their prefix length.
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	// Gateway is the default route's next hop, if valid.
	Gateway netip.Addr `json:"gateway,omitzero"`
	// MTU in bytes; 0 leaves the driver's.
	MTU int `json:"mtu,omitempty"`
}

// Validate reports everything that is wrong with the configuration.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if len(c.Hostname) > 64 || strings.ContainsAny(c.Hostname, " \t\n/") {
		bad("hostname %q is not one", c.Hostname)
	}
	if c.WatchdogSeconds < -1 || c.WatchdogSeconds > 24*3600 {
		bad("watchdogSeconds %d: want -1, or 0 to 86400", c.WatchdogSeconds)
	}
	seen := map[string]bool{}
	for i, f := range c.Interfaces {
		switch key := strings.ToLower(f.Match); {
		case f.Match == "":
			bad("interfaces[%d]: match is empty", i)
		case seen[key]:
			bad("interfaces[%d]: %q is there twice", i, f.Match)
		default:
			seen[key] = true
		}
		if _, err := net.ParseMAC(f.Match); err != nil && len(f.Match) >= unix.IFNAMSIZ {
			bad("interfaces[%d]: match %q is neither an interface's name nor a MAC address", i, f.Match)
		}
		if f.MTU != 0 && (f.MTU < 68 || f.MTU > 65535) {
			bad("interfaces[%d]: mtu %d: want 68 to 65535", i, f.MTU)
		}
		for _, a := range f.Addresses {
			if !a.IsValid() {
				bad("interfaces[%d]: an address is not valid", i)
			}
		}
	}
	names := map[string]bool{}
	for i, t := range c.Tunnels {
		if err := t.Validate(); err != nil {
			bad("tunnels[%d]: %w", i, err)
		}
		if names[t.Name] {
			bad("tunnels[%d]: %q is there twice", i, t.Name)
		}
		names[t.Name] = true
	}
	for _, a := range c.NameServers {
		if !a.IsValid() {
			bad("nameServers: an address is not valid")
		}
	}
	return errors.Join(errs...)
}

// Outcome is how a step ended.
type Outcome = early.Outcome

// The outcomes.
const (
	Done    = early.Done
	Absent  = early.Absent
	Unclear = early.Unclear
)

// A Step is one thing that Up did, or tried to.
type Step struct {
	Name    string        `json:"name"`
	Outcome Outcome       `json:"outcome"`
	Detail  string        `json:"detail,omitempty"`
	Err     string        `json:"error,omitempty"`
	Took    time.Duration `json:"took"` // nanoseconds
	At      time.Duration `json:"at"`   // since the kernel's start, when it had ended; nanoseconds
}

// Options say what Up works with.
type Options struct {
	// Configure is called when the state directory is mounted and returns the configuration that lies there. On an
	// error the machine comes up with what was returned beside it. Nil: the zero Config.
	Configure func(stateDir string) (Config, error)
	// Logger gets one line a step. Nil: silent.
	Logger *slog.Logger
	// NetworkWait is how long the step waits for the first interface to have an address by DHCP. 0: 10 s. Interfaces that come
	// later are set up all the same.
	NetworkWait time.Duration
	// StateWait is how long Up waits for a disk with the state's label. 0: 1 s.
	StateWait time.Duration
}

// A Machine is a machine that Up brought up.
type Machine struct {
	log    *slog.Logger
	boot   time.Time
	cancel context.CancelFunc
	wg     sync.WaitGroup // background work: leases, watchdog, reaper, clock
	// devices is closed when no driver is being loaded any more, settled when each step has ended.
	devices, settled chan struct{}

	mu         sync.Mutex
	report     []Step
	persistent bool         // StateDir is on a disk
	stateDev   string       // the mounted disk
	alive      func() error // asked before the watchdog is fed
	dog        *early.Watchdog
}

// interfaceWait is how long a network interface is waited for if there is none when the drivers are loaded.
const interfaceWait = 3 * time.Second

// InImage reports whether this process runs as the first program of an initramfs: as process 1 or started by it, on a
// root file system in memory. Elsewhere Up must not be called.
func InImage() bool {
	if os.Getpid() != 1 && os.Getppid() != 1 {
		return false
	}
	ram, err := mount.IsTmpRamfs("/")
	return err == nil && ram
}

// Up brings the machine up as far as an agent needs to begin; see [Machine.Devices] and [Machine.Settled] for the rest. Its error
// is ctx's; everything else that goes wrong is a step of the report. Background work goes on until [Machine.Close], ctx's end, or
// the machine's.
//
// Preconditions: InImage, or a machine set aside for a test.
func Up(ctx context.Context, o Options) (*Machine, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.NetworkWait == 0 {
		o.NetworkWait = 10 * time.Second
	}
	if o.StateWait == 0 {
		o.StateWait = time.Second
	}
	background, cancel := context.WithCancel(ctx)
	m := &Machine{log: o.Logger, boot: time.Now(), cancel: cancel, devices: make(chan struct{}), settled: make(chan struct{})}
	var cfg Config
	m.step("mounts", early.Mount)
	seeded := seedRandom() // takes a second on some machines; meanwhile the rest goes on
	if os.Getpid() == 1 {
		m.background(background, reapOrphans)
	}
	var modules early.Modules
	m.step("modules", func() (Outcome, string, error) { return modules.Load(ctx) })
	go func() { // a driver that hangs must not keep the machine from closing down
		defer close(m.devices)
		m.step("late modules", func() (Outcome, string, error) {
			if err := modules.Late(); err != nil {
				return Unclear, "", err
			}
			return Done, "", nil
		})
	}()
	dog, noDog := early.Arm(defaultWatchdog) // the time that the loader gave us runs
	m.step("state", func() (Outcome, string, error) { return m.mountState(ctx, o.StateWait) })
	m.step("clock", func() (Outcome, string, error) { return setClock(clockFile) })
	m.background(background, func(ctx context.Context) { keepClock(ctx, clockFile) })
	if o.Configure != nil {
		m.step("config", func() (Outcome, string, error) {
			c, err := o.Configure(StateDir)
			if verr := c.Validate(); verr != nil {
				return Unclear, "using the defaults", errors.Join(err, verr)
			}
			cfg = c
			if err != nil {
				return Unclear, "using the defaults", err
			}
			return Done, "", nil
		})
	}
	m.step("hostname", func() (Outcome, string, error) { return setHostname(cfg.Hostname) })
	m.step("watchdog", func() (Outcome, string, error) { return m.keepWatchdog(background, dog, noDog, cfg.WatchdogSeconds) })
	wired := m.wire(cfg)
	if len(cfg.Tunnels) > 0 {
		m.step("tunnels", func() (Outcome, string, error) { return openTunnels(cfg.Tunnels) })
	}
	m.background(background, func(ctx context.Context) {
		// The DHCP client needs random numbers.
		m.step("random", func() (Outcome, string, error) { return waitRandom(ctx, seeded, entropyWait) })
		m.step("network", func() (Outcome, string, error) {
			for late := time.Now().Add(interfaceWait); wired.absent && time.Now().Before(late) && ctx.Err() == nil; wired = m.wire(cfg) {
				time.Sleep(20 * time.Millisecond) // a driver that has to wait for another, as for a PHY's, finds its device later
			}
			return m.network(ctx, wired, o.NetworkWait)
		})
		select {
		case <-m.devices:
			close(m.settled)
		case <-ctx.Done():
		}
	})
	if err := ctx.Err(); err != nil {
		m.Close()
		return nil, fmt.Errorf("bring the machine up: %w", err)
	}
	return m, nil
}

// Devices is closed when all drivers are loaded that there will be: what has no device then has none.
func (m *Machine) Devices() <-chan struct{} { return m.devices }

// Settled is closed when each step has ended.
func (m *Machine) Settled() <-chan struct{} { return m.settled }

// Uptime is how long ago the kernel was started.
func Uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// openTunnels sets up the encrypted interfaces. The detail names the public keys, which peers need.
func openTunnels(tunnels []wireguard.Config) (Outcome, string, error) {
	var did []string
	var errs []error
	for _, t := range tunnels {
		if key, err := wireguard.Up(t); err != nil {
			errs = append(errs, err)
		} else {
			did = append(did, t.Name+" has public key "+key.String())
		}
	}
	if errs != nil {
		return Unclear, strings.Join(did, ", "), errors.Join(errs...)
	}
	return Done, strings.Join(did, ", "), nil
}

// step runs one step, and reports and logs how it ended.
func (m *Machine) step(name string, f func() (Outcome, string, error)) {
	start := time.Now()
	outcome, detail, err := f()
	s := Step{Name: name, Outcome: outcome, Detail: detail, Took: time.Since(start), At: Uptime()}
	attrs := []any{"step", name, "outcome", outcome, "took", s.Took.Round(time.Millisecond), "at", s.At.Round(time.Millisecond)}
	if detail != "" {
		attrs = append(attrs, "detail", detail)
	}
	if err != nil {
		s.Err = err.Error()
		m.log.Warn("boot", append(attrs, "err", err)...)
	} else {
		m.log.Info("boot", attrs...)
	}
	m.mu.Lock()
	m.report = append(m.report, s)
	m.mu.Unlock()
}

func (m *Machine) background(ctx context.Context, f func(context.Context)) {
	m.wg.Go(func() { f(ctx) })
}

// Report returns the steps so far, in order.
func (m *Machine) Report() []Step {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]Step(nil), m.report...)
}

// Persistent reports whether the state directory outlives a reboot. If not, it is memory: journal, credentials and
// certificate are new after each boot.
func (m *Machine) Persistent() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.persistent
}

// Close ends the background work. The watchdog, if armed, is disarmed: a caller that wants to be reset calls
// [Machine.Reboot] or dies.
func (m *Machine) Close() error {
	m.cancel()
	m.wg.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dog == nil {
		return nil
	}
	err := m.dog.Disarm()
	m.dog = nil
	return err
}

func setHostname(name string) (Outcome, string, error) {
	if name == "" {
		return Absent, "none configured", nil
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return Unclear, "", fmt.Errorf("set the host name: %w", err)
	}
	return Done, name, nil
}
