package lab

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ram is HOST's memory: an anonymous file in memory that both machines map. It has no name in any directory, so that it
// cannot outlive the lab and does not depend on the size of /dev/shm.
type ram struct {
	file *os.File
	size int64
}

func newRAM(size int64) (*ram, error) {
	if free, err := available(); err == nil && free < size {
		return nil, &InfraError{
			Op:   "make the host's memory",
			Err:  fmt.Errorf("%d MiB are wanted and %d MiB are free", size>>20, free>>20),
			Next: "stop other programs, or choose less memory for the host",
		}
	}
	fd, err := unix.MemfdCreate("backdoor-host-ram", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, &InfraError{Op: "make the host's memory", Err: err}
	}
	f := os.NewFile(uintptr(fd), "backdoor-host-ram")
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, &InfraError{Op: "make the host's memory", Err: err}
	}
	return &ram{f, size}, nil
}

// path names the file for every process of this user while this process lives.
func (r *ram) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), r.file.Fd()) }

// clear makes the memory read as zero, as a power cut does. Mappings stay valid.
func (r *ram) clear() error {
	if err := unix.Fallocate(int(r.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, r.size); err != nil {
		return &InfraError{Op: "clear the host's memory", Err: err}
	}
	return nil
}

// dup returns a new descriptor of the file, to give away.
func (r *ram) dup() (*os.File, error) {
	fd, err := unix.FcntlInt(r.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, &InfraError{Op: "share the host's memory", Err: err}
	}
	return os.NewFile(uintptr(fd), "backdoor-host-ram"), nil
}

// available is the memory in bytes that can be had without swapping (MemAvailable of proc(5)).
func available() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	for in.Scan() {
		if v, ok := strings.CutPrefix(in.Text(), "MemAvailable:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("no MemAvailable in /proc/meminfo")
}
