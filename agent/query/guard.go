package query

import (
	"context"
	"io"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Protections is the answer to "what does the kernel protect itself and its programs with?".
type Protections struct {
	Extent
	Guards []kernel.Guard `json:"guards"`
}

// AskProtections lists the kernel's protections and how strong they stand.
func AskProtections(_ context.Context, v *kernel.View, _ []string) (Protections, error) {
	p := Protections{Extent: Extent{At: time.Now(), Complete: true}}
	all, err := v.Guards()
	p.Guards = append([]kernel.Guard{}, all...)
	return p, err
}

// Text prints a table.
func (a Protections) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"PROTECTION", "STANDS AT", "VARIABLE", "CAN BE LOWERED"}}
	for _, g := range a.Guards {
		text, lower := Clean(g.Text), "by root"
		if g.Level == 0 {
			text += " (off)"
		}
		if g.OneWay {
			lower = "no"
		}
		rows = append(rows, []string{g.Name, text, g.Object, lower})
	}
	p.table("<<<<", rows)
	p.extent(a.Extent)
	return p.err
}
