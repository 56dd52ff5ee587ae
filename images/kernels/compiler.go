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
	"regexp"
	"slices"
	"strings"
)

// Compiler returns a directory that is to come first in PATH for modules to be built against headers ([Cache.Headers]); empty if this machine
// has the compiler with which the kernel was built. If it has not, the Debian release of the kernel has: its compiler and its binutils
// are fetched, and run by their own C library beside this machine's, and so are the tools that came with the headers. Nothing is
// installed. It knows kernels for amd64 only.
func (c Cache) Compiler(ctx context.Context, t Target, headers string) (string, error) {
	conf, err := os.ReadFile(filepath.Join(headers, "include", "config", "auto.conf"))
	if err != nil {
		return "", fmt.Errorf("compiler of %s: %w", t.Name, err)
	}
	m := compilerText.FindSubmatch(conf)
	if m == nil {
		return "", fmt.Errorf("compiler of %s: its headers name none: %w", t.Name, ErrNotFound)
	}
	cc, version := string(m[1]), string(m[2])
	if _, err := exec.LookPath(cc); err == nil {
		return "", nil
	}
	if t.Arch != "amd64" {
		return "", fmt.Errorf("compiler of %s: %s is not on this machine: %w", t.Name, cc, ErrNotFound)
	}
	dir, err := c.dir()
	if err != nil {
		return "", err
	}
	kbuild, err := filepath.Glob(filepath.Join(headers, "..", "..", "lib", "linux-kbuild-*"))
	if err != nil || len(kbuild) != 1 {
		return "", fmt.Errorf("compiler of %s: tools of the kernel beside %s: %w", t.Name, headers, ErrNotFound)
	}
	unlock, err := lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	into := filepath.Join(dir, "compiler-"+t.Arch+"-"+cc)
	if !isDir(into) {
		if err := c.fetchCompiler(ctx, t, into, cc, version, filepath.Base(kbuild[0])); err != nil {
			return "", fmt.Errorf("compiler of %s: %w", t.Name, err)
		}
	}
	if err := borrow(into, kbuild[0]); err != nil {
		return "", fmt.Errorf("compiler of %s: %w", t.Name, err)
	}
	return filepath.Join(into, "bin"), nil
}

// compilerText is how a configuration names its compiler: the program and its major version.
var compilerText = regexp.MustCompile(`(?m)^CONFIG_CC_VERSION_TEXT="?((?:x86_64-linux-gnu-)?gcc-(\d+)) `)

const compilerFor = "x86_64-linux-gnu"

// fetchCompiler makes a compiler's directory: tree, what its packages and the libraries that these need unpack to, and bin, from where it is run.
func (c Cache) fetchCompiler(ctx context.Context, t Target, into, cc, version, kbuild string) error {
	etc := c.etc
	if etc == "" {
		etc = "/etc/apt"
	}
	sources, err := readSources(etc)
	if err != nil {
		return err
	}
	dir := filepath.Dir(into)
	tmp, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	triplet := strings.ReplaceAll(compilerFor, "_", "-")
	programs := []string{"gcc-" + version + "-" + triplet, "cpp-" + version + "-" + triplet, "binutils-" + triplet}
	err = fmt.Errorf("%s has no release: %w", t.Name, ErrNotFound)
	for _, m := range t.Metas {
		var a *apt
		if a, err = newApt(filepath.Join(dir, "apt", m.Suite+"-"+t.Arch), t.Arch, retarget(sources, m.Suite)); err != nil {
			return err
		}
		err = a.unpackAll(ctx, filepath.Join(tmp, "tree"), kbuild, programs)
		if err != nil && ctx.Err() == nil { // the lists may be old, or not there yet
			err = errors.Join(a.update(ctx), os.RemoveAll(filepath.Join(tmp, "tree")), a.unpackAll(ctx, filepath.Join(tmp, "tree"), kbuild, programs))
		}
		if err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	bin := filepath.Join(tmp, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	wrap := func(name, program string, args ...string) error {
		rel, err := filepath.Rel(tmp, program)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(bin, name), script(into, filepath.Join(into, rel), args...), 0o755)
	}
	// What a compiler runs it looks for where -B says, first.
	found := false
	for _, folder := range []string{"usr/bin", "usr/libexec/gcc/" + compilerFor + "/" + version} {
		all, err := os.ReadDir(filepath.Join(tmp, "tree", folder))
		if err != nil {
			return err
		}
		for _, e := range all {
			program := filepath.Join(tmp, "tree", folder, e.Name())
			if !isELF(program) || strings.HasSuffix(e.Name(), ".so") {
				continue
			}
			var args []string
			if strings.Contains(e.Name(), "-gcc-"+version) {
				args = []string{"-B", filepath.Join(into, "bin") + "/"}
			}
			// Kernels call them with the name of the machine, and without.
			for _, name := range []string{e.Name(), strings.TrimPrefix(e.Name(), compilerFor+"-")} {
				found = found || name == cc
				if err := wrap(name, program, args...); err != nil {
					return err
				}
			}
		}
	}
	if !found {
		return fmt.Errorf("the packages %v have no %s: %w", programs, cc, ErrNotFound)
	}
	return os.Rename(tmp, into)
}

// script runs a program by the C library that lies in a compiler's directory.
func script(compiler, program string, args ...string) []byte {
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
	libs := filepath.Join(compiler, "tree", "usr", "lib", compilerFor)
	line := []string{"exec", quote(filepath.Join(libs, "ld-linux-x86-64.so.2")), "--library-path", quote(libs), "--argv0", `"$0"`, quote(program)}
	for _, a := range args {
		line = append(line, quote(a))
	}
	return []byte("#!/bin/sh\n" + strings.Join(line, " ") + ` "$@"` + "\n")
}

// borrow has the programs in a directory run by the C library of a compiler: each is put aside, and a script takes its place.
func borrow(compiler, dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasSuffix(path, ".elf") || !isELF(path) {
			return err
		}
		if st, err := d.Info(); err != nil || st.Mode()&0o111 == 0 {
			return err
		}
		if err := os.WriteFile(path+".new", script(compiler, path+".elf"), 0o755); err != nil {
			return err
		}
		// A crash in between leaves the program, or the script.
		if err := os.Link(path, path+".elf"); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return os.Rename(path+".new", path)
	})
}

// isELF reports whether a file is a program or an object, itself and not by a link.
func isELF(path string) bool {
	if st, err := os.Lstat(path); err != nil || !st.Mode().IsRegular() {
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	var magic [4]byte
	n, _ := f.Read(magic[:])
	return bytes.Equal(magic[:n], []byte("\x7fELF"))
}

// unpackAll downloads packages, and the libraries that they and kbuild, which is not unpacked itself, depend on, and makes one tree of them.
func (a *apt) unpackAll(ctx context.Context, tree, kbuild string, packages []string) error {
	fields, err := a.show(ctx, kbuild)
	if err != nil {
		return err
	}
	all := append(slices.Clone(packages), libraries(fields["Depends"])...)
	for i := 0; i < len(all); i++ {
		if slices.Contains(all[:i], all[i]) {
			continue
		}
		fields, err := a.show(ctx, all[i])
		if err != nil {
			return err
		}
		all = append(all, libraries(fields["Depends"])...)
		dir, err := os.MkdirTemp(filepath.Dir(tree), "deb-")
		if err != nil {
			return err
		}
		deb, err := a.download(ctx, all[i], fields["Version"], dir)
		if err == nil {
			_, err = output(exec.CommandContext(ctx, "dpkg-deb", "-x", deb, tree))
		}
		if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
			return err
		}
	}
	return nil
}

// libraries are those packages of a list of dependencies that programs are linked with as they run.
func libraries(depends string) (names []string) {
	for _, d := range strings.Split(depends, ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
		name, _, _ = strings.Cut(name, ":")
		if (strings.HasPrefix(name, "lib") || name == "zlib1g") && !strings.HasSuffix(name, "-dev") && !strings.HasPrefix(name, "libcc1-") {
			names = append(names, name)
		}
	}
	return names
}
