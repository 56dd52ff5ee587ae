package host

import (
	"bufio"
	"cmp"
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

	"github.com/backdoor-rhs/backdoor/agent/dump"
	"github.com/backdoor-rhs/backdoor/agent/engine"
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
	dumpDmesg     = "Dmesg"
	dumpMemory    = "MemoryRange"
	dumpRecording = "Recording"
)

// dumps is the diagnostic data that was collected: files in a directory, and what is known of them in memory.
type dumps struct {
	mu   sync.Mutex
	last uint64      // Id given last; guarded by mu
	all  []collected // the oldest first; guarded by mu

	// All cores of a kernel share one budget.
	img    *kernel.Image  // guarded by mu
	budget hostmem.Memory // of img's memory; guarded by mu
}

// collected is one piece of diagnostic data: a file, or a core, which is read from the host's memory when it is downloaded.
type collected struct {
	id, oemType, what string
	path              string     // empty for a core
	core              *dump.Core // nil for a file
	boot              string     // of a core: the boot of the kernel that it is of
	media, name       string     // as a download
	size              int64
	made              time.Time
	trouble           string // why the last download of a core broke off; guarded by dumps.mu
}

// standard is the DiagnosticDataType.
func (d *collected) standard() string {
	if d.core != nil {
		return "OS"
	}
	return "OEM"
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
		DiagnosticDataDetails: []schema.DiagnosticDataDetails{{DiagnosticDataType: "OS"}, {DiagnosticDataType: "OEM", OEMDiagnosticDataType: dumpDmesg},
			{DiagnosticDataType: "OEM", OEMDiagnosticDataType: dumpRecording}},
	})
	// Who may read raw memory may look at parts of it all the more. What a core takes beyond that, collectCore checks.
	reader := service.Privileges{{service.ConfigureComponents, PrivilegeReadMemory}, {service.ConfigureComponents, PrivilegeMemory}}
	routes[0].Actions = []service.Action{
		{
			Name: "LogService.CollectDiagnosticData", Privileges: reader,
			Parameters: []service.Property{
				{Name: "DiagnosticDataType", Kind: service.String, Required: true, Values: []string{"OS", "OEM"}},
				{Name: "OEMDiagnosticDataType", Kind: service.String, Values: []string{dumpDmesg, dumpRecording}},
			},
			Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
				const action = "LogService.CollectDiagnosticData"
				if v.String("DiagnosticDataType") == "OS" {
					if v.Has("OEMDiagnosticDataType") {
						return nil, service.Because(400, "ActionParameterValueConflict", "OEMDiagnosticDataType goes with the DiagnosticDataType OEM only.", "OEMDiagnosticDataType", v.String("OEMDiagnosticDataType"))
					}
					return h.collectCore(r)
				}
				if !v.Has("OEMDiagnosticDataType") {
					return nil, service.Because(400, "ActionParameterMissing", "The DiagnosticDataType OEM takes an OEMDiagnosticDataType.", action, "OEMDiagnosticDataType")
				}
				if v.String("OEMDiagnosticDataType") == dumpRecording {
					return h.collectRecording(r, "")
				}
				return h.collect(r, collected{oemType: dumpDmesg, what: "kernel log of the host", media: "text/plain; charset=utf-8", name: "dmesg.txt"}, h.writeDmesg)
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
			Name: "BackdoorLogService.CollectRecording", OEM: true, Title: "Collect the series of samples by which a finding was judged", Privileges: reader,
			Parameters: []service.Property{{Name: "Finding", Kind: service.String, Required: true, Min: 1, Max: 64}},
			Do: func(r *service.Request, v service.Values) (*service.Reply, error) {
				return h.collectRecording(r, v.String("Finding"))
			},
		},
		{
			Name: "LogService.ClearLog", Privileges: reader,
			Do: func(*service.Request, service.Values) (*service.Reply, error) {
				h.dumps.mu.Lock()
				defer h.dumps.mu.Unlock()
				var errs []error
				for _, d := range h.dumps.all {
					errs = append(errs, d.remove())
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
func (h *host) collect(r *service.Request, d collected, write func(context.Context, io.Writer, func(percent int)) error) (*service.Reply, error) {
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

// collectCore lays out a core of the host's memory, all of it. It is not kept: whoever downloads it has it read.
func (h *host) collectCore(r *service.Request) (*service.Reply, error) {
	if err := mayHaveCore(r.Caller); err != nil {
		return nil, err
	}
	if err := h.o.Agent.MayRead(); err != nil {
		return nil, refusal(err)
	}
	const what = "core of the host's memory (vmcore)"
	return r.Task("Collect the "+what, func(ctx context.Context, t *service.Task) (*service.Reply, error) {
		ctx, cancel := context.WithTimeout(ctx, dumpTimeout)
		defer cancel()
		t.Progress(1, "The layout of the host's memory is read.")
		core, boot, err := h.core(ctx)
		if err != nil {
			return nil, refusal(err)
		}
		for _, ram := range core.RAM() {
			if err := h.o.Agent.MayLease(ram, false); err != nil {
				return nil, refusal(err)
			}
		}
		d := h.take(collected{what: what + fmt.Sprintf(", %d MiB of RAM as it is when it is downloaded", core.Size()>>20), core: core, boot: boot, size: core.Size(), name: "vmcore"})
		return &service.Reply{Status: 201, Location: dumpURI + "/Entries/" + d.id}, nil
	})
}

func mayHaveCore(c service.Caller) error {
	if !c.May(PrivilegeMemory) {
		return service.Because(403, "InsufficientPrivilege", "The host's memory as a whole is for who has the privilege "+PrivilegeMemory+".")
	}
	return nil
}

// coreRate is how much of the host's memory cores take together, in bytes/s: DMA competes with the host's own CPUs for its memory's bandwidth.
const coreRate = 128 << 20

// core lays out a core of the host that is watched, and tells which boot of it that is.
func (h *host) core(ctx context.Context) (*dump.Core, string, error) {
	k := h.o.Agent.State().Kernel
	if k == nil {
		return nil, "", engine.ErrNotAttached
	}
	if h.o.Core != nil {
		c, err := h.o.Core(ctx)
		return c, k.BootID, err
	}
	v, err := h.o.Agent.View(ctx)
	if err != nil {
		return nil, "", err
	}
	img := v.Image()
	if err := img.Prove(ctx); errors.Is(err, kernel.ErrGone) {
		return nil, "", err
	}
	s, err := dump.Of(v)
	if err != nil {
		return nil, "", err
	}
	h.dumps.mu.Lock()
	if h.dumps.img != img {
		h.dumps.img, h.dumps.budget = img, hostmem.Budget(img.Memory(), coreRate)
	}
	s.Memory = h.dumps.budget
	h.dumps.mu.Unlock()
	c, err := dump.New(s)
	return c, img.Info().BootID, err
}

// keep writes a dump's file and takes it in; the oldest give way.
func (h *host) keep(d collected, write func(io.Writer) error) (_ collected, err error) {
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
	d.size = info.Size()
	return h.take(d), nil
}

// take takes in what was collected; the oldest gives way.
func (h *host) take(d collected) collected {
	s := &h.dumps
	s.mu.Lock()
	defer s.mu.Unlock()
	total := d.kept()
	for _, old := range s.all {
		total += old.kept()
	}
	for len(s.all) > 0 && (len(s.all) >= maxDumps || total > maxDumpBytes) {
		total -= s.all[0].kept()
		_ = s.all[0].remove() // a file that is already gone takes no place
		s.all = s.all[1:]
	}
	s.last++
	d.id, d.made = strconv.FormatUint(s.last, 10), h.now()
	s.all = append(s.all, d)
	return d
}

// kept is how many bytes are kept on the agent's disk.
func (d *collected) kept() int64 {
	if d.core != nil {
		return 0
	}
	return d.size
}

func (d *collected) remove() error {
	if d.core != nil {
		return nil
	}
	return os.Remove(d.path)
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

// collectRecording collects the series by which a finding was judged; of no finding, the series as it is.
func (h *host) collectRecording(r *service.Request, finding string) (*service.Reply, error) {
	what := "series of samples by which the host is judged now"
	if finding != "" {
		what = "series of samples by which " + finding + " was judged"
	}
	d := collected{oemType: dumpRecording, what: what, media: "application/gzip", name: cmp.Or(finding, "now") + ".json.gz"}
	return h.collect(r, d, func(ctx context.Context, w io.Writer, _ func(int)) error {
		b, err := h.o.Agent.Recording(ctx, finding)
		if err == nil {
			_, err = w.Write(b)
		}
		return err
	})
}

func (h *host) collectMemory(r *service.Request, v service.Values) (*service.Reply, error) {
	start, err := address(v, "Start", "BackdoorLogService.CollectMemoryRange")
	if err != nil {
		return nil, err
	}
	want := hostmem.Range{Start: start, Size: uint64(v.Int("Length"))}
	d := collected{oemType: dumpMemory, what: fmt.Sprintf("%d bytes of the host's memory from %#x on", want.Size, uint64(start)), name: fmt.Sprintf("memory-%#x.bin", uint64(start))}
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
			e := &schema.LogEntry{
				Resource:  schema.Resource{Name: "Diagnostic data"},
				EntryType: "Oem", OEMRecordFmt: "Backdoor diagnostic data", Created: schema.Time(d.made), Severity: schema.HealthOK,
				Message: "The " + d.what + ".", MessageID: "BackdoorHost.1.0.DiagnosticData", MessageArgs: []string{d.what},
				DiagnosticDataType: d.standard(), OEMDiagnosticDataType: d.oemType,
				AdditionalDataURI: dumpURI + "/Attachments/" + d.id, AdditionalDataSize: d.size,
			}
			if d.trouble != "" {
				e.Severity, e.Resolution = schema.HealthWarning, "The last download broke off: "+d.trouble+"."
			}
			return e, nil
		},
	}, nil
}

// downloadDump sends what was collected to who may have collected it, as long as the agreement still permits reading.
func (h *host) downloadDump(r *service.Request) (*service.File, error) {
	if !r.Caller.May(PrivilegeReadMemory) && !r.Caller.May(PrivilegeMemory) {
		return nil, service.Because(403, "InsufficientPrivilege", "Diagnostic data is for who has the privilege "+PrivilegeReadMemory+".")
	}
	if err := h.o.Agent.MayRead(); err != nil {
		return nil, refusal(err)
	}
	h.dumps.mu.Lock()
	defer h.dumps.mu.Unlock()
	i := slices.IndexFunc(h.dumps.all, func(d collected) bool { return d.id == r.Param("dump") })
	if i < 0 {
		return nil, service.ErrNotFound
	}
	d := h.dumps.all[i]
	if d.core != nil {
		if err := mayHaveCore(r.Caller); err != nil {
			return nil, err
		}
		f := &coreFile{SectionReader: io.NewSectionReader(d.core, 0, d.size), h: h, d: d, ctx: r.Context()}
		err := f.permitted()
		if errors.Is(err, kernel.ErrGone) {
			return nil, service.Because(410, "ResourceMissingAtURI", sentence(err)+" Collect another.", dumpURI+"/Attachments/"+d.id)
		}
		if err != nil {
			return nil, refusal(err)
		}
		return &service.File{Content: f, Type: d.media, Name: d.name, Made: d.made}, nil
	}
	f, err := os.Open(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, service.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	return &service.File{Content: f, Type: d.media, Name: d.name, Made: d.made}, nil
}

// coreFile is a core as a download. Each read looks whether the agreement still permits it and the host still runs the kernel that the core is
// of: the parts of two boots would make no sense together.
type coreFile struct {
	*io.SectionReader
	h   *host
	d   collected
	ctx context.Context
}

func (f *coreFile) permitted() error {
	for _, ram := range f.d.core.RAM() {
		if err := f.h.o.Agent.MayLease(ram, false); err != nil {
			return err
		}
	}
	if k := f.h.o.Agent.State().Kernel; k == nil || k.BootID != f.d.boot {
		return fmt.Errorf("%w: the core is of a kernel that the host no longer runs", kernel.ErrGone)
	}
	return nil
}

func (f *coreFile) Read(b []byte) (int, error) {
	err := f.ctx.Err()
	if err == nil {
		err = f.permitted()
	}
	if err != nil {
		f.broke(err)
		return 0, err
	}
	n, err := f.SectionReader.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		f.broke(err)
	}
	return n, err
}

// broke notes why a download breaks off: HTTP has no place for it once a file is under way.
func (f *coreFile) broke(err error) {
	if f.ctx.Err() != nil {
		return // the client has gone
	}
	f.h.dumps.mu.Lock()
	defer f.h.dumps.mu.Unlock()
	for i := range f.h.dumps.all {
		if f.h.dumps.all[i].id == f.d.id {
			f.h.dumps.all[i].trouble = err.Error()
		}
	}
}

func (f *coreFile) Close() error { return nil }
