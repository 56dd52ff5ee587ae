package slot

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
)

const blockSize = 512

var errPower = errors.New("the power was cut")

// A memDisk is a disk in memory with a write cache: what was written since the last sync may be lost, or not, block by block. Its
// power can fail at any block that is written.
type memDisk struct {
	durable []byte
	cached  map[int64][]byte // by block
	order   []int64          // of cached blocks, as they were written
	writes  int              // blocks written
	cutAt   int              // the power fails during that write; 0 is never
	dead    bool
	full    int64 // writes at or behind it fail; 0 is never
}

func newMemDisk(size int64) *memDisk {
	return &memDisk{durable: make([]byte, size), cached: map[int64][]byte{}}
}

func (m *memDisk) Size() int64 { return int64(len(m.durable)) }

func (m *memDisk) ReadAt(p []byte, off int64) (int, error) {
	if m.dead {
		return 0, errPower
	}
	for i := range p {
		at := off + int64(i)
		if at >= m.Size() {
			return i, io.EOF
		}
		if b, ok := m.cached[at/blockSize]; ok {
			p[i] = b[at%blockSize]
		} else {
			p[i] = m.durable[at]
		}
	}
	return len(p), nil
}

func (m *memDisk) WriteAt(p []byte, off int64) (int, error) {
	if off%blockSize != 0 || len(p)%blockSize != 0 {
		return 0, fmt.Errorf("write %d bytes at %d: not whole blocks", len(p), off)
	}
	for n := 0; n < len(p); n += blockSize {
		if m.dead {
			return n, errPower
		}
		if m.full != 0 && off+int64(n) >= m.full {
			return n, errors.New("no space left on device")
		}
		k := (off + int64(n)) / blockSize
		m.writes++
		b := bytes.Clone(p[n : n+blockSize])
		if m.writes == m.cutAt {
			copy(b[100:], bytes.Repeat([]byte{0xa5}, blockSize-100)) // torn
			m.dead = true
		}
		if _, ok := m.cached[k]; !ok {
			m.order = append(m.order, k)
		}
		m.cached[k] = b
		if m.dead {
			return n, errPower
		}
	}
	return len(p), nil
}

func (m *memDisk) Sync() error {
	if m.dead {
		return errPower
	}
	m.settle(func(int) bool { return true })
	return nil
}

// settle has some of the cached blocks reach the disk, the others not.
func (m *memDisk) settle(reaches func(i int) bool) {
	for i, k := range m.order {
		if reaches(i) {
			copy(m.durable[k*blockSize:], m.cached[k])
		}
	}
	m.order, m.cached = nil, map[int64][]byte{}
}

// clone is the disk as it is, with power.
func (m *memDisk) clone() *memDisk {
	c := newMemDisk(m.Size())
	copy(c.durable, m.durable)
	return c
}

const slotSize = 64 << 10

// open opens a memDisk's slots. The partitions follow one another.
func open(t testing.TB, m *memDisk) *Disk {
	t.Helper()
	d, err := Open(Section(m, 0, MinState), Section(m, MinState, slotSize), Section(m, MinState+slotSize, slotSize), Section(m, MinState+2*slotSize, slotSize))
	if err != nil {
		t.Fatal(err)
	}
	d.chunk, d.durable = 1024, 8192
	return d
}

var (
	testKey  = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	testTime = time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
)

func testRoot() bundle.Root {
	public := testKey.Public().(ed25519.PublicKey)
	role := bundle.Role{Keys: []string{bundle.KeyID(public)}, Threshold: 1}
	return bundle.Root{Format: 1, Version: 1, Expires: testTime.AddDate(1, 0, 0), Keys: []bundle.Key{{ID: role.Keys[0], Public: public}}, Root: role, Release: role}
}

func testPolicy() bundle.Policy {
	return bundle.Policy{Root: testRoot(), Product: "backdoor", Machine: "test"}
}

// image makes a bundle of about 20 KiB.
func image(t testing.TB, version string, epoch uint32) []byte {
	t.Helper()
	root, err := bundle.NewRoot(testRoot())
	if err == nil {
		err = root.Sign(testKey)
	}
	if err != nil {
		t.Fatal(err)
	}
	content := func(name string, n int) bundle.Content {
		b := bytes.Repeat([]byte(name+version), n)[:n]
		return bundle.Content{Name: name, From: bytes.NewReader(b), Size: int64(n)}
	}
	parts := []bundle.Content{content(bundle.PartKernel, 9000), content(bundle.PartInitramfs, 5000)}
	m, err := bundle.Describe(bundle.Manifest{
		Format: 1, Product: "backdoor", Machine: "test", Version: version, Epoch: epoch, Released: testTime, Expires: testTime.AddDate(1, 0, 0),
	}, parts)
	if err == nil {
		err = m.Sign(testKey)
	}
	var out bytes.Buffer
	if err == nil {
		err = bundle.Write(&out, []bundle.Envelope{root}, m, parts)
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// install installs an image as the agent does.
func install(d *Disk, running Name, in io.Reader, stage bool) error {
	r, err := bundle.NewReader(in, testPolicy())
	if err != nil {
		return err
	}
	u, err := d.Begin(running, &r.Head, 0)
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{u}, struct{ io.Reader }{r}, make([]byte, 700)); err != nil {
		return errors.Join(err, u.Abort(err, reasonOf(err) == ""))
	}
	return u.Commit(testPolicy(), stage, testTime)
}

func reasonOf(err error) bundle.Reason {
	var e *bundle.RefusedError
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}

// start starts the machine as the loader does, and returns what came up; "" if nothing did.
func start(t testing.TB, d *Disk, minEpoch uint32) (Name, string) {
	t.Helper()
	s := d.State()
	for _, n := range s.Order(minEpoch) {
		p := testPolicy()
		p.MinEpoch = max(minEpoch, s.Epoch)
		img, err := bundle.OpenAt(d.Slot(n), p)
		if err == nil {
			err = img.Verify()
		}
		if err == nil && s.Slot(n).Version == "" {
			err = d.Adopt(n, &img.Head)
		}
		if err == nil {
			err = d.Try(n)
		}
		if err == nil {
			return n, img.Manifest.Version
		}
		if err := d.Refuse(n, err); err != nil {
			t.Fatal(err)
		}
	}
	return "", ""
}

// run starts the machine and has the agent find itself good.
func run(t testing.TB, d *Disk, want string) Name {
	t.Helper()
	n, version := start(t, d, 0)
	if version != want {
		t.Fatalf("the machine starts %q from slot %q; want %q; state %+v", version, n, want, d.State())
	}
	if err := d.Good(n); err != nil {
		t.Fatal(err)
	}
	if err := d.Settle(n, testPolicy()); err != nil {
		t.Fatal(err)
	}
	return n
}

// machine is a disk on which version 1, of epoch 1, runs from slot A; the recovery image is a copy of it.
func machine(t testing.TB) *memDisk {
	t.Helper()
	m := newMemDisk(MinState + 3*slotSize)
	d := open(t, m)
	if err := install(d, "", bytes.NewReader(image(t, "1", 1)), false); err != nil {
		t.Fatal(err)
	}
	if n := run(t, d, "1"); n != A {
		t.Fatalf("the first image runs from slot %s", n)
	}
	if s := d.State(); s.Golden.Status != Good || s.Golden.Version != "1" || s.Epoch != 1 {
		t.Fatalf("after the first start: %+v", s)
	}
	return m.clone()
}

func TestUpdate(t *testing.T) {
	m := machine(t)
	d := open(t, m)
	if err := install(d, A, bytes.NewReader(image(t, "2", 1)), false); err != nil {
		t.Fatal(err)
	}
	if got := d.State(); got.B.Status != Trial || got.B.Version != "2" || got.Active != A {
		t.Fatalf("after the update: %+v", got)
	}
	if n, v := start(t, d, 0); n != B || v != "2" {
		t.Fatalf("started %s from %s", v, n)
	}
	if err := install(d, B, bytes.NewReader(image(t, "3", 1)), false); !errors.Is(err, ErrUnproven) {
		t.Errorf("an update of an image on trial: %v; want %v", err, ErrUnproven)
	}
	if err := d.Good(B); err != nil {
		t.Fatal(err)
	}
	seq := d.State().Seq
	if err := d.Good(B); err != nil || d.State().Seq != seq {
		t.Errorf("saying it again: %v, and %d writes", err, d.State().Seq-seq)
	}
	if got := d.State(); got.Active != B || got.A.Status != Good || got.B.Boots != 0 {
		t.Errorf("after Good: %+v", got)
	}
	// The way back, on demand.
	if err := d.Activate(A); err != nil {
		t.Fatal(err)
	}
	run(t, d, "1")
}

func TestStage(t *testing.T) {
	d := open(t, machine(t))
	if err := install(d, A, bytes.NewReader(image(t, "2", 1)), true); err != nil {
		t.Fatal(err)
	}
	run(t, d, "1")
	if err := d.Activate(B); err != nil {
		t.Fatal(err)
	}
	if err := d.Activate(A); err != nil { // thought better of it
		t.Fatal(err)
	}
	if got := d.State().B.Status; got != Staged {
		t.Errorf("after a change of mind slot b is %q", got)
	}
	run(t, d, "1")
	if err := d.Activate(B); err != nil {
		t.Fatal(err)
	}
	run(t, d, "2")
	for _, n := range []Name{Golden, ""} {
		if err := d.Activate(n); err == nil {
			t.Errorf("slot %q was activated", n)
		}
	}
}

// TestCrashLoop tries an image that never says that it is good, then wears out the one before, then the recovery image.
func TestCrashLoop(t *testing.T) {
	m := machine(t)
	d := open(t, m)
	if err := install(d, A, bytes.NewReader(image(t, "2", 1)), false); err != nil {
		t.Fatal(err)
	}
	var got []string
	for range TrialBoots + GoodBoots + 2 {
		d = open(t, m)
		n, v := start(t, d, 0)
		got = append(got, string(n)+v)
	}
	want := slices.Concat(slices.Repeat([]string{"b2"}, TrialBoots), slices.Repeat([]string{"a1"}, GoodBoots), []string{"golden1", "golden1"})
	if !slices.Equal(got, want) {
		t.Errorf("started %v; want %v", got, want)
	}
	if s := d.State(); s.B.Status != Bad || !strings.Contains(s.B.Reason, "never said") || s.Fallback == "" {
		t.Errorf("state %+v", s)
	}
	// The recovery image says that it is good, and takes an update.
	if err := d.Good(Golden); err != nil {
		t.Fatal(err)
	}
	if err := install(d, Golden, bytes.NewReader(image(t, "3", 1)), false); err != nil {
		t.Fatal(err)
	}
	run(t, d, "3")
}

// TestEpoch raises the security epoch: the way back ends, the recovery image follows.
func TestEpoch(t *testing.T) {
	m := machine(t)
	d := open(t, m)
	if err := install(d, A, bytes.NewReader(image(t, "2", 5)), false); err != nil {
		t.Fatal(err)
	}
	run(t, d, "2")
	if s := d.State(); s.Epoch != 5 || s.Golden.Epoch != 5 || s.Golden.Version != "2" {
		t.Errorf("state %+v", s)
	}
	if err := d.Activate(A); err == nil {
		t.Error("an image below the epoch was activated")
	}
	copy(m.durable[MinState+slotSize+9000:], "damaged at rest")
	if n, v := start(t, open(t, m), 0); n != Golden || v != "2" {
		t.Errorf("started %s from %s; want the recovery image", v, n)
	}
	copy(m.durable[MinState+2*slotSize+9000:], "damaged at rest")
	if n, v := start(t, open(t, m), 0); n != "" {
		t.Errorf("started %s from %s, below the epoch", v, n)
	}
}

// TestLostState damages both copies of the state: the images say themselves what they are.
func TestLostState(t *testing.T) {
	m := machine(t)
	d := open(t, m)
	if err := install(d, A, bytes.NewReader(image(t, "2", 1)), false); err != nil {
		t.Fatal(err)
	}
	run(t, d, "2")
	for i := range 2 {
		copy(m.durable[d.copyAt(i)+70:], "damaged")
	}
	d = open(t, m)
	if d.Damage() == nil || d.State().Fallback == "" {
		t.Error("the damage was not noticed")
	}
	n, v := start(t, d, 0)
	if v == "" {
		t.Fatal("the machine does not start")
	}
	if err := d.Good(n); err != nil {
		t.Fatal(err)
	}
	if got := *d.state.(section).d.(*memDisk); got.dead {
		t.Fatal("dead")
	}
	if s := open(t, m).State(); s.Slot(n).Version != v || s.Active != n {
		t.Errorf("after it: %+v", s)
	}
}

func TestRefused(t *testing.T) {
	good := image(t, "2", 1)
	for name, tc := range map[string]struct {
		in     []byte
		full   int64
		want   bundle.Reason
		reason string
	}{
		"tampered":  {func() []byte { b := bytes.Clone(good); b[len(b)-5000] ^= 1; return b }(), 0, bundle.Damaged, "hash"},
		"truncated": {good[:len(good)-1], 0, bundle.Truncated, "ends after"},
		"long":      {append(bytes.Clone(good), good...), 0, bundle.TooLong, "goes on"},
		"disk full": {good, MinState + slotSize + 9000/blockSize*blockSize, "", "no space left on device"},
	} {
		m := machine(t)
		m.full = tc.full
		d := open(t, m)
		err := install(d, A, bytes.NewReader(tc.in), false)
		if err == nil || reasonOf(err) != tc.want {
			t.Errorf("%s: %v; want %q", name, err, tc.want)
		}
		m.full = 0
		d = open(t, m)
		if got := d.State().B; got.Status != Writing || !strings.Contains(got.Reason, tc.reason) {
			t.Errorf("%s: slot b is %+v", name, got)
		}
		run(t, d, "1")
		if err := install(d, A, bytes.NewReader(good), false); err != nil {
			t.Errorf("%s: an update after it: %v", name, err)
		}
		run(t, d, "2")
	}
}

// TestResume breaks an upload off at many places and resumes it, over a restart of the machine.
func TestResume(t *testing.T) {
	good := image(t, "2", 1)
	broken := errors.New("the wire broke")
	resumed := 0
	for cut := 1; cut < len(good); cut += 1000 {
		m := machine(t)
		d := open(t, m)
		err := install(d, A, io.MultiReader(bytes.NewReader(good[:cut]), failing{broken}), false)
		if !errors.Is(err, broken) {
			t.Fatalf("a broken upload: %v", err)
		}
		m.settle(func(int) bool { return false })
		d = open(t, m)
		run(t, d, "1")
		whole, err := bundle.OpenAt(bytes.NewReader(good), testPolicy())
		if err != nil {
			t.Fatal(err)
		}
		have := d.Partial(A, hex.EncodeToString(whole.Digest[:]))
		if have > int64(cut) {
			t.Fatalf("%d bytes were sent and %d are there", cut, have)
		}
		if have > 0 {
			resumed++
		}
		r, err := bundle.NewReader(io.MultiReader(io.NewSectionReader(d.Slot(B), 0, have), bytes.NewReader(good[have:])), testPolicy())
		if err != nil {
			t.Fatal(err)
		}
		before := m.writes
		u, err := d.Begin(A, &r.Head, have)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(u, r); err != nil {
			t.Fatal(err)
		}
		if err := u.Commit(testPolicy(), false, testTime); err != nil {
			t.Fatal(err)
		}
		if n, most := m.writes-before, (len(good)-int(have))/blockSize+1+8*8; n > most {
			t.Errorf("%d blocks were written to resume at byte %d; want at most %d", n, have, most)
		}
		run(t, d, "2")
	}
	if resumed < 10 {
		t.Errorf("%d uploads were resumed", resumed)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestPowerCut cuts the power during each block that is written from an update's first write to the moment when the new image has
// proved itself, the recovery image was renewed and the epoch was raised, and on through the update after it. After each cut, in
// several ways in which a disk's cache can be lost, the machine starts one whole image that is not below the epoch that was
// acknowledged, has a second one, and takes the last update.
func TestPowerCut(t *testing.T) {
	base := machine(t)
	images := map[string][]byte{"1": image(t, "1", 1), "2": image(t, "2", 2), "3": image(t, "3", 2)}
	// story ends early when the power does. raised says whether the epoch was raised as far as anybody was told.
	story := func(m *memDisk) (raised bool, err error) {
		d := open(t, m)
		if err := install(d, A, bytes.NewReader(images["2"]), false); err != nil {
			return false, err
		}
		d = open(t, m)
		if n, _ := startQuiet(d); n != B {
			return false, errPower
		}
		if err := d.Good(B); err != nil {
			return false, err
		}
		if err := d.Settle(B, testPolicy()); err != nil {
			return false, err
		}
		return true, install(d, B, bytes.NewReader(images["3"]), false)
	}
	whole := base.clone()
	if _, err := story(whole); err != nil {
		t.Fatal(err)
	}
	t.Logf("two updates write %d blocks", whole.writes)
	half := func(seed uint64) func(int, int) func(int) bool {
		return func(cut, _ int) func(int) bool {
			rng := rand.New(rand.NewPCG(seed, uint64(cut)))
			return func(int) bool { return rng.IntN(2) == 0 }
		}
	}
	ways := []struct {
		name string
		way  func(cut, n int) func(int) bool
	}{
		{"all reached the disk", func(_, _ int) func(int) bool { return func(int) bool { return true } }},
		{"none did", func(_, _ int) func(int) bool { return func(int) bool { return false } }},
		{"only the torn one did", func(_, n int) func(int) bool { return func(i int) bool { return i == n-1 } }},
		{"some did", half(1)},
		{"some others did", half(2)},
	}
	seen := map[string]int{}
	for cut := 1; cut <= whole.writes; cut++ {
		for i, w := range ways {
			if testing.Short() && i != cut%len(ways) {
				continue // one way for each block; a long run goes through all
			}
			name, way := w.name, w.way
			m := base.clone()
			m.cutAt = cut
			raised, err := story(m)
			if !errors.Is(err, errPower) {
				t.Fatalf("cut at block %d: the story ends with %v", cut, err)
			}
			m.settle(way(cut, len(m.order)))
			after := m.clone()
			d := open(t, after)
			n, version := startQuiet(d)
			if images[version] == nil {
				t.Fatalf("cut at block %d, %s: the machine starts %q; state %+v", cut, name, version, d.State())
			}
			if version == "1" && (raised || d.State().Epoch > 1) {
				t.Fatalf("cut at block %d, %s: version 1 runs, below the epoch", cut, name)
			}
			got := make([]byte, len(images[version]))
			if _, err := d.Slot(n).ReadAt(got, 0); err != nil || !bytes.Equal(got, images[version]) {
				t.Fatalf("cut at block %d, %s: slot %s is not version %s", cut, name, n, version)
			}
			seen[version]++
			// A second image is there as well: the one that runs is damaged, and the machine starts another.
			spare := after.clone()
			part := map[Name]int{A: 0, B: 1, Golden: 2}[n]
			copy(spare.durable[MinState+part*slotSize+8500:], "damaged at rest")
			if _, v := startQuiet(open(t, spare)); v == "" || raised && v == "1" {
				t.Fatalf("cut at block %d, %s: beside the image that runs there is %q", cut, name, v)
			}
			// And the last update goes through after all.
			if err := d.Good(n); err != nil {
				t.Fatal(err)
			}
			if err := d.Settle(n, testPolicy()); err != nil {
				t.Fatalf("cut at block %d, %s: %v", cut, name, err)
			}
			if err := install(d, n, bytes.NewReader(images["3"]), false); err != nil {
				t.Fatalf("cut at block %d, %s: the update after it: %v", cut, name, err)
			}
			run(t, open(t, after), "3")
			if s := open(t, after).State(); s.Epoch != 2 || s.Golden.Epoch != 2 || s.Golden.Status != Good {
				t.Fatalf("cut at block %d, %s: in the end: %+v", cut, name, s)
			}
		}
	}
	if len(seen) != 3 {
		t.Errorf("versions that started: %v; want all three", seen)
	}
}

// startQuiet is start on a disk whose power may fail.
func startQuiet(d *Disk) (Name, string) {
	s := d.State()
	for _, n := range s.Order(0) {
		p := testPolicy()
		p.MinEpoch = s.Epoch
		img, err := bundle.OpenAt(d.Slot(n), p)
		if err == nil {
			err = img.Verify()
		}
		if err == nil {
			err = d.Try(n)
		}
		if err == nil {
			return n, img.Manifest.Version
		}
		if d.Refuse(n, err) != nil {
			return "", ""
		}
	}
	return "", ""
}

// TestHalfImageIsNotStarted has the state say that half an image is whole: the image itself says that it is not.
func TestHalfImageIsNotStarted(t *testing.T) {
	m := machine(t)
	d := open(t, m)
	r, err := bundle.NewReader(bytes.NewReader(image(t, "2", 1)), testPolicy())
	if err != nil {
		t.Fatal(err)
	}
	u, err := d.Begin(A, &r.Head, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(u, r, 20000); err != nil {
		t.Fatal(err)
	}
	if err := d.change(func(s *State) error { s.B = entry(&r.Head, Trial); return nil }); err != nil {
		t.Fatal(err)
	}
	if n, v := start(t, open(t, m.clone()), 0); n != A || v != "1" {
		t.Errorf("started %s from %s: the loader took a slot that is not whole", v, n)
	}
}

func TestRunning(t *testing.T) {
	for line, want := range map[string]Name{
		"console=ttyS0 " + A.Argument():           A,
		"backdoor.slot=a quiet backdoor.slot=b\n": B,
		Golden.Argument():                         Golden,
		"backdoor.slot=../x":                      "",
		"":                                        "",
	} {
		if got := Running(line); got != want {
			t.Errorf("Running(%q) = %q; want %q", line, got, want)
		}
	}
}

func TestFind(t *testing.T) {
	sys, dev := t.TempDir(), t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Find(sys, dev); !errors.Is(err, ErrNone) {
		t.Errorf("a machine without slots: %v; want %v", err, ErrNone)
	}
	for i, name := range []string{PartitionState, PartitionA, PartitionB, PartitionGolden, "backdoor-state"} {
		node := fmt.Sprintf("vda%d", i+1)
		write(filepath.Join(sys, "class/block", node, "uevent"), "MAJOR=254\nPARTNAME="+name+"\n")
		write(filepath.Join(dev, node), strings.Repeat("\x00", MinState))
	}
	d, err := Find(sys, dev)
	if err != nil {
		t.Fatal(err)
	}
	if err := install(d, "", bytes.NewReader(image(t, "1", 1)), false); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if d, err = Find(sys, dev); err != nil || d.State().A.Status != Trial {
		t.Fatalf("after an update: %v", err)
	}
	defer d.Close()
	write(filepath.Join(sys, "class/mtd/mtd3/name"), PartitionB+"\n")
	if _, err := Find(sys, dev); err == nil || !strings.Contains(err.Error(), "named "+PartitionB) {
		t.Errorf("two partitions of one name: %v", err)
	}
}

func TestFormat(t *testing.T) {
	l := Layout{Slot: 1 << 20, Agent: 3 << 20}
	m := newMemDisk(l.Size())
	for i := range m.durable {
		m.durable[i] = byte(i >> 9) // what was on the disk before
	}
	d, err := Format(m, l)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Provision(bytes.NewReader(image(t, "1", 1)), testPolicy(), testTime); err != nil {
		t.Fatal(err)
	}
	if d, err = OpenGPT(m); err != nil {
		t.Fatal(err)
	}
	if s := d.State(); s.A.Status != Trial || s.Golden.Status != Good || s.Golden.Version != "1" || s.B.Status != Empty {
		t.Errorf("a new disk: %+v", s)
	}
	run(t, d, "1")
	if err := d.Provision(bytes.NewReader(image(t, "2", 1)), testPolicy(), testTime); err == nil {
		t.Error("a disk with an image that runs was provisioned again")
	}
	clear(m.durable[512:1024]) // the first copy of the table
	if d, err = OpenGPT(m); err != nil || d.State().Active != A {
		t.Errorf("by the table's second copy: %v", err)
	}
	clear(m.durable[len(m.durable)-512:])
	if _, err = OpenGPT(m); err == nil {
		t.Error("a disk without a table was opened")
	}
	if _, err := Format(newMemDisk(l.Size()-512), l); err == nil {
		t.Error("a disk that is too small was formatted")
	}
	// The kernel's tools agree about the table.
	file := filepath.Join(t.TempDir(), "disk.img")
	m = newMemDisk(l.Size())
	if _, err := Format(m, l); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, m.durable, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("/usr/sbin/blkid", "-p", "-o", "export", file).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "PTTYPE=gpt") {
		t.Errorf("blkid: %v: %s; want a GPT", err, out)
	}
}

// FuzzGPT reads damaged partition tables: no partition that comes out is outside of the disk.
func FuzzGPT(f *testing.F) {
	l := Layout{Slot: 1 << 20}
	m := newMemDisk(l.Size())
	if _, err := Format(m, l); err != nil {
		f.Fatal(err)
	}
	f.Add(m.durable[:34*512], false)
	f.Fuzz(func(t *testing.T, table []byte, fix bool) {
		m := newMemDisk(l.Size())
		copy(m.durable, table)
		if fix { // right checksums
			n := crc32.ChecksumIEEE(m.durable[1024 : 1024+128*128])
			binary.LittleEndian.PutUint32(m.durable[512+88:], n)
			clear(m.durable[512+16 : 512+20])
			binary.LittleEndian.PutUint32(m.durable[512+16:], crc32.ChecksumIEEE(m.durable[512:512+92]))
		}
		all, err := ReadPartitions(m)
		if err != nil {
			return
		}
		for _, p := range all {
			if p.Off < 0 || p.Size <= 0 || p.Off+p.Size > m.Size() {
				t.Fatalf("partition %+v of a disk of %d bytes", p, m.Size())
			}
		}
		_, _ = OpenGPT(m)
	})
}

// FuzzState decodes damaged copies of the state: what decodes can be encoded again and asked for an order.
func FuzzState(f *testing.F) {
	good, err := encodeState(State{Seq: 3, Active: B, A: Slot{Status: Good, Version: "1"}, B: Slot{Status: Trial, Boots: 1}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:copyHead])
	f.Add(make([]byte, copySize))
	f.Fuzz(func(t *testing.T, b []byte) {
		// The checksum hides all else from chance: a copy of the input gets a right one.
		for _, fix := range []bool{false, true} {
			if fix && len(b) > copyHead {
				b = bytes.Clone(b)
				copy(b, good[:8])
				n := len(b) - copyHead
				b[16], b[17], b[18], b[19] = byte(n), byte(n>>8), byte(n>>16), 0
				sum := stateSum(b[:copyHead], b[copyHead:])
				copy(b[32:], sum[:])
			}
			s, err := decodeState(b)
			if err != nil {
				continue
			}
			if order := s.Order(2); len(order) > 3 {
				t.Fatalf("%d slots to start: %v", len(order), order)
			}
			s.try(A)
			s.refuse(B, "a reason")
			s.good(A)
			if c, err := encodeState(s); err == nil {
				if back, err := decodeState(c); err != nil || back.Seq != s.Seq {
					t.Fatalf("what was decoded and encoded does not decode: %v", err)
				}
			}
		}
	})
}
