package query

import (
	"context"
	"io"
	"iter"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Modules is the answer to "what has been loaded into the kernel?".
type Modules struct {
	Extent
	Modules []kernel.Module `json:"modules"`
}

// AskModules lists the modules.
func AskModules(ctx context.Context, v *kernel.View, _ []string) (Modules, error) {
	return modules(ctx, v.Modules())
}

func modules(ctx context.Context, seq iter.Seq2[kernel.Module, error]) (m Modules, err error) {
	m.Modules, err = gather(ctx, &m.Extent, seq)
	return m, err
}

// Ill tells whether a module hides.
func (m Modules) Ill() bool {
	for i := range m.Modules {
		if m.Modules[i].Missing {
			return true
		}
	}
	return false
}

// Text prints a table like lsmod(8)'s.
func (m Modules) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"MODULE", "SIZE", "REFS", "USED BY", "NOTES"}}
	for _, x := range m.Modules {
		var notes []string
		if x.State != "live" {
			notes = append(notes, x.State)
		}
		if x.Taint != 0 {
			notes = append(notes, "taints "+kernel.Taint(x.Taint))
		}
		if x.Missing {
			var from []string
			for _, view := range []struct {
				in   bool
				name string
			}{{x.InList, "the list"}, {x.InKset, "/sys/module"}, {x.InTree, "the tree of addresses"}} {
				if !view.in {
					from = append(from, view.name)
				}
			}
			notes = append(notes, "HIDDEN from "+strings.Join(from, ", "))
		}
		rows = append(rows, []string{Clean(x.Name), strconv.FormatUint(x.Size, 10), strconv.Itoa(x.Refs), Clean(strings.Join(x.UsedBy, ",")), strings.Join(notes, ", ")})
	}
	p.table("<>><<", rows)
	p.extent(m.Extent)
	return p.err
}
