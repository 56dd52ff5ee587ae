package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/attest/attesttest"
	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/boot/slot"
)

var today = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// A bench is a machine that the loader runs on: a disk with two slots, a TPM, and a kexec that only notes what it was given.
type bench struct {
	t     *testing.T
	key   ed25519.PrivateKey
	root  bundle.Root
	chain []bundle.Envelope
	disk  *slot.Disk
	dir   string
	tpm   string // the TPM's memory; empty: none
	late  bool   // the TPM's driver takes its time
}

// benches runs f on a machine whose TPM is ready at once, and on one on which it takes its time.
func benches(t *testing.T, f func(*testing.T, *bench)) {
	for name, late := range map[string]bool{"ready TPM": false, "late TPM": true} {
		t.Run(name, func(t *testing.T) { f(t, newBench(t, late)) })
	}
}

func newBench(t *testing.T, late bool) *bench {
	t.Helper()
	b := &bench{t: t, late: late, key: ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)), dir: t.TempDir(), tpm: t.TempDir()}
	public := b.key.Public().(ed25519.PublicKey)
	role := bundle.Role{Keys: []string{bundle.KeyID(public)}, Threshold: 1}
	b.root = bundle.Root{
		Format: 1, Version: 1, Expires: today.AddDate(1, 0, 0), Keys: []bundle.Key{{ID: role.Keys[0], Public: public}}, Root: role, Release: role,
	}
	e, err := bundle.NewRoot(b.root)
	if err == nil {
		err = e.Sign(b.key)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.chain = []bundle.Envelope{e}
	for name, size := range map[string]int64{"state": slot.MinState, "a": 1 << 20, "b": 1 << 20, "golden": 1 << 20} {
		if err := os.WriteFile(filepath.Join(b.dir, name), make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.open()
	return b
}

func (b *bench) device(name string) slot.Device {
	b.t.Helper()
	f, err := slot.OpenFile(filepath.Join(b.dir, name), false)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { f.Close() })
	return f
}

// open opens the disk anew, as after a reset.
func (b *bench) open() {
	b.t.Helper()
	var err error
	if b.disk, err = slot.Open(b.device("state"), b.device("a"), b.device("b"), b.device("golden")); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) bundle(version string, epoch uint32) []byte {
	b.t.Helper()
	parts := []bundle.Content{
		{Name: bundle.PartKernel, From: strings.NewReader("kernel " + version), Size: int64(len("kernel " + version))},
		{Name: bundle.PartInitramfs, From: strings.NewReader("initramfs!!"), Size: 11},
	}
	m, err := bundle.Describe(bundle.Manifest{
		Format: 1, Product: "backdoor", Machine: "dpu-arm64", Version: version, Epoch: epoch, Released: today, Expires: today.AddDate(1, 0, 0),
		MinLoader: 1, CommandLine: "quiet",
	}, parts)
	if err == nil {
		err = m.Sign(b.key)
	}
	var out bytes.Buffer
	if err == nil {
		err = bundle.Write(&out, b.chain, m, parts)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return out.Bytes()
}

// install updates the disk while running runs.
func (b *bench) install(running slot.Name, image []byte) {
	b.t.Helper()
	p := bundle.Policy{Root: b.root}
	r, err := bundle.NewReader(bytes.NewReader(image), p)
	if err != nil {
		b.t.Fatal(err)
	}
	u, err := b.disk.Begin(running, &r.Head, 0)
	if err == nil {
		_, err = io.Copy(u, r)
	}
	if err == nil {
		err = u.Commit(p, false, today)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// good is the agent's word that what runs is good.
func (b *bench) good(n slot.Name) {
	b.t.Helper()
	if err := errors.Join(b.disk.Good(n), b.disk.Settle(n, bundle.Policy{Root: b.root})); err != nil {
		b.t.Fatal(err)
	}
}

// A start is what the loader started.
type start struct {
	kernel, commandLine string
	boot                *handover.Boot
	initrd              []byte
	pcr                 attest.Digest
	epoch               uint64
	console             string
	err                 error
}

// reset starts the machine.
func (b *bench) reset(loadError func(kernel string) error) start {
	b.t.Helper()
	b.open()
	var s start
	var console bytes.Buffer
	l := &loader{console: &console, began: time.Now(), settings: settings{"backdoor", "dpu-arm64"}, root: b.root, disk: b.disk}
	var err error
	if l.roots, err = json.Marshal(b.chain); err != nil {
		b.t.Fatal(err)
	}
	var again *attest.TPM // the machine's, which outlives the loader
	off := func() {}
	l.openTPM = func() (*attest.TPM, error) { return nil, attest.ErrNoTPM }
	if b.tpm != "" {
		again, off = attesttest.Start(b.t, b.tpm)
		l.openTPM = func() (*attest.TPM, error) { return attest.New(keepOpen{again}), nil }
	}
	l.busy = func() bool { return b.late }
	defer func() { off() }()
	loaded := ""
	l.load = func(kernel, initrd *os.File, commandLine string) error {
		k, err := io.ReadAll(kernel)
		if err == nil {
			s.initrd, err = io.ReadAll(initrd)
		}
		if err != nil {
			b.t.Fatal(err)
		}
		if loadError != nil {
			if err := loadError(string(k)); err != nil {
				return err
			}
		}
		loaded = string(k)
		s.commandLine = commandLine
		if again != nil {
			if d, err := again.PCR(attest.ImagePCR); err != nil || d != (attest.Digest{}) {
				b.t.Errorf("PCR %d before the jump = %v, %v; want it untouched until the load has succeeded", attest.ImagePCR, d, err)
			}
		}
		return nil
	}
	errJump := errors.New("jumped")
	l.jump = func() error {
		s.kernel = loaded
		return errJump
	}
	s.err = l.boot()
	s.console = console.String()
	if again != nil {
		if s.pcr, err = again.PCR(attest.ImagePCR); err != nil {
			b.t.Fatal(err)
		}
		if s.epoch, err = again.Epoch(); err != nil {
			b.t.Fatal(err)
		}
	}
	if errors.Is(s.err, errJump) {
		s.err = nil
		s.boot = b.unpack(s.initrd)
	}
	return s
}

// keepOpen is a connection to a TPM that outlives the loader.
type keepOpen struct{ t *attest.TPM }

func (k keepOpen) Send(c []byte) ([]byte, error) { return k.t.Send(c) }
func (keepOpen) Close() error                    { return nil }

// unpack unpacks what the loader hands on, as the kernel would, with u-root's reader.
func (b *bench) unpack(initrd []byte) *handover.Boot {
	b.t.Helper()
	rest, ok := bytes.CutPrefix(initrd, []byte("initramfs!!\x00"))
	if !ok {
		b.t.Fatalf("the initramfs begins with %q; want the image's, then zeros up to a multiple of four", initrd[:16])
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(rest)))
	if err != nil {
		b.t.Fatal(err)
	}
	dir := b.t.TempDir()
	for _, r := range records {
		if err := cpio.CreateFileInRoot(r, dir, false); err != nil {
			b.t.Fatal(err)
		}
	}
	boot, err := handover.Read(filepath.Join(dir, handover.Dir))
	if err != nil {
		b.t.Fatal(err)
	}
	return boot
}

func TestBoot(t *testing.T) { benches(t, testBoot) }

func testBoot(t *testing.T, b *bench) {
	b.install("", b.bundle("1.0", 1))
	s := b.reset(nil)
	if s.err != nil || s.kernel != "kernel 1.0" || s.commandLine != "quiet backdoor.slot=a" {
		t.Fatalf("started %q with %q, %v\n%s", s.kernel, s.commandLine, s.err, s.console)
	}
	f := s.boot.Facts
	if f.Slot != "a" || f.Version != "1.0" || !f.Measured || len(f.Notes) != 0 {
		t.Errorf("handed on: %+v", f)
	}
	if root, err := bundle.ReadRoots(s.boot.Roots); err != nil || root.Version != 1 {
		t.Errorf("the key sets that were handed on: %+v, %v", root, err)
	}
	if got := s.boot.Log.Replay(attest.ImagePCR); got != s.pcr || s.pcr == (attest.Digest{}) {
		t.Errorf("the event log replays to %v, and PCR %d is %v", got, attest.ImagePCR, s.pcr)
	}
	img, err := bundle.OpenAt(b.disk.Slot(slot.A), bundle.Policy{Root: b.root})
	if err != nil {
		t.Fatal(err)
	}
	if want, err := handover.Measured(b.disk.Slot(slot.A), &img.Head); err != nil || want.PCR() != s.pcr {
		t.Errorf("PCR = %v; want what the bundle says, %v, %v", s.pcr, want.PCR(), err)
	}

	// A trial that never says that it is good is started three times, then the way back is taken.
	b.good(slot.A)
	b.install(slot.A, b.bundle("2.0", 1))
	for i := range slot.TrialBoots {
		if s = b.reset(nil); s.kernel != "kernel 2.0" {
			t.Fatalf("start %d of the trial: %q, %v\n%s", i+1, s.kernel, s.err, s.console)
		}
	}
	s = b.reset(nil)
	if s.kernel != "kernel 1.0" {
		t.Fatalf("after the trials: %q, %v\n%s", s.kernel, s.err, s.console)
	}
	b.open()
	if st := b.disk.State(); st.B.Status != slot.Bad || !strings.Contains(st.Fallback, "never said that it is good") {
		t.Errorf("the state: %+v", st)
	}
	if s = b.reset(nil); !strings.Contains(s.boot.Fallback, "never said that it is good") {
		t.Errorf("the next start is told %q", s.boot.Fallback)
	}
}

// TestFallback has something wrong with the image that is to be started: the other one starts, with the reason handed on, and its PCR is what
// it would be if nothing had been wrong.
func TestFallback(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*bench, *start) func(string) error
		want  string
	}{
		{"a byte of the kernel", func(b *bench, _ *start) func(string) error { b.flip(4096); return nil }, "damaged"},
		{"a byte of the head", func(b *bench, _ *start) func(string) error { b.flip(100); return nil }, "bundle refused"},
		{"the magic", func(b *bench, _ *start) func(string) error { b.flip(0); return nil }, "not-a-bundle"},
		{"cannot be loaded", func(b *bench, _ *start) func(string) error {
			return func(k string) error {
				if k == "kernel 2.0" {
					return errors.New("no memory for it")
				}
				return nil
			}
		}, "no memory for it"},
	} {
		benches(t, func(t *testing.T, b *bench) {
			t.Log(tt.name)
			b.install("", b.bundle("1.0", 1))
			before := b.reset(nil)
			b.good(slot.A)
			b.install(slot.A, b.bundle("2.0", 1))
			s := b.reset(tt.spoil(b, &before))
			if s.kernel != "kernel 1.0" || s.pcr != before.pcr {
				t.Fatalf("started %q with PCR %v, %v; want kernel 1.0 with %v\n%s", s.kernel, s.pcr, s.err, before.pcr, s.console)
			}
			if notes := strings.Join(s.boot.Notes, "\n"); !strings.Contains(notes, tt.want) {
				t.Errorf("handed on: %q; want %q in it", notes, tt.want)
			}
			if st := b.disk.State(); st.B.Status != slot.Bad || !strings.Contains(st.B.Reason, tt.want) {
				t.Errorf("slot b: %+v; want bad with %q", st.B, tt.want)
			}
		})
	}
}

// flip changes a byte in slot B.
func (b *bench) flip(off int64) {
	b.t.Helper()
	dev := b.disk.Slot(slot.B)
	var one [1]byte
	_, err := dev.ReadAt(one[:], off)
	one[0] ^= 0x40
	if err == nil {
		_, err = dev.WriteAt(one[:], off)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// TestEpoch lets the epoch rise, and then puts an old, rightly signed image and an old state back, as somebody with the disk in his
// hands can: only the TPM remembers.
func TestEpoch(t *testing.T) { benches(t, testEpoch) }

func testEpoch(t *testing.T, b *bench) {
	b.install("", b.bundle("1.0", 1))
	b.reset(nil)
	b.good(slot.A)
	old := map[string][]byte{}
	for _, n := range []string{"state", "a", "b", "golden"} {
		c, err := os.ReadFile(filepath.Join(b.dir, n))
		if err != nil {
			t.Fatal(err)
		}
		old[n] = c
	}
	b.install(slot.A, b.bundle("2.0", 5))
	if s := b.reset(nil); s.kernel != "kernel 2.0" || s.epoch > 1 {
		t.Fatalf("the trial: %q at epoch %d\n%s", s.kernel, s.epoch, s.console)
	}
	b.good(slot.B)
	if s := b.reset(nil); s.kernel != "kernel 2.0" || s.epoch != 5 {
		t.Fatalf("after it has proved itself: %q at epoch %d; want 5\n%s", s.kernel, s.epoch, s.console)
	}
	for n, c := range old {
		if err := os.WriteFile(filepath.Join(b.dir, n), c, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := b.reset(nil)
	if s.kernel != "" || s.err == nil || s.pcr != (attest.Digest{}) {
		t.Fatalf("the old disk: started %q, %v\n%s", s.kernel, s.err, s.console)
	}
	// Somebody lies in the state about how high it is: that cannot raise the TPM's.
	b.tpm = ""
	if s := b.reset(nil); s.kernel != "kernel 1.0" || s.boot.Measured || s.boot.Log != nil {
		t.Errorf("without a TPM: %q, %+v, %v", s.kernel, s.boot, s.err)
	}
}

func TestNothingToStart(t *testing.T) {
	b := newBench(t, true)
	if s := b.reset(nil); s.err == nil || s.kernel != "" {
		t.Errorf("an empty disk: started %q, %v", s.kernel, s.err)
	}
}
