package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"strconv"

	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/query"
)

var incidentsVerb = verb{
	name:  "incidents",
	args:  "[NUMBER]",
	short: "faults of the host from the finding to the end; NUMBER tells one as a timeline",
	long: `Incidents are made of the agent's journal: what was found, what was planned and by whom, each store, how it ended. With a
number the story of one is told; without, the list ends with which action has helped how often against what; with -explain also its evidence and the bytes before and after each store.

  backdoor incidents
  backdoor incidents 412 -explain
  backdoor incidents -file /mnt/journal`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.explain, "explain", false, "with the evidence, and the bytes before and after each store")
		fs.StringVar(&o.file, "file", "", "journal `file` to read instead of asking an agent")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) > 1 {
			return 0, &usageError{verb: "incidents", msg: "incidents takes one number at most"}
		}
		records, err := e.records(ctx)
		if err != nil {
			return 0, err
		}
		all := query.Incidents(records)
		if len(args) == 0 {
			return exitOK, e.answer(all, func(w io.Writer) error { return query.WriteIncidents(w, all) })
		}
		n, err := strconv.ParseUint(args[0], 10, 64)
		if err != nil {
			return 0, &usageError{verb: "incidents", msg: fmt.Sprintf("%q is no number of an incident", args[0])}
		}
		for _, i := range all {
			if i.Number == n {
				return exitOK, e.answer(i, func(w io.Writer) error { return query.WriteIncident(w, i, e.o.explain) })
			}
		}
		return 0, fmt.Errorf("there is no incident %d; \"backdoor incidents\" lists them", n)
	},
}

// records reads the whole journal, the agent's or a file.
func (e *env) records(ctx context.Context) ([]journal.Record, error) {
	if e.o.file != "" {
		return fileRecords(e.o.file)
	}
	a, err := e.openAgent(ctx)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	return a.Journal(ctx, 0)
}
