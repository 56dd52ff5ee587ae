package query

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// MemoryErrors is the answer to "which memory of the host goes wrong?".
type MemoryErrors struct {
	Extent
	// Counted says that the kernel counts errors: it has EDAC, and a driver for a memory controller of the machine. Most virtual
	// machines have none.
	Counted     bool                      `json:"counted"`
	Controllers []kernel.MemoryController `json:"controllers"`
}

// Ill reports whether there were errors that could not be corrected.
func (m MemoryErrors) Ill() bool {
	for _, c := range m.Controllers {
		if c.Uncorrectable > 0 {
			return true
		}
	}
	return false
}

// AskMemoryErrors lists the memory controllers with the errors that were counted.
func AskMemoryErrors(ctx context.Context, v *kernel.View, _ []string) (MemoryErrors, error) {
	return memoryErrors(ctx, v.MemoryControllers())
}

func memoryErrors(ctx context.Context, seq iter.Seq2[kernel.MemoryController, error]) (m MemoryErrors, err error) {
	m.Controllers, err = gather(ctx, &m.Extent, seq)
	if errors.Is(err, kernel.ErrNotSupported) {
		m.Controllers, err = []kernel.MemoryController{}, nil // no EDAC: nothing is counted, and that is the whole truth
	}
	m.Counted = len(m.Controllers) > 0
	return m, err
}

// Text prints a table of controllers and what is behind them.
func (m MemoryErrors) Text(w io.Writer) error {
	p := &printer{w: w}
	if !m.Counted && m.Complete {
		p.printf("The kernel counts no errors of memory: it has no driver (EDAC) for a memory controller here.\n")
		return p.err
	}
	rows := [][]string{{"CONTROLLER", "DRIVER", "MODULE", "PLACE", "SIZE", "TYPE", "CORRECTED", "UNCORRECTED", "SINCE"}}
	number := func(n uint64) string { return strconv.FormatUint(n, 10) }
	for _, c := range m.Controllers {
		mc := fmt.Sprintf("mc%d", c.Index)
		rows = append(rows, []string{mc, Clean(c.Driver), Clean(c.Name), "", "", "", number(c.Correctable), number(c.Uncorrectable), Round(c.Since)})
		for _, x := range c.Modules {
			var place []string
			for _, n := range x.Location {
				place = append(place, strconv.Itoa(n))
			}
			rows = append(rows, []string{mc, "", Clean(x.Label), strings.Join(place, ":"), Bytes(x.Bytes), Clean(x.Type), number(x.Correctable), number(x.Uncorrectable), ""})
		}
		if c.CorrectableUnplaced+c.UncorrectableUnplaced > 0 {
			rows = append(rows, []string{mc, "", "place not known", "", "", "", number(c.CorrectableUnplaced), number(c.UncorrectableUnplaced), ""})
		}
	}
	p.table("<<<<><>><", rows)
	p.extent(m.Extent)
	return p.err
}
