package early

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/kmodule"
	"golang.org/x/sys/unix"
)

// A module alias: a glob over device identities, and the module that drives those devices.
type alias struct {
	pattern string
	module  string
}

// parseAliases parses depmod's modules.alias: "alias PATTERN MODULE" lines (kmod's libkmod-index, text form).
func parseAliases(r io.Reader) ([]alias, error) {
	var all []alias
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if len(f) != 3 || f[0] != "alias" {
			return nil, fmt.Errorf("module aliases: bad line %q", sc.Text())
		}
		a := alias{pattern: slashless(f[1]), module: f[2]}
		if _, err := path.Match(a.pattern, ""); err != nil {
			return nil, fmt.Errorf("module aliases: pattern %q: %w", f[1], err)
		}
		all = append(all, a)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("module aliases: %w", err)
	}
	return all, nil
}

// slashless makes path.Match's star match slashes, too: in device identities they are characters like others.
func slashless(s string) string { return strings.ReplaceAll(s, "/", "\x01") }

// modulesFor returns the modules whose alias matches the device identity, in the table's order.
func modulesFor(table []alias, modalias string) []string {
	var names []string
	modalias = slashless(modalias)
	for _, a := range table {
		if ok, err := path.Match(a.pattern, modalias); err == nil && ok && !slices.Contains(names, a.module) {
			names = append(names, a.module)
		}
	}
	return names
}

// modaliases returns the identities of all devices under sysfs.
func modaliases(sys string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(sys, "bus/*/devices/*/modalias"))
	if err != nil {
		return nil, err
	}
	var all []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil { // a device may go at any time
			continue
		}
		if s := strings.TrimSpace(string(b)); s != "" {
			all = append(all, s)
		}
	}
	return all, nil
}

// LoadModules loads what the devices need that are there, as udev would, over again as long as that brings up new
// devices (a PCI driver brings a virtio bus with devices of its own).
func LoadModules(ctx context.Context) (Outcome, string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Unclear, "", fmt.Errorf("find the kernel's release: %w", err)
	}
	dir := filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:]))
	b, err := os.ReadFile(filepath.Join(dir, "modules.alias"))
	if errors.Is(err, fs.ErrNotExist) {
		return Absent, "the image has no modules for kernel " + filepath.Base(dir), nil
	}
	if err != nil {
		return Unclear, "", err
	}
	table, err := parseAliases(bytes.NewReader(b))
	if err != nil {
		return Unclear, "", err
	}
	prober, err := kmodule.NewProber(kmodule.ProbeOpts{})
	if err != nil {
		return Unclear, "", fmt.Errorf("read the module dependencies: %w", err)
	}
	var loaded []string
	var errs []error
	probe := func(names []string) (progress bool) {
		for _, name := range names {
			if slices.Contains(loaded, name) {
				continue
			}
			loaded, progress = append(loaded, name), true
			if err := prober.Probe(name, ""); err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("load %s: %w", name, err))
			}
		}
		return progress
	}
	if !knowsFilesystem("ext4") {
		probe(modulesFor(table, "fs-ext4"))
	}
	for range 8 { // deeper bus hierarchies than that need a look by a person
		devices, err := modaliases("/sys")
		if err != nil {
			errs = append(errs, fmt.Errorf("find devices: %w", err))
			break
		}
		var names []string
		for _, d := range devices {
			names = append(names, modulesFor(table, d)...)
		}
		if !probe(names) || ctx.Err() != nil {
			break
		}
	}
	if errs != nil {
		return Unclear, strings.Join(loaded, " "), errors.Join(errs...)
	}
	return Done, strings.Join(loaded, " "), nil
}

// knowsFilesystem reports whether the kernel lists the file system as built in or loaded.
func knowsFilesystem(name string) bool {
	b, err := os.ReadFile("/proc/filesystems")
	return err == nil && slices.Contains(strings.Fields(string(b)), name)
}
