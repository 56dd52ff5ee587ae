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
	// tell that the image is of no use; the rest is then not read. An *Error is told to the client.
	Install(ctx context.Context, image io.Reader, o UpdateOptions, progress func(percent int, doing string)) error
}

// Activator is the ability of an Updater to choose among the images that are installed.
type Activator interface {
	Activate(ctx context.Context, ids []string) error
}

// UpdateOptions are what a client asks of an update.
type UpdateOptions struct {
	Targets []string // URIs of inventory items; empty leaves the choice to the image
	Force   bool     // also if the version is the same or older
	Size    int64    // in bytes, as far as the client tells; -1 if it does not
}

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
	svc  *Service
	busy chan struct{}
}

func (s *Service) updateRoutes() []Route {
	if s.o.Updater == nil {
		return nil
	}
	u := &updates{svc: s, busy: make(chan struct{}, 1)}
	items := func(r *Request) ([]*schema.SoftwareInventory, error) { return s.o.Updater.Inventory(r.ctx) }
	service := Route{
		URI: updateURI, Type: schema.TypeUpdateService,
		Get: func(*Request) (schema.Object, error) {
			return &schema.UpdateService{
				Resource: schema.Resource{Name: "Update Service"}, ServiceEnabled: true, MultipartHTTPPushURI: pushURI, MaxImageSizeBytes: s.o.Updater.MaxImage(),
				FirmwareInventory: schema.LinkTo(inventoryURI), Status: &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
			}, nil
		},
		Actions: []Action{{
			Name: "UpdateService.SimpleUpdate",
			Parameters: []Property{
				{Name: "ImageURI", Kind: String, Required: true, Max: 1024}, {Name: "TransferProtocol", Kind: String, Values: []string{"HTTP", "HTTPS"}},
				{Name: "Targets", Kind: StringArray}, {Name: "ForceUpdate", Kind: Boolean},
				{Name: "Username", Kind: String, Max: 256}, {Name: "Password", Kind: String, Max: 1024},
			},
			Do: u.pull,
		}},
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
		defer func() { end(err) }()
		in, err := image(ctx)
		if err != nil {
			return nil, err
		}
		defer in.Close()
		defer context.AfterFunc(ctx, func() { in.Close() })() // a read that waits ends when the task is cancelled
		limited := &limitReader{in: in, left: u.svc.o.Updater.MaxImage()}
		err = u.svc.o.Updater.Install(ctx, limited, o, t.Progress)
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
	if err := u.begin(); err != nil {
		return nil, err
	}
	client := u.svc.outbound(&tls.Config{MinVersion: tls.VersionTLS12})
	user, password := v.String("Username"), v.String("Password")
	reply, err := u.task(r, UpdateOptions{Targets: v.Strings("Targets"), Force: v.Bool("ForceUpdate"), Size: -1}, func(ctx context.Context) (io.ReadCloser, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
		if err != nil {
			return nil, err
		}
		if user != "" {
			req.SetBasicAuth(user, password)
		}
		resp, err := client.Do(req)
		if err != nil {
			return nil, Because(http.StatusBadGateway, "OperationFailed", "The image cannot be fetched: "+err.Error()+".")
		}
		if resp.StatusCode != http.StatusOK {
			resp.Body.Close()
			return nil, Because(http.StatusBadGateway, "OperationFailed", "The image cannot be fetched: its server answers "+resp.Status+".")
		}
		if resp.ContentLength > u.svc.o.Updater.MaxImage() {
			resp.Body.Close()
			return nil, refuse(http.StatusRequestEntityTooLarge, "PayloadTooLarge")
		}
		return resp.Body, nil
	}, func(error) { client.CloseIdleConnections() })
	if err != nil {
		u.end()
	}
	return reply, err
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
		case "UpdateFile":
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
			} else if late.Force || len(late.Targets) > 0 {
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
		Targets     []string `json:"Targets"`
		ForceUpdate bool     `json:"ForceUpdate"`
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return Because(400, "MalformedJSON", fmt.Sprintf("UpdateParameters cannot be read: %v.", err))
	}
	o.Targets, o.Force = p.Targets, p.ForceUpdate
	return nil
}

// patientReader gives a connection more time with each read: an upload takes what it takes, but must not stop.
type patientReader struct {
	in     io.Reader
	extend func()
	last   time.Time
}

func (p *patientReader) Read(b []byte) (int, error) {
	if now := time.Now(); now.Sub(p.last) > time.Second {
		p.last = now
		p.extend()
	}
	return p.in.Read(b)
}
