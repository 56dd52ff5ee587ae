package early

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// pseudo are the file systems that must be mounted before anything else. u-root's init has mounted most of them; as
// process 1 of our own we mount them all.
var pseudo = []struct {
	dir, fstype, data string
	flags             uintptr
	optional          bool
}{
	{dir: "/proc", fstype: "proc", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	{dir: "/sys", fstype: "sysfs", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	{dir: "/dev", fstype: "devtmpfs", data: "mode=0755", flags: unix.MS_NOSUID},
	{dir: "/tmp", fstype: "tmpfs", data: "mode=1777", flags: unix.MS_NOSUID | unix.MS_NODEV},
	{dir: "/run", fstype: "tmpfs", data: "mode=0755", flags: unix.MS_NOSUID | unix.MS_NODEV},
	{dir: "/sys/fs/bpf", fstype: "bpf", data: "mode=0700", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, optional: true},
}

// Mount mounts proc, sysfs, devtmpfs and memory for /tmp and /run where they are not mounted yet.
func Mount() (Outcome, string, error) {
	var did []string
	var errs []error
	for _, p := range pseudo {
		mounted, err := mountedAs(p.dir, p.fstype)
		if err == nil && mounted {
			continue
		}
		if !p.optional {
			if err := os.MkdirAll(p.dir, 0o755); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		err = unix.Mount(p.fstype, p.dir, p.fstype, p.flags, p.data)
		switch {
		case err == nil:
			did = append(did, p.dir)
		case errors.Is(err, unix.EBUSY): // there already
		case p.optional:
		default:
			errs = append(errs, fmt.Errorf("mount %s: %w", p.dir, err))
		}
	}
	if errs != nil {
		return Unclear, strings.Join(did, " "), errors.Join(errs...)
	}
	return Done, strings.Join(did, " "), nil
}

// mountedAs reports whether dir is a mount point of that type, as /proc/self/mounts says.
func mountedAs(dir, fstype string) (bool, error) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return false, err
	}
	_, typ := mountAt(string(b), dir)
	return typ == fstype, nil
}

// mountAt returns the device and type of the topmost mount on dir in the text of /proc/mounts; empty if there is none.
func mountAt(mounts, dir string) (dev, fstype string) {
	for line := range strings.Lines(mounts) {
		if f := strings.Fields(line); len(f) >= 3 && unescape(f[1]) == dir {
			dev, fstype = unescape(f[0]), f[2]
		}
	}
	return dev, fstype
}

// unescape undoes the octal escapes of /proc/mounts: space, tab, newline and backslash (seq_file's mangle).
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
