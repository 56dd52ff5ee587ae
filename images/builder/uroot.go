package builder

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// mkuimage is u-root's image maker; go.mod pins it as a tool.
const mkuimage = "github.com/u-root/mkuimage/cmd/mkuimage"

// urootTags leave out gosh's line editors, which weigh more than the shell.
const urootTags = "goshsmall"

// A urootBase is what the u-root part of an image depends on.
type urootBase struct {
	packages   []string // import paths of the commands
	modules    []string // "path version", sorted: all modules that the commands and the tools that build them come from
	version    string   // u-root's
	compressor string   // the compressor's module version
}

// builders are the packages that decide how the commands become an archive.
var builders = []string{mkuimage, "github.com/klauspost/compress/zstd", "github.com/u-root/u-root/pkg/cpio"}

func lookupUroot(ctx context.Context, img Image, o Options) (urootBase, error) {
	var u urootBase
	for _, c := range img.Commands {
		u.packages = append(u.packages, "github.com/u-root/u-root/cmds/core/"+c)
	}
	args := []string{"list", "-deps", "-tags", urootTags, "-f", "{{with .Module}}{{.Path}} {{.Version}}{{with .Replace}} => {{.Path}} {{.Version}}{{end}}{{end}}"}
	out, err := goCommand(ctx, o.Module, environment(img.GOARCH), append(append(args, u.packages...), builders...)...)
	if err != nil {
		return u, err
	}
	u.modules = strings.Split(out, "\n")
	slices.Sort(u.modules)
	u.modules = slices.Compact(u.modules)
	for _, m := range u.modules {
		if v, ok := strings.CutPrefix(m, "github.com/u-root/u-root "); ok {
			u.version = v
		}
		if v, ok := strings.CutPrefix(m, "github.com/klauspost/compress "); ok {
			u.compressor = v
		}
	}
	return u, nil
}

// inputs names all that the busybox depends on. Module versions stand for their contents: go.sum binds the two.
func (u urootBase) inputs(img Image, goVersion string) string {
	return fmt.Sprintf("go %s\nenv %q\ntags %s\ncommands %q\n%s",
		goVersion, environment(img.GOARCH), urootTags, u.packages, strings.Join(u.modules, "\n"))
}

// busybox has mkuimage build u-root's commands into one program, and returns the archive (newc, uncompressed) with
// directories, devices, links and init. It takes half a minute of processor time: gobusybox always compiles everything.
//
// mkuimage runs as a process of its own, since gobusybox takes part of its settings from the environment.
func (u urootBase) busybox(ctx context.Context, img Image, o Options) ([]byte, error) {
	dir, err := os.MkdirTemp("", "backdoor-uroot-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		return nil, err
	}
	o.Logger.Info("build u-root's commands; this is done once", "image", img.Name, "commands", strings.Join(img.Commands, " "))
	tool := filepath.Join(dir, "mkuimage")
	if _, err := goCommand(ctx, o.Module, []string{"CGO_ENABLED=0"}, "build", "-buildvcs=false", "-o", tool, mkuimage); err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "uroot.cpio")
	args := []string{"-config-file=" + os.DevNull, "-initcmd=init", "-defaultsh=", "-skip-ldd", "-tmp-dir=" + work, "-go-extra-args=-buildvcs=false", "-tags=" + urootTags, "-o=" + out}
	cmd := exec.CommandContext(ctx, tool, append(args, u.packages...)...)
	cmd.Dir = o.Module
	cmd.Env = append(os.Environ(), environment(img.GOARCH)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that its compilers end with it
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mkuimage: %w\n%s", err, bytes.TrimSpace(text))
	}
	return os.ReadFile(out)
}
