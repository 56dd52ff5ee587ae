// Package qmp speaks the QEMU Machine Protocol: commands with answers, and events, over any connection.
//
// Source: docs/interop/qmp-spec.txt of QEMU 7.2.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// ErrClosed means that QEMU has closed the connection, which it does when it ends.
var ErrClosed = errors.New("QMP connection is closed")

// Error is a command that QEMU refused.
type Error struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *Error) Error() string { return fmt.Sprintf("QMP %s: %s", e.Command, e.Desc) }

// Event is something that happened in QEMU.
type Event struct {
	Name string
	Data json.RawMessage
	At   time.Time // QEMU's clock, which is this machine's
}

// Client is a connection in command mode. It is safe for concurrent use.
type Client struct {
	conn io.ReadWriteCloser
	done chan struct{} // closed when the reader has ended

	write sync.Mutex // serialises whole commands

	mu      sync.Mutex
	nextID  uint64                  // guarded by mu
	waiting map[uint64]chan message // guarded by mu
}

type message struct {
	QMP       json.RawMessage `json:"QMP"`
	ID        uint64          `json:"id"`
	Return    json.RawMessage `json:"return"`
	Error     *Error          `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// New waits for QEMU's greeting on conn, enters command mode and returns the client, which then owns conn.
// Each event is passed to onEvent, in order, from one goroutine; onEvent must not block and must not call Execute.
func New(ctx context.Context, conn io.ReadWriteCloser, onEvent func(Event)) (*Client, error) {
	c := &Client{conn: conn, done: make(chan struct{}), waiting: make(map[uint64]chan message)}
	greeted := make(chan struct{})
	go c.read(onEvent, greeted)
	select {
	case <-greeted:
	case <-c.done:
		return nil, fmt.Errorf("QMP greeting: %w", ErrClosed)
	case <-ctx.Done():
		conn.Close()
		return nil, fmt.Errorf("QMP greeting: %w", context.Cause(ctx))
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) read(onEvent func(Event), greeted chan struct{}) {
	defer close(c.done)
	in := bufio.NewScanner(c.conn)
	in.Buffer(nil, 16<<20)
	for in.Scan() {
		var m message
		if json.Unmarshal(in.Bytes(), &m) != nil {
			continue // not ours to judge; the command that waits for it ends with its context
		}
		switch {
		case m.QMP != nil:
			if greeted != nil {
				close(greeted)
				greeted = nil
			}
		case m.Event != "":
			if onEvent != nil {
				onEvent(Event{m.Event, m.Data, time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)})
			}
		default:
			c.mu.Lock()
			ch := c.waiting[m.ID]
			delete(c.waiting, m.ID)
			c.mu.Unlock()
			if ch != nil {
				ch <- m
			}
		}
	}
}

// Done is closed when QEMU has closed the connection.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection; QEMU runs on.
func (c *Client) Close() error { return c.conn.Close() }

// Execute runs a command. args and result may be nil. A refusal is an *Error.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	ch := make(chan message, 1)
	c.mu.Lock()
	c.nextID++
	id := c.nextID
	c.waiting[id] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	c.write.Lock()
	_, err = c.conn.Write(append(b, '\n'))
	c.write.Unlock()
	if err != nil {
		return fmt.Errorf("QMP %s: %w: %w", command, ErrClosed, err)
	}
	var m message
	select {
	case m = <-ch:
	case <-c.done:
		select { // the answer may have come with the end
		case m = <-ch:
		default:
			return fmt.Errorf("QMP %s: %w", command, ErrClosed)
		}
	case <-ctx.Done():
		return fmt.Errorf("QMP %s: %w", command, context.Cause(ctx))
	}
	if m.Error != nil {
		m.Error.Command = command
		return m.Error
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("QMP %s: read the answer: %w", command, err)
	}
	return nil
}

// Human runs a command of the human monitor and returns what it prints.
func (c *Client) Human(ctx context.Context, line string) (string, error) {
	var out string
	err := c.Execute(ctx, "human-monitor-command", map[string]string{"command-line": line}, &out)
	return out, err
}
