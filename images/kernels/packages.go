package kernels

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A Package is a Debian package of a certain version.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Packages unpacks packages of an architecture, as a Debian release has them and nothing that they depend on, into a directory of the cache, and
// returns it with their versions. From then on they come out of the cache, without a network.
func (c Cache) Packages(ctx context.Context, arch, suite string, names ...string) (tree string, have []Package, err error) {
	dir, err := c.dir()
	if err != nil {
		return "", nil, err
	}
	sum := sha256.Sum256([]byte(strings.Join(names, " ")))
	into := filepath.Join(dir, fmt.Sprintf("packages-%s-%s-%x", suite, arch, sum[:6]))
	cached := func() error {
		b, err := os.ReadFile(filepath.Join(into, "packages.json"))
		if err != nil {
			return err
		}
		tree = filepath.Join(into, "tree")
		return json.Unmarshal(b, &have)
	}
	if cached() == nil {
		return tree, have, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, fmt.Errorf("make the cache: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return "", nil, err
	}
	defer unlock()
	if cached() == nil { // another process has fetched them while we waited
		return tree, have, nil
	}
	etc := c.etc
	if etc == "" {
		etc = "/etc/apt"
	}
	sources, err := readSources(etc)
	if err != nil {
		return "", nil, err
	}
	a, err := newApt(filepath.Join(dir, "apt", suite+"-"+arch), arch, retarget(sources, suite))
	if err != nil {
		return "", nil, err
	}
	err = a.packages(ctx, names, into)
	if err != nil && ctx.Err() == nil { // the lists may be old, or not there yet
		err = errors.Join(a.update(ctx), a.packages(ctx, names, into))
	}
	if cached() == nil {
		return tree, have, nil
	}
	return "", nil, fmt.Errorf("fetch packages of %s for %s: %w", suite, arch, err)
}

// packages downloads and unpacks packages beside their final place, then renames that there.
func (a *apt) packages(ctx context.Context, names []string, into string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(into), ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.MkdirAll(filepath.Join(tmp, "done", "tree"), 0o755); err != nil {
		return err
	}
	var have []Package
	for _, name := range names {
		fields, err := a.show(ctx, name)
		if err != nil {
			return err
		}
		p := Package{name, fields["Version"]}
		dir := filepath.Join(tmp, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		deb, err := a.download(ctx, name, p.Version, dir)
		if err != nil {
			return err
		}
		if _, err := output(exec.CommandContext(ctx, "dpkg-deb", "-x", deb, filepath.Join(tmp, "done", "tree"))); err != nil {
			return err
		}
		have = append(have, p)
	}
	b, err := json.Marshal(have)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tmp, "done", "packages.json"), b, 0o644); err != nil {
		return err
	}
	return os.Rename(filepath.Join(tmp, "done"), into)
}
