package client

import (
	"context"
	"errors"
	"time"
)

// The orders to the packet path between the host and the wire.
const (
	NetworkQuarantine = "Quarantine"
	NetworkRateLimit  = "RateLimit"
	NetworkRelease    = "Release"
)

// ErrNoNetwork is of an agent that does not stand between its host and the wire.
var ErrNoNetwork = errors.New("this agent does not stand between its host and the wire")

// NetworkOrder keeps the host's traffic back, or lets it go. What is zero is the agent's to choose.
type NetworkOrder struct {
	Do             string   `json:"-"`
	Seconds        int64    `json:"Seconds,omitempty"`
	Allow          []string `json:"Allow,omitempty"`    // of a quarantine: who the host may still talk to
	Remote         string   `json:"Remote,omitempty"`   // of a quarantine: the one remote to cut off
	Protocol       int      `json:"Protocol,omitempty"` // with that remote
	Port           int      `json:"Port,omitempty"`     // of that remote
	BytesPerSecond int64    `json:"BytesPerSecond,omitempty"`
	BurstBytes     int64    `json:"BurstBytes,omitempty"`
}

// Network is what the packet path has done, and what it keeps back.
type Network struct {
	Datapath struct {
		HostPort, UplinkPort string
		LastFrame            time.Time
		Counters             []NetworkCounter
		Flows                []NetworkFlow
	}
	Containment struct {
		QuarantineUntil, LimitUntil time.Time
		Allow                       []string
		BytesPerSecond, BurstBytes  uint64
		Blocked                     []struct {
			Remote         string
			Protocol, Port int
			Until          time.Time
		}
	}
}

// NetworkCounter counts frames that came in at a port, "host" or "uplink", by what became of them.
type NetworkCounter struct {
	Port, Verdict string
	Frames, Bytes uint64
}

// NetworkFlow is a conversation of the host.
type NetworkFlow struct {
	Host, Remote         string
	Protocol             int
	Sent, Received, Held uint64
	Last                 time.Time
}

// Frames returns a counter.
func (n Network) Frames(port, verdict string) uint64 {
	for _, c := range n.Datapath.Counters {
		if c.Port == port && c.Verdict == verdict {
			return c.Frames
		}
	}
	return 0
}

// OrderNetwork has the packet path do what the order says. When it returns nil, that is in force.
func (c *Client) OrderNetwork(ctx context.Context, o NetworkOrder) error {
	s, err := c.System(ctx)
	if err != nil {
		return err
	}
	action, ok := s.Actions["#BackdoorDatapath."+o.Do]
	if !ok {
		return ErrNoNetwork
	}
	_, err = c.Post(ctx, action.Target, o, nil)
	return err
}

// Network reads the state of the packet path.
func (c *Client) Network(ctx context.Context) (n Network, err error) {
	s, err := c.System(ctx)
	if err != nil {
		return n, err
	}
	if _, ok := s.Actions["#BackdoorDatapath."+NetworkRelease]; !ok {
		return n, ErrNoNetwork
	}
	return n, c.Get(ctx, NetworkURI, &n)
}
