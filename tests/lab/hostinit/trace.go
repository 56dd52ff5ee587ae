package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

const (
	tracefs = "/sys/kernel/tracing"
	group   = "lab" // of the events that the tracer makes
)

// tracer counts kernel functions with kprobes at their entry and exit. Debian's kernels lack CONFIG_FUNCTION_PROFILER,
// and the function_graph tracer hooks the scheduler: changing code that runs all the time now and then kills a kernel
// on QEMU's TCG with two CPUs ("int3" oops in __schedule). A kprobe changes only the function that is asked for.
type tracer struct {
	mu    sync.Mutex
	names []string        // guarded by mu; nil while nothing is traced
	known map[string]bool // guarded by mu
}

// set writes a file of tracefs; with add it keeps what is there.
func set(file, value string, add bool) error {
	how := os.O_TRUNC
	if add {
		how = os.O_APPEND
	}
	f, err := os.OpenFile(filepath.Join(tracefs, file), os.O_WRONLY|how, 0)
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
		// record-cmd would hook the scheduler.
		{"options/record-cmd", "0"}, {"options/record-tgid", "0"}, {"trace", ""}, {"buffer_size_kb", "1024"},
	} {
		if err := set(s[0], s[1], false); err != nil {
			return fmt.Errorf("trace: set %s: %w", s[0], err)
		}
	}
	known := make(map[string]bool)
	for i, n := range names {
		// The kernel refuses a name that it does not know or must not probe.
		known[n] = set("kprobe_events", fmt.Sprintf("p:%s/e%d %s", group, i, n), true) == nil &&
			set("kprobe_events", fmt.Sprintf("r:%s/x%d %s", group, i, n), true) == nil
	}
	if !slices.ContainsFunc(names, func(n string) bool { return known[n] }) {
		return errors.Join(fmt.Errorf("trace: the kernel can trace none of %q", names), clearProbes(len(names)))
	}
	if err := set("events/"+group+"/enable", "1", false); err != nil {
		return errors.Join(fmt.Errorf("trace: %w", err), clearProbes(len(names)))
	}
	t.names, t.known = slices.Clone(names), known
	return nil
}

// clearProbes removes our probes, as far as they are there.
func clearProbes(n int) error {
	have, err := os.ReadFile(filepath.Join(tracefs, "kprobe_events"))
	if err != nil {
		return err
	}
	var errs []error
	for i := range n {
		for _, kind := range []string{"e", "x"} {
			name := fmt.Sprintf("%s/%s%d", group, kind, i)
			if strings.Contains(string(have), ":"+name+" ") {
				errs = append(errs, set("kprobe_events", "-:"+name, true))
			}
		}
	}
	return errors.Join(errs...)
}

func (t *tracer) stop() ([]control.FunctionCost, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.names == nil {
		return nil, errors.New("trace: no trace runs")
	}
	if err := set("events/"+group+"/enable", "0", false); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	f, err := os.Open(filepath.Join(tracefs, "trace"))
	if err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	defer f.Close()
	hits, total, err := count(f, len(t.names))
	if err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	var list []control.FunctionCost
	for i, n := range t.names {
		list = append(list, control.FunctionCost{Name: n, Hits: hits[i], Total: total[i], Known: t.known[n]})
	}
	err = clearProbes(len(t.names))
	t.names = nil
	return list, err
}

// traced matches a line of the trace (Documentation/trace/ftrace.rst and kprobetrace.rst, Linux 6.1):
//
//	<...>-127     [001] .....    12.345678: e0: (do_exit+0x0/0xb00)
//
// The submatches are the PID, the time in seconds and microseconds, e for entry or x for exit, and the number.
var traced = regexp.MustCompile(`-(\d+)\s+\[\d+\]\s+\S+\s+(\d+)\.(\d{6}): ([ex])(\d+): `)

// count adds up the runs of n functions: how often each was entered, and the time from entry to exit. An interrupt has
// the PID of the task that it interrupts, so that entries and exits nest for each PID.
func count(r io.Reader, n int) (hits []int, total []time.Duration, err error) {
	hits, total = make([]int, n), make([]time.Duration, n)
	type key struct {
		pid string
		fn  int
	}
	open := make(map[key][]time.Duration)
	in := bufio.NewScanner(r)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		m := traced.FindStringSubmatch(in.Text())
		if m == nil {
			continue
		}
		sec, err1 := strconv.ParseInt(m[2], 10, 32)
		us, err2 := strconv.ParseInt(m[3], 10, 32)
		fn, err3 := strconv.Atoi(m[5])
		if errors.Join(err1, err2, err3) != nil || fn >= n {
			continue
		}
		at := time.Duration(sec)*time.Second + time.Duration(us)*time.Microsecond
		k := key{m[1], fn}
		if m[4] == "e" {
			hits[fn]++
			open[k] = append(open[k], at)
		} else if s := open[k]; len(s) > 0 {
			total[fn] += at - s[len(s)-1]
			open[k] = s[:len(s)-1]
		}
	}
	return hits, total, in.Err()
}
