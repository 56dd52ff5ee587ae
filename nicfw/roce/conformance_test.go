//go:build linux

package roce_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/nicfw/roce/linktest"
)

// TestLinks is what every link must do; the one over AF_XDP passes it in its own package.
func TestLinks(t *testing.T) {
	pipe := func(*testing.T) (roce.Link, roce.Link) {
		return roce.NewPipe(netip.MustParseAddrPort("10.0.0.1:4791"), netip.MustParseAddrPort("10.0.0.2:4791"), 4096, roce.Faults{})
	}
	udp := func(cfg roce.UDPConfig) func(t *testing.T) (roce.Link, roce.Link) {
		return func(t *testing.T) (roce.Link, roce.Link) { return udpLink(t, cfg), udpLink(t, cfg) }
	}
	for _, kind := range []struct {
		name string
		open func(t *testing.T) (a, b roce.Link)
	}{
		{"pipe", pipe},
		{"pipe with capture", func(t *testing.T) (roce.Link, roce.Link) {
			a, b := pipe(t)
			return roce.Capture(a, new(bytes.Buffer)), b
		}},
		{"impaired pipe", func(t *testing.T) (roce.Link, roce.Link) {
			a, b := pipe(t)
			return roce.Impair(a, roce.Faults{}), roce.Impair(b, roce.Faults{})
		}},
		{"udp", udp(roce.UDPConfig{})},
		{"udp without offload", udp(roce.UDPConfig{NoOffload: true})},
		{"udp busy polling", udp(roce.UDPConfig{Spin: 50 * time.Microsecond})},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			a, b := kind.open(t)
			linktest.Test(t, a, b, 4096)
		})
	}
}

// udpLink opens a link on loopback, at an address that no other test of this machine uses at the same time.
func udpLink(t *testing.T, cfg roce.UDPConfig) roce.Link {
	t.Helper()
	for try := 0; ; try++ {
		r := rand.Uint32()
		cfg.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, byte(1 + r%200), byte(r >> 8), byte(1 + r>>16%250)}), 0)
		l, err := roce.ListenUDP(cfg)
		if errors.Is(err, unix.EADDRINUSE) && try < 10 {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
}
