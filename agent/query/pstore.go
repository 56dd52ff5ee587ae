package query

import (
	"context"
	"errors"
	"io"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Pstore is the answer to "what have earlier kernels left of their logs?".
type Pstore struct {
	Extent
	kernel.Pstore
	// Supported says that the kernel has pstore, and that it could be read.
	Supported bool `json:"supported"`
}

// AskPstore reads what earlier kernels left of their logs.
func AskPstore(ctx context.Context, v *kernel.View, _ []string) (Pstore, error) {
	p := Pstore{Extent: now(ctx)}
	var err error
	p.Pstore, err = v.Pstore()
	if p.Supported = err == nil; errors.Is(err, kernel.ErrNotSupported) {
		err = nil
	}
	return p, err
}

// Previous keeps the records of earlier boots, and of these the lines of at most maxLevel, if it is not nil. A line without a level is of
// the one before.
func (a *Pstore) Previous(maxLevel *uint8) {
	kept := []kernel.PstoreRecord{}
	for _, r := range a.Records {
		if r.ThisBoot {
			continue
		}
		if maxLevel != nil {
			var b strings.Builder
			keep := true
			for line := range strings.Lines(r.Text) {
				if level, ok := lineLevel(line); ok {
					keep = level <= *maxLevel
				}
				if keep {
					b.WriteString(line)
				}
			}
			r.Text = b.String()
		}
		kept = append(kept, r)
	}
	a.Records = kept
}

// lineLevel returns the level of a line as the kernel puts it before: <14>[    1.234567] text.
func lineLevel(line string) (uint8, bool) {
	n := 0
	for i, c := range strings.TrimPrefix(line, "<") {
		switch {
		case c >= '0' && c <= '9' && i < 4:
			n = 10*n + int(c-'0')
		case c == '>' && i > 0 && line[0] == '<':
			return uint8(n & 7), true
		default:
			return 0, false
		}
	}
	return 0, false
}

// Text prints the records, each under its name.
func (a Pstore) Text(w io.Writer) error {
	p := &printer{w: w}
	if len(a.Records) == 0 {
		switch {
		case !a.Supported:
			p.printf("no record: the kernel is built without pstore\n")
		case a.Mounted:
			p.printf("no record: the files of /sys/fs/pstore are none, or were removed (systemd moves them to /var/lib/systemd/pstore)\n")
		case a.Backend != "" && a.Backend != "ramoops":
			p.printf("no record in memory: %s keeps them elsewhere, and /sys/fs/pstore is not mounted\n", Clean(a.Backend))
		default:
			p.printf("no record: the kernel knows of no memory that outlives it (see ramoops)\n")
		}
	}
	for i, r := range a.Records {
		if i > 0 {
			p.printf("\n")
		}
		p.printf("== %s", Clean(r.Name))
		if r.Reason != "" {
			p.printf(", %s", Clean(r.Reason))
		}
		if r.Part != 0 {
			p.printf(", part %d", r.Part)
		}
		if !r.Time.IsZero() {
			p.printf(", written %s", r.Time.Format("2006-01-02 15:04:05Z"))
		}
		if r.ThisBoot {
			p.printf(", by this boot")
		}
		p.printf("\n")
		if r.Problem != "" {
			p.printf("(%s)\n", Clean(r.Problem))
		}
		for line := range strings.Lines(r.Text) {
			p.printf("%s\n", Clean(strings.TrimSuffix(line, "\n")))
		}
	}
	p.extent(a.Extent)
	return p.err
}
