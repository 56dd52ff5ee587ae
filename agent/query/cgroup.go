package query

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strconv"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Cgroups is the answer to "what may each control group use, and what does it?".
type Cgroups struct {
	Extent
	Cgroups []kernel.Cgroup `json:"cgroups"`
}

// AskCgroups lists the control groups.
func AskCgroups(ctx context.Context, v *kernel.View, _ []string) (Cgroups, error) {
	return cgroups(ctx, v.Cgroups())
}

func cgroups(ctx context.Context, seq iter.Seq2[kernel.Cgroup, error]) (c Cgroups, err error) {
	c.Cgroups, err = gather(ctx, &c.Extent, seq)
	return c, err
}

// Text prints a table.
func (c Cgroups) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"TASKS", "PIDS", "MAX", "MEMORY", "HIGH", "MAX", "OOM", "CPU", "QUOTA", "WEIGHT", "CGROUP"}}
	for _, g := range c.Cgroups {
		r := []string{strconv.Itoa(g.Tasks)}
		r = append(r, pidsOf(g)...)
		if m := g.Memory; m != nil {
			r = append(r, Bytes(uint64(m.Current)), limit(m.High), limit(m.Max), strconv.FormatUint(m.OOMKills, 10))
		} else {
			r = append(r, "-", "-", "-", "-")
		}
		if u := g.CPU; u != nil {
			weight := "-"
			if u.Weight != 0 {
				weight = strconv.Itoa(u.Weight)
			}
			r = append(r, clock(u.Usage), quota(u.Quota, u.Period), weight)
		} else {
			r = append(r, "-", "-", "-")
		}
		path := Clean(g.Path)
		if g.Frozen {
			path += " (frozen)"
		}
		if g.Dying > 0 {
			path += fmt.Sprintf(" (%d removed below, still held)", g.Dying)
		}
		rows = append(rows, append(r, path))
	}
	p.table(">>>>>>>>>><", rows)
	p.extent(c.Extent)
	return p.err
}

func pidsOf(g kernel.Cgroup) []string {
	if g.PIDs == nil {
		return []string{"-", "-"}
	}
	most := "max"
	if g.PIDs.Max != kernel.NoLimit {
		most = strconv.FormatInt(g.PIDs.Max, 10)
	}
	return []string{strconv.FormatInt(g.PIDs.Current, 10), most}
}

// limit writes a limit of bytes as cgroupfs does, but readable.
func limit(n int64) string {
	if n == kernel.NoLimit {
		return "max"
	}
	return Bytes(uint64(n))
}

// quota writes how many CPUs a group may use.
func quota(q, period time.Duration) string {
	if q == kernel.NoLimit || period <= 0 {
		return "max"
	}
	return strconv.FormatFloat(float64(q)/float64(period), 'f', 2, 64)
}

// Containers is the answer to "what containers are there, and what runs in them?".
type Containers struct {
	Extent
	Containers []kernel.Container `json:"containers"`
}

// AskContainers lists the containers, or the one whose ID begins with the argument.
func AskContainers(ctx context.Context, v *kernel.View, args []string) (Containers, error) {
	c, err := containers(ctx, v.Containers())
	if err != nil || len(args) == 0 {
		return c, err
	}
	some := []kernel.Container{}
	for _, x := range c.Containers {
		if len(args[0]) > 0 && len(x.ID) >= len(args[0]) && x.ID[:len(args[0])] == args[0] {
			some = append(some, x)
		}
	}
	if c.Containers = some; len(some) == 0 {
		return c, fmt.Errorf("container %q: %w", args[0], kernel.ErrNotFound)
	}
	return c, nil
}

func containers(ctx context.Context, seq iter.Seq2[kernel.Container, error]) (c Containers, err error) {
	c.Containers, err = gather(ctx, &c.Extent, seq)
	return c, err
}

// Text prints a table of the containers; of a single one, its tasks, too.
func (c Containers) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"RUNTIME", "ID", "HOSTNAME", "TASKS", "MEMORY", "MAX", "CPU", "POD", "CGROUP"}}
	for _, x := range c.Containers {
		memory, most, cpu := "-", "-", "-"
		if m := x.Cgroup.Memory; m != nil {
			memory, most = Bytes(uint64(m.Current)), limit(m.Max)
		}
		if u := x.Cgroup.CPU; u != nil {
			cpu = clock(u.Usage)
		}
		rows = append(rows, []string{Clean(x.Runtime), short(Clean(x.ID)), Clean(x.Hostname), strconv.Itoa(len(x.Tasks)), memory, most, cpu, Clean(x.Pod), Clean(x.Cgroup.Path)})
	}
	p.table("<<<>>>><<", rows)
	if len(c.Containers) == 1 {
		p.printf("\n")
		rows = [][]string{{"PID", "TID", "INSIDE", "S", "COMMAND"}}
		for _, t := range c.Containers[0].Tasks {
			rows = append(rows, []string{strconv.Itoa(t.TGID), strconv.Itoa(t.PID), strconv.Itoa(t.Inner), Clean(t.State), Clean(t.Comm)})
		}
		p.table(">>><<", rows)
	}
	p.extent(c.Extent)
	return p.err
}

// short cuts a long ID as container tools do.
func short(id string) string {
	if len(id) == 64 {
		return id[:12]
	}
	return id
}
