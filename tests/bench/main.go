// Bench measures what the first healing is made of: on the lab's two machines, and on this one.
//
// Synopsis:
//
//	go run ./tests/bench [-json] [-n N] [-kernel 6.1] [-part files|start|upload|update|dpu|images]
//
// Description:
//
// Every figure is printed with how it was measured. Times of faults and of what follows them are by this machine's clock; what the agent says
// of itself is called that. The machines are emulated without KVM, so figures of the DPU are those of a slow machine.
//
//	-json      print JSON instead of a table
//	-n N       how often each fault is made (5)
//	-kernel V  the host's kernel for the faults (6.1); attaching is measured on 6.1 and 6.12
//	-part P    only one part: images, files (native, on a RAM file), start (the DPU's, -n times), upload (-n bundles
//	           into it), update (-n bundles until the new image is good, fallbacks, 1 GiB natively) or dpu
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/backdoor-rhs/backdoor/images/builder"
)

// Figure is one measured value.
type Figure struct {
	Name   string    `json:"name"`
	Unit   string    `json:"unit"` // "ms", "µs", "B", "MiB", "MB/s" or "%"
	Values []float64 `json:"values"`
	Median float64   `json:"median"`
	Max    float64   `json:"max"`
	How    string    `json:"how"`
}

// report gathers figures.
type report struct {
	Figures []Figure `json:"figures"`
	log     io.Writer
}

func (r *report) add(name, unit, how string, values ...float64) {
	if len(values) == 0 {
		return
	}
	s := slices.Sorted(slices.Values(values))
	r.Figures = append(r.Figures, Figure{name, unit, values, (s[(len(s)-1)/2] + s[len(s)/2]) / 2, s[len(s)-1], how})
	fmt.Fprintf(r.log, "%s: median %s, most %s %s (%d)\n", name, number((s[(len(s)-1)/2]+s[len(s)/2])/2), number(s[len(s)-1]), unit, len(s))
}

func ms(ds ...time.Duration) []float64 {
	var out []float64
	for _, d := range ds {
		out = append(out, float64(d.Microseconds())/1000)
	}
	return out
}

func us(ds ...time.Duration) []float64 {
	var out []float64
	for _, d := range ds {
		out = append(out, float64(d.Nanoseconds())/1000)
	}
	return out
}

// options are the command line.
type options struct {
	n      int
	kernel string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// hostKernels are the kernels of hosts that are measured.
var hostKernels = []string{"6.1", "6.12"}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o options
	asJSON := flags.Bool("json", false, "print JSON")
	flags.IntVar(&o.n, "n", 5, "how often each fault is made")
	flags.StringVar(&o.kernel, "kernel", hostKernels[0], "the host's kernel for the faults: "+strings.Join(hostKernels, " or "))
	only := flags.String("part", "", "only this part: images, files, start, upload, update or dpu")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.NArg() > 0 || o.n < 1 {
		fmt.Fprintln(stderr, "bench: it takes no arguments, and -n must be positive; run with -h for the flags")
		return 2
	}
	if !slices.Contains(hostKernels, o.kernel) {
		fmt.Fprintf(stderr, "bench: no fault is made on kernel %q; choose %s\n", o.kernel, strings.Join(hostKernels, " or "))
		return 2
	}
	r := &report{log: stderr}
	var errs []error
	parts := []struct {
		name string
		run  func(context.Context, *report, options) error
	}{
		{"images", images},
		{"files", files},
		{"start", start},
		{"upload", upload},
		{"update", update},
		{"dpu", dpu},
	}
	known := *only == ""
	for _, part := range parts {
		known = known || *only == part.name
	}
	if !known {
		fmt.Fprintf(stderr, "bench: there is no part %q; the parts are images, files, start, upload, update and dpu\n", *only)
		return 2
	}
	for _, part := range parts {
		if *only != "" && *only != part.name {
			continue
		}
		if err := part.run(ctx, r, o); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", part.name, err))
		}
	}
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		errs = append(errs, enc.Encode(r))
	} else {
		errs = append(errs, table(stdout, r))
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1
	}
	return 0
}

func table(w io.Writer, r *report) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MEASURED\tN\tMEDIAN\tMAX\tUNIT\tHOW")
	for _, f := range r.Figures {
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\n", f.Name, len(f.Values), number(f.Median), number(f.Max), f.Unit, f.How)
	}
	return t.Flush()
}

// number prints three digits at least, and no more than are sensible.
func number(v float64) string {
	switch {
	case v >= 100 || v == float64(int64(v)):
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// images tells the sizes that the image builder has noted.
func images(_ context.Context, r *report, _ options) error {
	list, err := filepath.Glob(filepath.Join("build", "images", "*.json"))
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return errors.New("no image has been built; build them: make images")
	}
	for _, path := range list {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var m builder.Manifest
		if err := json.Unmarshal(b, &m); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		const how = "manifest of the image"
		r.add(m.Image+": initramfs, compressed", "B", how, float64(m.Initramfs.Size))
		r.add(m.Image+": initramfs unpacked", "B", how, float64(m.Unpacked))
		r.add(m.Image+": agent", "B", how, float64(m.Agent.Size))
	}
	slices.SortStableFunc(r.Figures, func(a, b Figure) int { return cmp.Compare(a.Name, b.Name) })
	return nil
}
