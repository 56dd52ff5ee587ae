// Command fuzz runs every fuzz target of the module for a while, one after the other; make fuzz is its door.
//
// A package's test binary is linked once for all of its targets. A target has failed when it has failed: the one exception is
// the fuzzing engine's own clock. Up to Go 1.26 the end of -fuzztime can reach a worker before the engine has told it to
// stop, and the target is then reported as failed with a bare "context deadline exceeded" and no input (golang/go#75804).
// That, and nothing else, is said and passed over; a hang, a panic or an input that fails is none of it.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// A pkg is what go list says of a package that has tests.
type pkg struct {
	ImportPath, Dir           string
	TestGoFiles, XTestGoFiles []string
}

func main() {
	forTime := flag.Duration("time", 20*time.Second, "how long each `target` runs")
	match := flag.String("run", "", "only targets whose package.Name matches this `regexp`")
	flag.Parse()
	if err := run(*forTime, *match, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

func run(d time.Duration, match string, w io.Writer) error {
	if d <= 0 {
		return fmt.Errorf("-time %v: must be more than nothing, such as 20s", d)
	}
	re, err := regexp.Compile(match)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	cache, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		return fmt.Errorf("go env GOCACHE: %w", err)
	}
	bin, err := os.MkdirTemp("", "fuzz")
	if err != nil {
		return err
	}
	defer os.RemoveAll(bin)

	pkgs, err := packages()
	if err != nil {
		return err
	}
	var failed []string
	ran := 0
	for _, p := range pkgs {
		all, err := p.targets()
		if err != nil {
			return err
		}
		var names []string
		for _, n := range all {
			if re.MatchString(p.ImportPath + "." + n) {
				names = append(names, n)
			}
		}
		if len(names) == 0 {
			continue
		}
		exe := filepath.Join(bin, "test")
		build := exec.Command("go", "test", "-c", "-fuzz", ".", "-o", exe, p.ImportPath)
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build the tests of %s: %w\n%s", p.ImportPath, err, out)
		}
		for _, n := range names {
			fmt.Fprintln(w, p.ImportPath, n)
			var out bytes.Buffer
			cmd := exec.Command(exe, "-test.run", "^$", "-test.fuzz", "^"+n+"$", "-test.fuzztime", d.String(),
				"-test.fuzzcachedir", filepath.Join(strings.TrimSpace(string(cache)), "fuzz", p.ImportPath))
			cmd.Dir = p.Dir
			cmd.Stdout = io.MultiWriter(w, &out)
			cmd.Stderr = cmd.Stdout
			err := cmd.Run()
			ran++
			switch {
			case err == nil:
			case clockOnly(out.String(), n):
				fmt.Fprintf(w, "%s: no input failed; time was up before the engine had stopped its workers (golang/go#75804)\n", n)
			default:
				failed = append(failed, fmt.Sprintf("%s %s: %v", p.ImportPath, n, err))
			}
		}
	}
	if ran == 0 {
		return errors.New("no fuzz target matches")
	}
	if len(failed) > 0 {
		return fmt.Errorf("%d of %d targets failed:\n\t%s", len(failed), ran, strings.Join(failed, "\n\t"))
	}
	fmt.Fprintf(w, "fuzz: %d targets, %v each: no input failed\n", ran, d)
	return nil
}

// packages returns the packages of the module in the working directory.
func packages() ([]pkg, error) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles", "./...").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var all []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); err == io.EOF {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		all = append(all, p)
	}
}

var target = regexp.MustCompile(`(?m)^func (Fuzz\w*)\(\w+ \*testing\.F\)`)

// targets returns the names of p's fuzz targets.
func (p pkg) targets() ([]string, error) {
	var names []string
	for _, f := range append(p.TestGoFiles, p.XTestGoFiles...) {
		b, err := os.ReadFile(filepath.Join(p.Dir, f))
		if err != nil {
			return nil, err
		}
		for _, m := range target.FindAllSubmatch(b, -1) {
			names = append(names, string(m[1]))
		}
	}
	return names, nil
}

// clockOnly tells whether all that out says against the target is that time was up.
func clockOnly(out, target string) bool {
	_, complaint, ok := strings.Cut(out, "--- FAIL: "+target+" (")
	if !ok || strings.Contains(out, "panic:") || strings.Contains(out, "Failing input") || strings.Contains(out, "minimizing") {
		return false
	}
	_, complaint, ok = strings.Cut(complaint, "\n")
	return ok && strings.TrimSpace(complaint) == "context deadline exceeded\nFAIL"
}
