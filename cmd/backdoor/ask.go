package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
)

var statusVerb = verb{
	name:  "status",
	short: "how the host and its agent stand",
	long: `The health is one of three: yes, no, or could not tell, which is never taken for yes.
With -mem two samples a second apart are compared; a dump (-image) is a single sample and can only show that a host is ill.

Exit status: 0 healthy, 3 ill, 4 could not tell.

  backdoor status
  backdoor status -json | jq .health
  backdoor -image vmcore status`,
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if err := none("status", args); err != nil {
			return 0, err
		}
		s, err := e.open(ctx)
		if err != nil {
			return 0, err
		}
		defer s.Close()
		st, err := s.Status(ctx)
		if err != nil {
			return 0, err
		}
		code := map[query.Health]int{query.Healthy: exitOK, query.Unhealthy: exitIll}
		c, ok := code[st.Health]
		if !ok {
			c = exitUnsure
		}
		return c, e.answer(st, st.Text)
	},
}

var attachVerb = verb{
	name:  "attach",
	short: "how the host's kernel was found and proven",
	long: `Each line is a rung of the ladder from bytes to a kernel: what was tried, whether it was proven, how long it took, and by
what. The last rung says which of several kernels in memory is the live one; NO there means that none moves. With -image or
-mem the attach is done now, and where it fails it is told how far it came.

Exit status: 0 attached, 4 not.

  backdoor attach
  backdoor -image vmcore attach
  backdoor attach -json | jq '.rungs[] | select(.ok | not)'`,
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if err := none("attach", args); err != nil {
			return 0, err
		}
		s, err := e.open(ctx)
		var failed *kernel.AttachError
		if errors.As(err, &failed) {
			a := query.AttachOf(nil, err)
			return exitUnsure, e.answer(a, a.Text)
		}
		if err != nil {
			return 0, err
		}
		defer s.Close()
		if m, ok := s.(*memory); ok {
			info := m.img.Info()
			a := query.AttachOf(&info, nil)
			return exitOK, e.answer(a, a.Text)
		}
		st, err := s.Status(ctx)
		if err != nil {
			return 0, err
		}
		a := query.AttachOf(st.Kernel, nil)
		if st.Kernel == nil {
			a.Phase, a.Error = st.Phase, st.Why
			return exitUnsure, e.answer(a, a.Text)
		}
		return exitOK, e.answer(a, a.Text)
	},
}

var findingsVerb = verb{
	name:  "findings",
	args:  "[ID]",
	short: "what is wrong with the host",
	long: `Without -all only open findings are listed. With an ID everything about that one is told.

Exit status: 0 none is open, 3 some are.

  backdoor findings
  backdoor findings runaway-process-1`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.all, "all", false, "list everything, also what is over or hidden")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) > 1 {
			return 0, &usageError{verb: "findings", msg: "findings takes one ID at most"}
		}
		a, err := e.openOperator(ctx)
		if err != nil {
			return 0, err
		}
		defer a.Close()
		if len(args) == 1 {
			f, err := a.Finding(ctx, args[0])
			if err != nil {
				return 0, err
			}
			code := exitIll
			if f.Resolved != nil {
				code = exitOK
			}
			return code, e.answer(f, func(w io.Writer) error { return query.FindingText(w, f) })
		}
		fs, err := a.Findings(ctx)
		if err != nil {
			return 0, err
		}
		code := exitOK
		if len(fs.Open()) > 0 {
			code = exitIll
		}
		if !e.o.all {
			fs = fs.Open()
		}
		return code, e.answer(fs, fs.Text)
	},
}

var psVerb = verb{
	name:  "ps",
	short: "the host's processes",
	long: `TIME is what the scheduler charged to the living threads, START is since the host's boot, UID is the effective user.

  backdoor ps
  backdoor ps -threads
  backdoor -image vmcore ps -json | jq '.processes[] | select(.state == "D")'`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.threads, "threads", false, "one line per thread")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if err := none("ps", args); err != nil {
			return 0, err
		}
		s, err := e.open(ctx)
		if err != nil {
			return 0, err
		}
		defer s.Close()
		p, err := s.PS(ctx, query.PSOptions{Threads: e.o.threads})
		if err != nil {
			return 0, err
		}
		return complete(p.Complete), e.answer(p, p.Text)
	},
}

var topVerb = verb{
	name:  "top",
	short: "the host's busiest processes",
	long: `Two samples are compared, -interval apart; %CPU is of one CPU. A dump (-image), or -interval 0, gives one sample, and the
average over the life of each process.

  backdoor top -n 5
  backdoor -mem /dev/shm/vm.ram top -interval 2s`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.IntVar(&o.rows, "n", 20, "`number` of processes; 0 for all")
		fs.DurationVar(&o.interval, "interval", time.Second, "`time` between the samples; of -w, between the looks")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if err := none("top", args); err != nil {
			return 0, err
		}
		s, err := e.open(ctx)
		if err != nil {
			return 0, err
		}
		defer s.Close()
		l, err := s.Top(ctx, e.o.interval)
		if err != nil {
			return 0, err
		}
		if n := e.o.rows; e.o.json && n > 0 && n < len(l.Processes) {
			l.Processes = l.Processes[:n]
		}
		return complete(l.Complete), e.answer(l, func(w io.Writer) error { return l.Text(w, e.o.rows) })
	},
}

var dmesgVerb = verb{
	name:  "dmesg",
	short: "the host's kernel log",
	long: `-level takes emerg, alert, crit, err, warn, notice, info or debug and shows that and worse. With -w -json each record is a
line of JSON. -previous shows what earlier boots left in pstore: see backdoor help pstore.

  backdoor dmesg -level err
  backdoor dmesg -w
  backdoor dmesg -previous
  backdoor -image vmcore dmesg`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.follow, "w", false, "wait for new records and show them, too, until interrupted")
		fs.StringVar(&o.level, "level", "", "least severe `level` shown")
		fs.BoolVar(&o.previous, "previous", false, "show the logs that earlier boots left when they died")
		fs.DurationVar(&o.interval, "interval", time.Second, "`time` between the samples; of -w, between the looks")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if err := none("dmesg", args); err != nil {
			return 0, err
		}
		var o query.DmesgOptions
		if e.o.level != "" {
			l, err := level(e.o.level)
			if err != nil {
				return 0, err
			}
			o.MaxLevel = &l
		}
		if e.o.previous && e.o.follow {
			return 0, &usageError{verb: "dmesg", msg: "-previous and -w do not go together: nothing is added to the log of a boot that is over"}
		}
		s, err := e.open(ctx)
		if err != nil {
			return 0, err
		}
		defer s.Close()
		if e.o.previous {
			return e.previousLogs(ctx, s, o.MaxLevel)
		}
		l, err := s.Dmesg(ctx, o)
		if err != nil {
			return 0, err
		}
		if !e.o.follow || !s.Live() {
			return complete(l.Complete), e.answer(l, l.Text)
		}
		return exitOK, e.follow(ctx, s, o, l)
	},
}

func (e *env) previousLogs(ctx context.Context, s source, maxLevel *uint8) (int, error) {
	all := query.Listings()
	a, err := s.List(ctx, all[slices.IndexFunc(all, func(l query.Listing) bool { return l.Name == "pstore" })], nil)
	if err != nil {
		return 0, err
	}
	var p query.Pstore
	switch a := a.(type) {
	case query.Pstore:
		p = a
	case *query.Pstore:
		p = *a
	}
	p.Previous(maxLevel)
	return complete(p.Complete), e.answer(p, p.Text)
}

// follow shows a log and what is added to it, until ctx ends. It goes on through a reboot of the host.
func (e *env) follow(ctx context.Context, s source, o query.DmesgOptions, l query.Log) error {
	every := max(e.o.interval, 100*time.Millisecond)
	waiting := false
	for {
		if err := e.showLog(l); err != nil {
			return err
		}
		o.From = max(o.From, l.Next)
		if sleep(ctx, every) != nil {
			return nil // interrupted, as is usual
		}
		var err error
		l, err = s.Dmesg(ctx, o)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && exitCode(err) == exitUnsure:
			if !waiting {
				fmt.Fprintf(e.stderr, "backdoor: waiting: %v\n", err)
			}
			waiting, l = true, query.Log{Complete: true}
			continue
		case err != nil:
			return err
		}
		waiting = false
		if l.Next >= o.From {
			continue
		}
		fmt.Fprintln(e.stderr, "backdoor: the log begins anew: the host has rebooted")
		o.From = 0
		if l, err = s.Dmesg(ctx, o); err != nil {
			l = query.Log{Complete: true} // the next look tells why
		}
	}
}

// showLog prints records: as text, or as one line of JSON each.
func (e *env) showLog(l query.Log) error {
	if !e.o.json {
		return l.Text(e.stdout)
	}
	for _, r := range l.Records {
		if err := e.jsonLine(r); err != nil {
			return err
		}
	}
	return nil
}

func level(s string) (uint8, error) {
	names := []string{"emerg", "alert", "crit", "err", "warn", "notice", "info", "debug"}
	for i, n := range names {
		if s == n || s == strconv.Itoa(i) {
			return uint8(i), nil
		}
	}
	return 0, &usageError{verb: "dmesg", msg: fmt.Sprintf("-level: %q is none of %s", s, strings.Join(names, ", "))}
}

// none complains about arguments where there are to be none.
func none(verb string, args []string) error {
	if len(args) > 0 {
		return &usageError{verb: verb, msg: fmt.Sprintf("%s takes no argument, but there is %q", verb, args[0])}
	}
	return nil
}

func complete(c bool) int {
	if c {
		return exitOK
	}
	return exitUnsure
}
