package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/query"
)

var journalVerb = verb{
	name:  "journal",
	short: "what the agent decided and wrote",
	long: `Every decision and every write to the host is a record, written down before it happens and chained by hashes to the one before.
With -verify the sequence of what the agent hands out is checked for gaps; with -file the journal itself, copied from the agent's
state directory, is read, and -verify then checks every hash of its chain.

  backdoor journal -n 50
  backdoor journal -file /mnt/journal -verify`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.verify, "verify", false, "check the chain")
		fs.StringVar(&o.file, "file", "", "journal `file` to read instead of asking an agent")
		fs.IntVar(&o.rows, "n", 20, "`number` of records, the newest; 0 for all")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if err := none("journal", args); err != nil {
			return 0, err
		}
		if e.o.file != "" {
			return e.journalFile()
		}
		a, err := e.openOperator(ctx)
		if err != nil {
			return 0, err
		}
		defer a.Close()
		records, err := a.Journal(ctx, 0)
		if err != nil {
			return 0, err
		}
		if e.o.verify {
			if err := unbroken(records); err != nil {
				return 0, err
			}
			return exitOK, e.answer(map[string]int{"records": len(records)}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%d records without a gap. Only the file itself can prove that none was changed: -file\n", len(records))
				return err
			})
		}
		return exitOK, e.journalRecords(records)
	},
}

// unbroken finds gaps in the sequence.
func unbroken(records []journal.Record) error {
	for i := 1; i < len(records); i++ {
		if records[i].Seq != records[i-1].Seq+1 {
			return fmt.Errorf("the journal has a gap: record %d is followed by %d", records[i-1].Seq, records[i].Seq)
		}
	}
	return nil
}

// journalFile reads a journal without its agent.
func (e *env) journalFile() (int, error) {
	f, err := os.Open(e.o.file)
	if err != nil {
		return 0, fmt.Errorf("read journal: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("read journal: %w", err)
	}
	if e.o.verify {
		r, err := journal.Verify(f, st.Size())
		if err != nil {
			return 0, fmt.Errorf("verify %s: %w", e.o.file, err)
		}
		return exitOK, e.answer(r, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "Every hash is right: %d records, %d to %d, by %d runs of the agent; %d older ones lost.\nThe newest has the hash %s\n",
				r.Records, r.First, r.Last, r.Restarts, r.Lost, r.Head)
			return err
		})
	}
	records, err := fileRecords(e.o.file)
	if err != nil {
		return 0, err
	}
	return exitOK, e.journalRecords(records)
}

// fileRecords reads all records of a journal's file.
func fileRecords(path string) ([]journal.Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	j, err := journal.Open(readOnly{f}, st.Size())
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	records := []journal.Record{}
	for r, err := range j.Records() {
		if err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		records = append(records, r)
	}
	return records, nil
}

// readOnly is a file as a journal's device that nothing can be written to.
type readOnly struct{ io.ReaderAt }

func (readOnly) WriteAt([]byte, int64) (int, error) { return 0, os.ErrPermission }
func (readOnly) Sync() error                        { return nil }

func (e *env) journalRecords(records []journal.Record) error {
	if n := e.o.rows; n > 0 && n < len(records) {
		records = records[len(records)-n:]
	}
	return e.answer(records, func(w io.Writer) error {
		l := &lines{w: w}
		if len(records) == 0 {
			l.printf("The journal is empty.\n")
		}
		for _, r := range records {
			data := []rune(query.Clean(string(r.Data)))
			if len(data) > 160 {
				data = append(data[:159], '…')
			}
			l.printf("%8s  %s  %-10s %s\n", strconv.FormatUint(r.Seq, 10), r.Time.UTC().Format(time.RFC3339), query.Clean(r.Kind), string(data))
		}
		return l.err
	})
}
