package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

const tracefs = "/sys/kernel/tracing"

// tracer counts kernel functions with the function_graph tracer. Debian's kernels lack CONFIG_FUNCTION_PROFILER, so the
// runs are counted from the trace itself.
type tracer struct {
	mu    sync.Mutex
	names []string        // guarded by mu; nil while nothing is traced
	known map[string]bool // guarded by mu
}

func set(file, value string) error {
	f, err := os.OpenFile(filepath.Join(tracefs, file), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func (t *tracer) start(names []string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.names != nil {
		return errors.New("trace: a trace runs already")
	}
	for _, s := range [][2]string{
		{"tracing_on", "0"}, {"current_tracer", "nop"}, {"set_ftrace_filter", ""}, {"trace", ""}, {"buffer_size_kb", "4096"},
	} {
		if err := set(s[0], s[1]); err != nil {
			return fmt.Errorf("trace: set %s: %w", s[0], err)
		}
	}
	known := make(map[string]bool)
	for _, n := range names {
		f, err := os.OpenFile(filepath.Join(tracefs, "set_ftrace_filter"), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return fmt.Errorf("trace: %w", err)
		}
		_, err = f.WriteString(n)
		// The kernel looks the name up at the write or at the close and says EINVAL if it cannot trace it.
		known[n] = errors.Join(err, f.Close()) == nil
	}
	if !slices.ContainsFunc(names, func(n string) bool { return known[n] }) {
		return fmt.Errorf("trace: the kernel can trace none of %s", strings.Join(names, ", "))
	}
	for _, s := range [][2]string{
		{"current_tracer", "function_graph"}, {"options/funcgraph-tail", "1"}, {"options/funcgraph-irqs", "1"}, {"tracing_on", "1"},
	} {
		if err := set(s[0], s[1]); err != nil {
			return fmt.Errorf("trace: set %s: %w", s[0], err)
		}
	}
	t.names, t.known = slices.Clone(names), known
	return nil
}

func (t *tracer) stop() ([]control.FunctionCost, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.names == nil {
		return nil, errors.New("trace: no trace runs")
	}
	if err := set("tracing_on", "0"); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	f, err := os.Open(filepath.Join(tracefs, "trace"))
	if err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	defer f.Close()
	hits, total, err := count(f)
	if err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	var list []control.FunctionCost
	for _, n := range t.names {
		list = append(list, control.FunctionCost{Name: n, Hits: hits[n], Total: total[n], Known: t.known[n]})
	}
	t.names = nil
	return list, errors.Join(set("current_tracer", "nop"), set("set_ftrace_filter", ""), set("trace", ""))
}

// count adds up a function_graph trace (Documentation/trace/ftrace.rst of Linux 6.1). A run is one line if nothing that
// is traced ran inside it, else its end names it, thanks to the option funcgraph-tail:
//
//  0. 1.234 us    |  leaf();
//  0. |  outer() {
//  0. + 12.345 us   |  } /* outer */
//
// The marks before the time ($ @ * # ! +) only say that it was long.
func count(r io.Reader) (hits map[string]int, total map[string]time.Duration, err error) {
	hits, total = make(map[string]int), make(map[string]time.Duration)
	in := bufio.NewScanner(r)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		left, right, ok := strings.Cut(in.Text(), "|")
		if !ok {
			continue
		}
		right = strings.TrimSpace(right)
		var name string
		if rest, ok := strings.CutPrefix(right, "} /* "); ok {
			name, _, _ = strings.Cut(rest, " ")
		} else if rest, ok := strings.CutSuffix(right, "();"); ok {
			name = rest
		} else {
			continue
		}
		name, _, _ = strings.Cut(name, " [") // a module's function has its module behind it
		hits[name]++
		f := strings.Fields(left)
		if len(f) < 2 || f[len(f)-1] != "us" {
			continue
		}
		us, err := strconv.ParseFloat(f[len(f)-2], 64)
		if err != nil {
			continue
		}
		total[name] += time.Duration(us * float64(time.Microsecond))
	}
	return hits, total, in.Err()
}
