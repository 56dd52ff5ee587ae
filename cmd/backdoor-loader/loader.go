package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/early"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/boot/slot"
)

// loaderVersion is what a manifest's minLoader is compared with. It rises when an image can rely on something new.
const loaderVersion = 1

const (
	// watchdogTime is how long the machine may stand still. It goes on counting through the jump, so the next kernel and its agent have as
	// long to take it over.
	watchdogTime = 30 * time.Second
	// patience is how long the loader feeds the watchdog at most.
	patience = 2 * time.Minute
	// diskWait is how long it waits for a disk to appear.
	diskWait = 15 * time.Second
	// moduleWait is how long it waits before it looks for drivers of what has appeared meanwhile.
	moduleWait = 500 * time.Millisecond
)

// A settings is /etc/backdoor/loader.json.
type settings struct {
	Product string `json:"product"`
	Machine string `json:"machine"`
}

// A loader is one run of the loader.
type loader struct {
	console io.Writer
	began   time.Time

	settings settings
	roots    []byte // as found
	root     bundle.Root
	dog      *early.Watchdog
	tpm      *attest.TPM
	epoch    uint64 // the TPM's
	disk     *slot.Disk
	facts    handover.Facts
	feeding  atomic.Bool

	// openTPM waits for the TPM; busy reports whether its driver is not ready yet. load and jump are kexec. Tests have others.
	openTPM func() (*attest.TPM, error)
	busy    func() bool
	load    func(kernel, initrd *os.File, commandLine string) error
	jump    func() error
}

// say tells the console and, if it is worth remembering, the image that is started.
func (l *loader) say(note bool, format string, a ...any) {
	text := fmt.Sprintf(format, a...)
	fmt.Fprintf(l.console, "backdoor-loader: %6.3f %s\n", time.Since(l.began).Seconds(), text)
	if note && len(l.facts.Notes) < handover.MaxNotes {
		l.facts.Notes = append(l.facts.Notes, text)
	}
}

// run returns only if nothing could be started.
func run(console io.Writer) error {
	l := &loader{console: console, began: time.Now(), load: load, jump: jump}

	if _, _, err := early.Mount(); err != nil {
		l.say(true, "mount: %v", err)
	}
	// Images are read into memory in large pages, with fewer faults. Where that cannot be had they are read all the same.
	_ = os.WriteFile("/sys/kernel/mm/transparent_hugepage/shmem_enabled", []byte("always"), 0)
	var modules early.Modules
	_, detail, err := modules.Load(context.Background())
	l.say(false, "drivers: %s", detail)
	if err != nil {
		l.say(true, "load drivers: %v", err)
	}
	l.armWatchdog()
	if err := l.readSettings("/etc/backdoor"); err != nil {
		return err
	}
	l.openTPM = func() (*attest.TPM, error) {
		if err := modules.Late(); err != nil {
			return nil, fmt.Errorf("load drivers: %w", err)
		}
		return attest.Open()
	}
	l.busy = modules.Busy
	for deadline, again := time.Now().Add(diskWait), time.Now().Add(moduleWait); ; time.Sleep(20 * time.Millisecond) { // disks appear on their own time
		disk, err := slot.Find("/sys", "/dev")
		if err == nil {
			l.disk = disk
			break
		}
		if !errors.Is(err, slot.ErrNone) || time.Now().After(deadline) {
			return err
		}
		if time.Now().After(again) { // a memory card is known to the kernel, and wants a driver, only some time after its controller
			if _, _, err := modules.Load(context.Background()); err != nil {
				l.say(true, "load drivers: %v", err)
			}
			again = time.Now().Add(moduleWait)
		}
	}
	return l.boot()
}

// armWatchdog arms the watchdog, if there is one, and feeds it while the loader works, but not for ever.
func (l *loader) armWatchdog() {
	dog, err := early.Arm(watchdogTime)
	if errors.Is(err, early.ErrNoWatchdog) {
		l.say(false, "no watchdog: a hang will not end by itself")
		return
	}
	if err != nil {
		l.say(true, "%v", err)
		return
	}
	l.dog = dog
	l.facts.Watchdog = dog.Name
	l.say(false, "watchdog %s, %v", dog.Name, dog.Timeout)
	if dog.Bit {
		l.facts.WatchdogReset = true
		l.say(true, "the watchdog has reset the machine: what ran before hung")
	}
	l.feeding.Store(true)
	go func() {
		for end := time.Now().Add(patience); time.Now().Before(end) && l.feeding.Load(); time.Sleep(time.Second) {
			if err := dog.Feed(); err != nil {
				l.say(true, "feed the watchdog: %v", err)
			}
		}
	}()
}

func (l *loader) readSettings(dir string) error {
	b, err := os.ReadFile(dir + "/loader.json")
	if err != nil {
		return fmt.Errorf("read the loader's settings: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&l.settings); err != nil {
		return fmt.Errorf("read the loader's settings: %w", err)
	}
	if l.settings.Product == "" || l.settings.Machine == "" {
		return errors.New("the loader's settings name no product or no machine class")
	}
	if l.roots, err = os.ReadFile(dir + "/root.json"); err != nil {
		return fmt.Errorf("read the trusted key sets: %w", err)
	}
	var chain []bundle.Envelope
	if err := json.Unmarshal(l.roots, &chain); err != nil {
		return fmt.Errorf("read the trusted key sets: %w", err)
	}
	if l.root, err = bundle.ReadRoots(chain); err != nil {
		return fmt.Errorf("read the trusted key sets: %w", err)
	}
	return nil
}

// boot starts the first slot that can be started. It returns only if none can.
func (l *loader) boot() error {
	if err := l.disk.Damage(); err != nil {
		l.say(true, "the slots' state: %v", err)
	}
	state := l.disk.State()
	ahead := l.ahead(state)
	if tpm, err := l.openTPM(); errors.Is(err, attest.ErrNoTPM) {
		l.say(false, "no TPM: nothing is measured")
	} else if err != nil {
		l.say(true, "%v", err)
	} else {
		l.tpm = tpm
		l.say(false, "the TPM is ready")
		epoch, err := l.tpm.Epoch()
		if err != nil {
			l.say(true, "%v: the epoch is the disk's word alone", err)
		}
		l.epoch = epoch
	}
	order := state.Order(uint32(min(l.epoch, math.MaxUint32)))
	l.say(false, "epoch %d, slots to start: %v", max(l.epoch, uint64(state.Epoch)), order)
	var errs []error
	for _, name := range order {
		err := l.start(name, ahead)
		l.say(true, "slot %s: %v", name, err)
		errs = append(errs, fmt.Errorf("slot %s: %w", name, err))
		var fatal *dirtyError
		if errors.As(err, &fatal) {
			return err
		}
		if err := l.disk.Refuse(name, err); err != nil {
			l.say(true, "%v", err)
		}
	}
	if len(errs) == 0 {
		return errors.New("no slot holds an image")
	}
	return errors.Join(errs...)
}

// A dirtyError is a failure after measuring began: the PCR says that an image was started which was not, so only a reset helps.
type dirtyError struct{ err error }

func (e *dirtyError) Error() string { return e.err.Error() }
func (e *dirtyError) Unwrap() error { return e.err }

// A prepared is a slot's image that is verified, in memory, and loaded for kexec.
type prepared struct {
	name     slot.Name
	manifest bundle.Manifest
	measured attest.Image
	facts    handover.Facts // that were handed on
}

// ahead prepares what will most likely be started, while the TPM's driver is busy; nil if that is ready, or if nothing can be
// prepared: then it is seen why when its turn comes. What is prepared counts for nothing before the TPM's epoch is known.
func (l *loader) ahead(state slot.State) *prepared {
	order := state.Order(0)
	if !l.busy() || len(order) == 0 {
		return nil
	}
	p, err := l.prepare(order[0], true)
	if err != nil {
		l.say(false, "slot %s: %v; once more when the TPM is ready", order[0], err)
		return nil
	}
	return p
}

// fits reports whether what was prepared is what is to be started, with all that the image is to be told.
func (l *loader) fits(p *prepared, name slot.Name) bool {
	return p != nil && p.name == name && p.facts.Measured == (l.tpm != nil) && len(p.facts.Notes) == len(l.facts.Notes) &&
		p.facts.Fallback == l.disk.State().Fallback && uint64(p.manifest.Epoch) >= l.epoch
}

// prepare verifies what is in a slot, copies it into memory, verifies it there and loads it for kexec. measured says whether it will be
// measured.
func (l *loader) prepare(name slot.Name, measured bool) (*prepared, error) {
	dev := l.disk.Slot(name)
	if dev == nil {
		return nil, errors.New("the disk has no such slot")
	}
	state := l.disk.State()
	policy := bundle.Policy{
		Root: l.root, MinRoot: state.Root, MinEpoch: max(uint32(min(l.epoch, math.MaxUint32)), state.Epoch),
		Product: l.settings.Product, Machine: l.settings.Machine, Loader: loaderVersion,
	}
	img, err := bundle.OpenAt(dev, policy)
	if err != nil {
		return nil, err
	}
	m := img.Manifest
	l.say(false, "slot %s: %s %s, epoch %d", name, m.Product, m.Version, m.Epoch)
	if at := state.Slot(name); at.Version == "" {
		if err := l.disk.Adopt(name, &img.Head); err != nil {
			return nil, err
		}
	}
	p := &prepared{name: name, manifest: m}
	if p.measured, err = handover.Measured(dev, &img.Head); err != nil {
		return nil, err
	}
	kernel, err := memory("kernel", img.PartSize(bundle.PartKernel), func(b []byte) error { return img.ReadPart(b, bundle.PartKernel) })
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	p.facts = l.facts
	p.facts.Loader, p.facts.Slot, p.facts.Version, p.facts.Epoch = loaderVersion, string(name), m.Version, m.Epoch
	p.facts.Fallback, p.facts.Measured = state.Fallback, measured
	var log attest.Log
	if measured {
		log = p.measured.Events()
	}
	archive, err := p.facts.Archive(log, l.roots)
	if err != nil {
		return nil, err
	}
	// An archive begins at a multiple of four bytes (Documentation/driver-api/early-userspace/buffer-format.rst).
	size := img.PartSize(bundle.PartInitramfs)
	behind := (size + 3) &^ 3
	initrd, err := memory("initrd", behind+int64(len(archive)), func(b []byte) error {
		if err := img.ReadPart(b[:size], bundle.PartInitramfs); err != nil {
			return err
		}
		copy(b[behind:], archive)
		return nil
	})
	if err != nil {
		return nil, err
	}
	defer initrd.Close()
	l.say(false, "slot %s: verified", name)
	commandLine := strings.TrimSpace(m.CommandLine + " " + name.Argument())
	if err := l.load(kernel, initrd, commandLine); err != nil {
		return nil, fmt.Errorf("load it: %w", err)
	}
	l.say(false, "slot %s: loaded", name)
	return p, nil
}

// start starts what is in a slot, prepared or not. It returns only if that fails.
func (l *loader) start(name slot.Name, ahead *prepared) error {
	p := ahead
	if !l.fits(p, name) {
		var err error
		if p, err = l.prepare(name, l.tpm != nil); err != nil {
			return err
		}
	}
	m, measured, state := p.manifest, p.measured, l.disk.State()
	if l.tpm != nil && state.Slot(name).Status == slot.Good && uint64(m.Epoch) > l.epoch && state.Epoch >= m.Epoch {
		if err := l.tpm.RaiseEpoch(uint64(m.Epoch)); err != nil {
			l.say(false, "%v", err)
		}
	}
	if err := l.disk.Try(name); err != nil {
		l.say(false, "%v", err) // a disk that cannot be written can still be started from
	}
	if l.tpm != nil {
		for _, e := range measured.Events() {
			if err := l.tpm.Extend(e); err != nil {
				// The machine is started all the same, and cannot prove what it runs.
				l.say(false, "measure it: %v", err)
				break
			}
		}
		if err := l.tpm.LockEpoch(); err != nil {
			l.say(false, "%v", err)
		}
		l.tpm.Close()
	}
	l.say(false, "slot %s: jump", name)
	if l.dog != nil {
		l.feeding.Store(false)
		if err := l.dog.Feed(); err != nil {
			l.say(false, "feed the watchdog: %v", err)
		}
	}
	return &dirtyError{fmt.Errorf("jump: %w", l.jump())}
}

// memory makes a file in memory with that many bytes, zeros, and has it filled. The bytes behind them up to a whole page are there to be
// written to, and not in the file.
func memory(name string, size int64, fill func([]byte) error) (*os.File, error) {
	fail := func(err error) (*os.File, error) { return nil, fmt.Errorf("make room for the %s: %w", name, err) }
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return fail(err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(size); err != nil {
		f.Close()
		return fail(err)
	}
	page := int64(os.Getpagesize())
	b, err := unix.Mmap(fd, 0, int((size+page-1)/page*page), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		f.Close()
		return fail(err)
	}
	if err := errors.Join(fill(b[:size]), unix.Munmap(b)); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
