package service

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	// streamAlive is how often a stream without events says that it is alive, and looks whether its user may still have it.
	streamAlive = 15 * time.Second
	// streamWrite is how long a client may take to read what it is sent.
	streamWrite = 20 * time.Second
)

// stream sends events as they come, by server-sent events (DSP0266, "Server-sent events"). It begins behind the event that Last-Event-ID
// names, as far as that is still kept, and ends when either side goes, when its EventDestination is deleted, or with the
// user's account; not with the session.
func (s *Service) stream(r *Request, w http.ResponseWriter) error {
	c := &subscription{User: r.Caller.User, Context: randomText(9), stream: true}
	if err := streamQuery(r.http.URL.RawQuery, &c.Interest); err != nil {
		return err
	}
	// The request's own deadline is over when the stream begins.
	ctx, end := context.WithCancel(r.http.Context())
	defer end()
	c.end = end
	bus := s.busOf(&c.Interest)
	cursor := bus.end()
	if id := r.http.Header.Get("Last-Event-ID"); id != "" {
		cursor = bus.after(id)
	}
	if err := s.subs.add(c); err != nil {
		return err
	}
	s.Publish(Event{MessageID: resourceEvent + "ResourceCreated", Origin: subscriptionsURI + "/" + c.ID})
	defer func() {
		if err := s.subs.remove(c.ID); err == nil {
			s.Publish(Event{MessageID: resourceEvent + "ResourceRemoved", Origin: subscriptionsURI + "/" + c.ID})
		} else if !errors.Is(err, ErrNotFound) {
			s.log.Error("remove stream", "err", err)
		}
	}()

	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Time{}) // not every ResponseWriter has one
	h := w.Header()
	h.Set("Content-Type", "text/event-stream;charset=utf-8")
	h.Set("Cache-Control", "no-store")
	write := func(text string) bool {
		_ = control.SetWriteDeadline(time.Now().Add(streamWrite))
		if _, err := w.Write([]byte(text)); err != nil {
			return false
		}
		return control.Flush() == nil
	}
	if !write(": events of " + s.uuid + "\n\n") {
		return nil
	}
	alive := time.NewTicker(streamAlive)
	defer alive.Stop()
	for {
		recs, next, lost, wake := bus.since(cursor, maxBatch)
		cursor = next
		if lost && len(recs) > 0 && !c.Interest.Reports {
			missing := s.eventRecord(Event{MessageID: baseRegistry + "EventBufferExceeded", Origin: eventsURI, Time: s.now()})
			missing.seq = recs[0].seq - 1
			recs = append([]*eventRecord{missing}, recs...)
		}
		for _, rec := range recs {
			if !c.Interest.wants(rec) && !sameMessage(rec.messageID, baseRegistry+"EventBufferExceeded") {
				continue
			}
			if !write(fmt.Sprintf("id: %s\ndata: %s\n\n", bus.name(rec.seq), bus.payload(c.Context, []*eventRecord{rec}))) {
				return nil
			}
		}
		if len(recs) > 0 && ctx.Err() == nil {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
		case <-alive.C:
			if a, ok := s.accounts.byUser(c.User); !ok || !a.Enabled || !write(": alive\n\n") {
				return nil
			}
		}
	}
}

// streamQuery reads the $filter of a stream.
func streamQuery(raw string, w *interest) error {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return refuse(400, "QueryParameterValueFormatError", raw, "$filter")
	}
	for name := range values {
		if strings.HasPrefix(name, "$") && name != "$filter" {
			return refuse(501, "QueryParameterUnsupported", name)
		}
	}
	text, ok := values["$filter"]
	if !ok {
		return nil
	}
	if w.filter, err = parseFilter(text[0]); err != nil {
		return Because(400, "QueryParameterValueFormatError", "The value of $filter cannot be read: "+err.Error()+".", text[0], "$filter")
	}
	var unknown string
	w.filter.comparisons(func(f *filter) {
		if len(f.path) != 1 || !slices.Contains(streamFilters, f.path[0]) {
			unknown = strings.Join(f.path, "/")
		}
		if f.path[0] == "EventFormatType" && f.literal == formatReport || f.path[0] == "MetricReportDefinition" {
			w.Reports = true
		}
		if f.path[0] == "SubordinateResources" && f.literal == true {
			w.Subordinate = true
		}
	})
	if unknown != "" {
		return Because(400, "QueryParameterValueFormatError", "Streams cannot be filtered by "+clip(unknown)+".", text[0], "$filter")
	}
	return nil
}
