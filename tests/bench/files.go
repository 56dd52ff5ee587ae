package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"github.com/backdoor-rhs/backdoor/tests/native"
)

// wantTasks is the length of the task list that is measured, kernel threads included.
const wantTasks = 200

// files measures on this machine, on the RAM files of running hosts.
func files(ctx context.Context, r *report, o options) error {
	for _, k := range hostKernels {
		if err := file(ctx, r, o, k); err != nil {
			return fmt.Errorf("host with Linux %s: %w", k, err)
		}
	}
	return nil
}

func file(ctx context.Context, r *report, o options, name string) (err error) {
	l, err := lab.Up(ctx, lab.Config{HostKernel: name, NoDPU: true, Log: r.log})
	if err != nil {
		return err
	}
	defer l.Close()
	tasks, err := fill(ctx, l.Host)
	if err != nil {
		return err
	}
	path, size := l.Host.RAM()
	mem, err := hostmem.OpenRAMFile(path, hostmem.Q35Layout(uint64(size)), false)
	if err != nil {
		return err
	}
	defer mem.Close()
	var img *kernel.Image
	var took []time.Duration
	for range o.n {
		began := time.Now()
		if img, err = kernel.Open(ctx, mem, kernel.Options{Logger: slog.New(slog.DiscardHandler)}); err != nil {
			return err
		}
		took = append(took, time.Since(began))
	}
	how := fmt.Sprintf("this machine, RAM file of %d MiB, host running", size>>20)
	r.add("cold attach to "+name+", native", "ms", how, ms(took...)...)

	const times = 200
	var bytes []float64
	took = nil
	for range times {
		v := img.View(ctx)
		began := time.Now()
		if _, err := v.Panic(); err != nil {
			return err
		}
		if _, err := v.Heartbeat(); err != nil {
			continue // torn: it could not be told this time
		}
		took = append(took, time.Since(began))
		bytes = append(bytes, float64(v.Cost().Bytes))
	}
	r.add("heartbeat pass on "+name+", native", "µs", how+"; panic state and heartbeat of 2 CPUs", us(took...)...)
	r.add("heartbeat pass on "+name+", native: read", "B", how, bytes...)
	took, bytes = nil, nil
	for range o.n {
		v := img.View(ctx)
		n := 0
		began := time.Now()
		for _, err := range v.Tasks() {
			if err == nil {
				n++
			}
		}
		if n < wantTasks {
			return fmt.Errorf("the list has %d tasks, not %d", n, wantTasks)
		}
		took = append(took, time.Since(began))
		bytes = append(bytes, float64(v.Cost().Bytes))
	}
	what := fmt.Sprintf("list of %d tasks of %s, native", tasks, name)
	r.add(what, "ms", how, ms(took...)...)
	r.add(what+": read", "B", how, bytes...)
	if name != o.kernel {
		return nil
	}
	return memoryUse(ctx, r, l.Host)
}

// fill starts processes until the host has as many tasks as are wanted, and returns how many it has.
func fill(ctx context.Context, h *lab.Host) (int, error) {
	list, err := h.PS(ctx)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, p := range list {
		n += p.Threads
	}
	for ; n < wantTasks; n++ {
		if _, err := h.Spawn(ctx, control.SpawnArgs{Comm: "sleeper", CPU: -1, Argv: []string{"sleep", "100000"}}); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// memoryUse measures a native agent's memory after a while of work.
func memoryUse(ctx context.Context, r *report, h *lab.Host) error {
	dir, err := os.MkdirTemp("", "backdoor-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	programs, err := native.Build(ctx, ".", dir)
	if err != nil {
		return err
	}
	a, err := native.Start(ctx, native.Options{Program: programs.Backdoord, Dir: dir + "/state", Host: h})
	if err != nil {
		return err
	}
	defer a.Stop()
	const passes = 300
	if _, err := a.WaitState(ctx, "some hundred passes", func(st engine.State) bool { return st.Passes >= passes }); err != nil {
		return err
	}
	pids := a.Workers()
	how := fmt.Sprintf("this machine's /proc/PID/status of the worker (amd64), after %d passes over %d tasks", passes, wantTasks)
	pid := pids[len(pids)-1]
	var parts [3]float64
	for i, field := range []string{"RssAnon", "RssFile", "RssShmem"} {
		if parts[i], err = status(pid, field); err != nil {
			return err
		}
	}
	r.add("agent's RSS", "MiB", how+", without what it has mapped of the host", parts[0]+parts[1])
	r.add("agent's RSS: heap and stacks", "MiB", how, parts[0])
	r.add("host memory mapped and touched by the agent", "MiB", how+"; the host's own pages, attaching included", parts[2])
	return nil
}

// status returns a size of /proc/PID/status in MiB.
func status(pid int, field string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == field+":" {
			kib, err := strconv.ParseFloat(f[1], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no %s in the status of process %d", field, pid)
}
