package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
	"golang.org/x/sys/unix"
)

// sendFrames puts frames on the wire as they are, past the kernel's network stack, as root can.
func sendFrames(a control.FramesArgs) (control.FramesResult, error) {
	var r control.FramesResult
	if len(a.Frames) == 0 {
		return r, errors.New("frames: there are none")
	}
	i, err := net.InterfaceByName("eth0")
	if err != nil {
		return r, fmt.Errorf("frames: %w", err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return r, fmt.Errorf("frames: %w", err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrLinklayer{Ifindex: i.Index, Halen: 6}
	end := time.Now().Add(a.For)
	next := time.Now()
	for n := 0; n < max(a.Count, 1) || a.For > 0; n++ {
		if a.For > 0 && time.Now().After(end) {
			break
		}
		f := append([]byte(nil), a.Frames[n%len(a.Frames)]...)
		if at := a.Vary; at > 0 && at+2 <= len(f) {
			binary.BigEndian.PutUint16(f[at:], binary.BigEndian.Uint16(f[at:])+uint16(n))
		}
		if a.Gap > 0 {
			time.Sleep(time.Until(next))
			next = next.Add(a.Gap)
		}
		err := unix.Sendto(fd, f, 0, to)
		switch {
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EAGAIN):
			r.Dropped++
		case err != nil:
			return r, fmt.Errorf("frames: send frame %d of %d bytes: %w", n, len(f), err)
		default:
			r.Sent++
		}
	}
	return r, nil
}
