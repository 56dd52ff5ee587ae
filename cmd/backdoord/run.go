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
	"time"

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

// limitMemory keeps the garbage collector from letting the heap grow into what a small machine has: the agent is a guest there, and
// 64 MiB resident, its program included, are what it should take while a host of usual size is watched. So it is collected more often than
// Go would by itself. GOGC and GOMEMLIMIT win.
func limitMemory(total uint64) {
	const share, least, most = 4, 48 << 20, 512 << 20
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(30)
	}
	if debug.SetMemoryLimit(-1) < 1<<62 { // set by the environment
		return
	}
	debug.SetMemoryLimit(int64(min(max(total/share, least), most)))
}
