package main

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// symbols finds names in /proc/kallsyms. It rests between two pieces: on a slow machine the kernel takes seconds to write all of it, and who
// eats a CPU for seconds is killed by the agent that watches.
func symbols(names []string) (control.Symbols, error) {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	found := make(control.Symbols)
	lines := bufio.NewScanner(f)
	for n := 0; len(found) < len(names) && lines.Scan(); n++ {
		if n%1000 == 999 {
			time.Sleep(5 * time.Millisecond)
		}
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
