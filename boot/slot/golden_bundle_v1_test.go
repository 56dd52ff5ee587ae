package slot

import (
	"bytes"
	"io"
	"os"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
)

// TestGoldenBundleV1 installs the update file that stands for all of version 1, as fleets of older agents hold them: it is taken into the slot that
// does not run, is started next, and is there bit for bit. Do not change this test.
func TestGoldenBundleV1(t *testing.T) {
	file, err := os.ReadFile("../bundle/testdata/v1.bundle")
	if err != nil {
		t.Fatal(err)
	}
	roots, _, _, parts, err := bundle.Read(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	root, err := bundle.ReadRoots(roots[:1]) // the machine has not heard of the second key set yet
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 12, 24, 18, 0, 0, 0, time.UTC)
	policy := bundle.Policy{Root: root, MinEpoch: 3, Product: "backdoor", Machine: "dpu-arm64", Loader: 1, Now: now}
	d := open(t, machine(t))
	r, err := bundle.NewReader(bytes.NewReader(file), policy)
	if err != nil {
		t.Fatal(err)
	}
	u, err := d.Begin(A, &r.Head, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(u, r); err != nil {
		t.Fatal(err)
	}
	if err := u.Commit(policy, false, now); err != nil {
		t.Fatal(err)
	}
	if s := d.State(); s.B.Status != Trial || s.B.Version != "1.4.0" || s.B.Epoch != 3 || s.B.Root != 2 || s.Order(0)[0] != B {
		t.Errorf("after the update: %+v", s)
	}
	img, err := bundle.OpenAt(d.Slot(B), policy)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Verify(); err != nil || len(parts) != len(img.Manifest.Parts) {
		t.Errorf("in the slot: %d parts, %v", len(img.Manifest.Parts), err)
	}
	held := make([]byte, len(file))
	if _, err := d.Slot(B).ReadAt(held, 0); err != nil || !bytes.Equal(held, file) {
		t.Errorf("the slot does not hold the file: %v", err)
	}
}
