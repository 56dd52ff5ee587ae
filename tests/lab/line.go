package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// errHostGone ends requests on the control line that can no longer be answered.
var errHostGone = errors.New("the host was reset or switched off before it answered")

// line is the lab's end of the control line to HOST, for one run of its QEMU.
type line struct {
	conn    net.Conn
	onEvent func(control.Response)

	write sync.Mutex // serialises whole requests

	mu      sync.Mutex
	nextID  uint64                           // guarded by mu
	waiting map[uint64]chan control.Response // guarded by mu; nil once the connection has ended
}

func newLine(conn net.Conn, onEvent func(control.Response)) *line {
	l := &line{conn: conn, onEvent: onEvent, waiting: make(map[uint64]chan control.Response)}
	go l.read()
	return l
}

func (l *line) read() {
	in := bufio.NewScanner(l.conn)
	in.Buffer(make([]byte, 64<<10), control.MaxLine)
	for in.Scan() {
		var r control.Response
		if json.Unmarshal(in.Bytes(), &r) != nil {
			continue // a line that a reset has cut in two
		}
		if r.Event != "" {
			l.onEvent(r)
			continue
		}
		l.mu.Lock()
		ch := l.waiting[r.ID]
		delete(l.waiting, r.ID)
		l.mu.Unlock()
		if ch != nil {
			ch <- r
		}
	}
	l.forget()
	l.mu.Lock()
	l.waiting = nil
	l.mu.Unlock()
}

// forget ends all requests that wait.
func (l *line) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, ch := range l.waiting {
		close(ch)
		delete(l.waiting, id)
	}
}

func (l *line) do(ctx context.Context, op string, args, result any) error {
	req := control.Request{Op: op}
	if args != nil {
		b, err := json.Marshal(args)
		if err != nil {
			return fmt.Errorf("host: %s: %w", op, err)
		}
		req.Args = b
	}
	ch := make(chan control.Response, 1)
	l.mu.Lock()
	if l.waiting == nil {
		l.mu.Unlock()
		return fmt.Errorf("host: %s: %w", op, errHostGone)
	}
	l.nextID++
	req.ID = l.nextID
	l.waiting[req.ID] = ch
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.waiting, req.ID)
		l.mu.Unlock()
	}()
	b, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("host: %s: %w", op, err)
	}
	l.write.Lock()
	_, err = l.conn.Write(append(b, '\n'))
	l.write.Unlock()
	if err != nil {
		return fmt.Errorf("host: %s: %w", op, errors.Join(errHostGone, err))
	}
	var r control.Response
	var ok bool
	select {
	case r, ok = <-ch:
	case <-ctx.Done():
		return fmt.Errorf("host: %s: %w", op, context.Cause(ctx))
	}
	if !ok {
		return fmt.Errorf("host: %s: %w", op, errHostGone)
	}
	if r.Error != "" {
		return fmt.Errorf("host: %s: %s", op, r.Error)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.Result, result); err != nil {
		return fmt.Errorf("host: %s: read the answer: %w", op, err)
	}
	return nil
}
