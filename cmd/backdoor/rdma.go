package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// rdmaVerbs are those that need -rdma.
func rdmaVerbs() []verb { return []verb{watchVerb, readVerb, writeVerb, casVerb, restoreVerb} }

// rdmaFlags are those that lead to an agent by RDMA.
func (o *options) rdmaFlags(fs *flag.FlagSet) {
	fs.StringVar(&o.rdma, "rdma", "", "`host` of an agent whose memory and orders to reach by RDMA, with leases that the agent of -host or the context gives")
	fs.StringVar(&o.rdmaKey, "rdma-key", "", "`file` with a key of the agent's configuration, to do without Redfish")
	fs.StringVar(&o.rdmaLocal, "rdma-local", "", "our own `address` for RDMA (default: that which leads to the agent)")
}

// operator is who findings, repairs, the journal and the host's power are asked of: an agent over Redfish or over RDMA.
type operator interface {
	Findings(context.Context) (query.Findings, error)
	Finding(ctx context.Context, id string) (detect.Finding, error)
	// Heal plans a repair, with a value if the action takes one that policy is not to give, or, without dryRun, carries one out; plan is what somebody has agreed to, if anybody was asked.
	Heal(ctx context.Context, finding, action string, value *heal.Value, dryRun bool, plan *heal.Plan, progress func(string)) (healed, error)
	// Undo has the latest repair of a finding taken back; the rest is as of Heal.
	Undo(ctx context.Context, finding string, dryRun bool, plan *heal.Plan, progress func(string)) (healed, error)
	Journal(ctx context.Context, from uint64) ([]journal.Record, error)
	PowerState(context.Context) (schema.PowerState, error)
	Reset(context.Context, schema.ResetType) error
	Name() string
	Close() error
}

// openOperator returns what the flags or the current context name.
func (e *env) openOperator(ctx context.Context) (operator, error) {
	if e.o.rdma != "" {
		r, err := e.openRDMA(ctx)
		if err != nil {
			return nil, err
		}
		return r, nil
	}
	a, err := e.openAgent(ctx)
	if err != nil {
		return nil, err
	}
	return a, nil
}

// rdma is an agent that is reached by RDMA, with leases over Redfish or with a key.
type rdma struct {
	addr netip.Addr
	dev  *roce.Device
	dial export.Dial
	stop context.CancelFunc
	done chan struct{}
	redf *client.Client // nil with a key
	own  bool           // its session was opened by this program and ends with it

	actions *export.Actions // opened when they are first asked for
}

// openRDMA opens a device of our own. It connects nowhere yet.
func (e *env) openRDMA(ctx context.Context) (*rdma, error) {
	if e.o.image != "" || e.o.mem != "" {
		return nil, &usageError{msg: "give one of -rdma, -image and -mem"}
	}
	addr, err := resolve(ctx, e.o.rdma)
	if err != nil {
		return nil, fmt.Errorf("-rdma %s: %w", e.o.rdma, err)
	}
	local := netip.Addr{}
	if e.o.rdmaLocal != "" {
		if local, err = netip.ParseAddr(e.o.rdmaLocal); err != nil {
			return nil, &usageError{msg: fmt.Sprintf("-rdma-local: %v", err)}
		}
	} else if local, err = localFor(addr); err != nil {
		return nil, fmt.Errorf("find our address towards %v: %w; give it with -rdma-local", addr, err)
	}
	r := &rdma{addr: addr, done: make(chan struct{})}
	var key export.Key
	if e.o.rdmaKey == "" {
		var at agentAt
		if r.redf, at, err = e.connect(ctx); err != nil {
			return nil, fmt.Errorf("leases are had over Redfish, or with -rdma-key: %w", err)
		}
		r.own = at.Token == ""
	} else {
		secret, err := e.readSecret(e.o.rdmaKey)
		if err != nil {
			return nil, err
		}
		user := e.o.user
		if user == "" {
			user = "admin"
		}
		if key, err = export.ParseKey(user, strings.TrimSpace(secret)); err != nil {
			return nil, err
		}
	}
	link, err := roce.ListenUDP(roce.UDPConfig{Addr: netip.AddrPortFrom(local, 0)})
	if err != nil {
		return nil, fmt.Errorf("open RDMA: %w; one program at a time uses it at an address, and no RDMA device of the kernel may: see -rdma-local", err)
	}
	if r.dev, err = roce.Open(link, roce.Config{}); err != nil {
		return nil, errors.Join(err, link.Close())
	}
	run, stop := context.WithCancel(context.Background())
	r.stop = stop
	go func() {
		defer close(r.done)
		_ = r.dev.Run(run) // who waits for something is told what is wrong with the device
	}()
	if r.redf == nil {
		r.dial = export.DialKey(r.dev, addr, key)
	} else {
		r.dial = export.DialLease(r.dev, addr, r.lease)
	}
	return r, nil
}

// resolve returns the address of a host.
func resolve(ctx context.Context, name string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		return a.Unmap(), nil
	}
	all, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return netip.Addr{}, err
	}
	return all[0].Unmap(), nil
}

// localFor returns the address that packets to a host leave from. It sends nothing.
func localFor(a netip.Addr) (netip.Addr, error) {
	c, err := net.Dial("udp", netip.AddrPortFrom(a, roce.Port).String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// lease asks the agent's Redfish service.
func (r *rdma) lease(ctx context.Context, q export.Request) (l export.Lease, err error) {
	in := client.RDMARequest{
		Kind: q.Kind.String(), Peer: q.Peer.String(), QPN: uint32(q.QPN), PSN: uint32(q.PSN), PathMTU: q.PathMTU, Length: q.Length, Write: q.Write, Atomic: q.Atomic,
	}
	if q.Kind == export.KindMemory {
		in.Start = fmt.Sprintf("%#x", q.Start)
	}
	got, err := r.redf.LeaseRDMA(ctx, in)
	if err != nil {
		return l, err
	}
	start, err1 := strconv.ParseUint(got.Start, 0, 64)
	length, err2 := strconv.ParseUint(got.Length, 0, 64)
	return export.Lease{
		ID: got.ID, Kind: q.Kind, QPN: roce.QPN(got.QPN), PSN: roce.PSN(got.PSN), PathMTU: got.PathMTU, Expires: got.Expires, Write: got.Write, Atomic: got.Atomic,
		RKey: roce.RKey(got.RKey), Addr: start, Length: length, MapKey: roce.RKey(got.MapKey), MapLength: uint64(got.MapLength),
	}, errors.Join(err1, err2)
}

// Name implements operator.
func (r *rdma) Name() string { return "rdma://" + r.addr.String() }

// Close implements operator.
func (r *rdma) Close() error {
	if r.actions != nil {
		_ = r.actions.Close() // the connection is given up anyhow
	}
	r.stop()
	<-r.done
	err := r.dev.Close()
	if r.own {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		err = errors.Join(err, r.redf.Close(ctx))
	}
	return err
}

// do asks over the action queue pair.
func (r *rdma) do(ctx context.Context, op string, args, result any, progress func(string)) (err error) {
	if r.actions == nil {
		if r.actions, err = export.OpenActions(ctx, r.dev, r.dial); err != nil {
			return rdmaError(err)
		}
	}
	return rdmaError(r.actions.Do(ctx, op, args, result, progress))
}

// rdmaError gives refusals their exit code.
func rdmaError(err error) error {
	var e *export.ActionError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, export.ErrDenied), errors.As(err, &e) && e.Code == "denied":
		return &codeError{exitDenied, err}
	case errors.As(err, &e) && e.Code == "not-attached":
		return &codeError{exitUnsure, err}
	}
	return err
}

// Findings implements operator.
func (r *rdma) Findings(ctx context.Context) (query.Findings, error) {
	var fs export.Findings
	err := r.do(ctx, export.OpFindings, nil, &fs, nil)
	return query.Findings(fs), err
}

// Finding implements operator.
func (r *rdma) Finding(ctx context.Context, id string) (detect.Finding, error) {
	fs, err := r.Findings(ctx)
	if err != nil {
		return detect.Finding{}, err
	}
	for _, f := range fs {
		if f.ID == id {
			return f, nil
		}
	}
	return detect.Finding{}, fmt.Errorf("there is no finding %q; see: backdoor findings -all", id)
}

// Heal implements operator.
func (r *rdma) Heal(ctx context.Context, finding, action string, value *heal.Value, dryRun bool, plan *heal.Plan, progress func(string)) (healed, error) {
	return r.carryOut(dryRun, plan, func(dryRun bool, agreed *heal.Plan, h *export.HealReply) error {
		if agreed != nil {
			action, value = agreed.Action, agreed.Value
		}
		return r.do(ctx, export.OpHeal, export.HealRequest{Finding: finding, Action: action, Value: value, DryRun: dryRun, Plan: agreed}, h, progress)
	})
}

// Undo implements operator.
func (r *rdma) Undo(ctx context.Context, finding string, dryRun bool, plan *heal.Plan, progress func(string)) (healed, error) {
	return r.carryOut(dryRun, plan, func(dryRun bool, agreed *heal.Plan, h *export.HealReply) error {
		return r.do(ctx, export.OpUndo, export.UndoRequest{Finding: finding, DryRun: dryRun, Plan: agreed}, h, progress)
	})
}

// carryOut has something planned or done. What is done is always a plan that was made before and is sent along: the agent refuses
// it if the host has moved on to something else.
func (r *rdma) carryOut(dryRun bool, plan *heal.Plan, ask func(dryRun bool, agreed *heal.Plan, h *export.HealReply) error) (healed, error) {
	var h export.HealReply
	if !dryRun && plan == nil {
		if err := ask(true, nil, &h); err != nil {
			return healed{}, err
		}
		if plan = h.Plan; plan == nil {
			return healed{}, errors.New("the agent sent no plan")
		}
		h = export.HealReply{}
	}
	var agreed *heal.Plan
	if !dryRun {
		agreed = export.Agreed(*plan)
	}
	err := ask(dryRun, agreed, &h)
	if err == nil && h.Outcome != nil && h.Outcome.Error != "" {
		err = errors.New(h.Outcome.Error)
	}
	return healed{h.Plan, h.Outcome}, err
}

// Journal implements operator: it reads all records from one on, and tells the agent what has come so far.
func (r *rdma) Journal(ctx context.Context, from uint64) ([]journal.Record, error) {
	records := []journal.Record{}
	for have := uint64(0); ; {
		var got export.JournalReply
		if err := r.do(ctx, export.OpJournal, export.JournalRequest{From: max(from, have+1), Have: have}, &got, nil); err != nil {
			return nil, err
		}
		if len(got.Records) == 0 {
			return records, nil
		}
		records = append(records, got.Records...)
		have = got.Records[len(got.Records)-1].Seq
	}
}

// PowerState implements operator. The agent tells no power state by RDMA.
func (r *rdma) PowerState(context.Context) (schema.PowerState, error) { return "", nil }

// rdmaPowerOps are the operations of package heal for Redfish's reset types.
var rdmaPowerOps = map[schema.ResetType]string{
	"On": "on", "ForceOff": "off", "PowerCycle": "cycle", "ForceRestart": heal.OrderReset, "Nmi": "nmi", "GracefulShutdown": "shutdown",
	"GracefulRestart": heal.OrderRestart, "PushPowerButton": heal.OrderButton, "Pause": heal.OrderPause, "Resume": heal.OrderResume,
}

// Reset implements operator.
func (r *rdma) Reset(ctx context.Context, t schema.ResetType) error {
	return r.do(ctx, export.OpPower, export.PowerRequest{Op: rdmaPowerOps[t]}, nil, nil)
}

// openRemote attaches to the kernel in the host's memory behind an agent.
func (e *env) openRemote(ctx context.Context) (source, error) {
	types, err := e.elsewhere()
	if err != nil {
		return nil, err
	}
	r, err := e.openRDMA(ctx)
	if err != nil {
		return nil, err
	}
	mem, err := export.OpenMemory(ctx, r.dev, r.dial, export.Request{})
	if err != nil {
		return nil, errors.Join(rdmaError(err), r.Close())
	}
	o := kernel.Options{Logger: slog.New(slog.DiscardHandler), Types: types}
	// The agent knows which kernel it is, moving or not; without its help all memory is searched.
	var st engine.State
	if r.do(ctx, export.OpState, nil, &st, nil) == nil && st.Kernel != nil && st.Phase == engine.Attached {
		o.Hint.Note, o.NoteOnly = st.Kernel.Note, true
	}
	img, err := kernel.Open(ctx, mem, o)
	if err != nil && o.NoteOnly {
		o.NoteOnly = false
		img, err = kernel.Open(ctx, mem, o)
	}
	if err != nil {
		return nil, errors.Join(&codeError{exitUnsure, fmt.Errorf("find a kernel in the memory behind %s: %w", r.Name(), err)}, mem.Close(), r.Close())
	}
	return &memory{mem: remoteMemory{mem, r}, img: img, live: true}, nil
}

// remoteMemory closes the device as well.
type remoteMemory struct {
	hostmem.Memory
	r *rdma
}

func (m remoteMemory) Close() error { return errors.Join(m.Memory.Close(), m.r.Close()) }

var watchVerb = verb{
	name:  "watch",
	short: "follow the host's health by RDMA",
	long: `Reads the agent's health page by one RDMA READ every -interval, and prints what changes: verdict, phase, findings, CPUs that came to a
standstill. It needs -rdma, costs the agent no request, and goes on when the agent is away for a while. Ctrl-C ends it; -n ends it after
so many looks.

Exit status, with -n: as status.

  backdoor -rdma 10.77.0.2 watch
  backdoor -rdma 10.77.0.2 -json watch -n 1`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.DurationVar(&o.interval, "interval", time.Second, "`time` between two looks")
		fs.IntVar(&o.rows, "n", 0, "`number` of looks; 0 for no end")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if err := none("watch", args); err != nil {
			return 0, err
		}
		if e.o.rdma == "" {
			return 0, &usageError{verb: "watch", msg: "watch needs -rdma HOST"}
		}
		r, err := e.openRDMA(ctx)
		if err != nil {
			return 0, err
		}
		defer r.Close()
		p := export.NewPoller(r.dev, r.dial)
		defer p.Close()
		return e.watch(ctx, p)
	},
}

// watch polls a health page.
func (e *env) watch(ctx context.Context, p *export.Poller) (int, error) {
	code := exitUnsure
	var last string
	for n := 1; ; n++ {
		h, err := p.Health(ctx)
		if ctx.Err() != nil {
			return code, nil
		}
		var line string
		switch {
		case err != nil && e.o.rows > 0:
			return 0, rdmaError(err)
		case err != nil:
			line = "the agent does not answer: " + err.Error()
		default:
			code = map[export.Verdict]int{export.Healthy: exitOK, export.Ill: exitIll, export.CouldNotTell: exitUnsure}[h.Verdict]
			line = healthText(h)
		}
		switch {
		case e.o.json && err == nil:
			if err := e.jsonLine(h); err != nil {
				return 0, err
			}
		case line != last:
			if _, err := fmt.Fprintf(e.stdout, "%s  %s\n", time.Now().UTC().Format("15:04:05.000"), line); err != nil {
				return 0, err
			}
		}
		last = line
		if n == e.o.rows {
			return code, nil
		}
		if sleep(ctx, e.o.interval) != nil {
			return code, nil
		}
	}
}

// healthText is what of a health page is worth a line: what changes only when something happens.
func healthText(h export.Health) string {
	s := fmt.Sprintf("%v (%.0f %% sure), %v", h.Verdict, 100*h.Confidence, h.Phase)
	online := 0
	for _, c := range h.CPUs {
		if c.Online {
			online++
		}
	}
	s += fmt.Sprintf(", %d CPUs", online)
	for flag, text := range map[uint32]string{export.FlagDead: ", its kernel is dead", export.FlagHealing: ", a repair is under way"} {
		if h.Flags&flag != 0 {
			s += text
		}
	}
	for _, f := range h.Open {
		s += fmt.Sprintf("; %s: %s", query.Clean(f.ID), query.Clean(f.Title))
	}
	return s
}

// rawMemory opens a part of the host's memory for a verb that works on bytes.
func (e *env) rawMemory(ctx context.Context, name string, q export.Request) (remoteMemory, error) {
	if e.o.rdma == "" {
		return remoteMemory{}, &usageError{verb: name, msg: name + " needs -rdma HOST"}
	}
	r, err := e.openRDMA(ctx)
	if err != nil {
		return remoteMemory{}, err
	}
	mem, err := export.OpenMemory(ctx, r.dev, r.dial, q)
	if err != nil {
		return remoteMemory{}, errors.Join(rdmaError(err), r.Close())
	}
	return remoteMemory{mem, r}, nil
}

// head returns the number of the journal's newest record.
func (r *rdma) head(ctx context.Context) (uint64, error) {
	var got export.JournalReply
	err := r.do(ctx, export.OpJournal, export.JournalRequest{From: math.MaxUint64, Max: 1}, &got, nil)
	return got.Head, err
}

// stored returns the records of stores at an address that the journal has behind another record.
func (r *rdma) stored(ctx context.Context, pa, n, behind uint64) ([]uint64, error) {
	var got export.JournalReply
	if err := r.do(ctx, export.OpJournal, export.JournalRequest{From: behind + 1}, &got, nil); err != nil {
		return nil, fmt.Errorf("the store is done, but which record of the journal has what was there before is not known: %w", err)
	}
	out := []uint64{}
	for _, rec := range got.Records {
		var s struct {
			Addr hostmem.PhysAddr `json:"addr"`
		}
		if rec.Kind == export.RecordStore && json.Unmarshal(rec.Data, &s) == nil && uint64(s.Addr) >= pa && uint64(s.Addr) < pa+n {
			out = append(out, rec.Seq)
		}
	}
	return out, nil
}

// takeBack says how to undo stores.
func takeBack(records []uint64) string {
	if len(records) == 0 {
		return ""
	}
	s := "; take it back with: restore"
	for _, n := range slices.Backward(records) {
		s += " " + strconv.FormatUint(n, 10)
	}
	return s
}

// number reads an address or a word.
func number(name, text string) (uint64, error) {
	n, err := strconv.ParseUint(text, 0, 64)
	if err != nil {
		return 0, &usageError{verb: name, msg: fmt.Sprintf("%s: %q is no number; write it like 0x100000", name, text)}
	}
	return n, nil
}

const maxRaw = 1 << 30

var readVerb = verb{
	name:  "read",
	args:  "ADDRESS LENGTH",
	short: "bytes of the host's memory, by RDMA",
	long: `Reads physical memory as it is. Addresses that the host's kernel does not call RAM are refused. It needs -rdma and the right to read the
host's memory. To a terminal the bytes go as a hex dump, else as they are; -json has them in hexadecimal.

  backdoor -rdma 10.77.0.2 read 0x1000000 64
  backdoor -rdma 10.77.0.2 read 0x1000000 4096 > page`,
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) != 2 {
			return 0, &usageError{verb: "read", msg: "read takes an address and a length"}
		}
		pa, err := number("read", args[0])
		if err != nil {
			return 0, err
		}
		n, err := number("read", args[1])
		if err != nil {
			return 0, err
		}
		if n == 0 || n > maxRaw {
			return 0, &usageError{verb: "read", msg: fmt.Sprintf("read: want 1 to %d bytes", maxRaw)}
		}
		mem, err := e.rawMemory(ctx, "read", export.Request{Start: pa, Length: n})
		if err != nil {
			return 0, err
		}
		defer mem.Close()
		buf := make([]byte, min(n, 1<<20))
		for at := uint64(0); at < n; {
			part := buf[:min(uint64(len(buf)), n-at)]
			if _, err := mem.ReadAt(part, int64(pa+at)); err != nil {
				return 0, err
			}
			if err := e.bytes(pa+at, part); err != nil {
				return 0, err
			}
			at += uint64(len(part))
		}
		return exitOK, nil
	},
}

// bytes prints memory.
func (e *env) bytes(pa uint64, b []byte) error {
	if e.o.json {
		return e.jsonLine(map[string]string{"address": fmt.Sprintf("%#x", pa), "bytes": hex.EncodeToString(b)})
	}
	if f := file(e.stdout); f == nil || !isTerminal(f) {
		_, err := e.stdout.Write(b)
		return err
	}
	for i := 0; i < len(b); i += 16 {
		line := b[i:min(i+16, len(b))]
		text := strings.Map(func(r rune) rune {
			if r < 0x20 || r > 0x7e {
				return '.'
			}
			return r
		}, string(latin(line)))
		if _, err := fmt.Fprintf(e.stdout, "%016x  % -47x  %s\n", pa+uint64(i), line, text); err != nil {
			return err
		}
	}
	return nil
}

// latin takes each byte for a character.
func latin(b []byte) []rune {
	out := make([]rune, len(b))
	for i, c := range b {
		out[i] = rune(c)
	}
	return out
}

var writeVerb = verb{
	name:  "write",
	args:  "ADDRESS HEX",
	short: "store bytes in the host's memory, by RDMA: break-glass",
	long: `Stores bytes at a physical address. This is no repair: nothing is planned or compared, and a wrong byte may end the host.
It needs -rdma, the privilege BackdoorMemory and a range of the access agreement (rights.memory) that gives stores there. The agent's journal has the
old and the new bytes before they are stored: the answer names the records, and restore takes them back.

  backdoor -rdma 10.77.0.2 write 0x7ff0000 00000000 -y`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.yes, "y", false, "do not ask")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) != 2 {
			return 0, &usageError{verb: "write", msg: "write takes an address and bytes in hexadecimal"}
		}
		pa, err := number("write", args[0])
		if err != nil {
			return 0, err
		}
		b, err := hex.DecodeString(args[1])
		if err != nil || len(b) == 0 {
			return 0, &usageError{verb: "write", msg: fmt.Sprintf("write: %q is no bytes in hexadecimal", args[1])}
		}
		mem, err := e.rawMemory(ctx, "write", export.Request{Start: pa, Length: uint64(len(b)), Write: true})
		if err != nil {
			return 0, err
		}
		defer mem.Close()
		old := make([]byte, len(b))
		if _, err := mem.ReadAt(old, int64(pa)); err != nil {
			return 0, err
		}
		if ok, err := e.breakGlass(fmt.Sprintf("Replace %x by %x at %#x of the host behind %s?", old, b, pa, e.o.rdma)); !ok {
			return 0, err
		}
		w, ok := hostmem.AsWriter(mem.Memory)
		if !ok {
			return 0, errors.New("the agent gave a lease that cannot be written to")
		}
		head, err := mem.r.head(ctx)
		if err != nil {
			return 0, err
		}
		if _, err := w.WriteAt(b, int64(pa)); err != nil {
			return 0, err
		}
		records, err := mem.r.stored(ctx, pa, uint64(len(b)), head)
		if err != nil {
			return 0, err
		}
		return exitOK, e.answer(map[string]any{"address": fmt.Sprintf("%#x", pa), "old": hex.EncodeToString(old), "new": hex.EncodeToString(b), "records": records}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%#x: %x -> %x%s\n", pa, old, b, takeBack(records))
			return err
		})
	},
}

func (e *env) breakGlass(question string) (bool, error) {
	if e.o.yes {
		return true, nil
	}
	yes, err := e.confirm(question)
	if err == nil && !yes {
		err = errors.New("nothing was done")
	}
	return yes, err
}

var casVerb = verb{
	name:  "cas",
	args:  "ADDRESS OLD NEW",
	short: "compare and swap a word of the host's memory, by RDMA: break-glass",
	long: `Stores an 8-byte word at a physical address if it holds another, atomically against the host's CPUs. See write for what it needs; the range
must give atomic access.

Exit status: 0 swapped, 1 the word was another.

  backdoor -rdma 10.77.0.2 cas 0x7ff0000 0 1 -y`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.yes, "y", false, "do not ask")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) != 3 {
			return 0, &usageError{verb: "cas", msg: "cas takes an address, the word that is expected and the new one"}
		}
		var n [3]uint64
		for i := range n {
			var err error
			if n[i], err = number("cas", args[i]); err != nil {
				return 0, err
			}
		}
		mem, err := e.rawMemory(ctx, "cas", export.Request{Start: n[0], Length: 8, Atomic: true})
		if err != nil {
			return 0, err
		}
		defer mem.Close()
		if ok, err := e.breakGlass(fmt.Sprintf("Swap %#x for %#x at %#x of the host behind %s?", n[1], n[2], n[0], e.o.rdma)); !ok {
			return 0, err
		}
		s, ok := hostmem.AsSwapper(mem.Memory)
		if !ok {
			return 0, errors.New("the agent gave a lease without atomic operations")
		}
		head, err := mem.r.head(ctx)
		if err != nil {
			return 0, err
		}
		prev, err := s.CompareAndSwap(hostmem.PhysAddr(n[0]), n[1], n[2])
		if err != nil {
			return 0, err
		}
		code, records := exitError, []uint64{}
		if prev == n[1] {
			code = exitOK
			if records, err = mem.r.stored(ctx, n[0], 8, head); err != nil {
				return 0, err
			}
		}
		return code, e.answer(map[string]any{"found": fmt.Sprintf("%#x", prev), "swapped": prev == n[1], "records": records}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "found %#x, swapped: %v%s\n", prev, prev == n[1], takeBack(records))
			return err
		})
	},
}

var restoreVerb = verb{
	name:  "restore",
	args:  "RECORD...",
	short: "take back what write or cas stored, by RDMA",
	long: `Puts back the bytes that were there before a store, which a record of the agent's journal of kind rdma-store has, if what was stored is
still there. The agent's executor does it, one record after the other, with records of its own; it needs what write needs, and a kernel of the
host that the agent is attached to. Several stores to one place are taken back from the latest on.

Exit status: 0 all are taken back, 3 memory holds something else by now, 5 denied.

  backdoor -rdma 10.77.0.2 restore 1207 -y`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.yes, "y", false, "do not ask")
	},
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		if len(args) == 0 {
			return 0, &usageError{verb: "restore", msg: "restore takes the numbers of records; see: backdoor journal"}
		}
		var records []uint64
		for _, a := range args {
			n, err := number("restore", a)
			if err != nil {
				return 0, err
			}
			records = append(records, n)
		}
		if e.o.rdma == "" {
			return 0, &usageError{verb: "restore", msg: "restore needs -rdma HOST"}
		}
		if ok, err := e.breakGlass(fmt.Sprintf("Put back what was at the places of records %v of the host behind %s?", records, e.o.rdma)); !ok {
			return 0, err
		}
		r, err := e.openRDMA(ctx)
		if err != nil {
			return 0, err
		}
		defer r.Close()
		for _, n := range records {
			var o heal.Outcome
			if err := r.do(ctx, export.OpRestore, export.RestoreRequest{Record: n}, &o, nil); err != nil {
				var refused *export.ActionError
				if errors.As(err, &refused) && refused.Code == "stale" {
					return 0, &codeError{exitIll, fmt.Errorf("restore %d: %w", n, err)}
				}
				return 0, fmt.Errorf("restore %d: %w", n, err)
			}
			if err := e.answer(o, func(w io.Writer) error { return outcomeText(w, o) }); err != nil {
				return 0, err
			}
		}
		return exitOK, nil
	},
}
