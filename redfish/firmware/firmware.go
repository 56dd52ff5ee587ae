// Package firmware updates the agent's own machine over Redfish: it puts signed bundles into slots, and shows the slots as an inventory.
package firmware

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/redfish/oem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

// Options say what an Updater works with.
type Options struct {
	Disk    *slot.Disk
	Running slot.Name // what the machine was started from
	// Epoch is the security epoch that the machine's TPM keeps; nil where there is none. The disk's own counts as well.
	Epoch func() (uint32, error)
	// Loader is the version of the machine's loader; 0 if it is not known.
	Loader uint32
	// Restart has the machine started again; it returns before that.
	Restart func(context.Context) error
	// Parts are the resources that run the image, such as the manager.
	Parts  []schema.Link
	Now    func() time.Time
	Logger *slog.Logger
}

// An Updater installs bundles into the slot that does not run. It is a service.Updater.
type Updater struct {
	o   Options
	run *bundle.Image // what runs
}

// ids are the Ids of the inventory.
var ids = map[slot.Name]string{slot.A: "slot-a", slot.B: "slot-b", slot.Golden: "recovery"}

// New reads what runs: its class of machine and product are what updates have to be for, and its keys are trusted. The loader has verified it
// before it ran; a machine that was not started by one has no Updater.
func New(o Options) (*Updater, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	at := o.Disk.Slot(o.Running)
	if at == nil {
		return nil, fmt.Errorf("updates: the machine was not started from a slot")
	}
	roots, _, _, _, err := bundle.Read(at)
	if err != nil {
		return nil, fmt.Errorf("updates: slot %s, which runs: %w", o.Running, err)
	}
	root, err := bundle.ReadRoots(roots)
	if err != nil {
		return nil, fmt.Errorf("updates: slot %s, which runs: %w", o.Running, err)
	}
	img, err := bundle.OpenAt(at, bundle.Policy{Root: root})
	if err != nil {
		return nil, fmt.Errorf("updates: slot %s, which runs: %w", o.Running, err)
	}
	return &Updater{o: o, run: img}, nil
}

// Policy is what the machine takes now.
func (u *Updater) Policy() (bundle.Policy, error) {
	s := u.o.Disk.State()
	p := bundle.Policy{
		Root: u.run.Root, MinRoot: s.Root, MinEpoch: s.Epoch, Product: u.run.Manifest.Product, Machine: u.run.Manifest.Machine, Loader: u.o.Loader,
		Now: u.o.Now(),
	}
	if p.Now.Before(u.run.Manifest.Released) {
		p.Now = u.run.Manifest.Released // the clock is wrong: it cannot be earlier than that
	}
	if u.o.Epoch != nil {
		e, err := u.o.Epoch()
		if err != nil {
			return p, fmt.Errorf("read the security epoch: %w", err)
		}
		p.MinEpoch = max(p.MinEpoch, e)
	}
	return p, nil
}

// MaxImage implements service.Updater.
func (u *Updater) MaxImage() int64 {
	return min(u.o.Disk.Slot(slot.A).Size(), u.o.Disk.Slot(slot.B).Size())
}

// describe is what an item of the inventory is, in words.
func describe(n slot.Name) string {
	if n == slot.Golden {
		return "Recovery image"
	}
	return "Slot " + strings.ToUpper(string(n))
}

// Inventory implements service.Updater.
func (u *Updater) Inventory(context.Context) ([]*schema.SoftwareInventory, error) {
	s := u.o.Disk.State()
	var all []*schema.SoftwareInventory
	yes, no := true, false
	is := func(b bool) *bool {
		if b {
			return &yes
		}
		return &no
	}
	for _, n := range []slot.Name{slot.A, slot.B, slot.Golden} {
		if u.o.Disk.Slot(n) == nil {
			continue
		}
		at := s.Slot(n)
		item := &schema.SoftwareInventory{
			Resource: schema.Resource{ID: ids[n], Name: describe(n)}, Version: at.Version, LowestSupportedVersion: s.Lowest, Manufacturer: "Backdoor",
			SoftwareID: u.run.Manifest.Product + "-" + u.run.Manifest.Machine, Updateable: n != slot.Golden, SizeBytes: at.Size, ResetRequired: is(n != slot.Golden),
			Active: is(n == u.o.Running), Staged: is(at.Status == slot.Staged || at.Status == slot.Trial && n != u.o.Running), Status: u.status(n, at),
		}
		if item.RelatedItem = u.o.Parts; n != u.o.Running {
			item.RelatedItem = nil
		}
		if n == u.o.Running {
			item.Version = u.run.Manifest.Version
			item.ReleaseDate = u.run.Manifest.Released.Format(time.RFC3339)
		}
		all = append(all, item)
	}
	return all, nil
}

func (u *Updater) status(n slot.Name, at *slot.Slot) *schema.Status {
	st := &schema.Status{State: schema.StateStandbyOffline, Health: schema.HealthOK}
	if n == u.o.Running {
		st.State = schema.StateEnabled
	}
	say := func(h schema.Health, id, text string) {
		st.Health = h
		st.Conditions = append(st.Conditions, schema.Condition{
			MessageID: "Update.1.3." + id, MessageArgs: []string{at.Version, ids[n]}, Message: text, Severity: h, Timestamp: u.o.Now().UTC().Format(time.RFC3339),
		})
	}
	switch at.Status {
	case slot.Empty:
		st.State, st.Health = schema.StateAbsent, ""
	case slot.Writing:
		st.State = schema.StateUpdating
		if at.Reason != "" {
			st.State = schema.StateDisabled
			say(schema.HealthWarning, "TransferFailed", "The last update broke off: "+at.Reason)
		}
	case slot.Trial:
		if n == u.o.Running {
			say(schema.HealthWarning, "AwaitToActivate", fmt.Sprintf("The image is on trial: it has not said yet that it is good. %s", at.Reason))
		}
	case slot.Bad:
		st.State = schema.StateDisabled
		say(schema.HealthCritical, "ActivateFailed", at.Reason)
	}
	if s := u.o.Disk.State(); at.Epoch != 0 && at.Epoch < s.Epoch {
		st.State = schema.StateDisabled
		say(schema.HealthWarning, "UpdateSkippedVersionTooLow", fmt.Sprintf("The image is below the security epoch: it has %d, and the machine takes %d or later.", at.Epoch, s.Epoch))
	}
	return st
}

// UpdateOEM is the Oem object of the UpdateService.
type UpdateOEM struct {
	Epoch    uint32 `json:"epoch" doc:"The lowest security epoch of an image that is taken."`
	Digest   string `json:"digest,omitempty" doc:"The SHA-256 of the manifest of an image whose upload broke off, in hexadecimal."`
	Received int64  `json:"received,omitempty" doc:"How many bytes of that image are there. An upload may go on from there, with a Content-Range in the header of the part UpdateFile."`
	Fallback string `json:"fallback,omitempty" doc:"Why another image runs than the one that was to run."`
}

// UpdateSchema describes it.
var UpdateSchema = oem.Schema{
	Name: "BackdoorUpdateService", Version: "v1_0_0", Purpose: "How the slots of the agent's machine stand.",
	Objects: map[string]any{"UpdateService": UpdateOEM{}},
}

// Configure gives a service its UpdateService.
func Configure(o *service.Options, u *Updater) {
	o.Updater = u
	s := service.Schema{Namespace: UpdateSchema.Name, Versions: []string{UpdateSchema.Version}, CSDL: UpdateSchema.CSDL, JSON: map[string]func() []byte{
		UpdateSchema.Name + "." + UpdateSchema.Version: func() []byte { versioned, _ := UpdateSchema.JSON(); return versioned }, // it describes no resource
	}}
	o.Schemas = append(o.Schemas, s)
}

// Settle ends the way back to what is below the image that runs, once it is good (slot.Disk.Settle).
func (u *Updater) Settle(context.Context) error {
	p, err := u.Policy()
	if err != nil {
		return err
	}
	p.Now = time.Time{} // what runs may be copied, whenever it was to be installed
	return u.o.Disk.Settle(u.o.Running, p)
}

// Describe implements service.Describer.
func (u *Updater) Describe(out *schema.UpdateService) error {
	s := u.o.Disk.State()
	v := UpdateOEM{Epoch: s.Epoch, Fallback: s.Fallback}
	if to, err := u.o.Disk.Target(u.o.Running); err == nil {
		if at := s.Slot(to); at.Status == slot.Writing && at.Written > 0 {
			v.Digest, v.Received = at.Digest, at.Written
		}
	}
	if s.Fallback != "" {
		out.Status.Health = schema.HealthWarning
	}
	var err error
	out.OEM, err = oem.Object(UpdateSchema.Type("UpdateService"), v)
	return err
}

// refusals are the messages of the Update registry for what a bundle can be refused for.
var refusals = map[bundle.Reason]struct {
	status int
	id     string
}{
	bundle.NotBundle:    {http.StatusBadRequest, "VerificationFailed"},
	bundle.Damaged:      {http.StatusBadRequest, "VerificationFailed"},
	bundle.Truncated:    {http.StatusBadRequest, "TransferFailed"},
	bundle.TooLong:      {http.StatusBadRequest, "VerificationFailed"},
	bundle.TooLarge:     {http.StatusRequestEntityTooLarge, "ApplyFailed"},
	bundle.BadSignature: {http.StatusBadRequest, "VerificationFailed"},
	bundle.Expired:      {http.StatusBadRequest, "VerificationFailed"},
	bundle.TooOld:       {http.StatusBadRequest, "UpdateSkippedVersionTooLow"},
	bundle.WrongProduct: {http.StatusBadRequest, "UpdateNotApplicable"},
	bundle.WrongMachine: {http.StatusBadRequest, "UpdateNotApplicable"},
	bundle.LoaderTooOld: {http.StatusBadRequest, "UpdateNotApplicable"},
}

// refused says in Redfish's words why an image was not installed.
func refused(err error, image, device string) error {
	var known *service.Error
	if errors.As(err, &known) {
		return err
	}
	sentence := func(s string) string { return strings.ToUpper(s[:1]) + s[1:] + "." }
	var r *bundle.RefusedError
	if errors.As(err, &r) {
		m := refusals[r.Reason]
		args := []string{image, device}
		if strings.HasPrefix(m.id, "UpdateSkipped") {
			args = []string{device, image}
		}
		e := service.UpdateRefused(m.status, m.id, sentence(r.Detail), args...)
		e.Cause = err
		return e
	}
	if errors.Is(err, slot.ErrUnproven) {
		e := service.Because(http.StatusConflict, "ResourceInUse", sentence(err.Error()))
		e.Cause = err
		return e
	}
	e := service.UpdateRefused(http.StatusInternalServerError, "ApplyFailed", sentence(err.Error()), image, device)
	e.Cause = err
	return e
}

// transfer is a reader that remembers its error: what breaks off on the way is told apart from what is of no use, and from a disk that fails.
type transfer struct {
	in  io.Reader
	err error
}

func (t *transfer) Read(p []byte) (int, error) {
	n, err := t.in.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		t.err = err
	}
	return n, err
}

// Install implements service.Updater.
func (u *Updater) Install(ctx context.Context, image io.Reader, o service.UpdateOptions, report func(int, string, ...string)) error {
	d := u.o.Disk
	to, err := d.Target(u.o.Running)
	if err != nil {
		return refused(err, "image", "agent")
	}
	if len(o.Targets) > 0 && !slices.ContainsFunc(o.Targets, func(t string) bool {
		return strings.HasSuffix(t, "/"+ids[to]) || strings.HasSuffix(t, "/"+ids[u.o.Running]) || slices.ContainsFunc(u.o.Parts, func(l schema.Link) bool { return l.ID == t })
	}) {
		return service.UpdateRefused(http.StatusBadRequest, "UpdateNotApplicable", "None of the targets takes an update now; "+ids[to]+" does.", "image", strings.Join(o.Targets, " "))
	}
	p, err := u.Policy()
	if err != nil {
		return refused(err, "image", ids[to])
	}
	p.MaxSize = d.Slot(to).Size()
	from := &transfer{in: image}
	in := io.Reader(from)
	if o.Offset > 0 {
		if at := d.State(); o.Offset > at.Slot(to).Written || at.Slot(to).Status != slot.Writing {
			return service.UpdateRefused(http.StatusBadRequest, "TransferFailed", fmt.Sprintf("The upload would go on at byte %d, and there are only %d.", o.Offset, at.Slot(to).Written), "image", ids[to])
		}
		in = io.MultiReader(io.NewSectionReader(d.Slot(to), 0, o.Offset), in)
	}
	r, err := bundle.NewReader(in, p)
	if err != nil {
		if from.err != nil {
			e := service.UpdateRefused(http.StatusBadRequest, "TransferFailed", "It broke off before anything was known of it.", "image", ids[to])
			e.Cause = err
			return e
		}
		return refused(err, "image", ids[to])
	}
	name := r.Manifest.Product + " " + r.Manifest.Version
	if o.Size >= 0 && o.Size != r.Size() {
		why := &bundle.RefusedError{Reason: bundle.Truncated, Detail: fmt.Sprintf("it would have %d bytes and its manifest says %d", o.Size, r.Size())}
		return refused(why, name, ids[to])
	}
	if !o.Force {
		switch c := bundle.CompareVersions(r.Manifest.Version, u.run.Manifest.Version); {
		case c == 0 && r.Digest == u.run.Digest:
			return service.UpdateRefused(http.StatusBadRequest, "UpdateSkippedSameVersion", "", ids[to], name)
		case c < 0:
			return service.UpdateRefused(http.StatusBadRequest, "UpdateSkippedVersionTooLow", fmt.Sprintf("Version %s runs. ForceUpdate goes back within the security epoch.", u.run.Manifest.Version), ids[to], name)
		}
	}
	w, err := d.Begin(u.o.Running, &r.Head, o.Offset)
	if err != nil {
		return refused(err, name, ids[to])
	}
	u.o.Logger.Info("update begins", "slot", to, "version", r.Manifest.Version, "epoch", r.Manifest.Epoch, "bytes", r.Size(), "from", o.Offset, "signers", r.Signers)
	report(0, "TargetDetermined", ids[to], name)
	report(1, "TransferringToComponent", name, ids[to])
	if err := u.copy(ctx, w, r, report); err != nil {
		keep := from.err != nil || ctx.Err() != nil // the wire broke; the bytes that came are good as far as anybody can tell
		aerr := w.Abort(cmp.Or(from.err, ctx.Err(), err), keep)
		u.o.Logger.Warn("update ends", "slot", to, "version", r.Manifest.Version, "err", err, "note", aerr, "received", w.Written())
		if keep {
			e := service.UpdateRefused(http.StatusBadRequest, "TransferFailed", "What has come is kept: the upload can go on from there.", name, ids[to])
			e.Cause = errors.Join(err, from.err)
			return e
		}
		return refused(err, name, ids[to])
	}
	report(90, "VerifyingAtComponent", name, ids[to])
	stage := o.Apply == service.ApplyOnStart
	if err := w.Commit(p, stage, u.o.Now()); err != nil {
		aerr := w.Abort(err, false)
		u.o.Logger.Warn("update ends", "slot", to, "version", r.Manifest.Version, "err", err, "note", aerr)
		return refused(err, name, ids[to])
	}
	u.o.Logger.Info("update is installed", "slot", to, "version", r.Manifest.Version, "staged", stage, "apply", o.Apply)
	if o.Apply == service.ApplyNow {
		report(99, "InstallingOnComponent", name, ids[to])
		return u.restart(ctx)
	}
	report(99, "AwaitToActivate", name, ids[to])
	return nil
}

// copy passes the image on, with progress.
func (u *Updater) copy(ctx context.Context, w *slot.Update, r *bundle.Reader, report func(int, string, ...string)) error {
	buf := make([]byte, 256<<10)
	last := 1
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, rerr := r.Read(buf)
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		if now := int(w.Written() * 90 / r.Size()); now > last {
			last = now
			report(now, "")
		}
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}

// restart has the machine started again, soon: whoever asked wants an answer first.
func (u *Updater) restart(ctx context.Context) error {
	if u.o.Restart == nil {
		return errors.New("this machine cannot restart itself")
	}
	time.AfterFunc(2*time.Second, func() {
		if err := u.o.Restart(context.WithoutCancel(ctx)); err != nil {
			u.o.Logger.Error("restart for an update", "err", err)
		}
	})
	return nil
}

// Activate implements service.Activator: the slot is tried with the next start.
func (u *Updater) Activate(_ context.Context, targets []string) error {
	if len(targets) != 1 {
		return service.Because(http.StatusBadRequest, "ActionParameterValueError", "One slot can be activated.", "Targets", "UpdateService.Activate")
	}
	s := u.o.Disk.State()
	for n, id := range ids {
		if id == targets[0] {
			if err := u.o.Disk.Activate(n); err != nil {
				return service.UpdateRefused(http.StatusConflict, "ActivateFailed", err.Error()+".", s.Slot(n).Version, id)
			}
			return nil
		}
	}
	return service.Because(http.StatusBadRequest, "ActionParameterValueError", "There is no such slot.", "Targets", "UpdateService.Activate")
}

// Start implements service.Starter: what is staged is activated, and the machine started again.
func (u *Updater) Start(ctx context.Context) error {
	s := u.o.Disk.State()
	for _, n := range []slot.Name{slot.A, slot.B} {
		if s.Slot(n).Status == slot.Staged {
			if err := u.o.Disk.Activate(n); err != nil {
				return service.UpdateRefused(http.StatusConflict, "ActivateFailed", err.Error()+".", s.Slot(n).Version, ids[n])
			}
			return u.restart(ctx)
		}
	}
	return service.Because(http.StatusConflict, "OperationFailed", "No image waits to be started: push one with the apply time OnStartUpdateRequest.")
}

// DigestOf is how a digest is shown.
func DigestOf(h *bundle.Head) string { return hex.EncodeToString(h.Digest[:]) }
