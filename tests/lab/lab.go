// Package lab runs two real machines in QEMU and the wires between them: HOST, a stock Debian kernel that falls ill, and
// DPU, our image, which sees HOST's memory as a PCI window and nothing else of it.
//
// Beside them stand a TPM for the DPU (swtpm), a BMC for HOST that really switches its power (package bmc), and an
// Ethernet switch (package wire). The lab knows the truth about HOST by its own means: QMP, the serial console and a
// control line to HOST's userland (package control). What the agent says is held against that truth.
//
// Nothing here needs root, a fixed port or a fixed path; labs run side by side. Everything dies with the process that
// called Up, however it ends: the machines are killed by the kernel with their parent, and HOST's RAM is an anonymous
// file that is only reachable through the lab's process.
package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/wireguard"
	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/tests/lab/bmc"
	"github.com/backdoor-rhs/backdoor/tests/lab/wire"
	"golang.org/x/sys/unix"
)

// Config says what lab to build. The zero value is HOST with Debian's 6.1 cloud kernel and a DPU with the built image.
type Config struct {
	// Dir is the run directory: logs, state disk, sockets. Empty means a temporary one that Close removes.
	Dir string
	// HostKernel is "6.1", "6.12", "6.1-generic" or "6.12-generic"; empty means "6.1". The short names are the cloud flavour.
	HostKernel string
	// HostMemory is HOST's RAM in bytes, a power of two of at least 256 MiB; zero means 512 MiB.
	HostMemory int64
	// HostCPUs is the number of HOST's CPUs; zero means 2.
	HostCPUs int
	// HostCPU is QEMU's CPU model with its options; empty means "max", which has five-level page tables.
	HostCPU string
	// HostArgs is appended to HOST's kernel command line.
	HostArgs string
	// NoDPU leaves the DPU out: HOST and its BMC alone.
	NoDPU bool
	// DPUImage and DPUKernel are the DPU's initramfs and kernel; empty means build/images of this checkout.
	DPUImage, DPUKernel string
	// Slots starts the DPU as a real one is: the loader, which stands for its ROM, verifies and measures the image in one of the slots of
	// a disk (DPU.Slots), which is made of DPUImage and DPUKernel. Without it QEMU starts the image itself.
	Slots bool
	// DPULoader is the loader's initramfs; empty means build/images of this checkout.
	DPULoader string
	// IPMI has the agent reach HOST's BMC by IPMI alone; the DPU's image must have ipmitool, and this machine ipmi_sim.
	IPMI bool
	// NoWrites keeps the agent from changing HOST, by stores or through its BMC: the lab's own control experiment.
	NoWrites bool
	// Engine is the agent's path to HOST's memory: "window" (default) or "dma", the model of a DMA engine over it.
	Engine string
	// Actions names what the access agreement allows; nil means everything that the agent knows.
	Actions []string
	// Unagreed leaves the access agreement out of the DPU's state: the DPU waits for the one that the host's part in it (backdoor-agree, in
	// HOST's userland then) holds in HOST's memory. The agreement as it was signed is in the run directory.
	Unagreed bool
	// SecondKernel puts a second kernel and userland, the same again, into HOST's memory, which Host.Kexec has it start.
	SecondKernel bool
	// Policy is the agent's policy file; nil means its default, which heals nothing without being asked.
	Policy json.RawMessage
	// CacheDir keeps HOST's userland between runs; empty means the user's cache directory.
	CacheDir string
	// Log gets a line per step of progress; nil means none.
	Log io.Writer
	// InitialPassword leaves the DPU's initial password as it is; with it, nothing but changing it is allowed.
	InitialPassword bool
	// Datapath puts the DPU between HOST and the wire: HOST's only network is a cable into the DPU, which forwards to the wire, and
	// there a router leads HOST's traffic on as QEMU's user network does without.
	Datapath bool
	// Tunnel, if not zero, is a monitor's WireGuard key: the DPU makes a tunnel for it at boot, between DPUTunnelAddress and
	// MonitorTunnelAddress, serves RDMA inside as well, and gives leases nowhere else. Its own key is in StateDir, in the file
	// tunnel-key.
	Tunnel wireguard.Key
	// WireCapture, if not empty, is a file that gets every frame on the wire in pcap format.
	WireCapture string
}

// The paths of the agent to HOST's memory.
const (
	EngineWindow = "window"
	EngineDMA    = "dma"
)

// fill completes the zero values and checks the rest.
func (c *Config) fill() error {
	if c.HostKernel == "" {
		c.HostKernel = "6.1"
	}
	if c.HostMemory == 0 {
		c.HostMemory = 512 << 20
	}
	if c.HostCPUs == 0 {
		c.HostCPUs = 2
	}
	if c.HostCPU == "" {
		c.HostCPU = "max"
	}
	if c.Engine == "" {
		c.Engine = EngineWindow
	}
	if c.Log == nil {
		c.Log = io.Discard
	}
	var errs []error
	if c.HostMemory < 256<<20 || c.HostMemory&(c.HostMemory-1) != 0 {
		errs = append(errs, fmt.Errorf("the host's memory must be a power of two of at least 256 MiB, not %d bytes: it becomes a PCI BAR", c.HostMemory))
	}
	if c.HostCPUs < 1 || c.HostCPUs > 8 {
		errs = append(errs, fmt.Errorf("the host may have 1 to 8 CPUs, not %d", c.HostCPUs))
	}
	if c.Engine != EngineWindow && c.Engine != EngineDMA {
		errs = append(errs, fmt.Errorf("the engine is %q or %q, not %q", EngineWindow, EngineDMA, c.Engine))
	}
	if c.Datapath && c.NoDPU {
		errs = append(errs, errors.New("the host's cable leads into the DPU: there is no datapath without one"))
	}
	if c.CacheDir == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			errs = append(errs, err)
		}
		c.CacheDir = filepath.Join(dir, "backdoor")
	}
	if err := errors.Join(errs...); err != nil {
		return &InfraError{Op: "configure", Err: err}
	}
	return nil
}

// Lab is a running lab.
type Lab struct {
	Host *Host
	DPU  *DPU // nil with Config.NoDPU
	BMC  *bmc.BMC
	IPMI *bmc.IPMI // nil without Config.IPMI
	Wire *wire.Switch
	// Cable is the wire between HOST and the DPU; nil without Config.Datapath.
	Cable *wire.Switch

	dir       string
	temporary bool
	lock      *os.File
	closers   []func() error // in the order of their making
}

// Apart gives HOST's and the DPU's processors a CPU of this machine each, as they have processors of their own, until undo is called or the
// machine is switched off. The DPU's devices, its end of the cables above all, take of HOST's: a real DPU has them beside its processor. Where
// this program may use one CPU only, nothing is done.
func (l *Lab) Apart(ctx context.Context) (undo func(), err error) {
	var ours unix.CPUSet
	if err := unix.SchedGetaffinity(0, &ours); err != nil {
		return nil, &InfraError{Op: "ask which CPUs are ours", Err: err}
	}
	var cpus []int
	for i := 0; len(cpus) < min(ours.Count(), 2); i++ {
		if ours.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	if len(cpus) < 2 {
		return func() {}, nil
	}
	undo = func() { _ = errors.Join(l.Host.Pin(), l.DPU.Pin()) }
	if err := errors.Join(l.Host.Pin(cpus[0]), l.DPU.Split(ctx, cpus[1], cpus[0])); err != nil {
		undo()
		return nil, err
	}
	return undo, nil
}

// Up builds a lab and returns once HOST's userland stands and the DPU's Redfish service answers.
// It returns a *BootError when a machine did not come up and an *InfraError when the lab could not be built.
func Up(ctx context.Context, cfg Config) (l *Lab, err error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	began := time.Now()
	var saying sync.Mutex
	say := func(format string, a ...any) {
		saying.Lock()
		defer saying.Unlock()
		fmt.Fprintf(cfg.Log, "%6.1f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, a...))
	}
	l = new(Lab)
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
			l = nil
		}
	}()
	if err := l.makeDir(cfg.Dir); err != nil {
		return l, err
	}
	for _, p := range programs(cfg) {
		if _, err := find(p); err != nil {
			return l, err
		}
	}
	root, err := checkout()
	if err != nil {
		return l, err
	}
	if err := cfg.findImage(root); err != nil {
		return l, err
	}
	target, err := kernels.Lookup(cfg.HostKernel)
	if err != nil {
		return l, &InfraError{Op: "choose the host's kernel", Err: err}
	}
	k, err := kernels.Fetch(ctx, filepath.Join(cfg.CacheDir, "kernels"), target)
	if err != nil {
		return l, &InfraError{Op: "get the host's kernel", Err: err, Next: "the first use of a kernel downloads it: is there a network, and do the machine's package sources work?"}
	}
	initramfs, err := userland(ctx, cfg.CacheDir, root, k, cfg.Unagreed)
	if err != nil {
		return l, err
	}
	if cfg.SecondKernel {
		if initramfs, err = withSecond(l.dir, initramfs, k); err != nil {
			return l, err
		}
	}
	say("host: Linux %s, %d CPUs, %d MiB", k.Release, cfg.HostCPUs, cfg.HostMemory>>20)
	if err := l.makeWire(cfg.WireCapture); err != nil {
		return l, err
	}
	if cfg.Datapath {
		if l.Cable, err = wire.New(wire.Options{Hub: true}); err != nil {
			return l, &InfraError{Op: "make the host's cable", Err: err}
		}
		l.closers = append(l.closers, l.Cable.Close)
	}
	if l.Host, err = newHost(l.dir, cfg, k, initramfs, l.Cable); err != nil {
		return l, err
	}
	l.closers = append(l.closers, l.Host.close)
	if cfg.Datapath {
		if err := l.startRouter(say); err != nil {
			return l, err
		}
	}
	l.BMC, err = bmc.Start(bmc.Options{
		Machine: l.Host, UUID: l.Host.UUID, MemoryGiB: float64(cfg.HostMemory) / (1 << 30), CPUs: cfg.HostCPUs,
		Names: []string{gateway}, StateDir: filepath.Join(l.dir, "bmc"),
	})
	if err != nil {
		return l, &InfraError{Op: "start the host's BMC", Err: err}
	}
	l.closers = append(l.closers, l.BMC.Close)
	if cfg.IPMI {
		dir := filepath.Join(l.dir, "ipmi")
		if err := os.Mkdir(dir, 0o700); err != nil {
			return l, &InfraError{Op: "start the host's BMC", Err: err}
		}
		if l.IPMI, err = bmc.StartIPMI(ctx, l.Host, dir); err != nil {
			return l, &InfraError{Op: "start the host's BMC", Err: err}
		}
		l.closers = append(l.closers, l.IPMI.Close)
	}
	if !cfg.NoDPU {
		if l.DPU, err = newDPU(l.dir, cfg, l); err != nil {
			return l, err
		}
		l.closers = append(l.closers, l.DPU.close)
	}
	// The machines boot at the same time, and the failure of one ends the wait for the other.
	both, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	errs := make(chan error, 2)
	wait := 1
	go func() {
		err := l.Host.boot(both)
		if err == nil {
			say("host: its userland stands")
		}
		errs <- err
	}()
	if l.DPU != nil {
		wait++
		go func() {
			err := l.DPU.boot(both)
			if err == nil {
				say("dpu: its Redfish service answers at %s", l.DPU.URL)
				if !cfg.InitialPassword {
					err = l.DPU.setPassword(both)
				}
			}
			errs <- err
		}()
	}
	for range wait {
		if e := <-errs; e != nil && err == nil {
			err = e
			fail(errors.New("the other machine has failed"))
		}
	}
	return l, err
}

// makeWire makes the switch, with its capture file and its socket for other programs.
func (l *Lab) makeWire(capture string) error {
	var o wire.Options
	if capture != "" {
		f, err := os.Create(capture)
		if err != nil {
			return &InfraError{Op: "capture the wire", Err: err}
		}
		l.closers = append(l.closers, f.Close)
		o.Capture = f
	}
	var err error
	if l.Wire, err = wire.New(o); err != nil {
		return &InfraError{Op: "make the wire", Err: err}
	}
	l.closers = append(l.closers, l.Wire.Close)
	if err := l.Wire.Listen(filepath.Join(l.dir, "wire.sock")); err != nil {
		return &InfraError{Op: "make the wire", Err: err}
	}
	return nil
}

// findImage completes the paths of the DPU's image and kernel, and sees that they are there.
func (c *Config) findImage(root string) error {
	if c.NoDPU {
		return nil
	}
	built := filepath.Join(root, "build", "images", "dpu-arm64")
	if c.DPUImage == "" {
		c.DPUImage = built + ".cpio.zst"
	}
	if c.DPUKernel == "" {
		c.DPUKernel = built + ".vmlinuz"
	}
	files := []string{c.DPUImage, c.DPUKernel}
	if c.Slots {
		if c.DPULoader == "" {
			c.DPULoader = filepath.Join(root, "build", "images", "loader-arm64.cpio.zst")
		}
		files = append(files, c.DPULoader)
	}
	for _, p := range files {
		if _, err := os.Stat(p); err != nil {
			return &InfraError{Op: "find the DPU's image", Err: err, Next: "build it: make images"}
		}
	}
	return nil
}

// programs lists what the lab will run.
func programs(cfg Config) []string {
	list := []string{"qemu-system-x86_64"}
	if !cfg.NoDPU {
		list = append(list, "qemu-system-aarch64", "swtpm", "mkfs.ext4")
	}
	return list
}

// tempPrefix begins the names of temporary run directories.
const tempPrefix = "backdoor-lab-"

// makeDir makes the run directory and locks it against other labs.
func (l *Lab) makeDir(dir string) error {
	sweep()
	var err error
	if dir == "" {
		l.temporary = true
		if dir, err = os.MkdirTemp("", tempPrefix); err != nil {
			return &InfraError{Op: "make the run directory", Err: err}
		}
	} else if dir, err = filepath.Abs(dir); err != nil {
		return &InfraError{Op: "make the run directory", Err: err}
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return &InfraError{Op: "make the run directory", Err: err}
	}
	l.dir = dir
	l.lock, err = lockDir(dir)
	if err != nil {
		return &InfraError{Op: "lock the run directory", Err: fmt.Errorf("%s: %w", dir, err), Next: "another lab uses it"}
	}
	return nil
}

// lockDir takes the lock that a living lab holds on its run directory. It ends with the process.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sweep removes the temporary run directories of labs that were killed before they could do it.
func sweep() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), tempPrefix+"*")) // the pattern is valid
	for _, d := range dirs {
		st, err := os.Stat(d)
		if err != nil || time.Since(st.ModTime()) < time.Minute {
			continue // it may be one that is just being made
		}
		if f, err := lockDir(d); err == nil {
			os.RemoveAll(d)
			f.Close()
		}
	}
}

// Close stops everything, and removes everything that Up made unless Config.Dir was given; then the logs stay.
// It may be called more than once.
func (l *Lab) Close() error {
	var errs []error
	for len(l.closers) > 0 {
		last := len(l.closers) - 1
		errs = append(errs, l.closers[last]())
		l.closers = l.closers[:last]
	}
	if l.temporary && l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	if l.lock != nil {
		if !l.temporary {
			if err := os.Remove(l.lock.Name()); !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		errs = append(errs, l.lock.Close())
		l.lock = nil
	}
	return errors.Join(errs...)
}

// Dir is the run directory.
func (l *Lab) Dir() string { return l.dir }
