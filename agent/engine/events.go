package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// subscriberBuffer is how many events a subscriber may lag behind before it loses some.
const subscriberBuffer = 256

// Subscribe returns a channel of events from now on. It is closed when ctx ends. A reader that is too slow loses events and
// sees so by their Seq.
func (e *Engine) Subscribe(ctx context.Context) <-chan Event {
	ch := make(chan Event, subscriberBuffer)
	e.mu.Lock()
	if e.subscribers == nil {
		e.subscribers = make(map[chan Event]bool)
	}
	e.subscribers[ch] = true
	e.mu.Unlock()
	context.AfterFunc(ctx, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.subscribers, ch)
		close(ch)
	})
	return ch
}

// publish sends an event to all subscribers. e.mu is held.
func (e *Engine) publish(ev Event) {
	e.eventSeq++
	ev.Seq, ev.At = e.eventSeq, time.Now()
	for ch := range e.subscribers {
		select {
		case ch <- ev:
		default:
		}
	}
	e.log.Info("event", "type", ev.Type, "text", ev.Text)
}

func findingEvent(t EventType, f detect.Finding, text string) Event {
	return Event{Type: t, Text: text, Finding: &f}
}

func kernelEvent(t EventType, i kernel.Info, text string) Event {
	return Event{Type: t, Text: text, Kernel: &i}
}

func outcomeEvent(t EventType, f detect.Finding, o heal.Outcome, text string) Event {
	return Event{Type: t, Text: text, Finding: &f, Outcome: &o}
}

// note keeps the latest faults of the engine itself. e.mu is held.
func (e *Engine) note(where string, err error) {
	const keep = 20
	text := err.Error()
	if n := len(e.faults); n > 0 && e.faults[n-1].Where == where && e.faults[n-1].Error == text {
		e.faults[n-1].Count++
		e.faults[n-1].At = time.Now()
		return
	}
	e.log.Warn("fault", "where", where, "err", err)
	e.faults = append(e.faults, FaultNote{At: time.Now(), Where: where, Error: text, Count: 1})
	if len(e.faults) > keep {
		e.faults = e.faults[1:]
	}
}

// entry is a record on its way to the journal.
type entry struct {
	kind string
	v    any
}

// record has something journalled without waiting for it: what the loop sees is worth keeping, but a slow disk must not
// make the loop late. What a repair does is journalled by the executor, which does wait. e.mu is held.
func (e *Engine) record(kind string, v any) {
	if e.o.Journal == nil {
		return
	}
	select {
	case e.journal <- entry{kind, v}:
	default:
		e.note("journal", fmt.Errorf("a record of kind %q was dropped: the journal is too slow", kind))
	}
}

// writeJournal works until ctx ends, and then writes what is still queued.
func (e *Engine) writeJournal(ctx context.Context) {
	put := func(r entry) {
		if e.o.Journal == nil {
			return
		}
		if _, err := e.o.Journal.Write(r.kind, r.v); err != nil {
			e.mu.Lock()
			e.note("journal", err)
			e.mu.Unlock()
		}
	}
	for {
		select {
		case r := <-e.journal:
			put(r)
		case <-ctx.Done():
			for {
				select {
				case r := <-e.journal:
					put(r)
				default:
					return
				}
			}
		}
	}
}
