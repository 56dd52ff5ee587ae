package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"
)

// fake is a QEMU that greets, refuses "bad", answers everything else with its arguments, and ends at "quit".
func fake(t *testing.T, conn net.Conn, greet bool) {
	t.Helper()
	defer conn.Close()
	if greet {
		fmt.Fprint(conn, `{"QMP": {"version": {}, "capabilities": []}}`+"\r\n")
	}
	in := bufio.NewScanner(conn)
	for in.Scan() {
		var cmd struct {
			Execute   string
			Arguments json.RawMessage
			ID        uint64
		}
		if err := json.Unmarshal(in.Bytes(), &cmd); err != nil {
			t.Errorf("command %q: %v", in.Text(), err)
			return
		}
		switch cmd.Execute {
		case "quit":
			return
		case "bad":
			fmt.Fprintf(conn, `{"id": %d, "error": {"class": "GenericError", "desc": "no"}}`+"\r\n", cmd.ID)
		default:
			fmt.Fprint(conn, `{"event": "PING", "data": {"n": 1}, "timestamp": {"seconds": 5, "microseconds": 7}}`+"\r\n")
			if cmd.Arguments == nil {
				cmd.Arguments = json.RawMessage("{}")
			}
			fmt.Fprintf(conn, `{"id": %d, "return": %s}`+"\r\n", cmd.ID, cmd.Arguments)
		}
	}
}

func TestClient(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	a, b := net.Pipe()
	go fake(t, b, true)
	events := make(chan Event, 10)
	c, err := New(ctx, a, func(e Event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var got map[string]int
	if err := c.Execute(ctx, "echo", map[string]int{"x": 4}, &got); err != nil || got["x"] != 4 {
		t.Errorf("Execute(echo) = %v, %v; want x=4", got, err)
	}
	if e := <-events; e.Name != "PING" || !e.At.Equal(time.Unix(5, 7000)) {
		t.Errorf("event = %+v; want PING at 5.000007", e)
	}
	var qe *Error
	if err := c.Execute(ctx, "bad", nil, nil); !errors.As(err, &qe) || qe.Desc != "no" || qe.Command != "bad" {
		t.Errorf("Execute(bad) = %v; want a refusal", err)
	}
	if err := c.Execute(ctx, "quit", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Execute(quit) = %v; want ErrClosed", err)
	}
	<-c.Done()
	if err := c.Execute(ctx, "echo", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Execute after the end = %v; want ErrClosed", err)
	}
}

func TestNoGreeting(t *testing.T) {
	a, b := net.Pipe()
	go fake(t, b, false)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := New(ctx, a, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("New without a greeting = %v; want a time-out", err)
	}
}
