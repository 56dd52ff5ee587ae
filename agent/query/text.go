package query

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Clean makes text of the host harmless for a terminal and for a table: control characters (newlines and tabs, too),
// bytes that are not UTF-8 and invisible or direction-changing characters come out as backslash escapes. A backslash
// stays as it is, so a host can imitate an escape but not hide one.
func Clean(s string) string {
	clean := true
	for _, r := range s {
		if r == utf8.RuneError || !strconv.IsPrint(r) {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case strconv.IsPrint(r):
			b.WriteRune(r)
		default:
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
		i += n
	}
	return b.String()
}

// printer writes until the first error and keeps it.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) printf(format string, a ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, a...)
	}
}

// table prints rows with their columns aligned; a '>' in align puts a column to the right. The last column is not padded.
func (p *printer) table(align string, rows [][]string) {
	width := make([]int, len(align))
	for _, r := range rows {
		for i, cell := range r {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		for i, cell := range r {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			switch {
			case align[i] == '>':
				b.WriteString(pad + cell)
			case i < len(r)-1:
				b.WriteString(cell + pad)
			default:
				b.WriteString(cell)
			}
			if i < len(r)-1 {
				b.WriteString("  ")
			}
		}
		p.printf("%s\n", strings.TrimRight(b.String(), " "))
	}
}

// extent prints why an answer is not the whole truth, and how sure it is if it is not quite.
func (p *printer) extent(e Extent) {
	if !e.Complete {
		p.printf("This list is not complete.\n")
	}
	for _, d := range e.Doubts {
		p.printf("could not tell: %s\n", Clean(d))
	}
	if e.Confidence.Level != "" && e.Confidence.Level != kernel.HighConfidence {
		p.printf("confidence %s\n", e.Confidence)
	}
}

// Text prints a table like ps(1)'s.
func (ps Processes) Text(w io.Writer) error {
	p := &printer{w: w}
	threads := false
	for _, t := range ps.Processes {
		threads = threads || t.TID != 0
	}
	head, align := []string{"PID"}, ">"
	if threads {
		head, align = append(head, "TID"), align+">"
	}
	head = append(head, "PPID", "UID", "S", "CPU", "THR", "RSS", "START", "TIME", "COMMAND")
	align += ">><>>>>><"
	rows := [][]string{head}
	for _, t := range ps.Processes {
		r := []string{strconv.Itoa(t.PID)}
		if threads {
			r = append(r, strconv.Itoa(t.TID))
		}
		rows = append(rows, append(r, strconv.Itoa(t.PPID), strconv.FormatUint(uint64(t.UID), 10), Clean(t.State),
			strconv.Itoa(t.CPU), strconv.Itoa(t.Threads), Bytes(t.RSS), age(t.Start), clock(t.Runtime), command(t)))
	}
	p.table(align, rows)
	p.extent(Extent{Complete: ps.Complete, Doubts: ps.Doubts, Confidence: ps.Confidence})
	return p.err
}

func command(t Process) string {
	c := Clean(t.Comm)
	if t.KThread {
		c = "[" + c + "]"
	}
	if !t.Confident {
		c += " (changed while read)"
	}
	return c
}

// Text prints a table like top(1)'s, at most rows processes (all if rows is not positive).
func (l Load) Text(w io.Writer, rows int) error {
	p := &printer{w: w}
	over := "over " + Round(l.Over)
	if l.SinceBoot {
		over = "over the life of each process (one sample)"
	}
	p.printf("up %s, %d CPUs, %d tasks, %.2f CPUs busy %s\n\n", Round(l.Uptime), l.CPUs, l.Tasks, l.Total, over)
	tab := [][]string{{"PID", "UID", "S", "CPU", "%CPU", "RSS", "TIME", "COMMAND"}}
	for i, b := range l.Processes {
		if rows > 0 && i == rows {
			break
		}
		tab = append(tab, []string{strconv.Itoa(b.PID), strconv.FormatUint(uint64(b.UID), 10), Clean(b.State), strconv.Itoa(b.CPU),
			fmt.Sprintf("%.1f", 100*b.Share), Bytes(b.RSS), clock(b.Runtime), command(b.Process)})
	}
	p.table(">><>>>><", tab)
	p.extent(Extent{Complete: l.Complete, Doubts: l.Doubts, Confidence: l.Confidence})
	return p.err
}

// levels are the names of the kernel's log levels, from 0 on.
var levels = [...]string{"emerg", "alert", "crit", "err", "warn", "notice", "info", "debug"}

// Text prints the log as dmesg(1) does; records of level err and worse are marked by it.
func (l Log) Text(w io.Writer) error {
	p := &printer{w: w}
	for _, r := range l.Records {
		p.record(r)
	}
	p.extent(Extent{Complete: l.Complete, Doubts: l.Doubts, Confidence: l.Confidence})
	return p.err
}

func (p *printer) record(r kernel.LogRecord) {
	mark := ""
	if r.Level <= 3 {
		mark = levels[r.Level] + ": "
	}
	us := r.Time.Microseconds()
	stamp := fmt.Sprintf("[%5d.%06d] ", us/1e6, us%1e6)
	for i, line := range strings.Split(strings.TrimRight(r.Text, "\n"), "\n") {
		if i > 0 {
			stamp, mark = strings.Repeat(" ", len(stamp)), ""
		}
		p.printf("%s%s%s\n", stamp, mark, Clean(strings.ReplaceAll(line, "\t", "        ")))
	}
}

// Text prints the status in a few lines.
func (s Status) Text(w io.Writer) error {
	p := &printer{w: w}
	var rows [][]string
	row := func(name, format string, a ...any) { rows = append(rows, []string{name, fmt.Sprintf(format, a...)}) }
	health := map[Health]string{Healthy: "yes", Unhealthy: "NO", CouldNotTell: "could not tell"}[s.Health]
	if s.Why != "" {
		health += ": " + Clean(s.Why)
	}
	row("healthy", "%s", health)
	if s.Phase != "" {
		since := ""
		if !s.Since.IsZero() {
			since = " since " + s.Since.UTC().Format(time.RFC3339)
		}
		row("phase", "%s%s", s.Phase, since)
	}
	if k := s.Kernel; k != nil {
		row("kernel", "Linux %s %s, %d CPUs", Clean(k.Release), Clean(k.Arch), k.CPUs)
		if k.Hostname != "" {
			row("hostname", "%s", Clean(k.Hostname))
		}
		if k.BuildID != "" {
			row("build ID", "%s", Clean(k.BuildID))
		}
		if !k.BootTime.IsZero() {
			row("booted", "%s", k.BootTime.UTC().Format(time.RFC3339))
		}
	}
	if s.Uptime > 0 {
		row("up", "%s", Round(s.Uptime))
	}
	if s.Panic != nil && s.Panic.Panicked && s.Panic.Task != nil {
		t := s.Panic.Task
		row("culprit", "PID %d %s on CPU %d", t.PID, Clean(t.Comm), s.Panic.CPU)
	}
	for _, c := range s.CPUs {
		state := "runs PID " + strconv.Itoa(c.CurrPID) + " " + Clean(c.CurrComm)
		switch {
		case !c.Online:
			state = "offline"
		case c.Idle:
			state = "idle"
		}
		row(fmt.Sprintf("CPU %d", c.ID), "%s, %d runnable", state, c.Running)
	}
	if a := s.Agent; a != nil {
		stores := "off"
		if a.Writes {
			stores = "on"
		}
		row("writes", "%s", stores)
		if a.Agreement != "" {
			row("agreement", "%s", Clean(a.Agreement))
		}
		row("attached", "%d times%s", a.Attaches, prefixed(", last in ", a.AttachTook))
		row("passes", "%d%s", a.Passes, prefixed(", last ", a.LastPass))
		for i, d := range a.Detectors {
			row(first(i, "detectors"), "%s", Clean(d))
		}
		for i, e := range a.Errors {
			row(first(i, "errors"), "%s", Clean(e))
		}
	}
	if s.Cost != "" {
		row("cost", "%s", s.Cost)
	}
	for i, n := range s.Notes {
		row(first(i, "notes"), "%s", Clean(n))
	}
	p.table("<<", rows)
	return p.err
}

func first(i int, name string) string {
	if i == 0 {
		return name
	}
	return ""
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + Clean(s)
}

// Findings is the answer to "what is wrong?".
type Findings []detect.Finding

// Open returns the findings that still stand.
func (f Findings) Open() Findings {
	out := Findings{}
	for _, x := range f {
		if x.Resolved == nil {
			out = append(out, x)
		}
	}
	return out
}

// Text prints a table, and what can be done about those that stand.
func (f Findings) Text(w io.Writer) error {
	p := &printer{w: w}
	if len(f) == 0 {
		p.printf("No findings.\n")
		return p.err
	}
	rows := [][]string{{"FINDING", "SEVERITY", "SINCE", "STATE", "TITLE"}}
	for _, x := range f {
		state := "open"
		switch {
		case x.Resolved != nil:
			state = "resolved"
		case x.Action != "" && x.Automatic:
			state = "open, healing by " + x.Action
		case x.Action != "":
			state = "open, " + x.Action + " waits for you"
		}
		rows = append(rows, []string{Clean(x.ID), string(x.Severity), x.FirstSeen.UTC().Format(time.RFC3339), Clean(state), Clean(x.Title)})
	}
	p.table("<<<<<", rows)
	return p.err
}

// FindingText prints everything about one finding.
func FindingText(w io.Writer, x detect.Finding) error {
	p := &printer{w: w}
	rows := [][]string{
		{"finding", Clean(x.ID)},
		{"kind", Clean(string(x.Kind))},
		{"severity", Clean(string(x.Severity))},
		{"title", Clean(x.Title)},
		{"detail", Clean(x.Detail)},
		{"first seen", x.FirstSeen.UTC().Format(time.RFC3339Nano)},
		{"last seen", x.LastSeen.UTC().Format(time.RFC3339Nano)},
		{"confidence", fmt.Sprintf("%.0f %%", 100*x.Confidence)},
	}
	if x.Resolved != nil {
		rows = append(rows, []string{"resolved", x.Resolved.UTC().Format(time.RFC3339Nano) + prefixed(": ", x.Resolution)})
	}
	if x.Action != "" {
		who := "waits for an operator"
		if x.Automatic {
			who = "runs by policy"
		}
		rows = append(rows, []string{"action", Clean(x.Action) + ", " + who})
	}
	if c := x.Culprit; c.PID != 0 || c.Comm != "" {
		rows = append(rows, []string{"culprit", fmt.Sprintf("PID %d, process %d, %s", c.PID, c.TGID, Clean(c.Comm))})
	}
	if x.Culprit.CPU != nil {
		rows = append(rows, []string{"CPU", strconv.Itoa(*x.Culprit.CPU)})
	}
	for i, e := range x.Evidence {
		rows = append(rows, []string{first(i, "evidence"), Clean(e.What) + ": " + Clean(e.Value)})
	}
	p.table("<<", rows)
	return p.err
}

// Bytes prints an amount of memory with a binary unit and about three digits: "0", "812K", "1.5G".
func Bytes(n uint64) string {
	if n < 1<<10 {
		return strconv.FormatUint(n, 10)
	}
	v, unit := float64(n), -1
	for v >= 1024 && unit < len("KMGTPE")-1 {
		v /= 1024
		unit++
	}
	if v < 10 {
		return fmt.Sprintf("%.1f%c", v, "KMGTPE"[unit])
	}
	return fmt.Sprintf("%.0f%c", v, "KMGTPE"[unit])
}

// Round prints a duration with no more digits than a person reads.
func Round(d time.Duration) string {
	switch {
	case d >= time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	}
	return d.String()
}

// age prints a time since boot as seconds, minutes, hours or days.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("+%.1fs", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("+%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("+%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("+%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}

// clock prints used CPU time as minutes and seconds, as top(1) does.
func clock(d time.Duration) string {
	cs := d.Milliseconds() / 10
	return fmt.Sprintf("%d:%02d.%02d", cs/6000, cs/100%60, cs%100)
}
