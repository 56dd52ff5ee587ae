// Package initramfs writes cpio archives that the kernel unpacks at boot, bit for bit the same for the same content.
//
// An archive is sorted and normalised (owner 0, time 0, no inode numbers), so neither the order in which files were added
// nor the machine matters. The kernel accepts several archives, each compressed on its own, one after the other (Linux
// 6.1, Documentation/driver-api/early-userspace/buffer-format.rst); a part that seldom changes can therefore be
// compressed once, with patience, and joined with a part that changes often by concatenation.
package initramfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
)

// An Archive collects what goes into an initramfs. The zero value is empty and ready to use.
type Archive struct {
	records map[string]cpio.Record
	implied map[string]bool // directories that nobody added, but something is in them
	err     error
}

func (a *Archive) add(r cpio.Record) {
	r = cpio.MakeReproducible(r)
	r.Name = strings.TrimPrefix(path.Clean("/"+r.Name), "/")
	if r.Name == "" {
		return // the root directory is the kernel's
	}
	if a.records == nil {
		a.records, a.implied = map[string]cpio.Record{}, map[string]bool{}
	}
	if old, ok := a.records[r.Name]; ok && !(isDir(old) && isDir(r) && (a.implied[r.Name] || old.Mode == r.Mode)) {
		a.err = errors.Join(a.err, fmt.Errorf("%s is there twice", r.Name))
		return
	}
	for dir := path.Dir(r.Name); dir != "."; dir = path.Dir(dir) {
		if old, ok := a.records[dir]; !ok {
			a.records[dir], a.implied[dir] = cpio.MakeReproducible(cpio.Directory(dir, 0o755)), true
		} else if !isDir(old) {
			a.err = errors.Join(a.err, fmt.Errorf("%s is below %s, which is no directory", r.Name, dir))
			return
		}
	}
	a.records[r.Name] = r
	delete(a.implied, r.Name)
}

func isDir(r cpio.Record) bool { return r.Mode&cpio.S_IFMT == cpio.S_IFDIR }

// File adds a regular file. Missing parent directories are added to all entries, with mode 0755.
func (a *Archive) File(name string, data []byte, perm uint64) {
	a.add(cpio.StaticRecord(data, cpio.Info{Name: name, Mode: cpio.S_IFREG | perm&0o7777}))
}

// Symlink adds a symbolic link.
func (a *Archive) Symlink(name, target string) { a.add(cpio.Symlink(name, target)) }

// Directory adds a directory.
func (a *Archive) Directory(name string, perm uint64) { a.add(cpio.Directory(name, perm)) }

// CharDevice adds a character device.
func (a *Archive) CharDevice(name string, perm, major, minor uint64) {
	a.add(cpio.CharDev(name, perm, major, minor))
}

// Append adds the entries of an uncompressed newc archive, such as mkuimage makes.
func (a *Archive) Append(newc []byte) error {
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(newc)))
	if err == nil && !bytes.Contains(newc[max(0, len(newc)-1024):], []byte(cpio.Trailer)) {
		err = io.ErrUnexpectedEOF // which the reader takes for the end
	}
	if err != nil {
		return fmt.Errorf("read archive: %w", err)
	}
	for _, r := range records {
		a.add(r)
	}
	return nil
}

// Bytes returns the archive, uncompressed.
func (a *Archive) Bytes() ([]byte, error) {
	if a.err != nil {
		return nil, fmt.Errorf("make archive: %w", a.err)
	}
	var names []string
	for n := range a.records {
		names = append(names, n)
	}
	slices.Sort(names) // a directory comes before what is in it
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	for _, n := range names {
		if err := w.WriteRecord(a.records[n]); err != nil {
			return nil, fmt.Errorf("make archive: %s: %w", n, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, fmt.Errorf("make archive: %w", err)
	}
	for b.Len()%512 != 0 { // as cpio(1) does; keeps what follows aligned
		b.WriteByte(0)
	}
	return b.Bytes(), nil
}

// Effort is how hard Compress tries.
type Effort int

const (
	// Quick takes a tenth of a second for ten megabytes.
	Quick Effort = iota
	// Thorough takes ten times as long for a tenth less.
	Thorough
)

// Compress makes one zstd frame that Linux accepts for an initramfs, always the same for the same data and version of
// the compressor.
func Compress(data []byte, e Effort) ([]byte, error) {
	level := zstd.SpeedDefault
	if e == Thorough {
		level = zstd.SpeedBestCompression
	}
	// One goroutine, so that block boundaries depend on the data only. The window stays far below the 128 MiB that
	// the kernel allows (lib/decompress_unzstd.c, ZSTD_WINDOWSIZE_MAX): it is memory that the machine needs at boot.
	w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(8<<20), zstd.WithEncoderCRC(true))
	if err != nil {
		return nil, fmt.Errorf("compress: %w", err)
	}
	defer w.Close()
	return w.EncodeAll(data, nil), nil
}
