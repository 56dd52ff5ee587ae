package host

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	dumpURI = systemURI + "/LogServices/Dump"

	maxDumps     = 16
	maxDumpBytes = 64 << 20 // of all that is kept
	maxRange     = 16 << 20 // of memory in one collection
	dumpTimeout  = 5 * time.Minute
)

// The OEM types of diagnostic data.
const (
	dumpDmesg  = "Dmesg"
	dumpMemory = "MemoryRange"
)

// dumps is the diagnostic data that was collected: files in a directory, and what is known of them in memory.
type dumps struct {
	mu   sync.Mutex
	last uint64 // Id given last; guarded by mu
	all  []dump // the oldest first; guarded by mu
}

type dump struct {
	id, oemType, what string
	path              string
	media, name       string // as a download
	size              int64
	made              time.Time
}

// collecting are the routes of the log service that collects diagnostic data from the host's memory. It may be looked at under the
// access agreement's right to read, and only by who has the privilege for it.
func (h *host) collecting() []service.Route {
	if h.o.DumpDir == "" {
		return nil
	}
	clearDumps(h.o.DumpDir)
	routes := h.log(dumpURI, h.dumpEntries, schema.LogService{
		Resource:     schema.Resource{Name: "Diagnostic data", Description: "Data that was collected from the host's memory, the oldest first; it is gone when the agent restarts"},
		LogEntryType: "OEM", LogPurposes: []string{"Diagnostic"}, OverWritePolicy: "WrapsWhenFull", MaxNumberOfRecords: maxDumps,
	})
	reader := service.Privileges{{service.ConfigureComponents, PrivilegeReadMemory}}
	routes[0].Actions = []service.Action{
		{
			Name: "LogService.CollectDiagnosticData", Privileges: reader,
			Parameters: []service.Property{
				{Name: "DiagnosticDataType", Kind: service.String, Required: true, Values: []string{"OEM"}},
				{Name: "OEMDiagnosticDataType", Kind: service.String, Required: true, Values: []string{dumpDmesg}},
			},
			Do: func(r *service.Request, _ service.Values) (*service.Reply, error) {
				return h.collect(r, dump{oemType: dumpDmesg, what: "kernel log of the host", media: "text/plain; charset=utf-8", name: "dmesg.txt"}, h.writeDmesg)
			},
		},
		{
			Name: "BackdoorLogService.CollectMemoryRange", OEM: true, Title: "Collect a range of the host's memory", Privileges: reader,
			Parameters: []service.Property{
				{Name: "Start", Kind: service.String, Required: true, Min: 1, Max: 20},
				{Name: "Length", Kind: service.Number, Required: true, Min: 1, Max: maxRange},
			},
			Do: h.collectMemory,
		},
		{
			Name: "LogService.ClearLog", Privileges: reader,
			Do: func(*service.Request, service.Values) (*service.Reply, error) {
				h.dumps.mu.Lock()
				defer h.dumps.mu.Unlock()
				var errs []error
				for _, d := range h.dumps.all {
					errs = append(errs, os.Remove(d.path))
				}
				h.dumps.all = nil
				return nil, errors.Join(errs...)
			},
		},
	}
	return append(routes, service.Route{
		URI: dumpURI + "/Attachments/{dump}", Type: schema.TypeLogEntry,
		Download: h.downloadDump,
	})
}

// clearDumps removes what an earlier run of the agent has left, as far as it can be removed.
func clearDumps(dir string) {
	old, err := filepath.Glob(filepath.Join(dir, "*.dump"))
	if err != nil {
		return // the directory's name is no pattern; then nothing is there either
	}
	for _, path := range old {
		_ = os.Remove(path)
	}
}

// collect has the data written as a task, whose monitor ends with the Location of the new entry.
func (h *host) collect(r *service.Request, d dump, write func(context.Context, io.Writer, func(percent int)) error) (*service.Reply, error) {
	if err := h.o.Agent.MayRead(); err != nil {
		return nil, refusal(err)
	}
	return r.Task("Collect the "+d.what, func(ctx context.Context, t *service.Task) (*service.Reply, error) {
		ctx, cancel := context.WithTimeout(ctx, dumpTimeout)
		defer cancel()
		t.Progress(1, "The "+d.what+" is read.")
		d, err := h.keep(d, func(w io.Writer) error { return write(ctx, w, func(percent int) { t.Progress(percent, "") }) })
		if err != nil {
			return nil, refusal(err)
		}
		return &service.Reply{Status: 201, Location: dumpURI + "/Entries/" + d.id}, nil
	})
}

// keep writes a dump's file and takes it in; the oldest give way.
func (h *host) keep(d dump, write func(io.Writer) error) (_ dump, err error) {
	if err := os.MkdirAll(h.o.DumpDir, 0o700); err != nil {
		return d, fmt.Errorf("keep diagnostic data: %w", err)
	}
	d.path = filepath.Join(h.o.DumpDir, rand.Text()+".dump")
	f, err := os.OpenFile(d.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return d, fmt.Errorf("keep diagnostic data: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(d.path) // the first error is the one that matters
		}
	}()
	w := bufio.NewWriterSize(f, 64<<10)
	if err := errors.Join(write(w), w.Flush(), f.Close()); err != nil {
		return d, err
	}
	info, err := os.Stat(d.path)
	if err != nil {
		return d, fmt.Errorf("keep diagnostic data: %w", err)
	}
	d.size, d.made = info.Size(), h.now()
	s := &h.dumps
	s.mu.Lock()
	defer s.mu.Unlock()
	total := d.size
	for _, old := range s.all {
		total += old.size
	}
	for len(s.all) > 0 && (len(s.all) >= maxDumps || total > maxDumpBytes) {
		total -= s.all[0].size
		_ = os.Remove(s.all[0].path) // a file that is already gone takes no place
		s.all = s.all[1:]
	}
	s.last++
	d.id = strconv.FormatUint(s.last, 10)
	s.all = append(s.all, d)
	return d, nil
}

// writeDmesg writes the kernel log as dmesg(1) does.
func (h *host) writeDmesg(ctx context.Context, w io.Writer, _ func(int)) error {
	v, err := h.view(ctx)
	if err != nil {
		return err
	}
	log, err := query.Dmesg(ctx, v, query.DmesgOptions{})
	if err != nil {
		return err
	}
	for _, rec := range log.Records {
		if _, err := fmt.Fprintf(w, "<%d>[%12.6f] %s\n", uint(rec.Facility)<<3|uint(rec.Level), rec.Time.Seconds(), rec.Text); err != nil {
			return err
		}
	}
	return nil
}

func (h *host) collectMemory(r *service.Request, v service.Values) (*service.Reply, error) {
	start, err := address(v, "Start", "BackdoorLogService.CollectMemoryRange")
	if err != nil {
		return nil, err
	}
	want := hostmem.Range{Start: start, Size: uint64(v.Int("Length"))}
	d := dump{oemType: dumpMemory, what: fmt.Sprintf("%d bytes of the host's memory from %#x on", want.Size, uint64(start)), name: fmt.Sprintf("memory-%#x.bin", uint64(start))}
	return h.collect(r, d, func(ctx context.Context, w io.Writer, progress func(int)) error {
		return h.writeMemory(ctx, w, want, progress)
	})
}

// writeMemory copies a range of the host's RAM. What the host's kernel does not call RAM is not touched: reading a device's
// registers may do something.
func (h *host) writeMemory(ctx context.Context, w io.Writer, want hostmem.Range, progress func(int)) error {
	if err := h.o.Agent.MayLease(want, false); err != nil {
		return err
	}
	mem, ram, err := h.memory(ctx)
	if err != nil {
		return err
	}
	if !within(ram, want) {
		return notRAM(want)
	}
	buf := make([]byte, 256<<10)
	for done := uint64(0); done < want.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(uint64(len(buf)), want.Size-done)
		if _, err := mem.ReadAt(buf[:n], int64(uint64(want.Start)+done)); err != nil {
			return fmt.Errorf("read the host's memory at %#x: %w", uint64(want.Start)+done, err)
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		done += n
		progress(int(99 * done / want.Size))
	}
	return nil
}

// memory opens the host's memory.
func (h *host) memory(ctx context.Context) (io.ReaderAt, []hostmem.Range, error) {
	if h.o.Memory != nil {
		return h.o.Memory(ctx)
	}
	v, err := h.o.Agent.View(ctx)
	if err != nil {
		return nil, nil, err
	}
	img := v.Image()
	if err := img.Prove(ctx); errors.Is(err, kernel.ErrGone) {
		return nil, nil, err
	}
	return img.Memory(), img.RAM(), nil
}

func (h *host) dumpEntries(*service.Request) (service.Listing, error) {
	h.dumps.mu.Lock()
	all := slices.Clone(h.dumps.all)
	h.dumps.mu.Unlock()
	return service.Listing{
		Len: len(all),
		ID:  func(i int) string { return all[i].id },
		At: func(i int) (schema.Object, error) {
			d := all[i]
			return &schema.LogEntry{
				Resource:  schema.Resource{Name: "Diagnostic data"},
				EntryType: "Oem", OEMRecordFmt: "Backdoor diagnostic data", Created: schema.Time(d.made), Severity: schema.HealthOK,
				Message: "The " + d.what + ".", MessageID: "BackdoorHost.1.0.DiagnosticData", MessageArgs: []string{d.what},
				DiagnosticDataType: "OEM", OEMDiagnosticDataType: d.oemType,
				AdditionalDataURI: dumpURI + "/Attachments/" + d.id, AdditionalDataSize: d.size,
			}, nil
		},
	}, nil
}

// downloadDump sends a dump's file to who may have collected it, as long as the agreement still permits reading.
func (h *host) downloadDump(r *service.Request) (*service.File, error) {
	if !r.Caller.May(PrivilegeReadMemory) {
		return nil, service.Because(403, "InsufficientPrivilege", "Diagnostic data is for who has the privilege "+PrivilegeReadMemory+".")
	}
	if err := h.o.Agent.MayRead(); err != nil {
		return nil, refusal(err)
	}
	h.dumps.mu.Lock()
	defer h.dumps.mu.Unlock()
	i := slices.IndexFunc(h.dumps.all, func(d dump) bool { return d.id == r.Param("dump") })
	if i < 0 {
		return nil, service.ErrNotFound
	}
	d := h.dumps.all[i]
	f, err := os.Open(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, service.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	return &service.File{Content: f, Type: d.media, Name: d.name, Made: d.made}, nil
}
