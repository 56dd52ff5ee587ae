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

// Download streams what is at uri, an AdditionalDataURI for example, and returns the bytes written.
func (c *Client) Download(ctx context.Context, uri string, w io.Writer) (int64, error) {
	header, _, err := c.authenticate(ctx)
	if err != nil {
		return 0, err
	}
	resp, err := c.open(ctx, http.MethodGet, uri, nil, header)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	n, err := io.Copy(w, resp.Body)
	if err != nil {
		return n, fmt.Errorf("GET %s: after %d bytes: %w", uri, n, err)
	}
	return n, nil
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
