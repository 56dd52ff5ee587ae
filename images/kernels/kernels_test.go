package kernels

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const bookwormSources = `# A comment.
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
Enabled: no
URIs: http://disabled.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: https://vendor.example/node
Suites: nodistro
Components: main
Architectures: amd64
`

const oneLine = `# deb http://commented.example/debian trixie main
deb [arch=amd64 signed-by=/k1,/k2 trusted=yes] http://mirror.example/debian trixie main non-free # and so on
deb http://mirror.example/debian-security	trixie-security main
deb-src http://mirror.example/debian trixie main
deb http://flat.example/ ./
deb [broken http://mirror.example/debian trixie main
deb https://packages.vendor.example/apt cloud-sdk-bookworm main
`

func TestSources(t *testing.T) {
	for _, tt := range []struct {
		name    string
		sources []source
		want    string
	}{
		{"deb822", parseDeb822([]byte(bookwormSources)), `Types: deb
URIs: http://mirror.example/debian
Suites: trixie
Components: main
Architectures: arm64
Targets: Packages
Languages: none
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian
Suites: trixie-updates
Components: main
Architectures: arm64
Targets: Packages
Languages: none
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: trixie-security
Components: main
Architectures: arm64
Targets: Packages
Languages: none
Signed-By: 
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
 -----END PGP PUBLIC KEY BLOCK-----

`},
		{"one line", parseOneLine([]byte(oneLine)), `Types: deb
URIs: http://mirror.example/debian
Suites: trixie
Components: main
Architectures: arm64
Targets: Packages
Languages: none
Signed-By: /k1 /k2
Trusted: yes

Types: deb
URIs: http://mirror.example/debian-security
Suites: trixie-security
Components: main
Architectures: arm64
Targets: Packages
Languages: none

`},
	} {
		if diff := cmp.Diff(tt.want, string(deb822(retarget(tt.sources, "trixie"), "arm64"))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// A mirror's lists of sid end after a week, and then are still good enough; those of releases must not be old.
func TestOldLists(t *testing.T) {
	sources := parseOneLine([]byte("deb [check-valid-until=yes signed-by=/k] http://mirror.example/debian bookworm main"))
	for release, want := range map[string][][2]string{
		"sid":    {{"Signed-By", "/k"}, {"Check-Valid-Until", "no"}},
		"trixie": {{"Check-Valid-Until", "yes"}, {"Signed-By", "/k"}},
	} {
		got := retarget(sources, release)
		if len(got) != 1 {
			t.Fatalf("%s: %d sources, want 1", release, len(got))
		}
		if diff := cmp.Diff(want, got[0].options); diff != "" {
			t.Errorf("%s (-want +got):\n%s", release, diff)
		}
	}
}

func FuzzSources(f *testing.F) {
	f.Add([]byte(bookwormSources))
	f.Add([]byte(oneLine))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, s := range append(parseDeb822(b), parseOneLine(b)...) {
			if len(s.uris) == 0 || len(s.suites) == 0 || len(s.components) == 0 {
				t.Fatalf("incomplete source %v", s)
			}
		}
	})
}

func TestImageDependency(t *testing.T) {
	for _, tt := range []struct{ depends, want, err string }{
		{"linux-image-6.1.0-56-cloud-arm64 (= 6.1.192-2)", "linux-image-6.1.0-56-cloud-arm64", ""},
		{"linux-base (>= 4.5), linux-image-6.1.0-50-armmp:armhf", "linux-image-6.1.0-50-armmp", ""},
		{"linux-image-1, linux-image-2", "", "two kernels"},
		{"initramfs-tools", "", "no linux-image"},
		{"", "", "no linux-image"},
		{"linux-image-../../etc", "", "no linux-image"},
	} {
		got, err := imageDependency(tt.depends)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("imageDependency(%q) = %q, %v; want %q, %q", tt.depends, got, err, tt.want, tt.err)
		}
	}
}

func TestUntar(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(name string, kind byte, content string) {
		h := &tar.Header{Name: name, Typeflag: kind, Size: int64(len(content)), Mode: 0o600}
		if kind == tar.TypeSymlink {
			h.Linkname, h.Size = "/etc", 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil && kind == tar.TypeReg {
			t.Fatal(err)
		}
	}
	add("./boot/vmlinuz-6.1", tar.TypeReg, "kernel")
	add("./lib/modules/6.1/kernel/a.ko", tar.TypeReg, "a")
	add("./usr/lib/modules/6.1/kernel/b.ko", tar.TypeReg, "b")
	add("./lib/modules/6.1/build", tar.TypeSymlink, "")
	add("./usr/lib/linux-image-6.1/board.dtb", tar.TypeReg, "dtb")
	add("./usr/share/doc/copyright", tar.TypeReg, "doc")
	add("./boot/../../../escape", tar.TypeReg, "no")
	add("./lib/modules/6.1/../../../escape", tar.TypeReg, "no")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := untar(&b, "6.1", filepath.Join(dir, "tree")); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(filepath.Join(dir, p))
		got[p] = string(content)
		return err
	})
	want := map[string]string{
		"tree/boot/vmlinuz-6.1": "kernel", "tree/lib/modules/6.1/kernel/a.ko": "a", "tree/lib/modules/6.1/kernel/b.ko": "b", "tree/dtbs/board.dtb": "dtb",
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("untar: %v (-want +got):\n%s", err, diff)
	}
}

// testKernel puts a kernel into a cache.
func testKernel(t *testing.T, dir string, target Target) Kernel {
	t.Helper()
	k := Kernel{
		Target: target.Name, Package: "linux-image-6.1.0-9-test", Version: "1:6.1.9-1", Arch: target.Arch,
		Release: "6.1.0-9-test", Fetched: time.Unix(1700000000, 0).UTC(),
	}
	tree := filepath.Join(dir, k.subdir())
	for _, f := range []string{"boot/vmlinuz-6.1.0-9-test", "boot/config-6.1.0-9-test", "lib/modules/6.1.0-9-test/modules.builtin"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(tree, f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, f), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := save(dir, k); err != nil {
		t.Fatal(err)
	}
	return k
}

func TestCache(t *testing.T) {
	target, err := Lookup("6.1")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cache := Cache{Dir: dir, etc: t.TempDir()} // no sources: nothing can be fetched
	if _, err := cache.Cached(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Cached in an empty cache = %v; want fs.ErrNotExist", err)
	}
	if _, err := cache.Fetch(t.Context(), target); !errors.Is(err, ErrNotFound) {
		t.Errorf("Fetch without sources = %v; want ErrNotFound", err)
	}
	want := testKernel(t, dir, target)
	got, err := cache.Fetch(t.Context(), target)
	if err != nil || got.Version != want.Version || filepath.Base(got.ModulesDir) != want.Release || got.DTBDir != "" {
		t.Errorf("Fetch = %+v, %v; want %+v", got, err, want)
	}
	if err := os.Remove(got.Vmlinuz); err != nil {
		t.Fatal(err)
	}
	if _, err := cache.Fetch(t.Context(), target); !errors.Is(err, ErrNotFound) { // tries to fetch it again
		t.Errorf("Fetch with half a kernel = %v; want ErrNotFound", err)
	}
	testKernel(t, dir, target)
	if _, err := cache.Fetch(t.Context(), Target{Name: "6.1", Arch: "arm64", Series: "6.1."}); !errors.Is(err, ErrNotFound) {
		t.Errorf("Fetch of another architecture under the same name = %v; want ErrNotFound", err)
	}
	if err := os.WriteFile(record(dir, "6.1"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := cache.Fetch(t.Context(), target); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("Fetch with a broken record = %v; want an error that says so", err)
	}
}

func TestLockWaits(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, file); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("lock while it is held = %v; want DeadlineExceeded", err)
	}
	got := make(chan error)
	go func() {
		unlock, err := lock(t.Context(), file)
		if err == nil {
			unlock()
		}
		got <- err
	}()
	unlock()
	if err := <-got; err != nil {
		t.Errorf("lock after it was given back = %v", err)
	}
}

func TestLookup(t *testing.T) {
	seen := map[string]bool{}
	for _, target := range Targets() {
		if got, err := Lookup(target.Name); err != nil || got.Arch != target.Arch || seen[target.Name] {
			t.Errorf("Lookup(%s) = %v, %v", target.Name, got, err)
		}
		seen[target.Name] = true
	}
	if _, err := Lookup("2.6"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "6.1-armmp") {
		t.Errorf("Lookup(2.6) = %v; want ErrNotFound and a list", err)
	}
}

// TestOwnArchive has apt and dpkg-deb, for real, fetch from an archive in a directory.
func TestOwnArchive(t *testing.T) {
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed: this is not Debian", tool)
		}
	}
	archive := t.TempDir()
	deb := func(name, depends string, files map[string]string) string {
		root := t.TempDir()
		files["DEBIAN/control"] = "Package: " + name + "\nVersion: 6.1.9-1\nArchitecture: arm64\nMaintainer: test <test@example.org>\nDescription: test\n" + depends
		for f, content := range files {
			if err := os.MkdirAll(filepath.Join(root, filepath.Dir(f)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, f), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		file := name + "_6.1.9-1_arm64.deb"
		if out, err := exec.Command("dpkg-deb", "--root-owner-group", "-b", root, filepath.Join(archive, file)).CombinedOutput(); err != nil {
			t.Fatalf("dpkg-deb: %v\n%s", err, out)
		}
		content, err := os.ReadFile(filepath.Join(archive, file))
		if err != nil {
			t.Fatal(err)
		}
		return files["DEBIAN/control"] + packageFields(file, content) + "\n"
	}
	packages := deb("linux-image-test", "Depends: linux-image-6.1.0-9-test (= 6.1.9-1)\n", map[string]string{}) +
		deb("linux-image-6.1.0-9-test", "", map[string]string{
			"boot/vmlinuz-6.1.0-9-test":                 "kernel",
			"boot/config-6.1.0-9-test":                  "config",
			"lib/modules/6.1.0-9-test/modules.builtin":  "",
			"usr/lib/linux-image-6.1.0-9-test/some.dtb": "dtb",
		})
	lists := filepath.Join(archive, "dists", "bookworm", "main", "binary-arm64")
	if err := os.MkdirAll(lists, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(lists, "Packages"), []byte(packages), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(archive, "dists", "bookworm", "Release"), []byte(releaseFile("main/binary-arm64/Packages", []byte(packages))), 0o644); err != nil {
		t.Fatal(err)
	}
	etc := t.TempDir()
	// The machine runs another release, and has a repository that is not Debian's and does not answer.
	sources := "deb [trusted=yes] file:" + archive + " sid main\ndeb http://127.0.0.1:9/ nodistro main\n"
	if err := os.WriteFile(filepath.Join(etc, "sources.list"), []byte(sources), 0o644); err != nil {
		t.Fatal(err)
	}
	target := Target{Name: "test", Arch: "arm64", Series: "6.1.", Metas: []Meta{{"bookworm", "linux-image-absent"}, {"bookworm", "linux-image-test"}}}
	dir := t.TempDir()
	results := make(chan error, 2)
	for range 2 { // two at once
		go func() {
			_, err := Cache{Dir: dir, etc: etc}.Fetch(t.Context(), target)
			results <- err
		}()
	}
	for range 2 {
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	}
	k, err := Cache{Dir: dir, etc: t.TempDir()}.Fetch(t.Context(), target) // now without any source
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(k.Vmlinuz); err != nil || string(b) != "kernel" {
		t.Errorf("vmlinuz = %q, %v", b, err)
	}
	if k.Release != "6.1.0-9-test" || k.Version != "6.1.9-1" || k.DTBDir == "" {
		t.Errorf("Fetch = %+v", k)
	}
	if _, err := (Cache{Dir: dir, etc: etc}).Refresh(t.Context(), target); err != nil {
		t.Errorf("Refresh = %v", err)
	}
	target.Series, target.Name = "6.12.", "other"
	if _, err := (Cache{Dir: dir, etc: etc}).Fetch(t.Context(), target); !errors.Is(err, ErrNotFound) {
		t.Errorf("Fetch of a meta package that leads to another series = %v; want ErrNotFound", err)
	}
}
