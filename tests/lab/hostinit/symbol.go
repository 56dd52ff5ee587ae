package main

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// symbols finds names in /proc/kallsyms. On a slow machine the kernel takes seconds to write all of it: a program of its own that did this
// would be killed as a runaway by the agent that watches, init is not.
func symbols(names []string) (control.Symbols, error) {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	found := make(control.Symbols)
	lines := bufio.NewScanner(f)
	for len(found) < len(names) && lines.Scan() {
		at, rest, _ := strings.Cut(lines.Text(), " ")
		_, name, _ := strings.Cut(rest, " ")
		if !slices.Contains(names, name) {
			continue
		}
		if found[name], err = strconv.ParseUint(at, 16, 64); err != nil {
			return nil, err
		}
	}
	return found, lines.Err()
}
