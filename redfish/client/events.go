package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// EventOptions say which events to stream.
type EventOptions struct {
	// Filter is an expression of the specification, such as "RegistryPrefix eq 'BackdoorHost'"; empty for all.
	Filter string
	// After is the Id of the last event that was seen; those behind it that the service still has come first.
	After string
}

const (
	// streamSilence is how long a stream may be silent: services say every few seconds that they are alive.
	streamSilence = time.Minute
	maxStreamWait = 30 * time.Second
	maxEventLine  = 1 << 20
)

// Events calls handle for each event of the service, as they come, until ctx ends or handle returns an error, which it returns. A stream
// that breaks is opened again behind the last event; what cannot be mended by that, a refusal for one, ends it.
func (c *Client) Events(ctx context.Context, o EventOptions, handle func(schema.Event) error) error {
	var root schema.ServiceRoot
	if err := c.Get(ctx, "/redfish/v1/", &root); err != nil {
		return err
	}
	if root.EventService == nil {
		return errors.New("the service has no events")
	}
	var service schema.EventService
	if err := c.Get(ctx, root.EventService.ID, &service); err != nil {
		return err
	}
	if service.ServerSentEventURI == "" {
		return errors.New("the service has no stream of events")
	}
	uri := service.ServerSentEventURI
	if o.Filter != "" {
		uri += "?$filter=" + url.QueryEscape(o.Filter)
	}
	wait := time.Second
	for {
		stopped := false
		err := c.events(ctx, uri, o.After, func(id string, e schema.Event) error {
			if err := handle(e); err != nil {
				stopped = true
				return err
			}
			o.After, wait = id, time.Second
			return nil
		})
		var refused *Error
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case stopped:
			return err
		case errors.As(err, &refused) && refused.Status < 500 && refused.Status != http.StatusTooManyRequests:
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
			wait = min(2*wait, maxStreamWait)
		}
	}
}

// events reads one stream to its end.
func (c *Client) events(ctx context.Context, uri, after string, handle func(string, schema.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(streamSilence, cancel)
	defer silence.Stop()
	var resp *http.Response
	for again := false; ; again = true {
		header, token, err := c.authenticate(ctx)
		if err != nil {
			return err
		}
		header.Set("Accept", "text/event-stream")
		if after != "" {
			header.Set("Last-Event-ID", after)
		}
		resp, err = c.open(ctx, http.MethodGet, uri, nil, header)
		var refused *Error
		if errors.As(err, &refused) && refused.Status == http.StatusUnauthorized && token != "" && !again {
			c.forget(token) // the session has run out
			continue
		}
		if err != nil {
			return err
		}
		break
	}
	defer resp.Body.Close()
	return readStream(resp.Body, func() { silence.Reset(streamSilence) }, handle)
}

// readStream parses server-sent events (WHATWG HTML, section 9.2). It calls alive for each line.
func readStream(r io.Reader, alive func(), handle func(id string, e schema.Event) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxEventLine)
	var id string
	var data strings.Builder
	for lines.Scan() {
		alive()
		line := lines.Text()
		if line == "" {
			if data.Len() > 0 {
				var e schema.Event
				if err := json.Unmarshal([]byte(data.String()), &e); err != nil {
					return fmt.Errorf("decode event: %w", err)
				}
				if err := handle(id, e); err != nil {
					return err
				}
			}
			data.Reset()
			continue
		}
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch name {
		case "id":
			id = value
		case "data":
			if data.Len()+len(value) > maxEventLine {
				return errors.New("an event is too long")
			}
			if data.Len() > 0 {
				data.WriteByte('\n')
			}
			data.WriteString(value)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	return io.ErrUnexpectedEOF
}
