package main

import (
	"bytes"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// What the engine prints, recorded with Go 1.26.8.
const (
	clock = `fuzz: elapsed: 3s, execs: 1525 (508/sec), new interesting: 14 (total: 25)
fuzz: elapsed: 4s, execs: 1525 (0/sec), new interesting: 14 (total: 25)
--- FAIL: FuzzLoad (4.02s)
    context deadline exceeded
FAIL
`
	input = `fuzz: elapsed: 0s, gathering baseline coverage: 0/1 completed
--- FAIL: FuzzLoad (0.03s)
    --- FAIL: FuzzLoad (0.00s)
        load_test.go:20: context deadline exceeded
    
    Failing input written to testdata/fuzz/FuzzLoad/771e938e4458e983
    To re-run:
    go test -run=FuzzLoad/771e938e4458e983
FAIL
`
	hang = `fuzz: elapsed: 3s, execs: 25 (8/sec), new interesting: 0 (total: 1)
--- FAIL: FuzzLoad (3.10s)
    fuzzing process hung or terminated unexpectedly: exit status 2
FAIL
`
)

func TestClockOnly(t *testing.T) {
	for _, c := range []struct {
		name, out, target string
		want              bool
	}{
		{"time was up", clock, "FuzzLoad", true},
		{"of another target", clock, "FuzzLoa", false},
		{"an input fails", input, "FuzzLoad", false},
		{"a hang", hang, "FuzzLoad", false},
		{"cut off by a panic", strings.Replace(clock, "--- FAIL", "panic: x\n--- FAIL", 1), "FuzzLoad", false},
		{"more is said", strings.Replace(clock, "exceeded\n", "exceeded\n    and more\n", 1), "FuzzLoad", false},
		{"the input was being made smaller", "fuzz: minimizing 33-byte failing input file\n" + clock, "FuzzLoad", false},
		{"nothing", "", "FuzzLoad", false},
	} {
		if got := clockOnly(c.out, c.target); got != c.want {
			t.Errorf("%s: clockOnly = %v, want %v", c.name, got, c.want)
		}
	}
}

// TestTargets: the targets that are read from the sources are those of the test binary.
func TestTargets(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "github.com/backdoor-rhs/backdoor/agent/access").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(strings.TrimSpace(string(out)))
	pkgs, err := packages()
	if err != nil || len(pkgs) != 1 {
		t.Fatalf("packages = %v, %v; want agent/access alone", pkgs, err)
	}
	got, err := pkgs[0].targets()
	if err != nil {
		t.Fatal(err)
	}
	out, err = exec.Command("go", "test", "-list", "^Fuzz", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for l := range strings.Lines(string(out)) {
		if strings.HasPrefix(l, "Fuzz") {
			want = append(want, strings.TrimSpace(l))
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("targets = %v, want %v", got, want)
	}
}

func TestBadFlags(t *testing.T) {
	for _, c := range []struct {
		d     time.Duration
		match string
		want  string
	}{
		{0, "", "-time 0s"},
		{time.Second, "(", "-run"},
	} {
		if err := run(c.d, c.match, new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("run(%v, %q) = %v, want an error that names %q", c.d, c.match, err, c.want)
		}
	}
}
