package host

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

const (
	leasesURI = "/redfish/v1/Systems/system/Oem/" + oem.Identifier + "/MemoryLeases"

	maxLeases     = 16
	maxUserLeases = 4
	maxLease      = 1 << 30 // bytes of RAM in one
	maxLeaseTime  = 3600    // seconds
	maxStore      = hostmem.PageSize
	maxStores     = 64 // that a lease remembers, to undo them
)

// leases are the windows into the host's RAM that operators have been lent: each has an owner, a range and an end. They are gone
// when the agent restarts, when the host runs another kernel, and when the agreement no longer permits reading.
type leases struct {
	mu   sync.Mutex // guards what follows
	last uint64
	all  []*lease
}

type lease struct {
	id      string
	user    string
	at      hostmem.Range
	write   bool
	boot    string // boot ID of the kernel that it is about
	made    time.Time
	expires time.Time
	stores  []heldStore // guarded by leases.mu
	second  string      // who has said yes to stores, too; guarded by leases.mu
}

// heldStore is one store under a lease.
type heldStore struct {
	leaseStore
	old, put heal.Bytes
}

type (
	// leaseOEM is a lease as it is shown, in the list and as a resource.
	leaseOEM struct {
		Lease   *schema.Link `json:"lease" doc:"The link to the lease."`
		User    string       `json:"user" doc:"Who it was given to."`
		Start   string       `json:"start" doc:"The physical address of the first byte, as 0x and hexadecimal digits."`
		Length  int64        `json:"length" doc:"The number of bytes."`
		Write   bool         `json:"write" doc:"Whether it permits stores."`
		Made    time.Time    `json:"made" doc:"When it was given."`
		Expires time.Time    `json:"expires" doc:"When it ends by itself."`
		DataURI string       `json:"dataURI" doc:"Where the bytes are read: byte 0 is at the lease's start, and parts are had by the Range header."`
		Second  string       `json:"second,omitempty" doc:"Who else has said yes to stores under the lease; absent if nobody has."`
		Stores  []leaseStore `json:"stores" doc:"The stores under the lease, the oldest first."`
	}
	leaseStore struct {
		At      time.Time `json:"at" doc:"When it was done."`
		Address string    `json:"address" doc:"The physical address, as 0x and hexadecimal digits."`
		Bytes   int64     `json:"bytes" doc:"How many bytes were stored."`
		How     string    `json:"how" doc:"By which means: compare-and-swap or read-compare-write-verify."`
		Plan    string    `json:"plan" doc:"The Id of its plan in the journal."`
		Undone  bool      `json:"undone" doc:"Whether it was taken back."`
	}
)

// leasesResource is the resource …/Oem/dev_backdoor/MemoryLeases.
type leasesResource struct {
	schema.Resource
	Leases oem.Value[[]leaseOEM] `doc:"The leases that are running."`
}

// leaseResource is the resource …/Oem/dev_backdoor/MemoryLeases/{id}.
type leaseResource struct {
	schema.Resource
	Lease oem.Value[leaseOEM] `doc:"The lease."`
}

var (
	leasesSchema = oem.Schema{
		Name: "BackdoorMemoryLeases", Version: "v1_0_0", Purpose: "The leases of the host's memory.", Resource: leasesResource{},
		URIs: []string{"/redfish/v1/Systems/{ComputerSystemId}/Oem/" + oem.Identifier + "/MemoryLeases"},
	}
	leaseSchema = oem.Schema{
		Name: "BackdoorMemoryLease", Version: "v1_0_0", Purpose: "A lease of a range of the host's memory.", Resource: leaseResource{}, Deletable: true,
		URIs: []string{"/redfish/v1/Systems/{ComputerSystemId}/Oem/" + oem.Identifier + "/MemoryLeases/{BackdoorMemoryLeaseId}"},
	}
	// leaseActions are actions on the system.
	leaseActions = []oem.Action{
		{
			Name: "LeaseMemory", Bound: "ComputerSystem.v1_0_0.OemActions",
			Description: "Lends a range of the host's RAM to the caller for a time. The answer's location is the lease.",
			Parameters: []oem.Parameter{
				{Name: "Start", Type: "Edm.String", Required: true, Description: "The physical address of the first byte, as 0x and hexadecimal digits."},
				{Name: "Length", Type: "Edm.Int64", Required: true, Description: "The number of bytes."},
				{Name: "Seconds", Type: "Edm.Int64", Description: "How long the lease runs. If absent, one minute."},
				{Name: "Write", Type: "Edm.Boolean", Description: "Whether to permit stores as well; no two leases that do overlap."},
			},
		},
		{
			Name: "StoreMemory", Bound: "ComputerSystem.v1_0_0.OemActions",
			Description: "Stores bytes into the host's RAM under a lease, if the bytes that are expected are there.",
			Parameters: []oem.Parameter{
				{Name: "Lease", Type: "Edm.String", Required: true, Description: "The Id of the lease."},
				{Name: "Address", Type: "Edm.String", Required: true, Description: "The physical address of the first byte, as 0x and hexadecimal digits."},
				{Name: "Expect", Type: "Edm.String", Required: true, Description: "The bytes that must be there, in hexadecimal."},
				{Name: "Put", Type: "Edm.String", Required: true, Description: "As many bytes to put there, in hexadecimal."},
			},
		},
		{
			Name: "CosignLease", Bound: "ComputerSystem.v1_0_0.OemActions",
			Description: "Says yes to stores under somebody else's lease, where the access agreement takes two persons for them.",
			Parameters: []oem.Parameter{
				{Name: "Lease", Type: "Edm.String", Required: true, Description: "The Id of the lease."},
			},
		},
		{
			Name: "UndoStores", Bound: "ComputerSystem.v1_0_0.OemActions",
			Description: "Takes the stores under a lease back, the latest first. It stops at one whose bytes have changed since.",
			Parameters: []oem.Parameter{
				{Name: "Lease", Type: "Edm.String", Required: true, Description: "The Id of the lease."},
			},
		},
	}
)

// memoryActions are the actions on the system that concern leases.
func (h *host) memoryActions() []service.Action {
	raw := service.Privileges{{service.ConfigureComponents, PrivilegeMemory}}
	id := service.Property{Name: "Lease", Kind: service.String, Required: true, Min: 1, Max: 20}
	return []service.Action{
		{
			Name: "BackdoorComputerSystem.LeaseMemory", OEM: true, Title: "Lease a range of the host's memory", Privileges: raw,
			Parameters: []service.Property{
				{Name: "Start", Kind: service.String, Required: true, Min: 1, Max: 20},
				{Name: "Length", Kind: service.Number, Required: true, Min: 1, Max: maxLease},
				{Name: "Seconds", Kind: service.Number, Min: 1, Max: maxLeaseTime},
				{Name: "Write", Kind: service.Boolean},
			},
			Do: h.leaseMemory,
		},
		{
			Name: "BackdoorComputerSystem.StoreMemory", OEM: true, Title: "Store into the host's memory", Privileges: raw,
			Parameters: []service.Property{
				id, {Name: "Address", Kind: service.String, Required: true, Min: 1, Max: 20},
				{Name: "Expect", Kind: service.String, Required: true, Min: 2, Max: 2 * maxStore}, {Name: "Put", Kind: service.String, Required: true, Min: 2, Max: 2 * maxStore},
			},
			Do: h.storeMemory,
		},
		{Name: "BackdoorComputerSystem.CosignLease", OEM: true, Title: "Say yes to stores under a lease", Privileges: raw, Parameters: []service.Property{id}, Do: h.cosignLease},
		{Name: "BackdoorComputerSystem.UndoStores", OEM: true, Title: "Take stores back", Privileges: raw, Parameters: []service.Property{id}, Do: h.undoStores},
	}
}

// sweep drops the leases that have ended. The caller holds mu.
func (h *host) sweep() {
	k := h.o.Agent.State().Kernel
	now := h.now()
	h.leases.all = slices.DeleteFunc(h.leases.all, func(l *lease) bool { return !now.Before(l.expires) || k == nil || k.BootID != l.boot })
}

// held returns a caller's own lease, as long as it runs.
func (h *host) held(id string, c service.Caller) (*lease, error) {
	h.leases.mu.Lock()
	defer h.leases.mu.Unlock()
	h.sweep()
	i := slices.IndexFunc(h.leases.all, func(l *lease) bool { return l.id == id })
	switch {
	case i < 0:
		return nil, service.ErrNotFound
	case h.leases.all[i].user != c.User:
		return nil, service.Because(403, "InsufficientPrivilege", "The lease is somebody else's.")
	}
	return h.leases.all[i], nil
}

// address reads a physical address that a client has written.
func address(v service.Values, name, action string) (hostmem.PhysAddr, error) {
	n, err := strconv.ParseUint(v.String(name), 0, 64)
	if err != nil {
		return 0, service.Because(400, "ActionParameterValueFormatError", fmt.Sprintf("%s %q is no physical address: write it like \"0x100000\".", name, v.String(name)), v.String(name), name, action)
	}
	return hostmem.PhysAddr(n), nil
}

func (h *host) leaseMemory(r *service.Request, v service.Values) (*service.Reply, error) {
	const action = "BackdoorComputerSystem.LeaseMemory"
	start, err := address(v, "Start", action)
	if err != nil {
		return nil, err
	}
	write := v.Bool("Write")
	want := hostmem.Range{Start: start, Size: uint64(v.Int("Length"))}
	if err := h.o.Agent.MayLease(want, write); err != nil {
		return nil, refusal(err)
	}
	_, ram, err := h.memory(r.Context())
	if err != nil {
		return nil, refusal(err)
	}
	if !within(ram, want) {
		return nil, notRAM(want)
	}
	k := h.o.Agent.State().Kernel
	if k == nil {
		return nil, refusal(engine.ErrNotAttached)
	}
	seconds := v.Int("Seconds")
	if seconds == 0 {
		seconds = 60
	}
	h.leases.mu.Lock()
	defer h.leases.mu.Unlock()
	h.sweep()
	mine := 0
	for _, l := range h.leases.all {
		if l.user == r.Caller.User {
			mine++
		}
		if write && l.write && want.Start < l.at.End() && l.at.Start < want.End() {
			return nil, service.Because(409, "ResourceInUse", fmt.Sprintf("%s may store to a part of that range until %s.", l.user, schema.Time(l.expires)))
		}
	}
	if len(h.leases.all) >= maxLeases || mine >= maxUserLeases {
		return nil, service.Because(503, "ResourceExhaustion", "There are as many leases as there may be. End one, or wait until one ends.", leasesURI)
	}
	h.leases.last++
	l := &lease{
		id: strconv.FormatUint(h.leases.last, 10), user: r.Caller.User, at: want, write: write, boot: k.BootID,
		made: h.now(), expires: h.now().Add(time.Duration(seconds) * time.Second),
	}
	h.leases.all = append(h.leases.all, l)
	body := &leaseResource{Resource: schema.Resource{ID: l.id, Name: "Memory lease " + l.id, ODataID: leasesURI + "/" + l.id, ODataType: "#" + leaseSchema.Type("BackdoorMemoryLease")}, Lease: oem.Value[leaseOEM]{V: l.view()}}
	return &service.Reply{Status: 201, Location: leasesURI + "/" + l.id, Body: body}, nil
}

// within reports whether a range lies in one range of RAM.
func within(ram []hostmem.Range, want hostmem.Range) bool {
	return slices.ContainsFunc(ram, func(r hostmem.Range) bool { return r.Contains(want.Start, want.Size) })
}

func notRAM(want hostmem.Range) error {
	return service.Because(400, "ActionParameterValueConflict", fmt.Sprintf("The %d bytes from %#x on are not all within one range of the host's RAM.", want.Size, uint64(want.Start)),
		"Start", fmt.Sprintf("%#x", uint64(want.Start)))
}

// view is the lease as it is shown. The caller holds leases.mu.
func (l *lease) view() leaseOEM {
	out := leaseOEM{
		Lease: schema.LinkTo(leasesURI + "/" + l.id), User: l.user, Start: fmt.Sprintf("%#x", uint64(l.at.Start)), Length: int64(l.at.Size), Write: l.write,
		Made: l.made, Expires: l.expires, DataURI: leasesURI + "/" + l.id + "/Data", Stores: []leaseStore{}, Second: l.second,
	}
	for _, s := range l.stores {
		out.Stores = append(out.Stores, s.leaseStore)
	}
	return out
}

func (h *host) storeMemory(r *service.Request, v service.Values) (*service.Reply, error) {
	const action = "BackdoorComputerSystem.StoreMemory"
	at, err := address(v, "Address", action)
	if err != nil {
		return nil, err
	}
	var expect, put heal.Bytes
	for _, p := range []struct {
		name string
		to   *heal.Bytes
	}{{"Expect", &expect}, {"Put", &put}} {
		if *p.to, err = hex.DecodeString(v.String(p.name)); err != nil {
			return nil, service.Because(400, "ActionParameterValueFormatError", p.name+" is not bytes in hexadecimal: write it like \"00ff\".", v.String(p.name), p.name, action)
		}
	}
	if len(expect) != len(put) {
		return nil, service.Because(400, "ActionParameterValueConflict", fmt.Sprintf("%d bytes are expected and %d are to be put there.", len(expect), len(put)), "Put", v.String("Put"))
	}
	l, err := h.held(v.String("Lease"), r.Caller)
	if errors.Is(err, service.ErrNotFound) {
		return nil, noLease(v.String("Lease"))
	}
	switch {
	case err != nil:
		return nil, err
	case !l.write:
		return nil, service.Because(403, "InsufficientPrivilege", "The lease is for reading only.")
	case !l.at.Contains(at, uint64(len(put))):
		return nil, service.Because(400, "ActionParameterValueConflict", fmt.Sprintf("The %d bytes from %#x on are not all within the lease.", len(put), uint64(at)), "Address", v.String("Address"))
	}
	h.leases.mu.Lock()
	full := len(l.stores) >= maxStores
	h.leases.mu.Unlock()
	if full {
		return nil, service.Because(503, "ResourceExhaustion", "The lease has had as many stores as can be taken back. Take another.", leasesURI+"/"+l.id)
	}
	done, err := h.store(r, l, at, expect, put, "an operator has asked for it")
	if err != nil {
		return nil, err
	}
	h.leases.mu.Lock()
	defer h.leases.mu.Unlock()
	l.stores = append(l.stores, done)
	return nil, nil
}

// cosignLease notes that a second person agrees to the stores under a lease.
func (h *host) cosignLease(r *service.Request, v service.Values) (*service.Reply, error) {
	h.leases.mu.Lock()
	defer h.leases.mu.Unlock()
	h.sweep()
	i := slices.IndexFunc(h.leases.all, func(l *lease) bool { return l.id == v.String("Lease") })
	switch {
	case i < 0:
		return nil, noLease(v.String("Lease"))
	case h.leases.all[i].user == r.Caller.User:
		return nil, service.Because(403, "InsufficientPrivilege", "The lease is yours: somebody else must say yes.")
	case !h.leases.all[i].write:
		return nil, service.Because(409, "ResourceInUse", "The lease is for reading only.")
	}
	h.leases.all[i].second = r.Caller.User
	return nil, nil
}

func noLease(id string) error {
	return service.Because(404, "ResourceNotFound", fmt.Sprintf("There is no lease %q, or it has ended. The leases are listed at %s.", id, leasesURI), "BackdoorMemoryLease", id)
}

// store has the engine store.
func (h *host) store(r *service.Request, l *lease, at hostmem.PhysAddr, expect, put heal.Bytes, why string) (heldStore, error) {
	h.leases.mu.Lock()
	second := l.second
	h.leases.mu.Unlock()
	o, err := h.o.Agent.Store(r.Context(), engine.StoreRequest{Second: second, Addr: at, Expect: expect, Put: put, Why: why + " (lease " + l.id + ")", Caller: r.Caller.User})
	if err != nil {
		return heldStore{}, refusal(err)
	}
	how := ""
	if len(o.Steps) > 0 {
		how = o.Steps[0].How
	}
	return heldStore{leaseStore{At: o.Finished, Address: fmt.Sprintf("%#x", uint64(at)), Bytes: int64(len(put)), How: how, Plan: o.Plan.ID}, expect, put}, nil
}

func (h *host) undoStores(r *service.Request, v service.Values) (*service.Reply, error) {
	l, err := h.held(v.String("Lease"), r.Caller)
	if errors.Is(err, service.ErrNotFound) {
		return nil, noLease(v.String("Lease"))
	}
	if err != nil {
		return nil, err
	}
	h.leases.mu.Lock()
	stores := slices.Clone(l.stores)
	h.leases.mu.Unlock()
	for i, s := range slices.Backward(stores) {
		if s.Undone {
			continue
		}
		at, err := strconv.ParseUint(s.Address, 0, 64)
		if err != nil {
			return nil, err // it was written by us
		}
		if _, err := h.store(r, l, hostmem.PhysAddr(at), s.put, s.old, "the store of "+s.Plan+" is taken back"); err != nil {
			return nil, err
		}
		h.leases.mu.Lock()
		l.stores[i].Undone = true
		h.leases.mu.Unlock()
	}
	return nil, nil
}

func (h *host) leaseRoutes() []service.Route {
	raw := func(c service.Caller) error {
		if !c.May(PrivilegeMemory) {
			return service.Because(403, "InsufficientPrivilege", "The host's memory is for who has the privilege "+PrivilegeMemory+".")
		}
		return nil
	}
	return []service.Route{
		{
			URI: leasesURI, Type: leasesSchema.Type("BackdoorMemoryLeases"),
			Get: func(*service.Request) (schema.Object, error) {
				h.leases.mu.Lock()
				defer h.leases.mu.Unlock()
				h.sweep()
				views := []leaseOEM{}
				for _, l := range h.leases.all {
					views = append(views, l.view())
				}
				return &leasesResource{Resource: schema.Resource{Name: "Memory leases"}, Leases: oem.Value[[]leaseOEM]{V: views}}, nil
			},
		},
		{
			URI: leasesURI + "/{lease}", Type: leaseSchema.Type("BackdoorMemoryLease"),
			Get: func(r *service.Request) (schema.Object, error) {
				h.leases.mu.Lock()
				defer h.leases.mu.Unlock()
				h.sweep()
				for _, l := range h.leases.all {
					if l.id == r.Param("lease") {
						return &leaseResource{Resource: schema.Resource{Name: "Memory lease " + l.id}, Lease: oem.Value[leaseOEM]{V: l.view()}}, nil
					}
				}
				return nil, service.ErrNotFound
			},
			// Everybody may end what is their own, and who administers the agent may end all.
			Delete: func(r *service.Request) error {
				h.leases.mu.Lock()
				defer h.leases.mu.Unlock()
				h.sweep()
				i := slices.IndexFunc(h.leases.all, func(l *lease) bool { return l.id == r.Param("lease") })
				switch {
				case i < 0:
					return service.ErrNotFound
				case h.leases.all[i].user != r.Caller.User && !r.Caller.May(service.ConfigureManager):
					return service.Because(403, "InsufficientPrivilege", "The lease is somebody else's.")
				}
				h.leases.all = slices.Delete(h.leases.all, i, i+1)
				return nil
			},
		},
		{
			URI: leasesURI + "/{lease}/Data", Type: leaseSchema.Type("BackdoorMemoryLease"),
			Download: func(r *service.Request) (*service.File, error) {
				if err := raw(r.Caller); err != nil {
					return nil, err
				}
				l, err := h.held(r.Param("lease"), r.Caller)
				if err != nil {
					return nil, err
				}
				if err := h.o.Agent.MayLease(l.at, false); err != nil {
					return nil, refusal(err)
				}
				mem, ram, err := h.memory(r.Context())
				if err != nil {
					return nil, refusal(err)
				}
				if !within(ram, l.at) {
					return nil, notRAM(l.at)
				}
				w := &window{h: h, l: l, caller: r.Caller, ctx: r.Context(), mem: mem}
				return &service.File{Content: w, Name: fmt.Sprintf("memory-%#x.bin", uint64(l.at.Start))}, nil
			},
		},
	}
}

// window reads a lease's range. Each read looks whether the lease still runs and the agreement still permits it.
type window struct {
	h      *host
	l      *lease
	caller service.Caller
	ctx    context.Context
	mem    io.ReaderAt
	at     int64
}

func (w *window) Read(b []byte) (int, error) {
	if w.at >= int64(w.l.at.Size) {
		return 0, io.EOF
	}
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	if _, err := w.h.held(w.l.id, w.caller); err != nil {
		return 0, fmt.Errorf("read under lease %s: %w", w.l.id, err)
	}
	if err := w.h.o.Agent.MayLease(w.l.at, false); err != nil {
		return 0, err
	}
	n := min(int64(len(b)), int64(w.l.at.Size)-w.at)
	got, err := w.mem.ReadAt(b[:n], int64(w.l.at.Start)+w.at)
	w.at += int64(got)
	return got, err
}

func (w *window) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += w.at
	case io.SeekEnd:
		off += int64(w.l.at.Size)
	}
	if off < 0 {
		return 0, errors.New("seek before the lease's start")
	}
	w.at = off
	return off, nil
}

func (w *window) Close() error { return nil }
