package service

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// Updater installs software on the device. With one in Options, the service has an UpdateService.
type Updater interface {
	// Inventory are the images that are installed, each with its Id.
	Inventory(context.Context) ([]*schema.SoftwareInventory, error)
	// MaxImage is the size in bytes that no image exceeds.
	MaxImage() int64
	// Install reads an image and installs it. It trusts no byte of it before the signature is checked, and returns as soon as it can
	// tell that the image is of no use; the rest is then not read. An *Error is told to the client. report tells how far it is, in percent,
	// and, unless message is empty, what it does, by a message of DMTF's Update registry.
	Install(ctx context.Context, image io.Reader, o UpdateOptions, report func(percent int, message string, args ...string)) error
}

// Starter is the ability of an Updater to keep an image until it is told to apply it (ApplyOnStart).
type Starter interface {
	Start(context.Context) error
}

// Describer is the ability of an Updater to complete the UpdateService.
type Describer interface {
	Describe(*schema.UpdateService) error
}

// Activator is the ability of an Updater to choose among the images that are installed.
type Activator interface {
	Activate(ctx context.Context, ids []string) error
}

// UpdateOptions are what a client asks of an update.
type UpdateOptions struct {
	Targets []string  // URIs of inventory items; empty leaves the choice to the image
	Force   bool      // also if the version is the same or older
	Apply   ApplyTime // empty leaves it to the Updater
	Size    int64     // of the whole image in bytes, as far as the client tells; -1 if it does not
	// Offset is where in the image the bytes begin that come; those before it came with an upload that broke off.
	Offset int64
}

// ApplyTime is when an image is to be applied (Settings.v1_4_0.OperationApplyTime).
type ApplyTime string

// The times that an Updater with the ability of a Starter knows; one without knows the first two.
const (
	ApplyNow     ApplyTime = "Immediate"
	ApplyOnReset ApplyTime = "OnReset"
	ApplyOnStart ApplyTime = "OnStartUpdateRequest"
)

const (
	updateURI    = "/redfish/v1/UpdateService"
	pushURI      = updateURI + "/update-multipart"
	inventoryURI = updateURI + "/FirmwareInventory"
	// uploadIdle is how long an upload may pause.
	uploadIdle = 30 * time.Second
	// maxParameters bounds UpdateParameters, in bytes.
	maxParameters = 16 << 10
)

// updates runs one update at a time.
type updates struct {
	svc   *Service
	busy  chan struct{}
	times []string // when an image can be applied
}

func (s *Service) updateRoutes() []Route {
	if s.o.Updater == nil {
		return nil
	}
	u := &updates{svc: s, busy: make(chan struct{}, 1)}
	times := []string{string(ApplyNow), string(ApplyOnReset)}
	starter, starts := s.o.Updater.(Starter)
	if starts {
		times = append(times, string(ApplyOnStart))
	}
	u.times = times
	items := func(r *Request) ([]*schema.SoftwareInventory, error) { return s.o.Updater.Inventory(r.ctx) }
	service := Route{
		URI: updateURI, Type: schema.TypeUpdateService,
		Get: func(*Request) (schema.Object, error) {
			out := &schema.UpdateService{
				Resource: schema.Resource{Name: "Update Service"}, ServiceEnabled: true, MultipartHTTPPushURI: pushURI, MaxImageSizeBytes: s.o.Updater.MaxImage(),
				ApplyTimeSupport:  &schema.ApplyTimeSupport{ODataType: "#Settings.v1_4_0.OperationApplyTimeSupport", SupportedValues: times},
				FirmwareInventory: schema.LinkTo(inventoryURI), Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
			}
			if d, ok := s.o.Updater.(Describer); ok {
				if err := d.Describe(out); err != nil {
					return nil, err
				}
			}
			return out, nil
		},
		Actions: []Action{{
			Name: "UpdateService.SimpleUpdate",
			Parameters: []Property{
				{Name: "ImageURI", Kind: String, Required: true, Max: 1024}, {Name: "TransferProtocol", Kind: String, Values: []string{"HTTP", "HTTPS"}},
				{Name: "Targets", Kind: StringArray}, {Name: "ForceUpdate", Kind: Boolean}, {Name: "Stage", Kind: Boolean},
				{Name: "Username", Kind: String, Max: 256}, {Name: "Password", Kind: String, Max: 1024},
			},
			Do: u.pull,
		}},
	}
	if starts {
		service.Actions = append(service.Actions, Action{
			Name: "UpdateService.StartUpdate",
			Do:   func(r *Request, _ Values) (*Reply, error) { return nil, starter.Start(r.ctx) },
		})
	}
	if a, ok := s.o.Updater.(Activator); ok {
		service.Actions = append(service.Actions, Action{
			Name:       "UpdateService.Activate",
			Parameters: []Property{{Name: "Targets", Kind: StringArray, Required: true}},
			Do: func(r *Request, v Values) (*Reply, error) {
				ids := slices.Clone(v.Strings("Targets"))
				for i, uri := range ids {
					ids[i] = strings.TrimPrefix(uri, inventoryURI+"/")
				}
				return nil, a.Activate(r.ctx, ids)
			},
		})
	}
	return []Route{
		service,
		{URI: pushURI, Type: schema.TypeUpdateService, Upload: u.push},
		{
			URI: inventoryURI, Type: schema.TypeSoftwareInventoryCollection, Name: "Firmware Inventory",
			Members: func(r *Request) (ids []string, err error) {
				all, err := items(r)
				for _, one := range all {
					ids = append(ids, one.ID)
				}
				return ids, err
			},
		},
		{
			URI: inventoryURI + "/{software}", Type: schema.TypeSoftwareInventory,
			Get: func(r *Request) (schema.Object, error) {
				all, err := items(r)
				for _, one := range all {
					if one.ID == r.Param("software") {
						return one, nil
					}
				}
				if err == nil {
					err = ErrNotFound
				}
				return nil, err
			},
		},
	}
}

// begin takes the right to update; there is one update at a time.
func (u *updates) begin() error {
	select {
	case u.busy <- struct{}{}:
		return nil
	default:
		return Because(http.StatusConflict, "ResourceInUse", "Another update is running.")
	}
}

func (u *updates) end() { <-u.busy }

// task starts the installation of an image as a task, and calls end with its outcome.
func (u *updates) task(r *Request, o UpdateOptions, image func(context.Context) (io.ReadCloser, error), end func(error)) (*Reply, error) {
	return r.Task("Update", func(ctx context.Context, t *Task) (_ *Reply, err error) {
		defer u.end()
		in, err := image(ctx)
		if err != nil {
			end(err)
			return nil, err
		}
		defer in.Close()
		defer func() { end(err) }()                           // before the image is closed: whoever sends it is to learn why
		defer context.AfterFunc(ctx, func() { in.Close() })() // a read that waits ends when the task is cancelled
		limited := &limitReader{in: in, left: u.svc.o.Updater.MaxImage()}
		err = u.svc.o.Updater.Install(ctx, limited, o, t.Report)
		if limited.left < 0 {
			err = refuse(http.StatusRequestEntityTooLarge, "PayloadTooLarge")
		}
		return nil, err
	})
}

// limitReader fails, instead of ending, where more comes than may.
type limitReader struct {
	in   io.Reader
	left int64
}

func (l *limitReader) Read(p []byte) (int, error) {
	if l.left < 0 {
		return 0, errors.New("the image is too large")
	}
	n, err := l.in.Read(p)
	l.left -= int64(n)
	if l.left < 0 {
		return 0, errors.New("the image is too large")
	}
	return n, err
}

// pull installs the image at an URI of the client's choice.
func (u *updates) pull(r *Request, v Values) (*Reply, error) {
	const action = "UpdateService.SimpleUpdate"
	uri := v.String("ImageURI")
	if scheme := strings.ToLower(v.String("TransferProtocol")); scheme != "" && !strings.Contains(uri, "://") {
		uri = scheme + "://" + uri
	}
	if _, err := u.svc.checkDestination(uri, "https", "http"); err != nil {
		return nil, Because(400, "ActionParameterValueError", "The image cannot be fetched: "+err.Error()+".", "ImageURI", action).about("ImageURI")
	}
	o := UpdateOptions{Targets: v.Strings("Targets"), Force: v.Bool("ForceUpdate"), Size: -1}
	var annotated struct {
		Apply ApplyTime `json:"@Redfish.OperationApplyTime"`
	}
	if len(r.body) > 0 {
		if err := json.Unmarshal(r.body, &annotated); err != nil {
			return nil, refuse(400, "MalformedJSON")
		}
	}
	if o.Apply = annotated.Apply; o.Apply == "" && v.Bool("Stage") {
		o.Apply = ApplyOnStart
	}
	if err := u.checkTime(o.Apply); err != nil {
		return nil, err
	}
	if err := u.begin(); err != nil {
		return nil, err
	}
	client := u.svc.outbound(&tls.Config{MinVersion: tls.VersionTLS12})
	remote := &remoteImage{client: client, uri: uri, user: v.String("Username"), password: v.String("Password"), most: u.svc.o.Updater.MaxImage()}
	reply, err := u.task(r, o, func(ctx context.Context) (io.ReadCloser, error) {
		remote.ctx = ctx
		if err := remote.open(); err != nil {
			return nil, err
		}
		return remote, nil
	}, func(error) {
		remote.Close()
		client.CloseIdleConnections()
	})
	if err != nil {
		u.end()
	}
	return reply, err
}

// checkTime refuses a time that the Updater does not know.
func (u *updates) checkTime(t ApplyTime) error {
	if t == "" || slices.Contains(u.times, string(t)) {
		return nil
	}
	return Because(400, "PropertyValueNotInList", "", string(t), "@Redfish.OperationApplyTime").about("@Redfish.OperationApplyTime")
}

// remoteImage is an image on a server. When the connection breaks it goes on where it was, if the server can.
type remoteImage struct {
	ctx            context.Context
	client         *http.Client
	uri            string
	user, password string
	most           int64

	mu     sync.Mutex    // guards body and closed
	body   io.ReadCloser // of the running answer
	closed bool
	pos    int64
	size   int64  // -1 if the server does not tell
	tag    string // the strong ETag of what is fetched
	tries  int    // since bytes came
}

// open asks for the image from pos on.
func (s *remoteImage) open() error {
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.uri, nil)
	if err != nil {
		return err
	}
	if s.user != "" {
		req.SetBasicAuth(s.user, s.password)
	}
	want := http.StatusOK
	if s.pos > 0 {
		want = http.StatusPartialContent
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", s.pos))
		req.Header.Set("If-Range", s.tag)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return Because(http.StatusBadGateway, "OperationFailed", "The image cannot be fetched: "+err.Error()+".")
	}
	if resp.StatusCode != want {
		resp.Body.Close()
		return Because(http.StatusBadGateway, "OperationFailed", "The image cannot be fetched: its server answers "+resp.Status+".")
	}
	if s.pos == 0 {
		s.size = resp.ContentLength
		if s.tag = resp.Header.Get("ETag"); strings.HasPrefix(s.tag, "W/") {
			s.tag = ""
		}
	}
	if resp.ContentLength > s.most-s.pos {
		resp.Body.Close()
		return refuse(http.StatusRequestEntityTooLarge, "PayloadTooLarge")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		resp.Body.Close()
		return context.Canceled
	}
	s.body = resp.Body
	return nil
}

// Read reads on, over connections that break, as long as each brings something on.
func (s *remoteImage) Read(p []byte) (int, error) {
	for {
		n, err := s.body.Read(p)
		s.pos += int64(n)
		if n > 0 {
			s.tries = 0
		}
		const enough = 5
		if err == nil || errors.Is(err, io.EOF) && (s.size < 0 || s.pos >= s.size) || s.tag == "" || s.tries >= enough || s.ctx.Err() != nil {
			return n, err
		}
		if n > 0 {
			return n, nil // the same error comes again
		}
		s.body.Close()
		for s.tries < enough {
			s.tries++
			select {
			case <-s.ctx.Done():
				return 0, s.ctx.Err()
			case <-time.After(time.Duration(s.tries) * 200 * time.Millisecond):
			}
			if oerr := s.open(); oerr == nil {
				break
			} else if s.tries == enough {
				return 0, errors.Join(err, oerr)
			}
		}
	}
}

// Close ends a read that waits.
func (s *remoteImage) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.body == nil {
		return nil
	}
	return s.body.Close()
}

// push installs an image that the client sends as multipart/form-data: UpdateFile, and before it UpdateParameters. The image goes
// to the Updater as it comes; none of it is kept.
func (u *updates) push(r *Request, w http.ResponseWriter) (*Reply, error) {
	media, params, err := mime.ParseMediaType(r.http.Header.Get("Content-Type"))
	if err != nil || media != "multipart/form-data" || params["boundary"] == "" {
		return nil, refuse(http.StatusUnsupportedMediaType, "HeaderInvalid", "Content-Type")
	}
	if r.http.ContentLength > u.svc.o.Updater.MaxImage()+2*maxParameters {
		return nil, tooLarge(w)
	}
	if err := u.begin(); err != nil {
		w.Header().Set("Connection", "close")
		return nil, err
	}
	started := false
	defer func() {
		if !started {
			u.end()
		}
	}()
	control := http.NewResponseController(w)
	body := &patientReader{in: r.http.Body, extend: func() {
		_ = control.SetReadDeadline(time.Now().Add(uploadIdle)) // not every connection has one
		_ = control.SetWriteDeadline(time.Now().Add(2 * uploadIdle))
	}}
	parts := multipart.NewReader(body, params["boundary"])
	o := UpdateOptions{Size: -1}
	for {
		part, err := parts.NextPart()
		if err != nil {
			return nil, badParts(w)
		}
		switch part.FormName() {
		case "UpdateParameters":
			if err := parseParameters(part, u.svc.limits.Depth, &o); err != nil {
				return nil, err
			}
			if err := u.checkTime(o.Apply); err != nil {
				w.Header().Set("Connection", "close")
				return nil, err
			}
		case "UpdateFile":
			if err := parseRange(part.Header.Get("Content-Range"), &o); err != nil {
				w.Header().Set("Connection", "close")
				return nil, err
			}
			started = true
			return u.receive(r, w, o, part, parts)
		default:
			if !strings.HasPrefix(part.FormName(), "Oem") {
				return nil, Because(400, "UnrecognizedRequestBody", "The request has a part that is not known: "+clip(part.FormName())+".")
			}
		}
	}
}

// badParts says that the body is no multipart that can be used. What is left of it is not read.
func badParts(w http.ResponseWriter) *Error {
	w.Header().Set("Connection", "close")
	return Because(400, "UnrecognizedRequestBody", "The request is not multipart/form-data with a part named UpdateFile.")
}

// receive passes the part that is the image on to the installation.
func (u *updates) receive(r *Request, w http.ResponseWriter, o UpdateOptions, image io.Reader, parts *multipart.Reader) (*Reply, error) {
	in, out := io.Pipe()
	var mu sync.Mutex
	var outcome error // of the installation; guarded by mu
	reply, err := u.task(r, o, func(context.Context) (io.ReadCloser, error) { return in, nil }, func(err error) {
		mu.Lock()
		outcome = err
		mu.Unlock()
		if err == nil {
			err = io.ErrClosedPipe
		}
		in.CloseWithError(err)
	})
	if err != nil {
		u.end()
		return nil, err
	}
	_, err = io.Copy(out, image)
	if err == nil {
		// Parameters that come late could not be heeded: those that ask for something are refused.
		var late UpdateOptions
		part, next := parts.NextPart()
		if next == nil && part.FormName() == "UpdateParameters" {
			if e := parseParameters(part, u.svc.limits.Depth, &late); e != nil {
				err = e
			} else if late.Force || late.Apply != "" || len(late.Targets) > 0 {
				err = Because(400, "UnrecognizedRequestBody", "UpdateParameters have to come before UpdateFile.")
			}
		} else if next != nil && !errors.Is(next, io.EOF) {
			err = badParts(w)
		}
	}
	if err == nil {
		out.Close() // only now is the image whole for the Updater
		return reply, nil
	}
	out.CloseWithError(err)
	w.Header().Set("Connection", "close")
	mu.Lock()
	defer mu.Unlock()
	var e *Error
	switch {
	case errors.As(outcome, &e):
		return nil, e
	case outcome != nil:
		return reply, nil // the task tells what has gone wrong
	case errors.As(err, &e):
		return nil, e
	case errors.Is(err, io.ErrClosedPipe):
		return reply, nil // the image was whole before the part's end
	}
	return nil, badParts(w)
}

// parseRange reads a part's Content-Range (RFC 9110, section 14.4): a client that goes on with an upload that broke off sends the image from
// where it broke, and says so there.
func parseRange(text string, o *UpdateOptions) error {
	if text == "" {
		return nil
	}
	var first, last, size int64
	n, err := fmt.Sscanf(text, "bytes %d-%d/%d", &first, &last, &size)
	if err != nil || n != 3 || first < 0 || last < first || last != size-1 || text != fmt.Sprintf("bytes %d-%d/%d", first, last, size) {
		return Because(400, "HeaderInvalid", "The part's Content-Range is not of the form bytes FIRST-LAST/SIZE up to the image's end.", "Content-Range")
	}
	o.Offset, o.Size = first, size
	return nil
}

// parseParameters reads UpdateParameters, whatever content type they are said to have.
func parseParameters(in io.Reader, depth int, o *UpdateOptions) error {
	b, err := io.ReadAll(io.LimitReader(in, maxParameters+1))
	if err != nil || len(b) > maxParameters {
		return Because(400, "UnrecognizedRequestBody", "UpdateParameters cannot be read.")
	}
	if jsonDepth(b) > depth {
		return refuse(400, "MalformedJSON")
	}
	var p struct {
		Targets     []string  `json:"Targets"`
		ForceUpdate bool      `json:"ForceUpdate"`
		Stage       bool      `json:"Stage"`
		Apply       ApplyTime `json:"@Redfish.OperationApplyTime"`
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return Because(400, "MalformedJSON", fmt.Sprintf("UpdateParameters cannot be read: %v.", err))
	}
	o.Targets, o.Force, o.Apply = p.Targets, p.ForceUpdate, p.Apply
	if o.Apply == "" && p.Stage {
		o.Apply = ApplyOnStart
	}
	return nil
}

// patientReader gives a connection more time with each read: an upload takes what it takes, but must not stop. One that comes as fast as it
// can never waits, and would have a processor to itself until the scheduler takes that away, 10 ms at a time.
type patientReader struct {
	in     io.Reader
	extend func()
	last   time.Time
	turn   turn
}

func (p *patientReader) Read(b []byte) (int, error) {
	if now := time.Now(); now.Sub(p.last) > time.Second {
		p.last = now
		p.extend()
	}
	n, err := p.in.Read(b)
	p.turn.took(n)
	return n, err
}

// turn lets other requests have the processor after so many bytes of a stream.
type turn int

func (t *turn) took(n int) {
	const most = 64 << 10
	if *t += turn(n); *t >= most {
		*t = 0
		runtime.Gosched()
	}
}
