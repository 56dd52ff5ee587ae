package kernel

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// TypesDir answers Options.Types from a directory: the file ID.btf, or else RELEASE.btf, of raw BTF as in /sys/kernel/btf/vmlinux.
func TypesDir(dir string) func(Build) ([]byte, error) {
	return func(b Build) ([]byte, error) {
		root, err := os.OpenRoot(dir) // the names come from the host's memory
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		defer root.Close()
		for _, name := range []string{b.ID, b.Release} {
			if name == "" {
				continue
			}
			f, err := root.Open(name + ".btf")
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			defer f.Close()
			raw, err := io.ReadAll(io.LimitReader(f, btfMaxSize+1))
			if err == nil && len(raw) > btfMaxSize {
				err = fmt.Errorf("%s has more than %d MiB", f.Name(), btfMaxSize>>20)
			}
			return raw, err
		}
		return nil, nil
	}
}
