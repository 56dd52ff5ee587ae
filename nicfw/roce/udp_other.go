//go:build !linux

package roce

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// UDPConfig describes a link over UDP, which needs Linux: elsewhere the IPv4 identification of what a socket sends is
// not known, and the ICRC covers it.
type UDPConfig struct {
	Addr       netip.AddrPort
	PathMTU    int
	Spin       time.Duration
	RecvBuffer int
	SendBuffer int
	NoOffload  bool
}

// ListenUDP fails.
func ListenUDP(cfg UDPConfig) (Link, error) {
	return nil, fmt.Errorf("listen on UDP %v: %w", cfg.Addr, errors.ErrUnsupported)
}
