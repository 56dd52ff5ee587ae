package builder

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
)

func TestImages(t *testing.T) {
	for _, img := range Images() {
		if got, err := Lookup(img.Name); err != nil || got.Name != img.Name {
			t.Errorf("Lookup(%s) = %v, %v", img.Name, got.Name, err)
		}
		if _, err := kernels.Lookup(img.Kernel); err != nil {
			t.Errorf("%s: %v", img.Name, err)
		}
		if img.Budget.Initramfs <= 0 || img.Budget.Unpacked <= img.Budget.Initramfs {
			t.Errorf("%s: budget %+v", img.Name, img.Budget)
		}
	}
	if _, err := Lookup("vax"); err == nil || !strings.Contains(err.Error(), "dpu-arm64") {
		t.Errorf("Lookup(vax) = %v; want an error with the names", err)
	}
}

// options build with a small agent that is there for tests.
func options(t *testing.T) Options {
	return Options{Module: "../..", Out: t.TempDir(), Agent: "./boot/internal/testinit", Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}
}

// needKernel skips if the image's kernel would have to be fetched.
func needKernel(t *testing.T, img Image) {
	t.Helper()
	target, err := kernels.Lookup(img.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (kernels.Cache{}).Cached(target); errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("kernel %s is not in the cache; make setup fetches it", img.Kernel)
	} else if err != nil {
		t.Fatal(err)
	}
}

// TestReproducible builds an image from nothing, twice, in two places.
func TestReproducible(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles u-root twice, a minute; not with -short")
	}
	img, err := Lookup("dpu-arm64")
	if err != nil {
		t.Fatal(err)
	}
	needKernel(t, img)
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	var manifests []*Manifest
	var outs []string
	for range 2 {
		o := options(t)
		o.CacheDir = t.TempDir()
		// The same kernels, but no base.
		if err := os.Symlink(filepath.Join(cache, "backdoor", "kernels"), filepath.Join(o.CacheDir, "kernels")); err != nil {
			t.Fatal(err)
		}
		m, err := Build(t.Context(), img, o)
		if err != nil {
			t.Fatal(err)
		}
		manifests, outs = append(manifests, m), append(outs, o.Out)
	}
	if diff := cmp.Diff(manifests[0], manifests[1]); diff != "" {
		t.Errorf("two builds differ:\n%s", diff)
	}
	for _, ext := range []string{".cpio.zst", ".json", ".vmlinuz"} {
		a, err := os.ReadFile(filepath.Join(outs[0], img.Name+ext))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(outs[1], img.Name+ext))
		if err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s differs (%v)", ext, err)
		}
	}
	t.Logf("sha256 %s", manifests[0].Initramfs.SHA256)
}

// TestContents looks into an image whose base is in the cache.
func TestContents(t *testing.T) {
	img, err := Lookup("dpu-arm64")
	if err != nil {
		t.Fatal(err)
	}
	needKernel(t, img)
	if testing.Short() {
		t.Skip("may compile u-root, half a minute; not with -short")
	}
	o := options(t)
	m, err := Build(t.Context(), img, o)
	if err != nil {
		t.Fatal(err)
	}
	packed, err := os.ReadFile(filepath.Join(o.Out, m.Initramfs.Name))
	if err != nil {
		t.Fatal(err)
	}
	r, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	raw, err := r.DecodeAll(packed, nil)
	if err != nil || int64(len(raw)) != m.Unpacked {
		t.Fatalf("unpacked: %d bytes, %v; want %d", len(raw), err, m.Unpacked)
	}
	got := map[string]cpio.Record{}
	for len(raw) > 0 { // one archive after the other
		records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(raw)))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range records {
			if _, ok := got[r.Name]; ok && r.Mode&cpio.S_IFMT != cpio.S_IFDIR {
				t.Errorf("%s is there twice", r.Name)
			}
			if r.MTime != 0 || r.UID != 0 || r.GID != 0 {
				t.Errorf("%s is not normalised: %v", r.Name, r.Info)
			}
			got[r.Name] = r
		}
		end := bytes.Index(raw, []byte(cpio.Trailer))
		if end < 0 {
			t.Fatal("no trailer")
		}
		raw = bytes.TrimLeft(raw[end+len(cpio.Trailer):], "\x00")
	}
	for _, name := range []string{
		"init", "bbin/bb", "bbin/gosh", "bbin/backdoord", "bbin/uinit", "dev/console", "var/lib/backdoor",
		"lib/modules/" + m.Release + "/modules.dep", "lib/modules/" + m.Release + "/modules.alias",
	} {
		if _, ok := got[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
	for _, name := range []string{"bin/sh", "bin/defaultsh"} {
		if _, ok := got[name]; ok {
			t.Errorf("%s: an agent that ends must end the machine, not open a shell", name)
		}
	}
}

func TestBudget(t *testing.T) {
	img, err := Lookup("dpu-arm64")
	if err != nil {
		t.Fatal(err)
	}
	needKernel(t, img)
	if testing.Short() {
		t.Skip("may compile u-root, half a minute; not with -short")
	}
	img.Budget.Initramfs = 1000
	m, err := Build(t.Context(), img, options(t))
	var over *OverBudgetError
	if !errors.As(err, &over) || m == nil || over.Size != m.Initramfs.Size || over.Most != 1000 {
		t.Errorf("Build over budget = %v, %v; want an OverBudgetError and the manifest", m, err)
	}
}

func TestBuildErrors(t *testing.T) {
	img, err := Lookup("dpu-arm64")
	if err != nil {
		t.Fatal(err)
	}
	needKernel(t, img)
	if testing.Short() {
		t.Skip("may compile u-root, half a minute; not with -short")
	}
	o := options(t)
	o.Agent = "./boot" // not a command
	if _, err := Build(t.Context(), img, o); err == nil {
		t.Error("Build with a library for an agent: no error")
	}
	o = options(t)
	img.Modules = append(img.Modules, "no_such_module")
	if _, err := Build(t.Context(), img, o); err == nil || !strings.Contains(err.Error(), "no_such_module") {
		t.Errorf("Build with a module that does not exist = %v", err)
	}
	if _, err := os.Stat(filepath.Join(o.Out, img.Name+".json")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a failed build left a manifest: %v", err)
	}
}
