package query

import (
	"context"
	"fmt"
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

// Module is the answer to "what is this module, and how is it set?".
type Module struct {
	Extent
	kernel.Module
	Parameters []kernel.Parameter `json:"parameters"`
}

// AskModule looks up a module by its name, in which - and _ are the same, as for modprobe(8).
func AskModule(ctx context.Context, v *kernel.View, args []string) (Module, error) {
	m := Module{Extent: now(ctx)}
	name := strings.ReplaceAll(args[0], "-", "_")
	for x, err := range v.Modules() {
		if err != nil {
			return m, err
		}
		if x.Name != name {
			continue
		}
		var err error
		m.Module = x
		m.Parameters, err = v.ModuleParameters(x)
		if err != nil {
			m.doubt(err)
		}
		return m, nil
	}
	return m, fmt.Errorf("module %s: %w", Clean(args[0]), kernel.ErrNotFound)
}

// Text prints a module like modinfo(8), with the values of its parameters.
func (m Module) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"name", Clean(m.Name)}, {"state", m.State}, {"size", strconv.FormatUint(m.Size, 10)}, {"base", m.Base.String()}, {"refs", strconv.Itoa(m.Refs)}}
	if len(m.UsedBy) > 0 {
		rows = append(rows, []string{"used by", Clean(strings.Join(m.UsedBy, ", "))})
	}
	if m.Version != "" {
		rows = append(rows, []string{"version", Clean(m.Version)})
	}
	if m.Taint != 0 {
		rows = append(rows, []string{"taint", kernel.Taint(m.Taint)})
	}
	for _, s := range m.Sections {
		rows = append(rows, []string{"section", s.Addr.String() + " " + Clean(s.Name)})
	}
	for _, x := range m.Parameters {
		value := Clean(x.Value)
		if x.Type == "" {
			value = "? (of a type of the module's own)"
		}
		rows = append(rows, []string{"parm", Clean(x.Name) + "=" + value})
	}
	p.table("<<", rows)
	p.extent(m.Extent)
	return p.err
}
