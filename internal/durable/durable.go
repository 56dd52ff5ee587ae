// Package durable replaces files so that after a loss of power there is the old content or the new one, whole, and never half.
//
//	err := durable.WriteFile("/state/accounts.json", b, 0o600)
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteFile puts data in the place of the named file, which need not exist yet; its folder must. When it returns nil, the new
// content is on the disk under its name. When it returns an error, the old content stands, or, if only the folder could not
// be made durable, the new one does.
func WriteFile(name string, data []byte, perm fs.FileMode) error {
	return Write(name, perm, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// Write is WriteFile for content that write writes to a file. The file that write is given has another name in the same
// folder until write has returned nil, and is removed if it returns an error.
func Write(name string, perm fs.FileMode, write func(*os.File) error) error {
	dir := filepath.Dir(name)
	f, err := os.CreateTemp(dir, "."+filepath.Base(name)+".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // of no effect after the rename
	err = write(f)
	if err == nil {
		err = errors.Join(f.Chmod(perm), f.Sync())
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
