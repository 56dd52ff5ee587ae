package bundler

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/slot"
)

func TestMakeAndBurn(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"bmc-armv7.vmlinuz": "kernel", "bmc-armv7.cpio.zst": strings.Repeat("initramfs", 1000), "bmc-armv7.dtb": "dtb"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	key, roots, err := Development(filepath.Join(dir, "keys"))
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := Development(filepath.Join(dir, "keys"))
	if err != nil || !again.Equal(key) {
		t.Fatalf("the second time: another key, %v", err)
	}
	_, root, err := bundle.ParseRoots(mustRead(t, filepath.Join(dir, "keys", "development-roots.json")))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "update.bundle")
	o := Options{Machine: "bmc-armv7", Version: "1.0", Released: time.Now(), Dir: dir, Roots: roots}
	o.Signers = append(o.Signers, key)
	if err := MakeFile(file, o); err != nil {
		t.Fatal(err)
	}
	p := bundle.Policy{Root: root, Product: Product, Machine: "bmc-armv7", Now: time.Now()}
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	disk := filepath.Join(dir, "disk.img")
	if _, err := Burn(disk, in, slot.Layout{Slot: 1 << 20, Agent: 1 << 20}, p, time.Now()); err != nil {
		t.Fatal(err)
	}
	f, err := slot.OpenFile(disk, true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, err := slot.OpenGPT(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range d.State().Order(1) {
		img, err := bundle.OpenAt(d.Slot(n), p)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len("dtb"))
		if err := img.ReadPart(got, bundle.PartDTB); err != nil || string(got) != "dtb" || !strings.HasPrefix(img.Manifest.CommandLine, "console=ttyS4,115200n8 ") {
			t.Errorf("slot %s: %q, %v, %q", n, got, err, img.Manifest.CommandLine)
		}
	}
	if got := d.State().Order(1); len(got) != 2 || got[0] != slot.A || got[1] != slot.Golden {
		t.Errorf("a new disk starts %v", got)
	}
	o.Dir = filepath.Join(dir, "nothing")
	if err := MakeFile(file+"2", o); err == nil {
		t.Error("a bundle was made of nothing")
	}
	if _, err := os.Stat(file + "2"); err == nil {
		t.Error("a bundle that failed was left behind")
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
