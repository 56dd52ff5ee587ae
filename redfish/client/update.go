package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// UpdateURI is the update service.
const UpdateURI = "/redfish/v1/UpdateService"

// PushOptions say what is to be done with an image.
type PushOptions struct {
	Targets []string
	Force   bool   // also if it is older than what runs
	Apply   string // Immediate, OnReset or OnStartUpdateRequest; empty leaves it to the service
	// Offset is where to go on with an upload that broke off.
	Offset int64
}

// Push sends an image to the service's MultipartHttpPushUri as it is read, and returns the task that installs it. sent, if not nil, is called
// with the bytes that went so far. A service that refuses the image says so before all of it is sent; that is the error then. The upload as a
// whole has no other time limit than ctx.
func (c *Client) Push(ctx context.Context, image io.ReaderAt, size int64, o PushOptions, sent func(int64)) (*schema.Task, error) {
	if o.Offset < 0 || o.Offset >= size {
		return nil, fmt.Errorf("push: go on at byte %d of %d", o.Offset, size)
	}
	var s schema.UpdateService
	if err := c.Get(ctx, UpdateURI, &s); err != nil {
		return nil, err
	}
	if s.MultipartHTTPPushURI == "" {
		return nil, errors.New("the service takes no images by push")
	}
	params := map[string]any{"Targets": []string{}}
	if len(o.Targets) > 0 {
		params["Targets"] = o.Targets
	}
	if o.Force {
		params["ForceUpdate"] = true
	}
	if o.Apply != "" {
		params["@Redfish.OperationApplyTime"] = o.Apply
	}
	text, err := json.Marshal(params)
	if err != nil {
		return nil, err
	}
	// The parts' frames are made first, so that the length is known.
	var frame bytes.Buffer
	w := multipart.NewWriter(&frame)
	part, err := w.CreatePart(textproto.MIMEHeader{"Content-Disposition": {`form-data; name="UpdateParameters"`}, "Content-Type": {"application/json"}})
	if err != nil {
		return nil, err
	}
	if _, err := part.Write(text); err != nil {
		return nil, err
	}
	head := textproto.MIMEHeader{"Content-Disposition": {`form-data; name="UpdateFile"; filename="update.bundle"`}, "Content-Type": {"application/octet-stream"}}
	if o.Offset > 0 {
		head.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", o.Offset, size-1, size))
	}
	if _, err := w.CreatePart(head); err != nil {
		return nil, err
	}
	before := bytes.Clone(frame.Bytes())
	if err := w.Close(); err != nil {
		return nil, err
	}
	after := frame.Bytes()[len(before):]
	header, _, err := c.authenticate(ctx)
	if err != nil {
		return nil, err
	}
	ref, err := url.Parse(s.MultipartHTTPPushURI)
	if err != nil || ref.Host != "" {
		return nil, fmt.Errorf("push URI %q: want a path on the service", s.MultipartHTTPPushURI)
	}
	body := io.MultiReader(bytes.NewReader(before), &counted{in: io.NewSectionReader(image, o.Offset, size-o.Offset), n: o.Offset, sent: sent}, bytes.NewReader(after))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base.ResolveReference(ref).String(), body)
	if err != nil {
		return nil, err
	}
	req.ContentLength = int64(len(before)+len(after)) + size - o.Offset
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("OData-Version", "4.0")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Content-Type", w.FormDataContentType())
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(http.MethodPost, s.MultipartHTTPPushURI, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 400 {
		return nil, newError(http.MethodPost, s.MultipartHTTPPushURI, resp)
	}
	var task schema.Task
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&task); err != nil || task.ODataID == "" {
		return nil, fmt.Errorf("POST %s: %s without a task", s.MultipartHTTPPushURI, resp.Status)
	}
	return &task, nil
}

// counted tells how far a reader is.
type counted struct {
	in   io.Reader
	n    int64
	sent func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	c.n += int64(n)
	if c.sent != nil {
		c.sent(c.n)
	}
	return n, err
}
