// Package builder builds the project's images: what boots on a DPU or BMC and starts the agent.
//
// An initramfs is two archives, one after the other, each compressed on its own. The first changes seldom and is cached
// by a hash of all that goes into it: u-root's init and commands, made into one program by mkuimage and gobusybox, and
// the kernel modules. The second is the agent, from a plain go build. So an edit of the agent costs one go build and the
// compression of one file.
//
// A build is reproducible bit for bit: the same sources, Go version and kernel package give the same bytes on every
// machine. The manifest beside the image has the sums and the versions of all that went into it.
package builder

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/images/initramfs"
	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/images/modpack"
	"github.com/backdoor-rhs/backdoor/internal/durable"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// format is part of every cache key: raise it when the same inputs give other bytes than before.
const format = "1"

// An OverBudgetError says that an image is larger than its budget allows.
type OverBudgetError struct {
	Image      string
	What       string
	Size, Most int64
}

func (e *OverBudgetError) Error() string {
	return fmt.Sprintf("image %s: %s has %d bytes, %d more than its budget of %d", e.Image, e.What, e.Size, e.Size-e.Most, e.Most)
}

// Options say where a build takes place. Zero values are the defaults.
type Options struct {
	Module   string       // the root of the project's sources; default: the current directory
	Out      string       // default: Module/build/images
	CacheDir string       // default: os.UserCacheDir()/backdoor
	Agent    string       // the agent's package; default: ./cmd/backdoord
	Tags     string       // build tags of the agent; none in what is released
	Logger   *slog.Logger // default: silent
}

// A File is an output or an ingredient.
type File struct {
	Name   string `json:"name"` // of an output: below Options.Out
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// A Manifest says what an image is made of. It has no times or places in it, and is as reproducible as the image.
type Manifest struct {
	Image     string   `json:"image"`
	GOARCH    string   `json:"goarch"`
	Go        string   `json:"go"`
	Initramfs File     `json:"initramfs"`
	Unpacked  int64    `json:"unpacked"`
	Kernel    File     `json:"kernel"`
	DTB       *File    `json:"dtb,omitempty"`
	Release   string   `json:"kernelRelease"`
	Package   string   `json:"kernelPackage"`
	Version   string   `json:"kernelVersion"` // of the Debian package
	Agent     File     `json:"agent"`
	Base      string   `json:"base"` // the first archive's cache key
	Commands  []string `json:"commands"`
	Modules   []string `json:"modules"`
	Uroot     string   `json:"uroot"` // u-root's module version
	// Packages are those that Image.Programs come from.
	Packages []kernels.Package `json:"packages,omitempty"`
	Budget   Budget            `json:"budget"`
}

// Build makes an image and its manifest. If only the budget is exceeded, the files are written and the manifest is
// returned along with an [*OverBudgetError].
func Build(ctx context.Context, img Image, o Options) (*Manifest, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	m, err := build(ctx, img, o)
	if err != nil {
		return m, fmt.Errorf("build %s: %w", img.Name, err)
	}
	return m, nil
}

func (o *Options) complete() error {
	o.Module = cmp.Or(o.Module, ".")
	abs, err := filepath.Abs(o.Module)
	if err != nil {
		return err
	}
	o.Module = abs
	if o.Out == "" {
		o.Out = filepath.Join(o.Module, "build", "images")
	}
	if o.CacheDir == "" {
		d, err := os.UserCacheDir()
		if err != nil {
			return fmt.Errorf("find the cache directory: %w", err)
		}
		o.CacheDir = filepath.Join(d, "backdoor")
	}
	o.Agent = cmp.Or(o.Agent, "./cmd/backdoord")
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

func build(ctx context.Context, img Image, o Options) (*Manifest, error) {
	t, err := kernels.Lookup(img.Kernel)
	if err != nil {
		return nil, err
	}
	k, err := kernels.Cache{Dir: filepath.Join(o.CacheDir, "kernels"), Log: o.Logger}.Fetch(ctx, t)
	if err != nil {
		return nil, err
	}
	goVersion, err := goCommand(ctx, o.Module, nil, "env", "GOVERSION")
	if err != nil {
		return nil, err
	}
	m := &Manifest{
		Image: img.Name, GOARCH: img.GOARCH, Go: goVersion, Commands: img.Commands, Budget: img.Budget,
		Release: k.Release, Package: k.Package, Version: k.Version,
	}
	var base stored
	var agent []byte
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		base, err = makeBase(gctx, img, k, goVersion, o)
		return err
	})
	g.Go(func() (err error) {
		agent, m.Agent, err = buildAgent(gctx, img, o)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var a initramfs.Archive
	if img.Loader != "" {
		loader(&a, img, agent)
	} else {
		a.File("bbin/backdoord", agent, 0o755)
		a.Symlink("bbin/uinit", "backdoord") // what u-root's init starts
	}
	second, err := a.Bytes()
	if err != nil {
		return nil, err
	}
	packed, err := initramfs.Compress(second, initramfs.Quick)
	if err != nil {
		return nil, err
	}
	unpacked := int64(len(second))
	if img.Programs != nil {
		var a initramfs.Archive
		if m.Packages, err = addPrograms(ctx, &a, *img.Programs, o); err != nil {
			return nil, err
		}
		third, err := a.Bytes()
		if err != nil {
			return nil, err
		}
		more, err := initramfs.Compress(third, initramfs.Thorough)
		if err != nil {
			return nil, err
		}
		packed, unpacked = append(packed, more...), unpacked+int64(len(third))
	}
	m.Base, m.Modules, m.Uroot = base.Key, base.Modules, base.Uroot
	m.Unpacked = base.Unpacked + unpacked
	for _, w := range []struct {
		name string
		data func() ([]byte, error)
		file *File
	}{
		{img.Name + ".cpio.zst", func() ([]byte, error) { return append(slices.Clone(base.data), packed...), nil }, &m.Initramfs},
		{img.Name + ".vmlinuz", func() ([]byte, error) { return os.ReadFile(k.Vmlinuz) }, &m.Kernel},
		{img.Name + ".dtb", func() ([]byte, error) {
			if img.DTB == "" {
				return nil, nil
			}
			m.DTB = &File{}
			return os.ReadFile(filepath.Join(k.DTBDir, img.DTB))
		}, nil},
	} {
		data, err := w.data()
		if err != nil {
			return nil, err
		}
		if data == nil {
			continue
		}
		f := cmp.Or(w.file, m.DTB)
		*f = describe(w.name, data)
		if err := write(filepath.Join(o.Out, w.name), data); err != nil {
			return nil, err
		}
	}
	text, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return nil, err
	}
	if err := write(filepath.Join(o.Out, img.Name+".json"), append(text, '\n')); err != nil {
		return nil, err
	}
	return m, errors.Join(
		within(img, "the compressed initramfs", m.Initramfs.Size, img.Budget.Initramfs),
		within(img, "the unpacked initramfs", m.Unpacked, img.Budget.Unpacked),
	)
}

// loader fills the second archive of a first stage: its program as the kernel's init, and what it is for. Which key sets it trusts
// (root.json) is the owner's to say, in an archive that follows.
func loader(a *initramfs.Archive, img Image, program []byte) {
	a.Directory("dev", 0o755)
	a.CharDevice("dev/console", 0o600, 5, 1)
	a.Directory("etc", 0o755)
	a.Directory("etc/backdoor", 0o755)
	settings := fmt.Sprintf("{\"product\":\"backdoor\",\"machine\":%q}\n", img.Loader)
	a.File("etc/backdoor/loader.json", []byte(settings), 0o644)
	a.File("init", program, 0o755)
}

func within(img Image, what string, size, most int64) error {
	if size <= most {
		return nil
	}
	return &OverBudgetError{img.Name, what, size, most}
}

func describe(name string, data []byte) File {
	sum := sha256.Sum256(data)
	return File{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])}
}

// environment is what the products are built with, whatever the user's own settings are. The lowest variant of each
// architecture runs everywhere; 32-bit Arm boards of interest all have ARMv7 with VFP.
func environment(goarch string) []string {
	return []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + goarch, "GOAMD64=v1", "GOARM=7", "GOARM64=v8.0", "GOEXPERIMENT="}
}

// buildAgent builds the agent with go build, which has its own cache.
func buildAgent(ctx context.Context, img Image, o Options) ([]byte, File, error) {
	start := time.Now()
	dir, err := os.MkdirTemp("", "backdoor-agent-")
	if err != nil {
		return nil, File{}, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "agent")
	program, place := o.Agent, "bbin/backdoord"
	if img.Loader != "" {
		program, place = "./cmd/backdoor-loader", "init"
	}
	if _, err := goCommand(ctx, o.Module, environment(img.GOARCH), "build", "-trimpath", "-tags="+o.Tags, "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", out, program); err != nil {
		return nil, File{}, err
	}
	data, err := os.ReadFile(out)
	if err != nil {
		return nil, File{}, err
	}
	if !bytes.HasPrefix(data, []byte("\x7fELF")) { // go build makes something of a library, too
		return nil, File{}, fmt.Errorf("%s is not a command", program)
	}
	f := describe(place, data)
	o.Logger.Info("agent built", "image", img.Name, "bytes", f.Size, "took", time.Since(start).Round(time.Millisecond))
	return data, f, nil
}

// goCommand runs the go tool in dir and returns what it printed.
func goCommand(ctx context.Context, dir string, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return strings.TrimSpace(string(out)), nil
}

// A stored is the first archive as the cache keeps it: these fields as JSON beside the compressed bytes.
type stored struct {
	Key      string   `json:"key"`
	Unpacked int64    `json:"unpacked"`
	Modules  []string `json:"modules"`
	Uroot    string   `json:"uroot"`

	data []byte
}

// makeBase returns the first archive, from the cache if it is there.
func makeBase(ctx context.Context, img Image, k kernels.Kernel, goVersion string, o Options) (stored, error) {
	u, err := lookupUroot(ctx, img, o)
	if err != nil {
		return stored{}, err
	}
	s := stored{Uroot: u.version}
	h := sha256.New()
	fmt.Fprintf(h, "format %s\ncompressor %s\n%s\nkernel %s %s %s\nmodules %q\n",
		format, u.compressor, u.inputs(img, goVersion), k.Package, k.Version, k.Arch, img.Modules)
	s.Key = hex.EncodeToString(h.Sum(nil))[:20]
	dir := filepath.Join(o.CacheDir, "images")
	file := filepath.Join(dir, cmp.Or(img.Of, img.Name)+"-"+s.Key)
	if err := s.load(file); err == nil {
		return s, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return stored{}, err
	}
	unlock, err := lockFile(ctx, filepath.Join(dir, cmp.Or(img.Of, img.Name)+".lock"))
	if err != nil {
		return stored{}, err
	}
	defer unlock()
	if err := s.load(file); err == nil { // another process made it meanwhile
		return s, nil
	}
	start := time.Now()
	pack, err := modpack.Make(k.ModulesDir, img.Modules)
	if err != nil {
		return stored{}, err
	}
	s.Modules = pack.Names()
	var a initramfs.Archive
	dirs := []string{"lib", "lib/modules"}
	if img.Loader == "" {
		newc, err := u.busybox(ctx, img, o)
		if err != nil {
			return stored{}, err
		}
		if err := a.Append(newc); err != nil {
			return stored{}, err
		}
		dirs = []string{"lib/modules", "run", "var/lib/backdoor"}
	}
	for _, d := range dirs {
		a.Directory(d, 0o755)
	}
	for _, f := range pack.Files() {
		a.File("lib/modules/"+pack.Release+"/"+f.Name, f.Data, 0o644)
	}
	raw, err := a.Bytes()
	if err != nil {
		return stored{}, err
	}
	s.Unpacked = int64(len(raw))
	if s.data, err = initramfs.Compress(raw, initramfs.Thorough); err != nil {
		return stored{}, err
	}
	if err := s.save(file); err != nil {
		return stored{}, err
	}
	o.Logger.Info("base built", "image", img.Name, "key", s.Key, "bytes", len(s.data), "unpacked", s.Unpacked, "took", time.Since(start).Round(time.Millisecond))
	return s, nil
}

func (s *stored) load(file string) error {
	text, err := os.ReadFile(file + ".json")
	if err != nil {
		return err
	}
	var got stored
	if err := json.Unmarshal(text, &got); err != nil || got.Key != s.Key {
		return fs.ErrNotExist // made again
	}
	if got.data, err = os.ReadFile(file + ".cpio.zst"); err != nil {
		return err
	}
	*s = got
	return nil
}

// save writes the JSON last: where it is, the rest is whole.
func (s *stored) save(file string) error {
	if err := write(file+".cpio.zst", s.data); err != nil {
		return err
	}
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return write(file+".json", text)
}

// write puts a file into place at once, and leaves one alone that already has the content.
func write(name string, data []byte) error {
	if old, err := os.ReadFile(name); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(name, data, 0o644)
}

// lockFile takes an advisory lock and waits for it as long as ctx allows.
func lockFile(ctx context.Context, name string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for another build: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}
