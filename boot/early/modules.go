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
	"sync"
	"sync/atomic"
	"time"

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

// modaliases returns the identities of all devices under sysfs that are not in seen yet, and puts those there.
func modaliases(sys string, seen map[string]bool) ([]string, error) {
	devices, err := filepath.Glob(filepath.Join(sys, "bus/*/devices/*")) // with /modalias behind it each device's folder would be listed
	if err != nil {
		return nil, err
	}
	var all []string
	for _, d := range devices {
		if seen[d] {
			continue
		}
		seen[d] = true
		b, err := os.ReadFile(filepath.Join(d, "modalias"))
		if err != nil { // not every device has one, and any may go at any time
			continue
		}
		if s := strings.TrimSpace(string(b)); s != "" {
			all = append(all, s)
		}
	}
	return all, nil
}

// Modules loads kernel modules. The zero value has loaded none; it is not for concurrent use.
type Modules struct {
	table  []alias
	prober *kmodule.Prober
	asked  []string
	seen   map[string]bool // devices

	late     sync.WaitGroup // the slow ones
	busy     atomic.Int32   // how many of them are not done
	mu       sync.Mutex
	lateErrs []error // guarded by mu
}

// slow reports whether a driver keeps whoever loads it waiting for its device: that of a TPM has the chip test itself first, which
// takes seconds.
func slow(module string) bool { return strings.HasPrefix(module, "tpm_") }

// Load loads what the devices need that are there, as udev would, over again as long as that brings up new devices (a PCI driver
// brings a virtio bus with devices of its own). The drivers of TPMs it only begins to load: see [Modules.Late].
func (m *Modules) Load(ctx context.Context) (Outcome, string, error) {
	if m.prober == nil {
		if outcome, detail, err := m.open(); outcome != Done {
			return outcome, detail, err
		}
	}
	var did []string
	var errs []error
	probe := func(names []string) (progress bool) {
		for _, name := range names {
			if slices.Contains(m.asked, name) {
				continue
			}
			m.asked, progress = append(m.asked, name), true
			load := func() error {
				if err := m.prober.Probe(name, ""); err != nil && !errors.Is(err, unix.ENODEV) {
					return fmt.Errorf("load %s: %w", name, err)
				}
				return nil
			}
			if slow(name) {
				did = append(did, name)
				m.busy.Add(1)
				m.late.Go(func() {
					defer m.busy.Add(-1)
					if err := load(); err != nil {
						m.mu.Lock()
						defer m.mu.Unlock()
						m.lateErrs = append(m.lateErrs, err)
					}
				})
				continue
			}
			began := time.Now()
			if err := load(); err != nil {
				errs = append(errs, err)
			}
			did = append(did, fmt.Sprintf("%s %v", name, time.Since(began).Round(time.Millisecond)))
		}
		return progress
	}
	var first []string
	if !knowsFilesystem("ext4") {
		first = modulesFor(m.table, "fs-ext4")
	}
	for range 8 { // deeper bus hierarchies than that need a look by a person
		devices, err := modaliases("/sys", m.seen)
		if err != nil {
			errs = append(errs, fmt.Errorf("find devices: %w", err))
			break
		}
		names := first
		for _, d := range devices {
			names = append(names, modulesFor(m.table, d)...)
		}
		if !probe(names) || ctx.Err() != nil {
			break
		}
		first = nil
	}
	detail := strings.Join(did, ", ")
	if errs != nil {
		return Unclear, detail, errors.Join(errs...)
	}
	return Done, detail, nil
}

// open reads the image's tables.
func (m *Modules) open() (Outcome, string, error) {
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
	if m.table, err = parseAliases(bytes.NewReader(b)); err != nil {
		return Unclear, "", err
	}
	m.seen = map[string]bool{}
	if m.prober, err = kmodule.NewProber(kmodule.ProbeOpts{}); err != nil {
		return Unclear, "", fmt.Errorf("read the module dependencies: %w", err)
	}
	return Done, "", nil
}

// Busy reports whether there is something for Late to wait for.
func (m *Modules) Busy() bool { return m.busy.Load() > 0 }

// Late waits until the drivers that Load has only begun to load are loaded, and their devices there, or have failed.
func (m *Modules) Late() error {
	m.late.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	return errors.Join(m.lateErrs...)
}

// knowsFilesystem reports whether the kernel lists the file system as built in or loaded.
func knowsFilesystem(name string) bool {
	b, err := os.ReadFile("/proc/filesystems")
	return err == nil && slices.Contains(strings.Fields(string(b)), name)
}
