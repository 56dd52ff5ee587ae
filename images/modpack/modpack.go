// Package modpack picks kernel modules, with everything they depend on, out of a kernel package.
//
// It does what depmod and an initramfs generator do together, without running either: the dependencies, soft
// dependencies and device aliases come from each module's .modinfo section, so that a package that was only unpacked (as
// Debian's, which have no modules.dep) is enough, on any machine, for any architecture. What is compressed (.ko.xz,
// .ko.gz, .ko.zst) is unpacked: an initramfs is compressed as a whole.
//
// Sources: depmod(8) and modules.dep(5) of kmod 30; include/linux/module.h and scripts/mod/modpost.c of Linux 6.1 for
// the .modinfo tags.
package modpack

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// ErrNotFound says that a kernel has no module of that name, neither as a file nor built in.
var ErrNotFound = errors.New("module not found")

// maxModule bounds a module's unpacked size; the largest in Debian's kernels (amdgpu) has some 20 MB.
const maxModule = 128 << 20

// A Module is a kernel module and what its .modinfo says about it.
type Module struct {
	Name    string   // with underscores, as in /proc/modules
	Path    string   // below lib/modules/RELEASE, without a compression's suffix: kernel/fs/ext4/ext4.ko
	Data    []byte   // the ELF file, unpacked
	Aliases []string // globs over device identities, or other names
	Needs   []string // names of the modules that must be loaded before, soft ones included; none is built in

	depends  []string
	softPre  []string
	softPost []string
}

// A Pack is a set of modules that is complete: all that a member needs is a member or built in.
type Pack struct {
	Release string
	Modules []Module // by path
	builtin []byte   // modules.builtin, verbatim
}

// Make collects the named modules of the kernel in dir (lib/modules/RELEASE) and their closure. Dashes and underscores
// in names are the same. A module that is built in is left out; one that does not exist at all is an error.
func Make(dir string, names []string) (*Pack, error) {
	k, err := index(dir)
	if err != nil {
		return nil, fmt.Errorf("pack modules: %w", err)
	}
	have := map[string]*Module{}
	var todo []string
	want := func(name string) error {
		name = canonical(name)
		if have[name] != nil || k.builtin[name] || slices.Contains(todo, name) {
			return nil
		}
		if k.files[name] == "" {
			return fmt.Errorf("%s: %w in %s", name, ErrNotFound, k.release)
		}
		todo = append(todo, name)
		return nil
	}
	var errs []error
	for _, n := range names {
		errs = append(errs, want(n))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("pack modules: %w", err)
	}
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		m, err := load(dir, name, k.files[name])
		if err != nil {
			return nil, fmt.Errorf("pack modules: %w", err)
		}
		have[name] = &m
		for _, d := range m.depends {
			if err := want(d); err != nil {
				return nil, fmt.Errorf("pack modules: %s needs %w", name, err)
			}
		}
		for _, d := range slices.Concat(m.softPre, m.softPost) {
			// A soft dependency may name an alias, or nothing that this kernel has.
			if err := want(d); err != nil && !errors.Is(err, ErrNotFound) {
				return nil, err
			}
		}
	}
	p := &Pack{Release: k.release, builtin: k.builtinList}
	for _, m := range have {
		for _, d := range m.depends {
			if have[d] != nil {
				m.Needs = append(m.Needs, d)
			}
		}
	}
	for _, name := range sorted(have) {
		m := have[name]
		for _, d := range m.softPre {
			for _, target := range resolve(have, d) {
				if target != name && !slices.Contains(m.Needs, target) && !reaches(have, target, name) {
					m.Needs = append(m.Needs, target)
				}
			}
		}
		slices.Sort(m.Needs)
	}
	for _, name := range sorted(have) {
		if reaches(have, name, name) {
			return nil, fmt.Errorf("pack modules: %s depends on itself", name)
		}
		p.Modules = append(p.Modules, *have[name])
	}
	slices.SortFunc(p.Modules, func(a, b Module) int { return strings.Compare(a.Path, b.Path) })
	return p, nil
}

// resolve returns the members that a soft dependency's name means: the module itself, or those with it as an alias.
func resolve(have map[string]*Module, name string) []string {
	if have[name] != nil {
		return []string{name}
	}
	var targets []string
	for _, n := range sorted(have) {
		if slices.ContainsFunc(have[n].Aliases, func(a string) bool { return canonical(a) == name }) {
			targets = append(targets, n)
		}
	}
	return targets
}

// reaches reports whether to is among what from needs, directly or not.
func reaches(have map[string]*Module, from, to string) bool {
	seen := map[string]bool{}
	todo := []string{from}
	for len(todo) > 0 {
		m := have[todo[0]]
		todo = todo[1:]
		if m == nil {
			continue
		}
		for _, n := range m.Needs {
			if n == to {
				return true
			}
			if !seen[n] {
				seen[n] = true
				todo = append(todo, n)
			}
		}
	}
	return false
}

// A File is a file below lib/modules/RELEASE.
type File struct {
	Name string
	Data []byte
}

// Files returns the modules and the lists that go with them, in an order that depends on nothing but the content:
// modules.dep (modules.dep(5)), modules.alias and modules.builtin.
func (p *Pack) Files() []File {
	byName := map[string]string{}
	for _, m := range p.Modules {
		byName[m.Name] = m.Path
	}
	var deps, aliases bytes.Buffer
	var all []File
	for _, m := range p.Modules {
		all = append(all, File{m.Path, m.Data})
		deps.WriteString(m.Path + ":")
		for _, n := range m.Needs {
			deps.WriteString(" " + byName[n])
		}
		deps.WriteByte('\n')
		for _, a := range m.Aliases {
			if !strings.ContainsAny(a, " \t\n") {
				fmt.Fprintf(&aliases, "alias %s %s\n", a, m.Name)
			}
		}
	}
	all = append(all, File{"modules.alias", aliases.Bytes()}, File{"modules.builtin", p.builtin}, File{"modules.dep", deps.Bytes()})
	slices.SortFunc(all, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// LoadOrder returns the modules so that each comes after all that it needs: what a program without kmod loads in turn.
func (p *Pack) LoadOrder() []Module {
	byName := map[string]Module{}
	for _, m := range p.Modules {
		byName[m.Name] = m
	}
	var order []Module
	done := map[string]bool{}
	var visit func(Module)
	visit = func(m Module) { // Make has refused cycles
		if done[m.Name] {
			return
		}
		done[m.Name] = true
		for _, n := range m.Needs {
			visit(byName[n])
		}
		order = append(order, m)
	}
	for _, m := range p.Modules {
		visit(m)
	}
	return order
}

// Names returns the members' names, sorted.
func (p *Pack) Names() []string {
	var all []string
	for _, m := range p.Modules {
		all = append(all, m.Name)
	}
	slices.Sort(all)
	return all
}

// A kernel is what a modules directory has.
type kernel struct {
	release     string
	files       map[string]string // name to path, with a compression's suffix
	builtin     map[string]bool
	builtinList []byte
}

func index(dir string) (kernel, error) {
	k := kernel{release: filepath.Base(filepath.Clean(dir)), files: map[string]string{}, builtin: map[string]bool{}}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, ok := moduleName(p); ok && d.Type().IsRegular() {
			rel, err := filepath.Rel(dir, p)
			if err != nil {
				return err
			}
			k.files[name] = filepath.ToSlash(rel)
		}
		return nil
	})
	if err != nil {
		return kernel{}, err
	}
	k.builtinList, err = os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return kernel{}, err
	}
	for sc := bufio.NewScanner(bytes.NewReader(k.builtinList)); sc.Scan(); {
		if name, ok := moduleName(strings.TrimSpace(sc.Text())); ok {
			k.builtin[name] = true
		}
	}
	return k, nil
}

func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// moduleName returns the name of the module in a file: ext4 for …/ext4.ko.xz.
func moduleName(file string) (string, bool) {
	base, _ := splitCompression(path.Base(filepath.ToSlash(file)))
	name, ok := strings.CutSuffix(base, ".ko")
	return canonical(name), ok
}

func splitCompression(name string) (base, compression string) {
	for _, c := range []string{".xz", ".gz", ".zst"} {
		if b, ok := strings.CutSuffix(name, c); ok {
			return b, c
		}
	}
	return name, ""
}

func load(dir, name, file string) (Module, error) {
	raw, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(file)))
	if err != nil {
		return Module{}, err
	}
	base, compression := splitCompression(file)
	data, err := decompress(raw, compression)
	if err != nil {
		return Module{}, fmt.Errorf("module %s: %w", file, err)
	}
	m, err := Parse(data)
	if err != nil {
		return Module{}, fmt.Errorf("module %s: %w", file, err)
	}
	m.Name, m.Path = name, base
	return m, nil
}

func decompress(raw []byte, compression string) ([]byte, error) {
	var r io.Reader
	var err error
	switch compression {
	case "":
		return raw, nil
	case ".xz":
		r, err = xz.NewReader(bytes.NewReader(raw))
	case ".gz":
		r, err = gzip.NewReader(bytes.NewReader(raw))
	case ".zst":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(raw), zstd.WithDecoderConcurrency(1)); err == nil {
			defer z.Close()
			r = z
		}
	}
	if err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("unpack: more than %d bytes", maxModule)
	}
	return data, nil
}

// Parse reads what an unpacked module's .modinfo section says. Name, Path and Needs stay empty: they follow from the
// kernel that the module belongs to.
func Parse(data []byte) (Module, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return Module{}, fmt.Errorf("not a module: %w", err)
	}
	s := f.Section(".modinfo")
	if s == nil || s.Type == elf.SHT_NOBITS {
		return Module{}, errors.New("not a module: it has no .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return Module{}, fmt.Errorf("read .modinfo: %w", err)
	}
	m := Module{Data: data}
	parseModinfo(&m, info)
	return m, nil
}

// parseModinfo reads NUL-terminated tag=value strings.
func parseModinfo(m *Module, info []byte) {
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		tag, value, ok := strings.Cut(string(entry), "=")
		if !ok {
			continue
		}
		switch tag {
		case "depends":
			for _, d := range strings.Split(value, ",") {
				if d != "" {
					m.depends = append(m.depends, canonical(d))
				}
			}
		case "alias":
			m.Aliases = append(m.Aliases, value)
		case "softdep": // pre: a b post: c
			into := &m.softPost
			for _, w := range strings.Fields(value) {
				switch w {
				case "pre:":
					into = &m.softPre
				case "post:":
					into = &m.softPost
				default:
					*into = append(*into, canonical(w))
				}
			}
		}
	}
}

func sorted[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
