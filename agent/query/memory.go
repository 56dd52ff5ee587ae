package query

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Memory is the answer to "how does the host stand with its memory?".
type Memory struct {
	Extent
	kernel.MemoryUse
}

// AskMemory reads the use of memory, the zones, the pressure and the counters.
func AskMemory(_ context.Context, v *kernel.View, _ []string) (Memory, error) {
	m := Memory{Extent: Extent{At: time.Now(), Complete: true}}
	var err error
	m.MemoryUse, err = v.MemoryUse()
	return m, err
}

// shown are the counters of the text: those that tell of trouble.
var shown = []string{"pgfault", "pgmajfault", "pswpin", "pswpout", "oom_kill", "compact_stall", "drop_slab", "workingset_refault_file"}

// Text prints the figures in a few tables.
func (m Memory) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"TOTAL", "FREE", "AVAILABLE", "ANONYMOUS", "FILES", "SHARED", "DIRTY", "SLAB", "STACKS", "TABLES", "SWAP", "SWAP FREE"}}
	var cells []string
	for _, n := range []uint64{m.Total, m.Free, m.Available, m.Anonymous, m.PageCache, m.Shared, m.Dirty, m.Slab, m.Stacks, m.Tables, m.SwapTotal, m.SwapFree} {
		cells = append(cells, Bytes(n))
	}
	if m.SwapUnknown {
		cells[len(cells)-2], cells[len(cells)-1] = "?", "?"
	}
	p.table(">>>>>>>>>>>>", append(rows, cells))
	p.printf("\n")
	rows = [][]string{{"ZONE", "NODE", "MANAGED", "FREE", "MIN", "LOW", "HIGH", "FREE BLOCKS BY ORDER"}}
	for _, z := range m.Zones {
		var blocks []string
		for _, n := range z.Buddies {
			blocks = append(blocks, strconv.FormatUint(n, 10))
		}
		rows = append(rows, []string{Clean(z.Name), strconv.Itoa(z.Node), Bytes(z.Managed), Bytes(z.Free), Bytes(z.Min), Bytes(z.Low), Bytes(z.High), strings.Join(blocks, " ")})
	}
	p.table("<>>>>>><", rows)
	p.printf("\n")
	if len(m.Nodes) > 1 {
		rows = [][]string{{"NODE", "FREE", "ANONYMOUS", "FILES", "SLAB"}}
		for _, n := range m.Nodes {
			row := []string{strconv.Itoa(n.Node)}
			for _, names := range [][]string{{"nr_free_pages"}, {"nr_anon_pages"}, {"nr_file_pages"}, {"nr_slab_reclaimable", "nr_slab_unreclaimable"}} {
				var pages uint64
				for _, name := range names {
					k, _ := n.Counters.Get(name)
					pages += k
				}
				row = append(row, Bytes(pages*m.PageSize))
			}
			rows = append(rows, row)
		}
		p.table("<>>>>", rows)
		p.printf("\n")
	}
	if m.Pressure == nil {
		p.printf("the kernel does not account for pressure\n")
	} else {
		rows = [][]string{{"PRESSURE", "SOME 10 s", "60 s", "300 s", "FULL 10 s", "60 s", "300 s"}}
		for _, x := range []struct {
			name string
			s    kernel.Stall
		}{{"cpu", m.Pressure.CPU}, {"io", m.Pressure.IO}, {"memory", m.Pressure.Memory}} {
			r := []string{x.name}
			for _, f := range []float64{x.s.Some.Avg10, x.s.Some.Avg60, x.s.Some.Avg300, x.s.Full.Avg10, x.s.Full.Avg60, x.s.Full.Avg300} {
				r = append(r, fmt.Sprintf("%.2f%%", f))
			}
			rows = append(rows, r)
		}
		p.table("<>>>>>>", rows)
	}
	p.printf("\n")
	rows = nil
	for _, name := range shown {
		if n, ok := m.Counters.Get(name); ok {
			rows = append(rows, []string{name, strconv.FormatUint(n, 10)})
		}
	}
	var stalls uint64
	for _, c := range m.Counters {
		if strings.HasPrefix(c.Name, "allocstall_") {
			stalls += c.Value
		}
	}
	p.table("<>", append(rows, []string{"allocstall", strconv.FormatUint(stalls, 10)}))
	p.extent(m.Extent)
	return p.err
}

// RunQueues is the answer to "how busy is the host?".
type RunQueues struct {
	Extent
	kernel.Load
}

// AskLoad reads the load averages and the run queues.
func AskLoad(_ context.Context, v *kernel.View, _ []string) (RunQueues, error) {
	l := RunQueues{Extent: Extent{At: time.Now(), Complete: true}}
	var err error
	l.Load, err = v.Load()
	return l, err
}

// Text prints the averages as uptime(1) does, and a table of the run queues.
func (l RunQueues) Text(w io.Writer) error {
	p := &printer{w: w}
	p.printf("load average: %.2f, %.2f, %.2f\n\n", l.Averages[0], l.Averages[1], l.Averages[2])
	rows := [][]string{{"CPU", "RUNNABLE", "FAIR", "RT", "DEADLINE", "I/O WAIT", "SWITCHES", "RUNS"}}
	for _, q := range l.Queues {
		runs := "idle"
		if q.CurrPID != 0 {
			runs = fmt.Sprintf("%d %s", q.CurrPID, cmp.Or(Clean(q.CurrComm), "?"))
		}
		rows = append(rows, []string{strconv.Itoa(q.CPU), strconv.Itoa(q.Running), strconv.Itoa(q.Fair), strconv.Itoa(q.RealTime),
			strconv.Itoa(q.Deadline), strconv.Itoa(q.IOWait), strconv.FormatUint(q.Switches, 10), runs})
	}
	p.table(">>>>>>><", rows)
	p.extent(l.Extent)
	return p.err
}
