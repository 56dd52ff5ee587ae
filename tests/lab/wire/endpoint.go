package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"

	"github.com/backdoor-rhs/backdoor/tests/lab/internal/unixsock"
)

// Endpoint is a Go program's network card on the wire. It is safe for concurrent use.
type Endpoint struct {
	Port *Port // nil if the switch is in another process

	conn link
	in   chan []byte
	done chan struct{}
	stop sync.Once
}

// Endpoint adds a port for a Go program in this process.
func (s *Switch) Endpoint(name string) (*Endpoint, error) {
	p, far, err := s.Socket(name)
	if err != nil {
		return nil, err
	}
	e := newEndpoint(far)
	e.Port = p
	return e, nil
}

func newEndpoint(conn link) *Endpoint {
	e := &Endpoint{conn: conn, in: make(chan []byte, queue), done: make(chan struct{})}
	go e.receive()
	return e
}

func (e *Endpoint) receive() {
	defer close(e.in)
	buf := make([]byte, MaxFrame)
	for {
		n, err := e.conn.Read(buf)
		if err != nil {
			return
		}
		select {
		case e.in <- append([]byte(nil), buf[:n]...):
		case <-e.done:
			return
		}
	}
}

// Send sends a frame from its destination address on, without check sequence. It blocks while the wire is busy and does
// not keep the frame.
func (e *Endpoint) Send(frame []byte) error {
	if len(frame) < header || len(frame) > MaxFrame {
		return fmt.Errorf("wire: send: %d bytes are no frame; want %d to %d", len(frame), header, MaxFrame)
	}
	if _, err := e.conn.Write(frame); err != nil {
		return fmt.Errorf("wire: send: %w", err)
	}
	return nil
}

// Receive returns the next frame, which is the caller's. The error wraps net.ErrClosed after the end of the wire.
func (e *Endpoint) Receive(ctx context.Context) ([]byte, error) {
	select {
	case f, ok := <-e.in:
		if !ok {
			return nil, errClosed
		}
		return f, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wire: receive: %w", context.Cause(ctx))
	}
}

// Close unplugs the endpoint.
func (e *Endpoint) Close() error {
	var err error
	e.stop.Do(func() {
		close(e.done)
		err = e.conn.Close()
		if e.Port != nil {
			err = errors.Join(err, e.Port.Close())
		}
	})
	return err
}

// Listen lets programs of other processes onto the wire: each that connects to the socket at path (see Dial) gets a port
// of its own. It ends, and the socket goes, with the switch.
func (s *Switch) Listen(path string) error {
	var ln *net.UnixListener
	err := unixsock.Short(path, func(p string) (err error) {
		ln, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: p, Net: "unixpacket"})
		return err
	})
	if err != nil {
		return fmt.Errorf("wire: listen: %w", err)
	}
	ln.SetUnlinkOnClose(false) // it would unlink the short name
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		ln.Close()
		os.Remove(path)
		return errClosed
	}
	s.ends = append(s.ends, closer(func() error { return errors.Join(ln.Close(), os.Remove(path)) }))
	go func() {
		for n := 1; ; n++ {
			conn, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			if _, err := s.attach("guest-"+strconv.Itoa(n), packetConn{conn}); err != nil {
				return
			}
		}
	}()
	return nil
}

type closer func() error

func (c closer) Close() error { return c() }

// packetConn turns the empty packet that ends a connection into io.EOF.
type packetConn struct{ *net.UnixConn }

func (c packetConn) Read(p []byte) (int, error) {
	n, err := c.UnixConn.Read(p)
	if n == 0 && err == nil {
		return 0, io.EOF
	}
	return n, err
}

// Dial plugs this program into the wire of a lab in another process.
func Dial(path string) (*Endpoint, error) {
	var conn *net.UnixConn
	err := unixsock.Short(path, func(p string) (err error) {
		conn, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p, Net: "unixpacket"})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("wire: dial: %w", err)
	}
	return newEndpoint(packetConn{conn}), nil
}
