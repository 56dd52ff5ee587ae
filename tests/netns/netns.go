//go:build linux

// Package netns gives tests network namespaces of their own.
package netns

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace, and the thread that stays in it. Sockets, and processes started there, remain in it
// whichever thread uses them.
type Namespace struct {
	do chan func()
	fd int
}

// New makes a namespace with nothing in it but a loopback interface that is down. It needs root: the error wraps
// unix.EPERM otherwise.
func New() (*Namespace, error) {
	n := &Namespace{do: make(chan func()), fd: -1}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		ready <- err
		if err != nil {
			return
		}
		for f := range n.do {
			f()
		}
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	return n, nil
}

// Do runs f in the namespace. f must not start goroutines that count on being there.
func (n *Namespace) Do(f func() error) error {
	done := make(chan error)
	n.do <- func() { done <- f() }
	return <-done
}

// FD returns the file descriptor of the namespace, to move interfaces there.
func (n *Namespace) FD() int { return n.fd }

// Close ends the thread; the namespace goes when nothing uses it any more.
func (n *Namespace) Close() error {
	close(n.do)
	return unix.Close(n.fd)
}
