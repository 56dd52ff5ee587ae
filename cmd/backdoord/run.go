package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/boot"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/cmd/internal/version"
)

// flags are the command line.
type flags struct {
	config  string
	check   bool
	version bool
	machine bool // the worker configures the machine, too
	worker  bool // the second process: does the work, says on file descriptor 3 that it lives
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var f flags
	fs := flag.NewFlagSet("backdoord", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&f.config, "config", config.DefaultPath, "configuration `file`")
	fs.BoolVar(&f.check, "check", false, "check the configuration and exit")
	fs.BoolVar(&f.version, "version", false, "print the version and exit")
	fs.BoolVar(&f.machine, "machine", false, "the machine is the agent's own (used by the agent itself)")
	fs.BoolVar(&f.worker, "worker", false, "do the work in this process (used by the agent itself)")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "backdoord: %q: the agent takes no arguments; see backdoord -h\n", fs.Arg(0))
		return 2
	}
	if f.version {
		fmt.Fprintln(stdout, "backdoord", version.String())
		return 0
	}
	level := new(slog.LevelVar)
	if f.worker {
		late := newLateWriter(stderr)
		defer late.Flush(time.Second)
		stderr = late
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	switch {
	case f.check:
		return check(f.config, stdout, stderr)
	case f.worker:
		return work(ctx, f, level, log, stdout)
	}
	return keep(ctx, f.config, log, stdout, stderr)
}

// check reports what is wrong with the configuration and with the files that it names.
func check(path string, stdout, stderr io.Writer) int {
	cfg, err := config.Load(path)
	if err != nil {
		fmt.Fprintf(stderr, "backdoord: %v\n", err)
		return 1
	}
	code := 0
	for _, p := range newParts(cfg, slog.New(slog.DiscardHandler)).problems {
		fmt.Fprintf(stderr, "backdoord: %v\n", p)
		code = 1
	}
	if code == 0 {
		fmt.Fprintf(stdout, "%s: ok\n", path)
	}
	return code
}

// keep brings the machine up, where that is the agent's job, and keeps a worker running until ctx ends.
func keep(ctx context.Context, path string, log *slog.Logger, stdout, stderr io.Writer) int {
	k := &keeper{path: path, log: log, stdout: stdout, stderr: stderr}
	if boot.InImage() {
		m, err := boot.Up(ctx, boot.Options{
			Logger: log,
			Configure: func(string) (boot.Config, error) {
				c, err := config.Load(path)
				if config.Missing(err) {
					return boot.Config{}, nil
				}
				return c.Boot, err
			},
		})
		if err != nil {
			log.Error("bring the machine up", "err", err)
			return 1
		}
		k.machine = m
		m.FeedWhile(k.alive)
		defer func() {
			if err := m.Close(); err != nil {
				log.Warn("close down", "err", err)
			}
		}()
	}
	return k.run(ctx)
}

// The agent is a guest on its machine: 64 MiB resident, some 20 of them its program, are what it should take while a host of usual size is
// watched. So the garbage collector works more often than it would by itself, and what Go holds is kept within a limit that follows what
// is in use: without one, freed memory stays resident for minutes.
const (
	memoryPercent = 30
	memoryLeast   = 32 << 20 // bytes that Go may hold before the limit follows
	memoryRoom    = 10 << 20 // bytes of free and of new objects beside what is in use
)

// limitMemory sets the limit and moves it every second until ctx ends. GOGC and GOMEMLIMIT win. It logs the most that was resident, when that has
// grown.
func limitMemory(ctx context.Context, total uint64, log *slog.Logger) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(memoryPercent)
	}
	fixed := debug.SetMemoryLimit(-1) < 1<<62 // by the environment
	limit := memoryLimit(0, total)
	if !fixed {
		debug.SetMemoryLimit(limit)
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	var peak, logged int64 // KiB
	for tick := time.NewTicker(time.Second); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(live)
		// Setting it stops the world for a moment.
		if now := memoryLimit(live[0].Value.Uint64(), total); !fixed && (now > limit || now < limit-limit/8) {
			limit = now
			debug.SetMemoryLimit(limit)
		}
		var use unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &use); err != nil {
			continue
		}
		most := int64(use.Maxrss)
		if most == peak && most > logged { // it has stood still for a second
			log.Info("memory", "peakKiB", most, "limitMiB", limit>>20)
			logged = most
		}
		peak = most
	}
}

// memoryLimit is how much Go may hold on a machine with that memory when the collector has left live bytes in use: a quarter more, and room, but
// not above a quarter of the machine's memory or 512 MiB.
func memoryLimit(live, total uint64) int64 {
	const share, atLeast, most = 4, 48 << 20, 512 << 20
	top := min(max(total/share, atLeast), most)
	return int64(min(max(live+live/4+memoryRoom, memoryLeast), top))
}
