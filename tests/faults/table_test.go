package faults

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"html/template"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

var readmeFlag = flag.Bool("readme", false, "put what build/faults has of all runs into the README's table")

// The README's table has all rows of the suite: what is not in it is not known to work.
func TestReadme(t *testing.T) {
	const file, begin, end = "../../README.md", "<!-- begin: make faults-table -->\n", "<!-- end: make faults-table -->\n"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no lines %q and %q", file, begin, end)
	}
	if *readmeFlag {
		rs, err := read("../../build/faults")
		if err != nil {
			t.Fatal(err)
		}
		old = matrix(rs)
		if err := os.WriteFile(file, []byte(before+begin+old+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range append(slices.Clone(rows), bootRow) {
		if !strings.Contains(old, "\n| `"+f.name+"`: "+f.about+" |") {
			t.Errorf("%s does not tell of %q (%s): run make faults, and make faults-table", file, f.name, f.about)
		}
	}
}

// What failed, was refused, was done by another rung or was not run is no success in the table, and of two runs the later one counts.
func TestTable(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	good := result{Kernel: "6.12", CPUs: 2, Path: "window", Fault: "irqs-off", Culprit: true, Serving: true, Found: 1100 * time.Millisecond, Rung: "restart-host", Healed: 12 * time.Second, At: at}
	with := func(change func(*result)) result { r := good; change(&r); return r }
	for i, rs := range [][]result{
		{with(func(r *result) { r.Error, r.At = "an error", at.Add(-time.Hour) }), with(func(r *result) { r.Kernel = "6.1"; r.Culprit = false })},
		{good, with(func(r *result) { r.Path = "dma"; r.Rung = "power-cycle" }), with(func(r *result) { r.CPUs = 1; r.Rung, r.Refused = "", "no" }),
			with(func(r *result) { r.Kernel, r.CPUs, r.Serving = "sid", 4, false }), with(func(r *result) { r.Path = "nocas"; r.Log = []string{"BUG"} })},
	} {
		if err := write(filepath.Join(dir, fmt.Sprint(i)), rs, ""); err != nil {
			t.Fatal(err)
		}
	}
	rs, err := read(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := matrix(rs)
	for _, line := range []string{
		"| fault | found as | healed by | 6.1 | 6.12 | 6.12, 1 CPU | 6.12, DMA engine | 6.12, no compare-and-swap | sid, 4 CPUs |\n",
		"| `cpu-stall` | `restart-host` | **failed** | 1.1 / 12 | 1.1 / refused | 1.1 / 12 by `power-cycle` | **failed** | **failed** |\n",
		"| `panic` | `restart-host` |  |  |  |  |  |  |\n",
	} {
		if !strings.Contains(m, line) {
			t.Errorf("the table has no line %q:\n%s", line, m)
		}
	}
	if _, err := read(t.TempDir()); err == nil {
		t.Error("a table of no results is no error")
	}
}

// read takes the results of all runs that left theirs beneath a directory, of the same row in the same surroundings the latest.
func read(dir string) ([]result, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*", "faults.json"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("there are no results in %s: run make faults", dir)
	}
	latest := map[[2]string]result{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var rs []result
		if err := json.Unmarshal(text, &rs); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		for _, r := range rs {
			at := [2]string{r.Fault, r.where()}
			if r.At.After(latest[at].At) {
				latest[at] = r
			}
		}
	}
	var all []result
	for _, r := range latest {
		all = append(all, r)
	}
	if len(all) == 0 {
		return nil, errors.New("the runs have no results")
	}
	slices.SortFunc(all, func(a, b result) int {
		return cmp.Or(cmp.Compare(rank(a.Kernel, "6.1", "6.12", "sid"), rank(b.Kernel, "6.1", "6.12", "sid")), cmp.Compare(a.Kernel, b.Kernel),
			cmp.Compare(rank(a.Path, "window", "dma"), rank(b.Path, "window", "dma")), cmp.Compare(rank(a.CPUs, 2, 1), rank(b.CPUs, 2, 1)), cmp.Compare(a.CPUs, b.CPUs))
	})
	return all, nil
}

// rank is which of these x is; the first is 0, none of them is last.
func rank[T comparable](x T, of ...T) int {
	if i := slices.Index(of, x); i >= 0 {
		return i
	}
	return len(of)
}

// where is what a row of results is measured on, but for the fault: a column of the README's table.
func (r result) where() string {
	s := r.Kernel
	if path, ok := map[string]string{"dma": "DMA engine", "nocas": "no compare-and-swap"}[r.Path]; ok {
		s += ", " + path
	}
	if r.CPUs != 2 {
		s += fmt.Sprintf(", %d CPU", r.CPUs)
		if r.CPUs != 1 {
			s += "s"
		}
	}
	return s
}

// matrix is the README's table: a row for each fault, a column for each surroundings, sorted as read has them.
func matrix(rs []result) string {
	var b strings.Builder
	var columns []string
	cells := map[[2]string]result{}
	first, last := rs[0].At, rs[0].At
	for _, r := range rs {
		if !slices.Contains(columns, r.where()) {
			columns = append(columns, r.where())
		}
		cells[[2]string{r.Fault, r.where()}] = r
		if r.At.Before(first) {
			first = r.At
		}
		if r.At.After(last) {
			last = r.At
		}
	}
	days := first.Format(time.DateOnly)
	if d := last.Format(time.DateOnly); d != days {
		days += " to " + d
	}
	fmt.Fprintf(&b, "Seconds from the start of the fault to the finding / from there to the verified cure, %s:\n\n", days)
	fmt.Fprintf(&b, "| fault | found as | healed by | %s |\n|---|---|---|%s\n", strings.Join(columns, " | "), strings.Repeat("---|", len(columns)))
	for _, f := range append(slices.Clone(rows), bootRow) {
		fmt.Fprintf(&b, "| `%s`: %s | %s | %s |", f.name, f.about, code(f.want...), code(f.heal))
		for _, c := range columns {
			cell := ""
			if r, ok := cells[[2]string{f.name, c}]; ok {
				cell = f.cell(r)
			}
			fmt.Fprintf(&b, " %s |", cell)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// code has names as the README has them.
func code[T ~string](names ...T) string {
	var s []string
	for _, n := range names {
		if n != "" {
			s = append(s, "`"+string(n)+"`")
		}
	}
	return cmp.Or(strings.Join(s, ", "), "–")
}

// cell is what the README's table says of a result.
func (f fault) cell(r result) string {
	seconds := func(d time.Duration) string {
		switch s := d.Seconds(); {
		case s >= 9.95:
			return fmt.Sprintf("%.0f", s)
		case s >= 0.095:
			return fmt.Sprintf("%.1f", s)
		case s < 0.01:
			return "<0.01"
		default:
			return fmt.Sprintf("%.2f", s)
		}
	}
	switch {
	case r.Error != "" || !r.Culprit || !r.Serving || len(r.Log) > 0:
		return "**failed**"
	case f.quiet:
		return "nothing"
	case r.Rung == "" && r.Refused != "":
		return seconds(r.Found) + " / refused"
	case r.Rung == "":
		return seconds(r.Found)
	case r.Rung != f.heal:
		return fmt.Sprintf("%s / %s by `%s`", seconds(r.Found), seconds(r.Healed), r.Rung)
	}
	return seconds(r.Found) + " / " + seconds(r.Healed)
}

// table is what is printed at the end.
func table(rs []result) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "kernel\tCPUs\tpath\tfault\tfound by\tafter\thealed by\tafter\tlog clean\tserving")
	ms := func(d time.Duration) string {
		if d == 0 {
			return "-"
		}
		return d.Round(time.Millisecond).String()
	}
	for _, r := range rs {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%v\t%v\n", r.Kernel, r.CPUs, r.Path, r.Fault, or(r.Detector, "nobody"), ms(r.Found), or(r.Rung, "-"), ms(r.Healed), len(r.Log) == 0, r.Serving)
	}
	w.Flush()
	return b.String()
}

func or(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

var page = template.Must(template.New("").Parse(`<!doctype html>
<meta charset="utf-8"><title>Fault suite</title>
<style>body{font:14px sans-serif}td,th{padding:2px 10px;text-align:left}tr:nth-child(even){background:#eee}</style>
<h1>Fault suite, {{.When}}</h1>
<table><tr><th>kernel<th>CPUs<th>path<th>fault<th>found by<th>what it says<th>after<th>healed by<th>after<th>log clean<th>serving
{{range .Rows}}<tr><td>{{.Kernel}}<td>{{.CPUs}}<td>{{.Path}}<td>{{.Fault}}<td>{{.Detector}}<td>{{.Title}}{{.Error}}<td>{{.Found}}<td>{{.Rung}}{{with .Refused}} ({{.}}){{end}}<td>{{.Healed}}<td>{{not .Log}}<td>{{.Serving}}
{{end}}</table>
`))

// write puts the results into a directory, as text, JSON and HTML.
func write(dir string, rs []result, text string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(rs, "", "  ")
	if err != nil {
		return err
	}
	var html bytes.Buffer
	if err := page.Execute(&html, map[string]any{"When": time.Now().UTC().Format(time.RFC3339), "Rows": rs}); err != nil {
		return err
	}
	for name, data := range map[string][]byte{"faults.txt": []byte(text), "faults.json": append(b, '\n'), "faults.html": html.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}
