package hostmem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// Image is a memory dump in a file: raw, ELF64 core or LiME. It is read-only.
type Image struct {
	// Format is "raw", "ELF core" or "LiME".
	Format string

	layout layout
	note   []byte
	r      io.ReaderAt
	close  func() error
}

// ImageError is a file that is not a memory image that this package reads.
type ImageError struct {
	Format string // what the file was taken for
	Offset int64  // where the trouble is, in bytes from the start of the file
	Why    string // what is wrong there, and what to do about it
}

func (e *ImageError) Error() string {
	return fmt.Sprintf("%s image: at offset %#x: %s", e.Format, e.Offset, e.Why)
}

// OpenImage opens a memory dump or a recording, whatever the file says it is. See NewImage.
func OpenImage(path string) (Memory, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open image %s: %w", path, err)
	}
	mem, err := NewImage(f, fi.Size())
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open image %s: %w", path, err)
	}
	img, ok := mem.(*Image)
	if !ok {
		f.Close() // a recording is in memory by now
		return mem, nil
	}
	img.close = sync.OnceValue(f.Close)
	return img, nil
}

// foreign are formats that are not read here, by their first bytes, with the advice for them.
var foreign = []struct{ magic, format, advice string }{
	{"KDUMP   ", "kdump-compressed", "take the dump as an ELF core: makedumpfile -E, or QEMU's dump-guest-memory without -z"},
	{"DISKDUMP", "diskdump", "take the dump as an ELF core"},
	{"makedumpfile", "makedumpfile flattened", "rebuild it first: makedumpfile -R OUT <IN"},
	{"PAGEDU64", "Windows crash dump", "only Linux kernels are understood"},
	{"PAGEDUMP", "Windows crash dump", "only Linux kernels are understood"},
	{"QEVM", "QEMU savevm", "take the dump with dump-guest-memory instead"},
	{"\x1f\x8b", "gzip", "decompress it first"},
	{"\xfd7zXZ\x00", "xz", "decompress it first"},
	{"\x28\xb5\x2f\xfd", "zstd", "decompress it first"},
	{"BZh", "bzip2", "decompress it first"},
	{"\x04\x22\x4d\x18", "lz4", "decompress it first"},
	{"PK\x03\x04", "zip", "unpack it first"},
}

// NewImage returns the memory in a dump of size bytes. By its first bytes it is an ELF64 core (ET_CORE with physical
// addresses, as the kernel's /proc/vmcore, makedumpfile -E and QEMU's dump-guest-memory write it), LiME version 1, or a
// recording of this package; a file of another kind is taken as raw, byte for byte the memory from address 0 on, if it is
// a whole number of pages.
//
// What is wrong with a file, where, and what to do about it is told by an *ImageError, for a recording by OpenRecording.
func NewImage(r io.ReaderAt, size int64) (Memory, error) {
	if size <= 0 {
		return nil, &ImageError{"raw", 0, "the file is empty: the dump was never written"}
	}
	head := make([]byte, min(size, 64))
	if _, err := readFull(r, head, 0); err != nil {
		return nil, fmt.Errorf("read the first bytes: %w", err)
	}
	var mem Memory
	var err error
	switch {
	case bytes.HasPrefix(head, []byte(recordingMagic)):
		mem, err = OpenRecording(io.NewSectionReader(r, 0, size))
	case bytes.HasPrefix(head, []byte("\x7fELF")):
		mem, err = newELFCore(r, size, head)
	case bytes.HasPrefix(head, []byte(limeMagic)):
		mem, err = newLiME(r, size)
	default:
		mem, err = newRaw(r, size, head)
	}
	if err != nil {
		return nil, err // and not a nil pointer in mem
	}
	return mem, nil
}

// newRaw takes what is left: not a format that is known to be another one, and whole pages.
func newRaw(r io.ReaderAt, size int64, head []byte) (*Image, error) {
	for _, f := range foreign {
		if bytes.HasPrefix(head, []byte(f.magic)) {
			return nil, &ImageError{f.format, 0, "this format is not read here; " + f.advice}
		}
	}
	if size%PageSize != 0 {
		return nil, &ImageError{"raw", size, fmt.Sprintf(
			"neither an ELF core nor LiME, and as a raw image it ends %d bytes into a page: truncated, or not a memory image",
			size%PageSize)}
	}
	return newImage("raw", r, []Extent{{Range{0, uint64(size)}, 0}}, nil)
}

func newImage(format string, r io.ReaderAt, extents []Extent, note []byte) (*Image, error) {
	l, err := newLayout(extents)
	if err != nil {
		return nil, &ImageError{format, 0, err.Error()}
	}
	return &Image{Format: format, layout: l, note: note, r: r}, nil
}

// Map implements Memory.
func (m *Image) Map() []Range { return m.layout.ram }

// ReadAt implements Memory.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	return m.layout.each(opRead, off, len(p), func(lo, hi int, at int64) (int, error) {
		return readFull(m.r, p[lo:hi], at)
	})
}

// VMCOREINFO implements NoteHolder.
func (m *Image) VMCOREINFO() []byte { return bytes.Clone(m.note) }

// Close implements Memory.
func (m *Image) Close() error {
	if m.close == nil {
		return nil
	}
	return m.close()
}

// errCut is an image that ends although its size said that it does not.
var errCut = errors.New("the image became shorter while it was open")

// readFull reads len(p) bytes. The error is nil if and only if it got them all, and never io.EOF.
func readFull(r io.ReaderAt, p []byte, off int64) (int, error) {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return n, nil
	case err == nil || errors.Is(err, io.EOF):
		return n, errCut
	}
	return n, err
}

// maxPieces bounds the segments or ranges of an image; a damaged file could name many millions.
const maxPieces = 1 << 20

// le is the byte order of all dumps read here.
var le = binary.LittleEndian
