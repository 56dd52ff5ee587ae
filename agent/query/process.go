package query

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// ProcessDetails is the answer to "what is this process, and what may it do?".
type ProcessDetails struct {
	Extent
	Process kernel.Process `json:"process"`
}

// AskProcess tells all about one thread.
func AskProcess(ctx context.Context, v *kernel.View, args []string) (p ProcessDetails, err error) {
	pid, err := process(args, 1)
	if err != nil {
		return p, err
	}
	p.Extent = now(ctx)
	p.Process, err = v.Process(pid)
	return p, err
}

// Text prints it in lines.
func (d ProcessDetails) Text(w io.Writer) error {
	p, x := &printer{w: w}, d.Process
	var rows [][]string
	row := func(name, format string, a ...any) { rows = append(rows, []string{name, fmt.Sprintf(format, a...)}) }
	row("command", "%s", Clean(x.Comm))
	if x.Exe != "" {
		row("program", "%s", Clean(x.Exe))
	}
	row("thread", "%d of process %d, group %d, session %d", x.PID, x.TGID, x.Group, x.Session)
	row("parents", "%s", join(x.Parents, " of "))
	for _, id := range x.IDs[min(1, len(x.IDs)):] {
		row("PID inside", "%d in namespace %d", id.PID, id.Namespace)
	}
	state := Clean(x.State)
	if x.WaitChannel != "" {
		state += " in " + Clean(x.WaitChannel)
	}
	row("state", "%s", state)
	row("scheduling", "%s, nice %d, priority %d, CPUs %s", x.Policy, x.Nice, x.RTPriority, join(x.CPUs, ","))
	row("time", "%s user, %s system, started %s after boot", clock(x.UTime), clock(x.STime), age(x.Start))
	c := x.Credentials
	row("user", "%d, effective %d, saved %d, file system %d", c.UID, c.EUID, c.SUID, c.FSUID)
	row("group", "%d, effective %d, saved %d, file system %d, others %s", c.GID, c.EGID, c.SGID, c.FSGID, join(c.Groups, ","))
	for _, set := range []struct {
		name string
		bits uint64
	}{{"effective", c.Effective}, {"permitted", c.Permitted}, {"inheritable", c.Inheritable}, {"ambient", c.Ambient}, {"bounding", c.Bounding}} {
		row("capabilities", "%s %#x %s", set.name, set.bits, capabilities(set.bits))
	}
	seccomp := x.Seccomp
	if x.SeccompFilters > 0 {
		seccomp += fmt.Sprintf(", %d filters", x.SeccompFilters)
	}
	row("confined", "seccomp %s, no new privileges %v", seccomp, x.NoNewPrivs)
	if n := x.Namespaces; n != nil {
		row("namespaces", "pid %d, mnt %d, net %d, uts %d (%s), ipc %d, cgroup %d, user %d", n.PID, n.Mount, n.Net, n.UTS, Clean(n.Hostname), n.IPC, n.Cgroup, n.User)
	}
	row("cgroup", "%s", Clean(x.Cgroup))
	row("OOM", "score adjusted by %d", x.OOMScoreAdj)
	if m := x.Memory; m != nil {
		row("memory", "%s virtual, %s anonymous, %s of files, %s shared, %s swapped, %s locked, %s page tables", Bytes(m.Virtual), Bytes(m.Anonymous), Bytes(m.File), Bytes(m.Shared), Bytes(m.Swapped), Bytes(m.Locked), Bytes(m.Tables))
	}
	row("signals", "pending %#x, of the process %#x, blocked %#x", x.Pending, x.Shared, x.Blocked)
	p.table("<<", rows)
	p.extent(d.Extent)
	return p.err
}

// capabilities names capabilities, or says that it is all of them.
func capabilities(bits uint64) string {
	switch names := kernel.Capabilities(bits); {
	case bits == 0:
		return "none"
	case len(names) > 35:
		return fmt.Sprintf("%d of them", len(names))
	default:
		return strings.Join(names, ",")
	}
}

// join writes numbers with something between.
func join[T any](list []T, between string) string {
	var s []string
	for _, x := range list {
		s = append(s, fmt.Sprint(x))
	}
	if s == nil {
		return "none"
	}
	return strings.Join(s, between)
}

// Mappings is the answer to "what is mapped into this process?".
type Mappings struct {
	Extent
	PID      int              `json:"pid"`
	Mappings []kernel.Mapping `json:"mappings"`
}

// AskMappings lists the mappings of a process.
func AskMappings(ctx context.Context, v *kernel.View, args []string) (m Mappings, err error) {
	if m.PID, err = process(args, 1); err != nil {
		return m, err
	}
	mem, err := v.UserMemory(m.PID)
	if err != nil {
		return m, err
	}
	m.Mappings, err = gather(ctx, &m.Extent, mem.Mappings())
	return m, err
}

// Text prints a table like pmap(1)'s.
func (m Mappings) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"ADDRESS", "SIZE", "PRESENT", "SWAPPED", "PERMS", "OFFSET", "NAME"}}
	for _, x := range m.Mappings {
		rows = append(rows, []string{fmt.Sprintf("%012x", x.Start), Bytes(x.End - x.Start), Bytes(x.Present << 12), Bytes(x.Swapped << 12), x.Perms, fmt.Sprintf("%#x", x.Offset), Clean(x.Name)})
	}
	p.table(">>>><><", rows)
	p.extent(m.Extent)
	return p.err
}

// Environment is the answer to "how was this process started?".
type Environment struct {
	Extent
	PID         int      `json:"pid"`
	Arguments   []string `json:"arguments"`
	Environment []string `json:"environment"`
}

// AskEnvironment reads the arguments and the environment of a process, from its own memory.
func AskEnvironment(ctx context.Context, v *kernel.View, args []string) (e Environment, err error) {
	if e.PID, err = process(args, 1); err != nil {
		return e, err
	}
	mem, err := v.UserMemory(e.PID)
	if err != nil {
		return e, err
	}
	e.Extent = now(ctx)
	// What is not in memory leaves a part.
	for _, part := range []struct {
		to  *[]string
		get func() ([]string, error)
	}{{&e.Arguments, mem.Arguments}, {&e.Environment, mem.Environment}} {
		if *part.to, err = part.get(); err != nil {
			var absent *kernel.AbsentError
			if !errors.As(err, &absent) {
				return e, err
			}
			e.doubt(err)
		}
	}
	return e, nil
}

// Text prints one a line.
func (e Environment) Text(w io.Writer) error {
	p := &printer{w: w}
	for _, a := range e.Arguments {
		p.printf("argument     %s\n", Clean(a))
	}
	for _, a := range e.Environment {
		p.printf("environment  %s\n", Clean(a))
	}
	p.extent(e.Extent)
	return p.err
}

// UserMemory is the answer to "what does this process have at this address?".
type UserMemory struct {
	Extent
	PID  int    `json:"pid"`
	Addr uint64 `json:"addr"`
	Data []byte `json:"data"`
}

// maxUserMemory is how much of a process's memory one answer holds.
const maxUserMemory = 1 << 20

// AskUserMemory reads memory of a process: PID, address, number of bytes.
func AskUserMemory(ctx context.Context, v *kernel.View, args []string) (m UserMemory, err error) {
	if m.PID, err = process(args, 1); err != nil {
		return m, err
	}
	if m.Addr, err = strconv.ParseUint(args[1], 0, 64); err != nil {
		return m, &ArgumentError{args[1], "an address"}
	}
	n, err := strconv.ParseUint(args[2], 0, 64)
	if err != nil || n == 0 || n > maxUserMemory {
		return m, &ArgumentError{args[2], fmt.Sprintf("a number of bytes up to %d", maxUserMemory)}
	}
	mem, err := v.UserMemory(m.PID)
	if err != nil {
		return m, err
	}
	m.Extent = now(ctx)
	m.Data = make([]byte, n)
	got, err := mem.ReadAt(m.Data, int64(m.Addr))
	m.Data = m.Data[:got]
	if err != nil && got > 0 {
		m.doubt(err)
		err = nil
	}
	return m, err
}

// Text prints a hex dump.
func (m UserMemory) Text(w io.Writer) error {
	p := &printer{w: w}
	for i := 0; i < len(m.Data); i += 16 {
		line := hex.Dump(m.Data[i:min(i+16, len(m.Data))])
		p.printf("%012x%s", m.Addr+uint64(i), line[8:])
	}
	p.extent(m.Extent)
	return p.err
}
