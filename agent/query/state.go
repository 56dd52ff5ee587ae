package query

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// now is the extent of an answer that is made in one go.
func now(context.Context) Extent { return Extent{At: time.Now(), Complete: true} }

// WorkerPools is the answer to "what do the kernel's workers do?".
type WorkerPools struct {
	Extent
	Pools []kernel.WorkerPool `json:"pools"`
}

// AskWorkerPools lists the pools of kworkers.
func AskWorkerPools(ctx context.Context, v *kernel.View, _ []string) (WorkerPools, error) {
	return workerPools(ctx, v.WorkerPools())
}

func workerPools(ctx context.Context, seq iter.Seq2[kernel.WorkerPool, error]) (p WorkerPools, err error) {
	p.Pools, err = gather(ctx, &p.Extent, seq)
	return p, err
}

// Text prints a table of the pools, then what runs and what waits.
func (a WorkerPools) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"POOL", "CPU", "WORKERS", "IDLE", "RUNNING", "PENDING", "STUCK FOR"}}
	var works [][]string
	for _, x := range a.Pools {
		cpu := "any"
		if x.CPU >= 0 {
			cpu = strconv.Itoa(x.CPU)
		}
		stuck := "-"
		if len(x.Pending) > 0 {
			stuck = Round(x.Waiting)
		}
		rows = append(rows, []string{strconv.Itoa(x.ID), cpu, strconv.Itoa(x.Workers), strconv.Itoa(x.Idle), strconv.Itoa(len(x.Running)), strconv.Itoa(len(x.Pending)), stuck})
		for _, r := range x.Running {
			works = append(works, []string{strconv.Itoa(x.ID), "runs", strconv.Itoa(r.PID), Clean(r.Queue), Clean(r.Function), Clean(r.Desc)})
		}
		for _, r := range x.Pending {
			works = append(works, []string{strconv.Itoa(x.ID), "waits", "", Clean(r.Queue), Clean(r.Function), ""})
		}
	}
	p.table(">>>>>>>", rows)
	if len(works) > 0 {
		p.printf("\n")
		p.table("><><<<", append([][]string{{"POOL", "WORK", "PID", "QUEUE", "FUNCTION", "NOTE"}}, works...))
	}
	p.extent(a.Extent)
	return p.err
}

// Timers is the answer to "what will the kernel do next?".
type Timers struct {
	Extent
	Timers []kernel.Timer `json:"timers"`
}

// AskTimers lists the timers.
func AskTimers(ctx context.Context, v *kernel.View, _ []string) (Timers, error) {
	return timers(ctx, v.Timers())
}

func timers(ctx context.Context, seq iter.Seq2[kernel.Timer, error]) (t Timers, err error) {
	t.Timers, err = gather(ctx, &t.Extent, seq)
	return t, err
}

// Text prints a table.
func (t Timers) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"DUE", "CPU", "CLOCK", "FUNCTION", "FOR"}}
	for _, x := range t.Timers {
		whom := Clean(x.Work)
		if x.PID != 0 {
			whom = fmt.Sprintf("%d %s", x.PID, Clean(x.Comm))
		}
		rows = append(rows, []string{strconv.FormatFloat(x.Due.Seconds(), 'f', 3, 64), strconv.Itoa(x.CPU), x.Clock, Clean(x.Function), whom})
	}
	p.table(">><<<", rows)
	p.extent(t.Extent)
	return p.err
}

// Interrupts is the answer to "what interrupts the CPUs?".
type Interrupts struct {
	Extent
	Interrupts []kernel.Interrupt `json:"interrupts"`
}

// AskInterrupts lists the interrupts and softirqs.
func AskInterrupts(ctx context.Context, v *kernel.View, _ []string) (Interrupts, error) {
	return interrupts(ctx, v.Interrupts())
}

func interrupts(ctx context.Context, seq iter.Seq2[kernel.Interrupt, error]) (i Interrupts, err error) {
	i.Interrupts, err = gather(ctx, &i.Extent, seq)
	return i, err
}

// Text prints a table of those that have happened.
func (a Interrupts) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"IRQ", "TOTAL", "BY CPU", "CHIP", "USERS"}}
	for _, i := range a.Interrupts {
		total := uint64(0)
		for _, n := range i.Counts {
			total += n
		}
		if total == 0 {
			continue
		}
		name := Clean(i.Name)
		if i.Soft {
			name = "soft " + name
		}
		rows = append(rows, []string{name, strconv.FormatUint(total, 10), join(i.Counts, " "), Clean(i.Chip), Clean(strings.Join(i.Users, ", "))})
	}
	p.table("<><<<", rows)
	p.extent(a.Extent)
	return p.err
}

// RCU is the answer to "does RCU get on?".
type RCU struct {
	Extent
	State kernel.RCU `json:"state"`
}

// AskRCU tells the state of RCU.
func AskRCU(ctx context.Context, v *kernel.View, _ []string) (r RCU, err error) {
	r.Extent = now(ctx)
	r.State, err = v.RCU()
	return r, err
}

// Text prints it in lines.
func (r RCU) Text(w io.Writer) error {
	p := &printer{w: w}
	s := r.State
	p.printf("grace period %d, %s", s.GracePeriod, Clean(s.State))
	if s.Waiting {
		p.printf(", under way for %s; the kernel complains in %s", Round(s.Running), Round(s.Stall))
	}
	p.printf("\n\n")
	rows := [][]string{{"CPU", "CALLBACKS", "SEEN", "AWAITED"}}
	for _, c := range s.CPUs {
		rows = append(rows, []string{strconv.Itoa(c.CPU), strconv.FormatInt(c.Callbacks, 10), strconv.FormatUint(c.Seen, 10), strconv.FormatBool(c.Awaited)})
	}
	p.table(">>>>", rows)
	p.extent(r.Extent)
	return p.err
}

// Disks is the answer to "what disks are there, and what is under way?".
type Disks struct {
	Extent
	Disks []kernel.Disk `json:"disks"`
}

// AskDisks lists the block devices.
func AskDisks(ctx context.Context, v *kernel.View, _ []string) (Disks, error) {
	return disks(ctx, v.Disks())
}

func disks(ctx context.Context, seq iter.Seq2[kernel.Disk, error]) (d Disks, err error) {
	d.Disks, err = gather(ctx, &d.Extent, seq)
	return d, err
}

// Text prints a table of the disks, then what is under way.
func (d Disks) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"DISK", "DEVICE", "SIZE", "READS", "READ", "WRITES", "WRITTEN", "IN FLIGHT", "OLDEST"}}
	var requests [][]string
	for _, x := range d.Disks {
		oldest := time.Duration(0)
		for _, r := range x.InFlight {
			oldest = max(oldest, r.Age)
			requests = append(requests, []string{Clean(x.Name), Clean(r.Op), strconv.FormatUint(r.Sector, 10), Bytes(r.Bytes), strconv.Itoa(r.Tag), Round(r.Age)})
		}
		name, old := Clean(x.Name), "-"
		if x.ReadOnly {
			name += " (ro)"
		}
		if len(x.InFlight) > 0 {
			old = Round(oldest)
		}
		rows = append(rows, []string{name, x.Dev, Bytes(x.Size), strconv.FormatUint(x.Reads, 10), Bytes(x.ReadBytes), strconv.FormatUint(x.Writes, 10), Bytes(x.WrittenBytes), strconv.Itoa(len(x.InFlight)), old})
	}
	p.table("<<>>>>>>>", rows)
	if len(requests) > 0 {
		p.printf("\n")
		p.table("<<>>>>", append([][]string{{"DISK", "OP", "SECTOR", "SIZE", "TAG", "AGE"}}, requests...))
	}
	p.extent(d.Extent)
	return p.err
}

// Pipes is the answer to "what waits in pipes?".
type Pipes struct {
	Extent
	Pipes []kernel.Pipe `json:"pipes"`
}

// AskPipes lists the pipes.
func AskPipes(ctx context.Context, v *kernel.View, _ []string) (Pipes, error) {
	return pipes(ctx, v.Pipes())
}

func pipes(ctx context.Context, seq iter.Seq2[kernel.Pipe, error]) (x Pipes, err error) {
	x.Pipes, err = gather(ctx, &x.Extent, seq)
	return x, err
}

// Text prints a table.
func (a Pipes) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"INODE", "BYTES", "BUFFERS", "READERS", "WRITERS", "PATH", "OWNERS"}}
	for _, x := range a.Pipes {
		rows = append(rows, []string{strconv.FormatUint(x.Inode, 10), strconv.FormatUint(x.Bytes, 10), fmt.Sprintf("%d/%d", x.Used, x.Buffers), strconv.Itoa(x.Readers), strconv.Itoa(x.Writers), Clean(x.Path), owners(x.Owners)})
	}
	p.table(">>>>><<", rows)
	p.extent(a.Extent)
	return p.err
}

// owners names the processes that have something open.
func owners(list []kernel.SocketOwner) string {
	var s []string
	for _, o := range list {
		s = append(s, fmt.Sprintf("%d %s (%s)", o.PID, Clean(o.Comm), Clean(o.FD)))
	}
	return strings.Join(s, ", ")
}

// Routes is the answer to "where do packets go?".
type Routes struct {
	Extent
	Routes []kernel.Route `json:"routes"`
}

// AskRoutes lists the routes.
func AskRoutes(ctx context.Context, v *kernel.View, _ []string) (Routes, error) {
	return routes(ctx, v.Routes())
}

// AskRoutes6 lists the routes of IPv6.
func AskRoutes6(ctx context.Context, v *kernel.View, _ []string) (Routes, error) {
	return routes(ctx, v.Routes6())
}

func routes(ctx context.Context, seq iter.Seq2[kernel.Route, error]) (r Routes, err error) {
	r.Routes, err = gather(ctx, &r.Extent, seq)
	return r, err
}

// Text prints a table like ip-route(8)'s.
func (r Routes) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"NETNS", "TABLE", "TYPE", "DESTINATION", "GATEWAY", "DEVICE", "SOURCE", "METRIC"}}
	for _, x := range r.Routes {
		table := strconv.FormatUint(uint64(x.Table), 10)
		switch x.Table {
		case 254:
			table = "main"
		case 255:
			table = "local"
		}
		dest, gateway, source := x.Dest.String(), "-", "-"
		if x.Dest.Bits() == 0 {
			dest = "default"
		}
		if x.Gateway.IsValid() {
			gateway = x.Gateway.String()
		}
		if x.Source.IsValid() {
			source = x.Source.String()
		}
		rows = append(rows, []string{strconv.FormatUint(x.Netns, 10), table, x.Type, dest, gateway, Clean(x.Device), source, strconv.FormatUint(uint64(x.Metric), 10)})
	}
	p.table("><<<<<<>", rows)
	p.extent(r.Extent)
	return p.err
}

// Sysctls is the answer to "how is the kernel set?".
type Sysctls struct {
	Extent
	Sysctls []kernel.Sysctl `json:"sysctls"`
}

// AskSysctls lists the settings; with an argument, that one and those below it.
func AskSysctls(ctx context.Context, v *kernel.View, args []string) (s Sysctls, err error) {
	if s, err = sysctls(ctx, v.Sysctls()); err != nil || len(args) == 0 {
		return s, err
	}
	name := strings.ReplaceAll(args[0], "/", ".")
	some := []kernel.Sysctl{}
	for _, x := range s.Sysctls {
		if x.Name == name || strings.HasPrefix(x.Name, name+".") {
			some = append(some, x)
		}
	}
	if s.Sysctls = some; len(some) == 0 {
		return s, fmt.Errorf("setting %q: %w", name, kernel.ErrNotFound)
	}
	return s, nil
}

func sysctls(ctx context.Context, seq iter.Seq2[kernel.Sysctl, error]) (s Sysctls, err error) {
	s.Sysctls, err = gather(ctx, &s.Extent, seq)
	return s, err
}

// Text prints them as sysctl(8) does; what a handler may show otherwise has a "?".
func (s Sysctls) Text(w io.Writer) error {
	p := &printer{w: w}
	for _, x := range s.Sysctls {
		sure := ""
		if !x.Known {
			sure = " ?"
		}
		p.printf("%s = %s%s\n", Clean(x.Name), Clean(strings.ReplaceAll(x.Value, "\t", " ")), sure)
	}
	p.extent(s.Extent)
	return p.err
}

// Keys is the answer to "what keys does the kernel keep?".
type Keys struct {
	Extent
	Keys []kernel.Key `json:"keys"`
}

// AskKeys lists the keys by their names.
func AskKeys(ctx context.Context, v *kernel.View, _ []string) (Keys, error) {
	return keys(ctx, v.Keys())
}

func keys(ctx context.Context, seq iter.Seq2[kernel.Key, error]) (k Keys, err error) {
	k.Keys, err = gather(ctx, &k.Extent, seq)
	return k, err
}

// Text prints a table like /proc/keys.
func (k Keys) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"SERIAL", "UID", "GID", "PERM", "TYPE", "NAME"}}
	for _, x := range k.Keys {
		rows = append(rows, []string{fmt.Sprintf("%08x", x.Serial), strconv.Itoa(int(int32(x.UID))), strconv.Itoa(int(int32(x.GID))), fmt.Sprintf("%08x", x.Perm), Clean(x.Type), Clean(x.Description)})
	}
	p.table(">>>><<", rows)
	p.extent(k.Extent)
	return p.err
}

// BPF is the answer to "what eBPF is loaded?".
type BPF struct {
	Extent
	BPF kernel.BPF `json:"bpf"`
}

// AskBPF lists eBPF programs, maps and links.
func AskBPF(ctx context.Context, v *kernel.View, _ []string) (b BPF, err error) {
	b.Extent = now(ctx)
	b.BPF, err = v.BPF()
	return b, err
}

// Text prints them like bpftool(8).
func (b BPF) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"PROGRAM", "TYPE", "NAME", "TAG", "INSNS", "JITED", "LOADED", "UID", "MAPS"}}
	for _, x := range b.BPF.Programs {
		rows = append(rows, []string{strconv.FormatUint(uint64(x.ID), 10), Clean(x.Type), Clean(x.Name), x.Tag, strconv.Itoa(x.Insns), strconv.Itoa(x.Jited), age(x.Loaded), strconv.FormatUint(uint64(x.UID), 10), join(x.Maps, ",")})
	}
	p.table("><<<>>>><", rows)
	p.printf("\n")
	rows = [][]string{{"MAP", "TYPE", "NAME", "KEY", "VALUE", "ENTRIES"}}
	for _, x := range b.BPF.Maps {
		rows = append(rows, []string{strconv.FormatUint(uint64(x.ID), 10), Clean(x.Type), Clean(x.Name), strconv.Itoa(x.KeySize), strconv.Itoa(x.ValueSize), strconv.Itoa(x.MaxEntries)})
	}
	p.table("><<>>>", rows)
	p.printf("\n")
	rows = [][]string{{"LINK", "TYPE", "PROGRAM"}}
	for _, x := range b.BPF.Links {
		rows = append(rows, []string{strconv.FormatUint(uint64(x.ID), 10), Clean(x.Type), strconv.FormatUint(uint64(x.Program), 10)})
	}
	p.table("><>", rows)
	p.extent(b.Extent)
	return p.err
}

// Probes is the answer to "what has been hooked into the kernel's code?".
type Probes struct {
	Extent
	Probes []kernel.Probe `json:"probes"`
}

// AskProbes lists kprobes, and users of ftrace and tracepoints.
func AskProbes(ctx context.Context, v *kernel.View, _ []string) (Probes, error) {
	return probes(ctx, v.Probes())
}

// AskUprobes lists probes in programs.
func AskUprobes(ctx context.Context, v *kernel.View, _ []string) (Probes, error) {
	return probes(ctx, v.Uprobes())
}

// AskLSM lists the hooks of the security modules.
func AskLSM(ctx context.Context, v *kernel.View, _ []string) (Probes, error) {
	return probes(ctx, v.LSMHooks())
}

func probes(ctx context.Context, seq iter.Seq2[kernel.Probe, error]) (x Probes, err error) {
	x.Probes, err = gather(ctx, &x.Extent, seq)
	return x, err
}

// Text prints a table.
func (a Probes) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"KIND", "PLACE", "CALLS", "STATE"}}
	for _, x := range a.Probes {
		state := "on"
		if x.Disabled {
			state = "off"
		}
		rows = append(rows, []string{x.Kind, Clean(x.Place), Clean(x.Function), state})
	}
	p.table("<<<<", rows)
	p.extent(a.Extent)
	return p.err
}

// Host is the answer to "how was this kernel started?".
type Host struct {
	Extent
	Host kernel.Host `json:"host"`
}

// AskHost tells what the kernel says of itself as a whole.
func AskHost(ctx context.Context, v *kernel.View, _ []string) (h Host, err error) {
	h.Extent = now(ctx)
	h.Host, err = v.Host()
	return h, err
}

// Text prints it in lines.
func (a Host) Text(w io.Writer) error {
	p, h := &printer{w: w}, a.Host
	taint := "no"
	if h.Tainted != 0 {
		taint = fmt.Sprintf("%d (%s)", h.Tainted, kernel.Taint(h.Tainted))
	}
	rows := [][]string{{"command line", Clean(h.CommandLine)}, {"tainted", taint}, {"booted", h.Boot.Format(time.RFC3339)}, {"clock", h.Now.Format(time.RFC3339)},
		{"up", Round(h.Uptime)}, {"ticks", fmt.Sprintf("%d per second", h.TicksPerSec)}, {"security modules", Clean(strings.Join(h.LSMs, ", "))}}
	for _, s := range h.Swaps {
		rows = append(rows, []string{"swap", fmt.Sprintf("%s, %s of %s used, priority %d", Clean(s.Path), Bytes(s.Used), Bytes(s.Size), s.Priority)})
	}
	p.table("<<", rows)
	p.extent(a.Extent)
	return p.err
}
