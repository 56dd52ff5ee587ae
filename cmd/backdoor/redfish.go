package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// eventsIdle is how long events that have been kept may be silent before they are taken to be all.
const eventsIdle = 2 * time.Second

var eventsVerb = verb{
	name:  "events",
	short: "what happened to the host and to the agent",
	long: `The events that the agent still keeps are listed, the oldest first; with -f those that come are, too, until it is interrupted. The
connection may break: what has come meanwhile is not missed. -filter takes an expression of Redfish's, -after the ID of the last event seen.

  backdoor events -f
  backdoor events -f -filter "RegistryPrefix eq 'BackdoorHost'"`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.follow, "f", false, "go on with what comes")
		fs.StringVar(&o.filter, "filter", "", "only events that fit the `expression`")
		fs.StringVar(&o.after, "after", "", "only events behind the one with this `ID`")
	},
	run: runEvents,
}

func runEvents(ctx context.Context, e *env, args []string) (int, error) {
	if err := none("events", args); err != nil {
		return 0, err
	}
	a, err := e.openAgent(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	idle := &time.Timer{}
	if !e.o.follow {
		idle = time.AfterFunc(eventsIdle, cancel)
		defer idle.Stop()
	}
	after := e.o.after
	if after == "" {
		after = "all-0" // no start of the agent's has this name, so it stands for all that is kept
	}
	err = a.c.Events(ctx, client.EventOptions{Filter: e.o.filter, After: after}, func(ev schema.Event) error {
		if !e.o.follow {
			idle.Reset(eventsIdle)
		}
		for _, r := range ev.Events {
			if e.o.json {
				if err := e.jsonLine(r); err != nil {
					return err
				}
				continue
			}
			severity := cmp.Or(string(r.MessageSeverity), "-")
			id := r.MessageID[strings.LastIndexByte(r.MessageID, '.')+1:]
			if _, err := fmt.Fprintf(e.stdout, "%s  %-8s %-22s %s  [%s]\n", query.Clean(r.EventTimestamp), query.Clean(severity), query.Clean(id), query.Clean(r.Message), query.Clean(ev.ID)); err != nil {
				return err
			}
		}
		return nil
	})
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return exitOK, nil
	}
	return exitOK, e.explain(a.at, err)
}

var metricsVerb = verb{
	name:  "metrics",
	args:  "[REPORT]",
	short: "what the agent measures of the host and of itself",
	long: `The latest metric reports, or the one that is named.

  backdoor metrics
  backdoor metrics Host`,
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) > 1 {
			return 0, &usageError{verb: "metrics", msg: "metrics takes the ID of one report"}
		}
		a, err := e.openAgent(ctx)
		if err != nil {
			return 0, err
		}
		defer a.Close()
		var reports []schema.MetricReport
		for m, err := range client.Members[schema.MetricReport](ctx, a.c, "/redfish/v1/TelemetryService/MetricReports") {
			if err != nil {
				return 0, e.explain(a.at, err)
			}
			if len(args) == 0 || m.ID == args[0] {
				reports = append(reports, m)
			}
		}
		if len(reports) == 0 && len(args) > 0 {
			return 0, fmt.Errorf("there is no metric report %q", args[0])
		}
		return exitOK, e.answer(reports, func(w io.Writer) error {
			l := &lines{w: w}
			for _, m := range reports {
				l.printf("%s  %s\n", query.Clean(m.Name), query.Clean(m.Timestamp))
				for _, v := range m.MetricValues {
					l.printf("  %-24s %s\n", query.Clean(v.MetricID), query.Clean(v.MetricValue))
				}
			}
			return l.err
		})
	},
}

var collectVerb = verb{
	name:  "collect",
	args:  "dmesg|memory ADDRESS LENGTH|vmcore|recording [FINDING]|list|get ID",
	words: []string{"dmesg", "memory", "vmcore", "recording", "list", "get"},
	short: "diagnostic data of the host, as files",
	long: `The agent collects the data as a task and keeps it until it restarts; the file is then downloaded. A download that breaks off goes on where
it was, also when it is called again with get: what has come so far is in FILE.ID-TIME.part.

  dmesg      the kernel's log
  memory     a range of the host's RAM, by its physical address
  vmcore     all of the host's RAM as an ELF core, for crash, drgn, makedumpfile and backdoor itself; it takes the privilege BackdoorMemory
  recording  the samples by which a finding was judged when it was told of, or those of now, for backdoor policy test; the agent keeps those of the
             latest 32 findings on its disk
  list       what the agent keeps
  get        download it (again)

A vmcore is not kept by the agent but read from the host while it is downloaded, at most 128 MiB a second. That of a host that runs is not of one moment;
stop the host before (backdoor power pause, where its service processor can) or take it of one that is dead.

  backdoor collect dmesg -o dmesg.txt
  backdoor collect memory 0x100000 1048576 -o ram.bin
  backdoor collect vmcore -o vmcore && backdoor -image vmcore ps
  backdoor collect recording memory-hog-3 -o hog.json.gz && backdoor policy test policy.json hog.json.gz`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.StringVar(&o.output, "o", "", "`file` to write to")
	},
	run: runCollect,
}

func runCollect(ctx context.Context, e *env, args []string) (int, error) {
	want := map[string]int{"dmesg": 1, "memory": 3, "vmcore": 1, "recording": 2, "list": 1, "get": 2}[args[0]]
	if len(args) != want && !(args[0] == "recording" && len(args) == 1) {
		return 0, &usageError{verb: "collect", msg: fmt.Sprintf("collect %s takes %d arguments", args[0], want-1)}
	}
	if (args[0] != "list") != (e.o.output != "") {
		return 0, &usageError{verb: "collect", msg: "say with -o where the data goes (list needs none)"}
	}
	var start uint64
	var length int64
	if args[0] == "memory" {
		var err error
		if start, length, err = span("collect", args[1], args[2]); err != nil {
			return 0, err
		}
	}
	a, err := e.openAgent(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	var entry *schema.LogEntry
	switch args[0] {
	case "dmesg":
		entry, err = a.c.CollectLog(ctx, e.progress)
	case "memory":
		entry, err = a.c.CollectMemory(ctx, start, length, e.progress)
	case "vmcore":
		entry, err = a.c.CollectCore(ctx, e.progress)
	case "recording":
		finding := ""
		if len(args) == 2 {
			finding = args[1]
		}
		entry, err = a.c.CollectRecording(ctx, finding, e.progress)
	case "get":
		entry = new(schema.LogEntry)
		if strings.ContainsAny(args[1], "/?#%") {
			return 0, &usageError{verb: "collect", msg: fmt.Sprintf("%q is no ID", args[1])}
		}
		err = a.c.Get(ctx, client.DumpURI+"/Entries/"+args[1], entry)
	case "list":
		entries := []schema.LogEntry{}
		for l, err := range client.Members[schema.LogEntry](ctx, a.c, client.DumpURI+"/Entries") {
			if err != nil {
				return 0, e.explain(a.at, err)
			}
			entries = append(entries, l)
		}
		return exitOK, e.answer(entries, func(w io.Writer) error {
			l := &lines{w: w}
			for _, d := range entries {
				l.printf("%4s  %s  %10d  %s\n", query.Clean(d.ID), query.Clean(d.Created), d.AdditionalDataSize, query.Clean(d.Message))
			}
			return l.err
		})
	}
	if err != nil {
		return 0, e.explain(a.at, err)
	}
	n, err := e.save(ctx, a.c, entry, e.o.output)
	if err != nil {
		var now schema.LogEntry
		if a.c.Get(ctx, entry.ODataID, &now) == nil && now.Severity != schema.HealthOK && now.Resolution != "" {
			err = fmt.Errorf("%w (%s)", err, query.Clean(now.Resolution))
		}
		return 0, fmt.Errorf("download entry %s to %s: %w; to go on: backdoor collect get %s -o %s", entry.ID, e.o.output, e.explain(a.at, err), entry.ID, e.o.output)
	}
	return exitOK, e.answer(map[string]any{"entry": entry.ID, "file": e.o.output, "bytes": n}, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s: %d bytes (entry %s)\n", e.o.output, n, query.Clean(entry.ID))
		return err
	})
}

// save downloads into a file, by way of another beside it with which a later call goes on. It returns the file's size.
func (e *env) save(ctx context.Context, c *client.Client, entry *schema.LogEntry, path string) (int64, error) {
	if entry.AdditionalDataURI == "" {
		return 0, errors.New("the entry has no data")
	}
	// Another entry may have the same ID once the agent has restarted.
	made := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, entry.Created)
	part := fmt.Sprintf("%s.%s-%s.part", path, filepath.Base(entry.ID), made)
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	w := &meter{Writer: f, e: e, done: st.Size(), total: entry.AdditionalDataSize}
	n, err := c.Resume(ctx, entry.AdditionalDataURI, st.Size(), w)
	if err != nil {
		return 0, err
	}
	if size := st.Size() + n; entry.AdditionalDataSize > 0 && size != entry.AdditionalDataSize {
		return 0, fmt.Errorf("%d of %d bytes have come", size, entry.AdditionalDataSize)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return 0, err
	}
	return st.Size() + n, os.Rename(part, path)
}

// meter shows people how a download comes on, every two seconds.
type meter struct {
	io.Writer
	e           *env
	done, total int64
	shown       time.Time
}

func (m *meter) Write(b []byte) (int, error) {
	n, err := m.Writer.Write(b)
	m.done += int64(n)
	if now := time.Now(); m.total > 0 && now.Sub(m.shown) > 2*time.Second {
		m.shown = now
		if f := file(m.e.stderr); f != nil && isTerminal(f) {
			fmt.Fprintf(m.e.stderr, "backdoor: %d of %d MiB, %d %%\n", m.done>>20, m.total>>20, 100*m.done/m.total)
		}
	}
	return n, err
}

// progress shows how a task comes on, to people.
func (e *env) progress(t schema.Task) {
	if f := file(e.stderr); f != nil && isTerminal(f) && t.PercentComplete != nil {
		fmt.Fprintf(e.stderr, "backdoor: task %s: %s, %d %%\n", query.Clean(t.ID), t.TaskState, *t.PercentComplete)
	}
}

// span reads an address and a length.
func span(verb, at, n string) (uint64, int64, error) {
	start, err := strconv.ParseUint(at, 0, 64)
	if err != nil {
		return 0, 0, &usageError{verb: verb, msg: fmt.Sprintf("%q is no physical address: write it like 0x100000", at)}
	}
	length, err := strconv.ParseInt(n, 0, 64)
	if err != nil || length <= 0 {
		return 0, 0, &usageError{verb: verb, msg: fmt.Sprintf("%q is no length in bytes", n)}
	}
	return start, length, nil
}

var memoryVerb = verb{
	name:  "memory",
	args:  "read ADDRESS LENGTH|write ADDRESS EXPECT PUT|cosign LEASE|leases",
	words: []string{"read", "write", "cosign", "leases"},
	short: "the host's memory, byte for byte",
	long: `Addresses are physical, within the host's RAM. Each call takes a lease of the range from the agent and ends it; it takes the privilege
BackdoorMemory, which no predefined role has, and the access agreement's consent. A write says in hexadecimal what must be there and what is to
be put there: it happens only if the first is so, goes through the agent's executor and is in its journal before it happens.
Where the agreement wants two persons for a write, -two-persons names the lease and waits until another account has cosigned it.

  backdoor memory read 0x100000 256
  backdoor memory read 0x100000 1048576 -o ram.bin
  backdoor memory write 0x1f3a2045 68 48 -y
  backdoor memory write 0x1f3a2045 68 48 -two-persons
  backdoor memory leases && backdoor memory cosign 7     # somebody else`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.StringVar(&o.output, "o", "", "`file` to write to, instead of showing the bytes")
		fs.BoolVar(&o.yes, "y", false, "do not ask")
		fs.BoolVar(&o.twoPersons, "two-persons", false, "wait until somebody else has cosigned the write's lease")
	},
	run: runMemory,
}

func runMemory(ctx context.Context, e *env, args []string) (int, error) {
	want := map[string]int{"read": 3, "write": 4, "cosign": 2, "leases": 1}[args[0]]
	if len(args) != want {
		return 0, &usageError{verb: "memory", msg: fmt.Sprintf("memory %s takes %d arguments", args[0], want-1)}
	}
	var at uint64
	var n int64
	var expect, put []byte
	var err error
	switch args[0] {
	case "read":
		at, n, err = span("memory", args[1], args[2])
	case "write":
		if expect, err = hex.DecodeString(args[2]); err == nil {
			put, err = hex.DecodeString(args[3])
		}
		if err != nil || len(expect) != len(put) || len(put) == 0 {
			return 0, &usageError{verb: "memory", msg: "what is expected and what is put there are the same number of bytes in hexadecimal, like 00ff"}
		}
		at, n, err = span("memory", args[1], strconv.Itoa(len(put)))
	}
	if err != nil {
		return 0, err
	}
	a, err := e.openAgent(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	switch args[0] {
	case "leases":
		return e.leases(ctx, a)
	case "cosign":
		if err := a.c.CosignLease(ctx, args[1]); err != nil {
			return 0, e.explain(a.at, err)
		}
		return exitOK, e.answer(map[string]string{"cosigned": args[1]}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "Cosigned lease %s: its holder may store under it.\n", query.Clean(args[1]))
			return err
		})
	}
	if put != nil && !e.o.yes {
		yes, err := e.confirm(fmt.Sprintf("Store %x in the place of %x at %#x of the host's memory?", put, expect, at))
		if err != nil {
			return 0, err
		}
		if !yes {
			return 0, errors.New("nothing was done")
		}
	}
	l, err := a.c.LeaseMemory(ctx, client.LeaseRequest{Start: at, Length: n, Seconds: 600, Write: put != nil})
	if err != nil {
		return 0, e.explain(a.at, err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = a.c.EndLease(ctx, l) // it ends by itself otherwise
	}()
	if put != nil && e.o.twoPersons {
		if err := e.second(ctx, a, l); err != nil {
			return 0, err
		}
	}
	if put != nil {
		if err := a.c.StoreMemory(ctx, l, at, expect, put); err != nil {
			return 0, e.explain(a.at, err)
		}
		if l, err = a.c.Lease(ctx, l.URI); err != nil || len(l.Stores) != 1 {
			return 0, fmt.Errorf("the bytes are stored, but what the agent notes of it cannot be read: %w", err)
		}
		return exitOK, e.answer(l.Stores[0], func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "Stored %d bytes at %s by %s (%s in the journal).\n", l.Stores[0].Bytes, query.Clean(l.Stores[0].Address), query.Clean(l.Stores[0].How), query.Clean(l.Stores[0].Plan))
			return err
		})
	}
	if e.o.output != "" {
		f, err := os.OpenFile(e.o.output, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return 0, err
		}
		err = a.c.ReadMemory(ctx, l, at, n, f)
		return exitOK, e.explain(a.at, errors.Join(err, f.Close()))
	}
	const most = 1 << 20
	if n > most {
		return 0, &usageError{verb: "memory", msg: fmt.Sprintf("%d bytes are too many to show; write them to a file with -o", n)}
	}
	var b bytes.Buffer
	if err := a.c.ReadMemory(ctx, l, at, n, &b); err != nil {
		return 0, e.explain(a.at, err)
	}
	return exitOK, e.answer(map[string]any{"address": fmt.Sprintf("%#x", at), "bytes": hex.EncodeToString(b.Bytes())}, func(w io.Writer) error {
		return hexDump(w, at, b.Bytes())
	})
}

// second waits until somebody else has said yes to stores under a lease.
func (e *env) second(ctx context.Context, a *agent, l *client.Lease) error {
	fmt.Fprintf(e.stderr, "Waiting for somebody else's word until %s: backdoor memory cosign %s\n", l.Expires.UTC().Format(time.RFC3339), query.Clean(l.ID))
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		now, err := a.c.Lease(ctx, l.URI)
		if err != nil {
			return fmt.Errorf("nobody has cosigned lease %s: %w", query.Clean(l.ID), e.explain(a.at, err))
		}
		if now.Second != "" {
			fmt.Fprintf(e.stderr, "Cosigned by %s.\n", query.Clean(now.Second))
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// hexDump prints bytes as hexdump -C does, with their addresses.
func hexDump(w io.Writer, at uint64, b []byte) error {
	l := &lines{w: w}
	for row := range slices.Chunk(b, 16) {
		text := slices.Clone(row)
		for i, c := range text {
			if c < ' ' || c > '~' {
				text[i] = '.'
			}
		}
		l.printf("%016x  %-48s |%s|\n", at, strings.TrimSpace(fmt.Sprintf("% x", row)), text)
		at += uint64(len(row))
	}
	return l.err
}

func (e *env) leases(ctx context.Context, a *agent) (int, error) {
	var out struct {
		Leases []struct {
			User, Start string
			Length      int64
			Write       bool
			Expires     time.Time
			Second      string `json:",omitempty"`
			Stores      []client.LeaseStore
			Lease       schema.Link
		}
	}
	if err := a.get(ctx, client.LeasesURI, &out); err != nil {
		return 0, err
	}
	return exitOK, e.answer(out.Leases, func(w io.Writer) error {
		l := &lines{w: w}
		if len(out.Leases) == 0 {
			l.printf("Nobody has a lease of the host's memory.\n")
		}
		for _, x := range out.Leases {
			how := "reads"
			if x.Write {
				how = fmt.Sprintf("writes (%d stores)", len(x.Stores))
			}
			if x.Second != "" {
				how += ", cosigned by " + query.Clean(x.Second)
			}
			l.printf("%-4s %-16s %s+%#x  %s, until %s\n", query.Clean(path.Base(x.Lease.ID)), query.Clean(x.User), query.Clean(x.Start), x.Length, how, x.Expires.UTC().Format(time.RFC3339))
		}
		return l.err
	})
}

var tasksVerb = verb{
	name:  "tasks",
	args:  "[ID|cancel ID]",
	short: "what the agent works on for its operators",
	long: `The tasks of the agent and how they stand; one with all its messages if it is named.

  backdoor tasks
  backdoor tasks 4 -f
  backdoor tasks cancel 4`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.follow, "f", false, "wait until it has ended")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		const uri = "/redfish/v1/TaskService/Tasks"
		if len(args) > 2 || len(args) == 2 && args[0] != "cancel" || len(args) > 0 && strings.ContainsAny(args[len(args)-1], "/?#%") {
			return 0, &usageError{verb: "tasks", msg: "tasks takes the ID of one task, or cancel and an ID"}
		}
		a, err := e.openAgent(ctx)
		if err != nil {
			return 0, err
		}
		defer a.Close()
		switch len(args) {
		case 2:
			return exitOK, e.explain(a.at, a.c.Delete(ctx, uri+"/"+args[1]))
		case 1:
			task := new(schema.Task)
			if e.o.follow {
				task, err = a.c.Wait(ctx, uri+"/"+args[0], e.progress)
			} else {
				err = a.c.Get(ctx, uri+"/"+args[0], task)
			}
			var ended *client.TaskError
			if err != nil && !errors.As(err, &ended) {
				return 0, e.explain(a.at, err)
			}
			if aerr := e.answer(task, func(w io.Writer) error { return taskText(w, true, *task) }); aerr != nil {
				return 0, aerr
			}
			return exitOK, err
		}
		tasks := []schema.Task{}
		for t, err := range client.Members[schema.Task](ctx, a.c, uri) {
			if err != nil {
				return 0, e.explain(a.at, err)
			}
			tasks = append(tasks, t)
		}
		return exitOK, e.answer(tasks, func(w io.Writer) error { return taskText(w, false, tasks...) })
	},
}

func taskText(w io.Writer, messages bool, tasks ...schema.Task) error {
	l := &lines{w: w}
	for _, t := range tasks {
		percent := "  -"
		if t.PercentComplete != nil {
			percent = fmt.Sprintf("%3d", *t.PercentComplete)
		}
		l.printf("%6s  %s %%  %-10s %s  %s\n", query.Clean(t.ID), percent, query.Clean(string(t.TaskState)), query.Clean(t.StartTime), query.Clean(t.Name))
		for _, m := range t.Messages {
			if messages {
				l.printf("        %s\n", query.Clean(m.Message))
			}
		}
	}
	return l.err
}

var redfishVerb = verb{
	name:  "redfish",
	args:  "get|post|patch|delete URI [JSON]",
	words: []string{"get", "post", "patch", "delete"},
	short: "any resource or action of the service, as it is",
	long: `The answer is the service's own JSON. Of a POST that becomes a task the end is waited for. Everything that the service has can be done
this way: accounts and roles, subscriptions, certificates, the boot override, virtual media.

  backdoor redfish get "/redfish/v1/Systems/system?$select=Boot"
  backdoor redfish patch /redfish/v1/Systems/system '{"Boot":{"BootSourceOverrideEnabled":"Once","BootSourceOverrideTarget":"Pxe"}}'
  backdoor redfish post /redfish/v1/AccountService/Roles '{"RoleId":"Memory","AssignedPrivileges":["Login","ConfigureComponents"],"OemPrivileges":["BackdoorMemory"]}'`,
	run: runRedfish,
}

func runRedfish(ctx context.Context, e *env, args []string) (int, error) {
	body := args[0] == "post" || args[0] == "patch"
	if len(args) < 2 || len(args) > 3 || len(args) == 3 && !body || args[0] == "patch" && len(args) != 3 {
		return 0, &usageError{verb: "redfish", msg: "redfish takes a method and an URI; post and patch a JSON object besides"}
	}
	var in any
	if len(args) == 3 {
		if !json.Valid([]byte(args[2])) {
			return 0, &usageError{verb: "redfish", msg: "the body is not valid JSON"}
		}
		in = json.RawMessage(args[2])
	}
	a, err := e.openAgent(ctx)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	var out json.RawMessage
	resp, err := a.c.Do(ctx, strings.ToUpper(args[0]), args[1], in, &out)
	if err != nil {
		return 0, e.explain(a.at, err)
	}
	if resp.Status == http.StatusAccepted {
		var task schema.Task
		if err := json.Unmarshal(out, &task); err != nil || task.ODataID == "" {
			return 0, errors.New("the service answers 202 Accepted without a task")
		}
		done, err := a.c.Wait(ctx, task.ODataID, e.progress)
		if done != nil {
			if err := e.json(done); err != nil {
				return 0, err
			}
		}
		return exitOK, e.explain(a.at, err)
	}
	if len(out) == 0 {
		return exitOK, nil
	}
	return exitOK, e.json(out)
}
