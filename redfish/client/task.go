package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// TaskError is a task that ended otherwise than completed.
type TaskError struct{ Task schema.Task }

func (e *TaskError) Error() string {
	s := fmt.Sprintf("task %s (%s) ended as %s", e.Task.ID, e.Task.Name, e.Task.TaskState)
	for _, m := range e.Task.Messages {
		if m.MessageSeverity != schema.HealthOK && m.Message != "" {
			s += ": " + m.Message
		}
	}
	return s
}

// Run posts an action and, if the service answers with a task, waits for its end. The task is nil if the action was done at
// once, with its answer then decoded into out if not nil. progress, if not nil, is called whenever the task has changed.
func (c *Client) Run(ctx context.Context, uri string, in, out any, progress func(schema.Task)) (*schema.Task, error) {
	var raw json.RawMessage
	resp, err := c.Post(ctx, uri, in, &raw)
	if err != nil {
		return nil, err
	}
	if resp.Status != http.StatusAccepted {
		if out != nil && len(raw) > 0 {
			if err := json.Unmarshal(raw, out); err != nil {
				return nil, fmt.Errorf("POST %s: decode answer: %w", uri, err)
			}
		}
		return nil, nil
	}
	var task schema.Task
	if err := json.Unmarshal(raw, &task); err != nil {
		return nil, fmt.Errorf("POST %s: decode task: %w", uri, err)
	}
	if task.ODataID == "" {
		return nil, fmt.Errorf("POST %s: 202 Accepted without a task", uri)
	}
	return c.Wait(ctx, task.ODataID, progress)
}

// Wait polls the task at uri until it has ended. It returns the task together with a *TaskError if it did not complete.
// A service that cannot be reached for a moment is asked again until ctx ends.
func (c *Client) Wait(ctx context.Context, uri string, progress func(schema.Task)) (*schema.Task, error) {
	delay := 50 * time.Millisecond
	var last string
	failures := 0
	for {
		var task schema.Task
		resp, err := c.Do(ctx, http.MethodGet, uri, nil, &task)
		var e *Error
		switch {
		case err == nil:
			failures = 0
		case ctx.Err() != nil, errors.As(err, &e) && e.Status < 500 && e.Status != http.StatusTooManyRequests:
			return nil, fmt.Errorf("wait for task: %w", err)
		default:
			if failures++; failures > 5 {
				return nil, fmt.Errorf("wait for task: %w", err)
			}
		}
		if err == nil {
			if now := fmt.Sprint(task.TaskState, percent(task), len(task.Messages)); now != last {
				last = now
				if progress != nil {
					progress(task)
				}
			}
			if task.TaskState.Done() {
				if task.TaskState != schema.TaskCompleted {
					return &task, &TaskError{Task: task}
				}
				return &task, nil
			}
			if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
				delay = max(delay, time.Duration(s)*time.Second)
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for task: %w", ctx.Err())
		case <-time.After(delay):
		}
		delay = min(2*delay, 2*time.Second)
	}
}

func percent(t schema.Task) int {
	if t.PercentComplete == nil {
		return -1
	}
	return *t.PercentComplete
}

// Download copies what is at uri, an AdditionalDataURI for example, and returns the bytes written. When the connection breaks it goes on
// where it was, as long as something comes.
func (c *Client) Download(ctx context.Context, uri string, w io.Writer) (int64, error) {
	return c.download(ctx, uri, 0, -1, w)
}

// Resume is Download for a client that has the first bytes already: it writes those from offset from on.
func (c *Client) Resume(ctx context.Context, uri string, from int64, w io.Writer) (int64, error) {
	n, err := c.download(ctx, uri, from, -1, w)
	var e *Error
	if n == 0 && from > 0 && errors.As(err, &e) && e.Status == http.StatusRequestedRangeNotSatisfiable {
		return 0, nil // there is no more
	}
	return n, err
}

// download copies the bytes from first to last, or to the end if last is negative.
func (c *Client) download(ctx context.Context, uri string, first, last int64, w io.Writer) (done int64, err error) {
	const patience = 5 // attempts in a row that bring nothing
	d := download{c: c, uri: uri, last: last, w: w}
	for idle := 0; ; {
		n, final, err := d.part(ctx, first+done)
		done += n
		if n > 0 {
			idle = 0
		}
		if idle++; final || idle > patience || ctx.Err() != nil {
			if err != nil && done > 0 {
				err = fmt.Errorf("after %d bytes: %w", done, err)
			}
			return done, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(idle) * 200 * time.Millisecond):
		}
	}
}

// download is a download that may take several requests.
type download struct {
	c       *Client
	uri     string
	last    int64 // offset of the last byte wanted; negative for all
	w       io.Writer
	version string // of what is downloaded, once known
	broken  error  // of w
}

func (d *download) Write(b []byte) (int, error) {
	n, err := d.w.Write(b)
	d.broken = err
	return n, err
}

// part makes one request for what is from first on. final says that another would not help, or is not needed.
func (d *download) part(ctx context.Context, first int64) (n int64, final bool, err error) {
	header, token, err := d.c.authenticate(ctx)
	if err != nil {
		return 0, true, err
	}
	ranged := first > 0 || d.last >= 0
	if ranged {
		end := ""
		if d.last >= 0 {
			end = strconv.FormatInt(d.last, 10)
		}
		header.Set("Range", fmt.Sprintf("bytes=%d-%s", first, end))
	}
	resp, err := d.c.open(ctx, http.MethodGet, d.uri, nil, header)
	var refused *Error
	switch {
	case errors.As(err, &refused) && refused.Status == http.StatusUnauthorized && token != "" && d.version != "":
		d.c.forget(token) // the session has run out meanwhile
		return 0, false, err
	case errors.As(err, &refused):
		return 0, refused.Status < 500, err
	case err != nil:
		return 0, d.version == "", err
	}
	defer resp.Body.Close()
	if ranged && resp.StatusCode != http.StatusPartialContent {
		return 0, true, fmt.Errorf("GET %s: the service does not send parts of it", d.uri)
	}
	is := resp.Header.Get("ETag") + " " + resp.Header.Get("Last-Modified")
	if d.version != "" && d.version != is {
		return 0, true, fmt.Errorf("GET %s: it has changed while it was downloaded", d.uri)
	}
	d.version = is
	n, err = io.Copy(d, resp.Body)
	if err != nil {
		err = fmt.Errorf("GET %s: %w", d.uri, err)
	}
	return n, err == nil || d.broken != nil, err
}

// System reads the one system of the service: the host.
func (c *Client) System(ctx context.Context) (*schema.ComputerSystem, error) {
	var found *schema.ComputerSystem
	for s, err := range Members[schema.ComputerSystem](ctx, c, "/redfish/v1/Systems") {
		if err != nil {
			return nil, err
		}
		if found != nil {
			return nil, errors.New("the service has more than one system")
		}
		found = &s
	}
	if found == nil {
		return nil, errors.New("the service has no system")
	}
	return found, nil
}

// Manager reads the first manager of the service.
func (c *Client) Manager(ctx context.Context) (*schema.Manager, error) {
	for m, err := range Members[schema.Manager](ctx, c, "/redfish/v1/Managers") {
		if err != nil {
			return nil, err
		}
		return &m, nil
	}
	return nil, errors.New("the service has no manager")
}

// Reset resets the host. A type that the service does not list is refused here, with those that it does.
func (c *Client) Reset(ctx context.Context, t schema.ResetType) error {
	s, err := c.System(ctx)
	if err != nil {
		return err
	}
	action, ok := s.Actions["#ComputerSystem.Reset"]
	if !ok {
		return errors.New("the service has no way to reset the host")
	}
	values := action.Allowable["ResetType"]
	known := len(values) == 0
	for _, v := range values {
		known = known || v == string(t)
	}
	if !known {
		return fmt.Errorf("reset type %s is not supported here; these are: %s", t, strings.Join(values, ", "))
	}
	_, err = c.Run(ctx, action.Target, map[string]any{"ResetType": t}, nil, nil)
	return err
}
