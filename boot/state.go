package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// findState looks for the state's file system among the block devices in sysBlock (normally /sys/class/block), whose
// nodes are in dev. It returns the one device with the label; "" if there is none. Two with the same label are an error:
// which of them is ours cannot be told. Devices that cannot be read are reported only if the label was not found.
func findState(sysBlock, dev, label string) (string, error) {
	entries, err := os.ReadDir(sysBlock)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("list block devices: %w", err)
	}
	var found []string
	var errs []error
	for _, e := range entries {
		if volatileDevice(e.Name()) {
			continue
		}
		node := filepath.Join(dev, strings.ReplaceAll(e.Name(), "!", "/"))
		sb, err := probeDevice(node)
		switch {
		case errors.Is(err, errNoExt4), errors.Is(err, unix.ENOMEDIUM), errors.Is(err, os.ErrNotExist):
		case err != nil:
			errs = append(errs, fmt.Errorf("probe %s: %w", node, err))
		case sb.label == label:
			found = append(found, node)
		}
	}
	switch len(found) {
	case 0:
		return "", errors.Join(errs...)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%d file systems are labelled %s: %s", len(found), label, strings.Join(found, ", "))
}

func volatileDevice(name string) bool {
	for _, p := range []string{"ram", "loop", "zram", "nbd"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

func probeDevice(node string) (ext4Super, error) {
	f, err := os.Open(node)
	if err != nil {
		return ext4Super{}, err
	}
	defer f.Close()
	return readExt4(f)
}

// mountState mounts the state disk, or memory in its place: an agent without its disk still heals, but forgets.
func (m *Machine) mountState(ctx context.Context, wait time.Duration) (Outcome, string, error) {
	if err := os.MkdirAll(StateDir, 0o700); err != nil {
		return Unclear, "", err
	}
	dev, err := findState("/sys/class/block", "/dev", StateLabel)
	for deadline := time.Now().Add(wait); dev == "" && err == nil && time.Now().Before(deadline) && ctx.Err() == nil; {
		time.Sleep(20 * time.Millisecond) // controllers find their disks on their own time; nothing tells us
		dev, err = findState("/sys/class/block", "/dev", StateLabel)
	}
	if dev != "" {
		merr := unix.Mount(dev, StateDir, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOATIME, "errors=remount-ro")
		if merr == nil {
			m.mu.Lock()
			m.persistent, m.stateDev = true, dev
			m.mu.Unlock()
			return Done, dev, os.Chmod(StateDir, 0o700)
		}
		err = fmt.Errorf("mount %s: %w", dev, merr)
	}
	const loud = "STATE IS IN MEMORY ONLY: journal, credentials and certificate are lost with the next boot"
	if terr := unix.Mount("tmpfs", StateDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,size=25%"); terr != nil {
		return Unclear, loud, errors.Join(err, fmt.Errorf("mount memory on %s: %w", StateDir, terr))
	}
	m.log.Error(loud, "label", StateLabel)
	if err != nil {
		return Unclear, loud, err
	}
	return Absent, loud, nil
}
