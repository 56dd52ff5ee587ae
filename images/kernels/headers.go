package kernels

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Headers returns the directory to build modules for a cached kernel in ("make -C DIR M=…"). It gets the packages
// linux-headers and linux-kbuild of just that kernel's version into the cache first if it must; with a kernel that the
// archives no longer have, the error is [ErrNotFound], and [Cache.Refresh] brings one that they have.
func (c Cache) Headers(ctx context.Context, t Target, k Kernel) (string, error) {
	dir, err := c.dir()
	if err != nil {
		return "", err
	}
	tree := filepath.Join(dir, k.subdir()+"-headers")
	build := filepath.Join(tree, "usr", "src", "linux-headers-"+k.Release)
	if isDir(build) {
		return build, nil
	}
	unlock, err := lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if isDir(build) {
		return build, nil
	}
	etc := c.etc
	if etc == "" {
		etc = "/etc/apt"
	}
	sources, err := readSources(etc)
	if err != nil {
		return "", err
	}
	var missing []error
	for _, m := range t.Metas {
		a, err := newApt(filepath.Join(dir, "apt", m.Suite+"-"+t.Arch), t.Arch, retarget(sources, m.Suite))
		if err != nil {
			return "", err
		}
		err = a.headers(ctx, k, tree)
		if err != nil && ctx.Err() == nil { // the lists may be old, or not there yet
			err = errors.Join(a.update(ctx), a.headers(ctx, k, tree))
		}
		if isDir(build) {
			return build, nil
		}
		missing = append(missing, err)
	}
	return "", fmt.Errorf("headers of %s %s: %w: %w", k.Package, k.Version, ErrNotFound, errors.Join(missing...))
}

// headers downloads linux-headers-RELEASE and those packages that it depends on and that are the kernel's own, and makes one
// tree of them that can lie anywhere.
func (a *apt) headers(ctx context.Context, k Kernel, into string) error {
	main := "linux-headers-" + k.Release
	fields, err := a.show(ctx, main)
	if err != nil {
		return err
	}
	if fields["Version"] != k.Version {
		return fmt.Errorf("package %s is of version %s by now: %w", main, fields["Version"], ErrNotFound)
	}
	packages := []string{main}
	for _, d := range strings.Split(fields["Depends"], ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
		name, _, _ = strings.Cut(name, ":")
		if strings.HasPrefix(name, "linux-headers-") || strings.HasPrefix(name, "linux-kbuild-") {
			packages = append(packages, name)
		}
	}
	if err := os.MkdirAll(filepath.Dir(into), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(into), ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	tree := filepath.Join(tmp, "tree")
	for i, name := range packages {
		dir := filepath.Join(tmp, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		deb, err := a.download(ctx, name, k.Version, dir)
		if err != nil {
			return err
		}
		if _, err := output(exec.CommandContext(ctx, "dpkg-deb", "-x", deb, tree)); err != nil {
			return err
		}
	}
	// The packages find each other by absolute paths.
	err = filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			to, err := os.Readlink(path)
			if err != nil || !strings.HasPrefix(to, "/usr/") {
				return err
			}
			rel, err := filepath.Rel(filepath.Dir(path), filepath.Join(tree, to))
			if err != nil {
				return err
			}
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.Symlink(rel, path)
		}
		if d.Name() != "Makefile" || !d.Type().IsRegular() {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(b, []byte("/usr/src/linux-headers-")) {
			return err
		}
		return os.WriteFile(path, bytes.ReplaceAll(b, []byte("/usr/src/linux-headers-"), []byte(into+"/usr/src/linux-headers-")), 0o644)
	})
	if err != nil {
		return fmt.Errorf("unpack headers: %w", err)
	}
	if err := os.Chmod(tree, 0o755); err != nil {
		return err
	}
	return os.Rename(tree, into)
}
