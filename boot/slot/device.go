package slot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Device is a range of blocks: a partition, a file, or memory in a test.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error // returns when everything written is durable
	Size() int64 // bytes
}

// The names of the partitions, on a GPT disk as on raw flash (MTD). The file system with the agent's state is another one.
const (
	PartitionState  = "backdoor-boot"
	PartitionA      = "backdoor-a"
	PartitionB      = "backdoor-b"
	PartitionGolden = "backdoor-golden"
)

// Section is a part of a device, such as a partition of a disk image.
func Section(d Device, off, size int64) Device { return section{d, off, size} }

type section struct {
	d         Device
	off, size int64
}

func (s section) Size() int64 { return s.size }
func (s section) Sync() error { return s.d.Sync() }

func (s section) ReadAt(p []byte, off int64) (int, error) {
	return io.NewSectionReader(s.d, s.off, s.size).ReadAt(p, off)
}

func (s section) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > s.size || int64(len(p)) > s.size-off {
		return 0, fmt.Errorf("write %d bytes at %d: the partition has %d", len(p), off, s.size)
	}
	return s.d.WriteAt(p, s.off+off)
}

// A File is a block device or a file as a Device.
type File struct {
	f      *os.File
	direct *os.File // the same, past the kernel's cache; nil if it is no block device
	size   int64
}

// A read of whole pages, directBytes or more of them, goes past the cache: what is read once, to be verified and started, costs neither the
// memory nor the copy.
const (
	directAlign = 4096
	directBytes = 64 << 10
)

// OpenFile opens a block device or a file for reading and writing, or for reading alone.
func OpenFile(path string, readOnly bool) (*File, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd) // a block device's size is not in its inode
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("size of %s: %w", path, err)
	}
	file := &File{f: f, size: size}
	if st, err := f.Stat(); err == nil && st.Mode()&os.ModeDevice != 0 {
		if d, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_DIRECT, 0); err == nil {
			file.direct = d
		}
	}
	return file, nil
}

// ReadAt reads; io.EOF says that the device ends there.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if f.direct != nil && len(p) >= directBytes && (uintptr(unsafe.Pointer(&p[0]))|uintptr(len(p))|uintptr(off))%directAlign == 0 {
		// What was written by the other way is written down first (generic_file_read_iter, mm/filemap.c, Linux 6.1).
		if n, err := f.direct.ReadAt(p, off); !errors.Is(err, unix.EINVAL) {
			return n, err
		}
	}
	return f.f.ReadAt(p, off)
}

// WriteAt, Size and Close are the file's.
func (f *File) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }
func (f *File) Size() int64                              { return f.size }
func (f *File) Close() error {
	if f.direct != nil {
		f.direct.Close()
	}
	return f.f.Close()
}

// Sync writes everything down and forgets what the kernel keeps of it, so that what is read next comes from the device.
func (f *File) Sync() error {
	if err := f.f.Sync(); err != nil {
		return err
	}
	_ = unix.Fadvise(int(f.f.Fd()), 0, 0, unix.FADV_DONTNEED) // advice: where it is not taken, the cache answers
	return nil
}

// Find opens the partitions that this machine's kernel knows under their names, in sys (normally /sys) and dev (/dev). It returns
// ErrNone if there is no partition for the state. Two with one name are an error: which of them is ours cannot be told.
func Find(sys, dev string) (*Disk, error) {
	nodes := map[string][]string{}
	names := []string{PartitionState, PartitionA, PartitionB, PartitionGolden}
	blocks, err := filepath.Glob(filepath.Join(sys, "class/block/*/uevent"))
	if err != nil {
		return nil, err
	}
	for _, file := range blocks {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // a device that has just gone
		}
		for _, line := range strings.Split(string(b), "\n") {
			if name, ok := strings.CutPrefix(line, "PARTNAME="); ok {
				nodes[name] = append(nodes[name], filepath.Join(dev, filepath.Base(filepath.Dir(file))))
			}
		}
	}
	flash, err := filepath.Glob(filepath.Join(sys, "class/mtd/mtd*/name"))
	if err != nil {
		return nil, err
	}
	for _, file := range flash {
		b, err := os.ReadFile(file)
		n := strings.TrimPrefix(filepath.Base(filepath.Dir(file)), "mtd")
		if err != nil || strings.HasSuffix(n, "ro") {
			continue
		}
		name := strings.TrimSpace(string(b))
		nodes[name] = append(nodes[name], filepath.Join(dev, "mtdblock"+n)) // erases a block before it writes to it
	}
	var d parts
	var open []io.Closer
	undo := func(err error) (*Disk, error) {
		for _, c := range open {
			c.Close()
		}
		return nil, err
	}
	if len(nodes[PartitionState]) == 0 {
		return nil, ErrNone
	}
	for _, name := range names {
		at := nodes[name]
		sort.Strings(at)
		switch {
		case len(at) == 0:
			continue
		case len(at) > 1:
			return undo(fmt.Errorf("%d partitions are named %s: %s", len(at), name, strings.Join(at, ", ")))
		}
		f, err := OpenFile(at[0], false)
		if err != nil {
			return undo(fmt.Errorf("open %s: %w", name, err))
		}
		open = append(open, f)
		switch name {
		case PartitionState:
			d.state = f
		case PartitionA:
			d.a = f
		case PartitionB:
			d.b = f
		case PartitionGolden:
			d.golden = f
		}
	}
	disk, err := Open(d.state, d.a, d.b, d.golden)
	if err != nil {
		return undo(err)
	}
	disk.close = open
	return disk, nil
}

type parts struct{ state, a, b, golden Device }

// ErrNone says that the machine has no slots: it was started otherwise.
var ErrNone = errors.New("this machine has no partition " + PartitionState + ": it was not started from slots")
