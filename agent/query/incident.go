package query

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/journal"
)

// Incident is a fault of the host from its finding to its end, as the journal tells it.
type Incident struct {
	// Number is the sequence number of the journal's record of the finding: it stays the same as long as the journal has it.
	Number     uint64         `json:"number"`
	Finding    detect.Finding `json:"finding"`
	Began      time.Time      `json:"began"`
	Ended      time.Time      `json:"ended,omitzero"`
	Resolution string         `json:"resolution,omitempty"` // empty while it stands, or if the agent ended before
	Stores     int            `json:"stores"`               // into the host's memory, those that took something back included
	Bytes      int            `json:"bytes"`
	// Attempts are the actions that were begun against it, each once.
	Attempts []Attempt `json:"attempts,omitempty"`
	Timeline []Moment  `json:"timeline"`
}

// Attempt is an action against a fault.
type Attempt struct {
	Action string `json:"action"`
	Cured  bool   `json:"cured"` // it was carried out, and the detector was silent then
}

// Cure is how often an action has helped against a kind of finding.
type Cure struct {
	Kind   detect.Kind `json:"kind"`
	Action string      `json:"action"`
	Tried  int         `json:"tried"` // incidents
	Cured  int         `json:"cured"`
}

// Cures counts what has helped against what: by kind, and of each kind what has helped most surely first, which is the order in
// which a policy had better try them. Few trials count for little: one success of one is less than nine of ten.
func Cures(all []Incident) []Cure {
	counts := make(map[[2]string]*Cure)
	for _, i := range all {
		for _, a := range i.Attempts {
			k := [2]string{string(i.Finding.Kind), a.Action}
			if counts[k] == nil {
				counts[k] = &Cure{Kind: i.Finding.Kind, Action: a.Action}
			}
			counts[k].Tried++
			if a.Cured {
				counts[k].Cured++
			}
		}
	}
	sure := func(c Cure) float64 { return float64(c.Cured+1) / float64(c.Tried+2) } // Laplace's rule of succession
	var out []Cure
	for _, c := range counts {
		out = append(out, *c)
	}
	slices.SortFunc(out, func(a, b Cure) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(sure(b), sure(a)), cmp.Compare(a.Action, b.Action))
	})
	return out
}

// attempt notes that an action was begun.
func (i *Incident) attempt(action string, cured bool) {
	for n := range i.Attempts {
		if a := &i.Attempts[n]; a.Action == action {
			a.Cured = a.Cured || cured
			return
		}
	}
	i.Attempts = append(i.Attempts, Attempt{action, cured})
}

// Moment is one thing that happened in an incident.
type Moment struct {
	Seq  uint64    `json:"seq"`
	At   time.Time `json:"at"`
	Kind string    `json:"kind"` // as in the journal: finding, intent, store, outcome, refused, resolved
	Text string    `json:"text"`
	Plan string    `json:"plan,omitempty"`
	Addr uint64    `json:"addr,omitempty"` // of a store, physical
	Old  string    `json:"old,omitempty"`
	New  string    `json:"new,omitempty"`
}

// Incidents makes them of the records of a journal, the oldest first. An ID means the latest finding or plan of that name: a journal that has
// forgotten its oldest records may have it twice. A start of the agent, which the journal marks, ends the incidents that stand.
func Incidents(records []journal.Record) []Incident {
	var all []*Incident
	open := make(map[string]*Incident)  // by the finding's ID
	plans := make(map[string]*Incident) // by the plan's ID
	for _, rec := range records {
		var d struct {
			Plan    json.RawMessage
			Caller  string
			Step    int
			Addr    uint64
			Old     string
			New     string
			Undo    bool
			Action  string
			Error   string
			Verify  bool `json:"verified"`
			Undone  bool
			Stores  int
			Finding string `json:"finding"`
		}
		m := Moment{Seq: rec.Seq, At: rec.Time, Kind: rec.Kind}
		switch rec.Kind {
		case "start":
			for _, i := range open {
				if i.Ended.IsZero() {
					i.Ended, i.Resolution, m.Text = rec.Time, "not followed any more: the agent was started anew", "the agent was started anew"
					i.Timeline = append(i.Timeline, m)
				}
			}
			continue
		case "finding", "resolved":
			var f detect.Finding
			if json.Unmarshal(rec.Data, &f) != nil || f.ID == "" {
				continue
			}
			if rec.Kind == "finding" {
				i := &Incident{Number: rec.Seq, Finding: f, Began: rec.Time}
				m.Text = f.Title + ": " + f.Detail
				i.Timeline = append(i.Timeline, m)
				open[f.ID], all = i, append(all, i)
				continue
			}
			if i := open[f.ID]; i != nil {
				i.Ended, i.Resolution, m.Text = rec.Time, f.Resolution, f.Resolution
				i.Timeline = append(i.Timeline, m)
			}
			continue
		case "intent", "store", "outcome", "refused":
		default:
			continue
		}
		if json.Unmarshal(rec.Data, &d) != nil {
			continue
		}
		// The plan is its ID in the record of a store, and whole in the others.
		var plan struct{ ID, Action, Finding, Title string }
		if json.Unmarshal(d.Plan, &m.Plan) != nil && json.Unmarshal(d.Plan, &plan) == nil {
			m.Plan = plan.ID
		}
		i := plans[m.Plan]
		if plan.Finding != "" {
			i = open[plan.Finding]
			plans[m.Plan] = i
		}
		if i == nil {
			i = open[d.Finding]
		}
		if i == nil {
			continue
		}
		switch rec.Kind {
		case "intent":
			m.Text = fmt.Sprintf("%s, asked for by %s: %s", plan.Action, d.Caller, plan.Title)
		case "store":
			m.Addr, m.Old, m.New = d.Addr, d.Old, d.New
			m.Text = fmt.Sprintf("step %d stores %s", d.Step, d.New)
			if d.Undo {
				m.Text = fmt.Sprintf("step %d is taken back", d.Step)
			}
			i.Stores++
			i.Bytes += memoryBytes(d.New)
		case "outcome", "refused":
			switch {
			case d.Error != "":
				m.Text = d.Error
			case d.Verify:
				m.Text = "done, and the detector is silent"
			default:
				m.Text = "done"
			}
			if rec.Kind == "outcome" && plan.Action != "" {
				i.attempt(plan.Action, d.Verify)
			}
			if d.Undone {
				m.Text += "; everything was taken back"
			}
		}
		i.Timeline = append(i.Timeline, m)
	}
	out := make([]Incident, len(all))
	for n, i := range all {
		out[n] = *i
	}
	return out
}

// memoryBytes counts what a text of memory stands for: hexadecimal, with runs of zeros as "(00*4096)".
func memoryBytes(s string) int {
	n := 0
	for s != "" {
		if rest, ok := strings.CutPrefix(s, "(00*"); ok {
			var run int
			count, after, _ := strings.Cut(rest, ")")
			fmt.Sscanf(count, "%d", &run)
			n, s = n+max(0, min(run, 1<<20)), after
			continue
		}
		plain, rest, _ := strings.Cut(s, "(")
		n += len(plain) / 2
		if len(rest) > 0 {
			rest = "(" + rest
		}
		s = rest
	}
	return n
}

// WriteIncidents writes one line for each, and then what has helped.
func WriteIncidents(w io.Writer, all []Incident) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "No incidents.")
		return err
	}
	for _, i := range all {
		end := "open"
		if !i.Ended.IsZero() {
			end = i.Ended.Sub(i.Began).Round(time.Millisecond).String() + ": " + i.Resolution
		}
		if _, err := fmt.Fprintf(w, "%8d  %s  %s  (%s)\n", i.Number, i.Began.UTC().Format(time.RFC3339), Clean(i.Finding.Title), Clean(end)); err != nil {
			return err
		}
	}
	cures := Cures(all)
	if len(cures) == 0 {
		return nil
	}
	var b strings.Builder
	b.WriteString("\nWhat has helped, the surest first:\n")
	for _, c := range cures {
		fmt.Fprintf(&b, "%17s  %-17s %d of %d\n", Clean(string(c.Kind)), Clean(c.Action), c.Cured, c.Tried)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteIncident writes the story of one: when what happened, counted from the finding, and with explain the evidence and the
// bytes before and after each store, too.
func WriteIncident(w io.Writer, i Incident, explain bool) error {
	var b strings.Builder
	f := &i.Finding
	fmt.Fprintf(&b, "Incident %d: %s\n%s\n", i.Number, Clean(f.Title), Clean(f.Detail))
	fmt.Fprintf(&b, "%s, %s, confidence %.2f; %s\n", f.Kind, f.Severity, f.Confidence, i.Began.UTC().Format(time.RFC3339Nano))
	if f.Culprit.PID != 0 {
		fmt.Fprintf(&b, "culprit: %q, PID %d\n", Clean(f.Culprit.Comm), f.Culprit.PID)
	}
	if explain {
		for _, e := range f.Evidence {
			fmt.Fprintf(&b, "  %s: %s\n", Clean(e.What), Clean(e.Value))
		}
	}
	b.WriteString("\n")
	for _, m := range i.Timeline {
		if m.Kind == "store" && !explain {
			continue
		}
		fmt.Fprintf(&b, "%10s  %-8s %s %s\n", "+"+m.At.Sub(i.Began).Round(time.Millisecond).String(), m.Kind, Clean(m.Plan), Clean(m.Text))
		if m.Kind == "store" {
			fmt.Fprintf(&b, "%21sat %#x: %s → %s\n", "", m.Addr, abridge(m.Old), abridge(m.New))
		}
	}
	fmt.Fprintf(&b, "\n%d stores, %d bytes\n", i.Stores, i.Bytes)
	_, err := io.WriteString(w, b.String())
	return err
}

func abridge(s string) string {
	s = Clean(s)
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
