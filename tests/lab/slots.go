package lab

import (
	"crypto"
	"crypto/ed25519"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/images/builder"
	"github.com/backdoor-rhs/backdoor/images/bundler"
)

// Slots is the disk that the DPU is started from, with Config.Slots: the loader stands for its ROM, and everything else comes from
// the disk. Its methods change the disk from outside; the DPU must be off for those that write.
type Slots struct {
	// Disk is the image of the disk, Bundle the update file of what it was made with.
	Disk, Bundle string
	// Roots are the key sets that the loader trusts.
	Roots []bundle.Envelope

	dpu    *DPU
	dir    string
	key    ed25519.PrivateKey
	loader string // its initramfs, with the key sets
	image  Release
}

// A Release is what a bundle is made of. Empty fields are those of the image that the lab was made with.
type Release struct {
	Version   string // "1.0.0"
	Epoch     uint32 // 1
	Arguments string // what the kernel is told besides
	Kernel    string
	Initramfs string
	Machine   string // "dpu-arm64"
}

// slotSize is the size of a slot in bytes; the files are sparse.
const slotSize = 96 << 20

// makeSlots makes the disk with the image in it.
func makeSlots(dir string, cfg Config) (*Slots, error) {
	s := &Slots{
		Disk: filepath.Join(dir, "dpu-slots.img"), Bundle: filepath.Join(dir, "first.bundle"), dir: dir, loader: filepath.Join(dir, "loader.cpio"),
		image: Release{"1.0.0", 1, "", cfg.DPUKernel, cfg.DPUImage, "dpu-arm64"},
	}
	var err error
	if s.key, s.Roots, err = bundler.Development(filepath.Join(dir, "release-keys")); err != nil {
		return nil, &InfraError{Op: "make the release keys", Err: err}
	}
	if err := bundler.Loader(s.loader, cfg.DPULoader, s.Roots); err != nil {
		return nil, &InfraError{Op: "make the DPU's loader", Err: err, Next: "build it: make images"}
	}
	if err := s.Make(s.Bundle, Release{}); err != nil {
		return nil, err
	}
	if err := s.burn(); err != nil {
		return nil, &InfraError{Op: "make the DPU's disk", Err: err}
	}
	return s, nil
}

func (s *Slots) policy() (bundle.Policy, error) {
	root, err := bundle.ReadRoots(s.Roots)
	return bundle.Policy{Root: root}, err
}

// burn makes the disk anew, with the first bundle in slot A and as the recovery image.
func (s *Slots) burn() error {
	p, err := s.policy()
	if err != nil {
		return err
	}
	f, err := os.Open(s.Bundle)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = bundler.Burn(s.Disk, f, slot.Layout{Slot: slotSize}, p, time.Now())
	return err
}

// Make writes a signed bundle.
func (s *Slots) Make(path string, r Release) error {
	or := func(v *string, d string) {
		if *v == "" {
			*v = d
		}
	}
	or(&r.Version, s.image.Version)
	or(&r.Kernel, s.image.Kernel)
	or(&r.Initramfs, s.image.Initramfs)
	or(&r.Machine, s.image.Machine)
	if r.Epoch == 0 {
		r.Epoch = s.image.Epoch
	}
	err := bundler.MakeFile(path, bundler.Options{
		Machine: r.Machine, Version: r.Version, Epoch: r.Epoch, MinLoader: 1, Released: time.Now(), CommandLine: strings.TrimSpace(commandLine("dpu-arm64") + " " + r.Arguments),
		Kernel: r.Kernel, Initramfs: r.Initramfs, Roots: s.Roots, Signers: []crypto.Signer{s.key},
	})
	if err != nil {
		return &InfraError{Op: "make the bundle " + r.Version, Err: err}
	}
	return nil
}

// open calls f with the disk.
func (s *Slots) open(f func(*slot.Disk) error) error {
	dev, err := slot.OpenFile(s.Disk, false)
	if err != nil {
		return err
	}
	defer dev.Close()
	d, err := slot.OpenGPT(dev)
	if err != nil {
		return err
	}
	return f(d)
}

// State returns the state of the slots as it is on the disk.
func (s *Slots) State() (st slot.State, err error) {
	err = s.open(func(d *slot.Disk) error { st = d.State(); return nil })
	return st, err
}

func (s *Slots) mustBeOff() error {
	if s.dpu.machine.current() != nil {
		return errors.New("the DPU is on: its disk must be left alone")
	}
	return nil
}

// Install puts a release into the slot that does not run, as an update does, to be tried with the next start.
func (s *Slots) Install(r Release) error {
	if err := s.mustBeOff(); err != nil {
		return err
	}
	file := filepath.Join(s.dir, "update.bundle")
	if err := s.Make(file, r); err != nil {
		return err
	}
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	p, err := s.policy()
	if err != nil {
		return err
	}
	head, err := bundle.OpenAt(in, p)
	if err != nil {
		return err
	}
	return s.open(func(d *slot.Disk) error {
		u, err := d.Begin(d.State().Active, &head.Head, 0)
		if err != nil {
			return err
		}
		if _, err := io.Copy(u, io.NewSectionReader(in, 0, head.Size())); err != nil {
			return err
		}
		return u.Commit(p, false, time.Now())
	})
}

// Count notes a start of a slot, as the loader does before it jumps.
func (s *Slots) Count(n slot.Name) error {
	if err := s.mustBeOff(); err != nil {
		return err
	}
	return s.open(func(d *slot.Disk) error { return d.Try(n) })
}

// Image returns what the loader measures of a bundle.
func (s *Slots) Image(path string) (attest.Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return attest.Image{}, err
	}
	defer f.Close()
	_, envelope, m, _, err := bundle.Read(f)
	if err != nil {
		return attest.Image{}, err
	}
	return handover.Image(envelope.Payload, m)
}

// Tamper changes the byte at off of a slot, as an attacker or a worn memory would.
func (s *Slots) Tamper(n slot.Name, off int64) error {
	if err := s.mustBeOff(); err != nil {
		return err
	}
	return s.open(func(d *slot.Disk) error {
		var b [1]byte
		if _, err := d.Slot(n).ReadAt(b[:], off); err != nil {
			return err
		}
		b[0] ^= 1
		_, err := d.Slot(n).WriteAt(b[:], off)
		return err
	})
}

// Read returns the whole disk, and Write replaces it.
func (s *Slots) Read() ([]byte, error) { return os.ReadFile(s.Disk) }

// Write replaces the whole disk by what Read returned before: an attacker's way back.
func (s *Slots) Write(b []byte) error {
	if err := s.mustBeOff(); err != nil {
		return err
	}
	return os.WriteFile(s.Disk, b, 0o600)
}

// args are the DPU's QEMU arguments: its ROM, its disk, its watchdog.
func (s *Slots) args(cfg Config) []string {
	return []string{
		"-drive", "if=none,id=slots,format=raw,file=" + s.Disk, "-device", "virtio-blk-pci,drive=slots,romfile=",
		"-device", "i6300esb", "-action", "watchdog=reset",
		"-kernel", cfg.DPUKernel, "-initrd", s.loader, "-append", commandLine("loader-arm64"),
	}
}

// commandLine is what the kernel of one of the project's images is started with.
func commandLine(image string) string {
	img, err := builder.Lookup(image)
	if err != nil {
		panic(err)
	}
	return img.CommandLine()
}
