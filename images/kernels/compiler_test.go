package kernels

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

func TestLibraries(t *testing.T) {
	got := libraries("cpp-16-x86-64-linux-gnu (= 16.2.0-4), gcc-16-base, libcc1-0 (>= 16), libgcc-16-dev, libc6:amd64 (>= 2.38), zlib1g, libmpfr6")
	if want := []string{"libc6", "zlib1g", "libmpfr6"}; !slices.Equal(got, want) {
		t.Errorf("libraries are %v; want %v", got, want)
	}
	if got := libraries(""); got != nil {
		t.Errorf("libraries of nothing are %v", got)
	}
}

// A machine that has a kernel's compiler fetches none; one whose headers name none is told so.
func TestCompiler(t *testing.T) {
	headers := t.TempDir()
	conf := filepath.Join(headers, "include", "config", "auto.conf")
	if err := os.MkdirAll(filepath.Dir(conf), 0o755); err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "gcc-99"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	for _, c := range []struct {
		conf, arch string
		ok         bool
	}{
		{"CONFIG_X=y\nCONFIG_CC_VERSION_TEXT=\"gcc-99 (Debian 99.1) 99.1\"\n", "amd64", true},
		{"CONFIG_CC_VERSION_TEXT=gcc-99 (Debian 99.1) 99.1\n", "amd64", true},
		{"CONFIG_CC_VERSION_TEXT=\"gcc-98 (Debian) 98\"\n", "arm64", false},
		{"CONFIG_CC_VERSION_TEXT=\"../../gcc-99 (Debian) 99\"\n", "amd64", false},
		{"CONFIG_X=y\n", "amd64", false},
	} {
		if err := os.WriteFile(conf, []byte(c.conf), 0o644); err != nil {
			t.Fatal(err)
		}
		dir, err := Cache{Dir: t.TempDir()}.Compiler(context.Background(), Target{Name: "test", Arch: c.arch}, headers)
		if dir != "" || err == nil != c.ok {
			t.Errorf("%q: %q, %v", c.conf, dir, err)
		}
	}
}

// Programs are put aside once, and scripts are left alone.
func TestBorrow(t *testing.T) {
	dir := t.TempDir()
	program, text, object := filepath.Join(dir, "tool"), filepath.Join(dir, "text"), filepath.Join(dir, "object.o")
	for path, mode := range map[string]os.FileMode{program: 0o755, text: 0o755, object: 0o644} {
		data := []byte("\x7fELF and more")
		if path == text {
			data = []byte("#!/bin/sh\n")
		}
		if err := os.WriteFile(path, data, mode); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := borrow("/a compiler's", dir); err != nil {
			t.Fatal(err)
		}
	}
	if !isELF(program+".elf") || isELF(program) || isELF(text) || !isELF(object) {
		t.Error("the wrong files were put aside")
	}
	if out, err := exec.Command("/bin/sh", "-n", program).CombinedOutput(); err != nil {
		t.Errorf("the script is not one: %v: %s", err, out)
	}
	if all, _ := os.ReadDir(dir); len(all) != 4 {
		t.Errorf("there are %d files; want 4", len(all))
	}
}
