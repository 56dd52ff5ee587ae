package kernels

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// An apt is apt with everything of its own: sources, lists, state, cache, architecture.
type apt struct {
	dir  string
	arch string
}

// aptConf comes last (apt's -c), so that it overrides the machine's configuration but keeps its proxies and
// certificates. Hooks are cleared, since they are about the machine's own state and may need root. The download user
// is root's own (for root only; others have no choice), because _apt cannot enter root's cache directory.
const aptConf = `#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Default-Release;
APT::Architecture "%[2]s";
APT::Architectures { "%[2]s"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
Dir::Etc::sourcelist "%[1]s/debian.sources";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-";
Dir::Etc::preferencesparts "-";
Dir::State "%[1]s/state";
Dir::State::status "%[1]s/status";
Dir::State::Lists "%[1]s/lists";
Dir::Cache "%[1]s/cache";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
`

func newApt(dir, arch string, sources []source) (*apt, error) {
	if len(sources) == 0 {
		return nil, fmt.Errorf("apt's sources name no Debian release: %w", ErrNotFound)
	}
	if strings.ContainsAny(dir, "\"\n\\") {
		return nil, fmt.Errorf("cache directory %q cannot be written in apt's configuration", dir)
	}
	for _, d := range []string{"state", "lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("prepare apt: %w", err)
		}
	}
	for name, content := range map[string][]byte{
		"apt.conf":       fmt.Appendf(nil, aptConf, dir, arch),
		"debian.sources": deb822(sources, arch),
		"status":         nil, // nothing is installed
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return nil, fmt.Errorf("prepare apt: %w", err)
		}
	}
	return &apt{dir: dir, arch: arch}, nil
}

func (a *apt) run(ctx context.Context, dir, tool string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, tool, append([]string{"-q", "-c", filepath.Join(a.dir, "apt.conf")}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return output(cmd)
}

// output runs a command and puts the last of what it complained about into the error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return nil, fmt.Errorf("%w: kernels are fetched with apt and dpkg-deb, on Debian", err)
		}
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, tail(complaint.String(), 600))
	}
	return out.Bytes(), nil
}

func tail(s string, n int) string {
	s = strings.TrimSpace(s)
	if len(s) > n {
		s = "…" + s[len(s)-n:]
	}
	return s
}

// update refreshes the lists. An error may concern one of several lists only (a mirror in the middle of a sync): what
// the others offer can still be had. Error-Mode=any has apt report the case in which it keeps old lists, too.
func (a *apt) update(ctx context.Context) error {
	if _, err := a.run(ctx, a.dir, "apt-get", "-o", "APT::Update::Error-Mode=any", "update"); err != nil {
		return fmt.Errorf("update package lists for %s: %w", a.arch, err)
	}
	return nil
}

// show returns the fields of a package's candidate version.
func (a *apt) show(ctx context.Context, name string) (map[string]string, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		if strings.Contains(err.Error(), "No packages found") || strings.Contains(err.Error(), "Unable to locate package") {
			return nil, fmt.Errorf("package %s for %s: %w", name, a.arch, ErrNotFound)
		}
		return nil, fmt.Errorf("look up package %s: %w", name, err)
	}
	fields := map[string]string{}
	sc := bufio.NewScanner(bytes.NewReader(out))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		if line == "" {
			break
		}
		if k, v, ok := strings.Cut(line, ": "); ok && line[0] != ' ' {
			fields[k] = v
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("look up package %s: %w", name, err)
	}
	if fields["Package"] != name {
		return nil, fmt.Errorf("package %s for %s: %w", name, a.arch, ErrNotFound)
	}
	return fields, nil
}

// download fetches a package into dir, which must hold no other; apt checks it against the signed lists.
func (a *apt) download(ctx context.Context, name, version, dir string) (deb string, err error) {
	if _, err := a.run(ctx, dir, "apt-get", "download", name+"="+version); err != nil {
		return "", fmt.Errorf("download %s: %w", name, err)
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("download %s: %d packages came", name, len(found))
	}
	return found[0], nil
}

// place says where a file of a kernel package goes; "" leaves it out. Newer packages have /usr/lib/modules.
func place(name, release string) string {
	name = path.Clean("/" + name)[1:]
	if rest, ok := strings.CutPrefix(name, "usr/lib/linux-image-"+release+"/"); ok {
		return "dtbs/" + rest
	}
	name = strings.TrimPrefix(name, "usr/")
	if strings.HasPrefix(name, "boot/") || strings.HasPrefix(name, "lib/modules/"+release+"/") {
		return name
	}
	return ""
}

// unpack extracts the kernel, its modules and its device trees from a package.
func unpack(ctx context.Context, deb, release, into string) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = untar(pipe, release, into)
	if err != nil {
		pipe.Close()
	}
	if werr := cmd.Wait(); err == nil && werr != nil {
		err = fmt.Errorf("dpkg-deb: %w: %s", werr, tail(complaint.String(), 600))
	}
	return err
}

func untar(r io.Reader, release, into string) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			// Read to the end, so that the writer does not die of a closed pipe.
			_, err := io.Copy(io.Discard, r)
			return err
		}
		if err != nil {
			return err
		}
		to := place(h.Name, release)
		if h.Typeflag != tar.TypeReg || to == "" { // links (build, source) lead out of the package
			continue
		}
		to = filepath.Join(into, filepath.FromSlash(to))
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, tr)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
	}
}
