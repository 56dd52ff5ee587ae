// Package unixsock lets Unix sockets lie at paths of any length.
package unixsock

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Short calls f with a name of the socket at path that fits into a socket address (108 bytes; unix(7)), however deep path is.
// The name is good during the call only.
func Short(path string, f func(string) error) error {
	if len(path) < 100 {
		return f(path)
	}
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer unix.Close(dir)
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path)))
}
