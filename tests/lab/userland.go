package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/backdoor-rhs/backdoor/images/initramfs"
	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/images/modpack"
	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

const modulePath = "github.com/backdoor-rhs/backdoor"

// hostModules are the modules that HOST's userland needs, beside what they need themselves.
var hostModules = []string{"virtio_pci", "virtio_net", "button", "evdev"}

// checkout returns the root of the source tree that the working directory is in.
func checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", &InfraError{Op: "find the source tree", Err: err}
	}
	for d := dir; ; d = filepath.Dir(d) {
		b, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && bytes.Contains(b, []byte("module "+modulePath+"\n")) {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", &InfraError{
				Op: "find the source tree", Err: fmt.Errorf("%s is not inside a checkout of %s", dir, modulePath),
				Next: "run it in the checkout: the lab builds the host's userland from it",
			}
		}
	}
}

// userland returns the path of HOST's initramfs for a kernel. It is kept in the cache directory under the hash of all
// that goes into it. agree puts the program backdoor-agree into it.
func userland(ctx context.Context, cache, root string, k kernels.Kernel, agree bool) (string, error) {
	dir := filepath.Join(cache, "lab")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", &InfraError{Op: "make the cache directory", Err: err}
	}
	bb, err := busybox(ctx, dir)
	if err != nil {
		return "", err
	}
	key := sha256.New()
	fmt.Fprintln(key, "2", runtime.Version(), k.Release, k.Version, hostModules)
	patterns := []string{"go.mod", "go.sum", "tests/lab/hostinit/*.go", "tests/lab/control/*.go"}
	if agree {
		patterns = append(patterns, "cmd/backdoor-agree/*.go", "cmd/internal/agree/*.go", "agent/access/*.go", "internal/durable/*.go")
	}
	for _, pattern := range patterns {
		names, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return "", err
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err != nil {
				return "", &InfraError{Op: "read the host's userland", Err: err}
			}
			fmt.Fprintf(key, "%s %d\n%s", filepath.Base(n), len(b), b)
		}
	}
	key.Write(bb)
	path := filepath.Join(dir, "host-"+hex.EncodeToString(key.Sum(nil)[:10])+".cpio")
	if _, err := os.Stat(path); err == nil {
		now := time.Now()
		os.Chtimes(path, now, now) // keeps it from prune
		return path, nil
	}
	init, err := build(ctx, root, "./tests/lab/hostinit")
	if err != nil {
		return "", err
	}
	programs := map[string][]byte{"init": init, "bin/busybox": bb}
	if agree {
		if programs["bin/backdoor-agree"], err = build(ctx, root, "./cmd/backdoor-agree"); err != nil {
			return "", err
		}
	}
	mods, err := modpack.Make(k.ModulesDir, hostModules)
	if err != nil {
		return "", &InfraError{Op: "pack the host's modules", Err: err}
	}
	archive, err := pack(programs, mods.LoadOrder())
	if err != nil {
		return "", &InfraError{Op: "pack the host's userland", Err: err}
	}
	if err := durable.WriteFile(path, archive, 0o644); err != nil {
		return "", &InfraError{Op: "pack the host's userland", Err: err}
	}
	prune(dir)
	return path, nil
}

// withSecond makes, in dir, an initramfs of HOST's userland that holds a kernel and the userland once more.
func withSecond(dir, userland string, k kernels.Kernel) (string, error) {
	first, err := os.ReadFile(userland)
	if err != nil {
		return "", &InfraError{Op: "pack the host's second kernel", Err: err}
	}
	vmlinuz, err := os.ReadFile(k.Vmlinuz)
	if err != nil {
		return "", &InfraError{Op: "pack the host's second kernel", Err: err}
	}
	var a initramfs.Archive
	a.File(control.SecondKernel[1:], vmlinuz, 0o600)
	a.File(control.SecondInitrd[1:], first, 0o600)
	second, err := a.Bytes()
	if err != nil {
		return "", &InfraError{Op: "pack the host's second kernel", Err: err}
	}
	path := filepath.Join(dir, "host-initrd.cpio")
	if err := os.WriteFile(path, slices.Concat(first, second), 0o644); err != nil {
		return "", &InfraError{Op: "pack the host's second kernel", Err: err}
	}
	return path, nil
}

// prune drops userlands that nobody has used for two weeks.
func prune(dir string) {
	names, _ := filepath.Glob(filepath.Join(dir, "host-*.cpio")) // the pattern is valid
	for _, n := range names {
		if st, err := os.Stat(n); err == nil && time.Since(st.ModTime()) > 14*24*time.Hour {
			os.Remove(n)
		}
	}
}

// build builds a program for HOST's architecture.
func build(ctx context.Context, root, program string) ([]byte, error) {
	tmp, err := os.MkdirTemp("", "backdoor-hostinit-")
	if err != nil {
		return nil, &InfraError{Op: "build the host's userland", Err: err}
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, program)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0", "GOFLAGS=")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, &InfraError{Op: "build the host's userland", Err: fmt.Errorf("%w: %s", err, bytes.TrimSpace(msg)),
			Next: "the lab needs the Go toolchain and the checkout"}
	}
	return os.ReadFile(out)
}

// busybox returns a static busybox for amd64: the machine's own, or the one from Debian's package, kept in dir.
func busybox(ctx context.Context, dir string) ([]byte, error) {
	kept := filepath.Join(dir, "busybox")
	for _, p := range []string{"/bin/busybox", "/usr/bin/busybox", kept} {
		if static(p) {
			return os.ReadFile(p)
		}
	}
	tmp, err := os.MkdirTemp(dir, ".busybox-")
	if err != nil {
		return nil, &InfraError{Op: "get busybox", Err: err}
	}
	defer os.RemoveAll(tmp)
	const next = "install it: apt-get install busybox-static, or run make setup"
	// As root, apt would download as another user, who may not write here.
	get := exec.CommandContext(ctx, "apt-get", "-o", "APT::Sandbox::User=root", "download", "busybox-static:amd64")
	get.Dir = tmp
	if msg, err := get.CombinedOutput(); err != nil {
		return nil, &InfraError{Op: "download busybox-static", Err: fmt.Errorf("%w: %s", err, bytes.TrimSpace(msg)), Next: next}
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "busybox-static_*.deb"))
	if err != nil || len(debs) != 1 {
		return nil, &InfraError{Op: "download busybox-static", Err: errors.New("apt-get left no package behind"), Next: next}
	}
	if msg, err := exec.CommandContext(ctx, "dpkg-deb", "-x", debs[0], tmp+"/x").CombinedOutput(); err != nil {
		return nil, &InfraError{Op: "unpack busybox-static", Err: fmt.Errorf("%w: %s", err, bytes.TrimSpace(msg)), Next: next}
	}
	for _, p := range []string{tmp + "/x/bin/busybox", tmp + "/x/usr/bin/busybox"} {
		if static(p) {
			b, err := os.ReadFile(p)
			if err == nil {
				err = durable.WriteFile(kept, b, 0o644)
			}
			if err != nil {
				return nil, &InfraError{Op: "keep busybox", Err: err}
			}
			return b, nil
		}
	}
	return nil, &InfraError{Op: "unpack busybox-static", Err: errors.New("it holds no static busybox for amd64"), Next: next}
}

// static reports whether path is a program for amd64 that needs no dynamic linker.
func static(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return f.Machine == elf.EM_X86_64
}

// pack makes the initramfs: the programs, hostinit as /init and busybox among them, and the modules numbered in the order to load them.
func pack(programs map[string][]byte, mods []modpack.Module) ([]byte, error) {
	var a initramfs.Archive
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "programs"} {
		a.Directory(d, 0o755)
	}
	a.CharDevice("dev/console", 0o600, 5, 1) // the kernel opens it before devtmpfs is there
	for _, name := range slices.Sorted(maps.Keys(programs)) {
		a.File(name, programs[name], 0o755)
	}
	a.Symlink("bin/sh", "busybox")
	a.File("etc/passwd", []byte("root:x:0:0:root:/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\n"), 0o644)
	a.File("etc/hostname", []byte("host\n"), 0o644)
	for i, m := range mods {
		a.File(fmt.Sprintf("modules/%02d-%s.ko", i, m.Name), m.Data, 0o644)
	}
	return a.Bytes()
}
