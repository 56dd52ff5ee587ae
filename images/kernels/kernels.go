// Package kernels fetches Debian kernels, of any architecture, from the package archives that the machine already uses.
//
// A kernel is named by what it is for ("6.1", "dpu-arm64"; see [Targets]), not by a version. Fetch resolves the name
// through Debian's meta packages at the moment it first needs the kernel, so that no pin goes stale, and records the
// exact version it got. From then on the same kernel comes out of the cache directory, without a network, until
// [Cache.Refresh] is called.
//
// The work is done by apt and dpkg-deb with a configuration, package lists and state of their own in the cache
// directory: the machine's package state is neither read nor changed, no foreign architecture is added to it, and no
// privilege is needed. Mirrors and signing keys are those of the machine's own sources; entries that are not a Debian
// release's are left out, so that a repository that lacks an architecture, or does not answer, breaks nothing.
//
// Sources: apt.conf(5), sources.list(5) and apt-get(8) of apt 2.6 (Debian 12).
package kernels

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/internal/durable"
)

// ErrNotFound says that no package archive of this machine has the kernel, or that no target has the name.
var ErrNotFound = errors.New("kernel not found")

// A Target is a kernel by its purpose.
type Target struct {
	// Name is the name that [Lookup] knows and under which the cache remembers what it fetched.
	Name string
	// Arch is Debian's name of the architecture: amd64, arm64, armhf.
	Arch string
	// Series is the prefix of the kernel's release, with its final dot: a meta package that leads elsewhere is refused.
	Series string
	// Metas are the meta packages that lead to the kernel, best first.
	Metas []Meta
	// OnDemand kernels are not fetched by "make setup": only the long tests boot them.
	OnDemand bool
}

// A Meta is a meta package in a Debian release.
type Meta struct {
	// Suite is the codename of the release; its -updates and -security suites are searched with it.
	Suite string
	// Package is the meta package's name; it depends on exactly one linux-image package.
	Package string
}

// Targets returns the kernels that the project's images, its lab and its tests use.
//
// Of the 6.12 kernels, "6.12…" come as a backport with bookworm's security suite, or else from trixie, whose own kernel they
// are; "13-6.12…" are always trixie's. Sid's series is whatever sid has: any 7.
func Targets() []Target {
	kernel := func(name, arch, series string, metas ...Meta) Target {
		return Target{Name: name, Arch: arch, Series: series, Metas: metas}
	}
	all := []Target{
		kernel("6.1", "amd64", "6.1.", Meta{"bookworm", "linux-image-cloud-amd64"}),
		kernel("6.1-generic", "amd64", "6.1.", Meta{"bookworm", "linux-image-amd64"}),
		kernel("6.12", "amd64", "6.12.", Meta{"bookworm", "linux-image-6.12-cloud-amd64"}, Meta{"trixie", "linux-image-cloud-amd64"}),
		kernel("6.12-generic", "amd64", "6.12.", Meta{"bookworm", "linux-image-6.12-amd64"}, Meta{"trixie", "linux-image-amd64"}),
		kernel("5.10", "amd64", "5.10.", Meta{"bullseye", "linux-image-cloud-amd64"}),
		kernel("sid", "amd64", "7.", Meta{"sid", "linux-image-cloud-amd64"}),
		kernel("6.1-cloud-arm64", "arm64", "6.1.", Meta{"bookworm", "linux-image-cloud-arm64"}),
		kernel("6.1-armmp", "armhf", "6.1.", Meta{"bookworm", "linux-image-armmp"}),
	}
	for _, t := range []Target{
		kernel("5.10-generic", "amd64", "5.10.", Meta{"bullseye", "linux-image-amd64"}),
		kernel("5.10-rt", "amd64", "5.10.", Meta{"bullseye", "linux-image-rt-amd64"}),
		kernel("6.1-rt", "amd64", "6.1.", Meta{"bookworm", "linux-image-rt-amd64"}),
		kernel("6.12-rt", "amd64", "6.12.", Meta{"bookworm", "linux-image-6.12-rt-amd64"}, Meta{"trixie", "linux-image-rt-amd64"}),
		kernel("13-6.12", "amd64", "6.12.", Meta{"trixie", "linux-image-cloud-amd64"}),
		kernel("13-6.12-generic", "amd64", "6.12.", Meta{"trixie", "linux-image-amd64"}),
		kernel("13-6.12-rt", "amd64", "6.12.", Meta{"trixie", "linux-image-rt-amd64"}),
		kernel("sid-generic", "amd64", "7.", Meta{"sid", "linux-image-amd64"}),
		kernel("sid-rt", "amd64", "7.", Meta{"sid", "linux-image-rt-amd64"}),
		kernel("6.1-arm64", "arm64", "6.1.", Meta{"bookworm", "linux-image-arm64"}),
		kernel("13-6.12-arm64", "arm64", "6.12.", Meta{"trixie", "linux-image-arm64"}),
		kernel("13-6.12-16k-arm64", "arm64", "6.12.", Meta{"trixie", "linux-image-arm64-16k"}),
		kernel("sid-cloud-arm64", "arm64", "7.", Meta{"sid", "linux-image-cloud-arm64"}),
	} {
		t.OnDemand = true
		all = append(all, t)
	}
	return all
}

// Lookup returns the target with that name. The error is [ErrNotFound] and lists the names there are.
func Lookup(name string) (Target, error) {
	var names []string
	for _, t := range Targets() {
		if t.Name == name {
			return t, nil
		}
		names = append(names, t.Name)
	}
	return Target{}, fmt.Errorf("kernel %q: %w; there are %s", name, ErrNotFound, strings.Join(names, ", "))
}

// A Kernel is a kernel in the cache. All paths are absolute.
type Kernel struct {
	Target  string    `json:"target"`  // the target's name
	Package string    `json:"package"` // such as linux-image-6.1.0-56-cloud-amd64
	Version string    `json:"version"` // of the Debian package, such as 6.1.192-2
	Arch    string    `json:"arch"`    // Debian's name
	Release string    `json:"release"` // as uname -r says: 6.1.0-56-cloud-amd64
	Fetched time.Time `json:"fetched"`

	Vmlinuz    string `json:"-"` // the bootable kernel
	Config     string `json:"-"` // its configuration
	ModulesDir string `json:"-"` // lib/modules/Release: kernel/, modules.builtin; Debian ships no modules.dep
	DTBDir     string `json:"-"` // device trees; empty where the package has none
}

// A Cache keeps kernels in a directory. Several processes may use the same one at once.
type Cache struct {
	Dir string       // empty: DefaultDir
	Log *slog.Logger // nil: silent

	etc string // the directory with apt's sources; empty: /etc/apt
}

// DefaultDir is the per-user cache directory for kernels.
func DefaultDir() (string, error) {
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory: %w", err)
	}
	return filepath.Join(d, "backdoor", "kernels"), nil
}

// Fetch returns the target's kernel from the cache directory, and gets it there first if it must.
// An empty cacheDir is [DefaultDir].
func Fetch(ctx context.Context, cacheDir string, t Target) (Kernel, error) {
	return Cache{Dir: cacheDir}.Fetch(ctx, t)
}

// Fetch returns the target's kernel, and gets it into the cache first if it must.
func (c Cache) Fetch(ctx context.Context, t Target) (Kernel, error) { return c.get(ctx, t, false) }

// Refresh resolves the target anew and fetches the kernel that the meta package leads to now.
func (c Cache) Refresh(ctx context.Context, t Target) (Kernel, error) { return c.get(ctx, t, true) }

// Cached returns the target's kernel if the cache has it; else the error is fs.ErrNotExist.
func (c Cache) Cached(t Target) (Kernel, error) {
	dir, err := c.dir()
	if err != nil {
		return Kernel{}, err
	}
	return load(dir, t)
}

func (c Cache) dir() (string, error) {
	if c.Dir == "" {
		return DefaultDir()
	}
	return filepath.Abs(c.Dir)
}

func (c Cache) get(ctx context.Context, t Target, refresh bool) (Kernel, error) {
	dir, err := c.dir()
	if err != nil {
		return Kernel{}, err
	}
	if !refresh {
		k, err := load(dir, t)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return k, err
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Kernel{}, fmt.Errorf("make the kernel cache: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return Kernel{}, err
	}
	defer unlock()
	if !refresh { // another process may have fetched it while we waited
		if k, err := load(dir, t); err == nil {
			return k, nil
		}
	}
	k, err := c.fetch(ctx, dir, t)
	if err != nil {
		return Kernel{}, fmt.Errorf("fetch kernel %s: %w", t.Name, err)
	}
	return k, nil
}

// fetch resolves, downloads and unpacks a kernel. Preconditions: the cache's lock is held.
func (c Cache) fetch(ctx context.Context, dir string, t Target) (Kernel, error) {
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	etc := c.etc
	if etc == "" {
		etc = "/etc/apt"
	}
	sources, err := readSources(etc)
	if err != nil {
		return Kernel{}, err
	}
	if len(t.Metas) == 0 {
		return Kernel{}, fmt.Errorf("no meta package leads to it: %w", ErrNotFound)
	}
	var missing []error
	for _, m := range t.Metas {
		k, err := c.fetchMeta(ctx, log, dir, t, m, sources)
		if err == nil || !errors.Is(err, ErrNotFound) {
			return k, err
		}
		missing = append(missing, err)
	}
	return Kernel{}, errors.Join(missing...)
}

func (c Cache) fetchMeta(ctx context.Context, log *slog.Logger, dir string, t Target, m Meta, sources []source) (Kernel, error) {
	a, err := newApt(filepath.Join(dir, "apt", m.Suite+"-"+t.Arch), t.Arch, retarget(sources, m.Suite))
	if err != nil {
		return Kernel{}, err
	}
	log.Info("resolve kernel", "target", t.Name, "suite", m.Suite, "package", m.Package)
	incomplete := a.update(ctx)
	if err := ctx.Err(); err != nil {
		return Kernel{}, err
	}
	meta, err := a.show(ctx, m.Package)
	if err != nil {
		return Kernel{}, errors.Join(err, incomplete)
	}
	if incomplete != nil {
		log.Warn("go on with incomplete package lists", "err", incomplete)
	}
	name, err := imageDependency(meta["Depends"])
	if err != nil {
		return Kernel{}, fmt.Errorf("package %s: %w", m.Package, err)
	}
	release := strings.TrimPrefix(name, "linux-image-")
	if !strings.HasPrefix(release, t.Series) {
		return Kernel{}, fmt.Errorf("package %s in %s leads to %s, not to %s: %w", m.Package, m.Suite, name, t.Series, ErrNotFound)
	}
	image, err := a.show(ctx, name)
	if err != nil {
		return Kernel{}, err
	}
	k := Kernel{
		Target: t.Name, Package: name, Version: image["Version"], Arch: t.Arch, Release: release,
		Fetched: time.Now().UTC().Truncate(time.Second),
	}
	if k.Version == "" {
		return Kernel{}, fmt.Errorf("package %s has no version", name)
	}
	into := filepath.Join(dir, k.subdir())
	if _, err := os.Stat(into); errors.Is(err, fs.ErrNotExist) {
		packages := append([]string{name}, parts(image["Depends"], release)...)
		log.Info("download kernel", "packages", packages, "version", k.Version)
		if err := download(ctx, a, packages, k.Version, release, into); err != nil {
			return Kernel{}, err
		}
	} else if err != nil {
		return Kernel{}, err
	}
	if err := save(dir, k); err != nil {
		return Kernel{}, err
	}
	return load(dir, t)
}

// download fetches packages of one version and unpacks them beside their final place, then renames that there.
func download(ctx context.Context, a *apt, packages []string, version, release, into string) error {
	if err := os.MkdirAll(filepath.Dir(into), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(into), ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	tree := filepath.Join(tmp, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	for _, name := range packages {
		dir := filepath.Join(tmp, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		deb, err := a.download(ctx, name, version, dir)
		if err != nil {
			return err
		}
		if err := unpack(ctx, deb, release, tree); err != nil {
			return fmt.Errorf("unpack %s: %w", name, err)
		}
	}
	return os.Rename(tree, into)
}

// parts returns the packages that an image package of Debian 14 leaves the kernel, its configuration and its modules to.
func parts(depends, release string) []string {
	var found []string
	for _, d := range strings.Split(depends, ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
		if base, ok := strings.CutSuffix(name, "-"+release); ok && slices.Contains([]string{"linux-base", "linux-binary", "linux-modules"}, base) {
			found = append(found, name)
		}
	}
	return found
}

// imageDependency picks the one linux-image package out of a meta package's Depends field.
func imageDependency(depends string) (string, error) {
	var found string
	for _, d := range strings.Split(depends, ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
		name, _, _ = strings.Cut(name, ":")
		if !strings.HasPrefix(name, "linux-image-") {
			continue
		}
		if found != "" {
			return "", fmt.Errorf("depends on two kernels, %s and %s", found, name)
		}
		found = name
	}
	if found == "" || strings.ContainsAny(found, "/\\") {
		return "", fmt.Errorf("depends on no linux-image package: %q", depends)
	}
	return found, nil
}

func (k Kernel) subdir() string {
	// The epoch's colon is legal in a file name, but not in a module path or in Make.
	return filepath.Join(k.Package+"_"+k.Arch, strings.ReplaceAll(k.Version, ":", "%3a"))
}

func record(dir string, target string) string {
	return filepath.Join(dir, "target-"+target+".json")
}

// load reads what the cache has for the target; fs.ErrNotExist if that is nothing, or not all there.
func load(dir string, t Target) (Kernel, error) {
	b, err := os.ReadFile(record(dir, t.Name))
	if err != nil {
		return Kernel{}, fmt.Errorf("read the kernel cache: %w", err)
	}
	var k Kernel
	if err := json.Unmarshal(b, &k); err != nil {
		return Kernel{}, fmt.Errorf("read the kernel cache: %s: %w", record(dir, t.Name), err)
	}
	if k.Arch != t.Arch || !strings.HasPrefix(k.Release, t.Series) {
		return Kernel{}, fmt.Errorf("kernel cache has %s for %s: %w", k.Package, t.Name, fs.ErrNotExist)
	}
	tree := filepath.Join(dir, k.subdir())
	k.Vmlinuz = filepath.Join(tree, "boot", "vmlinuz-"+k.Release)
	k.Config = filepath.Join(tree, "boot", "config-"+k.Release)
	k.ModulesDir = filepath.Join(tree, "lib", "modules", k.Release)
	if there := filepath.Join(k.ModulesDir, "vmlinuz"); isFile(there) { // Debian 14 has all of it there
		k.Vmlinuz, k.Config = there, filepath.Join(k.ModulesDir, "config")
	}
	for _, p := range []string{k.Vmlinuz, k.Config, k.ModulesDir} {
		if _, err := os.Stat(p); err != nil {
			return Kernel{}, fmt.Errorf("read the kernel cache: %w", err)
		}
	}
	if dtbs := filepath.Join(tree, "dtbs"); isDir(dtbs) {
		k.DTBDir = dtbs
	}
	return k, nil
}

func save(dir string, k Kernel) error {
	b, err := json.MarshalIndent(k, "", "\t")
	if err != nil {
		return err
	}
	if err := durable.WriteFile(record(dir, k.Target), append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the kernel cache: %w", err)
	}
	return nil
}

func isFile(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular()
}

func isDir(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.IsDir()
}

// lock takes an advisory lock that all users of the cache share, and waits for it as long as ctx allows.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the kernel cache: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock the kernel cache: %w", err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for another process to fetch kernels: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}
