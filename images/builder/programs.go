package builder

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/backdoor-rhs/backdoor/images/initramfs"
	"github.com/backdoor-rhs/backdoor/images/kernels"
)

// Programs are ready-made programs of a Debian release that an image has beside the agent, each with the libraries that it is linked with.
type Programs struct {
	Suite    string   // "bookworm"
	Arch     string   // Debian's name: "arm64"
	Packages []string // the programs' and the libraries'
	Files    []string // the programs, by their paths in the packages; they go into bin
	Data     []string // what they read, likewise; it stays where it is
}

// addPrograms adds an image's programs to an archive, and returns the packages that they come from.
func addPrograms(ctx context.Context, a *initramfs.Archive, p Programs, o Options) ([]kernels.Package, error) {
	tree, have, err := kernels.Cache{Dir: filepath.Join(o.CacheDir, "kernels"), Log: o.Logger}.Packages(ctx, p.Arch, p.Suite, p.Packages...)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for _, name := range p.Files {
		data, err := os.ReadFile(filepath.Join(tree, name))
		if err != nil {
			return nil, fmt.Errorf("program %s: %w", name, err)
		}
		files["bin/"+filepath.Base(name)] = data
		if err := link(tree, name, data, files); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		a.File(name, files[name], 0o755)
	}
	for _, name := range p.Data {
		data, err := os.ReadFile(filepath.Join(tree, name))
		if err != nil {
			return nil, fmt.Errorf("what programs read: %w", err)
		}
		a.File(name, data, 0o644)
	}
	return have, nil
}

// link adds to files the dynamic linker and the libraries that a program or library needs. They go into lib, where every linker looks.
func link(tree, name string, data []byte, files map[string][]byte) error {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	need, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, s := range f.Progs {
		if s.Type == elf.PT_INTERP {
			path := make([]byte, s.Filesz)
			if _, err := s.ReadAt(path, 0); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			need = append(need, filepath.Base(string(bytes.TrimRight(path, "\x00"))))
		}
	}
	for _, lib := range need {
		to := "lib/" + lib
		if files[to] != nil {
			continue
		}
		found, err := library(tree, lib)
		if err != nil {
			return fmt.Errorf("%s needs %s: %w", name, lib, err)
		}
		files[to] = found
		if err := link(tree, lib, found, files); err != nil {
			return err
		}
	}
	return nil
}

// library reads a library out of unpacked packages.
func library(tree, name string) ([]byte, error) {
	for _, pattern := range []string{"lib/*-linux-gnu*", "usr/lib/*-linux-gnu*", "lib", "usr/lib"} {
		found, err := filepath.Glob(filepath.Join(tree, pattern, name))
		if err != nil {
			return nil, err
		}
		for _, path := range found {
			b, err := os.ReadFile(path)
			if !errors.Is(err, fs.ErrNotExist) {
				return b, err
			}
		}
	}
	return nil, fmt.Errorf("no package of the image has it: %w", fs.ErrNotExist)
}
